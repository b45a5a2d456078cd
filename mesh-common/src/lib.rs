//! Types and pure decisions shared by the eBPF programs and the node process.
//!
//! Everything that crosses the kernel boundary is defined here once: map keys and values, their layout (asserted at
//! compile time), the ports, marks and tables, and the one ABI version both sides must agree on. Addresses are 16 bytes,
//! IPv4 as `::ffff:a.b.c.d`, ports are big-endian bytes, so there is one code path for both families.
#![no_std]

pub mod accelerate;
pub mod addr;
pub mod connect;
pub mod direct;
pub mod maps;

pub use addr::Address;

/// Version of every map layout and of the meaning of its contents. Bump on any change to [`maps`] or to layouts in [`accelerate`] and [`direct`].
///
/// The object carries it in the ELF section [`maps::ABI_SECTION`]; the loader refuses another value, and pins
/// live under a directory named after it, so two layouts never share a map.
pub const ABI_VERSION: u32 = 9;

/// In-pod listener that captured outbound connections are aimed at.
pub const OUTBOUND_PORT: u16 = 15001;
/// Addresses of a pod's own network namespace that captured connections are aimed at, each destination at one of them by its hash, so that
/// the kernel tells connections to different destinations apart as it would if they were not captured. Of IPv4 the first two bytes, within
/// loopback; of IPv6 the first eight, a prefix of the kind that networks make up for themselves (RFC 4193).
pub const SPREAD_V4: [u8; 2] = [127, 109];
pub const SPREAD_V6: [u8; 8] = [0xfd, 0x6d, 0x65, 0x73, 0x68, 0x15, 0x00, 0x01];
/// In-pod listener that plaintext connections to the pod are steered to.
pub const INBOUND_PORT: u16 = 15006;
/// In-pod HBONE listener, dialled by other nodes.
pub const HBONE_PORT: u16 = 15008;

/// Firewall mark on sockets that impersonate a client towards the application; selects [`TRANSPARENT_TABLE`].
pub const TRANSPARENT_MARK: u32 = 0x6d6e;
/// Routing table in a pod's netns that delivers replies to impersonated clients locally.
pub const TRANSPARENT_TABLE: u32 = 28014;
/// Priority of the rule that selects [`TRANSPARENT_TABLE`].
pub const TRANSPARENT_RULE_PRIORITY: u32 = 100;

/// Ports the node process owns inside a pod; nothing may be tunnelled or connected to them on an enrolled pod's behalf.
#[must_use]
pub const fn is_reserved_port(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | INBOUND_PORT | HBONE_PORT)
}
