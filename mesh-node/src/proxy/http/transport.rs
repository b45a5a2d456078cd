//! What HTTP is spoken over: a TCP connection, or a tunnel to another node.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::framing::Out;
use crate::{
    hbone::{
        Leaving, Tunnel,
        tunnel::{TunnelSink, TunnelSource},
    },
    io::{
        relay::{Duplex, Prefixed, PrefixedSource, Sink as _, Source as _, TcpSink, TcpSource, Traffic},
        socket::{Known, has_input, reset_on_close},
    },
};

#[derive(Debug)]
pub enum Transport {
    Tcp(TcpStream),
    /// With first bytes that were read already.
    Prefixed(Prefixed),
    Tunnel(Box<Tunnel>),
}

impl Transport {
    pub fn halves(&mut self) -> (TransportSource<'_>, TransportSink<'_>) {
        let (source, sink) = match self {
            Self::Tcp(stream) => {
                let (source, sink) = stream.halves();
                (SourceKind::Tcp(source), SinkKind::Tcp(sink))
            }
            Self::Prefixed(stream) => {
                let (source, sink) = stream.halves();
                (SourceKind::Prefixed(source), SinkKind::Tcp(sink))
            }
            Self::Tunnel(tunnel) => {
                let (source, sink) = tunnel.halves();
                (SourceKind::Tunnel(source), SinkKind::Tunnel(sink))
            }
        };
        (TransportSource { kind: source, read: None }, TransportSink { kind: sink, written: None })
    }

    /// The same, and counts the bytes that are read and written.
    pub fn counted_halves<'a>(&'a mut self, read: &'a AtomicU64, written: &'a AtomicU64) -> (TransportSource<'a>, TransportSink<'a>) {
        let (mut source, mut sink) = self.halves();
        (source.read, sink.written) = (Some(read), Some(written));
        (source, sink)
    }

    /// Whether another node is at the other end.
    pub fn is_tunnel(&self) -> bool {
        matches!(self, Self::Tunnel(_))
    }

    /// This end's address; none of a tunnel.
    pub fn local(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(stream) => stream.local_addr().ok(),
            Self::Prefixed(stream) => stream.get_ref().local_addr().ok(),
            Self::Tunnel(_) => None,
        }
    }

    /// Whether nothing has come and the other end has not closed: an idle connection can be used again.
    pub fn is_quiet(&mut self, known: Known) -> bool {
        match self {
            Self::Tcp(stream) => !has_input(stream, known),
            Self::Prefixed(stream) => !has_input(stream.get_ref(), known),
            Self::Tunnel(tunnel) => tunnel.is_quiet(),
        }
    }

    /// Says whether the connection it is a tunnel of takes no more of them.
    pub fn leaving(&self) -> Option<Leaving> {
        match self {
            Self::Tcp(_) | Self::Prefixed(_) => None,
            Self::Tunnel(tunnel) => tunnel.leaving(),
        }
    }

    /// Puts back what has been read and not been accounted for.
    pub fn unread(self, read: Bytes) -> Self {
        match self {
            _ if read.is_empty() => self,
            Self::Tcp(stream) => Self::Prefixed(Prefixed::new(stream, read)),
            Self::Prefixed(mut stream) => {
                stream.unread(read);
                Self::Prefixed(stream)
            }
            Self::Tunnel(mut tunnel) => {
                tunnel.unread(&read);
                Self::Tunnel(tunnel)
            }
        }
    }

    /// Arranges that the other end sees a failure when this is dropped before it has ended. A tunnel does so by itself.
    pub fn reset_when_dropped(&self) {
        match self {
            Self::Tcp(stream) => reset_on_close(stream),
            Self::Prefixed(stream) => reset_on_close(stream.get_ref()),
            Self::Tunnel(_) => {}
        }
    }

    /// Ends it so that the other end sees no failure, of a connection on which nothing is under way.
    pub fn end(self) {
        match self {
            Self::Tcp(_) | Self::Prefixed(_) => {}
            Self::Tunnel(tunnel) => tunnel.end(),
        }
    }

    /// Ends it so that another node sees that what came from here was not of the protocol that was spoken, and any other end a failure.
    pub fn garble(self) {
        match self {
            Self::Tunnel(tunnel) => tunnel.garble(),
            other => other.reset(),
        }
    }

    /// Ends it so that another node sees that nothing has become of the request it sent last, and any other end a failure.
    pub fn refuse(self) {
        match self {
            Self::Tunnel(tunnel) => tunnel.refuse(),
            other => other.reset(),
        }
    }

    /// Ends it so that the other end sees a failure.
    pub fn reset(self) {
        match self {
            Self::Tcp(stream) => reset_on_close(&stream),
            Self::Prefixed(stream) => reset_on_close(stream.get_ref()),
            Self::Tunnel(tunnel) => tunnel.reset(),
        }
    }
}

pub struct TransportSource<'a> {
    kind: SourceKind<'a>,
    read: Option<&'a AtomicU64>,
}

