//! The node agent.

use std::process::ExitCode;

use clap::Parser;
use mesh_node::cli::MeshNode;

/// A proxy allocates and frees the same few sizes without end, and often frees on another thread than it allocated on.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match MeshNode::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}
