//! The pods this process serves, by UID.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch};

use super::{
    http::{Clusters, Share},
    limits::{Callers, HANDSHAKES, Holds, Place},
    live::Cut,
};
use crate::{id::WorkloadUid, io::netns::Netns};

/// How long a client's idle connection is kept while its pod drains.
const LAST_REQUEST: std::time::Duration = std::time::Duration::from_millis(500);

/// How far a pod is from being let go of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Serving,
    /// Connections that were there are asked to go elsewhere; others are still taken.
    Leaving,
    /// No more are taken, and all are asked to go.
    Closing,
}

/// A pod whose listeners this process holds.
#[derive(Debug)]
pub struct ServedPod {
    pub uid: WorkloadUid,
    pub netns: Arc<Netns>,
    addresses: ArcSwap<Vec<IpAddr>>,
    ended: watch::Sender<Option<Cut>>,
    stage: watch::Sender<Stage>,
    /// Held by every connection that is taken, and says when it came; replaced when those that are there are asked to leave.
    here: ArcSwap<Stage>,
    /// It cannot be served for the moment, and is cut off.
    held: AtomicBool,
    /// What it has under way to other services.
    pub clusters: Clusters,
    /// What its requests keep of bodies.
    pub kept: Share,
    handshakes: Semaphore,
    shaking: Callers,
    /// What it has of what pods share.
    pub holds: Holds,
    /// What the kernel says of who is at the other end.
    origins: OnceLock<Box<dyn Origins>>,
    cookie: OnceLock<u64>,
}

/// Knows which connections come from the pod's own node, outside of any pod.
pub trait Origins: Send + Sync + std::fmt::Debug {
    fn is_node(&self, client: SocketAddr, destination: SocketAddr) -> bool;
}

impl ServedPod {
    pub fn new(uid: WorkloadUid, netns: Arc<Netns>, addresses: Vec<IpAddr>) -> Arc<Self> {
        Arc::new(Self {
            uid,
            netns,
            addresses: ArcSwap::from_pointee(addresses),
            ended: watch::Sender::new(None),
            stage: watch::Sender::new(Stage::Serving),
            here: ArcSwap::from_pointee(Stage::Serving),
            held: AtomicBool::new(false),
            clusters: Clusters::default(),
            kept: Share::default(),
            handshakes: Semaphore::new(HANDSHAKES),
            shaking: Callers::default(),
            holds: Holds::default(),
            origins: OnceLock::new(),
            cookie: OnceLock::new(),
        })
    }

    /// What the kernel knows its network namespace by; none when that cannot be found out.
    pub fn cookie(&self) -> Option<u64> {
        if self.cookie.get().is_none() {
            let _ = self.cookie.set(self.netns.cookie().ok()?);
        }
        self.cookie.get().copied()
    }

    /// Completes when all of the pod's connections are to end.
    pub async fn ended(&self) -> Cut {
        let mut receiver = self.ended.subscribe();
        let cut = receiver.wait_for(Option::is_some).await.map(|cut| *cut);
        cut.ok().flatten().unwrap_or(Cut::PodGone)
    }

    pub fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// Asks clients that are there to go elsewhere: their connections end when they can without harm. What comes back is held by
    /// those that have not.
    pub fn leave(&self) -> Weak<Stage> {
        let before = self.here.swap(Arc::new(Stage::Leaving));
        self.advance(Stage::Leaving);
        Arc::downgrade(&before)
    }

    /// Asks all clients, and those that come after.
    pub fn drain(&self) {
        self.advance(Stage::Closing);
    }

    fn advance(&self, to: Stage) {
        self.stage.send_if_modified(|stage| std::mem::replace(stage, to.max(*stage)) < to);
    }

    /// Whether no connection is there that came after others were asked to leave.
    pub fn is_left(&self) -> bool {
        Arc::strong_count(&self.here.load()) == 1
    }

