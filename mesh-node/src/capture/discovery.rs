//! Finds the node's pods the way a kubelet lays them out: cgroups that carry the pod's UID, and in them processes whose
//! network namespace is the pod's.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::CaptureError;
use crate::{id::WorkloadUid, io::netns::Netns};

/// How deep below the root pods are looked for: kubepods / `QoS` class / pod, with room for a nested root.
const MAX_DEPTH: usize = 8;
/// How deep cgroups nest where this process is looked for.
const MAX_CGROUP_DEPTH: usize = 16;
/// How often the whole tree is searched for places where pods appear; in between only known places are.
const FULL_SEARCH: Duration = Duration::from_secs(5);

/// A pod that runs on this node.
#[derive(Debug, Clone)]
pub struct LocalPod {
    pub uid: WorkloadUid,
    pub netns: Arc<Netns>,
    pub netns_cookie: u64,
    /// The process its namespace was found through.
    pid: u32,
}

/// Looks for pods; keeps what it found between looks.
#[derive(Debug)]
pub struct Discovery {
    root: PathBuf,
    host_netns: u64,
    /// Directories that hold pods.
    parents: Vec<PathBuf>,
    searched: Option<Instant>,
    pods: HashMap<WorkloadUid, LocalPod>,
    incomplete: bool,
    /// Pods that could not be looked into at the last look, and at how many before that in a row.
    failing: HashMap<WorkloadUid, u32>,
}

impl Discovery {
    /// Looks below this cgroup v2 directory.
    pub fn new(root: PathBuf) -> io::Result<Self> {
        Ok(Self {
            root,
            host_netns: Netns::host()?.inode(),
            parents: Vec::new(),
            searched: None,
            pods: HashMap::new(),
            incomplete: false,
            failing: HashMap::new(),
        })
    }

    /// The pods that are there now and have a network namespace of their own. One without a process is there for as long as its cgroup
    /// is: what it has sent is still under way, and what is started in it next is of the same pod. After an error nothing is known:
    /// pods found before are still there for all anybody can tell.
    pub fn look(&mut self, now: Instant) -> io::Result<&HashMap<WorkloadUid, LocalPod>> {
        if self.searched.is_none_or(|at| now.duration_since(at) >= FULL_SEARCH) {
            let mut parents = Vec::new();
            find_parents(&self.root, MAX_DEPTH, Place::Outside, &mut parents)?;
            self.parents = parents;
            self.searched = Some(now);
        }
        let (mut found, mut incomplete, mut failing) = (HashMap::new(), false, HashMap::new());
        for parent in &self.parents {
            for (uid, directory) in pods_in(parent)? {
                let known = self.pods.get(&uid);
                let pod = match known.filter(|p| p.is_current()) {
                    Some(pod) => Some(pod.clone()),
                    // One pod that cannot be looked into changes nothing for it, nor for the others.
                    None => self.open(&uid, &directory, known).unwrap_or_else(|error| {
                        let before = self.failing.get(&uid).copied().unwrap_or(0);
                        // One that is ending is gone by the next look.
                        if before == 1 {
                            tracing::warn!(target: "capture", pod = %uid, %error, "cannot look into a pod");
                        }
                        failing.insert(uid.clone(), before.saturating_add(1));
                        incomplete |= known.is_none();
                        known.cloned()
                    }),
                };
                found.extend(pod.map(|pod| (uid, pod)));
            }
        }
        (self.pods, self.incomplete, self.failing) = (found, incomplete, failing);
        Ok(&self.pods)
    }

    /// Whether there were pods that could not be looked into, of which nothing was known before: that one is not among those found
    /// says nothing then.
    pub fn is_incomplete(&self) -> bool {
        self.incomplete
    }

    /// Finds the pod's namespace through its processes: the known one as long as a process is in it or none is in another, else that of
    /// the oldest. None while it has none of its own.
    fn open(&self, uid: &WorkloadUid, directory: &Path, known: Option<&LocalPod>) -> io::Result<Option<LocalPod>> {
        let mut pids = Vec::new();
        collect_pids(directory, MAX_DEPTH, &mut pids)?;
        pids.sort_unstable();
        let (mut first, mut denied) = (None, None);
        for pid in pids {
            // A process that ends meanwhile is no error.
            let netns = match Netns::open(&netns_path(pid)) {
                // The kernel's other answer for a process that ends at this moment.
                Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                    denied = Some(error);
                    continue;
                }
                other => vanished(other)?,
            };
            let Some(netns) = netns else { continue };
            if netns.inode() == self.host_netns {
                continue;
            }
            if let Some(known) = known.filter(|k| k.netns.inode() == netns.inode()) {
                return Ok(Some(LocalPod { pid, ..known.clone() }));
            }
            first = first.or(Some((pid, netns)));
        }
        let Some((pid, netns)) = first else {
            // Its cgroup may have gone with its last process.
            let known = known.filter(|_| directory.exists()).cloned();
            return denied.map_or(Ok(known), Err);
        };
        let netns_cookie = netns.cookie()?;
        Ok(Some(LocalPod { uid: uid.clone(), netns: Arc::new(netns), netns_cookie, pid }))
    }
}

