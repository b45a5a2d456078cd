//! What an authorizer over HTTP is asked, and what becomes of its answers: `CUSTOM` policies, and Envoy's `ext_authz` as Istio sets it up.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_tests::{
    engine::{Engine, logging, security, server_pod, service},
    envoy::{Envoy, Listener, lines_of},
    raw::{Answer, Reached, upstream},
};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    Case, Compared, End, Outcome, Way, about, bodies,
    cases::case,
    checks::{self, Says},
    format, named, of_the_answer, run, upstreams,
};

/// A case, and the authorizer's part in it.
pub struct Asked {
    case: Case,
    says: Authorizer,
    /// Of the provider in the mesh configuration, and of Envoy's filter.
    provider: Value,
    filter: Value,
}

/// What an authorizer answers, and in which protocol.
enum Authorizer {
    Http(Answer),
    Grpc(Says),
}

struct Set {
    name: &'static str,
    provider: Value,
    filter: Value,
}

fn patterns(all: &[Value]) -> Value {
    json!({"patterns": all})
}

fn exact(text: &str) -> Value {
    json!({"exact": text, "ignore_case": true})
}

fn sets() -> Vec<Set> {
    let full = json!({"includeRequestHeadersInCheck": ["X-Ext-*", "cookie", "x-exact"], "includeAdditionalHeadersInCheck": {"x-add": "v", "x-told": "https://%REQ(:authority)%%REQ(:path)%", "x-empty": "%REQ(x-absent)%", "x-to": "%PROTOCOL% %REQ(x-other)% 100%% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"},
        "headersToUpstreamOnAllow": ["x-up", "authorization"], "headersToDownstreamOnAllow": ["x-down", "set-cookie"],
        "headersToDownstreamOnDeny": ["x-deny", "set-cookie", "content-type"], "pathPrefix": "/check"});
    let envoy = json!({"allowed_headers": patterns(&[json!({"prefix": "x-ext-", "ignore_case": true}), exact("cookie"), exact("x-exact")]),
        "http_service": {"path_prefix": "/check", "authorization_request": {"headers_to_add": [{"key": "x-add", "value": "v"}, {"key": "x-told", "value": "https://%REQ(:authority)%%REQ(:path)%"}, {"key": "x-empty", "value": "%REQ(x-absent)%"}, {"key": "x-to", "value": "%PROTOCOL% %REQ(x-other)% 100%% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}]},
            "authorization_response": {"allowed_upstream_headers": patterns(&[exact("x-up"), exact("authorization")]),
                "allowed_client_headers_on_success": patterns(&[exact("x-down"), exact("set-cookie")]),
                "allowed_client_headers": patterns(&[exact("x-deny"), exact("set-cookie"), exact("content-type")])}}});
    vec![
        Set { name: "full", provider: full, filter: envoy },
        Set { name: "bare", provider: json!({}), filter: json!({"http_service": {}}) },
        Set { name: "open", provider: json!({"failOpen": true}), filter: json!({"failure_mode_allow": true, "http_service": {}}) },
        Set {
            name: "503",
            provider: json!({"statusOnError": "503"}),
            filter: json!({"status_on_error": {"code": "ServiceUnavailable"}, "http_service": {}}),
        },
    ]
}

const REQUESTS: &[(&str, &str)] = &[
    ("plain", "GET /x?a=b HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    (
        "headers",
        "GET /x HTTP/1.1\r\nhost: A.example:81\r\nx-ext-a: 1\r\nX-EXT-B: 2\r\nx-other: 3\r\nx-exact: 4\r\ncookie: a=b\r\nauthorization: Basic YQ==\r\nx-add: mine\r\nx-up: mine\r\nx-down: mine\r\nuser-agent: me\r\naccept: */*\r\n\r\n",
    ),
    ("body", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"),
    ("chunks", "PUT /x HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("HEAD", "HEAD /x HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    (
        "gRPC",
        "POST /s/m HTTP/1.1\r\nhost: a.example\r\ncontent-type: application/grpc\r\nte: trailers\r\ncontent-length: 5\r\n\r\n\0\0\0\0\0",
    ),
    ("OPTIONS", "OPTIONS /x HTTP/1.1\r\nhost: a.example\r\norigin: http://b\r\naccess-control-request-method: GET\r\n\r\n"),
    ("own method", "FOO /x HTTP/1.1\r\nhost: a.example\r\n\r\n"),
];

const ANSWERS: &[(&str, &str)] = &[
    ("200", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    (
        "200 with headers",
        "HTTP/1.1 200 OK\r\nx-up: one\r\nx-down: d\r\nset-cookie: a=1\r\nset-cookie: b=2\r\nauthorization: Bearer t\r\nx-other: o\r\nserver: s\r\ncontent-length: 2\r\n\r\nok",
    ),
    ("200 with a header twice", "HTTP/1.1 200 OK\r\nx-up: one\r\nx-up: two\r\ncontent-length: 0\r\n\r\n"),
    ("200 with an empty header", "HTTP/1.1 200 OK\r\nx-up: \r\ncontent-length: 0\r\n\r\n"),
    (
        "200 with names to remove",
        "HTTP/1.1 200 OK\r\nx-up: one\r\nx-envoy-auth-headers-to-remove: x-other, X-EXT-A,,:path\r\nx-envoy-auth-headers-to-remove: host,x-up,none\r\ncontent-length: 0\r\n\r\n",
    ),
    ("201", "HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n"),
    ("204", "HTTP/1.1 204 No Content\r\n\r\n"),
    ("302", "HTTP/1.1 302 Found\r\nlocation: /login\r\nset-cookie: s=1\r\ncontent-length: 0\r\n\r\n"),
    ("401", "HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Basic realm=\"x\"\r\nx-deny: d\r\nx-other: o\r\ncontent-length: 3\r\n\r\nno!"),
    (
        "403",
        "HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\nx-deny: d\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-length: 2\r\n\r\n{}",
    ),
    ("403 bare", "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"),
    ("403 in chunks", "HTTP/1.1 403 Forbidden\r\ntransfer-encoding: chunked\r\nx-deny: d\r\n\r\n3\r\nno!\r\n0\r\n\r\n"),
    ("403 and close", "HTTP/1.1 403 Forbidden\r\nconnection: close\r\ndate: x\r\nserver: s\r\ncontent-length: 3\r\n\r\nno!"),
    ("404", "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"),
    ("429", "HTTP/1.1 429 Too Many Requests\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n"),
    ("500", "HTTP/1.1 500 Oh\r\nx-deny: d\r\ncontent-length: 3\r\n\r\nno!"),
    ("503", "HTTP/1.1 503 Oh\r\ncontent-length: 0\r\n\r\n"),
    ("no HTTP", "nonsense\r\n\r\n"),
    ("HTTP/1.0", "HTTP/1.0 200 OK\r\nx-up: one\r\ncontent-length: 0\r\n\r\n"),
    ("HTTP/1.0 403", "HTTP/1.0 403 No\r\ncontent-length: 3\r\n\r\nno!"),
];

fn all() -> Vec<Asked> {
    const OK: &str = "HTTP/1.1 200 OK\r\nx-down: theirs\r\nset-cookie: u=1\r\ncontent-length: 2\r\n\r\nok";
    let mut all = Vec::new();
    for set in sets() {
        let asked = |name: String, request: &str, answer: Answer| Asked {
            case: case(name, request, OK, End::Keep),
            says: Authorizer::Http(answer),
            provider: set.provider.clone(),
            filter: set.filter.clone(),
        };
        let with = |answer: &str, end: End| Answer::always(vec![answer.as_bytes().to_vec()], end);
        for (answered, answer) in ANSWERS {
            let requests = if set.name == "full" { REQUESTS } else { &REQUESTS[..2] };
            for (sent, request) in requests {
                let end = if answered.contains("close") { End::Fin } else { End::Keep };
                all.push(asked(format!("{}: {sent}, {answered}", set.name), request, with(answer, end)));
            }
        }
        let cookies = "GET /x HTTP/1.1\r\nhost: a.example\r\ncookie: a=b\r\ncookie: c=d\r\n\r\n";
        all.push(asked(format!("{}: two cookies", set.name), cookies, with(ANSWERS[0].1, End::Keep)));
        for (name, end) in [("ends", End::Fin), ("resets", End::Reset)] {
            all.push(asked(format!("{}: {name}", set.name), REQUESTS[0].1, Answer::always(Vec::new(), end)));
        }
    }
    all.extend(over_grpc());
    all.extend(with_bodies(OK));
    all
}

/// The same with bodies shown, allowed and denied.
fn with_bodies(ok: &str) -> Vec<Asked> {
    let mut all = Vec::new();
    let over_http = |answer: usize| Authorizer::Http(Answer::always(vec![ANSWERS[answer].1.as_bytes().to_vec()], End::Keep));
    let answers = checks::answers();
    let over_grpc = |name: &str| {
        let (_, says) = answers.iter().find(|(n, _)| *n == name).expect("an answer");
        Authorizer::Grpc(says.clone())
    };
    for (set, provider, filter) in bodies::settings() {
        for (sent, request) in bodies::REQUESTS {
            let authorizers = [
                ("http allows", over_http(0)),
                ("http denies", over_http(9)),
                ("grpc allows", over_grpc("allowed")),
                ("grpc denies", over_grpc("denied")),
            ];
            for (how, says) in authorizers {
                let mut filter = filter.clone();
                match says {
                    Authorizer::Http(_) => filter["http_service"] = json!({}),
                    Authorizer::Grpc(_) => filter["grpc_service"] = json!({"timeout": "2s"}),
                }
                let case = case(format!("body, {set}: {sent}, {how}"), request, ok, End::Keep);
                all.push(Asked { case, says, provider: provider.clone(), filter });
            }
        }
    }
    all
}

/// The same of gRPC: all answers to the first request, and all requests allowed and denied.
fn over_grpc() -> Vec<Asked> {
    const OK: &str = "HTTP/1.1 200 OK\r\nx-theirs-0: t\r\nx-theirs-1: t\r\nx-theirs-2: t\r\nx-theirs-3: t\r\nx-theirs-4: t\r\nx-theirs-5: t\r\ncontent-length: 2\r\n\r\nok";
    let sets = [
        ("grpc", json!({}), json!({})),
        ("grpc open", json!({"failOpen": true}), json!({"failure_mode_allow": true})),
        ("grpc 503", json!({"statusOnError": "503"}), json!({"status_on_error": {"code": "ServiceUnavailable"}})),
    ];
    let mut all = Vec::new();
    for (set, provider, mut filter) in sets {
        filter["grpc_service"] = json!({"timeout": "2s"});
        for (answered, says) in checks::answers() {
            let every = set == "grpc" && ["allowed", "denied with all", "unavailable"].contains(&answered);
            for (sent, request) in if every { checks::REQUESTS } else { &checks::REQUESTS[..1] } {
                all.push(Asked {
                    case: case(format!("{set}: {sent}, {answered}"), request, OK, End::Keep),
                    says: Authorizer::Grpc(says.clone()),
                    provider: provider.clone(),
                    filter: filter.clone(),
                });
            }
        }
    }
    all
}

/// Compares those whose names have `only` in them.
pub async fn compared(only: Option<&str>) -> Vec<Compared> {
    let all = all().into_iter().filter(|a| only.is_none_or(|o| a.case.name.contains(o))).collect::<Vec<_>>();
    let (envoy, mesh) = tokio::join!(of_envoy(&all), of_mesh(&all));
    let names = all.into_iter().map(|a| a.case.name);
    names.zip(envoy.into_iter().zip(mesh)).map(|(name, (envoy, mesh))| Compared { name, envoy, mesh }).collect()
}

/// Authorizers, what reached them, and where they are.
async fn authorizers(all: &[Asked]) -> (Vec<Reached>, Vec<SocketAddr>) {
    let (mut reached, mut addresses) = (Vec::new(), Vec::new());
    for asked in all {
        let seen = Reached::default();
        let address = match &asked.says {
            Authorizer::Http(answer) => upstream(answer.clone(), seen.clone()).await,
            Authorizer::Grpc(says) => checks::authorizer(says.clone(), seen.clone()).await,
        };
        addresses.push(address.expect("an authorizer"));
        reached.push(seen);
    }
    (reached, addresses)
}

/// What an authorizer was asked, beside what reached the upstream.
fn with_questions(outcomes: &mut [Outcome], asked: &[Reached]) {
    for (outcome, asked) in outcomes.iter_mut().zip(asked) {
        // A question is a request of the protected pod's, and the authorizer's pod is told so.
        let told = |word: &&str| !word.starts_with("x-forwarded-client-cert=By=");
        let questions = asked.lock().expect("lock");
        let questions = questions.iter().map(|question| question.split(' ').filter(told).collect::<Vec<_>>().join(" "));
        outcome.upstream.extend(questions.map(|question| format!("authorizer: {question}")));
        of_the_answer(outcome);
    }
}

async fn of_envoy(all: &[Asked]) -> Vec<Outcome> {
    let cases = all.iter().map(|a| a.case.clone()).collect::<Vec<_>>();
    let (reached, addresses) = upstreams(&cases).await;
    let (asked, authorizers) = authorizers(all).await;
    let listener = |((one, upstream), authorizer): ((&Asked, &SocketAddr), &SocketAddr)| {
        let mut config =
            json!({"@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", "transport_api_version": "V3"});
        config.as_object_mut().expect("an object").extend(one.filter.as_object().expect("an object").clone());
        let http2 = matches!(one.says, Authorizer::Grpc(_));
        if http2 {
            config["grpc_service"]["envoy_grpc"] = json!({"cluster_name": "@authorizer", "authority": "authz.default.svc.cluster.local"});
        } else {
            config["http_service"]["server_uri"] =
                json!({"uri": "http://authz.default.svc.cluster.local", "cluster": "@authorizer", "timeout": "2s"});
        }
        let name = format!("{}, authorizer", one.case.name);
        let filters = vec![named(&json!({"name": "envoy.filters.http.ext_authz", "typed_config": config}), "@authorizer", &name)];
        let beside = Some(Box::new(Listener { http2, ..Listener::to(name, *authorizer) }));
        Listener { filters, beside, ..Listener::to(one.case.name.clone(), *upstream) }
    };
    let listeners = all.iter().zip(&addresses).zip(&authorizers).map(listener).collect::<Vec<_>>();
    let envoy = Envoy::start(&listeners, &format()).await.expect("Envoy");
    let at = cases.iter().map(|c| envoy.address(&c.name)).collect::<Vec<_>>();
    let mut outcomes = run(&cases, &reached, at.clone(), None).await.outcomes;
    sleep(Duration::from_millis(500)).await;
    let lines = envoy.logged();
    for (outcome, at) in outcomes.iter_mut().zip(at) {
        outcome.log = about(&lines, at);
    }
    with_questions(&mut outcomes, &asked);
    outcomes
}

async fn of_mesh(all: &[Asked]) -> Vec<Outcome> {
    let cases = all.iter().map(|a| a.case.clone()).collect::<Vec<_>>();
    let (reached, addresses) = upstreams(&cases).await;
    let (asked, authorizers) = authorizers(all).await;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("access.log");
    let mut documents = logging(&path, &format());
    let mut providers = documents[0]["data"]["mesh"]["extensionProviders"].as_array().expect("providers").clone();
    documents.push(server_pod());
    for (i, ((one, authorizer), at)) in all.iter().zip(&authorizers).zip(&addresses).enumerate() {
        let name = format!("authz-{i}");
        let (provider, protocol) = match one.says {
            Authorizer::Http(_) => ("envoyExtAuthzHttp", "http"),
            Authorizer::Grpc(_) => ("envoyExtAuthzGrpc", "grpc"),
        };
        let mut settings = json!({"service": format!("{name}.default.svc.cluster.local"), "port": 80, "timeout": "2s"});
        settings.as_object_mut().expect("an object").extend(one.provider.as_object().expect("an object").clone());
        providers.push(json!({"name": name, provider: settings}));
        documents.extend(service(&name, &super::vip(i).ip().to_string(), protocol, &[*authorizer]));
        let rule = json!({"to": [{"operation": {"ports": [at.port().to_string()]}}]});
        let policy =
            json!({"selector": {"matchLabels": {"app": "server"}}, "action": "CUSTOM", "provider": {"name": name}, "rules": [rule]});
        documents.push(security("AuthorizationPolicy", &name, &policy));
    }
    documents[0]["data"]["mesh"]["extensionProviders"] = Value::Array(providers);
    let engine = Arc::new(Engine::start(&documents).await.expect("engine"));
    let mut outcomes = run(&cases, &reached, addresses.clone(), Some((engine, Way::In))).await.outcomes;
    sleep(Duration::from_millis(500)).await;
    let lines = lines_of(&path);
    for (outcome, at) in outcomes.iter_mut().zip(addresses) {
        outcome.log = about(&lines, at);
    }
    with_questions(&mut outcomes, &asked);
    outcomes
}
