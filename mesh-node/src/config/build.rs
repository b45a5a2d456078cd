//! From objects to a snapshot: joins pods with namespaces, services with endpoints, and workloads with their policies.

mod routes;
mod services;

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use super::{
    settings::MeshSettings,
    snapshot::Snapshot,
    store::{Severity, Status, Store},
};
use crate::{
    id::{ObjectName, SpiffeId},
    policy::{CompiledPolicy, WorkloadPolicy, effective_mtls},
    resource::{
        AuthorizationPolicy, DestinationRule, EndpointSlice, GatewayRoute, Named, Object, PeerAuthentication, Pod, ReferenceGrant,
        VirtualService,
        authorization::Action,
        kube,
        selector::{Labels, WorkloadSelector},
    },
    route::Workload,
};

/// Builds the next snapshot. Loads of endpoints that stay are carried over from the previous one.
pub fn build(store: &Store, mesh: &Arc<MeshSettings>, previous: &Snapshot, now: Instant) -> (Snapshot, Vec<Status>) {
    let mut builder = Builder { mesh, store, statuses: store.statuses(), parts: Parts::default() };
    for named in store.objects().into_values() {
        builder.take(named);
    }
    let policies = builder.policies();
    let mut snapshot = Snapshot::empty(mesh.clone());
    snapshot.generation = previous.generation + 1;
    builder.workloads(&policies, &mut snapshot);
    services::build(&mut builder, previous, &mut snapshot, now);
    builder.statuses.sort();
    (snapshot, builder.statuses)
}

/// References into the store by kind.
#[derive(Default)]
struct Parts<'a> {
    namespaces: HashMap<&'a str, &'a Labels>,
    nodes: HashMap<&'a str, &'a kube::Node>,
    pods: Vec<(&'a Named, &'a Pod)>,
    services: Vec<(&'a Named, &'a kube::Service)>,
    slices: HashMap<(&'a str, &'a str), Vec<&'a EndpointSlice>>,
    peer_authentications: Vec<(&'a Named, &'a PeerAuthentication)>,
    authorizations: Vec<(&'a Named, &'a AuthorizationPolicy)>,
    virtual_services: Vec<(&'a Named, &'a VirtualService)>,
    destination_rules: Vec<(&'a Named, &'a DestinationRule)>,
    gateway_routes: Vec<(&'a Named, &'a GatewayRoute)>,
    grants: Vec<(&'a Named, &'a ReferenceGrant)>,
}

struct Builder<'a> {
    mesh: &'a MeshSettings,
    store: &'a Store,
    statuses: Vec<Status>,
    parts: Parts<'a>,
}

/// Policies by the scope they apply to.
#[derive(Default)]
struct Policies<'a> {
    mesh_mtls: Option<&'a PeerAuthentication>,
    namespace_mtls: HashMap<&'a str, &'a PeerAuthentication>,
    /// Oldest first.
    workload_mtls: HashMap<&'a str, Vec<&'a PeerAuthentication>>,
    /// By namespace; those of the root namespace apply everywhere.
    authorizations: HashMap<&'a str, Vec<Selected<'a>>>,
}

/// A policy and which workloads it is for; all, without a selector.
type Selected<'a> = (Option<&'a WorkloadSelector>, Arc<CompiledPolicy>);

impl<'a> Builder<'a> {
    fn take(&mut self, named: &'a Named) {
        let parts = &mut self.parts;
        match &named.object {
            Object::Namespace(n) => drop(parts.namespaces.insert(&named.key.name.name, &n.labels)),
            Object::Pod(p) => parts.pods.push((named, p)),
            Object::Service(s) => parts.services.push((named, s)),
            Object::EndpointSlice(s) => {
                if let Some(service) = &s.service {
                    parts.slices.entry((&named.key.name.namespace, service)).or_default().push(s);
                }
            }
            Object::PeerAuthentication(p) => parts.peer_authentications.push((named, p)),
            Object::AuthorizationPolicy(p) => parts.authorizations.push((named, p)),
            Object::Node(n) => drop(parts.nodes.insert(&named.key.name.name, n)),
            Object::VirtualService(v) => parts.virtual_services.push((named, v)),
            Object::DestinationRule(d) => parts.destination_rules.push((named, d)),
            Object::GatewayRoute(r) => parts.gateway_routes.push((named, r)),
            Object::ReferenceGrant(g) => parts.grants.push((named, g)),
        }
    }

    fn remark(&mut self, severity: Severity, named: &Named, message: &str) {
        let status = self.status(severity, named, message);
        self.statuses.push(status);
    }

    fn status(&self, severity: Severity, named: &Named, message: &str) -> Status {
        let origin = self.store.origin_of(&named.key).map(ToString::to_string).unwrap_or_default();
        Status { origin, severity, message: format!("{}: {message}", named.key) }
    }

