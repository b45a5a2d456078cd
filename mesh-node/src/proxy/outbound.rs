//! Out of a pod: from a captured connection to the destination it was meant for.

mod decision;
mod dial;
mod tunnel;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

pub use self::decision::asker;
use self::decision::{Chosen, Decision, Guarded, client_address, decide, denied_later, describe, dialled, hbone_address};
pub(super) use self::{
    decision::{Way, is_meant, left},
    dial::Dial,
};
use super::{
    Failure, Proxy, ServedPod, direct,
    http::{self, clusters::ConnectionSlot, transport::Transport},
    inbound::{self, Admitted, Inspection},
    live::Cut,
    outcome::{Direction, Outcome},
    pods::Stage,
    sniff::{self, Begun},
};
use crate::{
    balance::outlier::Event,
    detect,
    hbone::Tunnel,
    io::{
        relay::{Broken, Prefixed, Side, Traffic, relay},
        socket::{self, reset_on_close},
    },
    route::LoadGuard,
    telemetry::ReasonLabels,
};

/// How long attempts go on while the destination's node is still enrolling it.
pub(super) const RETRY_FOR: Duration = Duration::from_secs(3);
/// The first wait between dials, and the longest. Between nodes each dial is a handshake, of which one that is overloaded wants no more.
const FIRST_RETRY_DELAY: Duration = Duration::from_millis(50);
const MAX_RETRY_DELAY: Duration = Duration::from_millis(400);

/// How long to wait before the next dial, after so many: twice as long each time, and not when others do.
fn pause(dials: u32) -> Duration {
    let full = FIRST_RETRY_DELAY.saturating_mul(1 << dials.min(8)).min(MAX_RETRY_DELAY);
    full.mul_f64(0.75 + fastrand::f64() / 2.0)
}

/// A captured connection of which nobody knows where it was meant to go.
pub fn lost(proxy: &Arc<Proxy>, downstream: &TcpStream, client: SocketAddr) {
    let mut outcome = Outcome::new(proxy, Direction::Outbound);
    outcome.source.address = Some(client);
    reset_on_close(downstream);
    outcome.fail(Failure::LostOriginalDestination);
}

/// A captured connection, as accepted on the outbound listener.
pub async fn serve(proxy: Arc<Proxy>, pod: Arc<ServedPod>, downstream: TcpStream, client: SocketAddr, original: SocketAddr, since: Stage) {
    let _offered = proxy.accelerate(&pod, &downstream);
    let begun = sniff::begin(&proxy, (&pod, since), downstream, client, original).await;
    match begun {
        Begun::Http { downstream, read, http2 } => {
            let address = SocketAddr::new(client_address(&pod, client, original), client.port());
            let connection =
                http::Connection { since, proxy, pod, client: address, original, dialled: OnceLock::new(), over: Arc::default() };
            if http2 { connection.serve_h2(downstream, read).await } else { connection.serve_h1(downstream, read).await }
        }
        Begun::Opaque { downstream, read, sni, established } => {
            let connection = Opaque { proxy, pod, client, original, since, sni };
            connection.serve(downstream, read, established).await;
        }
        Begun::Gone => {}
    }
}

/// A connection whose bytes are nobody's business.
pub(super) struct Opaque {
    pub proxy: Arc<Proxy>,
    pub pod: Arc<ServedPod>,
    pub client: SocketAddr,
    pub original: SocketAddr,
    pub since: Stage,
    pub sni: Option<String>,
}

/// An established connection, and what will be said of it.
pub(super) struct Established {
    upstream: Upstream,
    outcome: Outcome,
}

impl Established {
    /// Completes when the server has said something, or has closed. The beginning of HTTP/2 does not count: the client's
    /// belongs to it.
    pub(super) async fn server_spoke(&mut self) {
        match &mut self.upstream.stream {
            Stream::Tunnel(tunnel) => {
                tunnel.spoken().await;
                if detect::is_http2_server(tunnel.arrived()) {
                    std::future::pending::<()>().await;
                }
            }
            Stream::Tcp(stream) => inbound::server_first(stream).await,
            Stream::Local(local) => inbound::server_first(&local.admitted.application).await,
        }
    }
}

