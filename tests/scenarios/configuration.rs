//! Manifests good and bad, as an operator's directory holds them.

use std::{io::Write, time::Duration};

use mesh_tests::{
    Bed, NodeOptions, PodSpec,
    bed::{program, wait_for},
};

fn remarks(bed: &Bed) -> String {
    let status = bed.nodes()[0].admin_json("/status").expect("status");
    status["remarks"].as_array().expect("remarks").iter().filter_map(|r| r.as_str()).collect::<Vec<_>>().join("\n")
}

#[test]
fn garbage_huge_and_half_written_manifests_change_nothing_and_are_named() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1)]).expect("pods");
    let works = |bed: &Bed| bed.probe(&client, &["ask", &server.address(8080), "ping"]).expect("a report")["answer"] == "pong";
    bed.apply("policy", "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {rules: [{}]}\n")
        .expect("applied");
    bed.settle().expect("settled");
    assert!(works(&bed) && remarks(&bed).is_empty(), "{}", remarks(&bed));
    let directory = bed.config().join("applied");
    let named = |what: &str, parts: &[&str]| {
        wait_for(what, Duration::from_secs(5), || Ok(parts.iter().all(|p| remarks(&bed).contains(p))))
            .unwrap_or_else(|e| panic!("{e:#}: {}", remarks(&bed)));
        assert!(works(&bed), "{what}");
    };
    std::fs::write(directory.join("garbage.yaml"), [0x00, 0xff, 0x13, 0x37].repeat(1000)).expect("written");
    named("garbage", &["garbage.yaml", "nothing of this file is in force"]);
    std::fs::write(directory.join("broken.yaml"), "apiVersion: v1\nkind: [Pod\n").expect("written");
    named("broken", &["broken.yaml", "is not YAML"]);
    std::fs::File::create(directory.join("huge.yaml")).and_then(|f| f.set_len(1 << 30)).expect("written");
    named("huge", &["huge.yaml", "split the file"]);
    // The policy turns bad: its last good version stays.
    bed.apply("policy", "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {rules: [{from: [{source: {ipBlocks: [nonsense]}}]}]}\n").expect("applied");
    named("bad field", &["policy.yaml", "AuthorizationPolicy default/p", "spec.rules[0].from[0].source.ipBlocks[0]", "last good"]);
    // Half of a file that denies everything, held open.
    let mut half = std::fs::File::create(directory.join("half.yaml")).expect("created");
    half.write_all(
        b"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: half}\nspec: {action: DENY, rules: [{}]}\n",
    )
    .expect("written");
    half.sync_all().expect("synced");
    std::thread::sleep(Duration::from_millis(400));
    assert!(works(&bed), "a half-written file took effect");
    half.write_all(b"---\napiVersion: v1\nkind: Namespace\nmetadata: {name: another}\n").expect("written");
    drop(half);
    wait_for("the whole file in force", Duration::from_secs(5), || Ok(!works(&bed))).expect("denied");
}

#[test]
fn every_seed_manifest_is_taken_and_what_is_not_honoured_is_said() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let seed = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpora/seed");
    let mut names = std::fs::read_dir(seed).expect("seed").map(|e| e.expect("entry").path()).collect::<Vec<_>>();
    names.sort();
    assert_eq!(names.len(), 21);
    let mut pods = Vec::new();
    for path in &names {
        let name = path.file_stem().and_then(|n| n.to_str()).expect("a name");
        let text = std::fs::read_to_string(path).expect("text");
        if name.starts_with("01") {
            pods = bed.kubectl_apply(name, &text).expect("bookinfo");
        } else {
            bed.apply(name, &text).expect("applied");
        }
    }
    bed.settle().expect("settled");
    assert_eq!(pods.len(), 4);
    // A file that a process forked meanwhile still has open comes a little later.
    let said =
        |kind: &str| remarks(&bed).lines().any(|l| l.contains(&format!(" {kind} ")) && l.contains("is not honoured by this version"));
    wait_for("the Gateway", Duration::from_secs(5), || Ok(said("Gateway"))).expect("said not to be honoured");
    let remarks = remarks(&bed);
    // 12 and 21 are the same object, which is said of one of them.
    for honoured in ["PeerAuthentication default/reviews-mtls", "AuthorizationPolicy", "RequestAuthentication", "Telemetry"] {
        assert!(!remarks.contains(honoured), "{remarks}");
    }
}

