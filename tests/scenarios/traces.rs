//! Traces of requests, as a collector gets them.

use std::{path::PathBuf, time::Duration};

use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{program, wait_for},
};
use serde_json::Value;

const SEED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpora/seed");

struct Scene {
    bed: Bed,
    client: Pod,
    /// What the collector got, one span to a line.
    file: tempfile::NamedTempFile,
}

const COLLECTOR: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: collector}\nspec: {selector: {app: collector}, ports: [{name: grpc, port: 4317}, {name: http, port: 4318}]}\n";

/// Two nodes, a client and a collector; what `more` makes are their destinations.
fn scene(enrolled: bool) -> Scene {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let file = tempfile::Builder::new().prefix("spans").suffix(".json").tempfile().expect("a file");
    bed.kubectl_apply("collector", COLLECTOR).expect("service");
    let command = vec![program("collector").display().to_string(), file.path().display().to_string()];
    let mut collector = PodSpec { command, port: Some(4317), ..PodSpec::new("collector", 1) }.label("app", "collector");
    if !enrolled {
        collector = collector.label("istio.io/dataplane-mode", "none");
    }
    let client = if enrolled {
        let [client, _] = bed.meshed([PodSpec::new("client", 0).label("app", "client"), collector]).expect("pods");
        client
    } else {
        let [client] = bed.meshed([PodSpec::new("client", 0).label("app", "client")]).expect("client");
        bed.pod(&collector).expect("collector");
        client
    };
    Scene { bed, client, file }
}

impl Scene {
    /// Spans go to this provider, of so many percent of requests.
    fn trace(&self, provider: &str, sampling: &str, more: &str) {
        let mesh = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    extensionProviders:\n    - name: grpc\n      opentelemetry: {service: collector.default.svc.cluster.local, port: 4317, grpc: {timeout: 3s, initialMetadata: [{name: x-team, value: mail}]}}\n    - name: http\n      opentelemetry: {service: collector.default.svc.cluster.local, port: 4318, http: {path: v1/traces, timeout: 5s, headers: [{name: x-team, value: shop}]}}\n    - name: nobody\n      opentelemetry: {service: nobody.default.svc.cluster.local, port: 4317}\n";
        self.bed.apply("mesh", mesh).expect("applied");
        let telemetry = format!(
            "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: mesh, namespace: istio-system}}\nspec: {{tracing: [{{providers: [{{name: {provider}}}], randomSamplingPercentage: {sampling}{more}}}]}}\n"
        );
        self.bed.apply("telemetry", &telemetry).expect("applied");
        self.bed.settle().expect("settled");
        for node in self.bed.nodes() {
            assert!(node.admin_json("/status").expect("status")["remarks"].as_array().is_some_and(Vec::is_empty));
        }
    }

    fn spans(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.file.path()).expect("the file");
        text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
    }

    fn wait_spans(&self, what: &str, enough: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let waited = wait_for(what, Duration::from_secs(10), || Ok(enough(&self.spans())));
        waited.unwrap_or_else(|_| panic!("no {what}: {:#?}", self.spans()));
        self.spans()
    }

    fn get(&self, target: &str, headers: &[&str]) -> Value {
        let mut arguments = vec!["get", target, "1"];
        headers.iter().for_each(|h| arguments.extend(["--header", h]));
        let output = self.bed.run(&self.client, &program("web"), &arguments).expect("web");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    fn total(&self, result: &str) -> f64 {
        let label = format!("result=\"{result}\"");
        self.bed.nodes().iter().map(|n| n.metric("mesh_trace_spans_total", &[&label]).unwrap_or(0.0)).sum()
    }
}

/// The span that another names as its parent.
fn parent<'s>(spans: &'s [Value], of: &Value) -> Option<&'s Value> {
    spans.iter().find(|s| s["span"] == of["parent"])
}

