//! What routes do to requests and answers: rules of a `VirtualService`, and what Istio makes of them for Envoy.

use serde_json::{Value, json};

use super::{
    Case, End,
    cases::case,
    resilience::{faults, resilience},
};

pub const ANSWER: &str =
    "HTTP/1.1 200 OK\r\nx-up: 1\r\nx-rm: gone\r\nx-add: up\r\nserver: app\r\nlocation: http://up/\r\ncontent-length: 2\r\n\r\nok";

/// A rule that leads to the upstream.
pub fn rule(more: Value) -> Value {
    let mut rule = json!({"route": [{"destination": {"host": "@host"}}]});
    rule.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    rule
}

/// A route to the upstream with this match, and more in its action and beside it.
pub fn route(matched: Value, action: Value, more: Value) -> Value {
    let mut to = json!({"cluster": "@cluster", "timeout": "0s"});
    to.as_object_mut().expect("an object").extend(action.as_object().expect("an object").clone());
    // As Istio has it.
    to["max_grpc_timeout"] = to["timeout"].clone();
    let mut route = json!({"match": matched, "route": to});
    route.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    route
}

pub fn all_paths() -> Value {
    json!({"prefix": "/"})
}

fn set(name: &str, value: &str) -> Value {
    json!({"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"})
}

fn add(name: &str, value: &str) -> Value {
    json!({"header": {"key": name, "value": value}, "append_action": "APPEND_IF_EXISTS_OR_ADD"})
}

fn redirect(to: Value) -> Value {
    json!({"match": all_paths(), "redirect": to})
}

/// Rules, routes, and requests by their paths and further headers.
pub type Of = (&'static str, Value, Value, &'static [&'static str]);

fn rewrites() -> Vec<Of> {
    let paths: &[&str] = &["/a", "/a/", "/a/b", "/ab", "/a?q=1", "/a/b?q=/a", "/a//b", "/A/b", "/a/../a/b", "/a%2fb"];
    let prefix = |uri: &str, rewritten: &str, name: &'static str| {
        (
            name,
            json!([rule(json!({"match": [{"uri": {"prefix": uri}}], "rewrite": {"uri": rewritten}})), rule(json!({}))]),
            json!([
                route(json!({"prefix": uri}), json!({"prefix_rewrite": rewritten}), json!({})),
                route(all_paths(), json!({}), json!({}))
            ]),
            paths,
        )
    };
    let regex = |pattern: &str, rewritten: &str, name: &'static str| {
        (
            name,
            json!([rule(
                json!({"match": [{"uri": {"prefix": "/"}}], "rewrite": {"uriRegexRewrite": {"match": pattern, "rewrite": rewritten}}})
            )]),
            json!([route(all_paths(), json!({"regex_rewrite": {"pattern": {"regex": pattern}, "substitution": rewritten}}), json!({}))]),
            paths,
        )
    };
    vec![
        prefix("/a", "/", "prefix-to-root"),
        prefix("/a", "/x", "prefix-to-x"),
        prefix("/a/", "/", "prefix-slash-to-root"),
        prefix("/a/", "/x/y", "prefix-slash-to-xy"),
        prefix("/", "/x", "root-to-x"),
        (
            "exact",
            json!([rule(json!({"match": [{"uri": {"exact": "/a"}}], "rewrite": {"uri": "/x?y=1"}})), rule(json!({}))]),
            json!([route(json!({"path": "/a"}), json!({"prefix_rewrite": "/x?y=1"}), json!({})), route(all_paths(), json!({}), json!({}))]),
            paths,
        ),
        (
            "ignoring-case",
            json!([rule(json!({"match": [{"uri": {"prefix": "/a"}, "ignoreUriCase": true}], "rewrite": {"uri": "/x"}})), rule(json!({}))]),
            json!([
                route(json!({"prefix": "/a", "case_sensitive": false}), json!({"prefix_rewrite": "/x"}), json!({})),
                route(all_paths(), json!({}), json!({}))
            ]),
            paths,
        ),
        regex("/a/(.*)", r"/x/\1", "regex-group"),
        regex("^/a", "/x", "regex-anchored"),
        regex("a", "z", "regex-every"),
        regex("(/[^/]*)(/.*)?", r"\2\1", "regex-swapped"),
        regex("/b$", "", "regex-end"),
        (
            "authority",
            json!([rule(json!({"rewrite": {"authority": "other.example:81"}}))]),
            json!([route(all_paths(), json!({"host_rewrite_literal": "other.example:81"}), json!({}))]),
            &["/a", "/a|host: b"],
        ),
    ]
}

