//! Capture: the eBPF programs that bring the TCP connections of enrolled pods to this process.
//!
//! Everything the kernel needs outlives the process: links and maps are pinned in a bpffs directory named after the ABI
//! version, so a crashed or restarted node keeps its fail mode and the next process takes over where the last one
//! stopped. [`Capture`] owns the maps and links; it knows nothing of policy or proxying.

mod accelerate;
mod btf;
mod diag;
pub mod direct;
mod discovery;
mod object;
mod pins;
mod probe;
mod routing;
mod sys;

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SockHash};
use mesh_common::{
    Address, addr,
    maps::{ALIVE, Counter, FlowKey, MAX_PROXIES, MAX_PROXY_FLOWS, NodeConfig, PendingKey, Pod},
};
use nix::fcntl::Flock;
use parking_lot::Mutex;

pub use accelerate::{Accelerator, Offered, Offers, Pair, PairState, State};
pub use direct::{Dialled, Direct, DirectFlow, FlowEvents, Phase};
pub use discovery::{Discovery, LocalPod, cgroup2_mount, pod_uid};
pub use object::verify;
pub use pins::uninstall;
pub use routing::local_addresses;

use crate::io::netns::Netns;

/// What happens to connections of enrolled pods while no process serves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum FailMode {
    /// They are refused.
    #[default]
    Closed,
    /// They pass untouched.
    Open,
}

/// Whether messages may move past the TCP stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Acceleration {
    /// Where it is seen to be safe and of use.
    On,
    /// Nowhere. The default for now: a program that makes a socket blocking again in the midst of a conversation can be told `EAGAIN`
    /// once, and the kernel has no way to prevent it.
    #[default]
    Off,
}

/// How connections between pods of this node go that need nothing of the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum SameNode {
    /// From one to the other, when policy allows them whatever they carry; counted and cut like any other.
    #[default]
    Direct,
    /// Through the proxy, as all others.
    Proxy,
}

/// Where capture lives.
#[derive(Debug, Clone)]
pub struct CaptureSettings {
    /// The cgroup v2 directory above all pods and above this process.
    pub cgroup: PathBuf,
    /// A directory on a bpffs; pins go below it, by ABI version.
    pub pins: PathBuf,
    pub fail_mode: FailMode,
    pub acceleration: Acceleration,
    pub same_node: SameNode,
}

/// Why capture cannot work.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("this kernel cannot run mesh-node: {0}")]
    Unsupported(String),
    #[error("another mesh-node serves with {0}; stop it first, or give this one another --bpf-dir and another --cgroup-root")]
    Taken(String),
    #[error(
        "programs of another mesh-node are attached to {cgroup} that are not pinned below {pins}: give this one the --bpf-dir that one had, or remove \
         them with mesh-node uninstall --bpf-dir DIRECTORY"
    )]
    Foreign { cgroup: String, pins: String },
    #[error("the eBPF object is unusable: {0}")]
    Object(String),
    #[error("eBPF program {program} does not load: {problem}")]
    Program { program: &'static str, problem: String },
    #[error("eBPF map {map}: {problem}")]
    Map { map: &'static str, problem: String },
    #[error("cannot {what}")]
    Io { what: String, source: io::Error },
}

impl CaptureError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    fn map(map: &'static str) -> impl Fn(MapError) -> Self {
        move |error| Self::Map { map, problem: error.to_string() }
    }
}

/// The loaded programs and their maps.
pub struct Capture {
    /// Stands for this process being alive, see [`Capture::announce`].
    alive: std::net::TcpListener,
    directory: PathBuf,
    steer: OwnedFd,
    pods: HashMap<MapData, u64, Pod>,
    listeners: SockHash<MapData, [u8; 16]>,
    counters: PerCpuArray<MapData, u64>,
    pending: OwnedFd,
    node_flows: OwnedFd,
    proxy_flows: OwnedFd,
    cgroup: PathBuf,
    /// What acceleration needs, or why this kernel cannot.
    acceleration: Option<Result<accelerate::Parts, String>>,
    direct: Option<(Direct, FlowEvents)>,
    same_node: SameNode,
    _lock: Flock<std::fs::File>,
}

