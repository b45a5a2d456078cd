//! The part of Istio's `MeshConfig` the node acts on, from the `ConfigMap` named `istio`: external authorizers, path
//! normalization, and telemetry ([`observability`]). The rest of it is for other programs.

pub mod defaults;
pub mod observability;
mod spelling;

use std::{sync::Arc, time::Duration};

use http::{HeaderName, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    id::TrustDomain,
    route::{retry::RetryPolicy, rule::HeaderText},
};

pub use self::{
    defaults::{AddedHeaders, Defaults},
    observability::Observability,
};
use super::{
    Key, Rejection,
    envelope::{FieldError, typed},
    fields::{Time, header_name, header_text, port},
    strings::StringMatch,
    virtual_service::{Retries, retries},
};

#[derive(Debug, Clone, PartialEq, Default)]
pub struct MeshConfig {
    /// External authorizers; other providers are for other purposes.
    pub authorizers: Vec<Arc<Authorizer>>,
    pub normalization: Option<Normalization>,
    pub client_cert: ClientCert,
    pub defaults: Box<Defaults>,
    /// Of routes that say nothing of retries. Istio's `defaultHttpRetryPolicy`.
    pub retries: Option<Box<RetryPolicy>>,
    pub observability: Observability,
    /// Whether addresses the mesh does not know are refused: `outboundTrafficPolicy`.
    pub registry_only: Option<bool>,
    /// Names the mesh's trust domain had before, beside those the node was started with: `trustDomainAliases`.
    pub aliases: Vec<TrustDomain>,
    /// What is wrong with its telemetry or its retries, of which nothing is in force then, and what is not acted on.
    pub problems: Vec<String>,
}

/// What is done to paths before anything looks at them. Istio's `MeshConfig.ProxyPathNormalization`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Normalization {
    /// Dot segments, escapes of unreserved characters, backslashes.
    #[default]
    Base,
    /// And runs of slashes become one.
    MergeSlashes,
    /// And `%2f` and `%5c` are decoded before that.
    DecodeAndMergeSlashes,
}

/// What becomes of `x-forwarded-client-cert` on requests into pods. Istio's `ProxyConfig.ProxyHeaders.forwardedClientCert`, and Envoy's
/// `forward_client_cert_details`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientCert {
    /// It says who the client has proved to be and nothing else; behind what a trusted proxy says.
    #[default]
    Verified,
    /// It is taken off.
    Sanitize,
    /// It stays as it is where the client has proved who it is.
    ForwardOnly,
    /// Who the client is goes behind what it says.
    AppendForward,
    /// Who the client is takes the place of what it says.
    SanitizeSet,
    /// It stays as it is.
    AlwaysForwardOnly,
}

/// Somebody who is asked whether a request may pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Authorizer {
    pub name: Arc<str>,
    /// Host name of the service.
    pub service: Arc<str>,
    pub port: u16,
    pub timeout: Duration,
    /// What cannot be asked passes.
    pub fail_open: bool,
    pub status_on_error: StatusCode,
    /// How much of a request's body it is shown, if any.
    pub body: Option<BodyInCheck>,
    pub check: Check,
}

/// What an authorizer is shown of a body. Envoy's `BufferSettings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyInCheck {
    /// Bytes of it.
    pub most: usize,
    /// Of a longer body its beginning is shown; otherwise the request is refused.
    pub partial: bool,
    /// Over gRPC it is shown as bytes, and not as text.
    pub as_bytes: bool,
}

/// Most of a body that may be asked for, bytes.
const MOST_OF_BODY: u32 = 8 * 1024 * 1024;

#[derive(Debug, Clone, PartialEq)]
pub enum Check {
    /// Envoy's `envoy.service.auth.v3.Authorization`.
    Grpc,
    /// The request; any answer of 200 allows.
    Http(HttpCheck),
}

