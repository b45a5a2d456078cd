//! Manifests without a node.

use super::*;

#[test]
fn manifests_are_analyzed_by_file_and_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("rules.yaml");
    let yaml = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: web\nspec:\n  hosts: [web]\n  http:\n  - route: [{destination: {host: nowhere}}]\n    timeout: soon\n---\napiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: t}\nspec:\n  accessLogging:\n  - filter:\n      expression: response.cod == 1\n";
    std::fs::write(&file, yaml).expect("written");
    let run = |directory: &str| {
        let output = std::process::Command::new(program("meshctl")).args(["analyze", directory]).output().expect("meshctl");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    };
    let (code, text) = run(&directory.path().display().to_string());
    assert_eq!(code, Some(1), "{text}");
    let file = file.display();
    for part in [
        format!("{file}:13: error: VirtualService default/web: spec.http[0].timeout"),
        format!("{file}:21: error: Telemetry default/t: spec.accessLogging[0].filter.expression"),
    ] {
        assert!(text.contains(&part), "{part}: {text}");
    }
    // What would not be noticed, and what is hardly meant so.
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, uid: web, labels: {app: web}}\nspec: {nodeName: n1}\nstatus: {phase: Running, podIPs: [{ip: 10.0.0.1}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80}]}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {name: web-1, labels: {kubernetes.io/service-name: web}}\nendpoints: [{addresses: [10.0.0.1]}]\nports: [{name: http, port: 80}]\n";
    std::fs::write(directory.path().join("pods.yaml"), pod).expect("written");
    let yaml = r#"apiVersion: v1
kind: List
items:
- apiVersion: networking.istio.io/v1
  kind: VirtualService
  metadata: {name: web}
  spec:
    hosts: [web]
    http:
    - route: [{destination: {host: web}}]
    - match: [{uri: {prefix: /late}}]
      route:
      - destination:
          host: missing
- apiVersion: networking.istio.io/v1
  kind: AuthorizationPolicy
  metadata: {name: lost}
- apiVersion: security.istio.io/v1
  kind: AuthorisationPolicy
  metadata: {name: mistyped}
---
apiVersion: v1
kind: List
item: []
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: a}
spec:
  host: web
  trafficPolicy: {loadBalancer: {simple: RANDOM}}
  subsets: [{name: v1, labels: {version: v1}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: b}
spec:
  host: web.default.svc.cluster.local
  trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: one}
spec: {selector: {matchLabels: {app: web}}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: two}
spec: {selector: {matchLabels: {app: web}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody}
spec:
  selector: {matchLabels: {app: wbe}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: left}
spec: {http: [{route: [{destination: {host: web}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: own}
spec:
  hosts: [web]
  exportTo: ["."]
  gateways: [gw]
  http: [{route: [{destination: {host: web}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: mute}
spec:
  rules:
  - from: [{source: {principals: ["spiffe://cluster.local/ns/default/sa/a"]}}]
    to: [{operation: {methods: [get], paths: [api, "/ok", "*.html"]}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shade}
spec:
  hosts: [shady]
  http:
  - match: [{uri: {prefix: /a}}]
    route: [{destination: {host: web}}]
  - match: [{uri: {prefix: /a/b}, method: {exact: GET}}, {uri: {exact: /a/c}}]
    route: [{destination: {host: web}}]
  - match: [{uri: {prefix: /b}}, {uri: {exact: /a/c}}]
    route: [{destination: {host: web}}]
"#;
    std::fs::write(directory.path().join("rules.yaml"), yaml).expect("written");
    let (code, text) = run(&directory.path().display().to_string());
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
        "VirtualService default/shade: spec.http[1]: is never reached, as spec.http[0] takes all paths that begin like its own",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("default/shade: spec.http[2]: is never reached") && text.matches("no path is like").count() == 1, "{text}");
    // One file is as good as a directory of one.
    let (code, alone) = run(&directory.path().join("rules.yaml").display().to_string());
    assert!(code == Some(1) && alone.contains("no request has the method"), "{alone}");
    let twice = directory.path().join("twice.yml");
    std::fs::write(&twice, "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nmetadata: {name: b}\n").expect("written");
    let (_, text) = run(&twice.display().to_string());
    assert!(text.contains("duplicate") && !text.contains("DuplicateKeyPolicy"), "{text}");
    std::fs::remove_file(twice).expect("removed");
    let output = std::process::Command::new(program("meshctl"));
    let mut output = output;
    let output = output.args(["analyze", "-o", "json", &directory.path().display().to_string()]).output().expect("meshctl");
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let remark = document["remarks"].as_array().expect("remarks").iter().find(|r| r["line"] == 55).expect("one of line 55");
    assert_eq!(
        (&remark["severity"], &remark["object"], &remark["field"]),
        (&"warning".into(), &"AuthorizationPolicy default/nobody".into(), &"spec.selector".into())
    );
    for file in ["rules.yaml", "pods.yaml"] {
        std::fs::remove_file(directory.path().join(file)).expect("removed");
    }
    assert_eq!(
        run(&directory.path().display().to_string()),
        (Some(0), "0 workloads, 0 services: everything would be in force\n".to_owned())
    );
    assert_eq!(run("/nowhere").0, Some(1));
}
