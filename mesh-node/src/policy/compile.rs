//! From policies as written to what is evaluated, for connections without HTTP semantics.
//!
//! A field that only an HTTP request has cannot be evaluated on an opaque connection. Istio's rule for TCP ports is
//! followed: an ALLOW rule with such a field is dropped (narrower), a DENY or AUDIT rule is kept without it (wider), so
//! that what cannot be decided is never let through.

use std::{collections::BTreeMap, sync::Arc};

use super::{Facts, Mtls, matching::Test};
use crate::{
    id::{ObjectName, TrustDomain},
    resource::{
        AuthorizationPolicy, PeerAuthentication,
        authorization::{Action, Condition, OperationMatch, Rule, ServiceAccount, SourceMatch, Values},
        peer_authentication::MtlsMode,
        strings::StringMatch,
    },
};

/// The mesh's trust domain and the names it used to have.
#[derive(Debug, Clone)]
pub struct TrustDomains {
    pub local: TrustDomain,
    pub aliases: Vec<TrustDomain>,
}

impl TrustDomains {
    /// A principal of the local trust domain, an alias or `cluster.local` means the same account in each of them.
    fn expand(&self, pattern: &StringMatch) -> Vec<StringMatch> {
        let (text, rebuild): (&str, fn(String) -> StringMatch) = match pattern {
            StringMatch::Exact(t) => (t, |s| StringMatch::Exact(s.into())),
            StringMatch::Prefix(t) => (t, |s| StringMatch::Prefix(s.into())),
            StringMatch::Suffix(_) | StringMatch::Present => return vec![pattern.clone()],
        };
        let Some((domain, rest)) = text.split_once('/') else { return vec![pattern.clone()] };
        let mut all = vec![self.local.as_str(), "cluster.local"];
        all.extend(self.aliases.iter().map(TrustDomain::as_str));
        if !all.contains(&domain) {
            return vec![pattern.clone()];
        }
        all.sort_unstable();
        all.dedup();
        // cluster.local stands for the local domain; it is not itself trusted unless it is local or an alias, and a
        // peer of an untrusted domain never gets this far.
        all.into_iter().map(|d| rebuild(format!("{d}/{rest}"))).collect()
    }
}

/// An `AuthorizationPolicy`, ready to evaluate. An empty list of rules matches nothing, an empty rule everything.
#[derive(Debug, Clone)]
pub struct CompiledPolicy {
    /// `namespace/name`, for logs and metrics.
    pub name: Arc<str>,
    pub action: Action,
    pub dry_run: bool,
    rules: Vec<CompiledRule>,
    /// Fields that could not be evaluated on opaque connections, for the policy's status.
    pub http_only: Vec<String>,
}

/// Every clause must hold; a clause holds when one of its alternatives does, an alternative when all its tests do.
#[derive(Debug, Clone, PartialEq)]
struct CompiledRule(Vec<Vec<Vec<Test>>>);

impl CompiledPolicy {
    pub fn compile(name: &ObjectName, policy: &AuthorizationPolicy, domains: &TrustDomains) -> Self {
        let mut http_only = Vec::new();
        let mut rules = Vec::new();
        for (i, rule) in policy.rules.iter().enumerate() {
            let fields = http_fields(rule, i);
            let drop = policy.action == Action::Allow && !fields.is_empty();
            http_only.extend(fields);
            if !drop {
                rules.push(compile_rule(rule, &name.namespace, domains));
            }
        }
        Self { name: name.to_string().into(), action: policy.action, dry_run: policy.dry_run, rules, http_only }
    }

    pub fn matches(&self, facts: &Facts) -> bool {
        self.rules.iter().any(|r| r.0.iter().all(|clause| clause.iter().any(|tests| tests.iter().all(|t| t.holds(facts)))))
    }
}

fn http_fields(rule: &Rule, index: usize) -> Vec<String> {
    let from = rule.from.iter().enumerate();
    let from = from.flat_map(|(i, s)| s.http_only.iter().map(move |f| format!("spec.rules[{index}].from[{i}].source.{f}")));
    let to = rule.to.iter().enumerate();
    let to = to.flat_map(|(i, o)| o.http_only.iter().map(move |f| format!("spec.rules[{index}].to[{i}].operation.{f}")));
    let when = rule.when.iter().enumerate().filter_map(|(i, c)| match c {
        Condition::HttpOnly(key) => Some(format!("spec.rules[{index}].when[{i}] ({key})")),
        _ => None,
    });
    from.chain(to).chain(when).collect()
}

