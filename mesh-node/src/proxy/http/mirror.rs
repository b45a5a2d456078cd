//! Mirrored requests: a copy goes to another cluster, its response is read and forgotten. Nothing about it is ever seen by
//! the client, and a mirror that is slow or gone is given up.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, StatusCode};
use tokio::{sync::mpsc, time::timeout};

use super::{
    Downstream,
    body::{BodyError, FrameSink, FrameSource, RequestBody, pump},
    clusters::{EndpointState, Limited},
    framing::Frame,
    h2::{H2Sink, wire_request},
    upload::{Copied, MIRROR_BEHIND, Upload},
    upstream::{UpSink, UpSource, Upstream, Wanted, acquire, is_interim, release},
    wire::Framing,
};
use crate::{
    balance::{self, Asker},
    proxy::{Proxy, ServedPod},
    route::{Cluster, request::RequestHead},
};

/// How long a mirrored request may take in all.
const PATIENCE: Duration = Duration::from_mins(5);
/// Mirrored requests under way for one pod; more are dropped and counted.
const AT_ONCE: u32 = 1024;

/// Begins to mirror a request; its body follows as the upload proceeds.
pub fn start<B: RequestBody>(down: &Downstream<'_>, head: &RequestHead, cluster: Arc<Cluster>, upload: &mut Upload<'_, B>) {
    let mut head = head.clone();
    head.headers.insert("x-envoy-internal", HeaderValue::from_static("true"));
    if let Ok(client) = HeaderValue::from_str(&down.client.ip().to_string()) {
        head.headers.append("x-forwarded-for", client);
    }
    let framing = upload.framing();
    let (sender, receiver) = mpsc::channel(MIRROR_BEHIND);
    if framing != Framing::Empty {
        upload.copy_to(sender);
    }
    let mirror = Mirror {
        proxy: down.proxy.clone(),
        pod: down.pod.clone(),
        client: down.client,
        http2: down.http2,
        cluster,
        head,
        body: CopiedBody { frames: receiver, framing, ended: framing == Framing::Empty },
    };
    tokio::spawn(async move {
        let metrics = mirror.proxy.metrics.clone();
        let pod = mirror.pod.clone();
        let mirrored = tokio::select! {
            mirrored = timeout(PATIENCE, mirror.run()) => mirrored.ok().flatten(),
            _ = pod.ended() => None,
        };
        if mirrored.is_none() {
            metrics.mirror_failures.inc();
        }
    });
}

/// A copy of a request.
struct Mirror {
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    client: std::net::SocketAddr,
    http2: bool,
    cluster: Arc<Cluster>,
    head: RequestHead,
    body: CopiedBody,
}

/// The frames of a body, as they are copied.
struct CopiedBody {
    frames: mpsc::Receiver<Copied>,
    framing: Framing,
    ended: bool,
}

impl FrameSource for CopiedBody {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        if self.ended {
            return Ok(None);
        }
        match self.frames.recv().await {
            Some(Copied::Frame(frame)) => Ok(Some(frame)),
            Some(Copied::End) => {
                self.ended = true;
                Ok(None)
            }
            // Given up for being behind, or the client broke off: what was sent must not look complete.
            None => Err(BodyError::Truncated),
        }
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        Ok(None)
    }

    fn is_end(&self) -> bool {
        self.ended
    }
}

impl Mirror {
    /// Sends the copy and reads the response. `None` when that did not work.
    async fn run(mut self) -> Option<StatusCode> {
        let state = self.pod.clusters.of(&self.cluster);
        let _one = state.begin(Limited::Requests, Some(AT_ONCE.min(self.cluster.policy.http.max_requests.unwrap_or(AT_ONCE))))?;
        let (address, endpoint, _load) = {
            let snapshot = self.proxy.config.load();
            let source = snapshot.workload(&self.pod.uid)?;
            let ejected = state.outliers.ejected();
            let asker = Asker {
                client: self.client.ip(),
                node: &snapshot.mesh.node,
                locality: &source.locality,
                labels: &source.labels,
                dice: fastrand::u64(..),
                turn: state.turn(),
                hash: None,
                tried: &[],
                elsewhere: false,
                ejected: &ejected,
                now: std::time::Instant::now(),
            };
            let picked = balance::pick(&self.cluster, &asker)?;
            (picked.address, state.endpoint(picked.address), picked.load.begin())
        };
        let http2 = self.cluster.protocol.is_http2() || self.cluster.protocol == crate::detect::Protocol::Detect && self.http2;
        let wanted = Wanted {
            proxy: &self.proxy,
            pod: &self.pod,
            client: self.client,
            cluster: &self.cluster,
            state: &state,
            endpoint: &endpoint,
            address,
            http2,
        };
        let upstream = acquire(&wanted).await.ok()?;
        self.exchange(upstream, &endpoint).await
    }

    async fn exchange(&mut self, upstream: Upstream, endpoint: &EndpointState) -> Option<StatusCode> {
        match upstream {
            Upstream::H1(mut connection) => {
                let answered = {
                    let (mut sink, mut source, cut) = connection.halves();
                    sink.begin(&self.head, self.body.framing, None);
                    tokio::select! {
                        answered = converse(&mut self.body, &mut sink, &mut source, &self.head) => answered,
                        () = cut => None,
                    }
                };
                let (status, clean) = answered?;
                if clean {
                    release(connection, &self.cluster, endpoint);
                }
                Some(status)
            }
            Upstream::H2(mut send, _guard) => {
                let empty = self.body.is_end();
                let (response, stream) = send.send_request(wire_request(&self.head)?, empty).ok()?;
                let mut sink = UpSink::H2(H2Sink::new(stream, empty));
                let mut source = UpSource::H2 { response: Box::pin(response), body: None };
                converse(&mut self.body, &mut sink, &mut source, &self.head).await.map(|(status, _)| status)
            }
        }
    }
}

/// One exchange whose response is forgotten; its status, and whether the connection is clean after it.
async fn converse(
    body: &mut CopiedBody,
    sink: &mut UpSink<'_>,
    source: &mut UpSource<'_>,
    head: &RequestHead,
) -> Option<(StatusCode, bool)> {
    pump(body, sink).await.ok()?;
    loop {
        let answered = source.head(&head.method).await.ok()?;
        if is_interim(answered.status) {
            continue;
        }
        if answered.status == StatusCode::SWITCHING_PROTOCOLS {
            return None;
        }
        let mut nowhere = Nowhere { ended: false };
        pump(source, &mut nowhere).await.ok()?;
        return Some((answered.status, answered.keep_alive));
    }
}

/// Takes everything and keeps nothing.
struct Nowhere {
    ended: bool,
}

impl FrameSink for Nowhere {
    fn push(&mut self, _frame: Frame) {}

    fn end(&mut self) {
        self.ended = true;
    }

    fn has_ended(&self) -> bool {
        self.ended
    }

    fn is_flushed(&self) -> bool {
        true
    }

    async fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
