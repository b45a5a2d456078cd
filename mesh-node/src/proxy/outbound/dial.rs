//! One connection to a destination, however it is reached.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::{
    Opaque, Stream, Way,
    decision::{client_address, is_meant, way},
    pause, tunnel,
};
use crate::{
    hbone::{TunnelError, headers::Forwarded},
    id::ObjectName,
    io::socket::{self, Source},
    policy::Facts,
    proxy::{
        CONNECT_TIMEOUT, Failure, Proxy, ServedPod, inbound,
        outbound::Local,
        outcome::{Direction, Outcome},
    },
    route::{Cluster, Workload},
};

/// One connection to be made.
pub struct Dial<'d> {
    pub proxy: &'d Arc<Proxy>,
    pub pod: &'d Arc<ServedPod>,
    pub client: SocketAddr,
    pub to: SocketAddr,
    /// The destination, if it is a service's.
    pub cluster: Option<&'d Cluster>,
    /// How long to go on while the destination's node may still be enrolling it.
    pub patience: Duration,
    /// As configured; none is what suits the way.
    pub timeout: Option<Duration>,
}

impl<'d> Dial<'d> {
    pub(super) fn new(opaque: &'d Opaque, to: SocketAddr, cluster: Option<&'d Cluster>) -> Self {
        let Opaque { proxy, pod, client, .. } = opaque;
        let timeout = cluster.and_then(|c| c.policy.tcp.connect_timeout);
        Self { proxy, pod, client: *client, to, cluster, patience: Duration::ZERO, timeout }
    }

    /// Connects to `to`, however it is reached, and says which of its addresses took it; again while that may help and patience lasts.
    pub async fn connect(&self) -> Result<(Stream, SocketAddr), Failure> {
        let deadline = Instant::now() + self.patience;
        let mut dials = 0;
        loop {
            let (way, source) = {
                let snapshot = self.proxy.config.load();
                let source = snapshot.workload(&self.pod.uid).ok_or(Failure::UnknownWorkload)?.clone();
                (way(&snapshot, self.to)?, source)
            };
            match self.go(way, &source).await {
                Err(failure) if failure.retryable() && Instant::now() < deadline => sleep(pause(dials)).await,
                other => return other,
            }
            dials += 1;
        }
    }

    /// In one way; where nobody listens at the endpoint's address of one family, and it has one of the other, there: the address that took it.
    pub(super) async fn go(&self, way: Way, source: &Arc<Workload>) -> Result<(Stream, SocketAddr), Failure> {
        // Looked up beforehand for a dial within the node only: that one has to keep quiet if the other family will be tried.
        let other = if matches!(way, Way::Local(..)) { self.otherwise() } else { None };
        let to = way.to();
        let failure = match self.go_once(way, source, other.is_some()).await {
            Ok(stream) => return Ok((stream, to)),
            Err(failure) if failure.is_refusal() => failure,
            Err(failure) => return Err(failure),
        };
        let Some(way) = other.or_else(|| self.otherwise()) else { return Err(failure) };
        tracing::debug!(target: "proxy", to = %self.to, %failure, "asking its other address");
        let to = way.to();
        // Of an application that listens nowhere what was asked for says most.
        Box::pin(self.go_once(way, source, false)).await.map(|stream| (stream, to)).map_err(|_| failure)
    }

    /// The way to the address of the other family that the service's endpoint has, where the client has one of that.
    fn otherwise(&self) -> Option<Way> {
        let snapshot = self.proxy.config.load();
        let of_other_family = |ip: &std::net::IpAddr| ip.is_ipv4() != self.to.is_ipv4();
        let ip = *snapshot.workload_by_ip(self.to.ip())?.ips.iter().find(|ip| of_other_family(ip))?;
        let address = SocketAddr::new(ip, self.to.port());
        let is_endpoint = self.cluster?.endpoints.iter().any(|e| e.address == address);
        let reaches = snapshot.workload(&self.pod.uid)?.ips.iter().any(of_other_family);
        if is_endpoint && reaches { way(&snapshot, address).ok() } else { None }
    }