fn acceleration(loaded: &mut object::Loaded) -> Result<accelerate::Parts, CaptureError> {
    loaded.load_acceleration()?;
    let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(CaptureError::io("duplicate a program descriptor"));
    let pair = duplicate(loaded.program(object::PAIR)?)?;
    let program = duplicate(loaded.program(object::ACCELERATE)?)?;
    let sockets = loaded.map_fd("ACCELERATED")?;
    sys::attach_to_map(sockets.as_fd(), program.as_fd(), sys::SK_MSG_VERDICT)
        .map_err(CaptureError::io("attach the program of acceleration"))?;
    let wake = sys::iterator(loaded.program(object::WAKE)?).map_err(CaptureError::io("make an iterator over sockets"))?;
    let received = sys::trace(loaded.program(object::RECEIVED)?).map_err(CaptureError::io("count what applications receive"))?;
    Ok(accelerate::Parts { pair, wake, received, sockets, events: loaded.take("EVENTS", RingBuf::try_from)? })
}

/// The cgroup, unless programs of another mesh-node are attached to it, which are pinned elsewhere.
pub fn own_cgroup(pins: &Path, cgroup: &Path) -> Result<std::fs::File, CaptureError> {
    let open = std::fs::File::open(cgroup).map_err(CaptureError::io(format!("open cgroup {}", cgroup.display())))?;
    for hook in object::CGROUP_HOOKS {
        let foreign = pins::is_foreign(pins, hook.program, open.as_fd(), hook.attach_type);
        if foreign.map_err(CaptureError::io(format!("ask for the programs of {}", cgroup.display())))? {
            return Err(CaptureError::Foreign { cgroup: cgroup.display().to_string(), pins: pins.display().to_string() });
        }
    }
    Ok(open)
}

