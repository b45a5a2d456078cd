//! Pods and mesh-node come, go and crash; traffic keeps its promises.

use std::{
    path::Path,
    process::{Child, Stdio},
    time::Duration,
};

use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{AMBIENT, Process, program, wait_for},
};
use nix::sys::signal::Signal;
use serde_json::Value;

#[path = "lifecycle/ends.rs"]
mod ends;
#[path = "lifecycle/programs.rs"]
mod programs;

fn start(bed: &Bed, client: &Pod, arguments: &[&str]) -> Child {
    bed.command(client, &program("probe"), arguments).stdout(Stdio::piped()).spawn().expect("probe")
}

fn end(child: Child) -> Value {
    let output = child.wait_with_output().expect("ended");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stdout)))
}

fn answers(bed: &Bed, client: &Pod, to: &str) -> bool {
    bed.probe(client, &["ask", to, "ping"]).expect("a report")["answer"] == "pong"
}

/// Waits for a line of the first node's access log that says all this: a line is written once both ends are done.
#[track_caller]
fn logged(bed: &Bed, parts: &[&str]) {
    let said = || Ok(bed.nodes()[0].access_log().iter().any(|l| parts.iter().all(|p| l.contains(p))));
    wait_for("a line of the access log", Duration::from_secs(5), said).expect("a log line");
}

#[test]
fn a_namespace_label_flipped_under_traffic_loses_nothing() {
    let mut bed = Bed::start(2, &NodeOptions::default()).expect("bed");
    let [client, near, far] =
        [PodSpec::new("client", 0), PodSpec::server("near", 0), PodSpec::server("far", 1)].map(|s| bed.pod(&s).expect("pod"));
    bed.settle().expect("settled");
    let open = [&near, &far].map(|server| start(&bed, &client, &["steady", &server.address(8080), "9"]));
    let new = [&near, &far].map(|server| start(&bed, &client, &["attempts", &server.address6(8080), "9"]));
    for round in 0..2 {
        std::thread::sleep(Duration::from_secs(1));
        let flipped = std::time::Instant::now();
        bed.namespace("default", AMBIENT).expect("label");
        [&client, &near, &far].iter().for_each(|p| bed.wait_captured(p, true).expect("captured"));
        assert!(flipped.elapsed() < Duration::from_secs(1), "round {round}: enrolled after {:?}", flipped.elapsed());
        let meshed = start(&bed, &client, &["steady", &far.address(8080), "3"]);
        std::thread::sleep(Duration::from_millis(1500));
        let flipped = std::time::Instant::now();
        bed.namespace("default", &[]).expect("label");
        [&client, &near, &far].iter().for_each(|p| bed.wait_captured(p, false).expect("released"));
        assert!(flipped.elapsed() < Duration::from_secs(1), "round {round}: released after {:?}", flipped.elapsed());
        let report = end(meshed);
        assert!(report.get("error").is_none(), "a captured connection did not survive its release: {report}");
    }
    for report in open.map(end) {
        assert!(report.get("error").is_none(), "{report}");
    }
    for report in new.map(end) {
        assert!(report["failed"] == 0 && report["worked"].as_u64().is_some_and(|n| n > 100), "{report}");
    }
    for node in bed.nodes() {
        assert!(node.metric("istio_tcp_connections_opened_total", &[]).expect("metric") > 0.5);
    }
}

#[test]
fn a_pods_own_label_wins_over_its_namespace() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let out = bed.pod(&PodSpec::server("out", 0).label("istio.io/dataplane-mode", "none")).expect("pod");
    let into = bed.pod(&PodSpec::server("in", 0).in_namespace("plain").label("istio.io/dataplane-mode", "ambient")).expect("pod");
    bed.wait_captured(&into, true).expect("captured");
    bed.wait_captured(&out, false).expect("left alone");
    bed.relabel(&out, "istio.io/dataplane-mode", None).expect("relabel");
    bed.wait_captured(&out, true).expect("captured once its label is gone");
}

