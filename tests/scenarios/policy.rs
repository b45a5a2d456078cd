//! `PeerAuthentication` and `AuthorizationPolicy`, enforced at the destination for every way in, and live.

use std::{process::Stdio, time::Duration};

use http::{Method, StatusCode};
use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{program, wait_for},
    peer::{Certificate, Dial},
};
use serde_json::Value;

struct Scene {
    bed: Bed,
    server: Pod,
    near: Pod,
    far: Pod,
    stranger: Pod,
}

/// A server on node 1; clients on both nodes in the mesh, and one outside it.
fn scene() -> Scene {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let specs = [PodSpec::server("server", 0), PodSpec::new("near", 0), PodSpec::new("far", 1).account("far-account")];
    let [server, near, far] = bed.meshed(specs).expect("pods");
    let stranger = bed.pod(&PodSpec::new("stranger", 1).in_namespace("plain")).expect("stranger");
    bed.settle().expect("settled");
    Scene { bed, server, near, far, stranger }
}

impl Scene {
    /// Who gets through now: near, far, stranger; over both families, which must agree.
    fn through(&self) -> [bool; 3] {
        [&self.near, &self.far, &self.stranger].map(|client| {
            let answers = [self.server.address(8080), self.server.address6(8080)]
                .map(|to| self.bed.probe(client, &["ask", &to, "ping"]).expect("a report")["answer"] == "pong");
            assert_eq!(answers[0], answers[1], "{}: the families disagree", client.name);
            answers[0]
        })
    }

    fn apply(&self, name: &str, kind: &str, namespace: &str, spec: &str) {
        let yaml =
            format!("apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n");
        self.bed.apply(name, &yaml).expect("applied");
        self.bed.settle().expect("settled");
    }

    fn withdraw(&self, name: &str) {
        self.bed.withdraw(name).expect("withdrawn");
        self.bed.settle().expect("settled");
    }
}

#[test]
fn peer_authentication_of_every_scope_decides_about_plaintext() {
    let scene = scene();
    assert_eq!(scene.through(), [true, true, true], "PERMISSIVE is the default");
    let seed = |name: &str| {
        let path = format!("{}/corpora/seed/{name}", env!("CARGO_MANIFEST_DIR"));
        scene.bed.apply("mesh", &std::fs::read_to_string(path).expect("a seed manifest")).expect("applied");
        scene.bed.settle().expect("settled");
    };
    seed("12-mtls-strict-mesh.yaml");
    assert_eq!(scene.through(), [true, true, false], "STRICT in the mesh");
    let refused = scene.bed.nodes()[0].metric("mesh_connection_failures_total", &["inbound", "plaintext_under_strict"]).expect("metric");
    assert!(refused > 1.5, "{refused}");
    scene.apply("namespace", "PeerAuthentication", "default", "{mtls: {mode: PERMISSIVE}}");
    assert_eq!(scene.through(), [true, true, true], "the namespace wins over the mesh");
    scene.apply("workload", "PeerAuthentication", "default", "{selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}}");
    assert_eq!(scene.through(), [true, true, false], "the workload wins over the namespace");
    let port = "{selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {\"8080\": {mode: DISABLE}}}";
    scene.apply("workload", "PeerAuthentication", "default", port);
    assert_eq!(scene.through(), [true, true, true], "the port wins over the workload");
    scene.apply("workload", "PeerAuthentication", "default", "{selector: {matchLabels: {app: other}}, mtls: {mode: STRICT}}");
    scene.withdraw("namespace");
    assert_eq!(scene.through(), [true, true, false], "an unselected workload inherits the mesh's");
    seed("21-mtls-permissive.yaml");
    assert_eq!(scene.through(), [true, true, true], "PERMISSIVE again");
}

#[test]
fn authorization_is_enforced_at_the_destination_for_every_way_in() {
    let scene = scene();
    let cases = [
        ("{}", [false, false, false]),
        ("{rules: [{}]}", [true, true, true]),
        ("{rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/near]}}]}]}", [true, false, false]),
        ("{rules: [{from: [{source: {serviceAccounts: [far-account]}}]}]}", [false, true, false]),
        ("{rules: [{from: [{source: {namespaces: [default]}}]}]}", [true, true, false]),
        ("{rules: [{from: [{source: {notPrincipals: ['*']}}]}]}", [false, false, true]),
        ("{action: DENY, rules: [{from: [{source: {namespaces: [default]}}]}]}", [false, false, true]),
        ("{action: DENY, rules: [{to: [{operation: {ports: ['8080']}}]}]}", [false, false, false]),
        ("{action: DENY, rules: [{to: [{operation: {notPorts: ['8080']}}]}]}", [true, true, true]),
        ("{action: AUDIT, rules: [{}]}", [true, true, true]),
    ];
    for (spec, expected) in cases {
        scene.apply("policy", "AuthorizationPolicy", "default", spec);
        assert_eq!(scene.through(), expected, "{spec}");
    }
    let near = format!("{{rules: [{{from: [{{source: {{ipBlocks: [{}, '{}']}}}}]}}]}}", scene.near.v4(), scene.near.v6());
    scene.apply("policy", "AuthorizationPolicy", "default", &near);
    assert_eq!(scene.through(), [true, false, false], "by address, which is the client's own");
    scene.apply("policy", "AuthorizationPolicy", "default", "{rules: [{}]}");
    scene.apply(
        "mesh",
        "AuthorizationPolicy",
        "istio-system",
        "{action: DENY, rules: [{from: [{source: {serviceAccounts: [default/near]}}]}]}",
    );
    assert_eq!(scene.through(), [false, true, true], "DENY in the mesh wins over ALLOW in the namespace");
    scene.withdraw("mesh");
    // A peer that is not mesh-node is told so with 401.
    scene.apply("policy", "AuthorizationPolicy", "default", "{}");
    let (ca, from) = (scene.bed.directory.join("ca"), scene.bed.node_netns(1));
    let certificate = Some(Certificate::of("spiffe://cluster.local/ns/default/sa/far-account"));
    let dial = Dial { netns: &from, ca: &ca, certificate, alpn: &["h2"] };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let hbone = std::net::SocketAddr::new(scene.server.v4(), 15008);
    let status = runtime.block_on(dial.status(hbone, Method::CONNECT, &scene.server.address(8080))).expect("a status");
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}