impl Capture {
    /// Loads the programs with the pinned maps, takes over pinned links and attaches what is not attached yet.
    ///
    /// Pods enrolled by an earlier process stay enrolled until [`Capture::retain`].
    pub fn open(settings: &CaptureSettings) -> Result<Self, CaptureError> {
        probe::check()?;
        let directory = pins::prepare(&settings.pins)?;
        let lock = pins::lock(&settings.pins)?;
        let layout = accelerate::kernel_layout();
        let mut loaded = object::load(&directory, layout.clone().unwrap_or_default())?;
        let netns_cookie = Netns::host().and_then(Netns::cookie).map_err(CaptureError::io("read a network namespace cookie"))?;
        let node = NodeConfig { fail_open: u32::from(settings.fail_mode == FailMode::Open), pad: 0, netns_cookie };
        loaded.array::<NodeConfig>("NODE")?.set(0, node, 0).map_err(CaptureError::map("NODE"))?;
        register_self(&mut loaded.hash("PROXIES")?)?;
        discovery::check_own_cgroup(&settings.cgroup)?;
        let cgroup = own_cgroup(&settings.pins, &settings.cgroup)?;
        for hook in object::CGROUP_HOOKS {
            let link = pins::hook_link(&directory, hook.program);
            pins::drop_foreign(&link, &cgroup)?;
            pins::attach(&link, loaded.program(hook.program)?, cgroup.as_fd(), hook.attach_type)?;
        }
        let steer = loaded.program(object::STEER)?.try_clone_to_owned().map_err(CaptureError::io("duplicate a program descriptor"))?;
        pins::update_steering(&directory, steer.as_fd())?;
        let acceleration = match layout {
            Ok(_) if !cfg!(feature = "acceleration") => Err("this build is without it (feature acceleration)".to_owned()),
            Ok(_) if settings.acceleration == Acceleration::Off => Err("it is switched off (--acceleration)".to_owned()),
            Ok(_) => acceleration(&mut loaded).map_err(|e| crate::telemetry::chain(&e)),
            Err(why) => Err(why),
        };
        let alive = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).map_err(CaptureError::io("listen on loopback"))?;
        Ok(Self {
            alive,
            pods: loaded.hash("PODS")?,
            listeners: loaded.take("LISTENERS", SockHash::try_from)?,
            counters: loaded.take("COUNTERS", PerCpuArray::try_from)?,
            pending: loaded.map_fd("PENDING")?,
            node_flows: loaded.map_fd("NODE_FLOWS")?,
            proxy_flows: loaded.map_fd("PROXY_FLOWS")?,
            cgroup: settings.cgroup.clone(),
            acceleration: Some(acceleration),
            direct: Some(direct::open(&mut loaded)?),
            same_node: settings.same_node,
            steer,
            directory,
            _lock: lock,
        })
    }

    /// What sees to acceleration, and where pairs are offered to it; or why this kernel cannot. To be called once. `changed`
    /// hears of every change of a pair's state.
    pub fn accelerator(&mut self, changed: impl Fn(State) + Send + 'static) -> Result<(Accelerator, Offers), String> {
        let parts = self.acceleration.take().unwrap_or_else(|| Err("it is in use already".into()))?;
        Accelerator::new(parts, changed).map_err(|e| crate::telemetry::chain(&e))
    }

    /// Direct connections of pods, and what happens to them. None the second time.
    pub fn direct(&mut self) -> Option<(Direct, FlowEvents)> {
        self.direct.take()
    }

    /// Whether what another version of this program left attached is there still.
    pub fn follows_another(&self) -> bool {
        pins::others(&self.directory).next().is_some()
    }

    /// Says that this process serves: from here on the fail mode is not asked for. To be called when every pod that is to
    /// be captured is: what another version of this program left attached held them until now, as its process is gone, and
    /// is taken off.
    ///
    /// The kernel forgets the listener when the process ends, however it ends.
    pub fn announce(&mut self) -> Result<(), CaptureError> {
        self.listeners.insert(ALIVE, self.alive.as_raw_fd(), 0).map_err(CaptureError::map("LISTENERS"))?;
        pins::drop_others(&self.directory)
    }

    /// Says that this process serves no more: the fail mode decides from here on, also while there still are listeners, which would
    /// take with them who comes as they close.
    pub fn withdraw(&mut self) {
        // First: as long as this one is there, connections to a pod without a listener are refused.
        let _ = self.listeners.remove(&ALIVE);
        for pod in self.listeners.keys().filter_map(Result::ok).collect::<Vec<_>>() {
            let _ = self.listeners.remove(&pod);
        }
    }

    /// Enrols a pod whose listeners are ready: from here on its connections come to this process. Also for one that is
    /// enrolled already and whose addresses have changed.
    ///
    /// Ordered so that nothing is captured that nobody would accept: routing, the listener's slot, steering of what
    /// comes in, and last what goes out. Whatever fails, the pod is captured as far as it can be: what nobody
    /// accepts is refused, not let through.
    ///
    /// `direct`: whether its connections may go past the proxy to pods of the node.
    pub fn enrol(&mut self, netns: &Netns, addresses: &[IpAddr], inbound: &impl AsRawFd, direct: bool) -> Result<(), CaptureError> {
        let prepared = routing::prepare(netns, addresses);
        let listening = addresses.iter().try_for_each(|ip| self.listeners.insert(octets(*ip), inbound.as_raw_fd(), 0));
        let direct = direct && self.same_node == SameNode::Direct && prepared.is_ok() && listening.is_ok() && direct::leaves_ports(netns);
        self.capture(netns, addresses, direct, *prepared.as_ref().unwrap_or(&0))?;
        prepared?;
        listening.map_err(CaptureError::map("LISTENERS"))
    }

    /// Steers what comes to a further address of a pod that is captured to its listener.
    pub fn steer(&mut self, address: IpAddr, inbound: &impl AsRawFd) -> Result<(), CaptureError> {
        self.listeners.insert(octets(address), inbound.as_raw_fd(), 0).map_err(CaptureError::map("LISTENERS"))
    }

    /// Captures a pod without anybody to accept its connections: they are refused while a process serves.
    pub fn hold(&mut self, netns: &Netns, addresses: &[IpAddr]) -> Result<(), CaptureError> {
        self.capture(netns, addresses, false, 0)
    }

    fn capture(&mut self, netns: &Netns, addresses: &[IpAddr], direct: bool, spread: u8) -> Result<(), CaptureError> {
        let cookie = netns.cookie().map_err(CaptureError::io("read a network namespace cookie"))?;
        let steered = pins::attach(&pins::steer_link(&self.directory, cookie), self.steer.as_fd(), netns.as_fd(), sys::SK_LOOKUP);
        let pod = Pod { direct: u8::from(direct), spread, ..pod(addresses, netns) };
        self.pods.insert(cookie, pod, 0).map_err(CaptureError::map("PODS"))?;
        steered
    }

    /// Stops capturing a pod; its addresses are the caller's to forget. Connections already captured go on.
    pub fn release(&mut self, cookie: u64) {
        // Each of them may be gone already, with the pod or by an earlier call.
        let _ = self.pods.remove(&cookie);
        // Before the addresses are forgotten: a program still there would refuse what has no listener.
        pins::detach(&pins::steer_link(&self.directory, cookie));
    }

    /// Steers nothing to these addresses any more.
    pub fn forget_addresses(&mut self, addresses: &[IpAddr]) {
        for ip in addresses {
            let _ = self.listeners.remove(&octets(*ip));
        }
    }

    /// What is noted of flows to such addresses.
    pub fn noted_flows(&self, to: impl Fn(IpAddr) -> bool) -> HashSet<Vec<u8>> {
        let is_to = |key: &FlowKey| to(Ipv6Addr::from(key.local.ip).to_canonical());
        let all =
            sys::keys_at_once(self.proxy_flows.as_fd(), (size_of::<FlowKey>(), size_of::<u32>()), MAX_PROXY_FLOWS).unwrap_or_default();
        all.into_iter().filter(|key| sys::plain::<FlowKey>(key).is_some_and(|flow| is_to(&flow))).collect()
    }

    /// Takes back what was noted of flows to a pod that is gone, and is still there: a socket that ends with its network namespace takes nothing
    /// back itself. An open connection does not need its note any more.
    pub fn forget_flows(&self, noted: &HashSet<Vec<u8>>) {
        for key in noted {
            // It may have been taken back meanwhile.
            let _ = sys::delete(self.proxy_flows.as_fd(), key);
        }
    }

    /// Network namespaces that are captured, or held.
    pub fn captured(&self) -> Vec<u64> {
        self.pods.keys().filter_map(Result::ok).collect()
    }

    /// Releases every pod but these: those that vanished while no process was watching.
    pub fn retain(&mut self, cookies: &HashSet<u64>) {
        let stale = self.pods.keys().filter_map(Result::ok).filter(|c| !cookies.contains(c)).collect::<Vec<_>>();
        let links = pins::steered(&self.directory).into_iter().filter(|c| !cookies.contains(c));
        for cookie in stale.into_iter().chain(links) {
            tracing::info!(target: "capture", cookie, "released a pod that is no longer there");
            self.release(cookie);
        }
    }

    /// A view of the original destinations of one pod's captured connections.
    pub fn original_destinations(&self, netns_cookie: u64) -> Result<OriginalDestinations, CaptureError> {
        let fd = self.pending.try_clone().map_err(CaptureError::io("duplicate a map descriptor"))?;
        let data = MapData::from_fd(fd).map_err(CaptureError::map("PENDING"))?;
        let map = HashMap::try_from(Map::LruHashMap(data)).map_err(CaptureError::map("PENDING"))?;
        Ok(OriginalDestinations { netns_cookie, map })
    }

    /// A view of the connections the node itself has open towards pods.
    pub fn node_flows(&self) -> Result<NodeFlows, CaptureError> {
        let fd = self.node_flows.try_clone().map_err(CaptureError::io("duplicate a map descriptor"))?;
        let data = MapData::from_fd(fd).map_err(CaptureError::map("NODE_FLOWS"))?;
        let map = HashMap::try_from(Map::LruHashMap(data)).map_err(CaptureError::map("NODE_FLOWS"))?;
        Ok(NodeFlows { map, cgroup: self.cgroup.clone(), known: Mutex::default() })
    }

    /// What the kernel side has counted, over all CPUs.
    pub fn counters(&self) -> Vec<(Counter, u64)> {
        let value = |c: Counter| self.counters.get(&(c as u32), 0).map_or(0, |v| v.iter().sum());
        Counter::ALL.into_iter().map(|c| (c, value(c))).collect()
    }

    /// Pods enrolled in the kernel.
    pub fn enrolled(&self) -> usize {
        self.pods.keys().filter_map(Result::ok).count()
    }
}

