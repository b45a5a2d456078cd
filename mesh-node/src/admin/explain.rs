//! What would become of a request or a connection: which service and route, which endpoints, and which policy would decide at each.
//! Asked of the configuration in force; nothing is sent.

mod fates;

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, Method};
use serde_json::{Value, json};

use self::fates::{Asked, Fates};
use super::{NoAnswer, authorization, query};
use crate::{
    config::{OutboundPolicy, Snapshot},
    detect::Protocol,
    policy::{Verified, WorkloadPolicy, received, unsatisfied},
    proxy::outbound,
    report::format::Template,
    route::{
        Cluster, ClusterId, Endpoint, Service, ServicePort, Target, Workload,
        l4::L4Context,
        matching::Context,
        request::{RequestHead, Scheme, renormalised},
        rewrite,
        rule::{Abort, Action, Rule},
        table::{Found, FoundL4, ResolvedL4},
        target::RequestTarget,
        traffic::Balancer,
    },
};

#[derive(Debug, Default)]
struct Question {
    from: String,
    to: String,
    method: Option<Method>,
    path: Option<RequestTarget>,
    headers: HeaderMap,
    claims: Option<String>,
    sni: Option<Arc<str>>,
}

/// Which endpoints a pod leaves out of a cluster for what they have answered.
pub(super) type Ejected<'a> = &'a dyn Fn(&Workload, &ClusterId, SocketAddr) -> bool;

/// Answers, or says which parameter is wrong.
pub(super) fn answer(snapshot: &Snapshot, query: &str, ejected: Ejected<'_>) -> Result<Value, NoAnswer> {
    let question = Question::read(query)?;
    let source = authorization::find(snapshot, &question.from).ok_or_else(|| {
        let from = &question.from;
        NoAnswer::Missing(match from.parse::<IpAddr>() {
            Ok(_) => format!("from: no workload has the address {from}, and nothing is routed for others; authorize takes any address"),
            Err(_) => authorization::unknown(snapshot, "from", from),
        })
    })?;
    let (dialled, host) = question.dialled(snapshot, source)?;
    let mut answer = json!({"from": {"workload": source.name.to_string(), "identity": source.identity.to_string(), "enrolled": source.enrolled},
        "dialled": dialled, "allowed": false});
    let asker = Asker { question: &question, snapshot, source, dialled, host: &host, ejected };
    let target = if source.enrolled { snapshot.resolve_for(&source.view, dialled) } else { snapshot.resolve(dialled) };
    match target {
        Target::Service { service, port } => asker.to_service(service, port, &mut answer)?,
        Target::NoSuchPort(service) => {
            answer["verdict"] = format!("{} has no port {}: the connection is reset", service.name, dialled.port()).into();
        }
        Target::Workload(workload) => asker.to_pod(workload, &mut answer)?,
        Target::Unknown if source.enrolled && snapshot.outbound == OutboundPolicy::RegistryOnly => {
            answer["verdict"] = "not part of the mesh, and REGISTRY_ONLY is in force: the connection is reset".into();
        }
        Target::Unknown => {
            answer["verdict"] = "not part of the mesh: the connection passes unchanged".into();
            answer["allowed"] = true.into();
        }
    }
    if !source.enrolled {
        let verdict = answer["verdict"].as_str().unwrap_or_default();
        answer["verdict"] = format!("{verdict}; {} is not in the mesh: nothing is routed, and nobody knows who it is", source.name).into();
    }
    Ok(answer)
}

impl Question {
    fn read(query: &str) -> Result<Self, String> {
        let mut question = Self::default();
        for (name, value) in query::pairs(query)? {
            let bad = |wanted: &str| format!("{name}: {value:?} is not {wanted}");
            match name {
                "from" => question.from = value,
                "to" => question.to = value,
                "method" => question.method = Some(value.parse().map_err(|_| bad("a method"))?),
                "path" => question.path = Some(value.parse().map_err(|_| bad("a path"))?),
                "header" => {
                    let (key, text) = query::header(&value).ok_or_else(|| bad("`name: value`"))?;
                    question.headers.append(key, text);
                }
                "claims" => {
                    serde_json::from_str::<serde_json::Map<String, Value>>(&value)
                        .map_err(|e| format!("claims: is not a JSON object: {e}"))?;
                    question.claims = Some(value);
                }
                "sni" => question.sni = Some(value.into()),
                _ => return Err(format!("{name}: is not known; from, to, method, path, header, claims and sni are")),
            }
        }
        if question.from.is_empty() || question.to.is_empty() {
            return Err("from and to are needed: a workload, and service:port or address:port".to_owned());
        }
        Ok(question)
    }

