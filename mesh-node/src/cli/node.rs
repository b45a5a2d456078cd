//! `mesh-node`: the agent.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    app::{self, CaSettings, CertificateSettings, ClusterSettings, NodeSettings},
    capture::{self, Acceleration, CaptureSettings, Discovery, FailMode, SameNode},
    config::{DestinationRequests, EnrolmentLabel, MeshSettings, OutboundPolicy, TrustedProxy},
    id::TrustDomain,
    identity::{IstioCaSettings, service::ServiceSettings},
    io::netns::Netns,
    policy::TrustDomains,
    telemetry,
    tls::KeyExchange,
};

/// What stopping takes beside waiting for what is under way.
const STOPPING: Duration = Duration::from_secs(5);

/// Sidecarless service mesh for the pods of one node: eBPF capture, HBONE mutual TLS, policy.
#[derive(Debug, Parser)]
#[command(name = "mesh-node", version, about)]
pub struct MeshNode {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node until SIGTERM or SIGINT.
    ///
    /// When the process ends, capture stays in the kernel and the fail mode applies; `uninstall` removes it.
    Run(Box<RunArgs>),
    /// Run a certificate authority for the mesh: Istio's `IstioCertificateService` over gRPC and TLS.
    ///
    /// A node gets certificates of the service accounts of its own pods, and of nothing else. Tokens are reviewed by the
    /// Kubernetes API of the cluster it runs in, or, with --tokens, by a file.
    Ca(Box<CaArgs>),
    /// Remove everything an earlier `run` left in the kernel: programs, maps, and the routing inside pods.
    ///
    /// Stop `run` first: under a running process this is refused.
    Uninstall(KernelArgs),
    /// Load the eBPF programs into this kernel without attaching them, and report what the verifier says.
    Verify,
}

#[derive(Debug, Args)]
struct KernelArgs {
    /// The cgroup v2 directory above all pods and this process [default: where cgroup v2 is mounted].
    #[arg(long, env = "MESH_CGROUP_ROOT", value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// Where programs and maps are pinned; a directory on a bpffs, one per node.
    #[arg(long, env = "MESH_BPF_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/mesh-node")]
    bpf_dir: PathBuf,
}

