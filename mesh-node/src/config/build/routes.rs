//! Routes: which `VirtualService` or Gateway API routes are in force for a service, delegates merged in, destinations
//! resolved to clusters.

mod delegation;

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    Builder, age,
    services::{Clusters, Registry, closeness, is_visible, or_default},
};
use crate::{
    config::store::{Severity, Status},
    detect::Protocol,
    id::ObjectName,
    resource::{GatewayRoute, Kind, Named, VirtualService, gateway_route::precedence, kube},
    route::{
        Cluster, ClusterId, PortRoutes,
        l4::L4Rule,
        matching::HttpMatch,
        rule::{Action, Destination, Rule},
        table::{HttpTable, ResolvedL4, ResolvedRule},
    },
};

pub(super) struct Routes<'a> {
    /// By service: closest host and oldest first.
    virtual_services: HashMap<&'a ObjectName, Vec<(usize, &'a Named, &'a VirtualService)>>,
    /// Those that others delegate to.
    delegates: HashMap<&'a ObjectName, &'a VirtualService>,
    gateway_routes: HashMap<&'a ObjectName, Vec<(&'a Named, &'a GatewayRoute)>>,
    /// Who sees a `VirtualService` that does not say so.
    exported: &'a [Arc<str>],
    ports: HashMap<&'a ObjectName, Vec<u16>>,
    /// Services that stand for another host (`ExternalName`).
    aliases: HashMap<&'a ObjectName, &'a str>,
    /// Namespaces whose clients are routed otherwise.
    pub special: BTreeSet<&'a str>,
    pub remarks: RefCell<Vec<Status>>,
}

impl<'a> Routes<'a> {
    pub fn new(builder: &mut Builder<'a>, registry: &Registry<'a>) -> Self {
        let mut routes = Self {
            virtual_services: HashMap::new(),
            delegates: HashMap::new(),
            gateway_routes: HashMap::new(),
            exported: builder.parts.defaults.map_or(&[][..], |defaults| &defaults.virtual_services),
            ports: registry.iter().map(|(name, e)| (*name, e.service.ports.iter().map(|p| p.port).collect())).collect(),
            aliases: registry.iter().filter_map(|(name, e)| Some((*name, e.service.alias.as_deref()?))).collect(),
            special: BTreeSet::new(),
            remarks: RefCell::default(),
        };
        let mut all = std::mem::take(&mut builder.parts.virtual_services);
        all.sort_by_key(|(named, _)| age(named));
        for (named, virtual_service) in all {
            routes.add_virtual_service(builder, registry, named, virtual_service);
        }
        for list in routes.virtual_services.values_mut() {
            list.sort_by_key(|(close, ..)| std::cmp::Reverse(*close));
        }
        let mut all = std::mem::take(&mut builder.parts.gateway_routes);
        // The Gateway API compares `namespace/name`.
        all.sort_by_key(|(named, _)| (named.created, named.key.name.clone()));
        for (named, route) in all {
            routes.add_gateway_route(builder, registry, named, route);
        }
        routes.name_the_unused(builder);
        routes
    }

    fn add_virtual_service(&mut self, builder: &mut Builder<'a>, registry: &Registry<'a>, named: &'a Named, vs: &'a VirtualService) {
        let namespace: &str = &named.key.name.namespace;
        if vs.hosts.is_empty() {
            self.delegates.insert(&named.key.name, vs);
        }
        if !vs.mesh {
            return;
        }
        let restricted = or_default(&vs.export_to, self.exported).iter().filter(|to| !["*", "~"].contains(&&***to));
        self.special.extend(restricted.map(|to| if &**to == "." { namespace } else { &**to }));
        for host in &vs.hosts {
            if host.starts_with('*') {
                for name in registry.keys() {
                    if let Some(close) = closeness(host, namespace, name) {
                        self.add_to(name, (close, named, vs));
                    }
                }
                continue;
            }
            match ObjectName::from_host(host, namespace).and_then(|n| registry.get_key_value(&n)) {
                Some((name, _)) => {
                    if let Some(alias) = self.aliases.get(name) {
                        let message = format!(
                            "spec.hosts: Service {name} is an ExternalName of {alias}, which its clients dial; write routes for that"
                        );
                        builder.remark(Severity::Warning, named, &message);
                    }
                    self.add_to(name, (usize::MAX, named, vs));
                }
                None => {
                    builder.remark(Severity::Warning, named, &format!("spec.hosts: there is no Service {host}; its routes are not used"));
                }
            }
        }
    }

