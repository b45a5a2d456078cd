//! The end of a connection: counted and logged in one place, however it ends.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime},
};

use ::http::HeaderValue;

use super::{
    Failure, Proxy,
    failure::Ended,
    live::Cut,
    open::{Open, Path},
    reporting::{self, Ends},
};
use crate::{
    hbone::headers::Introduction,
    id::{ObjectName, SpiffeId},
    io::relay::Traffic,
    report::{
        TelemetryPlan,
        entry::{ClusterName, Entry},
        peer::End,
    },
    route::{ClusterId, Workload},
    telemetry::{
        PathLabels, chain,
        traffic::{Edge, Reporter, Tags, TcpKey},
    },
};

/// Which side of the connection reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Outbound,
    Inbound,
}

impl Direction {
    pub fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }

    fn reporter(self) -> Reporter {
        match self {
            Self::Outbound => Reporter::Source,
            Self::Inbound => Reporter::Destination,
        }
    }
}

/// One end of a connection, as far as it is known.
#[derive(Debug, Default, Clone)]
pub struct Party {
    pub address: Option<SocketAddr>,
    pub identity: Option<SpiffeId>,
    pub workload: Option<Arc<Workload>>,
}

impl Party {
    fn name(&self) -> Option<&str> {
        self.workload.as_ref().map(|w| &*w.name.name)
    }

    fn namespace(&self) -> Option<&str> {
        self.workload.as_ref().map(|w| &*w.name.namespace)
    }

    /// Who it is, on a connection where both have proved it.
    fn proved(&self, mutual: bool) -> Option<String> {
        self.identity.as_ref().filter(|_| mutual).map(ToString::to_string)
    }
}

/// A connection from its first to its last moment. Dropped, it is counted and logged; without [`Outcome::fail`] it was good.
pub struct Outcome {
    proxy: Arc<Proxy>,
    direction: Direction,
    started: Instant,
    pub source: Party,
    pub destination: Party,
    /// The address the client dialled, of one from a pod.
    pub asked: Option<SocketAddr>,
    /// The address dialled when it is not the destination's own: the HBONE port.
    pub tunnel: Option<SocketAddr>,
    /// What was asked: the service's port that was dialled, or where its routes led from there.
    pub cluster: Option<ClusterId>,
    /// The service that was dialled, as far as the client says so.
    pub dialled: Option<ObjectName>,
    /// Who the client says it is.
    pub introduction: Option<HeaderValue>,
    pub traffic: Arc<Traffic>,
    /// It goes past the proxy.
    pub direct: bool,
    /// It turned out to carry requests: they are what access logs tell of.
    pub requests: Arc<AtomicBool>,
    /// The server its client has named, once that has been read.
    pub sni: Arc<OnceLock<Arc<str>>>,
    opened: Option<Arc<Open>>,
    failure: Option<Failure>,
    /// How an open connection ended that did not fail: by a reset of the upstream's.
    end: Option<Failure>,
    /// Nothing is said of it.
    quiet: bool,
}

impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outcome").field("direction", &self.direction).field("failure", &self.failure).finish_non_exhaustive()
    }
}

impl Outcome {
    pub fn new(proxy: &Arc<Proxy>, direction: Direction) -> Self {
        Self {
            proxy: proxy.clone(),
            direction,
            started: Instant::now(),
            source: Party::default(),
            destination: Party::default(),
            asked: None,
            tunnel: None,
            cluster: None,
            dialled: None,
            introduction: None,
            traffic: Arc::default(),
            direct: false,
            requests: Arc::default(),
            sni: Arc::default(),
            opened: None,
            failure: None,
            end: None,
            quiet: false,
        }
    }

    /// One of a connection that has begun some time ago.
    pub fn since(proxy: &Arc<Proxy>, direction: Direction, started: Instant) -> Self {
        let mut outcome = Self::new(proxy, direction);
        outcome.started = started;
        outcome
    }

    /// The connection is established end to end.
    pub fn opened(&mut self) {
        let key = TcpKey { flags: "-", tags: self.tags() };
        let edge = self.edge();
        if let Some(edge) = &edge {
            edge.opened(&key);
        }
        let (path, metrics) = (self.path(), &self.proxy.metrics);
        metrics.open_connections.inc();
        metrics.connections.get_or_create(&PathLabels { direction: self.direction.name(), path: path.name() }).inc();
        let open = Arc::new(Open {
            number: self.proxy.open.number(),
            direction: self.direction,
            path,
            started: self.started,
            source: self.source.clone(),
            destination: self.destination.clone(),
            asked: self.asked,
            service: self.service().cloned(),
            tunnel: self.tunnel,
            traffic: self.traffic.clone(),
            edge,
            key,
            counted: Default::default(),
        });
        self.proxy.open.insert(open.clone());
        self.opened = Some(open);
    }

