//! The three listeners inside a pod and the tasks that accept from them.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_common::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

use crate::{
    capture::{NodeFlows, OriginalDestinations},
    id::canonical,
    io::{netns::Netns, socket},
    proxy::{Proxy, ServedPod, inbound, outbound, pods::Origins},
    spawn,
};

/// How long to wait when accepting fails for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// How long listeners go on when they are to close: a handshake that has begun ends with its listener, and so does who waits to be accepted.
const LAST_HANDSHAKES: Duration = Duration::from_millis(100);

/// A pod's listeners, not yet accepting.
pub struct Listeners {
    outbound: TcpListener,
    inbound: TcpListener,
    hbone: TcpListener,
}

impl Listeners {
    /// Listens in a pod's network namespace. Also another descriptor of the listener plaintext is steered to; the error says what is wrong.
    pub fn bind(netns: &Netns) -> Result<(Self, OwnedFd), String> {
        let listen = || {
            let outbound = socket::listen_locally(netns, OUTBOUND_PORT)?;
            Ok::<_, io::Error>(Self { outbound, inbound: socket::listen(netns, INBOUND_PORT)?, hbone: socket::listen(netns, HBONE_PORT)? })
        };
        let all = listen().map_err(|e| format!("cannot listen in the pod: {e}"))?;
        let inbound = all.inbound.as_fd().try_clone_to_owned().map_err(|e| format!("cannot duplicate a descriptor: {e}"))?;
        Ok((all, inbound))
    }

    /// Starts accepting.
    pub fn serve(self, proxy: &Arc<Proxy>, pod: &Arc<ServedPod>, mut originals: OriginalDestinations) -> Serving {
        let drain = Arc::new(watch::Sender::new(false));
        let (p, w) = (proxy.clone(), pod.clone());
        let outbound = tokio::spawn(accept(self.outbound, drain.clone(), move |stream, client| {
            // Taken also when there is no room, so that the entry does not stay.
            let original = stream.local_addr().ok().and_then(|local| originals.take(client, local.ip()));
            let Some(slot) = p.connection(&w) else { return refuse(&p, "outbound", &stream) };
            let Some(original) = original else { return outbound::lost(&p, &stream, client) };
            let (p, w, here) = (p.clone(), w.clone(), w.here());
            spawn::large(async move {
                outbound::serve(p, w, stream, client, original, *here).await;
                drop((slot, here));
            });
        }));
        let (p, w) = (proxy.clone(), pod.clone());
        let inbound = tokio::spawn(accept(self.inbound, drain.clone(), move |stream, client| {
            let Some(slot) = p.connection(&w) else { return refuse(&p, "inbound", &stream) };
            let (p, w, here) = (p.clone(), w.clone(), w.here());
            spawn::large(async move {
                inbound::serve_plaintext(p, w, stream, client, *here).await;
                drop((slot, here));
            });
        }));
        let (p, w) = (proxy.clone(), pod.clone());
        let hbone = tokio::spawn(accept(self.hbone, drain.clone(), move |stream, client| {
            let known = p.config.load().workload_by_ip(client.ip()).is_some();
            let (Some(slot), Some(caller)) = (p.connection(&w), w.caller(client.ip(), known)) else {
                return refuse(&p, "inbound", &stream);
            };
            let (p, w, here) = (p.clone(), w.clone(), w.here());
            spawn::large(async move {
                inbound::serve_hbone(p, w, stream, client, caller, *here).await;
                drop((slot, here));
            });
        }));
        Serving { drain, pod: pod.clone(), tasks: [outbound, inbound, hbone] }
    }
}

/// Resets a connection there is no room for.
fn refuse(proxy: &Proxy, direction: &'static str, stream: &TcpStream) {
    socket::reset_on_close(stream);
    proxy.metrics.failure(direction, "too_many_connections");
}

/// Listeners at work.
pub struct Serving {
    pod: Arc<ServedPod>,
    drain: Arc<watch::Sender<bool>>,
    tasks: [JoinHandle<()>; 3],
}

impl Serving {
    /// Whether nothing is accepted any more, as when one of the listeners has been ended: the others end with it.
    pub fn is_over(&self) -> bool {
        self.tasks.iter().all(JoinHandle::is_finished)
    }

    /// Tells clients to go elsewhere, and stops accepting when those have been taken that had begun to come. Connections go on.
    pub async fn drain(self) {
        self.drain.send_replace(true);
        self.pod.drain();
        for task in self.tasks {
            // A task that panicked has nothing left to drain.
            let _ = task.await;
        }
    }
}

/// Whether nobody has in the last second: what fails for one listener fails for all.
fn may_complain(now: Instant) -> bool {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock();
    let may = last.is_none_or(|last| now.saturating_duration_since(last) >= Duration::from_secs(1));
    if may {
        *last = Some(now);
    }
    may
}

async fn accept(listener: TcpListener, drain: Arc<watch::Sender<bool>>, mut serve: impl FnMut(TcpStream, SocketAddr)) {
    let mut draining = drain.subscribe();
    let stop = async {
        drop(draining.wait_for(|d| *d).await);
        tokio::time::sleep(LAST_HANDSHAKES).await;
    };
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            () = &mut stop => return,
        };
        match accepted {
            Ok((stream, client)) => serve(stream, SocketAddr::new(canonical(client.ip()), client.port())),
            // The client gave up while it waited.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
            // There is no listener any more: a pod can end what is in its namespace. It is told of where another takes its place.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EBADF | libc::ENOTSOCK)) => {
                drain.send_replace(true);
                return;
            }
            Err(error) => {
                if may_complain(Instant::now()) {
                    tracing::warn!(target: "proxy", %error, "accepting failed");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The kernel's word on which connections are the node's own.
#[derive(Debug)]
pub struct NodeOrigins(pub NodeFlows);

impl Origins for NodeOrigins {
    fn is_node(&self, client: SocketAddr, destination: SocketAddr) -> bool {
        self.0.is_node(client, destination)
    }
}
