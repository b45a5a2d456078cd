//! What routes and destination rules do to requests of real pods, on two nodes, through the kernel and HBONE.

use std::time::Duration;

use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{program, wait_for},
};
use serde_json::Value;

const SEED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpora/seed");

/// A web server with a version, of app `web`.
fn web(version: &str, node: usize, more: &[&str]) -> PodSpec {
    let mut command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), version.into()];
    command.extend(more.iter().map(|m| (*m).to_owned()));
    PodSpec { command, port: Some(8080), ..PodSpec::new(&format!("web-{version}"), node) }.label("app", "web").label("version", version)
}

struct Scene {
    bed: Bed,
    client: Pod,
}

/// A client on the first node, servers as given, and a service `web` with ports for HTTP and gRPC.
fn scene<const N: usize>(servers: [PodSpec; N]) -> Scene {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: grpc, port: 81, targetPort: 8081}, {name: undeclared, port: 82, targetPort: 8080}]}\n";
    bed.kubectl_apply("web", service).expect("service");
    let [client] = bed.meshed([PodSpec::new("client", 0)]).expect("client");
    bed.meshed(servers).expect("servers");
    Scene { bed, client }
}

impl Scene {
    fn apply(&self, yaml: &str) {
        self.bed.apply("rules", yaml).expect("applied");
        self.bed.settle().expect("settled");
    }

    fn web(&self, arguments: &[&str]) -> Value {
        let output = self.bed.run(&self.client, &program("web"), arguments).expect("web");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
            panic!("{arguments:?}: {e}: {} {}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
        })
    }

    fn get(&self, path: &str, count: u32, headers: &[&str]) -> Value {
        let (url, count) = (format!("web:80{path}"), count.to_string());
        let mut arguments = vec!["get", &url, &count];
        headers.iter().for_each(|h| arguments.extend(["--header", h]));
        self.web(&arguments)
    }

    fn idle(&self) {
        wait_for("no request is under way", Duration::from_secs(15), || {
            let mut none = true;
            for node in self.bed.nodes() {
                none &= node.metric("mesh_http_active_requests", &[])? < 0.5;
            }
            Ok(none)
        })
        .expect("all gauges are back to nought");
    }
}

fn count(report: &Value, what: &str, key: &str) -> u64 {
    report[what][key].as_u64().unwrap_or(0)
}

const SUBSETS: &str = "subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]";

fn rules(http: &str, policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: web}}\nspec:\n  hosts: [web]\n  http: {http}\n---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: web}}\nspec: {{host: web, {policy}}}\n"
    )
}

#[test]
fn weights_headers_and_paths_decide_over_two_nodes() {
    let scene = scene([web("v1", 0, &[]), web("v2", 1, &[])]);
    let to = |v: &str| format!("{{destination: {{host: web, subset: {v}}}}}");
    scene.apply(&rules(
        "[{route: [{weight: 90, destination: {host: web, subset: v1}}, {weight: 10, destination: {host: web, subset: v2}}]}]",
        SUBSETS,
    ));
    let report = scene.get("/x", 1000, &[]);
    // Binomial with p = 0.1: four sigma is 38.
    assert!(count(&report, "versions", "v2").abs_diff(100) <= 38 && count(&report, "statuses", "200") == 1000, "{report}");
    scene.apply(&rules(
        &format!(
            "[{{match: [{{headers: {{user: {{exact: jason}}}}}}, {{uri: {{prefix: /api/v2}}}}], route: [{}]}}, {{route: [{}]}}]",
            to("v2"),
            to("v1")
        ),
        SUBSETS,
    ));
    for (path, headers, expected) in [
        ("/x", &["user: jason"][..], "v2"),
        ("/x", &["user: jasonx"], "v1"),
        ("/api/v2/x", &[], "v2"),
        ("/api/v1/x", &[], "v1"),
        ("/x?q=/api/v2", &[], "v1"),
    ] {
        let report = scene.get(path, 5, headers);
        assert_eq!(count(&report, "versions", expected), 5, "{path} {headers:?}: {report}");
    }
    // On a port that declares nothing the first bytes tell.
    let undeclared = scene.web(&["get", "web:82/api/v2/x", "5"]);
    assert_eq!(count(&undeclared, "versions", "v2"), 5, "{undeclared}");
    // Over both families, and the server sees the client pod's own address, through the tunnel and on the node.
    let services = scene.bed.nodes()[0].admin_json("/services").expect("services");
    let web = services.as_array().into_iter().flatten().find(|s| s["name"] == "web").expect("web");
    let vips = web["addresses"].as_array().expect("addresses").iter().map(|a| a.as_str().expect("text"));
    for (vip, own) in vips.zip([scene.client.v4(), scene.client.v6()]) {
        let to: std::net::SocketAddr = (vip.parse::<std::net::IpAddr>().expect("an address"), 80).into();
        for (header, version) in [("user: jason", "v2"), ("user: other", "v1")] {
            let report = scene.web(&["get", &format!("{to}/client"), "3", "--header", header]);
            assert_eq!((count(&report, "versions", version), &report["body"]), (3, &own.to_string().into()), "{to} {header}: {report}");
        }
    }
    scene.idle();
}

