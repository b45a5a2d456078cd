//! Policies: which of them govern which workload.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Builder, age,
    services::{Guard, Guards},
};
use crate::{
    config::{snapshot::Map, store::Severity},
    detect::Protocol,
    id::ObjectName,
    policy::{Authorization, CompiledPolicy, Governing, TrustDomains, WorkloadPolicy, effective_mtls},
    resource::{
        AuthorizationPolicy, ELSEWHERE, NOT_IN_ROOT, Named, PeerAuthentication, RequestAuthentication,
        authorization::Action,
        request_authentication::{JwtRule, KeySource, RemoteKeys},
        selector::{Labels, Selecting, WorkloadSelector},
        target::TargetRef,
    },
    route::{PortOf, Ports},
};

/// A port of a pod that a service leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attached<'a> {
    pub service: &'a ObjectName,
    /// The service's port, and the pod's.
    service_port: u16,
    port: u16,
    protocol: Protocol,
}

/// By the pod's address.
pub(super) type Attachments<'a> = Map<IpAddr, Vec<Attached<'a>>>;

/// Which workloads a policy is for, of those its namespace reaches.
pub(super) enum Scope<'a> {
    Workloads(Option<&'a WorkloadSelector>),
    Services(Vec<&'a str>),
}

enum What {
    Authorization(Arc<CompiledPolicy>),
    Authentication(Vec<Arc<JwtRule>>),
}

struct Policy<'a> {
    named: &'a Named,
    scope: Scope<'a>,
    what: What,
    /// Ports that carry no requests, on which it means something else.
    opaque: BTreeMap<u16, ObjectName>,
}

/// Objects of one namespace, by their numbers, as workloads find them.
#[derive(Default)]
pub(super) struct Reaching<'a> {
    everyone: Vec<usize>,
    selecting: Selecting<'a, usize>,
    /// By the Service they refer to, which is one of the same namespace.
    services: HashMap<&'a str, Vec<usize>>,
}

impl<'a> Reaching<'a> {
    pub(super) fn add(&mut self, number: usize, scope: &Scope<'a>) {
        match scope {
            Scope::Workloads(None) => self.everyone.push(number),
            Scope::Workloads(Some(selector)) => self.selecting.insert(selector, number),
            Scope::Services(names) => names.iter().for_each(|name| self.services.entry(name).or_default().push(number)),
        }
    }

    /// Those for a workload with these labels whatever leads to it, the least number first.
    pub(super) fn selected(&self, labels: &Labels) -> Vec<usize> {
        let mut found = self.selecting.of(labels);
        found.extend(&self.everyone);
        found.sort_unstable();
        found
    }

    /// Those for a Service of their namespace.
    pub(super) fn referring(&self, service: &str) -> &[usize] {
        self.services.get(service).map_or(&[], Vec::as_slice)
    }
}

/// Policies by the scope they apply to.
#[derive(Default)]
pub(super) struct Policies<'a> {
    mesh_mtls: Option<&'a PeerAuthentication>,
    namespace_mtls: HashMap<&'a str, &'a PeerAuthentication>,
    /// Oldest first.
    with_selectors: Vec<&'a PeerAuthentication>,
    /// Indices into them.
    workload_mtls: HashMap<&'a str, Selecting<'a, usize>>,
    all: Vec<Policy<'a>>,
    /// Indices into `all`. Those of the root namespace apply everywhere.
    by_namespace: HashMap<&'a str, Reaching<'a>>,
    /// Compiled once for all workloads that the same policies govern.
    compiled: HashMap<Vec<usize>, Arc<Governing>>,
    /// Policies of services by the port they are reached by and the pod's.
    by_port: HashMap<(usize, u16, u16, bool), usize>,
    /// Those of all services: of the class of waypoints there would be.
    of_all_services: Vec<usize>,
    /// Key sets that pods of this node need.
    remote: std::collections::BTreeSet<RemoteKeys>,
}

