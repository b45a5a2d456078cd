//! Answers the proxy gives itself: their words, headers and statuses are Envoy's.

use std::borrow::Cow;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::{
    body::{Responder, ResponseHead},
    framing::Frame,
    wire::Framing,
};
use crate::{grpc, route::retry::Reset};

/// An answer, before it is known how it is told.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub body: Cow<'static, str>,
    pub headers: HeaderMap,
    /// Overrides what the status means in gRPC.
    pub grpc_status: Option<u16>,
    /// A body given by configuration goes out as it is, to gRPC clients too.
    pub verbatim: Option<Bytes>,
}

/// No attempt was made, as too much is under way.
pub static OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");

impl Reply {
    pub fn new(status: StatusCode, body: impl Into<Cow<'static, str>>) -> Self {
        Self { status, body: body.into(), headers: HeaderMap::new(), grpc_status: None, verbatim: None }
    }

    /// For an upstream that failed before it answered.
    pub fn reset(reset: Reset, retried: bool) -> Self {
        if reset == Reset::PerTryTimeout {
            return Self::timeout();
        }
        let status = if reset == Reset::ProtocolError { StatusCode::BAD_GATEWAY } else { StatusCode::SERVICE_UNAVAILABLE };
        let which = if retried { "retried and the latest reset reason" } else { "reset reason" };
        let reason = reason(reset);
        let mut reply = Self::new(status, format!("upstream connect error or disconnect/reset before headers. {which}: {reason}"));
        if reset == Reset::Overflow {
            reply.headers.insert(OVERLOADED.clone(), HeaderValue::from_static("true"));
        }
        reply
    }

    pub fn timeout() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "upstream request timeout")
    }

    /// As HTTP, or as gRPC tells errors: status 200 and the real one in headers; to a HEAD without what would be the body.
    pub fn into_parts(self, grpc: bool, is_head: bool) -> (StatusCode, HeaderMap, Bytes) {
        let Self { status, body, mut headers, grpc_status, verbatim } = self;
        if let Some(body) = verbatim {
            // RFC 9110 section 15.3.5: there is none.
            let body = if status == StatusCode::NO_CONTENT { Bytes::new() } else { body };
            if !body.is_empty() {
                headers.entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
            }
            return (status, headers, body);
        }
        if grpc {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(HeaderName::from_static("grpc-status"), grpc_status.unwrap_or_else(|| grpc_code(status)).into());
            if !body.is_empty()
                && !is_head
                && let Ok(message) = HeaderValue::from_str(&grpc::encoded(body.as_bytes()))
            {
                headers.insert(HeaderName::from_static("grpc-message"), message);
            }
            return (StatusCode::OK, headers, Bytes::new());
        }
        let status = if grpc_status.is_some() { StatusCode::OK } else { status };
        if !body.is_empty() {
            headers.entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
        }
        (status, headers, body.into_owned().into())
    }

    /// Puts the answer on its way. `change` sees the status and the headers last.
    pub fn start(
        self,
        grpc: bool,
        close: bool,
        responder: &mut impl Responder,
        change: impl FnOnce(StatusCode, &mut HeaderMap),
    ) -> std::io::Result<StatusCode> {
        let (status, mut headers, body) = self.into_parts(grpc, responder.is_head());
        let length = body.len() as u64;
        let framing = if length == 0 { Framing::Empty } else { Framing::Length(length) };
        if length > 0 {
            headers.insert(header::CONTENT_LENGTH, length.into());
        }
        change(status, &mut headers);
        responder.start(ResponseHead { status, headers, framing }, close)?;
        if !responder.has_ended() {
            responder.push(Frame::Data(body));
            responder.end();
        }
        Ok(status)
    }
}

/// Envoy's words.
pub fn reason(reset: Reset) -> &'static str {
    match reset {
        Reset::ConnectFailure => "remote connection failure",
        Reset::ConnectTimeout => "connection timeout",
        Reset::ConnectionTermination => "connection termination",
        Reset::ProtocolError => "protocol error",
        Reset::RefusedStream => "remote refused stream reset",
        Reset::RemoteReset => "remote reset",
        Reset::Overflow => "overflow",
        Reset::PerTryTimeout => "per try timeout",
    }
}

/// What an HTTP status means in gRPC (the gRPC project's `http-grpc-status-mapping.md`).
pub fn grpc_code(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

/// The HTTP status a gRPC status in a response's headers stands for; outlier detection counts by it.
pub fn http_status_of_grpc(code: &[u8]) -> StatusCode {
    match code {
        b"0" => StatusCode::OK,
        b"1" => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        b"3" | b"9" | b"11" => StatusCode::BAD_REQUEST,
        b"4" => StatusCode::GATEWAY_TIMEOUT,
        b"5" => StatusCode::NOT_FOUND,
        b"6" | b"10" => StatusCode::CONFLICT,
        b"7" => StatusCode::FORBIDDEN,
        b"8" => StatusCode::TOO_MANY_REQUESTS,
        b"12" => StatusCode::NOT_IMPLEMENTED,
        b"14" => StatusCode::SERVICE_UNAVAILABLE,
        b"16" => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
