//! Map keys and values. A change here is a change of [`crate::ABI_VERSION`].

use crate::Address;

/// Name of the ELF section that holds the version the loader compares with [`crate::ABI_VERSION`] before anything is attached.
pub const ABI_SECTION: &str = "mesh_abi";

/// Upper bound on enrolled pods of one node.
pub const MAX_PODS: usize = 4096;
/// Upper bound on captured connections between the handshake and the proxy's `accept`.
pub const MAX_PENDING: usize = 65_536;
/// Upper bound on flows the proxy itself has open towards applications, and on those that go there directly.
pub const MAX_PROXY_FLOWS: usize = 65_536;
/// Upper bound on connections to pods that the node itself has open.
pub const MAX_NODE_FLOWS: usize = 16_384;
/// Upper bound on node processes served by one set of programs (an old and a new one during an upgrade, with room).
pub const MAX_PROXIES: usize = 16;
/// Upper bound on steered pod addresses: two families per pod, and the process itself.
pub const MAX_LISTENERS: usize = MAX_PODS * 2 + 1;
/// Key of the listener that stands for the node process being alive; no pod has this address.
pub const ALIVE: [u8; 16] = [0; 16];

/// Node-wide settings, the only element of the `NODE` array.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NodeConfig {
    /// 1: connections of enrolled pods pass untouched while no proxy serves; 0: they are refused.
    pub fail_open: u32,
    pub pad: u32,
    /// The cookie of the node's own network namespace.
    pub netns_cookie: u64,
}

/// An enrolled pod, keyed by the cookie of its network namespace. Presence in the map is what "enrolled" means.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Pod {
    /// The pod's IPv4 address in mapped form; loopback when it is not known, [`Pod::NONE`] when it has none.
    pub v4: [u8; 16],
    /// The pod's IPv6 address; likewise.
    pub v6: [u8; 16],
    /// 1: its connections may go directly to pods of the node where there is a route for them.
    pub direct: u8,
    /// Families whose captured connections are aimed at addresses of their own for each destination, which are routed.
    pub spread: u8,
}

impl Pod {
    /// In place of an address: the pod has no way out for this family.
    pub const NONE: [u8; 16] = [0; 16];
    /// Bits of `spread`.
    pub const V4: u8 = 1;
    pub const V6: u8 = 2;
}

/// What a socket is to the mesh, kept in socket-local storage: it dies with the socket and needs no limit of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SocketMark {
    /// One of [`SocketMark`]'s constants.
    pub kind: u16,
    /// The address the application dialled, when captured or direct; of a socket of the node, its cgroup in the first bytes.
    pub orig_dst: Address,
}

impl SocketMark {
    pub const NONE: u16 = 0;
    pub const CAPTURED: u16 = 1;
    pub const PROXY: u16 = 2;
    /// A socket in the node's own network namespace, towards a pod.
    pub const NODE: u16 = 3;
    /// A connection to another pod of the node past the proxy, see [`crate::direct`].
    pub const DIRECT: u16 = 4;
    /// One of those whose flow is noted for another connection: nothing is taken back when it ends.
    pub const UNNOTED: u16 = 5;
}

/// Finds the original destination of a connection accepted on the outbound listener: whose netns, the client's own
/// address, and the one it was aimed at. Padded by hand so that no byte of the key is undefined.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct PendingKey {
    pub netns_cookie: u64,
    pub client: Address,
    pub aimed_at: [u8; 16],
    pub pad: [u8; 6],
}

/// A connection that the proxy itself opens towards an application, or that goes there directly, as the pod's sk_lookup program
/// sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct FlowKey {
    pub remote: Address,
    pub local: Address,
}

impl FlowKey {
    /// What `PROXY_FLOWS` says of a flow: the pod's steering lets it pass, or refuses it.
    pub const ALLOWED: u32 = 1;
    pub const REFUSED: u32 = 0;
}

/// What the kernel side counts; index into the per-CPU `COUNTERS` array.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Outbound connections aimed at the proxy.
    Captured = 0,
    /// Connections to the pod steered to the proxy.
    Steered = 1,
    /// Outbound connections refused: the destination is one of the proxy's own ports on this pod.
    RefusedReservedPort = 2,
    /// Outbound connections refused: the kernel had no memory for the original destination.
    RefusedNoMemory = 3,
    /// Inbound connections refused: no proxy serves and the fail mode is closed.
    RefusedNoProxy = 4,
    /// Connections in either direction passed untouched: no proxy serves and the fail mode is open.
    PassedFailOpen = 5,
    /// Captured connections whose original destination found no room; the proxy refuses them.
    LostOrigDst = 6,
    /// Outbound connections refused: the pod has no address of the destination's family.
    RefusedNoFamily = 7,
    /// Accelerated directions turned to TCP because their reader had too much unread.
    AccelerationTurned = 8,
    /// Events of acceleration that the node process did not read in time.
    AccelerationUntold = 9,
    /// Outbound connections that went directly to another pod of the node.
    Direct = 10,
    /// Those that would have and were aimed at the proxy: there was no room for one more.
    DirectFull = 11,
    /// Events of direct connections that the node process did not read in time; it finds out later.
    DirectUntold = 12,
    /// Direct connections refused: their route was taken away while they were being dialled.
    DirectRefused = 13,
}

impl Counter {
    pub const ALL: [Self; 14] = [
        Self::Captured,
        Self::Steered,
        Self::RefusedReservedPort,
        Self::RefusedNoMemory,
        Self::RefusedNoProxy,
        Self::PassedFailOpen,
        Self::LostOrigDst,
        Self::RefusedNoFamily,
        Self::AccelerationTurned,
        Self::AccelerationUntold,
        Self::Direct,
        Self::DirectFull,
        Self::DirectUntold,
        Self::DirectRefused,
    ];

    /// The metric label value.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Steered => "steered",
            Self::RefusedReservedPort => "refused_reserved_port",
            Self::RefusedNoMemory => "refused_no_memory",
            Self::RefusedNoProxy => "refused_no_proxy",
            Self::PassedFailOpen => "passed_fail_open",
            Self::LostOrigDst => "lost_orig_dst",
            Self::RefusedNoFamily => "refused_no_family",
            Self::AccelerationTurned => "acceleration_turned",
            Self::AccelerationUntold => "acceleration_untold",
            Self::Direct => "direct",
            Self::DirectFull => "direct_full",
            Self::DirectUntold => "direct_untold",
            Self::DirectRefused => "direct_refused",
        }
    }
}

const _: () = assert!(size_of::<NodeConfig>() == 16);
const _: () = assert!(size_of::<Pod>() == 34 && align_of::<Pod>() == 1);
const _: () = assert!(size_of::<SocketMark>() == 20);
const _: () = assert!(size_of::<PendingKey>() == 48);
const _: () = assert!(size_of::<FlowKey>() == 36 && align_of::<FlowKey>() == 1);

#[cfg(feature = "user")]
mod pod {
    use super::{FlowKey, NodeConfig, PendingKey, Pod, SocketMark};
    use crate::Address;

    // SAFETY: all are repr(C), Copy, of integers and byte arrays only, without implicit padding (sizes asserted above).
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for NodeConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Pod {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SocketMark {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PendingKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowKey {}
}
