//! The routing rules in force: of every service or of one, for all clients and for those of namespaces that are routed otherwise.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{NoAnswer, names::near, query};
use crate::{
    app::Node,
    detect::Protocol,
    route::{
        Cluster, Service, ServicePort,
        rule::{Action, Rule, Weighted},
        table::{HttpTable, ResolvedL4, ResolvedRule},
    },
};

/// As a query asks: `service=namespace/name`, or a name alone.
pub(super) fn routes(node: &Node, query: &str) -> Result<Value, NoAnswer> {
    let mut wanted = String::new();
    for (name, value) in query::pairs(query)? {
        match name {
            "service" => wanted = value,
            _ => return Err(format!("{name}: is not known; service is").into()),
        }
    }
    let snapshot = node.proxy.config.load();
    let is_it = |s: &Service| wanted.is_empty() || s.name.to_string() == wanted || (!wanted.contains('/') && *s.name.name == *wanted);
    if !snapshot.services().iter().any(|s| is_it(s)) && !wanted.is_empty() {
        let near = near(&wanted, snapshot.services().iter().map(|s| s.name.to_string()));
        return Err(NoAnswer::Missing(format!("service: there is no service {wanted:?}{near}")));
    }
    let mut all = Vec::new();
    for service in snapshot.services().iter().filter(|s| is_it(s)) {
        let common = of_service(service);
        for (view, seen) in snapshot.views_of(&service.name) {
            // Only where it makes a difference.
            let own = of_service(seen);
            if own != common {
                all.extend(own.into_iter().map(|one| for_clients(one, Some(view))));
            }
        }
        all.extend(common.into_iter().map(|one| for_clients(one, None)));
    }
    Ok(all.into())
}

fn for_clients(mut one: Value, view: Option<&str>) -> Value {
    one["clientsOf"] = json!(view);
    one
}

fn of_service(service: &Service) -> Vec<Value> {
    service.ports.iter().flat_map(|port| of_port(service, port)).collect()
}

fn of_port(service: &Service, port: &ServicePort) -> Vec<Value> {
    let protocol = format!("{:?}", port.cluster.protocol).to_lowercase();
    let shared = json!({"service": service.name.to_string(), "port": port.port, "protocol": protocol});
    let mut all = Vec::new();
    // Rules of the other kind are there and never asked.
    let (may_be_http, may_be_opaque) = (!matches!(port.cluster.protocol, Protocol::Tcp | Protocol::Tls), !port.cluster.protocol.is_http());
    for (kind, rules) in [("tls", &port.routes.tls), ("tcp", &port.routes.tcp)].into_iter().filter(|_| may_be_opaque) {
        all.extend(rules.iter().enumerate().map(|(i, rule)| l4(shared.clone(), kind, i, rule)));
    }
    let tables = port.routes.http.iter().filter(|_| may_be_http).flat_map(HttpTable::all);
    all.extend(tables.flat_map(|table| table.rules.iter().map(|rule| http(shared.clone(), rule))));
    if all.is_empty() {
        let mut one = shared;
        one["from"] = Value::Null;
        one["action"] = "forward".into();
        one["destinations"] = json!([{"weight": 1, "cluster": port.cluster.id.to_string(), "endpoints": port.cluster.endpoints.len()}]);
        all.push(one);
    }
    all
}

fn destinations(all: &[Weighted], clusters: &[Option<Arc<Cluster>>]) -> Value {
    let one = |(d, cluster): (&Weighted, &Option<Arc<Cluster>>)| json!({"weight": d.weight, "cluster": cluster.as_ref().map(|c| c.id.to_string()), "endpoints": cluster.as_ref().map(|c| c.endpoints.len())});
    all.iter().zip(clusters).map(one).collect()
}

fn http(mut one: Value, resolved: &ResolvedRule) -> Value {
    let rule: &Rule = &resolved.rule;
    one["kind"] = "http".into();
    one["from"] = (*resolved.origin).into();
    one["rule"] = (rule.number + 1).into();
    one["name"] = (*rule.name).into();
    one["matches"] = rule.matches.iter().map(|m| format!("{m}")).collect();
    one["action"] = match &rule.action {
        Action::Forward(_) => "forward".to_owned(),
        Action::Redirect(r) => format!("redirect {}", r.status.as_u16()),
        Action::Respond(r) => format!("respond {}", r.status.as_u16()),
        Action::Delegate { namespace, name } => format!("delegate {namespace}/{name}"),
    }
    .into();
    one["timeoutMilliseconds"] = json!(rule.timeout.map(|t| t.as_millis()));
    one["attempts"] = json!(rule.retries.as_ref().map(|r| r.attempts));
    one["mirrors"] = json!(rule.mirrors.len());
    one["destinations"] = match &rule.action {
        Action::Forward(all) => destinations(all, &resolved.destinations),
        _ => json!([]),
    };
    one
}

fn l4(mut one: Value, kind: &str, number: usize, resolved: &ResolvedL4) -> Value {
    let rule = &resolved.rule;
    one["kind"] = kind.into();
    one["from"] = (*resolved.origin).into();
    one["rule"] = json!(number + 1);
    one["matches"] = rule.matches.iter().map(ToString::to_string).collect();
    one["action"] = "forward".into();
    one["destinations"] = destinations(&rule.destinations, &resolved.destinations);
    one
}
