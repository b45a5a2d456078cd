//! Connections between pods of one node past the proxy: which go so, that policy, counting and cutting are those of any other, and
//! that they outlive the process.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData};
use mesh_common::direct::{Flow, MAX_FLOWS};
use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{AMBIENT, program, wait_for},
};
use serde_json::Value;

fn start(bed: &Bed, pod: &Pod, arguments: &[&str]) -> Child {
    bed.command(pod, &program("probe"), arguments).stdout(Stdio::piped()).spawn().expect("started")
}

fn end(child: Child) -> Value {
    let output = child.wait_with_output().expect("ended");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stdout)))
}

fn connections(bed: &Bed) -> Vec<Value> {
    bed.nodes()[0].admin_json("/direct").expect("direct")["connections"].as_array().cloned().expect("connections")
}

fn direct(bed: &Bed) -> f64 {
    bed.nodes()[0].metric("mesh_capture_events_total", &["\"direct\""]).unwrap_or(0.0)
}

fn indirect(bed: &Bed, reason: &str) -> f64 {
    bed.nodes()[0].metric("mesh_indirect_connections_total", &[&format!("reason=\"{reason}\"")]).unwrap_or(0.0)
}

/// What a reporter has counted of connections to the server.
fn counted(bed: &Bed, metric: &str, reporter: &str) -> f64 {
    let reporter = format!("reporter=\"{reporter}\"");
    bed.nodes()[0].metric(metric, &[&reporter, "destination_app=\"server\""]).unwrap_or(0.0)
}

/// Flows and routes in the kernel.
fn entries(bed: &Bed, map: &str) -> usize {
    mesh_node::capture::count_entries(&bed.nodes()[0].pinned("maps").join(map)).expect("the map")
}

fn policy(bed: &Bed, name: &str, spec: &str) {
    let yaml = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: default}}\nspec: {spec}\n"
    );
    bed.apply(name, &yaml).expect("applied");
    bed.settle().expect("settled");
}

/// A client and a server on one node, and a service before the server.
fn scene(options: &NodeOptions) -> (Bed, Pod, Pod, [String; 2]) {
    let mut bed = Bed::ambient(options).expect("bed");
    // Another service leads to the same port, and is before it by name.
    let also = "apiVersion: v1\nkind: Service\nmetadata: {name: also}\nspec: {selector: {app: server}, ports: [{name: tcp, port: 7000, targetPort: 8080}]}\n";
    bed.kubectl_apply("also", also).expect("service");
    let (v4, v6) = bed.service("default", "server", 7000, 8080).expect("service");
    let server = PodSpec::server("server", 0).label("app", "server");
    let [client, server] = bed.meshed([PodSpec::new("client", 0).label("app", "client"), server]).expect("pods");
    bed.settle().expect("settled");
    let services = [v4, v6].map(|ip| SocketAddr::new(ip, 7000).to_string());
    (bed, client, server, services)
}

