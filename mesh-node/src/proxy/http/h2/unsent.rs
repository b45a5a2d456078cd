//! What has been handed to a connection and not been written: the library keeps that for each stream, and not for all of them together.

use std::{collections::HashMap, pin::pin, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Bytes of all streams beyond which nothing more is read for any of them.
const ROOM: usize = 512 * 1024;
/// What is set aside for who is let in, until it is known what that has to send.
const SHARE: usize = 16 * 1024;

/// Bytes of data that wait to be written.
#[derive(Debug, Default)]
pub struct Unsent {
    waiting: Mutex<Waiting>,
    room: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Of all streams, with what is set aside.
    all: usize,
    streams: HashMap<u32, usize>,
}

/// Set aside as long as this lives.
#[derive(Debug)]
pub struct Share(Arc<Unsent>);

impl Drop for Share {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting.lock();
        self.0.less(&mut waiting, SHARE);
    }
}

impl Unsent {
    pub fn has_room(&self) -> bool {
        self.waiting.lock().all < ROOM
    }

    /// Completes when there is room for more.
    pub async fn room(self: &Arc<Self>) -> Share {
        let mut has_waited = false;
        loop {
            let mut room = pin!(self.room.notified());
            // Before it is looked, so that nothing that happens after that is missed.
            room.as_mut().enable();
            {
                let mut waiting = self.waiting.lock();
                if waiting.all < ROOM {
                    waiting.all += SHARE;
                    // Those that wait are let in one after the other.
                    if has_waited && waiting.all < ROOM {
                        self.room.notify_one();
                    }
                    return Share(self.clone());
                }
            }
            room.await;
            has_waited = true;
        }
    }

    /// Takes down what a stream is about to be given to send.
    pub fn add(&self, stream: u32, bytes: usize) {
        if bytes > 0 {
            let mut waiting = self.waiting.lock();
            waiting.all += bytes;
            *waiting.streams.entry(stream).or_default() += bytes;
        }
    }

    /// Takes down what of it has been written.
    pub fn written(&self, stream: u32, bytes: usize) {
        let mut waiting = self.waiting.lock();
        let Some(left) = waiting.streams.get_mut(&stream) else { return };
        let bytes = bytes.min(*left);
        *left -= bytes;
        if *left == 0 {
            waiting.streams.remove(&stream);
        }
        self.less(&mut waiting, bytes);
    }

    /// Whatever a stream had left goes nowhere: it was reset.
    pub fn forget(&self, stream: u32) {
        let mut waiting = self.waiting.lock();
        if let Some(bytes) = waiting.streams.remove(&stream) {
            self.less(&mut waiting, bytes);
        }
    }

    fn less(&self, waiting: &mut Waiting, bytes: usize) {
        let before = waiting.all;
        waiting.all -= bytes;
        if before >= ROOM && waiting.all < ROOM {
            self.room.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn streams_wait_until_what_others_have_left_is_written_or_goes_nowhere() {
        let unsent = Arc::new(Unsent::default());
        let waits = async |unsent: &Arc<Unsent>| tokio::time::timeout(Duration::from_millis(1), unsent.room()).await.is_err();
        unsent.add(1, ROOM - 1);
        assert!(!waits(&unsent).await);
        unsent.add(3, 100);
        assert!(waits(&unsent).await);
        // More than it has: its head was no data, and that of a stream nobody knows is none of this.
        unsent.written(3, 1000);
        unsent.written(5, ROOM);
        assert!(!waits(&unsent).await);
        unsent.add(3, 1);
        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let unsent = unsent.clone();
            waiting.spawn(async move { unsent.room().await });
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(waiting.try_join_next().is_none());
        unsent.forget(1);
        // As many as there is room for; then each as another has gone.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let mut shares = Vec::new();
        while let Some(share) = waiting.try_join_next() {
            shares.push(share.expect("a share"));
        }
        assert_eq!(shares.len(), ROOM / SHARE);
        drop(shares);
        while let Some(share) = waiting.join_next().await {
            drop(share);
        }
        unsent.forget(1);
        assert_eq!(unsent.waiting.lock().all, 1);
    }

    /// Streams on several threads, and one that writes what they have: nothing is left of it, and nobody waits for ever.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn nothing_is_left_when_all_has_been_written() {
        let unsent = Arc::new(Unsent::default());
        let (given, mut taken) = tokio::sync::mpsc::unbounded_channel();
        let mut streams = tokio::task::JoinSet::new();
        for stream in 0..200_u32 {
            let (unsent, given) = (unsent.clone(), given.clone());
            streams.spawn(async move {
                for _ in 0..100 {
                    let share = unsent.room().await;
                    unsent.add(stream, 16 * 1024);
                    given.send(stream).expect("somebody writes");
                    drop(share);
                    tokio::task::yield_now().await;
                }
            });
        }
        drop(given);
        let written = tokio::spawn({
            let unsent = unsent.clone();
            async move {
                while let Some(stream) = taken.recv().await {
                    unsent.written(stream, 16 * 1024);
                }
            }
        });
        let all = async {
            while let Some(stream) = streams.join_next().await {
                stream.expect("a stream");
            }
            written.await.expect("written");
        };
        tokio::time::timeout(Duration::from_mins(1), all).await.expect("nobody waits for ever");
        let waiting = unsent.waiting.lock();
        assert_eq!((waiting.all, waiting.streams.len()), (0, 0));
    }
}
