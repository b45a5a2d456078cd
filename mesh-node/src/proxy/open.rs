//! Connections that are open: their bytes are counted as they go on, and they can be listed.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::outcome::{Direction, Party};
use crate::{
    id::ObjectName,
    io::relay::Traffic,
    telemetry::traffic::{Edge, TcpKey},
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
}

impl Path {
    /// The metric label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::SameNode => "same_node",
            Self::Tunnel => "tunnel",
            Self::Passthrough => "passthrough",
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
        self.lock().insert(open.number, open);
    }

    pub fn remove(&self, number: u64) {
        self.lock().remove(&number);
    }

    pub fn all(&self) -> Vec<Arc<Open>> {
        self.lock().values().cloned().collect()
    }

    /// Counts the bytes of all until now.
    pub fn count(&self) {
        self.all().iter().for_each(|open| open.count());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Open>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