#[test]
fn opaque_connections_go_directly_and_are_counted_and_logged_by_both_reporters() {
    let (bed, client, server, services) = scene(&NodeOptions::default());
    let ways = [server.address(8080), server.address6(8080), services[0].clone(), services[1].clone()];
    for (n, to) in ways.iter().enumerate() {
        for mapped in [false, true] {
            let mut arguments = vec!["names", to];
            arguments.extend(mapped.then_some("--mapped"));
            let report = bed.probe(&client, &arguments).expect("a report");
            assert_eq!(report["peername"], report["dialled"], "{report}");
            assert_eq!(report["sockname"], report["server"]["peer"], "the server sees the client's own address and port: {report}");
            assert_eq!(direct(&bed), (2 * n + usize::from(mapped) + 1) as f64, "{to}");
        }
    }
    let upload = bed.probe(&client, &["upload", &services[0], "1000000"]).expect("a report");
    assert_eq!(upload["received"], 1_000_000);
    wait_for("all counted", Duration::from_secs(5), || Ok(entries(&bed, "FLOWS") == 0)).expect("counted");
    for reporter in ["source", "destination"] {
        assert_eq!(counted(&bed, "istio_tcp_connections_opened_total", reporter), 9.0, "{reporter}");
        assert_eq!(counted(&bed, "istio_tcp_connections_closed_total", reporter), 9.0, "{reporter}");
        // Eight times "who\n", and the upload with its line.
        assert_eq!(counted(&bed, "istio_tcp_received_bytes_total", reporter), 8.0 * 4.0 + 1_000_007.0, "{reporter}");
    }
    // Where no service was dialled it is the first that leads there.
    for (service, dialled) in [("server", 5.0), ("also", 4.0)] {
        let service = format!("destination_service_name=\"{service}\"");
        let labels = ["reporter=\"destination\"", &service];
        assert_eq!(bed.nodes()[0].metric("istio_tcp_connections_opened_total", &labels).unwrap_or(0.0), dialled, "{service}");
    }
    let log = || bed.nodes()[0].access_log();
    let of = |l: &String, direction: &str, bytes: &str| l.contains(direction) && l.contains(bytes) && l.contains("sa/client");
    let told = |l: &String| of(l, "outbound", "bytes_sent=1000007") || of(l, "inbound", "bytes_recv=1000007");
    let uploads = || log().iter().filter(|l| told(l)).count();
    wait_for("both lines", Duration::from_secs(5), || Ok(uploads() == 2)).unwrap_or_else(|_| panic!("{:#?}", log()));
    assert_eq!(indirect(&bed, "unused"), 0.0);
}

