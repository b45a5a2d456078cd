//! Certificates somebody else makes and puts into files: cert-manager, SPIRE's helper, or an operator.
//!
//! Below the directory: `roots.pem`, and for every identity `NAMESPACE/ACCOUNT/` with `tls.crt` (its chain) and `tls.key`; or,
//! named as Istio names them, `root-cert.pem`, `cert-chain.pem` and `key.pem`. Files are looked at again every few seconds.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use tokio::sync::Mutex;

use super::{
    Boxed, CertificateSource, IssueError,
    authority::{Stamp, state},
};
use crate::{
    id::SpiffeId,
    problems,
    telemetry::chain,
    tls::{self, Credentials, TlsError, Trust},
};

const CHECK_INTERVAL: Duration = Duration::from_secs(2);
const ROOTS: [&str; 2] = ["roots.pem", "root-cert.pem"];
const CHAINS: [&str; 2] = ["tls.crt", "cert-chain.pem"];
const KEYS: [&str; 2] = ["tls.key", "key.pem"];

/// Reads keys and chains from files.
#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
    trust: Arc<Trust>,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    stamp: Stamp,
    /// Roots could not be read again. Nothing need change for them to be the next time.
    failed: bool,
}

impl Files {
    /// Begins with the roots that are there.
    pub fn open(dir: &Path, trust: Arc<Trust>) -> Result<Self, IssueError> {
        // Before they are read: what changes meanwhile is read again.
        let seen = Mutex::new(Seen { stamp: stamp(dir), failed: false });
        let files = Self { dir: dir.to_owned(), trust, seen };
        files.read_roots()?;
        Ok(files)
    }

    fn read_roots(&self) -> Result<(), IssueError> {
        let path = first(&self.dir, &ROOTS)?;
        let text = fs::read(&path).map_err(state("read", &path))?;
        self.trust.set_roots(&tls::certificates(&text)?)?;
        Ok(())
    }

    fn read(&self, id: &SpiffeId) -> Result<Credentials, IssueError> {
        let dir = self.dir.join(id.namespace()).join(id.service_account());
        let (chain, key) = (first(&dir, &CHAINS)?, first(&dir, &KEYS)?);
        let chain = tls::certificates(&fs::read(&chain).map_err(state("read", &chain))?)?;
        let text = fs::read(&key).map_err(state("read", &key))?;
        let key = PrivateKeyDer::from_pem_slice(&text).map_err(|e| TlsError::Certificate(format!("{}: {e}", key.display())))?;
        Ok(Credentials::new(id.clone(), chain, key, self.trust.clone())?)
    }
}

/// Everything below the directory, two levels deep.
fn stamp(dir: &Path) -> Stamp {
    let mut paths = Vec::new();
    for namespace in list(dir) {
        for account in list(&namespace) {
            paths.extend(list(&account));
        }
        paths.push(namespace);
    }
    Stamp::of(paths)
}

fn list(dir: &Path) -> Vec<PathBuf> {
    let mut all = fs::read_dir(dir).into_iter().flatten().filter_map(|e| Some(e.ok()?.path())).collect::<Vec<_>>();
    all.sort();
    all
}

fn first(dir: &Path, names: &[&str]) -> Result<PathBuf, IssueError> {
    let found = names.iter().map(|n| dir.join(n)).find(|p| p.exists());
    found.ok_or_else(|| IssueError::Missing(format!("{} (nor {})", dir.join(names[0]).display(), names[1..].join(", "))))
}

impl CertificateSource for Files {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Boxed<'a, Result<Credentials, IssueError>> {
        Box::pin(async move { self.read(id) })
    }

    fn changed(&self) -> Boxed<'_, ()> {
        Box::pin(async move {
            loop {
                tokio::time::sleep(CHECK_INTERVAL).await;
                let mut seen = self.seen.lock().await;
                let now = stamp(&self.dir);
                if seen.stamp == now && !seen.failed {
                    continue;
                }
                let changed = std::mem::replace(&mut seen.stamp, now.clone()) != now;
                let read = self.read_roots();
                seen.failed = read.is_err();
                match read {
                    Ok(()) => problems::solved(problems::Kind::Authority, ""),
                    Err(error) => {
                        let error = chain(&error);
                        let told = format!("error: roots cannot be read again; those read before stay trusted: {error}");
                        if problems::found(problems::Kind::Authority, "", told) {
                            tracing::warn!(target: "identity", error, "roots cannot be read again; those read before stay trusted");
                        }
                    }
                }
                if changed || !seen.failed {
                    return;
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{id::TrustDomain, identity::Authority, policy::TrustDomains, tls::KeyExchange};

    #[tokio::test]
    async fn keys_and_chains_are_read_and_read_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let trust = Trust::new(TrustDomains { local: domain.clone(), aliases: Vec::new() }, KeyExchange::default());
        let missing = Files::open(dir.path(), trust.clone()).expect_err("no roots").to_string();
        assert!(missing.contains("roots.pem"), "{missing}");
        let ca = dir.path().join("ca");
        let authority = Authority::open(&ca, domain).expect("authority");
        let files_dir = dir.path().join("files");
        fs::create_dir_all(files_dir.join("a/b")).expect("made");
        fs::copy(ca.join("root-cert.pem"), files_dir.join("roots.pem")).expect("copied");
        let files = Files::open(&files_dir, trust).expect("roots");
        let id = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/b").expect("valid");
        let missing = files.issue(&id).await.expect_err("nothing there").to_string();
        assert!(missing.contains("a/b/tls.crt"), "{missing}");
        let write = || {
            let (key, chain) = authority.issue(&id, Duration::from_hours(1)).expect("issued");
            let pem = chain.iter().map(|c| pem_text(c)).collect::<String>();
            fs::write(files_dir.join("a/b/tls.key"), key.serialize_pem()).expect("written");
            fs::write(files_dir.join("a/b/tls.crt"), pem).expect("written");
        };
        write();
        let one = files.issue(&id).await.expect("there");
        write();
        tokio::time::timeout(CHECK_INTERVAL * 3, files.changed()).await.expect("seen");
        let two = files.issue(&id).await.expect("there");
        assert_ne!(one.serial, two.serial);
        let other = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/c").expect("valid");
        fs::rename(files_dir.join("a/b"), files_dir.join("a/c")).expect("renamed");
        assert!(matches!(files.issue(&other).await, Err(IssueError::Tls(TlsError::WrongIdentity { .. }))));
    }

    fn pem_text(der: &[u8]) -> String {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(der))
    }
}
