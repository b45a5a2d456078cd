//! The data path: connections of this node's pods, from `accept` to the last byte.
//!
//! [`outbound`] and [`inbound`] read top to bottom in the order things happen. Decisions come from one configuration
//! snapshot each; every connection ends in exactly one [`outcome::Outcome`].

pub mod direct;
pub mod failure;
pub mod http;
pub mod inbound;
pub mod limits;
pub mod live;
pub mod open;
pub mod outbound;
pub mod outcome;
pub mod pods;
pub mod reporting;
mod sniff;
pub mod traces;

use std::{sync::Arc, time::Duration};

pub use direct::Direct;
pub use failure::Failure;
pub use limits::Limits;
pub use live::Live;
pub use pods::{Pods, ServedPod};

use crate::{
    capture::{Offered, Offers, Pair},
    config::Configuration,
    hbone::Pool,
    id::canonical,
    identity::Manager,
    jwks::Jwks,
    spawn,
    telemetry::Metrics,
};

/// How long establishing one connection may take: the TCP connection, and the handshakes on top of it.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What every connection of the node needs; one per process.
pub struct Proxy {
    pub config: Configuration,
    pub identity: Manager,
    pub pool: Pool,
    pub pods: Pods,
    pub live: Live,
    /// Connections that are open.
    pub open: open::OpenConnections,
    pub metrics: Arc<Metrics>,
    pub limits: Limits,
    pub replays: http::Replays,
    pub spans: Arc<traces::Spans>,
    pub jwks: Jwks,
    accelerated: std::sync::OnceLock<Offers>,
    /// The pods whose connections may go directly.
    served: arc_swap::ArcSwap<direct::table::Served>,
}

impl Proxy {
    /// Room for one more connection of a pod.
    pub fn connection(&self, pod: &ServedPod) -> Option<limits::Place> {
        self.limits.connection(&pod.holds, || self.name_of(pod))
    }

    /// A place for a connection that is kept for later requests.
    pub fn kept(&self, pod: &ServedPod) -> Option<limits::Place> {
        let place = self.limits.kept(&pod.holds);
        if place.is_none() {
            self.metrics.overflow("kept_connections");
        }
        place
    }

    /// The same of a request that shares its connection with others.
    pub fn request(&self, pod: &ServedPod) -> Option<limits::Place> {
        let place = self.limits.request(&pod.holds, || self.name_of(pod));
        if place.is_none() {
            self.metrics.overflow("requests_of_pod");
        }
        place
    }

    fn name_of(&self, pod: &ServedPod) -> String {
        self.config.load().workload(&pod.uid).map_or_else(|| pod.uid.to_string(), |workload| workload.name.to_string())
    }

    pub fn new(config: Configuration, identity: Manager, metrics: Arc<Metrics>, limits: Limits) -> Arc<Self> {
        let jwks = Jwks::new(config.clone(), metrics.clone());
        Arc::new(Self {
            jwks,
            config,
            identity,
            pool: Pool::default(),
            pods: Pods::default(),
            live: Live::default(),
            open: open::OpenConnections::default(),
            metrics,
            limits,
            replays: http::Replays::default(),
            spans: Arc::default(),
            accelerated: std::sync::OnceLock::new(),
            served: arc_swap::ArcSwap::default(),
        })
    }

    /// Says where pairs of sockets can be accelerated. To be called once, if at all.
    pub fn accelerate_with(&self, offers: Offers) {
        // A second one would be the same.
        let _ = self.accelerated.set(offers);
    }

    /// What accelerates, if anything does.
    pub fn accelerated(&self) -> Option<&Offers> {
        self.accelerated.get()
    }

    /// Offers the connection between the proxy and an application of a pod to acceleration, for as long as what is returned lives.
    pub fn accelerate(&self, pod: &ServedPod, stream: &tokio::net::TcpStream) -> Option<Offered> {
        let offers = self.accelerated.get()?;
        if !self.config.load().workload(&pod.uid).is_some_and(|w| w.accelerate) {
            self.metrics.acceleration("switched_off");
            return None;
        }
        let plain = |a: std::net::SocketAddr| std::net::SocketAddr::new(canonical(a.ip()), a.port());
        let (local, remote) = (stream.local_addr().ok()?, stream.peer_addr().ok()?);
        Some(offers.offer(Pair::within(&pod.netns, plain(local), plain(remote))))
    }

    /// Re-checks every live connection whenever the configuration changes.
    pub async fn recheck_policies(self: Arc<Self>) {
        let mut config = self.config.clone();
        while config.changed().await {
            let snapshot = config.load();
            let cut = spawn::aside(|| self.live.recheck(&snapshot));
            if cut > 0 {
                tracing::info!(target: "proxy", connections = cut, generation = snapshot.generation, "cut connections a policy change denies");
            }
        }
    }

    /// Closes pooled connections of workloads and services that are gone, and those not needed any more.
    pub async fn tidy_pool(self: Arc<Self>) {
        const TIDY_INTERVAL: Duration = Duration::from_secs(10);
        const SOON: Duration = Duration::from_millis(100);
        let mut config = self.config.clone();
        let mut edges_tidied = std::time::Instant::now();
        loop {
            tokio::select! {
                changed = config.changed() => if !changed { return },
                () = tokio::time::sleep(TIDY_INTERVAL) => {}
                // What its tunnels carry and nobody uses keeps it, and its peer, from ending.
                () = self.pool.left() => tokio::time::sleep(SOON).await,
            }
            let snapshot = config.load().clone();
            self.pool.retain(|uid| snapshot.workload(uid).is_some_and(|w| w.enrolled), |uid| snapshot.workload(uid).is_some());
            let now = std::time::Instant::now();
            if now.duration_since(edges_tidied) >= TIDY_INTERVAL {
                edges_tidied = now;
                let (metrics, cluster) = (&self.metrics, &self.metrics.cluster);
                spawn::aside(|| metrics.traffic.tidy(now, |edge| reporting::is_current(edge, &snapshot, cluster)));
            }
            for pod in self.pods.all() {
                let Some(workload) = snapshot.workload(&pod.uid) else { continue };
                pod.clusters.tidy(now, |id| snapshot.cluster_for(&workload.view, id).cloned());
            }
        }
    }
}