fn compile_rule(rule: &Rule, namespace: &str, domains: &TrustDomains) -> CompiledRule {
    let mut clauses = Vec::new();
    if !rule.from.is_empty() {
        clauses.push(rule.from.iter().map(|s| source_tests(s, namespace, domains)).collect());
    }
    if !rule.to.is_empty() {
        clauses.push(rule.to.iter().map(operation_tests).collect());
    }
    clauses.extend(rule.when.iter().filter_map(|c| Some(vec![vec![condition_test(c, namespace, domains)?]])));
    CompiledRule(clauses)
}

fn source_tests(source: &SourceMatch, namespace: &str, domains: &TrustDomains) -> Vec<Test> {
    let mut tests = Vec::new();
    if !source.principals.is_empty() {
        tests.push(Test::Principal(principals(&source.principals, domains)));
    }
    if !source.namespaces.is_empty() {
        tests.push(Test::Namespace(source.namespaces.clone()));
    }
    if !source.service_accounts.is_empty() {
        tests.push(Test::ServiceAccount(accounts(&source.service_accounts, namespace)));
    }
    // Without HTTP there is no forwarded address: the remote address is the source address.
    for blocks in [&source.ip_blocks, &source.remote_ip_blocks] {
        if !blocks.is_empty() {
            tests.push(Test::SourceIp(blocks.clone()));
        }
    }
    tests
}

fn operation_tests(operation: &OperationMatch) -> Vec<Test> {
    if operation.ports.is_empty() { Vec::new() } else { vec![Test::DestinationPort(operation.ports.clone())] }
}

fn condition_test(condition: &Condition, namespace: &str, domains: &TrustDomains) -> Option<Test> {
    Some(match condition {
        Condition::SourceIp(v) | Condition::RemoteIp(v) => Test::SourceIp(v.clone()),
        Condition::SourceNamespace(v) => Test::Namespace(v.clone()),
        Condition::SourcePrincipal(v) => Test::Principal(principals(v, domains)),
        Condition::SourceServiceAccount(v) => Test::ServiceAccount(accounts(v, namespace)),
        Condition::DestinationIp(v) => Test::DestinationIp(v.clone()),
        Condition::DestinationPort(v) => Test::DestinationPort(v.clone()),
        Condition::HttpOnly(_) => return None,
    })
}

fn principals(values: &Values<StringMatch>, domains: &TrustDomains) -> Values<StringMatch> {
    let expand = |patterns: &[StringMatch]| patterns.iter().flat_map(|p| domains.expand(p)).collect();
    Values { any_of: expand(&values.any_of), none_of: expand(&values.none_of) }
}

fn accounts(values: &Values<ServiceAccount>, namespace: &str) -> Values<(String, String)> {
    let full = |a: &ServiceAccount| (a.namespace.clone().unwrap_or_else(|| namespace.to_owned()), a.name.clone());
    Values { any_of: values.any_of.iter().map(full).collect(), none_of: values.none_of.iter().map(full).collect() }
}

/// The mutual TLS mode of a workload from the one policy in force in each scope, widest first.
pub fn effective_mtls(
    mesh: Option<&PeerAuthentication>,
    namespace: Option<&PeerAuthentication>,
    workload: Option<&PeerAuthentication>,
) -> Mtls {
    let mut mode = MtlsMode::Permissive;
    for policy in [mesh, namespace, workload].into_iter().flatten() {
        if policy.mode != MtlsMode::Unset {
            mode = policy.mode;
        }
    }
    let strict = mode == MtlsMode::Strict;
    let ports: BTreeMap<u16, bool> = workload
        .iter()
        .flat_map(|w| &w.port_modes)
        .filter(|(_, m)| **m != MtlsMode::Unset)
        .map(|(port, m)| (*port, *m == MtlsMode::Strict))
        .filter(|(_, s)| *s != strict)
        .collect();
    Mtls { strict, ports }
}
