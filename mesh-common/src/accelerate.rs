//! Acceleration: which way a message goes between two sockets of one node, as a pure function: tested on the host, run in
//! the kernel.
//!
//! The two sockets of a pair are each other's peers: an application and the proxy, or two applications. A message goes
//! either to the peer's own queue of redirected messages or by TCP. A reader takes what was redirected first; so a message may
//! be redirected only when nothing that was sent by TCP is in flight or unread. Nor may anything come by TCP to a socket that stays among
//! the accelerated ones: who asks how much there is to read (`FIONREAD`) is told of redirected bytes alone, takes what it has read for all,
//! and waits for ever. With the first message that cannot be redirected the pair leaves; it may come back.

/// Larger messages are bulk, which TCP moves faster: they are redirected too, until a stream is seen to be made of them.
pub const MAX_MESSAGE: u32 = 16 * 1024;
/// Smallest. What programs send as urgent data is one byte, and its flag is not shown here: by TCP it is urgent.
pub const MIN_MESSAGE: u32 = 2;
/// Most bytes a receiver has unread before its sender is sent to TCP, and so to TCP's back-pressure.
pub const MAX_QUEUED: u32 = 256 * 1024;
/// About how many messages of one size a receiver has unread: each takes memory of its own in the kernel, some 800 bytes.
pub const MAX_MESSAGES: u32 = 512;
/// Large messages, less the small ones between them, after which a stream counts as bulk and leaves.
pub const BULK_MESSAGES: u32 = 32;
/// `O_NONBLOCK` in a file's flags, on every architecture that Linux runs eBPF on but for the oldest.
pub const O_NONBLOCK: u32 = 0o4000;
/// Upper bound on accelerated sockets, two of each connection.
pub const MAX_SOCKETS: usize = 131_072;
/// Upper bound on bytes of events the node process has yet to read.
pub const EVENT_BYTES: usize = 256 * 1024;

/// Which way the messages of one direction go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way;

impl Way {
    /// The peer is not there yet: by TCP.
    pub const WAITING: u32 = 0;
    pub const REDIRECT: u32 = 1;
    /// By TCP until that is quiet. The node process sees to it that a pair does not stay so.
    pub const JOINED: u32 = 2;
    /// By TCP; the socket leaves when nothing is queued.
    pub const LEFT: u32 = 3;
}

/// Why a direction was left to TCP.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Nothing = 0,
    /// The owner of one of the sockets made it blocking.
    Blocking = 1,
    Bulk = 2,
    /// For now: a message could not be redirected, as its reader had fallen behind, or by its size.
    Message = 3,
    /// The node process wants it so.
    Asked = 4,
    /// The owner has asked for something of the socket that redirected messages do not have: TLS in the kernel, which would not be
    /// applied, word of when a message was sent, which would never come, or to be woken for so many bytes (`SO_RCVLOWAT`), which are not counted.
    Special = 5,
}

/// A socket of a pair, as its storage has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct End {
    /// The peer's key among the accelerated sockets.
    pub peer: u64,
    /// Kernel addresses of the two sockets, for checked reads only.
    pub own_socket: u64,
    pub peer_socket: u64,
    /// Likewise of the flags of the files they have been opened as, which are theirs until they are closed.
    pub own_flags: u64,
    pub peer_flags: u64,
    /// One of [`Way`]'s.
    pub way: u32,
    /// One of [`Why`]'s.
    pub why: u32,
    pub large: u32,
    /// 1: its owner is to be woken when next the sockets of its namespace are gone through.
    pub wake: u32,
    /// 1: it is the server's end of the flow.
    pub server: u32,
    /// 1: its owner uses `io_uring`, by which it may send without a copy: the kernel refuses that for good on a socket that was entered
    /// once.
    pub ring: u32,
    /// The direct connection whose end it is, to count its bytes at; 0 when it is of none.
    pub flow: u64,
    /// What was redirected.
    pub messages: u64,
    pub bytes: u64,
    /// What its owner has received, by `recv` and its kin, since this was made.
    pub received: u64,
}

/// What the kernel knows when a message is sent.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Both sockets are non-blocking.
    pub nonblocking: bool,
    /// See [`Why::Special`].
    pub special: bool,
    /// Bytes the receiver has not read.
    pub queued: u32,
    /// All that was sent by TCP so far has been taken. Asked for only of the first message.
    pub quiet: bool,
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Redirect,
    Tcp,
    /// By TCP from here on: the node process is to take the pair out.
    Leave,
}

