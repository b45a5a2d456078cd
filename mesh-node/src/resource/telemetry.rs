//! `Telemetry`: metrics, access logs and traces. Semantics of Istio's telemetry API.

use std::{collections::BTreeMap, sync::Arc};

use http::HeaderName;
use serde::Deserialize;

use super::{
    envelope::FieldError,
    fields::header_name,
    selector::WorkloadSelector,
    target::{TargetRef, TargetSpec, targets},
};
use crate::{
    report::{SpanTag, environment::Variable, expression::Expression, format::Template},
    telemetry::traffic::Metric,
};

#[derive(Debug, Clone, PartialEq)]
pub struct Telemetry {
    pub selector: Option<WorkloadSelector>,
    pub targets: Vec<TargetRef>,
    pub tracing: Vec<Tracing>,
    pub metrics: Vec<Metrics>,
    pub logging: Vec<AccessLogging>,
}

/// Whose side is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Mode {
    #[default]
    ClientAndServer,
    Client,
    Server,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Tracing {
    pub mode: Mode,
    /// None: those of the wider scope.
    pub providers: Vec<Arc<str>>,
    /// Of a million requests.
    pub sampling: Option<u32>,
    pub disabled: Option<bool>,
    /// None: those of the wider scope.
    pub tags: Option<Vec<(Arc<str>, SpanTag)>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Metrics {
    pub providers: Vec<Arc<str>>,
    pub overrides: Vec<Override>,
}

/// A change of some metrics.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    /// None: all.
    pub metric: Option<Metric>,
    pub mode: Mode,
    pub disabled: Option<bool>,
    pub tags: Vec<(Arc<str>, TagChange)>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum TagChange {
    Remove,
    Set(Arc<Expression>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct AccessLogging {
    pub mode: Mode,
    pub providers: Vec<Arc<str>>,
    pub disabled: bool,
    pub filter: Option<Arc<Expression>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Spec {
    selector: Option<WorkloadSelector>,
    target_ref: Option<TargetSpec>,
    target_refs: Option<Vec<TargetSpec>>,
    #[serde(default)]
    tracing: Option<Vec<TracingSpec>>,
    #[serde(default)]
    metrics: Option<Vec<MetricsSpec>>,
    #[serde(default)]
    access_logging: Option<Vec<LoggingSpec>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModeSpec {
    #[serde(default)]
    mode: Mode,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProviderRef {
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TracingSpec {
    #[serde(rename = "match")]
    matched: Option<ModeSpec>,
    #[serde(default)]
    providers: Option<Vec<ProviderRef>>,
    random_sampling_percentage: Option<f64>,
    disable_span_reporting: Option<bool>,
    custom_tags: Option<BTreeMap<String, CustomTag>>,
    /// The trace's beginning decides, whatever the request's id says.
    #[serde(rename = "useRequestIdForTraceSampling")]
    _use_request_id: Option<bool>,
    /// Istio's tags are written.
    enable_istio_tags: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CustomTag {
    literal: Option<Literal>,
    header: Option<Header>,
    environment: Option<Header>,
    formatter: Option<Literal>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Literal {
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Header {
    name: String,
    default_value: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MetricsSpec {
    #[serde(default)]
    providers: Option<Vec<ProviderRef>>,
    #[serde(default)]
    overrides: Option<Vec<OverrideSpec>>,
    /// Connections are counted as they go on, whatever it says.
    #[serde(rename = "reportingInterval")]
    _reporting_interval: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct OverrideSpec {
    #[serde(rename = "match")]
    matched: Option<MetricSelector>,
    disabled: Option<bool>,
    #[serde(default)]
    tag_overrides: Option<BTreeMap<String, TagSpec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MetricSelector {
    metric: Option<String>,
    custom_metric: Option<String>,
    #[serde(default)]
    mode: Mode,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TagSpec {
    #[serde(default)]
    operation: Operation,
    value: Option<String>,
}

#[derive(Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Operation {
    #[default]
    Upsert,
    Remove,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LoggingSpec {
    #[serde(rename = "match")]
    matched: Option<ModeSpec>,
    #[serde(default)]
    providers: Option<Vec<ProviderRef>>,
    disabled: Option<bool>,
    filter: Option<FilterSpec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilterSpec {
    #[serde(default)]
    expression: String,
}

/// Most providers, entries and tags of one object.
const MAX_ENTRIES: usize = 100;

impl Telemetry {
    pub(super) fn read(spec: Spec) -> Result<Self, FieldError> {
        let Spec { selector, target_ref, target_refs, tracing, metrics, access_logging } = spec;
        let selector = selector.filter(|s| !s.match_labels.is_empty());
        let targets = targets(target_ref, target_refs, selector.is_some())?;
        let tracing = each(tracing, "spec.tracing", self::tracing)?;
        let metrics = each(metrics, "spec.metrics", self::metrics)?;
        let logging = each(access_logging, "spec.accessLogging", self::logging)?;
        Ok(Self { selector, targets, tracing, metrics, logging })
    }
}

fn each<S, T>(all: Option<Vec<S>>, at: &str, read: impl Fn(S, &str) -> Result<T, FieldError>) -> Result<Vec<T>, FieldError> {
    let all = all.unwrap_or_default();
    if all.len() > MAX_ENTRIES {
        return Err(FieldError::new(at, format!("has {} entries; at most {MAX_ENTRIES} are honoured", all.len())));
    }
    all.into_iter().enumerate().map(|(i, spec)| read(spec, &format!("{at}[{i}]"))).collect()
}

fn providers(all: Option<Vec<ProviderRef>>, at: &str) -> Result<Vec<Arc<str>>, FieldError> {
    each(all, &format!("{at}.providers"), |provider, at| {
        if provider.name.is_empty() {
            return Err(FieldError::new(
                format!("{at}.name"),
                "is missing; name a provider of the mesh configuration, prometheus or envoy",
            ));
        }
        Ok(provider.name.into())
    })
}

fn tracing(spec: TracingSpec, at: &str) -> Result<Tracing, FieldError> {
    if spec.enable_istio_tags == Some(false) {
        let problem = "false is not honoured by this version of mesh-node; remove it";
        return Err(FieldError::new(format!("{at}.enableIstioTags"), problem));
    }
    let sampling = spec.random_sampling_percentage.map(|percent| {
        let at = format!("{at}.randomSamplingPercentage");
        if !(0.0..=100.0).contains(&percent) {
            return Err(FieldError::new(at, format!("{percent} is not a percentage; use 0 to 100")));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a million")]
        Ok((percent * 10_000.0).round() as u32)
    });
    let tags = spec.custom_tags.map(|tags| span_tags(tags, &format!("{at}.customTags")));
    Ok(Tracing {
        mode: spec.matched.map_or(Mode::default(), |m| m.mode),
        providers: providers(spec.providers, at)?,
        sampling: sampling.transpose()?,
        disabled: spec.disable_span_reporting,
        tags: tags.transpose()?,
    })
}

/// What is told beside what always is.
pub(super) fn span_tags(tags: BTreeMap<String, CustomTag>, at: &str) -> Result<Vec<(Arc<str>, SpanTag)>, FieldError> {
    if tags.len() > MAX_ENTRIES {
        return Err(FieldError::new(at, format!("has {} entries; at most {MAX_ENTRIES} are honoured", tags.len())));
    }
    let tags = tags.into_iter().map(|(name, tag)| Ok((Arc::from(&*name), span_tag(tag, &format!("{at}.{name}"))?)));
    let tags = tags.collect::<Result<Vec<_>, FieldError>>()?;
    Ok(tags.into_iter().filter_map(|(name, tag)| Some((name, tag?))).collect())
}

/// None of one that never has a value.
fn span_tag(tag: CustomTag, at: &str) -> Result<Option<SpanTag>, FieldError> {
    match tag {
        CustomTag { literal: Some(literal), header: None, environment: None, formatter: None } => {
            Ok(Some(SpanTag::Literal(literal.value.into())))
        }
        CustomTag { literal: None, header: Some(header), environment: None, formatter: None } => {
            let name: HeaderName = header_name(&header.name, &format!("{at}.header.name"))?;
            Ok(Some(SpanTag::Header(name, header.default_value.map(Into::into))))
        }
        CustomTag { literal: None, header: None, environment: Some(environment), formatter: None } => {
            let default = environment.default_value.filter(|default| !default.is_empty()).map(Arc::from);
            // Of a variable nothing is known of the default counts, as with Envoy.
            Ok(match Variable::named(&environment.name) {
                Some(variable) => Some(SpanTag::Environment(variable, default)),
                None => default.map(SpanTag::Literal),
            })
        }
        CustomTag { literal: None, header: None, environment: None, formatter: Some(formatter) } => {
            let at = format!("{at}.formatter.value");
            let template = Template::parse(&formatter.value).map_err(|e| FieldError::new(at, format!("{:?} {e}", formatter.value)))?;
            Ok(Some(SpanTag::Template(template)))
        }
        _ => Err(FieldError::new(at, "is not one of literal, header, environment and formatter; set exactly one of them")),
    }
}

fn metrics(spec: MetricsSpec, at: &str) -> Result<Metrics, FieldError> {
    let overrides = each(spec.overrides, &format!("{at}.overrides"), override_of)?;
    Ok(Metrics { providers: providers(spec.providers, at)?, overrides: overrides.into_iter().flatten().collect() })
}

/// None for a metric that is not made here, which Istio takes as well.
fn override_of(spec: OverrideSpec, at: &str) -> Result<Option<Override>, FieldError> {
    let OverrideSpec { matched, disabled, tag_overrides } = spec;
    let tags = tag_overrides.unwrap_or_default();
    if tags.len() > MAX_ENTRIES {
        return Err(FieldError::new(
            format!("{at}.tagOverrides"),
            format!("has {} entries; at most {MAX_ENTRIES} are honoured", tags.len()),
        ));
    }
    let tags = tags.into_iter().map(|(name, tag)| Ok((Arc::from(&*name), tag_change(&name, tag, &format!("{at}.tagOverrides.{name}"))?)));
    let tags = tags.collect::<Result<Vec<_>, _>>()?;
    let (metrics, mode) = match matched {
        None => (Which::All, Mode::default()),
        Some(selector) => (metric(&selector, &format!("{at}.match"))?, selector.mode),
    };
    Ok(match metrics {
        Which::All => Some(Override { metric: None, mode, disabled, tags }),
        Which::One(metric) => Some(Override { metric: Some(metric), mode, disabled, tags }),
        Which::NoneHere => None,
    })
}

/// What an override is for.
enum Which {
    All,
    One(Metric),
    NoneHere,
}

fn metric(selector: &MetricSelector, at: &str) -> Result<Which, FieldError> {
    let known = || Metric::ALL.into_iter().filter_map(Metric::api_name).collect::<Vec<_>>().join(", ");
    match (&selector.metric, &selector.custom_metric) {
        (None, None) => Ok(Which::All),
        (Some(_), Some(_)) => Err(FieldError::new(at, "has both metric and customMetric; keep one")),
        (Some(name), None) if name == "ALL_METRICS" => Ok(Which::All),
        (Some(name), None) => match Metric::ALL.into_iter().find(|m| m.api_name() == Some(name)) {
            Some(metric) => Ok(Which::One(metric)),
            None => Err(FieldError::new(format!("{at}.metric"), format!("{name:?} is none of ALL_METRICS, {}", known()))),
        },
        // By their names in Prometheus, without the prefix or with it.
        (None, Some(name)) => {
            let plain = name.strip_prefix("istio_").unwrap_or(name);
            let found = Metric::ALL.into_iter().find(|m| {
                let own = m.name().strip_prefix("istio_").unwrap_or(m.name());
                plain == own || plain.strip_suffix("_total") == Some(own)
            });
            Ok(found.map_or(Which::NoneHere, Which::One))
        }
    }
}

fn tag_change(name: &str, tag: TagSpec, at: &str) -> Result<TagChange, FieldError> {
    let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && !name.starts_with("__");
    if !begins || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') || ["le", "quantile"].contains(&name) {
        return Err(FieldError::new(at, "is not the name of a label: use letters, digits and underscores, and none of Prometheus' own"));
    }
    match (tag.operation, tag.value) {
        (Operation::Remove, None) => Ok(TagChange::Remove),
        (Operation::Remove, Some(_)) => Err(FieldError::new(format!("{at}.value"), "means nothing when a tag is removed; remove it")),
        (Operation::Upsert, None) => Err(FieldError::new(format!("{at}.value"), "is missing; give an expression, or operation: REMOVE")),
        (Operation::Upsert, Some(value)) => {
            let expression = Expression::parse(&value).map_err(|e| FieldError::new(format!("{at}.value"), format!("{value:?} {e}")))?;
            Ok(TagChange::Set(Arc::new(expression)))
        }
    }
}

fn logging(spec: LoggingSpec, at: &str) -> Result<AccessLogging, FieldError> {
    let filter = spec.filter.map(|f| {
        let parsed = Expression::parse(&f.expression);
        parsed.map(Arc::new).map_err(|e| FieldError::new(format!("{at}.filter.expression"), format!("{:?} {e}", f.expression)))
    });
    Ok(AccessLogging {
        mode: spec.matched.map_or(Mode::default(), |m| m.mode),
        providers: providers(spec.providers, at)?,
        disabled: spec.disabled.unwrap_or(false),
        filter: filter.transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(spec: Value) -> Result<Telemetry, String> {
        let spec: Spec = serde_json::from_value(spec).map_err(|e| e.to_string())?;
        Telemetry::read(spec).map_err(|e| format!("{}: {}", e.field, e.problem))
    }

    #[test]
    fn a_full_object_is_read() {
        let read = read(json!({
            "selector": {"matchLabels": {"app": "a"}},
            "tracing": [{"providers": [{"name": "otel"}], "randomSamplingPercentage": 12.5, "customTags": {
                "a": {"literal": {"value": "x"}}, "b": {"header": {"name": "X-B", "defaultValue": "none"}},
                "c": {"environment": {"name": "X", "defaultValue": "y"}}, "d": {"environment": {"name": "X"}},
                "e": {"formatter": {"value": "%REQ(x-e)%"}}, "f": {"environment": {"name": "POD_NAME"}}}}],
            "metrics": [{"providers": [{"name": "prometheus"}], "overrides": [
                {"match": {"metric": "REQUEST_COUNT", "mode": "SERVER"}, "tagOverrides": {
                    "response_code": {"operation": "REMOVE"}, "host": {"value": "request.host"}}},
                {"match": {"metric": "ALL_METRICS"}, "disabled": true},
                {"match": {"customMetric": "requests_total"}}]}],
            "accessLogging": [{"providers": [{"name": "envoy"}], "match": {"mode": "CLIENT"},
                "filter": {"expression": "response.code >= 400"}}],
        }));
        let read = read.expect("valid");
        assert_eq!(
            (read.tracing[0].sampling, read.tracing[0].tags.as_ref().map(Vec::len)),
            (Some(125_000), Some(5)),
            "one without a value is none"
        );
        let overrides = &read.metrics[0].overrides;
        assert_eq!(overrides[0].metric, Some(Metric::RequestCount));
        assert_eq!((overrides[0].mode, overrides[0].tags.len()), (Mode::Server, 2));
        assert_eq!((overrides[1].metric, overrides[1].disabled), (None, Some(true)));
        assert_eq!(overrides[2].metric, Some(Metric::RequestCount));
        assert_eq!((read.logging[0].mode, read.logging[0].disabled), (Mode::Client, false));
    }

    #[test]
    fn what_cannot_be_honoured_names_the_field() {
        for (spec, expected) in [
            (json!({"metrics": [{"overrides": [{"match": {"metric": "FOO"}}]}]}), "spec.metrics[0].overrides[0].match.metric"),
            (json!({"metrics": [{"overrides": [{"tagOverrides": {"a-b": {"value": "'x'"}}}]}]}), "tagOverrides.a-b: is not the name"),
            (json!({"metrics": [{"overrides": [{"tagOverrides": {"a": {"value": "foo.bar"}}}]}]}), "overrides[0].tagOverrides.a.value"),
            (json!({"metrics": [{"overrides": [{"tagOverrides": {"a": {}}}]}]}), "value: is missing"),
            (json!({"accessLogging": [{"filter": {"expression": "response.code ="}}]}), "spec.accessLogging[0].filter.expression"),
            (json!({"accessLogging": [{"providers": [{}]}]}), "spec.accessLogging[0].providers[0].name"),
            (json!({"tracing": [{"randomSamplingPercentage": 101}]}), "spec.tracing[0].randomSamplingPercentage"),
            (json!({"tracing": [{"customTags": {"a": {}}}]}), "customTags.a: is not one of literal, header, environment and formatter"),
            (json!({"tracing": [{"customTags": {"a": {"formatter": {"value": "%FOO%"}}}}]}), "customTags.a.formatter.value"),
            (json!({"tracing": [{"foo": 1}]}), "unknown field `foo`"),
            (json!({"selector": {"matchLabels": {"a": "b"}}, "targetRefs": [{"kind": "Service", "name": "x"}]}), "spec.targetRefs"),
        ] {
            let error = read(spec.clone()).expect_err(&spec.to_string());
            assert!(error.contains(expected), "{spec}: {error}");
        }
    }
}
