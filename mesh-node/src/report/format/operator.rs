//! Envoy's command operators, as far as they mean something here: `%NAME%`, `%NAME(ARGUMENT)%`, `%NAME(ARGUMENT):LENGTH%`.

pub(super) mod grpc;
mod named;
mod nothing;
mod values;

use std::{net::SocketAddr, num::NonZeroU16, time::Duration};

use self::named::{ServerName, identity, net};
use self::nothing::{NOTHING, WITH_ARGUMENTS};
use self::values::Cut;
pub use self::values::Values;
use super::{Entry, Program, Then, time::TimeFormat};
use crate::{
    report::{
        attributes::HeadersOf,
        entry::{Asked, Header, ORIGINAL_HOST},
        environment::Variable,
        expression::Expression,
        kept::Asks,
        plain,
    },
    route::request::decoded_parameter,
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
enum What {
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
    GrpcStatusSnake,
    PeerUriSan,
    LocalUriSan,
    TraceId,
    SpanId,
    AccessLogType,
    EmitTime,
    DownstreamTlsVersion,
    UpstreamLocalAddressWithoutPort,
    UpstreamLocalPort,
    UpstreamRemotePort,
    UpstreamProtocol,
    UpstreamRequestAttemptCount,
    ResponseFlagsLong,
    /// The code of an answer, as the text its pseudo-header is.
    Status,
    /// The server's name, or the host a request names: the one before the other, if there is another.
    ServerName(ServerName),
    /// The network of so many bits that an address is in.
    NetOf {
        remote: bool,
        bits: u8,
    },
    RequestDuration,
    RequestTxDuration,
    ResponseDuration,
    ResponseTxDuration,
    /// As the client sent it.
    Path,
    PathWithoutQuery,
    /// The same, if it went on otherwise.
    OriginalPath,
    OriginalPathWithoutQuery,
    /// As it went on.
    SentPath,
    SentPathWithoutQuery,
    Nothing,
    Environment(Variable),
    /// The value of one of the program's query parameters.
    QueryParameter(u16),
    /// When it began, or when it is told, in one of the program's formats.
    Time {
        began: bool,
        format: u16,
    },
    /// One of the program's headers.
    Header(u16),
    /// The same, up to where its query begins.
    HeaderWithoutQuery(u16),
    /// One of the program's expressions.
    Expression(u16),
    /// A response header that is known without them.
    ServiceTime,
}

/// Those of [`ALL`] whose argument changes nothing here.
const EITHER_WAY: [(&str, &str); 1] = [("RESPONSE_CODE_DETAILS", "ALLOW_WHITESPACES")];

const ALL: [(&str, What); 53] = [
    ("START_TIME", What::StartTime),
    ("PROTOCOL", What::Protocol),
    ("RESPONSE_CODE", What::ResponseCode),
    ("RESPONSE_CODE_DETAILS", What::ResponseCodeDetails),
    ("RESPONSE_FLAGS", What::ResponseFlags),
    ("CONNECTION_TERMINATION_DETAILS", What::ConnectionTerminationDetails),
    ("UPSTREAM_TRANSPORT_FAILURE_REASON", What::UpstreamTransportFailureReason),
    ("BYTES_RECEIVED", What::BytesReceived),
    ("BYTES_SENT", What::BytesSent),
    ("DURATION", What::Duration),
    ("UPSTREAM_HOST", What::UpstreamHost),
    ("UPSTREAM_REMOTE_ADDRESS", What::UpstreamHost),
    ("UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", What::UpstreamRemoteAddressWithoutPort),
    ("UPSTREAM_CLUSTER", What::UpstreamCluster),
    ("UPSTREAM_CLUSTER_RAW", What::UpstreamCluster),
    ("UPSTREAM_LOCAL_ADDRESS", What::UpstreamLocalAddress),
    ("DOWNSTREAM_LOCAL_ADDRESS", What::DownstreamLocalAddress),
    ("DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", What::DownstreamLocalAddressWithoutPort),
    ("DOWNSTREAM_LOCAL_PORT", What::DownstreamLocalPort),
    ("DOWNSTREAM_REMOTE_ADDRESS", What::DownstreamRemoteAddress),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS", What::DownstreamRemoteAddress),
    ("DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", What::DownstreamRemoteAddressWithoutPort),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT", What::DownstreamRemoteAddressWithoutPort),
    ("DOWNSTREAM_REMOTE_PORT", What::DownstreamRemotePort),
    ("REQUESTED_SERVER_NAME", What::RequestedServerName),
    ("ROUTE_NAME", What::RouteName),
    ("GRPC_STATUS_NUMBER", What::GrpcStatusNumber),
    ("GRPC_STATUS", What::GrpcStatus),
    ("DOWNSTREAM_PEER_URI_SAN", What::PeerUriSan),
    ("DOWNSTREAM_LOCAL_URI_SAN", What::LocalUriSan),
    ("TRACE_ID", What::TraceId),
    ("SPAN_ID", What::SpanId),
    ("ACCESS_LOG_TYPE", What::AccessLogType),
    ("EMIT_TIME", What::EmitTime),
    ("DOWNSTREAM_DIRECT_LOCAL_ADDRESS", What::DownstreamLocalAddress),
    ("DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT", What::DownstreamLocalAddressWithoutPort),
    ("DOWNSTREAM_DIRECT_LOCAL_PORT", What::DownstreamLocalPort),
    ("DOWNSTREAM_DIRECT_REMOTE_PORT", What::DownstreamRemotePort),
    ("DOWNSTREAM_TLS_VERSION", What::DownstreamTlsVersion),
    ("UPSTREAM_HOST_NAME", What::UpstreamHost),
    ("UPSTREAM_HOST_NAME_WITHOUT_PORT", What::UpstreamRemoteAddressWithoutPort),
    ("UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", What::UpstreamLocalAddressWithoutPort),
    ("UPSTREAM_LOCAL_PORT", What::UpstreamLocalPort),
    ("UPSTREAM_REMOTE_PORT", What::UpstreamRemotePort),
    ("UPSTREAM_PROTOCOL", What::UpstreamProtocol),
    ("UPSTREAM_REQUEST_ATTEMPT_COUNT", What::UpstreamRequestAttemptCount),
    ("RESPONSE_FLAGS_LONG", What::ResponseFlagsLong),
    ("REQUEST_DURATION", What::RequestDuration),
    ("REQUEST_TX_DURATION", What::RequestTxDuration),
    ("RESPONSE_DURATION", What::ResponseDuration),
    ("RESPONSE_TX_DURATION", What::ResponseTxDuration),
    ("PATH", What::Path),
    ("HOSTNAME", What::Environment(Variable::PodName)),
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
        let operator = operator(&rest[..end], program)?;
        program.add(&std::mem::take(&mut text), Then::Value(operator))?;
        rest = &rest[end + 1..];
    }
    text.push_str(rest);
    if text.is_empty() { Ok(()) } else { program.add(&text, Then::Nothing) }
}

