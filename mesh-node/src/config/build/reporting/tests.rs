use std::time::Instant;

use serde_json::{Value, json};

use super::*;
use crate::{
    config::{
        MeshSettings, Snapshot,
        build::build,
        store::{Change, Content, Origin, Status, Store},
    },
    id::{TrustDomain, WorkloadUid},
    resource::{self, Parsed},
};

fn mesh_config(mesh: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}})
}

fn telemetry(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": {"namespace": namespace, "name": name}, "spec": spec})
}

fn built(documents: &[Value]) -> (Arc<Reporting>, Vec<Status>) {
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "shop", "uid": "u", "labels": {"app": "a"}},
        "spec": {"nodeName": "n"}, "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]}});
    let read = |document: &Value| match resource::parse(document, "default") {
        Ok(Parsed::Object(named)) => *named,
        other => panic!("{document}: {other:?}"),
    };
    let objects = documents.iter().chain([&pod]).map(read).collect();
    let mut store = Store::default();
    store.apply(Change {
        origin: Origin(Arc::new("m.yaml".into())),
        content: Content::Read { objects, rejections: Vec::new(), unread: Vec::new() },
    });
    let mesh = Arc::new(MeshSettings::new("n", TrustDomain::parse("cluster.local").expect("valid")));
    let (snapshot, statuses) = build(&store, &mesh, &Snapshot::empty(mesh.clone()), Instant::now());
    (snapshot.workload(&WorkloadUid("u".into())).expect("the pod").reporting.clone(), statuses)
}

fn names(told: &TelemetryPlan) -> Vec<&str> {
    told.logs.iter().map(|l| &*l.log.name).collect()
}

fn files(names: &[&str]) -> Value {
    json!({"extensionProviders": names.iter().map(|n| json!({"name": n, "envoyFileAccessLog": {"path": format!("/{n}")}})).collect::<Vec<_>>()})
}

#[test]
fn without_telemetry_metrics_are_as_they_are_and_nothing_is_logged() {
    let (reporting, statuses) = built(&[]);
    assert_eq!(*reporting, Reporting::default());
    assert!(statuses.is_empty());
    let everywhere = json!({"accessLogFile": "/dev/stdout", "accessLogEncoding": "JSON"});
    let (reporting, _) = built(&[mesh_config(&everywhere)]);
    assert_eq!((names(&reporting.client), names(&reporting.server)), (vec!["envoy"], vec!["envoy"]));
    assert_eq!(reporting.client.logs[0].log.format, crate::report::format::Format::default_json());
}

#[test]
fn a_mistake_in_telemetry_costs_nothing_else() {
    let wrong = json!({"pathNormalization": {"normalization": "DECODE_AND_MERGE_SLASHES"}, "accessLogFormat": "%NONSENSE%",
        "extensionProviders": [{"name": "z", "envoyExtAuthzGrpc": {"service": "authz.shop.svc.cluster.local", "port": 9000}},
            {"name": "l", "envoyFileAccessLog": {"unknown": 1}},
            {"name": "k", "envoyFileAccessLog": {"path": "/k", "logFormat": {"text": "%UNIQUE_ID% %PROTOCOL%"}}}]});
    let documents = [mesh_config(&wrong), telemetry("istio-system", "m", &json!({"accessLogging": [{"providers": [{"name": "k"}]}]}))];
    let (reporting, statuses) = built(&documents);
    assert_eq!(names(&reporting.client), ["k"]);
    let all = statuses.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    for part in [
        "warning: ConfigMap istio-system/istio: data.mesh.accessLogFormat: %NONSENSE% is not an operator",
        "the mesh's log has Istio's format",
        "data.mesh.extensionProviders[1].envoyFileAccessLog.unknown: unknown field",
        "the provider is left out",
        "access log \"k\": nothing is known here of UNIQUE_ID; they are always -",
    ] {
        assert!(all.contains(part), "{part}: {all}");
    }
}

