//! The messages of `envoy.service.auth.v3.Authorization`, as far as they are used: field numbers are those of Envoy's
//! `external_auth.proto`, `attribute_context.proto` and `base.proto`.

use std::{collections::HashMap, net::SocketAddr, time::SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use prost::Message;

use super::super::reply::Reply;
use crate::{
    policy::{Facts, Sni},
    route::request::RequestHead,
};

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
}

#[derive(Clone, PartialEq, Message)]
pub struct CheckResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RpcStatus>,
    #[prost(message, optional, tag = "2")]
    denied: Option<Denied>,
    #[prost(message, optional, tag = "3")]
    ok: Option<Allowed>,
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
}

/// What is asked about a connection.
pub fn connection_question(facts: &Facts, client: SocketAddr) -> CheckRequest {
    let sni = match &facts.sni {
        Sni::Read(Some(name)) => Some(TlsSession { sni: name.to_string() }),
        Sni::Read(None) | Sni::Unread => None,
    };
    CheckRequest { attributes: Some(Attributes { tls_session: sni, ..attributes(facts, client) }) }
}

fn attributes(facts: &Facts, client: SocketAddr) -> Attributes {
    let peer = |at: SocketAddr, principal: String| {
        let socket = SocketAddress { address: at.ip().to_string(), port: at.port().into() };
        Some(Peer { address: Some(Address { socket: Some(socket) }), principal })
    };
    Attributes {
        source: peer(client, facts.peer.as_ref().map(ToString::to_string).unwrap_or_default()),
        destination: peer(facts.destination, String::new()),
        request: None,
        tls_session: None,
    }
}

/// What is asked about a request.
pub fn question(facts: &Facts, client: SocketAddr, head: &RequestHead) -> CheckRequest {
    let mut headers: HashMap<String, String> = HashMap::new();
    for name in head.headers.keys() {
        let values = head.headers.get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
        headers.insert(name.as_str().to_owned(), values.collect::<Vec<_>>().join(","));
    }
    for (name, value) in
        [(":method", head.method.as_str()), (":path", head.target.as_str()), (":authority", head.host()), (":scheme", head.scheme.as_str())]
    {
        headers.insert(name.to_owned(), value.to_owned());
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let length = head.headers.get(http::header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse().ok());
    let http = HttpRequest {
        id: headers.get("x-request-id").cloned().unwrap_or_default(),
        method: head.method.to_string(),
        headers,
        path: head.target.to_string(),
        host: head.host().to_owned(),
        scheme: head.scheme.as_str().to_owned(),
        size: length.unwrap_or(-1),
        protocol: "HTTP/1.1".to_owned(),
    };
    let time = Timestamp { seconds: i64::try_from(now.as_secs()).unwrap_or(0), nanos: i32::try_from(now.subsec_nanos()).unwrap_or(0) };
    let request = Some(Request { time: Some(time), http: Some(http) });
    CheckRequest { attributes: Some(Attributes { request, ..attributes(facts, client) }) }
}

/// What an answer comes to.
pub enum Outcome {
    Allowed { to_client: HeaderMap },
    Denied(Box<Reply>),
}

/// Changes the request as the answer says.
pub fn apply(response: &CheckResponse, head: &mut RequestHead) -> Outcome {
    if response.is_ok() {
        let Some(ok) = &response.ok else { return Outcome::Allowed { to_client: HeaderMap::new() } };
        for name in &ok.headers_to_remove {
            // Neither pseudo headers nor the host can be taken away.
            if name != "host" {
                head.headers.remove(name);
            }
        }
        change(&ok.headers, &mut head.headers);
        let mut to_client = HeaderMap::new();
        change(&ok.response_headers_to_add, &mut to_client);
        return Outcome::Allowed { to_client };
    }
    let denied = response.denied.clone().unwrap_or_default();
    let status = denied.status.as_ref().and_then(|s| u16::try_from(s.code).ok()).and_then(|s| StatusCode::from_u16(s).ok());
    let status = status.filter(|s| s.as_u16() >= 200).unwrap_or(StatusCode::FORBIDDEN);
    let mut reply = Reply::new(status, denied.body);
    change(&denied.headers, &mut reply.headers);
    Outcome::Denied(Box::new(reply))
}

fn change(options: &[HeaderOption], headers: &mut HeaderMap) {
    for option in options {
        let Some(header) = &option.header else { continue };
        let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        let name = HeaderName::from_bytes(header.key.as_bytes());
        let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value)) else { continue };
        // How a message is framed is not an authorizer's business.
        if !super::is_end_to_end(&name) {
            continue;
        }
        match (option.append.as_ref().map(|a| a.value), option.append_action) {
            (Some(true), _) => drop(headers.append(name, value)),
            // ADD_IF_ABSENT, OVERWRITE_IF_EXISTS.
            (None, 1) if headers.contains_key(&name) => {}
            (None, 3) if !headers.contains_key(&name) => {}
            _ => drop(headers.insert(name, value)),
        }
    }
}
