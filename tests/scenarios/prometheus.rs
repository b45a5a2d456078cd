//! A real Prometheus reads both nodes: names, labels and numbers are what dashboards and alerts are written for.

use std::{collections::BTreeSet, path::Path, time::Duration};

use mesh_tests::{
    Bed, NodeOptions, PodSpec,
    bed::{Process, program, wait_for},
};
use serde_json::{Value, json};

const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy");

/// Runs a program in a network namespace to its end; its output.
fn run_in(netns: &Path, program: &str, arguments: &[&str]) -> (bool, String) {
    let name = netns.file_name().and_then(|n| n.to_str()).expect("a name");
    let output = std::process::Command::new("ip").args(["netns", "exec", name, program]).args(arguments).output().expect("run");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

fn web(version: &str, node: usize) -> PodSpec {
    let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), version.into()];
    PodSpec { command, port: Some(8080), ..PodSpec::new(&format!("web-{version}"), node) }.label("app", "web").label("version", version)
}

#[test]
fn prometheus_scrapes_both_nodes_and_queries_give_the_right_numbers() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: grpc, port: 81, targetPort: 8081}]}\n";
    bed.kubectl_apply("web", service).expect("service");
    bed.service("default", "server", 9000, 8080).expect("service");
    let [client] = bed.meshed([PodSpec::new("client", 0)]).expect("client");
    let [_v1, _v2, server] = bed.meshed([web("v1", 0), web("v2", 1), PodSpec::server("server", 1)]).expect("servers");
    bed.settle().expect("settled");
    let targets = [0, 1].map(|node| format!("{}:15020", bed.node_address(node)));
    let data = bed.directory.join("prometheus");
    std::fs::create_dir_all(&data).expect("a directory");
    let config = json!({
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [format!("{DEPLOY}/prometheus/rules.yaml")],
        "scrape_configs": [{"job_name": "mesh-node", "static_configs": [{"targets": targets}]}],
    });
    // JSON is YAML.
    std::fs::write(data.join("config.yaml"), config.to_string()).expect("written");
    let fabric = bed.node_netns(0);
    let netns = fabric.file_name().and_then(|n| n.to_str()).expect("a name").to_owned();
    let mut command = std::process::Command::new("ip");
    command.args(["netns", "exec", &netns, "prometheus", "--web.listen-address=127.0.0.1:9090", "--log.level=warn"]);
    command.arg(format!("--config.file={}", data.join("config.yaml").display())).arg(format!("--storage.tsdb.path={}", data.display()));
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let _prometheus = Process::start(command).expect("prometheus");
    let query = |expr: &str| -> Vec<Value> {
        let (_, text) =
            run_in(&fabric, "curl", &["-sS", "-G", "http://127.0.0.1:9090/api/v1/query", "--data-urlencode", &format!("query={expr}")]);
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        answer["data"]["result"].as_array().cloned().unwrap_or_default()
    };
    let number = |expr: &str| query(expr).first().and_then(|r| r["value"][1].as_str()?.parse::<f64>().ok()).unwrap_or(-1.0);
    wait_for("both nodes scraped", Duration::from_secs(30), || Ok((number("sum(up)") - 2.0).abs() < 0.1)).expect("scraped");
    let get = |path: &str, n: &str| bed.run(&client, &program("web"), &["get", &format!("web:80{path}"), n]).expect("web");
    get("/", "60");
    get("/status/503", "1");
    bed.run(&client, &program("web"), &["grpc", "web:81"]).expect("grpc");
    bed.probe(&client, &["exchange", &server.address(8080), "10000"]).expect("bytes");
    // Nobody listens there.
    bed.probe(&client, &["ask", &server.address(9), "ping"]).expect("a report");
    let is = |expr: &str, expected: f64| {
        let waited = wait_for("the number", Duration::from_secs(15), || Ok((number(expr) - expected).abs() < 0.01));
        waited.unwrap_or_else(|_| panic!("{expr} is {} and not {expected}: {:?}", number(expr), query("istio_requests_total")));
    };
    // How many, how many of them failed (503 is tried three times by default), and how long they took.
    is(
        "sum(istio_requests_total{reporter=\"source\",request_protocol=\"http\",destination_service=\"web.default.svc.cluster.local\"})",
        61.0,
    );
    is("sum(istio_requests_total{reporter=\"destination\",request_protocol=\"http\",response_code=\"200\"})", 60.0);
    is(
        "sum(istio_requests_total{reporter=\"source\",request_protocol=\"http\",response_code=~\"5..\"}) / sum(istio_requests_total{reporter=\"source\",request_protocol=\"http\"})",
        1.0 / 61.0,
    );
    is("sum(istio_request_duration_milliseconds_count{reporter=\"source\",response_code=\"200\",request_protocol=\"http\"})", 60.0);
    let slow = "histogram_quantile(0.99, sum by (le) (istio_request_duration_milliseconds_bucket{reporter=\"source\"}))";
    assert!(number(slow) > 0.0, "{:?} of {:?}", query(slow), query("sum by (le) (istio_request_duration_milliseconds_bucket)"));
    is(
        "sum(istio_tcp_received_bytes_total{reporter=\"source\",destination_app=\"server\"}) - sum(istio_tcp_received_bytes_total{reporter=\"destination\",destination_app=\"server\"})",
        0.0,
    );
    assert!(number("sum(istio_tcp_received_bytes_total{reporter=\"source\",destination_app=\"server\"})") >= 10_000.0);
    is("sum(istio_tcp_connections_failed_total{reporter=\"source\"})", 1.0);
    dashboards_know(&query);
}

