//! What has been handed to a connection and not been written: the library keeps that for each stream, and not for all of them together.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Bytes of all streams beyond which nothing more is read for any of them. A stream that was read for already may have its own on top.
const ROOM: usize = 512 * 1024;

/// Bytes of data that wait to be written.
#[derive(Debug, Default)]
pub struct Unsent {
    all: AtomicUsize,
    streams: Mutex<HashMap<u32, usize>>,
    room: Notify,
}

impl Unsent {
    /// Completes when there is room for more.
    pub async fn room(&self) {
        while self.all.load(Ordering::Acquire) >= ROOM {
            let mut room = std::pin::pin!(self.room.notified());
            room.as_mut().enable();
            if self.all.load(Ordering::Acquire) < ROOM {
                return;
            }
            room.await;
        }
    }

    /// Takes down what a stream has been given to send.
    pub fn add(&self, stream: u32, bytes: usize) {
        if bytes > 0 {
            *self.streams.lock().entry(stream).or_default() += bytes;
            self.all.fetch_add(bytes, Ordering::AcqRel);
        }
    }

    /// Takes down what of it has been written.
    pub fn written(&self, stream: u32, bytes: usize) {
        let mut streams = self.streams.lock();
        let Some(left) = streams.get_mut(&stream) else { return };
        let bytes = bytes.min(*left);
        *left -= bytes;
        if *left == 0 {
            streams.remove(&stream);
        }
        self.less(bytes);
    }

    /// Whatever a stream had left goes nowhere: it was reset.
    pub fn forget(&self, stream: u32) {
        if let Some(bytes) = self.streams.lock().remove(&stream) {
            self.less(bytes);
        }
    }

    fn less(&self, bytes: usize) {
        let before = self.all.fetch_sub(bytes, Ordering::AcqRel);
        if before >= ROOM && before - bytes < ROOM {
            self.room.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn streams_wait_until_what_others_have_left_is_written_or_goes_nowhere() {
        let unsent = Arc::new(Unsent::default());
        let waits = async |unsent: &Unsent| tokio::time::timeout(Duration::from_millis(1), unsent.room()).await.is_err();
        unsent.add(1, ROOM - 1);
        assert!(!waits(&unsent).await);
        unsent.add(3, 100);
        assert!(waits(&unsent).await);
        // More than it has: its head was no data, and that of a stream nobody knows is none of this.
        unsent.written(3, 1000);
        unsent.written(5, ROOM);
        assert!(!waits(&unsent).await);
        unsent.add(3, 1);
        let waiting = tokio::spawn({
            let unsent = unsent.clone();
            async move { unsent.room().await }
        });
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(!waiting.is_finished());
        unsent.forget(1);
        waiting.await.expect("there is room");
        unsent.forget(1);
        assert_eq!(unsent.all.load(Ordering::Relaxed), 1);
    }
}
