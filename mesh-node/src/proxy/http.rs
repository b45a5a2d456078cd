//! HTTP for captured connections: routing, resilience and traffic shaping where the client is.
//!
//! [`wire`] and [`framing`] are the HTTP/1 codec, pure; [`h1`] and [`h2`] the two ends of connections; [`exchange`] is one
//! request in the order things happen, [`attempts`] its tries and [`attempt`] one of them. [`clusters`] holds what a pod has under way, [`upstream`]
//! its connections. HTTP/1 is read and written by this module's own code, because what is refused, how a broken response
//! ends and what may be passed on uncopied are decided there; HTTP/2 frames are the `h2` library's.

mod attempt;
mod attempts;
pub(super) mod authorizer;
mod body;
pub(super) mod call;
pub mod clusters;
mod date;
mod exchange;
pub mod framing;
pub mod gate;
mod grpc_web;
pub mod guard;
mod h1;
mod h2;
mod headers;
mod meter;
mod mirror;
mod over;
mod record;
mod reply;
mod tokens;
mod traced;
pub mod transport;
mod upload;
mod upstream;
pub(super) mod whole;
pub mod wire;

use std::{
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::Method;
use tokio::net::TcpStream;

pub use clusters::Clusters;
pub use over::Over;
pub use record::Flags;
pub use upload::{Replays, Share};

use self::{
    authorizer::ToClient,
    body::{FrameSink, RequestBody, Responder},
    exchange::{End, Exchange},
    grpc_web::{Web, WebBody, WebResponder},
    h1::{H1Responder, H1Sink, NoHead, Reader, Unread},
    h2::{Accepted, H2Responder, H2Source},
    record::Record,
    reply::Reply,
    transport::{Counted, Transport},
    wire::{HeadLimits, Refused, WireRequest},
};
use super::{Proxy, ServedPod, limits::Place, live::Cut, open::Listed, pods::Stage};
use crate::{
    detect::Protocol,
    io::{
        rarely::Rarely,
        relay::{Prefixed, Traffic},
    },
    route::{PortOf, Target, request::RequestHead},
    spawn,
};

/// How long a client may take over the head of a request it has begun.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);

/// The client's connection, as every exchange on it sees it.
pub struct Downstream<'d> {
    pub proxy: &'d Arc<Proxy>,
    pub pod: &'d Arc<ServedPod>,
    /// The client as others are to see it.
    pub client: SocketAddr,
    pub original: SocketAddr,
    /// The service that was at the address when the first request came: it stays that one, whoever has the address later.
    pub dialled: &'d OnceLock<PortOf>,
    /// Told where the client has picked an endpoint itself, and that is over.
    pub over: &'d Arc<Over>,
    pub http2: bool,
}

/// A captured connection that carries HTTP.
pub struct Connection {
    pub proxy: Arc<Proxy>,
    pub pod: Arc<ServedPod>,
    pub client: SocketAddr,
    pub original: SocketAddr,
    /// When it came.
    pub since: Stage,
    /// The service it leads to, once that is known.
    pub dialled: OnceLock<PortOf>,
    /// Told when it is to end with what it leads to.
    pub over: Arc<Over>,
}

impl Connection {
    /// Serves HTTP/1 until the client closes, or something does that ends the connection. `read`: what was read already.
    pub async fn serve_h1(self, stream: TcpStream, read: Bytes) {
        let mut transport = Transport::Tcp(stream);
        let listed = Listed::requests(&self.proxy, &self.pod, self.client, self.original);
        listed.traffic().sent.fetch_add(read.len() as u64, Ordering::Relaxed);
        let mut unread = Unread::from(read);
        if self.h1_loop(&mut transport, &mut unread, listed.traffic()).await == Finished::Cut {
            transport.reset();
        }
    }

