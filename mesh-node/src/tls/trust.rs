//! Whom peers are believed: roots, revocation lists and trust domains, the same for all certificates of the node and
//! replaceable while it runs. What is verified is verified with what is trusted at that moment.

use std::{collections::BTreeSet, sync::Arc, time::SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime, pem::PemObject};
use tokio::sync::watch;
use webpki::{
    BorrowedCertRevocationList, CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::{Described, KeyExchange, TlsError};
use crate::{
    id::{SpiffeId, TrustDomain},
    policy::TrustDomains,
};

/// A revocation list that is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadList {
    /// In which of the texts.
    pub text: usize,
    /// When its issuer meant to have followed it by another, where it says so.
    pub due: Option<SystemTime>,
}

/// What peers are verified with.
#[derive(Debug)]
pub struct Trust {
    domains: ArcSwap<TrustDomains>,
    key_exchange: KeyExchange,
    store: ArcSwap<Store>,
    /// Held by who replaces the store: roots and revocation lists come from different tasks.
    replacing: Mutex<()>,
    generation: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Store {
    certificates: BTreeSet<Vec<u8>>,
    anchors: Arc<Vec<TrustAnchor<'static>>>,
    revocations: Arc<Vec<CertRevocationList<'static>>>,
}

/// What a peer's certificate is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

impl Trust {
    /// Trusts nobody until there are roots.
    pub fn new(domains: TrustDomains, key_exchange: KeyExchange) -> Arc<Self> {
        Arc::new(Self {
            domains: ArcSwap::from_pointee(domains),
            key_exchange,
            store: ArcSwap::default(),
            replacing: Mutex::default(),
            generation: watch::Sender::new(0),
        })
    }

    pub fn key_exchange(&self) -> KeyExchange {
        self.key_exchange
    }

    /// Replaces the roots. True when they are others than before. Those that cannot be read are left out, as long as there are others.
    pub fn set_roots<'a>(&self, roots: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> Result<bool, TlsError> {
        let certificates = roots.into_iter().map(|c| c.to_vec()).collect::<BTreeSet<_>>();
        if certificates.is_empty() {
            return Err(TlsError::Root("there is none".to_owned()));
        }
        if self.store.load().certificates == certificates {
            return Ok(false);
        }
        let (mut anchors, mut problem) = (Vec::new(), None);
        for der in &certificates {
            match webpki::anchor_from_trusted_cert(&CertificateDer::from_slice(der)) {
                Ok(anchor) => anchors.push(anchor.to_owned()),
                Err(error) => problem = Some(error),
            }
        }
        match problem {
            Some(error) if anchors.is_empty() => return Err(TlsError::Root(error.to_string())),
            Some(error) => tracing::warn!(target: "identity", %error, "a trusted root cannot be read and is left out"),
            None => {}
        }
        let anchors = Arc::new(anchors);
        self.replace(|old| Store { certificates, anchors, revocations: old.revocations.clone() });
        Ok(true)
    }

