//! What the nodes tell of traffic: Istio's metrics by both reporters, access logs and what the Telemetry API changes of them.

use std::time::Duration;

use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{program, wait_for},
};
use serde_json::Value;

#[path = "telemetry/connections.rs"]
mod connections;

const SEED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpora/seed");

fn web(version: &str, node: usize) -> PodSpec {
    let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), version.into()];
    PodSpec { command, port: Some(8080), ..PodSpec::new(&format!("web-{version}"), node) }.label("app", "web").label("version", version)
}

struct Scene {
    bed: Bed,
    client: Pod,
}

/// A client and a server on the first node, another server on the second, and a service before both.
fn scene() -> Scene {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: grpc, port: 81, targetPort: 8081}]}\n";
    bed.kubectl_apply("web", service).expect("service");
    let [client] = bed.meshed([PodSpec::new("client", 0).label("app", "client").label("version", "v9")]).expect("client");
    bed.meshed([web("v1", 0), web("v2", 1)]).expect("servers");
    Scene { bed, client }
}

impl Scene {
    fn apply(&self, name: &str, yaml: &str) {
        self.bed.apply(name, yaml).expect("applied");
        self.bed.settle().expect("settled");
    }

    fn web(&self, arguments: &[&str]) -> Value {
        let output = self.bed.run(&self.client, &program("web"), arguments).expect("web");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    fn get(&self, path: &str, count: u32) {
        let report = self.web(&["get", &format!("web:80{path}"), &count.to_string(), "--header", "user-agent: tester/1"]);
        let answers = report["statuses"].as_object().expect("answers");
        assert_eq!(answers.values().filter_map(Value::as_u64).sum::<u64>(), u64::from(count), "{report}");
    }

    /// Sum of a metric over both nodes.
    fn total(&self, metric: &str, labels: &[&str]) -> f64 {
        self.bed.nodes().iter().map(|n| n.metric(metric, labels).expect("metrics")).sum()
    }

    fn wait_total(&self, expected: f64, metric: &str, labels: &[&str]) {
        let waited = wait_for("the metric", Duration::from_secs(5), || Ok((self.total(metric, labels) - expected).abs() < 0.5));
        waited.unwrap_or_else(|_| {
            let all = self.bed.nodes().iter().map(|n| n.admin("/metrics").expect("metrics")).collect::<String>();
            let lines = all.lines().filter(|l| l.starts_with(metric)).collect::<Vec<_>>().join("\n");
            panic!("{metric} {labels:?} is {} and not {expected}:\n{lines}", self.total(metric, labels))
        });
    }
}

#[test]
fn requests_are_counted_by_both_reporters_with_all_labels() {
    let scene = scene();
    scene.get("/", 20);
    for reporter in ["source", "destination"] {
        let reporter = format!("reporter=\"{reporter}\"");
        let labels = [
            &*reporter,
            "source_workload=\"client\"",
            "source_workload_namespace=\"default\"",
            "source_canonical_service=\"client\"",
            "source_canonical_revision=\"v9\"",
            "source_principal=\"spiffe://cluster.local/ns/default/sa/client\"",
            "source_app=\"client\"",
            "source_version=\"v9\"",
            "source_cluster=\"Kubernetes\"",
            "destination_workload=\"web-v",
            "destination_workload_namespace=\"default\"",
            "destination_principal=\"spiffe://cluster.local/ns/default/sa/web-v",
            "destination_app=\"web\"",
            "destination_version=\"v",
            "destination_service=\"web.default.svc.cluster.local\"",
            "destination_service_name=\"web\"",
            "destination_service_namespace=\"default\"",
            "destination_canonical_service=\"web\"",
            "destination_canonical_revision=\"v",
            "destination_cluster=\"Kubernetes\"",
            "request_protocol=\"http\"",
            "response_code=\"200\"",
            "response_flags=\"-\"",
            "connection_security_policy=\"mutual_tls\"",
        ];
        scene.wait_total(20.0, "istio_requests_total", &labels);
        scene.wait_total(20.0, "istio_request_duration_milliseconds_count", &labels);
        scene.wait_total(20.0, "istio_response_bytes_count", &labels);
        for version in ["v1", "v2"] {
            let seen = scene.total("istio_requests_total", &[&reporter, &format!("destination_version=\"{version}\"")]);
            assert!(seen > 0.0, "{version} by {reporter}");
        }
    }
    // The destination's own node reports, and nobody else.
    let [near, far] = scene.bed.nodes() else { panic!("two nodes") };
    let of = |node: &mesh_tests::bed::Node, reporter: &str| {
        node.metric("istio_requests_total", &[&format!("reporter=\"{reporter}\"")]).expect("metric")
    };
    assert!(of(near, "source") > 19.5 && of(far, "source") < 0.5 && of(far, "destination") > 0.5);
    scene.web(&["grpc", "web:81"]);
    for reporter in ["reporter=\"source\"", "reporter=\"destination\""] {
        let grpc = [reporter, "request_protocol=\"grpc\""];
        // The client may have its answer before its end is counted.
        let counted = |metric: &str, labels: &[&str]| {
            wait_for(metric, Duration::from_secs(5), || Ok(scene.total(metric, labels) > 0.5)).expect(reporter);
        };
        counted("istio_requests_total", &[&grpc[..], &["grpc_response_status=\"0\""]].concat());
        let of_web = [reporter, "destination_canonical_service=\"web\""];
        counted("istio_request_messages_total", &of_web);
        counted("istio_response_messages_total", &of_web);
    }
    assert!(near.admin("/metrics").expect("metrics").contains("istio_build{component=\"mesh-node\",tag="));
}

/// The parts of a line of Istio's text: quoted ones are one.
fn parts(line: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => parts.push(String::new()),
            c => parts.last_mut().expect("never empty").push(c),
        }
    }
    parts
}

