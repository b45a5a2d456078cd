//! The two ways of an exchange with an endpoint: the request to it, and the response back.

use std::{
    borrow::Cow,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use h2::{Reason, RecvStream, client::ResponseFuture};
use http::{HeaderValue, Method, StatusCode};

use super::super::{
    body::{BodyError, FrameSink, FrameSource},
    framing::Frame,
    h1::{H1Sink, NoHead, Reader},
    h2::{self as ours, Ended, H2Sink, H2Source},
    wire::{self, Framing, WireResponse},
};
use crate::route::{
    request::{RequestHead, take_off},
    retry::Reset,
};

/// Where a request goes.
pub enum UpSink<'a> {
    H1(H1Sink<'a>),
    H2(H2Sink),
}

/// Where its response comes from.
pub enum UpSource<'a> {
    H1(Reader<'a>),
    /// `whole`: which of the connection's answers have come whole.
    H2 {
        response: Pin<Box<ResponseFuture>>,
        body: Option<H2Source>,
        whole: Arc<Ended>,
        /// Bytes that its head may have.
        most: usize,
    },
}

/// Why an exchange on a connection failed before there was a response: what it counts as, and more for the details.
#[derive(Debug)]
pub struct Failed {
    pub reset: Reset,
    pub detail: Cow<'static, str>,
    /// There was an interim answer.
    pub begun: bool,
    /// The upstream ended the connection in order, without a word.
    pub orderly: bool,
    /// The connection had been kept from an earlier exchange: its end may have nothing to do with this one.
    pub kept: bool,
}

impl Failed {
    pub fn new(reset: Reset) -> Self {
        Self { reset, detail: Cow::Borrowed(""), begun: false, orderly: false, kept: false }
    }

    fn of_h2(error: &io::Error) -> Self {
        Self::new(match ours::reason(error) {
            _ if ours::is_unprocessed(error) => Reset::RefusedStream,
            _ if ours::is_connection(error) => Reset::ConnectionTermination,
            Some(Reason::REFUSED_STREAM) => Reset::RefusedStream,
            Some(Reason::PROTOCOL_ERROR) => Reset::ProtocolError,
            // What another node says of its application's.
            Some(Reason::CONNECT_ERROR) => Reset::ConnectionTermination,
            _ if ours::is_remote(error) || ours::is_too_much(error) => Reset::RemoteReset,
            _ => Reset::ProtocolError,
        })
    }
}

impl UpSink<'_> {
    /// Puts an HTTP/1 request's head on its way.
    pub fn begin(&mut self, head: &RequestHead, framing: Framing, upgrade: Option<&HeaderValue>, client_cert: Option<&HeaderValue>) {
        if let Self::H1(sink) = self {
            let mut bytes = Vec::with_capacity(512);
            wire::write_request(head, framing, upgrade, client_cert, &mut bytes);
            sink.begin(bytes, framing);
        }
    }

    /// Whether another node says, in time, that nothing of the request has gone on.
    pub async fn is_refused(&mut self) -> bool {
        match self {
            Self::H1(sink) => sink.is_refused().await,
            Self::H2(_) => false,
        }
    }

    /// Whether it can be said that the client will send no more, apart from that its request has ended.
    pub fn can_half_close(&self) -> bool {
        matches!(self, Self::H1(_))
    }

    /// Passes on that the client will send no more.
    pub async fn half_close(&mut self) {
        if let Self::H1(sink) = self {
            // An upstream that is gone shows when its answer is read.
            let _ = sink.shutdown().await;
        }
    }

    pub fn become_raw(&mut self) {
        if let Self::H1(sink) = self {
            sink.become_raw();
        }
    }
}

impl FrameSink for UpSink<'_> {
    fn push(&mut self, frame: Frame) {
        match self {
            Self::H1(sink) => sink.push(frame),
            Self::H2(sink) => sink.push(frame),
        }
    }

    fn end(&mut self) {
        match self {
            Self::H1(sink) => sink.end(),
            Self::H2(sink) => sink.end(),
        }
    }

    fn has_ended(&self) -> bool {
        match self {
            Self::H1(sink) => sink.has_ended(),
            Self::H2(sink) => sink.has_ended(),
        }
    }

    fn is_flushed(&self) -> bool {
        match self {
            Self::H1(sink) => sink.is_flushed(),
            Self::H2(sink) => sink.is_flushed(),
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::H1(sink) => sink.flush().await,
            Self::H2(sink) => sink.flush().await,
        }
    }
}

