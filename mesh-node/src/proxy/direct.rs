//! The fast path within a node: connections between two of its pods that need nothing of the proxy go from one to the other. Policy
//! is decided before they are dialled, in a table the connect hook reads ([`table`]); what became of them is counted and logged here,
//! by both reporters, like that of any other; and those a change denies are cut.
//!
//! They need no process to go on: when this one stops they stay, and the next one finds them in the kernel.

mod known;
pub mod table;

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use self::{
    known::{Ends, Known},
    table::{Basis, Served},
};
use super::{
    Proxy, ServedPod,
    live::{Carries, Cut, is_denied},
    outcome::{Outcome, Party},
    pods::Stage,
};
use crate::{
    capture::{self, DirectFlow, FlowEvents, Phase},
    config::Snapshot,
    id::{ObjectName, WorkloadUid},
    route::Workload,
    spawn,
};

/// How often the kernel's flows are gone through for what no event told.
const SWEEP: Duration = Duration::from_secs(5);
/// How long a flow may be without a port before it is taken for one whose dialling failed at once.
const DIALLING: Duration = Duration::from_secs(5);
/// How long a dial may go on at most: the kernel's `tcp_syn_retries`, and some more.
const LONGEST_DIAL: Duration = Duration::from_mins(5);
/// How long to wait before flows that were being dialled while they were to be cut are looked at again.
const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Direct connections of this node's pods.
pub struct Direct {
    proxy: Arc<Proxy>,
    enabled: bool,
    state: Mutex<State>,
    /// Something has to be gone through again soon.
    again: Notify,
}

struct State {
    kernel: capture::Direct,
    basis: Option<Basis>,
    pods: Pods,
    flows: HashMap<u64, Known>,
    /// When the table last changed, as long as flows that were being dialled then have not been judged.
    unjudged: Option<Instant>,
    /// Namespaces of pods that are there, or may be, and whose they are; none before they have been looked for.
    there: Option<HashMap<u64, Option<WorkloadUid>>>,
    /// Another process sees to them now.
    handed_over: bool,
    /// When this process came: what flows had carried before, another has counted.
    since: Instant,
    /// Addresses that a pod has lost, and when: what was being dialled there then was meant for that pod.
    left: HashMap<IpAddr, Instant>,
    /// Flows that were given up, and what is left of them at their servers is to be ended.
    aborted: Vec<(Ends, DirectFlow)>,
}

/// The pods this process serves, as the kernel knows them.
#[derive(Default)]
struct Pods {
    by_cookie: HashMap<u64, Arc<ServedPod>>,
    by_ip: HashMap<IpAddr, Arc<ServedPod>>,
}

impl Pods {
    fn new(proxy: &Proxy) -> Self {
        let all = proxy.pods.all();
        let by_cookie = all.iter().filter_map(|p| Some((p.cookie()?, p.clone()))).collect();
        let by_ip = all.iter().flat_map(|p| p.addresses().iter().map(|ip| (*ip, p.clone())).collect::<Vec<_>>()).collect();
        Self { by_cookie, by_ip }
    }

    /// Addresses whose pods these were and those are not.
    fn lost(&self, now: &Self) -> Vec<IpAddr> {
        let is_same = |one: &ServedPod, other: &ServedPod| one.uid == other.uid && one.cookie() == other.cookie();
        let lost = self.by_ip.iter().filter(|(ip, pod)| !now.by_ip.get(*ip).is_some_and(|other| is_same(pod, other)));
        lost.map(|(ip, _)| *ip).collect()
    }

    /// The pods a flow is between.
    fn ends(&self, flow: &DirectFlow) -> Option<Ends> {
        Some(Ends { source: self.by_cookie.get(&flow.source)?.clone(), destination: self.by_ip.get(&flow.endpoint.ip())?.clone() })
    }
}

/// A direct connection, for inspection.
#[derive(Debug)]
pub struct DirectState {
    pub flow: DirectFlow,
    pub source: Option<ObjectName>,
    pub destination: Option<ObjectName>,
    pub service: Option<ObjectName>,
    /// Bytes sent and received until now.
    pub bytes: Option<(u64, u64)>,
}

