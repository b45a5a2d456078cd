//! Messages that move past the TCP stack: what is accelerated and what is not, and that nobody can tell but by the clock.

use std::{
    process::{Child, Stdio},
    time::Duration,
};

use mesh_common::accelerate::{MAX_MESSAGE, MAX_QUEUED};
use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{program, wait_for},
};
use serde_json::Value;

fn start(bed: &Bed, pod: &Pod, name: &str, arguments: &[&str]) -> Child {
    bed.command(pod, &program(name), arguments).stdout(Stdio::piped()).spawn().expect("started")
}

fn end(child: Child) -> Value {
    let output = child.wait_with_output().expect("ended");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stdout)))
}

/// A pod that echoes on port 9000.
fn echo(name: &str, node: usize) -> PodSpec {
    let command = vec![program("soak").display().to_string(), "serve".into(), "9000".into()];
    PodSpec { command, port: Some(9000), ..PodSpec::new(name, node) }
}

fn states(bed: &Bed, node: usize) -> Vec<String> {
    let found = bed.nodes()[node].admin_json("/acceleration").expect("acceleration");
    found["pairs"].as_array().expect("pairs").iter().map(|p| p["state"].as_str().expect("a state").to_owned()).collect()
}

/// Sockets in the kernel's map of those between which messages are redirected.
fn entered(bed: &Bed, node: usize) -> usize {
    mesh_node::capture::count_entries(&bed.nodes()[node].pinned("maps").join("ACCELERATED")).expect("the map")
}

#[test]
fn random_messages_arrive_byte_for_byte_on_every_way() {
    let gigabytes = std::env::var("MESH_SOAK_GIGABYTES").ok().and_then(|g| g.parse::<f64>().ok()).unwrap_or(0.1);
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on"])).expect("bed");
    let [client, near, far] = bed.meshed([PodSpec::new("client", 0), echo("near", 0), echo("far", 1)]).expect("pods");
    let connections = 25_u64;
    let bytes = ((gigabytes * 1e9) as u64 / (4 * connections)).to_string();
    let ways = [near.address(9000), near.address6(9000), far.address(9000), far.address6(9000)];
    let running = ways.iter().map(|to| start(&bed, &client, "soak", &["run", to, &connections.to_string(), &bytes])).collect::<Vec<_>>();
    wait_for("accelerated connections", Duration::from_secs(10), || Ok(states(&bed, 0).iter().any(|s| s == "accelerated"))).expect("some");
    for (way, child) in ways.iter().zip(running) {
        let report = end(child);
        assert_eq!((&report["done"], report["errors"].as_array().map(Vec::len)), (&connections.into(), Some(0)), "{way}: {report}");
    }
    for node in 0..2 {
        wait_for("empty maps", Duration::from_secs(5), || Ok(entered(&bed, node) == 0 && states(&bed, node).is_empty()))
            .expect("nothing left");
    }
}

#[test]
fn a_connection_of_messages_is_accelerated_and_says_so_and_a_pod_can_opt_out() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", "proxy"])).expect("bed");
    let mut off = echo("off", 0);
    off.labels.insert("mesh-node.io/acceleration".into(), "off".into());
    let [client, near, opted_out] = bed.meshed([PodSpec::new("client", 0), echo("near", 0), off]).expect("pods");
    let accelerated = |bed: &Bed| states(bed, 0).iter().filter(|s| *s == "accelerated").count();
    let talk = start(&bed, &client, "soak", &["run", &near.address(9000), "4", "600000", "--turns", "--stay", "3"]);
    wait_for("both hops of four connections", Duration::from_secs(10), || Ok(accelerated(&bed) == 8 && entered(&bed, 0) == 16))
        .expect("accelerated");
    assert!(bed.nodes()[0].metric("mesh_acceleration_total", &["state=\"accelerated\""]).expect("a metric") >= 8.0);
    assert_eq!(end(talk)["done"], 4);
    let talk = start(&bed, &client, "soak", &["run", &opted_out.address(9000), "4", "600000", "--turns", "--stay", "3"]);
    // The client's own hop is, the other pod's is not.
    wait_for("one hop of four connections", Duration::from_secs(10), || Ok(accelerated(&bed) == 4)).expect("accelerated");
    for _ in 0..10 {
        // One may be on its way out or back.
        assert!(accelerated(&bed) <= 4 && entered(&bed, 0) <= 8);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(end(talk)["done"], 4);
}

