//! One HTTP/1 connection, either end: reading heads and bodies, writing them.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode, header};

use super::{
    body::{BodyError, Closed, FrameSink, FrameSource, RequestBody, Responder, ResponseHead},
    framing::{Decoder, Encoder, Frame, Out},
    meter::Meter,
    transport::{TransportSink, TransportSource},
    wire::{self, Framing, HeadLimits, Malformed, Refused},
};
use crate::{
    hbone,
    proxy::{ServedPod, pods::Stage},
};

/// How long a client may take to read an answer after which the connection is closed, and what it may still send.
pub const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 16 * 1024 * 1024;

/// What has been read of a connection and not been used.
#[derive(Debug, Default)]
pub struct Unread {
    pub buffer: Bytes,
    /// Bytes whose room has not been given back to the other end.
    held: usize,
    ended: bool,
}

impl From<Bytes> for Unread {
    fn from(buffer: Bytes) -> Self {
        Self { buffer, ..Self::default() }
    }
}

/// The reading half of a connection: heads, and the body after the head last read.
pub struct Reader<'a> {
    source: TransportSource<'a>,
    unread: &'a mut Unread,
    decoder: Decoder,
    framing: Framing,
    meter: Meter,
}

/// Why there is no head.
#[derive(Debug)]
pub enum NoHead {
    /// The connection ended, cleanly or not, with nothing or only part of a head.
    Ended {
        partial: bool,
    },
    Broken {
        partial: bool,
    },
    Refused(Box<Refused>),
}

impl<'a> Reader<'a> {
    pub fn new(source: TransportSource<'a>, unread: &'a mut Unread) -> Self {
        Self { source, unread, decoder: Decoder::new(Framing::Empty), framing: Framing::Empty, meter: Meter::default() }
    }

    /// What follows is a body.
    pub fn begin_body(&mut self, framing: Framing) {
        self.framing = framing;
        self.decoder = Decoder::new(framing);
    }

    /// Reads more into an empty buffer, or joins it to what is there. False at the end.
    async fn fill(&mut self) -> io::Result<bool> {
        if self.unread.ended {
            return Ok(false);
        }
        self.source.passed_on(std::mem::take(&mut self.unread.held));
        let Some(chunk) = self.source.next().await? else {
            self.unread.ended = true;
            return Ok(false);
        };
        self.unread.held = chunk.len();
        let buffer = &mut self.unread.buffer;
        if buffer.is_empty() {
            *buffer = chunk;
        } else {
            let mut joined = BytesMut::with_capacity(buffer.len() + chunk.len());
            joined.extend_from_slice(buffer);
            joined.extend_from_slice(&chunk);
            *buffer = joined.freeze();
        }
        Ok(true)
    }

    /// The bytes of the next head. Nothing is lost when this is dropped.
    async fn head(&mut self, most: usize, sort: Sort) -> Result<Bytes, NoHead> {
        loop {
            let empty = sort.leading(&self.unread.buffer);
            drop(self.unread.buffer.split_to(empty));
            if let Some(end) = wire::head_end(&self.unread.buffer) {
                if end > most {
                    return Err(NoHead::Refused(Malformed::TOO_LARGE.into()));
                }
                return Ok(self.unread.buffer.split_to(end));
            }
            if self.unread.buffer.len() > most {
                return Err(NoHead::Refused(Malformed::TOO_LARGE.into()));
            }
            if sort == Sort::Request
                && let Some(malformed) = wire::is_no_request(&self.unread.buffer)
            {
                return Err(NoHead::Refused(malformed.into()));
            }
            match self.fill().await {
                Ok(true) => {}
                Ok(false) => return Err(NoHead::Ended { partial: !self.unread.buffer.is_empty() }),
                // What another node says of its application counts as what could not be read here.
                Err(error) => {
                    let is_garbled = hbone::tunnel::is_garbled(&error);
                    return Err(NoHead::Broken { partial: is_garbled || !self.unread.buffer.is_empty() });
                }
            }
        }
    }

    /// Whether a whole head of a request has been read.
    pub fn has_head(&self) -> bool {
        let empty = Sort::Request.leading(&self.unread.buffer);
        wire::head_end(&self.unread.buffer[empty..]).is_some()
    }

    /// Whether a part of a head of a request has been read.
    pub fn has_begun(&self) -> bool {
        self.unread.buffer.len() > Sort::Request.leading(&self.unread.buffer)
    }

    /// Waits for the first byte of a head.
    pub async fn begun(&mut self) -> Result<(), NoHead> {
        while self.unread.buffer.is_empty() {
            match self.fill().await {
                Ok(true) => {}
                Ok(false) => return Err(NoHead::Ended { partial: false }),
                Err(_) => return Err(NoHead::Broken { partial: !self.unread.buffer.is_empty() }),
            }
        }
        Ok(())
    }

    pub async fn request(&mut self) -> Result<wire::WireRequest, NoHead> {
        let limits = HeadLimits::of(self.source.is_tunnel());
        let bytes = self.head(limits.bytes, Sort::Request).await?;
        let request = wire::request(&bytes, limits).map_err(NoHead::Refused)?;
        self.begin_body(request.framing);
        self.meter = Meter::default();
        Ok(request)
    }

