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
const LOOK: Duration = Duration::from_secs(2);
/// Most that are taken of one pod.
const MOST: usize = 16;

/// By pod.
#[derive(Debug, Default)]
pub struct Further {
    of: HashMap<WorkloadUid, BTreeSet<IpAddr>>,
    looked: Option<Instant>,
}

impl Further {
    pub fn is_due(&self) -> bool {
        self.looked.is_none_or(|looked| looked.elapsed() >= LOOK)
    }

    /// What there is in the network namespaces of pods now. Asks each of them.
    pub async fn look(pods: Vec<(WorkloadUid, Arc<Netns>)>) -> Vec<(WorkloadUid, Vec<IpAddr>)> {
        let look = move || pods.into_iter().filter_map(|(uid, netns)| Some((uid, local_addresses(&netns).ok()?))).collect();
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }

    /// Has what comes to these addresses accepted for their pods, and nothing any more for those that are gone. One that is a pod's by the
    /// configuration, or another's already, stays theirs.
    pub fn take(
        &mut self,
        found: Vec<(WorkloadUid, Vec<IpAddr>)>,
        inbound: &HashMap<&WorkloadUid, &OwnedFd>,
        snapshot: &Snapshot,
        capture: &mut Capture,
    ) {
        self.looked = Some(Instant::now());
        let theirs = self.of.iter().flat_map(|(uid, all)| all.iter().map(|ip| (*ip, uid.clone())));
        let mut owners = theirs.collect::<HashMap<_, _>>();
        for (uid, addresses) in found {
            let Some(inbound) = inbound.get(&uid) else { continue };
            let mut is_free =
                |ip: &IpAddr| snapshot.workload_by_ip(*ip).is_none() && *owners.entry(*ip).or_insert_with(|| uid.clone()) == uid;
            let wanted = addresses.into_iter().filter(|ip| !ip.is_loopback() && is_free(ip));
            let wanted = wanted.collect::<BTreeSet<_>>().into_iter().take(MOST).collect::<BTreeSet<_>>();
            let had = self.of.entry(uid.clone()).or_default();
            let gone = had.difference(&wanted).copied().filter(|ip| snapshot.workload_by_ip(*ip).is_none()).collect::<Vec<_>>();
            capture.forget_addresses(&gone);
            for ip in wanted.difference(had) {
                match capture.steer(*ip, *inbound) {
                    Ok(()) => tracing::info!(target: "app", %uid, address = %ip, "a further address of a pod is served"),
                    Err(error) => {
                        tracing::warn!(target: "app", %uid, address = %ip, error = chain(&error), "a further address of a pod is refused");
                    }
                }
            }
            *had = wanted;
        }
    }

    /// A pod that is not served any more, and what it had.
    pub fn forget(&mut self, uid: &WorkloadUid) -> Vec<IpAddr> {
        self.of.remove(uid).into_iter().flatten().collect()
    }
}
