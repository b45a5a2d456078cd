//! Matching one compiled rule against a connection.

use std::net::IpAddr;

use ipnet::IpNet;

use super::Facts;
use crate::{
    id::SpiffeId,
    resource::{authorization::Values, strings::StringMatch},
};

/// One condition on a connection. A field AND its `not` twin.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Test {
    Principal(Values<StringMatch>),
    Namespace(Values<StringMatch>),
    /// Namespace and name of service accounts.
    ServiceAccount(Values<(String, String)>),
    SourceIp(Values<IpNet>),
    DestinationIp(Values<IpNet>),
    DestinationPort(Values<u16>),
}

impl Test {
    pub(super) fn holds(&self, facts: &Facts) -> bool {
        let peer = facts.peer.as_ref();
        match self {
            Self::Principal(values) => {
                let principal = peer.map(SpiffeId::principal).unwrap_or_default();
                holds(values, |m| m.matches(&principal))
            }
            Self::Namespace(values) => holds(values, |m| peer.is_some_and(|p| m.matches(p.namespace()))),
            Self::ServiceAccount(values) => {
                holds(values, |(ns, name)| peer.is_some_and(|p| p.namespace() == ns && p.service_account() == name))
            }
            Self::SourceIp(values) => holds(values, |net| contains(net, facts.source)),
            Self::DestinationIp(values) => holds(values, |net| contains(net, facts.destination.ip())),
            Self::DestinationPort(values) => holds(values, |port| *port == facts.destination.port()),
        }
    }
}

/// Positive AND NOT negative; an empty positive list asks nothing.
fn holds<T>(values: &Values<T>, matches: impl Fn(&T) -> bool) -> bool {
    (values.any_of.is_empty() || values.any_of.iter().any(&matches)) && !values.none_of.iter().any(&matches)
}

/// CIDR containment; IPv4-mapped addresses count as IPv4.
fn contains(net: &IpNet, ip: IpAddr) -> bool {
    net.contains(&ip.to_canonical())
}
