//! Connections that are under way into this node's pods, so that a policy change can end those it denies.
//!
//! A connection registers before its policy is checked: a change between the two is seen by one or the other.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    capture::Offered,
    config::Snapshot,
    detect::Protocol,
    id::WorkloadUid,
    policy::{Facts, Sni},
    resource::mesh_config::Authorizer,
    route::Workload,
};

/// Why a connection is ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    PolicyChanged,
    PodGone,
    /// A direct connection, one of whose pods has left the mesh.
    LeftTheMesh,
    Shutdown,
    /// It had no traffic for as long as its destination allows.
    Idle,
    /// It lasted as long as its destination allows.
    MaxDuration,
    /// The peer's certificate has been taken back.
    Revoked,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PolicyChanged => "connection closed due to policy change",
            Self::PodGone => "the pod is gone",
            Self::LeftTheMesh => "one of the pods is not in the mesh any more",
            Self::Shutdown => "the proxy is shutting down",
            Self::Idle => "the connection was idle for longer than its DestinationRule allows",
            Self::MaxDuration => "the connection lasted longer than its DestinationRule allows",
            Self::Revoked => "the peer's certificate has been revoked",
        })
    }
}

/// The registry; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Live(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    // Sharded by nothing: touched once when a connection opens and once when it closes.
    entries: Mutex<HashMap<u64, Entry>>,
}

#[derive(Debug)]
struct Entry {
    workload: WorkloadUid,
    facts: Facts,
    carries: Carries,
    /// The external authorizers that let it pass; others, or the same as they are set now, have never been asked.
    allowed_by: Vec<Arc<Authorizer>>,
    cut: watch::Sender<Option<Cut>>,
}

/// What is known of what a connection carries: it decides which policies it is held to when they change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carries {
    /// Nobody looks: policies that ask about requests cannot be met, so the connection has to be made again.
    Unknown,
    /// It is being looked at; what it turns out to be is judged then.
    Undecided,
    /// No requests.
    Opaque,
    /// Requests, each of which is judged by the policies of its own time.
    Requests,
}

impl Entry {
    fn is_denied(&self, workload: &Workload, snapshot: &Snapshot) -> bool {
        is_denied(workload, &self.facts, self.carries, &snapshot.unchanged(&self.allowed_by))
    }
}

/// Whether policy ends a connection that was let in. `allowed_by`: the external authorizers that let it pass.
pub(super) fn is_denied(workload: &Workload, facts: &Facts, carries: Carries, allowed_by: &[Arc<str>]) -> bool {
    let policy = &workload.policy;
    let opaque = matches!(workload.protocol(facts.destination.port()), Protocol::Tcp | Protocol::Tls);
    match carries {
        Carries::Unknown if !opaque => !policy.allows_uninspected(facts),
        Carries::Undecided | Carries::Requests => policy.connection(facts).is_err(),
        Carries::Unknown | Carries::Opaque => policy.opaque(facts, allowed_by).is_err(),
    }
}

/// A registered connection; dropping it removes it.
#[derive(Debug)]
pub struct Registration {
    id: u64,
    live: Live,
    cut: watch::Receiver<Option<Cut>>,
    /// The connection to the application, on offer to be accelerated as long as this lives.
    offered: Option<Offered>,
}

impl Live {
    pub fn register(&self, workload: WorkloadUid, facts: Facts) -> Registration {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = watch::channel(None);
        self.0.entries.lock().insert(id, Entry { workload, facts, carries: Carries::Undecided, allowed_by: Vec::new(), cut: sender });
        Registration { id, live: self.clone(), cut: receiver, offered: None }
    }

    /// Cuts the connections this snapshot's policies deny; how many.
    pub fn recheck(&self, snapshot: &Snapshot) -> usize {
        let entries = self.0.entries.lock();
        let denied = entries.values().filter(|e| {
            // A workload that is gone from the configuration is the pod watcher's business: its end is not a policy change.
            snapshot.workload(&e.workload).is_some_and(|w| e.is_denied(w, snapshot))
        });
        denied.filter(|e| e.cut.send_replace(Some(Cut::PolicyChanged)).is_none()).count()
    }
}

/// Says what a registered connection carries, while somebody waits for its end.
#[derive(Debug)]
pub struct Note {
    id: u64,
    live: Live,
}

impl Note {
    /// Takes in what the connection carries. To be called before that is judged: a change of policy is then seen by one or
    /// the other.
    pub fn carries(&self, carries: Carries) {
        if let Some(entry) = self.live.0.entries.lock().get_mut(&self.id) {
            entry.carries = carries;
        }
    }

    /// The same, of a connection without requests.
    pub fn carries_opaque(&self, sni: &Sni, allowed_by: &[Arc<Authorizer>]) {
        if let Some(entry) = self.live.0.entries.lock().get_mut(&self.id) {
            entry.carries = Carries::Opaque;
            entry.facts.sni = sni.clone();
            entry.allowed_by = allowed_by.to_vec();
        }
    }
}

impl Registration {
    /// Keeps the connection to the application on offer to be accelerated.
    pub fn hold(&mut self, offered: Option<Offered>) {
        self.offered = offered;
    }

    pub fn note(&self) -> Note {
        Note { id: self.id, live: self.live.clone() }
    }

    /// Completes when the connection is to end.
    pub async fn cut(&mut self) -> Cut {
        let cut = self.cut.wait_for(Option::is_some).await.map(|cut| *cut);
        match cut {
            Ok(cut) => cut.unwrap_or(Cut::Shutdown),
            // The entry lives as long as this registration.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.live.0.entries.lock().remove(&self.id);
    }
}
