//! HTTP/1 heads: from bytes to a request or response, and back. Pure; what is refused, and with which words, is as recorded
//! of Envoy. RFC 9112.
//!
//! Ambiguity about where a message ends is never passed on: `content-length` beside `transfer-encoding`, repeated lengths
//! and unknown codings are refused.

mod fields;
mod limits;
mod target;
mod write;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};

pub use self::{
    fields::strip_hop_by_hop,
    limits::{HeadLimits, MAX_HEAD, MAX_HEADERS, MAX_RESPONSE_HEAD},
    target::{checked_authority, path_and_query},
    write::{write_headers, write_request, write_response},
};
use self::{
    fields::{Fields, line_at},
    target::{forwarded_scheme, target_of},
};
use crate::{
    detect,
    route::request::{RequestHead, Scheme, is_grpc, take_off},
};

/// A message that is refused, with the answer a client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{details}")]
pub struct Malformed {
    pub status: StatusCode,
    pub body: &'static str,
    /// `response_code_details`.
    pub details: &'static str,
    /// Whether it is a downstream protocol error (`DPE`).
    pub protocol_error: bool,
    pub close: bool,
}

impl Malformed {
    pub const fn codec(details: &'static str) -> Self {
        Self { status: StatusCode::BAD_REQUEST, body: "Bad Request", details, protocol_error: true, close: true }
    }

    const fn too_large(details: &'static str) -> Self {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        Self { status, body: "Request Header Fields Too Large", details, protocol_error: true, close: true }
    }

    const fn refused(status: StatusCode, details: &'static str, close: bool) -> Self {
        Self { status, body: "", details, protocol_error: false, close }
    }

    /// A version of HTTP that is not served.
    const LOW_VERSION: Self = Self { status: StatusCode::UPGRADE_REQUIRED, body: "Upgrade Required", ..Self::codec("low_version") };
    pub const MISSING_HOST: Self = Self::refused(StatusCode::BAD_REQUEST, "missing_host_header", true);
    /// An authority that could be taken for something else.
    pub const BAD_AUTHORITY: Self = Self::codec("http.invalid_authority");

    /// OPTIONS of the server as a whole.
    pub const NO_RESOURCE: Self = Self::refused(StatusCode::NOT_FOUND, "absolute_path_rejected", false);

    pub const TOO_LARGE: Self = Self::too_large("http1.headers_too_large");
    /// Of a request of HTTP/2, whatever it was.
    pub const INVALID_FIELD: Self = Self::codec("http2.invalid.header.field");
    pub const BAD_BODY: Self = Self::codec("http1.codec_error");
}

const CODEC: Malformed = Malformed::codec("http1.codec_error");
const INVALID_CHARACTERS: Malformed = Malformed::codec("http1.invalid_characters");
const INVALID_URL: Malformed = Malformed::codec("http1.invalid_url");
static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
static PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Where a message's body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    Empty,
    Length(u64),
    Chunked,
    /// With the connection.
    UntilClose,
}

/// A request that is refused, with what it said so far.
#[derive(Debug)]
pub struct Refused {
    pub malformed: Malformed,
    /// Once its head has been read.
    pub said: Option<ParsedHead>,
}

/// What a head says.
#[derive(Debug)]
pub struct ParsedHead {
    pub method: Method,
    /// As it was written.
    pub target: Bytes,
    pub authority: Option<HeaderValue>,
    pub headers: HeaderMap,
}

impl Refused {
    pub fn is_grpc(&self) -> bool {
        self.said.as_ref().is_some_and(|said| is_grpc(&said.headers))
    }
}

impl From<Malformed> for Box<Refused> {
    fn from(malformed: Malformed) -> Self {
        Self::new(Refused { malformed, said: None })
    }
}

/// A request as read from an HTTP/1 connection.
#[derive(Debug)]
pub struct WireRequest {
    pub head: RequestHead,
    pub minor: u8,
    pub framing: Framing,
    pub keep_alive: bool,
    /// The protocol asked for by `upgrade`.
    pub upgrade: Option<HeaderValue>,
}

/// A response head as read from an HTTP/1 connection.
#[derive(Debug)]
pub struct WireResponse {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub framing: Framing,
    pub keep_alive: bool,
}

/// Where a head ends: after its empty line. Lines may end with LF alone.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', bytes).find_map(|at| match bytes.get(at + 1..) {
        Some([b'\n', ..]) => Some(at + 2),
        Some([b'\r', b'\n', ..]) => Some(at + 3),
        _ => None,
    })
}

