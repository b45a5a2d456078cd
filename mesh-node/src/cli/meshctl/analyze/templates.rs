//! What a cluster would make of manifests that were written by hand: a pod of each template and of each bare `Pod`, an address for each
//! Service, and the endpoints of those that select pods. What the manifests have of that themselves stays as it is.

use std::{collections::BTreeMap, net::Ipv4Addr};

use serde_json::{Map, Value, json};

use super::NAMESPACE;
use crate::config::{
    EnrolmentLabel,
    store::{Origin, Severity, Status},
};

/// The node all of them are on.
const NODE: &str = "node";
/// Where the addresses that stand for others begin (RFC 2544): pods', and behind them those of services.
const PODS: u32 = 0xC612_0000;
const SERVICES: u32 = 0xC613_0000;
const ADDRESSES: u32 = 0xFFFF;

/// A document, and the file it is of.
type Found<'a> = (&'a Origin, &'a Value);

/// A pod, as far as services ask about it.
struct Pod {
    namespace: String,
    name: String,
    labels: Map<String, Value>,
    address: String,
    /// Ports by name.
    ports: BTreeMap<String, u64>,
}

/// What is made of them: documents to be read after those there are (of one object the last counts), and what is to be said.
#[derive(Default)]
pub struct Made {
    pub documents: Vec<(Origin, Value)>,
    pub remarks: Vec<Status>,
}

/// Makes them. A namespace of which the manifests do not say what it is labelled with is taken to be in the mesh.
pub fn stand_ins(found: &[(Origin, Value)], enrolment: &EnrolmentLabel) -> Made {
    let found = found.iter().map(|(origin, document)| (origin, document)).collect::<Vec<_>>();
    let mut made = Made::default();
    let pods = made.pods(&found, enrolment);
    made.services(&found, &pods);
    made
}

fn text<'a>(document: &'a Value, pointer: &str) -> Option<&'a str> {
    document.pointer(pointer).and_then(Value::as_str).filter(|text| !text.is_empty())
}

fn namespace(document: &Value) -> &str {
    text(document, "/metadata/namespace").unwrap_or(NAMESPACE)
}

fn object<'a>(document: &'a Value, pointer: &str) -> Option<&'a Map<String, Value>> {
    document.pointer(pointer).and_then(Value::as_object)
}

/// What of these kinds there is.
fn of_kind<'a>(found: &[Found<'a>], kind: &str) -> impl Iterator<Item = Found<'a>> {
    found.iter().filter(move |(_, document)| text(document, "/kind") == Some(kind)).copied()
}

/// Where the template of a workload is, and who is said to own its pods.
fn template(document: &Value) -> Option<(&Value, Value)> {
    let (kind, name) = (text(document, "/kind")?, text(document, "/metadata/name")?);
    let (group, _) = text(document, "/apiVersion")?.rsplit_once('/').unwrap_or_default();
    let (pointer, owner) = match (group, kind) {
        ("apps", "Deployment") => ("/spec/template", ("ReplicaSet", format!("{name}-0"))),
        ("apps", "StatefulSet" | "DaemonSet" | "ReplicaSet") | ("", "ReplicationController") | ("batch", "Job") => {
            ("/spec/template", (kind, name.to_owned()))
        }
        ("batch", "CronJob") => ("/spec/jobTemplate/spec/template", ("Job", format!("{name}-00000000"))),
        _ => return None,
    };
    Some((document.pointer(pointer)?, json!([{"kind": owner.0, "name": owner.1}])))
}

