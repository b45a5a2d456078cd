//! Where in a file a remark belongs: the line of the field it names, else of the object.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::manifest::pieces;

/// A value of YAML or JSON, with where each part of it begins.
#[derive(Debug)]
enum Node {
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
    List(Vec<Spanned<Node>>),
    Text(String),
    /// Nothing that a name or a path is made of.
    Other,
}

/// A file's objects. Those of lists are objects of their own.
#[derive(Debug, Default)]
pub struct Places(Vec<Document>);

/// A document, and the lines before what was read with it.
#[derive(Debug)]
struct Document {
    before: u64,
    node: Spanned<Node>,
}

impl Places {
    /// Of a document that cannot be read nothing is known.
    pub fn of(text: &str) -> Self {
        let read = |before: usize, text: &str| {
            let documents = serde_saphyr::from_multiple(text).ok()?.into_iter();
            Some(documents.map(|node| Document { before: before as u64, node }).collect::<Vec<_>>())
        };
        let one_by_one = || pieces(text).filter_map(|(before, piece)| read(before, piece)).flatten().collect();
        Self(read(0, text).unwrap_or_else(one_by_one))
    }

    /// The line of a field of an object, as far as it is found; `object` is `Kind namespace/name`.
    pub fn line(&self, object: &str, field: &str) -> Option<u64> {
        let (kind, name) = object.split_once(' ')?;
        let (namespace, name) = name.split_once('/').unwrap_or(("", name));
        let objects = self.0.iter().flat_map(|document| objects(&document.node, 4).into_iter().map(|node| (document.before, node)));
        let (before, node) = objects.into_iter().find(|(_, node)| node.is(kind, namespace, name))?;
        let own = node.value.get("kind").map_or(node.referenced.line(), |(key, _)| key.referenced.line());
        let spec = node.value.get("spec").map(|(_, spec)| &spec.value);
        Some(before + node.value.line(field).or_else(|| spec?.line_of_host(field)).unwrap_or(own))
    }
}

/// A document, or the items of a list.
fn objects(document: &Spanned<Node>, depth: usize) -> Vec<&Spanned<Node>> {
    let is_list = document.value.text("kind").is_some_and(|kind| kind.ends_with("List"));
    match document.value.get("items") {
        Some((_, Spanned { value: Node::List(items), .. })) if is_list && depth > 0 => {
            items.iter().flat_map(|item| objects(item, depth - 1)).collect()
        }
        _ => vec![document],
    }
}

trait Object {
    fn is(&self, kind: &str, namespace: &str, name: &str) -> bool;
}

impl Object for Spanned<Node> {
    fn is(&self, kind: &str, namespace: &str, name: &str) -> bool {
        let metadata = self.value.get("metadata").map(|(_, node)| &node.value);
        let of = |field: &str| metadata.and_then(|m| m.text(field));
        // Items of a typed list need not say what they are.
        self.value.text("kind").is_none_or(|k| k == kind)
            && of("name") == Some(name)
            && (namespace.is_empty() || of("namespace").unwrap_or("default") == namespace)
    }
}

impl Node {
    fn get(&self, name: &str) -> Option<&(Spanned<String>, Spanned<Node>)> {
        let Self::Map(fields) = self else { return None };
        fields.iter().find(|(key, _)| key.value == name)
    }

    fn text(&self, name: &str) -> Option<&str> {
        match &self.get(name)?.1.value {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The line of the deepest part of a path such as `spec.http[7].timeout` that is there.
    fn line(&self, path: &str) -> Option<u64> {
        if let Some(rest) = path.strip_prefix('[') {
            let (index, rest) = rest.split_once(']')?;
            if let (Self::List(items), Ok(index)) = (self, index.parse::<usize>()) {
                let item = items.get(index)?;
                return item.value.line(rest.trim_start_matches('.')).or(Some(item.referenced.line()));
            }
            let (key, value) = self.get(index)?;
            return value.value.line(rest.trim_start_matches('.')).or(Some(key.referenced.line()));
        }
        // Names may have dots in them: the longest that is there.
        let Self::Map(fields) = self else { return None };
        let follows = |rest: &str| rest.is_empty() || rest.starts_with(['.', '[']);
        let starts = fields.iter().filter(|(key, _)| path.strip_prefix(&*key.value).is_some_and(follows));
        let (key, value) = starts.max_by_key(|(key, _)| key.value.len())?;
        let rest = path.get(key.value.len()..).unwrap_or_default();
        value.value.line(rest.trim_start_matches('.')).or(Some(key.referenced.line()))
    }

    /// Of `destination HOST`, the line of the first place that names it.
    fn line_of_host(&self, field: &str) -> Option<u64> {
        let host = field.strip_prefix("destination ")?;
        match self {
            Self::Map(fields) => fields.iter().find_map(|(key, node)| match &node.value {
                Self::Text(text) if text == host && ["host", "name"].contains(&&*key.value) => Some(node.referenced.line()),
                other => other.line_of_host(field),
            }),
            Self::List(items) => items.iter().find_map(|item| item.value.line_of_host(field)),
            _ => None,
        }
    }
}

struct Read;

impl<'de> Visitor<'de> for Read {
    type Value = Node;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("YAML")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut fields = Vec::new();
        while let Some(entry) = map.next_entry()? {
            fields.push(entry);
        }
        Ok(Node::Map(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_str<E>(self, text: &str) -> Result<Node, E> {
        Ok(Node::Text(text.to_owned()))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_i128<E>(self, _: i128) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_u128<E>(self, _: u128) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_the_fields_that_are_meant() {
        let yaml = "apiVersion: v1\nkind: List\nitems:\n- kind: VirtualService # one\n  metadata: {name: web}\n  spec:\n    http:\n    - timeout: 1s\n\
                    \x20   - route:\n      - destination:\n          host: nowhere\n      timeout: soon\n- kind: VirtualService\n  metadata:\n\
                    \x20   name: web\n    namespace: shop\n    annotations:\n      istio.io/dry-run: x\n  spec: {hosts: [a], http: [{name: x}, {headers: {a.b: {exact: y}}}]}\n";
        let places = Places::of(yaml);
        for (object, field, line) in [
            ("VirtualService default/web", "spec.http[0].timeout", Some(8)),
            ("VirtualService default/web", "spec.http[1].timeout", Some(12)),
            ("VirtualService default/web", "spec.http[1].timeouts", Some(9)),
            ("VirtualService default/web", "destination nowhere", Some(11)),
            ("VirtualService default/web", "something else", Some(4)),
            ("VirtualService shop/web", "metadata.annotations[istio.io/dry-run]", Some(18)),
            ("VirtualService shop/web", "spec.http[1].headers.a.b.exact", Some(19)),
            ("VirtualService shop/web", "spec.tcp", Some(19)),
            ("VirtualService shop/other", "spec", None),
            ("Service default/web", "spec", None),
        ] {
            assert_eq!(places.line(object, field), line, "{object} {field}");
        }
        let json = "{\"kind\": \"Service\", \"metadata\": {\"name\": \"a\"},\n \"spec\": {\n  \"ports\": [\n   {\"port\": 1}]}}";
        assert_eq!(Places::of(json).line("Service default/a", "spec.ports[0].port"), Some(4));
        assert_eq!(Places::of("a: [").line("Service default/a", "spec"), None);
        assert_eq!(Places::of(&format!("---\na: [\n---\n{yaml}")).line("VirtualService default/web", "spec.http[0].timeout"), Some(11));
    }
}
