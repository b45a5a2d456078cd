//! `sk_msg`: what one socket of a pair sends is queued at the other, past the TCP stack.
//!
//! A pair is two sockets of this node that are each other's peers. The node process chooses pairs, and finds and enters
//! them with [`mesh_pair`]; [`mesh_accelerate`] then decides about every message, with the sending socket locked. What it
//! decides is in `mesh_common::accelerate`. Both read the kernel's own structures, at offsets the loader takes from its BTF, by
//! reads the kernel checks: a socket that is gone meanwhile reads as anything, and the redirect to it fails.

use core::ffi::c_void;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_CURRENT_NETNS, BPF_F_INGRESS, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, sk_action, sk_msg_md},
    helpers::{
        bpf_probe_read_kernel,
        generated::{
            bpf_get_current_task, bpf_getsockopt, bpf_map_update_elem, bpf_setsockopt, bpf_sk_lookup_tcp, bpf_sk_release,
            bpf_sk_storage_get, bpf_tcp_sock,
        },
    },
    macros::{btf_tracepoint, classifier, sk_msg},
    programs::{BtfTracePointContext, SkMsgContext, TcContext},
};
use mesh_common::{
    accelerate::{End, Event, Facts, KernelLayout, O_NONBLOCK, PairReply, PairRequest, Step, Way, Why, step},
    direct::tcp,
    maps::Counter,
};

use crate::direct;
use crate::maps::{ACCELERATED, ENDS, EVENTS, count};

/// Overwritten by the loader.
#[unsafe(no_mangle)]
static KERNEL_LAYOUT: Global<KernelLayout> = Global::new(KernelLayout {
    rmem_alloc: 0,
    socket: 0,
    user_data: 0,
    file: 0,
    file_flags: 0,
    write_seq: 0,
    copied_seq: 0,
    ulp: 0,
    flags: 0,
    zerocopy: 0,
    timestamping: 0,
    timestamping_mask: 0,
    references: 0,
    queue: 0,
    peek_off: 0,
    io_uring: 0,
    task_flags: 0,
    receive_low_water: 0,
});

/// Bits of `sk_user_data` that are not the pointer's.
const USER_DATA_FLAGS: u64 = 7;
/// Of a task that works for `io_uring`.
const PF_IO_WORKER: u32 = 0x10;
const SOL_SOCKET: i32 = 1;
const SO_RCVLOWAT: i32 = 18;
const MSG_OOB: i32 = 1;
const MSG_PEEK: i32 = 2;
const MSG_ERRQUEUE: i32 = 0x2000;
/// The request in a packet: behind an Ethernet header.
const AT: usize = 14;

#[sk_msg]
pub fn mesh_accelerate(ctx: SkMsgContext) -> u32 {
    let end = sender(ctx.msg);
    if end.is_null() {
        return sk_action::SK_PASS;
    }
    // SAFETY: non-null storage of the sending socket, which is locked. The node process's writes and these are single words.
    let end = unsafe { &mut *end };
    if end.way == Way::LEFT || end.way == Way::WAITING {
        return sk_action::SK_PASS;
    }
    let size = ctx.size();
    match step(end, size, &facts(end)) {
        Step::Redirect => {
            let mut peer = end.peer;
            // A peer that is gone cannot be redirected to; TCP knows what that means.
            if ACCELERATED.redirect_msg(&ctx, &mut peer, u64::from(BPF_F_INGRESS)) == i64::from(sk_action::SK_PASS) {
                end.messages += 1;
                end.bytes += u64::from(size);
                direct::redirected(end, size);
            } else {
                (end.way, end.why) = (Way::LEFT, Why::Message as u32);
                tell(end);
            }
        }
        Step::Tcp => {}
        Step::Leave => {
            if end.why == Why::Message as u32 {
                count(Counter::AccelerationTurned);
            }
            tell(end);
        }
    }
    sk_action::SK_PASS
}