#[test]
fn programs_that_block_and_bulk_are_left_to_tcp() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", "proxy"])).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    let steady = start(&bed, &client, "probe", &["steady", &server.address(8080), "2"]);
    wait_for("a verdict", Duration::from_secs(5), || Ok(states(&bed, 0).iter().filter(|s| *s == "blocking").count() == 2))
        .expect("blocking");
    assert_eq!(entered(&bed, 0), 0);
    assert!(end(steady)["error"].is_null());
    for _ in 0..3 {
        let report = bed.probe(&client, &["upload", &server.address(8080), "30000000"]).expect("a report");
        assert_eq!(report["received"], 30_000_000, "{report}");
    }
    assert_eq!(bed.nodes()[0].metric("mesh_acceleration_total", &["state=\"accelerated\""]).unwrap_or(0.0), 0.0);
}

#[test]
fn a_reader_that_does_not_read_holds_its_sender_up_and_loses_nothing() {
    // Enough for the pair to be entered meanwhile.
    const BEFORE: u64 = 1_024_000;
    for (way, same_node) in [("off", "proxy"), ("on", "proxy"), ("on", "direct")] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", way, "--same-node", same_node])).expect("bed");
        let mut stalls = echo("server", 0);
        stalls.command.extend(["--stall-after".into(), BEFORE.to_string()]);
        let [client, server] = bed.meshed([PodSpec::new("client", 0), stalls]).expect("pods");
        let mut flood = start(&bed, &client, "soak", &["flood", &server.address(9000), &BEFORE.to_string()]);
        // While nobody reads: there are no more redirected bytes than the bound. (The proxy reads, as long as it can write.)
        std::thread::sleep(Duration::from_secs(4));
        let found = bed.nodes()[0].admin_json("/acceleration").expect("acceleration");
        let pairs = found["pairs"].as_array().expect("pairs").iter();
        let to_server = pairs.filter(|p| p["other"].as_str().is_some_and(|other| other.ends_with(":9000")));
        let most = to_server.filter_map(|p| p["redirectedBytes"][0].as_u64()).max().unwrap_or(0);
        let bound = BEFORE + 2 * u64::from(MAX_QUEUED + MAX_MESSAGE);
        assert!((way == "off") == (most == 0) && most <= bound, "{way}: {found}");
        let mut held = 0;
        while flood.try_wait().expect("waited for").is_none() {
            held = held.max(kernel_memory(&bed, &client).max(kernel_memory(&bed, &server)));
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(held <= 1_000_000 && (held > 0 || same_node == "direct"), "{way} {same_node}: {held} bytes in the kernel");
        let report = end(flood);
        assert!(report["error"].is_null() && report["read"] == report["written"], "{way}: {report}");
        let turned = bed.nodes()[0].metric("mesh_capture_events_total", &["\"acceleration_turned\""]).expect("a metric");
        assert_eq!(turned > 0.0, way == "on", "back to TCP");
    }
}

/// Bytes of kernel memory in the queues of the proxy's sockets in a pod: its outbound listener's, and those to the application.
fn kernel_memory(bed: &Bed, pod: &Pod) -> u64 {
    let output = bed.command(pod, "ss".as_ref(), &["-tmnHO", "state", "established"]).output().expect("ss");
    let text = String::from_utf8_lossy(&output.stdout);
    let of_the_proxy = text.lines().filter(|line| {
        let mut places = line.split_whitespace().skip(2);
        places.next().is_some_and(|local| local.ends_with(":15001")) || places.next().is_some_and(|peer| peer.ends_with(":9000"))
    });
    let fields = of_the_proxy.filter_map(|line| line.split_once("skmem:(")).flat_map(|(_, fields)| fields.split([',', ')']));
    // Received and not read; sent and not acknowledged, or not sent.
    fields.filter_map(|f| f.strip_prefix(['r', 'w'])).filter_map(|f| f.parse::<u64>().ok()).sum()
}

/// What a reporter has counted of connections to the server.
fn counted(bed: &Bed, metric: &str, reporter: &str) -> f64 {
    let reporter = format!("reporter=\"{reporter}\"");
    bed.nodes()[0].metric(metric, &[&reporter, "destination_workload=\"near\""]).unwrap_or(0.0)
}