    /// To be held for as long as a connection of the pod is open: the stage it came in.
    pub fn here(&self) -> Arc<Stage> {
        self.here.load_full()
    }

    /// Whether connections that came in this stage are to end when they can; late ones, at once.
    pub fn is_draining(&self, since: Stage) -> bool {
        self.stage() > since.min(Stage::Leaving)
    }

    /// Says whether the pod is cut off because it cannot be served.
    pub fn set_held(&self, held: bool) {
        self.held.store(held, Ordering::Relaxed);
    }

    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// Completes when connections that came in this stage are to end when they can.
    pub async fn draining(&self, since: Stage) {
        // The sender is this pod's own.
        let _ = self.stage.subscribe().wait_for(|stage| *stage > since.min(Stage::Leaving)).await;
    }

    /// The same for HTTP/1 connections that carry nothing: their clients have a moment to ask once more, and be told with the answer.
    pub async fn draining_idle(&self, since: Stage) {
        self.draining(since).await;
        tokio::time::sleep(LAST_REQUEST).await;
    }

    /// Ends all of the pod's connections.
    pub fn end(&self, cut: Cut) {
        self.ended.send_if_modified(|e| e.is_none() && e.replace(cut).is_none());
    }

    /// Says who knows where connections come from. To be called once.
    pub fn set_origins(&self, origins: Box<dyn Origins>) {
        // A second one would know the same.
        let _ = self.origins.set(origins);
    }

    /// Whether the kernel vouches that a connection comes from the node itself, such as the kubelet's probes.
    pub fn is_from_node(&self, client: SocketAddr, destination: SocketAddr) -> bool {
        self.origins.get().is_some_and(|o| o.is_node(client, destination))
    }

    /// Room for one more peer that has not shaken hands with this pod. `known`: it is a pod of the mesh.
    pub fn caller(&self, client: IpAddr, known: bool) -> Option<Place> {
        self.shaking.enter(client, known)
    }

    /// Completes when it is a peer's turn to shake hands, until what comes back is dropped.
    pub async fn handshake(&self, client: IpAddr) -> Option<([Option<OwnedSemaphorePermit>; 2], SemaphorePermit<'_>)> {
        // They are never closed.
        let own = self.shaking.turn(client).await?;
        Some((own, self.handshakes.acquire().await.ok()?))
    }

    pub fn addresses(&self) -> Arc<Vec<IpAddr>> {
        self.addresses.load_full()
    }

    /// Gives the pod other addresses; returns those it had.
    pub fn set_addresses(&self, addresses: Vec<IpAddr>) -> Arc<Vec<IpAddr>> {
        self.addresses.swap(Arc::new(addresses))
    }

    /// The pod's address of the family of `like`.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses.load().iter().copied().find(|a| a.is_ipv4() == like.is_ipv4())
    }
}

/// All served pods. Reading is lock-free; changes are rare.
#[derive(Debug, Default)]
pub struct Pods {
    by_uid: ArcSwap<HashMap<WorkloadUid, Arc<ServedPod>>>,
    writing: Mutex<()>,
}

impl Pods {
    pub fn by_uid(&self, uid: &WorkloadUid) -> Option<Arc<ServedPod>> {
        self.by_uid.load().get(uid).cloned()
    }

    pub fn insert(&self, pod: Arc<ServedPod>) {
        self.change(|pods| drop(pods.insert(pod.uid.clone(), pod)));
    }

    pub fn remove(&self, uid: &WorkloadUid) {
        self.change(|pods| drop(pods.remove(uid)));
    }

    pub fn all(&self) -> Vec<Arc<ServedPod>> {
        self.by_uid.load().values().cloned().collect()
    }

    fn change(&self, f: impl FnOnce(&mut HashMap<WorkloadUid, Arc<ServedPod>>)) {
        let _one_at_a_time = self.writing.lock();
        let mut pods = HashMap::clone(&self.by_uid.load());
        f(&mut pods);
        self.by_uid.store(Arc::new(pods));
    }
}
