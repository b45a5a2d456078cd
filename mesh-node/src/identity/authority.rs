//! A certificate authority's key and certificates, kept in a directory: what the embedded source and the service sign with.
//!
//! The directory is either made here, with a root of its own (under a file lock, so that whoever comes first makes it for
//! all who see the directory), or filled by an operator with an intermediate, named as in Istio's secret `cacerts`. Key
//! files are readable by their owner only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::fcntl::{Flock, FlockArg};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls::pki_types::CertificateDer;

use super::IssueError;
use crate::{
    id::{SpiffeId, TrustDomain},
    policy::TrustDomains,
    tls,
};

/// A root of one's own.
const ROOT_KEY: &str = "root-key.pem";
const ROOT_CERT: &str = "root-cert.pem";
/// An operator's intermediate: its key, its certificate, and what leads from it to the root in `root-cert.pem`.
const CA_KEY: &str = "ca-key.pem";
const CA_CERT: &str = "ca-cert.pem";
const CHAIN: &str = "cert-chain.pem";
/// More roots that are trusted: the next one before it signs, the last one until nothing of it is in use.
const MORE_ROOTS: &str = "trusted-roots.pem";
const LOCK_FILE: &str = "lock";
const ROOT_LIFE: Duration = Duration::from_hours(87600);
/// Certificates are valid from a little before they are made, for peers whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_mins(1);

/// Signs for one trust domain.
#[derive(Debug)]
pub struct Authority {
    /// Of its directory when it was read.
    pub stamp: Stamp,
    trust_domain: TrustDomain,
    issuer: Issuer<'static, KeyPair>,
    /// What follows a certificate in its chain.
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    /// When the first of the certificates expires that what it signs depends on.
    until: Option<SystemTime>,
}

/// What tells one state of the directory from another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stamp(Vec<(PathBuf, u64, i64, i64, u64)>);

impl Stamp {
    /// The state of some files now. Files that are not there have none.
    pub fn of(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let one = |path: PathBuf| fs::metadata(&path).ok().map(|m| (path, m.ino(), m.mtime(), m.mtime_nsec(), m.size()));
        Self(paths.into_iter().filter_map(one).collect())
    }
}

impl Authority {
    /// The state of a directory now.
    pub fn stamp(dir: &Path) -> Stamp {
        Stamp::of([ROOT_KEY, ROOT_CERT, CA_KEY, CA_CERT, CHAIN, MORE_ROOTS].map(|name| dir.join(name)))
    }

