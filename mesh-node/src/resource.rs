//! Kubernetes and Istio objects as the node needs them, parsed and checked; everything it does not use is left out.
//!
//! [`parse`] turns one document into an [`Object`] or a [`Rejection`] that names the field and the remedy. A value that
//! exists is valid on its own; whether it fits the others is decided in `config`.

pub mod authorization;
pub mod destination_rule;
pub mod envelope;
pub mod fields;
mod further;
pub mod gateway_route;
pub mod kube;
pub mod mesh_config;
pub mod paths;
pub mod peer_authentication;
pub mod request_authentication;
pub mod selector;
pub mod strings;
pub mod target;
pub mod telemetry;
mod unhonoured;
pub mod virtual_service;

use std::{fmt, sync::Arc, time::SystemTime};

pub use authorization::AuthorizationPolicy;
pub use destination_rule::DestinationRule;
pub use gateway_route::{GatewayRoute, ReferenceGrant};
pub use kube::{EndpointSlice, Namespace, Node, Pod, Service};
pub use mesh_config::MeshConfig;
pub use peer_authentication::PeerAuthentication;
pub use request_authentication::RequestAuthentication;
pub use telemetry::Telemetry;
pub use virtual_service::VirtualService;

use crate::id::ObjectName;

/// What kind of object, in this node's terms; API versions of one kind are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Namespace,
    Node,
    Pod,
    Service,
    EndpointSlice,
    PeerAuthentication,
    AuthorizationPolicy,
    RequestAuthentication,
    /// The `istio` `ConfigMap`: mesh-wide settings.
    ConfigMap,
    VirtualService,
    DestinationRule,
    HTTPRoute,
    GRPCRoute,
    ReferenceGrant,
    Telemetry,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Identifies an object: kind, namespace and name. The namespace is empty for cluster-scoped kinds.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub kind: Kind,
    pub name: ObjectName,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name.name)
        } else {
            write!(f, "{} {}", self.kind, self.name)
        }
    }
}

/// An object the node acts on.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    Namespace(Namespace),
    Node(Node),
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(EndpointSlice),
    PeerAuthentication(PeerAuthentication),
    AuthorizationPolicy(AuthorizationPolicy),
    RequestAuthentication(RequestAuthentication),
    MeshConfig(Box<MeshConfig>),
    VirtualService(Box<VirtualService>),
    DestinationRule(Box<DestinationRule>),
    GatewayRoute(GatewayRoute),
    ReferenceGrant(ReferenceGrant),
    Telemetry(Box<Telemetry>),
}

/// An object with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    pub key: Key,
    /// When it was created; decides between several that claim the same scope. Absent in hand-written manifests.
    pub created: Option<SystemTime>,
    pub object: Object,
    /// Paths of fields that are taken and not honoured.
    pub unhonoured: Vec<String>,
}

/// Why an object is not honoured: what, where in it, and what to do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{object}: {field}: {problem}")]
pub struct Rejection {
    /// Kind, namespace and name as far as they could be read.
    pub object: String,
    /// Path of the field, such as `spec.rules[0].from[1].source.ipBlocks[0]`.
    pub field: String,
    /// What is wrong and what would be right.
    pub problem: String,
    /// Which object it is, when its name could be read: its last good version stays in force.
    pub key: Option<Key>,
    /// What is in force instead where there is no last good version: without it what the object guards would be open.
    pub instead: Option<Box<Named>>,
}

/// A document, looked at.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    Object(Box<Named>),
    /// A kind that is none of this node's business, such as a Deployment.
    Ignored(Arc<str>),
}

pub use envelope::{ELSEWHERE, NOT_IN_ROOT, parse, placed};
pub use further::further;
