//! Endpoints that go and come while a request waits for them.

use super::*;

fn documents(endpoint: SocketAddr, rule: &Value) -> Vec<Value> {
    let mut rule = rule.clone();
    rule["route"] = json!([{"destination": {"host": "web"}}]);
    [service("web", "10.96.9.1", "http", &[endpoint]), vec![virtual_service("web", &json!([rule]))]].concat()
}

/// What is answered to a request, and after how long, where the endpoint is another soon after it was sent.
async fn moving(from: SocketAddr, to: Option<SocketAddr>, rule: Value, seen: &Seen) -> (String, Duration) {
    let engine = Engine::start(&documents(from, &rule)).await.expect("engine");
    let scene = Scene { engine, vip: VIP.parse().expect("valid"), seen: seen.clone() };
    let began = std::time::Instant::now();
    let changed = async {
        sleep(Duration::from_millis(300)).await;
        match to {
            Some(to) => scene.engine.apply(&documents(to, &rule)).await,
            None => scene.engine.apply(&documents(from, &rule)[..1]).await,
        }
    };
    let text = format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: {}\r\nconnection: close\r\n\r\n", from.port());
    let mut stream = scene.connect().await;
    stream.write_all(text.as_bytes()).await.expect("written");
    let mut answer = Vec::new();
    let (read, changed) = tokio::join!(timeout(Duration::from_secs(8), stream.read_to_end(&mut answer)), changed);
    changed.expect("applied");
    assert!(read.is_ok_and(|read| read.is_ok()), "an answer");
    (String::from_utf8_lossy(&answer).into_owned(), began.elapsed())
}

/// An address that nobody listens at, as long as the socket is there.
fn closed() -> (SocketAddr, tokio::net::TcpSocket) {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("valid")).expect("bound");
    (socket.local_addr().expect("an address"), socket)
}

/// An address that takes connections and does not answer to more.
async fn full() -> (SocketAddr, tokio::net::TcpListener, Vec<TcpStream>) {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("valid")).expect("bound");
    let listener = socket.listen(0).expect("listens");
    let address = listener.local_addr().expect("an address");
    let mut taken = Vec::new();
    while let Ok(Ok(stream)) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        taken.push(stream);
    }
    (address, listener, taken)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_go_to_endpoints_there_are_by_then() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let closed = closed();
    let retries = json!({"attempts": 20, "retryOn": "connect-failure", "backoff": "200ms"});
    let (answer, _) = moving(closed.0, Some(up), json!({"retries": retries}), &seen).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "another attempt: {answer}");
    let delay = |fixed: &str| json!({"fault": {"delay": {"fixedDelay": fixed, "percentage": {"value": 100}}}, "retries": {"attempts": 0}});
    let (answer, _) = moving(closed.0, Some(up), delay("0.8s"), &seen).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "the first one, after a delay: {answer}");
    let other = scripted::http1("up2", &seen).expect("upstream");
    let (answer, _) = moving(other, None, delay("0.8s"), &seen).await;
    assert!(answer.starts_with("HTTP/1.1 503") && seen.of(&other.port().to_string()).is_empty(), "what has left is not asked: {answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_leaves_is_not_waited_for() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let (address, _listener, _taken) = full().await;
    let (answer, took) = moving(address, Some(up), json!({}), &seen).await;
    assert!(answer.starts_with("HTTP/1.1 200") && took < Duration::from_secs(4), "{took:?}: {answer}");
    let (address, _listener, _taken) = full().await;
    let (answer, took) = moving(address, Some(up), json!({"retries": {"attempts": 0}}), &seen).await;
    assert!(answer.starts_with("HTTP/1.1 503") && took < Duration::from_secs(4), "{took:?}: {answer}");
}

/// What a client dialled, and is passed through to, need not be an endpoint.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_passed_through_is_asked_where_it_was_dialled() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let other = scripted::http1("up2", &seen).expect("upstream");
    let mut documents = service("web", "127.0.0.1", "http", &[other]);
    documents[0]["spec"]["ports"][0]["port"] = json!(up.port());
    documents.push(destination_rule("web", &json!({"loadBalancer": {"simple": "PASSTHROUGH"}})));
    let scene = Scene { engine: Engine::start(&documents).await.expect("engine"), vip: up, seen };
    let (answer, _) = scene.say("GET /x HTTP/1.1\r\nhost: web\r\nx-id: p\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(scene.seen.of("p").iter().map(|a| a.port).collect::<Vec<_>>(), [up.port()]);
}

/// A connection leads to the service it was made to, whichever address that has later, and whoever has its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_gets_another_address_keeps_its_connections() {
    let seen = Seen::default();
    let ups = ["up1", "up2"].map(|name| scripted::http1(name, &seen).expect("upstream"));
    let all = |services: &[(&str, &str, SocketAddr)]| {
        services.iter().flat_map(|(name, vip, up)| service(name, vip, "http", &[*up])).collect::<Vec<_>>()
    };
    let engine = Engine::start(&all(&[("web", "10.96.9.1", ups[0])])).await.expect("engine");
    let mut stream = engine.connect(VIP.parse().expect("valid")).await.expect("connected");
    let mut ask = async |n: usize| {
        let request = format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: kept-{n}\r\n\r\n");
        let got = mesh_tests::wire::exchange(&mut stream, request.into_bytes(), false).await;
        (got.status.clone(), got.body.split(' ').next().unwrap_or_default().to_owned(), got.header("connection").map(str::to_owned))
    };
    let answer = |status: &str, body: &str, connection: Option<&str>| (status.to_owned(), body.to_owned(), connection.map(str::to_owned));
    assert_eq!(ask(0).await, answer("200", "up1", None));
    engine.apply(&all(&[("web", "10.96.9.7", ups[0])])).await.expect("applied");
    assert_eq!(ask(1).await, answer("200", "up1", None), "its address is another");
    engine.apply(&all(&[("web", "10.96.9.7", ups[0]), ("other", "10.96.9.1", ups[1])])).await.expect("applied");
    assert_eq!(ask(2).await, answer("200", "up1", None), "its address is another's");
    engine.apply(&all(&[("other", "10.96.9.1", ups[1])])).await.expect("applied");
    assert_eq!(ask(3).await, answer("503", "", Some("close")), "it is gone");
}