fn redirects() -> Vec<Of> {
    let paths: &[&str] = &[
        "/a",
        "/a/b?c=d",
        "/?x",
        "/a|host: b:8080",
        "/a|host: [::1]:8080",
        "/a|x-forwarded-proto: https",
        "/a|host: b:80",
        "/a|host: b:443",
        "/a|host: b:443\r\nx-forwarded-proto: https",
    ];
    let of = |name: &'static str, istio: Value, envoy: Value| (name, json!([{"redirect": istio}]), json!([redirect(envoy)]), paths);
    vec![
        of("uri", json!({"uri": "/new"}), json!({"path_redirect": "/new"})),
        of("uri-with-query", json!({"uri": "/new?y=1"}), json!({"path_redirect": "/new?y=1"})),
        of("authority", json!({"authority": "other.example"}), json!({"host_redirect": "other.example"})),
        of("scheme", json!({"scheme": "https"}), json!({"scheme_redirect": "https"})),
        of("port", json!({"port": 8443}), json!({"port_redirect": 8443})),
        of("default-port", json!({"scheme": "https", "derivePort": "FROM_PROTOCOL_DEFAULT"}), json!({"scheme_redirect": "https"})),
        of("scheme-and-port", json!({"scheme": "https", "port": 8443}), json!({"scheme_redirect": "https", "port_redirect": 8443})),
        (
            "prefix",
            json!([{"match": [{"uri": {"prefix": "/a"}}], "redirect": {"prefixRewrite": "/new"}}, {"redirect": {"prefixRewrite": "/all", "authority": "o.example"}}]),
            json!([
                {"match": {"prefix": "/a"}, "redirect": {"prefix_rewrite": "/new"}},
                redirect(json!({"prefix_rewrite": "/all", "host_redirect": "o.example"}))
            ]),
            paths,
        ),
        of("code-302", json!({"uri": "/n", "redirectCode": 302}), json!({"path_redirect": "/n", "response_code": "FOUND"})),
        of("code-303", json!({"uri": "/n", "redirectCode": 303}), json!({"path_redirect": "/n", "response_code": "SEE_OTHER"})),
        of("code-307", json!({"uri": "/n", "redirectCode": 307}), json!({"path_redirect": "/n", "response_code": "TEMPORARY_REDIRECT"})),
        of("code-308", json!({"uri": "/n", "redirectCode": 308}), json!({"path_redirect": "/n", "response_code": "PERMANENT_REDIRECT"})),
        of(
            "all",
            json!({"uri": "/n", "authority": "o.example", "scheme": "https", "port": 444}),
            json!({"path_redirect": "/n", "host_redirect": "o.example", "scheme_redirect": "https", "port_redirect": 444}),
        ),
    ]
}

fn headers() -> Vec<Of> {
    let paths: &[&str] = &["/a", "/a|x-add: mine\r\nx-set: mine\r\nx-rm: mine", "/a|X-Add: 1\r\nx-add: 2\r\nx-rm: 1\r\nX-RM: 2"];
    let request = json!({"set": {"x-set": "s"}, "add": {"x-add": "a"}, "remove": ["x-rm"]});
    vec![
        (
            "of-requests",
            json!([rule(json!({"headers": {"request": request}}))]),
            json!([route(
                all_paths(),
                json!({}),
                json!({"request_headers_to_add": [add("x-add", "a"), set("x-set", "s")], "request_headers_to_remove": ["x-rm"]})
            )]),
            paths,
        ),
        (
            "of-answers",
            json!([rule(json!({"headers": {"response": request}}))]),
            json!([route(
                all_paths(),
                json!({}),
                json!({"response_headers_to_add": [add("x-add", "a"), set("x-set", "s")], "response_headers_to_remove": ["x-rm"]})
            )]),
            paths,
        ),
        (
            "of-hosts",
            json!([rule(json!({"headers": {"request": {"set": {"Host": "h.example"}}}}))]),
            json!([route(all_paths(), json!({"host_rewrite_literal": "h.example"}), json!({}))]),
            paths,
        ),
        (
            "of-a-direct-response",
            json!([{"directResponse": {"status": 418, "body": {"string": "tea"}}, "headers": {"response": request}}]),
            json!([{"match": all_paths(), "direct_response": {"status": 418, "body": {"inline_string": "tea"}},
                "response_headers_to_add": [add("x-add", "a"), set("x-set", "s")], "response_headers_to_remove": ["x-rm"]}]),
            paths,
        ),
    ]
}

