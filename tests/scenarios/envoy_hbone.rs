//! HBONE with a real Envoy at the other end, as it is in waypoints, gateways and sidecars: it dials a pod of ours, and serves one that
//! ours dial. Its TLS is BoringSSL and its HTTP/2 nghttp2's or its own: nothing of it is shared with mesh-node.

use std::{fs, path::Path, process::Stdio, time::Duration};

use mesh_tests::{Bed, NodeOptions, Pod, PodSpec, bed::wait_for, envoy::installed, peer::Certificate};
use serde_json::{Value, json};

const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// TLS 1.3 with a certificate of the mesh, and peers of one identity.
fn tls(bed: &Bed, directory: &Path, own: &str, peer: &str) -> Value {
    let (chain, key) = Certificate::of(own).pem(&bed.directory.join("ca")).expect("a certificate");
    json!({
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}],
        "validation_context": {
            "trusted_ca": {"filename": directory.join("ca/root-cert.pem")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    })
}

fn address(ip: &str, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

fn cluster(name: &str, ip: &str, port: u16) -> Value {
    json!({"name": name, "type": "STATIC", "load_assignment": {"cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(ip, port)}}]}]}})
}

/// A listener of which every connection goes through a tunnel to a pod's port.
fn originator(bed: &Bed, server: &Pod) -> Value {
    let own = "spiffe://cluster.local/ns/default/sa/outsider";
    let mut hbone = cluster("hbone", &server.v4().to_string(), 15008);
    hbone["transport_socket"] = json!({"name": "tls", "typed_config": {
        "@type": format!("{TYPES}.transport_sockets.tls.v3.UpstreamTlsContext"),
        "common_tls_context": tls(bed, &bed.directory, own, "spiffe://cluster.local/ns/default/sa/server")}});
    hbone["typed_extension_protocol_options"] = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
        "explicit_http_config": {"http2_protocol_options": {"allow_connect": true}}}});
    let proxy = json!({"@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"), "stat_prefix": "t", "cluster": "hbone",
        "tunneling_config": {"hostname": server.address(8080)}});
    json!({"static_resources": {
        "listeners": [{"name": "out", "address": address("127.0.0.1", 9000), "filter_chains": [{"filters": [{"name": "tcp", "typed_config": proxy}]}]}],
        "clusters": [hbone],
    }})
}

