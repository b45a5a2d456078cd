//! The `trafficPolicy` of a `DestinationRule`, checked, in the blocks that replace each other as a whole.

use std::{sync::Arc, time::Duration};

use super::{Layered, document as doc};
use crate::{
    resource::{
        envelope::FieldError,
        fields::{Time, port, positive},
    },
    route::matching::Matched,
    route::traffic::{
        Balancer, Distribute, HashKey, HashTable, HttpPool, Keepalive, Locality, Outlier, RetryBudget, TcpPool, TrafficPolicy, Upgrade,
        Warmup,
    },
};

type Result<T> = std::result::Result<T, FieldError>;

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Blocks {
    balancer: Option<(Balancer, Option<Warmup>, Locality)>,
    pool: Option<(TcpPool, HttpPool)>,
    outlier: Option<Outlier>,
    retry_budget: Option<RetryBudget>,
    /// Of `tls` the names the destination may have.
    names: Option<Arc<[Arc<str>]>>,
}

impl Blocks {
    /// These blocks where they are, the others elsewhere.
    pub(super) fn over(self, other: Self) -> Self {
        Self {
            balancer: self.balancer.or(other.balancer),
            pool: self.pool.or(other.pool),
            outlier: self.outlier.or(other.outlier),
            retry_budget: self.retry_budget.or(other.retry_budget),
            names: self.names.or(other.names),
        }
    }

    /// These, with the retry budget of others.
    pub(super) fn with_budget_of(self, other: &Self) -> Self {
        Self { retry_budget: other.retry_budget, ..self }
    }

    pub(super) fn into_policy(self) -> TrafficPolicy {
        let (balancer, warmup, locality) = self.balancer.unwrap_or_default();
        let (tcp, http) = self.pool.unwrap_or_default();
        TrafficPolicy {
            balancer,
            warmup,
            locality,
            tcp,
            http,
            outlier: self.outlier,
            retry_budget: self.retry_budget,
            names: self.names.unwrap_or_default(),
        }
    }
}

pub(super) fn layered(document: doc::TrafficPolicy, at: &str) -> Result<Layered> {
    for (given, field) in [(document.tunnel.is_some(), "tunnel"), (document.proxy_protocol.is_some(), "proxyProtocol")] {
        if given {
            return Err(FieldError::new(format!("{at}.{field}"), "is not supported by mesh-node; remove it"));
        }
    }
    let mut layered = Layered {
        blocks: blocks(document.load_balancer, document.connection_pool, document.outlier_detection, document.tls, at)?,
        ..Layered::default()
    };
    layered.blocks.retry_budget = document.retry_budget.map(|b| retry_budget(&b, &format!("{at}.retryBudget"))).transpose()?;
    for (i, settings) in document.port_level_settings.into_iter().enumerate() {
        let at = format!("{at}.portLevelSettings[{i}]");
        let number = settings.port.ok_or_else(|| FieldError::new(format!("{at}.port"), "is missing; name the port's number"))?.number;
        let number = port(number, &format!("{at}.port.number"))?;
        let blocks = blocks(settings.load_balancer, settings.connection_pool, settings.outlier_detection, settings.tls, &at)?;
        if layered.ports.insert(number, blocks).is_some() {
            return Err(FieldError::new(format!("{at}.port.number"), format!("port {number} is listed twice; keep one")));
        }
    }
    Ok(layered)
}

fn blocks(
    balancer: Option<doc::LoadBalancer>,
    pool: Option<doc::ConnectionPool>,
    outlier: Option<doc::Outlier>,
    tls: Option<doc::Tls>,
    at: &str,
) -> Result<Blocks> {
    let names = tls.as_ref().map(|tls| tls.subject_alt_names.iter().map(|name| name.as_str().into()).collect::<Arc<[Arc<str>]>>());
    // Between pods of the mesh the tunnel is mutual TLS whatever is written here.
    let names = match tls.and_then(|t| t.mode).as_deref() {
        Some("ISTIO_MUTUAL") => names,
        None | Some("DISABLE") => names.map(|_| Arc::default()),
        Some("SIMPLE" | "MUTUAL") => {
            let problem = "starting TLS towards the destination is not supported by mesh-node; use ISTIO_MUTUAL or DISABLE";
            return Err(FieldError::new(format!("{at}.tls.mode"), problem));
        }
        Some(other) => {
            return Err(FieldError::new(
                format!("{at}.tls.mode"),
                format!("{other:?} is not one of DISABLE, ISTIO_MUTUAL, SIMPLE, MUTUAL"),
            ));
        }
    };
    Ok(Blocks {
        balancer: balancer.map(|b| load_balancer(&b, &format!("{at}.loadBalancer"))).transpose()?,
        pool: pool.map(|p| connection_pool(&p, &format!("{at}.connectionPool"))).transpose()?,
        outlier: outlier.map(|o| outlier_detection(&o, &format!("{at}.outlierDetection"))).transpose()?,
        retry_budget: None,
        names,
    })
}

