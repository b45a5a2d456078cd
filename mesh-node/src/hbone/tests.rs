//! Client, pool and server against each other, in memory and on paused time.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    sync::{Notify, mpsc, watch},
    time::{sleep, timeout},
};

use super::{
    IDLE_RELEASE, PING_INTERVAL, PING_TIMEOUT, POOL_STREAMS,
    headers::{Authority, Forwarded, TraceParent, build},
    pool::PoolKey,
    server::Offer,
    *,
};
use crate::{
    id::{SpiffeId, WorkloadUid},
    io::relay::{Duplex, Sink, Source},
};

mod peers;

/// A server that hands its offers to the test, and can be told to drain.
struct Server {
    offers: mpsc::UnboundedReceiver<Offer>,
    drain: watch::Sender<bool>,
}

fn serve(io: DuplexStream) -> Server {
    let (offer, offers) = mpsc::unbounded_channel();
    let (drain, mut draining) = watch::channel(false);
    tokio::spawn(server::serve(io, move |o| drop(offer.send(o)), async move {
        if draining.wait_for(|d| *d).await.is_err() {
            std::future::pending::<()>().await;
        }
    }));
    Server { offers, drain }
}

async fn connected() -> (Connection, Server) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let server = serve(far);
    (Connection::handshake(near, std::future::pending()).await.expect("handshake"), server)
}

fn request() -> Request<()> {
    let forwarded = Forwarded { client: "10.0.0.1:1".parse().expect("valid"), host: None };
    build(&Authority::Address("10.0.0.2:80".parse().expect("valid")), &forwarded, "", TraceParent::fresh(1, 1)).expect("request")
}

impl Server {
    async fn accept(&mut self) -> Tunnel {
        self.offers.recv().await.expect("an offer").answer.accept().expect("accepted")
    }
}

async fn pair(connection: &Connection, server: &mut Server) -> (Tunnel, Tunnel) {
    let (opened, accepted) = tokio::join!(connection.open(request()), server.accept());
    (opened.expect("opened"), accepted)
}

#[tokio::test(start_paused = true)]
async fn each_direction_ends_on_its_own_and_a_reset_is_no_end() {
    let (connection, mut server) = connected().await;
    let (mut near, mut far) = pair(&connection, &mut server).await;
    {
        let ((mut from_far, mut to_far), (mut from_near, mut to_near)) = (near.halves(), far.halves());
        to_far.put(Bytes::from_static(b"question")).await.expect("put");
        to_far.finish().await.expect("finish");
        assert_eq!(from_near.next().await.expect("data").expect("some"), "question");
        assert!(from_near.next().await.expect("end").is_none());
        to_near.put(Bytes::from_static(b"answer")).await.expect("put after the other end finished");
        to_near.finish().await.expect("finish");
        assert_eq!(from_far.next().await.expect("data").expect("some"), "answer");
        assert!(from_far.next().await.expect("end").is_none());
    }
    let (near, mut far) = pair(&connection, &mut server).await;
    near.reset();
    let (mut from_near, _to_near) = far.halves();
    assert!(from_near.next().await.is_err(), "a reset is an error, not an end");
}

#[tokio::test(start_paused = true)]
async fn small_frames_that_have_come_are_one_piece_and_large_ones_are_not_copied() {
    let (connection, mut server) = connected().await;
    let (mut near, mut far) = pair(&connection, &mut server).await;
    let ((mut from_far, _to_far), (_from_near, mut to_near)) = (near.halves(), far.halves());
    for text in ["head ", "body ", "more"] {
        to_near.put(Bytes::from_static(text.as_bytes())).await.expect("put");
    }
    to_near.finish().await.expect("finish");
    sleep(Duration::from_millis(1)).await;
    assert_eq!(from_far.next().await.expect("data").expect("some"), "head body more");
    assert!(from_far.next().await.expect("end").is_none(), "the end comes after them");

    let (mut near, mut far) = pair(&connection, &mut server).await;
    let ((mut from_far, _to_far), (_from_near, mut to_near)) = (near.halves(), far.halves());
    let large = Bytes::from(vec![7; 20_000]);
    to_near.put(large.clone()).await.expect("put");
    to_near.put(Bytes::from_static(b"x")).await.expect("put");
    sleep(Duration::from_millis(1)).await;
    assert_eq!(from_far.next().await.expect("data").expect("some"), large);
    assert_eq!(from_far.next().await.expect("data").expect("some"), "x");
}

