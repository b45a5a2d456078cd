//! Decisions compared with those of an evaluator that goes through everything.

use super::*;

mod against_a_naive_evaluator {
    //! The same policies read the slow and obvious way: every rule, every field, from the resource itself.

    use proptest::prelude::*;

    use super::*;
    use crate::resource::authorization::{Condition, Rule, Values};

    fn value<T>(values: &Values<T>, matches: impl Fn(&T) -> bool) -> bool {
        let yes = values.any_of.is_empty() || values.any_of.iter().any(&matches);
        yes && !values.none_of.iter().any(&matches)
    }

    fn rule_matches(rule: &Rule, facts: &Facts, head: &RequestHead) -> bool {
        let peer = facts.peer.as_ref();
        let principal = |m: &crate::resource::strings::StringMatch| m.matches(&peer.map(SpiffeId::principal).unwrap_or_default());
        let namespace = |m: &crate::resource::strings::StringMatch| peer.is_some_and(|p| m.matches(p.namespace()));
        let account = |a: &crate::resource::authorization::ServiceAccount| {
            peer.is_some_and(|p| p.namespace() == a.namespace.as_deref().unwrap_or("default") && p.service_account() == a.name)
        };
        let from = rule.from.is_empty()
            || rule.from.iter().any(|s| {
                value(&s.principals, principal)
                    && value(&s.namespaces, namespace)
                    && value(&s.service_accounts, account)
                    && value(&s.ip_blocks, |n| n.contains(&facts.source))
            });
        let to = rule.to.is_empty()
            || rule.to.iter().any(|o| {
                value(&o.ports, |p| *p == facts.destination.port())
                    && value(&o.methods, |m| m.matches(head.method.as_str()))
                    && value(&o.hosts, |m| m.matches(&head.host().to_lowercase()))
                    && value(&o.paths, |p| p.matches(head.path()))
            });
        let when = rule.when.iter().all(|c| match c {
            Condition::Header(name, v) => value(v, |m| head.headers.get_all(name).iter().any(|h| m.matches(h.to_str().expect("text")))),
            Condition::SourceNamespace(v) => value(v, namespace),
            other => panic!("{other:?} is not generated"),
        });
        from && to && when
    }

    fn naive(specs: &[Value], facts: &Facts, head: &RequestHead) -> bool {
        let all = specs.iter().map(authorization).collect::<Vec<_>>();
        let matches = |action: Action| all.iter().any(|p| p.action == action && p.rules.iter().any(|r| rule_matches(r, facts, head)));
        let any_allow = all.iter().any(|p| p.action == Action::Allow);
        !matches(Action::Deny) && (!any_allow || matches(Action::Allow))
    }

    fn some(words: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
        proptest::collection::vec(proptest::sample::select(words), 1..3)
    }

    const PRINCIPALS: &[&str] = &["mesh.example/ns/web/sa/front", "mesh.example/ns/db/sa/back", "*/sa/front", "mesh.example/ns/web/*", "*"];
    const NAMESPACES: &[&str] = &["web", "db", "w*", "*b"];
    const ACCOUNTS: &[&str] = &["web/front", "front", "db/back"];
    const BLOCKS: &[&str] = &["10.0.0.0/24", "10.0.1.5"];
    const HOSTS: &[&str] = &["web.example", "*.example", "api.*"];
    const METHODS: &[&str] = &["GET", "POST", "P*"];
    const PATHS: &[&str] = &["/a", "/a/*", "*/c", "/a/{*}", "/{*}/b/{**}", "/", "*"];
    const PORTS: &[&str] = &["80", "8080"];

