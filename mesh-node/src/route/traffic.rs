//! How traffic to a destination is balanced, pooled and limited: the `trafficPolicy` of a `DestinationRule`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::matching::Matched;

/// Envoy's and Istio's defaults unless a `DestinationRule` says otherwise.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrafficPolicy {
    pub balancer: Balancer,
    pub warmup: Option<Warmup>,
    pub locality: Locality,
    pub tcp: TcpPool,
    pub http: HttpPool,
    pub outlier: Option<Outlier>,
    pub retry_budget: Option<RetryBudget>,
    /// `subjectAltNames`: the identities one of which whoever is reached has to have; empty where it is not said.
    pub names: std::sync::Arc<[std::sync::Arc<str>]>,
}

/// What holds where no `DestinationRule` says otherwise: Istio's `MeshConfig`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrafficDefaults {
    pub connect_timeout: Option<Duration>,
    pub keepalive: Option<Keepalive>,
    pub locality: Option<Locality>,
}

impl TrafficPolicy {
    /// Whether connections are made, shared and kept by the same settings.
    pub fn has_pools_of(&self, other: &Self) -> bool {
        std::ptr::eq(self, other) || self.tcp == other.tcp && self.http == other.http
    }

    /// Has the mesh's say where this says nothing. `located`: the destination itself says which of its endpoints are preferred.
    pub fn fill(&mut self, defaults: &TrafficDefaults, located: bool) {
        self.tcp.connect_timeout = self.tcp.connect_timeout.or(defaults.connect_timeout);
        self.tcp.keepalive = match (self.tcp.keepalive, defaults.keepalive) {
            // Field by field, as Istio does.
            (Some(own), Some(mesh)) => Some(Keepalive {
                probes: own.probes.or(mesh.probes),
                time: own.time.or(mesh.time),
                interval: own.interval.or(mesh.interval),
            }),
            (own, mesh) => own.or(mesh),
        };
        if !self.locality.given
            && !located
            && let Some(locality) = &defaults.locality
        {
            self.locality = locality.clone();
        }
    }
}

#[derive(Debug, Clone, PartialEq, Default)]
pub enum Balancer {
    /// None is named: the less busy of two picked at random, as Istio has it, unless the Service has an affinity.
    #[default]
    Unset,
    /// By the client's address: the affinity of a Service.
    ClientIp,
    LeastRequest,
    RoundRobin,
    Random,
    /// To the address the client dialled.
    Passthrough,
    Hash {
        key: HashKey,
        table: HashTable,
    },
}

/// What of a request is hashed. Without it, an endpoint is picked at random.
#[derive(Debug, Clone, PartialEq)]
pub enum HashKey {
    Header(Matched),
    /// With a life, a client without the cookie is given one.
    Cookie {
        name: Arc<str>,
        ttl: Option<Duration>,
        /// Its path, and what else is said with it.
        attributes: Arc<str>,
    },
    SourceIp,
    Query(Arc<str>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HashTable {
    Ring {
        minimum: u64,
    },
    /// The number of entries, a prime.
    Maglev {
        size: u64,
    },
}

impl HashTable {
    /// What Envoy gives a ring that says nothing.
    pub const RING: Self = Self::Ring { minimum: 1024 };
    /// The same of Maglev.
    pub const MAGLEV: Self = Self::Maglev { size: 65_537 };

    /// One of this kind that says nothing of its size.
    pub fn usual(self) -> Self {
        match self {
            Self::Ring { .. } => Self::RING,
            Self::Maglev { .. } => Self::MAGLEV,
        }
    }
}

/// A new endpoint gets its share of requests by and by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warmup {
    pub duration: Duration,
    /// The least share, percent.
    pub minimum: f64,
    pub aggression: f64,
}

impl Warmup {
    /// The share of its full weight an endpoint of this age gets: 0 to 1.
    pub fn share(&self, age: Duration) -> f64 {
        if age >= self.duration {
            return 1.0;
        }
        let progress = age.as_secs_f64().max(0.001) / self.duration.as_secs_f64();
        progress.powf(1.0 / self.aggression.max(0.01)).max(self.minimum / 100.0).min(1.0)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Locality {
    /// Somebody has said something of it, if only that it is as it would be.
    pub given: bool,
    pub enabled: bool,
    pub distribute: Vec<Distribute>,
    /// From region to region.
    pub failover: BTreeMap<Arc<str>, Arc<str>>,
    /// Labels, or `label=value`, in order of importance.
    pub failover_priority: Vec<Arc<str>>,
}

impl Default for Locality {
    fn default() -> Self {
        Self { given: false, enabled: true, distribute: Vec::new(), failover: BTreeMap::new(), failover_priority: Vec::new() }
    }
}

/// From clients of one locality to localities by weight. Localities are `region/zone/subzone`, `*` for any.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribute {
    pub from: Arc<str>,
    pub to: Vec<(Arc<str>, u32)>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct TcpPool {
    /// For each source pod, as a sidecar would count.
    pub max_connections: Option<u32>,
    /// Until an endpoint has taken a connection, however it is reached.
    pub connect_timeout: Option<Duration>,
    pub keepalive: Option<Keepalive>,
    pub max_connection_duration: Option<Duration>,
    /// Without traffic; for connections that are not HTTP. `None`: no bound.
    pub idle_timeout: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    pub probes: Option<u32>,
    pub time: Option<Duration>,
    pub interval: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct HttpPool {
    /// Requests that wait for a connection.
    pub max_pending: Option<u32>,
    /// Requests under way, whatever the protocol.
    pub max_requests: Option<u32>,
    pub max_requests_per_connection: Option<u32>,
    /// Retries under way.
    pub max_retries: Option<u32>,
    /// How long an unused connection is kept.
    pub idle_timeout: Duration,
    pub upgrade: Upgrade,
    pub max_streams: Option<u32>,
}

impl Default for HttpPool {
    fn default() -> Self {
        Self {
            max_pending: None,
            max_requests: None,
            max_requests_per_connection: None,
            max_retries: None,
            idle_timeout: Duration::from_hours(1),
            upgrade: Upgrade::Default,
            max_streams: None,
        }
    }
}

/// Which protocol is spoken to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Upgrade {
    /// The one the port declares; undeclared, the client's.
    #[default]
    Default,
    /// HTTP/2, whatever the client speaks.
    Always,
    /// The client's.
    Client,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryBudget {
    /// Share of the requests under way that may be retries, percent.
    pub percent: f64,
    pub minimum: u32,
}

/// Outlier detection. Zero in a count switches it off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlier {
    pub consecutive_5xx: u32,
    pub consecutive_gateway: u32,
    /// Failures of the connection itself are counted apart.
    pub split_local: bool,
    pub consecutive_local: u32,
    pub interval: Duration,
    pub base_ejection: Duration,
    pub max_ejection_percent: u32,
    /// Below this share of healthy endpoints all are used, percent.
    pub min_health_percent: u32,
}

impl Default for Outlier {
    fn default() -> Self {
        Self {
            consecutive_5xx: 5,
            consecutive_gateway: 0,
            split_local: false,
            consecutive_local: 5,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection_percent: 10,
            min_health_percent: 0,
        }
    }
}
