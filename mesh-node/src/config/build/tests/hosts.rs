//! Hosts of virtual services.

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
