//! What `RequestAuthentication` makes of tokens, and `AuthorizationPolicy` of their claims, beside what Envoy does.

use mesh_tests::{
    engine::security,
    token::{self, Issuer, now},
};
use serde_json::{Value, json};

use super::{
    Case,
    policies::{Group, TYPES, named_request, path},
};

/// As Istio sets up one provider of several.
fn provider(issuer: &str, jwks: &str, more: &Value) -> Value {
    let mut all = json!({"issuer": issuer, "local_jwks": {"inline_string": jwks}, "payload_in_metadata": "payload", "forward": false});
    all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    all
}

fn jwt_filter(providers: &[Value]) -> Value {
    let name = |i: usize| format!("origins-{i}");
    let missing = |i: usize| json!({"requires_any": {"requirements": [{"provider_name": name(i)}, {"allow_missing": {}}]}});
    let requirement = if providers.len() == 1 {
        missing(0)
    } else {
        let alone = (0..providers.len()).map(|i| json!({"provider_name": name(i)}));
        let all = json!({"requires_all": {"requirements": (0..providers.len()).map(missing).collect::<Vec<_>>()}});
        json!({"requires_any": {"requirements": alone.chain([all]).collect::<Vec<_>>()}})
    };
    let providers = providers.iter().enumerate().map(|(i, p)| (name(i), p.clone())).collect::<serde_json::Map<_, _>>();
    json!({"name": "envoy.filters.http.jwt_authn", "typed_config": {"@type": format!("{TYPES}.jwt_authn.v3.JwtAuthentication"),
        "providers": providers, "bypass_cors_preflight": true, "rules": [{"match": {"prefix": "/"}, "requires": requirement}]}})
}

/// As Istio has rules of which some are `REQUIRED`: all of them, and of the others that no token is wrong.
fn requiring(providers: &[(bool, Value)]) -> Value {
    let all = providers.iter().map(|(_, provider)| provider.clone()).collect::<Vec<_>>();
    let mut filter = jwt_filter(&all);
    let name = |i: usize| json!({"provider_name": format!("origins-{i}")});
    let each = providers.iter().enumerate().map(|(i, (required, _))| match required {
        true => name(i),
        false => json!({"requires_any": {"requirements": [name(i), {"allow_missing": {}}]}}),
    });
    let requires = match providers.len() {
        1 => name(0),
        _ => json!({"requires_all": {"requirements": each.collect::<Vec<_>>()}}),
    };
    filter["typed_config"]["rules"] = json!([{"match": {"prefix": "/"}, "requires": requires}]);
    filter
}

fn authentication(rules: &[Value]) -> Value {
    security("RequestAuthentication", "r", &json!({"jwtRules": rules}))
}

fn rule(issuer: &str, jwks: &str, more: &Value) -> Value {
    let mut all = json!({"issuer": issuer, "jwks": jwks});
    all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    all
}

/// Claims that are in order.
fn claims(more: &Value) -> Value {
    token::changed(json!({"iss": "iss-a", "sub": "s", "aud": "aud1", "exp": now() + 3600}), more)
}

fn bearer(group: &str, name: &str, token: &str) -> Case {
    named_request(group, name, "GET", "/x", &format!("authorization: Bearer {token}"))
}