impl<'a> Policies<'a> {
    pub(super) fn new(builder: &mut Builder<'a>, domains: &TrustDomains) -> Self {
        let mut policies = Self::default();
        let mut peers = std::mem::take(&mut builder.parts.peer_authentications);
        peers.sort_by_key(|(named, _)| age(named));
        for (named, policy) in peers {
            policies.peer_authentication(builder, named, policy);
        }
        for (named, policy) in std::mem::take(&mut builder.parts.authorizations) {
            policies.authorization(builder, (named, policy), domains);
        }
        for (named, policy) in std::mem::take(&mut builder.parts.request_authentications) {
            policies.request_authentication(builder, named, policy);
        }
        policies
    }

    /// Called oldest first: a scope that is taken already stays as it is.
    fn peer_authentication(&mut self, builder: &mut Builder<'a>, named: &'a Named, policy: &'a PeerAuthentication) {
        let namespace: &str = &named.key.name.namespace;
        let root = namespace == &*builder.mesh.root_namespace;
        if let Some(selector) = &policy.selector {
            if root {
                let message = &format!("spec.selector: {NOT_IN_ROOT}");
                return builder.remark(Severity::Error, named, message);
            }
            self.workload_mtls.entry(namespace).or_default().insert(selector, self.with_selectors.len());
            return self.with_selectors.push(policy);
        }
        let taken = if root {
            self.mesh_mtls.is_some() || self.mesh_mtls.replace(policy).is_some()
        } else {
            match self.namespace_mtls.entry(namespace) {
                Entry::Occupied(_) => true,
                Entry::Vacant(v) => {
                    v.insert(policy);
                    false
                }
            }
        };
        if taken {
            builder.remark(Severity::Error, named, "spec: an older PeerAuthentication covers this scope and is used; remove one of them");
        }
    }

    fn authorization(&mut self, builder: &mut Builder<'a>, (named, policy): (&'a Named, &'a AuthorizationPolicy), domains: &TrustDomains) {
        let compiled = CompiledPolicy::compile(&named.key.name, policy, domains);
        if let Some(provider) = &policy.provider {
            Self::look_for(builder, named, provider);
        }
        if let Some(scope) = scope(builder, named, policy.selector.as_ref(), &policy.targets) {
            let what = What::Authorization(Arc::new(compiled));
            self.add(Policy { named, scope, what, opaque: BTreeMap::new() }, &policy.targets);
        }
    }

    /// Remarks on a provider that cannot be asked.
    fn look_for(builder: &mut Builder<'a>, named: &Named, provider: &str) {
        let Some(authorizer) = builder.parts.authorizers.get(provider) else {
            let message = format!(
                "spec.provider.name: the mesh has no ext_authz provider {provider:?}, so what the policy matches is refused; add it to extensionProviders in the ConfigMap istio"
            );
            return builder.remark(Severity::Warning, named, &message);
        };
        let mut labels = authorizer.service.split('.');
        let (name, namespace) = (labels.next().unwrap_or_default(), labels.next().unwrap_or_default());
        let port = authorizer.port;
        let missing = match builder.parts.by_name.get(&(namespace, name)) {
            None => "does not exist".to_owned(),
            Some(service) if !service.ports.iter().any(|p| p.port == port) => format!("has no port {port}"),
            Some(_) => return,
        };
        let message = format!(
            "spec.provider.name: the Service {namespace}/{name} of the ext_authz provider {provider:?} {missing}, so what the policy matches is refused; create it, or correct extensionProviders in the ConfigMap istio"
        );
        builder.remark(Severity::Warning, named, &message);
    }

    fn request_authentication(&mut self, builder: &mut Builder<'a>, named: &'a Named, policy: &'a RequestAuthentication) {
        if let Some(scope) = scope(builder, named, policy.selector.as_ref(), &policy.targets) {
            let what = What::Authentication(policy.rules.clone());
            self.add(Policy { named, scope, what, opaque: BTreeMap::new() }, &policy.targets);
        }
    }

