//! The node agent.

use clap::Parser;
use mesh_node::cli::MeshNode;

fn main() -> anyhow::Result<()> {
    MeshNode::parse().run()
}
