//! Tokens and authorization of requests, as a real Envoy was recorded to answer (`jwt` and `rbac` of the corpus), for the
//! three ways into a pod that one process can show: HTTP/1 and HTTP/2 from outside the mesh, and from a pod of the node.

use std::{net::SocketAddr, time::Duration};

use mesh_tests::{
    engine::{Engine, NEAR_CLIENT, security, server_pod, service, virtual_service, wait_until},
    scripted::{self, Seen},
    token::{self, Issuer, now},
    wire::{Got, exchange},
};
use serde_json::{Value, json};

#[path = "security/authorizers.rs"]
mod authorizers;
#[path = "security/declared.rs"]
mod declared;
#[path = "security/recorded.rs"]
mod recorded;
#[path = "security/routed.rs"]
mod routed;
#[path = "security/servers.rs"]
mod servers;
#[path = "security/targeted.rs"]
mod targeted;
#[path = "security/told.rs"]
mod told;

use authorizers::mesh_config;
use servers::grpc_authorizer;

const VIP: &str = "10.99.0.1:80";
const ISSUER: &str = "https://issuer.example";

fn claims(more: &Value) -> Value {
    token::changed(json!({"iss": ISSUER, "sub": "alice", "aud": "svc-a", "exp": now() + 600, "iat": now()}), more)
}
/// A policy change while requests and connections are under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_under_way_ends_when_it_is_denied() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let allow = security("AuthorizationPolicy", "p", &json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}));
    let base = |policy: &Value| {
        let mut all = vec![server_pod(), policy.clone()];
        all.extend(service("server", "10.99.0.1", "http", &[upstream]));
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &base(&allow)).await.expect("started");
    let deny = security("AuthorizationPolicy", "p", &json!({"rules": [{"to": [{"operation": {"methods": ["POST"]}}]}]}));
    for way in ["outside", "node"] {
        engine.apply(&base(&allow)).await.expect("applied");
        let mut stream = match way {
            "outside" => engine.connect_inbound(upstream.port()).await,
            _ => engine.connect(VIP.parse().expect("an address")).await,
        }
        .expect("connected");
        let slow = format!("GET /slow HTTP/1.1\r\nhost: a\r\nx-id: slow-{way}\r\nx-plan: 200/3000\r\n\r\n").into_bytes();
        let waiting = tokio::spawn(async move { exchange(&mut stream, slow, false).await });
        let arrived = || !seen.of(&format!("slow-{way}")).is_empty();
        wait_until("the request has arrived", Duration::from_secs(2), arrived).await;
        engine.apply(&base(&deny)).await.expect("applied");
        let begun = std::time::Instant::now();
        let got = waiting.await.expect("joined");
        assert!(got.status != "200" && begun.elapsed() < Duration::from_secs(2), "{way}: {got:?}");
    }
}

/// Documents of the server pod behind a service for HTTP, and more.
fn served(upstream: SocketAddr, more: &[Value]) -> Vec<Value> {
    let mut all = vec![server_pod()];
    all.extend(service("server", VIP.split(':').next().expect("an address"), "http", &[upstream]));
    all.extend(more.iter().cloned());
    all
}

async fn ask(engine: &Engine, way: &str, upstream: SocketAddr, request: &str) -> Got {
    let mut stream = match way {
        "outside" => engine.connect_inbound(upstream.port()).await,
        _ => engine.connect(VIP.parse().expect("an address")).await,
    }
    .expect("connected");
    exchange(&mut stream, request.as_bytes().to_vec(), request.starts_with("HEAD")).await
}

fn get(path: &str, id: &str, more: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: svc.example\r\nx-id: {id}\r\n{more}\r\n")
}

