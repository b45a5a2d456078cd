//! Authorizers outside the mesh's own policies: `CUSTOM` over HTTP and gRPC.

use std::{net::SocketAddr, time::Duration};

use mesh_tests::{
    engine::{Engine, NEAR_CLIENT, security, server_pod, service},
    scripted::{self, Seen},
    token::Issuer,
    wire::exchange,
};
use serde_json::{Value, json};

use super::{
    ISSUER, VIP, ask, claims, get, served,
    servers::{authorizer, grpc_authorizer},
};

pub fn mesh_config(mesh: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorizer_over_http_decides() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let authz = authorizer();
    let provider = |name: &str, more: Value| {
        let mut http = json!({"service": "authz.default.svc.cluster.local", "port": 80, "timeout": "500ms",
            "includeRequestHeadersInCheck": ["x-*"], "headersToUpstreamOnAllow": ["x-user", "x-line", "x-body", "authorization"],
            "headersToDownstreamOnAllow": ["set-cookie"], "headersToDownstreamOnDeny": ["x-why"], "pathPrefix": "/check"});
        http.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        json!({"name": name, "envoyExtAuthzHttp": http})
    };
    let mesh = mesh_config(
        &json!({"extensionProviders": [provider("closed", json!({"statusOnError": "503"})), provider("open", json!({"failOpen": true})), {"name": "log", "envoyFileAccessLog": {}}]}),
    );
    let custom = |provider: &str| {
        security(
            "AuthorizationPolicy",
            "custom",
            &json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": provider}, "rules": [{"to": [{"operation": {"notPaths": ["/free*"]}}]}]}),
        )
    };
    let documents = |provider: &str, more: &[Value]| {
        let mut all = served(upstream, &[mesh.clone(), custom(provider)]);
        all.extend(service("authz", "10.99.0.3", "http", &[authz]));
        all.extend(more.iter().cloned());
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &documents("closed", &[])).await.expect("started");
    for way in ["outside", "node"] {
        let got = ask(
            &engine,
            way,
            upstream,
            &get("/a?b=1", &format!("pass-{way}"), "x-pass: 1\r\nx-user: mallory\r\nx-envoy-auth-partial-body: true\r\n"),
        )
        .await;
        assert_eq!((got.status.as_str(), got.header("set-cookie")), ("200", Some("a=1")), "{way}: {got:?}");
        let attempts = seen.of(&format!("pass-{way}"));
        let header = |name: &str| attempts[0].headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect::<Vec<_>>();
        assert_eq!((header("x-user"), header("x-line")), (vec!["alice"], vec!["GET /check/a?b=1 HTTP/1.1"]), "{way}");
        assert_eq!(header("x-body"), ["none"], "{way}: what it is shown of a body is not the client's to say");
        let got = ask(&engine, way, upstream, &get("/a", &format!("deny-{way}"), "x-request-id: deny\r\n")).await;
        assert_eq!(
            (got.status.as_str(), got.body.as_str(), got.header("location"), got.header("x-why"), got.header("x-hidden")),
            ("302", "no!\n", Some("/login"), Some("none"), None),
            "{way}"
        );
        assert!(seen.of(&format!("deny-{way}")).is_empty());
        let lines = engine.logged_for("deny", 1).await;
        assert!(lines.iter().any(|l| l["response_code_details"] == "ext_authz_denied" && l["response_flags"] == "UAEX"), "{lines:?}");
        for (name, header) in [("fail", "x-fail: 1\r\n"), ("stall", "x-stall: 1\r\n")] {
            let got = ask(&engine, way, upstream, &get("/a", &format!("{name}-{way}"), header)).await;
            assert_eq!(got.status, "503", "{way} {name}: {got:?}");
        }
        let got = ask(&engine, way, upstream, &get("/free/x", &format!("free-{way}"), "")).await;
        assert_eq!(got.status, "200", "{way}: not asked");
    }
    engine.apply(&documents("open", &[])).await.expect("applied");
    let got = ask(&engine, "node", upstream, &get("/a", "open", "x-fail: 1\r\n")).await;
    assert_eq!(got.status, "200", "fail mode open");
    engine.apply(&documents("nobody", &[])).await.expect("applied");
    let got = ask(&engine, "node", upstream, &get("/a", "nobody", "x-pass: 1\r\n")).await;
    assert_eq!(got.status, "403", "a provider there is not");
    // A token an authorizer puts in is verified like any.
    let issuer = Issuer::default();
    let more = [
        security(
            "RequestAuthentication",
            "jwt",
            &json!({"selector": {"matchLabels": {"app": "server"}}, "jwtRules": [{"issuer": ISSUER, "jwks": issuer.jwks()}]}),
        ),
        security(
            "AuthorizationPolicy",
            "users",
            &json!({"selector": {"matchLabels": {"app": "server"}}, "rules": [{"from": [{"source": {"requestPrincipals": [format!("{ISSUER}/alice")]}}]}]}),
        ),
    ];
    engine.apply(&documents("closed", &more)).await.expect("applied");
    for (n, (token, expected)) in [(issuer.token(&claims(&json!({}))), "200"), ("abc".to_owned(), "401")].into_iter().enumerate() {
        let got = ask(&engine, "node", upstream, &get("/a", &format!("token-{n}"), &format!("x-pass: 1\r\nx-token: {token}\r\n"))).await;
        assert_eq!(got.status, expected, "{token}: {got:?}");
    }
}

