//! gRPC of browsers and others that have no HTTP/2 or see no trailers: what comes as `application/grpc-web` goes on as gRPC, and its answer comes
//! back with the trailers as the last message of the body; as `application/grpc-web-text` all of it is in base64. The gRPC project's
//! `PROTOCOL-WEB.md`, done as Envoy's filter does it.

use std::{io, mem};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::{
    body::{BodyError, Closed, FrameSink, FrameSource, RequestBody, Responder, ResponseHead},
    framing::Frame,
    meter::{Meter, grpc_status},
    reply::grpc_code,
    wire::{Framing, Malformed},
};
use crate::{
    grpc,
    route::request::{RequestHead, is_grpc, take_off},
};

/// Most bytes of an answer that is no gRPC that are told in `grpc-message`. Envoy's.
const MOST_MESSAGE: usize = 16 * 1024;
/// The first byte of a message that is trailers.
const TRAILERS: u8 = 0x80;
const BAD_BASE64: Malformed = Malformed {
    status: StatusCode::BAD_REQUEST,
    body: "Bad gRPC-web request, invalid base64 data.",
    details: "grpc_base_64_decode_failed",
    protocol_error: false,
    close: true,
};
const CUT_BASE64: Malformed = Malformed { details: "grpc_base_64_decode_failed_bad_size", ..BAD_BASE64 };

/// How a request is written, and how its answer is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Web {
    text: bool,
    text_answer: bool,
}

/// Whether a content type is one of gRPC-Web, and in base64.
fn kind(value: Option<&HeaderValue>) -> Option<bool> {
    match value?.as_bytes() {
        b"application/grpc-web" | b"application/grpc-web+proto" => Some(false),
        b"application/grpc-web-text" | b"application/grpc-web-text+proto" => Some(true),
        _ => None,
    }
}

impl Web {
    /// Of a request in gRPC-Web.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let text = kind(headers.get(header::CONTENT_TYPE))?;
        Some(Self { text, text_answer: kind(headers.get(header::ACCEPT)) == Some(true) })
    }

    /// Makes the head of one of gRPC.
    pub fn translate(head: &mut RequestHead) {
        let headers = &mut head.headers;
        take_off(headers, &header::CONTENT_LENGTH);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        if !headers.contains_key("grpc-accept-encoding") {
            headers.insert("grpc-accept-encoding", HeaderValue::from_static("identity"));
        }
    }
}

/// The body of a request in gRPC-Web, as one of gRPC.
pub struct WebBody<'b, B: RequestBody> {
    of: &'b mut B,
    text: bool,
    /// The beginning of four characters of which the rest has not come.
    held: BytesMut,
    meter: Meter,
}

impl<'b, B: RequestBody> WebBody<'b, B> {
    pub fn new(of: &'b mut B, web: Web) -> Self {
        Self { of, text: web.text, held: BytesMut::new(), meter: Meter::default() }
    }

    /// What a frame is in gRPC; nothing as long as too little has come.
    fn decoded(&mut self, frame: Frame) -> Result<Option<Frame>, BodyError> {
        let frame = match frame {
            Frame::Data(data) if self.text => {
                self.held.extend_from_slice(&data);
                let whole = self.held.split_to(self.held.len() / 4 * 4);
                let mut out = Vec::with_capacity(whole.len() / 4 * 3);
                decode(&whole, &mut out)?;
                Frame::Data(out.into())
            }
            frame => frame,
        };
        if matches!(&frame, Frame::Data(data) if data.is_empty()) {
            return Ok(None);
        }
        self.meter.see(&frame);
        Ok(Some(frame))
    }

    fn end(&self) -> Result<Option<Frame>, BodyError> {
        if self.held.is_empty() { Ok(None) } else { Err(CUT_BASE64.into()) }
    }
}

/// Whole groups of four characters, the last of any of the pieces they were put together from padded.
fn decode(mut text: &[u8], out: &mut Vec<u8>) -> Result<(), BodyError> {
    while !text.is_empty() {
        let padded = text.iter().position(|b| *b == b'=').map_or(text.len(), |at| (at / 4 + 1) * 4);
        let piece;
        (piece, text) = text.split_at(padded.min(text.len()));
        STANDARD.decode_vec(piece, out).map_err(|_| BAD_BASE64)?;
    }
    Ok(())
}

impl<B: RequestBody> Drop for WebBody<'_, B> {
    fn drop(&mut self) {
        self.of.meter().messages = self.meter.messages;
    }
}

impl<B: RequestBody> FrameSource for WebBody<'_, B> {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        while let Some(frame) = self.of.frame().await? {
            if let Some(frame) = self.decoded(frame)? {
                return Ok(Some(frame));
            }
        }
        self.end()
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        while let Some(frame) = self.of.buffered()? {
            if let Some(frame) = self.decoded(frame)? {
                return Ok(Some(frame));
            }
        }
        if self.of.is_end() { self.end() } else { Ok(None) }
    }

    fn is_end(&self) -> bool {
        self.of.is_end() && self.held.is_empty()
    }
}