#[test]
fn what_policy_does_not_allow_whatever_it_carries_takes_the_proxy_and_what_it_comes_to_deny_is_cut() {
    let (bed, client, server, services) = scene(&NodeOptions::default());
    let works = |to: &str| bed.probe(&client, &["ask", to, "ping"]).expect("a report")["answer"] == "pong";
    assert!(works(&services[0]) && direct(&bed) == 1.0);
    // Allowed by name: still decided before it is dialled.
    policy(&bed, "by-name", r#"{action: ALLOW, rules: [{from: [{source: {principals: ["cluster.local/ns/default/sa/client"]}}]}]}"#);
    assert!(works(&services[0]) && works(&server.address(8080)));
    assert_eq!(direct(&bed), 3.0);
    let steady = [start(&bed, &client, &["steady", &services[0], "20"]), start(&bed, &client, &["steady", &services[1], "20"])];
    wait_for("two open", Duration::from_secs(5), || Ok(connections(&bed).len() == 2)).expect("open");
    assert_eq!(connections(&bed)[0]["service"], "default/server");
    policy(&bed, "by-name", r#"{action: ALLOW, rules: [{from: [{source: {principals: ["cluster.local/ns/default/sa/another"]}}]}]}"#);
    for child in steady {
        let report = end(child);
        assert!(report["afterMilliseconds"].as_u64().is_some_and(|ms| ms < 10_000), "cut: {report}");
    }
    let before = direct(&bed);
    assert!(!works(&services[0]) && !works(&server.address(8080)));
    assert_eq!(direct(&bed), before);
    let log = bed.nodes()[0].access_log();
    assert_eq!(log.iter().filter(|l| l.contains("due to policy change")).count(), 4, "{log:#?}");
    assert_eq!((entries(&bed, "FLOWS"), connections(&bed).len()), (0, 0));
    // Nothing but the connections was cut: plaintext from outside the mesh is still taken.
    bed.withdraw("by-name").expect("withdrawn");
    bed.settle().expect("settled");
    let outside = bed.nodes()[0].run(&program("probe"), &["ask", &server.address(8080), "ping"]).expect("run");
    assert!(String::from_utf8_lossy(&outside.stdout).contains("pong"), "{outside:?}");
    policy(&bed, "by-name", r#"{action: AUDIT, rules: [{}]}"#);
    assert!(works(&services[0]));
    assert_eq!((direct(&bed), indirect(&bed, "policy")), (before, 1.0), "what has to be told is told by the proxy");
}

#[test]
fn connections_go_on_without_the_process_and_the_next_one_sees_to_them() {
    let (mut bed, client, _server, services) = scene(&NodeOptions::default());
    let steady = start(&bed, &client, &["steady", &services[0], "15"]);
    wait_for("one open", Duration::from_secs(5), || Ok(connections(&bed).len() == 1)).expect("open");
    let bytes = |bed: &Bed| counted(bed, "istio_tcp_received_bytes_total", "destination");
    wait_for("counted as it goes", Duration::from_secs(10), || Ok(bytes(&bed) > 0.0)).expect("counted");
    let first = bytes(&bed);
    bed.node(0).kill();
    std::thread::sleep(Duration::from_secs(1));
    let refused = bed.probe(&client, &["ask", &services[0], "ping"]).expect("a report");
    assert!(refused["error"].is_string(), "closed without a process: {refused}");
    bed.node(0).start().expect("started");
    bed.nodes()[0].wait_ready().expect("ready");
    wait_for("found again", Duration::from_secs(10), || Ok(connections(&bed).len() == 1)).expect("open");
    // And a stop in good order: nothing is said of it.
    let second = bytes(&bed);
    bed.node(0).stop().expect("stopped");
    assert!(!bed.nodes()[0].access_log().iter().any(|l| l.contains("shutting down")));
    bed.node(0).start().expect("started");
    bed.nodes()[0].wait_ready().expect("ready");
    let report = end(steady);
    assert!(report["error"].is_null() && report["answers"].as_u64().is_some_and(|n| n > 500), "{report}");
    wait_for("counted", Duration::from_secs(10), || Ok(entries(&bed, "FLOWS") == 0)).expect("counted");
    assert_eq!(counted(&bed, "istio_tcp_connections_closed_total", "source"), 1.0);
    let third = bytes(&bed);
    // What one process has counted the next does not count again.
    let all = bed.nodes()[0].access_log().iter().find_map(|line| line.split("bytes_sent=").nth(1)?.split(' ').next()?.parse::<f64>().ok());
    let all = all.expect("a line of its end");
    assert!(all > 2500.0, "of all its life: {all}");
    assert!(third > 0.0 && third < all && first + second + third <= all, "{first} + {second} + {third} of {all}");
    // A policy that changes while no process is there ends what it denies when one is.
    let steady = start(&bed, &client, &["steady", &services[0], "20"]);
    wait_for("one open", Duration::from_secs(5), || Ok(connections(&bed).len() == 1)).expect("open");
    bed.node(0).kill();
    bed.apply(
        "deny",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: default}\nspec: {}\n",
    )
    .expect("applied");
    bed.node(0).start().expect("started");
    bed.nodes()[0].wait_ready().expect("ready");
    assert!(end(steady)["afterMilliseconds"].is_u64());
}

#[test]
fn a_pod_that_leaves_the_mesh_or_is_deleted_loses_them() {
    let (mut bed, client, server, services) = scene(&NodeOptions::default());
    let steady = start(&bed, &client, &["steady", &services[0], "20"]);
    wait_for("one open", Duration::from_secs(5), || Ok(connections(&bed).len() == 1)).expect("open");
    bed.relabel(&client, "istio.io/dataplane-mode", Some("none")).expect("relabelled");
    assert!(end(steady)["afterMilliseconds"].is_u64());
    wait_for("gone", Duration::from_secs(5), || Ok(connections(&bed).is_empty() && entries(&bed, "FLOWS") == 0)).expect("gone");
    wait_for("it in the log", Duration::from_secs(5), || {
        Ok(bed.nodes()[0].access_log().iter().any(|l| l.contains("not in the mesh any more")))
    })
    .expect("logged");
    bed.relabel(&client, "istio.io/dataplane-mode", None).expect("relabelled");
    bed.wait_captured(&client, true).expect("captured");
    let steady = start(&bed, &client, &["steady", &services[0], "20"]);
    wait_for("one open", Duration::from_secs(5), || Ok(connections(&bed).len() == 1)).expect("open");
    bed.delete(&server).expect("deleted");
    assert!(end(steady)["afterMilliseconds"].is_u64());
    wait_for("gone", Duration::from_secs(5), || Ok(connections(&bed).is_empty() && entries(&bed, "FLOWS") == 0)).expect("gone");
}

#[test]
fn a_connection_between_pods_that_leave_and_come_back_goes_on() {
    let (bed, client, server, services) = scene(&NodeOptions::default());
    let (steady, begun) = (start(&bed, &client, &["steady", &services[0], "20"]), Instant::now());
    wait_for("one open", Duration::from_secs(5), || Ok(connections(&bed).len() == 1)).expect("open");
    for (labels, captured) in [(&[][..], false), (AMBIENT, true)] {
        bed.namespace("default", labels).expect("labelled");
        [&client, &server].iter().for_each(|pod| bed.wait_captured(pod, captured).expect("followed"));
    }
    bed.settle().expect("settled");
    // It is held to policy again, and has lasted until it was.
    let lasted = begun.elapsed();
    policy(&bed, "deny", "{selector: {matchLabels: {app: server}}, action: DENY, rules: [{}]}");
    let report = end(steady);
    let after = report["afterMilliseconds"].as_u64().map(Duration::from_millis);
    assert!(after.is_some_and(|after| after + Duration::from_millis(300) > lasted), "{lasted:?}: {report}");
}

/// What left the mesh while no process was there is cut by the next.
#[test]
fn a_connection_of_a_pod_that_left_meanwhile_is_cut() {
    let (mut bed, client, _server, services) = scene(&NodeOptions::default());
    let steady = start(&bed, &client, &["steady", &services[0], "20"]);
    wait_for("one open", Duration::from_secs(5), || Ok(connections(&bed).len() == 1)).expect("open");
    bed.node(0).kill();
    bed.relabel(&client, "istio.io/dataplane-mode", Some("none")).expect("relabelled");
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    assert!(end(steady)["afterMilliseconds"].is_u64());
    wait_for("gone", Duration::from_secs(5), || Ok(entries(&bed, "FLOWS") == 0)).expect("gone");
}

/// The link of a pod that is deleted may go before anything in it could say that it ends.
#[test]
fn a_server_does_not_wait_for_a_client_that_vanished() {
    let (mut bed, client, server, services) = scene(&NodeOptions::default());
    let mut steady = start(&bed, &client, &["steady", &services[0], "20"]);
    wait_for("one open", Duration::from_secs(5), || Ok(connections(&bed).len() == 1)).expect("open");
    let open = || {
        let netns = server.netns.file_name().and_then(|n| n.to_str()).expect("a name");
        let listed = std::process::Command::new("ss").args(["-N", netns, "-Htn", "state", "established"]).output().expect("ss");
        String::from_utf8_lossy(&listed.stdout).lines().count()
    };
    assert_eq!(open(), 1);
    let netns = client.netns.file_name().and_then(|n| n.to_str()).expect("a name");
    let link = std::process::Command::new("ip").args(["-n", netns, "link", "set", "eth0", "down"]).status().expect("ip");
    assert!(link.success());
    bed.delete(&client).expect("deleted");
    wait_for("its end", Duration::from_secs(5), || Ok(open() == 0)).expect("the server has none left");
    let _ = steady.kill();
    let _ = steady.wait();
}

/// What its server has not answered yet is dialled again and again; whoever gets the address would be sent what was not meant for it.
#[test]
fn a_connection_being_dialled_ends_with_the_pod_it_is_for() {
    // Dials all the time, waits for none, and says how many are still at it at the end.
    let dial = "import socket, sys, time\nall, end = [], time.time() + 1.6
while time.time() < end:
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex((sys.argv[1], int(sys.argv[2])))
    all.append(s)
    time.sleep(0.003)
time.sleep(2)
print(len(all), sum(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 2 for s in all))";
    let (mut bed, client, server, services) = scene(&NodeOptions::default());
    let (host, port) = services[0].rsplit_once(':').expect("a port");
    let python = bed.command(&client, Path::new("/usr/bin/python3"), &["-c", dial, host, port]).stdout(Stdio::piped()).spawn();
    std::thread::sleep(Duration::from_millis(800));
    bed.delete(&server).expect("deleted");
    let output = python.expect("python").wait_with_output().expect("ended");
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).ends_with(" 0\n"), "some still wait: {output:?}");
    wait_for("gone", Duration::from_secs(5), || Ok(entries(&bed, "FLOWS") == 0)).expect("gone");
}