#[test]
fn another_enrolment_label_can_be_chosen() {
    let options = NodeOptions::with(&["--enrolment-label", "mesh.example/join=yes"]);
    let mut bed = Bed::ambient(&options).expect("bed");
    let ignored = bed.pod(&PodSpec::new("ignored", 0)).expect("pod");
    bed.namespace("joined", &[("mesh.example/join", "yes")]).expect("namespace");
    let joined = bed.pod(&PodSpec::new("joined", 0).in_namespace("joined")).expect("pod");
    bed.wait_captured(&joined, true).expect("captured");
    bed.wait_captured(&ignored, false).expect("left alone");
}

#[test]
fn a_killed_node_fails_closed_and_a_restart_heals() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, near, far] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("near", 0), PodSpec::server("far", 1)]).expect("pods");
    let stranger = bed.pod(&PodSpec::new("stranger", 1).in_namespace("plain")).expect("stranger");
    let traffic = start(&bed, &client, &["attempts", &far.address(8080), "9"]);
    std::thread::sleep(Duration::from_secs(1));
    bed.node(0).kill();
    for to in [near.address(8080), far.address(8080), far.address6(8080)] {
        assert!(!answers(&bed, &client, &to), "out of a pod of a killed node to {to}");
    }
    for to in [near.address(8080), near.address6(8080)] {
        assert!(!answers(&bed, &stranger, &to), "into a pod of a killed node to {to}");
    }
    assert!(!answers(&bed, &far, &near.address6(8080)), "through a tunnel to a killed node");
    let own = Process::start(bed.command(&client, &program("probe"), &["serve", "9000"])).expect("a server in the client pod");
    wait_for("a pod's own loopback is nobody's business", Duration::from_secs(5), || Ok(answers(&bed, &client, "127.0.0.1:9000")))
        .expect("answers");
    drop(own);
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    [&client, &near].iter().for_each(|p| bed.wait_captured(p, true).expect("captured again"));
    for (from, to) in [(&client, &near), (&client, &far), (&far, &near), (&stranger, &near)] {
        assert!(answers(&bed, from, &to.address(8080)) && answers(&bed, from, &to.address6(8080)), "{} to {}", from.name, to.name);
    }
    let report = end(traffic);
    assert!(report["failed"].as_u64().is_some_and(|n| n > 0) && report["worked"].as_u64().is_some_and(|n| n > 80), "{report}");
}

#[test]
fn a_killed_node_fails_open_when_told_to_and_a_restart_heals() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--fail-mode", "open"])).expect("bed");
    let [client, near, far] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("near", 0), PodSpec::server("far", 1)]).expect("pods");
    let stranger = bed.pod(&PodSpec::new("stranger", 1).in_namespace("plain")).expect("stranger");
    assert!(bed.node(0).admin("/status").expect("status").contains("\"failMode\": \"open\""));
    let traffic = [&near, &far].map(|server| start(&bed, &client, &["attempts", &server.address(8080), "6"]));
    std::thread::sleep(Duration::from_millis(500));
    bed.node(0).kill();
    for (from, to) in [(&client, &near), (&client, &far), (&stranger, &near)] {
        assert!(answers(&bed, from, &to.address(8080)) && answers(&bed, from, &to.address6(8080)), "{} to {}", from.name, to.name);
    }
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    bed.wait_captured(&client, true).expect("captured again");
    let captured = |bed: &mut Bed| bed.node(0).metric("mesh_capture_events_total", &["\"captured\""]).expect("metric");
    let before = captured(&mut bed);
    assert!(answers(&bed, &client, &far.address(8080)));
    assert!(captured(&mut bed) > before, "traffic goes through the mesh again");
    assert!(bed.node(0).metric("mesh_capture_events_total", &["passed_fail_open"]).expect("metric") > 3.5);
    for report in traffic.map(end) {
        // Only what was under way in the killed process may fail.
        assert!(report["failed"].as_u64().is_some_and(|n| n <= 2) && report["worked"].as_u64().is_some_and(|n| n > 150), "{report}");
    }
}

#[test]
fn a_polite_stop_fails_open_while_it_still_waits_for_connections() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--fail-mode", "open"])).expect("bed");
    let [client, far] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("far", 1)]).expect("pods");
    let open = start(&bed, &client, &["steady", &far.address(8080), "3"]);
    let new = start(&bed, &client, &["attempts", &far.address(8080), "5"]);
    std::thread::sleep(Duration::from_millis(500));
    bed.node(0).stop().expect("stopped");
    let (open, new) = (end(open), end(new));
    assert!(open.get("error").is_none(), "what was open was waited for: {open}");
    assert!(new["failed"] == 0 && new["worked"].as_u64().is_some_and(|n| n > 100), "{new}");
}

