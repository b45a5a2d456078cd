//! External authorizers: whether a request may pass is asked of a service, as Envoy's `ext_authz` filter asks.
//!
//! The question goes from the protected pod through the mesh like any request of its own. Nobody is asked about requests to an
//! authorizer: it would be asked about the question.

mod changes;
mod proto;

use std::{sync::Arc, time::SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use tokio::time::timeout;

use self::changes::How;
pub use self::changes::ToClient;
use super::{
    body::{Beginning, BodyError, Preview, Unseen},
    call::{Answered, Call},
    gate::{Gate, Refusal},
    record::Flag,
    reply::Reply,
    whole::{Collected, Whole},
    wire::Framing,
};
use crate::{
    config::Snapshot,
    report::{
        entry::{Asked, ClusterName, Entry},
        format::Template,
        kept::Kept,
        trace,
    },
    resource::{
        mesh_config::{Authorizer, BodyInCheck, Check, HttpCheck},
        strings::StringMatch,
    },
    route::{
        Cluster,
        request::{RequestHead, Scheme, take_off},
        rule::HeaderText,
    },
};

/// Largest answer of an authorizer that is taken, bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// Questions under way from one pod to one authorizer; more are errors.
const AT_ONCE: u32 = 4096;
/// Envoy's details of what becomes of a question.
const ERROR: &str = "ext_authz_error";
const DENIED: &str = "ext_authz_denied";
const INVALID: &str = "ext_authz_invalid";
/// Says whether an authorizer is shown only the beginning of a body.
const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";

/// Names of request headers, by commas, that an authorizer over HTTP wants taken off.
const TO_REMOVE: &str = "x-envoy-auth-headers-to-remove";

/// What an authorizer says.
pub enum Answer {
    /// It may pass, with the changes made to it.
    Allowed {
        to_client: ToClient,
    },
    Denied(Box<Refusal>),
}

/// What comes of a question that was answered.
enum AuthorizerAnswer {
    Decided(Answer),
    /// The authorizer says that it failed, and what its client is to be told.
    Failed(Box<Reply>),
}

impl AuthorizerAnswer {
    fn word(&self) -> &'static str {
        match self {
            Self::Decided(Answer::Allowed { .. }) => "allowed",
            Self::Decided(Answer::Denied(_)) => "denied",
            Self::Failed(_) => "failed",
        }
    }
}

