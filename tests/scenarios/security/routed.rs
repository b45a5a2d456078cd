//! Routes that ask about tokens.

use mesh_tests::{
    engine::{Engine, NEAR_CLIENT, security, service, virtual_service},
    scripted::{self, Seen},
    token::{Issuer, now},
};
use serde_json::{Value, json};

use super::{ISSUER, ask, claims, get, served};

/// Routing by claims of a token the destination accepts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_routed_by_verified_claims() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let issuer = Issuer::default();
    let mut documents = served(
        one,
        &[security(
            "RequestAuthentication",
            "jwt",
            &json!({"jwtRules": [{"issuer": ISSUER, "jwks": issuer.jwks(), "forwardOriginalToken": true}]}),
        )],
    );
    documents.extend(service("other", "10.99.0.2", "http", &[two]));
    let to = |host: &str| json!([{"destination": {"host": host}}]);
    documents.push(virtual_service(
        "server",
        &json!([
            {"match": [{"headers": {"@request.auth.claims.groups": {"exact": "beta"}}}], "route": to("other")},
            {"match": [{"headers": {"@request.auth.claims[deep][er]": {"prefix": "y"}}, "withoutHeaders": {"@request.auth.claims.sub": {"exact": "bob"}}}], "route": to("other")},
            {"route": to("server")},
        ]),
    ));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let bearer = |issuer: &Issuer, more: &Value| format!("authorization: Bearer {}\r\n", issuer.token(&claims(more)));
    for (n, (header, expected)) in [
        (String::new(), "up1 200 #1\n"),
        (bearer(&issuer, &json!({"groups": ["alpha", "beta"]})), "up2 200 #1\n"),
        (bearer(&issuer, &json!({"groups": ["alpha"]})), "up1 200 #1\n"),
        (bearer(&issuer, &json!({"deep": {"er": "yes"}})), "up2 200 #1\n"),
        (bearer(&issuer, &json!({"deep": {"er": "yes"}, "sub": "bob"})), "up1 200 #1\n"),
        (bearer(&Issuer::default(), &json!({"groups": ["beta"]})), "Jwt verification fails"),
        (bearer(&issuer, &json!({"groups": ["beta"], "exp": now() - 600})), "Jwt is expired"),
    ]
    .into_iter()
    .enumerate()
    {
        let got = ask(&engine, "node", one, &get("/x", &format!("claims-{n}"), &header)).await;
        assert_eq!(got.body, expected, "{header}");
    }
}

/// Routes are asked when tokens have been verified: what claims are written to is not the client's, and a token that is not taken is
/// refused where no route would take the request either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_routed_by_headers_of_verified_claims() {
    let seen = Seen::default();
    let (one, two) = (scripted::http1("up1", &seen).expect("an upstream"), scripted::http1("up2", &seen).expect("an upstream"));
    let issuer = Issuer::default();
    let rules =
        json!({"jwtRules": [{"issuer": ISSUER, "jwks": issuer.jwks(), "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}]}]});
    let mut documents = served(one, &[security("RequestAuthentication", "jwt", &rules)]);
    documents.extend(service("other", "10.99.0.2", "http", &[two]));
    let to = |host: &str| json!([{"destination": {"host": host}}]);
    documents.push(virtual_service(
        "server",
        &json!([
            {"match": [{"headers": {"x-user": {"exact": "root"}}}], "route": to("other")},
            {"match": [{"headers": {"authorization": {}}}], "route": to("other")},
            {"match": [{"uri": {"prefix": "/claims"}, "headers": {"@request.auth.claims.sub": {"exact": "x"}}}], "route": to("other")},
            {"match": [{"uri": {"prefix": "/x"}}], "route": to("server")},
        ]),
    ));
    let engine = Engine::start_as(NEAR_CLIENT, &documents).await.expect("started");
    let bearer = |issuer: &Issuer, sub: &str| format!("authorization: Bearer {}\r\n", issuer.token(&claims(&json!({"sub": sub}))));
    for (n, (path, header, expected)) in [
        ("/x", "x-user: root\r\n".to_owned(), ("200", "up1 200 #1\n")),
        ("/x", bearer(&issuer, "root"), ("200", "up2 200 #1\n")),
        ("/x", bearer(&issuer, "bob") + "x-user: root\r\n", ("200", "up1 200 #1\n")),
        ("/claims", bearer(&issuer, "x"), ("200", "up2 200 #1\n")),
        ("/claims", bearer(&issuer, "y"), ("404", "")),
        ("/claims", String::new(), ("404", "")),
        ("/claims", bearer(&Issuer::default(), "x"), ("401", "Jwt verification fails")),
        ("/none", bearer(&Issuer::default(), "x"), ("401", "Jwt verification fails")),
    ]
    .into_iter()
    .enumerate()
    {
        let got = ask(&engine, "node", one, &get(path, &format!("known-{n}"), &header)).await;
        assert_eq!((got.status.as_str(), got.body.as_str()), expected, "{n} {path} {header}");
    }
}
