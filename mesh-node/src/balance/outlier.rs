//! Outlier detection: endpoints that fail too often in a row are left out for a while. Envoy's algorithm as recorded:
//! an ejection is allowed while it keeps the ejected share within `max_ejection_percent`, lasts the base time multiplied
//! by how often it happened in a row, and ends on the next tick of the interval.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::route::traffic::Outlier;

/// Longest ejection; Envoy's `max_ejection_time`, or the base time if that is longer.
const MAX_EJECTION: Duration = Duration::from_mins(5);

/// What an attempt says about its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Any response below 500.
    Success,
    /// 5xx, but for the gateway's own.
    ServerError,
    /// 502, 503, 504.
    GatewayError,
    /// The connection could not be made.
    LocalOrigin,
    /// No response on a connection that was made: it broke, or took too long.
    Broken,
}

impl Event {
    pub fn of_status(status: http::StatusCode) -> Self {
        match status.as_u16() {
            502..=504 => Self::GatewayError,
            500..600 => Self::ServerError,
            _ => Self::Success,
        }
    }
}

/// Failures in a row of one endpoint.
#[derive(Debug, Default)]
pub struct Streak {
    server: AtomicU32,
    gateway: AtomicU32,
    local: AtomicU32,
}

impl Streak {
    pub fn clear(&self) {
        [&self.server, &self.gateway, &self.local].into_iter().for_each(|count| count.store(0, Ordering::Relaxed));
    }

