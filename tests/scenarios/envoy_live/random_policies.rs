//! Policies and requests at random: `AuthorizationPolicy`, what Istio makes of it for Envoy, and requests that more or less fit. The same
//! ones every time; `POLICIES_SEED` makes others and `POLICIES` more of them.

use fastrand::Rng;
use mesh_tests::engine::security;
use serde_json::{Map, Value, json};

use super::{
    policies::{Group, TYPES, exactly, header, named_request, path},
    random::{chance, number, pick},
};

/// Sets of policies, and requests to each.
const POLICIES: u64 = 30;
const REQUESTS: usize = 8;

const PATHS: [&str; 8] = ["/", "/a", "/a/b", "/ab", "/b", "/b/a", "/a/b/c", "/A"];
const HOSTS: [&str; 4] = ["a.example", "A.example", "b.example", "a.example:8080"];
const METHODS: [&str; 4] = ["GET", "POST", "HEAD", "DELETE"];
const VALUES: [&str; 5] = ["v", "vv", "w", "xv", "v,w"];

/// A value with a star or without, and what a matcher makes of it.
fn value(rng: &mut Rng, of: &[&str]) -> (String, Value) {
    let text = pick(rng, of);
    match rng.u32(..6) {
        0 => (format!("{text}*"), json!({"prefix": text})),
        1 => (format!("*{text}"), json!({"suffix": text})),
        _ => (text.to_owned(), json!({"exact": text})),
    }
}

/// A value of a host, which is one in any case.
fn host(rng: &mut Rng) -> (String, Value) {
    let (text, _) = value(rng, &HOSTS);
    let expression = text.replace('.', "\\.").replace('*', ".*");
    (text, json!({"safe_regex": {"regex": format!("(?i){expression}")}}))
}

fn any_of(all: Vec<Value>, kind: &str) -> Value {
    json!({format!("or_{kind}s"): {format!("{kind}s"): all}})
}

fn all_of(mut all: Vec<Value>, kind: &str) -> Value {
    if all.is_empty() {
        all.push(json!({"any": true}));
    }
    json!({format!("and_{kind}s"): {format!("{kind}s"): all}})
}

/// Kinds of conditions, as Envoy calls them.
const RULE: &str = "rule";
const ID: &str = "id";

/// One field and its twin, each sometimes: values of which one has to match, and of which none may.
fn field(
    rng: &mut Rng,
    likely: u32,
    name: (&str, &str),
    kind: &str,
    said: &mut Map<String, Value>,
    all: &mut Vec<Value>,
    one: impl Fn(&mut Rng) -> (String, Value),
) {
    for (field, negative, likely) in [(name.0, false, likely), (name.1, true, likely / 2)] {
        if !chance(rng, likely) {
            continue;
        }
        let (texts, matchers): (Vec<_>, Vec<_>) = (0..1 + rng.usize(..2)).map(|_| one(rng)).unzip();
        said.insert(field.to_owned(), texts.into());
        let any = any_of(matchers, kind);
        all.push(if negative { json!({format!("not_{kind}"): any}) } else { any });
    }
}

fn operation(rng: &mut Rng) -> (Value, Value) {
    let (mut said, mut all) = (Map::new(), Vec::new());
    field(rng, 50, ("paths", "notPaths"), RULE, &mut said, &mut all, |rng| {
        let (text, matcher) = value(rng, &PATHS);
        (text, path(matcher))
    });
    field(rng, 30, ("methods", "notMethods"), RULE, &mut said, &mut all, |rng| {
        let (text, matcher) = value(rng, &METHODS);
        (text, header(":method", json!({"string_match": matcher})))
    });
    field(rng, 20, ("hosts", "notHosts"), RULE, &mut said, &mut all, |rng| {
        let (text, matcher) = host(rng);
        (text, header(":authority", json!({"string_match": matcher})))
    });
    if said.is_empty() {
        said.insert("methods".into(), json!(["GET"]));
        all.push(header(":method", exactly("GET")));
    }
    (said.into(), all_of(all, RULE))
}

fn block(rng: &mut Rng) -> (String, Value) {
    let (text, address, bits) =
        *pick(rng, &[&("127.0.0.0/8", "127.0.0.0", 8), &("10.0.0.0/8", "10.0.0.0", 8), &("127.0.0.1", "127.0.0.1", 32)]);
    (text.to_owned(), json!({"direct_remote_ip": {"address_prefix": address, "prefix_len": bits}}))
}

fn source(rng: &mut Rng) -> (Value, Value) {
    let (mut said, mut all) = (Map::new(), Vec::new());
    field(rng, 100, ("ipBlocks", "notIpBlocks"), ID, &mut said, &mut all, block);
    (said.into(), all_of(all, ID))
}

