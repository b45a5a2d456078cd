//! Connections that are open: their bytes are counted as they go on, and they can be listed.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;

use super::{
    Proxy, ServedPod,
    outcome::{Direction, Party},
};
use crate::{
    id::ObjectName,
    io::relay::Traffic,
    route::Target,
    telemetry::{
        PathLabels,
        traffic::{Edge, Tags, TcpKey},
    },
};

/// How a connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// From pod to pod of one node, past the proxy.
    Direct,
    /// Between pods of one node, through the proxy.
    SameNode,
    /// Through an HBONE tunnel.
    Tunnel,
    /// Unchanged: one end is not in the mesh.
    Passthrough,
    /// A client's, to the proxy: each request on it goes where it is routed.
    Requests,
}

impl Path {
    /// The metric label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::SameNode => "same_node",
            Self::Tunnel => "tunnel",
            Self::Passthrough => "passthrough",
            Self::Requests => "requests",
        }
    }
}

/// A connection that is open.
#[derive(Debug)]
pub struct Open {
    pub number: u64,
    pub direction: Direction,
    pub path: Path,
    pub started: Instant,
    pub source: Party,
    pub destination: Party,
    /// The address its client dialled, of one from a pod.
    pub asked: Option<SocketAddr>,
    pub service: Option<ObjectName>,
    pub tunnel: Option<SocketAddr>,
    pub traffic: Arc<Traffic>,
    pub edge: Option<Arc<Edge>>,
    pub key: TcpKey,
    /// Bytes that are counted: sent and received.
    pub counted: [AtomicU64; 2],
}

impl Open {
    /// Counts what has passed since the last time.
    pub fn count(&self) {
        let Some(edge) = &self.edge else { return };
        let since = |now: &AtomicU64, counted: &AtomicU64| {
            let now = now.load(Ordering::Relaxed);
            now.saturating_sub(counted.fetch_max(now, Ordering::Relaxed))
        };
        let [sent, received] = [since(&self.traffic.sent, &self.counted[0]), since(&self.traffic.received, &self.counted[1])];
        if sent > 0 || received > 0 {
            // Istio counts as the server does: sent are responses.
            edge.transferred(&self.key, received, sent);
        }
    }
}

/// A connection that is listed for as long as this lives.
#[must_use]
pub struct Listed {
    proxy: Arc<Proxy>,
    open: Arc<Open>,
}

impl Listed {
    /// A client's connection that carries requests. They are what is counted and logged; it is only listed.
    pub fn requests(proxy: &Arc<Proxy>, pod: &ServedPod, client: SocketAddr, original: SocketAddr) -> Self {
        let snapshot = proxy.config.load();
        let workload = snapshot.workload(&pod.uid).cloned();
        let service = workload.as_ref().and_then(|w| match snapshot.resolve_for(&w.view, original) {
            Target::Service { service, .. } => Some(service.name.clone()),
            _ => None,
        });
        let identity = workload.as_ref().map(|w| w.identity.clone());
        let open = Arc::new(Open {
            number: proxy.open.number(),
            direction: Direction::Outbound,
            path: Path::Requests,
            started: Instant::now(),
            source: Party { address: Some(client), identity, workload },
            destination: Party { address: Some(original), ..Party::default() },
            asked: Some(original),
            service,
            tunnel: None,
            traffic: Arc::default(),
            edge: None,
            key: TcpKey { flags: "-", tags: Tags::default() },
            counted: Default::default(),
        });
        proxy.metrics.open_connections.inc();
        let labels = PathLabels { direction: open.direction.name(), path: open.path.name() };
        proxy.metrics.connections.get_or_create(&labels).inc();
        proxy.open.insert(open.clone());
        Self { proxy: proxy.clone(), open }
    }

    /// What has passed.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.open.traffic
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.proxy.open.remove(self.open.number);
        self.proxy.metrics.open_connections.dec();
    }
}

/// All that are open.
#[derive(Debug, Default)]
pub struct OpenConnections {
    next: AtomicU64,
    // Touched when a connection opens and when it ends, and by who lists them.
    all: Mutex<HashMap<u64, Arc<Open>>>,
}

impl OpenConnections {
    /// A number for the next one.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub fn insert(&self, open: Arc<Open>) {
        self.all.lock().insert(open.number, open);
    }

    pub fn remove(&self, number: u64) {
        self.all.lock().remove(&number);
    }

    pub fn all(&self) -> Vec<Arc<Open>> {
        self.all.lock().values().cloned().collect()
    }

    /// Counts the bytes of all until now.
    pub fn count(&self) {
        self.all().iter().for_each(|open| open.count());
    }
}
