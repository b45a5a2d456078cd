//! The client end of one HBONE connection.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Request, StatusCode};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
    time::timeout,
};

use super::{
    CLIENT_HEADER_LIST, ERROR_RESETS, HANDSHAKE_TIMEOUT, IDLE_RELEASE, MAX_FRAME, POOL_STREAMS, RESET_MEMORY, RESET_STREAMS, SEND_BUFFER,
    STREAM_WINDOW, Tunnel, keepalive, tunnel::Held, windows::WindowShare,
};
use crate::io::{sparse::Sparse, turn::LastOfAll};

/// Why a tunnel could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("the HTTP/2 handshake failed")]
    Handshake(#[source] h2::Error),
    #[error("the peer did not finish the HTTP/2 handshake in time")]
    HandshakeTimeout,
    /// The peer, or the application behind it.
    #[error("the peer did not answer in time")]
    ResponseTimeout,
    /// The connection broke, or was being shut down, before the peer looked at the request: another one may do.
    #[error("the HBONE connection is closing")]
    Closing(#[source] Option<h2::Error>),
    #[error("the tunnel request failed")]
    Request(#[source] h2::Error),
    /// In ztunnel's words, as its users search for them.
    #[error("http status: {0}")]
    Refused(StatusCode),
}

/// How long a peer may leave a request unanswered, and every other, until no more are sent to it on the same connection.
const SILENCE: Duration = Duration::from_secs(5);

/// A connection that tunnels can be opened on; cheap to clone. It closes itself when idle for [`IDLE_RELEASE`].
#[derive(Debug, Clone)]
pub struct Connection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Taken out when the connection is to end: without senders and streams it says GOAWAY and closes.
    send: Mutex<Option<SendRequest<Bytes>>>,
    streams: AtomicUsize,
    /// Requests that the peer has answered.
    answers: AtomicUsize,
    closed: AtomicBool,
    /// What goes on in it does well to go elsewhere.
    leaving: AtomicBool,
    revoked: AtomicBool,
    /// Woken when the number of streams changes, and to close.
    changed: Notify,
    /// Woken when the peer may be gone.
    doubted: Notify,
    /// Woken, all of them, when that is so.
    left: Notify,
    /// The same, for who keeps the connection.
    keeper: OnceLock<Arc<Notify>>,
}

/// Says whether the connection of a tunnel is about to end: what goes on in it does well to go elsewhere.
#[derive(Debug, Clone)]
pub struct Leaving(Arc<Shared>);

impl Leaving {
    pub fn is_so(&self) -> bool {
        self.0.leaving.load(Ordering::SeqCst)
    }

    /// Whether it is because the peer's certificate has been revoked.
    pub fn is_revoked(&self) -> bool {
        self.0.revoked.load(Ordering::SeqCst)
    }

    /// Completes when it is so.
    pub async fn wait(&self) {
        let mut leaving = pin!(self.0.left.notified());
        // Registered before it is looked.
        leaving.as_mut().enable();
        if !self.is_so() {
            leaving.await;
        }
    }
}

impl Shared {
    /// Takes no more tunnels; what is in those there are may stay.
    fn refuse(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.changed.notify_one();
    }

    /// The same, and what is in the tunnels is to go.
    fn leave(&self) {
        self.refuse();
        if !self.leaving.swap(true, Ordering::SeqCst) {
            self.left.notify_waiters();
            // Without tunnels there is nothing to look for.
            if let Some(keeper) = self.keeper.get()
                && self.streams.load(Ordering::SeqCst) > 0
            {
                keeper.notify_one();
            }
        }
    }

    /// Whether the peer has said that it takes no more streams.
    fn is_sent_away(&self) -> bool {
        self.send.lock().as_mut().is_some_and(is_sent_away)
    }

    fn sender(&self) -> Option<SendRequest<Bytes>> {
        self.send.lock().clone()
    }
}

/// Whether the peer of a connection has said that it takes no more streams, of which the library tells who asks for one.
pub fn is_sent_away(send: &mut SendRequest<Bytes>) -> bool {
    matches!(send.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Err(_)))
}

/// One open stream of a connection.
#[derive(Debug)]
struct StreamGuard(Arc<Shared>);

impl Held for StreamGuard {
    fn leaving(&self) -> Leaving {
        Leaving(self.0.clone())
    }
}

impl StreamGuard {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.streams.fetch_add(1, Ordering::SeqCst);
        shared.changed.notify_one();
        Self(shared.clone())
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify_one();
    }
}

impl Connection {
    /// Speaks HTTP/2 over an established, authenticated connection and drives it in a task of its own. When `revoked`
    /// completes, the connection and its tunnels are cut.
    pub async fn handshake<T>(io: T, revoked: impl Future<Output = ()> + Send + 'static) -> Result<Self, TunnelError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let share = WindowShare::take();
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(share.first())
            .max_frame_size(MAX_FRAME)
            .max_send_buffer_size(SEND_BUFFER)
            .max_concurrent_reset_streams(RESET_STREAMS)
            .max_local_error_reset_streams(Some(ERROR_RESETS))
            .reset_stream_duration(RESET_MEMORY)
            .max_pending_accept_reset_streams(RESET_STREAMS)
            .max_header_list_size(CLIENT_HEADER_LIST)
            .enable_push(false);
        let handshake =
            timeout(HANDSHAKE_TIMEOUT, builder.handshake(Sparse::behind(0, io))).await.map_err(|_| TunnelError::HandshakeTimeout)?;
        let (send, connection) = handshake.map_err(TunnelError::Handshake)?;
        let shared = Arc::new(Shared {
            send: Mutex::new(Some(send)),
            streams: AtomicUsize::new(0),
            answers: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            revoked: AtomicBool::new(false),
            changed: Notify::new(),
            doubted: Notify::new(),
            left: Notify::new(),
            keeper: OnceLock::new(),
        });
        tokio::spawn(drive(connection, share, shared.clone(), revoked));
        Ok(Self(shared))
    }