/// Where the closing % is: one in an argument is part of it.
fn end_of_operator(text: &str) -> Option<usize> {
    match (text.find('%'), text.find('(')) {
        (Some(end), Some(open)) if open < end => {
            // An expression may have more of them in it.
            // Behind it there is the end, or a length before that.
            let closes = |at: &usize| text[at + 1..].trim_start_matches(|c: char| c == ':' || c.is_ascii_digit()).starts_with('%');
            let mut all = text.match_indices(')').map(|(at, _)| at);
            let close = if text.starts_with("CEL(") { all.find(closes)? } else { open + text[open..].find(')')? };
            Some(close + text[close..].find('%')?)
        }
        (end, _) => end,
    }
}

fn operator(text: &str, program: &mut Program) -> Result<Operator, String> {
    let (name, argument, most) = parts(text)?;
    let what = match (name, argument) {
        ("REQ" | "REQUEST_HEADER", argument) => header(text, argument, HeadersOf::Request, program)?,
        ("REQ_WITHOUT_QUERY", argument) => match header(text, argument, HeadersOf::Request, program)? {
            What::Header(number) => What::HeaderWithoutQuery(number),
            other => other,
        },
        ("CEL", Some(expression)) if !expression.is_empty() => {
            let expression = Expression::parse(expression).map_err(|e| format!("%{text}%: {e}"))?;
            let number = u16::try_from(program.expressions.len()).map_err(|_| "has too many expressions".to_owned())?;
            program.expressions.push(expression);
            What::Expression(number)
        }
        ("STREAM_ID", None | Some("")) => header(text, Some("x-request-id"), HeadersOf::Request, program)?,
        ("CEL", _) => return Err(format!("%{text}% has no expression")),
        ("RESP" | "RESPONSE_HEADER", argument) => header(text, argument, HeadersOf::Response, program)?,
        ("TRAILER" | "RESPONSE_TRAILER", argument) => header(text, argument, HeadersOf::Trailers, program)?,
        ("START_TIME" | "EMIT_TIME", Some(format)) if !format.is_empty() => {
            let format = TimeFormat::parse(format).map_err(|e| format!("%{text}%: {e}"))?;
            let number = u16::try_from(program.times.len()).map_err(|_| "has too many formats of time".to_owned())?;
            program.times.push(format);
            What::Time { began: name == "START_TIME", format: number }
        }
        ("ENVIRONMENT", None | Some("")) => return Err(format!("%{text}% names no variable")),
        ("ENVIRONMENT", Some(name)) => Variable::named(name).map_or(What::Nothing, What::Environment),
        ("QUERY_PARAM", Some(name)) if !name.is_empty() => {
            let number = u16::try_from(program.parameters.len()).map_err(|_| "names too many parameters".to_owned())?;
            program.parameters.push(name.into());
            What::QueryParameter(number)
        }
        ("REQUESTED_SERVER_NAME", Some(options)) if !options.is_empty() => {
            // It is to be kept.
            header(text, Some(ORIGINAL_HOST.as_str()), HeadersOf::Request, program)?;
            ServerName::named(options).map(What::ServerName).ok_or_else(|| {
                format!("%{text}%: {options:?} is none of SNI_ONLY, SNI_FIRST, HOST_FIRST, with :ORIG, :HOST or :ORIG_OR_HOST")
            })?
        }
        ("DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT", Some(bits)) if !bits.is_empty() => {
            net_of(bits, true).ok_or_else(|| format!("%{text}%: {bits:?} is no number of bits of an address"))?
        }
        ("DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT", Some(bits)) if !bits.is_empty() => {
            net_of(bits, false).ok_or_else(|| format!("%{text}%: {bits:?} is no number of bits of an address"))?
        }
        _ => plain(text, name, argument)?,
    };
    if what == What::Nothing {
        let known = NOTHING.iter().chain(&WITH_ARGUMENTS).find(|n| **n == name);
        program.unknown.extend(known.filter(|n| !program.unknown.contains(*n)));
    }
    Ok(Operator { what, most })
}

