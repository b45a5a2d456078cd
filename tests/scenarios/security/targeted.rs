//! Policies that refer to a service, and routes that lead away from it or answer for it: they are asked before a route is, as a waypoint
//! would ask them.

use std::time::{Duration, Instant};

use mesh_tests::{
    engine::{Engine, NEAR_CLIENT, security, service, virtual_service, wait_until},
    scripted::{self, Seen},
    token::Issuer,
    wire::exchange,
};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::{ISSUER, ask, authorizers::mesh_config, claims, get, served, servers::authorizer};

fn to(host: &str) -> Value {
    json!([{"destination": {"host": host}}])
}

fn targeted(kind: &str, name: &str, mut spec: Value) -> Value {
    spec["targetRefs"] = json!([{"kind": "Service", "group": "", "name": "server"}]);
    security(kind, name, &spec)
}

fn routes() -> Value {
    virtual_service(
        "server",
        &json!([
            {"match": [{"uri": {"prefix": "/secret/moved"}}], "redirect": {"uri": "/x"}},
            {"match": [{"uri": {"prefix": "/secret/told"}}], "directResponse": {"status": 200}},
            {"match": [{"uri": {"prefix": "/secret/open"}}], "rewrite": {"uri": "/open"}, "route": to("server")},
            {"match": [{"uri": {"prefix": "/secret/fault"}}], "fault": {"abort": {"httpStatus": 418, "percentage": {"value": 100}}}, "route": to("server")},
            {"match": [{"uri": {"prefix": "/secret/copied"}}], "mirror": {"host": "other"}, "route": to("other")},
            {"match": [{"uri": {"prefix": "/own"}}, {"uri": {"prefix": "/secret/own"}}], "route": to("server")},
            {"match": [{"uri": {"prefix": "/secret"}}, {"uri": {"prefix": "/free"}}], "route": to("other")},
        ]),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_lead_nobody_around_the_policies_of_a_service() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let documents = |policies: &[Value]| {
        let mut all = served(one, policies);
        all.extend(service("other", "10.99.0.2", "http", &[two]));
        all.push(routes());
        all
    };
    let deny =
        targeted("AuthorizationPolicy", "secret", json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/secret*"]}}]}]}));
    let engine = Engine::start_as(NEAR_CLIENT, &documents(&[])).await.expect("started");
    let mut asked = 0;
    let mut all = async |policies: &[Value], headers: &str, expected: &[(&str, &str)]| {
        engine.apply(&documents(policies)).await.expect("applied");
        for (path, status) in expected {
            asked += 1;
            let got = ask(&engine, "node", one, &get(path, &format!("guard-{asked}"), headers)).await;
            assert_eq!(got.status, *status, "{path} with {} policies: {got:?}", policies.len());
            if *status == "403" {
                assert!(got.body == "RBAC: access denied" && seen.of(&format!("guard-{asked}")).is_empty(), "{path}: {got:?}");
            }
        }
    };
    let paths = [
        "/secret/moved",
        "/secret/told",
        "/secret/open",
        "/secret/fault",
        "/secret/copied",
        "/secret/own",
        "/secret",
        "/free",
        "/own",
        "/none",
    ];
    let statuses = |all: [&'static str; 10]| paths.into_iter().zip(all).collect::<Vec<_>>();
    all(&[], "", &statuses(["301", "200", "200", "418", "200", "200", "200", "200", "200", "404"])).await;
    all(std::slice::from_ref(&deny), "", &statuses(["403", "403", "403", "403", "403", "403", "403", "200", "200", "404"])).await;
    // The same for every service, as a mesh's waypoints would have it.
    let mut class = deny.clone();
    class["spec"]["targetRefs"] = json!([{"kind": "GatewayClass", "group": "gateway.networking.k8s.io", "name": "istio-waypoint"}]);
    class["metadata"]["namespace"] = "istio-system".into();
    all(&[class], "", &statuses(["403", "403", "403", "403", "403", "403", "403", "200", "200", "404"])).await;
    // It allows what nobody here is.
    let nobody = json!({"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/other/sa/x"]}}]}]});
    let allow = targeted("AuthorizationPolicy", "nobody", nobody);
    all(&[allow], "", &statuses(["403"; 10])).await;
    // What it is switched to could carry requests that nobody judges.
    engine.apply(&documents(&[deny])).await.expect("applied");
    for (protocol, path, expected) in
        [("h2c", "/free", true), ("foo/1", "/free", true), ("foo/1", "/secret/own", false), ("websocket", "/free", true)]
    {
        let id = format!("switch-{}-{}", protocol.len(), path.len());
        let headers = format!("connection: upgrade\r\nupgrade: {protocol}\r\n");
        let _ = ask(&engine, "node", one, &get(path, &id, &headers)).await;
        let arrived = seen.of(&id);
        assert_eq!(!arrived.is_empty(), expected, "{protocol} {path}");
        let offered = arrived.iter().any(|attempt| attempt.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("upgrade")));
        assert_eq!(offered, protocol == "websocket", "{protocol} {path}");
    }
    // Of pods, and of none that a route leads to.
    let selected =
        security("AuthorizationPolicy", "p", &json!({"selector": {"matchLabels": {"app": "other"}}, "action": "DENY", "rules": [{}]}));
    all(&[selected], "", &[("/secret", "200"), ("/secret/moved", "301")]).await;
    let port = |port: &str| {
        targeted("AuthorizationPolicy", "port", json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": [port]}}]}]}))
    };
    all(&[port("80")], "", &[("/free", "403"), ("/secret/told", "403")]).await;
    all(&[port("8080")], "", &[("/free", "200"), ("/secret/told", "200")]).await;
}