impl KernelArgs {
    fn cgroup(&self) -> anyhow::Result<PathBuf> {
        match &self.cgroup_root {
            Some(path) => Ok(path.clone()),
            None => capture::cgroup2_mount().context("cannot find cgroup v2; name its directory with --cgroup-root"),
        }
    }
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    kernel: KernelArgs,
    /// Name of this node, as in the `spec.nodeName` of its pods.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node: String,
    /// Directory of Kubernetes YAML to take the configuration from; re-read on change.
    #[arg(long, env = "MESH_CONFIG_DIR", value_name = "DIR")]
    config_dir: PathBuf,
    /// Directory for what must survive a restart: the last good version of every manifest.
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = "/var/lib/mesh-node")]
    state_dir: PathBuf,
    /// Name of the cluster, in metrics and towards the certificate authority.
    #[arg(long, env = "CLUSTER_ID", value_name = "NAME", default_value = "Kubernetes")]
    cluster_id: String,
    #[command(flatten)]
    certificates: CertificateArgs,
    /// What happens to connections of enrolled pods while no mesh-node runs on the node.
    #[arg(long, env = "MESH_FAIL_MODE", value_enum, default_value_t)]
    fail_mode: FailMode,
    /// Whether messages between applications and the proxy move past the TCP stack (`sk_msg`), where both read without blocking. Not
    /// for programs that make a socket blocking again in the midst of a conversation. A pod opts out with the label or annotation
    /// `mesh-node.io/acceleration: "off"`.
    #[arg(long, env = "MESH_ACCELERATION", value_enum, default_value_t)]
    acceleration: Acceleration,
    /// How connections between pods of this node go that need nothing of the proxy: opaque ones that policy allows whatever they carry.
    #[arg(long, env = "MESH_SAME_NODE", value_enum, default_value_t)]
    same_node: SameNode,
    /// SPIFFE trust domain of the mesh.
    #[arg(long, env = "MESH_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,
    /// Other names of the trust domain in policies; may be given several times.
    #[arg(long = "trust-domain-alias", env = "MESH_TRUST_DOMAIN_ALIASES", value_name = "NAME", value_delimiter = ',')]
    trust_domain_aliases: Vec<TrustDomain>,
    /// Namespace whose policies without a selector apply to the whole mesh.
    #[arg(long, env = "MESH_ROOT_NAMESPACE", value_name = "NAME", default_value = "istio-system")]
    root_namespace: String,
    /// What happens to connections to addresses the mesh does not know.
    #[arg(long, env = "MESH_OUTBOUND_POLICY", value_enum, ignore_case = true, default_value_t)]
    outbound_policy: OutboundPolicy,
    /// Label of namespaces and pods that enrols them [default: istio.io/dataplane-mode=ambient]. A pod's value `none` opts out.
    #[arg(long, env = "MESH_ENROLMENT_LABEL", value_name = "KEY=VALUE")]
    enrolment_label: Option<EnrolmentLabel>,
    /// Which requests the node of their destination looks into where policy does not ask for it: they are then counted and logged by
    /// both ends.
    #[arg(long, env = "MESH_DESTINATION_REQUESTS", value_enum, default_value_t)]
    destination_requests: DestinationRequests,
    /// Proxy whose `x-forwarded-for` is believed by policies on `remote.ip`: its address, CIDR or principal; may be given several
    /// times. Nobody's is by default.
    #[arg(long = "trusted-proxy", env = "MESH_TRUSTED_PROXIES", value_name = "PROXY", value_delimiter = ',')]
    trusted_proxies: Vec<TrustedProxy>,
    /// Where the admin endpoint (all of meshctl's, readiness, metrics) listens: names and addresses of every pod are shown there.
    #[arg(long, env = "MESH_ADMIN", value_name = "ADDRESS", default_value = "127.0.0.1:15000")]
    admin: SocketAddr,
    /// A socket in the file system for the same; an empty name makes none [default: none].
    #[arg(long, env = "MESH_ADMIN_SOCKET", value_name = "FILE")]
    admin_socket: Option<PathBuf>,
    /// Where metrics alone are served, for Prometheus: /metrics and /stats/prometheus.
    #[arg(long, env = "MESH_METRICS", value_name = "ADDRESS", default_value = "[::]:15020")]
    metrics: SocketAddr,
    /// Where readiness alone is served, for the kubelet: /healthz/ready.
    #[arg(long, env = "MESH_READINESS", value_name = "ADDRESS", default_value = "[::]:15021")]
    readiness: SocketAddr,
    /// Most requests of HTTP/2 under way at once on the node, streams of gRPC among them: each keeps some tens of kilobytes. A pod has at most
    /// four times what is free; what is beyond is refused unprocessed and counted.
    #[arg(long, env = "MESH_MAX_REQUESTS", default_value_t = crate::proxy::limits::MOST_REQUESTS, value_name = "N", value_parser = requests)]
    max_requests: usize,
    /// Seconds Kubernetes gives the process to end, `terminationGracePeriodSeconds` of its pod: what is under way when it is told to stop
    /// has all of them but five to end by itself, at least half of them.
    #[arg(long, env = "TERMINATION_GRACE_PERIOD_SECONDS", value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    termination_grace_period: u64,
    /// Worker threads [default: one for every two CPUs: the others are the applications', and a request that stays on one thread is faster].
    #[arg(long, env = "MESH_WORKERS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
    /// What is logged, in the syntax of `RUST_LOG`. Every connection is logged with target `access`.
    #[arg(long, env = "MESH_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Log JSON instead of text. So does `LOG_FORMAT=json`, as ztunnel has it.
    #[arg(long, env = "MESH_LOG_JSON")]
    log_json: bool,
}

