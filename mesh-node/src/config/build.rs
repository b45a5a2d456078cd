//! From objects to a snapshot: joins pods with namespaces, services with endpoints, and workloads with their policies.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
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
        AuthorizationPolicy, EndpointSlice, Named, Object, PeerAuthentication, Pod,
        authorization::Action,
        kube::{self, TrafficPolicy},
        selector::{Labels, WorkloadSelector},
    },
    route::{Endpoint, Load, Service, ServicePort, Workload},
};

/// Builds the next snapshot. Loads of endpoints that stay are carried over from the previous one.
pub fn build(store: &Store, mesh: &Arc<MeshSettings>, previous: &Snapshot) -> (Snapshot, Vec<Status>) {
    let mut builder = Builder { mesh, store, statuses: store.statuses(), parts: Parts::default() };
    for named in store.objects().into_values() {
        builder.take(named);
    }
    let policies = builder.policies();
    let mut snapshot = Snapshot::empty(mesh.clone());
    snapshot.generation = previous.generation + 1;
    builder.workloads(&policies, &mut snapshot);
    builder.services(previous, &mut snapshot);
    builder.statuses.sort();
    (snapshot, builder.statuses)
}

/// References into the store by kind.
#[derive(Default)]
struct Parts<'a> {
    namespaces: HashMap<&'a str, &'a Labels>,
    pods: Vec<(&'a Named, &'a Pod)>,
    services: Vec<(&'a Named, &'a kube::Service)>,
    slices: HashMap<(&'a str, &'a str), Vec<&'a EndpointSlice>>,
    peer_authentications: Vec<(&'a Named, &'a PeerAuthentication)>,
    authorizations: Vec<(&'a Named, &'a AuthorizationPolicy)>,
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
        }
    }

    fn remark(&mut self, severity: Severity, named: &Named, message: &str) {
        let origin = self.store.origin_of(&named.key).map(ToString::to_string).unwrap_or_default();
        self.statuses.push(Status { origin, severity, message: format!("{}: {message}", named.key) });
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
            ips: pod.ips.clone(),
            enrolled: !pod.host_network && self.mesh.enrolment.enrols(namespace, &pod.labels),
            policy: policies.of(name, &pod.labels, &self.mesh.root_namespace),
        })
    }

    fn services(&mut self, previous: &Snapshot, snapshot: &mut Snapshot) {
        let loads = loads(previous);
        for (named, service) in std::mem::take(&mut self.parts.services) {
            let name = &named.key.name;
            let slices = self.parts.slices.get(&(&*name.namespace, &*name.name)).map(Vec::as_slice).unwrap_or_default();
            let built = Arc::new(build_service(name, service, slices, &loads));
            for vip in &service.vips {
                if let Some(other) = snapshot.by_vip.get(vip) {
                    let message = format!("spec.clusterIPs: {vip} belongs to Service {} already; use another address", other.name);
                    self.remark(Severity::Error, named, &message);
                } else {
                    snapshot.by_vip.insert(*vip, built.clone());
                }
            }
            for (ip, port) in service.external_ips.iter().flat_map(|ip| built.ports.iter().map(move |p| (*ip, p.port))) {
                let address = SocketAddr::new(ip, port);
                if let Some(other) = snapshot.by_external.get(&address) {
                    let message =
                        format!("status.loadBalancer: {address} belongs to Service {} already; use another address or port", other.name);
                    self.remark(Severity::Error, named, &message);
                } else {
                    snapshot.by_external.insert(address, built.clone());
                }
            }
            snapshot.services.push(built);
        }
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

type Loads<'a> = HashMap<(&'a ObjectName, SocketAddr), &'a Arc<Load>>;

fn loads(previous: &Snapshot) -> Loads<'_> {
    let ports = previous.services.iter().flat_map(|s| s.ports.iter().map(move |p| (s, p)));
    ports.flat_map(|(s, p)| p.endpoints.iter().map(move |e| ((&s.name, e.address), &e.load))).collect()
}

fn build_service(name: &ObjectName, service: &kube::Service, slices: &[&EndpointSlice], loads: &Loads<'_>) -> Service {
    let ports = service.ports.iter().map(|p| ServicePort {
        name: p.name.clone(),
        port: p.port,
        endpoints: endpoints(name, &p.name, slices, loads),
    });
    Service {
        name: name.clone(),
        vips: service.vips.clone(),
        ports: ports.collect(),
        local_only: service.internal_traffic_policy == TrafficPolicy::Local,
        client_ip_affinity: service.client_ip_affinity,
    }
}

/// The endpoints of one service port over all slices, each address once.
fn endpoints(service: &ObjectName, port: &str, slices: &[&EndpointSlice], loads: &Loads<'_>) -> Vec<Endpoint> {
    let mut found: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    for slice in slices {
        let Some(target) = slice.ports.get(port) else { continue };
        for (endpoint, ip) in slice.endpoints.iter().flat_map(|e| e.addresses.iter().map(move |ip| (e, ip))) {
            let address = SocketAddr::new(*ip, *target);
            let load = || loads.get(&(service, address)).map_or_else(Arc::default, |l| (*l).clone());
            found.entry(address).or_insert_with(|| Endpoint {
                address,
                ready: endpoint.ready,
                serving_while_terminating: endpoint.serving_while_terminating,
                node: endpoint.node.clone(),
                load: load(),
            });
        }
    }
    found.into_values().collect()
}

#[cfg(test)]
mod tests;
