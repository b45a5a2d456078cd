//! Which connections may go past the proxy: a pure function of the configuration and the pods this process serves.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use crate::{
    capture::{Dialled, direct::MOST_ENDPOINTS},
    config::{DestinationRequests, Snapshot},
    detect::Protocol,
    id::WorkloadUid,
    policy::Facts,
    proxy::Proxy,
    route::{
        Service, ServicePort, Target, Workload,
        traffic::{Balancer, TcpPool},
    },
};

/// Pods of this node that are served, with what the kernel knows their network namespaces by.
pub type Served = HashMap<WorkloadUid, u64>;

/// Why a connection goes through the proxy although both pods are on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Indirect {
    /// It may carry HTTP, or nobody says what it carries.
    Protocol,
    /// Routes decide where it goes.
    Routes,
    /// It has limits, or its endpoints are picked or watched in a way that takes the proxy.
    TrafficPolicy,
    /// Some of its endpoints are not pods of this node that are served, or there are none or too many.
    Endpoints,
    /// One of the pods does not want it.
    SwitchedOff,
    /// Policy denies it, has to see what it carries, or wants to be told.
    Policy,
    /// It may go directly, but did not: the client chose its own address or port, calls itself, began before that was so, or there was
    /// no room.
    Unused,
}

impl Indirect {
    /// The metric label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Protocol => "protocol",
            Self::Routes => "routes",
            Self::TrafficPolicy => "traffic_policy",
            Self::Endpoints => "endpoints",
            Self::SwitchedOff => "switched_off",
            Self::Policy => "policy",
            Self::Unused => "unused",
        }
    }
}

/// All that may go directly.
pub fn routes(snapshot: &Snapshot, served: &Served) -> HashMap<Dialled, Vec<SocketAddr>> {
    let decide = Decide { snapshot, served };
    let sources = served.iter().filter_map(|(uid, cookie)| Some((snapshot.workload(uid).filter(|w| w.enrolled)?, *cookie)));
    let sources = sources.collect::<Vec<_>>();
    let mut found = decide.everywhere();
    for to in decide.dialled() {
        if let Some(endpoints) = decide.for_any(to) {
            found.insert(Dialled { source: None, to }, endpoints);
            continue;
        }
        for (source, cookie) in &sources {
            if let Ok(endpoints) = decide.from(source, to) {
                found.insert(Dialled { source: Some(*cookie), to }, endpoints);
            }
        }
    }
    found
}

/// Why a connection does not go directly.
pub fn why_not(snapshot: &Snapshot, served: &Served, source: &Workload, to: SocketAddr) -> Indirect {
    let off = |w: &Workload| !w.accelerate;
    if off(source) || snapshot.workload_by_ip(to.ip()).is_some_and(|w| off(w)) {
        return Indirect::SwitchedOff;
    }
    Decide { snapshot, served }.from(source, to).err().unwrap_or(Indirect::Unused)
}

struct Decide<'s> {
    snapshot: &'s Snapshot,
    served: &'s Served,
}

