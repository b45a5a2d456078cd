//! From a document to an object: group, version and kind, names, and errors with a field path.

use std::{sync::Arc, time::SystemTime};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    AuthorizationPolicy, DestinationRule, EndpointSlice, GatewayRoute, Key, Kind, Named, Namespace, Node, Object, Parsed,
    PeerAuthentication, Pod, ReferenceGrant, Rejection, RequestAuthentication, Service, Telemetry, VirtualService,
};
use super::{target::TargetRef, unhonoured};
use crate::id::ObjectName;

/// Kinds of the groups this node serves that it does not yet act on. An operator must hear that they do nothing.
const NOT_HONOURED: &[(&str, &str)] = &[
    ("networking.istio.io", "Gateway"),
    ("networking.istio.io", "ServiceEntry"),
    ("networking.istio.io", "Sidecar"),
    ("networking.istio.io", "EnvoyFilter"),
    ("networking.istio.io", "WorkloadEntry"),
    ("networking.istio.io", "WorkloadGroup"),
    ("networking.istio.io", "ProxyConfig"),
    ("extensions.istio.io", "WasmPlugin"),
    ("gateway.networking.k8s.io", "Gateway"),
    ("gateway.networking.k8s.io", "TCPRoute"),
    ("gateway.networking.k8s.io", "TLSRoute"),
    // What Istio makes DestinationRules of.
    ("gateway.networking.k8s.io", "BackendTLSPolicy"),
    ("gateway.networking.x-k8s.io", "XBackendTrafficPolicy"),
];

const ISTIO_VERSIONS: &[&str] = &["v1", "v1beta1", "v1alpha3", "v1alpha1"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    #[serde(default)]
    metadata: Metadata,
}

/// The part of `metadata` every kind is read with.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    pub name: Option<String>,
    pub namespace: Option<String>,
    pub uid: Option<String>,
    #[serde(default)]
    pub labels: super::selector::Labels,
    #[serde(default)]
    pub annotations: Option<super::selector::Labels>,
    pub creation_timestamp: Option<String>,
    pub deletion_timestamp: Option<String>,
    #[serde(default)]
    pub owner_references: Option<Vec<Owner>>,
}

/// An entry of `metadata.ownerReferences`.
#[derive(Debug, Clone, Deserialize)]
pub struct Owner {
    #[serde(default)]
    pub kind: String,
    #[serde(default)]
    pub name: String,
}

/// Reads one document. `default_namespace` is for namespaced objects that name none, as `kubectl apply` does.
pub fn parse(document: &Value, default_namespace: &str) -> Result<Parsed, Rejection> {
    let text = |pointer: &str| document.pointer(pointer).and_then(Value::as_str);
    let (Some(api_version), Some(kind)) = (text("/apiVersion"), text("/kind")) else {
        let field = if text("/kind").is_none() { "kind" } else { "apiVersion" };
        let problem = "is missing; every document needs apiVersion, kind and metadata.name";
        return Err(reject("document without apiVersion and kind".into(), field, problem, None));
    };
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let (name, namespace) = (text("/metadata/name").unwrap_or_default(), text("/metadata/namespace").unwrap_or(default_namespace));
    let Some(known) = known(group, kind).or_else(|| mesh_config(group, kind, document)) else {
        return unknown(group, kind, format!("{kind} {namespace}/{name}"));
    };
    if name.is_empty() {
        return Err(reject(format!("{kind} {namespace}/"), "metadata.name", "is missing; every object needs a name", None));
    }
    // From here on every rejection says which object it is, so that its last good version can stay.
    let namespace = if matches!(known, Kind::Namespace | Kind::Node) { "" } else { namespace };
    let key = Key { kind: known, name: ObjectName::new(namespace, name) };
    let read = || {
        check_version(group, version, &key)?;
        let header: Header = typed(document, &key)?;
        object(document, &key, header.metadata)
    };
    match read() {
        Ok(named) => Ok(Parsed::Object(Box::new(named))),
        Err(rejection) => Err(Rejection { instead: stand_in(document, &key), ..rejection }),
    }
}

