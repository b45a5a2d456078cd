//! Connections that carry no requests: TCP and TLS routes, limits, who speaks first.

use super::*;

/// A TLS client hello that asks for a name, as any client begins.
pub fn client_hello(name: &str) -> Vec<u8> {
    let config = rustls::ClientConfig::builder().with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).expect("a name");
    let mut connection = rustls::ClientConnection::new(std::sync::Arc::new(config), name).expect("TLS");
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).expect("written");
    hello
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_and_tls_connections_are_routed_too() {
    let (a, b, c) = (named("a").await, named("b").await, named("c").await);
    let tls_web = service("tls-web", "10.97.0.4", "tls", &[a]);
    let tls_others = service("tls-others", "10.97.0.7", "tls", &[a]);
    let tcp_web = service("tcp-web", "10.97.0.5", "tcp", &[a]);
    let any_web = service("any-web", "10.97.0.6", "any", &[a]);
    let others = http_services(&[("b", 2, b), ("c", 3, c)]);
    let vs = |name: &str, more: Value| {
        let mut spec = json!({"hosts": [name]});
        spec.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": name}, "spec": spec})
    };
    let rules = vec![
        vs(
            "tls-web",
            json!({"tls": [
                {"match": [{"sniHosts": ["b.example"]}], "route": to("b")},
                {"match": [{"sniHosts": ["*.wild.example"]}], "route": to("c")},
            ], "tcp": [{"route": to("c")}, {"match": [{"port": 80}], "route": to("c")}]}),
        ),
        vs(
            "tls-others",
            json!({"tls": [
                {"match": [{"sniHosts": ["b.example"], "sourceLabels": {"app": "other"}}], "route": to("b")},
                {"match": [{"sniHosts": ["b.example"], "port": 81}], "route": to("b")},
            ]}),
        ),
        vs(
            "tcp-web",
            json!({"tcp": [
                {"match": [{"sourceLabels": {"app": "other"}}], "route": to("c")},
                {"match": [{"port": 80, "destinationSubnets": ["10.97.0.0/24"]}], "route": [{"destination": {"host": "b"}, "weight": 50}, {"destination": {"host": "c"}, "weight": 50}]},
            ]}),
        ),
        vs(
            "any-web",
            json!({"tcp": [{"route": to("b")}], "http": [{"route": to("c")}], "tls": [{"match": [{"sniHosts": ["c.example"]}], "route": to("c")}]}),
        ),
    ];
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("access.log");
    let logs = logging(&path, &json!({"sni": "%REQUESTED_SERVER_NAME%", "tells": "%CEL(connection.requested_server_name)%"}));
    let engine = Engine::start(&[tls_web, tls_others, tcp_web, any_web, others, rules, logs].concat()).await.expect("engine");
    // Rules for TCP are not for ports that are declared to carry TLS.
    for (name, expected) in [("b.example", "b"), ("x.wild.example", "c"), ("other.example", "")] {
        assert_eq!(say(&engine, vip(4), &client_hello(name)).await, expected, "{name}");
    }
    // Nor is it for those who name no server, where there are rules for the client; where there are none, the service is reached.
    assert_eq!(say(&engine, vip(4), b"hello").await, "");
    assert_eq!(say(&engine, vip(7), &client_hello("z.example")).await, "a");
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..100 {
        *counts.entry(say(&engine, vip(5), b"hello").await).or_default() += 1;
    }
    assert!(counts.len() == 2 && counts["b"].abs_diff(50) <= 20, "{counts:?}");
    // On a port that declares nothing the first bytes tell which rules are meant.
    assert_eq!(say(&engine, vip(6), b"GET key\r\n").await, "b");
    assert_eq!(get(&engine, vip(6), "/x", "").await, "c");
    assert_eq!(say(&engine, vip(6), &client_hello("c.example")).await, "b", "rules for TLS are for ports that are declared to carry it");
    // What a proxy is asked for is not this one's business: it goes where what is no HTTP goes.
    for asked in [
        "CONNECT far.example:80 HTTP/1.1\r\nhost: far.example:80\r\n\r\n",
        "GET http://far.example/x HTTP/1.1\r\nhost: far.example\r\n\r\n",
    ] {
        let answer = say(&engine, vip(6), asked.as_bytes()).await;
        let line = asked.lines().next().expect("a line");
        assert!(answer.ends_with(&format!("\r\n\r\nb {line}")), "{asked}: {answer}");
    }
    // Who has named a server has it told.
    let named = |name: &str| lines_of(&path).iter().filter(|line| line["sni"] == *name && line["tells"] == *name).count();
    for name in ["b.example", "x.wild.example", "other.example", "c.example"] {
        mesh_tests::engine::wait_until(name, std::time::Duration::from_secs(2), || named(name) == 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_connections_are_limited_too() {
    for end in ["maxConnectionDuration", "idleTimeout"] {
        limited(&json!({"connectionPool": {"tcp": {"maxConnections": 1, end: "600ms"}}})).await;
    }
}

async fn limited(policy: &Value) {
    let a = named("a").await;
    let documents = [service("db", "10.97.0.9", "tcp", &[a]), vec![destination_rule("db", policy)]].concat();
    let engine = Engine::start(&documents).await.expect("engine");
    let mut first = engine.connect(vip(9)).await.expect("connected");
    first.write_all(b"hello").await.expect("written");
    let mut answer = [0; 1];
    first.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(say(&engine, vip(9), b"hello").await, "", "there is one already");
    let over = tokio::time::timeout(std::time::Duration::from_secs(5), first.read(&mut answer)).await.expect("it ends");
    assert!(over.is_err() || over.is_ok_and(|n| n == 0), "it lasted as long as it may");
    let mut again = String::new();
    for _ in 0..50 {
        again = say(&engine, vip(9), b"hello").await;
        if !again.is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(again, "a", "there is room again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_speaks_first_on_an_undeclared_port_is_heard() {
    // Speaks first, then echoes.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.write_all(b"220 hello\n").await;
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    let web = named("web").await;
    let documents = [service("smtp", "10.97.0.7", "any", &[address]), service("web", "10.97.0.8", "any", &[web])].concat();
    let rules = virtual_service("web", &json!([{"directResponse": {"status": 418}}]));
    let engine = Engine::start(&[documents, vec![rules]].concat()).await.expect("engine");
    let mut stream = engine.connect(vip(7)).await.expect("connected");
    let started = std::time::Instant::now();
    let mut banner = [0; 10];
    stream.read_exact(&mut banner).await.expect("a banner");
    assert!(started.elapsed() < std::time::Duration::from_millis(500), "no stall: {:?}", started.elapsed());
    stream.write_all(b"EHLO\n").await.expect("written");
    let mut echo = [0; 5];
    stream.read_exact(&mut echo).await.expect("an echo");
    assert_eq!((&banner[..], &echo[..]), (&b"220 hello\n"[..], &b"EHLO\n"[..]));
    // A client that takes its time is still understood.
    let mut stream = engine.connect(vip(8)).await.expect("connected");
    for part in ["GE", "T / HTTP/1.1\r", "\nhost: a\r\n\r\n"] {
        tokio::time::sleep(std::time::Duration::from_millis(60)).await;
        stream.write_all(part.as_bytes()).await.expect("written");
    }
    let mut answer = vec![0; 1000];
    let n = stream.read(&mut answer).await.expect("an answer");
    assert!(answer[..n].starts_with(b"HTTP/1.1 418"), "{}", String::from_utf8_lossy(&answer[..n]));
}

/// A client that says nothing at first, and then something that is no request, has one connection to the server all the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_hesitates_is_connected_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let accepted = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = accepted.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tokio::spawn(async move {
                let mut buffer = [0; 64];
                while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let engine = Engine::start(&service("any-web", "10.97.0.6", "any", &[address])).await.expect("engine");
    let mut stream = engine.connect(vip(6)).await.expect("connected");
    // Long enough that the server is connected, so that it could speak first.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    for said in ["hello world", "and more"] {
        stream.write_all(said.as_bytes()).await.expect("written");
        let mut echo = vec![0; said.len()];
        stream.read_exact(&mut echo).await.expect("an echo");
        assert_eq!(echo, said.as_bytes());
    }
    assert_eq!(accepted.load(std::sync::atomic::Ordering::Relaxed), 1);
    // Also one that says it just as the server is connected, TLS or not.
    let hello = client_hello("web.example");
    for i in 0..100_u64 {
        let mut stream = engine.connect(vip(6)).await.expect("connected");
        tokio::time::sleep(std::time::Duration::from_micros(2_500 + i * 20)).await;
        let said: &[u8] = if i % 2 == 0 { b"hello world" } else { &hello };
        stream.write_all(said).await.expect("written");
        let mut echo = vec![0; said.len()];
        stream.read_exact(&mut echo).await.expect("an echo");
    }
    assert_eq!(accepted.load(std::sync::atomic::Ordering::Relaxed), 101);
}

/// A connection that waits for an endpoint goes to another when that is none any more, however long it has waited.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_an_endpoint_that_leaves_goes_to_another() {
    let (gone, _held) = mesh_tests::scripted::blackhole();
    let a = named("a").await;
    let engine = Engine::start(&service("tcp-web", "10.97.0.5", "tcp", &[gone])).await.expect("engine");
    let mut stream = engine.connect(vip(5)).await.expect("connected");
    stream.write_all(b"hello").await.expect("written");
    // Longer than what is tried again is tried.
    tokio::time::sleep(std::time::Duration::from_millis(3_500)).await;
    engine.apply(&service("tcp-web", "10.97.0.5", "tcp", &[a])).await.expect("applied");
    let mut answer = [0; 1];
    let read = tokio::time::timeout(std::time::Duration::from_secs(2), stream.read_exact(&mut answer)).await;
    read.expect("in time").expect("an answer");
    assert_eq!(&answer, b"a");
}

/// Why there was no connection for a request, and who ended one that carries none, is told as Envoy tells it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_of_upstreams_are_told() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let resetting = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 8]).await;
            let _ = socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO));
        }
    });
    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("access.log");
    let logs = logging(&path, &json!({"flags": "%RESPONSE_FLAGS%", "why": "%UPSTREAM_TRANSPORT_FAILURE_REASON%"}));
    let documents = [service("web", "10.97.0.1", "http", &[closed]), service("db", "10.97.0.2", "tcp", &[resetting]), logs].concat();
    let engine = Engine::start(&documents).await.expect("engine");
    assert!(say(&engine, vip(1), b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await.starts_with("HTTP/1.1 503"));
    assert_eq!(say(&engine, vip(2), b"hello").await, "");
    let refused =
        || lines_of(&path).iter().any(|l| l["why"].as_str().is_some_and(|why| why == "delayed_connect_error:_Connection_refused"));
    mesh_tests::engine::wait_until("the request is told", std::time::Duration::from_secs(2), refused).await;
    let reset = || lines_of(&path).iter().any(|l| l["flags"] == "UR");
    mesh_tests::engine::wait_until("the connection is told", std::time::Duration::from_secs(2), reset).await;
}