/// Where certificates come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CertificateSourceKind {
    /// The node signs for its pods itself, with a root in --ca-dir.
    Embedded,
    /// An Istio certificate authority: `mesh-node ca`, or istiod.
    IstioGrpc,
    /// Files in --certificate-dir, made by somebody else.
    Files,
}

#[derive(Debug, Args)]
struct CertificateArgs {
    /// Where certificates of pods come from.
    #[arg(long, env = "MESH_CERTIFICATE_SOURCE", value_enum, default_value_t = CertificateSourceKind::Embedded)]
    certificate_source: CertificateSourceKind,
    /// Life of a certificate, seconds; it is renewed at half of it. Not for files.
    #[arg(long, env = "MESH_CERTIFICATE_TTL", value_name = "SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(2..=7_776_000))]
    certificate_ttl: u64,
    /// Directory with the embedded CA's key and certificates (root-key.pem, root-cert.pem, trusted-roots.pem, or Istio's cacerts);
    /// the nodes of a mesh share its contents, and changes take effect at once.
    #[arg(long, env = "MESH_CA_DIR", value_name = "DIR", default_value = "/var/lib/mesh-node/ca")]
    ca_dir: PathBuf,
    /// Address of the certificate authority, for istio-grpc.
    #[arg(long, env = "MESH_CA_ADDRESS", value_name = "HOST:PORT", default_value = "istiod.istio-system.svc:15012")]
    ca_address: String,
    /// Name in the authority's own certificate [default: the host of --ca-address].
    #[arg(long, env = "MESH_CA_SERVER_NAME", value_name = "NAME")]
    ca_server_name: Option<String>,
    /// PEM file with the roots the authority's own certificate is verified with.
    #[arg(long, env = "MESH_CA_ROOT", value_name = "FILE", default_value = "/var/run/secrets/istio/root-cert.pem")]
    ca_root: PathBuf,
    /// File with the node's service-account token, which the authority reviews.
    #[arg(long, env = "MESH_CA_TOKEN", value_name = "FILE", default_value = "/var/run/secrets/tokens/istio-token")]
    ca_token: PathBuf,
    /// Directory for the source `files`: roots.pem, and NAMESPACE/ACCOUNT/tls.crt and tls.key.
    #[arg(long, env = "MESH_CERTIFICATE_DIR", value_name = "DIR", default_value = "/var/run/mesh-node/certificates")]
    certificate_dir: PathBuf,
    /// PEM file with certificate revocation lists; may be given several times. Changes take effect within seconds: peers that are
    /// revoked are refused and cut.
    #[arg(long = "crl", env = "MESH_CRL", value_name = "FILE", value_delimiter = ',')]
    crl: Vec<PathBuf>,
    /// How keys between nodes are agreed on.
    #[arg(long, env = "MESH_KEY_EXCHANGE", value_enum, default_value_t)]
    key_exchange: KeyExchange,
}

impl CertificateArgs {
    fn source(self, cluster: String) -> (CertificateSettings, Vec<PathBuf>, KeyExchange) {
        let ttl = Duration::from_secs(self.certificate_ttl);
        let settings = match self.certificate_source {
            CertificateSourceKind::Embedded => CertificateSettings::Embedded { dir: self.ca_dir, ttl },
            CertificateSourceKind::IstioGrpc => CertificateSettings::Istio(IstioCaSettings {
                address: self.ca_address,
                server_name: self.ca_server_name,
                roots: self.ca_root,
                token: self.ca_token,
                cluster,
                ttl,
            }),
            CertificateSourceKind::Files => CertificateSettings::Files(self.certificate_dir),
        };
        (settings, self.crl, self.key_exchange)
    }
}