impl Decide<'_> {
    /// Pods whose every port may be reached by every pod of the node.
    fn everywhere(&self) -> HashMap<Dialled, Vec<SocketAddr>> {
        let external = self.snapshot.external_addresses().map(|a| a.ip()).collect::<HashSet<_>>();
        let open = self.served.keys().filter_map(|uid| self.snapshot.workload(uid)).filter(|w| {
            let here = w.enrolled && w.accelerate && w.node == self.snapshot.mesh.node;
            here && w.policy.everywhere.is_empty() && w.policy.ports.is_empty() && !(self.looks() && w.carries_http_anywhere())
        });
        let is_its = |w: &Workload, ip: &IpAddr| self.snapshot.workload_by_ip(*ip).is_some_and(|found| found.uid == w.uid);
        let ips = open.flat_map(|w| w.ips.iter().filter(|ip| is_its(w, ip)).copied().collect::<Vec<_>>());
        let routes =
            ips.filter(|ip| !external.contains(ip) && matches!(self.snapshot.resolve(SocketAddr::new(*ip, 0)), Target::Workload(_)));
        routes.map(|ip| (Dialled { source: None, to: SocketAddr::new(ip, 0) }, Vec::new())).collect()
    }

    /// Addresses that are worth asking about: of services, and of the ports of this node's pods that services lead to.
    fn dialled(&self) -> BTreeSet<SocketAddr> {
        let ports = self.snapshot.services().iter().flat_map(|s| s.ports.iter().map(move |p| (s, p)));
        let mut all = BTreeSet::new();
        for (service, port) in ports {
            all.extend(service.vips.iter().map(|ip| SocketAddr::new(*ip, port.port)));
            all.extend(port.cluster.endpoints.iter().map(|e| e.address).filter(|a| self.destination(*a).is_some()));
        }
        all
    }

    /// Where connections of every pod of the node may go, whoever it is.
    fn for_any(&self, to: SocketAddr) -> Option<Vec<SocketAddr>> {
        let endpoints = match self.snapshot.resolve(to) {
            Target::Service { service, .. } if self.snapshot.is_viewed(&service.name) => return None,
            Target::Service { service, port } => self.endpoints(service, port, to).ok()?,
            Target::Workload(_) => vec![to],
            Target::NoSuchPort(_) | Target::Unknown => return None,
        };
        let open = |to: &SocketAddr| self.destination(*to).is_some_and(|w| w.policy.at(to.port()).is_empty());
        endpoints.iter().all(open).then_some(endpoints)
    }

    /// Where connections of one pod may go.
    fn from(&self, source: &Workload, to: SocketAddr) -> Result<Vec<SocketAddr>, Indirect> {
        let endpoints = match self.snapshot.resolve_for(&source.view, to) {
            Target::Service { service, port } => self.endpoints(service, port, to)?,
            Target::Workload(_) => vec![to],
            Target::NoSuchPort(_) | Target::Unknown => return Err(Indirect::Endpoints),
        };
        for endpoint in &endpoints {
            if self.snapshot.workload_by_ip(endpoint.ip()).is_some_and(|w| self.looks_into(w, endpoint.port())) {
                return Err(Indirect::Protocol);
            }
            let workload = self.destination(*endpoint).ok_or(Indirect::Endpoints)?;
            let client = address_like(source, endpoint.ip()).ok_or(Indirect::Endpoints)?;
            let facts = facts(self.snapshot, source, client, *endpoint);
            if !workload.policy.allows_unconditionally(&facts) {
                return Err(Indirect::Policy);
            }
        }
        Ok(endpoints)
    }

    /// The endpoints of a service's port, when any of them will do and all are of this node.
    fn endpoints(&self, service: &Service, port: &ServicePort, to: SocketAddr) -> Result<Vec<SocketAddr>, Indirect> {
        let cluster = &port.cluster;
        if !matches!(cluster.protocol, Protocol::Tcp | Protocol::Tls) {
            return Err(Indirect::Protocol);
        }
        if !port.routes.tcp.is_empty() || !port.routes.tls.is_empty() {
            return Err(Indirect::Routes);
        }
        if port.guard.is_some() && port.is_guarded {
            return Err(Indirect::Policy);
        }
        let policy = &cluster.policy;
        if policy.tcp != TcpPool::default() || policy.outlier.is_some() || !policy.names.is_empty() {
            return Err(Indirect::TrafficPolicy);
        }
        if policy.balancer == Balancer::Passthrough && cluster.endpoints.iter().any(|e| e.address == to) {
            // A headless service: where it was dialled, and nowhere else.
            return if self.destination(to).is_some() { Ok(vec![to]) } else { Err(Indirect::Endpoints) };
        }
        let here = |e: &&crate::route::Endpoint| !cluster.local_only || e.node.as_deref() == Some(&*self.snapshot.mesh.node);
        let ready = cluster.endpoints.iter().filter(|e| e.ready).filter(here).map(|e| e.address);
        // A socket stays in its family: a pod without an address of it is out of reach, and so has to be left to the proxy.
        let (endpoints, others) = ready.partition::<Vec<_>, _>(|a| a.is_ipv4() == to.is_ipv4());
        let uid = |a: &SocketAddr| self.destination(*a).map(|w| &w.uid);
        let reached = endpoints.iter().filter_map(uid).collect::<HashSet<_>>();
        if !others.iter().all(|a| uid(a).is_some_and(|uid| reached.contains(uid))) {
            return Err(Indirect::Endpoints);
        }
        let one = endpoints.len() == 1;
        let random = matches!(policy.balancer, Balancer::Unset | Balancer::LeastRequest | Balancer::Random) && policy.warmup.is_none();
        if policy.balancer == Balancer::Passthrough || !one && !random {
            return Err(Indirect::TrafficPolicy);
        }
        let usable = |to: &SocketAddr| self.destination(*to).is_some() && service.vips.iter().all(|vip| *vip != to.ip());
        if endpoints.is_empty() || endpoints.len() > MOST_ENDPOINTS || !endpoints.iter().all(usable) {
            return Err(Indirect::Endpoints);
        }
        Ok(endpoints)
    }

    /// The pod behind an address, if it is of this node and served.
    fn destination(&self, to: SocketAddr) -> Option<&Workload> {
        let workload = self.snapshot.workload_by_ip(to.ip())?;
        let here =
            workload.enrolled && workload.accelerate && workload.node == self.snapshot.mesh.node && self.served.contains_key(&workload.uid);
        (here && !mesh_common::is_reserved_port(to.port()) && !self.looks_into(workload, to.port())).then_some(workload)
    }

    /// Whether destinations look into what is declared to carry HTTP, whoever asks about it.
    fn looks(&self) -> bool {
        self.snapshot.mesh.destination_requests == DestinationRequests::Declared
    }

    /// Whether what comes to a port is looked into: its application is told who asks, and requests are told of.
    fn looks_into(&self, workload: &Workload, port: u16) -> bool {
        self.looks() && workload.carries_http(port, None)
    }
}

/// What is known of a connection before it is dialled.
pub fn facts(snapshot: &Snapshot, source: &Workload, client: IpAddr, to: SocketAddr) -> Facts {
    let mut facts = Facts::new(Some(source.identity.clone()), client, to);
    facts.via_trusted_proxy = snapshot.mesh.is_trusted_proxy(facts.peer.as_ref(), client);
    facts
}

/// A workload's address of the family of another.
pub fn address_like(workload: &Workload, like: IpAddr) -> Option<IpAddr> {
    workload.ips.iter().copied().find(|ip| ip.is_ipv4() == like.is_ipv4())
}

/// Whether anything a table is made of has changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Basis {
    generation: u64,
    served: HashSet<(WorkloadUid, u64)>,
    addresses: BTreeSet<IpAddr>,
}

impl Basis {
    pub fn new(snapshot: &Snapshot, served: &Served, proxy: &Proxy) -> Self {
        let addresses = proxy.pods.all().iter().flat_map(|p| p.addresses().to_vec()).collect();
        let served = served.iter().map(|(uid, cookie)| (uid.clone(), *cookie)).collect();
        Self { generation: snapshot.generation, served, addresses }
    }
}