#[test]
fn bookinfo_is_one_trace_of_every_hop() {
    let mut scene = scene(true);
    let files = [format!("{SEED}/01-bookinfo.yaml"), format!("{}/corpora/bookinfo-details-ratings.yaml", env!("CARGO_MANIFEST_DIR"))];
    for (i, path) in files.map(PathBuf::from).iter().enumerate() {
        let pods = scene.bed.kubectl_apply(&format!("bookinfo-{i}"), &std::fs::read_to_string(path).expect("YAML")).expect("bookinfo");
        pods.iter().for_each(|pod| scene.bed.wait_captured(pod, true).expect("captured"));
    }
    scene.trace("grpc", "100", ", customTags: {tenant: {literal: {value: acme}}, agent: {header: {name: user-agent}}, asked: {formatter: {value: '%REQ(:METHOD)% by %PROTOCOL%'}}, pod: {environment: {name: POD_NAME, defaultValue: none}}, home: {environment: {name: HOME, defaultValue: none}}, own: {formatter: {value: '%TRACE_ID%/%SPAN_ID%'}}, told: {formatter: {value: '%RESP(content-type)% to %DOWNSTREAM_PEER_URI_SAN%'}}}");
    // Which version of reviews is asked is chance; one of the three asks no ratings.
    const ASKED: usize = 16;
    let asked = || drop(scene.get("productpage:9080/productpage", &["user-agent: tester/1"]));
    (0..ASKED).for_each(|_| asked());
    let is = |span: &Value, service: &str, kind: u64| {
        span["name"].as_str().is_some_and(|n| n.starts_with(&format!("{service}."))) && span["kind"] == kind
    };
    let ratings =
        |spans: &[Value]| spans.iter().any(|s| is(s, "ratings", 2)) && spans.iter().filter(|s| is(s, "productpage", 3)).count() == ASKED;
    let spans = scene.wait_spans("spans of ratings", ratings);
    let last = spans.iter().find(|s| is(s, "ratings", 2)).expect("one");
    let mut hops = vec![last.clone()];
    wait_for("the whole trace", Duration::from_secs(10), || {
        let spans = scene.spans();
        hops.truncate(1);
        while let Some(next) = parent(&spans, hops.last().expect("one")) {
            hops.push(next.clone());
        }
        Ok(hops.len() == 6)
    })
    .unwrap_or_else(|_| panic!("{hops:#?}"));
    let expected = [("ratings", 2), ("ratings", 3), ("reviews", 2), ("reviews", 3), ("productpage", 2), ("productpage", 3)];
    for (hop, (service, kind)) in hops.iter().zip(expected) {
        assert!(is(hop, service, kind), "{hop:#}");
        assert_eq!(hop["trace"], last["trace"]);
        let own = format!("{}/{}", hop["trace"].as_str().unwrap_or_default(), hop["span"].as_str().unwrap_or_default());
        assert_eq!(hop["attributes"]["own"], own, "{hop:#}");
        let attributes = &hop["attributes"];
        assert_eq!((&attributes["http.method"], &attributes["http.status_code"]), (&"GET".into(), &"200".into()), "{hop:#}");
        assert_eq!((&attributes["response_flags"], &attributes["component"]), (&"-".into(), &"proxy".into()));
        assert_eq!((&attributes["tenant"], &attributes["istio.namespace"]), (&"acme".into(), &"default".into()));
        assert_eq!(attributes["asked"], "GET by HTTP/1.1");
        assert_eq!((&attributes["pod"], &attributes["home"]), (&hop["resource"]["k8s.pod.name"], &"none".into()), "{hop:#}");
        // The pod's own requests come from no peer.
        let peer =
            attributes["told"].as_str().and_then(|told| told.split_once(" to ")).map(|(kind, peer)| (!kind.is_empty(), !peer.is_empty()));
        assert_eq!(peer, Some((true, kind == 2)), "{hop:#}");
        assert!(attributes["guid:x-request-id"].as_str().is_some_and(|id| id.len() == 36), "{hop:#}");
        assert!(
            hop["end"].as_u64() >= hop["start"].as_u64()
                && hop["via"] == "grpc /opentelemetry.proto.collector.trace.v1.TraceService/Export mail"
        );
    }
    assert!(hops.last().is_some_and(|h| h["parent"] == "" && h["attributes"]["agent"] == "tester/1"), "{hops:#?}");
    // Each is told by the pod it is about: the source's by who asks, the destination's by who answers.
    let names = hops.iter().map(|h| h["resource"]["service.name"].as_str().unwrap_or_default()).collect::<Vec<_>>();
    assert_eq!(
        names,
        ["ratings.default", "reviews.default", "reviews.default", "productpage.default", "productpage.default", "client.default"]
    );
    assert!(hops[0]["attributes"]["http.url"].as_str().is_some_and(|u| u.ends_with("/ratings/0")), "{:#}", hops[0]);
    // Sending spans makes none.
    assert!(scene.spans().iter().all(|s| !s["name"].as_str().is_some_and(|n| n.starts_with("collector."))));
    wait_for("all to be counted", Duration::from_secs(5), || Ok(scene.total("exported") >= 24.0)).expect("counted");
    assert!(scene.total("failed") + scene.total("dropped") + scene.total("rejected") < 0.5);
}

