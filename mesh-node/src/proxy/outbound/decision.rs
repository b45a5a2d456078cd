//! Where a connection goes: decided from one snapshot, without touching a socket.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use mesh_common::addr;

use super::Opaque;
use crate::{
    balance::{self, Asker},
    config::{OutboundPolicy, Snapshot},
    id::ObjectName,
    policy::{Denial, Facts, Governing, Sni},
    proxy::{
        Failure, Proxy, ServedPod,
        http::clusters::{ClusterState, EndpointState},
        outcome::{Outcome, Party},
    },
    route::{
        Cluster, ClusterId, LoadGuard, PortOf, Target, Workload,
        l4::L4Context,
        table::FoundL4,
        traffic::{Balancer, HashKey},
    },
    tls::HandshakeFailure,
};

/// Where one attempt goes, decided from one snapshot.
pub struct Decision {
    pub way: Way,
    pub source: Arc<Workload>,
    /// The service, and what is counted at it; none for an address that is of no service.
    pub cluster: Option<Chosen>,
    pub guarded: Option<Guarded>,
}

/// An endpoint picked from a cluster.
pub struct Chosen {
    pub cluster: Arc<Cluster>,
    pub state: Arc<ClusterState>,
    pub endpoint: Arc<EndpointState>,
    pub load: Option<LoadGuard>,
}

pub enum Way {
    /// Unchanged: unknown to the mesh, or known but not in it.
    Plain(SocketAddr, Option<Arc<Workload>>),
    /// A pod of this node.
    Local(SocketAddr, Arc<Workload>),
    /// A pod of another node.
    Tunnel(SocketAddr, Arc<Workload>),
}

impl Way {
    pub fn to(&self) -> SocketAddr {
        match self {
            Self::Plain(to, _) | Self::Local(to, _) | Self::Tunnel(to, _) => *to,
        }
    }
}

impl Way {
    /// Who is there, if it is a pod.
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        match self {
            Self::Plain(_, workload) => workload.as_ref(),
            Self::Local(_, workload) | Self::Tunnel(_, workload) => Some(workload),
        }
    }
}

impl Decision {
    pub fn to(&self) -> SocketAddr {
        self.way.to()
    }
}

/// A workload on a node, as the client of one of its addresses, that has tried nothing yet; `turn` and `ejected` are the cluster's.
pub fn asker<'a>(source: &'a Workload, node: &'a str, client: IpAddr, (turn, ejected): (u64, &'a [(SocketAddr, Instant)])) -> Asker<'a> {
    Asker {
        client,
        own: &source.ips,
        node,
        locality: &source.locality,
        labels: &source.labels,
        dice: fastrand::u64(..),
        turn,
        hash: None,
        tried: &[],
        attempted: &[],
        ejected,
        now: Instant::now(),
    }
}

/// Whether a cluster's endpoint may be who it is: of a rule that says which names (`subjectAltNames`), one of them. Who is no pod of the mesh
/// proves none.
pub fn is_meant(cluster: &Cluster, workload: Option<&Workload>) -> Result<(), Failure> {
    let names = &cluster.policy.names;
    if names.is_empty() {
        return Ok(());
    }
    let identity = workload.filter(|w| w.enrolled).map(|w| w.identity.to_string());
    if identity.as_deref().is_some_and(|identity| names.iter().any(|name| **name == *identity)) {
        return Ok(());
    }
    let who = identity.unwrap_or_else(|| "nobody of the mesh".to_owned());
    let source = std::io::Error::other(format!("the destination is {who}, which subjectAltNames of the DestinationRule does not name"));
    Err(Failure::Tls { kind: HandshakeFailure::WrongIdentity, source })
}

/// Completes when an endpoint of a cluster is none any more.
pub async fn left(proxy: &Proxy, pod: &ServedPod, cluster: &Cluster, address: SocketAddr) {
    let there = |cluster: &Cluster| cluster.endpoints.iter().any(|e| e.address == address);
    // What was dialled by the client, and is passed through to, may never have been one.
    if !there(cluster) {
        return std::future::pending().await;
    }
    let mut config = proxy.config.clone();
    loop {
        {
            let snapshot = config.load();
            let view = snapshot.workload(&pod.uid).map_or("", |w| &w.view);
            let cluster = snapshot.cluster_for(view, &cluster.id);
            if !cluster.is_some_and(|c| there(c)) {
                return;
            }
        }
        if !config.changed().await {
            return std::future::pending().await;
        }
    }
}

