//! Where metrics, access logs and spans go: the providers of `MeshConfig` that are for telemetry, and which of them are the default.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::HeaderName;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    report::{AccessLog, Exporter, HeaderText, SpanTag, format::Format, span},
    resource::{
        envelope::FieldError,
        fields::{Time, header_name, header_value, port},
        telemetry::{CustomTag, span_tags},
    },
};

/// Names of the providers that are there without being configured.
pub const PROMETHEUS: &str = "prometheus";
pub const ENVOY: &str = "envoy";

/// Telemetry of the mesh.
#[derive(Debug, Clone, PartialEq)]
pub struct Observability {
    /// Access logs by provider, with the built-in `envoy`.
    pub logs: Vec<Arc<AccessLog>>,
    pub exporters: Vec<Arc<Exporter>>,
    /// Providers that are this node's metrics.
    pub prometheus: Vec<Arc<str>>,
    /// Providers of kinds that are not honoured.
    pub others: Vec<Arc<str>>,
    /// Where everything is logged that no `Telemetry` says something about: `accessLogFile`.
    pub everywhere: Option<Arc<AccessLog>>,
    pub default_logs: Vec<Arc<str>>,
    pub default_traces: Vec<Arc<str>>,
    pub default_metrics: Vec<Arc<str>>,
    /// Of a million requests: `defaultConfig.tracing.sampling`.
    pub sampling: Option<u32>,
    /// Told of where no `Telemetry` says what is: `defaultConfig.tracing.customTags`.
    pub tags: Vec<(Arc<str>, SpanTag)>,
}

impl Default for Observability {
    fn default() -> Self {
        Self {
            logs: vec![Arc::new(AccessLog { name: ENVOY.into(), path: STDOUT.into(), format: Format::default() })],
            exporters: Vec::new(),
            prometheus: vec![PROMETHEUS.into()],
            others: Vec::new(),
            everywhere: None,
            default_logs: Vec::new(),
            default_traces: Vec::new(),
            default_metrics: Vec::new(),
            sampling: None,
            tags: Vec::new(),
        }
    }
}

