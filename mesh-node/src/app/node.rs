//! The node process: starts everything, keeps the served pods in step with configuration and reality, and stops in order.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use super::{
    further::Further,
    gone,
    listeners::{Listeners, NodeOrigins},
    process,
    served::Served,
    stop::{self, StopSignals},
};
use crate::{
    admin::{self, Listener, Pages, Scrapes},
    capture::{Acceleration, Capture, CaptureSettings, Discovery, LocalPod, SameNode},
    config::{Configuration, MeshSettings, Publisher},
    id::WorkloadUid,
    identity::{self, CertificateSource, EmbeddedCa, Files, IstioCa, IstioCaSettings, Manager},
    proxy::{self, Direct, Limits, Proxy, ServedPod, live::Cut},
    route::Workload,
    sources::{directory::Directory, last_good::LastGood},
    telemetry::{Metrics, chain},
    tls::{HandshakeFailure, KeyExchange, Trust},
};

/// The problem of a pod that is not there, or not yet.
pub const NO_PROCESS: &str = "no process of it has been found in the cgroups";
/// How often the node looks for pods that came or went.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long the pins of another ABI version stay attached while some pods cannot be inspected, although others can.
const FOREIGN_PINS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a released pod's listeners go on, for peers that have not heard of it yet.
const RELEASE_GRACE: Duration = Duration::from_secs(3);

/// Everything the process is started with.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    pub mesh: MeshSettings,
    /// Name of the cluster.
    pub cluster: String,
    pub capture: CaptureSettings,
    pub config_dir: PathBuf,
    pub certificates: CertificateSettings,
    /// Files with revocation lists.
    pub revocations: Vec<PathBuf>,
    pub key_exchange: KeyExchange,
    pub state_dir: PathBuf,
    /// Where everything is shown.
    pub admin: SocketAddr,
    /// The same, as a socket in the file system.
    pub admin_socket: Option<PathBuf>,
    /// Where metrics alone are served.
    pub metrics: SocketAddr,
    /// Where readiness alone is.
    pub readiness: SocketAddr,
    /// How long what is under way may go on when the process is to stop.
    pub drain: Duration,
    /// Most requests of HTTP/2 under way at once.
    pub requests: usize,
}

/// Where certificates come from.
#[derive(Debug, Clone)]
pub enum CertificateSettings {
    /// The node signs for its pods itself, with a root in a directory that all nodes share.
    Embedded { dir: PathBuf, ttl: Duration },
    /// An Istio certificate authority.
    Istio(IstioCaSettings),
    /// Somebody else puts them into files.
    Files(PathBuf),
}

impl CertificateSettings {
    fn open(&self, mesh: &MeshSettings, trust: &Arc<Trust>) -> anyhow::Result<Arc<dyn CertificateSource>> {
        Ok(match self {
            Self::Embedded { dir, ttl } => Arc::new(EmbeddedCa::open(dir, mesh.trust_domains.local.clone(), trust.clone(), *ttl)?),
            Self::Istio(settings) => Arc::new(IstioCa::new(settings.clone(), trust.clone())),
            Self::Files(dir) => Arc::new(Files::open(dir, trust.clone())?),
        })
    }
}

/// What the node knows of one of its pods, for inspection.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PodState {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub addresses: Vec<IpAddr>,
    /// Wanted by its labels.
    pub enrolled: bool,
    /// Its traffic is captured now.
    pub captured: bool,
    /// Why not, when it should be.
    pub problem: Option<String>,
    /// Since when no process of it is found.
    #[serde(skip)]
    pub absent: Option<Instant>,
}

/// The running node.
pub struct Node {
    pub settings: NodeSettings,
    pub proxy: Arc<Proxy>,
    pub direct: Arc<Direct>,
    pub started: SystemTime,
    pods: Mutex<Vec<PodState>>,
    capture: Mutex<Capture>,
    reconciled: AtomicBool,
    pub scrapes: Scrapes,
    /// Asks the process to stop in order.
    pub stop: Notify,
    pub(super) stopping: AtomicBool,
}

impl Node {
    pub fn pods(&self) -> Vec<PodState> {
        self.pods.lock().clone()
    }

