//! Bounds on what is under way at once. Beyond them connections are reset and counted, so that a flood cannot take the
//! descriptors the node needs to look after its pods.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Descriptors kept for everything that is not a connection: listeners, maps, files.
const RESERVED: u64 = 1024;
/// Descriptors of a connection: its two ends.
const EACH: u64 = 2;
/// TLS handshakes into one pod at once: each costs a millisecond of CPU and may take its whole timeout. For each pod, so
/// that a flood to one leaves the others alone. Others wait for their turn.
pub const HANDSHAKES: usize = 256;
/// Peers of one pod that have connected and not shaken hands, those that wait for their turn or have not said anything included.
pub const CALLERS: usize = 4096;

/// Room for one more; given back when dropped.
pub type Slot = OwnedSemaphorePermit;

/// The bounds of the process.
#[derive(Debug, Clone)]
pub struct Limits {
    connections: Arc<Semaphore>,
}

impl Limits {
    /// Limits for a process that may have this many descriptors open.
    pub fn for_descriptors(descriptors: u64) -> Self {
        let connections = descriptors.saturating_sub(RESERVED.min(descriptors / 2)) / EACH;
        let connections = usize::try_from(connections).unwrap_or(usize::MAX).clamp(16, Semaphore::MAX_PERMITS);
        Self { connections: Arc::new(Semaphore::new(connections)) }
    }

    pub fn connection(&self) -> Option<Slot> {
        self.connections.clone().try_acquire_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_take_what_is_left_of_the_descriptors() {
        let limits = Limits::for_descriptors(1024 + 40);
        let slots = (0..100).map_while(|_| limits.connection()).collect::<Vec<_>>();
        // Half of few descriptors stays reserved: (1064 - 532) / 2 is more than the 100 asked for.
        assert_eq!(slots.len(), 100);
        let small = Limits::for_descriptors(64);
        assert_eq!((0..100).map_while(|_| small.connection()).collect::<Vec<_>>().len(), 16);
    }
}
