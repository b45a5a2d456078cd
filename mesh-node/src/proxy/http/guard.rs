//! HTTP on its way into a pod whose policies ask about requests: each is judged by the [`Gate`], and passed on over the
//! connection that was made to the application for this one.
//!
//! Nothing else is done to requests and responses; when the application's connection ends, so does the client's.

mod streams;

use std::{borrow::Cow, pin::Pin};

use http::{HeaderMap, Method, StatusCode};
use tokio::time::timeout;

pub use self::streams::serve_h2;
use super::{
    Next,
    attempt::{self, Answered, Attempt, Plan},
    body::{FrameSink, FrameSource, RequestBody, Responder},
    gate::{Gate, Pass},
    h1::{H1Responder, H1Sink, LINGER, NoHead, Reader, Unread},
    read_request,
    record::{Flag, Record},
    refuse_h1,
    reply::Reply,
    transport::Transport,
    upload::Upload,
    upstream::{UpSink, UpSource},
    wire::{Malformed, WireRequest, expects_continue, take_expectation},
};
use crate::{
    io::{rarely::Rarely, relay::Traffic},
    proxy::live::Cut,
    route::{request::RequestHead, retry::Reset},
};

/// Serves HTTP/1 to its end, or until it is cut. `application`: none for a client that is not allowed in and is only told so. Both
/// ends are the caller's: to be reset when this is given up before it is done, or is cut.
pub async fn serve_h1(
    gate: &Gate,
    client: &mut Transport,
    application: Option<&mut Transport>,
    traffic: &Traffic,
    ending: impl Future<Output = Cut> + Send,
) -> Result<Ends, Cut> {
    let (mut unread, mut read) = (Unread::default(), Unread::default());
    let application = application.map(|transport| (transport, &mut read));
    let ending = std::pin::pin!(ending);
    let next = h1_loop(gate, client, &mut unread, application, traffic, ending).await?;
    Ok(match next {
        Next::Abort => Ends::Reset,
        Next::Garble => Ends::Garbled,
        Next::Refuse => Ends::Refused,
        Next::Another | Next::Close => Ends::Closed,
    })
}

/// How the connections of the two ends are to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// All that was to be said is.
    Closed,
    /// The client must see a failure.
    Reset,
    /// Its node must see that what it would have got is no HTTP.
    Garbled,
    /// Its node must see that its last request has not gone on.
    Refused,
}

impl Ends {
    /// Has the client see it.
    pub fn end(self, client: Transport) {
        match self {
            Self::Closed => {}
            Self::Reset => client.reset(),
            Self::Garbled => client.garble(),
            Self::Refused => client.refuse(),
        }
    }
}

type Application<'a> = (&'a mut Transport, &'a mut Unread);

async fn h1_loop(
    gate: &Gate,
    client: &mut Transport,
    unread: &mut Unread,
    mut application: Option<Application<'_>>,
    traffic: &Traffic,
    ending: Pin<&mut (impl Future<Output = Cut> + Send)>,
) -> Result<Next, Cut> {
    let (source, sink) = client.counted_halves(&traffic.sent, &traffic.received);
    // The node of one that has dialled a service keeps its connections, and may use one that is just being closed.
    let by_node = source.is_tunnel() && gate.facts.dialled.is_some();
    let (mut reader, mut sink) = (Reader::new(source, unread), H1Sink::new(sink));
    let (mut served, mut unused) = (false, false);
    let mut draining = std::pin::pin!(Rarely::new(gate.pod.draining_idle(gate.since)));
    let mut ending = std::pin::pin!(Rarely::new(ending));
    let mut drained = false;
    loop {
        let request = tokio::select! {
            biased;
            cut = &mut ending => return Err(cut),
            request = read_request(&mut reader, gate.facts.destination) => request,
            // It has closed, or says something nobody asked for.
            () = over(application.as_mut()) => {
                unused = served && by_node;
                Err(NoHead::Ended { partial: false })
            }
            () = &mut draining, if !drained => {
                if reader.has_begun() {
                    // That is answered.
                    drained = true;
                    continue;
                }
                Err(NoHead::Ended { partial: false })
            }
        };
        let next = match request {
            Ok(_) if served && by_node && is_over(application.as_mut()).await => return Ok(Next::Refuse),
            Ok(request) => h1_exchange(gate, request, &mut reader, &mut sink, application.as_mut(), ending.as_mut()).await?,
            Err(NoHead::Refused(refused)) => {
                tokio::select! {
                    biased;
                    cut = &mut ending => return Err(cut),
                    () = refuse_h1(|| gate.unread("HTTP/1.1", &refused), &refused, &mut reader, &mut sink) => {}
                }
                if refused.malformed.close { Next::Close } else { Next::Another }
            }
            Err(NoHead::Ended { partial }) => without_head(gate, partial, Next::Close),
            Err(NoHead::Broken { partial }) => without_head(gate, partial, Next::Abort),
        };
        match next {
            Next::Another if application.is_some() && !drained => served = true,
            Next::Abort | Next::Garble | Next::Refuse => return Ok(next),
            Next::Another | Next::Close => {
                return tokio::select! {
                    biased;
                    cut = &mut ending => Err(cut),
                    next = close(&mut reader, &mut sink, unused) => Ok(next),
                };
            }
        }
    }
}

