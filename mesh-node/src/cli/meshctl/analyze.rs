//! Manifests looked at without a node: what is not in force and why, by file and line.

use std::{path::Path, sync::Arc, time::Instant};

use super::Failure;
use crate::{
    config::{
        MeshSettings, Snapshot, build,
        store::{Severity, Status, Store},
    },
    sources::directory,
};

/// The configuration a directory makes, and what is to be said of it.
pub fn load(directory: &Path, mesh: MeshSettings) -> Result<(Snapshot, Vec<Status>), Failure> {
    let cannot = |e: std::io::Error| Failure::Other(format!("{}: {e}", directory.display()));
    let mut store = Store::default();
    for change in directory::once(directory, "default").map_err(cannot)? {
        store.apply(change);
    }
    let mesh = Arc::new(mesh);
    Ok(build::build(&store, &mesh, &Snapshot::empty(mesh.clone()), Instant::now()))
}

/// One line for each remark; whether there are errors.
pub fn report(statuses: &[Status]) -> (String, bool) {
    let mut text = String::new();
    for status in statuses {
        let place = match line(status) {
            Some(line) => format!("{}:{line}", status.origin),
            None => status.origin.clone(),
        };
        let severity = if status.severity == Severity::Error { "error" } else { "warning" };
        text.push_str(&format!("{place}: {severity}: {}\n", status.message));
    }
    (text, statuses.iter().any(|s| s.severity == Severity::Error))
}

/// Where in its file a remark belongs: at the field it names, else at the object.
fn line(status: &Status) -> Option<usize> {
    let text = std::fs::read_to_string(&status.origin).ok()?;
    let (object, rest) = status.message.split_once(": ")?;
    let (kind, name) = object.split_once(' ')?;
    let name = name.rsplit('/').next()?;
    let field = rest.split(':').next()?.rsplit('.').next()?;
    let field = field.split('[').next()?;
    let lines = text.lines().collect::<Vec<_>>();
    let mut start = 0;
    for end in (0..=lines.len()).filter(|i| lines.get(*i).is_none_or(|l| l.starts_with("---"))) {
        let document = &lines[start.min(end)..end];
        let says = |key: &str, value: &str| {
            let found = |l: &&str| {
                l.split(['{', ',', '}']).any(|part| {
                    part.trim().trim_start_matches("- ").strip_prefix(key).is_some_and(|v| v.trim().trim_matches(['"', '\'']) == value)
                })
            };
            document.iter().any(found)
        };
        if says("kind:", kind) && says("name:", name) {
            let key = format!("{field}:");
            let at = document
                .iter()
                .position(|l| !field.is_empty() && l.split(['{', ',']).any(|p| p.trim().trim_start_matches("- ").starts_with(&key)));
            let first = document.iter().position(|l| l.trim_start().starts_with("kind:") || l.contains("kind:"));
            return Some(start + at.or(first)? + 1);
        }
        start = end + 1;
    }
    None
}
