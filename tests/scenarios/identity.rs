//! Certificates while they are renewed, rotated, revoked and cannot be had, under load and over two nodes.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{Process, program, wait_for},
};
use serde_json::{Value, json};

fn web(name: &str, node: usize) -> PodSpec {
    let command = [program("web").display().to_string(), "serve".into(), "8080".into(), name.to_owned()];
    PodSpec { command: command.into(), port: Some(8080), ..PodSpec::new(name, node) }
}

struct Scene {
    bed: Bed,
    far: Pod,
    /// Answers on new connections.
    echo: Pod,
    /// Likewise; no tunnel leads to it yet.
    spare: Pod,
}

/// A web server on node 1 and a client on node 2: what they say goes through a tunnel.
fn scene(options: &NodeOptions) -> Scene {
    let mut bed = Bed::ambient(options).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: server}\nspec: {selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply("server", service).expect("service");
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";
    bed.apply("strict", strict).expect("applied");
    let specs = [web("server", 0), PodSpec::server("echo", 0), PodSpec::server("spare", 0), PodSpec::new("far", 1)];
    let [_server, echo, spare, far] = bed.meshed(specs).expect("pods");
    Scene { bed, far, echo, spare }
}

impl Scene {
    /// Requests on kept connections, and on a new connection each, for some seconds.
    fn load(&self, seconds: u64) -> Load {
        let seconds = seconds.to_string();
        let kept = ["get", "server:80/x", "0", "2", "--seconds", &seconds, "--pause-millis", "2"];
        let fresh = ["attempts", &self.echo.address(8080), &seconds];
        let start = |name: &str, arguments: &[&str]| {
            let mut command = self.bed.command(&self.far, &program(name), arguments);
            command.stdout(Stdio::piped()).spawn().expect(name)
        };
        Load { kept: start("web", &kept), fresh: start("probe", &fresh) }
    }

    fn ask(&self) -> String {
        let output = self.bed.run(&self.far, &program("web"), &["get", "server:80/x", "1"]).expect("web");
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
        report["statuses"].as_object().and_then(|s| s.keys().next()).cloned().unwrap_or_else(|| "reset".to_owned())
    }

    /// The serial numbers of an account's certificate on a node.
    fn certificate(&self, node: usize, account: &str) -> Value {
        let all = self.bed.nodes()[node].admin_json("/certificates").expect("certificates");
        let mine = all.as_array().into_iter().flatten().find(|c| c["identity"].as_str().is_some_and(|i| i.ends_with(account)));
        mine.cloned().unwrap_or(Value::Null)
    }

    fn ca(&self) -> PathBuf {
        self.bed.directory.join("ca")
    }
}

/// Clients at work.
struct Load {
    kept: Child,
    fresh: Child,
}

impl Load {
    /// Waits for their end; none may have failed.
    fn finish(self) -> u64 {
        let report = |child: Child| -> Value {
            let output = child.wait_with_output().expect("ended");
            serde_json::from_slice(&output.stdout).expect("a report")
        };
        let (kept, fresh) = (report(self.kept), report(self.fresh));
        let statuses = kept["statuses"].as_object().expect("statuses");
        assert!(statuses.keys().all(|s| s == "200") && kept["errors"].as_object().is_some_and(serde_json::Map::is_empty), "{kept}");
        assert!(fresh["failed"] == 0 && fresh["worked"].as_u64().is_some_and(|n| n > 10), "{fresh}");
        statuses["200"].as_u64().expect("a count")
    }
}

fn ttl(seconds: u64) -> NodeOptions {
    NodeOptions::with(&["--certificate-ttl", &seconds.to_string()])
}

/// Short lives here; `MESH_SOAK_SECONDS` and `MESH_SOAK_TTL` make it the long run (600 and 60).
#[test]
fn renewals_under_load_fail_no_request() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (seconds, life) = (number("MESH_SOAK_SECONDS", 30), number("MESH_SOAK_TTL", 5));
    let scene = scene(&ttl(life));
    assert_eq!(scene.ask(), "200");
    let mut steady = scene.bed.command(
        &scene.far,
        &program("web"),
        &["get", "server:80/x", "0", "1", "--seconds", &seconds.to_string(), "--pause-millis", "50"],
    );
    let steady = steady.stdout(Stdio::piped()).spawn().expect("web");
    let load = scene.load(seconds);
    let mut serials = std::collections::BTreeSet::new();
    let end = std::time::Instant::now() + Duration::from_secs(seconds);
    while std::time::Instant::now() < end {
        serials.insert(scene.certificate(1, "/sa/far")["serial"].to_string());
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(load.finish() > 100);
    let steady = steady.wait_with_output().expect("ended");
    let steady: Value = serde_json::from_slice(&steady.stdout).expect("a report");
    let statuses = steady["statuses"].as_object().expect("statuses");
    assert!(!statuses.is_empty() && statuses.keys().all(|s| s == "200"), "{steady}");
    assert!(steady["errors"].as_object().is_some_and(serde_json::Map::is_empty), "{steady}");
    let expected = usize::try_from(seconds / life).expect("few");
    assert!(serials.len() >= expected, "{} certificates in {seconds} s of {life} s each", serials.len());
}

