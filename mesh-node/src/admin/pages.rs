//! What the admin endpoint shows, as JSON documents.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};

use super::{NoAnswer, query};
use crate::{
    app::{NO_PROCESS, Node, PodState},
    identity::CertificateState,
    problems,
    proxy::http::clusters::{ClusterState, Limited},
    route::Workload,
};

pub(super) fn status(node: &Node) -> Value {
    let snapshot = node.proxy.config.load();
    let settings = &node.settings;
    json!({
        "node": &*settings.mesh.node,
        "version": env!("CARGO_PKG_VERSION"),
        "ready": node.is_ready(),
        "uptimeSeconds": node.started.elapsed().unwrap_or_default().as_secs(),
        "failMode": format!("{:?}", settings.capture.fail_mode).to_lowercase(),
        "trustDomain": settings.mesh.trust_domains.local.as_str(),
        "outboundTrafficPolicy": match snapshot.outbound {
            crate::config::OutboundPolicy::AllowAny => "ALLOW_ANY",
            crate::config::OutboundPolicy::RegistryOnly => "REGISTRY_ONLY",
        },
        "generation": snapshot.generation,
        "openConnections": node.proxy.metrics.open_connections.get(),
        "remarks": remarks(node),
    })
}

/// What is not in force, and what is wrong with the node itself.
fn remarks(node: &Node) -> Vec<String> {
    let proxy = &node.proxy;
    let configuration = proxy.config.statuses().iter().map(ToString::to_string).collect::<Vec<_>>();
    let own = problems::all().into_iter().map(|(_, text)| text);
    let configuration = configuration.into_iter().chain(proxy.jwks.problems());
    configuration.chain(own).chain(uncertified(&proxy.identity.states())).chain(unserved(&node.pods())).collect()
}

/// How long a pod may be known before a process of it is found.
const ABOUT_TO_BEGIN: Duration = Duration::from_secs(15);
/// Most pods that are told of one by one.
const MAX_LISTED: usize = 20;

/// Pods of the mesh that are there and cannot be served.
fn unserved(pods: &[PodState]) -> Vec<String> {
    let told = pods.iter().filter_map(|p| match p.problem.as_deref()? {
        // It may be about to begin. One without an address has no traffic either.
        NO_PROCESS => {
            let since = p.absent?.elapsed();
            (since > ABOUT_TO_BEGIN && !p.addresses.is_empty()).then(|| {
                format!(
                    "error: Pod {}/{} is not captured: {NO_PROCESS} for {} s; if it runs, its traffic is neither encrypted nor governed",
                    p.namespace,
                    p.name,
                    since.as_secs()
                )
            })
        }
        problem => Some(format!("error: Pod {}/{} cannot be served, and its connections are refused: {problem}", p.namespace, p.name)),
    });
    told.take(MAX_LISTED).collect()
}

/// One for all identities that have no certificate, or one that cannot be renewed: they have one source.
fn uncertified(states: &[CertificateState]) -> Option<String> {
    let failing = states.iter().filter_map(|state| Some((state, state.error.as_deref()?))).collect::<Vec<_>>();
    let (first, error) = failing.first()?;
    Some(format!(
        "error: {} of {} identities have no certificate, or none that can be renewed; of {} because {error}; meshctl certificates shows all",
        failing.len(),
        states.len(),
        first.identity
    ))
}

pub(super) fn workloads(node: &Node) -> Value {
    let snapshot = node.proxy.config.load();
    let mut all = snapshot.workloads().collect::<Vec<_>>();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all.into_iter().map(|w| workload(w)).collect()
}

fn workload(w: &Workload) -> Value {
    let mode = |strict: bool| if strict { "STRICT" } else { "PERMISSIVE" };
    // Of what is not in the mesh nobody asks for certificates.
    let ports = w.policy.mtls.ports.iter().filter(|_| w.enrolled).map(|(port, strict)| (port.to_string(), json!(mode(*strict))));
    json!({
        "namespace": &*w.name.namespace, "name": &*w.name.name, "uid": w.uid.to_string(), "node": &*w.node,
        "identity": w.identity.to_string(), "addresses": w.ips, "protocol": if w.enrolled { "HBONE" } else { "TCP" },
        "mtls": w.enrolled.then(|| mode(w.policy.mtls.strict)), "mtlsByPort": ports.collect::<serde_json::Map<_, _>>(),
        "policies": governing(&w.policy.everywhere),
        "policiesByPort": w.policy.ports.iter().map(|(port, g)| (port.to_string(), governing(g))).collect::<serde_json::Map<_, _>>(),
    })
}

