//! Routes and requests at random: rules of a `VirtualService`, what Istio makes of them for Envoy, and requests that more or less fit.
//! The same ones every time; `ROUTES_SEED` makes others and `ROUTES` more of them.

use fastrand::Rng;
use serde_json::{Map, Value, json};

use super::{Case, End, cases::case};

const ANSWER: &str = "HTTP/1.1 200 OK\r\nx-up: 1\r\nx-rm: gone\r\nx-add: up\r\nx-set: up\r\ncontent-length: 2\r\n\r\nok";
/// Sets of rules, and requests to each.
const ROUTES: u64 = 20;
const REQUESTS: usize = 6;

pub fn pick<'a, T: ?Sized>(rng: &mut Rng, of: &[&'a T]) -> &'a T {
    of[rng.usize(..of.len())]
}

/// Whether it happens, so many times of a hundred.
pub fn chance(rng: &mut Rng, of_a_hundred: u32) -> bool {
    rng.u32(..100) < of_a_hundred
}

/// The same said to Istio and to Envoy.
#[derive(Default)]
struct Said {
    istio: Map<String, Value>,
    envoy: Map<String, Value>,
}

/// A condition on a text.
fn text(rng: &mut Rng, values: &[&str], patterns: &[&str]) -> (Value, Value) {
    let value = pick(rng, values);
    match rng.u32(..3) {
        0 => (json!({"exact": value}), json!({"exact": value})),
        1 => {
            let begin = &value[..value.len().min(1 + rng.usize(..3))];
            (json!({"prefix": begin}), json!({"prefix": begin}))
        }
        _ => {
            let pattern = pick(rng, patterns);
            (json!({"regex": pattern}), json!({"safe_regex": {"regex": pattern}}))
        }
    }
}

const PATHS: [&str; 14] = ["/", "/a", "/a/", "/a/b", "/ab", "/A", "/A/b", "/a/b/c", "/b", "/b/", "/b/a", "/c.html", "/a%20b", "/a;x=1"];
const PATTERNS: [&str; 9] = ["/a.*", "/(a|b)/?", "/[a-c]+", "(?i)/a", r"/\w", "/.*/b", ".*", "/a/b(/c)?", r".*\.html"];
const VALUES: [&str; 6] = ["1", "12", "ab", "Ab", "a,b", "x y"];
const VALUE_PATTERNS: [&str; 6] = ["1.*", "[0-9]+", "a?b", ".*", ".+", "(?i)ab"];
const NAMES: [&str; 4] = ["x-v", "x-w", "X-Cap", "user-agent"];

fn condition(rng: &mut Rng) -> Said {
    let mut said = Said::default();
    let mut headers = Vec::new();
    if chance(rng, 75) {
        let (istio, envoy) = text(rng, &PATHS, &PATTERNS);
        let (kind, value) = envoy.as_object().and_then(|e| e.iter().next()).expect("a condition");
        let kind = if kind == "exact" { "path" } else { kind };
        said.envoy.insert(kind.to_owned(), value.clone());
        said.istio.insert("uri".into(), istio);
        if kind != "safe_regex" && chance(rng, 20) {
            said.istio.insert("ignoreUriCase".into(), true.into());
            said.envoy.insert("case_sensitive".into(), false.into());
        }
    } else {
        said.envoy.insert("prefix".into(), "/".into());
    }
    if chance(rng, 15) {
        let method = pick(rng, &["GET", "POST", "HEAD"]);
        said.istio.insert("method".into(), json!({"exact": method}));
        headers.push(json!({"name": ":method", "string_match": {"exact": method}}));
    }
    if chance(rng, 10) {
        let (istio, envoy) = text(rng, &["a.example", "b.example", "A.example"], &["a.*", r".*\.example"]);
        said.istio.insert("authority".into(), istio);
        headers.push(json!({"name": ":authority", "string_match": envoy}));
    }
    for (field, without) in [("headers", false), ("withoutHeaders", true)] {
        let mut all = Map::new();
        for name in NAMES {
            if !chance(rng, if without { 4 } else { 8 }) {
                continue;
            }
            let (istio, mut envoy) = if chance(rng, 25) {
                (json!({}), json!({"name": name, "present_match": true}))
            } else {
                let (istio, envoy) = text(rng, &VALUES, &VALUE_PATTERNS);
                (istio, json!({"name": name, "string_match": envoy}))
            };
            if without {
                envoy["invert_match"] = true.into();
                if envoy.get("present_match").is_none() {
                    envoy["treat_missing_header_as_empty"] = true.into();
                }
            }
            all.insert(name.to_owned(), istio);
            headers.push(envoy);
        }
        if !all.is_empty() {
            said.istio.insert(field.into(), all.into());
        }
    }
    if chance(rng, 20) {
        let name = pick(rng, &["q", "p"]);
        let (istio, envoy) = text(rng, &VALUES, &VALUE_PATTERNS);
        said.istio.insert("queryParams".into(), json!({name: istio}));
        said.envoy.insert("query_parameters".into(), json!([{"name": name, "string_match": envoy}]));
    }
    if !headers.is_empty() {
        said.envoy.insert("headers".into(), headers.into());
    }
    said
}

