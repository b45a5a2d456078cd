//! Looking into a connection whose requests have to be judged: what it carries is found out, HTTP goes to the guard, and
//! what is not HTTP is judged without requests.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ::http::HeaderValue;
use bytes::{Bytes, BytesMut};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};

use super::{Admitted, cut};
use crate::{
    detect::{Detected, MAX_FIRST_BYTES, Protocol, TLS_HANDSHAKE, detect, is_http2_server},
    io::{
        relay::{Traffic, relay},
        socket::reset_on_close,
    },
    policy::{Denial, Facts, Sni},
    proxy::{
        Failure, Proxy, ServedPod,
        http::{
            self, authorizer,
            gate::{self, Gate},
            guard::{self, Ends},
            transport::Transport,
        },
        live::{Carries, Cut, Note},
        pods::Stage,
    },
};

/// How long the first bytes may take to become a whole request line or client hello.
const WHOLE: Duration = Duration::from_millis(500);
/// How long a client that is not let in may take to say what it speaks.
const REFUSED_WHOLE: Duration = Duration::from_secs(1);
/// How long a client hello may take that has begun.
const HELLO: Duration = Duration::from_secs(10);

/// A connection that was let in and has to be looked into.
pub struct Inspection<'a> {
    pub proxy: &'a Arc<Proxy>,
    pub pod: &'a Arc<ServedPod>,
    pub admitted: Admitted,
    pub client: SocketAddr,
    /// When the connection came that it is, or that it came in.
    pub since: Stage,
    pub traffic: Arc<Traffic>,
    /// Told when it turns out to carry requests.
    pub requests: Arc<AtomicBool>,
    /// Told which server the client names.
    pub sni: Arc<OnceLock<Arc<str>>>,
    /// Who the client says it is.
    pub introduction: Option<HeaderValue>,
}

/// What a connection carries.
enum Spoken {
    Http1,
    /// What is no HTTP on a port that is declared to carry it, or may be it to a lenient application, or begins like it.
    Unlike,
    /// Text that does not begin like a request, of which the first line is not whole.
    Text,
    Http2,
    /// With the server name, as far as it is known.
    Opaque(Sni),
}

impl Spoken {
    /// What it is taken for where it could be something else.
    fn held_to_be(self, proxy: &Proxy, pod: &ServedPod, facts: &Facts) -> Self {
        match self {
            Self::Unlike | Self::Text if is_free(proxy, pod, facts) => Self::Opaque(Sni::Unread),
            // What policies ask of requests denies it then.
            Self::Text if !asks(proxy, pod, facts) => Self::Opaque(Sni::Unread),
            Self::Unlike | Self::Text => Self::Http1,
            certain => certain,
        }
    }
}