#[test]
fn two_applications_exchange_messages_with_nobody_between_and_all_are_counted() {
    const BYTES: u64 = 600_000;
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on"])).expect("bed");
    let [client, near] = bed.meshed([PodSpec::new("client", 0), echo("near", 0)]).expect("pods");
    let accelerated = |bed: &Bed| states(bed, 0).iter().filter(|s| *s == "accelerated").count();
    let talk = |bed: &Bed, to: &str| start(bed, &client, "soak", &["run", to, "4", &BYTES.to_string(), "--turns", "--stay", "3"]);
    let talks = [talk(&bed, &near.address(9000)), talk(&bed, &near.address6(9000))];
    wait_for("eight pairs", Duration::from_secs(10), || Ok(accelerated(&bed) == 8 && entered(&bed, 0) == 16)).expect("accelerated");
    let found = bed.nodes()[0].admin_json("/direct").expect("direct");
    assert!(found["connections"].as_array().is_some_and(|all| all.len() == 8 && all.iter().all(|c| c["sentBytes"].as_u64() > Some(0))));
    for report in talks.map(end) {
        assert_eq!((&report["done"], report["errors"].as_array().map(Vec::len)), (&4.into(), Some(0)), "{report}");
    }
    wait_for("all counted", Duration::from_secs(5), || Ok(counted(&bed, "istio_tcp_connections_closed_total", "source") == 8.0))
        .expect("counted");
    for reporter in ["source", "destination"] {
        for metric in ["istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"] {
            assert_eq!(counted(&bed, metric, reporter), (8 * BYTES) as f64, "{reporter} {metric}");
        }
    }
    assert_eq!(bed.nodes()[0].metric("mesh_indirect_connections_total", &[]).unwrap_or(0.0), 0.0);
}

#[test]
fn accelerated_connections_survive_the_death_of_the_process_and_end_with_a_pod() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on"])).expect("bed");
    let [client, near] = bed.meshed([PodSpec::new("client", 0), echo("near", 0)]).expect("pods");
    // Both ways at once, with pieces of bulk between: turns and ways back are many.
    let talk = start(&bed, &client, "soak", &["run", &near.address(9000), "20", "3000000"]);
    wait_for("accelerated", Duration::from_secs(10), || Ok(states(&bed, 0).iter().any(|s| s == "accelerated"))).expect("some");
    bed.node(0).kill();
    std::thread::sleep(Duration::from_secs(1));
    bed.node(0).start().expect("started");
    bed.nodes()[0].wait_ready().expect("ready");
    let report = end(talk);
    assert_eq!((&report["done"], report["errors"].as_array().map(Vec::len)), (&20.into(), Some(0)), "{report}");
    wait_for("nothing left", Duration::from_secs(5), || Ok(entered(&bed, 0) == 0 && states(&bed, 0).is_empty())).expect("empty");
    let talk = start(&bed, &client, "soak", &["run", &near.address(9000), "20", "30000000"]);
    wait_for("accelerated", Duration::from_secs(10), || Ok(states(&bed, 0).iter().any(|s| s == "accelerated"))).expect("some");
    bed.delete(&near).expect("deleted");
    let report = end(talk);
    assert_eq!((&report["done"], report["errors"].as_array().map(Vec::len)), (&0.into(), Some(20)), "all ended, none in silence: {report}");
    wait_for("nothing left", Duration::from_secs(5), || Ok(entered(&bed, 0) == 0 && states(&bed, 0).is_empty())).expect("empty");
}

#[test]
fn a_program_that_sends_without_a_copy_is_told_when_that_is_done() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", "proxy"])).expect("bed");
    let mut plain = echo("plain", 0);
    plain.labels.insert("mesh-node.io/acceleration".into(), "off".into());
    let [client, near, plain] = bed.meshed([PodSpec::new("client", 0), echo("near", 0), plain]).expect("pods");
    let reached =
        |bed: &Bed, state: &str| bed.nodes()[0].metric("mesh_acceleration_total", &[&format!("state=\"{state}\"")]).unwrap_or(0.0);
    for to in [plain.address(9000), plain.address6(9000)] {
        let report = end(start(&bed, &client, "soak", &["zerocopy", &to, "200000"]));
        assert_eq!((&report["read"], &report["told"]), (&200_000.into(), &report["sent"]), "{report}");
    }
    assert_eq!((reached(&bed, "accelerated"), reached(&bed, "special")), (0.0, 2.0));
    // Asked for in the midst of a conversation, it is had as soon as the connection has left.
    talk_until(
        "proxy",
        || reached(&bed, "accelerated") > 0.0,
        || {
            let report = end(start(&bed, &client, "soak", &["zerocopy", &near.address(9000), "400000", "--late"]));
            assert_eq!((&report["read"], &report["sent"]), (&400_000.into(), &400.into()), "{report}");
            assert!(report["told"].as_u64() > Some(350), "{report}");
        },
    );
    assert!(reached(&bed, "special") >= 3.0);
}

