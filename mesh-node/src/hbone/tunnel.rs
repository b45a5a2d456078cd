//! One CONNECT stream as a byte stream.
//!
//! End of data is `END_STREAM` and nothing else. A stream that stops in any other way was cut: RFC 9113 section 8.5 asks a
//! proxy to turn a TCP reset into `RST_STREAM(CONNECT_ERROR)` and any stream error into a TCP reset, and so it is here,
//! both ways. (ztunnel reads CANCEL as an end of data; a truncated answer then looks complete.) `RST_STREAM(NO_ERROR)` behind
//! `END_STREAM` is no error: what came before it is all, and what is still sent is for nobody.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::ReadBuf;

use super::client::Leaving;
use crate::io::relay::{Duplex, Sink, Source};

/// What is joined at most while the other side takes nothing; beyond it frames stay as they came, bounded by the window.
const JOINED_MAX: usize = super::STREAM_WINDOW as usize;

/// Frames are joined to be passed on together while they are less than this.
const GATHERED_MAX: usize = 16 * 1024;

/// An established tunnel.
#[derive(Debug)]
pub struct Tunnel {
    send: SendStream<Bytes>,
    receive: RecvStream,
    joined: BytesMut,
    /// Held as long as the tunnel is: a count of the connection's streams, for instance.
    held: Option<Box<dyn Held>>,
}

/// Something a tunnel keeps alive.
pub trait Held: Send + Sync + std::fmt::Debug {
    fn leaving(&self) -> Leaving;
}

impl Tunnel {
    pub fn new(send: SendStream<Bytes>, receive: RecvStream, held: Option<Box<dyn Held>>) -> Self {
        Self { send, receive, joined: BytesMut::new(), held }
    }

    /// Puts back what has been read and not been accounted for.
    pub fn unread(&mut self, read: &[u8]) {
        let after = self.joined.split();
        self.joined.extend_from_slice(read);
        self.joined.extend_from_slice(&after);
    }

    /// Says whether its connection takes no more tunnels; none where that is not known.
    pub fn leaving(&self) -> Option<Leaving> {
        self.held.as_ref().map(|held| held.leaving())
    }

    /// Whether nothing has come and the other end has not closed.
    pub fn is_quiet(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.joined.is_empty() && self.receive.poll_data(&mut cx).is_pending()
    }

    /// What has come and not been read.
    pub fn arrived(&self) -> &[u8] {
        &self.joined
    }

    /// Completes when something has come, or the other end has closed. Nothing is lost.
    pub async fn spoken(&mut self) {
        while self.joined.is_empty() {
            match poll_fn(|cx| self.receive.poll_data(cx)).await {
                Some(Ok(data)) => self.joined.extend_from_slice(&data),
                // Whoever reads next finds the same.
                Some(Err(_)) | None => return,
            }
        }
    }

    /// Reads into a buffer; for protocols that want one. The peer may send on at once.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.joined.is_empty() {
            match ready!(self.receive.poll_data(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
                Some(Ok(data)) => self.joined.extend_from_slice(&data),
            }
        }
        let n = self.joined.len().min(buffer.remaining());
        buffer.put_slice(&self.joined.split_to(n));
        // Fails only when the stream is gone, and then there is no window to widen.
        let _ = self.receive.flow_control().release_capacity(n);
        Poll::Ready(Ok(()))
    }

    /// Writes what the peer's window has room for.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(data.len());
        while self.send.capacity() == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let n = self.send.capacity().min(data.len());
        let sent = self.send.send_data(Bytes::copy_from_slice(&data[..n]), false);
        Poll::Ready(sent.map(|()| n).map_err(into_io))
    }

    /// Ends it in order: its other end is told that no more will come, and has a moment to say the same. Let go of as it is, a tunnel
    /// looks broken there.
    pub fn end(mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.shutdown().is_err() {
            return;
        }
        runtime.spawn(async move {
            let ended = async {
                while let Some(Ok(data)) = self.receive.data().await {
                    let _ = self.receive.flow_control().release_capacity(data.len());
                }
            };
            let _ = tokio::time::timeout(UNTIL_ENDED, ended).await;
            drop(self);
        });
    }

    /// Says that no more data will come.
    pub fn shutdown(&mut self) -> io::Result<()> {
        self.send.send_data(Bytes::new(), true).map_err(into_io)
    }
}

