//! Which rules are in force for whom, and where they lead: both APIs, visibility, delegation, TCP and TLS routes, headless
//! services, consistent hashing. In one process, over real sockets.

use std::{collections::BTreeMap, net::SocketAddr};

use mesh_tests::{
    engine::{Engine, destination_rule, logging, service, virtual_service},
    envoy::lines_of,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

#[path = "services/connections.rs"]
mod connections;
#[path = "services/gateway_api.rs"]
mod gateway_api;
#[path = "services/istio_routes.rs"]
mod istio_routes;

/// A server that answers HTTP with its name and what it got, and anything else with its name alone.
async fn named(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = vec![0; 16 * 1024];
                while let Ok(n) = stream.read(&mut buffer).await {
                    if n == 0 {
                        return;
                    }
                    let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
                    let answer = if text.contains(" HTTP/1.1\r\n") {
                        let line = text.lines().next().unwrap_or_default().to_owned();
                        let body = format!("{name} {line}");
                        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
                    } else {
                        name.to_owned()
                    };
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

async fn say(engine: &Engine, vip: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = engine.connect(vip).await.expect("connected");
    if stream.write_all(bytes).await.is_err() {
        // Refused before anything was said.
        return String::new();
    }
    let mut buffer = vec![0; 16 * 1024];
    let read = tokio::time::timeout(std::time::Duration::from_secs(5), stream.read(&mut buffer)).await;
    let n = read.expect("an answer in time").unwrap_or(0);
    String::from_utf8_lossy(&buffer[..n]).into_owned()
}

/// The name of the server that answered, or the status.
async fn get(engine: &Engine, vip: SocketAddr, path: &str, headers: &str) -> String {
    let answer = say(engine, vip, format!("GET {path} HTTP/1.1\r\nhost: web\r\n{headers}\r\n").as_bytes()).await;
    match answer.split("\r\n\r\n").nth(1).and_then(|b| b.split(' ').next()).filter(|b| !b.is_empty()) {
        Some(name) => name.to_owned(),
        None => answer.split(' ').nth(1).unwrap_or("nothing").to_owned(),
    }
}

fn vip(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 97, 0, n], 80))
}

fn http_services(all: &[(&str, u8, SocketAddr)]) -> Vec<Value> {
    all.iter().flat_map(|(name, n, to)| service(name, &vip(*n).ip().to_string(), "http", &[*to])).collect()
}

fn to(host: &str) -> Value {
    json!([{"destination": {"host": host}}])
}