#[test]
fn the_seed_s_telemetry_turns_on_istio_s_access_log() {
    let scene = scene();
    scene.get("/before", 2);
    scene.apply("seed", &std::fs::read_to_string(format!("{SEED}/17-telemetry-access-log.yaml")).expect("the seed's"));
    scene.get("/after?x=1", 4);
    let lines = |node: usize| {
        let text = scene.bed.nodes()[node].log_text();
        text.lines().filter(|l| l.starts_with('[') && l.contains("/after")).map(parts).collect::<Vec<_>>()
    };
    wait_for("lines of all requests by both ends", Duration::from_secs(5), || Ok(lines(0).len() + lines(1).len() == 8)).expect("lines");
    assert!(scene.bed.nodes().iter().all(|n| !n.log_text().contains("/before")), "nothing was logged before");
    let outbound = lines(0).into_iter().filter(|l| l.iter().any(|p| p.starts_with("outbound|"))).collect::<Vec<_>>();
    assert_eq!(outbound.len(), 4);
    for line in outbound {
        assert_eq!(line.len(), 22, "{line:?}");
        assert!(line[0].ends_with("Z]") && line[0].len() == 26, "{line:?}");
        assert_eq!(line[1], "GET /after?x=1 HTTP/1.1");
        assert_eq!(line[2..8], ["200", "-", "via_upstream", "-", "-", "0"].map(str::to_owned));
        assert!(line[8].parse::<u64>().is_ok_and(|n| n > 0) && line[9].parse::<u64>().is_ok(), "{line:?}");
        assert!(line[10].parse::<u64>().is_ok() && line[11] == "-" && line[12] == "tester/1", "{line:?}");
        assert!(line[13].len() == 36 && line[14] == "web:80" && line[15].ends_with(":8080"), "{line:?}");
        assert_eq!(line[16], "outbound|80||web.default.svc.cluster.local");
        assert!(
            line[18].ends_with(":80") && [scene.client.v4(), scene.client.v6()].iter().any(|a| line[19].contains(&a.to_string())),
            "{line:?}"
        );
        // Through a tunnel there is no address of a connection to the application.
        assert!(line[17] == "-" || line[17].parse::<std::net::SocketAddr>().is_ok(), "{line:?}");
        assert_eq!(line[20..], ["-", "default"].map(str::to_owned));
    }
    let inbound = [lines(0), lines(1)].concat().into_iter().filter(|l| l.iter().any(|p| p == "inbound|8080||")).collect::<Vec<_>>();
    assert_eq!(inbound.len(), 4);
    for line in inbound {
        assert!(line[10].parse::<u64>().is_ok() && line[17].parse::<std::net::SocketAddr>().is_ok(), "{line:?}");
    }
    let written = scene.total("mesh_access_log_lines_total", &["result=\"written\""]);
    assert!(written >= 8.0 && scene.total("mesh_access_log_lines_total", &["result=\"dropped\""]) < 0.5, "{written}");
}

