//! Attacks, the kubelet, and what policies see.

use super::*;

/// What somebody who wants in without being allowed to may try.
#[test]
fn what_attackers_try_is_refused() {
    let mut scene = scene();
    let victim = scene.bed.meshed([web("victim", 0)]).map(|[v]| v).expect("a victim");
    let [attacker] = scene.bed.meshed([PodSpec::new("attacker", 1)]).expect("an attacker");
    scene.apply(&[
        object("PeerAuthentication", "default", "istio-system", &json!({"mtls": {"mode": "STRICT"}})),
        on_server(
            "AuthorizationPolicy",
            "near-only",
            json!({"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/near"], "ipBlocks": [scene.near.v4().to_string(), scene.near.v6().to_string()]}}], "to": [{"operation": {"paths": ["/public/*"]}}]}]}),
        ),
    ]);
    assert_eq!(scene.ask(&scene.near, "server:80", "/public/x", &[]), "200");
    // Headers say what they like: address, identity, baggage.
    for header in [
        format!("x-forwarded-for: {}", scene.near.v4()),
        format!("forwarded: for={}", scene.near.v4()),
        "x-forwarded-client-cert: By=x;URI=spiffe://cluster.local/ns/default/sa/near".to_owned(),
        "baggage: k8s.namespace.name=default,service.name=near".to_owned(),
        "x-envoy-internal: true".to_owned(),
    ] {
        for client in [&scene.far, &scene.strangers[0], &attacker] {
            let to = if client.namespace == "plain" { scene.server.address(8080) } else { "server:80".to_owned() };
            assert_eq!(scene.ask(client, &to, "/public/x", std::slice::from_ref(&header)), "403", "{} {header}", client.name);
        }
    }
    // Paths that only look public.
    for path in [
        "/public/../secret",
        "/public/..%2fsecret",
        "/public/..;/secret",
        "/public/%2e%2e/secret",
        "//secret",
        "/public/.%2e/secret",
        "/public//../../secret",
    ] {
        let found = scene.ask(&scene.near, "server:80", path, &[]);
        assert!(found == "403" || found == "400", "{path}: {found}");
    }
    // The source address of a pod that is allowed, taken by another pod on its own interface.
    let forged = forge_source(&scene, &attacker);
    assert_ne!(forged, "200", "a forged source address");
    // Plain TCP to the proxy's own ports, and CONNECT within HTTP to other pods.
    for port in [15001, 15006, 15008] {
        for client in [&attacker, &scene.near, &scene.strangers[0]] {
            let found = scene.ask(client, &scene.server.address(port), "/public/x", &[]);
            assert!(found != "200", "{} reached port {port}: {found}", client.name);
        }
    }
    let connect = format!(
        "CONNECT {} HTTP/1.1\r\nhost: {}\r\n\r\nGET /public/x HTTP/1.1\r\nhost: a\r\n\r\n",
        victim.address(8080),
        victim.address(8080)
    );
    let smuggled = "POST /public/x HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /secret HTTP/1.1\r\nhost: a\r\n\r\n";
    let hidden = "GET /public/x HTTP/1.1\r\nhost: a\r\ncontent-length: 0, 5\r\n\r\nGET /secret HTTP/1.1\r\nhost: a\r\n\r\n";
    let pipelined = "GET /public/x HTTP/1.1\r\nhost: a\r\n\r\nGET /secret HTTP/1.1\r\nhost: a\r\n\r\n";
    let absolute = "GET http://near/secret HTTP/1.1\r\nhost: a\r\n\r\n";
    for (name, bytes) in [
        ("connect", connect.as_str()),
        ("te and cl", smuggled),
        ("two lengths", hidden),
        ("pipelined", pipelined),
        ("absolute form", absolute),
    ] {
        for to in ["server:80".to_owned(), scene.server.address(8080)] {
            let text = raw(&scene, &scene.near, &to, bytes);
            let answers = text.matches("HTTP/1.1 200").count();
            let allowed = usize::from(name == "pipelined");
            assert!(answers <= allowed && !text.contains("/secret"), "{name} to {to}: {text}");
        }
    }
    // Switching a connection away from HTTP without being asked to.
    let upgrade = "GET /public/x HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n";
    let text = raw(&scene, &scene.near, &scene.server.address(8080), upgrade);
    assert!(!text.contains("101"), "{text}");
}

