//! The last thing before an application: whether a request may pass, and what it looks like then.
//!
//! Order is Istio's: external authorizers, then the token, then DENY and ALLOW. Every request is judged with one snapshot,
//! and again, while it is under way, with every later one.

mod told;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use self::told::ClientCertAction;
use super::{
    authorizer::{self, Answer, ToClient},
    body::Preview,
    headers::{self, CLIENT_CERT},
    record::{Flag, Record, is_traced},
    reply::Reply,
    tokens,
    traced::Onward,
    wire::{Refused, is_websocket},
};
use crate::{
    config::Snapshot,
    id::SpiffeId,
    jwt::Fault,
    policy::{Authenticated, Denial, Facts, Governing, Observed, Request, Verdict, Verified, strip},
    proxy::{
        Proxy, ServedPod,
        pods::Stage,
        reporting::{EdgeSlot, Ends},
    },
    resource::request_authentication::JwtRule,
    route::request::{RequestHead, renormalised, take_off},
    telemetry::traffic::Reporter,
};

/// Stands before the application of one pod, for one connection.
#[derive(Clone)]
pub struct Gate {
    pub proxy: Arc<Proxy>,
    /// The pod whose application is protected; before a service ([`Gate::of_service`]), the client's pod.
    pub pod: Arc<ServedPod>,
    pub facts: Facts,
    pub client: SocketAddr,
    /// Who the client says it is.
    introduction: Option<HeaderValue>,
    /// When the connection came, or the one it came in.
    pub since: Stage,
    /// This end of the connection to the application.
    local: Option<SocketAddr>,
    /// The generation that was last found to ask nothing about requests on this connection.
    free: Arc<AtomicU64>,
    edge: Arc<EdgeSlot>,
    /// Who the two ends of the connection are, as `x-forwarded-client-cert` has it.
    ends: Arc<OnceLock<Option<HeaderValue>>>,
    /// It stands before a service, where the client is: nobody is at the other end yet.
    of_service: bool,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("facts", &self.facts).finish_non_exhaustive()
    }
}

/// A request that may pass.
#[derive(Debug, Default)]
pub struct Pass {
    /// What the application gets, if that is something else.
    pub head: Option<RequestHead>,
    pub claims: Option<Verified>,
    /// What the application is told of the client, beside the headers.
    pub client_cert: Option<HeaderValue>,
    /// What external authorizers have for the client.
    pub to_client: ToClient,
    /// Headers that say what was verified.
    pub written: Vec<HeaderName>,
    /// Policies ask about what is sent on its connection.
    pub judged: bool,
    /// It was allowed to become something else, of which nobody sees what it carries.
    unseen: AtomicBool,
}

impl Pass {
    /// The upgrade that may be asked for: where requests are judged, none to what could carry others.
    pub fn upgrade<'u>(&self, upgrade: Option<&'u HeaderValue>) -> Option<&'u HeaderValue> {
        let upgrade = upgrade.filter(|upgrade| !self.judged || is_websocket(upgrade));
        if upgrade.is_some_and(|upgrade| !is_websocket(upgrade)) {
            self.unseen.store(true, Ordering::Relaxed);
        }
        upgrade
    }
}

/// A request that is to be judged.
pub struct Asked<'h> {
    pub head: &'h RequestHead,
    /// What has become of it, if that is something else.
    pub changed: Option<RequestHead>,
    /// A header the application gets beside its own.
    pub client_cert: Option<HeaderValue>,
    pub protocol: &'static str,
    /// The rules about tokens of who gets it next.
    pub again: &'h [Arc<JwtRule>],
}

/// A request that may not.
#[derive(Debug)]
pub struct Refusal {
    pub reply: Reply,
    pub details: String,
    pub flag: Option<Flag>,
    /// There is nobody to tell: the client left before its request was whole.
    pub gone: bool,
    /// What had become of the request by then, if that is something else.
    pub head: Option<RequestHead>,
}

