//! What routes of Gateway API are for.

use std::sync::Arc;

use serde_json::Value;

use super::{FieldError, Reference, Result, port};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// The route's own when absent.
    pub namespace: Option<Arc<str>>,
    pub name: Arc<str>,
    /// All ports when absent.
    pub port: Option<u16>,
    /// The name of a port, which it has to be of as well.
    pub section: Option<Arc<str>>,
}

/// Parents that are others' business.
const GATEWAYS: [&str; 3] = ["Gateway", "ListenerSet", "XListenerSet"];

/// Whether it is for gateways alone: whatever else it says is for whoever runs those.
pub fn are_elsewhere(spec: &Value) -> bool {
    let Some(parents) = spec.get("parentRefs").and_then(Value::as_array).filter(|all| !all.is_empty()) else { return false };
    let kind = |parent: &Value| parent.get("kind").map_or(Some("Gateway"), Value::as_str).is_some_and(|kind| GATEWAYS.contains(&kind));
    parents.iter().all(kind)
}

/// Those that are Services.
pub(super) fn read(refs: &[Reference]) -> Result<Vec<Parent>> {
    let is_honoured = |p: &Reference| p.kind.as_deref().is_none_or(|kind| kind == "Service" || GATEWAYS.contains(&kind));
    // Others among them are others' business too.
    if let Some(kind) = refs.first().filter(|_| !refs.iter().any(is_honoured)).and_then(|p| p.kind.as_deref()) {
        let problem = format!("{kind:?} is no kind whose routes are honoured here; those of a Service are");
        return Err(FieldError::new("spec.parentRefs[0].kind", problem));
    }
    let services = refs.iter().enumerate().filter(|(_, p)| is_service(p, Some("Gateway")));
    services.map(|(i, p)| parent(p, &format!("spec.parentRefs[{i}]"))).collect()
}

/// `default` is the kind of a reference that names none.
pub(super) fn is_service(reference: &Reference, default: Option<&str>) -> bool {
    let group = reference.group.as_deref();
    let kind = reference.kind.as_deref().or(default);
    kind == Some("Service") && matches!(group, None | Some("" | "core"))
}

fn parent(reference: &Reference, at: &str) -> Result<Parent> {
    let number = reference.port.map(|number| port(number, &format!("{at}.port"))).transpose()?;
    Ok(Parent {
        namespace: reference.namespace.as_deref().map(Arc::from),
        name: reference.name.as_str().into(),
        port: number,
        section: reference.section_name.as_deref().map(Arc::from),
    })
}
