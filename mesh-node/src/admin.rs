//! The admin endpoint: readiness, metrics and a look inside, over plain HTTP on an address of the node's choice
//! (loopback by default: it shows names and addresses of every pod).

mod authorization;
mod config_dump;
mod explain;
pub mod names;
mod pages;
mod query;
mod routes;

use std::{
    convert::Infallible,
    fs::Permissions,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, Method, Request, Response, StatusCode, Uri,
    header::{CONTENT_TYPE, ORIGIN},
};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::{
    app::Node,
    io::room::{Place, Room},
    spawn,
    telemetry::{self, Exposition},
};

/// Connections served at once; more are turned away.
const MAX_CONNECTIONS: usize = 32;
/// The same of those from the node itself: whoever else comes, the kubelet gets its answer.
const MAX_OWN_CONNECTIONS: usize = 32;
/// The same of one address elsewhere.
const MAX_CONNECTIONS_EACH: usize = 8;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one may last; scrapers connect again.
const CONNECTION_TIMEOUT: Duration = Duration::from_mins(2);

/// What would become of a request, by a configuration; see `meshctl explain`.
pub fn explain(snapshot: &crate::config::Snapshot, query: &str) -> Result<Value, NoAnswer> {
    // Nobody has asked them yet.
    explain::answer(snapshot, query, &|_, _, _| false)
}

pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Which pages are served where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// All of them.
    All,
    /// Metrics alone: for whoever may scrape.
    Metrics,
    /// Readiness alone: for the kubelet.
    Readiness,
}

/// Where pages are served.
pub enum Listener {
    Tcp(TcpListener),
    /// To processes of the node that may open a socket in its file system.
    Unix(UnixListener),
}

trait Connected: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Connected for S {}

impl Listener {
    /// Also where it comes from, if that is not the node itself.
    async fn accept(&self) -> io::Result<(Box<dyn Connected>, Option<IpAddr>)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, client) = listener.accept().await?;
                let own = client.ip().to_canonical().is_loopback() || stream.local_addr().is_ok_and(|local| local.ip() == client.ip());
                (Box::new(stream), (!own).then(|| client.ip()))
            }
            Self::Unix(listener) => (Box::new(listener.accept().await?.0), None),
        })
    }
}

/// Serves a node's pages until the process ends.
pub async fn serve_node(listener: Listener, node: Arc<Node>, pages: Pages) {
    let metrics = node.proxy.metrics.clone();
    let answer = move |method: &Method, uri: &Uri, headers: &HeaderMap| answer(&node, pages, method, uri, headers);
    serve(listener, Arc::new(answer), move || {
        metrics.pages_refused.inc();
    })
    .await;
}

/// Listens on a socket in the file system, in place of one that an earlier process left.
pub fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    if path.metadata().is_ok_and(|m| m.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Listens on an address; on a node without IPv6, `[::]` means all of IPv4.
pub async fn bind_any(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port())).await
        }
        bound => bound,
    }
}

