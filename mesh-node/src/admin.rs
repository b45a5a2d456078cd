//! The admin endpoint: readiness, metrics and a look inside, over plain HTTP on an address of the node's choice
//! (loopback by default: it shows names and addresses of every pod).

mod authorization;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{
    app::Node,
    proxy::http::clusters::{ClusterState, Limited},
    route::Workload,
};

/// Connections served at once; more wait.
const MAX_CONNECTIONS: usize = 32;
const HEADER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves a node's pages until the process ends.
pub async fn serve_node(listener: TcpListener, node: Arc<Node>) {
    serve(listener, Arc::new(move |method: &Method, uri: &Uri| answer(&node, method, uri))).await;
}

/// Serves pages until the process ends.
pub async fn serve<A>(listener: TcpListener, answer: Arc<A>)
where
    A: Fn(&Method, &Uri) -> Response<Full<Bytes>> + Send + Sync + 'static,
{
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<hyper::body::Incoming>| {
                std::future::ready(Ok::<_, Infallible>(answer(request.method(), request.uri())))
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
            if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(target: "admin", %error, "connection ended");
            }
            drop(slot);
        });
    }
}

fn answer(node: &Node, method: &Method, uri: &Uri) -> Response<Full<Bytes>> {
    if method != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n".to_owned());
    }
    match uri.path() {
        "/healthz/ready" if node.is_ready() => text(StatusCode::OK, "ready\n".to_owned()),
        "/healthz/ready" => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n".to_owned()),
        "/metrics" | "/stats/prometheus" => metrics(node),
        "/status" => document(&status(node)),
        "/pods" => document(&json!(node.pods())),
        "/workloads" => document(&workloads(node)),
        "/services" => document(&services(node)),
        "/certificates" => document(&certificates(node)),
        "/pool" => document(&pool(node)),
        "/clusters" => document(&clusters(node)),
        "/acceleration" => document(&acceleration(node)),
        "/direct" => document(&direct(node)),
        "/authorization" => {
            let answer = authorization::answer(&node.proxy.config.load(), uri.query().unwrap_or_default());
            answer.map_or_else(|error| text(StatusCode::BAD_REQUEST, error + "\n"), |found| document(&found))
        }
        "/" => {
            let all = "/healthz/ready /metrics /status /pods /workloads /services /certificates /pool /clusters /acceleration /direct /authorization";
            text(StatusCode::OK, format!("{all}\n"))
        }
        path => text(StatusCode::NOT_FOUND, format!("{path} is not served; GET / lists what is\n")),
    }
}

pub fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn document(value: &Value) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::OK, format!("{value:#}\n"));
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

