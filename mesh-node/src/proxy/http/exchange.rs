//! One request from its head to the end of its response, in the order things happen (that of Istio's filters): route, fault, CORS, redirect or
//! direct response, pick a cluster, rewrite, mirror, then attempts until one is answered.

mod cors;
mod failure;
mod guard;

use std::{borrow::Cow, pin::pin, sync::Arc};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::time::{Instant, sleep};

pub(super) use self::{cors::CorsAnswer, failure::flag_of};
use self::{
    cors::Preflight,
    guard::{Dialled, Passed, under},
};
use super::{
    Downstream,
    attempt::Deadlines,
    attempts::{Attempts, Hashed, Outcome},
    authorizer::ToClient,
    body::{RequestBody, Responder},
    gate, headers,
    record::{Described, Flag, Record},
    reply::Reply,
    tokens,
    upload::Upload,
};
use crate::{
    config::Snapshot,
    id::ObjectName,
    policy::Denial,
    report::{entry::Asked, format::Template, kept::Wanted},
    resource::mesh_config::AddedHeaders,
    route::{
        Cluster, Target, Workload,
        matching::{Context, PathMatch},
        request::{RequestHead, renormalised},
        rewrite,
        rule::{Abort, Action, DirectResponse, Redirect, Rule, Tell, Weighted, pick_weighted},
        table::{Found, ResolvedRule},
    },
};

/// Whether the client's connection can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The response is complete.
    Complete,
    /// The response is not, or the request has not been read to its end: the client must see the end of the connection or
    /// stream.
    Broken,
}

/// One request under way.
pub struct Exchange<'e, 'd, B, R> {
    pub down: &'e Downstream<'d>,
    pub body: &'e mut B,
    pub responder: &'e mut R,
    pub record: &'e mut Record,
    pub upgrade: Option<HeaderValue>,
    pub close: bool,
    pub grpc: bool,
    /// It came as gRPC-Web: what is answered here is told as HTTP.
    pub web: bool,
    /// What external authorizers of the service that was dialled have for the client.
    pub to_client: ToClient,
}

/// Where a request is forwarded to.
pub(super) struct Forward<'s> {
    pub(super) cluster: Arc<Cluster>,
    pub(super) rule: Option<&'s Rule>,
    pub(super) destination: Option<&'s Weighted>,
    pub(super) cors: Option<CorsAnswer>,
    pub(super) snapshot: &'s Snapshot,
    pub(super) source: &'s Arc<Workload>,
    /// The service whose address the client dialled.
    pub(super) dialled: &'s ObjectName,
    /// What was asked for, where answers are told of that.
    pub(super) asked: Option<Box<Described>>,
    /// What policies of the service have made of it.
    passed: Passed,
    to_client: ToClient,
}

impl<'s> Forward<'s> {
    /// Where no route says anything.
    fn as_dialled(cluster: Arc<Cluster>, snapshot: &'s Snapshot, source: &'s Arc<Workload>, dialled: &'s ObjectName) -> Self {
        let (passed, to_client) = (Passed::default(), ToClient::default());
        Self { cluster, rule: None, destination: None, cors: None, snapshot, source, dialled, asked: None, passed, to_client }
    }

    /// Whether the route says to.
    fn changes_headers(&self) -> bool {
        let changes = self.rule.map(|r| &r.headers.request).into_iter().chain(self.destination.map(|d| &d.headers.request));
        changes.into_iter().any(|changes| !changes.is_empty())
    }

    /// Changes an answer's headers as destination, rule and CORS say.
    pub(super) fn decorate(&self, headers: &mut HeaderMap, record: &Record, status: Option<StatusCode>) {
        let tell = |template: &Template, headers: &HeaderMap| {
            record.tell(template, self.asked.as_deref().map(Described::asked), Some((status, headers)))
        };
        respond_as(headers, self.rule, self.destination, &tell);
        cors::tell(headers, self.cors.as_ref());
        self.to_client.apply(headers);
    }
}

