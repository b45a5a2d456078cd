//! A certificate authority for a mesh: `istio.v1.auth.IstioCertificateService` as istiod serves it.
//!
//! A caller proves who it is with its service-account token. It gets certificates of its own account, or, if its account is
//! one that nodes run as, of an account that has a pod on the caller's own node; nothing else. Every refusal says why, is
//! logged and counted.

mod kubernetes;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use http::{HeaderMap, header};
use parking_lot::Mutex;
use rcgen::{CertificateSigningRequestParams, SanType};
use rustls::pki_types::PrivateKeyDer;
use serde::Deserialize;
use tokio::{net::TcpListener, time::timeout};

pub use kubernetes::Kubernetes;

use super::{
    Authority, Boxed, IssueError,
    authority::{Stamp, state},
    istio::{CertificateRequest, CertificateResponse, METHOD},
};
use crate::{
    config::Configuration,
    grpc::{self, Code, Incoming, Status},
    id::{SpiffeId, TrustDomain},
    io::room::Room,
    telemetry::chain,
    tls::{NamedServer, pem},
};

/// How long a client may take over the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections served at once; more are refused.
const CONNECTIONS: usize = 1024;
/// The same of one address: a node has one for each pod it asks for at the moment.
const CONNECTIONS_EACH: usize = 128;
/// How often it is told that one is refused.
const TOLD_ANEW: Duration = Duration::from_mins(1);
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Life of the service's own certificate; a new one is made at half of it.
const SERVER_TTL: Duration = Duration::from_hours(24);

/// Who calls, as the token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub namespace: String,
    pub account: String,
    /// The node its pod runs on, when the token is bound to a pod.
    pub node: Option<String>,
}

/// Why a token or a question about pods gets no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unknown {
    /// The token is not valid.
    Token(String),
    /// Nobody can tell at the moment.
    Unavailable(String),
}

/// Knows tokens and pods: the Kubernetes API, or files in its place.
pub trait Cluster: Send + Sync {
    /// Whose token it is.
    fn review<'a>(&'a self, token: &'a str) -> Boxed<'a, Result<Caller, Unknown>>;

    /// Whether an account has a pod on a node.
    fn runs_on<'a>(&'a self, node: &'a str, namespace: &'a str, account: &'a str) -> Boxed<'a, Result<bool, Unknown>>;
}

/// How the authority serves.
#[derive(Debug, Clone)]
pub struct ServiceSettings {
    pub dir: PathBuf,
    pub trust_domain: TrustDomain,
    /// Names in the service's own certificate.
    pub names: Vec<String>,
    /// `namespace/name` of the accounts nodes run as: they may ask for their pods.
    pub node_accounts: Vec<(String, String)>,
    /// Life of a certificate nobody said anything about, and the longest there is.
    pub default_ttl: Duration,
    pub max_ttl: Duration,
}

/// Why a request is refused; a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    NoToken,
    BadToken,
    NotANode,
    NotBound,
    NotOnNode,
    BadIdentity,
    BadRequest,
    WrongSubject,
    TooLong,
    Unavailable,
    Internal,
}

impl Refusal {
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::BadToken => "bad_token",
            Self::NotANode => "not_a_node",
            Self::NotBound => "token_not_bound",
            Self::NotOnNode => "not_on_node",
            Self::BadIdentity => "bad_identity",
            Self::BadRequest => "bad_request",
            Self::WrongSubject => "wrong_subject",
            Self::TooLong => "validity",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }

    fn code(self) -> Code {
        match self {
            Self::NoToken | Self::BadToken => Code::Unauthenticated,
            Self::NotANode | Self::NotBound | Self::NotOnNode => Code::PermissionDenied,
            Self::BadIdentity | Self::BadRequest | Self::WrongSubject | Self::TooLong => Code::InvalidArgument,
            Self::Unavailable => Code::Unavailable,
            Self::Internal => Code::Internal,
        }
    }
}

/// The authority at work.
pub struct Service {
    settings: ServiceSettings,
    cluster: Arc<dyn Cluster>,
    authority: ArcSwap<Authority>,
    issued: AtomicU64,
    refused: Mutex<BTreeMap<Refusal, u64>>,
}

