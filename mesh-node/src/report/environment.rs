//! Variables of the environment, as formats and tags ask for them: those Istio sets for a sidecar from what it knows of the pod.

use std::borrow::Cow;

use crate::route::Workload;

/// One of them, found once by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variable {
    PodName,
    PodNamespace,
    InstanceIp,
    ServiceAccount,
    NodeName,
    WorkloadName,
    TrustDomain,
}

const ALL: [(&str, Variable); 8] = [
    ("HOSTNAME", Variable::PodName),
    ("POD_NAME", Variable::PodName),
    ("POD_NAMESPACE", Variable::PodNamespace),
    ("INSTANCE_IP", Variable::InstanceIp),
    ("SERVICE_ACCOUNT", Variable::ServiceAccount),
    ("ISTIO_META_NODE_NAME", Variable::NodeName),
    ("ISTIO_META_WORKLOAD_NAME", Variable::WorkloadName),
    ("TRUST_DOMAIN", Variable::TrustDomain),
];

impl Variable {
    /// By its name; none of what nothing is known of here.
    pub fn named(name: &str) -> Option<Self> {
        ALL.iter().find(|(n, _)| *n == name).map(|(_, variable)| *variable)
    }

    /// Its value in a pod.
    pub fn of(self, pod: &Workload) -> Option<Cow<'_, str>> {
        Some(match self {
            Self::PodName => Cow::Borrowed(&pod.name.name),
            Self::PodNamespace => Cow::Borrowed(&pod.name.namespace),
            Self::InstanceIp => Cow::Owned(pod.ips.first()?.to_string()),
            Self::ServiceAccount => Cow::Borrowed(pod.identity.service_account()),
            Self::NodeName => Cow::Borrowed(&pod.node),
            Self::WorkloadName => Cow::Borrowed(&pod.workload_name),
            Self::TrustDomain => Cow::Borrowed(pod.identity.trust_domain().as_str()),
        })
    }
}
