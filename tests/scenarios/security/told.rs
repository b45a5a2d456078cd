//! What applications see of the client.

use std::time::Duration;

use mesh_tests::{
    engine::{Engine, NEAR_CLIENT, security, server_pod, service, virtual_service},
    scripted::{self, Seen},
    token::Issuer,
    wire::exchange,
};
use serde_json::json;

use super::{ISSUER, ask, authorizers, get, mesh_config, served, servers};

/// What the application says about its connection reaches the client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_applications_connection_is_the_clients() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let policy = security("AuthorizationPolicy", "p", &json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}));
    let engine = Engine::start_as(NEAR_CLIENT, &served(upstream, &[policy])).await.expect("started");
    let mut stream = engine.connect_inbound(upstream.port()).await.expect("connected");
    let kept = exchange(&mut stream, get("/a", "kept", "").into_bytes(), false).await;
    assert_eq!((kept.status.as_str(), kept.header("connection")), ("200", None));
    let closing = exchange(&mut stream, get("/b", "closing", "x-plan: 200+connection=close\r\n").into_bytes(), false).await;
    assert_eq!((closing.status.as_str(), closing.header("connection")), ("200", Some("close")), "{closing:?}");
    // One that closes while nothing is under way is closed to the client too, and not reset.
    let mut stream = engine.connect_inbound(upstream.port()).await.expect("connected");
    let parting = exchange(&mut stream, get("/c", "parting", "x-plan: parting\r\n").into_bytes(), false).await;
    assert_eq!(parting.status, "200");
    use tokio::io::AsyncReadExt;
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(3), stream.read_to_end(&mut rest)).await.expect("in time");
    assert!(ended.is_ok() && rest.is_empty(), "{ended:?}");
    assert!(seen.of("kept")[0].connection == seen.of("closing")[0].connection);
    // Who asks from outside has named nothing; a name that is there stays.
    let named = |id: &str| {
        let headers = seen.of(id)[0].headers.clone();
        headers.into_iter().find(|(name, _)| name == "x-request-id").map(|(_, value)| value)
    };
    let mut stream = engine.connect_inbound(upstream.port()).await.expect("connected");
    exchange(&mut stream, get("/e", "own", "x-request-id: mine\r\n").into_bytes(), false).await;
    assert_eq!((named("kept").map(|id| id.len()), named("own").as_deref()), (Some(36), Some("mine")));
    assert_ne!(named("kept"), named("closing"));
    // One that ends without an answer ends so for the client: a close is a close, and a reset a reset.
    for (plan, end) in [("fin", "FIN"), ("rst", "RST")] {
        let mut stream = engine.connect_inbound(upstream.port()).await.expect("connected");
        let silent = exchange(&mut stream, get("/d", plan, &format!("x-plan: {plan}\r\n")).into_bytes(), false).await;
        assert_eq!((silent.end, silent.complete), (end, false), "{plan}: {silent:?}");
    }
}

/// An application that takes no more streams on a connection says so while others go on; its client is told then, and not when one was refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_says_goaway_has_its_client_sent_away() {
    let seen = Seen::default();
    let upstream = scripted::http2("up1", &seen).await.expect("an upstream");
    let policy = security("AuthorizationPolicy", "p", &json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}));
    let engine = Engine::start_as(NEAR_CLIENT, &served(upstream, &[policy])).await.expect("started");
    let stream = engine.connect_inbound(upstream.port()).await.expect("connected");
    let (mut send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut ask = |plan: &str| {
        let request = http::Request::get("http://a/").header("x-plan", plan).body(()).expect("a request");
        send.send_request(request, true).expect("sent").0
    };
    let long = ask("200/2000");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(ask("drain").await.expect("answered").status(), 200);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let refused = std::future::poll_fn(|cx| send.poll_ready(cx)).await.expect_err("sent away");
    assert!(refused.is_go_away() && refused.is_remote(), "{refused}");
    assert_eq!(long.await.expect("answered").status(), 200);
}

