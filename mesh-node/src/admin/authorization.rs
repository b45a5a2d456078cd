//! Which policy would decide on a request or a connection, asked of the configuration in force. Nothing is sent.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderMap, HeaderValue, Method};
use serde_json::{Value, json};

use super::{NoAnswer, names::near, query};
use crate::{
    config::Snapshot,
    detect::Protocol,
    policy::{Explanation, Facts, Request, Sni, Verified, unsatisfied},
    proxy::http::gate::remote,
    resource::{mesh_config::Check, request_authentication::JwtRule},
    route::{
        Workload,
        request::{RequestHead, Scheme, renormalised},
        target::RequestTarget,
    },
};

/// A question, from the query of a URL.
#[derive(Debug, Default)]
struct Question {
    to: String,
    port: u16,
    from: String,
    plaintext: bool,
    method: Option<Method>,
    path: Option<RequestTarget>,
    host: Option<HeaderValue>,
    headers: HeaderMap,
    claims: Option<String>,
    sni: Option<String>,
}

/// Answers, or says which parameter is wrong.
pub fn answer(snapshot: &Snapshot, query: &str) -> Result<Value, NoAnswer> {
    let question = Question::read(query)?;
    let (source, peer) = question.source(snapshot)?;
    let destination = find(snapshot, &question.to).ok_or_else(|| NoAnswer::Missing(unknown(snapshot, "to", &question.to)))?;
    let to = destination.ips.iter().find(|ip| ip.is_ipv4() == source.is_ipv4()).or(destination.ips.first());
    let to = SocketAddr::new(*to.ok_or_else(|| format!("to: {} has no address", question.to))?, question.port);
    let peer = peer.filter(|w| w.enrolled && destination.enrolled && !question.plaintext).map(|w| w.identity.clone());
    let mut facts = Facts::new(peer, source, to);
    facts.via_trusted_proxy = snapshot.mesh.is_trusted_proxy(facts.peer.as_ref(), source);
    let claims = question.claims(destination)?;
    let protocol = destination.protocol(question.port);
    let opaque = matches!(protocol, Protocol::Tcp | Protocol::Tls);
    facts.sni = Sni::Read(question.sni.as_deref().map(Arc::from));
    let head = question.head(to)?.filter(|_| !opaque);
    let head = match head {
        Some(head) => {
            let normal = renormalised(&head, snapshot.normalization).map_err(|_| "path: cannot be normalised: answered 400")?;
            Some(normal.unwrap_or(head))
        }
        None => None,
    };
    if let Some(rule) = unsatisfied(&destination.policy.at(question.port).authentication, claims.as_ref()).filter(|_| head.is_some()) {
        let problem =
            format!("claims: {} wants a token of {}, without which it answers 401; give its claims", destination.name, issuer(rule));
        return Err(problem.into());
    }
    let request = head.as_ref().map(|head| Request::new(head, claims.as_ref(), remote(snapshot, &facts, &head.headers)));
    let connection = request.is_none();
    let explanation = destination.policy.explain(&facts, request.as_ref(), can_be_asked(snapshot, connection));
    let mut answer = json!({
        "from": {"address": source, "identity": facts.peer.as_ref().map(ToString::to_string)},
        "to": {"workload": destination.name.to_string(), "address": to, "enrolled": destination.enrolled},
        "port": format!("{protocol:?}").to_lowercase(),
        "judged": if connection { "connection" } else { "request" },
        "request": head.map(|h| json!({"method": h.method.as_str(), "host": h.host(), "path": h.target.as_str()})),
        "decision": if explanation.denied.is_none() { "allowed" } else { "denied" },
        "reason": reason(&explanation),
        "policy": explanation.denied.as_ref().map(|d| d.policy().to_owned()),
        "details": explanation.denied.as_ref().map(crate::policy::Denial::details),
        "allowedBy": explanation.rule.as_deref(),
        "externalAuthorizers": explanation.asked.iter().map(|(provider, policy)| json!({"provider": &**provider, "policy": &**policy})).collect::<Vec<_>>(),
        "audited": explanation.observed.audited.as_deref(),
        "dryRun": explanation.observed.shadow.as_ref().map(|s| json!({"decision": if s.allowed { "allowed" } else { "denied" }, "policy": &*s.policy})),
    });
    if destination.enrolled && mesh_common::is_reserved_port(question.port) {
        for (field, value) in [("decision", "denied".into()), ("reason", reserved(question.port).into()), ("judged", "connection".into())] {
            answer[field] = value;
        }
        for field in ["policy", "details", "allowedBy", "request"] {
            answer[field] = Value::Null;
        }
    }
    if !destination.enrolled {
        for (field, value) in [("decision", "allowed".into()), ("reason", OUTSIDE.into()), ("judged", "nothing".into())] {
            answer[field] = value;
        }
        for field in ["policy", "details", "allowedBy", "audited", "dryRun"] {
            answer[field] = Value::Null;
        }
        answer["externalAuthorizers"] = json!([]);
    }
    Ok(answer)
}

/// Why nobody is let in on a port.
pub(super) fn reserved(port: u16) -> String {
    format!("port {port} belongs to the mesh itself: whoever dials it is reset")
}

/// Why what is not in the mesh denies nothing.
pub(super) const OUTSIDE: &str = "not in the mesh: no policy is asked";

