//! Bodies that are in memory, whole: of questions the proxy asks, and their answers.

use bytes::Bytes;
use http::HeaderMap;

use super::{
    body::{BodyError, FrameSink, FrameSource},
    framing::Frame,
};

/// A body that is there, whole.
#[derive(Default)]
pub struct Whole(Option<Bytes>);

impl Whole {
    pub fn of(data: impl Into<Bytes>) -> Self {
        Self(Some(data.into()))
    }
}

impl FrameSource for Whole {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        self.buffered()
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        Ok(self.0.take().map(Frame::Data))
    }

    fn is_end(&self) -> bool {
        self.0.is_none()
    }
}

/// Keeps what it is given, up to a limit.
pub struct Collected {
    pub data: Vec<u8>,
    pub trailers: HeaderMap,
    /// There was more.
    pub over: bool,
    ended: bool,
    most: usize,
}

impl Collected {
    /// Data of so many bytes.
    pub fn up_to(most: usize) -> Self {
        Self { data: Vec::new(), trailers: HeaderMap::new(), over: false, ended: false, most }
    }
}

impl FrameSink for Collected {
    fn push(&mut self, frame: Frame) {
        match frame {
            Frame::Data(data) if self.data.len() + data.len() <= self.most => self.data.extend_from_slice(&data),
            Frame::Data(_) => self.over = true,
            Frame::Trailers(trailers) => self.trailers = trailers,
        }
    }

    fn end(&mut self) {
        self.ended = true;
    }

    fn has_ended(&self) -> bool {
        self.ended
    }

    fn is_flushed(&self) -> bool {
        true
    }

    async fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
