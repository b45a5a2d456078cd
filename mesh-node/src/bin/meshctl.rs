//! The command line to look inside a node.

use std::process::ExitCode;

use clap::Parser;
use mesh_node::cli::Meshctl;

fn main() -> ExitCode {
    Meshctl::parse().run()
}
