//! What the kernel must be able to do, asked of the kernel itself and not of its version number.

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{is_map_supported, is_program_supported},
};

use super::CaptureError;

/// The kernel that has everything, for the message.
const ENOUGH: &str =
    "Linux 5.15 or newer with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF, CONFIG_BPF_STREAM_PARSER and CONFIG_IP_MULTIPLE_TABLES has all of it";

/// Fails with one message that names all that is missing, and the kernel version that has each.
pub fn check() -> Result<(), CaptureError> {
    let missing =
        missing(|program| is_program_supported(program).map_err(|e| e.to_string()), |map| is_map_supported(map).map_err(|e| e.to_string()));
    if missing.is_empty() {
        return Ok(());
    }
    let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    Err(CaptureError::Unsupported(format!("Linux {release} lacks {}. {ENOUGH}", missing.join("; "))))
}

type Answer = Result<bool, String>;

fn missing(program: impl Fn(ProgramType) -> Answer, map: impl Fn(MapType) -> Answer) -> Vec<String> {
    let programs = [
        (ProgramType::CgroupSockAddr, "cgroup/connect and getpeername programs", "5.8"),
        (ProgramType::SockOps, "sockops programs", "4.13"),
        (ProgramType::SkLookup, "sk_lookup programs", "5.9"),
    ];
    let maps = [
        (MapType::SkStorage, "socket-local storage", "5.2"),
        (MapType::SockHash, "sockhash maps", "4.18"),
        (MapType::LruHash, "LRU hash maps", "4.10"),
    ];
    let programs = programs.into_iter().filter_map(|(t, what, since)| remark(program(t), what, since));
    let maps = maps.into_iter().filter_map(|(t, what, since)| remark(map(t), what, since));
    programs.chain(maps).collect()
}

fn remark(answer: Answer, what: &str, since: &str) -> Option<String> {
    match answer {
        Ok(true) => None,
        Ok(false) => Some(format!("{what} (since Linux {since})")),
        Err(problem) => Some(format!("{what} (since Linux {since}; the kernel would not say: {problem}; are you root?)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_missing_is_named_at_once_with_its_version() {
        let all = missing(|p| Ok(p != ProgramType::SkLookup), |m| if m == MapType::SkStorage { Err("EPERM".into()) } else { Ok(true) });
        assert_eq!(all.len(), 2);
        assert!(all[0].contains("sk_lookup") && all[0].contains("5.9"), "{all:?}");
        assert!(all[1].contains("storage") && all[1].contains("EPERM"), "{all:?}");
        assert!(missing(|_| Ok(true), |_| Ok(true)).is_empty());
    }
}