fn with_web(enrolled: bool) -> Scene {
    web_of(scene(enrolled))
}

/// Two servers, one on each node.
fn web_of(mut scene: Scene) -> Scene {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    scene.bed.kubectl_apply("web", service).expect("service");
    for (name, node) in [("near", 0), ("far", 1)] {
        let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), name.into()];
        let spec = PodSpec { command, port: Some(8080), ..PodSpec::new(name, node) }.label("app", "web");
        scene.bed.meshed([spec]).expect("server");
    }
    scene
}

#[test]
fn traces_that_come_in_go_on_and_decisions_are_kept() {
    let mut scene = with_web(false);
    scene.trace("http", "0", "");
    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let forms: [Vec<String>; 4] = [
        vec![format!("traceparent: 00-{trace}-{span}-01"), "tracestate: vendor=1".into()],
        vec![format!("b3: {trace}-{span}-1")],
        vec![format!("x-b3-traceid: {trace}"), format!("x-b3-spanid: {span}"), "x-b3-sampled: 1".into()],
        vec![format!("x-b3-traceid: {}", &trace[16..]), format!("x-b3-spanid: {span}"), "x-b3-flags: 1".into()],
    ];
    for (i, form) in forms.iter().enumerate() {
        let path = format!("web:80/form-{i}");
        scene.get(&path, &form.iter().map(String::as_str).collect::<Vec<_>>());
        let of = |spans: &[Value]| {
            let is = |s: &&Value| s["attributes"]["http.url"].as_str().is_some_and(|u| u.ends_with(&format!("/form-{i}")));
            spans.iter().filter(is).cloned().collect::<Vec<_>>()
        };
        let spans = of(&scene.wait_spans("both ends", |spans| of(spans).len() == 2));
        let (client, server) = if spans[0]["kind"] == 3 { (&spans[0], &spans[1]) } else { (&spans[1], &spans[0]) };
        let expected = if i == 3 { format!("{:0>32}", &trace[16..]) } else { trace.to_owned() };
        assert_eq!((&client["trace"], &server["trace"]), (&expected.clone().into(), &expected.into()), "{form:?}");
        assert_eq!((&client["parent"], &server["parent"]), (&span.into(), &client["span"]), "{form:?}");
        assert_eq!((&client["name"], &server["name"]), (&"web.default.svc.cluster.local:80/*".into(), &client["name"]));
        assert_eq!(client["via"], "http /v1/traces shop");
    }
    // Both ends name what was dialled, where several services and ports lead to the same.
    let service = |name: &str, ports: &str| {
        format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: web}}, ports: [{ports}]}}\n")
    };
    let ports = "{name: http, port: 81, targetPort: 8080}, {name: http-alt, port: 8082, targetPort: 8080}";
    scene
        .bed
        .kubectl_apply("others", &(service("aaa", "{name: http, port: 80, targetPort: 8080}") + &service("zzz", ports)))
        .expect("services");
    scene.bed.settle().expect("settled");
    for (asked, name) in [("zzz:8082", "zzz.default.svc.cluster.local:8082/*"), ("zzz:81", "zzz.default.svc.cluster.local:81/*")] {
        scene.get(&format!("{asked}/named"), &[&format!("traceparent: 00-{trace}-{span}-01")]);
        scene.wait_spans(asked, |spans| spans.iter().filter(|s| s["name"] == *name).count() == 2);
    }
    // No sampling of its own, and no decision of another: none.
    scene.get("web:80/undecided", &[]);
    scene.get("web:80/no", &[&format!("traceparent: 00-{trace}-{span}-00")]);
    scene.get("web:80/last", &[&format!("traceparent: 00-{trace}-{span}-01")]);
    let ends = |spans: &[Value], path: &str| {
        spans.iter().filter(|s| s["attributes"]["http.url"].as_str().is_some_and(|u| u.ends_with(path))).count()
    };
    let spans = scene.wait_spans("the last", |spans| ends(spans, "/last") == 2);
    assert_eq!((ends(&spans, "/undecided"), ends(&spans, "/no")), (0, 0));
    // What fails is an error.
    let retries = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: web, namespace: default}\nspec: {hosts: [web], http: [{route: [{destination: {host: web}}], retries: {attempts: 2, retryOn: 5xx}}]}\n";
    scene.bed.apply("retries", retries).expect("applied");
    scene.bed.settle().expect("settled");
    scene.get("web:80/status/503", &[&format!("traceparent: 00-{trace}-{span}-01")]);
    // The request was tried three times: each of them is a span of whoever answered, and all are caused by the one of who asked.
    let spans = scene.wait_spans("the failure", |spans| ends(spans, "/status/503") == 4);
    let failed = spans.iter().filter(|s| s["attributes"]["http.status_code"] == "503").collect::<Vec<_>>();
    assert!(failed.len() == 4 && failed.iter().all(|s| s["status"] == 2 && s["attributes"]["error"] == "true"), "{failed:#?}");
    let asked = failed.iter().find(|s| s["kind"] == 3).expect("the client's");
    assert_eq!(failed.iter().filter(|s| s["kind"] == 2 && s["parent"] == asked["span"]).count(), 3, "{failed:#?}");
    // What was begun elsewhere is told as it was, and handed on.
    let states = spans.iter().filter(|s| s["state"] == "vendor=1").count();
    assert_eq!(states, 2, "{spans:#?}");
}