/// Where several services lead to a port, the destination counts for the one that was dialled, too.
#[test]
fn a_destination_knows_which_service_was_dialled() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    for name in ["also", "web", "zebra"] {
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: web}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
        );
        bed.kubectl_apply(name, &service).expect("service");
    }
    let [client] = bed.meshed([PodSpec::new("client", 0).label("app", "client").label("version", "v9")]).expect("client");
    bed.meshed([web("v1", 0), web("v2", 1)]).expect("servers");
    bed.settle().expect("settled");
    let scene = Scene { bed, client };
    for (name, count) in [("web", 12), ("zebra", 10), ("also", 8)] {
        let report = scene.web(&["get", &format!("{name}:80/"), &count.to_string()]);
        assert_eq!(report["statuses"]["200"], count, "{report}");
        for reporter in ["source", "destination"] {
            let labels = [format!("reporter=\"{reporter}\""), format!("destination_service_name=\"{name}\"")];
            let labels = labels.iter().map(String::as_str).collect::<Vec<_>>();
            scene.wait_total(f64::from(count), "istio_requests_total", &labels);
        }
        let opened = || {
            scene
                .total("istio_tcp_connections_opened_total", &["reporter=\"destination\"", &format!("destination_service_name=\"{name}\"")])
        };
        wait_for("connections", Duration::from_secs(5), || Ok(opened() > 0.5)).unwrap_or_else(|_| panic!("{name}: {}", opened()));
    }
}

#[test]
fn telemetry_filters_logs_and_changes_tags() {
    let scene = scene();
    let log = tempfile::Builder::new().prefix("access").suffix(".log").tempfile().expect("a file");
    let path = log.path().display();
    let peers = tempfile::Builder::new().prefix("peers").suffix(".log").tempfile().expect("a file");
    scene.apply(
        "mesh",
        &format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    extensionProviders:\n    - name: file\n      envoyFileAccessLog: {{path: {path}, logFormat: {{labels: {{}}}}}}\n    - name: peers\n      envoyFileAccessLog: {{path: {}, logFormat: {{labels: {{peer: '%DOWNSTREAM_PEER_URI_SAN%', local: '%DOWNSTREAM_LOCAL_URI_SAN%', host: '%HOSTNAME%', pod: '%ENVIRONMENT(POD_NAMESPACE)%/%ENVIRONMENT(POD_NAME)% %ENVIRONMENT(INSTANCE_IP)%', node: '%ENVIRONMENT(ISTIO_META_NODE_NAME)%'}}}}}}\n",
            peers.path().display()
        ),
    );
    scene.apply(
        "telemetry",
        r#"apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: client, namespace: default}
spec:
  selector: {matchLabels: {app: client}}
  accessLogging:
  - providers: [{name: file}]
    match: {mode: CLIENT}
    filter: {expression: "response.code >= 400 && request.url_path.startsWith('/status')"}
  metrics:
  - overrides:
    - match: {metric: REQUEST_COUNT, mode: CLIENT}
      tagOverrides:
        response_flags: {operation: REMOVE}
        path: {value: "request.url_path"}
        team: {value: "'shop'"}
    - match: {metric: RESPONSE_SIZE}
      disabled: true
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: server, namespace: default}
spec:
  selector: {matchLabels: {app: web}}
  accessLogging:
  - providers: [{name: peers}]
    match: {mode: SERVER}
  metrics:
  - overrides:
    - match: {metric: REQUEST_DURATION, mode: SERVER}
      tagOverrides:
        peer: {value: "connection.uri_san_peer_certificate"}