impl Gate {
    pub fn new(proxy: Arc<Proxy>, pod: Arc<ServedPod>, facts: Facts, client: SocketAddr) -> Self {
        Self {
            proxy,
            since: pod.stage(),
            pod,
            facts,
            client,
            introduction: None,
            local: None,
            free: Arc::new(AtomicU64::new(u64::MAX)),
            edge: Arc::default(),
            ends: Arc::default(),
            of_service: false,
        }
    }

    /// Of a client of this node, before a service it has dialled.
    pub fn of_service(proxy: &Arc<Proxy>, pod: &Arc<ServedPod>, facts: Facts, client: SocketAddr) -> Self {
        Self { of_service: true, ..Self::new(proxy.clone(), pod.clone(), facts, client) }
    }

    /// With the connection that was made to the application.
    pub fn before(self, application: &tokio::net::TcpStream) -> Self {
        Self { local: application.local_addr().ok(), ..self }
    }

    /// Of a client that says who it is.
    pub fn introduced(self, introduction: Option<HeaderValue>) -> Self {
        Self { introduction, ..self }
    }

    /// Of a connection that came then, or in one that did.
    pub fn come(self, since: Stage) -> Self {
        Self { since, ..self }
    }

    /// Begins the record of a request into the pod, and says what the request is to say of its trace, where that is something else
    /// than it does.
    pub fn record(&self, head: &RequestHead, protocol: &'static str) -> (Record, Option<Onward>) {
        self.recorded(&self.proxy.config.load(), head, protocol)
    }

    /// The same of one that comes as its client has sent it: it gets a name, if it has none, and goes on in its trace.
    pub fn take_down(&self, head: &mut RequestHead, protocol: &'static str) -> Record {
        let snapshot = self.proxy.config.load();
        if snapshot.headers.request_id {
            headers::identify(&mut head.headers);
        }
        let (record, onward) = self.recorded(&snapshot, head, protocol);
        if let Some(onward) = onward {
            onward.write(&mut head.headers);
        }
        record
    }

    fn recorded(&self, snapshot: &Snapshot, head: &RequestHead, protocol: &'static str) -> (Record, Option<Onward>) {
        let mut record = self.begin(snapshot, protocol);
        let mut onward = None;
        if let Some(workload) = snapshot.workload(&self.pod.uid) {
            record.describe(head, workload);
            let into = workload.port_of(self.facts.destination.port(), self.facts.dialled.as_ref(), Some(head.port()));
            onward = record.trace(head, workload, into, &self.proxy.spans);
        }
        (record, onward)
    }

    /// The same of one that is refused for what it says.
    pub fn unread(&self, protocol: &'static str, refused: &Refused) -> Record {
        let snapshot = self.proxy.config.load();
        let mut record = self.begin(&snapshot, protocol);
        record.refused_as(refused, snapshot.workload(&self.pod.uid));
        record.source = None;
        record
    }

    /// Takes down a request of HTTP/2 that could not be read.
    pub fn broke_protocol(&self) {
        let snapshot = self.proxy.config.load();
        let mut record = self.begin(&snapshot, "HTTP/2");
        record.broke_protocol(snapshot.workload(&self.pod.uid));
        record.source = None;
    }

    /// Takes down a request of which only the beginning came.
    pub fn cut_short(&self) {
        let snapshot = self.proxy.config.load();
        let mut record = self.begin(&snapshot, "HTTP/1.1");
        record.cut_short(snapshot.workload(&self.pod.uid));
        record.source = None;
    }