/// A network of so many bits, which an address of IPv4 may have none of.
fn net_of(bits: &str, remote: bool) -> Option<What> {
    let bits = bits.parse().ok().filter(|bits| *bits <= 128)?;
    Some(What::NetOf { remote, bits })
}

/// An operator without an argument, or with one of few.
fn plain(text: &str, name: &str, argument: Option<&str>) -> Result<What, String> {
    let argument = argument.filter(|a| !a.is_empty());
    let plain = ALL.iter().find(|(n, _)| *n == name).map(|(_, what)| *what);
    Ok(match (plain, argument) {
        (Some(What::GrpcStatus), Some("CAMEL_STRING")) => What::GrpcStatus,
        (Some(What::GrpcStatus), Some("SNAKE_STRING")) => What::GrpcStatusSnake,
        (Some(What::GrpcStatus), Some("NUMBER")) => What::GrpcStatusNumber,
        (Some(What::Path), Some(options)) => match options.split(':').find(|o| !["NQ", "WQ", "ORIG", "PATH", "ORIG_OR_PATH"].contains(o)) {
            None => match (options.starts_with("NQ"), options.rsplit(':').next()) {
                (false, Some("PATH")) => What::SentPath,
                (true, Some("PATH")) => What::SentPathWithoutQuery,
                (false, Some("ORIG")) => What::OriginalPath,
                (true, Some("ORIG")) => What::OriginalPathWithoutQuery,
                (false, _) => What::Path,
                (true, _) => What::PathWithoutQuery,
            },
            Some(other) => return Err(format!("%{text}%: {other:?} is none of NQ, WQ, ORIG, PATH, ORIG_OR_PATH")),
        },
        (Some(plain), Some(argument)) if EITHER_WAY.contains(&(name, argument)) => plain,
        (Some(plain), None) => plain,
        (Some(_), Some(_)) => return Err(format!("%{text}% has an argument that {name} does not take")),
        (None, _) if NOTHING.contains(&name) || WITH_ARGUMENTS.contains(&name) => What::Nothing,
        (None, _) => {
            let known = ALL.map(|(n, _)| n).join(", ");
            return Err(format!(
                "%{text}% is not an operator of Envoy's; those that have a value here are REQ, REQ_WITHOUT_QUERY, RESP, TRAILER, CEL and {known}"
            ));
        }
    })
}

