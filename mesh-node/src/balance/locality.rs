//! Keeping traffic near: priorities by locality or labels with failover, and distribution by weight.
//!
//! Priorities count only with outlier detection, as in Istio: without it nothing tells a bad locality. A level that has
//! lost endpoints keeps its traffic as long as 1.4 times its healthy share covers it (Envoy's overprovisioning factor).

use super::Asker;
use crate::route::{
    cluster::{Cluster, Endpoint, Locality},
    rule::pick_weighted,
    traffic,
};

/// Percent of its traffic a percent of healthy endpoints carries, times 100.
const OVERPROVISION: usize = 140;

/// Whether localities narrow the choice in this cluster.
pub(super) fn counts(cluster: &Cluster) -> bool {
    let settings = &cluster.policy.locality;
    settings.enabled && (!settings.distribute.is_empty() || cluster.policy.outlier.is_some())
}

/// The candidates of the locality, or level, that the dice pick. `trusted` is false in panic: then health does not count.
pub(super) fn narrow<'a>(cluster: &Cluster, asker: &Asker<'_>, mut candidates: Vec<&'a Endpoint>, trusted: bool) -> Vec<&'a Endpoint> {
    if !counts(cluster) {
        return candidates;
    }
    let settings = &cluster.policy.locality;
    if let Some(distribute) = settings.distribute.iter().find(|d| matches(&d.from, asker.locality)) {
        if trusted {
            candidates.retain(|e| !asker.is_ejected(e));
        }
        return distributed(distribute, asker, &candidates);
    }
    let known = !asker.locality.region.is_empty() || !settings.failover_priority.is_empty();
    if cluster.policy.outlier.is_none() || !known {
        candidates.retain(|e| !trusted || !asker.is_ejected(e));
        return candidates;
    }
    let mut levels: Vec<(usize, Vec<&Endpoint>)> = Vec::new();
    for endpoint in candidates {
        let priority = priority(settings, asker, endpoint);
        match levels.iter_mut().find(|(p, _)| *p == priority) {
            Some((_, level)) => level.push(endpoint),
            None => levels.push((priority, vec![endpoint])),
        }
    }
    levels.sort_by_key(|(p, _)| *p);
    by_health(levels.into_iter().map(|(_, level)| level).collect(), asker, trusted)
}

fn by_health<'a>(mut levels: Vec<Vec<&'a Endpoint>>, asker: &Asker<'_>, trusted: bool) -> Vec<&'a Endpoint> {
    let mut left = 100;
    let mut loads = Vec::new();
    for level in &mut levels {
        let total = level.len().max(1);
        if trusted {
            level.retain(|e| !asker.is_ejected(e));
        }
        let load = (OVERPROVISION * level.len() / total).min(left);
        left -= load;
        loads.push(u32::try_from(load).unwrap_or(0));
    }
    // Not covered even together: each carries its share of what there is.
    let picked = pick_weighted(loads.into_iter(), asker.dice.rotate_left(17));
    picked.map(|i| levels.swap_remove(i)).unwrap_or_default()
}

fn distributed<'a>(distribute: &traffic::Distribute, asker: &Asker<'_>, candidates: &[&'a Endpoint]) -> Vec<&'a Endpoint> {
    let of = |to: &str| candidates.iter().filter(|e| matches(to, &e.locality)).copied().collect::<Vec<_>>();
    let groups = distribute.to.iter().map(|(to, weight)| (of(to), *weight)).filter(|(group, _)| !group.is_empty()).collect::<Vec<_>>();
    let picked = pick_weighted(groups.iter().map(|(_, w)| *w), asker.dice.rotate_left(17));
    picked.and_then(|i| groups.into_iter().nth(i)).map(|(group, _)| group).unwrap_or_default()
}

/// `region/zone/subzone`, in which `*` and what is missing at the end stand for anything.
fn matches(pattern: &str, locality: &Locality) -> bool {
    let parts = [&locality.region, &locality.zone, &locality.subzone];
    pattern.split('/').zip(parts).all(|(wanted, part)| wanted == "*" || wanted == &**part)
}

/// 0 is nearest.
fn priority(settings: &traffic::Locality, asker: &Asker<'_>, endpoint: &Endpoint) -> usize {
    if !settings.failover_priority.is_empty() {
        let same = |label: &&std::sync::Arc<str>| match label.split_once('=') {
            Some((key, value)) => endpoint.labels.get(key) == Some(value),
            None => endpoint_label(endpoint, label) == asker_label(asker, label),
        };
        return settings.failover_priority.len() - settings.failover_priority.iter().take_while(same).count();
    }
    let (mine, its) = (asker.locality, &endpoint.locality);
    if mine.region != its.region {
        return match settings.failover.get(&mine.region) {
            Some(to) if *to != its.region => 4,
            _ => 3,
        };
    }
    match (mine.zone == its.zone, mine.subzone == its.subzone) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => 2,
    }
}

/// Well-known labels of a place are those of the node, others the pod's.
fn place<'a>(locality: &'a Locality, label: &str) -> Option<&'a str> {
    match label {
        "topology.kubernetes.io/region" => Some(&locality.region),
        "topology.kubernetes.io/zone" => Some(&locality.zone),
        "topology.istio.io/subzone" => Some(&locality.subzone),
        _ => None,
    }
}

fn endpoint_label<'a>(endpoint: &'a Endpoint, label: &str) -> Option<&'a str> {
    match label {
        "kubernetes.io/hostname" => endpoint.node.as_deref(),
        _ => place(&endpoint.locality, label).or_else(|| endpoint.labels.get(label)),
    }
}

fn asker_label<'a>(asker: &Asker<'a>, label: &str) -> Option<&'a str> {
    match label {
        "kubernetes.io/hostname" => Some(asker.node),
        _ => place(asker.locality, label).or_else(|| asker.labels.get(label)),
    }
}
