//! How `MeshConfig` may be written, and what of it is not acted on. Istio reads it as the JSON of a protobuf message: fields have two names
//! (`extensionProviders`, `extension_providers`), and whole numbers may be texts.

use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::Value;

/// Fields whose own fields are names that somebody chose, and not fields of messages.
const MAPS: [&str; 6] = ["includeAdditionalHeadersInCheck", "labels", "proxyMetadata", "customTags", "matchLabels", "runtimeValues"];

/// The same with the names of fields as they are in JSON.
pub fn normalised(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let one = |(name, value): (&String, &Value)| {
                let name = camel(name);
                let value = if MAPS.contains(&&*name) { value.clone() } else { normalised(value) };
                (name, value)
            };
            Value::Object(fields.iter().map(one).collect())
        }
        Value::Array(items) => items.iter().map(normalised).collect(),
        other => other.clone(),
    }
}

fn camel(name: &str) -> String {
    let mut words = name.split('_');
    let mut camel = words.next().unwrap_or_default().to_owned();
    for word in words {
        let mut letters = word.chars();
        camel.extend(letters.next().map(|first| first.to_ascii_uppercase()));
        camel.push_str(letters.as_str());
    }
    camel
}

/// A whole number, as one or as a text.
pub fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(f64),
        Text(String),
    }
    let said = match Either::deserialize(deserializer).map_err(|_| D::Error::custom("is not a number"))? {
        Either::Number(number) => number,
        Either::Text(text) => text.trim().parse().map_err(|_| D::Error::custom(format!("{text:?} is not a number")))?,
    };
    if said.fract().abs() > 0.0 || !(0.0..=f64::from(u32::MAX)).contains(&said) {
        return Err(D::Error::custom(format!("{said} is not a whole number from 0 to {}", u32::MAX)));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    Ok(said as u32)
}

/// Fields that are acted on, or that are for other programs than the data plane, or for how they find each other.
const HONOURED_OR_OTHERS: [&str; 47] = [
    "accessLogEncoding",
    "accessLogFile",
    "accessLogFormat",
    "caCertificates",
    "certificates",
    "configSources",
    "connectTimeout",
    "defaultConfig",
    "defaultDestinationRuleExportTo",
    "defaultHttpRetryPolicy",
    "defaultProviders",
    "defaultVirtualServiceExportTo",
    "disableEnvoyListenerLog",
    "dnsRefreshRate",
    "enableAutoMtls",
    "enableEnvoyAccessLogService",
    "enablePrometheusMerge",
    "enableTracing",
    "extensionProviders",
    "inboundClusterStatName",
    "inboundTrafficPolicy",
    "ingressClass",
    "ingressControllerMode",
    "ingressSelector",
    "ingressService",
    "localityLbSetting",
    "mixerAddress",
    "outboundClusterStatName",
    "outboundTrafficPolicy",
    "pathNormalization",
    "proxyHttpPort",
    "proxyInboundListenPort",
    "proxyListenPort",
    "reportBatchMaxEntries",
    "reportBatchMaxTime",
    "sdsRefreshDelay",
    "sdsUdsPath",
    "serviceScopeConfigs",
    "statNameLength",
    "statsConfigs",
    "tcpKeepalive",
    "thriftConfig",
    "trustDomainAliases",
    "verifyCertificateAtClient",
    "xdsUdsPath",
    "ca",
    "authPolicy",
];

/// Fields that would change what a node does, and do not; and what to do instead.
const NOT_HONOURED: [(&str, &str); 9] = [
    (
        "h2UpgradePolicy",
        "between nodes it is HTTP/2 anyway; an application that speaks it is named in a DestinationRule (connectionPool.http.h2UpgradePolicy)",
    ),
    ("defaultServiceExportTo", "say exportTo in each object"),
    ("protocolDetectionTimeout", "declare the protocol of ports by their names or appProtocol"),
    ("discoverySelectors", "objects of all namespaces count"),
    ("serviceSettings", "nothing is cluster-local"),
    ("meshMTLS", "the versions and ciphers of the mesh's TLS are fixed"),
    ("meshMtls", "the versions and ciphers of the mesh's TLS are fixed"),
    ("tlsDefaults", "TLS to destinations outside the mesh is the application's"),
    ("gatewayTopology", "start mesh-node with --trusted-proxy"),
];

/// Fields of `proxyHeaders` that are acted on, or ask for what is not done anyway.
const HONOURED_HEADERS: [&str; 5] = ["forwardedClientCert", "attemptCount", "requestId", "envoyDebugHeaders", "metadataExchangeHeaders"];

/// Fields of `defaultConfig.tracing` that are acted on.
const HONOURED_OF_TRACING: [&str; 3] = ["sampling", "customTags", "maxPathTagLength"];
/// Fields of an `opentelemetry` provider that are taken and not acted on.
const UNHONOURED_OF_OTLP: [&str; 3] = ["resourceDetectors", "serviceAttributeEnrichment", "dynatraceSampler"];
/// A mode of Istio's sidecars.
pub const DYNAMIC_DNS: &str = "ALLOW_ANY_DYNAMIC_DNS";

