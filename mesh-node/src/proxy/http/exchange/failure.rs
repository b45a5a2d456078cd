//! What a client is told when no answer comes.

use std::borrow::Cow;

use http::StatusCode;

use super::{End, Exchange, Forward};
use crate::{
    proxy::http::{
        attempt::TimeUp,
        attempts::Unanswered,
        body::{RequestBody, Responder},
        record::Flag,
        reply::{OVERLOADED, Reply, reason},
        upstream::Failed,
    },
    route::retry::Reset,
};

impl<B: RequestBody, R: Responder> Exchange<'_, '_, B, R> {
    /// Says why, by status, flag and details.
    pub(super) async fn fail(&mut self, failure: Unanswered, forward: &Forward<'_>) -> End {
        let (reply, details) = match failure {
            Unanswered::Reset(failed, retried) => return self.failed(&failed, retried, forward).await,
            Unanswered::NoEndpoint => {
                self.record.raise(Flag::NoHealthyUpstream);
                // Who has picked the endpoint looks for others when the connection ends.
                self.close |= self.down.over.is_told();
                (Reply::new(StatusCode::SERVICE_UNAVAILABLE, "no healthy upstream"), "no_healthy_upstream")
            }
            Unanswered::Denied => (Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied"), "rbac_access_denied_matched_policy[none]"),
            Unanswered::TimeUp(TimeUp::Client) => {
                let reply = Reply {
                    grpc_status: self.tells_in_grpc().then_some(4),
                    ..Reply::new(StatusCode::GATEWAY_TIMEOUT, "downstream duration timeout")
                };
                (reply, "max_duration_timeout")
            }
            Unanswered::TimeUp(up) => {
                self.record.raise(Flag::UpstreamTimeout);
                (Reply::timeout(), if up == TimeUp::Attempt { "upstream_per_try_timeout" } else { "response_timeout" })
            }
            Unanswered::Malformed(malformed) => {
                if malformed.protocol_error {
                    self.record.raise(Flag::DownstreamProtocolError);
                }
                self.close = true;
                (Reply::new(malformed.status, malformed.body), malformed.details)
            }
        };
        self.record.details = Cow::Borrowed(details);
        self.reply(reply, |record, headers| forward.decorate(headers, record, None)).await
    }

    async fn failed(&mut self, failed: &Failed, retried: bool, forward: &Forward<'_>) -> End {
        self.record.raise(flag_of(failed.reset));
        let words = reason(failed.reset).replace(' ', "_");
        let when = if failed.begun { "after" } else { "before" };
        self.record.details = match (failed.reset, &*failed.detail) {
            (Reset::PerTryTimeout, _) => Cow::Borrowed("upstream_per_try_timeout"),
            (_, "") => format!("upstream_reset_{when}_response_started{{{words}}}").into(),
            (_, detail) => format!("upstream_reset_{when}_response_started{{{words}|{detail}}}").into(),
        };
        self.record.transport_failure = (!failed.detail.is_empty()).then(|| failed.detail.clone());
        let mut reply = Reply::reset(failed.reset, retried);
        if !forward.snapshot.headers.debug {
            reply.headers.remove(&OVERLOADED);
        }
        self.reply(reply, |record, headers| forward.decorate(headers, record, None)).await
    }
}

/// Envoy's flag for it.
pub fn flag_of(reset: Reset) -> Flag {
    match reset {
        Reset::ConnectFailure | Reset::ConnectTimeout => Flag::UpstreamConnectionFailure,
        Reset::ConnectionTermination => Flag::UpstreamConnectionTermination,
        Reset::ProtocolError => Flag::UpstreamProtocolError,
        Reset::RefusedStream | Reset::RemoteReset => Flag::UpstreamRemoteReset,
        Reset::Overflow => Flag::UpstreamOverflow,
        Reset::PerTryTimeout => Flag::UpstreamTimeout,
    }
}