impl Direct {
    /// With the kernel side of an opened capture. When it is not `enabled` there are no routes, and what an earlier process let go
    /// directly is seen to.
    pub fn new(proxy: Arc<Proxy>, kernel: capture::Direct, enabled: bool) -> Arc<Self> {
        let state = Mutex::new(State {
            kernel,
            basis: None,
            pods: Pods::default(),
            flows: HashMap::new(),
            unjudged: None,
            there: None,
            handed_over: false,
            since: Instant::now(),
            left: HashMap::new(),
            aborted: Vec::new(),
        });
        Arc::new(Self { proxy, enabled, state, again: Notify::new() })
    }

    /// Follows configuration and events until the process ends.
    pub async fn run(self: Arc<Self>, mut events: FlowEvents) {
        let mut config = self.proxy.config.clone();
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                heard = events.next() => match heard {
                    Ok(heard) => {
                        {
                            let (mut state, snapshot) = (self.state.lock(), self.proxy.config.load());
                            heard.iter().for_each(|flow| state.hear(&self.proxy, &snapshot, flow));
                        }
                        self.end_aborted();
                        // While there are always more, others have their turn between.
                        tokio::task::yield_now().await;
                    }
                    Err(error) => {
                        tracing::error!(target: "proxy", %error, "events of direct connections cannot be read any more");
                        return;
                    }
                },
                changed = config.changed() => {
                    if !changed {
                        return;
                    }
                    spawn::aside(|| self.sync());
                }
                () = self.again.notified() => {
                    tokio::time::sleep(RETRY_DELAY).await;
                    spawn::aside(|| self.go_through());
                }
                _ = sweep.tick() => spawn::aside(|| {
                    self.sync();
                    self.go_through();
                }),
            }
        }
    }

    /// Brings the table in line with the configuration and the pods that are served, and cuts what it denies. To be called when the
    /// latter have changed; costs little when not. Nothing happens to a flow before the first time. `there`: the network
    /// namespaces of pods that are there, or may be, and whose they are as far as is known.
    pub fn serve(&self, there: &HashMap<u64, Option<WorkloadUid>>) {
        let mut state = self.state.lock();
        if state.there.as_ref() != Some(there) {
            state.there = Some(there.clone());
            state.basis = None;
        }
        drop(state);
        self.sync();
    }

    fn sync(&self) {
        let mut state = self.state.lock();
        if state.there.is_none() || state.handed_over {
            return;
        }
        let (snapshot, served) = (self.proxy.config.load(), served(&self.proxy));
        let basis = Basis::new(&snapshot, &served, &self.proxy);
        if state.basis.as_ref() == Some(&basis) {
            return;
        }
        let routes = if self.enabled { table::routes(&snapshot, &served) } else { HashMap::new() };
        let set = state.kernel.set_routes(&routes);
        if let Err(error) = &set {
            tracing::warn!(target: "proxy", %error, wanted = routes.len(), "direct connections are not those that may be");
        }
        // What did not work is done again with the next sweep.
        state.basis = set.is_ok().then_some(basis);
        self.proxy.served.store(Arc::new(served));
        let (pods, now) = (Pods::new(&self.proxy), Instant::now());
        let lost = state.pods.lost(&pods);
        state.left.retain(|_, at| now.duration_since(*at) < LONGEST_DIAL);
        state.left.extend(lost.into_iter().map(|ip| (ip, now)));
        state.pods = pods;
        state.unjudged = Some(now);
        drop(state);
        self.go_through();
    }

    /// Goes through all flows: sees what no event told, and cuts what must not go on.
    fn go_through(&self) {
        let (mut state, snapshot) = (self.state.lock(), self.proxy.config.load());
        if state.handed_over || state.there.is_none() {
            return;
        }
        let mut unjudged = false;
        let listed = state.kernel.flows();
        let there = listed.iter().map(|f| f.cookie).collect::<HashSet<_>>();
        for (_, known) in state.flows.extract_if(|cookie, _| !there.contains(cookie)) {
            // Another process has counted it.
            known.outcomes.into_iter().for_each(Outcome::hand_over);
        }
        for flow in listed {
            state.hear(&self.proxy, &snapshot, &flow);
            // It can be cut when it has a port.
            unjudged |= flow.phase == Phase::New && state.unjudged.is_some_and(|since| flow.begun <= since);
        }
        let mut denied = 0;
        let cookies = state.flows.keys().copied().collect::<Vec<_>>();
        for cookie in cookies {
            denied += usize::from(state.check(&snapshot, cookie));
        }
        if denied > 0 {
            tracing::info!(target: "proxy", connections = denied, generation = snapshot.generation, "cut direct connections");
        }
        if unjudged {
            self.again.notify_one();
        } else {
            state.unjudged = None;
        }
        drop(state);
        self.end_aborted();
    }

    /// Ends what flows that were given up have left: whoever has the client's namespace can keep its reset from the server, and speak on.
    fn end_aborted(&self) {
        let aborted = std::mem::take(&mut self.state.lock().aborted);
        if aborted.is_empty() {
            return;
        }
        // The kernel is asked without the lock.
        spawn::aside(|| {
            for (ends, flow) in aborted {
                let later = capture::direct::connection(&ends.source.netns, flow.client, flow.endpoint).ok();
                if !later.is_some_and(|cookie| self.state.lock().kernel.has(cookie)) {
                    // Gone already is as good, and usual.
                    let _ = capture::direct::destroy(&ends.destination.netns, flow.endpoint, flow.client, None);
                }
            }
        });
    }

    /// Lets go of all flows, which go on.
    pub fn hand_over(&self) {
        let mut state = self.state.lock();
        state.handed_over = true;
        for (_, known) in state.flows.drain() {
            known.outcomes.into_iter().for_each(Outcome::hand_over);
        }
    }

    /// Counts what the flows have carried, before others do.
    pub fn settle(&self) {
        self.measure();
        self.proxy.open.count();
    }

    /// Routes in force.
    pub fn routes(&self) -> usize {
        self.state.lock().kernel.routes()
    }

    /// Flows that are open.
    pub fn states(&self) -> Vec<DirectState> {
        let one = |known: &Known| {
            let [source, _] = &known.outcomes;
            let name = |p: &Party| p.workload.as_ref().map(|w| w.name.clone());
            let state = DirectState {
                flow: known.flow.clone(),
                source: name(&source.source),
                destination: name(&source.destination),
                service: source.cluster.as_ref().map(|cluster| cluster.service.clone()),
                bytes: None,
            };
            (state, known.ends.as_ref().map(|e| e.source.clone()))
        };
        let all = self.state.lock().flows.values().map(one).collect::<Vec<_>>();
        // The kernel is asked without the lock: what goes on does not wait for all of them.
        let ask = |(mut state, source): (DirectState, Option<Arc<ServedPod>>)| {
            state.bytes = source.and_then(|pod| {
                let tcp = capture::direct::by_tcp(&pod.netns, &state.flow).ok()?;
                self.state.lock().kernel.traffic(&state.flow, tcp)
            });
            state
        };
        all.into_iter().map(ask).collect()
    }

    /// Takes down what the flows have carried until now: to be counted and listed before they end.
    pub fn measure(&self) {
        let cookies = self.state.lock().flows.keys().copied().collect::<Vec<_>>();
        for cookie in cookies {
            // The kernel is asked without the lock: what goes on does not wait for all of them.
            let asked = self.state.lock().flows.get(&cookie).and_then(|k| Some((k.ends.as_ref()?.source.clone(), k.flow.clone())));
            let Some((source, flow)) = asked else { continue };
            let Ok(tcp) = capture::direct::by_tcp(&source.netns, &flow) else { continue };
            let state = self.state.lock();
            if let (Some(known), Some(bytes)) = (state.flows.get(&cookie), state.kernel.traffic(&flow, tcp)) {
                known.carried(bytes);
            }
        }
    }
}

