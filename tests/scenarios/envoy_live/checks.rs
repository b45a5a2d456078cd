//! The same over gRPC: what `envoy.service.auth.v3.Authorization` is asked and answers. The messages are written down here once more, by
//! Envoy's `external_auth.proto` and `attribute_context.proto`, so that a mistake in them is not made on both sides.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, Response};
use mesh_tests::raw::Reached;
use prost::Message;
use tokio::net::TcpListener;

#[derive(Clone, PartialEq, Message)]
struct CheckRequest {
    #[prost(message, optional, tag = "1")]
    attributes: Option<AttributeContext>,
}

#[derive(Clone, PartialEq, Message)]
struct AttributeContext {
    #[prost(message, optional, tag = "1")]
    source: Option<Peer>,
    #[prost(message, optional, tag = "2")]
    destination: Option<Peer>,
    #[prost(message, optional, tag = "4")]
    request: Option<Asked>,
    #[prost(map = "string, string", tag = "10")]
    context_extensions: HashMap<String, String>,
    #[prost(message, optional, tag = "11")]
    metadata_context: Option<Unread>,
    #[prost(message, optional, tag = "13")]
    route_metadata_context: Option<Unread>,
}

/// What is not looked into.
#[derive(Clone, PartialEq, Message)]
struct Unread {}

#[derive(Clone, PartialEq, Message)]
struct Peer {
    #[prost(message, optional, tag = "1")]
    address: Option<Address>,
    #[prost(string, tag = "2")]
    service: String,
    #[prost(map = "string, string", tag = "3")]
    labels: HashMap<String, String>,
    #[prost(string, tag = "4")]
    principal: String,
    #[prost(string, tag = "5")]
    certificate: String,
}

#[derive(Clone, PartialEq, Message)]
struct Address {
    #[prost(message, optional, tag = "1")]
    socket_address: Option<SocketAddress>,
}

#[derive(Clone, PartialEq, Message)]
struct SocketAddress {
    #[prost(int32, tag = "1")]
    protocol: i32,
    #[prost(string, tag = "2")]
    address: String,
    #[prost(uint32, tag = "3")]
    port_value: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Asked {
    #[prost(message, optional, tag = "1")]
    time: Option<Unread>,
    #[prost(message, optional, tag = "2")]
    http: Option<HttpRequest>,
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
    #[prost(string, tag = "7")]
    query: String,
    #[prost(string, tag = "8")]
    fragment: String,
    #[prost(int64, tag = "9")]
    size: i64,
    #[prost(string, tag = "10")]
    protocol: String,
    #[prost(string, tag = "11")]
    body: String,
    #[prost(bytes = "vec", tag = "12")]
    raw_body: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct CheckResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(message, optional, tag = "2")]
    denied_response: Option<Denied>,
    #[prost(message, optional, tag = "3")]
    ok_response: Option<Allowed>,
    #[prost(message, optional, tag = "5")]
    error_response: Option<Denied>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Denied {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(message, repeated, tag = "2")]
    headers: Vec<HeaderValueOption>,
    #[prost(string, tag = "3")]
    body: String,
}

#[derive(Clone, PartialEq, Message)]
struct Allowed {
    #[prost(message, repeated, tag = "2")]
    headers: Vec<HeaderValueOption>,
    #[prost(string, repeated, tag = "5")]
    headers_to_remove: Vec<String>,
    #[prost(message, repeated, tag = "6")]
    response_headers_to_add: Vec<HeaderValueOption>,
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
struct HeaderValueOption {
    #[prost(message, optional, tag = "1")]
    header: Option<HeaderValue>,
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
struct HeaderValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// What an authorizer answers to every question.
#[derive(Clone)]
pub enum Says {
    /// A message, and the status of the call.
    Message(Vec<u8>, &'static str),
    /// A message, and no status.
    Unfinished(Vec<u8>),
    /// The status alone, in the headers.
    Status(&'static str),
    /// A status of HTTP.
    Http(u16),
    Resets,
    Ends,
}

/// Starts one; its address.
pub async fn authorizer(says: Says, reached: Reached) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (says, reached) = (says.clone(), reached.clone());
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, respond))) = connection.accept().await {
                    if matches!(says, Says::Ends) {
                        return;
                    }
                    tokio::spawn(answer(request, respond, says.clone(), reached.clone()));
                }
            });
        }
    });
    Ok(address)
}

