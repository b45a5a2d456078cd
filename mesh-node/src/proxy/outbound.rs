//! Out of a pod: from a captured connection to the destination it was meant for.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    CONNECT_TIMEOUT, Failure, Proxy, ServedPod,
    inbound::{self, Admitted},
    live::Cut,
    outcome::{Direction, Outcome, Party},
};
use crate::{
    balance::{self, Asker},
    config::{OutboundPolicy, Snapshot},
    hbone::{
        Connection, PoolKey, Tunnel, TunnelError,
        headers::{Authority, Forwarded, TraceParent, baggage, build},
    },
    io::{
        relay::{Broken, relay},
        socket::{self, Source, reset_on_close, tune},
    },
    policy::Facts,
    route::{LoadGuard, Target, Workload},
    tls::{self, HandshakeFailure},
};

/// How long attempts go on while the destination's node is still enrolling it, and how far apart they are.
const RETRY_FOR: Duration = Duration::from_secs(3);
const RETRY_EVERY: Duration = Duration::from_millis(50);
/// The destination's node answers after its application has: its own time to connect, and ours.
const TUNNEL_TIMEOUT: Duration = Duration::from_secs(20);

/// A captured connection, as accepted on the outbound listener.
pub async fn serve(proxy: Arc<Proxy>, pod: Arc<ServedPod>, downstream: TcpStream, client: SocketAddr, original: Option<SocketAddr>) {
    let mut outcome = Outcome::new(&proxy.metrics, Direction::Outbound);
    outcome.source.address = Some(client);
    outcome.destination.address = original;
    let upstream = match establish(&proxy, &pod, client, original, &downstream, &mut outcome).await {
        Ok(upstream) => upstream,
        Err(failure) => {
            reset_on_close(&downstream);
            return outcome.fail(failure);
        }
    };
    if let Err(error) = tune(&downstream) {
        return outcome.fail(Failure::Broken(error));
    }
    outcome.opened();
    let traffic = outcome.traffic.clone();
    let relayed = match upstream.stream {
        Stream::Tcp(stream) => relay(downstream, stream, &traffic, pod.ended()).await,
        Stream::Tunnel(tunnel) => relay(downstream, *tunnel, &traffic, pod.ended()).await,
        Stream::Local(local) => relay_local(downstream, *local, &pod, &traffic).await,
    };
    if let Err(broken) = relayed {
        outcome.fail(broken.into());
    }
}

/// The far end of a connection.
struct Upstream {
    stream: Stream,
    /// Counts the connection against its endpoint as long as it is open.
    _load: Option<LoadGuard>,
}

enum Stream {
    Tcp(TcpStream),
    Tunnel(Box<Tunnel>),
    Local(Box<Local>),
}

/// A connection to a pod of this node: admitted by its inbound stage, without a tunnel.
struct Local {
    admitted: Admitted,
    pod: Arc<ServedPod>,
    outcome: Outcome,
}

async fn relay_local(downstream: TcpStream, local: Local, pod: &ServedPod, traffic: &crate::io::relay::Traffic) -> Result<(), Broken<Cut>> {
    let Local { admitted: Admitted { application, mut registration }, pod: destination, mut outcome } = local;
    outcome.opened();
    let cut = async {
        tokio::select! {
            biased;
            reason = inbound::cut(&mut registration, &destination) => reason,
            reason = pod.ended() => reason,
        }
    };
    let relayed = relay(downstream, application, traffic, cut).await;
    let moved = |from: &std::sync::atomic::AtomicU64, to: &std::sync::atomic::AtomicU64| {
        to.store(from.load(std::sync::atomic::Ordering::Relaxed), std::sync::atomic::Ordering::Relaxed);
    };
    moved(&traffic.sent, &outcome.traffic.sent);
    moved(&traffic.received, &outcome.traffic.received);
    if let Err(Broken::Cut(cut)) = &relayed {
        outcome.fail(Failure::Cut(*cut));
    }
    relayed
}

/// Resolves, picks and dials; again with a new decision as long as that may help and the client is still there.
async fn establish(
    proxy: &Arc<Proxy>,
    pod: &Arc<ServedPod>,
    client: SocketAddr,
    original: Option<SocketAddr>,
    downstream: &TcpStream,
    outcome: &mut Outcome,
) -> Result<Upstream, Failure> {
    let original = original.ok_or(Failure::LostOriginalDestination)?;
    let deadline = Instant::now() + RETRY_FOR;
    let mut tried = Vec::new();
    loop {
        let attempt = async {
            let decision = decide(proxy, pod, client, original, &tried)?;
            describe(outcome, &decision);
            tried.push(decision.to());
            dial(proxy, pod, client, decision, outcome).await
        };
        let failure = tokio::select! {
            established = attempt => match established {
                Ok(upstream) => return Ok(upstream),
                Err(failure) => failure,
            },
            cut = pod.ended() => return Err(Failure::Cut(cut)),
            error = gone(downstream) => return Err(Failure::Broken(error)),
        };
        if !failure.retryable() || Instant::now() >= deadline {
            return Err(failure);
        }
        sleep(RETRY_EVERY).await;
    }
}

