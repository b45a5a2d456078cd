//! What became of a request: flags and details as Envoy names them, counted and logged in one place when it ends.

use std::{
    borrow::Cow,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{CONTENT_LENGTH, TRANSFER_ENCODING},
};

mod described;
mod told;

pub use self::described::Described;
use super::{
    meter::Meter,
    reply::{Reply, grpc_code},
    traced::{Onward, Traced},
    wire::{Malformed, ParsedHead, Refused},
};
pub use crate::telemetry::{Flag, Flags};
use crate::{
    id::{ObjectName, SpiffeId},
    proxy::{reporting::Ends, traces::Spans},
    report::{
        Reporting, TelemetryPlan,
        entry::X_REQUEST_ID,
        kept::{Kept, Wanted},
        trace::Parent,
    },
    route::{Cluster, PortOf, Workload, request::RequestHead, retry::Reset},
    telemetry::{
        Metrics,
        traffic::{Edge, Followed, HttpKey, Messages, Reporter, Request, Tags},
    },
};

/// One request from its first to its last moment. Dropped, it is counted and logged.
pub struct Record {
    reporter: Reporter,
    metrics: Arc<Metrics>,
    started: Instant,
    /// Whose logs tell it; nothing is logged before that is known.
    teller: Option<Arc<Workload>>,
    described: Option<Box<Described>>,
    pub source: Option<Arc<Workload>>,
    pub client: SocketAddr,
    pub destination: SocketAddr,
    pub protocol: &'static str,
    pub flags: Flags,
    pub details: Cow<'static, str>,
    /// Why there was no connection to where it went.
    pub transport_failure: Option<Cow<'static, str>>,
    pub status: Option<StatusCode>,
    /// The rule's name, or whose it is.
    route: Option<Arc<str>>,
    route_is_named: bool,
    pub cluster: Option<Arc<Cluster>>,
    /// What the client has dialled, for what goes nowhere.
    pub dialled: Option<Arc<Cluster>>,
    pub endpoint: Option<SocketAddr>,
    /// This end of the connection it went on; none of a tunnel.
    pub upstream_local: Option<SocketAddr>,
    /// Attempts begun, whether or not they reached the endpoint.
    pub attempts: u32,
    /// When the first of the answer came.
    pub answered_at: Option<Instant>,
    pub upstream_protocol: Option<&'static str>,
    /// Where it is counted; none where nothing is to be, or there is no room.
    edge: Option<Arc<Edge>>,
    /// It is known where.
    placed: bool,
    /// The workload at the other end, where somebody asks about that.
    other: Option<Arc<Workload>>,
    /// It has come to an end that is told as it is.
    concluded: bool,
    pub grpc: bool,
    /// The application gave no answer: the status is what a proxy would have answered.
    unanswered: bool,
    /// What a call without an answer ended as.
    grpc_meant: Option<u32>,
    /// What passed of the request's and the response's body.
    pub up: Meter,
    pub down: Meter,
    /// Time until the upstream answered.
    pub answered_after: Option<Duration>,
    /// When the last of the request had come, and when the last of it had gone on.
    received_at: Option<Instant>,
    sent_at: Option<Instant>,
    pub peer: Option<SpiffeId>,
    /// Who it was proved to.
    pub local: Option<SpiffeId>,
    pub mutual_tls: bool,
    denied: bool,
    /// The trace it belongs to, if the workload's requests are traced.
    trace: Option<Parent>,
    /// Headers are to say of it something else than they did.
    retraced: bool,
    traced: Option<Box<Traced>>,
    /// The name of the workload, if somebody looks at it.
    watched: Option<String>,
    /// A gRPC call, whose messages are counted as it goes on.
    followed: Option<Followed>,
}

impl Record {
    pub fn new(metrics: &Arc<Metrics>, client: SocketAddr, destination: SocketAddr, protocol: &'static str) -> Self {
        Self::reported(Reporter::Source, metrics, client, destination, protocol)
    }

    /// A request into a pod of this node.
    pub fn inbound(metrics: &Arc<Metrics>, client: SocketAddr, destination: SocketAddr, protocol: &'static str) -> Self {
        Self::reported(Reporter::Destination, metrics, client, destination, protocol)
    }

