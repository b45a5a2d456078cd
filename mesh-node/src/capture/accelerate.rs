//! Acceleration: which pairs of sockets move messages past the TCP stack, and when.
//!
//! A pair is entered on evidence, not on a guess: some time after it was offered, when both sockets are seen to be non-blocking
//! and to have exchanged messages and not bulk. It is taken out again when the kernel side says that a socket turned blocking, that
//! bulk flows or that a message had to go by TCP, after which it may come back; a socket leaves the map only when nothing redirected is
//! unread and nobody is in the midst of sending.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use mesh_common::accelerate::{Event, PairReply, PairRequest, Way, Why};
use tokio::{
    io::unix::AsyncFd,
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

mod entry;
mod kernel;
mod offers;
mod proof;
mod state;

use self::{
    entry::{Entry, Phase, Reads},
    kernel::Kernel,
    offers::{Known, Message},
};
pub use self::{
    kernel::{Place, kernel_layout},
    offers::{Offered, Offers, PairState},
    state::State,
};
use super::{CaptureError, DirectFlow, sys};
use crate::io::netns::Netns;

/// When a pair is first looked at after it was offered, and at most how long after the last time.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LAST_LOOK: Duration = Duration::from_secs(10);
/// When it is first looked whether a pair that was entered has settled, and how often after that, ever later: until it has, its readers may
/// be told that there is nothing to read.
const FIRST_SETTLED: Duration = Duration::from_millis(1);
const LOOKS_SETTLED: u32 = 3;
/// How often it is looked whether a pair that leaves can be taken out, at least: a reader may wait for that.
const LAST_LEAVING: Duration = Duration::from_millis(10);
/// After so many looks its reader is taken for one that does not read, and it is looked less often.
const LOOKS_LEAVING: u32 = 30;
const STUCK: Duration = Duration::from_millis(250);
/// Messages seen each way before a pair is entered.
const MESSAGES: u32 = 2;
/// Most bytes the messages of a pair have on average.
const MEAN_MESSAGE: u64 = 8 * 1024;

/// Looks after which a socket of which more is taken than received is said to be read by other means.
const ODD: u32 = 3;
/// Most pods that are remembered as unfit.
const MAX_UNFIT: usize = 4096;

/// Two sockets of this node that are each other's peers, to be accelerated when they are seen to be fit.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The proxy's, unless the two are of a direct connection.
    pub one: Place,
    pub other: Place,
    /// The direct connection they are, by the cookie of the first socket; 0 when they are of none.
    flow: u64,
}

impl Pair {
    /// The proxy's socket and an application's in one network namespace, by the addresses of the proxy's.
    pub fn within(netns: &Arc<Netns>, local: SocketAddr, remote: SocketAddr) -> Self {
        let place = |local, remote| Place { netns: netns.clone(), local, remote };
        Self { one: place(local, remote), other: place(remote, local), flow: 0 }
    }

    /// The sockets of a direct connection, each in the network namespace of its pod.
    pub fn of_flow(client: &Arc<Netns>, server: &Arc<Netns>, flow: &DirectFlow) -> Self {
        let place = |netns: &Arc<Netns>, local, remote| Place { netns: netns.clone(), local, remote };
        let (one, other) = (place(client, flow.client, flow.endpoint), place(server, flow.endpoint, flow.client));
        Self { one, other, flow: flow.cookie }
    }
}

/// What acceleration needs of the loaded programs and maps.
pub(super) struct Parts {
    pub pair: OwnedFd,
    pub wake: OwnedFd,
    pub received: OwnedFd,
    pub sockets: OwnedFd,
    pub events: RingBuf<MapData>,
}

/// Sees to the pairs on offer; one task.
pub struct Accelerator {
    kernel: Arc<Kernel>,
    events: AsyncFd<RingBuf<MapData>>,
    messages: mpsc::UnboundedReceiver<Message>,
    known: Arc<Known>,
    entries: HashMap<u64, Entry>,
    due: BTreeSet<(Instant, u64)>,
    /// Network namespaces, by inode, of pods whose programs are unfit.
    unfit: HashSet<u64>,
    changed: Box<dyn Fn(State) + Send>,
    /// Sockets whose owners are to be woken, and who does so.
    wakes: Vec<Place>,
    waking: Option<JoinHandle<io::Result<()>>>,
}

