//! What a pod has under way to each destination: connections, requests, retries, and which endpoints it leaves out.
//!
//! For each source pod and cluster, as a sidecar would count, so that limits written for sidecars keep their meaning.
//! Counters are atomic; idle connections are a stack under a lock that is held for a push or pop.

mod table;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use self::table::Table;
use super::upstream::{H1Upstream, H2Upstream};
use crate::{
    balance::{
        self,
        outlier::{Event, Outliers, Streak},
    },
    io::socket::Known,
    proxy::reporting::EdgeSlot,
    route::{
        Cluster, ClusterId,
        cluster::Locality,
        traffic::{RetryBudget, TrafficPolicy},
    },
};

/// The clusters of one pod. Reading is lock-free; a cluster is added once.
///
/// A connection that is kept for later holds what it is counted at, which keeps the connection: whoever lets go of a cluster, or of all of
/// a pod's, has to retire it.
#[derive(Debug, Default)]
pub struct Clusters {
    table: Table<ClusterId, ClusterState>,
    retired: AtomicBool,
}

impl Clusters {
    /// What is under way to a cluster. With other settings of its pools it begins anew, as with Envoy: what there is goes on with what it has, and is
    /// counted for itself. Who has waited with a cluster of before is counted at the one of now.
    pub fn of(&self, cluster: &Cluster) -> Arc<ClusterState> {
        let make = || ClusterState { asked_in: AtomicU64::new(cluster.generation), ..ClusterState::new(&cluster.policy) };
        let mut state = self.table.get_or_insert(&cluster.id, make);
        if state.is_outdated_by(cluster) {
            let mut replaced = None;
            self.table.change(|entries| {
                let now = entries.entry(cluster.id.clone()).or_insert_with(|| state.clone());
                if now.is_outdated_by(cluster) {
                    replaced = Some(std::mem::replace(now, Arc::new(make())));
                }
                state = now.clone();
            });
            replaced.iter().for_each(|old| old.retire());
        }
        if state.asked_in.load(Ordering::Relaxed) < cluster.generation {
            state.asked_in.fetch_max(cluster.generation, Ordering::Relaxed);
        }
        // After the entry was made: who retires all either finds it or is seen here.
        if self.retired.load(Ordering::SeqCst) {
            state.retire();
        }
        state
    }

    /// Whether an endpoint is left out of a cluster now.
    pub fn has_ejected(&self, cluster: &ClusterId, endpoint: SocketAddr) -> bool {
        self.table.entries.load().get(cluster).is_some_and(|state| state.outliers.is_ejected(&endpoint, Instant::now()))
    }

    pub fn all(&self) -> Vec<(ClusterId, Arc<ClusterState>)> {
        self.table.entries.load().iter().map(|(id, state)| (id.clone(), state.clone())).collect()
    }

    /// Lets go of all connections that nothing goes on on, now or as soon as that is so; none is kept for later any more.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
        self.table.entries.load().values().for_each(|state| state.retire());
    }

    /// Forgets clusters that are no more, and lets go of idle connections that are dead or have been idle too long.
    pub fn tidy(&self, now: Instant, current: impl Fn(&ClusterId) -> Option<Arc<Cluster>>) {
        let gone = self.all().into_iter().filter(|(id, state)| match current(id) {
            Some(cluster) if state.made_by.has_pools_of(&cluster.policy) => {
                state.tidy(&cluster, now);
                false
            }
            _ => true,
        });
        let gone = gone.collect::<Vec<_>>();
        if !gone.is_empty() {
            // Not one that has begun anew meanwhile.
            self.table.change(|entries| {
                entries.retain(|id, state| !gone.iter().any(|(gone, old)| gone == id && Arc::ptr_eq(state, old)));
            });
        }
        gone.iter().for_each(|(_, state)| state.retire());
    }
}

impl Drop for Clusters {
    fn drop(&mut self) {
        self.retire();
    }
}

/// What is counted against a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    Connections,
    Pending,
    Requests,
    Retries,
    /// The proxy's own requests: copies of others, questions, spans.
    Calls,
}

#[derive(Debug)]
pub struct ClusterState {
    made_by: Arc<TrafficPolicy>,
    /// The newest configuration that it was asked for in.
    asked_in: AtomicU64,
    pub outliers: Outliers,
    turn: AtomicU64,
    connections: AtomicU32,
    pending: AtomicU32,
    requests: AtomicU32,
    retries: AtomicU32,
    calls: AtomicU32,
    endpoints: Table<SocketAddr, EndpointState>,
    /// No connection is kept for later any more.
    retired: AtomicBool,
    /// Woken, all of them, when a connection ends: its place is anybody's.
    pub freed: Notify,
}

