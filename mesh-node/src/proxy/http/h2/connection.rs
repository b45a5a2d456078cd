//! Connections of HTTP/2, either end.

use std::{
    future::{Future, poll_fn},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    STREAM_WINDOW,
    answers::{Ended, Heard},
    refused::{Refused, Watched},
    unsent::Unsent,
};
use crate::{detect::PREFACE, io::sparse::Sparse};

/// What all streams of a connection may have in flight: as much as all of them may have, or a few that nobody reads would hold up the
/// others.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;
pub const MAX_STREAMS: u32 = 1024;
/// Streams a server is taken to take at a time before it has said how many; what stands for that where it is waited for.
const USUAL_STREAMS: usize = 100;
const UNTOLD: usize = 1_000_003;
/// How long it is waited for that; it is the first thing a server says.
const SETTLES: Duration = Duration::from_millis(200);
/// Of a server's frames. Clients' are left at 16 KiB, which most send whatever they may: by the size that was offered the library reckons how many a
/// head may have before it ends the connection, with all that goes on on it.
const MAX_FRAME: u32 = 64 * 1024;
/// What the library is told that a head or trailers may have: of what is larger it loses the rest without a word, and it takes no more
/// frames of one than that needs, so that it is far above what is let through ([`MAX_HEAD`]).
const HEADER_LIST: u32 = 16 * 60 * 1024;
const SEND_BUFFER: usize = 256 * 1024;
/// Streams a client may reset before they have been served. Beyond it the connection ends: a flood of resets must not cost more than it
/// pays (CVE-2023-44487).
const RESET_STREAMS: usize = 200;
/// Streams reset here that are remembered, and how long: what still comes for others ends the connection, if it is a head or trailers.
const REMEMBERED: usize = 1024;
const RESET_MEMORY: Duration = Duration::from_secs(30);
/// Streams that the peer may have reset here by breaking the protocol in a connection's life. Frames that come late for streams forgotten
/// since are among them, so that the library's thousand would end connections whose clients cancel much.
const ERROR_RESETS: usize = 65_536;
/// How much small frames of data may cost that wait for who reads them: each what it has less than 256 bytes. The library's share of the
/// window is used up by a few clients of many small messages that do not read.
const SMALL_FRAMES: usize = 64 * 1024 * 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A stream as accepted.
pub struct Accepted {
    pub request: Request<RecvStream>,
    pub respond: SendResponse<Bytes>,
    /// Of its connection.
    pub unsent: Arc<Unsent>,
}

/// Says of a stream that nothing has been done, so that it can be asked for elsewhere.
pub fn turn_away(mut accepted: Accepted) {
    accepted.respond.send_reset(Reason::REFUSED_STREAM);
}

/// Serves one connection until it ends. Every stream goes to `on_stream`, which must not wait; none stands for a
/// request that broke the protocol, and has been refused.
///
/// When `drain` completes, the client is told to go elsewhere (GOAWAY); open streams go on to their end.
/// `streams`: how many there may be at a time.
pub async fn serve<T>(
    io: T,
    streams: u32,
    mut on_stream: impl FnMut(Option<Accepted>),
    drain: impl Future<Output = ()>,
) -> Result<(), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(streams)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_reset_streams(REMEMBERED)
        .max_pending_accept_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(SMALL_FRAMES)
        .reset_stream_duration(RESET_MEMORY);
    let (refused, unsent) = (Arc::new(Refused::default()), Arc::new(Unsent::default()));
    let handshake = tokio::time::timeout(
        HANDSHAKE_TIMEOUT,
        builder.handshake(Watched::new(Sparse::behind(PREFACE.len(), io), refused.clone(), unsent.clone())),
    )
    .await;
    let Ok(handshake) = handshake else { return Err(Reason::SETTINGS_TIMEOUT.into()) };
    let mut connection = handshake?;
    let mut drain = std::pin::pin!(drain);
    let mut draining = false;
    loop {
        let accepted = poll_fn(|cx| {
            let polled = connection.poll_accept(cx);
            if let Poll::Ready(Some(Ok((_, respond)))) = &polled {
                refused.accepted(respond.stream_id().into());
            }
            // Of what has come, nothing else is accepted when there is nothing to accept.
            let settled = !matches!(polled, Poll::Ready(Some(Ok(_))));
            let broken = matches!(&polled, Poll::Ready(Some(Err(error))) if error.is_library());
            (0..refused.take(settled, broken)).for_each(|_| on_stream(None));
            polled
        });
        tokio::select! {
            biased;
            () = &mut drain, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            accepted = accepted => match accepted {
                Some(accepted) => {
                    let (request, respond) = accepted?;
                    on_stream(Some(Accepted { request, respond, unsent: unsent.clone() }));
                }
                None => return Ok(()),
            }
        }
    }
}

/// The client end of a connection, to open streams on.
pub struct Opened {
    pub send: h2::client::SendRequest<Bytes>,
    /// Streams whose answers have come whole.
    pub whole: Arc<Ended>,
    /// Must be driven for anything to happen.
    pub connection: Box<dyn Future<Output = Result<(), h2::Error>> + Send + Unpin>,
}

/// Opens a connection on which streams may be opened at once.
pub async fn connect<T>(io: T) -> Result<Opened, h2::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    connect_with(io, USUAL_STREAMS).await
}

/// Opens one to be [settled](Opened::settle).
pub async fn connect_to_settle<T>(io: T) -> Result<Opened, h2::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    connect_with(io, UNTOLD).await
}

async fn connect_with<T>(io: T, streams: usize) -> Result<Opened, h2::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_reset_streams(REMEMBERED)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(SMALL_FRAMES)
        .reset_stream_duration(RESET_MEMORY)
        .initial_max_send_streams(streams)
        .enable_push(false);
    let whole = Arc::<Ended>::default();
    let (send, connection) = builder.handshake(Heard::new(Sparse::behind(0, io), whole.clone())).await?;
    Ok(Opened { send, whole, connection: Box::new(connection) })
}

/// How many streams a connection takes at a time.
pub fn most_streams(send: &h2::client::SendRequest<Bytes>) -> u32 {
    match send.current_max_send_streams() {
        UNTOLD => MAX_STREAMS,
        most => u32::try_from(most).unwrap_or(MAX_STREAMS).min(MAX_STREAMS),
    }
}

impl Opened {
    /// Waits until the application has said how many streams it takes at a time, or for a moment. An error is its end before that, in order
    /// or not.
    pub async fn settle(&mut self) -> Result<(), h2::Error> {
        let Self { send, connection, .. } = self;
        let settled = poll_fn(|cx| match std::pin::Pin::new(&mut *connection).poll(cx) {
            // It has said what it takes, though it may go.
            Poll::Ready(Ok(())) | Poll::Pending if send.current_max_send_streams() != UNTOLD => Poll::Ready(Ok(())),
            Poll::Ready(ended) => Poll::Ready(ended.and(Err(h2::Reason::CONNECT_ERROR.into()))),
            Poll::Pending => Poll::Pending,
        });
        tokio::time::timeout(SETTLES, settled).await.unwrap_or(Ok(()))
    }
}
