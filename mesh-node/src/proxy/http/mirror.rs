//! Mirrored requests: a copy goes to another cluster, its response is read and forgotten. Nothing about it is ever seen by
//! the client, and a mirror that is slow or gone is given up.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, StatusCode};
use tokio::{sync::mpsc, time::timeout};

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
    route::{Cluster, request::RequestHead},
};

/// How long a mirrored request may take in all.
const PATIENCE: Duration = Duration::from_mins(5);
/// Mirrored requests under way for one pod; more are dropped and counted.
const AT_ONCE: u32 = 1024;

/// Begins to mirror a request; its body follows as the upload proceeds. `traced`: it is part of a trace that is told from here.
pub fn start<B: RequestBody>(down: &Downstream<'_>, head: &RequestHead, traced: bool, cluster: Arc<Cluster>, upload: &mut Upload<'_, B>) {
    let mut head = head.clone();
    head.headers.insert("x-envoy-internal", HeaderValue::from_static("true"));
    if let Ok(client) = HeaderValue::from_str(&down.client.ip().to_string()) {
        head.headers.append("x-forwarded-for", client);
    }
    if traced {
        // Its spans would be told as the request's own.
        trace::unsampled(&mut head.headers);
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
            Some(Copied::Frame { frame, .. }) => Ok(Some(frame)),
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
    async fn run(self) -> Option<StatusCode> {
        let Self { proxy, pod, client, http2, cluster, head, mut body } = self;
        let http2 = cluster.speaks_http2(http2);
        let call = Call { proxy: &proxy, pod: &pod, client, cluster: &cluster, http2, at_once: AT_ONCE };
        let framing = body.framing;
        call.run(&head, &mut body, framing, &mut Collected::up_to(0)).await.map(|a| a.status)
    }
}