/// The pods this process serves.
fn served(proxy: &Proxy) -> Served {
    proxy
        .pods
        .all()
        .iter()
        .filter(|p| p.stage() < Stage::Closing && !p.is_held())
        .filter_map(|p| Some((p.uid.clone(), p.cookie()?)))
        .collect()
}

impl State {
    /// What a flow that was there before this process has carried is counted by others.
    fn begins_with(&self, known: &Known) {
        let Some(ends) = known.ends.as_ref().filter(|_| known.flow.begun < self.since) else { return };
        let tcp = capture::direct::by_tcp(&ends.source.netns, &known.flow).ok();
        if let Some(bytes) = tcp.and_then(|tcp| self.kernel.traffic(&known.flow, tcp)) {
            known.carried(bytes);
            known.outcomes.iter().for_each(Outcome::counted_by_others);
        }
    }

    /// Takes in what has happened to a flow.
    fn hear(&mut self, proxy: &Arc<Proxy>, snapshot: &Snapshot, flow: &DirectFlow) {
        if self.handed_over || self.there.is_none() {
            return;
        }
        match flow.phase {
            Phase::New => {
                if flow.begun.elapsed() > DIALLING {
                    self.kernel.forget(flow);
                }
            }
            Phase::Connecting => {
                // Not open yet, but what must not go on need not begin. Its end is heard of, and says why.
                let ends = self.pods.ends(flow);
                if let Some(cut) = self.verdict(snapshot, flow, ends.as_ref()) {
                    let known = self.flows.entry(flow.cookie).or_insert_with(|| Known::new(proxy, snapshot, ends, flow));
                    known.cut = Some(cut);
                    self.end(flow);
                }
            }
            Phase::Clash => self.end_client(flow),
            Phase::Open => {
                if let Some(known) = self.flows.get_mut(&flow.cookie).filter(|k| k.flow.is_same(flow)) {
                    known.open(flow);
                    if known.cut.is_some() {
                        self.check(snapshot, flow.cookie);
                    }
                } else if self.kernel.contains(flow) {
                    // What is heard of one that has been gone through and counted since is old. Another flow of the socket that is
                    // still here has ended without a word.
                    drop(self.flows.remove(&flow.cookie));
                    let ends = self.pods.ends(flow);
                    let known = Known::new(proxy, snapshot, ends, flow);
                    self.begins_with(&known);
                    self.flows.insert(flow.cookie, known);
                    self.check(snapshot, flow.cookie);
                }
            }
            Phase::Closed => {
                // Another flow of the same socket is another's.
                let is_this = self.flows.get(&flow.cookie).is_some_and(|k| k.flow.is_same(flow));
                let known = if is_this { self.flows.remove(&flow.cookie) } else { None };
                if !self.kernel.forget(flow) {
                    if let Some(known) = known {
                        known.outcomes.into_iter().for_each(Outcome::hand_over);
                    }
                    return;
                }
                let known = known.unwrap_or_else(|| Known::new(proxy, snapshot, self.pods.ends(flow), flow));
                if flow.opened && flow.aborted {
                    self.aborted.extend(known.ends.clone().map(|ends| (ends, flow.clone())));
                }
                known.close(flow);
            }
        }
    }