/// Requests that could look different to the gate and to the application.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_judged_is_what_is_sent() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let public = security(
        "AuthorizationPolicy",
        "public",
        &json!({"selector": {"matchLabels": {"app": "server"}}, "rules": [{"to": [{"operation": {"paths": ["/public/*"]}}]}]}),
    );
    let route =
        json!([{"match": [{"uri": {"prefix": "/api"}}], "rewrite": {"uri": "/public/"}, "route": [{"destination": {"host": "server"}}]}]);
    let engine = Engine::start_as(NEAR_CLIENT, &served(upstream, &[public, virtual_service("server", &route)])).await.expect("started");
    let got = ask(&engine, "node", upstream, &get("/apix", "plain", "")).await;
    assert_eq!((got.status.as_str(), seen.of("plain")[0].line.as_str()), ("200", "GET /public/x HTTP/1.1"));
    // What a route makes of a path is judged as the application will read it.
    for path in ["/api../admin", "/api../../admin", "/api%2e%2e/admin", "/api..%2fadmin"] {
        let got = ask(&engine, "node", upstream, &get(path, "tricky", "")).await;
        assert!(["403", "400", "404"].contains(&got.status.as_str()) && seen.of("tricky").is_empty(), "{path}: {got:?}");
    }
    // Headers only the proxy may write cannot be brought along by looking like something else than HTTP.
    let issuer = Issuer::default();
    let jwt = security(
        "RequestAuthentication",
        "jwt",
        &json!({"selector": {"matchLabels": {"app": "server"}}, "jwtRules": [{"issuer": ISSUER, "jwks": issuer.jwks(), "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}]}]}),
    );
    let mut documents = vec![server_pod(), jwt];
    documents.extend(service("server", "10.99.0.1", "undeclared", &[upstream]));
    engine.apply(&documents).await.expect("applied");
    let forged = "x-user: admin\r\n";
    for (n, (before, after)) in [
        ("", get("/x", "forged-0", forged)),
        ("", format!("\r\n{}", get("/x", "forged-1", forged))),
        ("", format!("\n\n{}", get("/x", "forged-2", forged))),
        ("FO", get("/x", "forged-3", forged).replacen("GET", "O", 1)),
        ("PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n", get("/x", "forged-4", forged)),
        ("", get("/x", "forged-5", forged).replacen("GET", "get", 1)),
        ("", format!("\n{}", get("/x", "forged-6", forged))),
        ("", format!("\r\n\n{}", get("/x", "forged-7", forged))),
        ("\n", get("/x", "forged-8", forged)),
        ("\r", format!("\n{}", get("/x", "forged-9", forged))),
    ]
    .into_iter()
    .enumerate()
    {
        use tokio::io::AsyncWriteExt;
        let mut stream = engine.connect_inbound(upstream.port()).await.expect("connected");
        if !before.is_empty() {
            stream.write_all(before.as_bytes()).await.expect("written");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let got = exchange(&mut stream, after.into_bytes(), false).await;
        let attempts = seen.of(&format!("forged-{n}"));
        let arrived = attempts.iter().any(|a| a.headers.iter().any(|(name, _)| name == "x-user"));
        assert!(!arrived, "{n}: {got:?}");
    }
    assert_eq!(seen.of("forged-0").len(), 1, "without the forged header it is an ordinary request");
    // Less than a request line, ended by closing: some applications take even that for a request. So an authorizer that lets
    // connections pass is not asked about it as one.
    let authz = grpc_authorizer().await;
    let provider = json!({"name": "g", "envoyExtAuthzGrpc": {"service": "authz.default.svc.cluster.local", "port": 80, "timeout": "2s"}});
    let custom = security("AuthorizationPolicy", "custom", &json!({"action": "CUSTOM", "provider": {"name": "g"}, "rules": [{}]}));
    let catcher = std::sync::Arc::new(tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("bound"));
    let address = catcher.local_addr().expect("an address");
    for (port_name, bytes) in [
        ("undeclared", "GET /admin"),
        ("http", "GET /admin"),
        ("http", "GET\t/admin\r\n"),
        ("undeclared", "GET\t/admin\r\n"),
        ("tcp", "GET /"),
    ] {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut documents = vec![server_pod(), mesh_config(&json!({"extensionProviders": [provider]})), custom.clone()];
        documents.extend(service("server", "10.99.0.1", port_name, &[address]));
        documents.extend(service("authz", "10.99.0.3", "grpc", &[authz]));
        engine.apply(&documents).await.expect("applied");
        let listener = catcher.clone();
        let caught = tokio::spawn(async move {
            let mut all = Vec::new();
            let read = async {
                let (mut application, _) = listener.accept().await.expect("accepted");
                let _ = application.read_to_end(&mut all).await;
            };
            let _ = tokio::time::timeout(Duration::from_secs(1), read).await;
            all
        });
        let mut stream = engine.connect(VIP.parse().expect("an address")).await.expect("connected");
        stream.write_all(bytes.as_bytes()).await.expect("written");
        stream.shutdown().await.expect("closed");
        let expected = if port_name == "tcp" { bytes } else { "" };
        assert_eq!(String::from_utf8_lossy(&caught.await.expect("caught")), expected, "{port_name}: {bytes:?}");
    }
}

/// A policy of a Service is about the port that is dialled, which is the Service's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_of_a_service_are_those_that_are_dialled() {
    let upstream = scripted::http1("up1", &Seen::default()).expect("an upstream");
    let policy = |name: &str, action: &str, ports: &[&str]| {
        let rules = json!([{"to": [{"operation": {"ports": ports}}]}]);
        security(
            "AuthorizationPolicy",
            name,
            &json!({"targetRefs": [{"kind": "Service", "group": "", "name": "server"}], "action": action, "rules": rules}),
        )
    };
    let pods = upstream.port().to_string();
    for (what, policies, status) in [
        ("denied by the service's", vec![policy("p", "DENY", &["80"])], "403"),
        ("denied by the pod's", vec![policy("p", "DENY", &[&pods])], "403"),
        ("denied by another", vec![policy("p", "DENY", &["81"])], "200"),
        ("allowed by the service's", vec![policy("p", "ALLOW", &["80"])], "200"),
        ("allowed by another", vec![policy("p", "ALLOW", &["81"])], "403"),
    ] {
        let engine = Engine::start_as(NEAR_CLIENT, &served(upstream, &policies)).await.expect("started");
        for way in ["node", "outside"] {
            let got = ask(&engine, way, upstream, &get("/a", "x", "")).await;
            // A connection that is denied whatever is sent is reset.
            let denied = status == "403" && got.status != "200";
            assert!(got.status == status || denied, "{what}, {way}: {}", got.status);
        }
    }
}

/// What is said after another upgrade would be seen by no policy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_websockets_are_switched_to_where_requests_are_judged() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let judged =
        security("AuthorizationPolicy", "p", &json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/never"]}}]}]}));
    for (policies, protocol, asked_for) in [
        (vec![judged.clone()], "websocket", true),
        (vec![judged.clone()], "chat/2", false),
        (vec![judged.clone()], "h2c-14", false),
        (vec![judged], "websocket, chat/2", false),
        (vec![], "chat/2", true),
        // Clients ask for it that do not mean it.
        (vec![], "TLS/1.2", false),
        (vec![], "H2C;x", false),
    ] {
        let engine = Engine::start_as(NEAR_CLIENT, &served(upstream, &policies)).await.expect("started");
        for way in ["node", "outside"] {
            let id = format!("{way}-{}-{protocol}", policies.len());
            let more = format!("x-plan: 200\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n");
            assert_eq!(ask(&engine, way, upstream, &get("/a", &id, &more)).await.status, "200", "{id}");
            let headers = &seen.of(&id)[0].headers;
            // From outside nobody looks where nobody has to.
            let unread = way == "outside" && policies.is_empty();
            let found = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("upgrade"));
            assert!(unread || found == asked_for, "{id}: {headers:?}");
        }
    }
}

/// What would not be switched to any more ends once requests are judged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_became_something_else_ends_when_requests_are_judged() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let upstream = scripted::http1("up1", &Seen::default()).expect("an upstream");
    let judged =
        security("AuthorizationPolicy", "p", &json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/never"]}}]}]}));
    for (protocol, stays) in [("websocket", true), ("chat/2", false)] {
        let engine = Engine::start_as(NEAR_CLIENT, &served(upstream, &[])).await.expect("started");
        let mut stream = engine.connect(VIP.parse().expect("an address")).await.expect("connected");
        let request = get("/a", "x", &format!("x-plan: upgrade\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n"));
        stream.write_all(request.as_bytes()).await.expect("asked");
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.expect("an answer"));
        }
        assert!(answer.starts_with(b"HTTP/1.1 101"), "{protocol}: {}", String::from_utf8_lossy(&answer));
        for (policies, open) in [(vec![], true), (vec![judged.clone()], stays)] {
            engine.apply(&served(upstream, &policies)).await.expect("applied");
            let end = tokio::time::timeout(std::time::Duration::from_millis(700), stream.read_u8()).await;
            assert_eq!(end.is_err(), open, "{protocol}, {} policies: {end:?}", policies.len());
        }
    }
}

