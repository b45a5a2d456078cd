//! What would become of a request or a connection: which service and route, which endpoints, and which policy would decide at each.
//! Asked of the configuration in force; nothing is sent.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};
use serde_json::{Value, json};

use super::{authorization, query};
use crate::{
    config::{OutboundPolicy, Snapshot},
    detect::Protocol,
    policy::{Facts, Request, Sni, Verified, received},
    proxy::http::gate::remote,
    route::{
        Cluster, Service, ServicePort, Target, Workload,
        l4::L4Context,
        matching::Context,
        request::{RequestHead, Scheme, renormalised},
        rule::{Action, Rule},
        table::ResolvedRule,
    },
};

#[derive(Debug, Default)]
struct Question {
    from: String,
    to: String,
    method: Option<Method>,
    path: Option<PathAndQuery>,
    headers: HeaderMap,
    claims: Option<String>,
    sni: Option<Arc<str>>,
}

/// What is asked at an endpoint.
#[derive(Clone, Copy)]
struct Asked<'a> {
    question: &'a Question,
    /// None of a connection.
    head: Option<&'a RequestHead>,
}

/// Answers, or says which parameter is wrong.
pub(super) fn answer(snapshot: &Snapshot, query: &str) -> Result<Value, String> {
    let question = Question::read(query)?;
    let source = authorization::find(snapshot, &question.from).ok_or_else(|| authorization::unknown("from", &question.from))?;
    let (dialled, host) = question.dialled(snapshot, source)?;
    let mut answer = json!({"from": {"workload": source.name.to_string(), "identity": source.identity.to_string(), "enrolled": source.enrolled},
        "dialled": dialled});
    if !source.enrolled {
        answer["verdict"] = format!("{} is not in the mesh: its connections are not touched", source.name).into();
        return Ok(answer);
    }
    match snapshot.resolve_for(&source.name.namespace, dialled) {
        Target::Service { service, port } => question.to_service(snapshot, source, (service, port), (dialled, &host), &mut answer)?,
        Target::NoSuchPort(service) => {
            answer["verdict"] = format!("{} has no port {}: the connection is reset", service.name, dialled.port()).into();
        }
        Target::Workload(workload) => {
            answer["endpoints"] = json!([at_endpoint(snapshot, source, dialled, workload, Asked { question: &question, head: None })]);
            answer["verdict"] = "straight to the pod, as a connection: no service is meant, so nothing is routed".into();
        }
        Target::Unknown if snapshot.mesh.outbound == OutboundPolicy::RegistryOnly => {
            answer["verdict"] = "not part of the mesh, and REGISTRY_ONLY is in force: the connection is reset".into();
        }
        Target::Unknown => answer["verdict"] = "not part of the mesh: the connection passes unchanged".into(),
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
    fn dialled(&self, snapshot: &Snapshot, source: &Workload) -> Result<(SocketAddr, String), String> {
        if let Ok(address) = self.to.parse::<SocketAddr>() {
            return Ok((address, self.to.clone()));
        }
        let (name, port) = self.to.rsplit_once(':').ok_or_else(|| format!("to: {:?} is not service:port or address:port", self.to))?;
        let port: u16 = port.parse().map_err(|_| format!("to: {port:?} is not a port"))?;
        let service = service_named(snapshot, &source.name.namespace, name)?;
        let v4 = source.ips.first().is_none_or(std::net::IpAddr::is_ipv4);
        let vip = service.vips.iter().find(|ip| ip.is_ipv4() == v4).or(service.vips.first());
        let headless = || service.port(port).and_then(|p| p.cluster.endpoints.first()).map(|e| e.address.ip());
        let ip = vip.copied().or_else(headless).ok_or_else(|| format!("to: {} has no address", service.name))?;
        Ok((SocketAddr::new(ip, port), name.to_owned()))
    }

    fn to_service(
        &self,
        snapshot: &Snapshot,
        source: &Arc<Workload>,
        (service, port): (&Service, &ServicePort),
        (dialled, host): (SocketAddr, &str),
        answer: &mut Value,
    ) -> Result<(), String> {
        let protocol = port.cluster.protocol;
        answer["service"] =
            json!({"name": service.name.to_string(), "port": port.port, "protocol": format!("{protocol:?}").to_lowercase()});
        if matches!(protocol, Protocol::Tcp | Protocol::Tls) {
            let client = source.ips.first().copied().unwrap_or_else(|| dialled.ip());
            let routed = port.routes.find_l4(L4Context { source, client, destination: dialled, sni: self.sni.as_deref() }, 0);
            let Some(cluster) = routed.unwrap_or(Some(&port.cluster)) else {
                answer["verdict"] = "the route's destination does not exist: the connection is reset".into();
                return Ok(());
            };
            answer["route"] =
                json!({"from": Value::Null, "rule": if routed.is_some() { "a tcp or tls route" } else { "none: the service itself" }});
            answer["endpoints"] = endpoints(snapshot, source, cluster, Asked { question: self, head: None });
            answer["verdict"] = verdict(&answer["endpoints"]).into();
            return Ok(());
        }
        let mut head = self.head(host, dialled)?;
        if let Some(normal) = renormalised(&head, snapshot.normalization).map_err(|_| "path: cannot be normalised: answered 400")? {
            head = normal;
        }
        answer["request"] = json!({"method": head.method.as_str(), "host": head.host(), "path": head.target.as_str()});
        let asked = Asked { question: self, head: Some(&head) };
        let Some(table) = &port.routes.http else {
            answer["route"] = json!({"from": Value::Null, "rule": "none: the service itself"});
            answer["endpoints"] = endpoints(snapshot, source, &port.cluster, asked);
            answer["verdict"] = verdict(&answer["endpoints"]).into();
            return Ok(());
        };
        let rules = snapshot.tokens_of(&port.cluster);
        let assumed = self.claims.as_ref().filter(|_| table.asks_tokens(rules)).map(|claims| Verified::assumed(rules, claims));
        let verified = assumed.and_then(|assumed| assumed.ok().flatten());
        if self.claims.is_some() && table.asks_tokens(rules) && verified.is_none() {
            answer["route"] = json!({"from": &*table.origin, "rule": Value::Null});
            answer["verdict"] = "the destination takes no tokens of the issuer that the claims name: answered 401".into();
            return Ok(());
        }
        let seen = received(rules, verified.as_ref(), &head);
        let Some(found) = table.find(&seen, Context { source, port: port.port, claims: verified.as_ref() }) else {
            answer["route"] = json!({"from": &*table.origin, "rule": Value::Null});
            answer["verdict"] = "no rule takes it: answered 404 (NR)".into();
            return Ok(());
        };
        let number = table.rules.iter().position(|r| std::ptr::eq(r, found.resolved)).map(|n| n + 1);
        routed(snapshot, source, found.resolved, asked, answer);
        answer["route"]["from"] = (*table.origin).into();
        answer["route"]["rule"] = json!(number);
        Ok(())
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
            target: self.path.clone().unwrap_or_else(|| PathAndQuery::from_static("/")),
            headers,
        })
    }
}

