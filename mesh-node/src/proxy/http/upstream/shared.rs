//! HTTP/2 connections, which exchanges share.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use ::h2::client::SendRequest;
use bytes::Bytes;
use tokio::{sync::Notify, time::timeout};

use super::{Peer, Reached};
use crate::{
    proxy::http::{
        clusters::EndpointState,
        gate::Gate,
        h2::{self, Ended},
        over::{Followers, Over},
        wire::HeadLimits,
    },
    route::Cluster,
};

/// An HTTP/2 connection, shared by all exchanges that find it.
#[derive(Debug)]
pub struct H2Upstream {
    pub(super) gate: Option<Arc<Gate>>,
    pub(super) send: SendRequest<Bytes>,
    pub(super) whole: Arc<Ended>,
    pub(super) endpoint: Arc<EndpointState>,
    pub(super) workload: Option<Peer>,
    pub(super) reached: Reached,
    pub(super) streams: AtomicU32,
    pub(super) requests: AtomicU32,
    pub(super) closed: AtomicBool,
    /// Woken when the number of streams changes, and to close.
    pub(super) changed: Notify,
    /// Clients' connections that end with this one.
    pub(super) followers: Followers,
}

impl H2Upstream {
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(super) fn has_room(&self, cluster: &Cluster) -> bool {
        let theirs = h2::most_streams(&self.send);
        let limit = cluster.policy.http.max_streams.unwrap_or(u32::MAX).min(theirs);
        !self.is_closed() && self.streams.load(Ordering::Acquire) < limit
    }

    /// Takes no more streams, and ends when those it has do.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    pub(super) async fn until_unused(&self, idle: Duration) {
        loop {
            let changed = self.changed.notified();
            let unused = self.streams.load(Ordering::Acquire) == 0;
            if unused && self.is_closed() {
                return;
            }
            if !unused {
                changed.await;
            } else if timeout(idle, changed).await.is_err() {
                self.closed.store(true, Ordering::Release);
            }
        }
    }
}

/// A stream of a connection, counted.
#[derive(Debug)]
pub struct StreamGuard(pub(super) Arc<H2Upstream>);

impl StreamGuard {
    pub(super) fn new(connection: &Arc<H2Upstream>) -> Self {
        connection.streams.fetch_add(1, Ordering::AcqRel);
        connection.changed.notify_one();
        Self(connection.clone())
    }
}

impl StreamGuard {
    /// Has a client's connection end with this one.
    pub fn follow(&self, over: &Arc<Over>) {
        self.0.followers.add(over);
    }

    /// Which of the connection's answers have come whole.
    pub fn whole(&self) -> Arc<Ended> {
        self.0.whole.clone()
    }

    /// Bytes that the head of an answer may have.
    pub fn longest_head(&self) -> usize {
        HeadLimits::of(self.0.reached.local.is_none()).bytes
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_one();
        self.0.endpoint.freed(true).notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::http::clusters::ClusterState;

    /// An endpoint that is let go of, or whose connection has ended, is forgotten.
    #[tokio::test]
    async fn a_shared_connection_keeps_no_endpoint_that_is_gone() {
        for ends in [true, false] {
            let state = Arc::new(ClusterState::new(&Arc::default()));
            let address = "10.0.0.1:80".parse().expect("an address");
            let endpoint = state.endpoint(address);
            let (near, _far) = tokio::io::duplex(4096);
            let (send, _connection) = ::h2::client::handshake(near).await.expect("begun");
            let shared = Arc::new(H2Upstream {
                gate: None,
                send,
                whole: Arc::default(),
                endpoint: endpoint.clone(),
                workload: None,
                reached: Reached { local: None, remote: address },
                streams: AtomicU32::new(0),
                requests: AtomicU32::new(0),
                closed: AtomicBool::new(false),
                changed: Notify::new(),
                followers: Followers::default(),
            });
            state.share(&endpoint, &shared);
            assert_eq!(endpoint.h2.load().len(), 1);
            if ends {
                shared.close();
                endpoint.forget_closed();
            }
            let known = Arc::downgrade(&endpoint);
            drop((endpoint, shared));
            if !ends {
                state.retire();
            }
            drop(state);
            assert!(known.upgrade().is_none(), "{ends}");
        }
    }
}