#[test]
fn access_logs_of_narrower_scopes_win() {
    let mesh = mesh_config(&files(&["one", "two"]));
    let log = |spec: Value| json!({"accessLogging": [spec]});
    let on = |name: &str| log(json!({"providers": [{"name": name}]}));
    for (case, documents, client, server) in [
        ("mesh", vec![telemetry("istio-system", "m", &on("one"))], vec!["one"], vec!["one"]),
        ("namespace", vec![telemetry("istio-system", "m", &on("one")), telemetry("shop", "n", &on("two"))], vec!["two"], vec!["two"]),
        (
            "another's namespace",
            vec![telemetry("istio-system", "m", &on("one")), telemetry("other", "n", &on("two"))],
            vec!["one"],
            vec!["one"],
        ),
        (
            "switched off",
            vec![telemetry("istio-system", "m", &on("one")), telemetry("shop", "n", &log(json!({"disabled": true})))],
            vec![],
            vec![],
        ),
        (
            "switched off for servers",
            vec![
                telemetry("istio-system", "m", &on("one")),
                telemetry("shop", "n", &log(json!({"disabled": true, "match": {"mode": "SERVER"}}))),
            ],
            vec!["one"],
            vec![],
        ),
        (
            "on again for a workload",
            vec![
                telemetry("istio-system", "m", &log(json!({"providers": [{"name": "one"}], "disabled": true}))),
                telemetry("shop", "w", &json!({"selector": {"matchLabels": {"app": "a"}}, "accessLogging": [{"disabled": false}]})),
            ],
            vec!["one"],
            vec!["one"],
        ),
        (
            "two in one object",
            vec![telemetry("shop", "n", &json!({"accessLogging": [{"providers": [{"name": "one"}, {"name": "two"}]}]}))],
            vec!["one", "two"],
            vec!["one", "two"],
        ),
        (
            "in two entries of one object",
            vec![telemetry(
                "shop",
                "n",
                &json!({"accessLogging": [{"providers": [{"name": "one"}], "filter": {"expression": "response.code >= 500"}}, {"providers": [{"name": "two"}]}]}),
            )],
            vec!["one", "two"],
            vec!["one", "two"],
        ),
        (
            "one of two is off",
            vec![telemetry(
                "shop",
                "n",
                &json!({"accessLogging": [{"providers": [{"name": "one"}]}, {"providers": [{"name": "two"}], "disabled": true}]}),
            )],
            vec!["one"],
            vec!["one"],
        ),
    ] {
        let documents = documents.into_iter().chain([mesh.clone()]).collect::<Vec<_>>();
        let (reporting, statuses) = built(&documents);
        assert_eq!((names(&reporting.client), names(&reporting.server)), (client, server), "{case}");
        assert!(statuses.is_empty(), "{case}: {statuses:?}");
    }
}

#[test]
fn filters_go_with_providers() {
    let mesh = mesh_config(&files(&["one", "two"]));
    let log = |spec: Value| json!({"accessLogging": [spec]});
    let on = log(json!({"providers": [{"name": "one"}]}));
    let filtered = log(json!({"filter": {"expression": "response.code == 500"}}));
    // A filter of a narrower scope goes with the provider of the wider one.
    let (reporting, _) = built(&[mesh.clone(), telemetry("istio-system", "m", &on), telemetry("shop", "n", &filtered)]);
    assert!(names(&reporting.client) == ["one"] && reporting.client.logs[0].filter.is_some());
    // And stays when a narrower one says nothing of it.
    let wide = log(json!({"providers": [{"name": "one"}], "filter": {"expression": "response.code == 500"}}));
    let (reporting, _) = built(&[mesh, telemetry("istio-system", "m", &wide), telemetry("shop", "n", &log(json!({"disabled": false})))]);
    assert!(names(&reporting.client) == ["one"] && reporting.client.logs[0].filter.is_some());
}