/// A service as a client of a namespace names it: `name`, `name.namespace`, `namespace/name` or in full.
fn service_named<'s>(snapshot: &'s Snapshot, namespace: &str, text: &str) -> Result<&'s Arc<Service>, String> {
    let mut labels = text.split('.');
    let name = labels.next().unwrap_or_default();
    let by_dots = (labels.next().unwrap_or(namespace), name);
    let (namespace, name) = text.split_once('/').unwrap_or(by_dots);
    let found = snapshot.services().iter().find(|s| *s.name.namespace == *namespace && *s.name.name == *name);
    found.ok_or_else(|| format!("to: there is no service {namespace}/{name}"))
}

/// Says what a rule does with a request.
fn routed(snapshot: &Snapshot, source: &Arc<Workload>, resolved: &ResolvedRule, asked: Asked<'_>, answer: &mut Value) {
    let rule: &Rule = &resolved.rule;
    answer["route"] = json!({
        "name": &*rule.name, "matches": rule.matches.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "timeoutMilliseconds": rule.timeout.map(|t| t.as_millis()), "attempts": rule.retries.as_ref().map(|r| r.attempts),
        "mirrors": resolved.mirrors.iter().flatten().map(|c| c.id.to_string()).collect::<Vec<_>>(),
        "fault": {"delayMilliseconds": rule.fault.delay.map(|(d, _)| d.as_millis()), "aborts": rule.fault.abort.is_some()},
    });
    match &rule.action {
        Action::Redirect(redirect) => answer["verdict"] = format!("answered {} with a redirect", redirect.status.as_u16()).into(),
        Action::Respond(response) => answer["verdict"] = format!("answered {} by the route", response.status.as_u16()).into(),
        Action::Delegate { .. } => {
            answer["verdict"] = format!("answered {}: the delegate does not exist", rule.missing_status.as_u16()).into();
        }
        Action::Forward(all) => {
            let total: u64 = all.iter().map(|d| u64::from(d.weight)).sum();
            let mut found = Vec::new();
            for (weighted, cluster) in all.iter().zip(&resolved.destinations) {
                let share = (u64::from(weighted.weight) * 100).checked_div(total).unwrap_or(0);
                found.push(match cluster {
                    Some(cluster) => json!({"cluster": cluster.id.to_string(), "percent": share,
                        "endpoints": endpoints(snapshot, source, cluster, asked)}),
                    None => json!({"cluster": format!("{}{}", weighted.destination.host, weighted.destination.subset), "percent": share,
                        "endpoints": [], "problem": format!("does not exist: answered {}", rule.missing_status.as_u16())}),
                });
            }
            let reached = found.iter().filter(|d| d["percent"] != 0).flat_map(|d| d["endpoints"].as_array().cloned().unwrap_or_default());
            answer["verdict"] = verdict(&reached.collect()).into();
            answer["destinations"] = found.into();
        }
    }
}