type Refused = (Refusal, String);

impl Service {
    /// Opens the authority, making its root if there is nothing in its directory.
    pub fn open(settings: ServiceSettings, cluster: Arc<dyn Cluster>) -> Result<Arc<Self>, IssueError> {
        let authority = Authority::open(&settings.dir, settings.trust_domain.clone())?;
        if let Err(error) = authority.check() {
            tracing::error!(target: "ca", error = chain(&error), "the authority is of no use as it is");
        }
        let authority = ArcSwap::from_pointee(authority);
        Ok(Arc::new(Self { settings, cluster, authority, issued: AtomicU64::new(0), refused: Mutex::default() }))
    }

    /// Serves until it is dropped.
    pub async fn run(self: Arc<Self>, listener: TcpListener) -> Result<(), IssueError> {
        let server = Arc::new(ArcSwap::from_pointee(self.server()?));
        tokio::spawn(self.clone().follow(server.clone()));
        let (mut room, mut told) = (Room::new(CONNECTIONS, CONNECTIONS_EACH), None);
        loop {
            let (stream, client) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(target: "ca", %error, "accepting failed");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            let Some(place) = room.take(client.ip()) else {
                if told.is_none_or(|told: std::time::Instant| told.elapsed() >= TOLD_ANEW) {
                    tracing::warn!(target: "ca", %client, "too many connections, of all or of this address");
                    told = Some(std::time::Instant::now());
                }
                continue;
            };
            let (service, server) = (self.clone(), server.load_full());
            tokio::spawn(async move {
                let _place = place;
                match timeout(HANDSHAKE, server.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        let answer = Arc::new(move |incoming| {
                            let service = service.clone();
                            async move { service.answer(incoming).await }
                        });
                        if let Err(error) = grpc::serve(stream, answer).await {
                            tracing::debug!(target: "ca", %client, %error, "connection ended");
                        }
                    }
                    Ok(Err(error)) => tracing::info!(target: "ca", %client, %error, "the TLS handshake failed"),
                    Err(_) => tracing::info!(target: "ca", %client, "the TLS handshake took too long"),
                }
            });
        }
    }

    fn server(&self) -> Result<NamedServer, IssueError> {
        let (key, chain) = self.authority.load().issue_server(&self.settings.names, SERVER_TTL)?;
        Ok(NamedServer::new(chain, PrivateKeyDer::Pkcs8(key.serialize_der().into()))?)
    }

    /// Takes in what changes in the directory, and keeps the service's own certificate fresh.
    async fn follow(self: Arc<Self>, server: Arc<ArcSwap<NamedServer>>) {
        let mut seen = self.authority.load().stamp.clone();
        let (mut renewed, mut told) = (tokio::time::Instant::now(), None);
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            if Authority::stamp(&self.settings.dir) != seen {
                let loaded = Authority::load(&self.settings.dir, self.settings.trust_domain.clone());
                match loaded.and_then(|authority| authority.check().map(|()| authority)) {
                    Ok(authority) => {
                        tracing::info!(target: "ca", roots = authority.roots().len(), "CA state read again");
                        (seen, told) = (authority.stamp.clone(), None);
                        self.authority.store(Arc::new(authority));
                    }
                    Err(error) => {
                        let error = chain(&error);
                        if told.as_ref() != Some(&error) {
                            tracing::warn!(target: "ca", error, "CA state cannot be read again; what was read before stays in use");
                        }
                        told = Some(error);
                        continue;
                    }
                }
            } else if renewed.elapsed() < SERVER_TTL / 2 {
                continue;
            }
            match self.server() {
                Ok(fresh) => {
                    server.store(Arc::new(fresh));
                    renewed = tokio::time::Instant::now();
                }
                Err(error) => tracing::warn!(target: "ca", error = chain(&error), "no certificate for the service itself"),
            }
        }
    }

    /// Whether what it signs is believed by who trusts its roots.
    pub fn is_usable(&self) -> bool {
        self.authority.load().check().is_ok()
    }

    /// Certificates issued, and requests refused by reason.
    pub fn counts(&self) -> (u64, Vec<(Refusal, u64)>) {
        let refused = self.refused.lock();
        (self.issued.load(Ordering::Relaxed), refused.iter().map(|(r, n)| (*r, *n)).collect())
    }

    async fn answer(&self, incoming: Incoming) -> Result<Vec<u8>, Status> {
        if incoming.path != METHOD {
            return Err(Status::new(Code::Unimplemented, format!("{} is not served here", incoming.path)));
        }
        match self.create(&incoming).await {
            Ok((id, caller, response)) => {
                self.issued.fetch_add(1, Ordering::Relaxed);
                tracing::info!(target: "ca", identity = %id, caller = format!("{}/{}", caller.namespace, caller.account), node = caller.node, "certificate issued");
                Ok(grpc::frame(&response))
            }
            Err((refusal, why)) => {
                *self.refused.lock().entry(refusal).or_default() += 1;
                tracing::warn!(target: "ca", reason = refusal.reason(), why, "refused");
                Err(Status::new(refusal.code(), why))
            }
        }
    }

    async fn create(&self, incoming: &Incoming) -> Result<(SpiffeId, Caller, CertificateResponse), Refused> {
        let token = bearer(&incoming.metadata).ok_or((Refusal::NoToken, "there is no bearer token".to_owned()))?;
        let caller = self.cluster.review(token).await.map_err(|unknown| match unknown {
            Unknown::Token(why) => (Refusal::BadToken, format!("the token is not valid: {why}")),
            Unknown::Unavailable(why) => (Refusal::Unavailable, format!("the token cannot be reviewed: {why}")),
        })?;
        let request = grpc::unframe::<CertificateRequest>(&incoming.message)
            .ok_or((Refusal::BadRequest, "it is no CreateCertificate request".to_owned()))?;
        let id = self.identity(&caller, &request).await?;
        let asked = CertificateSigningRequestParams::from_pem(&request.csr)
            .map_err(|e| (Refusal::BadRequest, format!("the CSR is unusable: {e}")))?;
        subject(&asked, &id)?;
        let ttl = self.ttl(request.validity_duration)?;
        let authority = self.authority.load_full();
        let signed = authority.sign_request(&id, &asked, ttl).map_err(|e| (Refusal::Internal, chain(&e)))?;
        let mut cert_chain = signed.iter().filter(|c| !authority.roots().contains(c)).map(|der| pem(der)).collect::<Vec<_>>();
        cert_chain.push(authority.roots().iter().map(|der| pem(der)).collect());
        Ok((id, caller, CertificateResponse { cert_chain }))
    }

    /// Whom the certificate is for: the caller, or an account of a pod on the caller's node.
    async fn identity(&self, caller: &Caller, request: &CertificateRequest) -> Result<SpiffeId, Refused> {
        let own = SpiffeId::new(&self.settings.trust_domain, &caller.namespace, &caller.account)
            .map_err(|e| (Refusal::BadIdentity, e.to_string()))?;
        let impersonated = request.metadata.as_ref().and_then(|m| m.fields.get("ImpersonatedIdentity"));
        let Some(text) = impersonated.and_then(|v| v.string_value.as_deref()).filter(|t| !t.is_empty()) else { return Ok(own) };
        let id = SpiffeId::parse(text).map_err(|e| (Refusal::BadIdentity, format!("ImpersonatedIdentity: {e}")))?;
        if id == own {
            return Ok(id);
        }
        if *id.trust_domain() != self.settings.trust_domain {
            let why = format!("{id} is not of trust domain {}", self.settings.trust_domain);
            return Err((Refusal::BadIdentity, why));
        }
        let account = (caller.namespace.clone(), caller.account.clone());
        if !self.settings.node_accounts.contains(&account) {
            let why =
                format!("{}/{} is not an account nodes run as (--node-account), so it gets no certificate of {id}", account.0, account.1);
            return Err((Refusal::NotANode, why));
        }
        let Some(node) = &caller.node else {
            return Err((Refusal::NotBound, format!("the token of {}/{} is not bound to a pod of a node", account.0, account.1)));
        };
        match self.cluster.runs_on(node, id.namespace(), id.service_account()).await {
            Ok(true) => Ok(id),
            Ok(false) => {
                Err((Refusal::NotOnNode, format!("no pod of account {}/{} runs on node {node}", id.namespace(), id.service_account())))
            }
            Err(Unknown::Token(why) | Unknown::Unavailable(why)) => {
                Err((Refusal::Unavailable, format!("the pods of {node} are not known: {why}")))
            }
        }
    }

    fn ttl(&self, seconds: i64) -> Result<Duration, Refused> {
        let asked = u64::try_from(seconds).map_err(|_| (Refusal::TooLong, format!("a validity of {seconds} s is none")))?;
        match asked {
            0 => Ok(self.settings.default_ttl),
            s if s > self.settings.max_ttl.as_secs() => Err((
                Refusal::TooLong,
                format!("a validity of {s} s is more than the {} s that are allowed", self.settings.max_ttl.as_secs()),
            )),
            s => Ok(Duration::from_secs(s)),
        }
    }
}

