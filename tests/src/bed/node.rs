//! A node: a network namespace with a mesh-node in it.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_node::io::netns::Netns;
use nix::sys::signal::Signal;

use super::{Bed, Process, cgroup, pins, process, program, wait_for};

/// How the mesh-node of a node is run.
#[derive(Debug, Clone, Default)]
pub struct NodeOptions {
    /// More arguments of `mesh-node run`.
    pub arguments: Vec<String>,
    /// Its environment, beside what it inherits.
    pub environment: Vec<(String, String)>,
    /// Names of the node's own address.
    pub own_names: Vec<String>,
}

impl NodeOptions {
    /// Logs nothing below warnings: no line for every connection.
    pub fn quiet(mut self) -> Self {
        self.arguments.extend(["--log".to_owned(), "warn".to_owned()]);
        self
    }

    pub fn with(arguments: &[&str]) -> Self {
        Self { arguments: arguments.iter().map(|a| (*a).to_owned()).collect(), ..Self::default() }
    }
}

/// A node of a bed.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub netns: PathBuf,
    pub cgroup: PathBuf,
    pub pins: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    hosts: Option<PathBuf>,
    process: Option<Process>,
}

const ADMIN: &str = "127.0.0.1:15000";

impl Node {
    pub(super) fn new(bed: &Bed, index: usize, options: &NodeOptions) -> Result<Self> {
        let name = format!("node{}", index + 1);
        let cgroup = cgroup::bed(&bed.id).join(&name);
        for part in ["mesh-node", "kubepods/burstable", "kubepods/besteffort"] {
            fs::create_dir_all(cgroup.join(part)).with_context(|| format!("cgroup {}", cgroup.display()))?;
        }
        let pins = pins(&bed.id).join(&name);
        let path = |p: PathBuf| p.display().to_string();
        let mut arguments: Vec<String> = ["run", "--node", &name, "--admin", ADMIN].map(str::to_owned).into();
        for (flag, value) in [
            ("--config-dir", bed.config()),
            ("--ca-dir", bed.directory.join("ca")),
            ("--state-dir", bed.directory.join("state").join(&name)),
            ("--cgroup-root", cgroup.clone()),
            ("--bpf-dir", pins.clone()),
        ] {
            arguments.extend([flag.to_owned(), path(value)]);
        }
        arguments.extend(options.arguments.iter().cloned());
        let log = bed.directory.join(format!("logs/{name}.log"));
        let hosts = (!options.own_names.is_empty()).then(|| bed.directory.join(format!("{name}.hosts")));
        if let Some(hosts) = &hosts {
            fs::write(hosts, format!("127.0.0.1 localhost\n{} {}\n", bed.node_address(index), options.own_names.join(" ")))?;
        }
        let environment = options.environment.clone();
        Ok(Self { netns: bed.node_netns(index), cgroup, pins, log, arguments, environment, hosts, process: None, name })
    }

    /// More arguments for the next start.
    pub fn arguments(&mut self, more: &[&str]) {
        self.arguments.extend(more.iter().map(|a| (*a).to_owned()));
    }

    /// Starts mesh-node.
    pub fn start(&mut self) -> Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(program("mesh-node"));
        command.args(&self.arguments).envs(self.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        process::place(&mut command, Some(self.netns.clone()), Some(self.cgroup.join("mesh-node")), self.hosts.clone());
        self.process = Some(Process::start(command)?);
        Ok(())
    }

    /// Waits until it has read its configuration and captured its pods.
    pub fn wait_ready(&self) -> Result<()> {
        let ready = wait_for("mesh-node ready", Duration::from_secs(20), || Ok(self.admin("/healthz/ready")?.starts_with("ready")));
        ready.with_context(|| format!("{}: {}", self.name, self.log_text()))
    }