    /// Once, however many of its hosts mean the service.
    fn add_to(&mut self, service: &'a ObjectName, added: (usize, &'a Named, &'a VirtualService)) {
        let list = self.virtual_services.entry(service).or_default();
        match list.iter_mut().find(|(_, named, _)| named.key == added.1.key) {
            Some((close, ..)) => *close = added.0.max(*close),
            None => list.push(added),
        }
    }

    fn add_gateway_route(&mut self, builder: &mut Builder<'a>, registry: &Registry<'a>, named: &'a Named, route: &'a GatewayRoute) {
        let namespace = &named.key.name.namespace;
        for parent in &route.parents {
            let name = ObjectName { namespace: parent.namespace.clone().unwrap_or_else(|| namespace.clone()), name: parent.name.clone() };
            let Some((name, entry)) = registry.get_key_value(&name) else {
                let message = format!("spec.parentRefs: there is no Service {name}; the route is not used for it");
                builder.remark(Severity::Warning, named, &message);
                continue;
            };
            let is_it = |e: &kube::ServicePort| {
                parent.port.is_none_or(|port| e.port == port) && parent.section.as_ref().is_none_or(|section| e.name == *section)
            };
            if !entry.service.ports.iter().any(is_it) {
                let asked = parent.port.map(|port| port.to_string()).into_iter().chain(parent.section.as_ref().map(ToString::to_string));
                let asked = asked.collect::<Vec<_>>().join(" named ");
                let message = format!("spec.parentRefs: Service {name} has no port {asked}; the route is not used for it");
                builder.remark(Severity::Warning, named, &message);
                continue;
            }
            let list = self.gateway_routes.entry(name).or_default();
            if !list.iter().any(|(n, _)| n.key == named.key) {
                list.push((named, route));
            }
            if *namespace != name.namespace {
                self.special.insert(namespace);
            }
        }
    }

    /// Says which virtual services are not in force for a host because an older one is.
    fn name_the_unused(&self, builder: &Builder<'a>) {
        let clients = std::iter::once(None).chain(self.special.iter().copied().map(Some)).collect::<Vec<_>>();
        for (service, list) in &self.virtual_services {
            for client in &clients {
                let mut visible = list.iter().filter(|(close, named, vs)| {
                    *close == usize::MAX && is_visible(or_default(&vs.export_to, self.exported), &named.key.name.namespace, *client)
                });
                let Some((_, first, oldest)) = visible.next() else { continue };
                for (_, named, vs) in visible.filter(|(_, named, _)| named.key != first.key) {
                    let Some((severity, part)) = covered(vs, oldest) else { continue };
                    let message = format!("{part}: {} is older, for {service} too, and its own counts; merge the two", first.key);
                    self.remark(builder, severity, named, &message);
                }
                if self.gateway_routes.contains_key(service) && !oldest.http.is_empty() {
                    let message = format!("spec.hosts: Service {service} has Gateway API routes, which are used instead for HTTP");
                    self.remark(builder, Severity::Warning, first, &message);
                }
            }
        }
    }