fn load_balancer(document: &doc::LoadBalancer, at: &str) -> Result<(Balancer, Option<Warmup>, Locality)> {
    let balancer = match (document.simple.as_deref(), &document.consistent_hash) {
        (Some(_), Some(_)) => return Err(FieldError::new(at, "has simple and consistentHash; keep one")),
        (None, Some(hash)) => consistent_hash(hash, &format!("{at}.consistentHash"))?,
        (None | Some("UNSPECIFIED"), None) => Balancer::Unset,
        (Some("LEAST_REQUEST" | "LEAST_CONN"), None) => Balancer::LeastRequest,
        (Some("ROUND_ROBIN"), None) => Balancer::RoundRobin,
        (Some("RANDOM"), None) => Balancer::Random,
        (Some("PASSTHROUGH"), None) => Balancer::Passthrough,
        (Some(other), None) => {
            let problem = format!("{other:?} is not one of LEAST_REQUEST, ROUND_ROBIN, RANDOM, PASSTHROUGH");
            return Err(FieldError::new(format!("{at}.simple"), problem));
        }
    };
    let warmup = match (&document.warmup, document.warmup_duration_secs) {
        (Some(w), _) => Some(warmup(w, &format!("{at}.warmup"))?),
        (None, Some(duration)) => {
            Some(Warmup { duration: positive(duration, &format!("{at}.warmupDurationSecs"))?, minimum: 10.0, aggression: 1.0 })
        }
        (None, None) => None,
    };
    if warmup.is_some() && !matches!(balancer, Balancer::Unset | Balancer::LeastRequest | Balancer::RoundRobin) {
        return Err(FieldError::new(format!("{at}.warmup"), "works with LEAST_REQUEST and ROUND_ROBIN only"));
    }
    let locality = document.locality_lb_setting.as_ref().map(|l| locality(l, &format!("{at}.localityLbSetting"))).transpose()?;
    Ok((balancer, warmup, locality.unwrap_or_default()))
}

fn warmup(document: &doc::Warmup, at: &str) -> Result<Warmup> {
    let minimum = document.minimum_percent.unwrap_or(10.0);
    if !(0.0..=100.0).contains(&minimum) {
        return Err(FieldError::new(format!("{at}.minimumPercent"), format!("{minimum} is not between 0 and 100")));
    }
    let aggression = document.aggression.unwrap_or(1.0);
    if !(aggression > 0.0 && aggression.is_finite()) {
        return Err(FieldError::new(format!("{at}.aggression"), format!("{aggression} is not greater than 0")));
    }
    Ok(Warmup { duration: positive(document.duration, &format!("{at}.duration"))?, minimum, aggression })
}

fn hash_cookie(document: &doc::Cookie, at: &str) -> Result<HashKey> {
    if document.name.is_empty() {
        return Err(FieldError::new(format!("{at}.name"), "is missing"));
    }
    let path = document.path.as_deref().filter(|p| !p.is_empty());
    let mut attributes = path.map(|p| format!("; Path={p}")).unwrap_or_default();
    for (i, doc::CookieAttribute { name, value }) in document.attributes.iter().enumerate() {
        let legal = |text: &str| text.bytes().all(|b| b.is_ascii_graphic() && b != b';' && b != b',') || text.is_empty();
        if name.is_empty() || !legal(name) || name.contains('=') || !legal(value) {
            return Err(FieldError::new(
                format!("{at}.attributes[{i}]"),
                "is no attribute of a cookie: name it, without blanks, commas and semicolons",
            ));
        }
        attributes += &if value.is_empty() { format!("; {name}") } else { format!("; {name}={value}") };
    }
    Ok(HashKey::Cookie { name: document.name.as_str().into(), ttl: document.ttl.map(|t| t.0), attributes: attributes.into() })
}

fn hash_header(name: &str, at: &str) -> Result<HashKey> {
    let header = Matched::of(name).ok_or_else(|| FieldError::new(at, format!("{name:?} is not a header name")))?;
    Ok(HashKey::Header(header))
}

