//! Pods that are gone, or not there: what they leave in the kernel, and since when none of their processes is found.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::node::Node;
use crate::{capture::LocalPod, id::WorkloadUid, route::Workload};

/// Pods of which no process is found, since when.
#[derive(Debug, Default)]
pub(super) struct Absent(HashMap<WorkloadUid, Instant>);

impl Absent {
    /// Takes in which of this node's pods are found.
    pub(super) fn look(&mut self, own: &[Arc<Workload>], found: &HashMap<WorkloadUid, LocalPod>) {
        self.0.retain(|uid, _| own.iter().any(|w| w.uid == *uid));
        for workload in own {
            if found.contains_key(&workload.uid) {
                self.0.remove(&workload.uid);
            } else {
                self.0.entry(workload.uid.clone()).or_insert_with(Instant::now);
            }
        }
    }

    pub(super) fn since(&self, uid: &WorkloadUid) -> Option<Instant> {
        self.0.get(uid).copied()
    }
}

/// Has the kernel forget flows to a pod that is gone, when all of them have ended.
pub(super) async fn forget_flows(node: &Node, addresses: &[IpAddr]) {
    const ENDED: Duration = Duration::from_secs(1);
    tokio::time::sleep(ENDED).await;
    forget(node, |ip| addresses.contains(&ip)).await;
}

/// The same of flows to what is no pod of this node: some may have gone while no process was watching.
pub(super) async fn forget_strays(node: &Node) {
    let served = node.proxy.pods.all().iter().flat_map(|pod| pod.addresses().to_vec()).collect::<HashSet<_>>();
    forget(node, |ip| !served.contains(&ip)).await;
}

/// What is noted, and still is a while later, is not of a flow that is just being opened.
async fn forget(node: &Node, to: impl Fn(IpAddr) -> bool) {
    const OPENED: Duration = Duration::from_secs(1);
    let before = node.capture().noted_flows(&to);
    if before.is_empty() {
        return;
    }
    tokio::time::sleep(OPENED).await;
    let capture = node.capture();
    let still = capture.noted_flows(to);
    capture.forget_flows(&before.intersection(&still).cloned().collect());
}