/// What there is of a policy of which something cannot be read.
fn stand_in(document: &Value, key: &Key) -> Option<Box<Named>> {
    if !matches!(key.kind, Kind::AuthorizationPolicy | Kind::RequestAuthentication | Kind::HTTPRoute | Kind::GRPCRoute) {
        return None;
    }
    let text = |pointer: &str| document.pointer(pointer).and_then(Value::as_str);
    let created = text("/metadata/creationTimestamp").and_then(|text| parse_time(text).ok());
    // One that is only told denies nobody; whether it is has to be said in a way that can be read.
    if matches!(truth(text("/metadata/annotations/istio.io~1dry-run")), Ok(true)) {
        return None;
    }
    let empty = Value::Object(serde_json::Map::new());
    let spec = document.get("spec").filter(|spec| !spec.is_null()).unwrap_or(&empty);
    let rest = unhonoured::without(spec, key.kind);
    let spec = rest.as_ref().map_or(spec, |(rest, _)| rest);
    let object = match key.kind {
        Kind::RequestAuthentication => Object::RequestAuthentication(RequestAuthentication::as_far_as_it_can_be_read(spec)?),
        Kind::HTTPRoute | Kind::GRPCRoute => {
            Object::GatewayRoute(GatewayRoute::as_far_as_it_can_be_read(spec, key.kind == Kind::GRPCRoute)?)
        }
        _ => Object::AuthorizationPolicy(AuthorizationPolicy::as_far_as_it_can_be_read(spec)?),
    };
    Some(Box::new(Named { key: key.clone(), created, object, unhonoured: Vec::new() }))
}

fn known(group: &str, kind: &str) -> Option<Kind> {
    Some(match (group, kind) {
        ("", "Namespace") => Kind::Namespace,
        ("", "Node") => Kind::Node,
        ("", "Pod") => Kind::Pod,
        ("", "Service") => Kind::Service,
        ("discovery.k8s.io", "EndpointSlice") => Kind::EndpointSlice,
        ("security.istio.io", "PeerAuthentication") => Kind::PeerAuthentication,
        ("security.istio.io", "AuthorizationPolicy") => Kind::AuthorizationPolicy,
        ("security.istio.io", "RequestAuthentication") => Kind::RequestAuthentication,
        ("networking.istio.io", "VirtualService") => Kind::VirtualService,
        ("networking.istio.io", "DestinationRule") => Kind::DestinationRule,
        ("gateway.networking.k8s.io", "HTTPRoute") => Kind::HTTPRoute,
        ("gateway.networking.k8s.io", "GRPCRoute") => Kind::GRPCRoute,
        ("gateway.networking.k8s.io", "ReferenceGrant") => Kind::ReferenceGrant,
        ("telemetry.istio.io", "Telemetry") => Kind::Telemetry,
        _ => return None,
    })
}

/// A `ConfigMap` is one of a cluster's many, unless it is Istio's.
fn mesh_config(group: &str, kind: &str, document: &Value) -> Option<Kind> {
    let of_the_mesh =
        document.pointer("/metadata/name").and_then(Value::as_str) == Some("istio") && document.pointer("/data/mesh").is_some();
    (group.is_empty() && kind == "ConfigMap" && of_the_mesh).then_some(Kind::ConfigMap)
}

fn unknown(group: &str, kind: &str, label: String) -> Result<Parsed, Rejection> {
    if NOT_HONOURED.contains(&(group, kind)) {
        let problem = format!("{kind} is not honoured by this version of mesh-node; remove it, or do not rely on it");
        return Err(reject(label, "kind", &problem, None));
    }
    if kind == "List" && group.is_empty() || kind.strip_suffix("List").is_some_and(|of| known(group, of).is_some()) {
        return Err(reject(label, "items", "is missing, is no list, or is nested too deep; nothing of it is in force", None));
    }
    if HARMLESS.contains(&(group, kind)) || !(group.ends_with(".istio.io") || group == "gateway.networking.k8s.io") {
        return Ok(Parsed::Ignored(Arc::from(format!("{group}/{kind}"))));
    }
    // Of the groups that govern the mesh: what is mistyped there would be missed.
    let problem = if let Some((right, _)) = KINDS.iter().find(|(_, k)| *k == kind) {
        format!("{kind} is not of the group {group:?}; write apiVersion: {right}/v1")
    } else {
        match KINDS.iter().filter(|(g, _)| *g == group).map(|(_, k)| *k).collect::<Vec<_>>() {
            none if none.is_empty() => format!("{kind} of {group:?} is not known here; remove it, or do not rely on it"),
            known => format!("{kind} is not a kind of {group:?} that is known here; those are {}", known.join(", ")),
        }
    };
    Err(reject(label, "kind", &problem, None))
}

