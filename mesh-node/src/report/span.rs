//! Spans of traces, and what `OTLP` makes of them (opentelemetry-proto 1.x, `trace/v1`). Names of attributes are Envoy's and
//! Istio's, so that what is looked for in their spans is found in these.

use std::{borrow::Cow, time::SystemTime};

use http::{
    HeaderName,
    header::{CONTENT_TYPE, USER_AGENT},
};
use prost::{Message, Oneof};

use super::{
    SpanTag, Traces,
    entry::{Entry, X_REQUEST_ID},
    trace::Parent,
};
use crate::route::Workload;

/// Longest path in a span, bytes, unless the provider says otherwise; the rest is cut off. Envoy's default.
pub const LONGEST: usize = 256;
/// Longest value of an attribute, likewise.
const MOST_VALUE: usize = 4096;

/// What an answer of gRPC says of its status.
pub static GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Which side of a request a span is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Server,
    Client,
}

/// A span that is over.
#[derive(Debug, Clone)]
pub struct Span {
    /// The trace, and this span in it.
    pub own: Parent,
    /// W3C's `tracestate`.
    pub state: String,
    /// The span that caused it.
    pub parent: Option<u64>,
    pub kind: Kind,
    /// Where the request went: the service's host and port, as Istio names operations.
    pub name: String,
    pub start: SystemTime,
    pub end: SystemTime,
    /// Its status: an error of the kind of span it is.
    pub failed: bool,
    pub attributes: Vec<(Cow<'static, str>, String)>,
}

/// What is told of the node and the mesh with every span.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    pub cluster: &'a str,
    pub workload: &'a Workload,
}

/// What a span says of a request.
pub fn attributes(entry: &Entry<'_>, failed: bool, place: Place<'_>, traces: &Traces) -> Vec<(Cow<'static, str>, String)> {
    let mut all: Vec<(Cow<'static, str>, String)> = Vec::with_capacity(32);
    let short = |mut value: String| {
        value.truncate(value.floor_char_boundary(MOST_VALUE));
        value
    };
    let mut put = |name: &'static str, value: String| all.push((Cow::Borrowed(name), short(value)));
    let workload = place.workload;
    put("component", "proxy".to_owned());
    put("node_id", format!("{}.{}", workload.name.name, workload.name.namespace));
    if let Some(asked) = &entry.request {
        let header = |name: &HeaderName| asked.headers.get(name).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
        put("http.method", asked.method.to_owned());
        // Of the whole, the path is what has a bound, as with Envoy.
        let path = &asked.path[..asked.path.floor_char_boundary(traces.exporter.longest)];
        put("http.url", format!("{}://{}{path}", asked.scheme, asked.authority));
        put("user_agent", header(&USER_AGENT).unwrap_or_else(|| "-".to_owned()));
        put("guid:x-request-id", header(&X_REQUEST_ID).unwrap_or_default());
        if let Some(kind) = header(&CONTENT_TYPE).filter(|t| t.starts_with("application/grpc")) {
            put("grpc.path", asked.path.to_owned());
            put("grpc.authority", asked.authority.to_owned());
            put("grpc.content_type", kind);
        }
        if let Some(status) = entry.grpc_status.filter(|_| entry.grpc_said) {
            put("grpc.status_code", status.to_string());
            let message = entry.response_headers.and_then(|h| h.get(&GRPC_MESSAGE));
            if let Some(message) = message.filter(|m| !m.is_empty()) {
                put("grpc.message", String::from_utf8_lossy(message.as_bytes()).into_owned());
            }
        }
    }
    put("http.protocol", entry.protocol.unwrap_or_default().to_owned());
    put("http.status_code", entry.code.to_string());
    put("request_size", entry.bytes_received.to_string());
    put("response_size", entry.bytes_sent.to_string());
    put("response_flags", entry.flags.to_string());
    let cluster = entry.upstream_cluster.map_or_else(|| "-".to_owned(), |c| c.to_string());
    put("upstream_cluster", cluster.clone());
    put("upstream_cluster.name", cluster);
    if failed {
        put("error", "true".to_owned());
    }
    if let Some(peer) = entry.downstream_remote {
        put("peer.address", peer.ip().to_string());
    }
    if let Some(upstream) = entry.upstream_host {
        put("upstream_address", upstream.to_string());
    }
    put("istio.cluster_id", place.cluster.to_owned());
    put("istio.mesh_id", workload.identity.trust_domain().to_string());
    put("istio.namespace", workload.name.namespace.to_string());
    put("istio.canonical_service", workload.canonical_service().unwrap_or(&workload.workload_name).to_owned());
    put("istio.canonical_revision", workload.canonical_revision().unwrap_or("latest").to_owned());
    for (name, tag) in &traces.tags {
        let value = match tag {
            SpanTag::Literal(value) => Some(value.to_string()),
            SpanTag::Header(header, default) => {
                let value = entry.request.as_ref().and_then(|asked| asked.headers.get(header));
                let value = value.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
                value.or_else(|| default.as_ref().map(ToString::to_string))
            }
            SpanTag::Environment(variable, default) => {
                variable.of(workload).map(Cow::into_owned).or_else(|| default.as_ref().map(ToString::to_string))
            }
            SpanTag::Template(template) => Some(template.text(entry)).filter(|text| !text.is_empty()),
        };
        if let Some(value) = value {
            all.retain(|(n, _)| **n != **name);
            all.push((Cow::Owned(name.to_string()), short(value)));
        }
    }
    all
}

impl Span {
    /// Bytes it takes in a message, about.
    pub fn size(&self) -> usize {
        let attributes = self.attributes.iter().map(|(name, value)| name.len() + value.len() + 10).sum::<usize>();
        96 + self.name.len() + self.state.len() + attributes
    }
}

/// Of `opentelemetry.proto.trace.v1.SpanFlags`.
const SAMPLED: u32 = 1;
const HAS_IS_REMOTE: u32 = 0x100;
const IS_REMOTE: u32 = 0x200;

/// Spans of one workload, as a message for a collector.
pub fn export(workload: &Workload, cluster: &str, spans: Vec<Span>) -> ExportRequest {
    let app = workload.labels.get("app").or_else(|| workload.canonical_service()).unwrap_or(&workload.workload_name);
    let namespace = &*workload.name.namespace;
    let resource = [
        ("service.name", format!("{app}.{namespace}")),
        ("k8s.cluster.name", cluster.to_owned()),
        ("k8s.namespace.name", namespace.to_owned()),
        ("k8s.pod.name", workload.name.name.to_string()),
        ("k8s.node.name", workload.node.to_string()),
        ("telemetry.sdk.language", "rust".to_owned()),
        ("telemetry.sdk.name", "mesh-node".to_owned()),
        ("telemetry.sdk.version", env!("CARGO_PKG_VERSION").to_owned()),
    ];
    let scope = Scope { name: "mesh-node".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
    ExportRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(Resource { attributes: resource.into_iter().map(|(k, v)| KeyValue::text(k, v)).collect() }),
            scope_spans: vec![ScopeSpans { scope: Some(scope), spans: spans.into_iter().map(SpanMessage::from).collect() }],
        }],
    }
}

