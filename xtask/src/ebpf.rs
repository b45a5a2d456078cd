//! Builds the eBPF object from source and compares it with the committed one.
//!
//! The object is committed so that a user needs neither LLVM nor the Rust sources. It carries BTF (socket storage needs it)
//! but no line information; paths of the machine that built it are replaced.
//!
//! It is built from a copy in which mesh-common lies inside mesh-ebpf: cargo names a crate outside a workspace by its absolute
//! path, that name decides the order of functions, and with it which registers they use. Below the workspace it is relative,
//! so that every checkout builds the same instructions.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionKind};

use crate::{
    setup,
    steps::{ask, cargo, root, run, target},
};

/// The committed object, embedded in mesh-node.
fn committed() -> PathBuf {
    root().join("mesh-ebpf/object/mesh-ebpf.o")
}

/// Builds into the committed object.
pub fn build() -> Result<()> {
    let built = compile()?;
    fs::copy(&built, committed())?;
    println!("{} is up to date", committed().strip_prefix(root()).unwrap_or(&committed()).display());
    Ok(())
}

/// Rebuilds, compares, and loads the committed object into this kernel.
pub fn verify() -> Result<()> {
    let built = compile()?;
    let (mine, theirs) = (Code::read(&built)?, Code::read(&committed())?);
    if mine != theirs {
        bail!(
            "the committed eBPF object differs from the source in {}; run cargo xtask ebpf build and commit it",
            mine.differences(&theirs).join(", ")
        );
    }
    println!("the committed eBPF object has the instructions of the source");
    run(
        "loading the eBPF programs into this kernel's verifier",
        &mut cargo(&["run", "--quiet", "-p", "mesh-node", "--bin", "mesh-node", "--", "verify"]),
    )
}

fn compile() -> Result<PathBuf> {
    setup::run(true)?;
    let directory = target().join("ebpf");
    let source = directory.join("source");
    copy_source(&source)?;
    let mut command = cargo(&["build", "--release", "--locked", "--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"]);
    command.arg(&directory).current_dir(&source);
    // build-std is not stable; the pinned stable compiler is told to allow it for this crate alone.
    command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_ENCODED_RUSTFLAGS", flags(&source)?.join("\u{1f}"));
    command.env_remove("RUSTFLAGS").env("PATH", path_with_tools()?);
    run("building the eBPF object", &mut command)?;
    let stripped = directory.join("mesh-ebpf.o");
    let mut strip = std::process::Command::new(setup::objcopy());
    strip.args(["--strip-debug", "--remove-section=.BTF.ext", "--remove-section=.rel.BTF.ext"]);
    strip.arg(directory.join("bpfel-unknown-none/release/mesh-ebpf")).arg(&stripped);
    run("stripping it", &mut strip)?;
    Ok(stripped)
}

/// Copies what the object is made of, with mesh-common inside.
fn copy_source(to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    let (programs, types) = (root().join("mesh-ebpf"), root().join("mesh-common"));
    copy_directory(&programs.join("src"), &to.join("src"))?;
    copy_directory(&types.join("src"), &to.join("mesh-common/src"))?;
    fs::copy(types.join("Cargo.toml"), to.join("mesh-common/Cargo.toml"))?;
    fs::copy(programs.join("Cargo.lock"), to.join("Cargo.lock"))?;
    let manifest = fs::read_to_string(programs.join("Cargo.toml"))?;
    let (before, after) = manifest.split_once("\"../mesh-common\"").context("mesh-ebpf/Cargo.toml names no ../mesh-common")?;
    Ok(fs::write(to.join("Cargo.toml"), format!("{before}\"mesh-common\"{after}"))?)
}

fn copy_directory(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_directory(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

fn flags(source: &Path) -> Result<Vec<String>> {
    let sysroot = ask("rustc", &["--print", "sysroot"]).context("rustc is not installed")?;
    let home =
        std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|h| format!("{h}/.cargo"))).context("no home directory")?;
    let mut flags: Vec<String> = ["-Clinker=bpf-linker", "-Clink-arg=--btf", "-Cdebuginfo=2"].map(str::to_owned).into();
    let mut remap = |from: &Path, to: &str| flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    remap(source, "/mesh");
    remap(Path::new(sysroot.trim()), "/rust");
    let registries = fs::read_dir(Path::new(&home).join("registry/src")).into_iter().flatten().filter_map(Result::ok);
    registries.for_each(|r| remap(&r.path(), "/crates"));
    Ok(flags)
}

fn path_with_tools() -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(setup::tools().join("bin")).chain(std::env::split_paths(&path));
    Ok(std::env::join_paths(paths)?)
}

/// What the kernel runs: instructions, map definitions and what they refer to, by section.
#[derive(Debug, PartialEq, Eq)]
struct Code(BTreeMap<String, Section>);

/// Bytes, and the symbols they refer to.
type Section = (Vec<u8>, Vec<(u64, String)>);

impl Code {
    fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        let file = object::File::parse(&*bytes)?;
        let mut sections = BTreeMap::new();
        for section in file.sections() {
            let name = section.name()?;
            if section.kind() != SectionKind::Text && ![".maps", "mesh_abi", "license"].contains(&name) {
                continue;
            }
            let symbol = |target| match target {
                RelocationTarget::Symbol(index) => {
                    file.symbol_by_index(index).and_then(|s| s.name().map(str::to_owned)).unwrap_or_default()
                }
                other => format!("{other:?}"),
            };
            let relocations = section.relocations().map(|(at, r)| (at, symbol(r.target()))).collect();
            sections.insert(name.to_owned(), (section.data()?.to_vec(), relocations));
        }
        ensure!(!sections.is_empty(), "{} holds no program", path.display());
        Ok(Self(sections))
    }

    fn differences(&self, other: &Self) -> Vec<String> {
        let names = self.0.keys().chain(other.0.keys()).collect::<std::collections::BTreeSet<_>>();
        names.into_iter().filter(|n| self.0.get(*n) != other.0.get(*n)).cloned().collect()
    }
}