/// Values that tell of the request, each in a header of its own.
fn told() -> Vec<Of> {
    let paths: &[&str] = &["/a?b=c", "/a|x-v: 1\r\nx-v: 2\r\nx-w: w", "/a|x-v:\r\nx-w: lonely"];
    let values = [
        ("x-01", "plain"),
        ("x-02", "%REQ(X-V)%"),
        ("x-03", "<%REQ(x-v)%>"),
        ("x-04", "%REQ(x-none?x-w)%"),
        ("x-05", "%REQ(x-w):3%"),
        ("x-06", "100%%"),
        ("x-07", "%PROTOCOL%"),
        ("x-08", ""),
        ("x-09", "%REQ(:METHOD)% %REQ(:PATH)% %REQ(:AUTHORITY)%"),
        ("x-10", "%RESPONSE_CODE%"),
        ("x-11", "%ROUTE_NAME%"),
        ("x-12", "%START_TIME(%Y)%"),
        ("x-13", "%REQUESTED_SERVER_NAME%"),
        ("x-14", "%REQ(x-none)%"),
        ("x-15", "a%REQ(x-none)%b"),
        ("x-16", "%RESP(x-up)%"),
        ("x-17", "%RESPONSE_FLAGS%"),
        ("x-18", "%RESPONSE_CODE_DETAILS%"),
        ("x-19", "%REQ(x-w)%%REQ(x-w)%"),
        ("x-20", "%UPSTREAM_PROTOCOL%"),
        ("x-21", "%DOWNSTREAM_TLS_VERSION%"),
        ("x-22", "%PATH(NQ)%"),
        ("x-23", "%BYTES_SENT%"),
        ("x-24", "%GRPC_STATUS%"),
        ("x-25", "%PATH(WQ:PATH)% %PATH% %PATH(NQ:ORIG_OR_PATH)%"),
        ("x-v", "%REQ(x-none)%"),
        ("x-up", "%RESP(x-none)%"),
        ("x-w", "%REQ(x-w)%%REQ(x-v)%"),
    ];
    let all = || values.iter().map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect::<serde_json::Map<_, _>>();
    let theirs = |one: fn(&str, &str) -> Value| values.iter().map(|(name, value)| one(name, value)).collect::<Vec<_>>();
    let of = |name: &'static str, istio: Value, mut more: Value| {
        more["name"] = "its-name".into();
        (name, json!([rule(json!({"name": "its-name", "headers": istio}))]), json!([route(all_paths(), json!({}), more)]), paths)
    };
    vec![
        of("set-in-requests", json!({"request": {"set": all()}}), json!({"request_headers_to_add": theirs(set)})),
        of(
            "added-to-requests",
            json!({"request": {"add": all(), "remove": ["x-v"]}}),
            json!({"request_headers_to_add": theirs(add), "request_headers_to_remove": ["x-v"]}),
        ),
        of("set-in-answers", json!({"response": {"set": all()}}), json!({"response_headers_to_add": theirs(set)})),
        of(
            "added-to-answers",
            json!({"response": {"add": all(), "remove": ["x-up"]}, "request": {"set": {"x-w": "changed"}}}),
            json!({"response_headers_to_add": theirs(add), "response_headers_to_remove": ["x-up"], "request_headers_to_add": [set("x-w", "changed")]}),
        ),
        (
            "of-what-was-rewritten",
            json!([rule(json!({"match": [{"uri": {"prefix": "/a"}}], "rewrite": {"uri": "/new"}, "headers": {
                "request": {"set": {"x-was": "%REQ(:PATH)% %PATH%"}},
                "response": {"set": {"x-was": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "x-is": "%REQ(:PATH)%", "x-path": "%PATH(NQ)% %PATH(NQ:ORIG)% %PATH(NQ:PATH)%"}}}}))]),
            json!([route(
                json!({"prefix": "/a"}),
                json!({"prefix_rewrite": "/new"}),
                json!({
                "request_headers_to_add": [set("x-was", "%REQ(:PATH)% %PATH%")],
                "response_headers_to_add": [set("x-was", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"), set("x-is", "%REQ(:PATH)%"),
                    set("x-path", "%PATH(NQ)% %PATH(NQ:ORIG)% %PATH(NQ:PATH)%")]})
            )]),
            paths,
        ),
        (
            "in-a-direct-response",
            json!([{"directResponse": {"status": 200, "body": {"string": "here"}}, "headers": {"response": {"set": all()}}}]),
            json!([{"match": all_paths(), "direct_response": {"status": 200, "body": {"inline_string": "here"}}, "response_headers_to_add": theirs(set)}]),
            paths,
        ),
    ]
}

