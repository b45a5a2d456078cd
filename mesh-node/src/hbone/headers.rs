//! The CONNECT request of HBONE, read and written without touching a socket.

use std::{fmt, net::SocketAddr, str::FromStr};

use http::{HeaderMap, HeaderValue, Method, Request, Version};

use crate::id::canonical;

/// The longest `:authority` looked at, bytes: a DNS name, a port and brackets.
const MAX_AUTHORITY: usize = 264;
/// The longest `baggage` looked at, bytes: its seven names, each as long as it may be.
const MAX_BAGGAGE: usize = 2048;

/// What a tunnel leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    /// `ip:port`, IPv6 in brackets.
    Address(SocketAddr),
    /// `hostname:port`, as sent towards waypoints and gateways.
    Host { name: String, port: u16 },
}

impl FromStr for Authority {
    type Err = BadRequest;

    fn from_str(text: &str) -> Result<Self, BadRequest> {
        let bad = || BadRequest::Authority(text.chars().take(MAX_AUTHORITY).collect());
        if text.len() > MAX_AUTHORITY {
            return Err(bad());
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            let address = SocketAddr::new(canonical(address.ip()), address.port());
            return if address.port() == 0 { Err(bad()) } else { Ok(Self::Address(address)) };
        }
        let (name, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        // A name that ends in a number is an address gone wrong, not a host.
        let numeric_end = name.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()));
        let port = port.parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(bad)?;
        if name.is_empty() || name.len() > 253 || !name.bytes().all(legal) || numeric_end {
            return Err(bad());
        }
        Ok(Self::Host { name: name.to_ascii_lowercase(), port })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(a) => a.fmt(f),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

/// Why a request is no HBONE request; the answer is 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    #[error("expected method CONNECT, got {0}")]
    Method(String),
    #[error("extended CONNECT is not HBONE")]
    Extended,
    #[error("authority {0:?} is neither ip:port nor hostname:port")]
    Authority(String),
    #[error("no authority")]
    NoAuthority,
}

/// A CONNECT request, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    pub authority: Authority,
    /// The host that was dialled, as far as the `forwarded` header says it.
    pub host: Option<String>,
    pub traceparent: Option<TraceParent>,
    /// Who the client says it is, for telemetry: an [`Introduction`] to be read.
    pub introduction: Option<HeaderValue>,
}

/// Reads a request that came in on an HBONE connection.
pub fn parse<B>(request: &Request<B>) -> Result<ConnectRequest, BadRequest> {
    if request.method() != Method::CONNECT {
        return Err(BadRequest::Method(request.method().as_str().chars().take(32).collect()));
    }
    let uri = request.uri();
    if request.extensions().get::<h2::ext::Protocol>().is_some()
        || uri.scheme().is_some()
        || uri.path_and_query().is_some_and(|p| p != "/" && p != "")
    {
        return Err(BadRequest::Extended);
    }
    let authority = uri.authority().ok_or(BadRequest::NoAuthority)?.as_str().parse()?;
    let header = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok());
    Ok(ConnectRequest {
        authority,
        host: header("forwarded").and_then(forwarded_host),
        traceparent: header("traceparent").and_then(|v| v.parse().ok()),
        introduction: introduced(request.headers()),
    })
}

/// All of `baggage`, which may be in several lines.
fn introduced(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut all = headers.get_all("baggage").iter();
    let (first, rest) = (all.next()?, all.map(HeaderValue::as_bytes).collect::<Vec<_>>());
    let whole = if rest.is_empty() {
        first.clone()
    } else {
        HeaderValue::from_bytes(&[&[first.as_bytes()], &*rest].concat().join(&b","[..])).ok()?
    };
    (whole.len() <= MAX_BAGGAGE).then_some(whole)
}

/// Builds the request that opens a tunnel to `to`.
pub fn build(to: &Authority, forwarded: &Forwarded, baggage: &str, trace: TraceParent) -> Result<Request<()>, http::Error> {
    let mut request = Request::builder().method(Method::CONNECT).version(Version::HTTP_2).uri(to.to_string()).body(())?;
    let headers: &mut HeaderMap = request.headers_mut();
    headers.insert("forwarded", HeaderValue::try_from(forwarded.to_string())?);
    headers.insert("traceparent", HeaderValue::try_from(trace.to_string())?);
    if !baggage.is_empty() {
        headers.insert("baggage", HeaderValue::try_from(baggage)?);
    }
    Ok(request)
}

