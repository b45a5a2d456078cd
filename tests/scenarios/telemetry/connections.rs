//! What is told of connections.

use super::*;

/// Connections that do not come about are counted by both ends, and logged as ztunnel logs them.
#[test]
fn connections_that_fail_are_counted_by_why_and_logged_as_errors() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1).label("app", "server")]).expect("pods");
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: default}\nspec: {action: DENY, rules: [{to: [{operation: {ports: [\"9999\"]}}]}]}\n";
    bed.apply("deny", deny).expect("policy");
    bed.settle().expect("settled");
    let ask = |port| bed.probe(&client, &["ask", &server.address(port), "ping"]).expect("a report");
    assert_eq!(ask(8080)["answer"], "pong");
    assert!(ask(9999)["answer"].is_null() && ask(9998)["answer"].is_null(), "one is denied, and nobody listens on the other");
    // One to a port that declares nothing is tried before it is known what its client will say, and told once too.
    bed.kubectl_apply(
        "quiet",
        "apiVersion: v1\nkind: Service\nmetadata: {name: quiet}\nspec: {selector: {app: server}, ports: [{name: any, port: 9997}]}\n",
    )
    .expect("service");
    bed.settle().expect("settled");
    let script =
        "import socket, sys, time\nc = socket.create_connection((sys.argv[1], 9997))\ntime.sleep(0.2)\nc.sendall(b'hello')\nc.recv(9)\n";
    let output = bed.run(&client, std::path::Path::new("/usr/bin/python3"), &["-c", script, "quiet"]).expect("python");
    assert!(!output.status.success(), "nobody listens there either");
    // Its other end was indeed asked twice, each time at both of its addresses.
    for (node, reporter, connects) in [(0, "reporter=\"source\"", 2_u16), (1, "reporter=\"destination\"", 5)] {
        let node = &bed.nodes()[node];
        let count = |name: &str, flags: &str| {
            let name = format!("istio_tcp_connections_{name}_total");
            node.metric(&name, &[reporter, &format!("response_flags=\"{flags}\""), "destination_workload=\"server\""]).unwrap_or(0.0)
        };
        wait_for("the last is closed", Duration::from_secs(5), || Ok(count("closed", "-") > 0.5)).expect("closed");
        // As with ztunnel, each was begun and is over.
        assert_eq!(
            [count("opened", "-"), count("opened", "DENY"), count("opened", "CONNECT")],
            [2.0 + f64::from(connects), 0.0, 0.0],
            "{reporter}"
        );
        for name in ["closed", "failed"] {
            assert_eq!([count(name, "DENY"), count(name, "CONNECT")], [1.0, f64::from(connects)], "{name}, {reporter}");
        }
        assert_eq!(count("failed", "-"), 0.0, "{reporter}");
        let lines = node.access_log();
        let of = |level: &str, part: &str| {
            lines.iter().filter(|l| l.contains(level) && l.contains("connection complete") && l.contains(part)).count()
        };
        assert_eq!(
            (of("\terror\t", "error="), of("\tinfo\t", "error="), of("\tinfo\t", "dst.workload")),
            (1 + usize::from(connects), 0, 1),
            "{reporter}: {lines:#?}"
        );
    }
}

/// Connections that carry no requests are told of as Envoy's TCP proxy tells of them: by the service's port that was dialled, and by where
/// they went from there.
#[test]
fn connections_are_told_of_by_what_was_dialled() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let service = |name: &str, port: u16| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: {name}}}, ports: [{{name: tcp, port: {port}, targetPort: 8080}}]}}\n"
        )
    };
    for (name, port) in [("server", 90), ("empty", 91)] {
        bed.kubectl_apply(name, &service(name, port)).expect("service");
    }
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1).label("app", "server")]).expect("pods");
    let log = tempfile::Builder::new().prefix("access").suffix(".log").tempfile().expect("a file");
    let mesh = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    extensionProviders:\n    - name: file\n      envoyFileAccessLog: {{path: {}, logFormat: {{labels: {{local: '%DOWNSTREAM_LOCAL_ADDRESS%', host: '%UPSTREAM_HOST%', cluster: '%UPSTREAM_CLUSTER%', peer: '%DOWNSTREAM_PEER_URI_SAN%', code: '%RESPONSE_CODE%', flags: '%RESPONSE_FLAGS%', ended: '%CONNECTION_TERMINATION_DETAILS%', unconnected: '%UPSTREAM_TRANSPORT_FAILURE_REASON%'}}}}}}\n---\napiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: mesh, namespace: istio-system}}\nspec: {{accessLogging: [{{providers: [{{name: file}}]}}]}}\n",
        log.path().display()
    );
    bed.apply("mesh", &mesh).expect("applied");
    bed.settle().expect("settled");
    let all = bed.nodes()[0].admin_json("/services").expect("services");
    let of = |name: &str| all.as_array().into_iter().flatten().find(|s| s["name"] == name).expect("it")["addresses"][0].clone();
    let vip = |name: &str, port: u16| format!("{}:{port}", of(name).as_str().expect("an address"));
    assert_eq!(bed.probe(&client, &["ask", &vip("server", 90), "ping"]).expect("a report")["answer"], "pong");
    assert!(bed.probe(&client, &["ask", &vip("empty", 91), "ping"]).expect("a report")["answer"].is_null());
    let lines = || {
        let text = std::fs::read_to_string(log.path()).expect("the log");
        text.lines().map(|l| serde_json::from_str::<Value>(l).expect("JSON")).collect::<Vec<_>>()
    };
    wait_for("three lines", Duration::from_secs(5), || Ok(lines().len() == 3)).unwrap_or_else(|_| panic!("{:#?}", lines()));
    let told =
        |cluster: &str| lines().into_iter().find(|l| l["cluster"] == *cluster).unwrap_or_else(|| panic!("{cluster}: {:#?}", lines()));
    let (host, peer) = (Value::from(server.address(8080)), Value::from("spiffe://cluster.local/ns/default/sa/client"));
    let outbound = told("outbound|90||server.default.svc.cluster.local");
    assert_eq!((&outbound["local"], &outbound["host"], &outbound["peer"]), (&vip("server", 90).into(), &host, &Value::Null));
    let inbound = told("inbound|8080||");
    assert_eq!((&inbound["local"], &inbound["host"], &inbound["peer"]), (&host, &host, &peer));
    let nowhere = told("outbound|91||empty.default.svc.cluster.local");
    assert_eq!((&nowhere["local"], &nowhere["host"]), (&vip("empty", 91).into(), &Value::Null));
    let why = |line: &Value| ["flags", "ended", "unconnected"].map(|field| line[field].as_str().unwrap_or("-").to_owned());
    assert_eq!((why(&outbound), why(&nowhere)), (["-", "-", "-"].map(str::to_owned), ["UH", "-", "-"].map(str::to_owned)));
    let failed = ["destination_service_name=\"empty\"", "response_flags=\"CONNECT\""];
    assert_eq!(bed.nodes()[0].metric("istio_tcp_connections_failed_total", &failed).unwrap_or(0.0), 1.0);
    // A port nobody listens on, and one that policy denies: at both ends.
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: default}\nspec: {selector: {matchLabels: {app: server}}, action: DENY, rules: [{to: [{operation: {ports: ['8081']}}]}]}\n";
    bed.apply("deny", deny).expect("applied");
    bed.settle().expect("settled");
    for (port, inbound, outbound) in [
        (7, ["UF,URX", "-", "delayed_connect_error:_Connection_refused"], ["UF,URX", "-", "http_status:_503_Service_Unavailable"]),
        (
            8081,
            ["-", "rbac_access_denied_matched_policy[ns[default]-policy[deny]-rule[0]]", "-"],
            ["UF,URX", "-", "http_status:_401_Unauthorized"],
        ),
    ] {
        assert!(bed.probe(&client, &["ask", &server.address(port), "ping"]).expect("a report")["answer"].is_null());
        let of = |end: &str| {
            lines().into_iter().find(|l| l["host"] == server.address(port) && (l["cluster"] == "PassthroughCluster") == (end == "outbound"))
        };
        wait_for("both lines", Duration::from_secs(5), || Ok(of("inbound").is_some() && of("outbound").is_some()))
            .unwrap_or_else(|_| panic!("{:#?}", lines()));
        let [at, from] = ["inbound", "outbound"].map(|end| why(&of(end).expect("a line")));
        assert_eq!((at, from), (inbound.map(str::to_owned), outbound.map(str::to_owned)), "port {port}");
    }
    let before = lines().len();
    // A client without a certificate that speaks HTTP is answered, and told of once.
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";
    bed.apply("strict", strict).expect("applied");
    bed.settle().expect("settled");
    let script = "import http.client, sys\nc = http.client.HTTPConnection(sys.argv[1], 9999, timeout=5)\nc.request('GET', '/')\nprint(c.getresponse().status)\n";
    let asked = bed.nodes()[0].run(std::path::Path::new("/usr/bin/python3"), &["-c", script, &server.v4().to_string()]).expect("python");
    assert_eq!(String::from_utf8_lossy(&asked.stdout).trim(), "403", "{asked:?}");
    wait_for("one more line", Duration::from_secs(5), || Ok(lines().len() > before)).expect("a line");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((lines().len(), &lines()[before]["code"]), (before + 1, &Value::from(403)), "{:#?}", lines());
}