/// Decides for one message of `size` bytes.
#[inline(always)]
pub fn step(end: &mut End, size: u32, facts: &Facts) -> Step {
    if !facts.nonblocking {
        return leave(end, Why::Blocking);
    }
    if facts.special {
        return leave(end, Why::Special);
    }
    if size > MAX_MESSAGE {
        end.large += 1;
        if end.large >= BULK_MESSAGES {
            return leave(end, Why::Bulk);
        }
    } else if end.large > 0 {
        end.large -= 1;
    }
    if end.way != Way::REDIRECT && end.way != Way::JOINED {
        return Step::Tcp;
    }
    if end.way == Way::JOINED && !facts.quiet {
        return Step::Tcp;
    }
    let most = (MAX_QUEUED - size.min(MAX_QUEUED)).min(MAX_MESSAGES * size.min(MAX_QUEUED));
    if (MIN_MESSAGE..=MAX_QUEUED).contains(&size) && facts.queued <= most {
        if end.way == Way::JOINED {
            end.way = Way::REDIRECT;
        }
        return Step::Redirect;
    }
    leave(end, Why::Message)
}

#[inline(always)]
fn leave(end: &mut End, why: Why) -> Step {
    end.way = Way::LEFT;
    end.why = why as u32;
    Step::Leave
}

/// Offsets in the running kernel's structures, from its BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct KernelLayout {
    /// Of `struct sock`.
    pub rmem_alloc: u32,
    pub socket: u32,
    pub user_data: u32,
    /// Of `struct socket`, `struct file`.
    pub file: u32,
    pub file_flags: u32,
    /// Of `struct tcp_sock`.
    pub write_seq: u32,
    pub copied_seq: u32,
    /// Of `struct inet_connection_sock`.
    pub ulp: u32,
    /// Of `struct sock`: of the eight bytes of flags, the four where `SOCK_ZEROCOPY` is, and that flag.
    pub flags: u32,
    pub zerocopy: u32,
    /// Of `struct sock`; and which bits of the four bytes are the field's.
    pub timestamping: u32,
    pub timestamping_mask: u32,
    /// Of `struct sk_psock`.
    pub references: u32,
    pub queue: u32,
    /// Of `struct sock`: how far it was peeked at, where it asks for that; all ones otherwise.
    pub peek_off: u32,
    /// Of `struct task_struct`; all ones in a kernel without `io_uring`.
    pub io_uring: u32,
    pub task_flags: u32,
    /// Of `struct sock`.
    pub receive_low_water: u32,
}

/// What the node process asks of `mesh_pair` about one socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PairRequest {
    /// One of [`PairRequest`]'s constants.
    pub ask: u32,
    /// 4 or 6.
    pub family: u32,
    pub key: u64,
    pub peer: u64,
    pub peer_socket: u64,
    /// Network byte order; IPv4 in the first four bytes.
    pub remote_ip: [u8; 16],
    pub local_ip: [u8; 16],
    pub remote_port: [u8; 2],
    pub local_port: [u8; 2],
    /// As in [`End`].
    pub server: u32,
    pub flow: u64,
}

impl PairRequest {
    /// Says how the socket is used.
    pub const LOOK: u32 = 0;
    /// Enters it among the accelerated sockets, for now without a peer.
    pub const ENTER: u32 = 1;
    /// Gives it its peer: from here on messages are redirected.
    pub const JOIN: u32 = 2;
    /// From here on nothing is redirected.
    pub const LEAVE: u32 = 3;
    /// Has its owner woken by the next run of `mesh_wake`.
    pub const WAKE: u32 = 4;
}

/// The answer, in place of the request.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PairReply {
    /// 0, or what did not work: [`PairReply`]'s constants.
    pub problem: u32,
    pub nonblocking: u32,
    /// The socket's kernel address.
    pub socket: u64,
    pub bytes_received: u64,
    pub bytes_acked: u64,
    pub segments_in: u32,
    pub segments_out: u32,
    /// One of [`Way`]'s, one of [`Why`]'s.
    pub way: u32,
    pub why: u32,
    /// Users of the socket's queue of redirected messages, itself included; 0 when it has none.
    pub references: u32,
    /// Whether redirected bytes are unread.
    pub queued: u32,
    pub messages: u64,
    pub bytes: u64,
    /// Whether neither end has said it is done.
    pub established: u32,
    /// See [`Why::Special`].
    pub special: u32,
    /// As in [`End`].
    pub received: u64,
    /// How far what came by TCP has been taken, by whatever means: a sequence number.
    pub copied_seq: u32,
    /// As in [`End`].
    pub ring: u32,
    /// How far it has sent by TCP, likewise: all of it is taken when the peer has taken as far.
    pub write_seq: u32,
    pub pad: u32,
    /// As in [`End`].
    pub peer: u64,
}