    fn reported(reporter: Reporter, metrics: &Arc<Metrics>, client: SocketAddr, destination: SocketAddr, protocol: &'static str) -> Self {
        metrics.http_active.inc();
        Self {
            reporter,
            metrics: metrics.clone(),
            started: Instant::now(),
            teller: None,
            described: None,
            source: None,
            client,
            destination,
            protocol,
            flags: Flags::default(),
            details: Cow::Borrowed(""),
            transport_failure: None,
            status: None,
            route: None,
            route_is_named: false,
            cluster: None,
            dialled: None,
            endpoint: None,
            upstream_local: None,
            attempts: 0,
            answered_at: None,
            upstream_protocol: None,
            edge: None,
            placed: false,
            other: None,
            concluded: false,
            grpc: false,
            unanswered: false,
            grpc_meant: None,
            up: Meter::default(),
            down: Meter::default(),
            answered_after: None,
            received_at: None,
            sent_at: None,
            peer: None,
            local: None,
            mutual_tls: false,
            denied: false,
            trace: None,
            retraced: false,
            traced: None,
            watched: None,
            followed: None,
        }
    }

    /// Has a gRPC call's messages counted as it goes on.
    pub fn follow(&mut self, messages: Messages) {
        self.followed = Some(self.metrics.calls.follow(messages, self.edge.clone()));
    }

    /// Has what comes behind an answer's body kept, if that will be told.
    pub fn look_behind(&self, answer: &mut Meter) {
        if self.teller.as_ref().is_some_and(|w| told(&w.reporting, self.reporter).asks.trailers) {
            answer.keep_trailers();
        }
    }

    /// How long ago it began.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes down the rule, by its name or, if it has none, by the object it stands in.
    pub fn routed(&mut self, name: &Arc<str>, origin: &Arc<str>) {
        self.route_is_named = !name.is_empty();
        self.route = Some(if self.route_is_named { name } else { origin }.clone());
    }

    /// Takes down what was asked for, before anything changes it, as far as it will be told.
    pub fn describe(&mut self, head: &RequestHead, workload: &Arc<Workload>) {
        self.grpc = head.is_grpc();
        if self.metrics.watch.is_on() {
            let name = workload.name.to_string();
            self.watched = self.metrics.watch.sees(&name).then_some(name);
        }
        let told = told(&workload.reporting, self.reporter);
        if is_traced() || self.watched.is_some() {
            self.keep(head, &Wanted::All);
        } else if told.wants_request() {
            self.keep(head, &told.asks.request);
        }
        self.teller = Some(workload.clone());
    }

    /// Whether the workload's requests are traced.
    pub fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    /// Lets a trace go on through here, or begins one: what headers are to say of it where the request goes, if that is something
    /// else than they do.
    /// `into`: the service's port that leads into the workload, where it is asked.
    pub fn trace(&mut self, head: &RequestHead, workload: &Arc<Workload>, into: Option<&PortOf>, spans: &Arc<Spans>) -> Option<Onward> {
        let traces = told(&workload.reporting, self.reporter).traces.as_ref()?;
        let onward = Onward::of(&head.headers, traces.sampling, traces.reported);
        self.trace = Some(onward.own);
        if onward.reported {
            self.traced = Some(Box::new(Traced::new(&onward, &head.headers, (workload, into.cloned()), spans)));
            self.keep(head, &Wanted::All);
        }
        self.retraced = !onward.is_said();
        self.retraced.then_some(onward)
    }

    /// Takes down whose request it is, where there is no more to say of it.
    pub fn of(&mut self, source: Option<&Arc<Workload>>) {
        self.teller = source.cloned();
        self.source = source.cloned();
    }

    /// Takes down a request of which only the beginning came.
    pub fn cut_short(&mut self, source: Option<&Arc<Workload>>) {
        self.of(source);
        self.abandoned();
    }

