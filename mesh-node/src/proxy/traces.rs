//! Spans on their way to collectors.
//!
//! Who makes a span never waits: it is put in a queue, or dropped and counted. Once a second, or when there are many, what is in
//! the queue is sent to each collector, as a request of the pod it is about: through the mesh, by that pod's identity. Each pod
//! sends to each collector by itself, so that what hangs holds up nothing else.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use crossbeam_queue::ArrayQueue;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use prost::Message;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc},
    time::{sleep, timeout},
};

use super::{
    Proxy,
    http::{
        call::Call,
        whole::{Collected, Whole},
        wire::Framing,
    },
};
use crate::{
    id::WorkloadUid,
    report::{
        Exporter, HeaderText,
        span::{self, Span},
    },
    route::{
        request::{RequestHead, Scheme},
        target::RequestTarget,
    },
    telemetry::Metrics,
};

/// Most spans that wait to be sent, and most bytes of them.
const MOST_WAITING: usize = 16 * 1024;
const MOST_BYTES: usize = 32 * 1024 * 1024;
/// Most bytes that are on their way to one collector, of all pods.
const MOST_SENT: usize = 16 * 1024 * 1024;
/// Most spans in one request to a collector, and most bytes of them: collectors take 4 MiB by default.
const BATCH: usize = 512;
const BATCH_BYTES: usize = 1024 * 1024;
/// How long spans wait for more.
const EXPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Most requests of one pod that wait for one collector.
const MOST_BATCHES: usize = 16;
/// How long who sends to a collector stays when there is nothing to send.
const IDLE: Duration = Duration::from_mins(1);
/// How long it waits, if the collector does not say, before it tries once more what may go better then.
const RETRY_DELAY: Duration = Duration::from_millis(300);
/// Largest answer of a collector that is looked at, bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// Requests of one pod to one collector under way: who sends does so one by one, and may be followed by another.
const AT_ONCE: u32 = 2;

const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// Spans that wait to be sent.
#[derive(Default)]
pub struct Spans {
    /// Made when there is a first one.
    waiting: OnceLock<ArrayQueue<Finished>>,
    /// Bytes of them.
    bytes: AtomicUsize,
    many: Notify,
    /// Batches that are on their way.
    under_way: Arc<AtomicUsize>,
}

/// A span, whose it is, and where it goes.
pub struct Finished {
    pub exporter: Arc<Exporter>,
    pub pod: WorkloadUid,
    pub span: Span,
}

impl Spans {
    /// Puts a span on its way.
    pub fn push(&self, finished: Finished, metrics: &Metrics) {
        let waiting = self.waiting.get_or_init(|| ArrayQueue::new(MOST_WAITING));
        let size = finished.span.size();
        // Counted first, so that taking it out never counts below nothing.
        let before = self.bytes.fetch_add(size, Ordering::Relaxed);
        if before + size > MOST_BYTES || waiting.push(finished).is_err() {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            metrics.spans("dropped", 1);
        }
        if waiting.len() >= MOST_WAITING / 4 || before >= MOST_BYTES / 4 {
            self.many.notify_one();
        }
    }

    fn pop(&self) -> Option<Finished> {
        let finished = self.waiting.get()?.pop()?;
        self.bytes.fetch_sub(finished.span.size(), Ordering::Relaxed);
        Some(finished)
    }

