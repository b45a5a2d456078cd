//! What a real Envoy was recorded to answer, row by row: `corpora/envoy_rows.json`. Rows that say nothing about an
//! Istio-configured outbound proxy are listed there with the reason.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use mesh_tests::{
    engine::{Engine, destination_rule, service, virtual_service},
    scripted::{self, Seen},
    wire::{Got, exchange},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::sleep;

#[derive(Deserialize)]
struct Corpus {
    rows: Vec<Row>,
    left_out: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Row {
    case: String,
    http: Value,
    #[serde(default)]
    policy: Value,
    upstream: String,
    #[serde(default)]
    plan: Option<String>,
    request: Request,
    expect: Vec<Expect>,
}

#[derive(Deserialize)]
struct Request {
    method: String,
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    headers: Vec<(String, String)>,
    #[serde(default)]
    raw: Option<String>,
    #[serde(default)]
    generated: Option<String>,
}

#[derive(Deserialize, Debug, Clone)]
struct Expect {
    status: String,
    flags: String,
    details: String,
    #[serde(default)]
    reached: Option<usize>,
    #[serde(default)]
    attempts: Option<usize>,
    body: String,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    end: Option<String>,
    #[serde(default)]
    saw: Option<String>,
}

struct Upstreams {
    up1: SocketAddr,
    up2: SocketAddr,
    h2: SocketAddr,
    closed: SocketAddr,
    blackhole: SocketAddr,
}

fn vip(index: usize) -> SocketAddr {
    SocketAddr::from(([10, 99, u8::try_from(index / 200).expect("few rows"), u8::try_from(index % 200 + 1).expect("small")], 80))
}

fn documents(index: usize, row: &Row, upstreams: &Upstreams) -> Vec<Value> {
    let name = format!("row-{index}");
    let (port, endpoints) = match row.upstream.as_str() {
        "closed" => ("http", vec![upstreams.closed]),
        "half" => ("http", vec![upstreams.closed, upstreams.up1]),
        "blackhole" => ("http", vec![upstreams.blackhole]),
        "up12" => ("http", vec![upstreams.up1, upstreams.up2]),
        "h2" => ("http2", vec![upstreams.h2]),
        "h1as2" => ("http2", vec![upstreams.up1]),
        _ => ("http", vec![upstreams.up1]),
    };
    let mut documents = service(&name, &vip(index).ip().to_string(), port, &endpoints);
    documents.push(virtual_service(&name, &http_rules(&name, row)));
    if !row.policy.is_null() {
        documents.push(destination_rule(&name, &row.policy));
    }
    documents
}

fn http_rules(name: &str, row: &Row) -> Value {
    if row.upstream == "routes" {
        let direct = |body: &str, status: u16| json!({"status": status, "body": {"string": body}});
        return json!([
            {"match": [{"uri": {"prefix": "/direct"}}], "directResponse": direct("teapot body", 418)},
            {"match": [{"uri": {"prefix": "/hm/"}, "headers": {"x-v": {"exact": "2"}}}], "directResponse": direct("hm-match", 200)},
            {"match": [{"uri": {"prefix": "/hm/"}}], "directResponse": direct("hm-default", 200)},
            {"match": [{"uri": {"exact": "/exact"}}], "directResponse": direct("exact", 200)},
        ]);
    }
    let mut rule = row.http.clone();
    if let Some(matches) = rule.as_object_mut().and_then(|r| r.remove("_match")) {
        rule["match"] = matches;
    }
    if rule.get("redirect").is_none() {
        rule["route"] = json!([{"destination": {"host": name}}]);
    }
    json!([rule])
}

fn request_bytes(row: &Row, id: &str) -> Vec<u8> {
    let Request { method, path, headers, raw, generated } = &row.request;
    if let Some(raw) = raw {
        // Raw requests are told apart as well, where they have room for it.
        return raw.replace("@ID@", id).replacen("host: a\r\n", &format!("host: a\r\nx-id: {id}\r\n"), 1).into_bytes();
    }
    match generated.as_deref() {
        Some("p_bighdr") => return format!("GET /direct/x HTTP/1.1\r\nhost: a\r\nx-big: {}\r\n\r\n", "a".repeat(70_000)).into_bytes(),
        Some(_) => {
            let many = (0..150).map(|i| format!("x-h{i}: 1\r\n")).collect::<String>();
            return format!("GET /direct/x HTTP/1.1\r\nhost: a\r\n{many}\r\n").into_bytes();
        }
        None => {}
    }
    let default = format!("/{}/x", row.case);
    let exact = match row.case.as_str() {
        "direct" | "direct_head" => "/direct/x".to_owned(),
        _ => path.clone().unwrap_or(default),
    };
    let mut text = format!("{method} {exact} HTTP/1.1\r\nhost: svc.example\r\nx-id: {id}\r\n");
    if let Some(plan) = &row.plan {
        text += &format!("x-plan: {plan}\r\n");
    }
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    let body = match (row.case.as_str(), method.as_str()) {
        ("r_early", _) => 200_000,
        (_, "POST") => 5000,
        _ => 0,
    };
    if body > 0 {
        text += &format!("content-length: {body}\r\n");
    }
    text += "\r\n";
    let mut bytes = text.into_bytes();
    bytes.extend(std::iter::repeat_n(b'x', body));
    bytes
}

/// Everything that differs from what was recorded.
fn differences(row: &Row, expect: &Expect, got: &Got, line: Option<&mesh_tests::engine::Line>) -> Vec<String> {
    let mut all = Vec::new();
    let mut check = |what: &str, wanted: &str, found: &str| {
        if wanted != found {
            all.push(format!("{what}: {found:?}, recorded {wanted:?}"));
        }
    };
    check("status", &expect.status, &got.status);
    if expect.body != "(echo)" && !expect.body.starts_with("up9001 200 #1\n ") {
        let body = expect.body.replace("up9001", "up1").replace("up9002", "up2");
        // Which of two goes first is up to the dice.
        let found = if row.case == "r_noprev" { got.body.replace("up2", "up1") } else { got.body.clone() };
        check("body", &body, &found);
    }
    for (name, value) in &expect.headers {
        let found = got.header(name).unwrap_or("(none)");
        match value.as_str() {
            "*" => check(name, "true", &found.parse::<u64>().is_ok().to_string()),
            // The table is cut there.
            value if value.ends_with("termin") => check(name, value, &found[..value.len().min(found.len())]),
            value => check(name, value, found),
        }
    }
    if !expect.headers.contains_key("x-envoy-overloaded") {
        check("x-envoy-overloaded", "(none)", got.header("x-envoy-overloaded").unwrap_or("(none)"));
    }
    if let Some(end) = &expect.end {
        let (how, incomplete) = end.split_once('(').map_or((end.as_str(), false), |(how, _)| (how, true));
        check("end", how, got.end);
        check("complete", &(!incomplete && got.status != "101").to_string(), &got.complete.to_string());
    }
    match line {
        None => check("log", "a line", "none"),
        Some(line) => {
            let field = |name: &str| line.get(name).cloned().unwrap_or_default();
            check("flags", &expect.flags, &field("response_flags"));
            check("details", &expect.details, &field("response_code_details"));
            // Whether r_global's last attempt still begins is a matter of its back-off.
            if let Some(attempts) = expect.attempts.filter(|_| !row.case.starts_with("r_global")) {
                check("attempts", &attempts.to_string(), &field("attempts"));
            }
        }
    }
    all
}

/// What the upstream saw, but for what differs from one run to the next.
fn saw(recorded: &str, attempt: &scripted::Attempt) -> Vec<String> {
    let (line, fields) =
        recorded.split_once(" host=").map_or((String::new(), recorded.to_owned()), |(l, f)| (l.to_owned(), format!("host={f}")));
    let ignored = ["x-request-id", "x-envoy-expected-rq-timeout-ms", "x-id", "x-plan", "content-length", "transfer-encoding"];
    let mut wanted = fields.split("; ").filter_map(|f| f.split_once('=')).filter(|(n, _)| !ignored.contains(n)).collect::<Vec<_>>();
    let mut found = attempt.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).filter(|(n, _)| !ignored.contains(n)).collect::<Vec<_>>();
    wanted.sort_unstable();
    found.sort_unstable();
    let mut all = Vec::new();
    if wanted != found {
        all.push(format!("upstream saw {found:?}, recorded {wanted:?}"));
    }
    if !line.is_empty() && line != attempt.line {
        all.push(format!("upstream saw {:?}, recorded {line:?}", attempt.line));
    }
    all
}

