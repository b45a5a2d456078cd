//! Virtual services as written, good and bad.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    resource::{self, Object, Parsed, VirtualService},
    route::{
        matching::{PathMatch, TextMatch},
        rule::{Abort, Action, PathRewrite, RedirectPort, Rule, Share},
    },
};

fn read(spec: &Value) -> Result<VirtualService, String> {
    let document = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "v"}, "spec": spec});
    match resource::parse(&document, "default") {
        Ok(Parsed::Object(named)) => match named.object {
            Object::VirtualService(v) => Ok(*v),
            other => panic!("{other:?}"),
        },
        Ok(other) => panic!("{other:?}"),
        Err(rejection) => Err(rejection.to_string()),
    }
}

fn rule(http: &Value) -> Result<Rule, String> {
    read(&json!({"hosts": ["a"], "http": [http]})).map(|mut v| v.http.remove(0))
}

fn with(more: &Value) -> Value {
    let mut http = json!({"route": [{"destination": {"host": "a"}}]});
    http.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
    http
}

#[test]
fn everything_a_route_can_say_is_read() {
    let rule = rule(&json!({
        "name": "r",
        "match": [{
            "uri": {"prefix": "/A"}, "ignoreUriCase": true, "method": {"exact": "GET"}, "scheme": {"exact": "http"},
            "authority": {"regex": "a.*"}, "headers": {"X-User": {"exact": "j"}, "x-any": {}, "x-star": {"regex": "*"}},
            "withoutHeaders": {"x-no": null}, "queryParams": {"q": {"prefix": "1"}}, "port": 80, "sourceLabels": {"app": "x"},
            "sourceNamespace": "ns", "gateways": ["mesh"], "name": "m", "statPrefix": "s",
        }],
        "route": [
            {"destination": {"host": "a", "subset": "v1", "port": {"number": 81}}, "weight": 90,
             "headers": {"request": {"set": {"x": "1", "Host": "h"}}, "response": {"remove": ["y"]}}},
            {"destination": {"host": "b"}, "weight": 0}, {"destination": {"host": "c"}, "weight": 10},
        ],
        "rewrite": {"uriRegexRewrite": {"match": "/a/(.*)", "rewrite": "/\\1"}, "authority": "new"},
        "timeout": "3s",
        "retries": {"attempts": 3, "perTryTimeout": "1s", "retryOn": "5xx,503", "retryRemoteLocalities": true,
                    "retryIgnorePreviousHosts": false, "backoff": "50ms"},
        "fault": {"delay": {"percentage": {"value": 10}, "fixedDelay": "5s"}, "abort": {"grpcStatus": "UNAVAILABLE", "percentage": {"value": 0.5}}},
        "mirror": {"host": "m"}, "mirrors": [{"destination": {"host": "n"}, "percentage": {"value": 25}}],
        "mirrorPercentage": {"value": 50},
        "corsPolicy": {"allowOrigins": [{"exact": "*"}], "allowMethods": ["GET", "PUT"], "maxAge": "90s", "allowCredentials": true,
                       "unmatchedPreflights": "IGNORE"},
        "headers": {"request": {"add": {"x-a": "1"}, "remove": ["x-b"]}},
    }))
    .expect("valid");
    let m = &rule.matches[0];
    assert_eq!(m.path, Some(PathMatch::Prefix { path: "/A".into(), ignore_case: true }));
    assert_eq!(m.headers.iter().filter(|h| h.value == TextMatch::Present).count(), 3);
    assert_eq!(m.headers.iter().filter(|h| h.inverted).count(), 1);
    let Action::Forward(to) = &rule.action else { panic!("{:?}", rule.action) };
    assert_eq!(to.iter().map(|d| (&*d.destination.host, d.weight)).collect::<Vec<_>>(), [("a", 90), ("c", 10)], "weight 0 is nothing");
    assert_eq!(
        (to[0].destination.port, &*to[0].destination.subset, to[0].authority.as_ref().expect("host")),
        (Some(81), "v1", &"h".parse().expect("valid"))
    );
    assert_eq!(rule.timeout, Some(Duration::from_secs(3)));
    let retries = rule.retries.as_ref().expect("retries");
    assert!(retries.attempts == 3 && retries.codes.contains(&503) && !retries.ignore_previous_hosts && retries.remote_localities);
    assert_eq!((retries.per_try_timeout, retries.base_backoff), (Some(Duration::from_secs(1)), Duration::from_millis(50)));
    assert_eq!(rule.fault.delay, Some((Duration::from_secs(5), Share::percent(10.0).expect("valid"))));
    assert_eq!(rule.fault.abort, Some((Abort::Grpc(14), Share::percent(0.5).expect("valid"))));
    let shares = rule.mirrors.iter().map(|m| m.share).collect::<Vec<_>>();
    assert_eq!(shares, [Share::percent(50.0).expect("valid"), Share::percent(25.0).expect("valid")]);
    let cors = rule.cors.as_ref().expect("cors");
    assert!(cors.allows(b"http://x") && !cors.forward_unmatched && cors.max_age.as_ref().expect("age") == "90");
}

