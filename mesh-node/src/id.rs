//! Identifiers: parsed once, typed from then on.
//!
//! SPIFFE IDs follow the SPIFFE-ID specification as Istio narrows it: `spiffe://<trust domain>/ns/<ns>/sa/<sa>`.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("trust domain {0:?} is not a lower-case DNS-like name of 1 to 255 letters, digits, '.', '-' or '_'")]
    TrustDomain(String),
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Spiffe(String),
}

/// The longest SPIFFE ID the specification allows, in bytes.
const MAX_SPIFFE_LEN: usize = 2048;

/// A SPIFFE trust domain, such as `cluster.local`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Accepts what the SPIFFE specification allows: lower-case letters, digits, `.`, `-`, `_`, 1 to 255 bytes.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > 255 || !text.bytes().all(legal) {
            return Err(IdError::TrustDomain(text.to_owned()));
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::parse(s)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The identity of a service account.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    /// Builds the ID of a Kubernetes service account. Kubernetes names never need escaping in a SPIFFE ID, other texts
    /// are refused.
    pub fn new(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, IdError> {
        let id = Self { trust_domain: trust_domain.clone(), namespace: namespace.into(), service_account: service_account.into() };
        if is_segment(namespace) && is_segment(service_account) { Ok(id) } else { Err(IdError::Spiffe(id.to_string())) }
    }

    /// Parses the URI form; exactly five segments, as Istio's ztunnel reads it.
    pub fn parse(uri: &str) -> Result<Self, IdError> {
        let fail = || IdError::Spiffe(uri.chars().take(256).collect());
        if uri.len() > MAX_SPIFFE_LEN {
            return Err(fail());
        }
        let rest = uri.strip_prefix("spiffe://").ok_or_else(fail)?;
        let mut segments = rest.split('/');
        let mut next = || segments.next().ok_or_else(fail);
        let (td, ns, namespace, sa, account) = (next()?, next()?, next()?, next()?, next()?);
        if ns != "ns" || sa != "sa" || segments.next().is_some() || !is_segment(namespace) || !is_segment(account) {
            return Err(fail());
        }
        let trust_domain = TrustDomain::parse(td).map_err(|_| fail())?;
        Ok(Self { trust_domain, namespace: namespace.into(), service_account: account.into() })
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn service_account(&self) -> &str {
        &self.service_account
    }

    /// The form policies use: the URI without its scheme.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

/// A path segment the SPIFFE specification allows.
fn is_segment(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !text.is_empty() && text != "." && text != ".." && text.bytes().all(legal)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A workload's unique id: the pod's UID. A reused address or name never has the same one.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WorkloadUid(pub Arc<str>);

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Namespace and name of an object.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

/// The domain of the cluster's DNS. Istio's default, and not to be set.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

impl ObjectName {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The Service that a host name means in an object of a namespace: `name`, `name.namespace`, and that with `.svc` or
    /// `.svc.cluster.local` behind it, as Istio completes short names. `None`: no Service of the cluster.
    pub fn from_host(host: &str, namespace: &str) -> Option<Self> {
        let host = host.strip_suffix('.').unwrap_or(host);
        let Some((name, rest)) = host.split_once('.') else {
            return (!host.is_empty() && host != "*").then(|| Self::new(namespace, host));
        };
        let (namespace, domain) = rest.split_once('.').unwrap_or((rest, ""));
        let is_here = matches!(domain.strip_prefix("svc"), Some("" | ".cluster.local")) || domain.is_empty();
        (is_here && !name.is_empty() && name != "*" && !namespace.is_empty()).then(|| Self::new(namespace, name))
    }

    /// The Service of a name that means the same in every namespace: `name.namespace.svc`, with or without the cluster's domain.
    pub fn from_fqdn(host: &str) -> Option<Self> {
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.split('.').nth(2) == Some("svc") { Self::from_host(host, "") } else { None }
    }

    /// The Service's name in DNS: `name.namespace.svc.cluster.local`.
    pub fn fqdn(&self) -> String {
        format!("{}.{}.svc.{CLUSTER_DOMAIN}", self.name, self.namespace)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The one spelling of an address: IPv4-mapped IPv6 becomes IPv4.
pub fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_name_from_host_takes_names_of_the_cluster_only() {
        let web = Some(ObjectName::new("shop", "web"));
        for (host, expected) in [
            ("web", &web),
            ("web.", &web),
            ("web.shop", &web),
            ("web.shop.svc", &web),
            ("web.shop.svc.cluster.local", &web),
            ("web.shop.svc.cluster.local.", &web),
            ("web.shop.svc.example.com", &None),
            ("web.shop.svc.cluster", &None),
            ("web.shop.svcs", &None),
            ("web.shop.example", &None),
            ("*.shop.svc.cluster.local", &None),
            ("*", &None),
            ("", &None),
            (".shop", &None),
            ("web..svc", &None),
        ] {
            assert_eq!(&ObjectName::from_host(host, "shop"), expected, "{host}");
            let everywhere = expected.clone().filter(|_| host.contains(".svc"));
            assert_eq!(ObjectName::from_fqdn(host), everywhere, "{host}");
        }
        assert_eq!(web.map(|name| name.fqdn()).as_deref(), Some("web.shop.svc.cluster.local"));
    }

    #[test]
    fn spiffe_id_of_five_segments_parses_and_prints_back() {
        let id = SpiffeId::parse("spiffe://cluster.local/ns/default/sa/reviews").expect("valid");
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/default/sa/reviews");
        assert_eq!(id.principal(), "cluster.local/ns/default/sa/reviews");
        assert_eq!((id.namespace(), id.service_account()), ("default", "reviews"));
    }

    #[test]
    fn spiffe_id_of_another_form_is_refused() {
        for bad in [
            "",
            "spiffe://",
            "cluster.local/ns/a/sa/b",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://Cluster.Local/ns/a/sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a%2f/sa/b",
            "spiffe://cluster.local:80/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b?x",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad}");
        }
        assert!(SpiffeId::parse(&format!("spiffe://a/ns/b/sa/{}", "c".repeat(3000))).is_err());
    }

    proptest::proptest! {
        #[test]
        fn spiffe_id_that_parses_prints_what_was_parsed(text in "spiffe://[a-z./]{0,20}/ns/[a-zA-Z.]{0,5}/sa/[a-z/]{0,5}") {
            if let Ok(id) = SpiffeId::parse(&text) {
                proptest::prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
