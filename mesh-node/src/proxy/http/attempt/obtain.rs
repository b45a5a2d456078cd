//! Getting a connection for an attempt, as long as its client waits, time lasts, and the endpoint is one.

use std::{borrow::Cow, io, pin::pin};

use http::StatusCode;

use super::{Attempt, Deadlines, Plan, arm_route, broken_request, conversation::Event, gone};
use crate::{
    hbone::TunnelError,
    proxy::{
        Failure,
        failure::io_words,
        http::{
            body::{Broken, Closed, RequestBody, Responder},
            h2::is_connection,
            upload::Upload,
            upstream::{Failed, NoUpstream, Upstream, Wanted, acquire},
        },
        outbound::left,
    },
    route::retry::Reset,
    telemetry::chain,
};

/// Waits for a connection or a stream, as long as the client waits and time lasts; says also whether the client has closed
/// its side meanwhile.
pub(super) async fn obtain<B: RequestBody, R: Responder>(
    plan: &Plan<'_>,
    wanted: &Wanted<'_>,
    upload: &mut Upload<'_, B>,
    responder: &mut R,
    deadlines: &mut Deadlines,
) -> Result<(Upstream, bool), Attempt> {
    let mut half_closed = false;
    let (mut acquiring, mut left) = (pin!(acquire(wanted)), pin!(left(wanted.proxy, wanted.pod, wanted.cluster, wanted.address)));
    loop {
        let received = upload.note_received();
        // Of an attempt time begins when there is a connection.
        arm_route(plan, deadlines, received);
        tokio::select! {
            biased;
            acquired = &mut acquiring => {
                if matches!(acquired, Err(NoUpstream::Overflow)) {
                    wanted.proxy.metrics.overflow("pending_requests");
                }
                return acquired.map(|upstream| (upstream, half_closed)).map_err(Into::into);
            }
            up = deadlines.passed() => return Err(Attempt::TimeUp(up)),
            () = &mut left => return Err(Attempt::Failed(Failed::new(Reset::ConnectFailure))),
            // Of one that has closed its end the reading half sees nothing more.
            error = responder.gone(), if R::RESETS_APART || half_closed => return Err(gone(&error)),
            waiting = waiting(upload, received), if !half_closed => match waiting {
                Event::Closed(Closed::Half) => half_closed = true,
                Event::Closed(Closed::Gone(error)) => return Err(gone(&error)),
                Event::Uploaded(Err(Broken::Source(error))) => return Err(broken_request(&error)),
                _ => {}
            },
        }
    }
}

/// What a client does while there is no connection for its request.
async fn waiting<B: RequestBody>(upload: &mut Upload<'_, B>, received: bool) -> Event {
    if received {
        return Event::Closed(upload.closed().await);
    }
    match upload.read_ahead().await {
        Ok(()) => Event::Received,
        Err(error) => Event::Uploaded(Err(Broken::Source(error))),
    }
}

impl From<NoUpstream> for Attempt {
    fn from(no_upstream: NoUpstream) -> Self {
        let failure = match no_upstream {
            NoUpstream::Overflow => return Self::Failed(Failed::new(Reset::Overflow)),
            NoUpstream::Failed(failure) => failure,
        };
        let refused = |source: &io::Error| {
            let text = io_words(source);
            Cow::Owned(format!("delayed_connect_error:_{}", text.replace(' ', "_")))
        };
        match &failure {
            Failure::Denied(_) | Failure::Tunnel(TunnelError::Refused(StatusCode::UNAUTHORIZED)) => Self::Denied,
            Failure::DialTimeout(_) | Failure::Tunnel(TunnelError::HandshakeTimeout | TunnelError::ResponseTimeout) => {
                Self::Failed(Failed::new(Reset::ConnectTimeout))
            }
            Failure::Dial { source, .. } | Failure::DialPeer { source, .. } | Failure::Application { source, .. }
                if source.kind() == io::ErrorKind::TimedOut =>
            {
                Self::Failed(Failed::new(Reset::ConnectTimeout))
            }
            Failure::Dial { source, .. } | Failure::DialPeer { source, .. } | Failure::Application { source, .. } => {
                Self::Failed(Failed { detail: refused(source), ..Failed::new(Reset::ConnectFailure) })
            }
            // The connection was there and is not HTTP/2, or ended.
            Failure::Broken(error) if is_connection(error) => Self::Failed(Failed::new(Reset::ConnectionTermination)),
            Failure::Broken(_) => Self::Failed(Failed::new(Reset::ProtocolError)),
            other => {
                let detail = chain(other).replace(' ', "_");
                Self::Failed(Failed { detail: Cow::Owned(detail), ..Failed::new(Reset::ConnectFailure) })
            }
        }
    }
}
