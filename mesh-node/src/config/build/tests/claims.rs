//! Addresses that several claim, and where pods say that they are.

use super::*;

fn endpoint(ready: bool) -> Value {
    json!({"addresses": ["10.0.0.1"], "conditions": {"ready": ready, "serving": false, "terminating": !ready}})
}

fn slice_of(name: &str, endpoints: &[Value]) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}}, "endpoints": endpoints, "ports": [{"name": "http", "port": 8080}]})
}

fn endpoints(snapshot: &Snapshot) -> &[crate::route::cluster::Endpoint] {
    let service = snapshot.service(&ObjectName::new("default", "web")).expect("a service");
    &service.port(80).expect("a port").cluster.endpoints
}

/// A pod may have the address of one that has yet to end.
#[test]
fn endpoint_that_is_ready_beats_one_of_its_address_that_is_not() {
    let (ready, going) = (endpoint(true), endpoint(false));
    for slices in [
        vec![slice_of("a", &[going.clone(), ready.clone()])],
        vec![slice_of("a", &[ready.clone(), going.clone()])],
        vec![slice_of("a", std::slice::from_ref(&going)), slice_of("b", std::slice::from_ref(&ready))],
    ] {
        let (snapshot, _) = built(&[vec![service()], slices].concat());
        let found = endpoints(&snapshot).iter().map(|e| e.ready).collect::<Vec<_>>();
        assert_eq!(found, [true]);
    }
    let (snapshot, _) = built(&[
        service(),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "n", "labels": {"kubernetes.io/service-name": "web"}},
        "endpoints": [{"addresses": ["10.0.0.1"], "conditions": null}, {"addresses": null}], "ports": [{"name": "http", "port": 8080}]}),
    ]);
    assert!(endpoints(&snapshot).len() == 1 && endpoints(&snapshot)[0].ready, "nulls are what is not there");
}

#[test]
fn pod_that_is_being_deleted_has_its_address_until_another_has_it() {
    let meta = |created: &str, deleted: Option<&str>| json!({"metadata": {"creationTimestamp": created, "deletionTimestamp": deleted}});
    let (early, late) = ("2026-01-01T10:00:00Z", "2026-01-01T11:00:00Z");
    for (one, other, owner) in [
        ((early, None), (late, Some("2026-01-01T12:00:00Z")), "one"),
        ((early, Some("2026-01-01T12:00:00Z")), (late, None), "other"),
        ((early, None), (late, None), "other"),
        ((late, Some("x")), (early, Some("x")), "one"),
    ] {
        let all = [pod("one", "10.0.0.1", &meta(one.0, one.1)), pod("other", "10.0.0.1", &meta(other.0, other.1))];
        for documents in [all.to_vec(), all.iter().rev().cloned().collect()] {
            let (snapshot, _) = built(&documents);
            let found = snapshot.workload_by_ip("10.0.0.1".parse().expect("valid")).expect("somebody");
            assert_eq!(&*found.name.name, owner, "{one:?} {other:?}");
        }
    }
}

#[test]
fn locality_of_a_pods_label_goes_before_its_nodes() {
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": "z1"}}});
    let ready = endpoint(true);
    for (label, value, expected) in [
        ("app", "x", ("r1", "z1", "")),
        ("istio-locality", "r9.z9.s9", ("r9", "z9", "s9")),
        ("topology.istio.io/locality", "r9/z9", ("r9", "z9", "")),
        ("istio-locality", "", ("r1", "z1", "")),
    ] {
        let labelled = pod("web", "10.0.0.1", &json!({"metadata": {"labels": {label: value}}}));
        let mut one = ready.clone();
        one["nodeName"] = "n1".into();
        let (snapshot, _) = built(&[node.clone(), labelled, service(), slice_of("a", &[one])]);
        let workload = snapshot.workload_by_ip("10.0.0.1".parse().expect("valid")).expect("a pod");
        for place in [&workload.locality, &endpoints(&snapshot)[0].locality] {
            assert_eq!((&*place.region, &*place.zone, &*place.subzone), expected, "{label}={value}");
        }
    }
}