impl Inspection<'_> {
    /// Serves the connection to its end, or until policy, the end of the pod or `ended` wants it cut.
    pub async fn run(self, mut downstream: Transport, ended: impl Future<Output = Cut> + Send) -> Result<(), Failure> {
        let Self { proxy, pod, admitted, client, since, traffic, requests, sni, introduction } = self;
        let Admitted { application, mut registration, mut facts, .. } = admitted;
        let protocol = declared(proxy, pod, &facts);
        let note = registration.note();
        // Where no policy asks about requests, an application may speak what it likes, and first.
        let free = protocol.is_http() && is_free(proxy, pod, &facts);
        let listened = Some(&application).filter(|_| free || !protocol.is_http());
        let ending = async {
            tokio::select! {
                biased;
                reason = cut(&mut registration, pod) => reason,
                reason = ended => reason,
            }
        };
        let mut ending = std::pin::pin!(ending);
        let (spoken, read) = tokio::select! {
            biased;
            reason = &mut ending => Err(Failure::Cut(reason)),
            found = look(&mut downstream, protocol, listened, None) => Ok(found),
        }
        .inspect_err(|_| {
            downstream.reset_when_dropped();
            reset_on_close(&application);
        })?;
        let downstream = downstream.unread(read);
        // Not before: policies may have changed.
        let spoken = spoken.held_to_be(proxy, pod, &facts);
        // Opaque connections do not carry the room that requests need.
        match spoken {
            Spoken::Http1 | Spoken::Unlike | Spoken::Text => {
                note.carries(Carries::Requests);
                requests.store(true, Ordering::Relaxed);
                let gate = Gate::new(proxy.clone(), pod.clone(), facts, client).before(&application).come(since).introduced(introduction);
                Box::pin(http1(&gate, downstream, application, ending, &traffic)).await
            }
            Spoken::Http2 => {
                note.carries(Carries::Requests);
                requests.store(true, Ordering::Relaxed);
                let gate = Gate::new(proxy.clone(), pod.clone(), facts, client).before(&application).come(since).introduced(introduction);
                Box::pin(http2(gate, downstream, application, ending, traffic)).await
            }
            Spoken::Opaque(name) => {
                if let Sni::Read(Some(name)) = &name {
                    // It is the first to say so.
                    let _ = sni.set(name.clone());
                }
                facts.sni = name;
                let mut downstream = downstream;
                let gone = async { downstream.halves().1.broken().await };
                let judged = tokio::select! {
                    biased;
                    reason = &mut ending => Err(Failure::Cut(reason)),
                    error = gone => Err(Failure::Broken(error)),
                    judged = judge_opaque(proxy, pod, &facts, client, &note) => judged,
                };
                if let Err(failure) = judged {
                    downstream.reset();
                    reset_on_close(&application);
                    return Err(failure);
                }
                match downstream {
                    Transport::Tcp(stream) => relay(stream, application, &traffic, ending).await?,
                    Transport::Prefixed(stream) => relay(stream, application, &traffic, ending).await?,
                    Transport::Tunnel(tunnel) => relay(*tunnel, application, &traffic, ending).await?,
                }
                Ok(())
            }
        }
    }
}

/// Whether a connection is let in, whatever it carries: what is only observed keeps nobody out.
fn is_free(proxy: &Proxy, pod: &ServedPod, facts: &Facts) -> bool {
    let snapshot = proxy.config.load();
    snapshot.workload(&pod.uid).is_some_and(|w| w.policy.allows_uninspected(facts))
}

/// Whether tokens or authorizers are asked about requests, of which a connection that carries none knows nothing.
fn asks(proxy: &Proxy, pod: &ServedPod, facts: &Facts) -> bool {
    let snapshot = proxy.config.load();
    snapshot.workload(&pod.uid).is_none_or(|w| w.policy.asks(facts))
}

async fn http1(
    gate: &Gate,
    mut downstream: Transport,
    application: TcpStream,
    ending: impl Future<Output = Cut> + Send,
    traffic: &Traffic,
) -> Result<(), Failure> {
    let mut application = Transport::Tcp(application);
    let ended = guard::serve_h1(gate, &mut downstream, Some(&mut application), traffic, ending).await;
    if ended != Ok(Ends::Closed) {
        ended.unwrap_or(Ends::Reset).end(downstream);
        application.reset();
    }
    ended.map(drop).map_err(Failure::Cut)
}

async fn http2(
    gate: Gate,
    downstream: Transport,
    application: TcpStream,
    ending: impl Future<Output = Cut> + Send,
    traffic: Arc<Traffic>,
) -> Result<(), Failure> {
    let client = gate.client;
    let served = guard::serve_h2(Arc::new(gate), downstream, Some(Transport::Tcp(application)), traffic, ending).await;
    if let Err(error) = served.map_err(Failure::Cut)? {
        tracing::debug!(target: "proxy", %client, %error, "HTTP/2 connection into a pod ended");
    }
    Ok(())
}