    fn policies(&mut self) -> Policies<'a> {
        let mut policies = Policies::default();
        let mut peers = std::mem::take(&mut self.parts.peer_authentications);
        peers.sort_by_key(|(named, _)| age(named));
        for (named, policy) in peers {
            self.peer_authentication(named, policy, &mut policies);
        }
        for (named, policy) in std::mem::take(&mut self.parts.authorizations) {
            self.authorization(named, policy, &mut policies);
        }
        policies
    }

    /// Called oldest first: a scope that is taken already stays as it is.
    fn peer_authentication(&mut self, named: &'a Named, policy: &'a PeerAuthentication, policies: &mut Policies<'a>) {
        let namespace: &str = &named.key.name.namespace;
        let root = namespace == &*self.mesh.root_namespace;
        if policy.selector.is_some() {
            if root {
                let message = "spec.selector: is ignored in the root namespace; move the object to the workload's namespace";
                return self.remark(Severity::Error, named, message);
            }
            return policies.workload_mtls.entry(namespace).or_default().push(policy);
        }
        let taken = if root {
            policies.mesh_mtls.is_some() || policies.mesh_mtls.replace(policy).is_some()
        } else {
            match policies.namespace_mtls.entry(namespace) {
                std::collections::hash_map::Entry::Occupied(_) => true,
                std::collections::hash_map::Entry::Vacant(v) => {
                    v.insert(policy);
                    false
                }
            }
        };
        if taken {
            self.remark(Severity::Error, named, "spec: an older PeerAuthentication covers this scope and is used; remove one of them");
        }
    }

    fn authorization(&mut self, named: &'a Named, policy: &'a AuthorizationPolicy, policies: &mut Policies<'a>) {
        let compiled = CompiledPolicy::compile(&named.key.name, policy, &self.mesh.trust_domains);
        for field in &compiled.http_only {
            let effect = match compiled.action {
                Action::Allow => "the rule allows nothing",
                Action::Deny | Action::Audit => "the rule applies whatever the request is",
            };
            let message = format!("{field}: needs HTTP, which this version of mesh-node does not parse; {effect}");
            self.remark(Severity::Warning, named, &message);
        }
        policies.authorizations.entry(&named.key.name.namespace).or_default().push((policy.selector.as_ref(), Arc::new(compiled)));
    }

    fn workloads(&mut self, policies: &Policies<'_>, snapshot: &mut Snapshot) {
        let mut owners: BTreeMap<IpAddr, (&Named, Option<SystemTime>)> = BTreeMap::new();
        for (named, pod) in std::mem::take(&mut self.parts.pods) {
            if pod.finished {
                continue;
            }
            let workload = match self.workload(named, pod, policies) {
                Ok(workload) => Arc::new(workload),
                Err(problem) => {
                    self.remark(Severity::Error, named, &problem);
                    continue;
                }
            };
            snapshot.workloads.insert(workload.uid.clone(), workload.clone());
            // A host-network pod shares its node's address: no traffic can be told to be its own.
            for ip in workload.ips.iter().filter(|_| !pod.host_network) {
                match owners.entry(*ip) {
                    Entry::Vacant(v) => {
                        v.insert((named, named.created));
                        snapshot.by_ip.insert(*ip, workload.clone());
                    }
                    Entry::Occupied(mut o) => {
                        let other = o.get().0.key.clone();
                        let newer = named.created > o.get().1;
                        if newer {
                            o.insert((named, named.created));
                            snapshot.by_ip.insert(*ip, workload.clone());
                        }
                        let used = if newer { &named.key } else { &other };
                        self.remark(
                            Severity::Warning,
                            named,
                            &format!("status.podIPs: {ip} is also claimed by {other}; {used}, the newer, has it"),
                        );
                    }
                }
            }
        }
    }

    /// Where a node is, as far as its labels say.
    fn locality(&self, node: &str, zone: Option<&Arc<str>>) -> kube::Node {
        let mut locality = self.parts.nodes.get(node).copied().cloned().unwrap_or_default();
        if locality.zone.is_empty() {
            locality.zone = zone.cloned().unwrap_or_default();
        }
        locality
    }

    fn workload(&self, named: &Named, pod: &Pod, policies: &Policies<'_>) -> Result<Workload, String> {
        let name = &named.key.name;
        let namespace = self.parts.namespaces.get(&*name.namespace).copied();
        let identity = SpiffeId::new(&self.mesh.trust_domains.local, &name.namespace, &pod.service_account)
            .map_err(|e| format!("spec.serviceAccountName: {e}"))?;
        Ok(Workload {
            uid: pod.uid.clone(),
            name: name.clone(),
            workload_name: pod.workload_name.clone(),
            node: pod.node.clone(),
            identity,
            labels: pod.labels.clone(),
            locality: self.locality(&pod.node, None),
            ips: pod.ips.clone(),
            enrolled: !pod.host_network && self.mesh.enrolment.enrols(namespace, &pod.labels),
            policy: policies.of(name, &pod.labels, &self.mesh.root_namespace),
        })
    }
}

/// Sorts the oldest first; one without a time stamp is as old as can be, names decide among equals.
fn age(named: &Named) -> (Option<SystemTime>, ObjectName) {
    (named.created, named.key.name.clone())
}

impl Policies<'_> {
    fn of(&self, name: &ObjectName, labels: &Labels, root: &str) -> WorkloadPolicy {
        let namespace: &str = &name.namespace;
        let selected = |p: &&&PeerAuthentication| p.selector.as_ref().is_some_and(|s| s.matches(labels));
        let workload = self.workload_mtls.get(namespace).and_then(|all| all.iter().find(selected)).copied();
        let mut policy = WorkloadPolicy {
            mtls: effective_mtls(self.mesh_mtls, self.namespace_mtls.get(namespace).copied(), workload),
            ..WorkloadPolicy::default()
        };
        let own = self.authorizations.get(namespace);
        let mesh = self.authorizations.get(root).filter(|_| namespace != root);
        for (selector, compiled) in own.into_iter().chain(mesh).flatten() {
            if selector.is_none_or(|s| s.matches(labels)) {
                let list = match compiled.action {
                    _ if compiled.dry_run => &mut policy.observe,
                    Action::Allow => &mut policy.allow,
                    Action::Deny => &mut policy.deny,
                    Action::Audit => &mut policy.observe,
                };
                list.push(compiled.clone());
            }
        }
        policy
    }
}

#[cfg(test)]
mod tests;
