//! What is known of the workload at the other end, and of the own one, by the names Istio's expressions have for it.

use std::borrow::Cow;

use super::environment::Variable;
use crate::route::Workload;

/// Which end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client, as the destination sees it.
    Downstream,
    /// The destination, as the client sees it.
    Upstream,
}

/// One of a workload's facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact {
    App,
    Version,
    Service,
    Revision,
    Name,
    Namespace,
    Type,
    Workload,
    Cluster,
    Identity,
}

const FACTS: [(&str, Fact); 10] = [
    ("app", Fact::App),
    ("version", Fact::Version),
    ("service", Fact::Service),
    ("revision", Fact::Revision),
    ("name", Fact::Name),
    ("namespace", Fact::Namespace),
    ("type", Fact::Type),
    ("workload", Fact::Workload),
    ("cluster", Fact::Cluster),
    ("identity", Fact::Identity),
];

/// What Istio's proxies say of themselves, as far as it is known here.
const METADATA: [(&str, Variable); 6] = [
    ("NAME", Variable::PodName),
    ("NAMESPACE", Variable::PodNamespace),
    ("INSTANCE_IPS", Variable::InstanceIp),
    ("SERVICE_ACCOUNT", Variable::ServiceAccount),
    ("WORKLOAD_NAME", Variable::WorkloadName),
    ("MESH_ID", Variable::TrustDomain),
];

impl End {
    /// By its name, also the one it had when Istio's filters were WebAssembly.
    pub fn named(name: &str) -> Option<Self> {
        match name.strip_prefix("wasm.").unwrap_or(name) {
            "downstream_peer" => Some(Self::Downstream),
            "upstream_peer" => Some(Self::Upstream),
            _ => None,
        }
    }
}

impl Fact {
    pub fn named(name: &str) -> Option<Self> {
        FACTS.iter().find(|(n, _)| *n == name).map(|(_, fact)| *fact)
    }

    /// The names there are.
    pub fn known() -> String {
        FACTS.map(|(name, _)| name).join(", ")
    }

    /// Its value of a workload, in a cluster.
    pub fn of<'w>(self, workload: &'w Workload, cluster: &'w str) -> Option<Cow<'w, str>> {
        let label = |name: &str| workload.labels.get(name);
        let text = match self {
            Self::App => workload.app()?,
            Self::Version => label("version").or_else(|| label("app.kubernetes.io/version"))?,
            Self::Service => workload.canonical_service().unwrap_or(&workload.workload_name),
            Self::Revision => workload.canonical_revision().unwrap_or("latest"),
            Self::Name => &workload.name.name,
            Self::Namespace => &workload.name.namespace,
            Self::Type => workload.workload_kind.name(),
            Self::Workload => &workload.workload_name,
            Self::Cluster => cluster,
            Self::Identity => return Some(Cow::Owned(workload.identity.to_string())),
        };
        Some(Cow::Borrowed(text))
    }
}

/// What a proxy of Istio's has under this name in its node's metadata; none of what nothing is known of here.
pub fn metadata(name: &str) -> Option<Variable> {
    METADATA.iter().find(|(n, _)| *n == name).map(|(_, variable)| *variable)
}
