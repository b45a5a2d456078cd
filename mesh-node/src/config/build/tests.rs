//! Snapshots from manifests.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::*;
use crate::{
    config::store::{Change, Content, Origin},
    id::{TrustDomain, WorkloadUid},
    policy::{Denial, Facts},
    resource::{self, Parsed},
    route::Target,
};

mod claims;
mod hosts;
mod tokens;

fn store(documents: &[Value]) -> Store {
    let mut store = Store::default();
    let (mut objects, mut rejections) = (Vec::new(), Vec::new());
    for document in documents {
        match resource::parse(document, "default") {
            Ok(Parsed::Object(named)) => objects.push(*named),
            Ok(Parsed::Ignored(_)) => {}
            Err(rejection) => rejections.push(rejection),
        }
    }
    store.apply(Change { origin: Origin(Arc::new("m.yaml".into())), content: Content::Read { objects, rejections, unread: Vec::new() } });
    store
}

fn mesh() -> Arc<MeshSettings> {
    Arc::new(MeshSettings::new("n1", TrustDomain::parse("cluster.local").expect("valid")))
}

fn built(documents: &[Value]) -> (Snapshot, Vec<Status>) {
    build(&store(documents), &mesh(), &Snapshot::empty(mesh()), Instant::now())
}

fn pod(name: &str, ip: &str, more: &Value) -> Value {
    let mut document = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "uid": format!("uid-{name}"), "labels": {"app": name}},
        "spec": {"nodeName": "n1"}, "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    });
    merge(&mut document, more);
    document
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(a), Value::Object(b)) => b.iter().for_each(|(k, v)| merge(a.entry(k.clone()).or_insert(Value::Null), v)),
        (a, b) => *a = b.clone(),
    }
}

fn service() -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]}})
}

fn slice(name: &str, addresses: &[&str], ready: bool) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "endpoints": addresses.iter().map(|a| json!({"addresses": [a], "conditions": {"ready": ready}})).collect::<Vec<_>>(),
        "ports": [{"name": "http", "port": 8080}]})
}

#[test]
fn the_mesh_configuration_may_close_what_is_not_known_and_is_told_of_what_it_says_in_vain() {
    let outbound = |mesh: Value| {
        let document = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}});
        let (snapshot, statuses) = built(&[document]);
        (snapshot.outbound, statuses.len())
    };
    let (open, closed) = (OutboundPolicy::AllowAny, OutboundPolicy::RegistryOnly);
    assert_eq!(outbound(json!({})), (open, 0));
    assert_eq!(outbound(json!({"outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"}})), (closed, 0));
    assert_eq!(outbound(json!({"outbound_traffic_policy": {"mode": "ALLOW_ANY"}, "discovery_selectors": []})), (open, 1));
    assert_eq!(outbound(json!({"outboundTrafficPolicy": {"mode": "x"}})), (open, 1));
}

#[test]
fn a_service_that_stands_for_another_is_that_other_to_routes() {
    let stands_for = |name: &str, host: &str| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"type": "ExternalName", "externalName": host}});
    let front = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "front"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80}]}});
    for (to, expected, remarks) in [
        ("one", Some("default/web"), 0),
        ("two", Some("default/web"), 0),
        ("outside", None, 1),
        ("loop", None, 1),
        ("web", Some("default/web"), 0),
    ] {
        let routes = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "v"},
            "spec": {"hosts": ["front"], "http": [{"route": [{"destination": {"host": to}}]}]}});
        let documents = [
            service(),
            slice("a", &["10.0.0.1"], true),
            front.clone(),
            stands_for("one", "web.default.svc.cluster.local"),
            stands_for("two", "one"),
            stands_for("outside", "example.com"),
            stands_for("loop", "loop"),
            routes,
        ];
        let (snapshot, statuses) = built(&documents);
        let Target::Service { port, .. } = snapshot.resolve("10.96.0.9:80".parse().expect("valid")) else { panic!("no service") };
        let rule = &port.routes.http.as_ref().expect("routes").rules[0];
        let found = rule.destinations[0].as_ref().map(|cluster| cluster.id.service.to_string());
        assert_eq!((found.as_deref(), statuses.len()), (expected, remarks), "{to}: {statuses:?}");
    }
}