fn matches() -> Vec<Of> {
    let paths: &[&str] = &[
        "/a",
        "/a/b",
        "/ab",
        "/A",
        "/a?x=1",
        "/a?x=",
        "/a?x",
        "/a?x=12&y",
        "/a?y=1&x=1",
        "/a|x-v: 1",
        "/a|x-v: 12",
        "/a|x-v:",
        "/a|x-v: 2\r\nx-v: 1",
        "/a|host: b.example",
    ];
    let of = |name: &'static str, istio: Value, envoy: Value| {
        let direct = |body: &str| json!({"status": 200, "body": {"string": body}});
        let answer = |body: &str| json!({"status": 200, "body": {"inline_string": body}});
        (
            name,
            json!([{"match": [istio], "directResponse": direct("first")}, {"directResponse": direct("second")}]),
            json!([{"match": envoy, "direct_response": answer("first")}, {"match": all_paths(), "direct_response": answer("second")}]),
            paths,
        )
    };
    let header = |value: Value| json!({"prefix": "/", "headers": [value]});
    let query = |value: Value| json!({"prefix": "/", "query_parameters": [value]});
    vec![
        of("exact", json!({"uri": {"exact": "/a"}}), json!({"path": "/a"})),
        of("prefix", json!({"uri": {"prefix": "/a/"}}), json!({"prefix": "/a/"})),
        of("regex", json!({"uri": {"regex": "/a.?"}}), json!({"safe_regex": {"regex": "/a.?"}})),
        of("header-exact", json!({"headers": {"x-v": {"exact": "1"}}}), header(json!({"name": "x-v", "string_match": {"exact": "1"}}))),
        of("header-prefix", json!({"headers": {"x-v": {"prefix": "1"}}}), header(json!({"name": "x-v", "string_match": {"prefix": "1"}}))),
        of(
            "header-regex",
            json!({"headers": {"x-v": {"regex": "1?"}}}),
            header(json!({"name": "x-v", "string_match": {"safe_regex": {"regex": "1?"}}})),
        ),
        of("header-present", json!({"headers": {"x-v": {}}}), header(json!({"name": "x-v", "present_match": true}))),
        of(
            "header-without",
            json!({"withoutHeaders": {"x-v": {"exact": "1"}}}),
            header(json!({"name": "x-v", "string_match": {"exact": "1"}, "invert_match": true, "treat_missing_header_as_empty": true})),
        ),
        of(
            "header-absent",
            json!({"withoutHeaders": {"x-v": {}}}),
            header(json!({"name": "x-v", "present_match": true, "invert_match": true})),
        ),
        of("query-exact", json!({"queryParams": {"x": {"exact": "1"}}}), query(json!({"name": "x", "string_match": {"exact": "1"}}))),
        of(
            "query-regex",
            json!({"queryParams": {"x": {"regex": "1.*"}}}),
            query(json!({"name": "x", "string_match": {"safe_regex": {"regex": "1.*"}}})),
        ),
        of(
            "authority",
            json!({"authority": {"exact": "b.example"}}),
            header(json!({"name": ":authority", "string_match": {"exact": "b.example"}})),
        ),
        of("method", json!({"method": {"exact": "POST"}}), header(json!({"name": ":method", "string_match": {"exact": "POST"}}))),
        of("scheme", json!({"scheme": {"exact": "http"}}), header(json!({"name": ":scheme", "string_match": {"exact": "http"}}))),
    ]
}

