//! Mesh peers that are not mesh-node: a client and a server of HBONE made from the libraries alone, which can be told to
//! misbehave. Not built on mesh-node's own HBONE or TLS code, so that a mistake there is not made on both sides.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use mesh_node::io::netns::Netns;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

/// A certificate to present, signed by the bed's CA unless told otherwise.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub uri: String,
    pub lifetime: (SystemTime, SystemTime),
    /// Signed by a root nobody knows.
    pub foreign_root: bool,
}

impl Certificate {
    /// A good one for this SPIFFE ID.
    pub fn of(uri: &str) -> Self {
        let now = SystemTime::now();
        Self { uri: uri.to_owned(), lifetime: (now - Duration::from_mins(1), now + Duration::from_hours(1)), foreign_root: false }
    }

    pub fn expired(mut self) -> Self {
        let now = SystemTime::now();
        self.lifetime = (now - Duration::from_hours(2), now - Duration::from_hours(1));
        self
    }

    pub fn of_foreign_root(mut self) -> Self {
        self.foreign_root = true;
        self
    }

    fn make(&self, ca: &Path) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let (leaf, key) = self.signed(ca)?;
        Ok((vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into())))
    }

    /// Certificate and key in PEM.
    pub fn pem(&self, ca: &Path) -> Result<(String, String)> {
        let (leaf, key) = self.signed(ca)?;
        Ok((leaf.pem(), key.serialize_pem()))
    }

    fn signed(&self, ca: &Path) -> Result<(rcgen::Certificate, KeyPair)> {
        let key =
            if self.foreign_root { KeyPair::generate()? } else { KeyPair::from_pem(&std::fs::read_to_string(ca.join("root-key.pem"))?)? };
        let issuer = Issuer::from_ca_cert_pem(&std::fs::read_to_string(ca.join("root-cert.pem"))?, key)?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(self.uri.as_str().try_into()?)];
        (params.not_before, params.not_after) = (self.lifetime.0.into(), self.lifetime.1.into());
        let leaf_key = KeyPair::generate()?;
        let leaf = params.signed_by(&leaf_key, &issuer)?;
        Ok((leaf, leaf_key))
    }
}

/// Accepts every server: a peer that checks nothing.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// How a client dials an HBONE port.
#[derive(Debug, Clone)]
pub struct Dial<'a> {
    /// Namespace to dial from.
    pub netns: &'a Path,
    /// Directory of the bed's CA.
    pub ca: &'a Path,
    pub certificate: Option<Certificate>,
    pub alpn: &'static [&'static str],
}

/// A TCP connection from inside a namespace.
pub async fn tcp(netns: &Path, to: SocketAddr) -> Result<TcpStream> {
    let netns = Netns::open(netns)?;
    let stream = netns.enter(|| std::net::TcpStream::connect_timeout(&to, Duration::from_secs(5)))??;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream)?)
}

impl Dial<'_> {
    /// TLS up to the end of our side of the handshake; the server's verdict on our certificate comes with the first read.
    pub async fn tls(&self, to: SocketAddr) -> Result<TlsStream<TcpStream>> {
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider())).with_safe_default_protocol_versions()?;
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone));
        let mut config = match &self.certificate {
            None => builder.with_no_client_auth(),
            Some(certificate) => {
                let (chain, key) = certificate.make(self.ca)?;
                builder.with_client_auth_cert(chain, key)?
            }
        };
        config.alpn_protocols = self.alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        config.enable_sni = false;
        let name = ServerName::IpAddress(to.ip().into());
        Ok(TlsConnector::from(Arc::new(config)).connect(name, tcp(self.netns, to).await?).await?)
    }

    /// An HTTP/2 connection, driven in the background.
    pub async fn h2(&self, to: SocketAddr) -> Result<h2::client::SendRequest<Bytes>> {
        let (send, connection) = h2::client::handshake(self.tls(to).await?).await?;
        tokio::spawn(connection);
        Ok(send.ready().await?)
    }

    /// The status of one request, or why there is none.
    pub async fn status(&self, to: SocketAddr, method: Method, uri: &str) -> Result<StatusCode> {
        let mut send = self.h2(to).await?;
        let request = Request::builder().method(method).uri(uri).body(())?;
        let (response, _stream) = send.send_request(request, false)?;
        Ok(tokio::time::timeout(Duration::from_secs(15), response).await.context("no answer")??.status())
    }
}

/// Headers of the requests a server was sent.
pub type Asked = Arc<Mutex<Vec<HeaderMap>>>;

/// A server on the HBONE port of a namespace that presents a certificate and answers every CONNECT with 200 and an echo; with what it
/// is asked.
pub async fn echo_server(
    netns: &Path,
    at: SocketAddr,
    ca: &Path,
    certificate: &Certificate,
    alpn: &[&str],
) -> Result<(tokio::task::JoinHandle<()>, Asked)> {
    let (chain, key) = certificate.make(ca)?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca.join("root-cert.pem"))?)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    let listener = Netns::open(netns)?.enter(|| std::net::TcpListener::bind(at))??;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let asked = Asked::default();
    let of_all = asked.clone();
    let task = tokio::spawn(async move {
        // Ends with the task: its connections must not outlive it.
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, asked) = (acceptor.clone(), of_all.clone());
            connections.spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    let _ = echo_tunnels(stream, &asked).await;
                }
            });
        }
    });
    Ok((task, asked))
}

async fn echo_tunnels(stream: tokio_rustls::server::TlsStream<TcpStream>, asked: &Asked) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        asked.lock().expect("lock").push(request.headers().clone());
        tokio::spawn(async move {
            let mut send = respond.send_response(http::Response::new(()), false).map_err(io::Error::other)?;
            let mut body = request.into_body();
            while let Some(data) = body.data().await {
                let data = data.map_err(io::Error::other)?;
                let _ = body.flow_control().release_capacity(data.len());
                send.send_data(data, false).map_err(io::Error::other)?;
            }
            send.send_data(Bytes::new(), true).map_err(io::Error::other)
        });
    }
    Ok(())
}