/// How long an end that has been told of the other's may take to come.
const UNTIL_ENDED: Duration = Duration::from_secs(5);
/// Between the last of what was said and the reset of its stream.
const BEFORE_RESET: Duration = Duration::from_millis(5);
/// How long a node is given to say what has become of what was sent to it, when it has ended without an answer: some times as long as that.
const WORD: Duration = Duration::from_millis(50);

impl Duplex for Tunnel {
    type Source<'a> = TunnelSource<'a>;
    type Sink<'a> = TunnelSink<'a>;

    fn halves(&mut self) -> (TunnelSource<'_>, TunnelSink<'_>) {
        let source = TunnelSource { stream: &mut self.receive, joined: &mut self.joined, end: None };
        (source, TunnelSink { stream: &mut self.send, finished: false, asks: self.held.is_some() })
    }

    fn reset(self) {
        self.reset_as(Reason::CONNECT_ERROR);
    }
}

impl Tunnel {
    /// Ends it so that the other end sees that what came from here was not of the protocol that was spoken.
    pub fn garble(self) {
        self.reset_as(Reason::PROTOCOL_ERROR);
    }

    /// Ends it so that the other end sees that nothing has become of what it said last.
    pub fn refuse(self) {
        self.reset_as(Reason::REFUSED_STREAM);
    }

    fn reset_as(mut self, reason: Reason) {
        // A reset drops what the library has not written yet, which may be the last that was said.
        tokio::spawn(async move {
            tokio::time::sleep(BEFORE_RESET).await;
            self.send.send_reset(reason);
            drop(self);
        });
    }
}

/// The receiving direction.
pub struct TunnelSource<'a> {
    stream: &'a mut RecvStream,
    /// Frames that arrived while the other side had no room.
    joined: &'a mut BytesMut,
    /// What came after them, when they were all.
    end: Option<io::Result<()>>,
}

impl TunnelSource<'_> {
    async fn receive(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            match self.stream.data().await? {
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Some(Ok(data)),
                Err(error) => return Some(Err(into_io(error))),
            }
        }
    }

    /// Joins what has come together with a small frame: it is passed on in one piece. Of a message its parts often are frames of their
    /// own.
    fn gather(&mut self, first: &Bytes) {
        let mut cx = Context::from_waker(Waker::noop());
        // Whoever reads next waits for more.
        while first.len().max(self.joined.len()) < GATHERED_MAX && self.end.is_none() {
            let Poll::Ready(next) = self.stream.poll_data(&mut cx) else { return };
            match next {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    if self.joined.is_empty() {
                        self.joined.extend_from_slice(first);
                    }
                    self.joined.extend_from_slice(&data);
                }
                Some(Err(error)) => self.end = Some(Err(into_io(error))),
                None => self.end = Some(Ok(())),
            }
        }
    }

    /// All of them, and no memory is kept for more.
    fn take_joined(&mut self) -> Bytes {
        std::mem::take(self.joined).freeze()
    }

    /// Takes one more frame into the joined ones. False when there will be none.
    async fn join_next(&mut self) -> bool {
        match self.receive().await {
            Some(Ok(data)) => {
                self.joined.extend_from_slice(&data);
                return true;
            }
            Some(Err(error)) => self.end = Some(Err(error)),
            None => self.end = Some(Ok(())),
        }
        false
    }
}

