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

#[path = "exchanges/endpoints.rs"]
mod endpoints;
#[path = "exchanges/kept.rs"]
mod kept;
#[path = "exchanges/moved.rs"]
mod moved;
#[path = "exchanges/rules.rs"]
mod rules;

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
        self.engine.until_idle().await;
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
        format!("GET /a%00 HTTP/1.1\r\nhost: a\r\n\r\n{hidden}"),
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

/// As with Envoy, the time of the upstream begins when its request is whole, and an answer that does not wait for that has none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_of_the_upstream_is_not_that_of_the_client() {
    let scene = scene(json!({}), json!({})).await;
    let time = |text: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix("x-envoy-upstream-service-time: ")).map(str::to_owned);
        line.map(|line| line.parse::<u64>().expect("a number"))
    };
    let mut stream = scene.connect().await;
    stream.write_all(post("200/50", "slow", 10).as_bytes()).await.expect("written");
    sleep(Duration::from_millis(600)).await;
    stream.write_all(b"0123456789").await.expect("written");
    let (answer, _) = read(&mut stream).await;
    assert!(time(&answer).is_some_and(|t| (50..500).contains(&t)), "{answer}");
    let mut stream = scene.connect().await;
    stream.write_all(post("early:413", "early", 10).as_bytes()).await.expect("written");
    let (answer, _) = read(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 413") && time(&answer).is_none(), "{answer}");
    assert!(time(&scene.say("GET /x HTTP/1.1\r\nhost: web\r\n\r\n").await.0).is_some());
}
