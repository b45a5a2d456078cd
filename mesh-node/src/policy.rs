//! Who may reach a workload: mutual TLS mode, tokens of end users and authorization, as pure functions of what is known of a
//! connection and of a request on it.
//!
//! Semantics are Istio's: `PeerAuthentication` in ambient mode (STRICT refuses peers without an identity, DISABLE acts as
//! PERMISSIVE, narrower scope wins, oldest of a scope wins), `RequestAuthentication`, and `AuthorizationPolicy` (any matching
//! DENY denies; without an ALLOW policy everything else is allowed; otherwise some ALLOW must match).
//!
//! A connection is judged when it comes ([`Governing::connection`]). Where that is not enough, because a policy asks about
//! requests, every request is ([`Governing::request`]); a connection that carries none is judged without them
//! ([`Governing::opaque`]): what cannot be known never lets anything through. Only this module makes a [`Permit`].

mod authentication;
mod compile;
mod index;
mod matching;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderName, HeaderValue};

pub use authentication::{Authenticated, Found, Refused, Verified, claim_text, locate, needs_keys, received, strip, unsatisfied};
pub use compile::{Allow, Authorization, CompiledPolicy, TrustDomains, effective_mtls};
pub use index::RuleSet;
use matching::{Seen, Truth, View};

use crate::{
    id::{ObjectName, SpiffeId},
    resource::{paths::PathPattern, request_authentication::JwtRule},
    route::request::{RequestHead, other_readings},
};

/// What is known of a connection that wants in. All of it is verified: the identity by TLS or by the kernel.
#[derive(Debug, Clone)]
pub struct Facts {
    pub peer: Option<SpiffeId>,
    /// The client's own address.
    pub source: IpAddr,
    /// The application's address and port.
    pub destination: SocketAddr,
    /// The kernel vouches that it comes from the pod's own node, outside of any pod: the kubelet and its probes.
    pub from_node: bool,
    /// It is a proxy whose word about its clients' addresses counts.
    pub via_trusted_proxy: bool,
    pub sni: Sni,
    /// The service the client has dialled, as far as it says so.
    pub dialled: Option<ObjectName>,
}

/// The server name in the application's own TLS.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Sni {
    /// Not looked at yet.
    #[default]
    Unread,
    Read(Option<Arc<str>>),
}

impl Facts {
    /// A connection from another pod, or from outside.
    pub fn new(peer: Option<SpiffeId>, source: IpAddr, destination: SocketAddr) -> Self {
        Self { peer, source, destination, from_node: false, via_trusted_proxy: false, sni: Sni::default(), dialled: None }
    }
}

/// What is known of a request on a connection.
#[derive(Debug)]
pub struct Request<'a> {
    pub head: &'a RequestHead,
    /// From a token that was verified.
    pub claims: Option<&'a Verified>,
    /// The client's address for `remote.ip`. `None`: a trusted proxy sent an `x-forwarded-for` that cannot be read.
    pub remote: Option<IpAddr>,
    /// A header the application gets beside those of the head.
    pub also: Option<(&'static HeaderName, &'a HeaderValue)>,
    /// How an application may read the path, beside as it is written. Istio compares the path as written; an application
    /// that merges slashes, decodes `%2f` or drops `;parameters` sees another one, and a policy that only knew the first could
    /// be walked around.
    readings: Vec<String>,
}

impl<'a> Request<'a> {
    pub fn new(head: &'a RequestHead, claims: Option<&'a Verified>, remote: Option<IpAddr>) -> Self {
        Self { head, claims, remote, also: None, readings: other_readings(head.path()) }
    }

    /// Every value of a header.
    fn header(&self, name: &HeaderName) -> impl Iterator<Item = &HeaderValue> {
        let also = self.also.filter(|(other, _)| *other == name).map(|(_, value)| value);
        self.head.headers.get_all(name).iter().chain(also)
    }

    /// Whether a pattern matches the path, read so; in another reading than as it is written the pattern is read in others too.
    fn is_at(&self, pattern: &PathPattern, reading: Reading) -> bool {
        match reading.and_then(|n| self.readings.get(n)) {
            Some(other) => pattern.matches(other) || pattern.readings().iter().any(|pattern| pattern.matches(other)),
            None => pattern.matches(self.head.path()),
        }
    }
}

/// Which of the other readings of a path; none is as it is written.
type Reading = Option<usize>;

/// Proof that a connection was authorized; dialling the application takes one.
#[derive(Debug)]
pub struct Permit(());

