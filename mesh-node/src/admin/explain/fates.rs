//! What becomes of requests or connections at the endpoints they may go to, and all of it in one line.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use serde_json::{Value, json};

use crate::{
    admin::authorization,
    config::Snapshot,
    detect::Protocol,
    policy::{Facts, Request, Sni, Verified, WorkloadPolicy, received, unsatisfied},
    proxy::http::gate::remote,
    route::{
        Workload,
        request::{RequestHead, renormalised},
    },
};

/// What is asked at an endpoint.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub snapshot: &'a Snapshot,
    pub source: &'a Workload,
    pub sni: Option<&'a Arc<str>>,
    pub claims: Option<&'a str>,
    /// As it was sent there; none of a connection.
    pub head: Option<&'a RequestHead>,
}

impl Asked<'_> {
    /// What policy says at an endpoint.
    pub fn at_endpoint(self, to: SocketAddr, workload: &Workload) -> Value {
        let same_node = workload.node == self.source.node;
        let path = match (workload.enrolled, self.source.enrolled, same_node) {
            (false, ..) => "passthrough",
            (true, false, _) => "plaintext",
            (true, true, true) => "same_node",
            (true, true, false) => "tunnel",
        };
        let mut one = json!({"address": to, "workload": workload.name.to_string(), "node": &*workload.node, "path": path, "ready": true, "used": true});
        // A port that is declared to carry no HTTP is not looked into, whatever is sent.
        let looked_into = self.head.filter(|_| !matches!(workload.protocol(to.port()), Protocol::Tcp | Protocol::Tls));
        let (denied, reason, policy) = if workload.enrolled {
            Self { head: looked_into, ..self }.judged(to, &workload.policy)
        } else {
            (false, authorization::OUTSIDE.to_owned(), None)
        };
        one["decision"] = if denied { "denied" } else { "allowed" }.into();
        one["reason"] = reason.into();
        one["policy"] = json!(policy);
        one
    }

    /// Whether it is denied, why, and by which policy.
    pub fn judged(self, to: SocketAddr, policy: &WorkloadPolicy) -> (bool, String, Option<String>) {
        let Self { snapshot, source, .. } = self;
        if mesh_common::is_reserved_port(to.port()) {
            return (true, authorization::reserved(to.port()), None);
        }
        let own = source.ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).or(source.ips.first());
        let peer = source.enrolled.then(|| source.identity.clone());
        let mut facts = Facts::new(peer, own.copied().unwrap_or_else(|| to.ip()), to);
        facts.via_trusted_proxy = snapshot.mesh.is_trusted_proxy(facts.peer.as_ref(), facts.source);
        facts.sni = Sni::Read(self.sni.cloned());
        let head = self.head;
        let normal = match head.map(|head| renormalised(head, snapshot.normalization)) {
            None => None,
            Some(Ok(normal)) => normal,
            Some(Err(_)) => return (true, "answered 400: its path cannot be normalised".to_owned(), None),
        };
        let head = normal.as_ref().or(head);
        let rules = &policy.at(to.port()).authentication;
        // Where no tokens are taken, none is looked at. That it is JSON is known.
        let claims = self.claims.filter(|_| head.is_some() && !rules.is_empty());
        let verified = claims.and_then(|claims| Verified::assumed(rules, claims).ok().flatten());
        if claims.is_some() && verified.is_none() {
            return (true, "answered 401: it takes no tokens of the issuer that the claims name".to_owned(), None);
        }
        if let Some(rule) = unsatisfied(rules, verified.as_ref()).filter(|_| head.is_some()) {
            return (true, format!("answered 401: it wants a token of {}", authorization::issuer(rule)), None);
        }
        let received = head.map(|head| received(rules, verified.as_ref(), head));
        let request = received.as_ref().map(|head| Request::new(head, verified.as_ref(), remote(snapshot, &facts, &head.headers)));
        let can_be_asked = authorization::can_be_asked(snapshot, request.is_none());
        let explanation = policy.explain(&facts, request.as_ref(), can_be_asked);
        let by = explanation.denied.as_ref().map(|d| d.policy().to_owned()).or(explanation.rule.as_deref().map(str::to_owned));
        let allowed = explanation.rule.as_deref().filter(|_| explanation.denied.is_none()).map(|rule| format!(", and {rule} allows it"));
        (explanation.denied.is_some(), authorization::reason(&explanation) + &allowed.unwrap_or_default(), by)
    }
}

/// How a policy's refusal is told, and what is said of other refusals.
const BY_POLICY: &str = "answered 403, or reset if it is no request";
const DENIED_AS: [&str; 2] = ["answered ", "belongs to the mesh"];

/// What becomes of all there is, by weight.
#[derive(Debug, Default)]
pub(super) struct Fates {
    total: u64,
    /// Endpoints that are used.
    usable: usize,
    denied: usize,
    /// What those answer that deny, where it is told.
    answers: BTreeSet<String>,
    /// What fails whichever endpoint there were.
    failing: Vec<(u32, String)>,
}

impl Fates {
    /// Of destinations with these weights.
    pub fn of(weights: impl Iterator<Item = u32>) -> Self {
        Self { total: weights.map(u64::from).sum(), ..Self::default() }
    }