/// What was dialled, as far as it is of a service.
pub fn dialled(opaque: &Opaque) -> Option<ClusterId> {
    let Opaque { proxy, pod, original, .. } = opaque;
    let snapshot = proxy.config.load();
    let source = snapshot.workload(&pod.uid)?;
    match snapshot.resolve_for(&source.view, *original) {
        Target::Service { service, .. } | Target::NoSuchPort(service) => {
            Some(ClusterId { service: service.name.clone(), port: original.port(), subset: "".into() })
        }
        Target::Workload(_) | Target::Unknown => None,
    }
}

pub fn decide(opaque: &Opaque, tried: &[SocketAddr]) -> Result<Decision, Failure> {
    let Opaque { proxy, pod, client, original, sni, .. } = opaque;
    let snapshot = proxy.config.load();
    let source = snapshot.workload(&pod.uid).ok_or(Failure::UnknownWorkload)?.clone();
    let mut guarded = None;
    let (to, cluster) = match snapshot.resolve_for(&source.view, *original) {
        Target::Service { service, port } => {
            let client = client_address(pod, *client, *original);
            let context = L4Context { source: &source, client, destination: *original, sni: sni.as_deref() };
            let found = port.routes.l4_rule(context);
            let is_guarded = match &found {
                FoundL4::Rule(_, found) => found.is_guarded,
                FoundL4::Nowhere | FoundL4::Service => port.is_guarded,
            };
            if is_guarded {
                port.guard.iter().try_for_each(|governing| guard(&snapshot, opaque, &source, &service.name, governing))?;
                let dialled = PortOf { service: service.name.clone(), port: port.port };
                guarded = Some(Guarded { dialled, generation: snapshot.generation });
            }
            let cluster = match found {
                FoundL4::Rule(_, found) => found.pick(fastrand::u64(..)).ok_or_else(|| Failure::NoEndpoint(service.name.clone()))?,
                FoundL4::Nowhere => return Err(Failure::NoRoute(service.name.clone())),
                FoundL4::Service => &port.cluster,
            };
            let (to, chosen) = choose(&snapshot, &source, pod, cluster, (client, *original, &service.name), tried)?;
            (to, Some(chosen))
        }
        Target::NoSuchPort(service) => return Err(Failure::NoSuchPort { service: service.name.clone(), port: original.port() }),
        Target::Unknown if snapshot.outbound == OutboundPolicy::RegistryOnly => return Err(Failure::NotInRegistry(*original)),
        Target::Workload(_) | Target::Unknown => (*original, None),
    };
    Ok(Decision { way: way(&snapshot, to)?, source, cluster, guarded })
}

/// The service that was dialled, as long as its policies are asked here: its endpoints would not be asked theirs where the connection goes.
#[derive(Debug, Clone)]
pub struct Guarded {
    dialled: PortOf,
    generation: u64,
}

/// Asks the policies of the service that was dialled.
fn guard(snapshot: &Snapshot, opaque: &Opaque, source: &Workload, service: &ObjectName, governing: &Governing) -> Result<(), Denial> {
    let mut facts = Facts::new(Some(source.identity.clone()), client_address(&opaque.pod, opaque.client, opaque.original), opaque.original);
    facts.via_trusted_proxy = snapshot.mesh.is_trusted_proxy(facts.peer.as_ref(), facts.source);
    facts.sni = Sni::Read(opaque.sni.as_deref().map(Into::into));
    facts.dialled = Some(service.clone());
    // Nobody is asked about it here: what an authorizer would have to allow is denied.
    let judged = governing.opaque(&facts, &[]).map(drop);
    judged.inspect_err(|denial| opaque.proxy.metrics.policy_decision(denial.policy(), "connection_denied"))
}

