//! Destination rules as written, good and bad.

use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::{
    resource::{self, Object, Parsed},
    route::traffic::{Balancer, HashKey, HashTable, Outlier, Upgrade},
};

fn read(spec: &Value) -> Result<DestinationRule, String> {
    let document = json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "d"}, "spec": spec});
    match resource::parse(&document, "default") {
        Ok(Parsed::Object(named)) => match named.object {
            Object::DestinationRule(d) => Ok(*d),
            other => panic!("{other:?}"),
        },
        Ok(other) => panic!("{other:?}"),
        Err(rejection) => Err(rejection.to_string()),
    }
}

fn policy(policy: &Value) -> Result<TrafficPolicy, String> {
    read(&json!({"host": "a", "trafficPolicy": policy})).map(|d| Layered::effective(d.policy.as_ref(), None, 80))
}

#[test]
fn the_seed_breaker_is_read_as_it_is_written() {
    let text = include_str!("../../../../tests/corpora/seed/08-circuit-breaker.yaml");
    let document: Value = serde_saphyr::from_str(text).expect("YAML");
    let rule = read(&document["spec"]).expect("valid");
    let policy = Layered::effective(rule.policy.as_ref(), None, 9080);
    assert_eq!(policy.tcp.max_connections, Some(100));
    assert_eq!(
        (policy.http.max_pending, policy.http.max_requests, policy.http.max_requests_per_connection),
        (Some(50), Some(100), Some(2))
    );
    let expected = Outlier {
        consecutive_5xx: 5,
        interval: Duration::from_secs(30),
        base_ejection: Duration::from_secs(30),
        max_ejection_percent: 50,
        min_health_percent: 50,
        ..Outlier::default()
    };
    assert_eq!(policy.outlier, Some(expected));
}

#[test]
fn everything_a_policy_can_say_is_read() {
    let policy = policy(&json!({
        "loadBalancer": {"consistentHash": {"httpCookie": {"name": "c", "path": "/p", "ttl": "0s"}, "maglev": {"tableSize": 101}},
                         "localityLbSetting": {"failover": [{"from": "a", "to": "b"}]}},
        "connectionPool": {"tcp": {"maxConnections": 0, "connectTimeout": "250ms", "tcpKeepalive": {"probes": 3, "time": "60s", "interval": "5s"},
                                   "maxConnectionDuration": "1h", "idleTimeout": "5m"},
                           "http": {"maxRetries": 3, "idleTimeout": "30s", "h2UpgradePolicy": "UPGRADE", "maxConcurrentStreams": 7}},
        "outlierDetection": {"consecutive5xxErrors": 7, "consecutiveGatewayErrors": 2, "splitExternalLocalOriginErrors": true,
                             "consecutiveLocalOriginFailures": 4},
        "tls": {"mode": "ISTIO_MUTUAL", "subjectAltNames": ["spiffe://a/ns/b/sa/c"]},
        "retryBudget": {"percent": 25, "minRetryConcurrency": 5},
    }))
    .expect("valid");
    let Balancer::Hash { key, table } = &policy.balancer else { panic!("{:?}", policy.balancer) };
    assert_eq!(*key, HashKey::Cookie { name: "c".into(), ttl: Some(Duration::ZERO), attributes: "; Path=/p".into() });
    assert_eq!(*table, HashTable::Maglev { size: 101 });
    assert_eq!((policy.tcp.max_connections, policy.tcp.connect_timeout), (None, Some(Duration::from_millis(250))), "zero is no limit");
    assert_eq!((policy.http.max_retries, policy.http.upgrade, policy.http.max_streams), (Some(3), Upgrade::Always, Some(7)));
    let outlier = policy.outlier.expect("outlier");
    assert_eq!((outlier.consecutive_5xx, outlier.consecutive_gateway, outlier.consecutive_local, outlier.split_local), (7, 2, 4, true));
    assert_eq!(policy.retry_budget.expect("budget").minimum, 5);
    assert_eq!(policy.names.iter().map(|name| &**name).collect::<Vec<_>>(), ["spiffe://a/ns/b/sa/c"]);
    assert_eq!(super::super::super::route::traffic::TrafficPolicy::default(), self::policy(&json!({})).expect("valid"));
}

