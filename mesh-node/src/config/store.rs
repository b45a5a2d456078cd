//! The objects in force, and what became of every object a source has shown.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
    path::PathBuf,
    sync::Arc,
};

use crate::resource::{Key, Named, Rejection};

/// Where an object comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin(pub Arc<PathBuf>);

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// What a source has to say of one origin. It replaces all that was said of it before.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub origin: Origin,
    pub content: Content,
}

/// What an origin holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Read: these objects, these that cannot be honoured, and what is wrong with documents of which it cannot be told what they hold.
    Read { objects: Vec<Named>, rejections: Vec<Rejection>, unread: Vec<String> },
    /// Cannot be read: what it held last stays in force.
    Unreadable(String),
    /// Is no longer there.
    Gone,
}

/// A remark on an object, for the operator.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Status {
    pub origin: String,
    pub severity: Severity,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The object, or the file, is not in force.
    Error,
    /// It is in force, but not everything in it can be.
    Warning,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{}: {severity}: {}", self.origin, self.message)
    }
}

#[derive(Debug, Default)]
struct File {
    objects: BTreeMap<Key, Arc<Named>>,
    /// Those of them that stand in for what cannot be read.
    stand_ins: BTreeSet<Key>,
    errors: Vec<String>,
}

/// Last good objects by origin. An object that turned bad keeps its last good version; one that is gone is gone.
#[derive(Debug, Default)]
pub struct Store {
    files: BTreeMap<Origin, File>,
    /// Where each object is, by origin: the first counts.
    places: BTreeMap<Key, BTreeMap<Origin, Arc<Named>>>,
}

impl Store {
    /// Takes a change in. True when an object in force, or a status, may differ.
    pub fn apply(&mut self, change: Change) -> bool {
        let Change { origin, content } = change;
        match content {
            Content::Gone => {
                let old = self.files.remove(&origin);
                old.iter().for_each(|old| self.displace(&origin, old));
                old.is_some()
            }
            Content::Unreadable(problem) => {
                // A directory has its files in its name.
                let below =
                    |(other, file): (&Origin, &File)| other.0.starts_with(&*origin.0) && *other != origin && !file.objects.is_empty();
                let holds_some = self.files.iter().any(below);
                let file = self.files.entry(origin).or_default();
                let rest = match (file.objects.is_empty(), holds_some) {
                    (false, _) => "what this file held before stays in force",
                    (true, true) => "what was below it before stays in force",
                    (true, false) => "nothing of this file is in force",
                };
                file.errors = vec![format!("{problem}; {rest}")];
                true
            }
            Content::Read { objects, rejections, unread } => {
                let old = self.files.remove(&origin).unwrap_or_default();
                self.displace(&origin, &old);
                let file = read(old, objects, rejections, unread);
                for (key, named) in &file.objects {
                    self.places.entry(key.clone()).or_default().insert(origin.clone(), named.clone());
                }
                self.files.insert(origin, file);
                true
            }
        }
    }

    fn displace(&mut self, origin: &Origin, old: &File) {
        for key in old.objects.keys() {
            if let Entry::Occupied(mut places) = self.places.entry(key.clone()) {
                places.get_mut().remove(origin);
                if places.get().is_empty() {
                    places.remove();
                }
            }
        }
    }

    /// The objects in force by their keys, each once: of several the first by origin counts.
    pub fn objects(&self) -> impl Iterator<Item = &Named> {
        self.places.values().filter_map(|places| places.values().next()).map(|named| &**named)
    }

    /// What is wrong with what was read.
    pub fn statuses(&self) -> Vec<Status> {
        let error = |origin: &Origin, message: String| Status { origin: origin.to_string(), severity: Severity::Error, message };
        let unread = self.files.iter().flat_map(|(origin, file)| file.errors.iter().map(move |message| error(origin, message.clone())));
        let again = self.places.iter().flat_map(|(key, places)| {
            let mut origins = places.keys();
            let first = origins.next();
            first.into_iter().flat_map(move |first| origins.clone().map(move |other| (key, first, other)))
        });
        let again = again.map(|(key, first, other)| {
            error(other, format!("{key}: metadata.name: is also defined in {first}, which is used; remove one of them"))
        });
        unread.chain(again).collect()
    }

