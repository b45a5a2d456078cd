//! Configuration: objects from a source become one immutable [`Snapshot`] per generation.
//!
//! One task owns the [`store::Store`]; it builds a snapshot after every batch of changes and publishes it whole. Readers
//! load it once per decision.

pub mod authorizers;
pub mod build;
pub mod publish;
pub mod settings;
pub mod snapshot;
pub mod store;
#[cfg(test)]
pub mod testing;

pub use publish::{Batch, Configuration, Publisher};
pub use settings::{DestinationRequests, EnrolmentLabel, MeshSettings, OutboundPolicy, TrustedProxy};
pub use snapshot::Snapshot;
pub use store::{Change, Origin, Status, Store};
