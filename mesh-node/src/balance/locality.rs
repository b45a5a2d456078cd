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

/// The candidates of the locality, or level, that the dice pick, or the hash.
pub(super) fn narrow<'a>(cluster: &Cluster, asker: &Asker<'_>, mut candidates: Vec<&'a Endpoint>) -> Vec<&'a Endpoint> {
    let (settings, outlier) = (&cluster.policy.locality, cluster.policy.outlier.as_ref());
    let panic = outlier.map_or(0, |o| o.min_health_percent) as usize;
    let dice = || asker.places(&cluster.policy.balancer);
    // What a DestinationRule says of places takes the place of what the Service prefers.
    if let Some(near) = cluster.near.filter(|_| !settings.given) {
        nearest(near, asker, &mut candidates);
    }
    let known = !asker.locality.region.is_empty() || !settings.failover_priority.is_empty();
    let distributes = settings.enabled && !settings.distribute.is_empty();
    if !settings.enabled || distributes || outlier.is_none() || !known {
        let distribute = distribute(cluster, asker.locality);
        if let Some(distribute) = distribute {
            let is_listed =
                |e: &Endpoint| listed(distribute, &e.locality).and_then(|i| distribute.to.get(i)).is_some_and(|(_, weight)| *weight > 0);
            candidates.retain(|e| is_listed(e));
        }
        avoid_localities(cluster, asker, &mut candidates);
        return match distribute {
            Some(distribute) => distributed(distribute, asker, &candidates, panic, dice),
            None if asker.ejected.is_empty() => candidates,
            None => by_health(vec![candidates], asker, panic, dice),
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
    let mut levels = levels.into_iter().map(|(_, level)| level).collect::<Vec<_>>();
    avoid_levels(asker, &mut levels);
    by_health(levels, asker, panic, dice)
}

/// Leaves out localities that have been asked, as long as there are others.
fn avoid_localities(cluster: &Cluster, asker: &Asker<'_>, candidates: &mut Vec<&Endpoint>) {
    if asker.attempted.is_empty() {
        return;
    }
    let tried = cluster.endpoints.iter().filter(|e| asker.attempted.contains(&e.address)).map(|e| &e.locality).collect::<Vec<_>>();
    let fresh = |e: &Endpoint| !tried.contains(&&e.locality) && !asker.is_ejected(e);
    if !tried.is_empty() && candidates.iter().any(|e| fresh(e)) {
        candidates.retain(|e| fresh(e));
    }
}

/// Leaves out levels that have been asked, of which what is to be avoided is found out after every second attempt: Envoy's `previous_priorities`
/// with Istio's frequency of two. When all have been asked it begins anew.
fn avoid_levels(asker: &Asker<'_>, levels: &mut Vec<Vec<&Endpoint>>) {
    let (mut gone_to, mut avoided) = (Vec::new(), Vec::new());
    for address in asker.attempted {
        gone_to.push(levels.iter().position(|level| level.iter().any(|e| e.address == *address)));
        if gone_to.len() % 2 == 0 {
            avoided = gone_to.iter().copied().flatten().collect::<Vec<_>>();
            let is_left = |(i, level): (usize, &Vec<&Endpoint>)| !avoided.contains(&i) && level.iter().any(|e| !asker.is_ejected(e));
            if !levels.iter().enumerate().any(is_left) {
                gone_to.clear();
                avoided.clear();
            }
        }
    }
    let mut number = 0..;
    levels.retain(|_| number.next().is_none_or(|i| !avoided.contains(&i)));
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

/// How many percent of its traffic a level or place carries: something, as long as anything of it is healthy.
fn carries(healthy: usize, all: usize) -> usize {
    (OVERPROVISION * healthy / all.max(1)).clamp(healthy.min(1), 100)
}

/// What is healthy of the level that the dice pick; all of it where it has less than `panic` percent, and there is not enough elsewhere.
fn by_health<'a>(mut levels: Vec<Vec<&'a Endpoint>>, asker: &Asker<'_>, panic: usize, dice: impl Fn() -> u64) -> Vec<&'a Endpoint> {
    let healthy = levels.iter().map(|level| level.iter().filter(|e| !asker.is_ejected(e)).count()).collect::<Vec<_>>();
    let share = |(level, healthy): (&Vec<&Endpoint>, &usize)| carries(*healthy, level.len());
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
    let Some(picked) = pick_weighted(loads, dice()) else { return Vec::new() };
    let mut level = levels.swap_remove(picked);
    if !in_panic[picked] {
        level.retain(|e| !asker.is_ejected(e));
    }
    level
}

/// What a client of a place is to distribute its traffic by, if anything.
pub(super) fn distribute<'c>(cluster: &'c Cluster, from: &Locality) -> Option<&'c traffic::Distribute> {
    let settings = &cluster.policy.locality;
    settings.distribute.iter().filter(|_| settings.enabled).find(|d| matches(&d.from, from))
}

/// Which of the patterns a locality is listed by, the first of several. What is not listed is as if it were not there, as Istio has it.
pub(super) fn listed(distribute: &traffic::Distribute, locality: &Locality) -> Option<usize> {
    distribute.to.iter().position(|(to, _)| matches(to, locality))
}

/// The endpoints of one place.
struct Place<'a> {
    locality: &'a Locality,
    /// The pattern it is listed by.
    pattern: usize,
    all: Vec<&'a Endpoint>,
    healthy: usize,
}

