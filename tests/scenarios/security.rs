//! Tokens and authorization of requests, as a real Envoy was recorded to answer (`jwt` and `rbac` of the corpus), for the
//! three ways into a pod that one process can show: HTTP/1 and HTTP/2 from outside the mesh, and from a pod of the node.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use mesh_tests::{
    engine::{Engine, Line, NEAR_CLIENT, SERVER, security, server_pod, service, virtual_service},
    scripted::{self, Seen},
    token::{self, Issuer, now},
    wire::{Got, exchange},
};
use serde_json::{Value, json};

#[path = "security/authorizers.rs"]
mod authorizers;

use authorizers::{grpc_authorizer, mesh_config};

const VIP: &str = "10.99.0.1:80";
const ISSUER: &str = "https://issuer.example";

/// A recorded case.
struct Row {
    case: &'static str,
    /// Specs of the policies on the server.
    authentication: Value,
    authorization: Vec<Value>,
    method: &'static str,
    path: String,
    headers: Vec<(&'static str, String)>,
    expect: Expect,
}

struct Expect {
    status: u16,
    details: String,
    body: String,
    headers: Vec<(&'static str, String)>,
    /// Headers the application gets; absent ones are empty.
    saw: Vec<(&'static str, String)>,
    line: Option<&'static str>,
}

impl Row {
    fn new(case: &'static str) -> Self {
        let expect =
            Expect { status: 200, details: "via_upstream".into(), body: "up1 200 #1\n".into(), headers: vec![], saw: vec![], line: None };
        let path = format!("/{case}/x");
        Self { case, authentication: Value::Null, authorization: vec![], method: "GET", path, headers: vec![], expect }
    }

    fn jwt(case: &'static str, rules: &Value) -> Self {
        Self { authentication: json!({"jwtRules": rules}), ..Self::new(case) }.path("/jw/x")
    }

    /// Istio lets requests without a token pass; Envoy was recorded to refuse them, which is what this policy does.
    fn required(mut self) -> Self {
        self.authorization.push(json!({"action": "DENY", "rules": [{"from": [{"source": {"notRequestPrincipals": ["*"]}}]}]}));
        self
    }

    fn authz(case: &'static str, policies: &[Value]) -> Self {
        Self { authorization: policies.to_vec(), ..Self::new(case) }
    }

    fn path(mut self, path: &str) -> Self {
        self.path = path.to_owned();
        self
    }

    fn bearer(self, token: &str) -> Self {
        self.header("authorization", &format!("Bearer {token}"))
    }

    fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    fn refused(mut self, status: u16, text: &str) -> Self {
        self.expect.status = status;
        self.expect.details = format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"));
        self.expect.body = text.to_owned();
        // Envoy says no more than 256 bytes of the path.
        let realm = format!("Bearer realm=\"http://svc.example{:.256}\"", self.path);
        let error = if text == "Jwt is missing" { "" } else { ", error=\"invalid_token\"" };
        self.expect.headers = vec![("www-authenticate", realm + error), ("content-type", "text/plain".into())];
        self
    }

    fn denied(mut self, rule: &str) -> Self {
        self.expect.status = 403;
        self.expect.details = format!("rbac_access_denied_matched_policy[{rule}]");
        self.expect.body = "RBAC: access denied".into();
        self.expect.headers = vec![("content-type", "text/plain".into())];
        self
    }

    fn saw(mut self, name: &'static str, value: &str) -> Self {
        self.expect.saw.push((name, value.to_owned()));
        self
    }
}

fn claims(more: &Value) -> Value {
    token::changed(json!({"iss": ISSUER, "sub": "alice", "aud": "svc-a", "exp": now() + 600, "iat": now()}), more)
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn rows(issuer: &Issuer) -> Vec<Row> {
    let other = Issuer::default();
    let rule = |more: Value| {
        let mut rule = json!({"issuer": ISSUER, "audiences": ["svc-a"], "jwks": issuer.jwks()});
        rule.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        rule
    };
    let jw = json!([rule(json!({}))]);
    let two = json!([rule(json!({})), {"issuer": "https://other.example", "jwks": issuer.jwks()}]);
    let good = issuer.token(&claims(&json!({})));
    let with = |more: &Value| issuer.token(&claims(more));
    let full = claims(&json!({"groups": ["dev", "ops"]}));
    let full_token = issuer.token(&full);
    let forwarding = json!([rule(json!({"forwardOriginalToken": true, "outputPayloadToHeader": "x-jwt-payload",
        "outputClaimToHeaders": [{"header": "x-jwt-sub", "claim": "sub"}, {"header": "x-jwt-groups", "claim": "groups"}]}))]);
    let elsewhere =
        json!([rule(json!({"fromParams": ["tkn"], "fromCookies": ["tok"], "fromHeaders": [{"name": "x-tok", "prefix": "T "}]}))]);
    let form = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections";
    let part = |v: Value| {
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
        URL_SAFE_NO_PAD.encode(v.to_string())
    };
    let no_algorithm = format!("{}.{}.", part(json!({"alg": "none", "typ": "JWT"})), part(claims(&json!({}))));
    let hmac = format!("{}.{}.AAAA", part(json!({"alg": "HS256", "kid": "rsa1"})), part(claims(&json!({}))));
    let dev = json!({"rules": [{"when": [{"key": "request.auth.claims[groups]", "values": ["dev"]}]}]});
    let method = |m: &str| json!({"rules": [{"to": [{"operation": {"methods": [m]}}]}]});
    let deny = |op: Value| json!({"action": "DENY", "rules": [{"to": [{"operation": op}]}]});
    let payload = full_token.split('.').nth(1).expect("three parts").to_owned();
    vec![
        Row::jwt("j_ok", &jw).bearer(&good).saw("authorization", ""),
        Row::jwt("j_ok_ec", &jw).bearer(&issuer.ec_token(&claims(&json!({})))),
        Row::jwt("j_ok_nokid", &jw).bearer(&issuer.sign(&json!({"alg": "RS256", "typ": "JWT"}), &claims(&json!({})))),
        Row::jwt("j_garbage", &jw).bearer("abc").refused(401, form),
        Row::jwt("j_3parts", &jw).bearer("a.b.c").refused(401, "Jwt header is an invalid Base64url encoded"),
        Row::jwt("j_hdrnotjson", &jw).bearer("bm9wZQ.e30.AAAA").refused(401, "Jwt header is an invalid JSON"),
        Row::jwt("j_expired", &jw).bearer(&with(&json!({"exp": now() - 600}))).refused(401, "Jwt is expired"),
        Row::jwt("j_expired_30s", &jw).bearer(&with(&json!({"exp": now() - 30}))),
        Row::jwt("j_expired_65s", &jw).bearer(&with(&json!({"exp": now() - 65}))).refused(401, "Jwt is expired"),
        Row::jwt("j_noexp", &jw).bearer(&with(&json!({"exp": null}))),
        Row::jwt("j_nbf_30s", &jw).bearer(&with(&json!({"nbf": now() + 30}))),
        Row::jwt("j_nbf_future", &jw).bearer(&with(&json!({"nbf": now() + 600}))).refused(401, "Jwt not yet valid"),
        Row::jwt("j_iat_future", &jw).bearer(&with(&json!({"iat": now() + 600}))),
        Row::jwt("j_badsig", &jw).bearer(&other.token(&claims(&json!({})))).refused(401, "Jwt verification fails"),
        Row::jwt("j_otherkey_nokid", &jw)
            .bearer(&other.sign(&json!({"alg": "RS256"}), &claims(&json!({}))))
            .refused(401, "Jwt verification fails"),
        Row::jwt("j_unknownkid", &jw)
            .bearer(&issuer.sign(&json!({"alg": "RS256", "kid": "zzz"}), &claims(&json!({}))))
            .refused(401, "Jwks doesn't have key to match kid or alg from Jwt"),
        Row::jwt("j_alg_mismatch_kid", &jw)
            .bearer(&issuer.sign(&json!({"alg": "ES256", "kid": "rsa1"}), &claims(&json!({}))))
            .refused(401, "Jwks doesn't have key to match kid or alg from Jwt"),
        Row::jwt("j_iss", &jw).bearer(&with(&json!({"iss": "https://evil.example"}))).refused(401, "Jwt issuer is not configured"),
        Row::jwt("j_noaud", &jw).bearer(&with(&json!({"aud": null}))).refused(403, "Audiences in Jwt are not allowed"),
        Row::jwt("j_audlist", &jw).bearer(&with(&json!({"aud": ["x", "svc-a"]}))),
        Row::jwt("j_aud_slash", &jw).bearer(&with(&json!({"aud": "https://svc-a/"}))),
        Row::jwt("replayed for another audience", &jw)
            .bearer(&with(&json!({"aud": "svc-b"})))
            .refused(403, "Audiences in Jwt are not allowed"),
        Row::jwt("j_algnone", &jw).bearer(&no_algorithm).refused(401, form),
        Row::jwt("hmac with a public key", &jw).bearer(&hmac).refused(401, "Jwks doesn't have key to match kid or alg from Jwt"),
        Row::jwt("j_miss_allow_missing", &jw),
        Row::jwt("j_basic (Istio lets it pass)", &jw).header("authorization", "Basic abc").saw("authorization", "Basic abc"),
        Row::jwt("lower case scheme", &jw).header("authorization", &format!("bearer {good}")),
        Row::jwt("lower case scheme, required", &jw)
            .required()
            .header("authorization", &format!("bearer {good}"))
            .denied("ns[default]-policy[p0]-rule[0]"),
        Row::jwt("two authorization headers", &jw).bearer(&good).bearer(&good).refused(401, form),
        Row::jwt("j_miss_allow_bad", &jw).bearer(&with(&json!({"exp": now() - 600}))).refused(401, "Jwt is expired"),
        Row::jwt("j_noaudreq", &json!([{"issuer": ISSUER, "jwks": issuer.jwks()}])).bearer(&with(&json!({"aud": null}))),
        Row::jwt("j_two_one (Istio asks for any)", &two).bearer(&good),
        Row::jwt("j_or_bad_iss", &two).bearer(&with(&json!({"iss": "https://evil.example"}))).refused(401, "Jwt issuer is not configured"),
        Row::jwt("j_or_expired", &two).bearer(&with(&json!({"exp": now() - 600}))).refused(401, "Jwt is expired"),
        Row::jwt("j_istio_bad_iss", &two)
            .bearer(&with(&json!({"iss": "https://evil.example"})))
            .refused(401, "Jwt issuer is not configured"),
        Row::jwt("j_fwd", &forwarding)
            .path("/jw_fwd/echo")
            .bearer(&full_token)
            .header("x-jwt-sub", "mallory")
            .header("x-jwt-payload", "forged")
            .saw("authorization", &format!("Bearer {full_token}"))
            .saw("x-jwt-payload", &payload)
            .saw("x-jwt-sub", "alice")
            .saw("x-jwt-groups", "WyJkZXYiLCJvcHMiXQ=="),
        Row::jwt("forged claims without a token", &forwarding)
            .header("x-jwt-sub", "mallory")
            .header("X-Jwt-Payload", "forged")
            .saw("x-jwt-sub", "")
            .saw("x-jwt-payload", ""),
        Row::jwt("j_nofwd", &jw).path("/jw/echo").bearer(&good).saw("authorization", ""),
        Row::jwt("j_query_echo", &elsewhere).path(&format!("/jw_cookie/x?a=1&tkn={good}")).line("GET /jw_cookie/x?a=1 HTTP/1.1"),
        Row::jwt("j_q_bad", &elsewhere)
            .path(&format!("/jw_cookie/x?tkn={}", with(&json!({"exp": now() - 600}))))
            .refused(401, "Jwt is expired"),
        Row::jwt("j_cookie", &elsewhere).header("cookie", &format!("a=b; tok={good}")),
        Row::jwt("j_header_prefix", &elsewhere).header("x-tok", &format!("T {good}")).saw("x-tok", ""),
        Row::jwt("usual place is not looked at", &elsewhere).required().bearer(&good).denied("ns[default]-policy[p0]-rule[0]"),
        Row { authorization: vec![dev.clone()], ..Row::jwt("j_claim_ok", &jw) }.bearer(&full_token),
        Row { authorization: vec![dev], ..Row::jwt("j_claim_no", &jw) }.bearer(&good).denied("none"),
        Row::jwt("j_grpc", &jw).header("content-type", "application/grpc").bearer("abc").grpc(16, form),
        Row { method: "HEAD", ..Row::jwt("j_head", &jw) }.bearer("abc").refused(401, form).bodiless(),
        Row { method: "OPTIONS", ..Row::jwt("preflight passes in Istio", &jw) }
            .bearer("abc")
            .header("origin", "http://a.example")
            .header("access-control-request-method", "GET"),
        Row { method: "OPTIONS", ..Row::jwt("options that is no preflight", &jw) }.bearer("abc").refused(401, form),
        Row::authz("rb_allow_none", &[json!({})]).denied("none"),
        Row::authz("rb_allow_nomatch", &[method("POST")]).denied("none"),
        Row::authz("rb_allow", &[method("GET")]),
        Row::authz("rb_deny", &[deny(json!({"methods": ["GET"]}))]).denied("ns[default]-policy[p0]-rule[0]"),
        Row::authz("rb_deny_nomatch", &[deny(json!({"paths": ["/nope"]}))]),
        Row::authz("rb_log", &[json!({"action": "AUDIT", "rules": [{}]})]),
        Row::authz("rb_path_q", &[json!({"rules": [{"to": [{"operation": {"paths": ["/rb_path_q/x"]}}]}]})]).path("/rb_path_q/x?a=1"),
        Row::authz("rb_grpc", &[json!({})]).header("content-type", "application/grpc").grpc_denied(),
        Row::authz("rb_notmethod", &[json!({"rules": [{"when": [{"key": "request.headers[x-adm]", "notValues": ["*"]}]}]})])
            .header("x-adm", "1")
            .denied("none"),
        Row::authz("host", &[json!({"rules": [{"to": [{"operation": {"hosts": ["SVC.example"]}}]}]})]),
        Row::authz("path tricks", &[deny(json!({"paths": ["/admin*"]}))]).path("/x/..%2fadmin").denied("ns[default]-policy[p0]-rule[0]"),
        Row::authz("dot segments", &[deny(json!({"paths": ["/admin*"]}))]).path("/x/../admin/y").denied("ns[default]-policy[p0]-rule[0]"),
        Row::authz("spoofed x-forwarded-for", &[json!({"rules": [{"from": [{"source": {"remoteIpBlocks": ["203.0.113.0/24"]}}]}]})])
            .path("/x")
            .header("x-forwarded-for", "203.0.113.7")
            .header("forwarded", "for=203.0.113.7")
            .denied("none"),
        Row::authz(
            "spoofed identity",
            &[json!({"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/admin"]}}]}]})],
        )
        .path("/x")
        .header("x-forwarded-client-cert", "By=x;URI=spiffe://cluster.local/ns/default/sa/admin")
        .header("baggage", "k8s.namespace.name=default,service.name=admin")
        .denied("none"),
    ]
}

