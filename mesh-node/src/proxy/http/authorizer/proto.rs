//! The messages of `envoy.service.auth.v3.Authorization`, as far as they are used: field numbers are those of Envoy's
//! `external_auth.proto`, `attribute_context.proto` and `base.proto`.

use std::{collections::HashMap, net::SocketAddr, time::SystemTime};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use prost::Message;

use super::{
    super::{
        reply::Reply,
        wire::{checked_authority, path_and_query},
    },
    PARTIAL_BODY, Shown,
    changes::{How, ToClient, lengthen, remove, text, with_parameters},
};
use crate::{policy::Sni, proxy::http::gate::Gate, route::request::RequestHead};

#[derive(Clone, PartialEq, Message)]
pub struct CheckRequest {
    #[prost(message, optional, tag = "1")]
    attributes: Option<Attributes>,
}

#[derive(Clone, PartialEq, Message)]
struct Attributes {
    #[prost(message, optional, tag = "1")]
    source: Option<Peer>,
    #[prost(message, optional, tag = "2")]
    destination: Option<Peer>,
    #[prost(message, optional, tag = "4")]
    request: Option<Request>,
    #[prost(message, optional, tag = "12")]
    tls_session: Option<TlsSession>,
}

#[derive(Clone, PartialEq, Message)]
struct TlsSession {
    #[prost(string, tag = "1")]
    sni: String,
}

#[derive(Clone, PartialEq, Message)]
struct Peer {
    #[prost(message, optional, tag = "1")]
    address: Option<Address>,
    #[prost(string, tag = "4")]
    principal: String,
}

#[derive(Clone, PartialEq, Message)]
struct Address {
    #[prost(message, optional, tag = "1")]
    socket: Option<SocketAddress>,
}

#[derive(Clone, PartialEq, Message)]
struct SocketAddress {
    #[prost(string, tag = "2")]
    address: String,
    #[prost(uint32, tag = "3")]
    port: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(message, optional, tag = "1")]
    time: Option<Timestamp>,
    #[prost(message, optional, tag = "2")]
    http: Option<HttpRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct Timestamp {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

#[derive(Clone, PartialEq, Message)]
struct HttpRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(map = "string, string", tag = "3")]
    headers: HashMap<String, String>,
    #[prost(string, tag = "4")]
    path: String,
    #[prost(string, tag = "5")]
    host: String,
    #[prost(string, tag = "6")]
    scheme: String,
    #[prost(int64, tag = "9")]
    size: i64,
    #[prost(string, tag = "10")]
    protocol: String,
    #[prost(string, tag = "11")]
    body: String,
    #[prost(bytes = "bytes", tag = "12")]
    raw_body: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub struct CheckResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RpcStatus>,
    #[prost(message, optional, tag = "2")]
    denied: Option<Denied>,
    #[prost(message, optional, tag = "3")]
    ok: Option<Allowed>,
    #[prost(message, optional, tag = "5")]
    error: Option<Denied>,
}

#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Denied {
    #[prost(message, optional, tag = "1")]
    status: Option<HttpStatus>,
    #[prost(message, repeated, tag = "2")]
    headers: Vec<HeaderOption>,
    #[prost(string, tag = "3")]
    body: String,
}