#[test]
fn meshctl_shows_a_node_from_inside() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    bed.service("default", "shop-front", 80, 8080).expect("service");
    let [_pod] = bed.meshed([PodSpec::new("a-pod", 0)]).expect("pod");
    let run = |arguments: &[&str]| {
        let output = bed.nodes()[0].run(&program("meshctl"), arguments).expect("meshctl");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    };
    for (what, part) in [
        ("status", "Fail mode               closed"),
        ("pods", "a-pod"),
        ("workloads", "cluster.local/ns/default/sa/a-pod"),
        ("services", "shop-front"),
        ("certificates", "good"),
        ("pool", "SOURCE"),
        ("clusters", "EJECTED"),
        ("routes", "shop-front"),
        ("policies", "default/a-pod"),
        ("connections", "ENCRYPTED"),
        ("capture", "captured"),
        ("config-dump", "\"workloadState\""),
        ("metrics", "mesh_enrolled_pods 1"),
    ] {
        let (success, text) = run(&[what]);
        assert!(success && text.contains(part), "{what}: {text}");
    }
    let (success, text) = run(&[
        "authorize",
        "--from",
        "default/a-pod",
        "--to",
        "a-pod",
        "--port",
        "80",
        "-X",
        "POST",
        "--path",
        "/a?b=%2f&c",
        "-H",
        "x-y: z&z",
    ]);
    assert!(success && text.starts_with("ALLOWED: no policy denies it"), "{text}");
    let (success, text) = run(&["authorize", "--from", "default/a-pod", "--to", "default/nobody", "--port", "80"]);
    assert!(!success && text.contains("there is no workload \"default/nobody\""), "{text}");
    let (success, text) = run(&["--admin", "127.0.0.1:1", "status"]);
    assert!(!success && text.contains("127.0.0.1:1") && text.contains("is it running"), "{text}");
    assert!(!run(&["nonsense"]).0);
    for (output, part) in [("json", "\"failMode\": \"closed\""), ("yaml", "failMode: \"closed\"")] {
        let (success, text) = run(&["status", "-o", output]);
        assert!(success && text.contains(part) && !text.contains('\x1b'), "{text}");
    }
    let (success, text) = run(&["config-dump", "-o", "yaml"]);
    let first = text.lines().next().unwrap_or_default();
    assert!(success && !first.contains('{') && text.lines().any(|line| line.trim_start().starts_with("workloadState:")), "{text}");
    let there = |name: &str| text.lines().any(|line| line.contains("name:") && line.contains(name));
    assert!(there("a-pod") && there("shop-front"), "{text}");
}

