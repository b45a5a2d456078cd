//! Workloads that somebody looks at live: what they do is kept for a little while, to be fetched.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Most events of one workload that are kept until they are fetched.
const MOST_EVENTS: usize = 1000;
/// Most bytes of them.
const MOST_BYTES: usize = 1024 * 1024;
/// Most workloads that can be looked at at once.
const MOST_WORKLOADS: usize = 16;
/// How long it goes on when nobody fetches.
const WATCH_TIMEOUT: Duration = Duration::from_secs(10);

/// What is looked at. Where that is nothing, it costs one relaxed load for each request.
#[derive(Debug, Default)]
pub struct Watch {
    looked_at: AtomicUsize,
    all: Mutex<HashMap<String, Seen>>,
}

#[derive(Debug)]
struct Seen {
    events: VecDeque<Arc<str>>,
    bytes: usize,
    /// The number of the first of them.
    first: u64,
    fetched: Instant,
}

/// What came after what was fetched before.
#[derive(Debug, PartialEq, Eq)]
pub struct Events {
    pub events: Vec<Arc<str>>,
    /// To be asked for next.
    pub next: u64,
    /// Events there was no room for.
    pub lost: u64,
}

impl Watch {
    /// Whether anything is looked at.
    pub fn is_on(&self) -> bool {
        self.looked_at.load(Ordering::Relaxed) > 0
    }

    /// Whether a workload is: `namespace/name`.
    pub fn sees(&self, workload: &str) -> bool {
        let mut all = self.all.lock();
        self.forget(&mut all, Instant::now());
        all.contains_key(workload)
    }

    /// Lets go of what nobody fetches any more.
    fn forget(&self, all: &mut HashMap<String, Seen>, now: Instant) {
        all.retain(|_, seen| now.saturating_duration_since(seen.fetched) < WATCH_TIMEOUT);
        self.looked_at.store(all.len(), Ordering::Relaxed);
    }

    /// Takes down what a workload did.
    pub fn tell(&self, workload: &str, event: String) {
        let mut all = self.all.lock();
        let Some(seen) = all.get_mut(workload) else { return };
        seen.bytes += event.len();
        seen.events.push_back(event.into());
        while seen.events.len() > MOST_EVENTS || seen.bytes > MOST_BYTES {
            let Some(oldest) = seen.events.pop_front() else { break };
            seen.bytes -= oldest.len();
            seen.first += 1;
        }
    }

    /// What a workload did since a time it was asked before, or, without that, from now on. None when too many are looked at.
    pub fn fetch(&self, workload: &str, from: Option<u64>) -> Option<Events> {
        self.fetch_at(workload, from, Instant::now())
    }

    fn fetch_at(&self, workload: &str, from: Option<u64>, now: Instant) -> Option<Events> {
        // Who was here before goes on counting; no count gets near the end of numbers.
        let begins = from.unwrap_or(0).min(u64::MAX / 2);
        let mut all = self.all.lock();
        // Who has paused, and comes again, goes on where it was.
        if let Some(seen) = all.get_mut(workload) {
            seen.fetched = now;
        }
        self.forget(&mut all, now);
        if !all.contains_key(workload) && all.len() >= MOST_WORKLOADS {
            return None;
        }
        let seen =
            all.entry(workload.to_owned()).or_insert_with(|| Seen { events: VecDeque::new(), bytes: 0, first: begins, fetched: now });
        let next = seen.first + seen.events.len() as u64;
        let from = from.unwrap_or(next).min(next);
        let lost = seen.first.saturating_sub(from);
        let skip = usize::try_from(from.saturating_sub(seen.first)).unwrap_or(usize::MAX);
        let events = Events { events: seen.events.iter().skip(skip).cloned().collect(), next, lost };
        self.looked_at.store(all.len(), Ordering::Relaxed);
        Some(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_fetched_once_each_and_what_had_no_room_is_counted() {
        let watch = Watch::default();
        assert!(!watch.is_on() && !watch.sees("a/b"));
        watch.tell("a/b", "before".to_owned());
        assert_eq!(watch.fetch("a/b", None), Some(Events { events: Vec::new(), next: 0, lost: 0 }));
        assert!(watch.is_on() && watch.sees("a/b") && !watch.sees("a/c"));
        watch.tell("a/b", "one".to_owned());
        watch.tell("a/c", "other".to_owned());
        let first = watch.fetch("a/b", Some(0)).expect("room");
        assert_eq!((first.events, first.next, first.lost), (vec!["one".into()], 1, 0));
        // Who comes later sees what is new to him.
        assert_eq!(watch.fetch("a/b", None).map(|e| (e.events.len(), e.next)), Some((0, 1)));
        (0..MOST_EVENTS + 5).for_each(|i| watch.tell("a/b", i.to_string()));
        let second = watch.fetch("a/b", Some(1)).expect("room");
        assert_eq!((second.events.len(), second.lost, &*second.events[0]), (MOST_EVENTS, 5, "5"));
        // Few large ones are as many as many small ones.
        (0..5).for_each(|_| watch.tell("a/b", "x".repeat(MOST_BYTES / 3)));
        let large = watch.fetch("a/b", Some(second.next)).expect("room");
        assert_eq!((large.events.len(), large.lost), (3, 2));
        assert!(watch.fetch("b/b", Some(u64::MAX)).is_some_and(|e| e.events.is_empty()));
        watch.tell("b/b", "one".to_owned());
        // From the future: a node that has started anew.
        assert_eq!(watch.fetch("a/b", Some(1 << 40)).map(|e| e.events.len()), Some(0));
        (2..MOST_WORKLOADS).for_each(|i| assert!(watch.fetch(&format!("x/{i}"), None).is_some()));
        assert!(watch.fetch("one/more", None).is_none() && watch.fetch("a/b", None).is_some());
        // Those nobody has fetched for a while hold no place.
        let later = Instant::now() + WATCH_TIMEOUT;
        assert!(watch.fetch_at("one/more", None, later).is_some());
        assert_eq!(watch.looked_at.load(Ordering::Relaxed), 1);
    }
}
