//! One attempt at a request: to an endpoint and, unless it is to be tried again, the response back to the client.

mod conversation;
mod deadlines;
mod obtain;

use std::{
    borrow::Cow,
    future::Future,
    io,
    sync::{Arc, LazyLock},
};

use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::Instant;

pub use self::deadlines::{Deadlines, TimeUp};
use self::{conversation::Exchange, obtain::obtain};
use super::{
    authorizer::ToClient,
    body::{FrameSource, RequestBody, Responder, ResponseHead, drain},
    clusters::{Limited, Slot},
    exchange::flag_of,
    gate::{Gate, Pass, Refusal},
    h2::{H2Sink, wire_request},
    meter::{Meter, grpc_status},
    over::Over,
    record::{Flag, Record},
    reply::{Reply, reason},
    upload::Upload,
    upstream::{Failed, Reached, UpSink, UpSource, Upstream, Wanted, release},
    wire::{Framing, Malformed, expects_continue, take_expectation},
};
use crate::route::{
    request::RequestHead,
    retry::{Reset, RetryPolicy, default_policy},
};

/// How an attempt ended.
#[derive(Debug)]
pub enum Attempt {
    /// The response went to the client, or as much of it as there was.
    Answered(Answered),
    /// The response asks for another attempt and nothing of it was passed on.
    Again,
    /// There was no response.
    Failed(Failed),
    /// Here, before there was a response: the destination's pod is gone, or a policy denies the request now.
    Cut,
    /// Not allowed: by the destination's policy on connections.
    Denied,
    TimeUp(TimeUp),
    /// The client is gone.
    Abandoned,
    /// The client's request turned out to be malformed.
    Malformed(Malformed),
}

#[derive(Debug, PartialEq, Eq)]
pub enum Answered {
    Whole,
    /// The upstream broke off.
    Truncated(Reset),
    /// It was broken off here.
    Cut,
    TimeUp(TimeUp),
    /// The client went away meanwhile.
    Abandoned,
}

/// What is known of the request when its response is judged.
#[derive(Debug, Clone, Copy)]
pub struct Heard {
    /// It could be sent again.
    pub repeatable: bool,
    /// When the last of it came from the client, if that was before the response.
    pub received: Option<Instant>,
}

/// What is answered to a response.
pub struct Verdict {
    /// Another attempt is wanted instead.
    pub again: bool,
    /// What is put on its way to the client otherwise.
    pub headers: HeaderMap,
}

/// What stays the same over the attempts of one exchange.
pub struct Plan<'a> {
    pub head: &'a RequestHead,
    pub upgrade: Option<&'a HeaderValue>,
    pub policy: &'a RetryPolicy,
    pub timeout: Option<std::time::Duration>,
    /// The connection to the client ends after this response.
    pub close: bool,
    /// Client and application share their connections' fate: what ends the one ends the other.
    pub tied: bool,
    /// Told when what the request goes to is over.
    pub over: Option<&'a Arc<Over>>,
    /// What `x-forwarded-client-cert` says beside the head's own headers.
    pub client_cert: Option<&'a HeaderValue>,
}

static NO_RETRY: LazyLock<RetryPolicy> = LazyLock::new(|| RetryPolicy { attempts: 0, ..default_policy() });

impl<'a> Plan<'a> {
    /// For a request that is passed on as it is, once, however long it takes.
    pub fn once(head: &'a RequestHead, upgrade: Option<&'a HeaderValue>) -> Self {
        Self { head, upgrade, policy: &NO_RETRY, timeout: None, close: false, tied: true, over: None, client_cert: None }
    }
}

/// An exchange on a connection that is there; whether the connection can serve another.
#[expect(clippy::too_many_arguments, reason = "the two ends of an exchange, each with its own parts")]
pub async fn exchange<B: RequestBody, R: Responder>(
    plan: &Plan<'_>,
    sink: UpSink<'_>,
    source: UpSource<'_>,
    upload: &mut Upload<'_, B>,
    responder: &mut R,
    add: &ToClient,
    cut: impl Future<Output = ()> + Send,
    record: &mut Record,
) -> (Attempt, bool) {
    let mut deadlines = Deadlines::default();
    let mut judge = |status: StatusCode, mut headers: HeaderMap, heard: Heard| {
        record.details = Cow::Borrowed("via_upstream");
        record.heard(heard.received.map(Instant::into_std));
        add.apply(&mut headers);
        record.answered(status, &headers);
        Verdict { again: false, headers }
    };
    let mut exchange = Exchange { plan, sink, source, half_closed: false, upload, responder, deadlines: &mut deadlines, clean: false };
    let ended = exchange.run(&mut judge, cut).await;
    exchange.give_up();
    record.passed(exchange.upload.times(), plan.upgrade);
    (ended, exchange.clean)
}

