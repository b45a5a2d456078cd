use std::collections::HashMap;

use http::HeaderName;

use super::*;
use crate::report::kept::Wanted;
use crate::report::{environment::Variable, peer::Fact};

#[derive(Default)]
struct Known(HashMap<&'static str, &'static str>);

impl Attributes for Known {
    fn attribute(&self, attribute: Attribute) -> Option<Value<'_>> {
        match attribute {
            Attribute::ResponseCode => Some(Value::Int(503)),
            Attribute::ResponseFlags => Some(Value::Int(0)),
            Attribute::RequestMethod => Some(Value::Text("GET".into())),
            Attribute::RequestUrlPath => Some(Value::Text("/a/b".into())),
            Attribute::RequestDuration => Some(Value::Duration(250_000_000)),
            // A Monday.
            Attribute::RequestTime => functions::timestamp("2026-11-30T23:05:07.25Z").map(Value::Time),
            Attribute::Peer(End::Upstream, Fact::App) => Some(Value::Text("reviews".into())),
            Attribute::Own(Variable::PodNamespace) => Some(Value::Text("default".into())),
            Attribute::ConnectionMtls => Some(Value::Bool(true)),
            _ => None,
        }
    }

    fn header(&self, whose: HeadersOf, name: &str) -> Option<Cow<'_, str>> {
        if whose == HeadersOf::Request { self.0.get(name).map(|v| Cow::Borrowed(*v)) } else { None }
    }

    fn label(&self, of: End, name: &str) -> Option<&str> {
        (of == End::Upstream && name == "role").then_some("server")
    }

    fn names(&self, whose: HeadersOf) -> Vec<String> {
        if whose == HeadersOf::Request { self.0.keys().map(ToString::to_string).collect() } else { Vec::new() }
    }
}