/// Sends bytes from a pod and returns what comes back within a second.
fn raw(scene: &Scene, client: &Pod, to: &str, bytes: &str) -> String {
    let script = "import socket,sys\nh,p=sys.argv[1].rsplit(':',1)\ns=socket.create_connection((h,int(p)),5)\ns.settimeout(1)\ns.sendall(sys.argv[2].encode())\nout=b''\ntry:\n  while True:\n    d=s.recv(65536)\n    if not d: break\n    out+=d\nexcept OSError: pass\nsys.stdout.buffer.write(out)";
    let output = scene.bed.run(client, std::path::Path::new("python3"), &["-c", script, to, bytes]).expect("python");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A pod that binds the address of another one, with the proxy's mark on its packets.
fn forge_source(scene: &Scene, attacker: &Pod) -> String {
    let script = format!(
        "import socket,sys\ns=socket.socket()\ns.setsockopt(0,19,1)\ns.setsockopt(socket.SOL_SOCKET,36,{})\ns.settimeout(2)\ntry:\n  s.bind(('{}',0))\n  s.connect(('{}',8080))\n  s.sendall(b'GET /public/x HTTP/1.1\\r\\nhost: a\\r\\n\\r\\n')\n  print(s.recv(100).decode().split(' ')[1])\nexcept OSError as e: print('error',e)",
        mesh_common::TRANSPARENT_MARK,
        scene.near.v4(),
        scene.server.v4()
    );
    let output = scene.bed.run(attacker, std::path::Path::new("python3"), &["-c", &script]).expect("python");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The kubelet probes pods whatever the policies are; nobody else passes for it.
#[test]
fn probes_of_the_nodes_own_kubelet_get_through() {
    let scene = scene();
    scene.apply(&[
        object("PeerAuthentication", "default", "istio-system", &json!({"mtls": {"mode": "STRICT"}})),
        object("AuthorizationPolicy", "deny-all", "istio-system", &json!({})),
        on_server("RequestAuthentication", "jwt", json!({"jwtRules": [{"issuer": "i", "jwks": scene.issuer.jwks()}]})),
    ]);
    let ask = |node: usize, cgroup: &str, to: &str| {
        let url = format!("{to}/x");
        let output = scene.bed.nodes()[node].run_in(cgroup, &program("web"), &["get", &url, "1"]).expect("web");
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
        report["statuses"].as_object().and_then(|s| s.keys().next()).cloned().unwrap_or_else(|| "reset".to_owned())
    };
    let uid = "7d7a1c2e-6d0f-4f0e-9f3e-1a2b3c4d5e6f";
    for to in [scene.server.address(8080), scene.server.address6(8080)] {
        for _ in 0..3 {
            assert_eq!(ask(0, "system.slice/kubelet.service", &to), "200", "{to}");
        }
        // Only where the pod says that it is probed.
        let other = to.replace("8080", "8081");
        assert_eq!(ask(0, "system.slice/kubelet.service", &other), "reset", "{other}");
        // A pod in the node's network is a pod, and another node is not this one.
        assert_eq!(ask(0, &format!("kubepods/burstable/pod{uid}/c0"), &to), "403", "{to}");
        assert_eq!(ask(1, "system.slice/kubelet.service", &to), "403", "{to}");
        assert_eq!([scene.ask(&scene.near, &to, "/x", &[]), scene.ask(&scene.strangers[0], &to, "/x", &[])], ["reset", "403"], "{to}");
    }
    // What the kernel notes of such connections is forgotten with them.
    let flows = scene.bed.nodes()[0].pinned("maps/NODE_FLOWS");
    wait_for("flows are forgotten", Duration::from_secs(5), || Ok(mesh_node::capture::count_entries(&flows)? == 0)).expect("none is left");
}

/// Policies attached to a service hold on the port it leads to, and dry-run and AUDIT policies only tell.
#[test]
fn target_refs_dry_run_and_audit() {
    let scene = scene();
    let target = json!([{"kind": "Service", "group": "", "name": "server"}]);
    scene.apply(&[object(
        "AuthorizationPolicy",
        "attached",
        "default",
        &json!({"targetRefs": target, "rules": [{"to": [{"operation": {"paths": ["/open"]}}]}]}),
    )]);
    for client in [&scene.near, &scene.far] {
        assert_eq!([scene.ask(client, "server:80", "/open", &[]), scene.ask(client, "server:80", "/x", &[])], ["200", "403"]);
    }
    let mut dry =
        object("AuthorizationPolicy", "dry", "default", &json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]}));
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    let audit = object(
        "AuthorizationPolicy",
        "audit",
        "default",
        &json!({"action": "AUDIT", "rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]}),
    );
    scene.apply(&[dry, audit]);
    for client in [&scene.near, &scene.far] {
        assert_eq!(scene.ask(client, "server:80", "/x", &[]), "200");
    }
    let node = &scene.bed.nodes()[0];
    for (policy, result) in [("default/dry", "dry_run_denied"), ("default/audit", "audited")] {
        wait_for("both requests are counted", Duration::from_secs(5), || {
            Ok(node.metric("mesh_policy_decisions_total", &[policy, result])? > 1.5)
        })
        .expect(policy);
    }
    let mesh_wide = json!({"targetRefs": [{"kind": "GatewayClass", "group": "gateway.networking.k8s.io", "name": "istio-waypoint"}], "action": "DENY", "rules": [{}]});
    scene.apply(&[object("AuthorizationPolicy", "everything", "istio-system", &mesh_wide)]);
    assert_eq!(scene.ask(&scene.far, "server:80", "/x", &[]), "403");
    let state = node.admin_json("/workloads").expect("workloads");
    let server = state.as_array().into_iter().flatten().find(|w| w["name"] == "server").expect("server");
    assert_eq!(server["policies"]["deny"], json!(["istio-system/everything"]));
}

/// A service of no pods of its own, whose routes lead to others': its policies hold where the client is, and `explain` says so.
#[test]
fn policies_of_a_service_hold_where_its_routes_lead_away() {
    let scene = scene();
    let front = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "front", "namespace": "default"},
        "spec": {"clusterIP": "10.96.7.1", "ports": [{"name": "tcp", "port": 81}, {"name": "http", "port": 80}]}});
    let to = json!([{"destination": {"host": "server", "port": {"number": 80}}}]);
    let routes = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "front", "namespace": "default"},
        "spec": {"hosts": ["front"], "http": [{"match": [{"port": 80}], "route": to}], "tcp": [{"match": [{"port": 81}], "route": to}]}});
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [front, routes]});
    scene.bed.apply("routes", &list.to_string()).expect("applied");
    let far = json!({"targetRefs": [{"kind": "Service", "group": "", "name": "front"}],
        "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/far"]}}]}]});
    for (policies, near) in [(vec![], ["200", "200"]), (vec![object("AuthorizationPolicy", "far", "default", &far)], ["403", "reset"])] {
        scene.apply(&policies);
        for (client, expected) in [(&scene.near, near), (&scene.far, ["200", "200"])] {
            for (port, status) in [80, 81].into_iter().zip(expected) {
                assert_eq!(scene.ask(client, &format!("10.96.7.1:{port}"), "/x", &[]), status, "{}: {port}", client.name);
                let node = &scene.bed.nodes()[0];
                let said = node.admin_json(&format!("/explain?from=default/{}&to=front:{port}", client.name)).expect("an answer");
                assert_eq!(said["allowed"], status == "200", "{said}");
            }
        }
    }
}