/// The `baggage` header as ztunnel writes it: keys of the source workload, comma-joined, nothing encoded. Values a header
/// cannot carry are left out.
pub fn baggage<'a>(pairs: impl IntoIterator<Item = (&'a str, Option<&'a str>)>) -> String {
    let legal = |v: &str| !v.is_empty() && v.bytes().all(|b| b.is_ascii_graphic() && b != b',' && b != b'=');
    let known = pairs.into_iter().filter_map(|(k, v)| Some(format!("{k}={}", v.filter(|v| legal(v))?)));
    known.collect::<Vec<_>>().join(",")
}

/// What a `baggage` header says of the source workload. Nothing vouches for it: it is for telemetry of sources that nothing else is
/// known of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Introduction {
    pub cluster: Option<String>,
    pub namespace: Option<String>,
    pub workload: Option<String>,
    pub service: Option<String>,
    pub version: Option<String>,
    pub region: Option<String>,
    pub zone: Option<String>,
}

impl Introduction {
    /// Reads a header of ztunnel's keys; none of one that has none of them. What cannot be a value of a label is left out.
    pub fn read(header: &HeaderValue) -> Option<Self> {
        /// The longest name of a Kubernetes object.
        const LONGEST: usize = 253;
        let mut read = Self::default();
        for (key, value) in header.to_str().ok()?.split(',').filter_map(|pair| pair.split_once('=')) {
            let place = match key.trim() {
                "k8s.cluster.name" => &mut read.cluster,
                "k8s.namespace.name" => &mut read.namespace,
                "k8s.deployment.name" | "k8s.job.name" | "k8s.cronjob.name" | "k8s.pod.name" => &mut read.workload,
                "service.name" => &mut read.service,
                "service.version" => &mut read.version,
                "cloud.region" => &mut read.region,
                "cloud.availability_zone" => &mut read.zone,
                _ => continue,
            };
            // Properties of a pair, as W3C baggage has them, are of no interest.
            let value = value.split(';').next().unwrap_or_default().trim();
            if (1..=LONGEST).contains(&value.len()) {
                *place = Some(value.to_owned());
            }
        }
        (read != Self::default()).then_some(read)
    }
}

/// RFC 7239 as ztunnel writes it: `for="ip:port"[;host=name]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    pub client: SocketAddr,
    pub host: Option<String>,
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for=\"{}\"", self.client)?;
        self.host.iter().try_for_each(|h| write!(f, ";host={h}"))
    }
}

/// The host that was dialled, as the first element of a `forwarded` header has it: the hop that sent it. Whatever the rest says.
pub fn forwarded_host(text: &str) -> Option<String> {
    let pairs = text.split(',').next()?.split(';').filter_map(|pair| pair.split_once('='));
    let mut hosts = pairs.filter(|(key, _)| key.trim().eq_ignore_ascii_case("host"));
    hosts.next().map(|(_, host)| host.trim().trim_matches('"').to_owned())
}

/// W3C trace context, version 00.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    pub trace: u128,
    pub span: u64,
    pub flags: u8,
}