/// Which authorizers can be asked about connections that carry no HTTP, or about requests.
pub(super) fn can_be_asked(snapshot: &Snapshot, connection: bool) -> impl Fn(&str) -> bool {
    move |provider| snapshot.authorizers.get(provider).is_some_and(|a| !connection || a.check == Check::Grpc)
}

pub(super) fn reason(explanation: &Explanation) -> String {
    match (&explanation.denied, explanation.asked.is_empty()) {
        (Some(denial), _) => denial.to_string(),
        (None, true) => "no policy denies it".to_owned(),
        (None, false) => "no policy denies it, if the external authorizers allow it".to_owned(),
    }
}

impl Question {
    fn read(query: &str) -> Result<Self, String> {
        let mut question = Self::default();
        for (name, value) in query::pairs(query)? {
            question.take(name, value)?;
        }
        for (name, missing) in [("to", question.to.is_empty()), ("port", question.port == 0), ("from", question.from.is_empty())] {
            if missing {
                return Err(format!(
                    "{name}: is missing; say to, port and from, and of a request method, path, host, header, claims; of TLS sni"
                ));
            }
        }
        Ok(question)
    }

    fn take(&mut self, name: &str, value: String) -> Result<(), String> {
        let bad = |wanted: &str| format!("{name}: {value:?} is not {wanted}");
        match name {
            "port" => self.port = value.parse().map_err(|_| bad("a port"))?,
            "plaintext" => self.plaintext = value != "false",
            "method" => self.method = Some(value.parse().map_err(|_| bad("a method"))?),
            "path" => self.path = Some(value.parse().map_err(|_| bad("a path"))?),
            "host" => self.host = Some(value.parse().map_err(|_| bad("a host"))?),
            "header" => {
                let (key, text) = query::header(&value).ok_or_else(|| bad("`name: value`"))?;
                self.headers.append(key, text);
            }
            "to" => self.to = value,
            "from" => self.from = value,
            "claims" => self.claims = Some(value),
            "sni" => self.sni = Some(value),
            _ => return Err(format!("{name}: is not known; to, port, from, plaintext, method, path, host, header, claims and sni are")),
        }
        Ok(())
    }

    /// Where it comes from, and which workload that is.
    fn source<'s>(&self, snapshot: &'s Snapshot) -> Result<(IpAddr, Option<&'s Arc<Workload>>), NoAnswer> {
        let workload = find(snapshot, &self.from);
        let address = self.from.parse().ok().or_else(|| workload?.ips.first().copied());
        address.map(|ip: IpAddr| (ip.to_canonical(), workload)).ok_or_else(|| NoAnswer::Missing(unknown(snapshot, "from", &self.from)))
    }

    /// The request, if one is described.
    fn head(&self, to: SocketAddr) -> Result<Option<RequestHead>, String> {
        if self.method.is_none() && self.path.is_none() && self.host.is_none() && self.headers.is_empty() && self.claims.is_none() {
            return Ok(None);
        }
        let authority = match &self.host {
            Some(host) => host.clone(),
            None => HeaderValue::try_from(to.to_string()).map_err(|e| e.to_string())?,
        };
        Ok(Some(RequestHead {
            method: self.method.clone().unwrap_or_default(),
            scheme: Scheme::Http,
            authority,
            target: self.path.clone().unwrap_or_else(|| RequestTarget::from_static("/")),
            headers: self.headers.clone(),
        }))
    }

    fn claims(&self, destination: &Workload) -> Result<Option<Verified>, String> {
        let Some(claims) = &self.claims else { return Ok(None) };
        let rules = &destination.policy.at(self.port).authentication;
        let verified = Verified::assumed(rules, claims).map_err(|e| format!("claims: {e}"))?;
        verified.map(Some).ok_or_else(|| {
            let issuers = rules.iter().map(|r| &*r.issuer).filter(|issuer| !issuer.is_empty()).collect::<Vec<_>>();
            format!("claims: `iss` has to be an issuer that {} takes tokens of: {}", destination.name, issuers.join(", "))
        })
    }
}

/// Whose tokens a rule is about, in words.
pub(super) fn issuer(rule: &JwtRule) -> &str {
    if rule.issuer.is_empty() { "any issuer" } else { &rule.issuer }
}

/// A workload by an address of its, or by `namespace/name`.
pub(super) fn find<'s>(snapshot: &'s Snapshot, text: &str) -> Option<&'s Arc<Workload>> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return snapshot.workload_by_ip(ip.to_canonical());
    }
    if let Some((namespace, name)) = text.split_once('/') {
        return snapshot.workloads().find(|w| &*w.name.namespace == namespace && &*w.name.name == name);
    }
    // A name alone is one that a single namespace has, or one of the namespace `default`.
    let mut named = snapshot.workloads().filter(|w| *w.name.name == *text);
    let (first, more) = (named.next()?, named.next());
    if more.is_none() { Some(first) } else { [first].into_iter().chain(more).chain(named).find(|w| &*w.name.namespace == "default") }
}

/// What to say of a workload that [`find`] does not find.
pub(super) fn unknown(snapshot: &Snapshot, field: &str, text: &str) -> String {
    let near = near(text, snapshot.workloads().map(|w| w.name.to_string()));
    format!("{field}: there is no workload {text:?}{near}; say an address, or namespace/name of a pod as meshctl workloads lists them")
}

#[cfg(test)]
mod tests;