#[test]
fn a_service_prefers_endpoints_of_the_client_s_node_if_it_says_so() {
    let mut scene = scene([web("v2", 1, &[])]);
    let [near] = scene.bed.meshed([web("v1", 0, &[])]).expect("a server");
    let far = |report: &Value| count(report, "versions", "v2");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: near}\nspec: {trafficDistribution: PreferSameNode, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp, port: 81, targetPort: 8080}]}\n";
    scene.bed.kubectl_apply("near", service).expect("service");
    scene.bed.settle().expect("settled");
    assert!(far(&scene.get("/", 40, &[])) > 0, "who says nothing gets all");
    for port in [80, 81] {
        let report = scene.web(&["get", &format!("near:{port}/"), "40"]);
        assert_eq!((count(&report, "versions", "v1"), far(&report)), (40, 0), "{port}: {report}");
    }
    // With nobody left there the others are as good.
    scene.bed.set_ready(&near, false).expect("unready");
    scene.bed.settle().expect("settled");
    for port in [80, 81] {
        let report = scene.web(&["get", &format!("near:{port}/"), "10"]);
        assert_eq!(far(&report), 10, "{port}: {report}");
    }
}

#[test]
fn rewrites_headers_redirects_faults_and_timeouts_are_what_the_client_sees() {
    let scene = scene([web("v1", 1, &[])]);
    let route = "route: [{destination: {host: web}}]";
    scene.apply(&rules(
        &format!(
            "[{{match: [{{uri: {{prefix: /old/}}}}], rewrite: {{uri: /headers/}}, headers: {{request: {{set: {{x-set: '1'}}}}}}, {route}}},
              {{match: [{{uri: {{prefix: /late}}}}], rewrite: {{uri: /sleep/2000}}, timeout: 300ms, {route}}},
              {{match: [{{uri: {{prefix: /abort}}}}], fault: {{abort: {{httpStatus: 418, percentage: {{value: 100}}}}}}, {route}}},
              {{match: [{{uri: {{prefix: /delay}}}}], fault: {{delay: {{fixedDelay: 400ms, percentage: {{value: 100}}}}}}, {route}}},
              {{match: [{{uri: {{prefix: /moved}}}}], redirect: {{uri: /there, redirectCode: 302}}}},
              {{match: [{{uri: {{prefix: /gone}}}}], route: [{{destination: {{host: nobody}}}}]}},
              {{match: [{{uri: {{prefix: /x}}}}], {route}}}]"
        ),
        SUBSETS,
    ));
    let report = scene.get("/old/x", 1, &[]);
    let headers: Value = serde_json::from_str(report["body"].as_str().expect("a body")).expect("headers");
    assert!(headers["x-set"] == "1" && headers["x-envoy-original-path"] == "/old/x" && headers["x-forwarded-proto"] == "http", "{headers}");
    for (path, status) in
        [("/late", "504"), ("/abort", "418"), ("/delay", "200"), ("/moved", "302"), ("/gone", "503"), ("/nothing", "404"), ("/x", "200")]
    {
        let report = scene.get(path, 3, &[]);
        assert_eq!(count(&report, "statuses", status), 3, "{path}: {report}");
    }
    assert!(scene.get("/delay", 1, &[])["slowestMilliseconds"].as_u64().expect("a time") >= 400);
    let remarks = scene.bed.nodes()[0].admin("/status").expect("status");
    assert!(remarks.contains("nobody") && remarks.contains("no such Service"), "{remarks}");
}

