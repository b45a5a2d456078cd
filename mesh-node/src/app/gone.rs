//! What pods that are gone leave in the kernel.

use std::{net::IpAddr, time::Duration};

use super::node::Node;

/// Has the kernel forget flows to a pod that is gone, when all of them have ended: what was noted of them then, and still is a while later.
pub(super) async fn forget_flows(node: &Node, addresses: &[IpAddr]) {
    const ENDED: Duration = Duration::from_secs(1);
    tokio::time::sleep(ENDED).await;
    let before = node.capture().noted_flows(addresses);
    if before.is_empty() {
        return;
    }
    tokio::time::sleep(ENDED).await;
    let capture = node.capture();
    let still = capture.noted_flows(addresses);
    capture.forget_flows(&before.intersection(&still).cloned().collect());
}
