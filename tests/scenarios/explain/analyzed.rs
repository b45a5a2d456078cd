//! Manifests without a node.

use super::*;

const REFUSED: &str = include_str!("../../corpora/analyzed/refused.yaml");
const PODS: &str = include_str!("../../corpora/analyzed/pods.yaml");
const PATTERNS: &str = include_str!("../../corpora/analyzed/patterns.yaml");
const MISTAKES: &str = include_str!("../../corpora/analyzed/mistakes.yaml");
/// Workloads as templates, and no addresses.
const SHOP: &str = include_str!("../../corpora/analyzed/shop.yaml");
const FURTHER: &str = include_str!("../../corpora/analyzed/further.yaml");

/// The exit code and what is said of a directory, or of one file, by `meshctl analyze`.
fn analyze(arguments: &[&str]) -> (Option<i32>, String) {
    let output = std::process::Command::new(program("meshctl")).arg("analyze").args(arguments).output().expect("meshctl");
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

/// A directory with these files.
fn directory(files: &[(&str, &str)]) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    for (name, text) in files {
        std::fs::write(directory.path().join(name), text).expect("written");
    }
    let path = directory.path().display().to_string();
    (directory, path)
}

#[test]
fn what_is_refused_is_told_by_file_and_line() {
    let (_kept, path) = directory(&[("rules.yaml", REFUSED)]);
    let (code, text) = analyze(&[&path]);
    assert_eq!(code, Some(1), "{text}");
    for part in [
        "rules.yaml:13: error: VirtualService default/web: spec.http[0].timeout",
        // Not only the first of one object.
        "rules.yaml:14: error: VirtualService default/web: spec.http[0].retries.attempts",
        "rules.yaml:22: error: Telemetry default/t: spec.accessLogging[0].filter.expression",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let (_kept, path) = directory(&[("twice.yml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nmetadata: {name: b}\n")]);
    let (code, text) = analyze(&[&path]);
    assert!(code == Some(1) && text.contains("duplicate") && !text.contains("DuplicateKeyPolicy"), "{text}");
    assert_eq!(analyze(&["/nowhere"]).0, Some(1));
}

#[test]
fn standard_input_is_looked_at_like_a_file() {
    for name in ["-", "/dev/stdin"] {
        let mut command = std::process::Command::new(program("meshctl"));
        command.args(["analyze", name]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().expect("meshctl");
        std::io::Write::write_all(&mut child.stdin.take().expect("piped"), REFUSED.as_bytes()).expect("written");
        let output = child.wait_with_output().expect("ended");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(&format!("{name}:13: error: VirtualService default/web: spec.http[0].timeout")), "{text}");
    }
}

/// One document that is not YAML hides nothing of the others.
#[test]
fn a_document_that_cannot_be_read_is_told_and_the_others_too() {
    let broken = format!("{REFUSED}---\nkind: Pod\n  metadata: x\n---\n{MISTAKES}");
    let (_kept, path) = directory(&[("rules.yaml", &broken)]);
    let (code, text) = analyze(&[&path]);
    assert_eq!(code, Some(1), "{text}");
    let line = REFUSED.lines().count() + 1;
    for part in [
        format!("rules.yaml:{line}: error: the document at line {line} is not YAML: "),
        "rules.yaml:13: error: VirtualService default/web: spec.http[0].timeout".to_owned(),
        "error: AuthorizationPolicy default/lost: kind".to_owned(),
    ] {
        assert!(text.contains(&part), "{part}: {text}");
    }
    assert!(!text.contains("stays in force"), "{text}");
}

#[test]
fn what_nothing_is_ever_like_is_told_at_its_own_line() {
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: reviews}\nspec: {selector: {app: reviews}, ports: [{name: http, port: 80}]}\n";
    let (_kept, path) = directory(&[("patterns.yaml", PATTERNS), ("service.yaml", service)]);
    let (code, text) = analyze(&[&path]);
    assert_eq!(code, Some(0), "{text}");
    for part in [
        "patterns.yaml:8: warning: AuthorizationPolicy default/stars: spec.rules[0].to[0].operation.paths: a star within \"/a/*/b\"",
        "patterns.yaml:8: warning: AuthorizationPolicy default/stars: spec.rules[0].to[0].operation.paths: a star within \"*/x/*\"",
        "patterns.yaml:18: warning: VirtualService default/reviews: spec.http[0].match[0].uri: no path is like \"users\"",
        "patterns.yaml:18: warning: VirtualService default/reviews: spec.http[0].match[0].method: no request has the method \"get\"",
        "patterns.yaml:21: warning: VirtualService default/reviews: destination reviews: the Service has no port 8888",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("/fine/"), "{text}");
}