    fn add(&mut self, policy: Policy<'a>, targets: &[TargetRef]) {
        if targets.contains(&TargetRef::Everything) {
            self.of_all_services.push(self.all.len());
        }
        let namespace: &'a str = &policy.named.key.name.namespace;
        self.by_namespace.entry(namespace).or_default().add(self.all.len(), &policy.scope);
        self.all.push(policy);
    }

    /// What governs a workload.
    pub(super) fn of(&mut self, name: &ObjectName, labels: &Labels, root: &str, attached: &[Attached<'_>]) -> WorkloadPolicy {
        let namespace: &str = &name.namespace;
        let selected = self.workload_mtls.get(namespace).and_then(|all| all.of(labels).first().copied());
        let workload = selected.and_then(|i| self.with_selectors.get(i)).copied();
        let mtls = effective_mtls(self.mesh_mtls, self.namespace_mtls.get(namespace).copied(), workload);
        let (mut base, mut ports): (Vec<usize>, BTreeMap<u16, Vec<usize>>) = (Vec::new(), BTreeMap::new());
        let mut by_service = Vec::new();
        let ambiguous = |a: &Attached<'_>| attached.iter().any(|b| b.service == a.service && b.service_port == a.port);
        for home in [namespace, root].into_iter().take(if namespace == root { 1 } else { 2 }) {
            let Some(reaching) = self.by_namespace.get(home) else { continue };
            base.extend(reaching.selected(labels));
            for a in attached.iter().filter(|a| *a.service.namespace == *home) {
                let referring = reaching.referring(&a.service.name);
                by_service.extend(referring.iter().map(|i| (*i, a.service_port, a.port, ambiguous(a))));
            }
        }
        for (i, service_port, port, ambiguous) in by_service {
            let i = self.reached_by(i, service_port, port, ambiguous);
            ports.entry(port).or_default().push(i);
        }
        // Where services disagree it is found out.
        let opaque = protocols(attached, namespace).into_iter().filter(|(_, protocol)| matches!(protocol, Protocol::Tcp | Protocol::Tls));
        for (port, _) in opaque {
            for i in base.iter().chain(ports.get(&port).into_iter().flatten()) {
                self.all[*i].opaque.entry(port).or_insert_with(|| name.clone());
            }
        }
        let mut all_ports = BTreeMap::new();
        for (port, mut extra) in ports {
            extra.extend(&base);
            extra.sort_unstable();
            extra.dedup();
            all_ports.insert(port, self.governing(extra));
        }
        WorkloadPolicy { mtls, everywhere: self.governing(base), ports: all_ports }
    }

    /// What is asked of each service that policies refer to, beside what its endpoints ask.
    pub(super) fn of_services(&mut self) -> Guards {
        let mut found: BTreeMap<ObjectName, Vec<usize>> = BTreeMap::new();
        for (namespace, reaching) in &self.by_namespace {
            for (service, policies) in &reaching.services {
                found.insert(ObjectName::new(namespace, service), policies.clone());
            }
        }
        let all = self.of_all_services.clone();
        let of_any = (!all.is_empty()).then(|| self.guard(all.clone()));
        let of = found.into_iter().map(|(name, own)| (name, self.guard([own, all.clone()].concat()))).collect();
        Guards { of, of_any }
    }

    fn guard(&mut self, mut policies: Vec<usize>) -> Guard {
        policies.sort_unstable();
        policies.dedup();
        let asks_ports = policies.iter().any(|i| matches!(&self.all[*i].what, What::Authorization(policy) if policy.asks_ports()));
        let governing = self.governing(policies);
        // Any pod of this node may be a client.
        self.needs_keys(&governing);
        Guard { governing, asks_ports }
    }

    /// A policy of a service as it is for its port: another where it asks about that.
    fn reached_by(&mut self, i: usize, service_port: u16, port: u16, ambiguous: bool) -> usize {
        if let Some(found) = self.by_port.get(&(i, service_port, port, ambiguous)) {
            return *found;
        }
        let other = match &self.all[i].what {
            What::Authorization(policy) => policy.reached_by(service_port, port, ambiguous),
            What::Authentication(_) => None,
        };
        let found = match other {
            None => i,
            Some(policy) => {
                let (named, scope) = (self.all[i].named, Scope::Services(Vec::new()));
                self.all.push(Policy { named, scope, what: What::Authorization(Arc::new(policy)), opaque: BTreeMap::new() });
                self.all.len() - 1
            }
        };
        self.by_port.insert((i, service_port, port, ambiguous), found);
        found
    }

    fn governing(&mut self, policies: Vec<usize>) -> Arc<Governing> {
        if let Some(found) = self.compiled.get(&policies) {
            return found.clone();
        }
        let all = policies.iter().map(|i| &self.all[*i].what).collect::<Vec<_>>();
        let authorization = Authorization::new(all.iter().filter_map(|what| match what {
            What::Authorization(policy) => Some(&**policy),
            What::Authentication(_) => None,
        }));
        let rules = all.iter().filter_map(|what| match what {
            What::Authentication(rules) => Some(rules),
            What::Authorization(_) => None,
        });
        let mut authentication = rules.flatten().cloned().collect::<Vec<_>>();
        // As istiod has them tried, of whichever policy they are.
        authentication.sort_by(|one, other| one.issuer.cmp(&other.issuer));
        let made = Arc::new(Governing { authorization: Arc::new(authorization), authentication });
        self.compiled.insert(policies, made.clone());
        made
    }

    /// The key sets that have to be fetched, and remarks on policies that ask about requests where there are none.
    pub(super) fn finish(self, builder: &mut Builder<'_>) -> std::collections::BTreeSet<RemoteKeys> {
        for policy in &self.all {
            match &policy.what {
                What::Authorization(compiled) => {
                    let effect = match compiled.action {
                        Action::Allow => "its rules that ask about requests allow nothing there",
                        Action::Deny | Action::Audit => "its rules apply there whatever is sent",
                        Action::Custom => "its rules apply there whatever is sent, and only a gRPC provider can be asked about connections",
                    };
                    for (port, pod) in policy.opaque.iter().filter(|(port, _)| compiled.needs_request(**port)).take(1) {
                        let message =
                            format!("spec.rules: port {port} of {pod} (and others, perhaps) is declared not to carry HTTP: {effect}");
                        builder.remark(Severity::Warning, policy.named, &message);
                    }
                }
                What::Authentication(_) => {}
            }
        }
        self.remote
    }

    /// Takes in that a pod of this node is governed by these.
    pub(super) fn take_local(&mut self, policy: &WorkloadPolicy) {
        policy.ports.values().chain([&policy.everywhere]).for_each(|governing| self.needs_keys(governing));
    }

    fn needs_keys(&mut self, governing: &Governing) {
        self.remote.extend(governing.authentication.iter().filter_map(|r| match &r.keys {
            KeySource::Remote(keys) => Some(keys.clone()),
            KeySource::Inline(_) => None,
        }));
    }
}

fn scope<'a>(
    builder: &mut Builder<'a>,
    named: &'a Named,
    selector: Option<&'a WorkloadSelector>,
    targets: &'a [TargetRef],
) -> Option<Scope<'a>> {
    if targets.is_empty() {
        return Some(Scope::Workloads(selector));
    }
    if targets.contains(&TargetRef::Everything) {
        if named.key.name.namespace != builder.mesh.root_namespace {
            let message = &format!("spec.targetRefs: {ELSEWHERE}");
            builder.remark(Severity::Error, named, message);
            return None;
        }
        return Some(Scope::Workloads(None));
    }
    let services = targets.iter().filter_map(TargetRef::service).collect::<Vec<_>>();
    let namespace = &*named.key.name.namespace;
    for missing in services.iter().filter(|name| !builder.parts.by_name.contains_key(&(namespace, **name))) {
        let message = format!("spec.targetRefs: there is no Service {missing} in the policy's namespace (yet)");
        builder.statuses.push(builder.status(Severity::Warning, named, &message));
    }
    Some(Scope::Services(services))
}

