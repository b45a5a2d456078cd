//! TLS between mesh peers: TLS 1.3 with AES-GCM, X25519MLKEM768 preferred, ALPN `h2`, both sides verified by SPIFFE ID.
//!
//! Wire behaviour is that of Istio's ztunnel: no SNI, no resumption, a client certificate is mandatory, the server
//! refuses another trust domain, the client accepts only the identities it expects.

mod verify;

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
    sign::CertifiedKey,
    version::TLS13,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use verify::{ClientVerifier, ServerVerifier, SingleCertificate};
pub use verify::{peer_identity, uri_identities};

use crate::id::SpiffeId;

/// The only application protocol spoken.
pub const ALPN: &[u8] = b"h2";

/// Why a certificate or a configuration is unusable.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the TLS library refused the configuration")]
    Configuration(#[from] rustls::Error),
    #[error("no client verifier can be built from the trusted roots")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    #[error("the certificate is for {found:?}, not for {wanted}")]
    WrongIdentity { wanted: SpiffeId, found: Vec<String> },
    #[error("the certificate chain is empty")]
    EmptyChain,
}

/// A private key, its certificate chain and the roots its peers are verified with.
#[derive(Debug)]
pub struct Credentials {
    pub identity: SpiffeId,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
}

impl Credentials {
    /// Checks that the chain is for `identity` and prepares the server side.
    pub fn new(
        identity: SpiffeId,
        (not_before, not_after): (SystemTime, SystemTime),
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Arc<RootCertStore>,
    ) -> Result<Self, TlsError> {
        let leaf = chain.first().ok_or(TlsError::EmptyChain)?;
        let found = uri_identities(leaf);
        if !found.contains(&identity) {
            let found = found.iter().map(ToString::to_string).collect();
            return Err(TlsError::WrongIdentity { wanted: identity, found });
        }
        let provider = provider();
        let key = Arc::new(CertifiedKey::from_der(chain, key, &provider)?);
        let server = Arc::new(server_config(&provider, &identity, key.clone(), roots.clone())?);
        Ok(Self { identity, not_before, not_after, key, roots, server })
    }

    /// The configuration to accept HBONE connections with.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// A configuration to dial a peer that must present one of these identities.
    pub fn client(&self, expected: Vec<SpiffeId>) -> Result<ClientConfig, TlsError> {
        let provider = provider();
        let verifier = ServerVerifier::new(self.roots.clone(), expected, &provider);
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertificate(self.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// How long after `now`, when it was issued, it should be replaced: half of what is left of its life, moved by up to a
    /// tenth of that either way so that a fleet spreads out.
    pub fn renew_in(&self, now: SystemTime, jitter: f64) -> Duration {
        let life = self.not_after.duration_since(now).unwrap_or_default();
        life.mul_f64(0.5 + 0.1 * jitter.clamp(-1.0, 1.0))
    }

    pub fn is_expired(&self, now: SystemTime) -> bool {
        now >= self.not_after
    }

    /// The leaf certificate.
    pub fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.key.cert.first()
    }
}

/// An authenticated connection, dialled or accepted.
pub type ClientStream<T> = tokio_rustls::client::TlsStream<T>;
pub type ServerStream<T> = tokio_rustls::server::TlsStream<T>;

/// Shakes hands as the client: presents `credentials` and accepts only a peer that is `expected`.
pub async fn connect<T>(credentials: &Credentials, expected: SpiffeId, io: T) -> io::Result<ClientStream<T>>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let config = credentials.client(vec![expected]).map_err(io::Error::other)?;
    // The TLS library wants a name for a connection that sends and checks none.
    let nameless = ServerName::IpAddress(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED).into());
    let stream = TlsConnector::from(Arc::new(config)).connect(nameless, io).await?;
    check_alpn(stream.get_ref().1.alpn_protocol())?;
    Ok(stream)
}

/// Shakes hands as the server; also returns who the client is.
pub async fn accept<T>(credentials: &Credentials, io: T) -> io::Result<(ServerStream<T>, SpiffeId)>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let stream = TlsAcceptor::from(credentials.server()).accept(io).await?;
    let session = stream.get_ref().1;
    check_alpn(session.alpn_protocol())?;
    // The verifier lets nobody through without one.
    let peer = peer_identity(session.peer_certificates()).ok_or_else(|| io::Error::other(rustls::Error::NoCertificatesPresented))?;
    Ok((stream, peer))
}

/// Shakes hands with a server of the outside world, known by its name and to the system's certificate authorities (or those
/// in the file `SSL_CERT_FILE` names).
pub async fn connect_public<T>(host: &str, io: T) -> io::Result<ClientStream<T>>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    // Read anew each time: it is rare, and the authorities may change.
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config)).connect(name, io).await
}

/// A peer that offers no protocol at all passes the library's negotiation, but not this.
fn check_alpn(negotiated: Option<&[u8]>) -> io::Result<()> {
    if negotiated == Some(ALPN) { Ok(()) } else { Err(io::Error::other(rustls::Error::NoApplicationProtocol)) }
}

fn server_config(
    provider: &Arc<CryptoProvider>,
    identity: &SpiffeId,
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
) -> Result<ServerConfig, TlsError> {
    let chain = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?;
    let verifier = ClientVerifier::new(chain, identity.trust_domain().clone());
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertificate(key)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The cryptography of the mesh: AES-GCM only, the hybrid post-quantum exchange first.
fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::{cipher_suite, kx_group};
    static PROVIDER: std::sync::LazyLock<Arc<CryptoProvider>> = std::sync::LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![cipher_suite::TLS13_AES_256_GCM_SHA384, cipher_suite::TLS13_AES_128_GCM_SHA256],
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
            ..aws_lc_rs::default_provider()
        })
    });
    PROVIDER.clone()
}