impl PairReply {
    /// There is no such connection, or it is not established and was to be entered.
    pub const GONE: u32 = 1;
    /// The kernel had no memory, or no room among the accelerated sockets.
    pub const FULL: u32 = 2;
}

/// What `mesh_accelerate` tells the node process.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Event {
    /// The key of the sending socket's peer.
    pub peer: u64,
    pub way: u32,
    pub why: u32,
}

const _: () = assert!(size_of::<End>() == 96);
const _: () = assert!(size_of::<KernelLayout>() == 72);
const _: () = assert!(size_of::<PairRequest>() == 80);
const _: () = assert!(size_of::<PairReply>() == 112);
const _: () = assert!(size_of::<Event>() == 16);

#[cfg(feature = "user")]
mod pod {
    use super::{Event, KernelLayout, PairReply, PairRequest};

    // SAFETY: all are repr(C), Copy, of integers and byte arrays only, without implicit padding (sizes asserted above).
    unsafe impl aya::Pod for KernelLayout {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PairRequest {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PairReply {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Event {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Facts = Facts { nonblocking: true, special: false, queued: 0, quiet: false };

    fn joined() -> End {
        End { way: Way::REDIRECT, ..End::default() }
    }

    #[test]
    fn messages_are_redirected_up_to_the_bound_and_then_the_pair_leaves() {
        for (size, queued, expected) in [
            (64, 0, Step::Redirect),
            (512, MAX_QUEUED - 512, Step::Redirect),
            (512, MAX_QUEUED - 511, Step::Leave),
            // Small ones cost more than their bytes.
            (64, MAX_MESSAGES * 64, Step::Redirect),
            (64, MAX_MESSAGES * 64 + 1, Step::Leave),
            (2, MAX_MESSAGES * 2 + 1, Step::Leave),
            (MAX_MESSAGE + 1, 0, Step::Redirect),
            (MAX_QUEUED, 0, Step::Redirect),
            (MAX_QUEUED + 1, 0, Step::Leave),
            (u32::MAX, 1, Step::Leave),
            // It may be urgent.
            (1, 0, Step::Leave),
            (1, 2, Step::Leave),
        ] {
            let mut end = joined();
            assert_eq!(step(&mut end, size, &Facts { queued, ..FREE }), expected, "{size} behind {queued}");
            let left = expected == Step::Leave;
            let (way, why) = if left { (Way::LEFT, Why::Message) } else { (Way::REDIRECT, Why::Nothing) };
            assert_eq!((end.way, end.why), (way, why as u32), "{size} behind {queued}");
            if left {
                assert_eq!(step(&mut end, 64, &Facts { quiet: true, ..FREE }), Step::Tcp, "whatever comes then");
            }
        }
    }

    #[test]
    fn nothing_overtakes_what_was_sent_before_the_pair_was_joined() {
        let mut end = End { way: Way::JOINED, ..End::default() };
        assert_eq!(step(&mut end, 64, &FREE), Step::Tcp);
        assert_eq!(step(&mut end, 1, &FREE), Step::Tcp);
        assert_eq!(step(&mut end, 64, &Facts { quiet: true, ..FREE }), Step::Redirect);
        assert_eq!(step(&mut end, 64, &FREE), Step::Redirect, "not asked again");
    }

    #[test]
    fn bulk_and_blocking_owners_leave_for_good() {
        let mut end = joined();
        let last = (0..BULK_MESSAGES).map(|_| step(&mut end, MAX_MESSAGE + 1, &FREE)).last();
        assert_eq!((last, end.why), (Some(Step::Leave), Why::Bulk as u32));
        let mut mixed = joined();
        for _ in 0..10 * BULK_MESSAGES {
            assert_eq!(step(&mut mixed, MAX_MESSAGE + 1, &FREE), Step::Redirect);
            assert_eq!(step(&mut mixed, 100, &FREE), Step::Redirect);
        }
        for way in [Way::WAITING, Way::REDIRECT, Way::JOINED] {
            let mut end = End { way, ..joined() };
            assert_eq!(step(&mut end, 1, &Facts { nonblocking: false, ..FREE }), Step::Leave);
            assert_eq!((end.way, end.why), (Way::LEFT, Why::Blocking as u32));
        }
        let mut special = joined();
        assert_eq!(step(&mut special, 1, &Facts { special: true, ..FREE }), Step::Leave);
        assert_eq!((special.way, special.why), (Way::LEFT, Why::Special as u32));
    }

    #[test]
    fn nothing_is_redirected_before_the_peer_is_there() {
        let mut end = End::default();
        assert_eq!(step(&mut end, 1, &Facts { quiet: true, ..FREE }), Step::Tcp);
        assert_eq!(end.way, Way::WAITING);
    }
}
