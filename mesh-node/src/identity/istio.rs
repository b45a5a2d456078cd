//! Certificates of an Istio certificate authority: istiod's, or `mesh-node ca`.
//!
//! `istio.v1.auth.IstioCertificateService/CreateCertificate` over gRPC and TLS. The node proves itself with its own
//! service-account token and asks for certificates of the accounts of its pods (`ImpersonatedIdentity`).

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use parking_lot::Mutex;
use prost::Message;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::PrivateKeyDer;
use tokio::{net::TcpStream, time::timeout};

use super::{Boxed, CertificateSource, IssueError, authority::state};
use crate::{
    grpc,
    id::SpiffeId,
    tls::{self, Credentials, Trust},
};

pub const METHOD: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Clone, PartialEq, Message)]
pub struct CertificateRequest {
    /// PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// Seconds.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

#[derive(Clone, PartialEq, Message)]
pub struct CertificateResponse {
    /// PEM: the certificate, intermediates, and last all roots in one.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// `google.protobuf.Struct`.
#[derive(Clone, PartialEq, Message)]
pub struct Struct {
    #[prost(map = "string, message", tag = "1")]
    pub fields: std::collections::HashMap<String, Value>,
}

/// `google.protobuf.Value`, of which only texts are used.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    #[prost(string, optional, tag = "3")]
    pub string_value: Option<String>,
}

/// Where the authority is and how it is spoken to.
#[derive(Debug, Clone)]
pub struct IstioCaSettings {
    /// `host:port`.
    pub address: String,
    /// The name in its certificate, when that is not the host.
    pub server_name: Option<String>,
    /// PEM file of the roots its own certificate is verified with.
    pub roots: PathBuf,
    /// The node's service-account token; read for every call.
    pub token: PathBuf,
    pub cluster: String,
    pub ttl: Duration,
}

/// Asks the authority.
#[derive(Debug)]
pub struct IstioCa {
    settings: IstioCaSettings,
    trust: Arc<Trust>,
    /// Calls begun.
    calls: AtomicU64,
    /// The latest of them whose roots are trusted: an answer that comes late may have those of before.
    newest: Mutex<u64>,
}

impl IstioCa {
    pub fn new(settings: IstioCaSettings, trust: Arc<Trust>) -> Self {
        Self { settings, trust, calls: AtomicU64::new(0), newest: Mutex::new(0) }
    }

    async fn ask(&self, id: &SpiffeId) -> Result<Credentials, IssueError> {
        // The key is made here and stays here.
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        let request = CertificateRequest {
            csr: params.serialize_request(&key)?.pem()?,
            validity_duration: i64::try_from(self.settings.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct { fields: [("ImpersonatedIdentity".to_owned(), Value { string_value: Some(id.to_string()) })].into() }),
        };
        let number = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let response = timeout(TIMEOUT, self.call(&request)).await;
        let response = response.map_err(|_| self.unreachable(std::io::ErrorKind::TimedOut.into()))??;
        let unusable = |problem: &str| IssueError::Answer(problem.to_owned());
        let (roots, chain) = response.cert_chain.split_last().filter(|(_, c)| !c.is_empty()).ok_or_else(|| unusable("it has no chain"))?;
        let roots = tls::certificates(roots.as_bytes())?;
        let chain = chain.iter().map(|pem| tls::certificates(pem.as_bytes())).collect::<Result<Vec<_>, _>>()?;
        let credentials = Credentials::new(
            id.clone(),
            chain.into_iter().flatten().collect(),
            PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            self.trust.clone(),
        )?;
        let mut newest = self.newest.lock();
        if number > *newest {
            self.trust.set_roots(&roots)?;
            *newest = number;
        }
        Ok(credentials)
    }

    async fn call(&self, request: &CertificateRequest) -> Result<CertificateResponse, IssueError> {
        let IstioCaSettings { address, server_name, roots, token, cluster, .. } = &self.settings;
        let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host).trim_matches(['[', ']']);
        let name = server_name.as_deref().unwrap_or(host);
        let token = std::fs::read_to_string(token).map_err(state("read", token))?;
        let authorities = tls::certificates(&std::fs::read(roots).map_err(state("read", roots))?)?;
        let stream = TcpStream::connect(address).await.map_err(|e| self.unreachable(e))?;
        let stream = tls::connect_named(name, &authorities, tls::HTTP2, stream).await.map_err(|e| self.unreachable(e))?;
        let mut metadata = HeaderMap::new();
        let bearer = HeaderValue::from_str(&format!("Bearer {}", token.trim()));
        let mut bearer = bearer.map_err(|_| IssueError::Answer("the token is no text".to_owned()))?;
        bearer.set_sensitive(true);
        metadata.insert(header::AUTHORIZATION, bearer);
        if let Ok(cluster) = HeaderValue::from_str(cluster) {
            metadata.insert(HeaderName::from_static("clusterid"), cluster);
        }
        Ok(grpc::call(stream, name, METHOD, metadata, request).await?)
    }

    fn unreachable(&self, source: std::io::Error) -> IssueError {
        IssueError::Unreachable { address: self.settings.address.clone(), source }
    }
}

impl CertificateSource for IstioCa {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Boxed<'a, Result<Credentials, IssueError>> {
        Box::pin(self.ask(id))
    }
}
