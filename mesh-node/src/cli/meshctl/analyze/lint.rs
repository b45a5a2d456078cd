//! What is in force as it is written, and hardly meant so: rules that are never reached, selectors that match nothing, policies of which
//! another takes the place. Of manifests alone: in a cluster pods come and go.

mod ports;
mod routes;
mod values;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{
    config::{
        MeshSettings, Snapshot,
        store::{Severity, Status, Store},
    },
    id::ObjectName,
    resource::{
        DestinationRule, Kind, Named, Object,
        destination_rule::Layered,
        selector::{Selecting, WorkloadSelector},
    },
    route::{Workload, rule::Action, traffic::Locality},
};

/// Everything there is to say.
pub fn remarks(store: &Store, mesh: &MeshSettings, snapshot: &Snapshot) -> Vec<Status> {
    // Who writes down one namespace is taken to write down all that matter.
    let written = store.objects().any(|named| named.key.kind == Kind::Namespace);
    let namespaces = store.objects().map(|named| match named.key.kind {
        Kind::Namespace => &*named.key.name.name,
        _ => &*named.key.name.namespace,
    });
    let namespaces = namespaces.filter(|n| written && !n.is_empty()).chain(written.then_some(&*mesh.root_namespace));
    let mut lint = Lint {
        store,
        mesh,
        snapshot,
        namespaces: namespaces.collect(),
        workloads: BTreeMap::new(),
        labelled: HashMap::new(),
        found: Vec::new(),
    };
    snapshot.workloads().for_each(|workload| lint.take(workload));
    for named in store.objects() {
        match &named.object {
            Object::VirtualService(vs) => lint.virtual_service(named, vs),
            Object::Service(service) => lint.service_ports(named, service),
            Object::DestinationRule(rule) => {
                if lint.clients(named, rule) {
                    lint.subsets(named, rule);
                }
                lint.settings_of_ports(named, rule);
                lint.failover(named, rule);
                lint.exports(named, &rule.export_to);
            }
            Object::PeerAuthentication(p) => {
                lint.selector(named, p.selector.as_ref());
                lint.modes_of_ports(named, p);
            }
            Object::AuthorizationPolicy(p) => {
                lint.selector(named, p.selector.as_ref());
                lint.never_said(named, &p.rules);
                lint.nowhere(named, &p.rules);
                lint.tokens(named, p);
                lint.ports_of_rules(named, p);
            }
            Object::RequestAuthentication(p) => lint.selector(named, p.selector.as_ref()),
            Object::Telemetry(t) => lint.selector(named, t.selector.as_ref()),
            _ => {}
        }
    }
    let mut aged = store.objects().collect::<Vec<_>>();
    aged.sort_by_key(|named| (named.created, &named.key.name.name, &named.key.name.namespace));
    lint.destination_rules(&aged);
    lint.of_one_pod(&aged);
    lint.gateway_routes(&aged);
    lint.delegates(&aged);
    lint.found
}

struct Lint<'a> {
    store: &'a Store,
    mesh: &'a MeshSettings,
    snapshot: &'a Snapshot,
    /// Those there are; empty where manifests do not say.
    namespaces: BTreeSet<&'a str>,
    /// By namespace.
    workloads: BTreeMap<&'a str, Vec<&'a Workload>>,
    /// By each of their labels.
    labelled: HashMap<(&'a str, &'a str), Vec<&'a Workload>>,
    found: Vec<Status>,
}

impl<'a> Lint<'a> {
    fn take(&mut self, workload: &'a Workload) {
        self.workloads.entry(&workload.name.namespace).or_default().push(workload);
        workload.labels.iter().for_each(|pair| self.labelled.entry(pair).or_default().push(workload));
    }

    fn say(&mut self, named: &Named, message: &str) {
        let origin = self.store.origin_of(&named.key).map(ToString::to_string).unwrap_or_default();
        self.found.push(Status { origin, severity: Severity::Warning, message: format!("{}: {message}", named.key) });
    }

