//! HTTP/2 streams, either end, and connections of them.

mod answers;
mod connection;
mod errors;
mod frames;
mod head;
mod refused;
mod unsent;

use std::{future::poll_fn, io, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};

pub use self::{
    answers::Ended,
    connection::{Accepted, MAX_STREAMS, connect, connect_to_settle, most_streams, serve, turn_away},
    errors::{into_io, is_connection, is_remote, is_too_much, is_unprocessed, reason},
    head::{is_ambiguous, list_size, request_head, wire_request},
    unsent::{Share, Unsent},
};
use super::{
    body::{BodyError, Closed, FrameSink, FrameSource, RequestBody, Responder, ResponseHead},
    date,
    framing::{Frame, Out, checked_trailers},
    meter::Meter,
    wire::{Framing, MAX_HEAD, Malformed},
};
use crate::hbone::tunnel::capacity;

/// What one stream may have in flight.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Fields of which there may be only one (RFC 9110 sections 7.2 and 8.6).
const AMBIGUOUS: Malformed = Malformed::codec("http2.violation.of.messaging.rule");
/// What is said of trailers that are too large.
const TOO_MUCH: Reason = Reason::ENHANCE_YOUR_CALM;
/// Between the last of an answer that is cut and the reset of its stream.
const BEFORE_RESET: Duration = Duration::from_millis(5);

/// The receiving direction of a stream.
#[derive(Debug)]
pub struct H2Source {
    stream: RecvStream,
    /// Bytes whose window has not been given back.
    held: usize,
    ended: bool,
    framing: Framing,
    meter: Meter,
    /// Of an answer: which have come whole.
    whole: Option<Arc<Ended>>,
}

impl H2Source {
    /// An answer.
    pub fn answer(stream: RecvStream, headers: &HeaderMap, whole: Arc<Ended>) -> Self {
        Self { whole: Some(whole), ..Self::new(stream, headers) }
    }

    pub fn new(stream: RecvStream, headers: &HeaderMap) -> Self {
        let ended = stream.is_end_stream();
        let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
        let framing = match (ended, length) {
            (true, _) => Framing::Empty,
            (false, Some(n)) => Framing::Length(n),
            (false, None) => Framing::Chunked,
        };
        Self { stream, held: 0, ended, framing, meter: Meter::default(), whole: None }
    }

    pub fn framing(&self) -> Framing {
        self.framing
    }

    fn release(&mut self) {
        // Fails only when the stream is gone, and then there is no window to widen.
        let _ = self.stream.flow_control().release_capacity(std::mem::take(&mut self.held));
    }

    /// What ends with its connection has ended before, if all of it has come; not where what has come is what ended that.
    fn broke(&mut self, error: h2::Error) -> Result<Option<Frame>, BodyError> {
        let by_itself = error.is_io() || error.is_go_away() && error.is_remote();
        if !by_itself || !self.whole.as_ref().is_some_and(|whole| whole.has(self.stream.stream_id().into())) {
            return Err(BodyError::Cut(into_io(error)));
        }
        self.ended = true;
        Ok(None)
    }

    fn taken(&mut self, data: Bytes) -> Frame {
        self.held += data.len();
        self.ended = self.stream.is_end_stream();
        let frame = Frame::Data(data);
        self.meter.see(&frame);
        frame
    }
}

impl FrameSource for H2Source {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        self.release();
        if self.ended {
            return Ok(None);
        }
        match poll_fn(|cx| self.stream.poll_data(cx)).await {
            Some(Ok(data)) => Ok(Some(self.taken(data))),
            Some(Err(error)) => self.broke(error),
            None => {
                let trailers = poll_fn(|cx| self.stream.poll_trailers(cx)).await.map_err(|e| BodyError::Cut(into_io(e)))?;
                if trailers.as_ref().is_some_and(|trailers| list_size(trailers) > MAX_HEAD) {
                    return Err(BodyError::Cut(into_io(TOO_MUCH.into())));
                }
                self.ended = true;
                let frame = trailers.map(|trailers| Frame::Trailers(checked_trailers(trailers)));
                if let Some(frame) = &frame {
                    self.meter.see(frame);
                }
                Ok(frame)
            }
        }
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        if self.ended || self.held > STREAM_WINDOW as usize / 2 {
            return Ok(None);
        }
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        match self.stream.poll_data(&mut cx) {
            Poll::Ready(Some(Ok(data))) => Ok(Some(self.taken(data))),
            // Whatever else there is is found when it is waited for.
            Poll::Ready(Some(Err(error))) => self.broke(error),
            Poll::Ready(None) | Poll::Pending => Ok(None),
        }
    }

    fn is_end(&self) -> bool {
        self.ended
    }
}