/// Whether a connection that was let in may be what it turned out to be: one that carries no requests.
async fn judge_opaque(proxy: &Arc<Proxy>, pod: &Arc<ServedPod>, facts: &Facts, client: SocketAddr, note: &Note) -> Result<(), Failure> {
    let denied = |denial: Denial| {
        proxy.metrics.policy_decision(denial.policy(), "denied");
        Failure::Denied(denial)
    };
    let asked = {
        let snapshot = proxy.config.load();
        let workload = snapshot.workload(&pod.uid).ok_or(Failure::UnknownWorkload)?;
        let asked = workload.policy.at(facts.destination.port()).connection_authorizers(facts);
        (!asked.is_empty()).then(|| (snapshot.clone(), asked))
    };
    let mut allowed_by = Vec::new();
    if let Some((snapshot, asked)) = asked {
        let gate = Gate::new(proxy.clone(), pod.clone(), facts.clone(), client);
        for (provider, policy) in asked {
            let answer = Box::pin(authorizer::ask_connection(&gate, &snapshot, &provider)).await;
            answer.map_err(|details| denied(Denial::External { policy, details }))?;
            allowed_by.extend(snapshot.authorizers.get(&provider).cloned());
        }
    }
    note.carries_opaque(&facts.sni, &allowed_by);
    let snapshot = proxy.config.load();
    let workload = snapshot.workload(&pod.uid).ok_or(Failure::UnknownWorkload)?;
    workload.policy.opaque(facts, &snapshot.unchanged(&allowed_by)).map_err(denied)?;
    let observed = workload.policy.at(facts.destination.port()).observed(facts, None);
    gate::observe(proxy, facts, &observed, None);
    Ok(())
}

/// Tells a client that is not let in, in HTTP if it speaks that, which `requests` is told; else its connection is reset.
pub async fn refuse(
    proxy: &Arc<Proxy>,
    pod: &Arc<ServedPod>,
    facts: Facts,
    downstream: TcpStream,
    client: SocketAddr,
    requests: &AtomicBool,
) {
    let mut downstream = Transport::Tcp(downstream);
    let protocol = declared(proxy, pod, &facts);
    let spoken = match protocol {
        Protocol::Tcp | Protocol::Tls => return downstream.reset(),
        _ => timeout(REFUSED_WHOLE, look(&mut downstream, protocol, None, Some(REFUSED_WHOLE))).await,
    };
    let Ok((spoken, read)) = spoken else { return downstream.reset() };
    let gate = Gate::new(proxy.clone(), pod.clone(), facts, client);
    let mut downstream = downstream.unread(read);
    requests.store(!matches!(spoken, Spoken::Opaque(_) | Spoken::Text), Ordering::Relaxed);
    let told = async {
        match spoken {
            Spoken::Opaque(_) | Spoken::Text => downstream.reset(),
            Spoken::Http1 | Spoken::Unlike => {
                let ended = guard::serve_h1(&gate, &mut downstream, None, &Traffic::default(), pod.ended()).await;
                ended.unwrap_or(Ends::Reset).end(downstream);
            }
            // Ends with the connection, or by the clock.
            Spoken::Http2 => drop(guard::serve_h2(Arc::new(gate), downstream, None, Arc::default(), pod.ended()).await),
        }
    };
    // A client that is still there after that has been told.
    let _ = timeout(REFUSED_WHOLE * 2, told).await;
}

/// What the port is declared to carry; TCP that some policy asks the server name of is looked at for TLS.
fn declared(proxy: &Proxy, pod: &ServedPod, facts: &Facts) -> Protocol {
    let (snapshot, port) = (proxy.config.load(), facts.destination.port());
    let Some(workload) = snapshot.workload(&pod.uid) else { return Protocol::Detect };
    match workload.protocol(port) {
        Protocol::Tcp if workload.policy.at(port).authorization.asks_sni => Protocol::Tls,
        declared => declared,
    }
}

