//! Relays bytes between two byte streams the way TCP would: each direction ends on its own, a reset is a reset, and a
//! reader that does not read stops the writer.
//!
//! Memory: a direction holds one chunk of at most [`MAX_CHUNK`] bytes, and none while it waits for data.

use std::{
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::{
    rarely::Rarely,
    socket::{end_on_close, reset_on_close},
};

/// How long what an end has said before it broke may take to be passed on.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// First read of a direction, bytes; doubles while reads fill it, up to [`MAX_CHUNK`].
pub const MIN_CHUNK: usize = 8 * 1024;
/// Bytes of pieces that are written as one.
const JOINED: usize = 1024;
/// Largest read of a direction, bytes.
pub const MAX_CHUNK: usize = 128 * 1024;

/// Why a relay stopped before both directions had ended.
#[derive(Debug, thiserror::Error)]
pub enum Broken<C> {
    #[error("reading from the {side} failed")]
    Read { side: Side, source: io::Error },
    #[error("writing to the {side} failed")]
    Write { side: Side, source: io::Error },
    /// Somebody wanted it ended.
    #[error("cut")]
    Cut(C),
}

/// Which of the two ends, seen from the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Downstream,
    Upstream,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Downstream => "downstream connection",
            Self::Upstream => "upstream connection",
        })
    }
}

/// Where bytes come from.
pub trait Source: Send {
    /// The next chunk, or `None` at the orderly end of the data. A reset or loss is an error.
    fn next(&mut self) -> impl Future<Output = io::Result<Option<Bytes>>> + Send;

    /// Tells that `n` bytes have been passed on, so that the other end may send as many more.
    fn passed_on(&mut self, n: usize);

    /// Takes in what arrives while the sink has no room, as far as it was promised to the other end. Completes only when the source is
    /// reset or lost.
    fn absorb(&mut self) -> impl Future<Output = io::Error> + Send;
}

/// Where bytes go.
pub trait Sink: Send {
    /// Takes a chunk; completes when the other end has room for more.
    fn put(&mut self, chunk: Bytes) -> impl Future<Output = io::Result<()>> + Send;

    /// Says that no more data will come.
    fn finish(&mut self) -> impl Future<Output = io::Result<()>> + Send;

    /// Completes when the sink is found to be broken although nothing is being written.
    fn broken(&mut self) -> impl Future<Output = io::Error> + Send;
}

/// A byte stream of two independent directions.
pub trait Duplex: Send {
    type Source<'a>: Source
    where
        Self: 'a;
    type Sink<'a>: Sink
    where
        Self: 'a;

    fn halves(&mut self) -> (Self::Source<'_>, Self::Sink<'_>);

    /// Ends both directions abruptly, so that the other end sees a failure and not an end of data.
    fn reset(self);

    /// Whether that is how it ends when it is dropped, or this process is gone: a stream that is cut off must not look complete.
    fn resets_when_dropped(&mut self, _resets: bool) {}
}

/// Bytes moved so far, readable while the relay runs.
#[derive(Debug, Default)]
pub struct Traffic {
    /// From downstream to upstream.
    pub sent: AtomicU64,
    /// From upstream to downstream.
    pub received: AtomicU64,
}

impl Traffic {
    /// Bytes of both directions.
    pub fn total(&self) -> u64 {
        self.sent.load(Ordering::Relaxed).wrapping_add(self.received.load(Ordering::Relaxed))
    }
}

/// Moves bytes both ways until both directions have ended, one breaks, or `cut` completes; the last two reset both ends.
pub async fn relay<C>(
    mut downstream: impl Duplex,
    mut upstream: impl Duplex,
    traffic: &Traffic,
    cut: impl Future<Output = C>,
) -> Result<(), Broken<C>> {
    let resets = |one: &mut _, other: &mut _, resets| {
        Duplex::resets_when_dropped(one, resets);
        Duplex::resets_when_dropped(other, resets);
    };
    resets(&mut downstream, &mut upstream, true);
    let result = {
        let cut = std::pin::pin!(Rarely::new(cut));
        let (from_down, to_down) = downstream.halves();
        let (from_up, to_up) = upstream.halves();
        let orderly = AtomicBool::new(true);
        let out = direction(from_down, to_up, (Side::Downstream, Side::Upstream), &traffic.sent, &orderly);
        let back = direction(from_up, to_down, (Side::Upstream, Side::Downstream), &traffic.received, &orderly);
        tokio::select! {
            biased;
            reason = cut => Err(Broken::Cut(reason)),
            done = both(out, back, &orderly) => done,
        }
    };
    if result.is_err() {
        downstream.reset();
        upstream.reset();
    } else {
        resets(&mut downstream, &mut upstream, false);
    }
    result
}