fn cors() -> Vec<Of> {
    let requests: &[&str] = &[
        "/a",
        "/a|origin: http://good.example",
        "/a|origin: http://bad.example",
        "/a|origin: http://x.good.example",
        "/a|Origin: HTTP://good.example",
        "OPTIONS /a|origin: http://good.example",
        "OPTIONS /a|origin: http://good.example\r\naccess-control-request-method: PUT",
        "OPTIONS /a|origin: http://bad.example\r\naccess-control-request-method: PUT",
        "OPTIONS /a|origin: http://good.example\r\naccess-control-request-method: PUT\r\naccess-control-request-headers: x-y",
    ];
    let of = |name: &'static str, istio: Value, mut envoy: Value| {
        envoy["@type"] = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy".into();
        envoy["filter_enabled"] = json!({"default_value": {"numerator": 100}});
        (
            name,
            json!([rule(json!({"corsPolicy": istio}))]),
            json!([route(all_paths(), json!({}), json!({"typed_per_filter_config": {"envoy.filters.http.cors": envoy}}))]),
            requests,
        )
    };
    vec![
        of(
            "exact",
            json!({"allowOrigins": [{"exact": "http://good.example"}], "allowMethods": ["GET", "PUT"], "allowHeaders": ["x-a", "x-b"],
                "exposeHeaders": ["x-e"], "maxAge": "10s", "allowCredentials": true}),
            json!({"allow_origin_string_match": [{"exact": "http://good.example"}], "allow_methods": "GET,PUT", "allow_headers": "x-a,x-b",
                "expose_headers": "x-e", "max_age": "10", "allow_credentials": true, "forward_not_matching_preflights": true}),
        ),
        of(
            "all",
            json!({"allowOrigins": [{"exact": "*"}]}),
            json!({"allow_origin_string_match": [{"exact": "*"}], "forward_not_matching_preflights": true}),
        ),
        of(
            "any-method-and-header",
            json!({"allowOrigins": [{"prefix": "http://"}], "allowMethods": ["*"], "allowHeaders": ["*"], "exposeHeaders": ["*"], "allowCredentials": true}),
            json!({"allow_origin_string_match": [{"prefix": "http://"}], "allow_methods": "*", "allow_headers": "*", "expose_headers": "*",
                "allow_credentials": true, "forward_not_matching_preflights": true}),
        ),
        of(
            "any-of-several",
            json!({"allowOrigins": [{"prefix": "http://"}], "allowMethods": ["GET", "*"], "allowHeaders": ["*", "x-a"]}),
            json!({"allow_origin_string_match": [{"prefix": "http://"}], "allow_methods": "GET,*", "allow_headers": "*,x-a", "forward_not_matching_preflights": true}),
        ),
        of(
            "regex",
            json!({"allowOrigins": [{"regex": r"http://.*good\.example"}], "allowMethods": ["PUT"]}),
            json!({"allow_origin_string_match": [{"safe_regex": {"regex": r"http://.*good\.example"}}], "allow_methods": "PUT", "forward_not_matching_preflights": true}),
        ),
        of(
            "unmatched-preflights-ignored",
            json!({"allowOrigins": [{"prefix": "http://good"}], "unmatchedPreflights": "IGNORE"}),
            json!({"allow_origin_string_match": [{"prefix": "http://good"}], "forward_not_matching_preflights": false}),
        ),
    ]
}

/// Answers that a rule gives, to HTTP and to gRPC.
fn direct() -> Vec<Of> {
    let paths: &[&str] = &["/a?b", "HEAD /a", "/a|content-type: application/grpc", "/a|content-type: application/grpc\r\norigin: http://o"];
    let of = |name: &'static str, status: u16, body: &str| {
        let (istio, envoy) = if body.is_empty() {
            (json!({"status": status}), json!({"status": status}))
        } else {
            (json!({"status": status, "body": {"string": body}}), json!({"status": status, "body": {"inline_string": body}}))
        };
        (name, json!([{"directResponse": istio}]), json!([{"match": all_paths(), "direct_response": envoy}]), paths)
    };
    vec![
        of("200", 200, "fine"),
        of("200-empty", 200, ""),
        of("201", 201, "made"),
        of("302", 302, ""),
        of("304", 304, ""),
        of("403", 403, "no % \u{e9}"),
        of("404", 404, "nah"),
        of("503", 503, "later"),
    ]
}

