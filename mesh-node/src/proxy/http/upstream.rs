//! Connections to endpoints: pooled for each source pod, cluster and endpoint, and one message exchange at a time on them.

mod freed;
mod hold;
mod shared;
mod ways;

use std::{
    future::Future,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::{sync::Notify, time::sleep};

use self::freed::Freed;
pub use self::{
    hold::LocalHold,
    shared::{H2Upstream, StreamGuard},
    ways::{Failed, UpSink, UpSource, is_interim},
};
use super::{
    clusters::{ClusterState, ConnectionSlot, EndpointState, Limited, SHORT_IDLE, Slot},
    gate::Gate,
    h1::{H1Sink, Reader, Unread},
    over::Followers,
    transport::{Counted, Transport},
};
use crate::{
    hbone::Leaving,
    id::WorkloadUid,
    io::socket::Known,
    proxy::{
        Failure, Proxy, ServedPod,
        limits::Place,
        outbound::{self, Dial},
    },
    route::{Cluster, traffic::TrafficPolicy},
};

/// Why there is no connection to send a request on.
#[derive(Debug)]
pub enum NoUpstream {
    Overflow,
    Failed(Failure),
}

/// Whom a connection leads to: another pod may get the address, and the same may join the mesh or leave it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Peer {
    uid: WorkloadUid,
    enrolled: bool,
}

/// Between which addresses a connection is.
#[derive(Debug, Clone, Copy)]
pub struct Reached {
    /// This end of it; none of a tunnel.
    pub local: Option<SocketAddr>,
    /// The endpoint's, of which it may have two.
    pub remote: SocketAddr,
}

/// What a request needs from a connection.
pub struct Wanted<'a> {
    pub proxy: &'a Arc<Proxy>,
    pub pod: &'a Arc<ServedPod>,
    pub client: SocketAddr,
    pub cluster: &'a Arc<Cluster>,
    pub state: &'a Arc<ClusterState>,
    pub endpoint: &'a Arc<EndpointState>,
    pub address: SocketAddr,
    pub http2: bool,
    /// Which of those that were kept from earlier exchanges will do; if none, only as long as there is room for another.
    pub kept: Option<Known>,
    /// How long a dial of the only pod there is is repeated: its node may be about to serve it.
    pub patience: Duration,
}

/// As long as connections that carry no HTTP.
pub const REDIAL_TIMEOUT: Duration = outbound::RETRY_FOR;

/// An HTTP/1 connection, used by one exchange at a time.
#[derive(Debug)]
pub struct H1Upstream {
    transport: Transport,
    unread: Unread,
    hold: Option<LocalHold>,
    workload: Option<Peer>,
    reached: Reached,
    requests: u32,
    made: Instant,
    idle_since: Instant,
    /// When it will have been idle for too long, or open, if nobody uses it.
    expires: Option<Instant>,
    /// Whether it may be kept: one that has a descriptor of its own has a place among those that are. None is for this request alone.
    kept: Option<Kept>,
    _slot: ConnectionSlot,
}

#[derive(Debug)]
enum Kept {
    InTunnel,
    WithPlace { _place: Place },
}

impl H1Upstream {
    /// Whether it has not been idle for too long, nor open.
    pub fn is_fresh(&self, cluster: &Cluster, now: Instant) -> bool {
        let policy = &cluster.policy;
        now.saturating_duration_since(self.idle_since) < policy.http.idle_timeout
            && policy.tcp.max_connection_duration.is_none_or(|most| now.saturating_duration_since(self.made) < most)
    }

    /// When it is not kept any more, by the policy of when it was last given back.
    pub fn expires(&self) -> Option<Instant> {
        self.expires
    }

    /// Whether it can be used again, and is not better made anew.
    pub fn is_usable(&mut self, known: Known) -> bool {
        let cut = self.hold.as_ref().is_some_and(LocalHold::is_cut);
        let leaving = self.transport.leaving().is_some_and(|l| l.is_so());
        !cut && !leaving && self.unread.buffer.is_empty() && self.transport.is_quiet(known)
    }

    /// Whether an exchange before this one was on it.
    pub fn is_kept(&self) -> bool {
        self.requests > 0
    }

    /// Lets go of it between exchanges: the application sees an end, and no failure.
    pub fn retire(self: Box<Self>) {
        self.transport.end();
    }

    /// Both halves for one exchange, and what ends it from outside.
    pub fn halves(&mut self) -> (UpSink<'_>, UpSource<'_>, impl Future<Output = ()> + Send + '_) {
        let (source, sink) = match &self.hold {
            Some(LocalHold { outcome, .. }) => self.transport.counted_halves(&outcome.traffic.received, &outcome.traffic.sent),
            None => self.transport.halves(),
        };
        let reader = Reader::new(source, &mut self.unread);
        (UpSink::H1(H1Sink::new(sink)), UpSource::H1(reader), LocalHold::cut(self.hold.as_ref()))
    }
}

