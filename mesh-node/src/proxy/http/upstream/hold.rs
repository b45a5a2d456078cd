//! What a connection within the node keeps.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{sync::Notify, task::JoinHandle};

use crate::proxy::{
    ServedPod,
    http::gate::Gate,
    inbound,
    live::{Carries, Registration},
    outcome::Outcome,
};

/// Something a connection within the node keeps: that it is counted and can be cut on the other pod's side.
///
/// A task of its own waits for that, so that exchanges do not have to ask what all connections of the pod share.
#[derive(Debug)]
pub struct LocalHold {
    ended: Arc<Ended>,
    watcher: JoinHandle<()>,
    pub(super) gate: Arc<Gate>,
    pub(super) outcome: Outcome,
}

impl LocalHold {
    pub(super) fn new(mut registration: Registration, pod: Arc<ServedPod>, outcome: Outcome, gate: Gate) -> Self {
        registration.note().carries(Carries::Requests);
        let ended = Arc::<Ended>::default();
        let seen = ended.clone();
        let watcher = tokio::spawn(async move {
            inbound::cut(&mut registration, &pod).await;
            seen.is.store(true, Ordering::Release);
            seen.wake.notify_one();
        });
        Self { ended, watcher, gate: Arc::new(gate), outcome }
    }

    pub(super) fn is_cut(&self) -> bool {
        self.ended.is.load(Ordering::Acquire)
    }

    /// Completes when the connection is to end. One at a time waits.
    pub(super) async fn cut(hold: Option<&Self>) {
        let Some(hold) = hold else { return std::future::pending().await };
        while !hold.is_cut() {
            hold.ended.wake.notified().await;
        }
    }
}

impl Drop for LocalHold {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

#[derive(Debug, Default)]
struct Ended {
    is: AtomicBool,
    wake: Notify,
}