#[test]
fn retries_hide_a_failing_replica_which_is_ejected_and_comes_back() {
    let scene = scene([web("v1", 0, &[]), web("v2", 1, &["--fail", "503"])]);
    let plain = "[{retries: {attempts: 0}, route: [{destination: {host: web}}]}]";
    scene.apply(&rules(plain, SUBSETS));
    let report = scene.get("/x", 200, &[]);
    assert!(count(&report, "statuses", "503") > 40, "half of them fail: {report}");
    scene.apply(&rules("[{retries: {attempts: 3, retryOn: 5xx}, route: [{destination: {host: web}}]}]", SUBSETS));
    let report = scene.get("/x", 200, &[]);
    assert_eq!(count(&report, "statuses", "200"), 200, "retries hide it: {report}");
    let outlier =
        "trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3, interval: 500ms, baseEjectionTime: 2s, maxEjectionPercent: 50}}";
    scene.apply(&rules(plain, outlier));
    scene.get("/x", 30, &[]);
    let report = scene.get("/x", 100, &[]);
    assert_eq!(count(&report, "statuses", "200"), 100, "the failing one is left out: {report}");
    let told = scene.bed.nodes()[0].admin_json("/explain?from=default/client&to=web:80&method=GET&path=/x").expect("explained").to_string();
    assert!(told.contains("\"ejected\":true"), "{told}");
    // It heals, and its time passes: it is asked again.
    let failing = scene.bed.nodes()[0].admin_json("/services").expect("services");
    let address = failing.as_array().into_iter().flatten().find(|s| s["name"] == "web").expect("web")["ports"][0]["endpoints"].clone();
    let addresses =
        address.as_array().expect("endpoints").iter().map(|e| e["address"].as_str().expect("an address").to_owned()).collect::<Vec<_>>();
    for address in &addresses {
        scene.web(&["get", &format!("{address}/heal"), "1"]);
    }
    wait_for("the replica to be back", Duration::from_secs(15), || Ok(count(&scene.get("/x", 40, &[]), "versions", "v2") > 5))
        .expect("back");
}

#[test]
fn a_breaker_opens_under_load_and_closes_after_it() {
    let scene = scene([web("v1", 1, &[])]);
    let limits = "trafficPolicy: {connectionPool: {tcp: {maxConnections: 2}, http: {http1MaxPendingRequests: 1}}}";
    scene.apply(&rules("[{retries: {attempts: 0}, route: [{destination: {host: web}}]}]", limits));
    let report = scene.web(&["get", "web:80/sleep/300", "40", "8"]);
    let (good, refused) = (count(&report, "statuses", "200"), count(&report, "statuses", "503"));
    assert!(good >= 5 && refused >= 10 && good + refused == 40, "{report}");
    let flagged = scene.bed.nodes()[0].metric("istio_requests_total", &["response_code=\"503\"", "response_flags=\"UO\""]).expect("metric");
    assert!((flagged - f64::from(u32::try_from(refused).expect("few"))).abs() < 0.5, "{flagged} are flagged UO, {refused} were refused");
    let report = scene.get("/x", 50, &[]);
    assert_eq!(count(&report, "statuses", "200"), 50, "closed again: {report}");
}

/// Whatever way it is reached: here its node is there and does not answer.
#[test]
fn an_endpoint_that_takes_no_connection_costs_as_much_time_as_the_rule_says() {
    let scene = scene([web("v1", 1, &[])]);
    let limits = "trafficPolicy: {connectionPool: {tcp: {connectTimeout: 500ms}, http: {maxRequestsPerConnection: 1}}}";
    scene.apply(&rules("[{retries: {attempts: 0}, route: [{destination: {host: web}}]}]", limits));
    assert_eq!(count(&scene.get("/x", 1, &[]), "statuses", "200"), 1);
    scene.bed.nodes()[1].signal(nix::sys::signal::Signal::SIGSTOP);
    let began = std::time::Instant::now();
    let report = scene.get("/x", 1, &[]);
    let took = began.elapsed();
    scene.bed.nodes()[1].signal(nix::sys::signal::Signal::SIGCONT);
    assert_eq!(count(&report, "statuses", "503"), 1, "{report}");
    assert!((Duration::from_millis(450)..Duration::from_secs(5)).contains(&took), "{took:?}, not the twenty seconds a tunnel may take");
}