/// Tokens with one thing about them.
fn tokens(issuer: &Issuer) -> Vec<(&'static str, String)> {
    let plain = json!({"alg": "RS256", "kid": "rsa1"});
    let with = |more: Value| issuer.token(&claims(&more));
    let header = |header: Value| issuer.sign(&header, &claims(&json!({})));
    let good = with(json!({}));
    let mut parts = good.split('.');
    let (head, payload, signature) =
        (parts.next().expect("a header"), parts.next().expect("a payload"), parts.next().expect("a signature"));
    let at = now();
    vec![
        ("good", good.clone()),
        ("good, EC", issuer.ec_token(&claims(&json!({})))),
        ("expired", with(json!({"exp": at - 120}))),
        ("not yet, by a moment", with(json!({"nbf": at + 30}))),
        ("not yet", with(json!({"nbf": at + 1200}))),
        ("issued in future", with(json!({"iat": at + 1200}))),
        ("no exp", with(json!({"exp": null}))),
        ("exp a fraction", with(json!({"exp": at as f64 + 600.5}))),
        ("exp a text", with(json!({"exp": (at + 600).to_string()}))),
        ("exp negative", with(json!({"exp": -1}))),
        ("exp zero", with(json!({"exp": 0}))),
        ("exp huge", with(json!({"exp": 1e18}))),
        ("nbf a text", with(json!({"nbf": "1"}))),
        ("iat a text", with(json!({"iat": "x"}))),
        ("no iss", with(json!({"iss": null}))),
        ("other iss", with(json!({"iss": "iss-x"}))),
        ("iss a number", with(json!({"iss": 1}))),
        ("iss empty", with(json!({"iss": ""}))),
        ("no sub", with(json!({"sub": null}))),
        ("sub a number", with(json!({"sub": 7}))),
        ("sub empty", with(json!({"sub": ""}))),
        ("no aud", with(json!({"aud": null}))),
        ("other aud", with(json!({"aud": "x"}))),
        ("aud list", with(json!({"aud": ["x", "aud2"]}))),
        ("aud list without", with(json!({"aud": ["x", "y"]}))),
        ("aud empty list", with(json!({"aud": []}))),
        ("aud a number", with(json!({"aud": 5}))),
        ("aud a list of numbers", with(json!({"aud": [5]}))),
        ("aud with slash", with(json!({"aud": "aud1/"}))),
        ("aud with scheme", with(json!({"aud": "https://aud1"}))),
        ("jti a number", with(json!({"jti": 5}))),
        ("no kid", header(json!({"alg": "RS256"}))),
        ("kid a number", header(json!({"alg": "RS256", "kid": 5}))),
        ("kid empty", header(json!({"alg": "RS256", "kid": ""}))),
        ("unknown kid", header(json!({"alg": "RS256", "kid": "x"}))),
        ("kid of another kind", header(json!({"alg": "RS256", "kid": "ec1"}))),
        ("no alg", header(json!({"kid": "rsa1"}))),
        ("alg a number", header(json!({"alg": 1, "kid": "rsa1"}))),
        ("alg none", header(json!({"alg": "none"}))),
        ("alg unknown", header(json!({"alg": "XX256", "kid": "rsa1"}))),
        ("alg HS256", header(json!({"alg": "HS256", "kid": "rsa1"}))),
        ("alg PS256", header(json!({"alg": "PS256", "kid": "rsa1"}))),
        ("alg RS512", header(json!({"alg": "RS512", "kid": "rsa1"}))),
        ("alg lower case", header(json!({"alg": "rs256", "kid": "rsa1"}))),
        ("alg ES256, kid of RSA", header(json!({"alg": "ES256", "kid": "rsa1"}))),
        ("typ of another kind", header(json!({"alg": "RS256", "kid": "rsa1", "typ": "at+jwt"}))),
        ("crit", header(json!({"alg": "RS256", "kid": "rsa1", "crit": ["x"], "x": 1}))),
        ("b64 false", header(json!({"alg": "RS256", "kid": "rsa1", "b64": false, "crit": ["b64"]}))),
        ("header an array", issuer.sign(&json!([1]), &claims(&json!({})))),
        ("payload an array", issuer.sign(&plain, &json!([1]))),
        ("payload a text", issuer.sign(&plain, &json!("x"))),
        ("payload empty", issuer.sign(&plain, &json!({}))),
        ("no signature", format!("{head}.{payload}.")),
        ("two parts", format!("{head}.{payload}")),
        ("four parts", format!("{good}.x")),
        ("no payload", format!("{head}..{signature}")),
        ("no header", format!(".{payload}.{signature}")),
        ("points", "..".into()),
        ("signature of another", format!("{head}.{payload}.{}", "A".repeat(342))),
        ("signature short", format!("{head}.{payload}.AAAA")),
        ("signature no base64", format!("{head}.{payload}.A")),
        ("signature padded", format!("{good}=")),
        ("signature with plus", format!("{head}.{payload}.++++")),
        ("payload no base64", format!("{head}.A.{signature}")),
        ("payload padded", format!("{head}.{payload}==.{signature}")),
        ("payload no JSON", format!("{head}.bm9wZQ.{signature}")),
        ("header no base64", format!("A.{payload}.{signature}")),
        ("header no JSON", format!("bm9wZQ.{payload}.{signature}")),
        ("payload of another", format!("{head}.{}.{signature}", with(json!({"sub": "t"})).split('.').nth(1).expect("a payload"))),
        ("nonsense", "abc".into()),
        ("nothing", String::new()),
        ("long", with(json!({"x": "y".repeat(20_000)}))),
        ("deep", with(json!({"x": (0..60).fold(json!(1), |inner, _| json!([inner]))}))),
        ("claim twice", {
            use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
            format!("{head}.{}.{signature}", URL_SAFE_NO_PAD.encode(r#"{"iss":"iss-x","iss":"iss-a"}"#))
        }),
    ]
}

/// Where a token may be, and how it may stand there.
fn places(group: &str, good: &str, bad: &str) -> Vec<Case> {
    let of = |name: &str, path: &str, headers: String| named_request(group, name, "GET", path, &headers);
    vec![
        of("none", "/x", String::new()),
        of("scheme in lower case", "/x", format!("authorization: bearer {good}")),
        of("scheme in upper case", "/x", format!("authorization: BEARER {good}")),
        of("two blanks", "/x", format!("authorization: Bearer  {good}")),
        of("no blank", "/x", format!("authorization: Bearer{good}")),
        of("tab", "/x", format!("authorization: Bearer\t{good}")),
        of("comma behind", "/x", format!("authorization: Bearer {good},x")),
        of("words behind", "/x", format!("authorization: Bearer {good} x")),
        of("words before", "/x", format!("authorization: x Bearer {good}")),
        of("basic before", "/x", format!("authorization: Basic YQ==, Bearer {good}")),
        of("quoted", "/x", format!("authorization: Bearer \"{good}\"")),
        of("scheme alone", "/x", "authorization: Bearer".into()),
        of("scheme and blank", "/x", "authorization: Bearer ".into()),
        of("basic", "/x", "authorization: Basic YQ==".into()),
        of("empty", "/x", "authorization: ".into()),
        of("two headers, good first", "/x", format!("authorization: Bearer {good}\r\nauthorization: Bearer {bad}")),
        of("two headers, bad first", "/x", format!("authorization: Bearer {bad}\r\nauthorization: Bearer {good}")),
        of("two headers, basic first", "/x", format!("authorization: Basic YQ==\r\nauthorization: Bearer {good}")),
        of("parameter", &format!("/x?access_token={good}"), String::new()),
        of("parameter behind another", &format!("/x?a=b&access_token={good}&c"), String::new()),
        of("parameter, bad", &format!("/x?access_token={bad}"), String::new()),
        of("parameter, empty", "/x?access_token=", String::new()),
        of("parameter without value", "/x?access_token", String::new()),
        of("parameter twice", &format!("/x?access_token={bad}&access_token={good}"), String::new()),
        of("parameter of another case", &format!("/x?Access_Token={bad}"), String::new()),
        of("parameter with escapes", &format!("/x?access_token={}", bad.replace('.', "%2E")), String::new()),
        of("parameter and header", &format!("/x?access_token={bad}"), format!("authorization: Bearer {good}")),
        of("header and parameter, bad header", &format!("/x?access_token={good}"), format!("authorization: Bearer {bad}")),
        of("header of proxies", "/x", format!("proxy-authorization: Bearer {bad}")),
        named_request(group, "HEAD, bad", "HEAD", "/x", &format!("authorization: Bearer {bad}")),
        named_request(
            group,
            "preflight, bad",
            "OPTIONS",
            "/x",
            &format!("origin: http://b\r\naccess-control-request-method: GET\r\nauthorization: Bearer {bad}"),
        ),
        named_request(group, "OPTIONS, bad", "OPTIONS", "/x", &format!("origin: http://b\r\nauthorization: Bearer {bad}")),
        of("gRPC, bad", "/x", format!("content-type: application/grpc\r\nauthorization: Bearer {bad}")),
        of("long path, bad", &format!("/{}?q=1", "p".repeat(300)), format!("authorization: Bearer {bad}")),
        of("other host, bad", "/a/../b", format!("host: B.example:81\r\nx-forwarded-proto: https\r\nauthorization: Bearer {bad}")),
    ]
}

pub fn all() -> Vec<Group> {
    let issuer = Issuer::default();
    let (jwks, audiences) = (issuer.jwks(), json!({"audiences": ["aud1", "aud2"]}));
    let good =
        issuer.token(&claims(&json!({"scope": "a b", "n": 5, "f": 1.5, "b": true, "list": ["p", "q"], "nested": {"a": "x", "l": ["y"]}})));
    let bad = issuer.token(&claims(&json!({"exp": 1})));
    let mut one = Group {
        policies: vec![authentication(&[rule("iss-a", &jwks, &audiences)])],
        filters: vec![jwt_filter(&[provider("iss-a", &jwks, &audiences)])],
        cases: tokens(&issuer).iter().map(|(name, token)| bearer("token", name, token)).collect(),
    };
    one.cases.extend(places("token", &good, &bad));
    let forwarded = json!({"forwardOriginalToken": true, "outputPayloadToHeader": "x-payload",
        "outputClaimToHeaders": [{"header": "x-sub", "claim": "sub"}, {"header": "x-n", "claim": "n"}, {"header": "x-f", "claim": "f"},
            {"header": "x-b", "claim": "b"}, {"header": "x-list", "claim": "list"}, {"header": "x-na", "claim": "nested.a"},
            {"header": "x-none", "claim": "none"}, {"header": "x-scope", "claim": "scope"}]});
    let to_headers = json!({"forward": true, "forward_payload_header": "x-payload",
        "claim_to_headers": [{"header_name": "x-sub", "claim_name": "sub"}, {"header_name": "x-n", "claim_name": "n"}, {"header_name": "x-f", "claim_name": "f"},
            {"header_name": "x-b", "claim_name": "b"}, {"header_name": "x-list", "claim_name": "list"}, {"header_name": "x-na", "claim_name": "nested.a"},
            {"header_name": "x-none", "claim_name": "none"}, {"header_name": "x-scope", "claim_name": "scope"}]});
    let spoofed = "\r\nx-payload: mine\r\nx-sub: mine\r\nx-none: mine";
    let told = Group {
        policies: vec![authentication(&[rule("iss-a", &jwks, &forwarded)])],
        filters: vec![jwt_filter(&[provider("iss-a", &jwks, &to_headers)])],
        cases: vec![
            bearer("token told", "good", &good),
            named_request("token told", "spoofed", "GET", "/x", &format!("authorization: Bearer {good}{spoofed}")),
            named_request("token told", "spoofed without", "GET", "/x", spoofed.trim()),
            named_request("token told", "parameter", "GET", &format!("/x?a=1&access_token={good}&b=2"), ""),
        ],
    };
    let required = [(false, false), (false, true), (true, false), (true, true)].map(|(both, apart)| required(&issuer, both, apart));
    let all = [one, told, of_places(&issuer, &good, &bad), of_two(&issuer), of_claims(&issuer)];
    all.into_iter().chain(required).collect()
}

fn of_places(issuer: &Issuer, good: &str, bad: &str) -> Group {
    const NAME: &str = "token elsewhere";
    let jwks = issuer.jwks();
    let istio = json!({"fromHeaders": [{"name": "x-jwt"}, {"name": "authorization", "prefix": "Token "}], "fromParams": ["tkn"], "fromCookies": ["sess"]});
    let envoy = json!({"from_headers": [{"name": "x-jwt"}, {"name": "authorization", "value_prefix": "Token "}], "from_params": ["tkn"], "from_cookies": ["sess"]});
    let of = |name: &str, path: &str, headers: String| named_request(NAME, name, "GET", path, &headers);
    Group {
        policies: vec![authentication(&[rule("iss-a", &jwks, &istio)])],
        filters: vec![jwt_filter(&[provider("iss-a", &jwks, &envoy)])],
        cases: vec![
            of("header", "/x", format!("x-jwt: {good}")),
            of("header, bad", "/x", format!("x-jwt: {bad}")),
            of("header with blanks", "/x", format!("x-jwt:   {good}  ")),
            of("header, empty", "/x", "x-jwt: ".into()),
            of("header, two in one", "/x", format!("x-jwt: {good}, {good}")),
            of("header quoted", "/x", format!("x-jwt: \"{good}\"")),
            of("prefix, empty", "/x", "authorization: Token x".into()),
            of("cookie, empty", "/x", "cookie: sess=; a=b".into()),
            of("parameter, empty", "/x?tkn=&a=b", String::new()),
            of("parameter with an escaped name", &format!("/x?t%6bn={good}&a=b"), String::new()),
            of("header twice", "/x", format!("x-jwt: {good}\r\nx-jwt: {bad}")),
            of("prefix", "/x", format!("authorization: Token {good}")),
            of("prefix, bad", "/x", format!("authorization: Token {bad}")),
            of("bearer, bad", "/x", format!("authorization: Bearer {bad}")),
            of("parameter", &format!("/x?tkn={good}"), String::new()),
            of("parameter between", &format!("/x?a=1&tkn={good}&b=2"), String::new()),
            of("parameter, bad", &format!("/x?tkn={bad}"), String::new()),
            of("usual parameter, bad", &format!("/x?access_token={bad}"), String::new()),
            of("cookie", "/x", format!("cookie: sess={good}")),
            of("cookie between", "/x", format!("cookie: a=b; sess={good}; c=d")),
            of("cookie quoted", "/x", format!("cookie: sess=\"{good}\"")),
            of("cookie, bad", "/x", format!("cookie: sess={bad}")),
            of("cookies in two headers", "/x", format!("cookie: a=b\r\ncookie: sess={bad}")),
            of("header good, cookie bad", "/x", format!("x-jwt: {good}\r\ncookie: sess={bad}")),
            of("header bad, cookie good", "/x", format!("x-jwt: {bad}\r\ncookie: sess={good}")),
            of("all good", &format!("/x?tkn={good}"), format!("x-jwt: {good}\r\nauthorization: Token {good}\r\ncookie: sess={good}; a=b")),
        ],
    }
}

/// Two issuers, whose tokens are in the same place.
fn of_two(issuer: &Issuer) -> Group {
    const NAME: &str = "two issuers";
    let (other, jwks) = (Issuer::default(), issuer.jwks());
    let of = |who: &Issuer, more: Value| who.token(&claims(&more));
    let tokens = [
        ("first", of(issuer, json!({}))),
        ("second", of(&other, json!({"iss": "iss-b"}))),
        ("first, expired", of(issuer, json!({"exp": 1}))),
        ("second, expired", of(&other, json!({"iss": "iss-b", "exp": 1}))),
        ("first by the other's key", of(&other, json!({}))),
        ("third", of(issuer, json!({"iss": "iss-c"}))),
        ("second, other aud", of(&other, json!({"iss": "iss-b", "aud": "x"}))),
        ("nonsense", "abc".into()),
    ];
    let (none, audiences) = (json!({}), json!({"audiences": ["aud1"]}));
    let mut cases = tokens.iter().map(|(name, token)| bearer(NAME, name, token)).collect::<Vec<_>>();
    cases.push(named_request(NAME, "none", "GET", "/x", ""));
    cases.push(named_request(
        NAME,
        "both",
        "GET",
        &format!("/x?access_token={}", tokens[1].1),
        &format!("authorization: Bearer {}", tokens[0].1),
    ));
    cases.push(named_request(
        NAME,
        "good and bad",
        "GET",
        &format!("/x?access_token={}", tokens[3].1),
        &format!("authorization: Bearer {}", tokens[0].1),
    ));
    Group {
        policies: vec![authentication(&[rule("iss-a", &jwks, &none), rule("iss-b", &other.jwks(), &audiences)])],
        filters: vec![jwt_filter(&[provider("iss-a", &jwks, &none), provider("iss-b", &other.jwks(), &audiences)])],
        cases,
    }
}

/// Rules whose tokens have to be there, and what is told of several tokens: each rule's headers, and to policies the claims of one.
fn required(issuer: &Issuer, both: bool, apart: bool) -> Group {
    let name = format!("required, {}, {}", if both { "both" } else { "one" }, if apart { "apart" } else { "together" });
    let (other, jwks) = (Issuer::default(), issuer.jwks());
    let of = |who: &Issuer, more: Value| who.token(&claims(&more));
    let (first, second) = (of(issuer, json!({"sub": "one"})), of(&other, json!({"iss": "iss-b", "sub": "two"})));
    let (old, new) = (of(issuer, json!({"exp": 1})), of(issuer, json!({"sub": "new"})));
    let at = if apart { "x-two: " } else { "authorization: Bearer " };
    let mut cases = Vec::new();
    let mut ask = |what: &str, target: &str, headers: String| cases.push(named_request(&name, what, "GET", target, &headers));
    for target in ["/x", "/two", "/one"] {
        ask(&format!("{target}, none"), target, String::new());
        ask(&format!("{target}, first"), target, format!("authorization: Bearer {first}"));
        ask(&format!("{target}, second"), target, format!("{at}{second}"));
        ask(&format!("{target}, both"), target, format!("authorization: Bearer {first}\r\n{at}{second}"));
        ask(&format!("{target}, first old"), target, format!("authorization: Bearer {old}\r\n{at}{second}"));
        ask(&format!("{target}, second nonsense"), target, format!("authorization: Bearer {first}\r\n{at}abc"));
        ask(
            &format!("{target}, a third's"),
            target,
            format!("authorization: Bearer {first}\r\n{at}{}", of(issuer, json!({"iss": "iss-c"}))),
        );
        if apart {
            let twice = format!("authorization: Bearer {first}\r\nx-one: {new}");
            ask(&format!("{target}, first twice"), target, twice.clone());
            ask(&format!("{target}, first twice, and second"), target, format!("{twice}\r\n{at}{second}"));
        }
    }
    let presence = |required: bool| if required { "REQUIRED" } else { "OPTIONAL" };
    let mut istio = [("x-sub-one", true), ("x-sub-two", both)]
        .map(|(header, required)| json!({"outputClaimToHeaders": [{"header": header, "claim": "sub"}], "presence": presence(required)}));
    let mut envoy = ["x-sub-one", "x-sub-two"].map(|header| json!({"claim_to_headers": [{"header_name": header, "claim_name": "sub"}]}));
    if apart {
        istio[0]["fromHeaders"] = json!([{"name": "x-one"}, {"name": "authorization", "prefix": "Bearer "}]);
        istio[1]["fromHeaders"] = json!([{"name": "x-two"}]);
        envoy[0]["from_headers"] = json!([{"name": "x-one"}, {"name": "authorization", "value_prefix": "Bearer "}]);
        envoy[1]["from_headers"] = json!([{"name": "x-two"}]);
    }
    let providers = [(true, provider("iss-a", &jwks, &envoy[0])), (both, provider("iss-b", &other.jwks(), &envoy[1]))];
    let (policy, filter) = denied_subjects();
    Group {
        policies: vec![authentication(&[rule("iss-a", &jwks, &istio[0]), rule("iss-b", &other.jwks(), &istio[1])]), policy],
        filters: vec![requiring(&providers), filter],
        cases,
    }
}

/// `/one` and `/two` are not for those subjects.
fn denied_subjects() -> (Value, Value) {
    let rules = ["one", "two"].map(|sub| {
        let condition = json!({"key": "request.auth.claims[sub]", "values": [sub]});
        json!({"to": [{"operation": {"paths": [format!("/{sub}")]}}], "when": [condition]})
    });
    let named = ["one", "two"].iter().enumerate().map(|(i, sub)| {
        let permissions = [path(json!({"exact": format!("/{sub}")}))];
        let principals = [claim(&["sub"], &json!({"exact": sub}))];
        (format!("ns[default]-policy[p]-rule[{i}]"), json!({"permissions": permissions, "principals": principals}))
    });
    let filter = json!({"name": "envoy.filters.http.rbac", "typed_config": {"@type": format!("{TYPES}.rbac.v3.RBAC"),
        "rules": {"action": "DENY", "policies": named.collect::<serde_json::Map<_, _>>()}}});
    (security("AuthorizationPolicy", "p", &json!({"action": "DENY", "rules": rules})), filter)
}

fn metadata(keys: &[&str], value: Value) -> Value {
    let path = ["payload"].iter().chain(keys).map(|key| json!({"key": key})).collect::<Vec<_>>();
    json!({"metadata": {"filter": "envoy.filters.http.jwt_authn", "path": path, "value": value}})
}

/// As Istio matches a claim: a text, or one of a list.
fn claim(keys: &[&str], matcher: &Value) -> Value {
    let alone = json!({"string_match": matcher});
    metadata(keys, json!({"or_match": {"value_matchers": [alone, {"list_match": {"one_of": alone}}]}}))
}

/// Conditions about claims, told apart by the path they are for.
fn of_claims(issuer: &Issuer) -> Group {
    const NAME: &str = "claims";
    let (jwks, none) = (issuer.jwks(), json!({}));
    let exact = |text: &str| json!({"exact": text});
    let conditions: Vec<(&str, Value, Value)> = vec![
        ("sub", json!({"key": "request.auth.claims[sub]", "values": ["s"]}), claim(&["sub"], &exact("s"))),
        ("list", json!({"key": "request.auth.claims[groups]", "values": ["g1"]}), claim(&["groups"], &exact("g1"))),
        ("prefix", json!({"key": "request.auth.claims[groups]", "values": ["g*"]}), claim(&["groups"], &json!({"prefix": "g"}))),
        (
            "present",
            json!({"key": "request.auth.claims[groups]", "values": ["*"]}),
            claim(&["groups"], &json!({"safe_regex": {"regex": ".+"}})),
        ),
        ("nested", json!({"key": "request.auth.claims[n][a]", "values": ["x"]}), claim(&["n", "a"], &exact("x"))),
        ("not", json!({"key": "request.auth.claims[groups]", "notValues": ["g1"]}), json!({"not_id": claim(&["groups"], &exact("g1"))})),
        ("audience", json!({"key": "request.auth.audiences", "values": ["aud1"]}), claim(&["aud"], &exact("aud1"))),
        ("presenter", json!({"key": "request.auth.presenter", "values": ["z"]}), claim(&["azp"], &exact("z"))),
    ];
    let rules =
        conditions.iter().map(|(path, condition, _)| json!({"to": [{"operation": {"paths": [format!("/{path}")]}}], "when": [condition]}));
    let named = conditions.iter().enumerate().map(|(i, (at, _, principal))| {
        (
            format!("ns[default]-policy[p]-rule[{i}]"),
            json!({"permissions": [path(json!({"exact": format!("/{at}")}))], "principals": [principal]}),
        )
    });
    let envoy = json!({"name": "envoy.filters.http.rbac", "typed_config": {"@type": format!("{TYPES}.rbac.v3.RBAC"),
        "rules": {"action": "ALLOW", "policies": named.collect::<serde_json::Map<_, _>>()}}});
    let tokens: [(&str, Value); 16] = [
        ("as it is", json!({})),
        ("other sub", json!({"sub": "t"})),
        ("sub a list", json!({"sub": ["s"]})),
        ("groups a list", json!({"groups": ["g0", "g1"]})),
        ("groups a text", json!({"groups": "g1"})),
        ("groups of words", json!({"groups": "g0 g1"})),
        ("groups empty", json!({"groups": []})),
        ("groups empty text", json!({"groups": ""})),
        ("groups numbers", json!({"groups": [1, "g1"]})),
        ("groups a map", json!({"groups": {"g1": "g1"}})),
        ("groups true", json!({"groups": true})),
        ("nested", json!({"n": {"a": "x"}})),
        ("nested list", json!({"n": {"a": ["x", "y"]}})),
        ("not nested", json!({"n": "x"})),
        ("aud list", json!({"aud": ["x", "aud1"], "azp": "z"})),
        ("other aud", json!({"aud": "x", "azp": ["z"]})),
    ];
    let mut cases = Vec::new();
    for (at, ..) in &conditions {
        cases.push(named_request(NAME, &format!("{at}, no token"), "GET", &format!("/{at}"), ""));
        for (name, more) in &tokens {
            let token = issuer.token(&claims(more));
            cases.push(named_request(NAME, &format!("{at}, {name}"), "GET", &format!("/{at}"), &format!("authorization: Bearer {token}")));
        }
    }
    // Neither who is let in nor who is not has the token logged.
    let token = issuer.token(&claims(&json!({})));
    for at in ["sub", "list"] {
        cases.push(named_request(NAME, &format!("{at}, parameter"), "GET", &format!("/{at}?a=b&access_token={token}"), ""));
    }
    let policy = json!({"action": "ALLOW", "rules": rules.collect::<Vec<_>>()});
    Group {
        policies: vec![authentication(&[rule("iss-a", &jwks, &none)]), security("AuthorizationPolicy", "p", &policy)],
        filters: vec![jwt_filter(&[provider("iss-a", &jwks, &none)]), envoy],
        cases,
    }
}