impl<B: RequestBody, R: Responder> Exchange<'_, '_, B, R> {
    /// Serves the request.
    pub async fn run(&mut self, mut head: RequestHead) -> End {
        self.grpc = head.is_grpc();
        if self.grpc {
            self.record.follow([self.body.meter().count_messages(), self.responder.meter().count_messages()]);
        }
        let snapshot = self.down.proxy.config.load().clone();
        let Some(source) = snapshot.workload(&self.down.pod.uid) else {
            return self.refuse(StatusCode::SERVICE_UNAVAILABLE, Flag::NoCluster, "cluster_not_found").await;
        };
        self.begin(&mut head, source, snapshot.headers);
        let Target::Service { service, port } = snapshot.resolve_once(&source.view, self.down.original, self.down.dialled) else {
            // Who asks again finds out where it is now.
            self.close = true;
            return self.refuse(StatusCode::SERVICE_UNAVAILABLE, Flag::NoCluster, "cluster_not_found").await;
        };
        self.record.dialled = Some(port.cluster.clone());
        if head.method == Method::CONNECT {
            self.close = true;
            return self.refuse(StatusCode::NOT_FOUND, Flag::NoRoute, "route_not_found").await;
        }
        let Ok(normal) = renormalised(&head, snapshot.normalization) else { return self.bad_path().await };
        head = normal.unwrap_or(head);
        let dialled = Dialled { snapshot: &snapshot, source, service, port };
        let Some(table) = port.routes.http.as_ref().and_then(|table| table.of(source, port.port)) else {
            return self.unrouted(dialled, head).await;
        };
        let known = match tokens::known(self.down.proxy, &snapshot, (table, port), &head).await {
            Ok(known) => known,
            Err(refusal) => return self.unauthenticated(*refusal).await,
        };
        let context = Context { source, port: port.port, claims: known.claims.as_ref() };
        match table.find(known.head.as_ref().unwrap_or(&head), context) {
            Some(found) => self.routed(dialled, found, head).await,
            None => match self.guard(dialled, None, &mut head).await {
                Ok(_) => self.refuse(StatusCode::NOT_FOUND, Flag::NoRoute, "route_not_found").await,
                Err(end) => end,
            },
        }
    }

    /// Serves what goes to the service itself.
    async fn unrouted(&mut self, dialled: Dialled<'_>, mut head: RequestHead) -> End {
        let Dialled { snapshot, source, service, port } = dialled;
        let mut forward = Forward::as_dialled(port.cluster.clone(), snapshot, source, &service.name);
        if port.is_guarded {
            match self.guard(dialled, Some(&port.cluster), &mut head).await {
                Ok(passed) => (forward.passed, forward.to_client) = (passed, std::mem::take(&mut self.to_client)),
                Err(end) => return end,
            }
        }
        self.forward_rewritten(head, forward, false, Vec::new()).await
    }

    /// Serves what a rule takes.
    async fn routed(&mut self, dialled: Dialled<'_>, Found { resolved, name, path }: Found<'_>, mut head: RequestHead) -> End {
        let Dialled { snapshot, source, service, .. } = dialled;
        let rule = &*resolved.rule;
        self.record.routed(name, &resolved.origin);
        let picked = if let Action::Forward(all) = &rule.action { pick_destination(resolved, all) } else { None };
        self.record.cluster = picked.as_ref().and_then(|(cluster, _)| cluster.clone());
        let mut passed = Passed::default();
        if resolved.is_guarded {
            match self.guard(dialled, self.record.cluster.clone().as_deref(), &mut head).await {
                Ok(made) => passed = made,
                Err(end) => return end,
            }
        }
        if let Some(end) = self.fault(rule, picked.as_ref().map(|(_, destination)| *destination), &head).await {
            return end;
        }
        match &rule.action {
            Action::Redirect(redirect) => self.redirect(rule, redirect, path, &head).await,
            Action::Respond(response) => self.respond(rule, response, &head).await,
            Action::Forward(_) => {
                // Of what is answered here Envoy takes no notice of CORS.
                let cors = match rule.cors.as_ref().map(|cors| cors::judge(cors, &head)) {
                    Some(Preflight::Answer(headers)) => return self.preflight(headers).await,
                    Some(Preflight::Pass(answer)) => answer,
                    None => None,
                };
                let Some((cluster, destination)) = picked else { return self.missing(rule, None, None, &head).await };
                let Some(cluster) = cluster else { return self.missing(rule, Some(destination), cors.as_ref(), &head).await };
                let rewritten = self.rewrite(&mut head, (rule, destination), path, snapshot.headers);
                let forward = Forward {
                    cluster,
                    rule: Some(rule),
                    destination: Some(destination),
                    cors,
                    snapshot,
                    source,
                    dialled: &service.name,
                    asked: asked_of(&head, rule, Some(destination)),
                    passed,
                    to_client: std::mem::take(&mut self.to_client),
                };
                let mirrors = Self::mirrors(resolved);
                self.forward_rewritten(head, forward, rewritten, mirrors).await
            }
            Action::Delegate { .. } => self.missing(rule, None, None, &head).await,
        }
    }