impl<B: RequestBody> RequestBody for WebBody<'_, B> {
    fn framing(&self) -> Framing {
        if self.of.framing() == Framing::Empty { Framing::Empty } else { Framing::Chunked }
    }

    fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }

    async fn closed(&mut self) -> Closed {
        self.of.closed().await
    }

    fn become_raw(&mut self) {
        self.of.become_raw();
    }
}

/// Where the answer to a request in gRPC-Web goes.
pub struct WebResponder<'r, R: Responder> {
    of: &'r mut R,
    text: bool,
    encoder: Encoder,
    /// An answer that is no gRPC, whose body will be its message.
    plain: Option<Plain>,
    failed: Option<io::Error>,
    meter: Meter,
}

struct Plain {
    head: ResponseHead,
    close: bool,
    message: Vec<u8>,
}

impl<'r, R: Responder> WebResponder<'r, R> {
    pub fn new(of: &'r mut R, web: Web) -> Self {
        Self { of, text: web.text_answer, encoder: Encoder::default(), plain: None, failed: None, meter: Meter::default() }
    }

    fn write(&mut self, data: &[u8]) {
        let mut text = Vec::with_capacity(data.len() / 3 * 4 + 8);
        self.encoder.encode(data, &mut text);
        if !text.is_empty() {
            self.of.push(Frame::Data(text.into()));
        }
    }

    /// Sends an answer that was no gRPC as an error of gRPC that keeps its status.
    fn tell(&mut self, plain: Plain) {
        let Plain { mut head, close, message } = plain;
        if let Ok(message) = HeaderValue::from_str(&grpc::encoded(&message)) {
            head.headers.insert("grpc-message", message);
        }
        head.headers.insert("grpc-status", grpc_code(head.status).into());
        head.headers.insert(header::CONTENT_LENGTH, 0.into());
        self.meter.see_status(&head.headers);
        if let Err(error) = self.of.start(ResponseHead { framing: Framing::Empty, ..head }, close) {
            self.failed = Some(error);
        }
    }
}

impl<R: Responder> Drop for WebResponder<'_, R> {
    fn drop(&mut self) {
        self.of.meter().join(&self.meter);
    }
}

impl<R: Responder> FrameSink for WebResponder<'_, R> {
    fn push(&mut self, frame: Frame) {
        if let Some(plain) = &mut self.plain {
            if let Frame::Data(data) = frame {
                let room = MOST_MESSAGE - plain.message.len();
                plain.message.extend_from_slice(&data[..data.len().min(room)]);
            }
            return;
        }
        self.meter.see(&frame);
        let data = match frame {
            Frame::Data(data) => data,
            Frame::Trailers(trailers) => told(&trailers),
        };
        if self.text {
            self.write(&data);
        } else {
            self.of.push(Frame::Data(data));
        }
    }

    fn end(&mut self) {
        if let Some(plain) = self.plain.take() {
            self.tell(plain);
        }
        if !self.of.has_ended() {
            if self.text {
                let mut rest = Vec::new();
                self.encoder.finish(&mut rest);
                if !rest.is_empty() {
                    self.of.push(Frame::Data(rest.into()));
                }
            }
            self.of.end();
        }
    }

    fn has_ended(&self) -> bool {
        self.plain.is_none() && self.of.has_ended()
    }

    fn is_flushed(&self) -> bool {
        self.failed.is_none() && self.of.is_flushed()
    }

    async fn flush(&mut self) -> io::Result<()> {
        match self.failed.take() {
            Some(error) => Err(error),
            None => self.of.flush().await,
        }
    }

    fn has_room(&self) -> bool {
        self.of.has_room()
    }

    async fn room(&mut self) -> io::Result<()> {
        self.of.room().await
    }

    fn give_back(&mut self) {
        self.of.give_back();
    }

    async fn broken(&mut self) -> io::Error {
        self.of.broken().await
    }
}

/// Trailers, as the last message of a body.
fn told(trailers: &HeaderMap) -> Bytes {
    let mut message = vec![TRAILERS, 0, 0, 0, 0];
    for (name, value) in trailers {
        for part in [name.as_str().as_bytes(), b":", value.as_bytes(), b"\r\n"] {
            message.extend_from_slice(part);
        }
    }
    // Trailers are bounded far below that.
    let length = u32::try_from(message.len() - 5).unwrap_or(u32::MAX);
    message[1..5].copy_from_slice(&length.to_be_bytes());
    message.into()
}