/// Counts writes.
struct Counted {
    io: DuplexStream,
    writes: Arc<AtomicUsize>,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_streams_have_to_send_at_once_goes_out_at_once() {
    // Where the scheduler would run who is woken before all others: not in the test's own task.
    tokio::spawn(async {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let mut server = serve(far);
        let writes = Arc::<AtomicUsize>::default();
        let io = Counted { io: near, writes: writes.clone() };
        let connection = Connection::handshake(io, std::future::pending()).await.expect("handshake");
        let go = Arc::new(Notify::new());
        let (mut tasks, mut ends) = (Vec::new(), Vec::new());
        for _ in 0..16 {
            let (mut near, far) = pair(&connection, &mut server).await;
            ends.push(far);
            let go = go.clone();
            tasks.push(tokio::spawn(async move {
                go.notified().await;
                near.halves().1.put(Bytes::from_static(b"hello")).await.expect("put");
                near
            }));
        }
        sleep(Duration::from_millis(50)).await;
        let before = writes.load(Ordering::Relaxed);
        go.notify_waiters();
        for end in &mut ends {
            assert_eq!(end.halves().0.next().await.expect("data").expect("some"), "hello");
        }
        let after = writes.load(Ordering::Relaxed);
        assert!(after - before <= 4, "{} writes for 16 streams", after - before);
    })
    .await
    .expect("done");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_tunnel_is_a_reset_at_the_other_end() {
    let (connection, mut server) = connected().await;
    let (near, mut far) = pair(&connection, &mut server).await;
    drop(near);
    assert!(far.halves().0.next().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_refusal_carries_its_status() {
    let (connection, mut server) = connected().await;
    let refuse = async { server.offers.recv().await.expect("an offer").answer.refuse(StatusCode::UNAUTHORIZED) };
    let (opened, ()) = tokio::join!(connection.open(request()), refuse);
    assert!(matches!(opened, Err(TunnelError::Refused(StatusCode::UNAUTHORIZED))));
    assert_eq!(connection.streams(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_closes_itself_and_a_used_one_does_not() {
    let (connection, mut server) = connected().await;
    let (near, _far) = pair(&connection, &mut server).await;
    sleep(IDLE_RELEASE * 2).await;
    assert!(!connection.is_closed() && connection.streams() == 1);
    drop(near);
    sleep(IDLE_RELEASE.mul_f64(0.99)).await;
    assert!(!connection.is_closed());
    sleep(IDLE_RELEASE.mul_f64(0.02)).await;
    assert!(connection.is_closed());
    assert!(matches!(connection.open(request()).await, Err(TunnelError::Closing(_))));
    assert!(server.offers.recv().await.is_none(), "the server has seen the end");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_no_pings_is_given_up() {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let connection = Connection::handshake(near, std::future::pending()).await.expect("the client's half of the handshake needs no answer");
    sleep(PING_INTERVAL + PING_TIMEOUT + Duration::from_secs(1)).await;
    assert!(connection.is_closed());
    drop(far);
}

#[tokio::test(start_paused = true)]
async fn a_draining_server_lets_streams_finish_and_takes_no_new_ones() {
    let (connection, mut server) = connected().await;
    let (mut near, mut far) = pair(&connection, &mut server).await;
    server.drain.send_replace(true);
    sleep(Duration::from_millis(10)).await;
    assert!(matches!(connection.open(request()).await, Err(TunnelError::Closing(_))));
    near.halves().1.put(Bytes::from_static(b"still here")).await.expect("put");
    assert_eq!(far.halves().0.next().await.expect("data").expect("some"), "still here");
}

/// What RFC 9113 section 8.1 has servers do that want no more of a request they have answered.
#[tokio::test(start_paused = true)]
async fn a_peer_that_has_said_all_may_want_no_more() {
    for whole in [true, false] {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let connection = Connection::handshake(near, std::future::pending());
        let (connection, mut server) = tokio::join!(connection, async { h2::server::handshake(far).await.expect("handshake") });
        let connection = connection.expect("handshake");
        tokio::spawn(async move {
            let (_request, mut respond) = server.accept().await.expect("a stream").expect("a request");
            let mut send = respond.send_response(http::Response::new(()), false).expect("answered");
            send.send_data(Bytes::from_static(b"all there is"), whole).expect("sent");
            // It goes out before the reset.
            let wait = async { sleep(Duration::from_millis(10)).await };
            tokio::select! {
                _ = std::future::poll_fn(|cx| server.poll_closed(cx)) => panic!("closed"),
                () = wait => {}
            }
            send.send_reset(h2::Reason::NO_ERROR);
            let _ = std::future::poll_fn(|cx| server.poll_closed(cx)).await;
        });
        let mut tunnel = connection.open(request()).await.expect("opened");
        sleep(Duration::from_secs(1)).await;
        let (mut source, mut sink) = tunnel.halves();
        assert!(timeout(Duration::from_secs(1), sink.broken()).await.is_err(), "that alone is no error");
        if whole {
            assert_eq!(source.next().await.expect("data").expect("some"), "all there is");
            assert!(source.next().await.expect("the end").is_none());
            sink.put(Bytes::from_static(b"for nobody")).await.expect("let go");
            sink.finish().await.expect("let go");
        } else {
            let mut read = source.next().await;
            if matches!(read, Ok(Some(_))) {
                read = source.next().await;
            }
            assert!(read.is_err(), "a reset without an end is an error");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_knows_when_its_peer_wants_no_more_of_them() {
    let (connection, mut server) = connected().await;
    let (mut near, mut far) = pair(&connection, &mut server).await;
    let leaving = near.leaving().expect("a client's");
    let soon = Duration::from_secs(1);
    assert!(timeout(soon, leaving.wait()).await.is_err() && !leaving.is_so() && connection.has_room());
    server.drain.send_replace(true);
    timeout(soon, leaving.wait()).await.expect("told");
    assert!(leaving.is_so() && !connection.has_room());
    // Who asks late is told at once.
    timeout(soon, leaving.wait()).await.expect("told");
    // What is open goes on.
    near.halves().1.put(Bytes::from_static(b"more")).await.expect("put");
    assert_eq!(far.halves().0.next().await.expect("data").expect("some"), "more");
}

/// Nearly the whole window in frames of one byte: held as frames they would exceed what the library puts up with.
const FRAMES: usize = 1_000_000;

/// Tiny frames to a reader that does not read must not end the connection others share.
#[tokio::test]
async fn a_stalled_reader_of_small_frames_does_not_end_the_connection() {
    let (connection, mut server) = connected().await;
    let (mut near, mut far) = pair(&connection, &mut server).await;
    let (done, flooded) = tokio::sync::oneshot::channel();
    let flood = async {
        let (_source, mut sink) = near.halves();
        for _ in 0..FRAMES {
            sink.put(Bytes::from_static(b"x")).await.expect("put");
        }
        sink.finish().await.expect("finish");
        sleep(Duration::from_millis(100)).await;
        done.send(()).expect("the reader waits");
    };
    let absorb = async {
        let (mut source, _sink) = far.halves();
        tokio::select! {
            error = source.absorb() => panic!("{error}"),
            flooded = flooded => flooded.expect("flooded"),
        }
        let mut count = 0;
        while let Some(chunk) = source.next().await.expect("the connection lives") {
            count += chunk.len();
            source.passed_on(chunk.len());
        }
        assert_eq!(count, FRAMES);
    };
    tokio::join!(flood, absorb);
    let (_near, _far) = pair(&connection, &mut server).await;
}

fn key(destination: &str) -> PoolKey {
    let id = |account: &str| SpiffeId::parse(&format!("spiffe://cluster.local/ns/a/sa/{account}")).expect("valid");
    PoolKey {
        source: id("client"),
        source_workload: WorkloadUid("client".into()),
        destination: id("server"),
        destination_workload: WorkloadUid(destination.into()),
        address: "10.0.0.2:15008".parse().expect("valid"),
    }
}

/// Dials in-memory servers that accept everything and keeps their tunnels open.
#[derive(Clone, Default)]
struct Network {
    dialled: Arc<AtomicUsize>,
    drains: Arc<std::sync::Mutex<Vec<watch::Sender<bool>>>>,
}

impl Network {
    async fn dial(self) -> Result<Connection, TunnelError> {
        self.dialled.fetch_add(1, Ordering::SeqCst);
        let (near, far) = tokio::io::duplex(64 * 1024);
        let mut server = serve(far);
        self.drains.lock().expect("lock").push(server.drain.clone());
        tokio::spawn(async move {
            let mut tunnels = Vec::new();
            while let Some(offer) = server.offers.recv().await {
                tunnels.push(offer.answer.accept());
            }
        });
        Connection::handshake(near, std::future::pending()).await
    }

    async fn open(&self, pool: &Pool, key: &PoolKey) -> Result<Tunnel, TunnelError> {
        pool.open(key, || Ok::<_, TunnelError>(request()), || self.clone().dial()).await
    }

    fn dialled(&self) -> usize {
        self.dialled.load(Ordering::SeqCst)
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_shares_connections_up_to_their_streams_and_keys_never_mix() {
    let (pool, network) = (Pool::default(), Network::default());
    let (key_a, key_b) = (key("a"), key("b"));
    let mut tunnels = Vec::new();
    for _ in 0..POOL_STREAMS {
        tunnels.push(network.open(&pool, &key_a).await.expect("opened"));
    }
    assert_eq!(network.dialled(), 1);
    tunnels.push(network.open(&pool, &key_a).await.expect("opened"));
    assert_eq!(network.dialled(), 2);
    tunnels.push(network.open(&pool, &key_b).await.expect("opened"));
    assert_eq!(network.dialled(), 3);
    drop(tunnels);
    network.open(&pool, &key_a).await.map(drop).expect("opened");
    assert_eq!(network.dialled(), 3, "an idle connection is used again");
}

#[tokio::test(start_paused = true)]
async fn a_goaway_moves_the_next_tunnel_to_a_new_connection() {
    let (pool, network) = (Pool::default(), Network::default());
    let key = key("a");
    let _open = network.open(&pool, &key).await.expect("opened");
    network.drains.lock().expect("lock")[0].send_replace(true);
    sleep(Duration::from_millis(10)).await;
    network.open(&pool, &key).await.map(drop).expect("opened elsewhere");
    assert_eq!(network.dialled(), 2);
}

#[tokio::test(start_paused = true)]
async fn connections_of_workloads_that_are_gone_are_closed() {
    let (pool, network) = (Pool::default(), Network::default());
    let open = network.open(&pool, &key("a")).await.expect("opened");
    pool.retain(|uid| &*uid.0 != "a", |_| true);
    assert!(pool.states().is_empty());
    network.open(&pool, &key("a")).await.map(drop).expect("opened");
    assert_eq!(network.dialled(), 2, "the old connection is not used again");
    drop(open);
}

#[tokio::test(start_paused = true)]
async fn a_failed_dial_is_the_callers_error_and_the_next_call_tries_again() {
    let pool = Pool::default();
    let fail = || async { Err::<Connection, TunnelError>(TunnelError::ResponseTimeout) };
    assert!(pool.open(&key("a"), || Ok(request()), fail).await.is_err());
    let network = Network::default();
    assert!(network.open(&pool, &key("a")).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_a_dial_do_not_fail_one_after_the_other() {
    let (pool, key) = (Pool::default(), key("a"));
    let silent = || async {
        sleep(Duration::from_secs(10)).await;
        Err::<Connection, TunnelError>(TunnelError::HandshakeTimeout)
    };
    let began = tokio::time::Instant::now();
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (pool, key) = (pool.clone(), key.clone());
        all.spawn(async move { pool.open(&key, || Ok(request()), silent).await.map(drop) });
    }
    let failed = all.join_all().await;
    assert!(failed.iter().all(|f| matches!(f, Err(TunnelError::HandshakeTimeout))));
    assert_eq!(began.elapsed().as_secs(), 20, "each has waited for one, and dialled itself");
}

#[tokio::test(start_paused = true)]
async fn who_asks_and_takes_back_without_end_is_not_listened_to_without_end() {
    let (near, far) = tokio::io::duplex(64 * 1024);
    // Offers that nobody has come to yet.
    let mut server = serve(far);
    let (send, connection) = h2::client::handshake(near).await.expect("handshake");
    let driver = tokio::spawn(connection);
    let mut send = send;
    let mut asked = 0;
    for _ in 0..20_000 {
        let Ok(Ok(ready)) = timeout(Duration::from_secs(1), send.clone().ready()).await else { break };
        send = ready;
        let Ok((_, mut stream)) = send.send_request(request(), false) else { break };
        // On its way, so that it is not just forgotten here.
        sleep(Duration::from_millis(1)).await;
        stream.send_reset(h2::Reason::CANCEL);
        asked += 1;
    }
    assert!(asked < 20_000, "{asked}");
    // It was told to go.
    let ended = timeout(Duration::from_secs(5), driver).await.expect("an end").expect("no panic");
    assert!(ended.is_err_and(|e| e.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM)));
    let mut offers = 0;
    while server.offers.try_recv().is_ok() {
        offers += 1;
    }
    assert_eq!(offers, 2 * SERVER_MAX_STREAMS, "of {asked}");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_goes_on_while_its_peer_takes_back_too_many() {
    let (connection, mut server) = connected().await;
    let (mut opened, mut accepted) = pair(&connection, &mut server).await;
    let mut held = Vec::new();
    // As many as may be asked for and not be over, of which the peer wants none any more.
    for _ in 0..2 * SERVER_MAX_STREAMS + 10 {
        let asked = timeout(Duration::from_millis(1), connection.open(request())).await;
        assert!(asked.is_err(), "nobody answers");
        held.extend(timeout(Duration::from_secs(1), server.offers.recv()).await.ok().flatten());
    }
    {
        let ((_, mut to_server), (mut from_client, _)) = (opened.halves(), accepted.halves());
        to_server.put(Bytes::from_static(b"still")).await.expect("put");
        let got = timeout(Duration::from_secs(1), from_client.next()).await.expect("in time");
        assert_eq!(got.expect("data").expect("some"), "still");
    }
    // Once they are over it is listened to again.
    assert_eq!(held.len(), 2 * SERVER_MAX_STREAMS as usize);
    drop(held);
    let taken = async {
        loop {
            // Those of before are wanted no more.
            if let Ok(tunnel) = server.offers.recv().await.expect("an offer").answer.accept() {
                return tunnel;
            }
        }
    };
    let (opened, _accepted) = tokio::join!(connection.open(request()), taken);
    opened.expect("opened");
}
