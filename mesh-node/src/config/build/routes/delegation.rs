//! A delegate's rules under the rule that delegates to it, merged as Istio merges them.

use std::sync::Arc;

use crate::route::{
    matching::{HeaderMatch, HttpMatch, PathMatch, TextMatch},
    rule::{HeaderOperations, Rule},
};

/// A delegate's rule: both must match, and what the delegate leaves open is the root's. `None` when one of its matches can never hold
/// together with any of the root's.
pub(super) fn merge(root: &Rule, delegate: &Rule) -> Option<Rule> {
    let mut merged = delegate.clone();
    merged.matches = match (root.matches.as_slice(), delegate.matches.as_slice()) {
        ([], own) => own.to_vec(),
        (of_root, []) => of_root.to_vec(),
        (of_root, own) => {
            let mut all = Vec::new();
            for one in own {
                let before = all.len();
                all.extend(of_root.iter().filter(|r| !is_in_conflict(r, one)).map(|r| merge_match(r, one)));
                if all.len() == before {
                    return None;
                }
            }
            all
        }
    };
    merged.name = joined(&root.name, &delegate.name);
    merged.rewrite = merged.rewrite.or_else(|| root.rewrite.clone());
    merged.timeout = merged.timeout.or(root.timeout);
    merged.retries = merged.retries.or_else(|| root.retries.clone());
    merged.cors = merged.cors.or_else(|| root.cors.clone());
    if merged.fault.delay.is_none() && merged.fault.abort.is_none() {
        merged.fault = root.fault.clone();
    }
    if merged.mirrors.is_empty() {
        merged.mirrors.clone_from(&root.mirrors);
    }
    if merged.headers == HeaderOperations::default() {
        merged.headers = root.headers.clone();
    }
    Some(merged)
}

fn joined(root: &Arc<str>, delegate: &Arc<str>) -> Arc<str> {
    match (root.is_empty(), delegate.is_empty()) {
        (_, true) => root.clone(),
        (true, false) => delegate.clone(),
        (false, false) => format!("{root}-{delegate}").into(),
    }
}

/// Both; what both ask about is asked as the delegate does.
fn merge_match(root: &HttpMatch, delegate: &HttpMatch) -> HttpMatch {
    let mut merged = delegate.clone();
    merged.name = joined(&root.name, &delegate.name);
    merged.path = merged.path.or_else(|| root.path.clone());
    merged.scheme = merged.scheme.or_else(|| root.scheme.clone());
    merged.method = merged.method.or_else(|| root.method.clone());
    merged.authority = merged.authority.or_else(|| root.authority.clone());
    merged.port = merged.port.or(root.port);
    let asked = |h: &HeaderMatch| delegate.headers.iter().any(|d| d.of == h.of && d.inverted == h.inverted);
    merged.headers.extend(root.headers.iter().filter(|h| !asked(h)).cloned());
    merged.query.extend(root.query.iter().filter(|q| !delegate.query.iter().any(|d| d.name == q.name)).cloned());
    let asked = |path: &[Arc<str>], inverted: bool| delegate.claims.iter().any(|d| *d.path == *path && d.inverted == inverted);
    merged.claims.extend(root.claims.iter().filter(|c| !asked(&c.path, c.inverted)).cloned());
    // Of clients and gateways the root alone may ask.
    merged.source = if merged.source == root.source { merged.source } else { both(root, delegate) };
    merged
}

fn both(root: &HttpMatch, delegate: &HttpMatch) -> crate::route::matching::SourceMatch {
    let mut source = root.source.clone();
    source.namespace = source.namespace.or_else(|| delegate.source.namespace.clone());
    source.labels = root.source.labels.iter().chain(delegate.source.labels.iter()).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    source
}

/// Whether the two ask for different things of the same.
fn is_in_conflict(root: &HttpMatch, delegate: &HttpMatch) -> bool {
    let texts = [(&root.scheme, &delegate.scheme), (&root.method, &delegate.method), (&root.authority, &delegate.authority)];
    let ports = root.port.is_some() && delegate.port.is_some() && root.port != delegate.port;
    // What must not be there is held against what must.
    let header = |d: &HeaderMatch| root.headers.iter().filter(|r| !r.inverted).any(|r| r.of == d.of && !covers(&r.value, &d.value));
    let query = delegate.query.iter().any(|d| root.query.iter().any(|r| r.name == d.name && !covers(&r.value, &d.value)));
    let claims =
        delegate.claims.iter().any(|d| root.claims.iter().filter(|r| !r.inverted).any(|r| r.path == d.path && !covers(&r.value, &d.value)));
    let (root_path, delegate_path) = (path(root.path.as_ref()), path(delegate.path.as_ref()));
    let paths = match (&root_path.0, &delegate_path.0) {
        (Some(root), Some(delegate)) => !covers(root, delegate),
        _ => false,
    };
    ports
        || paths
        || root_path.1 != delegate_path.1
        || texts.iter().any(|(root, delegate)| matches!((root, delegate), (Some(r), Some(d)) if !covers(r, d)))
        || delegate.headers.iter().any(header)
        || query
        || claims
}

/// A path's test as one of text, and whether in any case.
fn path(path: Option<&PathMatch>) -> (Option<TextMatch>, bool) {
    match path {
        None => (None, false),
        Some(PathMatch::Exact { path, ignore_case }) => (Some(TextMatch::Exact(path.clone())), *ignore_case),
        Some(PathMatch::Prefix { path, ignore_case }) => (Some(TextMatch::Prefix(path.clone())), *ignore_case),
        Some(PathMatch::Segments(path)) => (Some(TextMatch::Prefix(path.clone())), false),
        Some(PathMatch::Regex(pattern)) => (Some(TextMatch::Regex(pattern.clone())), false),
    }
}

/// Whether everything the second takes, the first takes, as far as Istio looks into it: regular expressions and tests for presence it does
/// not.
fn covers(root: &TextMatch, delegate: &TextMatch) -> bool {
    match (root, delegate) {
        (TextMatch::Exact(root), TextMatch::Exact(delegate)) => !root.is_empty() && root == delegate,
        (TextMatch::Prefix(root), TextMatch::Prefix(delegate) | TextMatch::Exact(delegate)) => {
            !root.is_empty() && !delegate.is_empty() && delegate.starts_with(&**root)
        }
        _ => false,
    }
}