#[test]
fn bytes_of_a_connection_are_counted_as_it_goes_on() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1)]).expect("pods");
    let mut steady = bed.command(&client, &program("probe"), &["steady", &server.address(8080), "3"]).spawn().expect("started");
    let bytes = |node: usize, reporter: &str| {
        bed.nodes()[node].metric("istio_tcp_received_bytes_total", &[&format!("reporter=\"{reporter}\"")]).unwrap_or(0.0)
    };
    wait_for("bytes of an open connection", Duration::from_secs(2), || Ok(bytes(0, "source") > 0.5 && bytes(1, "destination") > 0.5))
        .expect("counted");
    let closed = bed.nodes()[0].metric("istio_tcp_connections_closed_total", &[]).expect("metric");
    assert!(closed < 0.5 && steady.try_wait().expect("running").is_none(), "it is still open");
    assert!(steady.wait().expect("ended").success());
    wait_for("closed", Duration::from_secs(5), || Ok(bed.nodes()[0].metric("istio_tcp_connections_closed_total", &[])? > 0.5))
        .expect("closed");
    // Each byte once.
    assert_eq!(bytes(0, "source"), bytes(1, "destination"));
    let labels = ["direction=\"outbound\"", "path=\"tunnel\""];
    assert_eq!(bed.nodes()[0].metric("mesh_connections_total", &labels).expect("metric"), 1.0);
}

