//! Command lines.

mod meshctl;
mod node;

pub use meshctl::Meshctl;
pub use node::MeshNode;
