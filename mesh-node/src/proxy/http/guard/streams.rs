//! HTTP/2 on its way into such a pod: each stream to one of the application's connection.

use std::{
    borrow::Cow,
    future::poll_fn,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use ::h2::{SendStream, client::ResponseFuture};
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{Ended, conclude, went_on};
use crate::{
    hbone,
    io::relay::Traffic,
    proxy::{
        http::{
            attempt::{self, Answered, Attempt, Plan},
            body::{FrameSink, FrameSource, RequestBody, Responder},
            gate::{Gate, Pass},
            h2::{self, Accepted, Ended as Whole, H2Responder, H2Sink, H2Source, wire_request},
            record::{Flag, Record},
            reply::Reply,
            transport::{Counted, Transport},
            upload::Upload,
            upstream::{Failed, UpSink, UpSource},
            wire::{HeadLimits, Malformed, expects_continue, take_expectation},
        },
        limits::Place,
        live::Cut,
    },
    route::{request::RequestHead, retry::Reset},
    spawn,
};

/// The application's end of an HTTP/2 connection: streams can be opened on it until it says otherwise.
#[derive(Clone)]
struct Streams {
    send: ::h2::client::SendRequest<Bytes>,
    whole: Arc<Whole>,
    over: Arc<watch::Sender<bool>>,
    /// As many at a time as the client was told, and those that are open.
    most: u32,
    held: Arc<AtomicU32>,
    /// Its client asks again elsewhere when it is refused, and does not wait.
    by_node: bool,
    /// It ended before it had said anything of HTTP/2: no stream was or will be opened on it, and another connection would end like it.
    broken: Option<Reset>,
}

/// How long a stream waits for an application that takes none at a time, and how often it is looked: its client may find one elsewhere.
const STREAM_TIMEOUT: Duration = Duration::from_secs(3);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long a client may take to what has come of an application's connection that has failed.
const AFTER_ITS_END: Duration = Duration::from_secs(30);

impl Streams {
    /// Opens a stream when there is a place for it; the client is told to open no more when there is none any more.
    async fn open(self, request: http::Request<()>, empty: bool) -> Result<(ResponseFuture, SendStream<Bytes>, Held), Reset> {
        let Self { send, over, broken, most, held, by_node, .. } = self;
        if let Some(reset) = broken {
            over.send_replace(true);
            return Err(reset);
        }
        let opened = async {
            // The library takes a request for which there is no place, and keeps it until there is. There always is as long as the application
            // takes as many as it did when the client was told.
            let taken = async {
                loop {
                    let now = h2::most_streams(&send);
                    if let Some(place) = Held::take(&held, (now < most).then_some(now)) {
                        return Some(place);
                    }
                    if by_node && now > 0 {
                        return None;
                    }
                    sleep(POLL_INTERVAL).await;
                }
            };
            let place = timeout(STREAM_TIMEOUT, taken).await.ok()??;
            let (response, stream) = send.ready().await.ok()?.send_request(request, empty).ok()?;
            Some((response, stream, place))
        };
        opened.await.ok_or_else(|| {
            over.send_replace(true);
            Reset::RefusedStream
        })
    }
}

/// One of the application's streams, as long as it goes on.
struct Held(Arc<AtomicU32>);

impl Held {
    /// One more, unless there are so many.
    fn take(all: &Arc<AtomicU32>, most: Option<u32>) -> Option<Self> {
        let more = |n: u32| most.is_none_or(|most| n < most).then_some(n + 1);
        all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self(all.clone()))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What an application's connection was that ended before its SETTINGS.
fn broken_as(error: &::h2::Error) -> Reset {
    if error.is_go_away() && error.is_remote() {
        Reset::RefusedStream
    } else if error.is_io() || error.reason() == Some(::h2::Reason::CONNECT_ERROR) {
        Reset::ConnectionTermination
    } else {
        Reset::ProtocolError
    }
}

/// Serves HTTP/2, until it is cut. `application`: none for a client that is not allowed in and is only told so.
pub async fn serve_h2(
    gate: Arc<Gate>,
    client: Transport,
    application: Option<Transport>,
    traffic: Arc<Traffic>,
    ending: impl Future<Output = Cut> + Send,
) -> Result<io::Result<()>, Cut> {
    let cut = Arc::new(watch::Sender::new(false));
    tokio::select! {
        biased;
        reason = ending => {
            // What has not ended on its streams is told of as cut, before its ends go.
            cut.send_replace(true);
            Err(reason)
        }
        served = streams(gate, client, application, traffic, &cut) => Ok(served),
    }
}

async fn streams(
    gate: Arc<Gate>,
    client: Transport,
    application: Option<Transport>,
    traffic: Arc<Traffic>,
    cut: &Arc<watch::Sender<bool>>,
) -> io::Result<()> {
    let mut opened = match application {
        Some(transport) => Some(h2::connect_to_settle(transport).await.map_err(h2::into_io)?),
        None => None,
    };
    // The client is told as many as the application takes: others have to go on another connection, and not to wait for them.
    let settled = match &mut opened {
        Some(opened) => opened.settle().await,
        None => Ok(()),
    };
    let most = opened.as_ref().map_or(h2::MAX_STREAMS, |opened| h2::most_streams(&opened.send).max(1));
    let over = Arc::new(watch::Sender::new(false));
    let (send, connection, whole) = opened.map_or_else(Default::default, |o| (Some(o.send), Some(o.connection), o.whole));
    let broken = settled.as_ref().err().map(broken_as);
    let drive = drive(connection, (send.clone(), settled), (&over, most));
    let (held, by_node) = (Arc::default(), client.is_tunnel() && gate.facts.dialled.is_some());
    let streams = send.map(|send| Streams { send, whole, over: over.clone(), most, held, by_node, broken });
    let mut ended = over.subscribe();
    let (pod, since) = (gate.pod.clone(), gate.since);
    let draining = async move {
        tokio::select! {
            // The sender lives as long as this is waited for.
            _ = ended.wait_for(|e| *e) => {}
            () = pod.draining(since) => {}
        }
    };
    let limits = HeadLimits::of(client.is_tunnel());
    let client = Counted::downstream(client, traffic);
    let serving = h2::serve(
        client,
        most,
        |accepted| match accepted {
            Some(accepted) => match gate.proxy.request(&gate.pod) {
                Some(place) => drop(spawn::large(h2_exchange(gate.clone(), streams.clone(), cut.subscribe(), accepted, (limits, place)))),
                None => h2::turn_away(accepted),
            },
            None => gate.broke_protocol(),
        },
        draining,
    );
    let (mut drive, mut serving) = (std::pin::pin!(drive), std::pin::pin!(serving));
    tokio::select! {
        served = &mut serving => served.map_err(h2::into_io),
        // The client is told to open no more, and goes on with what is left: answers that have come whole, and the ends of others, each of
        // which says whether it was begun.
        driven = &mut drive => match driven {
            Ok(()) => serving.await.map_err(h2::into_io),
            Err(error) => {
                let _ = timeout(AFTER_ITS_END, serving).await;
                Err(error)
            }
        }
    }
}

/// Drives the application's connection to its end, and says when no more streams are to be opened on it; `settled`: how it began; `most`: as many
/// at a time as the client was told.
async fn drive(
    connection: Option<impl Future<Output = Result<(), ::h2::Error>> + Unpin>,
    (mut asked, settled): (Option<::h2::client::SendRequest<Bytes>>, Result<(), ::h2::Error>),
    (over, most): (&watch::Sender<bool>, u32),
) -> io::Result<()> {
    let Some(mut connection) = connection else { return std::future::pending().await };
    let result = poll_fn(|cx| {
        let polled = Pin::new(&mut connection).poll(cx);
        // Those it has go on; the client is to open others elsewhere, and not only when one has been refused.
        // One that takes fewer than the client was told is as good as one that takes no more: another connection is told anew.
        let sends_away = |send: &mut _| hbone::is_sent_away(send) || h2::most_streams(send) < most;
        if polled.is_pending() && !*over.borrow() && asked.as_mut().is_some_and(sends_away) {
            over.send_replace(true);
        }
        polled
    });
    let result = match settled {
        Ok(()) => result.await,
        // Whoever asks next is told; until then nothing is over for it.
        broken => {
            let mut told = over.subscribe();
            let _ = timeout(AFTER_ITS_END, told.wait_for(|over| *over)).await;
            broken
        }
    };
    over.send_replace(true);
    result.map_err(h2::into_io)
}

async fn h2_exchange(
    gate: Arc<Gate>,
    streams: Option<Streams>,
    mut cut: watch::Receiver<bool>,
    Accepted { request, respond, unsent }: Accepted,
    (limits, _place): (HeadLimits, Place),
) {
    let (parts_of, stream) = request.into_parts();
    let mut body = H2Source::new(stream, &parts_of.headers);
    let mut responder = H2Responder::new(respond, parts_of.method == Method::HEAD, unsent);
    let mut record;
    let end = match h2::request_head(http::Request::from_parts(parts_of, ()), limits) {
        Ok(mut head) => {
            record = gate.take_down(&mut head, "HTTP/2");
            record.look_behind(responder.meter());
            if body.is_end() {
                record.came_without_body(&head.method);
            }
            if record.grpc {
                record.follow([body.meter().count_messages(), responder.meter().count_messages()]);
            }
            let end = tokio::select! {
                biased;
                // Without its sender, the connection is over, which its ends say.
                Ok(_) = cut.wait_for(|c| *c) => None,
                end = h2_request(&gate, streams, &mut head, &mut body, &mut responder, &mut record) => Some(end),
            };
            record.moved(body.meter(), responder.meter());
            record.left_together(responder.client());
            end.unwrap_or_else(|| {
                record.cut();
                Err(::h2::Reason::CANCEL)
            })
        }
        Err(refused) => {
            record = gate.unread("HTTP/2", &refused);
            let reply = Reply::new(refused.malformed.status, refused.malformed.body);
            if refused.is_grpc() {
                responder.meter().count_messages();
            }
            answer(reply, refused.is_grpc(), &mut responder, &mut record).await;
            Ok(())
        }
    };
    match end {
        Err(reason) if !responder.is_complete() => responder.reset(reason).await,
        _ if !responder.is_complete() => responder.reset(::h2::Reason::INTERNAL_ERROR).await,
        // Whatever the client still sends is not wanted: h2 says so itself when both ends are dropped, after the answer, which a
        // reset from here could overtake (RFC 9113 section 8.1).
        _ => {}
    }
}

async fn answer(reply: Reply, grpc: bool, responder: &mut H2Responder, record: &mut Record) {
    let status = reply.start(grpc, false, responder, |status, headers| record.answered(status, headers)).ok();
    record.refused(status, responder.meter());
    while !responder.is_flushed() {
        if responder.flush().await.is_err() {
            return record.abandoned();
        }
    }
}

/// Opens a stream to the application, as long as the client waits and nothing denies the request meanwhile.
async fn open(
    gate: &Gate,
    streams: Streams,
    (request, empty): (http::Request<()>, bool),
    (sent, pass): (&RequestHead, &Pass),
    responder: &mut H2Responder,
    record: &mut Record,
) -> Result<(ResponseFuture, SendStream<Bytes>, Held), ::h2::Reason> {
    tokio::select! {
        biased;
        opened = streams.open(request, empty) => opened.map_err(|reset| {
            match reset {
                Reset::RefusedStream => record.raise(Flag::UpstreamConnectionTermination),
                reset => attempt::conclude(&Attempt::Failed(Failed::new(reset)), record),
            }
            as_told(reset)
        }),
        () = gate.denied_later(sent, pass) => {
            record.cut();
            Err(::h2::Reason::REFUSED_STREAM)
        }
        _ = responder.gone() => {
            record.abandoned();
            Err(::h2::Reason::CANCEL)
        }
    }
}

/// What a stream's end says of the application's, so that its client's node tells of it as if it were there: of one that is gone, that it
/// could not be connected to.
fn as_told(reset: Reset) -> ::h2::Reason {
    match reset {
        Reset::RefusedStream => ::h2::Reason::REFUSED_STREAM,
        Reset::ProtocolError => ::h2::Reason::PROTOCOL_ERROR,
        Reset::ConnectionTermination => ::h2::Reason::CONNECT_ERROR,
        _ => ::h2::Reason::INTERNAL_ERROR,
    }
}

async fn h2_request(
    gate: &Gate,
    streams: Option<Streams>,
    head: &mut RequestHead,
    body: &mut H2Source,
    responder: &mut H2Responder,
    record: &mut Record,
) -> Result<(), ::h2::Reason> {
    let grpc = head.is_grpc();
    // Somebody is to see the body before the application.
    if expects_continue(&head.headers) && !body.is_end() && gate.shows_bodies() {
        take_expectation(&mut head.headers);
        // A client that is gone is noticed when it is answered.
        let _ = responder.informational(StatusCode::CONTINUE, HeaderMap::new()).await;
    }
    let empty = body.is_end();
    let mut upload = Upload::new(body, false, &gate.proxy.replays.of(&gate.pod.kept));
    let admitted = tokio::select! {
        biased;
        admitted = gate.admit(head, record.protocol, &mut upload) => admitted,
        _ = responder.gone() => {
            record.abandoned();
            return Err(::h2::Reason::CANCEL);
        }
    };
    let pass = match admitted {
        Ok(pass) => pass,
        Err(refusal) => {
            refusal.note(record, gate, head);
            if refusal.gone {
                return Err(::h2::Reason::CANCEL);
            }
            answer(refusal.reply, grpc, responder, record).await;
            return Ok(());
        }
    };
    // A new connection is judged anew.
    let Some(streams) = streams else {
        record.raise(Flag::UpstreamConnectionTermination);
        return Err(::h2::Reason::REFUSED_STREAM);
    };
    if head.method == Method::CONNECT {
        record.raise(Flag::NoRoute);
        record.details = Cow::Borrowed("route_not_found");
        answer(Reply::new(StatusCode::NOT_FOUND, ""), grpc, responder, record).await;
        return Ok(());
    }
    upload.keep_out(&pass.written);
    let sent = went_on(head, &pass, record);
    let Some(request) = wire_request(sent, pass.client_cert.as_ref()) else {
        record.details = Cow::Borrowed(Malformed::BAD_AUTHORITY.details);
        return Err(::h2::Reason::PROTOCOL_ERROR);
    };
    let whole = streams.whole.clone();
    let opened = open(gate, streams, (request, empty), (sent, &pass), responder, record).await;
    let (response, stream, _held) = opened?;
    let (sink, source) = (UpSink::H2(H2Sink::new(stream, empty)), UpSource::of_stream(response, whole, HeadLimits::OF_CLIENT.bytes));
    let plan = Plan::once(sent, None);
    let cut = gate.denied_later(sent, &pass);
    let (ended, _) = attempt::exchange(&plan, sink, source, &mut upload, responder, &pass.to_client, cut, record).await;
    // What the reason of a reset means here, the nodes of those know that have dialled a service; others are answered as an Envoy would.
    if let Attempt::Failed(Failed { reset: reset @ Reset::ConnectionTermination, .. }) = &ended
        && gate.facts.dialled.is_none()
    {
        attempt::conclude(&ended, record);
        answer(Reply::reset(*reset, false), grpc, responder, record).await;
        return Ok(());
    }
    let reason = match &ended {
        Attempt::Failed(Failed { reset, .. }) | Attempt::Answered(Answered::Truncated(reset)) => as_told(*reset),
        Attempt::Malformed(_) => ::h2::Reason::PROTOCOL_ERROR,
        _ => ::h2::Reason::INTERNAL_ERROR,
    };
    match conclude(&ended, record) {
        Ended::Whole => Ok(()),
        Ended::Broken | Ended::Silent | Ended::Malformed(_) | Ended::Unreadable => Err(reason),
    }
}