/// What is gone is none; any other error is one.
fn vanished<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        // ENODEV: a cgroup that is being removed.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV)) => Ok(None),
        Err(error) => Err(error),
    }
}

impl LocalPod {
    /// Whether the process it was found through still is in the same namespace. A sandbox made anew has another.
    fn is_current(&self) -> bool {
        fs::metadata(netns_path(self.pid)).is_ok_and(|m| m.ino() == self.netns.inode())
    }
}

fn netns_path(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// The pod UID a cgroup directory is named after, by either cgroup driver.
///
/// cgroupfs: `pod<uid>`; systemd: `[<root>-]kubepods[-<qos>]-pod<uid with _ for ->.slice`, after every slice it is in.
pub fn pod_uid(name: &str) -> Option<WorkloadUid> {
    let uid = if let Some((slice, uid)) = name.strip_suffix(".slice").and_then(|slice| slice.rsplit_once("-pod")) {
        if !is_kubepods(slice) {
            return None;
        }
        uid.replace('_', "-")
    } else {
        name.strip_prefix("pod")?.to_owned()
    };
    // Real UIDs and the hashes of static pods: hexadecimal and dashes. Anything else is somebody else's cgroup.
    let legal = uid.len() >= 8 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    legal.then(|| WorkloadUid(uid.into()))
}

/// Whether a cgroup is of the kubelet's tree of pods, by its name: `kubepods`, and with systemd `[<root>-]kubepods[-<qos>].slice`.
fn is_kubepods(name: &str) -> bool {
    name.trim_end_matches(".slice").split('-').any(|part| part == "kubepods")
}

fn directories(path: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    let Some(entries) = vanished(fs::read_dir(path))? else { return Ok(found) };
    for entry in entries {
        let Some(entry) = vanished(entry)? else { break };
        if vanished(entry.file_type())?.is_some_and(|t| t.is_dir()) {
            found.extend(entry.file_name().into_string().ok().map(|name| (name, entry.path())));
        }
    }
    Ok(found)
}

fn pods_in(parent: &Path) -> io::Result<Vec<(WorkloadUid, PathBuf)>> {
    Ok(directories(parent)?.into_iter().filter_map(|(name, path)| Some((pod_uid(&name)?, path))).collect())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Outside,
    InKubepods,
}

/// Directories of the kubelet's tree: those named after `kubepods`, and the quality-of-service classes in them.
fn find_parents(directory: &Path, depth: usize, place: Place, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for (name, path) in directories(directory)? {
        if depth == 0 || pod_uid(&name).is_some() || name.ends_with(".scope") {
            continue;
        }
        let below = if is_kubepods(&name) { Place::InKubepods } else { place };
        if below == Place::InKubepods {
            found.push(path.clone());
        }
        find_parents(&path, depth - 1, below, found)?;
    }
    Ok(())
}

fn collect_pids(directory: &Path, depth: usize, pids: &mut Vec<u32>) -> io::Result<()> {
    let own = match fs::read_to_string(directory.join("cgroup.procs")) {
        // A threaded cgroup lists threads only; their processes are in an ancestor.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        other => vanished(other)?.unwrap_or_default(),
    };
    for pid in own.lines().filter_map(|l| l.parse::<u32>().ok()) {
        if pid == 0 {
            return Err(io::Error::other("its processes are of another PID namespace; mesh-node has to run in the node's (hostPID)"));
        }
        pids.push(pid);
    }
    if depth > 0 {
        for (_, path) in directories(directory)? {
            collect_pids(&path, depth - 1, pids)?;
        }
    }
    Ok(())
}

/// The mount point of the cgroup v2 hierarchy, from `/proc/self/mountinfo`: not every system has it at `/sys/fs/cgroup`.
pub fn cgroup2_mount() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    parse_cgroup2_mount(&mounts)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 hierarchy is mounted (mount -t cgroup2 none /sys/fs/cgroup)"))
}

fn parse_cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next() != Some("cgroup2") {
            return None;
        }
        mount.split(' ').nth(4).map(|p| PathBuf::from(p.replace("\\040", " ")))
    })
}

/// The directory of the cgroup this process is in.
fn own_cgroup() -> io::Result<PathBuf> {
    let memberships = fs::read_to_string("/proc/self/cgroup")?;
    let path = memberships.lines().find_map(|l| l.strip_prefix("0::")).unwrap_or("/");
    Ok(cgroup2_mount()?.join(path.trim_start_matches('/')))
}

/// The id the kernel knows this process's cgroup by: the inode of its directory.
pub fn own_cgroup_id() -> io::Result<u64> {
    Ok(fs::metadata(own_cgroup()?)?.ino())
}