fn when(rng: &mut Rng) -> (Value, Value) {
    let (mut said, mut all) = (Map::new(), Vec::new());
    if chance(rng, 80) {
        let name = pick(rng, &["x-a", "X-B"]);
        let one = |rng: &mut Rng| {
            if chance(rng, 10) {
                return ("*".to_owned(), header(name, json!({"present_match": true})));
            }
            let (text, matcher) = value(rng, &VALUES);
            (text, header(name, json!({"string_match": matcher})))
        };
        field(rng, 70, ("values", "notValues"), ID, &mut said, &mut all, one);
        if said.is_empty() {
            said.insert("values".into(), json!(["v"]));
            all.push(header(name, exactly("v")));
        }
        said.insert("key".into(), format!("request.headers[{name}]").into());
    } else {
        field(rng, 100, ("values", "notValues"), ID, &mut said, &mut all, block);
        said.insert("key".into(), "source.ip".into());
    }
    (said.into(), all_of(all, ID))
}

/// One rule, and its permissions and principals.
fn rule(rng: &mut Rng) -> (Value, Value) {
    let mut said = Map::new();
    let (mut permissions, mut principals) = (Vec::new(), Vec::new());
    if chance(rng, 70) {
        let (texts, matchers): (Vec<_>, Vec<_>) = (0..1 + rng.usize(..2)).map(|_| operation(rng)).unzip();
        said.insert("to".into(), texts.into_iter().map(|o| json!({"operation": o})).collect());
        permissions.push(any_of(matchers, RULE));
    }
    if chance(rng, 25) {
        let (texts, matchers): (Vec<_>, Vec<_>) = (0..1 + rng.usize(..2)).map(|_| source(rng)).unzip();
        said.insert("from".into(), texts.into_iter().map(|s| json!({"source": s})).collect());
        principals.push(any_of(matchers, ID));
    }
    if chance(rng, 40) {
        let (texts, matchers): (Vec<_>, Vec<_>) = (0..1 + rng.usize(..2)).map(|_| when(rng)).unzip();
        said.insert("when".into(), texts.into());
        principals.extend(matchers);
    }
    (said.into(), json!({"permissions": [all_of(permissions, RULE)], "principals": [all_of(principals, ID)]}))
}

/// Policies of one action, and Envoy's filter for them.
fn policies(rng: &mut Rng, action: &str, most: usize) -> (Vec<Value>, Option<Value>) {
    let (mut all, mut theirs) = (Vec::new(), Map::new());
    let number = rng.usize(..=most);
    for i in 0..number {
        let name = format!("{}-{i}", action.to_lowercase());
        let (rules, matchers): (Vec<_>, Vec<_>) = (0..1 + rng.usize(..2)).map(|_| rule(rng)).unzip();
        all.push(security("AuthorizationPolicy", &name, &json!({"action": action, "rules": rules})));
        theirs.extend(matchers.into_iter().enumerate().map(|(rule, m)| (format!("ns[default]-policy[{name}]-rule[{rule}]"), m)));
    }
    let filter = json!({"name": format!("envoy.filters.http.rbac.{action}"), "typed_config": {"@type": format!("{TYPES}.rbac.v3.RBAC"),
        "rules": {"action": action, "policies": theirs}}});
    (all, (number > 0).then_some(filter))
}

pub fn all() -> Vec<Group> {
    let seed = number("POLICIES_SEED", 1);
    let group = |of: u64| {
        let mut rng = Rng::with_seed(seed * 1_000_000 + of);
        let (mut all, denied) = policies(&mut rng, "DENY", 2);
        let (allowing, allowed) = policies(&mut rng, "ALLOW", 2);
        all.extend(allowing);
        let cases = (0..REQUESTS).map(|i| {
            let (method, path) = (pick(&mut rng, &METHODS), pick(&mut rng, &PATHS));
            let mut headers = vec![format!("host: {}", pick(&mut rng, &HOSTS))];
            for name in ["x-a", "x-b"] {
                let times = if chance(&mut rng, 50) { 1 + usize::from(chance(&mut rng, 15)) } else { 0 };
                headers.extend((0..times).map(|_| format!("{name}: {}", pick(&mut rng, &VALUES))));
            }
            named_request(&format!("random-{seed}-{of}"), &i.to_string(), method, path, &headers.join("\r\n"))
        });
        Group { cases: cases.collect(), policies: all, filters: denied.into_iter().chain(allowed).collect() }
    };
    (0..number("POLICIES", POLICIES)).map(group).collect()
}