impl Row {
    fn line(mut self, line: &'static str) -> Self {
        self.expect.line = Some(line);
        self
    }

    fn bodiless(mut self) -> Self {
        self.expect.body = String::new();
        self
    }

    fn grpc(mut self, status: u16, text: &str) -> Self {
        self = self.refused(401, text);
        self.expect.status = 200;
        self.expect.body = String::new();
        self.expect.headers =
            vec![("content-type", "application/grpc".into()), ("grpc-status", status.to_string()), ("grpc-message", text.to_owned())];
        self
    }

    fn grpc_denied(mut self) -> Self {
        self = self.denied("none").grpc(7, "RBAC: access denied");
        self.expect.details = "rbac_access_denied_matched_policy[none]".into();
        self
    }

    fn documents(&self, upstream: SocketAddr) -> Vec<Value> {
        let mut all = vec![server_pod()];
        all.extend(service("server", VIP.split(':').next().expect("an address"), "http", &[upstream]));
        let selected = |spec: &Value| {
            let mut spec = spec.clone();
            spec["selector"] = json!({"matchLabels": {"app": "server"}});
            spec
        };
        if !self.authentication.is_null() {
            all.push(security("RequestAuthentication", "jwt", &selected(&self.authentication)));
        }
        let policies = self.authorization.iter().enumerate();
        all.extend(policies.map(|(i, p)| security("AuthorizationPolicy", &format!("p{i}"), &selected(p))));
        all
    }

