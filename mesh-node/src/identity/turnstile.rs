//! How many fetch certificates at once, and who goes first: a connection that waits for one before one that will be needed,
//! and that before a renewal.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// How much a certificate is wanted; the smallest goes first. Istio's ztunnel has the same three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody waits for it.
    RealTime,
    /// It will be needed.
    Warmup,
    /// There is a good one still.
    Background,
}

/// Lets so many through at once; cheap to clone.
#[derive(Debug, Clone)]
pub struct Turnstile(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    free: usize,
    next: u64,
    waiting: BTreeMap<(Priority, u64), oneshot::Sender<Pass>>,
}

/// A place; given back when dropped.
#[derive(Debug)]
pub struct Pass(Option<Turnstile>);

impl Turnstile {
    pub fn new(places: usize) -> Self {
        Self(Arc::new(Mutex::new(Inner { free: places, next: 0, waiting: BTreeMap::new() })))
    }

    /// Waits for a place.
    pub async fn pass(&self, priority: Priority) -> Pass {
        let receiver = {
            let mut inner = self.0.lock();
            if inner.free > 0 {
                inner.free -= 1;
                return Pass(Some(self.clone()));
            }
            let (sender, receiver) = oneshot::channel();
            inner.next += 1;
            let key = (priority, inner.next);
            inner.waiting.insert(key, sender);
            receiver
        };
        match receiver.await {
            Ok(pass) => pass,
            // The turnstile lives as long as somebody waits at it.
            Err(_) => std::future::pending().await,
        }
    }

    /// Hands a place on to whoever is first and still there.
    fn leave(&self) {
        loop {
            let next = {
                let mut inner = self.0.lock();
                if let Some((_, sender)) = inner.waiting.pop_first() {
                    sender
                } else {
                    inner.free += 1;
                    return;
                }
            };
            match next.send(Pass(Some(self.clone()))) {
                Ok(()) => return,
                // Gone meanwhile: the place is still to be handed on, once.
                Err(mut unused) => drop(unused.0.take()),
            }
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(turnstile) = self.0.take() {
            turnstile.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_waits_longest_of_the_most_wanted_goes_first() {
        let turnstile = Turnstile::new(1);
        let first = turnstile.pass(Priority::Background).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for (name, priority) in
            [("renewal", Priority::Background), ("soon", Priority::Warmup), ("now 1", Priority::RealTime), ("now 2", Priority::RealTime)]
        {
            let (turnstile, order) = (turnstile.clone(), order.clone());
            tasks.push(tokio::spawn(async move {
                let _pass = turnstile.pass(priority).await;
                order.lock().push(name);
            }));
            tokio::task::yield_now().await;
        }
        // One that gives up loses nobody's place.
        let given_up = tokio::spawn({
            let turnstile = turnstile.clone();
            async move { drop(turnstile.pass(Priority::RealTime).await) }
        });
        tokio::task::yield_now().await;
        given_up.abort();
        assert!(given_up.await.is_err());
        drop(first);
        for task in tasks {
            task.await.expect("joined");
        }
        assert_eq!(*order.lock(), ["now 1", "now 2", "soon", "renewal"]);
        assert_eq!(turnstile.0.lock().free, 1);
    }
}
