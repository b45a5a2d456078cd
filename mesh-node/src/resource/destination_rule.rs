//! `DestinationRule`: subsets, load balancing, pools and outlier detection of a host. Semantics of Istio's networking API.

mod document;
mod policy;

use std::{collections::BTreeMap, sync::Arc};

pub(super) use document::Spec;

/// What else reads parts of it.
pub(super) mod defaults {
    pub(in crate::resource) use super::{
        document::{Keepalive as KeepaliveSpec, Locality as LocalitySpec},
        policy::{keepalive, locality},
    };
}

use super::{
    envelope::FieldError,
    selector::{Labels, WorkloadSelector},
    virtual_service::check_host,
};
use crate::route::traffic::TrafficPolicy;

#[derive(Debug, Clone, PartialEq)]
pub struct DestinationRule {
    pub host: Arc<str>,
    /// Of several rules for a host, the first that has one.
    pub policy: Option<Layered>,
    pub subsets: Vec<Subset>,
    pub export_to: Vec<Arc<str>>,
    /// It is for these clients of its own namespace alone, and for them in the place of rules that select nobody.
    pub selector: Option<WorkloadSelector>,
    /// Where it asks for plaintext, which pods of the mesh do not speak to each other.
    pub plaintext: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Subset {
    pub name: Arc<str>,
    pub labels: Labels,
    pub policy: Layered,
}

/// A traffic policy in parts: those that are absent are the host's, or the default.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Layered {
    pub(crate) blocks: policy::Blocks,
    /// Replaces the others as a whole on its port.
    pub(crate) ports: BTreeMap<u16, policy::Blocks>,
}

impl Layered {
    /// The policy in force on a port: the host's for that port, or for all, and over it the subset's blocks; those a subset has for the
    /// port replace all but the retry budget, which is of no port. As Istio merges them.
    pub fn effective(host: Option<&Self>, subset: Option<&Self>, port: u16) -> TrafficPolicy {
        let base = host.map(|h| h.ports.get(&port).unwrap_or(&h.blocks).clone()).unwrap_or_default();
        let Some(subset) = subset else { return base.into_policy() };
        let over = subset.blocks.clone().over(base);
        match subset.ports.get(&port) {
            Some(blocks) => blocks.clone().with_budget_of(&over).into_policy(),
            None => over.into_policy(),
        }
    }
}

impl DestinationRule {
    pub(super) fn read(spec: Spec) -> Result<Self, FieldError> {
        let plaintext = spec.plaintext();
        if spec.host.is_empty() {
            return Err(FieldError::new("spec.host", "is missing; name a service"));
        }
        check_host(&spec.host).map_err(|problem| FieldError::new("spec.host", problem))?;
        let policy = spec.traffic_policy.map(|p| policy::layered(p, "spec.trafficPolicy")).transpose()?;
        let mut subsets: Vec<Subset> = Vec::new();
        for (i, document) in spec.subsets.into_iter().enumerate() {
            let at = format!("spec.subsets[{i}]");
            if document.name.is_empty() || subsets.iter().any(|s| *s.name == *document.name) {
                return Err(FieldError::new(
                    format!("{at}.name"),
                    format!("{:?} is missing or used twice; name every subset", document.name),
                ));
            }
            let policy = document.traffic_policy.map(|p| policy::layered(p, &format!("{at}.trafficPolicy")));
            subsets.push(Subset { name: document.name.into(), labels: document.labels, policy: policy.transpose()?.unwrap_or_default() });
        }
        let export_to = spec.export_to.into_iter().map(Arc::from).collect();
        Ok(Self { host: spec.host.into(), policy, subsets, export_to, selector: spec.workload_selector, plaintext })
    }
}

#[cfg(test)]
mod tests;
