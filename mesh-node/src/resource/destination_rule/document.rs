//! The fields of a `DestinationRule` as they are written.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::resource::{
    fields::{Percent, Time},
    selector::{Labels, WorkloadSelector},
};

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Spec {
    pub host: String,
    pub traffic_policy: Option<TrafficPolicy>,
    pub subsets: Vec<Subset>,
    pub export_to: Vec<String>,
    pub workload_selector: Option<WorkloadSelector>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Subset {
    pub name: String,
    pub labels: Labels,
    pub traffic_policy: Option<TrafficPolicy>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TrafficPolicy {
    pub load_balancer: Option<LoadBalancer>,
    pub connection_pool: Option<ConnectionPool>,
    pub outlier_detection: Option<Outlier>,
    pub tls: Option<Tls>,
    pub port_level_settings: Vec<PortPolicy>,
    pub tunnel: Option<serde_json::Value>,
    pub proxy_protocol: Option<serde_json::Value>,
    pub retry_budget: Option<RetryBudget>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PortPolicy {
    pub port: Option<Port>,
    pub load_balancer: Option<LoadBalancer>,
    pub connection_pool: Option<ConnectionPool>,
    pub outlier_detection: Option<Outlier>,
    pub tls: Option<Tls>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    pub number: u32,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoadBalancer {
    pub simple: Option<String>,
    pub consistent_hash: Option<ConsistentHash>,
    pub locality_lb_setting: Option<Locality>,
    pub warmup_duration_secs: Option<Time>,
    pub warmup: Option<Warmup>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Warmup {
    pub duration: Time,
    #[serde(default)]
    pub minimum_percent: Option<f64>,
    #[serde(default)]
    pub aggression: Option<f64>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ConsistentHash {
    pub http_header_name: Option<String>,
    pub http_cookie: Option<Cookie>,
    pub use_source_ip: Option<bool>,
    pub http_query_parameter_name: Option<String>,
    pub ring_hash: Option<RingHash>,
    pub maglev: Option<Maglev>,
    pub minimum_ring_size: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cookie {
    pub name: String,
    #[serde(default)]
    pub path: Option<String>,
    #[serde(default)]
    pub ttl: Option<Time>,
    #[serde(default)]
    pub attributes: Vec<CookieAttribute>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CookieAttribute {
    pub name: String,
    #[serde(default)]
    pub value: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RingHash {
    pub minimum_ring_size: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Maglev {
    pub table_size: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Locality {
    pub distribute: Vec<Distribute>,
    pub failover: Vec<Failover>,
    pub failover_priority: Vec<String>,
    pub enabled: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Distribute {
    pub from: String,
    pub to: BTreeMap<String, u32>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Failover {
    pub from: String,
    pub to: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct ConnectionPool {
    pub tcp: Option<Tcp>,
    pub http: Option<Http>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Tcp {
    pub max_connections: Option<i64>,
    pub connect_timeout: Option<Time>,
    pub tcp_keepalive: Option<Keepalive>,
    pub max_connection_duration: Option<Time>,
    pub idle_timeout: Option<Time>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Keepalive {
    pub probes: Option<u32>,
    pub time: Option<Time>,
    pub interval: Option<Time>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Http {
    pub http1_max_pending_requests: Option<i64>,
    pub http2_max_requests: Option<i64>,
    pub max_requests_per_connection: Option<i64>,
    pub max_retries: Option<i64>,
    pub idle_timeout: Option<Time>,
    pub h2_upgrade_policy: Option<String>,
    pub use_client_protocol: Option<bool>,
    pub max_concurrent_streams: Option<i64>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Outlier {
    pub consecutive_errors: Option<i64>,
    #[serde(rename = "consecutive5xxErrors")]
    pub consecutive_5xx_errors: Option<u32>,
    pub consecutive_gateway_errors: Option<u32>,
    pub split_external_local_origin_errors: Option<bool>,
    pub consecutive_local_origin_failures: Option<u32>,
    pub interval: Option<Time>,
    pub base_ejection_time: Option<Time>,
    pub max_ejection_percent: Option<i64>,
    pub min_health_percent: Option<i64>,
}

impl Spec {
    /// The first field that asks for plaintext.
    pub fn plaintext(&self) -> Option<String> {
        let off = |tls: &Option<Tls>| tls.as_ref().is_some_and(|tls| tls.mode.as_deref() == Some("DISABLE"));
        let within = |policy: &TrafficPolicy, at: &str| {
            let ports = || policy.port_level_settings.iter().position(|settings| off(&settings.tls));
            let whole = off(&policy.tls).then(|| format!("{at}.tls.mode"));
            whole.or_else(|| ports().map(|i| format!("{at}.portLevelSettings[{i}].tls.mode")))
        };
        let of_subsets = || {
            let mut subsets = self.subsets.iter().enumerate();
            subsets.find_map(|(i, subset)| within(subset.traffic_policy.as_ref()?, &format!("spec.subsets[{i}].trafficPolicy")))
        };
        self.traffic_policy.as_ref().and_then(|policy| within(policy, "spec.trafficPolicy")).or_else(of_subsets)
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Tls {
    pub mode: Option<String>,
    pub subject_alt_names: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RetryBudget {
    pub percent: Option<Share>,
    pub min_retry_concurrency: Option<u32>,
}

/// A bare number, or `{value: number}`.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Share {
    Number(f64),
    Value(Percent),
}

impl Share {
    pub fn value(&self) -> f64 {
        match self {
            Self::Number(n) => *n,
            Self::Value(p) => p.value,
        }
    }
}