#[test]
fn exit_statuses_tell_scripts_what_happened() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    bed.service("default", "shop-front", 80, 8080).expect("service");
    let [_pod] = bed.meshed([PodSpec::new("a-pod", 0)]).expect("pod");
    let run = |arguments: &[&str]| {
        let output = bed.nodes()[0].run(&program("meshctl"), arguments).expect("meshctl");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    };
    for (arguments, status, part) in [
        (&["status"][..], 0, "Ready                   yes"),
        (&["--admin", "127.0.0.1:1", "status"], 3, "no mesh-node answers at 127.0.0.1:1"),
        (&["--admin", "/nowhere.sock", "status"], 3, "no mesh-node answers at /nowhere.sock"),
        (&["nonsense"], 2, "unrecognized subcommand"),
        (&["policies", "b-pod"], 4, "did you mean default/a-pod?"),
        (&["routes", "shop-frnt"], 4, "did you mean default/shop-front?"),
        (&["routes", "shop-front"], 0, "80||shop-front.default.svc.cluster.local"),
        (&["tls-check", "a-pod"], 0, "mutual TLS"),
        (&["completion", "bash"], 0, "complete"),
        (&["logs", "level"], 0, "current log level is info"),
        (&["logs", "level", "proxy=debug,info"], 0, "current log level is proxy=debug,info"),
        (&["logs", "level", "=,="], 2, "log filter"),
        (&["logs", "level", "prxy=debug"], 2, "nothing is logged with target \"prxy\""),
        // As istioctl says it, beside what is logged already.
        (&["logs", "level", "access:debug,info"], 0, "current log level is proxy=debug,access=debug,info"),
        (&["logs", "level", "reset"], 0, "current log level is info"),
        (&["explain", "--from", "a-pod", "--to", "nothing:80"], 4, "there is no service default/nothing"),
        (&["explain", "--from", "a-pod", "--to", "nothing"], 2, "is not service:port or address:port"),
        (&["explain", "--from", "9.9.9.9", "--to", "shop-front:80"], 4, "no workload has the address 9.9.9.9"),
        (&["explain", "--from", "a-pod", "--to", "shop-front:80", "-X", "GET", "path"], 2, "is not a path"),
        (&["authorize", "--from", "a-pod", "--to", "a-pod", "--port", "0"], 2, "0 is not in 1.."),
        (&["authorize", "--from", "a-pod", "--to", "a-pod", "--port", "15008", "--check"], 1, "port 15008 belongs to the mesh itself"),
        (&["routes", "shop-front.default.svc:80"], 0, "80||shop-front.default.svc.cluster.local"),
        (&["--admin", "localhost:15000", "status"], 0, "Ready                   yes"),
        (&["trace", "a-pod", "--count", "0"], 2, "0 is not in 1.."),
    ] {
        let (code, text) = run(arguments);
        assert!(code == Some(status) && text.contains(part), "{arguments:?}: {code:?}: {text}");
    }
}

/// The ports whose names are in everybody's scrape configuration and probes.
#[test]
fn metrics_and_readiness_have_ports_of_their_own_and_the_admin_a_socket() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("sub/admin.sock").display().to_string();
    let mut bed = Bed::start(1, &NodeOptions::with(&["--admin-socket", &socket])).expect("bed");
    bed.namespace("default", mesh_tests::bed::AMBIENT).expect("a namespace");
    let [_pod] = bed.meshed([PodSpec::new("a-pod", 0)]).expect("pod");
    let curl = |url: &str, more: &[&str]| {
        let arguments = [&["-sS", "-g", "-w", " %{http_code} %{content_type}", url][..], more].concat();
        let output = bed.nodes()[0].run(std::path::Path::new("curl"), &arguments).expect("curl");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    // Load balancers ask so, and ztunnel does not mind either.
    for page in ["15021/healthz/ready", "15020/metrics", "15000/status"] {
        let head = curl(&format!("http://127.0.0.1:{page}"), &["-I"]);
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{page}: {head}");
    }
    let raised = curl("http://127.0.0.1:15000/logging?level=debug", &[]);
    assert!(raised.contains("POST changes what is logged") && raised.contains(" 405 "), "{raised}");
    let by_a_page = curl("http://127.0.0.1:15000/quitquitquit", &["-X", "POST", "-H", "origin: http://web.example"]);
    assert!(by_a_page.contains(" 403 "), "{by_a_page}");
    for host in ["127.0.0.1", "[::1]", &bed.node_address(0).to_string()] {
        let metrics = curl(&format!("http://{host}:15020/stats/prometheus"), &[]);
        assert!(
            metrics.contains("\n# TYPE mesh_policy_decisions_total counter\n") || metrics.contains("mesh_enrolled_pods 1"),
            "{metrics}"
        );
        assert!(metrics.ends_with(" 200 text/plain; version=0.0.4; charset=utf-8"), "{metrics}");
        assert!(curl(&format!("http://{host}:15021/healthz/ready"), &[]).starts_with("ready"), "{host}");
        assert!(curl(&format!("http://{host}:15020/config_dump"), &[]).contains(" 404 "), "{host}");
        assert!(curl(&format!("http://{host}:15021/metrics"), &[]).contains(" 404 "), "{host}");
    }
    let open = curl("http://127.0.0.1:15020/metrics", &["-H", "accept: application/openmetrics-text"]);
    assert!(open.contains("# EOF") && open.ends_with("application/openmetrics-text; version=1.0.0; charset=utf-8"), "{open}");
    mesh_tests::bed::wait_for("the pod through the socket", std::time::Duration::from_secs(5), || {
        let output = bed.nodes()[0].run(&program("meshctl"), &["--admin", &socket, "pods"])?;
        Ok(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("default/a-pod"))
    })
    .expect("listed");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).expect("a socket").permissions());
    assert_eq!(mode & 0o777, 0o600);
}