    /// Where it is counted.
    fn edge(&self) -> Option<Arc<Edge>> {
        // As ztunnel tells it, also of one that has proved nothing.
        let meant = self.destination.workload.as_ref().map(|w| &w.identity);
        let ends = Ends {
            reporter: self.direction.reporter(),
            source: (self.source.workload.as_deref(), self.source.identity.as_ref()),
            destination: (self.destination.workload.as_deref(), self.destination.identity.as_ref().or(meant)),
            service: self.service(),
            introduction: self.introduction.as_ref(),
        };
        ends.edge(&self.proxy.metrics, &self.told().map(|t| t.tags.clone()).unwrap_or_default())
    }

    fn path(&self) -> Path {
        match (self.direct, self.tunnel, &self.source.identity, &self.destination.identity) {
            (true, ..) => Path::Direct,
            (_, Some(_), ..) => Path::Tunnel,
            (_, None, Some(_), Some(_)) => Path::SameNode,
            _ => Path::Passthrough,
        }
    }

    /// The service that was meant: as dialled, or, where that is not known, the one that leads to the port.
    fn service(&self) -> Option<&ObjectName> {
        self.cluster.as_ref().map(|cluster| &cluster.service).or_else(|| {
            let Party { address, workload, .. } = &self.destination;
            let workload = workload.as_ref().filter(|_| self.direction == Direction::Inbound)?;
            workload.service_at(address.as_ref()?.port(), self.dialled.as_ref())
        })
    }

    fn told(&self) -> Option<&TelemetryPlan> {
        let reporting = &self.teller()?.reporting;
        Some(match self.direction {
            Direction::Outbound => &reporting.client,
            Direction::Inbound => &reporting.server,
        })
    }

    /// The pod that tells it.
    fn teller(&self) -> Option<&Workload> {
        match self.direction {
            Direction::Outbound => self.source.workload.as_deref(),
            Direction::Inbound => self.destination.workload.as_deref(),
        }
    }

    fn tags(&self) -> Tags {
        let Some(told) = self.told().filter(|t| !t.values.is_empty()) else { return Tags::default() };
        told.tags_of(&self.entry(0, 0, &Ended::default()))
    }

    /// Takes down which of its addresses took a connection, if it is another than was asked first.
    pub fn reached(&mut self, address: SocketAddr) {
        if self.destination.address.is_some_and(|asked| asked != address) {
            self.destination.address = Some(address);
            self.tunnel = self.tunnel.map(|tunnel| SocketAddr::new(address.ip(), tunnel.port()));
        }
    }

    /// Nothing is said of the connection: it goes on, and another process sees to it.
    pub fn hand_over(mut self) {
        if let Some(open) = self.opened.take() {
            self.proxy.open.remove(open.number);
            self.proxy.metrics.open_connections.dec();
        }
        self.quiet = true;
    }

    /// Whether nothing is said of it should it end now: nobody knows yet whether it is to be.
    pub fn keep_quiet(&mut self, quiet: bool) {
        self.quiet = quiet;
    }