#[test]
fn defaults_are_istios() {
    let plain = rule(&with(&json!({}))).expect("valid");
    assert!(plain.timeout.is_none() && plain.retries.is_none() && plain.matches.is_empty());
    let Action::Forward(to) = &plain.action else { panic!("no route") };
    assert_eq!(to[0].weight, 1, "a single destination takes everything");
    let fault = rule(&with(&json!({"fault": {"abort": {"httpStatus": 500}}}))).expect("valid").fault;
    assert_eq!(fault.abort, Some((Abort::Http(StatusCode::INTERNAL_SERVER_ERROR), Share::default())), "no percentage is none");
    let old = rule(&with(&json!({"fault": {"delay": {"percent": 100, "fixedDelay": "1s"}}}))).expect("valid").fault;
    assert_eq!(old.delay.expect("delay").1, Share::ALL);
    let mirrored = |more: Value| rule(&with(&more)).expect("valid").mirrors[0].share;
    assert_eq!(mirrored(json!({"mirror": {"host": "m"}})), Share::ALL);
    assert_eq!(mirrored(json!({"mirror": {"host": "m"}, "mirrorPercentage": {"value": 0}})), Share::default());
    let half = mirrored(json!({"mirror": {"host": "m"}, "mirrorPercentage": {"value": 50}}));
    assert_eq!(mirrored(json!({"mirror": {"host": "m"}, "mirror_percent": 50})), half);
    let redirect = rule(&json!({"redirect": {"uri": "/n"}})).expect("valid");
    let Action::Redirect(redirect) = redirect.action else { panic!("no redirect") };
    assert_eq!((redirect.status, redirect.port), (StatusCode::MOVED_PERMANENTLY, RedirectPort::Keep));
    assert_eq!(redirect.path, Some(PathRewrite::Full("/n".into())));
    assert_eq!(rule(&with(&json!({"retries": {"attempts": 0}}))).expect("valid").retries.expect("retries").attempts, 0);
    let Action::Respond(response) = rule(&json!({"directResponse": {"status": 503, "body": {"bytes": "aGk="}}})).expect("valid").action
    else {
        panic!("no response")
    };
    assert_eq!(&*response.body, b"hi");
}

#[test]
fn gateways_decide_whether_it_is_for_the_mesh() {
    let mesh = |gateways: Value| {
        let spec = json!({"hosts": ["*"], "gateways": gateways, "http": [with(&json!({}))]});
        read(&spec).expect("valid").mesh
    };
    assert!(mesh(json!([])) && mesh(json!(["gw", "mesh"])) && !mesh(json!(["gw"])));
}

