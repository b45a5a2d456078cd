//! What is settled before it is known what a connection carries, and policies that are each on their own.

use super::*;

/// A rule that allows and asks about requests, if only in one of its alternatives, allows no connection that carries none: which it
/// is, is found out.
#[test]
fn one_alternative_about_requests_leaves_a_connection_unsettled() {
    let target = json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}, {"operation": {"ports": ["8080"]}}]}]});
    let source = json!({"rules": [{"from": [{"source": {"requestPrincipals": ["*"]}}, {"source": {"namespaces": ["web"]}}]}]});
    for spec in [target, source] {
        let mixed = policy(std::slice::from_ref(&spec));
        assert!(matches!(mixed.connection(&web()), Ok(Verdict::PerRequest(_))), "{spec}");
        assert_eq!(mixed.opaque(&web(), &[]).expect_err("denied"), Denial::NotAllowed, "{spec}");
        assert!(!mixed.allows_unconditionally(&web()) && !mixed.allows_uninspected(&web()), "{spec}");
        assert!(allowed(&mixed, &web(), &head("POST", "h", "/", &[]), None), "{spec}");
        // A rule of its own settles it.
        let both = policy(&[spec, json!({"rules": [{"to": [{"operation": {"ports": ["8080"]}}]}]})]);
        assert!(
            matches!(both.connection(&web()), Ok(Verdict::Allowed(_)))
                && both.opaque(&web(), &[]).is_ok()
                && both.allows_unconditionally(&web())
        );
    }
}

/// As a ztunnel and a waypoint would.
#[test]
fn what_targets_allow_workloads_have_to_allow_too() {
    let service = |spec: Value| {
        let Value::Object(mut spec) = spec else { panic!("{spec}") };
        spec.insert("targetRefs".to_owned(), json!([{"kind": "Service", "group": "", "name": "web"}]));
        Value::from(spec)
    };
    let get = || json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]});
    let from_web = || json!({"rules": [{"from": [{"source": {"namespaces": ["web"]}}]}]});
    let other = facts("mesh.example/ns/other/sa/x", "10.0.0.6", "10.0.0.9:8080");
    let [gets, posts] = ["GET", "POST"].map(|method| head(method, "h", "/", &[]));
    let all = |specs: &[Value]| {
        let all = policy(specs);
        [(&web(), &gets), (&web(), &posts), (&other, &gets), (&other, &posts)].map(|(facts, head)| {
            // What is settled before there is a request is so.
            match all.connection(facts) {
                Err(_) => assert!(!allowed(&all, facts, head, None)),
                Ok(Verdict::Allowed(_)) => assert!(allowed(&all, facts, head, None) && all.opaque(facts, &[]).is_ok()),
                Ok(Verdict::PerRequest(_)) => {}
            }
            allowed(&all, facts, head, None)
        })
    };
    assert_eq!(all(&[from_web(), service(get())]), [true, false, false, false]);
    // Of one layer each allows.
    assert_eq!(all(&[from_web(), get()]), [true, true, true, false]);
    assert_eq!(all(&[service(from_web()), service(get())]), [true, true, true, false]);
    // A layer without policies allows all, one without rules nothing.
    assert_eq!(all(&[service(get())]), [true, false, true, false]);
    assert_eq!(all(&[from_web(), service(json!({}))]), [false; 4]);
    assert_eq!(all(&[json!({}), service(get())]), [false; 4]);
    let named = policy(&[json!({}), service(get())]);
    assert_eq!(named.everywhere.authorization.allow.policies().iter().map(|p| &**p).collect::<Vec<_>>(), ["default/p", "default/p1"]);
}

#[test]
fn between_two_stars_stands_what_a_header_has_somewhere() {
    let when = |pattern: &str| policy(&[json!({"rules": [{"when": [{"key": "request.headers[Cookie]", "values": [pattern]}]}]})]);
    for (pattern, value, expected) in [
        ("*foo=*", "a=b; foo=bar", true),
        ("*foo=*", "foo=", true),
        ("*foo=*", "fo=o", false),
        ("**", "*", true),
        ("*", "", true),
        ("*foo", "a=foo", true),
    ] {
        assert_eq!(allowed(&when(pattern), &web(), &head("GET", "h", "/", &[("cookie", value)]), None), expected, "{pattern} {value}");
    }
}
