//! Looking into a connection whose requests have to be judged: what it carries is found out, HTTP goes to the guard, and
//! what is not HTTP is judged without requests.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};

use super::{Admitted, cut};
use crate::{
    detect::{Detected, Protocol, detect, is_http2_server},
    io::{
        relay::{Traffic, relay},
        socket::reset_on_close,
    },
    policy::{Facts, Sni},
    proxy::{
        Failure, Proxy, ServedPod,
        http::{
            gate::{self, Gate},
            guard,
            transport::Transport,
        },
        live::Carries,
    },
};

/// How long the first bytes may take to become a whole request line or client hello.
const WHOLE: Duration = Duration::from_millis(500);
/// How long a client that is not let in may take to say what it speaks.
const REFUSED_WHOLE: Duration = Duration::from_secs(1);
/// First bytes looked at, at most.
const MOST: usize = 72 * 1024;

/// A connection that was let in and has to be looked into.
pub struct Inspection<'a> {
    pub proxy: &'a Arc<Proxy>,
    pub pod: &'a Arc<ServedPod>,
    pub admitted: Admitted,
    pub client: SocketAddr,
    pub traffic: Arc<Traffic>,
}

/// What a connection carries.
enum Spoken {
    Http1,
    Http2,
    Opaque(Option<Arc<str>>),
}

impl Inspection<'_> {
    /// Serves the connection to its end.
    pub async fn run(self, mut downstream: Transport) -> Result<(), Failure> {
        let Self { proxy, pod, admitted, client, traffic } = self;
        let Admitted { application, mut registration, mut facts, .. } = admitted;
        let protocol = declared(proxy, pod, &facts);
        let (spoken, read) = tokio::select! {
            biased;
            reason = cut(&mut registration, pod) => Err(Failure::Cut(reason)),
            found = look(&mut downstream, protocol, Some(&application), None) => Ok(found),
        }
        .inspect_err(|_| reset_on_close(&application))?;
        let downstream = downstream.unread(read);
        match spoken {
            Spoken::Http1 | Spoken::Http2 => {
                registration.carries(Carries::Requests, None);
                let gate = Gate::new(proxy.clone(), pod.clone(), facts, client);
                let serving = async {
                    if matches!(spoken, Spoken::Http1) {
                        guard::serve_h1(&gate, downstream, Some(application)).await;
                    } else if let Err(error) = guard::serve_h2(Arc::new(gate), downstream, Some(application)).await {
                        tracing::debug!(target: "proxy", %client, %error, "HTTP/2 connection into a pod ended");
                    }
                };
                tokio::select! {
                    biased;
                    reason = cut(&mut registration, pod) => Err(Failure::Cut(reason)),
                    () = serving => Ok(()),
                }
            }
            Spoken::Opaque(name) => {
                facts.sni = Sni::Read(name);
                registration.carries(Carries::Opaque, Some(&facts.sni));
                let judged = {
                    let snapshot = proxy.config.load();
                    let workload = snapshot.workload(&pod.uid).ok_or(Failure::UnknownWorkload);
                    workload.and_then(|workload| {
                        workload.policy.opaque(&facts).map_err(Failure::Denied)?;
                        let observed = workload.policy.at(facts.destination.port()).observed(&facts, None);
                        gate::observe(proxy, &facts, &observed, None);
                        Ok(())
                    })
                };
                if let Err(failure) = judged {
                    if let Failure::Denied(denial) = &failure {
                        proxy.metrics.policy_decision(denial.policy(), "denied");
                    }
                    downstream.reset();
                    reset_on_close(&application);
                    return Err(failure);
                }
                let cut = cut(&mut registration, pod);
                match downstream {
                    Transport::Tcp(stream) => relay(stream, application, &traffic, cut).await?,
                    Transport::Prefixed(stream) => relay(stream, application, &traffic, cut).await?,
                    Transport::Tunnel(tunnel) => relay(*tunnel, application, &traffic, cut).await?,
                }
                Ok(())
            }
        }
    }
}