fn tell(end: &End) {
    let event = Event { peer: end.peer, way: end.way, why: end.why };
    if EVENTS.output(event, 0).is_err() {
        count(Counter::AccelerationUntold);
    }
}

#[inline(always)]
fn facts(end: &End) -> Facts {
    let layout = KERNEL_LAYOUT.load();
    Facts {
        nonblocking: nonblocking(end.own_flags) && nonblocking(end.peer_flags),
        special: special(&layout, end.own_socket) || word(end.peer_socket, layout.receive_low_water) > 1,
        queued: word(end.peer_socket, layout.rmem_alloc),
        quiet: end.way == Way::JOINED && word(end.own_socket, layout.write_seq) == word(end.peer_socket, layout.copied_seq),
    }
}

/// Where the flags are of the file a socket has been opened as; zero when it has none.
#[inline(always)]
fn flags(layout: &KernelLayout, sk: u64) -> u64 {
    let socket = pointer(sk, layout.socket);
    let file = if socket == 0 { 0 } else { pointer(socket, layout.file) };
    if file == 0 { 0 } else { file + u64::from(layout.file_flags) }
}

/// Four bytes of kernel memory; all ones when they cannot be read: more unread than any bound, and no sequence number.
#[inline(always)]
fn word(base: u64, offset: u32) -> u32 {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const u32) }.unwrap_or(u32::MAX)
}

/// Whether a file is non-blocking, by the address of its flags; false when they cannot be read.
#[inline(always)]
fn nonblocking(flags: u64) -> bool {
    // SAFETY: the helper checks the address.
    flags != 0 && unsafe { bpf_probe_read_kernel(flags as *const u32) }.is_ok_and(|flags| flags & O_NONBLOCK != 0)
}

/// Whether a socket has TLS in the kernel, is to say when its messages were sent, or wakes its owner for more than one byte; true when
/// it cannot be read.
#[inline(always)]
fn special(layout: &KernelLayout, sk: u64) -> bool {
    pointer(sk, layout.ulp) != 0
        || word(sk, layout.receive_low_water) > 1
        || word(sk, layout.flags) & layout.zerocopy != 0
        || word(sk, layout.timestamping) & layout.timestamping_mask != 0
}

/// A pointer in kernel memory; zero when it cannot be read.
#[inline(always)]
fn pointer(base: u64, offset: u32) -> u64 {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const u64) }.unwrap_or(0)
}

#[inline(always)]
fn sender(msg: *mut sk_msg_md) -> *mut End {
    // SAFETY: the socket is checked for null as the verifier demands.
    unsafe {
        let sk = (*msg).__bindgen_anon_3.sk;
        if sk.is_null() {
            return core::ptr::null_mut();
        }
        bpf_sk_storage_get((&raw const ENDS).cast_mut().cast(), sk.cast(), core::ptr::null_mut(), 0).cast()
    }
}

/// The beginning of `struct bpf_iter__tcp`.
#[repr(C)]
pub struct TcpIteration {
    meta: *mut c_void,
    sk: *mut c_void,
}

/// Goes through the TCP sockets of a network namespace and wakes the owners of those that are marked. Bytes that came by TCP before a pair
/// was taken out raised their event when an edge-triggered owner had others to read, or was told that there are none; it would wait for
/// another. Setting `SO_RCVLOWAT`, to what it is, has the kernel look again.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn mesh_wake(iteration: *mut TcpIteration) -> i32 {
    // SAFETY: the kernel passes a valid context; each pointer is checked for null, and the socket is locked.
    unsafe {
        let sk = (*iteration).sk;
        if sk.is_null() {
            return 0;
        }
        let end: *mut End = bpf_sk_storage_get((&raw const ENDS).cast_mut().cast(), sk, core::ptr::null_mut(), 0).cast();
        if end.is_null() || (*end).wake == 0 {
            return 0;
        }
        (*end).wake = 0;
        let mut mark = 0_i32;
        let mark = (&raw mut mark).cast::<c_void>();
        if bpf_getsockopt(sk, SOL_SOCKET, SO_RCVLOWAT, mark, 4) == 0 {
            bpf_setsockopt(sk, SOL_SOCKET, SO_RCVLOWAT, mark, 4);
        }
    }
    0
}

