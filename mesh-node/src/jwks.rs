//! Key sets of token issuers, fetched and kept.
//!
//! Keys are fetched when a policy begins to need them, again every few minutes, and early when a token names a key that is
//! not there. A set that cannot be fetched again stays as it was last seen, for as long as it takes.

use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};

use crate::{
    config::{Configuration, Snapshot},
    id::ObjectName,
    jwt::{Keys, KeysError},
    resource::request_authentication::RemoteKeys,
    telemetry::{Metrics, chain},
    tls,
};

/// How often a set is fetched again.
const REFRESH_INTERVAL: Duration = Duration::from_mins(5);
/// How soon after a failure, or for a key that was not there.
const RETRY_DELAY: Duration = Duration::from_secs(10);
/// How soon after a failure when there is no set at all and a request waits for one.
const URGENT: Duration = Duration::from_secs(1);
/// How long a set is kept that no policy of this node's own pods names and a request once asked for.
const FORGET: Duration = Duration::from_mins(15);
/// How often the age of sets is looked at.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Largest document read, bytes.
const MAX_DOCUMENT: usize = 1024 * 1024;
const MAX_REDIRECTS: usize = 3;
/// How long an address may take to be connected to, as long as there are others.
const CONNECT: Duration = Duration::from_secs(1);
/// Where clouds tell their machines secrets, beside link-local addresses: Alibaba Cloud's, Oracle's and Azure's, and over IPv6 those of AWS,
/// Google and what a NAT64 makes of the usual one.
const METADATA: [IpAddr; 6] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0xa9fe, 0xa9fe)),
];

