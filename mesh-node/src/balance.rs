//! Which endpoint of a cluster a request or connection goes to. Pure: dice, clock and health are arguments.

mod locality;
pub mod outlier;
mod table;

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

pub use table::{Table, hash};

use crate::{
    resource::selector::Labels,
    route::{
        cluster::{Cluster, Endpoint, Locality},
        traffic::{Balancer, Warmup},
    },
};

/// Throws until one is taken, when endpoints that warm up are passed over.
const WARMUP_THROWS: u32 = 16;
/// How far bits are turned for what decides between places, so that it says nothing of what decides between endpoints.
const PLACES: u32 = 17;

/// Who asks, and with what dice.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    pub client: IpAddr,
    /// All addresses of the client's pod.
    pub own: &'a [IpAddr],
    pub node: &'a str,
    pub locality: &'a Locality,
    pub labels: &'a Labels,
    /// Uniformly random bits.
    pub dice: u64,
    /// Counts requests to the cluster, for going round.
    pub turn: u64,
    /// Of the request, for consistent hashing.
    pub hash: Option<u64>,
    /// Endpoints to avoid as long as there are others.
    pub tried: &'a [SocketAddr],
    /// Endpoints asked before, in order, where those of other places are to be asked then.
    pub attempted: &'a [SocketAddr],
    /// Endpoints left out for now, and until when.
    pub ejected: &'a [(SocketAddr, Instant)],
    pub now: Instant,
}

impl Asker<'_> {
    fn is_ejected(&self, endpoint: &Endpoint) -> bool {
        self.ejected.iter().any(|(a, until)| *a == endpoint.address && *until > self.now)
    }

    /// What decides between places: the same for all that belongs to one endpoint.
    fn places(&self, balancer: &Balancer) -> u64 {
        match (balancer, self.hash) {
            (Balancer::Hash { .. }, Some(of)) => hash(&of.to_le_bytes()),
            (Balancer::ClientIp, _) => hash(self.client.to_string().as_bytes()),
            _ => self.dice.rotate_left(PLACES),
        }
    }
}

/// Picks an endpoint, or `None` when none can be used: of the client's address family, as long as there is one of it.
///
/// Ready endpoints are used; when there are none, those that still serve while they terminate, as kube-proxy does.
/// Ejected ones are left out, unless so few are left that the policy says to use all (panic, see [`locality`]). One already tried is
/// avoided as long as there is another, but where a hash decides, as with Istio.
pub fn pick<'a>(cluster: &'a Cluster, asker: &Asker<'_>) -> Option<&'a Endpoint> {
    let mut candidates = locality::narrow(cluster, asker, usable(cluster, (asker.client, asker.own), asker.node));
    if let (Balancer::Hash { .. }, Some(hash), Some(table)) = (&cluster.policy.balancer, asker.hash, &cluster.table) {
        let is_v4 = candidates.first()?.address.is_ipv4();
        let address = table.pick(hash, is_v4, |a| candidates.iter().any(|e| e.address == *a))?;
        return candidates.into_iter().find(|e| e.address == address);
    }
    avoid(&mut candidates, asker.tried);
    choose(cluster, asker, &candidates)
}

/// Those that a request may go to with one dice or another, in their order: what is near, listed and healthy, or all where the policy says so.
pub fn within_reach<'a>(cluster: &'a Cluster, asker: &Asker<'_>) -> Vec<&'a Endpoint> {
    // Weights are percents.
    const THROWS: u64 = 1000;
    let usable = usable(cluster, (asker.client, asker.own), asker.node);
    let mut found = HashSet::new();
    for throw in 0..THROWS {
        let dice = (u64::MAX / THROWS * throw).rotate_right(PLACES);
        found.extend(locality::narrow(cluster, &Asker { dice, ..*asker }, usable.clone()).into_iter().map(|e| e.address));
        if found.len() == usable.len() {
            break;
        }
    }
    usable.into_iter().filter(|e| found.contains(&e.address)).collect()
}