    pub async fn response(&mut self, method: &Method) -> Result<wire::WireResponse, NoHead> {
        let limits = HeadLimits::of_answer(self.source.is_tunnel());
        let bytes = self.head(limits.bytes, Sort::Response).await?;
        let response = wire::response(&bytes, method, limits).map_err(|malformed| NoHead::Refused(malformed.into()))?;
        self.begin_body(response.framing);
        Ok(response)
    }

    /// Reads and forgets what a client still sends, so that the answer before it is not lost to a reset.
    pub async fn linger(&mut self) {
        let drain = async {
            let mut left = LINGER_BYTES;
            loop {
                let n = self.unread.buffer.len();
                self.unread.buffer.clear();
                left = left.saturating_sub(n);
                if left == 0 {
                    // It has time to read all the same.
                    return std::future::pending().await;
                }
                if !self.fill().await.unwrap_or(false) {
                    return;
                }
            }
        };
        // Time is up either way.
        let _ = tokio::time::timeout(LINGER, drain).await;
    }
}

/// What a head is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Request,
    Response,
}

impl Sort {
    /// Bytes before it that are to be passed over.
    fn leading(self, bytes: &[u8]) -> usize {
        match self {
            Self::Request => wire::leading_lines(bytes),
            Self::Response => wire::leading_empty_lines(bytes),
        }
    }
}

impl FrameSource for Reader<'_> {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(Some(frame));
            }
            if self.decoder.is_done() {
                return Ok(None);
            }
            if !self.fill().await.map_err(BodyError::Cut)? {
                return if self.decoder.finish() { Ok(None) } else { Err(BodyError::Truncated) };
            }
        }
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        let frame = self.decoder.decode(&mut self.unread.buffer)?;
        if let Some(frame) = &frame {
            self.meter.see(frame);
        }
        Ok(frame)
    }

    fn is_end(&self) -> bool {
        self.decoder.is_done()
    }
}

impl RequestBody for Reader<'_> {
    fn framing(&self) -> Framing {
        self.framing
    }

    fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }

    async fn closed(&mut self) -> Closed {
        if !self.unread.buffer.is_empty() {
            // The next request is waiting; whoever sent it is there.
            return std::future::pending().await;
        }
        match self.fill().await {
            Ok(true) => std::future::pending().await,
            Ok(false) => Closed::Half,
            Err(error) => Closed::Gone(error),
        }
    }

    fn become_raw(&mut self) {
        self.begin_body(Framing::UntilClose);
    }
}

/// The writing half of a connection, for one message at a time.
pub struct H1Sink<'a> {
    sink: TransportSink<'a>,
    out: Out,
    encoder: Encoder,
    ended: bool,
    /// Trailers were written: they are the end.
    trailed: bool,
    shut: bool,
}

impl<'a> H1Sink<'a> {
    pub fn new(sink: TransportSink<'a>) -> Self {
        Self { sink, out: Out::default(), encoder: Encoder::new(Framing::Empty), ended: true, trailed: false, shut: false }
    }

    /// Begins a message with its head.
    pub fn begin(&mut self, head: Vec<u8>, framing: Framing) {
        self.out.push(head.into());
        self.ends_with_the_connection(framing == Framing::UntilClose);
        self.encoder = Encoder::new(framing);
        self.ended = false;
        self.trailed = false;
    }

    /// What ends with its connection must not look complete where this process is gone before.
    fn ends_with_the_connection(&self, it_does: bool) {
        if it_does {
            self.sink.resets_when_dropped(true);
        }
    }

    /// What follows goes out as it comes, and its end is the connection's.
    pub fn become_raw(&mut self) {
        self.ends_with_the_connection(true);
        self.encoder = Encoder::new(Framing::UntilClose);
        self.ended = false;
    }

    /// Whether another node says, in time, that nothing has become of what was written last.
    pub async fn is_refused(&mut self) -> bool {
        self.sink.is_refused().await
    }

    /// Says that nothing more will be written.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        self.shut = true;
        self.sink.finish().await?;
        if self.encoder.framing() == Framing::UntilClose {
            self.sink.resets_when_dropped(false);
        }
        Ok(())
    }

    /// Completes when the other end has reset.
    pub async fn broken(&mut self) -> io::Error {
        self.sink.broken().await
    }
}

impl FrameSink for H1Sink<'_> {
    fn push(&mut self, frame: Frame) {
        self.trailed |= matches!(frame, Frame::Trailers(_));
        self.encoder.frame(frame, &mut self.out);
    }

    fn end(&mut self) {
        if !self.ended && !self.trailed {
            self.encoder.end(&mut self.out);
        }
        self.ended = true;
    }

    fn has_ended(&self) -> bool {
        self.ended
    }

    fn is_flushed(&self) -> bool {
        let closes = self.ended && self.encoder.framing() == Framing::UntilClose;
        self.out.is_empty() && (!closes || self.shut)
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.sink.write(&mut self.out).await?;
        if self.ended && self.encoder.framing() == Framing::UntilClose && !self.shut {
            self.shutdown().await?;
        }
        Ok(())
    }
}