/// The next root is trusted first, then signs, and the last one is forgotten when nothing of it is left.
#[test]
fn roots_are_rotated_under_load() {
    let scene = scene(&ttl(8));
    assert_eq!(scene.ask(), "200");
    let load = scene.load(26);
    let next = tempfile::tempdir().expect("a directory");
    let domain = mesh_node::id::TrustDomain::parse("cluster.local").expect("valid");
    mesh_node::identity::Authority::open(next.path(), domain).expect("another root");
    let put = |from: &Path, to: &str| {
        let temporary = scene.ca().join("next.tmp");
        std::fs::copy(from, &temporary).expect("copied");
        std::fs::rename(&temporary, scene.ca().join(to)).expect("renamed");
    };
    let old = next.path().join("old-root.pem");
    std::fs::copy(scene.ca().join("root-cert.pem"), &old).expect("kept");
    let before = scene.certificate(1, "/sa/far")["serial"].clone();
    std::thread::sleep(Duration::from_secs(2));
    put(&next.path().join("root-cert.pem"), "trusted-roots.pem");
    std::thread::sleep(Duration::from_secs(5));
    put(&old, "trusted-roots.pem");
    put(&next.path().join("root-key.pem"), "root-key.pem");
    put(&next.path().join("root-cert.pem"), "root-cert.pem");
    // Everything the old one signed is out of use after a life of it.
    std::thread::sleep(Duration::from_secs(11));
    std::fs::remove_file(scene.ca().join("trusted-roots.pem")).expect("removed");
    assert!(load.finish() > 100);
    assert_eq!(scene.ask(), "200");
    assert_ne!(scene.certificate(1, "/sa/far")["serial"], before);
}

/// A revocation list of the embedded CA.
fn revocations(ca: &Path, serials: &[Vec<u8>]) -> String {
    let read = |name: &str| std::fs::read_to_string(ca.join(name)).expect("read");
    let key = rcgen::KeyPair::from_pem(&read("root-key.pem")).expect("key");
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("root-cert.pem"), key).expect("issuer");
    let now = SystemTime::now();
    let params = rcgen::CertificateRevocationListParams {
        this_update: (now - Duration::from_secs(60)).into(),
        next_update: (now + Duration::from_secs(3600)).into(),
        crl_number: rcgen::SerialNumber::from(vec![1]),
        issuing_distribution_point: None,
        revoked_certs: serials
            .iter()
            .map(|serial| rcgen::RevokedCertParams {
                serial_number: rcgen::SerialNumber::from_slice(serial),
                revocation_time: (now - Duration::from_secs(30)).into(),
                reason_code: None,
                invalidity_date: None,
            })
            .collect(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    params.signed_by(&issuer).expect("signed").pem().expect("PEM")
}

#[test]
fn a_revoked_peer_is_cut_and_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let list = directory.path().join("crl.pem");
    std::fs::write(&list, "").expect("written");
    let scene = scene(&NodeOptions::with(&["--crl", &list.display().to_string()]));
    assert_eq!(scene.ask(), "200");
    std::fs::write(&list, revocations(&scene.ca(), &[vec![1, 2, 3]])).expect("written");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(scene.ask(), "200", "a list with others on it");
    let mut held = scene.bed.command(&scene.far, &program("web"), &["get", "server:80/sleep/20000", "1"]);
    let held = held.stdout(Stdio::piped()).spawn().expect("web");
    std::thread::sleep(Duration::from_millis(500));
    let serial = scene.certificate(1, "/sa/far")["serial"].as_str().expect("a serial").to_owned();
    std::fs::write(&list, revocations(&scene.ca(), &[bytes_of(&serial)])).expect("written");
    let begun = std::time::Instant::now();
    let report: Value = serde_json::from_slice(&held.wait_with_output().expect("ended").stdout).expect("a report");
    assert!(begun.elapsed() < Duration::from_secs(8) && report["statuses"].get("200").is_none(), "{report}");
    assert_ne!(scene.ask(), "200");
    let node = &scene.bed.nodes()[0];
    let refused = node.metric("mesh_tls_handshake_failures_total", &["side=\"server\"", "reason=\"revoked\""]).expect("metric");
    let as_istio = node.metric("istio_crl_policy_rejections_total", &["reporter=\"destination\""]).expect("metric");
    assert!(as_istio > 0.5, "{as_istio}");
    let cut = node.metric("mesh_tls_handshake_failures_total", &["reason=\"revoked_later\""]).expect("metric");
    assert!(refused > 0.5 && cut > 0.5, "refused {refused}, cut {cut}");
    // Taken off the list, it is as good as before.
    std::fs::write(&list, revocations(&scene.ca(), &[])).expect("written");
    wait_for("the peer is let in again", Duration::from_secs(10), || Ok(scene.ask() == "200")).expect("let in");
    // A connection that carries no requests says why it was cut, at the end that cut it: the destination of a client, and the source of a server.
    let far = bytes_of(&serial);
    let echo = bytes_of(scene.certificate(0, "/sa/echo")["serial"].as_str().expect("a serial"));
    for (serial, node, reporter) in [(far, 0, "destination"), (echo, 1, "source")] {
        let mut held = scene.bed.command(&scene.far, &program("probe"), &["steady", &scene.echo.address(8080), "30"]);
        let held = held.stdout(Stdio::piped()).spawn().expect("probe");
        std::thread::sleep(Duration::from_secs(1));
        let node = &scene.bed.nodes()[node];
        let rejections = || node.metric("istio_crl_policy_rejections_total", &[&format!("reporter=\"{reporter}\"")]);
        let before = rejections().unwrap_or(0.0);
        std::fs::write(&list, revocations(&scene.ca(), &[serial])).expect("written");
        let report: Value = serde_json::from_slice(&held.wait_with_output().expect("ended").stdout).expect("a report");
        assert!(report["answers"].as_u64() > Some(10) && report["error"].is_string(), "{report}");
        assert!(rejections().expect("metric") > before, "{reporter}");
        let labels = [&*format!("reporter=\"{reporter}\""), "response_flags=\"CERT_REVOKED\""];
        let closed = node.metric("istio_tcp_connections_closed_total", &labels).expect("metric");
        assert!(closed > 0.5, "{reporter}");
        std::fs::write(&list, revocations(&scene.ca(), &[])).expect("written");
        wait_for("the peer is let in again", Duration::from_secs(10), || Ok(scene.ask() == "200")).expect("let in");
    }
}