impl RequestBody for H2Source {
    fn framing(&self) -> Framing {
        self.framing
    }

    fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }

    async fn closed(&mut self) -> Closed {
        self.release();
        // A reset is seen by the responder.
        std::future::pending().await
    }

    fn become_raw(&mut self) {}
}

/// The sending direction of a stream.
#[derive(Debug)]
pub struct H2Sink {
    stream: SendStream<Bytes>,
    /// Of the connection to a client, and what the stream is there.
    unsent: Option<(Arc<Unsent>, u32)>,
    /// Set aside there for what is read next.
    share: Option<Share>,
    out: Out,
    trailers: Option<HeaderMap>,
    ended: bool,
    finished: bool,
}

impl H2Sink {
    /// `finished`: the head was the end of it.
    pub fn new(stream: SendStream<Bytes>, finished: bool) -> Self {
        Self { stream, unsent: None, share: None, out: Out::default(), trailers: None, ended: finished, finished }
    }

    /// Of a connection to a client.
    fn to_client(stream: SendStream<Bytes>, finished: bool, unsent: Arc<Unsent>) -> Self {
        let id = stream.stream_id().into();
        let mut sink = Self::new(stream, finished);
        sink.unsent = Some((unsent, id));
        sink
    }

    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    /// Completes when the other end has reset the stream.
    async fn reset_by_peer(&mut self) -> io::Error {
        poll_fn(|cx| self.stream.poll_reset(cx)).await.map_or_else(into_io, |reason| into_io(reason.into()))
    }
}

impl FrameSink for H2Sink {
    fn push(&mut self, frame: Frame) {
        match frame {
            Frame::Data(data) => self.out.push(data),
            Frame::Trailers(trailers) => self.trailers = Some(trailers),
        }
    }

    fn end(&mut self) {
        self.ended = true;
    }

    fn has_ended(&self) -> bool {
        self.ended
    }

    fn is_flushed(&self) -> bool {
        self.out.is_empty() && (!self.ended || self.finished)
    }

    async fn flush(&mut self) -> io::Result<()> {
        while let Some(wanted) = self.out.first().map(|p| p.len()) {
            let n = capacity(&mut self.stream, wanted).await?;
            let Some(part) = self.out.first().map(|p| p.split_to(n.min(p.len()))) else { break };
            let last = self.ended && self.trailers.is_none() && self.out.is_empty();
            // Before it is sent, which may be at once.
            if let Some((unsent, id)) = &self.unsent {
                unsent.add(*id, part.len());
                self.share = None;
            }
            if let Err(error) = self.stream.send_data(part, last) {
                if let Some((unsent, id)) = &self.unsent {
                    unsent.forget(*id);
                }
                return Err(into_io(error));
            }
            self.finished |= last;
        }
        if self.ended && !self.finished {
            self.share = None;
            match self.trailers.take() {
                Some(trailers) => self.stream.send_trailers(trailers),
                None => self.stream.send_data(Bytes::new(), true),
            }
            .map_err(into_io)?;
            self.finished = true;
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.share.is_some() || self.unsent.as_ref().is_none_or(|(unsent, _)| unsent.has_room())
    }

    async fn room(&mut self) -> io::Result<()> {
        let Some((unsent, _)) = self.unsent.clone().filter(|_| self.share.is_none()) else { return Ok(()) };
        let share = tokio::select! {
            biased;
            share = unsent.room() => share,
            error = self.broken() => return Err(error),
        };
        self.share = Some(share);
        Ok(())
    }

    fn give_back(&mut self) {
        self.share = None;
    }

    async fn broken(&mut self) -> io::Error {
        if self.finished { std::future::pending().await } else { self.reset_by_peer().await }
    }
}

impl Drop for H2Sink {
    fn drop(&mut self) {
        let Some((unsent, id)) = &self.unsent else { return };
        // What is dropped unfinished is reset; what was reset may have been given more since.
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        if !self.finished || self.stream.poll_reset(&mut cx).is_ready() {
            unsent.forget(*id);
        }
    }
}

/// What has become of who has opened a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    There,
    /// The stream was reset, by the client, or here because it broke the protocol.
    Reset(Reason),
    /// The connection is over.
    Gone,
}

