//! Exchanges that go wrong half-way, or that somebody would like to go wrong: what is left of them, and what the next one on
//! the same connection sees. In one process, over real sockets.

use std::{net::SocketAddr, time::Duration};

use http::Request;
use mesh_tests::{
    engine::{Engine, destination_rule, service, virtual_service},
    scripted::{self, Seen},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

const VIP: &str = "10.96.9.1:80";

struct Scene {
    engine: Engine,
    vip: SocketAddr,
    seen: Seen,
}

async fn scene(rule: Value, policy: Value) -> Scene {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let mut rule = rule;
    rule["route"] = json!([{"destination": {"host": "web"}}]);
    let mut documents = service("web", "10.96.9.1", "http", &[up]);
    documents.extend([virtual_service("web", &json!([rule])), destination_rule("web", &policy)]);
    Scene { engine: Engine::start(&documents).await.expect("engine"), vip: VIP.parse().expect("valid"), seen }
}

impl Scene {
    async fn connect(&self) -> TcpStream {
        self.engine.connect(self.vip).await.expect("connected")
    }

    /// Sends, and reads to the end, or until nothing comes for a second. Whether it ended, and how.
    async fn say(&self, text: &str) -> (String, &'static str) {
        let mut stream = self.connect().await;
        stream.write_all(text.as_bytes()).await.expect("written");
        read(&mut stream).await
    }

    async fn until_idle(&self) {
        for _ in 0..300 {
            if self.engine.proxy.metrics.http_active.get() == 0 {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{} requests are still under way", self.engine.proxy.metrics.http_active.get());
    }
}

async fn read(stream: &mut TcpStream) -> (String, &'static str) {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    let end = loop {
        match timeout(Duration::from_secs(1), stream.read(&mut chunk)).await {
            Err(_) => break "open",
            Ok(Err(_)) => break "RST",
            Ok(Ok(0)) => break "FIN",
            Ok(Ok(n)) => all.extend_from_slice(&chunk[..n]),
        }
    };
    (String::from_utf8_lossy(&all).into_owned(), end)
}

fn post(plan: &str, id: &str, length: usize) -> String {
    format!("POST /x HTTP/1.1\r\nhost: web\r\nx-plan: {plan}\r\nx-id: {id}\r\ncontent-length: {length}\r\n\r\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_with_a_body_is_timed_while_it_waits_for_a_connection() {
    let limits = json!({"connectionPool": {"tcp": {"maxConnections": 1}}});
    let scene = scene(json!({"timeout": "0.3s", "retries": {"attempts": 0}}), limits).await;
    let mut first = scene.connect().await;
    // Its body never comes: it holds the one connection, and is not timed.
    first.write_all(post("200", "a", 10).as_bytes()).await.expect("written");
    sleep(Duration::from_millis(100)).await;
    let (answer, _) = scene.say(&format!("{}hello", post("200", "b", 5))).await;
    assert!(answer.starts_with("HTTP/1.1 504") && answer.contains("upstream request timeout"), "{answer}");
    assert!(scene.seen.of("b").is_empty(), "it never reached the upstream");
    // A client that goes away while it waits is noticed.
    let mut third = scene.connect().await;
    third.write_all(format!("{}hello", post("200", "c", 5)).as_bytes()).await.expect("written");
    socket2::SockRef::from(&third).set_linger(Some(Duration::ZERO)).expect("set");
    drop((third, first));
    scene.until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switched_connection_outlives_the_route_timeout_and_nobody_is_switched_unasked() {
    let scene = scene(json!({"timeout": "0.3s", "retries": {"attempts": 0}}), json!({})).await;
    let mut stream = scene.connect().await;
    let text = "GET /ws HTTP/1.1\r\nhost: web\r\nx-plan: upgrade\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(text.as_bytes()).await.expect("written");
    let mut head = [0; 34];
    stream.read_exact(&mut head).await.expect("a head");
    sleep(Duration::from_millis(500)).await;
    stream.write_all(b"late").await.expect("written");
    let (rest, _) = read(&mut stream).await;
    assert!(rest.ends_with("echo:late"), "{rest}");
    drop(stream);
    let (answer, _) = scene
        .say("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: switch\r\nx-id: s\r\n\r\nGET /second HTTP/1.1\r\nhost: web\r\nx-id: t\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("protocol error"), "{answer}");
    scene.until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_request_is_never_read_on_as_another() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    let hidden = "GET /hidden HTTP/1.1\r\nhost: web\r\nx-id: hidden\r\n\r\n";
    for text in [
        format!("OPTIONS * HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{hidden}", hidden.len()),
        format!("OPTIONS * HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n{hidden}"),
        format!("POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"),
        format!("POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{hidden}"),
        format!("GET /a#b HTTP/1.1\r\nhost: a\r\n\r\n{hidden}"),
        format!("POST /x HTTP/1.1\r\nhost: a\r\nx-plan: early:200\r\ncontent-length: {}\r\n\r\n{hidden}", hidden.len() + 1),
    ] {
        let (answer, end) = scene.say(&text).await;
        assert!(answer.matches("HTTP/1.1 ").count() == 1 && end != "open", "{text:?}: {answer:?} {end}");
        assert!(scene.seen.of("hidden").is_empty(), "{text:?}");
    }
    // What may be read on is.
    let (answer, _) = scene.say(&format!("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n{hidden}")).await;
    assert!(answer.matches("HTTP/1.1 ").count() == 2 && scene.seen.of("hidden").len() == 1, "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncated_response_never_looks_complete() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    for (version, plan, complete) in [("1.0", "hdrfin", false), ("1.1", "hdrfin", false), ("1.0", "200", true)] {
        let (answer, end) = scene.say(&format!("GET /x HTTP/{version}\r\nhost: web\r\nx-plan: {plan}\r\nconnection: close\r\n\r\n")).await;
        let length: usize = answer.lines().find_map(|l| l.strip_prefix("content-length: ")).and_then(|l| l.parse().ok()).unwrap_or(0);
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default().len();
        assert_eq!(end == "FIN" && body == length, complete, "{version} {plan}: {answer:?} {end}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_http_2_that_gives_up_in_the_middle_of_a_response_is_noticed() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    let (send, connection) = h2::client::handshake(scene.connect().await).await.expect("HTTP/2");
    let driven = tokio::spawn(connection);
    let request = || Request::get("http://web/x").header("x-plan", "hdrstall").body(()).expect("valid");
    for abandon in [false, true] {
        let (response, mut out) = send.clone().ready().await.expect("ready").send_request(request(), true).expect("sent");
        let mut body = response.await.expect("a response").into_body();
        assert_eq!(&body.data().await.expect("some").expect("data")[..], b"0123456789");
        assert!(scene.engine.proxy.metrics.http_active.get() > 0);
        if abandon {
            driven.abort();
        } else {
            out.send_reset(h2::Reason::CANCEL);
        }
        scene.until_idle().await;
        if abandon {
            return;
        }
    }
}

/// Trailers are whole or there are none: what the library leaves out of them must not look as if it had not been there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trailers_that_are_too_large_end_in_a_reset() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    let (send, connection) = h2::client::handshake(scene.connect().await).await.expect("HTTP/2");
    tokio::spawn(connection);
    for (size, whole) in [(20_000, true), (62_000, false)] {
        let id = format!("trailers-{size}");
        let request = Request::post("http://web/x").header("x-id", &id).body(()).expect("a request");
        let mut send = send.clone().ready().await.expect("ready");
        let (response, mut body) = send.send_request(request, false).expect("sent");
        body.send_data("hello".into(), false).expect("data");
        let mut trailers = http::HeaderMap::new();
        trailers.insert("x-a", http::HeaderValue::from_static("1"));
        trailers.insert("x-big", "v".repeat(size).parse().expect("a value"));
        trailers.insert("x-z", http::HeaderValue::from_static("signature"));
        body.send_trailers(trailers).expect("trailers");
        let answer = timeout(Duration::from_secs(5), response).await.expect("in time");
        assert_eq!(answer.map_err(|e| e.is_reset()).map(|a| a.status().as_u16()), if whole { Ok(200) } else { Err(true) }, "{size}");
    }
    scene.until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_for_a_connection_all_get_one() {
    let limits = json!({"connectionPool": {"tcp": {"maxConnections": 2}}});
    let scene = scene(json!({"retries": {"attempts": 0}}), limits).await;
    let all = (0..40).map(|i| {
        let text = format!("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: 200/10\r\nx-id: w{i}\r\nconnection: close\r\n\r\n");
        async {
            let text = text;
            scene.say(&text).await.0
        }
    });
    let mut all = all.map(Box::pin).collect::<Vec<_>>();
    let answers = timeout(
        Duration::from_secs(8),
        std::future::poll_fn(|cx| {
            use std::{future::Future, task::Poll};
            let mut failed = None;
            all.retain_mut(|f| match f.as_mut().poll(cx) {
                Poll::Ready(answer) => {
                    if !answer.starts_with("HTTP/1.1 200") {
                        failed = Some(answer);
                    }
                    false
                }
                Poll::Pending => true,
            });
            match failed {
                Some(answer) => Poll::Ready(Err(answer)),
                None if all.is_empty() => Poll::Ready(Ok(())),
                None => Poll::Pending,
            }
        }),
    );
    assert_eq!(answers.await, Ok(Ok(())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_says_goaway_is_left_for_a_new_connection() {
    let seen = Seen::default();
    let up = scripted::http2("h2up", &seen).await.expect("upstream");
    let documents = [
        service("web", "10.96.9.1", "http2", &[up]),
        vec![virtual_service("web", &json!([{"retries": {"attempts": 0}, "route": [{"destination": {"host": "web"}}]}]))],
    ]
    .concat();
    let engine = Engine::start(&documents).await.expect("engine");
    let scene = Scene { engine, vip: VIP.parse().expect("valid"), seen };
    // A stream that stays open keeps the old connection alive.
    let mut long = scene.connect().await;
    long.write_all(b"GET /x HTTP/1.1\r\nhost: web\r\nx-plan: 200/3000\r\nx-id: long\r\n\r\n").await.expect("written");
    sleep(Duration::from_millis(100)).await;
    let (first, _) = scene.say("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: drain\r\nx-id: d\r\nconnection: close\r\n\r\n").await;
    assert!(first.starts_with("HTTP/1.1 200"), "{first}");
    sleep(Duration::from_millis(100)).await;
    for i in 0..5 {
        let (answer, _) = scene.say(&format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: n{i}\r\nconnection: close\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{i}: {answer}");
    }
    let (rest, _) = {
        sleep(Duration::from_millis(2500)).await;
        read(&mut long).await
    };
    assert!(rest.starts_with("HTTP/1.1 200"), "the open stream goes on to its end: {rest}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_the_upstream_has_closed_is_not_used_again() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    for i in 0..20 {
        let text = |plan: &str| format!("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: {plan}\r\nx-id: {plan}{i}\r\nconnection: close\r\n\r\n");
        for plan in ["parting", "200"] {
            let (answer, _) = scene.say(&text(plan)).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{i}: {answer}");
            // A request that crosses the end of its connection on the way is lost, here as with Envoy.
            sleep(Duration::from_millis(50)).await;
        }
        // What comes of an exchange that was not finished is nobody's.
        let (early, _) = scene.say(&format!("{}some", post("early:200", &format!("e{i}"), 5000))).await;
        assert!(early.starts_with("HTTP/1.1 200"), "{early}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_kept_and_replaced_as_the_policy_says() {
    for (policy, connections) in [
        (json!({}), 1),
        (json!({"connectionPool": {"http": {"maxRequestsPerConnection": 1}}}), 4),
        (json!({"connectionPool": {"http": {"maxRequestsPerConnection": 2}}}), 2),
        (json!({"connectionPool": {"tcp": {"maxConnectionDuration": "1ms"}}}), 4),
    ] {
        let scene = scene(json!({"retries": {"attempts": 0}}), policy.clone()).await;
        for _ in 0..4 {
            scene.say("GET /x HTTP/1.1\r\nhost: web\r\nx-id: k\r\nx-plan: 200/5\r\nconnection: close\r\n\r\n").await;
        }
        let mut used = scene.seen.of("k").iter().map(|a| a.connection).collect::<Vec<_>>();
        used.dedup();
        assert_eq!(used.len(), connections, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_one_connection_are_as_many_as_the_policy_allows() {
    let seen = Seen::default();
    let h2 = scripted::http2("h2up", &seen).await.expect("upstream");
    for (id, policy, connections) in [("many", json!({}), 1), ("one", json!({"connectionPool": {"http": {"maxConcurrentStreams": 1}}}), 3)]
    {
        let documents = [service("web", "10.96.9.1", "http2", &[h2]), vec![destination_rule("web", &policy)]].concat();
        let scene =
            Scene { engine: Engine::start(&documents).await.expect("engine"), vip: VIP.parse().expect("valid"), seen: seen.clone() };
        let text = format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: {id}\r\nx-plan: 200/500\r\nconnection: close\r\n\r\n");
        let one = async |after: u64| {
            sleep(Duration::from_millis(after)).await;
            scene.say(&text).await.0
        };
        let (a, b, c) = tokio::join!(one(0), one(50), one(100));
        assert!([&a, &b, &c].iter().all(|answer| answer.starts_with("HTTP/1.1 200")), "{a} {b} {c}");
        let mut used = seen.of(id).iter().map(|a| a.connection).collect::<Vec<_>>();
        used.sort_unstable();
        used.dedup();
        assert_eq!(used.len(), connections, "{id}");
    }
}

/// What is kept for later goes with the destination it is kept for, and with the pod it is kept by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_kept_for_what_is_no_more_are_closed() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let up = listener.local_addr().expect("an address");
    let open = std::sync::Arc::new(std::sync::atomic::AtomicI32::new(0));
    let counted = open.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let counted = counted.clone();
            tokio::spawn(async move {
                counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let mut buffer = [0; 4096];
                while let Ok(1..) = stream.read(&mut buffer).await {
                    if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.is_err() {
                        break;
                    }
                }
                counted.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
            });
        }
    });
    let until = |wanted: i32| {
        let open = open.clone();
        async move {
            for _ in 0..500 {
                if open.load(std::sync::atomic::Ordering::SeqCst) == wanted {
                    return;
                }
                sleep(Duration::from_millis(10)).await;
            }
            panic!("{} connections are open, and not {wanted}", open.load(std::sync::atomic::Ordering::SeqCst));
        }
    };
    let engine = Engine::start(&service("web", "10.96.9.1", "http", &[up])).await.expect("engine");
    tokio::spawn(engine.proxy.clone().tidy_pool());
    engine.proxy.pods.insert(engine.pod.clone());
    let ask = async || {
        let mut stream = engine.connect(VIP.parse().expect("valid")).await.expect("connected");
        stream.write_all(b"GET /x HTTP/1.1\r\nhost: web\r\n\r\n").await.expect("written");
        assert!(read(&mut stream).await.0.starts_with("HTTP/1.1 200"));
    };
    ask().await;
    until(1).await;
    // The service is gone.
    engine.apply(&[]).await.expect("applied");
    until(0).await;
    engine.apply(&service("web", "10.96.9.1", "http", &[up])).await.expect("applied");
    ask().await;
    until(1).await;
    // So is its only endpoint.
    engine.apply(&service("web", "10.96.9.1", "http", &[])).await.expect("applied");
    until(0).await;
    engine.apply(&service("web", "10.96.9.1", "http", &[up])).await.expect("applied");
    ask().await;
    until(1).await;
    // So is the pod; what it still asks is answered, and nothing is kept of it.
    engine.pod.clusters.retire();
    until(0).await;
    ask().await;
    until(0).await;
}

/// HTTP/1.0 knows no Host; what goes on has to have one that is one, for many servers take no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_without_a_host_is_sent_on_with_the_address_that_was_dialled() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    for (id, head, expected) in [
        ("old", "GET /x HTTP/1.0\r\n", "10.96.9.1"),
        ("old-named", "GET /x HTTP/1.0\r\nhost: own\r\n", "own"),
        ("empty", "GET /x HTTP/1.1\r\nhost:\r\n", ""),
    ] {
        let (answer, _) = scene.say(&format!("{head}x-id: {id}\r\nconnection: close\r\n\r\n")).await;
        assert!(answer.contains(" 200 OK"), "{id}: {answer}");
        let seen = scene.seen.of(id);
        let host = seen[0].headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host")).map(|(_, value)| value.as_str());
        assert_eq!(host, Some(expected), "{id}");
    }
}

/// Of connections that are kept the one that was used last is used next, so that the others may grow old and end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_connection_that_was_used_last_is_used_again() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    let ask = async |id: String, plan: &str| {
        let (answer, _) =
            scene.say(&format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: {id}\r\nx-plan: {plan}\r\nconnection: close\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    };
    tokio::join!(ask("a".into(), "200/300"), ask("b".into(), "200/300"), ask("c".into(), "200/500"));
    let last = scene.seen.of("c")[0].connection;
    for i in 0..5 {
        ask(format!("later-{i}"), "200").await;
        assert_eq!(scene.seen.of(&format!("later-{i}"))[0].connection, last, "{i}");
    }
}

/// An application that answers and goes while its client still sends has answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_says_before_it_goes_arrives() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let up = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut some = [0; 1000];
            let _ = stream.read(&mut some).await;
            let _ = stream.write_all(b"no more, please").await;
        }
    });
    let engine = Engine::start(&service("web", "10.96.9.1", "tcp", &[up])).await.expect("engine");
    for i in 0..30 {
        let stream = engine.connect(VIP.parse().expect("valid")).await.expect("connected");
        let (mut read, mut write) = stream.into_split();
        let sending = tokio::spawn(async move {
            let chunk = vec![b'x'; 64 * 1024];
            while write.write_all(&chunk).await.is_ok() {}
        });
        let mut said = Vec::new();
        let _ = timeout(Duration::from_secs(5), read.read_to_end(&mut said)).await.expect("in time");
        assert_eq!(String::from_utf8_lossy(&said), "no more, please", "{i}");
        sending.abort();
    }
}

/// A client that has closed its end and is then gone waits for no answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_closes_and_is_then_reset_is_noticed() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    for plan in ["200/60000", "hdrstall"] {
        let mut stream = scene.connect().await;
        stream.write_all(format!("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: {plan}\r\n\r\n").as_bytes()).await.expect("written");
        stream.shutdown().await.expect("closed");
        sleep(Duration::from_millis(200)).await;
        assert_eq!(scene.engine.proxy.metrics.http_active.get(), 1, "{plan}: it waits for its answer");
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set");
        drop(stream);
        scene.until_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unused_connection_is_kept_as_long_as_the_policy_says() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({"connectionPool": {"http": {"idleTimeout": "30s"}}})).await;
    scene.say("GET /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
    let clusters = &scene.engine.pod.clusters;
    let idle = || clusters.all().iter().map(|(_, state)| state.idle()).sum::<usize>();
    let now = std::time::Instant::now();
    for (after, kept) in [(0, 1), (20, 1), (31, 0)] {
        let snapshot = scene.engine.config.load().clone();
        clusters.tidy(now + Duration::from_secs(after), |id| snapshot.cluster_for("default", id).cloned());
        assert_eq!(idle(), kept, "after {after} s");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_could_not_be_kept_is_not_sent_again_without_it() {
    let scene = scene(json!({"retries": {"attempts": 2, "retryOn": "5xx"}}), json!({})).await;
    for (id, length, attempts, status) in [("small", 200_000, 2, "200"), ("large", 2_000_000, 1, "503")] {
        let mut stream = scene.connect().await;
        stream.write_all(post("503,200", id, length).replace("x-id", "connection: close\r\nx-id").as_bytes()).await.expect("written");
        stream.write_all(&vec![b'x'; length]).await.expect("written");
        let (answer, _) = read(&mut stream).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{id}: {answer}");
        let bodies = scene.seen.of(id).iter().map(|a| a.body).collect::<Vec<_>>();
        assert_eq!(bodies, vec![length; attempts], "{id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_closes_its_side_after_a_large_body_has_all_of_it_delivered() {
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    for i in 0..5 {
        let mut stream = scene.connect().await;
        stream.write_all(post("200/50", &format!("h{i}"), 3_000_000).as_bytes()).await.expect("written");
        stream.write_all(&vec![b'x'; 3_000_000]).await.expect("written");
        stream.shutdown().await.expect("shut down");
        let (answer, _) = read(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(scene.seen.of(&format!("h{i}"))[0].body, 3_000_000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_decides_which_version_is_spoken_upstream() {
    let seen = Seen::default();
    let (h1, h2) = (scripted::http1("up1", &seen).expect("upstream"), scripted::http2("h2up", &seen).await.expect("upstream"));
    let pool = |more: Value| json!({"connectionPool": {"http": more}});
    let cases = [
        ("http", json!({}), h1, "up1"),
        ("http2", json!({}), h2, "h2up"),
        ("grpc", json!({}), h2, "h2up"),
        ("any", json!({}), h1, "up1"),
        ("http", pool(json!({"h2UpgradePolicy": "UPGRADE"})), h2, "h2up"),
        ("http2", pool(json!({"useClientProtocol": true})), h1, "up1"),
    ];
    for (i, (port, policy, address, expected)) in cases.into_iter().enumerate() {
        let documents = [service("web", "10.96.9.1", port, &[address]), vec![destination_rule("web", &policy)]].concat();
        let scene =
            Scene { engine: Engine::start(&documents).await.expect("engine"), vip: VIP.parse().expect("valid"), seen: seen.clone() };
        let (answer, _) = scene.say(&format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: v{i}\r\nconnection: close\r\n\r\n")).await;
        assert!(answer.contains(&format!("{expected} 200 #1")), "{port} {policy}: {answer}");
    }
}

/// Statuses and flags of requests one after the other.
async fn sequence(engine: &Engine, vip: SocketAddr, path: &str, plan: &str, n: usize) -> Vec<String> {
    for i in 0..n {
        let mut stream = engine.connect(vip).await.expect("connected");
        let text = format!("GET {path} HTTP/1.1\r\nhost: web\r\nx-plan: {plan}\r\nx-id: {path}{i}\r\nconnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.expect("written");
        read(&mut stream).await;
    }
    let lines = engine.logged(vip, n).await;
    lines.iter().map(|l| format!("{} {}", l["response_code"], l["response_flags"])).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_are_ejected_in_the_recorded_sequences() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port nobody listens on");
    let ejects = json!({"consecutive5xxErrors": 3, "maxEjectionPercent": 100});
    let gateway = json!({"consecutive5xxErrors": 100, "consecutiveGatewayErrors": 2, "maxEjectionPercent": 100});
    let local = json!({"consecutive5xxErrors": 3, "maxEjectionPercent": 100, "splitExternalLocalOriginErrors": true, "consecutiveLocalOriginFailures": 2});
    let panic = json!({"consecutive5xxErrors": 3, "maxEjectionPercent": 100, "minHealthPercent": 50});
    let istio = json!({"consecutive5xxErrors": 3});
    let none = json!({"attempts": 0});
    let once = json!({"attempts": 1, "retryOn": "5xx"});
    let cases = [
        ("od_500", &ejects, &none, up, "500", vec!["500 -", "500 -", "500 -", "503 UH", "503 UH"]),
        ("od_404", &ejects, &none, up, "404", vec!["404 -"; 6]),
        ("od_gw2", &gateway, &none, up, "rst", vec!["503 UC", "503 UC", "503 UH", "503 UH"]),
        ("od_gw", &gateway, &none, up, "502", vec!["502 -", "502 -", "503 UH", "503 UH"]),
        ("od_gw of 500", &gateway, &none, up, "500", vec!["500 -"; 5]),
        ("od_retry", &ejects, &once, up, "503", vec!["503 URX", "503 UH", "503 UH"]),
        ("od_istio", &istio, &none, up, "503", vec!["503 -"; 5]),
        ("od_cf", &ejects, &none, closed, "200", vec!["503 UF", "503 UF", "503 UF", "503 UH", "503 UH"]),
        ("od_local", &local, &none, closed, "200", vec!["503 UF", "503 UF", "503 UH", "503 UH"]),
        ("panic", &panic, &none, up, "503", vec!["503 -"; 6]),
    ];
    let vip = |i: usize| SocketAddr::from(([10, 96, 9, u8::try_from(i + 10).expect("few")], 80));
    let documents = cases.iter().enumerate().flat_map(|(i, (_, outlier, retries, address, ..))| {
        let name = format!("od-{i}");
        let mut documents = service(&name, &vip(i).ip().to_string(), "http", &[*address]);
        documents.push(virtual_service(&name, &json!([{"retries": retries, "route": [{"destination": {"host": name}}]}])));
        documents.push(destination_rule(&name, &json!({"outlierDetection": outlier})));
        documents
    });
    let engine = Engine::start(&documents.collect::<Vec<_>>()).await.expect("engine");
    for (i, (case, _, _, _, plan, expected)) in cases.iter().enumerate() {
        let got = sequence(&engine, vip(i), &format!("/{i}/"), plan, expected.len()).await;
        assert_eq!(got, *expected, "{case}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirrors_get_the_recorded_copies() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("upstream"), scripted::http1("up2", &seen).expect("upstream"));
    let rule = json!({"retries": {"attempts": 0}, "timeout": "0.2s", "route": [{"destination": {"host": "web"}}],
        "mirrors": [{"destination": {"host": "copy"}}, {"destination": {"host": "copy"}}, {"destination": {"host": "copy"}, "percentage": {"value": 0}}]});
    let documents = [
        service("web", "10.96.9.1", "http", &[one]),
        service("copy", "10.96.9.2", "http", &[two]),
        vec![virtual_service("web", &json!([rule]))],
    ]
    .concat();
    let scene = Scene { engine: Engine::start(&documents).await.expect("engine"), vip: VIP.parse().expect("valid"), seen };
    for (id, plan, status) in [("m", "200", "200"), ("late", "200/600", "504")] {
        let (answer, _) =
            scene.say(&format!("{}hello", post(plan, id, 5)).replace("x-id", "connection: close\r\nx-request-id: r\r\nx-id")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        for _ in 0..200 {
            if scene.seen.of(id).len() == 3 && scene.seen.of(id).iter().all(|a| a.body == 5) {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        let attempts = scene.seen.of(id);
        assert_eq!((attempts.len(), attempts.iter().filter(|a| a.port == two.port()).count()), (3, 2), "{id}: {attempts:?}");
        for copy in attempts.iter().filter(|a| a.port == two.port()) {
            let header = |name: &str| copy.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
            assert_eq!(
                (header("x-envoy-internal"), header("x-request-id"), header("host"), copy.body),
                (Some("true"), Some("r"), Some("web"), 5),
                "{copy:?}"
            );
        }
    }
}

/// As with Envoy: what waits for a connection is pending, and not among the requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_waits_is_not_counted_as_one_under_way() {
    let http = json!({"http2MaxRequests": 1, "http1MaxPendingRequests": 10});
    let limits = json!({"connectionPool": {"tcp": {"maxConnections": 1}, "http": http}});
    let scene = scene(json!({"retries": {"attempts": 0}}), limits).await;
    let slow = |id: &str| format!("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: 200/300\r\nx-id: {id}\r\nconnection: close\r\n\r\n");
    let (first, second) = (slow("a"), slow("b"));
    let (first, second) = tokio::join!(scene.say(&first), scene.say(&second));
    for (answer, _) in [first, second] {
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    scene.until_idle().await;
}

/// A retry that is answered holds nobody else's up, however long its answer takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_gives_its_place_back_when_it_is_answered() {
    let scene = scene(json!({"retries": {"attempts": 1, "retryOn": "5xx"}}), json!({"connectionPool": {"http": {"maxRetries": 1}}})).await;
    let plan = |plan: &str, id: &str| format!("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: {plan}\r\nx-id: {id}\r\nconnection: close\r\n\r\n");
    let mut streaming = scene.connect().await;
    streaming.write_all(plan("503,hdrstall", "a").as_bytes()).await.expect("written");
    let mut head = [0; 12];
    timeout(Duration::from_secs(2), streaming.read_exact(&mut head)).await.expect("in time").expect("an answer");
    assert_eq!(&head, b"HTTP/1.1 200");
    let (answer, _) = scene.say(&plan("503,200", "b")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && scene.seen.of("b").len() == 2, "{answer}");
    // While one is waited for there is no other.
    let (waiting, other) = (plan("503,200/500", "c"), plan("503,200", "d"));
    let other = async {
        sleep(Duration::from_millis(200)).await;
        scene.say(&other).await
    };
    let (waiting, other) = tokio::join!(scene.say(&waiting), other);
    assert!(waiting.0.starts_with("HTTP/1.1 200") && other.0.starts_with("HTTP/1.1 503"), "{waiting:?} {other:?}");
}

/// What the mesh configuration says of retries is for every request whose rule says nothing, and for those to which no rule applies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_mesh_says_how_often_requests_are_tried() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let mesh = |policy: &Value| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
            "data": {"mesh": {"defaultHttpRetryPolicy": policy}}})
    };
    let routes = [
        ("none", vec![]),
        ("one", vec![virtual_service("web", &json!([{"route": [{"destination": {"host": "web"}}]}]))]),
        ("own", vec![virtual_service("web", &json!([{"retries": {"attempts": 0}, "route": [{"destination": {"host": "web"}}]}]))]),
    ];
    let engine = Engine::start(&service("web", "10.96.9.1", "http", &[up])).await.expect("engine");
    for (number, attempts) in [(3, [4, 4, 1]), (0, [1, 1, 1])] {
        let policy = json!({"attempts": number, "retryOn": "5xx"});
        for ((name, routes), attempts) in routes.iter().zip(attempts) {
            let documents = [&service("web", "10.96.9.1", "http", &[up])[..], routes, &[mesh(&policy)]].concat();
            engine.apply(&documents).await.expect("applied");
            let id = format!("{name}-{number}");
            let mut stream = engine.connect(VIP.parse().expect("valid")).await.expect("connected");
            let request = format!("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: 503\r\nx-id: {id}\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.expect("written");
            let (answer, _) = read(&mut stream).await;
            assert!(answer.starts_with("HTTP/1.1 503"), "{id}: {answer}");
            assert_eq!(seen.of(&id).len(), attempts, "{id}");
        }
    }
}

/// Of several rules for a host one may have the subsets, another the policy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_rule_with_a_policy_counts() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let mut documents = service("web", "10.96.9.1", "http", &[up]);
    documents.push(virtual_service("web", &json!([{"route": [{"destination": {"host": "web"}}]}])));
    let mut older = destination_rule("web", &json!({}));
    older["metadata"] = json!({"name": "older", "creationTimestamp": "2020-01-01T00:00:00Z"});
    older["spec"] = json!({"host": "web", "subsets": [{"name": "v1"}]});
    let mut younger = destination_rule("web", &json!({"connectionPool": {"http": {"maxRequestsPerConnection": 1}}}));
    younger["metadata"] = json!({"name": "younger", "creationTimestamp": "2021-01-01T00:00:00Z"});
    documents.extend([older, younger]);
    let engine = Engine::start(&documents).await.expect("engine");
    let mut stream = engine.connect(VIP.parse().expect("valid")).await.expect("connected");
    for id in ["a", "b"] {
        stream.write_all(format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: {id}\r\n\r\n").as_bytes()).await.expect("written");
        assert!(read(&mut stream).await.0.starts_with("HTTP/1.1 200"));
    }
    assert_ne!(seen.of("a")[0].connection, seen.of("b")[0].connection, "a connection for each");
}