/// Kinds of the mesh by group.
const KINDS: &[(&str, &str)] = &[
    ("security.istio.io", "PeerAuthentication"),
    ("security.istio.io", "AuthorizationPolicy"),
    ("security.istio.io", "RequestAuthentication"),
    ("networking.istio.io", "VirtualService"),
    ("networking.istio.io", "DestinationRule"),
    ("gateway.networking.k8s.io", "HTTPRoute"),
    ("gateway.networking.k8s.io", "GRPCRoute"),
    ("gateway.networking.k8s.io", "ReferenceGrant"),
    ("telemetry.istio.io", "Telemetry"),
];

/// Kinds of the same groups that change nothing of what a node does.
const HARMLESS: &[(&str, &str)] = &[
    ("install.istio.io", "IstioOperator"),
    ("operator.istio.io", "Istio"),
    ("gateway.networking.k8s.io", "GatewayClass"),
    ("gateway.networking.k8s.io", "ListenerSet"),
    ("gateway.networking.k8s.io", "UDPRoute"),
];

fn check_version(group: &str, version: &str, key: &Key) -> Result<(), Rejection> {
    let served: &[&str] = match group {
        "" => &["v1"],
        "discovery.k8s.io" => &["v1", "v1beta1"],
        "gateway.networking.k8s.io" => &["v1", "v1beta1", "v1alpha2"],
        _ => ISTIO_VERSIONS,
    };
    if served.contains(&version) {
        return Ok(());
    }
    let problem = format!("version {version:?} is not served; use one of {}", served.join(", "));
    Err(reject(key.to_string(), "apiVersion", &problem, Some(key.clone())))
}

fn object(document: &Value, key: &Key, metadata: Metadata) -> Result<Named, Rejection> {
    let fail = |e: FieldError| e.of(key);
    let created = metadata.creation_timestamp.as_deref().map(parse_time).transpose().map_err(fail)?;
    let spec = document.get("spec");
    let (rest, unhonoured) = spec.and_then(|spec| unhonoured::without(spec, key.kind)).unzip();
    let (spec, unhonoured) = (rest.as_ref().or(spec), unhonoured.unwrap_or_default());
    let object = match key.kind {
        Kind::Namespace => Object::Namespace(Namespace::read(metadata)),
        Kind::Node => Object::Node(Node::read(&metadata.labels)),
        Kind::Pod => Object::Pod(Box::new(Pod::read(typed(document, key)?, metadata).map_err(fail)?)),
        Kind::Service => Object::Service(Box::new(Service::read(typed(document, key)?, &metadata).map_err(fail)?)),
        Kind::EndpointSlice => Object::EndpointSlice(EndpointSlice::read(typed(document, key)?, &metadata).map_err(fail)?),
        Kind::PeerAuthentication => Object::PeerAuthentication(PeerAuthentication::read(spec_of(spec, key)?).map_err(fail)?),
        Kind::AuthorizationPolicy => {
            let dry_run = dry_run(&metadata).map_err(fail)?;
            Object::AuthorizationPolicy(AuthorizationPolicy::read(spec_of(spec, key)?, dry_run).map_err(fail)?)
        }
        Kind::RequestAuthentication => Object::RequestAuthentication(RequestAuthentication::read(spec_of(spec, key)?).map_err(fail)?),
        Kind::ConfigMap => Object::MeshConfig(Box::new(super::mesh_config::read(document, key)?)),
        Kind::VirtualService => Object::VirtualService(Box::new(VirtualService::read(spec_of(spec, key)?).map_err(fail)?)),
        Kind::DestinationRule => Object::DestinationRule(Box::new(DestinationRule::read(spec_of(spec, key)?).map_err(fail)?)),
        Kind::HTTPRoute | Kind::GRPCRoute if spec.is_some_and(super::gateway_route::are_elsewhere) => {
            Object::GatewayRoute(GatewayRoute::default())
        }
        Kind::HTTPRoute => Object::GatewayRoute(GatewayRoute::read(spec_of(spec, key)?, false).map_err(fail)?),
        Kind::GRPCRoute => Object::GatewayRoute(GatewayRoute::read(spec_of(spec, key)?, true).map_err(fail)?),
        Kind::ReferenceGrant => Object::ReferenceGrant(ReferenceGrant::read(spec_of(spec, key)?)),
        Kind::Telemetry => Object::Telemetry(Box::new(Telemetry::read(spec_of(spec, key)?).map_err(fail)?)),
    };
    Ok(Named { key: key.clone(), created, object, unhonoured })
}