fn header(text: &str, argument: Option<&str>, whose: HeadersOf, program: &mut Program) -> Result<What, String> {
    let names = argument.filter(|a| !a.is_empty()).ok_or_else(|| format!("%{text}% names no header"))?;
    let (first, other) = names.split_once('?').map_or((names, None), |(first, other)| (first, Some(other)));
    if whose == HeadersOf::Response && first.eq_ignore_ascii_case(":status") {
        return Ok(What::Status);
    }
    let header = |name: &str| Header::named(name).ok_or_else(|| format!("%{text}%: {name:?} is not the name of a header"));
    if whose == HeadersOf::Response && first.eq_ignore_ascii_case(SERVICE_TIME) && other.is_none() {
        return Ok(What::ServiceTime);
    }
    let number = u16::try_from(program.headers.len()).map_err(|_| "names too many headers".to_owned())?;
    program.headers.push(Named { whose, name: header(first)?, other: other.map(header).transpose()? });
    Ok(What::Header(number))
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
    pub(super) fn asks_for_identities(self) -> bool {
        matches!(self.what, What::PeerUriSan | What::LocalUriSan)
    }

    /// Writes what it stands for.
    #[inline]
    pub(super) fn tell(self, entry: &Entry<'_>, program: &Program, values: &mut impl Values) {
        match self.most {
            None => self.what.tell(entry, program, values),
            Some(most) => self.what.tell(entry, program, &mut Cut { values, most: most.get().into() }),
        }
    }
}

const SERVICE_TIME: &str = "x-envoy-upstream-service-time";

/// A value, if there is one.
macro_rules! some {
    ($values:ident, $value:expr, $put:expr) => {
        match $value {
            Some(value) => $put(value),
            None => $values.nothing(),
        }
    };
}

impl What {
    /// One jump for each: what takes a line most of its time is that a processor cannot know which step is next.
    #[inline]
    fn tell<V: Values>(self, entry: &Entry<'_>, program: &Program, values: &mut V) {
        match self {
            Self::StartTime => values.plain(|line| plain::push_time(entry.start, line)),
            Self::Protocol => text(entry.protocol, values),
            Self::ResponseCode => values.number(entry.code.into()),
            Self::ResponseCodeDetails => text(entry.details, values),
            Self::ResponseFlags => text(Some(&entry.flags), values),
            Self::ConnectionTerminationDetails => text(entry.termination_details, values),
            Self::UpstreamTransportFailureReason => text(entry.transport_failure, values),
            Self::BytesReceived => values.number(entry.bytes_received),
            Self::BytesSent => values.number(entry.bytes_sent),
            Self::Duration => millis(Some(entry.duration), values),
            Self::UpstreamHost => address(entry.upstream_host, values),
            Self::UpstreamRemoteAddressWithoutPort => ip(entry.upstream_host, values),
            Self::UpstreamCluster => some!(values, &entry.upstream_cluster, |cluster| values.cluster(cluster)),
            Self::UpstreamLocalAddress => address(entry.upstream_local, values),
            Self::DownstreamLocalAddress => address(entry.downstream_local, values),
            Self::DownstreamLocalAddressWithoutPort => ip(entry.downstream_local, values),
            Self::DownstreamLocalPort => port(entry.downstream_local, values),
            Self::DownstreamRemoteAddress => address(entry.downstream_remote, values),
            Self::DownstreamRemoteAddressWithoutPort => ip(entry.downstream_remote, values),
            Self::DownstreamRemotePort => port(entry.downstream_remote, values),
            Self::RequestedServerName => text(entry.sni, values),
            Self::RouteName => text(entry.route, values),
            Self::GrpcStatusNumber => some!(values, entry.grpc_status, |s: u32| values.number(s.into())),
            Self::GrpcStatus => some!(values, entry.grpc_status, |s| grpc::tell(s, false, values)),
            Self::GrpcStatusSnake => some!(values, entry.grpc_status, |s| grpc::tell(s, true, values)),
            Self::AccessLogType => text(Some(if entry.tells_a_request { "DownstreamEnd" } else { "TcpConnectionEnd" }), values),
            Self::EmitTime => values.plain(|line| plain::push_time(entry.start + entry.duration, line)),
            Self::DownstreamTlsVersion => text(entry.mutual_tls.then_some("TLSv1.3"), values),
            Self::UpstreamLocalAddressWithoutPort => ip(entry.upstream_local, values),
            Self::UpstreamLocalPort => port(entry.upstream_local, values),
            Self::UpstreamRemotePort => port(entry.upstream_host, values),
            Self::UpstreamProtocol => text(entry.upstream_protocol, values),
            Self::UpstreamRequestAttemptCount => values.number(entry.attempts.into()),
            Self::ResponseFlagsLong => text(Some(&entry.flags_long), values),
            Self::Status => some!(values, Some(entry.code.into()).filter(|c| *c > 0), |c| values.plain(|l| plain::push_number(c, l))),
            Self::ServerName(which) => text(which.of(entry).as_deref(), values),
            Self::NetOf { remote, bits } => {
                let address = if remote { entry.downstream_remote } else { entry.downstream_local };
                text(address.and_then(|address| net(address.ip(), bits)).as_deref(), values);
            }
            Self::RequestDuration => millis(entry.received_after, values),
            Self::RequestTxDuration => millis(entry.sent_after, values),
            Self::ResponseDuration => millis(entry.answered_after, values),
            Self::ResponseTxDuration => millis(answering(entry), values),
            Self::Path => text(entry.request.map(|r| r.path), values),
            Self::PathWithoutQuery => text(entry.request.and_then(|r| r.path.split('?').next()), values),
            Self::OriginalPath => text(entry.request.and_then(original), values),
            Self::OriginalPathWithoutQuery => text(entry.request.and_then(original).and_then(|p| p.split('?').next()), values),
            Self::SentPath => text(entry.request.map(|r| r.sent_path), values),
            Self::SentPathWithoutQuery => text(entry.request.and_then(|r| r.sent_path.split('?').next()), values),
            Self::Nothing => values.nothing(),
            Self::Environment(variable) => text(entry.teller.and_then(|pod| variable.of(pod)).as_deref(), values),
            Self::QueryParameter(number) => {
                text(program.parameters.get(usize::from(number)).and_then(|name| parameter(entry, name)).as_deref(), values);
            }
            Self::PeerUriSan => identity(entry.peer, values),
            Self::LocalUriSan => identity(entry.local, values),
            Self::TraceId => some!(values, entry.trace.map(|own| own.trace), |id| values.text(format!("{id:032x}").as_bytes())),
            Self::SpanId => some!(values, entry.trace.map(|own| own.span), |id| values.text(format!("{id:016x}").as_bytes())),
            Self::Time { began, format } => time(entry, program.times.get(usize::from(format)), began, values),
            Self::ServiceTime => some!(values, entry.service_time, |t| values.plain(|line| plain::push_number(t, line))),
            Self::Header(number) | Self::HeaderWithoutQuery(number) => {
                header_value(entry, program.headers.get(usize::from(number)), matches!(self, Self::HeaderWithoutQuery(_)), values);
            }
            Self::Expression(number) => {
                let value = program.expressions.get(usize::from(number)).and_then(|expression| expression.text(entry));
                some!(values, value, |value: String| values.text(value.as_bytes()));
            }
        }
    }
}