/// Nobody else would serve them: who comes while a node waits for others to leave is served, both into and out of its pods, and as
/// a peer of its node that was told to go elsewhere.
#[test]
fn a_node_that_waits_for_what_is_open_serves_who_comes_meanwhile() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--termination-grace-period", "12"])).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply("web", service).expect("service");
    let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), "v1".into()];
    let web = PodSpec { command, port: Some(8080), ..PodSpec::new("web", 0) }.label("app", "web");
    let [client, near, far, _web] =
        bed.meshed([PodSpec::new("client", 0), PodSpec::server("near", 0), PodSpec::server("far", 1), web]).expect("pods");
    bed.settle().expect("settled");
    // They do not leave when they are asked to.
    let open = [(&client, &far), (&far, &near)].map(|(from, to)| start(&bed, from, &["steady", &to.address6(8080), "5"]));
    let get = |bed: &Bed, from: &Pod| {
        let arguments = ["get", "web:80/", "1", "--seconds", "3", "--pause-millis", "20"];
        bed.command(from, &program("web"), &arguments).stdout(Stdio::piped()).spawn().expect("web")
    };
    let asking = [get(&bed, &client), get(&bed, &far)];
    // It has not asked for anything yet, and is told to go.
    let silent = "import socket; s = socket.create_connection(('web', 80)); print(s.recv(1), flush=True)";
    let mut silent = bed.command(&client, Path::new("/usr/bin/python3"), &["-c", silent]).stdout(Stdio::piped()).spawn().expect("python");
    // What makes other programs read their files again, or end, does nothing here: nobody is to notice.
    [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2].into_iter().for_each(|other| bed.nodes()[0].signal(other));
    std::thread::sleep(Duration::from_secs(1));
    assert!(bed.node(0).is_running(), "{}", bed.nodes()[0].log_text());
    bed.nodes()[0].signal(Signal::SIGTERM);
    let began = std::time::Instant::now();
    // Pods come and go meanwhile.
    let [late] = bed.meshed([PodSpec::server("late", 0)]).expect("captured");
    assert!(answers(&bed, &far, &late.address(8080)), "whoever comes is served");
    bed.relabel(&late, "istio.io/dataplane-mode", Some("none")).expect("relabelled");
    bed.wait_captured(&late, false).expect("released");
    while began.elapsed() < Duration::from_secs(3) {
        for (from, to) in [(&client, &far), (&client, &near), (&far, &near)] {
            assert!(
                answers(&bed, from, &to.address(8080)) && answers(&bed, from, &to.address6(8080)),
                "{} to {} after {:?}",
                from.name,
                to.name,
                began.elapsed()
            );
        }
        assert!(bed.node(0).is_running(), "it waits for what is open");
    }
    assert!(matches!(silent.try_wait(), Ok(Some(status)) if status.success()), "closed, and not reset");
    for report in asking.map(end) {
        assert_eq!(
            (&report["errors"], &report["statuses"]),
            (&serde_json::json!({}), &serde_json::json!({"200": report["statuses"]["200"]}))
        );
    }
    for report in open.map(end) {
        assert!(report.get("error").is_none(), "{report}");
    }
    // Those that were there have left, and what the other node keeps for later is let go of.
    wait_for("the node to stop", Duration::from_secs(1), || Ok(!bed.node(0).is_running())).expect("stopped");
    assert!(!answers(&bed, &client, &far.address(8080)), "nobody serves");
}