/// Fails unless this process is below the cgroup the programs are attached to: elsewhere its own connections to
/// applications would not be recognised, and steered back to it without end.
///
/// Cgroups are compared by their number: the same one may be seen under several mounts.
pub fn check_own_cgroup(root: &Path) -> Result<(), CaptureError> {
    let own = own_cgroup_id().map_err(CaptureError::io("find the cgroup of this process"))?;
    let found = holds(root, own, MAX_CGROUP_DEPTH).map_err(CaptureError::io(format!("look through cgroup {}", root.display())))?;
    if found {
        return Ok(());
    }
    Err(CaptureError::Unsupported(format!(
        "this process's cgroup is not below --cgroup-root {}; choose a root above both pods and mesh-node",
        root.display()
    )))
}

/// Whether the cgroup of this number is below a directory and not in the kubelet's tree.
pub fn is_outside_pods(root: &Path, id: u64) -> io::Result<bool> {
    outside(root, id, MAX_CGROUP_DEPTH)
}

fn outside(directory: &Path, id: u64, depth: usize) -> io::Result<bool> {
    if vanished(fs::metadata(directory))?.is_some_and(|m| m.ino() == id) {
        return Ok(true);
    }
    if depth > 0 {
        for (name, path) in directories(directory)? {
            let in_pods = is_kubepods(&name) || pod_uid(&name).is_some();
            if !in_pods && outside(&path, id, depth - 1)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Whether a cgroup, or one below it, has this number.
fn holds(directory: &Path, id: u64, depth: usize) -> io::Result<bool> {
    if vanished(fs::metadata(directory))?.is_some_and(|m| m.ino() == id) {
        return Ok(true);
    }
    if depth > 0 {
        for (_, path) in directories(directory)? {
            if holds(&path, id, depth - 1)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_uid_is_read_from_both_cgroup_drivers() {
        let uid = "2d7a1c2e-6d0f-4f0e-9f3e-1a2b3c4d5e6f";
        let under = uid.replace('-', "_");
        for name in [
            format!("pod{uid}"),
            format!("kubepods-pod{under}.slice"),
            format!("kubepods-burstable-pod{under}.slice"),
            format!("kubepods-besteffort-pod{under}.slice"),
            // A kubelet below a cgroup of its own, as kind's.
            format!("kubelet-kubepods-pod{under}.slice"),
            format!("kubelet-kubepods-burstable-pod{under}.slice"),
        ] {
            assert_eq!(pod_uid(&name).expect("a pod").0.as_ref(), uid, "{name}");
        }
        for name in [
            "kubepods",
            "kubepods.slice",
            "kubepods-burstable.slice",
            "kubelet-kubepods-burstable.slice",
            "user-podabcdef12.slice",
            "podman",
            "pods",
            "pod",
            "cri-containerd-0123456789ab.scope",
            "system.slice",
        ] {
            assert_eq!(pod_uid(name), None, "{name}");
        }
    }

    #[test]
    fn cgroup2_mount_is_found_wherever_it_is() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_cgroup2_mount(hybrid).as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(parse_cgroup2_mount("31 23 0:28 / /sys/fs/cgroup rw - cgroup cgroup rw,cpu\n"), None);
    }

    #[test]
    fn cgroups_of_pods_are_told_from_those_of_the_node() {
        let dir = tempfile::tempdir().expect("tempdir");
        let uid = "2d7a1c2e-6d0f-4f0e-9f3e-1a2b3c4d5e6f";
        for (path, expected) in [
            ("system.slice/kubelet.service".to_owned(), true),
            (format!("kubepods/burstable/pod{uid}/c1"), false),
            (
                format!(
                    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{}.slice/cri-1.scope",
                    uid.replace('-', "_")
                ),
                false,
            ),
            ("kubelet.slice/kubelet.service".to_owned(), true),
            ("kubepods.slice".to_owned(), false),
            ("user.slice/a/b/c".to_owned(), true),
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(&path).expect("created");
            let id = fs::metadata(&path).expect("there").ino();
            assert_eq!(is_outside_pods(dir.path(), id).expect("looked"), expected, "{}", path.display());
        }
        assert!(!is_outside_pods(dir.path(), u64::MAX).expect("looked"));
    }

    #[test]
    fn kubelet_trees_of_both_drivers_are_searched() {
        let dir = tempfile::tempdir().expect("tempdir");
        let uid = "2d7a1c2e-6d0f-4f0e-9f3e-1a2b3c4d5e6";
        let under = uid.replace('-', "_");
        for path in [
            format!("kubepods/pod{uid}0/c1"),
            format!("kubepods/besteffort/pod{uid}3/c1"),
            format!("kubepods/burstable/pod{uid}1/c1"),
            format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{under}2.slice/cri-1.scope"
            ),
            "system.slice/ssh.service".to_owned(),
        ] {
            fs::create_dir_all(dir.path().join(path)).expect("created");
        }
        let mut parents = Vec::new();
        find_parents(dir.path(), MAX_DEPTH, Place::Outside, &mut parents).expect("found");
        let mut uids = parents.iter().flat_map(|p| pods_in(p).expect("read")).map(|(u, _)| u.0.to_string()).collect::<Vec<_>>();
        uids.sort();
        assert_eq!(uids, [format!("{uid}0"), format!("{uid}1"), format!("{uid}2"), format!("{uid}3")]);
    }
}
