//! From the text of a file to objects: any mix of Kubernetes YAML or JSON documents, `List`s included.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{
    config::store::Content,
    resource::{self, Key, Parsed, Rejection},
};

/// The largest file read, bytes.
pub const MAX_FILE: u64 = 64 * 1024 * 1024;
/// YAML events, nodes and documents of one file: far above what fits in [`MAX_FILE`] honestly, far below what aliases could
/// blow it up to.
const MAX_EVENTS: usize = 16_000_000;
const MAX_DOCUMENTS: usize = 200_000;
/// Nesting of `List`s within `List`s.
const MAX_LISTS: usize = 4;

/// Documents of a file that are each told about when they cannot be read.
const MAX_TOLD: usize = 10;

/// What namespaces mean to objects that are read.
#[derive(Debug, Clone, Copy)]
pub struct Namespaces<'n> {
    /// Of objects that name none.
    pub default: &'n str,
    /// The mesh's own. Objects that count in it alone, or not in it, are refused elsewhere, as others are whose fields mean nothing; where it is
    /// not known they are not.
    pub root: Option<&'n str>,
}

impl<'n> From<&'n str> for Namespaces<'n> {
    fn from(default: &'n str) -> Self {
        Self { default, root: None }
    }
}

fn parse(document: &Value, namespaces: Namespaces<'_>) -> Result<Parsed, Rejection> {
    match (resource::parse(document, namespaces.default)?, namespaces.root) {
        (Parsed::Object(named), Some(root)) => resource::placed(named, root).map(Parsed::Object),
        (parsed, _) => Ok(parsed),
    }
}

/// Reads a file's text.
pub fn read<'n>(text: &str, namespaces: impl Into<Namespaces<'n>>) -> Content {
    let namespaces = namespaces.into();
    let Documents { documents, unread } = match documents(text) {
        Ok(documents) => documents,
        Err(problem) => return Content::Unreadable(format!("is not YAML: {problem}; correct the file")),
    };
    let (mut objects, mut rejections) = (Vec::new(), Vec::new());
    for document in documents.into_iter().flat_map(|d| flatten(d, MAX_LISTS)).map(with_mesh_config) {
        match parse(&document, namespaces) {
            Ok(Parsed::Object(named)) => objects.push(*named),
            Ok(Parsed::Ignored(kind)) => tracing::debug!(target: "config", %kind, "ignored: not a kind of the mesh"),
            Err(rejection) => {
                let further = resource::further(&document, namespaces.default, &rejection);
                rejections.push(rejection);
                rejections.extend(further);
            }
        }
    }
    Content::Read { objects, rejections, unread }
}

/// The documents of a text, those of lists among them, as far as they can be read.
pub fn items(text: &str) -> Vec<Value> {
    let all = documents(text).map(|read| read.documents).unwrap_or_default();
    all.into_iter().flat_map(|document| flatten(document, MAX_LISTS)).collect()
}

/// The documents in force of a file that says this, after it said those texts one after the other: of an object that is refused its last
/// good version, and where a document cannot be read, all that it may have been.
pub fn in_force<'n>(before: &[String], text: &str, namespaces: impl Into<Namespaces<'n>>) -> String {
    let namespaces = namespaces.into();
    // Documents, and whether each is good or there is only something to stand in for it.
    let mut all: BTreeMap<Key, (Value, bool)> = BTreeMap::new();
    for text in before.iter().map(String::as_str).chain([text]) {
        let Ok(Documents { documents, unread }) = documents(text) else { continue };
        let mut old = std::mem::take(&mut all);
        for document in documents.into_iter().flat_map(|d| flatten(d, MAX_LISTS)) {
            match parse(&with_mesh_config(document.clone()), namespaces) {
                Ok(Parsed::Object(named)) => drop(all.insert(named.key, (document, true))),
                Ok(Parsed::Ignored(_)) => {}
                Err(rejection) => {
                    let Some(key) = rejection.key else { continue };
                    let before = old.remove(&key);
                    let good = before.as_ref().is_some_and(|(_, good)| *good);
                    let now = if good || rejection.instead.is_none() { before } else { Some((document, false)) };
                    if let Some(kept) = now {
                        all.entry(key).or_insert(kept);
                    }
                }
            }
        }
        if !unread.is_empty() {
            for (key, kept) in old {
                all.entry(key).or_insert(kept);
            }
        }
    }
    let texts = all.values().map(|(document, _)| document.to_string()).collect::<Vec<_>>();
    texts.join("\n---\n")
}