impl Accelerator {
    /// With the programs and maps of an opened capture. `changed` hears of every change of a pair's state.
    pub(super) fn new(parts: Parts, changed: impl Fn(State) + Send + 'static) -> Result<(Self, Offers), CaptureError> {
        let Parts { pair, wake, received, sockets, events } = parts;
        let (sender, messages) = mpsc::unbounded_channel();
        let known = Arc::new(Known::default());
        // Keys must not meet those of an earlier process, whose pairs may still be there.
        let start =
            nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_err(|e| CaptureError::io("read the clock")(e.into()))?;
        let next = u64::try_from(start.tv_sec()).unwrap_or_default() << 30;
        // SAFETY: the ring owns its descriptor for as long as it lives, and always returns that one.
        let events = unsafe { AsyncFd::register(events) };
        let events = events.map_err(|e| CaptureError::io("watch the events of acceleration")(e.into_parts().1))?;
        let kernel = Arc::new(Kernel { pair, wake, sockets, _received: received });
        proof::prove(&kernel, next).map_err(CaptureError::Unsupported)?;
        let offers = Offers::new(sender, next + 1, known.clone(), kernel.clone());
        let accelerator = Self {
            kernel,
            events,
            messages,
            known,
            entries: HashMap::new(),
            due: BTreeSet::new(),
            unfit: HashSet::new(),
            changed: Box::new(changed),
            wakes: Vec::new(),
            waking: None,
        };
        Ok((accelerator, offers))
    }

    /// Runs until nobody can offer anything any more.
    pub async fn run(mut self) {
        loop {
            let next = self.due.first().map(|(when, _)| *when);
            let due = async {
                match next {
                    Some(when) => sleep_until(when).await,
                    None => std::future::pending().await,
                }
            };
            let woken = async {
                match &mut self.waking {
                    Some(waking) => waking.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                message = self.messages.recv() => {
                    let Some(message) = message else { break };
                    self.take(message);
                }
                ready = self.events.readable_mut() => match ready {
                    Ok(mut ready) => {
                        let mut heard = Vec::new();
                        while let Some(item) = ready.get_inner_mut().next() {
                            heard.extend(sys::plain::<Event>(&item));
                        }
                        ready.clear_ready();
                        heard.into_iter().for_each(|e| self.hear(e));
                    }
                    Err(error) => {
                        tracing::error!(target: "capture", %error, "events of acceleration cannot be read any more");
                        return;
                    }
                },
                () = due => self.work(),
                woken = woken => {
                    self.waking = None;
                    if let Ok(Err(error)) = woken {
                        tracing::warn!(target: "capture", %error, "owners of sockets cannot be woken");
                    }
                }
            }
            self.wake();
        }
        // Nobody else will.
        if let Err(error) = self.kernel.wake(&self.wakes) {
            tracing::warn!(target: "capture", %error, "owners of sockets cannot be woken");
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Offer(id, pair) => {
                self.known.lock().insert(id, ((*pair).clone(), State::Young));
                self.entries.insert(id, Entry::new(*pair));
                self.schedule(id, Instant::now() + FIRST_LOOK);
            }
            Message::Withdraw(id) => {
                self.known.lock().remove(&id);
                let entry = self.entries.remove(&id);
                if let Some(due) = entry.as_ref().and_then(|entry| entry.due) {
                    self.due.remove(&(due, id));
                }
                // It may go on without this process, which must not be needed then.
                let Some(mut entry) = entry.filter(|e| e.pair.flow != 0 && e.phase != Phase::Outside) else { return };
                match self.take_out(id, &entry, true) {
                    Ok(true) => {
                        entry.withdraw();
                        self.entries.insert(id, entry);
                        self.schedule(id, Instant::now() + FIRST_LOOK);
                    }
                    Ok(false) => {}
                    Err(error) => tracing::debug!(target: "capture", %error, "a pair cannot be taken out"),
                }
            }
        }
    }

    fn hear(&mut self, event: Event) {
        let id = event.peer / 2;
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.wait = FIRST_LOOK;
        let is_for_now = event.why == Why::Message as u32;
        let state = match entry.phase {
            // Told of both directions, or before: what is for good counts.
            Phase::Leaving { returns, .. } if !returns || is_for_now => return,
            _ if is_for_now => entry.leave(),
            _ => {
                entry.phase = Phase::Leaving { returns: false, looks: 0 };
                State::of(event.why)
            }
        };
        if state == State::Blocking {
            let places = [entry.pair.one.clone(), entry.pair.other.clone()];
            self.learn(&places);
        }
        self.set(id, state);
        self.schedule(id, Instant::now());
    }

    /// Has a pair seen to at a time, and not when it was to be before.
    fn schedule(&mut self, id: u64, when: Instant) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Some(before) = entry.due.replace(when) {
            self.due.remove(&(before, id));
        }
        self.due.insert((when, id));
    }

