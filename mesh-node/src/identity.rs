//! Certificates for service accounts: where they come from and how they are kept fresh.

mod embedded;
mod manager;

use std::{future::Future, pin::Pin};

pub use embedded::EmbeddedCa;
pub use manager::{CertificateState, Manager};

use crate::{
    id::SpiffeId,
    tls::{Credentials, TlsError},
};

/// Why a certificate cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("the CA state in {path} cannot be {what}")]
    State { path: String, what: &'static str, source: std::io::Error },
    #[error("the CA state in {path} is unusable: {problem}; restore it, or remove it to start a new trust root")]
    Corrupt { path: String, problem: String },
    #[error("a certificate cannot be made")]
    Make(#[from] rcgen::Error),
    #[error("the certificate made is unusable")]
    Tls(#[from] TlsError),
    #[error("{id} is not of trust domain {trust_domain}, the only one this CA signs for")]
    ForeignTrustDomain { id: SpiffeId, trust_domain: String },
    #[error("the certificate manager has stopped")]
    Stopped,
}

/// Somewhere certificates come from.
pub trait CertificateSource: Send + Sync {
    /// A fresh certificate and key for an identity.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Pin<Box<dyn Future<Output = Result<Credentials, IssueError>> + Send + 'a>>;
}