/// What a connection may do.
#[derive(Debug)]
pub enum Verdict {
    /// Whatever is sent on it.
    Allowed(Permit),
    /// Only what is allowed of what is sent on it: it has to be looked into.
    PerRequest(Permit),
}

/// Why a connection or request is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("the peer presented no identity and mutual TLS is STRICT")]
    PlaintextUnderStrict,
    #[error("denied by AuthorizationPolicy {policy}")]
    DeniedBy { policy: Arc<str>, rule: Arc<str> },
    #[error("no AuthorizationPolicy allows it")]
    NotAllowed,
    /// An external authorizer said no, or could not be asked.
    #[error("not allowed by the external authorizer of AuthorizationPolicy {policy}")]
    External { policy: Arc<str>, details: &'static str },
}

impl Denial {
    /// As ztunnel's access log has it.
    pub fn reason(&self) -> String {
        match self {
            Self::PlaintextUnderStrict => "explicitly denied by: istio-system/istio_converted_static_strict".to_owned(),
            Self::DeniedBy { policy, .. } => format!("explicitly denied by: {policy}"),
            Self::NotAllowed => "allow policies exist, but none allowed".to_owned(),
            Self::External { .. } => self.to_string(),
        }
    }

    /// `response_code_details`, with the rule named as Istio does.
    pub fn details(&self) -> String {
        let rule = match self {
            Self::PlaintextUnderStrict => "istio_converted_static_strict",
            Self::DeniedBy { rule, .. } => rule,
            Self::NotAllowed => "none",
            Self::External { details, .. } => return (*details).to_owned(),
        };
        format!("rbac_access_denied_matched_policy[{rule}]")
    }

    /// The policy that decided, for metrics.
    pub fn policy(&self) -> &str {
        match self {
            Self::PlaintextUnderStrict => "PeerAuthentication",
            Self::DeniedBy { policy, .. } | Self::External { policy, .. } => policy,
            Self::NotAllowed => "none",
        }
    }
}

/// Whether plaintext is refused, by application port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mtls {
    pub strict: bool,
    /// Ports that differ from the workload's default.
    pub ports: BTreeMap<u16, bool>,
}

impl Mtls {
    pub fn is_strict(&self, port: u16) -> bool {
        self.ports.get(&port).copied().unwrap_or(self.strict)
    }
}

/// Everything that governs one workload.
#[derive(Debug, Clone, Default)]
pub struct WorkloadPolicy {
    pub mtls: Mtls,
    /// What governs ports no policy singles out.
    pub everywhere: Arc<Governing>,
    /// Ports that policies are attached to by the service that leads to them.
    pub ports: BTreeMap<u16, Arc<Governing>>,
}

/// The policies of one port.
#[derive(Debug, Clone, Default)]
pub struct Governing {
    pub authorization: Arc<Authorization>,
    pub authentication: Vec<Arc<JwtRule>>,
}

impl WorkloadPolicy {
    pub fn at(&self, port: u16) -> &Governing {
        self.ports.get(&port).unwrap_or(&self.everywhere)
    }

    /// Judges a connection by what is known before anything is read from it.
    pub fn connection(&self, facts: &Facts) -> Result<Verdict, Denial> {
        self.plaintext(facts)?;
        self.at(facts.destination.port()).connection(facts)
    }

    /// Judges a connection that carries no requests. `allowed_by`: the external authorizers that let it pass.
    pub fn opaque(&self, facts: &Facts, allowed_by: &[Arc<str>]) -> Result<Permit, Denial> {
        self.plaintext(facts)?;
        self.at(facts.destination.port()).opaque(facts, allowed_by)
    }

    /// Whether a connection nobody looks into may go on. What is only observed ends none.
    pub fn allows_uninspected(&self, facts: &Facts) -> bool {
        self.plaintext(facts).is_ok() && self.at(facts.destination.port()).allows_uninspected(facts)
    }

    /// Whether tokens or external authorizers are asked about requests on a connection.
    pub fn asks(&self, facts: &Facts) -> bool {
        self.at(facts.destination.port()).asks(&View { facts, seen: Seen::Later })
    }

    /// Whether a connection may do whatever it likes, and nothing of it, nor of its like, has to be told to anybody: it can be left
    /// to itself.
    pub fn allows_unconditionally(&self, facts: &Facts) -> bool {
        let governing = self.at(facts.destination.port());
        matches!(self.connection(facts), Ok(Verdict::Allowed(_)))
            && self.allows_uninspected(facts)
            && governing.observed(facts, None) == Observed::default()
    }

