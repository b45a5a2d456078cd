//! Mesh-wide settings, the same on every node.

use std::{net::IpAddr, str::FromStr, sync::Arc};

use ipnet::IpNet;

use crate::{
    id::{SpiffeId, TrustDomain},
    policy::TrustDomains,
    resource::{selector::Labels, strings::StringMatch},
};

/// Istio's `outboundTrafficPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum OutboundPolicy {
    /// Connections to addresses the mesh does not know pass through unchanged.
    #[default]
    #[value(name = "ALLOW_ANY", alias = "allow-any")]
    AllowAny,
    /// They are refused.
    #[value(name = "REGISTRY_ONLY", alias = "registry-only")]
    RegistryOnly,
}

/// Which requests the destination's node looks into, where policy does not make it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DestinationRequests {
    /// Those to ports that services declare to carry HTTP: they are counted, logged and traced by both ends.
    #[default]
    Declared,
    /// None: the destination sees connections, the source requests.
    Governed,
}

/// The label that enrols a namespace or a pod: `key=value`. A pod's own label wins; its value `none` opts out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolmentLabel {
    pub key: Arc<str>,
    pub value: Arc<str>,
}

impl EnrolmentLabel {
    /// Whether a pod with these labels in a namespace with those is in the mesh.
    pub fn enrols(&self, namespace: Option<&Labels>, pod: &Labels) -> bool {
        let wanted = |labels: &Labels| labels.get(&self.key).map(|v| v == &*self.value);
        match pod.get(&self.key) {
            Some(value) if value == &*self.value => true,
            Some("none") => false,
            // Any other value says nothing about this mesh; the namespace decides.
            _ => namespace.and_then(wanted).unwrap_or(false),
        }
    }
}

impl Default for EnrolmentLabel {
    fn default() -> Self {
        Self { key: "istio.io/dataplane-mode".into(), value: "ambient".into() }
    }
}

impl FromStr for EnrolmentLabel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() && !value.is_empty() && value != "none" => {
                Ok(Self { key: key.into(), value: value.into() })
            }
            _ => Err(format!("{text:?} is not KEY=VALUE with a value other than \"none\"")),
        }
    }
}

/// What a snapshot is built with besides the objects.
#[derive(Debug, Clone)]
pub struct MeshSettings {
    pub node: Arc<str>,
    pub trust_domains: TrustDomains,
    /// Namespace whose policies without a selector apply to the whole mesh.
    pub root_namespace: Arc<str>,
    pub outbound: OutboundPolicy,
    pub enrolment: EnrolmentLabel,
    pub destination_requests: DestinationRequests,
    /// Proxies whose word about their clients' addresses (`x-forwarded-for`) counts.
    pub trusted_proxies: Vec<TrustedProxy>,
}

/// A proxy that is trusted with its clients' addresses: by its own address, or by its identity (`td/ns/x/sa/y`, with Istio's
/// wildcards).
#[derive(Debug, Clone, PartialEq)]
pub enum TrustedProxy {
    Address(IpNet),
    Principal(StringMatch),
}

impl FromStr for TrustedProxy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let single = || text.parse::<IpAddr>().ok().map(IpNet::from);
        if let Some(net) = text.parse::<IpNet>().ok().or_else(single) {
            return Ok(Self::Address(net));
        }
        if text.contains('/') && !text.contains(':') && text != "*" {
            return Ok(Self::Principal(StringMatch::parse(text)));
        }
        Err(format!(
            "{text:?} is neither an address, a CIDR such as 10.0.0.0/8, nor a principal such as cluster.local/ns/istio-system/sa/gateway"
        ))
    }
}

impl MeshSettings {
    /// Whether a peer is a trusted proxy.
    pub fn is_trusted_proxy(&self, peer: Option<&SpiffeId>, address: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|proxy| match proxy {
            TrustedProxy::Address(net) => net.contains(&address.to_canonical()),
            TrustedProxy::Principal(pattern) => peer.is_some_and(|p| pattern.matches(&p.principal())),
        })
    }

    /// Whether an address is one of trusted proxies: what comes before it in a chain is the next hop.
    pub fn is_trusted_address(&self, address: IpAddr) -> bool {
        self.is_trusted_proxy(None, address)
    }

    /// Istio's defaults for a node of this name.
    pub fn new(node: &str, trust_domain: TrustDomain) -> Self {
        Self {
            node: node.into(),
            trust_domains: TrustDomains { local: trust_domain, aliases: Vec::new() },
            root_namespace: "istio-system".into(),
            outbound: OutboundPolicy::default(),
            enrolment: EnrolmentLabel::default(),
            destination_requests: DestinationRequests::default(),
            trusted_proxies: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_label_wins_over_the_namespace() {
        let labels = |v: Option<&str>| v.map(|v| ("istio.io/dataplane-mode".to_owned(), v.to_owned())).into_iter().collect::<Labels>();
        let cases = [
            (None, None, false),
            (Some("ambient"), None, true),
            (Some("ambient"), Some("none"), false),
            (Some("ambient"), Some("ambient"), true),
            (None, Some("ambient"), true),
            (Some("none"), Some("ambient"), true),
            (Some("none"), None, false),
            (Some("ambient"), Some("other"), true),
            (Some("Ambient"), None, false),
        ];
        for (namespace, pod, expected) in cases {
            assert_eq!(EnrolmentLabel::default().enrols(Some(&labels(namespace)), &labels(pod)), expected, "{namespace:?} {pod:?}");
        }
        assert!(!EnrolmentLabel::default().enrols(None, &labels(None)));
    }

    #[test]
    fn enrolment_label_needs_key_and_value() {
        assert!("mesh=on".parse::<EnrolmentLabel>().is_ok());
        for bad in ["", "mesh", "=on", "mesh=", "mesh=none"] {
            assert!(bad.parse::<EnrolmentLabel>().is_err(), "{bad}");
        }
    }
}
