//! What policies make of requests into a pod: `RequestAuthentication` and `AuthorizationPolicy`, and what Istio makes of them for Envoy.

use mesh_tests::engine::security;
use serde_json::{Value, json};

use super::{Case, End, cases::case, tokens};

const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
pub(super) const TYPES: &str = "type.googleapis.com/envoy.extensions.filters.http";

/// Policies, and requests of whom they are asked.
pub struct Group {
    pub policies: Vec<Value>,
    /// What Istio makes of them.
    pub filters: Vec<Value>,
    pub cases: Vec<Case>,
}

/// Requests by their paths, further headers and methods: `METHOD /path|header: value`.
fn requests(group: &str, all: &[&str]) -> Vec<Case> {
    let one = |request: &&str| {
        let (line, headers) = request.split_once('|').unwrap_or((request, ""));
        let (method, path) = line.split_once(' ').unwrap_or(("GET", line));
        named_request(group, request, method, path, headers)
    };
    all.iter().map(one).collect()
}

pub(super) fn named_request(group: &str, name: &str, method: &str, path: &str, headers: &str) -> Case {
    let host = if headers.to_ascii_lowercase().contains("host:") { "" } else { "host: a.example\r\n" };
    let headers = if headers.is_empty() { String::new() } else { format!("{headers}\r\n") };
    case(
        format!("{group}: {}", name.replace("\r\n", " and ")),
        &format!("{method} {path} HTTP/1.1\r\n{host}{headers}\r\n"),
        ANSWER,
        End::Keep,
    )
}

fn rbac(policies: &[(&str, Value, Value)], action: &str) -> Value {
    let of = |(name, permission, principal): &(&str, Value, Value)| {
        (format!("ns[default]-policy[{name}]-rule[0]"), json!({"permissions": [permission], "principals": [principal]}))
    };
    json!({"name": "envoy.filters.http.rbac", "typed_config": {"@type": format!("{TYPES}.rbac.v3.RBAC"),
        "rules": {"action": action, "policies": policies.iter().map(of).collect::<serde_json::Map<_, _>>()}}})
}

fn any() -> Value {
    json!({"any": true})
}

/// One policy with one rule.
fn authorization(name: &'static str, action: &str, rule: Value, permission: Value, principal: Value, all: &[&str]) -> Group {
    Group {
        policies: vec![security("AuthorizationPolicy", "p", &json!({"action": action, "rules": [rule]}))],
        filters: vec![rbac(&[("p", permission, principal)], action)],
        cases: requests(name, all),
    }
}

pub(super) fn path(matcher: Value) -> Value {
    json!({"url_path": {"path": matcher}})
}

pub(super) fn header(name: &str, matcher: Value) -> Value {
    let mut all = json!({"name": name});
    all.as_object_mut().expect("an object").extend(matcher.as_object().expect("an object").clone());
    json!({"header": all})
}

pub(super) fn exactly(value: &str) -> Value {
    json!({"string_match": {"exact": value}})
}

const PATHS: &[&str] = &[
    "/a",
    "/a/",
    "/a?b",
    "/a#b",
    "/A",
    "/a/b",
    "/ab",
    "/b/a",
    "/b/../a",
    "/%61",
    "/a%2fb",
    "/a;x=1",
    "//a",
    "/a//",
    "/a/.",
    "/a%3fb",
    "/",
    "/xa",
    "*",
    "OPTIONS *",
    "http://a.example/a",
    "/a/b/c",
    "/a/b/c/d",
    "/a/%2e%2e/x",
    "/a?/a",
    "/?a=/a",
];

fn of_paths() -> Vec<Group> {
    let to = |paths: Value| json!({"to": [{"operation": {"paths": paths}}]});
    let one =
        |name, action: &str, value: &str, matcher: Value| authorization(name, action, to(json!([value])), path(matcher), any(), PATHS);
    let template = |name, text: &str, envoy: &str| {
        let matcher = json!({"uri_template": {"name": "uri-template", "typed_config":
            {"@type": "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig", "path_template": envoy}}});
        authorization(name, "ALLOW", to(json!([text])), matcher, any(), PATHS)
    };
    vec![
        one("path exact, allowed", "ALLOW", "/a", json!({"exact": "/a"})),
        one("path exact, denied", "DENY", "/a", json!({"exact": "/a"})),
        one("path prefix", "ALLOW", "/a*", json!({"prefix": "/a"})),
        one("path suffix", "DENY", "*/a", json!({"suffix": "/a"})),
        one("path any", "ALLOW", "*", json!({"safe_regex": {"regex": ".+"}})),
        template("path template of one", "/a/{*}", "/a/*"),
        template("path template of many", "/a/{**}", "/a/**"),
        template("path template with more behind", "/a/{*}/c", "/a/*/c"),
        authorization(
            "not path",
            "DENY",
            json!({"to": [{"operation": {"notPaths": ["/a", "/x*"]}}]}),
            json!({"not_rule": {"or_rules": {"rules": [path(json!({"exact": "/a"})), path(json!({"prefix": "/x"}))]}}}),
            any(),
            PATHS,
        ),
    ]
}

