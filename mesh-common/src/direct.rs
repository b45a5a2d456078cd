//! The fast path within a node: connections between two pods of it that need nothing of the proxy go from one to the other, with
//! policy decided before the first byte. What is decided about them is here, as pure functions: tested on the host, run in the
//! kernel.
//!
//! The node process writes where such connections may go ([`Route`] by [`RouteKey`]); the connect hook reads it; the life of
//! each of them is kept in a [`Flow`] from before its first packet until the node process has counted it.

use crate::Address;

/// Most endpoints a route has; a destination with more is left to the proxy.
pub const MAX_ENDPOINTS: usize = 8;
/// Upper bound on routes.
pub const MAX_ROUTES: usize = 65_536;
/// Upper bound on direct connections that are open, or over and not yet counted. Further ones are left to the proxy.
pub const MAX_FLOWS: usize = 65_536;
/// Upper bound on bytes of events the node process has yet to read.
pub const EVENT_BYTES: usize = 1024 * 1024;
/// Source of a route that holds for every pod of the node.
pub const ANY_POD: u64 = 0;

/// Whose connections go where.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct RouteKey {
    /// Cookie of the client's network namespace, or [`ANY_POD`].
    pub source: u64,
    /// The address the application dials; port 0 for every port of a pod that has no route of its own.
    pub to: Address,
    pub pad: [u8; 6],
}

/// The addresses of applications a connection may go to: any of them. Without any it goes where it was dialled.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Route {
    pub count: u16,
    pub endpoints: [Address; MAX_ENDPOINTS],
}

/// Which endpoint a random number picks. A route without endpoints picks none.
#[inline(always)]
#[must_use]
pub fn pick(count: u16, random: u32) -> Option<usize> {
    let index = ((u64::from(random) * u64::from(count)) >> 32) as usize;
    (count > 0 && index < MAX_ENDPOINTS).then_some(index)
}

/// States of TCP as the kernel numbers them.
pub mod tcp {
    pub const ESTABLISHED: u32 = 1;
    pub const FIN_WAIT1: u32 = 4;
    pub const FIN_WAIT2: u32 = 5;
    pub const CLOSE: u32 = 7;
    pub const CLOSE_WAIT: u32 = 8;
    pub const LAST_ACK: u32 = 9;
    pub const CLOSING: u32 = 11;
}

/// A direct connection, by the cookie of the client's socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Flow {
    /// Cookie of the client's network namespace.
    pub source: u64,
    /// When it was dialled, on the monotonic clock, nanoseconds.
    pub begun: u64,
    /// Bytes of the application: once it is closed, all of them; before, those that passed TCP by.
    pub sent: u64,
    pub received: u64,
    pub dialled: Address,
    pub client: Address,
    pub endpoint: Address,
    /// One of [`Flow`]'s constants.
    pub state: u16,
    /// Whether it was established, and which ends have said they are done: [`Flow`]'s bits.
    pub seen: u32,
    pub pad: u32,
}

impl Flow {
    /// Dialled; the client has no port yet.
    pub const NEW: u16 = 0;
    pub const CONNECTING: u16 = 1;
    pub const OPEN: u16 = 2;
    pub const CLOSED: u16 = 3;
    /// Its addresses are in use between the proxy and the same application: it cannot become established.
    pub const CLASH: u16 = 4;

    pub const WAS_OPEN: u32 = 1;
    /// The end of what the client sends was acknowledged.
    pub const FIN_ACKED: u32 = 2;
    /// The end of what the server sends has come.
    pub const FIN_RECEIVED: u32 = 4;
    /// It was given up, by either end: the other has been told so at most.
    pub const ABORTED: u32 = 8;