/// The HBONE port of a pod, which leads to its application.
fn terminator(bed: &Bed) -> Value {
    let own = "spiffe://cluster.local/ns/default/sa/server";
    let manager = json!({"@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "h", "codec_type": "HTTP2", "http2_protocol_options": {"allow_connect": true},
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"connect_matcher": {}},
            "route": {"cluster": "application", "timeout": "0s", "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]}}]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": format!("{TYPES}.filters.http.router.v3.Router")}}]});
    let socket = json!({"name": "tls", "typed_config": {
        "@type": format!("{TYPES}.transport_sockets.tls.v3.DownstreamTlsContext"), "require_client_certificate": true,
        "common_tls_context": tls(bed, &bed.directory, own, "spiffe://cluster.local/ns/default/sa/client")}});
    json!({"static_resources": {
        "listeners": [{"name": "in", "address": address("0.0.0.0", 15008),
            "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}], "transport_socket": socket}]}],
        "clusters": [cluster("application", "127.0.0.1", 8080)],
    }})
}

/// An Envoy in a pod; ended with this.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn envoy(bed: &Bed, pod: &Pod, config: &Value) -> Running {
    let path = bed.directory.join(format!("envoy-{}.json", pod.v4()));
    fs::write(&path, config.to_string()).expect("written");
    let said = fs::File::create(path.with_extension("log")).expect("a file");
    let arguments = ["--config-path", path.to_str().expect("text"), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"];
    let mut command = bed.command(pod, &installed().expect("Envoy"), &arguments);
    Running(command.stdin(Stdio::null()).stdout(said.try_clone().expect("a file")).stderr(said).spawn().expect("Envoy"))
}

/// What Envoys wrote.
fn said(bed: &Bed) -> String {
    let files = fs::read_dir(&bed.directory).into_iter().flatten().flatten().map(|f| f.path());
    files.filter(|f| f.extension().is_some_and(|e| e == "log")).filter_map(|f| fs::read_to_string(f).ok()).collect()
}

/// Every kind of connection through the tunnel.
fn everything_works(bed: &Bed, client: &Pod, to: &str) {
    let mut last = String::new();
    let waited = wait_for("an answer", Duration::from_secs(15), || {
        let report = bed.probe(client, &["ask", to, "hello"])?;
        last = report.to_string();
        Ok(report["answer"].as_str().is_some_and(|a| a.contains("hello")))
    });
    waited.unwrap_or_else(|e| panic!("{e}: {last}; Envoy: {}", said(bed)));
    let report = bed.probe(client, &["upload", to, "3000000"]).expect("a report");
    assert_eq!(report["received"], 3_000_000, "{report}");
    let report = bed.probe(client, &["exchange", to, "5000000"]).expect("a report");
    assert!(report.get("error").is_none() && report["received"] == 5_000_000, "{report}");
}

#[test]
fn a_real_envoy_reaches_a_pod_and_is_who_its_certificate_says() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [server] = bed.meshed([PodSpec::server("server", 1)]).expect("server");
    let outsider = bed.pod(&PodSpec::new("outsider", 0).label("istio.io/dataplane-mode", "none")).expect("outsider");
    let _envoy = envoy(&bed, &outsider, &originator(&bed, &server));
    everything_works(&bed, &outsider, "127.0.0.1:9000");
    // The server's end alone: as a server, Envoy ends the other direction with it.
    let report = bed.probe(&outsider, &["finish-first", "127.0.0.1:9000"]).expect("a report");
    assert!(report.get("error").is_none(), "{report}");
    let counted = |bed: &Bed| {
        let labels = ["reporter=\"destination\"", "source_principal=\"spiffe://cluster.local/ns/default/sa/outsider\"", "mutual_tls"];
        bed.nodes()[1].metric("istio_tcp_connections_opened_total", &labels)
    };
    assert!(counted(&bed).expect("a metric") >= 4.0, "its connections are counted as its own");
    // Policy knows it by its certificate.
    let policy = |principal: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: deny, namespace: default}}\nspec: {{action: DENY, rules: [{{from: [{{source: {{principals: [{principal}]}}}}]}}]}}\n"
        )
    };
    let asks = |bed: &Bed| {
        bed.probe(&outsider, &["ask", "127.0.0.1:9000", "hello"]).map(|r| r["answer"].as_str().is_some_and(|a| a.contains("hello")))
    };
    bed.apply("policy", &policy("cluster.local/ns/default/sa/somebody")).expect("applied");
    bed.settle().expect("settled");
    assert!(asks(&bed).expect("a report"));
    bed.apply("policy", &policy("cluster.local/ns/default/sa/outsider")).expect("applied");
    wait_for("it is denied", Duration::from_secs(5), || asks(&bed).map(|answered| !answered)).expect("denied");
}

#[test]
fn a_pod_reaches_what_a_real_envoy_serves() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let [client, server] = bed.meshed([PodSpec::new("client", 0), PodSpec::server("server", 1)]).expect("pods");
    // Its HBONE port is Envoy's to answer.
    bed.node(1).stop().expect("stopped");
    bed.node(1).uninstall().expect("uninstalled");
    let _envoy = envoy(&bed, &server, &terminator(&bed));
    everything_works(&bed, &client, &server.address(8080));
    let tunnels = bed.nodes()[0].admin_json("/pool").expect("the pool");
    assert!(tunnels.as_array().is_some_and(|all| !all.is_empty()), "it went through tunnels: {tunnels}");
}