/// What went wrong in a handshake, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HandshakeFailure {
    /// The peer is not speaking TLS, or not ours.
    Protocol,
    /// The peer presented no certificate.
    NoCertificate,
    /// The peer's certificate is expired or not yet valid.
    Expired,
    /// The peer's certificate is of an unknown authority, or malformed.
    Untrusted,
    /// The peer's certificate is valid but for another identity or trust domain.
    WrongIdentity,
    /// The peer refused our certificate.
    RefusedByPeer,
    /// The connection broke.
    Io,
}

impl HandshakeFailure {
    /// Reads the reason out of what the TLS library reports.
    pub fn of(error: &std::io::Error) -> Self {
        use rustls::{CertificateError, Error};
        match error.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
            Some(Error::NoCertificatesPresented) => Self::NoCertificate,
            Some(Error::InvalidCertificate(e)) => match e {
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => Self::Expired,
                CertificateError::ApplicationVerificationFailure | CertificateError::Other(_) => Self::WrongIdentity,
                _ => Self::Untrusted,
            },
            Some(Error::AlertReceived(_)) => Self::RefusedByPeer,
            Some(_) => Self::Protocol,
            None => Self::Io,
        }
    }

    pub fn reason(self) -> &'static str {
        match self {
            Self::Protocol => "protocol",
            Self::NoCertificate => "no_certificate",
            Self::Expired => "expired",
            Self::Untrusted => "untrusted",
            Self::WrongIdentity => "wrong_identity",
            Self::RefusedByPeer => "refused_by_peer",
            Self::Io => "io",
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
    use rustls::NamedGroup;

    use super::*;

    type Issuing = CertifiedIssuer<'static, KeyPair>;

    fn ca() -> Issuing {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("root")
    }

    fn id(text: &str) -> SpiffeId {
        SpiffeId::parse(text).expect("valid")
    }

    fn credentials(ca: &Issuing, identity: &str) -> Result<Credentials, TlsError> {
        issued(ca, identity, identity)
    }

    fn issued(ca: &Issuing, written: &str, identity: &str) -> Result<Credentials, TlsError> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(written.try_into().expect("ascii"))];
        let key = KeyPair::generate().expect("key");
        let leaf = params.signed_by(&key, ca).expect("leaf");
        let mut roots = RootCertStore::empty();
        roots.add(ca.as_ref().der().clone()).expect("root");
        let now = SystemTime::now();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Credentials::new(id(identity), (now, now), vec![leaf.der().clone()], key, Arc::new(roots))
    }

    const CLIENT: &str = "spiffe://cluster.local/ns/a/sa/client";
    const SERVER: &str = "spiffe://cluster.local/ns/a/sa/server";

    /// Both sides' results of a handshake; the client's includes the server's verdict on it.
    async fn shake(client: &Credentials, expected: &str, server: &Credentials) -> (io::Result<NamedGroup>, io::Result<SpiffeId>) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (near, far) = tokio::io::duplex(64 * 1024);
        let dial = async {
            let mut stream = connect(client, id(expected), near).await?;
            stream.read_u8().await?;
            let group = stream.get_ref().1.negotiated_key_exchange_group().map(rustls::crypto::SupportedKxGroup::name);
            group.ok_or_else(|| io::Error::other("no group"))
        };
        let take = async {
            let (mut stream, peer) = accept(server, far).await?;
            stream.write_u8(1).await?;
            stream.flush().await?;
            Ok(peer)
        };
        tokio::join!(dial, take)
    }

    #[tokio::test]
    async fn peers_agree_on_the_hybrid_exchange_and_know_each_other() {
        let ca = ca();
        let (client, server) = (credentials(&ca, CLIENT).expect("client"), credentials(&ca, SERVER).expect("server"));
        let (group, peer) = shake(&client, SERVER, &server).await;
        assert_eq!(group.expect("connected"), NamedGroup::X25519MLKEM768);
        assert_eq!(peer.expect("accepted"), id(CLIENT));
    }

    #[tokio::test]
    async fn only_the_expected_identity_is_accepted_by_the_client() {
        let ca = ca();
        let (client, server) = (credentials(&ca, CLIENT).expect("client"), credentials(&ca, SERVER).expect("server"));
        let (refused, _) = shake(&client, "spiffe://cluster.local/ns/a/sa/other", &server).await;
        assert_eq!(HandshakeFailure::of(&refused.expect_err("refused")), HandshakeFailure::WrongIdentity);
    }

    #[tokio::test]
    async fn only_the_own_trust_domain_is_accepted_by_the_server() {
        let ca = ca();
        let client = credentials(&ca, "spiffe://elsewhere/ns/a/sa/client").expect("client");
        let server = credentials(&ca, SERVER).expect("server");
        let (refused, verdict) = shake(&client, SERVER, &server).await;
        assert_eq!(HandshakeFailure::of(&verdict.expect_err("refused")), HandshakeFailure::WrongIdentity);
        assert_eq!(HandshakeFailure::of(&refused.expect_err("told so")), HandshakeFailure::RefusedByPeer);
    }

    #[tokio::test]
    async fn a_foreign_root_is_trusted_by_neither_side() {
        let (ours, theirs) = (ca(), ca());
        let (client, server) = (credentials(&theirs, CLIENT).expect("client"), credentials(&ours, SERVER).expect("server"));
        let (refused, _) = shake(&client, SERVER, &server).await;
        assert_eq!(HandshakeFailure::of(&refused.expect_err("refused")), HandshakeFailure::Untrusted);
    }

    #[test]
    fn a_certificate_for_somebody_else_is_not_used() {
        assert!(matches!(issued(&ca(), CLIENT, SERVER), Err(TlsError::WrongIdentity { .. })));
    }
}
