//! Authentication and authorization of requests of real pods: every way in, every mode, and what attackers try.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use mesh_node::io::netns::Netns;
use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{program, wait_for},
    token::{Issuer, now},
};
use serde_json::{Value, json};

#[path = "authorization/judged.rs"]
mod judged;

const SEED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpora/seed");

fn web(name: &str, node: usize) -> PodSpec {
    let command = [program("web").display().to_string(), "serve".into(), "8080".into(), name.to_owned()];
    PodSpec { command: command.into(), port: Some(8080), ..PodSpec::new(name, node) }
}

struct Scene {
    bed: Bed,
    server: Pod,
    near: Pod,
    far: Pod,
    /// Outside the mesh, on the server's node and on the other.
    strangers: [Pod; 2],
    issuer: Issuer,
}

fn scene() -> Scene {
    scene_with(&NodeOptions::default())
}

/// A web server on node 1 with a service for HTTP, clients on both nodes inside and outside the mesh.
fn scene_with(options: &NodeOptions) -> Scene {
    let mut bed = Bed::ambient(options).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: server}\nspec: {selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-other, port: 81, targetPort: 8081}]}\n";
    bed.kubectl_apply("server", service).expect("service");
    let [server, near, far] = bed.meshed([web("server", 0), PodSpec::new("near", 0), PodSpec::new("far", 1)]).expect("pods");
    let strangers = [0, 1].map(|node| bed.pod(&PodSpec::new(&format!("stranger{node}"), node).in_namespace("plain")).expect("stranger"));
    bed.settle().expect("settled");
    Scene { bed, server, near, far, strangers, issuer: Issuer::default() }
}

impl Scene {
    fn apply(&self, documents: &[Value]) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": documents});
        self.bed.apply("policies", &list.to_string()).expect("applied");
        self.bed.settle().expect("settled");
    }

    fn seed(&self, name: &str) {
        self.bed.apply("seed", &std::fs::read_to_string(format!("{SEED}/{name}")).expect("a seed manifest")).expect("applied");
        self.bed.settle().expect("settled");
    }

    /// The status of one request, or `reset` when the connection broke.
    fn ask(&self, client: &Pod, to: &str, path: &str, headers: &[String]) -> String {
        let url = format!("{to}{path}");
        let mut arguments = vec!["get", &url, "1"];
        headers.iter().for_each(|h| arguments.extend(["--header", h]));
        let output = self.bed.run(client, &program("web"), &arguments).expect("web");
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
        match report["statuses"].as_object().and_then(|s| s.keys().next()) {
            Some(status) => status.clone(),
            None => "reset".to_owned(),
        }
    }

    fn token(&self, more: &Value) -> String {
        let mut claims = json!({"iss": "https://issuer.example", "sub": "alice", "exp": now() + 600});
        claims.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        format!("authorization: Bearer {}", self.issuer.token(&claims))
    }
}

