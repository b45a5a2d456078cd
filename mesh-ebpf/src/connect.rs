//! `cgroup/connect4` and `connect6`: aims the TCP connections of enrolled pods at the in-pod outbound listener.

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr},
    helpers::{
        bpf_get_current_cgroup_id,
        generated::{bpf_get_netns_cookie, bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_get},
    },
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use mesh_common::{
    Address, TRANSPARENT_MARK, addr,
    connect::{Verdict, decide, is_own},
    maps::{ALIVE, Counter, SocketMark},
};

use crate::direct;
use crate::maps::{LISTENERS, PODS, PROXIES, SOCKETS, count, fail_open, is_node};

const IPPROTO_TCP: u32 = 6;
/// Return values of a connect hook: go on with the (possibly rewritten) address, or fail with EPERM.
const PROCEED: i32 = 1;
const REFUSE: i32 = 0;

#[cgroup_sock_addr(connect4)]
pub fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel passes a valid context; only fields of this program type are read.
    let (ip, port) = unsafe { ((*ctx.sock_addr).user_ip4, (*ctx.sock_addr).user_port) };
    let dst = Address { ip: addr::mapped(ip.to_ne_bytes()), port: (port as u16).to_ne_bytes() };
    let Some(target) = (match conclude(&ctx, dst) {
        Ok(target) => target,
        Err(code) => return code,
    }) else {
        return PROCEED;
    };
    let v4 = [target.ip[12], target.ip[13], target.ip[14], target.ip[15]];
    // SAFETY: user_ip4 and user_port are writable for connect4.
    unsafe {
        (*ctx.sock_addr).user_ip4 = u32::from_ne_bytes(v4);
        (*ctx.sock_addr).user_port = u32::from(u16::from_ne_bytes(target.port));
    }
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    let dst = user_address6(&ctx);
    let Some(target) = (match conclude(&ctx, dst) {
        Ok(target) => target,
        Err(code) => return code,
    }) else {
        return PROCEED;
    };
    set_user_address6(&ctx, &target);
    PROCEED
}

/// The 16-byte destination of a connect6 or getpeername6 context.
#[inline(always)]
pub fn user_address6(ctx: &SockAddrContext) -> Address {
    // SAFETY: the kernel passes a valid context; the four words are read one by one as the verifier demands.
    let (w, port) = unsafe {
        let c = ctx.sock_addr;
        let words = &raw const (*c).user_ip6;
        let word = |i: usize| words.cast::<u32>().add(i).read_volatile();
        ([word(0), word(1), word(2), word(3)], (*c).user_port)
    };
    Address { ip: bytes(w), port: (port as u16).to_ne_bytes() }
}

/// Writes an address into a connect6 or getpeername6 context.
#[inline(always)]
pub fn set_user_address6(ctx: &SockAddrContext, address: &Address) {
    let w = words(&address.ip);
    // SAFETY: user_ip6 and user_port are writable for these attach types, in words.
    unsafe {
        let c = ctx.sock_addr;
        let out = (&raw mut (*c).user_ip6).cast::<u32>();
        out.write_volatile(w[0]);
        out.add(1).write_volatile(w[1]);
        out.add(2).write_volatile(w[2]);
        out.add(3).write_volatile(w[3]);
        (*c).user_port = u32::from(u16::from_ne_bytes(address.port));
    }
}

#[inline(always)]
pub fn bytes(w: [u32; 4]) -> [u8; 16] {
    // SAFETY: same size, no invalid bit patterns.
    unsafe { core::mem::transmute(w) }
}

#[inline(always)]
fn words(ip: &[u8; 16]) -> [u32; 4] {
    // SAFETY: same size, no invalid bit patterns; transmute copies, so alignment does not matter.
    unsafe { core::mem::transmute(*ip) }
}

/// Whether the proxy has said of a socket that it is for a program of the pod itself: by an address of the pod's that may not be among those
/// that are known.
#[inline(always)]
fn is_marked(ctx: &SockAddrContext) -> bool {
    // SAFETY: fields of a valid context, the socket checked for null.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !sk.is_null() && (*sk).mark == TRANSPARENT_MARK
    }
}