#[test]
fn a_mirror_gets_a_copy_and_changes_nothing() {
    let scene = scene([web("v1", 0, &[]), web("v2", 1, &["--fail", "500"])]);
    scene.apply(&rules(
        "[{route: [{destination: {host: web, subset: v1}}], mirror: {host: web, subset: v2}, mirrorPercentage: {value: 100}}]",
        SUBSETS,
    ));
    let report = scene.get("/x", 100, &[]);
    assert!(count(&report, "statuses", "200") == 100 && count(&report, "versions", "v1") == 100, "{report}");
    scene.idle();
    scene.apply(&rules("[{route: [{destination: {host: web, subset: v2}}]}]", SUBSETS));
    scene.get("/heal", 1, &[]);
    let served: u64 = scene.get("/served", 1, &[])["body"].as_str().expect("a body").parse().expect("a number");
    assert_eq!(served, 102, "100 copies, one to heal, one to ask");
}

#[test]
fn grpc_streams_both_ways_with_trailers_and_protocols_are_switched() {
    for node in [0, 1] {
        let scene = scene([web("v1", node, &[])]);
        let report = scene.web(&["grpc", "web:81"]);
        assert_eq!((&report["Unary"]["status"], &report["Unary"]["echoed"]), (&"0".into(), &1.into()), "{report}");
        assert_eq!(
            (&report["Stream"]["status"], &report["Stream"]["sum"], &report["Stream"]["echoed"]),
            (&"0".into(), &"100".into(), &100.into()),
            "{report}"
        );
        assert_eq!(report["Fail"]["status"], "9", "{report}");
        let report = scene.web(&["upgrade", "web:80/upgrade"]);
        assert!(
            report["line"].as_str().is_some_and(|l| l.contains("101")) && report["said"] == serde_json::json!(["first", "second", "third"]),
            "{report}"
        );
        assert_eq!(report["rest"], 0, "the end of one side is the end of the other: {report}");
        scene.idle();
    }
}

#[test]
fn a_gigabyte_streams_both_ways_in_bounded_memory() {
    const GIGABYTE: u64 = 1 << 30;
    let scene = scene([web("v1", 1, &[])]);
    scene.get("/x", 20, &[]);
    let before = scene.bed.nodes().iter().map(|n| n.resident().expect("resident")).max().expect("nodes");
    let report = scene.web(&["upload", "web:80/sink", &GIGABYTE.to_string()]);
    assert_eq!(report["counted"], GIGABYTE.to_string(), "{report}");
    let report = scene.web(&["download", &format!("web:80/bytes/{GIGABYTE}"), &GIGABYTE.to_string()]);
    assert_eq!(report["came"], GIGABYTE, "{report}");
    for node in scene.bed.nodes() {
        let grown = node.resident().expect("resident").saturating_sub(before);
        // The allocator has given back up to 28 MB of what starting took, by the time that is measured against, or has not.
        assert!(grown < 48 << 20, "{}: grew by {grown} bytes", node.name);
    }
    scene.idle();
}

#[test]
fn a_thousand_aborted_requests_leave_nothing_behind() {
    let scene = scene([web("v1", 1, &[])]);
    scene.get("/x", 50, &[]);
    let report = scene.web(&["abort", "web:80/sink", "1000"]);
    assert_eq!(report["aborted"], 1000, "{report}");
    scene.idle();
    wait_for("no connection is left", Duration::from_secs(15), || {
        let mut left = 0.0;
        for node in scene.bed.nodes() {
            left += node.metric("mesh_open_connections", &[])?;
        }
        // One kept for the next request, at its destination's side.
        Ok(left < 12.0)
    })
    .expect("gone");
    assert_eq!(count(&scene.get("/x", 50, &[]), "statuses", "200"), 50);
}

#[test]
fn routes_change_under_load_without_a_failed_request() {
    let scene = scene([web("v1", 0, &[]), web("v2", 1, &[])]);
    let to = |v: &str| rules(&format!("[{{route: [{{destination: {{host: web, subset: {v}}}}}]}}]"), SUBSETS);
    scene.apply(&to("v1"));
    let mut command =
        scene.bed.command(&scene.client, &program("web"), &["get", "web:80/x", "1", "8", "--seconds", "6", "--pause-millis", "1"]);
    let load = command.stdout(std::process::Stdio::piped()).spawn().expect("load");
    for i in 0..20 {
        scene.apply(&to(if i % 2 == 0 { "v2" } else { "v1" }));
        std::thread::sleep(Duration::from_millis(150));
    }
    let output = load.wait_with_output().expect("ended");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert_eq!(report["errors"], serde_json::json!({}), "{report}");
    assert!(report["statuses"].as_object().is_some_and(|s| s.len() == 1 && s.contains_key("200")), "{report}");
    assert!(count(&report, "versions", "v1") > 100 && count(&report, "versions", "v2") > 100, "both were used: {report}");
}

