//! What spans say of requests, beside those of Envoy's OpenTelemetry tracer. Both go to one collector over gRPC.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use mesh_tests::{
    bed::program,
    engine::{Engine, security, server_pod, service},
    envoy::{Envoy, Listener, lines_of},
};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{Case, Compared, End, Outcome, Way, cases::case, format, run, upstreams, vip};

const COLLECTOR: &str = "127.0.0.1:4317";
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";

/// Ended with this.
struct Collector(Child);

impl Collector {
    fn start(file: &Path) -> Self {
        Self(Command::new(program("collector")).arg(file).stdout(Stdio::null()).spawn().expect("a collector"))
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A UUID for a name: the 9 is what Envoy makes of one of a request it samples.
fn id(name: &str) -> String {
    let number = name.bytes().fold(7_u64, |all, b| (all * 31 + u64::from(b)) % (1 << 48));
    format!("5a3c0d1e-0f2b-9c6d-8e9f-{number:012x}")
}

fn all() -> Vec<Case> {
    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let of = |name: &str, line: &str, headers: &str, answer: &str, end: End| {
        let request = format!("{line} HTTP/1.1\r\nhost: a.example\r\nx-request-id: {}\r\n{headers}\r\n", id(name));
        case(format!("span {name}"), &request, answer, end)
    };
    let get = |name: &str, headers: &str| of(name, "GET /x?a=b", headers, OK, End::Keep);
    let grpc = |name: &str, answer: &str| {
        of(name, "POST /pkg.S/M", "content-type: application/grpc\r\nte: trailers\r\ncontent-length: 0\r\n", answer, End::Keep)
    };
    vec![
        get("plain", ""),
        get("agent", "user-agent: me\r\n"),
        get("continued", &format!("traceparent: {TRACE}-01\r\n")),
        get("continued with state", &format!("traceparent: {TRACE}-01\r\ntracestate: a=b,c=d\r\n")),
        get("not sampled", &format!("traceparent: {TRACE}-00\r\n")),
        get("nonsense", "traceparent: nonsense\r\n"),
        get("of another version", &format!("traceparent: 01{}-01\r\n", &TRACE[2..])),
        get("proto", "x-forwarded-proto: https\r\n"),
        of("body", "POST /x", "content-length: 5\r\n", OK, End::Keep).with_body("hello"),
        of("head", "HEAD /x", "", OK, End::Keep),
        of("404", "GET /x", "", "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", End::Keep),
        of("429", "GET /x", "", "HTTP/1.1 429 Too Many\r\ncontent-length: 0\r\n\r\n", End::Keep),
        of("500", "GET /x", "", "HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", End::Keep),
        of("ended", "POST /x", "content-length: 0\r\n", "", End::Fin),
        of("reset", "POST /x", "content-length: 0\r\n", "", End::Reset),
        of("cut short", "GET /x", "", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", End::Fin),
        grpc("gRPC ok", "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 0\r\ncontent-length: 0\r\n\r\n"),
        grpc(
            "gRPC not found",
            "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 5\r\ngrpc-message: no\r\ncontent-length: 0\r\n\r\n",
        ),
        grpc("gRPC unavailable", "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 14\r\ncontent-length: 0\r\n\r\n"),
        grpc(
            "gRPC trailers",
            "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n5\r\n\0\0\0\0\0\r\n0\r\ngrpc-status: 13\r\n\r\n",
        ),
        grpc("gRPC 503", "HTTP/1.1 503 Oh\r\ncontent-length: 0\r\n\r\n"),
        of("long", &format!("GET /{}", "p".repeat(400)), "", OK, End::Keep),
    ]
}

/// Compares those whose names have `only` in them.
pub async fn compared(only: Option<&str>, way: Way) -> Vec<Compared> {
    let cases = all().into_iter().filter(|c| only.is_none_or(|o| c.name.contains(o))).collect::<Vec<_>>();
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("spans");
    let _collector = Collector::start(&file);
    tokio::join!(of_envoy(&cases, way), of_mesh(&cases, way));
    let mut spans = Vec::new();
    // Both send about once a second; of one whose request is not sampled there are none.
    for _ in 0..8 {
        sleep(Duration::from_millis(500)).await;
        spans = lines_of(&file);
    }
    let of = |case: &Case, by_envoy: bool| {
        let id = id(case.name.trim_start_matches("span "));
        let own = spans.iter().filter(|s| s["attributes"]["guid:x-request-id"] == id);
        let own = own.filter(|s| (s["resource"]["service.name"] == "envoy") == by_envoy);
        Outcome { log: own.map(told).collect(), ..Outcome::default() }
    };
    let name = |c: &Case| if way == Way::In { format!("{}, into a pod", c.name) } else { c.name.clone() };
    cases.iter().map(|c| Compared { name: name(c), envoy: of(c, true), mesh: of(c, false) }).collect()
}

/// A span, without what is different by nature.
fn told(span: &Value) -> String {
    let mut attributes = span["attributes"].as_object().cloned().unwrap_or_default();
    for name in [
        "node_id",
        "zone",
        "guid:x-request-id",
        "upstream_cluster",
        "upstream_cluster.name",
        "peer.address",
        "upstream_address",
        "downstream_cluster",
    ] {
        attributes.remove(name);
    }
    attributes.retain(|name, _| !name.starts_with("istio."));
    let continued = TRACE.contains(span["trace"].as_str().unwrap_or_default());
    let parent = span["parent"].as_str().unwrap_or_default();
    json!({"kind": span["kind"], "status": span["status"].as_i64().unwrap_or(0), "state": span["state"], "continued": continued, "parent": parent, "attributes": attributes}).to_string()
}

async fn of_envoy(cases: &[Case], way: Way) {
    let (reached, addresses) = upstreams(cases).await;
    let collector: SocketAddr = COLLECTOR.parse().expect("an address");
    let listener = |(one, upstream): (&Case, &SocketAddr)| {
        // It is told as the authority, which may not be anything.
        let name = format!("collector.{}", one.name.replace(' ', "-"));
        let provider = json!({"@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig", "service_name": "envoy",
            "grpc_service": {"envoy_grpc": {"cluster_name": name}, "timeout": "1s"}});
        let all = json!({"value": 100});
        let tracing = json!({"client_sampling": all, "random_sampling": all, "overall_sampling": all, "verbose": false,
            "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": provider}});
        let beside = Listener { http2: true, ..Listener::to(name, collector) };
        Listener {
            tracing: Some(tracing),
            beside: Some(Box::new(beside)),
            inbound: way == Way::In,
            ..Listener::to(one.name.clone(), *upstream)
        }
    };
    let listeners = cases.iter().zip(&addresses).map(listener).collect::<Vec<_>>();
    let envoy = Envoy::start(&listeners, &format()).await.expect("Envoy");
    let at = cases.iter().map(|c| envoy.address(&c.name)).collect::<Vec<_>>();
    run(cases, &reached, at, None).await;
    // Spans that wait go with it.
    sleep(Duration::from_secs(6)).await;
}

async fn of_mesh(cases: &[Case], way: Way) {
    let (reached, addresses) = upstreams(cases).await;
    let mesh =
        json!({"extensionProviders": [{"name": "otel", "opentelemetry": {"service": "collector.default.svc.cluster.local", "port": 80}}]});
    let mut documents = vec![
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}}),
        json!({"apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": {"name": "all", "namespace": "istio-system"},
            "spec": {"tracing": [{"providers": [{"name": "otel"}], "randomSamplingPercentage": 100}]}}),
    ];
    documents.extend(service("collector", &vip(199).ip().to_string(), "grpc", &[COLLECTOR.parse().expect("an address")]));
    for (i, address) in addresses.iter().enumerate() {
        documents.extend(service(&format!("case-{i}"), &vip(i).ip().to_string(), "http", &[*address]));
    }
    if way == Way::In {
        // Who asks about requests has them read.
        let policy = json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/never"]}}]}]});
        documents.extend([server_pod(), security("AuthorizationPolicy", "p", &policy)]);
    }
    let engine = Arc::new(Engine::start(&documents).await.expect("engine"));
    engine.proxy.pods.insert(engine.pod.clone());
    tokio::spawn(mesh_node::proxy::traces::export(engine.proxy.clone()));
    let at = if way == Way::In { addresses } else { (0..cases.len()).map(vip).collect() };
    run(cases, &reached, at, Some((engine.clone(), way))).await;
    engine.proxy.spans.flush(Duration::from_secs(5)).await;
}
