//! Connections that go to another pod of the node past the proxy: routed by the connect hook, followed by `sockops`.
//!
//! Order is what makes it safe: the flow is in the map before it is looked whether its route still stands, and it is let through
//! the pod's steering only if it does. So whoever takes a route away and then goes through the flows finds every one that used it.

use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock_addr, bpf_sock_ops},
    helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_ns},
    programs::SockOpsContext,
};
use mesh_common::{
    Address,
    accelerate::End,
    addr::{is_loopback, is_v4, same_ip},
    connect::is_own,
    direct::{ANY_POD, Flow, FlowEvent, MAX_ENDPOINTS, Route, RouteKey, pick, tcp},
    is_reserved_port,
    maps::{Counter, FlowKey, Pod},
};

use crate::{
    connect::proxy_serves,
    maps::{FLOW_EVENTS, FLOWS, PODS, PROXY_FLOWS, ROUTES, count},
};

/// The application a connection of a pod goes to directly, if it may: from here on it is a flow.
#[inline(always)]
pub fn route(ctx: *mut bpf_sock_addr, source: u64, pod: &Pod, dialled: &Address) -> Option<Address> {
    if pod.direct == 0 || is_reserved_port(dialled.port()) || is_bound(ctx) || !proxy_serves() {
        return None;
    }
    // One whose address is not known here yet could not be told from others.
    let own = if is_v4(&dialled.ip) { &pod.v4 } else { &pod.v6 };
    if is_loopback(own) || same_ip(own, &Pod::NONE) {
        return None;
    }
    let route = find(source, dialled)?;
    // SAFETY: helper without arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    let endpoint = if route.count == 0 { *dialled } else { *route.endpoints.get(pick(route.count, random)?)? };
    if is_own(&endpoint.ip, pod) {
        return None;
    }
    // SAFETY: helpers that take the program's own context, or nothing.
    let (cookie, begun) = unsafe { (bpf_get_socket_cookie(ctx.cast()), bpf_ktime_get_ns()) };
    let flow = Flow { source, begun, dialled: *dialled, endpoint, ..Flow::default() };
    // A socket that has failed to connect before may still be there: such a one is the proxy's.
    if FLOWS.insert(cookie, flow, u64::from(BPF_NOEXIST)).is_err() {
        count(Counter::DirectFull);
        return None;
    }
    Some(endpoint)
}

#[inline(always)]
fn find(source: u64, to: &Address) -> Option<&'static Route> {
    let mut key = RouteKey { source, to: *to, pad: [0; 6] };
    // SAFETY: only read; a concurrent removal leaves the memory valid for this run.
    if let Some(route) = unsafe { ROUTES.get(key) } {
        return Some(route);
    }
    key.source = ANY_POD;
    // SAFETY: as above.
    if let Some(route) = unsafe { ROUTES.get(key) } {
        return Some(route);
    }
    key.to.port = [0; 2];
    // SAFETY: as above.
    unsafe { ROUTES.get(key) }
}

/// Whether the application chose an address or port to connect from: another than policy was decided for, perhaps.
#[inline(always)]
fn is_bound(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: fields of the socket of a valid context, read one by one.
    unsafe {
        let sk = (*ctx).__bindgen_anon_1.sk;
        if sk.is_null() {
            return true;
        }
        let words = (&raw const (*sk).src_ip6).cast::<u32>();
        let six = words.read_volatile() | words.add(1).read_volatile() | words.add(2).read_volatile() | words.add(3).read_volatile();
        (*sk).src_port != 0 || (*sk).src_ip4 != 0 || six != 0
    }
}

