//! The configuration as ztunnel's `/config_dump` has it, so that `istioctl ztunnel-config` can read it.
//!
//! Field names are ztunnel's; what there is no counterpart of (networks, waypoints) is left out.

mod rules;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};

use crate::{
    app::Node,
    config::Snapshot,
    id::ObjectName,
    identity::CertificateState,
    proxy::{open::Open, outcome::Direction},
    report::plain::rfc3339,
    route::{Cluster, Service, Workload, cluster::Near},
    tls::Described,
};

pub(super) fn dump(node: &Node) -> Value {
    let snapshot = node.proxy.config.load();
    let cluster = &*node.proxy.metrics.cluster;
    let mut workloads = snapshot.workloads().collect::<Vec<_>>();
    workloads.sort_by(|a, b| a.name.cmp(&b.name));
    let settings = &node.settings;
    let root = &*snapshot.mesh.root_namespace;
    let strictness = workloads.iter().filter_map(|w| strict(w, root)).collect::<BTreeMap<_, _>>();
    // Policies of a namespace and of the mesh are nobody's own.
    let selecting = snapshot.policies.iter().filter(|p| p.scope == "WorkloadSelector").map(|p| p.name.to_string()).collect::<BTreeSet<_>>();
    let services = services_of(&snapshot);
    json!({
        "workloads": workloads.iter().map(|w| workload(w, cluster, root, (&selecting, &services))).collect::<Vec<_>>(),
        "services": snapshot.services().iter().map(|s| service(s, &snapshot, cluster)).collect::<Vec<_>>(),
        "policies": snapshot.policies.iter().map(|p| json!({
            "namespace": &*p.name.namespace, "name": &*p.name.name, "scope": p.scope, "action": p.action,
            "rules": rules::rules(&p.rules, &p.name.namespace), "dryRun": p.dry_run,
        })).chain(strictness.into_values()).collect::<Vec<_>>(),
        "certificates": node.proxy.identity.states().iter().map(certificate).collect::<Vec<_>>(),
        "workloadState": workload_state(node, &snapshot, cluster),
        "staticConfig": {"workloads": [], "policies": [], "services": []},
        "version": {"version": env!("CARGO_PKG_VERSION"), "component": "mesh-node"},
        "config": {
            "localNode": &*settings.mesh.node, "clusterId": cluster, "trustDomain": settings.mesh.trust_domains.local.as_str(),
            "adminAddr": settings.admin, "statsAddr": settings.metrics, "readinessAddr": settings.readiness,
        },
    })
}

fn uid(workload: &Workload, cluster: &str) -> String {
    format!("{cluster}//Pod/{}/{}", workload.name.namespace, workload.name.name)
}

fn account(workload: &Workload) -> String {
    workload.identity.service_account().to_owned()
}

/// What `PeerAuthentication` asks of a workload's clients, as the policy that istiod makes of it for ztunnel; its full name and itself.
fn strict(w: &Workload, root: &str) -> Option<(String, Value)> {
    let mtls = &w.policy.mtls;
    let ports = |strict: bool| mtls.ports.iter().filter(|(_, is)| **is == strict).map(|(port, _)| *port).collect::<Vec<_>>();
    let nobody = json!({"notPrincipals": [{"Presence": []}]});
    let (namespace, name, mut clauses) = match (mtls.strict, ports(!mtls.strict)) {
        _ if !w.enrolled => return None,
        (true, others) if others.is_empty() => (root, "istio_converted_static_strict".to_owned(), vec![json!([nobody])]),
        (false, others) if others.is_empty() => return None,
        (strict, others) => {
            let which = if strict { "notDestinationPorts" } else { "destinationPorts" };
            (&*w.name.namespace, format!("converted_peer_authentication_{}", w.name.name), vec![json!([{which: others}])])
        }
    };
    if clauses[0] != json!([nobody]) {
        clauses.push(json!([nobody]));
    }
    let policy =
        json!({"namespace": namespace, "name": name, "scope": "WorkloadSelector", "action": "Deny", "rules": [clauses], "dryRun": false});
    Some((format!("{namespace}/{name}"), policy))
}

/// The services that lead to each address.
fn services_of(snapshot: &Snapshot) -> BTreeMap<IpAddr, BTreeSet<String>> {
    let mut all: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
    for (service, endpoint) in
        snapshot.services().iter().flat_map(|s| s.ports.iter().flat_map(move |p| p.cluster.endpoints.iter().map(move |e| (s, e))))
    {
        all.entry(endpoint.address.ip()).or_default().insert(namespaced(&service.name));
    }
    all
}

/// What is looked up for a workload: policies that select some, and services by address.
type Known<'a> = (&'a BTreeSet<String>, &'a BTreeMap<IpAddr, BTreeSet<String>>);

fn workload(w: &Workload, cluster: &str, root: &str, (selecting, services): Known<'_>) -> Value {
    let policies = w.policy.everywhere.authorization.policies.iter().map(ToString::to_string).filter(|name| selecting.contains(name));
    let policies = policies.chain(strict(w, root).map(|(name, _)| name)).collect::<Vec<_>>();
    json!({
        "uid": uid(w, cluster), "workloadIps": w.ips, "protocol": if w.enrolled { "HBONE" } else { "TCP" },
        "name": &*w.name.name, "namespace": &*w.name.namespace, "serviceAccount": account(w),
        "workloadName": &*w.workload_name, "workloadType": w.workload_kind.name(),
        "canonicalName": w.canonical_service().unwrap_or(&w.workload_name), "canonicalRevision": w.canonical_revision().unwrap_or("latest"),
        "clusterId": cluster, "trustDomain": w.identity.trust_domain().as_str(),
        "locality": {"region": &*w.locality.region, "zone": &*w.locality.zone, "subzone": &*w.locality.subzone},
        "node": &*w.node, "network": "", "status": "Healthy", "capacity": 1,
        "authorizationPolicies": policies,
        "services": w.ips.iter().filter_map(|ip| services.get(ip)).flatten().collect::<BTreeSet<_>>(),
    })
}

