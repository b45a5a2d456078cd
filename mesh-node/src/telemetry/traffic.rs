//! Istio's metrics of requests and connections, kept per *edge*: who talks to whom, as one of them reports it.
//!
//! An edge is found once, under a lock, and held by whoever counts on it; counting is a few relaxed atomics. Series of an edge
//! are made when a response code, flag or tag first occurs, at most [`MOST_SERIES`] of them; what comes after is counted by class
//! of codes, without flags, its tags as `other`. Edges nobody holds are forgotten by [`Traffic::tidy`] when their ends are gone, or
//! when there are many.

mod calls;
mod encode;
mod histogram;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

pub use self::calls::{Calls, Followed, Messages};
use self::{encode::Remains, histogram::Histogram};
use super::Flags;

/// Most series of requests, and of connections, on one edge.
pub const MOST_SERIES: usize = 200;
/// Most edges of a node.
pub const MOST_EDGES: usize = 20_000;
/// Most of them whose source is told as it says itself: whoever is let in may say anything.
pub const MOST_STRANGERS: usize = 1000;
/// How long series stay whose ends are gone, so that they are read once more.
pub const KEPT: Duration = Duration::from_mins(5);

/// Who reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// The client's node.
    Source,
    /// The server's.
    Destination,
}

impl Reporter {
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// One end of an edge, as its labels name it. What is not known is `unknown`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Peer {
    pub workload: Arc<str>,
    pub namespace: Arc<str>,
    pub principal: Arc<str>,
    pub app: Arc<str>,
    pub version: Arc<str>,
    pub canonical_service: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub cluster: Arc<str>,
    pub region: Arc<str>,
    pub zone: Arc<str>,
}

/// The service that was meant, as labels name it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceNames {
    pub host: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
}

/// Identifies an edge: everything its series have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EdgeKey {
    pub reporter: Reporter,
    pub source: Peer,
    pub destination: Peer,
    pub service: ServiceNames,
    pub mutual_tls: bool,
    pub tags: Arc<TagPlan>,
}

/// The metrics whose names and labels are Istio's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    RequestCount,
    RequestDuration,
    RequestSize,
    ResponseSize,
    GrpcRequestMessages,
    GrpcResponseMessages,
    TcpOpened,
    TcpClosed,
    TcpSent,
    TcpReceived,
    TcpFailed,
}

impl Metric {
    pub const ALL: [Self; 11] = [
        Self::RequestCount,
        Self::RequestDuration,
        Self::RequestSize,
        Self::ResponseSize,
        Self::GrpcRequestMessages,
        Self::GrpcResponseMessages,
        Self::TcpOpened,
        Self::TcpClosed,
        Self::TcpSent,
        Self::TcpReceived,
        Self::TcpFailed,
    ];

    /// The name in the Telemetry API, if it has one for it.
    pub fn api_name(self) -> Option<&'static str> {
        Some(match self {
            Self::RequestCount => "REQUEST_COUNT",
            Self::RequestDuration => "REQUEST_DURATION",
            Self::RequestSize => "REQUEST_SIZE",
            Self::ResponseSize => "RESPONSE_SIZE",
            Self::GrpcRequestMessages => "GRPC_REQUEST_MESSAGES",
            Self::GrpcResponseMessages => "GRPC_RESPONSE_MESSAGES",
            Self::TcpOpened => "TCP_OPENED_CONNECTIONS",
            Self::TcpClosed => "TCP_CLOSED_CONNECTIONS",
            Self::TcpSent => "TCP_SENT_BYTES",
            Self::TcpReceived => "TCP_RECEIVED_BYTES",
            Self::TcpFailed => return None,
        })
    }

    /// The name in Prometheus, without the `_total` that the encoder appends to counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::RequestCount => "istio_requests",
            Self::RequestDuration => "istio_request_duration_milliseconds",
            Self::RequestSize => "istio_request_bytes",
            Self::ResponseSize => "istio_response_bytes",
            Self::GrpcRequestMessages => "istio_request_messages",
            Self::GrpcResponseMessages => "istio_response_messages",
            Self::TcpOpened => "istio_tcp_connections_opened",
            Self::TcpClosed => "istio_tcp_connections_closed",
            Self::TcpSent => "istio_tcp_sent_bytes",
            Self::TcpReceived => "istio_tcp_received_bytes",
            Self::TcpFailed => "istio_tcp_connections_failed",
        }
    }

    fn help(self) -> &'static str {
        match self {
            Self::RequestCount => "Requests",
            Self::RequestDuration => "Time from the request's head to the end of the response, milliseconds",
            Self::RequestSize => "Bytes of request bodies",
            Self::ResponseSize => "Bytes of response bodies",
            Self::GrpcRequestMessages => "gRPC messages sent by clients",
            Self::GrpcResponseMessages => "gRPC messages sent by servers",
            Self::TcpOpened => "TCP connections opened",
            Self::TcpClosed => "TCP connections closed",
            Self::TcpSent => "Bytes sent as responses on TCP connections",
            Self::TcpReceived => "Bytes received as requests on TCP connections",
            Self::TcpFailed => "TCP connections that did not come about, or that policy ended (unstable)",
        }
    }

    pub fn is_http(self) -> bool {
        !matches!(self, Self::TcpOpened | Self::TcpClosed | Self::TcpSent | Self::TcpReceived | Self::TcpFailed)
    }
}

