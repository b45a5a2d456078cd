//! `sk_lookup` in a pod's network namespace: plaintext connections to the pod are steered to the inbound listener.
//!
//! The accepted socket's local address is the original destination. Let through are: the pod talking to itself, the
//! proxy's own connections to the application, and the HBONE port. With no listener in its slot the kernel would fall
//! through to the application: the connection is refused, unless no process serves and the fail mode is open. Another
//! socket of the pod that shares the port (`SO_REUSEPORT`) gets nothing.

use aya_ebpf::{
    bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, bpf_sk_lookup, sk_action},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use mesh_common::{
    Address, HBONE_PORT, OUTBOUND_PORT, addr,
    maps::{Counter, FlowKey},
};

use crate::{
    connect::{bytes, proxy_serves},
    maps::{LISTENERS, PROXY_FLOWS, count, fail_open},
};

const IPPROTO_TCP: u32 = 6;
const AF_INET: u32 = 2;

#[sk_lookup]
pub fn mesh_steer(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: field of a valid context.
    if unsafe { (*lookup).protocol } != IPPROTO_TCP {
        return sk_action::SK_PASS;
    }
    let flow = flow(lookup);
    let own = addr::same_ip(&flow.remote.ip, &flow.local.ip) || addr::is_loopback(&flow.local.ip) || is_aimed(&flow.local);
    if own || flow.local.port() == HBONE_PORT {
        return sk_action::SK_PASS;
    }
    match noted(&flow) {
        Some(FlowKey::REFUSED) => return sk_action::SK_DROP,
        Some(_) => return sk_action::SK_PASS,
        None => {}
    }
    if LISTENERS.redirect_sk_lookup(&ctx, flow.local.ip, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT)).is_ok() {
        count(Counter::Steered);
        return sk_action::SK_PASS;
    }
    // An address without a listener of its own is nobody's to serve: it passes only where nothing is served at all.
    if fail_open() && !proxy_serves() {
        count(Counter::PassedFailOpen);
        return sk_action::SK_PASS;
    }
    count(Counter::RefusedNoProxy);
    sk_action::SK_DROP
}

/// Whether a connection is one that the connect hook has aimed at the outbound listener. Nothing else goes to these addresses: the hook
/// refuses to dial them, and who sends to them from elsewhere finds no route (and nobody who listens).
#[inline(always)]
fn is_aimed(local: &Address) -> bool {
    addr::is_spread_v6(&local.ip) && local.port() == OUTBOUND_PORT
}

#[inline(always)]
fn noted(flow: &FlowKey) -> Option<u32> {
    // SAFETY: a copy is made.
    unsafe { PROXY_FLOWS.get(flow) }.copied()
}

#[inline(always)]
fn flow(lookup: *mut bpf_sk_lookup) -> FlowKey {
    // SAFETY: fields of a valid context, IPv6 addresses read word by word.
    unsafe {
        let v4 = (*lookup).family == AF_INET;
        let remote_ip =
            if v4 { addr::mapped((*lookup).remote_ip4.to_ne_bytes()) } else { read_ip6((&raw const (*lookup).remote_ip6).cast()) };
        let local_ip = if v4 { addr::mapped((*lookup).local_ip4.to_ne_bytes()) } else { read_ip6((&raw const (*lookup).local_ip6).cast()) };
        FlowKey {
            remote: Address { ip: remote_ip, port: (*lookup).remote_port.to_ne_bytes() },
            local: Address::new(local_ip, (*lookup).local_port as u16),
        }
    }
}

/// # Safety
/// `words` points to four readable words of a context.
#[inline(always)]
unsafe fn read_ip6(words: *const u32) -> [u8; 16] {
    // SAFETY: promised by the caller.
    bytes(unsafe { [words.read_volatile(), words.add(1).read_volatile(), words.add(2).read_volatile(), words.add(3).read_volatile()] })
}