#[test]
fn a_program_that_changes_its_mind_about_blocking_is_learned() {
    for same_node in ["proxy", "direct"] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", same_node])).expect("bed");
        let [client, other, near] = bed.meshed([PodSpec::new("client", 0), PodSpec::new("other", 0), echo("near", 0)]).expect("pods");
        let reached =
            |bed: &Bed, state: &str| bed.nodes()[0].metric("mesh_acceleration_total", &[&format!("state=\"{state}\"")]).unwrap_or(0.0);
        let flip = |bed: &Bed| end(start(bed, &client, "soak", &["flip", &near.address(9000), "1000000"]));
        let flipped = || assert_eq!(flip(&bed)["read"], 1_000_000, "{same_node}");
        talk_until(same_node, || reached(&bed, "accelerated") > 0.0 && reached(&bed, "blocking") > 0.0, flipped);
        // Learned of one that was accelerated when it changed, and not just about to be.
        talk_until(same_node, || reached(&bed, "unfit") > 0.0, flipped);
        let entered = || reached(&bed, "accelerated") - reached(&bed, "paused");
        let before = entered();
        flipped();
        // Through the proxy the server's own hop still is; nothing of the client's.
        let server_hops = if same_node == "proxy" { 1.0 } else { 0.0 };
        assert!(entered() <= before + server_hops, "{same_node}");
        // Other pods are as they were: more of theirs is than the server's own hops.
        let (before, talks) = (reached(&bed, "accelerated"), std::cell::Cell::new(0.0));
        talk_until(
            same_node,
            || reached(&bed, "accelerated") > before + server_hops * talks.get(),
            || {
                let talk = end(start(&bed, &other, "soak", &["run", &near.address(9000), "1", "200000", "--turns", "--stay", "2"]));
                assert_eq!(talk["done"], 1);
                talks.set(talks.get() + 1.0);
            },
        );
    }
}

/// Has a program talk until something is so, a few times at most: the server pauses at random, and who is looked at in a pause is not
/// seen to take anything.
fn talk_until(what: &str, is: impl Fn() -> bool, mut talk: impl FnMut()) {
    for _ in 0..5 {
        talk();
        if is() {
            return;
        }
    }
    panic!("{what}: not after five talks");
}

#[test]
fn io_uring_is_as_on_tcp() {
    for same_node in ["proxy", "direct"] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", same_node])).expect("bed");
        let [client, near] = bed.meshed([PodSpec::new("client", 0), echo("near", 0)]).expect("pods");
        let reached =
            |bed: &Bed, state: &str| bed.nodes()[0].metric("mesh_acceleration_total", &[&format!("state=\"{state}\"")]).unwrap_or(0.0);
        let talk = |bed: &Bed, more: &[&str]| {
            let to = near.address(9000);
            end(start(bed, &client, "soak", &[&["uring", &to, "1000000"], more].concat()))
        };
        for (state, more) in [("io_uring", &[][..]), ("blocking", &["--blocking"])] {
            talk_until(
                same_node,
                || reached(&bed, state) > 0.0,
                || {
                    let report = talk(&bed, more);
                    assert_eq!(report["read"], 1_000_000, "{same_node}: {report}");
                },
            );
        }
    }
}

#[test]
fn urgent_data_is_no_part_of_the_stream() {
    for same_node in ["proxy", "direct"] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", same_node])).expect("bed");
        let [client, near] = bed.meshed([PodSpec::new("client", 0), echo("near", 0)]).expect("pods");
        let accelerated = |bed: &Bed| bed.nodes()[0].metric("mesh_acceleration_total", &["state=\"accelerated\""]).unwrap_or(0.0);
        for to in [near.address(9000), near.address6(9000)] {
            let before = accelerated(&bed);
            talk_until(
                same_node,
                || accelerated(&bed) > before,
                || {
                    let report = end(start(&bed, &client, "soak", &["urgent", &to, "1000000"]));
                    assert_eq!(report["read"], 1_000_000, "{same_node}: {report}");
                },
            );
        }
    }
}