    fn request(&self, id: &str) -> Vec<u8> {
        let mut text = format!("{} {} HTTP/1.1\r\nhost: svc.example\r\nx-id: {id}\r\nx-request-id: {id}\r\n", self.method, self.path);
        for (name, value) in &self.headers {
            text += &format!("{name}: {value}\r\n");
        }
        (text + "\r\n").into_bytes()
    }

    fn differences(&self, got: &Got, attempts: &[scripted::Attempt]) -> Vec<String> {
        let Expect { status, body, headers, saw, line, .. } = &self.expect;
        let mut all = Vec::new();
        let mut check = |what: &str, wanted: &str, found: &str| {
            if wanted != found {
                all.push(format!("{what}: {found:?}, expected {wanted:?}"));
            }
        };
        check("status", &status.to_string(), &got.status);
        if self.method != "HEAD" && !self.path.ends_with("/echo") {
            check("body", body, &got.body);
        }
        for (name, value) in headers {
            check(name, value, got.header(name).unwrap_or("(none)"));
        }
        let refused = self.expect.details != "via_upstream";
        check("attempts that reached the application", if refused { "0" } else { "1" }, &attempts.len().to_string());
        if let Some(attempt) = attempts.first() {
            for (name, value) in saw {
                let found = attempt.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect::<Vec<_>>();
                check(name, value, &found.join("|"));
            }
            if let Some(line) = line {
                check("request line", line, &attempt.line);
            }
        }
        all
    }
}

