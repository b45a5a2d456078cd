//! Into a pod: every way in ends in [`admit`], which is where policy is enforced on connections, and from there, where
//! policy asks about requests, in [`inspect`].
//!
//! HBONE from other nodes, plaintext steered here by the pod's `sk_lookup` program, and connections of pods of this node,
//! handed over in process with the identity the kernel vouches for.

mod inspect;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use http::StatusCode;
pub use inspect::{Inspection, refuse, server_first};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::{
    CONNECT_TIMEOUT, Failure, Proxy, ServedPod,
    http::{gate, transport::Transport},
    limits::Place,
    live::{Carries, Cut, Registration},
    outcome::{Direction, Outcome, Party},
    pods::Stage,
};
use crate::{
    config::{DestinationRequests, Snapshot},
    detect::Protocol,
    hbone::{
        HANDSHAKE_TIMEOUT, SERVER_MAX_STREAMS,
        headers::{Authority, BadRequest, ConnectRequest},
        server::{self, Offer},
    },
    id::{ObjectName, SpiffeId, canonical},
    io::{
        relay::relay,
        socket::{self, Source, reset_on_close},
    },
    policy::{Facts, Permit, Verdict},
    route::Workload,
    spawn,
    tls::{self, HandshakeFailure, ServerStream},
};

/// How long a peer may take to say anything.
const FIRST_WORD: Duration = Duration::from_secs(5);
/// As much of a first word as is waited for, bytes: more than a hello with keys of any kind in use.
const LONGEST_WORD: usize = 4096;

/// A connection that was let in: the application's end of it, and the reason to end it early.
#[derive(Debug)]
pub struct Admitted {
    pub application: TcpStream,
    pub registration: Registration,
    pub facts: Facts,
    /// Not all of what is sent on it may pass: it has to be looked into.
    pub per_request: bool,
}

/// Authorizes a connection into `pod` and connects to the application as `source`, which has the client's address.
pub async fn admit(proxy: &Proxy, pod: &ServedPod, mut facts: Facts, source: Source, outcome: &mut Outcome) -> Result<Admitted, Failure> {
    let to = facts.destination;
    if mesh_common::is_reserved_port(to.port()) {
        return Err(Failure::ReservedPort(to.port()));
    }
    let client = facts.source;
    facts.via_trusted_proxy = proxy.config.load().mesh.is_trusted_proxy(facts.peer.as_ref(), client);
    let mut registration = proxy.live.register(pod.uid.clone(), facts.clone());
    let (verdict, looked_into) = {
        let snapshot = proxy.config.load();
        let workload = snapshot.workload(&pod.uid).ok_or(Failure::UnknownWorkload)?;
        describe(outcome, &snapshot, workload, &facts);
        let looked_into =
            snapshot.mesh.destination_requests == DestinationRequests::Declared && workload.carries_http(to.port(), facts.dialled.as_ref());
        let verdict = workload.policy.connection(&facts).inspect_err(|denial| {
            // A client that speaks HTTP is told about each of its requests, and they are counted instead.
            proxy.metrics.policy_decision(denial.policy(), "connection_denied");
        })?;
        // Of what carries no requests it is known now; the application need not hear of it.
        if matches!(verdict, Verdict::PerRequest(_)) && is_opaque(workload, &facts) {
            workload.policy.opaque(&facts, &[]).inspect_err(|denial| {
                proxy.metrics.policy_decision(denial.policy(), "connection_denied");
            })?;
        }
        if matches!(verdict, Verdict::Allowed(_)) {
            gate::observe(proxy, &facts, &workload.policy.at(to.port()).observed(&facts, None), None);
        }
        (verdict, looked_into)
    };
    let (permit, per_request) = match verdict {
        Verdict::Allowed(permit) => (permit, looked_into),
        Verdict::PerRequest(permit) => (permit, true),
    };
    if !per_request {
        registration.note().carries(Carries::Unknown);
        // A change of policy after the verdict and before this may have gone unseen.
        let snapshot = proxy.config.load();
        let workload = snapshot.workload(&pod.uid).ok_or(Failure::UnknownWorkload)?;
        if !workload.policy.allows_uninspected(&facts) {
            return Err(Failure::Cut(Cut::PolicyChanged));
        }
    }
    let application = connect_application(pod, to, source, &permit).await?;
    registration.hold(proxy.accelerate(pod, &application));
    Ok(Admitted { application, registration, facts, per_request })
}

