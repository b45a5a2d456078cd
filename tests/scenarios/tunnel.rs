//! HBONE with peers that are not mesh-node: what is accepted, what is refused and how, and that it is counted.

use std::{net::SocketAddr, path::PathBuf, process::Stdio, time::Duration};

use http::{Method, StatusCode};
use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{program, wait_for},
    peer::{self, Certificate, Dial},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

/// A server pod on node 2, and the namespace of node 1 to dial it from.
struct Scene {
    bed: Bed,
    server: Pod,
    hbone: SocketAddr,
    from: PathBuf,
    ca: PathBuf,
}

fn scene() -> Scene {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    for name in ["also", "server"] {
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: server}}, ports: [{{name: tcp, port: 81, targetPort: 8080}}]}}\n"
        );
        bed.kubectl_apply(name, &service).expect("service");
    }
    let [server] = bed.meshed([PodSpec::server("server", 1).label("app", "server")]).expect("server");
    Scene { hbone: SocketAddr::new(server.v4(), 15008), from: bed.node_netns(0), ca: bed.directory.join("ca"), server, bed }
}

impl Scene {
    fn dial(&self, certificate: Option<Certificate>) -> Dial<'_> {
        Dial { netns: &self.from, ca: &self.ca, certificate, alpn: &["h2"] }
    }
}

#[test]
fn a_good_peer_gets_a_tunnel_and_half_close_works_in_it() {
    let scene = scene();
    runtime().block_on(async {
        let mut send = scene.dial(Some(Certificate::of(CLIENT))).h2(scene.hbone).await.expect("connected");
        let request = http::Request::builder().method("CONNECT").uri(scene.server.address(8080)).body(()).expect("request");
        let (response, mut stream) = send.send_request(request, false).expect("sent");
        let response = response.await.expect("answered");
        assert_eq!(response.status(), StatusCode::OK);
        stream.send_data("upload\nabc".into(), false).expect("data");
        stream.send_data("".into(), true).expect("end");
        let mut body = response.into_body();
        let mut answer = Vec::new();
        while let Some(data) = body.data().await {
            answer.extend_from_slice(&data.expect("data"));
        }
        assert!(String::from_utf8_lossy(&answer).contains("\"received\":3"), "{answer:?}");
    });
}

#[test]
fn a_source_that_nothing_else_is_known_of_is_told_as_it_says_itself() {
    const SAYS: &str = "k8s.cluster.name=elsewhere,k8s.namespace.name=kube-system,k8s.deployment.name=far,service.name=far-app,\
                        service.version=v7,cloud.region=north,cloud.availability_zone=n1";
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    bed.kubectl_apply("web", service).expect("service");
    let web = PodSpec {
        command: vec![program("web").display().to_string(), "serve".into(), "8080".into(), "web".into()],
        port: Some(8080),
        ..PodSpec::new("web", 1).label("app", "web")
    };
    let [web, tcp] = bed.meshed([web, PodSpec::server("tcp", 1)]).expect("pods");
    let (from, ca) = (bed.node_netns(0), bed.directory.join("ca"));
    let dial = Dial { netns: &from, ca: &ca, certificate: Some(Certificate::of(CLIENT)), alpn: &["h2"] };
    runtime().block_on(async {
        for (pod, port, says) in [(&web, 8080, "GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n"), (&tcp, 8080, "upload\n")] {
            let mut send = dial.h2(SocketAddr::new(pod.v4(), 15008)).await.expect("connected");
            let request = http::Request::builder().method("CONNECT").uri(pod.address(port)).header("baggage", SAYS);
            let (response, mut stream) = send.send_request(request.body(()).expect("request"), false).expect("sent");
            let response = response.await.expect("answered");
            assert_eq!(response.status(), StatusCode::OK);
            stream.send_data(says.into(), true).expect("data");
            let mut body = response.into_body();
            while let Some(data) = body.data().await {
                data.expect("data");
            }
        }
    });
    let source = [
        "reporter=\"destination\"",
        "source_workload=\"far\"",
        "source_app=\"far-app\"",
        "source_canonical_service=\"far-app\"",
        "source_canonical_revision=\"v7\"",
        "source_version=\"v7\"",
        "source_cluster=\"elsewhere\"",
        // What it has proved, and not what it says.
        "source_workload_namespace=\"default\"",
        "source_principal=\"spiffe://cluster.local/ns/default/sa/client\"",
    ];
    for (metric, to) in
        [("istio_requests_total", "destination_workload=\"web\""), ("istio_tcp_connections_closed_total", "destination_workload=\"tcp\"")]
    {
        let told = || Ok(bed.nodes()[1].metric(metric, &[&source[..], &[to]].concat()).unwrap_or(0.0) > 0.5);
        wait_for(metric, Duration::from_secs(5), told).expect(metric);
    }
    let told = || Ok(bed.nodes()[1].log_text().lines().any(|l| l.contains("connection complete") && l.contains("dst.workload=\"tcp\"")));
    wait_for("its line", Duration::from_secs(5), told).expect("told");
    let logged = bed.nodes()[1].log_text();
    let line = logged
        .lines()
        .find(|l| l.contains("connection complete") && l.contains("dst.workload=\"tcp\""))
        .unwrap_or_else(|| panic!("{logged}"));
    assert!(line.contains("src.workload=\"far-app\"") && line.contains("src.namespace=\"default\""), "{line}");
}