    /// Replaces the revocation lists: PEM, several lists in each text, or one in DER. Of an empty text there is none; one in which there is
    /// something else is refused, and nothing replaced.
    pub fn set_revocations<'a>(&self, texts: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<ReadList>, TlsError> {
        let (mut revocations, mut read) = (Vec::new(), Vec::new());
        for (index, text) in texts.into_iter().enumerate() {
            let in_pem = CertificateRevocationListDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>();
            let lists = match in_pem.map_err(|e| TlsError::Revocations(e.to_string()))? {
                none if none.is_empty() && !text.trim_ascii().is_empty() => vec![CertificateRevocationListDer::from(text)],
                lists => lists,
            };
            for der in lists {
                let list = BorrowedCertRevocationList::from_der(&der).and_then(|list| list.to_owned());
                let unread = |e| TlsError::Revocations(format!("{e}; what is expected is PEM (X509 CRL), or one list in DER"));
                revocations.push(list.map_err(unread)?.into());
                let parsed = x509_parser::parse_x509_crl(&der).ok();
                let due = parsed.and_then(|(_, list)| list.next_update()).map(super::system_time);
                read.push(ReadList { text: index, due });
            }
        }
        let revocations = Arc::new(revocations);
        self.replace(|old| Store { certificates: old.certificates.clone(), anchors: old.anchors.clone(), revocations });
        Ok(read)
    }

    fn replace(&self, new: impl FnOnce(&Store) -> Store) {
        let replacing = self.replacing.lock();
        self.store.store(Arc::new(new(&self.store.load())));
        drop(replacing);
        self.generation.send_modify(|g| *g += 1);
    }

    /// How many roots are trusted.
    pub fn roots(&self) -> usize {
        self.store.load().anchors.len()
    }

    /// The roots that are trusted.
    pub fn described(&self) -> Vec<Described> {
        self.store.load().certificates.iter().filter_map(|der| Described::read(der).ok()).collect()
    }

    /// Whether a chain would be verified now, in either role.
    pub fn check(&self, chain: &[CertificateDer<'_>]) -> Result<(), TlsError> {
        let (leaf, between) = chain.split_first().ok_or(TlsError::EmptyChain)?;
        for role in [Role::Client, Role::Server] {
            self.verify(leaf, between, UnixTime::now(), role).map_err(|e| TlsError::Certificate(e.to_string()))?;
        }
        Ok(())
    }

    /// Verifies a chain, the peer's own certificate first.
    pub(super) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        role: Role,
    ) -> Result<(), webpki::Error> {
        let store = self.store.load();
        self.verify_with(&store.anchors, &store.revocations, (leaf, intermediates), now, role)
    }

    fn verify_with(
        &self,
        anchors: &[TrustAnchor<'static>],
        revocations: &[CertRevocationList<'static>],
        (leaf, intermediates): (&CertificateDer<'_>, &[CertificateDer<'_>]),
        now: UnixTime,
        role: Role,
    ) -> Result<(), webpki::Error> {
        let usage = match role {
            Role::Client => KeyUsage::client_auth(),
            Role::Server => KeyUsage::server_auth(),
        };
        let algorithms = super::provider(self.key_exchange).signature_verification_algorithms.all;
        let parsed = EndEntityCert::try_from(leaf)?;
        parsed.verify_for_usage(algorithms, anchors, intermediates, now, usage, None, None)?;
        // One list at a time: of one that does not fit (another authority of the same name signed it, as during a rotation),
        // nothing follows. A certificate no list speaks of is as good as before there were lists.
        for list in revocations {
            let lists = [list];
            let Ok(options) = RevocationOptionsBuilder::new(&lists) else { continue };
            let options = options
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Allow)
                .with_expiration_policy(ExpirationPolicy::Ignore);
            let options = Some(options.build());
            let verified = parsed.verify_for_usage(algorithms, anchors, intermediates, now, usage, options, None);
            if let Err(revoked @ webpki::Error::CertRevoked) = verified {
                return Err(revoked);
            }
        }
        Ok(())
    }

    /// Replaces the names the trust domain had before; whoever is believed already stays so.
    pub fn set_aliases(&self, aliases: &[TrustDomain]) {
        let known = self.domains.load();
        if known.aliases != aliases {
            self.domains.store(Arc::new(TrustDomains { local: known.local.clone(), aliases: aliases.to_vec() }));
        }
    }

    /// Whether an identity is of this mesh: of its trust domain or an alias of it.
    pub fn is_ours(&self, id: &SpiffeId) -> bool {
        let domains = self.domains.load();
        *id.trust_domain() == domains.local || domains.aliases.contains(id.trust_domain())
    }

    /// Whether a peer's identity is the one expected: the same account, in any name of the trust domain.
    pub(super) fn is_expected(&self, found: &SpiffeId, expected: &SpiffeId) -> bool {
        found == expected
            || self.is_ours(found)
                && self.is_ours(expected)
                && found.namespace() == expected.namespace()
                && found.service_account() == expected.service_account()
    }

    /// Completes when a chain that is good now is revoked. It is judged as of now, by the roots of now: neither that it has expired since nor that
    /// its root has gone ends a connection, and neither hides that it was taken back.
    pub async fn revoked(self: Arc<Self>, chain: Vec<CertificateDer<'static>>) {
        let (then, anchors) = (UnixTime::now(), self.store.load().anchors.clone());
        let mut generation = self.generation.subscribe();
        let Some((leaf, rest)) = chain.split_first() else { return std::future::pending().await };
        loop {
            generation.borrow_and_update();
            let revocations = self.store.load().revocations.clone();
            // Either usage: mesh certificates have both.
            let revoked = [Role::Client, Role::Server].map(|role| self.verify_with(&anchors, &revocations, (leaf, rest), then, role));
            if revoked.iter().any(|r| matches!(r, Err(webpki::Error::CertRevoked))) {
                return;
            }
            if generation.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}