/// A neighbour that dials a pod by its own address comes by no shorter way: the application is told who asks, and requests are counted.
#[test]
fn what_is_declared_to_carry_http_is_looked_into_by_whatever_address() {
    let scene = scene();
    let node = &scene.bed.nodes()[0];
    for to in ["server:80".to_owned(), scene.server.address(8080), scene.server.address6(8080)] {
        assert_eq!(scene.ask(&scene.near, &to, "/x", &[]), "200", "{to}");
    }
    wait_for("all are counted", Duration::from_secs(5), || {
        Ok(node.metric("istio_requests_total", &["reporter=\"destination\""]).unwrap_or(0.0) > 2.5)
    })
    .expect("requests");
    let direct = node.metric("mesh_capture_events_total", &["\"direct\""]).unwrap_or(0.0);
    assert_eq!(direct, 0.0);
}

/// The connection is made by hand to be sure of its addresses.
#[test]
fn policies_see_the_pods_own_address_whatever_is_dialled() {
    let scene = scene();
    let policy = json!({"rules": [{"from": [{"source": {"ipBlocks": [scene.far.v4().to_string(), scene.far.v6().to_string()]}}], "to": [{"operation": {"methods": ["GET"]}}]}]});
    scene.apply(&[on_server("AuthorizationPolicy", "far-only", policy)]);
    for to in ["server:80".to_owned(), scene.server.address(8080), scene.server.address6(8080)] {
        assert_eq!(scene.ask(&scene.far, &to, "/x", &[]), "200", "{to}");
        let refused = if to == "server:80" { "403" } else { "reset" };
        assert_eq!(scene.ask(&scene.near, &to, "/x", &[]), refused, "{to}");
    }
    let address: SocketAddr = scene.server.address(8080).parse().expect("an address");
    let netns = Netns::open(&scene.strangers[1].netns).expect("a namespace");
    let mut stream = netns.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(2))).expect("entered").expect("connected");
    stream.set_read_timeout(Some(Duration::from_secs(3))).expect("set");
    stream.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n").expect("written");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    assert!(answer.starts_with("HTTP/1.1 403") && answer.ends_with("RBAC: access denied"), "{answer}");
}