    /// Ready: the configuration has been read and the pods there were have been captured. One pod that cannot be is shown
    /// by [`Node::pods`]; it does not make the node unready for the others.
    pub fn is_ready(&self) -> bool {
        self.reconciled.load(Ordering::Acquire) && !self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn capture(&self) -> parking_lot::MutexGuard<'_, Capture> {
        self.capture.lock()
    }
}

/// Runs a node until it is told to stop.
pub async fn run(settings: NodeSettings) -> anyhow::Result<()> {
    let descriptors = process::prepare()?;
    let trust = Trust::new(settings.mesh.trust_domains.clone(), settings.key_exchange);
    let certificates = settings.certificates.open(&settings.mesh, &trust)?;
    let revocations = identity::follow_revocations(settings.revocations.clone(), trust.clone())?;
    let last_good = LastGood::open(&settings.state_dir.join("last-good"))
        .with_context(|| format!("state directory {}", settings.state_dir.display()))?;
    let source = Directory::open(&settings.config_dir, last_good, "default", &settings.mesh.root_namespace)
        .with_context(|| format!("configuration directory {}", settings.config_dir.display()))?;
    let mut capture = Capture::open(&settings.capture)?;
    let discovery = Discovery::new(settings.capture.cgroup.clone())?;
    let (sender, receiver) = mpsc::channel(16);
    let (publisher, config) = Publisher::new(Arc::new(settings.mesh.clone()), receiver);
    let metrics = Arc::new(Metrics::new(&settings.cluster));
    metrics.expect_handshake_failures(HandshakeFailure::ALL.map(HandshakeFailure::reason));
    let proxy = Proxy::new(config.clone(), Manager::new(certificates), metrics, Limits::new(descriptors, settings.requests));
    match capture.accelerator({
        let metrics = proxy.metrics.clone();
        move |state| metrics.acceleration(state.name())
    }) {
        Ok((accelerator, offers)) => {
            proxy.accelerate_with(offers);
            tokio::spawn(accelerator.run());
        }
        Err(why) if settings.capture.acceleration == Acceleration::On => {
            tracing::warn!(target: "app", why, "connections are not accelerated");
        }
        Err(_) => {}
    }
    let (kernel, flows) = capture.direct().context("direct connections are in use already")?;
    let direct = Direct::new(proxy.clone(), kernel, settings.capture.same_node == SameNode::Direct);
    let node = Arc::new(Node {
        settings,
        proxy: proxy.clone(),
        direct: direct.clone(),
        started: SystemTime::now(),
        pods: Mutex::default(),
        capture: Mutex::new(capture),
        reconciled: AtomicBool::new(false),
        scrapes: Scrapes::default(),
        stop: Notify::new(),
        stopping: AtomicBool::new(false),
    });
    serve_pages(&node).await?;
    tokio::spawn(publisher.run());
    tokio::spawn(revocations);
    tokio::spawn(config.clone().tell_of_aliases(trust));
    tokio::spawn(async move {
        // Without its source the node ends; this is why.
        if let Err(error) = source.run(sender).await {
            tracing::error!(target: "config", %error, "the configuration directory cannot be followed any more");
        }
    });
    tokio::spawn(proxy.clone().recheck_policies());
    tokio::spawn(proxy.clone().tidy_pool());
    tokio::spawn(proxy::traces::export(proxy.clone()));
    tokio::spawn(direct.run(flows));
    tokio::spawn(proxy.jwks.clone().run());
    tracing::info!(target: "app", node = %node.settings.mesh.node, admin = %node.settings.admin, fail_mode = ?node.settings.capture.fail_mode, "started");
    Reconciler::new(node.clone()).until_stopped(discovery, config).await
}

/// Opens everything a node shows itself on.
async fn serve_pages(node: &Arc<Node>) -> anyhow::Result<()> {
    let settings = &node.settings;
    let all = [
        (settings.admin, Pages::All, "admin"),
        (settings.metrics, Pages::Metrics, "metrics"),
        (settings.readiness, Pages::Readiness, "readiness"),
    ];
    for (address, pages, what) in all {
        let listener = admin::bind_any(address).await.with_context(|| format!("{what} address {address}"))?;
        tokio::spawn(admin::serve_node(Listener::Tcp(listener), node.clone(), pages));
    }
    if let Some(path) = &settings.admin_socket {
        let listener = admin::bind_socket(path).with_context(|| format!("admin socket {}", path.display()))?;
        tokio::spawn(admin::serve_node(Listener::Unix(listener), node.clone(), Pages::All));
    }
    Ok(())
}

