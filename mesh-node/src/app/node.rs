//! The node process: starts everything, keeps the served pods in step with configuration and reality, and stops in order.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use tokio::sync::mpsc;

use super::listeners::{Listeners, Serving};
use crate::{
    admin,
    capture::{Capture, CaptureSettings, Discovery, LocalPod},
    config::{Configuration, MeshSettings, Publisher},
    id::WorkloadUid,
    identity::{EmbeddedCa, Manager},
    io::netns::Netns,
    proxy::{Proxy, ServedPod, live::Cut},
    route::Workload,
    sources::directory::Directory,
    telemetry::{EventLabels, Metrics, chain},
};

/// How often the node looks for pods that came or went.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a released pod's listeners go on, for peers that have not heard of it yet.
const RELEASE_GRACE: Duration = Duration::from_secs(3);
/// How long connections may go on after the process was told to stop.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Everything the process is started with.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    pub mesh: MeshSettings,
    pub capture: CaptureSettings,
    pub config_dir: PathBuf,
    pub ca_dir: PathBuf,
    pub certificate_ttl: Duration,
    pub admin: SocketAddr,
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
}

/// The running node, for inspection.
pub struct Node {
    pub settings: NodeSettings,
    pub proxy: Arc<Proxy>,
    pub started: SystemTime,
    pods: Mutex<Vec<PodState>>,
    capture: Mutex<Capture>,
}

impl Node {
    pub fn pods(&self) -> Vec<PodState> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ready: configuration read, and every pod that should be captured is.
    pub fn is_ready(&self) -> bool {
        self.proxy.config.is_ready() && self.pods().iter().all(|p| !p.enrolled || p.captured || p.problem.is_none())
    }

