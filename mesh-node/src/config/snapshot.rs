//! The immutable state of the mesh that one decision is made from.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use super::{
    authorizers::Authorizers,
    settings::{MeshSettings, OutboundPolicy},
};
use crate::{
    id::{ObjectName, WorkloadUid},
    policy::TrustDomains,
    resource::{
        authorization::Rule,
        mesh_config::{AddedHeaders, Authorizer, ClientCert, Normalization},
        request_authentication::{JwtRule, RemoteKeys},
    },
    route::{
        Cluster, ClusterId, PortOf, Service, ServicePort, Target, Workload,
        retry::{RetryPolicy, default_policy},
    },
};

/// An authorization policy, as a list shows it.
#[derive(Debug, Clone)]
pub struct PolicySummary {
    pub name: ObjectName,
    pub action: &'static str,
    /// ztunnel's word: `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: &'static str,
    pub rules: Arc<[Rule]>,
    pub dry_run: bool,
}

/// Namespace and name of what makes pods.
type MadeBy = (Arc<str>, Arc<str>);

/// By what the configuration names or gives: asked for several times of each request, and made again for each generation. Who could choose
/// keys that are slow to look up could do worse.
pub(super) type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// Everything the data path asks, as of one generation.
#[derive(Debug)]
pub struct Snapshot {
    pub generation: u64,
    /// How long it took to build.
    pub built_in: Duration,
    /// From when a source began to read the first of the changes in it until it was in force.
    pub lag: Duration,
    pub mesh: Arc<MeshSettings>,
    /// The mesh's trust domain, and all names it had before.
    pub trust_domains: TrustDomains,
    /// Key sets the policies need.
    pub remote_keys: BTreeSet<RemoteKeys>,
    pub authorizers: Authorizers,
    pub normalization: Normalization,
    /// As the node was started with, or as the mesh configuration says, whichever is closed.
    pub outbound: OutboundPolicy,
    /// Of routes that say nothing of retries.
    pub retries: Arc<RetryPolicy>,
    pub client_cert: ClientCert,
    /// Those the proxy adds by itself.
    pub headers: AddedHeaders,
    /// Authorization policies in force, for inspection.
    pub policies: Vec<PolicySummary>,
    pub(super) workloads: Map<WorkloadUid, Arc<Workload>>,
    /// By namespace and name of what makes pods.
    pub(super) by_workload: Map<MadeBy, Vec<Arc<Workload>>>,
    pub(super) by_ip: Map<IpAddr, Arc<Workload>>,
    pub(super) services: Vec<Arc<Service>>,
    pub(super) by_name: Map<ObjectName, Arc<Service>>,
    pub(super) by_vip: Map<IpAddr, Arc<Service>>,
    pub(super) by_external: Map<SocketAddr, Arc<Service>>,
    /// Services as some clients see them, where that differs: by the client's view ([`Workload::view`]) and service.
    pub(super) views: Map<Arc<str>, Map<ObjectName, Arc<Service>>>,
}