    /// Cuts a flow that must not go on; whether it did.
    fn check(&mut self, snapshot: &Snapshot, cookie: u64) -> bool {
        let Some(known) = self.flows.get(&cookie) else { return false };
        let Some(cut) = known.cut.or_else(|| self.verdict(snapshot, &known.flow, known.ends.as_ref())) else { return false };
        let (flow, is_new) = (known.flow.clone(), known.cut.is_none());
        if let Some(known) = self.flows.get_mut(&cookie) {
            known.cut = Some(cut);
        }
        self.end(&flow);
        is_new
    }

    /// Ends a flow by the client's socket and no other: the addresses are another connection's too.
    fn end_client(&self, flow: &DirectFlow) {
        if let Some(pod) = self.pods.by_cookie.get(&flow.source) {
            // Gone already is as good.
            let _ = capture::direct::destroy(&pod.netns, flow.client, flow.endpoint, Some(flow.cookie));
        }
    }

    /// Ends a flow by the sockets of those of its pods that are known.
    fn end_known(&self, flow: &DirectFlow) -> io::Result<()> {
        self.end_client(flow);
        let server = self.pods.by_ip.get(&flow.endpoint.ip()).ok_or(io::ErrorKind::NotFound)?;
        capture::direct::destroy(&server.netns, flow.endpoint, flow.client, None)
    }