    /// The service that a host is in the end, where it stands for another.
    fn concrete(&self, host: &str, namespace: &str) -> Result<Option<ObjectName>, String> {
        const MAX_ALIASES: usize = 4;
        let mut service = ObjectName::from_host(host, namespace);
        for _ in 0..=MAX_ALIASES {
            let Some((name, alias)) = service.as_ref().and_then(|name| Some((name, self.aliases.get(name)?))) else { return Ok(service) };
            let target = ObjectName::from_host(alias, &name.namespace).filter(|target| self.ports.contains_key(target));
            service = Some(target.ok_or_else(|| format!("the Service stands for {alias}, which is none of the mesh"))?);
        }
        Err("the Service stands for others that stand for others, too many of them".into())
    }

    /// Whether a service has any routes a client of a namespace can see.
    pub fn any(&self, service: &ObjectName, client: &str) -> bool {
        let visible = |(_, named, vs): &(usize, &Named, &VirtualService)| {
            is_visible(or_default(&vs.export_to, self.exported), &named.key.name.namespace, Some(client))
        };
        self.virtual_services.get(service).is_some_and(|l| l.iter().any(visible)) || self.gateway_routes.contains_key(service)
    }

    /// The routes of one port of a service in one view. As in Istio, `tls` rules are for ports declared to carry TLS, and `tcp` rules for others.
    pub fn of(
        &self,
        builder: &Builder<'_>,
        service: &ObjectName,
        (port, protocol): (&kube::ServicePort, Protocol),
        client: Option<&str>,
        clusters: &Clusters<'_>,
    ) -> PortRoutes {
        let is_tls = protocol == Protocol::Tls;
        let resolver = Resolver { routes: self, builder, port: port.port, clusters };
        let visible = |(_, named, vs): &&(usize, &'a Named, &'a VirtualService)| {
            is_visible(or_default(&vs.export_to, self.exported), &named.key.name.namespace, client)
        };
        let mut found = PortRoutes::default();
        let mut groups: Vec<(usize, &Named, Vec<RulesOf>)> = Vec::new();
        for (close, named, vs) in self.virtual_services.get(service).into_iter().flatten().filter(visible) {
            let l4 = |rules: &[L4Rule]| rules.iter().map(|r| resolver.l4(named, r)).collect::<Vec<_>>();
            if !is_tls && found.tcp.is_empty() {
                found.tcp = l4(&vs.tcp);
            }
            if is_tls && found.tls.is_empty() {
                found.tls = l4(&vs.tls);
            }
            if !vs.http.is_empty() {
                let rules = vs.http.iter().flat_map(|r| self.expand(builder, named, r));
                let rules = rules.map(|(rule, namespace)| (*named, namespace, rule)).collect();
                match groups.last_mut() {
                    Some((of, _, lists)) if of == close => lists.push(rules),
                    _ => groups.push((*close, named, vec![rules])),
                }
            }
        }
        let mut tables = Vec::new();
        for (_, first, lists) in groups {
            let rules = merged(lists).into_iter().map(|(named, namespace, rule)| resolver.http(named, &namespace, rule)).collect();
            tables.push(HttpTable::new(first.key.to_string().into(), rules));
            if tables.last().is_some_and(HttpTable::is_for_all) {
                break;
            }
        }
        let gateway = self.gateway_table(service, port, client, &resolver);
        found.http = gateway.or_else(|| HttpTable::chain(tables));
        found
    }

