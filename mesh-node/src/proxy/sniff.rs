//! Finding out what a captured connection speaks, before anything is decided about it.
//!
//! A port that declares its protocol is believed. Otherwise the first bytes tell. A client that sends nothing at first may
//! be waiting for the server to speak: after [`CLIENT_FIRST`] the connection is established as an opaque one, so that the
//! server can; whoever speaks first then decides. That connection is kept unless the client sends a request, which may lead elsewhere.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    Proxy, ServedPod,
    outbound::{Established, Opaque},
    pods::Stage,
};
use crate::{
    detect::{Detected, MAX_FIRST_BYTES, Protocol, detect},
    io::socket::reset_on_close,
    route::Target,
};

/// How long a client is given to speak first before the server is connected, so that it can.
const CLIENT_FIRST: Duration = Duration::from_millis(3);
/// How long the first bytes may take to become a whole request line or client hello; then they are opaque.
const HEAD_TIMEOUT: Duration = Duration::from_millis(500);

/// What a connection turned out to be.
pub(super) enum Begun {
    Http {
        downstream: TcpStream,
        read: Bytes,
        http2: bool,
    },
    Opaque {
        downstream: TcpStream,
        read: Bytes,
        sni: Option<String>,
        established: Option<Box<Established>>,
    },
    /// The client closed before it sent anything.
    Gone,
}

pub(super) async fn begin(
    proxy: &Arc<Proxy>,
    (pod, since): (&Arc<ServedPod>, Stage),
    mut downstream: TcpStream,
    client: SocketAddr,
    original: SocketAddr,
) -> Begun {
    let looks = looks(proxy, pod, original);
    if looks == Looks::Opaque {
        return Begun::Opaque { downstream, read: Bytes::new(), sni: None, established: None };
    }
    let (mut read, mut kept) = (BytesMut::new(), None);
    if looks == Looks::Any {
        let first = tokio::select! {
            biased;
            first = downstream.read_buf(&mut read) => Some(first),
            () = sleep(CLIENT_FIRST) => None,
        };
        match first {
            Some(Ok(n)) if n > 0 => {}
            // Closed at once, and half of it perhaps only: what the server says to that is its own business.
            Some(_) => return Begun::Opaque { downstream, read: Bytes::new(), sni: None, established: None },
            None => match server_first(proxy, (pod, since), &mut downstream, &mut read, (client, original)).await {
                First::Client(established) => kept = established,
                First::Server(established) => {
                    return Begun::Opaque { downstream, read: Bytes::new(), sni: None, established: Some(established) };
                }
                First::Neither => return Begun::Gone,
            },
        }
    }
    // Who speaks HTTP and has not asked yet asks elsewhere.
    let leaves = (looks == Looks::Http).then_some(since);
    let detected = look(&mut downstream, &mut read, pod, leaves).await;
    let read = read.freeze();
    match detected {
        Some(Detected::Http2) => Begun::Http { downstream, read, http2: true },
        // What a proxy is asked for is its own business, where nothing says that it is for this one.
        Some(Detected::Http1) if looks == Looks::Any && asks_a_proxy(&read) => {
            Begun::Opaque { downstream, read, sni: None, established: kept }
        }
        // A port that declares HTTP gets HTTP: what is not is refused as such.
        Some(found) if found == Detected::Http1 || looks == Looks::Http => Begun::Http { downstream, read, http2: false },
        // A name leads elsewhere on ports that declare TLS alone.
        Some(Detected::Tls(sni)) => Begun::Opaque { downstream, read, sni, established: kept },
        None if read.is_empty() => Begun::Gone,
        Some(_) | None => Begun::Opaque { downstream, read, sni: None, established: kept },
    }
}

/// Whether the first request of HTTP/1 is one for a proxy: a CONNECT, or for a whole URL.
fn asks_a_proxy(read: &[u8]) -> bool {
    let mut words = read.trim_ascii_start().split(|b| *b == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let begins = |scheme: &[u8]| target.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme));
    method == b"CONNECT" || begins(b"http://") || begins(b"https://")
}

/// Who spoke first.
enum First {
    /// On this connection, if it is no request: those may lead elsewhere.
    Client(Option<Box<Established>>),
    Server(Box<Established>),
    /// The server cannot be reached.
    Neither,
}

