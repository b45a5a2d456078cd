//! Cgroups of the bed, laid out as a kubelet lays them out.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The cgroup all beds are below.
pub fn root() -> PathBuf {
    mesh_node::capture::cgroup2_mount().unwrap_or_else(|_| PathBuf::from("/sys/fs/cgroup")).join("mesh-bed")
}

pub fn bed(id: &str) -> PathBuf {
    root().join(id)
}

/// Ends every process below a cgroup and removes it.
pub fn remove(directory: &Path) {
    let _ = fs::write(directory.join("cgroup.kill"), "1");
    for _ in 0..500 {
        if !directory.exists() || remove_tree(directory) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Removes a cgroup without processes and those below it.
fn remove_tree(directory: &Path) -> bool {
    for entry in fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(directory).is_ok()
}
