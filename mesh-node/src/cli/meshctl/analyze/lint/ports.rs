//! Ports: what their names declare, and numbers that lead nowhere.

use super::Lint;
use crate::{
    admin::names::distance,
    detect::Protocol,
    id::ObjectName,
    resource::{AuthorizationPolicy, DestinationRule, Named, PeerAuthentication, Service, selector::WorkloadSelector},
    route::{PortOf, Workload},
};

/// What a port's name may begin with (Istio's protocol selection).
const PROTOCOLS: [&str; 8] = ["http", "http2", "https", "grpc", "tls", "tcp", "mongo", "mysql"];
/// Words that are like one of these, and meant as they are.
const MEANT: [&str; 7] = ["http3", "grpcs", "mongod", "mongos", "mysqlx", "mtls", "dtls"];

/// Whether a word is one of letters in another order, or, where it is long enough to be recognised, left out, put in or changed.
fn mistypes(word: &str, protocol: &str) -> bool {
    let sorted = |text: &str| {
        let mut all = text.bytes().collect::<Vec<_>>();
        all.sort_unstable();
        all
    };
    let is_long = word.len() >= 4 && protocol.len() >= 4;
    !MEANT.contains(&word) && (is_long && distance(word, protocol) == 1 || sorted(word) == sorted(protocol))
}

impl Lint<'_> {
    pub(super) fn service_ports(&mut self, named: &Named, service: &Service) {
        for (i, port) in service.ports.iter().enumerate() {
            let (field, text) = match &port.app_protocol {
                Some(text) => ("appProtocol", &**text),
                None => ("name", &*port.name),
            };
            let word = text.split('-').next().unwrap_or_default();
            let first = word.to_ascii_lowercase();
            if first.len() < 3 || Protocol::declared(&first, None, 0) != Protocol::Detect {
                continue;
            }
            if let Some(meant) = PROTOCOLS.iter().find(|protocol| mistypes(&first, protocol)) {
                let message = format!(
                    "spec.ports[{i}].{field}: {text:?} declares no protocol, and what comes is looked at; did you mean {:?}?",
                    text.replacen(word, meant, 1)
                );
                self.say(named, &message);
            }
        }
        self.disagreement(named);
    }

    /// Tells of a port of pods that another service declares to carry something else.
    fn disagreement(&mut self, named: &Named) {
        let own = &named.key.name;
        let declared = |name: &ObjectName, workload: &Workload, port: u16| {
            let service = self.snapshot.service(name)?;
            let leads = |p: &&crate::route::ServicePort| {
                p.cluster.endpoints.iter().any(|e| e.address.port() == port && workload.ips.contains(&e.address.ip()))
            };
            service.ports.iter().find(leads).map(|p| p.cluster.protocol)
        };
        // Pods an endpoint of it is.
        let ports = self.snapshot.service(own).into_iter().flat_map(|service| &service.ports);
        let endpoints = ports.flat_map(|port| port.cluster.endpoints.iter());
        let shared = endpoints.filter_map(|e| self.snapshot.workload_by_ip(e.address.ip()));
        let shared = shared.flat_map(|w| w.ports.shared.iter().map(move |(port, services)| (w, *port, services)));
        // Each pair is told of once.
        let is_pair = |services: &[PortOf]| services.iter().any(|of| of.service == *own) && services.iter().any(|of| of.service > *own);
        let other = shared.filter(|(_, _, services)| is_pair(services)).find_map(|(workload, port, services)| {
            let protocol = declared(own, workload, port)?;
            let differs = |other: &&PortOf| {
                let theirs = declared(&other.service, workload, port);
                theirs.is_some_and(|theirs| theirs.is_http() != protocol.is_http() && theirs != Protocol::Detect)
            };
            let other = services.iter().filter(|other| other.service > *own).find(differs)?;
            (protocol != Protocol::Detect).then_some((port, &other.service))
        });
        if let Some((port, other)) = other {
            let message = format!(
                "spec.ports: leads to port {port} of the same pods as Service {other}, which declares that something else is carried; where neither is \
                 dialled, what comes is looked at"
            );
            self.say(named, &message);
        }
    }

    pub(super) fn settings_of_ports(&mut self, named: &Named, rule: &DestinationRule) {
        let service = self.service(&rule.host, &named.key.name.namespace);
        let Some(service) = service.and_then(|name| self.snapshot.service(&name)) else { return };
        let endpoints = || service.ports.iter().flat_map(|port| port.cluster.endpoints.iter());
        if let Some(field) = &rule.plaintext
            && endpoints().any(|e| self.snapshot.workload_by_ip(e.address.ip()).is_some_and(|w| w.enrolled))
        {
            let message = format!("{field}: DISABLE changes nothing between pods of the mesh, whose tunnel is mutual TLS");
            self.say(named, &message);
        }
        let policies = rule.policy.iter().map(|policy| ("spec.trafficPolicy".to_owned(), policy));
        let subsets = rule.subsets.iter().enumerate().map(|(i, subset)| (format!("spec.subsets[{i}].trafficPolicy"), &subset.policy));
        let asked = policies.chain(subsets).flat_map(|(at, policy)| policy.ports.keys().map(move |port| (at.clone(), *port)));
        for (at, port) in asked.filter(|(_, port)| !service.ports.iter().any(|p| p.port == *port)).collect::<Vec<_>>() {
            self.say(named, &format!("{at}.portLevelSettings: {} has no port {port}; ports here are the Service's", service.name));
        }
    }

    pub(super) fn modes_of_ports(&mut self, named: &Named, policy: &PeerAuthentication) {
        let Some(selector) = &policy.selector else { return };
        let meant = policy.port_modes.keys().map(|port| ("spec.portLevelMtls".to_owned(), *port));
        self.ports_of_services(named, Some(selector), meant.collect());
    }

    /// Ports of a policy that is for pods, whichever service leads to them.
    pub(super) fn ports_of_rules(&mut self, named: &Named, policy: &AuthorizationPolicy) {
        if !policy.targets.is_empty() {
            return;
        }
        let mut meant = Vec::new();
        for (i, rule) in policy.rules.iter().enumerate() {
            for (j, to) in rule.to.iter().enumerate() {
                for (field, ports) in [("ports", &to.ports.any_of), ("notPorts", &to.ports.none_of)] {
                    meant.extend(ports.iter().map(|port| (format!("spec.rules[{i}].to[{j}].operation.{field}"), *port)));
                }
            }
        }
        self.ports_of_services(named, policy.selector.as_ref(), meant);
    }

    /// Tells of ports that are a service's and none of its pods'.
    fn ports_of_services(&mut self, named: &Named, selector: Option<&WorkloadSelector>, meant: Vec<(String, u16)>) {
        let everybody = WorkloadSelector::default();
        let selected =
            self.selected(&named.key.name.namespace, selector.unwrap_or(&everybody)).filter(|_| !meant.is_empty()).collect::<Vec<_>>();
        let lead = || selected.iter().flat_map(|w| &w.ports.services);
        let service_of = |port: u16| lead().find(|(_, of)| of.port == port).map(|(target, of)| (*target, of.service.clone()));
        let none = meant.into_iter().filter(|(_, port)| !lead().any(|(target, _)| target == port));
        for (at, port, (target, service)) in none.filter_map(|(at, port)| Some((at, port, service_of(port)?))).collect::<Vec<_>>() {
            let message =
                format!("{at}: {port} is the port of Service {service}, which leads to {target} of its pods; ports here are the pods'");
            self.say(named, &message);
        }
    }
}
