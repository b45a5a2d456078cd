//! Services: endpoints joined with pods and nodes, destination rules applied, routes attached.
//!
//! Most clients see a service alike. Namespaces whose clients do not (a `DestinationRule` of the client's namespace, an
//! `exportTo`, a consumer's route) get a view of their own, with the services that differ.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use super::{
    Builder,
    routes::Routes,
    tables::Tables,
    views::{Client, Views},
};
use crate::{
    config::{
        snapshot::{Map, Snapshot},
        store::Severity,
    },
    detect::Protocol,
    id::ObjectName,
    policy::Governing,
    resource::{
        DestinationRule, EndpointSlice, Key, Named,
        destination_rule::{Layered, Subset},
        kube::{self, TrafficPolicy},
        selector::Labels,
    },
    route::{
        Cluster, ClusterId, Endpoint, Load, PortRoutes, Service, ServicePort, Workload,
        cluster::Near,
        l4::host_matches,
        traffic::{Balancer, TrafficDefaults},
    },
};

const NO_ROOM: &str = "spec.trafficPolicy.loadBalancer.consistentHash: the hash tables of all rules together would have more than 16777216 \
    entries, which is more than a node makes; those that found no room have the usual size (a ring of 1024, 65537 of Maglev). Ask for smaller ones";

/// A service before routes: its ports with their endpoints.
pub(super) struct Entry<'a> {
    pub named: &'a Named,
    pub service: &'a kube::Service,
    /// Beside the service's ports.
    endpoints: Vec<Arc<[Endpoint]>>,
    near: Option<Near>,
}

/// All services by name.
pub(super) type Registry<'a> = BTreeMap<&'a ObjectName, Entry<'a>>;

/// Whether an object is for clients of a namespace; `None` is any namespace that is not treated apart.
pub(super) fn is_visible(export_to: &[Arc<str>], own: &str, client: Option<&str>) -> bool {
    export_to.is_empty()
        || export_to.iter().any(|to| match &**to {
            "*" => true,
            "." => client == Some(own),
            other => client == Some(other),
        })
}

/// Who sees an object: whom it says, or whom the mesh says.
pub(super) fn or_default<'a>(export_to: &'a [Arc<str>], exported: &'a [Arc<str>]) -> &'a [Arc<str>] {
    if export_to.is_empty() { exported } else { export_to }
}

/// How closely a host pattern of an object names a service: exactly is the most, a longer wildcard is more.
pub(super) fn closeness(host: &str, namespace: &str, service: &ObjectName) -> Option<usize> {
    if host.starts_with('*') {
        return host_matches(host, &service.fqdn()).then_some(host.len());
    }
    (ObjectName::from_host(host, namespace).as_ref() == Some(service)).then_some(usize::MAX)
}

/// The policies that refer to a service.
pub(super) struct Guard {
    pub governing: Arc<Governing>,
    /// They ask which of its ports was dialled.
    pub asks_ports: bool,
}

/// By service.
pub(super) struct Guards {
    pub of: BTreeMap<ObjectName, Guard>,
    /// Of services that no policy refers to by name.
    pub of_any: Option<Guard>,
}