#[test]
fn rules_know_which_route_they_are_of() {
    let route = |name: &str, paths: &[&str]| {
        let rule = |path: &&str| json!({"matches": [{"path": {"value": path}}], "backendRefs": [{"name": "web", "port": 80}]});
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": name},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web"}], "rules": paths.iter().map(rule).collect::<Vec<_>>()}})
    };
    let documents = [service(), slice("a", &["10.0.0.1"], true), route("ra", &["/a"]), route("rb", &["/b", "/longest"])];
    let (snapshot, _) = built(&documents);
    let Target::Service { port, .. } = snapshot.resolve("10.96.0.1:80".parse().expect("valid")) else { panic!("no service") };
    let rules = port.routes.http.as_ref().expect("routes").rules.iter().map(|r| (&*r.origin, r.rule.number + 1)).collect::<Vec<_>>();
    assert_eq!(rules, [("HTTPRoute default/rb", 2), ("HTTPRoute default/ra", 1), ("HTTPRoute default/rb", 1)]);
}

#[test]
fn service_resolves_to_the_target_ports_of_all_its_slices() {
    let (snapshot, statuses) = built(&[service(), slice("a", &["10.0.0.1"], true), slice("b", &["10.0.0.2", "10.0.0.1"], false)]);
    assert!(statuses.is_empty(), "{statuses:?}");
    let Target::Service { port, .. } = snapshot.resolve("10.96.0.1:80".parse().expect("valid")) else { panic!("no service") };
    let found = port.cluster.endpoints.iter().map(|e| (e.address.to_string(), e.ready)).collect::<Vec<_>>();
    assert_eq!(found, [("10.0.0.1:8080".to_owned(), true), ("10.0.0.2:8080".to_owned(), false)]);
    assert!(matches!(snapshot.resolve("10.96.0.1:81".parse().expect("valid")), Target::NoSuchPort(_)));
    assert!(matches!(snapshot.resolve("10.96.0.1:53".parse().expect("valid")), Target::NoSuchPort(_)));
    assert!(matches!(snapshot.resolve("10.96.0.2:80".parse().expect("valid")), Target::Unknown));
}

#[test]
fn external_addresses_mean_a_service_only_on_its_ports() {
    let mut external = service();
    external["spec"]["externalIPs"] = json!(["192.0.2.1"]);
    external["status"] = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.2"}, {"hostname": "x.example"}]}});
    let (snapshot, _) = built(&[external, slice("a", &["10.0.0.1"], true)]);
    for ip in ["192.0.2.1", "192.0.2.2"] {
        assert!(matches!(snapshot.resolve(format!("{ip}:80").parse().expect("valid")), Target::Service { .. }));
        assert!(
            matches!(snapshot.resolve(format!("{ip}:9100").parse().expect("valid")), Target::Unknown),
            "another port is not the service's"
        );
    }
}

#[test]
fn workloads_are_named_after_what_made_the_pod() {
    let owned = |kind: &str, name: &str| json!({"metadata": {"ownerReferences": [{"kind": kind, "name": name}]}});
    let (snapshot, _) = built(&[
        pod("a", "10.0.0.1", &owned("ReplicaSet", "web-v1-5d4f8c7b9")),
        pod("b", "10.0.0.2", &owned("StatefulSet", "db")),
        pod("c", "10.0.0.3", &json!({})),
        pod("d", "10.0.0.4", &owned("Job", "nightly-28471680")),
        pod("e", "10.0.0.5", &owned("Job", "migrate-2")),
    ]);
    let made_by = |ip: &str| {
        let workload = snapshot.workload_by_ip(ip.parse().expect("valid")).expect("a workload");
        format!("{} {}", workload.workload_kind.name(), workload.workload_name)
    };
    let all = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"].map(made_by);
    assert_eq!(all, ["deployment web-v1", "pod db", "pod c", "cronjob nightly", "job migrate-2"]);
}

#[test]
fn endpoint_loads_outlive_a_snapshot() {
    let documents = [service(), slice("a", &["10.0.0.1"], true)];
    let (first, _) = built(&documents);
    let guard = first.services[0].ports[0].cluster.endpoints[0].load.begin();
    let (second, _) = build(&store(&documents), &mesh(), &first, Instant::now());
    assert_eq!(second.services[0].ports[0].cluster.endpoints[0].load.current(), 1);
    drop(guard);
    assert_eq!(second.services[0].ports[0].cluster.endpoints[0].load.current(), 0);
}

