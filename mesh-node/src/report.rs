//! What is told of a workload's traffic: which metrics with which tags, access logs and traces. Resolved per workload from Istio's
//! `Telemetry` and `MeshConfig`; pure, the data path and `telemetry` carry it out.

pub mod attributes;
pub mod entry;
pub mod environment;
pub mod expression;
pub mod format;
pub mod kept;
pub mod peer;
pub mod plain;
pub mod span;
pub mod trace;

use std::{sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue};

use self::{
    attributes::HeadersOf,
    entry::{Entry, Header},
    expression::Expression,
    format::Format,
    kept::Asks,
};
use crate::telemetry::traffic::{TagPlan, Tags};

/// Longest value of a metric's tag that is made of a request or connection, bytes; the rest is cut off.
pub const LONGEST_TAG: usize = 256;
/// Most such tags of a workload's metrics, in one direction.
pub const MOST_TAGS: usize = 20;

/// How a workload's traffic is told, as a client and as a server.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reporting {
    pub client: TelemetryPlan,
    pub server: TelemetryPlan,
}

/// The same in one direction.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TelemetryPlan {
    pub tags: Arc<TagPlan>,
    /// Values of the plan's dynamic tags.
    pub values: Vec<Arc<Expression>>,
    pub logs: Vec<LogTo>,
    pub traces: Option<Traces>,
    /// Headers that logs and tags will ask about.
    pub asks: Asks,
}

impl TelemetryPlan {
    pub fn new(tags: TagPlan, values: Vec<Arc<Expression>>, logs: Vec<LogTo>, traces: Option<Traces>) -> Self {
        let mut asks = Asks::default();
        let filters = logs.iter().filter_map(|l| l.filter.as_deref());
        filters.chain(values.iter().map(|v| &**v)).for_each(|expression| expression.asks(&mut asks));
        logs.iter().for_each(|l| l.log.format.asks(&mut asks));
        if let Some(traces) = &traces {
            for (_, tag) in &traces.tags {
                if let SpanTag::Template(template) = tag {
                    asks.join(template.asks());
                }
            }
            asks.for_one(HeadersOf::Response, &Header::Named(span::GRPC_MESSAGE.clone()));
        }
        Self { tags: Arc::new(tags), values, logs, traces, asks }
    }

    /// Values of the dynamic tags, each at most [`LONGEST_TAG`] bytes.
    pub fn tags_of(&self, entry: &Entry<'_>) -> Tags {
        let cut = |value: String| Arc::from(&value[..value.floor_char_boundary(LONGEST_TAG)]);
        self.values.iter().map(|value| cut(value.tag(entry))).collect()
    }

    /// Whether what was asked for has to be kept until the request is over.
    pub fn wants_request(&self) -> bool {
        !self.logs.is_empty() || !self.values.is_empty()
    }
}

/// One access log of a workload.
#[derive(Debug, Clone, PartialEq)]
pub struct LogTo {
    pub log: Arc<AccessLog>,
    /// What is written; everything without it.
    pub filter: Option<Arc<Expression>>,
}

/// An access log: where it goes and what its lines look like.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessLog {
    /// The provider.
    pub name: Arc<str>,
    /// A file, or `/dev/stdout` or `/dev/stderr`.
    pub path: Arc<str>,
    pub format: Format,
}

/// Traces of a workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Traces {
    pub exporter: Arc<Exporter>,
    /// How many of a million requests that nobody has decided about begin a trace.
    pub sampling: u32,
    /// Spans are written; otherwise only the headers are passed on.
    pub reported: bool,
    pub tags: Vec<(Arc<str>, SpanTag)>,
}

/// Where spans go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Exporter {
    /// The provider.
    pub name: Arc<str>,
    /// Host name of the collector's service.
    pub service: Arc<str>,
    pub port: u16,
    /// Longest value of an attribute, bytes.
    pub longest: usize,
    /// OTLP over HTTP, at this path; over gRPC otherwise.
    pub path: Option<Arc<str>>,
    pub headers: Vec<(HeaderName, HeaderText)>,
    pub timeout: Duration,
}

/// The value of a header that a collector wants.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HeaderText {
    Value(HeaderValue),
    /// That of a variable of the node's environment.
    Variable(Arc<str>),
}

/// A tag of spans beside the standard ones.
#[derive(Debug, Clone, PartialEq)]
pub enum SpanTag {
    Literal(Arc<str>),
    /// The value of a request header, or the default.
    Header(HeaderName, Option<Arc<str>>),
    /// A variable of the pod's environment, or the default.
    Environment(environment::Variable, Option<Arc<str>>),
    /// What Envoy's operators say of the request; nothing is no tag.
    Template(format::Template),
}