pub(super) fn build(
    builder: &mut Builder<'_>,
    (views, guards): (&Views<'_>, &Guards),
    previous: &Snapshot,
    snapshot: &mut Snapshot,
    now: Instant,
) {
    let registry = registry(builder, previous, snapshot, now);
    let rules = Rules::new(builder, &registry);
    let routes = Routes::new(builder, &registry);
    let given = Given {
        tables: Tables::after(previous),
        traffic: builder.parts.defaults.map(|d| d.traffic.clone()).unwrap_or_default(),
        generation: snapshot.generation,
        short: RefCell::default(),
    };
    let mut clusters = Clusters::default();
    for (name, entry) in &registry {
        clusters.add(name, entry, &rules.of(name, None, &builder.mesh.root_namespace), &given);
    }
    for (name, entry) in &registry {
        let mut service = assemble(name, entry, &clusters, |port| routes.of(builder, name, port, None, &clusters));
        guard(&mut service, guards, snapshot);
        let service = Arc::new(service);
        place(builder, entry, &service, snapshot);
        snapshot.by_name.insert((*name).clone(), service.clone());
        snapshot.services.push(service);
    }
    let namespaces: BTreeSet<&str> = rules.special.iter().chain(&routes.special).copied().collect();
    let namespaces = namespaces.into_iter().map(|namespace| (namespace.into(), Client { namespace, selected_by: &[] }));
    for (view, client) in namespaces.chain(views.chosen().map(|(view, client)| (view.clone(), client))) {
        let mut own = Clusters { below: Some(&clusters), ..Clusters::default() };
        let differs = |name: &ObjectName| rules.differs(name, client, &builder.mesh.root_namespace);
        for (name, entry) in registry.iter().filter(|(name, _)| differs(name)) {
            own.add(name, entry, &rules.of(name, Some(client), &builder.mesh.root_namespace), &given);
        }
        // A route may lead to a cluster that differs: every service with routes is looked at.
        let seen = registry.iter().filter(|(name, _)| differs(name) || routes.any(name, client.namespace)).map(|(name, entry)| {
            let mut service = assemble(name, entry, &own, |port| routes.of(builder, name, port, Some(client.namespace), &own));
            guard(&mut service, guards, snapshot);
            ((*name).clone(), Arc::new(service))
        });
        let seen = seen.collect();
        snapshot.views.insert(view, seen);
    }
    for named in given.short.into_inner().into_values() {
        builder.remark(Severity::Warning, named, NO_ROOM);
    }
    builder.statuses.extend(rules.remarks.into_inner());
    builder.statuses.extend(routes.remarks.into_inner());
}

fn registry<'a>(builder: &mut Builder<'a>, previous: &Snapshot, snapshot: &Snapshot, now: Instant) -> Registry<'a> {
    // Pods that share their node's address: an endpoint says which of them it is.
    let own = |w: &Workload| w.ips.iter().any(|ip| snapshot.by_ip.get(ip).is_some_and(|other| other.uid == w.uid));
    let hosted = snapshot.workloads.values().filter(|w| !own(w)).map(|w| (&w.name, &w.labels)).collect::<Map<_, _>>();
    let services = std::mem::take(&mut builder.parts.services);
    let entry = |(named, service): (&'a Named, &'a kube::Service)| {
        let name = &named.key.name;
        let slices = builder.parts.slices.get(&(&*name.namespace, &*name.name)).map(Vec::as_slice).unwrap_or_default();
        let before = previous.by_name.get(name);
        let endpoints = |port: &kube::ServicePort| {
            let load = |address, ready: bool| {
                let Some(known) = before.and_then(|service| known(service, address)) else { return Arc::new(Load::new(now)) };
                if ready && !known.ready {
                    // It begins to be used now, whenever it was first heard of.
                    known.load.renew(now);
                }
                known.load.clone()
            };
            endpoints(builder, (snapshot, &hosted, &name.namespace), &port.name, slices, load)
        };
        let near = service.near.unwrap_or_else(|| builder.parts.near.get(&*name.namespace).copied());
        (name, Entry { named, service, endpoints: service.ports.iter().map(endpoints).collect(), near })
    };
    services.into_iter().map(entry).collect()
}

/// An endpoint as it was, on whatever port of its service.
fn known(service: &Service, address: SocketAddr) -> Option<&Endpoint> {
    service.ports.iter().rev().find_map(|port| {
        // They are by address.
        let endpoints = &port.cluster.endpoints;
        endpoints.binary_search_by_key(&address, |e| e.address).ok().map(|i| &endpoints[i])
    })
}

/// The endpoints of one service port over all slices, each address once, by address.
fn endpoints(
    builder: &Builder<'_>,
    (snapshot, hosted, namespace): (&Snapshot, &Map<&ObjectName, &Labels>, &Arc<str>),
    port: &str,
    slices: &[&EndpointSlice],
    load: impl Fn(SocketAddr, bool) -> Arc<Load>,
) -> Arc<[Endpoint]> {
    let mut found = Vec::new();
    for slice in slices {
        let Some(target) = slice.ports.get(port) else { continue };
        for endpoint in &slice.endpoints {
            found.extend(endpoint.addresses.iter().map(|ip| (SocketAddr::new(*ip, *target), endpoint)));
        }
    }
    // Of several with one address the one that can be used counts, of those the first: a pod may have that of one that has yet to end.
    found.sort_by_key(|(address, endpoint)| (*address, !endpoint.ready, !endpoint.serving_while_terminating));
    found.dedup_by_key(|(address, _)| *address);
    let labels = |ip: IpAddr, pod: Option<&Arc<str>>| {
        let hosted = || hosted.get(&ObjectName { namespace: namespace.clone(), name: pod?.clone() }).copied();
        snapshot.by_ip.get(&ip).map(|w| &w.labels).or_else(hosted).cloned().unwrap_or_default()
    };
    let made = found.into_iter().map(|(address, endpoint)| {
        let labels = labels(address.ip(), endpoint.pod.as_ref());
        let of_node = || builder.locality(endpoint.node.as_deref().unwrap_or_default(), endpoint.zone.as_ref());
        Endpoint {
            address,
            ready: endpoint.ready,
            serving_while_terminating: endpoint.serving_while_terminating,
            node: endpoint.node.clone(),
            locality: kube::Node::of_pod(&labels).unwrap_or_else(of_node),
            labels,
            load: load(address, endpoint.ready),
        }
    });
    made.collect()
}

