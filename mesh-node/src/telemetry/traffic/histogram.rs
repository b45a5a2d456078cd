//! A histogram of relaxed atomics, with the buckets Envoy gives Istio's metrics.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Upper bounds: milliseconds or bytes. Envoy's defaults.
pub(super) const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

#[derive(Debug, Default)]
pub(super) struct Histogram {
    /// The last is for what is above all bounds.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// In thousandths.
    sum: AtomicU64,
}

impl Histogram {
    pub(super) fn observe_millis(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.add(micros);
    }

    pub(super) fn observe(&self, value: u64) {
        self.add(value.saturating_mul(1000));
    }

    fn add(&self, thousandths: u64) {
        #[expect(clippy::cast_precision_loss, reason = "bounds are far below where it matters")]
        let value = thousandths as f64 / 1000.0;
        let at = BOUNDS.iter().position(|bound| value <= *bound).unwrap_or(BOUNDS.len());
        self.buckets[at].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(thousandths, Ordering::Relaxed);
    }

    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).sum()
    }

    pub(super) fn add_to(&self, total: &mut Totals) {
        for (sum, bucket) in total.buckets.iter_mut().zip(&self.buckets) {
            *sum += bucket.load(Ordering::Relaxed);
        }
        #[expect(clippy::cast_precision_loss, reason = "Prometheus' own numbers are of this kind")]
        let sum = self.sum.load(Ordering::Relaxed) as f64 / 1000.0;
        total.sum += sum;
    }
}

/// Several histograms taken together.
#[derive(Debug, Default, Clone)]
pub(super) struct Totals {
    pub(super) buckets: [u64; BOUNDS.len() + 1],
    pub(super) sum: f64,
}

impl Totals {
    pub(super) fn add(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(other.buckets).for_each(|(sum, n)| *sum += n);
        self.sum += other.sum;
    }

    /// Counts by upper bound, not cumulative.
    pub(super) fn by_bound(&self) -> Vec<(f64, u64)> {
        BOUNDS.iter().copied().chain([f64::INFINITY]).zip(self.buckets).collect()
    }

    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}