/// Those that a client of a node may be led to, healthy or not.
pub fn usable<'a>(cluster: &'a Cluster, (client, own): (IpAddr, &[IpAddr]), node: &str) -> Vec<&'a Endpoint> {
    let reachable = |e: &&Endpoint| !cluster.local_only || e.node.as_deref() == Some(node);
    let select = |v4: bool, test: fn(&Endpoint) -> bool| {
        cluster.endpoints.iter().filter(|e| e.address.is_ipv4() == v4).filter(reachable).filter(|e| test(e)).collect::<Vec<_>>()
    };
    // A route may lead to a Service that has one family, whichever the client dialled; where its pod has an address of that.
    let other = own.iter().any(|ip| ip.is_ipv4() != client.is_ipv4()).then(|| !client.is_ipv4());
    let families = std::iter::once(client.is_ipv4()).chain(other);
    let tests: [fn(&Endpoint) -> bool; 2] = [|e| e.ready, |e| e.serving_while_terminating];
    let all = families.flat_map(|v4| tests.map(|test| (v4, test)));
    all.map(|(v4, test)| select(v4, test)).find(|found| !found.is_empty()).unwrap_or_default()
}

fn avoid(candidates: &mut Vec<&Endpoint>, tried: &[SocketAddr]) {
    if !tried.is_empty() && candidates.iter().any(|e| !tried.contains(&e.address)) {
        candidates.retain(|e| !tried.contains(&e.address));
    }
}

/// How many endpoints a client of a place counts as a cluster's, of the address family of one of them: those that share what may be ejected.
pub fn counted(cluster: &Cluster, from: &Locality, like: SocketAddr) -> usize {
    let distribute = locality::distribute(cluster, from);
    let listed = |e: &Endpoint| distribute.is_none_or(|d| locality::listed(d, &e.locality).is_some());
    cluster.endpoints.iter().filter(|e| e.ready && e.address.is_ipv4() == like.is_ipv4() && listed(e)).count()
}

fn choose<'a>(cluster: &Cluster, asker: &Asker<'_>, candidates: &[&'a Endpoint]) -> Option<&'a Endpoint> {
    let warmup = cluster.policy.warmup.as_ref();
    match (&cluster.policy.balancer, warmup) {
        (Balancer::ClientIp, _) => candidates.iter().copied().max_by_key(|e| affinity(asker.client, e)),
        (Balancer::Unset | Balancer::LeastRequest | Balancer::Passthrough, None) => least_request(candidates, asker.dice),
        (Balancer::RoundRobin, None) => at(candidates, asker.turn),
        (Balancer::Random | Balancer::Hash { .. }, _) => at(candidates, asker.dice >> 16),
        (_, Some(warmup)) => warming(cluster, asker, candidates, warmup),
    }
}

fn at<'a>(candidates: &[&'a Endpoint], i: u64) -> Option<&'a Endpoint> {
    let n = candidates.len() as u64;
    let i = i.checked_rem(n).and_then(|i| usize::try_from(i).ok())?;
    candidates.get(i).copied()
}

/// The less loaded of two candidates picked at random, the first when they are level. They may be the same one, as with Envoy: a request that
/// stays (a watch, a `WebSocket`) must not keep all others from one of two endpoints.
fn least_request<'a>(candidates: &[&'a Endpoint], dice: u64) -> Option<&'a Endpoint> {
    let n = candidates.len() as u64;
    match n {
        0 => None,
        1 => candidates.first().copied(),
        _ => {
            let first = (dice >> 32) % n;
            let second = (dice & 0xffff_ffff) % n;
            let (a, b) = (at(candidates, first)?, at(candidates, second)?);
            Some(if b.load.current() < a.load.current() { b } else { a })
        }
    }
}

/// Throws again when an endpoint that warms up is not due for its turn.
fn warming<'a>(cluster: &Cluster, asker: &Asker<'_>, candidates: &[&'a Endpoint], warmup: &Warmup) -> Option<&'a Endpoint> {
    let mut dice = asker.dice;
    let mut found = None;
    for throw in 0..WARMUP_THROWS {
        found = match cluster.policy.balancer {
            Balancer::RoundRobin if throw == 0 => at(candidates, asker.turn),
            // What it is spared is for all others, and not for its neighbour alone.
            Balancer::RoundRobin => at(candidates, dice >> 16),
            _ => least_request(candidates, dice),
        };
        dice = hash(&dice.to_le_bytes());
        #[expect(clippy::cast_precision_loss, reason = "a share needs no more")]
        let thrown = (dice >> 11) as f64 / (1_u64 << 53) as f64;
        if found.is_none_or(|e| thrown < warmup.share(asker.now.saturating_duration_since(e.load.since()))) {
            break;
        }
    }
    found
}

/// Rendezvous hashing: a client keeps its endpoint while it exists, and only the clients of a lost one move.
fn affinity(client: IpAddr, endpoint: &Endpoint) -> u64 {
    hash(format!("{client} {}", endpoint.address).as_bytes())
}

#[cfg(test)]
mod tests;