#[test]
fn what_takes_the_proxy_says_why() {
    let (mut bed, client, server, services) = scene(&NodeOptions::default());
    let ask = |bed: &Bed, to: &str| assert_eq!(bed.probe(&client, &["ask", to, "ping"]).expect("a report")["answer"], "pong");
    let rule = |bed: &Bed, spec: &str| {
        let yaml = format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: server, namespace: default}}\nspec: {spec}\n"
        );
        bed.apply("rule", &yaml).expect("applied");
        bed.settle().expect("settled");
    };
    rule(&bed, "{host: server, trafficPolicy: {connectionPool: {tcp: {maxConnections: 5}}}}");
    ask(&bed, &services[0]);
    assert_eq!((direct(&bed), indirect(&bed, "traffic_policy")), (0.0, 1.0));
    bed.withdraw("rule").expect("withdrawn");
    let far = PodSpec::server("other", 1).label("app", "server");
    let [far] = bed.meshed([far]).expect("a pod");
    bed.settle().expect("settled");
    for _ in 0..20 {
        ask(&bed, &services[0]);
    }
    assert_eq!(direct(&bed), 0.0);
    assert!(indirect(&bed, "endpoints") > 0.0);
    bed.delete(&far).expect("deleted");
    bed.settle().expect("settled");
    ask(&bed, &services[0]);
    assert_eq!(direct(&bed), 1.0);
    bed.relabel(&client, "mesh-node.io/acceleration", Some("off")).expect("relabelled");
    bed.settle().expect("settled");
    wait_for("the pod's wish", Duration::from_secs(5), || {
        ask(&bed, &services[0]);
        Ok(indirect(&bed, "switched_off") > 0.0)
    })
    .expect("switched off");
    bed.relabel(&client, "mesh-node.io/acceleration", None).expect("relabelled");
    wait_for("and back", Duration::from_secs(5), || {
        let before = direct(&bed);
        ask(&bed, &services[0]);
        Ok(direct(&bed) > before)
    })
    .expect("switched on");
    let off = scene(&NodeOptions::with(&["--same-node", "proxy"]));
    assert_eq!(off.0.probe(&off.1, &["ask", &off.3[0], "ping"]).expect("a report")["answer"], "pong");
    assert_eq!(off.0.probe(&off.1, &["ask", &off.2.address(8080), "ping"]).expect("a report")["answer"], "pong");
    assert_eq!((direct(&off.0), entries(&off.0, "ROUTES")), (0.0, 0));
    drop(server);
}

