//! Spans on their way to collectors.
//!
//! Who makes a span never waits: it is put in a queue, or dropped and counted. Once a second, or when there are many, what is in
//! the queue is sent to each collector, as a request of the pod it is about: through the mesh, by that pod's identity. A
//! collector that is away, slow or full costs its own spans and nothing else.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_queue::ArrayQueue;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, uri::PathAndQuery};
use prost::Message;
use tokio::{
    sync::{Notify, mpsc},
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
        Exporter,
        span::{self, Span},
    },
    route::request::{RequestHead, Scheme},
    telemetry::Metrics,
};

/// Most spans that wait to be sent.
const MOST_WAITING: usize = 16 * 1024;
/// Most spans in one request to a collector.
const BATCH: usize = 512;
/// How long spans wait for more.
const EVERY: Duration = Duration::from_secs(1);
/// Most requests that wait for one collector.
const MOST_BATCHES: usize = 64;
/// How long who sends to a collector stays when there is nothing to send.
const IDLE: Duration = Duration::from_mins(1);
/// How long a collector may take over gRPC.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest answer of a collector that is looked at, bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// Requests of one pod to one collector under way.
const AT_ONCE: u32 = 16;

const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// Spans that wait to be sent.
pub struct Spans {
    waiting: ArrayQueue<Finished>,
    many: Notify,
}

/// A span, whose it is, and where it goes.
pub struct Finished {
    pub exporter: Arc<Exporter>,
    pub pod: WorkloadUid,
    pub span: Span,
}

impl Default for Spans {
    fn default() -> Self {
        Self { waiting: ArrayQueue::new(MOST_WAITING), many: Notify::new() }
    }
}

impl Spans {
    /// Puts a span on its way.
    pub fn push(&self, finished: Finished, metrics: &Metrics) {
        if self.waiting.push(finished).is_err() {
            metrics.spans("dropped", 1);
        }
        if self.waiting.len() >= BATCH {
            self.many.notify_one();
        }
    }

    /// Has what waits sent without delay.
    pub fn hurry(&self) {
        self.many.notify_one();
    }
}

struct Batch {
    pod: WorkloadUid,
    spans: Vec<Span>,
}

/// Sends spans for as long as the process runs.
pub async fn export(proxy: Arc<Proxy>) {
    let mut collectors: HashMap<Arc<Exporter>, (mpsc::Sender<Batch>, Instant)> = HashMap::new();
    loop {
        tokio::select! {
            () = sleep(EVERY) => {}
            () = proxy.spans.many.notified() => {}
        }
        let mut waiting: HashMap<(Arc<Exporter>, WorkloadUid), Vec<Span>> = HashMap::new();
        for _ in 0..MOST_WAITING {
            let Some(Finished { exporter, pod, span }) = proxy.spans.waiting.pop() else { break };
            waiting.entry((exporter, pod)).or_default().push(span);
        }
        let now = Instant::now();
        for ((exporter, pod), mut spans) in waiting {
            let (sender, used) = collectors.entry(exporter.clone()).or_insert_with(|| {
                let (sender, batches) = mpsc::channel(MOST_BATCHES);
                tokio::spawn(send_all(proxy.clone(), exporter, batches));
                (sender, now)
            });
            *used = now;
            while !spans.is_empty() {
                let rest = spans.split_off(spans.len().min(BATCH));
                let count = spans.len();
                if sender.try_send(Batch { pod: pod.clone(), spans }).is_err() {
                    proxy.metrics.spans("dropped", count);
                }
                spans = rest;
            }
        }
        collectors.retain(|_, (_, used)| now.duration_since(*used) < IDLE);
    }
}