async fn answer(request: http::Request<RecvStream>, mut respond: SendResponse<Bytes>, says: Says, reached: Reached) {
    let (parts, mut body) = request.into_parts();
    let mut bytes = BytesMut::new();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        bytes.put(data);
    }
    reached.lock().expect("lock").push(format!("{} {}", parts.uri.path(), question(&bytes)));
    let mut response = Response::new(());
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
    match says {
        Says::Message(message, status) => {
            let Ok(mut stream) = respond.send_response(response, false) else { return };
            let length = u32::try_from(message.len()).expect("short").to_be_bytes();
            let _ = stream.send_data([&[0][..], &length, &message].concat().into(), false);
            let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), http::HeaderValue::from_static(status))]);
            let _ = stream.send_trailers(trailers);
        }
        Says::Unfinished(message) => {
            let Ok(mut stream) = respond.send_response(response, false) else { return };
            let length = u32::try_from(message.len()).expect("short").to_be_bytes();
            let _ = stream.send_data([&[0][..], &length, &message].concat().into(), true);
        }
        Says::Status(status) => {
            response.headers_mut().insert("grpc-status", http::HeaderValue::from_static(status));
            let _ = respond.send_response(response, true);
        }
        Says::Http(status) => {
            *response.status_mut() = http::StatusCode::from_u16(status).expect("a status");
            response.headers_mut().clear();
            let _ = respond.send_response(response, true);
        }
        Says::Resets | Says::Ends => respond.send_reset(h2::Reason::INTERNAL_ERROR),
    }
}

/// A question as it is compared, without what differs from run to run.
fn question(bytes: &[u8]) -> String {
    let Ok(asked) = CheckRequest::decode(bytes.get(5..).unwrap_or_default()) else { return "not a question".into() };
    let Some(attributes) = asked.attributes else { return "nothing".into() };
    let peer = |peer: Option<Peer>| {
        peer.map(|p| {
            let at = p.address.and_then(|a| a.socket_address).map(|a| (a.protocol, a.address.contains("127.0.0."), a.port_value > 0));
            format!("{at:?} {:?} {:?} {:?} {:?}", p.service, p.labels, p.principal, p.certificate)
        })
    };
    let (source, destination) = (peer(attributes.source), peer(attributes.destination));
    let request = attributes.request.map(|r| {
        let http = r.http.map(|h| {
            let headers =
                h.headers.into_iter().filter(|(n, _)| !n.starts_with("x-envoy-") && n != "x-request-id" && n != "x-forwarded-proto");
            let headers = headers.collect::<BTreeMap<_, _>>();
            format!(
                "{} {} {:?} {:?} {:?} {:?} {} {} {:?} {:?} {headers:?}",
                h.method, h.path, h.host, h.scheme, h.query, h.fragment, h.size, h.protocol, h.body, h.raw_body
            )
        });
        format!("time {} {http:?}", r.time.is_some())
    });
    format!("from {source:?} to {destination:?} {request:?} {:?}", attributes.context_extensions)
}

fn header(key: &str, value: &str, append: Option<bool>, append_action: i32) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue { key: key.into(), value: value.into() }),
        append: append.map(|value| BoolValue { value }),
        append_action,
    }
}

fn allowed(ok: Allowed) -> Says {
    let response = CheckResponse { status: Some(Status { code: 0 }), ok_response: Some(ok), ..CheckResponse::default() };
    Says::Message(response.encode_to_vec(), "0")
}

fn denied(code: i32, http: i32, headers: Vec<HeaderValueOption>, body: &str) -> Says {
    let status = (http != 0).then_some(Status { code: http });
    let denied = Denied { status, headers, body: body.into() };
    let response = CheckResponse { status: Some(Status { code }), denied_response: Some(denied), ..CheckResponse::default() };
    Says::Message(response.encode_to_vec(), "0")
}

fn failed(code: i32, http: i32) -> Says {
    let status = (http != 0).then_some(Status { code: http });
    let headers = vec![header("x-e", "1", None, 0), header("x-e", "2", Some(true), 0)];
    let error = Denied { status, headers, body: "err".into() };
    let response = CheckResponse { status: Some(Status { code }), error_response: Some(error), ..CheckResponse::default() };
    Says::Message(response.encode_to_vec(), "0")
}