/// Its question belongs to the trace of the request, and so does what the application does for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorizer_is_told_the_trace() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let mesh = mesh_config(&json!({"extensionProviders": [
        {"name": "h", "envoyExtAuthzHttp": {"service": "authz.default.svc.cluster.local", "port": 80, "headersToUpstreamOnAllow": ["x-trace"], "includeRequestHeadersInCheck": ["x-pass"]}},
        {"name": "otel", "opentelemetry": {"service": "nobody.default.svc.cluster.local", "port": 4317}}]}));
    let custom = json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": "h"}, "rules": [{}]});
    let telemetry = json!({"apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": {"name": "all", "namespace": "istio-system"},
        "spec": {"tracing": [{"providers": [{"name": "otel"}], "randomSamplingPercentage": 100}]}});
    let mut documents = served(upstream, &[mesh, security("AuthorizationPolicy", "custom", &custom), telemetry]);
    documents.extend(service("authz", "10.99.0.3", "http", &[authorizer()]));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    for way in ["outside", "node"] {
        let headers = format!("x-pass: 1\r\ntraceparent: 00-{trace}-00f067aa0ba902b7-01\r\n");
        let got = ask(&engine, way, upstream, &get("/a", &format!("trace-{way}"), &headers)).await;
        assert_eq!(got.status, "200", "{way}: {got:?}");
        let attempts = seen.of(&format!("trace-{way}"));
        let header = |name: &str| attempts[0].headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone()).unwrap_or_default();
        let (asked, went_on) = (header("x-trace"), header("traceparent"));
        for told in [&asked, &went_on] {
            assert!(told.starts_with(&format!("00-{trace}-")) && told.ends_with("-01"), "{way}: {asked} {went_on}");
            assert!(!told.contains("00f067aa0ba902b7"), "{way}: of a span of its own: {told}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorizer_over_grpc_decides() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let authz = grpc_authorizer().await;
    let mesh = mesh_config(
        &json!({"extensionProviders": [{"name": "g", "envoyExtAuthzGrpc": {"service": "authz.default.svc.cluster.local", "port": 80, "timeout": "2s"}}]}),
    );
    let custom = security(
        "AuthorizationPolicy",
        "custom",
        &json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": "g"}, "rules": [{}]}),
    );
    let mut documents = served(upstream, &[mesh, custom]);
    documents.extend(service("authz", "10.99.0.3", "grpc", &[authz]));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    for (way, who) in [("outside", ""), ("node", "spiffe://cluster.local/ns/default/sa/client")] {
        let got = ask(&engine, way, upstream, &get("/a", &format!("ok-{way}"), "x-gone: 1\r\n")).await;
        assert_eq!(got.status, "200", "{way}: {got:?}");
        let attempts = seen.of(&format!("ok-{way}"));
        let header = |name: &str| attempts[0].headers.iter().find(|(n, _)| n == name).map_or("(none)", |(_, v)| v.as_str());
        assert_eq!(
            (header("x-who"), header("x-path"), header("x-gone"), header("content-length")),
            (who, "/a", "(none)", "(none)"),
            "{way}"
        );
        let post = |more: &str| format!("POST /a HTTP/1.1\r\nhost: a\r\n{more}content-length: 0\r\n\r\n");
        for (request, status) in [(post("x-teapot: 1\r\n"), "418"), (post(""), "403")] {
            let got = ask(&engine, way, upstream, &request).await;
            assert_eq!((got.status.as_str(), got.body.as_str()), (status, "no"), "{way}");
        }
    }
}

/// Where nobody of the provider's name is configured, what it would be asked about is denied as Istio denies it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_is_not_there_denies() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let rules = json!([{"to": [{"operation": {"paths": ["/a"]}}]}]);
    let custom =
        json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": "nobody"}, "rules": rules});
    let documents = served(upstream, &[security("AuthorizationPolicy", "custom", &custom)]);
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    for way in ["outside", "node"] {
        for (path, status, body) in [("/a", "403", "RBAC: access denied"), ("/free", "200", "up1 200 #1\n")] {
            let got = ask(&engine, way, upstream, &get(path, way, "")).await;
            assert_eq!((got.status.as_str(), got.body.as_str()), (status, body), "{way} {path}: {got:?}");
        }
    }
}

