//! Composition: which pods to serve, their listeners, and the life of the process.

mod ca;
mod further;
mod gauges;
mod gone;
mod listeners;
mod node;
mod process;
mod served;
mod stop;

pub use ca::{CaSettings, ClusterSettings, run_ca};
pub use node::{CertificateSettings, NO_PROCESS, Node, NodeSettings, PodState, run};