    /// Stops it the polite way.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        process.signal(Signal::SIGTERM);
        let status = process.wait(Duration::from_secs(15));
        ensure!(status.success(), "{} ended with {status}: {}", self.name, self.log_text());
        Ok(())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            process.signal(signal);
        }
    }

    /// Starts a second one beside it, with more arguments, and waits for its end.
    pub fn second(&self, more: &[&str]) -> Result<std::process::Output> {
        let arguments = self.arguments.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>();
        self.mesh_node(&arguments)
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::SIGKILL);
            process.wait(Duration::from_secs(5));
        }
    }

    /// Runs another command of mesh-node on this node to its end.
    pub fn mesh_node(&self, arguments: &[&str]) -> Result<std::process::Output> {
        self.run(&program("mesh-node"), arguments)
    }

    /// Runs a program on this node, outside pods, to its end.
    pub fn run(&self, program: &Path, arguments: &[&str]) -> Result<std::process::Output> {
        self.run_in("mesh-node", program, arguments)
    }

    /// The same in a cgroup below the node's own, which is made if need be: that of a kubelet, or of a pod in the node's
    /// network.
    pub fn run_in(&self, cgroup: &str, program: &Path, arguments: &[&str]) -> Result<std::process::Output> {
        Ok(self.command(cgroup, program, arguments)?.output()?)
    }

    /// Starts a program on this node, outside pods; what it prints can be read.
    pub fn spawn(&self, program: &Path, arguments: &[&str]) -> Result<std::process::Child> {
        Ok(self.command("mesh-node", program, arguments)?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    fn command(&self, cgroup: &str, program: &Path, arguments: &[&str]) -> Result<Command> {
        let cgroup = self.cgroup.join(cgroup);
        fs::create_dir_all(&cgroup)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        process::place(&mut command, Some(self.netns.clone()), Some(cgroup), None);
        Ok(command)
    }

    /// Removes what mesh-node left in the kernel.
    pub fn uninstall(&self) -> Result<String> {
        let (pins, cgroup) = (self.pins.display().to_string(), self.cgroup.display().to_string());
        let output = self.mesh_node(&["uninstall", "--bpf-dir", &pins, "--cgroup-root", &cgroup])?;
        ensure!(output.status.success(), "uninstall: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// A page of the admin endpoint.
    pub fn admin(&self, path: &str) -> Result<String> {
        let address: SocketAddr = ADMIN.parse()?;
        let mut stream = Netns::open(&self.netns)?.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(2)))??;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("an HTTP answer")?;
        ensure!(head.contains(" 200 "), "{path}: {head}");
        Ok(body.to_owned())
    }

    pub fn admin_json(&self, path: &str) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.admin(path)?)?)
    }

    /// Sum of the samples of a metric whose line contains all of `labels`.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let text = self.admin("/metrics")?;
        let lines = text.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        let lines = lines.filter(|l| labels.iter().all(|label| l.contains(label)));
        Ok(lines.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// What mesh-node has logged until now: its lines wait up to a twentieth of a second for others.
    pub fn log_text(&self) -> String {
        std::thread::sleep(Duration::from_millis(100));
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Lines of the access log.
    pub fn access_log(&self) -> Vec<String> {
        self.log_text().lines().filter(|l| l.contains("\taccess\t")).map(str::to_owned).collect()
    }

    /// The end of the log, for a test that failed.
    pub fn print_log(&self) {
        let text = self.log_text();
        let lines = text.lines().collect::<Vec<_>>();
        eprintln!("--- {} (last lines of {})", self.name, self.log.display());
        lines.iter().skip(lines.len().saturating_sub(40)).for_each(|l| eprintln!("{l}"));
    }

    /// What is pinned below this path.
    pub fn pinned(&self, path: &str) -> PathBuf {
        mesh_node::capture::pin_directory(&self.pins).join(path)
    }

    /// Descriptors mesh-node has open.
    pub fn descriptors(&self) -> Result<usize> {
        let pid = self.pid().context("a running process")?;
        Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    }

    /// Resident memory of mesh-node, bytes.
    pub fn resident(&self) -> Result<u64> {
        let pid = self.pid().context("a running process")?;
        let mut text = String::new();
        File::open(format!("/proc/{pid}/status"))?.read_to_string(&mut text)?;
        let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("VmRSS")?;
        let kilobytes: u64 = line.split_whitespace().next().context("a number")?.parse()?;
        Ok(kilobytes * 1024)
    }
}
