//! Hosts of virtual services and of destination rules.

use super::*;
use crate::route::table::HttpTable;

fn rules(hosts: &Value) -> Vec<Arc<str>> {
    let to = |name: &str| json!({"name": name, "match": [{"uri": {"prefix": "/a"}}], "route": [{"destination": {"host": "web"}}]});
    let virtual_service = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "v", "namespace": "default"},
        "spec": {"hosts": hosts, "http": [to("one"), to("two")]}});
    let (snapshot, _) = built(&[service(), virtual_service]);
    let service = snapshot.service(&ObjectName::new("default", "web")).expect("a service");
    let tables = service.port(80).expect("a port").routes.http.iter().flat_map(HttpTable::all);
    tables.flat_map(|table| &table.rules).map(|r| r.rule.name.clone()).collect()
}

#[test]
fn several_names_of_one_service_are_one() {
    let once: [Arc<str>; 2] = ["one".into(), "two".into()];
    assert_eq!(rules(&json!(["web"])), once);
    assert_eq!(rules(&json!(["web", "web.default", "web.default.svc.cluster.local"])), once);
    assert_eq!(rules(&json!(["*", "web", "*.svc.cluster.local"])), once);
}

/// Rules of the root namespace are the mesh's, and come last also for clients there; but for those that are for these alone.
#[test]
fn clients_in_the_root_namespace_have_rules_of_their_own() {
    let rule = |namespace: &str, name: &str, seconds: u32, export_to: Value| {
        json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": name, "namespace": namespace},
            "spec": {"host": if name == "all" { "*.svc.cluster.local" } else { "web.default.svc.cluster.local" }, "exportTo": export_to,
                "trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": format!("{seconds}s")}}}}})
    };
    let [everybody, private] = [json!(["*"]), json!(["."])];
    let base = [
        service(),
        slice("web", &["10.244.0.1"], true),
        rule("istio-system", "all", 1, everybody.clone()),
        rule("default", "web", 2, everybody),
    ];
    let seen = |to: &str, more: &[Value]| {
        // There are clients of a namespace that is treated apart.
        let other = json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "x", "namespace": "istio-system"},
            "spec": {"host": "else.default.svc.cluster.local", "exportTo": ["."]}});
        let mut service = service();
        merge(&mut service, &json!({"metadata": {"name": "else"}, "spec": {"clusterIP": "10.96.0.2"}}));
        let (snapshot, _) = built(&[&base[..], &[service, other], more].concat());
        let Target::Service { port, .. } = snapshot.resolve_for(to, "10.96.0.1:80".parse().expect("valid")) else { panic!("no service") };
        port.cluster.policy.tcp.connect_timeout.map(|t| t.as_secs())
    };
    assert_eq!(["istio-system", "other"].map(|from| seen(from, &[])), [Some(2); 2], "the service's own is nearer than the mesh's");
    let own = rule("istio-system", "web", 3, private);
    assert_eq!(["istio-system", "other"].map(|from| seen(from, std::slice::from_ref(&own))), [Some(3), Some(2)]);
}

#[test]
fn delegates_are_for_those_they_are_exported_to() {
    let object = |namespace: &str, name: &str, spec: Value| json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": name, "namespace": namespace}, "spec": spec});
    let root = object("default", "root", json!({"hosts": ["web"], "http": [{"delegate": {"name": "d", "namespace": "other"}}]}));
    let routed = |export_to: Value, mesh: Value| {
        let route = json!([{"route": [{"destination": {"host": "web.default.svc.cluster.local"}}]}]);
        let delegate = object("other", "d", json!({"exportTo": export_to, "http": route}));
        let mesh = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}});
        let (snapshot, statuses) = built(&[service(), slice("a", &["10.0.0.1"], true), root.clone(), delegate, mesh]);
        let Target::Service { port, .. } = snapshot.resolve_for("default", "10.96.0.1:80".parse().expect("valid")) else {
            panic!("no service")
        };
        let told = statuses.iter().filter(|s| s.to_string().contains("is not exported to namespace default")).count();
        (port.routes.http.as_ref().map_or(0, |table| table.rules.len()), told > 0)
    };
    assert_eq!(routed(json!([]), json!({})), (1, false));
    assert_eq!(routed(json!(["*"]), json!({})), (1, false));
    assert_eq!(routed(json!(["default"]), json!({})), (1, false));
    assert_eq!(routed(json!(["."]), json!({})), (0, true));
    assert_eq!(routed(json!(["elsewhere"]), json!({})), (0, true));
    assert_eq!(routed(json!([]), json!({"defaultVirtualServiceExportTo": ["."]})), (0, true));
}
