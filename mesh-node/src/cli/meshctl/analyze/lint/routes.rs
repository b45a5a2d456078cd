//! Rules of routes that are never reached, or ask for what is never said.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::Lint;
use crate::{
    detect::Protocol,
    id::ObjectName,
    resource::{Named, Object, VirtualService},
    route::{
        ServicePort, Workload,
        l4::{L4Match, host_matches},
        matching::{HttpMatch, PathMatch, SourceMatch, TextMatch},
        rule::{Action, Rule},
        table::{HttpTable, ResolvedRule},
    },
};

/// A rule, by its object and its number there.
type Place<'a> = (&'a str, usize);

/// Most rules of a port that are compared with each other.
const MOST_RULES: usize = 500;

/// Whether whatever passes one test passes the other.
trait Covers {
    fn covers(&self, other: &Self) -> bool;
}

impl<T: Covers> Covers for Option<T> {
    fn covers(&self, other: &Self) -> bool {
        self.as_ref().is_none_or(|own| other.as_ref().is_some_and(|other| own.covers(other)))
    }
}

impl Covers for TextMatch {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Present, _) => true,
            (Self::Prefix(own), Self::Exact(text) | Self::Prefix(text)) => text.starts_with(&**own),
            (Self::Regex(own), Self::Exact(text)) => own.matches(text.as_bytes()),
            _ => self == other,
        }
    }
}

impl Covers for PathMatch {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            // A prefix of the path is one of whatever begins with it; one whose case does not matter, of what may be written otherwise.
            (
                Self::Prefix { path: own, ignore_case },
                Self::Exact { path, ignore_case: other_ignores } | Self::Prefix { path, ignore_case: other_ignores },
            ) => (*ignore_case || !other_ignores || **own == *"/") && begins(path, own, *ignore_case),
            (Self::Prefix { path: own, ignore_case }, Self::Segments(path)) => begins(path, own, *ignore_case),
            (Self::Segments(_), Self::Exact { path, ignore_case: false } | Self::Segments(path)) => self.matches(path),
            (Self::Regex(own), _) if own.is_catch_all() => true,
            (Self::Regex(own), Self::Exact { path, ignore_case: false }) => own.matches(path.as_bytes()),
            _ => self == other,
        }
    }
}

fn begins(path: &str, prefix: &str, ignore_case: bool) -> bool {
    path.get(..prefix.len()).is_some_and(|begin| if ignore_case { begin.eq_ignore_ascii_case(prefix) } else { begin == prefix })
}

impl Covers for SourceMatch {
    fn covers(&self, other: &Self) -> bool {
        let among = |(key, value)| other.labels.get(key) == Some(value);
        self == other
            || self.gateways.is_empty()
                && other.gateways.is_empty()
                && (self.namespace.is_none() || self.namespace == other.namespace)
                && self.labels.iter().all(among)
    }
}

impl Covers for HttpMatch {
    fn covers(&self, other: &Self) -> bool {
        self.path.covers(&other.path)
            && self.scheme.covers(&other.scheme)
            && self.method.covers(&other.method)
            && self.authority.covers(&other.authority)
            && self.headers.iter().all(|header| other.headers.contains(header))
            && self.query.iter().all(|parameter| other.query.contains(parameter))
            && self.claims.iter().all(|claim| other.claims.contains(claim))
            && (self.port.is_none() || self.port == other.port)
            && self.source.covers(&other.source)
    }
}

impl Covers for L4Match {
    fn covers(&self, other: &Self) -> bool {
        let names = |host: &Arc<str>| self.sni.iter().any(|own| own == host || host_matches(own, host));
        (self.sni.is_empty() || !other.sni.is_empty() && other.sni.iter().all(names))
            && (self.destinations.is_empty() || self.destinations == other.destinations)
            && (self.sources.is_empty() || self.sources == other.sources)
            && (self.port.is_none() || self.port == other.port)
            && self.source.covers(&other.source)
    }
}