fn bytes_of(serial: &str) -> Vec<u8> {
    serial.split(':').map(|b| u8::from_str_radix(b, 16).expect("hex")).collect()
}

/// `mesh-node ca` on node 1, the nodes with tokens of their own.
struct Authority {
    process: Option<Process>,
    command: Box<dyn Fn() -> Command>,
}

impl Authority {
    fn start(&mut self) {
        self.process = Some(Process::start((self.command)()).expect("the authority"));
    }
}

fn with_authority(scene: &mut Scene, life: u64) -> Authority {
    let directory = scene.bed.directory.clone();
    let tokens = directory.join("tokens.json");
    let token = |n: usize| json!({"token": format!("token-{n}"), "namespace": "istio-system", "serviceAccount": "mesh-node", "node": format!("node{n}")});
    std::fs::write(&tokens, json!([token(1), token(2)]).to_string()).expect("written");
    let (netns, config) = (scene.bed.node_netns(0), scene.bed.config());
    let text = |p: PathBuf| p.display().to_string();
    let (ca, state) = (text(directory.join("authority")), text(directory.join("authority-state")));
    let (tokens, config) = (text(tokens), text(config));
    let log = directory.join("logs/authority.log");
    let command = move || {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", netns.display())).arg(program("mesh-node"));
        command.args([
            "ca",
            "--listen",
            "0.0.0.0:15012",
            "--ca-dir",
            &ca,
            "--tokens",
            &tokens,
            "--config-dir",
            &config,
            "--state-dir",
            &state,
        ]);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&log).expect("a log");
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        command
    };
    let mut authority = Authority { process: None, command: Box::new(command) };
    authority.start();
    let roots = text(directory.join("authority/root-cert.pem"));
    for n in 1..=2 {
        let file = directory.join(format!("token-{n}"));
        std::fs::write(&file, format!("token-{n}")).expect("written");
        let address = scene.bed.node_address(0);
        let node = scene.bed.node(n - 1);
        node.stop().expect("stopped");
        node.arguments(&[
            "--certificate-source",
            "istio-grpc",
            "--ca-address",
            &format!("{address}:15012"),
            "--ca-server-name",
            "mesh-ca.istio-system.svc",
            "--ca-root",
            &roots,
            "--ca-token",
            &text(file),
            "--certificate-ttl",
            &life.to_string(),
        ]);
        node.start().expect("started");
        node.wait_ready().expect("ready");
    }
    authority
}