/// Answers on a stream.
pub struct H2Responder {
    respond: SendResponse<Bytes>,
    unsent: Arc<Unsent>,
    sink: Option<H2Sink>,
    head_request: bool,
    /// Asked for before there is a sink.
    ended: bool,
    /// The client has been told to go on.
    continued: bool,
    meter: Meter,
}

impl H2Responder {
    pub fn new(respond: SendResponse<Bytes>, head_request: bool, unsent: Arc<Unsent>) -> Self {
        Self { respond, unsent, sink: None, head_request, ended: false, continued: false, meter: Meter::default() }
    }

    /// Ends the stream unfinished. What has been said on it so far is let go first, as far as the client takes it: a reset drops what
    /// the library has not written yet.
    pub async fn reset(&mut self, reason: Reason) {
        if self.sink.is_some() {
            tokio::time::sleep(BEFORE_RESET).await;
        }
        self.respond.send_reset(reason);
    }

    pub fn is_complete(&self) -> bool {
        self.sink.as_ref().is_some_and(|s| s.finished)
    }

    /// Whether there is a client on the stream.
    pub fn client(&mut self) -> Client {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        let polled = match &mut self.sink {
            Some(sink) => sink.stream.poll_reset(&mut cx),
            None => self.respond.poll_reset(&mut cx),
        };
        match polled {
            Poll::Ready(Ok(reason)) => Client::Reset(reason),
            Poll::Ready(Err(_)) => Client::Gone,
            Poll::Pending => Client::There,
        }
    }
}

impl FrameSink for H2Responder {
    fn push(&mut self, frame: Frame) {
        if let Some(sink) = &mut self.sink {
            self.meter.see(&frame);
            sink.push(frame);
        }
    }

    fn end(&mut self) {
        self.ended = true;
        if let Some(sink) = &mut self.sink {
            sink.end();
        }
    }

    fn has_ended(&self) -> bool {
        self.sink.as_ref().map_or(self.ended, FrameSink::has_ended)
    }

    fn is_flushed(&self) -> bool {
        self.sink.as_ref().is_none_or(FrameSink::is_flushed)
    }

    async fn flush(&mut self) -> io::Result<()> {
        match &mut self.sink {
            Some(sink) => sink.flush().await,
            None => Ok(()),
        }
    }

    fn give_back(&mut self) {
        if let Some(sink) = &mut self.sink {
            sink.give_back();
        }
    }

    fn has_room(&self) -> bool {
        self.sink.as_ref().is_none_or(FrameSink::has_room)
    }

    async fn room(&mut self) -> io::Result<()> {
        match &mut self.sink {
            Some(sink) => sink.room().await,
            None => Ok(()),
        }
    }

    async fn broken(&mut self) -> io::Error {
        match &mut self.sink {
            Some(sink) => sink.broken().await,
            None => std::future::pending().await,
        }
    }
}

impl Responder for H2Responder {
    const RESETS_APART: bool = true;

    fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }

    fn is_head(&self) -> bool {
        self.head_request
    }

    async fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> io::Result<()> {
        if status == StatusCode::CONTINUE && std::mem::replace(&mut self.continued, true) {
            return Ok(());
        }
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        self.respond.send_informational(response).map_err(into_io)
    }

    fn start(&mut self, head: ResponseHead, _close: bool) -> io::Result<()> {
        let ResponseHead { status, mut headers, framing } = head;
        self.meter.see_status(&headers);
        if let Framing::Length(n) = framing {
            headers.entry(header::CONTENT_LENGTH).or_insert_with(|| n.into());
        }
        if !headers.contains_key(header::DATE)
            && let Ok(date) = date::now(HeaderValue::from_str)
        {
            headers.insert(header::DATE, date);
        }
        let empty = self.head_request || framing == Framing::Empty || matches!(status.as_u16(), 204 | 304);
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        let stream = self.respond.send_response(response, empty).map_err(into_io)?;
        self.sink = Some(H2Sink::to_client(stream, empty, self.unsent.clone()));
        Ok(())
    }

    async fn gone(&mut self) -> io::Error {
        match &mut self.sink {
            Some(sink) => sink.reset_by_peer().await,
            None => poll_fn(|cx| self.respond.poll_reset(cx)).await.map_or_else(into_io, |reason| into_io(reason.into())),
        }
    }
}
