//! What is told of requests and connections: from workloads, identities and services to the labels of Istio's metrics, and from
//! what happened to lines of access logs.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use http::HeaderValue;
use serde_json::json;

use crate::{
    config::Snapshot,
    hbone::headers::Introduction,
    id::{ObjectName, SpiffeId},
    report::{
        LogTo,
        entry::{Entry, X_REQUEST_ID},
        format::short,
        plain::rfc3339,
    },
    route::Workload,
    telemetry::{
        Lines, Metrics,
        traffic::{Edge, EdgeKey, Peer, Reporter, ServiceNames, TagPlan},
    },
};

/// What a label says that nobody knows.
const UNKNOWN: &str = "unknown";

/// Who talks to whom, as far as is known.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'a> {
    pub reporter: Reporter,
    pub source: (Option<&'a Workload>, Option<&'a SpiffeId>),
    pub destination: (Option<&'a Workload>, Option<&'a SpiffeId>),
    pub service: Option<&'a ObjectName>,
    /// Who the source says it is, where it is no workload that is known.
    pub introduction: Option<&'a HeaderValue>,
}

impl Ends<'_> {
    /// The edge to count on; none when nothing is to be counted, or there is no room for one more.
    pub fn edge(&self, metrics: &Metrics, tags: &Arc<TagPlan>) -> Option<Arc<Edge>> {
        if tags.is_off() {
            return None;
        }
        let peer = |(workload, identity): (Option<&Workload>, Option<&SpiffeId>)| peer(workload, identity, &metrics.cluster);
        let key = |source: Peer| EdgeKey {
            reporter: self.reporter,
            source,
            destination: peer(self.destination),
            service: service_names(self.service),
            mutual_tls: self.source.1.is_some() && self.destination.1.is_some(),
            tags: tags.clone(),
        };
        let introduction = self.introduction.filter(|_| self.source.0.is_none()).and_then(Introduction::read);
        match introduction {
            Some(introduction) => {
                metrics.traffic.edge_of_stranger(key(introduced(&introduction, self.source.1)), || key(peer(self.source)))
            }
            None => metrics.traffic.edge(key(peer(self.source))),
        }
    }
}

fn peer(workload: Option<&Workload>, identity: Option<&SpiffeId>, cluster: &Arc<str>) -> Peer {
    let unknown = || Arc::from(UNKNOWN);
    let text = |value: Option<&str>| value.filter(|v| !v.is_empty()).map_or_else(unknown, Arc::from);
    let label = |key: &str| workload.and_then(|w| w.labels.get(key));
    let name = workload.map(|w| &*w.workload_name);
    Peer {
        workload: text(name),
        namespace: workload.map_or_else(unknown, |w| w.name.namespace.clone()),
        principal: identity.map_or_else(unknown, |i| i.to_string().into()),
        app: text(workload.and_then(Workload::app)),
        version: text(label("version").or_else(|| label("app.kubernetes.io/version"))),
        canonical_service: text(workload.and_then(Workload::canonical_service).or(name)),
        canonical_revision: workload.map_or(UNKNOWN, |w| w.canonical_revision().unwrap_or("latest")).into(),
        cluster: if workload.is_some() { cluster.clone() } else { unknown() },
        region: text(workload.map(|w| &*w.locality.region)),
        zone: text(workload.map(|w| &*w.locality.zone)),
    }
}

/// As it says itself, but for what it has proved.
fn introduced(introduction: &Introduction, identity: Option<&SpiffeId>) -> Peer {
    let text = |value: &Option<String>| value.as_deref().unwrap_or(UNKNOWN).into();
    let service = introduction.service.as_ref().or(introduction.workload.as_ref()).cloned();
    Peer {
        workload: text(&introduction.workload),
        namespace: identity.map_or_else(|| text(&introduction.namespace), |i| i.namespace().into()),
        principal: identity.map_or_else(|| UNKNOWN.into(), |i| i.to_string().into()),
        app: text(&service),
        version: text(&introduction.version),
        canonical_service: text(&service),
        canonical_revision: text(&introduction.version),
        cluster: text(&introduction.cluster),
        region: text(&introduction.region),
        zone: text(&introduction.zone),
    }
}

