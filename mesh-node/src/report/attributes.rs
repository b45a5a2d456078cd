//! Attributes of a request or connection, by Envoy's names: what expressions and formats of logs are made of.

use std::borrow::Cow;

use super::{
    environment::Variable,
    expression::Value,
    peer::{End, Fact},
};

/// What can be asked of a request or connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attribute {
    RequestPath,
    RequestUrlPath,
    RequestQuery,
    RequestHost,
    RequestScheme,
    RequestMethod,
    RequestReferer,
    RequestUseragent,
    RequestId,
    RequestProtocol,
    RequestSize,
    RequestDuration,
    /// When it began.
    RequestTime,
    ResponseCode,
    ResponseCodeDetails,
    ResponseFlags,
    ResponseGrpcStatus,
    ResponseSize,
    SourceAddress,
    SourcePort,
    DestinationAddress,
    DestinationPort,
    ConnectionMtls,
    ConnectionSni,
    ConnectionPeer,
    ConnectionLocal,
    UpstreamAddress,
    UpstreamPort,
    UpstreamLocalAddress,
    UpstreamAttempts,
    UpstreamTransportFailure,
    ConnectionTermination,
    ConnectionTlsVersion,
    ClusterName,
    RouteName,
    ListenerDirection,
    /// One of the workload at an end.
    Peer(End, Fact),
    /// One of Istio's for the pod itself.
    Own(Variable),
    /// What Istio's proxies are called.
    NodeId,
    /// One of Envoy's that nothing is known of here: it has no value, as it often has none there.
    Nothing,
}

/// Whose headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadersOf {
    Request,
    Response,
    /// What comes behind an answer's body.
    Trailers,
}

const ALL: [(&str, &str, Attribute); 49] = [
    ("request", "path", Attribute::RequestPath),
    ("request", "url_path", Attribute::RequestUrlPath),
    ("request", "query", Attribute::RequestQuery),
    ("request", "host", Attribute::RequestHost),
    ("request", "scheme", Attribute::RequestScheme),
    ("request", "method", Attribute::RequestMethod),
    ("request", "referer", Attribute::RequestReferer),
    ("request", "useragent", Attribute::RequestUseragent),
    ("request", "id", Attribute::RequestId),
    ("request", "protocol", Attribute::RequestProtocol),
    ("request", "size", Attribute::RequestSize),
    ("request", "total_size", Attribute::RequestSize),
    ("request", "duration", Attribute::RequestDuration),
    ("request", "time", Attribute::RequestTime),
    ("response", "code", Attribute::ResponseCode),
    ("response", "code_details", Attribute::ResponseCodeDetails),
    ("response", "flags", Attribute::ResponseFlags),
    ("response", "grpc_status", Attribute::ResponseGrpcStatus),
    ("response", "size", Attribute::ResponseSize),
    ("response", "total_size", Attribute::ResponseSize),
    ("source", "address", Attribute::SourceAddress),
    ("source", "port", Attribute::SourcePort),
    ("destination", "address", Attribute::DestinationAddress),
    ("destination", "port", Attribute::DestinationPort),
    ("connection", "mtls", Attribute::ConnectionMtls),
    ("connection", "requested_server_name", Attribute::ConnectionSni),
    ("connection", "uri_san_peer_certificate", Attribute::ConnectionPeer),
    ("connection", "uri_san_local_certificate", Attribute::ConnectionLocal),
    ("upstream", "address", Attribute::UpstreamAddress),
    ("upstream", "port", Attribute::UpstreamPort),
    ("xds", "cluster_name", Attribute::ClusterName),
    ("xds", "route_name", Attribute::RouteName),
    ("upstream", "local_address", Attribute::UpstreamLocalAddress),
    ("upstream", "request_attempt_count", Attribute::UpstreamAttempts),
    ("upstream", "transport_failure_reason", Attribute::UpstreamTransportFailure),
    ("connection", "termination_details", Attribute::ConnectionTermination),
    ("connection", "tls_version", Attribute::ConnectionTlsVersion),
    ("xds", "listener_direction", Attribute::ListenerDirection),
    ("response", "backend_latency", Attribute::Nothing),
    ("connection", "id", Attribute::Nothing),
    ("connection", "transport_failure_reason", Attribute::Nothing),
    ("connection", "subject_local_certificate", Attribute::Nothing),
    ("connection", "subject_peer_certificate", Attribute::Nothing),
    ("connection", "dns_san_local_certificate", Attribute::Nothing),
    ("connection", "dns_san_peer_certificate", Attribute::Nothing),
    ("connection", "sha256_peer_certificate_digest", Attribute::Nothing),
    ("upstream", "tls_version", Attribute::Nothing),
    ("upstream", "uri_san_peer_certificate", Attribute::Nothing),
    ("xds", "virtual_host_name", Attribute::Nothing),
];

impl Attribute {
    pub(super) fn named(root: &str, member: &str) -> Option<Self> {
        ALL.iter().find(|(r, m, _)| *r == root && *m == member).map(|(.., attribute)| *attribute)
    }

    /// The request header it is, for those that are one.
    pub(super) const fn request_header(self) -> Option<&'static str> {
        match self {
            Self::RequestReferer => Some("referer"),
            Self::RequestUseragent => Some("user-agent"),
            Self::RequestId => Some("x-request-id"),
            _ => None,
        }
    }

    /// The names there are.
    pub(super) fn known() -> String {
        let names = ALL.iter().map(|(root, member, _)| format!("{root}.{member}"));
        names.chain(["request.headers", "response.headers", "response.trailers"].map(str::to_owned)).collect::<Vec<_>>().join(", ")
    }
}

impl HeadersOf {
    pub(super) fn named(root: &str, member: &str) -> Option<Self> {
        match (root, member) {
            ("request", "headers") => Some(Self::Request),
            ("response", "headers") => Some(Self::Response),
            ("response", "trailers") => Some(Self::Trailers),
            _ => None,
        }
    }
}

/// Who knows them.
pub trait Attributes {
    /// Its value; none when there is none.
    fn attribute(&self, attribute: Attribute) -> Option<Value<'_>>;

    /// A header, by its name in lower case. The pseudo-headers `:method`, `:path`, `:authority` and `:scheme` are among them.
    fn header(&self, whose: HeadersOf, name: &str) -> Option<Cow<'_, str>>;

    /// A label of the workload at an end.
    fn label(&self, of: End, name: &str) -> Option<&str>;

    /// The names of the headers there are, in lower case.
    fn names(&self, whose: HeadersOf) -> Vec<String>;
}
