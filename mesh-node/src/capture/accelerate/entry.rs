//! A pair on offer, as it is known to who sees to it.

use std::time::Duration;

use mesh_common::accelerate::PairReply;
use tokio::time::Instant;

use super::{FIRST_LOOK, Pair, State};

/// Times a pair may be taken out and come back, before it stays outside.
const MAX_RETURNS: u32 = 64;

pub(super) struct Entry {
    pub pair: Pair,
    pub phase: Phase,
    pub wait: Duration,
    /// How much had been taken from either socket, and how much of that was received, when it was last looked.
    pub taken: Option<[(u32, u64); 2]>,
    /// How often the two were apart.
    pub odd: u32,
    /// How often it has been taken out to come back.
    pub returns: u32,
    /// When it is seen to next.
    pub due: Option<Instant>,
    /// It is not on offer any more, and only to be taken out.
    pub withdrawn: bool,
    /// The keys of its two sockets, if they are not its own.
    keys: Option<[u64; 2]>,
}

/// What a look tells of how a pair's owners read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// Everything since the last look was received, by both.
    Received,
    /// One of them has taken nothing since, or it is the first look.
    Unknown,
    /// One of them has taken more, or less.
    Otherwise,
}

impl Entry {
    pub fn new(pair: Pair) -> Self {
        Self { pair, phase: Phase::Outside, wait: FIRST_LOOK, taken: None, odd: 0, returns: 0, due: None, withdrawn: false, keys: None }
    }

    /// The keys of its two sockets among those that are accelerated.
    pub fn keys(&self, id: u64) -> [u64; 2] {
        self.keys.unwrap_or([id * 2, id * 2 + 1])
    }

    /// An earlier process has entered it, under these keys: it is to be taken out, and may come back.
    pub fn adopt(&mut self, keys: [u64; 2]) {
        (self.keys, self.phase) = (Some(keys), Phase::Leaving { returns: true, looks: 0 });
    }

    /// It has been taken out. What was redirected counts as received and was not taken from TCP: the two begin anew.
    pub fn taken_out(&mut self) {
        (self.keys, self.taken, self.phase) = (None, None, Phase::Outside);
    }

    pub fn withdraw(&mut self) {
        (self.withdrawn, self.phase) = (true, Phase::Leaving { returns: false, looks: 0 });
    }

    /// Has it taken out, to come back unless that was too often; what it is then.
    pub fn leave(&mut self) -> State {
        self.returns += 1;
        let returns = self.returns <= MAX_RETURNS;
        self.phase = Phase::Leaving { returns, looks: 0 };
        if returns { State::Paused } else { State::SlowReader }
    }

    /// What it is as long as it is not known whether it is fit.
    pub fn until_entered(&self) -> State {
        if self.returns == 0 { State::Young } else { State::Paused }
    }

    /// Compares with the last look.
    pub fn reads(&mut self, now: [&PairReply; 2]) -> Reads {
        let now = now.map(|reply| (reply.copied_seq, reply.received));
        let Some(before) = self.taken.replace(now) else { return Reads::Unknown };
        let since = now.iter().zip(before).map(|((copied, received), (copied_then, received_then))| {
            (u64::from(copied.wrapping_sub(copied_then)), received.wrapping_sub(received_then))
        });
        since.fold(Reads::Received, |all, (taken, received)| match all {
            Reads::Otherwise => all,
            _ if taken != received => Reads::Otherwise,
            _ if taken == 0 => Reads::Unknown,
            _ => all,
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not entered, looked at now and then.
    Outside,
    /// Entered a moment ago: what has come by TCP has to be taken first.
    Joining {
        /// How often it has been looked whether it is, and whether it was at the last look.
        looks: u32,
        settled: bool,
    },
    Inside,
    /// To be taken out when nothing is queued.
    Leaving {
        /// It may be entered again.
        returns: bool,
        /// How often it has been looked whether it can be.
        looks: u32,
    },
}