/// What is no HTTP on a port that nobody declares: what is only observed changes nothing of it, and what is enforced resets it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_that_is_no_request_is_let_alone_by_what_is_not_enforced_and_reset_by_what_is() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    });
    let asks = json!([{"to": [{"operation": {"paths": ["/x"], "methods": ["GET"]}}]}]);
    let policy = |action: &str| security("AuthorizationPolicy", "p", &json!({"action": action, "rules": asks}));
    let mut dry = policy("DENY");
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    let (echoed, reset, refused) = ("echoed", "reset", "HTTP/1.1 400");
    let token = security(
        "RequestAuthentication",
        "p",
        &json!({"jwtRules": [{"issuer": "i", "jwks": r#"{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#}]}),
    );
    let strict = security("PeerAuthentication", "p", &json!({"mtls": {"mode": "STRICT"}}));
    let either = json!([{"to": [{"operation": {"methods": ["GET"]}}, {"operation": {"ports": [address.port().to_string()]}}]}]);
    let either = security("AuthorizationPolicy", "p", &json!({"action": "ALLOW", "rules": either}));
    for (what, policy, expected) in [
        ("audit", policy("AUDIT"), [echoed; 6]),
        ("dry run", dry, [echoed; 6]),
        ("deny", policy("DENY"), [reset, reset, reset, reset, reset, ""]),
        ("allow", policy("ALLOW"), [reset, reset, reset, reset, reset, ""]),
        ("allow by one of two", either, [reset, reset, reset, reset, reset, ""]),
        ("strict", strict, [reset; 6]),
        // Whose tokens would not be seen then.
        ("tokens", token, [refused, refused, echoed, echoed, echoed, ""]),
    ] {
        let engine = Engine::start(&[server_pod(), policy]).await.expect("started");
        // A text that more may come of, one that cannot be a request, whole lines, bytes, the end of what comes, the beginning of a request.
        let sent: [(&[u8], bool); 6] =
            [(b"hello world", false), (b"{\"a\": 1}", false), (b"hello\r\n", false), (b"\0\x01", false), (b"hello", true), (b"GET", false)];
        for ((bytes, ends), expected) in sent.into_iter().zip(expected) {
            let mut stream = engine.connect_inbound(address.port()).await.expect("connected");
            stream.write_all(bytes).await.expect("written");
            if ends {
                stream.shutdown().await.expect("shut");
            }
            let mut answer = vec![0; 64];
            let read = tokio::time::timeout(std::time::Duration::from_secs(3), stream.read(&mut answer)).await;
            let got = match read {
                Err(_) => "",
                Ok(Err(_) | Ok(0)) => reset,
                Ok(Ok(n)) if answer[..n] == *bytes => echoed,
                Ok(Ok(n)) if answer[..n].starts_with(refused.as_bytes()) => refused,
                Ok(Ok(_)) => "something else",
            };
            assert_eq!(got, expected, "{what}: {}", bytes.escape_ascii());
        }
    }
}