#[test]
fn mistakes_are_named_with_their_field() {
    let route = json!([{"destination": {"host": "a"}}]);
    for (http, expected) in [
        (json!({}), "spec.http[0]: has no action"),
        (json!({"route": route, "redirect": {}}), "spec.http[0]: has several actions (route, redirect)"),
        (json!({"route": [{"destination": {}}]}), "host"),
        (json!({"route": [{"destination": {"host": "*.a"}}]}), "spec.http[0].route[0].destination.host: cannot be a wildcard"),
        (
            json!({"route": [{"destination": {"host": "a"}}, {"destination": {"host": "b"}}]}),
            "spec.http[0].route: several destinations and no weight",
        ),
        (json!({"route": [{"destination": {"host": "a"}, "weight": -1}]}), "spec.http[0].route[0].weight"),
        (json!({"route": [{"destination": {"host": "a", "port": {"number": 70000}}}]}), "spec.http[0].route[0].destination.port.number"),
        (with(&json!({"match": [{"uri": {"regex": "("}}]})), "spec.http[0].match[0].uri.regex"),
        (with(&json!({"match": [{"uri": {"exact": "/", "prefix": "/"}}]})), "spec.http[0].match[0].uri: has several"),
        (with(&json!({"match": [{"headers": {"bad name": {}}}]})), "spec.http[0].match[0].headers.bad name"),
        (with(&json!({"timeout": "3"})), "spec.http[0].timeout"),
        (with(&json!({"retries": {"attempts": 1, "retryOn": "nope"}})), "spec.http[0].retries.retryOn: \"nope\""),
        (with(&json!({"retries": {"attempts": -1}})), "spec.http[0].retries.attempts"),
        (with(&json!({"fault": {}})), "spec.http[0].fault"),
        (with(&json!({"fault": {"abort": {"httpStatus": 99}}})), "spec.http[0].fault.abort.httpStatus"),
        (with(&json!({"fault": {"abort": {"grpcStatus": "NOPE"}}})), "spec.http[0].fault.abort.grpcStatus"),
        (
            with(&json!({"fault": {"delay": {"percentage": {"value": 101}, "fixedDelay": "1s"}}})),
            "spec.http[0].fault.delay.percentage.value",
        ),
        (json!({"redirect": {"redirectCode": 200}}), "spec.http[0].redirect.redirectCode"),
        (json!({"redirect": {"port": 1, "derivePort": "FROM_REQUEST_PORT"}}), "spec.http[0].redirect"),
        (json!({"directResponse": {"status": 100}}), "spec.http[0].directResponse.status"),
        (json!({"directResponse": {"status": 200, "body": {"bytes": "!"}}}), "spec.http[0].directResponse.body.bytes"),
        (with(&json!({"rewrite": {"uri": "/", "uriRegexRewrite": {"match": "a", "rewrite": "b"}}})), "spec.http[0].rewrite"),
        (with(&json!({"corsPolicy": {"unmatchedPreflights": "x"}})), "spec.http[0].corsPolicy.unmatchedPreflights"),
        (with(&json!({"typo": 1})), "typo"),
    ] {
        let problem = rule(&http).expect_err(&http.to_string());
        assert!(problem.contains(expected) && problem.contains("VirtualService default/v"), "{http}: {problem}");
    }
    assert!(read(&json!({"hosts": ["a b"], "http": [{"route": route}]})).expect_err("refused").contains("spec.hosts[0]"));
    assert!(read(&json!({"hosts": ["a"]})).expect_err("refused").contains("no http, tls or tcp"));
    let l4 = |spec: Value| read(&spec).expect_err("refused");
    assert!(l4(json!({"hosts": ["a"], "tls": [{"route": route}]})).contains("spec.tls[0].match"));
    assert!(
        l4(json!({"hosts": ["a"], "tcp": [{"match": [{"destinationSubnets": ["x"]}], "route": route}]})).contains("destinationSubnets[0]")
    );
}