impl TraceParent {
    /// A fresh, unsampled one, as every HBONE connection without a trace of its own gets.
    pub fn fresh(trace: u128, span: u64) -> Self {
        Self { trace: trace.max(1), span: span.max(1), flags: 0 }
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

impl FromStr for TraceParent {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let lower_hex = |s: &str| s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let mut parts = text.split('-');
        let mut next = |len: usize| parts.next().filter(|p| p.len() == len && lower_hex(p)).ok_or(());
        let (version, trace, span, flags) = (next(2)?, next(32)?, next(16)?, next(2)?);
        if version != "00" || parts.next().is_some() {
            return Err(());
        }
        let trace = u128::from_str_radix(trace, 16).map_err(drop)?;
        let span = u64::from_str_radix(span, 16).map_err(drop)?;
        let flags = u8::from_str_radix(flags, 16).map_err(drop)?;
        if trace == 0 || span == 0 { Err(()) } else { Ok(Self { trace, span, flags }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authority_is_an_address_or_a_host_with_a_port() {
        let good = [
            ("10.0.0.1:8080", "10.0.0.1:8080"),
            ("[fd00::1]:8080", "[fd00::1]:8080"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("Reviews.default.svc:9080", "reviews.default.svc:9080"),
        ];
        for (text, shown) in good {
            assert_eq!(text.parse::<Authority>().expect(text).to_string(), shown);
        }
        for bad in [
            "",
            ":80",
            "a",
            "a:",
            "a:0",
            "a:65536",
            "10.0.0.1",
            "10.0.0.1:0",
            "10.0.0.256:80",
            "fd00::1:80",
            "[fd00::1]",
            "a b:80",
            "u@h:80",
            "a:80:90",
        ] {
            assert!(bad.parse::<Authority>().is_err(), "{bad}");
        }
    }

    #[test]
    fn request_that_is_built_reads_back() {
        let to = Authority::Address("[fd00::1]:8080".parse().expect("valid"));
        let forwarded = Forwarded { client: "10.0.0.1:4711".parse().expect("valid"), host: Some("web.default.svc.cluster.local".into()) };
        let trace = TraceParent::fresh(7, 9);
        assert_eq!(trace.to_string().len(), 55);
        let carried = baggage([
            ("k8s.cluster.name", Some("Kubernetes")),
            ("k8s.namespace.name", Some("web")),
            ("k8s.pod.name", None),
            ("service.name", Some("a,b")),
            ("service.version", Some("v1")),
        ]);
        assert_eq!(carried, "k8s.cluster.name=Kubernetes,k8s.namespace.name=web,service.version=v1");
        let request = build(&to, &forwarded, &carried, trace).expect("built");
        assert_eq!(request.headers()["baggage"], carried.as_str());
        assert_eq!(request.uri().to_string(), "[fd00::1]:8080");
        let read = parse(&request).expect("read");
        let text = |text: &str| Some(text.to_owned());
        let expected = Introduction { cluster: text("Kubernetes"), namespace: text("web"), version: text("v1"), ..Introduction::default() };
        assert_eq!(read.introduction.as_ref().and_then(Introduction::read), Some(expected));
        let introduction = read.introduction.clone();
        assert_eq!(read, ConnectRequest { authority: to, host: forwarded.host, traceparent: Some(trace), introduction });
    }

    #[test]
    fn other_requests_are_refused() {
        let get = Request::builder().method("GET").uri("http://10.0.0.1:80/").body(()).expect("request");
        assert!(matches!(parse(&get), Err(BadRequest::Method(_))));
        let bad = Request::builder().method("CONNECT").uri("10.0.0.1:0").body(()).expect("request");
        assert!(matches!(parse(&bad), Err(BadRequest::Authority(_))));
        let mut extended = Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).expect("request");
        extended.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        assert_eq!(parse(&extended), Err(BadRequest::Extended));
    }

    #[test]
    fn broken_optional_headers_are_left_out() {
        let mut request = Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).expect("request");
        for (name, value) in [("forwarded", "for=nobody"), ("traceparent", "00-0-0-0"), ("baggage", ",,;=")] {
            request.headers_mut().insert(name, value.parse().expect("value"));
        }
        let read = parse(&request).expect("read");
        assert_eq!((read.host, read.traceparent, read.introduction.as_ref().and_then(Introduction::read)), (None, None, None));
        request.headers_mut().insert("baggage", HeaderValue::try_from("x".repeat(2049)).expect("value"));
        assert_eq!(parse(&request).expect("read").introduction, None);
    }

    #[test]
    fn baggage_in_several_lines_is_one() {
        let mut request = Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).expect("request");
        for line in ["k8s.namespace.name=n", "service.name=s,k8s.pod.name=p"] {
            request.headers_mut().append("baggage", HeaderValue::from_static(line));
        }
        let read = parse(&request).expect("read").introduction.as_ref().and_then(Introduction::read).expect("somebody");
        assert_eq!((read.namespace.as_deref(), read.service.as_deref(), read.workload.as_deref()), (Some("n"), Some("s"), Some("p")));
    }

    #[test]
    fn an_introduction_is_what_is_known_of_it() {
        let long = format!("k8s.pod.name={},service.name=s", "x".repeat(254));
        for (text, workload, service) in [
            ("k8s.deployment.name=d,service.name=s", Some("d"), Some("s")),
            (" k8s.job.name = j ;p=1 , other=x", Some("j"), None),
            ("k8s.cronjob.name=,service.name=s", None, Some("s")),
            (&*long, None, Some("s")),
        ] {
            let read = Introduction::read(&HeaderValue::try_from(text).expect(text)).expect(text);
            assert_eq!((read.workload.as_deref(), read.service.as_deref()), (workload, service), "{text}");
        }
        assert_eq!(Introduction::read(&HeaderValue::from_static("other=x,k8s.pod.name")), None);
    }

    #[test]
    fn a_host_is_read_whoever_it_is_for() {
        for (text, host) in [
            ("for=\"10.0.0.1:80\";host=a.b.svc", Some("a.b.svc")),
            ("for=10.0.0.1;host=a", Some("a")),
            ("for=unknown;proto=http; Host=\"a\"", Some("a")),
            ("host=a;by", Some("a")),
            ("for=\"10.0.0.1:80\", host=other", None),
            ("host", None),
            ("", None),
        ] {
            assert_eq!(forwarded_host(text).as_deref(), host, "{text}");
        }
    }
}
