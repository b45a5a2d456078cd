//! The same bytes to a real Envoy and to this proxy, the same bytes from the upstream behind them, and what comes out of both ends
//! and the access log compared. Where they differ on purpose, `corpora/envoy_differences.json` says why.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use mesh_tests::{
    engine::{Engine, logging, security, server_pod, service, virtual_service},
    envoy::{Envoy, Listener, lines_of},
    raw::{Answer, End, Reached, converse, upstream},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::Semaphore, time::sleep};

/// One exchange.
#[derive(Clone)]
struct Case {
    name: String,
    /// What the client sends; an empty piece is its end.
    request: Vec<Vec<u8>>,
    /// Whether its requests are HEAD.
    heads: Vec<bool>,
    answer: Answer,
    /// Rules of a `VirtualService` for `@host`, and the same for Envoy with `@cluster`.
    routes: Option<(Value, Value)>,
    /// Envoy's filters before the usual ones.
    filters: Vec<Value>,
}

impl Case {
    /// With more behind the head.
    fn with_body(mut self, body: &str) -> Self {
        self.request.last_mut().expect("a request").extend_from_slice(body.as_bytes());
        self
    }
}

/// What one proxy made of it.
#[derive(Debug, PartialEq, Eq, Default)]
struct Outcome {
    client: String,
    upstream: Vec<String>,
    log: Vec<String>,
}

/// What both make of one case.
struct Compared {
    name: String,
    envoy: Outcome,
    mesh: Outcome,
}

/// Cases in which this proxy differs on purpose.
#[derive(Deserialize)]
struct Wanted {
    why: String,
    cases: Vec<String>,
}

#[path = "envoy_live/answered.rs"]
mod answered;
#[path = "envoy_live/answers.rs"]
mod answers;
#[path = "envoy_live/authorizers.rs"]
mod authorizers;
#[path = "envoy_live/bodies.rs"]
mod bodies;
#[path = "envoy_live/cases.rs"]
mod cases;
#[path = "envoy_live/checks.rs"]
mod checks;
#[path = "envoy_live/compared.rs"]
mod compared;
#[path = "envoy_live/framed.rs"]
mod framed;
#[path = "envoy_live/http2.rs"]
mod http2;
#[path = "envoy_live/policies.rs"]
mod policies;
#[path = "envoy_live/random.rs"]
mod random;
#[path = "envoy_live/random_answers.rs"]
mod random_answers;
#[path = "envoy_live/random_bytes.rs"]
mod random_bytes;
#[path = "envoy_live/random_frames.rs"]
mod random_frames;
#[path = "envoy_live/random_policies.rs"]
mod random_policies;
#[path = "envoy_live/random_retries.rs"]
mod random_retries;
#[path = "envoy_live/requests.rs"]
mod requests;
#[path = "envoy_live/resilience.rs"]
mod resilience;
#[path = "envoy_live/routes.rs"]
mod routes;
#[path = "envoy_live/spans.rs"]
mod spans;
#[path = "envoy_live/tokens.rs"]
mod tokens;
#[path = "envoy_live/web.rs"]
mod web;

use compared::{Listed, TURN, compare, of_attempts, of_either_end, of_requests, of_the_answer, report};

fn vip(index: usize) -> SocketAddr {
    SocketAddr::from(([10, 98, u8::try_from(index / 200).expect("few cases"), u8::try_from(index % 200 + 1).expect("small")], 80))
}