impl ClusterState {
    pub(super) fn new(policy: &Arc<TrafficPolicy>) -> Self {
        Self {
            made_by: policy.clone(),
            asked_in: AtomicU64::new(0),
            outliers: Outliers::new(Instant::now()),
            turn: AtomicU64::new(fastrand::u64(0..1024)),
            connections: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            retries: AtomicU32::new(0),
            calls: AtomicU32::new(0),
            endpoints: Table::default(),
            retired: AtomicBool::new(false),
            freed: Notify::new(),
        }
    }

    /// Whether a cluster that is not older has other settings of its pools.
    fn is_outdated_by(&self, cluster: &Cluster) -> bool {
        !self.made_by.has_pools_of(&cluster.policy) && cluster.generation >= self.asked_in.load(Ordering::Relaxed)
    }

    pub fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
        self.endpoints.entries.load().values().for_each(|endpoint| endpoint.let_go());
    }

    /// Keeps a connection for later, unless nobody will ask for it any more.
    pub fn keep(&self, endpoint: &EndpointState, connection: Box<H1Upstream>) {
        endpoint.idle().push(connection);
        endpoint.freed(false).notify_one();
        // After it was kept: who retires the cluster either finds it or is seen here.
        if self.retired.load(Ordering::SeqCst) {
            endpoint.let_go();
        }
    }

    /// Adds a connection that is shared, likewise.
    pub fn share(&self, endpoint: &EndpointState, connection: &Arc<H2Upstream>) {
        endpoint.h2.rcu(|all| all.iter().filter(|c| !c.is_closed()).chain([connection]).cloned().collect::<Vec<_>>());
        if connection.is_closed() {
            // It ended meanwhile.
            endpoint.forget_closed();
        }
        if self.retired.load(Ordering::SeqCst) {
            endpoint.let_go();
        }
    }

    /// Counts picks, for going round.
    pub fn turn(&self) -> u64 {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    pub fn endpoint(&self, address: SocketAddr) -> Arc<EndpointState> {
        self.endpoints.get_or_insert(&address, EndpointState::default)
    }

    fn counter(&self, of: Limited) -> &AtomicU32 {
        match of {
            Limited::Connections => &self.connections,
            Limited::Pending => &self.pending,
            Limited::Requests => &self.requests,
            Limited::Retries => &self.retries,
            Limited::Calls => &self.calls,
        }
    }

    pub fn count(&self, of: Limited) -> u32 {
        self.counter(of).load(Ordering::Relaxed)
    }

    /// Counts one more, unless that is more than the limit.
    pub fn begin(self: &Arc<Self>, of: Limited, limit: Option<u32>) -> Option<Slot> {
        let counter = self.counter(of);
        let up = |n: u32| limit.is_none_or(|limit| n < limit).then_some(n + 1);
        counter.fetch_update(Ordering::AcqRel, Ordering::Relaxed, up).ok()?;
        Some(Slot { state: self.clone(), of })
    }

    /// Room for one more retry, by the budget if there is one, else by the limit.
    pub fn begin_retry(self: &Arc<Self>, limit: Option<u32>, budget: Option<&RetryBudget>) -> Option<Slot> {
        let limit = match budget {
            None => limit,
            Some(budget) => {
                let under_way = f64::from(self.count(Limited::Requests) + self.count(Limited::Pending));
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a u32")]
                let share = (under_way * budget.percent / 100.0) as u32;
                Some(share.max(budget.minimum))
            }
        };
        self.begin(Limited::Retries, limit)
    }

    /// Takes in what became of an attempt of a client in a place; whether the endpoint was ejected for it.
    pub fn observe(&self, cluster: &Cluster, from: &Locality, (address, endpoint): (SocketAddr, &EndpointState), event: Event) -> bool {
        let Some(settings) = &cluster.policy.outlier else { return false };
        let now = Instant::now();
        // Of those that are used: others are none of Envoy's hosts.
        let endpoints = || balance::counted(cluster, from, address);
        let ejected = self.outliers.record(address, &endpoint.streak, event, settings, endpoints, now);
        if ejected {
            tracing::info!(target: "proxy", cluster = %cluster.id, endpoint = %address, ?event, "endpoint ejected");
        }
        ejected
    }

    fn tidy(&self, cluster: &Cluster, now: Instant) {
        let exists = |a: &SocketAddr| cluster.endpoints.iter().any(|e| e.address == *a);
        self.outliers.ejected_by(cluster.policy.outlier.as_ref());
        // What was not ready comes back as if it were new, as Envoy, which does not hear of those that are not, has it.
        let used = |a: &SocketAddr| cluster.endpoints.iter().any(|e| e.address == *a && (e.ready || e.serving_while_terminating));
        self.outliers.retain(used);
        let all = self.endpoints.entries.load_full();
        for (address, endpoint) in all.iter() {
            if !used(address) {
                endpoint.streak.clear();
            }
            if exists(address) {
                endpoint.tidy(cluster, now);
                if endpoint.next_soon(now) {
                    endpoint.expire();
                }
            } else {
                endpoint.let_go();
            }
        }
        // Retired meanwhile: what was being looked at has been put back.
        if self.retired.load(Ordering::SeqCst) {
            all.values().for_each(|endpoint| endpoint.let_go());
        }
        let unused = |a: &SocketAddr, e: &EndpointState| !exists(a) && e.connections.load(Ordering::Relaxed) == 0;
        if all.iter().any(|(a, e)| unused(a, e)) {
            self.endpoints.change(|entries| entries.retain(|a, e| !unused(a, e)));
        }
    }

    /// Connections kept for later, over all endpoints.
    pub fn idle(&self) -> usize {
        self.endpoints.entries.load().values().map(|e| e.idle().len()).sum()
    }
}