/// What is healthy of the place that the dice pick, by weight. A pattern's weight is its places', by the number of their endpoints; of a place that
/// has lost endpoints it is only as much as 1.4 times its healthy share. In panic any endpoint is used, whatever the weights.
fn distributed<'a>(
    distribute: &traffic::Distribute,
    asker: &Asker<'_>,
    candidates: &[&'a Endpoint],
    panic: usize,
    dice: impl Fn() -> u64,
) -> Vec<&'a Endpoint> {
    let mut places: Vec<Place<'a>> = Vec::new();
    for endpoint in candidates {
        let Some(pattern) = listed(distribute, &endpoint.locality) else { continue };
        let found = places.iter().position(|place| *place.locality == endpoint.locality);
        let place = found.unwrap_or_else(|| {
            places.push(Place { locality: &endpoint.locality, pattern, all: Vec::new(), healthy: 0 });
            places.len() - 1
        });
        places[place].all.push(endpoint);
        places[place].healthy += usize::from(!asker.is_ejected(endpoint));
    }
    let sum = |of: fn(&Place<'_>) -> usize| places.iter().map(of).sum::<usize>();
    let (all, healthy) = (sum(|place| place.all.len()), sum(|place| place.healthy));
    if OVERPROVISION * healthy < 100 * all && 100 * healthy < panic * all {
        return places.into_iter().flat_map(|place| place.all).collect();
    }
    let weight = |place: &Place<'_>| {
        let of_pattern = places.iter().filter(|other| other.pattern == place.pattern).map(|other| other.all.len()).sum::<usize>();
        let share = carries(place.healthy, place.all.len());
        let weight = distribute.to.get(place.pattern).map_or(0, |(_, weight)| *weight as usize);
        // In tenths of a thousandth: no place gets nothing for being one of many.
        u32::try_from(weight * 100 * share * place.all.len() / of_pattern.max(1)).unwrap_or(u32::MAX)
    };
    let weights = places.iter().map(weight).collect::<Vec<_>>();
    let Some(picked) = pick_weighted(weights.iter().copied(), dice()) else { return Vec::new() };
    let mut all = places.swap_remove(picked).all;
    all.retain(|e| !asker.is_ejected(e));
    all
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
            Some((key, value)) => endpoint.label(key) == Some(value),
            None => endpoint.label(label) == asker_label(asker, label),
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

fn asker_label<'a>(asker: &Asker<'a>, label: &str) -> Option<&'a str> {
    match label {
        "kubernetes.io/hostname" => Some(asker.node),
        _ => place(asker.locality, label).filter(|place| !place.is_empty()).or_else(|| asker.labels.get(label)),
    }
}
