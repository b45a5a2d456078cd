//! The one task that owns the store, and what it publishes.

use std::{sync::Arc, time::Instant};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{mpsc, watch};

use super::{
    build::build,
    settings::MeshSettings,
    snapshot::Snapshot,
    store::{Change, Status, Store},
};
use crate::{spawn, tls::Trust};

/// Read access to the current configuration; cheap to clone.
#[derive(Debug, Clone)]
pub struct Configuration {
    shared: Arc<Shared>,
    generation: watch::Receiver<u64>,
}

#[derive(Debug)]
struct Shared {
    snapshot: ArcSwap<Snapshot>,
    statuses: ArcSwap<Vec<Status>>,
}

impl Configuration {
    /// The current snapshot, for one decision.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.shared.snapshot.load()
    }

    /// What is wrong with the objects read, sorted.
    pub fn statuses(&self) -> Arc<Vec<Status>> {
        self.shared.statuses.load_full()
    }

    /// Completes when a generation not yet seen by this value is published; false when there will be none any more.
    pub async fn changed(&mut self) -> bool {
        self.generation.changed().await.is_ok()
    }

    /// Has peers believed by the names of the trust domain that the configuration gives.
    pub async fn tell_of_aliases(mut self, trust: Arc<Trust>) {
        while self.changed().await {
            trust.set_aliases(&self.load().trust_domains.aliases);
        }
    }

    /// Completes when the first complete reading of the sources is in force.
    pub async fn ready(&mut self) -> bool {
        self.generation.wait_for(|g| *g > 0).await.is_ok()
    }

    /// Whether [`Configuration::ready`] would complete at once.
    pub fn is_ready(&self) -> bool {
        *self.generation.borrow() > 0
    }
}

/// The owner of the store.
#[derive(Debug)]
pub struct Publisher {
    store: Store,
    mesh: Arc<MeshSettings>,
    shared: Arc<Shared>,
    generation: watch::Sender<u64>,
    changes: mpsc::Receiver<Batch>,
}

/// Changes that take effect as a whole.
#[derive(Debug)]
pub struct Batch {
    pub changes: Vec<Change>,
    /// When their source began to read them.
    pub noticed: Instant,
}

impl Batch {
    /// Changes that are noticed now.
    pub fn now(changes: Vec<Change>) -> Self {
        Self { changes, noticed: Instant::now() }
    }
}

impl Publisher {
    /// A publisher with nothing yet, fed through `changes` in batches that take effect as a whole.
    pub fn new(mesh: Arc<MeshSettings>, changes: mpsc::Receiver<Batch>) -> (Self, Configuration) {
        let snapshot = ArcSwap::from_pointee(Snapshot::empty(mesh.clone()));
        let shared = Arc::new(Shared { snapshot, statuses: ArcSwap::default() });
        let (generation, receiver) = watch::channel(0);
        let configuration = Configuration { shared: shared.clone(), generation: receiver };
        (Self { store: Store::default(), mesh, shared, generation, changes }, configuration)
    }

    /// Builds and publishes until every source is gone.
    pub async fn run(mut self) {
        while let Some(batch) = self.changes.recv().await {
            let noticed = batch.noticed;
            let mut changed = self.take(batch);
            // What has queued up meanwhile is built once.
            while let Ok(batch) = self.changes.try_recv() {
                changed |= self.take(batch);
            }
            if changed || *self.generation.borrow() == 0 {
                self.publish(noticed);
            }
        }
    }

    fn take(&mut self, batch: Batch) -> bool {
        batch.changes.into_iter().fold(false, |changed, change| self.store.apply(change) | changed)
    }

    fn publish(&mut self, noticed: Instant) {
        let before = self.shared.snapshot.load_full();
        let started = Instant::now();
        let (mut snapshot, statuses) = spawn::aside(|| build(&self.store, &self.mesh, &before, started));
        snapshot.built_in = started.elapsed();
        snapshot.lag = noticed.elapsed();
        let generation = snapshot.generation;
        for status in new_ones(&self.shared.statuses.load(), &statuses) {
            tracing::warn!(target: "config", "{status}");
        }
        tracing::info!(target: "config", generation, workloads = snapshot.workloads.len(), services = snapshot.services.len(), remarks = statuses.len(), "configuration published");
        self.shared.snapshot.store(Arc::new(snapshot));
        self.shared.statuses.store(Arc::new(statuses));
        self.generation.send_replace(generation);
        // Where nothing uses it any more it is large.
        spawn::aside(|| drop(before));
    }
}

/// Statuses that were not there before: each is logged once, not with every build.
fn new_ones<'a>(before: &[Status], now: &'a [Status]) -> Vec<&'a Status> {
    now.iter().filter(|s| before.binary_search(s).is_err()).collect()
}
