//! `explain`, `authorize` and what manifests without a node are to be taken for: their flags, and what is asked with them.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use super::{
    Failure, analyze,
    client::{Admin, query},
};
use crate::{
    admin,
    config::{EnrolmentLabel, MeshSettings, OutboundPolicy, store::Severity},
    id::TrustDomain,
};

#[derive(Debug, Args)]
pub struct Explain {
    /// Who asks: namespace/name of a workload, or its address.
    #[arg(long, value_name = "WORKLOAD|ADDRESS")]
    from: String,
    /// Whom: a service as the client names it, or an address, with the port.
    #[arg(long, value_name = "SERVICE:PORT|ADDRESS:PORT")]
    to: String,
    /// The request's method and path.
    #[arg(short = 'X', long, num_args = 1..=2, value_names = ["METHOD", "PATH"])]
    request: Vec<String>,
    /// A header; may be given several times.
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// Claims of the token it is taken to have, as JSON with the issuer in `iss`.
    #[arg(long, value_name = "JSON")]
    claims: Option<String>,
    /// The server name of the application's own TLS.
    #[arg(long)]
    sni: Option<String>,
    /// Ask this directory of manifests instead of a node; templates of Deployments and the like stand for a pod each, named like them.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    mesh: Offline,
    /// Fail (1) when it is not allowed everywhere: denied at some endpoint, or answered by the route or its fault.
    #[arg(long)]
    pub(super) check: bool,
}

/// Says that a token in a header is not looked at: nothing is verified here, and no keys are asked for.
fn note_token(headers: &[String], claims: Option<&str>) {
    let is_token = |header: &String| {
        header.split_once(':').is_some_and(|(name, value)| {
            name.trim().eq_ignore_ascii_case("authorization")
                && value.trim().get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("bearer "))
        })
    };
    if claims.is_none() && headers.iter().any(is_token) {
        eprintln!("meshctl: the token is a header like others here, and is not verified; say what is in it with --claims");
    }
}

impl Explain {
    pub fn note_token(&self) {
        note_token(&self.headers, self.claims.as_deref());
    }

    fn query(&self) -> String {
        let mut all = vec![("from", self.from.as_str()), ("to", &self.to)];
        // `-X GET /path`, `-X GET` and `-X /path`.
        match self.request.as_slice() {
            [method, path] => all.extend([("method", method.as_str()), ("path", path)]),
            [path] if path.starts_with('/') => all.push(("path", path)),
            methods => all.extend(methods.iter().map(|method| ("method", method.as_str()))),
        }
        all.extend(self.headers.iter().map(|header| ("header", header.as_str())));
        all.extend(self.claims.iter().map(|claims| ("claims", claims.as_str())));
        all.extend(self.sni.iter().map(|sni| ("sni", sni.as_str())));
        query("", &all).trim_start_matches('?').to_owned()
    }

    pub fn answer(&self, admin: &Admin) -> Result<Value, Failure> {
        let query = self.query();
        match &self.dir {
            Some(dir) => {
                let (snapshot, statuses) = analyze::load(&mut analyze::Manifests::read(dir)?, self.mesh.settings());
                let refused = statuses.iter().filter(|s| s.severity == Severity::Error).count();
                let hint = format!("; {refused} objects or files of {} are refused: meshctl analyze says why", dir.display());
                let hint = if refused > 0 { hint } else { String::new() };
                admin::explain(&snapshot, &query).map_err(|unanswered| match unanswered {
                    admin::NoAnswer::Missing(what) => Failure::Asked(what + &hint),
                    admin::NoAnswer::Misasked(how) => Failure::Misasked(how),
                })
            }
            None => admin.document(&format!("/explain?{query}")),
        }
    }
}

#[derive(Debug, Args)]
pub struct Authorize {
    /// Who asks: namespace/name of a workload, or any address.
    #[arg(long, value_name = "WORKLOAD|ADDRESS")]
    from: String,
    /// Whom: namespace/name of a workload, or its address.
    #[arg(long, value_name = "WORKLOAD|ADDRESS")]
    to: String,
    /// The port the application listens on.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
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
    /// A header; may be given several times.
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The server name of the application's own TLS.
    #[arg(long)]
    sni: Option<String>,
    /// Claims of the token it is taken to have, as JSON with the issuer in `iss`.
    #[arg(long, value_name = "JSON")]
    claims: Option<String>,
    /// Fail (1) when it is denied.
    #[arg(long)]
    pub(super) check: bool,
}

impl Authorize {
    pub fn note_token(&self) {
        note_token(&self.headers, self.claims.as_deref());
    }

    pub fn path(&self) -> String {
        let Self { from, to, port, plaintext, method, path, host, headers, claims, sni, check: _ } = self;
        let port = port.to_string();
        let mut all = vec![("from", from.as_str()), ("to", to), ("port", &port)];
        let told = [("method", method), ("path", path), ("host", host), ("claims", claims), ("sni", sni)];
        all.extend(told.iter().filter_map(|(name, value)| Some((*name, value.as_deref()?))));
        all.extend(headers.iter().map(|header| ("header", header.as_str())));
        if *plaintext {
            all.push(("plaintext", "true"));
        }
        query("/authorization", &all)
    }
}

/// What a node would be told beside manifests; the same flags as of `mesh-node run`.
#[derive(Debug, Args)]
pub struct Offline {
    /// Namespace whose policies without a selector apply to the whole mesh, of manifests without a node.
    #[arg(long, default_value = "istio-system")]
    root_namespace: String,
    /// The trust domain, of manifests without a node.
    #[arg(long, default_value = "cluster.local", value_parser = TrustDomain::parse)]
    trust_domain: TrustDomain,
    /// The label that enrols namespaces and pods, of manifests without a node.
    #[arg(long, value_name = "LABEL=VALUE")]
    enrolment_label: Option<EnrolmentLabel>,
    /// Whether addresses the mesh does not know may be reached, of manifests without a node.
    #[arg(long, value_enum, default_value_t)]
    outbound_policy: OutboundPolicy,
}

impl Offline {
    pub fn settings(&self) -> MeshSettings {
        MeshSettings {
            root_namespace: self.root_namespace.as_str().into(),
            enrolment: self.enrolment_label.clone().unwrap_or_default(),
            outbound: self.outbound_policy,
            ..MeshSettings::new("", self.trust_domain.clone())
        }
    }
}
