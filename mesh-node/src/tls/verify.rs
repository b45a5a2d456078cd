//! Verification of peers by SPIFFE ID.

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::{
        ResolvesClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ClientHello, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};

use super::trust::{Role, Trust};
use crate::id::SpiffeId;

/// The SPIFFE IDs among a certificate's URI names; names of another form are skipped.
pub fn uri_identities(certificate: &CertificateDer<'_>) -> Vec<SpiffeId> {
    let Ok(leaf) = webpki::EndEntityCert::try_from(certificate) else { return Vec::new() };
    leaf.valid_uri_names().filter_map(|uri| SpiffeId::parse(uri).ok()).collect()
}

/// The identity of an authenticated peer: its first SPIFFE ID.
pub fn peer_identity(chain: Option<&[CertificateDer<'_>]>) -> Option<SpiffeId> {
    uri_identities(chain?.first()?).into_iter().next()
}

/// A valid certificate of somebody else.
struct WrongPeer(String);

impl fmt::Display for WrongPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// As the TLS library prints it.
impl fmt::Debug for WrongPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongPeer {}

/// A chain of certificates that is not one.
#[derive(thiserror::Error)]
#[error("{0}")]
pub(super) struct Unverified(String);

impl fmt::Debug for Unverified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn wrong_peer(message: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(WrongPeer(message)))))
}

/// Verifies the other end of a mesh connection, whichever it is. DNS names mean nothing.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    trust: Arc<Trust>,
    /// Whom a server must be; a client may be anybody of the mesh.
    expected: Vec<SpiffeId>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PeerVerifier {
    pub(super) fn new(trust: Arc<Trust>, expected: Vec<SpiffeId>, provider: &CryptoProvider) -> Self {
        Self { trust, expected, algorithms: provider.signature_verification_algorithms }
    }

    fn chain(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime, role: Role) -> Result<(), Error> {
        self.trust.verify(leaf, intermediates, now, role).map_err(certificate_error)
    }
}

/// A failure of verification as the TLS library names it, so that the peer is sent the right alert.
fn certificate_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    Error::InvalidCertificate(match error {
        E::CertExpired { .. } => CertificateError::Expired,
        E::CertNotValidYet { .. } => CertificateError::NotValidYet,
        E::CertRevoked => CertificateError::Revoked,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(Unverified(other.to_string())))),
    })
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.chain(end_entity, intermediates, now, Role::Server)?;
        let found = uri_identities(end_entity);
        if found.iter().any(|id| self.expected.iter().any(|expected| self.trust.is_expected(id, expected))) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(wrong_peer(format!("the peer is {found:?}, expected was one of {:?}", self.expected)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    /// No hints: every client has one certificate, and the roots may change.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.chain(end_entity, intermediates, now, Role::Client)?;
        match uri_identities(end_entity).first() {
            Some(id) if self.trust.is_ours(id) => Ok(ClientCertVerified::assertion()),
            Some(id) => Err(wrong_peer(format!("the peer {id} is of another trust domain"))),
            None => Err(wrong_peer("the peer's certificate carries no SPIFFE ID".to_owned())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Always presents the same certificate, whatever the peer hints at.
#[derive(Debug)]
pub(super) struct SingleCertificate(pub(super) Arc<CertifiedKey>);

impl ResolvesServerCert for SingleCertificate {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for SingleCertificate {
    fn resolve(&self, _root_hint_subjects: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