    fn begin(&self, snapshot: &Snapshot, protocol: &'static str) -> Record {
        let metrics = &self.proxy.metrics;
        let mut record = Record::inbound(metrics, self.client, self.facts.destination, protocol);
        record.mutual_tls = self.facts.peer.is_some();
        record.upstream_local = self.local;
        record.place(self.edge.get(snapshot.generation, || {
            let workload = snapshot.workload(&self.pod.uid)?;
            let client = snapshot.workload_by_ip(self.facts.source);
            let ends = Ends {
                reporter: Reporter::Destination,
                source: (client.map(|c| &**c), self.facts.peer.as_ref()),
                destination: (Some(workload), self.facts.peer.as_ref().map(|_| &workload.identity)),
                service: workload.service_at(self.facts.destination.port(), self.facts.dialled.as_ref()),
                introduction: self.introduction.as_ref(),
            };
            ends.edge(metrics, &workload.reporting.server.tags)
        }));
        if let Some(workload) = snapshot.workload(&self.pod.uid) {
            record.between(workload, || snapshot.workload_by_ip(self.facts.source));
            if workload.reporting.server.asks.identities || is_traced() {
                record.peer.clone_from(&self.facts.peer);
                record.local = self.facts.peer.as_ref().map(|_| workload.identity.clone());
            }
        }
        record
    }

    /// Whether an authorizer may be shown bodies.
    pub fn shows_bodies(&self) -> bool {
        let snapshot = self.proxy.config.load();
        let workload = snapshot.workload(&self.pod.uid);
        workload.is_some_and(|w| shows_bodies(&snapshot, w.policy.at(self.facts.destination.port())))
    }

    /// Judges a request.
    pub async fn admit(&self, head: &RequestHead, protocol: &'static str, body: &mut impl Preview) -> Result<Pass, Box<Refusal>> {
        let snapshot = {
            let snapshot = self.proxy.config.load();
            if self.free.load(Ordering::Relaxed) == snapshot.generation {
                return Ok(self.unasked(&snapshot, head));
            }
            snapshot.clone()
        };
        let Some(workload) = snapshot.workload(&self.pod.uid) else {
            return Err(Refusal::new(Reply::new(StatusCode::SERVICE_UNAVAILABLE, ""), "unknown_workload"));
        };
        let policy = &workload.policy;
        match policy.connection(&self.facts) {
            Ok(Verdict::Allowed(_)) => {
                self.free.store(snapshot.generation, Ordering::Relaxed);
                return Ok(self.unasked(&snapshot, head));
            }
            Ok(_) => {}
            // No request can change that.
            Err(denial) => return Err(self.denied(&denial)),
        }
        let governing = policy.at(self.facts.destination.port());
        // A route may have made another path of it.
        let mut changed = renormalised(head, snapshot.normalization).map_err(|_| bad_path())?;
        // Nobody is asked about what a client says of itself there. Authorizers see it among the headers.
        let (mut client_cert, asks) = (None, !governing.authorization.custom.is_empty());
        match self.told(&snapshot, changed.as_ref().unwrap_or(head)) {
            ClientCertAction::AsItIs => {}
            ClientCertAction::Also(value) if !asks => client_cert = Some(value),
            ClientCertAction::Also(value) | ClientCertAction::Only(Some(value)) => {
                changed.get_or_insert_with(|| head.clone()).headers.insert(CLIENT_CERT.clone(), value);
            }
            ClientCertAction::Only(None) => drop(take_off(&mut changed.get_or_insert_with(|| head.clone()).headers, &CLIENT_CERT)),
        }
        self.judge(&snapshot, governing, Asked { head, changed, client_cert, protocol, again: &[] }, body).await
    }