/// Finds out what a connection carries; the bytes read for that are returned. An application that speaks first, where one is listened
/// to, carries no HTTP.
async fn look(
    downstream: &mut Transport,
    declared: Protocol,
    application: Option<&TcpStream>,
    patience: Option<Duration>,
) -> (Spoken, Bytes) {
    match declared {
        Protocol::Tcp => return (Spoken::Opaque(Sni::Unread), Bytes::new()),
        Protocol::Tls | Protocol::Detect | Protocol::Http | Protocol::Http2 | Protocol::Grpc | Protocol::GrpcWeb => {}
    }
    let mut read = BytesMut::new();
    let mut deadline = patience.map(|p| Instant::now() + p);
    let (mut source, _) = downstream.halves();
    let mut patient = false;
    loop {
        // Servers skip empty lines before a request.
        let begun = &read[http::wire::leading_line_ends(&read)..];
        if let Some(spoken) = spoken(begun, declared, read.len() >= MAX_FIRST_BYTES) {
            return (spoken, read.freeze());
        }
        let hello = begun.first() == Some(&TLS_HANDSHAKE);
        let speaks_first = async {
            match application {
                Some(application) if read.is_empty() => server_first(application).await,
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
                // Closed, or half of it, with less than a request: an application may take even that for one (HTTP/0.9).
                Ok(None) | Err(_) => return match (declared, read.is_empty(), hello) {
                    (_, true, _) => (Spoken::Opaque(Sni::Read(None)), Bytes::new()),
                    (Protocol::Tls, ..) | (_, _, true) => (Spoken::Opaque(Sni::Unread), read.freeze()),
                    _ => (ended(begun, declared), read.freeze()),
                },
            },
            () = speaks_first => return (Spoken::Opaque(Sni::Read(None)), Bytes::new()),
            () = late => match (read.is_empty(), hello) {
                (true, _) => return (Spoken::Opaque(Sni::Unread), Bytes::new()),
                // A client hello of several segments may have lost one of them.
                (_, true) if !patient => (deadline, patient) = (Some(Instant::now() + HELLO), true),
                (_, true) => return (Spoken::Opaque(Sni::Unread), read.freeze()),
                // A beginning that may yet become a request is held to be one: who waits with the rest does not get past.
                _ => return (undecided(begun, declared), read.freeze()),
            },
        }
    }
}

/// What may be the beginning of a request: where nobody says that it is one, and nobody has to know, it is what it is.
fn undecided(begun: &[u8], declared: Protocol) -> Spoken {
    match detect(begun) {
        _ if declared.is_http() => Spoken::Http1,
        Detected::Opaque => Spoken::Text,
        _ => Spoken::Unlike,
    }
}

/// The same where nothing more will come.
fn ended(begun: &[u8], declared: Protocol) -> Spoken {
    // Of a request whose line has not ended nothing has come that could be judged.
    if declared.is_http() {
        return Spoken::Unlike;
    }
    match undecided(begun, declared) {
        Spoken::Text if resembles_http(&[begun, b"\n"].concat()) != Some(true) => Spoken::Opaque(Sni::Read(None)),
        Spoken::Text => Spoken::Unlike,
        decided => decided,
    }
}