#[test]
fn pods_are_workloads_with_identity_and_enrolment() {
    let ambient =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": {"istio.io/dataplane-mode": "ambient"}}});
    let injected = json!({"metadata": {"annotations": {"sidecar.istio.io/status": "{}"}}});
    let (snapshot, statuses) = built(&[
        ambient,
        pod("e", "10.0.0.5", &injected),
        pod("a", "10.0.0.1", &json!({"spec": {"serviceAccountName": "front"}})),
        pod("b", "10.0.0.2", &json!({"metadata": {"labels": {"istio.io/dataplane-mode": "none"}}})),
        pod("c", "10.0.0.3", &json!({"spec": {"hostNetwork": true}})),
        pod("d", "10.0.0.4", &json!({"status": {"phase": "Succeeded"}})),
    ]);
    let find = |ip: &str| snapshot.workload_by_ip(ip.parse().expect("valid"));
    let a = find("10.0.0.1").expect("a workload");
    assert!(a.enrolled && a.identity.to_string() == "spiffe://cluster.local/ns/default/sa/front");
    assert!(!find("10.0.0.2").expect("a workload").enrolled);
    assert!(find("10.0.0.3").is_none() && snapshot.workload(&WorkloadUid("uid-c".into())).is_some_and(|w| !w.enrolled));
    assert!(find("10.0.0.4").is_none());
    assert!(!find("10.0.0.5").expect("a workload").enrolled);
    assert!(
        statuses.len() == 1 && statuses[0].message.contains("Pod default/e: metadata.annotations[sidecar.istio.io/status]"),
        "{statuses:?}"
    );
}

#[test]
fn an_address_claimed_twice_belongs_to_the_newer_pod() {
    let made = |t: &str| json!({"metadata": {"creationTimestamp": t}});
    let (snapshot, statuses) =
        built(&[pod("a", "10.0.0.1", &made("2026-01-02T00:00:00Z")), pod("b", "10.0.0.1", &made("2026-01-03T00:00:00Z"))]);
    assert_eq!(&*snapshot.workload_by_ip("10.0.0.1".parse().expect("valid")).expect("owner").name.name, "b");
    assert!(statuses[0].message.contains("also claimed by"), "{statuses:?}");
}

#[test]
fn no_pod_takes_the_place_of_another() {
    let victim = "a1b2c3d4-0000-4000-8000-000000000001";
    let hash = "0123456789abcdef0123456789abcdef";
    let mirror = |hash: &str| json!({"kubernetes.io/config.mirror": "x", "kubernetes.io/config.hash": hash});
    let web = pod("web", "10.1.0.1", &json!({"metadata": {"uid": victim, "creationTimestamp": "2026-01-02T00:00:00Z"}}));
    let real = pod("static", "10.1.0.2", &json!({"metadata": {"annotations": mirror(hash), "creationTimestamp": "2026-01-02T00:00:00Z"}}));
    for (taken, by) in [(victim, victim), (hash, hash)] {
        let evil = json!({"metadata": {"namespace": "evil", "annotations": mirror(by), "creationTimestamp": "2026-02-02T00:00:00Z"}});
        let (snapshot, statuses) = built(&[pod("a", "10.1.0.3", &evil), web.clone(), real.clone()]);
        let owner = snapshot.workload(&WorkloadUid(taken.into())).expect("a workload");
        assert_eq!(&*owner.name.namespace, "default", "{taken}");
        let told = statuses.iter().any(|s| s.message.contains("is the UID of default/static already"));
        assert_eq!(told, by == hash, "{statuses:?}");
    }
}

