//! Bounds on what is under way at once. Beyond them connections are reset and counted, so that a flood cannot take the
//! descriptors the node needs to look after its pods.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::problems;

/// Descriptors kept for everything that is not a connection: listeners, maps, files.
const RESERVED: u64 = 1024;
/// Descriptors of a connection: its two ends.
const EACH: u64 = 2;
/// Of what is left, one in so many for connections to applications that are kept for later requests: their clients may have gone.
const KEPT: u64 = 4;
/// TLS handshakes into one pod at once: each costs a millisecond of CPU and may take its whole timeout. For each pod, so
/// that a flood to one leaves the others alone. Others wait for their turn.
pub const HANDSHAKES: usize = 256;
/// Peers of one pod that have connected and not shaken hands, those that wait for their turn or have not said anything included.
pub const CALLERS: usize = 4096;

/// Requests that share their connections, under way at once on the node, unless its operator says otherwise: each keeps some tens of
/// kilobytes.
pub const MOST_REQUESTS: usize = 16_384;
/// So many times what is free a pod may hold: of what there is, four fifths if it is the only one that wants much, and less as others do.
const SHARE: usize = 4;
/// How long it is told that a pod has been refused something, and how often at most anew.
const TOLD: Duration = Duration::from_mins(1);
const TOLD_ANEW: u64 = 1_000;
/// Handshakes of one client with one pod at a time, and of all that have addresses of one IPv6 network; others wait until some are done.
pub const HANDSHAKES_EACH: usize = 16;
const HANDSHAKES_OF_NETWORK: usize = 128;

/// The bounds of the process.
#[derive(Debug, Clone)]
pub struct Limits {
    connections: Shared,
    requests: Shared,
    kept: Shared,
}

/// Places that are shared: nobody can take them all.
#[derive(Debug, Clone)]
struct Shared {
    taken: Arc<AtomicUsize>,
    most: usize,
    what: &'static str,
}

/// What one pod holds.
#[derive(Debug, Default)]
pub struct Holds {
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
    kept: Arc<AtomicUsize>,
    /// When it was told last that it gets no more, milliseconds since this process looked first.
    told: AtomicU64,
}

/// One place; given back when dropped.
#[derive(Debug)]
pub struct Place {
    taken: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.held.fetch_sub(1, Ordering::Relaxed);
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn new(most: usize, what: &'static str) -> Self {
        Self { taken: Arc::default(), most, what }
    }

    fn free(&self) -> usize {
        self.most.saturating_sub(self.taken.load(Ordering::Relaxed))
    }

    /// One more for who holds so many; who holds none gets the last one.
    fn take(&self, held: &Arc<AtomicUsize>) -> Option<Place> {
        let more = |taken: usize| {
            let free = self.most.saturating_sub(taken);
            let fair = held.load(Ordering::Relaxed) < free.saturating_mul(SHARE);
            (free > 0 && fair).then_some(taken + 1)
        };
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        held.fetch_add(1, Ordering::Relaxed);
        Some(Place { taken: self.taken.clone(), held: held.clone() })
    }

    /// Tells that a pod could not have one more, but not each time.
    fn refused(&self, held: &AtomicUsize, told: &AtomicU64, name: impl FnOnce() -> String) {
        static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
        let now = u64::try_from(BEGAN.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(TOLD_ANEW);
        let before = told.load(Ordering::Relaxed);
        if now < before.saturating_add(TOLD_ANEW) || told.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        let (pod, what, most) = (name(), self.what, self.most);
        let (held, free) = (held.load(Ordering::Relaxed), self.free());
        let told = format!(
            "warning: pod {pod} holds {held} of the {most} {what} there may be on the node, and gets no more while {free} are free"
        );
        if problems::found_for(problems::Kind::Share, &format!("{what} {pod}"), told, TOLD) {
            tracing::warn!(target: "proxy", pod, held, most, free, "a pod gets no more {what}");
        }
    }
}

impl Limits {
    /// Limits for a process that may have this many descriptors open, and this many requests under way.
    pub fn new(descriptors: u64, requests: usize) -> Self {
        let left = descriptors.saturating_sub(RESERVED.min(descriptors / 2));
        let places = |descriptors: u64| usize::try_from(descriptors).unwrap_or(usize::MAX).max(16);
        Self {
            connections: Shared::new(places((left - left / KEPT) / EACH), "connections"),
            requests: Shared::new(requests, "requests"),
            kept: Shared::new(places(left / KEPT), "kept connections"),
        }
    }