/// From the first of an answer to its last; none of one that did not come whole.
fn answering(entry: &Entry<'_>) -> Option<Duration> {
    let whole = entry.details == Some("via_upstream");
    entry.answered_after.filter(|_| whole).map(|after| entry.duration.saturating_sub(after))
}

/// The path the client sent, where another went on.
fn original(asked: Asked<'_>) -> Option<&str> {
    Some(asked.path).filter(|path| *path != asked.sent_path)
}

/// Decoded, as Envoy does it for this.
fn parameter(entry: &Entry<'_>, name: &str) -> Option<String> {
    decoded_parameter(entry.request.as_ref()?.sent_path.split_once('?')?.1, name)
}

/// An empty one is none.
fn text(value: Option<&str>, values: &mut impl Values) {
    some!(values, value.filter(|t| !t.is_empty()), |t: &str| values.text(t.as_bytes()));
}

fn address(value: Option<SocketAddr>, values: &mut impl Values) {
    some!(values, value, |a| values.plain(|line| plain::push_address(a, line)));
}

fn ip(value: Option<SocketAddr>, values: &mut impl Values) {
    some!(values, value, |a: SocketAddr| values.plain(|line| plain::push_ip(a.ip(), line)));
}

fn port(value: Option<SocketAddr>, values: &mut impl Values) {
    some!(values, value, |a: SocketAddr| values.number(a.port().into()));
}

fn millis(value: Option<Duration>, values: &mut impl Values) {
    some!(values, value, |d: Duration| values.number(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)));
}

fn time(entry: &Entry<'_>, format: Option<&TimeFormat>, began: bool, values: &mut impl Values) {
    let time = if began { entry.start } else { entry.start + entry.duration };
    some!(values, format, |format: &TimeFormat| values.text(format.text(time).as_bytes()));
}

fn header_value(entry: &Entry<'_>, header: Option<&Named>, without_query: bool, values: &mut impl Values) {
    let found =
        header.and_then(|Named { whose, name, other }| entry.header_of(*whose, name).or_else(|| entry.header_of(*whose, other.as_ref()?)));
    let end = |value: &[u8]| value.iter().position(|b| without_query && *b == b'?').unwrap_or(value.len());
    some!(values, found, |value: &[u8]| values.text(&value[..end(value)]));
}
