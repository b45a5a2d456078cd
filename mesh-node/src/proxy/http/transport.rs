//! What HTTP is spoken over: a TCP connection, or a tunnel to another node.

use std::{
    io::{self, IoSlice},
    pin::Pin,
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
        Tunnel,
        tunnel::{TunnelSink, TunnelSource},
    },
    io::{
        relay::{Duplex, Prefixed, PrefixedSource, Sink as _, Source as _, TcpSink, TcpSource},
        socket::{has_input, reset_on_close},
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
        match self {
            Self::Tcp(stream) => {
                let (source, sink) = stream.halves();
                (TransportSource::Tcp(source), TransportSink::Tcp(sink))
            }
            Self::Prefixed(stream) => {
                let (source, sink) = stream.halves();
                (TransportSource::Prefixed(source), TransportSink::Tcp(sink))
            }
            Self::Tunnel(tunnel) => {
                let (source, sink) = tunnel.halves();
                (TransportSource::Tunnel(source), TransportSink::Tunnel(sink))
            }
        }
    }

    /// Whether nothing has come and the other end has not closed: an idle connection can be used again.
    pub fn is_quiet(&mut self) -> bool {
        match self {
            Self::Tcp(stream) => !has_input(stream),
            Self::Prefixed(stream) => !has_input(stream.get_ref()),
            Self::Tunnel(tunnel) => tunnel.is_quiet(),
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

    /// Ends it so that the other end sees a failure.
    pub fn reset(self) {
        match self {
            Self::Tcp(stream) => reset_on_close(&stream),
            Self::Prefixed(stream) => reset_on_close(stream.get_ref()),
            Self::Tunnel(tunnel) => tunnel.reset(),
        }
    }
}

pub enum TransportSource<'a> {
    Tcp(TcpSource<'a>),
    Prefixed(PrefixedSource<'a>),
    Tunnel(TunnelSource<'a>),
}

impl TransportSource<'_> {
    pub async fn next(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Tcp(source) => source.next().await,
            Self::Prefixed(source) => source.next().await,
            Self::Tunnel(source) => source.next().await,
        }
    }

    pub fn passed_on(&mut self, n: usize) {
        match self {
            Self::Tcp(source) => source.passed_on(n),
            Self::Prefixed(source) => source.passed_on(n),
            Self::Tunnel(source) => source.passed_on(n),
        }
    }
}

pub enum TransportSink<'a> {
    Tcp(TcpSink<'a>),
    Tunnel(TunnelSink<'a>),
}

/// Pieces in one vectored write.
const SLICES: usize = 16;

impl TransportSink<'_> {
    /// Writes everything; what is written when this is dropped has left `out`.
    pub async fn write(&mut self, out: &mut Out) -> io::Result<()> {
        while !out.is_empty() {
            match self {
                Self::Tcp(sink) => {
                    let n = {
                        let mut slices = [IoSlice::new(&[]); SLICES];
                        let n = out.slices(&mut slices);
                        sink.write_some(&slices[..n]).await?
                    };
                    out.written(n)?;
                }
                Self::Tunnel(sink) => {
                    if let Some(piece) = out.first() {
                        sink.put_part(piece).await?;
                    }
                }
            }
        }
        Ok(())
    }

    pub async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(sink) => sink.finish().await,
            Self::Tunnel(sink) => sink.finish().await,
        }
    }

    pub async fn broken(&mut self) -> io::Error {
        match self {
            Self::Tcp(sink) => sink.broken().await,
            Self::Tunnel(sink) => sink.broken().await,
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
