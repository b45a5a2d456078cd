//! A request the proxy itself sends to a service on behalf of a pod: a mirror's copy, or a question to an authorizer.

use std::{net::SocketAddr, pin::pin, sync::Arc};

use http::{HeaderMap, HeaderValue, StatusCode};

use super::{
    body::{self, FrameSink, FrameSource, pump},
    clusters::{ClusterState, EndpointState, Limited},
    h2::{H2Sink, wire_request},
    meter::{Meter, Metered},
    record::Flag,
    upload::Upload,
    upstream::{REDIAL_TIMEOUT, UpSink, UpSource, Upstream, Wanted, acquire, is_interim, release},
    wire::Framing,
};
use crate::{
    balance,
    io::socket::Known,
    proxy::{Proxy, ServedPod, outbound::asker},
    route::{Cluster, LoadGuard, request::RequestHead},
};

/// Whom to call, and as whom.
pub struct Call<'a> {
    pub proxy: &'a Arc<Proxy>,
    pub pod: &'a Arc<ServedPod>,
    pub client: SocketAddr,
    pub cluster: &'a Arc<Cluster>,
    pub http2: bool,
    /// Most of the proxy's own requests under way for one pod and service.
    pub at_once: u32,
}

/// The head of an answer; its body went to the sink.
#[derive(Debug)]
pub struct Answered {
    pub status: StatusCode,
    pub headers: HeaderMap,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy)]
enum Broken {
    Upstream,
    /// The request did not come to its end.
    Caller,
    /// The connection was cut here.
    Cut,
}

impl Call<'_> {
    /// Sends a request and takes the response. `None` when that does not work.
    pub async fn run(
        &self,
        head: &RequestHead,
        body: &mut impl FrameSource,
        framing: Framing,
        sink: &mut impl FrameSink,
    ) -> Option<Answered> {
        let Self { proxy, pod, client, cluster, http2, at_once } = self;
        let state = pod.clusters.of(cluster);
        // They have a limit of their own, and are requests as well.
        let _call = state.begin(Limited::Calls, Some(*at_once))?;
        let _request = state.begin(Limited::Requests, cluster.policy.http.max_requests)?;
        let (address, endpoint, _load) = self.pick(&state)?;
        let wanted = Wanted {
            proxy,
            pod,
            client: *client,
            cluster,
            state: &state,
            endpoint: &endpoint,
            address,
            http2: *http2,
            kept: Some(Known::ToKernel),
            patience: REDIAL_TIMEOUT,
        };
        let upstream = acquire(&wanted).await.ok()?;
        // A destination on this node is as well protected from these requests as from others, and they are told of as well.
        let Some(gate) = upstream.gate() else {
            return self.exchange(upstream, (&state, &endpoint), (head, None), body, framing, sink).await.ok();
        };
        let (mut record, onward) = gate.record(head, wanted.protocol());
        let traced = onward.map(|onward| onward.on(head));
        let head = traced.as_ref().unwrap_or(head);
        let mut body = Upload::new(body, false, &proxy.replays.of(&pod.kept));
        let pass = match Box::pin(gate.admit(head, wanted.protocol(), &mut body)).await {
            Ok(pass) => pass,
            Err(refusal) => {
                refusal.note(&mut record, &gate, head);
                if !refusal.gone {
                    record.refused(Some(refusal.reply.status), &Meter::default());
                }
                return None;
            }
        };
        let head = (pass.head.as_ref().unwrap_or(head), pass.client_cert.as_ref());
        let (mut body, mut sink) = (Metered::new(&mut body, head.0.is_grpc()), Metered::new(sink, head.0.is_grpc()));
        record.let_in();
        record.look_behind(&mut sink.meter);
        let answered = self.exchange(upstream, (&state, &endpoint), head, &mut body, framing, &mut sink).await;
        match &answered {
            Ok(answered) => {
                sink.meter.see_status(&answered.headers);
                record.called(answered.status, &answered.headers);
            }
            Err(Broken::Caller) => record.abandoned(),
            Err(Broken::Cut) => record.cut(),
            Err(Broken::Upstream) => record.raise(Flag::UpstreamConnectionTermination),
        }
        record.moved(&body.meter, &sink.meter);
        answered.ok()
    }

    /// One of the cluster's endpoints, and what counts it there.
    fn pick(&self, state: &ClusterState) -> Option<(SocketAddr, Arc<EndpointState>, LoadGuard)> {
        let Self { proxy, pod, client, cluster, .. } = self;
        let snapshot = proxy.config.load();
        let source = snapshot.workload(&pod.uid)?;
        let ejected = state.outliers.ejected_by(cluster.policy.outlier.as_ref());
        let asker = asker(source, &snapshot.mesh.node, client.ip(), (state.turn(), &ejected));
        let picked = balance::pick(cluster, &asker)?;
        Some((picked.address, state.endpoint(picked.address), picked.load.begin()))
    }

    async fn exchange(
        &self,
        upstream: Upstream,
        (state, endpoint): (&ClusterState, &Arc<EndpointState>),
        (head, client_cert): (&RequestHead, Option<&HeaderValue>),
        body: &mut impl FrameSource,
        framing: Framing,
        sink: &mut impl FrameSink,
    ) -> Result<Answered, Broken> {
        match upstream {
            Upstream::H1(mut connection) => {
                let answered = {
                    let (mut up, mut source, cut) = connection.halves();
                    up.begin(head, framing, None, client_cert);
                    tokio::select! {
                        answered = converse(body, &mut up, &mut source, head, sink) => answered,
                        () = cut => Err(Broken::Cut),
                    }
                };
                let (answered, clean) = answered?;
                if clean {
                    release(connection, self.cluster, state, endpoint);
                }
                Ok(answered)
            }
            Upstream::H2(mut send, guard, _) => {
                let empty = body.is_end();
                let request = wire_request(head, client_cert).ok_or(Broken::Caller)?;
                let (response, stream) = send.send_request(request, empty).map_err(|_| Broken::Upstream)?;
                let mut up = UpSink::H2(H2Sink::new(stream, empty));
                let mut source = UpSource::of_stream(response, guard.whole(), guard.longest_head());
                converse(body, &mut up, &mut source, head, sink).await.map(|(answered, _)| answered)
            }
        }
    }
}