fn object(kind: &str, name: &str, namespace: &str, spec: &Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

fn on_server(kind: &str, name: &str, mut spec: Value) -> Value {
    spec["selector"] = json!({"matchLabels": {"app": "server"}});
    object(kind, name, "default", &spec)
}

/// {HBONE, plaintext, same node} x {STRICT, PERMISSIVE, DISABLE} x {allowed, denied by L4, by L7, by JWT}.
#[test]
fn every_way_in_every_mode_and_every_reason() {
    let scene = scene();
    let address = scene.server.address(8080);
    let address6 = scene.server.address6(8080);
    // The client, what it dials, whether it is in the mesh, and what an L4 denial looks like to it.
    let ways: [(&str, &Pod, &str, bool, &str); 7] = [
        ("same node by service", &scene.near, "server:80", true, "403"),
        ("same node by address", &scene.near, &address, true, "reset"),
        ("other node by service", &scene.far, "server:80", true, "403"),
        ("other node by address", &scene.far, &address, true, "reset"),
        ("other node by IPv6 address", &scene.far, &address6, true, "reset"),
        ("plaintext on the node", &scene.strangers[0], &address, false, "403"),
        ("plaintext from elsewhere", &scene.strangers[1], &address6, false, "403"),
    ];
    let jwt = json!({"jwtRules": [{"issuer": "https://issuer.example", "jwks": scene.issuer.jwks()}]});
    let mut wrong = BTreeMap::new();
    for mode in ["STRICT", "PERMISSIVE", "DISABLE"] {
        let base = [
            on_server("PeerAuthentication", "mode", json!({"mtls": {"mode": mode}})),
            on_server("RequestAuthentication", "jwt", jwt.clone()),
        ];
        let allow = on_server(
            "AuthorizationPolicy",
            "allow",
            json!({"rules": [{"to": [{"operation": {"methods": ["GET"], "paths": ["/x*", "/headers"]}}]}]}),
        );
        let l4 = on_server(
            "AuthorizationPolicy",
            "l4",
            json!({"action": "DENY", "rules": [{"from": [{"source": {"notServiceAccounts": ["default/nobody"]}}]}]}),
        );
        let with = |more: &[&Value]| base.iter().chain(more.iter().copied()).cloned().collect::<Vec<_>>();
        let (good, bad) = (scene.token(&json!({})), scene.token(&json!({"exp": now() - 600})));
        for (case, documents, path, header, expected) in [
            ("allowed", with(&[&allow]), "/x", vec![], "200"),
            ("allowed with a token", with(&[&allow]), "/x", vec![good], "200"),
            ("denied by L7", with(&[&allow]), "/y", vec![], "403"),
            ("denied by JWT", with(&[&allow]), "/x", vec![bad], "401"),
            ("denied by L4", with(&[&allow, &l4]), "/x", vec![], "L4"),
        ] {
            scene.apply(&documents);
            for (way, client, to, meshed, denied) in &ways {
                let strict = !meshed && mode == "STRICT";
                let expected = if strict {
                    "403"
                } else if expected == "L4" {
                    denied
                } else {
                    expected
                };
                let found = scene.ask(client, to, path, &header);
                if found != expected {
                    wrong.insert(format!("{mode}, {case}, {way}"), format!("{found}, expected {expected}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let node = &scene.bed.nodes()[0];
    let strict = node.metric("mesh_policy_decisions_total", &["PeerAuthentication", "denied"]).expect("metric");
    let l4 = node.metric("mesh_policy_decisions_total", &["default/l4", "\"connection_denied\""]).expect("metric");
    assert!(strict > 0.5 && l4 > 0.5, "strict {strict}, l4 {l4}");
    let log = node.log_text();
    for details in ["istio_converted_static_strict", "rbac_access_denied_matched_policy[none]", "jwt_authn_access_denied{Jwt_is_expired}"] {
        assert!(log.contains(details), "{details}");
    }
}

/// deny-all, then allow: requests asked all the time see no window in which one that is denied passes.
#[test]
fn policies_change_without_a_window() {
    let scene = scene();
    let deny_all = object("AuthorizationPolicy", "deny-all", "default", &json!({}));
    scene.apply(std::slice::from_ref(&deny_all));
    for client in [&scene.near, &scene.far] {
        assert_eq!(scene.ask(client, "server:80", "/x", &[]), "403");
    }
    let running = [&scene.near, &scene.far].map(|client| {
        let mut command = scene.bed.command(client, &program("web"), &["get", "server:80/secret", "0", "2", "--seconds", "4"]);
        command.stdout(std::process::Stdio::piped()).spawn().expect("web")
    });
    // What is allowed is something else, again and again.
    let allow = on_server("AuthorizationPolicy", "allow", json!({"rules": [{"to": [{"operation": {"paths": ["/open"]}}]}]}));
    for _ in 0..6 {
        scene.apply(&[deny_all.clone(), allow.clone()]);
        for client in [&scene.near, &scene.far] {
            assert_eq!(scene.ask(client, "server:80", "/open", &[]), "200");
        }
        scene.apply(std::slice::from_ref(&deny_all));
        assert_eq!(scene.ask(&scene.far, "server:80", "/open", &[]), "403");
    }
    for child in running {
        let report: Value = serde_json::from_slice(&child.wait_with_output().expect("ended").stdout).expect("a report");
        let statuses = report["statuses"].as_object().expect("statuses");
        assert!(statuses.get("403").and_then(Value::as_u64).is_some_and(|n| n > 100), "{report}");
        // A connection that has to be made again may break under a request; none is let through.
        assert!(statuses.keys().all(|s| s == "403" || s == "503"), "{report}");
    }
}

/// What it takes to serve a key set over TLS as `example.com`: the file with its authority, and the answer.
fn example_com(bed_directory: &std::path::Path, jwks: &str) -> (std::path::PathBuf, Arc<rustls::ServerConfig>, Vec<u8>) {
    let mut authority = rcgen::CertificateParams::default();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = rcgen::CertifiedIssuer::self_signed(authority, rcgen::KeyPair::generate().expect("key")).expect("authority");
    let key = rcgen::KeyPair::generate().expect("key");
    let leaf = rcgen::CertificateParams::new(vec!["example.com".to_owned()]).expect("parameters").signed_by(&key, &issuer).expect("leaf");
    let path = bed_directory.join("authority.pem");
    std::fs::write(&path, issuer.pem()).expect("written");
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .expect("configuration");
    let body = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{jwks}", jwks.len());
    (path, Arc::new(config), body.into_bytes())
}

fn serve_tls(listener: TcpListener, config: Arc<rustls::ServerConfig>, answer: Vec<u8>) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (config, answer) = (config.clone(), answer.clone());
            std::thread::spawn(move || {
                let mut stream = stream;
                let mut session = rustls::ServerConnection::new(config).expect("a session");
                let mut tls = rustls::Stream::new(&mut session, &mut stream);
                let mut request = [0; 4096];
                if tls.read(&mut request).is_ok() {
                    // A client that is gone needs no answer.
                    let _ = tls.write_all(&answer);
                    tls.conn.send_close_notify();
                    let _ = tls.flush();
                }
            });
        }
    });
}

/// Manifests 12 to 16 and 21, as they are, on Bookinfo over two nodes.
#[test]
fn seed_manifests_do_what_their_comments_say_on_bookinfo() {
    let directory = tempfile::tempdir().expect("a directory");
    let issuer = Issuer::default();
    let (authority, tls, answer) = example_com(directory.path(), &issuer.jwks());
    let options = NodeOptions {
        environment: vec![("SSL_CERT_FILE".into(), authority.display().to_string())],
        own_names: vec!["example.com".into()],
        ..NodeOptions::default()
    };
    let mut bed = Bed::ambient(&options).expect("bed");
    for (index, node) in bed.nodes().iter().enumerate() {
        let (netns, address) = (Netns::open(&node.netns).expect("a namespace"), bed.node_address(index));
        let listener = netns.enter(|| TcpListener::bind((address, 443))).expect("entered").expect("bound");
        serve_tls(listener, tls.clone(), answer.clone());
    }
    let text = std::fs::read_to_string(format!("{SEED}/01-bookinfo.yaml")).expect("bookinfo");
    let mut pods = bed.kubectl_apply("bookinfo", &text).expect("bookinfo");
    let more = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/corpora/bookinfo-details-ratings.yaml")).expect("more");
    pods.extend(bed.kubectl_apply("more", &more).expect("details and ratings"));
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: admin}\nspec: {selector: {app: admin-service}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply("admin", service).expect("a service");
    let [client, account, _admin] = bed
        .meshed([
            PodSpec::new("client", 1),
            PodSpec::new("account", 0).account("productpage"),
            web("admin", 1).label("app", "admin-service"),
        ])
        .expect("clients");
    let stranger = bed.pod(&PodSpec::new("stranger", 0).in_namespace("plain")).expect("stranger");
    pods.iter().for_each(|p| bed.wait_captured(p, true).expect("captured"));
    let strangers = [stranger.clone(), stranger.clone()];
    let scene = Scene { server: client.clone(), near: account, far: client, strangers, issuer, bed };
    let [near, far, outside] = [&scene.near, &scene.far, &stranger];
    let of = |app: &str| pods.iter().find(|p| p.name.starts_with(app)).expect("a pod");
    let ask = |client: &Pod, to: &str, path: &str, headers: &[String]| scene.ask(client, to, path, headers);

    let page = of("productpage").address(9080);
    assert_eq!([ask(far, "productpage:9080", "/productpage", &[]), ask(outside, &page, "/productpage", &[])], ["200", "200"]);
    scene.seed("12-mtls-strict-mesh.yaml");
    assert_eq!([ask(far, "productpage:9080", "/productpage", &[]), ask(outside, &page, "/productpage", &[])], ["200", "403"]);
    scene.seed("21-mtls-permissive.yaml");
    assert_eq!(ask(outside, &page, "/productpage", &[]), "200");

    scene.seed("13-mtls-strict-workload.yaml");
    let reviews = of("reviews").address(9080);
    assert_eq!([ask(outside, &page, "/productpage", &[]), ask(outside, &reviews, "/reviews/0", &[])], ["200", "403"]);
    assert_eq!(ask(far, "reviews:9080", "/reviews/0", &[]), "200");

    // The token is looked for at productpage only; its keys come from https://example.com.
    scene.seed("14-jwt.yaml");
    let token = |more: Value| {
        let mut claims = json!({"iss": "https://example.com", "sub": "a", "aud": "productpage", "exp": now() + 600});
        claims.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        vec![format!("authorization: Bearer {}", scene.issuer.token(&claims))]
    };
    for (headers, expected) in [
        (vec![], "200"),
        (token(json!({})), "200"),
        (token(json!({"aud": "other"})), "403"),
        (token(json!({"iss": "https://evil.example"})), "401"),
        (token(json!({"exp": now() - 600})), "401"),
        (vec!["authorization: Bearer abc".to_owned()], "401"),
    ] {
        for (client, to) in [(far, "productpage:9080"), (near, "productpage:9080"), (outside, page.as_str())] {
            assert_eq!(ask(client, to, "/productpage", &headers), expected, "{} {headers:?}", client.name);
        }
    }
    assert_eq!(ask(far, "reviews:9080", "/reviews/0", &["authorization: Bearer abc".to_owned()]), "200");

    // Nobody but the account productpage, with GET /reviews/*, and that at reviews only.
    scene.seed("15-authz-deny-all-and-allow.yaml");
    assert_eq!(ask(near, "reviews:9080", "/reviews/0", &[]), "200");
    for (client, to, path) in [
        (near, "reviews:9080", "/health"),
        (near, "reviews:9080", "/reviews/../health"),
        (near, "productpage:9080", "/productpage"),
        (far, "reviews:9080", "/reviews/0"),
        (outside, reviews.as_str(), "/reviews/0"),
    ] {
        assert_eq!(ask(client, to, path, &[]), "403", "{} {to} {path}", client.name);
    }

    // Of admin-service, tokens with the claim only; it takes a RequestAuthentication to have claims at all.
    scene.seed("16-authz-claims.yaml");
    assert_eq!(ask(far, "admin:80", "/x", &[]), "403");
    let jwt = json!({"selector": {"matchLabels": {"app": "admin-service"}}, "jwtRules": [{"issuer": "https://example.com", "jwksUri": "https://example.com/.well-known/jwks.json"}]});
    scene.apply(&[object("RequestAuthentication", "admin", "default", &jwt)]);
    for (claims, expected) in
        [(json!({"role": "admin"}), "200"), (json!({"role": ["x", "admin"]}), "200"), (json!({"role": "user"}), "403"), (json!({}), "403")]
    {
        for client in [near, far] {
            assert_eq!(ask(client, "admin:80", "/x", &token(claims.clone())), expected, "{claims}");
        }
    }
    // A policy on the reviews is of no concern here.
    assert_eq!(ask(near, "reviews:9080", "/reviews/0", &[]), "200");
}

/// What goes through the guard: bodies both ways, gRPC with trailers, another protocol, aborts; from a tunnel, from the node by
/// address, and in plaintext from outside.
#[test]
fn http_through_the_guard_is_what_it_was() {
    let mut scene = scene();
    // Ports that declare nothing, so that gRPC is found by its first bytes.
    let [plain] = scene.bed.meshed([web("plain", 0)]).expect("a pod");
    scene.apply(&[
        object("RequestAuthentication", "jwt", "default", &json!({"jwtRules": [{"issuer": "i", "jwks": scene.issuer.jwks()}]})),
        object(
            "AuthorizationPolicy",
            "odd",
            "default",
            &json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/denied", "/Nothing/*"]}}]}]}),
        ),
    ]);
    let bytes = 64 * 1024 * 1024_u64;
    let before = scene.bed.nodes()[0].resident().expect("memory");
    for client in [&scene.far, &scene.near, &scene.strangers[0], &scene.strangers[1]] {
        let run = |arguments: &[&str]| -> Value {
            let output = scene.bed.run(client, &program("web"), arguments).expect("web");
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{} {arguments:?}: {e}", client.name))
        };
        for to in [plain.address(8080), plain.address6(8080)] {
            assert_eq!(scene.ask(client, &to, "/denied", &[]), "403", "{} {to}", client.name);
            let report = run(&["upload", &format!("{to}/sink"), &bytes.to_string()]);
            assert_eq!(report["counted"], bytes.to_string(), "{}: {report}", client.name);
            let report = run(&["download", &format!("{to}/bytes/{bytes}"), &bytes.to_string()]);
            assert_eq!(report["came"], bytes, "{}: {report}", client.name);
            let report = run(&["upgrade", &format!("{to}/upgrade")]);
            assert!(report["said"] == json!(["first", "second", "third"]) && report["rest"] == 0, "{}: {report}", client.name);
            let grpc = to.replace("8080", "8081");
            let report = run(&["grpc", &grpc]);
            assert!(report["Stream"]["sum"] == "100" && report["Fail"]["status"] == "9", "{} {grpc}: {report}", client.name);
            let report = run(&["abort", &format!("{to}/sink"), "100"]);
            assert_eq!(report["aborted"], 100, "{}: {report}", client.name);
            let report = run(&["get", &format!("{to}/x"), "500", "4"]);
            assert_eq!(report["statuses"]["200"], 500, "{}: {report}", client.name);
        }
    }
    let after = scene.bed.nodes()[0].resident().expect("memory");
    assert!(after < before + 24 * 1024 * 1024, "{before} -> {after}");
    wait_for("nothing is under way", Duration::from_secs(10), || Ok(scene.bed.nodes()[0].metric("mesh_http_active_requests", &[])? < 0.5))
        .expect("all gauges are back to nought");
}

/// Keys are fetched, kept while their server is away, and fetched again when the issuer uses another.
#[test]
fn keys_of_an_issuer_may_be_away_and_may_change() {
    use std::sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    };
    let mut scene = scene();
    let next = Issuer::default();
    let served = Arc::new(Mutex::new(scene.issuer.jwks()));
    let (away, fetches) = (Arc::new(AtomicBool::new(false)), Arc::new(std::sync::atomic::AtomicUsize::new(0)));
    let address = scene.bed.node_address(0);
    let netns = Netns::open(&scene.bed.nodes()[0].netns).expect("a namespace");
    let listener = netns.enter(|| TcpListener::bind((address, 8088))).expect("entered").expect("bound");
    let (answers, gone, count) = (served.clone(), away.clone(), fetches.clone());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            // Whatever is asked for.
            let n = stream.read(&mut request).unwrap_or(0);
            count.fetch_add(1, Ordering::SeqCst);
            if gone.load(Ordering::SeqCst) {
                continue;
            }
            let discovery = String::from_utf8_lossy(&request[..n]).contains("openid-configuration");
            let body = if discovery {
                json!({"issuer": "x", "jwks_uri": format!("http://{address}:8088/keys")}).to_string()
            } else {
                answers.lock().expect("lock").clone()
            };
            let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
        }
    });
    let issuer = format!("http://{address}:8088");
    // Found by discovery: the rule names neither keys nor a place of them.
    scene.apply(&[
        on_server("RequestAuthentication", "jwt", json!({"jwtRules": [{"issuer": issuer}]})),
        on_server(
            "AuthorizationPolicy",
            "users",
            json!({"rules": [{"from": [{"source": {"requestPrincipals": [format!("{issuer}/*")]}}]}]}),
        ),
    ]);
    let bearer = |by: &Issuer| vec![format!("authorization: Bearer {}", by.token(&json!({"iss": issuer, "sub": "a", "exp": now() + 600})))];
    assert_eq!(
        [
            scene.ask(&scene.far, "server:80", "/x", &bearer(&scene.issuer)),
            scene.ask(&scene.near, "server:80", "/x", &bearer(&scene.issuer))
        ],
        ["200", "200"]
    );
    away.store(true, Ordering::SeqCst);
    assert_eq!(scene.ask(&scene.far, "server:80", "/x", &bearer(&scene.issuer)), "200", "the keys are known");
    // An id the keys do not have is a reason to look again, at most every ten seconds.
    let unknown = scene.issuer.sign(&json!({"alg": "RS256", "kid": "new"}), &json!({"iss": issuer, "sub": "a"}));
    let unknown = vec![format!("authorization: Bearer {unknown}")];
    std::thread::sleep(Duration::from_secs(10));
    let before = fetches.load(Ordering::SeqCst);
    for _ in 0..20 {
        assert_eq!(scene.ask(&scene.far, "server:80", "/x", &unknown), "401");
    }
    let more = fetches.load(Ordering::SeqCst) - before;
    assert!((1..=3).contains(&more), "{more} fetches for 20 tokens of an unknown key");
    assert_eq!(scene.ask(&scene.far, "server:80", "/x", &bearer(&scene.issuer)), "200", "the last good keys stay");
    away.store(false, Ordering::SeqCst);
    *served.lock().expect("lock") = next.jwks().replace("rsa1", "rsa2");
    let rotated = next.sign(&json!({"alg": "RS256", "kid": "rsa2"}), &json!({"iss": issuer, "sub": "a", "exp": now() + 600}));
    let rotated = vec![format!("authorization: Bearer {rotated}")];
    wait_for("the new key is in use", Duration::from_secs(20), || Ok(scene.ask(&scene.far, "server:80", "/x", &rotated) == "200"))
        .expect("in use");
    assert_eq!(scene.ask(&scene.far, "server:80", "/x", &bearer(&scene.issuer)), "401", "the old key is not");
    // A node that starts while they are away lets nobody in by a token it cannot verify.
    away.store(true, Ordering::SeqCst);
    let node = scene.bed.node(0);
    node.stop().expect("stopped");
    node.start().expect("started");
    node.wait_ready().expect("ready");
    wait_for("the node answers", Duration::from_secs(10), || Ok(scene.ask(&scene.far, "server:80", "/x", &rotated) == "401"))
        .expect("refused");
    let remarks = || scene.bed.nodes()[0].admin_json("/status").map(|status| status["remarks"].to_string());
    let told = remarks().expect("a status");
    assert!(told.contains("cannot be fetched") && told.contains("answered 401"), "{told}");
    away.store(false, Ordering::SeqCst);
    wait_for("keys again", Duration::from_secs(20), || Ok(scene.ask(&scene.far, "server:80", "/x", &rotated) == "200")).expect("let in");
    assert!(!remarks().expect("a status").contains("cannot be fetched"));
}
