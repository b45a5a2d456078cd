//! `targetRefs`: what a policy is attached to when it is not to a selection of workloads.

use std::sync::Arc;

use serde::Deserialize;

use super::envelope::FieldError;

/// What a policy is for. A reference is always to an object of the policy's own namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetRef {
    /// Traffic into the endpoints of a service, on the ports it leads to.
    Service(Arc<str>),
    /// `GatewayClass/istio-waypoint`: every workload, for policies of the root namespace. This node is everybody's waypoint.
    Everything,
}

impl TargetRef {
    /// The Service it refers to, if it is one.
    pub fn service(&self) -> Option<&str> {
        match self {
            Self::Service(name) => Some(name),
            Self::Everything => None,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct TargetSpec {
    #[serde(default)]
    group: Option<String>,
    kind: String,
    name: String,
    namespace: Option<String>,
}

/// Reads `targetRef` and `targetRefs`, of which at most one may be there, and no selector beside it.
pub(super) fn targets(one: Option<TargetSpec>, many: Option<Vec<TargetSpec>>, selected: bool) -> Result<Vec<TargetRef>, FieldError> {
    let many = many.unwrap_or_default();
    if one.is_some() && !many.is_empty() {
        return Err(FieldError::new("spec.targetRef", "and targetRefs cannot both be set; use targetRefs"));
    }
    if selected && (one.is_some() || !many.is_empty()) {
        return Err(FieldError::new("spec.targetRefs", "cannot be combined with selector; remove one of them"));
    }
    let single = one.map(|spec| target(&spec, "spec.targetRef"));
    single.into_iter().chain(many.iter().enumerate().map(|(i, spec)| target(spec, &format!("spec.targetRefs[{i}]")))).collect()
}

fn target(spec: &TargetSpec, at: &str) -> Result<TargetRef, FieldError> {
    if spec.namespace.as_deref().is_some_and(|n| !n.is_empty()) {
        return Err(FieldError::new(format!("{at}.namespace"), "must not be set: a policy is for objects of its own namespace"));
    }
    match (spec.group.as_deref().unwrap_or_default(), spec.kind.as_str(), spec.name.as_str()) {
        ("" | "core", "Service", name) if !name.is_empty() => Ok(TargetRef::Service(name.into())),
        ("gateway.networking.k8s.io", "GatewayClass", "istio-waypoint") => Ok(TargetRef::Everything),
        (group, kind, name) => {
            let problem = format!(
                "{group}/{kind} {name:?} is not honoured by this version of mesh-node; refer to a Service, or to GatewayClass istio-waypoint in the root namespace"
            );
            Err(FieldError::new(at, problem))
        }
    }
}
