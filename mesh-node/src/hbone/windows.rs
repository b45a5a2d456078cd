//! How much of what peers have sent may wait unread, for all HBONE connections of the process together.
//!
//! HTTP/2 bounds it for a stream and for a connection. Wide windows keep streams that nobody reads from blocking others between the same
//! two pods; many of them at once would be all of a node's memory. So a connection's window is its share of what there is for all, and no
//! less than what 32 streams that nobody reads take; a ztunnel's is half of that, and four of its streams fill it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::CONNECTION_WINDOW;

/// For all connections together, bytes, as long as they are no more than 32.
pub const TOGETHER: u64 = 1024 * 1024 * 1024;
/// The narrowest window of a connection, bytes.
pub const NARROWEST: u32 = 32 * 1024 * 1024;

static OPEN: AtomicU64 = AtomicU64::new(0);

/// The share of one connection, as long as that is open.
#[derive(Debug)]
pub struct WindowShare {
    told: u32,
}

impl WindowShare {
    pub fn take() -> Self {
        Self { told: share_of(OPEN.fetch_add(1, Ordering::Relaxed) + 1) }
    }

    /// The window that the connection begins with.
    pub fn first(&self) -> u32 {
        self.told
    }

    /// The window that it is to have from now on, if that is another one.
    pub fn changed(&mut self) -> Option<u32> {
        let now = share_of(OPEN.load(Ordering::Relaxed));
        (std::mem::replace(&mut self.told, now) != now).then_some(now)
    }
}

impl Drop for WindowShare {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// In steps of two, so that it does not change with each connection.
fn share_of(open: u64) -> u32 {
    let each = TOGETHER / open.max(1).next_power_of_two();
    u32::try_from(each).unwrap_or(CONNECTION_WINDOW).clamp(NARROWEST, CONNECTION_WINDOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_share_narrows_and_stays_within_the_sum() {
        for (open, expected) in [(0, 256), (1, 256), (4, 256), (5, 128), (8, 128), (9, 64), (32, 32), (33, 32), (100_000, 32)] {
            assert_eq!(share_of(open), expected * 1024 * 1024, "{open}");
            assert!(open > 32 || u64::from(share_of(open)) * open <= TOGETHER, "{open}");
        }
    }
}