#[test]
fn thousands_of_short_connections_leave_nothing_behind() {
    const COUNT: u32 = 20_000;
    let (bed, client, _server, services) = scene(&NodeOptions::with(&["--acceleration", "on"]).quiet());
    let churn = start(&bed, &client, &["churn", &services[0], &COUNT.to_string(), "16"]);
    // Whatever changes has all flows gone through while events of them are under way: none is counted twice for it.
    let mut changes = 0;
    while direct(&bed) < f64::from(COUNT) && changes < 1000 {
        changes += 1;
        policy(
            &bed,
            "elsewhere",
            &format!("{{selector: {{matchLabels: {{app: nobody}}}}, rules: [{{to: [{{operation: {{ports: [\"{changes}\"]}}}}]}}]}}"),
        );
    }
    let report = end(churn);
    assert_eq!(report["failed"], 0, "{report}");
    assert!(changes > 2, "{changes}");
    wait_for("all counted", Duration::from_secs(20), || {
        Ok(counted(&bed, "istio_tcp_connections_closed_total", "source") == f64::from(COUNT))
    })
    .expect("counted");
    for reporter in ["source", "destination"] {
        assert_eq!(counted(&bed, "istio_tcp_connections_opened_total", reporter), f64::from(COUNT), "{reporter}");
        assert_eq!(counted(&bed, "istio_tcp_received_bytes_total", reporter), 5.0 * f64::from(COUNT), "{reporter}");
    }
    for map in ["FLOWS", "PROXY_FLOWS", "ACCELERATED", "PENDING"] {
        wait_for(map, Duration::from_secs(10), || Ok(entries(&bed, map) == 0)).expect("empty");
    }
    assert_eq!(connections(&bed).len(), 0);
}