/// Why keys cannot be had.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("it took longer than {0:?}")]
    Timeout(Duration),
    #[error("{0} cannot be resolved")]
    Resolve(String, #[source] std::io::Error),
    #[error("connecting to {0} failed")]
    Connect(String, #[source] std::io::Error),
    #[error("the exchange failed")]
    Http(#[from] hyper::Error),
    #[error("the answer was {0}")]
    Status(StatusCode),
    #[error("the answer cannot be read: {0}")]
    Body(String),
    #[error("{0} is not a URL that can be fetched")]
    Url(String),
    #[error("the answers led from one to another more than {MAX_REDIRECTS} times")]
    TooManyRedirects,
    #[error("what began with HTTPS goes on with {0}, without it")]
    Downgrade(String),
    #[error("{0} is a loopback, link-local, multicast or metadata address, which keys are not fetched from")]
    Forbidden(IpAddr),
    #[error("the answer {0}")]
    Keys(#[from] KeysError),
}

/// All sets of the node; cheap to clone.
#[derive(Clone)]
pub struct Jwks {
    config: Configuration,
    metrics: Arc<Metrics>,
    sets: Arc<Mutex<HashMap<RemoteKeys, Arc<Set>>>>,
}

struct Set {
    keys: ArcSwapOption<Keys>,
    /// When a request last asked for it.
    used: Mutex<Option<Instant>>,
    /// Held by whoever fetches; what became of the last time.
    last: Arc<tokio::sync::Mutex<Option<Last>>>,
    /// Why they could not be had the last time.
    problem: ArcSwapOption<String>,
}

impl Default for Set {
    fn default() -> Self {
        Self { keys: ArcSwapOption::empty(), used: Mutex::default(), last: Arc::default(), problem: ArcSwapOption::empty() }
    }
}

struct Last {
    at: Instant,
    good: bool,
}

impl fmt::Debug for Jwks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jwks").finish_non_exhaustive()
    }
}

impl Jwks {
    pub fn new(config: Configuration, metrics: Arc<Metrics>) -> Self {
        Self { config, metrics, sets: Arc::default() }
    }

    /// The keys of an issuer; waits for them when there are none yet. `None`: they cannot be had.
    pub async fn keys(&self, remote: &RemoteKeys) -> Option<Arc<Keys>> {
        let set = self.set(remote);
        *set.used.lock() = Some(Instant::now());
        if let Some(keys) = set.keys.load_full() {
            return Some(keys);
        }
        self.fetch(remote, &set, URGENT).await;
        set.keys.load_full()
    }

    /// The keys of an issuer, if there are any yet.
    pub fn known(&self, remote: &RemoteKeys) -> Option<Arc<Keys>> {
        let set = self.set(remote);
        *set.used.lock() = Some(Instant::now());
        set.keys.load_full()
    }

    /// What is wrong with the sets the configuration needs, in the words of a remark.
    pub fn problems(&self) -> Vec<String> {
        let wanted = &self.config.load().remote_keys;
        let all = self.sets.lock().iter().map(|(remote, set)| (remote.clone(), set.clone())).collect::<Vec<_>>();
        let told = |(remote, set): (RemoteKeys, Arc<Set>)| {
            let problem = set.problem.load_full().filter(|_| wanted.contains(&remote))?;
            let kept = if set.keys.load().is_some() { "those fetched before are used" } else { "tokens of its issuers are answered 401" };
            Some(format!("warning: keys at {} cannot be fetched ({problem}): {kept}", remote.uri))
        };
        let mut told = all.into_iter().filter_map(told).collect::<Vec<_>>();
        told.sort();
        told
    }

    /// The keys of an issuer, fetched again unless that was just done.
    pub async fn renewed(&self, remote: &RemoteKeys) -> Option<Arc<Keys>> {
        let set = self.set(remote);
        self.fetch(remote, &set, RETRY_DELAY).await;
        set.keys.load_full()
    }

    /// Keeps the sets fresh that the configuration needs or requests have asked for of late, and forgets the others.
    pub async fn run(self) {
        let mut config = self.config.clone();
        loop {
            let mut wanted = config.load().remote_keys.clone();
            {
                let mut sets = self.sets.lock();
                let recently = |set: &Set| set.used.lock().is_some_and(|u| u.elapsed() < FORGET);
                // Whoever asks for one that could not be had has it fetched.
                sets.retain(|remote, set| wanted.contains(remote) || set.keys.load().is_some() && recently(set));
                for remote in &wanted {
                    sets.entry(remote.clone()).or_default();
                }
                wanted.extend(sets.keys().cloned());
            }
            for remote in wanted {
                let (this, set) = (self.clone(), self.set(&remote));
                tokio::spawn(async move {
                    let again = if set.keys.load().is_some() { REFRESH_INTERVAL } else { RETRY_DELAY };
                    // Somebody is at it: nothing to wait for.
                    if set.last.try_lock().is_ok() {
                        this.fetch(&remote, &set, again).await;
                    }
                });
            }
            tokio::select! {
                changed = config.changed() => if !changed { return },
                () = tokio::time::sleep(SWEEP_INTERVAL) => {}
            }
        }
    }

    fn set(&self, remote: &RemoteKeys) -> Arc<Set> {
        self.sets.lock().entry(remote.clone()).or_default().clone()
    }

    /// Fetches, unless that was done so recently; one at a time for each set. What has begun goes on when nobody waits for it
    /// any more: who asks and leaves does not make the next one fetch.
    async fn fetch(&self, remote: &RemoteKeys, set: &Arc<Set>, pause: Duration) {
        let mut last = set.last.clone().lock_owned().await;
        let pause = if last.as_ref().is_some_and(|l| !l.good) { pause.min(RETRY_DELAY) } else { pause };
        if last.as_ref().is_some_and(|l| l.at.elapsed() < pause) {
            return;
        }
        let (this, remote, set) = (self.clone(), remote.clone(), set.clone());
        let fetching = tokio::spawn(async move {
            let good = this.fetch_once(&remote, &set).await;
            *last = Some(Last { at: Instant::now(), good });
        });
        if let Err(error) = fetching.await {
            tracing::error!(target: "jwks", %error, "a fetch ended before its time");
        }
    }

    /// Whether keys were had.
    async fn fetch_once(&self, remote: &RemoteKeys, set: &Set) -> bool {
        let fetched = timeout(remote.timeout, fetch(&self.config, remote)).await;
        match fetched.unwrap_or(Err(FetchError::Timeout(remote.timeout))) {
            Ok(keys) => {
                self.metrics.jwks_fetch("ok");
                set.keys.store(Some(Arc::new(keys)));
                set.problem.store(None);
                true
            }
            Err(error) => {
                self.metrics.jwks_fetch("failed");
                let (kept, error) = (set.keys.load().is_some(), chain(&error));
                if set.problem.load().as_deref() == Some(&error) {
                    tracing::debug!(target: "jwks", uri = &*remote.uri, error, kept, "keys still cannot be fetched");
                } else {
                    tracing::warn!(target: "jwks", uri = &*remote.uri, error, kept, "keys cannot be fetched");
                }
                set.problem.store(Some(Arc::new(error)));
                false
            }
        }
    }
}

async fn fetch(config: &Configuration, remote: &RemoteKeys) -> Result<Keys, FetchError> {
    #[derive(serde::Deserialize)]
    struct Provider {
        jwks_uri: String,
    }
    let mut document = get(config, &remote.uri).await?;
    if remote.discovery {
        let provider: Provider = serde_json::from_str(&document).map_err(|e| FetchError::Body(e.to_string()))?;
        refuse_downgrade(&remote.uri, &provider.jwks_uri)?;
        document = get(config, &provider.jwks_uri).await?;
    }
    Ok(Keys::parse(&document)?)
}

/// A document, redirects followed.
async fn get(config: &Configuration, url: &str) -> Result<String, FetchError> {
    let mut url = url.to_owned();
    for _ in 0..=MAX_REDIRECTS {
        let uri: Uri = url.parse().map_err(|_| FetchError::Url(url.clone()))?;
        let response = request(config, &uri).await?;
        if response.status().is_redirection() {
            let location = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok());
            let location = location.ok_or(FetchError::Status(response.status()))?;
            let next = resolved(&uri, location);
            refuse_downgrade(&url, &next)?;
            url = next;
            continue;
        }
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_DOCUMENT).collect().await.map_err(|e| FetchError::Body(e.to_string()))?;
        return String::from_utf8(body.to_bytes().to_vec()).map_err(|e| FetchError::Body(e.to_string()));
    }
    Err(FetchError::TooManyRedirects)
}