/// Runs both directions. Where one breaks because an end takes nothing more, that end may have said something before, which the other
/// direction still passes on: a server may answer and close while its client is still sending.
async fn both<C>(
    out: impl Future<Output = Result<(), Broken<C>>>,
    back: impl Future<Output = Result<(), Broken<C>>>,
    orderly: &AtomicBool,
) -> Result<(), Broken<C>> {
    let (mut out, mut back) = (std::pin::pin!(out), std::pin::pin!(back));
    let broken = tokio::select! {
        biased;
        done = &mut out => match done {
            Ok(()) => return back.await,
            Err(broken) => last_words(broken, back, orderly).await,
        },
        done = &mut back => match done {
            Ok(()) => return out.await,
            Err(broken) => last_words(broken, out, orderly).await,
        },
    };
    Err(broken)
}

async fn last_words<C>(broken: Broken<C>, other: impl Future, orderly: &AtomicBool) -> Broken<C> {
    // Who has heard of the error once is told of an end the next time: that is none.
    orderly.store(false, Ordering::Relaxed);
    if matches!(broken, Broken::Write { .. }) {
        // Ends by itself, as there is nothing more to come; but for a reader that does not read.
        let _ = tokio::time::timeout(LAST_WORDS, other).await;
    }
    broken
}

/// `orderly`: an end of the data is one to be passed on.
async fn direction<C>(
    mut from: impl Source,
    mut to: impl Sink,
    (reader, writer): (Side, Side),
    count: &AtomicU64,
    orderly: &AtomicBool,
) -> Result<(), Broken<C>> {
    let read = |source| Broken::Read { side: reader, source };
    let write = |source| Broken::Write { side: writer, source };
    loop {
        let next = tokio::select! {
            biased;
            next = from.next() => next.map_err(read)?,
            source = to.broken() => return Err(write(source)),
        };
        let Some(chunk) = next else {
            return if orderly.load(Ordering::Relaxed) { to.finish().await.map_err(write) } else { Ok(()) };
        };
        let n = chunk.len();
        tokio::select! {
            biased;
            put = to.put(chunk) => put.map_err(write)?,
            // Who does not read has to hear of that, too.
            source = from.absorb() => return Err(read(source)),
        }
        from.passed_on(n);
        count.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// The reading half of a TCP connection.
pub struct TcpSource<'a> {
    half: ReadHalf<'a>,
    buffer: BytesMut,
    chunk: usize,
}

impl Source for TcpSource<'_> {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn passed_on(&mut self, _n: usize) {}

    async fn absorb(&mut self) -> io::Error {
        // What is not read stays in the kernel, and the peer's window with it.
        std::future::pending().await
    }
}

impl TcpSource<'_> {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        // Readiness first: a direction that waits owns no buffer.
        let stream: &TcpStream = self.half.as_ref();
        if stream.poll_read_ready(cx)?.is_pending() {
            self.buffer = BytesMut::new();
            return Poll::Pending;
        }
        self.buffer.reserve(self.chunk);
        let n = ready!(self.poll_fill(cx))?;
        if n == 0 {
            return Poll::Ready(Ok(None));
        }
        if n == self.chunk {
            self.chunk = (self.chunk * 2).min(MAX_CHUNK);
        }
        Poll::Ready(Ok(Some(self.buffer.split().freeze())))
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let spare = self.buffer.spare_capacity_mut();
        let len = spare.len().min(self.chunk);
        let mut window = ReadBuf::uninit(&mut spare[..len]);
        ready!(Pin::new(&mut self.half).poll_read(cx, &mut window))?;
        let n = window.filled().len();
        // SAFETY: `poll_read` initialised the first `n` bytes of the spare capacity.
        unsafe { self.buffer.set_len(self.buffer.len() + n) };
        Poll::Ready(Ok(n))
    }
}

/// A TCP connection of which the first bytes have been read already: they are read again first.
#[derive(Debug)]
pub struct Prefixed {
    prefix: Bytes,
    stream: TcpStream,
}

