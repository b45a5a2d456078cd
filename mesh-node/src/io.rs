//! Sockets and byte streams: made in a pod's network namespace, relayed without losing what TCP says.

pub mod netns;
pub mod rarely;
pub mod relay;
pub mod room;
pub mod socket;
pub mod sparse;
pub mod turn;