/// Tells a client that is not let in, in HTTP if it speaks that; else its connection is reset.
pub async fn refuse(proxy: &Arc<Proxy>, pod: &Arc<ServedPod>, facts: Facts, downstream: TcpStream, client: SocketAddr) {
    let mut downstream = Transport::Tcp(downstream);
    let protocol = declared(proxy, pod, &facts);
    let spoken = match protocol {
        Protocol::Tcp | Protocol::Tls => return downstream.reset(),
        _ => timeout(REFUSED_WHOLE, look(&mut downstream, protocol, None, Some(REFUSED_WHOLE))).await,
    };
    let Ok((spoken, read)) = spoken else { return downstream.reset() };
    let gate = Gate::new(proxy.clone(), pod.clone(), facts, client);
    let downstream = downstream.unread(read);
    let told = async {
        match spoken {
            Spoken::Opaque(_) => downstream.reset(),
            Spoken::Http1 => drop(guard::serve_h1(&gate, downstream, None).await),
            // Ends with the connection, or by the clock.
            Spoken::Http2 => drop(guard::serve_h2(Arc::new(gate), downstream, None).await),
        }
    };
    // A client that is still there after that has been told.
    let _ = timeout(REFUSED_WHOLE * 2, told).await;
}

fn declared(proxy: &Proxy, pod: &ServedPod, facts: &Facts) -> Protocol {
    let snapshot = proxy.config.load();
    snapshot.workload(&pod.uid).map_or(Protocol::Detect, |w| w.protocol(facts.destination.port()))
}

/// Finds out what a connection carries; the bytes read for that are returned. An application that speaks first carries no
/// HTTP.
async fn look(
    downstream: &mut Transport,
    declared: Protocol,
    application: Option<&TcpStream>,
    patience: Option<Duration>,
) -> (Spoken, Bytes) {
    match declared {
        Protocol::Tcp => return (Spoken::Opaque(None), Bytes::new()),
        Protocol::Tls | Protocol::Detect | Protocol::Http | Protocol::Http2 | Protocol::Grpc => {}
    }
    let mut read = BytesMut::new();
    let mut deadline = patience.map(|p| Instant::now() + p);
    let (mut source, _) = downstream.halves();
    loop {
        let detected = detect(&read);
        match detected {
            Detected::Http2 => return (Spoken::Http2, read.freeze()),
            Detected::Http1 => return (Spoken::Http1, read.freeze()),
            Detected::Tls(name) if !declared.is_http() => return (Spoken::Opaque(name.map(Arc::from)), read.freeze()),
            Detected::Opaque if !declared.is_http() && !claims_http(&read) => return (Spoken::Opaque(None), read.freeze()),
            // What is declared to be HTTP, or says that it is, is refused as such if it is malformed.
            Detected::Opaque | Detected::Tls(_) => return (Spoken::Http1, read.freeze()),
            Detected::More if read.len() >= MOST => return (Spoken::Http1, read.freeze()),
            Detected::More => {}
        }
        let speaks_first = async {
            match application {
                Some(application) if read.is_empty() && !declared.is_http() => server_first(application).await,
                _ => std::future::pending().await,
            }
        };
        let late = async {
            match deadline {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            next = source.next() => match next {
                Ok(Some(data)) => {
                    if read.is_empty() {
                        deadline = Some(Instant::now() + WHOLE);
                    }
                    read.extend_from_slice(&data);
                }
                // Closed, or half of it, with less than a request.
                Ok(None) | Err(_) => return (Spoken::Opaque(None), read.freeze()),
            },
            () = speaks_first => return (Spoken::Opaque(None), Bytes::new()),
            // A beginning that may yet become a request is held to be one: who waits with the rest does not get past.
            () = late => return (if read.is_empty() { Spoken::Opaque(None) } else { Spoken::Http1 }, read.freeze()),
        }
    }
}

/// Completes when the application has said something that no HTTP server says first, or has closed.
pub async fn server_first(application: &TcpStream) {
    let mut first = [0; 9];
    loop {
        match application.peek(&mut first).await {
            Ok(n) if n == first.len() && is_http2_server(&first) => return std::future::pending().await,
            Ok(n) if n > 0 && n < first.len() && first.starts_with(&[0]) => tokio::time::sleep(Duration::from_millis(1)).await,
            _ => return,
        }
    }
}

/// Whether the first line says that it is HTTP, however malformed: an application may be more lenient than the detection.
fn claims_http(read: &[u8]) -> bool {
    let line = read.split(|b| *b == b'\n').next().unwrap_or_default();
    line.windows(5).any(|w| w.eq_ignore_ascii_case(b"HTTP/"))
}