"#,
    );
    assert!(scene.bed.nodes()[0].admin_json("/status").expect("status")["remarks"].as_array().is_some_and(Vec::is_empty));
    scene.get("/a", 3);
    scene.get("/status/418", 2);
    let changed = ["reporter=\"source\"", "team=\"shop\""];
    scene.wait_total(3.0, "istio_requests_total", &[&changed[..], &["path=\"/a\""]].concat());
    scene.wait_total(2.0, "istio_requests_total", &[&changed[..], &["path=\"/status/418\"", "response_code=\"418\""]].concat());
    let metrics = scene.bed.nodes()[0].admin("/metrics").expect("metrics");
    let source = |name: &str| metrics.lines().filter(|l| l.starts_with(name) && l.contains("reporter=\"source\"")).collect::<Vec<_>>();
    assert!(source("istio_requests_total").iter().all(|l| !l.contains("response_flags")), "{metrics}");
    assert!(source("istio_response_bytes").is_empty() && !source("istio_request_bytes").is_empty(), "{metrics}");
    // The server's own scope has not changed.
    scene.wait_total(5.0, "istio_requests_total", &["reporter=\"destination\"", "response_flags=\"-\""]);
    let read = || std::fs::read_to_string(log.path()).expect("the log");
    wait_for("two lines", Duration::from_secs(5), || Ok(read().lines().count() == 2)).expect("lines");
    for line in read().lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!((&line["response_code"], &line["path"]), (&Value::from(418), &Value::from("/status/418")), "{line}");
        assert_eq!((&line["upstream_cluster"], &line["method"]), (&"outbound|80||web.default.svc.cluster.local".into(), &"GET".into()));
        assert!(line["x_forwarded_for"].is_null() && line["duration"].is_u64() && line["start_time"].is_string(), "{line}");
    }
    let of = |who: &str| format!("spiffe://cluster.local/ns/default/sa/{who}");
    let read = || std::fs::read_to_string(peers.path()).expect("the log");
    wait_for("five lines", Duration::from_secs(5), || Ok(read().lines().count() == 5)).expect("lines");
    for line in read().lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(line["peer"], of("client"), "{line}");
        assert!(line["local"].as_str().is_some_and(|l| l.starts_with(&of("")) && l != of("client")), "{line}");
        let host = line["host"].as_str().unwrap_or_default();
        assert!(host.starts_with("web-"), "{line}");
        assert!(line["pod"].as_str().is_some_and(|pod| pod.starts_with(&format!("default/{host} 10."))), "{line}");
        assert!(line["node"].is_string(), "{line}");
    }
    let peer = format!("peer=\"{}\"", of("client"));
    scene.wait_total(5.0, "istio_request_duration_milliseconds_count", &["reporter=\"destination\"", &peer]);
    // A narrower scope that says nothing of a provider that is not there.
    scene.apply(
        "bad",
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: bad, namespace: default}\nspec: {accessLogging: [{providers: [{name: nowhere}]}]}\n",
    );
    let remarks = scene.bed.nodes()[0].admin_json("/status").expect("status")["remarks"].to_string();
    assert!(remarks.contains("Telemetry default/bad") && remarks.contains("nowhere"), "{remarks}");
}