    /// Counts an event; whether a limit has been reached, which starts the count anew.
    fn count(&self, event: Event, settings: &Outlier) -> bool {
        let reset = |c: &AtomicU32| {
            // Read first: the count is nought almost always, and a cache line that is only read stays shared.
            if c.load(Ordering::Relaxed) != 0 {
                c.store(0, Ordering::Relaxed);
            }
        };
        let up = |c: &AtomicU32, limit: u32| {
            let n = c.fetch_add(1, Ordering::Relaxed) + 1;
            let reached = limit != 0 && n >= limit;
            if reached {
                c.store(0, Ordering::Relaxed);
            }
            reached
        };
        if settings.split_local {
            if event != Event::LocalOrigin {
                // That there was a connection is a success of the local kind.
                reset(&self.local);
            }
            if matches!(event, Event::LocalOrigin | Event::Broken) {
                return up(&self.local, settings.consecutive_local);
            }
        }
        match event {
            Event::Success => {
                reset(&self.server);
                reset(&self.gateway);
                false
            }
            Event::ServerError => {
                reset(&self.gateway);
                up(&self.server, settings.consecutive_5xx)
            }
            Event::GatewayError | Event::LocalOrigin | Event::Broken => {
                let gateway = up(&self.gateway, settings.consecutive_gateway);
                up(&self.server, settings.consecutive_5xx) | gateway
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct History {
    times: u32,
    until: Instant,
}

/// The ejections of one cluster, as one source pod sees it.
#[derive(Debug)]
pub struct Outliers {
    started: Instant,
    /// Taken on ejection only.
    history: Mutex<HashMap<SocketAddr, History>>,
    ejected: ArcSwap<Ejections>,
}

/// Endpoints that are left out, and until when.
#[derive(Debug, Default)]
pub struct Ejections {
    /// The settings they were ejected by.
    by: Option<Outlier>,
    all: Vec<(SocketAddr, Instant)>,
}

impl std::ops::Deref for Ejections {
    type Target = [(SocketAddr, Instant)];

    fn deref(&self) -> &Self::Target {
        &self.all
    }
}

impl Outliers {
    pub fn new(now: Instant) -> Self {
        Self { started: now, history: Mutex::default(), ejected: ArcSwap::default() }
    }

    /// Takes in what became of an attempt; true when it led to an ejection. `endpoints`: how many there are, asked for only then.
    pub fn record(
        &self,
        endpoint: SocketAddr,
        streak: &Streak,
        event: Event,
        settings: &Outlier,
        endpoints: impl FnOnce() -> usize,
        now: Instant,
    ) -> bool {
        let ejected = streak.count(event, settings) && self.eject(endpoint, settings, endpoints(), now);
        if ejected {
            // It comes back without a past. What comes of requests that are under way counts again.
            streak.clear();
        }
        ejected
    }

    fn eject(&self, endpoint: SocketAddr, settings: &Outlier, endpoints: usize, now: Instant) -> bool {
        let mut history = self.history.lock();
        let before = self.ejected.load();
        let mut active =
            before.iter().filter(|(_, until)| *until > now && before.by.as_ref() == Some(settings)).copied().collect::<Vec<_>>();
        if active.iter().any(|(a, _)| *a == endpoint) {
            return false;
        }
        if 100 * (active.len() + 1) > endpoints.max(1) * settings.max_ejection_percent as usize {
            return false;
        }
        // One less for each interval it has been well.
        let times = history.get(&endpoint).map_or(0, |h| {
            let well = now.saturating_duration_since(h.until).as_nanos() / settings.interval.as_nanos().max(1);
            h.times.saturating_sub(u32::try_from(well).unwrap_or(u32::MAX))
        }) + 1;
        let until =
            self.tick_after(now + (settings.base_ejection * times).min(MAX_EJECTION.max(settings.base_ejection)), settings.interval);
        history.insert(endpoint, History { times, until });
        active.push((endpoint, until));
        self.ejected.store(Arc::new(Ejections { by: Some(*settings), all: active }));
        true
    }

    /// Endpoints come back when the interval's timer goes off.
    fn tick_after(&self, at: Instant, interval: Duration) -> Instant {
        let interval = interval.as_nanos().max(1);
        let ticks = at.saturating_duration_since(self.started).as_nanos().div_ceil(interval);
        self.started + Duration::from_nanos(u64::try_from(ticks * interval).unwrap_or(u64::MAX))
    }

    /// The endpoints left out now, with the end of that.
    pub fn ejected(&self) -> arc_swap::Guard<Arc<Ejections>> {
        self.ejected.load()
    }

    /// The same by settings that may have changed since: with others, or none, nobody is left out, as Envoy's clusters
    /// begin anew.
    pub fn ejected_by(&self, settings: Option<&Outlier>) -> arc_swap::Guard<Arc<Ejections>> {
        let ejected = self.ejected.load();
        if ejected.all.is_empty() || ejected.by.as_ref() == settings {
            return ejected;
        }
        let mut history = self.history.lock();
        // Somebody may have been here since.
        if self.ejected.load().by.as_ref() != settings {
            history.clear();
            self.ejected.store(Arc::default());
        }
        drop(history);
        self.ejected.load()
    }

    pub fn is_ejected(&self, endpoint: &SocketAddr, now: Instant) -> bool {
        self.ejected.load().iter().any(|(a, until)| a == endpoint && *until > now)
    }

    /// Forgets endpoints that are no more.
    pub fn retain(&self, exists: impl Fn(&SocketAddr) -> bool) {
        let mut history = self.history.lock();
        history.retain(|a, _| exists(a));
        if self.ejected.load().iter().any(|(a, _)| !exists(a)) {
            let ejected = self.ejected.load();
            let all = ejected.iter().filter(|(a, _)| exists(a)).copied().collect();
            self.ejected.store(Arc::new(Ejections { by: ejected.by, all }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn settings(percent: u32) -> Outlier {
        Outlier { consecutive_5xx: 3, interval: SECOND / 2, base_ejection: SECOND, max_ejection_percent: percent, ..Outlier::default() }
    }

    fn address(i: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, i], 80))
    }

    /// Fails an endpoint until it is ejected or has had six failures; how many it took.
    fn fail(outliers: &Outliers, endpoint: SocketAddr, event: Event, settings: &Outlier, of: usize, now: Instant) -> Option<u32> {
        let streak = Streak::default();
        (1..=6).find(|_| outliers.record(endpoint, &streak, event, settings, || of, now))
    }

    #[test]
    fn a_limit_of_failures_in_a_row_ejects() {
        let now = Instant::now();
        for (event, expected) in
            [(Event::ServerError, Some(3)), (Event::GatewayError, Some(3)), (Event::LocalOrigin, Some(3)), (Event::Success, None)]
        {
            assert_eq!(fail(&Outliers::new(now), address(1), event, &settings(100), 1, now), expected, "{event:?}");
        }
        let gateway = Outlier { consecutive_5xx: 100, consecutive_gateway: 2, ..settings(100) };
        for (event, expected) in [(Event::ServerError, None), (Event::GatewayError, Some(2)), (Event::LocalOrigin, Some(2))] {
            assert_eq!(fail(&Outliers::new(now), address(1), event, &gateway, 1, now), expected, "{event:?}");
        }
        let split = Outlier { split_local: true, consecutive_local: 2, ..settings(100) };
        for (event, expected) in [(Event::LocalOrigin, Some(2)), (Event::Broken, None), (Event::ServerError, Some(3))] {
            assert_eq!(fail(&Outliers::new(now), address(1), event, &split, 1, now), expected, "split: {event:?}");
        }
    }

    #[test]
    fn an_endpoint_comes_back_without_a_past() {
        let (now, streak) = (Instant::now(), Streak::default());
        let (outliers, settings) = (Outliers::new(now), Outlier { consecutive_5xx: 5, consecutive_gateway: 2, ..settings(100) });
        let record = |event, now| outliers.record(address(1), &streak, event, &settings, || 1, now);
        assert!(!record(Event::GatewayError, now) && record(Event::GatewayError, now));
        let later = now + SECOND * 3;
        assert_eq!((1..=6).find(|_| record(Event::ServerError, later)), Some(5));
    }

    #[test]
    fn one_success_starts_the_count_anew() {
        let (now, streak) = (Instant::now(), Streak::default());
        let outliers = Outliers::new(now);
        for _ in 0..10 {
            for event in [Event::ServerError, Event::ServerError, Event::Success] {
                assert!(!outliers.record(address(1), &streak, event, &settings(100), || 1, now));
            }
        }
    }

    #[test]
    fn the_ejected_share_stays_within_its_limit_as_recorded() {
        for (percent, endpoints, expected) in [(10, 1, 0), (10, 9, 0), (10, 10, 1), (50, 3, 1), (67, 3, 2), (100, 3, 3), (50, 1, 0)] {
            let now = Instant::now();
            let outliers = Outliers::new(now);
            let ejected = (0..endpoints)
                .filter(|i| fail(&outliers, address(*i), Event::ServerError, &settings(percent), endpoints.into(), now).is_some());
            assert_eq!(ejected.count(), expected, "{percent} % of {endpoints}");
        }
    }

    #[test]
    fn ejections_grow_with_repetition_end_on_a_tick_and_are_forgiven() {
        let start = Instant::now();
        let outliers = Outliers::new(start);
        let mut now = start + Duration::from_millis(100);
        for times in 1..=3_u32 {
            assert_eq!(fail(&outliers, address(1), Event::ServerError, &settings(100), 1, now), Some(3));
            let until = outliers.ejected()[0].1;
            let lasted = until - now;
            assert!(lasted >= SECOND * times && lasted < SECOND * times + SECOND / 2, "{times}: {lasted:?}");
            assert_eq!((until - start).as_millis() % 500, 0, "on a tick");
            assert!(
                outliers.is_ejected(&address(1), until.checked_sub(Duration::from_millis(1)).expect("later"))
                    && !outliers.is_ejected(&address(1), until)
            );
            now = until + Duration::from_millis(100);
        }
        now += SECOND * 60;
        fail(&outliers, address(1), Event::ServerError, &settings(100), 1, now);
        assert!(outliers.ejected()[0].1 - now < SECOND * 2, "forgiven");
    }

    #[test]
    fn other_settings_begin_anew() {
        let (outliers, streak, now) = (Outliers::new(Instant::now()), Streak::default(), Instant::now());
        let eject = |settings: &Outlier| {
            assert!((0..3).any(|_| outliers.record(address(1), &streak, Event::ServerError, settings, || 1, now)));
        };
        eject(&settings(100));
        assert_eq!(outliers.ejected_by(Some(&settings(100))).len(), 1);
        assert!(outliers.ejected_by(None).is_empty() && outliers.ejected().is_empty());
        eject(&settings(100));
        let longer = Outlier { base_ejection: SECOND * 9, ..settings(100) };
        assert!(outliers.ejected_by(Some(&longer)).is_empty());
        eject(&longer);
        // It is ejected for the first time.
        assert!(outliers.ejected_by(Some(&longer)).first().is_some_and(|(_, until)| *until - now <= SECOND * 10));
    }
}
