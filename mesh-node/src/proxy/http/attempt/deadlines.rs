//! When exchanges and attempts are over.

use tokio::time::{Instant, sleep_until};

/// When an exchange is over, whatever its state. Set once the whole request has been received.
#[derive(Debug, Clone, Copy, Default)]
pub struct Deadlines {
    /// Of the whole exchange.
    pub route: Option<Instant>,
    /// The client's own (`grpc-timeout`).
    pub client: Option<Instant>,
    /// Of the attempt under way, until its response begins.
    pub attempt: Option<Instant>,
}

impl Deadlines {
    fn next(&self) -> Option<(Instant, TimeUp)> {
        let all = [(self.client, TimeUp::Client), (self.route, TimeUp::Route), (self.attempt, TimeUp::Attempt)];
        all.into_iter().filter_map(|(at, which)| Some((at?, which))).min_by_key(|(at, _)| *at)
    }

    /// Completes when one of them has passed.
    pub async fn passed(&self) -> TimeUp {
        match self.next() {
            Some((at, which)) => {
                sleep_until(at).await;
                which
            }
            None => std::future::pending().await,
        }
    }
}

/// A time that is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeUp {
    Route,
    Client,
    Attempt,
}
