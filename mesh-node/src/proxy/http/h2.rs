//! HTTP/2 streams, either end, and the server end of a connection.

mod errors;
mod head;
mod refused;

use std::{
    future::{Future, poll_fn},
    io,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use tokio::io::{AsyncRead, AsyncWrite};

use self::refused::{Refused, Watched};
pub use self::{
    errors::{into_io, is_connection, is_remote, is_too_much, is_unprocessed, reason},
    head::{is_ambiguous, list_size, request_head, wire_request},
};
use super::{
    body::{BodyError, Closed, FrameSink, FrameSource, RequestBody, Responder, ResponseHead},
    date,
    framing::{Frame, Out, checked_trailers},
    meter::Meter,
    wire::{Framing, MAX_HEAD, Malformed},
};

/// What one stream may have in flight, and all streams of a connection: as much as all of them may have, or a few that nobody reads
/// would hold up the others.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;
pub const MAX_STREAMS: u32 = 1024;
/// Streams a server is taken to take at a time before it has said how many; what stands for that where it is waited for.
const USUAL_STREAMS: usize = 100;
const UNTOLD: usize = 1_000_003;
/// How long it is waited for that; it is the first thing a server says.
const SETTLES: Duration = Duration::from_millis(200);
const MAX_FRAME: u32 = 64 * 1024;
/// What the library is told that a head or trailers may have: of what is larger it loses the rest without a word, and it takes no more
/// frames of one than that needs, so that it is far above what is let through ([`MAX_HEAD`]).
const HEADER_LIST: u32 = 16 * 60 * 1024;
const SEND_BUFFER: usize = 256 * 1024;
/// Streams a client may reset before they have been served. Beyond it the connection ends: a flood of resets must not cost more than it
/// pays (CVE-2023-44487).
const RESET_STREAMS: usize = 200;
/// Streams reset here that are remembered, and how long: what still comes for others ends the connection, if it is a head or trailers.
const REMEMBERED: usize = 1024;
const RESET_MEMORY: Duration = Duration::from_secs(30);
/// Streams that the peer may have reset here by breaking the protocol in a connection's life. Frames that come late for streams forgotten
/// since are among them, so that the library's thousand would end connections whose clients cancel much.
const ERROR_RESETS: usize = 65_536;
/// How much small frames of data may cost that wait for who reads them: each what it has less than 256 bytes. The library's share of the
/// window is used up by a few clients of many small messages that do not read.
const SMALL_FRAMES: usize = 64 * 1024 * 1024;
/// Fields of which there may be only one (RFC 9110 sections 7.2 and 8.6).
const AMBIGUOUS: Malformed = Malformed::codec("http2.violation.of.messaging.rule");
/// What is said of trailers that are too large.
const TOO_MUCH: Reason = Reason::ENHANCE_YOUR_CALM;
/// Between the last of an answer that is cut and the reset of its stream.
const BEFORE_RESET: Duration = Duration::from_millis(5);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The receiving direction of a stream.
#[derive(Debug)]
pub struct H2Source {
    stream: RecvStream,
    /// Bytes whose window has not been given back.
    held: usize,
    ended: bool,
    framing: Framing,
    meter: Meter,
}

impl H2Source {
    pub fn new(stream: RecvStream, headers: &HeaderMap) -> Self {
        let ended = stream.is_end_stream();
        let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
        let framing = match (ended, length) {
            (true, _) => Framing::Empty,
            (false, Some(n)) => Framing::Length(n),
            (false, None) => Framing::Chunked,
        };
        Self { stream, held: 0, ended, framing, meter: Meter::default() }
    }

    pub fn framing(&self) -> Framing {
        self.framing
    }

    fn release(&mut self) {
        // Fails only when the stream is gone, and then there is no window to widen.
        let _ = self.stream.flow_control().release_capacity(std::mem::take(&mut self.held));
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
            Some(Err(error)) => Err(BodyError::Cut(into_io(error))),
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
            Poll::Ready(Some(Err(error))) => Err(BodyError::Cut(into_io(error))),
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
    out: Out,
    trailers: Option<HeaderMap>,
    ended: bool,
    finished: bool,
}

impl H2Sink {
    /// `finished`: the head was the end of it.
    pub fn new(stream: SendStream<Bytes>, finished: bool) -> Self {
        Self { stream, out: Out::default(), trailers: None, ended: finished, finished }
    }

    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    /// Completes when the other end has reset the stream.
    async fn reset_by_peer(&mut self) -> io::Error {
        poll_fn(|cx| self.stream.poll_reset(cx)).await.map_or_else(into_io, |reason| into_io(reason.into()))
    }

    async fn capacity(&mut self, wanted: usize) -> io::Result<usize> {
        self.stream.reserve_capacity(wanted);
        loop {
            let n = self.stream.capacity();
            if n > 0 {
                return Ok(n.min(wanted));
            }
            match poll_fn(|cx| self.stream.poll_capacity(cx)).await {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(into_io(error)),
                None => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
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
            let n = self.capacity(wanted).await?;
            let Some(part) = self.out.first().map(|p| p.split_to(n.min(p.len()))) else { break };
            let last = self.ended && self.trailers.is_none() && self.out.is_empty();
            self.stream.send_data(part, last).map_err(into_io)?;
            self.finished |= last;
        }
        if self.ended && !self.finished {
            match self.trailers.take() {
                Some(trailers) => self.stream.send_trailers(trailers),
                None => self.stream.send_data(Bytes::new(), true),
            }
            .map_err(into_io)?;
            self.finished = true;
        }
        Ok(())
    }

    async fn broken(&mut self) -> io::Error {
        if self.finished { std::future::pending().await } else { self.reset_by_peer().await }
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
    sink: Option<H2Sink>,
    head_request: bool,
    /// Asked for before there is a sink.
    ended: bool,
    /// The client has been told to go on.
    continued: bool,
    meter: Meter,
}

impl H2Responder {
    pub fn new(respond: SendResponse<Bytes>, head_request: bool) -> Self {
        Self { respond, sink: None, head_request, ended: false, continued: false, meter: Meter::default() }
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
        self.sink = Some(H2Sink::new(stream, empty));
        Ok(())
    }

    async fn gone(&mut self) -> io::Error {
        match &mut self.sink {
            Some(sink) => sink.reset_by_peer().await,
            None => poll_fn(|cx| self.respond.poll_reset(cx)).await.map_or_else(into_io, |reason| into_io(reason.into())),
        }
    }
}

/// A stream as accepted.
pub type Accepted = (Request<RecvStream>, SendResponse<Bytes>);

/// Says of a stream that nothing has been done, so that it can be asked for elsewhere.
pub fn turn_away(accepted: Accepted) {
    let (_, mut respond) = accepted;
    respond.send_reset(Reason::REFUSED_STREAM);
}

/// Serves one connection until it ends. Every stream goes to `on_stream`, which must not wait; none stands for a
/// request that broke the protocol, and has been refused.
///
/// When `drain` completes, the client is told to go elsewhere (GOAWAY); open streams go on to their end.
/// `streams`: how many there may be at a time.
pub async fn serve<T>(
    io: T,
    streams: u32,
    mut on_stream: impl FnMut(Option<Accepted>),
    drain: impl Future<Output = ()>,
) -> Result<(), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(streams)
        .max_frame_size(MAX_FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_reset_streams(REMEMBERED)
        .max_pending_accept_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(SMALL_FRAMES)
        .reset_stream_duration(RESET_MEMORY);
    let refused = Arc::new(Refused::default());
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, builder.handshake(Watched::new(io, refused.clone()))).await;
    let Ok(handshake) = handshake else { return Err(Reason::SETTINGS_TIMEOUT.into()) };
    let mut connection = handshake?;
    let mut drain = std::pin::pin!(drain);
    let mut draining = false;
    loop {
        let accepted = poll_fn(|cx| {
            let polled = connection.poll_accept(cx);
            if let Poll::Ready(Some(Ok((_, respond)))) = &polled {
                refused.accepted(respond.stream_id().into());
            }
            // Of what has come, nothing else is accepted when there is nothing to accept.
            let settled = !matches!(polled, Poll::Ready(Some(Ok(_))));
            let broken = matches!(&polled, Poll::Ready(Some(Err(error))) if error.is_library());
            (0..refused.take(settled, broken)).for_each(|_| on_stream(None));
            polled
        });
        tokio::select! {
            biased;
            () = &mut drain, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            accepted = accepted => match accepted {
                Some(accepted) => on_stream(Some(accepted?)),
                None => return Ok(()),
            }
        }
    }
}

/// The client end of a connection, to open streams on.
pub struct Opened {
    pub send: h2::client::SendRequest<Bytes>,
    /// Must be driven for anything to happen.
    pub connection: Box<dyn Future<Output = Result<(), h2::Error>> + Send + Unpin>,
}

/// Opens a connection on which streams may be opened at once.
pub async fn connect<T>(io: T) -> Result<Opened, h2::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    connect_with(io, USUAL_STREAMS).await
}

/// Opens one to be [settled](Opened::settle).
pub async fn connect_to_settle<T>(io: T) -> Result<Opened, h2::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    connect_with(io, UNTOLD).await
}

async fn connect_with<T>(io: T, streams: usize) -> Result<Opened, h2::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_reset_streams(REMEMBERED)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(SMALL_FRAMES)
        .reset_stream_duration(RESET_MEMORY)
        .initial_max_send_streams(streams)
        .enable_push(false);
    let (send, connection) = builder.handshake(io).await?;
    Ok(Opened { send, connection: Box::new(connection) })
}

/// How many streams a connection takes at a time.
pub fn most_streams(send: &h2::client::SendRequest<Bytes>) -> u32 {
    match send.current_max_send_streams() {
        UNTOLD => MAX_STREAMS,
        most => u32::try_from(most).unwrap_or(MAX_STREAMS).min(MAX_STREAMS),
    }
}

impl Opened {
    /// Waits until the application has said how many streams it takes at a time, or for a moment. An error is its end.
    pub async fn settle(&mut self) -> Result<(), h2::Error> {
        let Self { send, connection } = self;
        let settled = poll_fn(|cx| match std::pin::Pin::new(&mut *connection).poll(cx) {
            Poll::Ready(ended) => Poll::Ready(ended),
            Poll::Pending if send.current_max_send_streams() != UNTOLD => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        });
        tokio::time::timeout(SETTLES, settled).await.unwrap_or(Ok(()))
    }
}
