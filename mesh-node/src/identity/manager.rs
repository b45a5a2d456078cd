//! Keeps one fresh certificate per identity in use.
//!
//! A certificate is fetched on first use, once however many ask, and renewed at about half its life. Whoever waits for one
//! goes before renewals. A renewal that fails is tried again with back-off while the old certificate is served until it
//! expires. Connections already open keep the certificate they were opened with.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::{
    CertificateSource, IssueError,
    turnstile::{Pass, Priority, Turnstile},
};
use crate::{id::SpiffeId, telemetry::chain, tls::Credentials};

/// First and longest wait after a failed fetch.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(150);

/// How often the wall clock is looked at: it may be set, and timers miss the time a machine was suspended.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(30);

/// What an identity's certificate is like, for inspection.
#[derive(Debug, Clone)]
pub struct CertificateState {
    pub identity: SpiffeId,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
    pub serial: Option<String>,
    /// The certificate itself.
    pub credentials: Option<Arc<Credentials>>,
    /// Why the latest fetch failed, if it did.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Default)]
struct Current {
    credentials: Option<Arc<Credentials>>,
    error: Option<String>,
}

impl Current {
    /// Whether there is nothing to serve with, for a reason that is not known yet.
    fn is_due(&self) -> bool {
        self.error.is_none() && self.credentials.as_ref().is_none_or(|c| c.is_expired(SystemTime::now()))
    }
}

/// Hands out certificates; cheap to clone.
#[derive(Clone)]
pub struct Manager {
    source: Arc<dyn CertificateSource>,
    entries: Arc<Mutex<HashMap<SpiffeId, Entry>>>,
    turnstile: Turnstile,
    /// Told when what certificates are made with has changed.
    anew: watch::Receiver<u64>,
    /// Told when a fetch succeeds after one that failed: others need not wait out their back-off.
    well: Arc<watch::Sender<u64>>,
    _follower: Arc<Follower>,
}

/// The task that waits for changes of the source; ends with the last manager.
struct Follower(tokio::task::AbortHandle);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Fetches under way at once.
const AT_ONCE: usize = 8;
/// Over how long fetches that a change of the source asks for are spread, at most.
const SPREAD: Duration = Duration::from_secs(2);

struct Entry {
    current: watch::Receiver<Current>,
    keeper: tokio::task::AbortHandle,
    /// Somebody waits for it.
    wanted: Arc<Notify>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Manager {
    pub fn new(source: Arc<dyn CertificateSource>) -> Self {
        let (sender, anew) = watch::channel(0);
        let watched = source.clone();
        let follower = tokio::spawn(async move {
            loop {
                watched.changed().await;
                sender.send_modify(|g| *g += 1);
            }
        });
        let held = Arc::new(Follower(follower.abort_handle()));
        Self { source, entries: Arc::default(), turnstile: Turnstile::new(AT_ONCE), anew, well: Arc::default(), _follower: held }
    }

    /// A certificate that is valid now. Waits for the first fetch; fails when that fails, or when the last certificate
    /// has expired and no other could be had.
    pub async fn credentials(&self, id: &SpiffeId) -> Result<Arc<Credentials>, Arc<str>> {
        let (mut current, wanted) = self.watch(id);
        loop {
            if current.borrow().is_due() {
                wanted.notify_one();
            }
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
        self.entries.lock().retain(|id, _| in_use.contains(id));
        for id in in_use {
            drop(self.watch(id));
        }
    }

    /// The state of every certificate, sorted by identity.
    pub fn states(&self) -> Vec<CertificateState> {
        let entries = self.entries.lock();
        let mut all = entries.iter().map(|(id, e)| state(id, &e.current.borrow())).collect::<Vec<_>>();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    fn watch(&self, id: &SpiffeId) -> (watch::Receiver<Current>, Arc<Notify>) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(id) {
            return (entry.current.clone(), entry.wanted.clone());
        }
        let (sender, receiver) = watch::channel(Current::default());
        let wanted = Arc::new(Notify::new());
        let keeper = Keeper {
            source: self.source.clone(),
            id: id.clone(),
            current: sender,
            wanted: wanted.clone(),
            turnstile: self.turnstile.clone(),
            anew: self.anew.clone(),
            well: self.well.clone(),
        };
        let keeper = tokio::spawn(keeper.run()).abort_handle();
        entries.insert(id.clone(), Entry { current: receiver.clone(), keeper, wanted: wanted.clone() });
        (receiver, wanted)
    }
}

fn state(id: &SpiffeId, current: &Current) -> CertificateState {
    let credentials = current.credentials.as_ref();
    CertificateState {
        identity: id.clone(),
        not_before: credentials.map(|c| c.not_before),
        not_after: credentials.map(|c| c.not_after),
        serial: credentials.map(|c| c.serial.clone()),
        credentials: credentials.cloned(),
        error: current.error.clone(),
    }
}

/// Fetches and renews one certificate for as long as anybody may ask for it.
struct Keeper {
    source: Arc<dyn CertificateSource>,
    id: SpiffeId,
    current: watch::Sender<Current>,
    wanted: Arc<Notify>,
    turnstile: Turnstile,
    anew: watch::Receiver<u64>,
    well: Arc<watch::Sender<u64>>,
}

impl Keeper {
    async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        let mut well = self.well.subscribe();
        loop {
            let pass = self.pass().await;
            // What changes from here on is a reason to fetch again.
            self.anew.borrow_and_update();
            well.borrow_and_update();
            let issued = self.source.issue(&self.id).await;
            drop(pass);
            let wait = match issued.and_then(unexpired) {
                Ok(credentials) => {
                    if self.current.borrow().error.is_some() {
                        self.well.send_modify(|times| *times += 1);
                        // Not for itself.
                        well.borrow_and_update();
                    }
                    backoff = BACKOFF_MIN;
                    let wait = credentials.renew_in(SystemTime::now(), fastrand::f64() * 2.0 - 1.0);
                    tracing::debug!(target: "identity", identity = %self.id, serial = credentials.serial, "certificate issued");
                    self.current.send_replace(Current { credentials: Some(Arc::new(credentials)), error: None });
                    wait.max(BACKOFF_MIN)
                }
                Err(error) => {
                    let text = chain(&error);
                    tracing::warn!(target: "identity", identity = %self.id, error = text, retry_in = ?backoff, "no certificate");
                    self.current.send_modify(|c| c.error = Some(text));
                    let wait = backoff.mul_f64(0.5 + fastrand::f64() * 0.5);
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                    wait
                }
            };
            let failed = self.current.borrow().error.is_some();
            tokio::select! {
                () = rest(wait, &self.wanted, &self.current) => {}
                Ok(()) = well.changed(), if failed => tokio::time::sleep(SPREAD.mul_f64(fastrand::f64())).await,
                // Without a sender there will be no change.
                Ok(()) = self.anew.changed() => tokio::time::sleep(SPREAD.mul_f64(fastrand::f64())).await,
            }
        }
    }

    /// A place to fetch: at the front as soon as somebody waits.
    async fn pass(&self) -> Pass {
        let usable = self.current.borrow().credentials.as_ref().is_some_and(|c| !c.is_expired(SystemTime::now()));
        let priority = if usable { Priority::Background } else { Priority::Warmup };
        tokio::select! {
            biased;
            pass = self.turnstile.pass(priority) => pass,
            () = self.wanted.notified(), if priority == Priority::Warmup => self.turnstile.pass(Priority::RealTime).await,
        }
    }
}

/// Sleeps, until so much time has passed by either clock, the clock was set back to before the certificate is valid, or somebody waits for one
/// although there was one.
async fn rest(wait: Duration, wanted: &Notify, current: &watch::Sender<Current>) {
    let (until, at) = (tokio::time::Instant::now() + wait, SystemTime::now() + wait);
    let is_early = |now| current.borrow().credentials.as_ref().is_some_and(|c| c.is_early(now));
    // One that was early from the start has an issuer whose clock is another.
    let was_early = is_early(SystemTime::now());
    loop {
        let (left, now) = (until.saturating_duration_since(tokio::time::Instant::now()), SystemTime::now());
        if left.is_zero() || now >= at || !was_early && is_early(now) {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(left.min(LOOK_AT_CLOCK)) => {}
            // It may have been said before there was one.
            () = wanted.notified() => if current.borrow().is_due() {
                // Who asks for it next goes before those nobody waits for.
                wanted.notify_one();
                return;
            },
        }
    }
}

fn unexpired(credentials: Credentials) -> Result<Credentials, IssueError> {
    if credentials.is_expired(SystemTime::now()) { Err(IssueError::Expired) } else { Ok(credentials) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::{
        id::TrustDomain,
        identity::{Boxed, EmbeddedCa},
        policy::TrustDomains,
        tls::{KeyExchange, Trust},
    };

    struct Counting {
        ca: EmbeddedCa,
        issued: AtomicUsize,
        fail_after: AtomicUsize,
    }

    impl Counting {
        fn mend(&self) {
            self.fail_after.store(usize::MAX, Ordering::SeqCst);
        }
    }

    impl CertificateSource for Counting {
        fn issue<'a>(&'a self, id: &'a SpiffeId) -> Boxed<'a, Result<Credentials, IssueError>> {
            if self.issued.fetch_add(1, Ordering::SeqCst) >= self.fail_after.load(Ordering::SeqCst) {
                return Box::pin(async { Err(IssueError::Stopped) });
            }
            self.ca.issue(id)
        }
    }

    fn manager(ttl: Duration, fail_after: usize) -> (Manager, Arc<Counting>, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("tempdir");
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let trust = Trust::new(TrustDomains { local: domain.clone(), aliases: Vec::new() }, KeyExchange::default());
        let ca = EmbeddedCa::open(dir.path(), domain, trust, ttl).expect("open");
        let source = Arc::new(Counting { ca, issued: AtomicUsize::new(0), fail_after: AtomicUsize::new(fail_after) });
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

    /// Whoever has waited longest after failures is not the last to hear that it works again.
    #[tokio::test(start_paused = true)]
    async fn one_that_succeeds_after_a_failure_tells_the_others() {
        let (manager, source, _dir) = manager(Duration::from_hours(1), 0);
        for account in ["b", "c"] {
            assert!(manager.credentials(&id(account)).await.is_err());
        }
        tokio::time::sleep(Duration::from_mins(30)).await;
        source.mend();
        let healed = |n: usize| manager.states().iter().filter(|state| state.error.is_none()).count() == n;
        while !healed(1) && !healed(2) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(SPREAD + Duration::from_millis(100)).await;
        assert!(healed(2), "{:?}", manager.states());
    }

    /// A file nobody replaces, or an authority whose clock is wrong.
    #[tokio::test(start_paused = true)]
    async fn a_certificate_that_has_expired_when_it_comes_is_none() {
        let (manager, source, _dir) = manager(Duration::ZERO, usize::MAX);
        let error = manager.credentials(&id("b")).await.expect_err("must fail");
        assert!(error.contains("had expired already"), "{error}");
        tokio::time::sleep(Duration::from_mins(10)).await;
        let asked = source.issued.load(Ordering::SeqCst);
        assert!((3..30).contains(&asked), "asked again with patience, and not {asked} times");
    }

    #[tokio::test]
    async fn a_failed_first_fetch_is_an_error_that_says_why() {
        let (manager, _source, _dir) = manager(Duration::from_hours(1), 0);
        let error = manager.credentials(&id("b")).await.expect_err("must fail");
        assert!(error.contains("ns/a/sa/b") && error.contains("stopped"), "{error}");
    }
}
