//! What must not slip past capture and policy, found by looking for ways round them.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{AMBIENT, Process, program, wait_for},
};
use serde_json::Value;

#[path = "enforcement/hostile.rs"]
mod hostile;

fn answers(bed: &Bed, client: &Pod, to: &str) -> bool {
    bed.probe(client, &["ask", to, "ping"]).expect("a report")["answer"] == "pong"
}

fn ip(pod: &Pod, arguments: &[&str]) {
    let netns = pod.netns.file_name().and_then(|n| n.to_str()).expect("a name");
    assert!(Command::new("ip").args(["-n", netns]).args(arguments).status().expect("ip").success());
}

#[test]
fn a_pod_that_takes_a_mesh_port_first_is_cut_off_and_not_let_through() {
    let mut bed = Bed::start(2, &NodeOptions::default()).expect("bed");
    let server = bed.pod(&PodSpec::server("server", 1)).expect("server");
    let squatter = bed.pod(&PodSpec::server("squatter", 0)).expect("squatter");
    // Not root in the pod, or SO_REUSEPORT would let it share; an ordinary listener is the same to the kernel.
    let own = Process::start(bed.command(&squatter, &program("probe"), &["serve", "15001"])).expect("a listener on 15001");
    wait_for("its listener", Duration::from_secs(5), || Ok(answers(&bed, &squatter, "127.0.0.1:15001"))).expect("listens");
    assert!(answers(&bed, &squatter, &server.address(8080)) && answers(&bed, &server, &squatter.address(8080)), "not in the mesh yet");
    bed.namespace("default", AMBIENT).expect("label");
    bed.wait_captured(&server, true).expect("captured");
    let problem = |bed: &Bed| {
        let pods = bed.nodes()[0].admin_json("/pods").expect("pods");
        let mine = pods.as_array().into_iter().flatten().find(|p| p["uid"] == squatter.uid.as_str()).cloned();
        mine.and_then(|p| p["problem"].as_str().map(str::to_owned)).unwrap_or_default()
    };
    wait_for("the problem to be told", Duration::from_secs(5), || Ok(problem(&bed).contains("cannot listen"))).expect("told");
    let status = bed.nodes()[0].admin("/status").expect("status");
    assert!(status.contains("Pod default/squatter cannot be served") && status.contains("cannot listen"), "{status}");
    // Its connections end at its own listener: nothing leaves the pod.
    let out = bed.probe(&squatter, &["ask", &server.address(8080), "who"]).expect("a report");
    let reached = out["answer"].as_str().is_some_and(|a| a.contains(&format!("\"local\":\"{}", server.v4())));
    assert!(!reached, "out of a pod that cannot be served: {out}");
    assert!(!answers(&bed, &server, &squatter.address(8080)), "into a pod that cannot be served");
    // Opted out, it is let go of; and taken again.
    bed.relabel(&squatter, "istio.io/dataplane-mode", Some("none")).expect("relabel");
    wait_for("an opted-out pod to be left alone", Duration::from_secs(5), || Ok(answers(&bed, &server, &squatter.address(8080))))
        .expect("left alone");
    bed.relabel(&squatter, "istio.io/dataplane-mode", None).expect("relabel");
    wait_for("the problem to be told again", Duration::from_secs(5), || Ok(problem(&bed).contains("cannot listen"))).expect("told");
    drop(own);
    bed.wait_captured(&squatter, true).expect("captured once the port is free");
    assert!(answers(&bed, &squatter, &server.address(8080)) && answers(&bed, &server, &squatter.address(8080)));
}

#[test]
fn an_address_the_mesh_does_not_know_is_no_way_round_policy() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    ip(&server, &["addr", "add", "10.244.16.200/20", "dev", "eth0"]);
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: d, namespace: default}\nspec: {mtls: {mode: STRICT}}\n";
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: d, namespace: default}\nspec: {action: DENY, rules: [{}]}\n";
    for policy in [strict, deny] {
        bed.apply("policy", policy).expect("applied");
        bed.settle().expect("settled");
        assert!(!answers(&bed, &client, "10.244.16.200:8080"), "{policy}");
    }
    assert!(!answers(&bed, &client, &server.address(8080)), "denied by its own address, too");
}