    /// Opens the authority in `dir`, making its root if there is nothing.
    pub fn open(dir: &Path, trust_domain: TrustDomain) -> Result<Self, IssueError> {
        fs::create_dir_all(dir).map_err(state("created", dir))?;
        // Where there is something nothing is made, and nothing needs to be written: it may be a mounted Secret.
        if ![CA_KEY, ROOT_KEY].iter().any(|name| dir.join(name).exists()) {
            let lock_path = dir.join(LOCK_FILE);
            let lock = File::create(&lock_path).map_err(state("locked", &lock_path))?;
            let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| state("locked", &lock_path)(e.into()))?;
            let (key_path, cert_path) = (dir.join(ROOT_KEY), dir.join(ROOT_CERT));
            if !key_path.exists() && !cert_path.exists() {
                make_root(&trust_domain, &key_path, &cert_path)?;
            }
        }
        Self::load(dir, trust_domain)
    }

    /// Reads the authority in `dir`.
    pub fn load(dir: &Path, trust_domain: TrustDomain) -> Result<Self, IssueError> {
        // Before it is read: what changes meanwhile is read again.
        let stamp = Self::stamp(dir);
        let read = |name: &str| fs::read_to_string(dir.join(name)).map_err(state("read", &dir.join(name)));
        let corrupt = |problem: String| IssueError::Corrupt { path: dir.display().to_string(), problem };
        let listed = |name: &str, text: &str| {
            let found = tls::certificates(text.as_bytes()).map_err(|e| corrupt(format!("{name}: {}", crate::telemetry::chain(&e))))?;
            if found.is_empty() { Err(corrupt(format!("{name}: holds no certificate"))) } else { Ok(found) }
        };
        let intermediate = dir.join(CA_KEY).exists();
        let (key_name, cert_name) = if intermediate { (CA_KEY, CA_CERT) } else { (ROOT_KEY, ROOT_CERT) };
        let key = KeyPair::from_pem(private_key(&read(key_name)?)).map_err(|e| corrupt(format!("{key_name}: {e}")))?;
        let cert_pem = read(cert_name)?;
        let signer = listed(cert_name, &cert_pem)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&signer[0]).map_err(|e| corrupt(format!("{cert_name}: {e}")))?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(corrupt(format!("{cert_name}: is not of the key in {key_name}")));
        }
        let issuer = Issuer::from_ca_cert_der(&signer[0], key).map_err(|e| corrupt(format!("{cert_name}: {e}")))?;
        let mut roots = listed(ROOT_CERT, &read(ROOT_CERT)?)?;
        let mut chain = vec![signer[0].clone()];
        // Istio's own secret has an empty one where a root signs.
        let between = if intermediate && dir.join(CHAIN).exists() { read(CHAIN)? } else { String::new() };
        if !between.trim().is_empty() {
            let more = listed(CHAIN, &between)?;
            chain.extend(more.into_iter().filter(|c| !roots.contains(c) && *c != signer[0]));
        }
        if dir.join(MORE_ROOTS).exists() {
            roots.extend(listed(MORE_ROOTS, &read(MORE_ROOTS)?)?);
        }
        let expires = |der: &CertificateDer<'_>| tls::Described::read(der).ok().map(|d| d.not_after);
        let root = chain.last().and_then(|top| roots.iter().filter(|root| is_issued_by(top, root)).filter_map(&expires).max());
        let until = chain.iter().filter_map(expires).chain(root).min();
        Ok(Self { stamp, trust_domain, issuer, chain, roots, until })
    }

    /// Whether what it signs can be verified by who trusts its roots, now.
    pub fn check(&self) -> Result<(), IssueError> {
        let trust = tls::Trust::new(TrustDomains { local: self.trust_domain.clone(), aliases: Vec::new() }, tls::KeyExchange::default());
        trust.set_roots(&self.roots)?;
        let id = SpiffeId::new(&self.trust_domain, "mesh-node", "check").map_err(|e| IssueError::Unusable(e.to_string()))?;
        let (_, chain) = self.issue(&id, Duration::from_hours(1))?;
        trust.check(&chain).map_err(|e| IssueError::Unusable(e.to_string()))
    }

    /// Everybody's roots, the one that signs first.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// A new key and the chain of its certificate.
    pub fn issue(&self, id: &SpiffeId, ttl: Duration) -> Result<(KeyPair, Vec<CertificateDer<'static>>), IssueError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let chain = self.sign(id, &key, ttl)?;
        Ok((key, chain))
    }

    /// A chain for somebody else's key, whose owner has proved that they have it by signing the request.
    pub fn sign_request(
        &self,
        id: &SpiffeId,
        request: &CertificateSigningRequestParams,
        ttl: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        self.sign(id, &request.public_key, ttl)
    }

    /// A key and chain for a server that is known by DNS names.
    pub fn issue_server(&self, names: &[String], ttl: Duration) -> Result<(KeyPair, Vec<CertificateDer<'static>>), IssueError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        let chain = self.finish(params, &key, ttl)?;
        Ok((key, chain))
    }

    fn sign(&self, id: &SpiffeId, key: &impl PublicKeyData, ttl: Duration) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        if *id.trust_domain() != self.trust_domain {
            return Err(IssueError::ForeignTrustDomain { id: id.clone(), trust_domain: self.trust_domain.to_string() });
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        self.finish(params, key, ttl)
    }

    fn finish(
        &self,
        mut params: CertificateParams,
        key: &impl PublicKeyData,
        ttl: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let now = SystemTime::now();
        // No longer than what it depends on: who looks at it is to see when it ends.
        let until = self.until.filter(|until| *until > now).map_or(now + ttl, |until| until.min(now + ttl));
        (params.not_before, params.not_after) = (whole_seconds(now - CLOCK_SKEW).into(), whole_seconds(until).into());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(key, &self.issuer)?;
        // What signed goes along: a peer that knows it needs no more, and tools show a full chain.
        Ok([leaf.der().clone()].into_iter().chain(self.chain.iter().cloned()).collect())
    }
}

