//! A direct connection that is open: what is told of it.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use crate::{
    capture::{DirectFlow, Offered, Pair, Phase},
    config::Snapshot,
    proxy::{
        Failure, Proxy, ServedPod,
        live::Cut,
        outcome::{Direction, Outcome, Party},
    },
    route::{ClusterId, Target},
};

/// A flow that is open.
pub(super) struct Known {
    pub(super) flow: DirectFlow,
    pub(super) ends: Option<Ends>,
    /// By the source and by the destination.
    pub(super) outcomes: [Outcome; 2],
    pub(super) cut: Option<Cut>,
    _offered: Option<Offered>,
}

/// The pods it is between.
#[derive(Clone)]
pub(super) struct Ends {
    pub(super) source: Arc<ServedPod>,
    pub(super) destination: Arc<ServedPod>,
}

impl Known {
    pub(super) fn new(proxy: &Arc<Proxy>, snapshot: &Snapshot, ends: Option<Ends>, flow: &DirectFlow) -> Self {
        let party = |address: SocketAddr| {
            let workload = snapshot.workload_by_ip(address.ip()).cloned();
            Party { address: Some(address), identity: workload.as_ref().map(|w| w.identity.clone()), workload }
        };
        let (source, destination) = (party(flow.client), party(flow.endpoint));
        let view = source.workload.as_ref().map(|w| w.view.clone()).unwrap_or_default();
        let cluster = match snapshot.resolve_for(&view, flow.dialled) {
            Target::Service { service, port } => Some(ClusterId { service: service.name.clone(), port: port.port, subset: "".into() }),
            _ => None,
        };
        let outcomes = [Direction::Outbound, Direction::Inbound].map(|direction| {
            let mut outcome = Outcome::since(proxy, direction, flow.begun);
            (outcome.source, outcome.destination) = (source.clone(), destination.clone());
            outcome.direct = true;
            match direction {
                Direction::Outbound => {
                    outcome.asked = Some(flow.dialled);
                    outcome.cluster.clone_from(&cluster);
                }
                Direction::Inbound => outcome.dialled = cluster.as_ref().map(|cluster| cluster.service.clone()),
            }
            if flow.opened {
                outcome.opened();
            }
            outcome
        });
        let accelerate = [&source, &destination].iter().all(|p| p.workload.as_ref().is_some_and(|w| w.accelerate));
        let offered = match (&ends, proxy.accelerated()) {
            (Some(ends), Some(offers)) if flow.phase == Phase::Open && accelerate => {
                Some(offers.offer(Pair::of_flow(&ends.source.netns, &ends.destination.netns, flow)))
            }
            _ => None,
        };
        Self { flow: flow.clone(), ends, outcomes, cut: None, _offered: offered }
    }

    /// Takes in that it is established, if that was not known: it was to be ended while it was being dialled, and was not.
    pub(super) fn open(&mut self, flow: &DirectFlow) {
        if self.flow.is_same(flow) && !self.flow.opened {
            self.flow = flow.clone();
            self.outcomes.iter_mut().for_each(Outcome::opened);
        }
    }

    /// Counts and logs it.
    pub(super) fn close(mut self, flow: &DirectFlow) {
        if flow.opened {
            self.open(flow);
        }
        let [mut outbound, mut inbound] = self.outcomes;
        if let Some(cut) = self.cut {
            outbound.fail(Failure::Cut(cut));
            inbound.fail(Failure::Cut(cut));
        } else if !flow.opened {
            let problem = || io::Error::other("it did not accept the connection");
            outbound.fail(Failure::Dial { to: flow.endpoint, source: problem() });
            inbound.fail(Failure::Application { to: flow.endpoint, source: problem() });
        }
        carried(&[outbound, inbound], (flow.sent, flow.received));
    }

    /// It has carried so much, at least.
    pub(super) fn carried(&self, bytes: (u64, u64)) {
        carried(&self.outcomes, bytes);
    }
}

fn carried(outcomes: &[Outcome; 2], (sent, received): (u64, u64)) {
    for outcome in outcomes {
        outcome.traffic.sent.fetch_max(sent, Ordering::Relaxed);
        outcome.traffic.received.fetch_max(received, Ordering::Relaxed);
    }
}