/// Clients are told how many streams the application takes at a time: who has more goes on another connection, and does not wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_know_how_many_streams_an_application_takes() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let upstream = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut builder = h2::server::Builder::new();
                let Ok(mut connection) = builder.max_concurrent_streams(7).handshake::<_, bytes::Bytes>(stream).await else { return };
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    let _ = respond.send_response(http::Response::new(()), true);
                }
            });
        }
    });
    let policy = security("AuthorizationPolicy", "p", &json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}));
    let engine = Engine::start_as(NEAR_CLIENT, &served(upstream, &[policy])).await.expect("started");
    let stream = engine.connect_inbound(upstream.port()).await.expect("connected");
    let (mut send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let (response, _) = send.send_request(http::Request::get("http://a/").body(()).expect("a request"), true).expect("sent");
    assert_eq!(response.await.expect("answered").status(), 200);
    assert_eq!(send.current_max_send_streams(), 7);
}

/// Who the client is, as the application is told; nobody can say that of himself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_are_told_who_the_client_is() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let both = "By=spiffe://cluster.local/ns/default/sa/server;URI=spiffe://cluster.local/ns/default/sa/client";
    let forged = "URI=spiffe://cluster.local/ns/default/sa/admin";
    let asks = security("AuthorizationPolicy", "p", &json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}));
    // What is denied is asked about what the application would see.
    let admins = json!({"action": "DENY", "rules": [{"when": [{"key": "request.headers[x-forwarded-client-cert]", "values": ["*admin*", "*sa/admin"]}]}]});
    let denies = security("AuthorizationPolicy", "d", &admins);
    let engine = Engine::start_as(NEAR_CLIENT, &served(upstream, &[])).await.expect("started");
    let rows: [(Option<&str>, Option<&str>, Option<&str>); 7] = [
        // The mode, and what comes of a forged header from outside and from a pod of the node, whose own proxy has taken it off.
        (None, None, Some(both)),
        (Some("SANITIZE"), None, None),
        (Some("FORWARD_ONLY"), None, None),
        (Some("APPEND_FORWARD"), None, Some(both)),
        (Some("SANITIZE_SET"), None, Some(both)),
        (Some("ALWAYS_FORWARD_ONLY"), Some(forged), None),
        (Some("UNDEFINED"), None, Some(both)),
    ];
    for (mode, outside, node) in rows {
        let headers = mode.map(|mode| json!({"proxyHeaders": {"forwardedClientCert": mode}}));
        for policies in [vec![], vec![asks.clone()]] {
            let guarded = !policies.is_empty();
            let mut more = policies;
            more.extend(headers.as_ref().map(|h| authorizers::mesh_config(&json!({"defaultConfig": h}))));
            engine.apply(&served(upstream, &more)).await.expect("applied");
            for (way, expected) in [("outside", outside), ("node", node)] {
                let id = format!("{mode:?}-{guarded}-{way}");
                let got = ask(&engine, way, upstream, &get("/a", &id, &format!("x-forwarded-client-cert: {forged}\r\n"))).await;
                assert_eq!(got.status, "200", "{id}");
                let told = seen.of(&id)[0]
                    .headers
                    .iter()
                    .filter(|(n, _)| n == "x-forwarded-client-cert")
                    .map(|(_, v)| v.clone())
                    .collect::<Vec<_>>();
                assert_eq!(told, expected.into_iter().map(str::to_owned).collect::<Vec<_>>(), "{id}");
            }
        }
    }
    engine.apply(&served(upstream, &[denies])).await.expect("applied");
    let got = ask(&engine, "outside", upstream, &get("/a", "d", &format!("x-forwarded-client-cert: {forged}\r\n"))).await;
    assert_eq!(got.status, "200", "a forged header is none");
    let clients =
        json!({"action": "DENY", "rules": [{"when": [{"key": "request.headers[x-forwarded-client-cert]", "values": ["*sa/client"]}]}]});
    engine.apply(&served(upstream, &[security("AuthorizationPolicy", "c", &clients)])).await.expect("applied");
    for (way, expected) in [("outside", "200"), ("node", "403")] {
        assert_eq!(
            ask(&engine, way, upstream, &get("/a", "c", "")).await.status,
            expected,
            "{way}: policies see what the application would"
        );
    }
    // An authorizer sees what the application would.
    let custom = json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": "h"}, "rules": [{}]});
    let provider = json!({"name": "h", "envoyExtAuthzHttp": {"service": "authz.default.svc.cluster.local", "port": 80,
        "includeRequestHeadersInCheck": ["x-forwarded-client-cert", "x-pass"], "headersToUpstreamOnAllow": ["x-cert"]}});
    let mesh = mesh_config(&json!({"extensionProviders": [provider]}));
    let mut documents = served(upstream, &[mesh, security("AuthorizationPolicy", "custom", &custom)]);
    documents.extend(service("authz", "10.99.0.3", "http", &[servers::authorizer()]));
    engine.apply(&documents).await.expect("applied");
    let got = ask(&engine, "node", upstream, &get("/a", "asked", "x-pass: 1\r\n")).await;
    assert_eq!(got.status, "200");
    let header = |name: &str| seen.of("asked")[0].headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
    assert_eq!((header("x-cert").as_deref(), header("x-forwarded-client-cert").as_deref()), (Some(both), Some(both)));
    // Over HTTP/2 too.
    let upstream_2 = scripted::http2("up2", &seen).await.expect("an upstream");
    engine.apply(&[served(upstream, &[]), service("two", "10.99.0.2", "http2", &[upstream_2])].concat()).await.expect("applied");
    let got = exchange(
        &mut engine.connect("10.99.0.2:80".parse().expect("an address")).await.expect("connected"),
        get("/a", "h2", "").into_bytes(),
        false,
    )
    .await;
    assert_eq!(got.status, "200");
    assert_eq!(seen.of("h2")[0].headers.iter().find(|(n, _)| n == "x-forwarded-client-cert").map(|(_, v)| v.as_str()), Some(both));
}

