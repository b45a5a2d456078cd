//! gRPC calls that go on: their messages are counted whenever metrics are read, as Istio counts them before a call is over.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use parking_lot::{Mutex, MutexGuard};

use super::{Edge, Tags};

/// So that calls that begin at once do not wait for each other.
const SHARDS: usize = 16;

/// Messages so far, of the request and of the response.
pub type Messages = [Arc<AtomicU64>; 2];

#[derive(Debug)]
struct Call {
    messages: Messages,
    counted: [AtomicU64; 2],
    edge: ArcSwapOption<Edge>,
}

impl Call {
    /// Counts what has come since the last time, unless how it is counted depends on how the call ends.
    fn count(&self) {
        if let Some(edge) = &*self.edge.load()
            && edge.key.tags.dynamic == 0
        {
            let [up, down] = self.since();
            edge.messages(&Tags::default(), up, down);
        }
    }

    fn since(&self) -> [u64; 2] {
        [0, 1].map(|i| {
            let now = self.messages[i].load(Ordering::Relaxed);
            now.saturating_sub(self.counted[i].fetch_max(now, Ordering::Relaxed))
        })
    }
}

/// All that go on.
#[derive(Debug, Default)]
pub struct Calls {
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Arc<Call>>>; SHARDS],
}

impl Calls {
    /// Follows a call. To be [ended](Followed::end).
    pub fn follow(&self, messages: Messages, edge: Option<Arc<Edge>>) -> Followed {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let call = Arc::new(Call { messages, counted: Default::default(), edge: ArcSwapOption::new(edge) });
        self.shard(number).insert(number, call.clone());
        Followed { number, call }
    }

    /// Counts the messages of all until now.
    pub fn count(&self) {
        for shard in &self.shards {
            let all = shard.lock().values().cloned().collect::<Vec<_>>();
            all.iter().for_each(|call| call.count());
        }
    }

    fn shard(&self, number: u64) -> MutexGuard<'_, HashMap<u64, Arc<Call>>> {
        self.shards[usize::try_from(number % SHARDS as u64).unwrap_or(0)].lock()
    }
}

/// A call that is followed.
#[derive(Debug)]
pub struct Followed {
    number: u64,
    call: Arc<Call>,
}

impl Followed {
    /// It is counted there from now on.
    pub fn place(&self, edge: Option<Arc<Edge>>) {
        self.call.edge.store(edge);
    }

    /// It is over: counts the rest.
    pub fn end(self, calls: &Calls, edge: Option<&Edge>, tags: &Tags) {
        calls.shard(self.number).remove(&self.number);
        let [up, down] = self.call.since();
        if let Some(edge) = edge {
            edge.messages(tags, up, down);
        }
    }
}
