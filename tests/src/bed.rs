//! A bed and what is in it. Everything is removed when the bed is dropped, also by a panic; what a killed process left
//! behind is swept by the next bed.

mod cgroup;
mod kubelet;
mod net;
mod node;
mod process;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

pub use kubelet::{Pod, PodSpec};
pub use node::{Node, NodeOptions};
pub use process::{Process, place};

use net::Network;

/// The label that enrols a namespace.
pub const AMBIENT: &[(&str, &str)] = &[("istio.io/dataplane-mode", "ambient")];

/// A cluster.
pub struct Bed {
    /// Unique among beds alive: the process and a counter.
    pub id: String,
    pub directory: PathBuf,
    network: Network,
    nodes: Vec<Node>,
    pods: BTreeMap<String, Pod>,
    services: kubelet::Services,
    next_address: u16,
}

impl Bed {
    /// A bed with this many nodes, each running mesh-node with the same options.
    pub fn start(nodes: usize, options: &NodeOptions) -> Result<Self> {
        ensure!(nix::unistd::Uid::effective().is_root(), "the test bed makes network namespaces and cgroups: run it as root");
        sweep();
        let id = new_id();
        let directory = std::env::temp_dir().join(format!("mesh-bed-{id}"));
        let mut bed = Self {
            network: Network::new(&id, nodes).inspect_err(|_| net::remove(&id))?,
            directory,
            nodes: Vec::new(),
            pods: BTreeMap::new(),
            services: kubelet::Services::default(),
            next_address: 10,
            id,
        };
        for part in ["config/applied", "config/pods", "config/services", "config/namespaces", "logs", "ca", "hosts"] {
            fs::create_dir_all(bed.directory.join(part))?;
        }
        bed.namespace("default", &[])?;
        for index in 0..nodes {
            bed.nodes.push(Node::new(&bed, index, options)?);
        }
        for node in &mut bed.nodes {
            node.start()?;
        }
        for node in &bed.nodes {
            node.wait_ready()?;
        }
        Ok(bed)
    }

    /// Two nodes whose namespace `default` is in the mesh.
    pub fn ambient(options: &NodeOptions) -> Result<Self> {
        let bed = Self::start(2, options)?;
        bed.namespace("default", AMBIENT)?;
        Ok(bed)
    }

