//! The Kubernetes API as far as the authority asks it: whose token (`TokenReview`), and which pods run on a node.

use std::path::PathBuf;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::{Boxed, Caller, Cluster, Unknown};
use crate::{
    id::{SpiffeId, TrustDomain},
    tls,
};

/// What tokens must be for, as istiod asks.
const AUDIENCE: &str = "istio-ca";
const MAX_ANSWER: usize = 8 * 1024 * 1024;
/// Where a pod finds its own token and the API's authority.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// An API server.
#[derive(Debug, Clone)]
pub struct Kubernetes {
    /// `host:port`.
    pub address: String,
    /// PEM file of its authority.
    pub roots: PathBuf,
    /// The caller's own token; read for every call.
    pub token: PathBuf,
}

impl Kubernetes {
    /// The API of the cluster this process runs in. `None`: it runs in none.
    pub fn in_cluster() -> Option<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let (host, port) = (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let file = |name: &str| PathBuf::from(ACCOUNT).join(name);
        Some(Self { address: format!("{host}:{port}"), roots: file("ca.crt"), token: file("token") })
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(StatusCode, Value), String> {
        let text = |e: &dyn std::error::Error| crate::telemetry::chain(e);
        let read = |path: &PathBuf| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
        let roots = tls::certificates(&read(&self.roots)?).map_err(|e| text(&e))?;
        let token = String::from_utf8_lossy(&read(&self.token)?).trim().to_owned();
        let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(h, _)| h).trim_matches(['[', ']']);
        let stream = TcpStream::connect(&self.address).await.map_err(|e| text(&e))?;
        let stream = tls::connect_named(host, &roots, tls::HTTP1, stream).await.map_err(|e| text(&e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| text(&e))?;
        // Ends with the response.
        tokio::spawn(async move { drop(connection.await) });
        let bytes = body.map(ToString::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.address)
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .body(Full::new(Bytes::from(bytes)))
            .map_err(|e| text(&e))?;
        let response = sender.send_request(request).await.map_err(|e| text(&e))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| e.to_string())?;
        Ok((status, serde_json::from_slice(&body.to_bytes()).unwrap_or(Value::Null)))
    }

    async fn whose(&self, token: &str) -> Result<Caller, Unknown> {
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]}});
        let asked = self.ask(Method::POST, "/apis/authentication.k8s.io/v1/tokenreviews", Some(&review)).await;
        let (status, answer) = asked.map_err(Unknown::Unavailable)?;
        if !status.is_success() {
            return Err(Unknown::Unavailable(format!("TokenReview: {status}")));
        }
        let told = &answer["status"];
        if told["authenticated"] != true {
            return Err(Unknown::Token(told["error"].as_str().unwrap_or("not authenticated").to_owned()));
        }
        let name = told["user"]["username"].as_str().unwrap_or_default();
        let account = name.strip_prefix("system:serviceaccount:").and_then(|a| a.split_once(':'));
        let (namespace, account) = account.ok_or_else(|| Unknown::Token(format!("{name:?} is not a service account")))?;
        let extra = |key: &str| told["user"]["extra"][format!("authentication.kubernetes.io/{key}")][0].as_str();
        let node = match (extra("node-name"), extra("pod-name"), extra("pod-uid")) {
            (Some(node), ..) => Some(node.to_owned()),
            (None, Some(pod), Some(uid)) => self.node_of(namespace, pod, uid).await?,
            _ => None,
        };
        Ok(Caller { namespace: namespace.to_owned(), account: account.to_owned(), node })
    }

    /// The node of a pod, if it is the pod the token was made for.
    async fn node_of(&self, namespace: &str, pod: &str, uid: &str) -> Result<Option<String>, Unknown> {
        if !is_name(namespace) || !is_name(pod) {
            return Ok(None);
        }
        let asked = self.ask(Method::GET, &format!("/api/v1/namespaces/{namespace}/pods/{pod}"), None).await;
        let (status, answer) = asked.map_err(Unknown::Unavailable)?;
        match status {
            StatusCode::OK if answer["metadata"]["uid"] == uid => Ok(answer["spec"]["nodeName"].as_str().map(str::to_owned)),
            StatusCode::OK | StatusCode::NOT_FOUND => Ok(None),
            other => Err(Unknown::Unavailable(format!("pod {namespace}/{pod}: {other}"))),
        }
    }

    async fn has_pod(&self, node: &str, namespace: &str, account: &str) -> Result<bool, Unknown> {
        if ![node, namespace, account].into_iter().all(is_name) {
            return Ok(false);
        }
        let fields = format!("spec.nodeName%3D{node},spec.serviceAccountName%3D{account}");
        let path = format!("/api/v1/namespaces/{namespace}/pods?fieldSelector={fields}");
        let (status, answer) = self.ask(Method::GET, &path, None).await.map_err(Unknown::Unavailable)?;
        if status != StatusCode::OK {
            return Err(Unknown::Unavailable(format!("pods of {node}: {status}")));
        }
        let alive = |pod: &Value| !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        // The selector is not relied on alone.
        let is = |pod: &Value| pod["spec"]["nodeName"] == node && pod["spec"]["serviceAccountName"] == account && alive(pod);
        Ok(answer["items"].as_array().into_iter().flatten().any(is))
    }
}

/// What may stand in a path of the API.
fn is_name(text: &str) -> bool {
    // A SPIFFE ID takes what a Kubernetes name may have.
    TrustDomain::parse("x").is_ok_and(|domain| SpiffeId::new(&domain, text, text).is_ok())
}

impl Cluster for Kubernetes {
    fn review<'a>(&'a self, token: &'a str) -> Boxed<'a, Result<Caller, Unknown>> {
        Box::pin(self.whose(token))
    }

    fn runs_on<'a>(&'a self, node: &'a str, namespace: &'a str, account: &'a str) -> Boxed<'a, Result<bool, Unknown>> {
        Box::pin(self.has_pod(node, namespace, account))
    }
}