/// What the Telemetry API changes of the metrics' labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct TagPlan {
    /// By metric; none says the metric is as it is by default.
    pub metrics: [MetricTags; Metric::ALL.len()],
    /// Tags whose values depend on the request or connection.
    pub dynamic: usize,
}

/// The same of one metric.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct MetricTags {
    pub disabled: bool,
    pub removed: Vec<Arc<str>>,
    pub set: Vec<(Arc<str>, TagValue)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TagValue {
    Constant(Arc<str>),
    /// Which of the dynamic ones.
    Dynamic(usize),
}

impl TagPlan {
    pub fn of(&self, metric: Metric) -> &MetricTags {
        &self.metrics[metric as usize]
    }

    /// Whether nothing is to be counted at all.
    pub fn is_off(&self) -> bool {
        self.metrics.iter().all(|m| m.disabled)
    }
}

/// Values of dynamic tags, one for each.
pub type Tags = Box<[Arc<str>]>;

/// What tells series of requests on one edge apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HttpKey {
    pub grpc: bool,
    /// 0 when there was no response.
    pub code: u16,
    pub grpc_status: Option<u32>,
    pub flags: Flags,
    pub tags: Tags,
}

/// What tells series of connections on one edge apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TcpKey {
    pub flags: &'static str,
    pub tags: Tags,
}

/// A request that is over.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    pub duration: Duration,
    pub request_bytes: u64,
    pub response_bytes: u64,
}

#[derive(Debug, Default)]
struct HttpSeries {
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

/// gRPC messages. Istio counts them by who talks to whom alone, as calls go on.
#[derive(Debug, Default)]
struct MessageSeries {
    requests: AtomicU64,
    responses: AtomicU64,
}

impl HttpSeries {
    fn count(&self, request: &Request) {
        self.duration.observe_millis(request.duration);
        self.request_bytes.observe(request.request_bytes);
        self.response_bytes.observe(request.response_bytes);
    }
}

#[derive(Debug, Default)]
struct TcpSeries {
    opened: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    failed: AtomicU64,
}

/// Series by key: read without a lock, added to seldom.
#[derive(Debug)]
struct Series<K, S> {
    all: ArcSwap<HashMap<K, Arc<S>>>,
    writing: Mutex<()>,
}

impl<K, S> Default for Series<K, S> {
    fn default() -> Self {
        Self { all: ArcSwap::from_pointee(HashMap::new()), writing: Mutex::new(()) }
    }
}

impl<K: Clone + Eq + Hash, S: Default> Series<K, S> {
    /// The series of a key, or of what it is folded into when there are too many.
    fn of(&self, key: &K, folded: impl Fn(&K) -> K) -> Arc<S> {
        let place = |all: &HashMap<K, Arc<S>>| if all.len() >= MOST_SERIES && !all.contains_key(key) { folded(key) } else { key.clone() };
        {
            let all = self.all.load();
            if let Some(found) = all.get(key) {
                return found.clone();
            }
            if all.len() >= MOST_SERIES
                && let Some(found) = all.get(&folded(key))
            {
                return found.clone();
            }
        }
        let _one_at_a_time = self.writing.lock();
        let mut all = HashMap::clone(&self.all.load());
        let key = place(&all);
        let series = all.entry(key).or_default().clone();
        self.all.store(Arc::new(all));
        series
    }
}

/// The series of one edge.
pub struct Edge {
    key: EdgeKey,
    /// Almost all requests: answered with 200, without flags and tags.
    ok: HttpSeries,
    http: Series<HttpKey, HttpSeries>,
    messages: Series<Tags, MessageSeries>,
    tcp: Series<TcpKey, TcpSeries>,
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Edge").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Edge {
    fn new(key: EdgeKey) -> Self {
        Self { key, ok: HttpSeries::default(), http: Series::default(), messages: Series::default(), tcp: Series::default() }
    }

    pub fn key(&self) -> &EdgeKey {
        &self.key
    }

    /// Counts a request that is over.
    pub fn request(&self, key: &HttpKey, request: &Request) {
        if key.code == 200 && !key.grpc && key.flags == Flags::default() && key.tags.is_empty() {
            self.ok.count(request);
        } else {
            self.http.of(key, HttpKey::folded).count(request);
        }
    }

    /// Counts messages of gRPC calls, to the server and from it.
    pub fn messages(&self, tags: &Tags, requests: u64, responses: u64) {
        let series = self.messages.of(tags, other);
        for (counter, n) in [(&series.requests, requests), (&series.responses, responses)] {
            if n > 0 {
                counter.fetch_add(n, Ordering::Relaxed);
            }
        }
    }

