//! How connections end where a node's process does.

use std::time::SystemTime;

use aya::maps::{HashMap, Map, MapData};
use mesh_common::{Address, maps::FlowKey};

use super::*;

/// Says without end, or takes without end and writes down how that ended.
const ENDLESS: &str = r#"
import socket, sys, threading
def says(c):
    try:
        c.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True: c.sendall(bytes(1000))
    except OSError: pass
def takes(c):
    try:
        while c.recv(65536): pass
        end = "end"
    except ConnectionResetError: end = "reset"
    except OSError as e: end = str(e)
    open(sys.argv[1], "a").write(end + "\n")
def listen(port, serve):
    s = socket.create_server(("", port))
    while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
threading.Thread(target=listen, args=(8081, takes), daemon=True).start()
listen(8080, says)
"#;

/// Reads what is said without end; and says itself, to who takes it. How the first ends is said.
const READS: &str = r#"
import socket, sys, threading
def say():
    c = socket.create_connection((sys.argv[1], 8081))
    try:
        while True: c.sendall(bytes(1000))
    except OSError: pass
threading.Thread(target=say, daemon=True).start()
c = socket.create_connection((sys.argv[1], int(sys.argv[2])))
if sys.argv[2] == "80": c.sendall(b"GET / HTTP/1.0\r\n\r\n")
print("reads", flush=True)
c.settimeout(20)
try:
    while c.recv(65536): pass
    print("end")
except ConnectionResetError: print("reset")
except OSError as e: print(e)
"#;

/// A stream that a killed process has cut off does not look complete, to either end, whichever node's it was.
#[test]
fn what_a_kill_cuts_off_looks_cut_off() {
    for killed in [0, 1] {
        let mut bed = Bed::ambient(&NodeOptions::with(&["--same-node", "proxy"])).expect("bed");
        let directory = tempfile::tempdir().expect("a directory");
        let ends = ["near", "far"].map(|name| directory.path().join(name));
        let server = |name: &str, node: usize| {
            let command = ["/usr/bin/python3", "-c", ENDLESS, &ends[node].display().to_string()].map(str::to_owned).to_vec();
            PodSpec { command, port: Some(8080), ..PodSpec::new(name, node) }
        };
        let [client, near, far] = bed.meshed([PodSpec::new("client", 0), server("near", 0), server("far", 1)]).expect("pods");
        bed.settle().expect("settled");
        let to = if killed == 0 { vec![&near, &far] } else { vec![&far] };
        for pod in &to {
            let yaml = format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {0}}}\nspec: {{selector: {{app: {0}}}, ports: [{{name: http, port: 80, targetPort: 8080}}, {{name: tcp, port: 8081}}]}}\n",
                pod.name
            );
            bed.kubectl_apply(&pod.name, &yaml).expect("service");
        }
        bed.settle().expect("settled");
        let readers = to.iter().flat_map(|pod| [(pod.v4().to_string(), "8080"), (pod.name.clone(), "80")]).map(|(host, port)| {
            let mut command = bed.command(&client, Path::new("/usr/bin/python3"), &["-c", READS, &host, port]);
            command.stdout(std::process::Stdio::piped()).spawn().expect("a reader")
        });
        let readers = readers.collect::<Vec<_>>();
        std::thread::sleep(Duration::from_secs(1));
        bed.node(killed).kill();
        for (i, reader) in readers.into_iter().enumerate() {
            let output = reader.wait_with_output().expect("its end");
            assert_eq!(String::from_utf8_lossy(&output.stdout), "reads\nreset\n", "{i} of {killed}");
        }
        for pod in to {
            let ended = || std::fs::read_to_string(&ends[usize::from(pod.name == "far")]).unwrap_or_default();
            wait_for("the other end", Duration::from_secs(5), || Ok(ended() == "reset\nreset\n"))
                .unwrap_or_else(|_| panic!("{} of {killed}: {:?}", pod.name, ended()));
        }
    }
}

/// Dials every twentieth of a second, and says when somebody answered.
const DIALS: &str = r#"
import socket, sys, time
while True:
    try:
        c = socket.create_connection((sys.argv[1], 8080), 2)
        c.sendall(b"ping\n")
        if c.recv(10): print(time.time(), flush=True)
        c.close()
    except OSError: pass
    time.sleep(0.05)
"#;

