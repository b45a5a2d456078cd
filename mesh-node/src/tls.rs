//! TLS between mesh peers: TLS 1.3 with AES-GCM, X25519MLKEM768 preferred, ALPN `h2`, both sides verified by SPIFFE ID.
//!
//! Wire behaviour is that of Istio's ztunnel: no SNI, no resumption, a client certificate is mandatory, the server
//! refuses another trust domain, the client accepts only the identities it expects.

mod trust;
mod verify;

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    sign::CertifiedKey,
    version::TLS13,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub use trust::{ReadList, Trust};
use verify::{PeerVerifier, SingleCertificate};
pub use verify::{peer_identity, uri_identities};

use crate::id::SpiffeId;

/// The only application protocol spoken.
pub const ALPN: &[u8] = b"h2";

/// Why a certificate or a configuration is unusable.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the TLS library refused the configuration")]
    Configuration(#[from] rustls::Error),
    #[error("a trusted root is unusable: {0}")]
    Root(String),
    #[error("a revocation list is unusable: {0}")]
    Revocations(String),
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    #[error("the certificate is for {found:?}, not for {wanted}")]
    WrongIdentity { wanted: SpiffeId, found: Vec<String> },
    #[error("the certificate chain is empty")]
    EmptyChain,
}

/// How keys are agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum KeyExchange {
    /// X25519MLKEM768 first; peers that do not know it get X25519 or a NIST curve.
    #[default]
    Hybrid,
    /// X25519MLKEM768 and nothing else.
    PqcOnly,
    /// X25519 and NIST curves only.
    ClassicOnly,
}

/// A private key, its certificate chain, and whom its peers are believed.
#[derive(Debug)]
pub struct Credentials {
    pub identity: SpiffeId,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub serial: String,
    key: Arc<CertifiedKey>,
    trust: Arc<Trust>,
    server: Arc<ServerConfig>,
}

impl Credentials {
    /// Checks that the chain is for `identity` and prepares the server side.
    pub fn new(
        identity: SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        trust: Arc<Trust>,
    ) -> Result<Self, TlsError> {
        let leaf = chain.first().ok_or(TlsError::EmptyChain)?;
        let found = uri_identities(leaf);
        if !found.contains(&identity) {
            let found = found.iter().map(ToString::to_string).collect();
            return Err(TlsError::WrongIdentity { wanted: identity, found });
        }
        let Described { not_before, not_after, serial, .. } = Described::read(leaf)?;
        let provider = provider(trust.key_exchange());
        let key = Arc::new(CertifiedKey::from_der(chain, key, &provider)?);
        let server = Arc::new(server_config(&provider, key.clone(), trust.clone())?);
        Ok(Self { identity, not_before, not_after, serial, key, trust, server })
    }

    /// The configuration to accept HBONE connections with.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    pub fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// A configuration to dial a peer that must present one of these identities.
    pub fn client(&self, expected: Vec<SpiffeId>) -> Result<ClientConfig, TlsError> {
        let provider = provider(self.trust.key_exchange());
        let verifier = PeerVerifier::new(self.trust.clone(), expected, &provider);
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

    /// Whether it is not valid yet: whoever issued it has, or had, a clock that is ahead.
    pub fn is_early(&self, now: SystemTime) -> bool {
        now < self.not_before
    }

    /// The certificates of the chain, leaf first.
    pub fn chain(&self) -> Vec<Described> {
        self.key.cert.iter().filter_map(|der| Described::read(der).ok()).collect()
    }

    /// The leaf certificate.
    pub fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.key.cert.first()
    }
}

/// A certificate as PEM.
pub fn pem(der: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect::<Vec<_>>().join("\n");
    format!("-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n")
}

/// What a certificate says of itself, for people.
#[derive(Debug, Clone)]
pub struct Described {
    pub pem: String,
    /// As hexadecimal octets, with colons between them.
    pub serial: String,
    /// As a decimal number.
    pub serial_number: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Described {
    pub(crate) fn read(der: &[u8]) -> Result<Self, TlsError> {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|e| TlsError::Certificate(e.to_string()))?;
        let validity = parsed.validity();
        Ok(Self {
            pem: pem(der),
            serial: parsed.raw_serial_as_string(),
            serial_number: parsed.serial.to_string(),
            not_before: system_time(validity.not_before),
            not_after: system_time(validity.not_after),
        })
    }
}

fn system_time(time: x509_parser::time::ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
}

/// The certificates in a PEM text.
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| TlsError::Certificate(e.to_string()))
}

/// An authenticated connection, dialled or accepted.
pub type ClientStream<T> = tokio_rustls::client::TlsStream<T>;
pub type ServerStream<T> = tokio_rustls::server::TlsStream<T>;

/// The other end of a mesh connection.
#[derive(Debug)]
pub struct Peer {
    pub identity: SpiffeId,
    /// Its certificates, its own first.
    pub chain: Vec<CertificateDer<'static>>,
}