/// A connection, or a place on one, that a request can be sent on.
pub enum Upstream {
    H1(Box<H1Upstream>),
    H2(Box<SendRequest<Bytes>>, StreamGuard, Option<Arc<Gate>>),
}

impl Upstream {
    /// What stands before the application, when it is on this node.
    pub fn gate(&self) -> Option<Arc<Gate>> {
        match self {
            Self::H1(connection) => connection.hold.as_ref().map(|h| h.gate.clone()),
            Self::H2(_, _, gate) => gate.clone(),
        }
    }

    /// Between which addresses it is.
    pub fn reached(&self) -> Reached {
        match self {
            Self::H1(connection) => connection.reached,
            Self::H2(_, stream, _) => stream.0.reached,
        }
    }
}

/// Gets a connection to an endpoint: an idle one, a new one, or, at the limit, the next that becomes free.
pub async fn acquire(wanted: &Wanted<'_>) -> Result<Upstream, NoUpstream> {
    if !wanted.cluster.policy.names.is_empty() {
        let snapshot = wanted.proxy.config.load();
        let workload = snapshot.workload_by_ip(wanted.address.ip()).map(|w| &**w);
        outbound::is_meant(wanted.cluster, workload).map_err(NoUpstream::Failed)?;
    }
    if wanted.http2 { acquire_h2(wanted).await } else { acquire_h1(wanted).await.map(Upstream::H1) }
}

async fn acquire_h1(wanted: &Wanted<'_>) -> Result<Box<H1Upstream>, NoUpstream> {
    let Wanted { cluster, state, endpoint, .. } = wanted;
    let limit = cluster.policy.tcp.max_connections;
    let idle = |known| {
        let (workload, now) = (wanted.workload(), Instant::now());
        let usable = |idle: &mut Box<H1Upstream>| idle.workload == workload && idle.is_fresh(cluster, now) && idle.is_usable(known);
        while let Some(mut idle) = endpoint.last_used() {
            if usable(&mut idle) {
                return Some(idle);
            }
            idle.retire();
        }
        None
    };
    let kept = || wanted.kept.and_then(idle);
    // Most find one, and have no need to hear of others.
    if let Some(idle) = kept() {
        return Ok(idle);
    }
    let mut pending = None;
    let slot = loop {
        // Not kept over a dial: it would be told of what others wait for.
        let mut freed = pin!(wanted.freed(false));
        // Registered before anything is looked at, so that nothing that happens after that is missed.
        freed.as_mut().enable();
        if let Some(idle) = kept() {
            return Ok(idle);
        }
        if pending.is_none() {
            pending = Some(wanted.pending()?);
        }
        if let Some(slot) = ConnectionSlot::begin(state, endpoint, limit, false) {
            break slot;
        }
        // Without room for a new one.
        if let Some(idle) = idle(Known::ToKernel) {
            return Ok(idle);
        }
        freed.await;
    };
    connect_h1(wanted, wanted.workload(), slot).await.map_err(NoUpstream::Failed)
}

async fn connect_h1(wanted: &Wanted<'_>, workload: Option<Peer>, slot: ConnectionSlot) -> Result<Box<H1Upstream>, Failure> {
    // Seldom, and large.
    let (transport, hold, reached) = Box::pin(dial(wanted)).await?;
    let (unread, idle_since) = (Unread::default(), Instant::now());
    let kept = if transport.is_tunnel() {
        Some(Kept::InTunnel)
    } else {
        wanted.proxy.kept(wanted.pod).map(|place| Kept::WithPlace { _place: place })
    };
    Ok(Box::new(H1Upstream {
        transport,
        unread,
        hold,
        workload,
        reached,
        requests: 0,
        made: idle_since,
        idle_since,
        expires: None,
        kept,
        _slot: slot,
    }))
}

async fn dial(wanted: &Wanted<'_>) -> Result<(Transport, Option<LocalHold>, Reached), Failure> {
    let dialled = dial_uncounted(wanted).await;
    wanted.proxy.metrics.upstream_connection(if dialled.is_ok() { "opened" } else { "failed" });
    let (transport, hold, remote) = dialled?;
    let reached = Reached { local: transport.local(), remote };
    Ok((transport, hold, reached))
}