/// What CUSTOM makes of connections that carry no requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorizer_is_asked_about_opaque_connections() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let authz = grpc_authorizer().await;
    let provider = |name: &str, kind: &str, open: bool| json!({"name": name, kind: {"service": "authz.default.svc.cluster.local", "port": 80, "timeout": "2s", "failOpen": open}});
    let documents = |asks: &str, open: bool, authorizer: bool| {
        let providers = ["g", "other"].map(|name| provider(name, "envoyExtAuthzGrpc", open));
        let mesh = mesh_config(&json!({"extensionProviders": [providers[0], providers[1], provider("h", "envoyExtAuthzHttp", open)]}));
        let custom = security(
            "AuthorizationPolicy",
            "custom",
            &json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": asks}, "rules": [{"to": [{"operation": {"ports": [upstream.port().to_string()]}}]}]}),
        );
        let mut all = vec![server_pod(), mesh, custom];
        all.extend(service("server", "10.99.0.1", "tcp", &[upstream]));
        if authorizer {
            all.extend(service("authz", "10.99.0.3", "grpc", &[authz]));
        }
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &documents("g", false, true)).await.expect("started");
    let passes = async |way: &str| ask(&engine, way, upstream, &get("/a", "x", "")).await.status == "200";
    assert!(passes("node").await && !passes("outside").await, "it knows whom it lets in");
    // What it let pass goes on as long as nobody else has to be asked.
    let mut open = engine.connect(VIP.parse().expect("an address")).await.expect("connected");
    assert_eq!(exchange(&mut open, get("/a", "kept", "").into_bytes(), false).await.status, "200");
    engine.apply(&documents("g", false, true)).await.expect("applied");
    assert_eq!(exchange(&mut open, get("/a", "kept", "").into_bytes(), false).await.status, "200");
    // Nor the same, set otherwise.
    for (asks, fails_open) in [("other", false), ("other", true)] {
        engine.apply(&documents(asks, fails_open, true)).await.expect("applied");
        let end = tokio::time::timeout(Duration::from_secs(2), tokio::io::AsyncReadExt::read(&mut open, &mut [0; 1])).await;
        assert!(!matches!(end, Err(_) | Ok(Ok(1..))), "it is cut: {end:?}");
        open = engine.connect(VIP.parse().expect("an address")).await.expect("connected");
        assert_eq!(exchange(&mut open, get("/a", "kept", "").into_bytes(), false).await.status, "200");
    }
    // That there is no such service is a mistake, and not what failing open is about.
    for (asks, open, authorizer, pass) in
        [("g", false, false, false), ("g", true, false, false), ("h", true, true, false), ("none", true, true, false)]
    {
        engine.apply(&documents(asks, open, authorizer)).await.expect("applied");
        for way in ["node", "outside"] {
            assert_eq!(passes(way).await, pass, "{way}: {asks}, fails open: {open}, there: {authorizer}");
        }
    }
    let counted = engine.proxy.metrics.render(mesh_node::telemetry::Exposition::OpenMetrics).expect("text");
    for result in ["allowed", "denied", "unknown", "unsupported"] {
        assert!(counted.contains(&format!("mesh_authorizer_calls_total{{result=\"{result}\"}}")), "{result}: {counted}");
    }
}

