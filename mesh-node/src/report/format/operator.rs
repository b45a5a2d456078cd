//! Envoy's command operators, as far as they mean something here: `%NAME%`, `%NAME(ARGUMENT)%`, `%NAME(ARGUMENT):LENGTH%`.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    time::SystemTime,
};

use super::{Entry, Program, Step};
use crate::report::{
    attributes::HeadersOf,
    entry::{ClusterName, Header},
    kept::Asks,
    plain::rfc3339,
};

/// What stands for something of the request or connection. Small: a line goes through many of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operator {
    what: What,
    /// Most characters of a text.
    most: Option<NonZeroU16>,
}

/// A header, or another if it is not there.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    whose: HeadersOf,
    name: Header,
    other: Option<Header>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plain {
    StartTime,
    Protocol,
    ResponseCode,
    ResponseCodeDetails,
    ResponseFlags,
    ConnectionTerminationDetails,
    UpstreamTransportFailureReason,
    BytesReceived,
    BytesSent,
    Duration,
    UpstreamHost,
    UpstreamCluster,
    UpstreamLocalAddress,
    UpstreamRemoteAddressWithoutPort,
    DownstreamLocalAddress,
    DownstreamLocalAddressWithoutPort,
    DownstreamLocalPort,
    DownstreamRemoteAddress,
    DownstreamRemoteAddressWithoutPort,
    DownstreamRemotePort,
    RequestedServerName,
    RouteName,
    GrpcStatusNumber,
    GrpcStatus,
    PeerUriSan,
    LocalUriSan,
    TraceId,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Plain(Plain),
    /// One of the program's headers.
    Header(u16),
    /// A response header that is known without them.
    ServiceTime,
}

/// What an operator is worth.
pub enum Operand<'a> {
    Number(u64),
    Text(Cow<'a, str>),
    /// What is written without being put together first.
    Shown(&'a dyn fmt::Display),
    Cluster(ClusterName<'a>),
    Address(SocketAddr),
    Ip(IpAddr),
    Time(SystemTime),
}

impl Operand<'_> {
    /// As a text of its own.
    fn text(&self) -> String {
        match self {
            Self::Number(n) => n.to_string(),
            Self::Text(text) => text.to_string(),
            Self::Shown(what) => what.to_string(),
            Self::Cluster(cluster) => cluster.to_string(),
            Self::Address(address) => address.to_string(),
            Self::Ip(ip) => ip.to_string(),
            Self::Time(time) => rfc3339(*time),
        }
    }
}

const ALL: [(&str, Plain); 31] = [
    ("START_TIME", Plain::StartTime),
    ("PROTOCOL", Plain::Protocol),
    ("RESPONSE_CODE", Plain::ResponseCode),
    ("RESPONSE_CODE_DETAILS", Plain::ResponseCodeDetails),
    ("RESPONSE_FLAGS", Plain::ResponseFlags),
    ("CONNECTION_TERMINATION_DETAILS", Plain::ConnectionTerminationDetails),
    ("UPSTREAM_TRANSPORT_FAILURE_REASON", Plain::UpstreamTransportFailureReason),
    ("BYTES_RECEIVED", Plain::BytesReceived),
    ("BYTES_SENT", Plain::BytesSent),
    ("DURATION", Plain::Duration),
    ("UPSTREAM_HOST", Plain::UpstreamHost),
    ("UPSTREAM_REMOTE_ADDRESS", Plain::UpstreamHost),
    ("UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", Plain::UpstreamRemoteAddressWithoutPort),
    ("UPSTREAM_CLUSTER", Plain::UpstreamCluster),
    ("UPSTREAM_CLUSTER_RAW", Plain::UpstreamCluster),
    ("UPSTREAM_LOCAL_ADDRESS", Plain::UpstreamLocalAddress),
    ("DOWNSTREAM_LOCAL_ADDRESS", Plain::DownstreamLocalAddress),
    ("DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", Plain::DownstreamLocalAddressWithoutPort),
    ("DOWNSTREAM_LOCAL_PORT", Plain::DownstreamLocalPort),
    ("DOWNSTREAM_REMOTE_ADDRESS", Plain::DownstreamRemoteAddress),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS", Plain::DownstreamRemoteAddress),
    ("DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", Plain::DownstreamRemoteAddressWithoutPort),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT", Plain::DownstreamRemoteAddressWithoutPort),
    ("DOWNSTREAM_REMOTE_PORT", Plain::DownstreamRemotePort),
    ("REQUESTED_SERVER_NAME", Plain::RequestedServerName),
    ("ROUTE_NAME", Plain::RouteName),
    ("GRPC_STATUS_NUMBER", Plain::GrpcStatusNumber),
    ("GRPC_STATUS", Plain::GrpcStatus),
    ("DOWNSTREAM_PEER_URI_SAN", Plain::PeerUriSan),
    ("DOWNSTREAM_LOCAL_URI_SAN", Plain::LocalUriSan),
    ("TRACE_ID", Plain::TraceId),
];

/// Reads a format, and adds its steps.
pub(super) fn parse(format: &str, program: &mut Program) -> Result<(), String> {
    let mut text = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            text.push('%');
            rest = after;
            continue;
        }
        let end = end_of_operator(rest).ok_or_else(|| format!("has an operator without its closing %: %{rest}"))?;
        program.add_text(&std::mem::take(&mut text))?;
        let operator = operator(&rest[..end], program)?;
        program.steps.push(Step::Value(operator));
        rest = &rest[end + 1..];
    }
    text.push_str(rest);
    program.add_text(&text)
}