    /// Whether there is a later flow with the addresses of one that is over.
    fn is_followed(&self, ends: &Ends, flow: &DirectFlow) -> bool {
        let later = capture::direct::connection(&ends.source.netns, flow.client, flow.endpoint);
        later.is_ok_and(|cookie| self.kernel.has(cookie))
    }

    /// Ends a flow by the sockets of both ends: that the other hears of it is left to neither. Its end is heard of like any other.
    fn end(&self, flow: &DirectFlow) {
        let ends = self.flows.get(&flow.cookie).map_or_else(|| self.pods.ends(flow), |k| k.ends.clone());
        let by_client = |e: &Ends| capture::direct::destroy(&e.source.netns, flow.client, flow.endpoint, Some(flow.cookie));
        let by_server = |e: &Ends| capture::direct::destroy(&e.destination.netns, flow.endpoint, flow.client, None);
        let ended = match &ends {
            Some(ends) => match by_client(ends) {
                // The server's is known by its addresses alone, which may be another's by now.
                Err(error) if error.kind() == io::ErrorKind::NotFound && self.is_followed(ends, flow) => Ok(()),
                Err(error) => by_server(ends).map_err(|_| error),
                Ok(()) => by_server(ends).or(Ok(())),
            },
            None => self.end_known(flow),
        };
        match ended {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(target: "proxy", client = %flow.client, to = %flow.endpoint, %error, "a direct connection cannot be cut");
            }
            _ => {}
        }
    }
}

impl State {
    /// Why a flow must not go on. Only on evidence: what cannot be found out changes nothing.
    fn verdict(&self, snapshot: &Snapshot, flow: &DirectFlow, ends: Option<&Ends>) -> Option<Cut> {
        // Of a pod that is not in the mesh, too.
        let there = || self.there.as_ref()?.get(&flow.source)?.as_ref();
        let source = ends.map(|e| &e.source.uid).or_else(there).and_then(|uid| snapshot.workload(uid));
        let workload = match ends {
            Some(ends) => snapshot.workload(&ends.destination.uid),
            None => snapshot.workload_by_ip(flow.endpoint.ip()),
        };
        let left = |w: Option<&Arc<Workload>>| w.is_some_and(|w| !w.enrolled);
        match (left(source), left(workload)) {
            // It is none of the mesh's any more, as it would not be if it were made now.
            (true, true) => return None,
            (false, false) => {}
            _ => return Some(Cut::LeftTheMesh),
        }
        let is_there = |cookie: u64| self.there.as_ref().is_none_or(|there| there.contains_key(&cookie));
        if !is_there(flow.source) || ends.and_then(|e| e.destination.cookie()).is_some_and(|cookie| !is_there(cookie)) {
            return Some(Cut::PodGone);
        }
        // Who has the address by now is another, or nobody.
        let lost = self.left.get(&flow.endpoint.ip()).is_some_and(|at| flow.begun <= *at) || ends.is_none() && workload.is_none();
        if flow.phase == Phase::Connecting && lost {
            return Some(Cut::PodGone);
        }
        // What is gone from the configuration only is the pod watcher's business: its end is not a policy change.
        let (source, workload) = (source?, workload?);
        let facts = table::facts(snapshot, source, flow.client.ip(), flow.endpoint);
        is_denied(workload, &facts, Carries::Unknown, &[]).then_some(Cut::PolicyChanged)
    }
}
