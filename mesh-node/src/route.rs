//! Where traffic is going: from an original destination to a service, by its routes to a cluster, or to a workload or the
//! unknown. Pure: names and snapshots in, decisions out.

pub mod cluster;
pub mod l4;
pub mod matching;
mod re2;
pub mod request;
pub mod retry;
pub mod rewrite;
pub mod rule;
pub mod table;
pub mod target;
pub mod traffic;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

pub use cluster::{Cluster, ClusterId, Endpoint, Load, LoadGuard};
pub use table::PortRoutes;

use crate::{
    detect::Protocol,
    id::{ObjectName, SpiffeId, WorkloadUid},
    policy::{Governing, WorkloadPolicy},
    report::Reporting,
    resource::{kube::WorkloadKind, selector::Labels},
};

/// A pod, as the data path sees it.
#[derive(Debug)]
pub struct Workload {
    pub uid: WorkloadUid,
    pub name: ObjectName,
    /// What made it, as Istio names workloads in metrics.
    pub workload_name: Arc<str>,
    pub workload_kind: WorkloadKind,
    pub node: Arc<str>,
    pub identity: SpiffeId,
    pub labels: Labels,
    pub locality: cluster::Locality,
    pub ips: Vec<IpAddr>,
    /// Whether its traffic is captured and it takes HBONE.
    pub enrolled: bool,
    pub policy: WorkloadPolicy,
    /// What services make of its ports.
    pub ports: Arc<Ports>,
    /// What is told of its traffic.
    pub reporting: Arc<Reporting>,
    /// How it sees services as a client: the name of a view, of its namespace's where that is not of its own.
    pub view: Arc<str>,
    /// Ports its probes and hooks name.
    pub probes: BTreeSet<u16>,
    /// Whether its connections may be accelerated.
    pub accelerate: bool,
}

/// What the services of a workload's namespace make of its ports.
#[derive(Debug, Default)]
pub struct Ports {
    /// What they carry, as far as it is declared.
    pub protocols: BTreeMap<u16, Protocol>,
    /// Of those about which services disagree, the services that say nothing but HTTP of them.
    pub http_of: BTreeMap<u16, Vec<ObjectName>>,
    /// The service that leads to one.
    pub services: BTreeMap<u16, PortOf>,
    /// All of them, where there are several, by name and port.
    pub shared: BTreeMap<u16, Vec<PortOf>>,
}

impl Workload {
    /// The service that was meant by who has come to a port: the one that was dialled, as far as that leads here.
    pub fn service_at(&self, port: u16, dialled: Option<&ObjectName>) -> Option<&ObjectName> {
        Some(&self.port_of(port, dialled, None)?.service)
    }

    /// The same with the port of the service; `asked`: the one that a request names, which tells apart those of one service.
    pub fn port_of(&self, port: u16, dialled: Option<&ObjectName>, asked: Option<u16>) -> Option<&PortOf> {
        let first = self.ports.services.get(&port)?;
        let service = dialled.unwrap_or(&first.service);
        let of = || self.ports.shared.get(&port).into_iter().flatten().filter(|of| of.service == *service);
        let asked = asked.and_then(|asked| of().find(|of| of.port == asked));
        Some(asked.or_else(|| of().next()).unwrap_or(first))
    }

    /// What a port of its carries.
    pub fn protocol(&self, port: u16) -> Protocol {
        self.ports.protocols.get(&port).copied().unwrap_or_default()
    }

    /// Whether a port of its carries HTTP for who has dialled this service, or the pod itself, as far as services say so.
    pub fn carries_http(&self, port: u16, dialled: Option<&ObjectName>) -> bool {
        self.protocol(port).is_http() || self.ports.http_of.get(&port).is_some_and(|all| dialled.is_none_or(|of| all.contains(of)))
    }

    /// Whether some port of its does.
    pub fn carries_http_anywhere(&self) -> bool {
        self.ports.protocols.values().any(|protocol| protocol.is_http())
    }

    /// Istio's canonical service name, as far as labels give one.
    pub fn canonical_service(&self) -> Option<&str> {
        let label = |key: &str| self.labels.get(key);
        label("service.istio.io/canonical-name").or_else(|| label("app.kubernetes.io/name")).or_else(|| label("app"))
    }

    /// The name of its application, in metrics.
    pub fn app(&self) -> Option<&str> {
        let label = |key: &str| self.labels.get(key);
        label("app").or_else(|| label("app.kubernetes.io/name")).or_else(|| label("service.istio.io/canonical-name"))
    }

    /// Istio's canonical revision, as far as labels give one.
    pub fn canonical_revision(&self) -> Option<&str> {
        let label = |key: &str| self.labels.get(key);
        label("service.istio.io/canonical-revision").or_else(|| label("app.kubernetes.io/version")).or_else(|| label("version"))
    }
}

/// A Kubernetes service with its endpoints and routes resolved.
#[derive(Debug)]
pub struct Service {
    pub name: ObjectName,
    pub vips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
}

#[derive(Debug)]
pub struct ServicePort {
    pub name: Arc<str>,
    pub port: u16,
    /// All endpoints.
    pub cluster: Arc<Cluster>,
    /// Subsets of them by name.
    pub subsets: BTreeMap<Arc<str>, Arc<Cluster>>,
    pub routes: PortRoutes,
    /// The policies that refer to the service, which its own endpoints ask. They are asked where the client is of what does not go
    /// there, or not as it came, as a waypoint would.
    pub guard: Option<Arc<Governing>>,
    /// Not all of its own endpoints ask them: some are no pods of the mesh, or do not know which port was dialled. Where there are routes it is
    /// known without policies, too: later ones end what is under way.
    pub is_guarded: bool,
}

/// A service's port, as it leads to a pod's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortOf {
    pub service: ObjectName,
    pub port: u16,
}

/// What an original destination is.
#[derive(Debug, Clone)]
pub enum Target<'a> {
    Service {
        service: &'a Arc<Service>,
        port: &'a ServicePort,
    },
    Workload(&'a Arc<Workload>),
    /// An address of a service, on a port it does not have.
    NoSuchPort(&'a Arc<Service>),
    /// Nothing the mesh knows.
    Unknown,
}

impl Service {
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == number)
    }
}