fn service_names(service: Option<&ObjectName>) -> ServiceNames {
    match service {
        Some(s) => ServiceNames { host: s.fqdn().into(), name: s.name.clone(), namespace: s.namespace.clone() },
        None => ServiceNames { host: UNKNOWN.into(), name: UNKNOWN.into(), namespace: UNKNOWN.into() },
    }
}

/// Keeps the edge of one place for as long as the configuration is the same.
#[derive(Debug, Default)]
pub struct EdgeSlot(ArcSwapOption<Held>);

#[derive(Debug)]
struct Held {
    generation: u64,
    edge: Option<Arc<Edge>>,
}

impl EdgeSlot {
    /// The edge of this generation of the configuration.
    pub fn get(&self, generation: u64, find: impl FnOnce() -> Option<Arc<Edge>>) -> Option<Arc<Edge>> {
        if let Some(held) = &*self.0.load()
            && held.generation == generation
        {
            return held.edge.clone();
        }
        let edge = find();
        self.0.store(Some(Arc::new(Held { generation, edge: edge.clone() })));
        edge
    }
}

/// Writes the lines these logs want.
pub fn log(access: &Lines, logs: &[LogTo], entry: &Entry<'_>) {
    thread_local! {
        static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    for LogTo { log, filter } in logs {
        if filter.as_ref().is_none_or(|f| f.holds(entry)) {
            LINE.with_borrow_mut(|line| {
                log.format.write(entry, line);
                access.write(&log.path, line);
            });
        }
    }
}

/// A request or connection as JSON, for who looks at its workload live. Durations are milliseconds.
pub fn event(entry: &Entry<'_>, reporter: Reporter, edge: Option<&EdgeKey>) -> String {
    let name = |end: &Peer| format!("{}/{}", end.namespace, end.workload);
    let asked = entry.request.as_ref();
    let id = asked.and_then(|a| a.headers.get(&X_REQUEST_ID)).and_then(|v| v.to_str().ok());
    json!({
        "kind": if asked.is_some() { "request" } else { "connection" }, "reporter": reporter.name(),
        "start": rfc3339(entry.start), "duration": u64::try_from(entry.duration.as_millis()).unwrap_or(u64::MAX),
        "source": edge.map(|e| name(&e.source)), "destination": edge.map(|e| name(&e.destination)),
        "service": edge.map(|e| &*e.service.host).filter(|h| *h != UNKNOWN),
        "client": entry.downstream_remote, "server": entry.upstream_host,
        "mutualTls": entry.mutual_tls || edge.is_some_and(|e| e.mutual_tls),
        "method": asked.map(|a| a.method), "authority": asked.map(|a| short(a.authority)), "path": asked.map(|a| short(a.path)),
        "protocol": entry.protocol, "code": (entry.code != 0).then_some(entry.code), "grpcStatus": entry.grpc_status,
        "flags": &*entry.flags, "details": entry.details.filter(|d| !d.is_empty()), "error": entry.termination_details,
        "route": entry.route, "cluster": entry.upstream_cluster.map(|c| c.to_string()),
        "bytesReceived": entry.bytes_received, "bytesSent": entry.bytes_sent,
        "requestId": id.map(short), "traceId": entry.trace.map(|own| format!("{:032x}", own.trace)),
    })
    .to_string()
}

/// Whether an edge is one that would be made now: both ends are there, are called what they were, and the one that reports is told
/// in the same way. Where one end is not known, the other decides.
pub fn is_current(edge: &EdgeKey, snapshot: &Snapshot, cluster: &Arc<str>) -> bool {
    let reports = |workload: &Workload, reporter: Reporter| {
        reporter != edge.reporter
            || match reporter {
                Reporter::Source => workload.reporting.client.tags == edge.tags,
                Reporter::Destination => workload.reporting.server.tags == edge.tags,
            }
    };
    let named = |end: &Peer| &*end.workload != UNKNOWN;
    let current = |end: &Peer, reporter: Reporter| {
        let pods = snapshot.pods_of(&end.namespace, &end.workload);
        !named(end) || pods.iter().any(|pod| reports(pod, reporter) && *end == as_now(end, pod, cluster))
    };
    (named(&edge.source) || named(&edge.destination))
        && current(&edge.source, Reporter::Source)
        && current(&edge.destination, Reporter::Destination)
}

/// What an end of an edge is called now, if it proved then who it is.
fn as_now(end: &Peer, pod: &Workload, cluster: &Arc<str>) -> Peer {
    peer(Some(pod), (&*end.principal != UNKNOWN).then_some(&pod.identity), cluster)
}

/// When something happened that the monotonic clock was read at. Steps of the system's clock are followed within a second.
pub fn wall(at: Instant) -> SystemTime {
    const AGREE: Duration = Duration::from_secs(1);
    thread_local! {
        static CLOCKS: Cell<Option<(Instant, SystemTime)>> = const { Cell::new(None) };
    }
    let clocks = CLOCKS.get().filter(|(then, _)| at.saturating_duration_since(*then) < AGREE);
    let (then, wall) = clocks.unwrap_or_else(|| {
        let now = (Instant::now(), SystemTime::now());
        CLOCKS.set(Some(now));
        now
    });
    let later = wall.checked_add(at.saturating_duration_since(then));
    later.and_then(|w| w.checked_sub(then.saturating_duration_since(at))).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::config::testing::built;

    fn pod(name: &str, labels: &[(&str, &str)]) -> Value {
        let mut all = json!({"istio.io/dataplane-mode": "ambient"});
        labels.iter().for_each(|(key, value)| all[key] = json!(value));
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "uid": name, "labels": all},
            "spec": {"nodeName": "n1", "serviceAccountName": name}, "status": {"phase": "Running", "podIPs": [{"ip": if name == "a" { "10.0.0.1" } else { "10.0.0.2" }}]}})
    }

    #[test]
    fn an_edge_is_current_for_as_long_as_it_would_be_made() {
        let version = |v| [("app", "b"), ("version", v)];
        let snapshot = built(&[pod("a", &[]), pod("b", &version("v1"))]);
        let metrics = Metrics::new("cluster");
        let [a, b] = ["10.0.0.1", "10.0.0.2"].map(|ip| snapshot.workload_by_ip(ip.parse().expect("valid")).expect("a pod").clone());
        let ends = |reporter, source, destination| Ends { reporter, source, destination, service: None, introduction: None };
        let (from, to) = ((Some(&*a), Some(&a.identity)), (Some(&*b), Some(&b.identity)));
        let edge = |ends: Ends<'_>, of: &Workload| ends.edge(&metrics, &of.reporting.server.tags).expect("room");
        let (both, half) = (edge(ends(Reporter::Destination, from, to), &b), edge(ends(Reporter::Source, from, (None, None)), &a));
        let nobody = edge(ends(Reporter::Destination, (None, None), (None, None)), &b);
        let current = |edge: &Edge, pods: &[Value]| is_current(edge.key(), &built(pods), &metrics.cluster);
        let same = [pod("a", &[]), pod("b", &version("v1"))];
        assert!(current(&both, &same) && current(&half, &same));
        assert!(!current(&nobody, &same), "nobody is told of for ever");
        // Labels have changed, a pod is gone, or is told of with other tags.
        let relabelled = [pod("a", &[]), pod("b", &version("v2"))];
        assert!(!current(&both, &relabelled) && current(&half, &relabelled));
        assert!(!current(&both, &same[..1]) && current(&half, &same[..1]));
        assert!(!current(&half, &same[1..]));
        let telemetry = json!({"apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": {"name": "t", "namespace": "default"},
            "spec": {"selector": {"matchLabels": {"app": "b"}}, "metrics": [{"overrides": [{"tagOverrides": {"x": {"value": "'y'"}}}]}]}});
        let told_otherwise = [same[0].clone(), same[1].clone(), telemetry];
        assert!(!current(&both, &told_otherwise) && current(&half, &told_otherwise));
    }

    #[test]
    fn one_clock_is_told_by_the_other() {
        let near = |a: SystemTime, b: SystemTime| {
            a.duration_since(b).or_else(|e| Ok::<_, ()>(e.duration())).is_ok_and(|d| d < Duration::from_millis(200))
        };
        for ago in [Duration::ZERO, Duration::from_millis(300), Duration::from_hours(1)] {
            let (now, system) = (Instant::now(), SystemTime::now());
            assert!(now.checked_sub(ago).is_none_or(|at| near(wall(at), system - ago)));
        }
        let later = Instant::now() + Duration::from_millis(700);
        assert!(near(wall(later), SystemTime::now() + Duration::from_millis(700)));
    }
}