/// The annotation that makes a policy one that is only told; the spellings of a truth value are Go's, as Istio reads it.
fn dry_run(metadata: &Metadata) -> Result<bool, FieldError> {
    truth(metadata.annotations.as_ref().and_then(|a| a.get("istio.io/dry-run")))
}

fn truth(text: Option<&str>) -> Result<bool, FieldError> {
    match text {
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some(other) => {
            Err(FieldError::new("metadata.annotations[istio.io/dry-run]", format!("{other:?} is neither \"true\" nor \"false\"")))
        }
    }
}

/// A policy's `spec`; absent and null mean empty.
fn spec_of<T: DeserializeOwned>(spec: Option<&Value>, key: &Key) -> Result<T, Rejection> {
    let empty = Value::Object(serde_json::Map::new());
    let spec = match spec {
        None | Some(Value::Null) => &empty,
        Some(spec) => spec,
    };
    match typed(spec, key) {
        // As an API server has it, what is null where that says nothing is not there.
        Err(_) if has_null(spec) => typed(&without_nulls(spec), key),
        read => read,
    }
    .map_err(|mut r| {
        r.field = if r.field == "." { "spec".into() } else { format!("spec.{}", r.field) };
        r
    })
}

fn has_null(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.values().any(|field| field.is_null() || has_null(field)),
        Value::Array(all) => all.iter().any(has_null),
        _ => false,
    }
}

fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            fields.iter().filter(|(_, field)| !field.is_null()).map(|(name, field)| (name.clone(), without_nulls(field))).collect()
        }
        Value::Array(all) => all.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

pub(super) fn typed<T: DeserializeOwned>(value: &Value, key: &Key) -> Result<T, Rejection> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let problem = format!("{}; correct or remove the field", error.inner());
        reject(key.to_string(), &error.path().to_string(), &problem, Some(key.clone()))
    })
}

/// An object, unless it is one that counts for nothing in its namespace; `root`: the mesh's own.
pub fn placed(named: Box<Named>, root: &str) -> Result<Box<Named>, Rejection> {
    let in_root = *named.key.name.namespace == *root;
    let targets: &[TargetRef] = match &named.object {
        Object::AuthorizationPolicy(policy) => &policy.targets,
        Object::RequestAuthentication(policy) => &policy.targets,
        Object::Telemetry(telemetry) => &telemetry.targets,
        _ => &[],
    };
    let (field, problem) = match &named.object {
        _ if targets.contains(&TargetRef::Everything) && !in_root => ("spec.targetRefs", ELSEWHERE),
        Object::PeerAuthentication(policy) if policy.selector.is_some() && in_root => ("spec.selector", NOT_IN_ROOT),
        _ => return Ok(named),
    };
    Err(reject(named.key.to_string(), field, problem, Some(named.key.clone())))
}

/// What is said of objects that count for nothing where they are.
pub const ELSEWHERE: &str = "GatewayClass istio-waypoint counts in the root namespace only; move the object there";
pub const NOT_IN_ROOT: &str = "is ignored in the root namespace; move the object to the workload's namespace";

fn reject(object: String, field: &str, problem: &str, key: Option<Key>) -> Rejection {
    Rejection { object, field: field.to_owned(), problem: problem.to_owned(), key, instead: None }
}

/// A field that does not make sense, found by a kind's own checks.
#[derive(Debug)]
pub struct FieldError {
    pub field: String,
    pub problem: String,
}

impl FieldError {
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    pub(super) fn of(self, key: &Key) -> Rejection {
        reject(key.to_string(), &self.field, &self.problem, Some(key.clone()))
    }
}

/// RFC 3339 as Kubernetes writes it. It decides which of several policies counts, so it must not be guessed.
fn parse_time(text: &str) -> Result<SystemTime, FieldError> {
    let parsed = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339);
    parsed.map(SystemTime::from).map_err(|e| FieldError::new("metadata.creationTimestamp", format!("{text:?} is not RFC 3339: {e}")))
}