/// Destination rules by the services they are for, closest host and oldest first.
struct Rules<'a> {
    by_service: HashMap<&'a ObjectName, Vec<RuleOf<'a>>>,
    /// Who sees those that do not say so.
    exported: &'a [Arc<str>],
    /// Namespaces whose clients see some service otherwise.
    special: BTreeSet<&'a str>,
    remarks: RefCell<Vec<crate::config::store::Status>>,
}

/// A destination rule for a service.
struct RuleOf<'a> {
    /// How closely it names it.
    close: usize,
    /// Among all of them, oldest first.
    number: usize,
    named: &'a Named,
    rule: &'a DestinationRule,
}

/// What is in force for one service in one view.
#[derive(Default)]
struct Effective<'a> {
    /// The oldest of its rules.
    named: Option<&'a Named>,
    policy: Option<&'a Layered>,
    subsets: Vec<&'a Subset>,
}

impl<'a> Rules<'a> {
    fn new(builder: &mut Builder<'a>, registry: &Registry<'a>) -> Self {
        let all = std::mem::take(&mut builder.parts.destination_rules);
        let exported = builder.parts.defaults.map_or(&[][..], |defaults| &defaults.destination_rules);
        let mut rules = Self { by_service: HashMap::new(), exported, special: BTreeSet::new(), remarks: RefCell::default() };
        for (number, (named, rule)) in all.into_iter().enumerate() {
            let namespace: &str = &named.key.name.namespace;
            let mut add = |name: &'a ObjectName, close: usize| {
                rules.by_service.entry(name).or_default().push(RuleOf { close, number, named, rule });
                if rule.selector.is_some() {
                    return;
                }
                let export_to = or_default(&rule.export_to, exported);
                let global = is_visible(export_to, namespace, None);
                let restricted = export_to.iter().filter(|to| !["*", "~"].contains(&&***to));
                rules.special.extend(restricted.map(|to| if &**to == "." { namespace } else { to }));
                if global && namespace != &*name.namespace && namespace != &*builder.mesh.root_namespace {
                    rules.special.insert(namespace);
                }
            };
            if rule.host.starts_with('*') {
                registry.keys().for_each(|name| {
                    if let Some(close) = closeness(&rule.host, namespace, name) {
                        add(name, close);
                    }
                });
                continue;
            }
            if let Some((name, _)) = ObjectName::from_host(&rule.host, namespace).and_then(|n| registry.get_key_value(&n)) {
                add(name, usize::MAX);
            } else {
                let message = format!("spec.host: there is no Service {}; the rule is not used", rule.host);
                builder.remark(Severity::Warning, named, &message);
            }
        }
        for list in rules.by_service.values_mut() {
            list.sort_by_key(|of| std::cmp::Reverse(of.close));
        }
        rules
    }

    /// The rules of the first of these namespaces that has any: the client's, the service's, the root. Of clients in the root namespace those
    /// alone are their own that are for nobody else, as in Istio: the others there are the mesh's. Of those that name the service most closely, one
    /// that selects the client comes before those that select nobody.
    fn applying(&self, service: &ObjectName, client: Option<Client<'_>>, root: &str) -> Vec<(&'a Named, &'a DestinationRule)> {
        let Some(all) = self.by_service.get(service) else { return Vec::new() };
        let viewer = client.map(|client| client.namespace);
        let as_client = viewer.map(|namespace| (namespace, namespace == root));
        for (namespace, private) in as_client.into_iter().chain([(&*service.namespace, false), (root, false)]) {
            let here = all.iter().filter(|of| {
                let own: &str = &of.named.key.name.namespace;
                let exported = or_default(&of.rule.export_to, self.exported);
                let is_meant = of.rule.selector.is_none() || client.is_some_and(|client| client.selected_by.contains(&of.number));
                let is_private = !exported.is_empty() && exported.iter().all(|to| **to == *"." || **to == *own);
                own == namespace && is_meant && is_visible(exported, own, viewer) && (is_private || !private)
            });
            let here = here.collect::<Vec<_>>();
            let Some(closest) = here.first().map(|of| of.close) else { continue };
            let closest = here.iter().filter(|of| of.close == closest);
            let selector = closest.clone().find_map(|of| of.rule.selector.as_ref());
            return closest.filter(|of| of.rule.selector.as_ref() == selector).map(|of| (of.named, of.rule)).collect();
        }
        Vec::new()
    }

    /// The oldest rule's policy, and the subsets of all for the same host.
    fn of(&self, service: &ObjectName, client: Option<Client<'_>>, root: &str) -> Effective<'a> {
        let mut effective = Effective::default();
        for (named, rule) in self.applying(service, client, root) {
            effective.named = effective.named.or(Some(named));
            effective.policy = effective.policy.or(rule.policy.as_ref());
            for subset in &rule.subsets {
                if !effective.subsets.iter().any(|s| s.name == subset.name) {
                    effective.subsets.push(subset);
                }
            }
        }
        effective
    }

    fn differs(&self, service: &ObjectName, client: Client<'_>, root: &str) -> bool {
        let key = |client| self.applying(service, client, root).iter().map(|(named, _)| &named.key).collect::<Vec<_>>();
        key(None) != key(Some(client))
    }
}

