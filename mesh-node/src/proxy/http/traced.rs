//! The part of a request in a trace: what it says of it where it goes, and its span.

use std::sync::Arc;

use http::HeaderMap;

use crate::{
    proxy::traces::{Finished, Spans},
    report::{
        entry::Entry,
        span::{self, Kind, Place, Span},
        trace::{Context, Parent},
    },
    route::{ClusterId, PortOf, Workload, request::RequestHead},
    telemetry::{Metrics, traffic::Reporter},
};

/// What a request says of its trace where it goes.
pub struct Onward {
    context: Context,
    pub own: Parent,
    pub sampled: bool,
    /// A span is told.
    pub reported: bool,
}

impl Onward {
    /// Goes on with what headers say. Where nobody has decided, so many of a million are sampled. Where spans are not `reported`, what
    /// comes after is caused by what came before.
    pub fn of(headers: &HeaderMap, sampling: u32, reported: bool) -> Self {
        let context = Context::of(headers);
        let sampled = context.sampled.unwrap_or_else(|| fastrand::u32(..1_000_000) < sampling);
        let fresh = || Parent { trace: fastrand::u128(1..), span: fastrand::u64(1..) };
        let own = match context.parent {
            None => fresh(),
            Some(parent) if reported => Parent { trace: parent.trace, ..fresh() },
            Some(parent) => parent,
        };
        Self { context, own, sampled, reported: reported && sampled }
    }

    /// Headers say already all there is: that nothing is to be told of this trace.
    pub fn is_said(&self) -> bool {
        !self.reported && self.context.parent.is_some() && self.context.sampled.is_some()
    }

    /// The request as it goes on.
    pub fn on(&self, head: &RequestHead) -> RequestHead {
        let mut head = head.clone();
        self.write(&mut head.headers);
        head
    }

    pub fn write(&self, headers: &mut HeaderMap) {
        self.context.write(self.own, self.sampled, headers);
    }
}

/// Statuses of gRPC that are an error of the server, as Envoy's spans have it: unknown, deadline exceeded, resource
/// exhausted, unimplemented, internal, unavailable and data loss.
const FAILURES: [u32; 7] = [2, 4, 8, 12, 13, 14, 15];

/// Whether it is an error of a span, beside what is a failure of the server in any case: to who asked, every answer that is not what
/// was asked for (OpenTelemetry's conventions for HTTP and gRPC).
fn is_error(kind: Kind, entry: &Entry<'_>) -> bool {
    kind == Kind::Client && (entry.code >= 400 || entry.grpc_said && entry.grpc_status.is_some_and(|s| s != 0))
}

/// The span of a request that is sampled.
pub struct Traced {
    own: Parent,
    parent: Option<u64>,
    /// What other systems say of the trace.
    state: String,
    workload: Arc<Workload>,
    /// The service's port that leads into it, where it is asked.
    into: Option<PortOf>,
    spans: Arc<Spans>,
}

impl Traced {
    pub fn new(onward: &Onward, headers: &HeaderMap, (workload, into): (&Arc<Workload>, Option<PortOf>), spans: &Arc<Spans>) -> Self {
        let parent = onward.context.parent.map(|p| p.span);
        let state = onward.context.state(headers);
        Self { own: onward.own, parent, state, workload: workload.clone(), into, spans: spans.clone() }
    }

    /// Puts the span on its way, now that the request is over.
    pub fn tell(&self, entry: &Entry<'_>, reporter: Reporter, cluster: Option<&ClusterId>, port: u16, metrics: &Metrics) {
        let reporting = &self.workload.reporting;
        let (told, kind, service, port) = match reporter {
            Reporter::Source => (&reporting.client, Kind::Client, cluster.map(|c| &c.service), cluster.map_or(port, |c| c.port)),
            Reporter::Destination => {
                let of = self.into.as_ref();
                (&reporting.server, Kind::Server, of.map(|of| &of.service), of.map_or(port, |of| of.port))
            }
        };
        let Some(traces) = &told.traces else { return };
        let name = match service {
            Some(s) => format!("{}:{port}/*", s.fqdn()),
            // Not what clients make up.
            None => format!("unknown:{port}/*"),
        };
        let place = Place { cluster: &metrics.cluster, workload: &self.workload };
        let failed = entry.code == 0 || entry.code >= 500 || entry.grpc_status.is_some_and(|s| FAILURES.contains(&s));
        let span = Span {
            own: self.own,
            state: self.state.clone(),
            parent: self.parent,
            kind,
            name,
            start: entry.start,
            end: entry.start + entry.duration,
            failed: failed || is_error(kind, entry),
            attributes: span::attributes(entry, failed, place, traces),
        };
        self.spans.push(Finished { exporter: traces.exporter.clone(), pod: self.workload.uid.clone(), span }, metrics);
    }
}