/// Which services lead to which ports of which addresses.
pub(super) fn attachments<'a>(builder: &Builder<'a>) -> Attachments<'a> {
    let mut all = Attachments::default();
    for (named, service) in &builder.parts.services {
        let name: &'a ObjectName = &named.key.name;
        let slices = builder.parts.slices.get(&(&*name.namespace, &*name.name)).map(Vec::as_slice).unwrap_or_default();
        for port in &service.ports {
            let protocol = Protocol::declared(&port.name, port.app_protocol.as_deref(), port.port);
            for slice in slices {
                let Some(target) = slice.ports.get(&port.name) else { continue };
                for ip in slice.endpoints.iter().flat_map(|e| &e.addresses) {
                    let attached = Attached { service: name, service_port: port.port, port: *target, protocol };
                    let list = all.entry(*ip).or_default();
                    if !list.contains(&attached) {
                        list.push(attached);
                    }
                }
            }
        }
    }
    all
}

/// What services make of the ports of a pod of a namespace.
pub(super) fn ports(attached: &[Attached<'_>], namespace: &str) -> Ports {
    let protocols = protocols(attached, namespace);
    let mut http_of: BTreeMap<u16, Vec<ObjectName>> = BTreeMap::new();
    for a in attached.iter().filter(|a| *a.service.namespace == *namespace && a.protocol.is_http()) {
        let disagree = protocols.get(&a.port).is_some_and(|p| !p.is_http());
        if disagree && attached.iter().all(|b| (b.service, b.port) != (a.service, a.port) || b.protocol.is_http()) {
            http_of.entry(a.port).or_default().push(a.service.clone());
        }
    }
    Ports { protocols, http_of, services: services(attached, namespace), shared: shared(attached, namespace) }
}

/// What the ports of a pod carry, as the services of its own namespace that lead to them declare: anybody can make a service
/// that leads to somebody else's pod. Where they disagree, it is found out; which HTTP it is always is.
fn protocols(attached: &[Attached<'_>], namespace: &str) -> BTreeMap<u16, Protocol> {
    let mut found: BTreeMap<u16, Vec<Protocol>> = BTreeMap::new();
    for a in attached.iter().filter(|a| *a.service.namespace == *namespace) {
        found.entry(a.port).or_default().push(a.protocol);
    }
    found.into_iter().map(|(port, all)| (port, Protocol::agreed(all))).collect()
}

/// The services that lead to ports several lead to.
fn shared(attached: &[Attached<'_>], namespace: &str) -> BTreeMap<u16, Vec<PortOf>> {
    let mut found: BTreeMap<u16, Vec<PortOf>> = BTreeMap::new();
    for a in attached.iter().filter(|a| *a.service.namespace == *namespace) {
        found.entry(a.port).or_default().push(PortOf { service: a.service.clone(), port: a.service_port });
    }
    found.retain(|_, all| {
        all.sort();
        all.dedup();
        all.len() > 1
    });
    found
}

/// The services that lead to a workload's ports, of its own namespace: the first by name where there are several.
fn services(attached: &[Attached<'_>], namespace: &str) -> BTreeMap<u16, PortOf> {
    let mut found: BTreeMap<u16, PortOf> = BTreeMap::new();
    for a in attached.iter().filter(|a| *a.service.namespace == *namespace) {
        let this = PortOf { service: a.service.clone(), port: a.service_port };
        found.entry(a.port).and_modify(|first| *first = first.clone().min(this.clone())).or_insert(this);
    }
    found
}