/// How many bytes come before a head that some servers skip: what may not be taken for another protocol is more than what is taken here.
pub fn leading_line_ends(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count()
}

/// Bytes of empty lines before a message (RFC 9112 section 2.2).
pub fn leading_empty_lines(bytes: &[u8]) -> usize {
    2 * bytes.chunks_exact(2).take_while(|pair| *pair == b"\r\n").count()
}

/// The same before a request, where Envoy takes those of clients that end lines in another way, too.
pub fn leading_lines(bytes: &[u8]) -> usize {
    let mut n = 0;
    loop {
        match &bytes[n..] {
            [b'\r', b'\n', ..] => n += 2,
            [b'\n', ..] => n += 1,
            _ => return n,
        }
    }
}

/// What is wrong with the beginning of a request of which only a part is there, if it can be none, whatever follows: nobody has to wait for
/// the rest of a TLS hello.
pub fn is_no_request(bytes: &Bytes) -> Option<Malformed> {
    if let Some((line, _)) = first_line(bytes) {
        // What else is wrong with it is told of the whole.
        return request_line(bytes, line).err().filter(|malformed| *malformed == CODEC);
    }
    // Of a line that is not whole Envoy looks at the first byte; a carriage return is half of an empty line's end.
    let first = bytes.first()?;
    (*first != b'\r' && !detect::may_become_method(&[*first])).then_some(CODEC)
}

/// Reads a request head, which must be whole.
pub fn request(bytes: &Bytes, limits: HeadLimits) -> Result<WireRequest, Box<Refused>> {
    let (line, rest) = first_line(bytes).ok_or(CODEC)?;
    let (method, target, minor) = request_line(bytes, line)?;
    let Fields { mut headers, own } = fields::of_request(bytes, rest, limits.headers)?;
    let framing = request_framing(&headers, &own, minor)?;
    without_leading_zeros(&mut headers);
    let connection = Connection::of(&own);
    if connection.rejected {
        return Err(Malformed::codec("http1.connection_header_rejected").into());
    }
    let upgrade = if connection.upgrade { upgrade_of(&own) } else { None };
    if minor == 0 {
        // It could not be told to go on.
        take_expectation(&mut headers);
    }
    let keep_alive = !connection.close && (minor == 1 || connection.keep_alive);
    let said_scheme = match target.first() {
        Some(b'h' | b'H') if method != Method::CONNECT => {
            Some(if target.get(4).is_some_and(|b| b.eq_ignore_ascii_case(&b's')) { Scheme::Https } else { Scheme::Http })
        }
        _ => None,
    };
    let (authority, target) = match target_of(&method, &target, &own, minor) {
        Ok(found) => found,
        Err(refused) => {
            // What is refused is not read to its end: nothing of it may be taken for another request.
            let malformed = Malformed { close: refused.close || framing != Framing::Empty || !keep_alive, ..refused };
            // Envoy's log has nothing of what its codec refuses.
            let authority = own.get(header::HOST).cloned();
            let said = (!malformed.protocol_error).then_some(ParsedHead { method, target, authority, headers });
            return Err(Box::new(Refused { malformed, said }));
        }
    };
    fields::settle(&mut headers, &own);
    let scheme = said_scheme.unwrap_or_else(|| forwarded_scheme(&headers));
    let head = RequestHead { method, scheme, authority, target, headers };
    Ok(WireRequest { head, minor, framing, keep_alive, upgrade })
}

/// Whether the client waits to be told to go on: by the application, as with Istio's sidecars (`ENABLE_100_CONTINUE_HEADERS`).
pub fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|e| e.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Takes that off: the client is told here, or cannot be.
pub fn take_expectation(headers: &mut HeaderMap) -> bool {
    let expects = expects_continue(headers);
    if expects {
        take_off(headers, &header::EXPECT);
    }
    expects
}