fn details(lines: &[Line], reporter: &str) -> Option<String> {
    let line = lines.iter().rev().find(|l| l.get("reporter").is_some_and(|r| r == reporter))?;
    line.get("response_code_details").cloned()
}

/// The recorded rows, three ways in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_rows_are_answered_alike_on_every_way_in() {
    let seen = Seen::default();
    let upstream = scripted::http1("up1", &seen).expect("an upstream");
    let engine = Engine::start_as(NEAR_CLIENT, &[server_pod()]).await.expect("started");
    let issuer = Issuer::default();
    let mut failures = BTreeMap::new();
    let only = std::env::var("ROW").ok();
    for row in rows(&issuer).iter().filter(|r| only.as_ref().is_none_or(|o| r.case.contains(o.as_str()))) {
        engine.apply(&row.documents(upstream)).await.expect("applied");
        for way in ["outside", "node"] {
            let id = format!("{}-{way}", row.case.replace(' ', "_"));
            let mut stream = match way {
                "outside" => engine.connect_inbound(upstream.port()).await,
                _ => engine.connect(VIP.parse().expect("an address")).await,
            }
            .expect("connected");
            let got = exchange(&mut stream, row.request(&id), row.method == "HEAD").await;
            let mut all = row.differences(&got, &seen.of(&id));
            // Within the node both ends tell of it.
            let lines = engine.logged_for(&id, if way == "node" { 2 } else { 1 }).await;
            let refused = row.expect.details != "via_upstream";
            // A connection that is refused, or looked at no further, has no requests at the destination.
            let found = match details(&lines, if way == "outside" || refused { "destination" } else { "source" }) {
                None if way == "node" => details(&lines, "source"),
                None if !refused => Some("via_upstream".to_owned()),
                found => found,
            };
            if found.as_ref() != Some(&row.expect.details) {
                all.push(format!("details: {found:?}, expected {:?}", row.expect.details));
            }
            if !all.is_empty() {
                failures.insert(format!("{} ({way})", row.case), all);
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// The same answers over HTTP/2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_over_http2_meet_the_same_policies() {
    let seen = Seen::default();
    let upstream = scripted::http2("up2", &seen).await.expect("an upstream");
    let issuer = Issuer::default();
    let rule = json!({"issuer": ISSUER, "jwks": issuer.jwks()});
    let mut documents = vec![server_pod()];
    documents.push(security("RequestAuthentication", "jwt", &json!({"jwtRules": [rule]})));
    documents.push(security("AuthorizationPolicy", "p", &json!({"rules": [{"to": [{"operation": {"methods": ["GET"], "paths": ["/open/*"]}}]}, {"when": [{"key": "request.auth.claims[sub]", "values": ["alice"]}]}]})));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let stream = engine.connect_inbound(upstream.port()).await.expect("connected");
    let (mut send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut ask = async |path: &str, token: Option<&str>| {
        let mut request = http::Request::builder().uri(format!("http://svc.example{path}"));
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let (response, _) = send.send_request(request.body(()).expect("a request"), true).expect("sent");
        response.await.map(|r| r.status().as_u16()).map_err(|e| e.to_string())
    };
    let alice = issuer.token(&claims(&json!({})));
    for (path, token, status) in [
        ("/open/a", None, 200),
        ("/other", None, 403),
        ("/other", Some(alice.as_str()), 200),
        ("/open/a", Some("abc"), 401),
        ("/open/b", None, 200),
    ] {
        assert_eq!(ask(path, token).await, Ok(status), "{path}");
    }
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
        for _ in 0..200 {
            if !seen.of(&format!("slow-{way}")).is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        engine.apply(&base(&deny)).await.expect("applied");
        let begun = std::time::Instant::now();
        let got = waiting.await.expect("joined");
        assert!(got.status != "200" && begun.elapsed() < Duration::from_secs(2), "{way}: {got:?}");
    }
    assert_eq!(SERVER, "127.0.0.1");
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

/// Routing by claims of a token the destination accepts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_routed_by_verified_claims() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let issuer = Issuer::default();
    let mut documents = served(
        one,
        &[security(
            "RequestAuthentication",
            "jwt",
            &json!({"jwtRules": [{"issuer": ISSUER, "jwks": issuer.jwks(), "forwardOriginalToken": true}]}),
        )],
    );
    documents.extend(service("other", "10.99.0.2", "http", &[two]));
    let to = |host: &str| json!([{"destination": {"host": host}}]);
    documents.push(virtual_service(
        "server",
        &json!([
            {"match": [{"headers": {"@request.auth.claims.groups": {"exact": "beta"}}}], "route": to("other")},
            {"match": [{"headers": {"@request.auth.claims[deep][er]": {"prefix": "y"}}, "withoutHeaders": {"@request.auth.claims.sub": {"exact": "bob"}}}], "route": to("other")},
            {"route": to("server")},
        ]),
    ));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let bearer = |issuer: &Issuer, more: &Value| format!("authorization: Bearer {}\r\n", issuer.token(&claims(more)));
    for (n, (header, expected)) in [
        (String::new(), "up1 200 #1\n"),
        (bearer(&issuer, &json!({"groups": ["alpha", "beta"]})), "up2 200 #1\n"),
        (bearer(&issuer, &json!({"groups": ["alpha"]})), "up1 200 #1\n"),
        (bearer(&issuer, &json!({"deep": {"er": "yes"}})), "up2 200 #1\n"),
        (bearer(&issuer, &json!({"deep": {"er": "yes"}, "sub": "bob"})), "up1 200 #1\n"),
        (bearer(&Issuer::default(), &json!({"groups": ["beta"]})), "Jwt verification fails"),
        (bearer(&issuer, &json!({"groups": ["beta"], "exp": now() - 600})), "Jwt is expired"),
    ]
    .into_iter()
    .enumerate()
    {
        let got = ask(&engine, "node", one, &get("/x", &format!("claims-{n}"), &header)).await;
        assert_eq!(got.body, expected, "{header}");
    }
}

/// Routes are asked when tokens have been verified: what claims are written to is not the client's, and a token that is not taken is
/// refused where no route would take the request either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_routed_by_headers_of_verified_claims() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let issuer = Issuer::default();
    let rules =
        json!({"jwtRules": [{"issuer": ISSUER, "jwks": issuer.jwks(), "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}]}]});
    let mut documents = served(one, &[security("RequestAuthentication", "jwt", &rules)]);
    documents.extend(service("other", "10.99.0.2", "http", &[two]));
    let to = |host: &str| json!([{"destination": {"host": host}}]);
    documents.push(virtual_service(
        "server",
        &json!([
            {"match": [{"headers": {"x-user": {"exact": "root"}}}], "route": to("other")},
            {"match": [{"headers": {"authorization": {}}}], "route": to("other")},
            {"match": [{"uri": {"prefix": "/claims"}, "headers": {"@request.auth.claims.sub": {"exact": "x"}}}], "route": to("other")},
            {"match": [{"uri": {"prefix": "/x"}}], "route": to("server")},
        ]),
    ));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let bearer = |issuer: &Issuer, sub: &str| format!("authorization: Bearer {}\r\n", issuer.token(&claims(&json!({"sub": sub}))));
    for (n, (path, header, expected)) in [
        ("/x", "x-user: root\r\n".to_owned(), ("200", "up1 200 #1\n")),
        ("/x", bearer(&issuer, "root"), ("200", "up2 200 #1\n")),
        ("/x", bearer(&issuer, "bob") + "x-user: root\r\n", ("200", "up1 200 #1\n")),
        ("/claims", bearer(&issuer, "x"), ("200", "up2 200 #1\n")),
        ("/claims", bearer(&issuer, "y"), ("404", "")),
        ("/claims", String::new(), ("404", "")),
        ("/claims", bearer(&Issuer::default(), "x"), ("401", "Jwt verification fails")),
        ("/none", bearer(&Issuer::default(), "x"), ("401", "Jwt verification fails")),
    ]
    .into_iter()
    .enumerate()
    {
        let got = ask(&engine, "node", one, &get(path, &format!("known-{n}"), &header)).await;
        assert_eq!((got.status.as_str(), got.body.as_str()), expected, "{n} {path} {header}");
    }
}

/// Ways past the gate that a review found.
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
    documents.extend(service("authz", "10.99.0.3", "http", &[authorizers::authorizer()]));
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
        (vec![judged.clone()], "TLS/1.2", false),
        (vec![judged.clone()], "h2c-14", false),
        (vec![judged], "websocket, TLS/1.2", false),
        (vec![], "TLS/1.2", true),
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
    for (protocol, stays) in [("websocket", true), ("TLS/1.2", false)] {
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