/// Connects the server, so that it can speak. A connection it says nothing on before the client does is given up where a client's
/// request decides where it goes.
async fn server_first(
    proxy: &Arc<Proxy>,
    (pod, since): (&Arc<ServedPod>, Stage),
    downstream: &mut TcpStream,
    read: &mut BytesMut,
    (client, original): (SocketAddr, SocketAddr),
) -> First {
    let opaque = Opaque { proxy: proxy.clone(), pod: pod.clone(), client, original, since, sni: None };
    let established = {
        let downstream = &*downstream;
        let mut establishing = std::pin::pin!(opaque.establish_for_now(downstream));
        let mut said = Said::Nothing;
        loop {
            tokio::select! {
                established = &mut establishing => break established.map_err(|failed| (said, Some(failed))),
                // What the client says may lead elsewhere, and then nobody is to be connected for nothing; anything else goes where this does.
                now = hear(downstream, read), if said != Said::All => {
                    said = now;
                    if said == Said::Elsewhere {
                        break Err((said, None));
                    }
                }
            }
        }
    };
    let mut established = match established {
        Ok(established) if read.is_empty() => established,
        Ok(established) => return First::Client(Some(Box::new(established))),
        Err((Said::Elsewhere, _)) => return First::Client(None),
        // The server cannot be reached: what the client has yet to say may lead elsewhere.
        Err((said, mut failed)) => {
            let more = async { if said == Said::All { Ok(0) } else { downstream.read_buf(read).await } };
            let more = timeout(HEAD_TIMEOUT, more).await;
            let leads = !read.is_empty() && said != Said::All && matches!(more, Ok(Ok(_)));
            if leads && let Some(failed) = &mut failed {
                // What comes of it is yet to be seen.
                failed.keep_quiet(true);
            }
            return if leads { First::Client(None) } else { refused(downstream) };
        }
    };
    tokio::select! {
        biased;
        n = downstream.read_buf(read) => match n {
            Ok(n) if n > 0 => First::Client(Some(Box::new(established))),
            // Closed, or half of it: what the server says to that is its own business.
            _ => First::Server(Box::new(established)),
        },
        () = established.server_spoke() => First::Server(Box::new(established)),
        _ = pod.ended() => First::Neither,
    }
}

/// What a client has said while its server is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Nothing,
    /// A request.
    Elsewhere,
    /// It says nothing more that decides anything: what it has said is neither of these, or it has closed.
    All,
}

/// Hears what the client says next.
async fn hear(downstream: &TcpStream, read: &mut BytesMut) -> Said {
    loop {
        if downstream.readable().await.is_err() {
            return Said::All;
        }
        match downstream.try_read_buf(read) {
            Ok(n) if n > 0 => match detect(read) {
                Detected::More if read.len() < MAX_FIRST_BYTES => {}
                Detected::Opaque | Detected::Tls(_) | Detected::More => return Said::All,
                Detected::Http1 | Detected::Http2 => return Said::Elsewhere,
            },
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Ok(_) | Err(_) => return Said::All,
        }
    }
}

fn refused(downstream: &TcpStream) -> First {
    reset_on_close(downstream);
    First::Neither
}

/// What there is to find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looks {
    /// Which version of HTTP.
    Http,
    /// Whether it is HTTP at all.
    Any,
    /// The server name of TLS, if it begins with that.
    Tls,
    Opaque,
}

fn looks(proxy: &Proxy, pod: &ServedPod, original: SocketAddr) -> Looks {
    let snapshot = proxy.config.load();
    let Some(source) = snapshot.workload(&pod.uid) else { return Looks::Opaque };
    let Target::Service { port, .. } = snapshot.resolve_for(&source.view, original) else { return Looks::Opaque };
    match port.cluster.protocol {
        Protocol::Http | Protocol::Http2 | Protocol::Grpc | Protocol::GrpcWeb => Looks::Http,
        Protocol::Detect => Looks::Any,
        Protocol::Tls if !port.routes.tls.is_empty() => Looks::Tls,
        Protocol::Tls | Protocol::Tcp => Looks::Opaque,
    }
}

/// Reads until it can be told. `None`: the client has closed, is gone, or is to go. `leaves`: it can be asked to.
async fn look(downstream: &mut TcpStream, read: &mut BytesMut, pod: &ServedPod, leaves: Option<Stage>) -> Option<Detected> {
    let draining = async {
        match leaves {
            Some(since) => pod.draining_idle(since).await,
            None => std::future::pending().await,
        }
    };
    let mut draining = std::pin::pin!(draining);
    let deadline = sleep(HEAD_TIMEOUT);
    let mut deadline = std::pin::pin!(deadline);
    let mut begun = !read.is_empty();
    loop {
        let detected = detect(read);
        if detected != Detected::More {
            return Some(detected);
        }
        if read.len() >= MAX_FIRST_BYTES {
            return Some(Detected::Opaque);
        }
        tokio::select! {
            biased;
            n = downstream.read_buf(read) => match n {
                Ok(n) if n > 0 => {
                    if !begun {
                        // Until now it had all the time it liked.
                        deadline.as_mut().reset(tokio::time::Instant::now() + HEAD_TIMEOUT);
                        begun = true;
                    }
                }
                _ => return None,
            },
            () = &mut deadline, if begun => return Some(Detected::Opaque),
            () = &mut draining, if !begun => return None,
            _ = pod.ended() => return None,
        }
    }
}