/// Makes one attempt; says also on what, if there was something.
pub async fn attempt<B: RequestBody, R: Responder>(
    plan: &Plan<'_>,
    wanted: &Wanted<'_>,
    upload: &mut Upload<'_, B>,
    responder: &mut R,
    deadlines: &mut Deadlines,
    judge: &mut (impl FnMut(StatusCode, HeaderMap, Heard) -> Verdict + Send),
) -> (Attempt, Option<Reached>) {
    let Entered { upstream, half_closed, admitted, counted: _counted } =
        match enter(plan, wanted, upload, responder, deadlines, judge).await {
            Ok(entered) => entered,
            Err(ended) => return (ended, None),
        };
    let reached = upstream.reached();
    let (pass, mut inbound) = admitted.map(|Admitted { gate, pass, record }| ((gate, pass), record)).unzip();
    // As the destination sees it.
    let passed = pass.as_ref().map(|(_, pass)| pass);
    let head = passed.and_then(|pass| pass.head.as_ref()).unwrap_or(plan.head);
    let upgrade = passed.map_or(plan.upgrade, |pass| pass.upgrade(plan.upgrade));
    let plan = &Plan { head, upgrade, client_cert: passed.and_then(|pass| pass.client_cert.as_ref()), ..*plan };
    if let Some(record) = &mut inbound {
        begin(record, plan, upload, responder);
    }
    let to_client = pass.as_ref().map(|(_, pass)| &pass.to_client).filter(|h| !h.is_empty());
    let mut judge = |status: StatusCode, mut headers: HeaderMap, heard: Heard| {
        if let Some(more) = to_client {
            more.apply(&mut headers);
        }
        if let Some(record) = &mut inbound {
            record.details = Cow::Borrowed("via_upstream");
            record.heard(heard.received.map(Instant::into_std));
            record.answered(status, &headers);
            record.down.grpc_status = grpc_status(&headers);
        }
        judge(status, headers, heard)
    };
    let denied = denied_later(pass.as_ref(), plan.head);
    let ended = match upstream {
        Upstream::H1(mut connection) => {
            let kept = connection.is_kept();
            let (sink, source, cut) = connection.halves();
            let mut exchange = Exchange { plan, sink, source, half_closed, upload, responder, deadlines, clean: false };
            let (ended, clean) = (exchange.run(&mut judge, first(cut, denied)).await, exchange.clean);
            if clean {
                release(connection, wanted.cluster, wanted.state, wanted.endpoint);
            }
            if let Attempt::Failed(failed) = ended { Attempt::Failed(Failed { kept, ..failed }) } else { ended }
        }
        Upstream::H2(mut send, guard, _) => 'sent: {
            if let Some(over) = plan.over {
                guard.follow(over);
            }
            let Some(request) = wire_request(plan.head, plan.client_cert) else {
                break 'sent Attempt::Malformed(Malformed::BAD_AUTHORITY);
            };
            let empty = upload.is_end();
            let (response, stream) = match send.send_request(request, empty) {
                Ok(opened) => opened,
                // The connection is over, and nothing was sent on it.
                Err(error) if error.is_go_away() || error.is_io() => break 'sent Attempt::Failed(Failed::new(Reset::RefusedStream)),
                Err(_) => break 'sent Attempt::Failed(Failed::new(Reset::ConnectionTermination)),
            };
            let (sink, source) =
                (UpSink::H2(H2Sink::new(stream, empty)), UpSource::of_stream(response, guard.whole(), guard.longest_head()));
            let mut exchange = Exchange { plan, sink, source, half_closed, upload, responder, deadlines, clean: false };
            let ended = exchange.run(&mut judge, denied).await;
            exchange.give_up();
            drop(guard);
            ended
        }
    };
    if let Some(mut record) = inbound {
        record.passed(upload.times(), plan.upgrade);
        tell(record, &ended, upload.passed(), responder.meter());
    }
    (ended, Some(reached))
}

