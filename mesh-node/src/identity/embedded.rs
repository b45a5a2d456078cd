//! The embedded CA: a self-signed root kept in a directory, for a mesh without a certificate authority of its own.
//!
//! The root is made by whoever comes first (under a file lock) and then shared by all that see the directory. The key
//! file is readable by its owner only.

use std::{
    fs::{self, File, OpenOptions},
    future::Future,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use nix::fcntl::{Flock, FlockArg};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    SanType,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use super::{CertificateSource, IssueError};
use crate::{
    id::{SpiffeId, TrustDomain},
    tls::Credentials,
};

const KEY_FILE: &str = "root-key.pem";
const CERT_FILE: &str = "root-cert.pem";
const LOCK_FILE: &str = "lock";
const ROOT_LIFE: Duration = Duration::from_hours(87600);
/// Certificates are valid from a little before they are made, for peers whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_mins(1);

/// Signs for one trust domain with a root kept in a directory.
#[derive(Debug)]
pub struct EmbeddedCa {
    trust_domain: TrustDomain,
    ttl: Duration,
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    roots: Arc<RootCertStore>,
}

impl EmbeddedCa {
    /// Opens the CA in `dir`, making its root if there is none. Certificates live for `ttl`.
    pub fn open(dir: &Path, trust_domain: TrustDomain, ttl: Duration) -> Result<Self, IssueError> {
        fs::create_dir_all(dir).map_err(state("created", dir))?;
        let lock_path = dir.join(LOCK_FILE);
        let lock = File::create(&lock_path).map_err(state("locked", &lock_path))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| state("locked", &lock_path)(e.into()))?;
        let (key_path, cert_path) = (dir.join(KEY_FILE), dir.join(CERT_FILE));
        if !key_path.exists() && !cert_path.exists() {
            make_root(&trust_domain, &key_path, &cert_path)?;
        }
        let key_pem = fs::read_to_string(&key_path).map_err(state("read", &key_path))?;
        let cert_pem = fs::read_to_string(&cert_path).map_err(state("read", &cert_path))?;
        Self::from_pem(&key_pem, &cert_pem, trust_domain, ttl)
            .map_err(|problem| IssueError::Corrupt { path: dir.display().to_string(), problem })
    }

    fn from_pem(key_pem: &str, cert_pem: &str, trust_domain: TrustDomain, ttl: Duration) -> Result<Self, String> {
        let key = KeyPair::from_pem(key_pem).map_err(|e| format!("{KEY_FILE}: {e}"))?;
        let issuer = Issuer::from_ca_cert_pem(cert_pem, key).map_err(|e| format!("{CERT_FILE}: {e}"))?;
        let root = CertificateDer::from_pem_slice(cert_pem.as_bytes()).map_err(|e| format!("{CERT_FILE}: {e}"))?;
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).map_err(|e| format!("{CERT_FILE}: {e}"))?;
        Ok(Self { trust_domain, ttl, issuer, root, roots: Arc::new(roots) })
    }

    /// The root certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    fn sign(&self, id: &SpiffeId, now: SystemTime) -> Result<Credentials, IssueError> {
        if *id.trust_domain() != self.trust_domain {
            return Err(IssueError::ForeignTrustDomain { id: id.clone(), trust_domain: self.trust_domain.to_string() });
        }
        let validity = (whole_seconds(now - CLOCK_SKEW), whole_seconds(now + self.ttl));
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        (params.not_before, params.not_after) = (validity.0.into(), validity.1.into());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        let private = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        // The root goes along: a peer that knows it needs no more, and tools show a full chain.
        let chain = vec![leaf.der().clone(), self.root.clone()];
        Ok(Credentials::new(id.clone(), validity, chain, private, self.roots.clone())?)
    }
}

impl CertificateSource for EmbeddedCa {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Pin<Box<dyn Future<Output = Result<Credentials, IssueError>> + Send + 'a>> {
        // One P-256 key and signature: tens of microseconds, not worth another thread.
        Box::pin(async move { self.sign(id, SystemTime::now()) })
    }
}

fn state(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IssueError {
    let path = path.display().to_string();
    move |source| IssueError::State { path, what, source }
}

/// Certificates carry whole seconds.
fn whole_seconds(t: SystemTime) -> SystemTime {
    let since = t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

fn make_root(trust_domain: &TrustDomain, key_path: &Path, cert_path: &Path) -> Result<(), IssueError> {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    params.distinguished_name.push(DnType::CommonName, "mesh-node root");
    (params.not_before, params.not_after) = ((now - CLOCK_SKEW).into(), (now + ROOT_LIFE).into());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let cert = params.self_signed(&key)?;
    // The key last: a crash in between leaves a certificate without a key, which is reported, not silently replaced.
    write_new(cert_path, cert.pem().as_bytes(), 0o644)?;
    write_new(key_path, key.serialize_pem().as_bytes(), 0o600)
}

/// Writes a file that appears whole or not at all.
fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), IssueError> {
    let temporary: PathBuf = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(state("written", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TTL: Duration = Duration::from_hours(1);

    fn domain() -> TrustDomain {
        TrustDomain::parse("cluster.local").expect("valid")
    }

    #[test]
    fn root_is_made_once_and_its_key_is_private() {
        let dir = tempfile::tempdir().expect("tempdir");
        let ca = dir.path().join("ca");
        let roots = std::thread::scope(|s| {
            let open = || EmbeddedCa::open(&ca, domain(), TTL).expect("open").root().clone();
            let all = (0..4).map(|_| s.spawn(open)).collect::<Vec<_>>();
            all.into_iter().map(|t| t.join().expect("joined")).collect::<Vec<_>>()
        });
        assert!(roots.windows(2).all(|w| w[0] == w[1]));
        let mode = fs::metadata(ca.join(KEY_FILE)).expect("key file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn damaged_state_is_reported_and_never_replaced() {
        let dir = tempfile::tempdir().expect("tempdir");
        EmbeddedCa::open(dir.path(), domain(), TTL).expect("open");
        fs::write(dir.path().join(KEY_FILE), "garbage").expect("write");
        let error = EmbeddedCa::open(dir.path(), domain(), TTL).expect_err("must fail").to_string();
        assert!(error.contains(KEY_FILE) && error.contains("restore it"), "{error}");
        fs::remove_file(dir.path().join(KEY_FILE)).expect("remove");
        assert!(EmbeddedCa::open(dir.path(), domain(), TTL).is_err());
    }

    #[test]
    fn certificate_is_for_the_identity_and_the_time_asked() {
        let dir = tempfile::tempdir().expect("tempdir");
        let ca = EmbeddedCa::open(dir.path(), domain(), TTL).expect("open");
        let id = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/b").expect("valid");
        let now = SystemTime::now();
        let credentials = ca.sign(&id, now).expect("signed");
        assert_eq!(crate::tls::uri_identities(credentials.certificate().expect("leaf")), [id]);
        assert!(!credentials.is_expired(now) && credentials.is_expired(now + TTL));
        let half = credentials.renew_in(now, 0.0);
        assert!(half > TTL.mul_f64(0.45) && half < TTL.mul_f64(0.55), "{half:?}");
        let foreign = SpiffeId::parse("spiffe://elsewhere/ns/a/sa/b").expect("valid");
        assert!(ca.sign(&foreign, now).is_err());
    }
}
