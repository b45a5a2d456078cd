//! Tables for authorization and mutual TLS modes.

mod layers;
mod naive;

use serde_json::{Value, json};

use super::*;
use crate::{
    id::{ObjectName, TrustDomain},
    resource::{self, AuthorizationPolicy, Object, Parsed, authorization::Action},
};

fn parse(kind: &str, namespace: &str, spec: &Value) -> Object {
    let document =
        json!({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": "p", "namespace": namespace}, "spec": spec});
    match resource::parse(&document, "default").expect("valid policy") {
        Parsed::Object(named) => named.object,
        Parsed::Ignored(kind) => panic!("{kind} ignored"),
    }
}

fn rejected(kind: &str, spec: &Value) -> String {
    let document = json!({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": "p"}, "spec": spec});
    resource::parse(&document, "default").expect_err("must be refused").to_string()
}

fn domains() -> TrustDomains {
    TrustDomains {
        local: TrustDomain::parse("mesh.example").expect("valid"),
        aliases: vec![TrustDomain::parse("old.example").expect("valid")],
    }
}

fn authorization(spec: &Value) -> AuthorizationPolicy {
    let Object::AuthorizationPolicy(p) = parse("AuthorizationPolicy", "default", spec) else { panic!("not a policy") };
    p
}

fn policy(specs: &[Value]) -> WorkloadPolicy {
    let compiled = |(i, spec): (usize, &Value)| {
        let name = if i == 0 { "p".to_owned() } else { format!("p{i}") };
        CompiledPolicy::compile(&ObjectName::new("default", &name), &authorization(spec), &domains())
    };
    let all = specs.iter().enumerate().map(compiled).collect::<Vec<_>>();
    let governing = Governing { authorization: Arc::new(Authorization::new(&all)), ..Governing::default() };
    WorkloadPolicy { everywhere: Arc::new(governing), ..WorkloadPolicy::default() }
}

fn facts(peer: &str, source: &str, destination: &str) -> Facts {
    let peer = (!peer.is_empty()).then(|| SpiffeId::parse(&format!("spiffe://{peer}")).expect("valid"));
    Facts::new(peer, source.parse().expect("valid"), destination.parse().expect("valid"))
}

fn head(method: &str, host: &str, target: &str, headers: &[(&str, &str)]) -> RequestHead {
    let mut map = http::HeaderMap::new();
    for (name, value) in headers {
        map.append(http::HeaderName::try_from(*name).expect("name"), value.parse().expect("value"));
    }
    RequestHead {
        method: method.parse().expect("method"),
        scheme: crate::route::request::Scheme::Http,
        authority: host.parse().expect("host"),
        target: target.parse().expect("target"),
        headers: map,
    }
}

fn claims(payload: &Value) -> Verified {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
    let text = format!("{}.{}.AAAA", part(&json!({"alg": "RS256"})), part(payload));
    let token = crate::jwt::Token::parse(&text).expect("a token");
    let rule = json!({"jwtRules": [{"issuer": "i", "jwksUri": "http://i/", "spaceDelimitedClaims": ["words"]}]});
    let Object::RequestAuthentication(r) = parse("RequestAuthentication", "default", &rule) else { panic!("not one") };
    Verified { token, rule: r.rules[0].clone(), beside: Vec::new() }
}

fn allowed(policy: &WorkloadPolicy, facts: &Facts, head: &RequestHead, claims: Option<&Verified>) -> bool {
    policy.request(facts, &Request::new(head, claims, Some(facts.source))).is_ok()
}

/// From an app in namespace `web` as account `front`, IPv4, to port 8080.
fn web() -> Facts {
    facts("mesh.example/ns/web/sa/front", "10.0.0.5", "10.0.0.9:8080")
}

#[test]
fn authorization_follows_the_fields() {
    let from = |field: &str, values: Value| json!({"rules": [{"from": [{"source": {field: values}}]}]});
    let to = |field: &str, values: Value| json!({"rules": [{"to": [{"operation": {field: values}}]}]});
    let when = |key: &str, values: Value| json!({"rules": [{"when": [{"key": key, "values": values}]}]});
    let anonymous = facts("", "10.0.0.5", "10.0.0.9:8080");
    let v6 = facts("mesh.example/ns/web/sa/front", "fd00::5", "[fd00::9]:8080");
    let mapped = facts("mesh.example/ns/web/sa/front", "::ffff:10.0.0.5", "10.0.0.9:8080");
    let cases = [
        (json!({}), web(), false),
        (json!({"rules": [{}]}), web(), true),
        (json!({"rules": [{}]}), anonymous.clone(), true),
        (from("principals", json!(["mesh.example/ns/web/sa/front"])), web(), true),
        (from("principals", json!(["mesh.example/ns/web/sa/other"])), web(), false),
        (from("principals", json!(["cluster.local/ns/web/sa/front"])), web(), true),
        (from("principals", json!(["old.example/ns/web/*"])), web(), true),
        (from("principals", json!(["elsewhere/ns/web/sa/front"])), web(), false),
        (from("principals", json!(["*/sa/front"])), web(), true),
        (from("principals", json!(["*"])), web(), true),
        (from("principals", json!(["*"])), anonymous.clone(), false),
        (from("notPrincipals", json!(["*"])), anonymous.clone(), true),
        (from("notPrincipals", json!(["*"])), web(), false),
        (from("notPrincipals", json!(["mesh.example/ns/web/sa/front"])), web(), false),
        (from("notPrincipals", json!(["mesh.example/ns/web/sa/other"])), web(), true),
        (from("namespaces", json!(["web"])), web(), true),
        (from("namespaces", json!(["we*"])), web(), true),
        (from("namespaces", json!(["web"])), anonymous.clone(), false),
        (from("notNamespaces", json!(["web"])), web(), false),
        (from("notNamespaces", json!(["web"])), anonymous.clone(), true),
        (from("serviceAccounts", json!(["web/front"])), web(), true),
        (from("serviceAccounts", json!(["front"])), web(), false),
        (from("notServiceAccounts", json!(["web/front"])), web(), false),
        (from("ipBlocks", json!(["10.0.0.0/24"])), web(), true),
        (from("ipBlocks", json!(["10.0.0.5"])), web(), true),
        (from("ipBlocks", json!(["10.0.1.0/24"])), web(), false),
        (from("ipBlocks", json!(["10.0.0.0/24"])), mapped, true),
        (from("ipBlocks", json!(["fd00::/64"])), v6.clone(), true),
        (from("ipBlocks", json!(["0.0.0.0/0"])), v6.clone(), false),
        (from("notIpBlocks", json!(["10.0.0.0/24"])), web(), false),
        (from("remoteIpBlocks", json!(["10.0.0.0/24"])), web(), true),
        (from("notRemoteIpBlocks", json!(["10.0.0.0/24"])), web(), false),
        (to("ports", json!(["8080"])), web(), true),
        (to("ports", json!(["80"])), web(), false),
        (to("notPorts", json!(["8080"])), web(), false),
        (when("source.ip", json!(["10.0.0.5"])), web(), true),
        (when("source.namespace", json!(["web"])), web(), true),
        (when("source.principal", json!(["mesh.example/ns/web/sa/front"])), web(), true),
        (when("source.serviceAccount", json!(["web/front"])), web(), true),
        (when("destination.port", json!(["8080"])), web(), true),
        (when("destination.ip", json!(["fd00::9"])), v6, true),
        // An ALLOW rule that asks for HTTP cannot be decided here, so it allows nothing.
        (to("methods", json!(["GET"])), web(), false),
        (when("request.headers[x]", json!(["a"])), web(), false),
        (from("requestPrincipals", json!(["*"])), web(), false),
    ];
    for (spec, facts, allowed) in cases {
        assert_eq!(policy(std::slice::from_ref(&spec)).opaque(&facts, &[]).is_ok(), allowed, "{spec} {facts:?}");
    }
}

#[test]
fn clauses_are_and_alternatives_are_or() {
    let spec = json!({"rules": [{
        "from": [{"source": {"namespaces": ["a"]}}, {"source": {"namespaces": ["web"], "ipBlocks": ["10.0.0.0/24"]}}],
        "to": [{"operation": {"ports": ["8080"]}}],
        "when": [{"key": "source.serviceAccount", "values": ["web/front"]}],
    }]});
    assert!(policy(std::slice::from_ref(&spec)).opaque(&web(), &[]).is_ok());
    let other_port = facts("mesh.example/ns/web/sa/front", "10.0.0.5", "10.0.0.9:81");
    assert!(policy(std::slice::from_ref(&spec)).opaque(&other_port, &[]).is_err());
    let other_net = facts("mesh.example/ns/web/sa/front", "10.0.9.5", "10.0.0.9:8080");
    assert!(policy(&[spec]).opaque(&other_net, &[]).is_err());
}

#[test]
fn deny_wins_over_allow_and_is_wider_without_http() {
    let allow = json!({"rules": [{}]});
    let deny =
        json!({"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["web"]}}], "to": [{"operation": {"methods": ["POST"]}}]}]});
    let both = policy(&[allow, deny]);
    assert_eq!(
        both.opaque(&web(), &[]).expect_err("denied"),
        Denial::DeniedBy { policy: "default/p1".into(), rule: "ns[default]-policy[p1]-rule[0]".into() }
    );
    assert!(both.opaque(&facts("mesh.example/ns/other/sa/x", "10.0.0.5", "10.0.0.9:8080"), &[]).is_ok());
}

#[test]
fn audit_never_denies_and_is_observed() {
    let all = policy(&[json!({"action": "AUDIT", "rules": [{}]})]);
    assert!(all.opaque(&web(), &[]).is_ok());
    let observed = all.everywhere.observed(&web(), None);
    assert_eq!((observed.audited.as_deref(), observed.shadow), (Some("default/p"), None));
}

#[test]
fn mtls_mode_is_that_of_the_narrowest_scope() {
    let mode = |mode: &str| {
        let Object::PeerAuthentication(p) = parse("PeerAuthentication", "default", &json!({"mtls": {"mode": mode}})) else { panic!() };
        p
    };
    let cases = [
        (None, None, None, false),
        (Some("STRICT"), None, None, true),
        (Some("STRICT"), Some("UNSET"), None, true),
        (Some("STRICT"), Some("PERMISSIVE"), None, false),
        (Some("STRICT"), Some("DISABLE"), None, false),
        (Some("PERMISSIVE"), Some("PERMISSIVE"), Some("STRICT"), true),
        (Some("STRICT"), Some("STRICT"), Some("PERMISSIVE"), false),
    ];
    for (mesh, namespace, workload, strict) in cases {
        let [m, n, w] = [mesh, namespace, workload].map(|s| s.map(mode));
        assert_eq!(effective_mtls(m.as_ref(), n.as_ref(), w.as_ref()).is_strict(80), strict, "{mesh:?} {namespace:?} {workload:?}");
    }
}

#[test]
fn port_level_modes_override_the_workload() {
    let spec = json!({"selector": {"matchLabels": {"app": "a"}}, "mtls": {"mode": "STRICT"}, "portLevelMtls": {"8080": {"mode": "PERMISSIVE"}, "9090": {"mode": "UNSET"}}});
    let Object::PeerAuthentication(p) = parse("PeerAuthentication", "default", &spec) else { panic!() };
    let mtls = effective_mtls(None, None, Some(&p));
    let all = WorkloadPolicy { mtls, ..WorkloadPolicy::default() };
    assert!(all.opaque(&facts("", "10.0.0.5", "10.0.0.9:8080"), &[]).is_ok());
    assert_eq!(all.opaque(&facts("", "10.0.0.5", "10.0.0.9:9090"), &[]).expect_err("strict"), Denial::PlaintextUnderStrict);
    assert!(all.opaque(&facts("mesh.example/ns/a/sa/b", "10.0.0.5", "10.0.0.9:9090"), &[]).is_ok());
}

#[test]
fn bad_policies_are_refused_with_field_and_remedy() {
    let cases = [
        (
            "AuthorizationPolicy",
            json!({"rules": [{"from": [{"source": {"ipBlocks": ["10.0.0.0/33"]}}]}]}),
            "spec.rules[0].from[0].source.ipBlocks[0]",
        ),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"from": [{"source": {"notIpBlocks": ["x"]}}]}]}),
            "spec.rules[0].from[0].source.notIpBlocks[0]",
        ),
        ("AuthorizationPolicy", json!({"rules": [{"from": [{"source": {"principal": ["x"]}}]}]}), "spec.rules[0].from[0].source"),
        ("AuthorizationPolicy", json!({"rules": [{"from": [{"source": {}}]}]}), "is empty"),
        ("AuthorizationPolicy", json!({"rules": [{"to": [{"operation": {"ports": ["http"]}}]}]}), "spec.rules[0].to[0].operation.ports[0]"),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"from": [{"source": {"principals": [""]}}]}]}),
            "spec.rules[0].from[0].source.principals[0]",
        ),
        ("AuthorizationPolicy", json!({"action": "CUSTOM", "rules": [{}]}), "spec.provider.name"),
        ("AuthorizationPolicy", json!({"action": "deny"}), "spec.action"),
        ("AuthorizationPolicy", json!({"action": "DENY"}), "spec.rules"),
        ("AuthorizationPolicy", json!({"rules": [{"when": [{"key": "source.colour", "values": ["x"]}]}]}), "spec.rules[0].when[0].key"),
        ("AuthorizationPolicy", json!({"rules": [{"when": [{"key": "source.ip"}]}]}), "spec.rules[0].when[0]"),
        (
            "AuthorizationPolicy",
            json!({"targetRefs": [{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "x"}]}),
            "spec.targetRefs[0]",
        ),
        (
            "AuthorizationPolicy",
            json!({"targetRefs": [{"kind": "Service", "name": "x"}], "selector": {"matchLabels": {"a": "b"}}}),
            "spec.targetRefs",
        ),
        (
            "AuthorizationPolicy",
            json!({"rules": [{"to": [{"operation": {"paths": ["/a/{*}b"]}}]}]}),
            "spec.rules[0].to[0].operation.paths[0]",
        ),
        ("PeerAuthentication", json!({"mtls": {"mode": "strict"}}), "spec.mtls.mode"),
        ("PeerAuthentication", json!({"portLevelMtls": {"80": {"mode": "STRICT"}}}), "spec.portLevelMtls"),
        (
            "PeerAuthentication",
            json!({"selector": {"matchLabels": {"a": "b"}}, "portLevelMtls": {"0": {"mode": "STRICT"}}}),
            "spec.portLevelMtls.0",
        ),
    ];
    for (kind, spec, part) in cases {
        let message = rejected(kind, &spec);
        assert!(message.contains(part) && message.contains(kind), "{spec}: {message}");
    }
}

