//! A request and its response on one connection, both at the same time.

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
};

use http::{HeaderMap, StatusCode};

use super::{
    super::{
        body::{Broken, Closed, FrameSink, FrameSource, RequestBody, Responder, ResponseHead, drain, fill, pump},
        upload::Upload,
        upstream::{Failed, UpSink, UpSource, is_interim},
        wire::{Framing, WireResponse},
    },
    Answered, Attempt, Deadlines, Heard, Plan, TimeUp, Verdict, arm, arm_route, broken_request, gone,
};
use crate::route::retry::Reset;

/// Most informational answers to one request that are passed on: nothing but the client's reading holds them up. Others are left out.
const MOST_INTERIM: u32 = 64;
/// So many are no answers to anything.
const FLOOD: u32 = 16_384;

/// A request and its response on one connection.
pub(super) struct Exchange<'e, 'a, 'b, B, R> {
    pub(super) plan: &'e Plan<'e>,
    pub(super) sink: UpSink<'a>,
    pub(super) source: UpSource<'a>,
    pub(super) half_closed: bool,
    pub(super) upload: &'e mut Upload<'b, B>,
    pub(super) responder: &'e mut R,
    pub(super) deadlines: &'e mut Deadlines,
    /// Everything was sent and received: the connection can serve another exchange.
    pub(super) clean: bool,
}

/// What happened next.
pub(super) enum Event {
    /// By policy, or with the destination pod.
    Cut,
    TimeUp(TimeUp),
    Uploaded(Result<(), Broken>),
    /// The whole request has been read; the rest of it is being written.
    Received,
    Closed(Closed),
    Head(Result<WireResponse, Failed>),
    Downloaded(Result<(), Broken>),
    Gone(io::Error),
}