#[derive(Debug, Clone, PartialEq)]
pub struct HttpCheck {
    pub path_prefix: Arc<str>,
    /// Request headers it gets, beside authority, method and path.
    pub request_headers: Vec<StringMatch>,
    /// What it gets besides.
    pub additional_headers: Vec<(HeaderName, HeaderText)>,
    /// Headers of its answer that go to the application, to a client that is let in, and to one that is not.
    pub to_upstream: Vec<StringMatch>,
    pub to_downstream_on_allow: Vec<StringMatch>,
    pub to_downstream_on_deny: Vec<StringMatch>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    extension_providers: Option<Vec<Provider>>,
    path_normalization: Option<NormalizationSpec>,
    default_config: Option<ProxyConfig>,
    outbound_traffic_policy: Option<OutboundSpec>,
}

#[derive(Deserialize)]
struct OutboundSpec {
    mode: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RetryDocument {
    default_http_retry_policy: Option<Retries>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProxyConfig {
    proxy_headers: Option<ProxyHeaders>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProxyHeaders {
    forwarded_client_cert: Option<String>,
}

/// A provider, looked at for each of its uses.
#[derive(Deserialize)]
struct Provider {
    #[serde(flatten)]
    all: Value,
}

#[derive(Deserialize)]
struct NormalizationSpec {
    normalization: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProviderSpec {
    #[serde(default)]
    name: String,
    envoy_ext_authz_http: Option<HttpSpec>,
    envoy_ext_authz_grpc: Option<GrpcSpec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct GrpcSpec {
    #[serde(default)]
    service: String,
    #[serde(default, deserialize_with = "spelling::number")]
    port: u32,
    timeout: Option<Time>,
    #[serde(default)]
    fail_open: bool,
    #[serde(default, rename = "clearRouteCache")]
    _clear_route_cache: bool,
    status_on_error: Option<String>,
    include_request_body_in_check: Option<BodySpec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HttpSpec {
    #[serde(default)]
    service: String,
    #[serde(default, deserialize_with = "spelling::number")]
    port: u32,
    timeout: Option<Time>,
    #[serde(default)]
    fail_open: bool,
    #[serde(default, rename = "clearRouteCache")]
    _clear_route_cache: bool,
    status_on_error: Option<String>,
    include_request_body_in_check: Option<BodySpec>,
    path_prefix: Option<String>,
    #[serde(default)]
    include_request_headers_in_check: Option<Vec<String>>,
    /// Its old name, which counts where the other says nothing.
    #[serde(default)]
    include_headers_in_check: Option<Vec<String>>,
    #[serde(default)]
    include_additional_headers_in_check: Option<std::collections::BTreeMap<String, String>>,
    #[serde(default)]
    headers_to_upstream_on_allow: Option<Vec<String>>,
    #[serde(default)]
    headers_to_downstream_on_allow: Option<Vec<String>>,
    #[serde(default)]
    headers_to_downstream_on_deny: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct BodySpec {
    #[serde(default, deserialize_with = "spelling::number")]
    max_request_bytes: u32,
    #[serde(default)]
    allow_partial_message: bool,
    #[serde(default)]
    pack_as_bytes: bool,
}

/// What both kinds have.
struct Common {
    service: String,
    port: u32,
    timeout: Option<Time>,
    fail_open: bool,
    status_on_error: Option<String>,
    include_request_body_in_check: Option<BodySpec>,
}

/// How long an authorizer may take, unless the provider says otherwise: Istio's default.
const TIMEOUT: Duration = Duration::from_mins(10);

/// Reads the object; the text in `data.mesh` has been parsed already.
pub(super) fn read(document: &Value, key: &Key) -> Result<MeshConfig, Rejection> {
    let mesh = document.pointer("/data/mesh").unwrap_or(&Value::Null);
    if !mesh.is_object() {
        return Err(FieldError::new("data.mesh", "is not a YAML mapping; correct it").of(key));
    }
    let mesh = &spelling::normalised(mesh);
    let document: Document = typed(mesh, key).map_err(|mut r: Rejection| {
        r.field = format!("data.mesh.{}", r.field);
        r
    })?;
    config(document, mesh).map_err(|e| e.of(key))
}

fn config(document: Document, mesh: &Value) -> Result<MeshConfig, FieldError> {
    let mut authorizers = Vec::new();
    let mut providers = Vec::new();
    for (i, provider) in document.extension_providers.unwrap_or_default().into_iter().enumerate() {
        let at = format!("data.mesh.extensionProviders[{i}]");
        if let Some(found) = authorizer(part(&provider.all, &at)?, &at)? {
            authorizers.push(Arc::new(found));
        }
        providers.push((at, provider.all));
    }
    // What is wrong with telemetry must not take security with it.
    let (observability, mut problems) = match part(mesh, "data.mesh") {
        Ok(document) => observability::read(document, &providers),
        Err(error) => {
            let problem = format!("{}: {}; telemetry is as if nothing was configured", error.field, error.problem);
            (Observability::default(), vec![problem])
        }
    };
    let normalization = document.path_normalization.and_then(|n| n.normalization);
    let normalization = match normalization.as_deref() {
        None | Some("DEFAULT" | "BASE") => normalization.map(|_| Normalization::Base),
        Some("MERGE_SLASHES") => Some(Normalization::MergeSlashes),
        Some("DECODE_AND_MERGE_SLASHES") => Some(Normalization::DecodeAndMergeSlashes),
        Some("NONE") => {
            let problem = "NONE is not honoured: a path that is not normalised can be read in two ways; use BASE";
            return Err(FieldError::new("data.mesh.pathNormalization.normalization", problem));
        }
        Some(other) => {
            let problem = format!("{other:?} is none of BASE, MERGE_SLASHES, DECODE_AND_MERGE_SLASHES");
            return Err(FieldError::new("data.mesh.pathNormalization.normalization", problem));
        }
    };
    let headers = document.default_config.and_then(|c| c.proxy_headers);
    let client_cert = client_cert(headers.and_then(|h| h.forwarded_client_cert).as_deref())?;
    let registry_only = match document.outbound_traffic_policy.and_then(|o| o.mode).as_deref() {
        None => None,
        Some("REGISTRY_ONLY") => Some(true),
        Some("ALLOW_ANY" | spelling::DYNAMIC_DNS) => Some(false),
        Some(other) => {
            let problem = format!("{other:?} is neither REGISTRY_ONLY nor ALLOW_ANY");
            return Err(FieldError::new("data.mesh.outboundTrafficPolicy.mode", problem));
        }
    };
    problems.extend(spelling::remarks(mesh));
    let defaults = Box::new(defaults::read(mesh, &mut problems));
    let aliases = defaults::aliases(mesh, &mut problems);
    let retries = part(mesh, "data.mesh").and_then(|document: RetryDocument| {
        document.default_http_retry_policy.as_ref().map(|r| retries(r, "data.mesh.defaultHttpRetryPolicy")).transpose()
    });
    let retries = retries.unwrap_or_else(|error| {
        problems.push(format!("{}: {}; retries are as if nothing was configured", error.field, error.problem));
        None
    });
    let retries = retries.map(Box::new);
    Ok(MeshConfig { authorizers, normalization, client_cert, defaults, retries, observability, registry_only, aliases, problems })
}

fn client_cert(mode: Option<&str>) -> Result<ClientCert, FieldError> {
    Ok(match mode {
        None | Some("" | "UNDEFINED") => ClientCert::Verified,
        Some("SANITIZE") => ClientCert::Sanitize,
        Some("FORWARD_ONLY") => ClientCert::ForwardOnly,
        Some("APPEND_FORWARD") => ClientCert::AppendForward,
        Some("SANITIZE_SET") => ClientCert::SanitizeSet,
        Some("ALWAYS_FORWARD_ONLY") => ClientCert::AlwaysForwardOnly,
        Some(other) => {
            let known = "SANITIZE, FORWARD_ONLY, APPEND_FORWARD, SANITIZE_SET, ALWAYS_FORWARD_ONLY";
            let at = "data.mesh.defaultConfig.proxyHeaders.forwardedClientCert";
            return Err(FieldError::new(at, format!("{other:?} is none of {known}")));
        }
    })
}

/// A provider as one of its uses sees it.
fn part<T: serde::de::DeserializeOwned>(provider: &Value, at: &str) -> Result<T, FieldError> {
    serde_path_to_error::deserialize(provider).map_err(|e| {
        let path = e.path().to_string();
        let field = if path == "." { at.to_owned() } else { format!("{at}.{path}") };
        FieldError::new(field, format!("{}; correct or remove the field", e.inner()))
    })
}

/// Names of headers, which are compared without regard to case.
fn patterns(texts: Option<Vec<String>>) -> Vec<StringMatch> {
    texts.unwrap_or_default().iter().map(|t| StringMatch::parse(&t.to_ascii_lowercase())).collect()
}

fn authorizer(spec: ProviderSpec, at: &str) -> Result<Option<Authorizer>, FieldError> {
    let ProviderSpec { name, envoy_ext_authz_http, envoy_ext_authz_grpc } = spec;
    let (common, check, field) = match (envoy_ext_authz_http, envoy_ext_authz_grpc) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => return Err(FieldError::new(at, "has two kinds of provider; keep one")),
        (None, Some(grpc)) => {
            let GrpcSpec { service, port, timeout, fail_open, status_on_error, include_request_body_in_check, _clear_route_cache: _ } =
                grpc;
            let common = Common { service, port, timeout, fail_open, status_on_error, include_request_body_in_check };
            (common, Check::Grpc, "envoyExtAuthzGrpc")
        }
        (Some(http), None) => {
            let at = format!("{at}.envoyExtAuthzHttp");
            let mut additional = Vec::new();
            for (name, value) in http.include_additional_headers_in_check.unwrap_or_default() {
                let at = format!("{at}.includeAdditionalHeadersInCheck.{name}");
                let name = header_name(&name, &at)?;
                additional.extend(header_text(&value, &at)?.map(|text| (name, text)));
            }
            let prefix = http.path_prefix.unwrap_or_default();
            if !prefix.is_empty() && (!prefix.starts_with('/') || prefix.contains(['?', '#', ' '])) {
                return Err(FieldError::new(format!("{at}.pathPrefix"), format!("{prefix:?} is not a path; begin it with /")));
            }
            let check = HttpCheck {
                path_prefix: prefix.into(),
                request_headers: patterns(
                    http.include_request_headers_in_check.filter(|all| !all.is_empty()).or(http.include_headers_in_check),
                ),
                additional_headers: additional,
                to_upstream: patterns(http.headers_to_upstream_on_allow),
                to_downstream_on_allow: patterns(http.headers_to_downstream_on_allow),
                to_downstream_on_deny: patterns(http.headers_to_downstream_on_deny),
            };
            let common = Common {
                service: http.service,
                port: http.port,
                timeout: http.timeout,
                fail_open: http.fail_open,
                status_on_error: http.status_on_error,
                include_request_body_in_check: http.include_request_body_in_check,
            };
            (common, Check::Http(check), "envoyExtAuthzHttp")
        }
    };
    let at = format!("{at}.{field}");
    if name.is_empty() {
        return Err(FieldError::new(format!("{at}.name"), "is missing; policies refer to providers by name"));
    }
    let body =
        common.include_request_body_in_check.map(|body| body_in_check(&body, &format!("{at}.includeRequestBodyInCheck"))).transpose()?;
    if common.service.is_empty() {
        return Err(FieldError::new(
            format!("{at}.service"),
            "is missing; name the authorizer's service, as name.namespace.svc.cluster.local",
        ));
    }
    // Istio also takes `namespace/host`.
    let service = common.service.rsplit_once('/').map_or(common.service.as_str(), |(_, host)| host);
    let status = common.status_on_error.unwrap_or_else(|| "403".to_owned());
    let status_on_error = status.parse::<u16>().ok().and_then(|s| StatusCode::from_u16(s).ok()).filter(|s| s.as_u16() >= 200);
    let status_on_error = status_on_error
        .ok_or_else(|| FieldError::new(format!("{at}.statusOnError"), format!("{status:?} is not an HTTP status such as 503")))?;
    Ok(Some(Authorizer {
        name: name.into(),
        service: service.into(),
        port: port(common.port, &format!("{at}.port"))?,
        timeout: common.timeout.map(|t| t.0).filter(|t| !t.is_zero()).unwrap_or(TIMEOUT),
        fail_open: common.fail_open,
        status_on_error,
        body,
        check,
    }))
}

fn body_in_check(spec: &BodySpec, at: &str) -> Result<BodyInCheck, FieldError> {
    let BodySpec { max_request_bytes: most, allow_partial_message: partial, pack_as_bytes: as_bytes } = *spec;
    if !(1..=MOST_OF_BODY).contains(&most) {
        let problem = format!("{most} is not between 1 and {MOST_OF_BODY}; say how many bytes of a request's body the authorizer is shown");
        return Err(FieldError::new(format!("{at}.maxRequestBytes"), problem));
    }
    Ok(BodyInCheck { most: most as usize, partial, as_bytes })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn how_much_of_a_body_is_shown_is_bounded() {
        let of = |body: Value| {
            let grpc = json!({"service": "a.default.svc.cluster.local", "port": 80, "includeRequestBodyInCheck": body});
            let spec = serde_json::from_value::<ProviderSpec>(json!({"name": "a", "envoyExtAuthzGrpc": grpc})).expect("a provider");
            authorizer(spec, "at").map(|a| a.expect("an authorizer").body).map_err(|e| format!("{}: {}", e.field, e.problem))
        };
        let body = |most, partial, as_bytes| Ok(Some(BodyInCheck { most, partial, as_bytes }));
        assert_eq!(of(Value::Null), Ok(None));
        assert_eq!(of(json!({"maxRequestBytes": 1})), body(1, false, false));
        let all = json!({"maxRequestBytes": 8_388_608, "allowPartialMessage": true, "packAsBytes": true});
        assert_eq!(of(all), body(8 * 1024 * 1024, true, true));
        for wrong in [json!({}), json!({"maxRequestBytes": 0}), json!({"maxRequestBytes": 8_388_609, "packAsBytes": true})] {
            let error = of(wrong.clone()).expect_err("refused");
            assert!(error.starts_with("at.envoyExtAuthzGrpc.includeRequestBodyInCheck.maxRequestBytes: "), "{wrong}: {error}");
        }
    }

    #[test]
    fn headers_in_checks_have_an_old_name_too() {
        for (more, expected) in [
            (json!({"includeRequestHeadersInCheck": ["a"]}), "a"),
            (json!({"includeHeadersInCheck": ["b"]}), "b"),
            (json!({"includeRequestHeadersInCheck": ["a"], "includeHeadersInCheck": ["b"]}), "a"),
            (json!({"includeRequestHeadersInCheck": [], "includeHeadersInCheck": ["b"]}), "b"),
        ] {
            let mut http = json!({"service": "a.default.svc.cluster.local", "port": 80});
            http.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            let spec = serde_json::from_value::<ProviderSpec>(json!({"name": "a", "envoyExtAuthzHttp": http})).expect("a provider");
            let Check::Http(check) = authorizer(spec, "at").expect("read").expect("an authorizer").check else { panic!("HTTP") };
            assert_eq!(check.request_headers, [StringMatch::parse(expected)], "{more}");
        }
    }

    #[test]
    fn retries_of_the_mesh_are_read_and_take_nothing_else_with_them() {
        let of = |policy: Value| {
            let mesh = json!({"pathNormalization": {"normalization": "MERGE_SLASHES"}, "defaultHttpRetryPolicy": policy});
            let document = serde_json::from_value(mesh.clone()).expect("a document");
            config(document, &mesh).expect("read")
        };
        let none = of(json!({"attempts": 0}));
        assert_eq!((none.retries.map(|r| r.attempts), none.problems.len()), (Some(0), 0));
        let some = of(json!({"attempts": 5, "retryOn": "5xx", "perTryTimeout": "1s"})).retries.expect("some");
        assert_eq!((some.attempts, some.per_try_timeout), (5, Some(Duration::from_secs(1))));
        assert!(some.on.has(crate::route::retry::RetryOn::SERVER_ERROR));
        for wrong in [json!({"attempts": -1}), json!({"attempt": 1})] {
            let config = of(wrong);
            assert_eq!((config.retries, config.normalization), (None, Some(Normalization::MergeSlashes)));
            assert!(config.problems.len() == 1 && config.problems[0].contains("defaultHttpRetryPolicy"), "{:?}", config.problems);
        }
        assert_eq!(of(Value::Null).retries, None);
    }
}