/// Clusters of a view; what is not here is as in the view below.
#[derive(Default)]
pub(super) struct Clusters<'a> {
    by_id: Map<ClusterId, Arc<Cluster>>,
    subsets: Map<ObjectName, Vec<Arc<str>>>,
    below: Option<&'a Clusters<'a>>,
}

/// What clusters are made with.
struct Given<'a> {
    tables: Tables,
    traffic: TrafficDefaults,
    generation: u64,
    /// Rules whose tables found no room as large as they are to be.
    short: RefCell<BTreeMap<&'a Key, &'a Named>>,
}

impl Clusters<'_> {
    pub(super) fn get(&self, id: &ClusterId) -> Option<&Arc<Cluster>> {
        let here = || self.by_id.get(id);
        if self.subsets.contains_key(&id.service) { here() } else { self.below.map_or_else(here, |b| b.get(id)) }
    }

    fn subsets(&self, service: &ObjectName) -> &[Arc<str>] {
        match (self.subsets.get(service), self.below) {
            (Some(subsets), _) => subsets,
            (None, Some(below)) => below.subsets(service),
            (None, None) => &[],
        }
    }

    fn add<'a>(&mut self, name: &ObjectName, entry: &Entry<'_>, effective: &Effective<'a>, given: &Given<'a>) {
        let whole = std::iter::once(None).chain(effective.subsets.iter().copied().map(Some));
        for subset in whole {
            for (port, endpoints) in entry.service.ports.iter().zip(&entry.endpoints) {
                let cluster = cluster(name, (entry, port), endpoints, (effective, subset), given);
                self.by_id.insert(cluster.id.clone(), Arc::new(cluster));
            }
        }
        self.subsets.insert(name.clone(), effective.subsets.iter().map(|s| s.name.clone()).collect());
    }
}