    /// Judges one request.
    pub fn request(&self, facts: &Facts, request: &Request<'_>) -> Result<(), Denial> {
        self.plaintext(facts)?;
        self.at(facts.destination.port()).request(facts, request)
    }

    /// What becomes of a request, or of a connection that carries none, and which rule decides it. `can_be_asked`: whether an
    /// external authorizer can.
    pub fn explain(&self, facts: &Facts, request: Option<&Request<'_>>, can_be_asked: impl Fn(&str) -> bool) -> Explanation {
        let governing = self.at(facts.destination.port());
        let asked = match request {
            Some(request) => {
                let asked = governing.authorizers().filter_map(|p| Some((p.clone(), governing.asks_about(p, facts, request)?.clone())));
                asked.collect()
            }
            None => governing.connection_authorizers(facts),
        };
        let unasked = asked.iter().find(|(provider, _)| !can_be_asked(provider));
        let unasked = unasked.map(|(_, policy)| Denial::External { policy: policy.clone(), details: "ext_authz_error" });
        let providers = asked.iter().map(|(provider, _)| provider.clone()).collect::<Vec<_>>();
        let denied = match request {
            Some(request) => self.connection(facts).err().or(unasked).or_else(|| self.request(facts, request).err()),
            None => unasked.or_else(|| self.opaque(facts, &providers).err()),
        };
        let view = View { facts, seen: request.map_or(Seen::Never, Seen::Now) };
        let rule = match governing.authorization.allow.find(&view) {
            (Truth::Yes, Some(rule)) if denied.is_none() => Some(rule.name.clone()),
            _ => None,
        };
        Explanation { denied, rule, asked, observed: governing.observed(facts, request) }
    }

    fn plaintext(&self, facts: &Facts) -> Result<(), Denial> {
        let refused = facts.peer.is_none() && !facts.from_node && self.mtls.is_strict(facts.destination.port());
        if refused { Err(Denial::PlaintextUnderStrict) } else { Ok(()) }
    }
}

impl Governing {
    /// Whether there is nothing to ask: whoever has an identity may do whatever they like.
    pub fn is_empty(&self) -> bool {
        let all = &self.authorization;
        let rules = [&all.deny, &all.audit, &all.shadow_deny];
        self.authentication.is_empty()
            && rules.iter().all(|r| r.is_empty())
            && all.allow.is_empty()
            && all.shadow_allow.is_empty()
            && all.custom.is_empty()
    }

    fn connection(&self, facts: &Facts) -> Result<Verdict, Denial> {
        if facts.from_node {
            return Ok(Verdict::Allowed(Permit(())));
        }
        let view = View { facts, seen: Seen::Later };
        let all = &self.authorization;
        let denied = all.deny.find(&view);
        if let (Truth::Yes, Some(rule)) = denied {
            return Err(Denial::DeniedBy { policy: rule.policy.clone(), rule: rule.name.clone() });
        }
        let allowed = all.allow.find(&view).0;
        if allowed == Truth::No {
            return Err(Denial::NotAllowed);
        }
        let asks = denied.0 == Truth::Maybe
            || allowed == Truth::Maybe
            || self.asks(&view)
            || [&all.audit, &all.shadow_deny].iter().any(|rules| rules.find(&view).0 == Truth::Maybe)
            || all.shadow_allow.find(&view).0 == Truth::Maybe;
        Ok(if asks { Verdict::PerRequest(Permit(())) } else { Verdict::Allowed(Permit(())) })
    }

    /// Whether somebody or something has to be asked about each request.
    fn asks(&self, view: &View<'_>) -> bool {
        let custom = || self.authorization.custom.values().any(|rules| rules.find(view).0 != Truth::No);
        !self.authentication.is_empty() || custom()
    }

    /// Whether a connection nobody looks into may go on.
    fn allows_uninspected(&self, facts: &Facts) -> bool {
        let view = View { facts, seen: Seen::Later };
        let all = &self.authorization;
        let allowed = all.allow.find(&view).0 == Truth::Yes;
        facts.from_node || all.deny.find(&view).0 == Truth::No && allowed && !self.asks(&view)
    }

    /// Judges a connection that carries no requests. `allowed_by`: the external authorizers that let it pass.
    pub fn opaque(&self, facts: &Facts, allowed_by: &[Arc<str>]) -> Result<Permit, Denial> {
        if facts.from_node {
            return Ok(Permit(()));
        }
        let view = View { facts, seen: Seen::Never };
        let unasked = self.authorization.custom.iter().filter(|(provider, _)| !allowed_by.contains(provider));
        for rules in unasked.map(|(_, rules)| rules).chain([&self.authorization.deny]) {
            if let (Truth::Yes, Some(rule)) = rules.find(&view) {
                return Err(Denial::DeniedBy { policy: rule.policy.clone(), rule: rule.name.clone() });
            }
        }
        let allowed = self.authorization.allow.find(&view).0 == Truth::Yes;
        if allowed { Ok(Permit(())) } else { Err(Denial::NotAllowed) }
    }

