//! From policies as written to what is evaluated.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Mtls, RuleSet,
    matching::{CompiledRule, ConnectionTest, RequestTest, Test, Truth, View},
};
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
            StringMatch::Suffix(text) => return self.expand_suffix(pattern, text),
            StringMatch::Present | StringMatch::Glob(_) => return vec![pattern.clone()],
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

    /// One that leaves the beginning of the trust domain open means the same account in all names of the mesh's, if it means one.
    fn expand_suffix(&self, pattern: &StringMatch, text: &str) -> Vec<StringMatch> {
        let mut all = vec![pattern.clone()];
        if let Some((end, rest)) = text.split_once('/')
            && rest.split('/').count() == 4
            && !end.is_empty()
        {
            let names = self.aliases.iter().chain([&self.local]).map(TrustDomain::as_str).collect::<Vec<_>>();
            if names.iter().any(|name| name.ends_with(end)) {
                let others = names.iter().filter(|name| !name.ends_with(end));
                all.extend(others.map(|name| StringMatch::Exact(format!("{name}/{rest}").into())));
            }
        }
        all
    }
}

/// An `AuthorizationPolicy`, ready to evaluate. An empty list of rules matches nothing, an empty rule everything.
#[derive(Debug, Clone)]
pub struct CompiledPolicy {
    /// `namespace/name`, for logs and metrics.
    pub name: Arc<str>,
    pub action: Action,
    pub dry_run: bool,
    /// Of CUSTOM policies.
    pub provider: Option<Arc<str>>,
    /// It is for what services lead to, by its `targetRefs`, as policies of Istio's waypoints are.
    targeted: bool,
    rules: Vec<CompiledRule>,
}

impl CompiledPolicy {
    pub fn compile(name: &ObjectName, policy: &AuthorizationPolicy, domains: &TrustDomains) -> Self {
        let full: Arc<str> = name.to_string().into();
        let rule = |(i, rule): (usize, &Rule)| {
            let clauses = clauses(rule, &name.namespace, domains);
            let needs_request = clauses.iter().flatten().flatten().any(Test::needs_request);
            let rule_name = format!("ns[{}]-policy[{}]-rule[{i}]", name.namespace, name.name).into();
            CompiledRule { policy: full.clone(), name: rule_name, action: policy.action, clauses, needs_request }
        };
        let rules = policy.rules.iter().enumerate().map(rule).collect();
        let AuthorizationPolicy { action, dry_run, provider, targets, .. } = policy;
        Self { name: full.clone(), action: *action, dry_run: *dry_run, provider: provider.clone(), targeted: !targets.is_empty(), rules }
    }

    /// The same for who comes by a service's port to a pod's: as Istio's waypoints see it, the port that was dialled is the service's.
    /// `ambiguous`: the service has a port of the pod's number, which then is what is meant by it. `None` when it makes no difference.
    pub fn reached_by(&self, service: u16, pod: u16, ambiguous: bool) -> Option<Self> {
        if service == pod {
            return None;
        }
        let judged = |ports: &mut Vec<u16>| {
            let (meant, there) = (ports.contains(&service), ports.contains(&pod));
            if meant && !there {
                ports.push(pod);
            } else if there && !meant && ambiguous {
                // Nobody comes to port 0: a list that is empty would ask for nothing.
                ports.iter_mut().filter(|p| **p == pod).for_each(|p| *p = 0);
            }
            meant != there && (meant || ambiguous)
        };
        let (mut made, mut changed) = (self.clone(), false);
        for test in made.rules.iter_mut().flat_map(|r| &mut r.clauses).flatten().flatten() {
            if let Test::Connection(ConnectionTest::DestinationPort(Values { any_of, none_of })) = test {
                changed |= judged(any_of) | judged(none_of);
            }
        }
        changed.then_some(made)
    }

