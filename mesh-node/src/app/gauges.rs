//! Metrics that are read when asked for.

use std::{
    sync::atomic::Ordering,
    time::{Instant, SystemTime},
};

use super::Node;
use crate::{
    config::store::Severity,
    problems,
    proxy::http::clusters::Limited,
    telemetry::{EventLabels, IdentityLabels, SeverityLabels, WhatLabels},
};

impl Node {
    /// Refreshes the gauges that are read from elsewhere.
    pub fn refresh_metrics(&self) {
        let metrics = &self.proxy.metrics;
        self.direct.measure();
        self.proxy.open.count();
        metrics.calls.count();
        for (counter, value) in self.capture().counters() {
            metrics.capture_events.get_or_create(&EventLabels { event: counter.name() }).inner().store(value, Ordering::Relaxed);
        }
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        metrics.config_generation.set(i64::try_from(self.proxy.config.load().generation).unwrap_or(i64::MAX));
        for (name, severity) in [("error", Severity::Error), ("warning", Severity::Warning)] {
            let n = self.proxy.config.statuses().iter().filter(|s| s.severity == severity).count();
            metrics.config_remarks.get_or_create(&SeverityLabels { severity: name }).set(gauge(n));
        }
        let problems = problems::all();
        for kind in problems::Kind::ALL {
            let n = problems.iter().filter(|(k, _)| *k == kind).count();
            metrics.problems.get_or_create(&WhatLabels { what: kind.name() }).set(gauge(n));
        }
        metrics.problems.get_or_create(&WhatLabels { what: "issuer_keys" }).set(gauge(self.proxy.jwks.problems().len()));
        let (most, free) = self.proxy.limits.connections();
        for (what, n) in [("most", most), ("held", most - free.min(most))] {
            metrics.connection_places.get_or_create(&WhatLabels { what }).set(gauge(n));
        }
        metrics.config_build.set(self.proxy.config.load().built_in.as_secs_f64());
        metrics.config_lag.set(self.proxy.config.load().lag.as_secs_f64());
        metrics.edges_refused.inner().store(metrics.traffic.refused() as u64, Ordering::Relaxed);
        self.refresh_upstream();
        self.refresh_certificates();
        let pods = self.pods();
        // One that has no address yet has no traffic either.
        let uncaptured = pods.iter().filter(|p| p.enrolled && !p.captured && !p.addresses.is_empty());
        metrics.enrolled_pods.set(gauge(pods.iter().filter(|p| p.captured).count()));
        metrics.uncaptured_pods.set(gauge(uncaptured.count()));
    }

    fn refresh_upstream(&self) {
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let (mut all, snapshot) = ([0_usize; 7], self.proxy.config.load());
        for pod in self.proxy.pods.all() {
            let view = snapshot.workload(&pod.uid).map(|w| w.view.clone()).unwrap_or_default();
            for (id, state) in pod.clusters.all() {
                let counts = [Limited::Connections, Limited::Pending, Limited::Requests, Limited::Retries].map(|of| state.count(of));
                let now = Instant::now();
                let ejected = state.outliers.ejected().iter().filter(|(_, until)| *until > now).count();
                let limits = snapshot.cluster_for(&view, &id).map(|c| {
                    let http = &c.policy.http;
                    [c.policy.tcp.max_connections, http.max_pending, http.max_requests, http.max_retries]
                });
                let full = limits.map_or(0, |l| l.iter().zip(counts).filter(|(limit, n)| limit.is_some_and(|limit| *n >= limit)).count());
                let [connections, pending, requests, retries] = counts.map(|n| n as usize);
                let more = [connections, state.idle(), requests, pending, retries, ejected, full];
                all.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
            }
        }
        for (what, n) in ["connections", "idle", "requests", "pending", "retries", "ejected", "open_breakers"].into_iter().zip(all) {
            self.proxy.metrics.upstream.get_or_create(&WhatLabels { what }).set(gauge(n));
        }
        let pool = self.proxy.pool.states();
        let (connections, streams) = pool.iter().fold((0, 0), |(c, s), state| (c + state.connections, s + state.streams));
        for (what, n) in [("connections", connections), ("streams", streams)] {
            self.proxy.metrics.hbone_pool.get_or_create(&WhatLabels { what }).set(gauge(n));
        }
    }

    fn refresh_certificates(&self) {
        let metrics = &self.proxy.metrics;
        let seconds =
            |t: SystemTime| t.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
        metrics.certificate_expiry.clear();
        metrics.certificate_issued.clear();
        let states = self.proxy.identity.states();
        for state in &states {
            let labels = IdentityLabels { identity: state.identity.to_string() };
            if let (Some(before), Some(after)) = (state.not_before, state.not_after) {
                metrics.certificate_expiry.get_or_create(&labels).set(seconds(after));
                metrics.certificate_issued.get_or_create(&labels).set(seconds(before));
            }
        }
        metrics.certificates_failing.set(i64::try_from(states.iter().filter(|s| s.error.is_some()).count()).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests;