    /// Takes in that the client's socket goes from one state of TCP to another.
    #[inline(always)]
    pub fn turn(&mut self, from: u32, to: u32) {
        match to {
            tcp::ESTABLISHED => {
                self.state = Self::OPEN;
                self.seen |= Self::WAS_OPEN;
            }
            tcp::CLOSE_WAIT | tcp::CLOSING => self.seen |= Self::FIN_RECEIVED,
            tcp::FIN_WAIT2 => self.seen |= Self::FIN_ACKED,
            tcp::CLOSE => {
                if from == tcp::LAST_ACK || from == tcp::CLOSING {
                    self.seen |= Self::FIN_ACKED;
                }
                if from == tcp::FIN_WAIT2 {
                    self.seen |= Self::FIN_RECEIVED;
                }
                if from == tcp::ESTABLISHED || from == tcp::FIN_WAIT1 || from == tcp::CLOSE_WAIT {
                    self.seen |= Self::ABORTED;
                }
                self.state = Self::CLOSED;
            }
            _ => {}
        }
    }

    /// Adds what TCP has counted: it counts the marks of beginning and end among the bytes.
    #[inline(always)]
    pub fn count(&mut self, acked: u64, received: u64) {
        let marks = u64::from(self.seen & Self::WAS_OPEN != 0) + u64::from(self.seen & Self::FIN_ACKED != 0);
        self.sent += acked.saturating_sub(marks);
        self.received += received.saturating_sub(u64::from(self.seen & Self::FIN_RECEIVED != 0));
    }
}

/// What the node process is told of a connection, as it is then.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FlowEvent {
    /// Cookie of the client's socket.
    pub cookie: u64,
    pub flow: Flow,
}

const _: () = assert!(size_of::<RouteKey>() == 32);
const _: () = assert!(size_of::<Route>() == 2 + 18 * MAX_ENDPOINTS && align_of::<Route>() == 2);
const _: () = assert!(size_of::<Flow>() == 96);
const _: () = assert!(size_of::<FlowEvent>() == 104);

#[cfg(feature = "user")]
mod pod {
    use super::{Flow, FlowEvent, Route, RouteKey};

    // SAFETY: all are repr(C), Copy, of integers and byte arrays only, without implicit padding (sizes asserted above).
    unsafe impl aya::Pod for RouteKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Route {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowEvent {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_is_picked_and_no_other() {
        for count in 1..=MAX_ENDPOINTS as u16 {
            let picked = (0..1000_u32).filter_map(|n| pick(count, n.wrapping_mul(4_294_967))).fold([0; MAX_ENDPOINTS], |mut all, i| {
                all[i] += 1;
                all
            });
            let even = 1000 / i32::from(count);
            for (i, times) in picked.into_iter().enumerate() {
                let expected = if i < usize::from(count) { even } else { 0 };
                assert!((times - expected).abs() <= 2, "{count}: {picked:?}");
            }
        }
        assert_eq!((pick(0, 7), pick(1, u32::MAX), pick(9, u32::MAX)), (None, Some(0), None));
    }

    #[test]
    fn bytes_are_those_of_the_applications_however_it_ends() {
        use tcp::{CLOSE, CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
        const SYN_SENT: u32 = 2;
        // States passed through, what TCP has counted (sent, received), and what the applications sent.
        type Case = (&'static [u32], (u64, u64), (u64, u64));
        let cases: [Case; 6] = [
            (&[ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE], (12, 21), (10, 20)),
            (&[ESTABLISHED, CLOSE_WAIT, LAST_ACK, CLOSE], (12, 21), (10, 20)),
            (&[ESTABLISHED, FIN_WAIT1, CLOSING, CLOSE], (12, 21), (10, 20)),
            (&[ESTABLISHED, CLOSE], (11, 20), (10, 20)),
            (&[ESTABLISHED, FIN_WAIT1, CLOSE], (11, 20), (10, 20)),
            (&[CLOSE], (0, 0), (0, 0)),
        ];
        for (states, (acked, received), expected) in cases {
            let mut flow = Flow { state: Flow::CONNECTING, ..Flow::default() };
            let mut from = SYN_SENT;
            for to in states {
                flow.turn(from, *to);
                from = *to;
            }
            flow.count(acked, received);
            assert_eq!((flow.sent, flow.received), expected, "{states:?}");
            assert_eq!(flow.state, Flow::CLOSED);
            assert_eq!(flow.seen & Flow::WAS_OPEN != 0, states.len() > 1);
        }
    }
}
