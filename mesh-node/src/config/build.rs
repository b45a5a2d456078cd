//! From objects to a snapshot: joins pods with namespaces, services with endpoints, and workloads with their policies.

mod policies;
mod reporting;
mod routes;
mod services;
mod tables;
mod views;

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use policies::{Attached, Attachments, Policies};
use reporting::Reports;
use views::Views;

use super::{
    settings::{MeshSettings, OutboundPolicy},
    snapshot::{Map, PolicySummary, Snapshot},
    store::{Severity, Status, Store},
};
use crate::{
    id::{ObjectName, SpiffeId, TrustDomain},
    policy::WorkloadPolicy,
    report::Reporting,
    resource::{
        AuthorizationPolicy, DestinationRule, EndpointSlice, GatewayRoute, Named, Object, PeerAuthentication, Pod, RequestAuthentication,
        Telemetry, VirtualService, kube,
        mesh_config::{Authorizer, ClientCert, Defaults, Normalization, Observability},
        selector::Labels,
    },
    route::{
        Ports, Workload,
        cluster::Near,
        retry::{RetryPolicy, default_policy},
    },
};

/// Builds the next snapshot. Loads of endpoints that stay are carried over from the previous one.
pub fn build(store: &Store, mesh: &Arc<MeshSettings>, previous: &Snapshot, now: Instant) -> (Snapshot, Vec<Status>) {
    let mut builder = Builder { mesh, store, statuses: store.statuses(), parts: Parts::default() };
    for named in store.objects() {
        builder.take(named);
    }
    let mut snapshot = Snapshot::empty(mesh.clone());
    snapshot.generation = previous.generation + 1;
    let known = &mesh.trust_domains;
    let more = builder.parts.aliases.iter().filter(|alias| !known.aliases.contains(alias));
    snapshot.trust_domains.aliases.extend(more.cloned());
    let attachments = policies::attachments(&builder);
    snapshot.policies = builder.parts.authorizations.iter().map(|(named, policy)| summary(named, policy, mesh)).collect();
    builder.parts.destination_rules.sort_by_key(|(named, _)| age(named));
    let mut about = About {
        policies: Policies::new(&mut builder, &snapshot.trust_domains),
        reports: Reports::new(&mut builder),
        views: Views::new(&builder),
    };
    builder.workloads(&mut about, &attachments, &mut snapshot);
    about.views.finish(&mut builder);
    let guards = about.policies.of_services();
    snapshot.remote_keys = about.policies.finish(&mut builder);
    snapshot.authorizers = std::mem::take(&mut builder.parts.authorizers).into_values().collect();
    snapshot.normalization = builder.parts.normalization;
    // Either of them may close.
    if builder.parts.registry_only {
        snapshot.outbound = OutboundPolicy::RegistryOnly;
    }
    snapshot.retries = Arc::new(builder.parts.retries.take().unwrap_or_else(default_policy));
    snapshot.client_cert = builder.parts.client_cert;
    snapshot.headers = builder.parts.defaults.map(|d| d.headers).unwrap_or_default();
    services::build(&mut builder, (&about.views, &guards), previous, &mut snapshot, now);
    builder.statuses.sort();
    (snapshot, builder.statuses)
}

fn summary(named: &Named, policy: &AuthorizationPolicy, mesh: &MeshSettings) -> PolicySummary {
    let name = named.key.name.clone();
    let selects = policy.selector.is_some() || !policy.targets.is_empty();
    let scope = match (selects, name.namespace == mesh.root_namespace) {
        (true, _) => "WorkloadSelector",
        (false, true) => "Global",
        (false, false) => "Namespace",
    };
    PolicySummary { name, action: policy.action.title(), scope, rules: policy.rules.clone(), dry_run: policy.dry_run }
}

/// References into the store by kind.
#[derive(Default)]
struct Parts<'a> {
    namespaces: HashMap<&'a str, &'a Labels>,
    /// What is near to clients of a namespace's services, where it says so.
    near: HashMap<&'a str, Near>,
    nodes: HashMap<&'a str, &'a kube::Node>,
    pods: Vec<(&'a Named, &'a Pod)>,
    services: Vec<(&'a Named, &'a kube::Service)>,
    /// The same, by namespace and name.
    by_name: Map<(&'a str, &'a str), &'a kube::Service>,
    slices: HashMap<(&'a str, &'a str), Vec<&'a EndpointSlice>>,
    peer_authentications: Vec<(&'a Named, &'a PeerAuthentication)>,
    authorizations: Vec<(&'a Named, &'a AuthorizationPolicy)>,
    request_authentications: Vec<(&'a Named, &'a RequestAuthentication)>,
    authorizers: HashMap<Arc<str>, Arc<Authorizer>>,
    normalization: Normalization,
    registry_only: bool,
    retries: Option<RetryPolicy>,
    client_cert: ClientCert,
    defaults: Option<&'a Defaults>,
    observability: Observability,
    /// Names of the trust domain that the mesh configuration gives.
    aliases: &'a [TrustDomain],
    telemetries: Vec<(&'a Named, &'a Telemetry)>,
    virtual_services: Vec<(&'a Named, &'a VirtualService)>,
    destination_rules: Vec<(&'a Named, &'a DestinationRule)>,
    gateway_routes: Vec<(&'a Named, &'a GatewayRoute)>,
}

