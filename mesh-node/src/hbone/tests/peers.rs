//! What peers say of what they carry, and that they say something.

use super::*;

/// What one node says of an application is told apart, at the other, from an application that is gone.
#[tokio::test(start_paused = true)]
async fn what_was_not_of_the_protocol_is_told_apart_from_a_reset() {
    for garbles in [true, false] {
        let (connection, mut server) = connected().await;
        let (mut opened, accepted) = pair(&connection, &mut server).await;
        if garbles {
            accepted.garble();
        } else {
            accepted.reset();
        }
        let ended = opened.halves().0.next().await;
        let error = ended.expect_err("no end of data");
        assert_eq!((super::super::tunnel::is_garbled(&error), super::super::tunnel::is_reset(&error)), (garbles, !garbles));
    }
}

/// A connection whose peer answers nothing is not used for others; one whose peer answers others is.
#[tokio::test(start_paused = true)]
async fn a_silent_peer_gets_no_more_tunnels_on_the_same_connection() {
    for answers in [false, true] {
        let (connection, mut server) = connected().await;
        let waiting = tokio::spawn({
            let connection = connection.clone();
            async move { connection.open(request()).await.map(drop) }
        });
        let _offer = server.offers.recv().await.expect("an offer");
        if answers {
            sleep(Duration::from_secs(1)).await;
            let _other = pair(&connection, &mut server).await;
        }
        sleep(Duration::from_secs(6)).await;
        assert_eq!(connection.has_room(), answers, "{answers}");
        assert!(!waiting.is_finished(), "it may still be answered");
    }
}

/// As one is whose pod is gone, and its network with it.
#[tokio::test(start_paused = true)]
async fn a_peer_that_may_be_gone_is_given_up_sooner_unless_it_answers() {
    let (connection, mut server) = connected().await;
    let (_tunnel, accepted) = pair(&connection, &mut server).await;
    connection.close();
    connection.doubt();
    sleep(PING_INTERVAL).await;
    assert_eq!(connection.streams(), 1, "it has answered");
    drop(accepted);
    for waited in [Duration::ZERO, PING_INTERVAL + Duration::from_secs(1)] {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let silent = Connection::handshake(near, std::future::pending()).await.expect("handshake");
        // A ping may be under way.
        sleep(waited).await;
        let opening = tokio::spawn({
            let silent = silent.clone();
            async move { silent.open(request()).await }
        });
        sleep(Duration::from_millis(1)).await;
        silent.doubt();
        sleep(DOUBTED_TIMEOUT.mul_f64(0.99)).await;
        assert!(!opening.is_finished());
        sleep(DOUBTED_TIMEOUT.mul_f64(0.02)).await;
        assert!(opening.is_finished() && opening.await.expect("ended").is_err());
        drop(far);
    }
}