/// Every metric the dashboards and rules ask for is one that is exported.
fn dashboards_know(query: &dyn Fn(&str) -> Vec<Value>) {
    let names = query("count by (__name__) ({__name__=~\"istio_.*|mesh_.*\"})");
    let names = names.iter().filter_map(|r| r["metric"]["__name__"].as_str().map(str::to_owned)).collect::<BTreeSet<_>>();
    assert!(names.len() > 30, "{names:?}");
    let mut asked = BTreeSet::new();
    let mut texts = vec![std::fs::read_to_string(format!("{DEPLOY}/prometheus/rules.yaml")).expect("rules")];
    for entry in std::fs::read_dir(format!("{DEPLOY}/grafana")).expect("dashboards") {
        let text = std::fs::read_to_string(entry.expect("an entry").path()).expect("a dashboard");
        let dashboard: Value = serde_json::from_str(&text).expect("JSON");
        assert!(dashboard["uid"].is_string() && dashboard["panels"].as_array().is_some_and(|p| p.len() >= 6), "{dashboard}");
        texts.push(text);
    }
    for text in &texts {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':').filter(|w| !w.contains(':'));
        asked.extend(words.filter(|w| w.starts_with("istio_") || w.starts_with("mesh_")).map(str::to_owned));
    }
    assert!(asked.len() > 25, "{asked:?}");
    // These have no series before something goes wrong.
    let seldom = [
        "mesh_overflows_total",
        "mesh_tls_handshake_failures_total",
        "mesh_policy_decisions_total",
        "mesh_authorizer_calls_total",
        "mesh_jwks_fetches_total",
        "mesh_connection_failures_total",
        "mesh_indirect_connections_total",
        "mesh_acceleration_total",
    ];
    let described = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../mesh-node/src/telemetry.rs")).expect("the source");
    for name in asked {
        let registered = || described.contains(&format!("\"{}\"", name.trim_end_matches("_total")));
        assert!(names.contains(&name) || seldom.contains(&&*name) && registered(), "{name} is asked for and not exported: {names:?}");
    }
}

#[test]
fn rules_and_metrics_pass_promtool() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1)]).expect("pods");
    bed.probe(&client, &["names", &server.address(8080)]).expect("a connection");
    let rules = format!("{DEPLOY}/prometheus/rules.yaml");
    let output = std::process::Command::new("promtool").args(["check", "rules", &rules]).output().expect("promtool");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut promtool = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("promtool");
    let metrics = bed.nodes()[0].admin("/metrics").expect("metrics");
    std::io::Write::write_all(&mut promtool.stdin.take().expect("stdin"), metrics.as_bytes()).expect("written");
    let output = promtool.wait_with_output().expect("promtool");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    // Istio's names have milliseconds, which promtool would rather not see.
    let wrong = text.lines().filter(|l| !l.starts_with("istio_")).collect::<Vec<_>>();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
