//! Requests the library refuses by itself, because of what is in them: it resets their streams, or ends the connection, and tells nobody
//! but the client, so that they are seen by the frames that are read and written.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};

use h2::Reason;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    frames::{Frames, Seen},
    unsent::Unsent,
};

/// What a client begins with, which is no frame.
const PREFACE: usize = crate::detect::PREFACE.len();
/// Resets that wait to be told apart; who causes more at a time is told of less.
const MOST_WAITING: usize = 256;

/// The streams of a connection, as far as they are accepted, and those that were reset of which it is not known yet whether they are.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// The last that was asked for, and the last that was accepted: both come in their order.
    asked: AtomicU32,
    accepted: AtomicU32,
    /// The last that was reset.
    reset: AtomicU32,
    waiting: Mutex<Vec<u32>>,
}

impl Refused {
    fn written(&self, seen: Seen) {
        if let Seen::Reset { stream, reason } = seen {
            self.reset(stream, reason.into());
        }
    }

    fn asked(&self, stream: u32) {
        // Others are no client's.
        if !stream.is_multiple_of(2) {
            self.asked.fetch_max(stream, Ordering::Relaxed);
        }
    }

    fn reset(&self, stream: u32, reason: Reason) {
        self.reset.fetch_max(stream, Ordering::Relaxed);
        // One that was accepted tells of itself; one that was never asked for is none.
        let (asked, accepted) = (self.asked.load(Ordering::Relaxed), self.accepted.load(Ordering::Relaxed));
        if reason != Reason::PROTOCOL_ERROR || stream <= accepted || stream > asked {
            return;
        }
        let mut waiting = self.waiting.lock();
        if waiting.len() < MOST_WAITING {
            waiting.push(stream);
        }
    }

    /// Takes down that a stream was accepted: also those are that were reset meanwhile.
    pub(super) fn accepted(&self, stream: u32) {
        self.accepted.store(stream, Ordering::Relaxed);
    }

    /// How many were refused. `all`: no more of those that have come are accepted. `broken`: the connection has ended for what came on it.
    pub(super) fn take(&self, all: bool, broken: bool) -> usize {
        let (asked, accepted) = (self.asked.load(Ordering::Relaxed), self.accepted.load(Ordering::Relaxed));
        let mut waiting = self.waiting.lock();
        waiting.retain(|stream| *stream != accepted);
        let last = broken && asked > accepted.max(self.reset.load(Ordering::Relaxed));
        let before = waiting.len();
        waiting.retain(|stream| !all && *stream > accepted);
        before - waiting.len() + usize::from(last)
    }
}

/// A client's connection whose frames are looked at.
pub(super) struct Watched<T> {
    io: T,
    refused: Arc<Refused>,
    unsent: Arc<Unsent>,
    read: Frames,
    written: Frames,
}

impl<T> Watched<T> {
    pub(super) fn new(io: T, refused: Arc<Refused>, unsent: Arc<Unsent>) -> Self {
        Self { io, refused, unsent, read: Frames::behind(PREFACE), written: Frames::behind(0) }
    }

    fn see_written(&mut self, bytes: &[u8]) {
        self.written.see(bytes, |seen| match seen {
            Seen::Data { stream, length } => self.unsent.written(stream, length),
            Seen::Reset { stream, .. } => {
                self.unsent.forget(stream);
                self.refused.written(seen);
            }
            Seen::Head { .. } | Seen::End { .. } => {}
        });
    }

    fn see_slices(&mut self, slices: &[IoSlice<'_>], mut n: usize) {
        for slice in slices {
            let of = n.min(slice.len());
            self.see_written(&slice[..of]);
            n -= of;
            if n == 0 {
                return;
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        this.read.see(buf.filled().get(before..).unwrap_or_default(), |seen| match seen {
            Seen::Head { stream } => this.refused.asked(stream),
            Seen::Reset { stream, .. } => this.unsent.forget(stream),
            Seen::Data { .. } | Seen::End { .. } => {}
        });
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = &polled {
            this.see_written(&buf[..*n]);
        }
        polled
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write_vectored(cx, slices);
        if let Poll::Ready(Ok(n)) = &polled {
            this.see_slices(slices, *n);
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many are told of, where streams up to one were asked for, others reset, and one was the last to be accepted.
    fn told(asked: u32, resets: &[(u32, Reason)], accepted: u32, (all, broken): (bool, bool)) -> usize {
        let refused = Refused::default();
        (1..=asked).for_each(|stream| refused.asked(stream));
        refused.accepted(accepted);
        resets.iter().for_each(|(stream, reason)| refused.written(Seen::Reset { stream: *stream, reason: (*reason).into() }));
        refused.take(all, broken)
    }

    #[test]
    fn streams_that_are_reset_unaccepted_are_told() {
        // The last of a stream nobody asked for.
        let resets = [(3, Reason::PROTOCOL_ERROR), (5, Reason::CANCEL), (9, Reason::PROTOCOL_ERROR), (11, Reason::PROTOCOL_ERROR)];
        let told_of = |accepted, how| told(9, &resets, accepted, how);
        assert_eq!(told_of(1, (true, false)), 2);
        assert_eq!(told_of(3, (true, false)), 1, "of an accepted one");
        assert_eq!(told_of(1, (false, false)), 0, "what may be accepted yet");
        assert_eq!(told_of(1, (true, true)), 2, "reset, and then the end");
        // A connection that ends for what was asked last, and for something else.
        assert_eq!(told(9, &[], 7, (true, true)), 1);
        assert_eq!(told(9, &[], 9, (true, true)), 0);
        // One that was reset before it was accepted is not refused; those before it are.
        let refused = Refused::default();
        refused.asked(9);
        refused.reset(3, Reason::PROTOCOL_ERROR);
        refused.reset(9, Reason::PROTOCOL_ERROR);
        refused.accepted(9);
        assert_eq!((refused.take(false, false), refused.take(true, false)), (1, 0));
    }
}
