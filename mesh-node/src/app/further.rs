//! Addresses of served pods beyond those the configuration knows: of further devices, link-local ones, ones that move from pod to pod. What
//! comes to them is taken and judged like what comes to the pod's others; without a listener it would be refused.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    capture::{Capture, local_addresses},
    config::Snapshot,
    id::WorkloadUid,
    io::netns::Netns,
    telemetry::chain,
};

/// How often it is looked.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Most that are looked at, and most that are served, of one pod.
const MAX_READ: usize = 64;
const MAX_SERVED: usize = 16;

/// By pod.
#[derive(Debug, Default)]
pub struct Further {
    of: HashMap<WorkloadUid, BTreeSet<IpAddr>>,
    looked: Option<Instant>,
    /// Those that several pods have, of which that has been said.
    shared: BTreeSet<IpAddr>,
    /// Those that could not be served, of which that has been said.
    failed: BTreeSet<IpAddr>,
}

impl Further {
    pub fn is_due(&self) -> bool {
        self.looked.is_none_or(|looked| looked.elapsed() >= LOOK_INTERVAL)
    }

    /// What there is in the network namespaces of pods now. Asks each of them.
    pub async fn look(pods: Vec<(WorkloadUid, Arc<Netns>)>) -> Vec<(WorkloadUid, Vec<IpAddr>)> {
        let look = move || pods.into_iter().filter_map(|(uid, netns)| Some((uid, local_addresses(&netns, MAX_READ).ok()?))).collect();
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }

    /// Has what comes to these addresses accepted for their pods, and nothing any more for those that are gone. One that is a pod's by the
    /// configuration stays that, and one that several have is nobody's: the kernel would not tell them apart.
    pub fn take(
        &mut self,
        found: Vec<(WorkloadUid, Vec<IpAddr>)>,
        inbound: &HashMap<&WorkloadUid, &OwnedFd>,
        snapshot: &Snapshot,
        capture: &mut Capture,
    ) {
        self.looked = Some(Instant::now());
        let is_free = |ip: &IpAddr| snapshot.workload_by_ip(*ip).is_none();
        let mut had_by: HashMap<IpAddr, usize> = HashMap::new();
        for ip in found.iter().flat_map(|(_, all)| all.iter().collect::<BTreeSet<_>>()) {
            *had_by.entry(*ip).or_default() += 1;
        }
        self.failed.retain(|ip| had_by.contains_key(ip));
        let shared = had_by.iter().filter(|(ip, pods)| **pods > 1 && is_free(ip)).map(|(ip, _)| *ip).collect::<BTreeSet<_>>();
        for ip in shared.difference(&self.shared) {
            tracing::warn!(target: "app", address = %ip, "several pods have this address; what comes to it is refused");
        }
        self.shared = shared;
        let wanted = found.into_iter().filter(|(uid, _)| inbound.contains_key(uid)).map(|(uid, addresses)| {
            let own = addresses.into_iter().filter(|ip| is_free(ip) && !self.shared.contains(ip)).collect::<BTreeSet<_>>();
            (uid, own.into_iter().take(MAX_SERVED).collect::<BTreeSet<_>>())
        });
        let wanted = wanted.collect::<Vec<_>>();
        // First what is not theirs any more: it may be another's now.
        for (uid, wanted) in &wanted {
            let had = self.of.entry(uid.clone()).or_default();
            let gone = had.difference(wanted).copied().filter(is_free).collect::<Vec<_>>();
            capture.forget_addresses(&gone);
            had.retain(|ip| wanted.contains(ip));
        }
        for (uid, wanted) in wanted {
            let had = self.of.entry(uid.clone()).or_default();
            let Some(inbound) = inbound.get(&uid) else { continue };
            for ip in wanted {
                if had.contains(&ip) {
                    continue;
                }
                // One that fails is tried again when it is looked next.
                match capture.steer(ip, *inbound) {
                    Ok(()) => {
                        tracing::info!(target: "app", %uid, address = %ip, "a further address of a pod is served");
                        had.insert(ip);
                        self.failed.remove(&ip);
                    }
                    Err(error) if self.failed.insert(ip) => {
                        tracing::warn!(target: "app", %uid, address = %ip, error = chain(&error), "a further address of a pod is refused for now");
                    }
                    Err(_) => {}
                }
            }
        }
    }

    /// A pod that is not served any more, and what it had.
    pub fn forget(&mut self, uid: &WorkloadUid) -> Vec<IpAddr> {
        self.of.remove(uid).into_iter().flatten().collect()
    }
}