    /// Whether what is answered here is told in gRPC.
    fn tells_in_grpc(&self) -> bool {
        self.grpc && !self.web
    }

    /// Takes down who asks for what, and lets its trace go on.
    fn begin(&mut self, head: &mut RequestHead, source: &Arc<Workload>, added: AddedHeaders) {
        self.record.source = Some(source.clone());
        // Before routes see it, as with Envoy.
        headers::prepare(head, added);
        self.record.describe(head, source);
        self.record.look_behind(self.responder.meter());
        if self.body.is_end() && self.upgrade.is_none() {
            self.record.came_without_body(&head.method);
        }
        if let Some(onward) = self.record.trace(head, source, None, &self.down.proxy.spans) {
            onward.write(&mut head.headers);
        }
    }

    /// Answers with what the route says; in gRPC to gRPC.
    async fn respond(&mut self, rule: &Rule, response: &DirectResponse, head: &RequestHead) -> End {
        let mut reply = if self.tells_in_grpc() {
            Reply::new(response.status, String::from_utf8_lossy(&response.body).into_owned())
        } else {
            Reply { verbatim: Some(response.body.clone()), ..Reply::new(response.status, "") }
        };
        // What was created, or is elsewhere, is where it was asked for, as far as Envoy knows.
        if response.status == StatusCode::CREATED || response.status.is_redirection() {
            let (host, path) = (String::from_utf8_lossy(head.authority.as_bytes()), head.target.as_str());
            if let Ok(location) = HeaderValue::from_str(&format!("{}://{host}{path}", head.scheme.as_str())) {
                reply.headers.insert(header::LOCATION, location);
            }
        }
        self.record.details = Cow::Borrowed("direct_response");
        self.reply_as(reply, head, (Some(rule), None), None).await
    }

    /// A path that cannot be normalised.
    async fn bad_path(&mut self) -> End {
        self.record.details = Cow::Borrowed("path_normalization_failed");
        self.reply(Reply::new(StatusCode::BAD_REQUEST, ""), |_, _| {}).await
    }

    /// A token the destination would not take either.
    async fn unauthenticated(&mut self, refusal: gate::Refusal) -> End {
        self.record.details = refusal.details.into();
        self.reply(refusal.reply, |_, _| {}).await
    }

    /// A destination that does not exist.
    async fn missing(&mut self, rule: &Rule, picked: Option<&Weighted>, cors: Option<&CorsAnswer>, head: &RequestHead) -> End {
        let of_gateway_api = rule.missing_status == StatusCode::INTERNAL_SERVER_ERROR;
        if of_gateway_api && picked.is_none() {
            // Where there is nothing to pick Istio's route answers itself.
            self.record.details = Cow::Borrowed("direct_response");
        } else {
            self.record.raise(Flag::NoCluster);
            self.record.details = Cow::Borrowed("cluster_not_found");
        }
        // `UNAVAILABLE`, as Gateway API has it of `GRPCRoute`s, whatever kind of route it is.
        let grpc_status = (of_gateway_api && self.tells_in_grpc()).then_some(14);
        let reply = Reply { grpc_status, ..Reply::new(rule.missing_status, "") };
        self.reply_as(reply, head, (Some(rule), picked), cors).await
    }

    async fn refuse(&mut self, status: StatusCode, flag: Flag, details: &'static str) -> End {
        self.record.raise(flag);
        self.record.details = Cow::Borrowed(details);
        self.reply(Reply::new(status, ""), |_, _| {}).await
    }