/// Who sends a request, and what its token said, is not for trailers to say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_verified_cannot_be_said_behind_a_body() {
    let (listener, received) =
        (std::net::TcpListener::bind("127.0.0.1:0").expect("bound"), std::sync::Arc::<std::sync::Mutex<String>>::default());
    let upstream = listener.local_addr().expect("an address");
    let kept = received.clone();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        for mut stream in listener.incoming().flatten() {
            let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
            while !String::from_utf8_lossy(&all).contains("x-last: 1\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => all.extend_from_slice(&buffer[..n]),
                }
            }
            *kept.lock().expect("a lock") = String::from_utf8_lossy(&all).into_owned();
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    let issuer = Issuer::default();
    let jwt = json!({"issuer": ISSUER, "jwks": issuer.jwks(), "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}], "outputPayloadToHeader": "x-payload"});
    let documents = served(upstream, &[security("RequestAuthentication", "jwt", &json!({"jwtRules": [jwt.clone()]}))]);
    // Of a service whose route leads to another's pods.
    let target = json!([{"kind": "Service", "group": "", "name": "server"}]);
    let targeted = security("RequestAuthentication", "jwt", &json!({"targetRefs": target, "jwtRules": [jwt]}));
    let mut away = vec![server_pod(), targeted, virtual_service("server", &json!([{"route": [{"destination": {"host": "other"}}]}]))];
    away.extend(service("server", "10.99.0.1", "http", &[]));
    away.extend(service("other", "10.99.0.2", "http", &[upstream]));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let names = ["x-user", "x-payload", "x-forwarded-client-cert", "authorization", "x-forwarded-for"];
    let trailers = names.map(|name| format!("{name}: forged\r\n")).concat();
    let request =
        format!("POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n{trailers}x-sum: 2\r\nx-last: 1\r\n\r\n");
    for way in ["outside", "node", "away"] {
        if way == "away" {
            engine.apply(&away).await.expect("applied");
        }
        let got = ask(&engine, way, upstream, &request).await;
        assert_eq!(got.status, "200", "{way}: {got:?}");
        let received = std::mem::take(&mut *received.lock().expect("a lock"));
        assert!(received.contains("x-sum: 2\r\n") && !received.contains("forged"), "{way}: {received}");
    }
}
