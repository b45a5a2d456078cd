//! Connections to upstreams: how many there are, which is used again, how long they are kept, and when none is.

use super::*;

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
            let is_so = || open.load(std::sync::atomic::Ordering::SeqCst) == wanted;
            mesh_tests::engine::wait_until(&format!("{wanted} connections are open"), Duration::from_secs(5), is_so).await;
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
async fn a_connection_that_may_be_unused_or_open_for_a_moment_ends_after_that() {
    let end = |layer: &str, field: &str| json!({"connectionPool": {layer: {field: "0.5s"}}});
    tokio::join!(ends_in_time(end("http", "idleTimeout")), ends_in_time(end("tcp", "maxConnectionDuration")));
}

async fn ends_in_time(policy: Value) {
    let scene = scene(json!({"retries": {"attempts": 0}}), policy).await;
    let clusters = &scene.engine.pod.clusters;
    let idle = || clusters.all().iter().map(|(_, state)| state.idle()).sum::<usize>();
    // The second time too: nobody was waiting for it any more.
    for round in 0..2 {
        let begun = std::time::Instant::now();
        let ask = || scene.say("GET /x HTTP/1.1\r\nhost: web\r\nx-plan: 200/100\r\nconnection: close\r\n\r\n");
        tokio::join!(ask(), ask());
        // Unless this was held up.
        assert!(idle() == 2 || begun.elapsed() > Duration::from_millis(400), "round {round}: {}", idle());
        while idle() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(5), "round {round}: nobody tidies here");
            sleep(Duration::from_millis(20)).await;
        }
        assert!(begun.elapsed() >= Duration::from_millis(500), "round {round}: {:?}", begun.elapsed());
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

/// An application that answers once on each connection and closes it without a word when it is asked again; it counts connections.
async fn answers_once() -> (SocketAddr, std::sync::Arc<std::sync::atomic::AtomicU32>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let made = std::sync::Arc::<std::sync::atomic::AtomicU32>::default();
    let count = made.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tokio::spawn(async move {
                let mut head = [0; 4096];
                if stream.read(&mut head).await.is_ok_and(|n| n > 0) {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                    // As one does that has been idle for too long just when it is asked.
                    let _ = stream.read(&mut head).await;
                }
            });
        }
    });
    (address, made)
}

/// What is safe is asked again on a new connection, where a kept one ends as it is asked; and nothing else is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_connection_that_ends_as_it_is_used_costs_no_safe_request() {
    let (up, made) = answers_once().await;
    let mut documents = service("web", "10.96.9.1", "http", &[up]);
    documents.push(virtual_service("web", &json!([{"retries": {"attempts": 0}, "route": [{"destination": {"host": "web"}}]}])));
    let engine = Engine::start(&documents).await.expect("engine");
    let scene = Scene { engine, vip: VIP.parse().expect("valid"), seen: Seen::default() };
    let ask = |method: &'static str, body: &'static str| {
        let length = if body.is_empty() { String::new() } else { format!("content-length: {}\r\n", body.len()) };
        let scene = &scene;
        async move {
            let answer = scene.say(&format!("{method} /x HTTP/1.1\r\nhost: web\r\n{length}connection: close\r\n\r\n{body}")).await.0;
            answer.split(' ').nth(1).unwrap_or_default().to_owned()
        }
    };
    let connections = || made.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((ask("GET", "").await.as_str(), connections()), ("200", 1));
    // Each of these finds the connection of the one before.
    assert_eq!((ask("GET", "").await.as_str(), connections()), ("200", 2));
    assert_eq!((ask("HEAD", "").await.as_str(), connections()), ("200", 3));
    assert_eq!((ask("OPTIONS", "").await.as_str(), connections()), ("200", 4));
    assert_eq!((ask("POST", "").await.as_str(), connections()), ("503", 4), "it may have been carried out");
    assert_eq!((ask("GET", "").await.as_str(), connections()), ("200", 5));
    assert_eq!((ask("GET", "hello").await.as_str(), connections()), ("503", 5), "a body is sent once");
}

