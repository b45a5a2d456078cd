//! `meshctl`: a look inside one node, through its admin endpoint.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::{Args, Parser, Subcommand};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Look inside one mesh-node.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, about)]
pub struct Meshctl {
    /// Admin address of the node.
    #[arg(long, global = true, env = "MESH_ADMIN", value_name = "ADDRESS", default_value = "127.0.0.1:15000")]
    admin: SocketAddr,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Node, fail mode, configuration generation, and every object or field that is not in force with the reason.
    Status,
    /// The node's pods: enrolled, captured, and why not.
    Pods,
    /// Every workload of the mesh with its identity and the policies that govern it.
    Workloads,
    /// Services and their endpoints.
    Services,
    /// Certificates of the node's identities; times in seconds since 1970.
    Certificates,
    /// Pooled HBONE connections to other nodes.
    Pool,
    /// What each pod has under way to other services: connections, requests, retries, ejected endpoints.
    Clusters,
    /// Connections between the proxy and applications, or past it: accelerated, or why not.
    Acceleration,
    /// Connections between pods of the node that go past the proxy, and how many destinations may be reached so.
    Direct,
    /// All metrics, in `OpenMetrics` text.
    Metrics,
    /// Which policy would allow or deny a request, or without -X, --path, --host, -H and --claims a connection that carries
    /// none; dry-run, AUDIT and external authorizers included. On a port declared to carry no HTTP policies see the connection,
    /// whatever is asked. Nothing is sent.
    Authorize(Authorize),
}

#[derive(Debug, Args)]
struct Authorize {
    /// Who asks: namespace/name of a workload, or any address.
    #[arg(long, value_name = "WORKLOAD|ADDRESS")]
    from: String,
    /// Whom: namespace/name of a workload, or its address.
    #[arg(long, value_name = "WORKLOAD|ADDRESS")]
    to: String,
    /// The port the application listens on.
    #[arg(long)]
    port: u16,
    /// Outside a tunnel: the destination does not know the client's identity.
    #[arg(long)]
    plaintext: bool,
    /// The request's method [default: GET].
    #[arg(short = 'X', long, value_name = "METHOD")]
    method: Option<String>,
    /// The request's path, with its query [default: /].
    #[arg(long)]
    path: Option<String>,
    /// The request's host [default: the address].
    #[arg(long)]
    host: Option<String>,
    /// A header of the request; may be given several times.
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The server name a TLS client asks for.
    #[arg(long, value_name = "NAME")]
    sni: Option<String>,
    /// Claims of the token it is taken to have, as JSON with the issuer in `iss`.
    #[arg(long, value_name = "JSON")]
    claims: Option<String>,
}

impl Authorize {
    fn path(&self) -> String {
        let Self { from, to, port, plaintext, method, path, host, headers, claims, sni } = self;
        let port = port.to_string();
        let mut all = vec![("from", from), ("to", to), ("port", &port)];
        let told = [("method", method), ("path", path), ("host", host), ("claims", claims), ("sni", sni)];
        all.extend(told.iter().filter_map(|(name, value)| Some((*name, value.as_ref()?))));
        all.extend(headers.iter().map(|header| ("header", header)));
        let pairs = all.into_iter().map(|(name, value)| format!("{name}={}", encoded(value)));
        let pairs = pairs.chain(plaintext.then(|| "plaintext".to_owned()));
        format!("/authorization?{}", pairs.collect::<Vec<_>>().join("&"))
    }
}

/// Percent-encoded for a query.
fn encoded(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/:".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect::<Vec<_>>().concat()
}

impl Meshctl {
    /// Fetches and prints.
    pub fn run(self) -> anyhow::Result<()> {
        let path = match &self.what {
            What::Authorize(question) => &question.path(),
            What::Status => "/status",
            What::Pods => "/pods",
            What::Workloads => "/workloads",
            What::Services => "/services",
            What::Certificates => "/certificates",
            What::Pool => "/pool",
            What::Clusters => "/clusters",
            What::Acceleration => "/acceleration",
            What::Direct => "/direct",
            What::Metrics => "/metrics",
        };
        let body = get(self.admin, path).with_context(|| format!("mesh-node at {}", self.admin))?;
        std::io::stdout().write_all(body.as_bytes())?;
        Ok(())
    }
}

/// One HTTP/1.0 request: the answer ends with the connection.
fn get(admin: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, TIMEOUT).context("cannot connect; is it running, and is --admin its address?")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {admin}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("no complete answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    ensure!(status == "200", "it answered {status}: {}", body.trim());
    Ok(body.to_owned())
}
