//! What else is wrong with a document: reading it ends at the first mistake, so it is read again without what that one is about.

use serde_json::Value;

use super::{Rejection, parse};

/// Mistakes told of beside the first, of one document.
const MAX_FURTHER: usize = 9;

/// An element that was taken out of a list: the list, and the place it had.
struct Taken {
    list: String,
    index: usize,
}

/// What is refused of a document besides what it was refused for. None of these is a refusal of its own: they name no object to keep.
pub fn further(document: &Value, default_namespace: &str, first: &Rejection) -> Vec<Rejection> {
    let (mut rest, mut found, mut taken) = (document.clone(), Vec::<Rejection>::new(), Vec::new());
    let mut at = first.field.clone();
    while first.key.is_some() && found.len() < MAX_FURTHER && !is_telling(&at) && take_out(&mut rest, &at, &mut taken) {
        let Err(next) = parse(&rest, default_namespace) else { break };
        at.clone_from(&next.field);
        let field = as_written(&next.field, &taken);
        // What is said of the place something was taken from, or of what it was a part of, may be said because it was.
        let follows = |before: &str| before == field || before.strip_prefix(&*field).is_some_and(|rest| rest.starts_with(['.', '[']));
        if next.key != first.key || std::iter::once(first).chain(&found).any(|before| follows(&before.field)) {
            break;
        }
        found.push(Rejection { field, key: None, instead: None, ..next });
    }
    found
}

/// Whether something else would be meant without a field: what were said then would be about that.
fn is_telling(field: &str) -> bool {
    const TELLING: [&str; 8] = ["action", "provider", "jwks", "jwksUri", "issuer", "type", "mode", "kind"];
    field.rsplit(['.', ']']).next().is_some_and(|name| TELLING.contains(&name))
}

/// Removes what is at a path such as `spec.http[7].timeout`. False when there is nothing.
fn take_out(node: &mut Value, path: &str, taken: &mut Vec<Taken>) -> bool {
    fn within(node: &mut Value, path: &str, at: String, taken: &mut Vec<Taken>) -> bool {
        match node {
            Value::Array(items) => {
                let Some((index, rest)) = path.strip_prefix('[').and_then(|p| p.split_once(']')) else { return false };
                let Some(index) = index.parse::<usize>().ok().filter(|i| *i < items.len()) else { return false };
                if rest.is_empty() {
                    items.remove(index);
                    let index = original(&at, index, taken);
                    taken.push(Taken { list: at, index });
                    return true;
                }
                let written = original(&at, index, taken);
                items.get_mut(index).is_some_and(|item| within(item, rest.trim_start_matches('.'), format!("{at}[{written}]"), taken))
            }
            Value::Object(fields) => {
                // Names may have dots in them: the longest that is there.
                let follows = |key: &str| path.strip_prefix(key).filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
                let there = || fields.keys().filter_map(|key| Some((key.clone(), follows(key)?))).max_by_key(|(key, _)| key.len());
                let quoted = path.strip_prefix('[').and_then(|p| p.split_once(']')).map(|(key, rest)| (key.to_owned(), rest));
                let key = quoted.or_else(there);
                let Some((key, rest)) = key else { return false };
                if rest.is_empty() {
                    return fields.remove(&key).is_some();
                }
                let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                fields.get_mut(&key).is_some_and(|field| within(field, rest.trim_start_matches('.'), at, taken))
            }
            _ => false,
        }
    }
    !path.is_empty() && within(node, path, String::new(), taken)
}

/// The place an element had before others of its list were taken out.
fn original(list: &str, index: usize, taken: &[Taken]) -> usize {
    let mut gone = taken.iter().filter(|t| t.list == list).map(|t| t.index).collect::<Vec<_>>();
    gone.sort_unstable();
    gone.into_iter().fold(index, |index, gone| if gone <= index { index + 1 } else { index })
}

/// A path in what is left, as it is in the document.
fn as_written(path: &str, taken: &[Taken]) -> String {
    let mut written = String::new();
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('[') {
        written.push_str(before);
        let Some((index, after)) = after.split_once(']') else { break };
        let index = index.parse::<usize>().map_or_else(|_| index.to_owned(), |index| original(&written, index, taken).to_string());
        written.push_str(&format!("[{index}]"));
        rest = after;
    }
    written + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn all(document: &Value) -> Vec<String> {
        let first = parse(document, "default").expect_err("refused");
        let further = further(document, "default", &first);
        assert!(further.iter().all(|r| r.key.is_none() && r.object == first.object));
        std::iter::once(first).chain(further).map(|r| r.field).collect()
    }

    #[test]
    fn every_mistake_is_told_where_it_is() {
        let policy = |spec: Value| json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p"}, "spec": spec});
        let blocks = json!([{"source": {"ipBlocks": ["a", "10.0.0.0/8", "b", "c", "::/0"]}}]);
        let when = json!([{"key": "source.namespace", "values": ["a"]}, {"key": "nonsense", "values": ["a"]}]);
        assert_eq!(
            all(&policy(json!({"rules": [{"from": blocks, "when": when}, {"wat": 1}]}))),
            [
                "spec.rules[1].wat",
                "spec.rules[0].from[0].source.ipBlocks[0]",
                "spec.rules[0].from[0].source.ipBlocks[2]",
                "spec.rules[0].from[0].source.ipBlocks[3]",
                "spec.rules[0].when[1].key",
            ]
        );
        let service = json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "v"}, "spec": {"hosts": ["a"],
            "http": [{"timeout": "soon", "route": [{"destination": {"host": "a", "port": {"number": 0}}}], "headers": {"request": {"set": {"a b": "c", "x.y": "%"}}}}]}});
        assert_eq!(all(&service).len(), 4, "{:?}", all(&service));
    }

    #[test]
    fn what_follows_from_a_removal_is_not_told() {
        let service = |http: Value| json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "v"}, "spec": {"hosts": ["a"], "http": http}});
        // Without its only destination the route would have none.
        assert_eq!(all(&service(json!([{"route": [{"destination": 7}]}]))).len(), 1);
        assert_eq!(all(&service(json!(7))).len(), 1);
        let custom = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p"},
            "spec": {"action": "CUSTOMM", "provider": {"name": "x"}}});
        assert_eq!(all(&custom), ["spec.action"]);
        let keys = json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "p"},
            "spec": {"jwtRules": [{"issuer": "me@x", "jwks": "garbage"}]}});
        assert_eq!(all(&keys), ["spec.jwtRules[0].jwks"]);
        let version = json!({"apiVersion": "security.istio.io/v7", "kind": "PeerAuthentication", "metadata": {"name": "p"}, "spec": {"mtls": {"mode": "x"}}});
        assert_eq!(all(&version), ["apiVersion"]);
        assert_eq!(further(&json!([]), "default", &parse(&json!([]), "default").expect_err("refused")).len(), 0);
    }

    #[test]
    fn there_is_an_end() {
        let fields = (0..50).map(|i| (format!("wat{i}"), json!(1))).collect::<serde_json::Map<_, _>>();
        let document =
            json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "p"}, "spec": fields});
        assert_eq!(all(&document).len(), 1 + MAX_FURTHER);
    }
}