const STDOUT: &str = "/dev/stdout";
/// A longer `maxTagLength` is as good as this.
const MOST_TAG_LENGTH: usize = 4096;
/// How long a collector's answer may take, unless the provider says otherwise.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    access_log_file: Option<String>,
    access_log_format: Option<String>,
    access_log_encoding: Option<String>,
    default_providers: Option<Defaults>,
    default_config: Option<ProxyConfig>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Defaults {
    #[serde(default)]
    access_logging: Option<Vec<String>>,
    #[serde(default)]
    tracing: Option<Vec<String>>,
    #[serde(default)]
    metrics: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct ProxyConfig {
    tracing: Option<ProxyTracing>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProxyTracing {
    sampling: Option<f64>,
    max_path_tag_length: Option<u32>,
    custom_tags: Option<BTreeMap<String, CustomTag>>,
}

/// The part of a provider that is for telemetry.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProviderSpec {
    #[serde(default)]
    name: String,
    envoy_file_access_log: Option<FileLog>,
    opentelemetry: Option<OpenTelemetry>,
    prometheus: Option<Value>,
    zipkin: Option<Value>,
    lightstep: Option<Value>,
    datadog: Option<Value>,
    skywalking: Option<Value>,
    opencensus: Option<Value>,
    stackdriver: Option<Value>,
    envoy_http_als: Option<Value>,
    envoy_tcp_als: Option<Value>,
    envoy_otel_als: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileLog {
    path: Option<String>,
    log_format: Option<LogFormat>,
    omit_empty_values: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LogFormat {
    text: Option<String>,
    labels: Option<BTreeMap<String, Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct OpenTelemetry {
    #[serde(default)]
    service: String,
    #[serde(default, deserialize_with = "super::spelling::number")]
    port: u32,
    http: Option<OtlpHttp>,
    grpc: Option<OtlpGrpc>,
    max_tag_length: Option<u32>,
    // Told of with what else is not acted on.
    #[serde(rename = "resourceDetectors")]
    _resource_detectors: Option<Value>,
    #[serde(rename = "serviceAttributeEnrichment")]
    _service_attribute_enrichment: Option<Value>,
    #[serde(rename = "dynatraceSampler")]
    _dynatrace_sampler: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OtlpHttp {
    path: Option<String>,
    timeout: Option<Time>,
    #[serde(default)]
    headers: Option<Vec<HttpHeader>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct OtlpGrpc {
    timeout: Option<Time>,
    initial_metadata: Option<Vec<HttpHeader>>,
}

/// With its value, or the variable of the node's environment that has it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HttpHeader {
    name: String,
    #[serde(default)]
    value: String,
    env_name: Option<String>,
}

/// Reads what the configuration says of telemetry, and what is wrong with it: each costs only itself.
pub(super) fn read(document: Document, providers: &[(String, Value)]) -> (Observability, Vec<String>) {
    let mut found = Observability { logs: Vec::new(), ..Observability::default() };
    let mut problems = Vec::new();
    let mut wrong = |error: FieldError, instead: &str| problems.push(format!("{}: {}; {instead}", error.field, error.problem));
    let format = mesh_format(document.access_log_format.as_deref(), document.access_log_encoding.as_deref());
    let format = format.unwrap_or_else(|error| {
        wrong(error, "the mesh's log has Istio's format");
        Format::default()
    });
    let tracing = document.default_config.and_then(|c| c.tracing);
    let (sampling, longest, tags) = tracing.map_or((None, None, None), |t| (t.sampling, t.max_path_tag_length, t.custom_tags));
    for (at, all) in providers {
        if let Err(error) = super::part(all, at).and_then(|spec| provider(spec, at, (&format, longest), &mut found)) {
            wrong(error, "the provider is left out");
        }
    }
    let file = document.access_log_file.filter(|f| !f.is_empty());
    let file = file.map(|file| log_path(file, "data.mesh.accessLogFile")).transpose().unwrap_or_else(|error| {
        wrong(error, "the mesh has no log of its own");
        None
    });
    let own = |path: Arc<str>| Arc::new(AccessLog { name: ENVOY.into(), path, format: format.clone() });
    if !found.logs.iter().any(|l| &*l.name == ENVOY) {
        found.logs.push(own(STDOUT.into()));
    }
    found.everywhere = file.map(own);
    let defaults = document.default_providers.unwrap_or_default();
    let names = |all: Option<Vec<String>>| all.unwrap_or_default().into_iter().map(Into::into).collect();
    found.default_logs = names(defaults.access_logging);
    found.default_traces = names(defaults.tracing);
    found.default_metrics = names(defaults.metrics);
    match tags.map(|tags| span_tags(tags, "data.mesh.defaultConfig.tracing.customTags")) {
        Some(Ok(tags)) => found.tags = tags,
        Some(Err(error)) => wrong(error, "spans have none of these tags"),
        None => {}
    }
    match sampling {
        Some(percent) if (0.0..=100.0).contains(&percent) => {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a million")]
            let sampling = (percent * 10_000.0).round() as u32;
            found.sampling = Some(sampling);
        }
        Some(percent) => {
            let problem = format!("{percent} is not a percentage; use 0 to 100");
            wrong(FieldError::new("data.mesh.defaultConfig.tracing.sampling", problem), "the default is used");
        }
        None => {}
    }
    for log in &found.logs {
        let nothing = log.format.knows_nothing_of();
        if !nothing.is_empty() {
            let names = nothing.join(", ");
            problems.push(format!("the format of access log {:?}: nothing is known here of {names}; they are always -", log.name));
        }
    }
    (found, problems)
}

/// The format of the mesh's own log.
fn mesh_format(format: Option<&str>, encoding: Option<&str>) -> Result<Format, FieldError> {
    let at = "data.mesh.accessLogFormat";
    let format = format.filter(|f| !f.is_empty());
    match (encoding.unwrap_or("TEXT"), format) {
        ("TEXT", None) => Ok(Format::default()),
        ("TEXT", Some(format)) => Format::text(format).map_err(|e| FieldError::new(at, e)),
        ("JSON", None) => Ok(Format::default_json()),
        ("JSON", Some(format)) => {
            let fields: BTreeMap<String, Value> =
                serde_json::from_str(format).map_err(|e| FieldError::new(at, format!("is not a JSON object of formats: {e}")))?;
            Format::structured(&fields).map_err(|e| FieldError::new(at, e))
        }
        (other, _) => Err(FieldError::new("data.mesh.accessLogEncoding", format!("{other:?} is neither TEXT nor JSON"))),
    }
}

fn log_path(path: String, at: &str) -> Result<Arc<str>, FieldError> {
    if !path.starts_with('/') {
        return Err(FieldError::new(at, format!("{path:?} is not an absolute path")));
    }
    Ok(path.into())
}

/// `own` is the format of the mesh's own log, `longest` what is told of a path where the provider does not say.
fn provider(spec: ProviderSpec, at: &str, (own, longest): (&Format, Option<u32>), found: &mut Observability) -> Result<(), FieldError> {
    let name: Arc<str> = spec.name.into();
    let named = |field: &str| {
        if name.is_empty() {
            return Err(FieldError::new(format!("{at}.name"), format!("is missing; Telemetry refers to the provider of {field} by name")));
        }
        Ok(name.clone())
    };
    if let Some(log) = spec.envoy_file_access_log {
        let at = format!("{at}.envoyFileAccessLog");
        let path = log_path(log.path.unwrap_or_else(|| STDOUT.to_owned()), &format!("{at}.path"))?;
        let omit = log.omit_empty_values.unwrap_or(false);
        let format = match log.log_format {
            None if *name == *ENVOY && !omit => own.clone(),
            None => Format::default(),
            Some(LogFormat { text: Some(_), labels: Some(_) }) => {
                return Err(FieldError::new(format!("{at}.logFormat"), "has both text and labels; keep one"));
            }
            Some(LogFormat { text: Some(text), labels: None }) => {
                Format::text(&text).map_err(|e| FieldError::new(format!("{at}.logFormat.text"), e))?
            }
            Some(LogFormat { text: None, labels: Some(labels) }) if !labels.is_empty() => {
                Format::structured(&labels).map_err(|e| FieldError::new(format!("{at}.logFormat.labels"), e))?
            }
            Some(LogFormat { text: None, .. }) => Format::default_json(),
        };
        let format = if omit { format.without_empty_values() } else { format };
        found.logs.push(Arc::new(AccessLog { name: named("envoyFileAccessLog")?, path, format }));
    }
    if let Some(otel) = spec.opentelemetry {
        let at = format!("{at}.opentelemetry");
        let otel = OpenTelemetry { max_tag_length: otel.max_tag_length.filter(|n| *n > 0).or(longest), ..otel };
        found.exporters.push(Arc::new(exporter(named("opentelemetry")?, otel, &at)?));
    }
    if spec.prometheus.is_some() {
        found.prometheus.push(named("prometheus")?);
    }
    let others = [
        spec.zipkin,
        spec.lightstep,
        spec.datadog,
        spec.skywalking,
        spec.opencensus,
        spec.stackdriver,
        spec.envoy_http_als,
        spec.envoy_tcp_als,
        spec.envoy_otel_als,
    ];
    if others.iter().any(Option::is_some) && !name.is_empty() {
        found.others.push(name);
    }
    Ok(())
}

fn exporter(name: Arc<str>, otel: OpenTelemetry, at: &str) -> Result<Exporter, FieldError> {
    if otel.service.is_empty() {
        return Err(FieldError::new(
            format!("{at}.service"),
            "is missing; name the collector's service, as name.namespace.svc.cluster.local",
        ));
    }
    // Istio also takes `namespace/host`.
    let service = otel.service.rsplit_once('/').map_or(otel.service.as_str(), |(_, host)| host);
    let (path, headers, timeout) = match (otel.http, otel.grpc) {
        (Some(_), Some(_)) => return Err(FieldError::new(at, "has http and grpc; keep one")),
        (Some(http), None) => {
            let path = http.path.filter(|p| !p.is_empty()).unwrap_or_else(|| "/v1/traces".to_owned());
            // Istio joins it to the host.
            let path = if path.starts_with('/') { path } else { format!("/{path}") };
            (Some(path.into()), headers(http.headers, &format!("{at}.http.headers"))?, http.timeout)
        }
        (None, Some(grpc)) => (None, headers(grpc.initial_metadata, &format!("{at}.grpc.initialMetadata"))?, grpc.timeout),
        (None, None) => (None, Vec::new(), None),
    };
    let timeout = timeout.map(|t| t.0).filter(|t| !t.is_zero()).unwrap_or(EXPORT_TIMEOUT);
    let longest = otel.max_tag_length.filter(|n| *n > 0).map_or(span::LONGEST, |n| (n as usize).min(MOST_TAG_LENGTH));
    Ok(Exporter { name, service: service.into(), port: port(otel.port, &format!("{at}.port"))?, longest, path, headers, timeout })
}

fn headers(all: Option<Vec<HttpHeader>>, at: &str) -> Result<Vec<(HeaderName, HeaderText)>, FieldError> {
    let header = |(i, header): (usize, HttpHeader)| -> Result<(HeaderName, HeaderText), FieldError> {
        let at = format!("{at}[{i}]");
        let text = match header.env_name {
            Some(variable) => HeaderText::Variable(variable.into()),
            None => HeaderText::Value(header_value(&header.value, &format!("{at}.value"))?),
        };
        Ok((header_name(&header.name, &format!("{at}.name"))?, text))
    };
    all.unwrap_or_default().into_iter().enumerate().map(header).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn headers_may_come_from_the_environment() {
        let of = |otel: Value| exporter("x".into(), serde_json::from_value(otel).expect("read"), "p");
        let found = of(
            json!({"service": "c", "port": 1, "grpc": {"timeout": "3s", "initialMetadata": [{"name": "A", "envName": "CARGO_PKG_NAME"}]}}),
        );
        let found = found.expect("an exporter");
        assert_eq!((found.path.as_deref(), found.timeout, found.headers[0].0.as_str()), (None, Duration::from_secs(3), "a"));
        assert_eq!(found.headers[0].1, HeaderText::Variable("CARGO_PKG_NAME".into()));
        let wrong = [
            (json!({"http": {"headers": [{"name": "a b", "value": "c"}]}}), "p.http.headers[0].name"),
            (json!({"http": {}, "grpc": {}}), "p"),
        ];
        for (mut otel, field) in wrong {
            otel["service"] = json!("c");
            otel["port"] = json!(1);
            assert_eq!(of(otel).expect_err("refused").field, field);
        }
    }
}
