//! Room for what is kept of bodies: bounded for each pod and for all of the node.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::proxy::http::framing::Frame;

/// Most that is kept of all bodies of the node, bytes.
const REPLAY_ALL: usize = 64 * 1024 * 1024;
/// Most that one pod's requests keep of it, bytes.
pub const REPLAY_SHARE: usize = REPLAY_ALL / 4;
/// Data below this is copied to be kept: a slice would hold all that was read with it.
const COPY_BELOW: usize = 4 * 1024;

/// What keeping a frame costs, bytes.
pub fn cost(frame: &Frame) -> usize {
    let payload = match frame {
        Frame::Data(data) => data.len(),
        Frame::Trailers(trailers) => trailers.iter().map(|(n, v)| n.as_str().len() + v.len() + 64).sum(),
    };
    payload + size_of::<Frame>()
}

pub fn compact(frame: &Frame) -> Frame {
    match frame {
        Frame::Data(data) if data.len() < COPY_BELOW => Frame::Data(bytes::Bytes::copy_from_slice(data)),
        other => other.clone(),
    }
}

/// What requests keep of bodies, bytes: those of one pod, and all of the node.
#[derive(Debug, Clone, Default)]
pub struct Replays {
    own: Share,
    all: Arc<AtomicUsize>,
}

/// How much of the room a use may fill.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    All,
    /// Mirrors that are slow leave requests at least the other half.
    Half,
}

impl Part {
    fn of(self, all: usize) -> usize {
        match self {
            Self::All => all,
            Self::Half => all / 2,
        }
    }
}

/// What the requests of one pod keep of bodies, bytes.
#[derive(Debug, Clone, Default)]
pub struct Share(Arc<AtomicUsize>);

#[cfg(test)]
impl Share {
    pub fn used(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Replays {
    /// The part of a pod, which leaves the others theirs.
    pub fn of(&self, own: &Share) -> Self {
        Self { own: own.clone(), all: self.all.clone() }
    }

    /// Of all.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        assert!(self.own.used() <= self.all.load(Ordering::Relaxed));
        self.all.load(Ordering::Relaxed)
    }

    /// Takes it if there is room in this part of what there is.
    pub fn take(&self, n: usize, part: Part) -> bool {
        let up = |most: usize| move |used: usize| used.checked_add(n).filter(|used| *used <= most);
        let take = |of: &AtomicUsize, most| of.fetch_update(Ordering::Relaxed, Ordering::Relaxed, up(part.of(most))).is_ok();
        if !take(&self.own.0, REPLAY_SHARE) {
            return false;
        }
        let taken = take(&self.all, REPLAY_ALL);
        if !taken {
            self.own.0.fetch_sub(n, Ordering::Relaxed);
        }
        taken
    }

    /// Takes it whether or not there is room.
    pub fn force(&self, n: usize) {
        self.own.0.fetch_add(n, Ordering::Relaxed);
        self.all.fetch_add(n, Ordering::Relaxed);
    }

    pub fn give_back(&self, n: usize) {
        // Of most requests nothing is kept, and these are shared by all.
        if n == 0 {
            return;
        }
        self.own.0.fetch_sub(n, Ordering::Relaxed);
        self.all.fetch_sub(n, Ordering::Relaxed);
    }
}

/// What a mirror is sent of a body.
pub enum Copied {
    Frame {
        frame: Frame,
        _room: Charge,
    },
    /// It is complete. Without this it was cut.
    End,
}

impl Copied {
    /// A copy of the frame, if there is room for it.
    pub fn of(frame: &Frame, replays: &Replays) -> Option<Self> {
        let n = cost(frame);
        let room = || Charge { replays: replays.clone(), n };
        replays.take(n, Part::Half).then(|| Self::Frame { frame: compact(frame), _room: room() })
    }
}

/// Room that is taken until this is dropped.
pub struct Charge {
    replays: Replays,
    n: usize,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.replays.give_back(self.n);
    }
}
