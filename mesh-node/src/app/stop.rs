//! How a process ends in order.
//!
//! Everybody is asked to go elsewhere and waited for a little. Whoever comes is still served until those that were there have gone or
//! time is nearly up: nobody else would. Capture stays as it is: what happens to new connections after that is the fail mode's business.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
    time::{Instant, sleep},
};

use super::{listeners::Serving, node::Node};
use crate::proxy::live::Cut;

/// How long access logs may take to be written at the end, and spans to be sent.
const LOG_GRACE: Duration = Duration::from_millis(500);
/// How long before the end of a drain connections are taken no more, for the last of them to be answered; a quarter of it at most. Short: who is
/// refused loses more than who is cut, as most take less, and until the next process serves nobody else does.
const LAST_TO_COME: Duration = Duration::from_millis(300);
/// How long connections that have come are waited for that have not said anything.
const LAST_TO_SPEAK: Duration = Duration::from_secs(1);

/// The signals that stop a process in order.
pub(super) struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

/// Signals that mean something to other programs (reload, open logs anew) and nothing here, where it happens by itself; left alone they would
/// end the process at once.
pub(super) fn ignore_others() -> io::Result<()> {
    for (name, kind) in
        [("SIGHUP", SignalKind::hangup()), ("SIGUSR1", SignalKind::user_defined1()), ("SIGUSR2", SignalKind::user_defined2())]
    {
        let mut heard = signal(kind)?;
        tokio::spawn(async move {
            while heard.recv().await.is_some() {
                tracing::info!(target: "app", signal = name, "ignored: configuration, certificates and logs are looked at all the time");
            }
        });
    }
    Ok(())
}

impl StopSignals {
    pub fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next of them; nothing is lost when this is dropped.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// A node that has been told to stop.
pub(super) struct Stopping {
    began: Instant,
    /// By a signal: another ends the waiting.
    signalled: bool,
    /// The signal after a signal.
    told_again: Option<&'static str>,
}

/// Completes when the node has been told to stop and those that were there have left, or are waited for no more.
pub(super) async fn when_told(node: &Node, signals: &mut StopSignals) -> Stopping {
    let signalled = tokio::select! {
        signal = signals.next() => {
            tracing::info!(target: "app", signal, "stopping");
            true
        }
        () = node.stop.notified() => {
            tracing::info!(target: "app", "stopping, as asked");
            false
        }
    };
    node.stopping.store(true, Ordering::Relaxed);
    let mut stopping = Stopping { began: Instant::now(), signalled, told_again: None };
    let before = node.proxy.pods.all().iter().map(|pod| pod.leave()).collect::<Vec<_>>();
    let gone = || before.iter().all(|here| here.strong_count() == 0);
    let drain = node.settings.drain;
    stopping.wait_until(gone, drain.saturating_sub(LAST_TO_COME.min(drain / 4)), signals).await;
    stopping
}

impl Stopping {
    /// Takes no more connections, waits for what is open for as long as there is time, and cuts the rest.
    pub async fn finish(mut self, node: &Arc<Node>, signals: &mut StopSignals, all: impl Iterator<Item = Serving>) {
        node.capture().withdraw();
        crate::spawn::aside(|| node.direct.settle());
        node.direct.hand_over();
        let pods = node.proxy.pods.all();
        let accepting = all.map(|serving| tokio::spawn(serving.drain())).collect::<Vec<_>>();
        node.proxy.spans.flush(LOG_GRACE).await;
        node.proxy.pool.close();
        let (metrics, closing) = (node.proxy.metrics.clone(), Instant::now());
        let over = || {
            // What is kept for requests that do not come any more keeps nobody.
            pods.iter().for_each(|p| p.clusters.retire());
            // Nor do those that say nothing; but who has just come is not cut before it is known what for.
            let settled = pods.iter().all(|p| p.is_left()) || closing.elapsed() >= LAST_TO_SPEAK;
            let accepted = accepting.iter().all(JoinHandle::is_finished);
            accepted && settled && metrics.open_connections.get() + metrics.http_active.get() == 0
        };
        self.wait_until(over, node.settings.drain, signals).await;
        if let Some(signal) = self.told_again {
            tracing::warn!(target: "app", signal, open = metrics.open_connections.get(), "told to stop again: what is open is cut");
        }
        // What was let finish is told while its pods can still be asked for.
        node.proxy.spans.flush(LOG_GRACE).await;
        pods.iter().for_each(|p| p.end(Cut::Shutdown));
        sleep(Duration::from_millis(50)).await;
        node.proxy.spans.flush(LOG_GRACE).await;
        // A writer that hangs keeps nobody.
        let _ = tokio::task::spawn_blocking(move || metrics.access.flush(LOG_GRACE)).await;
    }

    /// Waits until it is so, this much time has passed since the beginning, or there is a signal after a signal.
    async fn wait_until(&mut self, is_so: impl Fn() -> bool, at_most: Duration, signals: &mut StopSignals) {
        while self.told_again.is_none() && !is_so() && self.began.elapsed() < at_most {
            tokio::select! {
                () = sleep(Duration::from_millis(20)) => {}
                signal = signals.next() => {
                    if std::mem::replace(&mut self.signalled, true) {
                        self.told_again = Some(signal);
                    }
                }
            }
        }
    }
}
