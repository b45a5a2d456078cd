//! To a pod of another node: a CONNECT stream on a pooled HBONE connection.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout, timeout_at};

use super::{dial::connect, hbone_address};
use crate::{
    hbone::{
        Connection, PoolKey, Tunnel, TunnelError,
        headers::{Authority, Forwarded, TraceParent, baggage, build},
    },
    proxy::{CONNECT_TIMEOUT, Failure, Proxy, ServedPod},
    resource::kube::WorkloadKind,
    route::Workload,
    tls::{self, HandshakeFailure},
};

/// The destination's node answers after its application has: its own time to connect, and ours.
const TUNNEL_TIMEOUT: Duration = Duration::from_secs(20);

/// Opens a stream on a connection between these two workloads.
pub async fn open(
    proxy: &Arc<Proxy>,
    pod: &Arc<ServedPod>,
    to: SocketAddr,
    source: &Arc<Workload>,
    destination: &Arc<Workload>,
    forwarded: &Forwarded,
) -> Result<Tunnel, Failure> {
    let key = PoolKey {
        source: source.identity.clone(),
        source_workload: source.uid.clone(),
        destination: destination.identity.clone(),
        destination_workload: destination.uid.clone(),
        address: hbone_address(to),
    };
    let trace = TraceParent::fresh(fastrand::u128(..), fastrand::u64(..));
    let carried = introduction(source, &proxy.metrics.cluster);
    let request = || build(&Authority::Address(to), forwarded, &carried, trace).map_err(|e| Failure::Broken(io::Error::other(e)));
    let connect = || dial(proxy.clone(), pod.clone(), key.clone());
    let opened = timeout_at(Instant::now() + TUNNEL_TIMEOUT, proxy.pool.open(&key, request, connect)).await;
    opened.unwrap_or(Err(Failure::Tunnel(TunnelError::ResponseTimeout)))
}

/// Who is at this end of a tunnel, for the other end's telemetry: with the keys and values ztunnel has.
fn introduction(source: &Workload, cluster: &str) -> String {
    let (key, name) = match source.workload_kind {
        WorkloadKind::Deployment => ("k8s.deployment.name", &source.workload_name),
        WorkloadKind::Job => ("k8s.job.name", &source.workload_name),
        WorkloadKind::CronJob => ("k8s.cronjob.name", &source.workload_name),
        WorkloadKind::Pod => ("k8s.pod.name", &source.name.name),
    };
    baggage([
        ("k8s.cluster.name", Some(cluster)),
        ("k8s.namespace.name", Some(&*source.name.namespace)),
        (key, Some(&**name)),
        ("service.name", Some(source.canonical_service().unwrap_or(&source.workload_name))),
        ("service.version", Some(source.canonical_revision().unwrap_or("latest"))),
        ("cloud.region", Some(&*source.locality.region)),
        ("cloud.availability_zone", Some(&*source.locality.zone)),
    ])
}

async fn dial(proxy: Arc<Proxy>, pod: Arc<ServedPod>, key: PoolKey) -> Result<Connection, Failure> {
    let credentials = proxy.identity.credentials(&key.source).await.map_err(Failure::Identity)?;
    let stream = connect(&pod, key.address, CONNECT_TIMEOUT).await.map_err(|failure| match failure {
        Failure::Dial { to, source } => Failure::DialPeer { to, source },
        other => other,
    })?;
    let handshake = timeout(CONNECT_TIMEOUT, tls::connect(&credentials, key.destination.clone(), stream)).await;
    let (stream, peer) = handshake.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(|source| {
        let kind = HandshakeFailure::of(&source);
        proxy.metrics.handshake_failure("client", kind.reason());
        Failure::Tls { kind, source }
    })?;
    let revoked = credentials.trust().clone().revoked(peer.chain);
    let revoked = async move {
        revoked.await;
        tracing::info!(target: "proxy", peer = %key.destination, address = %key.address, "the peer's certificate has been revoked; its connection is cut");
        proxy.metrics.handshake_failure("client", "revoked_later");
    };
    Ok(Connection::handshake(stream, revoked).await?)
}