fn service(s: &Arc<Service>, snapshot: &Snapshot, cluster: &str) -> Value {
    let host = s.name.fqdn();
    let ports = s.ports.iter().map(|p| (p.port.to_string(), json!(p.cluster.endpoints.first().map_or(p.port, |e| e.address.port()))));
    let mut endpoints: Map<String, Value> = Map::new();
    for (port, endpoint) in s.ports.iter().flat_map(|p| p.cluster.endpoints.iter().map(move |e| (p.port, e))) {
        let Some(workload) = snapshot.workload_by_ip(endpoint.address.ip()) else { continue };
        let uid = uid(workload, cluster);
        let status = if endpoint.ready { "Healthy" } else { "Unhealthy" };
        let one = endpoints.entry(uid.clone());
        let one = one.or_insert_with(|| json!({"workloadUid": uid, "service": namespaced(&s.name), "port": {}, "status": status}));
        one["port"][port.to_string()] = endpoint.address.port().into();
    }
    let mut dumped = json!({
        "name": &*s.name.name, "namespace": &*s.name.namespace, "hostname": host, "canonical": true,
        "vips": s.vips.iter().map(|ip| format!("/{ip}")).collect::<Vec<_>>(), "ports": ports.collect::<Map<_, _>>(),
        "endpoints": endpoints, "subjectAltNames": [],
    });
    let families = (s.vips.iter().any(IpAddr::is_ipv4), s.vips.iter().any(IpAddr::is_ipv6));
    if let Some(family) = match families {
        (true, true) => Some("Dual"),
        (true, false) => Some("IPv4"),
        (false, true) => Some("IPv6"),
        (false, false) => None,
    } {
        dumped["ipFamilies"] = family.into();
    }
    if let Some(balancer) = s.ports.first().and_then(|port| balancer(&port.cluster)) {
        dumped["loadBalancer"] = balancer;
    }
    dumped
}

/// Which endpoints are preferred, as istiod tells ztunnel.
fn balancer(cluster: &Cluster) -> Option<Value> {
    let (scopes, mode) = match (cluster.local_only, cluster.near) {
        (true, _) => (&["Node"][..], "Strict"),
        (false, Some(Near::Zone)) => (&["Network", "Region", "Zone"][..], "Failover"),
        (false, Some(Near::Node)) => (&["Network", "Region", "Zone", "Subzone", "Node"][..], "Failover"),
        (false, None) => return None,
    };
    Some(json!({"routingPreferences": scopes, "mode": mode, "healthPolicy": "OnlyHealthy"}))
}

/// A service's host with its namespace, by which ztunnel knows it.
fn namespaced(service: &ObjectName) -> String {
    format!("{}/{}", service.namespace, service.fqdn())
}

fn certificate(c: &CertificateState) -> Value {
    let one = |c: &Described| {
        json!({"pem": BASE64_STANDARD.encode(&c.pem), "serialNumber": c.serial_number,
            "validFrom": rfc3339(c.not_before), "expirationTime": rfc3339(c.not_after)})
    };
    let all = |certificates: Vec<Described>| certificates.iter().map(one).collect::<Vec<_>>();
    let credentials = c.credentials.as_ref();
    let state = match (&c.serial, &c.error) {
        (Some(_), _) => json!("Available"),
        (None, Some(error)) => json!(format!("Unavailable: {error}")),
        (None, None) => json!("Initializing"),
    };
    json!({
        "identity": c.identity.to_string(), "state": state,
        "certChain": all(credentials.map(|c| c.chain()).unwrap_or_default()),
        "rootCerts": all(credentials.map(|c| c.trust().described()).unwrap_or_default()),
    })
}

/// The pods served here with their connections.
fn workload_state(node: &Node, snapshot: &Snapshot, cluster: &str) -> Value {
    let open = node.proxy.open.all();
    let of = |pod: &Workload, direction: Direction| {
        let is_its = |o: &&Arc<Open>| {
            let end = if direction == Direction::Outbound { &o.source } else { &o.destination };
            o.direction == direction && end.workload.as_ref().is_some_and(|w| w.uid == pod.uid)
        };
        let one = |o: &Arc<Open>| {
            // Out of a pod: what was dialled, and where that led. Into one: the service that was, and the application.
            let (original, actual) = match direction {
                Direction::Outbound => (json!(o.asked.or(o.destination.address)), o.tunnel.or(o.destination.address)),
                Direction::Inbound => (json!(o.service.as_ref().map(ObjectName::fqdn)), o.destination.address),
            };
            json!({"src": o.source.address, "originalDst": original, "actualDst": actual,
                "protocol": if o.tunnel.is_some() { "HBONE" } else { "TCP" }})
        };
        open.iter().filter(is_its).map(one).collect::<Vec<_>>()
    };
    let mine = snapshot.workloads().filter(|w| w.enrolled && w.node == snapshot.mesh.node);
    let one = |w: &Arc<Workload>| {
        let state = json!({
            "state": "Up",
            "connections": {"inbound": of(w, Direction::Inbound), "outbound": of(w, Direction::Outbound)},
            "info": {"name": &*w.name.name, "namespace": &*w.name.namespace, "trustDomain": w.identity.trust_domain().as_str(), "serviceAccount": account(w)},
        });
        (uid(w, cluster), state)
    };
    mine.map(one).collect::<Map<_, _>>().into()
}