/// Manifests that work here and not with Istio are told of.
#[test]
fn names_that_istio_does_not_complete_are_told() {
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: reviews}\nspec: {selector: {app: reviews}, ports: [{name: http, port: 80}]}\n";
    let route = |host: &str, to: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: r}}\nspec: {{hosts: [{host}], http: [{{route: [{{destination: {{host: {to}}}}}]}}]}}\n"
        )
    };
    let full = "reviews.default.svc.cluster.local";
    for (host, to, told) in [
        ("reviews", full, None),
        (full, "reviews", None),
        ("reviews.default", full, Some("spec.hosts: Istio takes \"reviews.default\" for a host outside the mesh")),
        (full, "reviews.default.svc", Some("spec.http[0].route[0].destination.host: Istio takes \"reviews.default.svc\"")),
    ] {
        let (_kept, path) = directory(&[("route.yaml", &route(host, to)), ("service.yaml", service)]);
        let (_, text) = analyze(&[&path]);
        assert_eq!(text.contains("Istio takes"), told.is_some(), "{host} {to}: {text}");
        assert!(told.is_none_or(|told| text.contains(told) && text.contains(&format!("write {full}"))), "{text}");
    }
}

/// What would not be noticed, and what is hardly meant so.
#[test]
fn manifests_are_analyzed_by_file_and_line() {
    let (kept, path) = directory(&[("rules.yaml", MISTAKES), ("pods.yaml", PODS)]);
    let (code, text) = analyze(&[&path]);
    assert_eq!(code, Some(1), "{text}");
    for part in [
        ":11: warning: VirtualService default/web: spec.http[1]: is never reached, as spec.http[0] takes everything",
        ":14: warning: VirtualService default/web: destination missing: there is no such Service",
        ": error: AuthorizationPolicy default/lost: kind: AuthorizationPolicy is not of the group \"networking.istio.io\"; write apiVersion: security.istio.io/v1",
        ": error: AuthorisationPolicy default/mistyped: kind: AuthorisationPolicy is not a kind of \"security.istio.io\"",
        ": error: List default/: items: is missing",
        ":32: warning: DestinationRule default/a: spec.subsets[0].labels: no endpoint of default/web has them",
        ":39: warning: DestinationRule default/b: spec.trafficPolicy: that of DestinationRule default/a, which is older, counts",
        ":49: warning: PeerAuthentication default/two: spec.selector: selects default/web as well as PeerAuthentication default/one does",
        ":55: warning: AuthorizationPolicy default/nobody: spec.selector: matches no pod",
        ": warning: VirtualService default/left: spec.hosts: is empty and no VirtualService delegates to it",
        ":68: warning: VirtualService default/own: spec.gateways: mesh is not among them",
        "spec.rules[0].from[0].source.principals: \"spiffe://cluster.local/ns/default/sa/a\" is nobody",
        "spec.rules[0].to[0].operation.methods: no request has the method \"get\"; they are told apart by case: \"GET\"",
        "spec.rules[0].to[0].operation.paths: no path is like \"api\"",
        "spec.rules[1].from[0].source.principals: a star of \"*/sa/*\" stands for itself",
        "spec.rules[1].to[0].operation.hosts: no host is like \"http://b\"",
        "spec.rules[1].to[0].operation.paths: no path is like \"/a?x=1\"; they end before the query",
        "VirtualService default/sni: spec.tls: counts for nothing, as none of its hosts' ports is declared to carry TLS",
        "VirtualService default/shade: spec.http[1]: is never reached, as spec.http[0] before it takes all that it would",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("default/shade: spec.http[2]: is never reached") && text.matches("no path is like").count() == 2, "{text}");
    // One file is as good as a directory of one.
    let (code, alone) = analyze(&[&kept.path().join("rules.yaml").display().to_string()]);
    assert!(code == Some(1) && alone.contains("no request has the method"), "{alone}");
    let (_, text) = analyze(&["-o", "json", &path]);
    let document: Value = serde_json::from_str(&text).expect("JSON");
    let remark = document["remarks"].as_array().expect("remarks").iter().find(|r| r["line"] == 55).expect("one of line 55");
    assert_eq!(
        (&remark["severity"], &remark["object"], &remark["field"]),
        (&"warning".into(), &"AuthorizationPolicy default/nobody".into(), &"spec.selector".into())
    );
    let (_kept, path) = directory(&[]);
    assert_eq!(analyze(&[&path]), (Some(0), "0 workloads, 0 services: everything would be in force\n".to_owned()));
}

