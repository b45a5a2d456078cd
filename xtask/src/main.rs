//! `cargo xtask`: everything that is done to this workspace, by one command each.

mod ebpf;
mod fuzz;
mod layers;
mod setup;
mod steps;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Automation of mesh-node.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Xtask {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check the machine and install what is missing; says what and why. A second run is instant.
    Setup {
        /// Also what building the eBPF object needs: LLVM, the Rust sources, bpf-linker.
        #[arg(long)]
        ebpf: bool,
    },
    /// Build or verify the eBPF object.
    Ebpf {
        #[command(subcommand)]
        command: EbpfCommand,
    },
    /// Set up, build, and run Bookinfo on two meshed nodes; needs root. About twenty seconds after the build.
    Demo {
        /// Leave the nodes and pods running and print how to explore and how to remove them.
        #[arg(long)]
        keep: bool,
    },
    /// Set up, build, and run every check and test, as CI does; needs root.
    Test {
        /// Leave out the rebuild of the eBPF object and the fuzzing.
        #[arg(long)]
        quick: bool,
    },
    /// Measure ratios of meshed to plain connections in the test bed, in one run (wrk, nginx, iperf3).
    Bench {
        /// `accel`: pods of one node without a mesh, with acceleration off, and on. `telemetry`: with metrics and access log off, with
        /// metrics, and with both. `envoy`: one HTTP hop through mesh-node and through a real Envoy.
        #[arg(value_parser = ["accel", "telemetry", "envoy"])]
        what: Option<String>,
        /// Rounds of each measurement; the median counts.
        #[arg(long, default_value_t = 3)]
        rounds: u32,
    },
    /// Check that modules of mesh-node import only from the layers they may.
    Layers,
    /// Run fuzz targets for some time each.
    Fuzz {
        /// One target; all without it.
        target: Option<String>,
        /// Seconds for each target.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
}

#[derive(Subcommand)]
enum EbpfCommand {
    /// Build mesh-ebpf from source into the committed object.
    Build,
    /// Rebuild and compare with the committed object, then load it into this kernel's verifier.
    Verify,
}

fn main() -> Result<()> {
    if let Some(code) = fuzz::as_compiler_wrapper() {
        std::process::exit(code);
    }
    match Xtask::parse().command {
        Command::Setup { ebpf } => setup::run(ebpf),
        Command::Ebpf { command: EbpfCommand::Build } => ebpf::build(),
        Command::Ebpf { command: EbpfCommand::Verify } => ebpf::verify(),
        Command::Demo { keep } => test::demo(keep),
        Command::Test { quick } => test::run(quick),
        Command::Bench { what, rounds } => test::bench(rounds, what.as_deref()),
        Command::Layers => layers::run(),
        Command::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds),
    }
}
