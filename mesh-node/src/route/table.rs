//! Rules with their destinations resolved, and how a request finds its rule.

use std::sync::Arc;

use http::HeaderName;

use super::{
    Workload,
    cluster::Cluster,
    l4::{L4Context, L4Rule},
    matching::{Context, HeaderMatch, Matched, PathMatch},
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
    /// The object they come from, or the first of several.
    pub origin: Arc<str>,
    pub rules: Vec<ResolvedRule>,
    /// Some rule asks about claims.
    asks_claims: bool,
    /// Headers that rules ask about.
    asked_headers: Box<[HeaderName]>,
    /// Some rule is for every client and port.
    for_all: bool,
    /// Of a younger or less special object, for clients and ports this one has no rule for.
    next: Option<Box<HttpTable>>,
}

/// A rule and, beside each of its destinations, the cluster it names; `None` when that does not exist.
#[derive(Debug)]
pub struct ResolvedRule {
    /// The object it comes from, for the log.
    pub origin: Arc<str>,
    pub rule: Arc<Rule>,
    pub destinations: Vec<Option<Arc<Cluster>>>,
    pub mirrors: Vec<Option<Arc<Cluster>>>,
    /// The policies of the service it is a rule of, now or later, are asked first: where it leads they are not, or about something else.
    pub is_guarded: bool,
}

#[derive(Debug)]
pub struct ResolvedL4 {
    /// The object it comes from.
    pub origin: Arc<str>,
    pub rule: Arc<L4Rule>,
    pub destinations: Vec<Option<Arc<Cluster>>>,
    /// As of [`ResolvedRule`].
    pub is_guarded: bool,
}

/// A rule that matched, and what of it did.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    pub resolved: &'a ResolvedRule,
    /// The rule's name, and that of the match.
    pub name: &'a Arc<str>,
    /// The path match in force, which a prefix rewrite goes by.
    pub path: Option<&'a PathMatch>,
}

impl HttpTable {
    pub fn new(origin: Arc<str>, rules: Vec<ResolvedRule>) -> Self {
        let matches = || rules.iter().flat_map(|r| &r.rule.matches);
        let asks_claims = matches().any(|m| !m.claims.is_empty());
        let header = |h: &HeaderMatch| if let Matched::Header(name) = &h.of { Some(name.clone()) } else { None };
        let asked_headers = matches().flat_map(|m| &m.headers).filter_map(header).collect();
        let for_all = rules.iter().any(|r| r.rule.is_for_all());
        Self { origin, rules, asks_claims, asked_headers, for_all, next: None }
    }

    /// Each of these, where those before it have nothing for a client and port.
    pub fn chain(tables: Vec<Self>) -> Option<Self> {
        tables.into_iter().rev().reduce(|next, table| Self { next: Some(Box::new(next)), ..table })
    }

    /// Whether no other is asked after it.
    pub fn is_for_all(&self) -> bool {
        self.for_all
    }

    /// The first table that has rules for a client and a port, whatever is asked for: as in Istio, where what is for nobody there is no
    /// route at all, and the service is reached as if there were none.
    pub fn of(&self, source: &Workload, port: u16) -> Option<&Self> {
        let is_for = |r: &ResolvedRule| r.rule.matches.is_empty() || r.rule.matches.iter().any(|m| m.is_for(source, port));
        if self.for_all || self.rules.iter().any(is_for) { Some(self) } else { self.next.as_ref()?.of(source, port) }
    }

    /// This one, and those after it.
    pub fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |table| table.next.as_deref())
    }

    /// Has the service's policies asked before rules that keep not to them. `asks`: whether they are asked at all that a destination leads to.
    fn guard(&mut self, asks: &dyn Fn(Option<&Cluster>) -> bool) {
        for resolved in &mut self.rules {
            let keeps = resolved.rule.passes_on() && resolved.destinations.iter().all(|cluster| asks(cluster.as_deref()));
            resolved.is_guarded = !keeps;
        }
        if let Some(next) = &mut self.next {
            next.guard(asks);
        }
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
                return Some(Found { resolved, name: &resolved.rule.name, path: None });
            }
            let hit = matches.iter().find(|m| m.matches(request, context))?;
            Some(Found { resolved, name: if hit.name.is_empty() { &resolved.rule.name } else { &hit.name }, path: hit.path.as_ref() })
        })
    }
}

/// Where a connection that is not HTTP goes.
#[derive(Debug)]
pub enum FoundL4<'a> {
    /// As a rule says, of this number among its kind.
    Rule(usize, &'a ResolvedL4),
    /// There are rules about TLS for the client and the port, and none takes the server name, if there is one: in Istio no filter chain does.
    Nowhere,
    /// To the service itself.
    Service,
}

impl ResolvedL4 {
    /// The cluster it leads to; none where that does not exist.
    pub fn pick(&self, dice: u64) -> Option<&Arc<Cluster>> {
        let picked = pick_weighted(self.rule.destinations.iter().map(|d| d.weight), dice);
        picked.and_then(|i| self.destinations.get(i)?.as_ref())
    }
}

impl PortRoutes {
    pub fn is_empty(&self) -> bool {
        self.http.is_none() && self.tcp.is_empty() && self.tls.is_empty()
    }

    /// Has the policies of the service asked before rules that lead to where they are not asked alike. `asks`: whether they are at all
    /// that a destination leads to.
    pub fn guard(&mut self, asks: &dyn Fn(Option<&Cluster>) -> bool) {
        if let Some(table) = &mut self.http {
            table.guard(asks);
        }
        for resolved in self.tcp.iter_mut().chain(&mut self.tls) {
            resolved.is_guarded = !resolved.destinations.iter().all(|cluster| asks(cluster.as_deref()));
        }
    }

    /// The rule for a connection that is not HTTP.
    pub fn l4_rule(&self, context: L4Context<'_>) -> FoundL4<'_> {
        let find = |rules| <[ResolvedL4]>::iter(rules).enumerate().find(|(_, r)| r.rule.matches(context));
        match context.sni.and_then(|_| find(&self.tls)).or_else(|| find(&self.tcp)) {
            Some((number, rule)) => FoundL4::Rule(number, rule),
            None if self.tls.iter().any(|r| r.rule.is_for(context.source, context.destination.port())) => FoundL4::Nowhere,
            None => FoundL4::Service,
        }
    }
}