/// Counts what the owner of a socket that was looked at receives: one who takes more than that reads by other means, which see nothing of
/// what is redirected.
#[btf_tracepoint(function = "sock_recv_length")]
pub fn mesh_received(ctx: BtfTracePointContext) -> i32 {
    let (sk, received, flags): (*mut c_void, i32, i32) = (ctx.arg(0), ctx.arg(1), ctx.arg(2));
    if received <= 0 || flags & (MSG_OOB | MSG_PEEK | MSG_ERRQUEUE) != 0 {
        return 0;
    }
    // SAFETY: the socket is the kernel's own argument, and the storage is checked for null. Two that receive at once may be counted as one:
    // then less was received than taken, and nothing is redirected.
    unsafe {
        let end: *mut End = bpf_sk_storage_get((&raw const ENDS).cast_mut().cast(), sk, core::ptr::null_mut(), 0).cast();
        if !end.is_null() {
            (*end).received += u64::from(received.unsigned_abs());
            if (*end).peer == 0 && of_a_ring() {
                (*end).ring = 1;
            }
        }
    }
    0
}

/// Whether this task uses `io_uring`, or works for one that does.
#[inline(always)]
fn of_a_ring() -> bool {
    let layout = KERNEL_LAYOUT.load();
    // SAFETY: the helper takes nothing.
    let task = unsafe { bpf_get_current_task() };
    layout.io_uring != u32::MAX && (pointer(task, layout.io_uring) != 0 || word(task, layout.task_flags) & PF_IO_WORKER != 0)
}

/// What is done about one socket for the node process, which runs this by `BPF_PROG_TEST_RUN` from inside the socket's network
/// namespace. It is attached nowhere.
#[classifier]
pub fn mesh_pair(ctx: TcContext) -> i32 {
    let Ok(request) = ctx.load::<PairRequest>(AT) else { return -1 };
    let reply = answer(&ctx, &request);
    if ctx.store(AT, &reply, 0).is_err() {
        return -1;
    }
    0
}

#[inline(always)]
fn answer(ctx: &TcContext, request: &PairRequest) -> PairReply {
    let sk = find(ctx, request);
    if sk.is_null() {
        return PairReply { problem: PairReply::GONE, ..PairReply::default() };
    }
    let reply = of_socket(sk, request);
    // SAFETY: the socket was looked up and is released once.
    unsafe { bpf_sk_release(sk.cast()) };
    reply
}

#[inline(always)]
fn find(ctx: &TcContext, request: &PairRequest) -> *mut bpf_sock {
    // `struct bpf_sock_tuple`: addresses and ports of a packet to the socket.
    let mut tuple = [0_u8; 36];
    let size = if request.family == 4 {
        tuple[..4].copy_from_slice(&request.remote_ip[..4]);
        tuple[4..8].copy_from_slice(&request.local_ip[..4]);
        tuple[8..10].copy_from_slice(&request.remote_port);
        tuple[10..12].copy_from_slice(&request.local_port);
        12
    } else {
        tuple[..16].copy_from_slice(&request.remote_ip);
        tuple[16..32].copy_from_slice(&request.local_ip);
        tuple[32..34].copy_from_slice(&request.remote_port);
        tuple[34..36].copy_from_slice(&request.local_port);
        36
    };
    // SAFETY: a tuple of the size given.
    unsafe { bpf_sk_lookup_tcp(ctx.skb.skb.cast(), tuple.as_mut_ptr().cast(), size, BPF_F_CURRENT_NETNS as u64, 0) }
}