    async fn redirect(&mut self, rule: &Rule, redirect: &Redirect, path: Option<&PathMatch>, head: &RequestHead) -> End {
        let location = rewrite::location(redirect, path, head, self.down.original.port());
        let mut reply = Reply::new(redirect.status, "");
        if let Ok(location) = HeaderValue::from_str(&location) {
            reply.headers.insert(header::LOCATION, location);
        }
        self.record.details = Cow::Borrowed("direct_response");
        self.reply_as(reply, head, (Some(rule), None), None).await
    }

    /// Answers as a rule, a destination and CORS say.
    async fn reply_as(
        &mut self,
        reply: Reply,
        head: &RequestHead,
        (rule, destination): (Option<&Rule>, Option<&Weighted>),
        cors: Option<&CorsAnswer>,
    ) -> End {
        let asked = rule.and_then(|rule| asked_of(head, rule, destination));
        let to_client = std::mem::take(&mut self.to_client);
        let change = |record: &Record, headers: &mut HeaderMap| {
            let tell = |template: &Template, headers: &HeaderMap| {
                record.tell(template, asked.as_deref().map(Described::asked), Some((None, headers)))
            };
            respond_as(headers, rule, destination, &tell);
            cors::tell(headers, cors);
            to_client.apply(headers);
        };
        self.reply(reply, change).await
    }

    /// Answers without the upstream.
    async fn reply(&mut self, reply: Reply, change: impl FnOnce(&Record, &mut HeaderMap)) -> End {
        // Who asks for another protocol may speak it already.
        let close = self.close || !self.body.is_end() || self.upgrade.is_some();
        let in_grpc = self.tells_in_grpc();
        let record = &mut *self.record;
        let answered = |status, headers: &mut HeaderMap| {
            change(record, headers);
            record.answered(status, headers);
        };
        if reply.start(in_grpc, close, self.responder, answered).is_err() {
            self.record.status = None;
            return self.abandoned();
        }
        while !self.responder.is_flushed() {
            if self.responder.flush().await.is_err() {
                return self.abandoned();
            }
        }
        if self.body.is_end() { End::Complete } else { End::Broken }
    }

    fn abandoned(&mut self) -> End {
        self.record.abandoned();
        End::Broken
    }

    async fn preflight(&mut self, headers: HeaderMap) -> End {
        let mut reply = Reply::new(StatusCode::OK, "");
        reply.headers = headers;
        self.record.details = Cow::Borrowed("cors_response");
        let to_client = std::mem::take(&mut self.to_client);
        self.reply(reply, |_, headers| to_client.apply(headers)).await
    }

    /// Delays and aborts, each by its own dice.
    async fn fault(&mut self, rule: &Rule, destination: Option<&Weighted>, head: &RequestHead) -> Option<End> {
        if let Some((delay, share)) = rule.fault.delay
            && share.hit(fastrand::u32(..))
        {
            self.record.raise(Flag::DelayInjected);
            tokio::select! {
                () = sleep(delay) => {}
                _ = self.responder.gone() => return Some(self.abandoned()),
            }
        }
        let (abort, share) = rule.fault.abort?;
        if !share.hit(fastrand::u32(..)) {
            return None;
        }
        self.record.raise(Flag::FaultInjected);
        self.record.details = Cow::Borrowed("fault_filter_abort");
        let reply = match abort {
            Abort::Http(status) => Reply::new(status, "fault filter abort"),
            Abort::Grpc(code) => Reply { grpc_status: Some(code), ..Reply::new(StatusCode::OK, "fault filter abort") },
        };
        // What goes nowhere has no say in it, as with Envoy.
        let rule = Some(rule).filter(|rule| matches!(rule.action, Action::Forward(_)));
        Some(self.reply_as(reply, head, (rule, destination), None).await)
    }

    /// The mirrors the dice pick.
    fn mirrors(resolved: &ResolvedRule) -> Vec<Arc<Cluster>> {
        let all = resolved.rule.mirrors.iter().zip(&resolved.mirrors);
        all.filter(|(mirror, _)| mirror.share.hit(fastrand::u32(..))).filter_map(|(_, cluster)| cluster.clone()).collect()
    }