/// What governs a workload, or a port of it.
fn governing(governing: &crate::policy::Governing) -> Value {
    let all = &governing.authorization;
    let names = |rules: &crate::policy::RuleSet| {
        let mut names = rules.rules().iter().map(|r| r.policy.to_string()).collect::<Vec<_>>();
        names.dedup();
        names
    };
    // Also those without rules: it is them that allow nothing.
    let allow =
        |allow: &crate::policy::Allow| (!allow.is_empty()).then(|| allow.policies().iter().map(ToString::to_string).collect::<Vec<_>>());
    json!({
        "all": all.policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "allow": allow(&all.allow), "deny": names(&all.deny), "audit": names(&all.audit),
        "dryRunAllow": allow(&all.shadow_allow), "dryRunDeny": names(&all.shadow_deny),
        "custom": all.custom.iter().map(|(provider, rules)| (provider.to_string(), json!(names(rules)))).collect::<serde_json::Map<_, _>>(),
        "issuers": governing.authentication.iter().map(|r| r.issuer.to_string()).collect::<Vec<_>>(),
    })
}

pub(super) fn services(node: &Node) -> Value {
    let snapshot = node.proxy.config.load();
    let workload = |ip| snapshot.workload_by_ip(ip).map(|w| w.name.to_string());
    let port = |p: &crate::route::ServicePort| {
        let endpoints = p
            .cluster
            .endpoints
            .iter()
            .map(|e| json!({"address": e.address.to_string(), "workload": workload(e.address.ip()), "ready": e.ready, "connections": e.load.current()}));
        let subsets = p.subsets.iter().map(|(name, c)| json!({"name": &**name, "endpoints": c.endpoints.len()}));
        json!({
            "name": &*p.name, "port": p.port, "protocol": format!("{:?}", p.cluster.protocol).to_lowercase(),
            "httpRoutes": p.routes.http.as_ref().map(|t| json!({"from": &*t.origin, "rules": t.rules.len()})),
            "tcpRoutes": p.routes.tcp.len(), "tlsRoutes": p.routes.tls.len(),
            "subsets": subsets.collect::<Vec<_>>(), "endpoints": endpoints.collect::<Vec<_>>(),
        })
    };
    let one = |s: &Arc<crate::route::Service>| json!({"namespace": &*s.name.namespace, "name": &*s.name.name, "addresses": s.vips, "ports": s.ports.iter().map(port).collect::<Vec<_>>()});
    snapshot.services().iter().map(one).collect()
}

pub(super) fn certificates(node: &Node) -> Value {
    let seconds = |t: Option<SystemTime>| t.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|d| d.as_secs());
    let one = |c: crate::identity::CertificateState| json!({"identity": c.identity.to_string(), "notBefore": seconds(c.not_before), "notAfter": seconds(c.not_after), "serial": c.serial, "error": c.error});
    node.proxy.identity.states().into_iter().map(one).collect()
}

/// What each pod of the node has under way to other services, and which endpoints it leaves out.
pub(super) fn clusters(node: &Node) -> Value {
    let (snapshot, now) = (node.proxy.config.load(), std::time::Instant::now());
    let of_pod = |pod: Arc<crate::proxy::ServedPod>| {
        let source = snapshot.workload(&pod.uid).map(|w| w.name.to_string());
        let mut all = pod.clusters.all();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let one = move |(id, state): (crate::route::ClusterId, Arc<ClusterState>)| {
            let ejected = state.outliers.ejected();
            let ejected = ejected.iter().filter(|(_, until)| *until > now);
            let ejected = ejected.map(|(a, until)| json!({"address": a.to_string(), "seconds": until.duration_since(now).as_secs()}));
            json!({
                "source": source, "cluster": id.to_string(), "connections": state.count(Limited::Connections),
                "idle": state.idle(), "pending": state.count(Limited::Pending), "requests": state.count(Limited::Requests),
                "retries": state.count(Limited::Retries), "ejected": ejected.collect::<Vec<_>>(),
            })
        };
        all.into_iter().map(one).collect::<Vec<_>>()
    };
    node.proxy.pods.all().into_iter().flat_map(of_pod).collect()
}

/// Connections between the proxy and applications, with why each is accelerated or not.
pub(super) fn acceleration(node: &Node) -> Value {
    let Some(offers) = node.proxy.accelerated() else { return json!({"unavailable": true, "pairs": []}) };
    let one = |s: crate::capture::PairState| json!({"one": s.pair.one.local.to_string(), "other": s.pair.one.remote.to_string(), "state": s.state.name(), "redirectedBytes": s.redirected});
    json!({"unavailable": false, "pairs": offers.states().into_iter().map(one).collect::<Vec<_>>()})
}