/// Destinations that do not exist.
fn missing() -> Vec<Of> {
    let paths: &[&str] = &[
        "/a",
        "/a|origin: http://good",
        "/a|content-type: application/grpc",
        "OPTIONS /a|origin: http://good\r\naccess-control-request-method: PUT",
    ];
    let cors =
        json!({"allowOrigins": [{"exact": "http://good"}], "allowMethods": ["PUT"], "exposeHeaders": ["x-e"], "allowCredentials": true});
    let theirs = json!({"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy", "filter_enabled": {"default_value": {"numerator": 100}},
        "allow_origin_string_match": [{"exact": "http://good"}], "allow_methods": "PUT", "expose_headers": "x-e", "allow_credentials": true, "forward_not_matching_preflights": true});
    let added = json!([{"header": {"key": "x-q", "value": "1"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]);
    let istio =
        json!([{"route": [{"destination": {"host": "nowhere"}}], "headers": {"response": {"set": {"x-q": "1"}}}, "corsPolicy": cors}]);
    let envoy = json!([route(
        all_paths(),
        json!({"cluster": "nowhere", "cluster_not_found_response_code": "SERVICE_UNAVAILABLE"}),
        json!({"response_headers_to_add": added, "typed_per_filter_config": {"envoy.filters.http.cors": theirs}})
    )]);
    vec![("cors", istio, envoy, paths)]
}

/// What a rule makes of the count of attempts.
fn attempts() -> Vec<Of> {
    let (name, paths) = ("x-envoy-attempt-count", &["/a"][..]);
    vec![
        (
            "set",
            json!([rule(json!({"headers": {"request": {"set": {name: "7"}}}}))]),
            json!([route(
                all_paths(),
                json!({}),
                json!({"request_headers_to_add": [{"header": {"key": name, "value": "7"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]})
            )]),
            paths,
        ),
        (
            "removed",
            json!([rule(json!({"headers": {"request": {"remove": [name]}}}))]),
            json!([route(all_paths(), json!({}), json!({"request_headers_to_remove": [name]}))]),
            paths,
        ),
    ]
}

pub fn all() -> Vec<Case> {
    let mut all = Vec::new();
    for (name, rules, routes, answer, end) in resilience() {
        let requests = [
            "GET /x HTTP/1.1\r\nhost: a\r\n\r\n",
            "HEAD /x HTTP/1.1\r\nhost: a\r\n\r\n",
            "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello",
            "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n|5\r\nworld\r\n0\r\n\r\n",
            "GET /x HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\n\r\n",
        ];
        for (i, request) in requests.iter().enumerate() {
            let mut case = case(format!("resilience-{name}-{i}"), request, answer, end);
            case.routes = Some((rules.clone(), routes.clone()));
            all.push(case);
        }
    }
    for (group, of) in [
        ("rewrite", rewrites()),
        ("redirect", redirects()),
        ("headers", headers()),
        ("told", told()),
        ("match", matches()),
        ("cors", cors()),
        ("fault", faults()),
        ("direct", direct()),
        ("missing", missing()),
        ("attempts", attempts()),
    ] {
        for (name, rules, routes, requests) in of {
            for (i, request) in requests.iter().enumerate() {
                let (line, more) = request.split_once('|').unwrap_or((request, ""));
                let (method, path) = line.split_once(' ').unwrap_or(("GET", line));
                let host = if more.starts_with("host:") { "" } else { "host: a.example\r\n" };
                let more = if more.is_empty() { String::new() } else { format!("{more}\r\n") };
                let text = format!("{method} {path} HTTP/1.1\r\n{host}{more}\r\n");
                let mut case = case(format!("{group}-{name}-{i}"), &text, ANSWER, End::Keep);
                case.routes = Some((rules.clone(), routes.clone()));
                all.push(case);
            }
        }
    }
    all
}