#[derive(Clone, PartialEq, Message)]
struct HttpStatus {
    #[prost(int32, tag = "1")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Allowed {
    #[prost(message, repeated, tag = "2")]
    headers: Vec<HeaderOption>,
    #[prost(string, repeated, tag = "5")]
    headers_to_remove: Vec<String>,
    #[prost(message, repeated, tag = "6")]
    response_headers_to_add: Vec<HeaderOption>,
    #[prost(message, repeated, tag = "7")]
    query_parameters_to_set: Vec<Parameter>,
    #[prost(string, repeated, tag = "8")]
    query_parameters_to_remove: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Parameter {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct HeaderOption {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    /// A wrapped bool.
    #[prost(message, optional, tag = "2")]
    append: Option<BoolValue>,
    #[prost(int32, tag = "3")]
    append_action: i32,
}

#[derive(Clone, PartialEq, Message)]
struct BoolValue {
    #[prost(bool, tag = "1")]
    value: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
    #[prost(bytes = "vec", tag = "3")]
    raw_value: Vec<u8>,
}

impl CheckResponse {
    /// Whether the connection or request may pass: a response that says nothing allows.
    pub fn is_ok(&self) -> bool {
        self.status.as_ref().is_none_or(|s| s.code == 0)
    }

    /// Whether the authorizer says that it failed, which is no decision.
    pub fn has_failed(&self) -> bool {
        !self.is_ok() && self.error.is_some()
    }
}

/// What is asked about a connection.
pub fn connection_question(gate: &Gate) -> CheckRequest {
    let sni = match &gate.facts.sni {
        Sni::Read(Some(name)) => Some(TlsSession { sni: name.to_string() }),
        Sni::Read(None) | Sni::Unread => None,
    };
    CheckRequest { attributes: Some(Attributes { tls_session: sni, ..attributes(gate) }) }
}

fn attributes(gate: &Gate) -> Attributes {
    let facts = &gate.facts;
    let peer = |at: SocketAddr, principal: String| {
        let socket = SocketAddress { address: at.ip().to_string(), port: at.port().into() };
        Some(Peer { address: Some(Address { socket: Some(socket) }), principal })
    };
    Attributes {
        source: peer(gate.client, facts.peer.as_ref().map(ToString::to_string).unwrap_or_default()),
        // Who this end has proved to be, which it has only where the other one has.
        destination: peer(facts.destination, gate.proved().map(|own| own.to_string()).unwrap_or_default()),
        request: None,
        tls_session: None,
    }
}

/// What is asked about a request.
pub fn question(gate: &Gate, (head, protocol): (&RequestHead, &'static str), shown: Option<Shown>) -> CheckRequest {
    let mut headers: HashMap<String, String> = HashMap::new();
    for name in head.headers.keys().filter(|name| **name != PARTIAL_BODY) {
        let values = head.headers.get_all(name).iter().map(|v| text(v.as_bytes()));
        headers.insert(name.as_str().to_owned(), values.collect::<Vec<_>>().join(","));
    }
    for (name, value) in
        [(":method", head.method.as_str()), (":path", head.target.as_str()), (":authority", head.host()), (":scheme", head.scheme.as_str())]
    {
        headers.insert(name.to_owned(), value.to_owned());
    }
    let (mut body, mut raw_body, mut size) = (String::new(), Bytes::new(), 0);
    if let Some(shown) = shown {
        headers.insert(PARTIAL_BODY.to_owned(), shown.partial_text().to_owned());
        size = i64::try_from(shown.received).unwrap_or(i64::MAX);
        if shown.as_bytes {
            raw_body = shown.data;
        } else {
            body = text(&shown.data);
        }
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let http = HttpRequest {
        id: headers.get("x-request-id").cloned().unwrap_or_default(),
        method: head.method.to_string(),
        headers,
        path: head.target.to_string(),
        host: head.host().to_owned(),
        scheme: head.scheme.as_str().to_owned(),
        // Of the body, as far as it has come.
        size,
        protocol: protocol.to_owned(),
        body,
        raw_body,
    };
    let time = Timestamp { seconds: i64::try_from(now.as_secs()).unwrap_or(0), nanos: i32::try_from(now.subsec_nanos()).unwrap_or(0) };
    let request = Some(Request { time: Some(time), http: Some(http) });
    CheckRequest { attributes: Some(Attributes { request, ..attributes(gate) }) }
}

/// What an answer comes to.
pub enum Outcome {
    Allowed {
        to_client: ToClient,
    },
    Denied(Box<Reply>),
    /// Nothing was decided; this is what a client is told unless such requests pass.
    Failed(Box<Reply>),
    /// It would make something of the request that is no request.
    Invalid,
}

/// Changes the request as the answer says. `on_error`: the status of a failure that names none.
pub fn apply(response: &CheckResponse, head: &mut RequestHead, on_error: StatusCode) -> Outcome {
    if response.is_ok() {
        let Some(ok) = &response.ok else { return Outcome::Allowed { to_client: ToClient::default() } };
        if !ok.headers.iter().all(|option| change(option, head)) {
            return Outcome::Invalid;
        }
        // After they were set, as with Envoy.
        remove(&mut head.headers, ok.headers_to_remove.iter().map(|name| &**name));
        if !ok.query_parameters_to_set.is_empty() || !ok.query_parameters_to_remove.is_empty() {
            let set = ok.query_parameters_to_set.iter().map(|p| (&*p.key, &*p.value));
            if let Some(target) = with_parameters(&head.target, set, ok.query_parameters_to_remove.iter().map(|name| &**name)) {
                head.target = target;
            }
        }
        let mut to_client = ToClient::default();
        for option in &ok.response_headers_to_add {
            if let Some((name, value)) = option.field() {
                to_client.push(name, value, option.how());
            }
        }
        return Outcome::Allowed { to_client };
    }
    match &response.error {
        Some(error) => Outcome::Failed(Box::new(error.reply(on_error, true))),
        // All of one name that are not to be appended: there would be nothing to append them to.
        None => Outcome::Denied(Box::new(response.denied.clone().unwrap_or_default().reply(StatusCode::FORBIDDEN, false))),
    }
}

impl Denied {
    /// `unsaid`: the status where it names none that can be one. `appended`: with headers that are to be appended too.
    fn reply(&self, unsaid: StatusCode, appended: bool) -> Reply {
        let status = self.status.as_ref().and_then(|s| u16::try_from(s.code).ok()).and_then(|s| StatusCode::from_u16(s).ok());
        let status = status.filter(|s| s.as_u16() >= 200).unwrap_or(unsaid);
        let mut reply = Reply::new(status, self.body.clone());
        for option in self.headers.iter().filter(|o| appended || !o.appends()) {
            if let Some((name, value)) = option.field() {
                reply.headers.append(name, value);
            }
        }
        reply
    }
}

impl HeaderOption {
    fn appends(&self) -> bool {
        self.append.as_ref().is_some_and(|a| a.value)
    }

    fn value(&self) -> &[u8] {
        self.header.as_ref().map_or(&[][..], |h| if h.raw_value.is_empty() { h.value.as_bytes() } else { &h.raw_value })
    }

    /// The header, if it is one, and an authorizer's business, which it is not how a message is framed.
    fn field(&self) -> Option<(HeaderName, HeaderValue)> {
        let name = HeaderName::from_bytes(self.header.as_ref()?.key.as_bytes()).ok()?;
        let value = HeaderValue::from_bytes(self.value()).ok()?;
        super::is_end_to_end(&name).then_some((name, value))
    }

    /// In an answer; in requests Envoy looks at no more than whether it is to be appended.
    fn how(&self) -> How {
        match (self.append.as_ref().map(|a| a.value), self.append_action) {
            (Some(false), _) | (None, 2) => How::Set,
            (None, 1) => How::IfAbsent,
            (None, 3) => How::IfPresent,
            _ => How::Append,
        }
    }
}

/// Changes a header of a request, or what HTTP/2 has among them; says whether what it is about can be that. What is no header is
/// left out.
fn change(option: &HeaderOption, head: &mut RequestHead) -> bool {
    let bytes = option.value();
    match option.header.as_ref().map(|h| h.key.to_ascii_lowercase()).as_deref() {
        Some(":path") => {
            let Ok(target) = path_and_query(&Bytes::copy_from_slice(bytes)) else { return false };
            head.target = target;
        }
        Some(":authority" | "host") => {
            let authority = HeaderValue::from_bytes(bytes).ok().and_then(|value| checked_authority(value).ok());
            let Some(authority) = authority.filter(|a| !a.is_empty()) else { return false };
            head.authority = authority;
        }
        Some(":method") => {
            // Where an answer ends, and what follows it, depends on these two: they are the client's.
            let fixed = |method: &Method| *method == Method::HEAD || *method == Method::CONNECT;
            let Ok(method) = Method::from_bytes(bytes) else { return false };
            if !fixed(&method) && !fixed(&head.method) {
                head.method = method;
            }
        }
        // No value of a header can be made of it, and without it the request is not what was let in.
        Some(name) if HeaderName::from_bytes(name.as_bytes()).is_ok() && HeaderValue::from_bytes(bytes).is_err() => return false,
        _ => match option.field() {
            Some((name, value)) if option.appends() => lengthen(&mut head.headers, &name, &value),
            Some((name, value)) => drop(head.headers.insert(name, value)),
            None => {}
        },
    }
    true
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;
    use crate::route::request::Scheme;

    #[test]
    fn a_method_that_answers_are_read_by_is_not_changed() {
        for (from, to, expected) in [("GET", "PUT", "PUT"), ("GET", "HEAD", "GET"), ("GET", "CONNECT", "GET"), ("HEAD", "GET", "HEAD")] {
            let mut head = RequestHead {
                method: from.parse().expect("a method"),
                scheme: Scheme::Http,
                authority: HeaderValue::from_static("a"),
                target: crate::route::target::RequestTarget::from_static("/"),
                headers: HeaderMap::new(),
            };
            let header = Some(Header { key: ":method".into(), value: to.into(), raw_value: Vec::new() });
            assert!(change(&HeaderOption { header, append: None, append_action: 0 }, &mut head));
            assert_eq!(head.method, expected, "{from} to {to}");
        }
    }

    #[test]
    fn what_is_set_may_be_removed_and_a_failure_is_no_decision() {
        let mut head = RequestHead {
            method: Method::GET,
            scheme: Scheme::Http,
            authority: HeaderValue::from_static("a"),
            target: crate::route::target::RequestTarget::from_static("/"),
            headers: HeaderMap::from_iter([(HeaderName::from_static("x-old"), HeaderValue::from_static("1"))]),
        };
        let set = |key: &str| {
            let header = Some(Header { key: key.into(), value: "9".into(), raw_value: Vec::new() });
            HeaderOption { header, append: None, append_action: 0 }
        };
        let removed = ["x-a", "X-Old", "host", ":path"].map(str::to_owned).to_vec();
        let ok = Allowed { headers: vec![set("x-a"), set("x-b")], headers_to_remove: removed, ..Allowed::default() };
        apply(&CheckResponse { ok: Some(ok), ..CheckResponse::default() }, &mut head, StatusCode::FORBIDDEN);
        assert_eq!(head.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-b"]);
        for (code, expected) in [(502, 502), (0, 503), (100, 503), (70_000, 503)] {
            let error = Denied { status: Some(HttpStatus { code }), headers: vec![set("x-e")], body: "err".into() };
            let response = CheckResponse { status: Some(RpcStatus { code: 13 }), error: Some(error), ..CheckResponse::default() };
            let Outcome::Failed(reply) = apply(&response, &mut head, StatusCode::SERVICE_UNAVAILABLE) else { panic!("a failure") };
            assert_eq!((reply.status.as_u16(), reply.headers.len(), response.has_failed()), (expected, 1, true));
        }
    }

    #[test]
    fn what_would_be_no_request_is_not_made_of_one() {
        for (key, value, valid) in [
            (":path", "/b?c", true),
            (":path", "/a b", false),
            (":path", "", false),
            ("Host", "b.example", true),
            (":authority", "a b", false),
            ("host", "", false),
            (":method", "PUT", true),
            (":method", "P T", false),
            ("x-a", "1", true),
            ("x a", "1", true),
            ("x-a", "1\n2", false),
            ("x a", "1\n2", true),
        ] {
            let mut head = RequestHead {
                method: Method::GET,
                scheme: Scheme::Http,
                authority: HeaderValue::from_static("a"),
                target: crate::route::target::RequestTarget::from_static("/"),
                headers: HeaderMap::new(),
            };
            let header = Some(Header { key: key.into(), value: value.into(), raw_value: Vec::new() });
            let ok = Allowed { headers: vec![HeaderOption { header, append: None, append_action: 0 }], ..Allowed::default() };
            let outcome = apply(&CheckResponse { ok: Some(ok), ..CheckResponse::default() }, &mut head, StatusCode::FORBIDDEN);
            assert_eq!(matches!(outcome, Outcome::Allowed { .. }), valid, "{key}: {value:?}");
        }
    }
}
