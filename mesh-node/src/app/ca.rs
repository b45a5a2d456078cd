//! The certificate authority's process.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context;
use http::{HeaderMap, Method, StatusCode, Uri};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::sync::mpsc;

use crate::{
    admin,
    config::{MeshSettings, Publisher},
    identity::service::{Cluster, FileCluster, Kubernetes, Service, ServiceSettings},
    sources::{directory::Directory, last_good::LastGood},
    telemetry::Exposition,
};

/// Everything the process is started with.
#[derive(Debug, Clone)]
pub struct CaSettings {
    pub service: ServiceSettings,
    pub listen: SocketAddr,
    pub metrics: SocketAddr,
    pub cluster: ClusterSettings,
}

/// Who is asked about tokens and pods.
#[derive(Debug, Clone)]
pub enum ClusterSettings {
    /// The API of the cluster the process runs in.
    Kubernetes,
    /// A file of tokens, and manifests of the pods.
    Files { tokens: PathBuf, config_dir: PathBuf, state_dir: PathBuf },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reason: &'static str,
}

/// Serves until it is told to stop.
pub async fn run_ca(settings: CaSettings) -> anyhow::Result<()> {
    super::stop::ignore_others().context("signals cannot be heard of")?;
    let cluster: Arc<dyn Cluster> = match &settings.cluster {
        ClusterSettings::Kubernetes => {
            let missing = "this process is in no Kubernetes cluster (KUBERNETES_SERVICE_HOST is not set); give --tokens and --config-dir";
            Arc::new(Kubernetes::in_cluster().context(missing)?)
        }
        ClusterSettings::Files { tokens, config_dir, state_dir } => {
            let mesh = MeshSettings::new("", settings.service.trust_domain.clone());
            let last_good =
                LastGood::open(&state_dir.join("last-good-ca")).with_context(|| format!("state directory {}", state_dir.display()))?;
            let source = Directory::open(config_dir, last_good, "default", &mesh.root_namespace)
                .with_context(|| format!("configuration directory {}", config_dir.display()))?;
            let (sender, receiver) = mpsc::channel(16);
            let (publisher, mut config) = Publisher::new(Arc::new(mesh), receiver);
            tokio::spawn(publisher.run());
            tokio::spawn(async move {
                // Without its source the authority knows no new pods; this is why.
                if let Err(error) = source.run(sender).await {
                    tracing::error!(target: "config", %error, "the configuration directory cannot be followed any more");
                }
            });
            config.ready().await;
            Arc::new(FileCluster::open(tokens.clone(), config)?)
        }
    };
    let service = Service::open(settings.service, cluster)?;
    let listener = admin::bind_any(settings.listen).await.with_context(|| format!("address {}", settings.listen))?;
    let metrics = admin::bind_any(settings.metrics).await.with_context(|| format!("metrics address {}", settings.metrics))?;
    let shown = service.clone();
    let answer = move |method: &Method, uri: &Uri, headers: &HeaderMap| match (method, uri.path()) {
        (&Method::GET, "/healthz/ready") if !shown.is_usable() => {
            admin::text(StatusCode::SERVICE_UNAVAILABLE, "nobody who trusts its roots would believe what it signs\n".to_owned())
        }
        (&Method::GET, "/healthz/ready") => admin::text(StatusCode::OK, "ready\n".to_owned()),
        (&Method::GET, "/metrics") => {
            let exposition = Exposition::accepted(headers);
            admin::exposed(exposition, exposition.render(&counted(&shown)))
        }
        _ => admin::text(StatusCode::NOT_FOUND, "/healthz/ready /metrics\n".to_owned()),
    };
    tokio::spawn(admin::serve(admin::Listener::Tcp(metrics), Arc::new(answer), || {}));
    tracing::info!(target: "ca", address = %settings.listen, metrics = %settings.metrics, "the certificate authority serves");
    let mut signals = super::stop::StopSignals::new().context("signals cannot be heard of")?;
    tokio::select! {
        ended = service.run(listener) => Ok(ended?),
        signal = signals.next() => {
            tracing::info!(target: "ca", signal, "stopping");
            Ok(())
        }
    }
}

fn counted(service: &Service) -> Registry {
    let (issued, refused) = service.counts();
    let mut registry = Registry::default();
    let (all, by_reason) = (Counter::<u64>::default(), Family::<RefusedLabels, Counter>::default());
    all.inc_by(issued);
    for (refusal, n) in refused {
        by_reason.get_or_create(&RefusedLabels { reason: refusal.reason() }).inc_by(n);
    }
    registry.register("mesh_ca_certificates_issued", "Certificates signed", all);
    registry.register("mesh_ca_requests_refused", "Requests for certificates that were refused, by reason", by_reason);
    registry
}
