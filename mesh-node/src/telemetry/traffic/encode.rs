//! From edges to Prometheus' series. Series that the Telemetry API made the same, by removing what told them apart, are one.

use std::{borrow::Cow, collections::BTreeMap, fmt, sync::Arc, sync::atomic::Ordering};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{Edge, HttpKey, HttpSeries, Metric, Peer, Reporter, TagValue, Tags, TcpKey, TcpSeries, Traffic, histogram::Totals};
use crate::telemetry::Flags;

type Label = (Cow<'static, str>, Arc<str>);
/// In the order they are written.
type Labels = Vec<Label>;

/// The value of one series.
#[derive(Debug, Clone)]
enum Total {
    Count(u64),
    Distribution(Box<Totals>),
}

/// What edges had counted that are forgotten, by metric, for as long as others count in the same series: all that tells two edges apart need not
/// be in the labels of each metric.
#[derive(Debug, Default)]
pub(super) struct Remains([BTreeMap<Labels, Total>; Metric::ALL.len()]);

impl Remains {
    /// Takes what forgotten edges have counted, and lets go of what none of those that are left counts in.
    pub(super) fn take(&mut self, forgotten: &[Arc<Edge>], left: &[Arc<Edge>]) {
        for (metric, all) in Metric::ALL.into_iter().zip(&mut self.0) {
            forgotten.iter().for_each(|edge| edge.collect(metric, all));
            if !all.is_empty() {
                let mut told = BTreeMap::new();
                left.iter().for_each(|edge| edge.collect(metric, &mut told));
                all.retain(|labels, _| told.contains_key(labels));
            }
        }
    }

    fn add_to(&self, metric: Metric, series: &mut BTreeMap<Labels, Total>) {
        for (labels, total) in &self.0[metric as usize] {
            if let Some(sum) = series.get_mut(labels) {
                sum.add(total);
            }
        }
    }
}

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let remains = self.reading.lock();
        let edges = self.all();
        for metric in Metric::ALL {
            let mut series = BTreeMap::new();
            edges.iter().for_each(|edge| edge.collect(metric, &mut series));
            if series.is_empty() {
                continue;
            }
            remains.add_to(metric, &mut series);
            let kind = match metric {
                Metric::RequestDuration | Metric::RequestSize | Metric::ResponseSize => MetricType::Histogram,
                _ => MetricType::Counter,
            };
            let mut family = encoder.encode_descriptor(metric.name(), metric.help(), None, kind)?;
            for (labels, total) in series {
                let encoder = family.encode_family(&labels)?;
                total.encode(encoder)?;
            }
        }
        Ok(())
    }
}

impl Total {
    fn add(&mut self, other: &Self) {
        match (self, other) {
            (Self::Count(sum), Self::Count(n)) => *sum += n,
            (Self::Distribution(sum), Self::Distribution(other)) => sum.add(other),
            // A metric is of one kind.
            _ => {}
        }
    }

    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        match self {
            Self::Count(n) => encoder.encode_counter::<NoLabelSet, _, u64>(n, None),
            Self::Distribution(totals) => encoder.encode_histogram::<NoLabelSet>(totals.sum, totals.count(), &totals.by_bound(), None),
        }
    }
}

impl Edge {
    fn collect(&self, metric: Metric, into: &mut BTreeMap<Labels, Total>) {
        if self.key.tags.of(metric).disabled {
            return;
        }
        if matches!(metric, Metric::GrpcRequestMessages | Metric::GrpcResponseMessages) {
            for (tags, series) in self.messages.all.load().iter() {
                let counter = if metric == Metric::GrpcRequestMessages { &series.requests } else { &series.responses };
                add(into, self.labels(metric, &[], tags), counter.load(Ordering::Relaxed));
            }
        } else if metric.is_http() {
            let plain = HttpKey { grpc: false, code: 200, grpc_status: None, flags: Flags::default(), tags: Tags::default() };
            self.collect_http(metric, &plain, &self.ok, into);
            for (key, series) in self.http.all.load().iter() {
                self.collect_http(metric, key, series, into);
            }
        } else {
            for (key, series) in self.tcp.all.load().iter() {
                self.collect_tcp(metric, key, series, into);
            }
        }
    }

    fn collect_http(&self, metric: Metric, key: &HttpKey, series: &HttpSeries, into: &mut BTreeMap<Labels, Total>) {
        let requests = series.duration.count();
        if requests == 0 {
            return;
        }
        let labels = self.labels(metric, &http_labels(key), &key.tags);
        let distribution = match metric {
            Metric::RequestDuration => &series.duration,
            Metric::RequestSize => &series.request_bytes,
            Metric::ResponseSize => &series.response_bytes,
            _ => return add(into, labels, requests),
        };
        let total = into.entry(labels).or_insert_with(|| Total::Distribution(Box::default()));
        if let Total::Distribution(totals) = total {
            distribution.add_to(totals);
        }
    }