#[test]
fn policies_reach_the_workloads_of_their_scope() {
    let policy = |kind: &str, namespace: &str, name: &str, created: &str, spec: Value| {
        json!({"apiVersion": "security.istio.io/v1", "kind": kind, "spec": spec,
            "metadata": {"name": name, "namespace": namespace, "creationTimestamp": created}})
    };
    let early = "2026-01-01T00:00:00Z";
    let late = "2026-02-01T00:00:00Z";
    let app = |app: &str| json!({"matchLabels": {"app": app}});
    let (snapshot, statuses) = built(
        &[
            pod("a", "10.0.0.1", &json!({})),
            pod("b", "10.0.0.2", &json!({})),
            pod("c", "10.0.0.3", &json!({"metadata": {"namespace": "other"}})),
            policy("PeerAuthentication", "istio-system", "mesh", early, json!({"mtls": {"mode": "STRICT"}})),
            policy("PeerAuthentication", "istio-system", "late", late, json!({"mtls": {"mode": "PERMISSIVE"}})),
            policy("PeerAuthentication", "istio-system", "selected", early, json!({"selector": app("c"), "mtls": {"mode": "PERMISSIVE"}})),
            policy("PeerAuthentication", "default", "young", late, json!({"selector": app("a"), "mtls": {"mode": "STRICT"}})),
            policy("PeerAuthentication", "default", "old", early, json!({"selector": app("a"), "mtls": {"mode": "PERMISSIVE"}})),
            policy(
                "AuthorizationPolicy",
                "istio-system",
                "mesh-deny",
                early,
                json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["1"]}}]}]}),
            ),
            policy("AuthorizationPolicy", "default", "none", early, json!({"selector": app("b")})),
            policy("AuthorizationPolicy", "default", "dry", early, json!({})),
        ]
        .map(|mut p| {
            if p["metadata"]["name"] == "dry" {
                p["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
            }
            p
        }),
    );
    let verdict = |ip: &str, port: u16| {
        let workload = snapshot.workload_by_ip(ip.parse().expect("valid")).expect("a workload");
        let facts = Facts::new(None, "10.9.9.9".parse().expect("valid"), SocketAddr::new(workload.ips[0], port));
        workload.policy.opaque(&facts, &[]).err()
    };
    assert_eq!(verdict("10.0.0.1", 80), None);
    assert_eq!(
        verdict("10.0.0.1", 1),
        Some(Denial::DeniedBy { policy: "istio-system/mesh-deny".into(), rule: "ns[istio-system]-policy[mesh-deny]-rule[0]".into() })
    );
    assert_eq!(verdict("10.0.0.2", 80), Some(Denial::PlaintextUnderStrict));
    assert_eq!(verdict("10.0.0.3", 80), Some(Denial::PlaintextUnderStrict));
    let text = statuses.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(statuses.len() == 2 && text.contains("istio-system/late") && text.contains("istio-system/selected"), "{text}");
}

#[test]
fn authorizers_that_cannot_be_asked_are_said() {
    let custom = |provider: &str| {
        json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": provider, "namespace": "default"},
            "spec": {"action": "CUSTOM", "provider": {"name": provider}, "rules": [{}]}})
    };
    let provider = |name: &str, kind: &str, service: &str, port: u16| json!({"name": name, kind: {"service": service, "port": port, "failOpen": name == "port"}});
    let (web, away) = ("web.default.svc.cluster.local", "away.default.svc.cluster.local");
    let providers = json!({"extensionProviders": [
        provider("good", "envoyExtAuthzGrpc", web, 80),
        provider("port", "envoyExtAuthzGrpc", web, 81),
        provider("service", "envoyExtAuthzHttp", away, 80),
    ]});
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": providers}});
    let (_, statuses) = built(&[service(), config, custom("good"), custom("port"), custom("service"), custom("unknown")]);
    let said = statuses.iter().map(ToString::to_string).collect::<Vec<_>>();
    let expected = [
        (
            "AuthorizationPolicy default/port",
            "the Service default/web of the ext_authz provider \"port\" has no port 81, so what the policy matches is refused",
        ),
        (
            "AuthorizationPolicy default/service",
            "the Service default/away of the ext_authz provider \"service\" does not exist, so what the policy matches is refused",
        ),
        ("AuthorizationPolicy default/unknown", "no ext_authz provider \"unknown\""),
    ];
    assert_eq!(said.len(), expected.len(), "{said:#?}");
    for (object, text) in expected {
        assert!(said.iter().any(|s| s.contains(object) && s.contains(text)), "{object}: {said:#?}");
    }
}

#[test]
fn questions_lead_where_authorizers_are_and_who_is_asked_about_them() {
    let provider =
        |name: &str| json!({"name": name, "envoyExtAuthzGrpc": {"service": format!("{name}.default.svc.cluster.local"), "port": 80}});
    let providers = json!({"extensionProviders": [provider("a"), provider("b"), provider("c")]});
    let mut documents = vec![
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": providers}}),
    ];
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        let mut service = service();
        merge(&mut service, &json!({"metadata": {"name": name}, "spec": {"clusterIP": format!("10.96.0.{i}")}}));
        let mut slice = slice(name, &[&format!("10.0.0.{i}")], true);
        slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!(name);
        documents.extend([
            service,
            slice,
            pod(name, &format!("10.0.0.{i}"), &json!({"metadata": {"labels": {"istio.io/dataplane-mode": "ambient"}}})),
        ]);
    }
    // b is asked about all of a's, c about another port of b's than where b is asked.
    for (app, provider, rule) in [("a", "b", json!({})), ("b", "c", json!({"to": [{"operation": {"ports": ["1", "2"]}}]}))] {
        documents.push(
            json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": app, "namespace": "default"},
            "spec": {"selector": {"matchLabels": {"app": app}}, "action": "CUSTOM", "provider": {"name": provider}, "rules": [rule]}}),
        );
    }
    let (snapshot, statuses) = built(&documents);
    assert!(statuses.is_empty(), "{statuses:?}");
    for (provider, to) in [("a", [true, true, false]), ("b", [false, true, false]), ("c", [false, false, true]), ("d", [false; 3])] {
        let leads = [0, 1, 2].map(|i| snapshot.is_asked_first(provider, SocketAddr::from(([10, 0, 0, i], 8080))));
        assert_eq!(leads, to, "{provider}");
    }
    assert!(!snapshot.is_asked_first("a", SocketAddr::from(([10, 0, 0, 0], 8081))));
}

