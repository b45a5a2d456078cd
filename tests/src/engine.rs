//! The data path in this process, without capture: connections are handed over as if a pod had made them, to services whose
//! endpoints are on loopback. What is logged of requests is collected.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use mesh_node::{
    config::{Batch, Change, Configuration, MeshSettings, Origin, Publisher, store::Content},
    id::{TrustDomain, WorkloadUid},
    identity::{EmbeddedCa, Manager},
    io::netns::Netns,
    policy::TrustDomains,
    proxy::{Limits, Proxy, ServedPod, inbound, outbound, pods::Stage},
    resource::{self, Parsed},
    telemetry::Metrics,
    tls::{KeyExchange, Trust},
};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tracing::field::{Field, Visit};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt as _};

/// Fields of one line of the access log.
pub type Line = HashMap<String, String>;

/// A running data path with one client pod.
pub struct Engine {
    pub proxy: Arc<Proxy>,
    pub pod: Arc<ServedPod>,
    /// A pod with the address [`SERVER`], whose application may be on any port.
    pub server: Arc<ServedPod>,
    client: IpAddr,
    pub config: Configuration,
    changes: mpsc::Sender<Batch>,
    log: Arc<Mutex<Vec<Line>>>,
    _directory: tempfile::TempDir,
}

/// The address of the client pod.
pub const CLIENT: &str = "10.77.0.2";
/// The address of a client pod that can be seen by an application on loopback.
pub const NEAR_CLIENT: &str = "127.0.0.9";
/// The address of the server pod.
pub const SERVER: &str = "127.0.0.1";

impl Engine {
    /// Starts with these documents besides the client pod's own. Only one may log at a time in a process.
    pub async fn start(documents: &[Value]) -> Result<Self> {
        Self::start_as(CLIENT, documents).await
    }

    /// The same, with a client pod of this address.
    pub async fn start_as(client: &str, documents: &[Value]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let log = collected();
        let (sender, receiver) = mpsc::channel(4);
        let domain = TrustDomain::parse("cluster.local").context("a trust domain")?;
        let (publisher, mut config) = Publisher::new(Arc::new(MeshSettings::new("n1", domain.clone())), receiver);
        tokio::spawn(publisher.run());
        Netns::host()?;
        let trust = Trust::new(TrustDomains { local: domain.clone(), aliases: Vec::new() }, KeyExchange::default());
        let ca = EmbeddedCa::open(Path::new(directory.path()), domain, trust, Duration::from_secs(3600))?;
        let limits = Limits::new(100_000, 16_384);
        let proxy = Proxy::new(config.clone(), Manager::new(Arc::new(ca)), Arc::new(Metrics::default()), limits);
        let netns = Arc::new(Netns::open(Path::new("/proc/self/ns/net"))?);
        let pod = ServedPod::new(WorkloadUid("uid-client".into()), netns.clone(), vec![client.parse()?]);
        let server = ServedPod::new(WorkloadUid("uid-server".into()), netns, vec![SERVER.parse()?]);
        [&pod, &server].into_iter().for_each(|pod| proxy.pods.insert(pod.clone()));
        tokio::spawn(proxy.clone().recheck_policies());
        tokio::spawn(proxy.clone().tidy_pool());
        let client = client.parse()?;
        let engine = Self { proxy, pod, server, client, config: config.clone(), changes: sender, log, _directory: directory };
        engine.apply(documents).await?;
        config.ready().await;
        Ok(engine)
    }