/// Takes down for the destination on this node what goes on to it.
fn begin<B: RequestBody, R: Responder>(record: &mut Record, plan: &Plan<'_>, upload: &mut Upload<'_, B>, responder: &mut R) {
    record.let_in();
    record.look_behind(responder.meter());
    if upload.note_received() && plan.upgrade.is_none() {
        record.came_without_body(&plan.head.method);
    }
    if record.grpc {
        record.follow([upload.passed().count_messages(), responder.meter().count_messages()]);
    }
}

/// Takes down how an attempt ended for the destination on this node.
fn tell(mut record: Box<Record>, ended: &Attempt, up: &Meter, down: &Meter) {
    conclude(ended, &mut record);
    match ended {
        Attempt::Again => record.repeated(up),
        _ => record.moved(up, down),
    }
}

/// A connection that a request may be sent on.
struct Entered {
    upstream: Upstream,
    half_closed: bool,
    /// Of a destination on this node.
    admitted: Option<Admitted>,
    counted: Slot,
}

/// A request that a destination on this node has let in.
struct Admitted {
    gate: Arc<Gate>,
    pass: Pass,
    /// Apart, so that connections do not carry its room.
    record: Box<Record>,
}

/// Gets a connection, and past the gate of a destination on this node.
async fn enter<B: RequestBody, R: Responder>(
    plan: &Plan<'_>,
    wanted: &Wanted<'_>,
    upload: &mut Upload<'_, B>,
    responder: &mut R,
    deadlines: &mut Deadlines,
    judge: &mut (impl FnMut(StatusCode, HeaderMap, Heard) -> Verdict + Send),
) -> Result<Entered, Attempt> {
    let (upstream, half_closed) = obtain(plan, wanted, upload, responder, deadlines).await?;
    // It could not be told that its client has left, and need not be asked.
    if half_closed && matches!(upstream, Upstream::H2(..)) {
        return Err(Attempt::Abandoned);
    }
    // Counted while it is under way, as Envoy does, and not while it waits.
    let Some(counted) = wanted.state.begin(Limited::Requests, wanted.cluster.policy.http.max_requests) else {
        wanted.proxy.metrics.overflow("requests");
        if let Upstream::H1(connection) = upstream {
            release(connection, wanted.cluster, wanted.state, wanted.endpoint);
        }
        return Err(Attempt::Failed(Failed::new(Reset::Overflow)));
    };
    let Some(gate) = upstream.gate() else { return Ok(Entered { upstream, half_closed, admitted: None, counted }) };
    let (record, onward) = gate.record(plan.head, wanted.protocol());
    let mut record = Box::new(record);
    let traced = onward.map(|onward| onward.on(plan.head));
    let head = traced.as_ref().unwrap_or(plan.head);
    // Somebody is to see the body before the application.
    let continued = expects_continue(&head.headers) && !upload.is_end() && gate.shows_bodies();
    if continued && let Err(error) = responder.informational(StatusCode::CONTINUE, HeaderMap::new()).await {
        let ended = gone(&error);
        tell(record, &ended, &Meter::default(), &Meter::default());
        return Err(ended);
    }
    let admitted = admit(&gate, (head, wanted.protocol()), upload, responder, deadlines).await;
    match admitted {
        Ok(Ok(mut pass)) => {
            upload.keep_out(&pass.written);
            pass.head = pass.head.or(traced);
            if continued {
                take_expectation(&mut pass.head.get_or_insert_with(|| plan.head.clone()).headers);
            }
            Ok(Entered { upstream, half_closed, admitted: Some(Admitted { gate, pass, record }), counted })
        }
        Ok(Err(refusal)) => {
            refusal.note(&mut record, &gate, head);
            if let Upstream::H1(connection) = upstream {
                // Nothing was sent on it.
                release(connection, wanted.cluster, wanted.state, wanted.endpoint);
            }
            if refusal.gone {
                return Err(Attempt::Abandoned);
            }
            Err(answer_here(plan, refusal.reply, upload, responder, judge, &mut record).await)
        }
        Err(ended) => {
            tell(record, &ended, &Meter::default(), &Meter::default());
            Err(ended)
        }
    }
}