/// Answers, by name.
pub fn answers() -> Vec<(&'static str, Says)> {
    let plain = |code| Says::Message(CheckResponse { status: Some(Status { code }), ..CheckResponse::default() }.encode_to_vec(), "0");
    let ways = |name: &str| {
        let ways = [(None, 0), (Some(false), 0), (Some(true), 0), (None, 1), (None, 2), (None, 3)];
        let one = |(i, (append, action)): (usize, (Option<bool>, i32))| header(&format!("{name}-{i}"), "new", append, action);
        ways.into_iter().enumerate().map(one).collect::<Vec<_>>()
    };
    let twice = |name: &str, append| vec![header(name, "one", append, 0), header(name, "two", append, 0)];
    vec![
        ("allowed", plain(0)),
        ("empty", Says::Message(Vec::new(), "0")),
        ("headers", allowed(Allowed { headers: ways("x-old"), ..Allowed::default() })),
        ("headers anew", allowed(Allowed { headers: ways("x-new"), ..Allowed::default() })),
        ("header twice", allowed(Allowed { headers: twice("x-up", None), ..Allowed::default() })),
        ("header twice, appended", allowed(Allowed { headers: twice("x-up", Some(true)), ..Allowed::default() })),
        (
            "removed",
            allowed(Allowed {
                headers_to_remove: ["x-old-0", "X-OLD-1", ":path", "host", "none"].map(Into::into).into(),
                ..Allowed::default()
            }),
        ),
        (
            "set and removed",
            allowed(Allowed {
                headers: vec![header("x-up", "9", None, 0), header("x-new", "1", None, 0), header("x-kept", "1", None, 0)],
                headers_to_remove: ["x-up", "x-new", "authorization"].map(Into::into).into(),
                ..Allowed::default()
            }),
        ),
        ("failed with 502", failed(13, 502)),
        ("failed without status", failed(13, 0)),
        ("failed with 200", failed(13, 200)),
        ("failed with 999", failed(13, 999)),
        ("failed, and allowed", failed(0, 502)),
        (
            "odd headers",
            allowed(Allowed {
                headers: vec![
                    header("host", "b.example", None, 0),
                    header("X-Upper", "1", None, 0),
                    header("content-length", "9", None, 0),
                ],
                ..Allowed::default()
            }),
        ),
        (
            "path",
            allowed(Allowed {
                headers: vec![header(":path", "/other", Some(false), 0), header(":authority", "c.example", Some(false), 0)],
                ..Allowed::default()
            }),
        ),
        ("length", allowed(Allowed { headers: vec![header("content-length", "9", None, 0)], ..Allowed::default() })),
        ("method", allowed(Allowed { headers: vec![header(":method", "PUT", None, 0)], ..Allowed::default() })),
        ("cookies denied", denied(7, 403, vec![header("set-cookie", "a=1", None, 0), header("set-cookie", "b=2", Some(false), 0)], "")),
        ("to the client", allowed(Allowed { response_headers_to_add: ways("x-ours"), ..Allowed::default() })),
        ("to the client, theirs", allowed(Allowed { response_headers_to_add: ways("x-theirs"), ..Allowed::default() })),
        (
            "parameters",
            allowed(Allowed {
                query_parameters_to_set: vec![
                    Parameter { key: "a".into(), value: "2".into() },
                    Parameter { key: "n".into(), value: "3".into() },
                ],
                query_parameters_to_remove: vec!["c".into()],
                ..Allowed::default()
            }),
        ),
        ("denied", plain(7)),
        ("denied by another code", plain(16)),
        (
            "denied with all",
            denied(
                7,
                401,
                vec![
                    header("www-authenticate", "Basic", None, 0),
                    header("set-cookie", "a=1", Some(true), 0),
                    header("set-cookie", "b=2", Some(true), 0),
                    header("content-type", "application/json", None, 0),
                ],
                "{}",
            ),
        ),
        ("denied without status", denied(7, 0, vec![header("x-deny", "d", None, 0)], "no")),
        ("denied with 200", denied(7, 200, Vec::new(), "fine")),
        ("denied with 302", denied(7, 302, vec![header("location", "/login", None, 0)], "")),
        ("denied with 999", denied(7, 999, Vec::new(), "")),
        ("denied with length", denied(7, 403, vec![header("content-length", "9", None, 0), header("connection", "close", None, 0)], "no")),
        ("no status", Says::Unfinished(CheckResponse { status: Some(Status { code: 0 }), ..CheckResponse::default() }.encode_to_vec())),
        ("unavailable", Says::Status("14")),
        ("denied by the call", Says::Status("7")),
        ("message and status", Says::Message(CheckResponse::default().encode_to_vec(), "13")),
        ("garbage", Says::Message(vec![0xff; 9], "0")),
        ("404", Says::Http(404)),
        ("503", Says::Http(503)),
        ("resets", Says::Resets),
        ("ends", Says::Ends),
    ]
}

/// Requests with all an authorizer may change.
pub const REQUESTS: &[(&str, &str)] = &[
    (
        "plain",
        "GET /x?a=b&c=d HTTP/1.1\r\nhost: a.example\r\nx-old-0: old\r\nx-old-1: old\r\nx-old-2: old\r\nx-old-3: old\r\nx-old-4: old\r\nx-old-5: old\r\nx-up: mine\r\n\r\n",
    ),
    (
        "headers",
        "GET /x HTTP/1.1\r\nhost: A.example:81\r\nx-a: 1\r\nX-A: 2\r\ncookie: a=b\r\nauthorization: Basic YQ==\r\nuser-agent: me\r\nx-l: \u{e9}\r\n\r\n",
    ),
    ("body", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"),
    ("chunks", "PUT /x HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("HEAD", "HEAD /x HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    (
        "gRPC",
        "POST /s/m HTTP/1.1\r\nhost: a.example\r\ncontent-type: application/grpc\r\nte: trailers\r\ncontent-length: 5\r\n\r\n\0\0\0\0\0",
    ),
];
