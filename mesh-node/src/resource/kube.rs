//! Core Kubernetes objects: the few fields the data path is decided by.

mod endpoints;

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use serde::Deserialize;

pub use self::endpoints::{Endpoint, EndpointSlice};
use super::{
    envelope::{FieldError, Metadata, Owner},
    selector::Labels,
};
use crate::{
    id::{WorkloadUid, canonical},
    route::cluster::Near,
};

#[derive(Debug, Clone, PartialEq)]
pub struct Namespace {
    pub labels: Labels,
    /// Of its services, unless they say otherwise.
    pub near: Option<Near>,
}

impl Namespace {
    pub(super) fn read(metadata: Metadata) -> Self {
        Self { near: annotated(&metadata).and_then(Near::of), labels: metadata.labels }
    }
}

/// Istio's older way to say `trafficDistribution`, on a Service or a namespace.
fn annotated(metadata: &Metadata) -> Option<&str> {
    metadata.annotations.as_ref()?.get("networking.istio.io/traffic-distribution")
}

/// Where a node is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

impl Node {
    /// Where a pod says that it is, whatever its node says: `topology.istio.io/locality` or `istio-locality`, in parts between slashes or
    /// dots, as Istio reads them.
    pub fn of_pod(labels: &Labels) -> Option<Self> {
        let text =
            ["topology.istio.io/locality", "istio-locality"].into_iter().find_map(|key| labels.get(key)).filter(|t| !t.is_empty())?;
        let mut parts = text.split(if text.contains('/') { '/' } else { '.' }).map(Arc::from);
        let mut next = || parts.next().unwrap_or_default();
        Some(Self { region: next(), zone: next(), subzone: next() })
    }

    pub(super) fn read(labels: &Labels) -> Self {
        let label = |keys: [&str; 2]| keys.into_iter().find_map(|k| labels.get(k)).unwrap_or_default().into();
        Self {
            region: label(["topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"]),
            zone: label(["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"]),
            subzone: label(["topology.istio.io/subzone", ""]),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Pod {
    pub uid: WorkloadUid,
    pub labels: Labels,
    /// Name of the node it is scheduled to; empty before that.
    pub node: Arc<str>,
    pub service_account: Arc<str>,
    pub host_network: bool,
    /// Succeeded or Failed: its address may belong to another pod already.
    pub finished: bool,
    /// It has been asked to end (`metadata.deletionTimestamp`).
    pub deleting: bool,
    pub ips: Vec<IpAddr>,
    /// What made it, as Istio names workloads: the Deployment of a `ReplicaSet`, the owner, or the pod itself.
    pub workload_name: Arc<str>,
    pub workload_kind: WorkloadKind,
    /// Ports of its own that its probes and hooks name.
    pub probes: BTreeSet<u16>,
    /// Whether its connections may be accelerated: not with `mesh-node.io/acceleration: "off"` among its annotations or labels.
    pub accelerate: bool,
    /// A sidecar of Istio's was injected, which captures its connections itself: the annotation `sidecar.istio.io/status`.
    pub has_sidecar: bool,
}

/// What made a pod, as far as Istio tells that apart: what was made by anything else is a pod to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WorkloadKind {
    Deployment,
    Job,
    CronJob,
    #[default]
    Pod,
}

impl WorkloadKind {
    /// As in OpenTelemetry's names of attributes, and in ztunnel's `config_dump`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::Job => "job",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
        }
    }
}

/// Label or annotation of a pod.
const ACCELERATION: &str = "mesh-node.io/acceleration";