/// What comes to it is judged, and passes where it may: from outside the mesh, over the pod's link, and as long as it is there.
#[test]
fn an_address_the_mesh_does_not_know_is_served_like_the_others() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    let stranger = bed.pod(&PodSpec::new("stranger", 0).in_namespace("plain")).expect("stranger");
    ip(&server, &["addr", "add", "10.244.16.200/20", "dev", "eth0"]);
    ip(&server, &["addr", "add", "fd00:244:1::200/64", "dev", "eth0", "nodad"]);
    let shown = bed.command(&server, "ip".as_ref(), &["-j", "-6", "addr", "show", "dev", "eth0", "scope", "link"]).output().expect("ip");
    let shown: Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    let mut all = shown[0]["addr_info"].as_array().into_iter().flatten();
    let link = all.find_map(|info| info["local"].as_str()).expect("an address");
    // Of the stranger's device, which has the same number in each pod.
    let by_link = format!("[{link}%{}]:8080", shown[0]["ifindex"]);
    let further = ["10.244.16.200:8080".to_owned(), "[fd00:244:1::200]:8080".to_owned(), by_link];
    for to in &further {
        wait_for(to, Duration::from_secs(8), || Ok(answers(&bed, &stranger, to))).expect("an answer");
    }
    assert!(further[..2].iter().all(|to| answers(&bed, &client, to)), "from the mesh");
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: d, namespace: default}\nspec: {action: DENY, rules: [{from: [{source: {notNamespaces: [default]}}]}]}\n";
    bed.apply("policy", deny).expect("applied");
    bed.settle().expect("settled");
    assert!(further.iter().all(|to| !answers(&bed, &stranger, to)), "a policy holds there");
    bed.withdraw("policy").expect("withdrawn");
    bed.settle().expect("settled");
    assert!(answers(&bed, &stranger, &further[0]));
    let steered = || mesh_node::capture::count_entries(&bed.nodes()[0].pinned("maps").join("LISTENERS")).expect("the map");
    let before = steered();
    ip(&server, &["addr", "del", "10.244.16.200/20", "dev", "eth0"]);
    wait_for("the listener to go", Duration::from_secs(8), || Ok(steered() < before)).expect("gone");
    // One that two pods have is nobody's.
    let before = steered();
    ip(&client, &["addr", "add", "fd00:244:1::200/64", "dev", "eth0", "nodad"]);
    wait_for("the shared one to go", Duration::from_secs(8), || Ok(steered() < before)).expect("gone");
}

#[test]
fn a_pod_that_changes_its_addresses_stays_captured() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 1), PodSpec::server("server", 0)]).expect("pods");
    let steady =
        bed.command(&client, &program("probe"), &["steady", &server.address(8080), "4"]).stdout(Stdio::piped()).spawn().expect("steady");
    ip(&server, &["addr", "add", "10.244.16.201/20", "dev", "eth0"]);
    let before = bed.node(0).metric("mesh_capture_events_total", &["steered"]).expect("metric");
    for addresses in [vec!["10.244.16.201".parse().expect("valid"), server.v6()], vec![], server.addresses.clone()] {
        bed.set_addresses(&server, &addresses).expect("changed");
        bed.settle().expect("settled");
        std::thread::sleep(Duration::from_millis(300));
        let pods = bed.nodes()[0].admin("/pods").expect("pods");
        assert!(!pods.contains("\"captured\": false"), "{addresses:?}: {pods}");
    }
    let log = bed.nodes()[0].log_text();
    assert!(!log.contains("pod released") && log.contains("pod has other addresses"), "it was let go of");
    assert!(bed.node(0).metric("mesh_capture_events_total", &["steered"]).expect("metric") >= before);
    assert!(answers(&bed, &client, &server.address(8080)));
    let output = steady.wait_with_output().expect("ended");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert!(report.get("error").is_none(), "{report}");
}

#[test]
fn many_tunnels_cut_at_once_leave_the_others_of_the_pair_alone() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1)]).expect("pods");
    let _second = Process::start(bed.command(&server, &program("probe"), &["serve", "8090"])).expect("a second port");
    wait_for("its listener", Duration::from_secs(5), || Ok(answers(&bed, &server, "127.0.0.1:8090"))).expect("listens");
    let steady =
        bed.command(&client, &program("probe"), &["steady", &server.address(8080), "6"]).stdout(Stdio::piped()).spawn().expect("steady");
    let uploads = (0..90).map(|_| {
        let mut command = bed.command(&client, &program("probe"), &["stall", &server.address(8090), "20"]);
        Process::start({
            command.stdout(Stdio::null());
            command
        })
    });
    let mut uploads = uploads.collect::<Result<Vec<_>, _>>().expect("uploads");
    wait_for("ninety tunnels more", Duration::from_secs(20), || Ok(bed.nodes()[0].metric("mesh_open_connections", &[])? > 90.5))
        .expect("tunnels");
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: d, namespace: default}\nspec: {action: DENY, rules: [{to: [{operation: {ports: ['8090']}}]}]}\n";
    bed.apply("deny", deny).expect("applied");
    wait_for("all of them cut", Duration::from_secs(10), || Ok(uploads.iter_mut().all(|u| !u.is_running()))).expect("cut");
    let output = steady.wait_with_output().expect("ended");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert!(report.get("error").is_none(), "{report}");
}