/// Reads a response head, which must be whole.
pub fn response(bytes: &Bytes, method: &Method, limits: HeadLimits) -> Result<WireResponse, Malformed> {
    let (line, rest) = first_line(bytes).ok_or(CODEC)?;
    let line = &bytes[line];
    let (keeps, rest_of_line) = match line {
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor, b' ', rest @ ..] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            (!(*major == b'1' && *minor == b'0'), rest)
        }
        _ => return Err(CODEC),
    };
    let code = rest_of_line.get(..3).filter(|_| matches!(rest_of_line.get(3), None | Some(b' '))).ok_or(CODEC)?;
    let status = StatusCode::from_bytes(code).map_err(|_| CODEC)?;
    if rest_of_line[3..].iter().any(|b| b.is_ascii_control() && *b != b'\t') {
        return Err(CODEC);
    }
    let Fields { mut headers, own } = fields::of_response(bytes, rest, limits.headers)?;
    let framing = response_framing(&headers, &own, status, method)?;
    if status.is_informational() {
        // There is no body, and nothing may seem to say that there is one (RFC 9110 section 8.6, RFC 9112 section 6.1).
        let length = take_off(&mut headers, &header::CONTENT_LENGTH);
        let has_length = length.is_some_and(|length| length.as_bytes().iter().any(|b| *b != b'0'));
        if has_length || own.contains_key(header::TRANSFER_ENCODING) {
            return Err(CODEC);
        }
    }
    let connection = Connection::of(&own);
    let keep_alive = framing != Framing::UntilClose && !connection.close && (keeps || connection.keep_alive);
    // Whatever it says, there is no body (RFC 9112 section 6.3); if there is one all the same, nothing is to be read behind it.
    let length = if status == StatusCode::NO_CONTENT { take_off(&mut headers, &header::CONTENT_LENGTH) } else { None };
    let contradicts = status == StatusCode::NO_CONTENT
        && (length.is_some_and(|length| length.as_bytes().iter().any(|b| *b != b'0')) || own.contains_key(header::TRANSFER_ENCODING));
    let keep_alive = keep_alive && !contradicts;
    let upgrade = if status == StatusCode::SWITCHING_PROTOCOLS { own.get(header::UPGRADE).cloned() } else { None };
    fields::settle(&mut headers, &own);
    if let Some(upgrade) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, upgrade);
    }
    Ok(WireResponse { status, headers, framing, keep_alive })
}

type Range = std::ops::Range<usize>;

/// The first line without its end, and where the next begins.
fn first_line(bytes: &[u8]) -> Option<(Range, usize)> {
    line_at(bytes, 0)
}

/// Method, target and minor version; there may be more than one space between them, as Envoy allows (RFC 9112 section 3).
fn request_line(bytes: &Bytes, line: Range) -> Result<(Method, Bytes, u8), Malformed> {
    let text = &bytes[line.clone()];
    let is_space = |b: &u8| matches!(b, b' ' | b'\t');
    let method_end = text.iter().position(is_space).ok_or(CODEC)?;
    let method = detect::method(&text[..method_end]).ok_or(CODEC)?;
    let start = method_end + text[method_end..].iter().take_while(|b| is_space(b)).count();
    let end = start + text[start..].iter().position(is_space).unwrap_or(text.len() - start);
    let target = bytes.slice(line.start + start..line.start + end);
    let minor = match text[end..].trim_ascii() {
        b"HTTP/1.1" => 1,
        b"HTTP/1.0" => 0,
        b"" if target.starts_with(b"/") => return Err(Malformed::LOW_VERSION),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            return Err(Malformed::LOW_VERSION);
        }
        _ => return Err(CODEC),
    };
    if target.is_empty() || !target.is_ascii() {
        return Err(CODEC);
    }
    if target.iter().any(u8::is_ascii_control) {
        return Err(INVALID_CHARACTERS);
    }
    Ok((method, target, minor))
}

/// What `connection` says.
#[derive(Debug, Default)]
struct Connection {
    close: bool,
    keep_alive: bool,
    upgrade: bool,
    /// It names headers that say where a request comes from or what it is for, which are not the client's to take off.
    rejected: bool,
}

impl Connection {
    /// By the fields of the connection.
    fn of(own: &HeaderMap) -> Self {
        let mut found = Self::default();
        for token in tokens(own, &header::CONNECTION) {
            found.close |= token.eq_ignore_ascii_case(b"close");
            found.keep_alive |= token.eq_ignore_ascii_case(b"keep-alive");
            found.upgrade |= token.eq_ignore_ascii_case(b"upgrade");
            let forwarded = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];
            found.rejected |= token.starts_with(b":") || forwarded.iter().any(|name| token.eq_ignore_ascii_case(name.as_bytes()));
        }
        // Nobody has a use for it but clients that mean the other one, and are taken at their word, as by Envoy.
        found.close |= tokens(own, &PROXY_CONNECTION).any(|token| token.eq_ignore_ascii_case(b"close"));
        found
    }
}

