//! Pins: what keeps capture in the kernel when the process is gone.
//!
//! ```text
//! <base>/v<ABI>/maps/<MAP>          maps
//! <base>/v<ABI>/links/<program>     programs on the pods' cgroup
//! <base>/v<ABI>/links/steer-<cookie> sk_lookup of one pod's network namespace
//! ```

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{CaptureError, pin_directory, sys};

const STEER_PREFIX: &str = "steer-";

/// Makes the pin directory of this ABI version, mounting a bpffs when there is none.
pub fn prepare(base: &Path) -> Result<PathBuf, CaptureError> {
    let directory = pin_directory(base);
    let parent = existing_ancestor(base);
    let on_bpffs = statfs(parent).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
    if !on_bpffs {
        let default = Path::new("/sys/fs/bpf");
        if !base.starts_with(default) {
            let problem = format!(
                "{} is not on a bpf file system; mount one there (mount -t bpf bpf {0}) or use a path below {1}",
                base.display(),
                default.display()
            );
            return Err(CaptureError::Unsupported(problem));
        }
        mount(Some("bpf"), default, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .map_err(|e| CaptureError::io("mount a bpf file system on /sys/fs/bpf")(e.into()))?;
    }
    for part in ["maps", "links"] {
        let path = directory.join(part);
        fs::create_dir_all(&path).map_err(CaptureError::io(format!("create {}", path.display())))?;
    }
    Ok(directory)
}

fn existing_ancestor(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

pub fn map(directory: &Path, name: &str) -> PathBuf {
    directory.join("maps").join(name)
}

pub fn hook_link(directory: &Path, program: &str) -> PathBuf {
    directory.join("links").join(program)
}

pub fn steer_link(directory: &Path, cookie: u64) -> PathBuf {
    directory.join("links").join(format!("{STEER_PREFIX}{cookie}"))
}

/// Cookies of the network namespaces that are steered.
pub fn steered(directory: &Path) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(directory.join("links")) else { return Vec::new() };
    let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
    names.filter_map(|n| n.strip_prefix(STEER_PREFIX)?.parse().ok()).collect()
}

/// Makes the link at `path` run `program` on `target`: an existing one is given the program, otherwise it is made.
pub fn attach(path: &Path, program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32) -> Result<(), CaptureError> {
    match sys::open_pin(path) {
        Ok(link) => match sys::link_update(link.as_fd(), program) {
            Ok(()) => return Ok(()),
            // The cgroup or namespace the link was on is gone (ENOLINK): the pin is all that is left of it.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => remove(path)?,
            Err(error) => return Err(CaptureError::io(format!("update the link {}", path.display()))(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(CaptureError::io(format!("open the link {}", path.display()))(error)),
    }
    let link = sys::link_create(program, target, attach_type).map_err(CaptureError::io(format!("attach {}", path.display())))?;
    sys::pin(link.as_fd(), path).map_err(CaptureError::io(format!("pin {}", path.display())))
}

/// Held by the process that serves: a second one would change what the first goes by.
pub fn lock(base: &Path) -> Result<Flock<fs::File>, CaptureError> {
    let directory = fs::File::open(base).map_err(CaptureError::io(format!("open {}", base.display())))?;
    Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        if error == nix::Error::EWOULDBLOCK {
            return CaptureError::Taken(base.display().to_string());
        }
        CaptureError::io(format!("lock {}", base.display()))(error.into())
    })
}

/// Gives every steered namespace the current program; links of namespaces that are gone are dropped.
pub fn update_steering(directory: &Path, program: BorrowedFd<'_>) -> Result<(), CaptureError> {
    for cookie in steered(directory) {
        let path = steer_link(directory, cookie);
        match sys::open_pin(&path).and_then(|link| sys::link_update(link.as_fd(), program)) {
            Ok(()) => {}
            // The namespace is gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => remove(&path)?,
            Err(error) => return Err(CaptureError::io(format!("update the link {}", path.display()))(error)),
        }
    }
    Ok(())
}

/// Whether a program of this name is attached to a cgroup that is pinned nowhere below `base`: a process that was started with another directory,
/// alive or dead, has put it there, and would have each connection judged twice.
pub fn is_foreign(base: &Path, program: &str, cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<bool> {
    /// What the kernel keeps of a program's name.
    const NAME: usize = 15;
    let attached = sys::programs_on(cgroup, attach_type)?;
    let pinned = fs::read_dir(base).into_iter().flat_map(versions).map(|version| hook_link(&version, program));
    let ours = pinned.filter_map(|path| sys::link_program(sys::open_pin(&path).ok()?.as_fd()).ok()).collect::<Vec<_>>();
    if attached.iter().all(|id| ours.contains(id)) {
        return Ok(false);
    }
    let name = program.get(..NAME).unwrap_or(program).as_bytes();
    let of_that_name = aya::programs::loaded_programs().filter_map(Result::ok).filter(|info| info.name() == name).map(|info| info.id());
    Ok(of_that_name.filter(|id| attached.contains(id) && !ours.contains(id)).count() > 0)
}

/// Removes the pin of a link that is on another cgroup: the root was changed since.
pub fn drop_foreign(path: &Path, cgroup: &fs::File) -> Result<(), CaptureError> {
    let Ok(link) = sys::open_pin(path) else { return Ok(()) };
    let inspect = || CaptureError::io(format!("inspect the link {}", path.display()));
    let wanted = cgroup.metadata().map_err(inspect())?.ino();
    if sys::link_cgroup(link.as_fd()).map_err(inspect())? != wanted {
        detach(path);
    }
    Ok(())
}

/// Takes a program off what it is linked to and removes the pin. Nothing to do is fine.
pub fn detach(path: &Path) {
    if let Ok(link) = sys::open_pin(path) {
        // A link whose namespace is gone is detached already.
        let _ = sys::link_detach(link.as_fd());
    }
    let _ = fs::remove_file(path);
}

fn remove(path: &Path) -> Result<(), CaptureError> {
    fs::remove_file(path).map_err(CaptureError::io(format!("remove {}", path.display())))
}

/// Pin directories among these.
fn versions(entries: fs::ReadDir) -> impl Iterator<Item = PathBuf> {
    let is_version = |path: &Path| {
        let name = path.file_name().and_then(|n| n.to_str()?.strip_prefix('v'));
        name.is_some_and(|v| v.parse::<u32>().is_ok()) && path.join("maps").is_dir()
    };
    entries.filter_map(Result::ok).map(|e| e.path()).filter(move |path| is_version(path))
}

/// Pins of other ABI versions beside `directory`.
pub fn others(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = directory.parent().and_then(|base| fs::read_dir(base).ok());
    entries.into_iter().flat_map(versions).filter(move |v| v != directory)
}

/// Takes off what another ABI version left attached beside `directory`, and removes its pins.
pub fn drop_others(directory: &Path) -> Result<(), CaptureError> {
    for other in others(directory) {
        let links = fs::read_dir(other.join("links")).into_iter().flatten().filter_map(Result::ok);
        links.for_each(|link| detach(&link.path()));
        fs::remove_dir_all(&other).map_err(CaptureError::io(format!("remove {}", other.display())))?;
        tracing::info!(target: "capture", pins = %other.display(), "took over from another version");
    }
    Ok(())
}

/// Removes every pin of every ABI version below `base`, and nothing else: programs detach, maps go. True when there was
/// something.
pub fn uninstall(base: &Path) -> Result<bool, CaptureError> {
    let entries = match fs::read_dir(base) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(CaptureError::io(format!("read {}", base.display()))(error)),
    };
    // One that does not say yet that it serves holds them already.
    let _held = lock(base)?;
    let mut removed = false;
    for version in versions(entries) {
        // At once: without its pin a link goes some time later.
        let links = fs::read_dir(version.join("links")).into_iter().flatten().filter_map(Result::ok);
        links.for_each(|link| detach(&link.path()));
        fs::remove_dir_all(&version).map_err(CaptureError::io(format!("remove {}", version.display())))?;
        removed = true;
    }
    // Stays when something else is in it.
    let _ = fs::remove_dir(base);
    Ok(removed)
}