    /// Has what waits sent, and waits until it is, at most this long.
    pub async fn flush(&self, most: Duration) {
        self.many.notify_one();
        let done = async {
            while self.waiting.get().is_some_and(|w| !w.is_empty()) || self.under_way.load(Ordering::Relaxed) > 0 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        // Late is as good as never here.
        let _ = timeout(most, done).await;
    }
}

struct Batch {
    spans: Vec<Span>,
    /// Given back when they are sent, or lost.
    _room: OwnedSemaphorePermit,
    _under_way: UnderWay,
}

struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn begin(all: &Arc<AtomicUsize>) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self(all.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A collector, as far as it has been tried.
struct Collector {
    failing: AtomicBool,
    /// Bytes there is room for on the way to it.
    room: Arc<Semaphore>,
}

impl Default for Collector {
    fn default() -> Self {
        Self { failing: AtomicBool::default(), room: Arc::new(Semaphore::new(MOST_SENT)) }
    }
}

/// Who sends spans of one pod to one collector.
struct Sender {
    batches: mpsc::Sender<Batch>,
    used: Instant,
}

/// Sends spans for as long as the process runs.
pub async fn export(proxy: Arc<Proxy>) {
    let mut collectors: HashMap<Arc<Exporter>, Arc<Collector>> = HashMap::new();
    let mut senders: HashMap<(Arc<Exporter>, WorkloadUid), Sender> = HashMap::new();
    loop {
        tokio::select! {
            () = sleep(EXPORT_INTERVAL) => {}
            () = proxy.spans.many.notified() => {}
        }
        // From before they are taken out, so that who waits for all of them never misses those.
        let _taken_out = UnderWay::begin(&proxy.spans.under_way);
        let mut waiting: HashMap<(Arc<Exporter>, WorkloadUid), Vec<Span>> = HashMap::new();
        for _ in 0..MOST_WAITING {
            let Some(Finished { exporter, pod, span }) = proxy.spans.pop() else { break };
            waiting.entry((exporter, pod)).or_default().push(span);
        }
        let now = Instant::now();
        for ((exporter, pod), spans) in waiting {
            let collector = collectors.entry(exporter.clone()).or_default().clone();
            let sender = senders.entry((exporter.clone(), pod.clone())).or_insert_with(|| {
                let (batches, receiver) = mpsc::channel(MOST_BATCHES);
                tokio::spawn(send_all(proxy.clone(), exporter, pod, collector.clone(), receiver));
                Sender { batches, used: now }
            });
            sender.used = now;
            for spans in in_batches(spans) {
                let count = spans.len();
                let bytes = u32::try_from(spans.iter().map(Span::size).sum::<usize>()).unwrap_or(u32::MAX);
                let room = collector.room.clone().try_acquire_many_owned(bytes).ok();
                let batch = room.map(|room| Batch { spans, _room: room, _under_way: UnderWay::begin(&proxy.spans.under_way) });
                if batch.is_none_or(|batch| sender.batches.try_send(batch).is_err()) {
                    proxy.metrics.spans("dropped", count);
                }
            }
        }
        senders.retain(|_, sender| now.duration_since(sender.used) < IDLE);
        collectors.retain(|exporter, _| senders.keys().any(|(e, _)| e == exporter));
    }
}

fn in_batches(spans: Vec<Span>) -> Vec<Vec<Span>> {
    let mut all: Vec<Vec<Span>> = Vec::new();
    let mut bytes = usize::MAX;
    for span in spans {
        bytes = bytes.saturating_add(span.size());
        if let Some(batch) = all.last_mut().filter(|batch| batch.len() < BATCH && bytes <= BATCH_BYTES) {
            batch.push(span);
        } else {
            bytes = span.size();
            all.push(vec![span]);
        }
    }
    all
}

/// What became of spans that were sent.
enum Sent {
    /// Taken, but for so many.
    Taken(usize),
    /// Not taken, and it will not be otherwise.
    Failed(&'static str),
    /// Not taken; it may be otherwise in a moment, or after what the collector says.
    NotNow(&'static str, Option<Duration>),
    /// There is nobody any more who could send them.
    PodGone,
}

async fn send_all(
    proxy: Arc<Proxy>,
    exporter: Arc<Exporter>,
    pod: WorkloadUid,
    collector: Arc<Collector>,
    mut batches: mpsc::Receiver<Batch>,
) {
    while let Some(Batch { spans, _room, _under_way }) = batches.recv().await {
        let count = spans.len();
        let sent = async {
            let Some(message) = message(&proxy, &exporter, &pod, spans) else { return Sent::PodGone };
            match send(&proxy, &exporter, &pod, message.clone()).await {
                Sent::NotNow(_, wait) => {
                    sleep(wait.unwrap_or(RETRY_DELAY)).await;
                    send(&proxy, &exporter, &pod, message).await
                }
                sent => sent,
            }
        };
        match timeout(exporter.timeout, sent).await.unwrap_or(Sent::Failed("it does not answer in time")) {
            Sent::Taken(rejected) => {
                proxy.metrics.spans("exported", count.saturating_sub(rejected));
                proxy.metrics.spans("rejected", rejected.min(count));
                collector.failing.store(false, Ordering::Relaxed);
            }
            Sent::PodGone => proxy.metrics.spans("failed", count),
            Sent::Failed(why) | Sent::NotNow(why, _) => {
                proxy.metrics.spans("failed", count);
                if !collector.failing.swap(true, Ordering::Relaxed) {
                    let (provider, service, port) = (&*exporter.name, &*exporter.service, exporter.port);
                    tracing::warn!(target: "traces", provider, service, port, why, "spans are lost until the collector takes them");
                }
            }
        }
    }
}

/// Spans of one pod as a collector wants them; none when the pod is gone.
fn message(proxy: &Proxy, exporter: &Exporter, pod: &WorkloadUid, spans: Vec<Span>) -> Option<Bytes> {
    let snapshot = proxy.config.load();
    let message = span::export(snapshot.workload(pod)?, &proxy.metrics.cluster, spans);
    Some(if exporter.path.is_some() { message.encode_to_vec() } else { crate::grpc::frame(&message) }.into())
}

/// Sends spans of one pod.
async fn send(proxy: &Arc<Proxy>, exporter: &Exporter, pod: &WorkloadUid, body: Bytes) -> Sent {
    let Some(pod) = proxy.pods.by_uid(pod) else { return Sent::PodGone };
    // As the pod sees it.
    let cluster = {
        let snapshot = proxy.config.load();
        let view = snapshot.workload(&pod.uid).map(|pod| &*pod.view);
        snapshot.cluster_at(view, &exporter.service, exporter.port)
    };
    let Some(cluster) = cluster else {
        return Sent::Failed("there is no such service or port");
    };
    let Some(&address) = pod.addresses().first() else { return Sent::PodGone };
    let Some(request) = question(exporter, body.len()) else {
        return Sent::Failed("its name, path or headers are not fit for HTTP, or a variable of them is not in the node's environment");
    };
    let framing = Framing::Length(body.len() as u64);
    let http2 = exporter.path.is_none() || cluster.protocol.is_http2();
    let client = SocketAddr::new(address, 0);
    let call = Call { proxy, pod: &pod, client, cluster: &cluster, http2, at_once: AT_ONCE };
    let mut answer = Collected::up_to(MAX_ANSWER);
    let Some(answered) = Box::pin(call.run(&request, &mut Whole::of(body), framing, &mut answer)).await else {
        return Sent::NotNow("it cannot be reached", None);
    };
    let wait = answered.headers.get(header::RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok()).map(Duration::from_secs);
    let response = match (answered.status.as_u16(), &exporter.path) {
        (200..300, Some(_)) => span::ExportResponse::decode(&*answer.data).ok(),
        // As OTLP says of what may be tried again.
        (429 | 502..=504, _) => return Sent::NotNow("it answers with an error", wait),
        (200, None) => {
            match answer.trailers.get("grpc-status").or_else(|| answered.headers.get("grpc-status")).map(HeaderValue::as_bytes) {
                Some(b"0") => crate::grpc::unframe(&answer.data),
                // Cancelled, deadline exceeded, aborted, out of range, unavailable and data loss.
                Some(b"1" | b"4" | b"10" | b"11" | b"14" | b"15") => return Sent::NotNow("it answers with an error", wait),
                _ => return Sent::Failed("it answers with an error"),
            }
        }
        _ => return Sent::Failed("it answers with an error"),
    };
    let rejected = response.and_then(|r: span::ExportResponse| r.partial_success).map_or(0, |p| p.rejected_spans);
    Sent::Taken(usize::try_from(rejected).unwrap_or(0))
}

/// The head of a request with spans.
fn question(exporter: &Exporter, length: usize) -> Option<RequestHead> {
    let mut headers = HeaderMap::new();
    for (name, text) in &exporter.headers {
        let value = match text {
            HeaderText::Value(value) => value.clone(),
            HeaderText::Variable(variable) => HeaderValue::try_from(std::env::var(&**variable).ok()?).ok()?,
        };
        headers.append(name.clone(), value);
    }
    if exporter.path.is_some() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        headers.insert(header::CONTENT_LENGTH, length.into());
    } else {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    // Nobody is to make spans of this.
    let trace = format!("00-{:032x}-{:016x}-00", fastrand::u128(1..), fastrand::u64(1..));
    headers.insert(HeaderName::from_static("traceparent"), HeaderValue::try_from(trace).ok()?);
    Some(RequestHead {
        method: Method::POST,
        scheme: Scheme::Http,
        authority: HeaderValue::try_from(format!("{}:{}", exporter.service, exporter.port)).ok()?,
        target: exporter.path.as_ref().map_or(Ok(RequestTarget::from_static(EXPORT)), |path| path.parse::<RequestTarget>()).ok()?,
        headers,
    })
}
