//! External authorizers: whether a request may pass is asked of a service, as Envoy's `ext_authz` filter asks.
//!
//! The question goes from the protected pod through the mesh like any request of its own. Nobody is asked about requests to an
//! authorizer: it would be asked about the question.

mod proto;

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use tokio::time::timeout;

use super::{
    body::{BodyError, FrameSink, FrameSource},
    call::{Answered, Call},
    framing::Frame,
    gate::{Gate, Refusal},
    record::Flag,
    reply::Reply,
    wire::Framing,
};
use crate::{
    config::Snapshot,
    resource::{
        mesh_config::{Authorizer, Check, HttpCheck},
        strings::StringMatch,
    },
    route::{Cluster, request::RequestHead},
};

/// Largest answer of an authorizer that is taken, bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// Questions under way from one pod to one authorizer; more are errors.
const AT_ONCE: u32 = 4096;

/// What an authorizer says.
pub enum Answer {
    /// It may pass, with the changes made to it.
    Allowed {
        to_client: HeaderMap,
    },
    Denied(Box<Refusal>),
}

/// Asks one authorizer about a request, and changes the request as it says.
pub async fn ask(gate: &Gate, snapshot: &Arc<Snapshot>, provider: &Arc<str>, head: &mut RequestHead) -> Answer {
    let metrics = &gate.proxy.metrics;
    let Some(authorizer) = snapshot.authorizers.get(provider) else {
        metrics.authorizer_call("unknown");
        return refused(StatusCode::FORBIDDEN, format!("ext_authz_error{{unknown_provider_{provider}}}"));
    };
    let Some(cluster) = cluster(snapshot, authorizer) else {
        metrics.authorizer_call("unknown");
        return unanswered(authorizer);
    };
    if is_authorizer(snapshot, gate.facts.destination) {
        return Answer::Allowed { to_client: HeaderMap::new() };
    }
    let asked = async {
        match &authorizer.check {
            Check::Http(check) => ask_http(gate, &cluster, check, head).await,
            Check::Grpc => ask_grpc(gate, &cluster, authorizer, head).await,
        }
    };
    let answer = timeout(authorizer.timeout, asked).await;
    match answer {
        Ok(Some(answer)) => {
            metrics.authorizer_call(if matches!(answer, Answer::Allowed { .. }) { "allowed" } else { "denied" });
            answer
        }
        Ok(None) => {
            metrics.authorizer_call("failed");
            unanswered(authorizer)
        }
        Err(_) => {
            metrics.authorizer_call("timeout");
            unanswered(authorizer)
        }
    }
}

fn cluster(snapshot: &Snapshot, authorizer: &Authorizer) -> Option<Arc<Cluster>> {
    let mut labels = authorizer.service.split('.');
    let (name, namespace) = (labels.next()?, labels.next()?);
    let service = snapshot.services().iter().find(|s| &*s.name.name == name && &*s.name.namespace == namespace)?;
    Some(service.port(authorizer.port)?.cluster.clone())
}

/// Whether an address is an authorizer's own.
fn is_authorizer(snapshot: &Snapshot, address: SocketAddr) -> bool {
    let clusters = snapshot.authorizers.values().filter_map(|a| cluster(snapshot, a));
    clusters.flat_map(|c| c.endpoints.iter().map(|e| e.address).collect::<Vec<_>>()).any(|a| a == address)
}

/// What becomes of a request nobody could be asked about.
fn unanswered(authorizer: &Authorizer) -> Answer {
    if authorizer.fail_open {
        return Answer::Allowed { to_client: HeaderMap::new() };
    }
    refused(authorizer.status_on_error, "ext_authz_error".to_owned())
}

fn refused(status: StatusCode, details: String) -> Answer {
    Answer::Denied(refusal(Reply::new(status, ""), details))
}

fn refusal(reply: Reply, details: String) -> Box<Refusal> {
    let mut refusal = Refusal::new(reply, details);
    refusal.flag = Some(Flag::UnauthorizedExternally);
    refusal
}

fn call<'a>(gate: &'a Gate, cluster: &'a Arc<Cluster>, http2: bool) -> Call<'a> {
    Call { proxy: &gate.proxy, pod: &gate.pod, client: gate.client, cluster, http2, at_once: AT_ONCE }
}