/// Answers on a connection.
pub struct H1Responder<'s, 'a> {
    pub sink: &'s mut H1Sink<'a>,
    /// The client's minor version.
    minor: u8,
    head_request: bool,
    keep_alive: bool,
    started: bool,
    /// The client has been told to go on.
    continued: bool,
    /// Whose connection it is, and when it came: it may have to end when it can.
    of: Option<(&'s ServedPod, Stage)>,
    meter: Meter,
}

impl<'s, 'a> H1Responder<'s, 'a> {
    pub fn new(sink: &'s mut H1Sink<'a>, minor: u8, method: &Method, keep_alive: bool) -> Self {
        Self {
            sink,
            minor,
            head_request: method == Method::HEAD,
            keep_alive,
            started: false,
            continued: false,
            of: None,
            meter: Meter::default(),
        }
    }

    /// Of a connection of a pod that came in this stage: where that is to end, the client is told with the answer.
    pub fn of(mut self, pod: &'s ServedPod, since: Stage) -> Self {
        self.of = Some((pod, since));
        self
    }

    /// Whether the connection can be used for another request.
    pub fn keeps_alive(&self) -> bool {
        self.started && self.keep_alive && self.sink.has_ended() && self.sink.is_flushed()
    }

    /// Whether the client would take the end of the connection for the end of the response, and it is not.
    pub fn would_look_complete(&self) -> bool {
        self.started && !self.sink.ended && self.sink.encoder.framing() == Framing::UntilClose
    }

    pub fn has_started(&self) -> bool {
        self.started
    }

    /// Whether the client is on another node.
    pub fn is_tunnelled(&self) -> bool {
        self.sink.sink.is_tunnel()
    }
}

impl FrameSink for H1Responder<'_, '_> {
    fn push(&mut self, frame: Frame) {
        self.meter.see(&frame);
        self.sink.push(frame);
    }

    fn end(&mut self) {
        self.sink.end();
    }

    fn has_ended(&self) -> bool {
        self.sink.has_ended()
    }

    fn is_flushed(&self) -> bool {
        self.sink.is_flushed()
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.sink.flush().await
    }

    /// While there is nothing to write of an answer that goes on: of a client that has closed its end the reading half sees nothing more.
    async fn broken(&mut self) -> io::Error {
        self.sink.broken().await
    }
}

impl Responder for H1Responder<'_, '_> {
    /// The reading half sees a reset as well.
    const RESETS_APART: bool = false;

    fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }

    fn is_head(&self) -> bool {
        self.head_request
    }

    async fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> io::Result<()> {
        if self.minor == 0 || status == StatusCode::CONTINUE && std::mem::replace(&mut self.continued, true) {
            return Ok(());
        }
        let mut head = Vec::new();
        wire::write_response(status, &headers, Framing::Empty, false, &mut head);
        self.sink.out.push(head.into());
        self.sink.sink.write(&mut self.sink.out).await
    }

    fn start(&mut self, head: ResponseHead, close: bool) -> io::Result<()> {
        let ResponseHead { status, headers, framing } = head;
        self.meter.see_status(&headers);
        let switching = status == StatusCode::SWITCHING_PROTOCOLS;
        let bodiless = self.head_request || matches!(status.as_u16(), 204 | 304);
        let framing = match framing {
            _ if switching => Framing::UntilClose,
            _ if bodiless => Framing::Empty,
            // HTTP/1.0 knows no chunks.
            Framing::Chunked | Framing::UntilClose if self.minor == 0 => Framing::UntilClose,
            Framing::UntilClose => Framing::Chunked,
            Framing::Empty => Framing::Length(0),
            other => other,
        };
        let close = close || self.of.is_some_and(|(pod, since)| pod.is_draining(since));
        self.keep_alive &= !close && framing != Framing::UntilClose;
        self.started = true;
        let mut bytes = Vec::with_capacity(512);
        // A client of HTTP/1.0 that asked to keep the connection must be told that it is kept.
        let told = !self.keep_alive && !switching;
        // HEAD is told what GET would be: the body of an unknown length would go in chunks.
        let unknown = self.head_request && self.minor == 1 && !headers.contains_key(header::CONTENT_LENGTH);
        let written = match framing {
            _ if switching => Framing::Empty,
            Framing::Empty if unknown && !matches!(status.as_u16(), 204 | 304) => Framing::Chunked,
            framing => framing,
        };
        wire::write_response(status, &headers, written, told, &mut bytes);
        if self.minor == 0 && self.keep_alive {
            bytes.truncate(bytes.len() - 2);
            bytes.extend_from_slice(b"connection: keep-alive\r\n\r\n");
        }
        self.sink.begin(bytes, framing);
        if bodiless {
            self.sink.end();
        }
        Ok(())
    }

    async fn gone(&mut self) -> io::Error {
        self.sink.broken().await
    }
}
