//! Keeps one fresh certificate per identity in use.
//!
//! A certificate is fetched on first use, once however many ask, and renewed at about half its life. A renewal that
//! fails is tried again with back-off while the old certificate is served until it expires. Connections already open
//! keep the certificate they were opened with.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

use super::{CertificateSource, IssueError};
use crate::{id::SpiffeId, telemetry::chain, tls::Credentials};

/// First and longest wait after a failed fetch.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(150);

/// How often the wall clock is looked at while a certificate is in use.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(30);

/// What an identity's certificate is like, for inspection.
#[derive(Debug, Clone)]
pub struct CertificateState {
    pub identity: SpiffeId,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
    /// Why the latest fetch failed, if it did.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Default)]
struct Current {
    credentials: Option<Arc<Credentials>>,
    error: Option<String>,
}

/// Hands out certificates; cheap to clone.
#[derive(Clone)]
pub struct Manager {
    source: Arc<dyn CertificateSource>,
    entries: Arc<Mutex<HashMap<SpiffeId, Entry>>>,
}

struct Entry {
    current: watch::Receiver<Current>,
    keeper: tokio::task::AbortHandle,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Manager {
    pub fn new(source: Arc<dyn CertificateSource>) -> Self {
        Self { source, entries: Arc::default() }
    }

    /// A certificate that is valid now. Waits for the first fetch; fails when that fails, or when the last certificate
    /// has expired and no other could be had.
    pub async fn credentials(&self, id: &SpiffeId) -> Result<Arc<Credentials>, Arc<str>> {
        let mut current = self.watch(id);
        loop {
            {
                let now = current.borrow_and_update();
                match (&now.credentials, &now.error) {
                    (Some(c), _) if !c.is_expired(SystemTime::now()) => return Ok(c.clone()),
                    (Some(_), Some(error)) => {
                        return Err(format!("the certificate of {id} has expired and cannot be renewed: {error}").into());
                    }
                    (None, Some(error)) => return Err(format!("no certificate for {id}: {error}").into()),
                    (_, None) => {}
                }
            }
            if current.changed().await.is_err() {
                return Err(IssueError::Stopped.to_string().into());
            }
        }
    }

    /// Fetches certificates that will be needed and forgets those of identities no longer in use.
    pub fn retain(&self, in_use: &HashSet<SpiffeId>) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| in_use.contains(id));
        for id in in_use {
            self.watch(id);
        }
    }

    /// The state of every certificate, sorted by identity.
    pub fn states(&self) -> Vec<CertificateState> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = entries.iter().map(|(id, e)| state(id, &e.current.borrow())).collect::<Vec<_>>();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    fn watch(&self, id: &SpiffeId) -> watch::Receiver<Current> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(id) {
            return entry.current.clone();
        }
        let (sender, receiver) = watch::channel(Current::default());
        let keeper = tokio::spawn(keep(self.source.clone(), id.clone(), sender)).abort_handle();
        entries.insert(id.clone(), Entry { current: receiver.clone(), keeper });
        receiver
    }
}

fn state(id: &SpiffeId, current: &Current) -> CertificateState {
    let credentials = current.credentials.as_ref();
    CertificateState {
        identity: id.clone(),
        not_before: credentials.map(|c| c.not_before),
        not_after: credentials.map(|c| c.not_after),
        error: current.error.clone(),
    }
}

/// Fetches and renews one certificate for as long as anybody may ask for it.
async fn keep(source: Arc<dyn CertificateSource>, id: SpiffeId, current: watch::Sender<Current>) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let wait = match source.issue(&id).await {
            Ok(credentials) => {
                backoff = BACKOFF_MIN;
                let wait = credentials.renew_in(SystemTime::now(), fastrand::f64() * 2.0 - 1.0);
                tracing::debug!(target: "identity", identity = %id, "certificate issued");
                current.send_replace(Current { credentials: Some(Arc::new(credentials)), error: None });
                wait.max(BACKOFF_MIN)
            }
            Err(error) => {
                let text = chain(&error);
                tracing::warn!(target: "identity", identity = %id, error = text, retry_in = ?backoff, "no certificate");
                current.send_modify(|c| c.error = Some(text));
                let wait = backoff.mul_f64(0.5 + fastrand::f64() * 0.5);
                backoff = (backoff * 2).min(BACKOFF_MAX);
                wait
            }
        };
        sleep_by_the_clock(wait, &current).await;
    }
}

