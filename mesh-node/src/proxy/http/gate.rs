//! The last thing before an application: whether a request may pass, and what it looks like then.
//!
//! Order is Istio's: external authorizers, then the token, then DENY and ALLOW. Every request is judged with one snapshot,
//! and again, while it is under way, with every later one.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};

use super::{
    authorizer::{self, Answer},
    record::{Flag, Record},
    reply::Reply,
};
use crate::{
    config::Snapshot,
    jwt::Fault,
    policy::{Authenticated, Denial, Facts, Governing, Observed, Request, Verdict, Verified, locate, strip},
    proxy::{Proxy, ServedPod},
    resource::request_authentication::{JwtRule, KeySource},
    route::request::{RequestHead, further_normalised},
};

/// Longest part of a path told in a challenge, bytes: Envoy's.
const REALM_PATH: usize = 256;

/// Stands before the application of one pod, for one connection.
#[derive(Clone)]
pub struct Gate {
    pub proxy: Arc<Proxy>,
    /// The pod that is protected.
    pub pod: Arc<ServedPod>,
    pub facts: Facts,
    pub client: SocketAddr,
    /// The generation that was last found to ask nothing about requests on this connection.
    free: Arc<AtomicU64>,
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
    /// Headers of an external authorizer for the client.
    pub to_client: HeaderMap,
}

/// A request that may not.
#[derive(Debug)]
pub struct Refusal {
    pub reply: Reply,
    pub details: String,
    pub flag: Option<Flag>,
}

impl Gate {
    pub fn new(proxy: Arc<Proxy>, pod: Arc<ServedPod>, facts: Facts, client: SocketAddr) -> Self {
        Self { proxy, pod, facts, client, free: Arc::new(AtomicU64::new(u64::MAX)) }
    }

    /// Judges a request.
    pub async fn admit(&self, head: &RequestHead) -> Result<Pass, Box<Refusal>> {
        let snapshot = {
            let snapshot = self.proxy.config.load();
            if self.free.load(Ordering::Relaxed) == snapshot.generation {
                return Ok(Pass::default());
            }
            snapshot.clone()
        };
        let Some(workload) = snapshot.workload(&self.pod.uid) else {
            return Err(Refusal::new(Reply::new(StatusCode::SERVICE_UNAVAILABLE, ""), "unknown_workload"));
        };
        let policy = &workload.policy;
        let further = further_normalised(head, snapshot.normalization);
        match policy.connection(&self.facts) {
            Ok(Verdict::Allowed(_)) if further.is_none() => {
                self.free.store(snapshot.generation, Ordering::Relaxed);
                return Ok(Pass::default());
            }
            Ok(_) => {}
            // No request can change that.
            Err(denial) => return Err(self.denied(&denial)),
        }
        let governing = policy.at(self.facts.destination.port());
        let mut pass = Pass { head: further, ..Pass::default() };
        let told = self.authenticate(governing, pass.head.as_ref().unwrap_or(head)).await;
        let (claims, fault) = match told {
            Ok(authenticated) => (authenticated.claims, None),
            Err(fault) => (None, Some(fault)),
        };
        self.ask_authorizers(&snapshot, governing, head, claims.as_ref(), &mut pass).await?;
        if let Some(fault) = fault {
            return Err(self.unauthenticated(fault, head));
        }
        if !governing.authentication.is_empty() {
            let mut changed = pass.head.take().unwrap_or_else(|| head.clone());
            strip(&governing.authentication, claims.as_ref(), &mut changed);
            pass.head = Some(changed);
        }
        let judged = pass.head.as_ref().unwrap_or(head);
        let request = Request::new(judged, claims.as_ref(), self.remote(&snapshot, &judged.headers));
        self.observe(&governing.observed(&self.facts, Some(&request)), Some(judged));
        policy.request(&self.facts, &request).map_err(|denial| self.denied(&denial))?;
        pass.claims = claims;
        Ok(pass)
    }

