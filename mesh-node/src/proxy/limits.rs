//! Bounds on what is under way at once. Beyond them connections are reset and counted, so that a flood cannot take the
//! descriptors the node needs to look after its pods.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::problems;

/// Descriptors kept for everything that is not a connection: listeners, maps, files.
const RESERVED: u64 = 1024;
/// Descriptors of a connection: its two ends.
const EACH: u64 = 2;
/// TLS handshakes into one pod at once: each costs a millisecond of CPU and may take its whole timeout. For each pod, so
/// that a flood to one leaves the others alone. Others wait for their turn.
pub const HANDSHAKES: usize = 256;
/// Peers of one pod that have connected and not shaken hands, those that wait for their turn or have not said anything included.
pub const CALLERS: usize = 4096;

/// Requests under way at once on the node: each keeps some tens of kilobytes, however many share a connection.
pub const MOST_REQUESTS: usize = 16_384;
/// So many times what is free a pod may hold: of what there is, four fifths if it is the only one that wants much, and less as others do.
const SHARE: usize = 4;
/// How long it is told that a pod has been refused something.
const TOLD: Duration = Duration::from_mins(1);
/// Handshakes of one client with one pod at a time; its others wait until it has finished some.
pub const HANDSHAKES_EACH: usize = 16;

/// The bounds of the process.
#[derive(Debug, Clone)]
pub struct Limits {
    connections: Shared,
    requests: Shared,
}

/// Places that pods share: none can take them all.
#[derive(Debug, Clone)]
struct Shared {
    places: Arc<Semaphore>,
    most: usize,
    what: &'static str,
}

/// What one pod holds.
#[derive(Debug, Default)]
pub struct Holds {
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
}

/// One of a pod's places; given back when dropped.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
    held: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.held.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn new(most: usize, what: &'static str) -> Self {
        Self { places: Arc::new(Semaphore::new(most)), most, what }
    }

    fn take(&self, held: &Arc<AtomicUsize>) -> Option<Place> {
        let permit = self.places.clone().try_acquire_owned().ok()?;
        if held.load(Ordering::Relaxed) >= self.places.available_permits().saturating_mul(SHARE) {
            return None;
        }
        held.fetch_add(1, Ordering::Relaxed);
        Some(Place { _permit: permit, held: held.clone() })
    }

    /// Tells that a pod could not have one more.
    fn refused(&self, pod: &str, held: &AtomicUsize) {
        let Self { what, most, places } = self;
        let (held, free) = (held.load(Ordering::Relaxed), places.available_permits());
        let told = format!(
            "warning: pod {pod} holds {held} of the {most} {what} there may be on the node, and gets no more while {free} are free"
        );
        if problems::found_for(problems::Kind::Share, &format!("{what} {pod}"), told, TOLD) {
            tracing::warn!(target: "proxy", pod, held, most, free, "a pod gets no more {what}");
        }
    }
}

impl Limits {
    /// Limits for a process that may have this many descriptors open.
    pub fn for_descriptors(descriptors: u64) -> Self {
        let connections = descriptors.saturating_sub(RESERVED.min(descriptors / 2)) / EACH;
        let connections = usize::try_from(connections).unwrap_or(usize::MAX).clamp(16, Semaphore::MAX_PERMITS);
        Self { connections: Shared::new(connections, "connections"), requests: Shared::new(MOST_REQUESTS, "requests") }
    }

    /// Room for a connection of a pod; `name`: what it is called where there is none.
    pub fn connection(&self, of: &Holds, name: impl FnOnce() -> String) -> Option<Place> {
        self.connections.take(&of.connections).or_else(|| {
            self.connections.refused(&name(), &of.connections);
            None
        })
    }

    /// The same for a request that shares its connection with others.
    pub fn request(&self, of: &Holds, name: impl FnOnce() -> String) -> Option<Place> {
        self.requests.take(&of.requests).or_else(|| {
            self.requests.refused(&name(), &of.requests);
            None
        })
    }

    /// How many connections there may be, and how many places are free.
    pub fn connections(&self) -> (usize, usize) {
        (self.connections.most, self.connections.places.available_permits())
    }
}

/// The clients of one pod that have connected and not shaken hands with it: each has as many at a time as are fair.
#[derive(Debug)]
pub struct Callers {
    all: Shared,
    each: Mutex<HashMap<IpAddr, Caller>>,
}

/// What one client has under way.
#[derive(Debug, Clone)]
struct Caller {
    held: Arc<AtomicUsize>,
    turns: Arc<Semaphore>,
}

impl Default for Callers {
    fn default() -> Self {
        Self { all: Shared::new(CALLERS, "callers"), each: Mutex::default() }
    }
}

impl Callers {
    fn of(&self, client: IpAddr) -> Caller {
        let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        // Who has nothing under way any more is forgotten.
        if each.len() >= CALLERS {
            each.retain(|_, caller| Arc::strong_count(&caller.held) > 1);
        }
        let new = || Caller { held: Arc::default(), turns: Arc::new(Semaphore::new(HANDSHAKES_EACH)) };
        each.entry(network(client)).or_insert_with(new).clone()
    }

    /// Room for one more of a client.
    pub fn enter(&self, client: IpAddr) -> Option<Place> {
        self.all.take(&self.of(client).held)
    }

    /// Completes when it is a client's turn, until what comes back is dropped. None if that is never.
    pub async fn turn(&self, client: IpAddr) -> Option<OwnedSemaphorePermit> {
        let turns = self.of(client).turns;
        turns.acquire_owned().await.ok()
    }
}

/// Whoever has an address of IPv6 has all of its network.
fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() & (u128::MAX << 64)).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> String {
        "default/a".to_owned()
    }

    #[test]
    fn connections_take_what_is_left_of_the_descriptors() {
        // Half of few descriptors stays reserved.
        assert_eq!(Limits::for_descriptors(1024 + 40).connections(), (266, 266));
        assert_eq!(Limits::for_descriptors(64).connections(), (16, 16));
    }

    #[test]
    fn no_pod_takes_all_and_what_is_given_back_is_free_again() {
        let limits = Limits::for_descriptors(64_000);
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
        assert!(tokio::time::timeout(wait, callers.turn(neighbour)).await.is_err(), "the same network");
        assert!(tokio::time::timeout(wait, callers.turn(other)).await.is_ok_and(|turn| turn.is_some()));
        held.pop();
        let entered = std::iter::from_fn(|| callers.enter(one)).collect::<Vec<_>>();
        assert!(entered.len() < CALLERS && callers.enter(neighbour).is_none() && callers.enter(other).is_some(), "{}", entered.len());
        assert!(tokio::time::timeout(wait, callers.turn(one)).await.is_ok_and(|turn| turn.is_some()));
    }
}