/// The authority's metrics, behind what they are said to be.
fn metrics_page(scene: &Scene, accepts: &str) -> String {
    let ask = "import sys, urllib.request as u; r = u.urlopen(u.Request('http://localhost:15014/metrics', headers={'accept': sys.argv[1]}))
print(r.headers['content-type'], r.read().decode(), sep='\\n')";
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", scene.bed.node_netns(0).display())).args(["python3", "-c", ask, accepts]);
    let output = command.output().expect("python3");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_authority_that_is_away_is_missed_only_when_certificates_expire() {
    let mut scene = scene(&NodeOptions::default());
    let life = 14;
    let mut authority = with_authority(&mut scene, life);
    wait_for("certificates of the authority", Duration::from_secs(10), || Ok(scene.ask() == "200")).expect("traffic");
    let issued = || std::fs::read_to_string(scene.bed.directory.join("logs/authority.log"));
    let is_said = |log: &str| log.contains("certificate issued") && log.contains("node=\"node2\"");
    wait_for("it in the authority's log", Duration::from_secs(5), || Ok(is_said(&issued()?)))
        .unwrap_or_else(|_| panic!("{}", issued().expect("a log")));
    for (accepts, kind, comment) in [
        ("*/*", "text/plain; version=0.0.4", "# TYPE mesh_ca_certificates_issued_total counter"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0", "# TYPE mesh_ca_certificates_issued counter"),
    ] {
        let page = metrics_page(&scene, accepts);
        assert!(page.starts_with(kind) && page.contains(comment) && !page.contains("issued_total 0\n"), "{page}");
    }
    // A renewal has to have been missed for this to say anything.
    drop(authority.process.take());
    let load = scene.load(5);
    assert!(load.finish() > 50);
    let told = || scene.certificate(1, "/sa/far")["error"].as_str().map(str::to_owned);
    wait_for("the outage is told", Duration::from_secs(life), || Ok(told().is_some_and(|e| e.contains("cannot be reached"))))
        .expect("told");
    let status = scene.bed.nodes()[1].admin("/status").expect("a status");
    assert!(status.contains("have no certificate, or none that can be renewed"), "{status}");
    std::thread::sleep(Duration::from_secs(life));
    // A connection in use outlives its certificate; a new one cannot be made, and the log says why.
    assert_eq!(scene.ask(), "200");
    let spare = || scene.bed.probe(&scene.far, &["ask", &scene.spare.address(8080), "ping"]).is_ok_and(|r| r["answer"] == "pong");
    assert!(!spare());
    let log = || scene.bed.nodes()[1].log_text() + &scene.bed.nodes()[0].log_text();
    wait_for("the log says why", Duration::from_secs(10), || {
        Ok(log().contains("has expired and cannot be renewed: the certificate authority at"))
    })
    .expect("said");
    authority.start();
    wait_for("certificates again", Duration::from_secs(60), || Ok(spare())).expect("traffic again");
}

/// Keys and chains made elsewhere, read from files and read again.
#[test]
fn certificates_come_from_files() {
    let files = tempfile::tempdir().expect("a directory");
    let domain = mesh_node::id::TrustDomain::parse("cluster.local").expect("valid");
    let ca = files.path().join("elsewhere");
    let authority = mesh_node::identity::Authority::open(&ca, domain).expect("an authority");
    std::fs::copy(ca.join("root-cert.pem"), files.path().join("roots.pem")).expect("copied");
    let write = |account: &str, life: u64| {
        let id = mesh_node::id::SpiffeId::parse(&format!("spiffe://cluster.local/ns/default/sa/{account}")).expect("valid");
        let (key, chain) = authority.issue(&id, Duration::from_secs(life)).expect("issued");
        let directory = files.path().join("default").join(account);
        std::fs::create_dir_all(&directory).expect("made");
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let pem = |der: &[u8]| format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(der));
        std::fs::write(directory.join("tls.key"), key.serialize_pem()).expect("written");
        std::fs::write(directory.join("tls.crt"), chain.iter().map(|c| pem(c)).collect::<String>()).expect("written");
    };
    ["server", "echo", "spare", "far"].iter().for_each(|account| write(account, 3600));
    let options = NodeOptions::with(&[
        "--certificate-source",
        "files",
        "--certificate-dir",
        &files.path().display().to_string(),
        "--key-exchange",
        "pqc-only",
    ]);
    let scene = scene(&options);
    wait_for("traffic", Duration::from_secs(10), || Ok(scene.ask() == "200")).expect("traffic");
    let before = scene.certificate(1, "/sa/far")["serial"].clone();
    let load = scene.load(6);
    write("far", 3600);
    wait_for("the new certificate is in use", Duration::from_secs(10), || Ok(scene.certificate(1, "/sa/far")["serial"] != before))
        .expect("in use");
    assert!(load.finish() > 50);
}
