//! What comes to a port that a service declares to carry HTTP, and is none, or is a proxy's.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// Answers whatever comes with what has come, after a question mark.
async fn answering() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = vec![0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&[b"? ", &buffer[..n]].concat()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Where no policy asks about requests the node looks for its own sake alone: the application gets what was sent, as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_of_its_own_reaches_the_application_as_it_is() {
    let upstream = answering().await;
    let policy = security("AuthorizationPolicy", "p", &json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]}));
    for (policies, free) in [(vec![], true), (vec![policy], false)] {
        let engine = Engine::start(&served(upstream, &policies)).await.expect("started");
        for (text, ends) in [
            ("G", false),
            ("P", true),
            ("GET", false),
            ("POST", true),
            ("GET key", false),
            ("GET / HTTP/1.1", true),
            ("PRI ", false),
            ("CONNECT far.example:80 HTTP/1.1\r\nhost: far.example:80\r\n\r\n", false),
            ("GET http://far.example/y HTTP/1.1\r\nhost: far.example\r\n\r\n", false),
        ] {
            let mut stream = engine.connect_inbound(upstream.port()).await.expect("connected");
            stream.write_all(text.as_bytes()).await.expect("written");
            if ends {
                stream.shutdown().await.expect("shut");
            }
            let mut answer = vec![0; 4096];
            let read = tokio::time::timeout(Duration::from_secs(2), stream.read(&mut answer)).await;
            let got = matches!(read, Ok(Ok(n)) if answer[..n] == *format!("? {text}").as_bytes());
            assert_eq!(got, free, "{text:?} {ends}: {read:?} {:?}", String::from_utf8_lossy(&answer).trim_end_matches('\0'));
        }
    }
}

/// However many services lead to a port, one that says it is no HTTP has it looked at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_that_disagree_have_it_found_out() {
    let upstream = answering().await;
    let mut documents = served(upstream, &[]);
    for (n, port) in ["tcp", "http", "http"].into_iter().enumerate() {
        documents.extend(service(&format!("another-{n}"), &format!("10.97.1.{n}"), port, &[upstream]));
    }
    let engine = Engine::start(&documents).await.expect("started");
    let vip = "10.97.1.0:80".parse().expect("an address");
    for text in ["G", "hello", "GET /x HTTP/1.1"] {
        let mut stream = engine.connect(vip).await.expect("connected");
        stream.write_all(text.as_bytes()).await.expect("written");
        stream.shutdown().await.expect("shut");
        let mut answer = String::new();
        let read = tokio::time::timeout(Duration::from_secs(3), stream.read_to_string(&mut answer)).await;
        assert!(read.is_ok_and(|read| read.is_ok()) && answer == format!("? {text}"), "{text}: {answer:?}");
    }
}
