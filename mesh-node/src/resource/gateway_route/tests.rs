use serde_json::json;

use super::*;
use crate::resource::{Object, Parsed, parse};

#[test]
fn what_names_a_method_goes_before_what_is_for_all() {
    let route = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute", "metadata": {"name": "r", "namespace": "default"},
    "spec": {"parentRefs": [{"kind": "Service", "group": "", "name": "s"}], "rules": [
        {"name": "all"},
        {"name": "header", "matches": [{"headers": [{"name": "a", "value": "b"}]}]},
        {"name": "method", "matches": [{"method": {"method": "Echo"}}]},
        {"name": "service", "matches": [{"method": {"service": "x.Y"}}]},
        {"name": "both", "matches": [{"method": {"service": "x.Y", "method": "Echo"}}]},
    ]}});
    let Ok(Parsed::Object(named)) = parse(&route, "default") else { panic!("a route") };
    let Object::GatewayRoute(route) = named.object else { panic!("a route") };
    let mut rules = route.rules;
    rules.sort_by_key(|rule| std::cmp::Reverse(precedence(&rule.matches[0])));
    let order = rules.iter().map(|rule| &*rule.name).collect::<Vec<_>>();
    assert_eq!(order, ["both", "service", "method", "header", "all"]);
}

#[test]
fn what_is_said_of_retries_takes_no_condition_away() {
    let route = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r", "namespace": "default"},
        "spec": {"parentRefs": [{"kind": "Service", "group": "", "name": "s"}], "rules": [{"retry": {"attempts": 1}}]}});
    let Ok(Parsed::Object(named)) = parse(&route, "default") else { panic!("a route") };
    let Object::GatewayRoute(route) = named.object else { panic!("a route") };
    let on = route.rules[0].retries.as_ref().expect("retries").on;
    let wanted = [RetryOn::GRPC_UNAVAILABLE, RetryOn::GRPC_CANCELLED, RetryOn::CONNECT_FAILURE, RetryOn::RESET];
    assert!(wanted.into_iter().all(|condition| on.has(condition)));
}

fn parsed(rules: &Value) -> std::result::Result<GatewayRoute, crate::resource::Rejection> {
    let route = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r", "namespace": "default"},
        "spec": {"parentRefs": [{"kind": "Service", "group": "", "name": "s", "sectionName": "http"}], "rules": rules}});
    match parse(&route, "default")? {
        Parsed::Object(named) => match named.object {
            Object::GatewayRoute(route) => Ok(route),
            other => panic!("{other:?}"),
        },
        Parsed::Ignored(kind) => panic!("{kind}"),
    }
}

#[test]
fn values_of_headers_are_what_they_say() {
    let filter = json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "a", "value": "50%"}, {"name": "b", "value": "%REQ(x)%"}]}});
    let route = parsed(&json!([{"filters": [filter]}])).expect("a route");
    let set = &route.rules[0].headers.request.set;
    assert!(matches!(&set[0].1, HeaderText::Plain(value) if value == "50%"), "{set:?}");
    assert!(matches!(&set[1].1, HeaderText::Template(_)), "{set:?}");
    assert_eq!(route.parents[0].section.as_deref(), Some("http"));
}

#[test]
fn what_is_wrong_with_a_method_is_told() {
    for (method, field, words) in [
        (json!({"type": "Exact", "service": "a.B", "bogus": 1}), "spec.rules[0].matches[0].method.bogus", "unknown field"),
        (json!(false), "spec.rules[0].matches[0].method", "the name of a method"),
        (json!({"service": 7}), "spec.rules[0].matches[0].method.service", "string"),
    ] {
        let rejection = parsed(&json!([{"matches": [{"method": method}]}])).expect_err("refused");
        assert!(rejection.field == field && rejection.problem.contains(words), "{rejection}");
    }
}