impl<B: RequestBody, R: Responder> Exchange<'_, '_, '_, B, R> {
    pub(super) async fn run(
        &mut self,
        judge: &mut (impl FnMut(StatusCode, HeaderMap, Heard) -> Verdict + Send),
        cut: impl Future<Output = ()> + Send,
    ) -> Attempt {
        let mut cut = pin!(cut);
        self.sink.begin(self.plan.head, self.framing(), self.plan.upgrade, self.plan.client_cert);
        let (mut uploaded, mut no_more_up, mut begun, mut interim) = (false, false, false, 0_u32);
        let response = loop {
            // What has been heard of is not tried again: an attempt has all the time there is, as with Envoy.
            let arm = if begun { arm_route } else { arm };
            arm(self.plan, self.deadlines, self.upload.note_received());
            let watch = uploaded && !self.half_closed;
            let event = tokio::select! {
                biased;
                head = self.source.head(&self.plan.head.method) => Event::Head(head),
                () = &mut cut => Event::Cut,
                up = self.deadlines.passed() => Event::TimeUp(up),
                event = up(self.upload, &mut self.sink, uploaded, self.half_closed), if watch || !uploaded && !no_more_up => event,
                // Of one that has closed its end the reading half sees nothing more.
                error = self.responder.gone(), if R::RESETS_APART || self.half_closed => Event::Gone(error),
            };
            match event {
                Event::Head(Ok(head)) if is_interim(head.status) => {
                    self.upload.commit();
                    (begun, self.deadlines.attempt) = (true, None);
                    interim += 1;
                    if let Some(ended) = self.interim(head, interim, cut.as_mut()).await {
                        return ended;
                    }
                }
                // Nobody asked for another protocol.
                Event::Head(Ok(head)) if head.status == StatusCode::SWITCHING_PROTOCOLS && self.plan.upgrade.is_none() => {
                    return Attempt::Failed(Failed { begun, ..Failed::new(Reset::ProtocolError) });
                }
                Event::Head(Ok(head)) => break head,
                Event::Head(Err(failed)) => {
                    let refused = !begun && failed.reset == Reset::ConnectionTermination && self.sink.is_refused().await;
                    let reset = if refused { Reset::RefusedStream } else { failed.reset };
                    return Attempt::Failed(Failed { reset, begun, ..failed });
                }
                Event::Cut => return Attempt::Cut,
                Event::TimeUp(up) => return Attempt::TimeUp(up),
                Event::Uploaded(Ok(())) => {
                    uploaded = true;
                    self.upload.mark_sent();
                    if self.half_closed {
                        self.half_close(uploaded).await;
                    }
                }
                Event::Uploaded(Err(Broken::Source(error))) => return broken_request(&error),
                // It may have answered before it closed: whatever there is to read tells more than this does.
                Event::Uploaded(Err(Broken::Sink(error))) => {
                    tracing::debug!(target: "proxy", %error, "the upstream takes no more of the request");
                    no_more_up = true;
                }
                Event::Closed(Closed::Half) if self.sink.can_half_close() => self.half_close(uploaded).await,
                // An HTTP/2 upstream could not be told that its client has left if that is what it has.
                Event::Closed(Closed::Half) => return left(),
                Event::Closed(Closed::Gone(error)) | Event::Gone(error) => return gone(&error),
                Event::Downloaded(_) | Event::Received => {}
            }
        };
        self.deadlines.attempt = None;
        let WireResponse { status, headers, framing, keep_alive } = response;
        let verdict = judge(status, headers, self.upload.heard());
        if verdict.again {
            // What has come whole leaves the connection as good as it was.
            if uploaded && keep_alive && !self.half_closed && status != StatusCode::SWITCHING_PROTOCOLS {
                while let Ok(Some(_)) = self.source.buffered() {}
                self.clean = self.source.is_end();
            }
            return Attempt::Again;
        }
        self.upload.settle();
        let last = self.plan.tied && !keep_alive;
        let answered = self.answer(status, verdict.headers, framing, last, (uploaded, no_more_up), cut).await;
        self.clean &= keep_alive && !self.half_closed && status != StatusCode::SWITCHING_PROTOCOLS;
        Attempt::Answered(answered)
    }

    /// Passes an informational answer on, the first ones of which this is that `number`; how the attempt ends, if that does not work.
    async fn interim(&mut self, head: WireResponse, number: u32, cut: Pin<&mut (impl Future<Output = ()> + Send)>) -> Option<Attempt> {
        if number > MOST_INTERIM {
            let flood = || Attempt::Failed(Failed { begun: true, ..Failed::new(Reset::ProtocolError) });
            return (number > FLOOD).then(flood);
        }
        tokio::select! {
            biased;
            told = self.responder.informational(head.status, head.headers) => told.err().map(|error| gone(&error)),
            () = cut => Some(Attempt::Cut),
            up = self.deadlines.passed() => Some(Attempt::TimeUp(up)),
        }
    }

    /// Ends what is not whole: a stream of HTTP/2 by itself, HTTP/1 with its connection.
    pub(super) fn give_up(&mut self) {
        if !self.clean
            && let UpSink::H2(sink) = &mut self.sink
        {
            sink.reset(h2::Reason::CANCEL);
        }
    }

    fn framing(&self) -> Framing {
        if self.upload.is_end() { Framing::Empty } else { self.upload.framing() }
    }

    /// The client will send no more; passed on as soon as all it sent is.
    async fn half_close(&mut self, uploaded: bool) {
        self.half_closed = true;
        if uploaded {
            self.sink.half_close().await;
        }
    }

    /// Passes the response on, and what is left of the request.
    async fn answer(
        &mut self,
        status: StatusCode,
        headers: HeaderMap,
        framing: Framing,
        last: bool,
        (mut uploaded, mut no_more_up): (bool, bool),
        mut cut: Pin<&mut (impl Future<Output = ()> + Send)>,
    ) -> Answered {
        let switched = status == StatusCode::SWITCHING_PROTOCOLS;
        // A client that was refused another protocol may have begun to speak it.
        let refused = self.plan.upgrade.is_some() && !switched;
        let close = self.plan.close || last || refused || !self.upload.note_received() && !switched;
        if self.responder.start(ResponseHead { status, headers, framing }, close).is_err() {
            return Answered::Abandoned;
        }
        if switched {
            self.upload.become_raw();
            self.sink.become_raw();
            self.source.become_raw();
            uploaded = false;
            // What is said now has no end that a timeout could be for.
            *self.deadlines = Deadlines::default();
        }
        let (mut downloaded, mut upstream_first) = (false, false);
        loop {
            if downloaded && (uploaded || no_more_up || !switched) {
                self.clean = uploaded;
                return if upstream_first { Answered::Truncated(Reset::ConnectionTermination) } else { Answered::Whole };
            }
            if !switched {
                arm_route(self.plan, self.deadlines, self.upload.note_received());
            }
            let watch = uploaded && !self.half_closed && !switched;
            let event = tokio::select! {
                biased;
                done = pump(&mut self.source, self.responder), if !downloaded => Event::Downloaded(done),
                () = &mut cut => Event::Cut,
                up = self.deadlines.passed() => Event::TimeUp(up),
                event = up(self.upload, &mut self.sink, uploaded, self.half_closed || switched), if watch || !uploaded && !no_more_up => event,
            };
            match event {
                Event::Downloaded(Ok(())) => {
                    downloaded = true;
                    upstream_first = switched && !uploaded;
                }
                // It was the client that closed first.
                Event::Downloaded(Err(Broken::Source(error))) if !self.half_closed => {
                    // What came before is the client's, as far as it takes it at once.
                    tokio::select! {
                        biased;
                        _ = self.responder.flush() => {}
                        () = std::future::ready(()) => {}
                    }
                    // What was switched to has no protocol that could be broken.
                    let reset = if switched { Reset::ConnectionTermination } else { self.source.broken_off(&error) };
                    return Answered::Truncated(reset);
                }
                Event::Closed(Closed::Half) if self.sink.can_half_close() => self.half_close(uploaded).await,
                Event::Downloaded(Err(Broken::Source(_) | Broken::Sink(_)))
                | Event::Closed(_)
                | Event::Gone(_)
                | Event::Uploaded(Err(Broken::Source(_))) => return Answered::Abandoned,
                Event::Cut => return Answered::Cut,
                Event::TimeUp(up) => return Answered::TimeUp(up),
                Event::Uploaded(Ok(())) => {
                    uploaded = true;
                    self.upload.mark_sent();
                    // What was switched ends by itself.
                    if self.half_closed && !switched {
                        self.half_close(uploaded).await;
                    }
                }
                Event::Uploaded(Err(Broken::Sink(_))) => no_more_up = true,
                Event::Head(_) | Event::Received => {}
            }
        }
    }
}

/// The client closed its end, and the upstream cannot be told that.
fn left() -> Attempt {
    gone(&io::ErrorKind::UnexpectedEof.into())
}

/// Sends the body on, or, when that is done, waits for the client to close.
async fn up<B: RequestBody>(upload: &mut Upload<'_, B>, sink: &mut UpSink<'_>, uploaded: bool, half_closed: bool) -> Event {
    if uploaded {
        return Event::Closed(upload.closed().await);
    }
    if !sink.has_ended() {
        return match fill(upload, sink).await {
            Ok(()) => Event::Received,
            Err(broken) => Event::Uploaded(Err(broken)),
        };
    }
    tokio::select! {
        biased;
        drained = drain(sink) => Event::Uploaded(drained.map_err(Broken::Sink)),
        closed = upload.closed(), if !half_closed => Event::Closed(closed),
    }
}