/// Operations on headers, and Envoy's for them: what is added, and what is removed.
fn operations(rng: &mut Rng) -> (Value, Vec<Value>, Vec<Value>) {
    let (mut istio, mut envoy, mut removed) = (Map::new(), Vec::new(), Vec::new());
    for (kind, action) in [("set", "OVERWRITE_IF_EXISTS_OR_ADD"), ("add", "APPEND_IF_EXISTS_OR_ADD")] {
        let mut all = Map::new();
        for name in ["X-Both", "x-add", "x-set", "x-v"] {
            if chance(rng, 25) {
                let value = pick(rng, &["1", "two", "a b", "a,b", "%REQ(x-v)%", "%REQ(:METHOD)% %REQ(x-w?x-add):2%", "%RESP(x-up)%"]);
                all.insert(name.to_owned(), value.into());
                envoy.push(json!({"header": {"key": name, "value": value}, "append_action": action}));
            }
        }
        if !all.is_empty() {
            istio.insert(kind.into(), all.into());
        }
    }
    for name in ["x-rm", "X-Up", "x-add", "x-w"] {
        if chance(rng, 20) {
            removed.push(name.into());
        }
    }
    if !removed.is_empty() {
        istio.insert("remove".into(), removed.clone().into());
    }
    (istio.into(), envoy, removed)
}

/// What operations there are in a place, of requests and of answers; behind those that are there for Envoy.
fn headers(rng: &mut Rng, envoy: &mut Map<String, Value>) -> Option<Value> {
    let mut istio = Map::new();
    for of in ["request", "response"] {
        if !chance(rng, 40) {
            continue;
        }
        let (said, added, removed) = operations(rng);
        for (field, more) in [(format!("{of}_headers_to_add"), added), (format!("{of}_headers_to_remove"), removed)] {
            let all = envoy.entry(field).or_insert_with(|| json!([])).as_array_mut().expect("a list");
            all.extend(more);
        }
        istio.insert(of.into(), said);
    }
    (!istio.is_empty()).then(|| istio.into())
}

fn rewrite(rng: &mut Rng, said: &mut Said, action: &mut Map<String, Value>) {
    let mut istio = Map::new();
    if chance(rng, 15) {
        istio.insert("authority".into(), "other.example:81".into());
        action.insert("host_rewrite_literal".into(), "other.example:81".into());
    }
    if chance(rng, 25) {
        let to = pick(rng, &["/", "/x", "/x/", "/x/y"]);
        istio.insert("uri".into(), to.into());
        action.insert("prefix_rewrite".into(), to.into());
    } else if chance(rng, 20) {
        let (pattern, to) =
            *pick(rng, &[&("/a(.*)", r"/z\1"), &("a", "z"), &("^/([^/]*)/(.*)", r"/\2/\1"), &(r"\.html$", ""), &("/+", "/"), &("b+", "-")]);
        istio.insert("uriRegexRewrite".into(), json!({"match": pattern, "rewrite": to}));
        action.insert("regex_rewrite".into(), json!({"pattern": {"regex": pattern}, "substitution": to}));
    }
    if !istio.is_empty() {
        said.istio.insert("rewrite".into(), istio.into());
    }
}