#[test]
fn without_room_for_one_more_they_take_the_proxy() {
    let (bed, client, _server, services) = scene(&NodeOptions::default());
    let ask = || assert_eq!(bed.probe(&client, &["ask", &services[0], "ping"]).expect("a report")["answer"], "pong");
    ask();
    wait_for("all counted", Duration::from_secs(5), || Ok(entries(&bed, "FLOWS") == 0)).expect("counted");
    let map = MapData::from_pin(bed.nodes()[0].pinned("maps").join("FLOWS")).expect("the map");
    let mut flows = HashMap::<_, u64, Flow>::try_from(Map::HashMap(map)).expect("a hash map");
    let begun = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("a clock");
    let begun = Duration::from(begun).as_nanos() as u64;
    let filler = Flow { begun, ..Flow::default() };
    let filled = (0..MAX_FLOWS as u64).filter(|n| flows.insert((1 << 60) + n, filler, 0).is_ok()).count();
    assert_eq!(filled, MAX_FLOWS);
    ask();
    let full = bed.nodes()[0].metric("mesh_capture_events_total", &["\"direct_full\""]).expect("a metric");
    assert_eq!((direct(&bed), full), (1.0, 1.0));
    wait_for("what never got a port is forgotten", Duration::from_secs(20), || Ok(entries(&bed, "FLOWS") == 0)).expect("empty");
    ask();
    assert_eq!(direct(&bed), 2.0);
}

#[test]
fn an_endpoint_of_a_headless_service_is_reached_where_it_was_dialled() {
    let (mut bed, client, server, _services) = scene(&NodeOptions::default());
    let yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: each}\nspec: {clusterIP: None, selector: {app: server}, ports: [{name: tcp, port: 8080, targetPort: 8080}]}\n";
    bed.kubectl_apply("each", yaml).expect("applied");
    let [other, _far] =
        bed.meshed([PodSpec::server("other", 0).label("app", "server"), PodSpec::server("far", 1).label("app", "server")]).expect("pods");
    bed.settle().expect("settled");
    for (n, pod) in [&server, &other, &server, &other].into_iter().enumerate() {
        let report = bed.probe(&client, &["names", &pod.address(8080)]).expect("a report");
        assert_eq!(report["server"]["local"], pod.address(8080), "{report}");
        assert_eq!(direct(&bed), (n + 1) as f64);
    }
    wait_for("all counted", Duration::from_secs(5), || {
        Ok(bed.nodes()[0].metric("istio_tcp_connections_closed_total", &["destination_service_name=\"each\"", "reporter=\"source\""])?
            == 4.0)
    })
    .expect("counted as the service's");
}

/// A pod of which the kernel picks another address than policy was decided for is connected through the proxy, after a first refusal at most.
#[test]
fn a_pod_that_gets_another_address_goes_by_the_proxy() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    let (v4, v6) = bed.service("default", "server", 80, 8080).expect("service");
    bed.settle().expect("settled");
    let ask = |to: &str| bed.probe(&client, &["ask", to, "ping"]).expect("a report")["answer"] == "pong";
    let (to, over_four) = (format!("[{v6}]:80"), format!("{v4}:80"));
    assert!(ask(&to) && ask(&over_four));
    let netns = client.netns.file_name().and_then(|n| n.to_str()).expect("a name");
    // Nearer to the server's than the pod's own, so that the kernel prefers it.
    let another = format!("{}/128", server.v6().to_string().replace("::", "::1:"));
    let added = std::process::Command::new("ip").args(["-n", netns, "-6", "addr", "add", &another, "dev", "eth0", "nodad"]).status();
    assert!(added.expect("ip").success());
    let through = || bed.nodes()[0].metric("mesh_capture_events_total", &["captured"]).unwrap_or(0.0);
    let before = through();
    ask(&to);
    for _ in 0..3 {
        assert!(ask(&to) && ask(&over_four), "by the proxy");
    }
    assert!(through() > before + 2.5, "{} {before}", through());
}