fn consistent_hash(document: &doc::ConsistentHash, at: &str) -> Result<Balancer> {
    let keys = [
        document.http_header_name.as_deref().map(|n| hash_header(n, &format!("{at}.httpHeaderName"))),
        document.http_cookie.as_ref().map(|c| hash_cookie(c, &format!("{at}.httpCookie"))),
        document.use_source_ip.filter(|u| *u).map(|_| Ok(HashKey::SourceIp)),
        document.http_query_parameter_name.as_deref().map(|n| Ok(HashKey::Query(n.into()))),
    ];
    let mut keys = keys.into_iter().flatten().collect::<Result<Vec<_>>>()?;
    let (Some(key), true) = (keys.pop(), keys.is_empty()) else {
        let problem = "needs exactly one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName";
        return Err(FieldError::new(at, problem));
    };
    let table = match (&document.ring_hash, &document.maglev) {
        (Some(_), Some(_)) => return Err(FieldError::new(at, "has ringHash and maglev; keep one")),
        (None, Some(maglev)) => {
            let size = said(maglev.table_size).unwrap_or(65_537);
            if size > 5_000_011 || !is_prime(size) {
                return Err(FieldError::new(format!("{at}.maglev.tableSize"), format!("{size} is not a prime up to 5000011")));
            }
            HashTable::Maglev { size }
        }
        (ring, None) => {
            let minimum = ring.as_ref().and_then(|r| r.minimum_ring_size).or(document.minimum_ring_size);
            let minimum = said(minimum).unwrap_or(1024);
            if minimum > 8 * 1024 * 1024 {
                return Err(FieldError::new(format!("{at}.ringHash.minimumRingSize"), format!("{minimum} is more than 8388608")));
            }
            HashTable::Ring { minimum }
        }
    };
    Ok(Balancer::Hash { key, table })
}

fn is_prime(n: u64) -> bool {
    n >= 2 && (2..=n.isqrt()).all(|d| !n.is_multiple_of(d))
}

pub fn locality(document: &doc::Locality, at: &str) -> Result<Locality> {
    let given = [!document.distribute.is_empty(), !document.failover.is_empty(), !document.failover_priority.is_empty()];
    if given.iter().filter(|g| **g).count() > 1 && !document.distribute.is_empty() {
        return Err(FieldError::new(at, "has distribute and failover; keep one"));
    }
    let mut distribute = Vec::new();
    for (i, entry) in document.distribute.iter().enumerate() {
        if entry.to.values().map(|weight| u64::from(*weight)).sum::<u64>() != 100 {
            return Err(FieldError::new(format!("{at}.distribute[{i}].to"), "weights must add up to 100"));
        }
        let to = entry.to.iter().map(|(to, weight)| (Arc::from(to.as_str()), *weight)).collect();
        distribute.push(Distribute { from: entry.from.as_str().into(), to });
    }
    let failover = document.failover.iter().map(|f| (Arc::from(f.from.as_str()), Arc::from(f.to.as_str()))).collect();
    let failover_priority = document.failover_priority.iter().map(|l| Arc::from(l.as_str())).collect();
    Ok(Locality { given: true, enabled: document.enabled.unwrap_or(true), distribute, failover, failover_priority })
}

/// A limit; zero means that none is set, as in Istio.
fn limit(value: Option<i64>, at: &str) -> Result<Option<u32>> {
    let Some(value) = value else { return Ok(None) };
    let limit = u32::try_from(value).map_err(|_| FieldError::new(at, format!("{value} is not a limit; use 0 (none) to 4294967295")))?;
    Ok((limit != 0).then_some(limit))
}

