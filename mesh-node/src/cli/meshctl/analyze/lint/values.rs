//! Values of policies that nothing ever has.

use super::Lint;
use crate::{
    admin::names,
    policy::WorkloadPolicy,
    resource::{
        AuthorizationPolicy, Named,
        authorization::{self, Condition, Values},
        paths::PathPattern,
        selector::WorkloadSelector,
        strings::StringMatch,
    },
};

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

/// The namespace of a principal that is written as a whole.
fn namespace_of(principal: &str) -> Option<&str> {
    principal.split_once("/ns/")?.1.split_once("/sa/").map(|(namespace, _)| namespace)
}

impl Lint<'_> {
    /// Values that nothing ever has.
    pub(super) fn never_said(&mut self, named: &Named, rules: &[authorization::Rule]) {
        for (i, rule) in rules.iter().enumerate() {
            for (j, from) in rule.from.iter().enumerate() {
                self.principals(named, &format!("spec.rules[{i}].from[{j}].source.principals"), &from.principals);
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

    /// Tells of rules that ask for tokens where no token is ever looked at: a claim nobody has verified is nobody's.
    pub(super) fn tokens(&mut self, named: &Named, policy: &AuthorizationPolicy) {
        if !policy.targets.is_empty() {
            return;
        }
        let namespace = &*named.key.name.namespace;
        let all = WorkloadSelector::default();
        let governed = self.selected(namespace, policy.selector.as_ref().unwrap_or(&all)).collect::<Vec<_>>();
        let looks = |policy: &WorkloadPolicy| {
            let ports = policy.ports.values();
            std::iter::once(&policy.everywhere).chain(ports).any(|governing| !governing.authentication.is_empty())
        };
        if governed.is_empty() || governed.iter().any(|workload| looks(&workload.policy)) {
            return;
        }
        for (i, rule) in policy.rules.iter().enumerate() {
            let from = rule.from.iter().position(|from| !from.request_principals.any_of.is_empty());
            let when = rule.when.iter().position(|condition| match condition {
                Condition::RequestPrincipal(values) => !values.any_of.is_empty(),
                Condition::Audience(values) | Condition::Presenter(values) | Condition::Claim(_, values) => !values.any_of.is_empty(),
                _ => false,
            });
            let at = from.map(|j| format!("from[{j}].source.requestPrincipals")).or_else(|| Some(format!("when[{}]", when?)));
            if let Some(at) = at {
                let message = format!(
                    "spec.rules[{i}].{at}: matches nothing, as no RequestAuthentication is for these pods and tokens are not looked at; add one"
                );
                self.say(named, &message);
            }
        }
    }

    fn principals(&mut self, named: &Named, at: &str, principals: &Values<StringMatch>) {
        for text in texts(principals) {
            let local = &self.mesh.trust_domains.local;
            let (how, meant) = match (text.strip_prefix("spiffe://"), text.starts_with("ns/")) {
                (Some(short), _) => ("are written without their scheme", short.to_owned()),
                (None, true) => ("begin with their trust domain", format!("{local}/{text}")),
                (None, false) => continue,
            };
            self.say(named, &format!("{at}: {text:?} is nobody; principals {how}: {meant:?}"));
        }
    }

    /// Tells of namespaces that are not there, where manifests say which there are.
    pub(super) fn nowhere(&mut self, named: &Named, rules: &[authorization::Rule]) {
        if self.namespaces.is_empty() {
            return;
        }
        let mut found = Vec::new();
        for (i, rule) in rules.iter().enumerate() {
            for (j, from) in rule.from.iter().enumerate() {
                let at = |field: &str| format!("spec.rules[{i}].from[{j}].source.{field}");
                for (field, values) in [("namespaces", &from.namespaces.any_of), ("notNamespaces", &from.namespaces.none_of)] {
                    let none = values.iter().filter(|value| !self.namespaces.iter().any(|namespace| value.matches(namespace)));
                    found.extend(none.map(|value| (at(field), format!("{value:?}"))));
                }
                let whole = texts(&from.principals).filter_map(namespace_of);
                let unknown = whole.filter(|namespace| !namespace.contains('*') && !self.namespaces.contains(*namespace));
                found.extend(unknown.map(|namespace| (at("principals"), namespace.to_owned())));
                let accounts = from.service_accounts.any_of.iter().chain(&from.service_accounts.none_of);
                let unknown = accounts.filter_map(|account| account.namespace.as_deref()).filter(|n| !self.namespaces.contains(*n));
                found.extend(unknown.map(|namespace| (at("serviceAccounts"), namespace.to_owned())));
            }
        }
        for (field, value) in found {
            let message = format!("{field}: no namespace of these manifests is {value:?}{}", self.meant(&value));
            self.say(named, &message);
        }
    }

    /// Tells of namespaces an object is for that are not there.
    pub(super) fn exports(&mut self, named: &Named, namespaces: &[std::sync::Arc<str>]) {
        let unknown = |namespace: &str| !matches!(namespace, "." | "*" | "~") && !self.namespaces.contains(namespace);
        for (i, namespace) in namespaces.iter().enumerate().filter(|(_, n)| !self.namespaces.is_empty() && unknown(n)).collect::<Vec<_>>() {
            let message = format!("spec.exportTo[{i}]: no namespace of these manifests is {namespace:?}{}", self.meant(namespace));
            self.say(named, &message);
        }
    }

    fn meant(&self, namespace: &str) -> String {
        names::near(namespace, self.namespaces.iter().map(|n| (*n).to_owned()))
    }
}