#[test]
fn filters_hold_as_cel_says() {
    let known = Known(HashMap::from([("x-user", "anna")]));
    for (text, expected) in [
        ("response.code >= 400", true),
        ("response.code>=400 && response.code<500", false),
        ("response.code in [500, 503]", true),
        ("!(response.code == 200)", true),
        ("request.method == 'GET' && request.url_path.startsWith(\"/a\")", true),
        ("request.url_path.matches(r'^/\\w/\\w$')", true),
        ("request.url_path.endsWith('/b') ? connection.mtls : false", true),
        ("request.headers['x-user'] == 'anna'", true),
        ("request.headers['X-User'] == 'anna'", true),
        ("'x-user' in request.headers", true),
        ("has(request.headers.missing)", false),
        ("!has(response.grpc_status)", true),
        ("size(request.url_path) == 4", true),
        ("request.url_path.size() + 1 == 5", true),
        ("-response.code < 0", true),
        ("request.duration < duration('1s') && request.duration == duration('250ms')", true),
        ("request.duration + duration('1m') > duration('1m0.2s')", true),
        ("-request.duration < duration('-0.1s')", true),
        ("request.duration.getMilliseconds() == 250 && duration('1h30m').getMinutes() == 90", true),
        ("string(request.duration) == '0.25s' && string(duration('2s')) == '2s'", true),
        // Macros.
        ("['/x', '/a'].exists(p, request.url_path.startsWith(p))", true),
        ("['/x', '/y'].exists(p, request.url_path.startsWith(p))", false),
        ("[500, 503].all(c, c >= 500) && ![1, 2].all(n, n == 1)", true),
        ("[1, 2, 2].exists_one(n, n == 1) && ![1, 2, 2].exists_one(n, n == 2)", true),
        ("[1, 2, 3].filter(n, n > 1) == [2, 3] && [1, 2].map(n, n * 2) == [2, 4] && [1, 2].map(n, n > 1, n * 2) == [4]", true),
        ("request.headers.exists(name, name.startsWith('x-') && request.headers[name] == 'anna')", true),
        ("['a', 'b'].exists(a, ['b', 'c'].exists(b, a == b)) && ['a'].all(a, ['b'].all(b, a + b == 'ab'))", true),
        ("size(request.headers) == 1 && request.headers.all(name, name in request.headers)", true),
        // One that decides makes up for others that have no value; one that does not, does not.
        ("['x', 1].exists(v, v.startsWith('x'))", true),
        ("['y', 1].exists(v, v.startsWith('x'))", false),
        ("!['y', 1].exists(v, v.startsWith('x'))", false),
        ("[].all(x, x == 1) && ![].exists(x, true)", true),
        // Lists and maps.
        ("[10, 20][1] == 20 && size([1, 2] + [3]) == 3 && size([1, 2,]) == 2", true),
        ("[10, 20][2] == 20 || [10][-1] == 10", false),
        ("{'GET': 'read', 'PUT': 'write'}[request.method] == 'read'", true),
        ("{'GET': 'read'}.GET == 'read' && 'GET' in {'GET': 1} && !('PUT' in {'GET': 1})", true),
        ("has({'a': 1}.a) && !has({'a': 1}.b) && {'a': 1, 'b': 2} == {'b': 2.0, 'a': 1}", true),
        ("request.headers['X-' + 'User'] == 'anna' && !has(request.headers['x-' + 'none'])", true),
        // Times.
        ("request.time > timestamp('2026-11-30T23:05:07Z') && request.time < timestamp('2026-12-01T01:00:00+01:00')", true),
        ("request.time.getFullYear() == 2026 && request.time.getMonth() == 10 && request.time.getDate() == 30", true),
        ("request.time.getDayOfWeek() == 1 && request.time.getDayOfMonth() == 29 && request.time.getDayOfYear() == 333", true),
        ("request.time.getHours() == 23 && request.time.getMinutes() == 5 && request.time.getMilliseconds() == 250", true),
        ("request.time.getHours('+02:00') == 1 && request.time.getDate('+02:00') == 1 && request.time.getHours('-00:30') == 22", true),
        ("request.time - timestamp('2026-11-30T23:05:06Z') == duration('1.25s')", true),
        (
            "request.time + duration('1h') == timestamp('2026-12-01T00:05:07.25Z') && string(request.time) == '2026-11-30T23:05:07.25Z'",
            true,
        ),
        ("int(timestamp('1970-01-01T00:01:00Z')) == 60 && timestamp(60) == timestamp('1970-01-01T00:01:00Z')", true),
        // Literals.
        ("response.code == 0x1F7 && 5.03e2 == 503.0 && 50300e-2 == 503.0 && .5 < 1.0", true),
        (r#"'\x41\u0042\103' == "ABC" && '''it's''' == "it's" && size('\t\a') == 2"#, true),
        ("matches(request.url_path, '^/a') && bool('true') && dyn(1) == 1 // and a comment", true),
        // It is no number.
        ("request.duration < 1", false),
        ("response.code % 2 == 1 || response.code / 0 == 1", true),
        ("string(response.code) == '503'", true),
        // What has no value does not hold, and is made up for by what decides.
        ("upstream.address == '10.0.0.1'", false),
        ("!(upstream.address == '10.0.0.1')", false),
        ("upstream.address == '10.0.0.1' || response.code == 503", true),
        ("response.code", false),
        ("request.headers['missing'] != 'x'", false),
        ("response.code == 503.0", true),
        ("response.code == '503'", false),
    ] {
        let expression = Expression::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(expression.holds(&known), expected, "{text}");
    }
}

#[test]
fn tags_have_a_value_in_any_case() {
    let known = Known::default();
    for (text, expected) in [
        ("request.method", "GET"),
        ("'fixed'", "fixed"),
        ("response.code", "503"),
        ("request.method + '-' + string(response.code)", "GET-503"),
        ("upstream.address", "unknown"),
        ("has(request.headers.host) ? request.headers.host : 'none'", "none"),
        ("connection.mtls", "true"),
        ("filter_state.upstream_peer.app", "reviews"),
        ("filter_state['wasm.upstream_peer'].app", "reviews"),
        ("upstream_peer.labels['role'].value", "server"),
        ("filter_state.upstream_peer.labels.role", "server"),
        ("filter_state.upstream_peer.labels['none']", "unknown"),
        ("filter_state.downstream_peer.app", "unknown"),
        ("has(filter_state.downstream_peer.app) ? 'known' : 'not'", "not"),
        ("node.metadata['NAMESPACE'] + '/' + xds.node.metadata['NAMESPACE']", "default/default"),
        ("node.metadata['PLATFORM']", "unknown"),
    ] {
        assert_eq!(Expression::parse(text).map(|e| e.tag(&known)), Ok(expected.to_owned()), "{text}");
    }
    assert_eq!(Expression::parse("'fixed'").ok().and_then(|e| e.constant()).as_deref(), Some("fixed"));
    let asks = |text: &str| {
        let mut asks = Asks::default();
        Expression::parse(text).expect(text).asks(&mut asks);
        (asks.request, asks.response)
    };
    let these = |names: &[&'static str]| Wanted::These(names.iter().copied().map(HeaderName::from_static).collect());
    assert_eq!(asks("has(response.headers.x) || request.headers[':path'] == 'a'"), (these(&[]), these(&["x"])));
    assert_eq!(asks("response.code == 1 ? request.id : request.useragent"), (these(&["x-request-id", "user-agent"]), these(&[])));
    let identities = |text: &str| {
        let mut asks = Asks::default();
        Expression::parse(text).expect(text).asks(&mut asks);
        asks.identities
    };
    assert!(identities("has(connection.uri_san_peer_certificate)") && identities("connection.uri_san_local_certificate == 'a' || true"));
    let peers = |text: &str| {
        let mut asks = Asks::default();
        Expression::parse(text).expect(text).asks(&mut asks);
        asks.peers
    };
    assert!(peers("upstream_peer.labels['a']") && peers("!has(filter_state.downstream_peer.app)") && !peers("node.id"));
    assert!(!identities("connection.mtls && request.method == 'GET'"));
    assert_eq!(asks("'a' in request.headers && request.referer == ''"), (Wanted::All, these(&[])));
}

#[test]
fn what_cannot_be_read_says_why() {
    for (text, part) in [
        ("", "ends where a value"),
        ("response.cod == 1", "response.cod, which is not an attribute"),
        ("response.code = 1", "equality is =="),
        ("response.code == 1 1", "where it should end"),
        ("foo", "neither an attribute nor a function"),
        ("foo(1)", "calls foo()"),
        ("filter_state.other == 'a'", "filter_state.other, of which nothing is known here"),
        ("upstream_peer.colour == 'a'", "\"colour\" of a peer; known are app, version"),
        ("[1].exists(x, y == x)", "\"y\", which is neither"),
        ("[1].exists(x)", "needs \",\""),
        ("[1].exists(1, true)", "needs a name"),
        ("[1].all(x, true, false)", "it takes 1"),
        ("request.path.exists(c, true)", "on what is no list"),
        ("[1].exists(x, true) && x == 1", "\"x\", which is neither"),
        ("b'abc' == 'abc'", "bytes"),
        ("'\\x4' == ''", "escape"),
        ("{'a' 1}['a'] == 1", "needs \":\""),
        ("timestamp('yesterday') < request.time", "no time"),
        ("request.time.getHours('Europe/Berlin') == 1", "time zone"),
        ("response.code == 0xZZ", "not a number"),
        ("response.code == 99999999999999999999", "not a number"),
        ("response.code == 1e999", "not a number"),
        ("'open", "closing quote"),
        ("request.path.matches('(')", "pattern that cannot be read"),
        ("has(1)", "has() with something else"),
        ("request.duration > duration('1')", "no duration"),
        ("request.duration > duration('1 s')", "no duration"),
        ("request.path.startsWith()", "it takes 1"),
        ("request.path['x']", "has no members"),
        ("response.code == 1 @", "means nothing there"),
        ("(response.code == 1", "needs \")\" at its end"),
    ] {
        let error = Expression::parse(text).expect_err(text);
        assert!(error.contains(part), "{text}: {error}");
    }
    let deep = format!("{}true{}", "(".repeat(100), ")".repeat(100));
    assert!(Expression::parse(&deep).is_err_and(|e| e.contains("nested")));
    assert!(Expression::parse(&"!".repeat(200)).is_err());
    assert!(Expression::parse(&vec!["1"; 1000].join("+")).is_err_and(|e| e.contains("more than 400")));
    let long = vec!["1"; 190].join("+") + " == 190";
    assert!(Expression::parse(&long).is_ok_and(|e| e.holds(&Known::default())));
    assert!(Expression::parse(&"a".repeat(5000)).is_err_and(|e| e.contains("longer")));
}

#[test]
fn what_would_take_too_much_has_no_value() {
    let list = format!("[{}]", vec!["1"; 60].join(","));
    let nested = |list: &str| format!("{list}.all(a, {list}.all(b, {list}.all(c, a == b)))");
    assert!(Expression::parse(&nested(&list)).is_ok_and(|e| e.value(&Known::default()) == Err(NoValue)));
    let long = |what: &str, times: usize| format!("size({what}) > 0", what = what.to_owned() + &".map(x, x + x)".repeat(times));
    for what in ["['a']", "[[1]]", "['a', request.headers['x-long']]"] {
        let known = || Known(HashMap::from([("x-long", "0123456789")]));
        assert!(Expression::parse(&long(what, 42)).is_ok_and(|e| e.value(&known()) == Err(NoValue)), "{what}");
        assert!(Expression::parse(&long(what, 3)).is_ok_and(|e| e.holds(&known())), "{what}");
    }
    let pairs = "['a']".to_owned() + &".map(x, [x, x])".repeat(30);
    assert!(Expression::parse(&format!("size({pairs}) > 0")).is_ok_and(|e| e.value(&Known::default()) == Err(NoValue)));
    let of_headers = "[request.headers].map(m, m.map(k, m.map(j, m[k] + m[j])))";
    let many = || Known((0..100).map(|i| (&*Box::leak(format!("x-{i}").into_boxed_str()), "value")).collect());
    assert!(Expression::parse(of_headers).is_ok_and(|e| e.value(&many()) == Err(NoValue)));
    // A long text is looked at no more often than a short one would be in the same time.
    let looked = |what: &str, long: &'static str| {
        let text = format!("[1, 2, 3, 4].all(a, [1, 2, 3, 4].all(b, request.headers['x'].{what}))");
        Expression::parse(&text).is_ok_and(|e| e.holds(&Known(HashMap::from([("x", long)]))))
    };
    let long = Box::leak("a".repeat(60_000).into_boxed_str());
    for what in ["matches('a$')", "endsWith('a')"] {
        assert!(looked(what, "aaa") && !looked(what, long), "{what}");
    }
    // Years end.
    for text in ["timestamp('9999-12-31T23:59:59Z').getHours('+02:00') == 1", "timestamp(request.headers['x-time']) > timestamp(0)"] {
        let known = Known(HashMap::from([("x-time", "9999-12-31T23:59:59-01:00")]));
        assert!(Expression::parse(text).is_ok_and(|e| e.value(&known) == Err(NoValue)), "{text}");
    }
    assert!(Expression::parse("timestamp('9999-12-31T23:59:59-01:00') > request.time").is_err_and(|e| e.contains("no time")));
    assert!(Expression::parse(&nested("[1, 1, 1]")).is_ok_and(|e| e.holds(&Known::default())));
}