async fn run(index: usize, row: &Row, engine: &Engine, seen: &Seen) -> Vec<String> {
    let n = row.expect.len();
    let head = row.request.method == "HEAD";
    let exchanges = (0..n).map(|i| {
        let bytes = request_bytes(row, &format!("{index}-{i}"));
        async move {
            sleep(Duration::from_millis(20 * i as u64)).await;
            exchange(&mut engine.connect(vip(index)).await.expect("connected"), bytes, head).await
        }
    });
    let mut got = Vec::new();
    let handles = exchanges.map(Box::pin).collect::<Vec<_>>();
    for outcome in join_all(handles).await {
        got.push(outcome);
    }
    let mut log = engine.logged(vip(index), n).await;
    if n > 1 {
        return concurrent(row, got, &mut log);
    }
    let expect = &row.expect[0];
    let mut all = differences(row, expect, &got[0], log.first());
    let attempts = seen.of(&format!("{index}-0"));
    // The last attempt of r_global begins up to 100 ms of back-off after 400 ms: at 500 ms it may be cut before it arrives.
    let short = usize::from(row.case == "r_global");
    if let Some(reached) = expect.reached.filter(|_| row.case != "r_global_503" && row.request.raw.is_none())
        && !(reached - short..=reached).contains(&attempts.len())
    {
        all.push(format!("reached the upstream {} times, recorded {reached}", attempts.len()));
    }
    if let (Some(recorded), Some(attempt)) = (&expect.saw, attempts.last()) {
        all.extend(saw(recorded, attempt));
    }
    match row.case.as_str() {
        "r_early" if attempts.iter().map(|a| a.body).collect::<Vec<_>>() != [0, 200_000] => all.push(format!("bodies {attempts:?}")),
        "f_post_delay" if attempts.first().is_none_or(|a| a.body != 5000) => all.push("body".into()),
        "r_noprev" if attempts.len() == 2 && attempts[0].port == attempts[1].port => all.push("the same host twice".into()),
        _ => {}
    }
    all
}