fn metrics(node: &Node) -> Response<Full<Bytes>> {
    node.refresh_metrics();
    match node.proxy.metrics.render() {
        Ok(body) => {
            let mut response = text(StatusCode::OK, body);
            let kind = http::HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn status(node: &Node) -> Value {
    let snapshot = node.proxy.config.load();
    let settings = &node.settings;
    json!({
        "node": &*settings.mesh.node,
        "version": env!("CARGO_PKG_VERSION"),
        "ready": node.is_ready(),
        "uptimeSeconds": node.started.elapsed().unwrap_or_default().as_secs(),
        "failMode": format!("{:?}", settings.capture.fail_mode).to_lowercase(),
        "trustDomain": settings.mesh.trust_domains.local.as_str(),
        "outboundTrafficPolicy": match settings.mesh.outbound {
            crate::config::OutboundPolicy::AllowAny => "ALLOW_ANY",
            crate::config::OutboundPolicy::RegistryOnly => "REGISTRY_ONLY",
        },
        "generation": snapshot.generation,
        "openConnections": node.proxy.metrics.open_connections.get(),
        "remarks": node.proxy.config.statuses().iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn workloads(node: &Node) -> Value {
    let snapshot = node.proxy.config.load();
    let mut all = snapshot.workloads().collect::<Vec<_>>();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all.into_iter().map(|w| workload(w)).collect()
}

fn workload(w: &Workload) -> Value {
    let mode = |strict: bool| if strict { "STRICT" } else { "PERMISSIVE" };
    let ports = w.policy.mtls.ports.iter().map(|(port, strict)| (port.to_string(), json!(mode(*strict))));
    json!({
        "namespace": &*w.name.namespace, "name": &*w.name.name, "uid": w.uid.to_string(), "node": &*w.node,
        "identity": w.identity.to_string(), "addresses": w.ips, "protocol": if w.enrolled { "HBONE" } else { "TCP" },
        "mtls": mode(w.policy.mtls.strict), "mtlsByPort": ports.collect::<serde_json::Map<_, _>>(),
        "policies": governing(&w.policy.everywhere),
        "policiesByPort": w.policy.ports.iter().map(|(port, g)| (port.to_string(), governing(g))).collect::<serde_json::Map<_, _>>(),
    })
}

/// What governs a workload, or a port of it.
fn governing(governing: &crate::policy::Governing) -> Value {
    let all = &governing.authorization;
    let names = |rules: &crate::policy::RuleSet| {
        let mut names = rules.rules().iter().map(|r| r.policy.to_string()).collect::<Vec<_>>();
        names.dedup();
        names
    };
    json!({
        "all": all.policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "allow": all.allow.as_ref().map(names), "deny": names(&all.deny), "audit": names(&all.audit),
        "dryRunAllow": all.shadow_allow.as_ref().map(names), "dryRunDeny": names(&all.shadow_deny),
        "custom": all.custom.iter().map(|(provider, rules)| (provider.to_string(), json!(names(rules)))).collect::<serde_json::Map<_, _>>(),
        "issuers": governing.authentication.iter().map(|r| r.issuer.to_string()).collect::<Vec<_>>(),
    })
}

fn services(node: &Node) -> Value {
    let snapshot = node.proxy.config.load();
    let port = |p: &crate::route::ServicePort| {
        let endpoints = p
            .cluster
            .endpoints
            .iter()
            .map(|e| json!({"address": e.address.to_string(), "ready": e.ready, "connections": e.load.current()}));
        let subsets = p.subsets.iter().map(|(name, c)| json!({"name": &**name, "endpoints": c.endpoints.len()}));
        json!({
            "name": &*p.name, "port": p.port, "protocol": format!("{:?}", p.cluster.protocol).to_lowercase(),
            "httpRoutes": p.routes.http.as_ref().map(|t| json!({"from": &*t.origin, "rules": t.rules.len()})),
            "tcpRoutes": p.routes.tcp.len(), "tlsRoutes": p.routes.tls.len(),
            "subsets": subsets.collect::<Vec<_>>(), "endpoints": endpoints.collect::<Vec<_>>(),
        })
    };
    let one = |s: &Arc<crate::route::Service>| json!({"namespace": &*s.name.namespace, "name": &*s.name.name, "addresses": s.vips, "ports": s.ports.iter().map(port).collect::<Vec<_>>()});
    snapshot.services().iter().map(one).collect()
}

fn certificates(node: &Node) -> Value {
    let seconds = |t: Option<SystemTime>| t.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|d| d.as_secs());
    let one = |c: crate::identity::CertificateState| json!({"identity": c.identity.to_string(), "notBefore": seconds(c.not_before), "notAfter": seconds(c.not_after), "serial": c.serial, "error": c.error});
    node.proxy.identity.states().into_iter().map(one).collect()
}

/// What each pod of the node has under way to other services, and which endpoints it leaves out.
fn clusters(node: &Node) -> Value {
    let (snapshot, now) = (node.proxy.config.load(), std::time::Instant::now());
    let of_pod = |pod: Arc<crate::proxy::ServedPod>| {
        let source = snapshot.workload(&pod.uid).map(|w| w.name.to_string());
        let mut all = pod.clusters.all();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let one = move |(id, state): (crate::route::ClusterId, Arc<ClusterState>)| {
            let ejected = state.outliers.ejected();
            let ejected = ejected.iter().filter(|(_, until)| *until > now);
            let ejected = ejected.map(|(a, until)| json!({"address": a.to_string(), "seconds": until.duration_since(now).as_secs()}));
            json!({
                "source": source, "cluster": id.to_string(), "connections": state.count(Limited::Connections),
                "idle": state.idle(), "pending": state.count(Limited::Pending), "requests": state.count(Limited::Requests),
                "retries": state.count(Limited::Retries), "ejected": ejected.collect::<Vec<_>>(),
            })
        };
        all.into_iter().map(one).collect::<Vec<_>>()
    };
    node.proxy.pods.all().into_iter().flat_map(of_pod).collect()
}

/// Connections between the proxy and applications, with why each is accelerated or not.
fn acceleration(node: &Node) -> Value {
    let Some(offers) = node.proxy.accelerated() else { return json!({"unavailable": true, "pairs": []}) };
    let one = |s: crate::capture::PairState| json!({"one": s.pair.one.local.to_string(), "other": s.pair.one.remote.to_string(), "state": s.state.name(), "redirectedBytes": s.redirected});
    json!({"unavailable": false, "pairs": offers.states().into_iter().map(one).collect::<Vec<_>>()})
}

/// Connections between pods of this node that go past the proxy.
fn direct(node: &Node) -> Value {
    let name = |n: Option<crate::id::ObjectName>| n.map(|n| n.to_string());
    let one = |s: crate::proxy::direct::DirectState| {
        json!({
            "source": name(s.source), "destination": name(s.destination), "service": name(s.service),
            "client": s.flow.client.to_string(), "dialled": s.flow.dialled.to_string(), "endpoint": s.flow.endpoint.to_string(),
            "seconds": s.flow.begun.elapsed().as_secs(), "sentBytes": s.bytes.map(|b| b.0), "receivedBytes": s.bytes.map(|b| b.1),
        })
    };
    json!({"routes": node.direct.routes(), "connections": node.direct.states().into_iter().map(one).collect::<Vec<_>>()})
}

fn pool(node: &Node) -> Value {
    let one = |s: crate::hbone::pool::PoolState| {
        json!({
            "source": s.key.source.to_string(), "sourceWorkload": s.key.source_workload.to_string(),
            "destination": s.key.destination.to_string(), "destinationWorkload": s.key.destination_workload.to_string(),
            "address": s.key.address.to_string(), "connections": s.connections, "streams": s.streams,
        })
    };
    node.proxy.pool.states().into_iter().map(one).collect()
}