    async fn h1_loop(&self, transport: &mut Transport, unread: &mut Unread, traffic: &Traffic) -> Finished {
        let (source, sink) = transport.counted_halves(&traffic.sent, &traffic.received);
        let (mut reader, mut sink) = (Reader::new(source, unread), H1Sink::new(sink));
        // Apart: every connection has the room for it, all along.
        let mut draining = Box::pin(Rarely::new(self.pod.draining_idle(self.since)));
        let mut ended = std::pin::pin!(Rarely::new(self.pod.ended()));
        let mut drained = false;
        loop {
            let request = tokio::select! {
                biased;
                request = read_request(&mut reader, self.original) => request,
                () = &mut draining, if !drained => {
                    if !reader.has_begun() {
                        return Finished::Closed;
                    }
                    // What has begun is answered.
                    drained = true;
                    continue;
                }
                _ = &mut ended => return Finished::Cut,
            };
            let end = match request {
                Ok(request) => self.h1_exchange(request, &mut reader, &mut sink, ended.as_mut()).await,
                Err(NoHead::Refused(refused)) => {
                    tokio::select! {
                        () = refuse_h1(|| self.unread(&refused), &refused, &mut reader, &mut sink) => {}
                        _ = &mut ended => return Finished::Cut,
                    }
                    if refused.malformed.close { Next::Close } else { Next::Another }
                }
                Err(NoHead::Ended { partial } | NoHead::Broken { partial }) => {
                    if partial {
                        let mut record = Record::new(&self.proxy.metrics, self.client, self.original, "HTTP/1.1");
                        record.cut_short(self.proxy.config.load().workload(&self.pod.uid));
                    }
                    return Finished::Closed;
                }
            };
            match end {
                Next::Another if !drained => {}
                Next::Abort | Next::Garble | Next::Refuse => return Finished::Cut,
                Next::Another | Next::Close => {
                    // The answer must not be lost to a reset because of what the client still sends.
                    let closed = async {
                        if sink.shutdown().await.is_ok() {
                            reader.linger().await;
                        }
                    };
                    tokio::select! {
                        () = closed => return Finished::Closed,
                        _ = &mut ended => return Finished::Cut,
                    }
                }
            }
        }
    }

    /// `ended` completes when the pod's connections are cut.
    async fn h1_exchange(
        &self,
        request: WireRequest,
        reader: &mut Reader<'_>,
        sink: &mut H1Sink<'_>,
        ended: Pin<&mut (impl Future<Output = Cut> + Send)>,
    ) -> Next {
        let WireRequest { head, minor, keep_alive, upgrade, .. } = request;
        let down = self.downstream(false);
        let protocol = if minor == 1 { "HTTP/1.1" } else { "HTTP/1.0" };
        let mut record = Record::new(&self.proxy.metrics, self.client, self.original, protocol);
        let mut responder = H1Responder::new(sink, minor, &head.method, keep_alive).of(&self.pod, self.since);
        let exchange = Exchange {
            down: &down,
            body: reader,
            responder: &mut responder,
            record: &mut record,
            upgrade,
            close: false,
            grpc: false,
            web: false,
            to_client: ToClient::default(),
        };
        let end = tokio::select! {
            biased;
            end = self.run(exchange, head) => Some(end),
            _ = ended => None,
        };
        record.moved(reader.meter(), responder.meter());
        let Some(end) = end else {
            record.cut();
            return Next::Abort;
        };
        match end {
            End::Complete if responder.keeps_alive() => Next::Another,
            // Nothing was answered: the client is gone, or is to see a failure.
            End::Broken if !responder.has_started() || responder.would_look_complete() => Next::Abort,
            End::Complete | End::Broken => Next::Close,
        }
    }

    fn unread(&self, refused: &Refused) -> Record {
        let mut record = Record::new(&self.proxy.metrics, self.client, self.original, "HTTP/1.1");
        record.refused_as(refused, self.proxy.config.load().workload(&self.pod.uid));
        record
    }

    /// Serves HTTP/2 until the connection ends. `read`: what was read already.
    pub async fn serve_h2(self, stream: TcpStream, read: Bytes) {
        let connection = Arc::new(self);
        let pod = connection.pod.clone();
        let listed = Listed::requests(&connection.proxy, &pod, connection.client, connection.original);
        let io = Counted::downstream(Transport::Prefixed(Prefixed::new(stream, read)), listed.traffic().clone());
        let client = connection.client;
        let serving = h2::serve(
            io,
            h2::MAX_STREAMS,
            |accepted| match accepted {
                Some(accepted) => match connection.proxy.request(&connection.pod) {
                    Some(place) => drop(spawn::large(connection.clone().h2_exchange(accepted, place))),
                    None => h2::turn_away(accepted),
                },
                None => connection.broke_protocol(),
            },
            async {
                tokio::select! {
                    () = pod.draining(connection.since) => {}
                    () = connection.over.wait() => {}
                }
            },
        );
        tokio::select! {
            result = serving => if let Err(error) = result {
                tracing::debug!(target: "proxy", %client, %error, "HTTP/2 connection ended");
            },
            _ = pod.ended() => {}
        }
    }

    /// Tells of a request of HTTP/2 that could not be read.
    fn broke_protocol(&self) {
        let mut record = Record::new(&self.proxy.metrics, self.client, self.original, "HTTP/2");
        record.broke_protocol(self.proxy.config.load().workload(&self.pod.uid));
    }