    /// Judges a request by these policies.
    pub async fn judge(
        &self,
        snapshot: &Arc<Snapshot>,
        governing: &Governing,
        asked: Asked<'_>,
        body: &mut impl Preview,
    ) -> Result<Pass, Box<Refusal>> {
        let Asked { head, mut changed, client_cert, protocol, again } = asked;
        let mut written = Vec::new();
        let mut told = self.authenticate(governing, changed.as_ref().unwrap_or(head)).await;
        let mut to_client = ToClient::default();
        if !governing.authorization.custom.is_empty() && !self.facts.from_node {
            let claims = told.as_ref().ok().and_then(|a| a.claims.as_ref());
            let seen = changed.as_ref().unwrap_or(head);
            if let Some(rewritten) = self.ask_authorizers(snapshot, governing, (seen, protocol), body, claims, &mut to_client).await? {
                let is_same = |name: &&HeaderName| rewritten.headers.get_all(*name).iter().eq(seen.headers.get_all(*name));
                written.extend(rewritten.headers.keys().filter(|name| !is_same(name)).cloned());
                // What an authorizer wrote counts like what a client did.
                let rewritten = renormalised(&rewritten, snapshot.normalization).map_err(|_| bad_path())?.unwrap_or(rewritten);
                told = self.authenticate(governing, &rewritten).await;
                changed = Some(rewritten);
            }
        }
        let claims = told.map_err(|fault| tokens::refusal(&self.proxy, fault, head))?.claims;
        if !governing.authentication.is_empty() {
            let mut stripped = changed.take().unwrap_or_else(|| head.clone());
            strip(&governing.authentication, claims.as_ref(), &mut stripped, again);
            changed = Some(stripped);
        }
        let judged = changed.as_ref().unwrap_or(head);
        let mut request = Request::new(judged, claims.as_ref(), self.remote(snapshot, &judged.headers));
        request.also = client_cert.as_ref().map(|value| (&CLIENT_CERT, value));
        observe(&self.proxy, &self.facts, &governing.observed(&self.facts, Some(&request)), Some(judged));
        if let Err(denial) = governing.request(&self.facts, &request) {
            let mut refusal = self.denied(&denial);
            refusal.head = changed;
            return Err(refusal);
        }
        written.extend(governing.authentication.iter().flat_map(|rule| rule.changed_headers()).cloned());
        Ok(Pass { head: changed, claims, client_cert, to_client, written, judged: true, unseen: AtomicBool::new(false) })
    }

    /// Who this end of the connection has proved to be; it has only where the other one has.
    pub fn proved(&self) -> Option<SpiffeId> {
        self.facts.peer.as_ref().filter(|_| !self.of_service)?;
        Some(self.proxy.config.load().workload(&self.pod.uid)?.identity.clone())
    }