/// Requests at the same time: what each of them got, in any order.
fn concurrent(row: &Row, got: Vec<Got>, log: &mut Vec<mesh_tests::engine::Line>) -> Vec<String> {
    let mut left = row.expect.clone();
    let mut all = Vec::new();
    for got in got {
        let found = left.iter().position(|e| e.status == got.status && log.iter().any(|l| differences(row, e, &got, Some(l)).is_empty()));
        match found {
            Some(i) => {
                let expect = left.remove(i);
                if let Some(i) = log.iter().position(|l| differences(row, &expect, &got, Some(l)).is_empty()) {
                    log.remove(i);
                }
            }
            None => all.push(format!("nothing recorded is like {got:?}; log {log:?}")),
        }
    }
    all
}

async fn join_all<F: Future<Output = Got> + Unpin>(futures: Vec<F>) -> Vec<Got> {
    let mut futures = futures.into_iter().map(Some).map(|f| (f, None)).collect::<Vec<(Option<F>, Option<Got>)>>();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for (future, done) in &mut futures {
            if let Some(f) = future {
                match std::pin::Pin::new(f).poll(cx) {
                    std::task::Poll::Ready(got) => {
                        *done = Some(got);
                        *future = None;
                    }
                    std::task::Poll::Pending => pending = true,
                }
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    futures.into_iter().filter_map(|(_, got)| got).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_recorded_row_is_answered_as_recorded() {
    let text = include_str!("../corpora/envoy_rows.json");
    let corpus: Corpus = serde_json::from_str(text).expect("rows");
    assert!(corpus.left_out.values().all(|why| !why.is_empty()));
    let seen = Seen::default();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port nobody listens on");
    let (blackhole, _held) = scripted::blackhole();
    let upstreams = Upstreams {
        up1: scripted::http1("up1", &seen).expect("upstream"),
        up2: scripted::http1("up2", &seen).expect("upstream"),
        h2: scripted::http2("h2up", &seen).await.expect("upstream"),
        closed,
        blackhole,
    };
    let documents = corpus.rows.iter().enumerate().flat_map(|(i, row)| documents(i, row, &upstreams)).collect::<Vec<_>>();
    let engine = Engine::start(&documents).await.expect("engine");
    let only = std::env::var("ROW").ok();
    let mut failures = Vec::new();
    for (index, row) in corpus.rows.iter().enumerate().filter(|(_, r)| only.as_ref().is_none_or(|o| *o == r.case)) {
        let different = run(index, row, &engine, &seen).await;
        if !different.is_empty() {
            failures.push(format!("{}: {}", row.case, different.join("; ")));
        }
    }
    assert!(failures.is_empty(), "{} of {} rows differ:\n{}", failures.len(), corpus.rows.len(), failures.join("\n"));
    engine.until_idle().await;
}