fn bearer(metadata: &HeaderMap) -> Option<&str> {
    let value = metadata.get(header::AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ").map(str::trim).filter(|t| !t.is_empty())
}

/// A request for somebody else is a mistake somewhere, and is not covered up.
fn subject(asked: &CertificateSigningRequestParams, id: &SpiffeId) -> Result<(), Refused> {
    let names = &asked.params.subject_alt_names;
    let fits = names.iter().all(|name| matches!(name, SanType::URI(uri) if uri.as_str() == id.to_string()));
    if fits { Ok(()) } else { Err((Refusal::WrongSubject, format!("the CSR is for {names:?}, not for {id}"))) }
}

/// Tokens in a file, and pods of the configuration: in place of the Kubernetes API, for tests and meshes without one.
#[derive(Debug)]
pub struct FileCluster {
    tokens: PathBuf,
    config: Configuration,
    read: Mutex<(Stamp, Vec<Token>)>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Token {
    token: String,
    namespace: String,
    service_account: String,
    node: Option<String>,
}

impl FileCluster {
    /// `tokens`: a JSON list of objects with `token`, `namespace`, `serviceAccount` and, for nodes, `node`.
    pub fn open(tokens: PathBuf, config: Configuration) -> Result<Self, IssueError> {
        let cluster = Self { tokens, config, read: Mutex::default() };
        cluster.tokens()?;
        Ok(cluster)
    }

    fn tokens(&self) -> Result<Vec<Token>, IssueError> {
        let mut read = self.read.lock();
        let now = Stamp::of([self.tokens.clone()]);
        if read.0 != now || read.1.is_empty() {
            let text = std::fs::read_to_string(&self.tokens).map_err(state("read", &self.tokens))?;
            let tokens = serde_json::from_str(&text);
            let problem = |e: serde_json::Error| IssueError::Corrupt { path: self.tokens.display().to_string(), problem: e.to_string() };
            *read = (now, tokens.map_err(problem)?);
        }
        Ok(read.1.clone())
    }
}

impl Cluster for FileCluster {
    fn review<'a>(&'a self, token: &'a str) -> Boxed<'a, Result<Caller, Unknown>> {
        Box::pin(async move {
            let tokens = self.tokens().map_err(|e| Unknown::Unavailable(chain(&e)))?;
            let found = tokens.into_iter().find(|t| t.token == token);
            let Token { namespace, service_account, node, .. } = found.ok_or_else(|| Unknown::Token("nobody has it".to_owned()))?;
            Ok(Caller { namespace, account: service_account, node })
        })
    }

    fn runs_on<'a>(&'a self, node: &'a str, namespace: &'a str, account: &'a str) -> Boxed<'a, Result<bool, Unknown>> {
        Box::pin(async move {
            let snapshot = self.config.load();
            let is = |w: &&Arc<crate::route::Workload>| {
                &*w.node == node && w.identity.namespace() == namespace && w.identity.service_account() == account
            };
            Ok(snapshot.workloads().any(|w| is(&w)))
        })
    }
}

#[cfg(test)]
mod tests;