/// Completes when the client has reset the connection: nobody waits for it to be established.
async fn gone(downstream: &TcpStream) -> io::Error {
    match downstream.ready(tokio::io::Interest::ERROR).await {
        Ok(_) => io::ErrorKind::ConnectionReset.into(),
        Err(error) => error,
    }
}

/// Where one attempt goes, decided from one snapshot.
struct Decision {
    way: Way,
    source: Arc<Workload>,
    service: Option<crate::id::ObjectName>,
    load: Option<LoadGuard>,
}

enum Way {
    /// Unchanged: unknown to the mesh, or known but not in it.
    Plain(SocketAddr, Option<Arc<Workload>>),
    /// A pod of this node.
    Local(SocketAddr, Arc<Workload>),
    /// A pod of another node.
    Tunnel(SocketAddr, Arc<Workload>),
}

impl Decision {
    fn to(&self) -> SocketAddr {
        match &self.way {
            Way::Plain(to, _) | Way::Local(to, _) | Way::Tunnel(to, _) => *to,
        }
    }
}

fn decide(proxy: &Proxy, pod: &ServedPod, client: SocketAddr, original: SocketAddr, tried: &[SocketAddr]) -> Result<Decision, Failure> {
    let snapshot = proxy.config.load();
    let source = snapshot.workload(&pod.uid).ok_or(Failure::UnknownWorkload)?.clone();
    let (to, service, load) = match snapshot.resolve(original) {
        Target::Service { service, port } => {
            let asker = Asker { client: client_address(pod, client, original), node: &snapshot.mesh.node, dice: fastrand::u64(..), tried };
            let endpoint = balance::pick(service, port, &asker).ok_or_else(|| Failure::NoEndpoint(service.name.clone()))?;
            (endpoint.address, Some(service.name.clone()), Some(endpoint.load.begin()))
        }
        Target::NoSuchPort(service) => return Err(Failure::NoSuchPort { service: service.name.clone(), port: original.port() }),
        Target::Unknown if snapshot.mesh.outbound == OutboundPolicy::RegistryOnly => return Err(Failure::NotInRegistry(original)),
        Target::Workload(_) | Target::Unknown => (original, None, None),
    };
    Ok(Decision { way: way(&snapshot, to)?, source, service, load })
}

fn way(snapshot: &Snapshot, to: SocketAddr) -> Result<Way, Failure> {
    let Some(workload) = snapshot.workload_by_ip(to.ip()) else { return Ok(Way::Plain(to, None)) };
    if !workload.enrolled {
        return Ok(Way::Plain(to, Some(workload.clone())));
    }
    if mesh_common::is_reserved_port(to.port()) {
        return Err(Failure::ReservedPort(to.port()));
    }
    let workload = workload.clone();
    Ok(if workload.node == snapshot.mesh.node { Way::Local(to, workload) } else { Way::Tunnel(to, workload) })
}

/// The client as others are to see it: a pod that connected over loopback has its own address.
fn client_address(pod: &ServedPod, client: SocketAddr, like: SocketAddr) -> IpAddr {
    if client.ip().is_loopback() { pod.address_like(like.ip()).unwrap_or(client.ip()) } else { client.ip() }
}

fn describe(outcome: &mut Outcome, decision: &Decision) {
    outcome.source.workload = Some(decision.source.clone());
    outcome.service.clone_from(&decision.service);
    let known = |w: &Arc<Workload>| (Some(w.clone()), Some(w.identity.clone()));
    let (workload, identity) = match &decision.way {
        Way::Plain(_, workload) => (workload.clone(), None),
        Way::Local(_, workload) | Way::Tunnel(_, workload) => known(workload),
    };
    outcome.source.identity = identity.as_ref().map(|_| decision.source.identity.clone());
    outcome.destination = Party { address: Some(decision.to()), identity, workload };
    outcome.tunnel = matches!(decision.way, Way::Tunnel(..)).then(|| hbone_address(decision.to()));
}