/// The next head of a response: with a body the final one, without it one before that.
fn next_head(
    response: &mut Pin<Box<ResponseFuture>>,
    cx: &mut Context<'_>,
) -> Poll<Result<http::Response<Option<RecvStream>>, ::h2::Error>> {
    if let Poll::Ready(Some(interim)) = response.as_mut().get_mut().poll_informational(cx) {
        return Poll::Ready(interim.map(|head| head.map(|()| None)));
    }
    response.as_mut().poll(cx).map_ok(|head| head.map(Some))
}

impl UpSource<'_> {
    /// `whole`: which of the connection's answers have come whole. `most`: bytes their heads may have.
    pub fn of_stream(response: ResponseFuture, whole: Arc<Ended>, most: usize) -> Self {
        Self::H2 { response: Box::pin(response), body: None, whole, most }
    }

    /// The next head of a response, informational ones among them. Nothing is lost when this is dropped.
    pub async fn head(&mut self, method: &Method) -> Result<WireResponse, Failed> {
        match self {
            Self::H1(reader) => reader.response(method).await.map_err(|no_head| match no_head {
                NoHead::Ended { partial: false } => Failed { orderly: true, ..Failed::new(Reset::ConnectionTermination) },
                NoHead::Broken { partial: false, .. } => Failed::new(Reset::ConnectionTermination),
                // As Envoy has it: a part of a head is a broken one.
                NoHead::Ended { .. } | NoHead::Broken { .. } | NoHead::Refused(_) => Failed::new(Reset::ProtocolError),
            }),
            Self::H2 { response, body, whole, most } => {
                let answered = poll_fn(|cx| next_head(response, cx)).await.map_err(|e| Failed::of_h2(&ours::into_io(e)))?;
                let (mut parts, stream) = answered.into_parts();
                if ours::list_size(&parts.headers) > *most {
                    return Err(Failed::new(Reset::ProtocolError));
                }
                wire::strip_hop_by_hop(&mut parts.headers);
                if ours::is_ambiguous(&parts.headers) {
                    return Err(Failed::new(Reset::ProtocolError));
                }
                let Some(stream) = stream else {
                    take_off(&mut parts.headers, &http::header::CONTENT_LENGTH);
                    return Ok(WireResponse { status: parts.status, headers: parts.headers, framing: Framing::Empty, keep_alive: true });
                };
                if parts.status == StatusCode::NO_CONTENT {
                    take_off(&mut parts.headers, &http::header::CONTENT_LENGTH);
                }
                let source = H2Source::answer(stream, &parts.headers, whole.clone());
                let mut framing = source.framing();
                if method == Method::HEAD || matches!(parts.status.as_u16(), 204 | 304) {
                    framing = Framing::Empty;
                }
                *body = Some(source);
                Ok(WireResponse { status: parts.status, headers: parts.headers, framing, keep_alive: true })
            }
        }
    }

    pub fn become_raw(&mut self) {
        if let Self::H1(reader) = self {
            reader.begin_body(Framing::UntilClose);
        }
    }

    /// What a body that broke off is called in the details of the response.
    pub fn broken_off(&self, error: &BodyError) -> Reset {
        match (self, error) {
            (Self::H1(_), _) | (_, BodyError::Malformed(_) | BodyError::Truncated) => Reset::ProtocolError,
            (Self::H2 { .. }, BodyError::Cut(error)) => Failed::of_h2(error).reset,
        }
    }
}

impl FrameSource for UpSource<'_> {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        match self {
            Self::H1(reader) => reader.frame().await,
            Self::H2 { body: Some(body), .. } => body.frame().await,
            Self::H2 { body: None, .. } => Ok(None),
        }
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        match self {
            Self::H1(reader) => reader.buffered(),
            Self::H2 { body: Some(body), .. } => body.buffered(),
            Self::H2 { body: None, .. } => Ok(None),
        }
    }

    fn is_end(&self) -> bool {
        match self {
            Self::H1(reader) => reader.is_end(),
            Self::H2 { body, .. } => body.as_ref().is_none_or(FrameSource::is_end),
        }
    }
}

/// Whether a status is of a head before the final one.
pub fn is_interim(status: StatusCode) -> bool {
    status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
}