enum SourceKind<'a> {
    Tcp(TcpSource<'a>),
    Prefixed(PrefixedSource<'a>),
    Tunnel(TunnelSource<'a>),
}

impl TransportSource<'_> {
    pub async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let next = match &mut self.kind {
            SourceKind::Tcp(source) => source.next().await,
            SourceKind::Prefixed(source) => source.next().await,
            SourceKind::Tunnel(source) => source.next().await,
        };
        if let (Ok(Some(data)), Some(read)) = (&next, self.read) {
            read.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
        next
    }

    /// Whether another node is at the other end.
    pub fn is_tunnel(&self) -> bool {
        matches!(self.kind, SourceKind::Tunnel(_))
    }

    pub fn passed_on(&mut self, n: usize) {
        match &mut self.kind {
            SourceKind::Tcp(source) => source.passed_on(n),
            SourceKind::Prefixed(source) => source.passed_on(n),
            SourceKind::Tunnel(source) => source.passed_on(n),
        }
    }
}

pub struct TransportSink<'a> {
    kind: SinkKind<'a>,
    written: Option<&'a AtomicU64>,
}

impl TransportSink<'_> {
    /// Whether it leads to another node.
    pub fn is_tunnel(&self) -> bool {
        matches!(self.kind, SinkKind::Tunnel(_))
    }
}

enum SinkKind<'a> {
    Tcp(TcpSink<'a>),
    Tunnel(TunnelSink<'a>),
}

/// Pieces in one vectored write.
const SLICES: usize = 16;
/// Bytes of pieces that go into a tunnel as one: each is a frame of its own, with all that takes at both ends.
const JOINED: usize = 8 * 1024;

impl TransportSink<'_> {
    /// Writes everything; what is written when this is dropped has left `out`.
    pub async fn write(&mut self, out: &mut Out) -> io::Result<()> {
        while !out.is_empty() {
            let n = match &mut self.kind {
                SinkKind::Tcp(sink) => {
                    let n = {
                        let mut slices = [IoSlice::new(&[]); SLICES];
                        let n = out.slices(&mut slices);
                        sink.write_some(&slices[..n]).await?
                    };
                    out.written(n)?;
                    n
                }
                SinkKind::Tunnel(sink) => {
                    out.join(JOINED);
                    match out.first() {
                        Some(piece) => {
                            let before = piece.len();
                            sink.put_part(piece).await?;
                            before - piece.len()
                        }
                        None => 0,
                    }
                }
            };
            if let Some(written) = self.written {
                written.fetch_add(n as u64, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Whether what is dropped ends with a reset; a tunnel does, before its end.
    pub fn resets_when_dropped(&self, resets: bool) {
        if let SinkKind::Tcp(sink) = &self.kind {
            sink.resets_when_dropped(resets);
        }
    }

    /// Whether another node says, in time, that nothing has become of what was written last.
    pub async fn is_refused(&mut self) -> bool {
        match &mut self.kind {
            SinkKind::Tcp(_) => false,
            SinkKind::Tunnel(sink) => sink.is_refused().await,
        }
    }

    pub async fn finish(&mut self) -> io::Result<()> {
        match &mut self.kind {
            SinkKind::Tcp(sink) => sink.finish().await,
            SinkKind::Tunnel(sink) => sink.finish().await,
        }
    }

    pub async fn broken(&mut self) -> io::Error {
        match &mut self.kind {
            SinkKind::Tcp(sink) => sink.broken().await,
            SinkKind::Tunnel(sink) => sink.broken().await,
        }
    }
}

/// A transport whose bytes are counted, for HTTP/2.
pub struct Counted {
    /// There until this is dropped.
    transport: Option<Transport>,
    traffic: Arc<Traffic>,
    /// It is the connection to the application: what is written is what was sent.
    upstream: bool,
    /// Nothing is under way on it any more.
    unused: Arc<AtomicBool>,
}

impl Counted {
    /// A connection from a client.
    pub fn downstream(transport: Transport, traffic: Arc<Traffic>) -> Self {
        Self { transport: Some(transport), traffic, upstream: false, unused: Arc::default() }
    }

    /// A connection to an application; it ends in order when it is dropped unused.
    pub fn upstream(transport: Transport, traffic: Arc<Traffic>, unused: Arc<AtomicBool>) -> Self {
        Self { transport: Some(transport), traffic, upstream: true, unused }
    }

    fn transport(&mut self) -> io::Result<Pin<&mut Transport>> {
        self.transport.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn count(&self, written: bool, n: usize) {
        let of = if written == self.upstream { &self.traffic.sent } else { &self.traffic.received };
        of.fetch_add(n as u64, Ordering::Relaxed);
    }
}

impl AsyncRead for Counted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = this.transport()?.poll_read(cx, buf);
        this.count(false, buf.filled().len() - before);
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = this.transport()?.poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = &polled {
            this.count(true, *n);
        }
        polled
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = this.transport()?.poll_write_vectored(cx, slices);
        if let Poll::Ready(Ok(n)) = &polled {
            this.count(true, *n);
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().transport()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().transport()?.poll_shutdown(cx)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(transport) = self.transport.take().filter(|_| self.unused.load(Ordering::Acquire)) {
            transport.end();
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Prefixed(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tunnel(tunnel) => tunnel.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Prefixed(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tunnel(tunnel) => tunnel.poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Prefixed(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            // It makes frames of its own: one piece at a time is as good.
            Self::Tunnel(tunnel) => tunnel.poll_write(cx, slices.iter().find(|s| !s.is_empty()).map_or(&[], |s| &**s)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        !matches!(self, Self::Tunnel(_))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Prefixed(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tunnel(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Prefixed(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tunnel(tunnel) => Poll::Ready(tunnel.shutdown()),
        }
    }
}