    /// Takes down a request that is refused for what it says.
    pub fn refused_as(&mut self, refused: &Refused, source: Option<&Arc<Workload>>) {
        self.malformed(&refused.malformed, source);
        self.grpc = refused.is_grpc();
        if let Some(ParsedHead { method, target, authority, headers }) = &refused.said {
            if !headers.contains_key(CONTENT_LENGTH) && !headers.contains_key(TRANSFER_ENCODING) {
                self.came_without_body(method);
            }
            self.described = Some(Box::new(Described::unread(method, target, authority.as_ref(), headers)));
        }
    }

    /// Takes down a request that cannot be read.
    pub fn malformed(&mut self, malformed: &Malformed, source: Option<&Arc<Workload>>) {
        self.of(source);
        if malformed.protocol_error {
            self.raise(Flag::DownstreamProtocolError);
        }
        self.details = Cow::Borrowed(malformed.details);
    }

    fn keep(&mut self, head: &RequestHead, wanted: &Wanted) {
        self.described = Some(Box::new(Described::of(head, wanted)));
    }

    /// Takes down that the request is not let in: that is logged in any case.
    pub fn denied(&mut self, head: &RequestHead) {
        self.denied = true;
        if self.described.is_none() && tracing::enabled!(target: "access", tracing::Level::INFO) {
            self.keep(head, &Wanted::All);
        }
    }

    /// Takes down what the gate has made of the request: a token in its path is told to nobody once it is taken off.
    pub fn became(&mut self, head: &RequestHead) {
        let wanted = self.teller.as_ref().map(|w| &told(&w.reporting, self.reporter).asks.request);
        if let Some(described) = &mut self.described {
            described.became(head, wanted);
        }
    }

    /// Takes down what the request became on its way: logs tell that, as Envoy's do. `changed`: its headers are not all what they were.
    pub fn sent(&mut self, head: &RequestHead, changed: bool) {
        let wanted = self.teller.as_ref().map(|w| &told(&w.reporting, self.reporter).asks.request);
        if let Some(described) = &mut self.described {
            described.sent(head, wanted, changed || self.retraced);
        }
    }

    /// Takes down that it goes on to the pod.
    pub fn let_in(&mut self) {
        self.endpoint = Some(self.destination);
    }