/// What is open when a node is told to stop has the time Kubernetes gives, and no more than who says so again.
#[test]
fn connections_end_within_the_time_given_or_when_told_again() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--termination-grace-period", "14"])).expect("bed");
    let [client, far] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("far", 1)]).expect("pods");
    let open = start(&bed, &client, &["steady", &far.address(8080), "7"]);
    std::thread::sleep(Duration::from_millis(500));
    bed.node(0).stop().expect("stopped");
    let open = end(open);
    assert!(open.get("error").is_none(), "it was open for longer than five seconds after: {open}");
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    let open = start(&bed, &client, &["steady", &far.address(8080), "9"]);
    std::thread::sleep(Duration::from_millis(500));
    let drain = || bed.nodes()[0].run(&program("meshctl"), &["drain", "--timeout", "1"]).expect("meshctl");
    assert_eq!([drain().status.code(), drain().status.code()], [Some(1); 2], "it waits for what is open");
    bed.nodes()[0].signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(500));
    assert!(bed.node(0).is_running(), "the first signal is what follows a hook that drains");
    let began = std::time::Instant::now();
    bed.node(0).stop().expect("stopped");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(end(open).get("error").is_some(), "cut");
}

/// It would change what the first goes by.
#[test]
fn a_second_process_gives_way() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, far] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("far", 1)]).expect("pods");
    let second = bed.nodes()[0].second(&["--fail-mode", "open"]).expect("run");
    let said = String::from_utf8_lossy(&second.stderr).into_owned() + &String::from_utf8_lossy(&second.stdout);
    assert!(!second.status.success() && said.contains("another mesh-node serves"), "{said}");
    assert!(answers(&bed, &client, &far.address(8080)));
    bed.node(0).kill();
    assert!(!answers(&bed, &client, &far.address(8080)), "the fail mode is the first's");
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    assert!(answers(&bed, &client, &far.address(8080)));
}

#[test]
fn a_restart_with_the_other_fail_mode_takes_effect() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, far] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("far", 1)]).expect("pods");
    bed.node(0).stop().expect("stopped politely");
    assert!(!answers(&bed, &client, &far.address(8080)), "closed after a polite stop, too");
    bed.node(0).arguments(&["--fail-mode", "open"]);
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    bed.node(0).kill();
    assert!(answers(&bed, &client, &far.address(8080)));
}

#[test]
fn what_another_version_left_attached_is_taken_over() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    let node = bed.node(0);
    node.kill();
    // What is attached looks like another version's.
    let (own, other) = (node.pinned(""), node.pins.join("v1"));
    assert_ne!(own.file_name(), other.file_name());
    std::fs::rename(&own, &other).expect("renamed");
    assert!(!answers(&bed, &client, &server.address(8080)), "it fails closed");
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    assert!(!other.exists());
    for pod in [&client, &server] {
        bed.wait_captured(pod, true).expect("captured");
    }
    assert!(answers(&bed, &client, &server.address(8080)) && answers(&bed, &client, &server.address6(8080)));
    logged(&bed, &["inbound", "sa/client"]);
}

#[test]
fn a_reused_address_never_meets_an_old_connection_or_identity() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, old] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("old", 1).at(77)]).expect("pods");
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: new, namespace: default}\n\
                spec: {selector: {matchLabels: {app: new}}, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]}]}\n";
    bed.apply("new", deny).expect("applied");
    let steady = start(&bed, &client, &["steady", &old.address(8080), "20"]);
    // One that is not connected yet would be, to whoever comes.
    let answered = || {
        let all = bed.nodes()[0].admin_json("/connections")?;
        Ok(all.as_array().is_some_and(|all| all.iter().any(|c| c["receivedBytes"].as_u64().is_some_and(|n| n > 0))))
    };
    wait_for("an answer", Duration::from_secs(5), answered).expect("answered");
    bed.delete(&old).expect("deleted");
    let [new] = bed.meshed([PodSpec::server("new", 1).at(77)]).expect("a pod at the same address");
    assert_eq!(new.addresses, old.addresses);
    let asked = bed.probe(&client, &["ask", &new.address(8080), "ping"]).expect("a report");
    assert_eq!(asked["answer"], "pong", "{asked}");
    logged(&bed, &["outbound", &new.address(8080), "spiffe://cluster.local/ns/default/sa/new"]);
    let report = end(steady);
    assert!(report["error"].is_string(), "the connection to the old pod has ended: {report}");
    // And as a client: the address now has the new identity.
    let server = bed.pod(&PodSpec::server("server", 0)).expect("server");
    bed.wait_captured(&server, true).expect("captured");
    bed.settle().expect("settled");
    assert!(answers(&bed, &new, &server.address(8080)));
    logged(&bed, &["inbound", "sa/new", "sa/server"]);
}