struct Builder<'a> {
    mesh: &'a MeshSettings,
    store: &'a Store,
    statuses: Vec<Status>,
    parts: Parts<'a>,
}

impl<'a> Builder<'a> {
    fn take(&mut self, named: &'a Named) {
        for field in &named.unhonoured {
            self.remark(Severity::Warning, named, &format!("{field}: is not honoured by mesh-node; all else of the object is in force"));
        }
        let parts = &mut self.parts;
        match &named.object {
            Object::Namespace(n) => {
                let name = &named.key.name.name;
                parts.namespaces.insert(name, &n.labels);
                parts.near.extend(n.near.map(|near| (&**name, near)));
            }
            Object::Pod(p) => parts.pods.push((named, p)),
            Object::Service(s) => {
                parts.services.push((named, s));
                parts.by_name.insert((&named.key.name.namespace, &named.key.name.name), s);
            }
            Object::EndpointSlice(s) => {
                if let Some(service) = &s.service {
                    parts.slices.entry((&named.key.name.namespace, service)).or_default().push(s);
                }
            }
            Object::PeerAuthentication(p) => parts.peer_authentications.push((named, p)),
            Object::AuthorizationPolicy(p) => parts.authorizations.push((named, p)),
            Object::RequestAuthentication(p) => parts.request_authentications.push((named, p)),
            Object::MeshConfig(m) if named.key.name.namespace == self.mesh.root_namespace => {
                parts.authorizers = m.authorizers.iter().map(|a| (a.name.clone(), a.clone())).collect();
                parts.normalization = m.normalization.unwrap_or_default();
                parts.registry_only = m.registry_only == Some(true);
                parts.retries = m.retries.as_deref().cloned();
                parts.client_cert = m.client_cert;
                parts.defaults = Some(&*m.defaults);
                parts.aliases = &m.aliases;
                parts.observability = m.observability.clone();
                m.problems.iter().for_each(|problem| self.remark(Severity::Warning, named, problem));
            }
            Object::MeshConfig(_) => {
                let message = "metadata.namespace: is not the mesh's root namespace, so it counts for nothing; move it there";
                self.remark(Severity::Warning, named, message);
            }
            Object::Node(n) => drop(parts.nodes.insert(&named.key.name.name, n)),
            Object::VirtualService(v) => parts.virtual_services.push((named, v)),
            Object::DestinationRule(d) => parts.destination_rules.push((named, d)),
            Object::GatewayRoute(r) => parts.gateway_routes.push((named, r)),
            // Routes of the mesh lead to any namespace without one (GEP-1426).
            Object::ReferenceGrant(_) => {}
            Object::Telemetry(t) => parts.telemetries.push((named, t)),
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

    fn workloads(&mut self, about: &mut About<'a>, attachments: &Attachments<'_>, snapshot: &mut Snapshot) {
        let mut pods = std::mem::take(&mut self.parts.pods);
        pods.sort_by_key(|(named, _)| named.created);
        let mut owners: Map<IpAddr, (&Named, (bool, Option<SystemTime>))> = Map::default();
        owners.reserve(pods.len());
        snapshot.workloads.reserve(pods.len());
        snapshot.by_ip.reserve(pods.len());
        let mut alike = Alike::default();
        for (named, pod) in pods {
            if pod.finished {
                continue;
            }
            if let Some(older) = snapshot.workloads.get(&pod.uid).map(|w| w.name.clone()) {
                let problem = format!("metadata.uid: {} is the UID of {older} already, which is older; this pod is not in force", pod.uid);
                self.remark(Severity::Error, named, &problem);
                continue;
            }
            let workload = match self.workload(named, pod, about, attachments, &mut alike) {
                Ok(workload) => Arc::new(workload),
                Err(problem) => {
                    self.remark(Severity::Error, named, &problem);
                    continue;
                }
            };
            if pod.has_sidecar && self.enrols(pod, &workload.name.namespace) {
                let message = "metadata.annotations[sidecar.istio.io/status]: a sidecar captures this pod's connections already, so it is not in the \
                               mesh; restart it without injection";
                self.remark(Severity::Warning, named, message);
            }
            let made_by = (workload.name.namespace.clone(), workload.workload_name.clone());
            snapshot.by_workload.entry(made_by).or_default().push(workload.clone());
            snapshot.workloads.insert(workload.uid.clone(), workload.clone());
            // Who is being deleted has its address until another has it.
            let claim = (!pod.deleting, named.created);
            // A host-network pod shares its node's address: no traffic can be told to be its own.
            for ip in workload.ips.iter().filter(|_| !pod.host_network) {
                match owners.entry(*ip) {
                    Entry::Vacant(v) => {
                        v.insert((named, claim));
                        snapshot.by_ip.insert(*ip, workload.clone());
                    }
                    Entry::Occupied(mut o) => {
                        let other = o.get().0.key.clone();
                        let newer = claim > o.get().1;
                        let why = if claim.0 == o.get().1.0 { "the newer" } else { "which is not being deleted" };
                        if newer {
                            o.insert((named, claim));
                            snapshot.by_ip.insert(*ip, workload.clone());
                        }
                        let used = if newer { &named.key } else { &other };
                        self.remark(
                            Severity::Warning,
                            named,
                            &format!("status.podIPs: {ip} is also claimed by {other}; {used}, {why}, has it"),
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

    /// Whether labels put a pod into the mesh.
    fn enrols(&self, pod: &Pod, namespace: &str) -> bool {
        !pod.host_network && self.mesh.enrolment.enrols(self.parts.namespaces.get(namespace).copied(), &pod.labels)
    }

    fn workload<'p>(
        &self,
        named: &'p Named,
        pod: &'p Pod,
        about: &mut About<'a>,
        attachments: &'p Attachments<'_>,
        alike: &mut Alike<'p>,
    ) -> Result<Workload, String> {
        let name = &named.key.name;
        let identity = SpiffeId::new(&self.mesh.trust_domains.local, &name.namespace, &pod.service_account)
            .map_err(|e| format!("spec.serviceAccountName: {e}"))?;
        let ips = if pod.host_network { &[][..] } else { &pod.ips };
        let attached = ips.iter().filter_map(|ip| attachments.get(ip)).flatten().copied().collect::<Vec<_>>();
        let Common { policy, ports, reporting, view } = alike.of((&name.namespace, &pod.labels), attached, |attached| Common {
            policy: about.policies.of(name, &pod.labels, &self.mesh.root_namespace, attached),
            ports: Arc::new(policies::ports(attached, &name.namespace)),
            reporting: about.reports.of(name, &pod.labels, attached),
            view: about.views.of(self, name, &pod.labels),
        });
        if pod.node == self.mesh.node {
            about.policies.take_local(&policy);
        }
        Ok(Workload {
            ports,
            reporting,
            view,
            probes: pod.probes.clone(),
            accelerate: pod.accelerate,
            uid: pod.uid.clone(),
            name: name.clone(),
            workload_name: pod.workload_name.clone(),
            workload_kind: pod.workload_kind,
            node: pod.node.clone(),
            identity,
            labels: pod.labels.clone(),
            locality: kube::Node::of_pod(&pod.labels).unwrap_or_else(|| self.locality(&pod.node, None)),
            ips: pod.ips.clone(),
            enrolled: self.enrols(pod, &name.namespace) && !pod.has_sidecar,
            policy,
        })
    }
}

/// What pods with the same labels have in common to which the same services lead.
#[derive(Clone)]
struct Common {
    policy: WorkloadPolicy,
    ports: Arc<Ports>,
    reporting: Arc<Reporting>,
    view: Arc<str>,
}

/// What workloads are made with, beside their pods.
struct About<'a> {
    policies: Policies<'a>,
    reports: Reports<'a>,
    views: Views<'a>,
}

/// What pods had in common that came before, by namespace and labels: most of a template's are alike.
#[derive(Default)]
struct Alike<'a>(Map<(&'a str, &'a Labels), (Vec<Attached<'a>>, Common)>);

impl<'a> Alike<'a> {
    fn of(&mut self, key: (&'a str, &'a Labels), attached: Vec<Attached<'a>>, make: impl FnOnce(&[Attached<'a>]) -> Common) -> Common {
        match self.0.get(&key) {
            Some((same, common)) if *same == attached => common.clone(),
            _ => {
                let common = make(&attached);
                self.0.insert(key, (attached, common.clone()));
                common
            }
        }
    }
}

/// Sorts the oldest first; one without a time stamp is as old as can be. Among equals names decide, and then namespaces, as in istiod.
fn age(named: &Named) -> (Option<SystemTime>, Arc<str>, Arc<str>) {
    let ObjectName { namespace, name } = &named.key.name;
    (named.created, name.clone(), namespace.clone())
}

#[cfg(test)]
mod tests;
