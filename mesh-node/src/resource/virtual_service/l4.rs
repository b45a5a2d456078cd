//! The `tcp` and `tls` parts of a `VirtualService`.

use std::sync::Arc;

use ipnet::IpNet;

use super::{
    check_host,
    document::{L4Match as MatchDocument, L4Route},
    http::{destination, weight, weights},
};
use crate::{
    resource::{envelope::FieldError, fields::port},
    route::{
        l4::{L4Match, L4Rule},
        matching::SourceMatch,
        rule::{HeaderOperations, Weighted},
    },
};

pub(super) fn tcp(route: &L4Route, at: &str) -> Result<L4Rule, FieldError> {
    if let Some(i) = route.r#match.iter().position(|m| !m.sni_hosts.is_empty()) {
        return Err(FieldError::new(format!("{at}.match[{i}].sniHosts"), "belongs under tls, not tcp"));
    }
    rule(route, at)
}

pub(super) fn tls(route: &L4Route, at: &str) -> Result<L4Rule, FieldError> {
    if route.r#match.is_empty() {
        return Err(FieldError::new(format!("{at}.match"), "is missing; a tls route needs sniHosts"));
    }
    if let Some(i) = route.r#match.iter().position(|m| m.sni_hosts.is_empty()) {
        return Err(FieldError::new(format!("{at}.match[{i}].sniHosts"), "is missing; name at least one host"));
    }
    rule(route, at)
}

fn rule(route: &L4Route, at: &str) -> Result<L4Rule, FieldError> {
    let matches = route.r#match.iter().enumerate().map(|(i, m)| l4_match(m, &format!("{at}.match[{i}]")));
    let matches = matches.collect::<Result<Vec<_>, _>>()?;
    if route.route.is_empty() {
        return Err(FieldError::new(format!("{at}.route"), "is missing; name a destination"));
    }
    let destinations = route.route.iter().enumerate().map(|(i, d)| {
        let at = format!("{at}.route[{i}]");
        let weight = d.weight.map(|w| weight(w, &format!("{at}.weight"))).transpose()?;
        let destination = destination(&d.destination, &format!("{at}.destination"))?;
        Ok((weight, Weighted { weight: 0, destination, headers: HeaderOperations::default(), alone: false, authority: None }))
    });
    let destinations = destinations.collect::<Result<Vec<_>, FieldError>>()?;
    Ok(L4Rule { matches, destinations: weights(destinations, &format!("{at}.route"))? })
}

fn l4_match(document: &MatchDocument, at: &str) -> Result<L4Match, FieldError> {
    for (i, host) in document.sni_hosts.iter().enumerate() {
        check_host(host).map_err(|problem| FieldError::new(format!("{at}.sniHosts[{i}]"), problem))?;
    }
    let subnets = document.destination_subnets.iter().enumerate();
    let subnets = subnets.map(|(i, text)| subnet(text, &format!("{at}.destinationSubnets[{i}]"))).collect::<Result<_, _>>()?;
    Ok(L4Match {
        sni: document.sni_hosts.iter().map(|h| h.to_ascii_lowercase().into()).collect(),
        destinations: subnets,
        sources: document.source_subnet.iter().map(|t| subnet(t, &format!("{at}.sourceSubnet"))).collect::<Result<_, _>>()?,
        port: document.port.map(|p| port(p, &format!("{at}.port"))).transpose()?,
        source: SourceMatch {
            labels: document.source_labels.clone(),
            namespace: document.source_namespace.as_deref().filter(|n| !n.is_empty()).map(Arc::from),
            gateways: document.gateways.iter().map(|g| Arc::from(g.as_str())).collect(),
        },
    })
}

/// An address or a network.
fn subnet(text: &str, at: &str) -> Result<IpNet, FieldError> {
    let network = text.parse::<IpNet>().ok().or_else(|| text.parse::<std::net::IpAddr>().ok().map(IpNet::from));
    network.ok_or_else(|| FieldError::new(at, format!("{text:?} is not an address or a network such as 10.0.0.0/8")))
}