/// Asks one authorizer about a request, and changes the request as it says.
pub async fn ask(
    gate: &Gate,
    snapshot: &Arc<Snapshot>,
    provider: &Arc<str>,
    (head, protocol): (&mut RequestHead, &'static str),
    body: &mut impl Preview,
) -> Answer {
    let asked = match whom(gate, snapshot, provider) {
        Whom::Nobody => return Answer::Allowed { to_client: ToClient::default() },
        Whom::Unknown => return nobody_to_ask(),
        Whom::Away => return refused(StatusCode::FORBIDDEN, format!("{ERROR}{{no_service_of_provider_{provider}}}")),
        Whom::Found(authorizer, cluster) => {
            // Clients may take their time over it: the authorizer's begins after that.
            let shown = match show(gate, authorizer, body).await {
                Ok(shown) => shown,
                Err(refusal) => return Answer::Denied(refusal),
            };
            let answer = async {
                match &authorizer.check {
                    Check::Http(check) => ask_http(gate, snapshot, &cluster, check, (head, protocol), shown).await,
                    Check::Grpc => ask_grpc(gate, &cluster, authorizer, (head, protocol), shown).await,
                }
            };
            (in_time(gate, authorizer, answer, AuthorizerAnswer::word).await, authorizer)
        }
    };
    match asked {
        (Some(AuthorizerAnswer::Decided(answer)), _) => answer,
        (Some(AuthorizerAnswer::Failed(_)) | None, authorizer) if authorizer.fail_open => {
            Answer::Allowed { to_client: ToClient::default() }
        }
        (Some(AuthorizerAnswer::Failed(reply)), _) => Answer::Denied(refusal(*reply, ERROR.to_owned())),
        (None, authorizer) => refused(authorizer.status_on_error, ERROR.to_owned()),
    }
}

/// As much of a request's body as an authorizer is shown.
pub struct Shown {
    data: Bytes,
    /// What has come of it, bytes.
    received: usize,
    as_bytes: bool,
    /// There is more of it.
    partial: bool,
}

/// Reads what the authorizer is to be shown of the body; none where it is shown none, or there is none.
async fn show(gate: &Gate, authorizer: &Authorizer, body: &mut impl Preview) -> Result<Option<Shown>, Box<Refusal>> {
    let Some(BodyInCheck { most, partial, as_bytes }) = authorizer.body.filter(|_| !body.is_empty()) else { return Ok(None) };
    let Beginning { mut data, whole } =
        body.preview(if partial { most } else { most + 1 }).await.map_err(|unseen| unshown(gate, &unseen))?;
    if data.len() > most && !partial {
        return Err(Refusal::new(Reply::new(StatusCode::PAYLOAD_TOO_LARGE, "Payload Too Large"), "request_payload_too_large"));
    }
    let more = data.len() > most || !whole;
    let received = data.len();
    data.truncate(most);
    Ok(Some(Shown { data: data.freeze(), received, as_bytes, partial: more }))
}

/// What becomes of a request whose body could not be shown.
fn unshown(gate: &Gate, unseen: &Unseen) -> Box<Refusal> {
    match unseen {
        Unseen::Broken(BodyError::Malformed(malformed)) => {
            let mut refusal = Refusal::new(Reply::new(malformed.status, malformed.body), malformed.details);
            refusal.flag = malformed.protocol_error.then_some(Flag::DownstreamProtocolError);
            refusal
        }
        Unseen::Broken(BodyError::Truncated | BodyError::Cut(_)) => {
            let mut refusal = Refusal::new(Reply::new(StatusCode::BAD_REQUEST, ""), "");
            refusal.gone = true;
            refusal
        }
        Unseen::NoRoom => {
            gate.proxy.metrics.overflow("kept_bodies");
            let mut refusal = Refusal::new(Reply::new(StatusCode::SERVICE_UNAVAILABLE, ""), "overload");
            refusal.flag = Some(Flag::UpstreamOverflow);
            refusal
        }
    }
}

/// Asks one authorizer about a connection that carries no requests, as Envoy's network filter does; an error is a detail of
/// the denial. Only authorizers over gRPC can be asked that.
pub async fn ask_connection(gate: &Gate, snapshot: &Arc<Snapshot>, provider: &Arc<str>) -> Result<(), &'static str> {
    let (authorizer, answer) = match whom(gate, snapshot, provider) {
        Whom::Nobody => return Ok(()),
        Whom::Unknown | Whom::Away => return Err(ERROR),
        Whom::Found(authorizer, _) if authorizer.check != Check::Grpc => {
            gate.proxy.metrics.authorizer_call("unsupported");
            return Err(ERROR);
        }
        Whom::Found(authorizer, cluster) => {
            let question = proto::connection_question(gate);
            let answer = async {
                let response = check(gate, &cluster, authorizer, Scheme::Http, None, &question).await?;
                (!response.has_failed()).then(|| response.is_ok())
            };
            (authorizer, in_time(gate, authorizer, answer, |ok| if *ok { "allowed" } else { "denied" }).await)
        }
    };
    match answer {
        Some(true) => Ok(()),
        Some(false) => Err(DENIED),
        None if authorizer.fail_open => Ok(()),
        None => Err(ERROR),
    }
}

/// Who is to be asked.
enum Whom<'s> {
    /// What is protected is this authorizer itself, or one it could not be asked without.
    Nobody,
    /// The mesh configuration has no provider of this name.
    Unknown,
    /// Its service, or the port of it, does not exist: that is a mistake, and not what `failOpen` is about.
    Away,
    Found(&'s Authorizer, Arc<Cluster>),
}

fn whom<'s>(gate: &Gate, snapshot: &'s Snapshot, provider: &Arc<str>) -> Whom<'s> {
    // As the pod sees the service that asks it.
    let view = snapshot.workload(&gate.pod.uid).map(|pod| &*pod.view);
    let found =
        snapshot.authorizers.get(provider).map(|authorizer| (authorizer, snapshot.cluster_at(view, &authorizer.service, authorizer.port)));
    let whom = match found {
        Some((_, Some(_))) if snapshot.is_asked_first(provider, gate.facts.destination) => {
            gate.proxy.metrics.authorizer_call("exempt");
            return Whom::Nobody;
        }
        Some((authorizer, Some(cluster))) => return Whom::Found(authorizer, cluster),
        Some((_, None)) => Whom::Away,
        None => Whom::Unknown,
    };
    gate.proxy.metrics.authorizer_call("unknown");
    whom
}

/// Waits for an answer as long as the provider may take, and counts it.
async fn in_time<T>(
    gate: &Gate,
    authorizer: &Authorizer,
    answer: impl Future<Output = Option<T>>,
    word: impl Fn(&T) -> &'static str,
) -> Option<T> {
    let answer = timeout(authorizer.timeout, answer).await;
    let result = match &answer {
        Ok(Some(answer)) => word(answer),
        Ok(None) => "failed",
        Err(_) => "timeout",
    };
    gate.proxy.metrics.authorizer_call(result);
    answer.ok().flatten()
}