fn connection_pool(document: &doc::ConnectionPool, at: &str) -> Result<(TcpPool, HttpPool)> {
    let nonzero = |t: Option<Time>| t.map(|t| t.0).filter(|t| !t.is_zero());
    let mut tcp = TcpPool::default();
    if let Some(document) = &document.tcp {
        let at = format!("{at}.tcp");
        tcp.max_connections = limit(document.max_connections, &format!("{at}.maxConnections"))?;
        if let Some(timeout) = document.connect_timeout {
            tcp.connect_timeout = Some(positive(timeout, &format!("{at}.connectTimeout"))?);
        }
        tcp.keepalive = document.tcp_keepalive.as_ref().map(keepalive);
        tcp.max_connection_duration = nonzero(document.max_connection_duration);
        tcp.idle_timeout = nonzero(document.idle_timeout);
    }
    let mut http = HttpPool::default();
    http.idle_timeout = tcp.idle_timeout.unwrap_or(http.idle_timeout);
    if let Some(document) = &document.http {
        let at = format!("{at}.http");
        http.max_pending = limit(document.http1_max_pending_requests, &format!("{at}.http1MaxPendingRequests"))?;
        http.max_requests = limit(document.http2_max_requests, &format!("{at}.http2MaxRequests"))?;
        http.max_requests_per_connection = limit(document.max_requests_per_connection, &format!("{at}.maxRequestsPerConnection"))?;
        http.max_retries = limit(document.max_retries, &format!("{at}.maxRetries"))?;
        http.max_streams = limit(document.max_concurrent_streams, &format!("{at}.maxConcurrentStreams"))?;
        http.idle_timeout = nonzero(document.idle_timeout).or(tcp.idle_timeout).unwrap_or(http.idle_timeout);
        http.upgrade = upgrade(document, &at)?;
    }
    Ok((tcp, http))
}

pub fn keepalive(document: &doc::Keepalive) -> Keepalive {
    let seconds = |t: Option<Time>| t.map(|t| t.0.max(Duration::from_secs(1)));
    Keepalive { probes: document.probes.filter(|p| *p > 0), time: seconds(document.time), interval: seconds(document.interval) }
}

fn upgrade(document: &doc::Http, at: &str) -> Result<Upgrade> {
    let client = document.use_client_protocol.unwrap_or(false);
    match document.h2_upgrade_policy.as_deref() {
        Some("UPGRADE") if client => Err(FieldError::new(at, "has h2UpgradePolicy UPGRADE and useClientProtocol; keep one")),
        Some("UPGRADE") => Ok(Upgrade::Always),
        None | Some("DEFAULT" | "DO_NOT_UPGRADE") => Ok(if client { Upgrade::Client } else { Upgrade::Default }),
        Some(other) => {
            let problem = format!("{other:?} is not one of DEFAULT, DO_NOT_UPGRADE, UPGRADE");
            Err(FieldError::new(format!("{at}.h2UpgradePolicy"), problem))
        }
    }
}

/// A number that Istio reads as none when it is nought.
fn said<T: Default + PartialEq>(number: Option<T>) -> Option<T> {
    number.filter(|n| *n != T::default())
}

fn outlier_detection(document: &doc::Outlier, at: &str) -> Result<Outlier> {
    let default = Outlier::default();
    let percent = |value: Option<i64>, default: u32, field: &str| match value {
        None => Ok(default),
        Some(v) => u32::try_from(v)
            .ok()
            .filter(|v| *v <= 100)
            .ok_or_else(|| FieldError::new(format!("{at}.{field}"), format!("{v} is not between 0 and 100"))),
    };
    // The deprecated count is of failures as a client sees them: every 5xx, gateway errors among them.
    let deprecated = limit(document.consecutive_errors, &format!("{at}.consecutiveErrors"))?;
    Ok(Outlier {
        consecutive_5xx: document.consecutive_5xx_errors.or(deprecated).unwrap_or(default.consecutive_5xx),
        consecutive_gateway: document.consecutive_gateway_errors.unwrap_or(default.consecutive_gateway),
        split_local: document.split_external_local_origin_errors.unwrap_or(false),
        consecutive_local: said(document.consecutive_local_origin_failures).unwrap_or(default.consecutive_local),
        interval: document.interval.map_or(Ok(default.interval), |t| positive(t, &format!("{at}.interval")))?,
        base_ejection: document.base_ejection_time.map_or(Ok(default.base_ejection), |t| positive(t, &format!("{at}.baseEjectionTime")))?,
        max_ejection_percent: percent(said(document.max_ejection_percent), default.max_ejection_percent, "maxEjectionPercent")?,
        min_health_percent: percent(document.min_health_percent, default.min_health_percent, "minHealthPercent")?,
    })
}

fn retry_budget(document: &doc::RetryBudget, at: &str) -> Result<RetryBudget> {
    let percent = document.percent.as_ref().map_or(20.0, doc::Share::value);
    if !(0.0..=100.0).contains(&percent) {
        return Err(FieldError::new(format!("{at}.percent"), format!("{percent} is not between 0 and 100")));
    }
    Ok(RetryBudget { percent, minimum: said(document.min_retry_concurrency).unwrap_or(crate::route::retry::BUDGET_MINIMUM) })
}