/// What began protected does not go on unprotected.
fn refuse_downgrade(from: &str, to: &str) -> Result<(), FetchError> {
    let is_secure = |url: &str| url.parse::<Uri>().is_ok_and(|u| u.scheme_str() == Some("https"));
    if is_secure(from) && !is_secure(to) { Err(FetchError::Downgrade(to.to_owned())) } else { Ok(()) }
}

/// Whether an address is the node's own, or one that means something to the machine it is on: policies are written by tenants,
/// and must not make the node ask itself or the cloud's metadata service.
fn is_forbidden(ip: IpAddr) -> bool {
    if METADATA.contains(&ip.to_canonical()) {
        return true;
    }
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast(),
    }
}

async fn request(config: &Configuration, uri: &Uri) -> Result<http::Response<hyper::body::Incoming>, FetchError> {
    let bad = || FetchError::Url(uri.to_string());
    let host = uri.host().ok_or_else(bad)?.trim_matches(['[', ']']);
    let secure = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(bad()),
    };
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let stream = connect(config, host, port).await?;
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let authority = uri.authority().map_or(host, |a| a.as_str().rsplit_once('@').map_or(a.as_str(), |(_, host)| host));
    let request = Request::get(path).header(header::HOST, authority).header(header::ACCEPT, "application/json");
    let request = request.body(Empty::<Bytes>::new()).map_err(|_| bad())?;
    if secure {
        let stream = tls::connect_public(host, stream).await.map_err(|e| FetchError::Connect(host.to_owned(), e))?;
        send(TokioIo::new(stream), request).await
    } else {
        send(TokioIo::new(stream), request).await
    }
}

async fn send<T>(io: T, request: Request<Empty<Bytes>>) -> Result<http::Response<hyper::body::Incoming>, FetchError>
where
    T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    // Ends with the response.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender.send_request(request).await?)
}

/// A service of the mesh is reached at an endpoint of its own; other names are the system's to resolve.
async fn connect(config: &Configuration, host: &str, port: u16) -> Result<TcpStream, FetchError> {
    let mut addresses = endpoints(&config.load(), host, port);
    if addresses.is_empty() {
        addresses = tokio::net::lookup_host((host, port)).await.map_err(|e| FetchError::Resolve(host.to_owned(), e))?.collect();
    } else {
        // One that hangs is not always the first.
        let first = fastrand::usize(..addresses.len());
        addresses.rotate_left(first);
    }
    let addresses = addresses.iter().map(|a| if is_forbidden(a.ip()) { Err(FetchError::Forbidden(a.ip())) } else { Ok(*a) });
    let addresses = addresses.collect::<Result<Vec<_>, _>>()?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for (i, address) in addresses.iter().enumerate() {
        // The last has what is left of the time for all.
        let patience = if i + 1 < addresses.len() { CONNECT } else { Duration::MAX };
        match timeout(patience, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(FetchError::Connect(host.to_owned(), last))
}

/// Those that are ready of a service of the mesh.
fn endpoints(snapshot: &Snapshot, host: &str, port: u16) -> Vec<SocketAddr> {
    let service = ObjectName::from_fqdn(&host.to_ascii_lowercase()).and_then(|name| snapshot.service(&name));
    let all = service.and_then(|service| service.port(port)).into_iter().flat_map(|port| port.cluster.endpoints.iter());
    all.filter(|endpoint| endpoint.ready).map(|endpoint| endpoint.address).collect()
}

/// What a `location` means where it was said (RFC 3986, section 5.2; what is left of dots in it is the server's to see).
fn resolved(base: &Uri, location: &str) -> String {
    let (scheme, authority) = (base.scheme_str().unwrap_or("http"), base.authority().map_or("", |a| a.as_str()));
    if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.parse::<Uri>().is_ok_and(|uri| uri.scheme().is_some()) {
        location.to_owned()
    } else {
        let directory = base.path().rsplit_once('/').map_or("", |(directory, _)| directory);
        format!("{scheme}://{authority}{directory}/{location}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_redirect_leads_is_seen_from_where_it_was_said() {
        let base = "https://issuer:8443/a/.well-known/openid?x=1".parse().expect("a URL");
        for (location, expected) in [
            ("https://other/keys", "https://other/keys"),
            ("//other/keys", "https://other/keys"),
            ("/keys?y=2", "https://issuer:8443/keys?y=2"),
            ("keys.json", "https://issuer:8443/a/.well-known/keys.json"),
        ] {
            assert_eq!(resolved(&base, location), expected);
        }
        assert_eq!(resolved(&"http://issuer".parse().expect("a URL"), "keys"), "http://issuer/keys");
    }
}