impl Peer {
    fn of(chain: Option<&[CertificateDer<'_>]>) -> io::Result<Self> {
        // The verifier lets nobody through without one.
        let missing = || io::Error::other(rustls::Error::NoCertificatesPresented);
        let identity = peer_identity(chain).ok_or_else(missing)?;
        Ok(Self { identity, chain: chain.unwrap_or_default().iter().map(|c| c.clone().into_owned()).collect() })
    }
}

/// Shakes hands as the client: presents `credentials` and accepts only a peer that is `expected`.
pub async fn connect<T>(credentials: &Credentials, expected: SpiffeId, io: T) -> io::Result<(ClientStream<T>, Peer)>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let config = credentials.client(vec![expected]).map_err(io::Error::other)?;
    // The TLS library wants a name for a connection that sends and checks none.
    let nameless = ServerName::IpAddress(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED).into());
    let stream = TlsConnector::from(Arc::new(config)).connect(nameless, io).await?;
    let session = stream.get_ref().1;
    check_alpn(session.alpn_protocol())?;
    let peer = Peer::of(session.peer_certificates())?;
    Ok((stream, peer))
}

/// Shakes hands as the server; also returns who the client is.
pub async fn accept<T>(credentials: &Credentials, io: T) -> io::Result<(ServerStream<T>, Peer)>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let stream = TlsAcceptor::from(credentials.server()).accept(io).await?;
    let session = stream.get_ref().1;
    check_alpn(session.alpn_protocol())?;
    let peer = Peer::of(session.peer_certificates())?;
    Ok((stream, peer))
}

/// Application protocols a server of the outside is offered.
pub const HTTP2: &[&[u8]] = &[b"h2"];
pub const HTTP1: &[&[u8]] = &[b"http/1.1"];

/// Shakes hands with a server that is known by a DNS name or address and to one of these authorities: a certificate
/// authority's service, or the Kubernetes API.
pub async fn connect_named<T>(name: &str, roots: &[CertificateDer<'static>], protocols: &[&[u8]], io: T) -> io::Result<ClientStream<T>>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let mut store = RootCertStore::empty();
    // One that is of no use takes nothing from the others.
    let (usable, _) = store.add_parsable_certificates(roots.iter().cloned());
    if usable == 0 {
        return Err(io::Error::other("none of the root certificates can be used"));
    }
    let mut config = ClientConfig::builder_with_provider(provider(KeyExchange::Hybrid))
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
    TlsConnector::from(Arc::new(config)).connect(name, io).await
}

/// Accepts connections of clients that prove themselves in another way, and speak HTTP/2.
pub struct NamedServer(TlsAcceptor);

impl NamedServer {
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, TlsError> {
        let mut config = ServerConfig::builder_with_provider(provider(KeyExchange::Hybrid))
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    pub async fn accept<T>(&self, io: T) -> io::Result<ServerStream<T>>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        self.0.accept(io).await
    }
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

fn server_config(provider: &Arc<CryptoProvider>, key: Arc<CertifiedKey>, trust: Arc<Trust>) -> Result<ServerConfig, TlsError> {
    let verifier = PeerVerifier::new(trust, Vec::new(), provider);
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertificate(key)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The cryptography of the mesh: AES-GCM only, the hybrid post-quantum exchange first.
fn provider(key_exchange: KeyExchange) -> Arc<CryptoProvider> {
    use std::sync::LazyLock;

    use aws_lc_rs::{cipher_suite, kx_group};
    fn with(kx_groups: Vec<&'static dyn rustls::crypto::SupportedKxGroup>) -> Arc<CryptoProvider> {
        Arc::new(CryptoProvider {
            cipher_suites: vec![cipher_suite::TLS13_AES_256_GCM_SHA384, cipher_suite::TLS13_AES_128_GCM_SHA256],
            kx_groups,
            ..aws_lc_rs::default_provider()
        })
    }
    static HYBRID: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| with(vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1]));
    static PQC: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| with(vec![kx_group::X25519MLKEM768]));
    static CLASSIC: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| with(vec![kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1]));
    match key_exchange {
        KeyExchange::Hybrid => HYBRID.clone(),
        KeyExchange::PqcOnly => PQC.clone(),
        KeyExchange::ClassicOnly => CLASSIC.clone(),
    }
}

/// What went wrong in a handshake, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HandshakeFailure {
    /// The peer is not speaking TLS, or not ours.
    Protocol,
    /// The peer presented no certificate.
    NoCertificate,
    /// The peer's certificate is expired.
    Expired,
    /// The peer's certificate is not valid yet: one of the two clocks is wrong.
    NotValidYet,
    /// The peer's certificate has been revoked.
    Revoked,
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
    pub const ALL: [Self; 9] = [
        Self::Protocol,
        Self::NoCertificate,
        Self::Expired,
        Self::NotValidYet,
        Self::Revoked,
        Self::Untrusted,
        Self::WrongIdentity,
        Self::RefusedByPeer,
        Self::Io,
    ];

    /// Reads the reason out of what the TLS library reports.
    pub fn of(error: &std::io::Error) -> Self {
        use rustls::{CertificateError, Error};
        match error.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
            Some(Error::NoCertificatesPresented) => Self::NoCertificate,
            Some(Error::InvalidCertificate(e)) => match e {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotValidYet,
                CertificateError::Revoked => Self::Revoked,
                CertificateError::Other(other) if other.0.is::<verify::Unverified>() => Self::Untrusted,
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
            Self::NotValidYet => "not_valid_yet",
            Self::Revoked => "revoked",
            Self::Untrusted => "untrusted",
            Self::WrongIdentity => "wrong_identity",
            Self::RefusedByPeer => "refused_by_peer",
            Self::Io => "io",
        }
    }
}

#[cfg(test)]
mod tests;