impl Snapshot {
    /// A mesh in which nothing is known yet.
    pub fn empty(mesh: Arc<MeshSettings>) -> Self {
        Self {
            generation: 0,
            built_in: Duration::ZERO,
            lag: Duration::ZERO,
            outbound: mesh.outbound,
            trust_domains: mesh.trust_domains.clone(),
            mesh,
            remote_keys: BTreeSet::new(),
            authorizers: Authorizers::default(),
            normalization: Normalization::default(),
            retries: Arc::new(default_policy()),
            client_cert: ClientCert::default(),
            headers: AddedHeaders::default(),
            policies: Vec::new(),
            workloads: Map::default(),
            by_workload: Map::default(),
            by_ip: Map::default(),
            services: Vec::new(),
            by_name: Map::default(),
            by_vip: Map::default(),
            by_external: Map::default(),
            views: Map::default(),
        }
    }

    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_ip.get(&ip)
    }

    /// What the destination of a cluster asks of tokens: its first endpoint in the mesh speaks for all.
    pub fn tokens_of(&self, cluster: &Cluster) -> &[Arc<JwtRule>] {
        let governed =
            cluster.endpoints.iter().find_map(|e| Some((self.workload_by_ip(e.address.ip()).filter(|w| w.enrolled)?, e.address.port())));
        governed.map_or(&[], |(workload, port)| &workload.policy.at(port).authentication)
    }

    /// What is asked of tokens of requests to a service: by its pods or, where it has none, by policies that refer to it.
    pub fn tokens_at<'s>(&'s self, port: &'s ServicePort) -> &'s [Arc<JwtRule>] {
        match (self.tokens_of(&port.cluster), &port.guard) {
            ([], Some(governing)) => &governing.authentication,
            (rules, _) => rules,
        }
    }

    /// The pods of what is named so in a namespace, such as a Deployment.
    pub fn pods_of(&self, namespace: &Arc<str>, workload: &Arc<str>) -> &[Arc<Workload>] {
        self.by_workload.get(&(namespace.clone(), workload.clone())).map_or(&[], Vec::as_slice)
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The names of those of these authorizers that are still set as they were.
    pub fn unchanged(&self, authorizers: &[Arc<Authorizer>]) -> Vec<Arc<str>> {
        let same = authorizers.iter().filter(|a| self.authorizers.get(&a.name).is_some_and(|now| now == *a));
        same.map(|a| a.name.clone()).collect()
    }

    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// A service by its name, as clients of no namespace in particular see it.
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<Service>> {
        self.by_name.get(name)
    }

    /// A cluster as clients with a view see it.
    pub fn cluster_for(&self, view: &str, id: &ClusterId) -> Option<&Arc<Cluster>> {
        let seen = self.views.get(view).and_then(|v| v.get(&id.service));
        let service = seen.or_else(|| self.by_name.get(&id.service))?;
        let port = service.port(id.port)?;
        if id.subset.is_empty() { Some(&port.cluster) } else { port.subsets.get(&id.subset) }
    }

    /// The cluster of a service's port, by the service's host name in the mesh.
    /// As clients with a view see it, if one is named.
    pub fn cluster_at(&self, view: Option<&str>, host: &str, port: u16) -> Option<Arc<Cluster>> {
        // A short name could be of any namespace.
        let service = ObjectName::from_host(host, "").filter(|service| !service.namespace.is_empty())?;
        match view {
            Some(view) => self.cluster_for(view, &ClusterId { service, port, subset: "".into() }).cloned(),
            None => Some(self.by_name.get(&service)?.port(port)?.cluster.clone()),
        }
    }

    /// Addresses of services that are not virtual: those of hosts, or of pods.
    pub fn external_addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.by_external.keys().copied()
    }

    /// A service as clients see it that may see it differently, by their view.
    pub fn views_of(&self, service: &ObjectName) -> Vec<(&str, &Service)> {
        let mut all = self.views.iter().filter_map(|(view, seen)| Some((&**view, &**seen.get(service)?))).collect::<Vec<_>>();
        all.sort_by_key(|(view, _)| *view);
        all
    }

    /// Whether some clients see a service differently.
    pub fn is_viewed(&self, service: &ObjectName) -> bool {
        self.views.values().any(|seen| seen.contains_key(service))
    }

    /// What an address and port mean to a client with a view.
    pub fn resolve_for(&self, view: &str, dst: SocketAddr) -> Target<'_> {
        let target = self.resolve(dst);
        let Target::Service { service, port } = &target else { return target };
        let seen = self.views.get(view).and_then(|v| v.get(&service.name));
        match seen.and_then(|s| Some((s, s.port(port.port)?))) {
            Some((service, port)) => Target::Service { service, port },
            None => target,
        }
    }

    /// The same on a connection that leads to a service already, if it does: addresses of services may change while it is open.
    pub fn resolve_once(&self, view: &str, dst: SocketAddr, known: &OnceLock<PortOf>) -> Target<'_> {
        let target = self.resolve_for(view, dst);
        match (known.get(), &target) {
            (Some(known), Target::Service { service, .. }) if service.name == known.service => target,
            (Some(known), _) => {
                let Some(service) = self.service_of(view, &known.service) else { return Target::Unknown };
                service.port(known.port).map_or(Target::NoSuchPort(service), |port| Target::Service { service, port })
            }
            (None, Target::Service { service, port }) => {
                let _ = known.set(PortOf { service: service.name.clone(), port: port.port });
                target
            }
            (None, _) => target,
        }
    }

    /// A service as clients of a view see it.
    pub fn service_of(&self, view: &str, name: &ObjectName) -> Option<&Arc<Service>> {
        let seen = self.views.get(view).and_then(|seen| seen.get(name));
        seen.or_else(|| self.by_name.get(name))
    }

    /// What an address and port mean to a client in the mesh of no namespace in particular.
    pub fn resolve(&self, dst: SocketAddr) -> Target<'_> {
        if let Some(service) = self.by_vip.get(&dst.ip()) {
            return match service.port(dst.port()) {
                Some(port) => Target::Service { service, port },
                None => Target::NoSuchPort(service),
            };
        }
        if let Some((service, port)) = self.by_external.get(&dst).and_then(|s| Some((s, s.port(dst.port())?))) {
            return Target::Service { service, port };
        }
        self.by_ip.get(&dst.ip()).map_or(Target::Unknown, Target::Workload)
    }
}
