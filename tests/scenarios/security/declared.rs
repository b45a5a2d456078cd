//! What comes to a port that a service declares to carry HTTP, and is none, or is a proxy's.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

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

/// Where no policy asks about requests the node looks for its own sake alone: what is none reaches the application as it was. What might be one
/// is held to be one, or its client could say that it is somebody else (`x-forwarded-client-cert`).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_reaches_the_application_and_what_might_be_one_does_not_unseen() {
    let upstream = answering().await;
    let policy = security("AuthorizationPolicy", "p", &json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]}));
    let claims = "x-forwarded-client-cert: By=a;URI=spiffe://cluster.local/ns/prod/sa/admin\r\n\r\n";
    for (policies, free) in [(vec![], true), (vec![policy], false)] {
        let engine = Engine::start(&served(upstream, &policies)).await.expect("started");
        // What is sent, in parts, whether that is all, and whether the application is to get it as it is.
        for (parts, ends, passes) in [
            (&["EHLO x\r\n"][..], false, true),
            (&["\0\x01"], false, true),
            (&["{\"a\": 1}"], false, true),
            (&["G"], true, true),
            (&["GET / HTTP/1.1"], true, true),
            (&["G"], false, false),
            (&["POST key"], false, false),
            (&["GE", "T / HTTP/1.1\r\nhost: a\r\n", claims], false, false),
            (&["FOO / HTTP/1.1\r\nhost: a\r\n", claims], false, false),
            (&["FOO", " / HTTP/1.1\r\nhost: a\r\n", claims], false, false),
            (&["GET http://a/ HTTP/1.1\r\nhost: a\r\n", claims], false, false),
            (&["CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n", claims], false, false),
        ] {
            let mut stream = engine.connect_inbound(upstream.port()).await.expect("connected");
            for (i, part) in parts.iter().enumerate() {
                if i > 0 {
                    // Longer than the beginning of a request is waited for elsewhere.
                    tokio::time::sleep(Duration::from_millis(700)).await;
                }
                let _ = stream.write_all(part.as_bytes()).await;
            }
            if ends {
                stream.shutdown().await.expect("shut");
            }
            let mut answer = vec![0; 4096];
            let read = tokio::time::timeout(Duration::from_millis(1500), stream.read(&mut answer)).await;
            let text = String::from_utf8_lossy(&answer[..read.as_ref().map_or(0, |n| *n.as_ref().unwrap_or(&0))]).into_owned();
            let as_it_is = text == format!("? {}", parts.concat());
            assert_eq!(as_it_is, free && passes, "{parts:?} {ends}: {text:?}");
            assert!(!text.contains("sa/admin"), "{parts:?}: {text:?}");
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

/// A service that declares a port to carry no HTTP opens no way to an application that another one declares to have HTTP there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_service_does_not_have_clients_say_who_they_are() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let mut documents = served(upstream, &[]);
    documents.extend(service("another", "10.97.1.1", "tcp", &[upstream]));
    let engine = Engine::start(&documents).await.expect("started");
    let got = ask(&engine, "outside", upstream, &get("/a", "by address", "x-forwarded-client-cert: URI=evil\r\n")).await;
    assert_eq!(got.status, "200", "{got:?}");
    let attempts = seen.of("by address");
    assert!(!attempts[0].headers.iter().any(|(name, _)| name == "x-forwarded-client-cert"), "{attempts:?}");
}

/// What policies about requests deny whatever it turns out to be, on a port without requests, the application does not hear of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_denied_in_any_case_does_not_reach_the_application() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let upstream = listener.local_addr().expect("an address");
    let reached = Arc::new(AtomicUsize::new(0));
    let counted = reached.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(b"hello").await;
        }
    });
    let documents = |rule: Value| {
        let mut all = vec![server_pod(), security("AuthorizationPolicy", "p", &json!({"action": "DENY", "rules": [rule]}))];
        all.extend(service("server", "10.99.0.1", "tcp", &[upstream]));
        all
    };
    let engine = Engine::start(&documents(json!({"to": [{"operation": {"methods": ["GET"]}}]}))).await.expect("started");
    for (rule, expected) in [
        (json!({"to": [{"operation": {"methods": ["GET"]}}]}), 0),
        (json!({"to": [{"operation": {"methods": ["GET"], "ports": ["1"]}}]}), 1),
    ] {
        engine.apply(&documents(rule.clone())).await.expect("applied");
        let mut stream = engine.connect_inbound(upstream.port()).await.expect("connected");
        let read = tokio::time::timeout(Duration::from_secs(2), stream.read(&mut [0; 8])).await.expect("an end, or a word");
        assert_eq!((reached.load(Ordering::SeqCst), read.ok() == Some(5)), (expected, expected == 1), "{rule}");
    }
}
