//! Rules with their destinations resolved, and how a request finds its rule.

use std::sync::Arc;

use http::HeaderName;

use super::{
    cluster::Cluster,
    l4::{L4Context, L4Rule},
    matching::{Context, PathMatch},
    request::RequestHead,
    rule::{Rule, pick_weighted},
};
use crate::resource::request_authentication::JwtRule;

/// The routes of one port of a service. Without rules everything goes to the port's own cluster.
#[derive(Debug, Default)]
pub struct PortRoutes {
    pub http: Option<HttpTable>,
    pub tcp: Vec<ResolvedL4>,
    pub tls: Vec<ResolvedL4>,
}

#[derive(Debug)]
pub struct HttpTable {
    /// The object they come from, for the log.
    pub origin: Arc<str>,
    pub rules: Vec<ResolvedRule>,
    /// Some rule asks about claims.
    asks_claims: bool,
    /// Headers that rules ask about.
    asked_headers: Box<[HeaderName]>,
}

/// A rule and, beside each of its destinations, the cluster it names; `None` when that does not exist.
#[derive(Debug)]
pub struct ResolvedRule {
    pub rule: Arc<Rule>,
    pub destinations: Vec<Option<Arc<Cluster>>>,
    pub mirrors: Vec<Option<Arc<Cluster>>>,
}

#[derive(Debug)]
pub struct ResolvedL4 {
    /// The object it comes from.
    pub origin: Arc<str>,
    pub rule: Arc<L4Rule>,
    pub destinations: Vec<Option<Arc<Cluster>>>,
}

/// A rule that matched, and what of it did.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    pub resolved: &'a ResolvedRule,
    /// The path match in force, which a prefix rewrite goes by.
    pub path: Option<&'a PathMatch>,
}

impl HttpTable {
    pub fn new(origin: Arc<str>, rules: Vec<ResolvedRule>) -> Self {
        let matches = || rules.iter().flat_map(|r| &r.rule.matches);
        let asks_claims = matches().any(|m| !m.claims.is_empty());
        let asked_headers = matches().flat_map(|m| &m.headers).map(|h| h.name.clone()).collect();
        Self { origin, rules, asks_claims, asked_headers }
    }

    /// Whether it may matter which tokens a destination takes.
    pub fn may_ask_tokens(&self) -> bool {
        self.asks_claims || !self.asked_headers.is_empty()
    }

    /// Whether a request's tokens have to be verified by a destination's rules before it is known where it goes.
    pub fn asks_tokens(&self, rules: &[Arc<JwtRule>]) -> bool {
        let mut changed = rules.iter().flat_map(|rule| rule.changed_headers());
        (self.asks_claims && !rules.is_empty()) || changed.any(|name| self.asked_headers.contains(name))
    }

    /// The first rule, and the first of its matches, that takes the request.
    pub fn find(&self, request: &RequestHead, context: Context<'_>) -> Option<Found<'_>> {
        self.rules.iter().find_map(|resolved| {
            let matches = &resolved.rule.matches;
            if matches.is_empty() {
                return Some(Found { resolved, path: None });
            }
            let hit = matches.iter().find(|m| m.matches(request, context))?;
            Some(Found { resolved, path: hit.path.as_ref() })
        })
    }
}

impl PortRoutes {
    /// The cluster a connection that is not HTTP goes to, when a rule says so: `Some(None)` is one that does not exist.
    pub fn find_l4(&self, context: L4Context<'_>, dice: u64) -> Option<Option<&Arc<Cluster>>> {
        let (_, found) = self.l4_rule(context)?;
        let picked = pick_weighted(found.rule.destinations.iter().map(|d| d.weight), dice);
        Some(picked.and_then(|i| found.destinations.get(i)?.as_ref()))
    }

    /// The rule for a connection that is not HTTP, and its number among its kind.
    pub fn l4_rule(&self, context: L4Context<'_>) -> Option<(usize, &ResolvedL4)> {
        let rules = if context.sni.is_some() && !self.tls.is_empty() { &self.tls } else { &self.tcp };
        rules.iter().enumerate().find(|(_, r)| r.rule.matches(context))
    }
}
