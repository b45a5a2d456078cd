//! The attempts of one exchange: where each goes, whether another follows and when, and how it all ended.

use std::{borrow::Cow, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::time::{Instant, sleep};

use super::{
    Downstream,
    attempt::{Answered, Attempt, Deadlines, Heard, Plan, TimeUp, Verdict, attempt},
    body::{Preview, RequestBody, Responder},
    clusters::{ClusterState, EndpointState, Slot},
    exchange::{End, Forward, flag_of},
    headers, mirror,
    record::{Flag, Record},
    reply::{http_status_of_grpc, reason},
    upload::Upload,
    upstream::{Failed, REDIAL_TIMEOUT, Wanted},
    wire::Malformed,
};
use crate::{
    balance::{self, Asker, outlier::Event},
    config::Snapshot,
    io::socket::Known,
    proxy::{outbound::asker, reporting::Ends},
    route::{
        Cluster, LoadGuard, Target,
        matching::Matched,
        request::{RequestHead, cookie, query_parameter},
        retry::{Reset, RetryPolicy},
        traffic::{Balancer, HashKey},
    },
    telemetry::traffic::{Edge, Reporter},
};

/// How soon after a request was sent its connection has to end, so that it can have been over before.
const AS_IT_IS_USED: Duration = Duration::from_millis(200);

/// What a request is hashed by.
#[derive(Debug, Default)]
pub(super) struct Hashed {
    hash: Option<u64>,
    /// A cookie given to a client that had none.
    cookie: Option<HeaderValue>,
}

impl Hashed {
    pub(super) fn of(cluster: &Cluster, head: &RequestHead, down: &Downstream<'_>) -> Self {
        let Balancer::Hash { key, .. } = &cluster.policy.balancer else { return Self::default() };
        let plain = |value: Option<&[u8]>| Self { hash: value.map(balance::hash), cookie: None };
        match key {
            HashKey::Header(Matched::Header(name)) => {
                let mut all = head.headers.get_all(name).iter().map(HeaderValue::as_bytes);
                match (all.next(), all.next()) {
                    (Some(first), Some(second)) => {
                        let mut values = [first, second].into_iter().chain(all).collect::<Vec<_>>();
                        // The order says nothing.
                        values.sort_unstable();
                        plain(Some(&values.concat()))
                    }
                    (only, _) => plain(only),
                }
            }
            HashKey::Header(of) => plain(of.pseudo(head)),
            HashKey::Query(name) => plain(head.query().and_then(|q| query_parameter(q, name)).map(str::as_bytes)),
            HashKey::SourceIp => plain(Some(down.client.ip().to_string().as_bytes())),
            HashKey::Cookie { name, ttl, attributes } => match (cookie(&head.headers, name).filter(|v| !v.is_empty()), ttl) {
                (Some(value), _) => plain(Some(value)),
                (None, None) => Self::default(),
                (None, Some(ttl)) => Self::fresh_cookie(name, attributes, *ttl),
            },
        }
    }

    fn fresh_cookie(name: &str, attributes: &str, ttl: Duration) -> Self {
        let value = format!("{:016x}", fastrand::u64(..));
        // Of less than a second it would be one that is to be removed.
        let age = if ttl.as_secs() == 0 { String::new() } else { format!("; Max-Age={}", ttl.as_secs()) };
        let cookie = HeaderValue::from_str(&format!("{name}=\"{value}\"{age}{attributes}; HttpOnly")).ok();
        Self { hash: Some(balance::hash(value.as_bytes())), cookie }
    }
}

/// Why no response came, when the answer is up to the proxy.
#[derive(Debug)]
pub(super) enum Unanswered {
    Reset(Failed, bool),
    NoEndpoint,
    Denied,
    TimeUp(TimeUp),
    Malformed(Malformed),
}

pub(super) enum Outcome {
    Ended(End),
    Failed(Unanswered),
}

/// The attempts of one exchange.
pub(super) struct Attempts<'x, 'd, 'b, B, R> {
    pub(super) down: &'x Downstream<'d>,
    pub(super) responder: &'x mut R,
    pub(super) record: &'x mut Record,
    pub(super) upload: Upload<'b, B>,
    pub(super) deadlines: Deadlines,
    pub(super) policy: &'x RetryPolicy,
    pub(super) timeout: Option<Duration>,
    pub(super) upgrade: Option<&'x HeaderValue>,
    pub(super) close: bool,
    /// The destination as it is now, however long ago the request began.
    pub(super) cluster: Arc<Cluster>,
    pub(super) state: Arc<ClusterState>,
    /// The configuration it is of, where that has changed since.
    pub(super) newer: Option<Arc<Snapshot>>,
    pub(super) forward: &'x Forward<'x>,
    pub(super) hashed: Hashed,
    pub(super) grpc: bool,
    /// Who gets a copy of the request, until that has begun.
    pub(super) mirrors: Vec<Arc<Cluster>>,
    pub(super) tried: Vec<SocketAddr>,
    /// Of the attempt under way, counted from one.
    pub(super) number: u32,
    /// Counts the retry under way.
    pub(super) retry: Option<Slot>,
}