#[test]
fn the_provider_envoy_has_the_mesh_s_format() {
    let on = telemetry("istio-system", "m", &json!({"accessLogging": [{"providers": [{"name": "envoy"}]}]}));
    let told = |mesh: Value| {
        let (reporting, statuses) = built(&[mesh_config(&mesh), on.clone()]);
        assert!(statuses.is_empty(), "{statuses:?}");
        let log = &reporting.client.logs[0].log;
        (log.path.to_string(), log.format.clone())
    };
    let json = crate::report::format::Format::default_json();
    let mut mesh = json!({"accessLogEncoding": "JSON", "accessLogFile": "/var/log/a"});
    assert_eq!(told(mesh.clone()), ("/dev/stdout".to_owned(), json.clone()), "wherever the mesh's own goes");
    mesh["extensionProviders"] = json!([{"name": "envoy", "envoyFileAccessLog": {"path": "/dev/stderr"}}]);
    assert_eq!(told(mesh.clone()), ("/dev/stderr".to_owned(), json));
    mesh["extensionProviders"][0]["envoyFileAccessLog"]["omitEmptyValues"] = json!(true);
    assert_eq!(told(mesh).1, crate::report::format::Format::default().without_empty_values());
}

#[test]
fn overrides_apply_from_the_widest_scope_to_the_narrowest() {
    let wide = json!({"metrics": [{"overrides": [
        {"match": {"metric": "ALL_METRICS"}, "tagOverrides": {"a": {"value": "'wide'"}, "b": {"operation": "REMOVE"}}},
        {"match": {"metric": "REQUEST_SIZE"}, "disabled": true}]}]});
    let narrow = json!({"selector": {"matchLabels": {"app": "a"}}, "metrics": [{"overrides": [
        {"match": {"metric": "REQUEST_COUNT", "mode": "SERVER"}, "tagOverrides": {"a": {"value": "request.host"}}},
        {"match": {"metric": "REQUEST_SIZE", "mode": "CLIENT"}, "disabled": false}]}]});
    let (reporting, statuses) = built(&[telemetry("istio-system", "m", &wide), telemetry("shop", "w", &narrow)]);
    assert!(statuses.is_empty(), "{statuses:?}");
    let (client, server) = (&reporting.client.tags, &reporting.server.tags);
    let a = |plan: &TagPlan, metric| plan.of(metric).set.iter().find(|(n, _)| &**n == "a").map(|(_, v)| v.clone());
    assert_eq!(a(client, Metric::RequestCount), Some(TagValue::Constant("wide".into())));
    assert_eq!((a(server, Metric::RequestCount), server.dynamic), (Some(TagValue::Dynamic(0)), 1));
    assert_eq!(a(server, Metric::TcpOpened), Some(TagValue::Constant("wide".into())));
    assert!(client.of(Metric::RequestCount).removed.iter().any(|r| &**r == "b"));
    assert!(!client.of(Metric::RequestSize).disabled && server.of(Metric::RequestSize).disabled);
    let off = json!({"metrics": [{"overrides": [{"disabled": true}]}]});
    let (reporting, _) = built(&[telemetry("shop", "n", &off)]);
    assert!(reporting.client.tags.is_off() && reporting.server.tags.is_off());
    // Who says anything else of any has all of them again, as in Istio.
    let wide = json!({"metrics": [{"overrides": [{"match": {"metric": "ALL_METRICS"}, "disabled": true}]}]});
    let tagged = json!({"metrics": [{"overrides": [{"match": {"metric": "REQUEST_COUNT", "mode": "CLIENT"}, "tagOverrides": {"a": {"value": "'x'"}}}]}]});
    let (reporting, _) = built(&[telemetry("istio-system", "m", &wide), telemetry("shop", "n", &tagged)]);
    assert!(!reporting.client.tags.of(Metric::RequestSize).disabled && reporting.server.tags.is_off());
}

#[test]
fn what_cannot_be_told_is_remarked_on() {
    let documents = [
        mesh_config(&json!({"extensionProviders": [{"name": "z", "zipkin": {"service": "z", "port": 9411}}]})),
        telemetry(
            "shop",
            "n",
            &json!({"tracing": [{"providers": [{"name": "z"}]}], "accessLogging": [{"providers": [{"name": "nowhere"}]}]}),
        ),
        telemetry("shop", "o", &json!({})),
    ];
    let (_, statuses) = built(&documents);
    let all = statuses.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    for part in [
        "provider \"z\" is of a kind that is not honoured",
        "provider \"nowhere\" does not exist",
        "Telemetry shop/o: metadata.namespace: an older Telemetry",
    ] {
        assert!(all.contains(part), "{part}: {all}");
    }
}