/// Sleeps, but no longer than until the certificate expires by the wall clock, which a suspended machine's timers miss.
async fn sleep_by_the_clock(wait: Duration, current: &watch::Sender<Current>) {
    let until = tokio::time::Instant::now() + wait;
    loop {
        let left = until.saturating_duration_since(tokio::time::Instant::now());
        let now = current.borrow().clone();
        let expired = now.error.is_none() && now.credentials.is_some_and(|c| c.is_expired(SystemTime::now()));
        if left.is_zero() || expired {
            return;
        }
        tokio::time::sleep(left.min(LOOK_AT_CLOCK)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::Pin,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::{id::TrustDomain, identity::EmbeddedCa};

    struct Counting {
        ca: EmbeddedCa,
        issued: AtomicUsize,
        fail_after: usize,
    }

    impl CertificateSource for Counting {
        fn issue<'a>(&'a self, id: &'a SpiffeId) -> Pin<Box<dyn Future<Output = Result<Credentials, IssueError>> + Send + 'a>> {
            if self.issued.fetch_add(1, Ordering::SeqCst) >= self.fail_after {
                return Box::pin(async { Err(IssueError::Stopped) });
            }
            self.ca.issue(id)
        }
    }

    fn manager(ttl: Duration, fail_after: usize) -> (Manager, Arc<Counting>, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("tempdir");
        let ca = EmbeddedCa::open(dir.path(), TrustDomain::parse("cluster.local").expect("valid"), ttl).expect("open");
        let source = Arc::new(Counting { ca, issued: AtomicUsize::new(0), fail_after });
        (Manager::new(source.clone()), source, dir)
    }

    fn id(account: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://cluster.local/ns/a/sa/{account}")).expect("valid")
    }

    #[tokio::test]
    async fn first_use_fetches_once_for_all_who_ask() {
        let (manager, source, _dir) = manager(Duration::from_hours(1), usize::MAX);
        let (me, other) = (id("b"), id("c"));
        let (a, b, c) = tokio::join!(manager.credentials(&me), manager.credentials(&me), manager.credentials(&other));
        assert!(Arc::ptr_eq(&a.expect("a"), &b.expect("b")) && c.is_ok());
        assert_eq!(source.issued.load(Ordering::SeqCst), 2);
        manager.retain(&HashSet::from([id("b")]));
        assert_eq!(manager.states().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn certificate_is_renewed_before_it_expires() {
        let (manager, source, _dir) = manager(Duration::from_hours(1), usize::MAX);
        let first = manager.credentials(&id("b")).await.expect("first");
        tokio::time::sleep(Duration::from_mins(40)).await;
        let second = manager.credentials(&id("b")).await.expect("second");
        assert!(!Arc::ptr_eq(&first, &second) && source.issued.load(Ordering::SeqCst) == 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_renewal_leaves_the_old_certificate_in_use() {
        let (manager, source, _dir) = manager(Duration::from_hours(1), 1);
        let first = manager.credentials(&id("b")).await.expect("first");
        tokio::time::sleep(Duration::from_mins(50)).await;
        let again = manager.credentials(&id("b")).await.expect("still valid");
        assert!(Arc::ptr_eq(&first, &again) && source.issued.load(Ordering::SeqCst) > 2);
        assert!(manager.states()[0].error.is_some());
    }

    #[tokio::test]
    async fn a_failed_first_fetch_is_an_error_that_says_why() {
        let (manager, _source, _dir) = manager(Duration::from_hours(1), 0);
        let error = manager.credentials(&id("b")).await.expect_err("must fail");
        assert!(error.contains("ns/a/sa/b") && error.contains("stopped"), "{error}");
    }
}
