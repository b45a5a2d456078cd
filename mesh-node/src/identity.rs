//! Certificates for service accounts: where they come from and how they are kept fresh.
//!
//! A [`CertificateSource`] gives a key and chain for an identity and keeps the node's [`Trust`](crate::tls::Trust) current;
//! there are three: [`EmbeddedCa`], [`IstioCa`] and [`Files`]. Keys are made on the node and never leave it. [`Manager`]
//! keeps one certificate per identity in use, whatever the source. [`service`] is the other end: a certificate authority.

pub mod authority;
mod embedded;
mod files;
mod istio;
mod manager;
mod revocations;
pub mod service;
mod turnstile;

use std::{future::Future, pin::Pin};

pub use authority::Authority;
pub use embedded::EmbeddedCa;
pub use files::Files;
pub use istio::{IstioCa, IstioCaSettings};
pub use manager::{CertificateState, Manager};
pub use revocations::follow as follow_revocations;

use crate::{
    grpc,
    id::SpiffeId,
    tls::{Credentials, TlsError},
};

/// Why a certificate cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("{path} cannot be {what}")]
    State { path: String, what: &'static str, source: std::io::Error },
    #[error("the CA state in {path} is unusable: {problem}; restore it, or remove it to start a new trust root")]
    Corrupt { path: String, problem: String },
    #[error("nobody who trusts the roots of the CA would believe what it signs ({0}); correct its certificate, its chain or the roots")]
    Unusable(String),
    #[error("a certificate cannot be made")]
    Make(#[from] rcgen::Error),
    #[error("the certificate is unusable")]
    Tls(#[from] TlsError),
    #[error("{id} is not of trust domain {trust_domain}, the only one this CA signs for")]
    ForeignTrustDomain { id: SpiffeId, trust_domain: String },
    #[error("there is no {0}")]
    Missing(String),
    #[error("the certificate authority at {address} cannot be reached")]
    Unreachable { address: String, source: std::io::Error },
    #[error("the certificate authority refuses")]
    Refused(#[from] grpc::Status),
    #[error("the certificate authority's answer is unusable: {0}")]
    Answer(String),
    #[error("the certificate that was issued had expired already; look at the clocks of the authority and of the node")]
    Expired,
    #[error("the certificate manager has stopped")]
    Stopped,
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Somewhere certificates come from.
pub trait CertificateSource: Send + Sync {
    /// A fresh certificate and key for an identity.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Boxed<'a, Result<Credentials, IssueError>>;

    /// Completes when every certificate should be had anew, because what it is made with has changed.
    fn changed(&self) -> Boxed<'_, ()> {
        Box::pin(std::future::pending())
    }
}
