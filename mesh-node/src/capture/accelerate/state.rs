//! Why pairs are or are not accelerated: what operators and metrics are told.

use mesh_common::accelerate::Why;

/// Why a pair is, or is not, accelerated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It has not exchanged enough yet to tell.
    Young,
    Accelerated,
    /// A message could not be redirected; it will be again.
    Paused,
    /// The owner of one of the sockets reads blocking.
    Blocking,
    /// It carries bulk.
    Bulk,
    /// Messages could not be redirected too often, as their reader had fallen behind, or by their sizes.
    SlowReader,
    /// The owner of one of the sockets takes what comes by other means than `recv` and its kin, such as `splice`.
    Spliced,
    /// One of the sockets has TLS in the kernel, or its owner asks to be told when messages were sent, or to peek at ever more of what comes.
    Special,
    /// The owner of one of the sockets uses `io_uring`, by which it may send without a copy.
    Ring,
    /// A program of the pod has made a socket blocking in the midst of a conversation: it will do so again.
    Unfit,
    /// No memory or no room in the kernel.
    Full,
    /// One of the sockets is not there, or not established.
    Gone,
    /// The kernel refused; the log says how.
    Failed,
}

impl State {
    /// The metric label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Young => "young",
            Self::Accelerated => "accelerated",
            Self::Paused => "paused",
            Self::Blocking => "blocking",
            Self::Bulk => "bulk",
            Self::SlowReader => "slow_reader",
            Self::Spliced => "spliced",
            Self::Special => "special",
            Self::Ring => "io_uring",
            Self::Unfit => "unfit",
            Self::Full => "full",
            Self::Gone => "gone",
            Self::Failed => "failed",
        }
    }

    pub(super) fn of(why: u32) -> Self {
        match why {
            w if w == Why::Blocking as u32 => Self::Blocking,
            w if w == Why::Special as u32 => Self::Special,
            _ => Self::Bulk,
        }
    }
}