/// Of a port of a pod that two ports of a service lead to, which one was dialled is known where the client is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_allowed_on_one_port_is_not_on_another_that_leads_to_the_same() {
    let seen = Seen::default();
    let one = scripted::http1("up1", &seen).expect("an upstream");
    let documents = |spec: Value| {
        let mut all = served(one, &[targeted("AuthorizationPolicy", "ports", spec)]);
        for document in &mut all {
            let (at, port) = match document["kind"].as_str() {
                Some("Service") => ("/spec/ports", json!({"name": "http-also", "port": 81})),
                Some("EndpointSlice") => ("/ports", json!({"name": "http-also", "port": one.port()})),
                _ => continue,
            };
            document.pointer_mut(at).and_then(Value::as_array_mut).expect("ports").push(port);
        }
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &documents(json!({"rules": [{}]}))).await.expect("started");
    let when = |port: &str| json!([{"key": "destination.port", "values": [port]}]);
    for (spec, expected) in [
        (json!({"rules": [{}]}), ["200", "200"]),
        (json!({"rules": [{"to": [{"operation": {"ports": ["80"]}}]}]}), ["200", "403"]),
        (json!({"rules": [{"to": [{"operation": {"notPorts": ["80"]}}]}]}), ["403", "200"]),
        (json!({"rules": [{"when": when("81")}]}), ["403", "200"]),
    ] {
        engine.apply(&documents(spec.clone())).await.expect("applied");
        for (port, status) in [80, 81].into_iter().zip(expected) {
            let mut stream = engine.connect(format!("10.99.0.1:{port}").parse().expect("an address")).await.expect("connected");
            let got = exchange(&mut stream, get("/x", "port", "").into_bytes(), false).await;
            assert_eq!(got.status, status, "{port}: {spec}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_asked_for_before_a_route_leads_away() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let issuer = Issuer::default();
    let jwt = json!({"issuer": ISSUER, "jwks": issuer.jwks(), "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}]});
    let policies = [
        targeted("RequestAuthentication", "jwt", json!({"jwtRules": [jwt]})),
        targeted(
            "AuthorizationPolicy",
            "known",
            json!({"action": "DENY", "rules": [{"from": [{"source": {"notRequestPrincipals": ["*"]}}]}]}),
        ),
    ];
    let mut documents = served(one, &policies);
    documents.extend(service("other", "10.99.0.2", "http", &[two]));
    documents
        .push(virtual_service("server", &json!([{"match": [{"uri": {"prefix": "/own"}}], "route": to("server")}, {"route": to("other")}])));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let bearer = |issuer: &Issuer| format!("authorization: Bearer {}\r\nx-user: root\r\n", issuer.token(&claims(&json!({}))));
    for (n, (headers, status)) in
        [(String::new(), "403"), (bearer(&Issuer::default()), "401"), (bearer(&issuer), "200")].into_iter().enumerate()
    {
        for path in ["/away", "/own"] {
            let id = format!("token-{n}{path}");
            let got = ask(&engine, "node", one, &get(path, &id, &headers)).await;
            assert_eq!(got.status, status, "{path} {headers}: {got:?}");
            let arrived = seen.of(&id);
            assert_eq!(arrived.len(), usize::from(status == "200"), "{path} {headers}");
            for attempt in arrived {
                let of = |name: &str| attempt.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect::<Vec<_>>();
                assert_eq!((of("x-user"), of("authorization")), (vec!["alice"], Vec::new()), "{path}: what is verified, and no token");
            }
        }
    }
}

/// What is verified before a route is what is judged, and no more goes on than who gets it has to verify again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_are_judged_before_a_route_whatever_is_asked_of_tokens_behind_it() {
    let seen = Seen::default();
    let one = scripted::http1("up1", &seen).expect("an upstream");
    let (issuer, other) = (Issuer::default(), Issuer::default());
    let rule = |name: &str, issuer: &Issuer| json!({"issuer": name, "jwks": issuer.jwks(), "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}]});
    let documents = |others: bool, route: Value| {
        let mut policies = vec![
            targeted("RequestAuthentication", "jwt", json!({"jwtRules": [rule(ISSUER, &issuer)]})),
            targeted(
                "AuthorizationPolicy",
                "alice",
                json!({"rules": [{"when": [{"key": "request.headers[x-user]", "values": ["alice"]}]}]}),
            ),
        ];
        if others {
            // Of another service of the same pods, whose issuer is another.
            let mut theirs = targeted("RequestAuthentication", "theirs", json!({"jwtRules": [rule("https://other.example", &other)]}));
            theirs["spec"]["targetRefs"][0]["name"] = "other".into();
            policies.push(theirs);
        }
        let mut all = served(one, &policies);
        if others {
            // Not those of the service itself.
            all.retain(|document| document["kind"] != "EndpointSlice");
        }
        all.extend(service("other", "10.99.0.2", "http", &[one]));
        all.push(virtual_service("server", &json!([route])));
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &documents(false, json!({"route": to("server")}))).await.expect("started");
    let token = format!("authorization: Bearer {}\r\n", issuer.token(&claims(&json!({}))));
    let changing = json!({"headers": {"request": {"set": {"x-a": "1"}}}, "route": to("server")});
    for (n, (others, route)) in [(false, changing), (true, json!({"route": to("other")}))].into_iter().enumerate() {
        engine.apply(&documents(others, route)).await.expect("applied");
        for (m, (headers, status)) in [("x-user: alice\r\n", "403"), (&*token, "200")].into_iter().enumerate() {
            let id = format!("judged-{n}-{m}");
            let got = ask(&engine, "node", one, &get("/x", &id, headers)).await;
            assert_eq!(got.status, status, "{others} {headers}: {got:?}");
            for attempt in seen.of(&id) {
                let of = |name: &str| attempt.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.clone()).collect::<Vec<_>>();
                // Of an issuer there is something else asked of, the claims are that one's to write.
                let user = if others { vec![] } else { vec!["alice".to_owned()] };
                assert_eq!((of("authorization"), of("x-user")), (vec![], user), "{others}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorizer_is_asked_before_a_route_leads_away_and_shown_the_body() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let provider = json!({"name": "h", "envoyExtAuthzHttp": {"service": "authz.default.svc.cluster.local", "port": 80,
        "headersToUpstreamOnAllow": ["x-user", "x-body"], "headersToDownstreamOnAllow": ["set-cookie"],
        "includeRequestBodyInCheck": {"maxRequestBytes": 100, "allowPartialMessage": true}}});
    let custom = targeted("AuthorizationPolicy", "custom", json!({"action": "CUSTOM", "provider": {"name": "h"}, "rules": [{}]}));
    let mut documents = served(one, &[mesh_config(&json!({"extensionProviders": [provider]})), custom]);
    documents.extend(service("other", "10.99.0.2", "http", &[two]));
    documents.extend(service("copy", "10.99.0.4", "http", &[scripted::http1("up3", &seen).expect("an upstream")]));
    documents.extend(service("authz", "10.99.0.3", "http", &[authorizer()]));
    documents.push(virtual_service(
        "server",
        &json!([
            {"match": [{"uri": {"prefix": "/moved"}}], "redirect": {"uri": "/x"}},
            {"route": to("other"), "mirror": {"host": "copy"}, "retries": {"attempts": 1}},
        ]),
    ));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let post = |id: &str, body: &str, more: &str| {
        let length = body.len();
        format!("POST /x HTTP/1.1\r\nhost: svc.example\r\nx-id: {id}\r\ncontent-length: {length}\r\n{more}\r\n{body}")
    };
    let long = format!("pass{}", "x".repeat(3000));
    for (id, body, partial) in [("short", "pass1", "false"), ("long", &*long, "true")] {
        let got = ask(&engine, "node", one, &post(id, body, "")).await;
        assert_eq!((got.status.as_str(), got.header("set-cookie")), ("200", Some("a=1")), "{id}: {got:?}");
        let arrived = || seen.of(id);
        for _ in 0..100 {
            if arrived().iter().filter(|attempt| attempt.body == body.len()).count() == 2 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(arrived().len(), 2, "{id}: with its copy");
        for attempt in arrived() {
            let of = |name: &str| attempt.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str()).unwrap_or_default();
            assert_eq!((of("x-user"), of("x-body")), ("alice", &*format!("{} {partial}", &body[..body.len().min(100)])), "{id}");
            assert_eq!(attempt.body, body.len(), "{id}: whole, at {}", attempt.port);
        }
    }
    let got = ask(&engine, "node", one, &post("moved", "pass", "").replacen("/x", "/moved", 1)).await;
    assert_eq!((got.status.as_str(), got.header("set-cookie")), ("301", Some("a=1")), "{got:?}");
    let got = ask(&engine, "node", one, &post("refused", "no", "")).await;
    assert!((got.status.as_str(), got.header("x-why")) == ("302", Some("none")) && seen.of("refused").is_empty(), "{got:?}");
}

/// A change of the policies ends what they have let go elsewhere: who has no answer yet is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_led_away_ends_when_it_is_denied() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let documents = |principal: Option<&str>| {
        let spec = |principal: &str| json!({"rules": [{"from": [{"source": {"principals": [format!("cluster.local/ns/default/sa/{principal}")]}}]}]});
        let mut all = served(one, &[routes()]);
        all.extend(principal.map(|principal| targeted("AuthorizationPolicy", "who", spec(principal))));
        all.extend(service("other", "10.99.0.2", "http", &[two]));
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &documents(None)).await.expect("started");
    // A policy that changes, and the first there is.
    for before in [Some("client"), None] {
        engine.apply(&documents(before)).await.expect("applied");
        let id = format!("slow-{before:?}");
        let request = format!("GET /free HTTP/1.1\r\nhost: a\r\nx-id: {id}\r\nx-plan: 200/3000\r\n\r\n");
        let asked = ask(&engine, "node", one, &request);
        let change = async {
            wait_until("the request has arrived", Duration::from_secs(2), || !seen.of(&id).is_empty()).await;
            engine.apply(&documents(Some("other"))).await.expect("applied");
            Instant::now()
        };
        let (got, changed) = tokio::join!(asked, change);
        assert_eq!((got.status.as_str(), got.body.as_str()), ("403", "RBAC: access denied"), "{before:?}: {got:?}");
        assert!(changed.elapsed() < Duration::from_secs(2), "after {:?}", changed.elapsed());
    }
}

/// The same of connections that carry no requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_led_away_ends_when_it_is_denied() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let documents = |policies: &[Value]| {
        let route = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "server"},
            "spec": {"hosts": ["server"], "tcp": [{"route": to("other")}]}});
        let mut all = vec![route];
        all.extend(service("server", "10.99.0.1", "tcp", &[one]));
        all.extend(service("other", "10.99.0.2", "tcp", &[two]));
        all.extend(policies.iter().cloned());
        all
    };
    let engine = Engine::start_as(NEAR_CLIENT, &documents(&[])).await.expect("started");
    let mut stream = engine.connect("10.99.0.1:80".parse().expect("an address")).await.expect("connected");
    let request = |id: &str| get("/", id, "").into_bytes();
    assert_eq!(exchange(&mut stream, request("first"), false).await.status, "200");
    let of = |spec: Value| [targeted("AuthorizationPolicy", "who", spec)];
    engine.apply(&documents(&of(json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["81"]}}]}]})))).await.expect("applied");
    assert_eq!(exchange(&mut stream, request("of another port"), false).await.status, "200");
    engine.apply(&documents(&of(json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]})))).await.expect("applied");
    let ended = tokio::time::timeout(Duration::from_secs(2), stream.read(&mut [0; 64])).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
}
