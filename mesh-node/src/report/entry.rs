//! A request or connection that is over, with all that a log may want of it.

use std::{
    borrow::Cow,
    fmt,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    attributes::{Attribute, Attributes, HeadersOf},
    expression::Value,
    kept::Kept,
    peer::End,
    plain::push_number,
    trace::Parent,
};
use crate::{
    id::{ObjectName, SpiffeId},
    route::Workload,
};

/// Everything a line is made of. What does not exist is none.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    pub start: SystemTime,
    pub duration: Duration,
    pub request: Option<Asked<'a>>,
    pub protocol: Option<&'static str>,
    /// 0 when there was no response.
    pub code: u16,
    pub grpc_status: Option<u32>,
    /// That is what an answer said, and not what its HTTP status means.
    pub grpc_said: bool,
    pub flags: Cow<'a, str>,
    /// By their long names.
    pub flags_long: Cow<'a, str>,
    /// Envoy's bits for them.
    pub flag_bits: i64,
    pub details: Option<&'a str>,
    pub termination_details: Option<&'a str>,
    pub transport_failure: Option<&'a str>,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    /// Time the upstream took to answer, milliseconds.
    pub service_time: Option<u64>,
    /// From the beginning until the last of a request had come, and until the last of it had gone on.
    pub received_after: Option<Duration>,
    pub sent_after: Option<Duration>,
    /// From the beginning to the first of an answer.
    pub answered_after: Option<Duration>,
    pub attempts: u32,
    pub upstream_protocol: Option<&'a str>,
    /// One request, and not a connection.
    pub tells_a_request: bool,
    pub upstream_host: Option<SocketAddr>,
    pub upstream_cluster: Option<ClusterName<'a>>,
    pub upstream_local: Option<SocketAddr>,
    pub downstream_local: Option<SocketAddr>,
    pub downstream_remote: Option<SocketAddr>,
    pub sni: Option<&'a str>,
    pub route: Option<&'a str>,
    pub response_headers: Option<&'a Kept>,
    pub response_trailers: Option<&'a HeaderMap>,
    pub mutual_tls: bool,
    /// The trace it belongs to, and its span there.
    pub trace: Option<Parent>,
    /// The other end and this one.
    pub peer: Option<&'a SpiffeId>,
    pub local: Option<&'a SpiffeId>,
    /// The pod that tells it.
    pub teller: Option<&'a Workload>,
    /// The workload at the other end, and which that is, where somebody asks about it.
    pub other: Option<(End, &'a Workload)>,
    /// The cluster both are in.
    pub cluster: &'a str,
}

/// What a request asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub method: &'a str,
    /// With its query, as the client sent it; empty where there is none.
    pub path: &'a str,
    /// The same as it went on.
    pub sent_path: &'a str,
    pub authority: &'a str,
    pub scheme: &'static str,
    pub headers: &'a Kept,
}

/// What Envoy would call the cluster that was asked.
#[derive(Debug, Clone, Copy)]
pub enum ClusterName<'a> {
    Outbound {
        service: &'a ObjectName,
        port: u16,
        subset: &'a str,
    },
    /// The port of the pod.
    Inbound(u16),
    Named(&'static str),
}

impl ClusterName<'_> {
    /// Behind a text; names by `push`.
    pub(super) fn push(&self, line: &mut Vec<u8>, push: impl Fn(&[u8], &mut Vec<u8>)) {
        match self {
            Self::Outbound { service, port, subset } => {
                line.extend_from_slice(b"outbound|");
                push_number((*port).into(), line);
                line.push(b'|');
                push(subset.as_bytes(), line);
                line.push(b'|');
                push(service.name.as_bytes(), line);
                line.push(b'.');
                push(service.namespace.as_bytes(), line);
                line.extend_from_slice(b".svc.cluster.local");
            }
            Self::Inbound(port) => {
                line.extend_from_slice(b"inbound|");
                push_number((*port).into(), line);
                line.extend_from_slice(b"||");
            }
            Self::Named(name) => line.extend_from_slice(name.as_bytes()),
        }
    }
}

impl fmt::Display for ClusterName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Vec::new();
        self.push(&mut text, |part, text| text.extend_from_slice(part));
        f.write_str(&String::from_utf8_lossy(&text))
    }
}

/// The header that says which host a request named before it was given another.
pub static ORIGINAL_HOST: HeaderName = HeaderName::from_static("x-envoy-original-host");
/// The header that names a request.
pub static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A header, found once by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header {
    Method,
    Path,
    Authority,
    Scheme,
    /// Of an answer.
    Status,
    Named(HeaderName),
}

