//! What the mesh profile of the Gateway API's own conformance suite expects, case by case: matching and precedence, redirects, rewrites,
//! header modifiers, ports, frontends and splits. The manifests are this project's; what they are to do is the suite's.

use std::{collections::BTreeMap, net::SocketAddr};

use mesh_tests::{
    engine::Engine,
    scripted::{self, Seen},
    wire::{Got, exchange},
};
use serde_json::{Value, json};

/// Services `echo`, `echo-v1` and `echo-v2`, each with the ports 80 and 8080; `echo` is both others.
const ECHO: [u8; 3] = [1, 2, 3];

struct Mesh {
    engine: Engine,
    seen: [Seen; 2],
    services: Vec<Value>,
}

fn vip(n: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([10, 97, 1, n], port))
}

fn service(name: &str, n: u8, endpoints: &[SocketAddr]) -> Vec<Value> {
    let ports = [("http", 80), ("http-alt", 8080)];
    let mut all = vec![json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": vip(n, 80).ip(), "ports": ports.map(|(name, port)| json!({"name": name, "port": port}))}})];
    for (i, endpoint) in endpoints.iter().enumerate() {
        let ports = ports.map(|(name, _)| json!({"name": name, "port": endpoint.port()}));
        all.push(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-{i}"), "labels": {"kubernetes.io/service-name": name}},
            "endpoints": [{"addresses": [endpoint.ip()]}], "ports": ports}));
    }
    all
}

impl Mesh {
    async fn start() -> Self {
        let seen = [Seen::default(), Seen::default()];
        let [v1, v2] = [("echo-v1", &seen[0]), ("echo-v2", &seen[1])].map(|(name, seen)| scripted::http1(name, seen).expect("an upstream"));
        let services =
            [service("echo", ECHO[0], &[v1, v2]), service("echo-v1", ECHO[1], &[v1]), service("echo-v2", ECHO[2], &[v2])].concat();
        Self { engine: Engine::start(&services).await.expect("engine"), seen, services }
    }

    async fn apply(&self, routes: &[Value]) {
        self.engine.apply(&[&self.services[..], routes].concat()).await.expect("applied");
    }

    async fn get(&self, to: SocketAddr, path: &str, headers: &str) -> Got {
        let host = if headers.to_lowercase().contains("host:") { "" } else { "host: echo\r\n" };
        let mut stream = self.engine.connect(to).await.expect("connected");
        exchange(&mut stream, format!("GET {path} HTTP/1.1\r\n{host}{headers}\r\n").into_bytes(), false).await
    }

    /// Who answered, or the status.
    async fn backend(&self, to: SocketAddr, path: &str, headers: &str) -> String {
        let got = self.get(to, path, headers).await;
        if got.status == "200" { got.body.split(' ').next().unwrap_or_default().to_owned() } else { got.status }
    }
}

fn route(kind: &str, parent: &Value, rules: &Value) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": {"name": "route"},
        "spec": {"parentRefs": [parent], "rules": rules}})
}

fn parent(name: &str, port: Option<u16>) -> Value {
    let mut parent = json!({"group": "", "kind": "Service", "name": name});
    if let Some(port) = port {
        parent["port"] = json!(port);
    }
    parent
}

fn http(rules: &Value) -> Value {
    route("HTTPRoute", &parent("echo", Some(80)), rules)
}

fn backends(name: &str) -> Value {
    json!([{"name": name, "port": 8080}])
}

