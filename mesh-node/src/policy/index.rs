//! Rules found by what they ask for, so that what a decision costs does not grow with rules that cannot match it.
//!
//! Every rule is filed under the most telling thing it demands: an exact principal, service account or namespace, a path or
//! what a path begins with, a host. Only rules under keys a request has are looked at, and those that demand nothing of
//! that kind.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use super::{
    Request,
    matching::{CompiledRule, ConnectionTest, RequestTest, Seen, Test, Truth, View},
};
use crate::{
    id::SpiffeId,
    resource::{authorization::Values, strings::StringMatch},
};

type Bucket = Vec<u32>;

/// The rules of one action.
#[derive(Debug, Clone, Default)]
pub struct RuleSet {
    rules: Vec<CompiledRule>,
    principals: HashMap<Arc<str>, Bucket>,
    accounts: HashMap<(String, String), Bucket>,
    namespaces: HashMap<Arc<str>, Bucket>,
    paths: HashMap<Arc<str>, Bucket>,
    prefixes: HashMap<Arc<str>, Bucket>,
    /// The lengths there are, shortest first.
    prefix_lengths: Vec<usize>,
    hosts: HashMap<Arc<str>, Bucket>,
    /// All that are filed under something only a request has.
    by_request: Bucket,
    always: Bucket,
}

/// What a rule is filed under.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Principal(Arc<str>),
    Account((String, String)),
    Namespace(Arc<str>),
    Path(Arc<str>),
    Prefix(Arc<str>),
    Host(Arc<str>),
}

impl RuleSet {
    /// Files rules, which are then in the order of their names: the first that matches is the one that is named.
    pub fn new(mut rules: Vec<CompiledRule>) -> Self {
        rules.sort_by(|a, b| a.name.cmp(&b.name));
        let mut set = Self::default();
        for (number, rule) in (0..).zip(&rules) {
            match keys(rule) {
                None => set.always.push(number),
                Some(keys) => {
                    let by_request = keys.iter().any(|k| matches!(k, Key::Path(_) | Key::Prefix(_) | Key::Host(_)));
                    if by_request {
                        set.by_request.push(number);
                    }
                    keys.into_iter().for_each(|key| set.file(key, number));
                }
            }
        }
        set.prefix_lengths = set.prefixes.keys().map(|p| p.len()).collect();
        set.prefix_lengths.sort_unstable();
        set.prefix_lengths.dedup();
        set.rules = rules;
        set
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    pub fn rules(&self) -> &[CompiledRule] {
        &self.rules
    }

    /// Whether one of them can match what goes to an address.
    pub(super) fn concern(&self, destination: SocketAddr) -> bool {
        self.rules.iter().any(|rule| rule.concerns(destination))
    }

    fn file(&mut self, key: Key, number: u32) {
        let bucket = match key {
            Key::Principal(k) => self.principals.entry(k).or_default(),
            Key::Account(k) => self.accounts.entry(k).or_default(),
            Key::Namespace(k) => self.namespaces.entry(k).or_default(),
            Key::Path(k) => self.paths.entry(k).or_default(),
            Key::Prefix(k) => self.prefixes.entry(k).or_default(),
            Key::Host(k) => self.hosts.entry(k).or_default(),
        };
        if bucket.last() != Some(&number) {
            bucket.push(number);
        }
    }

    /// The best that any rule makes of it, and the first rule that does.
    pub(super) fn find(&self, view: &View<'_>) -> (Truth, Option<&CompiledRule>) {
        let mut best = Search { set: self, view, truth: Truth::No, rule: u32::MAX };
        if self.rules.is_empty() {
            return (Truth::No, None);
        }
        best.look(&self.always);
        if let Some(peer) = &view.facts.peer {
            best.identity(peer);
        }
        match view.seen {
            Seen::Now(request) => best.request(request),
            Seen::Never => best.look(&self.by_request),
            // It depends on the request, as far as one of them can be about this connection at all: most of a pod's are, so that the first tells.
            // Which rule it would be is not asked.
            Seen::Later => {
                let may_hold =
                    |number: &u32| usize::try_from(*number).ok().and_then(|n| self.rules.get(n)).is_some_and(|r| r.truth(view) > Truth::No);
                if best.truth < Truth::Maybe && self.by_request.iter().any(may_hold) {
                    best.truth = Truth::Maybe;
                }
            }
        }
        let rule = usize::try_from(best.rule).ok().and_then(|n| self.rules.get(n));
        (best.truth, rule)
    }
}

struct Search<'s> {
    set: &'s RuleSet,
    view: &'s View<'s>,
    truth: Truth,
    rule: u32,
}

