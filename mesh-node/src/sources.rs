//! Where the configuration comes from. A source turns what it sees into batches of [`crate::config::Change`].

pub mod directory;
pub mod last_good;
pub mod manifest;
pub mod place;
mod watch;
