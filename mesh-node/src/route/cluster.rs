//! Where traffic can go: a service's port, or a subset of its endpoints, with the policy for getting there.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;

use super::traffic::{TrafficPolicy, Upgrade};
use crate::{balance::Table, detect::Protocol, id::ObjectName, resource::kube::Node, resource::selector::Labels};

/// Names a destination as Envoy names clusters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterId {
    pub service: ObjectName,
    pub port: u16,
    /// Empty for all endpoints.
    pub subset: Arc<str>,
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "outbound|{}|{}|{}", self.port, self.subset, self.service.fqdn())
    }
}

#[derive(Debug)]
pub struct Cluster {
    pub id: ClusterId,
    pub protocol: Protocol,
    pub policy: Arc<TrafficPolicy>,
    /// By address.
    pub endpoints: Arc<[Endpoint]>,
    /// Only endpoints of the client's node: `internalTrafficPolicy: Local`.
    pub local_only: bool,
    /// Endpoints near the client go before others: `trafficDistribution`.
    pub near: Option<Near>,
    /// For consistent hashing.
    pub table: Option<Arc<Table>>,
    /// Of the configuration it is of.
    pub generation: u64,
}

impl Cluster {
    /// Whether its endpoints are spoken to in HTTP/2, by a client that speaks it or does not.
    pub fn speaks_http2(&self, client: bool) -> bool {
        match self.policy.http.upgrade {
            Upgrade::Always => true,
            Upgrade::Client => client,
            Upgrade::Default if self.protocol == Protocol::Detect => client,
            Upgrade::Default => self.protocol.is_http2(),
        }
    }
}

/// Where an endpoint or a client is: region, zone and subzone, empty where unknown.
pub type Locality = Node;

/// What is near. Kubernetes' `trafficDistribution`, with the groups of ztunnel: those of the client's place, of its zone and of its region, the
/// first in which there is an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Near {
    /// The zone.
    Zone,
    /// The node, in its subzone.
    Node,
}

impl Near {
    /// `PreferClose` and the like; `None` for what prefers nothing, or says something else.
    pub fn of(distribution: &str) -> Option<Self> {
        let is = |name: &str| distribution.eq_ignore_ascii_case(name);
        if is("PreferSameNode") {
            return Some(Self::Node);
        }
        (is("PreferClose") || is("PreferSameZone")).then_some(Self::Zone)
    }
}

/// An address a service's connections can go to.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub ready: bool,
    pub serving_while_terminating: bool,
    pub node: Option<Arc<str>>,
    pub locality: Locality,
    /// Of the pod behind it; none when it is not a pod.
    pub labels: Labels,
    /// What this node has under way to it; outlives snapshots.
    pub load: Arc<Load>,
}

impl Endpoint {
    /// A label, as Istio has them: those of its place are the node's, others the pod's.
    pub fn label(&self, label: &str) -> Option<&str> {
        let place: Option<&str> = match label {
            "topology.kubernetes.io/region" => Some(&self.locality.region),
            "topology.kubernetes.io/zone" => Some(&self.locality.zone),
            "topology.istio.io/subzone" => Some(&self.locality.subzone),
            "kubernetes.io/hostname" => self.node.as_deref(),
            _ => None,
        };
        place.filter(|place| !place.is_empty()).or_else(|| self.labels.get(label))
    }
}

/// A count of what is under way, and since when the endpoint has been known.
#[derive(Debug)]
pub struct Load {
    count: AtomicU32,
    since: Mutex<Instant>,
}

impl Load {
    pub fn new(since: Instant) -> Self {
        Self { count: AtomicU32::new(0), since: Mutex::new(since) }
    }

    /// Since when the endpoint is used.
    pub fn since(&self) -> Instant {
        *self.since.lock()
    }

    /// It is used again.
    pub fn renew(&self, since: Instant) {
        *self.since.lock() = since;
    }

    pub fn current(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    /// Counts one more until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> LoadGuard {
        self.count.fetch_add(1, Ordering::Relaxed);
        LoadGuard(self.clone())
    }
}

/// One thing under way.
#[derive(Debug)]
pub struct LoadGuard(Arc<Load>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::Relaxed);
    }
}