/// Keeps what is captured equal to what should be.
///
/// A pod is released only on evidence: it is gone, or the configuration says that it is not in the mesh. What cannot be
/// found out changes nothing.
struct Reconciler {
    node: Arc<Node>,
    served: HashMap<WorkloadUid, Served>,
    /// Pods that should be captured and cannot be served, with the reason: their connections are refused.
    held: HashMap<WorkloadUid, String>,
    /// Pods released while they ran: their connections end with them, not with their capture.
    released: Vec<(u64, Weak<ServedPod>)>,
    /// Namespaces that are, or may have to be, captured. What the kernel has beyond them is released.
    stay: Option<HashSet<u64>>,
    /// It has been said that this process serves.
    announced: bool,
    /// When pods were first looked for.
    since: Option<Instant>,
    absent: gone::Absent,
    further: Further,
}

type Found = HashMap<WorkloadUid, LocalPod>;

impl Reconciler {
    fn new(node: Arc<Node>) -> Self {
        let (served, held, absent, further) = (HashMap::new(), HashMap::new(), gone::Absent::default(), Further::default());
        Self { node, served, held, released: Vec::new(), stay: None, announced: false, since: None, absent, further }
    }

    /// Works until the node is told to stop, and stops it.
    async fn until_stopped(mut self, discovery: Discovery, config: Configuration) -> anyhow::Result<()> {
        let node = self.node.clone();
        let mut signals = StopSignals::new().context("signals cannot be heard of")?;
        // Pods come and go while those that were there are waited for.
        let stopping = tokio::select! {
            ended = self.run(discovery, config) => return ended,
            stopping = stop::when_told(&node, &mut signals) => stopping,
        };
        stopping.finish(&node, &mut signals, self.served.into_values().map(|s| s.serving)).await;
        Ok(())
    }

    /// Works for as long as it is let.
    async fn run(&mut self, mut discovery: Discovery, mut config: Configuration) -> anyhow::Result<()> {
        config.ready().await;
        let mut blind = None;
        loop {
            let (looked, found) = tokio::task::spawn_blocking(move || {
                let found = discovery.look(Instant::now()).cloned();
                let found = found.map(|pods| (pods, discovery.is_incomplete()));
                (discovery, found)
            })
            .await?;
            discovery = looked;
            match found {
                Ok((found, incomplete)) => {
                    blind = None;
                    self.reconcile(&found, incomplete)?;
                }
                Err(error) => {
                    let error = error.to_string();
                    if blind.as_ref() != Some(&error) {
                        tracing::error!(target: "app", %error, "cannot look for pods; those captured stay so");
                    }
                    blind = Some(error);
                }
            }
            if self.further.is_due() {
                let found = Further::look(self.served.iter().map(|(uid, s)| (uid.clone(), s.pod.netns.clone())).collect()).await;
                let pods = self.served.iter().map(|(uid, s)| (uid, &s.inbound)).collect::<HashMap<_, _>>();
                self.further.take(found, &pods, &self.node.proxy.config.load(), &mut self.node.capture());
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                changed = config.changed() => anyhow::ensure!(changed, "the configuration has ended"),
            }
        }
    }