impl Opaque {
    async fn serve(self, downstream: TcpStream, read: Bytes, established: Option<Box<Established>>) {
        let Established { upstream, mut outcome } = match established {
            Some(established) => *established,
            None => match self.establish(&downstream).await {
                Some(established) => established,
                None => return reset_on_close(&downstream),
            },
        };
        if let Some(name) = &self.sni {
            // It was not known when it was connected, or is the same.
            let _ = outcome.sni.set(name.as_str().into());
        }
        outcome.opened();
        let (traffic, names) = (outcome.traffic.clone(), outcome.sni.clone());
        let Upstream { stream, limits, guarded, held: _held, .. } = upstream;
        let downstream = Prefixed::new(downstream, read);
        let cut = self.cut(&limits, &traffic, guarded.as_ref());
        let tunnel = if let Stream::Tunnel(tunnel) = &stream { tunnel.leaving() } else { None };
        let relayed = match stream {
            Stream::Tcp(stream) => relay(downstream, stream, &traffic, cut).await,
            Stream::Tunnel(tunnel) => relay(downstream, *tunnel, &traffic, cut).await,
            Stream::Local(mut local) => {
                // What its client has said is known at both of its ends.
                local.outcome.sni = names.clone();
                relay_local(&self.proxy, downstream, *local, self.since, &traffic, cut).await
            }
        };
        if let Err(broken) = relayed {
            let is_revoked = tunnel.is_some_and(|tunnel| tunnel.is_revoked());
            outcome.fail(if is_revoked { Failure::Cut(Cut::Revoked) } else { broken.into() });
        }
    }

    /// Connects to where it goes; a failure is counted and logged.
    pub(super) async fn establish(&self, downstream: &TcpStream) -> Option<Established> {
        self.connect(downstream, self.outcome()).await.ok()
    }

    /// Connects to where it goes if the client says nothing else. Given up before the end, nothing is said of it; a failure is counted
    /// and logged when it is dropped.
    pub(super) async fn establish_for_now(&self, downstream: &TcpStream) -> Result<Established, Box<Outcome>> {
        let mut outcome = self.outcome();
        outcome.keep_quiet(true);
        let mut established = self.connect(downstream, outcome).await;
        match &mut established {
            Ok(established) => established.outcome.keep_quiet(false),
            Err(outcome) => outcome.keep_quiet(false),
        }
        established
    }

    fn outcome(&self) -> Outcome {
        let mut outcome = Outcome::new(&self.proxy, Direction::Outbound);
        outcome.source.address = Some(self.client);
        outcome.source.workload = self.proxy.config.load().workload(&self.pod.uid).cloned();
        outcome.destination.address = Some(self.original);
        if let Some(name) = &self.sni {
            // It is the first to say so.
            let _ = outcome.sni.set(name.as_str().into());
        }
        outcome
    }

    async fn connect(&self, downstream: &TcpStream, mut outcome: Outcome) -> Result<Established, Box<Outcome>> {
        match establish(self, downstream, &mut outcome).await {
            Ok(upstream) => {
                if matches!(upstream.stream, Stream::Local(_)) {
                    self.count_indirect();
                }
                Ok(Established { upstream, outcome })
            }
            Err(failure) => {
                outcome.fail(failure);
                Err(Box::new(outcome))
            }
        }
    }

    /// Counts a connection within the node by why it did not go past the proxy.
    fn count_indirect(&self) {
        let snapshot = self.proxy.config.load();
        if let Some(source) = snapshot.workload(&self.pod.uid) {
            let why = direct::table::why_not(&snapshot, &self.proxy.served.load(), source, self.original);
            self.proxy.metrics.indirect.get_or_create(&ReasonLabels { reason: why.name() }).inc();
        }
    }

    /// Completes when the connection is to end: with the pod, for the limits of its destination, or for policies of the service.
    async fn cut(&self, limits: &TimeLimits, traffic: &Traffic, guarded: Option<&Guarded>) -> Cut {
        tokio::select! {
            biased;
            cut = self.pod.ended() => cut,
            cut = limits.reached(traffic) => cut,
            () = denied_later(self, guarded) => Cut::PolicyChanged,
        }
    }
}