/// `spec.http[0]`, or several.
fn listed(kind: &str, rules: &BTreeSet<usize>) -> String {
    rules.iter().map(|i| format!("spec.{kind}[{i}]")).collect::<Vec<_>>().join(" and ")
}

impl Lint<'_> {
    pub(super) fn virtual_service(&mut self, named: &Named, vs: &VirtualService) {
        if !vs.mesh {
            self.say(named, "spec.gateways: mesh is not among them; its routes are for gateways, which mesh-node does not serve");
        }
        self.exports(named, &vs.export_to);
        for host in &vs.hosts {
            self.half_named(named, "spec.hosts", host);
        }
        for (i, rule) in vs.http.iter().enumerate() {
            self.asked_of(named, i, rule);
            let Action::Forward(all) = &rule.action else { continue };
            for (j, to) in all.iter().enumerate() {
                self.half_named(named, &format!("spec.http[{i}].route[{j}].destination.host"), &to.destination.host);
            }
        }
        let http = vs.http.iter().map(|rule| &*rule.matches).collect::<Vec<_>>();
        // What none of a delegate's own rules takes goes on to those behind it.
        let takes = vs.http.iter().map(|rule| !matches!(rule.action, Action::Delegate { .. })).collect::<Vec<_>>();
        let all = |matches: &[HttpMatch]| matches.is_empty() || matches.iter().any(HttpMatch::is_catch_all);
        let last = http.iter().zip(&takes).position(|(matches, takes)| *takes && all(matches));
        self.unreached(named, "http", (&http, &takes), last);
        let namespace: &str = &named.key.name.namespace;
        let services = vs.hosts.iter().map(|host| self.service(host, namespace)).collect::<Option<BTreeSet<_>>>();
        let services = services.iter().flatten().filter_map(|name| self.snapshot.service(name));
        let all_ports = services.flat_map(|s| &s.ports).collect::<Vec<_>>();
        let is_opaque = |port: &&ServicePort| matches!(port.cluster.protocol, Protocol::Tcp | Protocol::Tls);
        if !vs.http.is_empty() && !all_ports.is_empty() && all_ports.iter().all(is_opaque) {
            self.say(
                named,
                "spec.http: counts for nothing, as all ports of its hosts are declared not to carry HTTP (tcp, tls and the like)",
            );
        }
        if !vs.tcp.is_empty() && !all_ports.is_empty() && all_ports.iter().all(|port| port.cluster.protocol.is_http()) {
            self.say(named, "spec.tcp: counts for nothing, as all ports of its hosts are declared to carry HTTP");
        }
        let ports = all_ports.into_iter().map(|port| (port.port, is_tls(port))).collect::<Vec<_>>();
        for (kind, rules, tls) in [("tcp", &vs.tcp, false), ("tls", &vs.tls, true)] {
            let matches = rules.iter().map(|rule| &*rule.matches).collect::<Vec<_>>();
            let takes = vec![true; matches.len()];
            self.unreached(named, kind, (&matches, &takes), matches.iter().position(|all| all.is_empty()));
            if !rules.is_empty() && !ports.is_empty() && ports.iter().all(|(_, is_tls)| *is_tls != tls) {
                let which = if tls { "none of its hosts' ports is" } else { "all ports of its hosts are" };
                self.say(named, &format!("spec.{kind}: counts for nothing, as {which} declared to carry TLS (https, tls)"));
            }
        }
        self.sources(named, vs);
        // Those of gateways are gateways' ports.
        let ours = |port: Option<u16>, source: &SourceMatch| {
            port.filter(|_| vs.mesh && (source.gateways.is_empty() || source.gateways.iter().any(|gateway| **gateway == *"mesh")))
        };
        let mut asked = Vec::new();
        for (i, all) in http.iter().enumerate() {
            asked.extend(all.iter().enumerate().map(|(j, m)| ("http", i, j, ours(m.port, &m.source))));
        }
        for (kind, rules) in [("tcp", &vs.tcp), ("tls", &vs.tls)] {
            for (i, rule) in rules.iter().enumerate() {
                asked.extend(rule.matches.iter().enumerate().map(|(j, m)| (kind, i, j, ours(m.port, &m.source))));
            }
        }
        for (kind, i, j, port) in asked {
            if let Some(port) = port.filter(|port| !ports.is_empty() && !ports.iter().any(|(p, _)| p == port)) {
                self.say(named, &format!("spec.{kind}[{i}].match[{j}].port: no Service among its hosts has a port {port}"));
            }
        }
    }

    /// Tells of clients that are not there.
    fn sources(&mut self, named: &Named, vs: &VirtualService) {
        let mut all = Vec::new();
        for (i, rule) in vs.http.iter().enumerate() {
            all.extend(rule.matches.iter().enumerate().map(|(j, m)| (format!("spec.http[{i}].match[{j}]"), &m.source)));
        }
        for (kind, rules) in [("tcp", &vs.tcp), ("tls", &vs.tls)] {
            for (i, rule) in rules.iter().enumerate() {
                all.extend(rule.matches.iter().enumerate().map(|(j, m)| (format!("spec.{kind}[{i}].match[{j}]"), &m.source)));
            }
        }
        for (at, source) in all {
            // Of gateways' clients nothing is known, nor of those of namespaces whose pods are not written down.
            let pods = match &source.namespace {
                Some(namespace) => self.workloads.get(&**namespace).into_iter().flatten().collect::<Vec<_>>(),
                None => self.workloads.values().flatten().collect(),
            };
            let is_meant = |w: &&&Workload| source.labels.iter().all(|(key, value)| w.labels.get(key) == Some(value));
            if !source.labels.is_empty() && source.gateways.is_empty() && !pods.is_empty() && !pods.iter().any(is_meant) {
                self.say(named, &format!("{at}.sourceLabels: no pod of these manifests has them; check them"));
            }
        }
    }

    /// Tells of parents none of whose ports carries what the route is about.
    fn parents(&mut self, named: &Named) {
        let Object::GatewayRoute(route) = &named.object else { return };
        for parent in &route.parents {
            let namespace = parent.namespace.as_ref().unwrap_or(&named.key.name.namespace);
            let name = ObjectName { namespace: namespace.clone(), name: parent.name.clone() };
            let Some(service) = self.snapshot.service(&name) else { continue };
            let meant = |p: &&ServicePort| {
                parent.port.is_none_or(|port| port == p.port) && parent.section.as_ref().is_none_or(|section| *section == p.name)
            };
            let mut ports = service.ports.iter().filter(meant).peekable();
            if ports.peek().is_some() && ports.all(|p| matches!(p.cluster.protocol, Protocol::Tcp | Protocol::Tls)) {
                let message = format!(
                    "spec.parentRefs: the route counts for nothing at {name}, whose ports it is for are declared not to carry HTTP (tcp, tls and the like)"
                );
                self.say(named, &message);
            }
        }
    }

    /// Tells of rules of Gateway API's routes that others take all requests of, which may be in other objects: by port, in the order they are in
    /// force.
    pub(super) fn gateway_routes(&mut self, aged: &[&Named]) {
        let routes = aged.iter().filter(|named| matches!(named.object, Object::GatewayRoute(_)));
        let routes = routes.map(|named| (named.key.to_string(), *named)).collect::<BTreeMap<_, _>>();
        if routes.is_empty() {
            return;
        }
        routes.values().for_each(|named| self.parents(named));
        let mut found = BTreeSet::new();
        let tables = self.snapshot.services().iter().flat_map(|service| &service.ports).filter_map(|port| port.routes.http.as_ref());
        for table in tables.flat_map(HttpTable::all).filter(|table| table.rules.len() <= MOST_RULES) {
            // A rule of several matches is as many here.
            let mut takers: BTreeMap<Place<'_>, Option<BTreeSet<Place<'_>>>> = BTreeMap::new();
            for (i, resolved) in table.rules.iter().enumerate() {
                let covers = |earlier: &&ResolvedRule| match (&*earlier.rule.matches, &*resolved.rule.matches) {
                    ([own], [wanted]) => own.covers(wanted),
                    _ => false,
                };
                let place = |resolved: &'_ ResolvedRule| resolved.rule.number;
                let taker = table.rules.iter().take(i).find(covers).map(|earlier| (&*earlier.origin, place(earlier)));
                let all = takers.entry((&*resolved.origin, place(resolved))).or_insert_with(|| Some(BTreeSet::new()));
                match (all.as_mut(), taker) {
                    (Some(all), Some(taker)) => drop(all.insert(taker)),
                    (_, None) => *all = None,
                    (None, Some(_)) => {}
                }
            }
            for ((origin, number), takers) in takers {
                let Some(taker) = takers.iter().flatten().next() else { continue };
                let of = if taker.0 == origin { String::new() } else { format!(" of {}", taker.0) };
                let message = format!("spec.rules[{number}]: is never reached, as spec.rules[{}]{of} takes all that it would", taker.1);
                found.insert((origin.to_owned(), message));
            }
        }
        for (origin, message) in found {
            if let Some(named) = routes.get(&origin) {
                self.say(named, &message);
            }
        }
    }

    /// Tells of what a rule asks and no request says.
    fn asked_of(&mut self, named: &Named, i: usize, rule: &Rule) {
        for (j, asked) in rule.matches.iter().enumerate() {
            if let Some(PathMatch::Exact { path, .. } | PathMatch::Prefix { path, .. }) = &asked.path
                && !path.starts_with('/')
                && **path != *"*"
                && !path.is_empty()
            {
                self.say(named, &format!("spec.http[{i}].match[{j}].uri: no path is like {path:?}; they begin with a slash: \"/{path}\""));
            }
            if let Some(TextMatch::Exact(method)) = &asked.method
                && method.chars().any(|c| c.is_ascii_lowercase())
            {
                let message = format!(
                    "spec.http[{i}].match[{j}].method: no request has the method {method:?}; they are told apart by case: {:?}",
                    method.to_uppercase()
                );
                self.say(named, &message);
            }
        }
    }

    /// Tells of rules, and of single matches, all of whose requests or connections others before them take. `last`: the first rule that
    /// takes everything; `counts`: which of them take what they match.
    fn unreached<M: Covers>(&mut self, named: &Named, kind: &str, (rules, counts): (&[&[M]], &[bool]), last: Option<usize>) {
        for i in last.map_or(rules.len(), |last| last + 1)..rules.len() {
            let last = last.unwrap_or_default();
            let message = format!("spec.{kind}[{i}]: is never reached, as spec.{kind}[{last}] takes everything; put it before that one");
            self.say(named, &message);
        }
        for (i, matches) in rules.iter().enumerate().take(last.unwrap_or(rules.len())) {
            let before = |wanted: &M| {
                let mut earlier = rules.iter().zip(counts).take(i);
                earlier.position(|(earlier, counts)| *counts && earlier.iter().any(|own| own.covers(wanted)))
            };
            let before = matches.iter().map(before).collect::<Vec<_>>();
            if let Some(takers) = before.iter().copied().collect::<Option<BTreeSet<_>>>().filter(|takers| !takers.is_empty()) {
                let takers = listed(kind, &takers);
                let message =
                    format!("spec.{kind}[{i}]: is never reached, as {takers} before it takes all that it would; put it before that");
                self.say(named, &message);
                continue;
            }
            for (j, (wanted, taker)) in matches.iter().zip(before).enumerate() {
                // One that goes before may have its say in what is rewritten.
                let beside = matches.iter().take(j).position(|own| own.covers(wanted));
                let message = match (taker, beside) {
                    (Some(taker), _) => format!("is never needed, as spec.{kind}[{taker}] before it takes all that it would"),
                    (None, Some(k)) => format!("adds nothing, as match[{k}] of the same rule takes all that it would"),
                    (None, None) => continue,
                };
                self.say(named, &format!("spec.{kind}[{i}].match[{j}]: {message}"));
            }
        }
    }
}

fn is_tls(port: &ServicePort) -> bool {
    port.cluster.protocol == Protocol::Tls
}
