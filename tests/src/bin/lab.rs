//! A bed to try things in by hand: nodes, pods, services and manifests that stay until they are told to go.
//!
//! `lab start` runs in a terminal of its own; everything else asks it over a socket.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::{
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};
use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{AMBIENT, place, program},
};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(name = "lab", about = "Nodes and pods to try things in")]
struct Lab {
    /// Where the lab is asked.
    #[arg(long, env = "MESH_LAB", default_value = "/tmp/mesh-lab.sock")]
    socket: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Start nodes, and stay until told to end. Namespace `default` is in the mesh.
    Start {
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// Flags of mesh-node.
        #[arg(last = true)]
        flags: Vec<String>,
    },
    /// Run a command in a pod, in its network and cgroup, with its hosts file.
    Exec {
        /// namespace/name
        pod: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// As `kubectl apply`: Services get addresses; everything but Deployments of Bookinfo goes to the nodes as it is.
    Apply {
        /// The same name replaces what was applied by it.
        name: String,
        /// A file; `-` is standard input.
        file: PathBuf,
    },
    #[command(flatten)]
    Ask(Ask),
}

/// What the lab is asked.
#[derive(Subcommand, Serialize, Deserialize)]
enum Ask {
    /// Start a pod. Services select it by its labels (`app`: its name).
    Pod(PodArguments),
    /// Make a namespace, in the mesh or not.
    Namespace {
        name: String,
        #[arg(long)]
        outside: bool,
    },
    /// End a pod.
    Delete {
        /// namespace/name
        pod: String,
    },
    /// Take back what was applied by a name.
    Withdraw { name: String },
    /// Where everything is, as JSON.
    Info,
    /// Remove everything.
    End,
    #[command(skip)]
    Manifest { name: String, yaml: String },
    #[command(skip)]
    Place { pod: String },
}

#[derive(Args, Serialize, Deserialize)]
struct PodArguments {
    name: String,
    #[arg(long, default_value = "default")]
    namespace: String,
    /// 0 is the first.
    #[arg(long, default_value_t = 0)]
    node: usize,
    /// Its service account; its name without this.
    #[arg(long)]
    account: Option<String>,
    /// KEY=VALUE
    #[arg(long)]
    label: Vec<String>,
    /// It is ready when something listens here.
    #[arg(long)]
    port: Option<u16>,
    /// What runs in it; nothing but a sleep without this.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Where a pod's programs run.
#[derive(Serialize, Deserialize)]
struct Placed {
    netns: PathBuf,
    cgroup: PathBuf,
    hosts: PathBuf,
}

fn main() -> Result<()> {
    let Lab { socket, what } = Lab::parse();
    match what {
        What::Start { nodes, flags } => serve(&socket, nodes, &flags),
        What::Exec { pod, command } => exec(&socket, pod, &command),
        What::Apply { name, file } => {
            let mut yaml = String::new();
            if file == Path::new("-") {
                std::io::stdin().read_to_string(&mut yaml)?;
            } else {
                yaml = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            }
            print(&ask(&socket, &Ask::Manifest { name, yaml })?)
        }
        What::Ask(question) => print(&ask(&socket, &question)?),
    }
}

fn print(answer: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(answer)?);
    Ok(())
}

fn ask(socket: &Path, question: &Ask) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("no lab at {}: lab start", socket.display()))?;
    serde_json::to_writer(&stream, question)?;
    stream.write_all(b"\n")?;
    stream.shutdown(Shutdown::Write)?;
    let answer: Result<Value, String> = serde_json::from_reader(stream)?;
    answer.map_err(|problem| anyhow!(problem))
}

fn exec(socket: &Path, pod: String, command: &[String]) -> Result<()> {
    let placed: Placed = serde_json::from_value(ask(socket, &Ask::Place { pod })?)?;
    let (program, arguments) = command.split_first().context("a command")?;
    let mut command = Command::new(program);
    command.args(arguments);
    place(&mut command, Some(placed.netns), Some(placed.cgroup), Some(placed.hosts));
    Err(command.exec()).with_context(|| program.clone())
}

fn serve(socket: &Path, nodes: usize, flags: &[String]) -> Result<()> {
    if UnixStream::connect(socket).is_ok() {
        bail!("there is a lab at {} already: lab end, or another --socket", socket.display());
    }
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
    end_on_signals(socket.to_owned())?;
    let bed = Bed::start(nodes, &NodeOptions { arguments: flags.to_vec(), ..NodeOptions::default() })?;
    bed.namespace("default", AMBIENT)?;
    let mut room = Room { bed, pods: BTreeMap::new() };
    println!("The lab is open at {}; its files are in {}", socket.display(), room.bed.directory.display());
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        let question = serde_json::from_str::<Ask>(&line);
        let ends = matches!(question, Ok(Ask::End));
        let answer = question.map_err(anyhow::Error::from).and_then(|question| room.answer(question));
        let answer = answer.map_err(|error| format!("{error:#}"));
        // Who has left needs no answer.
        let _ = stream.write_all(serde_json::to_string(&answer)?.as_bytes());
        if ends {
            break;
        }
    }
    let _ = std::fs::remove_file(socket);
    Ok(())
}