/// Whether one names the other as who issued it.
fn is_issued_by(certificate: &CertificateDer<'_>, issuer: &CertificateDer<'_>) -> bool {
    let read = |der| x509_parser::parse_x509_certificate(der).ok().map(|(_, parsed)| parsed);
    read(certificate).zip(read(issuer)).is_some_and(|(one, other)| one.issuer().as_raw() == other.subject().as_raw())
}

/// The private key of a file that may have something before it, as those of OpenSSL's `ecparam` do.
fn private_key(pem: &str) -> &str {
    let mut begins = pem.match_indices("-----BEGIN ").map(|(at, _)| at);
    let key = begins.find(|at| pem[*at..].lines().next().is_some_and(|line| line.contains("PRIVATE KEY")));
    key.map_or(pem, |at| &pem[at..])
}

pub(super) fn state(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IssueError {
    let path = path.display().to_string();
    move |source| IssueError::State { path, what, source }
}

/// Certificates carry whole seconds.
fn whole_seconds(t: SystemTime) -> SystemTime {
    let since = t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

pub(super) fn make_root(trust_domain: &TrustDomain, key_path: &Path, cert_path: &Path) -> Result<(), IssueError> {
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

    fn domain() -> TrustDomain {
        TrustDomain::parse("cluster.local").expect("valid")
    }

    fn id() -> SpiffeId {
        SpiffeId::parse("spiffe://cluster.local/ns/a/sa/b").expect("valid")
    }

    #[test]
    fn root_is_made_once_and_its_key_is_private() {
        let dir = tempfile::tempdir().expect("tempdir");
        let ca = dir.path().join("ca");
        let roots = std::thread::scope(|s| {
            let open = || Authority::open(&ca, domain()).expect("open").roots()[0].clone();
            let all = (0..4).map(|_| s.spawn(open)).collect::<Vec<_>>();
            all.into_iter().map(|t| t.join().expect("joined")).collect::<Vec<_>>()
        });
        assert!(roots.windows(2).all(|w| w[0] == w[1]));
        let mode = fs::metadata(ca.join(ROOT_KEY)).expect("key file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn damaged_state_is_reported_and_never_replaced() {
        let dir = tempfile::tempdir().expect("tempdir");
        Authority::open(dir.path(), domain()).expect("open");
        fs::write(dir.path().join(ROOT_KEY), "garbage").expect("write");
        let error = Authority::open(dir.path(), domain()).expect_err("must fail").to_string();
        assert!(error.contains(ROOT_KEY) && error.contains("restore it"), "{error}");
        // A key of somebody else is as bad.
        fs::write(dir.path().join(ROOT_KEY), KeyPair::generate().expect("key").serialize_pem()).expect("write");
        let error = Authority::open(dir.path(), domain()).expect_err("must fail").to_string();
        assert!(error.contains("is not of the key"), "{error}");
        fs::remove_file(dir.path().join(ROOT_KEY)).expect("remove");
        assert!(Authority::open(dir.path(), domain()).is_err());
    }

    #[test]
    fn an_operators_intermediate_signs_and_its_root_is_trusted() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root_dir = dir.path().join("root");
        make(&root_dir);
        let root = Authority::open(&root_dir, domain()).expect("root");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let intermediate = params.signed_by(&key, &root.issuer).expect("signed");
        let ca = dir.path().join("ca");
        make(&ca);
        for (name, text) in [
            (CA_KEY, key.serialize_pem()),
            (CA_CERT, intermediate.pem()),
            (CHAIN, intermediate.pem()),
            (ROOT_CERT, fs::read_to_string(root_dir.join(ROOT_CERT)).expect("root")),
        ] {
            fs::write(ca.join(name), text).expect("written");
        }
        let authority = Authority::open(&ca, domain()).expect("open");
        let (_, chain) = authority.issue(&id(), Duration::from_hours(1)).expect("issued");
        assert_eq!((chain.len(), authority.roots()), (2, root.roots()));
        let trust = tls::Trust::new(crate::policy::TrustDomains { local: domain(), aliases: Vec::new() }, tls::KeyExchange::default());
        trust.set_roots(authority.roots()).expect("roots");
        let foreign = SpiffeId::parse("spiffe://elsewhere/ns/a/sa/b").expect("valid");
        assert!(authority.issue(&foreign, Duration::from_hours(1)).is_err());
    }

    /// An authority below a root, made by `change` what it is.
    fn intermediate(dir: &Path, change: impl FnOnce(&mut CertificateParams)) -> Result<Authority, IssueError> {
        let root = Authority::open(&dir.join("root"), domain()).expect("root");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        change(&mut params);
        let signer = params.signed_by(&key, &root.issuer).expect("signed");
        let ca = dir.join("ca");
        make(&ca);
        // As OpenSSL's `ecparam` and Istio write them.
        let key = format!("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n{}", key.serialize_pem());
        let root = fs::read_to_string(dir.join("root").join(ROOT_CERT)).expect("root");
        for (name, text) in [(CA_KEY, key), (CA_CERT, signer.pem()), (CHAIN, "\n".to_owned()), (ROOT_CERT, root)] {
            fs::write(ca.join(name), text).expect("written");
        }
        Authority::open(&ca, domain())
    }

    #[test]
    fn what_nobody_would_believe_is_found_out() {
        let hour = Duration::from_hours(1);
        let now = SystemTime::now();
        let check = |change: &dyn Fn(&mut CertificateParams)| {
            let dir = tempfile::tempdir().expect("tempdir");
            let authority = intermediate(dir.path(), change).expect("read");
            authority.check().map_err(|e| e.to_string())
        };
        assert_eq!(check(&|_| {}), Ok(()));
        for (what, change) in [
            (
                "expired",
                &(|p: &mut CertificateParams| (p.not_before, p.not_after) = ((now - hour * 2).into(), (now - hour).into()))
                    as &dyn Fn(&mut _),
            ),
            ("to come", &|p: &mut CertificateParams| p.not_before = (now + hour).into()),
            ("none that may sign", &|p: &mut CertificateParams| p.is_ca = IsCa::ExplicitNoCa),
        ] {
            let told = check(change);
            assert!(told.as_ref().is_err_and(|e| e.contains("would believe what it signs")), "{what}: {told:?}");
        }
        let (dir, other) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
        intermediate(dir.path(), |_| {}).expect("read");
        Authority::open(other.path(), domain()).expect("another root");
        fs::copy(other.path().join(ROOT_CERT), dir.path().join("ca").join(ROOT_CERT)).expect("copied");
        assert!(Authority::open(&dir.path().join("ca"), domain()).expect("read").check().is_err(), "another root");
    }

    /// As `openssl ecparam -name prime256v1 -genkey` writes them.
    #[test]
    fn a_key_may_have_its_parameters_before_it() {
        const KEY: &str = "-----BEGIN EC PARAMETERS-----
BggqhkjOPQMBBw==
-----END EC PARAMETERS-----
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIH0MTaxMoCK07AHPOWsa1qK/cWbD/ifL5fQNEmwROKgOoAoGCCqGSM49
AwEHoUQDQgAEo5j1Ag3q01ry6Er8YyZP5qQml5WLoVSGjTcjuWgzBe9ibZZPlsHT
/a/5ayOMJbbwjxBlXCBogrFw0quq67rdJA==
-----END EC PRIVATE KEY-----
";
        assert!(KeyPair::from_pem(KEY).is_err() && KeyPair::from_pem(private_key(KEY)).is_ok());
        assert_eq!(private_key("nothing"), "nothing");
    }

    #[test]
    fn what_is_signed_lives_no_longer_than_who_signs() {
        let (dir, now) = (tempfile::tempdir().expect("tempdir"), SystemTime::now());
        let authority = intermediate(dir.path(), |p| p.not_after = (now + Duration::from_secs(100)).into()).expect("read");
        let life = |ttl: u64| {
            let (_, chain) = authority.issue(&id(), Duration::from_secs(ttl)).expect("issued");
            tls::Described::read(&chain[0]).expect("read").not_after.duration_since(now).expect("later").as_secs()
        };
        assert!(life(86_400) <= 100 && life(50) < 60, "{} {}", life(86_400), life(50));
    }

    /// A mounted Secret can be read and not written.
    #[test]
    fn where_there_is_a_root_nothing_is_written() {
        let dir = tempfile::tempdir().expect("tempdir");
        Authority::open(dir.path(), domain()).expect("made");
        fs::remove_file(dir.path().join(LOCK_FILE)).expect("locked while it was made");
        Authority::open(dir.path(), domain()).expect("read");
        assert!(!dir.path().join(LOCK_FILE).exists());
    }

    fn make(dir: &Path) {
        fs::create_dir_all(dir).expect("made");
    }
}