    fn fields(all: &'static [(&'static str, &'static str, &'static [&'static str])]) -> impl Strategy<Value = Value> {
        let one = proptest::sample::select(all).prop_flat_map(|(yes, no, words)| {
            (any::<bool>(), some(words)).prop_map(move |(positive, words)| (if positive { yes } else { no }, words))
        });
        proptest::collection::vec(one, 1..3)
            .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_owned(), json!(v))).collect::<serde_json::Map<_, _>>().into())
    }

    fn a_source() -> impl Strategy<Value = Value> {
        let named = fields(&[
            ("principals", "notPrincipals", PRINCIPALS),
            ("namespaces", "notNamespaces", NAMESPACES),
            ("ipBlocks", "notIpBlocks", BLOCKS),
        ]);
        let accounts = fields(&[("serviceAccounts", "notServiceAccounts", ACCOUNTS)]);
        prop_oneof![named, accounts].prop_map(|source| json!({"source": source}))
    }

    fn an_operation() -> impl Strategy<Value = Value> {
        fields(&[
            ("hosts", "notHosts", HOSTS),
            ("methods", "notMethods", METHODS),
            ("paths", "notPaths", PATHS),
            ("ports", "notPorts", PORTS),
        ])
        .prop_map(|operation| json!({"operation": operation}))
    }

    fn a_condition() -> impl Strategy<Value = Value> {
        (any::<bool>(), any::<bool>(), some(&["v1", "v*", "web"])).prop_map(|(header, positive, words)| {
            let key = if header { "request.headers[x-v]" } else { "source.namespace" };
            json!({"key": key, if positive { "values" } else { "notValues" }: words})
        })
    }

    fn a_policy() -> impl Strategy<Value = Value> {
        use proptest::collection::vec as list;
        let rule = (list(a_source(), 0..3), list(an_operation(), 0..3), list(a_condition(), 0..2)).prop_map(|(from, to, when)| {
            let mut rule = serde_json::Map::new();
            for (name, values) in [("from", from), ("to", to), ("when", when)] {
                if !values.is_empty() {
                    rule.insert(name.to_owned(), json!(values));
                }
            }
            Value::from(rule)
        });
        (any::<bool>(), list(rule, 1..4)).prop_map(|(allow, rules)| json!({"action": if allow { "ALLOW" } else { "DENY" }, "rules": rules}))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn decisions_are_the_same(
            specs in proptest::collection::vec(a_policy(), 0..5),
            peer in proptest::sample::select(vec!["", "mesh.example/ns/web/sa/front", "mesh.example/ns/db/sa/back", "mesh.example/ns/default/sa/front"]),
            source in proptest::sample::select(vec!["10.0.0.5", "10.0.1.5"]),
            port in proptest::sample::select(vec!["80", "8080"]),
            method in proptest::sample::select(vec!["GET", "POST", "PUT"]),
            host in proptest::sample::select(vec!["web.example", "API.x", "other"]),
            path in proptest::sample::select(vec!["/", "/a", "/a/b", "/a/b/c", "/x/b/c", "/a?q=/c"]),
            header in proptest::sample::select(vec![None, Some("v1"), Some("x")]),
        ) {
            let all = policy(&specs);
            let facts = facts(peer, source, &format!("10.0.0.9:{port}"));
            let headers = header.map(|v| vec![("x-v", v)]).unwrap_or_default();
            let head = head(method, host, path, &headers);
            let expected = naive(&specs, &facts, &head);
            prop_assert_eq!(allowed(&all, &facts, &head, None), expected);
            // A connection is refused only if every request on it would be, and free only if none would be.
            match all.connection(&facts) {
                Err(_) => prop_assert!(!expected),
                // Nor then whatever it carries.
                Ok(Verdict::Allowed(_)) => prop_assert!(expected && all.opaque(&facts, &[]).is_ok()),
                Ok(Verdict::PerRequest(_)) => {}
            }
            // What cannot be looked into never gets more than what can.
            if all.opaque(&facts, &[]).is_ok() {
                prop_assert!(expected);
            }
        }
    }
}

#[test]
fn rules_that_cannot_match_are_not_looked_at() {
    let source = |field: &str, value: String| json!({"from": [{"source": {field: [value]}}]});
    let operation = |field: &str, value: String| json!({"to": [{"operation": {field: [value], "methods": ["GET"]}}]});
    let many = |count: usize| {
        let of_each = (0..count / 6).flat_map(|i| {
            [
                source("principals", format!("mesh.example/ns/web/sa/other-{i}")),
                source("serviceAccounts", format!("web/other-{i}")),
                source("namespaces", format!("other-{i}")),
                operation("paths", format!("/other/{i}")),
                operation("paths", format!("/prefix-{}/{i}/*", i % 7)),
                operation("hosts", format!("other-{i}.example")),
            ]
        });
        let allow = of_each.clone().chain([operation("paths", "/wanted/*".into())]).collect::<Vec<_>>();
        policy(&[json!({"rules": allow}), json!({"action": "DENY", "rules": of_each.collect::<Vec<_>>()})])
    };
    let head = head("GET", "web.example", "/wanted/page/with/a/long/path", &[]);
    for count in [12, 20_000] {
        let policy = many(count);
        super::matching::LOOKED_AT.set(0);
        assert!(allowed(&policy, &web(), &head, None));
        assert_eq!(super::matching::LOOKED_AT.get(), 1, "of {count} rules of each action");
        assert!(matches!(policy.connection(&web()), Ok(Verdict::PerRequest(_))));
        assert_eq!(super::matching::LOOKED_AT.get(), 3, "one of each action tells, before there is a request");
    }
}

/// A rule about requests that names a port asks nothing of connections to others.
#[test]
fn rules_about_requests_to_one_port_leave_the_others_alone() {
    for field in ["paths", "hosts", "methods"] {
        for action in ["DENY", "ALLOW"] {
            let mut rules = vec![json!({"to": [{"operation": {"ports": ["8080"], field: ["x"]}}]})];
            if action == "ALLOW" {
                rules.push(json!({"to": [{"operation": {"ports": ["9000"]}}]}));
            }
            let policy = policy(&[json!({"action": action, "rules": rules})]);
            let to = |port: u16| {
                let mut facts = web();
                facts.destination.set_port(port);
                facts
            };
            assert!(matches!(policy.connection(&to(8080)), Ok(Verdict::PerRequest(_))), "{field} {action}");
            assert!(!policy.allows_uninspected(&to(8080)), "{field} {action}");
            assert!(matches!(policy.connection(&to(9000)), Ok(Verdict::Allowed(_))), "{field} {action}");
            assert!(policy.allows_uninspected(&to(9000)) && policy.allows_unconditionally(&to(9000)), "{field} {action}");
        }
    }
}