/// A signal is the wish to end.
fn end_on_signals(socket: PathBuf) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    std::thread::spawn(move || {
        let _ = signals.wait();
        let _ = ask(&socket, &Ask::End);
    });
    Ok(())
}

struct Room {
    bed: Bed,
    pods: BTreeMap<String, Pod>,
}

impl Room {
    fn answer(&mut self, question: Ask) -> Result<Value> {
        match question {
            Ask::Pod(arguments) => self.start(arguments),
            Ask::Namespace { name, outside } => {
                self.bed.namespace(&name, if outside { &[] } else { AMBIENT })?;
                Ok(json!({"namespace": name}))
            }
            Ask::Delete { pod } => {
                self.bed.delete(&self.find(&pod)?.clone())?;
                self.pods.remove(&pod);
                Ok(json!({"deleted": pod}))
            }
            Ask::Withdraw { name } => {
                let directory = self.bed.config().join("applied");
                let mine = |file: &str| {
                    file.strip_prefix(&format!("{name}-")).is_some_and(|rest| rest.trim_end_matches(".yaml").parse::<usize>().is_ok())
                };
                let files = std::fs::read_dir(&directory)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
                let files = files.filter(|file| mine(file)).collect::<Vec<_>>();
                files.iter().try_for_each(|file| std::fs::remove_file(directory.join(file)))?;
                self.bed.settle()?;
                Ok(json!({"withdrawn": files.len()}))
            }
            Ask::Manifest { name, yaml } => {
                let pods = self.bed.kubectl_apply(&name, &yaml)?;
                self.pods.extend(pods.iter().map(|pod| (format!("{}/{}", pod.namespace, pod.name), pod.clone())));
                self.bed.settle()?;
                Ok(json!({"applied": name, "pods": pods.iter().map(|pod| pod.name.clone()).collect::<Vec<_>>()}))
            }
            Ask::Place { pod } => Ok(serde_json::to_value(self.placed(self.find(&pod)?))?),
            Ask::Info => self.info(),
            Ask::End => Ok(json!("ended")),
        }
    }

    fn find(&self, pod: &str) -> Result<&Pod> {
        self.pods.get(pod).with_context(|| format!("there is no pod {pod}; there are {:?}", self.pods.keys()))
    }

    fn placed(&self, pod: &Pod) -> Placed {
        let hosts = self.bed.directory.join("hosts").join(&pod.namespace);
        Placed { netns: pod.netns.clone(), cgroup: pod.cgroup.clone(), hosts }
    }

    fn start(&mut self, arguments: PodArguments) -> Result<Value> {
        let PodArguments { name, namespace, node, account, label, port, command } = arguments;
        if node >= self.bed.nodes().len() {
            bail!("there is no node {node}; there are {}", self.bed.nodes().len());
        }
        let mut spec = PodSpec { command, port, ..PodSpec::new(&name, node) }.in_namespace(&namespace);
        if let Some(account) = account {
            spec = spec.account(&account);
        }
        for label in &label {
            let (key, value) = label.split_once('=').with_context(|| format!("--label {label}: KEY=VALUE"))?;
            spec = spec.label(key, value);
        }
        let pod = self.bed.pod(&spec)?;
        self.bed.settle()?;
        let told = json!({"name": pod.name, "namespace": pod.namespace, "uid": pod.uid, "addresses": pod.addresses});
        self.pods.insert(format!("{namespace}/{name}"), pod);
        Ok(told)
    }

    fn info(&self) -> Result<Value> {
        let meshctl = program("meshctl");
        let nodes = self.bed.nodes().iter().map(|node| {
            json!({"name": node.name, "netns": node.netns, "log": self.bed.directory.join(format!("logs/{}.log", node.name)),
                "meshctl": format!("nsenter --net={} {}", node.netns.display(), meshctl.display())})
        });
        let pods = self.pods.iter().map(|(name, pod)| {
            let placed = serde_json::to_value(self.placed(pod))?;
            Ok((
                name.clone(),
                json!({"node": self.bed.nodes()[pod.node].name, "uid": pod.uid, "addresses": pod.addresses, "runs_in": placed}),
            ))
        });
        Ok(json!({
            "directory": self.bed.directory,
            "config": self.bed.config(),
            "nodes": nodes.collect::<Vec<_>>(),
            "pods": pods.collect::<Result<serde_json::Map<_, _>>>()?,
        }))
    }
}