#[test]
fn a_policy_of_the_destination_is_a_403_to_its_clients_and_live() {
    for node in [0, 1] {
        let scene = scene([web("v1", node, &[])]);
        assert_eq!(count(&scene.get("/x", 10, &[]), "statuses", "200"), 10);
        // Also over connections that are open and kept.
        let arguments = ["get", "web:80/x", "1", "2", "--seconds", "3", "--pause-millis", "20"];
        let mut command = scene.bed.command(&scene.client, &program("web"), &arguments);
        let load = command.stdout(std::process::Stdio::piped()).spawn().expect("load");
        std::thread::sleep(Duration::from_secs(1));
        scene.apply("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {action: DENY, rules: [{from: [{source: {principals: ['*/sa/client']}}]}]}\n");
        std::thread::sleep(Duration::from_millis(500));
        let report = scene.get("/x", 10, &[]);
        assert_eq!(count(&report, "statuses", "403"), 10, "node {node}: {report}");
        let output = load.wait_with_output().expect("ended");
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
        assert!(count(&report, "statuses", "200") > 20 && count(&report, "statuses", "403") > 20, "node {node}: {report}");
        scene.bed.withdraw("rules").expect("withdrawn");
        scene.bed.settle().expect("settled");
        assert_eq!(count(&scene.get("/x", 10, &[]), "statuses", "200"), 10);
    }
}

/// A rule says who may be reached by whoever follows it, on either node, in HTTP and otherwise, also over connections that are kept.
#[test]
fn who_may_be_reached_is_named_by_subject_alt_names() {
    for node in [0, 1] {
        let mut scene = scene([web("v1", node, &[])]);
        let tcp = "apiVersion: v1\nkind: Service\nmetadata: {name: opaque}\nspec: {selector: {app: web}, ports: [{name: tcp, port: 80, targetPort: 8080}]}\n";
        scene.bed.kubectl_apply("opaque", tcp).expect("service");
        scene.bed.settle().expect("settled");
        let answered = || {
            let opaque = scene.web(&["get", "opaque:80/x", "3"]);
            [count(&scene.get("/x", 3, &[]), "statuses", "200"), count(&opaque, "statuses", "200")]
        };
        assert_eq!(answered(), [3, 3], "node {node}");
        for (names, expected) in [("[nobody]", 0), ("[nobody, 'spiffe://cluster.local/ns/default/sa/web-v1']", 3), ("[]", 3)] {
            let tls = format!("{{mode: ISTIO_MUTUAL, subjectAltNames: {names}}}");
            let rule = |host: &str| {
                format!(
                    "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {host}}}\nspec: {{host: {host}, trafficPolicy: {{tls: {tls}}}}}\n"
                )
            };
            scene.apply(&format!("{}---\n{}", rule("web"), rule("opaque")));
            assert_eq!(answered(), [expected; 2], "node {node}: {names}");
        }
    }
}

/// Bookinfo with the rest of its services, and a client.
fn bookinfo() -> Scene {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    for path in [format!("{SEED}/01-bookinfo.yaml"), format!("{}/corpora/bookinfo-details-ratings.yaml", env!("CARGO_MANIFEST_DIR"))] {
        let pods = bed.kubectl_apply("bookinfo", &std::fs::read_to_string(path).expect("YAML")).expect("bookinfo");
        pods.iter().for_each(|p| bed.wait_captured(p, true).expect("captured"));
    }
    let [client] = bed.meshed([PodSpec::new("client", 0)]).expect("client");
    Scene { bed, client }
}

