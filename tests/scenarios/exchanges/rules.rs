//! What rules do to requests one after the other: ejections, mirrors, places of requests and retries, which rule counts.

use super::*;

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
        // What gRPC says is nothing where nobody has asked in it.
        ("od_503_grpc_ok", &ejects, &none, up, "503+grpc-status=0", vec!["503 -", "503 -", "503 -", "503 UH"]),
        ("od_200_grpc_unavailable", &ejects, &none, up, "200+grpc-status=14", vec!["200 -"; 5]),
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
    let nowhere =
        json!({"match": [{"uri": {"prefix": "/nowhere"}}], "route": [{"destination": {"host": "none"}}], "mirror": {"host": "copy"}});
    let documents = [
        service("web", "10.96.9.1", "http", &[one]),
        service("copy", "10.96.9.2", "http", &[two]),
        service("none", "10.96.9.3", "http", &[]),
        vec![virtual_service("web", &json!([nowhere, rule]))],
    ]
    .concat();
    let scene = Scene { engine: Engine::start(&documents).await.expect("engine"), vip: VIP.parse().expect("valid"), seen };
    for (id, plan, status) in [("m", "200", "200"), ("late", "200/600", "504")] {
        let (answer, _) = scene
            .say(
                &format!("{}hello", post(plan, id, 5))
                    .replace("x-id", "connection: close\r\nx-forwarded-for: 1.2.3.4\r\nx-request-id: r\r\nx-id"),
            )
            .await;
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
            let came_by = copy.headers.iter().filter(|(n, _)| n == "x-forwarded-for").map(|(_, v)| v.as_str()).collect::<Vec<_>>();
            assert!(matches!(came_by[..], [one] if one.starts_with("1.2.3.4,")), "{copy:?}");
            assert_eq!(header("x-envoy-expected-rq-timeout-ms"), Some("200"), "{copy:?}");
        }
    }
    // The route's time is the mirrors', too.
    let failures = || scene.engine.proxy.metrics.mirror_failures.get();
    for _ in 0..50 {
        if failures() == 2 {
            break;
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(failures(), 2, "both are given up before they would be answered");
    // What goes nowhere is not copied.
    let text = "POST /nowhere HTTP/1.1\r\nhost: web\r\nx-id: n\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello";
    let (answer, _) = scene.say(text).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("no healthy upstream"), "{answer}");
    // By the time that copies of another are there it would be, too.
    scene.say(&format!("{}hello", post("200", "after", 5)).replace("x-id", "connection: close\r\nx-id")).await;
    for _ in 0..200 {
        if scene.seen.of("after").len() == 3 {
            break;
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert!(scene.seen.of("after").len() == 3 && scene.seen.of("n").is_empty());
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

/// What the mesh's `proxyHeaders` switch off is not added; what clients say themselves stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_the_mesh_does_not_want_are_not_added() {
    let seen = Seen::default();
    let one = scripted::http1("up1", &seen).expect("upstream");
    let rules = json!([
        {"match": [{"uri": {"prefix": "/rewritten"}}], "rewrite": {"uri": "/x"}, "timeout": "5s", "retries": {"attempts": 1, "retryOn": "5xx"},
         "route": [{"destination": {"host": "web"}}]},
        {"route": [{"destination": {"host": "web"}}]}]);
    let names = ["x-request-id", "x-envoy-attempt-count", "x-envoy-expected-rq-timeout-ms", "x-envoy-original-path"];
    for (switched, expected, timed) in [
        (json!({}), vec![true, true, true, true], true),
        (json!({"requestId": {"disabled": true}}), vec![false, true, true, true], true),
        (json!({"attemptCount": {"disabled": true}}), vec![true, false, true, true], true),
        (json!({"envoyDebugHeaders": {"disabled": true}}), vec![true, true, false, false], false),
    ] {
        let mesh = json!({"defaultConfig": {"proxyHeaders": switched}});
        let mesh = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}});
        let documents = [service("web", "10.96.9.1", "http", &[one]), vec![virtual_service("web", &rules), mesh]].concat();
        let engine = Engine::start(&documents).await.expect("engine");
        let scene = Scene { engine, vip: VIP.parse().expect("valid"), seen: seen.clone() };
        let id = format!("{switched}").replace(['"', '{', '}', ' '], "");
        let text = format!("GET /rewritten HTTP/1.1\r\nhost: web\r\nx-id: {id}\r\nx-plan: 503,200\r\nconnection: close\r\n\r\n");
        let (answer, _) = scene.say(&text).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(answer.contains("x-envoy-upstream-service-time"), timed, "{switched}: {answer}");
        let attempts = scene.seen.of(&id);
        assert_eq!(attempts.len(), 2, "{switched}");
        for attempt in attempts {
            let there = names.map(|name| attempt.headers.iter().any(|(n, _)| n == name));
            assert_eq!(there.to_vec(), expected, "{switched}: {attempt:?}");
        }
        let own = format!("GET / HTTP/1.1\r\nhost: web\r\nx-id: own-{id}\r\nx-request-id: mine\r\nconnection: close\r\n\r\n");
        scene.say(&own).await;
        let attempt = &scene.seen.of(&format!("own-{id}"))[0];
        assert!(attempt.headers.iter().any(|(n, v)| n == "x-request-id" && v == "mine"), "{attempt:?}");
    }
}