/// The shared body: `Ok(None)` leaves the connect alone, `Ok(Some)` rewrites it, `Err` is the hook's refusal.
#[inline(always)]
fn conclude(ctx: &SockAddrContext, dst: Address) -> Result<Option<Address>, i32> {
    // SAFETY: field of a valid context.
    if unsafe { (*ctx.sock_addr).protocol } != IPPROTO_TCP {
        return Ok(None);
    }
    // SAFETY: the helper takes the program's own context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    // SAFETY: the entry is only read; a concurrent removal leaves the memory valid for this run.
    let pod = unsafe { PODS.get(cookie) };
    // SAFETY: helper without arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    let Some(pod) = pod else {
        // The kubelet's probes among others: whose they are is for the proxy to say.
        if is_node(cookie) && is_listened_for(&dst.ip) {
            let mut who = Address::new([0; 16], 0);
            who.ip[..8].copy_from_slice(&cgroup.to_ne_bytes());
            return remember(ctx, SocketMark::NODE, who).map(|()| None);
        }
        return Ok(None);
    };
    // SAFETY: as above.
    if unsafe { PROXIES.get(cgroup) }.is_some() {
        // Only what goes to this pod's application is let past its steering; elsewhere the proxy is a client like any.
        return if is_own(&dst.ip, pod) || is_marked(ctx) { remember(ctx, SocketMark::PROXY, dst).map(|()| None) } else { forget(ctx) };
    }
    match decide(&dst, pod) {
        Verdict::Untouched => forget(ctx),
        Verdict::Refuse => {
            count(Counter::RefusedReservedPort);
            Err(REFUSE)
        }
        Verdict::Redirect(_) | Verdict::NoFamily if fail_open() && !proxy_serves() => {
            count(Counter::PassedFailOpen);
            forget(ctx)
        }
        Verdict::NoFamily => {
            count(Counter::RefusedNoFamily);
            Err(REFUSE)
        }
        Verdict::Redirect(target) => {
            if let Some(endpoint) = direct::route(ctx.sock_addr, cookie, pod, &dst) {
                remember(ctx, SocketMark::DIRECT, dst)?;
                count(Counter::Direct);
                return Ok(Some(endpoint));
            }
            remember(ctx, SocketMark::CAPTURED, dst)?;
            count(Counter::Captured);
            Ok(Some(target))
        }
    }
}

/// Writes what the socket is into its local storage.
#[inline(always)]
fn remember(ctx: &SockAddrContext, kind: u16, orig_dst: Address) -> Result<(), i32> {
    let mark = storage(ctx.sock_addr, u64::from(BPF_SK_STORAGE_GET_F_CREATE));
    if mark.is_null() {
        count(Counter::RefusedNoMemory);
        return Err(REFUSE);
    }
    // SAFETY: non-null storage of this socket, whose connect is the only writer.
    unsafe { *mark = SocketMark { kind, orig_dst } };
    Ok(())
}

/// Clears what an earlier connect of the same socket left, and leaves this one alone.
#[inline(always)]
fn forget(ctx: &SockAddrContext) -> Result<Option<Address>, i32> {
    let mark = storage(ctx.sock_addr, 0);
    if !mark.is_null() {
        // SAFETY: as in `remember`.
        unsafe { (*mark).kind = SocketMark::NONE };
    }
    Ok(None)
}

/// The socket's local storage, null when there is none.
#[inline(always)]
pub fn storage(ctx: *mut bpf_sock_addr, flags: u64) -> *mut SocketMark {
    // SAFETY: `sk` of a sock_addr context is a valid socket pointer for the helper.
    unsafe {
        let sk = (*ctx).__bindgen_anon_1.sk;
        bpf_sk_storage_get((&raw const SOCKETS).cast_mut().cast(), sk.cast(), core::ptr::null_mut(), flags).cast()
    }
}

/// Whether a node process is alive.
#[inline(always)]
pub fn proxy_serves() -> bool {
    is_listened_for(&ALIVE)
}

/// Whether there is an inbound listener for an address.
#[inline(always)]
fn is_listened_for(ip: &[u8; 16]) -> bool {
    let key = *ip;
    // SAFETY: lookup in a sockhash yields a referenced socket or null; the reference is released at once.
    unsafe {
        let sk: *mut bpf_sock = bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast(), (&raw const key).cast_mut().cast()).cast();
        if sk.is_null() {
            return false;
        }
        bpf_sk_release(sk.cast());
    }
    true
}
