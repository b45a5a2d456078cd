//! Connections of HTTP/2 without the frames that carry nothing.
//!
//! The library ends a connection, with everything under way on it, at the hundredth empty frame of data in its life. Servers whose answers
//! come in pieces send them now and then, for every answer.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// RFC 9113 section 4.1.
pub const FRAME_HEAD: usize = 9;
/// A type of frames, and a flag they may have.
pub const DATA: u8 = 0;
pub const END_STREAM: u8 = 1;
const PADDED: u8 = 8;
/// Empty frames that are left in: what is wrong with them is for the library to say, and it bears twice as many.
const LEFT_IN: u32 = 50;
/// Empty frames one after the other that are taken out. More are a flood (CVE-2019-9518), and left to the library.
const IN_A_ROW: u32 = 100;
/// Room a read has at least; for less it reads into a buffer of its own.
const ROOM: usize = 64;

/// Takes empty frames of data out of what is read.
pub struct Sparse<T> {
    io: T,
    /// What is to pass before the next head of a frame.
    rest: usize,
    /// The beginning of one, which has not been passed on.
    head: [u8; FRAME_HEAD],
    have: usize,
    /// Read where there was little room, from `at` on.
    kept: Vec<u8>,
    at: usize,
    left_in: u32,
    in_a_row: u32,
}

impl<T> Sparse<T> {
    /// `first`: so much passes before the first frame.
    pub fn behind(first: usize, io: T) -> Self {
        Self { io, rest: first, head: [0; FRAME_HEAD], have: 0, kept: Vec::new(), at: 0, left_in: 0, in_a_row: 0 }
    }

    /// Takes them out of what has been read; how much is left of it.
    fn sift(&mut self, bytes: &mut [u8]) -> usize {
        let (mut at, mut to) = (0, 0);
        while at < bytes.len() {
            let keep = if self.rest > 0 {
                let n = self.rest.min(bytes.len() - at);
                self.rest -= n;
                n
            } else if let Some(head) = bytes.get(at..at + FRAME_HEAD) {
                if self.is_taken_out(head) {
                    at += FRAME_HEAD;
                    continue;
                }
                self.rest = head[..3].iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
                FRAME_HEAD
            } else {
                let part = &bytes[at..];
                self.head[..part.len()].copy_from_slice(part);
                self.have = part.len();
                break;
            };
            if at != to {
                bytes.copy_within(at..at + keep, to);
            }
            (at, to) = (at + keep, to + keep);
        }
        to
    }

    fn is_taken_out(&mut self, head: &[u8]) -> bool {
        let is_empty = head[..3] == [0; 3] && head[3] == DATA && head[4] & (END_STREAM | PADDED) == 0;
        if !is_empty {
            self.in_a_row = 0;
            return false;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        if self.left_in < LEFT_IN {
            self.left_in += 1;
            return false;
        }
        self.in_a_row <= IN_A_ROW
    }
}

impl<T: AsyncRead + Unpin> Sparse<T> {
    /// Reads once into a buffer that has room for what is kept back and more. False at the end, and where all that came was taken out there
    /// is nothing more in the buffer.
    fn poll_once(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let start = buf.filled().len();
        buf.put_slice(&self.head[..self.have]);
        let read_from = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if !matches!(polled, Poll::Ready(Ok(()))) {
            buf.set_filled(start);
        }
        ready!(polled)?;
        self.have = 0;
        if buf.filled().len() == read_from {
            return Poll::Ready(Ok(false));
        }
        let left = self.sift(&mut buf.filled_mut()[start..]);
        buf.set_filled(start + left);
        Poll::Ready(Ok(true))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Sparse<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        loop {
            if this.at < this.kept.len() {
                let n = buf.remaining().min(this.kept.len() - this.at);
                buf.put_slice(&this.kept[this.at..this.at + n]);
                this.at += n;
                return Poll::Ready(Ok(()));
            }
            let more = if buf.remaining() >= ROOM {
                ready!(this.poll_once(cx, buf))?
            } else {
                let mut few = [0; ROOM];
                let mut few = ReadBuf::new(&mut few);
                let more = ready!(this.poll_once(cx, &mut few))?;
                this.kept.clear();
                this.kept.extend_from_slice(few.filled());
                this.at = 0;
                more
            };
            // All of it may have been taken out.
            if !more && this.kept.len() == this.at || buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Sparse<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, slices)
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("short");
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    }

    /// What is left of bytes that come in pieces of one size, and are read with room for so many.
    async fn left(bytes: &[u8], piece: usize, room: usize) -> Vec<u8> {
        let (mut from, to) = tokio::io::duplex(piece);
        let bytes = bytes.to_vec();
        let writer = tokio::spawn(async move { from.write_all(&bytes).await });
        let (mut sparse, mut all) = (Sparse::behind(3, to), Vec::new());
        loop {
            let mut buffer = vec![0; room];
            match sparse.read(&mut buffer).await.expect("read") {
                0 => break,
                n => all.extend_from_slice(&buffer[..n]),
            }
        }
        writer.await.expect("written").expect("written");
        all
    }

    #[tokio::test]
    async fn what_carries_nothing_is_taken_out_and_nothing_else_is_changed() {
        let (empty, end) = (frame(DATA, 0, 3, &[]), frame(DATA, END_STREAM, 3, &[]));
        let (padded, settings) = (frame(DATA, PADDED, 3, &[2, 0, 0]), frame(4, 0, 0, &[]));
        // What looks like one in a payload is none.
        let payload = [empty.clone(), empty.clone()].concat();
        let (data, other) = (frame(DATA, 0, 3, &payload), frame(1, 4, 5, &payload));
        let (mut bytes, mut expected) = (b"PRI".to_vec(), b"PRI".to_vec());
        for n in 0..200 {
            for kept in [&data, &other, &padded, &settings, &end] {
                [&mut bytes, &mut expected].into_iter().for_each(|to| to.extend_from_slice(kept));
            }
            bytes.extend_from_slice(&empty);
            if n < LEFT_IN {
                expected.extend_from_slice(&empty);
            }
        }
        // Cut off in the midst of one.
        [&mut bytes, &mut expected].into_iter().for_each(|to| to.extend_from_slice(&empty[..4]));
        for (piece, room) in [(1, 1), (1, 200), (5, 7), (13, 63), (64, 64), (100, 65), (4096, 4096), (4096, 10)] {
            assert!(left(&bytes, piece, room).await == expected, "pieces of {piece}, room for {room}");
        }
    }

    #[tokio::test]
    async fn a_flood_of_them_is_left_to_the_library() {
        let bytes = [&b"PRI"[..], &frame(DATA, 0, 3, &[]).repeat(1000)].concat();
        let left = (left(&bytes, 4096, 4096).await.len() - 3) / FRAME_HEAD;
        assert_eq!(left, 1000 - (IN_A_ROW - LEFT_IN) as usize);
    }
}