    /// Gateway API routes of one port: a consumer's own before the producer's; the most specific match first.
    fn gateway_table(
        &self,
        service: &ObjectName,
        port: &kube::ServicePort,
        client: Option<&str>,
        resolver: &Resolver<'_, '_>,
    ) -> Option<HttpTable> {
        let attached = self.gateway_routes.get(service)?.iter().filter(|(named, route)| {
            route.parents.iter().any(|p| {
                let namespace = p.namespace.as_ref().unwrap_or(&named.key.name.namespace);
                p.name == service.name
                    && *namespace == service.namespace
                    && p.port.is_none_or(|p| p == port.port)
                    && p.section.as_ref().is_none_or(|name| *name == port.name)
            })
        });
        let of = |namespace: &str| attached.clone().filter(|(named, _)| &*named.key.name.namespace == namespace).collect::<Vec<_>>();
        let mut routes = client.filter(|c| **c != *service.namespace).map(of).unwrap_or_default();
        if routes.is_empty() {
            routes = of(&service.namespace);
        }
        // One kind of route at a time, the more special first (GEP-1426).
        if routes.iter().any(|(named, _)| named.key.kind == Kind::GRPCRoute) {
            for (named, _) in routes.iter().filter(|(named, _)| named.key.kind != Kind::GRPCRoute) {
                let message = format!("spec.parentRefs: Service {service} has a GRPCRoute, which is used instead; give each a port");
                self.remark(resolver.builder, Severity::Error, named, &message);
            }
            routes.retain(|(named, _)| named.key.kind == Kind::GRPCRoute);
        }
        let origin = routes.first()?.0.key.to_string();
        let mut rules = routes.iter().flat_map(|(named, route)| route.rules.iter().map(move |r| (*named, r))).collect::<Vec<_>>();
        // Stable: among equals the older route, and the earlier rule, stays first.
        rules.sort_by_key(|(_, rule)| std::cmp::Reverse(rule.matches.first().map(precedence)));
        let rules = rules.into_iter().map(|(named, r)| resolver.http(named, &named.key.name.namespace, r.clone())).collect();
        Some(HttpTable::new(origin.into(), rules))
    }

    /// A rule, or the rules of the virtual service it delegates to; each with the namespace its names are of.
    fn expand(&self, builder: &Builder<'_>, named: &Named, rule: &Rule) -> Vec<(Rule, Arc<str>)> {
        let own = named.key.name.namespace.clone();
        let Action::Delegate { namespace, name } = &rule.action else { return vec![(rule.clone(), own)] };
        let namespace = if namespace.is_empty() { &own } else { namespace };
        let to = ObjectName { namespace: namespace.clone(), name: name.clone() };
        let Some(delegate) = self.delegates.get(&to) else {
            let message = format!("spec.http: there is no VirtualService {to} without hosts to delegate to; the route is not used");
            self.remark(builder, Severity::Warning, named, &message);
            return Vec::new();
        };
        if !is_visible(or_default(&delegate.export_to, self.exported), namespace, Some(&own)) {
            let message = format!("spec.http: VirtualService {to} is not exported to namespace {own}; the route is not used");
            self.remark(builder, Severity::Warning, named, &message);
            return Vec::new();
        }
        let merged = delegate.http.iter().enumerate().filter_map(|(i, d)| {
            // The one that delegates, which the log names.
            let merged = delegation::merge(rule, d).map(|merged| Rule { number: rule.number, ..merged });
            if merged.is_none() {
                let message =
                    format!("spec.http: rule {} of {to} asks for what the rule that delegates to it rules out; it is not used", i + 1);
                self.remark(builder, Severity::Warning, named, &message);
            }
            Some((merged?, namespace.clone()))
        });
        merged.collect()
    }

    fn remark(&self, builder: &Builder<'_>, severity: Severity, named: &Named, message: &str) {
        let status = builder.status(severity, named, message);
        let mut remarks = self.remarks.borrow_mut();
        if !remarks.contains(&status) {
            remarks.push(status);
        }
    }
}

/// Rules of one virtual service, each with the namespace its names are of.
type RulesOf<'a> = Vec<(&'a Named, Arc<str>, Rule)>;

