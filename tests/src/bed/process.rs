//! Processes of the bed: placed in a network namespace, a cgroup and, for pods, with a hosts file of their own.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigSet, Signal, kill},
    unistd::Pid,
};

/// Arranges where a command will run. It dies with the process that starts it.
pub fn place(command: &mut Command, netns: Option<PathBuf>, cgroup: Option<PathBuf>, hosts: Option<PathBuf>) {
    let enter = move || -> io::Result<()> {
        // The demo blocks the signals it waits for; its children are not to.
        SigSet::empty().thread_set_mask()?;
        if let Some(cgroup) = &cgroup {
            let mut procs = OpenOptions::new().write(true).open(cgroup.join("cgroup.procs"))?;
            io::Write::write_all(&mut procs, b"0")?;
        }
        if let Some(netns) = &netns {
            setns(File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
        }
        if let Some(hosts) = &hosts {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(None::<&Path>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            mount(Some(hosts.as_path()), "/etc/hosts", None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure opens files and makes system calls; the parent's other threads may hold
    // the allocator's lock, which glibc resets in the child.
    unsafe { command.pre_exec(enter) };
}

/// A process of the bed; ended when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    pub fn start(mut command: Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        Ok(Self { child })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // A process that has ended is as good as signalled.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end; after `at_most` it is killed.
    pub fn wait(&mut self, at_most: Duration) -> ExitStatus {
        let ended = super::wait_for("the end of a process", at_most, || Ok(self.child.try_wait()?.is_some()));
        if ended.is_err() {
            self.signal(Signal::SIGKILL);
        }
        self.child.wait().unwrap_or_else(|_| ExitStatus::from_raw(0))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
