//! Requests the library refuses by itself, because of what is in them: it resets their streams, or ends the connection, and tells nobody
//! but the client, so that they are seen by the frames that are read and written.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};

use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// RFC 9113 section 4.1.
const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
/// What a client begins with, which is no frame.
const PREFACE: usize = crate::detect::PREFACE.len();
/// What is looked at of a frame: its head, and of a reset the reason.
const LOOKED_AT: usize = FRAME_HEAD + 4;
/// Resets that wait to be told apart; who causes more at a time is told of less.
const MOST_WAITING: usize = 256;

/// The streams of a connection, as far as they are accepted, and those that were reset of which it is not known yet whether they are.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// The last that was asked for, and the last that was accepted: both come in their order.
    asked: AtomicU32,
    accepted: AtomicU32,
    waiting: Mutex<Vec<u32>>,
}

impl Refused {
    fn asked(&self, stream: u32) {
        // Others are no client's.
        if !stream.is_multiple_of(2) {
            self.asked.fetch_max(stream, Ordering::Relaxed);
        }
    }

    fn reset(&self, stream: u32, reason: Reason) {
        // One that was accepted tells of itself; one that was never asked for is none.
        let (asked, accepted) = (self.asked.load(Ordering::Relaxed), self.accepted.load(Ordering::Relaxed));
        if reason != Reason::PROTOCOL_ERROR || stream <= accepted || stream > asked {
            return;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
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
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|stream| *stream != accepted);
        let last = broken && asked > accepted && !waiting.contains(&asked);
        let before = waiting.len();
        waiting.retain(|stream| !all && *stream > accepted);
        before - waiting.len() + usize::from(last)
    }
}

/// Finds the beginnings of frames in what passes.
struct Frames {
    /// The beginning of one, as far as it has passed.
    head: [u8; LOOKED_AT],
    have: usize,
    /// What is to pass that is not looked at.
    rest: usize,
}

impl Frames {
    fn behind(rest: usize) -> Self {
        Self { head: [0; LOOKED_AT], have: 0, rest }
    }

    fn see(&mut self, mut bytes: &[u8], refused: &Refused) {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let n = self.rest.min(bytes.len());
                (self.rest, bytes) = (self.rest - n, &bytes[n..]);
                continue;
            }
            let wanted = if self.have >= FRAME_HEAD { LOOKED_AT } else { FRAME_HEAD };
            let n = (wanted - self.have).min(bytes.len());
            let (taken, after) = bytes.split_at(n);
            self.head[self.have..self.have + n].copy_from_slice(taken);
            (self.have, bytes) = (self.have + n, after);
            self.look(refused);
        }
    }

    fn look(&mut self, refused: &Refused) {
        let [l @ .., kind, _, s0, s1, s2, s3, reason0, reason1, reason2, reason3] = self.head;
        let length = l.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        let is_reset = kind == RST_STREAM && length == LOOKED_AT - FRAME_HEAD;
        let stream = u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]);
        match self.have {
            FRAME_HEAD if !is_reset => {
                if kind == HEADERS {
                    refused.asked(stream);
                }
                (self.have, self.rest) = (0, length);
            }
            LOOKED_AT => {
                self.have = 0;
                refused.reset(stream, u32::from_be_bytes([reason0, reason1, reason2, reason3]).into());
            }
            _ => {}
        }
    }
}

/// A client's connection whose frames are looked at.
pub(super) struct Watched<T> {
    io: T,
    refused: Arc<Refused>,
    read: Frames,
    written: Frames,
}

impl<T> Watched<T> {
    pub(super) fn new(io: T, refused: Arc<Refused>) -> Self {
        Self { io, refused, read: Frames::behind(PREFACE), written: Frames::behind(0) }
    }

    fn see_slices(&mut self, slices: &[IoSlice<'_>], mut n: usize) {
        for slice in slices {
            let of = n.min(slice.len());
            self.written.see(&slice[..of], &self.refused);
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
        this.read.see(buf.filled().get(before..).unwrap_or_default(), &this.refused);
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = &polled {
            this.written.see(&buf[..*n], &this.refused);
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

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        [&length[1..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
    }

    /// How many are told of, of frames that are written in pieces.
    fn told(asked: u32, frames: &[Vec<u8>], piece: usize, accepted: u32, (all, broken): (bool, bool)) -> usize {
        let refused = Refused::default();
        let mut read = Frames::behind(PREFACE);
        let requests = (1..=asked).step_by(2).flat_map(|stream| frame(HEADERS, stream, b"abc")).collect::<Vec<_>>();
        [crate::detect::PREFACE, &requests].concat().chunks(piece).for_each(|bytes| read.see(bytes, &refused));
        refused.accepted(accepted);
        let mut written = Frames::behind(0);
        frames.concat().chunks(piece).for_each(|bytes| written.see(bytes, &refused));
        refused.take(all, broken)
    }

    #[test]
    fn streams_that_are_reset_unaccepted_are_told() {
        let reset = |stream, reason: u32| frame(RST_STREAM, stream, &reason.to_be_bytes());
        let frames = [
            frame(0, 1, &[RST_STREAM; 40]),
            reset(3, 1),
            frame(4, 0, &[]),
            reset(5, 8),
            frame(1, 1, b"xxx"),
            // Not the length of a reset: nothing of it is taken for one.
            frame(RST_STREAM, 7, &[0; 5]),
            reset(9, 1),
            // Of a stream nobody asked for.
            reset(11, 1),
        ];
        for piece in [1, 2, 5, 9, 13, 14, 1000] {
            let told = |accepted, how| told(9, &frames, piece, accepted, how);
            assert_eq!(told(1, (true, false)), 2, "in pieces of {piece}");
            assert_eq!(told(3, (true, false)), 1, "of an accepted one, in pieces of {piece}");
            assert_eq!(told(1, (false, false)), 0, "what may be accepted yet, in pieces of {piece}");
            assert_eq!(told(1, (true, true)), 2, "reset, and then the end, in pieces of {piece}");
        }
        // A connection that ends for what was asked last, and for something else.
        assert_eq!(told(9, &[], 7, 7, (true, true)), 1);
        assert_eq!(told(9, &[], 7, 9, (true, true)), 0);
        // One that was reset before it was accepted is not refused; those before it are.
        let refused = Refused::default();
        refused.asked(9);
        refused.reset(3, Reason::PROTOCOL_ERROR);
        refused.reset(9, Reason::PROTOCOL_ERROR);
        refused.accepted(9);
        assert_eq!((refused.take(false, false), refused.take(true, false)), (1, 0));
    }
}