/// As with Envoy, whose clusters begin anew when they are changed: a connection that was made by other times takes no more requests, and
/// nobody stays ejected by a rule that is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_changed_policy_has_made_is_not_kept() {
    let seen = Seen::default();
    let up = scripted::http2("h2up", &seen).await.expect("upstream");
    let with = |policy: &Value| {
        let mut documents = service("web", "10.96.9.1", "http2", &[up]);
        documents.extend([virtual_service("web", &json!([{"retries": {"attempts": 0}, "route": [{"destination": {"host": "web"}}]}]))]);
        documents.push(destination_rule("web", policy));
        documents
    };
    let engine = Engine::start(&with(&json!({}))).await.expect("engine");
    let ask = async |id: &str, plan: &str| {
        let mut stream = engine.connect(VIP.parse().expect("valid")).await.expect("connected");
        let request = format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: {id}\r\nx-plan: {plan}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let answer = read(&mut stream).await.0;
        answer.get(9..12).unwrap_or_default().to_owned()
    };
    let on = |id: &str| seen.of(id)[0].connection;
    assert_eq!([ask("a", "200").await, ask("b", "200").await], ["200", "200"]);
    assert_eq!(on("a"), on("b"));
    let idle = json!({"connectionPool": {"http": {"idleTimeout": "5s"}}});
    for (id, policy) in [("c", &idle), ("d", &json!({"connectionPool": {"tcp": {"maxConnectionDuration": "60s"}}})), ("e", &json!({}))] {
        engine.apply(&with(policy)).await.expect("applied");
        assert_eq!(ask(id, "200").await, "200");
    }
    let all = ["a", "c", "d", "e"].map(on);
    assert!((1..4).all(|i| !all[..i].contains(&all[i])), "{all:?}");
    // What changes nothing of that leaves the connection.
    engine.apply(&with(&json!({"loadBalancer": {"simple": "RANDOM"}}))).await.expect("applied");
    assert_eq!((ask("f", "200").await, on("f")), ("200".to_owned(), on("e")));
    let ejecting =
        json!({"outlierDetection": {"consecutive5xxErrors": 2, "interval": "1s", "baseEjectionTime": "40s", "maxEjectionPercent": 100}});
    engine.apply(&with(&ejecting)).await.expect("applied");
    assert_eq!([ask("g", "500").await, ask("h", "500").await, ask("i", "200").await], ["500", "500", "503"]);
    engine.apply(&with(&json!({}))).await.expect("applied");
    assert_eq!(ask("j", "200").await, "200");
}

/// An answer that is not passed on because the request is made again leaves its connection as good as it was, if it came whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_retried_leaves_its_connection() {
    let scene = scene(json!({"retries": {"attempts": 2, "retryOn": "5xx"}}), json!({})).await;
    let (answer, _) = scene.say("GET /x HTTP/1.1\r\nhost: web\r\nx-id: again\r\nx-plan: 503,503,200\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let attempts = scene.seen.of("again");
    assert_eq!(attempts.len(), 3);
    assert!(attempts.iter().all(|a| a.connection == attempts[0].connection), "{attempts:?}");
}

/// A client that is answered while its connection is to end is told with the answer, although its request came before that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_under_way_says_that_its_connection_ends() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let scene = scene(json!({"retries": {"attempts": 0}}), json!({})).await;
    let mut stream = scene.connect().await;
    stream.write_all(b"GET /x HTTP/1.1\r\nhost: web\r\nx-plan: 200/300\r\n\r\n").await.expect("written");
    tokio::time::sleep(Duration::from_millis(100)).await;
    scene.engine.pod.drain();
    let mut answer = Vec::new();
    timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.expect("an end").expect("read");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\r\nconnection: close\r\n"), "{answer}");
}

/// Descriptors for what may be asked for later are bounded: without a place, a connection is for the request it is made for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_place_a_connection_is_not_kept() {
    let scene = scene(json!({}), json!({})).await;
    let ask = |n: u32| {
        let scene = &scene;
        async move {
            let (answer, _) = scene.say(&format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: k{n}\r\nconnection: close\r\n\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
    };
    let opened = || {
        let rendered = scene.engine.proxy.metrics.render(mesh_node::telemetry::Exposition::OpenMetrics).expect("metrics");
        let line = rendered.lines().find_map(|line| line.strip_prefix("mesh_upstream_connections_total{result=\"opened\"} "));
        line.and_then(|n| n.parse::<u32>().ok()).unwrap_or(0)
    };
    let places = std::iter::from_fn(|| scene.engine.proxy.kept(&scene.engine.pod)).collect::<Vec<_>>();
    for n in 0..3 {
        ask(n).await;
    }
    assert_eq!((opened(), places.len() > 1000), (3, true));
    drop(places);
    for n in 3..6 {
        ask(n).await;
    }
    assert_eq!(opened(), 4, "with one it is");
}
