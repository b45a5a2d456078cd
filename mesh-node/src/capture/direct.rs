//! The fast path within a node, as the kernel has it: where connections may go past the proxy, and those that do.

use std::{
    collections::HashMap as Table,
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use aya::maps::{HashMap, MapData, MapError, RingBuf};
use mesh_common::{
    Address,
    direct::{ANY_POD, Flow, FlowEvent, MAX_ENDPOINTS, Route, RouteKey},
};
use tokio::io::unix::AsyncFd;

use super::{CaptureError, diag, object, octets, sys};
use crate::io::netns::Netns;

/// Most events taken in at once.
const BATCH: usize = 64;

/// Whose connections, and to which address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dialled {
    /// Cookie of the client's network namespace; none for every pod of the node.
    pub source: Option<u64>,
    /// Port 0: every port of a pod that is not named itself.
    pub to: SocketAddr,
}

/// A connection between two pods of the node that does not pass the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectFlow {
    /// Of the client's socket.
    pub cookie: u64,
    /// Cookie of the client's network namespace.
    pub source: u64,
    pub begun: Instant,
    /// The same on the kernel's clock: tells flows of one socket apart.
    number: u64,
    pub dialled: SocketAddr,
    /// Where it comes from; port 0 as long as it has none.
    pub client: SocketAddr,
    pub endpoint: SocketAddr,
    pub phase: Phase,
    /// Whether it was established, now or before its end.
    pub opened: bool,
    /// Whether one of its ends has given it up.
    pub aborted: bool,
    /// Bytes, when it is closed.
    pub sent: u64,
    pub received: u64,
}

impl DirectFlow {
    /// Whether both are the same connection: a socket may have several, one after another.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.cookie, self.number) == (other.cookie, other.number)
    }
}

/// How far a direct connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    New,
    Connecting,
    Open,
    Closed,
    /// The proxy has a connection with the same addresses to the same application: this one cannot be established.
    Clash,
}

/// Most endpoints a destination has that is reached directly.
pub const MOST_ENDPOINTS: usize = MAX_ENDPOINTS;

/// The kernel side, one per process.
pub struct Direct {
    routes: HashMap<MapData, RouteKey, Route>,
    in_force: Table<RouteKey, Route>,
    flows: HashMap<MapData, u64, Flow>,
}

/// What happens to direct connections.
pub struct FlowEvents(AsyncFd<RingBuf<MapData>>);

pub(super) fn open(loaded: &mut object::Loaded) -> Result<(Direct, FlowEvents), CaptureError> {
    let routes: HashMap<MapData, RouteKey, Route> = loaded.hash("ROUTES")?;
    // Left by an earlier process; what is not wanted any more goes with the first table.
    let in_force = routes.iter().filter_map(Result::ok).collect();
    let events: RingBuf<MapData> = loaded.take("FLOW_EVENTS", RingBuf::try_from)?;
    // SAFETY: the ring owns its descriptor for as long as it lives, and always returns that one.
    let events = unsafe { AsyncFd::register(events) };
    let events = events.map_err(|e| CaptureError::io("watch the events of direct connections")(e.into_parts().1))?;
    Ok((Direct { routes, in_force, flows: loaded.hash("FLOWS")? }, FlowEvents(events)))
}