#[test]
fn a_collector_that_is_not_there_costs_a_counter() {
    let scene = with_web(false);
    scene.trace("nobody", "100", "");
    for i in 0..20 {
        assert_eq!(scene.get(&format!("web:80/{i}"), &[])["statuses"]["200"], 1);
    }
    wait_for("spans that failed", Duration::from_secs(10), || Ok(scene.total("failed") >= 40.0)).expect("counted");
    let said = |node: &mesh_tests::bed::Node| node.log_text().lines().filter(|l| l.contains("spans are lost")).count();
    wait_for("it to be said", Duration::from_secs(5), || Ok(scene.bed.nodes().iter().any(|n| said(n) == 1))).expect("said");
    // One for each node, not one for each batch.
    assert!(scene.bed.nodes().iter().all(|n| said(n) <= 1));
    assert!(scene.total("exported") < 0.5 && scene.spans().is_empty());
    // Sampling of some is of some.
    scene.trace("http", "50", "");
    for i in 0..60 {
        scene.get(&format!("web:80/half-{i}"), &[]);
    }
    let spans = scene.wait_spans("some", |spans| spans.len() > 20);
    std::thread::sleep(Duration::from_secs(2));
    let traces = scene.spans().iter().filter(|s| s["kind"] == 3).count();
    assert!((10..51).contains(&traces), "{traces} of 60; {}", spans.len());
}

