//! `meshctl`: a look inside one node, through its admin endpoint.

mod analyze;
mod client;
mod follow;
mod names;
mod questions;
mod samples;
mod table;
mod top;
mod views;

use std::{
    io::Write,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

use self::{
    client::{Admin, query},
    names::{find, named},
    questions::{Authorize, Explain, Offline},
};

/// Look inside one mesh-node.
///
/// Exit status: 0 done, 1 failed or, with --check, denied; 2 wrong usage; 3 no mesh-node answers; 4 what was asked about does not exist.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, about)]
pub struct Meshctl {
    /// Admin address of the node, or the path of its admin socket.
    #[arg(long, global = true, env = "MESH_ADMIN", value_name = "ADDRESS|SOCKET", default_value = "127.0.0.1:15000")]
    admin: Admin,
    /// How answers are printed.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    output: Output,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
    Yaml,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No node answers.
    #[error("{0}")]
    Absent(String),
    /// One may be there, but does not answer as it should.
    #[error("{0}")]
    Broken(String),
    /// What was asked about is not there.
    #[error("{0}")]
    Asked(String),
    /// It was not asked as it has to be.
    #[error("{0}")]
    Misasked(String),
    #[error("{0}")]
    Other(String),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Self::Absent(_) | Self::Broken(_) => 3,
            Self::Asked(_) => 4,
            Self::Misasked(_) => 2,
            Self::Other(_) => 1,
        }
    }
}

#[derive(Debug, Subcommand)]
enum What {
    /// Node, fail mode, configuration generation, and every object or field that is not in force with the reason.
    Status,
    /// The node's pods: in the mesh, captured, and why not.
    Pods,
    /// Every workload of the mesh with its identity and how it takes connections.
    Workloads,
    /// Services and their ports, or the endpoints of one.
    Services {
        /// namespace/name, or name.
        service: Option<String>,
    },
    /// Routing rules in force, of every service or of one.
    Routes {
        /// namespace/name, or name.
        service: Option<String>,
    },
    /// Policies in force, of every workload or of one, by port.
    Policies {
        /// namespace/name of a workload, or name in the namespace default.
        workload: Option<String>,
    },
    /// Certificates of the node's identities: their age and when they expire.
    Certificates,
    /// Open connections: between whom, how they go, whether encrypted, and what they have carried.
    Connections {
        /// Only those of this workload: namespace/name.
        workload: Option<String>,
    },
    /// Pooled HBONE connections to other nodes.
    Pool,
    /// What each pod has under way to other services: connections, requests, retries, ejected endpoints.
    Clusters,
    /// Connections between the proxy and applications, or past it: accelerated, or why not.
    Acceleration,
    /// Connections between pods of the node that go past the proxy, and how many destinations may be reached so.
    Direct,
    /// A live view of requests, errors and latency per workload.
    Top {
        /// Seconds between looks.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
        interval: u64,
        /// Looks; for ever without it.
        #[arg(long)]
        times: Option<u32>,
    },
    /// Follow what a workload of this node asks and is asked: each request, and each connection that carries none, when it is over.
    Trace {
        /// namespace/name of a pod.
        workload: String,
        /// End after so many.
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        /// End after so many seconds.
        #[arg(long, value_name = "SECONDS")]
        time: Option<u64>,
    },
    /// Stop the node's mesh-node in order, as SIGTERM does: it is not ready any more, and still serves who comes while it waits a
    /// little for those there are to end. Pods stay captured: until it is started again, their new connections meet the fail mode.
    Drain {
        /// Fail (1) when it has not ended after so many seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 15)]
        timeout: u64,
    },
    /// Effective mutual TLS of a workload's ports, or of those a service leads to.
    TlsCheck {
        /// namespace/name of a workload.
        workload: String,
        /// namespace/name of a service.
        service: Option<String>,
    },
    /// What would become of a request: which route, which endpoints, and which policy would allow or deny it. Nothing is sent.
    Explain(Explain),
    /// Which policy would allow or deny a request, or without -X, --path, --host, -H and --claims a connection that carries
    /// none; dry-run, AUDIT and external authorizers included. On a port declared to carry no HTTP policies see the connection,
    /// whatever is asked. Nothing is sent.
    Authorize(Authorize),
    /// Check manifests without a node: everything that would not be in force or is hardly meant so, by file and line. Templates of
    /// Deployments and the like stand for a pod each, with addresses of 198.18.0.0/15, in the mesh unless their namespace is there and
    /// says otherwise.
    Analyze {
        /// A directory or a single file; - is standard input.
        directory: PathBuf,
        #[command(flatten)]
        mesh: Offline,
    },
    /// What the kernel does: counters of the hooks, and every pod's enrolment.
    Capture,
    /// What the node logs.
    Logs {
        #[command(subcommand)]
        what: Logs,
    },
    /// The configuration as ztunnel has it, for `istioctl ztunnel-config`.
    ConfigDump,
    /// All metrics, in Prometheus' text unless asked for otherwise.
    Metrics,
    /// Completion for a shell.
    Completion { shell: clap_complete::Shell },
}