/// One of what is counted, until it is dropped.
#[derive(Debug)]
pub struct Slot {
    state: Arc<ClusterState>,
    of: Limited,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.state.counter(self.of).fetch_sub(1, Ordering::AcqRel);
    }
}

/// Kept connections that expire sooner have a timer of their own; later ones wait for `tidy`.
pub const SHORT_IDLE: Duration = Duration::from_secs(10);

/// They come and go as boxes: it is those that are moved, and not what is in them.
type Idle = Vec<Box<H1Upstream>>;

/// What a pod has with one endpoint of a cluster.
#[derive(Debug, Default)]
pub struct EndpointState {
    pub streak: Streak,
    /// Connections for later. The one that was used last goes first, as with Envoy: the others grow old, and an application that closes what
    /// it has not heard of for a while closes those.
    idle: Mutex<Idle>,
    /// Somebody waits for the next of them to expire, and is woken when that may be another.
    expiring: AtomicBool,
    sooner: Notify,
    /// Open connections of either protocol, and those of them for requests of HTTP/1 and of HTTP/2.
    pub connections: AtomicU32,
    pooled: [AtomicU32; 2],
    /// Woken when a connection of HTTP/1 becomes idle, and when one of HTTP/2 has room for another stream: who waits for the one is not helped by the
    /// other.
    freed: [Notify; 2],
    pub h2: ArcSwap<Vec<Arc<H2Upstream>>>,
    /// Held while an HTTP/2 connection is made, so that a burst makes one.
    pub dialling: tokio::sync::Mutex<()>,
    /// Such connections that could not be made.
    pub failed_dials: AtomicU32,
    /// Where requests to it are counted.
    pub edge: EdgeSlot,
}