    /// Whether it asks which port was dialled.
    pub fn asks_ports(&self) -> bool {
        self.rules
            .iter()
            .flat_map(|r| &r.clauses)
            .flatten()
            .flatten()
            .any(|test| matches!(test, Test::Connection(ConnectionTest::DestinationPort(_))))
    }

    /// Whether it asks about requests to a port, and so means something else there on connections that carry none.
    pub fn needs_request(&self, port: u16) -> bool {
        self.rules.iter().any(|r| r.needs_request && r.concerns_port(port))
    }
}

/// ALLOW policies. Without any, everything that is not denied is allowed. Those of workloads and those that services are named in
/// (`targetRefs`) stand each on their own, as at a ztunnel and a waypoint: what comes has to be allowed by both, where there are both.
#[derive(Debug, Clone, Default)]
pub struct Allow {
    layers: Vec<RuleSet>,
    policies: Vec<Arc<str>>,
}

impl Allow {
    fn new(policies: &[&CompiledPolicy]) -> Self {
        let layer = |targeted: bool| {
            let of = policies.iter().filter(|p| p.targeted == targeted).collect::<Vec<_>>();
            (!of.is_empty()).then(|| RuleSet::new(of.iter().flat_map(|p| &p.rules).cloned().collect()))
        };
        let mut names = policies.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
        names.sort();
        names.dedup();
        Self { layers: [false, true].into_iter().filter_map(layer).collect(), policies: names }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Their names, of those without rules too.
    pub fn policies(&self) -> &[Arc<str>] {
        &self.policies
    }

    /// What they make of it, and the first rule that allows it.
    pub(super) fn find(&self, view: &View<'_>) -> (Truth, Option<&CompiledRule>) {
        self.layers.iter().fold((Truth::Yes, None), |(truth, rule), layer| {
            let (of_layer, found) = layer.find(view);
            (truth.min(of_layer), rule.or(found))
        })
    }
}

/// All that is asked of whoever wants in: policies of one set of workloads and one port, by action.
#[derive(Debug, Clone, Default)]
pub struct Authorization {
    /// By the name of the authorizer.
    pub custom: BTreeMap<Arc<str>, RuleSet>,
    pub audit: RuleSet,
    pub deny: RuleSet,
    pub allow: Allow,
    pub shadow_deny: RuleSet,
    pub shadow_allow: Allow,
    /// Names of all of them.
    pub policies: Vec<Arc<str>>,
    /// Some rule asks for the server name of the application's own TLS.
    pub asks_sni: bool,
}

impl Authorization {
    pub fn new<'a>(policies: impl IntoIterator<Item = &'a CompiledPolicy>) -> Self {
        let mut custom: BTreeMap<Arc<str>, Vec<CompiledRule>> = BTreeMap::new();
        let (mut audit, mut deny, mut shadow_deny) = (Vec::new(), Vec::new(), Vec::new());
        let (mut allow, mut shadow_allow) = (Vec::new(), Vec::new());
        let (mut names, mut asks_sni) = (Vec::new(), false);
        for policy in policies {
            asks_sni |= policy
                .rules
                .iter()
                .flat_map(|r| &r.clauses)
                .flatten()
                .flatten()
                .any(|t| matches!(t, Test::Connection(ConnectionTest::Sni(_))));
            names.push(policy.name.clone());
            let list = match (policy.action, policy.dry_run) {
                (Action::Custom, _) => custom.entry(policy.provider.clone().unwrap_or_default()).or_default(),
                (Action::Audit, _) => &mut audit,
                (Action::Deny, false) => &mut deny,
                (Action::Deny, true) => &mut shadow_deny,
                (Action::Allow, dry_run) => {
                    if dry_run { &mut shadow_allow } else { &mut allow }.push(policy);
                    continue;
                }
            };
            list.extend(policy.rules.iter().cloned());
        }
        names.sort();
        Self {
            custom: custom.into_iter().map(|(provider, rules)| (provider, RuleSet::new(rules))).collect(),
            audit: RuleSet::new(audit),
            deny: RuleSet::new(deny),
            allow: Allow::new(&allow),
            shadow_deny: RuleSet::new(shadow_deny),
            shadow_allow: Allow::new(&shadow_allow),
            policies: names,
            asks_sni,
        }
    }
}