#[derive(Debug, Subcommand)]
enum Logs {
    /// Show the log level, or change it until the process ends.
    Level {
        /// As --log of mesh-node: info, debug, proxy=debug,info; `reset` is what it was started with.
        level: Option<String>,
    },
}

impl Meshctl {
    /// Asks, prints, and says how it went.
    pub fn run(self) -> ExitCode {
        match self.answer() {
            Ok(status) => status,
            Err(failure) => {
                eprintln!("meshctl: {failure}");
                ExitCode::from(failure.status())
            }
        }
    }

    fn answer(&self) -> Result<ExitCode, Failure> {
        let Self { admin, what, .. } = self;
        match what {
            What::Status => self.show("/status", views::status),
            What::Pods => self.show("/pods", views::pods),
            What::Workloads => self.show("/workloads", views::workloads),
            What::Services { service } => self.services(service.as_deref()),
            What::Certificates => self.show("/certificates", views::certificates),
            What::Pool => self.show("/pool", views::pool),
            What::Clusters => self.show("/clusters", views::clusters),
            What::Acceleration => self.show("/acceleration", views::acceleration),
            What::Direct => self.show("/direct", views::direct),
            What::Routes { service } => self.routes(service.as_deref()),
            What::Policies { workload } => self.policies(workload.as_deref()),
            What::Connections { workload } => self.connections(workload.as_deref()),
            What::TlsCheck { workload, service } => self.tls_check(workload, service.as_deref()),
            What::Top { interval, times } => {
                let shown = |document: &Value, view: &dyn Fn(&Value) -> String| match self.output {
                    // One look, one line, as of events.
                    Output::Json => format!("{document}\n"),
                    _ => self.shown(document, view),
                };
                top::run(admin, Duration::from_secs(*interval), *times, shown).map(|()| ExitCode::SUCCESS)
            }
            What::Trace { workload, count, time } => {
                let all = admin.document("/workloads")?;
                let name = find("workload", workload, all.as_array().map_or(&[], Vec::as_slice))?;
                let until = time.map(|t| Instant::now() + Duration::from_secs(t));
                let shown = |event: &Value, line: &str| match self.output {
                    Output::Table => line.to_owned(),
                    Output::Json => format!("{event}\n"),
                    Output::Yaml => format!("---\n{}", table::yaml(event)),
                };
                follow::trace(admin, &name, shown, *count, until).map(|()| ExitCode::SUCCESS)
            }
            What::Drain { timeout } => follow::drain(admin, Duration::from_secs(*timeout)),
            What::Explain(question) => {
                question.note_token();
                let answer = question.answer(admin)?;
                self.print(&answer, views::explain);
                Ok(if question.check && answer["allowed"] != true { ExitCode::FAILURE } else { ExitCode::SUCCESS })
            }
            What::Authorize(question) => {
                question.note_token();
                let answer = admin.document(&question.path())?;
                self.print(&answer, views::authorize);
                Ok(if question.check && answer["decision"] == "denied" { ExitCode::FAILURE } else { ExitCode::SUCCESS })
            }
            What::Analyze { directory, mesh } => self.analyze(directory, mesh),
            What::Capture => self.capture(),
            What::Logs { what: Logs::Level { level } } => {
                let answer = match level {
                    Some(level) => admin.post(&query("/logging", &[("level", level)]))?,
                    None => admin.get("/logging")?,
                };
                let level = answer.trim().rsplit(' ').next().unwrap_or_default().to_owned();
                self.print(&json!({"level": level}), |_| answer.clone());
                Ok(ExitCode::SUCCESS)
            }
            What::ConfigDump => self.show("/config_dump", |dump| format!("{dump:#}\n")),
            What::Metrics => self.metrics(),
            What::Completion { shell } => {
                let mut text = Vec::new();
                clap_complete::generate(*shell, &mut Self::command(), "meshctl", &mut text);
                say(&String::from_utf8_lossy(&text));
                Ok(ExitCode::SUCCESS)
            }
        }
    }

