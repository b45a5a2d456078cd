//! Network namespaces: finding them, and being in one just long enough to make a socket.
//!
//! Namespaces are a property of the thread. [`Netns::enter`] switches the calling thread, runs a closure that must not
//! await or spawn, and switches back; a thread that cannot come back would do other pods' work in this one's
//! namespace, so the process aborts instead.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};

/// `SO_NETNS_COOKIE`, since Linux 5.14; not in libc for every target.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// An open network namespace. Holding it keeps the namespace alive.
#[derive(Debug)]
pub struct Netns {
    file: File,
    inode: u64,
}

impl Netns {
    /// Opens a namespace file, such as `/proc/PID/ns/net` or a bind mount of one.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }

    /// The namespace this process started in, opened once.
    pub fn host() -> io::Result<&'static Self> {
        static HOST: OnceLock<Netns> = OnceLock::new();
        if let Some(host) = HOST.get() {
            return Ok(host);
        }
        let host = Self::open(Path::new("/proc/self/ns/net"))?;
        Ok(HOST.get_or_init(|| host))
    }

    /// The number that identifies the namespace on this kernel as long as it lives.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `f` with the calling thread in this namespace.
    pub fn enter<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let _back = Return(Self::host()?);
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        Ok(f())
    }

    /// The kernel's cookie of this namespace: what the eBPF programs know it by.
    pub fn cookie(&self) -> io::Result<u64> {
        let socket = self.enter(|| socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None))??;
        let mut cookie = 0_u64;
        let mut len = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(8);
        // SAFETY: a valid descriptor, and a buffer of the length given.
        let ret =
            unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut len) };
        if ret == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
    }
}

/// Brings the thread back, also when the closure panics.
struct Return(&'static Netns);

impl Drop for Return {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "a thread cannot return to the node's network namespace; aborting");
            std::process::abort();
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