    /// Workloads a selector of an object of a namespace matches.
    fn selected<'s>(&'s self, namespace: &'s str, selector: &'s WorkloadSelector) -> impl Iterator<Item = &'a Workload> + 's {
        let root = *self.mesh.root_namespace == *namespace;
        let pair = selector.match_labels.iter().find(|(_, value)| *value != "*");
        let labelled = pair.and_then(|pair| self.labelled.get(&pair));
        let all = self.workloads.values().flatten().filter(move |_| pair.is_none());
        let may = labelled.into_iter().flatten().chain(all).copied();
        may.filter(move |w| (root || *w.name.namespace == *namespace) && selector.matches(&w.labels))
    }

    fn selector(&mut self, named: &Named, selector: Option<&WorkloadSelector>) {
        let Some(selector) = selector else { return };
        if self.selected(&named.key.name.namespace, selector).next().is_none() {
            self.say(named, "spec.selector: matches no pod of these manifests; check its labels and the object's namespace");
        }
    }

    /// Whether a rule is for anybody: one that selects clients is for those of its own namespace, also in the root namespace.
    fn clients(&mut self, named: &Named, rule: &DestinationRule) -> bool {
        let Some(selector) = &rule.selector else { return true };
        let namespace = &named.key.name.namespace;
        let is_used = self.selected(namespace, selector).any(|w| w.name.namespace == *namespace);
        if !is_used {
            self.say(
                named,
                "spec.workloadSelector: matches no pod of the rule's namespace, whose clients alone it is for; check its labels",
            );
        }
        is_used
    }

    fn subsets(&mut self, named: &Named, rule: &DestinationRule) {
        let namespace: &str = &named.key.name.namespace;
        let Some(service) = self.service(&rule.host, namespace).and_then(|name| self.snapshot.service(&name)) else { return };
        // Some clients may have it alone.
        let seen = std::iter::once(&**service).chain(self.snapshot.views_of(&service.name).into_iter().map(|(_, seen)| seen));
        let ports = seen.flat_map(|service| &service.ports).collect::<Vec<_>>();
        for (i, subset) in rule.subsets.iter().enumerate() {
            let reached = ports.iter().filter_map(|p| p.subsets.get(&subset.name)).any(|cluster| !cluster.endpoints.is_empty());
            if !reached && service.ports.iter().any(|p| !p.cluster.endpoints.is_empty()) {
                let message = format!(
                    "spec.subsets[{i}].labels: no endpoint of {} has them; what is routed to {:?} is answered 503",
                    service.name, subset.name
                );
                self.say(named, &message);
            }
        }
    }

    /// Where a service's clients go when it fails is of no use to those that never see that it does.
    fn failover(&mut self, named: &Named, rule: &DestinationRule) {
        let host = rule.policy.as_ref();
        let says = |locality: &Locality| !locality.failover.is_empty() || !locality.failover_priority.is_empty();
        let layers = std::iter::once(None).chain(rule.subsets.iter().map(|subset| Some(&subset.policy)));
        let mut all = layers.flat_map(|subset| {
            let ports = host.into_iter().chain(subset).flat_map(|layered| layered.ports.keys().copied());
            std::iter::once(0).chain(ports).map(move |port| Layered::effective(host, subset, port)).collect::<Vec<_>>()
        });
        // Where some of them see it, that is what is meant.
        if all.clone().any(|policy| says(&policy.locality)) && all.all(|policy| policy.outlier.is_none()) {
            let at = if host.is_some_and(|host| says(&Layered::effective(Some(host), None, 0).locality)) {
                "spec.trafficPolicy.loadBalancer.localityLbSetting"
            } else {
                "spec.subsets"
            };
            let message =
                format!("{at}: its failover counts for nothing without outlierDetection, by which alone it is seen that endpoints fail");
            self.say(named, &message);
        }
    }

    fn service(&self, host: &str, namespace: &str) -> Option<ObjectName> {
        ObjectName::from_host(host, namespace).filter(|name| self.snapshot.service(name).is_some())
    }

    /// Tells of a Service that is named in a way only mesh-node understands.
    fn half_named(&mut self, named: &Named, field: &str, host: &str) {
        let Some(name) = self.service(host, &named.key.name.namespace).filter(|name| host.contains('.') && *host != *name.fqdn()) else {
            return;
        };
        let message = format!("{field}: Istio takes {host:?} for a host outside the mesh, which mesh-node does not; write {}", name.fqdn());
        self.say(named, &message);
    }

    /// Of several for one host in one namespace, the oldest that has it counts.
    fn destination_rules(&mut self, aged: &[&Named]) {
        let mut policies: BTreeMap<_, &Named> = BTreeMap::new();
        let mut subsets: BTreeMap<_, &Named> = BTreeMap::new();
        for named in aged {
            let Object::DestinationRule(rule) = &named.object else { continue };
            let namespace = named.key.name.namespace.to_string();
            self.half_named(named, "spec.host", &rule.host);
            let host = self.service(&rule.host, &namespace).map_or_else(|| rule.host.to_string(), |s| s.to_string());
            let selected = rule.selector.as_ref().map(|s| s.match_labels.iter().collect::<Vec<_>>());
            let place = (namespace, host, selected);
            if rule.policy.is_some()
                && let Some(older) = policies.get(&place)
            {
                let message = format!("spec.trafficPolicy: that of {}, which is older, counts for this host; merge the two", older.key);
                self.say(named, &message);
            } else if rule.policy.is_some() {
                policies.insert(place.clone(), named);
            }
            for (i, subset) in rule.subsets.iter().enumerate() {
                let key = (place.clone(), &subset.name);
                match subsets.get(&key) {
                    Some(older) => {
                        let message = format!(
                            "spec.subsets[{i}]: {:?} of {}, which is older, counts for this host; give it another name",
                            subset.name, older.key
                        );
                        self.say(named, &message);
                    }
                    None => drop(subsets.insert(key, named)),
                }
            }
        }
    }

    /// Of several for one pod, the oldest counts.
    fn of_one_pod(&mut self, aged: &[&Named]) {
        self.selected_twice(aged, |object| if let Object::PeerAuthentication(p) = object { p.selector.as_ref() } else { None });
        self.selected_twice(aged, |object| if let Object::Telemetry(t) = object { t.selector.as_ref() } else { None });
    }

    fn selected_twice(&mut self, aged: &[&Named], selector: impl Fn(&Object) -> Option<&WorkloadSelector>) {
        let mut said = BTreeSet::new();
        let mut all: BTreeMap<&str, Selecting<'_, usize>> = BTreeMap::new();
        for (i, named) in aged.iter().enumerate() {
            if let Some(selector) = selector(&named.object) {
                all.entry(&named.key.name.namespace).or_default().insert(selector, i);
            }
        }
        for workload in self.snapshot.workloads() {
            let Some(in_its_namespace) = all.get(&*workload.name.namespace) else { continue };
            let mut selecting = in_its_namespace.of(&workload.labels).into_iter().filter_map(|i| aged.get(i));
            let Some(first) = selecting.next() else { continue };
            for named in selecting.filter(|named| said.insert(&named.key)) {
                let message = format!("spec.selector: selects {} as well as {} does, which is older and counts", workload.name, first.key);
                self.say(named, &message);
            }
        }
    }

    fn delegates(&mut self, aged: &[&Named]) {
        let mut used = BTreeSet::new();
        for named in aged {
            let Object::VirtualService(vs) = &named.object else { continue };
            for rule in &vs.http {
                if let Action::Delegate { namespace, name } = &rule.action {
                    let namespace = if namespace.is_empty() { &named.key.name.namespace } else { namespace };
                    used.insert(ObjectName { namespace: namespace.clone(), name: name.clone() });
                }
            }
        }
        for named in aged {
            if let Object::VirtualService(vs) = &named.object
                && vs.hosts.is_empty()
                && !used.contains(&named.key.name)
            {
                self.say(named, "spec.hosts: is empty and no VirtualService delegates to it; its routes are not used");
            }
        }
    }
}