/// Original destinations by client address, each handed out once.
#[derive(Debug)]
pub struct OriginalDestinations {
    netns_cookie: u64,
    map: HashMap<MapData, PendingKey, Address>,
}

impl OriginalDestinations {
    /// Where the connection from `client` was going before it was captured and aimed at `aimed_at`.
    pub fn take(&mut self, client: SocketAddr, aimed_at: IpAddr) -> Option<SocketAddr> {
        let client = Address::new(octets(client.ip()), client.port());
        let key = PendingKey { netns_cookie: self.netns_cookie, client, aimed_at: octets(aimed_at), pad: [0; 6] };
        let found = self.map.get(&key, 0).ok()?;
        let _ = self.map.remove(&key);
        Some(SocketAddr::new(IpAddr::from(found.ip).to_canonical(), found.port()))
    }
}

/// Most cgroups of which it is remembered whether they are outside of pods.
const MAX_KNOWN: usize = 4096;

/// Connections the node itself has open towards pods, and whose they are.
#[derive(Debug)]
pub struct NodeFlows {
    map: HashMap<MapData, FlowKey, u64>,
    cgroup: PathBuf,
    /// Whether a cgroup is outside of all pods. The kernel does not use their numbers again.
    known: Mutex<std::collections::HashMap<u64, bool>>,
}