impl EndpointState {
    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock()
    }

    fn pooled(&self, http2: bool) -> &AtomicU32 {
        let [http1, two] = &self.pooled;
        if http2 { two } else { http1 }
    }

    /// Woken when there is room on a connection of this protocol.
    pub fn freed(&self, http2: bool) -> &Notify {
        let [http1, two] = &self.freed;
        if http2 { two } else { http1 }
    }

    /// The connection that was used last of those that are kept.
    pub fn last_used(&self) -> Option<Box<H1Upstream>> {
        self.idle().pop()
    }

    /// Sees to it that connections that may not be kept for long end in time: others do when this is next tidied.
    pub fn expire(self: &Arc<Self>) {
        if self.expiring.swap(true, Ordering::SeqCst) {
            // Who waits may wait for a later one.
            self.sooner.notify_one();
            return;
        }
        let endpoint = Arc::downgrade(self);
        tokio::spawn(async move {
            while let Some(this) = endpoint.upgrade() {
                let Some(next) = this.next_to_expire() else { return };
                tokio::select! {
                    () = tokio::time::sleep_until(next.into()) => this.retire_expired(Instant::now()),
                    () = this.sooner.notified() => {}
                }
            }
        });
    }

    /// When the next connection expires that does so soon. Without one nobody waits for it.
    fn next_to_expire(&self) -> Option<Instant> {
        let soon = || {
            let until = Instant::now() + SHORT_IDLE;
            self.idle().iter().filter_map(|connection| connection.expires()).min().filter(|at| *at < until)
        };
        soon().or_else(|| {
            self.expiring.store(false, Ordering::SeqCst);
            // One that was kept meanwhile, and that nobody else has begun to wait for.
            soon().filter(|_| !self.expiring.swap(true, Ordering::SeqCst))
        })
    }

    /// Whether a connection that is kept expires before this is tidied again.
    fn next_soon(&self, now: Instant) -> bool {
        self.idle().iter().any(|connection| connection.expires().is_some_and(|at| at.saturating_duration_since(now) < SHORT_IDLE))
    }

    fn retire_expired(&self, now: Instant) {
        let gone = self.idle().extract_if(.., |connection| connection.expires().is_some_and(|at| at <= now)).collect::<Vec<_>>();
        gone.into_iter().for_each(H1Upstream::retire);
    }

    /// Lets go of connections that nothing goes on on, and of those that are shared as soon as that is so.
    fn let_go(&self) {
        let idle = std::mem::take(&mut *self.idle());
        idle.into_iter().for_each(H1Upstream::retire);
        // Each holds this: nothing would ever be forgotten.
        self.h2.swap(Arc::default()).iter().for_each(|connection| connection.close());
    }

    /// Forgets shared connections that take no more streams.
    pub fn forget_closed(&self) {
        if self.h2.load().iter().any(|c| c.is_closed()) {
            self.h2.rcu(|all| all.iter().filter(|c| !c.is_closed()).cloned().collect::<Vec<_>>());
        }
    }

    fn tidy(&self, cluster: &Cluster, now: Instant) {
        let all = std::mem::take(&mut *self.idle());
        // Looked at and, some of them, closed without holding up who wants one; back under what was kept meanwhile.
        let keep = |c: &mut Box<H1Upstream>| c.is_fresh(cluster, now) && c.is_usable(Known::ToKernel);
        let (mut usable, mut gone) = (Vec::with_capacity(all.len()), Vec::new());
        all.into_iter().for_each(|mut c| if keep(&mut c) { &mut usable } else { &mut gone }.push(c));
        gone.into_iter().for_each(H1Upstream::retire);
        let mut idle = self.idle();
        usable.append(&mut idle);
        *idle = usable;
        let kept = idle.len();
        drop(idle);
        (0..kept).for_each(|_| self.freed(false).notify_one());
        self.forget_closed();
    }
}

/// An open connection, counted at its cluster and endpoint.
#[derive(Debug)]
pub struct ConnectionSlot {
    endpoint: Arc<EndpointState>,
    slot: Option<Slot>,
    /// Of a connection for requests, in which protocol.
    http2: Option<bool>,
}

impl ConnectionSlot {
    /// Room for one more connection for requests. An endpoint without any of the protocol always gets one, or requests in it would wait for ever:
    /// those of the other do not become free for them.
    pub fn begin(state: &Arc<ClusterState>, endpoint: &Arc<EndpointState>, limit: Option<u32>, http2: bool) -> Option<Self> {
        let pooled = endpoint.pooled(http2);
        // Of several that come at once one is alone.
        let alone = pooled.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let beyond = || if alone { Self::within(state, endpoint, None) } else { None };
        let Some(mut slot) = Self::within(state, endpoint, limit).or_else(beyond) else {
            pooled.fetch_sub(u32::from(alone), Ordering::AcqRel);
            return None;
        };
        pooled.fetch_add(u32::from(!alone), Ordering::AcqRel);
        slot.http2 = Some(http2);
        Some(slot)
    }

    /// Room for one more connection, for itself.
    pub fn within(state: &Arc<ClusterState>, endpoint: &Arc<EndpointState>, limit: Option<u32>) -> Option<Self> {
        let slot = state.begin(Limited::Connections, limit)?;
        endpoint.connections.fetch_add(1, Ordering::AcqRel);
        Some(Self { endpoint: endpoint.clone(), slot: Some(slot), http2: None })
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.endpoint.connections.fetch_sub(1, Ordering::AcqRel);
        if let Some(http2) = self.http2 {
            self.endpoint.pooled(http2).fetch_sub(1, Ordering::AcqRel);
        }
        let state = self.slot.take().map(|slot| slot.state.clone());
        if let Some(state) = state {
            state.freed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests;
