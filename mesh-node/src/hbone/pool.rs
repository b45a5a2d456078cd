//! Pooled HBONE connections. The key is the whole key: who talks to whom, by which address and which incarnation of the
//! workload, so that a reused address never meets an old connection.

use std::{
    collections::HashMap,
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::Request;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Connection, Tunnel, TunnelError};
use crate::id::{SpiffeId, WorkloadUid};

/// Which connections may be shared.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    pub source: SpiffeId,
    /// The pod whose network namespace the connection leaves from.
    pub source_workload: WorkloadUid,
    pub destination: SpiffeId,
    pub destination_workload: WorkloadUid,
    pub address: SocketAddr,
}

/// All pooled connections of the node; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    slots: Arc<Mutex<HashMap<PoolKey, Arc<Slot>>>>,
    left: Arc<Notify>,
}

/// Connections of one key.
#[derive(Debug, Default)]
struct Slot {
    connections: Mutex<Vec<Connection>>,
    /// Held while one is being opened, so that a burst of tunnels opens one, not many.
    dialling: tokio::sync::Mutex<()>,
    /// Connections that could not be opened.
    failed: AtomicUsize,
}

impl Slot {
    fn with_room(&self) -> Option<Connection> {
        let mut connections = self.connections.lock();
        connections.retain(Connection::is_used);
        connections.iter().find(|c| c.has_room()).cloned()
    }
}

/// A pool's contents, for inspection.
#[derive(Debug, Clone)]
pub struct PoolState {
    pub key: PoolKey,
    pub connections: usize,
    pub streams: usize,
}

impl Pool {
    /// Opens a tunnel on a pooled connection, or on a new one that `dial` makes.
    ///
    /// A connection that turns out to be closing is left for another; a request it never looked at is safe to repeat.
    pub async fn open<E, F>(&self, key: &PoolKey, request: impl Fn() -> Result<Request<()>, E>, dial: impl Fn() -> F) -> Result<Tunnel, E>
    where
        E: From<TunnelError>,
        F: Future<Output = Result<Connection, E>>,
    {
        loop {
            let (connection, fresh) = self.connection(key, &dial).await?;
            match connection.open(request()?).await {
                // A fresh connection that is closing already: the peer does not want us.
                Err(TunnelError::Closing(_)) if !fresh => {}
                other => return other.map_err(E::from),
            }
        }
    }

    async fn connection<E, F>(&self, key: &PoolKey, dial: &impl Fn() -> F) -> Result<(Connection, bool), E>
    where
        F: Future<Output = Result<Connection, E>>,
    {
        let slot = self.slots.lock().entry(key.clone()).or_default().clone();
        if let Some(connection) = slot.with_room() {
            return Ok((connection, false));
        }
        let failed = slot.failed.load(Ordering::Acquire);
        let one_at_a_time = slot.dialling.lock().await;
        if let Some(connection) = slot.with_room() {
            return Ok((connection, false));
        }
        // The dial that was waited for has failed: those who waited do not fail one after the other.
        let alone = slot.failed.load(Ordering::Acquire) == failed;
        let _one_at_a_time = alone.then_some(one_at_a_time);
        let connection = dial().await.inspect_err(|_| {
            slot.failed.fetch_add(1, Ordering::AcqRel);
        })?;
        if let Some(other) = slot.with_room().filter(|_| !alone) {
            // Somebody was first.
            connection.close();
            return Ok((other, false));
        }
        connection.kept_by(&self.left);
        slot.connections.lock().push(connection.clone());
        Ok((connection, true))
    }

    /// Closes connections whose source or destination workload is not wanted any more, and forgets keys without connections. Where the
    /// destination does not exist any more, it is asked whether anybody is there.
    pub fn retain(&self, is_wanted: impl Fn(&WorkloadUid) -> bool, exists: impl Fn(&WorkloadUid) -> bool) {
        self.slots.lock().retain(|key, slot| {
            let wanted = is_wanted(&key.source_workload) && is_wanted(&key.destination_workload);
            // A slot somebody holds is being dialled, or about to be: look again next time. None can be taken out
            // meanwhile, the map is locked.
            if Arc::strong_count(slot) > 1 {
                return true;
            }
            let mut connections = slot.connections.lock();
            if !wanted {
                connections.iter().for_each(Connection::close);
            }
            if !exists(&key.destination_workload) {
                connections.iter().for_each(Connection::doubt);
            }
            connections.retain(Connection::is_used);
            !connections.is_empty()
        });
    }

    /// Completes when a connection has come to take no more tunnels.
    pub async fn left(&self) {
        self.left.notified().await;
    }

    /// Closes everything once it is unused.
    pub fn close(&self) {
        self.retain(|_| false, |_| true);
    }

    /// What is pooled now.
    pub fn states(&self) -> Vec<PoolState> {
        let slots = self.slots.lock().iter().map(|(k, s)| (k.clone(), s.clone())).collect::<Vec<_>>();
        let state = |(key, slot): (PoolKey, Arc<Slot>)| {
            let connections = slot.connections.lock();
            let live = connections.iter().filter(|c| !c.is_closed()).collect::<Vec<_>>();
            (!live.is_empty()).then(|| PoolState { key, connections: live.len(), streams: live.iter().map(|c| c.streams()).sum() })
        };
        slots.into_iter().filter_map(state).collect()
    }
}