impl Source for TunnelSource<'_> {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if !self.joined.is_empty() {
            return Ok(Some(self.take_joined()));
        }
        if let Some(end) = self.end.take() {
            return end.map(|()| None);
        }
        let first = match self.receive().await {
            None => return Ok(None),
            Some(first) => first?,
        };
        self.gather(&first);
        Ok(Some(if self.joined.is_empty() { first } else { self.take_joined() }))
    }

    fn passed_on(&mut self, n: usize) {
        // Fails only when the stream is gone, and then there is no window to widen.
        let _ = self.stream.flow_control().release_capacity(n);
        if self.joined.is_empty() {
            *self.joined = BytesMut::new();
        }
    }

    async fn absorb(&mut self) -> io::Error {
        while self.end.is_none() && self.joined.len() < JOINED_MAX {
            if !self.join_next().await {
                break;
            }
        }
        match self.end.take() {
            Some(Err(error)) => error,
            end => {
                self.end = end;
                std::future::pending().await
            }
        }
    }
}

/// The sending direction.
pub struct TunnelSink<'a> {
    stream: &'a mut SendStream<Bytes>,
    finished: bool,
    /// This end has opened it: only who is asked may want no more of a question.
    asks: bool,
}

impl TunnelSink<'_> {
    /// Whether the peer wants no more, and says that this is no error: it has sent all it had to (RFC 9113 section 8.1), or the
    /// other direction finds out that it has not. Envoy ends in this way what its upstream closes first.
    fn is_unwanted(&mut self) -> bool {
        let reason = self.stream.poll_reset(&mut Context::from_waker(Waker::noop()));
        self.asks && matches!(reason, Poll::Ready(Ok(Reason::NO_ERROR)))
    }

    /// Sends of a piece what there is room for, at least one byte; returns the rest. Nothing is lost when this is dropped.
    pub async fn put_part(&mut self, piece: &mut Bytes) -> io::Result<()> {
        let n = capacity(self.stream, piece.len()).await?;
        self.stream.send_data(piece.split_to(n), false).map_err(into_io)
    }

    /// Whether the other end says, in time, that nothing has become of what was said last: it may have ended before it came.
    pub async fn is_refused(&mut self) -> bool {
        let reset = poll_fn(|cx| self.stream.poll_reset(cx));
        matches!(tokio::time::timeout(WORD, reset).await, Ok(Ok(Reason::REFUSED_STREAM)))
    }
}

impl Sink for TunnelSink<'_> {
    async fn put(&mut self, mut chunk: Bytes) -> io::Result<()> {
        while !chunk.is_empty() {
            match self.put_part(&mut chunk).await {
                Ok(()) => {}
                Err(_) if self.is_unwanted() => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn finish(&mut self) -> io::Result<()> {
        self.finished = true;
        match self.stream.send_data(Bytes::new(), true) {
            Err(error) if !self.is_unwanted() => Err(into_io(error)),
            _ => Ok(()),
        }
    }

    async fn broken(&mut self) -> io::Error {
        if self.finished {
            return std::future::pending().await;
        }
        let reason = poll_fn(|cx| self.stream.poll_reset(cx)).await;
        match reason {
            // The other direction tells whether that was all.
            Ok(Reason::NO_ERROR) if self.asks => std::future::pending().await,
            Ok(reason) => into_io(reason.into()),
            Err(error) => into_io(error),
        }
    }
}

/// Whether an error of a tunnel is that whoever is at its other end has reset the connection.
pub fn is_reset(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<h2::Error>());
    inner.and_then(h2::Error::reason) == Some(Reason::CONNECT_ERROR)
}

/// Whether the other end has said that what came from there was not of the protocol that was spoken.
pub fn is_garbled(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<h2::Error>());
    inner.is_some_and(|error| error.is_reset() && error.is_remote() && error.reason() == Some(Reason::PROTOCOL_ERROR))
}

/// Waits until the peer's window has room for at least one byte of the `wanted` ones, and says for how many.
pub async fn capacity(stream: &mut SendStream<Bytes>, wanted: usize) -> io::Result<usize> {
    stream.reserve_capacity(wanted);
    loop {
        let ready = stream.capacity();
        if ready > 0 {
            return Ok(ready.min(wanted));
        }
        match poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(into_io(error)),
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// An HTTP/2 error as the rest of the proxy sees errors.
pub fn into_io(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