/// The protocol asked for. HTTP/2 and TLS are not among them: what is then said over it would be seen by nobody on the way, so the
/// request is served as it is, which whoever asks has to expect (RFC 9110 section 7.8). Clients that ask for TLS do so with every request.
fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let begins = |token: &[u8], with: &[u8]| token.get(..with.len()).is_some_and(|t| t.eq_ignore_ascii_case(with));
    let served = tokens(headers, &header::UPGRADE).any(|t| begins(t, b"h2") || begins(t, b"tls/"));
    // What cannot be read may be anything.
    let odd = headers.get_all(header::UPGRADE).iter().any(|v| v.to_str().is_err());
    headers.get(header::UPGRADE).filter(|_| !served && !odd).cloned()
}

/// Whether what is said after the upgrade is for policies to let pass: frames, and not other requests.
pub fn is_websocket(upgrade: &HeaderValue) -> bool {
    upgrade.as_bytes().eq_ignore_ascii_case(b"websocket")
}

/// The elements of a list. One with odd bytes is one too: it must not hide the others.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let lines = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    lines.flat_map(|v| v.split(|b| *b == b',')).map(<[u8]>::trim_ascii).filter(|t| !t.is_empty())
}

/// Whether the one coding is `chunked`, and said so that nobody can take it for another; none where there is no coding.
fn is_chunked(headers: &HeaderMap) -> Option<bool> {
    let mut all = headers.get_all(header::TRANSFER_ENCODING).iter();
    let first = all.next()?;
    Some(all.next().is_none() && first.as_bytes().eq_ignore_ascii_case(b"chunked"))
}

fn request_framing(headers: &HeaderMap, own: &HeaderMap, minor: u8) -> Result<Framing, Malformed> {
    let length = content_length(headers)?;
    let Some(chunked) = is_chunked(own) else {
        return Ok(length.filter(|l| *l > 0).map_or(Framing::Empty, Framing::Length));
    };
    if length.is_some() || minor == 0 {
        return Err(Malformed::codec("http1.content_length_and_chunked_not_allowed"));
    }
    if !chunked {
        return Err(Malformed {
            status: StatusCode::NOT_IMPLEMENTED,
            body: "Not Implemented",
            ..Malformed::codec("http1.invalid_transfer_encoding")
        });
    }
    Ok(Framing::Chunked)
}

/// What is said of a body has to be right where there is none, too: whoever sent it may send one all the same.
fn response_framing(headers: &HeaderMap, own: &HeaderMap, status: StatusCode, method: &Method) -> Result<Framing, Malformed> {
    let length = content_length(headers)?;
    let said = match is_chunked(own) {
        Some(true) if length.is_none() => Framing::Chunked,
        Some(_) => return Err(CODEC),
        None => length.map_or(Framing::UntilClose, |l| if l == 0 { Framing::Empty } else { Framing::Length(l) }),
    };
    let bodiless = method == Method::HEAD || status.is_informational() || matches!(status.as_u16(), 204 | 304);
    Ok(if bodiless { Framing::Empty } else { said })
}

/// Writes a length as it is sent on, so that what policies see is what the application gets.
fn without_leading_zeros(headers: &mut HeaderMap) {
    let Some(length) = headers.get_mut(header::CONTENT_LENGTH) else { return };
    let zeros = length.as_bytes().iter().take_while(|b| **b == b'0').count().min(length.len().saturating_sub(1));
    if zeros > 0
        && let Ok(plain) = HeaderValue::from_bytes(&length.as_bytes()[zeros..])
    {
        *length = plain;
    }
}

fn content_length(headers: &HeaderMap) -> Result<Option<u64>, Malformed> {
    let mut all = headers.get_all(header::CONTENT_LENGTH).iter();
    let (Some(value), None) = (all.next(), all.next()) else {
        return if headers.contains_key(header::CONTENT_LENGTH) { Err(CODEC) } else { Ok(None) };
    };
    let digits = value.as_bytes();
    let zeros = digits.iter().take_while(|b| **b == b'0').count();
    if digits.is_empty() || digits.len() - zeros > 19 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(CODEC);
    }
    let length = digits.iter().try_fold(0_u64, |n, d| n.checked_mul(10)?.checked_add(u64::from(d - b'0')));
    length.map(Some).ok_or(CODEC)
}

#[cfg(test)]
mod tests;
