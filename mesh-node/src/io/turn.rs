//! Whose turn it is: what drives an HTTP/2 connection goes after those that use it.

use std::task::{Context, Poll};

/// Lets everybody else who is ready go first, each time it is woken: what they have to send goes out together. Woken by one of its
/// streams, a connection would otherwise be run before the others, and write for each of them.
#[derive(Debug, Default)]
pub struct LastOfAll {
    waited: bool,
}

impl LastOfAll {
    pub fn poll<T>(&mut self, cx: &mut Context<'_>, connection: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        if !self.waited {
            self.waited = true;
            // A task that wakes itself goes to the end of the queue.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let polled = connection(cx);
        // What is ready may have more that is.
        self.waited = polled.is_ready();
        polled
    }
}