fn refused(status: StatusCode, details: String) -> Answer {
    Answer::Denied(refusal(Reply::new(status, ""), details))
}

/// What becomes of requests for which nobody of that name is configured: Istio has a rule that denies, and its name is what logs tell.
fn nobody_to_ask() -> Answer {
    const DETAILS: &str = "rbac_access_denied_matched_policy[default-deny-all-due-to-bad-CUSTOM-action]";
    Answer::Denied(Refusal::new(Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied"), DETAILS))
}

fn refusal(reply: Reply, details: String) -> Box<Refusal> {
    let mut refusal = Refusal::new(reply, details);
    refusal.flag = Some(Flag::UnauthorizedExternally);
    refusal
}

fn call<'a>(gate: &'a Gate, cluster: &'a Arc<Cluster>, http2: bool) -> Call<'a> {
    Call { proxy: &gate.proxy, pod: &gate.pod, client: gate.client, cluster, http2, at_once: AT_ONCE }
}

/// What is told of a request in a header of the question. None of nothing.
fn tell(gate: &Gate, snapshot: &Snapshot, template: &Template, (head, protocol): (&RequestHead, &'static str)) -> Option<HeaderValue> {
    let kept = Kept::of(&head.headers, &template.asks().request);
    let (method, path, authority) = (head.method.as_str(), head.target.as_str(), head.authority.to_str().unwrap_or_default());
    let (teller, own) = (snapshot.workload(&gate.pod.uid), gate.proved());
    let entry = Entry {
        request: Some(Asked { method, path, sent_path: path, authority, scheme: head.scheme.as_str(), headers: &kept }),
        protocol: Some(protocol),
        upstream_cluster: Some(ClusterName::Inbound(gate.facts.destination.port())),
        downstream_local: Some(gate.facts.destination),
        downstream_remote: Some(gate.client),
        mutual_tls: gate.facts.peer.is_some(),
        peer: gate.facts.peer.as_ref(),
        local: own.as_ref(),
        teller: teller.map(|w| &**w),
        ..Entry::begun(SystemTime::now())
    };
    HeaderValue::from_bytes(&template.bytes(&entry)).ok().filter(|value| !value.is_empty())
}

async fn ask_http(
    gate: &Gate,
    snapshot: &Snapshot,
    cluster: &Arc<Cluster>,
    check: &HttpCheck,
    (head, protocol): (&mut RequestHead, &'static str),
    shown: Option<Shown>,
) -> Option<AuthorizerAnswer> {
    let mut headers = HeaderMap::new();
    for (name, value) in &head.headers {
        let sent = name == header::AUTHORIZATION || any(&check.request_headers, name);
        // What it is shown of a body is not the client's to say.
        if sent && *name != PARTIAL_BODY {
            headers.append(name.clone(), value.clone());
        }
    }
    for (name, text) in &check.additional_headers {
        let value = match text {
            HeaderText::Plain(value) => Some(value.clone()),
            HeaderText::Template(template) => tell(gate, snapshot, template, (head, protocol)),
        };
        if let Some(value) = value {
            headers.insert(name.clone(), value);
        }
    }
    trace::copy(&head.headers, &mut headers);
    let length = shown.as_ref().map_or(0, |s| s.data.len());
    headers.insert(header::CONTENT_LENGTH, length.into());
    let (framing, mut sent) = match shown {
        Some(shown) => {
            headers.insert(PARTIAL_BODY, HeaderValue::from_static(shown.partial_text()));
            (Framing::Length(length as u64), Whole::of(shown.data))
        }
        None => (Framing::Empty, Whole::default()),
    };
    let target = format!("{}{}", check.path_prefix, head.target.as_str());
    let question = RequestHead {
        method: head.method.clone(),
        scheme: head.scheme,
        authority: head.authority.clone(),
        target: target.parse().ok()?,
        headers,
    };
    let mut body = Collected::up_to(MAX_ANSWER);
    let http2 = cluster.protocol.is_http2();
    let answered = Box::pin(call(gate, cluster, http2).run(&question, &mut sent, framing, &mut body)).await?;
    // Envoy takes a server's own failure for one to answer.
    if body.over || answered.status.is_server_error() {
        return None;
    }
    Some(AuthorizerAnswer::Decided(if answered.status == StatusCode::OK {
        allowed_over_http(check, &answered.headers, head)
    } else {
        denied_over_http(check, answered, body.data.into(), head.is_grpc())
    }))
}

/// Changes a request as the answer that lets it pass says.
fn allowed_over_http(check: &HttpCheck, headers: &HeaderMap, head: &mut RequestHead) -> Answer {
    let names = headers.keys().filter(|n| any(&check.to_upstream, n) && is_end_to_end(n));
    for name in names {
        // Of several the last, as with Envoy.
        if let Some(value) = headers.get_all(name).iter().next_back() {
            head.headers.insert(name.clone(), value.clone());
        }
    }
    // The last thing that is done, as with Envoy.
    let gone = headers.get_all(TO_REMOVE).iter().filter_map(|names| names.to_str().ok()).flat_map(|names| names.split(','));
    changes::remove(&mut head.headers, gone);
    let mut to_client = ToClient::default();
    for (name, value) in headers.iter().filter(|(n, _)| any(&check.to_downstream_on_allow, n) && is_end_to_end(n)) {
        to_client.push(name.clone(), value.clone(), How::Append);
    }
    Answer::Allowed { to_client }
}

/// What the client of a request is told that the answer does not let pass; in gRPC if it speaks that.
fn denied_over_http(check: &HttpCheck, Answered { status, mut headers }: Answered, body: Bytes, grpc: bool) -> Answer {
    let always = [header::WWW_AUTHENTICATE, header::LOCATION];
    let gone =
        headers.keys().filter(|n| !check.to_downstream_on_deny.is_empty() && !always.contains(n) && !any(&check.to_downstream_on_deny, n));
    let gone = gone.cloned().chain([header::CONTENT_LENGTH, header::TRANSFER_ENCODING]).collect::<Vec<_>>();
    gone.iter().for_each(|n| drop(take_off(&mut headers, n)));
    if body.is_empty() {
        take_off(&mut headers, &header::CONTENT_TYPE);
    }
    let reply = Reply { headers, ..Reply::new(status, String::from_utf8_lossy(&body).into_owned()) };
    let reply = Reply { verbatim: (!grpc).then_some(body), ..reply };
    Answer::Denied(refusal(reply, DENIED.to_owned()))
}

impl Shown {
    fn partial_text(&self) -> &'static str {
        if self.partial { "true" } else { "false" }
    }
}

/// How a message is framed is not an authorizer's business.
fn is_end_to_end(name: &HeaderName) -> bool {
    ![header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION, header::HOST, header::UPGRADE, header::TE].contains(name)
}

/// Whether a header is one of those listed; names are in lower case.
fn any(patterns: &[StringMatch], name: &HeaderName) -> bool {
    patterns.iter().any(|p| p.matches(name.as_str()))
}

async fn ask_grpc(
    gate: &Gate,
    cluster: &Arc<Cluster>,
    authorizer: &Authorizer,
    (head, protocol): (&mut RequestHead, &'static str),
    shown: Option<Shown>,
) -> Option<AuthorizerAnswer> {
    let question = proto::question(gate, (head, protocol), shown);
    let response = check(gate, cluster, authorizer, head.scheme, Some(&head.headers), &question).await?;
    Some(AuthorizerAnswer::Decided(match proto::apply(&response, head, authorizer.status_on_error) {
        proto::Outcome::Allowed { to_client } => Answer::Allowed { to_client },
        proto::Outcome::Denied(reply) => Answer::Denied(refusal(*reply, DENIED.to_owned())),
        proto::Outcome::Failed(reply) => return Some(AuthorizerAnswer::Failed(reply)),
        proto::Outcome::Invalid => refused(StatusCode::INTERNAL_SERVER_ERROR, INVALID.to_owned()),
    }))
}

/// One call of `envoy.service.auth.v3.Authorization/Check`.
async fn check(
    gate: &Gate,
    cluster: &Arc<Cluster>,
    authorizer: &Authorizer,
    scheme: Scheme,
    asked: Option<&HeaderMap>,
    question: &proto::CheckRequest,
) -> Option<proto::CheckResponse> {
    let mut headers = HeaderMap::new();
    if let Some(asked) = asked {
        trace::copy(asked, &mut headers);
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers.insert("grpc-timeout", format!("{}m", authorizer.timeout.as_millis().min(99_999_999)).try_into().ok()?);
    let request = RequestHead {
        method: http::Method::POST,
        scheme,
        authority: HeaderValue::from_str(&authorizer.service).ok()?,
        target: crate::route::target::RequestTarget::from_static("/envoy.service.auth.v3.Authorization/Check"),
        headers,
    };
    let message = crate::grpc::frame(question);
    let framing = Framing::Length(message.len() as u64);
    let mut body = Collected::up_to(MAX_ANSWER);
    let answered = Box::pin(call(gate, cluster, true).run(&request, &mut Whole::of(message), framing, &mut body)).await?;
    let status = body.trailers.get("grpc-status").or_else(|| answered.headers.get("grpc-status"));
    if answered.status != StatusCode::OK || body.over || status.is_none_or(|s| s != "0") {
        return None;
    }
    crate::grpc::unframe(&body.data)
}
