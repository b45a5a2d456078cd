//! The embedded CA: the node signs for its pods itself, with a root kept in a directory that the nodes of a mesh share. For a
//! mesh without a certificate authority of its own.
//!
//! The directory is looked at again every few seconds: roots that are added are trusted at once, and a new signing key makes
//! all certificates be had anew.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::Mutex;

use super::{Authority, Boxed, CertificateSource, IssueError, authority::Stamp};
use crate::{
    id::{SpiffeId, TrustDomain},
    problems,
    telemetry::chain,
    tls::{Credentials, Trust},
};

/// How often the directory is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Signs with an authority kept in a directory.
#[derive(Debug)]
pub struct EmbeddedCa {
    dir: PathBuf,
    domain: TrustDomain,
    ttl: Duration,
    trust: Arc<Trust>,
    authority: ArcSwap<Authority>,
    seen: Mutex<Stamp>,
}

impl EmbeddedCa {
    /// Opens the authority in `dir`, making its root if there is none. Certificates live for `ttl`.
    pub fn open(dir: &Path, domain: TrustDomain, trust: Arc<Trust>, ttl: Duration) -> Result<Self, IssueError> {
        let authority = Authority::open(dir, domain.clone())?;
        let seen = authority.stamp.clone();
        trust.set_roots(authority.roots())?;
        // What cannot be verified yet may be some day, and connections that need no certificate go on without.
        tell_of(&authority);
        Ok(Self { dir: dir.to_owned(), domain, ttl, trust, authority: ArcSwap::from_pointee(authority), seen: Mutex::new(seen) })
    }

    /// The root that signs.
    pub fn root(&self) -> CertificateDer<'static> {
        self.authority.load().roots()[0].clone()
    }

    fn sign(&self, id: &SpiffeId) -> Result<Credentials, IssueError> {
        let (key, chain) = self.authority.load().issue(id, self.ttl)?;
        let private = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok(Credentials::new(id.clone(), chain, private, self.trust.clone())?)
    }

    /// Takes in what has changed in the directory. True when something else signs now.
    async fn reload(&self) -> bool {
        let mut seen = self.seen.lock().await;
        if *seen == Authority::stamp(&self.dir) {
            // It may have been away, and is as it was; but time goes on.
            tell_of(&self.authority.load());
            return false;
        }
        // Files that do not fit together yet are looked at again; until then everything stays as it was.
        let loaded = Authority::load(&self.dir, self.domain.clone()).and_then(|authority| {
            authority.check()?;
            Ok((self.trust.set_roots(authority.roots())?, authority))
        });
        match loaded {
            Ok((roots, authority)) => {
                tracing::info!(target: "identity", directory = %self.dir.display(), roots = authority.roots().len(), roots_changed = roots, "CA state read again");
                *seen = authority.stamp.clone();
                problems::solved(problems::Kind::Authority, "");
                self.authority.store(Arc::new(authority));
                true
            }
            Err(error) => {
                let error = chain(&error);
                let told = format!("error: the state of the CA cannot be read again; what was read before stays in use: {error}");
                if problems::found(problems::Kind::Authority, "", told) {
                    tracing::warn!(target: "identity", error, "CA state cannot be read again; what was read before stays in use");
                }
                false
            }
        }
    }
}

/// Says whether what an authority signs can be verified now.
pub(super) fn tell_of(authority: &Authority) {
    match authority.check() {
        Ok(()) => problems::solved(problems::Kind::Authority, ""),
        Err(error) => {
            problems::found(problems::Kind::Authority, "", format!("error: {}", chain(&error)));
        }
    }
}

impl CertificateSource for EmbeddedCa {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Boxed<'a, Result<Credentials, IssueError>> {
        // One P-256 key and signature: tens of microseconds, not worth another thread.
        Box::pin(async move { self.sign(id) })
    }

    fn changed(&self) -> Boxed<'_, ()> {
        Box::pin(async move {
            loop {
                tokio::time::sleep(CHECK_INTERVAL).await;
                if self.reload().await {
                    return;
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::{policy::TrustDomains, tls::KeyExchange};

    const TTL: Duration = Duration::from_hours(1);

    fn open(dir: &Path) -> EmbeddedCa {
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let trust = Trust::new(TrustDomains { local: domain.clone(), aliases: Vec::new() }, KeyExchange::default());
        EmbeddedCa::open(dir, domain, trust, TTL).expect("open")
    }

    #[test]
    fn certificate_is_for_the_identity_and_the_time_asked() {
        let dir = tempfile::tempdir().expect("tempdir");
        let ca = open(dir.path());
        let id = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/b").expect("valid");
        let now = SystemTime::now();
        let credentials = ca.sign(&id).expect("signed");
        assert_eq!(crate::tls::uri_identities(credentials.certificate().expect("leaf")), [id]);
        assert!(!credentials.is_expired(now) && credentials.is_expired(now + TTL + Duration::from_secs(2)));
        let half = credentials.renew_in(now, 0.0);
        assert!(half > TTL.mul_f64(0.45) && half < TTL.mul_f64(0.55), "{half:?}");
        let foreign = SpiffeId::parse("spiffe://elsewhere/ns/a/sa/b").expect("valid");
        assert!(ca.sign(&foreign).is_err());
    }

    #[tokio::test]
    async fn roots_are_rotated_by_what_is_in_the_directory() {
        let (dir, other) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
        let (ca, next) = (open(dir.path()), open(other.path()));
        let (old, new) = (ca.root(), next.root());
        assert!(!ca.reload().await);
        let copy = |from: &Path, name: &str, to: &str| std::fs::copy(from.join(name), dir.path().join(to)).expect("copied");
        copy(other.path(), "root-cert.pem", "trusted-roots.pem");
        assert!(ca.reload().await && ca.trust.roots() == 2 && ca.root() == old);
        // Half of the change is none.
        copy(dir.path(), "root-cert.pem", "old.pem");
        copy(other.path(), "root-key.pem", "root-key.pem");
        assert!(!ca.reload().await && ca.root() == old);
        copy(dir.path(), "old.pem", "trusted-roots.pem");
        copy(other.path(), "root-cert.pem", "root-cert.pem");
        assert!(ca.reload().await && ca.trust.roots() == 2 && ca.root() == new);
        std::fs::remove_file(dir.path().join("trusted-roots.pem")).expect("removed");
        assert!(ca.reload().await && ca.trust.roots() == 1);
    }
}
