//! Answers that have come whole although their connection has ended: of a stream on which something was still to be sent, the library
//! forgets that it has.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    connection::MAX_STREAMS,
    frames::{Frames, Seen},
};

/// The streams of a connection whose last frames have come, the latest of them: as many as can be under way.
#[derive(Debug, Default)]
pub struct Ended(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    streams: Vec<u32>,
    next: usize,
}

impl Ended {
    fn add(&self, stream: u32) {
        let mut ring = self.0.lock();
        let Ring { streams, next } = &mut *ring;
        match streams.get_mut(*next) {
            Some(place) => *place = stream,
            None => streams.push(stream),
        }
        *next = (*next + 1) % MAX_STREAMS as usize;
    }

    /// Whether the last of a stream has come. Seldom asked.
    pub fn has(&self, stream: u32) -> bool {
        self.0.lock().streams.contains(&stream)
    }
}

/// A connection to a server that is read to its end, also when it takes nothing any more: what it has said before that, answers and which
/// streams it has not begun (GOAWAY), counts.
pub(super) struct Heard<T> {
    io: T,
    frames: Frames,
    ended: Arc<Ended>,
    /// What is written goes nowhere.
    deaf: bool,
}

impl<T> Heard<T> {
    pub(super) fn new(io: T, ended: Arc<Ended>) -> Self {
        Self { io, frames: Frames::behind(0), ended, deaf: false }
    }

    /// What has become of a write: as if all had been taken, if none is any more.
    fn written(&mut self, polled: Poll<io::Result<usize>>, all: usize) -> Poll<io::Result<usize>> {
        self.deaf |= matches!(polled, Poll::Ready(Err(_)));
        if self.deaf { Poll::Ready(Ok(all)) } else { polled }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Heard<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        this.frames.see(buf.filled().get(before..).unwrap_or_default(), |seen| {
            if let Seen::End { stream } = seen {
                this.ended.add(stream);
            }
        });
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Heard<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = if this.deaf { Poll::Pending } else { Pin::new(&mut this.io).poll_write(cx, buf) };
        this.written(polled, buf.len())
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = if this.deaf { Poll::Pending } else { Pin::new(&mut this.io).poll_write_vectored(cx, slices) };
        this.written(polled, slices.iter().map(|slice| slice.len()).sum())
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = if this.deaf { Poll::Pending } else { Pin::new(&mut this.io).poll_flush(cx) };
        this.written(polled.map_ok(|()| 0), 0).map_ok(drop)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = if this.deaf { Poll::Pending } else { Pin::new(&mut this.io).poll_shutdown(cx) };
        this.written(polled.map_ok(|()| 0), 0).map_ok(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_streams_are_known() {
        let ended = Ended::default();
        assert!(!ended.has(1));
        for stream in 0..MAX_STREAMS + 3 {
            ended.add(stream * 2 + 1);
        }
        assert!(!ended.has(1) && !ended.has(5) && ended.has(7) && ended.has((MAX_STREAMS + 2) * 2 + 1));
    }
}
