//! Fuzzing with libFuzzer. Only the workspace's own crates are instrumented: cargo calls this program instead of the
//! compiler for them (`RUSTC_WORKSPACE_WRAPPER`), and it adds the coverage flags.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};

use crate::{
    setup,
    steps::{cargo, root, run as step, target},
};

const TARGETS: &[&str] = &["hbone_headers", "spiffe_id", "manifests", "detect", "http1", "routes", "jwt", "expression"];
const INSTRUMENT: &str = "MESH_FUZZ_INSTRUMENT";
/// What libFuzzer wants of the code under test.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// The exit code, when called by cargo in the compiler's place.
pub fn as_compiler_wrapper() -> Option<i32> {
    std::env::var_os(INSTRUMENT)?;
    let mut arguments = std::env::args_os().skip(1);
    let compiler = arguments.next()?;
    let status = Command::new(compiler).args(arguments).args(FLAGS).status();
    Some(status.ok().and_then(|s| s.code()).unwrap_or(1))
}

/// Fuzzes one target or all of them.
pub fn run(wanted: Option<&str>, seconds: u32) -> Result<()> {
    let targets = TARGETS.iter().filter(|t| wanted.is_none_or(|w| w == **t)).collect::<Vec<_>>();
    ensure!(!targets.is_empty(), "there is no fuzz target {}; there are {}", wanted.unwrap_or_default(), TARGETS.join(", "));
    setup::run(false)?;
    // A copy: cargo may build this very program anew meanwhile, and then its path leads nowhere.
    let wrapper = target().join("fuzz/instrument");
    fs::create_dir_all(target().join("fuzz"))?;
    fs::copy("/proc/self/exe", &wrapper)?;
    for name in targets {
        let binary = format!("fuzz_{name}");
        let mut build = cargo(&["build", "--locked", "-p", "mesh-tests", "--features", "fuzz", "--bin", &binary]);
        build.env("RUSTC_WORKSPACE_WRAPPER", &wrapper).env(INSTRUMENT, "1");
        step(&format!("building the fuzz target {name}"), &mut build)?;
        let corpus = target().join("fuzz").join(name);
        fs::create_dir_all(&corpus).with_context(|| corpus.display().to_string())?;
        let seeds = root().join("tests/corpora").join(if name == &"manifests" { "seed" } else { name });
        let artifacts = format!("-artifact_prefix={}/crash-{name}-", target().join("fuzz").display());
        let mut fuzz = Command::new(target().join("debug").join(&binary));
        fuzz.args([
            &format!("-max_total_time={seconds}"),
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-max_len=16384",
            "-print_final_stats=1",
            "-verbosity=0",
            &artifacts,
        ]);
        fuzz.arg(&corpus).arg(&seeds);
        step(&format!("fuzzing {name} for {seconds} s"), &mut fuzz)?;
    }
    Ok(())
}