fn redirect(rng: &mut Rng) -> (Value, Value) {
    let (mut istio, mut envoy) = (Map::new(), Map::new());
    for (name, theirs, value) in [
        ("uri", "path_redirect", json!(pick(rng, &["/new", "/new/?y=1"]))),
        ("authority", "host_redirect", json!("o.example")),
        ("scheme", "scheme_redirect", json!(pick(rng, &["http", "https"]))),
        ("port", "port_redirect", json!(*pick(rng, &[&80, &443, &8080]))),
    ] {
        if chance(rng, 45) {
            istio.insert(name.into(), value.clone());
            envoy.insert(theirs.into(), value);
        }
    }
    if istio.is_empty() {
        istio.insert("uri".into(), "/new".into());
        envoy.insert("path_redirect".into(), "/new".into());
    }
    // As Istio has it: a port that goes without saying is not said.
    let scheme = istio.get("scheme").and_then(Value::as_str).unwrap_or("http");
    if istio.get("port").is_some_and(|port| *port == if scheme == "http" { 80 } else { 443 }) {
        envoy.remove("port_redirect");
    }
    if chance(rng, 40) {
        let (code, name) = *pick(rng, &[&(302, "FOUND"), &(303, "SEE_OTHER"), &(307, "TEMPORARY_REDIRECT"), &(308, "PERMANENT_REDIRECT")]);
        istio.insert("redirectCode".into(), code.into());
        envoy.insert("response_code".into(), name.into());
    }
    (istio.into(), envoy.into())
}

fn cors(rng: &mut Rng) -> (Value, Value) {
    let (istio, envoy) = text(rng, &["http://good.example", "http://x.good.example"], &[r"http://.*good\.example"]);
    let mut said = (
        json!({"allowOrigins": [istio], "allowMethods": ["GET", "PUT"]}),
        json!({"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy", "filter_enabled": {"default_value": {"numerator": 100}},
            "allow_origin_string_match": [envoy], "allow_methods": "GET,PUT", "forward_not_matching_preflights": true}),
    );
    if chance(rng, 40) {
        said.0["allowCredentials"] = true.into();
        said.1["allow_credentials"] = true.into();
    }
    if chance(rng, 40) {
        said.0["exposeHeaders"] = json!(["x-up", "x-e"]);
        said.1["expose_headers"] = "x-up,x-e".into();
    }
    said
}

/// One rule, and its routes: one for each of its conditions.
fn rule(rng: &mut Rng, index: usize, last: bool) -> (Value, Vec<Value>) {
    let mut said = Said::default();
    let conditions = (0..if last { 0 } else { 1 + rng.usize(..2) }).map(|_| condition(rng)).collect::<Vec<_>>();
    if !conditions.is_empty() {
        said.istio.insert("match".into(), conditions.iter().map(|c| Value::from(c.istio.clone())).collect());
    }
    let kind = rng.u32(..10);
    let mut envoy = Map::new();
    if kind == 0 && !last {
        let (istio, theirs) = redirect(rng);
        said.istio.insert("redirect".into(), istio);
        envoy.insert("redirect".into(), theirs);
    } else if kind == 1 && !last {
        let body = format!("rule {index}");
        said.istio.insert("directResponse".into(), json!({"status": 299, "body": {"string": body}}));
        envoy.insert("direct_response".into(), json!({"status": 299, "body": {"inline_string": body}}));
    } else {
        let mut action = Map::from_iter([("cluster".to_owned(), json!("@cluster")), ("timeout".to_owned(), json!("0s"))]);
        rewrite(rng, &mut said, &mut action);
        envoy.insert("route".into(), action.into());
    }
    if let Some(istio) = headers(rng, &mut envoy) {
        said.istio.insert("headers".into(), istio);
    }
    if envoy.contains_key("route") {
        let mut destination = json!({"destination": {"host": "@host"}});
        let mut all = Vec::new();
        // Of several, each has headers of its own; those of the only one are the route's.
        let mut own = chance(rng, 25).then(|| Map::from_iter([("name".to_owned(), json!("@cluster")), ("weight".to_owned(), json!(100))]));
        if own.is_some() {
            destination["weight"] = 100.into();
            all.push(json!({"destination": {"host": "@host"}, "weight": 0, "headers": {"request": {"set": {"x-never": "1"}}}}));
        }
        if chance(rng, 30)
            && let Some(istio) = headers(rng, own.as_mut().unwrap_or(&mut envoy))
        {
            destination["headers"] = istio;
        }
        all.push(destination);
        if let Some(cluster) = own {
            let action = envoy["route"].as_object_mut().expect("an action");
            action.remove("cluster");
            action.insert("weighted_clusters".into(), json!({"clusters": [cluster]}));
        }
        said.istio.insert("route".into(), all.into());
    }
    let mut filters = Map::new();
    if chance(rng, 15) {
        let (istio, theirs) = cors(rng);
        said.istio.insert("corsPolicy".into(), istio);
        filters.insert("envoy.filters.http.cors".into(), theirs);
    }
    if chance(rng, 8) {
        said.istio.insert("fault".into(), json!({"abort": {"httpStatus": 466, "percentage": {"value": 100}}}));
        let theirs = json!({"@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
            "abort": {"http_status": 466, "percentage": {"numerator": 100}}});
        filters.insert("envoy.filters.http.fault".into(), theirs);
    }
    if !filters.is_empty() {
        envoy.insert("typed_per_filter_config".into(), filters.into());
    }
    let all = if conditions.is_empty() { vec![json!({"prefix": "/"})] } else { conditions.into_iter().map(|c| c.envoy.into()).collect() };
    let with = |matched: Value| {
        let mut route = envoy.clone();
        route.insert("match".into(), matched);
        Value::from(route)
    };
    (said.istio.into(), all.into_iter().map(with).collect())
}