/// What comes next where there is no request, or a part of one only.
fn without_head(gate: &Gate, partial: bool, next: Next) -> Next {
    if partial {
        gate.cut_short();
    }
    next
}

/// Ends the connection to the client. `unused`: the application's had ended between requests.
async fn close(reader: &mut Reader<'_>, sink: &mut H1Sink<'_>, unused: bool) -> Next {
    match sink.shutdown().await {
        // A request that had been sent meanwhile has not gone on.
        Ok(()) if unused && matches!(timeout(LINGER, reader.begun()).await, Ok(Ok(()))) => return Next::Refuse,
        Ok(()) if !unused => reader.linger().await,
        _ => {}
    }
    Next::Close
}

/// Completes when the application's idle connection is one no more.
async fn over(application: Option<&mut Application<'_>>) {
    let Some((transport, unread)) = application else { return std::future::pending().await };
    let (source, _) = transport.halves();
    // Whatever it is, it is not the answer to a request.
    let _ = Reader::new(source, unread).begun().await;
}

/// Whether it is so already.
async fn is_over(application: Option<&mut Application<'_>>) -> bool {
    tokio::select! {
        biased;
        () = over(application) => true,
        () = std::future::ready(()) => false,
    }
}

async fn h1_exchange(
    gate: &Gate,
    request: WireRequest,
    reader: &mut Reader<'_>,
    sink: &mut H1Sink<'_>,
    application: Option<&mut Application<'_>>,
    ending: Pin<&mut (impl Future<Output = Cut> + Send)>,
) -> Result<Next, Cut> {
    let protocol = if request.minor == 1 { "HTTP/1.1" } else { "HTTP/1.0" };
    let mut request = request;
    let mut record = gate.take_down(&mut request.head, protocol);
    let mut responder = H1Responder::new(sink, request.minor, &request.head.method, request.keep_alive).of(&gate.pod, gate.since);
    record.look_behind(responder.meter());
    if reader.is_end() && request.upgrade.is_none() {
        record.came_without_body(&request.head.method);
    }
    if record.grpc {
        record.follow([reader.meter().count_messages(), responder.meter().count_messages()]);
    }
    let cut = tokio::select! {
        biased;
        cut = ending => cut,
        next = h1_request(gate, request, reader, &mut responder, application, &mut record) => return Ok(next),
    };
    record.moved(reader.meter(), responder.meter());
    record.cut();
    Err(cut)
}

