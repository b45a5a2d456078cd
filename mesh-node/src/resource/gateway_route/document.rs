//! The fields of an `HTTPRoute` and a `GRPCRoute` as they are written.

use serde::Deserialize;

use crate::resource::fields::Time;

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Spec {
    pub parent_refs: Vec<Reference>,
    pub hostnames: Vec<String>,
    pub use_default_gateways: Option<serde_json::Value>,
    pub rules: Option<Vec<RuleDocument>>,
}

/// A reference to a parent or a backend.
#[derive(Deserialize, Default, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Reference {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub name: String,
    pub namespace: Option<String>,
    pub port: Option<u32>,
    pub section_name: Option<String>,
    pub weight: Option<u32>,
    pub filters: Vec<Filter>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RuleDocument {
    pub name: Option<String>,
    pub matches: Vec<Match>,
    pub filters: Vec<Filter>,
    pub backend_refs: Vec<Reference>,
    pub timeouts: Option<Timeouts>,
    pub retry: Option<Retry>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Match {
    pub path: Option<Typed>,
    pub headers: Vec<Typed>,
    pub query_params: Vec<Typed>,
    /// A method's name for HTTP, a service and method for gRPC.
    pub method: Option<Method>,
}

pub enum Method {
    Name(String),
    Grpc(GrpcMethod),
}

impl<'de> Deserialize<'de> for Method {
    /// By what is written: which of the two it should be is a matter of the route's kind, and an error names the field.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> serde::de::Visitor<'de> for Read {
            type Value = Method;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a method, or a service and method of gRPC")
            }

            fn visit_str<E>(self, name: &str) -> Result<Method, E> {
                Ok(Method::Name(name.to_owned()))
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Method, A::Error> {
                GrpcMethod::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Method::Grpc)
            }
        }
        deserializer.deserialize_any(Read)
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct GrpcMethod {
    pub r#type: Option<String>,
    pub service: Option<String>,
    pub method: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Typed {
    pub r#type: Option<String>,
    pub name: String,
    pub value: Option<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Filter {
    pub r#type: String,
    pub request_header_modifier: Option<Modifier>,
    pub response_header_modifier: Option<Modifier>,
    pub request_mirror: Option<MirrorDocument>,
    pub request_redirect: Option<RedirectDocument>,
    pub url_rewrite: Option<RewriteDocument>,
    pub cors: Option<CorsDocument>,
    pub extension_ref: Option<serde_json::Value>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(deny_unknown_fields, default)]
pub struct Modifier {
    pub set: Vec<Pair>,
    pub add: Vec<Pair>,
    pub remove: Vec<String>,
}

#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    pub name: String,
    pub value: String,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MirrorDocument {
    pub backend_ref: Reference,
    #[serde(default)]
    pub percent: Option<u32>,
    #[serde(default)]
    pub fraction: Option<Fraction>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(deny_unknown_fields)]
pub struct Fraction {
    pub numerator: u32,
    #[serde(default)]
    pub denominator: Option<u32>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RedirectDocument {
    pub scheme: Option<String>,
    pub hostname: Option<String>,
    pub path: Option<PathModifier>,
    pub port: Option<u32>,
    pub status_code: Option<u16>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RewriteDocument {
    pub hostname: Option<String>,
    pub path: Option<PathModifier>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PathModifier {
    pub r#type: String,
    pub replace_full_path: Option<String>,
    pub replace_prefix_match: Option<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CorsDocument {
    pub allow_origins: Vec<String>,
    pub allow_credentials: Option<bool>,
    pub allow_methods: Vec<String>,
    pub allow_headers: Vec<String>,
    pub expose_headers: Vec<String>,
    pub max_age: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Timeouts {
    pub request: Option<Time>,
    pub backend_request: Option<Time>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    pub codes: Vec<u16>,
    pub attempts: Option<u32>,
    pub backoff: Option<Time>,
}
