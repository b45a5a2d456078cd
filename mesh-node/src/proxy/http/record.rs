//! What became of a request: flags and details as Envoy names them, counted and logged in one place when it ends.

use std::{borrow::Cow, net::SocketAddr, sync::Arc, time::Instant};

use http::{HeaderValue, StatusCode};

pub use crate::telemetry::{Flag, Flags};
use crate::{
    route::{Cluster, Workload, request::RequestHead},
    telemetry::Metrics,
};

/// One request from its first to its last moment. Dropped, it is counted and logged.
pub struct Record {
    reporter: &'static str,
    metrics: Arc<Metrics>,
    started: Instant,
    request: Option<Described>,
    pub source: Option<Arc<Workload>>,
    pub client: SocketAddr,
    pub destination: SocketAddr,
    pub protocol: &'static str,
    pub flags: Flags,
    pub details: Cow<'static, str>,
    pub status: Option<StatusCode>,
    pub route: Option<Arc<str>>,
    pub cluster: Option<Arc<Cluster>>,
    pub endpoint: Option<SocketAddr>,
    /// Attempts begun, whether or not they reached the endpoint.
    pub attempts: u32,
}

/// What the log says of the request; kept only when there is a log.
struct Described {
    method: http::Method,
    path: String,
    authority: HeaderValue,
    id: Option<HeaderValue>,
}

impl Record {
    pub fn new(metrics: &Arc<Metrics>, client: SocketAddr, destination: SocketAddr, protocol: &'static str) -> Self {
        Self::reported("source", metrics, client, destination, protocol)
    }

    /// A request into a pod of this node.
    pub fn inbound(metrics: &Arc<Metrics>, client: SocketAddr, destination: SocketAddr, protocol: &'static str) -> Self {
        Self::reported("destination", metrics, client, destination, protocol)
    }

    fn reported(
        reporter: &'static str,
        metrics: &Arc<Metrics>,
        client: SocketAddr,
        destination: SocketAddr,
        protocol: &'static str,
    ) -> Self {
        metrics.http_active.inc();
        Self {
            reporter,
            metrics: metrics.clone(),
            started: Instant::now(),
            request: None,
            source: None,
            client,
            destination,
            protocol,
            flags: Flags::default(),
            details: Cow::Borrowed(""),
            status: None,
            route: None,
            cluster: None,
            endpoint: None,
            attempts: 0,
        }
    }

    /// Takes down what was asked for, before anything changes it.
    pub fn describe(&mut self, head: &RequestHead) {
        if is_logged() {
            let id = head.headers.get("x-request-id").cloned();
            let (method, authority) = (head.method.clone(), head.authority.clone());
            self.request = Some(Described { method, path: head.target.as_str().to_owned(), authority, id });
        }
    }

    pub fn raise(&mut self, flag: Flag) {
        self.flags.raise(flag);
    }

    fn log(&self) {
        let text = |v: &HeaderValue| v.to_str().unwrap_or_default().to_owned();
        let request = self.request.as_ref();
        let source = self.source.as_ref();
        tracing::info!(
            name: "request complete",
            target: "access",
            { reporter = self.reporter, protocol = self.protocol,
              method = request.map(|r| r.method.to_string()), path = request.map(|r| r.path.clone()),
              authority = request.map(|r| text(&r.authority)), request_id = request.and_then(|r| r.id.as_ref()).map(text),
              response_code = self.status.map(|s| s.as_u16()), response_flags = %self.flags, response_code_details = %self.details,
              attempts = self.attempts, duration = format!("{}ms", self.started.elapsed().as_millis()),
              route_name = self.route.as_deref(), upstream_cluster = self.cluster.as_ref().map(|c| c.id.to_string()),
              upstream_host = self.endpoint.map(|e| e.to_string()), downstream_remote_address = %self.client,
              downstream_local_address = %self.destination,
              src.workload = source.map(|s| s.name.name.to_string()), src.namespace = source.map(|s| s.name.namespace.to_string()) },
            "request complete"
        );
    }
}

fn is_logged() -> bool {
    tracing::enabled!(target: "access", tracing::Level::INFO)
}

impl Drop for Record {
    fn drop(&mut self) {
        self.metrics.http_active.dec();
        self.metrics.request(self.reporter, self.status.map_or(0, |s| s.as_u16()), self.flags);
        if is_logged() {
            self.log();
        }
    }
}
