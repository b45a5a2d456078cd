//! What the node counts and how it logs. Istio's TCP metrics keep Istio's names and labels; our own start with `mesh_`.
//!
//! Label values are closed sets, or names of workloads and services of the mesh: bounded by the configuration.

mod events;
mod exposition;
mod flags;
mod lines;
pub mod log;
mod process;
pub mod traffic;
pub mod watch;

use std::sync::{Arc, atomic::AtomicU64};

pub use events::civil;
pub use exposition::Exposition;
pub use flags::{Flag, Flags};
pub use lines::Lines;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use self::{
    process::Process,
    traffic::{Calls, Reporter, Traffic},
    watch::Watch,
};

/// Why a connection was refused or cut, by direction.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FailureLabels {
    pub direction: &'static str,
    pub reason: &'static str,
}

/// How an established connection goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PathLabels {
    pub direction: &'static str,
    pub path: &'static str,
}

/// A TLS handshake with a peer, by side (client or server).
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandshakeLabels {
    pub side: &'static str,
    pub reason: &'static str,
}

/// Which end of a connection tells of it: `source` or `destination`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReporterLabels {
    pub reporter: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PolicyLabels {
    /// `namespace/name`.
    pub policy: String,
    /// `denied`, `connection_denied` (before anything was sent on it), `audited`, `dry_run_allowed` or `dry_run_denied`.
    pub result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResultLabels {
    pub result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EventLabels {
    pub event: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StateLabels {
    pub state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    pub reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LimitLabels {
    /// `connections`, `pending_requests`, `requests` or `retries` of a `DestinationRule`; `kept_bodies`; `kept_connections`;
    /// `requests_of_pod` of `--max-requests`.
    pub limit: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WhatLabels {
    pub what: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct IdentityLabels {
    /// A SPIFFE ID of a pod of this node.
    pub identity: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SeverityLabels {
    /// `error`: an object that is not in force; `warning`: one that is, but not in full.
    pub severity: &'static str,
}

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Name of the cluster, as Istio's metrics have it.
    pub cluster: Arc<str>,
    /// Istio's metrics of requests and connections.
    pub traffic: Arc<Traffic>,
    /// gRPC calls that go on.
    pub calls: Calls,
    pub access: Lines,
    /// Workloads that are looked at live.
    pub watch: Watch,
    pub failures: Family<FailureLabels, Counter>,
    pub connections: Family<PathLabels, Counter>,
    pub handshake_failures: Family<HandshakeLabels, Counter>,
    pub revoked: Family<ReporterLabels, Counter>,
    pub http_active: Gauge,
    pub policy_decisions: Family<PolicyLabels, Counter>,
    pub jwks_fetches: Family<ResultLabels, Counter>,
    pub authorizer_calls: Family<ResultLabels, Counter>,
    pub mirror_failures: Counter,
    pub open_connections: Gauge,
    pub hbone_connections: Gauge,
    pub enrolled_pods: Gauge,
    pub uncaptured_pods: Gauge,
    pub config_generation: Gauge,
    pub config_remarks: Family<SeverityLabels, Gauge>,
    /// What is wrong with the process itself.
    pub problems: Family<WhatLabels, Gauge>,
    /// Places for connections: how many there are, and are held.
    pub connection_places: Family<WhatLabels, Gauge>,
    /// Connections to the pages of the node that were turned away.
    pub pages_refused: Counter,
    /// Seconds.
    pub config_build: Gauge<f64, AtomicU64>,
    /// Seconds.
    pub config_lag: Gauge<f64, AtomicU64>,
    pub retries: Counter,
    pub ejections: Counter,
    pub overflows: Family<LimitLabels, Counter>,
    upstream_connections: Family<ResultLabels, Counter>,
    /// Read when asked for.
    pub upstream: Family<WhatLabels, Gauge>,
    pub hbone_pool: Family<WhatLabels, Gauge>,
    /// Seconds since 1970.
    pub certificate_expiry: Family<IdentityLabels, Gauge>,
    pub certificate_issued: Family<IdentityLabels, Gauge>,
    pub certificates_failing: Gauge,
    pub edges_refused: Counter,
    pub capture_events: Family<EventLabels, Counter>,
    pub acceleration: Family<StateLabels, Counter>,
    pub indirect: Family<ReasonLabels, Counter>,
    access_lines: Family<ResultLabels, Counter>,
    trace_spans: Family<ResultLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new("Kubernetes")
    }
}

impl Metrics {
    /// Of a node of this cluster.
    pub fn new(cluster: &str) -> Self {
        let access_lines = Family::default();
        let mut metrics = Self {
            registry: Registry::default(),
            cluster: cluster.into(),
            traffic: Arc::default(),
            calls: Calls::default(),
            access: Lines::new(access_lines.clone()),
            watch: Watch::default(),
            failures: Family::default(),
            connections: Family::default(),
            handshake_failures: Family::default(),
            revoked: Family::default(),
            http_active: Gauge::default(),
            policy_decisions: Family::default(),
            jwks_fetches: Family::default(),
            authorizer_calls: Family::default(),
            mirror_failures: Counter::default(),
            open_connections: Gauge::default(),
            hbone_connections: Gauge::default(),
            enrolled_pods: Gauge::default(),
            uncaptured_pods: Gauge::default(),
            config_generation: Gauge::default(),
            config_remarks: Family::default(),
            problems: Family::default(),
            connection_places: Family::default(),
            pages_refused: Counter::default(),
            config_build: Gauge::default(),
            config_lag: Gauge::default(),
            retries: Counter::default(),
            ejections: Counter::default(),
            overflows: Family::default(),
            upstream_connections: Family::default(),
            upstream: Family::default(),
            hbone_pool: Family::default(),
            certificate_expiry: Family::default(),
            certificate_issued: Family::default(),
            certificates_failing: Gauge::default(),
            edges_refused: Counter::default(),
            capture_events: Family::default(),
            acceleration: Family::default(),
            indirect: Family::default(),
            access_lines,
            trace_spans: Family::default(),
        };
        metrics.register();
        // What is lost is seen against nought, and not against nothing.
        ["exported", "rejected", "failed", "dropped"].into_iter().for_each(|result| metrics.spans(result, 0));
        for limit in ["connections", "pending_requests", "requests", "retries", "kept_bodies", "kept_connections", "requests_of_pod"] {
            metrics.overflows.get_or_create(&LimitLabels { limit }).inc_by(0);
        }
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register_collector(Box::new(self.traffic.clone()));
        r.register_collector(Box::new(Process));
        let build = Family::<Vec<(&'static str, &'static str)>, Gauge>::default();
        build.get_or_create(&vec![("component", "mesh-node"), ("tag", env!("CARGO_PKG_VERSION"))]).set(1);
        r.register("istio_build", "What this is", build);
        // The encoder appends _total to counters.
        r.register("mesh_access_log_lines", "Lines of access logs, by what became of them", self.access_lines.clone());
        r.register("mesh_log_lines", "Lines of the process' own log, by what became of them", log::counted());
        r.register("mesh_trace_spans", "Spans of traces, by what became of them", self.trace_spans.clone());
        r.register("mesh_connections", "Connections established, by how they go", self.connections.clone());
        r.register("mesh_connection_failures", "Connections refused, failed or cut, by reason", self.failures.clone());
        r.register("mesh_tls_handshake_failures", "TLS handshakes with mesh peers that failed, by reason", self.handshake_failures.clone());
        let help = "Connections with mesh peers refused or cut because a certificate has been revoked";
        r.register("istio_crl_policy_rejections", help, self.revoked.clone());
        r.register("mesh_http_active_requests", "HTTP requests under way", self.http_active.clone());
        r.register(
            "mesh_policy_decisions",
            "Connections and requests a policy denied, audited or would have decided",
            self.policy_decisions.clone(),
        );
        r.register("mesh_jwks_fetches", "Fetches of token issuers' keys, by result", self.jwks_fetches.clone());
        r.register("mesh_authorizer_calls", "Questions to external authorizers, by result", self.authorizer_calls.clone());
        r.register("mesh_http_mirror_failures", "Mirrored requests that were given up or failed", self.mirror_failures.clone());
        r.register("mesh_open_connections", "Connections being relayed", self.open_connections.clone());
        r.register("mesh_hbone_inbound_connections", "HBONE connections accepted and open", self.hbone_connections.clone());
        r.register("mesh_enrolled_pods", "Pods of this node whose traffic is captured", self.enrolled_pods.clone());
        r.register(
            "mesh_uncaptured_pods",
            "Pods of this node that are to be in the mesh and whose traffic is not captured",
            self.uncaptured_pods.clone(),
        );
        r.register("mesh_config_generation", "Generation of the configuration in force", self.config_generation.clone());
        r.register("mesh_problems", "What is wrong with the process itself; meshctl status tells what", self.problems.clone());
        r.register(
            "mesh_connection_places",
            "Places for connections of pods: how many there are, and how many are held",
            self.connection_places.clone(),
        );
        r.register(
            "mesh_pages_refused",
            "Connections for metrics, readiness and the like that there was no place for",
            self.pages_refused.clone(),
        );
        r.register("mesh_config_remarks", "Objects or fields of the configuration that are not in force", self.config_remarks.clone());
        self.register_more();
    }

    fn register_more(&mut self) {
        let r = &mut self.registry;
        r.register("mesh_config_build_seconds", "Time the configuration in force took to build", self.config_build.clone());
        let help = "Time from when a source began to read the latest change until it was in force";
        r.register("mesh_config_lag_seconds", help, self.config_lag.clone());
        r.register("mesh_retries", "Attempts at requests beyond the first", self.retries.clone());
        r.register("mesh_ejections", "Endpoints ejected by outlier detection", self.ejections.clone());
        r.register("mesh_overflows", "Requests and connections refused by a circuit breaker, by limit", self.overflows.clone());
        let help = "Connections for requests of pods to services, by result";
        r.register("mesh_upstream_connections", help, self.upstream_connections.clone());
        let help = "What pods have under way to services: connections, idle ones, requests, pending ones, retries, ejected endpoints, open breakers";
        r.register("mesh_upstream", help, self.upstream.clone());
        r.register("mesh_hbone_pool", "HBONE connections to other nodes, and their streams", self.hbone_pool.clone());
        r.register("mesh_certificate_expiry_timestamp_seconds", "When a certificate expires", self.certificate_expiry.clone());
        r.register("mesh_certificate_issued_timestamp_seconds", "Since when a certificate is valid", self.certificate_issued.clone());
        r.register("mesh_certificates_failing", "Certificates whose latest fetch failed", self.certificates_failing.clone());
        let help = "Times a pair of workloads found no room among the traffic metrics";
        r.register("mesh_traffic_edges_refused", help, self.edges_refused.clone());
        let help = "Times a connection between proxy and application became accelerated, or not, by state or reason";
        r.register("mesh_acceleration", help, self.acceleration.clone());
        let help = "Connections between pods of this node, that carry no HTTP, which went through the proxy, by why not directly";
        r.register("mesh_indirect_connections", help, self.indirect.clone());
        r.register("mesh_capture_events", "Events counted by the eBPF programs since they were first loaded", self.capture_events.clone());
    }

    /// A connection between the proxy and an application is accelerated now, or is not, for this reason.
    pub fn acceleration(&self, state: &'static str) {
        self.acceleration.get_or_create(&StateLabels { state }).inc();
    }

    /// All of them, as they are now.
    pub fn render(&self, exposition: Exposition) -> Result<String, std::fmt::Error> {
        exposition.render(&self.registry)
    }

    pub fn failure(&self, direction: &'static str, reason: &'static str) {
        self.failures.get_or_create(&FailureLabels { direction, reason }).inc();
    }

    pub fn policy_decision(&self, policy: &str, result: &'static str) {
        self.policy_decisions.get_or_create(&PolicyLabels { policy: policy.to_owned(), result }).inc();
    }

    /// A circuit breaker was open.
    pub fn overflow(&self, limit: &'static str) {
        self.overflows.get_or_create(&LimitLabels { limit }).inc();
    }

    /// So many spans came to this: `exported`, `rejected` by a collector, `failed` on the way, or `dropped` before it.
    pub fn spans(&self, result: &'static str, count: usize) {
        self.trace_spans.get_or_create(&ResultLabels { result }).inc_by(count as u64);
    }

    /// A connection for requests was `opened`, or `failed`.
    pub fn upstream_connection(&self, result: &'static str) {
        self.upstream_connections.get_or_create(&ResultLabels { result }).inc();
    }

    pub fn jwks_fetch(&self, result: &'static str) {
        self.jwks_fetches.get_or_create(&ResultLabels { result }).inc();
    }

    pub fn authorizer_call(&self, result: &'static str) {
        self.authorizer_calls.get_or_create(&ResultLabels { result }).inc();
    }

    /// Counts from nought what may go wrong in handshakes.
    pub fn expect_handshake_failures(&self, reasons: impl IntoIterator<Item = &'static str>) {
        for (side, reason) in reasons.into_iter().flat_map(|reason| [("client", reason), ("server", reason)]) {
            self.handshake_failures.get_or_create(&HandshakeLabels { side, reason }).inc_by(0);
        }
    }

    pub fn handshake_failure(&self, side: &'static str, reason: &'static str) {
        self.handshake_failures.get_or_create(&HandshakeLabels { side, reason }).inc();
        if reason.starts_with("revoked") {
            let reporter = if side == "client" { Reporter::Source } else { Reporter::Destination };
            self.revoked.get_or_create(&ReporterLabels { reporter: reporter.name() }).inc();
        }
    }
}

/// An error with all its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
