//! Names of what is asked about.

use std::net::IpAddr;

use serde_json::Value;

use super::Failure;
use crate::admin::names::near;

/// The full name of an object: namespace/name.
pub fn named(value: &Value) -> String {
    format!("{}/{}", value["namespace"].as_str().unwrap_or_default(), value["name"].as_str().unwrap_or_default())
}

/// The full name of one of these: as given, or in the only namespace that has it.
pub fn find(kind: &str, text: &str, all: &[Value]) -> Result<String, Failure> {
    let names = all.iter().map(named).collect::<Vec<_>>();
    let meant = by_address(text, all).unwrap_or_else(|| as_named(kind, text));
    let text = meant.as_str();
    if names.iter().any(|n| n == text) {
        return Ok(text.to_owned());
    }
    let is_it = |n: &&String| n.rsplit('/').next() == Some(text);
    match names.iter().filter(is_it).collect::<Vec<_>>()[..] {
        [one] => return Ok(one.clone()),
        [] => {}
        ref several => {
            let several = several.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ");
            return Err(Failure::Asked(format!("there are several {kind}s {text:?}: {several}; say which")));
        }
    }
    let hint = near(text, names.into_iter());
    Err(Failure::Asked(format!("there is no {kind} {text:?}{hint}")))
}

/// The name of the one with an address.
fn by_address(text: &str, all: &[Value]) -> Option<String> {
    let ip = text.parse::<IpAddr>().ok()?.to_canonical().to_string();
    all.iter().find(|one| one["addresses"].as_array().is_some_and(|all| all.iter().any(|a| *a == *ip))).map(named)
}

/// `name.namespace`, `name.namespace.svc.cluster.local` and `name:port` of a service as `namespace/name` and `name`.
fn as_named(kind: &str, text: &str) -> String {
    if kind != "service" || text.contains('/') {
        return text.to_owned();
    }
    let host = text.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(text, |(host, _)| host);
    match host.trim_end_matches('.').split('.').collect::<Vec<_>>()[..] {
        [name, namespace] | [name, namespace, "svc"] | [name, namespace, "svc", "cluster", "local"] => format!("{namespace}/{name}"),
        _ => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_found_and_near_ones_suggested() {
        let all = [("default", "reviews-v1"), ("default", "ratings"), ("shop", "ratings"), ("shop", "cart")]
            .map(|(namespace, name)| json!({"namespace": namespace, "name": name}));
        assert_eq!(find("workload", "cart", &all).ok().as_deref(), Some("shop/cart"));
        assert_eq!(find("workload", "default/ratings", &all).ok().as_deref(), Some("default/ratings"));
        let services = [json!({"namespace": "shop", "name": "cart", "addresses": ["10.0.0.7"]})];
        for text in ["cart", "cart.shop", "cart.shop.svc.cluster.local", "cart:80", "cart.shop.svc:80", "shop/cart", "10.0.0.7"] {
            assert_eq!(find("service", text, &services).ok().as_deref(), Some("shop/cart"), "{text}");
        }
        for (text, part) in [
            ("ratings", "several workloads \"ratings\": default/ratings, shop/ratings"),
            ("review-v1", "did you mean default/reviews-v1?"),
            ("default/reviews-v2", "did you mean default/reviews-v1?"),
            ("default/rating", "did you mean default/ratings?"),
            ("default/rev", "did you mean default/reviews-v1?"),
            ("completely-else", "there is no workload \"completely-else\""),
        ] {
            let error = find("workload", text, &all).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
