//! `meshctl`: a look inside one node, through its admin endpoint.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Look inside one mesh-node.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, about)]
pub struct Meshctl {
    /// Admin address of the node.
    #[arg(long, env = "MESH_ADMIN", value_name = "ADDRESS", default_value = "127.0.0.1:15000")]
    admin: SocketAddr,
    /// What to show.
    #[arg(value_enum)]
    what: What,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// Node, fail mode, configuration generation, and every object that is not in force with the reason.
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
    /// All metrics, in `OpenMetrics` text.
    Metrics,
}

impl Meshctl {
    /// Fetches and prints.
    pub fn run(self) -> anyhow::Result<()> {
        let path = match self.what {
            What::Status => "/status",
            What::Pods => "/pods",
            What::Workloads => "/workloads",
            What::Services => "/services",
            What::Certificates => "/certificates",
            What::Pool => "/pool",
            What::Clusters => "/clusters",
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