/// Fields of the access log that are compared, beside the address that tells the case.
fn format() -> Value {
    let mut format = json!({
        "at": "%DOWNSTREAM_LOCAL_ADDRESS%", "code": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%", "details": "%RESPONSE_CODE_DETAILS%",
        "received": "%BYTES_RECEIVED%", "sent": "%BYTES_SENT%", "protocol": "%PROTOCOL%", "method": "%REQ(:METHOD)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "authority": "%REQ(:AUTHORITY)%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "flags_long": "%RESPONSE_FLAGS_LONG%", "upstream": "%UPSTREAM_PROTOCOL%",
        "target": "%PATH%", "sent_path": "%REQ(:PATH)%", "proto": "%REQ(X-FORWARDED-PROTO)%", "set": "%REQ(X-SET)%", "removed": "%REQ(X-RM)%",
        "original": "%REQ(X-ENVOY-ORIGINAL-HOST)%", "answered": "%RESP(X-SET)%", "taken": "%RESP(X-RM)%", "location": "%RESP(LOCATION)%", "bare": "%PATH(NQ)%", "type": "%ACCESS_LOG_TYPE%", "tls": "%DOWNSTREAM_TLS_VERSION%", "agent": "%REQUEST_HEADER(user-agent)%",
        "grpc": "%GRPC_STATUS%", "snake": "%GRPC_STATUS(SNAKE_STRING)%", "number": "%GRPC_STATUS(NUMBER)%", "etag": "%RESP(ETAG)%",
        "since": "%START_TIME(%Y)%", "route": "%ROUTE_NAME%", "sni": "%REQUESTED_SERVER_NAME%",
        "terminated": "%CONNECTION_TERMINATION_DETAILS%", "transport": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    });
    for (name, operator) in [
        ("host", "%UPSTREAM_HOST%"),
        ("came", "%REQUEST_DURATION%"),
        ("went", "%REQUEST_TX_DURATION%"),
        ("first", "%RESPONSE_DURATION%"),
        ("rest", "%RESPONSE_TX_DURATION%"),
        ("behind", "%TRAILER(X-END?GRPC-MESSAGE)%"),
        ("ended", "%RESPONSE_TRAILER(GRPC-STATUS)%"),
        ("stream", "%RESP(:STATUS)%"),
    ] {
        format[name] = json!(operator);
    }
    format
}

/// How long it took, and which host was asked, is another's business: here it is whether that is told.
fn with_times_told(line: &mut Value) {
    for time in ["came", "went", "first", "rest"] {
        line[time] = line[time].is_number().into();
    }
    line["host"] = line["host"].is_string().into();
}

/// Lines about one address, without it.
fn about(lines: &[Value], address: SocketAddr) -> Vec<String> {
    let mut found = Vec::new();
    for line in lines.iter().filter(|l| l["at"] == address.to_string()) {
        let mut line = line.clone();
        line.as_object_mut().expect("an object").remove("at");
        // A rule without a name has none in Envoy; here it is told whose it is.
        if line["route"].as_str().is_some_and(|route| route.starts_with("VirtualService ")) {
            line["route"] = Value::Null;
        }
        with_times_told(&mut line);
        found.push(line.to_string());
    }
    found
}

/// With a name in place of what stands for it.
fn named(value: &Value, of: &str, name: &str) -> Value {
    serde_json::from_str(&value.to_string().replace(of, name)).expect("JSON")
}

/// From the client pod to a service, or from outside into the server pod.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

struct Side {
    outcomes: Vec<Outcome>,
}

async fn run(cases: &[Case], reached: &[Reached], addresses: Vec<SocketAddr>, engine: Option<(Arc<Engine>, Way)>) -> Side {
    // Of those about policies nothing depends on when what comes; of the few that are run another time it may.
    let at_once = if cases.iter().any(|c| !c.filters.is_empty()) { 24 } else { cases.len().div_ceil(8).clamp(1, 32) };
    let room = Arc::new(Semaphore::new(at_once));
    let mut tasks = Vec::new();
    for (case, address) in cases.iter().cloned().zip(addresses) {
        let (room, engine) = (room.clone(), engine.clone());
        tasks.push(tokio::spawn(async move {
            let _permit = room.acquire().await;
            let stream = match engine {
                Some((engine, Way::Out)) => engine.connect(address).await.expect("connected"),
                Some((engine, Way::In)) => engine.connect_inbound(address.port()).await.expect("connected"),
                None => TcpStream::connect(address).await.expect("connected"),
            };
            converse(stream, &case.request, &case.heads).await
        }));
    }
    let mut outcomes = Vec::new();
    for (task, reached) in tasks.into_iter().zip(reached) {
        let client = task.await.expect("a conversation");
        outcomes.push(Outcome { client, upstream: reached.lock().expect("lock").clone(), log: Vec::new() });
    }
    Side { outcomes }
}

