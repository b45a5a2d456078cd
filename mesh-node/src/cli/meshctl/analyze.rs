//! Manifests looked at without a node: what is not in force, or hardly meant so, and why, by file and line.

mod lint;
mod templates;

use std::{borrow::Cow, collections::HashMap, io::Read as _, path::Path, sync::Arc, time::Instant};

use serde_json::{Value, json};

use super::Failure;
use crate::{
    config::{
        MeshSettings, Snapshot, build,
        store::{Change, Content, Origin, Severity, Status, Store},
    },
    resource::{self, Parsed},
    sources::{
        directory,
        manifest::{self, MAX_FILE},
        place::Places,
    },
};

/// Where objects are that do not say it.
const NAMESPACE: &str = "default";
/// What stands for standard input on the command line.
const STANDARD_INPUT: [&str; 2] = ["-", "/dev/stdin"];

/// Manifests, as they are read for a look.
#[derive(Debug)]
pub struct Manifests {
    changes: Vec<Change>,
    /// What standard input said, which is read but once.
    text: Option<String>,
}

impl Manifests {
    /// Those of a directory or file, or of standard input.
    pub fn read(from: &Path) -> Result<Self, Failure> {
        let cannot = |e: std::io::Error| Failure::Other(format!("{}: {e}", from.display()));
        if !STANDARD_INPUT.iter().any(|name| from == Path::new(name)) {
            return Ok(Self { changes: directory::once(from, NAMESPACE).map_err(cannot)?, text: None });
        }
        let mut text = String::new();
        std::io::stdin().lock().take(MAX_FILE + 1).read_to_string(&mut text).map_err(cannot)?;
        if text.len() as u64 > MAX_FILE {
            return Err(Failure::Other(format!("standard input says more than {MAX_FILE} bytes; analyze a directory")));
        }
        let change = Change { origin: Origin(Arc::new(from.to_owned())), content: manifest::read(&text, NAMESPACE) };
        Ok(Self { changes: vec![change], text: Some(text) })
    }

    /// The lines a file has its objects at.
    fn places(&self, file: &str) -> Places {
        match &self.text {
            Some(text) => Places::of(text),
            None => std::fs::read_to_string(file).map(|text| Places::of(&text)).unwrap_or_default(),
        }
    }

    /// Adds what a cluster would make of them; what is to be said of that.
    fn complete(&mut self, mesh: &MeshSettings) -> Vec<Status> {
        let read = self.changes.iter().filter(|change| matches!(change.content, Content::Read { .. }));
        let documents = read.flat_map(|change| {
            let text = match &self.text {
                Some(text) => Cow::Borrowed(text.as_str()),
                None => std::fs::read_to_string(&*change.origin.0).unwrap_or_default().into(),
            };
            manifest::items(&text).into_iter().map(|document| (change.origin.clone(), document))
        });
        let made = templates::stand_ins(&documents.collect::<Vec<_>>(), &mesh.enrolment);
        let mut by_origin: HashMap<Origin, Vec<Value>> = HashMap::new();
        for (origin, document) in made.documents {
            by_origin.entry(origin).or_default().push(document);
        }
        for change in &mut self.changes {
            let Content::Read { objects, rejections, .. } = &mut change.content else { continue };
            let (mut read, mut refused) = (HashMap::new(), Vec::new());
            for document in by_origin.remove(&change.origin).unwrap_or_default() {
                match resource::parse(&document, NAMESPACE) {
                    Ok(Parsed::Object(named)) => drop(read.insert(named.key.clone(), *named)),
                    Ok(Parsed::Ignored(_)) => {}
                    Err(rejection) => refused.push(rejection),
                }
            }
            // A bare pod was refused for what it is given here; what else is wrong with it has been said.
            rejections.retain(|rejection| rejection.key.as_ref().is_none_or(|key| !read.contains_key(key)));
            refused.retain(|rejection| !rejections.iter().any(|said| said.key == rejection.key));
            rejections.extend(refused);
            objects.retain(|object| !read.contains_key(&object.key));
            objects.extend(read.into_values());
        }
        made.remarks
    }
}

/// The configuration that manifests make, and what is to be said of it.
pub fn load(manifests: &mut Manifests, mesh: MeshSettings) -> (Snapshot, Vec<Status>) {
    let mut store = Store::default();
    let told = manifests.complete(&mesh);
    for change in std::mem::take(&mut manifests.changes) {
        store.apply(change);
    }
    let mesh = Arc::new(mesh);
    let (snapshot, mut statuses) = build::build(&store, &mesh, &Snapshot::empty(mesh.clone()), Instant::now());
    statuses.extend(lint::remarks(&store, &mesh, &snapshot));
    statuses.extend(told);
    statuses.sort();
    statuses.dedup();
    (snapshot, statuses)
}

/// A remark, and where it belongs.
#[derive(Debug)]
pub struct Remark {
    file: String,
    line: Option<u64>,
    severity: Severity,
    message: String,
}

/// The remarks, in the order of files and lines.
pub fn remarks(statuses: &[Status], manifests: &Manifests) -> Vec<Remark> {
    let mut files: HashMap<&str, Places> = HashMap::new();
    let mut all = statuses.iter().map(|status| {
        let places = files.entry(&status.origin).or_insert_with(|| manifests.places(&status.origin));
        let (object, field) = parts(&status.message);
        Remark {
            file: status.origin.clone(),
            line: object.and_then(|object| places.line(object, field)).or_else(|| line_of_document(&status.message)),
            severity: status.severity,
            message: NOTHING_BEFORE.iter().fold(&*status.message, |text, end| text.trim_end_matches(end)).to_owned(),
        }
    });
    let mut all = all.by_ref().collect::<Vec<_>>();
    all.sort_by(|a, b| (&a.file, a.line, &a.message).cmp(&(&b.file, b.line, &b.message)));
    all
}

/// What is said of files in force, when nothing was held before.
const NOTHING_BEFORE: [&str; 2] =
    ["; nothing of this file is in force", "; what this file held before, and does not show now, stays in force"];

/// The line of a document that cannot be read, of which its message speaks.
fn line_of_document(message: &str) -> Option<u64> {
    message.strip_prefix("the document at line ")?.split(' ').next()?.parse().ok()
}

/// The object a message is about, and the field.
fn parts(message: &str) -> (Option<&str>, &str) {
    match message.split_once(": ") {
        Some((object, rest)) if object.contains(' ') => (Some(object), rest.split(": ").next().unwrap_or_default()),
        _ => (None, ""),
    }
}

impl Remark {
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    fn severity(&self) -> &'static str {
        if self.is_error() { "error" } else { "warning" }
    }

    /// A line, as compilers write them.
    pub fn text(&self) -> String {
        let line = self.line.map(|line| format!(":{line}")).unwrap_or_default();
        format!("{}{line}: {}: {}\n", self.file, self.severity(), self.message)
    }

    pub fn document(&self) -> Value {
        let (object, field) = parts(&self.message);
        json!({"file": self.file, "line": self.line, "severity": self.severity(), "object": object,
            "field": object.map(|_| field), "message": self.message})
    }
}