    /// Makes of a request what its rule and destination say; whether that is another path.
    fn rewrite(
        &self,
        head: &mut RequestHead,
        (rule, destination): (&Rule, &Weighted),
        matched: Option<&PathMatch>,
        added: AddedHeaders,
    ) -> bool {
        let tell = |template: &Template, asked: Asked<'_>| self.record.tell(template, Some(asked), None);
        let Some(original) = rewrite::request(head, rule, matched, Some(destination), tell) else { return false };
        if added.debug {
            head.headers.insert(headers::ORIGINAL_PATH.clone(), original);
        }
        true
    }

    async fn forward_rewritten(&mut self, head: RequestHead, mut forward: Forward<'_>, rewritten: bool, mirrors: Vec<Arc<Cluster>>) -> End {
        let changed = rewritten || forward.changes_headers();
        self.record.sent(&head, changed);
        self.record.cluster = Some(forward.cluster.clone());
        let state = self.down.pod.clusters.of(&forward.cluster);
        let policy = forward.rule.and_then(|r| r.retries.as_ref()).unwrap_or(&forward.snapshot.retries);
        let timeout = forward.rule.and_then(|r| r.timeout);
        let client = if self.grpc { headers::grpc_timeout(&head.headers) } else { None };
        let hashed = Hashed::of(&forward.cluster, &head, self.down);
        let replays = self.down.proxy.replays.of(&self.down.pod.kept);
        let keep = policy.attempts > 0 && self.upgrade.is_none();
        let mut upload = Upload::new(self.body, keep, &replays);
        if let Some(begun) = forward.passed.begun.take() {
            upload = upload.after(begun);
        }
        upload.keep_out(&forward.passed.written);
        let judged = forward.passed.judged.take();
        let attempts = Attempts {
            down: self.down,
            responder: self.responder,
            record: self.record,
            upload,
            deadlines: Deadlines { client: client.map(|t| Instant::now() + t), ..Deadlines::default() },
            policy,
            timeout,
            upgrade: self.upgrade.as_ref(),
            close: self.close,
            cluster: forward.cluster.clone(),
            state,
            newer: None,
            forward: &forward,
            hashed,
            grpc: self.grpc,
            mirrors,
            tried: Vec::new(),
            number: 0,
            retry: None,
        };
        let ended = {
            let run = pin!(attempts.run(head));
            under(judged, run).await
        };
        let failure = match ended {
            Ok(Outcome::Ended(end)) => return end,
            Ok(Outcome::Failed(failure)) => failure,
            Err(denial) => return self.denied(&denial).await,
        };
        self.fail(failure, &forward).await
    }

    /// Ends what is not allowed any more; who has no answer yet is told.
    async fn denied(&mut self, denial: &Denial) -> End {
        if self.record.status.is_some() {
            self.record.cut();
            return End::Broken;
        }
        self.record.details = denial.details().into();
        self.close = true;
        self.reply(Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied"), |_, _| {}).await
    }
}

/// One of the destinations by their weights, and its cluster, if there is one.
fn pick_destination<'s>(resolved: &ResolvedRule, all: &'s [Weighted]) -> Option<(Option<Arc<Cluster>>, &'s Weighted)> {
    let picked = match all {
        [only] => (only.weight > 0).then_some(0)?,
        _ => pick_weighted(all.iter().map(|d| d.weight), fastrand::u64(..))?,
    };
    Some((resolved.destinations.get(picked)?.clone(), all.get(picked)?))
}

/// Changes an answer's headers as destination and rule say.
fn respond_as(headers: &mut HeaderMap, rule: Option<&Rule>, destination: Option<&Weighted>, tell: Tell<'_>) {
    if let Some(destination) = destination {
        destination.headers.response.apply(headers, tell);
    }
    if let Some(rule) = rule {
        rule.headers.response.apply(headers, tell);
    }
}

/// What is asked for, if answers are to be told of that.
fn asked_of(head: &RequestHead, rule: &Rule, destination: Option<&Weighted>) -> Option<Box<Described>> {
    let tells = rule.headers.response.tells() || destination.is_some_and(|d| d.headers.response.tells());
    tells.then(|| Box::new(Described::rewritten(head, &Wanted::All)))
}