fn clauses(rule: &Rule, namespace: &str, domains: &TrustDomains) -> Vec<Vec<Vec<Test>>> {
    let mut clauses = Vec::new();
    if !rule.from.is_empty() {
        clauses.push(rule.from.iter().map(|s| source_tests(s, namespace, domains)).collect());
    }
    if !rule.to.is_empty() {
        clauses.push(rule.to.iter().map(operation_tests).collect());
    }
    clauses.extend(rule.when.iter().map(|c| vec![vec![condition_test(c, namespace, domains)]]));
    clauses
}

/// A test, unless nothing is asked.
fn test<T: Clone, U: Into<Test>>(values: &Values<T>, make: impl FnOnce(Values<T>) -> U) -> Option<Test> {
    (!values.is_empty()).then(|| make(values.clone()).into())
}

fn source_tests(source: &SourceMatch, namespace: &str, domains: &TrustDomains) -> Vec<Test> {
    let SourceMatch { principals: of, request_principals, namespaces, service_accounts, trust_domains, ip_blocks, remote_ip_blocks } =
        source;
    let all = [
        test(of, |v| ConnectionTest::Principal(principals(&v, domains))),
        test(namespaces, ConnectionTest::Namespace),
        test(service_accounts, |v| ConnectionTest::ServiceAccount(accounts(&v, namespace))),
        test(trust_domains, ConnectionTest::TrustDomain),
        test(ip_blocks, ConnectionTest::SourceIp),
        test(remote_ip_blocks, ConnectionTest::RemoteIp),
        test(request_principals, RequestTest::RequestPrincipal),
    ];
    all.into_iter().flatten().collect()
}

fn operation_tests(operation: &OperationMatch) -> Vec<Test> {
    let OperationMatch { hosts, ports, methods, paths } = operation;
    let all = [
        test(ports, ConnectionTest::DestinationPort),
        test(methods, RequestTest::Method),
        test(hosts, RequestTest::Host),
        test(paths, RequestTest::Path),
    ];
    all.into_iter().flatten().collect()
}

fn condition_test(condition: &Condition, namespace: &str, domains: &TrustDomains) -> Test {
    match condition {
        Condition::SourceIp(v) => ConnectionTest::SourceIp(v.clone()).into(),
        Condition::RemoteIp(v) => ConnectionTest::RemoteIp(v.clone()).into(),
        Condition::SourceNamespace(v) => ConnectionTest::Namespace(v.clone()).into(),
        Condition::SourcePrincipal(v) => ConnectionTest::Principal(principals(v, domains)).into(),
        Condition::SourceServiceAccount(v) => ConnectionTest::ServiceAccount(accounts(v, namespace)).into(),
        Condition::SourceTrustDomain(v) => ConnectionTest::TrustDomain(v.clone()).into(),
        Condition::DestinationIp(v) => ConnectionTest::DestinationIp(v.clone()).into(),
        Condition::DestinationPort(v) => ConnectionTest::DestinationPort(v.clone()).into(),
        Condition::Sni(v) => ConnectionTest::Sni(v.clone()).into(),
        Condition::Header(name, v) => RequestTest::Header(name.clone(), v.clone()).into(),
        Condition::Host(v) => RequestTest::Host(v.clone()).into(),
        Condition::Method(v) => RequestTest::Method(v.clone()).into(),
        Condition::RequestPrincipal(v) => RequestTest::RequestPrincipal(v.clone()).into(),
        Condition::Audience(v) => RequestTest::Audience(v.clone()).into(),
        Condition::Presenter(v) => RequestTest::Presenter(v.clone()).into(),
        Condition::Claim(path, v) => RequestTest::Claim(path.clone(), v.clone()).into(),
    }
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
