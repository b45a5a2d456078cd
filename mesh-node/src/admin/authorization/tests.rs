//! Decisions as they are explained.

use serde_json::json;

use super::*;
use crate::config::testing::built;

#[test]
fn decisions_are_explained() {
    let pod = |name: &str, ip: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "uid": name, "labels": {"app": name, "istio.io/dataplane-mode": "ambient"}},
            "spec": {"nodeName": "n1", "serviceAccountName": name}, "status": {"phase": "Running", "podIPs": [{"ip": ip}]}})
    };
    let policy = |name: &str, dry_run: bool, spec: &Value| {
        json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "spec": spec,
            "metadata": {"name": name, "namespace": "default", "annotations": {"istio.io/dry-run": dry_run.to_string()}}})
    };
    let web = json!({"matchLabels": {"app": "web"}});
    let snapshot = built(&[
        pod("web", "10.0.0.1"),
        pod("front", "10.0.0.2"),
        json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "jwt"},
            "spec": {"selector": web, "jwtRules": [{"issuer": "i", "jwksUri": "http://issuer.example/"}]}}),
        policy(
            "get",
            false,
            &json!({"selector": web, "rules": [
                {"from": [{"source": {"principals": ["cluster.local/ns/default/sa/front"]}}], "to": [{"operation": {"methods": ["GET"], "paths": ["/a/*"]}}]},
                {"when": [{"key": "request.auth.claims[group]", "values": ["admin"]}]},
            ]}),
        ),
        policy("dry", true, &json!({"selector": web, "action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/a/dry"]}}]}]})),
        policy(
            "name",
            false,
            &json!({"selector": web, "action": "DENY", "rules": [{"when": [{"key": "connection.sni", "values": ["admin"]}]}]}),
        ),
        policy(
            "front",
            false,
            &json!({"selector": {"matchLabels": {"app": "front"}}, "action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/admin"]}}]}]}),
        ),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "front"},
            "spec": {"clusterIP": "10.96.0.1", "selector": {"app": "front"}, "ports": [{"name": "tcp", "port": 81}]}}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "front-1", "labels": {"kubernetes.io/service-name": "front"}},
            "endpoints": [{"addresses": ["10.0.0.2"]}], "ports": [{"name": "tcp", "port": 81}]}),
        policy(
            "asks",
            false,
            &json!({"selector": {"matchLabels": {"app": "front"}}, "action": "CUSTOM", "provider": {"name": "gone"}, "rules": [{"to": [{"operation": {"ports": ["82"]}}]}]}),
        ),
        policy("port", false, &json!({"selector": web, "action": "DENY", "rules": [{"to": [{"operation": {"ports": ["9090"]}}]}]})),
    ]);
    let asked = |query: &str| answer(&snapshot, query);
    let denied = "rbac_access_denied_matched_policy[none]";
    for (query, decision, field, value) in [
        ("from=default/front&to=default/web&port=80&path=/a/b%3Fx%3D1", "allowed", "allowedBy", json!("ns[default]-policy[get]-rule[0]")),
        ("from=10.0.0.2&to=10.0.0.1&port=80&path=/a/b", "allowed", "allowedBy", json!("ns[default]-policy[get]-rule[0]")),
        (
            "from=default/front&to=default/web&port=80&path=/a/dry",
            "allowed",
            "dryRun",
            json!({"decision": "denied", "policy": "default/dry"}),
        ),
        ("from=default/front&to=default/web&port=80&path=/a/..%252fb", "denied", "details", json!(denied)),
        ("from=default/front&to=default/web&port=80&method=POST&path=/a/b", "denied", "policy", json!("none")),
        ("from=default/front&to=default/web&port=80&path=/a/b&plaintext", "denied", "details", json!(denied)),
        (
            "from=192.0.2.1&to=default/web&port=80&path=/x&claims=%7B%22iss%22:%22i%22,%22group%22:%22admin%22%7D",
            "allowed",
            "allowedBy",
            json!("ns[default]-policy[get]-rule[1]"),
        ),
        ("from=default/front&to=default/web&port=9090&path=/a/b", "denied", "policy", json!("default/port")),
        ("from=default/front&to=default/web&port=80", "denied", "details", json!(denied)),
        ("from=default/web&to=default/front&port=80&path=/x", "allowed", "allowedBy", Value::Null),
        ("from=default/web&to=default/front&port=80", "denied", "policy", json!("default/front")),
        ("from=default/web&to=default/front&port=81&path=/x", "denied", "judged", json!("connection")),
        ("from=default/web&to=default/front&port=82&path=/x", "denied", "details", json!("ext_authz_error")),
        ("from=default/front&to=default/web&port=80&sni=admin", "denied", "policy", json!("default/name")),
    ] {
        let found = asked(query).expect("an answer");
        assert_eq!((found["decision"].as_str(), &found[field]), (Some(decision), &value), "{query}: {found:#}");
    }
    for (query, error) in [
        ("", "to: is missing"),
        ("from=a&to=b&port=x", "port: \"x\" is not a port"),
        ("from=default/front&to=default/wbe&port=80", "to: there is no workload \"default/wbe\""),
        ("from=default/frnt&to=default/web&port=80", "from: there is no workload"),
        ("from=%ff&to=b&port=1", "from: is not percent-encoded"),
        ("colour=red", "colour: is not known"),
        ("from=default/front&to=default/web&port=80&header=x", "header: \"x\" is not `name: value`"),
        ("from=default/front&to=default/web&port=80&claims=%7B%22iss%22:%22other%22%7D", "takes tokens of: i"),
    ] {
        let said = asked(query).expect_err("an error").to_string();
        assert!(said.contains(error), "{query}: {said}");
    }
}
