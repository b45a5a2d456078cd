//! `sockops`: events of the sockets that the connect hook marked.
//!
//! - Connect (the source port is known, the SYN not yet sent): a flow of the proxy is noted, so that the pod's sk_lookup
//!   program lets it through, and its later states are asked for. A connection past the proxy likewise.
//! - Established: the original destination of a captured connection is put where the proxy finds it at `accept`. The
//!   kernel runs this before it acknowledges the handshake, so the entry is there before the connection can be accepted.
//!   A flow of the node itself towards a pod is noted too, with whose it is.
//! - Closed: the flow is forgotten. Not earlier: with SYN cookies the last packet of the handshake goes through
//!   sk_lookup again.

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE, bpf_sock_ops,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get},
    macros::sock_ops,
    programs::SockOpsContext,
};
use mesh_common::{
    Address, addr,
    maps::{Counter, FlowKey, PendingKey, SocketMark},
};

use crate::{
    connect::bytes,
    direct,
    maps::{NODE_FLOWS, PENDING, PROXY_FLOWS, SOCKETS, count},
};

const AF_INET: u32 = 2;
/// sockops programs always return 1; the value has a meaning for none of these callbacks.
const DONE: u32 = 1;

#[sock_ops]
pub fn mesh_sock_events(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(&ctx),
        BPF_SOCK_OPS_STATE_CB => {
            let (from, to) = (ctx.arg(0), ctx.arg(1));
            direct::turned(&ctx, from, to);
            if to == BPF_TCP_CLOSE {
                closed(&ctx);
            }
        }
        _ => {}
    }
    DONE
}

fn connecting(ctx: &SockOpsContext) {
    let Some(mark) = mark(ctx.ops) else { return };
    // On failure the connection is steered back to the proxy and refused there, or taken for anybody's: closed, never open.
    let noted = match mark.kind {
        SocketMark::DIRECT => {
            if !direct::connecting(ctx, flow(ctx)) {
                mark.kind = SocketMark::UNNOTED;
            }
            return;
        }
        SocketMark::PROXY => PROXY_FLOWS.insert(flow(ctx), FlowKey::ALLOWED, u64::from(BPF_ANY)),
        SocketMark::NODE => {
            let ip = mark.orig_dst.ip;
            let cgroup = u64::from_ne_bytes([ip[0], ip[1], ip[2], ip[3], ip[4], ip[5], ip[6], ip[7]]);
            NODE_FLOWS.insert(flow(ctx), cgroup, u64::from(BPF_ANY))
        }
        _ => return,
    };
    let _ = (noted, ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32));
}

fn established(ctx: &SockOpsContext) {
    let Some(mark) = mark(ctx.ops) else { return };
    if mark.kind != SocketMark::CAPTURED {
        return;
    }
    // SAFETY: the helper takes the program's own context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    let key = PendingKey { netns_cookie, client: local(ctx), aimed_at: remote(ctx).ip, pad: [0; 6] };
    if PENDING.insert(key, mark.orig_dst, u64::from(BPF_ANY)).is_err() {
        count(Counter::LostOrigDst);
    }
}

fn closed(ctx: &SockOpsContext) {
    let flow = flow(ctx);
    if mark(ctx.ops).is_some_and(|m| m.kind != SocketMark::UNNOTED) {
        let _ = (PROXY_FLOWS.remove(flow), NODE_FLOWS.remove(flow));
    }
}

#[inline(always)]
fn mark(ops: *mut bpf_sock_ops) -> Option<&'static mut SocketMark> {
    // SAFETY: the socket pointer is checked for null as the verifier demands, the storage likewise; it lives as long as the socket,
    // which is locked.
    unsafe {
        let sk = (*ops).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        let mark: *mut SocketMark = bpf_sk_storage_get((&raw const SOCKETS).cast_mut().cast(), sk.cast(), core::ptr::null_mut(), 0).cast();
        mark.as_mut()
    }
}

/// The flow as the other end's sk_lookup sees it: our end is its remote.
#[inline(always)]
fn flow(ctx: &SockOpsContext) -> FlowKey {
    FlowKey { remote: local(ctx), local: remote(ctx) }
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> Address {
    let ip = if ctx.family() == AF_INET { addr::mapped(ctx.local_ip4().to_ne_bytes()) } else { bytes(local_ip6(ctx)) };
    Address::new(ip, ctx.local_port() as u16)
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Address {
    let ip = if ctx.family() == AF_INET { addr::mapped(ctx.remote_ip4().to_ne_bytes()) } else { bytes(remote_ip6(ctx)) };
    // The kernel keeps the remote port in network order in the upper half of the word.
    Address::new(ip, u32::from_be(ctx.remote_port()) as u16)
}

#[inline(always)]
fn local_ip6(ctx: &SockOpsContext) -> [u32; 4] {
    // SAFETY: fields of a valid context, read word by word.
    unsafe { read_words((&raw const (*ctx.ops).local_ip6).cast()) }
}

#[inline(always)]
fn remote_ip6(ctx: &SockOpsContext) -> [u32; 4] {
    // SAFETY: as above.
    unsafe { read_words((&raw const (*ctx.ops).remote_ip6).cast()) }
}

/// # Safety
/// `words` points to four readable words of a context.
#[inline(always)]
unsafe fn read_words(words: *const u32) -> [u32; 4] {
    // SAFETY: promised by the caller; volatile keeps the loads single words at constant offsets.
    unsafe { [words.read_volatile(), words.add(1).read_volatile(), words.add(2).read_volatile(), words.add(3).read_volatile()] }
}