/// Whether it is declared that a connection carries no requests, and nothing but policies is asked about it.
fn is_opaque(workload: &Workload, facts: &Facts) -> bool {
    let port = facts.destination.port();
    let governing = workload.policy.at(port);
    workload.protocol(port) == Protocol::Tcp && !governing.authorization.asks_sni && governing.connection_authorizers(facts).is_empty()
}

fn describe(outcome: &mut Outcome, snapshot: &Snapshot, workload: &Arc<Workload>, facts: &Facts) {
    outcome.destination =
        Party { address: Some(facts.destination), identity: Some(workload.identity.clone()), workload: Some(workload.clone()) };
    outcome.source.identity.clone_from(&facts.peer);
    outcome.source.workload = snapshot.workload_by_ip(facts.source).cloned();
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

async fn connect_application(pod: &ServedPod, to: SocketAddr, source: Source, _permit: &Permit) -> Result<TcpStream, Failure> {
    // A link-local address means nothing without its link.
    let unlike = |client: IpAddr| client.is_ipv4() != to.is_ipv4() || is_link_local(client);
    let source = if source.client().is_some_and(unlike) { Source::Own } else { source };
    match timeout(CONNECT_TIMEOUT, socket::connect_locally(&pod.netns, to, source)).await {
        Ok(connected) => connected.map_err(|source| Failure::Application { to, source }),
        Err(_) => Err(Failure::Application { to, source: io::ErrorKind::TimedOut.into() }),
    }
}

/// A plaintext connection from outside the mesh, as accepted on the inbound listener.
pub async fn serve_plaintext(proxy: Arc<Proxy>, pod: Arc<ServedPod>, downstream: TcpStream, client: SocketAddr, since: Stage) {
    // The steered socket's own address is the original destination.
    match downstream.local_addr() {
        Ok(destination) => serve_steered(proxy, pod, downstream, client, destination, since).await,
        Err(error) => tracing::debug!(target: "proxy", %client, %error, "the client is gone"),
    }
}

/// A plaintext connection that was meant for `destination`.
pub async fn serve_steered(
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    downstream: TcpStream,
    client: SocketAddr,
    destination: SocketAddr,
    since: Stage,
) {
    let mut outcome = Outcome::new(&proxy, Direction::Inbound);
    outcome.source.address = Some(client);
    let scoped = is_link_local(destination.ip());
    let destination = if scoped { destination } else { SocketAddr::new(canonical(destination.ip()), destination.port()) };
    outcome.destination.address = Some(destination);
    outcome.destination.workload = proxy.config.load().workload(&pod.uid).cloned();
    let result = plaintext(&proxy, &pod, downstream, (client, since), destination, &mut outcome).await;
    if let Err(failure) = result {
        outcome.fail(failure);
    }
}

async fn plaintext(
    proxy: &Arc<Proxy>,
    pod: &Arc<ServedPod>,
    downstream: TcpStream,
    (client, since): (SocketAddr, Stage),
    destination: SocketAddr,
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    let mut facts = Facts::new(None, client.ip(), destination);
    facts.from_node = is_probe(proxy, pod, client, destination);
    let admitted = match admit(proxy, pod, facts.clone(), Source::Outsider(client.ip()), outcome).await {
        Ok(admitted) => admitted,
        Err(failure) => {
            if matches!(failure, Failure::Denied(_)) {
                // A client that speaks HTTP is told in HTTP.
                refuse(proxy, pod, facts, downstream, client, &outcome.requests).await;
            } else {
                reset_on_close(&downstream);
            }
            return Err(failure);
        }
    };
    outcome.opened();
    let traffic = outcome.traffic.clone();
    if admitted.per_request {
        let (requests, sni) = (outcome.requests.clone(), outcome.sni.clone());
        let inspection = Inspection { proxy, pod, admitted, client, since, traffic, requests, sni, introduction: None };
        return inspection.run(Transport::Tcp(downstream), std::future::pending()).await;
    }
    let mut registration = admitted.registration;
    Ok(relay(downstream, admitted.application, &traffic, cut(&mut registration, pod)).await?)
}

/// Whether a connection is a probe or hook of the pod: from the node itself, to a port the pod names for that. The kubelet can
/// be made to dial anything by whoever writes a probe; only what a pod says of itself counts.
fn is_probe(proxy: &Proxy, pod: &ServedPod, client: SocketAddr, destination: SocketAddr) -> bool {
    let snapshot = proxy.config.load();
    let named = snapshot.workload(&pod.uid).is_some_and(|w| w.probes.contains(&destination.port()));
    named && pod.is_from_node(client, destination)
}

/// Completes when policy or the end of the pod wants the connection ended.
pub async fn cut(registration: &mut Registration, pod: &ServedPod) -> Cut {
    tokio::select! {
        biased;
        reason = registration.cut() => reason,
        reason = pod.ended() => reason,
    }
}

/// An HBONE connection, as accepted on the HBONE listener.
/// `caller` is given back when the TLS handshake is over.
pub async fn serve_hbone(proxy: Arc<Proxy>, pod: Arc<ServedPod>, stream: TcpStream, client: SocketAddr, caller: Place, since: Stage) {
    let local = match stream.local_addr() {
        Ok(local) => SocketAddr::new(canonical(local.ip()), local.port()),
        Err(_) => return,
    };
    let begun = Instant::now();
    let (stream, peer, revoked) = match accept_tls(&proxy, &pod, stream, client).await {
        Ok(accepted) => accepted,
        Err(failure) => return refused_handshake(&proxy, (client, local), begun, failure),
    };
    drop(caller);
    let _counted = Counted::begin(proxy.metrics.hbone_connections.clone());
    let asked = Arc::new(Semaphore::new(SERVER_MAX_STREAMS as usize));
    let is_revoked = Arc::<AtomicBool>::default();
    let connection = HboneConnection {
        proxy: proxy.clone(),
        pod: pod.clone(),
        peer: peer.clone(),
        client,
        since,
        local,
        asked,
        revoked: is_revoked.clone(),
    };
    let serving = server::serve(stream, |offer| drop(spawn::large(serve_offer(connection.clone(), offer))), pod.draining(since));
    let revoked = async {
        revoked.await;
        // Before anything breaks of it.
        is_revoked.store(true, Ordering::Release);
    };
    tokio::select! {
        result = serving => if let Err(error) = result {
            tracing::debug!(target: "proxy", %client, %error, "HBONE connection ended");
        },
        _ = pod.ended() => {}
        () = revoked => {
            tracing::info!(target: "proxy", %client, %peer, "the peer's certificate has been revoked; its connection is cut");
            proxy.metrics.handshake_failure("server", "revoked_later");
        }
    }
}

/// Counts an HBONE connection while it is open.
struct Counted(Gauge);

impl Counted {
    fn begin(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn refused_handshake(proxy: &Arc<Proxy>, (client, local): (SocketAddr, SocketAddr), begun: Instant, failure: Failure) {
    if let Failure::Tls { kind, .. } = &failure {
        proxy.metrics.handshake_failure("server", kind.reason());
    }
    let mut outcome = Outcome::since(proxy, Direction::Inbound, begun);
    outcome.source.address = Some(client);
    outcome.tunnel = Some(local);
    outcome.fail(failure);
}

/// Shakes hands; also returns who it is, and what completes when that is revoked.
async fn accept_tls(
    proxy: &Proxy,
    pod: &ServedPod,
    stream: TcpStream,
    client: SocketAddr,
) -> Result<(ServerStream<TcpStream>, SpiffeId, impl Future<Output = ()>), Failure> {
    let identity = proxy.config.load().workload(&pod.uid).map(|w| w.identity.clone()).ok_or(Failure::UnknownWorkload)?;
    let credentials = timeout(HANDSHAKE_TIMEOUT, proxy.identity.credentials(&identity)).await;
    let credentials = credentials.unwrap_or_else(|_| Err("it took too long".into())).map_err(Failure::Identity)?;
    let accepted = async {
        // Who has not said all of its first word takes nobody's place.
        timeout(FIRST_WORD, first_word(&stream)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        let handshake = timeout(HANDSHAKE_TIMEOUT, pod.handshake(client.ip())).await.map_err(|_| io::ErrorKind::TimedOut)?;
        let accepted = timeout(HANDSHAKE_TIMEOUT, tls::accept(&credentials, stream)).await;
        drop(handshake);
        accepted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    };
    let accepted: io::Result<_> = accepted.await;
    let (stream, peer) = accepted.map_err(|source| Failure::Tls { kind: HandshakeFailure::of(&source), source })?;
    Ok((stream, peer.identity, credentials.trust().clone().revoked(peer.chain)))
}

/// Waits until the first record of TLS is there as a whole, or as much of it as is looked at; or something that is none.
async fn first_word(stream: &TcpStream) -> io::Result<()> {
    const HEADER: usize = 5;
    const HANDSHAKE: u8 = 22;
    // RFC 8446 section 5.1, and some more as libraries have it: who says more means no TLS.
    const MAX_RECORD: usize = 16_640;
    let mut seen = vec![0; LONGEST_WORD];
    let mut wait = Duration::from_millis(1);
    loop {
        let n = stream.peek(&mut seen).await?;
        let whole = match seen.first_chunk() {
            Some([HANDSHAKE, _, _, high, low]) if n >= HEADER => HEADER + usize::from(u16::from_be_bytes([*high, *low])),
            Some([HANDSHAKE, ..]) if (1..HEADER).contains(&n) => HEADER,
            _ => return Ok(()),
        };
        let ended = stream.ready(tokio::io::Interest::READABLE).await?.is_read_closed();
        if ended || whole > HEADER + MAX_RECORD || n >= whole.min(LONGEST_WORD) {
            return Ok(());
        }
        // The kernel says at once that there is something, and not when there is more.
        sleep(wait).await;
        wait = (wait * 2).min(Duration::from_millis(100));
    }
}

#[derive(Clone)]
struct HboneConnection {
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    peer: SpiffeId,
    client: SocketAddr,
    since: Stage,
    local: SocketAddr,
    /// Room for what is asked for and not answered yet: who asks and takes it back does not have the node dial without end.
    asked: Arc<Semaphore>,
    /// What breaks from now on does because the peer's certificate has been revoked.
    revoked: Arc<AtomicBool>,
}

impl HboneConnection {
    fn ended(&self, failure: Failure) -> Failure {
        if self.revoked.load(Ordering::Acquire) { Failure::Cut(Cut::Revoked) } else { failure }
    }
}

async fn serve_offer(connection: HboneConnection, offer: Offer) {
    let Offer { request, answer: mut offer, place: _place } = offer;
    let Ok(asked) = connection.asked.clone().try_acquire_owned() else {
        connection.proxy.metrics.failure("inbound", "too_many_streams");
        return offer.turn_away();
    };
    let mut outcome = Outcome::new(&connection.proxy, Direction::Inbound);
    outcome.source = Party { address: Some(connection.client), identity: Some(connection.peer.clone()), workload: None };
    outcome.tunnel = Some(connection.local);
    outcome.destination.workload = connection.proxy.config.load().workload(&connection.pod.uid).cloned();
    let Some(_slot) = connection.proxy.connection(&connection.pod) else {
        offer.refuse(StatusCode::SERVICE_UNAVAILABLE);
        return outcome.fail(Failure::TooManyConnections);
    };
    let answered = tokio::select! {
        biased;
        answered = answer(&connection, request, &mut outcome) => Some(answered),
        () = offer.unwanted() => None,
    };
    drop(asked);
    let admitted = match answered {
        None => return outcome.fail(Failure::Broken(io::ErrorKind::ConnectionReset.into())),
        Some(Ok(admitted)) => admitted,
        Some(Err(failure)) => {
            offer.refuse(status(&failure));
            return outcome.fail(failure);
        }
    };
    let tunnel = match offer.accept() {
        Ok(tunnel) => tunnel,
        Err(error) => {
            reset_on_close(&admitted.application);
            return outcome.fail(Failure::Broken(io::Error::other(error)));
        }
    };
    outcome.opened();
    let traffic = outcome.traffic.clone();
    if admitted.per_request {
        let HboneConnection { proxy, pod, client, since, .. } = &connection;
        let Outcome { requests, sni, introduction, .. } = &outcome;
        let (requests, sni, introduction) = (requests.clone(), sni.clone(), introduction.clone());
        let inspection = Inspection { proxy, pod, admitted, client: *client, since: *since, traffic, requests, sni, introduction };
        if let Err(failure) = inspection.run(Transport::Tunnel(Box::new(tunnel)), std::future::pending()).await {
            outcome.fail(connection.ended(failure));
        }
        return;
    }
    let mut registration = admitted.registration;
    if let Err(broken) = relay(tunnel, admitted.application, &traffic, cut(&mut registration, &connection.pod)).await {
        outcome.fail(connection.ended(broken.into()));
    }
}

async fn answer(
    connection: &HboneConnection,
    request: Result<ConnectRequest, BadRequest>,
    outcome: &mut Outcome,
) -> Result<Admitted, Failure> {
    let request = request.map_err(Failure::BadRequest)?;
    let destination = destination(connection, &request)?;
    outcome.destination.address = Some(destination);
    outcome.introduction = request.introduction;
    let mut facts = Facts::new(Some(connection.peer.clone()), connection.client.ip(), destination);
    let named = match &request.authority {
        Authority::Host { name, .. } => Some(&**name),
        Authority::Address(_) => None,
    };
    facts.dialled = request.host.as_deref().or(named).and_then(ObjectName::from_fqdn);
    outcome.dialled.clone_from(&facts.dialled);
    admit(&connection.proxy, &connection.pod, facts, Source::Client(connection.client.ip()), outcome).await
}

/// The application's address: it must be of the pod the connection came to.
fn destination(connection: &HboneConnection, request: &ConnectRequest) -> Result<SocketAddr, Failure> {
    let own = |address: SocketAddr| address.ip() == connection.local.ip();
    match &request.authority {
        Authority::Address(address) if own(*address) => Ok(*address),
        authority @ Authority::Address(_) => Err(Failure::ForeignAuthority(authority.to_string())),
        Authority::Host { name, port } => {
            let snapshot = connection.proxy.config.load();
            let found = endpoint_here(&snapshot, name, *port, own);
            found.ok_or_else(|| Failure::UnknownHost(format!("{name}:{port}")))
        }
    }
}

/// The endpoint of a service, by its cluster name, that is this pod.
fn endpoint_here(snapshot: &Snapshot, host: &str, port: u16, own: impl Fn(SocketAddr) -> bool) -> Option<SocketAddr> {
    let service = snapshot.service(&ObjectName::from_fqdn(host)?)?;
    service.port(port)?.cluster.endpoints.iter().map(|e| e.address).find(|a| own(*a))
}

/// The answer to a CONNECT that cannot be served, as ztunnel gives it.
fn status(failure: &Failure) -> StatusCode {
    match failure {
        Failure::BadRequest(_) | Failure::ForeignAuthority(_) => StatusCode::BAD_REQUEST,
        Failure::Denied(_) => StatusCode::UNAUTHORIZED,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}
