//! Keeping traffic near, and away from endpoints that are ejected: priorities by locality or labels with failover, and distribution by
//! weight.
//!
//! Priorities count only with outlier detection, as in Istio: without it nothing tells a bad locality. A level that has
//! lost endpoints keeps its traffic as long as 1.4 times its healthy share covers it (Envoy's overprovisioning factor). Where all levels
//! together do not cover it, those with fewer healthy endpoints than the policy asks for are used whole (Envoy's panic).

use super::Asker;
use crate::route::{
    cluster::{Cluster, Endpoint, Locality, Near},
    rule::pick_weighted,
    traffic,
};

/// Percent of its traffic a percent of healthy endpoints carries, times 100.
const OVERPROVISION: usize = 140;

/// The candidates of the locality, or level, that the dice pick.
pub(super) fn narrow<'a>(cluster: &Cluster, asker: &Asker<'_>, mut candidates: Vec<&'a Endpoint>) -> Vec<&'a Endpoint> {
    let (settings, outlier) = (&cluster.policy.locality, cluster.policy.outlier.as_ref());
    let panic = outlier.map_or(0, |o| o.min_health_percent) as usize;
    let distributes = settings.enabled && !settings.distribute.is_empty();
    // What a DestinationRule says of places takes the place of what the Service prefers.
    if let Some(near) = cluster.near.filter(|_| !settings.given) {
        nearest(near, asker, &mut candidates);
    }
    let known = !asker.locality.region.is_empty() || !settings.failover_priority.is_empty();
    if !settings.enabled || distributes || outlier.is_none() || !known {
        let healthy = if asker.ejected.is_empty() { candidates } else { by_health(vec![candidates], asker, panic) };
        let from = settings.distribute.iter().filter(|_| distributes).find(|d| matches(&d.from, asker.locality));
        return match from {
            Some(distribute) => distributed(distribute, asker, &healthy),
            None => healthy,
        };
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
    by_health(levels.into_iter().map(|(_, level)| level).collect(), asker, panic)
}

/// Leaves those of the nearest group in which one is healthy.
fn nearest(near: Near, asker: &Asker<'_>, candidates: &mut Vec<&Endpoint>) {
    let rank = |e: &Endpoint| {
        let (mine, its) = (asker.locality, &e.locality);
        let node = near == Near::Node;
        let same = [
            mine.region == its.region,
            mine.zone == its.zone,
            node && mine.subzone == its.subzone,
            node && e.node.as_deref() == Some(asker.node),
        ];
        same.into_iter().take_while(|same| *same).count()
    };
    let best = candidates.iter().filter(|e| !asker.is_ejected(e)).map(|e| rank(e)).max();
    if let Some(best) = best {
        candidates.retain(|e| rank(e) == best);
    }
}

/// What is healthy of the level that the dice pick; all of it where it has less than `panic` percent, and there is not enough elsewhere.
fn by_health<'a>(mut levels: Vec<Vec<&'a Endpoint>>, asker: &Asker<'_>, panic: usize) -> Vec<&'a Endpoint> {
    let healthy = levels.iter().map(|level| level.iter().filter(|e| !asker.is_ejected(e)).count()).collect::<Vec<_>>();
    let share = |(level, healthy): (&Vec<&Endpoint>, &usize)| (OVERPROVISION * healthy / level.len().max(1)).min(100);
    let carried = levels.iter().zip(&healthy).map(share).collect::<Vec<_>>();
    let covered = carried.iter().sum::<usize>() >= 100;
    let panics = |i: usize| !covered && 100 * healthy[i] < panic * levels[i].len();
    let in_panic = (0..levels.len()).map(panics).collect::<Vec<_>>();
    let mut left = 100;
    let loads = if in_panic.iter().all(|p| *p) {
        levels.iter().map(Vec::len).collect::<Vec<_>>()
    } else {
        // Not covered even together: each carries its share of what there is.
        let load = |share: &usize| {
            let load = left.min(*share);
            left -= load;
            load
        };
        carried.iter().map(load).collect()
    };
    let loads = loads.into_iter().map(|load| u32::try_from(load).unwrap_or(u32::MAX));
    let Some(picked) = pick_weighted(loads, asker.dice.rotate_left(17)) else { return Vec::new() };
    let mut level = levels.swap_remove(picked);
    if !in_panic[picked] {
        level.retain(|e| !asker.is_ejected(e));
    }
    level
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
            Some((key, value)) => endpoint_label(endpoint, key) == Some(value),
            None => endpoint_label(endpoint, label) == asker_label(asker, label),
        };
        let labels = settings.failover_priority.len() - settings.failover_priority.iter().take_while(same).count();
        // Within what is level by labels, regions fail over as they do alone.
        return if settings.failover.is_empty() { labels } else { labels * LEVELS + by_place(settings, asker, endpoint) };
    }
    by_place(settings, asker, endpoint)
}

/// Levels that localities make.
const LEVELS: usize = 5;

fn by_place(settings: &traffic::Locality, asker: &Asker<'_>, endpoint: &Endpoint) -> usize {
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