/// The far end of a connection.
struct Upstream {
    stream: Stream,
    /// The address that took it.
    reached: SocketAddr,
    limits: TimeLimits,
    guarded: Option<Guarded>,
    held: Held,
}

/// What a connection counts as, as long as it is open.
#[derive(Debug, Default)]
struct Held {
    _load: Option<LoadGuard>,
    _slot: Option<ConnectionSlot>,
}

/// How often in its idle time it is looked whether a connection has had traffic: that time is exceeded by no more. Neither too often nor
/// too seldom.
const IDLE_LOOKS: u32 = 20;
const LOOKS: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(30)];

/// How long a connection may last, and how long without traffic.
#[derive(Debug, Default)]
struct TimeLimits {
    most: Option<Duration>,
    idle: Option<Duration>,
}

impl TimeLimits {
    async fn reached(&self, traffic: &Traffic) -> Cut {
        let most = async {
            match self.most {
                Some(most) => sleep(most).await,
                None => std::future::pending().await,
            }
        };
        let idle = async {
            let Some(idle) = self.idle else { return std::future::pending().await };
            let look = (idle / IDLE_LOOKS).clamp(LOOKS[0], LOOKS[1]);
            let (mut before, mut since) = (traffic.total(), Instant::now());
            while since.elapsed() < idle {
                sleep(look.min(idle.saturating_sub(since.elapsed()))).await;
                let total = traffic.total();
                if total != before {
                    (before, since) = (total, Instant::now());
                }
            }
        };
        tokio::select! {
            () = most => Cut::MaxDuration,
            () = idle => Cut::Idle,
        }
    }
}

#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Tunnel(Box<Tunnel>),
    Local(Box<Local>),
}

/// A connection to a pod of this node: admitted by its inbound stage, without a tunnel.
#[derive(Debug)]
pub(super) struct Local {
    admitted: Admitted,
    pod: Arc<ServedPod>,
    outcome: Outcome,
    client: SocketAddr,
}

/// What a connection within the node is made of.
pub(super) struct LocalParts {
    pub admitted: Admitted,
    pub pod: Arc<ServedPod>,
    pub outcome: Outcome,
    /// The client as the application sees it.
    pub client: SocketAddr,
}

impl Local {
    pub(super) fn into_parts(self) -> LocalParts {
        let Self { admitted, pod, outcome, client } = self;
        LocalParts { admitted, pod, outcome, client }
    }
}

async fn relay_local(
    proxy: &Arc<Proxy>,
    downstream: Prefixed,
    local: Local,
    since: Stage,
    traffic: &Arc<Traffic>,
    cut: impl Future<Output = Cut> + Send,
) -> Result<(), Broken<Cut>> {
    let Local { admitted, pod: destination, mut outcome, client } = local;
    outcome.traffic = traffic.clone();
    outcome.opened();
    if admitted.per_request {
        let (requests, sni) = (outcome.requests.clone(), outcome.sni.clone());
        let (since, traffic) = (since.min(destination.stage()), traffic.clone());
        let inspection = Inspection { proxy, pod: &destination, admitted, client, since, traffic, requests, sni, introduction: None };
        let inspected = inspection.run(Transport::Prefixed(downstream), cut).await;
        let inspected = match inspected {
            Err(Failure::Cut(reason)) => {
                outcome.fail(Failure::Cut(reason));
                Err(Broken::Cut(reason))
            }
            Err(Failure::UpstreamReset(source)) => {
                let told = socket::same_error(&source);
                outcome.fail(Failure::UpstreamReset(source));
                Err(Broken::Read { side: Side::Upstream, source: told })
            }
            other => {
                other.unwrap_or_else(|failure| outcome.fail(failure));
                Ok(())
            }
        };
        return inspected;
    }
    let Admitted { application, mut registration, .. } = admitted;
    let cut = async {
        tokio::select! {
            biased;
            reason = inbound::cut(&mut registration, &destination) => reason,
            reason = cut => reason,
        }
    };
    let relayed = relay(downstream, application, traffic, cut).await;
    match &relayed {
        Ok(()) => {}
        Err(Broken::Cut(cut)) => outcome.fail(Failure::Cut(*cut)),
        Err(Broken::Read { side, source } | Broken::Write { side, source }) => {
            outcome.fail(Broken::Read { side: *side, source: socket::same_error(source) }.into());
        }
    }
    relayed
}