#[inline(always)]
fn of_socket(sk: *mut bpf_sock, request: &PairRequest) -> PairReply {
    let mut reply = PairReply::default();
    // SAFETY: fields and storage of a referenced socket, each pointer checked for null.
    unsafe {
        let sock = bpf_tcp_sock(sk);
        let established = (*sk).state == tcp::ESTABLISHED;
        let enters = request.ask == PairRequest::ENTER || request.ask == PairRequest::JOIN;
        if sock.is_null() || !established && (enters || !half_closed((*sk).state)) {
            reply.problem = PairReply::GONE;
            return reply;
        }
        reply.established = u32::from(established);
        reply.bytes_received = (*sock).bytes_received;
        reply.bytes_acked = (*sock).bytes_acked;
        reply.segments_in = (*sock).data_segs_in;
        reply.segments_out = (*sock).data_segs_out;
        let create = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
        let end: *mut End = bpf_sk_storage_get((&raw const ENDS).cast_mut().cast(), sk.cast(), core::ptr::null_mut(), create).cast();
        if end.is_null() {
            reply.problem = PairReply::FULL;
            return reply;
        }
        // Through memory: a number is wanted, not the pointer, which may not be reckoned with.
        (&raw mut (*end).own_socket).write_volatile(sk as u64);
        match request.ask {
            PairRequest::ENTER => {
                (*end).peer = request.peer;
                (*end).flow = request.flow;
                (*end).server = request.server;
                (*end).way = Way::WAITING;
                ((*end).why, (*end).large) = (Why::Nothing as u32, 0);
                let key = request.key;
                let map = (&raw const ACCELERATED).cast_mut().cast();
                if bpf_map_update_elem(map, (&raw const key).cast(), sk.cast(), u64::from(BPF_NOEXIST)) != 0 {
                    reply.problem = PairReply::FULL;
                }
            }
            PairRequest::JOIN => {
                (*end).peer_socket = request.peer_socket;
                let layout = KERNEL_LAYOUT.load();
                (*end).own_flags = flags(&layout, (&raw const (*end).own_socket).read_volatile());
                (*end).peer_flags = flags(&layout, request.peer_socket);
                (*end).way = Way::JOINED;
            }
            PairRequest::LEAVE => {
                if (*end).way != Way::LEFT {
                    (*end).why = Why::Asked as u32;
                }
                (*end).way = Way::LEFT;
            }
            PairRequest::WAKE => (*end).wake = 1,
            _ => {}
        }
        tell_of(&mut reply, &*end);
    }
    reply
}

/// Whether a connection in this state may have something to read or to send.
#[inline(always)]
fn half_closed(state: u32) -> bool {
    matches!(state, tcp::FIN_WAIT1 | tcp::FIN_WAIT2 | tcp::CLOSE_WAIT | tcp::LAST_ACK | tcp::CLOSING)
}

#[inline(always)]
fn tell_of(reply: &mut PairReply, end: &End) {
    let layout = KERNEL_LAYOUT.load();
    // SAFETY: a field of a valid reference.
    let own = unsafe { (&raw const end.own_socket).read_volatile() };
    reply.socket = own;
    reply.nonblocking = u32::from(nonblocking(flags(&layout, own)));
    reply.special = u32::from(special(&layout, own) || word(own, layout.peek_off) != u32::MAX);
    reply.ring = end.ring;
    (reply.way, reply.why, reply.peer) = (end.way, end.why, end.peer);
    (reply.messages, reply.bytes, reply.received) = (end.messages, end.bytes, end.received);
    reply.copied_seq = word(own, layout.copied_seq);
    reply.write_seq = word(own, layout.write_seq);
    let psock = pointer(own, layout.user_data) & !USER_DATA_FLAGS;
    if psock != 0 {
        reply.references = word(psock, layout.references);
        // An empty list points to itself.
        let head = psock + u64::from(layout.queue);
        reply.queued = u32::from(pointer(head, 0) != head);
    }
}