/// Where the closing % is: one in an argument is part of it.
fn end_of_operator(text: &str) -> Option<usize> {
    match (text.find('%'), text.find('(')) {
        (Some(end), Some(open)) if open < end => {
            let close = open + text[open..].find(')')?;
            Some(close + text[close..].find('%')?)
        }
        (end, _) => end,
    }
}

fn operator(text: &str, program: &mut Program) -> Result<Operator, String> {
    let (name, argument, most) = parts(text)?;
    if let Some((_, plain)) = ALL.iter().find(|(n, _)| *n == name) {
        if argument.is_some() && *plain != Plain::StartTime {
            return Err(format!("%{text}% has an argument that {name} does not take"));
        }
        if argument.is_some_and(|a| !a.is_empty()) {
            return Err(format!("%{text}% has a format of time; mesh-node writes RFC 3339 with milliseconds, leave the format out"));
        }
        return Ok(Operator { what: What::Plain(*plain), most });
    }
    let whose = match name {
        "REQ" => HeadersOf::Request,
        "RESP" => HeadersOf::Response,
        _ => return Err(format!("%{text}% is not an operator known here; known are REQ, RESP and {}", ALL.map(|(n, _)| n).join(", "))),
    };
    let names = argument.filter(|a| !a.is_empty()).ok_or_else(|| format!("%{text}% names no header"))?;
    let (first, other) = names.split_once('?').map_or((names, None), |(first, other)| (first, Some(other)));
    let header = |name: &str| Header::named(name).ok_or_else(|| format!("%{text}%: {name:?} is not the name of a header"));
    if whose == HeadersOf::Response && first.eq_ignore_ascii_case(SERVICE_TIME) {
        return Ok(Operator { what: What::ServiceTime, most });
    }
    let number = u16::try_from(program.headers.len()).map_err(|_| "names too many headers".to_owned())?;
    program.headers.push(Named { whose, name: header(first)?, other: other.map(header).transpose()? });
    Ok(Operator { what: What::Header(number), most })
}

fn parts(text: &str) -> Result<(&str, Option<&str>, Option<NonZeroU16>), String> {
    let (head, most) = match text.rsplit_once(':') {
        Some((head, length)) if head.ends_with(')') || !head.contains('(') => {
            let length: usize = length.parse().map_err(|_| format!("%{text}% has a length that is not a number"))?;
            let length = u16::try_from(length).unwrap_or(u16::MAX);
            (head, Some(NonZeroU16::new(length).ok_or_else(|| format!("%{text}% leaves nothing of the value"))?))
        }
        _ => (text, None),
    };
    match head.split_once('(') {
        None => Ok((head, None, most)),
        Some((name, argument)) => {
            let argument = argument.strip_suffix(')').ok_or_else(|| format!("%{text}% has no closing parenthesis"))?;
            Ok((name, Some(argument), most))
        }
    }
}