    /// Whether another tunnel may be opened here.
    pub fn has_room(&self) -> bool {
        let limit = self.0.sender().map_or(0, |s| s.current_max_send_streams()).min(POOL_STREAMS);
        !self.is_closed() && self.streams() < limit
    }

    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    /// Tunnels open now.
    pub fn streams(&self) -> usize {
        self.0.streams.load(Ordering::SeqCst)
    }

    /// Takes no more tunnels; closes when the open ones have ended.
    pub fn close(&self) {
        self.0.leave();
    }

    /// Asks at once whether the peer is there, and gives it up soon if it does not answer.
    pub fn doubt(&self) {
        self.0.doubted.notify_one();
    }

    /// Whether it takes tunnels, or has some.
    pub fn is_used(&self) -> bool {
        !self.is_closed() || self.streams() > 0
    }

    /// Has this woken when what is in its tunnels is to go. To be called once.
    pub fn kept_by(&self, keeper: &Arc<Notify>) {
        // A second one would be told as well by the first.
        let _ = self.0.keeper.set(keeper.clone());
    }

    /// Opens a tunnel. The timeout is the caller's.
    pub async fn open(&self, request: Request<()>) -> Result<Tunnel, TunnelError> {
        let guard = StreamGuard::new(&self.0);
        let closing = |error| {
            self.0.refuse();
            TunnelError::Closing(Some(error))
        };
        // Counted first, looked at second: whoever closes does it the other way round, so one of the two sees the other.
        let sender = self.0.sender().filter(|_| !self.is_closed()).ok_or(TunnelError::Closing(None))?;
        let mut send = sender.ready().await.map_err(closing)?;
        let (response, stream) = send.send_request(request, false).map_err(closing)?;
        let answered = async {
            let mut response = pin!(response);
            let (answers, mut silence) = (self.0.answers.load(Ordering::SeqCst), pin!(tokio::time::sleep(SILENCE)));
            tokio::select! {
                biased;
                answered = &mut response => return answered,
                () = &mut silence => {}
            }
            // A peer that does not answer may answer nobody any more: others go elsewhere until that is known.
            if self.0.answers.load(Ordering::SeqCst) == answers {
                self.0.refuse();
            }
            response.await
        };
        // Nothing of the client's is sent before there is an answer: what is lost with its connection can be asked again.
        let lost = |error: &h2::Error| unprocessed(error) || error.is_io();
        let response = answered.await.map_err(|error| if lost(&error) { closing(error) } else { TunnelError::Request(error) })?;
        self.0.answers.fetch_add(1, Ordering::SeqCst);
        if response.status() != StatusCode::OK {
            return Err(TunnelError::Refused(response.status()));
        }
        Ok(Tunnel::new(stream, response.into_body(), Some(Box::new(guard))))
    }
}

/// Whether the peer certainly did nothing with the request: it may go to another connection.
fn unprocessed(error: &h2::Error) -> bool {
    error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM)
}

/// Runs the connection until it breaks, is idle too long, or its peer stops answering.
async fn drive<T>(
    mut connection: h2::client::Connection<T, Bytes>,
    mut share: WindowShare,
    shared: Arc<Shared>,
    revoked: impl Future<Output = ()>,
) where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    let ping_pong = connection.ping_pong();
    let lost = async {
        match ping_pong {
            Some(ping_pong) => keepalive(ping_pong, &shared.doubted).await,
            None => std::future::pending().await,
        }
    };
    let unused = async {
        until_unused(&shared).await;
        shared.send.lock().take();
        std::future::pending::<()>().await;
    };
    let mut turn = LastOfAll::default();
    let run = poll_fn(|cx| {
        turn.poll(cx, |cx| {
            if let Some(window) = share.changed() {
                connection.set_target_window_size(window);
            }
            let polled = Pin::new(&mut connection).poll(cx);
            if polled.is_pending() && !shared.leaving.load(Ordering::SeqCst) && shared.is_sent_away() {
                shared.leave();
            }
            polled
        })
    });
    tokio::select! {
        result = run => if let Err(error) = result {
            tracing::debug!(target: "hbone", %error, "connection ended");
        },
        () = lost => tracing::debug!(target: "hbone", "the peer stopped answering pings"),
        () = unused => {}
        // Said by who knows whose it was.
        () = revoked => shared.revoked.store(true, Ordering::SeqCst),
    }
    shared.leave();
    shared.send.lock().take();
}

/// Completes when the connection is closed to new streams and has none.
async fn until_unused(shared: &Shared) {
    loop {
        let idle = shared.streams.load(Ordering::SeqCst) == 0;
        if idle && shared.closed.load(Ordering::SeqCst) {
            return;
        }
        let changed = shared.changed.notified();
        if !idle {
            changed.await;
        } else if timeout(IDLE_RELEASE, changed).await.is_err() {
            shared.refuse();
        }
    }
}