/// What has begun so; none when more has to be read. `full`: no more is.
fn spoken(begun: &[u8], declared: Protocol, full: bool) -> Option<Spoken> {
    Some(match detect(begun) {
        Detected::Http2 => Spoken::Http2,
        Detected::Tls(name) if !declared.is_http() => Spoken::Opaque(Sni::Read(name.map(Arc::from))),
        // What is declared to be HTTP, or may be it to a lenient application, is refused as such if it is malformed.
        Detected::Http1 => Spoken::Http1,
        Detected::Tls(_) => Spoken::Unlike,
        // A preamble hides what follows, from an application that wants one.
        Detected::Opaque if declared.is_http() && is_preamble(begun) => Spoken::Unlike,
        // What an application might take for a request is one, whatever its method: who it is from is to be told as it is.
        Detected::Opaque if declared.is_http() => match resembles_http(begun) {
            Some(false) => Spoken::Unlike,
            Some(true) => Spoken::Http1,
            None if !may_begin_with_method(begun) => Spoken::Unlike,
            None if full => Spoken::Http1,
            None => return None,
        },
        // A server may make more of a client hello than is read here.
        Detected::Opaque if begun.first() == Some(&TLS_HANDSHAKE) => Spoken::Opaque(Sni::Unread),
        Detected::Opaque if declared == Protocol::Tls => Spoken::Opaque(Sni::Read(None)),
        Detected::Opaque => match resembles_http(begun) {
            Some(false) => Spoken::Opaque(Sni::Read(None)),
            Some(true) => Spoken::Unlike,
            None if full => Spoken::Unlike,
            None if !may_begin_with_method(begun) => Spoken::Text,
            None => return None,
        },
        Detected::More if full => undecided(begun, declared),
        Detected::More => return None,
    })
}

/// How long a server's first bytes may take to be told from the beginning of HTTP/2.
const GREETING: Duration = Duration::from_millis(50);

/// Completes when the application has said something that no HTTP server says first, or has closed.
pub async fn server_first(application: &TcpStream) {
    let mut first = [0; 9];
    let mut deadline = None;
    loop {
        match application.peek(&mut first).await {
            Ok(n) if n == first.len() && is_http2_server(&first) => return std::future::pending().await,
            Ok(n) if n > 0 && may_be_http2_server(&first[..n]) => {
                // More of it may come; nobody says when.
                let until = *deadline.get_or_insert_with(|| Instant::now() + GREETING);
                if Instant::now() >= until {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            _ => return,
        }
    }
}

/// Whether bytes, of which there are too few to tell, may begin a SETTINGS frame.
fn may_be_http2_server(first: &[u8]) -> bool {
    let fits = |at: usize, byte: u8| first.get(at).is_none_or(|b| *b == byte);
    first.len() < 9 && fits(0, 0) && fits(3, 4) && (4..9).all(|at| fits(at, 0))
}

/// Whether bytes that are no HTTP to the detection may be some to a lenient application: the first line says HTTP, asks for a
/// path, or is a proxy's preamble that hides what follows. `None`: the line is text so far, and not whole.
fn resembles_http(read: &[u8]) -> Option<bool> {
    if is_preamble(read) {
        return Some(true);
    }
    let end = memchr::memchr(b'\n', read);
    let line = &read[..end.unwrap_or(read.len())];
    let says_http = line.windows(5).any(|w| w.eq_ignore_ascii_case(b"HTTP/"));
    let mut words = line.split(u8::is_ascii_whitespace).filter(|w| !w.is_empty());
    let (first, second) = (words.next().unwrap_or_default(), words.next());
    let is_name = first.iter().all(u8::is_ascii_alphabetic);
    let asks = is_name && second.is_some_and(|w| w.starts_with(b"/") || memchr::memmem::find(w, b"://").is_some());
    // What GET asks for need not be a path (HTTP/0.9).
    if says_http || asks || METHODS.contains(&first) && second.is_some() {
        return Some(true);
    }
    let text = line.iter().all(|b| matches!(b, b'\t' | b'\r' | b' '..=b'~'));
    if text && end.is_none() { None } else { Some(false) }
}

fn is_preamble(read: &[u8]) -> bool {
    read.starts_with(b"PROXY ") || read.starts_with(PROXY_V2)
}

/// Whether the first word has nothing in it that no method has (RFC 9110 section 5.6.2).
fn may_begin_with_method(read: &[u8]) -> bool {
    let word = read.trim_ascii_start().split(u8::is_ascii_whitespace).next().unwrap_or_default();
    word.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

const METHODS: [&[u8]; 9] = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"];

/// What the PROXY protocol's second version begins with, after its empty lines.
const PROXY_V2: &[u8] = b"\0\r\nQUIT\n";

#[cfg(test)]
mod tests;