fn in_namespace(mut document: Value, namespace: &str) -> Value {
    document["metadata"]["namespace"] = json!(namespace);
    document
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn virtual_services_are_in_force_where_they_are_visible() {
    let (a, b, c) = (named("a").await, named("b").await, named("c").await);
    let services = || http_services(&[("web", 1, a), ("b", 2, b), ("c", 3, c)]);
    let engine = Engine::start(&services()).await.expect("engine");
    let vs = |name: &str, hosts: Value, export: Value, host: &str| {
        let mut document = virtual_service("web", &json!([{"route": to(host)}]));
        document["metadata"]["name"] = json!(name);
        document["spec"]["hosts"] = hosts;
        document["spec"]["exportTo"] = export;
        document
    };
    let b_full = "b.default.svc.cluster.local";
    let cases: Vec<(&str, Vec<Value>, &str)> = vec![
        ("none", vec![], "a"),
        ("short name", vec![vs("v", json!(["web"]), json!([]), "b")], "b"),
        ("full name", vec![vs("v", json!(["web.default.svc.cluster.local"]), json!(["*"]), b_full)], "b"),
        ("exported to its namespace", vec![vs("v", json!(["web"]), json!(["."]), "b")], "b"),
        ("exported to another", vec![vs("v", json!(["web"]), json!(["other"]), "b")], "a"),
        (
            "of another, exported here",
            vec![in_namespace(vs("v", json!(["web.default.svc.cluster.local"]), json!(["default"]), b_full), "other")],
            "b",
        ),
        ("a short name of another namespace", vec![in_namespace(vs("v", json!(["web"]), json!([]), b_full), "other")], "a"),
        ("wildcard", vec![vs("v", json!(["*.svc.cluster.local"]), json!([]), "b")], "b"),
        ("exact before wildcard", vec![vs("v1", json!(["*"]), json!([]), "b"), vs("v2", json!(["web"]), json!([]), "c")], "c"),
        (
            "longer wildcard first",
            vec![vs("v1", json!(["*"]), json!([]), "b"), vs("v2", json!(["*.default.svc.cluster.local"]), json!([]), "c")],
            "c",
        ),
        ("the first by name of two", vec![vs("v2", json!(["web"]), json!([]), "c"), vs("v1", json!(["web"]), json!([]), "b")], "b"),
        ("a missing destination", vec![vs("v", json!(["web"]), json!([]), "nobody")], "503"),
    ];
    for (what, rules, expected) in cases {
        engine.apply(&[services(), rules].concat()).await.expect("applied");
        assert_eq!(get(&engine, vip(1), "/x", "").await, expected, "{what}");
    }
    let gateway = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "g"},
        "spec": {"hosts": ["web"], "gateways": ["gw"], "http": [{"route": to("b")}]}});
    engine.apply(&[services(), vec![gateway]].concat()).await.expect("applied");
    assert_eq!(get(&engine, vip(1), "/x", "").await, "a", "for gateways only");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destination_rules_are_for_the_clients_they_select() {
    let (a, b) = (named("a").await, named("b").await);
    let services = http_services(&[("web", 1, a), ("b", 2, b)]);
    let to_subset = json!([{"route": [{"destination": {"host": "web", "subset": "all"}}]}]);
    let rule = |name: &str, selector: Value, subset: &str| {
        let mut rule = destination_rule("web", &json!({}));
        rule["metadata"]["name"] = json!(name);
        rule["spec"] = json!({"host": "web", "subsets": [{"name": subset, "labels": {}}]});
        if !selector.is_null() {
            rule["spec"]["workloadSelector"] = json!({"matchLabels": selector});
        }
        rule
    };
    let engine = Engine::start(&services).await.expect("engine");
    for (what, rules, expected) in [
        ("selects it", vec![rule("r", json!({"app": "client"}), "all")], "a"),
        ("selects another", vec![rule("r", json!({"app": "other"}), "all")], "503"),
        ("selects all", vec![rule("r", json!({}), "all")], "a"),
        ("that is selected by comes first", vec![rule("r1", Value::Null, "other"), rule("r2", json!({"app": "client"}), "all")], "a"),
        ("alone", vec![rule("r1", Value::Null, "all"), rule("r2", json!({"app": "client"}), "other")], "503"),
        ("of another namespace", vec![in_namespace(rule("r", json!({"app": "client"}), "all"), "istio-system")], "503"),
    ] {
        engine.apply(&[services.clone(), vec![virtual_service("web", &to_subset)], rules].concat()).await.expect("applied");
        assert_eq!(get(&engine, vip(1), "/x", "").await, expected, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn matches_are_tried_in_order_and_sources_are_looked_at() {
    let (a, b, c) = (named("a").await, named("b").await, named("c").await);
    let services = http_services(&[("web", 1, a), ("b", 2, b), ("c", 3, c)]);
    let rules = json!([
        {"match": [{"sourceLabels": {"app": "other"}}, {"sourceNamespace": "other"}], "route": to("b")},
        {"match": [{"gateways": ["mesh"], "sourceLabels": {"app": "other"}, "uri": {"exact": "/gateways"}}], "route": to("b")},
        {"match": [{"port": 81}], "route": to("b")},
        {"match": [{"uri": {"regex": "/re/[0-9]+"}, "method": {"exact": "GET"}}], "route": to("b")},
        {"match": [{"uri": {"prefix": "/CASE"}, "ignoreUriCase": true, "queryParams": {"q": {"exact": ""}}}], "route": to("b")},
        {"match": [{"uri": {"prefix": "/without"}, "withoutHeaders": {"x-skip": {}}}], "route": to("b")},
        {"match": [{"uri": {"prefix": "/claims"}, "headers": {"@request.auth.claims.sub": {"exact": "x"}}}], "route": to("b")},
        {"match": [{"authority": {"prefix": "web"}, "uri": {"prefix": "/all"}, "sourceLabels": {"app": "client"}, "sourceNamespace": "default"}], "route": to("b")},
        {"route": to("c")},
        {"match": [{"uri": {"prefix": "/never"}}], "route": to("b")},
    ]);
    let engine = Engine::start(&[services, vec![virtual_service("web", &rules)]].concat()).await.expect("engine");
    for (path, headers, expected) in [
        ("/plain", "", "c"),
        ("/gateways", "", "b"),
        ("/re/12", "", "b"),
        ("/re/12?x", "", "b"),
        ("/re/12/x", "", "c"),
        ("/case/x?q", "", "b"),
        ("/case/x", "", "c"),
        ("/without", "", "b"),
        ("/without", "x-skip: 1\r\n", "c"),
        ("/claims", "", "c"),
        ("/all", "", "b"),
        ("/never", "", "c"),
    ] {
        assert_eq!(get(&engine, vip(1), path, headers).await, expected, "{path} {headers}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_virtual_service_delegates_to_another() {
    let (a, b, c) = (named("a").await, named("b").await, named("c").await);
    let services = http_services(&[("web", 1, a), ("b", 2, b), ("c", 3, c)]);
    let root = virtual_service(
        "web",
        &json!([
            {"match": [{"uri": {"prefix": "/shop"}}], "delegate": {"name": "shop"}},
            {"match": [{"uri": {"prefix": "/gone"}}], "delegate": {"name": "nobody"}},
            {"route": to("web")},
        ]),
    );
    let delegate = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "shop"}, "spec": {"http": [
        {"match": [{"uri": {"prefix": "/shop/cart"}, "headers": {"x-b": {"exact": "1"}}}], "route": to("b")},
        {"match": [{"uri": {"prefix": "/elsewhere"}}], "route": to("b")},
        {"route": to("c")},
    ]}});
    let engine = Engine::start(&[services, vec![root, delegate]].concat()).await.expect("engine");
    for (path, headers, expected) in
        [("/shop/cart", "x-b: 1\r\n", "b"), ("/shop/cart", "", "c"), ("/elsewhere", "", "a"), ("/gone", "", "a"), ("/x", "", "a")]
    {
        assert_eq!(get(&engine, vip(1), path, headers).await, expected, "{path} {headers}");
    }
}

fn route(kind: &str, name: &str, spec: Value) -> Value {
    let mut spec = spec;
    if spec.get("parentRefs").is_none() {
        spec["parentRefs"] = json!([{"group": "", "kind": "Service", "name": "web"}]);
    }
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

fn backend(name: &str) -> Value {
    json!([{"name": name, "port": 80}])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_routes_go_by_their_own_precedence() {
    let (a, b, c) = (named("a").await, named("b").await, named("c").await);
    let services = || http_services(&[("web", 1, a), ("b", 2, b), ("c", 3, c)]);
    let first = route(
        "HTTPRoute",
        "r1",
        json!({"rules": [
            {"matches": [{"path": {"value": "/a"}}], "backendRefs": backend("b")},
            {"matches": [{"path": {"type": "Exact", "value": "/a/exact"}}], "backendRefs": backend("c")},
            {"matches": [{"path": {"value": "/a/long"}}], "backendRefs": backend("c")},
            {"matches": [{"path": {"value": "/a"}, "headers": [{"name": "X-H", "value": "1"}]}], "backendRefs": backend("c")},
            {"matches": [{"path": {"value": "/a"}, "method": "PUT"}], "backendRefs": backend("web")},
            {"matches": [{"path": {"value": "/redirect"}}], "filters": [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 301, "port": 8080}}]},
            {"matches": [{"path": {"type": "RegularExpression", "value": "/r.*"}}], "backendRefs": backend("b")},
            {"matches": [{"path": {"type": "RegularExpression", "value": "/r[0-9].*"}}], "backendRefs": backend("c")},
            {"matches": [{"path": {"value": "/slash/"}}], "backendRefs": backend("b")},
            {"matches": [{"path": {"value": "/slash"}, "method": "GET"}], "backendRefs": backend("c")},
            {"matches": [{"path": {"value": "/twice"}, "queryParams": [{"name": "q", "value": "1"}, {"name": "q", "value": "2"}],
                "headers": [{"name": "x-h", "value": "1"}, {"name": "X-H", "value": "2"}]}],
                "filters": [{"type": "RequestRedirect", "requestRedirect": {"hostname": "x"}},
                    {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-a", "value": "1"}, {"name": "X-A", "value": "2"}]}}]},
            {"matches": [{"path": {"value": "/none"}}]},
            {"matches": [{"path": {"value": "/foreign"}}], "backendRefs": [{"name": "d", "namespace": "other", "port": 80}]},
            {"matches": [{"path": {"value": "/kind"}}], "backendRefs": [{"kind": "Other", "group": "x", "name": "d"}]},
        ]}),
    );
    let second = route(
        "HTTPRoute",
        "r2",
        json!({"rules": [{"matches": [{"path": {"value": "/a"}}, {"path": {"value": "/second"}}], "backendRefs": backend("c")}]}),
    );
    let ignored = virtual_service("web", &json!([{"route": to("c")}]));
    let foreign = service("d", "10.97.0.9", "http", &[b]).into_iter().map(|d| in_namespace(d, "other")).collect::<Vec<_>>();
    let all = [services(), foreign.clone(), vec![first.clone(), second.clone(), ignored]].concat();
    let engine = Engine::start(&all).await.expect("engine");
    for (path, headers, expected) in [
        ("/a", "", "b"),
        ("/a/x", "", "b"),
        ("/ab", "", "404"),
        ("/a/exact", "", "c"),
        ("/a/exact/x", "", "b"),
        ("/a/long/x", "", "c"),
        ("/a", "x-h: 1\r\n", "c"),
        ("/second", "", "c"),
        ("/rx", "", "b"),
        ("/r1", "", "c"),
        ("/slash/x", "", "c"),
        ("/twice?q=1", "x-h: 1\r\n", "302"),
        ("/twice?q=2", "x-h: 1\r\n", "404"),
        ("/redirect", "", "301"),
        ("/none", "", "500"),
        // Within the mesh it takes no grant.
        ("/foreign", "", "b"),
        ("/kind", "", "500"),
        ("/nothing", "", "404"),
    ] {
        assert_eq!(get(&engine, vip(1), path, headers).await, expected, "{path} {headers}");
    }
    let twice = say(&engine, vip(1), b"GET /twice?q=1 HTTP/1.1\r\nhost: web\r\nx-h: 1\r\n\r\n").await;
    assert!(twice.contains("x-a: 1\r\n") && !twice.contains("x-a: 2\r\n"), "{twice}");
    // A consumer's route is for clients of its own namespace only.
    let consumer = |namespace: &str| {
        let parent = json!([{"group": "", "kind": "Service", "name": "web", "namespace": "default"}]);
        in_namespace(
            route(
                "HTTPRoute",
                "c",
                json!({"parentRefs": parent, "rules": [{"filters": [{"type": "RequestRedirect", "requestRedirect": {"hostname": "x"}}]}]}),
            ),
            namespace,
        )
    };
    engine.apply(&[services(), vec![consumer("other")]].concat()).await.expect("applied");
    assert_eq!(get(&engine, vip(1), "/x", "").await, "a");
    engine.apply(&[services(), vec![consumer("default")]].concat()).await.expect("applied");
    assert_eq!(get(&engine, vip(1), "/x", "").await, "302");
    let grpc = route(
        "GRPCRoute",
        "g",
        json!({"rules": [
            {"matches": [{"method": {"service": "a.B", "method": "C"}}], "backendRefs": backend("b")},
            {"matches": [{"method": {"service": "a.B"}}], "backendRefs": backend("c")},
        ]}),
    );
    engine.apply(&[services(), vec![grpc]].concat()).await.expect("applied");
    for (path, expected) in [("/a.B/C", "b"), ("/a.B/D", "c"), ("/a.X/C", "404")] {
        assert_eq!(get(&engine, vip(1), path, "").await, expected, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_headless_service_has_routes_and_its_clients_pick_the_endpoint() {
    let (a, b) = (named("a").await, named("b").await);
    // Its port is the endpoints' own; two services, since the two have different ports here.
    let headless = |name: &str, address: SocketAddr| {
        let mut documents = service(name, "None", "http", &[address]);
        documents[0]["spec"]["ports"][0]["port"] = json!(address.port());
        documents
    };
    let documents = || [headless("ha", a), headless("hb", b)].concat();
    let engine = Engine::start(&documents()).await.expect("engine");
    assert_eq!((get(&engine, a, "/x", "").await.as_str(), get(&engine, b, "/x", "").await.as_str()), ("a", "b"));
    let rule =
        virtual_service("ha", &json!([{"match": [{"uri": {"prefix": "/t"}}], "directResponse": {"status": 418}}, {"route": to("ha")}]));
    engine.apply(&[documents(), vec![rule]].concat()).await.expect("applied");
    assert_eq!((get(&engine, a, "/t", "").await.as_str(), get(&engine, a, "/x", "").await.as_str()), ("418", "a"));
    assert_eq!(get(&engine, b, "/t", "").await, "b");
    // A rule may name another port of it: the client has picked where it goes all the same.
    let mut documents = documents();
    documents[0]["spec"]["ports"].as_array_mut().expect("ports").push(json!({"name": "http-other", "port": 9}));
    documents[1]["ports"].as_array_mut().expect("ports").push(json!({"name": "http-other", "port": 9}));
    let rule = virtual_service("ha", &json!([{"route": [{"destination": {"host": "ha", "port": {"number": 9}}}]}]));
    engine.apply(&[documents.clone(), vec![rule]].concat()).await.expect("applied");
    assert_eq!(get(&engine, a, "/x", "").await, "a");
    // What is no endpoint any more is not asked, and the client's connection ends.
    engine.apply(&documents).await.expect("applied");
    let mut stream = engine.connect(a).await.expect("connected");
    let mut ask = async || {
        let got = mesh_tests::wire::exchange(&mut stream, b"GET /x HTTP/1.1\r\nhost: ha\r\n\r\n".to_vec(), false).await;
        (got.status.clone(), got.header("connection").map(str::to_owned))
    };
    assert_eq!(ask().await, ("200".to_owned(), None));
    documents[1]["endpoints"] = json!([]);
    engine.apply(&documents).await.expect("applied");
    assert_eq!(ask().await, ("503".to_owned(), Some("close".to_owned())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consistent_hashing_keeps_clients_where_they_were() {
    let servers = [named("a").await, named("b").await, named("c").await, named("d").await];
    let documents = |policy: Value| {
        let mut documents = service("web", "10.97.0.1", "http", &servers);
        documents.push(destination_rule("web", &json!({"loadBalancer": {"consistentHash": policy}})));
        documents
    };
    let engine = Engine::start(&documents(json!({"httpHeaderName": "x-user"}))).await.expect("engine");
    for policy in [
        json!({"httpHeaderName": "x-user"}),
        json!({"httpHeaderName": "x-user", "maglev": {}}),
        json!({"httpQueryParameterName": "u"}),
        json!({"httpCookie": {"name": "s"}}),
    ] {
        engine.apply(&documents(policy.clone())).await.expect("applied");
        let mut used = BTreeMap::new();
        for user in 0..20 {
            let (path, headers) = (format!("/x?u={user}"), format!("x-user: {user}\r\ncookie: o=1; s={user}\r\n"));
            let first = get(&engine, vip(1), &path, &headers).await;
            for _ in 0..3 {
                assert_eq!(get(&engine, vip(1), &path, &headers).await, first, "{policy}");
            }
            used.insert(first, ());
        }
        assert!(used.len() >= 3, "{policy}: {used:?}");
    }
    // Of several values the order says nothing.
    engine.apply(&documents(json!({"httpHeaderName": "x-user"}))).await.expect("applied");
    for user in 0..10 {
        let two = [format!("x-user: {user}\r\nx-user: b\r\n"), format!("x-user: b\r\nx-user: {user}\r\n")];
        assert_eq!(get(&engine, vip(1), "/x", &two[0]).await, get(&engine, vip(1), "/x", &two[1]).await, "{user}");
    }
    let attributes = json!([{"name": "SameSite", "value": "Strict"}, {"name": "Secure"}]);
    engine
        .apply(&documents(json!({"httpCookie": {"name": "s", "ttl": "60s", "path": "/p", "attributes": attributes}})))
        .await
        .expect("applied");
    // One without a value is none, and what is beside one may be of any bytes.
    for (sent, given) in [(&b"s="[..], true), (b"s=\"\"", true), (b"x=\xe9; s=abc", false)] {
        let answer = say(&engine, vip(1), &[b"GET / HTTP/1.1\r\nhost: web\r\ncookie: ", sent, b"\r\n\r\n"].concat()).await;
        assert_eq!(answer.contains("set-cookie: "), given, "{answer}");
    }
    let answer = say(&engine, vip(1), b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert!(answer.contains("; Path=/p; SameSite=Strict; Secure; HttpOnly"), "{answer}");
    let cookie = answer.lines().find_map(|l| l.strip_prefix("set-cookie: ")).expect("a cookie").to_owned();
    assert!(cookie.starts_with("s=\"") && cookie.contains("Max-Age=60") && cookie.contains("Path=/p"), "{cookie}");
    let server = answer.split("\r\n\r\n").nth(1).and_then(|b| b.split(' ').next()).expect("a body").to_owned();
    let pair = cookie.split(';').next().expect("a pair");
    for _ in 0..3 {
        assert_eq!(get(&engine, vip(1), "/", &format!("cookie: {pair}\r\n")).await, server);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cors_is_answered_for_the_application() {
    let a = named("a").await;
    let cors = json!({"allowOrigins": [{"exact": "http://good"}], "allowMethods": ["GET", "PUT"], "maxAge": "60s", "allowCredentials": true, "exposeHeaders": ["x-e"]});
    let with = |unmatched: &str| {
        let mut cors = cors.clone();
        cors["unmatchedPreflights"] = json!(unmatched);
        [http_services(&[("web", 1, a)]), vec![virtual_service("web", &json!([{"corsPolicy": cors, "route": to("web")}]))]].concat()
    };
    let engine = Engine::start(&with("FORWARD")).await.expect("engine");
    let ask = async |method: &str, origin: &str, preflight: bool| {
        let more = if preflight { "access-control-request-method: PUT\r\n" } else { "" };
        say(&engine, vip(1), format!("{method} / HTTP/1.1\r\nhost: web\r\norigin: {origin}\r\n{more}\r\n").as_bytes()).await
    };
    let answer = ask("OPTIONS", "http://good", true).await;
    for part in [
        "200",
        "access-control-allow-origin: http://good",
        "access-control-allow-methods: GET,PUT",
        "access-control-max-age: 60",
        "access-control-allow-credentials: true",
    ] {
        assert!(answer.contains(part) && !answer.contains("OPTIONS /"), "{part}: {answer}");
    }
    let answer = ask("GET", "http://good", false).await;
    assert!(
        answer.contains("access-control-allow-origin: http://good")
            && answer.contains("access-control-expose-headers: x-e")
            && answer.contains("a GET"),
        "{answer}"
    );
    let answer = ask("GET", "http://bad", false).await;
    assert!(!answer.contains("access-control") && answer.contains("a GET"), "{answer}");
    assert!(ask("OPTIONS", "http://bad", true).await.contains("a OPTIONS"), "forwarded");
    engine.apply(&with("IGNORE")).await.expect("applied");
    let answer = ask("OPTIONS", "http://bad", true).await;
    assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("a OPTIONS"), "{answer}");
    assert!(!answer.contains("allow-origin") && answer.contains("access-control-allow-methods: GET,PUT"), "as Envoy has it: {answer}");
}
