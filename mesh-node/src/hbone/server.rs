//! The server end of one HBONE connection.

use std::{
    future::{Future, poll_fn},
    sync::Arc,
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{
    ERROR_RESETS, HANDSHAKE_TIMEOUT, MAX_FRAME, RESET_MEMORY, RESET_STREAMS, SEND_BUFFER, SERVER_HEADER_LIST, SERVER_MAX_STREAMS,
    STREAM_WINDOW, Tunnel,
    headers::{BadRequest, ConnectRequest, parse},
    keepalive,
    windows::WindowShare,
};
use crate::{
    detect::PREFACE,
    io::{sparse::Sparse, turn::LastOfAll},
};

/// A tunnel somebody asks for.
#[derive(Debug)]
pub struct Offer {
    pub request: Result<ConnectRequest, BadRequest>,
    pub answer: Answer,
    /// Held until whatever came of it is over.
    pub place: OwnedSemaphorePermit,
}

/// How many offers of one connection there may be that are not over: more than it may have open, since what a peer has taken back takes a
/// moment to end. Who takes back faster than that is not listened to until then.
const MOST_OFFERS: usize = 2 * SERVER_MAX_STREAMS as usize;

/// What is to be answered: the tunnel must be accepted or refused; dropped, it is reset.
#[derive(Debug)]
pub struct Answer {
    respond: SendResponse<Bytes>,
    body: RecvStream,
}

impl Answer {
    /// Completes when whoever asked does not want it any more, or is gone.
    pub async fn unwanted(&mut self) {
        let _ = poll_fn(|cx| self.respond.poll_reset(cx)).await;
    }

    /// Says that nothing has been done, so that it can be asked elsewhere.
    pub fn turn_away(mut self) {
        self.respond.send_reset(h2::Reason::REFUSED_STREAM);
    }

    /// Answers 200 and turns the stream into a tunnel.
    pub fn accept(mut self) -> Result<Tunnel, h2::Error> {
        let send = self.respond.send_response(response(StatusCode::OK), false)?;
        Ok(Tunnel::new(send, self.body, None))
    }

    /// Answers with a status and ends the stream.
    pub fn refuse(mut self, status: StatusCode) {
        // A peer that has gone already needs no answer.
        let _ = self.respond.send_response(response(status), true);
    }
}

fn response(status: StatusCode) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = HeaderMap::new();
    response
}

/// How far a connection has come.
enum Step<T> {
    Accepted(Option<Result<T, h2::Error>>),
    Closed(Result<(), h2::Error>),
}

/// Serves one authenticated connection until it ends, handing every request to `on_offer`, which must not wait.
///
/// When `drain` completes, the peer is told to go elsewhere (GOAWAY) and tunnels already open go on to their end.
pub async fn serve<T>(io: T, mut on_offer: impl FnMut(Offer), drain: impl Future<Output = ()>) -> Result<(), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut share = WindowShare::take();
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(share.first())
        .max_frame_size(MAX_FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .reset_stream_duration(RESET_MEMORY)
        .max_pending_accept_reset_streams(RESET_STREAMS)
        .max_header_list_size(SERVER_HEADER_LIST)
        .max_concurrent_streams(SERVER_MAX_STREAMS);
    let handshake = timeout(HANDSHAKE_TIMEOUT, builder.handshake(Sparse::behind(PREFACE.len(), io))).await;
    let Ok(handshake) = handshake else { return Err(h2::Reason::SETTINGS_TIMEOUT.into()) };
    let mut connection = handshake?;
    let ping_pong = connection.ping_pong();
    let lost = async {
        match ping_pong {
            // Nobody doubts a client.
            Some(ping_pong) => keepalive(ping_pong, &Notify::new()).await,
            None => std::future::pending().await,
        }
    };
    let (mut lost, mut drain) = (std::pin::pin!(lost), std::pin::pin!(drain));
    let (mut draining, mut turn) = (false, LastOfAll::default());
    let places = Arc::new(Semaphore::new(MOST_OFFERS));
    let mut place = None;
    loop {
        if place.is_none() {
            place = places.clone().try_acquire_owned().ok();
        }
        let has_place = place.is_some();
        // Without one, what has been accepted goes on; of what has not, there is a limit to what may have been taken back.
        let step = poll_fn(|cx| {
            if let Some(window) = share.changed() {
                connection.set_target_window_size(window);
            }
            if has_place {
                turn.poll(cx, |cx| connection.poll_accept(cx)).map(Step::Accepted)
            } else {
                connection.poll_closed(cx).map(Step::Closed)
            }
        });
        tokio::select! {
            biased;
            () = &mut drain, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            step = step => match (step, place.take()) {
                (Step::Closed(closed), _) => return closed,
                (Step::Accepted(None), _) | (_, None) => return Ok(()),
                (Step::Accepted(Some(accepted)), Some(place)) => {
                    let (request, respond) = accepted?;
                    let parsed = parse(&request);
                    on_offer(Offer { request: parsed, answer: Answer { respond, body: request.into_body() }, place });
                }
            },
            Ok(free) = places.clone().acquire_owned(), if !has_place => place = Some(free),
            () = &mut lost => return Err(h2::Reason::SETTINGS_TIMEOUT.into()),
        }
    }
}