#[test]
fn who_reads_by_other_means_is_left_to_tcp() {
    for same_node in ["proxy", "direct"] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", same_node])).expect("bed");
        let [client, near] = bed.meshed([PodSpec::new("client", 0), echo("near", 0)]).expect("pods");
        let reached =
            |bed: &Bed, state: &str| bed.nodes()[0].metric("mesh_acceleration_total", &[&format!("state=\"{state}\"")]).unwrap_or(0.0);
        let mut talks = 0.0;
        for to in [near.address(9000), near.address6(9000)] {
            let before = reached(&bed, "spliced");
            talk_until(
                same_node,
                || reached(&bed, "spliced") > before,
                || {
                    let report = end(start(&bed, &client, "soak", &["splice", &to, "1000000"]));
                    assert_eq!(report["read"], 1_000_000, "{same_node}: {report}");
                    talks += 1.0;
                },
            );
        }
        // Through the proxy the server's own hop is, and that alone.
        let (least, most) = if same_node == "proxy" { (1.0, talks) } else { (0.0, 0.0) };
        let (accelerated, paused) = (reached(&bed, "accelerated"), reached(&bed, "paused"));
        assert!((least..=most + paused).contains(&accelerated), "{same_node}: {accelerated} of {talks}, {paused} came back");
    }
}

#[test]
fn who_looks_before_it_reads_is_left_to_tcp() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", "direct"])).expect("bed");
    let [client, near] = bed.meshed([PodSpec::new("client", 0), echo("near", 0)]).expect("pods");
    let reached =
        |bed: &Bed, state: &str| bed.nodes()[0].metric("mesh_acceleration_total", &[&format!("state=\"{state}\"")]).unwrap_or(0.0);
    talk_until(
        "peek",
        || reached(&bed, "special") > 0.0,
        || {
            let report = end(start(&bed, &client, "soak", &["peek", &near.address(9000), "1000000"]));
            assert_eq!(report["read"], 1_000_000, "{report}");
        },
    );
    assert_eq!(reached(&bed, "accelerated"), 0.0);
}

#[test]
fn programs_in_go_cannot_tell() {
    let built = tempfile::tempdir().expect("a directory");
    let talk = built.path().join("talk");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/talk.go");
    let mut go = std::process::Command::new("go");
    go.args(["build", "-o"]).arg(&talk).arg(source).env("GO111MODULE", "off").env("GOCACHE", built.path().join("cache"));
    assert!(go.status().expect("go").success(), "{source} is built");
    for same_node in ["proxy", "direct"] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", same_node])).expect("bed");
        let serve = PodSpec { command: vec![talk.display().to_string(), "serve".into()], ..echo("near", 0) };
        let [client, near] = bed.meshed([PodSpec::new("client", 0), serve]).expect("pods");
        let run = bed.command(&client, &talk, &["run", &near.v4().to_string()]).output().expect("ended");
        assert_eq!(String::from_utf8_lossy(&run.stdout), "done\n", "{same_node}");
        for state in ["accelerated", "spliced"] {
            let reached = bed.nodes()[0].metric("mesh_acceleration_total", &[&format!("state=\"{state}\"")]);
            assert!(reached.is_ok_and(|n| n > 0.0), "{same_node}: {state}");
        }
    }
}

#[test]
fn who_asks_how_much_there_is_is_told() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/fionread.py");
    for (way, same_node) in [("off", "proxy"), ("on", "proxy"), ("on", "direct")] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", way, "--same-node", same_node])).expect("bed");
        let serve = ["/usr/bin/python3", script, "serve", "9000"].map(str::to_owned).to_vec();
        let [client, near] = bed.meshed([PodSpec::new("client", 0), PodSpec { command: serve, ..echo("near", 0) }]).expect("pods");
        for host in [near.v4().to_string(), near.v6().to_string()] {
            let run = bed.command(&client, "/usr/bin/python3".as_ref(), &[script, "client", &host, "9000", "0"]).output().expect("ended");
            let errors = String::from_utf8_lossy(&run.stderr);
            assert_eq!(String::from_utf8_lossy(&run.stdout), "done\n", "{way} {same_node} {host}: {errors}");
        }
        for state in ["accelerated", "paused"] {
            let reached = bed.nodes()[0].metric("mesh_acceleration_total", &[&format!("state=\"{state}\"")]);
            assert_eq!(way == "on", reached.is_ok_and(|n| n > 2.0), "{way} {same_node}: {state}, again and again");
        }
    }
}

