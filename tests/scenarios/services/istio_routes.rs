//! Routes as Istio's control plane makes them of its objects: which are for whom at all, what delegates and roots ask together, names.

use mesh_tests::engine::{Engine, virtual_service};
use serde_json::{Value, json};

use super::{backend, get, http_services, in_namespace, named, route, say, to, vip};

/// A service `web` that leads to a, and b and c beside it.
async fn services() -> Vec<Value> {
    let (a, b, c) = (named("a").await, named("b").await, named("c").await);
    http_services(&[("web", 1, a), ("b", 2, b), ("c", 3, c)])
}

fn named_vs(name: &str, http: &Value, created: &str) -> Value {
    let mut document = virtual_service("web", http);
    document["metadata"] = json!({"name": name, "creationTimestamp": created});
    document
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_for_other_clients_and_ports_is_no_route() {
    let services = services().await;
    let engine = Engine::start(&services).await.expect("engine");
    let younger = named_vs("younger", &json!([{"match": [{"uri": {"prefix": "/x"}}], "route": to("c")}]), "2021-01-01T00:00:00Z");
    for (matched, alone, with_another) in [
        (json!({"port": 81}), "a", "c"),
        (json!({"sourceLabels": {"app": "canary-tester"}}), "a", "c"),
        (json!({"sourceNamespace": "other"}), "a", "c"),
        (json!({"gateways": ["gw"]}), "a", "c"),
        // There is a route for this client, and the request is not what it is for.
        (json!({"port": 80, "uri": {"exact": "/y"}}), "404", "c"),
        (json!({"uri": {"exact": "/y"}}), "404", "c"),
        (json!({"port": 80}), "b", "b"),
    ] {
        let older = named_vs("older", &json!([{"match": [matched.clone()], "route": to("b")}]), "2020-01-01T00:00:00Z");
        engine.apply(&[services.clone(), vec![older.clone()]].concat()).await.expect("applied");
        assert_eq!(get(&engine, vip(1), "/x", "").await, alone, "{matched}");
        engine.apply(&[services.clone(), vec![older, younger.clone()]].concat()).await.expect("applied");
        assert_eq!(get(&engine, vip(1), "/x", "").await, with_another, "{matched}, and another");
    }
}

/// As in Istio's waypoints: the older one's rules first, and what takes every request last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn virtual_services_of_one_host_are_one() {
    let services = services().await;
    let engine = Engine::start(&services).await.expect("engine");
    let of = |path: &str, name: &str| json!({"match": [{"uri": {"prefix": path}}], "route": to(name)});
    let all = |name: &str| json!({"route": to(name)});
    let both = json!({"match": [{"uri": {"prefix": "/x"}}, {"uri": {"prefix": "/"}}], "route": to("b")});
    for (older, younger, expected) in [
        (json!([of("/x", "b")]), json!([of("/y", "c")]), ["b", "c", "404"]),
        (json!([of("/x", "b")]), json!([of("/x", "c"), of("/y", "c"), all("c")]), ["b", "c", "c"]),
        (json!([all("b")]), json!([of("/y", "c")]), ["b", "c", "b"]),
        // Behind what takes all there is nothing in its own, and of two the older counts.
        (json!([all("b"), of("/x", "a")]), json!([of("/y", "c"), all("c")]), ["b", "c", "b"]),
        // One match of a rule may be for all, and the others not.
        (json!([both]), json!([of("/x", "c"), of("/y", "c")]), ["b", "c", "b"]),
    ] {
        let documents = [named_vs("younger", &younger, "2021-01-01T00:00:00Z"), named_vs("older", &older, "2020-01-01T00:00:00Z")];
        engine.apply(&[services.clone(), documents.to_vec()].concat()).await.expect("applied");
        let mut found = Vec::new();
        for path in ["/x", "/y", "/z"] {
            found.push(get(&engine, vip(1), path, "").await);
        }
        assert_eq!(found, expected, "{older} {younger}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_header_is_matched_like_one() {
    let services = services().await;
    let engine = Engine::start(&services).await.expect("engine");
    let headers = |name: &str, test: Value| {
        vec![virtual_service("web", &json!([{"match": [{"headers": {name: test}}], "route": to("b")}, {"route": to("c")}]))]
    };
    let without = vec![virtual_service(
        "web",
        &json!([{"match": [{"withoutHeaders": {"host": {"exact": "web"}}}], "route": to("b")}, {"route": to("c")}]),
    )];
    let gateway = |value: &str| {
        let host = json!([{"headers": [{"name": "Host", "value": value}]}]);
        vec![route("HTTPRoute", "r", json!({"rules": [{"matches": host, "backendRefs": backend("b")}, {"backendRefs": backend("c")}]}))]
    };
    for (what, rules, expected) in [
        ("host", headers("host", json!({"exact": "web"})), "b"),
        ("another host", headers("host", json!({"exact": "other"})), "c"),
        ("there is always one", headers("host", json!({})), "b"),
        ("without this host", without, "c"),
        (":authority", headers(":authority", json!({"prefix": "w"})), "b"),
        (":method", headers(":method", json!({"exact": "GET"})), "b"),
        (":path", headers(":path", json!({"exact": "/x?q=1"})), "b"),
        (":scheme", headers(":scheme", json!({"exact": "https"})), "c"),
        ("an HTTPRoute's", gateway("web"), "b"),
        ("an HTTPRoute's other", gateway("other"), "c"),
    ] {
        engine.apply(&[services.clone(), rules].concat()).await.expect("applied");
        assert_eq!(get(&engine, vip(1), "/x?q=1", "").await, expected, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_and_its_delegate_ask_together() {
    let services = services().await;
    let engine = Engine::start(&services).await.expect("engine");
    let delegated = |root: &Value, delegate: &Value| {
        let root = virtual_service("web", &json!([{"match": root, "delegate": {"name": "d"}}, {"route": to("c")}]));
        let delegate = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "d"},
            "spec": {"http": [{"match": delegate, "route": to("b")}]}});
        vec![root, delegate]
    };
    let (get_a, x_t) = (json!({"uri": {"prefix": "/a"}, "method": {"exact": "GET"}}), json!({"headers": {"x-t": {"exact": "t"}}}));
    for (what, root, delegate, expected) in [
        (
            "a part of the prefix, and the same method",
            json!([get_a]),
            json!([{"uri": {"prefix": "/a/b"}, "method": {"exact": "GET"}}]),
            "b",
        ),
        ("the same exact path", json!([{"uri": {"exact": "/a/b"}}]), json!([{"uri": {"exact": "/a/b"}}]), "b"),
        ("more than the root's prefix", json!([{"uri": {"prefix": "/a/b"}}]), json!([{"uri": {"prefix": "/a"}}]), "c"),
        ("the same header", json!([x_t]), json!([x_t]), "b"),
        ("another value", json!([x_t]), json!([{"headers": {"x-t": {"exact": "u"}}}]), "c"),
        ("a prefix of nothing", json!([{"headers": {"x-t": {"prefix": ""}}}]), json!([x_t]), "c"),
        ("expressions are not compared", json!([{"uri": {"regex": "/a.*"}}]), json!([{"uri": {"prefix": "/a"}}]), "c"),
        ("in any case, or not", json!([{"uri": {"prefix": "/a"}, "ignoreUriCase": true}]), json!([{"uri": {"prefix": "/a"}}]), "c"),
        ("what must not be there", json!([{"withoutHeaders": {"x-u": {}}}]), json!([{"withoutHeaders": {"x-u": {}}}]), "b"),
        (
            "one of the delegate's has no place",
            json!([{"uri": {"prefix": "/a"}}]),
            json!([{"uri": {"prefix": "/a"}}, {"uri": {"prefix": "/z"}}]),
            "c",
        ),
        (
            "each of the delegate's has one",
            json!([{"uri": {"prefix": "/z"}}, {"uri": {"prefix": "/a"}}]),
            json!([{"uri": {"prefix": "/a"}}]),
            "b",
        ),
    ] {
        engine.apply(&[services.clone(), delegated(&root, &delegate)].concat()).await.expect("applied");
        assert_eq!(get(&engine, vip(1), "/a/b", "x-t: t\r\n").await, expected, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_and_bodies_are_as_the_apis_have_them() {
    let services = services().await;
    let engine = Engine::start(&services).await.expect("engine");
    let http = |rules: Value| route("HTTPRoute", "h", json!({"rules": rules}));
    let weightless = json!([{"backendRefs": [{"name": "b", "port": 80, "weight": 0}]}]);
    let grpc = route("GRPCRoute", "g", json!({"rules": [{"backendRefs": backend("b")}]}));
    let expression =
        json!([{"matches": [{"method": {"type": "RegularExpression", "service": "p.S", "method": "A|B"}}], "backendRefs": backend("b")}]);
    for (what, rules, expected) in [
        ("a weight of nothing", vec![http(weightless)], "500"),
        ("a GRPCRoute beside it", vec![http(json!([{"backendRefs": backend("c")}])), grpc], "b"),
        ("an alternative", vec![route("GRPCRoute", "g", json!({"rules": expression}))], "b"),
        (
            "another namespace's",
            vec![in_namespace(
                route(
                    "HTTPRoute",
                    "h",
                    json!({"parentRefs": [{"group": "", "kind": "Service", "name": "web", "namespace": "default"}],
                "rules": [{"backendRefs": backend("nobody")}]}),
                ),
                "other",
            )],
            "a",
        ),
    ] {
        engine.apply(&[services.clone(), rules].concat()).await.expect("applied");
        assert_eq!(get(&engine, vip(1), "/p.S/B", "").await, expected, "{what}");
    }
    let filter = json!([{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "Host", "value": "b.internal"}]}}]);
    let rules = http(json!([{"backendRefs": [{"name": "b", "port": 80, "filters": filter}], "filters": [
        {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-sent-to", "value": "%REQ(:AUTHORITY)%"}]}}]}]));
    engine.apply(&[services.clone(), vec![rules]].concat()).await.expect("applied");
    let answer = say(&engine, vip(1), b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert!(answer.contains("x-sent-to: b.internal\r\n"), "{answer}");
    let page = "p".repeat(5000);
    let rules = virtual_service("web", &json!([{"directResponse": {"status": 200, "body": {"string": page}}}]));
    engine.apply(&[services, vec![rules]].concat()).await.expect("applied");
    let answer = say(&engine, vip(1), b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert!(answer.contains("content-length: 5000\r\n"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_are_named_by_rule_and_match_and_by_root_and_delegate() {
    let services = services().await;
    let engine = Engine::start(&services).await.expect("engine");
    let tells = json!({"response": {"set": {"x-route": "%ROUTE_NAME%"}}});
    let root = virtual_service(
        "web",
        &json!([
            {"name": "r", "match": [{"uri": {"prefix": "/named"}, "name": "m"}, {"uri": {"prefix": "/half"}}], "route": to("b"), "headers": tells},
            {"match": [{"uri": {"prefix": "/only"}, "name": "m"}], "route": to("b"), "headers": tells},
            {"name": "root", "match": [{"uri": {"prefix": "/d"}, "name": "x"}], "delegate": {"name": "d"}},
        ]),
    );
    let delegate = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "d"}, "spec": {"http": [
        {"name": "own", "match": [{"uri": {"prefix": "/d/own"}, "name": "y"}], "route": to("b"), "headers": tells},
        {"route": to("b"), "headers": tells},
    ]}});
    engine.apply(&[services, vec![root, delegate]].concat()).await.expect("applied");
    for (path, expected) in [("/named", "r.m"), ("/half", "r"), ("/only", ".m"), ("/d/own", "root-own.x-y"), ("/d/z", "root.x")] {
        let answer = say(&engine, vip(1), format!("GET {path} HTTP/1.1\r\nhost: web\r\n\r\n").as_bytes()).await;
        assert!(answer.contains(&format!("x-route: {expected}\r\n")), "{path}: {answer}");
    }
}