/// Completes when policies of the service that was dialled have come to deny an open connection.
pub async fn denied_later(opaque: &Opaque, guarded: Option<&Guarded>) {
    let Some(Guarded { dialled, generation }) = guarded else { return std::future::pending().await };
    let mut config = opaque.proxy.config.clone();
    loop {
        {
            let snapshot = config.load();
            let source = snapshot.workload(&opaque.pod.uid).filter(|_| snapshot.generation != *generation);
            let governing = source.and_then(|source| {
                let port = snapshot.service_of(&source.view, &dialled.service)?.port(dialled.port)?;
                Some((source, port.guard.as_ref()?))
            });
            if governing.is_some_and(|(source, governing)| guard(&snapshot, opaque, source, &dialled.service, governing).is_err()) {
                return;
            }
        }
        if !config.changed().await {
            return std::future::pending().await;
        }
    }
}

fn choose(
    snapshot: &Snapshot,
    source: &Workload,
    pod: &ServedPod,
    cluster: &Arc<Cluster>,
    (client, original, dialled): (IpAddr, SocketAddr, &ObjectName),
    tried: &[SocketAddr],
) -> Result<(SocketAddr, Chosen), Failure> {
    let state = pod.clusters.of(cluster);
    let hash = matches!(&cluster.policy.balancer, Balancer::Hash { key: HashKey::SourceIp, .. });
    let ejected = state.outliers.ejected_by(cluster.policy.outlier.as_ref());
    let asker = Asker {
        hash: hash.then(|| balance::hash(client.to_string().as_bytes())),
        tried,
        ..asker(source, &snapshot.mesh.node, client, (state.turn(), &ejected))
    };
    let (address, load) = if cluster.policy.balancer == Balancer::Passthrough && cluster.id.service == *dialled {
        (original, cluster.endpoints.iter().find(|e| e.address == original).map(|e| e.load.begin()))
    } else {
        let picked = balance::pick(cluster, &asker).ok_or_else(|| Failure::NoEndpoint(cluster.id.service.clone()))?;
        (picked.address, Some(picked.load.begin()))
    };
    Ok((address, Chosen { cluster: cluster.clone(), endpoint: state.endpoint(address), state, load }))
}

pub fn way(snapshot: &Snapshot, to: SocketAddr) -> Result<Way, Failure> {
    let Some(workload) = snapshot.workload_by_ip(to.ip()) else { return Ok(Way::Plain(to, None)) };
    if !workload.enrolled {
        return Ok(Way::Plain(to, Some(workload.clone())));
    }
    if mesh_common::is_reserved_port(to.port()) {
        return Err(Failure::ReservedPort(to.port()));
    }
    let workload = workload.clone();
    Ok(if workload.node == snapshot.mesh.node { Way::Local(to, workload) } else { Way::Tunnel(to, workload) })
}

/// The client as others are to see it: with an address of its pod's, whatever it has bound itself to. A process may bind to what it likes (loopback,
/// addresses it has added, those the connect hook aims at), and others' policies and logs are about pods. One that is led to the other family has its
/// pod's address of that.
pub fn client_address(pod: &ServedPod, client: SocketAddr, like: SocketAddr) -> IpAddr {
    let (ip, own) = (client.ip(), pod.addresses());
    if client.is_ipv4() == like.is_ipv4() && own.contains(&ip) {
        return ip;
    }
    // Of a family that its pod has no address of: what is nobody else's, or none.
    let is_nobodys = own.is_empty() || ip.is_loopback() || matches!(ip, IpAddr::V6(v6) if addr::is_spread_v6(&v6.octets()));
    let none = if like.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    pod.address_like(like.ip()).unwrap_or(if is_nobodys { ip } else { none })
}

pub fn describe(outcome: &mut Outcome, decision: &Decision) {
    outcome.source.workload = Some(decision.source.clone());
    outcome.cluster = decision.cluster.as_ref().map(|c| c.cluster.id.clone());
    let known = |w: &Arc<Workload>| (Some(w.clone()), Some(w.identity.clone()));
    let (workload, identity) = match &decision.way {
        Way::Plain(_, workload) => (workload.clone(), None),
        Way::Local(_, workload) | Way::Tunnel(_, workload) => known(workload),
    };
    outcome.source.identity = identity.as_ref().map(|_| decision.source.identity.clone());
    outcome.destination = Party { address: Some(decision.to()), identity, workload };
    outcome.tunnel = matches!(decision.way, Way::Tunnel(..)).then(|| hbone_address(decision.to()));
}

pub fn hbone_address(to: SocketAddr) -> SocketAddr {
    SocketAddr::new(to.ip(), mesh_common::HBONE_PORT)
}