impl NodeFlows {
    /// Whether a connection was opened by a process of the node that is in no pod: the kubelet, for one. A pod in the node's
    /// network namespace (`hostNetwork`) is a pod.
    pub fn is_node(&self, client: SocketAddr, destination: SocketAddr) -> bool {
        let address = |a: SocketAddr| Address::new(octets(a.ip()), a.port());
        let key = FlowKey { remote: address(client), local: address(destination) };
        let Ok(cgroup) = self.map.get(&key, 0) else { return false };
        if let Some(known) = self.known.lock().get(&cgroup) {
            return *known;
        }
        let outside = match discovery::is_outside_pods(&self.cgroup, cgroup) {
            Ok(outside) => outside,
            Err(error) => {
                // Asked again the next time.
                tracing::warn!(target: "capture", cgroup, %error, "cannot find out whose connection it is");
                return false;
            }
        };
        let mut known = self.known.lock();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(cgroup, outside);
        outside
    }
}

/// Removes the routing a pod's network namespace was given.
pub fn remove_routing(netns: &Netns) -> Result<(), CaptureError> {
    routing::remove(netns)
}

/// 16 address bytes, IPv4 mapped.
fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => addr::mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The pod's addresses as the programs want them: loopback stands for one that is not known, nothing for a family the pod
/// does not have.
fn pod(addresses: &[IpAddr], netns: &Netns) -> Pod {
    let of_family = |v4: bool, loopback: IpAddr| match addresses.iter().copied().find(|a| a.is_ipv4() == v4) {
        Some(address) => octets(address),
        None if addresses.is_empty() || routing::has_route(netns, loopback) => octets(loopback),
        None => Pod::NONE,
    };
    let (v4, v6) = (of_family(true, std::net::Ipv4Addr::LOCALHOST.into()), of_family(false, Ipv6Addr::LOCALHOST.into()));
    Pod { v4, v6, direct: 0, spread: 0 }
}

/// Makes the cgroup of this process one whose sockets are never captured.
fn register_self(proxies: &mut HashMap<MapData, u64, u32>) -> Result<(), CaptureError> {
    let id = discovery::own_cgroup_id().map_err(CaptureError::io("find the cgroup of this process"))?;
    let known = proxies.keys().filter_map(Result::ok).collect::<Vec<_>>();
    if known.len() >= MAX_PROXIES && !known.contains(&id) {
        // Left behind by processes that were killed: cgroup ids are not used again, so no pod can have one of them.
        known.iter().for_each(|k| drop(proxies.remove(k)));
    }
    proxies.insert(id, 1, 0).map_err(CaptureError::map("PROXIES"))
}

/// Where pins of this ABI version go below `base`.
pub fn pin_directory(base: &Path) -> PathBuf {
    base.join(format!("v{}", mesh_common::ABI_VERSION))
}

/// Entries of a pinned map: how a test or an operator sees that nothing is left behind.
pub fn count_entries(map: &Path) -> Result<usize, CaptureError> {
    pinned_keys(map).map(|keys| keys.len())
}

/// Whether a process serves with the pins below `base`.
pub fn is_served(base: &Path) -> Result<bool, CaptureError> {
    let listeners = pins::map(&pin_directory(base), "LISTENERS");
    if !listeners.exists() {
        return Ok(false);
    }
    Ok(pinned_keys(&listeners)?.iter().any(|key| **key == ALIVE))
}

fn pinned_keys(map: &Path) -> Result<Vec<Vec<u8>>, CaptureError> {
    let data = MapData::from_pin(map).map_err(CaptureError::map("pinned map"))?;
    let info = data.info().map_err(CaptureError::map("pinned map"))?;
    let (size, limit) = (info.key_size() as usize, info.max_entries() as usize);
    sys::keys(data.fd().as_fd(), size, limit).map_err(CaptureError::io(format!("iterate {}", map.display())))
}
