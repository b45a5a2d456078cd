//! Who may reach a workload: mutual TLS mode and L4 authorization, as a pure function of a connection's facts.
//!
//! Semantics are Istio's: `PeerAuthentication` in ambient mode (STRICT refuses peers without an identity, DISABLE acts as
//! PERMISSIVE, narrower scope wins, oldest of a scope wins) and `AuthorizationPolicy` (any matching DENY denies; without
//! an ALLOW policy everything else is allowed; otherwise some ALLOW must match). Only this module makes a [`Permit`].

mod compile;
mod matching;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

pub use compile::{CompiledPolicy, TrustDomains, effective_mtls};

use crate::id::SpiffeId;

/// What is known of a connection that wants in. All of it is verified: the identity by TLS or by the kernel.
#[derive(Debug, Clone)]
pub struct Facts {
    pub peer: Option<SpiffeId>,
    /// The client's own address.
    pub source: std::net::IpAddr,
    /// The application's address and port.
    pub destination: SocketAddr,
}

/// Proof that a connection was authorized; dialling the application takes one.
#[derive(Debug)]
pub struct Permit(());

/// Why a connection is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("the peer presented no identity and mutual TLS is STRICT")]
    PlaintextUnderStrict,
    #[error("denied by AuthorizationPolicy {policy}")]
    DeniedBy { policy: Arc<str> },
    #[error("no AuthorizationPolicy allows it")]
    NotAllowed,
}

/// Whether plaintext is refused, by application port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mtls {
    pub strict: bool,
    /// Ports that differ from the workload's default.
    pub ports: BTreeMap<u16, bool>,
}

impl Mtls {
    pub fn is_strict(&self, port: u16) -> bool {
        self.ports.get(&port).copied().unwrap_or(self.strict)
    }
}

/// Everything that governs one workload.
#[derive(Debug, Clone, Default)]
pub struct WorkloadPolicy {
    pub mtls: Mtls,
    pub deny: Vec<Arc<CompiledPolicy>>,
    pub allow: Vec<Arc<CompiledPolicy>>,
    /// AUDIT and dry-run policies: evaluated for the log, never enforced.
    pub observe: Vec<Arc<CompiledPolicy>>,
}

impl WorkloadPolicy {
    /// Decides whether a connection with these facts may reach the application.
    pub fn authorize(&self, facts: &Facts) -> Result<Permit, Denial> {
        if facts.peer.is_none() && self.mtls.is_strict(facts.destination.port()) {
            return Err(Denial::PlaintextUnderStrict);
        }
        if let Some(policy) = self.deny.iter().find(|p| p.matches(facts)) {
            return Err(Denial::DeniedBy { policy: policy.name.clone() });
        }
        if self.allow.is_empty() || self.allow.iter().any(|p| p.matches(facts)) {
            return Ok(Permit(()));
        }
        Err(Denial::NotAllowed)
    }

    /// Names of the AUDIT and dry-run policies that match.
    pub fn observed<'a>(&'a self, facts: &'a Facts) -> impl Iterator<Item = &'a str> {
        self.observe.iter().filter(|p| p.matches(facts)).map(|p| &*p.name)
    }
}

#[cfg(test)]
mod tests;