/// Runs a process on the first node with pins of its own; whether it goes on, and what it says.
fn with_pins_elsewhere(bed: &Bed, root: &Path) -> (bool, String) {
    let node = &bed.nodes()[0];
    let [config, pins, ca, root] =
        [&*bed.config(), &node.pins.join("other"), &bed.directory.join("ca"), root].map(|path| path.display().to_string());
    let arguments =
        ["run", "--node", "x", "--config-dir", &config, "--bpf-dir", &pins, "--ca-dir", &ca, "--state-dir", &ca, "--cgroup-root", &root];
    let output = node.mesh_node(&arguments).expect("run");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_cgroup_root_that_does_not_cover_the_process_is_refused() {
    let mut bed = Bed::start(1, &NodeOptions::default()).expect("bed");
    bed.node(0).stop().expect("stopped");
    let (started, text) = with_pins_elsewhere(&bed, &bed.nodes()[0].cgroup.join("kubepods"));
    assert!(!started && text.contains("is not below --cgroup-root"), "{text}");
}

/// Programs that another process left hold the pods: a second generation beside them would judge what the first has led elsewhere already.
#[test]
fn programs_that_are_pinned_elsewhere_are_not_added_to() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    bed.node(0).kill();
    let (started, text) = with_pins_elsewhere(&bed, &bed.nodes()[0].cgroup);
    assert!(!started && text.contains("not pinned below") && text.contains("--bpf-dir"), "{text}");
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    assert!(answers(&bed, &client, &server.address(8080)), "the same one is taken over from");
}

#[test]
fn pods_of_every_qos_class_are_found() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    for class in ["", "besteffort", "burstable"] {
        let name = if class.is_empty() { "guaranteed" } else { class };
        let pod = bed.pod(&PodSpec::new(name, 0).quality(class)).expect("pod");
        bed.wait_captured(&pod, true).expect(name);
    }
}

#[test]
fn a_pod_with_threaded_cgroups_hides_no_other() {
    let mut bed = Bed::start(1, &NodeOptions::default()).expect("bed");
    let odd = bed.pod(&PodSpec::server("odd", 0)).expect("pod");
    let threads = odd.cgroup.join("threads");
    std::fs::create_dir(&threads).expect("created");
    std::fs::write(threads.join("cgroup.type"), "threaded").expect("a threaded cgroup");
    assert!(std::fs::read_to_string(threads.join("cgroup.procs")).is_err(), "this is what discovery meets");
    bed.namespace("default", AMBIENT).expect("label");
    bed.wait_captured(&odd, true).expect("captured");
    bed.node(0).kill();
    let later = bed.pod(&PodSpec::server("later", 0)).expect("pod");
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    bed.wait_captured(&odd, true).expect("captured again");
    bed.wait_captured(&later, true).expect("captured");
}

/// The addresses that captured connections are aimed at are for the pod itself: nobody else gets past its policies by them.
#[test]
fn what_captured_connections_are_aimed_at_is_out_of_reach_from_elsewhere() {
    const ASKS: &str = "import socket, sys\nfor to in sys.argv[1:]:\n host, port = to.rsplit(' ', 1)\n try:\n  c = socket.create_connection((host, int(port)), 2)\n  c.sendall(b'upload\\n')\n  print(to, 'connected', len(c.recv(10)))\n except OSError as e: print(to, 'refused')\n";
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 1), PodSpec::server("server", 0)]).expect("pods");
    bed.settle().expect("settled");
    let own = server.v6().to_string();
    let (v4, v6) = (server.v4().to_string(), "fd6d:6573:6815:1::");
    let node = &bed.nodes()[0];
    for route in [["-6", "route", "add", "fd6d:6573:6815:1::/64", "via", &own], ["-4", "route", "add", "127.109.0.0/16", "via", &v4]] {
        // Of IPv4 the kernel may refuse that at once.
        let _ = node.run(Path::new("/usr/sbin/ip"), &route).expect("ip");
    }
    let to = ["5 8080", "5 15001", "5 15006", "7 15008"].map(|rest| format!("{v6}{rest}"));
    let to = to.into_iter().chain(["127.109.0.5 8080", "127.109.0.5 15001"].map(str::to_owned)).collect::<Vec<_>>();
    let arguments = [&["-c", ASKS][..], &to.iter().map(String::as_str).collect::<Vec<_>>()].concat();
    let output = node.run(Path::new("/usr/bin/python3"), &arguments).expect("python");
    let expected = to.iter().map(|to| format!("{to} refused\n")).collect::<String>();
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{output:?}");
    assert!(answers(&bed, &client, &server.address6(8080)), "the pod is reached as it should be");
}
