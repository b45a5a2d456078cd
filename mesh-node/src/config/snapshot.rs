//! The immutable state of the mesh that one decision is made from.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::settings::MeshSettings;
use crate::{
    id::WorkloadUid,
    route::{Service, Target, Workload},
};

/// Everything the data path asks, as of one generation.
#[derive(Debug)]
pub struct Snapshot {
    pub generation: u64,
    pub mesh: Arc<MeshSettings>,
    pub(super) workloads: HashMap<WorkloadUid, Arc<Workload>>,
    pub(super) by_ip: HashMap<IpAddr, Arc<Workload>>,
    pub(super) services: Vec<Arc<Service>>,
    pub(super) by_vip: HashMap<IpAddr, Arc<Service>>,
    pub(super) by_external: HashMap<SocketAddr, Arc<Service>>,
}

impl Snapshot {
    /// A mesh in which nothing is known yet.
    pub fn empty(mesh: Arc<MeshSettings>) -> Self {
        Self {
            generation: 0,
            mesh,
            workloads: HashMap::new(),
            by_ip: HashMap::new(),
            services: Vec::new(),
            by_vip: HashMap::new(),
            by_external: HashMap::new(),
        }
    }

    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_ip.get(&ip)
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// What an address and port mean to a client in the mesh.
    pub fn resolve(&self, dst: SocketAddr) -> Target<'_> {
        if let Some(service) = self.by_vip.get(&dst.ip()) {
            return match service.port(dst.port()) {
                Some(port) => Target::Service { service, port },
                None => Target::NoSuchPort(service),
            };
        }
        if let Some((service, port)) = self.by_external.get(&dst).and_then(|s| Some((s, s.port(dst.port())?))) {
            return Target::Service { service, port };
        }
        self.by_ip.get(&dst.ip()).map_or(Target::Unknown, Target::Workload)
    }
}