/// Either end's node stops in order while a request is under way: it is answered.
#[test]
fn requests_under_way_are_answered_before_a_node_stops() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply("web", service).expect("service");
    let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), "v1".into()];
    let server = PodSpec { command, port: Some(8080), ..PodSpec::new("web", 1) }.label("app", "web");
    let [client, _server] = bed.meshed([PodSpec::new("client", 0), server]).expect("pods");
    bed.settle().expect("settled");
    for stopped in [0, 1] {
        let asking = bed.command(&client, &program("web"), &["get", "web:80/sleep/1500", "1"]).stdout(Stdio::piped()).spawn().expect("web");
        let listed = |bed: &Bed| {
            let all = bed.nodes()[0].admin_json("/connections")?;
            Ok(all.as_array().is_some_and(|all| {
                all.iter().any(|c| c["path"] == "requests" && c["source"] == "default/client" && c["service"] == "default/web")
            }))
        };
        wait_for("the client's connection", Duration::from_secs(5), || listed(&bed)).expect("listed");
        std::thread::sleep(Duration::from_millis(300));
        bed.node(stopped).stop().expect("stopped");
        let report = end(asking);
        assert_eq!(report["statuses"]["200"], 1, "node {stopped} stopped: {report}");
        bed.node(stopped).start().expect("started");
        bed.node(stopped).wait_ready().expect("ready");
    }
}

/// Clients that keep their connections are told to go elsewhere with an answer, at either end's node, and lose nothing.
#[test]
fn a_node_that_stops_tells_clients_of_http_to_go_elsewhere() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--fail-mode", "open"])).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply("web", service).expect("service");
    let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), "v1".into()];
    let server = PodSpec { command, port: Some(8080), ..PodSpec::new("web", 1) }.label("app", "web");
    let [server] = bed.meshed([server]).expect("server");
    let outside = bed.pod(&PodSpec::new("outside", 0).label("istio.io/dataplane-mode", "none")).expect("outside");
    bed.settle().expect("settled");
    let to = format!("{}/", server.address(8080));
    let arguments = ["get", &to, "1", "--seconds", "4", "--pause-millis", "20"];
    let asking = bed.command(&outside, &program("web"), &arguments).stdout(Stdio::piped()).spawn().expect("web");
    std::thread::sleep(Duration::from_secs(1));
    let began = std::time::Instant::now();
    bed.node(1).stop().expect("stopped");
    assert!(began.elapsed() < Duration::from_secs(3), "nothing was waited for: {:?}", began.elapsed());
    let report = end(asking);
    assert_eq!(report["errors"], serde_json::json!({}), "{report}");
    assert!(report["statuses"]["200"].as_u64().is_some_and(|n| n > 100), "{report}");
}

#[test]
fn uninstall_leaves_nothing_in_the_kernel() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    assert!(answers(&bed, &client, &server.address(8080)));
    let refused = bed.nodes()[0].uninstall().expect_err("not under a running process").to_string();
    assert!(refused.contains("stop it first") && answers(&bed, &client, &server.address(8080)), "{refused}");
    // Nor with other pins than it has.
    let cgroup = bed.nodes()[0].cgroup.display().to_string();
    let elsewhere = bed.nodes()[0].mesh_node(&["uninstall", "--bpf-dir", "/sys/fs/bpf/nowhere", "--cgroup-root", &cgroup]).expect("run");
    let said = String::from_utf8_lossy(&elsewhere.stderr).into_owned();
    assert!(!elsewhere.status.success() && said.contains("not pinned below /sys/fs/bpf/nowhere"), "{said}");
    assert!(answers(&bed, &client, &server.address(8080)));
    bed.node(0).stop().expect("stopped");
    let removed = bed.nodes()[0].uninstall().expect("uninstalled");
    assert!(removed.contains("removed") && removed.contains("2 pods"), "{removed}");
    assert!(!bed.nodes()[0].pins.exists());
    let again = bed.nodes()[0].uninstall().expect("again");
    assert!(again.contains("there were none"), "{again}");
    assert!(answers(&bed, &client, &server.address(8080)), "plain TCP again");
    for pod in [&client, &server] {
        let netns = pod.netns.file_name().and_then(|n| n.to_str()).expect("a name");
        for (family, what) in [("-4", "rule"), ("-6", "rule"), ("-4", "route"), ("-6", "route")] {
            let table = ["show", "table", "all"];
            let mut output = std::process::Command::new("ip");
            let output = output.args(["-n", netns, family, what]).args(&table[..if what == "rule" { 1 } else { 3 }]);
            let output = output.output().expect("ip");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.lines().count() > 1, "{output:?}");
            assert!(["28014", "127.109.", "fd6d:"].iter().all(|ours| !text.contains(ours)), "{}: {text}", pod.name);
        }
    }
}