#[test]
fn subsets_and_ports_override_block_by_block() {
    let rule = read(&json!({
        "host": "a",
        "trafficPolicy": {
            "loadBalancer": {"simple": "RANDOM"}, "connectionPool": {"tcp": {"maxConnections": 5}},
            "portLevelSettings": [{"port": {"number": 81}, "loadBalancer": {"simple": "ROUND_ROBIN"}}],
        },
        "subsets": [
            {"name": "v1", "labels": {"version": "v1"}, "trafficPolicy": {"loadBalancer": {"simple": "ROUND_ROBIN"}}},
            {"name": "v2", "labels": {"version": "v2"}, "trafficPolicy": {"connectionPool": {"tcp": {"maxConnections": 7}},
                "portLevelSettings": [{"port": {"number": 82}, "loadBalancer": {"simple": "RANDOM"}}]}},
        ],
    }))
    .expect("valid");
    let effective = |subset: Option<&Layered>, port| {
        let policy = Layered::effective(rule.policy.as_ref(), subset, port);
        (policy.balancer, policy.tcp.max_connections)
    };
    assert_eq!(effective(None, 80), (Balancer::Random, Some(5)));
    assert_eq!(effective(Some(&rule.subsets[0].policy), 80), (Balancer::RoundRobin, Some(5)), "the subset's balancer, the host's pool");
    assert_eq!(effective(None, 81), (Balancer::RoundRobin, None), "a port's settings inherit nothing");
    let second = Some(&rule.subsets[1].policy);
    assert_eq!(effective(second, 81), (Balancer::RoundRobin, Some(7)), "the subset's pool, over the host's settings of the port");
    assert_eq!(effective(second, 82), (Balancer::Random, None), "the subset's settings of the port alone");
    let mut budgeted = rule.subsets[1].policy.clone();
    budgeted.blocks = super::policy::layered(serde_json::from_value(json!({"retryBudget": {"percent": 10}})).expect("a policy"), "spec")
        .expect("valid")
        .blocks;
    assert!(Layered::effective(None, Some(&budgeted), 82).retry_budget.is_some(), "a budget is of no port");
}

#[test]
fn mistakes_are_named_with_their_field() {
    for (spec, expected) in [
        (json!({}), "spec.host"),
        (json!({"host": "a", "subsets": [{"name": "x"}, {"name": "x"}]}), "spec.subsets[1].name"),
        (json!({"host": "a", "trafficPolicy": {"tls": {"mode": "SIMPLE"}}}), "spec.trafficPolicy.tls.mode"),
        (json!({"host": "a", "trafficPolicy": {"loadBalancer": {"simple": "X"}}}), "spec.trafficPolicy.loadBalancer.simple"),
        (json!({"host": "a", "trafficPolicy": {"loadBalancer": {"consistentHash": {}}}}), "needs exactly one of"),
        (
            json!({"host": "a", "trafficPolicy": {"loadBalancer": {"consistentHash": {"useSourceIp": true, "maglev": {"tableSize": 100}}}}}),
            "maglev.tableSize",
        ),
        (json!({"host": "a", "trafficPolicy": {"connectionPool": {"tcp": {"maxConnections": -1}}}}), "connectionPool.tcp.maxConnections"),
        (json!({"host": "a", "trafficPolicy": {"connectionPool": {"tcp": {"connectTimeout": "0s"}}}}), "connectionPool.tcp.connectTimeout"),
        (json!({"host": "a", "trafficPolicy": {"outlierDetection": {"maxEjectionPercent": 101}}}), "outlierDetection.maxEjectionPercent"),
        (json!({"host": "a", "trafficPolicy": {"portLevelSettings": [{"loadBalancer": {}}]}}), "portLevelSettings[0].port"),
        (json!({"host": "a", "trafficPolicy": {"tunnel": {}}}), "spec.trafficPolicy.tunnel"),
        (json!({"host": "a", "workloadSelector": {"labels": {"a": "b"}}}), "workloadSelector"),
        (json!({"host": "a", "subsets": [{"name": "v", "trafficPolicy": {"outlierDetection": {"interval": "x"}}}]}), "interval"),
        (json!({"host": "a", "typo": 1}), "typo"),
    ] {
        let problem = read(&spec).expect_err(&spec.to_string());
        assert!(problem.contains(expected) && problem.contains("DestinationRule default/d"), "{spec}: {problem}");
    }
}

/// As istiod reads them: tools that write out what has no value write noughts.
#[test]
fn a_nought_that_is_no_number_of_istio_s_is_not_said() {
    let read = |policy_of: Value| policy(&policy_of).expect("valid");
    let outlier = |spec: Value| read(json!({"outlierDetection": spec})).outlier.expect("there");
    let noughts = json!({"splitExternalLocalOriginErrors": true, "consecutiveLocalOriginFailures": 0, "maxEjectionPercent": 0, "consecutive5xxErrors": 0, "minHealthPercent": 0});
    let expected = Outlier { split_local: true, consecutive_5xx: 0, min_health_percent: 0, ..Outlier::default() };
    assert_eq!(outlier(noughts), expected, "those that mean that it is switched off are kept");
    let budget = read(json!({"retryBudget": {"percent": {"value": 20}, "minRetryConcurrency": 0}}));
    assert_eq!(budget, read(json!({"retryBudget": {"percent": {"value": 20}}})));
    let hash = |table: Value| json!({"loadBalancer": {"consistentHash": {"httpHeaderName": "x", "maglev": table}}});
    assert_eq!(read(hash(json!({"tableSize": 0}))), read(hash(json!({}))));
}