/// Whether all of one are among the other.
fn within(wanted: &Map<String, Value>, labels: &Map<String, Value>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Names of the ports of a pod's containers.
fn named_ports(spec: &Value) -> BTreeMap<String, u64> {
    let containers = ["containers", "initContainers"].iter().filter_map(|field| spec.get(field)?.as_array()).flatten();
    let ports = containers.filter_map(|container| container.get("ports")?.as_array()).flatten();
    ports.filter_map(|port| Some((port.get("name")?.as_str()?.to_owned(), port.get("containerPort")?.as_u64()?))).collect()
}

impl Made {
    fn pods(&mut self, found: &[Found<'_>], enrolment: &EnrolmentLabel) -> Vec<Pod> {
        let mut pods = Vec::new();
        // From the cluster, or bare.
        let (real, bare) = of_kind(found, "Pod").partition::<Vec<_>, _>(|(_, pod)| text(pod, "/metadata/uid").is_some());
        for (_, pod) in real {
            let address = text(pod, "/status/podIPs/0/ip").or_else(|| text(pod, "/status/podIP"));
            let (Some(name), Some(address)) = (text(pod, "/metadata/name"), address) else { continue };
            let labels = object(pod, "/metadata/labels").cloned().unwrap_or_default();
            let ports = named_ports(&pod["spec"]);
            pods.push(Pod { namespace: namespace(pod).to_owned(), name: name.to_owned(), labels, address: address.to_owned(), ports });
        }
        let templates = found.iter().filter_map(|&(origin, workload)| Some((origin, workload, template(workload)?)));
        let templates = templates.filter(|(_, workload, (template, _))| {
            // Of what runs already the pods are there.
            let labels = object(template, "/metadata/labels").cloned().unwrap_or_default();
            let runs = |pod: &Pod| !labels.is_empty() && within(&labels, &pod.labels);
            !pods.iter().any(|pod| pod.namespace == namespace(workload) && runs(pod))
        });
        let all = bare.iter().map(|(origin, pod)| (*origin, *pod, (*pod, Value::Null))).chain(templates).collect::<Vec<_>>();
        let known = of_kind(found, "Namespace").filter_map(|(_, namespace)| text(namespace, "/metadata/name")).collect::<Vec<_>>();
        for ((origin, workload, (template, owner)), address) in all.into_iter().zip(PODS + 1..PODS + ADDRESSES) {
            let Some(name) = text(workload, "/metadata/name") else { continue };
            // Of workloads of one name each has pods.
            let taken = pods.iter().any(|pod| pod.namespace == namespace(workload) && pod.name == name);
            let kind = text(workload, "/kind").unwrap_or_default().to_ascii_lowercase();
            let name = &*if taken { format!("{name}-{kind}") } else { name.to_owned() };
            let (namespace, address) = (namespace(workload), Ipv4Addr::from(address).to_string());
            let metadata = |field: &str| object(template, &format!("/metadata/{field}")).cloned().unwrap_or_default();
            let mut labels = metadata("labels");
            if !known.contains(&namespace) {
                labels.entry(&*enrolment.key).or_insert_with(|| Value::from(&*enrolment.value));
            }
            let mut spec = template.get("spec").cloned().unwrap_or_default();
            if let Some(spec) = spec.as_object_mut() {
                spec.entry("nodeName").or_insert_with(|| NODE.into());
            }
            let ports = named_ports(&spec);
            let document = json!({
                "apiVersion": "v1", "kind": "Pod", "spec": spec,
                "metadata": {"name": name, "namespace": namespace, "uid": format!("template of {namespace}/{name}"), "labels": labels,
                    "annotations": metadata("annotations"), "ownerReferences": owner},
                "status": {"phase": "Running", "podIPs": [{"ip": address}]},
            });
            self.documents.push((origin.clone(), document));
            pods.push(Pod { namespace: namespace.to_owned(), name: name.to_owned(), labels, address, ports });
        }
        pods
    }

    fn services(&mut self, found: &[Found<'_>], pods: &[Pod]) {
        let label = "/metadata/labels/kubernetes.io~1service-name";
        let listed = of_kind(found, "EndpointSlice").filter_map(|(_, slice)| Some((namespace(slice), text(slice, label)?)));
        let listed = listed.collect::<Vec<_>>();
        for ((origin, service), address) in of_kind(found, "Service").zip(SERVICES + 1..SERVICES + ADDRESSES) {
            let (Some(name), namespace) = (text(service, "/metadata/name"), namespace(service)) else { continue };
            let external = text(service, "/spec/type") == Some("ExternalName");
            let addressed = text(service, "/spec/clusterIP").is_some() || text(service, "/spec/clusterIPs/0").is_some();
            if let Some(true) = service.get("spec").map(|spec| spec.is_object() && !external && !addressed) {
                let mut service = service.clone();
                service["spec"]["clusterIP"] = Ipv4Addr::from(address).to_string().into();
                self.documents.push((origin.clone(), service));
            }
            let selector = object(service, "/spec/selector").filter(|selector| !selector.is_empty());
            let Some(selector) = selector.filter(|_| !external && !listed.contains(&(namespace, name))) else { continue };
            let selected = pods.iter().filter(|pod| pod.namespace == namespace && within(selector, &pod.labels)).collect::<Vec<_>>();
            for pod in &selected {
                let document = json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": address_type(&pod.address), "ports": target_ports(service, pod),
                    "metadata": {"name": format!("{name}.{}", pod.name), "namespace": namespace,
                        "labels": {"kubernetes.io/service-name": name}},
                    "endpoints": [{"addresses": [pod.address], "conditions": {"ready": true}, "nodeName": NODE,
                        "targetRef": {"kind": "Pod", "name": pod.name}}],
                });
                self.documents.push((origin.clone(), document));
            }
            if !selected.is_empty() {
                self.nameless(origin, (namespace, name), service, &selected);
            } else if pods.iter().any(|pod| pod.namespace == namespace) {
                // Whoever writes down none of a namespace's pods has them elsewhere.
                let message = format!(
                    "Service {namespace}/{name}: spec.selector: matches no pod of these manifests, so that it has no endpoints; check its labels"
                );
                self.remarks.push(Status { origin: origin.to_string(), severity: Severity::Warning, message });
            }
        }
    }

    /// Tells of ports that lead to names nobody has.
    fn nameless(&mut self, origin: &Origin, (namespace, name): (&str, &str), service: &Value, selected: &[&Pod]) {
        for (i, port) in service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten().enumerate() {
            let Some(target) = port.get("targetPort").and_then(Value::as_str) else { continue };
            if target.parse::<u16>().is_ok() || selected.iter().any(|pod| pod.ports.contains_key(target)) {
                continue;
            }
            let message = format!(
                "Service {namespace}/{name}: spec.ports[{i}].targetPort: no pod it selects has a port named {target:?}; name a container's port so, or \
                 write its number"
            );
            self.remarks.push(Status { origin: origin.to_string(), severity: Severity::Warning, message });
        }
    }
}

fn address_type(address: &str) -> &'static str {
    if address.contains(':') { "IPv6" } else { "IPv4" }
}

/// The ports of a service as an `EndpointSlice` has them, at a pod.
fn target_ports(service: &Value, pod: &Pod) -> Vec<Value> {
    let ports = service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten();
    let ports = ports.filter_map(|port| {
        let number = match port.get("targetPort") {
            Some(Value::String(name)) => pod.ports.get(name).copied().or_else(|| name.parse().ok())?,
            Some(Value::Number(number)) => number.as_u64()?,
            _ => port.get("port")?.as_u64()?,
        };
        Some(json!({"name": port.get("name").and_then(Value::as_str).unwrap_or_default(), "port": number,
            "protocol": port.get("protocol").and_then(Value::as_str).unwrap_or("TCP")}))
    });
    ports.collect()
}