#[test]
fn requests_are_judged_by_the_fields() {
    let to = |field: &str, values: Value| json!({"rules": [{"to": [{"operation": {field: values}}]}]});
    let when = |key: &str, values: Value| json!({"rules": [{"when": [{"key": key, "values": values}]}]});
    let unless = |key: &str, values: Value| json!({"rules": [{"when": [{"key": key, "notValues": values}]}]});
    let from = |field: &str, values: Value| json!({"rules": [{"from": [{"source": {field: values}}]}]});
    let mut request =
        head("GET", "Web.example:80", "/a/b?x=1", &[("x-role", "admin"), ("x-role", "user"), ("x-odd", "é"), ("x-empty", "")]);
    request.headers.append("x-bytes", http::HeaderValue::from_bytes(b"evil\xff").expect("a value"));
    let user = claims(&json!({"iss": "https://issuer/x", "sub": "alice", "aud": ["a", "b"], "azp": "client", "role": ["admin", "dev"],
        "deep": {"er": "yes"}, "scope": "read write", "words": "one two", "plain": "three four", "on": true}));
    let cases = [
        (to("methods", json!(["GET"])), true),
        (to("methods", json!(["get"])), false),
        (to("methods", json!(["P*", "*"])), true),
        (to("notMethods", json!(["GET"])), false),
        (to("hosts", json!(["web.EXAMPLE:80"])), true),
        (to("hosts", json!(["web.example"])), false),
        (to("hosts", json!(["web.example:*"])), true),
        (to("notHosts", json!(["*:80"])), false),
        (to("paths", json!(["/a/b"])), true),
        (to("paths", json!(["/a/b?x=1"])), false),
        (to("paths", json!(["/A/b"])), false),
        (to("paths", json!(["/a*"])), true),
        (to("paths", json!(["*/b"])), true),
        (to("paths", json!(["/a/{*}"])), true),
        (to("paths", json!(["/{**}"])), true),
        (to("notPaths", json!(["/a/{*}"])), false),
        (when("request.headers[x-role]", json!(["user"])), true),
        (when("request.headers[X-Role]", json!(["adm*"])), true),
        (when("request.headers[x-none]", json!(["*"])), false),
        (unless("request.headers[x-none]", json!(["*"])), true),
        (when("request.headers[x-empty]", json!(["*"])), true),
        (unless("request.headers[x-empty]", json!(["*"])), false),
        (when("request.headers[x-bytes]", json!(["*"])), true),
        (when("request.headers[x-bytes]", json!(["evil*"])), true),
        (unless("request.headers[x-bytes]", json!(["evil*"])), false),
        (unless("request.headers[x-role]", json!(["user"])), false),
        (from("requestPrincipals", json!(["*"])), true),
        (from("requestPrincipals", json!(["https://issuer/x/alice"])), true),
        (from("requestPrincipals", json!(["https://issuer/x/*"])), true),
        (from("requestPrincipals", json!(["*/alice"])), true),
        (from("requestPrincipals", json!(["*/bob"])), false),
        (from("notRequestPrincipals", json!(["*/bob"])), true),
        (from("notRequestPrincipals", json!(["*"])), false),
        (when("request.auth.principal", json!(["https://issuer/x/alice"])), true),
        (when("request.auth.audiences", json!(["b"])), true),
        (when("request.auth.audiences", json!(["c"])), false),
        (when("request.auth.presenter", json!(["client"])), true),
        (when("request.auth.claims[role]", json!(["dev"])), true),
        (when("request.auth.claims[role]", json!(["ops"])), false),
        (when("request.auth.claims[deep][er]", json!(["yes"])), true),
        (when("request.auth.claims[deep]", json!(["*"])), false),
        (when("request.auth.claims[scope]", json!(["write"])), true),
        (when("request.auth.claims[words]", json!(["two"])), true),
        (when("request.auth.claims[plain]", json!(["four"])), false),
        (when("request.auth.claims[on]", json!(["true"])), false),
        (from("trustDomains", json!(["mesh.example"])), true),
        (when("source.trustDomain", json!(["other"])), false),
        (when("connection.sni", json!(["*"])), false),
    ];
    for (spec, expected) in cases {
        let all = policy(std::slice::from_ref(&spec));
        assert_eq!(allowed(&all, &web(), &request, Some(&user)), expected, "{spec}");
        let asks = matches!(all.connection(&web()), Ok(Verdict::PerRequest(_)));
        let http_only = !spec.to_string().contains("rustDomain");
        assert_eq!(asks, http_only, "{spec}");
    }
    let nobody = policy(&[from("requestPrincipals", json!(["*"]))]);
    assert!(!allowed(&nobody, &web(), &request, None));
    let no_subject = claims(&json!({"iss": "i"}));
    assert!(!allowed(&nobody, &web(), &request, Some(&no_subject)));
}