/// Whether an element that was to be removed was not there.
fn is_absent(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound | MapError::ElementNotFound => true,
        MapError::SyscallError(call) => call.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

impl Direct {
    /// Puts these routes in force and no others: each to any of its endpoints, or without any to where it was dialled.
    ///
    /// What is not wanted any more goes first. An error leaves some of the old ones in force, or some of the new ones out: to be called again.
    pub fn set_routes(&mut self, wanted: &Table<Dialled, Vec<SocketAddr>>) -> Result<(), CaptureError> {
        let wanted = wanted.iter().map(|(dialled, to)| (key(*dialled), route(to))).collect::<Table<_, _>>();
        let before = std::mem::take(&mut self.in_force);
        let mut failed = None;
        for (key, route) in before {
            let stays = wanted.get(&key) == Some(&route);
            let gone = if stays { Ok(()) } else { self.routes.remove(&key) };
            let is_there = !matches!(&gone, Err(error) if is_absent(error));
            if stays || gone.is_err() && is_there {
                self.in_force.insert(key, route);
            }
            failed = failed.or(gone.err().filter(|_| is_there));
        }
        if let Some(error) = failed {
            return Err(CaptureError::map("ROUTES")(error));
        }
        for (key, route) in wanted {
            if self.in_force.contains_key(&key) {
                continue;
            }
            self.routes.insert(key, route, 0).map_err(CaptureError::map("ROUTES"))?;
            self.in_force.insert(key, route);
        }
        Ok(())
    }

    pub fn routes(&self) -> usize {
        self.in_force.len()
    }

    /// All there are, also those that are over and not forgotten.
    pub fn flows(&self) -> Vec<DirectFlow> {
        let clock = Clock::now();
        self.flows.iter().filter_map(Result::ok).map(|(cookie, flow)| clock.flow(cookie, &flow)).collect()
    }

    /// Bytes an open flow has sent and received, TCP's and those that passed it by; none when it has ended. Asked after TCP was: what
    /// of its ends TCP has counted among the bytes is known here then, and never more is told than it will have been.
    pub fn traffic(&self, flow: &DirectFlow, tcp: ByTcp) -> Option<(u64, u64)> {
        let past = self.flows.get(&flow.cookie, 0).ok().filter(|past| past.begun == flow.number && past.state != Flow::CLOSED)?;
        let mut now = Flow { seen: past.seen | Flow::WAS_OPEN, ..past };
        now.count(tcp.acked, tcp.received);
        Some((now.sent, now.received))
    }

    /// Whether a flow is there, over or not; another of the same socket is another.
    pub fn contains(&self, flow: &DirectFlow) -> bool {
        self.flows.get(&flow.cookie, 0).is_ok_and(|there| there.begun == flow.number)
    }

    /// Whether a socket has a flow.
    pub fn has(&self, cookie: u64) -> bool {
        self.flows.get(&cookie, 0).is_ok()
    }

    /// Gives up the room of one that is over. False when somebody else has, and so has counted it.
    pub fn forget(&mut self, flow: &DirectFlow) -> bool {
        // Nobody but user space removes one, and no other takes its place before.
        self.contains(flow) && self.flows.remove(&flow.cookie).is_ok()
    }
}

/// What TCP has counted of a flow, for [`Direct::traffic`].
#[derive(Debug, Clone, Copy)]
pub struct ByTcp {
    acked: u64,
    received: u64,
}

/// Asks TCP what a flow has carried. `netns`: the client's.
pub fn by_tcp(netns: &Netns, flow: &DirectFlow) -> io::Result<ByTcp> {
    let (acked, received) = netns.enter(|| diag::traffic(flow.client, flow.endpoint, Some(flow.cookie)))??;
    Ok(ByTcp { acked, received })
}

impl FlowEvents {
    /// The next ones, as they were then; at least one.
    pub async fn next(&mut self) -> io::Result<Vec<DirectFlow>> {
        loop {
            let mut ready = self.0.readable_mut().await?;
            let mut heard = Vec::new();
            let clock = Clock::now();
            let ring = ready.get_inner_mut();
            while let Some(item) = ring.next() {
                heard.extend(sys::plain::<FlowEvent>(&item).map(|e| clock.flow(e.cookie, &e.flow)));
                if heard.len() == BATCH {
                    return Ok(heard);
                }
            }
            ready.clear_ready();
            if !heard.is_empty() {
                return Ok(heard);
            }
        }
    }
}

/// The cookie of the socket with these addresses, of a connection.
pub fn connection(netns: &Netns, local: SocketAddr, remote: SocketAddr) -> io::Result<u64> {
    netns.enter(|| diag::connection(local, remote))?
}

/// Ends a connection by the socket of one of its ends, in whose network namespace it is: the other end sees a reset. `cookie`: of that
/// socket, so that no later one with the same addresses is meant; none for whichever has them.
pub fn destroy(netns: &Netns, local: SocketAddr, remote: SocketAddr, cookie: Option<u64>) -> io::Result<()> {
    netns.enter(|| diag::destroy(local, remote, cookie))?
}

fn key(dialled: Dialled) -> RouteKey {
    RouteKey { source: dialled.source.unwrap_or(ANY_POD), to: address(dialled.to), pad: [0; 6] }
}

fn route(to: &[SocketAddr]) -> Route {
    let mut route = Route::default();
    for (place, to) in route.endpoints.iter_mut().zip(to) {
        *place = address(*to);
        route.count += 1;
    }
    route
}

fn address(of: SocketAddr) -> Address {
    Address::new(octets(of.ip()), of.port())
}

fn plain(address: &Address) -> SocketAddr {
    SocketAddr::new(IpAddr::from(address.ip).to_canonical(), address.port())
}

/// The same moment on the kernel's clock and on ours.
struct Clock {
    kernel: Duration,
    ours: Instant,
}

impl Clock {
    fn now() -> Self {
        let kernel = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        Self { kernel, ours: Instant::now() }
    }

    fn flow(&self, cookie: u64, flow: &Flow) -> DirectFlow {
        let age = self.kernel.saturating_sub(Duration::from_nanos(flow.begun));
        DirectFlow {
            cookie,
            source: flow.source,
            begun: self.ours.checked_sub(age).unwrap_or(self.ours),
            number: flow.begun,
            dialled: plain(&flow.dialled),
            client: plain(&flow.client),
            endpoint: plain(&flow.endpoint),
            phase: match flow.state {
                Flow::NEW => Phase::New,
                Flow::CONNECTING => Phase::Connecting,
                Flow::OPEN => Phase::Open,
                Flow::CLASH => Phase::Clash,
                _ => Phase::Closed,
            },
            opened: flow.seen & Flow::WAS_OPEN != 0,
            aborted: flow.seen & Flow::ABORTED != 0,
            sent: flow.sent,
            received: flow.received,
        }
    }
}

/// Whether connections that leave a namespace take their ports below those of the proxy's own connections within the node.
pub fn leaves_ports(netns: &Netns) -> bool {
    let range = netns.enter(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range"));
    let highest = range.ok().and_then(Result::ok).and_then(|r| r.split_whitespace().nth(1)?.parse::<u16>().ok());
    highest.is_some_and(|highest| highest < crate::io::socket::NEIGHBOUR_PORTS.start)
}