    async fn h2_exchange(self: Arc<Self>, accepted: Accepted, _place: Place) {
        let Accepted { request, respond, unsent } = accepted;
        let (parts, stream) = request.into_parts();
        let mut body = H2Source::new(stream, &parts.headers);
        let mut responder = H2Responder::new(respond, parts.method == Method::HEAD, unsent);
        let mut record = Record::new(&self.proxy.metrics, self.client, self.original, "HTTP/2");
        let down = self.downstream(true);
        let head = h2::request_head(http::Request::from_parts(parts, ()), HeadLimits::OF_CLIENT);
        let head = match head {
            Ok(head) => head,
            Err(refused) => {
                record.refused_as(&refused, self.proxy.config.load().workload(&self.pod.uid));
                let reply = Reply::new(refused.malformed.status, refused.malformed.body);
                if refused.is_grpc() {
                    responder.meter().count_messages();
                }
                let status = reply.start(refused.is_grpc(), false, &mut responder, |_, _| {}).ok();
                record.refused(status, responder.meter());
                // A client that does not take the answer gets none.
                let _ = responder.flush().await;
                return;
            }
        };
        let exchange = Exchange {
            down: &down,
            body: &mut body,
            responder: &mut responder,
            record: &mut record,
            upgrade: None,
            close: false,
            grpc: false,
            web: false,
            to_client: ToClient::default(),
        };
        let cut = tokio::select! {
            _ = self.run(exchange, head) => false,
            _ = self.pod.ended() => true,
        };
        record.moved(body.meter(), responder.meter());
        record.left(responder.client());
        if cut {
            record.cut();
        }
        // Of one that is complete although the client still sends, h2 says so itself when both ends are dropped: after the answer,
        // which a reset from here could overtake (RFC 9113 section 8.1).
        if !responder.is_complete() {
            responder.reset(::h2::Reason::INTERNAL_ERROR).await;
        }
    }

    /// Serves a request; one of gRPC-Web, on a port that declares that, as one of gRPC.
    async fn run<B: body::RequestBody, R: body::Responder>(&self, mut exchange: Exchange<'_, '_, B, R>, mut head: RequestHead) -> End {
        let Some(web) = Web::of(&head.headers).filter(|_| self.is_web()) else { return exchange.run(head).await };
        Web::translate(&mut head);
        let Exchange { down, body, responder, record, upgrade, close, grpc, .. } = exchange;
        let (mut body, mut responder) = (WebBody::new(body, web), WebResponder::new(responder, web));
        let (body, responder) = (&mut body, &mut responder);
        Box::pin(Exchange { down, body, responder, record, upgrade, close, grpc, web: true, to_client: ToClient::default() }.run(head))
            .await
    }

    /// Whether the port that was dialled declares gRPC-Web.
    fn is_web(&self) -> bool {
        let snapshot = self.proxy.config.load();
        let Some(source) = snapshot.workload(&self.pod.uid) else { return false };
        let target = snapshot.resolve_for(&source.view, self.original);
        matches!(target, Target::Service { port, .. } if port.cluster.protocol == Protocol::GrpcWeb)
    }

    fn downstream(&self, http2: bool) -> Downstream<'_> {
        let Self { proxy, pod, client, original, dialled, over, .. } = self;
        Downstream { proxy, pod, client: *client, original: *original, dialled, over, http2 }
    }
}

/// Waits for a request as long as the client likes, and for the rest of one that has begun for a minute.
async fn read_request(reader: &mut Reader<'_>, dialled: SocketAddr) -> Result<WireRequest, NoHead> {
    reader.begun().await?;
    let mut request = if reader.has_head() {
        // Almost always: no timer is needed.
        reader.request().await?
    } else {
        tokio::time::timeout(HEAD_TIMEOUT, reader.request()).await.unwrap_or(Err(NoHead::Broken { partial: true }))?
    };
    // Of HTTP/1.0, which knows no Host; it goes on in a version that has to have one, and servers take no empty one.
    if request.minor == 0 && request.head.authority.is_empty() {
        let host = if dialled.port() == 80 { url_host(dialled.ip()) } else { dialled.to_string() };
        request.head.authority = ::http::HeaderValue::try_from(host).unwrap_or(request.head.authority);
    }
    Ok(request)
}

/// An address as it stands in a URL.
fn url_host(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Another,
    Close,
    Abort,
    /// The other end is to see that what it would get is no HTTP.
    Garble,
    /// The other end is to see that nothing has become of what it sent last.
    Refuse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finished {
    Closed,
    Cut,
}

/// Answers what cannot be served.
async fn refuse_h1(record: impl FnOnce() -> Record, refused: &Refused, reader: &mut Reader<'_>, sink: &mut H1Sink<'_>) {
    let (mut record, malformed) = (record(), &refused.malformed);
    let mut responder = H1Responder::new(sink, 1, &Method::GET, true);
    if refused.is_grpc() {
        responder.meter().count_messages();
    }
    let reply = Reply::new(malformed.status, malformed.body);
    let status = reply.start(refused.is_grpc(), malformed.close, &mut responder, |_, _| {}).ok();
    record.refused(status, responder.meter());
    // A client that does not take the answer gets none.
    let _ = responder.flush().await;
    reader.begin_body(wire::Framing::Empty);
}