    /// Counts a connection that is established.
    pub fn opened(&self, key: &TcpKey) {
        self.tcp.of(key, TcpKey::folded).opened.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts bytes of a connection, from the server and to it.
    pub fn transferred(&self, key: &TcpKey, sent: u64, received: u64) {
        let series = self.tcp.of(key, TcpKey::folded);
        series.sent.fetch_add(sent, Ordering::Relaxed);
        series.received.fetch_add(received, Ordering::Relaxed);
    }

    /// Counts the end of a connection that was established.
    pub fn closed(&self, key: &TcpKey) {
        self.tcp.of(key, TcpKey::folded).closed.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection that did not come about.
    pub fn failed(&self, key: &TcpKey) {
        self.tcp.of(key, TcpKey::folded).failed.fetch_add(1, Ordering::Relaxed);
    }
}

fn other(tags: &Tags) -> Tags {
    tags.iter().map(|_| Arc::from("other")).collect()
}

impl HttpKey {
    /// What it is counted as when there are too many: by its class of codes, so that there are few of these.
    fn folded(&self) -> Self {
        Self {
            tags: other(&self.tags),
            code: self.code.min(599) / 100 * 100,
            grpc_status: self.grpc_status.map(|s| s.min(17)),
            flags: Flags::default(),
            ..*self
        }
    }
}

impl TcpKey {
    fn folded(&self) -> Self {
        Self { tags: other(&self.tags), flags: self.flags }
    }
}

/// All edges of the node.
#[derive(Debug, Default)]
pub struct Traffic {
    edges: Mutex<HashMap<EdgeKey, Kept>>,
    /// Held while edges are held to be read. What those had counted that are forgotten.
    reading: Mutex<Remains>,
    /// Edges that found no room.
    refused: AtomicUsize,
    /// Edges whose source is told as it says itself.
    strangers: AtomicUsize,
}

#[derive(Debug)]
struct Kept {
    edge: Arc<Edge>,
    /// Its source is told as it says itself.
    stranger: bool,
    /// Since when nobody needs it.
    unused: Option<Instant>,
}

impl Traffic {
    /// The edge with these labels. To be held by what counts on it. None when there are too many.
    pub fn edge(&self, key: EdgeKey) -> Option<Arc<Edge>> {
        self.find(key, false)
    }

    /// The same of one whose source is told as it says itself; as `unknown`, where there are many of those.
    pub fn edge_of_stranger(&self, key: EdgeKey, unknown: impl FnOnce() -> EdgeKey) -> Option<Arc<Edge>> {
        let is_there = self.edges.lock().contains_key(&key);
        if is_there || self.strangers.load(Ordering::Relaxed) < MOST_STRANGERS { self.find(key, true) } else { self.find(unknown(), false) }
    }

    fn find(&self, key: EdgeKey, stranger: bool) -> Option<Arc<Edge>> {
        let mut edges = self.edges.lock();
        if let Some(kept) = edges.get_mut(&key) {
            kept.unused = None;
            return Some(kept.edge.clone());
        }
        if edges.len() >= MOST_EDGES {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let edge = Arc::new(Edge::new(key.clone()));
        edges.insert(key, Kept { edge: edge.clone(), stranger, unused: None });
        self.strangers.fetch_add(usize::from(stranger), Ordering::Relaxed);
        Some(edge)
    }

    /// Times an edge found no room.
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }

    /// Forgets edges that nobody has held, and that have not been current, for [`KEPT`]; where there is little room left, also
    /// current ones. What they have counted stays in series that others count in too: those do not go back.
    pub fn tidy(&self, now: Instant, is_current: impl Fn(&EdgeKey) -> bool) {
        // Who reads all holds all; that says nothing.
        let Some(mut remains) = self.reading.try_lock() else { return };
        // Asked of a copy: who opens a connection does not wait for it.
        let unheld = self.edges.lock().values().filter(|k| Arc::strong_count(&k.edge) == 1).map(|k| k.edge.clone()).collect::<Vec<_>>();
        let needed = unheld.iter().filter(|edge| is_current(&edge.key)).map(|edge| edge.key.clone()).collect::<HashSet<_>>();
        drop(unheld);
        let mut edges = self.edges.lock();
        let crowded = edges.len() >= MOST_EDGES / 4 * 3;
        let mut forgotten = Vec::new();
        edges.retain(|key, kept| {
            if Arc::strong_count(&kept.edge) > 1 || !crowded && needed.contains(key) {
                kept.unused = None;
                return true;
            }
            let since = *kept.unused.get_or_insert(now);
            let stays = now.saturating_duration_since(since) < KEPT;
            if !stays {
                self.strangers.fetch_sub(usize::from(kept.stranger), Ordering::Relaxed);
                forgotten.push(kept.edge.clone());
            }
            stays
        });
        drop(edges);
        if !forgotten.is_empty() {
            remains.take(&forgotten, &self.all());
        }
    }

    fn all(&self) -> Vec<Arc<Edge>> {
        self.edges.lock().values().map(|kept| kept.edge.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
