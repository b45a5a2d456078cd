//! The node agent.

use std::process::ExitCode;

use clap::Parser;
use mesh_node::cli::MeshNode;

fn main() -> ExitCode {
    match MeshNode::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}
