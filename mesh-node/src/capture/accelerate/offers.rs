//! Where pairs are offered, and what became of them.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::mpsc;

use super::{Kernel, Pair, Place, State};

/// What is said to who sees to pairs.
pub(super) enum Message {
    Offer(u64, Box<Pair>),
    Withdraw(u64),
}

/// Where pairs are offered; cheap to clone.
#[derive(Debug, Clone)]
pub struct Offers {
    sender: mpsc::UnboundedSender<Message>,
    next: Arc<AtomicU64>,
    known: Arc<Known>,
    kernel: Arc<Kernel>,
}

/// A pair on offer, as it is now.
#[derive(Debug, Clone)]
pub struct PairState {
    pub pair: Pair,
    pub state: State,
    /// Bytes that were redirected, from the first socket to the second and back.
    pub redirected: [u64; 2],
}

/// Pairs and their states, for inspection.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<u64, (Pair, State)>>);

/// A pair on offer as long as this lives: as long as the connection.
#[derive(Debug)]
pub struct Offered {
    id: u64,
    sender: mpsc::UnboundedSender<Message>,
}

impl Drop for Offered {
    fn drop(&mut self) {
        // Nobody listens any more when the process ends.
        let _ = self.sender.send(Message::Withdraw(self.id));
    }
}

impl Known {
    pub fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Pair, State)>> {
        self.0.lock()
    }
}

impl Offers {
    /// `first`: the number of the first pair.
    pub(super) fn new(sender: mpsc::UnboundedSender<Message>, first: u64, known: Arc<Known>, kernel: Arc<Kernel>) -> Self {
        Self { sender, next: Arc::new(AtomicU64::new(first)), known, kernel }
    }

    /// Offers a pair, whose connection has just been made. Bounded as connections are.
    pub fn offer(&self, pair: Pair) -> Offered {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let _ = self.sender.send(Message::Offer(id, Box::new(pair)));
        Offered { id, sender: self.sender.clone() }
    }

    /// Pairs that are on offer.
    pub fn states(&self) -> Vec<PairState> {
        let all = self.known.lock().values().cloned().collect::<Vec<_>>();
        let bytes = |place: &Place| self.kernel.look(place).map_or(0, |reply| reply.bytes);
        let one = |(pair, state): (Pair, State)| {
            let redirected = if state == State::Young { [0; 2] } else { [bytes(&pair.one), bytes(&pair.other)] };
            PairState { pair, state, redirected }
        };
        all.into_iter().map(one).collect()
    }
}