impl<R: Responder> Responder for WebResponder<'_, R> {
    const RESETS_APART: bool = R::RESETS_APART;

    fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }

    fn is_head(&self) -> bool {
        self.of.is_head()
    }

    async fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> io::Result<()> {
        self.of.informational(status, headers).await
    }

    fn start(&mut self, head: ResponseHead, close: bool) -> io::Result<()> {
        let ResponseHead { status, mut headers, framing } = head;
        let is_over = framing == Framing::Empty || self.of.is_head();
        let whole = if is_over { grpc_status(&headers).is_some() } else { status == StatusCode::OK && is_grpc(&headers) };
        let as_it_is = whole || status == StatusCode::OK && kind(headers.get(header::CONTENT_TYPE)) == Some(false);
        take_off(&mut headers, &header::CONTENT_LENGTH);
        let told = if self.text { "application/grpc-web-text+proto" } else { "application/grpc-web+proto" };
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(told));
        if !is_over && !as_it_is {
            self.plain = Some(Plain { head: ResponseHead { status, headers, framing }, close, message: Vec::new() });
            return Ok(());
        }
        self.meter.see_status(&headers);
        let framing = if let Framing::Length(_) = framing { Framing::Chunked } else { framing };
        self.of.start(ResponseHead { status, headers, framing }, close)
    }

    async fn gone(&mut self) -> io::Error {
        self.of.gone().await
    }
}

/// Length-prefixed messages to base64, each padded for itself, however they are cut.
#[derive(Debug, Default)]
struct Encoder {
    /// Bytes that are not three yet.
    held: Vec<u8>,
    /// Of a message's first five bytes, those that have come; its length then.
    prefix: Vec<u8>,
    left: usize,
}

impl Encoder {
    fn encode(&mut self, mut data: &[u8], text: &mut Vec<u8>) {
        while !data.is_empty() {
            let n = if self.left == 0 { (5 - self.prefix.len()).min(data.len()) } else { self.left.min(data.len()) };
            let (part, rest) = data.split_at(n);
            data = rest;
            self.held.extend_from_slice(part);
            if self.left == 0 {
                self.prefix.extend_from_slice(part);
                if self.prefix.len() < 5 {
                    continue;
                }
                self.left = self.prefix.drain(..).skip(1).fold(0, |length, byte| length << 8 | usize::from(byte));
            } else {
                self.left -= n;
            }
            if self.left == 0 {
                self.finish(text);
            } else {
                self.take(self.held.len() / 3 * 3, text);
            }
        }
    }

    /// Pads what is there.
    fn finish(&mut self, text: &mut Vec<u8>) {
        self.take(self.held.len(), text);
    }

    fn take(&mut self, n: usize, text: &mut Vec<u8>) {
        let rest = self.held.split_off(n);
        let whole = mem::replace(&mut self.held, rest);
        let at = text.len();
        text.resize(at + whole.len().div_ceil(3) * 4, 0);
        // It is as long as that.
        let _ = STANDARD.encode_slice(&whole, &mut text[at..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_padded_each_for_itself_however_they_are_cut() {
        let messages: [&[u8]; 4] = [b"\0\0\0\0\x04four", b"\0\0\0\0\0", b"\0\0\0\0\x01x", b"\x80\0\0\0\x06a:b\r\n!"];
        let expected = messages.iter().map(|m| STANDARD.encode(m)).collect::<String>();
        let all = messages.concat();
        for size in 1..=all.len() {
            let (mut encoder, mut text) = (Encoder::default(), Vec::new());
            all.chunks(size).for_each(|piece| encoder.encode(piece, &mut text));
            assert_eq!(String::from_utf8_lossy(&text), expected, "{size}");
            // What is cut off within a message is told as far as it came.
            encoder.encode(b"\0\0\0\0\x09a", &mut text);
            encoder.finish(&mut text);
            let mut back = Vec::new();
            decode(&text, &mut back).expect("base64");
            assert_eq!(back, [&all[..], b"\0\0\0\0\x09a"].concat());
        }
    }

    #[test]
    fn text_of_several_padded_pieces_is_read() {
        let mut out = Vec::new();
        decode(b"YQ==YmM=ZGVm", &mut out).expect("base64");
        assert_eq!(out, b"abcdef");
        for wrong in [&b"YQ=a"[..], b"Y!==", b"===="] {
            assert!(matches!(decode(wrong, &mut out), Err(BodyError::Malformed(m)) if m == BAD_BASE64), "{}", wrong.escape_ascii());
        }
    }

    #[test]
    fn kinds_of_content_are_as_envoy_has_them() {
        let of = |kind: &'static str, accept: &'static str| {
            let headers = [(header::CONTENT_TYPE, HeaderValue::from_static(kind)), (header::ACCEPT, HeaderValue::from_static(accept))];
            Web::of(&HeaderMap::from_iter(headers)).map(|w| (w.text, w.text_answer))
        };
        assert_eq!(of("application/grpc-web", ""), Some((false, false)));
        assert_eq!(of("application/grpc-web-text+proto", "application/grpc-web-text"), Some((true, true)));
        assert_eq!(of("application/grpc-web+proto", "*/*"), Some((false, false)));
        assert_eq!((of("application/grpc", ""), of("application/grpc-web+json", ""), of("application/grpc-web;x", "")), (None, None, None));
    }
}