/// An application that says early that it is at work has all the time the request has, and may say so as often as it likes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_told_to_wait_waits_as_long_as_for_any_answer() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let up = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(1..) = stream.read(&mut buffer).await {
                    let request = String::from_utf8_lossy(&buffer).into_owned();
                    let many = match request.split(' ').nth(1) {
                        Some("/many") => 200,
                        Some("/flood") => 17_000,
                        _ => 1,
                    };
                    let _ = stream.write_all("HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n".repeat(many).as_bytes()).await;
                    if many == 1 {
                        sleep(Duration::from_millis(600)).await;
                    }
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                }
            });
        }
    });
    let rule = json!({"timeout": "3s", "retries": {"attempts": 2, "perTryTimeout": "200ms"}, "route": [{"destination": {"host": "web"}}]});
    let mut documents = service("web", "10.96.9.1", "http", &[up]);
    documents.push(virtual_service("web", &json!([rule])));
    let scene = Scene { engine: Engine::start(&documents).await.expect("engine"), vip: VIP.parse().expect("valid"), seen: Seen::default() };
    for (path, told) in [("/slow", 1), ("/many", 64)] {
        let (text, _) = scene.say(&format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")).await;
        assert_eq!(text.matches("HTTP/1.1 103").count(), told, "{path}: {text}");
        assert!(text.contains("HTTP/1.1 200 OK") && text.ends_with("ok"), "{path}: {text}");
    }
    // That many answer nothing.
    let (text, _) = scene.say("GET /flood HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
    assert!(text.contains("HTTP/1.1 502") && !text.contains("HTTP/1.1 200"), "{text}");
}

/// Queries are passed on as they were written, whatever a URL should not have in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_pass_as_they_were_written() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let rule = json!({"match": [{"queryParams": {"q": {"exact": "\"<1>\""}}}], "rewrite": {"uri": "/<x>"}, "route": [{"destination": {"host": "web"}}]});
    let mut documents = service("web", "10.96.9.1", "http", &[up]);
    documents.push(virtual_service("web", &json!([rule, {"route": [{"destination": {"host": "web"}}]}])));
    let scene = Scene { engine: Engine::start(&documents).await.expect("engine"), vip: VIP.parse().expect("valid"), seen };
    for (target, sent) in
        [("/s?source={\"query\":<1>}&`|^\\", "/s?source={\"query\":<1>}&`|^\\"), ("/<s>", "/%3Cs%3E"), ("/a?q=\"<1>\"", "/<x>a?q=\"<1>\"")]
    {
        let id = format!("odd-{}", target.len());
        let (text, _) = scene.say(&format!("GET {target} HTTP/1.1\r\nhost: web\r\nx-id: {id}\r\nconnection: close\r\n\r\n")).await;
        assert!(text.contains("HTTP/1.1 200 OK"), "{target}: {text}");
        assert_eq!(scene.seen.of(&id)[0].line, format!("GET {sent} HTTP/1.1"));
    }
}

/// What a route says of answers is said of those of backends that are not there, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_for_missing_backends_are_decorated() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    for (backend, flags) in [(json!({"name": "nope", "port": 8080}), "NC"), (json!({"name": "web", "port": 80, "weight": 0}), "-")] {
        let mut documents = service("web", "10.96.9.1", "http", &[up]);
        documents.push(json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r"}, "spec": {
            "parentRefs": [{"kind": "Service", "group": "", "name": "web"}],
            "rules": [{"filters": [{"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-s", "value": "s"}]}}], "backendRefs": [backend]}]}}));
        let engine = Engine::start(&documents).await.expect("engine");
        let scene = Scene { engine, vip: VIP.parse().expect("valid"), seen: seen.clone() };
        let (text, _) = scene.say("GET /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.1 500") && text.contains("x-s: s\r\n"), "{flags}: {text}");
        let labels = [&*format!("response_flags=\"{flags}\""), "response_code=\"500\""];
        let rendered = scene.engine.proxy.metrics.render(mesh_node::telemetry::Exposition::OpenMetrics).expect("metrics");
        let counted =
            rendered.lines().any(|line| line.starts_with("istio_requests_total") && labels.iter().all(|label| line.contains(label)));
        assert!(counted, "{flags}: {rendered}");
    }
}

/// What an application gives no answer to counts at its own node as what a proxy of Istio's answers for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_answered_is_told_as_an_error() {
    let seen = Seen::default();
    let up = scripted::http1("up1", &seen).expect("upstream");
    let documents = [vec![mesh_tests::engine::server_pod()], service("web", "10.96.9.1", "http", &[up])].concat();
    let scene = Scene { engine: Engine::start(&documents).await.expect("engine"), vip: VIP.parse().expect("valid"), seen };
    let of_metrics = |labels: &[&str]| {
        let rendered = scene.engine.proxy.metrics.render(mesh_node::telemetry::Exposition::OpenMetrics).expect("metrics");
        rendered.lines().any(|line| line.starts_with("istio_requests_total") && labels.iter().all(|label| line.contains(label)))
    };
    for (plan, code, flag) in [("rst", "503", "UC"), ("fin", "503", "UC"), ("garbage", "502", "UPE")] {
        let mut stream = scene.engine.connect_inbound(up.port()).await.expect("connected");
        let request = format!("GET /x HTTP/1.1\r\nhost: web\r\nx-id: none-{plan}\r\nx-plan: {plan}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let _ = read(&mut stream).await;
        scene.until_idle().await;
        let labels = [format!("response_code=\"{code}\""), format!("response_flags=\"{flag}\""), "reporter=\"destination\"".to_owned()];
        assert!(of_metrics(&labels.each_ref().map(String::as_str)), "{plan}: {labels:?}");
    }
}
