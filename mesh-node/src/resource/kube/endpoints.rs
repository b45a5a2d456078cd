//! `EndpointSlice`: who is behind a Service.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::Deserialize;

use super::{FieldError, Metadata, ip, is_tcp};

#[derive(Debug, Clone, PartialEq)]
pub struct EndpointSlice {
    /// Name of the service, from the label `kubernetes.io/service-name`; a slice without it belongs to none.
    pub service: Option<Arc<str>>,
    pub endpoints: Vec<Endpoint>,
    /// Target port by service port name.
    pub ports: BTreeMap<Arc<str>, u16>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    pub addresses: Vec<IpAddr>,
    pub ready: bool,
    /// Shutting down but still answering: used when nothing is ready, as kube-proxy does.
    pub serving_while_terminating: bool,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    /// The pod behind it, of the slice's namespace, as `targetRef` names it.
    pub pod: Option<Arc<str>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceDocument {
    #[serde(default)]
    address_type: Option<String>,
    #[serde(default)]
    endpoints: Option<Vec<EndpointDocument>>,
    #[serde(default)]
    ports: Option<Vec<EndpointPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EndpointDocument {
    addresses: Option<Vec<String>>,
    #[serde(default)]
    conditions: Option<Conditions>,
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    zone: Option<String>,
    #[serde(default)]
    target_ref: Option<TargetRef>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TargetRef {
    kind: Option<String>,
    name: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize)]
struct EndpointPort {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    port: Option<u16>,
    #[serde(default)]
    protocol: Option<String>,
}

impl EndpointSlice {
    pub fn read(document: SliceDocument, metadata: &Metadata) -> Result<Self, FieldError> {
        let service = metadata.labels.get("kubernetes.io/service-name").map(Arc::from);
        if document.address_type.as_deref() == Some("FQDN") {
            return Ok(Self { service, endpoints: Vec::new(), ports: BTreeMap::new() });
        }
        let endpoints = document.endpoints.unwrap_or_default().into_iter().enumerate();
        let endpoints = endpoints.map(|(i, e)| endpoint(e, &format!("endpoints[{i}]"))).collect::<Result<_, _>>()?;
        let ports = document.ports.unwrap_or_default().into_iter().filter(|p| is_tcp(p.protocol.as_deref()));
        let ports = ports.filter_map(|p| Some((Arc::from(p.name.unwrap_or_default()), p.port?))).collect();
        Ok(Self { service, endpoints, ports })
    }
}

fn endpoint(document: EndpointDocument, at: &str) -> Result<Endpoint, FieldError> {
    let Conditions { ready, serving, terminating } = document.conditions.unwrap_or_default();
    let addresses = document.addresses.iter().flatten().enumerate();
    let addresses = addresses.map(|(i, t)| ip(t, || format!("{at}.addresses[{i}]"))).collect::<Result<_, _>>()?;
    Ok(Endpoint {
        addresses,
        ready: ready.unwrap_or(true),
        serving_while_terminating: terminating.unwrap_or(false) && serving.unwrap_or(false),
        node: document.node_name.map(Arc::from),
        zone: document.zone.map(Arc::from),
        pod: document.target_ref.filter(|r| r.kind.as_deref() == Some("Pod")).and_then(|r| r.name).map(Arc::from),
    })
}
