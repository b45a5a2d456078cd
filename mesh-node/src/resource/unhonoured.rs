//! Fields that are taken and not honoured: they tune what is in force without them as well, so that the object is worth more than the field. What
//! is wrong with them is for Istio to say.

use serde_json::Value;

use super::Kind;

/// By kind: the field, or list, they are in, and their names.
const FIELDS: &[(Kind, &str, &str)] = &[
    (Kind::DestinationRule, "http", "http2KeepAlive"),
    (Kind::DestinationRule, "retryBudget", "budgetInterval"),
    // Not for ambient mode in Istio either.
    (Kind::DestinationRule, "loadBalancer", "zoneAwareLbSetting"),
    (Kind::DestinationRule, "outlierDetection", "outlierDetectionHttpErrorCodes"),
    (Kind::HTTPRoute, "rules", "sessionPersistence"),
    (Kind::GRPCRoute, "rules", "sessionPersistence"),
    (Kind::Telemetry, "tracing", "disableContextPropagation"),
];

/// The paths of those in a `spec`, and the spec without them; none where it has none of them.
pub(super) fn without(spec: &Value, kind: Kind) -> Option<(Value, Vec<String>)> {
    if !FIELDS.iter().any(|(of, ..)| *of == kind) {
        return None;
    }
    let mut found = Vec::new();
    look(spec, (kind, "spec"), "spec", &mut found);
    if found.is_empty() {
        return None;
    }
    let mut rest = spec.clone();
    take(&mut rest, (kind, "spec"));
    Some((rest, found))
}

fn is_one(kind: Kind, parent: &str, name: &str) -> bool {
    FIELDS.contains(&(kind, parent, name))
}

fn look(value: &Value, (kind, parent): (Kind, &str), at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let path = format!("{at}.{name}");
                if is_one(kind, parent, name) {
                    found.push(path);
                } else {
                    look(field, (kind, name), &path, found);
                }
            }
        }
        Value::Array(all) => all.iter().enumerate().for_each(|(i, item)| look(item, (kind, parent), &format!("{at}[{i}]"), found)),
        _ => {}
    }
}

fn take(value: &mut Value, (kind, parent): (Kind, &str)) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !is_one(kind, parent, name));
            fields.iter_mut().for_each(|(name, field)| take(field, (kind, name)));
        }
        Value::Array(all) => all.iter_mut().for_each(|item| take(item, (kind, parent))),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resource::{Object, Parsed, parse};

    /// Which fields of a spec are told of, where the object is taken.
    fn told(kind: &str, api: &str, spec: &Value) -> Vec<String> {
        let document = json!({"apiVersion": api, "kind": kind, "metadata": {"name": "a"}, "spec": spec});
        match parse(&document, "default") {
            Ok(Parsed::Object(named)) => named.unhonoured,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_only_tunes_costs_nothing_else() {
        let policy = json!({"connectionPool": {"http": {"http2KeepAlive": {"interval": "5s"}, "maxRetries": 7}}, "retryBudget": {"budgetInterval": "1s"}});
        let spec = json!({"host": "a", "trafficPolicy": policy, "subsets": [{"name": "v1", "trafficPolicy": policy}]});
        let expected = ["spec.subsets[0].trafficPolicy", "spec.trafficPolicy"]
            .map(|at| [format!("{at}.connectionPool.http.http2KeepAlive"), format!("{at}.retryBudget.budgetInterval")]);
        let mut all = told("DestinationRule", "networking.istio.io/v1", &spec);
        all.sort();
        assert_eq!(all, expected.concat());
        let route = json!({"parentRefs": [{"kind": "Service", "group": "", "name": "s"}], "rules": [{"backendRefs": [{"name": "s", "port": 80}], "sessionPersistence": {"sessionName": "a"}}]});
        let document = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r"}, "spec": route});
        let Ok(Parsed::Object(named)) = parse(&document, "default") else { panic!("taken") };
        let Object::GatewayRoute(read) = named.object else { panic!("a route") };
        assert_eq!((read.rules.len(), named.unhonoured), (1, vec!["spec.rules[0].sessionPersistence".to_owned()]));
        assert!(told("Telemetry", "telemetry.istio.io/v1", &json!({"tracing": [{"disableContextPropagation": true}]})).len() == 1);
    }

    /// Elsewhere a field of that name is none that is known.
    #[test]
    fn a_field_in_another_place_is_still_a_mistake() {
        let document = json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "a"}, "spec": {"host": "a", "http2KeepAlive": {}}});
        assert_eq!(parse(&document, "default").expect_err("refused").field, "spec.http2KeepAlive");
    }
}
