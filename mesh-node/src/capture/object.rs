//! The embedded eBPF object: checked, loaded with the pinned maps, and handed out piece by piece.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::{
    Btf, Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
    programs::Program,
};
use mesh_common::{ABI_VERSION, accelerate::KernelLayout, maps::ABI_SECTION};
use object::{Object, ObjectSection};

use super::{CaptureError, pins, sys};
use crate::telemetry::chain;

/// Built from mesh-ebpf by `cargo xtask ebpf build`; CI rebuilds it and compares.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../mesh-ebpf/object/mesh-ebpf.o");

/// A program attached to the cgroup above the pods.
pub struct Hook {
    pub program: &'static str,
    pub attach_type: u32,
}

pub const CGROUP_HOOKS: [Hook; 5] = [
    Hook { program: "mesh_connect4", attach_type: sys::CGROUP_INET4_CONNECT },
    Hook { program: "mesh_connect6", attach_type: sys::CGROUP_INET6_CONNECT },
    Hook { program: "mesh_getpeername4", attach_type: sys::CGROUP_INET4_GETPEERNAME },
    Hook { program: "mesh_getpeername6", attach_type: sys::CGROUP_INET6_GETPEERNAME },
    Hook { program: "mesh_sock_events", attach_type: sys::CGROUP_SOCK_OPS },
];

/// The program attached to every pod's network namespace.
pub const STEER: &str = "mesh_steer";

/// The program on the map of accelerated sockets.
pub const ACCELERATE: &str = "mesh_accelerate";
/// The program that is run for one socket at a time.
pub const PAIR: &str = "mesh_pair";

/// The program that goes through a namespace's TCP sockets.
pub const WAKE: &str = "mesh_wake";

/// The program that counts what applications receive.
pub const RECEIVED: &str = "mesh_received";

/// The programs without which there is no capture.
fn programs() -> impl Iterator<Item = &'static str> {
    CGROUP_HOOKS.iter().map(|h| h.program).chain([STEER])
}

/// Those that only acceleration needs: a kernel that does not take them can still capture.
const ACCELERATION: [&str; 4] = [ACCELERATE, PAIR, WAKE, RECEIVED];

/// Maps that are pinned. Socket storage and counters too: what a socket is must survive the process.
const MAPS: [&str; 15] = [
    "NODE",
    "PODS",
    "PROXIES",
    "SOCKETS",
    "PENDING",
    "PROXY_FLOWS",
    "NODE_FLOWS",
    "LISTENERS",
    "ACCELERATED",
    "ENDS",
    "EVENTS",
    "ROUTES",
    "FLOWS",
    "FLOW_EVENTS",
    "COUNTERS",
];

/// The object in the kernel.
pub struct Loaded(Ebpf);

/// Checks the ABI and loads maps (from their pins, or new and pinned) and programs.
pub fn load(directory: &Path, layout: KernelLayout) -> Result<Loaded, CaptureError> {
    check_abi(OBJECT)?;
    let paths = MAPS.map(|name| (name, pins::map(directory, name)));
    let mut loader = EbpfLoader::new();
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    loader.override_global("KERNEL_LAYOUT", &layout, true);
    let ebpf = loader.load(OBJECT).map_err(|e| CaptureError::Object(chain(&e)))?;
    let mut all = Loaded(ebpf);
    programs().try_for_each(|name| all.load(name))?;
    Ok(all)
}

/// Loads every program into this kernel without attaching or pinning anything; returns names and verified instruction
/// counts.
pub fn verify() -> Result<Vec<(&'static str, u32)>, CaptureError> {
    check_abi(OBJECT)?;
    super::probe::check()?;
    let mut ebpf = EbpfLoader::new().load(OBJECT).map_err(|e| CaptureError::Object(chain(&e)))?;
    let mut verified = Vec::new();
    for name in programs().chain(ACCELERATION) {
        let program = ebpf.program_mut(name).ok_or_else(|| CaptureError::Object(format!("program {name} is missing")))?;
        let problem = |e: &aya::programs::ProgramError| CaptureError::Program { program: name, problem: chain(e) };
        load_program(program).map_err(|e| problem(&e))?;
        let info = program.info().map_err(|e| problem(&e))?;
        verified.push((name, info.verified_instruction_count().unwrap_or(0)));
    }
    Ok(verified)
}

