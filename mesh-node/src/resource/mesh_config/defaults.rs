//! What `MeshConfig` says for objects that say nothing themselves: of connections and places (`DestinationRule`), of who sees an
//! object (`exportTo`), and which headers the proxy adds. Semantics of Istio's `MeshConfig` and `ProxyConfig.ProxyHeaders`.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    id::TrustDomain,
    resource::{
        destination_rule::defaults::{KeepaliveSpec, LocalitySpec, keepalive, locality},
        envelope::FieldError,
        fields::{Time, positive},
    },
    route::traffic::TrafficDefaults,
};

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Defaults {
    pub traffic: TrafficDefaults,
    /// Who sees a `VirtualService` that does not say so.
    pub virtual_services: Vec<Arc<str>>,
    pub destination_rules: Vec<Arc<str>>,
    pub headers: AddedHeaders,
}

/// Headers the proxy adds to requests and answers by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddedHeaders {
    /// `x-envoy-attempt-count`.
    pub attempt_count: bool,
    /// `x-request-id`.
    pub request_id: bool,
    /// `x-envoy-upstream-service-time`, `x-envoy-expected-rq-timeout-ms`, `x-envoy-original-path` and `x-envoy-overloaded`.
    pub debug: bool,
}

impl Default for AddedHeaders {
    fn default() -> Self {
        Self { attempt_count: true, request_id: true, debug: true }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Document {
    connect_timeout: Option<Value>,
    tcp_keepalive: Option<Value>,
    locality_lb_setting: Option<Value>,
    default_virtual_service_export_to: Option<Value>,
    default_destination_rule_export_to: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Headers {
    attempt_count: Option<Switch>,
    request_id: Option<Switch>,
    envoy_debug_headers: Option<Switch>,
}

#[derive(Deserialize)]
struct Switch {
    #[serde(default)]
    disabled: bool,
}

/// Reads them. A field that cannot be read is as if it were absent, and told of.
pub(super) fn read(mesh: &Value, problems: &mut Vec<String>) -> Defaults {
    let document = Document::deserialize(mesh).unwrap_or_default();
    let mut defaults = Defaults::default();
    let mut told = |error: FieldError| problems.push(format!("{}: {}; it is as if it were not there", error.field, error.problem));
    macro_rules! take {
        ($field:ident, $name:literal, $into:expr, $read:expr) => {
            if let Some(value) = document.$field {
                let at = concat!("data.mesh.", $name);
                match typed(value, at).and_then(|spec| $read(spec, at)) {
                    Ok(value) => $into = value,
                    Err(error) => told(error),
                }
            }
        };
    }
    take!(connect_timeout, "connectTimeout", defaults.traffic.connect_timeout, |time: Time, at| positive(time, at).map(Some));
    take!(tcp_keepalive, "tcpKeepalive", defaults.traffic.keepalive, |spec: KeepaliveSpec, _| Ok(Some(keepalive(&spec))));
    take!(locality_lb_setting, "localityLbSetting", defaults.traffic.locality, |spec: LocalitySpec, at| locality(&spec, at).map(Some));
    take!(default_virtual_service_export_to, "defaultVirtualServiceExportTo", defaults.virtual_services, names);
    take!(default_destination_rule_export_to, "defaultDestinationRuleExportTo", defaults.destination_rules, names);
    if let Some(value) = mesh.pointer("/defaultConfig/proxyHeaders").filter(|value| !value.is_null()) {
        match typed::<Headers>(value.clone(), "data.mesh.defaultConfig.proxyHeaders") {
            Ok(headers) => {
                let on = |switch: Option<Switch>| !switch.is_some_and(|switch| switch.disabled);
                defaults.headers = AddedHeaders {
                    attempt_count: on(headers.attempt_count),
                    request_id: on(headers.request_id),
                    debug: on(headers.envoy_debug_headers),
                };
            }
            Err(error) => told(error),
        }
    }
    defaults
}

#[expect(clippy::unnecessary_wraps, reason = "as all that reads a field")]
fn names(names: Vec<String>, _at: &str) -> Result<Vec<Arc<str>>, FieldError> {
    Ok(names.into_iter().map(Arc::from).collect())
}

fn typed<T: serde::de::DeserializeOwned>(value: Value, at: &str) -> Result<T, FieldError> {
    serde_json::from_value(value).map_err(|error| FieldError::new(at, format!("{error}; correct or remove it")))
}

/// Most names of the trust domain.
const MOST_ALIASES: usize = 100;

/// One that cannot be a trust domain's name is as if it were absent, and told of.
pub(super) fn aliases(mesh: &Value, problems: &mut Vec<String>) -> Vec<TrustDomain> {
    let listed = match mesh.get("trustDomainAliases") {
        None | Some(Value::Null) => return Vec::new(),
        Some(Value::Array(listed)) => listed,
        Some(other) => {
            problems.push(format!("data.mesh.trustDomainAliases: {other} is no list of names; it is as if it were not there"));
            return Vec::new();
        }
    };
    if listed.len() > MOST_ALIASES {
        problems.push(format!("data.mesh.trustDomainAliases: has {} names, of which the first {MOST_ALIASES} count", listed.len()));
    }
    let named = listed.iter().take(MOST_ALIASES).enumerate().map(|(i, name)| {
        let text = name.as_str().ok_or_else(|| format!("{name} is no text"));
        text.and_then(|text| TrustDomain::parse(text).map_err(|e| e.to_string())).map_err(|e| (i, e))
    });
    let mut told = |(i, error): (usize, String)| {
        problems.push(format!("data.mesh.trustDomainAliases[{i}]: {error}; it is as if it were not there"));
    };
    named.filter_map(|name| name.map_err(&mut told).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_holds_for_all_is_read_and_mistakes_take_nothing_with_them() {
        let mut problems = Vec::new();
        let read = read(
            &json!({
                "connectTimeout": "3s", "tcpKeepalive": {"time": "60s", "probes": 2},
                "localityLbSetting": {"failover": [{"from": "a", "to": "b"}]}, "defaultVirtualServiceExportTo": ["."],
                "defaultDestinationRuleExportTo": ["shop", "."],
                "defaultConfig": {"proxyHeaders": {"attemptCount": {"disabled": true}, "requestId": {"disabled": false},
                    "envoyDebugHeaders": {"disabled": true}, "forwardedClientCert": "SANITIZE"}},
            }),
            &mut problems,
        );
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(read.traffic.connect_timeout, Some(Duration::from_secs(3)));
        assert_eq!(read.traffic.keepalive.map(|k| (k.time, k.probes)), Some((Some(Duration::from_mins(1)), Some(2))));
        assert!(read.traffic.locality.as_ref().is_some_and(|l| l.given && l.failover.len() == 1), "{read:?}");
        assert_eq!((read.virtual_services.len(), read.destination_rules.len()), (1, 2));
        assert_eq!(read.headers, AddedHeaders { attempt_count: false, request_id: true, debug: false });
        let wrong = json!({"connectTimeout": "0s", "tcpKeepalive": {"tim": "1s"}, "localityLbSetting": {"distribute": [{"from": "a", "to": {"b": 1}}]},
            "defaultVirtualServiceExportTo": ".", "defaultConfig": {"proxyHeaders": {"requestId": true}}, "defaultDestinationRuleExportTo": ["*"]});
        let read = super::read(&wrong, &mut problems);
        assert_eq!(read, Defaults { destination_rules: vec!["*".into()], ..Defaults::default() });
        let fields = problems.iter().filter_map(|p| p.split(": ").next()).collect::<Vec<_>>();
        assert_eq!(
            fields,
            [
                "data.mesh.connectTimeout",
                "data.mesh.tcpKeepalive",
                "data.mesh.localityLbSetting.distribute[0].to",
                "data.mesh.defaultVirtualServiceExportTo",
                "data.mesh.defaultConfig.proxyHeaders"
            ]
        );
        assert_eq!(super::read(&json!({}), &mut Vec::new()), Defaults::default());
    }
}