impl<B: RequestBody, R: Responder> Attempts<'_, '_, '_, B, R> {
    pub(super) async fn run(mut self, mut head: RequestHead) -> Outcome {
        loop {
            self.number += 1;
            if self.number > 1 {
                self.down.proxy.metrics.retries.inc();
            }
            self.record.attempts = self.number;
            let picked = if self.catch_up() { self.pick() } else { None };
            let Some((address, endpoint, _load)) = picked else { return Outcome::Failed(Unanswered::NoEndpoint) };
            self.deadlines.attempt = None;
            self.announce(&mut head);
            // Not of what goes nowhere.
            for cluster in std::mem::take(&mut self.mirrors) {
                mirror::start(self.down, (&head, self.record.is_traced()), cluster, self.timeout, &mut self.upload);
            }
            self.record.endpoint = Some(address);
            self.record.upstream_local = None;
            self.record.place(self.edge(address, &endpoint));
            let snapshot = self.newer.as_deref().unwrap_or(self.forward.snapshot);
            self.record.between(self.forward.source, || snapshot.workload_by_ip(address.ip()));
            self.upload.rewind();
            let ended = self.ask(&head, (address, &endpoint)).await;
            let again = match ended {
                Attempt::Answered(answered) => {
                    // What came before it was counted as what it seemed.
                    if matches!(answered, Answered::Truncated(_)) {
                        self.observe(address, &endpoint, Event::Broken);
                    }
                    return Outcome::Ended(self.answered(&answered));
                }
                Attempt::Abandoned => {
                    self.record.abandoned();
                    return Outcome::Ended(End::Broken);
                }
                Attempt::Malformed(malformed) => return Outcome::Failed(Unanswered::Malformed(malformed)),
                Attempt::Denied => return Outcome::Failed(Unanswered::Denied),
                Attempt::Again => Ok(()),
                Attempt::TimeUp(TimeUp::Attempt) => Err(Failed::new(Reset::PerTryTimeout)),
                Attempt::TimeUp(up) => {
                    // That a client waits no longer says nothing of the endpoint.
                    if up != TimeUp::Client {
                        self.observe(address, &endpoint, Event::Broken);
                    }
                    return Outcome::Failed(Unanswered::TimeUp(up));
                }
                Attempt::Failed(failed) => Err(failed),
                // For who asks it is an upstream that went away.
                Attempt::Cut => Err(Failed::new(Reset::ConnectionTermination)),
            };
            if let Err(failed) = again {
                match failed.reset {
                    Reset::Overflow => {}
                    Reset::ConnectFailure | Reset::ConnectTimeout => self.observe(address, &endpoint, Event::LocalOrigin),
                    _ => self.observe(address, &endpoint, Event::Broken),
                }
                if !self.wants_again(self.policy.wants_after_reset(failed.reset)) {
                    return Outcome::Failed(Unanswered::Reset(failed, self.number > 1));
                }
            }
            self.tried.push(address);
            if let Some(up) = self.back_off().await {
                return up;
            }
        }
    }

    /// Tells the endpoint how long it has, and which attempt this is.
    fn announce(&self, head: &mut RequestHead) {
        let added = self.forward.snapshot.headers;
        if let Some(left) = self.time_left() {
            if added.debug {
                headers::expect_within(&mut head.headers, left);
            }
            if self.grpc {
                headers::expect_within_as_grpc(&mut head.headers, left);
            }
        }
        // The first is counted before rules have their say.
        if self.number > 1 && added.attempt_count {
            headers::count_attempt(&mut head.headers, self.number);
        }
    }

    /// Takes over what has become of the destination: a request may wait long, for a delay or between attempts, and endpoints go and come
    /// meanwhile. Its route stays. Whether there still is such a destination.
    fn catch_up(&mut self) -> bool {
        let now = self.down.proxy.config.load();
        if now.generation == self.snapshot().generation {
            return true;
        }
        let Some(cluster) = now.cluster_for(&self.forward.source.view, &self.cluster.id) else { return false };
        self.state = self.down.pod.clusters.of(cluster);
        self.cluster = cluster.clone();
        self.newer = Some(Arc::clone(&now));
        true
    }

    fn snapshot(&self) -> &Snapshot {
        self.newer.as_deref().unwrap_or(self.forward.snapshot)
    }

    /// Whether the endpoint is the client's to pick: it has dialled one of a headless service.
    fn is_clients_choice(&self) -> bool {
        self.cluster.policy.balancer == Balancer::Passthrough && self.cluster.id.service == *self.forward.dialled
    }

    /// Whether what the client has dialled is no endpoint of the headless service any more: another pod may have its address later.
    fn has_left(&self, address: SocketAddr) -> bool {
        let (snapshot, view, dialled) = (self.snapshot(), &self.forward.source.view, self.forward.dialled);
        let leads_there = || matches!(snapshot.resolve_for(view, address), Target::Service { service, .. } if service.name == *dialled);
        snapshot.service(dialled).is_some_and(|service| service.vips.is_empty()) && !leads_there()
    }

    /// The endpoint for an attempt, and what counts it there.
    fn pick(&self) -> Option<(SocketAddr, Arc<EndpointState>, Option<LoadGuard>)> {
        let (cluster, source) = (&self.cluster, self.forward.source);
        if self.is_clients_choice() {
            let address = self.down.original;
            if self.has_left(address) {
                self.down.over.tell();
                return None;
            }
            let load = cluster.endpoints.iter().find(|e| e.address == address).map(|e| e.load.begin());
            return Some((address, self.state.endpoint(address), load));
        }
        let ejected = self.state.outliers.ejected_by(cluster.policy.outlier.as_ref());
        let tried: &[_] = if self.policy.ignore_previous_hosts { &self.tried } else { &[] };
        let asker = Asker {
            hash: self.hashed.hash,
            tried,
            attempted: if self.policy.remote_localities { &self.tried } else { &[] },
            ..asker(source, &self.snapshot().mesh.node, self.down.client.ip(), (self.state.turn(), &ejected))
        };
        let endpoint = balance::pick(cluster, &asker)?;
        Some((endpoint.address, self.state.endpoint(endpoint.address), Some(endpoint.load.begin())))
    }

    /// Where the request is counted when it goes to this endpoint.
    fn edge(&self, address: SocketAddr, endpoint: &EndpointState) -> Option<Arc<Edge>> {
        let (cluster, snapshot, source) = (&self.cluster, self.snapshot(), self.forward.source);
        endpoint.edge.get(snapshot.generation, || {
            let destination = snapshot.workload_by_ip(address.ip());
            let identity = destination.filter(|d| d.enrolled).map(|d| &d.identity);
            let ends = Ends {
                reporter: Reporter::Source,
                source: (Some(source), identity.map(|_| &source.identity)),
                destination: (destination.map(|d| &**d), identity),
                service: Some(&cluster.id.service),
                introduction: None,
            };
            ends.edge(&self.down.proxy.metrics, &source.reporting.client.tags)
        })
    }

    fn time_left(&self) -> Option<Duration> {
        let until = |at: Instant| at.saturating_duration_since(Instant::now());
        let whole = self.timeout.map(|t| self.deadlines.route.map_or(t, until));
        whole.into_iter().chain(self.deadlines.client.map(until)).chain(self.policy.per_try_timeout).min()
    }

    async fn ask(&mut self, head: &RequestHead, to: (SocketAddr, &Arc<EndpointState>)) -> Attempt {
        let begun = Instant::now();
        let known = if self.may_be_lost(head) { Known::ToReactor } else { Known::ToKernel };
        let ended = self.attempt(head, to, Some(known)).await;
        // The connection had been kept, and may have been closed for that it was not used, when the request was on its way.
        let again = match &ended {
            Attempt::Failed(Failed { reset: Reset::ConnectionTermination, begun: false, kept: true, .. }) => {
                begun.elapsed() <= AS_IT_IS_USED && self.may_be_lost(head)
            }
            // Its node knows that nothing of it has gone on.
            Attempt::Failed(Failed { reset: Reset::RefusedStream, begun: false, kept: true, .. }) => {
                self.upload.can_repeat() && self.upgrade.is_none()
            }
            _ => false,
        };
        if !again {
            return ended;
        }
        self.down.proxy.metrics.retries.inc();
        self.upload.rewind();
        self.attempt(head, to, None).await
    }

    /// Whether the same is asked again on a new connection when the one it was sent on turns out to be closed. As clients do it that keep
    /// connections (RFC 9110 section 9.2.2); of what is safe and has no body.
    fn may_be_lost(&self, head: &RequestHead) -> bool {
        head.method.is_safe() && self.upload.is_empty() && self.upload.can_repeat() && self.upgrade.is_none()
    }

    async fn attempt(
        &mut self,
        head: &RequestHead,
        (address, endpoint): (SocketAddr, &Arc<EndpointState>),
        kept: Option<Known>,
    ) -> Attempt {
        let (cluster, state, metrics) = (&self.cluster.clone(), self.state.clone(), &self.down.proxy.metrics);
        let wanted = Wanted {
            proxy: self.down.proxy,
            pod: self.down.pod,
            client: self.down.client,
            cluster,
            state: &state,
            endpoint,
            address,
            http2: cluster.speaks_http2(self.down.http2) && self.upgrade.is_none(),
            kept,
            // For all attempts together.
            patience: if self.number > 1 || kept.is_none() { REDIAL_TIMEOUT.saturating_sub(self.record.age()) } else { REDIAL_TIMEOUT },
        };
        let plan = Plan {
            head,
            upgrade: self.upgrade,
            policy: self.policy,
            timeout: self.timeout,
            close: self.close,
            tied: false,
            over: self.is_clients_choice().then_some(self.down.over),
            client_cert: None,
        };
        let Self { responder, record, upload, deadlines, policy, forward, hashed, number, retry, grpc: is_grpc, .. } = self;
        let mut judge = |status: StatusCode, mut headers: HeaderMap, heard: Heard| {
            let grpc = headers.get("grpc-status").filter(|_| *is_grpc).map(|s| http_status_of_grpc(s.as_bytes()));
            if state.observe(cluster, &forward.source.locality, (address, endpoint), Event::of_status(grpc.unwrap_or(status))) {
                metrics.ejections.inc();
            }
            let again = policy.wants_after_response(status, &headers);
            let again = allowed(again, *number, policy, heard.repeatable, &state, cluster, retry, record);
            if again {
                return Verdict { again, headers };
            }
            let now = Instant::now();
            // Without the time the client took to send it; none of an answer that did not wait for that.
            let took = heard.received.map(|received| now.saturating_duration_since(received));
            (record.details, record.answered_after) = (Cow::Borrowed("via_upstream"), took);
            record.answered_at = Some(now.into_std());
            record.upstream_protocol = Some(wanted.protocol());
            if let Some(took) = took.filter(|_| status != StatusCode::SWITCHING_PROTOCOLS && forward.snapshot.headers.debug) {
                headers.insert(headers::SERVICE_TIME.clone(), headers::milliseconds(took));
            }
            forward.decorate(&mut headers, record, Some(status));
            if let Some(cookie) = hashed.cookie.take() {
                headers.append(header::SET_COOKIE, cookie);
            }
            record.answered(status, &headers);
            Verdict { again, headers }
        };
        let (ended, reached) = attempt(&plan, &wanted, upload, *responder, deadlines, &mut judge).await;
        self.record.passed(self.upload.times(), self.upgrade);
        self.record.upstream_local = reached.and_then(|reached| reached.local);
        // Who finds no place among those that wait is for no endpoint yet.
        let nobody = matches!(&ended, Attempt::Failed(failed) if failed.reset == Reset::Overflow);
        self.record.endpoint = reached.map(|reached| reached.remote).or(self.record.endpoint.filter(|_| !nobody));
        self.record.upstream_protocol = reached.map(|_| wanted.protocol());
        ended
    }

    /// Whether another attempt is made when one is wanted; says in the record why not.
    fn wants_again(&mut self, wanted: bool) -> bool {
        let Self { policy, upload, state, cluster, retry, record, number, .. } = self;
        allowed(wanted, *number, policy, upload.can_repeat(), state, cluster, retry, record)
    }

    fn observe(&self, address: SocketAddr, endpoint: &EndpointState, event: Event) {
        if self.state.observe(&self.cluster, &self.forward.source.locality, (address, endpoint), event) {
            self.down.proxy.metrics.ejections.inc();
        }
    }

    /// Waits before the next attempt, unless time is up or the client gone first.
    async fn back_off(&mut self) -> Option<Outcome> {
        let wait = sleep(self.policy.backoff(self.number, fastrand::u32(..)));
        self.deadlines.attempt = None;
        tokio::select! {
            biased;
            up = self.deadlines.passed() => Some(Outcome::Failed(Unanswered::TimeUp(up))),
            _ = self.responder.gone() => {
                self.record.abandoned();
                Some(Outcome::Ended(End::Broken))
            }
            () = wait => None,
        }
    }

    fn answered(&mut self, answered: &Answered) -> End {
        match answered {
            Answered::Whole => return if self.upload.note_received() { End::Complete } else { End::Broken },
            Answered::Truncated(_) | Answered::Cut => {
                let reset = if let Answered::Truncated(reset) = answered { *reset } else { Reset::ConnectionTermination };
                self.record.raise(flag_of(reset));
                let words = reason(reset).replace(' ', "_");
                self.record.details = format!("upstream_reset_after_response_started{{{words}}}").into();
            }
            Answered::TimeUp(TimeUp::Client) => self.record.details = Cow::Borrowed("max_duration_timeout"),
            Answered::TimeUp(_) => {
                self.record.raise(Flag::UpstreamTimeout);
                self.record.details = Cow::Borrowed("response_timeout");
            }
            Answered::Abandoned => self.record.abandoned(),
        }
        End::Broken
    }
}

#[expect(clippy::too_many_arguments, reason = "called from inside and outside a closure that holds the parts apart")]
fn allowed(
    wanted: bool,
    number: u32,
    policy: &RetryPolicy,
    repeatable: bool,
    state: &Arc<ClusterState>,
    cluster: &Cluster,
    retry: &mut Option<Slot>,
    record: &mut Record,
) -> bool {
    // The retry under way has got what it was for.
    *retry = None;
    // Where there can be no other there is no limit to reach.
    if !wanted || policy.attempts == 0 || !repeatable {
        return false;
    }
    if number > policy.attempts {
        record.raise(Flag::RetriesExhausted);
        return false;
    }
    *retry = state.begin_retry(cluster.policy.http.max_retries, cluster.policy.retry_budget.as_ref());
    if retry.is_none() {
        record.raise(Flag::UpstreamOverflow);
        record.overflow("retries");
    }
    retry.is_some()
}