    fn denied(&self, denial: &Denial) -> Box<Refusal> {
        self.proxy.metrics.policy_decision(denial.policy(), "denied");
        Refusal::new(Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied"), denial.details())
    }

    /// Completes when a later configuration denies a request that was let in.
    pub async fn denied_later(&self, head: &RequestHead, pass: &Pass) {
        let mut config = self.proxy.config.clone();
        let mut judged = u64::MAX;
        loop {
            {
                let snapshot = config.load();
                if snapshot.generation != judged
                    && let Some(workload) = snapshot.workload(&self.pod.uid)
                {
                    judged = snapshot.generation;
                    if self.free.load(Ordering::Relaxed) != judged {
                        let mut request = Request::new(head, pass.claims.as_ref(), self.remote(&snapshot, &head.headers));
                        request.also = pass.client_cert.as_ref().map(|value| (&CLIENT_CERT, value));
                        let policy = &workload.policy;
                        // What would not be switched to any more ends.
                        let asks = || !matches!(policy.connection(&self.facts), Ok(Verdict::Allowed(_)));
                        if policy.request(&self.facts, &request).is_err() || pass.unseen.load(Ordering::Relaxed) && asks() {
                            return;
                        }
                    }
                }
            }
            if !config.changed().await {
                return std::future::pending().await;
            }
        }
    }

    fn remote(&self, snapshot: &Snapshot, headers: &HeaderMap) -> Option<IpAddr> {
        remote(snapshot, &self.facts, headers)
    }

    async fn authenticate(&self, governing: &Governing, head: &RequestHead) -> Result<Authenticated, Fault> {
        if self.facts.from_node {
            return Ok(Authenticated::default());
        }
        tokens::authenticate(&self.proxy, &governing.authentication, head).await
    }

    /// Asks every authorizer that has to be; returns the request as they changed it, if they did.
    async fn ask_authorizers(
        &self,
        snapshot: &Arc<Snapshot>,
        governing: &Governing,
        (head, protocol): (&RequestHead, &'static str),
        body: &mut impl Preview,
        claims: Option<&Verified>,
        to_client: &mut ToClient,
    ) -> Result<Option<RequestHead>, Box<Refusal>> {
        let mut changed: Option<RequestHead> = None;
        for provider in governing.authorizers() {
            // What one authorizer made of the request decides whether the next is asked.
            let policy = {
                let head = changed.as_ref().unwrap_or(head);
                let request = Request::new(head, claims, self.remote(snapshot, &head.headers));
                governing.asks_about(provider, &self.facts, &request)
            };
            let Some(policy) = policy else { continue };
            let mut seen = changed.take().unwrap_or_else(|| head.clone());
            match Box::pin(authorizer::ask(self, snapshot, provider, (&mut seen, protocol), body)).await {
                Answer::Allowed { to_client: more } => {
                    changed = Some(seen);
                    to_client.extend(more);
                }
                Answer::Denied(refusal) => {
                    self.proxy.metrics.policy_decision(policy, "denied");
                    return Err(refusal);
                }
            }
        }
        Ok(changed)
    }
}

/// Whether an authorizer that policies name may be shown bodies.
pub fn shows_bodies(snapshot: &Snapshot, governing: &Governing) -> bool {
    let shown = |provider: &Arc<str>| snapshot.authorizers.get(provider).is_some_and(|a| a.body.is_some());
    governing.authorizers().any(shown)
}

/// The end user's address: what the last proxy that is trusted says, else the client's own. `None`: the proxy says
/// something that is no address.
pub fn remote(snapshot: &Snapshot, facts: &Facts, headers: &HeaderMap) -> Option<IpAddr> {
    if !facts.via_trusted_proxy {
        return Some(facts.source);
    }
    let told = headers.get_all("x-forwarded-for").iter().flat_map(|v| v.as_bytes().split(|b| *b == b','));
    let told = told.map(|a| std::str::from_utf8(a).ok().and_then(address)).collect::<Vec<_>>();
    for address in told.into_iter().rev() {
        match address {
            Some(ip) if snapshot.mesh.is_trusted_address(ip) => {}
            other => return other,
        }
    }
    Some(facts.source)
}

/// An address as proxies write it: with a port or without, IPv6 in brackets or not.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let plain = || text.trim_matches(['[', ']']).parse::<IpAddr>().ok();
    let ip = text.parse::<SocketAddr>().map(|a| a.ip()).ok().or_else(plain)?;
    Some(ip.to_canonical())
}

fn bad_path() -> Box<Refusal> {
    Refusal::new(Reply::new(StatusCode::BAD_REQUEST, ""), "path_normalization_failed")
}

impl Refusal {
    pub fn new(reply: Reply, details: impl Into<String>) -> Box<Self> {
        Box::new(Self { reply, details: details.into(), flag: None, gone: false, head: None })
    }

    /// Takes it down in the record of the request at a gate.
    pub fn note(&self, record: &mut Record, gate: &Gate, head: &RequestHead) {
        if self.gone {
            return record.abandoned();
        }
        record.denied(head);
        if let Some(changed) = &self.head {
            record.became(changed);
        }
        record.peer.clone_from(&gate.facts.peer);
        record.details = self.details.clone().into();
        self.flag.into_iter().for_each(|flag| record.raise(flag));
    }
}

/// Logs and counts what policies that are not enforced say of a connection or request.
pub fn observe(proxy: &Proxy, facts: &Facts, observed: &Observed, head: Option<&RequestHead>) {
    let (method, path) = (head.map(|h| h.method.as_str()), head.map(RequestHead::path));
    if let Some(policy) = &observed.audited {
        proxy.metrics.policy_decision(policy, "audited");
        tracing::info!(target: "audit", %policy, source = %facts.source, identity = ?facts.peer, destination = %facts.destination, method, path, "matches");
    }
    if let Some(shadow) = &observed.shadow {
        let result = if shadow.allowed { "dry_run_allowed" } else { "dry_run_denied" };
        proxy.metrics.policy_decision(&shadow.policy, result);
        tracing::info!(target: "audit", policy = %shadow.policy, result, source = %facts.source, identity = ?facts.peer, destination = %facts.destination, method, path, "dry run");
    }
}
