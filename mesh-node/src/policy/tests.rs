//! Tables for authorization and mutual TLS modes.

use serde_json::{Value, json};

use super::*;
use crate::{
    id::{ObjectName, TrustDomain},
    resource::{self, Object, Parsed, authorization::Action},
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

fn policy(specs: &[Value]) -> WorkloadPolicy {
    let mut all = WorkloadPolicy::default();
    for spec in specs {
        let Object::AuthorizationPolicy(p) = parse("AuthorizationPolicy", "default", spec) else { panic!("not a policy") };
        let compiled = Arc::new(CompiledPolicy::compile(&ObjectName::new("default", "p"), &p, &domains()));
        match p.action {
            Action::Allow => all.allow.push(compiled),
            Action::Deny => all.deny.push(compiled),
            Action::Audit => all.observe.push(compiled),
        }
    }
    all
}

fn facts(peer: &str, source: &str, destination: &str) -> Facts {
    Facts {
        peer: (!peer.is_empty()).then(|| SpiffeId::parse(&format!("spiffe://{peer}")).expect("valid")),
        source: source.parse().expect("valid"),
        destination: destination.parse().expect("valid"),
    }
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
        assert_eq!(policy(std::slice::from_ref(&spec)).authorize(&facts).is_ok(), allowed, "{spec} {facts:?}");
    }
}

#[test]
fn clauses_are_and_alternatives_are_or() {
    let spec = json!({"rules": [{
        "from": [{"source": {"namespaces": ["a"]}}, {"source": {"namespaces": ["web"], "ipBlocks": ["10.0.0.0/24"]}}],
        "to": [{"operation": {"ports": ["8080"]}}],
        "when": [{"key": "source.serviceAccount", "values": ["web/front"]}],
    }]});
    assert!(policy(std::slice::from_ref(&spec)).authorize(&web()).is_ok());
    let other_port = facts("mesh.example/ns/web/sa/front", "10.0.0.5", "10.0.0.9:81");
    assert!(policy(std::slice::from_ref(&spec)).authorize(&other_port).is_err());
    let other_net = facts("mesh.example/ns/web/sa/front", "10.0.9.5", "10.0.0.9:8080");
    assert!(policy(&[spec]).authorize(&other_net).is_err());
}

#[test]
fn deny_wins_over_allow_and_is_wider_without_http() {
    let allow = json!({"rules": [{}]});
    let deny =
        json!({"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["web"]}}], "to": [{"operation": {"methods": ["POST"]}}]}]});
    let both = policy(&[allow, deny]);
    assert_eq!(both.authorize(&web()).expect_err("denied"), Denial::DeniedBy { policy: "default/p".into() });
    assert!(both.authorize(&facts("mesh.example/ns/other/sa/x", "10.0.0.5", "10.0.0.9:8080")).is_ok());
}

#[test]
fn audit_never_denies_and_is_observed() {
    let all = policy(&[json!({"action": "AUDIT", "rules": [{}]})]);
    assert!(all.authorize(&web()).is_ok());
    assert_eq!(all.observed(&web()).collect::<Vec<_>>(), ["default/p"]);
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
    assert!(all.authorize(&facts("", "10.0.0.5", "10.0.0.9:8080")).is_ok());
    assert_eq!(all.authorize(&facts("", "10.0.0.5", "10.0.0.9:9090")).expect_err("strict"), Denial::PlaintextUnderStrict);
    assert!(all.authorize(&facts("mesh.example/ns/a/sa/b", "10.0.0.5", "10.0.0.9:9090")).is_ok());
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
        ("AuthorizationPolicy", json!({"action": "CUSTOM", "rules": [{}]}), "spec.action"),
        ("AuthorizationPolicy", json!({"action": "deny"}), "spec.action"),
        ("AuthorizationPolicy", json!({"action": "DENY"}), "spec.rules"),
        ("AuthorizationPolicy", json!({"rules": [{"when": [{"key": "source.colour", "values": ["x"]}]}]}), "spec.rules[0].when[0].key"),
        ("AuthorizationPolicy", json!({"rules": [{"when": [{"key": "source.ip"}]}]}), "spec.rules[0].when[0]"),
        ("AuthorizationPolicy", json!({"targetRefs": [{"kind": "Service", "name": "x"}]}), "spec.targetRefs"),
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