/// The rules of several virtual services of one host as one list, the older first, as Istio's waypoints and gateways have them: what takes every
/// request comes after all others, and what its own virtual service has behind it is never reached.
fn merged(mut lists: Vec<RulesOf<'_>>) -> RulesOf<'_> {
    if lists.len() == 1 {
        return lists.pop().unwrap_or_default();
    }
    let (mut all, mut last) = (Vec::new(), Vec::new());
    for list in lists {
        for (named, namespace, rule) in list {
            if rule.matches.is_empty() {
                last.push((named, namespace, rule));
                break;
            }
            let (catch_all, others): (Vec<_>, Vec<_>) = rule.matches.iter().cloned().partition(HttpMatch::is_catch_all);
            let is_end = !catch_all.is_empty();
            if !others.is_empty() {
                all.push((named, namespace.clone(), Rule { matches: others, ..rule.clone() }));
            }
            if is_end {
                last.push((named, namespace, Rule { matches: catch_all, ..rule }));
                break;
            }
        }
    }
    all.extend(last);
    all
}

/// What of a virtual service counts for nothing beside an older one that has the same.
fn covered(vs: &VirtualService, older: &VirtualService) -> Option<(Severity, &'static str)> {
    let takes_all = |vs: &VirtualService| vs.http.iter().any(|r| r.matches.is_empty() || r.matches.iter().any(HttpMatch::is_catch_all));
    let alone = if vs.http.is_empty() { Severity::Error } else { Severity::Warning };
    match () {
        () if !vs.tcp.is_empty() && !older.tcp.is_empty() => Some((alone, "spec.tcp")),
        () if !vs.tls.is_empty() && !older.tls.is_empty() => Some((alone, "spec.tls")),
        () if takes_all(vs) && takes_all(older) => Some((Severity::Warning, "spec.http: its rule for every request")),
        () => None,
    }
}

/// Resolves the destinations of rules for one port in one view.
struct Resolver<'r, 'a> {
    routes: &'r Routes<'a>,
    builder: &'r Builder<'r>,
    port: u16,
    clusters: &'r Clusters<'r>,
}

impl Resolver<'_, '_> {
    fn http(&self, named: &Named, namespace: &str, mut rule: Rule) -> ResolvedRule {
        rule.settle();
        let destinations = match &rule.action {
            Action::Forward(all) => all.iter().map(|d| self.cluster(named, namespace, &d.destination)).collect(),
            _ => Vec::new(),
        };
        let mirrors = rule.mirrors.iter().map(|m| self.cluster(named, namespace, &m.destination)).collect();
        ResolvedRule { origin: named.key.to_string().into(), rule: Arc::new(rule), destinations, mirrors, is_guarded: false }
    }

    fn l4(&self, named: &Named, rule: &L4Rule) -> ResolvedL4 {
        let destinations = rule.destinations.iter().map(|d| self.cluster(named, &named.key.name.namespace, &d.destination));
        ResolvedL4 {
            origin: named.key.to_string().into(),
            destinations: destinations.collect(),
            rule: Arc::new(rule.clone()),
            is_guarded: false,
        }
    }

    fn cluster(&self, named: &Named, namespace: &str, destination: &Destination) -> Option<Arc<Cluster>> {
        let found = self.find(namespace, destination);
        if let Err(problem) = &found {
            let message = format!("destination {}: {problem}; what is routed there is refused", destination.host);
            self.routes.remark(self.builder, Severity::Warning, named, &message);
        }
        found.ok()
    }

    fn find(&self, namespace: &str, destination: &Destination) -> Result<Arc<Cluster>, String> {
        if destination.refused {
            return Err("is not a Service".into());
        }
        let service = self.routes.concrete(&destination.host, namespace)?;
        let known = service.as_ref().and_then(|s| self.routes.ports.get_key_value(s));
        let (service, ports) = known.ok_or("there is no such Service")?;
        let port = match (destination.port, ports.as_slice()) {
            (Some(port), _) => port,
            (None, [only]) => *only,
            (None, _) => self.port,
        };
        if !ports.contains(&port) {
            return Err(match destination.port {
                Some(_) => format!("the Service has no port {port}"),
                // Once, and not for each port the route is for.
                None => "of several ports the Service has none for some that the route is for; say destination.port".into(),
            });
        }
        let id = ClusterId { service: (*service).clone(), port, subset: destination.subset.clone() };
        self.clusters.get(&id).cloned().ok_or_else(|| format!("no DestinationRule defines a subset {}", destination.subset))
    }
}
