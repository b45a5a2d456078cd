//! Mirrored requests: a copy goes to another cluster, its response is read and forgotten. Nothing about it is ever seen by
//! the client, and a mirror that is slow or gone is given up.

use std::{sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};

use super::{
    Downstream,
    body::{BodyError, FrameSource, RequestBody},
    call::Call,
    framing::Frame,
    upload::{Copied, MIRROR_BEHIND, Upload},
    whole::Collected,
    wire::Framing,
};
use crate::{
    proxy::{Proxy, ServedPod},
    report::trace,
    route::{
        Cluster,
        request::{RequestHead, take_off},
    },
    spawn,
};

/// How long a mirrored request may take in all, and its answer where the route sets no time.
const MIRROR_TIMEOUT: Duration = Duration::from_mins(5);
/// Mirrored requests under way for one pod; more are dropped and counted.
const AT_ONCE: u32 = 1024;

/// Begins to mirror a request; its body follows as the upload proceeds. `traced`: it is part of a trace that is told from here.
/// `limit`: how long the answer may take from the end of the request.
pub fn start<B: RequestBody>(
    down: &Downstream<'_>,
    (head, traced): (&RequestHead, bool),
    cluster: Arc<Cluster>,
    limit: Option<Duration>,
    upload: &mut Upload<'_, B>,
) {
    let mut head = head.clone();
    head.headers.insert("x-envoy-internal", HeaderValue::from_static("true"));
    let client = down.client.ip().to_string();
    let came_by = head.headers.get_all("x-forwarded-for").iter().map(HeaderValue::as_bytes).chain([client.as_bytes()]);
    if let Ok(value) = HeaderValue::from_bytes(&came_by.collect::<Vec<_>>().join(&b","[..])) {
        head.headers.insert("x-forwarded-for", value);
    }
    // For the proxy that it came to, and no other.
    take_off(&mut head.headers, &HeaderName::from_static("x-envoy-upstream-rq-timeout-ms"));
    if traced {
        // Its spans would be told as the request's own.
        trace::unsampled(&mut head.headers);
    }
    let framing = upload.framing();
    let (sender, receiver) = mpsc::channel(MIRROR_BEHIND + upload.kept_frames());
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
        limit,
        body: CopiedBody { frames: receiver, framing, ended: watch::Sender::new(framing == Framing::Empty) },
    };
    spawn::large(async move {
        let metrics = mirror.proxy.metrics.clone();
        let pod = mirror.pod.clone();
        let mirrored = tokio::select! {
            mirrored = timeout(MIRROR_TIMEOUT, mirror.run()) => mirrored.ok().flatten(),
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
    limit: Option<Duration>,
    body: CopiedBody,
}

/// The frames of a body, as they are copied.
struct CopiedBody {
    frames: mpsc::Receiver<Copied>,
    framing: Framing,
    ended: watch::Sender<bool>,
}

impl FrameSource for CopiedBody {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        if self.is_end() {
            return Ok(None);
        }
        match self.frames.recv().await {
            Some(Copied::Frame { frame, .. }) => Ok(Some(frame)),
            Some(Copied::End) => {
                self.ended.send_replace(true);
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
        *self.ended.borrow()
    }
}

impl Mirror {
    /// Sends the copy and reads the response. `None` when that did not work.
    async fn run(self) -> Option<StatusCode> {
        let Self { proxy, pod, client, http2, cluster, head, limit, mut body } = self;
        let http2 = cluster.speaks_http2(http2);
        let call = Call { proxy: &proxy, pod: &pod, client, cluster: &cluster, http2, at_once: AT_ONCE };
        let framing = body.framing;
        let mut ended = body.ended.subscribe();
        let late = async {
            // Its sender is the body's own.
            let _ = ended.wait_for(|ended| *ended).await;
            sleep(limit.unwrap_or(MIRROR_TIMEOUT)).await;
        };
        let mut answer = Collected::up_to(0);
        tokio::select! {
            answered = call.run(&head, &mut body, framing, &mut answer) => answered.map(|a| a.status),
            () = late => None,
        }
    }
}