fn load_program(program: &mut Program) -> Result<(), aya::programs::ProgramError> {
    match program {
        Program::CgroupSockAddr(p) => p.load(),
        Program::SockOps(p) => p.load(),
        Program::SkLookup(p) => p.load(),
        Program::SkMsg(p) => p.load(),
        Program::SchedClassifier(p) => p.load(),
        Program::Iter(p) => p.load("tcp", &Btf::from_sys_fs()?),
        Program::BtfTracePoint(p) => p.load("sock_recv_length", &Btf::from_sys_fs()?),
        _ => Err(aya::programs::ProgramError::UnexpectedProgramType),
    }
}

/// Compares the version the object was built with with that of this binary.
fn check_abi(elf: &[u8]) -> Result<(), CaptureError> {
    let file = object::File::parse(elf).map_err(|e| CaptureError::Object(e.to_string()))?;
    let section = file.section_by_name(ABI_SECTION).and_then(|s| s.data().ok());
    let found = section.and_then(|d| d.get(..4)).and_then(|d| d.try_into().ok()).map(u32::from_le_bytes);
    if found == Some(ABI_VERSION) {
        return Ok(());
    }
    let found = found.map_or("none".to_owned(), |v| v.to_string());
    Err(CaptureError::Object(format!(
        "its ABI version is {found}, this binary needs {ABI_VERSION}; run cargo xtask ebpf build and build again"
    )))
}

impl Loaded {
    fn load(&mut self, name: &'static str) -> Result<(), CaptureError> {
        let program = self.0.program_mut(name).ok_or_else(|| CaptureError::Object(format!("program {name} is missing")))?;
        load_program(program).map_err(|e| CaptureError::Program { program: name, problem: chain(&e) })
    }

    /// Loads the programs of acceleration.
    pub fn load_acceleration(&mut self) -> Result<(), CaptureError> {
        ACCELERATION.into_iter().try_for_each(|name| self.load(name))
    }

    pub fn program(&self, name: &'static str) -> Result<BorrowedFd<'_>, CaptureError> {
        let problem = |problem: String| CaptureError::Program { program: name, problem };
        let program = self.0.program(name).ok_or_else(|| problem("is missing".into()))?;
        program.fd().map(|fd| fd.as_fd()).map_err(|e| problem(e.to_string()))
    }

    pub fn take<T>(&mut self, name: &'static str, cast: impl Fn(Map) -> Result<T, MapError>) -> Result<T, CaptureError> {
        let map = self.0.take_map(name).ok_or_else(|| CaptureError::Map { map: name, problem: "is missing".into() })?;
        cast(map).map_err(CaptureError::map(name))
    }

    pub fn array<V: Pod>(&mut self, name: &'static str) -> Result<Array<MapData, V>, CaptureError> {
        self.take(name, Array::try_from)
    }

    pub fn hash<K: Pod, V: Pod>(&mut self, name: &'static str) -> Result<HashMap<MapData, K, V>, CaptureError> {
        self.take(name, HashMap::try_from)
    }

    pub fn map_fd(&mut self, name: &'static str) -> Result<OwnedFd, CaptureError> {
        let Some(Map::LruHashMap(data) | Map::SockHash(data)) = self.0.take_map(name) else {
            return Err(CaptureError::Map { map: name, problem: "is missing or of another kind".into() });
        };
        data.fd().as_fd().try_clone_to_owned().map_err(CaptureError::io("duplicate a map descriptor"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_object_has_our_abi_and_another_is_refused() {
        check_abi(OBJECT).expect("our own object");
        assert!(check_abi(b"not an object").is_err());
        let mut other = OBJECT.to_vec();
        let file = object::File::parse(OBJECT).expect("parses");
        let (offset, _) = file.section_by_name(ABI_SECTION).and_then(|s| s.file_range()).expect("section");
        other[usize::try_from(offset).expect("fits")] ^= 0x7f;
        let error = check_abi(&other).expect_err("another version").to_string();
        assert!(error.contains("ABI version") && error.contains("xtask ebpf build"), "{error}");
    }
}
