//! Which endpoint a request goes to, and on how many connections, while rules and endpoints change.

use std::collections::BTreeSet;

use super::*;

async fn ask(engine: &Engine, vip: SocketAddr, path: &str, headers: &str) -> String {
    let mut stream = engine.connect(vip).await.expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\n{headers}connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("written");
    let answer = read(&mut stream).await.0;
    answer.get(9..12).unwrap_or_default().to_owned()
}

fn with(endpoints: &[SocketAddr], port: &str, policy: &Value) -> Vec<Value> {
    let mut documents = service("web", "10.96.9.1", port, endpoints);
    documents.push(virtual_service("web", &json!([{"retries": {"attempts": 0}, "route": [{"destination": {"host": "web"}}]}])));
    documents.push(destination_rule("web", policy));
    documents
}

fn ejecting() -> Value {
    json!({"outlierDetection": {"consecutive5xxErrors": 1, "interval": "100s", "baseEjectionTime": "100s", "maxEjectionPercent": 100}})
}

/// As with Envoy, whose clusters begin anew: a limit that is set while many connections are kept is not that many.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_is_for_connections_that_are_kept_too() {
    for http2 in [false, true] {
        let seen = Seen::default();
        let up = if http2 { scripted::http2("up", &seen).await } else { scripted::http1("up", &seen) }.expect("upstream");
        let documents = |policy: &Value| with(&[up], if http2 { "http2" } else { "http" }, policy);
        let one_at_a_time = json!({"connectionPool": {"http": {"maxConcurrentStreams": 1}}});
        let engine = Engine::start(&documents(&one_at_a_time)).await.expect("engine");
        let five = async |id: &str| {
            let headers = format!("host: web\r\nx-plan: 200/300\r\nx-id: {id}\r\n");
            // One after the other: while a connection is made there is a place for one that waits.
            let asked = async |n: u64| {
                sleep(Duration::from_millis(30 * n)).await;
                ask(&engine, VIP.parse().expect("valid"), "/x", &headers).await
            };
            let mut all = <[_; 5]>::from(tokio::join!(asked(0), asked(1), asked(2), asked(3), asked(4)));
            all.sort();
            let connections = seen.of(id).iter().map(|a| a.connection).collect::<BTreeSet<_>>();
            (all.map(|status| status.parse::<u16>().unwrap_or(0)), connections)
        };
        let (before, kept) = five("a").await;
        assert_eq!((before, kept.len()), ([200; 5], 5), "{http2}");
        let limits =
            json!({"connectionPool": {"tcp": {"maxConnections": 1}, "http": {"http1MaxPendingRequests": 1, "maxConcurrentStreams": 1}}});
        engine.apply(&documents(&limits)).await.expect("applied");
        let (after, made) = five("b").await;
        assert_eq!((after, made.len()), ([200, 200, 503, 503, 503], 1), "{http2}");
        assert!(made.is_disjoint(&kept), "{http2}: {made:?} of {kept:?}");
    }
}