#[test]
fn paths_that_can_be_read_in_two_ways_never_get_more() {
    let allow = policy(&[json!({"rules": [{"to": [{"operation": {"paths": ["/public/*"]}}]}]})]);
    let deny = policy(&[json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/admin*"]}}]}]})]);
    let but = policy(&[json!({"action": "DENY", "rules": [{"to": [{"operation": {"notPaths": ["/public/*"]}}]}]})]);
    for path in [
        "/public/..%2fadmin",
        "/public/..;/admin",
        "/public/%2e%2e%2fadmin",
        "/public//..;x/..;x/admin",
        "//admin",
        "/%61dmin",
        "/x/..%5cadmin",
    ] {
        let request = head("GET", "h", path, &[]);
        assert!(!allowed(&allow, &web(), &request, None), "{path} is allowed");
        assert!(!allowed(&deny, &web(), &request, None), "{path} is not denied");
        assert!(!allowed(&but, &web(), &request, None), "{path} is not denied by notPaths");
    }
    let fine = head("GET", "h", "/public/a%20b;v=1", &[]);
    assert!(allowed(&allow, &web(), &fine, None) && allowed(&deny, &web(), &fine, None) && allowed(&but, &web(), &fine, None));
    let slashes = policy(&[json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/admin/*"]}}]}]})]);
    assert!(!allowed(&slashes, &web(), &head("GET", "h", "//admin/..;/x", &[]), None));
    let public = head("GET", "h", "/public/..%2fadmin/..;/..;/public/x", &[]);
    assert!(!allowed(&allow, &web(), &public, None));
    let literal = policy(&[json!({"rules": [{"to": [{"operation": {"paths": ["/@scope%2fname"]}}]}]})]);
    assert!(allowed(&literal, &web(), &head("GET", "h", "/@scope%2fname", &[]), None));
}

/// What is written for paths as they are sent protects, and opens, no other way than what is not.
#[test]
fn patterns_with_escapes_are_read_as_paths_are() {
    let of = |action: &str, pattern: &str| policy(&[json!({"action": action, "rules": [{"to": [{"operation": {"paths": [pattern]}}]}]})]);
    for (pattern, paths) in [
        ("/my%20admin*", &["/my%20admin", "//my%20admin", "/;/my%20admin", "/x/..%2fmy%20admin", "/my%2520admin"][..]),
        ("/%C3%A1dmin", &["/%C3%A1dmin", "/%c3%a1dmin", "/;x/%c3%A1dmin"]),
        ("/a;v=1/secret", &["/a;v=1/secret", "/a/secret;x", "//a/secret"]),
        ("*%20secret", &["/x%20secret", "/x%2520secret"]),
        ("/{*}/my%20admin", &["/a/my%20admin", "/a/my%2520admin"]),
    ] {
        for path in paths {
            assert!(!allowed(&of("DENY", pattern), &web(), &head("GET", "h", path, &[]), None), "{pattern}: {path} is not denied");
        }
        assert!(allowed(&of("ALLOW", pattern), &web(), &head("GET", "h", paths[0], &[]), None), "{pattern}: {}", paths[0]);
    }
    for path in ["/pub%20lic/..%2fadmin", "/pub%20lic/%2e%2e%2fadmin", "/pub%20lic/..%252fadmin"] {
        assert!(!allowed(&of("ALLOW", "/pub%20lic/*"), &web(), &head("GET", "h", path, &[]), None), "{path} is allowed");
    }
    assert!(allowed(&of("ALLOW", "/pub%20lic/*"), &web(), &head("GET", "h", "/pub%20lic/a%2fb", &[]), None));
}

#[test]
fn dry_run_policies_are_told_and_not_enforced() {
    let dry = |action: &str, path: &str| {
        let document = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "default", "annotations": {"istio.io/dry-run": "true"}},
            "spec": {"action": action, "rules": [{"to": [{"operation": {"paths": [path]}}]}]}});
        let Parsed::Object(named) = resource::parse(&document, "default").expect("valid") else { panic!("ignored") };
        let Object::AuthorizationPolicy(p) = named.object else { panic!("not a policy") };
        CompiledPolicy::compile(&ObjectName::new("default", "dry"), &p, &domains())
    };
    let governing =
        |policies: &[CompiledPolicy]| Governing { authorization: Arc::new(Authorization::new(policies)), ..Governing::default() };
    let (deny, allow) = (governing(&[dry("DENY", "/x")]), governing(&[dry("ALLOW", "/x")]));
    let facts = web();
    for (governing, path, expected) in [
        (&deny, "/x", Some(("default/dry", false))),
        (&deny, "/y", None),
        (&allow, "/x", Some(("default/dry", true))),
        (&allow, "/y", Some(("none", false))),
    ] {
        let head = head("GET", "h", path, &[]);
        let request = Request::new(&head, None, Some(facts.source));
        assert!(governing.request(&facts, &request).is_ok());
        let shadow = governing.observed(&facts, Some(&request)).shadow;
        assert_eq!(shadow.as_ref().map(|s| (&*s.policy, s.allowed)), expected, "{path}");
    }
}

#[test]
fn the_node_itself_is_always_let_in() {
    let mut all = policy(&[json!({})]);
    all.mtls.strict = true;
    let mut kubelet = facts("", "10.0.0.1", "10.0.0.9:8080");
    assert!(all.connection(&kubelet).is_err());
    kubelet.from_node = true;
    assert!(matches!(all.connection(&kubelet), Ok(Verdict::Allowed(_))));
}

#[test]
fn an_address_that_should_have_been_told_lets_nothing_through() {
    let remote = |action: &str| policy(&[json!({"action": action, "rules": [{"from": [{"source": {"remoteIpBlocks": ["10.0.0.0/8"]}}]}]})]);
    let head = head("GET", "h", "/", &[]);
    let unknown = Request::new(&head, None, None);
    assert!(remote("ALLOW").request(&web(), &unknown).is_err() && remote("DENY").request(&web(), &unknown).is_err());
}

#[test]
fn a_server_name_nobody_read_may_be_any() {
    let by_name = |action: &str, field: &str| {
        policy(&[json!({"action": action, "rules": [{"when": [{"key": "connection.sni", field: ["admin.example"]}]}]})])
    };
    let with = |sni: Sni| Facts { sni, ..web() };
    for (sni, allow, deny) in [
        (Sni::Unread, false, false),
        (Sni::Read(None), false, true),
        (Sni::Read(Some("admin.example".into())), true, false),
        (Sni::Read(Some("other.example".into())), false, true),
    ] {
        let facts = with(sni);
        assert_eq!(by_name("ALLOW", "values").opaque(&facts, &[]).is_ok(), allow, "{facts:?}");
        assert_eq!(by_name("DENY", "values").opaque(&facts, &[]).is_ok(), deny, "{facts:?}");
    }
    assert!(by_name("DENY", "notValues").opaque(&with(Sni::Unread), &[]).is_err());
}

#[test]
fn only_what_is_enforced_ends_a_connection_nobody_looks_into() {
    let asks = json!([{"to": [{"operation": {"methods": ["POST"]}}]}]);
    let observed = policy(&[json!({"action": "AUDIT", "rules": asks})]);
    assert!(matches!(observed.connection(&web()), Ok(Verdict::PerRequest(_))) && observed.allows_uninspected(&web()));
    assert!(!policy(&[json!({"action": "DENY", "rules": asks})]).allows_uninspected(&web()));
    assert!(!policy(&[json!({"rules": asks})]).allows_uninspected(&web()));
    assert!(policy(&[json!({"rules": [{}]})]).allows_uninspected(&web()));
}

#[test]
fn ports_of_policies_of_services_are_the_services() {
    let compiled = |operation: Value, action: &str| {
        let spec = json!({"action": action, "rules": [{"to": [{"operation": operation}]}]});
        CompiledPolicy::compile(&ObjectName::new("default", "p"), &authorization(&spec), &domains())
    };
    // The service's port and the pod's, and whether the service has another of the pod's number.
    for (operation, service, pod, ambiguous, matches) in [
        (json!({"ports": ["80"]}), 80, 8080, false, true),
        (json!({"ports": ["80"]}), 80, 8080, true, true),
        (json!({"ports": ["8080"]}), 80, 8080, false, true),
        (json!({"ports": ["8080"]}), 80, 8080, true, false),
        (json!({"ports": ["8080", "80"]}), 80, 8080, true, true),
        (json!({"ports": ["8080"]}), 8080, 8080, true, true),
        (json!({"ports": ["81"]}), 80, 8080, false, false),
        (json!({"notPorts": ["80"]}), 80, 8080, true, false),
        (json!({"notPorts": ["8080"]}), 80, 8080, false, false),
        (json!({"notPorts": ["8080"]}), 80, 8080, true, true),
    ] {
        for action in ["ALLOW", "DENY"] {
            let own = compiled(operation.clone(), action);
            let judged = own.reached_by(service, pod, ambiguous).unwrap_or(own);
            let governing = Governing { authorization: Arc::new(Authorization::new(&[judged])), ..Governing::default() };
            let policy = WorkloadPolicy { everywhere: Arc::new(governing), ..WorkloadPolicy::default() };
            let facts = facts("", "10.0.0.5", &format!("10.0.0.9:{pod}"));
            let passes = allowed(&policy, &facts, &head("GET", "a", "/", &[]), None);
            assert_eq!(passes, (action == "ALLOW") == matches, "{action} {operation}: {service} to {pod}, {ambiguous}");
        }
    }
}