impl Named {
    pub(super) fn asks(&self, all: &mut Asks) {
        std::iter::once(&self.name).chain(&self.other).for_each(|header| all.for_one(self.whose, header));
    }
}

impl Operator {
    #[inline]
    pub(super) fn value<'e>(self, entry: &'e Entry<'_>, headers: &[Named]) -> Option<Operand<'e>> {
        let value = match self.what {
            What::Plain(plain) => plain.value(entry),
            // A header's value is a text.
            What::ServiceTime => entry.service_time.map(|t| Operand::Text(Cow::Owned(t.to_string()))),
            What::Header(number) => {
                let Named { whose, name, other } = headers.get(usize::from(number))?;
                let found = entry.header_of(*whose, name).or_else(|| entry.header_of(*whose, other.as_ref()?));
                found.map(Operand::Text)
            }
        }?;
        Some(match (value, self.most) {
            (value, None) | (value @ Operand::Number(_), _) => value,
            (value, Some(most)) => Operand::Text(Cow::Owned(value.text().chars().take(most.get().into()).collect())),
        })
    }
}

const SERVICE_TIME: &str = "x-envoy-upstream-service-time";

impl Plain {
    #[inline]
    fn value<'e>(self, entry: &'e Entry<'_>) -> Option<Operand<'e>> {
        let text = |t: Option<&'e str>| t.filter(|t| !t.is_empty()).map(|t| Operand::Text(Cow::Borrowed(t)));
        let address = |a: Option<SocketAddr>| a.map(Operand::Address);
        let ip = |a: Option<SocketAddr>| a.map(|a| Operand::Ip(a.ip()));
        let port = |a: Option<SocketAddr>| a.map(|a| Operand::Number(a.port().into()));
        let number = |n: u64| Some(Operand::Number(n));
        match self {
            Self::StartTime => Some(Operand::Time(entry.start)),
            Self::Protocol => text(entry.protocol),
            Self::ResponseCode => number(entry.code.into()),
            Self::ResponseCodeDetails => text(entry.details),
            Self::ResponseFlags => text(Some(&entry.flags)),
            Self::ConnectionTerminationDetails => text(entry.termination_details),
            Self::UpstreamTransportFailureReason => text(entry.transport_failure),
            Self::BytesReceived => number(entry.bytes_received),
            Self::BytesSent => number(entry.bytes_sent),
            Self::Duration => number(u64::try_from(entry.duration.as_millis()).unwrap_or(u64::MAX)),
            Self::UpstreamHost => address(entry.upstream_host),
            Self::UpstreamRemoteAddressWithoutPort => ip(entry.upstream_host),
            Self::UpstreamCluster => entry.upstream_cluster.map(Operand::Cluster),
            Self::UpstreamLocalAddress => address(entry.upstream_local),
            Self::DownstreamLocalAddress => address(entry.downstream_local),
            Self::DownstreamLocalAddressWithoutPort => ip(entry.downstream_local),
            Self::DownstreamLocalPort => port(entry.downstream_local),
            Self::DownstreamRemoteAddress => address(entry.downstream_remote),
            Self::DownstreamRemoteAddressWithoutPort => ip(entry.downstream_remote),
            Self::DownstreamRemotePort => port(entry.downstream_remote),
            Self::RequestedServerName => text(entry.sni),
            Self::RouteName => text(entry.route),
            Self::GrpcStatusNumber => entry.grpc_status.map(|s| Operand::Number(s.into())),
            Self::GrpcStatus => entry.grpc_status.map(|s| Operand::Text(Cow::Borrowed(grpc_status_name(s)))),
            Self::PeerUriSan => entry.peer.map(|p| Operand::Shown(p)),
            Self::LocalUriSan => entry.local.map(|p| Operand::Shown(p)),
            Self::TraceId => entry.trace.map(|trace| Operand::Text(Cow::Owned(format!("{trace:032x}")))),
        }
    }
}

/// The gRPC project's names of its status codes.
fn grpc_status_name(status: u32) -> &'static str {
    const NAMES: [&str; 17] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    usize::try_from(status).ok().and_then(|s| NAMES.get(s)).copied().unwrap_or("InvalidCode")
}
