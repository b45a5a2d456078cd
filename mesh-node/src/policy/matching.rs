//! Matching one compiled rule against what is known.
//!
//! What is not known yet is neither true nor false: three values, as of Kleene's logic.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::HeaderName;
use ipnet::IpNet;
use serde_json::Value;

use super::{Facts, Reading, Request, Sni, Verified};
use crate::{
    id::SpiffeId,
    resource::{
        authorization::{Action, RequestPrincipal, Values},
        paths::PathPattern,
        strings::StringMatch,
    },
};

/// How a test turns out. `min` is AND, `max` is OR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Truth {
    No,
    /// It depends on the request.
    Maybe,
    Yes,
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// The request, if there is one.
#[derive(Debug, Clone, Copy)]
pub(super) enum Seen<'a> {
    /// Requests may come.
    Later,
    /// There will be none: the connection is opaque.
    Never,
    Now(&'a Request<'a>),
}

/// What a rule is matched against.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    pub facts: &'a Facts,
    pub seen: Seen<'a>,
}

/// One condition. A field AND its `not` twin.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Test {
    Connection(ConnectionTest),
    Request(RequestTest),
}

/// What a connection can tell.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ConnectionTest {
    Principal(Values<StringMatch>),
    Namespace(Values<StringMatch>),
    /// Namespace and name of service accounts.
    ServiceAccount(Values<(String, String)>),
    TrustDomain(Values<StringMatch>),
    SourceIp(Values<IpNet>),
    RemoteIp(Values<IpNet>),
    DestinationIp(Values<IpNet>),
    DestinationPort(Values<u16>),
    Sni(Values<StringMatch>),
}

/// What only a request can tell.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RequestTest {
    Host(Values<StringMatch>),
    Method(Values<StringMatch>),
    Path(Values<PathPattern>),
    Header(HeaderName, Values<StringMatch>),
    RequestPrincipal(Values<RequestPrincipal>),
    Audience(Values<StringMatch>),
    Presenter(Values<StringMatch>),
    Claim(Vec<Arc<str>>, Values<StringMatch>),
}

impl From<ConnectionTest> for Test {
    fn from(test: ConnectionTest) -> Self {
        Self::Connection(test)
    }
}

impl From<RequestTest> for Test {
    fn from(test: RequestTest) -> Self {
        Self::Request(test)
    }
}

impl Test {
    /// Whether only a request can tell.
    pub(super) fn needs_request(&self) -> bool {
        matches!(self, Self::Request(_))
    }

    /// `unknown`: what is made of something that should have been told and was not.
    fn truth(&self, view: &View<'_>, reading: Reading, unknown: Truth) -> Truth {
        match (self, view.seen) {
            (Self::Connection(test), _) => test.truth(view, unknown),
            (Self::Request(_), Seen::Later) => Truth::Maybe,
            // Of rules that deny, or name an authorizer: where the field is not known they match. `CompiledRule::truth` does not let rules
            // that allow get here.
            (Self::Request(_), Seen::Never) => Truth::Yes,
            (Self::Request(test), Seen::Now(request)) => test.holds(request, reading).into(),
        }
    }
}

impl ConnectionTest {
    fn truth(&self, view: &View<'_>, unknown: Truth) -> Truth {
        let facts = view.facts;
        let peer = facts.peer.as_ref();
        let holds = match self {
            Self::Principal(values) => {
                let principal = peer.map(SpiffeId::principal).unwrap_or_default();
                holds(values, |m| m.matches(&principal))
            }
            Self::Namespace(values) => holds(values, |m| peer.is_some_and(|p| m.matches(p.namespace()))),
            Self::ServiceAccount(values) => {
                holds(values, |(ns, name)| peer.is_some_and(|p| p.namespace() == ns && p.service_account() == name))
            }
            Self::TrustDomain(values) => holds(values, |m| peer.is_some_and(|p| m.matches(p.trust_domain().as_str()))),
            Self::SourceIp(values) => holds(values, |net| contains(net, facts.source)),
            Self::RemoteIp(values) => match view.seen {
                Seen::Later if facts.via_trusted_proxy => return Truth::Maybe,
                Seen::Now(Request { remote: None, .. }) => return unknown,
                Seen::Now(Request { remote: Some(ip), .. }) => holds(values, |net| contains(net, *ip)),
                Seen::Later | Seen::Never => holds(values, |net| contains(net, facts.source)),
            },
            Self::DestinationIp(values) => holds(values, |net| contains(net, facts.destination.ip())),
            Self::DestinationPort(values) => holds(values, |port| *port == facts.destination.port()),
            Self::Sni(values) => {
                let name = match &facts.sni {
                    Sni::Unread => match view.seen {
                        Seen::Later => return Truth::Maybe,
                        // There may be one.
                        Seen::Never => return unknown,
                        // HTTP that is read here came in no TLS of the client's.
                        Seen::Now(_) => None,
                    },
                    Sni::Read(name) => name.as_deref(),
                };
                holds(values, |m| name.is_some_and(|n| m.matches(n)))
            }
        };
        holds.into()
    }
}