#[derive(Deserialize)]
pub(super) struct PodDocument {
    spec: Option<PodSpec>,
    status: Option<PodStatus>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    service_account: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Container {
    ports: Option<Vec<ContainerPort>>,
    liveness_probe: Option<Probe>,
    readiness_probe: Option<Probe>,
    startup_probe: Option<Probe>,
    lifecycle: Option<Lifecycle>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ContainerPort {
    name: Option<String>,
    container_port: u16,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Lifecycle {
    post_start: Option<Probe>,
    pre_stop: Option<Probe>,
}

/// A probe or a hook.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Probe {
    http_get: Option<ProbeTarget>,
    tcp_socket: Option<ProbeTarget>,
    grpc: Option<ProbeTarget>,
}

#[derive(Deserialize)]
struct ProbeTarget {
    /// Another host than the pod: none of its ports.
    host: Option<String>,
    port: serde_json::Value,
}

impl Container {
    fn probes(&self) -> impl Iterator<Item = u16> {
        let hooks = self.lifecycle.as_ref().map(|l| [&l.post_start, &l.pre_stop]).into_iter().flatten();
        let all = [&self.liveness_probe, &self.readiness_probe, &self.startup_probe].into_iter().chain(hooks).flatten();
        let targets = all.flat_map(|p| [&p.http_get, &p.tcp_socket, &p.grpc]).flatten();
        targets.filter(|t| t.host.as_deref().is_none_or(str::is_empty)).filter_map(|t| self.port(&t.port))
    }

    /// A number, or the name of one of the container's ports.
    fn port(&self, port: &serde_json::Value) -> Option<u16> {
        let name = match port {
            serde_json::Value::String(name) => name,
            number => return number.as_u64().and_then(|n| u16::try_from(n).ok()),
        };
        let named = self.ports.iter().flatten().find(|p| p.name.as_ref() == Some(name)).map(|p| p.container_port);
        named.or_else(|| name.parse().ok())
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: String,
}

impl Pod {
    pub(super) fn read(document: PodDocument, metadata: Metadata) -> Result<Self, FieldError> {
        let PodDocument { spec, status } = document;
        let (spec, status) = (spec.unwrap_or_default(), status.unwrap_or_default());
        let uid = metadata.uid.filter(|u| !u.is_empty()).ok_or_else(|| {
            FieldError::new("metadata.uid", "is missing; a Pod must come from the cluster (kubectl get pod -o yaml), not from a template")
        })?;
        let listed = status.pod_ips.unwrap_or_default().into_iter().map(|p| p.ip).collect::<Vec<_>>();
        let texts = if listed.is_empty() { status.pod_ip.into_iter().filter(|ip| !ip.is_empty()).collect() } else { listed };
        let ips = texts.iter().enumerate().map(|(i, t)| ip(t, || format!("status.podIPs[{i}].ip"))).collect::<Result<_, _>>()?;
        let account = spec.service_account_name.or(spec.service_account).filter(|a| !a.is_empty());
        let containers = spec.containers.iter().chain(&spec.init_containers).flatten();
        let probes = containers.flat_map(Container::probes).collect();
        let switches = metadata.annotations.as_ref().and_then(|a| a.get(ACCELERATION)).into_iter().chain(metadata.labels.get(ACCELERATION));
        // What runs of a static pod is named after its manifest's hash, and not after the object that mirrors it.
        let annotation = |name: &str| metadata.annotations.as_ref().and_then(|a| a.get(name)).filter(|v| !v.is_empty());
        // Whoever may make pods writes annotations: the UID of another pod is none.
        let digest = |text: &&str| text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let of_static = annotation("kubernetes.io/config.mirror").and_then(|_| annotation("kubernetes.io/config.hash")).filter(digest);
        let has_sidecar = annotation("sidecar.istio.io/status").is_some();
        let (workload_name, workload_kind) =
            made_by(&metadata.owner_references.unwrap_or_default(), &metadata.labels, metadata.name.as_deref().unwrap_or_default());
        let accelerate = switches.map(|value: &str| switch(value)).collect::<Result<Vec<_>, _>>()?.iter().all(|on| *on);
        Ok(Self {
            probes,
            accelerate,
            has_sidecar,
            uid: WorkloadUid(of_static.map_or(uid.into(), Into::into)),
            labels: metadata.labels,
            node: spec.node_name.unwrap_or_default().into(),
            service_account: account.as_deref().unwrap_or("default").into(),
            host_network: spec.host_network.unwrap_or(false),
            workload_name,
            workload_kind,
            deleting: metadata.deletion_timestamp.is_some(),
            finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            ips,
        })
    }
}

fn switch(value: &str) -> Result<bool, FieldError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(FieldError::new(
            format!("metadata.annotations or labels[{ACCELERATION}]"),
            format!("{other:?} is neither \"on\" nor \"off\""),
        )),
    }
}

/// A `ReplicaSet` of a Deployment is named after that and a hash, which its pods are labelled with; a Job of a `CronJob` after that and a time; other owners give their name as
/// it is.
fn made_by(owners: &[Owner], labels: &Labels, pod: &str) -> (Arc<str>, WorkloadKind) {
    let Some(owner) = owners.first().filter(|o| !o.name.is_empty()) else { return (pod.into(), WorkloadKind::Pod) };
    let parts = owner.name.rsplit_once('-');
    let scheduled = parts.filter(|(_, at)| (8..=10).contains(&at.len()) && at.bytes().all(|b| b.is_ascii_digit()));
    let hashed = |hash: &str| labels.get("pod-template-hash").is_none_or(|label| label == hash);
    let (name, kind) = match (&*owner.kind, parts, scheduled) {
        ("ReplicaSet", Some((deployment, hash)), _) if hashed(hash) => (deployment, WorkloadKind::Deployment),
        ("Job", _, Some((cron_job, _))) => (cron_job, WorkloadKind::CronJob),
        ("Job", ..) => (&*owner.name, WorkloadKind::Job),
        _ => (&*owner.name, WorkloadKind::Pod),
    };
    (name.into(), kind)
}

fn ip(text: &str, at: impl Fn() -> String) -> Result<IpAddr, FieldError> {
    text.parse().map(canonical).map_err(|_| FieldError::new(at(), format!("{text:?} is not an IP address")))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    /// Only endpoints of the client's node.
    Local,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// Cluster IPs: every port of them is this service's. Empty when headless.
    pub vips: Vec<IpAddr>,
    /// External and load balancer addresses: only the service's own ports are, the others are somebody else's.
    pub external_ips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub internal_traffic_policy: TrafficPolicy,
    /// `sessionAffinity: ClientIP`.
    pub client_ip_affinity: bool,
    /// `trafficDistribution`, its own; none when it says nothing of it.
    pub near: Option<Option<Near>>,
    /// Of one of type `ExternalName`: the host it stands for.
    pub alias: Option<Arc<str>>,
    headless: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty when the service has a single unnamed port.
    pub name: Arc<str>,
    pub port: u16,
    /// `appProtocol`: it wins over the name.
    pub app_protocol: Option<Arc<str>>,
}

#[derive(Deserialize)]
pub(super) struct ServiceDocument {
    #[serde(default)]
    spec: ServiceSpec,
    #[serde(default)]
    status: Option<ServiceStatus>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    ports: Option<Vec<ServicePortSpec>>,
    internal_traffic_policy: Option<TrafficPolicy>,
    session_affinity: Option<String>,
    traffic_distribution: Option<String>,
    external_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServicePortSpec {
    #[serde(default)]
    app_protocol: Option<String>,
    #[serde(default)]
    name: Option<String>,
    port: u16,
    #[serde(default)]
    protocol: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ServiceStatus {
    load_balancer: LoadBalancer,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct LoadBalancer {
    ingress: Option<Vec<Ingress>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Ingress {
    ip: Option<String>,
}

impl Service {
    /// Without an address of its own: names lead to its endpoints directly.
    pub fn is_headless(&self) -> bool {
        self.headless
    }

    pub(super) fn read(document: ServiceDocument, metadata: &Metadata) -> Result<Self, FieldError> {
        let ServiceDocument { spec, status } = document;
        let external_name = spec.r#type.as_deref() == Some("ExternalName");
        let alias = spec.external_name.filter(|name| external_name && !name.is_empty()).map(Arc::from);
        let mut texts = spec.cluster_ips.unwrap_or_default();
        if texts.is_empty() {
            texts.extend(spec.cluster_ip);
        }
        let headless = !external_name && texts.iter().any(|t| t == "None");
        texts.retain(|t| !t.is_empty() && t != "None");
        let cluster = texts.iter().enumerate().map(|(i, t)| ip(t, || format!("spec.clusterIPs[{i}]")));
        let external = spec.external_ips.unwrap_or_default();
        let external = external.iter().enumerate().map(|(i, t)| ip(t, || format!("spec.externalIPs[{i}]")));
        let ingress = status.unwrap_or_default().load_balancer.ingress.unwrap_or_default();
        let ingress = ingress.iter().filter_map(|i| i.ip.as_deref());
        let ingress = ingress.enumerate().map(|(i, t)| ip(t, || format!("status.loadBalancer.ingress[{i}].ip")));
        let vips = cluster.collect::<Result<Vec<_>, _>>()?;
        let external_ips = external.chain(ingress).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            vips: if external_name { Vec::new() } else { vips },
            external_ips: if external_name { Vec::new() } else { external_ips },
            ports: spec.ports.unwrap_or_default().into_iter().filter(|p| is_tcp(p.protocol.as_deref())).map(ServicePort::from).collect(),
            internal_traffic_policy: spec.internal_traffic_policy.unwrap_or_default(),
            near: match spec.traffic_distribution.as_deref().and_then(Near::of) {
                Some(near) => Some(Some(near)),
                None => annotated(metadata).map(Near::of),
            },
            client_ip_affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
            alias,
            headless,
        })
    }
}

/// TCP is the default; other protocols are not this node's traffic.
fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("TCP"))
}

impl From<ServicePortSpec> for ServicePort {
    fn from(spec: ServicePortSpec) -> Self {
        Self { name: spec.name.unwrap_or_default().into(), port: spec.port, app_protocol: spec.app_protocol.map(Arc::from) }
    }
}