/// What it is shown of bodies, and that all of them goes on all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorizer_is_shown_bodies() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let seen_2 = Seen::default();
    let upstream_2 = scripted::http2("up2", &seen_2).await.expect("an upstream");
    let (over_http, over_grpc) = (authorizer(), grpc_authorizer().await);
    let documents = |kind: &str, partial: bool| {
        let mut provider = json!({"service": "authz.default.svc.cluster.local", "port": 80, "timeout": "2s",
            "includeRequestBodyInCheck": {"maxRequestBytes": 10, "allowPartialMessage": partial}});
        let http = kind == "envoyExtAuthzHttp";
        if http {
            provider["headersToUpstreamOnAllow"] = json!(["x-body"]);
        }
        let mesh = mesh_config(&json!({"extensionProviders": [{"name": "a", kind: provider}]}));
        let custom = json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": "a"}, "rules": [{}]});
        let mut all = served(upstream, &[mesh, security("AuthorizationPolicy", "custom", &custom)]);
        let (protocol, at) = if http { ("http", over_http) } else { ("grpc", over_grpc) };
        all.extend(service("authz", "10.99.0.3", protocol, &[at]));
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &documents("envoyExtAuthzHttp", false)).await.expect("started");
    for kind in ["envoyExtAuthzHttp", "envoyExtAuthzGrpc"] {
        let refused = if kind == "envoyExtAuthzHttp" { "302" } else { "403" };
        for partial in [false, true] {
            engine.apply(&documents(kind, partial)).await.expect("applied");
            let long = if partial { ("200", "pass-56789 true") } else { ("413", "") };
            let rows = [
                ("pass", ("200", "pass false")),
                ("pass-56789", ("200", "pass-56789 false")),
                ("stop", (refused, "")),
                ("pass-56789-longer", long),
            ];
            for (n, (body, (status, shown))) in rows.into_iter().enumerate() {
                for way in ["outside", "node", "HTTP/2"] {
                    let id = format!("{kind}-{partial}-{n}-{way}");
                    let (got, of) = if way == "HTTP/2" {
                        let (status, received) = ask_h2(&engine, upstream_2, &id, body).await;
                        assert!(status != "200" || received == Some(body.len()), "{id}: {received:?}");
                        (status, seen_2.of(&id))
                    } else {
                        let length = body.len();
                        let request = format!(
                            "POST /x HTTP/1.1\r\nhost: a\r\nx-id: {id}\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n{body}"
                        );
                        (ask(&engine, way, upstream, &request).await.status, seen.of(&id))
                    };
                    assert_eq!(got, status, "{id}");
                    if status == "200" {
                        let header = |name: &str| of[0].headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
                        assert_eq!(header("x-body"), Some(shown), "{id}: {of:?}");
                        assert!(way == "HTTP/2" || of[0].body == body.len(), "{id}: {of:?}");
                        let protocol = if way == "HTTP/2" { "HTTP/2" } else { "HTTP/1.1" };
                        assert!(kind == "envoyExtAuthzHttp" || header("x-protocol") == Some(protocol), "{id}: {of:?}");
                    } else {
                        assert!(of.is_empty(), "{id}");
                    }
                }
            }
        }
    }
}