/// Resolves, picks and dials; again with a new decision as long as that may help and the client is still there.
async fn establish(opaque: &Opaque, downstream: &TcpStream, outcome: &mut Outcome) -> Result<Upstream, Failure> {
    let deadline = Instant::now() + RETRY_FOR;
    let (mut tried, mut dials) = (Vec::new(), 0);
    loop {
        let attempt = async {
            outcome.asked = Some(opaque.original);
            let decision = decide(opaque, &tried).inspect_err(|_| outcome.cluster = outcome.cluster.take().or_else(|| dialled(opaque)))?;
            describe(outcome, &decision);
            tried.push(decision.to());
            dial(opaque, decision).await
        };
        let failure = tokio::select! {
            established = attempt => match established {
                Ok(upstream) => {
                    outcome.reached(upstream.reached);
                    return Ok(upstream);
                }
                Err(failure) => failure,
            },
            cut = opaque.pod.ended() => return Err(Failure::Cut(cut)),
            error = gone(downstream) => return Err(Failure::Broken(error)),
        };
        // There are others, or none, and that is soon known.
        let left = matches!(failure, Failure::EndpointLeft(_));
        if !failure.retryable() || Instant::now() >= deadline && !left {
            return Err(failure);
        }
        tokio::select! {
            () = sleep(pause(dials)) => dials += 1,
            cut = opaque.pod.ended() => return Err(Failure::Cut(cut)),
            error = gone(downstream) => return Err(Failure::Broken(error)),
        }
    }
}

/// Completes when the client has reset the connection: nobody waits for it to be established.
async fn gone(downstream: &TcpStream) -> io::Error {
    match downstream.ready(tokio::io::Interest::ERROR).await {
        Ok(_) => io::ErrorKind::ConnectionReset.into(),
        Err(error) => error,
    }
}

async fn dial(opaque: &Opaque, decision: Decision) -> Result<Upstream, Failure> {
    let Decision { way, source, cluster, guarded } = decision;
    let Some(Chosen { cluster, state, endpoint, load }) = cluster else {
        let dial = Dial::new(opaque, opaque.original, None);
        let (stream, reached) = dial.go(way, &source).await?;
        return Ok(Upstream { stream, reached, limits: TimeLimits::default(), guarded, held: Held::default() });
    };
    let settings = &cluster.policy.tcp;
    let slot = ConnectionSlot::within(&state, &endpoint, settings.max_connections);
    let slot = slot.ok_or_else(|| Failure::Overflow(cluster.id.service.clone()))?;
    let to = way.to();
    let dial = Dial::new(opaque, to, Some(&cluster));
    let stream = tokio::select! {
        biased;
        stream = dial.go(way, &source) => stream,
        () = left(&opaque.proxy, &opaque.pod, &cluster, to) => return Err(Failure::EndpointLeft(to)),
    };
    let event = if stream.is_ok() { Event::Success } else { Event::LocalOrigin };
    if !matches!(stream, Err(Failure::Denied(_))) && state.observe(&cluster, &source.locality, (to, &endpoint), event) {
        opaque.proxy.metrics.ejections.inc();
    }
    let (stream, reached) = stream?;
    if let (Stream::Tcp(stream), Some(k)) = (&stream, &settings.keepalive) {
        socket::keep_alive(stream, k.time, k.interval, k.probes).map_err(Failure::Broken)?;
    }
    let limits = TimeLimits { most: settings.max_connection_duration, idle: settings.idle_timeout };
    Ok(Upstream { stream, reached, limits, guarded, held: Held { _load: load, _slot: Some(slot) } })
}

#[cfg(test)]
mod tests;