impl RequestTest {
    fn holds(&self, request: &Request<'_>, reading: Reading) -> bool {
        let head = request.head;
        let claims = request.claims;
        match self {
            Self::Host(values) => {
                let host = head.host().to_ascii_lowercase();
                holds(values, |m| m.matches(&host))
            }
            Self::Method(values) => holds(values, |m| m.matches(head.method.as_str())),
            Self::Path(values) => holds(values, |p| request.is_at(p, reading)),
            Self::Header(name, values) => holds(values, |m| match m {
                // Empty, or no text, is there nevertheless.
                StringMatch::Present => request.header(name).next().is_some(),
                // Repeated headers are looked at one by one.
                m => request.header(name).any(|v| m.matches(&String::from_utf8_lossy(v.as_bytes()))),
            }),
            Self::RequestPrincipal(values) => holds(values, |m| claims.is_some_and(|c| principal_matches(m, c))),
            Self::Audience(values) => holds(values, |m| claims.is_some_and(|c| c.token.audiences().iter().any(|a| m.matches(a)))),
            Self::Presenter(values) => holds(values, |m| claim_matches(claims, &["azp".into()], m)),
            Self::Claim(path, values) => holds(values, |m| claim_matches(claims, path, m)),
        }
    }
}

fn principal_matches(pattern: &RequestPrincipal, claims: &Verified) -> bool {
    let (issuer, subject) = (claims.token.issuer(), claims.token.subject());
    if issuer.is_empty() || subject.is_empty() {
        return false;
    }
    match pattern {
        RequestPrincipal::Any => true,
        RequestPrincipal::Pair(i, s) => i.matches(issuer) && s.matches(subject),
        RequestPrincipal::Whole(whole) => whole.matches(&format!("{issuer}/{subject}")),
    }
}

fn claim_matches(claims: Option<&Verified>, path: &[Arc<str>], pattern: &StringMatch) -> bool {
    let Some(claims) = claims else { return false };
    match claims.claim(path) {
        Some(Value::String(words)) if claims.is_word_list(path) => words.split(' ').any(|w| pattern.matches(w)),
        Some(Value::String(text)) => pattern.matches(text),
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).any(|v| pattern.matches(v)),
        _ => false,
    }
}

/// Positive AND NOT negative; an empty positive list asks nothing.
fn holds<T>(values: &Values<T>, matches: impl Fn(&T) -> bool) -> bool {
    (values.any_of.is_empty() || values.any_of.iter().any(&matches)) && !values.none_of.iter().any(&matches)
}

/// CIDR containment; IPv4-mapped addresses count as IPv4.
fn contains(net: &IpNet, ip: IpAddr) -> bool {
    net.contains(&ip.to_canonical())
}

/// A rule of a policy. Every clause must hold; a clause holds when one of its alternatives does, an alternative when all its
/// tests do.
#[derive(Debug, Clone, PartialEq)]
pub struct CompiledRule {
    /// `namespace/name` of the policy.
    pub policy: Arc<str>,
    /// As Istio names it: `ns[default]-policy[web]-rule[0]`.
    pub name: Arc<str>,
    pub(super) action: Action,
    pub(super) clauses: Vec<Vec<Vec<Test>>>,
    /// Some test of it can only be answered by a request.
    pub(super) needs_request: bool,
}

#[cfg(test)]
thread_local! {
    /// How many rules were looked at by this thread.
    pub(super) static LOOKED_AT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

impl CompiledRule {
    /// Whether it can match what goes to a port, wherever that is.
    pub(super) fn concerns_port(&self, port: u16) -> bool {
        let can =
            |test: &Test| !matches!(test, Test::Connection(ConnectionTest::DestinationPort(values)) if !holds(values, |p| *p == port));
        self.clauses.iter().all(|clause| clause.iter().any(|tests| tests.iter().all(can)))
    }

    /// Whether it can match what goes to an address, whoever sends it and whatever it is.
    pub(super) fn concerns(&self, destination: SocketAddr) -> bool {
        let can = |test: &Test| match test {
            Test::Connection(ConnectionTest::DestinationIp(values)) => holds(values, |net| contains(net, destination.ip())),
            Test::Connection(ConnectionTest::DestinationPort(values)) => holds(values, |port| *port == destination.port()),
            _ => true,
        };
        self.clauses.iter().all(|clause| clause.iter().any(|tests| tests.iter().all(can)))
    }

    pub(super) fn truth(&self, view: &View<'_>) -> Truth {
        #[cfg(test)]
        LOOKED_AT.set(LOOKED_AT.get() + 1);
        let allow = self.action == Action::Allow;
        let written = self.read(view, None);
        match view.seen {
            // Istio's rule for TCP: a rule that allows needs everything it asks for, in whichever alternative. Before it is known what a
            // connection carries, none of it is settled.
            Seen::Never if allow && self.needs_request => Truth::No,
            Seen::Later if allow && self.needs_request => written.min(Truth::Maybe),
            // However the path is read, a rule that allows has to allow it, and one reading is enough for one that denies.
            Seen::Now(request) => (0..request.readings.len()).fold(written, |so_far, n| {
                let other = self.read(view, Some(n));
                if allow { so_far.min(other) } else { so_far.max(other) }
            }),
            _ => written,
        }
    }

    fn read(&self, view: &View<'_>, reading: Reading) -> Truth {
        let unknown = if self.action == Action::Allow { Truth::No } else { Truth::Yes };
        let mut whole = Truth::Yes;
        for clause in &self.clauses {
            let mut any = Truth::No;
            for tests in clause {
                let mut all = Truth::Yes;
                for test in tests {
                    all = all.min(test.truth(view, reading, unknown));
                    if all == Truth::No {
                        break;
                    }
                }
                any = any.max(all);
                if any == Truth::Yes {
                    break;
                }
            }
            whole = whole.min(any);
            if whole == Truth::No {
                break;
            }
        }
        whole
    }
}