fn of_operations() -> Vec<Group> {
    let to = |operation: Value| json!({"to": [{"operation": operation}]});
    let methods: &[&str] = &["/", "POST /", "HEAD /", "OPTIONS /", "FOO /", "DELETE /"];
    let hosts: &[&str] = &[
        "/|host: a.example",
        "/|host: A.EXAMPLE",
        "/|host: a.example:80",
        "/|host: a.example:8080",
        "/|host: b.a.example",
        "/|host: a.example.b",
        "/|host: xa.example",
        "http://a.example/x|host: other",
        "/|host: a.example.",
        "/|host: [::1]",
        "/|host: ",
    ];
    let host = |name, value: &str, regex: &str| {
        let matcher = json!({"string_match": {"safe_regex": {"regex": regex}}});
        authorization(name, "ALLOW", to(json!({"hosts": [value]})), header(":authority", matcher), any(), hosts)
    };
    vec![
        authorization(
            "methods",
            "ALLOW",
            to(json!({"methods": ["GET", "FOO"]})),
            json!({"or_rules": {"rules": [header(":method", exactly("GET")), header(":method", exactly("FOO"))]}}),
            any(),
            methods,
        ),
        authorization(
            "method prefix",
            "DENY",
            to(json!({"methods": ["P*", "*D"]})),
            json!({"or_rules": {"rules": [header(":method", json!({"string_match": {"prefix": "P"}})), header(":method", json!({"string_match": {"suffix": "D"}}))]}}),
            any(),
            methods,
        ),
        host("host exact", "a.example", "(?i)a\\.example"),
        host("host prefix", "a.example*", "(?i)a\\.example.*"),
        host("host suffix", "*a.example", "(?i).*a\\.example"),
    ]
}

const HEADERS: &[&str] = &[
    "/",
    "/|x-a: v",
    "/|x-a: V",
    "/|X-A: v",
    "/|x-a: ",
    "/|x-a:   v  ",
    "/|x-a: v1",
    "/|x-a: 1v",
    "/|x-a: v, w",
    "/|x-a: v\r\nx-a: w",
    "/|x-a: w\r\nx-a: v",
    "/|x-a: v,w",
    "/|x-a: w,v",
    "/|x-ab: v",
];

fn of_conditions() -> Vec<Group> {
    let when = |key: &str, values: Value| {
        let mut condition = json!({"key": key});
        condition.as_object_mut().expect("an object").extend(values.as_object().expect("an object").clone());
        json!({"when": [condition]})
    };
    let one = |name, value: &str, matcher: Value| {
        let rule = when("request.headers[x-a]", json!({"values": [value]}));
        authorization(name, "ALLOW", rule, any(), header("x-a", matcher), HEADERS)
    };
    let not = |name, action: &str, value: &str, matcher: Value| {
        let rule = when("request.headers[x-a]", json!({"notValues": [value]}));
        authorization(name, action, rule, any(), json!({"not_id": header("x-a", matcher)}), HEADERS)
    };
    let ips: &[&str] = &[
        "/",
        "/|x-forwarded-for: 10.0.0.1",
        "/|x-forwarded-for: 127.0.0.1, 10.0.0.1",
        "/|x-forwarded-for: 10.0.0.1, 9.9.9.9",
        "/|x-forwarded-for: nonsense",
    ];
    let cidr = |address: &str, bits: u32| json!({"address_prefix": address, "prefix_len": bits});
    vec![
        one("header exact", "v", exactly("v")),
        one("header prefix", "v*", json!({"string_match": {"prefix": "v"}})),
        one("header suffix", "*v", json!({"string_match": {"suffix": "v"}})),
        one("header present", "*", json!({"present_match": true})),
        not("header not exact", "ALLOW", "v", exactly("v")),
        not("header not exact, denied", "DENY", "v", exactly("v")),
        not("header not present", "ALLOW", "*", json!({"present_match": true})),
        authorization(
            "peer address",
            "ALLOW",
            json!({"from": [{"source": {"ipBlocks": ["127.0.0.0/8"]}}]}),
            any(),
            json!({"direct_remote_ip": cidr("127.0.0.0", 8)}),
            ips,
        ),
        authorization(
            "client address",
            "ALLOW",
            json!({"from": [{"source": {"remoteIpBlocks": ["10.0.0.0/8"]}}]}),
            any(),
            json!({"remote_ip": cidr("10.0.0.0", 8)}),
            ips,
        ),
        authorization(
            "not client address",
            "DENY",
            json!({"from": [{"source": {"notRemoteIpBlocks": ["10.0.0.0/8"]}}]}),
            any(),
            json!({"not_id": {"remote_ip": cidr("10.0.0.0", 8)}}),
            ips,
        ),
    ]
}

pub fn all() -> Vec<Group> {
    [of_paths(), of_operations(), of_conditions(), tokens::all()].into_iter().flatten().collect()
}
