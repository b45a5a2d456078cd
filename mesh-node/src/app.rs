//! Composition: which pods to serve, their listeners, and the life of the process.

mod listeners;
mod node;

pub use node::{Node, NodeSettings, PodState, run};