/// Files come past no API server: what its rules would refuse is refused here.
#[test]
fn what_an_api_server_would_refuse_is_refused() {
    let set = |name: &str| json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": name, "value": "1"}]}});
    let mirror = json!({"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "m", "port": 80}}});
    for (rule, field) in [
        (json!({"filters": [set("a"), mirror, mirror, set("b")]}), "spec.rules[0].filters[3]"),
        (json!({"matches": [{"path": {"value": "nos"}}]}), "spec.rules[0].matches[0].path.value"),
        (json!({"matches": [{"path": {"type": "Exact", "value": "/a//b"}}]}), "spec.rules[0].matches[0].path.value"),
        (json!({"matches": [{"method": "get"}]}), "spec.rules[0].matches[0].method"),
        (json!({"timeouts": {"request": "1s", "backendRequest": "2s"}}), "spec.rules[0].timeouts.backendRequest"),
    ] {
        let rejection = parsed(&json!([rule])).expect_err("refused");
        assert_eq!(rejection.field, field, "{rejection}");
    }
    for rule in [
        json!({"filters": [set("a"), mirror, mirror]}),
        json!({"matches": [{"path": {"type": "RegularExpression", "value": "a//b"}, "method": "PATCH"}]}),
        json!({"timeouts": {"request": "2s", "backendRequest": "2s"}}),
        json!({"timeouts": {"request": "0s", "backendRequest": "2s"}}),
    ] {
        parsed(&json!([rule])).expect("taken");
    }
}

/// A parent that cannot be read takes no other with it, and many rules are read once each.
#[test]
fn what_can_be_read_of_a_long_route_is_read() {
    let rules = (0..20_000).map(|i| json!({"matches": [{"path": {"value": format!("/{i}")}}]})).collect::<Vec<_>>();
    let document = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r"},
        "spec": {"parentRefs": [{"kind": "Service", "group": "", "name": "s"}, {"kind": "Service", "group": "", "name": "t", "port": 0}], "rules": rules}});
    let begun = std::time::Instant::now();
    let rejection = parse(&document, "default").expect_err("refused");
    assert_eq!(crate::resource::further(&document, "default", &rejection).len(), 0);
    let Object::GatewayRoute(route) = rejection.instead.expect("what there is").object else { panic!("a route") };
    assert_eq!((route.parents.len(), route.rules.len()), (1, 20_000));
    assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn a_filter_that_is_not_known_is_not_passed_over() {
    let external = json!({"type": "ExternalAuth", "externalAuth": {"protocol": "GRPC"}});
    let matched = json!([{"path": {"value": "/private"}}, {"path": {"type": "No", "value": "/x"}}]);
    let rules = json!([
        {"matches": matched, "filters": [external]},
        {"name": "other", "backendRefs": [{"name": "s", "port": 80}]},
        {"matches": [{"path": {"type": "No", "value": "/x"}}], "backendRefs": []},
    ]);
    let rejection = parsed(&rules).expect_err("refused");
    assert_eq!(rejection.field, "spec.rules[0].filters[0].externalAuth");
    let instead = rejection.instead.expect("what there is");
    let Object::GatewayRoute(route) = instead.object else { panic!("a route") };
    let actions = route.rules.iter().map(|rule| match &rule.action {
        Action::Respond(answer) => answer.status.as_u16(),
        _ => 0,
    });
    assert_eq!(actions.collect::<Vec<_>>(), [500, 0]);
    assert_eq!(route.rules.iter().map(|rule| rule.number).collect::<Vec<_>>(), [0, 1]);
    assert!(matches!(&route.rules[0].matches[0].path, Some(PathMatch::Segments(path)) if &**path == "/private"));
}

/// What is for gateways is read by whoever runs those, and what is for nobody is told.
#[test]
fn a_route_of_gateways_is_not_read_and_one_of_nothing_is_told() {
    let of = |parents: &Value, spec: &Value| {
        let mut spec = spec.clone();
        spec["parentRefs"] = parents.clone();
        parse(
            &json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r", "namespace": "default"}, "spec": spec}),
            "default",
        )
    };
    let unknown =
        json!({"rules": [{"filters": [{"type": "ExtensionRef", "extensionRef": {"group": "x", "kind": "Y", "name": "z"}}], "unknown": 1}]});
    let gateways = json!([{"name": "gw"}, {"kind": "ListenerSet", "name": "l"}]);
    let Ok(Parsed::Object(named)) = of(&gateways, &unknown) else { panic!("nothing to say") };
    assert_eq!(named.object, Object::GatewayRoute(GatewayRoute::default()));
    assert!(of(&json!([{"name": "gw"}, {"kind": "Service", "group": "", "name": "s"}]), &unknown).is_err());
    let mixed =
        json!([{"kind": "ServiceEntry", "group": "networking.istio.io", "name": "e"}, {"kind": "Service", "group": "", "name": "s"}]);
    assert!(of(&mixed, &json!({})).is_ok(), "others among them are others' business");
    for kind in ["service", "ServiceEntry", "Mesh"] {
        let told = of(&json!([{"kind": kind, "name": "s"}]), &json!({})).expect_err(kind);
        assert_eq!(told.field, "spec.parentRefs[0].kind", "{kind}");
    }
}

/// As templates often leave it.
#[test]
fn what_is_null_is_not_there() {
    let route = parsed(&json!([{"matches": null, "filters": null, "timeouts": null,
        "backendRefs": [{"name": "a", "port": 80, "filters": null, "weight": null}]}]));
    assert_eq!(route, parsed(&json!([{"backendRefs": [{"name": "a", "port": 80}]}])));
}

#[test]
fn the_wildcard_of_an_origin_is_for_its_host() {
    let filter = json!({"type": "CORS", "cors": {"allowOrigins": ["https://*.good.example"]}});
    let route = parsed(&json!([{"filters": [filter]}])).expect("taken");
    let cors = route.rules[0].cors.as_ref().expect("a filter");
    let takes = |origin: &str| cors.origins.iter().any(|taken| taken.matches(origin.as_bytes()));
    assert_eq!(
        ["https://a.good.example", "https://a.b.good.example", "https://evil.example/.good.example", "http://a.good.example"].map(takes),
        [true, true, false, false]
    );
}