    fn collect_tcp(&self, metric: Metric, key: &TcpKey, series: &TcpSeries, into: &mut BTreeMap<Labels, Total>) {
        let [opened, closed, failed] = [&series.opened, &series.closed, &series.failed].map(|c| c.load(Ordering::Relaxed));
        let value = match metric {
            Metric::TcpClosed if closed > 0 => closed,
            Metric::TcpOpened if opened > 0 => opened,
            Metric::TcpFailed if failed > 0 => failed,
            // Where there are connections there are bytes, if only none.
            Metric::TcpSent if opened > 0 => series.sent.load(Ordering::Relaxed),
            Metric::TcpReceived if opened > 0 => series.received.load(Ordering::Relaxed),
            _ => return,
        };
        let own = [("request_protocol", "tcp".into()), ("response_flags", key.flags.into())];
        add(into, self.labels(metric, &own, &key.tags), value);
    }

    /// All labels of a series, as the Telemetry API leaves them.
    fn labels(&self, metric: Metric, own: &[(&'static str, Arc<str>)], tags: &Tags) -> Labels {
        let changes = self.key.tags.of(metric);
        let mut labels = self.standard(metric);
        labels.extend(own.iter().map(|(name, value)| (Cow::Borrowed(*name), value.clone())));
        labels.retain(|(name, _)| !changes.removed.iter().any(|r| **r == **name));
        for (name, value) in &changes.set {
            let value = match value {
                TagValue::Constant(value) => value.clone(),
                TagValue::Dynamic(which) => tags.get(*which).cloned().unwrap_or_else(|| "unknown".into()),
            };
            match labels.iter_mut().find(|(n, _)| **n == **name) {
                Some(label) => label.1 = value,
                None => labels.push((Cow::Owned(name.to_string()), value)),
            }
        }
        labels
    }

    fn standard(&self, metric: Metric) -> Labels {
        let key = &self.key;
        let mut labels: Labels = Vec::with_capacity(32);
        labels.push((Cow::Borrowed("reporter"), key.reporter.name().into()));
        peer(&mut labels, SOURCE, &key.source);
        let service = [
            ("destination_service", &key.service.host),
            ("destination_service_namespace", &key.service.namespace),
            ("destination_service_name", &key.service.name),
        ];
        labels.extend(service.map(|(name, value)| (Cow::Borrowed(name), value.clone())));
        peer(&mut labels, DESTINATION, &key.destination);
        // A server knows that there is none; of connections ztunnel says no more.
        let security = match (key.mutual_tls, key.reporter) {
            (true, _) => "mutual_tls",
            (false, Reporter::Destination) if metric.is_http() => "none",
            (false, _) => "unknown",
        };
        // Of messages Istio does not say it.
        if !matches!(metric, Metric::GrpcRequestMessages | Metric::GrpcResponseMessages) {
            labels.push((Cow::Borrowed("connection_security_policy"), security.into()));
        }
        if !metric.is_http() {
            let places = [
                ("source_region", &key.source.region),
                ("source_zone", &key.source.zone),
                ("destination_region", &key.destination.region),
                ("destination_zone", &key.destination.zone),
            ];
            labels.extend(places.map(|(name, value)| (Cow::Borrowed(name), value.clone())));
        }
        labels
    }
}

const SOURCE: [&str; 8] = [
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
];

const DESTINATION: [&str; 8] = [
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
];

fn peer(labels: &mut Labels, names: [&'static str; 8], peer: &Peer) {
    let Peer { workload, namespace, principal, app, version, canonical_service, canonical_revision, cluster, .. } = peer;
    let values = [workload, canonical_service, canonical_revision, namespace, principal, app, version, cluster];
    labels.extend(names.into_iter().zip(values).map(|(name, value)| (Cow::Borrowed(name), value.clone())));
}

fn http_labels(key: &HttpKey) -> [(&'static str, Arc<str>); 4] {
    let grpc_status = key.grpc_status.map_or_else(|| "".into(), |s| s.to_string().into());
    [
        ("request_protocol", if key.grpc { "grpc" } else { "http" }.into()),
        ("response_code", key.code.to_string().into()),
        ("grpc_response_status", grpc_status),
        ("response_flags", key.flags.to_string().into()),
    ]
}

fn add(into: &mut BTreeMap<Labels, Total>, labels: Labels, value: u64) {
    into.entry(labels).or_insert(Total::Count(0)).add(&Total::Count(value));
}