/// What of the message is not acted on, in the words of a remark.
pub fn remarks(mesh: &Value) -> Vec<String> {
    let mut remarks = Vec::new();
    for (name, value) in mesh.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        if let Some((_, instead)) = NOT_HONOURED.iter().find(|(field, _)| field == name) {
            remarks.push(format!("data.mesh.{name}: is not honoured by this version of mesh-node; {instead}"));
        } else if name != "trustDomain" && name != "rootNamespace" && !HONOURED_OR_OTHERS.contains(&&**name) {
            remarks.push(format!("data.mesh.{name}: is no field that is known here, and nothing is done about it; correct or remove it"));
        }
        let flags = [("trustDomain", "--trust-domain"), ("rootNamespace", "--root-namespace")];
        let default = [("trustDomain", "cluster.local"), ("rootNamespace", "istio-system")];
        if let Some((_, flag)) = flags.iter().find(|(field, _)| field == name)
            && default.iter().all(|(field, usual)| field != name || value != usual)
        {
            remarks.push(format!("data.mesh.{name}: is said by mesh-node's own {flag}, which has to say the same"));
        }
    }
    let proxy = mesh.pointer("/defaultConfig/proxyHeaders").and_then(Value::as_object);
    for name in proxy.into_iter().flatten().map(|(name, _)| name).filter(|name| !HONOURED_HEADERS.contains(&&***name)) {
        remarks.push(format!(
            "data.mesh.defaultConfig.proxyHeaders.{name}: is not honoured by this version of mesh-node; remove headers in a VirtualService"
        ));
    }
    remarks.extend(mesh.pointer("/defaultConfig/gatewayTopology").map(|_| {
        "data.mesh.defaultConfig.gatewayTopology: is not honoured by this version of mesh-node; start it with --trusted-proxy".to_owned()
    }));
    let tracing = mesh.pointer("/defaultConfig/tracing").and_then(Value::as_object);
    for name in tracing.into_iter().flatten().map(|(name, _)| name).filter(|name| !HONOURED_OF_TRACING.contains(&&***name)) {
        remarks.push(format!(
            "data.mesh.defaultConfig.tracing.{name}: is not honoured by this version of mesh-node; say it in a Telemetry, or of a provider"
        ));
    }
    let providers = mesh.get("extensionProviders").and_then(Value::as_array);
    for (i, provider) in providers.into_iter().flatten().enumerate() {
        for name in UNHONOURED_OF_OTLP.into_iter().filter(|name| provider.pointer(&format!("/opentelemetry/{name}")).is_some()) {
            remarks.push(format!(
                "data.mesh.extensionProviders[{i}].opentelemetry.{name}: is not honoured by this version of mesh-node; spans are sent without it"
            ));
        }
    }
    if mesh.pointer("/outboundTrafficPolicy/mode").is_some_and(|mode| mode == DYNAMIC_DNS) {
        remarks.push(format!("data.mesh.outboundTrafficPolicy.mode: {DYNAMIC_DNS} is ALLOW_ANY here: who connects has looked names up"));
    }
    remarks
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_have_two_names_and_names_in_maps_stay() {
        let written = json!({"extension_providers": [{"name": "a_b", "envoy_ext_authz_http": {"include_additional_headers_in_check": {"x_y": "a_b"}}}]});
        let read =
            json!({"extensionProviders": [{"name": "a_b", "envoyExtAuthzHttp": {"includeAdditionalHeadersInCheck": {"x_y": "a_b"}}}]});
        assert_eq!((normalised(&written), normalised(&read)), (read.clone(), read));
    }

    #[test]
    fn numbers_may_be_texts() {
        #[derive(Deserialize)]
        struct Port {
            #[serde(deserialize_with = "number")]
            port: u32,
        }
        let read = |port: Value| serde_json::from_value::<Port>(json!({"port": port})).map(|p| p.port).ok();
        let cases = [json!(9000), json!("9000"), json!(9000.0), json!(-1), json!("x"), json!(1.5), json!("4294967296"), json!(true)];
        assert_eq!(cases.map(read), [Some(9000), Some(9000), Some(9000), None, None, None, None, None]);
    }

    #[test]
    fn what_is_not_acted_on_is_told() {
        let told = |mesh: Value| remarks(&mesh).iter().filter_map(|r| r.split(": ").next().map(str::to_owned)).collect::<Vec<_>>();
        assert_eq!(
            told(
                json!({"outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"}, "trustDomain": "cluster.local", "rootNamespace": "istio-system",
            "defaultConfig": {"discoveryAddress": "istiod", "proxyHeaders": {"forwardedClientCert": "SANITIZE"}}, "connectTimeout": null})
            ),
            Vec::<String>::new()
        );
        assert_eq!(
            told(
                json!({"discoverySelectors": [], "notAField": 1, "trustDomain": "td", "defaultConfig": {"proxyHeaders": {"server": {"disabled": true}}}})
            ),
            ["data.mesh.discoverySelectors", "data.mesh.notAField", "data.mesh.trustDomain", "data.mesh.defaultConfig.proxyHeaders.server"]
        );
        assert_eq!(
            told(
                json!({"outboundTrafficPolicy": {"mode": DYNAMIC_DNS}, "defaultConfig": {"tracing": {"sampling": 1.0, "maxPathTagLength": 8, "zipkin": {}}},
                "extensionProviders": [{"name": "o", "opentelemetry": {"service": "o", "port": 1, "serviceAttributeEnrichment": "X"}}]})
            ),
            [
                "data.mesh.defaultConfig.tracing.zipkin",
                "data.mesh.extensionProviders[0].opentelemetry.serviceAttributeEnrichment",
                "data.mesh.outboundTrafficPolicy.mode"
            ]
        );
    }
}