/// A place for a connection, until it is dropped.
enum Taken {
    Own(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit),
    Others(#[expect(dead_code, reason = "held")] Place),
}

/// Serves pages until the process ends; `refused`: called for each connection that is turned away.
pub async fn serve<A>(listener: Listener, answer: Arc<A>, refused: impl Fn())
where
    A: Fn(&Method, &Uri, &HeaderMap) -> Response<Full<Bytes>> + Send + Sync + 'static,
{
    // Who comes from elsewhere, however many they are, leaves room for the node's own.
    let own = Arc::new(Semaphore::new(MAX_OWN_CONNECTIONS));
    let mut others = Room::new(MAX_CONNECTIONS, MAX_CONNECTIONS_EACH);
    let mut take = |client: Option<IpAddr>| match client {
        None => own.clone().try_acquire_owned().ok().map(Taken::Own),
        Some(client) => others.take(client).map(Taken::Others),
    };
    loop {
        match listener.accept().await {
            Ok((stream, client)) => match take(client) {
                Some(place) => drop(tokio::spawn(connection(stream, answer.clone(), place))),
                None => refused(),
            },
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn connection<A>(stream: Box<dyn Connected>, answer: Arc<A>, place: Taken)
where
    A: Fn(&Method, &Uri, &HeaderMap) -> Response<Full<Bytes>>,
{
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        // Pages of a big mesh take their time.
        let answer = spawn::aside(|| answer(request.method(), request.uri(), request.headers()));
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    // Who does not read holds a place no longer than this.
    let served = tokio::time::timeout(CONNECTION_TIMEOUT, http.serve_connection(TokioIo::new(stream), service)).await;
    if let Ok(Err(error)) = served {
        tracing::debug!(target: "admin", %error, "connection ended");
    }
    drop(place);
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// What is asked about is not there.
    #[error("{0}")]
    Missing(String),
    /// It is not asked as it has to be.
    #[error("{0}")]
    Misasked(String),
}

impl From<String> for NoAnswer {
    fn from(problem: String) -> Self {
        Self::Misasked(problem)
    }
}

impl From<&str> for NoAnswer {
    fn from(problem: &str) -> Self {
        Self::Misasked(problem.to_owned())
    }
}

const INDEX: &str = "/healthz/ready /metrics /status /pods /workloads /services /routes?service= /certificates /pool /clusters /connections \
    /acceleration /direct /authorization? /explain? /trace?workload= /config_dump /logging?level= /quitquitquit";

fn answer(node: &Node, pages: Pages, method: &Method, uri: &Uri, headers: &HeaderMap) -> Response<Full<Bytes>> {
    let query = uri.query().unwrap_or_default();
    match (pages, method, uri.path()) {
        // Whoever a browser asks for.
        (_, method, _) if method != Method::GET && method != Method::HEAD && headers.contains_key(ORIGIN) => {
            text(StatusCode::FORBIDDEN, "nothing is changed for web pages\n")
        }
        (Pages::All, &Method::POST | &Method::PUT, "/logging") => set_logging(query),
        (Pages::All, &Method::POST, "/quitquitquit") => {
            tracing::info!(target: "admin", "asked to stop");
            node.stop.notify_one();
            text(StatusCode::OK, "stopping\n")
        }
        (Pages::All, _, "/quitquitquit") => not_allowed("POST", "POST stops the process\n"),
        (_, method, _) if method != Method::GET && method != Method::HEAD => {
            let besides = if pages == Pages::All { ", and POST of /logging and /quitquitquit" } else { "" };
            not_allowed("GET, HEAD", format!("only GET is served here{besides}\n"))
        }
        (Pages::All, _, "/logging")
            if query::pairs(query).is_ok_and(|all| all.iter().any(|(name, _)| ["level", "reset"].contains(name))) =>
        {
            not_allowed("POST, PUT", "POST changes what is logged; GET says what is, of no parameters\n")
        }
        (Pages::All | Pages::Readiness, _, "/healthz/ready") if node.is_ready() => text(StatusCode::OK, "ready\n".to_owned()),
        (Pages::All | Pages::Readiness, _, "/healthz/ready") => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n".to_owned()),
        (Pages::All | Pages::Metrics, _, "/metrics" | "/stats/prometheus") => metrics(node, headers),
        (Pages::All, _, path) => page(node, path, query),
        (Pages::Metrics, ..) => text(StatusCode::NOT_FOUND, "/metrics and /stats/prometheus are served here\n".to_owned()),
        (Pages::Readiness, ..) => text(StatusCode::NOT_FOUND, "/healthz/ready is served here\n".to_owned()),
    }
}

fn page(node: &Node, path: &str, query: &str) -> Response<Full<Bytes>> {
    let asked = |answer: Result<Value, NoAnswer>| match answer {
        Ok(found) => document(&found),
        Err(NoAnswer::Missing(what)) => text(StatusCode::NOT_FOUND, what + "\n"),
        Err(NoAnswer::Misasked(how)) => text(StatusCode::BAD_REQUEST, how + "\n"),
    };
    match path {
        "/status" => document(&pages::status(node)),
        "/pods" => document(&json!(node.pods())),
        "/workloads" => document(&pages::workloads(node)),
        "/services" => document(&pages::services(node)),
        "/routes" => asked(routes::routes(node, query)),
        "/certificates" => document(&pages::certificates(node)),
        "/pool" => document(&pages::pool(node)),
        "/clusters" => document(&pages::clusters(node)),
        "/connections" => document(&pages::connections(node)),
        "/acceleration" => document(&pages::acceleration(node)),
        "/direct" => document(&pages::direct(node)),
        "/authorization" => asked(authorization::answer(&node.proxy.config.load(), query)),
        "/trace" => asked(pages::trace(node, query)),
        "/explain" => asked(explain::answer(&node.proxy.config.load(), query, &|source, cluster, endpoint| {
            node.proxy.pods.by_uid(&source.uid).is_some_and(|pod| pod.clusters.has_ejected(cluster, endpoint))
        })),
        "/config_dump" => document(&config_dump::dump(node)),
        "/logging" => logging(),
        "/" => text(StatusCode::OK, format!("{INDEX}\n")),
        path => text(StatusCode::NOT_FOUND, format!("{path} is not served; GET / lists what is\n")),
    }
}

fn not_allowed(methods: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, body);
    response.headers_mut().insert(http::header::ALLOW, http::HeaderValue::from_static(methods));
    response
}

fn logging() -> Response<Full<Bytes>> {
    match telemetry::log::filter() {
        Some(filter) => text(StatusCode::OK, format!("current log level is {filter}\n")),
        None => text(StatusCode::SERVICE_UNAVAILABLE, "the process does not log\n".to_owned()),
    }
}

/// `level=` takes what `--log` does, or `target:level` as istioctl says it; `reset`, or `level=reset`, begins with what the process
/// was started with. Asked for neither, it says what is logged, as ztunnel does.
fn set_logging(query: &str) -> Response<Full<Bytes>> {
    let pairs = match query::pairs(query) {
        Ok(pairs) => pairs,
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    let level = pairs.iter().find(|(name, _)| *name == "level").map_or("", |(_, level)| &**level);
    let reset = level == "reset" || pairs.iter().any(|(name, _)| *name == "reset");
    if level.is_empty() && !reset {
        return logging();
    }
    match telemetry::log::set_filter(reset, if level == "reset" { "" } else { level }) {
        Ok(filter) => {
            tracing::info!(target: "admin", %filter, "the log level was changed");
            text(StatusCode::OK, format!("current log level is {filter}\n"))
        }
        Err(error) => text(StatusCode::BAD_REQUEST, format!("level: {error}\n")),
    }
}

pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn document(value: &Value) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::OK, format!("{value:#}\n"));
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

/// The text of the metrics as last made, for as long as was worked on it, and more.
#[derive(Debug, Default)]
pub struct Scrapes {
    making: Mutex<()>,
    /// Locked for a moment only.
    made: Arc<Mutex<Texts>>,
}

/// By their exposition.
type Texts = [Option<Bytes>; 2];

/// Who may scrape may ask as often as they like: of each format, no more than a fifth of one core goes into it.
const PAUSE: u32 = 4;
/// What takes no longer is made each time.
const CHEAP: Duration = Duration::from_millis(20);

impl Scrapes {
    /// One at a time, and anew when a while has passed that is in proportion to the work.
    fn get(&self, exposition: Exposition, make: impl FnOnce() -> Result<String, std::fmt::Error>) -> Result<Bytes, std::fmt::Error> {
        let which = exposition as usize;
        let _one_at_a_time = self.making.lock();
        let last = self.made.lock()[which].clone();
        if let Some(text) = last {
            return Ok(text);
        }
        let began = worked();
        let text = Bytes::from(make()?);
        let took = worked().saturating_sub(began);
        if took > CHEAP {
            self.made.lock()[which] = Some(text.clone());
            let all = self.made.clone();
            tokio::spawn(async move {
                tokio::time::sleep(took * PAUSE).await;
                // It is that text still: there is no other as long as there is one.
                all.lock()[which] = None;
            });
        }
        Ok(text)
    }
}

/// What the calling thread has worked, not what it has waited: on a busy machine that says nothing about the work.
fn worked() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

fn metrics(node: &Node, headers: &HeaderMap) -> Response<Full<Bytes>> {
    let exposition = Exposition::accepted(headers);
    exposed(
        exposition,
        node.scrapes.get(exposition, || {
            node.refresh_metrics();
            node.proxy.metrics.render(exposition)
        }),
    )
}

/// A page of metrics, or why there is none.
pub fn exposed(exposition: Exposition, rendered: Result<impl Into<Bytes>, std::fmt::Error>) -> Response<Full<Bytes>> {
    match rendered {
        Ok(body) => {
            let mut response = text(StatusCode::OK, body);
            response.headers_mut().insert(CONTENT_TYPE, exposition.content_type());
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_takes_long_is_made_seldom_and_what_does_not_each_time() {
        let (scrapes, made) = (Scrapes::default(), std::cell::Cell::new(0));
        let (text, open) = (Exposition::Text, Exposition::OpenMetrics);
        let ask = |exposition, slow: bool| {
            let text = scrapes.get(exposition, || {
                made.set(made.get() + 1);
                if slow {
                    let began = worked();
                    while worked() < began + CHEAP * 2 {}
                } else {
                    std::thread::sleep(CHEAP * 2);
                }
                Ok(made.get().to_string())
            });
            String::from_utf8(text.expect("made").to_vec()).expect("UTF-8")
        };
        assert_eq!([ask(text, false), ask(text, false)], ["1", "2"], "cheap");
        assert_eq!([ask(text, true), ask(text, true), ask(open, true)], ["3", "3", "4"], "by format");
        tokio::time::sleep(CHEAP * 200).await;
        assert_eq!([ask(text, false), ask(open, false)], ["5", "6"], "forgotten");
        let failed = scrapes.get(text, || Err(std::fmt::Error));
        assert!(failed.is_err() && ask(text, false) == "7");
    }
}
