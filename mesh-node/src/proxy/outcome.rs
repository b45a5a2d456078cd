//! The end of a connection: counted and logged in one place, however it ends.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use super::Failure;
use crate::{
    id::{ObjectName, SpiffeId},
    io::relay::Traffic,
    route::Workload,
    telemetry::{Metrics, TcpLabels, chain},
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

    fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
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

/// A connection from its first to its last moment. Dropped, it is counted and logged; without [`Outcome::fail`] it was good.
#[derive(Debug)]
pub struct Outcome {
    metrics: Arc<Metrics>,
    direction: Direction,
    started: Instant,
    pub source: Party,
    pub destination: Party,
    /// The address dialled when it is not the destination's own: the HBONE port.
    pub tunnel: Option<SocketAddr>,
    pub service: Option<ObjectName>,
    pub traffic: Arc<Traffic>,
    opened: Option<TcpLabels>,
    failure: Option<Failure>,
    handed_over: bool,
}

impl Outcome {
    pub fn new(metrics: &Arc<Metrics>, direction: Direction) -> Self {
        Self {
            metrics: metrics.clone(),
            direction,
            started: Instant::now(),
            source: Party::default(),
            destination: Party::default(),
            tunnel: None,
            service: None,
            traffic: Arc::default(),
            opened: None,
            failure: None,
            handed_over: false,
        }
    }

    /// One of a connection that has begun some time ago.
    pub fn since(metrics: &Arc<Metrics>, direction: Direction, started: Instant) -> Self {
        let mut outcome = Self::new(metrics, direction);
        outcome.started = started;
        outcome
    }

    /// The connection is established end to end.
    pub fn opened(&mut self) {
        let labels = self.labels("-");
        self.metrics.opened.get_or_create(&labels).inc();
        self.metrics.open_connections.inc();
        self.opened = Some(labels);
    }

    /// Nothing is said of the connection: it goes on, and another process sees to it.
    pub fn hand_over(mut self) {
        if self.opened.take().is_some() {
            self.metrics.open_connections.dec();
        }
        self.handed_over = true;
    }

    /// The connection did not go through, or broke.
    pub fn fail(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
    }

    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    fn labels(&self, flags: &'static str) -> TcpLabels {
        let source = Names::of(&self.source);
        let destination = Names::of(&self.destination);
        let known = |name: Option<&str>| name.unwrap_or("unknown").to_owned();
        let service = self.service.as_ref();
        let mutual = self.source.identity.is_some() && self.destination.identity.is_some();
        TcpLabels {
            reporter: self.direction.reporter(),
            source_workload: source.workload,
            source_canonical_service: source.canonical_service,
            source_canonical_revision: source.canonical_revision,
            source_workload_namespace: source.namespace,
            source_principal: source.principal,
            source_app: source.app,
            source_version: source.version,
            destination_service: service.map_or_else(|| known(None), |s| format!("{}.{}.svc.cluster.local", s.name, s.namespace)),
            destination_service_namespace: known(service.map(|s| &*s.namespace)),
            destination_service_name: known(service.map(|s| &*s.name)),
            destination_workload: destination.workload,
            destination_canonical_service: destination.canonical_service,
            destination_canonical_revision: destination.canonical_revision,
            destination_workload_namespace: destination.namespace,
            destination_principal: destination.principal,
            destination_app: destination.app,
            destination_version: destination.version,
            request_protocol: "tcp",
            response_flags: flags,
            connection_security_policy: if mutual { "mutual_tls" } else { "unknown" },
        }
    }

    fn count(&self, sent: u64, received: u64) {
        if let Some(labels) = &self.opened {
            let closed = TcpLabels { response_flags: self.failure.as_ref().map_or("-", Failure::response_flag), ..labels.clone() };
            self.metrics.closed.get_or_create(&closed).inc();
            self.metrics.sent.get_or_create(labels).inc_by(received);
            self.metrics.received.get_or_create(labels).inc_by(sent);
            self.metrics.open_connections.dec();
        }
        if let Some(failure) = &self.failure {
            self.metrics.failure(self.direction.name(), failure.reason());
        }
    }

    fn log(&self, sent: u64, received: u64) {
        if !tracing::enabled!(target: "access", tracing::Level::INFO) {
            return;
        }
        let name = |p: &Party| p.workload.as_ref().map(|w| w.name.name.to_string());
        let namespace = |p: &Party| p.workload.as_ref().map(|w| w.name.namespace.to_string());
        let identity = |p: &Party| p.identity.as_ref().map(ToString::to_string);
        let service = self.service.as_ref().map(|s| format!("{}.{}.svc.cluster.local", s.name, s.namespace));
        let address = |a: Option<SocketAddr>| a.map(|a| a.to_string());
        // What the other end dialled: through a tunnel, the HBONE address, with the application's beside it.
        let (dst, hbone) = match self.tunnel {
            Some(tunnel) => (Some(tunnel), self.destination.address),
            None => (self.destination.address, None),
        };
        let (duration, error) = (format!("{}ms", self.started.elapsed().as_millis()), self.failure.as_ref().map(|f| chain(f)));
        let (source, destination, dst, hbone) = (&self.source, &self.destination, address(dst), address(hbone));
        tracing::info!(
            name: "connection complete",
            target: "access",
            { src.addr = address(source.address), src.workload = name(source), src.namespace = namespace(source), src.identity = identity(source),
              dst.addr = dst, dst.hbone_addr = hbone, dst.service = service,
              dst.workload = name(destination), dst.namespace = namespace(destination), dst.identity = identity(destination),
              direction = self.direction.name(), bytes_sent = sent, bytes_recv = received, duration, error },
            "connection complete"
        );
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if self.handed_over {
            return;
        }
        let sent = self.traffic.sent.load(Ordering::Relaxed);
        let received = self.traffic.received.load(Ordering::Relaxed);
        self.count(sent, received);
        self.log(sent, received);
    }
}

/// A party's label values.
struct Names {
    workload: String,
    namespace: String,
    principal: String,
    app: String,
    version: String,
    canonical_service: String,
    canonical_revision: String,
}

impl Names {
    fn of(party: &Party) -> Self {
        let workload = party.workload.as_deref();
        let label = |key: &str| workload.and_then(|w| w.labels.get(key));
        let known = |value: Option<&str>| value.unwrap_or("unknown").to_owned();
        let app = label("app").or_else(|| label("app.kubernetes.io/name"));
        let version = label("version").or_else(|| label("app.kubernetes.io/version"));
        let name = workload.map(|w| &*w.workload_name);
        Self {
            workload: known(name),
            namespace: known(workload.map(|w| &*w.name.namespace)),
            principal: party.identity.as_ref().map_or_else(|| known(None), ToString::to_string),
            app: known(app),
            version: known(version),
            canonical_service: known(workload.and_then(Workload::canonical_service).or(name)),
            canonical_revision: workload.and_then(Workload::canonical_revision).unwrap_or("latest").to_owned(),
        }
    }
}