async fn h1_request(
    gate: &Gate,
    request: WireRequest,
    reader: &mut Reader<'_>,
    responder: &mut H1Responder<'_, '_>,
    application: Option<&mut Application<'_>>,
    record: &mut Record,
) -> Next {
    let WireRequest { mut head, upgrade, .. } = request;
    let grpc = record.grpc;
    // Somebody is to see the body before the application.
    if expects_continue(&head.headers) && !reader.is_end() && gate.shows_bodies() {
        take_expectation(&mut head.headers);
        if responder.informational(StatusCode::CONTINUE, HeaderMap::new()).await.is_err() {
            record.abandoned();
            return Next::Close;
        }
    }
    let mut upload = Upload::new(&mut *reader, false, &gate.proxy.replays.of(&gate.pod.kept));
    let admitted = tokio::select! {
        biased;
        admitted = gate.admit(&head, record.protocol, &mut upload) => admitted,
        _ = responder.gone() => {
            record.abandoned();
            return Next::Abort;
        }
    };
    let pass = match admitted {
        Ok(pass) => pass,
        Err(refusal) => {
            drop(upload);
            refusal.note(record, gate, &head);
            record.up = reader.meter().clone();
            if refusal.gone {
                return Next::Close;
            }
            // After CONNECT a client may say what is no HTTP.
            let close = application.is_none() || !reader.is_end() || head.method == Method::CONNECT;
            return refuse(refusal.reply, grpc, close, responder, reader, record).await;
        }
    };
    let Some((transport, unread)) = application else { return Next::Abort };
    if head.method == Method::CONNECT {
        drop(upload);
        // What would follow is not HTTP; nobody asks an application's port for another connection.
        record.raise(Flag::NoRoute);
        record.details = Cow::Borrowed("route_not_found");
        return refuse(Reply::new(StatusCode::NOT_FOUND, ""), grpc, true, responder, reader, record).await;
    }
    let (source, up) = transport.halves();
    let (up_sink, up_source) = (UpSink::H1(H1Sink::new(up)), UpSource::H1(Reader::new(source, unread)));
    upload.keep_out(&pass.written);
    let sent = went_on(&head, &pass, record);
    let plan = Plan { client_cert: pass.client_cert.as_ref(), ..Plan::once(sent, pass.upgrade(upgrade.as_ref())) };
    let cut = gate.denied_later(sent, &pass);
    let (ended, clean) = attempt::exchange(&plan, up_sink, up_source, &mut upload, responder, &pass.to_client, cut, record).await;
    drop(upload);
    record.moved(reader.meter(), responder.meter());
    match conclude(&ended, record) {
        Ended::Whole if clean && responder.keeps_alive() && reader.is_end() => Next::Another,
        Ended::Silent if !responder.has_started() => Next::Close,
        Ended::Broken | Ended::Silent if !responder.has_started() || responder.would_look_complete() => Next::Abort,
        Ended::Whole | Ended::Broken | Ended::Silent => Next::Close,
        Ended::Malformed(malformed) => refuse(Reply::new(malformed.status, malformed.body), grpc, true, responder, reader, record).await,
        // An application that ends its connection ends the client's; one that says what is no HTTP, the client could not read either. The node
        // of one that has dialled a service reads it: it is told, and answers as it would for an application of its own.
        Ended::Unreadable if responder.is_tunnelled() && gate.facts.dialled.is_some() && !responder.has_started() => Next::Garble,
        Ended::Unreadable => refuse(Reply::reset(Reset::ProtocolError, false), grpc, true, responder, reader, record).await,
    }
}

/// The request as the application gets it.
fn went_on<'a>(head: &'a RequestHead, pass: &'a Pass, record: &mut Record) -> &'a RequestHead {
    record.let_in();
    if let Some(changed) = &pass.head {
        record.became(changed);
    }
    pass.head.as_ref().unwrap_or(head)
}

async fn refuse(
    reply: Reply,
    grpc: bool,
    close: bool,
    responder: &mut H1Responder<'_, '_>,
    reader: &Reader<'_>,
    record: &mut Record,
) -> Next {
    let status = reply.start(grpc, close, responder, |status, headers| record.answered(status, headers)).ok();
    record.refused(status, responder.meter());
    while !responder.is_flushed() {
        if responder.flush().await.is_err() {
            record.abandoned();
            return Next::Abort;
        }
    }
    if !close && responder.keeps_alive() && reader.is_end() { Next::Another } else { Next::Close }
}

enum Ended {
    Whole,
    Broken,
    /// The application has ended its connection, and said nothing: no failure that its client would not see without a node between them.
    Silent,
    Malformed(Malformed),
    /// There was an answer that is no HTTP.
    Unreadable,
}

/// Takes down how a request that was let in ended.
fn conclude(ended: &Attempt, record: &mut Record) -> Ended {
    attempt::conclude(ended, record);
    match ended {
        Attempt::Answered(Answered::Whole) => Ended::Whole,
        Attempt::Malformed(malformed) => Ended::Malformed(*malformed),
        Attempt::Failed(failed) if failed.reset == Reset::ProtocolError => Ended::Unreadable,
        Attempt::Failed(failed) if failed.orderly => Ended::Silent,
        _ => Ended::Broken,
    }
}
