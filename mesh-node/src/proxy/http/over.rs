//! Word to a client's connection that what it leads to is over. Clients of headless services pick an endpoint by its address, and look for others when
//! their connection ends: as it would without a mesh, with the endpoint's.

use std::{
    collections::HashSet,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Whether one is to end.
#[derive(Debug, Default)]
pub struct Over {
    is: AtomicBool,
    told: Notify,
    /// Where it is noted already.
    noted: AtomicUsize,
}

impl Over {
    pub fn tell(&self) {
        self.is.store(true, Ordering::Release);
        self.told.notify_waiters();
    }

    pub fn is_told(&self) -> bool {
        self.is.load(Ordering::Acquire)
    }

    /// Completes when that is told.
    pub async fn wait(&self) {
        let told = self.told.notified();
        let mut told = std::pin::pin!(told);
        told.as_mut().enable();
        if !self.is_told() {
            told.await;
        }
    }
}

/// Clients' connections that end with one to an endpoint.
#[derive(Debug, Default)]
pub struct Followers {
    all: Mutex<Vec<Weak<Over>>>,
    over: AtomicBool,
}

impl Followers {
    /// One more; the same again costs nothing.
    pub fn add(&self, over: &Arc<Over>) {
        if over.noted.swap(std::ptr::from_ref(self).addr(), Ordering::Relaxed) != std::ptr::from_ref(self).addr() {
            let mut all = self.all.lock();
            if all.len() == all.capacity() {
                // One that goes by several connections comes back each time.
                let mut seen = HashSet::new();
                all.retain(|one| one.strong_count() > 0 && seen.insert(one.as_ptr()));
            }
            all.push(Arc::downgrade(over));
        }
        // After it was added: who tells all either finds it or is seen here.
        if self.over.load(Ordering::SeqCst) {
            over.tell();
        }
    }

    pub fn tell(&self) {
        self.over.store(true, Ordering::SeqCst);
        std::mem::take(&mut *self.all.lock()).iter().filter_map(Weak::upgrade).for_each(|over| over.tell());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_follows_hears_of_the_end_once_and_also_after_it() {
        let (followers, early, late) = (Followers::default(), Arc::new(Over::default()), Arc::new(Over::default()));
        for _ in 0..3 {
            followers.add(&early);
        }
        assert_eq!(followers.all.lock().len(), 1);
        for _ in 0..1000 {
            followers.add(&Arc::default());
        }
        assert!(followers.all.lock().len() < 20, "who is gone is forgotten");
        let other = Followers::default();
        for _ in 0..1000 {
            other.add(&early);
            followers.add(&early);
        }
        assert!(followers.all.lock().len() < 20, "nor is one there for each time");
        assert!(!early.is_told());
        let waits = {
            let early = early.clone();
            tokio::spawn(async move { early.wait().await })
        };
        tokio::task::yield_now().await;
        followers.tell();
        waits.await.expect("told");
        followers.add(&late);
        late.wait().await;
        assert!(early.is_told() && late.is_told());
    }
}