#[test]
fn bytes_of_a_connection_past_the_proxy_are_counted_as_it_goes_on_too() {
    let mut bed = Bed::ambient(&NodeOptions::with(&["--same-node", "direct"])).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 0)]).expect("pods");
    bed.settle().expect("settled");
    let mut steady = bed.command(&client, &program("probe"), &["steady", &server.address(8080), "3"]).spawn().expect("started");
    let node = &bed.nodes()[0];
    let bytes = |reporter: &str| node.metric("istio_tcp_received_bytes_total", &[&format!("reporter=\"{reporter}\"")]).unwrap_or(0.0);
    wait_for("bytes of an open connection", Duration::from_secs(2), || Ok(bytes("source") > 0.5 && bytes("destination") > 0.5))
        .expect("counted");
    let listed = node.admin_json("/connections").expect("connections");
    let direct = listed.as_array().expect("a list").iter().filter(|c| c["path"] == "direct").collect::<Vec<_>>();
    assert!(direct.len() == 2 && direct.iter().all(|c| c["sentBytes"].as_u64().is_some_and(|n| n > 0)), "{listed:#}");
    assert!(steady.try_wait().expect("running").is_none() && steady.wait().expect("ended").success());
    wait_for("closed", Duration::from_secs(5), || Ok(node.metric("istio_tcp_connections_closed_total", &[])? > 1.5)).expect("closed");
    // Each byte once.
    assert_eq!(bytes("source"), bytes("destination"));
}