impl Search<'_> {
    fn look(&mut self, bucket: &[u32]) {
        for number in bucket {
            if self.truth == Truth::Yes && *number >= self.rule {
                // Later ones cannot be the first that matches.
                return;
            }
            let rule = usize::try_from(*number).ok().and_then(|n| self.set.rules.get(n));
            let truth = rule.map_or(Truth::No, |rule| rule.truth(self.view));
            if truth > self.truth || truth == Truth::Yes && *number < self.rule {
                self.truth = truth;
                self.rule = *number;
            }
        }
    }

    fn under<K: std::hash::Hash + Eq + ?Sized, Q: std::borrow::Borrow<K> + std::hash::Hash + Eq>(
        &mut self,
        map: &HashMap<Q, Bucket>,
        key: &K,
    ) {
        if let Some(bucket) = map.get(key) {
            self.look(bucket);
        }
    }

    fn identity(&mut self, peer: &SpiffeId) {
        let set = self.set;
        if !set.principals.is_empty() {
            self.under::<str, _>(&set.principals, &peer.principal());
        }
        if !set.accounts.is_empty() {
            self.under(&set.accounts, &(peer.namespace().to_owned(), peer.service_account().to_owned()));
        }
        self.under::<str, _>(&set.namespaces, peer.namespace());
    }

    fn request(&mut self, request: &Request<'_>) {
        let set = self.set;
        if set.by_request.is_empty() {
            return;
        }
        for path in [request.head.path()].into_iter().chain(request.readings.iter().map(String::as_str)) {
            self.under::<str, _>(&set.paths, path);
            for length in set.prefix_lengths.iter().take_while(|l| **l <= path.len()) {
                if let Some(prefix) = path.get(..*length) {
                    self.under::<str, _>(&set.prefixes, prefix);
                }
            }
        }
        if !set.hosts.is_empty() {
            self.under::<str, _>(&set.hosts, &request.head.host().to_ascii_lowercase());
        }
    }
}

/// The keys of one sort that a test demands, if it does.
type KeysOf = fn(&Test) -> Option<Vec<Key>>;

/// The keys one of which whatever matches the rule has. `None`: there are none.
fn keys(rule: &CompiledRule) -> Option<Vec<Key>> {
    let makers: [KeysOf; 5] = [principals, accounts, namespaces, paths, hosts];
    makers.iter().find_map(|make| rule.clauses.iter().find_map(|clause| clause_keys(clause, *make)))
}

/// A clause has keys of a sort when each of its alternatives demands one.
fn clause_keys(clause: &[Vec<Test>], make: KeysOf) -> Option<Vec<Key>> {
    let mut all = Vec::new();
    for alternative in clause {
        all.extend(alternative.iter().find_map(make)?);
    }
    Some(all)
}

/// All values, if each is exact.
fn exact(values: &Values<StringMatch>, key: fn(Arc<str>) -> Key) -> Option<Vec<Key>> {
    let text = |m: &StringMatch| match m {
        StringMatch::Exact(text) => Some(key(text.clone())),
        _ => None,
    };
    if values.any_of.is_empty() { None } else { values.any_of.iter().map(text).collect() }
}

fn principals(test: &Test) -> Option<Vec<Key>> {
    match test {
        Test::Connection(ConnectionTest::Principal(values)) => exact(values, Key::Principal),
        _ => None,
    }
}

fn accounts(test: &Test) -> Option<Vec<Key>> {
    match test {
        Test::Connection(ConnectionTest::ServiceAccount(values)) if !values.any_of.is_empty() => {
            Some(values.any_of.iter().cloned().map(Key::Account).collect())
        }
        _ => None,
    }
}

fn namespaces(test: &Test) -> Option<Vec<Key>> {
    match test {
        Test::Connection(ConnectionTest::Namespace(values)) => exact(values, Key::Namespace),
        _ => None,
    }
}

fn paths(test: &Test) -> Option<Vec<Key>> {
    let Test::Request(RequestTest::Path(values)) = test else { return None };
    if values.any_of.is_empty() {
        return None;
    }
    let key = |(text, whole): (Arc<str>, bool)| if whole { Key::Path(text) } else { Key::Prefix(text) };
    let read = values.any_of.iter().flat_map(|p| std::iter::once(p.prefix()).chain(p.readings().into_iter().map(|p| p.prefix())));
    read.map(|prefix| prefix.map(key)).collect()
}

fn hosts(test: &Test) -> Option<Vec<Key>> {
    match test {
        Test::Request(RequestTest::Host(values)) => exact(values, Key::Host),
        _ => None,
    }
}
