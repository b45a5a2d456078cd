//! What pods that are gone leave in the kernel.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use super::node::Node;

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
