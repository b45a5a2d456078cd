//! Where a connection is going: from an original destination to a service's endpoints, a workload, or the unknown.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    id::{ObjectName, SpiffeId, WorkloadUid},
    policy::WorkloadPolicy,
    resource::selector::Labels,
};

/// A pod, as the data path sees it.
#[derive(Debug)]
pub struct Workload {
    pub uid: WorkloadUid,
    pub name: ObjectName,
    /// What made it, as Istio names workloads in metrics.
    pub workload_name: Arc<str>,
    pub node: Arc<str>,
    pub identity: SpiffeId,
    pub labels: Labels,
    pub ips: Vec<IpAddr>,
    /// Whether its traffic is captured and it takes HBONE.
    pub enrolled: bool,
    pub policy: WorkloadPolicy,
}

impl Workload {
    /// Istio's canonical service name, as far as labels give one.
    pub fn canonical_service(&self) -> Option<&str> {
        let label = |key: &str| self.labels.get(key);
        label("service.istio.io/canonical-name").or_else(|| label("app.kubernetes.io/name")).or_else(|| label("app"))
    }

    /// Istio's canonical revision, as far as labels give one.
    pub fn canonical_revision(&self) -> Option<&str> {
        let label = |key: &str| self.labels.get(key);
        label("service.istio.io/canonical-revision").or_else(|| label("app.kubernetes.io/version")).or_else(|| label("version"))
    }
}

/// A Kubernetes service with its endpoints resolved.
#[derive(Debug)]
pub struct Service {
    pub name: ObjectName,
    pub vips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub local_only: bool,
    pub client_ip_affinity: bool,
}

#[derive(Debug)]
pub struct ServicePort {
    pub name: Arc<str>,
    pub port: u16,
    pub endpoints: Vec<Endpoint>,
}

/// An address a service's connections can go to.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub ready: bool,
    pub serving_while_terminating: bool,
    pub node: Option<Arc<str>>,
    /// Connections this node has open to it; outlives snapshots.
    pub load: Arc<Load>,
}

/// A count of what is under way.
#[derive(Debug, Default)]
pub struct Load(AtomicU32);

impl Load {
    pub fn current(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts one more until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> LoadGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        LoadGuard(self.clone())
    }
}

/// One thing under way.
#[derive(Debug)]
pub struct LoadGuard(Arc<Load>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
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