    /// Refreshes the gauges that are read from elsewhere.
    pub fn refresh_metrics(&self) {
        let metrics = &self.proxy.metrics;
        for (counter, value) in self.capture().counters() {
            metrics.capture_events.get_or_create(&EventLabels { event: counter.name() }).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        metrics.config_generation.set(i64::try_from(self.proxy.config.load().generation).unwrap_or(i64::MAX));
        metrics.config_remarks.set(gauge(self.proxy.config.statuses().len()));
        metrics.enrolled_pods.set(gauge(self.pods().iter().filter(|p| p.captured).count()));
    }

    fn capture(&self) -> std::sync::MutexGuard<'_, Capture> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a node until it is told to stop.
pub async fn run(settings: NodeSettings) -> anyhow::Result<()> {
    Netns::host().context("cannot open the node's network namespace")?;
    let ca = EmbeddedCa::open(&settings.ca_dir, settings.mesh.trust_domains.local.clone(), settings.certificate_ttl)?;
    let source = Directory::open(&settings.config_dir, "default")
        .with_context(|| format!("configuration directory {}", settings.config_dir.display()))?;
    let capture = Capture::open(&settings.capture)?;
    let discovery = Discovery::new(settings.capture.cgroup.clone())?;
    let (sender, receiver) = mpsc::channel(16);
    let (publisher, config) = Publisher::new(Arc::new(settings.mesh.clone()), receiver);
    let metrics = Arc::new(Metrics::default());
    let proxy = Proxy::new(config.clone(), Manager::new(Arc::new(ca)), metrics);
    let node =
        Arc::new(Node { settings, proxy: proxy.clone(), started: SystemTime::now(), pods: Mutex::default(), capture: Mutex::new(capture) });
    let admin = admin::bind(node.settings.admin).await.with_context(|| format!("admin address {}", node.settings.admin))?;
    tokio::spawn(publisher.run());
    tokio::spawn(source.run(sender));
    tokio::spawn(proxy.clone().recheck_policies());
    tokio::spawn(proxy.clone().tidy_pool());
    tokio::spawn(admin::serve(admin, node.clone()));
    tracing::info!(target: "app", node = %node.settings.mesh.node, admin = %node.settings.admin, fail_mode = ?node.settings.capture.fail_mode, "started");
    let mut reconciler = Reconciler { node: node.clone(), served: HashMap::new(), released: Vec::new(), taken_over: false };
    tokio::select! {
        stopped = reconciler.run(discovery, config) => stopped?,
        signal = stop_signal() => tracing::info!(target: "app", signal = signal?, "stopping"),
    }
    reconciler.stop().await;
    Ok(())
}

async fn stop_signal() -> anyhow::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

/// Keeps what is captured equal to what should be.
struct Reconciler {
    node: Arc<Node>,
    served: HashMap<WorkloadUid, Served>,
    /// Pods released while they ran: their connections end with them, not with their capture.
    released: Vec<(u64, Weak<ServedPod>)>,
    /// Whether pods left enrolled by an earlier process have been dealt with.
    taken_over: bool,
}

struct Served {
    pod: Arc<ServedPod>,
    netns_cookie: u64,
    serving: Serving,
}

impl Reconciler {
    async fn run(&mut self, mut discovery: Discovery, mut config: Configuration) -> anyhow::Result<()> {
        config.ready().await;
        loop {
            let (looked, found) = tokio::task::spawn_blocking(move || {
                let found = discovery.look(Instant::now()).clone();
                (discovery, found)
            })
            .await?;
            discovery = looked;
            self.reconcile(&found);
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                changed = config.changed() => anyhow::ensure!(changed, "the configuration has ended"),
            }
        }
    }

    fn reconcile(&mut self, found: &HashMap<WorkloadUid, LocalPod>) {
        let snapshot = self.node.proxy.config.load().clone();
        let mine = snapshot.workloads().filter(|w| w.node == snapshot.mesh.node).cloned().collect::<Vec<_>>();
        let wanted = |uid: &WorkloadUid| snapshot.workload(uid).filter(|w| w.enrolled && w.node == snapshot.mesh.node);
        let leaving = self.served.iter().filter(|(uid, s)| {
            let same = found.get(*uid).is_some_and(|f| f.netns_cookie == s.netns_cookie);
            !same || wanted(uid).is_none_or(|w| w.ips != s.pod.addresses)
        });
        for uid in leaving.map(|(uid, _)| uid.clone()).collect::<Vec<_>>() {
            let same = |s: &Served| found.get(&uid).is_some_and(|f| f.netns_cookie == s.netns_cookie);
            let exists = self.served.get(&uid).is_some_and(same);
            self.release(&uid, exists);
        }
        self.end_released(found);
        let mut states = Vec::with_capacity(mine.len());
        for workload in &mine {
            let problem = match found.get(&workload.uid) {
                Some(local) if workload.enrolled && !self.served.contains_key(&workload.uid) => self.enrol(workload, local).err(),
                _ => None,
            };
            if let Some(problem) = &problem {
                tracing::error!(target: "app", pod = %workload.name, problem, "a pod cannot be captured");
            }
            states.push(self.state(workload, problem));
        }
        states.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        *self.node.pods.lock().unwrap_or_else(PoisonError::into_inner) = states;
        self.node.proxy.identity.retain(&mine.iter().filter(|w| w.enrolled).map(|w| w.identity.clone()).collect());
        if !self.taken_over {
            self.taken_over = true;
            self.node.capture().retain(&self.served.values().map(|s| s.netns_cookie).collect::<HashSet<_>>());
        }
    }

    /// Ends the connections of released pods that are gone now.
    fn end_released(&mut self, found: &HashMap<WorkloadUid, LocalPod>) {
        self.released.retain(|(netns_cookie, pod)| {
            let Some(pod) = pod.upgrade() else { return false };
            let exists = found.get(&pod.uid).is_some_and(|f| f.netns_cookie == *netns_cookie);
            if !exists {
                pod.end(Cut::PodGone);
            }
            exists
        });
    }

    fn state(&self, workload: &Workload, problem: Option<String>) -> PodState {
        PodState {
            uid: workload.uid.to_string(),
            namespace: workload.name.namespace.to_string(),
            name: workload.name.name.to_string(),
            addresses: workload.ips.clone(),
            enrolled: workload.enrolled,
            captured: self.served.contains_key(&workload.uid),
            problem,
        }
    }

    fn enrol(&mut self, workload: &Workload, local: &LocalPod) -> Result<(), String> {
        let listeners = Listeners::bind(&local.netns).map_err(|e| format!("cannot listen in the pod: {e}"))?;
        let pod = ServedPod::new(workload.uid.clone(), local.netns.clone(), workload.ips.clone());
        let originals = {
            let mut capture = self.node.capture();
            let originals = capture.original_destinations(local.netns_cookie).map_err(|e| chain(&e))?;
            capture.enrol(&local.netns, &workload.ips, listeners.inbound()).map_err(|e| chain(&e))?;
            originals
        };
        self.node.proxy.pods.insert(pod.clone());
        let serving = listeners.serve(&self.node.proxy, &pod, originals);
        self.served.insert(workload.uid.clone(), Served { pod, netns_cookie: local.netns_cookie, serving });
        tracing::info!(target: "app", pod = %workload.name, identity = %workload.identity, addresses = ?workload.ips, "pod captured");
        Ok(())
    }

    /// Stops capturing a pod. One that still exists keeps its connections; one that is gone loses them.
    fn release(&mut self, uid: &WorkloadUid, exists: bool) {
        let Some(Served { pod, netns_cookie, serving }) = self.served.remove(uid) else { return };
        self.node.capture().release(netns_cookie, &pod.addresses);
        tracing::info!(target: "app", %uid, exists, "pod released");
        if exists {
            self.released.push((netns_cookie, Arc::downgrade(&pod)));
        } else {
            pod.end(Cut::PodGone);
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
        });
    }

    /// Takes no more connections and waits a little for those there are. Capture stays as it is: what happens to new
    /// connections from here on is the fail mode's business.
    async fn stop(&mut self) {
        let served = std::mem::take(&mut self.served);
        let pods = served.values().map(|s| s.pod.clone()).collect::<Vec<_>>();
        for served in served.into_values() {
            tokio::spawn(served.serving.drain());
        }
        self.node.proxy.pool.close();
        let deadline = tokio::time::Instant::now() + STOP_GRACE;
        while self.node.proxy.metrics.open_connections.get() > 0 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        pods.iter().for_each(|p| p.end(Cut::Shutdown));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