/// Istio's own examples of tags ask for the workload at the other end; what goes nowhere is counted for the service that was dialled, and
/// names no host that was not asked.
#[test]
fn tags_know_the_other_end_and_what_goes_nowhere_was_meant_for_somebody() {
    let scene = scene();
    let log = tempfile::Builder::new().prefix("hosts").suffix(".log").tempfile().expect("a file");
    scene.apply(
        "mesh",
        &format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    extensionProviders:\n    - name: file\n      envoyFileAccessLog: {{path: {}, logFormat: {{labels: {{code: '%RESPONSE_CODE%', from: {{host: '%UPSTREAM_HOST%', levels: [1, '%REQ(:PATH)%']}}}}}}}}\n",
            log.path().display()
        ),
    );
    scene.apply(
        "telemetry",
        r#"apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: custom-tags, namespace: istio-system}
spec:
  accessLogging:
  - providers: [{name: file}]
    match: {mode: SERVER}
  metrics:
  - overrides:
    - match: {metric: REQUEST_COUNT, mode: CLIENT}
      tagOverrides:
        destination_x: {value: filter_state.upstream_peer.app}
        destination_pod: {value: "filter_state.upstream_peer.namespace + '/' + upstream_peer.labels['version'].value"}
        own: {value: "node.metadata['NAMESPACE']"}
    - match: {metric: REQUEST_COUNT, mode: SERVER}
      tagOverrides:
        source_x: {value: filter_state.downstream_peer.app}
    providers: [{name: prometheus}]
"#,
    );
    assert!(scene.bed.nodes()[0].admin_json("/status").expect("status")["remarks"].as_array().is_some_and(Vec::is_empty));
    scene.get("/a", 20);
    scene.wait_total(20.0, "istio_requests_total", &["reporter=\"source\"", "destination_x=\"web\"", "own=\"default\""]);
    scene.wait_total(20.0, "istio_requests_total", &["reporter=\"destination\"", "source_x=\"client\""]);
    for version in ["v1", "v2"] {
        let sent = scene.total("istio_requests_total", &["reporter=\"source\"", &format!("destination_version=\"{version}\"")]);
        assert!(sent > 0.5, "{version} is never asked");
        scene.wait_total(sent, "istio_requests_total", &["reporter=\"source\"", &format!("destination_pod=\"default/{version}\"")]);
    }
    scene.apply(
        "routes",
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: web}\nspec:\n  hosts: [web]\n  http:\n  - match: [{uri: {exact: /direct}}]\n    directResponse: {status: 418}\n  - match: [{uri: {exact: /redirect}}]\n    redirect: {uri: /elsewhere}\n  - match: [{uri: {exact: /nowhere}}]\n    route: [{destination: {host: web, subset: none}}]\n  - match: [{uri: {prefix: /denied}}]\n    route: [{destination: {host: web}}]\n",
    );
    scene.apply(
        "deny",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny}\nspec: {selector: {matchLabels: {app: web}}, action: DENY, rules: [{to: [{operation: {paths: [/denied]}}]}]}\n",
    );
    for path in ["/direct", "/redirect", "/nowhere", "/lost", "/denied"] {
        scene.get(path, 2);
    }
    for code in ["418", "301", "503", "404", "403"] {
        let labels = ["reporter=\"source\"", "destination_service_name=\"web\"", "destination_service_namespace=\"default\""];
        scene.wait_total(2.0, "istio_requests_total", &[&labels[..], &[&format!("response_code=\"{code}\"")]].concat());
    }
    let read = || std::fs::read_to_string(log.path()).expect("the log");
    wait_for("22 lines", Duration::from_secs(5), || Ok(read().lines().count() == 22)).expect("lines");
    for line in read().lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let (path, host) = (&line["from"]["levels"][1], &line["from"]["host"]);
        assert!(line["from"]["levels"][0] == 1 && host.is_string() == (path == "/a"), "{line}");
    }
}

/// Who the two ends are is told where it was proved, and of plaintext nowhere; in JSON, if the environment asks for that, in ztunnel's way.
#[test]
fn the_log_names_identities_that_were_proved_and_can_be_json() {
    let environment = vec![("LOG_FORMAT".to_owned(), "json".to_owned())];
    let mut bed = Bed::ambient(&NodeOptions { environment, ..NodeOptions::default() }).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1)]).expect("pods");
    bed.settle().expect("settled");
    assert_eq!(bed.probe(&client, &["ask", &server.address(8080), "ping"]).expect("a report")["answer"], "pong");
    let outside = bed.nodes()[0].run(&program("probe"), &["ask", &server.address(8080), "ping"]).expect("run");
    assert!(String::from_utf8_lossy(&outside.stdout).contains("pong"), "{outside:?}");
    let lines = || {
        let text = bed.nodes()[1].log_text();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect::<Vec<_>>()
    };
    let complete = || lines().into_iter().filter(|l| l["message"] == "connection complete").collect::<Vec<_>>();
    wait_for("two lines", Duration::from_secs(5), || Ok(complete().len() == 2)).unwrap_or_else(|_| panic!("{:#?}", lines()));
    let [tunnel, plain] = &complete()[..] else { panic!("two lines") };
    let of = |who: &str| Value::from(format!("spiffe://cluster.local/ns/default/sa/{who}"));
    assert_eq!((&tunnel["src.identity"], &tunnel["dst.identity"]), (&of("client"), &of("server")), "{tunnel}");
    assert!(plain.get("src.identity").is_none() && plain.get("dst.identity").is_none(), "{plain}");
    for line in [tunnel, plain] {
        assert_eq!((&line["level"], &line["scope"]), (&"info".into(), &"access".into()), "{line}");
        assert!(line["dst.addr"].as_str().is_some_and(|a| a.ends_with(":8080") || a.ends_with(":15008")), "{line}");
        assert!(line["bytes_recv"].is_u64() && line["bytes_sent"].is_u64() && line["time"].is_string(), "{line}");
    }
}

