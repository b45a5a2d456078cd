//! What has passed of a body: bytes, and for gRPC its messages and status.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use http::{HeaderMap, HeaderValue};

use super::{
    body::{BodyError, FrameSink, FrameSource},
    framing::Frame,
};

/// Counts frames as they pass.
#[derive(Debug, Default, Clone)]
pub struct Meter {
    pub bytes: u64,
    /// Of gRPC.
    pub messages: u64,
    pub grpc_status: Option<u32>,
    /// Where messages are counted. Apart: of most bodies they are not.
    counting: Option<Box<Counting>>,
    /// What came behind it, where somebody will ask about that.
    trailers: Option<Box<HeaderMap>>,
}

#[derive(Debug, Default, Clone)]
struct Counting {
    place: Place,
    /// Messages, for who asks while the body goes on.
    so_far: Arc<AtomicU64>,
}

/// Where in a stream of length-prefixed messages it is.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// In the five bytes before a message: how many have come, and the length as far as it is known.
    Prefix { come: u8, length: u32 },
    /// In a message, of which so much is to come.
    Message(u32),
}

impl Meter {
    /// Of a body that was given here at once.
    pub fn of_reply(body: &[u8], headers: &HeaderMap) -> Self {
        Self { bytes: body.len() as u64, grpc_status: grpc_status(headers), ..Self::default() }
    }

    /// Also counts gRPC's messages, and takes down its status. What comes back has the messages so far.
    pub fn count_messages(&mut self) -> Arc<AtomicU64> {
        self.counting.get_or_insert_default().so_far.clone()
    }

    /// Also keeps what comes behind the body.
    pub fn keep_trailers(&mut self) {
        self.trailers = Some(Box::default());
    }

    /// Takes over what another has seen of the same body in another form, but for its bytes.
    pub fn join(&mut self, other: &Self) {
        self.messages = other.messages;
        self.grpc_status = other.grpc_status.or(self.grpc_status);
    }

    /// What came behind it, if that was to be kept.
    pub fn trailers(&self) -> Option<&HeaderMap> {
        self.trailers.as_deref()
    }

    pub fn see(&mut self, frame: &Frame) {
        match frame {
            Frame::Data(data) => {
                self.bytes += data.len() as u64;
                if self.counting.is_some() {
                    self.see_messages(data);
                }
            }
            Frame::Trailers(trailers) => {
                self.see_status(trailers);
                if let Some(kept) = &mut self.trailers {
                    (**kept).clone_from(trailers);
                }
            }
        }
    }

    /// Headers or trailers, of which some may say how a gRPC call ended.
    pub fn see_status(&mut self, headers: &HeaderMap) {
        if self.counting.is_some()
            && let Some(status) = grpc_status(headers)
        {
            self.grpc_status = Some(status);
        }
    }

    fn see_messages(&mut self, mut data: &[u8]) {
        let Some(counting) = &mut self.counting else { return };
        let mut place = counting.place;
        while let Some((first, rest)) = data.split_first() {
            place = match place {
                Place::Prefix { come, length } => {
                    data = rest;
                    // The first byte says whether the message is compressed.
                    let length = if come == 0 { 0 } else { length << 8 | u32::from(*first) };
                    if come == 4 {
                        self.messages += 1;
                        after(length)
                    } else {
                        Place::Prefix { come: come + 1, length }
                    }
                }
                Place::Message(left) => {
                    let n = u32::try_from(data.len()).unwrap_or(u32::MAX).min(left);
                    data = &data[n as usize..];
                    after(left - n)
                }
            };
        }
        counting.place = place;
        counting.so_far.store(self.messages, Ordering::Relaxed);
    }
}

/// A source or sink whose frames are counted as they pass.
pub struct Metered<'a, T> {
    of: &'a mut T,
    pub meter: Meter,
}

impl<'a, T> Metered<'a, T> {
    pub fn new(of: &'a mut T, grpc: bool) -> Self {
        let mut meter = Meter::default();
        if grpc {
            meter.count_messages();
        }
        Self { of, meter }
    }

    fn seen<E>(&mut self, frame: Result<Option<Frame>, E>) -> Result<Option<Frame>, E> {
        if let Ok(Some(frame)) = &frame {
            self.meter.see(frame);
        }
        frame
    }
}

impl<T: FrameSource> FrameSource for Metered<'_, T> {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        let frame = self.of.frame().await;
        self.seen(frame)
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        let frame = self.of.buffered();
        self.seen(frame)
    }

    fn is_end(&self) -> bool {
        self.of.is_end()
    }
}

impl<T: FrameSink> FrameSink for Metered<'_, T> {
    fn push(&mut self, frame: Frame) {
        self.meter.see(&frame);
        self.of.push(frame);
    }

    fn end(&mut self) {
        self.of.end();
    }

    fn has_ended(&self) -> bool {
        self.of.has_ended()
    }

    fn is_flushed(&self) -> bool {
        self.of.is_flushed()
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.of.flush().await
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

impl Default for Place {
    fn default() -> Self {
        Self::Prefix { come: 0, length: 0 }
    }
}

fn after(left: u32) -> Place {
    if left == 0 { Place::default() } else { Place::Message(left) }
}

/// The status of a gRPC call, if headers say it.
pub fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status").and_then(number)
}

fn number(value: &HeaderValue) -> Option<u32> {
    value.to_str().ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let mut stream = Vec::new();
        for length in [0_u32, 3, 300, 1] {
            stream.push(0);
            stream.extend_from_slice(&length.to_be_bytes());
            stream.resize(stream.len() + length as usize, 7);
        }
        for size in [1, 2, 5, 7, 64, 1000] {
            let mut meter = Meter::default();
            meter.count_messages();
            stream.chunks(size).for_each(|c| meter.see(&Frame::Data(Bytes::copy_from_slice(c))));
            assert_eq!((meter.messages, meter.bytes), (4, stream.len() as u64), "in pieces of {size}");
        }
    }

    #[test]
    fn the_status_is_taken_from_trailers_of_grpc_alone() {
        let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("14"))]);
        let mut meter = Meter::default();
        meter.see(&Frame::Trailers(trailers.clone()));
        assert_eq!(meter.grpc_status, None);
        meter.count_messages();
        meter.see(&Frame::Trailers(trailers));
        assert_eq!(meter.grpc_status, Some(14));
    }
}
