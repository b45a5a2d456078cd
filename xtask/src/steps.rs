//! Running programs, with a line before each that says what is being done.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

/// The workspace's directory.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// Where cargo puts what it builds.
pub fn target() -> PathBuf {
    // A relative one is meant from the workspace.
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// A cargo command on the workspace.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

/// Runs a step, its output in full view.
pub fn run(what: &str, command: &mut Command) -> Result<()> {
    println!("\n==> {what}");
    let started = Instant::now();
    let status = command.status().with_context(|| format!("{what}: cannot run {}", command.get_program().display()))?;
    ensure!(status.success(), "{what}: failed ({status})");
    println!("    done in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Output of a program that answers at once, or `None` when it cannot be run or fails.
pub fn ask(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