/// The endpoints of a cluster, and what policy says at each.
fn endpoints(snapshot: &Snapshot, source: &Arc<Workload>, cluster: &Cluster, asked: Asked<'_>) -> Value {
    let one = |e: &crate::route::Endpoint| match snapshot.workload_by_ip(e.address.ip()) {
        Some(workload) => {
            let mut one = at_endpoint(snapshot, source, e.address, workload, asked);
            one["ready"] = e.ready.into();
            one
        }
        None => {
            json!({"address": e.address, "workload": Value::Null, "ready": e.ready, "decision": "allowed", "reason": "not in the mesh: no policy is asked"})
        }
    };
    cluster.endpoints.iter().map(one).collect()
}

fn at_endpoint(snapshot: &Snapshot, source: &Workload, to: SocketAddr, workload: &Workload, asked: Asked<'_>) -> Value {
    let own = source.ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).or(source.ips.first());
    let mut facts = Facts::new(workload.enrolled.then(|| source.identity.clone()), own.copied().unwrap_or_else(|| to.ip()), to);
    facts.proxy = snapshot.mesh.is_trusted_proxy(facts.peer.as_ref(), facts.source);
    facts.sni = Sni::Read(asked.question.sni.clone());
    let same_node = workload.node == source.node;
    let mut one = json!({
        "address": to, "workload": workload.name.to_string(), "node": &*workload.node,
        "path": match (workload.enrolled, same_node) { (false, _) => "passthrough", (true, true) => "same_node", (true, false) => "tunnel" },
    });
    if !workload.enrolled {
        one["decision"] = "allowed".into();
        one["reason"] = "not in the mesh: no policy is asked".into();
        return one;
    }
    let rules = &workload.policy.at(to.port()).authentication;
    // Where no tokens are taken, none is looked at. That it is JSON is known.
    let claims = asked.question.claims.as_ref().filter(|_| asked.head.is_some() && !rules.is_empty());
    let verified = claims.and_then(|claims| Verified::assumed(rules, claims).ok().flatten());
    if claims.is_some() && verified.is_none() {
        one["decision"] = "denied".into();
        one["reason"] = "answered 401: it takes no tokens of the issuer that the claims name".into();
        return one;
    }
    let received = asked.head.map(|head| received(rules, verified.as_ref(), head));
    let request = received.as_ref().map(|head| Request::new(head, verified.as_ref(), remote(snapshot, &facts, &head.headers)));
    let explanation = workload.policy.explain(&facts, request.as_ref(), |provider| snapshot.authorizers.contains_key(provider));
    one["decision"] = if explanation.denied.is_none() { "allowed" } else { "denied" }.into();
    one["reason"] = authorization::reason(&explanation).into();
    one["policy"] = json!(explanation.denied.as_ref().map(|d| d.policy().to_owned()).or(explanation.rule.as_deref().map(str::to_owned)));
    one
}

/// One line of all endpoints.
fn verdict(endpoints: &Value) -> String {
    let all = endpoints.as_array().map(Vec::as_slice).unwrap_or_default();
    let usable = all.iter().filter(|e| e["ready"] != false).collect::<Vec<_>>();
    let denied = usable.iter().filter(|e| e["decision"] == "denied").count();
    match (usable.len(), denied) {
        (0, _) => "no endpoint is ready: answered 503 (UH), or reset if it is no request".to_owned(),
        (n, 0) => format!("allowed, at one of {n} endpoints"),
        (n, d) if n == d => "denied at every endpoint: answered 403, or reset if it is no request".to_owned(),
        (n, d) => format!("denied at {d} of {n} endpoints"),
    }
}
