//! The two commands of the README.

use anyhow::Result;

use crate::{
    ebpf, fuzz, layers, setup,
    steps::{cargo, root, run as step, target},
};

/// Seconds each fuzz target runs in CI.
const FUZZ_SECONDS: u32 = 20;

/// Suites of the test bed that run with acceleration too.
const ACCELERATED: [&str; 6] = ["application_view", "routing", "services", "load", "tunnel", "policy"];

/// Every check and test. Order: what fails fastest first.
pub fn run(quick: bool) -> Result<()> {
    setup::run(!quick)?;
    setup::tests()?;
    step("formatting", &mut cargo(&["fmt", "--all", "--check"]))?;
    let mut ebpf = cargo(&["fmt", "--check"]);
    step("formatting of the eBPF programs", ebpf.current_dir(root().join("mesh-ebpf")))?;
    layers::run()?;
    step("building", &mut cargo(&["build", "--locked", "--workspace", "--all-targets"]))?;
    step(
        "clippy",
        &mut cargo(&[
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--features",
            "mesh-tests/fuzz",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    // Always of the whole workspace: of some of its packages, cargo would build what they share once more, with other features.
    step("unit tests", &mut cargo(&["test", "--locked", "--workspace", "--lib", "--bins"]))?;
    if !quick {
        ebpf::verify()?;
    }
    step("scenarios in the test bed", &mut cargo(&["test", "--locked", "--workspace", "--test", "*"]))?;
    let mut accelerated = cargo(&["test", "--locked", "--workspace"]);
    accelerated.args(ACCELERATED.iter().flat_map(|suite| ["--test", suite])).env("MESH_ACCELERATION", "on").env("MESH_SAME_NODE", "proxy");
    step("scenarios once more, with acceleration, and through the proxy on one node too", &mut accelerated)?;
    step("the demo", &mut std::process::Command::new(target().join("debug/mesh-demo")))?;
    if !quick {
        fuzz::run(None, FUZZ_SECONDS)?;
    }
    println!("\nall checks passed");
    Ok(())
}

/// Bookinfo on two nodes.
pub fn demo(keep: bool) -> Result<()> {
    setup::run(false)?;
    step(
        "building (some minutes the first time)",
        &mut cargo(&["build", "--locked", "--release", "-p", "mesh-node", "-p", "mesh-tests", "--bins"]),
    )?;
    let mut demo = std::process::Command::new(target().join("release/mesh-demo"));
    demo.args(keep.then_some("--keep"));
    step("the demo", &mut demo)
}

/// Ratios of the mesh to no mesh, or of what `mesh-bench` has an option for.
pub fn bench(rounds: u32, what: Option<&str>) -> Result<()> {
    setup::bench()?;
    step("building", &mut cargo(&["build", "--locked", "--release", "-p", "mesh-node", "-p", "mesh-tests", "--bins"]))?;
    let mut bench = std::process::Command::new(target().join("release/mesh-bench"));
    bench.args(["--rounds", &rounds.to_string()]).args(what.map(|what| format!("--{what}")));
    step("measuring", &mut bench)
}