impl Header {
    /// By its name in any case; none of what is no name of a header.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":authority" | "host" => Self::Authority,
            ":scheme" => Self::Scheme,
            ":status" => Self::Status,
            other => Self::Named(other.parse().ok()?),
        })
    }
}

/// As text. Most is ASCII, for which the standard library's own takes a multiple of the time.
fn lossy(bytes: &[u8]) -> Cow<'_, str> {
    std::str::from_utf8(bytes).map_or_else(|_| String::from_utf8_lossy(bytes), Cow::Borrowed)
}

impl Entry<'_> {
    /// One of a request that nothing is known of but that it has begun.
    pub fn begun(start: SystemTime) -> Self {
        Self {
            start,
            duration: Duration::ZERO,
            request: None,
            protocol: None,
            code: 0,
            grpc_status: None,
            grpc_said: false,
            flags: Cow::Borrowed("-"),
            flags_long: Cow::Borrowed("-"),
            flag_bits: 0,
            details: None,
            termination_details: None,
            transport_failure: None,
            bytes_received: 0,
            bytes_sent: 0,
            service_time: None,
            received_after: None,
            sent_after: None,
            answered_after: None,
            attempts: 0,
            upstream_protocol: None,
            tells_a_request: true,
            upstream_host: None,
            upstream_cluster: None,
            upstream_local: None,
            downstream_local: None,
            downstream_remote: None,
            sni: None,
            route: None,
            response_headers: None,
            response_trailers: None,
            mutual_tls: false,
            trace: None,
            peer: None,
            local: None,
            teller: None,
            other: None,
            cluster: "",
        }
    }

    /// A header's value.
    pub fn header_of(&self, whose: HeadersOf, header: &Header) -> Option<&[u8]> {
        if whose != HeadersOf::Request {
            let Header::Named(name) = header else { return None };
            let value = if whose == HeadersOf::Response { self.response_headers?.get(name) } else { self.response_trailers?.get(name) };
            return value.map(HeaderValue::as_bytes);
        }
        let asked = self.request.as_ref()?;
        match header {
            Header::Method => Some(asked.method.as_bytes()),
            Header::Path => Some(asked.sent_path.as_bytes()).filter(|p| !p.is_empty()),
            Header::Authority => Some(asked.authority.as_bytes()).filter(|a| !a.is_empty()),
            Header::Scheme => Some(asked.scheme.as_bytes()),
            Header::Status => None,
            Header::Named(name) => asked.headers.get(name).map(HeaderValue::as_bytes),
        }
    }

    fn peer_at(&self, end: End) -> Option<&Workload> {
        self.other.filter(|(e, _)| *e == end).map(|(_, peer)| peer)
    }

    fn request_header(&self, name: &str) -> Option<Cow<'_, str>> {
        self.header_of(HeadersOf::Request, &Header::named(name)?).map(lossy)
    }
}