/// What no rule is reached by, what no port and no namespace is: each, and nothing else.
#[test]
fn what_counts_for_nothing_is_told() {
    let (_kept, path) = directory(&[("further.yaml", FURTHER), ("shop.yaml", SHOP)]);
    let (code, text) = analyze(&[&path]);
    assert_eq!(code, Some(0), "{text}");
    let all = text.lines().map(|line| line.strip_prefix(&format!("{path}/")).expect("a path").replace(": warning", ""));
    insta::assert_snapshot!(all.collect::<Vec<_>>().join("\n"));
}

/// What is as it has to be is not told of: in one file, and in files of one object each.
#[test]
fn nothing_is_said_of_what_is_right() {
    let valid = include_str!("../../corpora/analyzed/valid.yaml");
    let (_kept, path) = directory(&[("valid.yaml", valid)]);
    assert_eq!(analyze(&[&path]), (Some(0), "2 workloads, 1 services: everything would be in force\n".to_owned()));
    let files = valid.split("---\n").enumerate().map(|(i, text)| (format!("{i}.yaml"), text)).collect::<Vec<_>>();
    let (_kept, path) = directory(&files.iter().map(|(name, text)| (&**name, *text)).collect::<Vec<_>>());
    assert_eq!(analyze(&[&path]), (Some(0), "2 workloads, 1 services: everything would be in force\n".to_owned()));
}

/// Of manifests that were written by hand, which have no pods and no addresses, it is told what would become of requests.
#[test]
fn templates_stand_for_the_pods_that_are_made_of_them() {
    let (_kept, path) = directory(&[("shop.yaml", SHOP)]);
    let explain = |from: &str, to: &str| {
        let mut command = std::process::Command::new(program("meshctl"));
        let output = command.args(["explain", "-o", "json", "--dir", &path, "--from", from, "--to", to]).output().expect("meshctl");
        let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let endpoints = document["endpoints"].as_array().into_iter().flatten();
        let endpoints = endpoints
            .map(|e| (e["workload"].as_str().unwrap_or_default().to_owned(), e["address"].as_str().unwrap_or_default().to_owned()));
        (
            document["allowed"].as_bool(),
            endpoints.collect::<Vec<_>>(),
            document["from"]["enrolled"].as_bool(),
            document["from"]["identity"].clone(),
        )
    };
    let (allowed, endpoints, enrolled, identity) = explain("foo/bare", "web:80");
    assert_eq!((allowed, enrolled, identity), (Some(true), Some(true), "spiffe://cluster.local/ns/foo/sa/default".into()));
    assert!(matches!(&*endpoints, [(workload, address)] if workload == "foo/web-v1" && address.ends_with(":8080")), "{endpoints:?}");
    let (allowed, endpoints, ..) = explain("foo/nightly", "web-tcp:82");
    assert!(allowed == Some(true) && matches!(&*endpoints, [(_, address)] if address.ends_with(":8082")), "{endpoints:?}");
    // What is there already is not made again.
    let runs =
        PODS.replace("name: web, uid: web, labels: {app: web}", "name: web-v1-x, namespace: foo, uid: x, labels: {app: web, version: v1}");
    let (_kept, path) = directory(&[("shop.yaml", SHOP), ("pods.yaml", PODS), ("runs.yaml", &runs.replace("10.", "11."))]);
    let (_, text) = analyze(&["-o", "json", &path]);
    let document: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(document["workloads"], 4, "{text}");
}

/// A label that nobody has is a mistake where pods are written down, and nothing is known of it where none are.
#[test]
fn services_and_clients_that_are_nobody_are_told() {
    let deployment =
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec: {template: {metadata: {labels: {app: web}}, spec: {}}}\n";
    let service = |name: &str, app: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: {app}}}, ports: [{{name: http, port: 80}}]}}\n"
        )
    };
    let rule = |app: &str| format!("{{match: [{{sourceLabels: {{app: {app}}}}}], route: [{{destination: {{host: web}}}}]}}");
    let routes = format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: web}}\nspec: {{hosts: [web], http: [{}, {}]}}\n",
        rule("web"),
        rule("wbe")
    );
    let (_kept, path) = directory(&[("web.yaml", &[deployment, &service("web", "web"), &service("lost", "wbe"), &routes].concat())]);
    let (_, text) = analyze(&[&path]);
    assert!(text.contains("Service default/lost: spec.selector: matches no pod of these manifests"), "{text}");
    assert!(text.contains("VirtualService default/web: spec.http[1].match[0].sourceLabels: no pod of these manifests"), "{text}");
    assert!(!text.contains("Service default/web: spec.selector") && !text.contains("spec.http[0].match[0]"), "{text}");
    let (_kept, path) = directory(&[("web.yaml", &[&*service("web", "web"), &routes].concat())]);
    let (_, text) = analyze(&[&path]);
    assert!(!text.contains("matches no pod") && !text.contains("sourceLabels"), "{text}");
}