    fn metrics(&self) -> Result<ExitCode, Failure> {
        let text = self.admin.get("/metrics")?;
        match self.output {
            Output::Table => say(&text),
            Output::Json | Output::Yaml => self.print(&samples::of(&text), |_| String::new()),
        }
        Ok(ExitCode::SUCCESS)
    }

    fn show(&self, path: &str, view: fn(&Value) -> String) -> Result<ExitCode, Failure> {
        self.print(&self.admin.document(path)?, view);
        Ok(ExitCode::SUCCESS)
    }

    fn print(&self, value: &Value, view: impl Fn(&Value) -> String) {
        say(&self.shown(value, view));
    }

    /// As it is asked for.
    fn shown(&self, value: &Value, view: impl FnOnce(&Value) -> String) -> String {
        match self.output {
            Output::Table => view(value),
            Output::Json => format!("{value:#}\n"),
            Output::Yaml => table::yaml(value),
        }
    }

    fn services(&self, service: Option<&str>) -> Result<ExitCode, Failure> {
        let Some(service) = service else { return self.show("/services", views::services) };
        let mut all = self.admin.document("/services")?;
        let name = find("service", service, all.as_array().map_or(&[], Vec::as_slice))?;
        if let Some(all) = all.as_array_mut() {
            all.retain(|one| named(one) == name);
        }
        self.print(&all, views::endpoints);
        Ok(ExitCode::SUCCESS)
    }

    fn routes(&self, service: Option<&str>) -> Result<ExitCode, Failure> {
        let Some(service) = service else { return self.show("/routes", views::routes) };
        let all = self.admin.document("/services")?;
        let name = find("service", service, all.as_array().map_or(&[], Vec::as_slice))?;
        self.show(&query("/routes", &[("service", &name)]), views::routes)
    }

    fn policies(&self, workload: Option<&str>) -> Result<ExitCode, Failure> {
        let all = self.admin.document("/workloads")?;
        let all = all.as_array().cloned().unwrap_or_default();
        let chosen = match workload {
            Some(workload) => {
                let name = find("workload", workload, &all)?;
                all.into_iter().filter(|w| named(w) == name).collect::<Vec<_>>()
            }
            None => all,
        };
        let shown = chosen.iter().map(|w| json!({"namespace": w["namespace"], "name": w["name"], "mtls": w["mtls"], "mtlsByPort": w["mtlsByPort"], "policies": w["policies"], "policiesByPort": w["policiesByPort"]}));
        self.print(&shown.collect(), |v| views::policies(&v.as_array().into_iter().flatten().collect::<Vec<_>>()));
        Ok(ExitCode::SUCCESS)
    }

    fn connections(&self, workload: Option<&str>) -> Result<ExitCode, Failure> {
        let mut all = self.admin.document("/connections")?;
        if let (Some(workload), Some(list)) = (workload, all.as_array_mut()) {
            let known = self.admin.document("/workloads")?;
            let name = find("workload", workload, known.as_array().map_or(&[], Vec::as_slice))?;
            list.retain(|c| c["source"] == *name || c["destination"] == *name);
            let found = known.as_array().into_iter().flatten().find(|w| named(w) == name);
            let (own, node) = (self.admin.document("/status")?["node"].clone(), found.map(|w| w["node"].clone()).unwrap_or_default());
            if list.is_empty() && node != own {
                eprintln!("meshctl: {name} is a pod of node {node}: ask there for its connections");
            }
        }
        self.print(&all, views::connections);
        Ok(ExitCode::SUCCESS)
    }