/// What istioctl reads of ztunnel's dump.
#[test]
fn the_configuration_is_dumped_as_ztunnel_does() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    bed.service("default", "shop-front", 80, 8080).expect("service");
    let near = "apiVersion: v1\nkind: Service\nmetadata: {name: near}\nspec: {selector: {app: near}, trafficDistribution: PreferClose, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply(
        "near",
        &(near.to_owned() + "---\n" + &near.replace("name: near", "name: far").replace("trafficDistribution: PreferClose, ", "")),
    )
    .expect("services");
    let [client, server] =
        bed.meshed([PodSpec::new("client", 0).label("app", "near"), PodSpec::server("server", 1).label("app", "server")]).expect("pods");
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: default}\nspec: {action: DENY, rules: [{to: [{operation: {ports: [\"9\"]}}]}]}\n---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: all, namespace: default}\nspec: {mtls: {mode: STRICT}}\n---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: server, namespace: default}\nspec: {selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {9: {mode: PERMISSIVE}}}\n";
    bed.apply("policy", policy).expect("applied");
    bed.settle().expect("settled");
    let mut hold = bed.command(&client, &program("probe"), &["hold", &server.address(8080), "1", "3"]).spawn().expect("started");
    let mut dump = serde_json::Value::Null;
    mesh_tests::bed::wait_for("an open connection", std::time::Duration::from_secs(5), || {
        dump = bed.nodes()[0].admin_json("/config_dump")?;
        Ok(dump["workloadState"]["Kubernetes//Pod/default/client"]["connections"]["outbound"][0]["protocol"] == "HBONE")
    })
    .expect("the connection");
    // LOCAL, REMOTE and REMOTE TARGET of istioctl.
    let out = &dump["workloadState"]["Kubernetes//Pod/default/client"]["connections"]["outbound"][0];
    let hbone = std::net::SocketAddr::new(server.v4(), 15008).to_string();
    assert_eq!((&out["originalDst"], &out["actualDst"]), (&server.address(8080).into(), &hbone.into()), "{out}");
    let there = bed.nodes()[1].admin_json("/config_dump").expect("a dump");
    let into = &there["workloadState"]["Kubernetes//Pod/default/server"]["connections"]["inbound"][0];
    assert_eq!((&into["originalDst"], &into["actualDst"]), (&serde_json::Value::Null, &server.address(8080).into()), "{into}");
    let find =
        |list: &str, name: &str| dump[list].as_array().and_then(|a| a.iter().find(|w| w["name"] == name)).cloned().unwrap_or_default();
    let workload = find("workloads", "server");
    for (field, expected) in [
        ("uid", "Kubernetes//Pod/default/server"),
        ("protocol", "HBONE"),
        ("serviceAccount", "server"),
        ("trustDomain", "cluster.local"),
        ("status", "Healthy"),
        ("node", "node2"),
    ] {
        assert_eq!(workload[field], expected, "{workload}");
    }
    assert_eq!(workload["workloadIps"][0], server.v4().to_string());
    assert_eq!(
        find("workloads", "client")["services"],
        serde_json::json!(["default/far.default.svc.cluster.local", "default/near.default.svc.cluster.local"])
    );
    let near = find("services", "near");
    let balancer =
        serde_json::json!({"routingPreferences": ["Network", "Region", "Zone"], "mode": "Failover", "healthPolicy": "OnlyHealthy"});
    assert_eq!((&near["loadBalancer"], &near["ipFamilies"], &near["canonical"]), (&balancer, &"Dual".into(), &true.into()), "{near}");
    assert_eq!(near["endpoints"]["Kubernetes//Pod/default/client"]["service"], "default/near.default.svc.cluster.local");
    assert!(find("services", "far").get("loadBalancer").is_none());
    let service = find("services", "shop-front");
    assert!(
        service["hostname"] == "shop-front.default.svc.cluster.local" && service["vips"].is_array() && service["endpoints"].is_object(),
        "{service}"
    );
    let policy = find("policies", "p");
    assert_eq!(
        (&policy["action"], &policy["scope"], policy["rules"].as_array().map(Vec::len)),
        (&"Deny".into(), &"Namespace".into(), Some(1))
    );
    // What clients have to prove is a policy there, too; those of a namespace are of no workload.
    let strict = "istio-system/istio_converted_static_strict";
    assert_eq!(find("workloads", "client")["authorizationPolicies"], serde_json::json!([strict]));
    assert_eq!(find("workloads", "server")["authorizationPolicies"], serde_json::json!(["default/converted_peer_authentication_server"]));
    let unproved = serde_json::json!([{"notPrincipals": [{"Presence": []}]}]);
    assert_eq!(find("policies", "istio_converted_static_strict")["rules"], serde_json::json!([[unproved]]));
    assert_eq!(
        find("policies", "converted_peer_authentication_server")["rules"],
        serde_json::json!([[[{"notDestinationPorts": [9]}], unproved]])
    );
    let certificate = &dump["certificates"][0];
    assert_eq!(
        (&certificate["state"], &certificate["identity"]),
        (&"Available".into(), &"spiffe://cluster.local/ns/default/sa/client".into())
    );
    for one in [&certificate["certChain"][0], &certificate["rootCerts"][0]] {
        // A decimal number, as istioctl takes it.
        let serial = one["serialNumber"].as_str().expect("a number");
        assert!(!serial.is_empty() && serial.bytes().all(|b| b.is_ascii_digit()), "{one}");
        assert!(one["validFrom"].is_string() && one["expirationTime"].is_string(), "{one}");
    }
    let pem = certificate["certChain"][0]["pem"].as_str().expect("a certificate");
    let pem = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, pem).expect("base64");
    assert!(pem.starts_with(b"-----BEGIN CERTIFICATE-----\n"));
    let valid = certificate["certChain"][0]["expirationTime"].as_str().expect("a time");
    assert!(valid.ends_with('Z') && valid.len() == 24, "{valid}");
    assert!(hold.wait().expect("ended").success());
}

#[test]
fn kubectl_output_of_every_version_is_read() {
    let bed = Bed::start(1, &NodeOptions::default()).expect("bed");
    let mut yaml = String::new();
    for (i, version) in ["v1", "v1beta1", "v1alpha3", "v1alpha1"].iter().enumerate() {
        yaml += &format!(
            "---\napiVersion: security.istio.io/{version}\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: ns{i}, resourceVersion: \"1\", managedFields: [], creationTimestamp: \"2026-01-01T00:00:00Z\"}}\nspec: {{mtls: {{mode: STRICT}}}}\nstatus: {{}}\n"
        );
    }
    bed.apply("versions", &yaml).expect("applied");
    bed.apply("list", "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: \"\"}\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: listed}, spec: {clusterIP: None}}\n").expect("applied");
    bed.apply("bad", "apiVersion: security.istio.io/v2\nkind: PeerAuthentication\nmetadata: {name: p}\n").expect("applied");
    bed.settle().expect("settled");
    let remarks = remarks(&bed);
    assert!(remarks.lines().count() == 1 && remarks.contains("v2") && remarks.contains("use one of v1, v1beta1, v1alpha3"), "{remarks}");
    assert!(bed.nodes()[0].admin("/services").expect("services").contains("listed"));
}
