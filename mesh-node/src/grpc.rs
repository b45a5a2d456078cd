//! Unary gRPC calls, both ends: messages framed over HTTP/2 (the gRPC project's `PROTOCOL-HTTP2.md`). Just as much of it as the
//! certificate authority's protocol needs.

use std::{
    fmt,
    future::{Future, poll_fn},
    io,
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

/// Largest message read, bytes.
const MAX_MESSAGE: usize = 1024 * 1024;
/// How long a client may take over one request, and over saying hello.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection may be without a request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The status codes that are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Ok,
    Unknown,
    InvalidArgument,
    PermissionDenied,
    Unimplemented,
    Internal,
    Unavailable,
    Unauthenticated,
    /// Any other.
    Other(u16),
}

impl Code {
    pub fn number(self) -> u16 {
        match self {
            Self::Ok => 0,
            Self::Unknown => 2,
            Self::InvalidArgument => 3,
            Self::PermissionDenied => 7,
            Self::Unimplemented => 12,
            Self::Internal => 13,
            Self::Unavailable => 14,
            Self::Unauthenticated => 16,
            Self::Other(n) => n,
        }
    }

    fn from_number(n: u16) -> Self {
        let known = [Self::Ok, Self::Unknown, Self::InvalidArgument, Self::PermissionDenied, Self::Unimplemented, Self::Internal];
        let known = known.into_iter().chain([Self::Unavailable, Self::Unauthenticated]);
        known.into_iter().find(|c| c.number() == n).unwrap_or(Self::Other(n))
    }
}

/// How a call ended, when not well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Status {
    pub code: Code,
    pub message: String,
}

impl Status {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.code, self.message)
    }
}

/// A message: not compressed, its length, itself.
pub fn frame(message: &impl Message) -> Vec<u8> {
    let mut out = vec![0; 5];
    // A Vec grows as long as there is memory.
    message.encode_raw(&mut out);
    let length = u32::try_from(out.len() - 5).unwrap_or(u32::MAX);
    out[1..5].copy_from_slice(&length.to_be_bytes());
    out
}

/// The message of a frame.
pub fn unframe<M: Message + Default>(data: &[u8]) -> Option<M> {
    let (head, rest) = data.split_at_checked(5)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    let body = rest.get(..usize::try_from(length).ok()?)?;
    if head[0] == 0 { M::decode(body).ok() } else { None }
}

async fn collect(mut body: RecvStream) -> Result<(Bytes, HeaderMap), Status> {
    let mut data = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|e| Status::new(Code::Unavailable, e.to_string()))?;
        // Fails only when the stream is gone, and then the next read says so.
        let _ = body.flow_control().release_capacity(chunk.len());
        if data.len() + chunk.len() > MAX_MESSAGE {
            return Err(Status::new(Code::InvalidArgument, format!("a message of more than {MAX_MESSAGE} bytes")));
        }
        data.extend_from_slice(&chunk);
    }
    let trailers = poll_fn(|cx| body.poll_trailers(cx)).await.map_err(|e| Status::new(Code::Unavailable, e.to_string()))?;
    Ok((data.freeze(), trailers.unwrap_or_default()))
}

/// Makes one call over a connection of its own.
pub async fn call<Q, A, T>(io: T, authority: &str, path: &str, metadata: HeaderMap, question: &Q) -> Result<A, Status>
where
    Q: Message,
    A: Message + Default,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broken = |e: h2::Error| Status::new(Code::Unavailable, e.to_string());
    let (send, connection) = h2::client::handshake(io).await.map_err(broken)?;
    let driver = tokio::spawn(connection);
    let answer = async {
        let mut send = send.ready().await.map_err(broken)?;
        let request = Request::builder().method(Method::POST).uri(format!("https://{authority}{path}"));
        let mut request = request.body(()).map_err(|e| Status::new(Code::Internal, e.to_string()))?;
        *request.headers_mut() = metadata;
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
        let (response, mut stream) = send.send_request(request, false).map_err(broken)?;
        stream.send_data(frame(question).into(), true).map_err(broken)?;
        let (parts, body) = response.await.map_err(broken)?.into_parts();
        let (data, trailers) = collect(body).await?;
        let field = |name: &str| trailers.get(name).or_else(|| parts.headers.get(name)).and_then(|v| v.to_str().ok());
        match field("grpc-status").and_then(|s| s.parse().ok()) {
            Some(0) => unframe(&data).ok_or_else(|| Status::new(Code::Internal, "the answer is no message")),
            Some(code) => Err(Status::new(Code::from_number(code), decoded(field("grpc-message").unwrap_or_default()))),
            None => Err(Status::new(Code::Unknown, format!("HTTP status {} and no grpc-status", parts.status))),
        }
    };
    let answer = answer.await;
    driver.abort();
    answer
}