async fn upstreams(cases: &[Case]) -> (Vec<Reached>, Vec<SocketAddr>) {
    let (mut reached, mut addresses) = (Vec::new(), Vec::new());
    for case in cases {
        let seen = Reached::default();
        addresses.push(upstream(case.answer.clone(), seen.clone()).await.expect("an upstream"));
        reached.push(seen);
    }
    (reached, addresses)
}

async fn of_envoy(cases: &[Case]) -> Side {
    let (reached, addresses) = upstreams(cases).await;
    let listener = |(case, upstream): (&Case, &SocketAddr)| {
        let routes = case.routes.as_ref().map(|(_, routes)| named(routes, "@cluster", &case.name));
        Listener { routes, filters: case.filters.clone(), ..Listener::to(case.name.clone(), *upstream) }
    };
    let listeners = cases.iter().zip(&addresses).map(listener).collect::<Vec<_>>();
    let envoy = Envoy::start(&listeners, &format()).await.expect("Envoy");
    let at = cases.iter().map(|c| envoy.address(&c.name)).collect::<Vec<_>>();
    let mut side = run(cases, &reached, at.clone(), None).await;
    sleep(Duration::from_millis(500)).await;
    let lines = envoy.logged();
    for (outcome, at) in side.outcomes.iter_mut().zip(at) {
        outcome.log = about(&lines, at);
    }
    side
}

async fn of_mesh(cases: &[Case], way: Way, policies: &[Value]) -> Side {
    let (reached, addresses) = upstreams(cases).await;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("access.log");
    let mut documents = logging(&path, &format());
    for (i, address) in addresses.iter().enumerate() {
        let name = format!("case-{i}");
        documents.extend(service(&name, &vip(i).ip().to_string(), "http", &[*address]));
        if let Some((rules, _)) = &cases[i].routes {
            documents.push(virtual_service(&name, &named(rules, "@host", &name)));
        }
    }
    if way == Way::In {
        documents.push(server_pod());
        documents.extend_from_slice(policies);
    }
    let engine = Arc::new(Engine::start(&documents).await.expect("engine"));
    let at = if way == Way::In { addresses } else { (0..cases.len()).map(vip).collect() };
    let mut side = run(cases, &reached, at.clone(), Some((engine, way))).await;
    sleep(Duration::from_millis(500)).await;
    let lines = lines_of(&path);
    for (outcome, at) in side.outcomes.iter_mut().zip(at) {
        outcome.log = about(&lines, at);
    }
    side
}