#[test]
fn certificates_are_renewed_without_cutting_anything() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--certificate-ttl", "6"])).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1)]).expect("pods");
    let expiry = |bed: &mut Bed| bed.node(0).admin_json("/certificates").expect("certificates")[0]["notAfter"].as_u64().expect("a time");
    let first = |bed: &Bed| Ok(bed.nodes()[0].admin_json("/certificates")?[0]["notAfter"].is_u64());
    wait_for("a certificate", Duration::from_secs(5), || first(&bed)).expect("made");
    let before = expiry(&mut bed);
    let open = start(&bed, &client, &["steady", &server.address(8080), "9"]);
    let new = start(&bed, &client, &["attempts", &server.address(8080), "9"]);
    let (open, new) = (end(open), end(new));
    assert!(open.get("error").is_none(), "{open}");
    assert_eq!(new["failed"], 0, "{new}");
    assert!(expiry(&mut bed) > before + 5);
}

#[test]
fn unready_endpoints_get_no_traffic() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, a, b] = bed
        .meshed([
            PodSpec::new("client", 0),
            PodSpec::server("web-a", 0).label("app", "web"),
            PodSpec::server("web-b", 1).label("app", "web"),
        ])
        .expect("pods");
    let service = bed.service("default", "web", 80, 8080).expect("service").0;
    bed.settle().expect("settled");
    let seen = |bed: &Bed| {
        let to = format!("{service}:80");
        (0..16).filter_map(|_| bed.probe(&client, &["ask", &to, "who"]).ok()?["answer"].as_str().map(str::to_owned)).collect::<Vec<_>>()
    };
    let all = seen(&bed);
    assert!(
        all.len() == 16 && [&a, &b].iter().all(|p| all.iter().any(|l| l.contains(&p.address(8080)))),
        "both endpoints are used: {all:?}"
    );
    bed.set_ready(&a, false).expect("unready");
    bed.settle().expect("settled");
    assert!(seen(&bed).iter().all(|l| l.contains(&b.address(8080))));
    bed.set_ready(&b, false).expect("unready");
    bed.settle().expect("settled");
    assert!(seen(&bed).is_empty(), "no endpoint, no connection");
    assert!(bed.node(0).metric("mesh_connection_failures_total", &["no_endpoint"]).expect("metric") > 15.5);
}

#[test]
fn unknown_destinations_pass_or_not_as_configured() {
    for (policy, passes) in [("ALLOW_ANY", true), ("REGISTRY_ONLY", false)] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--outbound-policy", policy])).expect("bed");
        let [client, known] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("known", 1)]).expect("pods");
        // The node itself is nobody the mesh knows.
        let listener = mesh_node::io::netns::Netns::open(&bed.node_netns(1)).expect("netns");
        let listener = listener.enter(|| std::net::TcpListener::bind("[::]:7000")).expect("entered").expect("bound");
        let server = std::thread::spawn(move || {
            let (mut stream, peer) = listener.accept().expect("accepted");
            // Read to the end: closing with unread data would be a reset.
            let mut question = String::new();
            std::io::Read::read_to_string(&mut stream, &mut question).expect("read");
            std::io::Write::write_all(&mut stream, format!("{}", peer.ip().to_canonical()).as_bytes()).expect("written");
        });
        let report = bed.probe(&client, &["ask", "172.30.0.11:7000", "hello"]).expect("a report");
        assert_eq!(report["answer"] == client.v4().to_string().as_str(), passes, "{policy}: {report}");
        if passes {
            server.join().expect("server");
        }
        assert!(answers(&bed, &client, &known.address(8080)));
    }
}