impl Prefixed {
    pub fn new(stream: TcpStream, prefix: Bytes) -> Self {
        Self { prefix, stream }
    }

    /// The connection itself, which has nothing to say before what has been read of it.
    pub fn get_ref(&self) -> &TcpStream {
        &self.stream
    }

    /// Puts back what has been read.
    pub fn unread(&mut self, read: Bytes) {
        self.prefix = if self.prefix.is_empty() { read } else { [read, std::mem::take(&mut self.prefix)].concat().into() };
    }
}

impl AsyncRead for Prefixed {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.prefix.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buffer);
        }
        let n = this.prefix.len().min(buffer.remaining());
        buffer.put_slice(&this.prefix.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, data)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl Duplex for Prefixed {
    type Source<'a> = PrefixedSource<'a>;
    type Sink<'a> = TcpSink<'a>;

    fn halves(&mut self) -> (PrefixedSource<'_>, TcpSink<'_>) {
        let (source, sink) = self.stream.halves();
        (PrefixedSource { prefix: &mut self.prefix, source }, sink)
    }

    fn reset(self) {
        self.stream.reset();
    }

    fn resets_when_dropped(&mut self, resets: bool) {
        self.stream.resets_when_dropped(resets);
    }
}

/// The reading half: first what was read before.
pub struct PrefixedSource<'a> {
    prefix: &'a mut Bytes,
    source: TcpSource<'a>,
}

impl Source for PrefixedSource<'_> {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if self.prefix.is_empty() { self.source.next().await } else { Ok(Some(std::mem::take(self.prefix))) }
    }

    fn passed_on(&mut self, n: usize) {
        self.source.passed_on(n);
    }

    async fn absorb(&mut self) -> io::Error {
        self.source.absorb().await
    }
}

/// The writing half of a TCP connection.
pub struct TcpSink<'a>(WriteHalf<'a>);

impl TcpSink<'_> {
    /// As for [`Duplex`].
    pub fn resets_when_dropped(&self, resets: bool) {
        let stream: &TcpStream = self.0.as_ref();
        if resets { reset_on_close(stream) } else { end_on_close(stream) }
    }

    /// Writes what there is room for, at least one byte.
    pub async fn write_some(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match poll_fn(|cx| self.poll_write_some(cx, slices)).await? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            n => Ok(n),
        }
    }

    /// A few short pieces are cheaper copied than described to the kernel.
    fn poll_write_some(&mut self, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let half = Pin::new(&mut self.0);
        if let [only] = slices {
            return half.poll_write(cx, only);
        }
        let bytes = slices.iter().map(|slice| slice.len()).sum();
        let mut joined = [0; JOINED];
        let Some(mut rest) = joined.get_mut(..bytes) else { return half.poll_write_vectored(cx, slices) };
        for slice in slices {
            let (place, after) = rest.split_at_mut(slice.len());
            place.copy_from_slice(slice);
            rest = after;
        }
        half.poll_write(cx, &joined[..bytes])
    }
}

impl Sink for TcpSink<'_> {
    async fn put(&mut self, chunk: Bytes) -> io::Result<()> {
        self.0.write_all(&chunk).await
    }

    async fn finish(&mut self) -> io::Result<()> {
        match self.0.shutdown().await {
            // The peer has reset meanwhile: the reading direction reports it.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            other => other,
        }
    }

    async fn broken(&mut self) -> io::Error {
        // Seen here and not by the reading half when that one has ended, or waits for the other side to take its data.
        let stream: &TcpStream = self.0.as_ref();
        match stream.ready(Interest::ERROR).await {
            Ok(_) => stream.take_error().ok().flatten().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
            Err(error) => error,
        }
    }
}

impl Duplex for TcpStream {
    type Source<'a> = TcpSource<'a>;
    type Sink<'a> = TcpSink<'a>;

    fn halves(&mut self) -> (TcpSource<'_>, TcpSink<'_>) {
        let (read, write) = self.split();
        (TcpSource { half: read, buffer: BytesMut::new(), chunk: MIN_CHUNK }, TcpSink(write))
    }

    fn reset(self) {
        reset_on_close(&self);
    }

    fn resets_when_dropped(&mut self, resets: bool) {
        if resets { reset_on_close(self) } else { end_on_close(self) }
    }
}