#[test]
fn pods_with_their_nodes_address_are_of_subsets_too_and_places_are_labels() {
    let host = json!({"spec": {"hostNetwork": true}});
    let mut slice = slice("a", &["10.0.0.1", "10.0.0.2"], true);
    for (i, name) in ["one", "two"].into_iter().enumerate() {
        slice["endpoints"][i]["targetRef"] = json!({"kind": "Pod", "name": name});
        slice["endpoints"][i]["zone"] = format!("zone-{name}").into();
    }
    let rule = json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "r", "namespace": "default"},
        "spec": {"host": "web", "subsets": [{"name": "one", "labels": {"app": "one"}}, {"name": "two", "labels": {"topology.kubernetes.io/zone": "zone-two"}}]}});
    let (snapshot, statuses) = built(&[service(), slice, rule, pod("one", "10.0.0.1", &host), pod("two", "10.0.0.2", &host)]);
    assert!(statuses.is_empty(), "{statuses:?}");
    let Target::Service { port, .. } = snapshot.resolve("10.96.0.1:80".parse().expect("valid")) else { panic!("no service") };
    let of = |subset: &str| port.subsets[subset].endpoints.iter().map(|e| e.address.to_string()).collect::<Vec<_>>();
    assert_eq!((of("one"), of("two")), (vec!["10.0.0.1:8080".to_owned()], vec!["10.0.0.2:8080".to_owned()]));
}

#[test]
fn what_is_near_is_said_by_a_service_or_its_namespace() {
    use crate::route::cluster::Near;
    let annotated = |value: &str| json!({"metadata": {"annotations": {"networking.istio.io/traffic-distribution": value}}});
    let near = |of_service: &Value, of_namespace: &Value| {
        let (mut web, mut namespace) = (service(), json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}));
        merge(&mut web, of_service);
        merge(&mut namespace, of_namespace);
        let (snapshot, statuses) = built(&[namespace, web, slice("a", &["10.0.0.1"], true)]);
        assert!(statuses.is_empty(), "{statuses:?}");
        let Target::Service { port, .. } = snapshot.resolve("10.96.0.1:80".parse().expect("valid")) else { panic!("no service") };
        port.cluster.near
    };
    let spec = |value: &str| json!({"spec": {"trafficDistribution": value}});
    assert_eq!(near(&json!({}), &json!({})), None);
    assert_eq!(near(&spec("PreferClose"), &json!({})), Some(Near::Zone));
    assert_eq!(near(&json!({}), &annotated("PreferSameNode")), Some(Near::Node));
    assert_eq!(near(&annotated("PreferSameNode"), &annotated("PreferClose")), Some(Near::Node));
    let (mut both, mut unknown) = (spec("PreferSameNode"), spec("Nonsense"));
    merge(&mut both, &annotated("PreferClose"));
    merge(&mut unknown, &annotated("PreferClose"));
    assert_eq!((near(&both, &json!({})), near(&unknown, &json!({}))), (Some(Near::Node), Some(Near::Zone)));
    // What is nearer counts, also when it wants nothing of the kind.
    assert_eq!(near(&annotated("Any"), &annotated("PreferClose")), None);
}

