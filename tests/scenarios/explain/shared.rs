//! A port of a pod that several services lead to, and do not agree about.

use super::*;

const SERVICES: &str = "apiVersion: v1
kind: Service
metadata: {name: echo}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: raw}
spec: {selector: {app: web}, ports: [{name: tcp, port: 9001, targetPort: 8080}]}
";
const ONLY_POST: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-post, namespace: default}
spec: {selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {methods: [POST]}}]}]}
";
const NOWHERE: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: echo, namespace: default}
spec:
  parentRefs: [{kind: Service, group: '', name: echo}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /none}}]
  - backendRefs: [{name: echo, port: 80}]
";

#[test]
fn a_port_that_services_disagree_about_is_looked_into_and_told_of() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    bed.kubectl_apply("services", SERVICES).expect("services");
    let [client, ..] = bed.meshed([PodSpec::new("client", 0), web("v1", 1)]).expect("pods");
    bed.settle().expect("settled");
    let code = |url: &str, method: &str| {
        let arguments = ["-sS", "-o", "/dev/null", "-w", "%{http_code}", "-X", method, url];
        let output = bed.run(&client, std::path::Path::new("/usr/bin/curl"), &arguments).expect("curl");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for url in ["http://echo/x", "http://raw:9001/x"] {
        assert_eq!(code(url, "GET"), "200", "{url}");
    }
    let counted = || Ok(bed.nodes()[1].metric("istio_requests_total", &["reporter=\"destination\""]).unwrap_or(0.0) > 0.5);
    mesh_tests::bed::wait_for("it", std::time::Duration::from_secs(5), counted)
        .expect("the destination tells of requests to the one that says so");
    bed.apply("policy", ONLY_POST).expect("applied");
    bed.apply("route", NOWHERE).expect("applied");
    bed.settle().expect("settled");
    let meshctl = |arguments: &[&str]| {
        let output = bed.nodes()[0].run(&program("meshctl"), arguments).expect("meshctl");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for (to, url, method, path, expected) in [
        ("echo:80", "http://echo/x", "POST", "/x", "200"),
        ("echo:80", "http://echo/x", "GET", "/x", "403"),
        ("raw:9001", "http://raw:9001/x", "POST", "/x", "200"),
        ("raw:9001", "http://raw:9001/x", "GET", "/x", "403"),
        // A rule without a destination.
        ("echo:80", "http://echo/none", "POST", "/none", "500"),
    ] {
        assert_eq!(code(url, method), expected, "{method} {url}");
        let (status, text) = meshctl(&["explain", "--from", "client", "--to", to, "-X", method, path, "--check"]);
        assert_eq!(status == Some(0), expected == "200", "{method} {url}: {text}");
    }
    let (_, status) = meshctl(&["status"]);
    assert!(!status.contains("declared not to carry HTTP"), "{status}");
}

/// Whoever dials a service that says nothing of HTTP gets through what it sends, whatever that resembles.
#[test]
fn what_is_no_http_passes_a_port_that_services_disagree_about() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let more = "---\napiVersion: v1\nkind: Service\nmetadata: {name: both}\nspec: {selector: {app: web}, ports: [{name: http, port: 82, targetPort: 8080}, {name: tcp, port: 83, targetPort: 8080}]}\n";
    bed.kubectl_apply("services", &format!("{SERVICES}{more}")).expect("services");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1).label("app", "web")]).expect("pods");
    bed.settle().expect("settled");
    for to in ["raw:9001".to_owned(), "both:83".to_owned(), server.address(8080)] {
        // Less than a line, a line that may be a request's, and much.
        for said in ["hello", "GET key"] {
            let report = bed.probe(&client, &["ask", &to, said]).expect("a report");
            assert!(
                report["answer"].is_string() && !report["answer"].as_str().is_some_and(|a| a.contains("HTTP")),
                "{to} {said}: {report}"
            );
        }
        let report = bed.probe(&client, &["upload", &to, "300000"]).expect("a report");
        assert_eq!(report["received"], 300_000, "{to}: {report}");
    }
}