/// Takes down how a request that was let in ended.
pub fn conclude(ended: &Attempt, record: &mut Record) {
    match ended {
        Attempt::Answered(Answered::Cut) | Attempt::Cut => record.cut(),
        Attempt::Answered(Answered::Truncated(reset)) => failed(*reset, "upstream_reset_after_response_started", record),
        Attempt::Failed(failure) => {
            failed(failure.reset, "upstream_reset_before_response_started", record);
            record.unanswered(failure.reset);
        }
        // Whose time is up is the client's side: for the destination it has gone.
        Attempt::Answered(Answered::Abandoned | Answered::TimeUp(_)) | Attempt::Abandoned | Attempt::TimeUp(_) => record.abandoned(),
        Attempt::Malformed(malformed) => {
            if malformed.protocol_error {
                record.raise(Flag::DownstreamProtocolError);
            }
            record.details = Cow::Borrowed(malformed.details);
        }
        Attempt::Answered(Answered::Whole) | Attempt::Again | Attempt::Denied => {}
    }
}

fn failed(reset: Reset, when: &str, record: &mut Record) {
    record.raise(flag_of(reset));
    record.details = format!("{when}{{{}}}", reason(reset).replace(' ', "_")).into();
}

async fn first(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    tokio::select! {
        () = one => {}
        () = other => {}
    }
}

/// Asks the gate of a destination on this node, as long as the client waits and time lasts.
async fn admit<B: RequestBody, R: Responder>(
    gate: &Gate,
    (head, protocol): (&RequestHead, &'static str),
    upload: &mut Upload<'_, B>,
    responder: &mut R,
    deadlines: &Deadlines,
) -> Result<Result<Pass, Box<Refusal>>, Attempt> {
    tokio::select! {
        biased;
        // Almost always at once.
        pass = gate.admit(head, protocol, upload) => Ok(pass),
        up = deadlines.passed() => Err(Attempt::TimeUp(up)),
        error = responder.gone() => Err(gone(&error)),
    }
}

/// Completes when a request that was let in is denied by a later configuration.
async fn denied_later(pass: Option<&(Arc<Gate>, Pass)>, head: &RequestHead) {
    match pass {
        Some((gate, pass)) => gate.denied_later(head, pass).await,
        None => std::future::pending().await,
    }
}

/// Answers for the destination, which is on this node and does not let the request in: the answer counts as any of the
/// upstream's.
async fn answer_here<B: RequestBody, R: Responder>(
    plan: &Plan<'_>,
    reply: Reply,
    upload: &mut Upload<'_, B>,
    responder: &mut R,
    judge: &mut (impl FnMut(StatusCode, HeaderMap, Heard) -> Verdict + Send),
    record: &mut Record,
) -> Attempt {
    let (status, mut headers, body) = reply.into_parts(plan.head.is_grpc(), responder.is_head());
    record.answered(status, &headers);
    record.moved(upload.passed(), &Meter::of_reply(&body, &headers));
    if !body.is_empty() {
        headers.insert(http::header::CONTENT_LENGTH, body.len().into());
    }
    let framing = if body.is_empty() { Framing::Empty } else { Framing::Length(body.len() as u64) };
    let verdict = judge(status, headers, upload.heard());
    if verdict.again {
        return Attempt::Again;
    }
    upload.settle();
    let close = plan.close || plan.upgrade.is_some() || !upload.note_received();
    if responder.start(ResponseHead { status, headers: verdict.headers, framing }, close).is_err() {
        return Attempt::Answered(Answered::Abandoned);
    }
    if !responder.has_ended() {
        responder.push(super::framing::Frame::Data(body));
        responder.end();
    }
    match drain(responder).await {
        Ok(()) => Attempt::Answered(Answered::Whole),
        Err(_) => Attempt::Answered(Answered::Abandoned),
    }
}

/// Sets the deadlines that begin when the whole request is there.
fn arm(plan: &Plan<'_>, deadlines: &mut Deadlines, received: bool) {
    arm_route(plan, deadlines, received);
    if received && deadlines.attempt.is_none() {
        deadlines.attempt = plan.policy.per_try_timeout.map(|t| Instant::now() + t);
    }
}

/// The same of the whole exchange alone.
fn arm_route(plan: &Plan<'_>, deadlines: &mut Deadlines, received: bool) {
    if received && deadlines.route.is_none() {
        deadlines.route = plan.timeout.map(|t| Instant::now() + t);
    }
}

fn gone(error: &io::Error) -> Attempt {
    tracing::debug!(target: "proxy", %error, "the client is gone");
    Attempt::Abandoned
}

fn broken_request(error: &super::body::BodyError) -> Attempt {
    match error {
        super::body::BodyError::Malformed(malformed) => Attempt::Malformed(*malformed),
        super::body::BodyError::Truncated | super::body::BodyError::Cut(_) => Attempt::Abandoned,
    }
}