async fn dial_uncounted(wanted: &Wanted<'_>) -> Result<(Transport, Option<LocalHold>, SocketAddr), Failure> {
    let Wanted { proxy, pod, client, cluster, address, .. } = wanted;
    // A pod has an endpoint of each family.
    let others = cluster.endpoints.iter().filter(|e| e.address != *address && e.address.is_ipv4() == address.is_ipv4());
    let patience = if others.take(1).count() > 0 { Duration::ZERO } else { wanted.patience };
    let settings = &cluster.policy.tcp;
    let dial = Dial { proxy, pod, client: *client, to: *address, cluster: Some(cluster), patience, timeout: settings.connect_timeout };
    let (stream, remote) = dial.connect().await?;
    let (transport, hold) = match stream {
        outbound::Stream::Tcp(stream) => {
            if let Some(keepalive) = &settings.keepalive {
                crate::io::socket::keep_alive(&stream, keepalive.time, keepalive.interval, keepalive.probes).map_err(Failure::Broken)?;
            }
            (Transport::Tcp(stream), None)
        }
        outbound::Stream::Tunnel(tunnel) => (Transport::Tunnel(tunnel), None),
        outbound::Stream::Local(local) => {
            let outbound::LocalParts { admitted, pod, mut outcome, client } = local.into_parts();
            outcome.requests.store(true, Ordering::Relaxed);
            outcome.opened();
            let gate = Gate::new((*proxy).clone(), pod.clone(), admitted.facts, client).before(&admitted.application);
            (Transport::Tcp(admitted.application), Some(LocalHold::new(admitted.registration, pod, outcome, gate)))
        }
    };
    Ok((transport, hold, remote))
}

impl Wanted<'_> {
    /// What will be spoken.
    pub fn protocol(&self) -> &'static str {
        if self.http2 { "HTTP/2" } else { "HTTP/1.1" }
    }

    /// The pod that has the endpoint's address now, and whether it is in the mesh.
    fn workload(&self) -> Option<Peer> {
        self.proxy.config.load().workload_by_ip(self.address.ip()).map(|w| Peer { uid: w.uid.clone(), enrolled: w.enrolled })
    }

    /// A place among those that wait for a connection, be it made or in use.
    fn pending(&self) -> Result<Slot, NoUpstream> {
        self.state.begin(Limited::Pending, self.cluster.policy.http.max_pending).ok_or(NoUpstream::Overflow)
    }

    /// Completes when there is room on a connection of the endpoint in this protocol, or any of the cluster ends.
    fn freed(&self, http2: bool) -> Freed<'_> {
        Freed::new(self.endpoint.freed(http2), &self.state.freed)
    }
}

async fn acquire_h2(wanted: &Wanted<'_>) -> Result<Upstream, NoUpstream> {
    let endpoint = wanted.endpoint;
    let mut pending = None;
    loop {
        let mut freed = pin!(wanted.freed(true));
        freed.as_mut().enable();
        let workload = wanted.workload();
        let find = || endpoint.h2.load().iter().find(|c| c.workload == workload && c.has_room(wanted.cluster)).map(StreamGuard::new);
        let guard = if let Some(guard) = find() {
            guard
        } else {
            if pending.is_none() {
                pending = Some(wanted.pending()?);
            }
            let failures = endpoint.failed_dials.load(Ordering::Acquire);
            let one_at_a_time = endpoint.dialling.lock().await;
            if let Some(guard) = find() {
                guard
            } else if let Some(slot) = ConnectionSlot::begin(wanted.state, endpoint, wanted.cluster.policy.tcp.max_connections, true) {
                // The dial that was waited for has failed: those who waited do not fail one after the other.
                let alone = endpoint.failed_dials.load(Ordering::Acquire) == failures;
                let one_at_a_time = alone.then_some(one_at_a_time);
                let connected = connect_h2(wanted, workload, slot).await;
                if connected.is_err() {
                    endpoint.failed_dials.fetch_add(1, Ordering::AcqRel);
                }
                drop(one_at_a_time);
                connected?
            } else {
                drop(one_at_a_time);
                freed.await;
                continue;
            }
        };
        let connection = &*guard.0;
        let most = wanted.cluster.policy.http.max_requests_per_connection;
        let number = connection.requests.fetch_add(1, Ordering::AcqRel) + 1;
        if most.is_some_and(|most| number >= most) {
            connection.close();
        }
        // One that ended meanwhile is left for another; a new one that does so is reported by whoever sends on it.
        match connection.send.clone().ready().await {
            Ok(send) => {
                let gate = connection.gate.clone();
                return Ok(Upstream::H2(Box::new(send), guard, gate));
            }
            Err(error) => {
                connection.close();
                if number == 1 {
                    return Err(NoUpstream::Failed(Failure::Broken(super::h2::into_io(error))));
                }
            }
        }
    }
}