#[test]
fn seed_manifests_do_on_bookinfo_what_their_comments_say() {
    let scene = bookinfo();
    let seed = |name: &str| std::fs::read_to_string(format!("{SEED}/{name}.yaml")).expect("seed");
    let canary = seed("03-canary-90-10");
    let subsets = canary.split("---").nth(1).expect("the rule").to_owned();
    let apply = |name: &str| scene.apply(&format!("{}\n---\n{subsets}", seed(name)));
    let get = |path: &str, n: u32, headers: &[&str]| {
        let (url, n) = (format!("reviews:9080{path}"), n.to_string());
        let mut arguments = vec!["get", &url, &n, "4"];
        headers.iter().for_each(|h| arguments.extend(["--header", h]));
        scene.web(&arguments)
    };
    let only = |report: &Value, version: &str, n: u64| assert_eq!(count(report, "versions", version), n, "{report}");
    scene.apply(&canary);
    for name in ["", "18-gray-weight"] {
        if !name.is_empty() {
            apply(name);
        }
        let report = get("/reviews/0", 1000, &[]);
        assert!(count(&report, "versions", "v2").abs_diff(100) <= 38 && count(&report, "versions", "v3") == 0, "{name}: {report}");
    }
    for (name, header) in
        [("04-route-by-header", "user: jason"), ("19-gray-user", "user: beta-tester"), ("20-gray-region", "x-region: beijing")]
    {
        apply(name);
        only(&get("/reviews/0", 20, &[header]), "v2", 20);
        only(&get("/reviews/0", 20, &["user: other"]), "v1", 20);
    }
    apply("05-route-by-uri-prefix");
    only(&get("/api/v2/reviews", 8, &[]), "v2", 8);
    only(&get("/reviews/0", 8, &[]), "v1", 8);
    for name in ["06-timeout", "07-retries", "09-mirror"] {
        apply(name);
        only(&get("/reviews/0", 20, &[]), "v1", 20);
    }
    apply("10-fault-delay");
    let report = get("/reviews/0", 100, &[]);
    assert!(
        report["slowestMilliseconds"].as_u64().is_some_and(|ms| (5000..7000).contains(&ms)) && count(&report, "statuses", "200") == 100,
        "{report}"
    );
    apply("11-fault-abort");
    let report = get("/reviews/0", 1000, &[]);
    assert!(count(&report, "statuses", "500").abs_diff(100) <= 38 && count(&report, "statuses", "200") > 800, "{report}");
    scene.apply(&seed("08-circuit-breaker"));
    let report = get("/reviews/0", 40, &[]);
    assert_eq!(count(&report, "statuses", "200"), 40, "{report}");
    let remarks = scene.bed.nodes()[0].admin("/status").expect("status");
    assert!(!remarks.contains("VirtualService") && !remarks.contains("DestinationRule"), "{remarks}");
}

/// A Service that has one address family is reached whichever its client dialled: by its routes, and at layer 4.
#[test]
fn endpoints_of_the_other_family_are_used_where_there_are_no_others() {
    let scene = scene([web("v1", 0, &[]), web("v2", 1, &[])]);
    let pods = [1, 2].map(|n| scene.bed.pods().find(|p| p.name == format!("web-v{n}")).cloned().expect("a pod"));
    let slice = |index: usize| {
        let endpoints = pods.iter().map(|pod| format!("{{addresses: [\"{}\"]}}", pod.addresses[index])).collect::<Vec<_>>().join(", ");
        let family = ["IPv4", "IPv6"][index];
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: front}}\nspec: {{clusterIPs: [10.97.0.8], ports: [{{name: http, port: 80}}]}}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {{name: only}}\nspec: {{clusterIPs: [10.97.0.9, \"fd00:97::9\"], ports: [{{name: http, port: 80}}, {{name: tcp, port: 90}}]}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\nmetadata: {{name: only-1, labels: {{kubernetes.io/service-name: only}}}}\n\
             ports: [{{name: http, port: 8080}}, {{name: tcp, port: 8080}}]\nendpoints: [{endpoints}]\n---\n\
             apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: front}}\nspec: {{hosts: [front], http: [{{route: [{{destination: {{host: only, port: {{number: 80}}}}}}]}}]}}\n"
        )
    };
    for index in [0, 1] {
        scene.apply(&slice(index));
        for to in ["10.97.0.8:80", "10.97.0.9:80", "[fd00:97::9]:80", "10.97.0.9:90", "[fd00:97::9]:90"] {
            let report = scene.web(&["get", &format!("{to}/"), "20"]);
            assert_eq!(count(&report, "statuses", "200"), 20, "{index} {to}: {report}");
            if to.ends_with(":80") {
                assert!(count(&report, "versions", "v1") > 0 && count(&report, "versions", "v2") > 0, "{index} {to}: {report}");
            }
            // The application sees the client's address of its own family.
            let seen = scene.web(&["get", &format!("{to}/client"), "1"])["body"].clone();
            assert_eq!(seen, scene.client.addresses[index].to_string(), "{to}");
        }
    }
}