    /// What it has carried until now is counted by others.
    pub fn counted_by_others(&self) {
        if let Some(open) = &self.opened {
            open.counted[0].fetch_max(self.traffic.sent.load(Ordering::Relaxed), Ordering::Relaxed);
            open.counted[1].fetch_max(self.traffic.received.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The connection did not go through, or broke; one that its ends have ended has not.
    pub fn fail(&mut self, failure: Failure) {
        if self.opened.is_some() && failure.is_an_end() {
            tracing::debug!(target: "proxy", error = %chain(&failure), "an end of a connection is gone");
            self.end = Some(failure).filter(|failure| matches!(failure, Failure::UpstreamReset(_)));
            return;
        }
        self.failure.get_or_insert(failure);
    }

    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    fn count(&self) {
        if let Some(open) = &self.opened {
            open.count();
            if let Some(edge) = &open.edge {
                let flags = self.failure.as_ref().map_or("-", Failure::response_flag);
                let key = TcpKey { flags, tags: open.key.tags.clone() };
                edge.closed(&key);
                if matches!(self.failure, Some(Failure::Cut(Cut::PolicyChanged) | Failure::Denied(_))) {
                    edge.failed(&key);
                }
            }
            self.proxy.open.remove(open.number);
            self.proxy.metrics.open_connections.dec();
        }
        if let Some(failure) = &self.failure {
            if self.opened.is_none() {
                self.count_unopened(failure);
            }
            if matches!(failure, Failure::Overflow(_)) {
                self.proxy.metrics.overflow("connections");
            }
            self.proxy.metrics.failure(self.direction.name(), failure.reason());
        }
    }

    /// It was over before it was known whose it was, or where it was to go.
    fn is_early(&self) -> bool {
        self.opened.is_none() && self.failure.as_ref().is_some_and(|failure| failure.is_early() || self.told().is_none())
    }

    /// Of one that did not come about, counts that, and as ztunnel does that it was begun and is over.
    fn count_unopened(&self, failure: &Failure) {
        let flags = failure.response_flag();
        let told = self.told().is_some() && flags != "-";
        let Some(edge) = told.then(|| self.edge()).flatten() else { return };
        let key = |flags| TcpKey { flags, tags: self.tags() };
        edge.failed(&key(flags));
        if !self.is_early() {
            edge.opened(&key("-"));
            edge.closed(&key(flags));
        }
    }

    fn entry<'a>(&'a self, sent: u64, received: u64, ended: &'a Ended) -> Entry<'a> {
        let duration = self.started.elapsed();
        let outbound = self.direction == Direction::Outbound;
        // Nobody was asked for it, or not there.
        let nowhere = matches!(
            &self.failure,
            Some(
                Failure::NoEndpoint(_)
                    | Failure::NoSuchPort { .. }
                    | Failure::NotInRegistry(_)
                    | Failure::ReservedPort(_)
                    | Failure::UnknownWorkload
                    | Failure::Overflow(_)
            )
        );
        let cluster = match (&self.cluster, self.destination.address) {
            (Some(ClusterId { service, port, subset }), _) if outbound => Some(ClusterName::Outbound { service, port: *port, subset }),
            (None, Some(_)) if outbound && matches!(self.failure, Some(Failure::NotInRegistry(_))) => {
                Some(ClusterName::Named("BlackHoleCluster"))
            }
            (None, Some(_)) if outbound && !nowhere => Some(ClusterName::Named("PassthroughCluster")),
            (_, Some(address)) if !outbound => Some(ClusterName::Inbound(address.port())),
            _ => None,
        };
        // Of the connection of the client, which in a pod has no certificates.
        let proved = |party: &'a Party| party.identity.as_ref().filter(|_| !outbound);
        Entry {
            start: SystemTime::now().checked_sub(duration).unwrap_or(SystemTime::UNIX_EPOCH),
            duration,
            request: None,
            protocol: None,
            code: 0,
            grpc_status: None,
            grpc_said: false,
            flags: ended.flags.text(),
            flags_long: ended.flags.long(),
            received_after: None,
            sent_after: None,
            answered_after: None,
            attempts: 0,
            upstream_protocol: None,
            tells_a_request: false,
            flag_bits: ended.flags.bits(),
            details: None,
            termination_details: ended.closed.as_deref(),
            transport_failure: ended.unconnected.as_deref(),
            bytes_received: sent,
            bytes_sent: received,
            service_time: None,
            upstream_host: self.destination.address.filter(|_| !nowhere),
            upstream_cluster: cluster,
            upstream_local: None,
            downstream_local: self.asked.filter(|_| outbound).or(self.destination.address),
            downstream_remote: self.source.address,
            sni: self.sni.get().map(|name| &**name),
            route: None,
            response_headers: None,
            response_trailers: None,
            // Of the connection of the client.
            mutual_tls: !outbound && self.source.identity.is_some() && self.destination.identity.is_some(),
            trace: None,
            peer: proved(&self.source),
            local: proved(&self.destination),
            teller: self.teller(),
            other: match self.direction {
                Direction::Outbound => self.destination.workload.as_deref().map(|peer| (End::Upstream, peer)),
                Direction::Inbound => self.source.workload.as_deref().map(|peer| (End::Downstream, peer)),
            },
            cluster: &self.proxy.metrics.cluster,
        }
    }

    /// What access logs tell of how it ended.
    fn ended(&self) -> Ended {
        self.failure.as_ref().or(self.end.as_ref()).map_or_else(Ended::default, |failure| failure.told(self.direction))
    }

    /// Writes it to the access logs that want it.
    fn tell(&self, sent: u64, received: u64) {
        if let Some(told) = self.told().filter(|t| !t.logs.is_empty())
            && !self.requests.load(Ordering::Relaxed)
        {
            reporting::log(&self.proxy.metrics.access, &told.logs, &self.entry(sent, received, &self.ended()));
        }
    }

    /// Shows it to who looks at the workload it is told of.
    fn show(&self, sent: u64, received: u64) {
        let watch = &self.proxy.metrics.watch;
        if !watch.is_on() || self.requests.load(Ordering::Relaxed) {
            return;
        }
        let party = match self.direction {
            Direction::Outbound => &self.source,
            Direction::Inbound => &self.destination,
        };
        let Some(name) = party.workload.as_ref().map(|w| w.name.to_string()).filter(|name| watch.sees(name)) else { return };
        let ended = Ended { closed: self.failure.as_ref().map(|f| chain(f)), ..self.ended() };
        let edge = self.opened.as_ref().and_then(|open| open.edge.as_ref()).map(|edge| edge.key());
        watch.tell(&name, reporting::event(&self.entry(sent, received, &ended), self.direction.reporter(), edge));
    }

    fn log(&self, sent: u64, received: u64) {
        let is_early = self.is_early();
        // Limits that somebody has set are no errors.
        let is_error = self.failure.as_ref().is_some_and(|f| !matches!(f, Failure::Cut(Cut::Idle | Cut::MaxDuration)));
        let is_wanted = match &self.failure {
            _ if !is_error => tracing::enabled!(target: "access", tracing::Level::INFO),
            Some(_) if is_early => tracing::enabled!(target: "access", tracing::Level::WARN),
            _ => tracing::enabled!(target: "access", tracing::Level::ERROR),
        };
        if !is_wanted {
            return;
        }
        // Who the two are is known for certain where both have proved it.
        let mutual = self.source.identity.is_some() && self.destination.identity.is_some();
        let service = self.service().map(ObjectName::fqdn);
        // What the other end dialled: through a tunnel, the HBONE address, with the application's beside it.
        let (dst, hbone) = match self.tunnel {
            Some(tunnel) => (Some(tunnel), self.destination.address),
            None => (self.destination.address, None),
        };
        let (duration, error) = (format!("{}ms", self.started.elapsed().as_millis()), self.failure.as_ref().map(|f| chain(f)));
        // As ztunnel tells it: what this end sent to the other, and what it received from it.
        let (out, back) = match self.direction {
            Direction::Outbound => (sent, received),
            Direction::Inbound => (received, sent),
        };
        let (source, destination) = (&self.source, &self.destination);
        // Of a source that nothing else is known of, what its peer says.
        let told = self.introduction.as_ref().filter(|_| source.workload.is_none()).and_then(Introduction::read);
        let (name, namespace) = match &told {
            Some(told) => (told.service.as_deref().or(told.workload.as_deref()), source.identity.as_ref().map(SpiffeId::namespace)),
            None => (source.name(), source.namespace()),
        };
        macro_rules! say {
            ($level:ident, $what:literal) => {
                tracing::$level!(
                    name: $what,
                    target: "access",
                    { src.addr = source.address.map(display), src.workload = name, src.namespace = namespace,
                      src.identity = source.proved(mutual), dst.addr = dst.map(display), dst.hbone_addr = hbone.map(display),
                      dst.service = service, dst.workload = destination.name(), dst.namespace = destination.namespace(),
                      dst.identity = destination.proved(mutual), direction = self.direction.name(), bytes_sent = out, bytes_recv = back, duration, error },
                    $what
                )
            };
        }
        match (is_error, is_early) {
            (false, _) => say!(info, "connection complete"),
            (true, true) => say!(warn, "connection failed"),
            (true, false) => say!(error, "connection complete"),
        }
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if self.quiet {
            return;
        }
        let sent = self.traffic.sent.load(Ordering::Relaxed);
        let received = self.traffic.received.load(Ordering::Relaxed);
        self.count();
        self.log(sent, received);
        self.tell(sent, received);
        self.show(sent, received);
    }
}