    /// `quietly`: nobody is told if it fails within the node.
    async fn go_once(&self, way: Way, source: &Arc<Workload>, quietly: bool) -> Result<Stream, Failure> {
        let Some(within) = self.timeout else { return self.go_on(way, source, quietly).await };
        let to = self.to;
        // Rare, and large.
        Box::pin(timeout(within, self.go_on(way, source, quietly))).await.unwrap_or(Err(Failure::DialTimeout(to)))
    }

    async fn go_on(&self, way: Way, source: &Arc<Workload>, quietly: bool) -> Result<Stream, Failure> {
        let Self { proxy, pod, client, .. } = self;
        if let Some(cluster) = self.cluster {
            is_meant(cluster, way.workload().map(|w| &**w))?;
        }
        let service = self.cluster.map(|c| &c.id.service);
        Ok(match way {
            Way::Plain(to, _) => Stream::Tcp(connect(pod, to, self.timeout.unwrap_or(CONNECT_TIMEOUT)).await?),
            Way::Local(to, workload) => {
                Stream::Local(Box::new(hand_over(proxy, pod, *client, to, (source, service), &workload, quietly).await?))
            }
            Way::Tunnel(to, workload) => {
                let forwarded = Forwarded {
                    client: SocketAddr::new(client_address(pod, *client, to), client.port()),
                    host: service.map(ObjectName::fqdn),
                };
                Stream::Tunnel(Box::new(tunnel::open(proxy, pod, to, source, &workload, &forwarded).await?))
            }
        })
    }
}

pub(super) async fn connect(pod: &ServedPod, to: SocketAddr, within: Duration) -> Result<TcpStream, Failure> {
    let connected = timeout(within, socket::connect(&pod.netns, to, Source::Own)).await;
    connected.map_err(|_| Failure::DialTimeout(to))?.map_err(|source| Failure::Dial { to, source })
}

/// Same node: the destination's inbound stage is called with the identity the kernel vouches for.
async fn hand_over(
    proxy: &Arc<Proxy>,
    pod: &ServedPod,
    client: SocketAddr,
    to: SocketAddr,
    (source, service): (&Workload, Option<&ObjectName>),
    workload: &Workload,
    quietly: bool,
) -> Result<Local, Failure> {
    let destination = proxy.pods.by_uid(&workload.uid).ok_or(Failure::NotServedYet)?;
    let mut outcome = Outcome::new(proxy, Direction::Inbound);
    let client_ip = client_address(pod, client, to);
    outcome.source.address = Some(SocketAddr::new(client_ip, client.port()));
    let mut facts = Facts::new(Some(source.identity.clone()), client_ip, to);
    facts.dialled = service.cloned();
    outcome.dialled.clone_from(&facts.dialled);
    // Should the client not wait for it, nothing has come of it.
    outcome.keep_quiet(true);
    let admitted = inbound::admit(proxy, &destination, facts, Source::Neighbour(client_ip), &mut outcome).await;
    outcome.keep_quiet(false);
    match admitted {
        Ok(admitted) => Ok(Local { admitted, pod: destination, outcome, client: SocketAddr::new(client_ip, client.port()) }),
        Err(failure) => {
            let told = mirrored(&failure);
            outcome.keep_quiet(quietly && told.is_refusal());
            outcome.fail(failure);
            Err(told)
        }
    }
}

/// What the source side says of a refusal by the destination side, as it would of a refusal from another node.
fn mirrored(failure: &Failure) -> Failure {
    let status = match failure {
        Failure::Denied(_) => ::http::StatusCode::UNAUTHORIZED,
        Failure::UnknownWorkload => return Failure::UnknownWorkload,
        // Nothing is between the two that would not know.
        Failure::Application { to, source } => {
            return Failure::Application { to: *to, source: socket::same_error(source) };
        }
        _ => ::http::StatusCode::SERVICE_UNAVAILABLE,
    };
    Failure::Tunnel(TunnelError::Refused(status))
}