/// A destination that looks into requests only to count them leaves alone what is none.
#[test]
fn what_is_no_http_on_a_port_declared_to_carry_it_is_let_through_where_no_policy_asks() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: odd}\nspec: {selector: {app: odd}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply("odd", service).expect("service");
    let [near, far] = bed.meshed([PodSpec::new("near", 0), PodSpec::new("far", 1)]).expect("clients");
    let [server] = bed.meshed([PodSpec::server("server", 0).label("app", "odd")]).expect("server");
    bed.settle().expect("settled");
    let said = "\u{1}\u{2} this is no HTTP";
    let ask = |client: &Pod| {
        let report = bed.probe(client, &["ask", &server.address(8080), said]).expect("a report");
        report["answer"].as_str().is_some_and(|answer| answer.contains("no such command"))
    };
    let asked = [ask(&near), ask(&far)];
    assert_eq!(asked, [true, true]);
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: odd, namespace: default}\nspec: {selector: {matchLabels: {app: odd}}, action: DENY, rules: [{to: [{operation: {paths: [/secret]}}]}]}\n";
    bed.apply("deny", deny).expect("applied");
    bed.settle().expect("settled");
    assert!(!ask(&near) && !ask(&far), "it may be a request for /secret");
}

/// What comes to no end is told as that by both ends, with what has passed.
#[test]
fn requests_that_come_to_no_end_say_so() {
    let mut scene = scene();
    scene.web(&["abort", "web:80/", "2"]);
    scene.wait_total(2.0, "istio_requests_total", &["response_flags=\"DC\"", "reporter=\"source\""]);
    // Downloads at the destination's node: one is broken off by the client, two are cut here, by a policy and by a stop.
    let outside = scene.bed.pod(&PodSpec::new("outside", 0).label("istio.io/dataplane-mode", "none")).expect("outside");
    let [server] = scene.bed.meshed([web("v3", 1)]).expect("server");
    let log = scene.bed.directory.join("access.log");
    let mesh = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    accessLogFile: {}\n    accessLogEncoding: JSON\n",
        log.display()
    );
    scene.apply("mesh", &mesh);
    let to = format!("{}/bytes/1000000000000", server.address(8080));
    let labels = ["reporter=\"destination\"", "destination_version=\"v3\"", "response_flags=\"DC\""];
    for (n, cut, details) in [
        (1, "client", "downstream_remote_disconnect"),
        (2, "policy", "downstream_local_disconnect"),
        (3, "stop", "downstream_local_disconnect"),
    ] {
        let far = &scene.bed.nodes()[1];
        let mut reading = scene.bed.command(&outside, &program("web"), &["download", &to, "1000000000000"]).spawn().expect("web");
        wait_for("it to begin", Duration::from_secs(5), || {
            let all = far.admin_json("/connections")?;
            Ok(all.as_array().is_some_and(|all| all.iter().any(|c| c["receivedBytes"].as_u64().is_some_and(|n| n > 10_000_000))))
        })
        .unwrap_or_else(|_| panic!("{:#}", far.admin_json("/connections").expect("connections")));
        match cut {
            "client" => reading.kill().expect("killed"),
            "policy" => {
                let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: cut, namespace: default}\nspec: {action: DENY, rules: [{to: [{operation: {ports: [\"8080\"]}}]}]}\n";
                scene.bed.apply("cut", deny).expect("applied");
            }
            _ => scene.bed.node(1).stop().expect("stopped"),
        }
        let lines = || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let all = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
            all.filter(|l| l["upstream_cluster"] == "inbound|8080||" && l["response_flags"] == "DC").collect::<Vec<_>>()
        };
        wait_for("its line", Duration::from_secs(10), || Ok(lines().len() == n)).unwrap_or_else(|_| panic!("{:#?}", lines()));
        let line = lines().pop().expect("a line");
        assert!(line["bytes_sent"].as_u64().is_some_and(|n| n > 10_000_000) && line["response_code_details"] == details, "{cut}: {line:#}");
        if cut != "stop" {
            let told = scene.bed.nodes()[1].metric("istio_requests_total", &labels).unwrap_or(0.0);
            assert!((told - n as f64).abs() < 0.5, "{told}");
            scene.apply("cut", "");
        }
        // It has ended already, where it was killed.
        let _ = reading.kill();
        reading.wait().expect("ended");
    }
}