    /// The origin whose version of an object is in force.
    pub fn origin_of(&self, key: &Key) -> Option<&Origin> {
        self.places.get(key)?.keys().next()
    }
}

fn read(mut old: File, objects: Vec<Named>, rejections: Vec<Rejection>, unread: Vec<String>) -> File {
    let mut file = File::default();
    for named in objects {
        let key = named.key.clone();
        if file.objects.insert(key.clone(), Arc::new(named)).is_some() {
            file.errors.push(format!("{key}: metadata.name: is defined twice in this file, the last one is used; remove one of them"));
        }
    }
    for rejection in rejections {
        // What stood in gives way to what stands in now, and stays where nothing does.
        let stood_in = |key: &Key| old.stand_ins.contains(key);
        let keep = rejection.key.as_ref().filter(|key| rejection.instead.is_none() || !stood_in(key));
        let partly = keep.is_some_and(stood_in);
        let kept = keep.and_then(|key| old.objects.remove_entry(key));
        let remark = match (&kept, &rejection.instead) {
            (Some(_), _) if partly => "; what could be read of it before stays in force",
            (Some(_), _) => "; its last good version stays in force",
            (None, Some(_)) => "; what can be read of it is in force",
            (None, None) => "",
        };
        file.errors.push(format!("{rejection}{remark}"));
        let stands_in = partly || kept.is_none();
        let Some((key, named)) = kept.or_else(|| rejection.instead.map(|named| (named.key.clone(), Arc::new(*named)))) else { continue };
        if let Entry::Vacant(entry) = file.objects.entry(key.clone()) {
            entry.insert(named);
            if stands_in {
                file.stand_ins.insert(key);
            }
        }
    }
    // Any object that is not there any more may be in what was not read.
    if !unread.is_empty() {
        for (key, named) in old.objects {
            if let Entry::Vacant(entry) = file.objects.entry(key.clone()) {
                entry.insert(named);
                if old.stand_ins.contains(&key) {
                    file.stand_ins.insert(key);
                }
            }
        }
    }
    file.errors
        .extend(unread.into_iter().map(|problem| format!("{problem}; what this file held before, and does not show now, stays in force")));
    file
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resource::{self, Parsed};

    fn origin(path: &str) -> Origin {
        Origin(Arc::new(path.into()))
    }

    fn content(documents: &[serde_json::Value]) -> Content {
        let (mut objects, mut rejections) = (Vec::new(), Vec::new());
        for document in documents {
            match resource::parse(document, "default") {
                Ok(Parsed::Object(named)) => objects.push(*named),
                Ok(Parsed::Ignored(_)) => {}
                Err(rejection) => rejections.push(rejection),
            }
        }
        Content::Read { objects, rejections, unread: Vec::new() }
    }

    fn peer_authentication(name: &str, mode: &str) -> serde_json::Value {
        json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": name}, "spec": {"mtls": {"mode": mode}}})
    }

    fn names(store: &Store) -> Vec<String> {
        store.objects().map(|named| named.key.name.name.to_string()).collect()
    }

    #[test]
    fn a_rejected_object_keeps_its_last_good_version_and_the_rest_goes_on() {
        let mut store = Store::default();
        store.apply(Change { origin: origin("a"), content: content(&[peer_authentication("x", "STRICT")]) });
        store.apply(Change {
            origin: origin("a"),
            content: content(&[peer_authentication("x", "bad"), peer_authentication("y", "STRICT")]),
        });
        assert_eq!(names(&store), ["x", "y"]);
        let statuses = store.statuses();
        let text = statuses.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert!(
            statuses.len() == 1 && text.contains("PeerAuthentication default/x: spec.mtls.mode") && text.contains("last good"),
            "{text}"
        );
    }

    #[test]
    fn an_allow_policy_that_cannot_be_read_leaves_nothing_open() {
        let policy = |spec: serde_json::Value, annotation: &str| {
            json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "p", "annotations": {"istio.io/dry-run": annotation}}, "spec": spec})
        };
        let rule = |key: &str| json!({"when": [{"key": key, "values": ["x"]}]});
        let (good, bad) = (rule("source.namespace"), rule("experimental.envoy.filters.a"));
        let selector = json!({"matchLabels": {"app": "a"}});
        for (what, spec, annotation, rules) in [
            ("what can be read", json!({"selector": selector, "rules": [bad, good]}), "false", Some(1)),
            ("nothing", json!({"rules": [bad]}), "false", Some(0)),
            ("the whole, enforced", json!({"action": "DENY", "rules": [good]}), "yes", Some(1)),
            ("a field nobody knows", json!({"selector": selector, "rules": [good], "wat": 1}), "false", Some(0)),
            ("a field that may have said for whom", json!({"selecter": selector, "rules": [good]}), "false", None),
            (
                "an authorizer that is not asked",
                json!({"selector": selector, "provider": {"name": "x"}, "rules": [good]}),
                "false",
                Some(0),
            ),
            ("one that denies", json!({"action": "DENY", "rules": [bad, good]}), "false", None),
            ("one that is only told", json!({"rules": [bad]}), "true", None),
            ("for whom is not known", json!({"selector": 1, "rules": [good]}), "false", None),
        ] {
            let mut store = Store::default();
            store.apply(Change { origin: origin("a"), content: content(&[policy(spec, annotation)]) });
            let found = store.objects().find_map(|named| match &named.object {
                resource::Object::AuthorizationPolicy(p) => Some(p.rules.len()),
                _ => None,
            });
            assert_eq!(found, rules, "{what}");
            assert_eq!(store.statuses().len(), 1, "{what}");
        }
        // What stands in is no good version.
        let mut store = Store::default();
        store.apply(Change { origin: origin("a"), content: content(&[policy(json!({"rules": [bad]}), "false")]) });
        store.apply(Change { origin: origin("a"), content: content(&[policy(json!({"rules": [bad, good]}), "false")]) });
        assert!(store.statuses()[0].message.contains("what can be read of it is in force"));
        store.apply(Change { origin: origin("a"), content: content(&[policy(json!({"rules": [good]}), "false")]) });
        store.apply(Change { origin: origin("a"), content: content(&[policy(json!({"rules": [bad]}), "false")]) });
        assert!(store.statuses()[0].message.contains("last good version"));
    }

    #[test]
    fn what_stands_in_for_a_policy_stays_until_there_is_better() {
        let policy = |version: &str, labels: serde_json::Value, spec: serde_json::Value| {
            json!({"apiVersion": format!("security.istio.io/{version}"), "kind": "AuthorizationPolicy",
                "metadata": {"name": "p", "labels": labels}, "spec": spec})
        };
        let rule = |key: &str| json!({"when": [{"key": key, "values": ["x"]}]});
        let (good, bad) = (rule("source.namespace"), rule("experimental.envoy.filters.a"));
        let rules = |store: &Store| {
            store.objects().find_map(|named| match &named.object {
                resource::Object::AuthorizationPolicy(p) => Some(p.rules.len()),
                _ => None,
            })
        };
        // Whatever it is that cannot be read.
        let unread = [
            policy("v1", json!({"a": "b"}), json!({"rules": [good, bad]})),
            policy("v1", json!({"a": 1}), json!({"rules": [good]})),
            policy("v7", json!({}), json!({"rules": [good]})),
        ];
        for document in &unread {
            let mut store = Store::default();
            for _ in 0..2 {
                store.apply(Change { origin: origin("a"), content: content(std::slice::from_ref(document)) });
                assert_eq!(rules(&store), Some(1), "{document}");
            }
            let worse = policy("v1", json!({}), json!({"selector": 1, "rules": []}));
            for _ in 0..2 {
                store.apply(Change { origin: origin("a"), content: content(std::slice::from_ref(&worse)) });
                assert_eq!(rules(&store), Some(1), "{document}");
                assert!(store.statuses()[0].message.contains("before stays in force"), "{:?}", store.statuses());
            }
            // It is no good version: what can be read of a later one comes instead.
            let other = policy("v1", json!({}), json!({"rules": [bad]}));
            store.apply(Change { origin: origin("a"), content: content(&[other]) });
            assert_eq!(rules(&store), Some(0), "{document}");
        }
        // A good version stays one, however often the broken one is there.
        let mut store = Store::default();
        store.apply(Change { origin: origin("a"), content: content(&[policy("v1", json!({}), json!({"rules": [good]}))]) });
        for _ in 0..3 {
            let broken = policy("v1", json!({}), json!({"rules": [bad]}));
            store.apply(Change { origin: origin("a"), content: content(&[broken.clone(), broken]) });
            assert_eq!(rules(&store), Some(1));
        }
    }

    #[test]
    fn a_header_or_version_that_cannot_be_read_keeps_the_last_good_object_too() {
        let namespace = |label: serde_json::Value| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n", "labels": {"rev": label}}});
        let mut other = peer_authentication("x", "STRICT");
        other["apiVersion"] = json!("security.istio.io/v2");
        let mut store = Store::default();
        store.apply(Change { origin: origin("a"), content: content(&[namespace(json!("1")), peer_authentication("x", "STRICT")]) });
        store.apply(Change { origin: origin("a"), content: content(&[namespace(json!(1)), other]) });
        assert_eq!(names(&store), ["n", "x"]);
        let text = store.statuses().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert!(text.contains("Namespace n: metadata.labels") && text.contains("PeerAuthentication default/x: apiVersion"), "{text}");
        assert_eq!(text.matches("last good").count(), 2, "{text}");
    }

    #[test]
    fn what_a_document_that_is_not_read_may_have_been_stays() {
        let with = |documents: &[serde_json::Value], unread: &[&str]| match content(documents) {
            Content::Read { objects, rejections, .. } => {
                Content::Read { objects, rejections, unread: unread.iter().map(ToString::to_string).collect() }
            }
            other => other,
        };
        let mut store = Store::default();
        store.apply(Change { origin: origin("a"), content: content(&["x", "y"].map(|name| peer_authentication(name, "STRICT"))) });
        let now = [peer_authentication("x", "DISABLE"), peer_authentication("z", "STRICT")];
        for _ in 0..2 {
            store.apply(Change { origin: origin("a"), content: with(&now, &["line 7: no"]) });
            assert_eq!(names(&store), ["x", "y", "z"]);
            let modes = store.objects().map(|named| format!("{:?}", named.object)).filter(|o| o.contains("Disable")).count();
            assert_eq!((modes, store.statuses().len()), (1, 1));
        }
        store.apply(Change { origin: origin("a"), content: with(&now, &[]) });
        assert_eq!((names(&store).len(), store.statuses().len()), (2, 0));
    }

    #[test]
    fn an_unreadable_file_changes_nothing_but_its_status() {
        let mut store = Store::default();
        store.apply(Change { origin: origin("a"), content: content(&[peer_authentication("x", "STRICT")]) });
        store.apply(Change { origin: origin("a"), content: Content::Unreadable("line 3: no".into()) });
        assert_eq!((names(&store).len(), store.statuses().len()), (1, 1));
        store.apply(Change { origin: origin("a"), content: Content::Gone });
        assert_eq!((names(&store).len(), store.statuses().len()), (0, 0));
    }

    #[test]
    fn an_object_in_two_files_is_taken_from_the_first_and_named() {
        let mut store = Store::default();
        store.apply(Change { origin: origin("b"), content: content(&[peer_authentication("x", "STRICT")]) });
        store.apply(Change { origin: origin("a"), content: content(&[peer_authentication("x", "PERMISSIVE")]) });
        assert_eq!(store.objects().count(), 1);
        let text = store.statuses()[0].to_string();
        assert!(text.starts_with("b: error: PeerAuthentication default/x") && text.contains("also defined in a"), "{text}");
    }
}