async fn ask_http(gate: &Gate, cluster: &Arc<Cluster>, check: &HttpCheck, head: &mut RequestHead) -> Option<Answer> {
    let mut headers = HeaderMap::new();
    for (name, value) in &head.headers {
        let sent = name == header::AUTHORIZATION || any(&check.request_headers, name);
        if sent {
            headers.append(name.clone(), value.clone());
        }
    }
    for (name, value) in &check.additional_headers {
        headers.insert(name.clone(), value.clone());
    }
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    let target = format!("{}{}", check.path_prefix, head.target.as_str());
    let question = RequestHead {
        method: head.method.clone(),
        scheme: head.scheme,
        authority: head.authority.clone(),
        target: target.parse().ok()?,
        headers,
    };
    let mut body = Collected::default();
    let http2 = cluster.protocol.is_http2();
    let answered = Box::pin(call(gate, cluster, http2).run(&question, &mut Whole::default(), Framing::Empty, &mut body)).await?;
    let Answered { status, mut headers } = answered;
    // Envoy takes a server's own failure for one to answer.
    if body.over || status.is_server_error() {
        return None;
    }
    if status == StatusCode::OK {
        let names = headers.keys().filter(|n| any(&check.to_upstream, n) && is_end_to_end(n)).cloned().collect::<Vec<_>>();
        for name in names {
            head.headers.remove(&name);
            for value in headers.get_all(&name) {
                head.headers.append(name.clone(), value.clone());
            }
        }
        let to_client = headers.iter().filter(|(n, _)| any(&check.to_downstream_on_allow, n) && is_end_to_end(n));
        return Some(Answer::Allowed { to_client: to_client.map(|(n, v)| (n.clone(), v.clone())).collect() });
    }
    let always = [header::WWW_AUTHENTICATE, header::LOCATION];
    let gone =
        headers.keys().filter(|n| !check.to_downstream_on_deny.is_empty() && !always.contains(n) && !any(&check.to_downstream_on_deny, n));
    let gone = gone.cloned().chain([header::CONTENT_LENGTH, header::TRANSFER_ENCODING]).collect::<Vec<_>>();
    gone.iter().for_each(|n| drop(headers.remove(n)));
    let mut reply = Reply::new(status, String::from_utf8_lossy(&body.data).into_owned());
    reply.headers = headers;
    // A gRPC client is told in gRPC.
    reply.verbatim = (!head.is_grpc()).then(|| body.data.into());
    Some(Answer::Denied(refusal(reply, "ext_authz_denied".to_owned())))
}

/// How a message is framed is not an authorizer's business.
fn is_end_to_end(name: &HeaderName) -> bool {
    ![header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION, header::HOST, header::UPGRADE, header::TE].contains(name)
}

/// Whether a header is one of those listed; names are in lower case.
fn any(patterns: &[StringMatch], name: &HeaderName) -> bool {
    patterns.iter().any(|p| p.matches(name.as_str()))
}

async fn ask_grpc(gate: &Gate, cluster: &Arc<Cluster>, authorizer: &Authorizer, head: &mut RequestHead) -> Option<Answer> {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers.insert("grpc-timeout", format!("{}m", authorizer.timeout.as_millis().min(99_999_999)).try_into().ok()?);
    let question = RequestHead {
        method: http::Method::POST,
        scheme: head.scheme,
        authority: HeaderValue::from_str(&authorizer.service).ok()?,
        target: http::uri::PathAndQuery::from_static("/envoy.service.auth.v3.Authorization/Check"),
        headers,
    };
    let message = crate::grpc::frame(&proto::question(&gate.facts, gate.client, head));
    let framing = Framing::Length(message.len() as u64);
    let mut body = Collected::default();
    let answered = Box::pin(call(gate, cluster, true).run(&question, &mut Whole::of(message), framing, &mut body)).await?;
    let status = body.trailers.get("grpc-status").or_else(|| answered.headers.get("grpc-status"));
    if answered.status != StatusCode::OK || body.over || status.is_some_and(|s| s != "0") {
        return None;
    }
    Some(match proto::apply(&crate::grpc::unframe(&body.data)?, head) {
        proto::Outcome::Allowed { to_client } => Answer::Allowed { to_client },
        proto::Outcome::Denied(reply) => Answer::Denied(refusal(*reply, "ext_authz_denied".to_owned())),
    })
}

/// A body that is there, whole.
#[derive(Default)]
struct Whole(Option<Bytes>);

impl Whole {
    fn of(data: Vec<u8>) -> Self {
        Self(Some(data.into()))
    }
}

impl FrameSource for Whole {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        self.buffered()
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        Ok(self.0.take().map(Frame::Data))
    }

    fn is_end(&self) -> bool {
        self.0.is_none()
    }
}

/// Keeps what it is given, up to a limit.
#[derive(Default)]
struct Collected {
    data: Vec<u8>,
    trailers: HeaderMap,
    over: bool,
    ended: bool,
}

impl FrameSink for Collected {
    fn push(&mut self, frame: Frame) {
        match frame {
            Frame::Data(data) if self.data.len() + data.len() <= MAX_ANSWER => self.data.extend_from_slice(&data),
            Frame::Data(_) => self.over = true,
            Frame::Trailers(trailers) => self.trailers = trailers,
        }
    }

    fn end(&mut self) {
        self.ended = true;
    }

    fn has_ended(&self) -> bool {
        self.ended
    }

    fn is_flushed(&self) -> bool {
        true
    }

    async fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
