//! Routing of connections that are not HTTP: the `tcp` and `tls` parts of a `VirtualService`.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use super::{Workload, matching::SourceMatch, rule::Weighted};

#[derive(Debug, Clone, PartialEq)]
pub struct L4Rule {
    /// Any of them; none means always.
    pub matches: Vec<L4Match>,
    pub destinations: Vec<Weighted>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct L4Match {
    /// Names or wildcards, lower case; empty for plain TCP.
    pub sni: Vec<Arc<str>>,
    pub destinations: Vec<IpNet>,
    pub sources: Vec<IpNet>,
    pub port: Option<u16>,
    pub source: SourceMatch,
}

/// What a connection is matched with.
#[derive(Debug, Clone, Copy)]
pub struct L4Context<'a> {
    pub source: &'a Workload,
    pub client: IpAddr,
    pub destination: SocketAddr,
    /// The server name of the TLS client hello, if the connection begins with one.
    pub sni: Option<&'a str>,
}

impl L4Rule {
    pub fn matches(&self, context: L4Context<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|m| m.matches(context))
    }
}

impl L4Rule {
    /// Whether it is for a client and a port, whatever is asked for there.
    pub fn is_for(&self, source: &Workload, port: u16) -> bool {
        let is_for = |m: &L4Match| m.port.is_none_or(|p| p == port) && m.source.matches(source);
        self.matches.is_empty() || self.matches.iter().any(is_for)
    }
}

impl L4Match {
    fn matches(&self, context: L4Context<'_>) -> bool {
        let within = |networks: &[IpNet], ip: IpAddr| networks.is_empty() || networks.iter().any(|n| n.contains(&ip));
        (self.sni.is_empty() || context.sni.is_some_and(|sni| self.sni.iter().any(|host| host_matches(host, sni))))
            && within(&self.destinations, context.destination.ip())
            && within(&self.sources, context.client)
            && self.port.is_none_or(|p| p == context.destination.port())
            && self.source.matches(context.source)
    }
}

/// For people: what has to hold, with `and` between.
impl fmt::Display for L4Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
        let mut all = Vec::new();
        all.extend((!self.sni.is_empty()).then(|| format!("server name {}", self.sni.join(" or "))));
        all.extend((!self.destinations.is_empty()).then(|| format!("to {}", list(&self.destinations))));
        all.extend((!self.sources.is_empty()).then(|| format!("from {}", list(&self.sources))));
        all.extend(self.port.iter().map(|p| format!("port {p}")));
        all.extend(self.source.namespace.iter().map(|n| format!("from namespace {n}")));
        all.extend(self.source.labels.iter().map(|(k, v)| format!("from {k}={v}")));
        f.write_str(if all.is_empty() { "everything" } else { "" })?;
        f.write_str(&all.join(" and "))
    }
}

/// Whether a name is a host or covered by a wildcard: `*` covers everything, `*.a` every name that ends in `.a`.
pub fn host_matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => name.len() > suffix.len() && name.get(name.len() - suffix.len()..).is_some_and(|e| e.eq_ignore_ascii_case(suffix)),
        None => pattern.eq_ignore_ascii_case(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_cover_names_below_them() {
        for (pattern, name, expected) in [
            ("*", "a.b", true),
            ("*.b", "a.b", true),
            ("*.b", "b", false),
            ("*.b", ".b", false),
            ("*.b", "x.a.b", true),
            ("a.b", "A.B", true),
            ("a.b", "x.a.b", false),
        ] {
            assert_eq!(host_matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