#[derive(Debug, Args)]
struct CaArgs {
    /// Where it listens.
    #[arg(long, env = "MESH_CA_LISTEN", value_name = "ADDRESS", default_value = "[::]:15012")]
    listen: SocketAddr,
    /// Directory with the authority's key and certificates: a root made there if there is nothing, or an operator's intermediate
    /// as in Istio's secret cacerts (ca-key.pem, ca-cert.pem, cert-chain.pem, root-cert.pem).
    #[arg(long, env = "MESH_CA_DIR", value_name = "DIR", default_value = "/var/lib/mesh-node/ca")]
    ca_dir: PathBuf,
    /// SPIFFE trust domain it signs for.
    #[arg(long, env = "MESH_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,
    /// DNS name or address in its own certificate; may be given several times.
    #[arg(long = "name", env = "MESH_CA_NAMES", value_name = "NAME", value_delimiter = ',', default_value = "mesh-ca.istio-system.svc")]
    names: Vec<String>,
    /// Account nodes run as, which may ask for their pods; may be given several times.
    #[arg(long = "node-account", env = "CA_TRUSTED_NODE_ACCOUNTS", value_name = "NAMESPACE/NAME", value_delimiter = ',', default_value = "istio-system/mesh-node", value_parser = account)]
    node_accounts: Vec<(String, String)>,
    /// Life of a certificate whose request says nothing of it, seconds.
    #[arg(long, env = "MESH_CERTIFICATE_TTL", value_name = "SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(2..=7_776_000))]
    certificate_ttl: u64,
    /// Longest life that is given, seconds; who asks for more is refused.
    #[arg(long, env = "MESH_MAX_CERTIFICATE_TTL", value_name = "SECONDS", default_value_t = 7_776_000, value_parser = clap::value_parser!(u64).range(2..))]
    max_certificate_ttl: u64,
    /// JSON file of tokens (token, namespace, serviceAccount, node) in place of the Kubernetes API; needs --config-dir.
    #[arg(long, env = "MESH_CA_TOKENS", value_name = "FILE", requires = "config_dir")]
    tokens: Option<PathBuf>,
    /// Directory of manifests of the pods, with --tokens.
    #[arg(long, env = "MESH_CONFIG_DIR", value_name = "DIR", requires = "tokens")]
    config_dir: Option<PathBuf>,
    /// Directory for the last good version of every manifest, with --tokens.
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = "/var/lib/mesh-node")]
    state_dir: PathBuf,
    /// Where readiness and metrics are served.
    #[arg(long, env = "MESH_CA_METRICS", value_name = "ADDRESS", default_value = "[::]:15014")]
    metrics: SocketAddr,
    /// What is logged, in the syntax of `RUST_LOG`.
    #[arg(long, env = "MESH_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Log JSON instead of text. So does `LOG_FORMAT=json`, as ztunnel has it.
    #[arg(long, env = "MESH_LOG_JSON")]
    log_json: bool,
}

fn account(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err(format!("{text:?} is not NAMESPACE/NAME of a service account")),
    }
}

impl CaArgs {
    fn run(self) -> anyhow::Result<()> {
        telemetry::log::start(&self.log, self.log_json || wants_json()).map_err(anyhow::Error::msg)?;
        let cluster = match (self.tokens, self.config_dir) {
            (Some(tokens), Some(config_dir)) => ClusterSettings::Files { tokens, config_dir, state_dir: self.state_dir },
            _ => ClusterSettings::Kubernetes,
        };
        let settings = CaSettings {
            service: ServiceSettings {
                dir: self.ca_dir,
                trust_domain: self.trust_domain,
                names: self.names,
                node_accounts: self.node_accounts,
                default_ttl: Duration::from_secs(self.certificate_ttl),
                max_ttl: Duration::from_secs(self.max_certificate_ttl),
            },
            listen: self.listen,
            metrics: self.metrics,
            cluster,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.context("cannot start worker threads")?.block_on(app::run_ca(settings))
    }
}

impl MeshNode {
    /// Does what the command line asks for.
    pub fn run(self) -> anyhow::Result<()> {
        let done = match self.command {
            Command::Run(args) => args.run(),
            Command::Ca(args) => args.run(),
            Command::Uninstall(args) => uninstall(&args),
            Command::Verify => verify(),
        };
        telemetry::log::flush();
        done
    }
}

impl RunArgs {
    fn run(self) -> anyhow::Result<()> {
        telemetry::log::start(&self.log, self.log_json || wants_json()).map_err(anyhow::Error::msg)?;
        let workers = self.workers;
        let settings = self.settings()?;
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        runtime.worker_threads(workers.map_or((cpus / 2).max(1), usize::from));
        let runtime = runtime.enable_all().thread_name("mesh-node").build().context("cannot start worker threads")?;
        let result = runtime.block_on(app::run(settings));
        runtime.shutdown_timeout(Duration::from_millis(200));
        result
    }

