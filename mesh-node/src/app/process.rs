//! What a process needs before it does anything.

use anyhow::Context as _;

use super::stop;
use crate::io::netns::Netns;

/// What comes before everything else; how many files may be open from then on.
pub(super) fn prepare() -> anyhow::Result<u64> {
    stop::ignore_others().context("signals cannot be heard of")?;
    Netns::host().context("cannot open the node's network namespace")?;
    raise_descriptor_limit().context("cannot raise the limit of open files")
}

/// Raises the soft limit of open files to the hard one; the limit from then on.
fn raise_descriptor_limit() -> nix::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}