    /// The address that is dialled, and the host that is asked for.
    fn dialled(&self, snapshot: &Snapshot, source: &Workload) -> Result<(SocketAddr, String), NoAnswer> {
        if let Ok(address) = self.to.parse::<SocketAddr>() {
            return Ok((SocketAddr::new(address.ip().to_canonical(), address.port()), self.to.clone()));
        }
        let (name, port) = self.to.rsplit_once(':').ok_or_else(|| format!("to: {:?} is not service:port or address:port", self.to))?;
        let service = service_named(snapshot, &source.name.namespace, name)?;
        let port = match port.parse::<u16>() {
            Ok(port) => port,
            Err(_) => service
                .ports
                .iter()
                .find(|p| *p.name == *port)
                .map(|p| p.port)
                .ok_or_else(|| format!("to: {port:?} is not a port, nor the name of one of {}", service.name))?,
        };
        let v4 = source.ips.first().is_none_or(std::net::IpAddr::is_ipv4);
        let vip = service.vips.iter().find(|ip| ip.is_ipv4() == v4).or(service.vips.first());
        let headless = || service.port(port).and_then(|p| p.cluster.endpoints.first()).map(|e| e.address.ip());
        let ip = vip.copied().or_else(headless).ok_or_else(|| format!("to: {} has no address", service.name))?;
        // Clients write dots.
        let host = name.split_once('/').map_or_else(|| name.to_owned(), |(namespace, name)| format!("{name}.{namespace}"));
        Ok((SocketAddr::new(ip, port), host))
    }

    /// Whether it is a request that is asked about, where that is not clear from the port.
    fn is_request(&self) -> bool {
        self.method.is_some() || self.path.is_some() || !self.headers.is_empty() || self.claims.is_some()
    }

    fn head(&self, host: &str, dialled: SocketAddr) -> Result<RequestHead, String> {
        let mut headers = self.headers.clone();
        let own = headers.remove(http::header::HOST);
        let authority = match (own, dialled.port()) {
            (Some(host), _) => host,
            (None, 80) => HeaderValue::try_from(host).map_err(|e| format!("to: {e}"))?,
            (None, port) if host.parse::<SocketAddr>().is_err() => {
                HeaderValue::try_from(format!("{host}:{port}")).map_err(|e| format!("to: {e}"))?
            }
            (None, _) => HeaderValue::try_from(host).map_err(|e| format!("to: {e}"))?,
        };
        Ok(RequestHead {
            method: self.method.clone().unwrap_or_default(),
            scheme: Scheme::Http,
            authority,
            target: self.path.clone().unwrap_or_else(|| RequestTarget::from_static("/")),
            headers,
        })
    }
}

/// Who asks what of whom.
#[derive(Clone, Copy)]
struct Asker<'a> {
    question: &'a Question,
    snapshot: &'a Snapshot,
    source: &'a Arc<Workload>,
    dialled: SocketAddr,
    host: &'a str,
    ejected: Ejected<'a>,
}