/// A file's documents, and what is wrong with those that cannot be read.
struct Documents {
    documents: Vec<Value>,
    unread: Vec<String>,
}

/// Fails when nothing of a text can be read.
fn documents(text: &str) -> Result<Documents, String> {
    let whole = match yaml(text, MAX_EVENTS) {
        Ok(documents) => return Ok(Documents { documents, unread: Vec::new() }),
        Err(problem) => problem,
    };
    // What is too much is not looked at in parts, each of which might be.
    if whole.contains(TOO_MUCH) {
        return Err(whole);
    }
    let (mut documents, mut unread, mut more) = (Vec::<Value>::new(), Vec::new(), 0);
    // All pieces together may have what is written in the file, which is less than it has bytes, and little that aliases make of it.
    let mut left = MAX_EVENTS.min(text.len() * 2 + 1000);
    for (line, piece) in pieces(text) {
        match yaml(piece, left) {
            Ok(read) => {
                left = left.saturating_sub(read.iter().map(nodes).sum());
                if left == 0 || documents.len() + read.len() > MAX_DOCUMENTS {
                    return Err(TOO_MUCH.to_owned());
                }
                documents.extend(read);
            }
            Err(problem) if problem.contains(TOO_MUCH) => return Err(problem),
            Err(_) if unread.len() == MAX_TOLD => more += 1,
            // Once more where it is, so that the line is the file's.
            Err(problem) => {
                let there = yaml(&format!("{}{piece}", "\n".repeat(line)), left).err().unwrap_or(problem);
                unread.push(format!("the document at line {} is not YAML: {there}; correct it", line + 1));
            }
        }
    }
    if more > 0 {
        unread.push(format!("{more} more documents are not YAML; correct them"));
    }
    if documents.is_empty() { Err(whole) } else { Ok(Documents { documents, unread }) }
}

/// Parts of a document, aliases unfolded.
fn nodes(document: &Value) -> usize {
    1 + match document {
        Value::Array(items) => items.iter().map(nodes).sum(),
        Value::Object(fields) => fields.values().map(nodes).sum::<usize>() + fields.len(),
        _ => 0,
    }
}

fn yaml(text: &str, most: usize) -> Result<Vec<Value>, String> {
    let budget = serde_saphyr::budget! { max_events: most, max_nodes: most, max_documents: MAX_DOCUMENTS };
    let options = serde_saphyr::options! { budget: budget, with_snippet: false };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options).map_err(|e| one_line(&e.to_string()))?;
    Ok(documents.into_iter().filter(|d| !d.is_null()).collect())
}

/// A text cut before each line that begins a document (`---` at its start cannot be anything else), each piece with the lines before it.
pub(super) fn pieces(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let begins = |line: &str| line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
    let (mut rest, mut before) = (text, 0);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (mut end, mut lines) = (0, 0);
        let mut directives = true;
        for line in rest.split_inclusive('\n') {
            if lines > 0 && begins(line) && !directives {
                break;
            }
            // What is said of a document before it begins belongs to it.
            directives &= line.trim().is_empty() || line.starts_with(['%', '#']);
            end += line.len();
            lines += 1;
        }
        let (piece, after) = rest.split_at(end);
        let at = before;
        (rest, before) = (after, before + lines);
        Some((at, piece))
    })
}

/// Istio keeps its mesh-wide settings as a text within a `ConfigMap`. A text that cannot be read stays one, and is refused.
fn with_mesh_config(mut document: Value) -> Value {
    let is_config_map = document.get("kind").and_then(Value::as_str) == Some("ConfigMap");
    if is_config_map && let Some(text) = document.pointer_mut("/data/mesh") {
        let parsed = text.as_str().and_then(|t| yaml(t, MAX_EVENTS).ok()).and_then(|d| d.into_iter().next());
        if let Some(parsed) = parsed {
            *text = parsed;
        }
    }
    document
}

const TOO_MUCH: &str = "it unfolds to more than is read of a file, by its aliases or its size";

/// What the library says, without what it says to programmers.
fn one_line(text: &str) -> String {
    let text = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ");
    let text = text.replace(", set DuplicateKeyPolicy in Options if acceptable", "");
    match text.split_once("budget breached") {
        Some((before, _)) => format!("{before}{TOO_MUCH}"),
        None => text,
    }
}