    /// Takes down the head of the response as it goes to the client.
    pub fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.status = Some(status);
        // Not of what is answered here.
        if self.answered_after.is_none() && self.answered_at.is_none() && self.described.is_some() && self.details == "via_upstream" {
            self.answered_after = Some(self.started.elapsed());
        }
        if let (Some(described), Some(teller)) = (&mut self.described, &self.teller)
            && let wanted = &told(&teller.reporting, self.reporter).asks.response
            && !wanted.is_none()
        {
            described.response_headers = Some(Kept::of(headers, wanted));
        }
    }

    /// Takes down that the first of an answer has come; `received`: when the last of the request had, if it has.
    pub fn heard(&mut self, received: Option<Instant>) {
        if self.described.is_some() {
            let now = Instant::now();
            self.answered_after = received.map(|received| now.saturating_duration_since(received));
            self.answered_at = Some(now);
        }
    }

    /// Takes down that it has no body. What CONNECT of HTTP/1 opens has an end, and has not come to it.
    pub fn came_without_body(&mut self, method: &Method) {
        if method != Method::CONNECT || self.protocol == "HTTP/2" {
            self.received_at = Some(self.started);
        }
    }

    /// Takes down when the last of the request had come and gone on. One for another protocol has no end before that is over.
    pub fn passed(&mut self, (received, sent): (Option<Instant>, Option<Instant>), upgrade: Option<&HeaderValue>) {
        if upgrade.is_none() || self.status == Some(StatusCode::SWITCHING_PROTOCOLS) {
            (self.received_at, self.sent_at) = (self.received_at.or(received), sent);
        }
    }

    /// Takes down which workload is at the other end, if somebody asks about that.
    pub fn between<'w>(&mut self, teller: &Workload, other: impl FnOnce() -> Option<&'w Arc<Workload>>) {
        if told(&teller.reporting, self.reporter).asks.peers {
            self.other = other().cloned();
        }
    }

    pub fn raise(&mut self, flag: Flag) {
        self.flags.raise(flag);
    }

    /// Counts something there was no room for.
    pub fn overflow(&self, limit: &'static str) {
        self.metrics.overflow(limit);
    }

    /// Takes down where it is counted.
    pub fn place(&mut self, edge: Option<Arc<Edge>>) {
        if let Some(followed) = &self.followed {
            followed.place(edge.clone());
        }
        (self.edge, self.placed) = (edge, true);
    }

    /// Takes down what has passed of the bodies: it is over.
    pub fn moved(&mut self, up: &Meter, down: &Meter) {
        (self.up, self.down, self.concluded) = (up.clone(), down.clone(), true);
    }

    /// It was answered here, and that is all.
    pub fn refused(&mut self, status: Option<StatusCode>, down: &Meter) {
        (self.status, self.down, self.concluded) = (status, down.clone(), true);
        if status.is_none() {
            self.abandoned();
        }
    }

    /// The application gave no answer. Its client sees that as it happened; a proxy of Istio's would have answered for it, and it is told of
    /// like that.
    pub fn unanswered(&mut self, reset: Reset) {
        let status = Reply::reset(reset, false).status;
        self.grpc_meant = self.grpc.then(|| grpc_code(status).into());
        self.status = Some(if self.grpc { StatusCode::OK } else { status });
        self.unanswered = true;
    }

    /// The client did not wait for the end.
    pub fn abandoned(&mut self) {
        self.concluded = true;
        self.raise(Flag::DownstreamDisconnect);
        self.details = Cow::Borrowed("downstream_remote_disconnect");
    }

    /// It was one of the proxy's own, and this is its answer.
    pub fn called(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.details = Cow::Borrowed("via_upstream");
        self.answered(status, headers);
    }

    /// Its connection was cut here: its pod is gone, a policy denies it, or the node stops.
    pub fn cut(&mut self) {
        self.raise(Flag::DownstreamDisconnect);
        self.details = Cow::Borrowed("downstream_local_disconnect");
    }

    /// It was answered, and what asked does not want the answer but asks again.
    pub fn repeated(&mut self, up: &Meter) {
        (self.up, self.concluded) = (up.clone(), true);
    }

    /// What gRPC has of it: where an answer says nothing, what its HTTP status means.
    fn grpc_status(&self) -> Option<u32> {
        let meant = || self.status.filter(|_| self.grpc).map(|status| u32::from(grpc_code(status)));
        self.down.grpc_status.or(self.grpc_meant).or_else(meant)
    }

    /// Where a request is counted that went nowhere.
    fn lost_edge(&self) -> Option<Arc<Edge>> {
        let service: Option<&ObjectName> = self.cluster.as_ref().or(self.dialled.as_ref()).map(|c| &c.id.service);
        let source = (self.source.as_deref(), self.source.as_ref().map(|s| &s.identity));
        let tags = self.teller.as_ref().map(|w| told(&w.reporting, self.reporter).tags.clone()).unwrap_or_default();
        Ends { reporter: self.reporter, source, destination: (None, None), service, introduction: None }.edge(&self.metrics, &tags)
    }

    fn count(&mut self, duration: Duration, tags: Tags) {
        let lost = if self.placed { None } else { self.lost_edge() };
        if let Some(followed) = self.followed.take() {
            let edge = self.edge.as_ref().or(lost.as_ref()).map(|edge| &**edge);
            followed.end(&self.metrics.calls, edge, &tags);
        }
        let Some(edge) = self.edge.as_ref().or(lost.as_ref()) else { return };
        let (code, flags, grpc) = (self.status.map_or(0, |s| s.as_u16()), self.flags, self.grpc);
        let key = HttpKey { grpc, code, grpc_status: self.grpc_status().filter(|_| grpc), flags, tags };
        let request = Request { duration, request_bytes: self.up.bytes, response_bytes: self.down.bytes };
        edge.request(&key, &request);
    }
}

fn told(reporting: &Reporting, reporter: Reporter) -> &TelemetryPlan {
    match reporter {
        Reporter::Source => &reporting.client,
        Reporter::Destination => &reporting.server,
    }
}

/// Whether everything is in the node's own log.
pub fn is_traced() -> bool {
    tracing::enabled!(target: "access", tracing::Level::DEBUG)
}