#[test]
fn names_the_trust_domain_had_before_come_with_the_configuration() {
    let scene = scene();
    scene.apply(
        "policy",
        "AuthorizationPolicy",
        "default",
        "{rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/far]}}]}]}",
    );
    let (ca, from) = (scene.bed.directory.join("ca"), scene.bed.node_netns(1));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let hbone = std::net::SocketAddr::new(scene.server.v4(), 15008);
    let status = |domain: &str| {
        let certificate = Some(Certificate::of(&format!("spiffe://{domain}/ns/default/sa/far")));
        let dial = Dial { netns: &from, ca: &ca, certificate, alpn: &["h2"] };
        runtime.block_on(dial.status(hbone, Method::CONNECT, &scene.server.address(8080))).ok()
    };
    let expect = |expected: [Option<u16>; 3]| {
        let seen = || ["cluster.local", "old.local", "older.local"].map(|domain| status(domain).map(|s| s.as_u16()));
        wait_for("who is believed", Duration::from_secs(5), || Ok(seen() == expected))
            .unwrap_or_else(|_| panic!("{:?}, not {expected:?}", seen()));
    };
    expect([Some(200), None, None]);
    let mesh = |aliases: &str| {
        let mesh = format!("trustDomainAliases: {aliases}");
        let yaml = format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: {}}}\n",
            serde_json::Value::from(mesh)
        );
        scene.bed.apply("mesh", &yaml).expect("applied");
        scene.bed.settle().expect("settled");
    };
    mesh("[old.local, 'not a name']");
    expect([Some(200), Some(200), None]);
    let told = scene.bed.nodes()[0].log_text();
    assert!(told.contains("data.mesh.trustDomainAliases[1]"), "{told}");
    mesh("[older.local]");
    expect([Some(200), None, Some(200)]);
    scene.withdraw("mesh");
    expect([Some(200), None, None]);
}

#[test]
fn a_policy_change_cuts_what_it_denies_within_a_second_and_nothing_else() {
    let scene = scene();
    let start = |client: &Pod| {
        let mut command = scene.bed.command(client, &program("probe"), &["steady", &scene.server.address(8080), "4"]);
        command.stdout(Stdio::piped()).spawn().expect("steady")
    };
    let running = [&scene.near, &scene.far, &scene.stranger].map(start);
    std::thread::sleep(Duration::from_secs(1));
    scene.apply(
        "policy",
        "AuthorizationPolicy",
        "default",
        "{action: DENY, rules: [{from: [{source: {principals: ['*/sa/near', '*/sa/far-account']}}]}]}",
    );
    let reports = running.map(|child| {
        let output = child.wait_with_output().expect("ended");
        serde_json::from_slice::<Value>(&output.stdout).expect("a report")
    });
    for report in &reports[..2] {
        let after = report["afterMilliseconds"].as_u64().unwrap_or_else(|| panic!("not cut: {report}"));
        assert!(after < 2000, "applied after 1 s, cut after {after} ms: {report}");
    }
    assert!(reports[2].get("error").is_none(), "{}", reports[2]);
    let node = &scene.bed.nodes()[0];
    assert!(node.metric("mesh_connection_failures_total", &["inbound", "policy_changed"]).expect("metric") > 1.5);
    // As with ztunnel's, a dashboard tells by the flag what policy has done.
    let denied = ["reporter=\"destination\"", "response_flags=\"DENY\"", "destination_workload=\"server\""];
    for (what, cut) in [("opened", 0.0), ("closed", 2.0), ("failed", 2.0)] {
        let counted = node.metric(&format!("istio_tcp_connections_{what}_total"), &denied).unwrap_or(0.0);
        assert_eq!(counted, cut, "{what}: they were let in, and then cut");
    }
}

#[test]
fn seed_policies_hold_on_opaque_connections() {
    let mut scene = scene();
    scene.bed.service("default", "server", 8080, 8080).expect("a service");
    let path = format!("{}/corpora/seed/15-authz-deny-all-and-allow.yaml", env!("CARGO_MANIFEST_DIR"));
    scene.bed.apply("seed", &std::fs::read_to_string(path).expect("seed")).expect("applied");
    scene.bed.settle().expect("settled");
    assert_eq!(scene.through(), [false, false, false]);
    // The service declares the port to be TCP, and the policy asks about requests there.
    let policy = "{selector: {matchLabels: {app: server}}, rules: [{to: [{operation: {methods: [GET]}}]}]}";
    scene.apply("asks", "AuthorizationPolicy", "default", policy);
    let remarks = scene.bed.nodes()[0].admin("/status").expect("status");
    assert!(remarks.contains("AuthorizationPolicy default/asks: spec.rules") && remarks.contains("allow nothing there"), "{remarks}");
}