impl Attributes for Entry<'_> {
    fn attribute(&self, attribute: Attribute) -> Option<Value<'_>> {
        let text = |t: &'static str| self.request_header(t).map(Value::Text);
        let path = || self.request.map(|r| r.sent_path);
        let plain = |t: Option<&'_ str>| t.map(|t| Value::Text(Cow::Owned(t.to_owned())));
        let shown = |d: Option<&dyn fmt::Display>| d.map(|d| Value::Text(Cow::Owned(d.to_string())));
        let ip = |a: Option<SocketAddr>| a.map(|a| Value::Text(Cow::Owned(a.to_string())));
        let port = |a: Option<SocketAddr>| a.map(|a| Value::Int(i64::from(a.port())));
        let size = |n: u64| Some(Value::Int(i64::try_from(n).unwrap_or(i64::MAX)));
        match attribute {
            Attribute::RequestPath => text(":path"),
            Attribute::RequestUrlPath => plain(path().map(|p| p.split('?').next().unwrap_or(p))),
            Attribute::RequestQuery => plain(path().map(|p| p.split_once('?').map_or("", |(_, q)| q))),
            Attribute::RequestHost => text(":authority"),
            Attribute::RequestScheme => text(":scheme"),
            Attribute::RequestMethod => text(":method"),
            Attribute::RequestReferer | Attribute::RequestUseragent | Attribute::RequestId => text(attribute.request_header()?),
            Attribute::RequestProtocol => plain(self.protocol),
            Attribute::RequestSize => size(self.bytes_received),
            Attribute::RequestDuration => i64::try_from(self.duration.as_nanos()).ok().map(Value::Duration),
            Attribute::RequestTime => Some(Value::Time(self.start.into())),
            Attribute::ResponseCode => (self.code != 0).then_some(Value::Int(i64::from(self.code))),
            Attribute::ResponseCodeDetails => plain(self.details.filter(|d| !d.is_empty())),
            Attribute::ResponseFlags => Some(Value::Int(self.flag_bits)),
            Attribute::ResponseGrpcStatus => self.grpc_status.map(|s| Value::Int(i64::from(s))),
            Attribute::ResponseSize => size(self.bytes_sent),
            Attribute::SourceAddress => ip(self.downstream_remote),
            Attribute::SourcePort => port(self.downstream_remote),
            Attribute::DestinationAddress => ip(self.downstream_local),
            Attribute::DestinationPort => port(self.downstream_local),
            Attribute::ConnectionMtls => Some(Value::Bool(self.mutual_tls)),
            Attribute::ConnectionSni => plain(self.sni),
            Attribute::ConnectionPeer => shown(self.peer.map(|p| p as &dyn fmt::Display)),
            Attribute::ConnectionLocal => shown(self.local.map(|p| p as &dyn fmt::Display)),
            Attribute::UpstreamAddress => ip(self.upstream_host),
            Attribute::UpstreamPort => port(self.upstream_host),
            Attribute::ClusterName => shown(self.upstream_cluster.as_ref().map(|c| c as &dyn fmt::Display)),
            Attribute::UpstreamLocalAddress => ip(self.upstream_local),
            Attribute::UpstreamAttempts => self.tells_a_request.then_some(Value::Int(self.attempts.into())),
            Attribute::UpstreamTransportFailure => plain(self.transport_failure),
            Attribute::ConnectionTermination => plain(self.termination_details),
            Attribute::ConnectionTlsVersion => plain(self.mutual_tls.then_some("TLSv1.3")),
            // Envoy's numbers: of connections that were let in, and that were made.
            Attribute::ListenerDirection => {
                Some(Value::Int(if matches!(self.upstream_cluster, Some(ClusterName::Inbound(_))) { 1 } else { 2 }))
            }
            Attribute::Peer(end, fact) => self.peer_at(end).and_then(|peer| fact.of(peer, self.cluster)).map(Value::Text),
            Attribute::Own(variable) => self.teller.and_then(|pod| variable.of(pod)).map(Value::Text),
            Attribute::NodeId => self.teller.map(|pod| {
                let (ip, name, namespace) =
                    (pod.ips.first().map(ToString::to_string).unwrap_or_default(), &pod.name.name, &pod.name.namespace);
                Value::Text(format!("sidecar~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local").into())
            }),
            Attribute::Nothing => None,
            Attribute::RouteName => plain(self.route),
        }
    }

    /// All of that name, as one list.
    fn header(&self, whose: HeadersOf, name: &str) -> Option<Cow<'_, str>> {
        let header = Header::named(name)?;
        let first = lossy(self.header_of(whose, &header)?);
        let Header::Named(name) = &header else { return Some(first) };
        let kept = match whose {
            HeadersOf::Request => self.request.as_ref()?.headers,
            HeadersOf::Response => self.response_headers?,
            HeadersOf::Trailers => return Some(joined(first, self.response_trailers?.get_all(name).iter())),
        };
        Some(joined(first, kept.all(name)))
    }

    fn label(&self, of: End, name: &str) -> Option<&str> {
        self.peer_at(of)?.labels.get(name)
    }

    fn names(&self, whose: HeadersOf) -> Vec<String> {
        match whose {
            HeadersOf::Request => {
                let pseudo = [":method", ":path", ":authority", ":scheme"].map(str::to_owned);
                self.request.map_or_else(Vec::new, |asked| pseudo.into_iter().chain(asked.headers.names()).collect())
            }
            HeadersOf::Response => self.response_headers.map_or_else(Vec::new, |kept| kept.names().collect()),
            HeadersOf::Trailers => self.response_trailers.map_or_else(Vec::new, |all| all.keys().map(ToString::to_string).collect()),
        }
    }
}

/// The values of headers of one name as one list; `first`: the first of them.
fn joined<'v>(first: Cow<'v, str>, all: impl Iterator<Item = &'v HeaderValue>) -> Cow<'v, str> {
    let mut more = all.skip(1).map(|value| lossy(value.as_bytes())).peekable();
    if more.peek().is_none() {
        return first;
    }
    more.fold(first.into_owned(), |all, value| all + "," + &value).into()
}