/// With one connection that stays to the end, a node that stops serves who comes almost to its end.
#[test]
fn who_comes_is_served_almost_to_the_end_of_a_stop() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--same-node", "proxy"])).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    bed.settle().expect("settled");
    let to = server.v4().to_string();
    let python = |script: &str| {
        let mut command = bed.command(&client, Path::new("/usr/bin/python3"), &["-c", script, &to]);
        command.stdout(Stdio::piped()).spawn().expect("python")
    };
    const STAYS: &str = "import socket, sys, time\nc = socket.create_connection((sys.argv[1], 8080))\ntime.sleep(60)\n";
    let (mut stays, mut dials) = (python(STAYS), python(DIALS));
    std::thread::sleep(Duration::from_secs(1));
    let began = SystemTime::now();
    bed.node(0).stop().expect("stopped");
    let ended = SystemTime::now();
    for child in [&mut stays, &mut dials] {
        child.kill().expect("killed");
    }
    let said = String::from_utf8(dials.wait_with_output().expect("its end").stdout).expect("text");
    stays.wait().expect("its end");
    let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs_f64();
    let last: f64 = said.lines().last().and_then(|l| l.parse().ok()).expect("somebody answered");
    assert!(since(ended) - since(began) > 3.0, "the one that stays is waited for");
    assert!(since(ended) - last < 0.9, "{} s before the end", since(ended) - last);
}

/// A service of one pod, which has an address of each family: while its node restarts, requests wait for it.
#[test]
fn a_request_waits_for_the_only_pods_node_to_restart() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let command = vec![program("web").display().to_string(), "serve".into(), "8080".into(), "web".into()];
    let web = PodSpec { command, port: Some(8080), ..PodSpec::new("web", 1) };
    let [client, _web] = bed.meshed([PodSpec::new("client", 0), web]).expect("pods");
    let yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: web}\nspec: {hosts: [web], http: [{retries: {attempts: 0}, route: [{destination: {host: web}}]}]}\n";
    bed.kubectl_apply("web", yaml).expect("service");
    bed.settle().expect("settled");
    bed.node(1).kill();
    let mut command = bed.command(&client, &program("web"), &["get", "web:80/x", "1"]);
    let asks = command.stdout(Stdio::piped()).spawn().expect("web");
    std::thread::sleep(Duration::from_millis(300));
    bed.node(1).start().expect("started");
    let output = asks.wait_with_output().expect("a report");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert_eq!(report["statuses"]["200"], 1, "{report}");
}

#[test]
fn a_pod_gone_while_nobody_watched_is_released_at_the_next_start() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    let map = MapData::from_pin(bed.nodes()[0].pinned("maps").join("PROXY_FLOWS")).expect("the map");
    let mut flows = HashMap::<_, FlowKey, u32>::try_from(Map::LruHashMap(map)).expect("a hash map");
    bed.node(0).kill();
    bed.delete(&server).expect("deleted");
    // As of connections that were open when their pod went: nobody takes that back.
    let note = |pod: &Pod| {
        let std::net::IpAddr::V4(ip) = pod.v4() else { panic!("no address") };
        let address = |port| Address::new(mesh_common::addr::mapped(ip.octets()), port);
        FlowKey { remote: address(40_000), local: address(8080) }
    };
    let (stray, other) = (note(&server), note(&client));
    for key in [stray, other] {
        flows.insert(key, FlowKey::ALLOWED, 0).expect("noted");
    }
    bed.node(0).start().expect("started");
    bed.node(0).wait_ready().expect("ready");
    let links = bed.nodes()[0].pinned("links");
    wait_for("one steered pod", Duration::from_secs(5), || {
        let names = std::fs::read_dir(&links)?.filter_map(|e| e.ok()?.file_name().into_string().ok());
        Ok(names.filter(|n| n.starts_with("steer-")).count() == 1)
    })
    .expect("released");
    wait_for("its notes forgotten", Duration::from_secs(5), || Ok(flows.get(&stray, 0).is_err())).expect("forgotten");
    assert!(flows.get(&other, 0).is_ok(), "those of who is there are not");
}

/// Where capture fails open, the end of a process takes nobody with it who is about to come, into its pods or out of them.
#[test]
fn nobody_is_lost_who_comes_as_listeners_close() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--fail-mode", "open"])).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 1), PodSpec::server("server", 1)]).expect("pods");
    let plain = |name: &str, node| PodSpec::server(name, node).label("istio.io/dataplane-mode", "none");
    let [from, to] = [plain("from", 0), plain("to", 0)].map(|spec| bed.pod(&spec).expect("pod"));
    bed.settle().expect("settled");
    for _ in 0..3 {
        let coming = [(&from, &server), (&client, &to), (&from, &server), (&client, &to)];
        let coming = coming.map(|(from, to)| start(&bed, from, &["attempts", &to.address(8080), "2", "1"]));
        std::thread::sleep(Duration::from_millis(700));
        bed.node(1).stop().expect("stopped");
        for report in coming.map(end) {
            assert!(report["failed"] == 0 && report["worked"].as_u64().is_some_and(|n| n > 50), "{report}");
        }
        bed.node(1).start().expect("started");
        bed.node(1).wait_ready().expect("ready");
    }
}
