//! Many connections: none is lost, and nothing is left of them.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::Duration,
};

use mesh_node::io::netns::Netns;
use mesh_tests::{
    Bed, NodeOptions, PodSpec,
    bed::{Node, program, wait_for},
};
use serde_json::Value;

/// Entries of a pinned map.
fn entries(node: &Node, map: &str) -> usize {
    let path = node.pinned("maps").join(map);
    let data = mesh_node_map(&path);
    data.unwrap_or(usize::MAX)
}

/// Counts keys with the map's own iterator.
fn mesh_node_map(path: &std::path::Path) -> Option<usize> {
    mesh_node::capture::count_entries(path).ok()
}

fn resident(bed: &Bed) -> u64 {
    bed.nodes().iter().map(|n| n.resident().expect("resident")).sum()
}

/// Waits until nothing is open but `pooled` HBONE connections more than at the start.
fn settled(bed: &Bed, descriptors: &[usize], pooled: usize) {
    wait_for("connections and descriptors gone", Duration::from_secs(15), || {
        let mut same = true;
        for (node, before) in bed.nodes().iter().zip(descriptors) {
            same &= node.metric("mesh_open_connections", &[])? < 0.5 && node.descriptors()? <= *before + 4 + pooled;
        }
        Ok(same)
    })
    .expect("nothing is left open");
    for node in bed.nodes() {
        for map in ["PENDING", "PROXY_FLOWS"] {
            let left = entries(node, map);
            assert!(left <= 4 + pooled, "{}: {left} entries left in {map}", node.name);
        }
    }
}

#[test]
fn ten_thousand_short_connections_leave_nothing_behind() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, near, far] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("near", 0), PodSpec::server("far", 1)]).expect("pods");
    // A first round, so that pools and allocator have what they need.
    for to in [near.address(8080), far.address(8080)] {
        assert_eq!(bed.probe(&client, &["churn", &to, "504", "8"]).expect("a report")["failed"], 0);
    }
    let descriptors = bed.nodes().iter().map(|n| n.descriptors().expect("descriptors")).collect::<Vec<_>>();
    // What grows once is the allocator's, which takes again what it had given back before it was measured; what is left behind grows again.
    let mut grown = Vec::new();
    while grown.last().is_none_or(|grown| *grown >= 8 * 1024 * 1024) {
        assert!(grown.len() < 3, "grew by {grown:?} bytes over 10,000 connections each");
        let memory = resident(&bed);
        for to in [near.address(8080), near.address6(8080), far.address(8080), far.address6(8080)] {
            let report = bed.probe(&client, &["churn", &to, "2504", "8"]).expect("a report");
            assert_eq!(report["failed"], 0, "{to}: {report}");
        }
        settled(&bed, &descriptors, 0);
        grown.push(resident(&bed).saturating_sub(memory));
    }
    let opened = bed.nodes()[0].metric("istio_tcp_connections_opened_total", &["reporter=\"source\""]).expect("metric");
    let connections = u32::try_from(1008 + 10_016 * grown.len()).expect("few");
    assert!((opened - f64::from(connections)).abs() < 0.5, "{opened} and not {connections}");
}

#[test]
fn two_thousand_idle_connections_stay_alive_and_are_cheap() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, far] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("far", 1)]).expect("pods");
    assert_eq!(bed.probe(&client, &["churn", &far.address(8080), "100", "4"]).expect("a report")["failed"], 0);
    let descriptors = bed.nodes().iter().map(|n| n.descriptors().expect("descriptors")).collect::<Vec<_>>();
    let memory = resident(&bed);
    let mut command = bed.command(&client, &program("probe"), &["hold", &far.address(8080), "2000", "2"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("probe");
    let mut line = String::new();
    BufReader::new(child.stderr.take().expect("stderr")).read_line(&mut line).expect("a line");
    assert_eq!(line.trim(), "held");
    // Two nodes, so two ends of 2,000 connections.
    let each = resident(&bed).saturating_sub(memory) / 4000;
    assert!(each < 16 * 1024, "{each} bytes for each end of an idle connection");
    let output = child.wait_with_output().expect("ended");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert!(report["held"] == 2000 && report["failed"] == 0, "{report}");
    // What stays: the HBONE connections that were needed for so many streams, idle in the pool.
    settled(&bed, &descriptors, 20);
}

/// Sockets that say nothing, from a pod, take no place of the kubelet's, nor all of those for others.
#[test]
fn sockets_on_the_pages_keep_nobody_from_readiness() {
    use std::{
        io::{Read, Write},
        net::TcpStream,
    };
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client] = bed.meshed([PodSpec::new("client", 0)]).expect("a pod");
    let address = bed.node_address(0);
    let of_pod = Netns::open(&client.netns).expect("a namespace");
    for port in [15_020, 15_021] {
        let held = of_pod
            .enter(|| (0..100).map(|_| TcpStream::connect((address, port)).expect("connected")).collect::<Vec<_>>())
            .expect("entered");
        held.iter().for_each(|mut socket| drop(socket.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: a\r\n")));
        for (node, to) in [(0, "127.0.0.1".to_owned()), (0, address.to_string()), (1, address.to_string())] {
            let netns = Netns::open(&bed.nodes()[node].netns).expect("a namespace");
            let mut socket = netns.enter(|| TcpStream::connect((&*to, port))).expect("entered").expect("connected");
            socket.set_read_timeout(Some(Duration::from_secs(2))).expect("a socket");
            let path = if port == 15_021 { "/healthz/ready" } else { "/metrics" };
            socket.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).expect("sent");
            let mut answer = Vec::new();
            socket.read_to_end(&mut answer).unwrap_or_else(|e| panic!("{port} from node {node} to {to}: {e}"));
            assert!(answer.starts_with(b"HTTP/1.1 200"), "{port} from node {node} to {to}");
        }
    }
    let refused = bed.nodes()[0].metric("mesh_pages_refused_total", &[]).expect("metrics");
    assert!(refused >= 150.0, "{refused}");
}