/// One exchange, and whether the connection is clean after it. Who has answered before the request was sent has answered.
async fn converse(
    body: &mut impl FrameSource,
    up: &mut UpSink<'_>,
    source: &mut UpSource<'_>,
    head: &RequestHead,
    sink: &mut impl FrameSink,
) -> Result<(Answered, bool), Broken> {
    let mut sending = pin!(pump(body, up));
    let mut answer = pin!(answer(source, head, sink));
    let mut sent = None;
    loop {
        tokio::select! {
            biased;
            done = &mut sending, if sent.is_none() => match done {
                Ok(()) => sent = Some(true),
                Err(body::Broken::Source(_)) => return Err(Broken::Caller),
                // What it said before it stopped reading still counts.
                Err(body::Broken::Sink(_)) => sent = Some(false),
            },
            answered = &mut answer => {
                return answered.map(|(answered, keep_alive)| (answered, keep_alive && sent == Some(true)));
            }
        }
    }
}

/// The answer, and whether the connection may be kept after it.
async fn answer(source: &mut UpSource<'_>, head: &RequestHead, sink: &mut impl FrameSink) -> Result<(Answered, bool), Broken> {
    let answered = loop {
        let answered = source.head(&head.method).await.map_err(|_| Broken::Upstream)?;
        if !is_interim(answered.status) {
            break answered;
        }
    };
    if answered.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Broken::Upstream);
    }
    pump(source, sink).await.map_err(|_| Broken::Upstream)?;
    Ok((Answered { status: answered.status, headers: answered.headers }, answered.keep_alive))
}