    /// Judges one request.
    pub fn request(&self, facts: &Facts, request: &Request<'_>) -> Result<(), Denial> {
        if facts.from_node {
            return Ok(());
        }
        let view = View { facts, seen: Seen::Now(request) };
        if let (Truth::Yes, Some(rule)) = self.authorization.deny.find(&view) {
            return Err(Denial::DeniedBy { policy: rule.policy.clone(), rule: rule.name.clone() });
        }
        let allowed = self.authorization.allow.find(&view).0 == Truth::Yes;
        if allowed { Ok(()) } else { Err(Denial::NotAllowed) }
    }

    /// The external authorizers that policies name.
    pub fn authorizers(&self) -> impl Iterator<Item = &Arc<str>> {
        self.authorization.custom.keys()
    }

    /// Those that can have to be asked about what goes to an address.
    pub fn authorizers_of(&self, destination: SocketAddr) -> impl Iterator<Item = &Arc<str>> {
        self.authorization.custom.iter().filter(move |(_, rules)| rules.concern(destination)).map(|(provider, _)| provider)
    }

    /// The policy on whose behalf an external authorizer has to be asked about a request.
    pub fn asks_about(&self, provider: &str, facts: &Facts, request: &Request<'_>) -> Option<&Arc<str>> {
        let view = View { facts, seen: Seen::Now(request) };
        let rules = self.authorization.custom.get(provider).filter(|_| !facts.from_node)?;
        match rules.find(&view) {
            (Truth::Yes, Some(rule)) => Some(&rule.policy),
            _ => None,
        }
    }

    /// The external authorizers that have to be asked about a connection that carries no requests, and on whose behalf.
    pub fn connection_authorizers(&self, facts: &Facts) -> Vec<(Arc<str>, Arc<str>)> {
        let view = View { facts, seen: Seen::Never };
        let asked = self.authorization.custom.iter().filter(|_| !facts.from_node);
        let asked = asked.filter_map(|(provider, rules)| match rules.find(&view) {
            (Truth::Yes, Some(rule)) => Some((provider.clone(), rule.policy.clone())),
            _ => None,
        });
        asked.collect()
    }

    /// What AUDIT and dry-run policies say, none of which is enforced.
    pub fn observed(&self, facts: &Facts, request: Option<&Request<'_>>) -> Observed {
        let all = &self.authorization;
        if all.audit.is_empty() && all.shadow_deny.is_empty() && all.shadow_allow.is_empty() {
            return Observed::default();
        }
        let view = View { facts, seen: request.map_or(Seen::Never, Seen::Now) };
        let matched = |rules: &RuleSet| match rules.find(&view) {
            (Truth::Yes, Some(rule)) => Some(rule.policy.clone()),
            _ => None,
        };
        let shadow = match matched(&all.shadow_deny) {
            Some(policy) => Some(Shadow { policy, allowed: false }),
            None if all.shadow_allow.is_empty() => None,
            None => Some(match all.shadow_allow.find(&view) {
                (Truth::Yes, Some(rule)) => Shadow { policy: rule.policy.clone(), allowed: true },
                _ => Shadow { policy: "none".into(), allowed: false },
            }),
        };
        Observed { audited: matched(&all.audit), shadow }
    }
}

/// A decision and its reasons, for who asks why.
#[derive(Debug)]
pub struct Explanation {
    pub denied: Option<Denial>,
    /// The rule that allows it, where one has to.
    pub rule: Option<Arc<str>>,
    /// The external authorizers that have to allow it too, each with its policy.
    pub asked: Vec<(Arc<str>, Arc<str>)>,
    pub observed: Observed,
}

/// What policies that are not enforced say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The AUDIT policy that matches.
    pub audited: Option<Arc<str>>,
    /// What would become of it if dry-run policies were in force.
    pub shadow: Option<Shadow>,
}

/// A decision that is not enforced, and the policy that made it; `none` when nothing allows it.
#[derive(Debug, PartialEq, Eq)]
pub struct Shadow {
    pub policy: Arc<str>,
    pub allowed: bool,
}

#[cfg(test)]
mod tests;
