//! Notices changes below a directory through inotify.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
    time::Duration,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::{Interest, unix::AsyncFd};

/// How deep below the directory changes are noticed.
pub const MAX_DEPTH: usize = 8;
/// Changes that come within this time of each other are one.
const SETTLE: Duration = Duration::from_millis(20);
/// How often to look without having been told to, where there is no inotify.
const BLIND: Duration = Duration::from_secs(1);

/// An inotify instance the runtime can wait for.
struct Events(Inotify);

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Notices changes below a directory.
pub struct Watch(Option<AsyncFd<Events>>);

impl Watch {
    pub fn new() -> io::Result<Self> {
        match Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC) {
            Ok(inotify) => {
                // SAFETY: the value owns the descriptor it names, and keeps it for as long as it lives.
                let events = unsafe { AsyncFd::register_with_interest(Events(inotify), Interest::READABLE) };
                Ok(Self(Some(events.map_err(io::Error::from)?)))
            }
            Err(error) => {
                tracing::warn!(target: "config", %error, "no inotify: changes are noticed every {} s", BLIND.as_secs());
                Ok(Self(None))
            }
        }
    }

    /// Watches every directory below `root`; watching one again changes nothing.
    pub fn cover(&self, root: &Path) {
        let Some(inotify) = &self.0 else { return };
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ATTRIB;
        let mut stack = vec![(root.to_owned(), MAX_DEPTH)];
        while let Some((directory, depth)) = stack.pop() {
            // A directory that cannot be watched is still looked at every few seconds.
            let _ = inotify.get_ref().0.add_watch(&directory, flags);
            if depth == 0 {
                continue;
            }
            let entries = fs::read_dir(&directory).into_iter().flatten().filter_map(Result::ok);
            stack.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| (e.path(), depth - 1)));
        }
    }

    /// Completes a moment after a change, or after `at_most`.
    pub async fn changed(&mut self, at_most: Duration) {
        let Some(inotify) = &mut self.0 else { return tokio::time::sleep(at_most.min(BLIND)).await };
        if tokio::time::timeout(at_most, drain(inotify)).await.is_ok() {
            // What else belongs to the same change comes at once.
            let _ = tokio::time::timeout(SETTLE, async {
                loop {
                    drain(inotify).await;
                }
            })
            .await;
        }
    }
}

/// Waits for events and takes them all.
async fn drain(inotify: &mut AsyncFd<Events>) {
    let Ok(mut ready) = inotify.readable_mut().await else { return std::future::pending().await };
    while ready.get_inner().0.read_events().is_ok_and(|events| !events.is_empty()) {}
    ready.clear_ready();
}