/// The items of a `List` (also a `PodList` and the like), or the document itself.
fn flatten(document: Value, depth: usize) -> Vec<Value> {
    let is_list = document.get("kind").and_then(Value::as_str).is_some_and(|k| k.ends_with("List"));
    match document {
        Value::Object(mut fields) if is_list && depth > 0 => match fields.remove("items") {
            Some(Value::Array(items)) => {
                let item_kind = inherited(&fields);
                items.into_iter().flat_map(|i| flatten(with_kind(i, item_kind.as_ref()), depth - 1)).collect()
            }
            // What says it is a list, and is none, is not passed over.
            _ => vec![Value::Object(fields)],
        },
        other => vec![other],
    }
}

/// Version and kind of the items of a typed list, which need not repeat them.
fn inherited(list: &serde_json::Map<String, Value>) -> Option<(Value, Value)> {
    let kind = list.get("kind")?.as_str()?.strip_suffix("List").filter(|k| !k.is_empty())?;
    Some((list.get("apiVersion")?.clone(), Value::from(kind)))
}

fn with_kind(item: Value, inherited: Option<&(Value, Value)>) -> Value {
    match (item, inherited) {
        (Value::Object(mut fields), Some((version, kind))) => {
            fields.entry("apiVersion").or_insert_with(|| version.clone());
            fields.entry("kind").or_insert_with(|| kind.clone());
            Value::Object(fields)
        }
        (item, _) => item,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_force_is_the_last_good_of_each() {
        let policy = |name: &str, mode: &str| {
            format!(
                "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
            )
        };
        let texts = [
            policy("a", "STRICT") + &policy("b", "PERMISSIVE") + &policy("never", "bad"),
            policy("a", "PERMISSIVE") + &policy("b", "bad") + &policy("never", "bad"),
        ];
        let now = policy("a", "bad") + &policy("b", "bad") + &policy("never", "bad");
        let modes = |text: &str| {
            let Content::Read { objects, rejections, .. } = read(text, "default") else { panic!("{text}") };
            assert!(rejections.is_empty(), "{rejections:?}");
            let all = objects.iter().map(|named| match &named.object {
                resource::Object::PeerAuthentication(p) => format!("{}={:?}", named.key.name.name, p.mode),
                _ => String::new(),
            });
            all.collect::<Vec<_>>()
        };
        assert_eq!(modes(&in_force(&texts, &now, "default")), ["a=Permissive", "b=Permissive"]);
        // What is not there any more is not in force, and what was made of texts before is a text.
        let before = [in_force(&texts, &now, "default")];
        assert_eq!(modes(&in_force(&before, &policy("b", "bad"), "default")), ["b=Permissive"]);
        // A copy that cannot be read says nothing.
        let before = [before[0].clone(), "a: [".to_owned()];
        assert_eq!(modes(&in_force(&before, &policy("b", "bad"), "default")), ["b=Permissive"]);
    }

    #[test]
    fn what_stands_in_for_a_policy_is_in_force_after_a_restart_too() {
        let policy = |selector: &str, keys: &[&str]| {
            let rules = keys.iter().map(|key| format!("{{when: [{{key: {key}, values: [x]}}]}}")).collect::<Vec<_>>().join(", ");
            format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {{selector: {selector}, rules: [{rules}]}}\n"
            )
        };
        let stands_in = |text: &str| {
            let Content::Read { objects, rejections, .. } = read(text, "default") else { panic!("{text}") };
            assert!(objects.is_empty(), "{objects:?}");
            rejections.iter().filter(|r| r.instead.is_some()).count()
        };
        let (partly, unread) = (policy("{}", &["source.namespace", "nonsense"]), policy("7", &[]));
        let first = in_force(&[], &partly, "default");
        assert_eq!(stands_in(&first), 1, "{first}");
        assert_eq!(in_force(std::slice::from_ref(&first), &unread, "default"), first);
        // A good one is better, and then stays.
        let good = in_force(std::slice::from_ref(&first), &policy("{}", &["source.namespace"]), "default");
        assert_eq!(counts(&good), Some((1, 0)));
        assert_eq!(in_force(std::slice::from_ref(&good), &partly, "default"), good);
    }

    fn counts(text: &str) -> Option<(usize, usize)> {
        match read(text, "default") {
            Content::Read { objects, rejections, unread } => Some((objects.len(), rejections.len() + unread.len())),
            _ => None,
        }
    }

    const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n";

    #[test]
    fn documents_lists_and_json_are_read() {
        assert_eq!(counts(""), Some((0, 0)));
        assert_eq!(counts("---\n# nothing\n---\n"), Some((0, 0)));
        assert_eq!(counts(&format!("{NAMESPACE}---\n{}", NAMESPACE.replace("name: a", "name: b"))), Some((2, 0)));
        assert_eq!(counts(r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a"}}"#), Some((1, 0)));
        let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n- {apiVersion: apps/v1, kind: Deployment, metadata: {name: x}}\n- 7\n";
        assert_eq!(counts(list), Some((1, 1)));
        assert_eq!(counts("apiVersion: v1\nkind: NamespaceList\nitems: [{metadata: {name: a}}, {metadata: {name: b}}]\n"), Some((2, 0)));
    }

    #[test]
    fn one_bad_object_does_not_hurt_the_others() {
        let bad = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x}\nspec: {mtls: {mode: NO}}\n";
        assert_eq!(counts(&format!("{NAMESPACE}---\n{bad}---\njust text\n---\n[1, 2]\n")), Some((1, 3)));
    }

    #[test]
    fn one_document_that_is_not_yaml_does_not_hurt_the_others() {
        let text = format!("# first\n{NAMESPACE}---\nkind: Pod\n  metadata: x\n--- # third\n{}", NAMESPACE.replace("name: a", "name: b"));
        let Content::Read { objects, unread, .. } = read(&text, "default") else { panic!("{text}") };
        assert_eq!(objects.iter().map(|o| &*o.key.name.name).collect::<Vec<_>>(), ["a", "b"]);
        assert!(matches!(&*unread, [one] if one.starts_with("the document at line 6 is not YAML") && one.contains("line 8")), "{unread:?}");
        // What it may have been stays in force.
        let before = [format!("{NAMESPACE}---\n{}", NAMESPACE.replace("name: a", "name: c"))];
        assert_eq!(counts(&in_force(&before, &text, "default")), Some((3, 0)));
        let many = format!("{NAMESPACE}{}", "---\na: [\n".repeat(MAX_TOLD + 5));
        let Content::Read { unread, .. } = read(&many, "default") else { panic!() };
        assert_eq!((unread.len(), &*unread[MAX_TOLD]), (MAX_TOLD + 1, "5 more documents are not YAML; correct them"));
    }

    #[test]
    fn pieces_are_documents() {
        let all = |text| pieces(text).collect::<Vec<_>>();
        assert_eq!(all(""), []);
        assert_eq!(all("---\na: 1\n---\n"), [(0, "---\na: 1\n"), (2, "---\n")]);
        assert_eq!(all("%YAML 1.2\n---\na: 1\n---\nb"), [(0, "%YAML 1.2\n---\na: 1\n"), (3, "---\nb")]);
        assert_eq!(all("a: |\n  ---\n---b\n---\tc\n\n---"), [(0, "a: |\n  ---\n---b\n"), (3, "---\tc\n\n"), (5, "---")]);
    }

    #[test]
    fn broken_yaml_and_alias_bombs_make_the_file_unreadable() {
        assert_eq!(counts("a: [1, 2\nb: }"), None);
        assert_eq!(counts(&format!("{NAMESPACE}  labels: {{")), None);
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..12 {
            let previous = format!("*a{}", i - 1);
            bomb += &format!("a{i}: &a{i} [{}]\n", vec![previous; 9].join(", "));
        }
        assert_eq!(counts(&bomb), None);
        assert_eq!(counts(&format!("{NAMESPACE}---\n{bomb}")), None);
        assert_eq!(counts(&format!("{NAMESPACE}---\na: [\n---\n{bomb}")), None);
        // Nor are many that are each small enough.
        let mut small = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..6 {
            small += &format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 9].join(", "));
        }
        assert_eq!(counts(&small), Some((0, 1)));
        assert_eq!(counts(&format!("{NAMESPACE}---\na: [\n{}", format!("---\n{small}").repeat(100))), None);
        assert_eq!(counts(&"[".repeat(100_000)), None);
        assert_eq!(counts("\u{0}\u{1}\u{2}"), None);
    }
}