#[test]
fn requests_are_answered_as_ztunnel_answers_them() {
    let scene = scene();
    let good = scene.dial(Some(Certificate::of(CLIENT)));
    let (own, own6) = (scene.server.v4(), scene.server.v6());
    let cases = [
        (Method::CONNECT, format!("{own}:8080"), StatusCode::OK),
        (Method::CONNECT, format!("{own}:7"), StatusCode::SERVICE_UNAVAILABLE),
        (Method::CONNECT, "10.244.16.99:8080".to_owned(), StatusCode::BAD_REQUEST),
        (Method::CONNECT, "127.0.0.1:8080".to_owned(), StatusCode::BAD_REQUEST),
        (Method::CONNECT, format!("[{own6}]:8080"), StatusCode::BAD_REQUEST),
        (Method::CONNECT, format!("{own}:15001"), StatusCode::SERVICE_UNAVAILABLE),
        (Method::CONNECT, format!("{own}:15006"), StatusCode::SERVICE_UNAVAILABLE),
        (Method::CONNECT, format!("{own}:15008"), StatusCode::SERVICE_UNAVAILABLE),
        (Method::CONNECT, "server.default.svc.cluster.local:81".to_owned(), StatusCode::OK),
        (Method::CONNECT, "nobody.default.svc.cluster.local:80".to_owned(), StatusCode::SERVICE_UNAVAILABLE),
        (Method::GET, format!("http://{own}:8080/"), StatusCode::BAD_REQUEST),
        (Method::POST, format!("https://{own}:8080/x"), StatusCode::BAD_REQUEST),
    ];
    runtime().block_on(async {
        for (method, uri, expected) in cases {
            let status = good.status(scene.hbone, method.clone(), &uri).await.unwrap_or_else(|e| panic!("{method} {uri}: {e:#}"));
            assert_eq!(status, expected, "{method} {uri}");
        }
    });
    let node = &scene.bed.nodes()[1];
    let counted = |reason: &str| node.metric("mesh_connection_failures_total", &["inbound", reason]).expect("metric");
    // Of services that lead to the same port, it is the one that was asked for that is told of.
    let named = ["reporter=\"destination\"", "destination_service_name=\"server\""];
    let opened = || node.metric("istio_tcp_connections_opened_total", &named).unwrap_or(0.0);
    wait_for("the one by name", Duration::from_secs(5), || Ok(opened() > 0.5)).expect("counted");
    assert_eq!(opened(), 1.0, "by address it is the first that leads there");
    assert!(counted("foreign_authority") > 2.5 && counted("bad_request") > 1.5 && counted("reserved_port") > 2.5);
}

