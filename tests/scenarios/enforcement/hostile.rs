//! Pods whose processes may do what they like in their own network namespace, and nothing to others.

use super::*;

fn python(bed: &Bed, pod: &Pod, code: &str, arguments: &[&str]) -> String {
    let output = bed.run(pod, Path::new("/usr/bin/python3"), &[&["-c", code], arguments].concat()).expect("run");
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn deny(bed: &Bed, from: &str) {
    let yaml = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: deny, namespace: default}}\n\
         spec: {{selector: {{matchLabels: {{app: server}}}}, action: DENY, rules: [{{from: [{{source: {from}}}]}}]}}\n"
    );
    bed.apply("deny", &yaml).expect("applied");
    bed.settle().expect("settled");
}

/// Binds to an address the pod may not have, and asks.
const BOUND: &str = r#"
import socket, sys
_, address, host, port = sys.argv
s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
s.settimeout(3)
try:
    if ":" in host: s.setsockopt(41, 78, 1)
    if address != "-": s.bind((address, 0))
    s.connect((host, int(port)))
    s.sendall(b"ping\n")
    print(s.recv(10).decode().strip())
except OSError as error: print(type(error).__name__)
"#;

#[test]
fn a_pod_is_seen_by_its_own_address_whatever_it_binds_to() {
    // Through the proxy: past it nothing but the pod's own address goes.
    let mut bed = Bed::ambient(&NodeOptions::with(&["--same-node", "proxy"])).expect("bed");
    let server = PodSpec::server("server", 0).label("app", "server");
    let [client, server, friend] = bed.meshed([PodSpec::new("client", 0), server, PodSpec::new("friend", 0)]).expect("pods");
    bed.settle().expect("settled");
    let (v4, v6) = (client.v4().to_string(), client.v6().to_string());
    deny(&bed, &format!("{{ipBlocks: [\"{v4}\", \"{v6}\"]}}"));
    for (added, device) in [("192.0.2.7/32", "lo"), ("2001:db8::7/128", "lo")] {
        ip(&client, &["addr", "add", added, "dev", device]);
    }
    let ask = |pod: &Pod, from: &str, to: std::net::IpAddr| python(&bed, pod, BOUND, &[from, &to.to_string(), "8080"]);
    let to = [server.v4(), server.v6()];
    assert_eq!(to.map(|to| ask(&friend, "-", to)), ["pong\n", "pong\n"], "it is the others that may");
    // What the connect hook aims at is any pod's to bind to, without privileges.
    for (from, to) in [("-", to[0]), ("192.0.2.7", to[0]), ("-", to[1]), ("2001:db8::7", to[1]), ("fd6d:6573:6815:1::1234", to[1])] {
        assert_eq!(ask(&client, from, to), "ConnectionResetError\n", "from {from}");
    }
    assert!(!ask(&client, &server.v4().to_string(), to[0]).contains("pong"), "as the server itself");
}

/// Opens a connection whose reset cannot leave the pod, says so, and closes it in silence if it is told to.
const SILENT: &str = r#"
import socket, subprocess, sys, time
_, host, close = sys.argv
s = socket.create_connection((host, 8080))
s.sendall(b"ping\n")
print(s.recv(10).decode().strip(), flush=True)
subprocess.run(["ip", "route", "add", "blackhole", host], check=True)
if close == "close":
    s.setsockopt(6, 19, 1)
    s.close()
time.sleep(30)
"#;

#[test]
fn a_direct_connection_ends_at_the_server_whatever_becomes_of_its_client() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let server = PodSpec::server("server", 0).label("app", "server");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), server]).expect("pods");
    bed.settle().expect("settled");
    let open = |client: &Pod| {
        let output = bed.run(&server, Path::new("ss"), &["-Htn", "state", "established", "dst", &client.v4().to_string()]).expect("ss");
        String::from_utf8_lossy(&output.stdout).lines().count()
    };
    let host = server.v4().to_string();
    for way in ["close", "stay"] {
        let silent = bed.command(&client, Path::new("/usr/bin/python3"), &["-c", SILENT, &host, way]);
        let silent = Process::start(silent).expect("started");
        wait_for("the connection", Duration::from_secs(5), || Ok(!python(&bed, &client, ROUTES, &[]).is_empty())).expect("open");
        if way == "stay" {
            assert_eq!(open(&client), 1);
            deny(&bed, "{namespaces: [default]}");
        }
        wait_for(way, Duration::from_secs(5), || Ok(open(&client) == 0)).expect("ended at the server");
        drop(silent);
        ip(&client, &["route", "del", "blackhole", &host]);
    }
}

const ROUTES: &str = r#"
import subprocess
print(subprocess.run(["ip", "route", "show", "type", "blackhole"], capture_output=True, text=True).stdout.strip(), end="")
"#;

#[test]
fn listeners_that_a_pod_ends_are_there_again() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [pod, near, far] = bed.meshed([PodSpec::server("pod", 0), PodSpec::server("near", 0), PodSpec::server("far", 1)]).expect("pods");
    bed.settle().expect("settled");
    let all = |bed: &Bed| {
        answers(bed, &pod, &far.address(8080)) && answers(bed, &near, &pod.address(8080)) && answers(bed, &far, &pod.address6(8080))
    };
    assert!(all(&bed));
    for ports in ["sport = :15006", "sport = :15001", "sport = :15008", "sport >= :15001 and sport <= :15008"] {
        let killed = bed.run(&pod, Path::new("ss"), &["-K", "-Htl", ports]).expect("ss");
        assert!(!killed.stdout.is_empty(), "{ports}: {}", String::from_utf8_lossy(&killed.stderr));
        wait_for(ports, Duration::from_secs(5), || Ok(all(&bed))).expect("accepted again");
    }
    let log = bed.nodes()[0].log_text();
    assert!(log.contains("had been ended from within the pod"));
    assert!(log.matches("accepting failed").count() < 5);
}