    /// Room for a connection of a pod; `name`: what it is called where there is none.
    pub fn connection(&self, of: &Holds, name: impl FnOnce() -> String) -> Option<Place> {
        self.connections.take(&of.connections).or_else(|| {
            self.connections.refused(&of.connections, &of.told, name);
            None
        })
    }

    /// The same for a request that shares its connection with others.
    pub fn request(&self, of: &Holds, name: impl FnOnce() -> String) -> Option<Place> {
        self.requests.take(&of.requests).or_else(|| {
            self.requests.refused(&of.requests, &of.told, name);
            None
        })
    }

    /// The same for a connection to an application that is to be kept for later requests of the pod.
    pub fn kept(&self, of: &Holds) -> Option<Place> {
        self.kept.take(&of.kept)
    }

    /// How many connections there may be, and how many places are free.
    pub fn connections(&self) -> (usize, usize) {
        (self.connections.most, self.connections.free())
    }
}

/// The clients of one pod that have connected and not shaken hands with it: each has as many at a time as are fair.
#[derive(Debug)]
pub struct Callers {
    known: Shared,
    others: Shared,
    each: Mutex<HashMap<IpAddr, Caller>>,
}

/// What one client has under way.
#[derive(Debug, Clone)]
struct Caller {
    held: Arc<AtomicUsize>,
    turns: Arc<Semaphore>,
    most: usize,
}

impl Default for Callers {
    fn default() -> Self {
        Self { known: Shared::new(CALLERS / 2, "callers"), others: Shared::new(CALLERS / 2, "callers"), each: Mutex::default() }
    }
}

impl Callers {
    fn of(&self, client: IpAddr, turns: usize) -> Caller {
        let mut each = self.each.lock();
        // Who has nothing under way any more is forgotten.
        if each.len() >= CALLERS {
            each.retain(|_, caller| Arc::strong_count(&caller.held) > 1 || caller.turns.available_permits() < caller.most);
        }
        let new = || Caller { held: Arc::default(), turns: Arc::new(Semaphore::new(turns)), most: turns };
        each.entry(client).or_insert_with(new).clone()
    }

    /// Room for one more of a client. `known`: it is a pod of the mesh; who has addresses nobody knows may have any number.
    pub fn enter(&self, client: IpAddr, known: bool) -> Option<Place> {
        let (room, of) = if known { (&self.known, client) } else { (&self.others, network(client).unwrap_or(client)) };
        room.take(&self.of(of, if of == client { HANDSHAKES_EACH } else { HANDSHAKES_OF_NETWORK }).held)
    }