fn prefix(path: &str) -> Value {
    json!({"path": {"type": "PathPrefix", "value": path}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_matched() {
    let mesh = Mesh::start().await;
    let version = |value: &str| json!({"headers": [{"name": "version", "value": value}]});
    mesh.apply(&[http(&json!([
        {"matches": [prefix("/"), version("one")], "backendRefs": backends("echo-v1")},
        {"matches": [prefix("/v2"), version("two")], "backendRefs": backends("echo-v2")},
    ]))])
    .await;
    for (path, headers, expected) in [
        ("/", "", "echo-v1"),
        ("/example", "", "echo-v1"),
        ("/", "Version: one\r\n", "echo-v1"),
        ("/v2", "", "echo-v2"),
        ("/v2/example", "", "echo-v2"),
        ("/", "Version: two\r\n", "echo-v2"),
        ("/v2/", "", "echo-v2"),
        ("/v2example", "", "echo-v1"),
        ("/foo/v2/example", "", "echo-v1"),
    ] {
        assert_eq!(mesh.backend(vip(1, 80), path, headers).await, expected, "{path} {headers}");
    }
    let animal = |value: &str| json!({"queryParams": [{"name": "animal", "value": value}]});
    let and = |mut one: Value, other: Value| {
        one.as_object_mut().expect("an object").extend(other.as_object().expect("an object").clone());
        one
    };
    mesh.apply(&[http(&json!([
        {"matches": [animal("whale")], "backendRefs": backends("echo-v1")},
        {"matches": [animal("dolphin")], "backendRefs": backends("echo-v2")},
        {"matches": [and(prefix("/path1"), animal("whale"))], "backendRefs": backends("echo-v1")},
        {"matches": [and(version("one"), animal("whale"))], "backendRefs": backends("echo-v2")},
        {"matches": [and(prefix("/path3"), animal("shark")), and(and(prefix("/path4"), version("three")), animal("kraken"))], "backendRefs": backends("echo-v1")},
        {"matches": [prefix("/path5")], "backendRefs": backends("echo-v1")},
        {"matches": [version("four")], "backendRefs": backends("echo-v2")},
        {"matches": [animal("hydra")], "backendRefs": backends("echo-v2")},
    ]))])
    .await;
    for (path, headers, expected) in [
        ("/?animal=whale", "", "echo-v1"),
        ("/?animal=dolphin", "", "echo-v2"),
        ("/?animal=whale&otherparam=irrelevant", "", "echo-v1"),
        ("/?animal=dolphin&color=yellow", "", "echo-v2"),
        ("/?color=blue", "", "404"),
        ("/?animal=dog", "", "404"),
        ("/?animal=whaledolphin", "", "404"),
        ("/", "", "404"),
        ("/path1?animal=whale", "", "echo-v1"),
        ("/?animal=whale", "version: one\r\n", "echo-v2"),
        ("/path3?animal=shark", "", "echo-v1"),
        ("/path4?animal=kraken", "version: three\r\n", "echo-v1"),
        ("/?animal=shark", "", "404"),
        ("/path4?animal=kraken", "", "404"),
        ("/path5?animal=hydra", "", "echo-v1"),
        ("/?animal=hydra", "version: four\r\n", "echo-v2"),
    ] {
        assert_eq!(mesh.backend(vip(1, 80), path, headers).await, expected, "{path} {headers}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_redirected() {
    let mesh = Mesh::start().await;
    let full = |path: &str| json!({"type": "ReplaceFullPath", "replaceFullPath": path});
    let replaced = |path: &str| json!({"type": "ReplacePrefixMatch", "replacePrefixMatch": path});
    // What is matched, the redirect, what is asked, and where to.
    let mut rows: Vec<(&str, Value, &str, u16, String)> = vec![
        (
            "/original-prefix",
            json!({"path": replaced("/replacement-prefix")}),
            "/original-prefix/lemon",
            302,
            "http://echo/replacement-prefix/lemon".into(),
        ),
        ("/full", json!({"path": full("/full-path-replacement")}), "/full/path/original", 302, "http://echo/full-path-replacement".into()),
        (
            "/path-and-host",
            json!({"hostname": "example.org", "path": replaced("/replacement-prefix")}),
            "/path-and-host",
            302,
            "http://example.org/replacement-prefix".into(),
        ),
        (
            "/full-path-and-host",
            json!({"hostname": "example.org", "path": full("/replacement-full")}),
            "/full-path-and-host",
            302,
            "http://example.org/replacement-full".into(),
        ),
        ("/port", json!({"port": 8083}), "/port", 302, "http://echo:8083/port".into()),
        (
            "/port-and-host",
            json!({"hostname": "example.org", "port": 8083}),
            "/port-and-host",
            302,
            "http://example.org:8083/port-and-host".into(),
        ),
        ("/scheme", json!({"scheme": "https"}), "/scheme", 302, "https://echo/scheme".into()),
        (
            "/scheme-and-host",
            json!({"hostname": "example.org", "scheme": "https"}),
            "/scheme-and-host",
            302,
            "https://example.org/scheme-and-host".into(),
        ),
        ("/port-and-scheme", json!({"scheme": "https", "port": 443}), "/port-and-scheme", 302, "https://echo/port-and-scheme".into()),
        (
            "/other-port-and-scheme",
            json!({"scheme": "https", "port": 80}),
            "/other-port-and-scheme",
            302,
            "https://echo:80/other-port-and-scheme".into(),
        ),
        ("/strip", json!({"path": replaced("/")}), "/strip/a?b=c", 302, "http://echo/a?b=c".into()),
    ];
    for status in [301, 302, 303, 307, 308] {
        for (at, redirect) in [
            ("/host-and-status", json!({"hostname": "example.org"})),
            ("/path-and-status", json!({"hostname": "example.org", "path": full("/new")})),
        ] {
            let mut redirect = redirect;
            redirect["statusCode"] = json!(status);
            let path: &'static str = Box::leak(format!("{at}-{status}").into_boxed_str());
            let to = if at.starts_with("/host") { format!("http://example.org{path}") } else { "http://example.org/new".into() };
            rows.push((path, redirect, path, status, to));
        }
    }
    let rule = |row: &(&str, Value, &str, u16, String)| json!({"matches": [prefix(row.0)], "filters": [{"type": "RequestRedirect", "requestRedirect": row.1}]});
    // No more than sixteen rules of one route.
    for rows in rows.chunks(16) {
        mesh.apply(&[http(&rows.iter().map(rule).collect::<Vec<_>>().into())]).await;
        for (_, redirect, path, status, location) in rows {
            let got = mesh.get(vip(1, 80), path, "").await;
            assert_eq!((&*got.status, got.header("location")), (&*status.to_string(), Some(&**location)), "{path} {redirect}");
        }
    }
}

/// A request's line and headers, with those it is asked about, as they reached the application.
async fn arrived(mesh: &Mesh, path: &str, headers: &str, names: &[&str]) -> (String, BTreeMap<String, String>) {
    let id = format!("{path} {headers}").replace("\r\n", " ");
    let got = mesh.get(vip(1, 80), path, &format!("x-id: {id}\r\n{headers}")).await;
    assert_eq!(got.status, "200", "{path}");
    let attempts = mesh.seen.iter().flat_map(|seen| seen.of(id.trim())).collect::<Vec<_>>();
    let attempt = attempts.first().expect("a request");
    let of = |name: &str| {
        let values = attempt.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str()).collect::<Vec<_>>();
        (!values.is_empty()).then(|| (name.to_owned(), values.join(",")))
    };
    (attempt.line.split(' ').nth(1).unwrap_or_default().to_owned(), names.iter().filter_map(|name| of(name)).collect())
}

fn modifier(set: &[(&str, &str)], add: &[(&str, &str)], remove: &[&str]) -> Value {
    let all = |fields: &[(&str, &str)]| fields.iter().map(|(name, value)| json!({"name": name, "value": value})).collect::<Vec<_>>();
    json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": all(set), "add": all(add), "remove": remove}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn request_headers_are_modified() {
    let mesh = Mesh::start().await;
    let rules = [
        ("/set", modifier(&[("X-Header-Set", "set-overwrites-values")], &[], &[])),
        ("/add", modifier(&[], &[("X-Header-Add", "add-appends-values")], &[])),
        ("/remove", modifier(&[], &[], &["X-Header-Remove"])),
        (
            "/multiple",
            modifier(
                &[("X-Header-Set-1", "header-set-1"), ("X-Header-Set-2", "header-set-2")],
                &[("X-Header-Add-1", "header-add-1"), ("X-Header-Add-2", "header-add-2"), ("X-Header-Add-3", "header-add-3")],
                &["X-Header-Remove-1", "X-Header-Remove-2"],
            ),
        ),
        ("/case-insensitivity", modifier(&[("X-Header-Set", "header-set")], &[("X-Header-Add", "header-add")], &["X-Header-Remove"])),
    ];
    let of_rules =
        rules.iter().map(|(path, filter)| json!({"matches": [prefix(path)], "filters": [filter], "backendRefs": backends("echo-v1")}));
    let of_backends = rules
        .iter()
        .map(|(path, filter)| json!({"matches": [prefix(path)], "backendRefs": [{"name": "echo-v1", "port": 8080, "filters": [filter]}]}));
    type Row = (&'static str, &'static str, &'static [(&'static str, &'static str)]);
    const ROWS: &[Row] = &[
        ("/set", "Some-Other-Header: val\r\n", &[("some-other-header", "val"), ("x-header-set", "set-overwrites-values")]),
        (
            "/set",
            "Some-Other-Header: val\r\nX-Header-Set: some-other-value\r\n",
            &[("some-other-header", "val"), ("x-header-set", "set-overwrites-values")],
        ),
        ("/add", "Some-Other-Header: val\r\n", &[("some-other-header", "val"), ("x-header-add", "add-appends-values")]),
        ("/add", "X-Header-Add: some-other-value\r\n", &[("x-header-add", "some-other-value,add-appends-values")]),
        ("/remove", "X-Header-Remove: val\r\n", &[]),
        (
            "/multiple",
            "X-Header-Set-2: set-val-2\r\nX-Header-Add-2: add-val-2\r\nX-Header-Remove-2: remove-val-2\r\nAnother-Header: another-header-val\r\n",
            &[
                ("another-header", "another-header-val"),
                ("x-header-add-1", "header-add-1"),
                ("x-header-add-2", "add-val-2,header-add-2"),
                ("x-header-add-3", "header-add-3"),
                ("x-header-set-1", "header-set-1"),
                ("x-header-set-2", "header-set-2"),
            ],
        ),
        (
            "/case-insensitivity",
            "x-header-set: original-val-set\r\nx-header-add: original-val-add\r\nx-header-remove: original-val-remove\r\n",
            &[("x-header-add", "original-val-add,header-add"), ("x-header-set", "header-set")],
        ),
    ];
    const NAMES: [&str; 13] = [
        "some-other-header",
        "another-header",
        "x-header-set",
        "x-header-add",
        "x-header-remove",
        "x-header-set-1",
        "x-header-set-2",
        "x-header-add-1",
        "x-header-add-2",
        "x-header-add-3",
        "x-header-remove-1",
        "x-header-remove-2",
        "x-header-set-3",
    ];
    for rules in [of_rules.collect::<Vec<_>>(), of_backends.collect()] {
        mesh.apply(&[http(&rules.into())]).await;
        for (path, headers, expected) in ROWS {
            let (_, got) = arrived(&mesh, path, headers, &NAMES).await;
            let expected = expected.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>();
            assert_eq!(got, expected, "{path} {headers}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_are_rewritten() {
    let mesh = Mesh::start().await;
    let rewrite = |path: Value| json!({"type": "URLRewrite", "urlRewrite": {"path": path}});
    let full = |path: &str| rewrite(json!({"type": "ReplaceFullPath", "replaceFullPath": path}));
    let replaced = |path: &str| rewrite(json!({"type": "ReplacePrefixMatch", "replacePrefixMatch": path}));
    let headers = modifier(
        &[("X-Header-Set", "set-overwrites-values")],
        &[("X-Header-Add", "header-val-1"), ("X-Header-Add-Append", "header-val-2")],
        &["X-Header-Remove"],
    );
    let rule = |path: &str, filters: Value| json!({"matches": [prefix(path)], "filters": filters, "backendRefs": backends("echo-v1")});
    mesh.apply(&[http(&json!([
        rule("/prefix/one", json!([replaced("/one")])),
        rule("/strip-prefix", json!([replaced("/")])),
        rule("/full/one", json!([full("/one")])),
        rule("/full/rewrite-path-and-modify-headers", json!([full("/test"), headers])),
        rule("/prefix/rewrite-path-and-modify-headers", json!([replaced("/prefix"), headers])),
    ]))])
    .await;
    let names = ["x-header-add", "x-header-add-append", "x-header-set", "x-header-remove"];
    for (path, expected) in [
        ("/prefix/one/two", "/one/two"),
        ("/prefix/one/two?a=b", "/one/two?a=b"),
        ("/strip-prefix/three", "/three"),
        ("/strip-prefix", "/"),
        ("/strip-prefix/", "/"),
        ("/full/one/two", "/one"),
    ] {
        assert_eq!(arrived(&mesh, path, "", &names).await, (expected.to_owned(), BTreeMap::new()), "{path}");
    }
    let sent = "X-Header-Remove: remove-val\r\nX-Header-Add-Append: append-val-1\r\nX-Header-Set: set-val\r\n";
    for (path, expected) in
        [("/full/rewrite-path-and-modify-headers/test", "/test"), ("/prefix/rewrite-path-and-modify-headers/one", "/prefix/one")]
    {
        let (line, got) = arrived(&mesh, path, sent, &names).await;
        let got = got.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect::<Vec<_>>();
        let modified = [
            ("x-header-add", "header-val-1"),
            ("x-header-add-append", "append-val-1,header-val-2"),
            ("x-header-set", "set-overwrites-values"),
        ];
        assert_eq!((line.as_str(), &got[..]), (expected, &modified[..]), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_belong_to_services_and_ports() {
    let mesh = Mesh::start().await;
    let sets = |value: &str| json!([{"filters": [{"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "X-Header-Set", "value": value}]}}]}]);
    let with = |mut rules: Value, to: &str| {
        rules[0]["backendRefs"] = backends(to);
        rules
    };
    let named = |mut route: Value, name: &str| {
        route["metadata"]["name"] = json!(name);
        route
    };
    let of = |name: &str, port, value: &str| named(route("HTTPRoute", &parent(name, port), &with(sets(value), name)), name);
    mesh.apply(&[of("echo-v1", Some(80), "v1"), of("echo-v2", None, "v2")]).await;
    for (to, expected, backend) in [
        (vip(2, 80), Some("v1"), "echo-v1"),
        (vip(2, 8080), None, "echo-v1"),
        (vip(3, 80), Some("v2"), "echo-v2"),
        (vip(3, 8080), Some("v2"), "echo-v2"),
        (vip(1, 80), None, ""),
    ] {
        let got = mesh.get(to, "/", "").await;
        assert_eq!((&*got.status, got.header("x-header-set")), ("200", expected), "{to}");
        assert!(got.body.starts_with(backend), "{to}: {}", got.body);
    }
    // It is the address that was dialled that counts, and not what the host says.
    for (host, to, expected, backend) in [("echo-v1", vip(3, 80), Some("v2"), "echo-v2"), ("echo-v2", vip(2, 8080), None, "echo-v1")] {
        let got = mesh.get(to, "/", &format!("Host: {host}\r\n")).await;
        assert_eq!(got.header("x-header-set"), expected, "{host}");
        assert!(got.body.starts_with(backend), "{host}: {}", got.body);
    }
    // Several routes of one service: each request goes by the first whose rule matches best.
    let split = json!([{"backendRefs": [{"name": "echo-v1", "port": 8080, "weight": 70}, {"name": "echo-v2", "port": 8080, "weight": 30}, {"name": "echo", "port": 8080, "weight": 0}]}]);
    mesh.apply(&[http(&split)]).await;
    let mut counted = BTreeMap::<String, u32>::new();
    for _ in 0..500 {
        *counted.entry(mesh.backend(vip(1, 80), "/", "").await).or_default() += 1;
    }
    let share = f64::from(counted.get("echo-v1").copied().unwrap_or_default()) / 500.0;
    // Five times the standard deviation.
    assert!((share - 0.7).abs() < 0.11 && counted.len() == 2, "{counted:?}");
    let zero = json!([{"backendRefs": [{"name": "echo-v1", "port": 8080, "weight": 0}, {"name": "echo-v2", "port": 8080, "weight": 0}]}]);
    mesh.apply(&[http(&zero)]).await;
    assert_eq!(mesh.backend(vip(1, 80), "/", "").await, "500");
    // A call of gRPC is told so in its own words.
    let call = mesh.get(vip(1, 80), "/", "content-type: application/grpc\r\n").await;
    assert_eq!((&*call.status, call.header("grpc-status")), ("200", Some("14")), "UNAVAILABLE");
    let rules = json!([
        {"name": "named-rule", "matches": [prefix("/named")], "backendRefs": backends("echo-v1")},
        {"matches": [prefix("/unnamed")], "backendRefs": backends("echo-v2")},
    ]);
    mesh.apply(&[http(&rules)]).await;
    assert_eq!(
        (mesh.backend(vip(1, 80), "/named", "").await, mesh.backend(vip(1, 80), "/unnamed", "").await),
        ("echo-v1".into(), "echo-v2".into())
    );
}