    pub fn node(&mut self, index: usize) -> &mut Node {
        &mut self.nodes[index]
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The pods that run.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    pub fn config(&self) -> PathBuf {
        self.directory.join("config")
    }

    /// Network namespace of a node, for things that run on it outside pods.
    pub fn node_netns(&self, index: usize) -> PathBuf {
        self.network.node(index)
    }

    /// A node's own address.
    pub fn node_address(&self, index: usize) -> std::net::Ipv4Addr {
        net::node_address(index).0
    }

    /// Network namespace between the nodes: whoever listens here sees what crosses.
    pub fn fabric_netns(&self) -> PathBuf {
        self.network.fabric()
    }

    /// Leaves everything running, beyond the end of this process; [`remove`] removes it.
    pub fn keep(self) -> Result<()> {
        fs::write(self.directory.join("kept"), "")?;
        std::mem::forget(self);
        Ok(())
    }

    /// Puts a manifest into force under a name; the same name replaces it.
    pub fn apply(&self, name: &str, yaml: &str) -> Result<()> {
        write_atomically(&self.config().join(format!("applied/{name}.yaml")), yaml)
    }

    /// Takes a manifest back.
    pub fn withdraw(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.config().join(format!("applied/{name}.yaml")))?)
    }

    /// Creates or relabels a namespace.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: BTreeMap<_, _> = labels.iter().copied().collect();
        let object = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        let hosts = self.hosts(name);
        if !hosts.exists() {
            fs::write(hosts, "127.0.0.1 localhost\n::1 localhost\n")?;
        }
        write_atomically(&self.config().join(format!("namespaces/{name}.json")), &object.to_string())
    }

    fn hosts(&self, namespace: &str) -> PathBuf {
        self.directory.join("hosts").join(namespace)
    }

    /// Waits until mesh-node captures a pod, or does not any more.
    pub fn wait_captured(&self, pod: &Pod, captured: bool) -> Result<()> {
        let node = &self.nodes[pod.node];
        let what = format!("pod {} {}captured", pod.name, if captured { "" } else { "not " });
        wait_for(&what, Duration::from_secs(10), || {
            let pods = node.admin_json("/pods")?;
            let mine = pods.as_array().into_iter().flatten().find(|p| p["uid"] == pod.uid.as_str()).cloned();
            Ok(mine.is_some_and(|p| p["captured"] == captured))
        })
    }

    /// Starts pods of the mesh and waits until they are captured and every node knows them.
    pub fn meshed<const N: usize>(&mut self, specs: [PodSpec; N]) -> Result<[Pod; N]> {
        let pods = specs.iter().map(|s| self.pod(s)).collect::<Result<Vec<_>>>()?;
        pods.iter().try_for_each(|p| self.wait_captured(p, true))?;
        self.settle()?;
        pods.try_into().map_err(|_| anyhow::anyhow!("as many pods as specs"))
    }

    /// Waits until every node has read the configuration as it is now.
    pub fn settle(&self) -> Result<()> {
        // A marker that only exists to be seen in every node's snapshot.
        let marker = format!("bed-marker-{}", std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos());
        let service =
            serde_json::json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": marker}, "spec": {"clusterIP": "None"}});
        write_atomically(&self.config().join("applied/bed-marker.json"), &service.to_string())?;
        for node in self.nodes.iter().filter(|n| n.pid().is_some()) {
            wait_for("configuration read", Duration::from_secs(10), || Ok(node.admin("/services")?.contains(&marker)))?;
        }
        Ok(())
    }

    /// Runs a program in a pod, as another process of its container.
    pub fn command(&self, pod: &Pod, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).env("PYTHONUNBUFFERED", "1");
        process::place(&mut command, Some(pod.netns.clone()), Some(pod.cgroup.clone()), Some(self.hosts(&pod.namespace)));
        command
    }

    /// Runs a program in a pod to its end, for at most a minute.
    pub fn run(&self, pod: &Pod, program: &Path, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("timeout");
        command.arg("60").arg(program).args(arguments).stdin(Stdio::null());
        process::place(&mut command, Some(pod.netns.clone()), Some(pod.cgroup.clone()), Some(self.hosts(&pod.namespace)));
        command.output().with_context(|| format!("running {} in pod {}", program.display(), pod.name))
    }

    /// Runs the probe client in a pod and returns what it reports.
    pub fn probe(&self, pod: &Pod, arguments: &[&str]) -> Result<serde_json::Value> {
        let output = self.run(pod, &program("probe"), arguments)?;
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(text.trim())
            .with_context(|| format!("probe {arguments:?}: {text} {}", String::from_utf8_lossy(&output.stderr)))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.nodes.iter().for_each(Node::print_log);
        }
        self.nodes.iter_mut().for_each(Node::kill);
        self.pods.clear();
        remove(&self.id);
    }
}

/// Removes a bed that was kept.
pub fn remove(id: &str) {
    cgroup::remove(&cgroup::bed(id));
    let _ = fs::remove_dir_all(pins(id));
    net::remove(id);
    let _ = fs::remove_dir_all(std::env::temp_dir().join(format!("mesh-bed-{id}")));
}

/// Where a bed's nodes pin.
fn pins(id: &str) -> PathBuf {
    PathBuf::from("/sys/fs/bpf/mesh-bed").join(id)
}

/// Starts with the number of the process the bed belongs to.
fn new_id() -> String {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Removes beds whose process is gone, unless they were kept on purpose.
fn sweep() {
    let Ok(entries) = fs::read_dir(cgroup::root()) else { return };
    for id in entries.filter_map(|e| e.ok()?.file_name().into_string().ok()) {
        let Some(owner) = id.split_once('x').and_then(|(pid, _)| pid.parse::<u32>().ok()) else { continue };
        let kept = std::env::temp_dir().join(format!("mesh-bed-{id}/kept")).exists();
        if !kept && !Path::new(&format!("/proc/{owner}")).exists() {
            remove(&id);
        }
    }
}

/// A program of this workspace, built beside the one that runs.
pub fn program(name: &str) -> PathBuf {
    let mut directory = std::env::current_exe().unwrap_or_default();
    directory.pop();
    if directory.ends_with("deps") {
        directory.pop();
    }
    directory.join(name)
}

/// Polls until a condition holds.
pub fn wait_for(what: &str, at_most: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + at_most;
    let mut last = Ok(());
    while Instant::now() < deadline {
        match condition() {
            Ok(true) => return Ok(()),
            Ok(false) => last = Ok(()),
            Err(error) => last = Err(error),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    match last {
        Ok(()) => bail!("waited {at_most:?} in vain: {what}"),
        Err(error) => Err(error.context(format!("waited {at_most:?} in vain: {what}"))),
    }
}

fn write_atomically(path: &Path, content: &str) -> Result<()> {
    let name = path.file_name().and_then(|n| n.to_str()).context("a file name")?;
    let temporary = path.with_file_name(format!(".{name}.new"));
    fs::write(&temporary, content)?;
    Ok(fs::rename(&temporary, path)?)
}
