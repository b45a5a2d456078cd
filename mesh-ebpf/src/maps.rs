//! All maps. Key and value types, and their bounds, are in `mesh_common::maps`.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage, SockHash},
    macros::btf_map,
};
use mesh_common::{
    Address,
    accelerate::{EVENT_BYTES, End, Event, MAX_SOCKETS},
    direct::{self, Flow, FlowEvent, MAX_FLOWS, MAX_ROUTES, Route, RouteKey},
    maps::{
        Counter, FlowKey, MAX_LISTENERS, MAX_NODE_FLOWS, MAX_PENDING, MAX_PODS, MAX_PROXIES, MAX_PROXY_FLOWS, NodeConfig, PendingKey, Pod,
        SocketMark,
    },
};

/// Node-wide settings.
#[btf_map]
pub static NODE: Array<NodeConfig, 1> = Array::new();

/// Enrolled pods by network namespace cookie.
#[btf_map]
pub static PODS: HashMap<u64, Pod, MAX_PODS> = HashMap::new();

/// Cgroup ids of node processes: their sockets are never captured. A pod cannot move itself into such a cgroup.
#[btf_map]
pub static PROXIES: HashMap<u64, u32, MAX_PROXIES> = HashMap::new();

/// What a socket is to the mesh, living and dying with the socket.
#[btf_map]
pub static SOCKETS: SkStorage<SocketMark> = SkStorage::new();

/// Original destinations of captured connections the proxy has yet to accept.
#[btf_map]
pub static PENDING: LruHashMap<PendingKey, Address, MAX_PENDING> = LruHashMap::new();

/// Flows the proxy itself has open towards applications, and those that go there directly.
#[btf_map]
pub static PROXY_FLOWS: LruHashMap<FlowKey, u32, MAX_PROXY_FLOWS> = LruHashMap::new();

/// Connections the node itself has open towards pods, outside of any pod's network namespace, with the cgroup that opened
/// them. No pod can put one here: it takes a socket in the node's namespace.
#[btf_map]
pub static NODE_FLOWS: LruHashMap<FlowKey, u64, MAX_NODE_FLOWS> = LruHashMap::new();

/// Inbound listeners by pod address. A slot empties by itself when the listener is closed, also by a crash: an empty
/// slot is how the programs know that no proxy serves.
#[btf_map]
pub static LISTENERS: SockHash<[u8; 16], MAX_LISTENERS> = SockHash::new();

/// Sockets between which messages may be redirected, by a number the node process gives them. A slot empties by itself when its
/// socket closes.
#[btf_map]
pub static ACCELERATED: SockHash<u64, MAX_SOCKETS> = SockHash::new();

/// What is known of an accelerated socket, living and dying with the socket.
#[btf_map]
pub static ENDS: SkStorage<End> = SkStorage::new();

/// Pairs that have to be seen to by the node process.
#[btf_map]
pub static EVENTS: RingBuf<Event, EVENT_BYTES> = RingBuf::new();

/// Where connections may go past the proxy.
#[btf_map]
pub static ROUTES: HashMap<RouteKey, Route, MAX_ROUTES, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Connections that go past the proxy, by the cookie of the client's socket. The node process removes those that are over when it
/// has counted them.
#[btf_map]
pub static FLOWS: HashMap<u64, Flow, MAX_FLOWS, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// What happens to them.
#[btf_map]
pub static FLOW_EVENTS: RingBuf<FlowEvent, { direct::EVENT_BYTES }> = RingBuf::new();

/// Event counts, see [`Counter`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a per-CPU slot of a program that cannot be preempted by itself; the map owns the memory.
        unsafe { *value += 1 };
    }
}

/// Whether a network namespace is the node's own.
#[inline(always)]
pub fn is_node(netns_cookie: u64) -> bool {
    NODE.get(0).is_some_and(|node| node.netns_cookie == netns_cookie)
}

/// Whether the node lets connections through while no proxy serves.
#[inline(always)]
pub fn fail_open() -> bool {
    NODE.get(0).is_some_and(|node| node.fail_open != 0)
}