async fn send_all(proxy: Arc<Proxy>, exporter: Arc<Exporter>, mut batches: mpsc::Receiver<Batch>) {
    let mut failing = false;
    while let Some(Batch { pod, spans }) = batches.recv().await {
        let count = spans.len();
        let patience = exporter.http.as_ref().map_or(PATIENCE, |http| http.timeout);
        let sent = timeout(patience, send(&proxy, &exporter, &pod, spans)).await.unwrap_or(Err("timeout"));
        match sent {
            Ok(rejected) => {
                proxy.metrics.spans("exported", count.saturating_sub(rejected));
                proxy.metrics.spans("rejected", rejected.min(count));
                failing = false;
            }
            Err(why) => {
                proxy.metrics.spans("failed", count);
                if !failing {
                    let (provider, service, port) = (&*exporter.name, &*exporter.service, exporter.port);
                    tracing::warn!(target: "traces", provider, service, port, why, "spans are lost until the collector takes them");
                }
                failing = true;
            }
        }
    }
}

/// Sends spans of one pod; how many the collector did not want.
async fn send(proxy: &Arc<Proxy>, exporter: &Exporter, pod: &WorkloadUid, spans: Vec<Span>) -> Result<usize, &'static str> {
    let pod = proxy.pods.by_uid(pod).ok_or("the pod is gone")?;
    let (cluster, message) = {
        let snapshot = proxy.config.load();
        let workload = snapshot.workload(&pod.uid).ok_or("the pod is gone")?;
        let cluster = snapshot.cluster_at(&exporter.service, exporter.port).ok_or("there is no such service or port")?;
        (cluster, span::export(workload, &proxy.metrics.cluster, spans))
    };
    let (target, body, kind) = match &exporter.http {
        Some(http) => (PathAndQuery::try_from(&*http.path), message.encode_to_vec(), "application/x-protobuf"),
        None => (Ok(PathAndQuery::from_static(EXPORT)), crate::grpc::frame(&message), "application/grpc"),
    };
    let mut headers = HeaderMap::new();
    for (name, value) in exporter.http.iter().flat_map(|http| &http.headers) {
        headers.append(name.clone(), value.clone());
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if exporter.http.is_none() {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    // Nobody is to make spans of this.
    let trace = format!("00-{:032x}-{:016x}-00", fastrand::u128(1..), fastrand::u64(1..));
    headers.insert(HeaderName::from_static("traceparent"), HeaderValue::try_from(trace).map_err(|_| "no header")?);
    let framing = Framing::Length(body.len() as u64);
    if exporter.http.is_some() {
        headers.insert(header::CONTENT_LENGTH, body.len().into());
    }
    let authority = format!("{}:{}", exporter.service, exporter.port);
    let request = RequestHead {
        method: Method::POST,
        scheme: Scheme::Http,
        authority: HeaderValue::try_from(authority).map_err(|_| "the service's name is no host name")?,
        target: target.map_err(|_| "the path is no path")?,
        headers,
    };
    let client = std::net::SocketAddr::new(pod.addresses().first().copied().ok_or("the pod has no address")?, 0);
    let http2 = exporter.http.is_none() || cluster.protocol.is_http2();
    let call = Call { proxy, pod: &pod, client, cluster: &cluster, http2, at_once: AT_ONCE };
    let mut answer = Collected::up_to(MAX_ANSWER);
    let answered = Box::pin(call.run(&request, &mut Whole::of(body), framing, &mut answer)).await.ok_or("it cannot be reached")?;
    if !(answered.status == StatusCode::OK || exporter.http.is_some() && answered.status.is_success()) {
        return Err("it answers with an error");
    }
    let response = if exporter.http.is_some() {
        span::ExportResponse::decode(&*answer.data).ok()
    } else {
        let status = answer.trailers.get("grpc-status").or_else(|| answered.headers.get("grpc-status"));
        if status.is_none_or(|s| s != "0") {
            return Err("it answers with an error");
        }
        crate::grpc::unframe(&answer.data)
    };
    let rejected = response.and_then(|r| r.partial_success).map_or(0, |p| p.rejected_spans);
    Ok(usize::try_from(rejected).unwrap_or(0))
}
