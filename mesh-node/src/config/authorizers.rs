//! External authorizers, and where questions to them lead.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use super::Snapshot;
use crate::resource::mesh_config::Authorizer;

/// External authorizers by name.
#[derive(Debug, Default)]
pub struct Authorizers(HashMap<Arc<str>, Known>);

#[derive(Debug)]
struct Known {
    authorizer: Arc<Authorizer>,
    /// Addresses nobody can be let into before it has answered, once somebody has asked for them.
    ways: OnceLock<HashSet<SocketAddr>>,
}

impl FromIterator<Arc<Authorizer>> for Authorizers {
    fn from_iter<I: IntoIterator<Item = Arc<Authorizer>>>(all: I) -> Self {
        let known = |authorizer: Arc<Authorizer>| (authorizer.name.clone(), Known { authorizer, ways: OnceLock::new() });
        Self(all.into_iter().map(known).collect())
    }
}

impl Authorizers {
    pub fn get(&self, name: &str) -> Option<&Arc<Authorizer>> {
        self.0.get(name).map(|known| &known.authorizer)
    }
}

impl Snapshot {
    /// Whether questions to an authorizer lead to an address: it is the authorizer's own, or that of one who is asked about them.
    /// Who that is depends on where they go, and on nothing else that policies ask for.
    pub fn is_asked_first(&self, provider: &str, address: SocketAddr) -> bool {
        let known = self.authorizers.0.get(provider);
        known.is_some_and(|known| known.ways.get_or_init(|| self.ways(known)).contains(&address))
    }

    fn ways<'s>(&'s self, first: &'s Known) -> HashSet<SocketAddr> {
        let (mut left, mut seen, mut ways) = (vec![first], HashSet::from([&*first.authorizer.name]), HashSet::new());
        while let Some(Known { authorizer, .. }) = left.pop() {
            let Some(cluster) = self.cluster_at(None, &authorizer.service, authorizer.port) else { continue };
            for address in cluster.endpoints.iter().map(|e| e.address) {
                // Of what two of them share, all that is asked is known.
                if !ways.insert(address) {
                    continue;
                }
                // Nobody is asked about what goes to others.
                let Some(workload) = self.workload_by_ip(address.ip()).filter(|w| w.enrolled) else { continue };
                let asked = workload.policy.at(address.port()).authorizers_of(address).filter(|name| seen.insert(name));
                left.extend(asked.filter_map(|name| self.authorizers.0.get(name)));
            }
        }
        ways
    }
}