/// Rotel, a collector that others have written, reads what the nodes send it.
#[test]
fn a_collector_of_others_understands_the_spans() {
    let rotel = program("web").with_file_name("../tools/rotel/rotel/rotel-agent");
    assert!(rotel.exists(), "{} is missing: cargo xtask test installs it", rotel.display());
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    bed.kubectl_apply("collector", COLLECTOR).expect("service");
    let said = bed.directory.join("rotel.log");
    let command = format!(
        "exec {} start --otlp-grpc-endpoint [::]:4317 --otlp-http-endpoint [::]:4318 --exporter blackhole --debug-log traces --debug-log-verbosity detailed > {} 2>&1",
        rotel.display(),
        said.display()
    );
    let command = vec!["sh".into(), "-c".into(), command];
    let collector = PodSpec { command, port: Some(4317), ..PodSpec::new("collector", 1) }.label("app", "collector");
    let [client, _] = bed.meshed([PodSpec::new("client", 0).label("app", "client"), collector]).expect("pods");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let scene = web_of(Scene { bed, client, file });
    for (provider, trace) in [("grpc", "4bf92f3577b34da6a3ce929d0e0e4736"), ("http", "5bf92f3577b34da6a3ce929d0e0e4736")] {
        scene.trace(provider, "0", ", customTags: {tenant: {literal: {value: acme}}}");
        scene.get(&format!("web:80/{provider}"), &[&format!("traceparent: 00-{trace}-00f067aa0ba902b7-01")]);
        let text = || std::fs::read_to_string(&said).unwrap_or_default();
        let waited = wait_for("two spans", Duration::from_secs(10), || Ok(text().matches(trace).count() >= 2));
        waited.unwrap_or_else(|_| panic!("{provider}: {}", text()));
        for part in ["web.default.svc.cluster.local:80/*", "client.default", "tenant", "acme", "00f067aa0ba902b7"] {
            assert!(text().contains(part), "{part}: {}", text());
        }
    }
    wait_for("all to be counted", Duration::from_secs(5), || Ok(scene.total("exported") >= 4.0)).expect("counted");
}

#[test]
fn what_a_collector_does_not_take_is_tried_again_or_counted() {
    let scene = with_web(false);
    let next = |what: &str| std::fs::write(format!("{}.next", scene.file.path().display()), what).expect("written");
    for provider in ["grpc", "http"] {
        scene.trace(provider, "100", "");
        let before = (scene.total("exported"), scene.total("rejected"), scene.total("failed"));
        next("unavailable");
        let first = format!("/{provider}-1");
        scene.get(&format!("web:80{first}"), &[]);
        // Both spans come, the one after the other or together, whichever was refused first.
        let of = |spans: &[Value], path: &str| {
            spans.iter().filter(|s| s["attributes"]["http.url"].as_str().is_some_and(|u| u.ends_with(path))).count()
        };
        scene.wait_spans("spans that were refused at first", |spans| of(spans, &first) == 2);
        wait_for("them to be counted", Duration::from_secs(5), || Ok(scene.total("exported") >= before.0 + 2.0)).expect("counted");
        next("rejects 1");
        scene.get(&format!("web:80/{provider}-2"), &[]);
        wait_for("one that is rejected", Duration::from_secs(5), || Ok(scene.total("rejected") >= before.1 + 1.0)).expect("counted");
        wait_for("the other", Duration::from_secs(5), || Ok(scene.total("exported") >= before.0 + 3.0)).expect("counted");
        assert!(scene.total("failed") < before.2 + 0.5, "nothing is lost");
    }
}