#[test]
fn what_the_mesh_says_holds_where_nobody_says_otherwise() {
    use std::time::Duration;

    let mesh = json!({
        "connectTimeout": "3s", "tcpKeepalive": {"time": "60s", "probes": 2}, "localityLbSetting": {"enabled": false},
        "defaultVirtualServiceExportTo": ["."], "defaultDestinationRuleExportTo": ["."]});
    let mesh = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}});
    let object = |kind: &str, spec: &Value| json!({"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": {"name": "r", "namespace": "default"}, "spec": spec});
    let rule = |policy: &Value| object("DestinationRule", &json!({"host": "web", "exportTo": ["*"], "trafficPolicy": policy}));
    let policy = |documents: &[Value]| {
        let (snapshot, statuses) = built(documents);
        assert!(statuses.is_empty(), "{statuses:?}");
        let Target::Service { port, .. } = snapshot.resolve("10.96.0.1:80".parse().expect("valid")) else { panic!("no service") };
        port.cluster.policy.clone()
    };
    let base = [service(), slice("a", &["10.0.0.1"], true), mesh.clone()];
    let plain = policy(&base);
    assert_eq!(plain.tcp.connect_timeout, Some(Duration::from_secs(3)));
    assert!(plain.tcp.keepalive.is_some_and(|k| k.time == Some(Duration::from_mins(1))) && !plain.locality.enabled, "{plain:?}");
    let own = json!({"connectionPool": {"tcp": {"connectTimeout": "1s", "tcpKeepalive": {"time": "5s"}}},
        "loadBalancer": {"localityLbSetting": {"enabled": true}}});
    let own = policy(&[&base[..], &[rule(&own)]].concat());
    assert_eq!(own.tcp.connect_timeout, Some(Duration::from_secs(1)));
    assert!(
        own.tcp.keepalive.is_some_and(|k| (k.time, k.probes) == (Some(Duration::from_secs(5)), Some(2))) && own.locality.enabled,
        "{own:?}"
    );
    let mut near = service();
    near["spec"]["trafficDistribution"] = json!("PreferClose");
    assert!(policy(&[near, base[1].clone(), mesh]).locality.enabled, "what the Service says of places is nearer");
    // Objects that do not say who sees them.
    let route = json!({"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]});
    let rule = json!({"host": "web", "trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": "1s"}}}});
    let seen = |to: &str, export_to: Option<Value>| {
        let mut objects = [object("VirtualService", &route), object("DestinationRule", &rule)];
        if let Some(export_to) = export_to {
            objects.iter_mut().for_each(|o| o["spec"]["exportTo"] = export_to.clone());
        }
        let (snapshot, _) = built(&[&base[..], &objects].concat());
        let Target::Service { port, .. } = snapshot.resolve_for(to, "10.96.0.1:80".parse().expect("valid")) else { panic!("no service") };
        (port.routes.http.is_some(), port.cluster.policy.tcp.connect_timeout.map(|t| t.as_secs()))
    };
    assert_eq!((seen("default", None), seen("other", None)), ((true, Some(1)), (false, Some(3))));
    assert_eq!(seen("other", Some(json!(["*"]))), (true, Some(1)));
}

#[test]
fn rules_about_requests_are_told_of_on_ports_they_are_about() {
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}, {"name": "tcp", "port": 90}]}});
    let mut both = slice("a", &["10.0.0.1"], true);
    both["ports"] = json!([{"name": "http", "port": 8080}, {"name": "tcp", "port": 9090}]);
    let told = |ports: Value, by: &str| {
        let to = json!([{"operation": {"ports": ports, "methods": ["PUT"]}}]);
        let mut policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p", "namespace": "default"},
            "spec": {"action": "DENY", "rules": [{"to": to}]}});
        policy["spec"][by] = match by {
            "selector" => json!({"matchLabels": {"app": "a"}}),
            _ => json!([{"kind": "Service", "name": "web"}]),
        };
        let (_, statuses) = built(&[pod("a", "10.0.0.1", &json!({})), service.clone(), both.clone(), policy]);
        statuses.iter().any(|s| s.to_string().contains("port 9090 of default/a"))
    };
    let by_selector = |ports| told(ports, "selector");
    assert_eq!((by_selector(json!([])), by_selector(json!(["9090"])), by_selector(json!(["8080"]))), (true, true, false));
    let by_service = |ports| told(ports, "targetRefs");
    assert_eq!((by_service(json!([])), by_service(json!(["90"])), by_service(json!(["80"]))), (true, true, false));
}

#[test]
fn ten_thousand_pods_build_into_one_snapshot() {
    let mut documents = vec![service()];
    documents.extend((0..10_000_u32).map(|i| pod(&format!("p{i}"), &std::net::Ipv4Addr::from(0x0a00_0000 + i).to_string(), &json!({}))));
    let (snapshot, statuses) = built(&documents);
    assert!(snapshot.workloads().count() == 10_000 && statuses.is_empty());
}
