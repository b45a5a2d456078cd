//! `VirtualService`: routing for HTTP, TCP and TLS. Semantics of Istio's networking API.

mod document;
mod http;
mod l4;

use std::sync::Arc;

pub(super) use document::{Retries, Spec};
pub(super) use http::retries;

use super::envelope::FieldError;
use crate::route::{l4::L4Rule, rule::Rule};

#[derive(Debug, Clone, PartialEq)]
pub struct VirtualService {
    /// As written: short names, full names, and wildcards. Empty for one that others delegate to.
    pub hosts: Vec<Arc<str>>,
    /// Whether it is for the mesh itself, not (only) for gateways.
    pub mesh: bool,
    /// Namespaces it is for: empty and `*` mean all, `.` its own.
    pub export_to: Vec<Arc<str>>,
    pub http: Vec<Rule>,
    pub tls: Vec<L4Rule>,
    pub tcp: Vec<L4Rule>,
}

impl VirtualService {
    pub(super) fn read(spec: Spec) -> Result<Self, FieldError> {
        let Spec { hosts, gateways, http, tls, tcp, export_to } = spec;
        for (i, host) in hosts.iter().enumerate() {
            check_host(host).map_err(|problem| FieldError::new(format!("spec.hosts[{i}]"), problem))?;
        }
        let nothing = http.is_empty() && tls.is_empty() && tcp.is_empty();
        if nothing {
            return Err(FieldError::new("spec", "has no http, tls or tcp routes; add at least one"));
        }
        let http = http.into_iter().enumerate().map(|(i, r)| {
            let rule = http::rule(r, &format!("spec.http[{i}]"), hosts.is_empty())?;
            Ok(Rule { number: i, ..rule })
        });
        let http = http.collect::<Result<Vec<_>, _>>()?;
        let tls = tls.iter().enumerate().map(|(i, r)| l4::tls(r, &format!("spec.tls[{i}]"))).collect::<Result<Vec<_>, _>>()?;
        let tcp = tcp.iter().enumerate().map(|(i, r)| l4::tcp(r, &format!("spec.tcp[{i}]"))).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            mesh: gateways.is_empty() || gateways.iter().any(|g| g == "mesh"),
            hosts: hosts.into_iter().map(Arc::from).collect(),
            export_to: export_to.into_iter().map(Arc::from).collect(),
            http,
            tls,
            tcp,
        })
    }
}

/// A host name or a wildcard of whole labels: `reviews`, `reviews.prod.svc.cluster.local`, `*.prod.svc.cluster.local`, `*`.
pub fn check_host(host: &str) -> Result<(), String> {
    let name = if host == "*" { return Ok(()) } else { host.strip_prefix("*.").unwrap_or(host) };
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':');
    if name.is_empty() || !name.chars().all(legal) {
        return Err(format!("{host:?} is not a host name; write a name, or a wildcard such as *.example.com"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