    fn settings(self) -> anyhow::Result<NodeSettings> {
        let cgroup = self.kernel.cgroup()?;
        let (certificates, revocations, key_exchange) = self.certificates.source(self.cluster_id.clone());
        Ok(NodeSettings {
            mesh: MeshSettings {
                node: self.node.into(),
                trust_domains: TrustDomains { local: self.trust_domain, aliases: self.trust_domain_aliases },
                root_namespace: self.root_namespace.into(),
                outbound: self.outbound_policy,
                enrolment: self.enrolment_label.unwrap_or_default(),
                destination_requests: self.destination_requests,
                trusted_proxies: self.trusted_proxies,
            },
            cluster: self.cluster_id,
            capture: CaptureSettings {
                cgroup,
                pins: self.kernel.bpf_dir,
                fail_mode: self.fail_mode,
                acceleration: self.acceleration,
                same_node: self.same_node,
            },
            config_dir: self.config_dir,
            certificates,
            revocations,
            key_exchange,
            state_dir: self.state_dir,
            admin: self.admin,
            admin_socket: self.admin_socket.filter(|p| !p.as_os_str().is_empty()),
            metrics: self.metrics,
            readiness: self.readiness,
            drain: drain_period(self.termination_grace_period),
            requests: self.max_requests,
        })
    }
}

/// How long what is under way may go on, so that the process is done in time.
fn drain_period(termination_grace: u64) -> Duration {
    Duration::from_secs(termination_grace).saturating_sub(STOPPING.min(Duration::from_secs(termination_grace) / 2))
}

fn uninstall(args: &KernelArgs) -> anyhow::Result<()> {
    Netns::host()?;
    let served = capture::is_served(&args.bpf_dir)?;
    anyhow::ensure!(!served, "a mesh-node is running with the pins in {}; stop it first", args.bpf_dir.display());
    let cgroup = args.cgroup()?;
    // Another's pods keep what it needs.
    capture::own_cgroup(&args.bpf_dir, &cgroup)?;
    let removed = capture::uninstall(&args.bpf_dir)?;
    let mut discovery = Discovery::new(cgroup)?;
    let mut failed = 0;
    let pods = discovery.look(std::time::Instant::now())?;
    for pod in pods.values() {
        if let Err(error) = capture::remove_routing(&pod.netns) {
            eprintln!("pod {}: {}", pod.uid, telemetry::chain(&error));
            failed += 1;
        }
    }
    let programs = if removed { "removed" } else { "there were none" };
    println!("programs and maps below {}: {programs}; routing of {} pods: removed", args.bpf_dir.display(), pods.len() - failed);
    anyhow::ensure!(failed == 0, "the routing of {failed} pods could not be removed");
    Ok(())
}

fn verify() -> anyhow::Result<()> {
    for (program, instructions) in capture::verify()? {
        println!("{program}: loads, {instructions} instructions verified");
    }
    Ok(())
}

/// A number of requests that lets some pass.
fn requests(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "is not a number from 1 on".to_owned())
}

/// Whether the environment asks for a log in JSON, in ztunnel's words.
fn wants_json() -> bool {
    std::env::var("LOG_FORMAT").is_ok_and(|format| format == "json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_has_all_of_the_time_but_what_stopping_takes() {
        let drained = [1, 2, 8, 10, 11, 30, 86_400].map(|given| drain_period(given).as_millis());
        assert_eq!(drained, [500, 1000, 4000, 5000, 6000, 25_000, 86_395_000]);
    }
}
