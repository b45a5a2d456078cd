//! What is in force as it is written, and hardly meant so: rules that are never reached, selectors that match nothing, policies of which
//! another takes the place. Of manifests alone: in a cluster pods come and go.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    config::{
        MeshSettings, Snapshot,
        store::{Severity, Status, Store},
    },
    detect::Protocol,
    id::ObjectName,
    resource::{
        DestinationRule, Named, Object, VirtualService,
        authorization::{self, Values},
        paths::PathPattern,
        selector::WorkloadSelector,
        strings::StringMatch,
    },
    route::{
        Workload,
        matching::{HttpMatch, PathMatch, TextMatch},
        rule::{Action, Rule},
    },
};

/// Everything there is to say.
pub fn remarks(store: &Store, mesh: &MeshSettings, snapshot: &Snapshot) -> Vec<Status> {
    let mut lint = Lint { store, mesh, snapshot, found: Vec::new() };
    for named in store.objects() {
        match &named.object {
            Object::VirtualService(vs) => lint.virtual_service(named, vs),
            Object::DestinationRule(rule) => lint.subsets(named, rule),
            Object::PeerAuthentication(p) => lint.selector(named, p.selector.as_ref()),
            Object::AuthorizationPolicy(p) => {
                lint.selector(named, p.selector.as_ref());
                lint.never_said(named, &p.rules);
            }
            Object::RequestAuthentication(p) => lint.selector(named, p.selector.as_ref()),
            Object::Telemetry(t) => lint.selector(named, t.selector.as_ref()),
            _ => {}
        }
    }
    let mut aged = store.objects().collect::<Vec<_>>();
    aged.sort_by_key(|named| (named.created.is_none(), named.created, &named.key));
    lint.destination_rules(&aged);
    lint.peer_authentications(&aged);
    lint.delegates(&aged);
    lint.found
}

/// The texts of values that are asked for as a whole or by how they begin.
fn texts(values: &Values<StringMatch>) -> impl Iterator<Item = &str> {
    values.any_of.iter().chain(&values.none_of).filter_map(|value| match value {
        StringMatch::Exact(text) | StringMatch::Prefix(text) => Some(&**text),
        StringMatch::Suffix(_) | StringMatch::Present | StringMatch::Glob(_) => None,
    })
}

/// Values with a star that stands for itself: it is one for anything at either end alone.
fn with_stars(values: &Values<StringMatch>) -> impl Iterator<Item = &StringMatch> {
    values.any_of.iter().chain(&values.none_of).filter(|value| match value {
        StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text) => text.contains('*'),
        StringMatch::Present | StringMatch::Glob(_) => false,
    })
}

/// Whether a rule takes everything that a match of a later one could, by how the path begins.
fn takes_its(rule: &Rule, later: &HttpMatch) -> bool {
    let Some(PathMatch::Exact { path: wanted, ignore_case: false } | PathMatch::Prefix { path: wanted, ignore_case: false }) = &later.path
    else {
        return false;
    };
    rule.matches.iter().any(|earlier| match &earlier.path {
        Some(PathMatch::Prefix { path, .. }) => {
            let rest = HttpMatch { path: None, name: std::sync::Arc::default(), ..earlier.clone() };
            rest == HttpMatch::default() && wanted.starts_with(&**path)
        }
        _ => false,
    })
}

struct Lint<'a> {
    store: &'a Store,
    mesh: &'a MeshSettings,
    snapshot: &'a Snapshot,
    found: Vec<Status>,
}

