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
    named("garbage", &["garbage.yaml", "stays in force"]);
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
    for kind in ["Gateway", "Telemetry"] {
        wait_for(kind, Duration::from_secs(5), || Ok(said(kind))).expect("said not to be honoured");
    }
    let remarks = remarks(&bed);
    // 12 and 21 are the same object, which is said of one of them.
    for honoured in ["PeerAuthentication default/reviews-mtls", "AuthorizationPolicy", "RequestAuthentication"] {
        assert!(!remarks.contains(honoured), "{remarks}");
    }
}

#[test]
fn meshctl_shows_a_node_from_inside() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [_pod] = bed.meshed([PodSpec::new("a-pod", 0)]).expect("pod");
    let run = |arguments: &[&str]| {
        let output = bed.nodes()[0].run(&program("meshctl"), arguments).expect("meshctl");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    };
    for (what, part) in [
        ("status", "\"failMode\": \"closed\""),
        ("pods", "a-pod"),
        ("workloads", "spiffe://cluster.local/ns/default/sa/a-pod"),
        ("services", "bed-marker"),
        ("certificates", "notAfter"),
        ("pool", "[]"),
        ("clusters", "[]"),
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
    assert!(success && text.contains("\"decision\": \"allowed\""), "{text}");
    let (success, text) = run(&["authorize", "--from", "default/a-pod", "--to", "default/nobody", "--port", "80"]);
    assert!(!success && text.contains("there is no workload \"default/nobody\""), "{text}");
    let (success, text) = run(&["--admin", "127.0.0.1:1", "status"]);
    assert!(!success && text.contains("127.0.0.1:1") && text.contains("is it running"), "{text}");
    assert!(!run(&["nonsense"]).0);
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
