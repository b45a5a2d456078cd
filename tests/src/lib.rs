//! The test bed: a cluster on one machine.
//!
//! A node is a network namespace, joined to the others by a fabric namespace with a bridge; a pod is a network namespace
//! behind its node's bridge and a cgroup named as a kubelet names it, with real processes in it. Each node runs a real
//! mesh-node attached to its own part of the cgroup tree. [`Bed`] plays the kubelet and the API server. It needs root.

pub mod bed;
pub mod engine;
pub mod envoy;
pub mod frames;
pub mod pattern;
pub mod peer;
pub mod raw;
pub mod scripted;

pub use bed::{Bed, NodeOptions, Pod, PodSpec};
pub mod token;
pub mod wire;
