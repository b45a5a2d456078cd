//! What a real Envoy was recorded to answer (`jwt` and `rbac` of the corpus).

use std::{collections::BTreeMap, net::SocketAddr};

use mesh_tests::{
    engine::{Engine, Line, NEAR_CLIENT, security, server_pod, service},
    scripted::{self, Seen},
    token::{Issuer, now},
    wire::{Got, exchange},
};
use serde_json::{Value, json};

use super::{ISSUER, VIP, claims};

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