#[test]
fn a_trace_goes_on_where_no_spans_are_told_and_copies_make_none() {
    let mut scene = with_web(false);
    let echo = "apiVersion: v1\nkind: Service\nmetadata: {name: echo}\nspec: {selector: {app: echo}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    scene.bed.kubectl_apply("echo", echo).expect("service");
    let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), "echo".into()];
    let spec = PodSpec { command, port: Some(8080), ..PodSpec::new("echo", 1) }.label("app", "echo");
    scene.bed.meshed([spec]).expect("echo");
    let routes = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: web, namespace: default}\nspec: {hosts: [web], http: [{route: [{destination: {host: web}}], mirror: {host: echo}}]}\n";
    scene.bed.apply("mirror", routes).expect("applied");
    scene.trace("http", "100", "");
    let of = |spans: &[Value], path: &str| {
        let is = |s: &&Value| s["attributes"]["http.url"].as_str().is_some_and(|u| u.ends_with(path));
        spans.iter().filter(is).cloned().collect::<Vec<_>>()
    };
    scene.get("web:80/copied", &[]);
    let copies = |scene: &Scene| {
        let labels = ["destination_workload=\"echo\"", "reporter=\"destination\""];
        scene.bed.nodes()[1].metric("istio_requests_total", &labels).unwrap_or(0.0)
    };
    wait_for("the copy", Duration::from_secs(10), || Ok(copies(&scene) >= 1.0)).expect("copied");
    scene.wait_spans("both ends", |spans| of(spans, "/copied").len() == 2);
    // Spans go out once a second.
    std::thread::sleep(Duration::from_secs(2));
    let spans = of(&scene.spans(), "/copied");
    assert!(spans.len() == 2 && spans.iter().all(|s| s["name"].as_str().is_some_and(|n| n.starts_with("web."))), "{spans:#?}");
    // The client's spans are not told: the server's are still of its trace, which the client's node has begun.
    let quiet = "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: quiet, namespace: default}\nspec: {selector: {matchLabels: {app: client}}, tracing: [{disableSpanReporting: true}]}\n";
    scene.bed.apply("quiet", quiet).expect("applied");
    scene.bed.settle().expect("settled");
    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    scene.get("web:80/begun", &[]);
    scene.get("web:80/continued", &[&format!("traceparent: 00-{trace}-{span}-01")]);
    // Nobody has decided about this one: the client's node does.
    scene.get("web:80/decided", &[&format!("b3: {trace}-{span}")]);
    let paths = ["/begun", "/continued", "/decided"];
    scene.wait_spans("the server's", |spans| paths.iter().all(|path| !of(spans, path).is_empty()));
    std::thread::sleep(Duration::from_secs(2));
    let [begun, continued, decided] = paths.map(|path| of(&scene.spans(), path));
    assert!(begun.len() == 1 && begun[0]["kind"] == 2 && begun[0]["parent"] != "", "{begun:#?}");
    for spans in [continued, decided] {
        assert!(spans.len() == 1 && spans[0]["kind"] == 2, "{spans:#?}");
        assert_eq!((&spans[0]["trace"], &spans[0]["parent"]), (&trace.into(), &span.into()));
    }
}

#[test]
fn requests_that_are_denied_and_calls_of_grpc_are_spans_too() {
    let scene = with_web(false);
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: default}\nspec: {action: DENY, selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {paths: [/secret]}}]}]}\n";
    scene.bed.apply("deny", deny).expect("applied");
    scene.trace("grpc", "100", "");
    scene.get("web:80/secret", &[]);
    scene.get("web:80/pkg.Service/Call", &["content-type: application/grpc"]);
    let of = |spans: &[Value], path: &str| {
        let is = |s: &&Value| s["attributes"]["http.url"].as_str().is_some_and(|u| u.ends_with(path));
        spans.iter().filter(is).cloned().collect::<Vec<_>>()
    };
    let spans = scene.wait_spans("all", |spans| of(spans, "/secret").len() == 2 && of(spans, "/pkg.Service/Call").len() == 2);
    for span in of(&spans, "/secret") {
        // A denial is an answer, and no failure of the server.
        assert_eq!((&span["attributes"]["http.status_code"], &span["attributes"]["error"]), (&"403".into(), &Value::Null), "{span:#}");
    }
    for span in of(&spans, "/pkg.Service/Call") {
        assert_eq!(span["attributes"]["grpc.path"], "/pkg.Service/Call", "{span:#}");
    }
}