async fn connect_h2(wanted: &Wanted<'_>, workload: Option<Peer>, slot: ConnectionSlot) -> Result<StreamGuard, NoUpstream> {
    let (transport, hold, reached) = Box::pin(dial(wanted)).await.map_err(NoUpstream::Failed)?;
    let traffic = hold.as_ref().map(|h| h.outcome.traffic.clone()).unwrap_or_default();
    let leaving = transport.leaving();
    let unused = Arc::<AtomicBool>::default();
    let is_tunnel = transport.is_tunnel();
    let io = Counted::upstream(transport, traffic, unused.clone());
    let opened = async {
        if !is_tunnel {
            return super::h2::connect(io).await;
        }
        // Its node says how many streams the application takes: a burst of more would be refused, retries and all.
        let mut opened = super::h2::connect_to_settle(io).await?;
        opened.settle().await.map(|()| opened)
    };
    let broken = |error: h2::Error| match error.reason() {
        // It has ended in order, before it said anything.
        Some(h2::Reason::CONNECT_ERROR) if !error.is_remote() => std::io::ErrorKind::ConnectionReset.into(),
        _ => super::h2::into_io(error),
    };
    let opened = opened.await.map_err(|error| NoUpstream::Failed(Failure::Broken(broken(error))))?;
    let connection = Arc::new(H2Upstream {
        gate: hold.as_ref().map(|h| h.gate.clone()),
        send: opened.send,
        whole: opened.whole,
        endpoint: wanted.endpoint.clone(),
        workload,
        reached,
        streams: AtomicU32::new(0),
        requests: AtomicU32::new(0),
        closed: AtomicBool::new(false),
        changed: Notify::new(),
        followers: Followers::default(),
    });
    let source = wanted.pod.clone();
    // Of who asked for it: it is not unused before that.
    let guard = StreamGuard::new(&connection);
    tokio::spawn(drive(opened.connection, connection.clone(), (hold, source, leaving), slot, (wanted.cluster.policy.clone(), unused)));
    wanted.state.share(wanted.endpoint, &connection);
    Ok(guard)
}

/// Runs an HTTP/2 connection until it breaks, is cut, or is not needed any more.
async fn drive(
    mut connection: Box<dyn Future<Output = Result<(), h2::Error>> + Send + Unpin>,
    shared: Arc<H2Upstream>,
    (hold, source, leaving): (Option<LocalHold>, Arc<ServedPod>, Option<Leaving>),
    slot: ConnectionSlot,
    (policy, unused): (Arc<TrafficPolicy>, Arc<AtomicBool>),
) {
    let mut slot = Some(slot);
    let old = async {
        if let Some(most) = policy.tcp.max_connection_duration {
            sleep(most).await;
            shared.close();
        }
        std::future::pending::<()>().await;
    };
    let led_away = async {
        if let Some(leaving) = leaving {
            leaving.wait().await;
            shared.close();
            // What it has left takes nobody's place: others go to the peer's next connection.
            slot.take();
        }
        std::future::pending::<()>().await;
    };
    let is_over = tokio::select! {
        result = &mut connection => {
            if let Err(error) = result {
                tracing::debug!(target: "proxy", %error, "upstream HTTP/2 connection ended");
            }
            // Not of what was closed here.
            !shared.is_closed()
        }
        () = LocalHold::cut(hold.as_ref()) => true,
        _ = source.ended() => false,
        () = shared.until_unused(policy.http.idle_timeout) => {
            unused.store(true, Ordering::Release);
            false
        }
        () = led_away => false,
        () = old => false,
    };
    shared.closed.store(true, Ordering::Release);
    shared.endpoint.forget_closed();
    if is_over {
        shared.followers.tell();
    }
    drop(slot);
}

/// Gives an HTTP/1 connection back after an exchange that left it clean.
pub fn release(mut connection: Box<H1Upstream>, cluster: &Cluster, state: &ClusterState, endpoint: &Arc<EndpointState>) {
    connection.requests += 1;
    let worn = cluster.policy.http.max_requests_per_connection.is_some_and(|most| connection.requests >= most);
    // Nobody would use it again, and its peer waits for its end.
    let worn = worn || connection.transport.leaving().is_some_and(|l| l.is_so());
    connection.idle_since = Instant::now();
    let policy = &cluster.policy;
    let old = policy.tcp.max_connection_duration.and_then(|most| connection.made.checked_add(most));
    connection.expires = connection.idle_since.checked_add(policy.http.idle_timeout).into_iter().chain(old).min();
    if worn || connection.kept.is_none() || !connection.is_fresh(cluster, connection.idle_since) {
        connection.retire();
    } else {
        let soon = connection.expires.is_some_and(|at| at.saturating_duration_since(connection.idle_since) < SHORT_IDLE);
        state.keep(endpoint, connection);
        if soon {
            endpoint.expire();
        }
    }
}