/// The connection has its port; its first packet is yet to be sent. False when there is a note of another connection with the
/// same addresses: it stays.
#[inline(always)]
pub fn connecting(ctx: &SockOpsContext, key: FlowKey) -> bool {
    let _ = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
    let cookie = cookie(ctx.ops);
    let Some(flow) = FLOWS.get_ptr_mut(cookie) else {
        // Forgotten before it had a port.
        return refuse(key);
    };
    // SAFETY: the node process removes it when it is closed, and later; the memory stays valid for this run.
    let flow = unsafe { &mut *flow };
    flow.client = key.remote;
    flow.state = Flow::CONNECTING;
    // Without a note the pod's steering would take it for anybody's, without an identity: what does not stand is refused.
    let noted = if stands(ctx, flow) && is_from_the_pod(ctx, flow) {
        PROXY_FLOWS.insert(key, FlowKey::ALLOWED, u64::from(BPF_NOEXIST)).is_ok()
    } else {
        refuse(key)
    };
    if !noted {
        flow.state = Flow::CLASH;
        tell(cookie, flow);
    }
    noted
}

/// Has the pod's steering refuse the connection.
#[inline(always)]
fn refuse(key: FlowKey) -> bool {
    count(Counter::DirectRefused);
    PROXY_FLOWS.insert(key, FlowKey::REFUSED, u64::from(BPF_NOEXIST)).is_ok()
}

/// Whether the flow's route is still there.
#[inline(always)]
fn stands(ctx: &SockOpsContext, flow: &Flow) -> bool {
    // SAFETY: the helper takes the program's own context.
    let source = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    let Some(route) = find(source, &flow.dialled) else { return false };
    let mut there = route.count == 0 && same_ip(&flow.dialled.ip, &flow.endpoint.ip) && flow.dialled.port() == flow.endpoint.port();
    let mut i = 0;
    while i < MAX_ENDPOINTS {
        let endpoint = &route.endpoints[i];
        there |= i < usize::from(route.count) && endpoint.port() == flow.endpoint.port() && same_ip(&endpoint.ip, &flow.endpoint.ip);
        i += 1;
    }
    there
}

/// Whether it comes from the address policy was decided for. A pod with several of a family, of which the kernel picks another, is not connected
/// directly any more: its next connections go through the proxy.
#[inline(always)]
fn is_from_the_pod(ctx: &SockOpsContext, flow: &Flow) -> bool {
    // SAFETY: the helper takes the program's own context.
    let source = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    let Some(pod) = PODS.get_ptr_mut(source) else { return false };
    // SAFETY: as in `find`; one byte, which says the same whoever writes it.
    unsafe {
        let own = is_own(&flow.client.ip, &*pod);
        if !own {
            (*pod).direct = 0;
        }
        own
    }
}

/// A connection goes from one state of TCP to another.
#[inline(always)]
pub fn turned(ctx: &SockOpsContext, from: u32, to: u32) {
    let cookie = cookie(ctx.ops);
    let Some(flow) = FLOWS.get_ptr_mut(cookie) else { return };
    // SAFETY: as in `connecting`; the socket is locked.
    let flow = unsafe { &mut *flow };
    flow.turn(from, to);
    if to == tcp::CLOSE {
        // SAFETY: fields of a valid context.
        let (acked, received) = unsafe { ((*ctx.ops).bytes_acked, (*ctx.ops).bytes_received) };
        flow.count(acked, received);
    }
    if to == tcp::ESTABLISHED || to == tcp::CLOSE {
        tell(cookie, flow);
    }
}

/// Counts what one end of a direct connection has sent past TCP.
#[inline(always)]
pub fn redirected(end: &End, size: u32) {
    if end.flow == 0 {
        return;
    }
    if let Some(flow) = FLOWS.get_ptr_mut(end.flow) {
        // SAFETY: as in `connecting`; each of the two has one writer, the socket that sends, which is locked.
        unsafe {
            if end.server == 0 {
                (*flow).sent += u64::from(size);
            } else {
                (*flow).received += u64::from(size);
            }
        }
    }
}

fn tell(cookie: u64, flow: &Flow) {
    if FLOW_EVENTS.output(FlowEvent { cookie, flow: *flow }, 0).is_err() {
        count(Counter::DirectUntold);
    }
}

#[inline(always)]
fn cookie(ops: *mut bpf_sock_ops) -> u64 {
    // SAFETY: the helper takes the program's own context.
    unsafe { bpf_get_socket_cookie(ops.cast()) }
}