/// `opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

/// Its answer.
#[derive(Clone, PartialEq, Message)]
pub struct ExportResponse {
    #[prost(message, optional, tag = "1")]
    pub partial_success: Option<PartialSuccess>,
}

/// What a collector did not take.
#[derive(Clone, PartialEq, Message)]
pub struct PartialSuccess {
    #[prost(int64, tag = "1")]
    pub rejected_spans: i64,
    #[prost(string, tag = "2")]
    pub error_message: String,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<SpanMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct SpanMessage {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(string, tag = "3")]
    trace_state: String,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    /// 2: server, 3: client.
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
    /// The W3C flags, and above them whether it is known where the parent is, and that it is elsewhere.
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    /// 2: error.
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Any", tags = "1")]
    value: Option<Any>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Any {
    #[prost(string, tag = "1")]
    Text(String),
}

impl KeyValue {
    fn text(key: impl Into<String>, value: String) -> Self {
        Self { key: key.into(), value: Some(AnyValue { value: Some(Any::Text(value)) }) }
    }
}

impl From<Span> for SpanMessage {
    fn from(span: Span) -> Self {
        let nanos = |t: SystemTime| t.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
        Self {
            trace_id: span.own.trace.to_be_bytes().to_vec(),
            span_id: span.own.span.to_be_bytes().to_vec(),
            trace_state: span.state,
            parent_span_id: span.parent.map(|p| p.to_be_bytes().to_vec()).unwrap_or_default(),
            name: span.name,
            kind: match span.kind {
                Kind::Server => 2,
                Kind::Client => 3,
            },
            start_time_unix_nano: nanos(span.start),
            end_time_unix_nano: nanos(span.end),
            attributes: span.attributes.into_iter().map(|(k, v)| KeyValue::text(k, v)).collect(),
            status: span.failed.then_some(Status { code: 2 }),
            // The parent is always from a header.
            flags: SAMPLED | HAS_IS_REMOTE | if span.parent.is_some() { IS_REMOTE } else { 0 },
        }
    }
}