    /// Remembers whose socket was made blocking.
    fn learn(&mut self, places: &[Place]) {
        for place in places {
            // One that is gone meanwhile says nothing; there will be another.
            if self.kernel.look(place).is_ok_and(|reply| reply.problem == 0 && reply.nonblocking == 0) {
                if self.unfit.len() >= MAX_UNFIT {
                    self.unfit.clear();
                }
                if self.unfit.insert(place.netns.inode()) {
                    tracing::info!(target: "capture", local = %place.local, remote = %place.remote, "a program makes sockets blocking that it has used; connections of its pod are not accelerated any more");
                }
            }
        }
    }

    fn set(&self, id: u64, state: State) {
        if let Some((_, known)) = self.known.lock().get_mut(&id)
            && *known != state
        {
            *known = state;
            (self.changed)(state);
        }
    }

    fn work(&mut self) {
        let now = Instant::now();
        while let Some((when, id)) = self.due.pop_first() {
            if when > now {
                self.due.insert((when, id));
                return;
            }
            let Some(mut entry) = self.entries.remove(&id) else { continue };
            entry.due = None;
            match self.see_to(id, &mut entry) {
                Ok(true) => {
                    entry.wait = (entry.wait * 2).min(LAST_LOOK);
                    let when = now + entry.wait;
                    self.entries.insert(id, entry);
                    self.schedule(id, when);
                }
                Ok(false) if entry.withdrawn => {}
                Ok(false) => drop(self.entries.insert(id, entry)),
                Err(error) => {
                    tracing::debug!(target: "capture", one = %entry.pair.one.local, other = %entry.pair.one.remote, %error, "a pair cannot be accelerated");
                    self.set(id, State::Failed);
                }
            }
        }
    }

    /// Does what is due for a pair; whether it is to be seen to again.
    fn see_to(&mut self, id: u64, entry: &mut Entry) -> io::Result<bool> {
        match entry.phase {
            Phase::Outside => self.consider(id, entry),
            Phase::Leaving { returns, looks } => {
                let stays = self.take_out(id, entry, looks == 0)?;
                if stays {
                    entry.phase = Phase::Leaving { returns, looks: looks.saturating_add(1) };
                    let most = if looks < LOOKS_LEAVING { LAST_LEAVING } else { STUCK };
                    entry.wait = entry.wait.min(most / 2);
                } else if returns {
                    // What was redirected counts as received and was not taken from TCP: the two begin anew.
                    entry.taken_out();
                    entry.wait = FIRST_LOOK * (1 << entry.returns.min(10));
                }
                Ok(stays || returns)
            }
            Phase::Joining { looks, settled } => {
                let now = self.kernel.is_settled(&entry.pair)?;
                // Twice: who was in the midst of sending by TCP at the first look has sent it at the second.
                if now && settled {
                    entry.phase = Phase::Inside;
                    entry.wait = LAST_LOOK;
                    self.set(id, State::Accelerated);
                    return Ok(true);
                }
                if now || looks < LOOKS_SETTLED {
                    entry.phase = Phase::Joining { looks: looks + 1, settled: now };
                    entry.wait = if now { FIRST_SETTLED / 2 } else { entry.wait };
                    return Ok(true);
                }
                self.set(id, entry.leave());
                self.see_to(id, entry)
            }
            Phase::Inside => {
                // It says so itself when it leaves, unless there was no room to say it.
                let left = [&entry.pair.one, &entry.pair.other].into_iter().map(|place| self.kernel.look(place));
                let left = left.collect::<io::Result<Vec<_>>>()?.iter().any(|reply| reply.problem == 0 && reply.way == Way::LEFT);
                if left {
                    self.set(id, entry.leave());
                    return self.see_to(id, entry);
                }
                Ok(true)
            }
        }
    }