    /// Replaces all documents; completes when they are in force.
    pub async fn apply(&self, documents: &[Value]) -> Result<()> {
        let mut config = self.config.clone();
        let before = config.load().generation;
        let client = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "client", "uid": "uid-client", "labels": {"app": "client"}},
            "spec": {"nodeName": "n1", "serviceAccountName": "client"}, "status": {"phase": "Running", "podIP": self.client}});
        let mut objects = Vec::new();
        for document in documents.iter().chain([&client]) {
            match resource::parse(document, "default") {
                Ok(Parsed::Object(named)) => objects.push(*named),
                Ok(Parsed::Ignored(what)) => anyhow::bail!("{what} is ignored"),
                Err(rejection) => anyhow::bail!("{rejection}: {document}"),
            }
        }
        let content = Content::Read { objects, rejections: Vec::new(), unread: Vec::new() };
        self.changes.send(Batch::now(vec![Change { origin: Origin(Arc::new("test".into())), content }])).await?;
        while config.load().generation == before {
            config.changed().await;
        }
        Ok(())
    }

    /// A connection of the client pod to an address.
    pub async fn connect(&self, original: SocketAddr) -> Result<TcpStream> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr()?), listener.accept());
        let from = SocketAddr::new(self.client, 40000);
        tokio::spawn(outbound::serve(self.proxy.clone(), self.pod.clone(), accepted?.0, from, original, Stage::Serving));
        Ok(client?)
    }

    /// A plaintext connection from outside the mesh to the server pod.
    pub async fn connect_inbound(&self, port: u16) -> Result<TcpStream> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr()?), listener.accept());
        let (stream, from) = accepted?;
        let to = SocketAddr::new(SERVER.parse()?, port);
        tokio::spawn(inbound::serve_steered(self.proxy.clone(), self.server.clone(), stream, from, to, Stage::Serving));
        Ok(client?)
    }

    /// What was logged of requests to an address, once there are so many lines.
    pub async fn logged(&self, original: SocketAddr, lines: usize) -> Vec<Line> {
        let mut found = Vec::new();
        for _ in 0..500 {
            let of = |l: &&Line| l.get("downstream_local_address").is_some_and(|a| *a == original.to_string());
            found = self.log.lock().expect("lock").iter().filter(of).cloned().collect();
            if found.len() >= lines {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        found
    }
}

impl Engine {
    /// What was logged of a request, told by its `x-request-id`, once there are so many lines.
    pub async fn logged_for(&self, id: &str, lines: usize) -> Vec<Line> {
        let mut found = Vec::new();
        for _ in 0..200 {
            found = self.log.lock().expect("lock").iter().filter(|l| l.get("request_id").is_some_and(|i| i == id)).cloned().collect();
            if found.len() >= lines {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        found
    }
}

/// Waits until something is so; panics with what is waited for if it does not come to be.
pub async fn wait_until(what: &str, at_most: Duration, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + at_most;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited {at_most:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Engine {
    /// Waits until no request is under way.
    pub async fn until_idle(&self) {
        wait_until("no request is under way", Duration::from_secs(3), || self.proxy.metrics.http_active.get() == 0).await;
    }
}

/// A service `name` at an address, with endpoints.
pub fn service(name: &str, vip: &str, port_name: &str, endpoints: &[SocketAddr]) -> Vec<Value> {
    let mut documents = vec![json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": vip, "ports": [{"name": port_name, "port": 80}]}})];
    for (i, endpoint) in endpoints.iter().enumerate() {
        documents.push(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-{i}"), "labels": {"kubernetes.io/service-name": name}},
            "endpoints": [{"addresses": [endpoint.ip()]}], "ports": [{"name": port_name, "port": endpoint.port()}]}));
    }
    documents
}

/// The server pod, in the mesh.
pub fn server_pod() -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "server", "uid": "uid-server",
            "labels": {"app": "server", "istio.io/dataplane-mode": "ambient"}},
        "spec": {"nodeName": "n1", "serviceAccountName": "server"}, "status": {"phase": "Running", "podIP": SERVER}})
}

/// A policy of the group `security.istio.io`.
pub fn security(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// A `VirtualService` for a service.
pub fn virtual_service(host: &str, http: &Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": host}, "spec": {"hosts": [host], "http": http}})
}

/// A `DestinationRule` for a service.
pub fn destination_rule(host: &str, policy: &Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": host}, "spec": {"host": host, "trafficPolicy": policy}})
}

/// The log of this process; set up once.
fn collected() -> Arc<Mutex<Vec<Line>>> {
    static LOG: std::sync::OnceLock<Arc<Mutex<Vec<Line>>>> = std::sync::OnceLock::new();
    LOG.get_or_init(|| {
        let log: Arc<Mutex<Vec<Line>>> = Arc::default();
        let subscriber = tracing_subscriber::registry().with(Collector(log.clone()));
        tracing::subscriber::set_global_default(subscriber).expect("one log in a process");
        log
    })
    .clone()
}

struct Collector(Arc<Mutex<Vec<Line>>>);

struct Fields(Line);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

impl<S: tracing::Subscriber> Layer<S> for Collector {
    fn on_event(&self, event: &tracing::Event<'_>, _context: Context<'_, S>) {
        if event.metadata().target() == "access" {
            let mut fields = Fields(Line::new());
            event.record(&mut fields);
            self.0.lock().expect("lock").push(fields.0);
        }
    }
}

/// Has all that is told written to a file, each line an object of these operators.
pub fn logging(path: &Path, format: &Value) -> Vec<Value> {
    let provider = json!({"extensionProviders": [{"name": "file", "envoyFileAccessLog": {"path": path, "logFormat": {"labels": format}}}]});
    vec![
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": provider}}),
        json!({"apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": {"name": "all", "namespace": "istio-system"},
            "spec": {"accessLogging": [{"providers": [{"name": "file"}]}]}}),
    ]
}