/// What goes on on connections of before is counted for itself: a stream that lasts holds nobody up who comes after the change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_lasts_does_not_fill_a_pool_that_has_begun_anew() {
    let up = scripted::http2("up", &Seen::default()).await.expect("upstream");
    let documents =
        |retries: u32| with(&[up], "http2", &json!({"connectionPool": {"tcp": {"maxConnections": 1}, "http": {"maxRetries": retries}}}));
    let engine = Engine::start(&documents(1)).await.expect("engine");
    let vip = VIP.parse().expect("valid");
    let mut lasting = engine.connect(vip).await.expect("connected");
    lasting.write_all(b"GET /x HTTP/1.1\r\nhost: web\r\nx-plan: hdrstall\r\n\r\n").await.expect("written");
    let mut head = [0; 12];
    timeout(Duration::from_secs(2), lasting.read_exact(&mut head)).await.expect("in time").expect("an answer");
    engine.apply(&documents(2)).await.expect("applied");
    let asked = timeout(Duration::from_secs(2), ask(&engine, vip, "/x", "host: web\r\n")).await;
    assert_eq!(asked.expect("not held up"), "200");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_cut_counts_against_its_endpoint() {
    for plan in ["hdrrst", "hdrfin", "rst", "503"] {
        let up = scripted::http1("up", &Seen::default()).expect("upstream");
        let engine = Engine::start(&with(&[up], "http", &ejecting())).await.expect("engine");
        let vip = VIP.parse().expect("valid");
        ask(&engine, vip, "/x", &format!("host: web\r\nx-plan: {plan}\r\n")).await;
        assert_eq!(ask(&engine, vip, "/x", "host: web\r\n").await, "503", "{plan}");
    }
    // A status beyond those of servers says nothing of its endpoint.
    let up = scripted::http1("up", &Seen::default()).expect("upstream");
    let engine = Engine::start(&with(&[up], "http", &ejecting())).await.expect("engine");
    let vip = VIP.parse().expect("valid");
    assert_eq!(
        [ask(&engine, vip, "/x", "host: web\r\nx-plan: 600\r\n").await, ask(&engine, vip, "/x", "host: web\r\n").await],
        ["600", "200"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_becomes_ready_again_is_not_ejected_any_more() {
    let seen = Seen::default();
    let ups = ["a", "b"].map(|name| scripted::http1(name, &seen).expect("upstream"));
    let documents = |ready: bool| {
        let mut documents = with(&ups, "http", &ejecting());
        documents[1]["endpoints"][0]["conditions"] = json!({"ready": ready});
        documents
    };
    let engine = Engine::start(&documents(true)).await.expect("engine");
    let vip = VIP.parse().expect("valid");
    let asked = async |id: &str, plan: &str, n: usize| {
        for _ in 0..n {
            ask(&engine, vip, "/x", &format!("host: web\r\nx-id: {id}\r\nx-plan: {plan}\r\n")).await;
        }
        seen.of(id).iter().map(|a| a.port).collect::<BTreeSet<_>>()
    };
    // One of them fails, and is left out.
    let mut failed = BTreeSet::new();
    while !failed.contains(&ups[0].port()) {
        assert!(failed.is_empty(), "the other fails first: {failed:?}");
        let id = fastrand::u64(..).to_string();
        let first = asked(&id, "200", 1).await;
        if first.contains(&ups[0].port()) {
            // Asked at random: ask until it is this one that fails.
            let mut other = documents(true);
            other[2]["endpoints"][0]["conditions"] = json!({"ready": false});
            engine.apply(&other).await.expect("applied");
            failed = asked("fails", "500", 1).await;
            engine.apply(&documents(true)).await.expect("applied");
        }
    }
    assert_eq!(asked("without", "200", 20).await, BTreeSet::from([ups[1].port()]));
    engine.apply(&documents(false)).await.expect("applied");
    let ejected = || engine.pod.clusters.all().iter().map(|(_, state)| state.outliers.ejected().len()).sum::<usize>();
    timeout(Duration::from_secs(5), async {
        while ejected() > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("forgotten");
    engine.apply(&documents(true)).await.expect("applied");
    assert_eq!(asked("again", "200", 40).await.len(), 2);
}

/// A request's host, path and method are hashed like headers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_header_is_hashed_like_one() {
    let seen = Seen::default();
    let ups = ["a", "b", "c", "d", "e"].map(|name| scripted::http1(name, &seen).expect("upstream"));
    for (name, same) in [("Host", true), (":authority", true), (":path", false), (":method", true), ("x-absent", false)] {
        let policy = json!({"loadBalancer": {"consistentHash": {"httpHeaderName": name}}});
        let engine = Engine::start(&with(&ups, "http", &policy)).await.expect("engine");
        for i in 0..20 {
            let headers = format!("host: h.example\r\nx-id: {name}\r\n");
            assert_eq!(ask(&engine, VIP.parse().expect("valid"), &format!("/{i}"), &headers).await, "200");
        }
        let to = seen.of(name).iter().map(|a| a.port).collect::<BTreeSet<_>>();
        assert_eq!(to.len() == 1, same, "{name}: {to:?}");
    }
}

/// A cookie that is to live for less than a second is one of the session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cookie_of_no_whole_second_is_not_one_to_be_removed() {
    let up = scripted::http1("up", &Seen::default()).expect("upstream");
    for (ttl, age) in [("500ms", ""), ("1500ms", "; Max-Age=1"), ("0s", "")] {
        let policy = json!({"loadBalancer": {"consistentHash": {"httpCookie": {"name": "sess", "ttl": ttl}}}});
        let engine = Engine::start(&with(&[up], "http", &policy)).await.expect("engine");
        let mut stream = engine.connect(VIP.parse().expect("valid")).await.expect("connected");
        stream.write_all(b"GET /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await.expect("written");
        let answer = read(&mut stream).await.0;
        let cookie = answer.lines().find_map(|line| line.strip_prefix("set-cookie: ")).expect("a cookie");
        assert!(cookie.starts_with("sess=\"") && cookie.ends_with(&format!("\"{age}; HttpOnly")), "{ttl}: {cookie}");
    }
}