    fn denied(&self, denial: &Denial) -> Box<Refusal> {
        self.proxy.metrics.policy_decision(denial.policy(), "denied");
        Refusal::new(Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied"), denial.details())
    }

    /// Completes when a later configuration denies a request that was let in.
    pub async fn denied_later(&self, head: &RequestHead, claims: Option<&Verified>) {
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
                        let request = Request::new(head, claims, self.remote(&snapshot, &head.headers));
                        if workload.policy.request(&self.facts, &request).is_err() {
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

    /// Takes down what policies that are not enforced say.
    pub fn observe(&self, observed: &Observed, head: Option<&RequestHead>) {
        observe(&self.proxy, &self.facts, observed, head);
    }

    /// The end user's address: what the last proxy that is trusted says, else the client's own.
    fn remote(&self, snapshot: &Snapshot, headers: &HeaderMap) -> IpAddr {
        if !self.facts.proxy {
            return self.facts.source;
        }
        let told = headers.get_all("x-forwarded-for").iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
        let told = told.map(|a| a.trim().parse::<IpAddr>().map(|ip| ip.to_canonical())).collect::<Vec<_>>();
        for address in told.into_iter().rev() {
            match address {
                Ok(ip) if snapshot.mesh.is_trusted_address(ip) => {}
                Ok(ip) => return ip,
                Err(_) => break,
            }
        }
        self.facts.source
    }

    async fn authenticate(&self, governing: &Governing, head: &RequestHead) -> Result<Authenticated, Fault> {
        if governing.authentication.is_empty() || self.facts.node || is_preflight(head) {
            return Ok(Authenticated::default());
        }
        let mut rules = Vec::with_capacity(governing.authentication.len());
        for rule in &governing.authentication {
            // Keys are had only for tokens there are.
            let keys = if locate(rule, head).is_empty() { None } else { self.keys(rule).await };
            rules.push((rule, keys));
        }
        let now = SystemTime::now();
        match Authenticated::judge(&rules, head, now) {
            // The issuer may have begun to use another key.
            Err(refused) if refused.fault == Fault::NoKey => {
                let mut renewed = false;
                for (rule, keys) in &mut rules {
                    if let (KeySource::Remote(remote), Some(_)) = (&rule.keys, &keys)
                        && let Some(newer) = self.proxy.jwks.renewed(remote).await
                    {
                        (*keys, renewed) = (Some(newer), true);
                    }
                }
                let judged = if renewed { Authenticated::judge(&rules, head, now) } else { Err(refused) };
                judged.map_err(|r| r.fault)
            }
            judged => judged.map_err(|r| r.fault),
        }
    }

    async fn keys(&self, rule: &JwtRule) -> Option<Arc<crate::jwt::Keys>> {
        match &rule.keys {
            KeySource::Inline(keys) => Some(keys.clone()),
            KeySource::Remote(remote) => self.proxy.jwks.keys(remote).await,
        }
    }

    /// Envoy's answer to a token it does not take (RFC 6750 section 3).
    fn unauthenticated(&self, fault: Fault, head: &RequestHead) -> Box<Refusal> {
        let text = fault.to_string();
        self.proxy.metrics.policy_decision("RequestAuthentication", "denied");
        let status = if fault == Fault::Audience { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
        let target = head.target.as_str();
        let target = target.get(..REALM_PATH).unwrap_or(target);
        let error = if fault == Fault::Missing { "" } else { ", error=\"invalid_token\"" };
        let details = format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"));
        let mut reply = Reply::new(status, text);
        let challenge = format!("Bearer realm=\"{}://{}{target}\"{error}", head.scheme.as_str(), head.host());
        if let Ok(challenge) = HeaderValue::from_str(&challenge) {
            reply.headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        Refusal::new(reply, details)
    }

    async fn ask_authorizers(
        &self,
        snapshot: &Arc<Snapshot>,
        governing: &Governing,
        head: &RequestHead,
        claims: Option<&Verified>,
        pass: &mut Pass,
    ) -> Result<(), Box<Refusal>> {
        if governing.authorization.custom.is_empty() || self.facts.node {
            return Ok(());
        }
        let asked = {
            let seen = pass.head.as_ref().unwrap_or(head);
            let request = Request::new(seen, claims, self.remote(snapshot, &seen.headers));
            let asked = governing.authorizers(&self.facts, &request).map(|(p, policy)| (p.clone(), policy.clone()));
            asked.collect::<Vec<_>>()
        };
        for (provider, policy) in asked {
            let mut seen = pass.head.take().unwrap_or_else(|| head.clone());
            match authorizer::ask(self, snapshot, &provider, &mut seen).await {
                Answer::Allowed { to_client } => {
                    pass.head = Some(seen);
                    pass.to_client.extend(to_client);
                }
                Answer::Denied(refusal) => {
                    self.proxy.metrics.policy_decision(&policy, "denied");
                    return Err(refusal);
                }
            }
        }
        Ok(())
    }
}

impl Refusal {
    pub fn new(reply: Reply, details: impl Into<String>) -> Box<Self> {
        Box::new(Self { reply, details: details.into(), flag: None })
    }
}

impl Refusal {
    pub fn note(&self, record: &mut Record) {
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

/// A CORS preflight carries no token; Istio lets it pass.
fn is_preflight(head: &RequestHead) -> bool {
    head.method == Method::OPTIONS
        && head.headers.get(header::ORIGIN).is_some_and(|o| !o.is_empty())
        && head.headers.get(header::ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|m| !m.is_empty())
}

/// Takes down a request that was refused, as the destination sees it.
pub fn refused(gate: &Gate, refusal: &Refusal, head: &RequestHead, protocol: &'static str) -> Record {
    let mut record = Record::inbound(&gate.proxy.metrics, gate.client, gate.facts.destination, protocol);
    record.describe(head);
    refusal.note(&mut record);
    record
}