/// What comes after the process has died and another one serves goes by TCP to sockets that the first has accelerated.
#[test]
fn who_asks_how_much_there_is_is_told_by_the_next_process_too() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/fionread.py");
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on"])).expect("bed");
    let serve = ["/usr/bin/python3", script, "serve", "9000"].map(str::to_owned).to_vec();
    let [client, near] = bed.meshed([PodSpec::new("client", 0), PodSpec { command: serve, ..echo("near", 0) }]).expect("pods");
    let mut asking = bed.command(&client, "/usr/bin/python3".as_ref(), &[script, "client", &near.v4().to_string(), "9000", "5"]);
    let asking = asking.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().expect("started");
    wait_for("an accelerated pair", Duration::from_secs(4), || Ok(states(&bed, 0) == ["accelerated"])).expect("accelerated");
    bed.node(0).kill();
    bed.node(0).start().expect("started");
    bed.nodes()[0].wait_ready().expect("ready");
    let run = asking.wait_with_output().expect("ended");
    assert_eq!(String::from_utf8_lossy(&run.stdout), "done\n", "{}", String::from_utf8_lossy(&run.stderr));
    wait_for("empty maps", Duration::from_secs(5), || Ok(entered(&bed, 0) == 0)).expect("nothing left");
}

#[test]
fn programs_in_java_cannot_tell() {
    // Compiled in memory, and with little that starts beside it.
    let java = [
        "java",
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        "-Dsun.net.httpserver.nodelay=true",
        concat!(env!("CARGO_MANIFEST_DIR"), "/programs/Talk.java"),
    ];
    for same_node in ["proxy", "direct"] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on", "--same-node", same_node])).expect("bed");
        let serve = java.into_iter().chain(["serve"]).map(str::to_owned).collect();
        let [client, near] = bed.meshed([PodSpec::new("client", 0), PodSpec { command: serve, ..echo("near", 0) }]).expect("pods");
        let run = bed.command(&client, "java".as_ref(), &[&java[1..], &["run", &near.v4().to_string()]].concat()).output().expect("ended");
        assert_eq!(String::from_utf8_lossy(&run.stdout), "done\n", "{same_node}: {}", String::from_utf8_lossy(&run.stderr));
        let reached = |state: &str| bed.nodes()[0].metric("mesh_acceleration_total", &[&format!("state=\"{state}\"")]).unwrap_or(0.0);
        assert!(reached("accelerated") > 0.0 && reached("blocking") > 0.0, "{same_node}");
        wait_for("empty maps", Duration::from_secs(5), || Ok(entered(&bed, 0) == 0 && states(&bed, 0).is_empty())).expect("nothing left");
    }
}

#[test]
fn servers_that_share_a_port_are_accelerated_each() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--acceleration", "on"])).expect("bed");
    let serve = format!("{} serve 9000 --shared", program("soak").display());
    let mut shared = echo("near", 0);
    shared.command = ["sh", "-c", &format!("{serve} & exec {serve}")].map(Into::into).to_vec();
    let [client, near] = bed.meshed([PodSpec::new("client", 0), shared]).expect("pods");
    // Long enough that each is looked at while it talks: one that is silent is not judged.
    let talk = start(&bed, &client, "soak", &["run", &near.address(9000), "20", "1000000", "--turns", "--stay", "5"]);
    let mut seen = Vec::new();
    let twenty = wait_for("twenty pairs", Duration::from_secs(10), || {
        let states = states(&bed, 0);
        if !states.is_empty() {
            seen = states;
        }
        // One or two may be on their way out or back.
        Ok(seen.iter().filter(|state| *state == "accelerated").count() >= 18 && entered(&bed, 0) >= 36)
    });
    assert!(twenty.is_ok(), "{twenty:?}: {seen:?}");
    let output = bed.command(&near, "ss".as_ref(), &["-tnpH", "state", "established"]).output().expect("ss");
    let text = String::from_utf8_lossy(&output.stdout);
    let owners = text.lines().filter_map(|l| l.split_once("pid=")?.1.split(',').next()).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(owners.len(), 2, "both have some: {text}");
    assert_eq!(end(talk)["done"], 20);
    wait_for("empty maps", Duration::from_secs(5), || Ok(entered(&bed, 0) == 0 && states(&bed, 0).is_empty())).expect("nothing left");
}