/// More than may shake hands at a time begin with it and stop: who means it does not wait for them.
#[test]
fn who_says_half_a_word_takes_nobodys_place() {
    let scene = scene();
    runtime().block_on(async {
        let mut begun = Vec::new();
        for word in [&[22_u8][..], &[22, 3, 1, 2, 0, 1, 0]].into_iter().cycle().take(400) {
            let mut stream = peer::tcp(&scene.from, scene.hbone).await.expect("connected");
            stream.write_all(word).await.expect("written");
            begun.push(stream);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let dial = scene.dial(Some(Certificate::of(CLIENT)));
        let to = scene.server.address(8080);
        let asked = dial.status(scene.hbone, Method::CONNECT, &to);
        let status = tokio::time::timeout(Duration::from_secs(3), asked).await.expect("in time").expect("an answer");
        assert_eq!(status, StatusCode::OK);
    });
}

#[test]
fn strangers_are_refused_counted_and_disturb_nobody() {
    let mut scene = scene();
    let [client] = scene.bed.meshed([PodSpec::new("client", 0)]).expect("client");
    let steady = scene
        .bed
        .command(&client, &program("probe"), &["steady", &scene.server.address(8080), "4"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("steady");
    let cases = [
        ("no_certificate", None),
        ("expired", Some(Certificate::of(CLIENT).expired())),
        ("untrusted", Some(Certificate::of(CLIENT).of_foreign_root())),
        ("wrong_identity", Some(Certificate::of("spiffe://elsewhere.example/ns/default/sa/client"))),
        ("wrong_identity", Some(Certificate::of("spiffe://cluster.local/not/a/workload"))),
    ];
    runtime().block_on(async {
        for (reason, certificate) in cases {
            let node = &scene.bed.nodes()[1];
            let count = || node.metric("mesh_tls_handshake_failures_total", &["server", reason]).expect("metric");
            let before = count();
            let refused = scene.dial(certificate).status(scene.hbone, Method::CONNECT, &scene.server.address(8080)).await;
            assert!(refused.is_err(), "{reason}: {refused:?}");
            wait_for(reason, Duration::from_secs(5), || Ok(count() > before)).expect("counted");
            let told = |line: &String| line.contains(&format!("dst.addr={}", scene.hbone)) && line.contains("error=");
            wait_for(reason, Duration::from_secs(5), || Ok(node.access_log().iter().any(told))).expect("told where it went to");
        }
        for alpn in [&["http/1.1"][..], &[]] {
            let dial = Dial { alpn, ..scene.dial(Some(Certificate::of(CLIENT))) };
            assert!(dial.status(scene.hbone, Method::CONNECT, &scene.server.address(8080)).await.is_err(), "{alpn:?}");
        }
        for garbage in [&b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", &[0xff; 4096]] {
            let mut stream = peer::tcp(&scene.from, scene.hbone).await.expect("connected");
            stream.write_all(garbage).await.expect("written");
            let mut rest = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
            assert!(ended.is_ok(), "garbage was not refused");
            assert!(!String::from_utf8_lossy(&rest).contains("200"));
        }
    });
    let output = steady.wait_with_output().expect("steady");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert!(report.get("error").is_none() && report["answers"].as_u64().is_some_and(|n| n > 100), "{report}");
}

#[test]
fn a_server_that_is_not_who_it_should_be_gets_nothing() {
    // Node 2 runs no mesh-node: its pod's HBONE port is ours to answer.
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::new("server", 1)]).expect("pods");
    bed.node(1).stop().expect("stopped");
    bed.node(1).uninstall().expect("uninstalled");
    let ca = bed.directory.join("ca");
    let at = SocketAddr::new(server.v4(), 15008);
    let right = "spiffe://cluster.local/ns/default/sa/server";
    let h2 = &["h2"][..];
    let cases = [
        ("itself", Certificate::of(right), h2, true),
        ("wrong_identity", Certificate::of("spiffe://cluster.local/ns/default/sa/other"), h2, false),
        ("wrong_identity", Certificate::of("spiffe://elsewhere.example/ns/default/sa/server"), h2, false),
        ("expired", Certificate::of(right).expired(), h2, false),
        ("untrusted", Certificate::of(right).of_foreign_root(), h2, false),
        ("protocol", Certificate::of(right), &[][..], false),
    ];
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    for (reason, certificate, alpn, accepted) in cases {
        let (task, asked) = runtime.block_on(peer::echo_server(&server.netns, at, &ca, &certificate, alpn)).expect("server");
        let failed = || {
            let labels = ["reporter=\"source\"", "response_flags=\"TLS_FAILURE\"", "destination_workload=\"server\""];
            bed.nodes()[0].metric("istio_tcp_connections_failed_total", &labels).unwrap_or(0.0)
        };
        let before = failed();
        let report = bed.probe(&client, &["ask", &server.address(8080), "hello"]).expect("a report");
        assert_eq!(report["answer"] == "hello", accepted, "{reason}: {report}");
        if accepted {
            let asked = asked.lock().expect("lock");
            let of = |name: &str| asked[0].get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
            let workload =
                "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.pod.name=client,service.name=client,service.version=latest";
            assert_eq!(of("baggage"), workload, "who made the pod, what it is called");
            assert!(of("forwarded").starts_with(&format!("for=\"{}:", client.v4())) && of("traceparent").len() == 55, "{asked:?}");
        } else {
            // The connection of the case before may have been there still, and been what failed.
            let counted = wait_for("the failure is counted", Duration::from_secs(10), || {
                let count = bed.nodes()[0].metric("mesh_tls_handshake_failures_total", &["client", reason])?;
                if count < 0.5 {
                    let report = bed.probe(&client, &["ask", &server.address(8080), "hello"])?;
                    assert_ne!(report["answer"], "hello", "{reason}: {report}");
                }
                Ok(count > 0.5)
            });
            counted.expect(reason);
            assert!(failed() > before, "{reason}");
        }
        task.abort();
        let _ = runtime.block_on(task);
    }
}

#[test]
fn a_goaway_of_the_peer_moves_new_connections_to_a_new_one() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1)]).expect("pods");
    let old =
        bed.command(&client, &program("probe"), &["steady", &server.address(8080), "5"]).stdout(Stdio::piped()).spawn().expect("steady");
    wait_for("a tunnel", Duration::from_secs(5), || Ok(bed.nodes()[0].admin_json("/pool")?[0]["streams"] == 1)).expect("tunnel");
    // Taken out of the mesh, the pod's HBONE listener says GOAWAY after its grace; the connection under way goes on.
    bed.relabel(&server, "istio.io/dataplane-mode", Some("none")).expect("relabel");
    bed.wait_captured(&server, false).expect("released");
    let during = bed.probe(&client, &["attempts", &server.address(8080), "3"]).expect("a report");
    assert!(during["failed"] == 0 && during["worked"].as_u64().is_some_and(|n| n > 20), "{during}");
    let output = old.wait_with_output().expect("steady");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert!(report.get("error").is_none(), "{report}");
}