impl Lint<'_> {
    fn say(&mut self, named: &Named, message: &str) {
        let origin = self.store.origin_of(&named.key).map(ToString::to_string).unwrap_or_default();
        self.found.push(Status { origin, severity: Severity::Warning, message: format!("{}: {message}", named.key) });
    }

    fn virtual_service(&mut self, named: &Named, vs: &VirtualService) {
        if !vs.mesh {
            self.say(named, "spec.gateways: mesh is not among them; its routes are for gateways, which mesh-node does not serve");
        }
        let takes_all = |matches: &[HttpMatch]| matches.is_empty() || matches.iter().any(HttpMatch::is_catch_all);
        if let Some(last) = vs.http.iter().position(|rule| takes_all(&rule.matches)) {
            for i in last + 1..vs.http.len() {
                let message = format!("spec.http[{i}]: is never reached, as spec.http[{last}] takes everything; put it before that one");
                self.say(named, &message);
            }
        }
        for (i, rule) in vs.http.iter().enumerate() {
            for (j, asked) in rule.matches.iter().enumerate() {
                if let Some(PathMatch::Exact { path, .. } | PathMatch::Prefix { path, .. }) = &asked.path
                    && !path.starts_with('/')
                    && **path != *"*"
                    && !path.is_empty()
                {
                    self.say(
                        named,
                        &format!("spec.http[{i}].match[{j}].uri: no path is like {path:?}; they begin with a slash: \"/{path}\""),
                    );
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
        for (i, rule) in vs.http.iter().enumerate().filter(|(_, rule)| !takes_all(&rule.matches)) {
            let before = vs.http.iter().take(i).enumerate().find(|(_, earlier)| rule.matches.iter().all(|m| takes_its(earlier, m)));
            if let Some((earlier, _)) = before.filter(|(_, earlier)| !takes_all(&earlier.matches)) {
                let message = format!(
                    "spec.http[{i}]: is never reached, as spec.http[{earlier}] takes all paths that begin like its own; put it before that one"
                );
                self.say(named, &message);
            }
        }
        for (kind, rules, tls) in [("tcp", &vs.tcp, false), ("tls", &vs.tls, true)] {
            let namespace: &str = &named.key.name.namespace;
            let services = vs.hosts.iter().filter_map(|host| self.service(host, namespace)).collect::<Vec<_>>();
            let mut ports = self.snapshot.services().iter().filter(|s| services.contains(&s.name)).flat_map(|s| &s.ports).peekable();
            if !rules.is_empty() && ports.peek().is_some() && ports.all(|port| (port.cluster.protocol == Protocol::Tls) != tls) {
                let which = if tls { "none of its hosts' ports is" } else { "all ports of its hosts are" };
                self.say(named, &format!("spec.{kind}: counts for nothing, as {which} declared to carry TLS (https, tls)"));
            }
        }
        for (kind, rules) in [("tcp", &vs.tcp), ("tls", &vs.tls)] {
            if let Some(last) = rules.iter().position(|rule| rule.matches.is_empty()) {
                for i in last + 1..rules.len() {
                    let message =
                        format!("spec.{kind}[{i}]: is never reached, as spec.{kind}[{last}] takes everything; put it before that one");
                    self.say(named, &message);
                }
            }
        }
    }

    /// Values that nothing ever has.
    fn never_said(&mut self, named: &Named, rules: &[authorization::Rule]) {
        for (i, rule) in rules.iter().enumerate() {
            for (j, from) in rule.from.iter().enumerate() {
                for text in texts(&from.principals).filter(|text| text.starts_with("spiffe://")) {
                    let short = text.trim_start_matches("spiffe://");
                    let message = format!(
                        "spec.rules[{i}].from[{j}].source.principals: {text:?} is nobody; principals are written without their scheme: {short:?}"
                    );
                    self.say(named, &message);
                }
            }
            let starred = rule.from.iter().enumerate().flat_map(|(j, from)| {
                let all = [("principals", &from.principals), ("trustDomains", &from.trust_domains)];
                all.into_iter().flat_map(move |(field, values)| with_stars(values).map(move |v| (format!("from[{j}].source.{field}"), v)))
            });
            let starred = starred.chain(rule.to.iter().enumerate().flat_map(|(j, to)| {
                let all = [("hosts", &to.hosts), ("methods", &to.methods)];
                all.into_iter().flat_map(move |(field, values)| with_stars(values).map(move |v| (format!("to[{j}].operation.{field}"), v)))
            }));
            let starred = starred.map(|(field, value)| {
                format!(
                    "spec.rules[{i}].{field}: a star of {:?} stands for itself; it stands for anything at one end of a value alone",
                    format!("{value:?}")
                )
            });
            for message in starred.collect::<Vec<_>>() {
                self.say(named, &message);
            }
            for (j, to) in rule.to.iter().enumerate() {
                for text in texts(&to.hosts).filter(|text| text.contains("://") || text.contains('/')) {
                    let message =
                        format!("spec.rules[{i}].to[{j}].operation.hosts: no host is like {text:?}; they have neither scheme nor path");
                    self.say(named, &message);
                }
                let starred = to.paths.any_of.iter().chain(&to.paths.none_of).filter_map(|path| match path {
                    PathPattern::Text(value @ (StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text))) => {
                        text.contains('*').then_some(value)
                    }
                    _ => None,
                });
                for path in starred {
                    let message = format!(
                        "spec.rules[{i}].to[{j}].operation.paths: a star within {:?} stands for itself; within a path {{*}} stands for one part of it, and \
                         {{**}} for any",
                        format!("{path:?}")
                    );
                    self.say(named, &message);
                }
                for text in texts(&to.methods).filter(|text| text.chars().any(|c| c.is_ascii_lowercase())) {
                    let message = format!(
                        "spec.rules[{i}].to[{j}].operation.methods: no request has the method {text:?}; they are told apart by case: {:?}",
                        text.to_uppercase()
                    );
                    self.say(named, &message);
                }
                let paths = to.paths.any_of.iter().chain(&to.paths.none_of).filter_map(|path| match path {
                    PathPattern::Text(StringMatch::Exact(text) | StringMatch::Prefix(text)) => Some(text),
                    _ => None,
                });
                for text in paths.clone().filter(|text| text.contains('?')) {
                    let message = format!("spec.rules[{i}].to[{j}].operation.paths: no path is like {text:?}; they end before the query");
                    self.say(named, &message);
                }
                for text in paths.filter(|text| !text.starts_with('/')) {
                    let message = format!("spec.rules[{i}].to[{j}].operation.paths: no path is like {text:?}; they begin with a slash");
                    self.say(named, &message);
                }
            }
        }
    }

    /// Workloads an object of a namespace may be about.
    fn scope(&self, namespace: &str) -> Vec<&Workload> {
        let root = *self.mesh.root_namespace == *namespace;
        self.snapshot.workloads().filter(|w| root || *w.name.namespace == *namespace).map(|w| &**w).collect()
    }

    fn selector(&mut self, named: &Named, selector: Option<&WorkloadSelector>) {
        let Some(selector) = selector else { return };
        if !self.scope(&named.key.name.namespace).iter().any(|w| selector.matches(&w.labels)) {
            self.say(named, "spec.selector: matches no pod of these manifests; check its labels and the object's namespace");
        }
    }

    fn subsets(&mut self, named: &Named, rule: &DestinationRule) {
        let namespace: &str = &named.key.name.namespace;
        let Some(service) = self.service(&rule.host, namespace) else { return };
        let Some(service) = self.snapshot.services().iter().find(|s| s.name == service) else { return };
        for (i, subset) in rule.subsets.iter().enumerate() {
            let reached = service.ports.iter().filter_map(|p| p.subsets.get(&subset.name)).any(|cluster| !cluster.endpoints.is_empty());
            if !reached && service.ports.iter().any(|p| !p.cluster.endpoints.is_empty()) {
                let message = format!(
                    "spec.subsets[{i}].labels: no endpoint of {} has them; what is routed to {:?} is answered 503",
                    service.name, subset.name
                );
                self.say(named, &message);
            }
        }
    }

    fn service(&self, host: &str, namespace: &str) -> Option<ObjectName> {
        let mut labels = host.split('.');
        let name =
            ObjectName::new(labels.next().filter(|n| !n.is_empty()).map(|_| labels.next().unwrap_or(namespace))?, host.split('.').next()?);
        self.snapshot.services().iter().any(|s| s.name == name).then_some(name)
    }

    /// Of several for one host in one namespace, the oldest that has it counts.
    fn destination_rules(&mut self, aged: &[&Named]) {
        let mut policies: BTreeMap<(String, String), &Named> = BTreeMap::new();
        let mut subsets: BTreeMap<(String, String, String), &Named> = BTreeMap::new();
        for named in aged {
            let Object::DestinationRule(rule) = &named.object else { continue };
            let namespace = named.key.name.namespace.to_string();
            let host = self.service(&rule.host, &namespace).map_or_else(|| rule.host.to_string(), |s| s.to_string());
            let place = (namespace, host);
            if rule.policy.is_some()
                && let Some(older) = policies.get(&place)
            {
                let message = format!("spec.trafficPolicy: that of {}, which is older, counts for this host; merge the two", older.key);
                self.say(named, &message);
            } else if rule.policy.is_some() {
                policies.insert(place.clone(), named);
            }
            for (i, subset) in rule.subsets.iter().enumerate() {
                let key = (place.0.clone(), place.1.clone(), subset.name.to_string());
                match subsets.get(&key) {
                    Some(older) => {
                        let message = format!(
                            "spec.subsets[{i}]: {:?} of {}, which is older, counts for this host; give it another name",
                            subset.name, older.key
                        );
                        self.say(named, &message);
                    }
                    None => drop(subsets.insert(key, named)),
                }
            }
        }
    }

    /// Of several for one pod, the oldest counts.
    fn peer_authentications(&mut self, aged: &[&Named]) {
        let mut said = BTreeSet::new();
        let all = aged.iter().filter_map(|named| match &named.object {
            Object::PeerAuthentication(p) => Some((*named, p.selector.as_ref()?)),
            _ => None,
        });
        let all = all.collect::<Vec<_>>();
        for workload in self.snapshot.workloads() {
            let of = |named: &Named, selector: &WorkloadSelector| {
                named.key.name.namespace == workload.name.namespace && selector.matches(&workload.labels)
            };
            let mut selecting = all.iter().filter(|(named, selector)| of(named, selector));
            let Some((first, _)) = selecting.next() else { continue };
            for (named, _) in selecting.filter(|(named, _)| said.insert(&named.key)).collect::<Vec<_>>() {
                let message = format!("spec.selector: selects {} as well as {} does, which is older and counts", workload.name, first.key);
                self.say(named, &message);
            }
        }
    }

    fn delegates(&mut self, aged: &[&Named]) {
        let mut used = BTreeSet::new();
        for named in aged {
            let Object::VirtualService(vs) = &named.object else { continue };
            for rule in &vs.http {
                if let Action::Delegate { namespace, name } = &rule.action {
                    let namespace = if namespace.is_empty() { &named.key.name.namespace } else { namespace };
                    used.insert(ObjectName { namespace: namespace.clone(), name: name.clone() });
                }
            }
        }
        for named in aged {
            if let Object::VirtualService(vs) = &named.object
                && vs.hosts.is_empty()
                && !used.contains(&named.key.name)
            {
                self.say(named, "spec.hosts: is empty and no VirtualService delegates to it; its routes are not used");
            }
        }
    }
}