    pub fn percent(&self, weight: u32) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a share in percent needs no more")]
        let share = f64::from(weight) * 100.0 / self.total.max(1) as f64;
        (share * 100.0).round() / 100.0
    }

    /// What goes to these endpoints.
    pub fn add(&mut self, weight: u32, endpoints: &[Value]) {
        if weight == 0 {
            return;
        }
        let used = endpoints.iter().filter(|e| e["used"] == true).collect::<Vec<_>>();
        if used.is_empty() {
            // What is ready is of other nodes.
            let elsewhere = endpoints.iter().any(|e| e["ready"] == true);
            let why = if endpoints.iter().any(|e| e["ejected"] == true) {
                "every endpoint that could be used is ejected (outlierDetection)"
            } else if elsewhere {
                "no endpoint of the client's node is ready, and internalTrafficPolicy is Local"
            } else {
                "no endpoint is ready"
            };
            return self.fail(weight, format!("{why}: answered 503 (UH), or reset if it is no request"));
        }
        self.usable += used.len();
        let denied = used.iter().filter(|e| e["decision"] == "denied").collect::<Vec<_>>();
        self.denied += denied.len();
        let answers = |reason: &str| DENIED_AS.iter().any(|way| reason.contains(way)).then(|| reason.to_owned());
        let answers = denied.iter().map(|e| e["reason"].as_str().and_then(answers).unwrap_or_else(|| BY_POLICY.to_owned()));
        self.answers.extend(answers);
    }

    /// What goes nowhere.
    pub fn fail(&mut self, weight: u32, what: String) {
        if weight > 0 {
            self.failing.push((weight, what));
        }
    }

    /// One line of it all, and whether everything is allowed. `abort`: what a fault answers to how many of a hundred.
    pub fn tell(self, abort: Option<(String, f64)>, answer: &mut Value) {
        let of_endpoints = match (self.usable, self.denied) {
            (1, 0) => "allowed, at its one endpoint".to_owned(),
            (n, 0) => format!("allowed at all of {n} endpoints, of which one is chosen"),
            (n, d) if n == d => {
                let answers = self.answers.iter().map(String::as_str).collect::<Vec<_>>();
                format!("denied at every endpoint: {}", answers.join("; "))
            }
            (n, d) => format!("denied at {d} of {n} endpoints"),
        };
        let mut allowed = self.failing.is_empty() && self.denied == 0;
        let mut texts = self.failing.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>();
        texts.dedup();
        let mut verdict = match (texts.as_slice(), self.usable) {
            ([], _) => of_endpoints,
            (texts, 0) => texts.join("; "),
            (texts, _) => {
                let failing = self.failing.iter().map(|(weight, _)| self.percent(*weight)).sum::<f64>();
                format!("{failing}% fail ({}); of the rest: {of_endpoints}", texts.join("; "))
            }
        };
        if let Some((status, percent)) = abort.filter(|(_, percent)| *percent > 0.0) {
            allowed = false;
            verdict = if percent >= 100.0 {
                format!("answered {status} by the route's fault")
            } else {
                format!("{percent}% are answered {status} by the route's fault; of the rest: {verdict}")
            };
        }
        answer["allowed"] = allowed.into();
        answer["verdict"] = verdict.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_part_of_the_verdict() {
        let endpoint = |decision: &str, used: bool| json!({"decision": decision, "used": used});
        let (yes, no, unused) = (endpoint("allowed", true), endpoint("denied", true), endpoint("denied", false));
        let told = |weights: &[u32], fill: &dyn Fn(&mut Fates), abort: Option<(&str, f64)>| {
            let mut fates = Fates::of(weights.iter().copied());
            fill(&mut fates);
            let mut answer = json!({});
            fates.tell(abort.map(|(status, percent)| (status.to_owned(), percent)), &mut answer);
            (answer["allowed"] == true, answer["verdict"].as_str().unwrap_or_default().to_owned())
        };
        assert_eq!(
            told(&[1], &|f| f.add(1, &[yes.clone(), unused.clone(), yes.clone()]), None),
            (true, "allowed at all of 2 endpoints, of which one is chosen".to_owned())
        );
        assert_eq!(told(&[1], &|f| f.add(1, &[yes.clone(), no.clone()]), None), (false, "denied at 1 of 2 endpoints".to_owned()));
        // One in a thousand counts, and what has no share does not.
        let canary = |f: &mut Fates| {
            f.add(999, std::slice::from_ref(&yes));
            f.add(1, std::slice::from_ref(&no));
        };
        assert_eq!(told(&[999, 1], &canary, None), (false, "denied at 1 of 2 endpoints".to_owned()));
        let unweighted = |f: &mut Fates| {
            f.add(1, std::slice::from_ref(&yes));
            f.add(0, std::slice::from_ref(&no));
            f.fail(0, "gone".to_owned());
        };
        assert_eq!(told(&[1, 0], &unweighted, None), (true, "allowed, at its one endpoint".to_owned()));
        let half = |f: &mut Fates| {
            f.add(50, std::slice::from_ref(&yes));
            f.fail(50, "nowhere does not exist: answered 503".to_owned());
        };
        assert_eq!(
            told(&[50, 50], &half, None),
            (false, "50% fail (nowhere does not exist: answered 503); of the rest: allowed, at its one endpoint".to_owned())
        );
        let empty = |f: &mut Fates| f.add(1, std::slice::from_ref(&unused));
        assert!(told(&[1], &empty, None).1.starts_with("no endpoint is ready"));
        let elsewhere = json!({"used": false, "ready": true, "decision": "allowed"});
        assert!(told(&[1], &|f| f.add(1, std::slice::from_ref(&elsewhere)), None).1.contains("internalTrafficPolicy"));
        assert_eq!(told(&[50, 50], &half, Some(("503", 100.0))), (false, "answered 503 by the route's fault".to_owned()));
        let some = told(&[1], &|f| f.add(1, std::slice::from_ref(&yes)), Some(("gRPC status 14", 0.5)));
        assert_eq!(
            some,
            (false, "0.5% are answered gRPC status 14 by the route's fault; of the rest: allowed, at its one endpoint".to_owned())
        );
    }
}