/// Percent-decoding of `grpc-message`.
fn decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = (*first == b'%').then(|| after.get(..2)).flatten().and_then(|h| std::str::from_utf8(h).ok());
        if let Some(byte) = hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            out.push(byte);
            rest = &after[2..];
        } else {
            out.push(*first);
            rest = after;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Percent-encodes what a `grpc-message` may not hold.
pub fn encoded(text: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    for &byte in text {
        if (0x20..0x7f).contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// A call as it arrives.
#[derive(Debug)]
pub struct Incoming {
    pub path: String,
    pub metadata: HeaderMap,
    pub message: Bytes,
}

/// Serves calls on one connection until it ends.
pub async fn serve<T, H, F>(io: T, answer: Arc<H>) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Incoming) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Vec<u8>, Status>> + Send,
{
    let mut builder = h2::server::Builder::new();
    builder.max_concurrent_streams(64).max_header_list_size(64 * 1024);
    let handshake = timeout(REQUEST_TIMEOUT, builder.handshake(io)).await.map_err(|_| io::ErrorKind::TimedOut)?;
    let mut connection = handshake.map_err(io::Error::other)?;
    let (under_way, mut leaving) = (Arc::new(()), false);
    loop {
        let Ok(accepted) = timeout(IDLE_TIMEOUT, connection.accept()).await else {
            match (Arc::strong_count(&under_way), leaving) {
                (1, false) => {
                    connection.graceful_shutdown();
                    leaving = true;
                }
                // It does not take the hint.
                (1, true) => return Ok(()),
                _ => {}
            }
            continue;
        };
        let Some(accepted) = accepted else { return Ok(()) };
        let (request, respond) = accepted.map_err(io::Error::other)?;
        let (answer, one_more) = (answer.clone(), under_way.clone());
        tokio::spawn(async move {
            let told = timeout(REQUEST_TIMEOUT, one(request, &*answer)).await;
            respond_with(respond, told.unwrap_or_else(|_| Err(Status::new(Code::Unavailable, "it took too long"))));
            drop(one_more);
        });
    }
}

async fn one<H, F>(request: Request<RecvStream>, answer: &H) -> Result<Vec<u8>, Status>
where
    H: Fn(Incoming) -> F,
    F: Future<Output = Result<Vec<u8>, Status>>,
{
    let (parts, body) = request.into_parts();
    if parts.method != Method::POST {
        return Err(Status::new(Code::Unimplemented, "only POST is gRPC"));
    }
    let (message, _) = collect(body).await?;
    answer(Incoming { path: parts.uri.path().to_owned(), metadata: parts.headers, message }).await
}

fn respond_with(mut respond: SendResponse<Bytes>, told: Result<Vec<u8>, Status>) {
    let mut response = Response::new(());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let (data, status) = match told {
        Ok(data) => (Some(data), Status::new(Code::Ok, "")),
        Err(status) => (None, status),
    };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.code.number().into());
    if let Ok(message) = HeaderValue::from_str(&encoded(status.message.as_bytes())) {
        trailers.insert("grpc-message", message);
    }
    // A client that is gone needs no answer.
    let Ok(mut stream) = respond.send_response(response, false) else { return };
    if let Some(data) = data {
        let _ = stream.send_data(data.into(), false);
    }
    let _ = stream.send_trailers(trailers);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct Text {
        #[prost(string, tag = "1")]
        text: String,
    }

    #[tokio::test]
    async fn calls_are_answered_and_refused_with_their_words() {
        for (path, expected) in [
            ("/a.B/Echo", Ok("hello".to_owned())),
            ("/a.B/Fail", Err(Status::new(Code::PermissionDenied, "no: 100 % nö"))),
            ("/a.B/None", Err(Status::new(Code::Unimplemented, "none"))),
        ] {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let answer = |incoming: Incoming| async move {
                match incoming.path.as_str() {
                    "/a.B/Echo" => Ok(incoming.message.to_vec()),
                    "/a.B/Fail" => Err(Status::new(Code::PermissionDenied, "no: 100 % nö")),
                    _ => Err(Status::new(Code::Unimplemented, "none")),
                }
            };
            let server = tokio::spawn(async move { serve(far, Arc::new(answer)).await });
            let told = call::<_, Text, _>(near, "ca", path, HeaderMap::new(), &Text { text: "hello".into() }).await;
            assert_eq!(told.map(|t| t.text), expected, "{path}");
            server.abort();
        }
    }
    #[tokio::test(start_paused = true)]
    async fn who_asks_nothing_loses_its_place() {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let answer = |_: Incoming| async move { Err::<Vec<u8>, _>(Status::new(Code::Unimplemented, "none")) };
        let server = tokio::spawn(async move { serve(far, Arc::new(answer)).await });
        let (send, connection) = h2::client::handshake(near).await.expect("handshake");
        let client = tokio::spawn(connection);
        timeout(IDLE_TIMEOUT * 2, client).await.expect("it is told to go").expect("no panic").expect("in order");
        timeout(IDLE_TIMEOUT * 2, server).await.expect("it ends").expect("no panic").ok();
        drop(send);
        // One that says hello and nothing else, to nothing.
        let (mut near, far) = tokio::io::duplex(64 * 1024);
        let server = tokio::spawn(async move { serve(far, Arc::new(answer)).await });
        tokio::io::AsyncWriteExt::write_all(&mut near, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("written");
        timeout(IDLE_TIMEOUT * 3, server).await.expect("it ends").expect("no panic").expect("in order");
    }
}
