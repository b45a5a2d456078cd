//! What there is of a pod that is served.

use std::{os::fd::OwnedFd, sync::Arc};

use super::listeners::Serving;
use crate::{proxy::ServedPod, route::Workload};

/// A pod that is served, with what serves it.
pub(super) struct Served {
    pub pod: Arc<ServedPod>,
    pub netns_cookie: u64,
    pub serving: Serving,
    /// Another descriptor of the inbound listener, for addresses that come later.
    pub inbound: OwnedFd,
    /// Its connections may go past the proxy.
    pub direct: bool,
}

impl Served {
    pub fn has_to_change(&self, workload: &Workload) -> bool {
        **self.pod.addresses() != workload.ips || self.direct != workload.accelerate || self.serving.is_over()
    }
}
