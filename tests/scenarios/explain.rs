//! `meshctl` against what really happens: what it says would become of a request becomes of it; and what it says of manifests.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
};

use mesh_tests::{Bed, NodeOptions, Pod, PodSpec, bed::program};
use serde_json::{Value, json};

#[path = "explain/analyzed.rs"]
mod analyzed;
#[path = "explain/shared.rs"]
mod shared;

fn web(version: &str, node: usize) -> PodSpec {
    let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), version.into()];
    PodSpec { command, port: Some(8080), ..PodSpec::new(&format!("web-{version}"), node) }.label("app", "web").label("version", version)
}

const RULES: &str = r#"apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: default}
spec: {host: web, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}, {name: none, labels: {version: v0}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: default}
spec:
  hosts: [web]
  http:
  - name: gone
    match: [{uri: {prefix: /gone}}]
    directResponse: {status: 410}
  - name: moved
    match: [{uri: {exact: /moved}}]
    redirect: {uri: /a}
  - match: [{uri: {prefix: /empty}}]
    route: [{destination: {host: web, subset: none}}]
  - match: [{uri: {prefix: /missing}}]
    route: [{destination: {host: nowhere}}]
  - match: [{uri: {prefix: /renamed}}]
    rewrite: {uri: /a}
    route: [{destination: {host: web, subset: v1}}]
  - match: [{uri: {prefix: /hidden}}]
    rewrite: {uri: /a/secret}
    route: [{destination: {host: web, subset: v1}}]
  - match: [{uri: {prefix: /marked}}]
    route: [{destination: {host: web, subset: v1}, headers: {request: {set: {x-bad: "1"}}}}]
  - match: [{uri: {prefix: /cleaned}}]
    headers: {request: {remove: [x-bad]}}
    route: [{destination: {host: web, subset: v1}}]
  - match: [{uri: {prefix: /faulty}}]
    fault: {abort: {httpStatus: 418, percentage: {value: 100}}}
    route: [{destination: {host: web, subset: v1}}]
  - match: [{uri: {prefix: /halves}}]
    route: [{destination: {host: web, subset: v1}, weight: 50}, {destination: {host: nowhere}, weight: 50}]
  - match: [{headers: {x-version: {exact: v2}}}, {uri: {regex: "/b.*"}, method: {exact: GET}}]
    route: [{destination: {host: web, subset: v2}}]
  - match: [{uri: {prefix: /a}}]
    route: [{destination: {host: web, subset: v1}}]
  - match: [{uri: {prefix: /split}}]
    route: [{destination: {host: web, subset: v1}, weight: 50}, {destination: {host: web, subset: v2}, weight: 50}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-secret, namespace: default}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules: [{to: [{operation: {paths: ["*/secret"]}}]}, {when: [{key: "request.headers[x-bad]", values: ["*"]}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: v2-only, namespace: default}
spec:
  selector: {matchLabels: {version: v2}}
  rules: [{from: [{source: {principals: ["cluster.local/ns/default/sa/client"]}}]}]
"#;

struct Scene {
    bed: Bed,
    clients: [Pod; 2],
}

fn scene() -> Scene {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply("web", service).expect("service");
    bed.apply("rules", RULES).expect("applied");
    let clients = bed.meshed([PodSpec::new("client", 0), PodSpec::new("other", 0)]).expect("clients");
    bed.meshed([web("v1", 0), web("v2", 1)]).expect("servers");
    bed.settle().expect("settled");
    Scene { bed, clients }
}

impl Scene {
    fn meshctl(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.bed.nodes()[0].run(&program("meshctl"), arguments).expect("meshctl");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    }

    /// Status and version of the answers to a request sent a few times.
    fn really(&self, client: &Pod, path: &str, headers: &[&str]) -> BTreeSet<(String, String)> {
        let mut found = BTreeSet::new();
        let url = format!("web:80{path}");
        let mut arguments = vec!["get", &url, "1"];
        headers.iter().for_each(|h| arguments.extend(["--header", h]));
        let output = self.bed.run(client, &program("web"), &arguments).expect("web");
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
        for status in report["statuses"].as_object().into_iter().flatten().map(|(s, _)| s) {
            for version in report["versions"].as_object().into_iter().flatten().map(|(v, _)| v) {
                found.insert((status.clone(), version.clone()));
            }
        }
        assert!(!found.is_empty(), "{path}: {report}");
        found
    }
}

/// The output of `meshctl` on a terminal, without what differs from run to run: addresses, ages and times.
fn on_a_terminal(scene: &Scene, arguments: &[&str]) -> String {
    let command = [&[program("meshctl").display().to_string()][..], &arguments.iter().map(|a| format!("'{a}'")).collect::<Vec<_>>()[..]];
    let arguments = ["-qec", &command.concat().join(" "), "/dev/null"];
    let output = scene.bed.nodes()[0].run(std::path::Path::new("script"), &arguments).expect("script");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    let text = String::from_utf8_lossy(&output.stdout).replace("\r\n", "\n").replace('\u{1b}', "<ESC>");
    let is_address = |word: &str| {
        let word = word.trim_matches(['[', ']', '(', ')', ',']);
        let alone = word.rsplit_once(':').map_or(word, |(ip, _)| ip.trim_matches(['[', ']']));
        word.parse::<std::net::IpAddr>().is_ok() || alone.parse::<std::net::IpAddr>().is_ok()
    };
    let line = |line: &str| {
        let words = line.split(' ').map(|word| {
            let parts = word.split(',').map(|part| if is_address(part) { "ADDRESS" } else { part }).collect::<Vec<_>>();
            parts.join(",")
        });
        // Columns are as wide as what was in them.
        words.filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ")
    };
    // The bed's own marks of what has been read.
    text.lines().filter(|l| !l.contains("bed-marker")).map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_people_read_stays_as_it_is() {
    let scene = scene();
    for (name, arguments) in [
        ("workloads", &["workloads"][..]),
        ("services", &["services"]),
        ("endpoints", &["services", "web.default.svc"]),
        ("routes", &["routes", "web"]),
        ("policies", &["policies", "web-v2"]),
        ("tls-check", &["tls-check", "web-v1"]),
        ("explain", &["explain", "--from", "client", "--to", "web:80", "-X", "GET", "/a"]),
        ("explain-denied", &["explain", "--from", "other", "--to", "web:80", "-X", "GET", "/b", "-H", "x-version: v2"]),
        ("authorize", &["authorize", "--from", "other", "--to", "web-v2", "--port", "8080", "-X", "GET"]),
        ("policies-yaml", &["policies", "web-v2", "-o", "yaml"]),
    ] {
        insta::assert_snapshot!(name, on_a_terminal(&scene, arguments));
    }
}

#[test]
fn a_workload_is_followed_and_a_node_is_stopped_in_order() {
    let scene = scene();
    let follow = |workload: &str, more: &[&str]| {
        let node = &scene.bed.nodes()[0];
        let arguments = [&["trace", workload][..], more].concat();
        let mut child = node.spawn(&program("meshctl"), &arguments).expect("meshctl");
        let mut said = String::new();
        BufReader::new(child.stderr.take().expect("piped")).read_line(&mut said).expect("said");
        assert_eq!(said, format!("meshctl: following default/{workload}\n"));
        child
    };
    let (asking, asked) = (follow("client", &["--count", "3"]), follow("web-v1", &["--count", "1", "-o", "json"]));
    for path in ["/a", "/gone", "/a/secret"] {
        scene.really(&scene.clients[0], path, &["x-request-id: followed"]);
    }
    let read = |child: std::process::Child| String::from_utf8(child.wait_with_output().expect("ended").stdout).expect("UTF-8");
    let lines = read(asking);
    let lines = lines.lines().map(|l| l.split_once("  ").expect("a time").1).collect::<Vec<_>>();
    assert!(lines[0].starts_with("-> default/web-v1  GET web:80/a  200  ") && lines[0].ends_with("  request followed"), "{lines:#?}");
    assert!(lines[1].contains("GET web:80/gone  410  ") && lines[1].contains("  direct_response  "), "{lines:#?}");
    assert!(lines[2].contains("GET web:80/a/secret  403  "), "{lines:#?}");
    let event: Value = serde_json::from_str(&read(asked)).expect("JSON");
    assert_eq!((&event["reporter"], &event["source"], &event["path"]), (&"destination".into(), &"default/client".into(), &"/a".into()));
    assert_eq!((&event["code"], &event["mutualTls"], &event["requestId"]), (&200.into(), &true.into(), &"followed".into()));
    let (code, text) = scene.meshctl(&["trace", "web-v2"]);
    assert!(code == Some(4) && text.contains("is a pod of node \"node2\": ask there"), "{code:?} {text}");
    let (code, text) = scene.meshctl(&["drain"]);
    assert!(code == Some(0) && text.ends_with("stopped\n"), "{code:?} {text}");
    assert_eq!(scene.meshctl(&["status"]).0, Some(3));
}

/// What an explanation means for the client: statuses and versions that may come.
fn expected(answer: &Value) -> BTreeSet<(String, String)> {
    let verdict = answer["verdict"].as_str().expect("a verdict");
    if let Some(rest) = verdict.strip_prefix("answered ") {
        return BTreeSet::from([(rest.split([' ', ':']).next().expect("a status").to_owned(), "none".to_owned())]);
    }
    if verdict.starts_with("no rule takes it") {
        return BTreeSet::from([("404".to_owned(), "none".to_owned())]);
    }
    let is_missing = verdict.ends_with("does not exist: answered 503");
    if verdict.starts_with("no endpoint is ready") || is_missing {
        return BTreeSet::from([("503".to_owned(), "none".to_owned())]);
    }
    let destinations = answer["destinations"].as_array().expect("destinations");
    let endpoints = destinations.iter().flat_map(|d| d["endpoints"].as_array().expect("endpoints"));
    let of = |e: &Value| {
        let version = e["workload"].as_str().and_then(|w| w.rsplit('-').next()).expect("a version").to_owned();
        if e["decision"] == "denied" { ("403".to_owned(), "none".to_owned()) } else { ("200".to_owned(), version) }
    };
    let mut all = endpoints.filter(|e| e["used"] == true).map(of).collect::<BTreeSet<_>>();
    if verdict.starts_with("50% fail (nowhere does not exist") {
        all.insert(("503".to_owned(), "none".to_owned()));
    }
    // What scripts are told is that one and no other comes.
    assert_eq!(answer["allowed"] == true, all.iter().all(|(status, _)| status == "200"), "{answer}");
    all
}

#[test]
fn what_is_explained_is_what_happens_to_two_hundred_random_requests() {
    let scene = scene();
    let mut rng = fastrand::Rng::with_seed(17);
    let paths = [
        "/a",
        "/a/secret",
        "/b",
        "/b/secret",
        "/bc?x=1",
        "/gone/x",
        "/moved",
        "/moved/x",
        "/empty",
        "/missing/y",
        "/split",
        "/split/secret",
        "/other",
        "/A",
        "/renamed/x",
        "/renamed/secret",
        "/hidden",
        "/marked",
        "/cleaned",
        "/faulty",
        "/halves",
    ];
    let mut verdicts = BTreeSet::new();
    for number in 0..200 {
        let client = rng.usize(..2);
        let path = paths[rng.usize(..paths.len())];
        let mut headers = Vec::new();
        if rng.u8(..3) == 0 {
            headers.push(["x-version: v1", "x-version: v2"][rng.usize(..2)]);
        }
        if rng.u8(..6) == 0 {
            headers.push("x-bad: 1");
        }
        let name = ["default/client", "other"][client];
        let mut arguments = vec!["explain", "-o", "json", "--from", name, "--to", "web:80", "-X", "GET", path];
        headers.iter().for_each(|h| arguments.extend(["-H", h]));
        let (code, text) = scene.meshctl(&arguments);
        assert_eq!(code, Some(0), "{text}");
        let answer: Value = serde_json::from_str(&text).expect("JSON");
        let (really, expected) = (scene.really(&scene.clients[client], path, &headers), expected(&answer));
        assert!(really.is_subset(&expected), "{number}: {name} {path} {headers:?}: {really:?} and not {expected:?}: {text}");
        verdicts.insert(answer["verdict"].as_str().expect("a verdict").to_owned());
    }
    assert!(verdicts.len() >= 9, "requests of all kinds: {verdicts:#?}");
}

#[test]
fn explanations_read_well_and_tell_scripts() {
    let scene = scene();
    let (code, text) = scene.meshctl(&["explain", "--from", "client", "--to", "web:80", "-X", "GET", "/a/secret", "--check"]);
    assert_eq!(code, Some(1), "{text}");
    for part in [
        "From        default/client (spiffe://cluster.local/ns/default/sa/client)",
        "Service     default/web port 80 (http)",
        "Request     GET /a/secret at web",
        "Route       rule 12 of VirtualService default/web: path = /a*",
        "Verdict     denied at every endpoint: answered 403",
        "default/no-secret",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let (code, text) = scene.meshctl(&["explain", "--from", "client", "--to", "web:80", "-X", "GET", "/a", "--check"]);
    assert!(code == Some(0) && text.contains("allowed, at its one endpoint") && text.contains("same_node"), "{text}");
    let (_, text) = scene.meshctl(&["explain", "--from", "client", "--to", "web:81"]);
    assert!(text.contains("default/web has no port 81"), "{text}");
    let (_, text) = scene.meshctl(&["routes", "web"]);
    assert!(text.contains("50 80|v1|web.default.svc.cluster.local, 50 80|v2|web.default.svc.cluster.local"), "{text}");
    // The same without a node.
    let config = scene.bed.config().display().to_string();
    let offline = ["explain", "--dir", &config, "--from", "client", "--to", "web:80", "-X", "GET", "/b", "-o", "json"];
    let online = ["explain", "--from", "client", "--to", "web:80", "-X", "GET", "/b", "-o", "json"];
    assert_eq!(scene.meshctl(&offline), scene.meshctl(&online));
    // Who asks much is seen at the top.
    scene.really(&scene.clients[0], "/a", &[]);
    let mut busy =
        scene.bed.command(&scene.clients[0], &program("web"), &["get", "web:80/a", "1", "--seconds", "4"]).spawn().expect("started");
    let (code, text) = scene.meshctl(&["top", "--interval", "1", "--times", "2"]);
    assert!(code == Some(0) && text.contains("default/client") && text.contains("<="), "{text}");
    assert!(busy.wait().expect("ended").success());
}

/// Claims of a token and names in TLS are asked about without either.
#[test]
fn explanations_know_claims_and_names() {
    let directory = tempfile::tempdir().expect("a directory");
    let pod = |name: &str, ip: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, uid: {name}, labels: {{app: {name}, istio.io/dataplane-mode: ambient}}}}\nspec: {{nodeName: n1, serviceAccountName: {name}}}\nstatus: {{phase: Running, podIPs: [{{ip: {ip}}}]}}\n---\n"
        )
    };
    let yaml = [
        pod("client", "10.0.0.1"),
        pod("web", "10.0.0.2"),
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80}, {name: tls, port: 443}]}\n---\n".to_owned(),
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {name: web-1, labels: {kubernetes.io/service-name: web}}\nendpoints: [{addresses: [10.0.0.2]}]\nports: [{name: http, port: 80}, {name: tls, port: 443}]\n---\n".to_owned(),
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: jwt}\nspec: {selector: {matchLabels: {app: web}}, jwtRules: [{issuer: us, jwksUri: http://issuer.example/}]}\n---\n".to_owned(),
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: admins}\nspec: {selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {ports: [\"80\"]}}], when: [{key: \"request.auth.claims[group]\", values: [admin]}]}, {to: [{operation: {ports: [\"443\"]}}], when: [{key: connection.sni, values: [shop.example]}]}]}\n".to_owned(),
    ];
    std::fs::write(directory.path().join("all.yaml"), yaml.concat()).expect("written");
    let explain = |to: &str, more: &[&str]| {
        let dir = directory.path().display().to_string();
        let mut command = std::process::Command::new(program("meshctl"));
        let output = command.args(["explain", "--dir", &dir, "--from", "client", "--to", to, "-o", "json"]).args(more).output();
        let output = output.expect("meshctl");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let endpoint = answer["destinations"][0]["endpoints"].get(0).or(answer["endpoints"].get(0)).cloned().unwrap_or_default();
        (endpoint["decision"].as_str().unwrap_or_default().to_owned(), endpoint["reason"].as_str().unwrap_or_default().to_owned(), text)
    };
    // What is in a header is no claim.
    for (more, noted) in [(&["-H", "Authorization: bearer a.b.c"][..], true), (&["-H", "Authorization: Basic YQ=="], false)] {
        let (decision, _, text) = explain("web:80", more);
        assert_eq!((decision.as_str(), text.contains("say what is in it with --claims")), ("denied", noted), "{text}");
    }
    for (to, more, decision, why) in [
        ("web:80", &[][..], "denied", ""),
        ("web:80", &["--claims", r#"{"iss": "us", "group": "admin"}"#], "allowed", "no policy denies it"),
        ("web:80", &["--claims", r#"{"iss": "us", "group": "guest"}"#], "denied", ""),
        ("web:80", &["--claims", r#"{"iss": "them", "group": "admin"}"#], "denied", "401"),
        ("web:443", &[], "denied", ""),
        ("web:443", &["--sni", "shop.example"], "allowed", "no policy denies it"),
        ("web:443", &["--sni", "other.example"], "denied", ""),
    ] {
        let (got, reason, text) = explain(to, more);
        assert!(got == decision && reason.contains(why), "{to} {more:?}: {text}");
    }
    let (_, _, text) = explain("web:80", &["--claims", "admin"]);
    assert!(text.contains("claims: is not a JSON object"), "{text}");
    // Routes know them too, and take no header for a claim that a client wrote.
    let routes = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: web}\nspec: {hosts: [web], http: [{match: [{headers: {\"@request.auth.claims.group\": {exact: admin}}}], route: [{destination: {host: web}}]}, {match: [{headers: {x-group: {exact: guest}}}], directResponse: {status: 418}}]}\n";
    let jwt = yaml[4].replace("issuer: us,", "issuer: us, outputClaimToHeaders: [{header: x-group, claim: group}],");
    std::fs::write(directory.path().join("all.yaml"), yaml[..4].concat() + &jwt + &yaml[5] + "---\n" + routes).expect("written");
    for (claims, rule, verdict) in [
        (r#"{"iss": "us", "group": "admin"}"#, json!(1), "allowed"),
        (r#"{"iss": "us", "group": "guest"}"#, json!(2), "418"),
        (r#"{"iss": "us", "group": "other"}"#, json!(null), "404"),
        (r#"{"iss": "them", "group": "admin"}"#, json!(null), "401"),
    ] {
        let (_, _, text) = explain("web:80", &["--claims", claims, "-H", "x-group: guest"]);
        let answer: Value = serde_json::from_str(&text).expect("an explanation");
        assert!(answer["route"]["rule"] == rule && answer["verdict"].as_str().is_some_and(|v| v.contains(verdict)), "{claims}: {text}");
    }
    let (_, _, text) = explain("web:80", &["-X", "GET", "-H", "x-group: guest"]);
    assert!(text.contains("404"), "{text}");
}