fn cluster<'a>(
    name: &ObjectName,
    (entry, port): (&Entry<'_>, &kube::ServicePort),
    endpoints: &Arc<[Endpoint]>,
    (effective, subset): (&Effective<'a>, Option<&Subset>),
    given: &Given<'a>,
) -> Cluster {
    let service = entry.service;
    let id = ClusterId { service: name.clone(), port: port.port, subset: subset.map(|s| s.name.clone()).unwrap_or_default() };
    let endpoints = match subset {
        None => endpoints.clone(),
        Some(subset) => endpoints.iter().filter(|e| subset.labels.iter().all(|(k, v)| e.label(k) == Some(v))).cloned().collect(),
    };
    let mut policy = Layered::effective(effective.policy, subset.map(|s| &s.policy), port.port);
    let protocol = Protocol::declared(&port.name, port.app_protocol.as_deref(), port.port);
    policy.fill(&given.traffic, entry.near.is_some());
    if service.is_headless() {
        // Its clients pick the endpoint themselves, by its address.
        policy.balancer = Balancer::Passthrough;
    } else if service.client_ip_affinity && policy.balancer == Balancer::Unset {
        policy.balancer = Balancer::ClientIp;
    }
    let table = match policy.balancer {
        Balancer::Hash { table: kind, .. } => {
            let table = given.tables.of(kind, endpoints.iter().map(|e| e.address).collect());
            if table.kind() != kind {
                given.short.borrow_mut().extend(effective.named.map(|named| (&named.key, named)));
            }
            Some(table)
        }
        _ => None,
    };
    Cluster {
        id,
        protocol,
        policy: Arc::new(policy),
        endpoints,
        local_only: service.internal_traffic_policy == TrafficPolicy::Local,
        near: entry.near,
        table,
        generation: given.generation,
    }
}

fn assemble(
    name: &ObjectName,
    entry: &Entry<'_>,
    clusters: &Clusters<'_>,
    routes: impl Fn((&kube::ServicePort, Protocol)) -> PortRoutes,
) -> Service {
    let id = |port: u16, subset: &Arc<str>| ClusterId { service: name.clone(), port, subset: subset.clone() };
    let none: Arc<str> = "".into();
    let ports = entry.service.ports.iter().filter_map(|p| {
        let subsets = clusters.subsets(name).iter().filter_map(|s| Some((s.clone(), clusters.get(&id(p.port, s))?.clone())));
        let cluster = clusters.get(&id(p.port, &none))?.clone();
        let routes = routes((p, cluster.protocol));
        let subsets = subsets.collect();
        Some(ServicePort { name: p.name.clone(), port: p.port, cluster, subsets, routes, guard: None, is_guarded: false })
    });
    Service { name: name.clone(), vips: entry.service.vips.clone(), ports: ports.collect() }
}

/// Has the policies that refer to a service asked where its own endpoints do not ask them.
fn guard(service: &mut Service, guards: &Guards, snapshot: &Snapshot) {
    let policies = guards.of.get(&service.name).or(guards.of_any.as_ref());
    let mut ports_to: HashMap<SocketAddr, BTreeSet<u16>> = HashMap::new();
    for port in service.ports.iter().filter(|_| policies.is_some_and(|policies| policies.asks_ports)) {
        for endpoint in port.cluster.endpoints.iter() {
            ports_to.entry(endpoint.address).or_default().insert(port.port);
        }
    }
    let asks = |e: &Endpoint| {
        // By which of several ports it was come to is not known there.
        let is_known = ports_to.get(&e.address).is_none_or(|ports| ports.len() == 1);
        is_known && snapshot.workload_by_ip(e.address.ip()).is_some_and(|workload| workload.enrolled)
    };
    // Where there are none, it is known which requests later ones will be asked about.
    for port in service.ports.iter_mut().filter(|port| policies.is_some() || !port.routes.is_empty()) {
        let own = port.cluster.endpoints.iter().filter(|e| asks(e)).map(|e| e.address).collect::<BTreeSet<_>>();
        port.is_guarded = !port.cluster.endpoints.iter().all(|e| own.contains(&e.address));
        port.routes.guard(&|cluster| cluster.is_some_and(|c| c.endpoints.iter().all(|e| own.contains(&e.address))));
        port.guard = policies.map(|policies| policies.governing.clone());
    }
}

/// Gives a service its addresses, which no other has.
fn place(builder: &mut Builder<'_>, entry: &Entry<'_>, service: &Arc<Service>, snapshot: &mut Snapshot) {
    for vip in &entry.service.vips {
        if let Some(other) = snapshot.by_vip.get(vip) {
            let message = format!("spec.clusterIPs: {vip} belongs to Service {} already; use another address", other.name);
            builder.remark(Severity::Error, entry.named, &message);
        } else {
            snapshot.by_vip.insert(*vip, service.clone());
        }
    }
    if entry.service.is_headless() {
        // A pod's own address is the service's on its ports, for the first service that says so.
        for endpoint in service.ports.iter().flat_map(|p| p.cluster.endpoints.iter().filter(|e| e.address.port() == p.port)) {
            snapshot.by_external.entry(endpoint.address).or_insert_with(|| service.clone());
        }
    }
    for (ip, port) in entry.service.external_ips.iter().flat_map(|ip| service.ports.iter().map(move |p| (*ip, p.port))) {
        let address = SocketAddr::new(ip, port);
        if let Some(other) = snapshot.by_external.get(&address) {
            let message = format!("status.loadBalancer: {address} belongs to Service {} already; use another address or port", other.name);
            builder.remark(Severity::Error, entry.named, &message);
        } else {
            snapshot.by_external.insert(address, service.clone());
        }
    }
}
