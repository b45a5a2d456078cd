//! The kernel side of capture: one file per hook, all maps in [`maps`].
//!
//! | file | hook | does |
//! |---|---|---|
//! | `accelerate` | `sk_msg` | redirects messages between two sockets of a pair |
//! | `connect` | `cgroup/connect4`, `connect6` | aims an enrolled pod's connections at the in-pod outbound listener |
//! | `direct` | part of `connect` and `sock_events` | lets connections go to another pod of the node past the proxy |
//! | `getpeername` | `cgroup/getpeername4`, `getpeername6` | shows the application the address it dialled |
//! | `sock_events` | `sockops` | hands the original destination to the proxy; notes the proxy's own flows |
//! | `steer` | `sk_lookup`, per pod netns | steers plaintext connections to the pod to the inbound listener |
//!
//! Decisions that need no kernel helper are in `mesh_common` and tested on the host.
#![no_std]
#![no_main]

mod accelerate;
mod connect;
mod direct;
mod getpeername;
mod maps;
mod sock_events;
mod steer;

/// Checked by the loader before anything is attached.
#[unsafe(no_mangle)]
#[unsafe(link_section = "mesh_abi")]
static MESH_ABI_VERSION: u32 = mesh_common::ABI_VERSION;

/// An endless loop is what the verifier rejects: a program that could panic does not load.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers for GPL-compatible programs only are used (`bpf_sk_assign` and others).
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