    /// `incomplete`: pods may be there that are not among those found.
    fn reconcile(&mut self, found: &Found, incomplete: bool) -> anyhow::Result<()> {
        let snapshot = self.node.proxy.config.load().clone();
        let mine = snapshot.workloads().filter(|w| w.node == snapshot.mesh.node).cloned().collect::<Vec<_>>();
        let leaves = |uid: &WorkloadUid| snapshot.workload(uid).is_some_and(|w| !w.enrolled);
        for (uid, exists) in self.leaving(found, &leaves) {
            self.release(&uid, exists);
        }
        self.held.retain(|uid, _| found.contains_key(uid) && !leaves(uid));
        self.end_released(found);
        for workload in mine.iter().filter(|w| w.enrolled) {
            if let Some(local) = found.get(&workload.uid) {
                self.keep_enrolled(workload, local);
            }
        }
        let mut stay = found.values().filter(|f| !leaves(&f.uid)).map(|f| f.netns_cookie).collect::<HashSet<_>>();
        let mut there = found.values().map(|f| (f.netns_cookie, Some(f.uid.clone()))).collect::<HashMap<_, _>>();
        if incomplete {
            // None is let go of on no evidence.
            let unknown = self.node.capture().captured().into_iter().filter(|cookie| !there.contains_key(cookie)).collect::<Vec<_>>();
            stay.extend(&unknown);
            there.extend(unknown.into_iter().map(|cookie| (cookie, None)));
        }
        // Before anything is announced: what an earlier process left in the table goes with this.
        self.node.direct.serve(&there);
        self.absent.look(&mine, found);
        let mut states = mine.iter().map(|w| self.state(w, found)).collect::<Vec<_>>();
        states.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        *self.node.pods.lock() = states;
        // Peers that have not heard yet that a pod is released shake hands with it for a while.
        let needed = mine.iter().filter(|w| w.enrolled || self.node.proxy.pods.by_uid(&w.uid).is_some());
        self.node.proxy.identity.retain(&needed.map(|w| w.identity.clone()).collect());
        if self.stay.as_ref() != Some(&stay) {
            // Pods that were held, or left enrolled by an earlier process, and are gone or not in the mesh.
            self.node.capture().retain(&stay);
            self.stay = Some(stay);
        }
        if !self.announced && !self.waits(found, incomplete) {
            self.node.capture().announce()?;
            self.announced = true;
            let node = self.node.clone();
            tokio::spawn(async move { gone::forget_strays(&node).await });
            self.node.reconciled.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Whether what another version of this program holds is to be held on: pods that cannot be looked into would be let go of with
    /// it. Not for ever when there are others that can.
    fn waits(&mut self, found: &Found, incomplete: bool) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        let others = incomplete && self.node.capture().follows_another();
        others && (found.is_empty() || since.elapsed() < FOREIGN_PINS_TIMEOUT)
    }

    /// Served pods that are to be released, and whether they still exist.
    fn leaving(&self, found: &Found, leaves: &impl Fn(&WorkloadUid) -> bool) -> Vec<(WorkloadUid, bool)> {
        let exists = |uid: &WorkloadUid, s: &Served| found.get(uid).is_some_and(|f| f.netns_cookie == s.netns_cookie);
        let all = self.served.iter().map(|(uid, s)| (uid.clone(), exists(uid, s)));
        all.filter(|(uid, exists)| !exists || leaves(uid)).collect()
    }

    /// Serves a pod that is to be captured; one that cannot be served is held.
    fn keep_enrolled(&mut self, workload: &Workload, local: &LocalPod) {
        let result = match self.served.get(&workload.uid) {
            None => self.enrol(workload, local),
            Some(served) if served.has_to_change(workload) => self.enrol_again(workload, local),
            Some(_) => Ok(()),
        };
        if let Some(served) = self.served.get(&workload.uid) {
            served.pod.set_held(result.is_err());
        }
        match result {
            Ok(()) => drop(self.held.remove(&workload.uid)),
            Err(problem) => {
                let held = self.node.capture().hold(&local.netns, &workload.ips);
                let problem = held.err().map_or(problem.clone(), |e| format!("{problem}; nor can it be cut off: {}", chain(&e)));
                if self.held.insert(workload.uid.clone(), problem.clone()).as_ref() != Some(&problem) {
                    tracing::error!(target: "app", pod = %workload.name, problem, "a pod cannot be served; its connections are refused");
                }
            }
        }
    }

    /// Ends the connections of released pods that are gone now.
    fn end_released(&mut self, found: &Found) {
        self.released.retain(|(netns_cookie, pod)| {
            let Some(pod) = pod.upgrade() else { return false };
            let exists = found.get(&pod.uid).is_some_and(|f| f.netns_cookie == *netns_cookie);
            if !exists {
                pod.end(Cut::PodGone);
            }
            exists
        });
    }

    fn state(&self, workload: &Workload, found: &Found) -> PodState {
        let captured = self.served.contains_key(&workload.uid);
        let missing = || (!found.contains_key(&workload.uid)).then(|| NO_PROCESS.to_owned());
        let problem = self.held.get(&workload.uid).cloned().or_else(missing);
        PodState {
            uid: workload.uid.to_string(),
            namespace: workload.name.namespace.to_string(),
            name: workload.name.name.to_string(),
            addresses: workload.ips.clone(),
            enrolled: workload.enrolled,
            captured,
            problem: problem.filter(|_| workload.enrolled),
            absent: self.absent.since(&workload.uid),
        }
    }

    fn enrol(&mut self, workload: &Workload, local: &LocalPod) -> Result<(), String> {
        let (listeners, inbound) = Listeners::bind(&local.netns)?;
        let pod = ServedPod::new(workload.uid.clone(), local.netns.clone(), workload.ips.clone());
        let originals = {
            let mut capture = self.node.capture();
            pod.set_origins(Box::new(NodeOrigins(capture.node_flows().map_err(|e| chain(&e))?)));
            let originals = capture.original_destinations(local.netns_cookie).map_err(|e| chain(&e))?;
            capture.enrol(&local.netns, &workload.ips, &inbound, workload.accelerate).map_err(|e| chain(&e))?;
            originals
        };
        self.node.proxy.pods.insert(pod.clone());
        let serving = listeners.serve(&self.node.proxy, &pod, originals);
        self.served
            .insert(workload.uid.clone(), Served { pod, netns_cookie: local.netns_cookie, serving, inbound, direct: workload.accelerate });
        tracing::info!(target: "app", pod = %workload.name, identity = %workload.identity, addresses = ?workload.ips, "pod captured");
        Ok(())
    }

    /// Goes on serving a pod under other addresses or settings, without letting go of it.
    fn enrol_again(&mut self, workload: &Workload, local: &LocalPod) -> Result<(), String> {
        let Some(served) = self.served.get_mut(&workload.uid) else { return Ok(()) };
        let anew = if served.serving.is_over() { Some(Listeners::bind(&local.netns)?) } else { None };
        let inbound = anew.as_ref().map_or(&served.inbound, |(_, inbound)| inbound);
        self.node.capture().enrol(&local.netns, &workload.ips, inbound, workload.accelerate).map_err(|e| chain(&e))?;
        served.direct = workload.accelerate;
        if let Some((listeners, inbound)) = anew {
            let originals = self.node.capture().original_destinations(local.netns_cookie).map_err(|e| chain(&e))?;
            let serving = listeners.serve(&self.node.proxy, &served.pod, originals);
            (served.serving, served.inbound) = (serving, inbound);
            // They are steered anew when they are next looked for.
            self.further.forget(&workload.uid);
            tracing::warn!(target: "app", pod = %workload.name, "a listener of the node's had been ended from within the pod; there are others now");
        }
        if **served.pod.addresses() == workload.ips {
            return Ok(());
        }
        let old = served.pod.set_addresses(workload.ips.clone());
        tracing::info!(target: "app", pod = %workload.name, addresses = ?workload.ips, "pod has other addresses");
        self.forget_addresses(&old);
        Ok(())
    }

    /// Steers nothing more to addresses no served pod has.
    fn forget_addresses(&self, addresses: &[IpAddr]) {
        let used = |ip: &IpAddr| self.served.values().any(|s| s.pod.addresses().contains(ip));
        let unused = addresses.iter().copied().filter(|ip| !used(ip)).collect::<Vec<_>>();
        self.node.capture().forget_addresses(&unused);
    }

    /// Stops capturing a pod. One that still exists keeps its connections; one that is gone loses them.
    fn release(&mut self, uid: &WorkloadUid, exists: bool) {
        let Some(Served { pod, netns_cookie, serving, .. }) = self.served.remove(uid) else { return };
        self.node.capture().release(netns_cookie);
        let further = self.further.forget(uid);
        self.forget_addresses(&[&**pod.addresses(), &further].concat());
        tracing::info!(target: "app", %uid, exists, "pod released");
        if exists {
            self.released.push((netns_cookie, Arc::downgrade(&pod)));
        } else {
            pod.end(Cut::PodGone);
            pod.clusters.retire();
        }
        let node = self.node.clone();
        tokio::spawn(async move {
            if exists {
                tokio::time::sleep(RELEASE_GRACE).await;
            }
            // Enrolled again meanwhile: the new entry stays.
            if node.proxy.pods.by_uid(&pod.uid).is_some_and(|p| Arc::ptr_eq(&p, &pod)) {
                node.proxy.pods.remove(&pod.uid);
            }
            serving.drain().await;
            pod.clusters.retire();
            if !exists {
                gone::forget_flows(&node, &pod.addresses()).await;
            }
        });
    }
}