fn hbone_address(to: SocketAddr) -> SocketAddr {
    SocketAddr::new(to.ip(), mesh_common::HBONE_PORT)
}

async fn dial(
    proxy: &Arc<Proxy>,
    pod: &Arc<ServedPod>,
    client: SocketAddr,
    decision: Decision,
    _outcome: &Outcome,
) -> Result<Upstream, Failure> {
    let Decision { way, source, service, load } = decision;
    let stream = match way {
        Way::Plain(to, _) => Stream::Tcp(connect(pod, to).await?),
        Way::Local(to, workload) => Stream::Local(Box::new(hand_over(proxy, pod, client, to, &source, &workload).await?)),
        Way::Tunnel(to, workload) => {
            let forwarded = Forwarded {
                client: SocketAddr::new(client_address(pod, client, to), client.port()),
                host: service.map(|s| format!("{}.{}.svc.cluster.local", s.name, s.namespace)),
            };
            Stream::Tunnel(Box::new(open_tunnel(proxy, pod, to, &source, &workload, &forwarded).await?))
        }
    };
    Ok(Upstream { stream, _load: load })
}

async fn connect(pod: &ServedPod, to: SocketAddr) -> Result<TcpStream, Failure> {
    let connected = timeout(CONNECT_TIMEOUT, socket::connect(&pod.netns, to, Source::Own)).await;
    connected.map_err(|_| Failure::DialTimeout(to))?.map_err(|source| Failure::Dial { to, source })
}

/// Same node: the destination's inbound stage is called with the identity the kernel vouches for.
async fn hand_over(
    proxy: &Arc<Proxy>,
    pod: &ServedPod,
    client: SocketAddr,
    to: SocketAddr,
    source: &Workload,
    workload: &Workload,
) -> Result<Local, Failure> {
    let destination = proxy.pods.by_uid(&workload.uid).ok_or(Failure::NotServedYet)?;
    let mut outcome = Outcome::new(&proxy.metrics, Direction::Inbound);
    let client_ip = client_address(pod, client, to);
    outcome.source.address = Some(SocketAddr::new(client_ip, client.port()));
    let facts = Facts { peer: Some(source.identity.clone()), source: client_ip, destination: to };
    match inbound::admit(proxy, &destination, facts, &mut outcome).await {
        Ok(admitted) => Ok(Local { admitted, pod: destination, outcome }),
        Err(failure) => {
            let told = mirrored(&failure);
            outcome.fail(failure);
            Err(told)
        }
    }
}

/// What the source side says of a refusal by the destination side, as it would of a refusal from another node.
fn mirrored(failure: &Failure) -> Failure {
    let status = match failure {
        Failure::Denied(_) => http::StatusCode::UNAUTHORIZED,
        Failure::UnknownWorkload => return Failure::UnknownWorkload,
        _ => http::StatusCode::SERVICE_UNAVAILABLE,
    };
    Failure::Tunnel(TunnelError::Refused(status))
}

/// Another node: a CONNECT stream on a pooled connection between these two workloads.
async fn open_tunnel(
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
    let carried = baggage([
        ("k8s.namespace.name", Some(&*source.name.namespace)),
        ("k8s.pod.name", Some(&*source.name.name)),
        ("service.name", source.canonical_service()),
        ("service.version", source.canonical_revision()),
    ]);
    let request = || build(&Authority::Address(to), forwarded, &carried, trace).map_err(|e| Failure::Broken(io::Error::other(e)));
    let connect = || dial_hbone(proxy.clone(), pod.clone(), key.clone());
    let opened = timeout_at(Instant::now() + TUNNEL_TIMEOUT, proxy.pool.open(&key, request, connect)).await;
    opened.unwrap_or(Err(Failure::Tunnel(TunnelError::Timeout)))
}

async fn dial_hbone(proxy: Arc<Proxy>, pod: Arc<ServedPod>, key: PoolKey) -> Result<Connection, Failure> {
    let credentials = proxy.identity.credentials(&key.source).await.map_err(Failure::Identity)?;
    let stream = connect(&pod, key.address).await.map_err(|failure| match failure {
        Failure::Dial { to, source } => Failure::DialPeer { to, source },
        other => other,
    })?;
    let handshake = timeout(CONNECT_TIMEOUT, tls::connect(&credentials, key.destination.clone(), stream)).await;
    let stream = handshake.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(|source| {
        let kind = HandshakeFailure::of(&source);
        proxy.metrics.handshake_failure("client", kind.reason());
        Failure::Tls { kind, source }
    })?;
    Ok(Connection::handshake(stream).await?)
}