    fn tls_check(&self, workload: &str, service: Option<&str>) -> Result<ExitCode, Failure> {
        let (workloads, services) = (self.admin.document("/workloads")?, self.admin.document("/services")?);
        let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
        let name = find("workload", workload, &list(&workloads))?;
        let found = list(&workloads).into_iter().find(|w| named(w) == name).unwrap_or_default();
        let wanted = service.map(|s| find("service", s, &list(&services))).transpose()?;
        let addresses = list(&found["addresses"]).iter().filter_map(|a| a.as_str().map(str::to_owned)).collect::<Vec<_>>();
        let mut ports = Vec::new();
        for service in list(&services).iter().filter(|s| wanted.as_ref().is_none_or(|w| named(s) == *w)) {
            for endpoint in list(&service["ports"]).iter().flat_map(|p| list(&p["endpoints"])) {
                let address = endpoint["address"].as_str().and_then(|a| a.parse::<std::net::SocketAddr>().ok());
                let Some(address) = address.filter(|a| addresses.contains(&a.ip().to_string())) else { continue };
                let pair = (address.port().to_string(), named(service));
                if !ports.contains(&pair) {
                    ports.push(pair);
                }
            }
        }
        let all = wanted.is_none();
        if let Some(wanted) = wanted.filter(|_| ports.is_empty()) {
            return Err(Failure::Asked(format!("service {wanted} does not lead to {name}")));
        }
        let document = json!({"workload": name, "protocol": found["protocol"], "mtls": found["mtls"], "mtlsByPort": found["mtlsByPort"],
            "ports": ports.iter().map(|(port, service)| json!({"port": port, "service": service})).collect::<Vec<_>>()});
        self.print(&document, |_| views::tls_check(&found, &ports, all));
        Ok(ExitCode::SUCCESS)
    }

    fn analyze(&self, directory: &std::path::Path, mesh: &Offline) -> Result<ExitCode, Failure> {
        let mut manifests = analyze::Manifests::read(directory)?;
        let (snapshot, statuses) = analyze::load(&mut manifests, mesh.settings());
        let remarks = analyze::remarks(&statuses, &manifests);
        let document = json!({"remarks": remarks.iter().map(analyze::Remark::document).collect::<Vec<_>>(),
            "workloads": snapshot.workloads().count(), "services": snapshot.services().len()});
        self.print(&document, |v| {
            let counts = format!("{} workloads, {} services", v["workloads"], v["services"]);
            if remarks.is_empty() {
                return format!("{counts}: everything would be in force\n");
            }
            remarks.iter().map(analyze::Remark::text).collect()
        });
        Ok(if remarks.iter().any(analyze::Remark::is_error) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    fn capture(&self) -> Result<ExitCode, Failure> {
        let (pods, metrics) = (self.admin.document("/pods")?, self.admin.get("/metrics")?);
        let events = metrics.lines().filter_map(|l| l.strip_prefix("mesh_capture_events_total{event=\"")?.split_once("\"} "));
        let events = events.map(|(event, n)| (event.to_owned(), n.parse::<u64>().map_or(Value::Null, Value::from)));
        let document = json!({"pods": pods, "events": events.collect::<serde_json::Map<_, _>>()});
        self.print(&document, |v| views::capture(&v["pods"], &metrics));
        Ok(ExitCode::SUCCESS)
    }
}

/// Prints; who has stopped reading gets no more, and what cannot be written does not look as if it were.
fn say(text: &str) {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("meshctl: the answer cannot be written: {error}");
            std::process::exit(1);
        }
        Ok(()) | Err(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Meshctl::command().debug_assert();
    }
}