fn request(rng: &mut Rng) -> String {
    let method = if chance(rng, 70) { "GET" } else { pick(rng, &["POST", "HEAD", "PUT", "OPTIONS", "DELETE"]) };
    let path = pick(rng, &PATHS);
    let query = if chance(rng, 35) {
        pick(rng, &["?", "?q=1", "?q=12&p=ab", "?p=ab&q=", "?q", "?q=x%20y", "?p=a,b", "?Q=1", "?q=2&q=1"])
    } else {
        ""
    };
    let host = if chance(rng, 75) { "a.example" } else { pick(rng, &["b.example", "A.example", "a.example:80", "a.example:8080"]) };
    let mut text = format!("{method} {path}{query} HTTP/1.1\r\nhost: {host}\r\n");
    for name in ["x-v", "x-w", "x-cap", "User-Agent", "x-add", "x-rm", "X-Both"] {
        // Envoy joins what it takes for one header in any case, such as this one.
        let times = if chance(rng, 25) { 1 + usize::from(name != "User-Agent" && chance(rng, 15)) } else { 0 };
        for _ in 0..times {
            text += &format!("{name}: {}\r\n", if chance(rng, 10) { "" } else { pick(rng, &VALUES) });
        }
    }
    if chance(rng, 20) {
        text += &format!("origin: {}\r\n", pick(rng, &["http://good.example", "http://x.good.example", "http://bad.example"]));
    }
    if method == "OPTIONS" && chance(rng, 70) {
        text += "access-control-request-method: PUT\r\n";
    }
    if matches!(method, "POST" | "PUT") {
        text += "content-length: 0\r\n";
    }
    text + "\r\n"
}

pub fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |v| v.parse().expect("a number"))
}

pub fn all() -> Vec<Case> {
    let mut all = Vec::new();
    let seed = number("ROUTES_SEED", 1);
    for of in 0..number("ROUTES", ROUTES) {
        let mut rng = Rng::with_seed(seed * 1_000_000 + of);
        let (mut rules, mut routes) = (Vec::new(), Vec::new());
        let count = 2 + rng.usize(..4);
        for index in 0..=count {
            let (istio, envoy) = rule(&mut rng, index, index == count);
            rules.push(istio);
            routes.extend(envoy);
        }
        if std::env::var("CASE").is_ok_and(|only| format!("random-{seed}-{of}-").contains(&only)) {
            println!("{}\n{}", Value::from(rules.clone()), Value::from(routes.clone()));
        }
        for i in 0..REQUESTS {
            let mut case = case(format!("random-{seed}-{of}-{i}"), &request(&mut rng), ANSWER, End::Keep);
            case.routes = Some((rules.clone().into(), routes.clone().into()));
            all.push(case);
        }
    }
    all
}