    /// Takes a pair out when nothing is lost by it; whether it has to be tried again. A socket that is not found any more leaves by
    /// itself when its owner closes it, and not before: one that TCP is done with may still have redirected bytes to be read.
    /// `tell`: it has not been told to leave yet.
    fn take_out(&mut self, id: u64, entry: &Entry, tell: bool) -> io::Result<bool> {
        let Pair { one, other, .. } = &entry.pair;
        let leave = |place| self.kernel.ask(place, PairRequest { ask: PairRequest::LEAVE, ..PairRequest::default() });
        if tell {
            [one, other].into_iter().try_for_each(|place| leave(place).map(drop))?;
        }
        // Asked again: what was queued or under way before they were told to leave.
        let mut found = Vec::new();
        for (place, key) in [one, other].into_iter().zip(entry.keys(id)) {
            let reply = self.kernel.look(place)?;
            if reply.problem != 0 {
                continue;
            }
            if reply.way != Way::LEFT {
                // Its sender was in the midst of it.
                leave(place)?;
                return Ok(true);
            }
            if reply.references > 1 || reply.queued != 0 {
                return Ok(true);
            }
            found.push(key);
        }
        found.into_iter().for_each(|key| self.kernel.remove(key));
        // What came by TCP meanwhile raised its event together with what was redirected, or its owner was told that there is nothing.
        let (first, last) = (self.kernel.look(one)?, self.kernel.look(other)?);
        let is_unread = |reader: &PairReply, sender: &PairReply| reader.problem == 0 && reader.copied_seq != sender.write_seq;
        self.wakes.extend(is_unread(&first, &last).then(|| one.clone()));
        self.wakes.extend(is_unread(&last, &first).then(|| other.clone()));
        Ok(false)
    }

    /// Has owners woken by somebody else: it takes its time. One such at a time, for all there are by then.
    fn wake(&mut self) {
        if self.waking.is_none() && !self.wakes.is_empty() {
            let (kernel, places) = (self.kernel.clone(), std::mem::take(&mut self.wakes));
            self.waking = Some(tokio::task::spawn_blocking(move || kernel.wake(&places)));
        }
    }

    fn consider(&mut self, id: u64, entry: &mut Entry) -> io::Result<bool> {
        let (one, other) = (self.kernel.look(&entry.pair.one)?, self.kernel.look(&entry.pair.other)?);
        if [one, other].iter().any(|r| r.problem == PairReply::GONE || r.problem == 0 && r.established == 0) {
            self.set(id, State::Gone);
            return Ok(false);
        }
        if one.problem != 0 || other.problem != 0 {
            self.set(id, State::Full);
            return Ok(true);
        }
        if [&entry.pair.one, &entry.pair.other].iter().any(|p| self.unfit.contains(&p.netns.inode())) {
            self.set(id, State::Unfit);
            return Ok(false);
        }
        if one.references + other.references > 0 && one.peer != 0 && other.peer != 0 {
            // An earlier process has entered it, and nobody has heard since what became of it.
            entry.adopt([other.peer, one.peer]);
            self.set(id, State::Paused);
            return self.see_to(id, entry);
        }
        let young = one.segments_in < MESSAGES || one.segments_out < MESSAGES;
        if one.nonblocking == 0 || other.nonblocking == 0 {
            self.set(id, State::Blocking);
            // One that has talked like that is not waited for: it would be a program that changes its mind.
            return Ok(young);
        }
        if one.special != 0 || other.special != 0 {
            self.set(id, State::Special);
            return Ok(young);
        }
        if one.ring != 0 || other.ring != 0 {
            self.set(id, State::Ring);
            return Ok(false);
        }
        if young {
            self.set(id, entry.until_entered());
            return Ok(true);
        }
        let mean = |bytes: u64, messages: u32| bytes / u64::from(messages.max(1));
        if mean(one.bytes_received, one.segments_in) > MEAN_MESSAGE || mean(one.bytes_acked, one.segments_out) > MEAN_MESSAGE {
            self.set(id, State::Bulk);
            return Ok(true);
        }
        match entry.reads([&one, &other]) {
            Reads::Received => {}
            Reads::Unknown => {
                if entry.odd < ODD {
                    self.set(id, entry.until_entered());
                }
                return Ok(true);
            }
            Reads::Otherwise => {
                // Between being taken and being counted there is a moment, which a look can meet.
                entry.odd += 1;
                self.set(id, if entry.odd < ODD { entry.until_entered() } else { State::Spliced });
                return Ok(true);
            }
        }
        let joined = self.kernel.join(id, &entry.pair)?;
        entry.phase = if joined { Phase::Joining { looks: 0, settled: false } } else { Phase::Leaving { returns: false, looks: 0 } };
        entry.wait = FIRST_SETTLED / 2;
        if !joined {
            self.set(id, State::Full);
        }
        Ok(true)
    }
}