/// What differs between two outcomes, part by part.
fn differences(envoy: &Outcome, mesh: &Outcome) -> BTreeMap<&'static str, String> {
    let parts = [
        ("client", envoy.client.clone(), mesh.client.clone()),
        ("upstream", envoy.upstream.join("\n    "), mesh.upstream.join("\n    ")),
        ("log", envoy.log.join("\n    "), mesh.log.join("\n    ")),
    ];
    let differ = parts.into_iter().filter(|(_, e, m)| e != m);
    differ.map(|(part, e, m)| (part, format!("  {part} of Envoy\n    {e}\n  {part} of mesh-node\n    {m}"))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_bytes() {
    compare(cases::all(), Way::Out, include_str!("../corpora/envoy_differences.json")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_routes() {
    compare(routes::all(), Way::Out, include_str!("../corpora/envoy_routes_differences.json")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_retries_at_random() {
    compare(random_retries::all(), Way::Out, "[]").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_bytes_at_random() {
    lets_nothing_else_through(random_bytes::all(), random_bytes::is_safe).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_frames_at_random() {
    lets_nothing_else_through(random_frames::all(), random_frames::is_safe).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_answers_at_random() {
    lets_nothing_else_through(random_answers::all(), random_answers::is_safe).await;
}

async fn lets_nothing_else_through(cases: Vec<Case>, is_safe: fn(&Outcome, &Outcome) -> bool) {
    let _turn = TURN.lock().await;
    let only = std::env::var("CASE").ok();
    let cases = cases.into_iter().filter(|c| only.as_ref().is_none_or(|o| c.name.contains(o))).collect::<Vec<_>>();
    // What only a busy machine made different is not so again.
    let mut left = cases.clone();
    for round in 0..3 {
        let (envoy, mesh) = tokio::join!(of_envoy(&left), of_mesh(&left, Way::Out, &[]));
        let alike = envoy.outcomes.iter().zip(&mesh.outcomes).filter(|(e, m)| e.upstream == m.upstream && e.client == m.client).count();
        assert!(
            round > 0 || only.is_some() || alike * 8 > cases.len(),
            "of {} only {alike} are alike: to refuse all is safe, too",
            cases.len()
        );
        let pairs = left.iter().zip(envoy.outcomes.iter().zip(&mesh.outcomes));
        let failures = pairs.filter(|(_, (envoy, mesh))| !is_safe(envoy, mesh));
        let failures = failures.map(|(case, (envoy, mesh))| (case.clone(), differences(envoy, mesh).into_values().collect::<Vec<_>>()));
        let failures = failures.collect::<Vec<_>>();
        left = failures.iter().map(|(case, _)| case.clone()).collect();
        if left.is_empty() {
            return;
        }
        let told = failures.iter().map(|(case, all)| (case.name.clone(), all.join("\n"))).collect::<Vec<_>>();
        eprintln!("{told:#?}");
    }
    panic!("{} of {} requests are let through that Envoy refuses or reads in another way", left.len(), cases.len());
}

/// Of an upstream that speaks HTTP/2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_retries_in_frames_at_random() {
    let _turn = TURN.lock().await;
    let only = std::env::var("CASE").ok();
    let listed = Listed::read("[]");
    let all = answered::compared_at_random(only.as_deref(), &listed).await;
    let compared = all.iter().map(|c| (&*c.name, &c.envoy, &c.mesh)).collect::<Vec<_>>();
    report(&listed.judge(&compared), compared.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_routes_at_random() {
    compare(random::all(), Way::Out, "[]").await;
}

/// The destination's node reads requests as Envoy does as well; what a client's node adds it does not, and a client's connection lasts as
/// long as the application's that belongs to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_makes_the_same_of_bytes() {
    compare(cases::all(), Way::In, include_str!("../corpora/envoy_inbound_differences.json")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_frames() {
    compare(framed::all(), Way::Out, include_str!("../corpora/envoy_frames_differences.json")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_answers_in_frames() {
    let _turn = TURN.lock().await;
    let only = std::env::var("CASE").ok();
    let listed = Listed::read(include_str!("../corpora/envoy_answers_differences.json"));
    let all = answered::compared(only.as_deref(), &listed).await;
    let compared = all.iter().map(|c| (&*c.name, &c.envoy, &c.mesh)).collect::<Vec<_>>();
    listed.check(only.is_none(), |name| compared.iter().any(|(n, ..)| *n == name));
    report(&listed.judge(&compared), compared.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_makes_the_same_of_frames() {
    let _turn = TURN.lock().await;
    let only = std::env::var("CASE").ok();
    let listed = Listed::read(include_str!("../corpora/envoy_inbound_frames_differences.json"));
    let all = answered::compared_into_a_pod(only.as_deref(), &listed).await;
    let compared = all.iter().map(|c| (&*c.name, &c.envoy, &c.mesh)).collect::<Vec<_>>();
    listed.check(only.is_none(), |name| compared.iter().any(|(n, ..)| *n == name));
    report(&listed.judge(&compared), compared.len());
}

/// Reports what differs and is not listed, and what is listed and does not. `whole`: nothing was left out.
fn judge(all: &[Compared], whole: bool, differences: &str) {
    let compared = all.iter().map(|c| (&*c.name, &c.envoy, &c.mesh)).collect::<Vec<_>>();
    let listed = Listed::read(differences);
    listed.check(whole, |name| compared.iter().any(|(n, ..)| *n == name));
    report(&listed.judge(&compared), compared.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_http2() {
    let only = std::env::var("CASE").ok();
    judge(&http2::compared(only.as_deref()).await, only.is_none(), include_str!("../corpora/envoy_http2_differences.json"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_grpc_web() {
    let only = std::env::var("CASE").ok();
    judge(&web::compared(only.as_deref()).await, only.is_none(), include_str!("../corpora/envoy_web_differences.json"));
}

/// Into a pod with policies. Logs are compared in what they say of the answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_policies() {
    compare_policies(policies::all(), include_str!("../corpora/envoy_policies_differences.json"), of_the_answer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_policies_at_random() {
    // Which of several rules is named depends on which are about connections.
    compare_policies(random_policies::all(), "[]", of_either_end).await;
}

async fn compare_policies(groups: Vec<policies::Group>, listed: &str, compared: fn(&mut Outcome)) {
    let _turn = TURN.lock().await;
    let only = std::env::var("CASE").ok();
    let listed = Listed::read(listed);
    let (mut cases, mut groups_of_mesh, room) = (Vec::new(), Vec::new(), Arc::new(Semaphore::new(3)));
    for group in groups {
        let with_filters = |c: Case| Case { filters: group.filters.clone(), ..c };
        let own =
            group.cases.into_iter().filter(|c| only.as_ref().is_none_or(|o| c.name.contains(o))).map(with_filters).collect::<Vec<_>>();
        cases.extend(own.clone());
        let room = room.clone();
        groups_of_mesh.push(tokio::spawn(async move {
            let _permit = room.acquire().await;
            if own.is_empty() { Vec::new() } else { of_mesh(&own, Way::In, &group.policies).await.outcomes }
        }));
    }
    listed.check(only.is_none(), |name| cases.iter().any(|c| c.name == name));
    let (mut envoy, mut mesh) = (of_envoy(&cases).await.outcomes, Vec::new());
    for group in groups_of_mesh {
        mesh.extend(group.await.expect("a group"));
    }
    envoy.iter_mut().chain(&mut mesh).for_each(compared);
    let all = cases.iter().zip(envoy.iter().zip(&mesh)).map(|(case, (envoy, mesh))| (&*case.name, envoy, mesh));
    report(&listed.judge(&all.collect::<Vec<_>>()), cases.len());
}

/// What authorizers are asked, and what they say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_makes_the_same_of_authorizers() {
    let _turn = TURN.lock().await;
    let only = std::env::var("CASE").ok();
    judge(&authorizers::compared(only.as_deref()).await, only.is_none(), include_str!("../corpora/envoy_authorizers_differences.json"));
}

/// What is told of requests to a collector.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_says_the_same_in_spans() {
    let _turn = TURN.lock().await;
    let only = std::env::var("CASE").ok();
    let listed = Listed::read(include_str!("../corpora/envoy_spans_differences.json"));
    let (mut failures, mut names) = (Vec::new(), Vec::new());
    for way in [Way::Out, Way::In] {
        let all = spans::compared(only.as_deref(), way).await;
        let compared = all.iter().map(|c| (&*c.name, &c.envoy, &c.mesh)).collect::<Vec<_>>();
        assert!(all.iter().filter(|c| !c.envoy.log.is_empty()).count() * 2 > all.len(), "hardly any spans");
        failures.extend(listed.judge(&compared));
        names.extend(all.into_iter().map(|c| c.name));
    }
    listed.check(only.is_none(), |name| names.iter().any(|n| n == name));
    report(&failures, names.len());
}