/// Connections between pods of this node that go past the proxy.
pub(super) fn direct(node: &Node) -> Value {
    let name = |n: Option<crate::id::ObjectName>| n.map(|n| n.to_string());
    let one = |s: crate::proxy::direct::DirectState| {
        json!({
            "source": name(s.source), "destination": name(s.destination), "service": name(s.service),
            "client": s.flow.client.to_string(), "dialled": s.flow.dialled.to_string(), "endpoint": s.flow.endpoint.to_string(),
            "seconds": s.flow.begun.elapsed().as_secs(), "sentBytes": s.bytes.map(|b| b.0), "receivedBytes": s.bytes.map(|b| b.1),
        })
    };
    json!({"routes": node.direct.routes(), "connections": node.direct.states().into_iter().map(one).collect::<Vec<_>>()})
}

pub(super) fn pool(node: &Node) -> Value {
    let one = |s: crate::hbone::pool::PoolState| {
        json!({
            "source": s.key.source.to_string(), "sourceWorkload": s.key.source_workload.to_string(),
            "destination": s.key.destination.to_string(), "destinationWorkload": s.key.destination_workload.to_string(),
            "address": s.key.address.to_string(), "connections": s.connections, "streams": s.streams,
        })
    };
    node.proxy.pool.states().into_iter().map(one).collect()
}

/// Connections that are open: how each goes, between whom, and what it has carried.
pub(super) fn connections(node: &Node) -> Value {
    node.direct.measure();
    let now = std::time::Instant::now();
    let offers = node.proxy.accelerated();
    let pairs = offers.map(crate::capture::Offers::states).unwrap_or_default();
    // Of the two sockets, one is the proxy's: it has the client's address at one end or the other.
    let states = pairs.iter().flat_map(|s| [(s.pair.one.local, s.state), (s.pair.one.remote, s.state)]).collect::<HashMap<_, _>>();
    let acceleration = |open: &crate::proxy::open::Open| match (offers, open.path) {
        (None, _) => "off",
        (_, crate::proxy::open::Path::Direct) => "past the proxy",
        _ => open.source.address.and_then(|a| states.get(&a)).map_or("not offered", |state| state.name()),
    };
    let name = |p: &crate::proxy::outcome::Party| p.workload.as_ref().map(|w| w.name.to_string());
    let one = |open: &Arc<crate::proxy::open::Open>| {
        let (sent, received) = (open.traffic.sent.load(Relaxed), open.traffic.received.load(Relaxed));
        json!({
            "direction": open.direction.name(), "path": open.path.name(), "seconds": now.duration_since(open.started).as_secs(),
            "source": name(&open.source), "sourceAddress": open.source.address, "sourceIdentity": open.source.identity.as_ref().map(ToString::to_string),
            "destination": name(&open.destination), "destinationAddress": open.destination.address,
            "destinationIdentity": open.destination.identity.as_ref().map(ToString::to_string),
            "service": open.service.as_ref().map(ToString::to_string), "tunnel": open.tunnel,
            // Of a client's connection that is for its requests to say.
            "encrypted": (open.path != crate::proxy::open::Path::Requests).then_some(open.path == crate::proxy::open::Path::Tunnel),
            "acceleration": acceleration(open),
            "sentBytes": sent, "receivedBytes": received,
        })
    };
    let mut all = node.proxy.open.all();
    all.sort_by_key(|open| open.number);
    all.iter().map(one).collect()
}

/// What a workload of this node did lately: asks once without `from`, and then with `from=` what was `next` in the answer before.
pub(super) fn trace(node: &Node, query: &str) -> Result<Value, NoAnswer> {
    let (mut workload, mut from) = (None, None);
    for (name, value) in query::pairs(query)? {
        match name {
            "workload" => workload = Some(value),
            "from" => from = Some(value.parse().map_err(|_| format!("from: {value:?} is not a number"))?),
            _ => return Err(format!("{name}: is not known; workload and from are").into()),
        }
    }
    let workload = workload.ok_or("workload: is missing; say namespace/name of a pod")?;
    let snapshot = node.proxy.config.load();
    let unknown = || NoAnswer::Missing(super::authorization::unknown(&snapshot, "workload", &workload));
    let found = super::authorization::find(&snapshot, &workload).ok_or_else(unknown)?;
    if node.proxy.pods.by_uid(&found.uid).is_none() {
        let why = match (found.enrolled, found.node == snapshot.mesh.node) {
            (_, false) => format!("is a pod of node {:?}: ask there", found.node),
            (false, true) => "is not in the mesh: nothing of it is seen".to_owned(),
            (true, true) => "is not captured (yet): meshctl pods says why".to_owned(),
        };
        return Err(NoAnswer::Missing(format!("workload: {} {why}", found.name)));
    }
    let name = found.name.to_string();
    let events = node.proxy.metrics.watch.fetch(&name, from).ok_or("workload: too many are looked at; wait until others are done")?;
    let parsed = events.events.iter().filter_map(|e| serde_json::from_str::<Value>(e).ok());
    Ok(json!({"workload": name, "events": parsed.collect::<Vec<_>>(), "next": events.next, "lost": events.lost}))
}