    /// Completes when it is a client's turn, until what comes back is dropped. None if that is never.
    pub async fn turn(&self, client: IpAddr) -> Option<[Option<OwnedSemaphorePermit>; 2]> {
        let own = self.of(client, HANDSHAKES_EACH).turns.acquire_owned().await.ok()?;
        let network = match network(client) {
            None => None,
            Some(network) => Some(self.of(network, HANDSHAKES_OF_NETWORK).turns.acquire_owned().await.ok()?),
        };
        Some([Some(own), network])
    }
}

/// Whoever has an address of IPv6 may have all of its network, in which others may be as well.
fn network(client: IpAddr) -> Option<IpAddr> {
    match client {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(IpAddr::V6((ip.to_bits() & (u128::MAX << 64)).into())),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn none() -> String {
        "default/a".to_owned()
    }

    #[test]
    fn connections_take_what_is_left_of_the_descriptors() {
        // Half of few descriptors stays reserved.
        assert_eq!(Limits::new(1024 + 40, 1).connections(), (199, 199));
        assert_eq!(Limits::new(64, 1).connections(), (16, 16));
    }

    #[test]
    fn what_is_kept_for_later_is_bounded_for_all_and_for_each() {
        let limits = Limits::new(1024 + 4000, 1);
        let (greedy, another) = (Holds::default(), Holds::default());
        let all = |of: &Holds| std::iter::from_fn(|| limits.kept(of)).collect::<Vec<_>>();
        let first = all(&greedy);
        assert!((795..=805).contains(&first.len()), "{}", first.len());
        assert!(all(&another).len() > 100 && limits.kept(&greedy).is_none());
        drop(first);
        assert!(limits.kept(&greedy).is_some());
    }

    #[test]
    fn no_pod_takes_all_and_what_is_given_back_is_free_again() {
        let limits = Limits::new(64_000, 100);
        let (most, _) = limits.connections();
        let (greedy, another, third) = (Holds::default(), Holds::default(), Holds::default());
        let all = |of: &Holds| std::iter::from_fn(|| limits.connection(of, none)).collect::<Vec<_>>();
        let first = all(&greedy);
        assert!((most * 4 / 5 - 2..=most * 4 / 5 + 2).contains(&first.len()), "{} of {most}", first.len());
        let second = all(&another);
        assert!((most / 5 * 4 / 5 - 2..=most / 5 * 4 / 5 + 2).contains(&second.len()), "{} of {most}", second.len());
        assert!(limits.connection(&third, none).is_some());
        assert!(problems::all().iter().any(|(kind, text)| *kind == problems::Kind::Share && text.contains("pod default/a holds")));
        drop(first);
        assert_eq!(limits.connections().1, most - second.len());
        assert!(limits.connection(&greedy, none).is_some() && limits.request(&greedy, none).is_some());
    }

    #[test]
    fn who_holds_nothing_gets_the_last_place() {
        let limits = Limits::new(64, 16);
        let pods = (0..20).map(|_| Holds::default()).collect::<Vec<_>>();
        let mut held = Vec::new();
        for pod in &pods {
            held.extend(std::iter::from_fn(|| limits.request(pod, none)));
        }
        assert_eq!(held.len(), 16);
        held.pop();
        assert!(limits.request(&Holds::default(), none).is_some() && limits.request(&pods[0], none).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_finish_keeps_nobody_else_from_shaking_hands() {
        let callers = Callers::default();
        let (one, neighbour, other): (IpAddr, IpAddr, IpAddr) =
            ("fd00::1".parse().expect("valid"), "fd00::2".parse().expect("valid"), "10.0.0.1".parse().expect("valid"));
        let mut held = Vec::new();
        for _ in 0..HANDSHAKES_EACH {
            held.push(callers.turn(one).await);
        }
        let wait = Duration::from_secs(1);
        assert!(tokio::time::timeout(wait, callers.turn(one)).await.is_err());
        assert!(tokio::time::timeout(wait, callers.turn(neighbour)).await.is_ok_and(|turn| turn.is_some()));
        let of_network = (0..HANDSHAKES_OF_NETWORK).map(|i| IpAddr::V6(Ipv6Addr::from_bits((0xfd00 << 112) + 100 + i as u128)));
        let mut more = Vec::new();
        for client in of_network {
            more.extend(tokio::time::timeout(wait, callers.turn(client)).await.ok());
        }
        assert_eq!(more.len(), HANDSHAKES_OF_NETWORK - HANDSHAKES_EACH);
        drop(more);
        assert!(tokio::time::timeout(wait, callers.turn(other)).await.is_ok_and(|turn| turn.is_some()));
        held.pop();
        let entered = std::iter::from_fn(|| callers.enter(one, true)).collect::<Vec<_>>();
        let enters = |client| callers.enter(client, true).is_some();
        assert!(entered.len() < CALLERS && enters(neighbour) && enters(other), "{}", entered.len());
        // Who has a thousand addresses that nobody knows takes nothing from who is known.
        let flood = (0..1000_u32)
            .flat_map(|i| [IpAddr::V4((0x0a01_0000 + i).into()), IpAddr::V6(Ipv6Addr::from_bits((0xfd01 << 112) + u128::from(i)))]);
        let flood = flood.cycle().take(10_000).filter_map(|client| callers.enter(client, false)).collect::<Vec<_>>();
        assert!(flood.len() <= CALLERS / 2 && enters(neighbour) && enters(other), "{}", flood.len());
        drop(flood);
        // Nor who has a network of them from who has another address.
        let of_network = |i: u32| IpAddr::V6(Ipv6Addr::from_bits((0xfd02 << 112) + u128::from(i)));
        let entered = (0..10_000).filter_map(|i| callers.enter(of_network(i), false)).collect::<Vec<_>>();
        assert!(entered.len() < CALLERS / 2 && callers.enter(other, false).is_some(), "{}", entered.len());
        assert!(tokio::time::timeout(wait, callers.turn(one)).await.is_ok_and(|turn| turn.is_some()));
    }
}
