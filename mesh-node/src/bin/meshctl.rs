//! The command line to look inside a node.

use clap::Parser;
use mesh_node::cli::Meshctl;

fn main() -> anyhow::Result<()> {
    Meshctl::parse().run()
}