/// The status of a request over HTTP/2 from outside the mesh, and how much of its body reached the application.
async fn ask_h2(engine: &Engine, upstream: SocketAddr, id: &str, body: &'static str) -> (String, Option<usize>) {
    let stream = engine.connect_inbound(upstream.port()).await.expect("connected");
    let (mut send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = http::Request::post("http://svc.example/x").header("x-id", id).body(()).expect("a request");
    let (response, mut stream) = send.send_request(request, false).expect("sent");
    // In two pieces.
    let (first, second) = body.split_at(2);
    stream.send_data(bytes::Bytes::from_static(first.as_bytes()), false).expect("sent");
    tokio::time::sleep(Duration::from_millis(5)).await;
    stream.send_data(bytes::Bytes::from_static(second.as_bytes()), true).expect("sent");
    let answer = response.await.expect("an answer");
    let received = answer.headers().get("x-received").and_then(|n| n.to_str().ok()?.parse().ok());
    (answer.status().as_str().to_owned(), received)
}

/// One that has decided by the head, and does not read what it is shown, has decided all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorizer_may_answer_before_it_has_read_the_body() {
    use std::io::{BufRead, BufReader, Write};
    const BODY: usize = 8 * 1024 * 1024;
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let listener = std::net::TcpListener::bind("127.0.0.5:0").expect("bound");
    let hasty = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        let mut open = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).is_ok_and(|n| n > 0) {}
            let status = if head.to_lowercase().contains("x-pass:") { "200 OK" } else { "403 No" };
            stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 3\r\n\r\nno!").as_bytes()).expect("answered");
            open.push(reader);
        }
    });
    let mesh = mesh_config(&json!({"extensionProviders": [{"name": "a", "envoyExtAuthzHttp": {
        "service": "authz.default.svc.cluster.local", "port": 80, "timeout": "2s", "failOpen": true,
        "includeRequestHeadersInCheck": ["x-pass"], "includeRequestBodyInCheck": {"maxRequestBytes": BODY}}}]}));
    let custom = json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": "a"}, "rules": [{}]});
    let mut documents = served(upstream, &[mesh, security("AuthorizationPolicy", "custom", &custom)]);
    documents.extend(service("authz", "10.99.0.3", "http", &[hasty]));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let body = "b".repeat(BODY);
    for way in ["outside", "node"] {
        for (pass, status) in [("x-pass: 1\r\n", "200"), ("", "403")] {
            let id = format!("{way}-{status}");
            let request = format!("POST /x HTTP/1.1\r\nhost: a\r\nx-id: {id}\r\n{pass}content-length: {BODY}\r\n\r\n{body}");
            let got = ask(&engine, way, upstream, &request).await;
            assert_eq!(got.status, status, "{id}");
            let received: Vec<usize> = seen.of(&id).iter().map(|attempt| attempt.body).collect();
            assert_eq!(received, vec![BODY; usize::from(status == "200")], "{id}");
        }
    }
}

/// Who is an authorizer is itself asked about by others, unless they could not be asked without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authorizers_are_asked_about_by_others() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let authz = authorizer();
    let provider = |name: &str, service: &str| json!({"name": name, "envoyExtAuthzHttp": {"service": format!("{service}.default.svc.cluster.local"), "port": 80, "timeout": "2s", "includeRequestHeadersInCheck": ["x-pass"]}});
    let mesh = mesh_config(&json!({"extensionProviders": [provider("a", "authz"), provider("b", "server")]}));
    let custom = |name: &str, provider: &str, app: &str| {
        let spec = json!({"selector": {"matchLabels": {"app": app}}, "action": "CUSTOM", "provider": {"name": provider}, "rules": [{}]});
        security("AuthorizationPolicy", name, &spec)
    };
    let mut elsewhere = custom("two", "b", "authz");
    elsewhere["spec"]["rules"] = json!([{"to": [{"operation": {"ports": ["1"]}}]}]);
    let documents = |mode: &str, policies: &[Value]| {
        let labels = json!({"app": "authz", "istio.io/dataplane-mode": mode});
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "authz", "uid": "uid-authz", "labels": labels},
            "spec": {"nodeName": "n2", "serviceAccountName": "authz"}, "status": {"phase": "Running", "podIP": "127.0.0.5"}});
        let mut all = served(upstream, &[mesh.clone(), pod]);
        all.extend(service("authz", "10.99.0.3", "http", &[authz]));
        all.extend(policies.iter().cloned());
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &documents("none", &[])).await.expect("started");
    // The authorizer is in no mesh of this test's: where it has to be, there is no way to it.
    let (asked, exempt, away) = (["302", "200"], ["200"; 2], ["403"; 2]);
    for (name, mode, policies, statuses) in [
        ("by another", "none", vec![custom("one", "a", "server")], asked),
        ("by itself", "none", vec![custom("one", "b", "server")], exempt),
        ("by one that has to ask it", "ambient", vec![custom("one", "a", "server"), custom("two", "b", "authz")], exempt),
        ("by one that has to ask about another port of its", "ambient", vec![custom("one", "a", "server"), elsewhere], away),
        ("by one that would have to", "none", vec![custom("one", "a", "server"), custom("two", "b", "authz")], asked),
        ("by one that has to ask itself", "none", vec![custom("one", "a", "server"), custom("two", "a", "authz")], asked),
    ] {
        engine.apply(&documents(mode, &policies)).await.expect("applied");
        for way in ["outside", "node"] {
            for (header, status) in ["", "x-pass: 1\r\n"].into_iter().zip(statuses) {
                let got = ask(&engine, way, upstream, &get("/a", &format!("{name}-{way}"), header)).await;
                assert_eq!(got.status, status, "{name} {way} {header}: {got:?}");
            }
        }
    }
}