impl<'a> Asker<'a> {
    fn asked(self, head: Option<&'a RequestHead>) -> Asked<'a> {
        Asked {
            snapshot: self.snapshot,
            source: self.source,
            sni: self.question.sni.as_ref(),
            claims: self.question.claims.as_deref(),
            head,
        }
    }

    /// Whether policies that refer to the service deny it where the client is, which the answer then says.
    fn denied(self, port: &ServicePort, head: Option<&RequestHead>, answer: &mut Value) -> bool {
        let Some(governing) = port.guard.as_ref().filter(|_| self.source.enrolled) else { return false };
        let policy = WorkloadPolicy { everywhere: governing.clone(), ..WorkloadPolicy::default() };
        let (denied, reason, by) = self.asked(head).judged(self.dialled, &policy);
        if denied {
            answer["allowed"] = false.into();
            answer["policy"] = json!(by);
            answer["verdict"] = format!("denied before it is routed, by what policies that refer to the service say: {reason}").into();
        }
        denied
    }

    /// The request, if one is asked about, as the proxy would read it.
    fn request(self, answer: &mut Value) -> Result<RequestHead, String> {
        let mut head = self.question.head(self.host, self.dialled)?;
        if let Some(normal) = renormalised(&head, self.snapshot.normalization).map_err(|_| "path: cannot be normalised: answered 400")? {
            head = normal;
        }
        answer["request"] = json!({"method": head.method.as_str(), "host": head.host(), "path": head.target.as_str()});
        Ok(head)
    }

    /// To a pod's own address: nothing is routed, and what a destination looks into it judges.
    fn to_pod(self, workload: &Arc<Workload>, answer: &mut Value) -> Result<(), String> {
        let head = if self.question.is_request() { Some(self.request(answer)?) } else { None };
        let mut fates = Fates::default();
        let one = self.asked(head.as_ref()).at_endpoint(self.dialled, workload);
        fates.add(1, std::slice::from_ref(&one));
        answer["endpoints"] = json!([one]);
        fates.tell(None, answer);
        Ok(())
    }

    fn to_service(self, service: &Service, port: &ServicePort, answer: &mut Value) -> Result<(), String> {
        let protocol = port.cluster.protocol;
        answer["service"] =
            json!({"name": service.name.to_string(), "port": port.port, "protocol": format!("{protocol:?}").to_lowercase()});
        let (opaque, unknown) = (matches!(protocol, Protocol::Tcp | Protocol::Tls), protocol == Protocol::Detect);
        if opaque || (unknown || !self.source.enrolled) && !self.question.is_request() {
            // Where services disagree about what a pod's port carries, the pod's node finds out.
            let head = if opaque && self.question.is_request() { Some(self.request(answer)?) } else { None };
            self.connection(port, head.as_ref(), answer);
            return Ok(());
        }
        let head = self.request(answer)?;
        let table = port.routes.http.as_ref().and_then(|table| table.of(self.source, port.port)).filter(|_| self.source.enrolled);
        let Some(table) = table else {
            if port.is_guarded && self.denied(port, Some(&head), answer) {
                return Ok(());
            }
            self.straight(&port.cluster, Some(&head), answer);
            return Ok(());
        };
        answer["route"] = json!({"from": &*table.origin, "rule": Value::Null});
        let (rules, claims) = (self.snapshot.tokens_at(port), self.question.claims.as_ref());
        let assumed = claims.filter(|_| table.asks_tokens(rules)).map(|claims| Verified::assumed(rules, claims));
        let verified = assumed.and_then(|assumed| assumed.ok().flatten());
        if claims.is_some() && table.asks_tokens(rules) && verified.is_none() {
            answer["verdict"] = "the destination takes no tokens of the issuer that the claims name: answered 401".into();
            return Ok(());
        }
        if let Some(rule) = unsatisfied(rules, verified.as_ref()).filter(|_| table.asks_tokens(rules)) {
            answer["verdict"] = format!("the destination wants a token of {}: answered 401", authorization::issuer(rule)).into();
            return Ok(());
        }
        let seen = received(rules, verified.as_ref(), &head);
        let Some(found) = table.find(&seen, Context { source: self.source, port: port.port, claims: verified.as_ref() }) else {
            if !self.denied(port, Some(&head), answer) {
                answer["verdict"] = "no rule takes it: answered 404 (NR)".into();
            }
            return Ok(());
        };
        if !found.resolved.is_guarded || !self.denied(port, Some(&head), answer) {
            self.routed(found, &head, answer);
        }
        answer["route"]["from"] = (*found.resolved.origin).into();
        answer["route"]["rule"] = (found.resolved.rule.number + 1).into();
        Ok(())
    }

    /// A connection that carries no HTTP for its client's node, or of which it is not said.
    fn connection(self, port: &ServicePort, head: Option<&RequestHead>, answer: &mut Value) {
        let client = self.source.ips.first().copied().unwrap_or_else(|| self.dialled.ip());
        let context = L4Context { source: self.source, client, destination: self.dialled, sni: self.question.sni.as_deref() };
        let (number, found) = match port.routes.l4_rule(context) {
            FoundL4::Rule(number, found) if self.source.enrolled => (number, found),
            FoundL4::Nowhere if self.source.enrolled => {
                answer["verdict"] = "no rule about TLS takes the server name: the connection is reset (NR)".into();
                return;
            }
            _ => {
                if !port.is_guarded || !self.denied(port, None, answer) {
                    self.straight(&port.cluster, head, answer);
                }
                return;
            }
        };
        let ResolvedL4 { origin, rule, destinations, is_guarded } = found;
        let kind = if rule.matches.iter().any(|m| !m.sni.is_empty()) { "tls" } else { "tcp" };
        answer["route"] = json!({"from": &**origin, "rule": number + 1, "kind": kind});
        if *is_guarded && self.denied(port, None, answer) {
            return;
        }
        let weights = rule.destinations.iter().map(|d| (d.weight, format!("{}{}", d.destination.host, d.destination.subset)));
        let mut fates = Fates::of(weights.clone().map(|(weight, _)| weight));
        let mut all = Vec::new();
        for ((weight, named), cluster) in weights.zip(destinations) {
            all.push(self.destination(&mut fates, weight, (cluster.as_deref(), named), "the connection is reset", head));
        }
        answer["destinations"] = all.into();
        fates.tell(None, answer);
    }

    /// No rule is in force.
    fn straight(self, cluster: &Cluster, head: Option<&RequestHead>, answer: &mut Value) {
        let mut fates = Fates::default();
        answer["route"] = json!({"from": Value::Null, "rule": "none: the service itself"});
        let endpoints = self.endpoints(cluster, head);
        fates.add(1, &endpoints);
        answer["endpoints"] = endpoints.into();
        fates.tell(None, answer);
    }

    /// Says what a rule does with a request.
    fn routed(self, found: Found<'_>, head: &RequestHead, answer: &mut Value) {
        let (resolved, rule): (_, &Rule) = (found.resolved, &found.resolved.rule);
        answer["route"] = json!({
            "name": &*rule.name, "matches": rule.matches.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "timeoutMilliseconds": rule.timeout.map(|t| t.as_millis()), "attempts": rule.retries.as_ref().map(|r| r.attempts),
            "mirrors": resolved.mirrors.iter().flatten().map(|c| c.id.to_string()).collect::<Vec<_>>(),
            "fault": {
                "delayMilliseconds": rule.fault.delay.map(|(d, _)| d.as_millis()), "delayPercent": rule.fault.delay.map(|(_, s)| s.as_percent()),
                "abort": rule.fault.abort.map(|(abort, _)| told(abort)), "abortPercent": rule.fault.abort.map(|(_, s)| s.as_percent()),
            },
        });
        let missing = || format!("answered {}", rule.missing_status.as_u16());
        let mut fates = Fates::default();
        match &rule.action {
            Action::Redirect(redirect) => fates.fail(1, format!("answered {} with a redirect", redirect.status.as_u16())),
            Action::Respond(response) => fates.fail(1, format!("answered {} by the route", response.status.as_u16())),
            Action::Delegate { .. } => fates.fail(1, format!("{}: the delegate does not exist", missing())),
            Action::Forward(all) => {
                fates = Fates::of(all.iter().map(|d| d.weight));
                let mut found_all = Vec::new();
                for (weighted, cluster) in all.iter().zip(&resolved.destinations) {
                    let mut sent = head.clone();
                    // What is told of the request is not known before there is one.
                    let tell = |template: &Template, _: crate::report::entry::Asked<'_>| HeaderValue::from_str(template.plain()?).ok();
                    rewrite::request(&mut sent, rule, found.path, Some(weighted), tell);
                    let named = format!("{}{}", weighted.destination.host, weighted.destination.subset);
                    let mut one = self.destination(&mut fates, weighted.weight, (cluster.as_deref(), named), &missing(), Some(&sent));
                    if (&sent.target, &sent.authority) != (&head.target, &head.authority) {
                        one["request"] = json!({"host": sent.host(), "path": sent.target.as_str()});
                    }
                    found_all.push(one);
                }
                answer["destinations"] = found_all.into();
                if all.iter().all(|d| d.weight == 0) {
                    fates.fail(1, format!("{}: the rule has no destination", missing()));
                }
            }
        }
        fates.tell(rule.fault.abort.map(|(abort, share)| (told(abort), share.as_percent())), answer);
    }

    fn destination(
        self,
        fates: &mut Fates,
        weight: u32,
        (cluster, named): (Option<&Cluster>, String),
        missing: &str,
        head: Option<&RequestHead>,
    ) -> Value {
        let percent = fates.percent(weight);
        let Some(cluster) = cluster else {
            fates.fail(weight, format!("{named} does not exist: {missing}"));
            return json!({"cluster": named, "percent": percent, "endpoints": [], "problem": format!("does not exist: {missing}")});
        };
        let endpoints = self.endpoints(cluster, head);
        fates.add(weight, &endpoints);
        json!({"cluster": cluster.id.to_string(), "percent": percent, "endpoints": endpoints})
    }

    /// Endpoints that the client's requests may go to as things are.
    fn within_reach(self, cluster: &Cluster) -> HashSet<SocketAddr> {
        let now = Instant::now();
        let ejected = cluster.endpoints.iter().map(|e| e.address).filter(|a| (self.ejected)(self.source, &cluster.id, *a));
        let ejected = ejected.map(|a| (a, now + Duration::from_secs(1))).collect::<Vec<_>>();
        let client = self.source.ips.iter().copied().find(|ip| ip.is_ipv4() == self.dialled.is_ipv4()).unwrap_or(self.dialled.ip());
        let asker = outbound::asker(self.source, &self.source.node, client, (0, &ejected));
        crate::balance::within_reach(cluster, &asker).into_iter().map(|e| e.address).collect()
    }

    /// The endpoints of a cluster, and what policy says at each.
    fn endpoints(self, cluster: &Cluster, head: Option<&RequestHead>) -> Vec<Value> {
        let asked = self.asked(head);
        let used = self.within_reach(cluster);
        // An endpoint that is dialled by its own address is not balanced.
        let alone = cluster.policy.balancer == Balancer::Passthrough && cluster.endpoints.iter().any(|e| e.address == self.dialled);
        let one = |e: &Endpoint| {
            let mut one = match self.snapshot.workload_by_ip(e.address.ip()) {
                Some(workload) => asked.at_endpoint(e.address, workload),
                None => {
                    json!({"address": e.address, "workload": Value::Null, "decision": "allowed", "reason": "not in the mesh: no policy is asked"})
                }
            };
            one["ready"] = e.ready.into();
            let ejected = !alone && (self.ejected)(self.source, &cluster.id, e.address);
            one["used"] = (alone || used.contains(&e.address)).into();
            if ejected {
                one["ejected"] = true.into();
            }
            one
        };
        cluster.endpoints.iter().filter(|e| !alone || e.address == self.dialled).map(one).collect()
    }
}

/// What an abort answers.
fn told(abort: Abort) -> String {
    match abort {
        Abort::Http(status) => status.as_u16().to_string(),
        Abort::Grpc(code) => format!("gRPC status {code}"),
    }
}

/// A service as a client of a namespace names it: `name`, `name.namespace`, `namespace/name` or in full.
fn service_named<'s>(snapshot: &'s Snapshot, namespace: &str, text: &str) -> Result<&'s Arc<Service>, NoAnswer> {
    let labels = text.trim_end_matches('.').split('.').collect::<Vec<_>>();
    let (namespace, name) = match (text.split_once('/'), labels.as_slice()) {
        (Some(both), _) => both,
        (None, [name]) => (namespace, *name),
        (None, [name, namespace] | [name, namespace, "svc"] | [name, namespace, "svc", "cluster", "local"]) => (*namespace, *name),
        (None, _) => return Err(format!("to: {text} is no Service's name; say an address to ask about hosts outside the mesh").into()),
    };
    let found = snapshot.services().iter().find(|s| *s.name.namespace == *namespace && *s.name.name == *name);
    found.ok_or_else(|| {
        let near = crate::admin::names::near(&format!("{namespace}/{name}"), snapshot.services().iter().map(|s| s.name.to_string()));
        let elsewhere = if text.contains('.') { "; of a host outside the mesh say the address" } else { "" };
        NoAnswer::Missing(format!("to: there is no service {namespace}/{name}{near}{elsewhere}"))
    })
}
