//! Snapshots for tests, of documents as a source would read them.

use std::{sync::Arc, time::Instant};

use serde_json::Value;

use super::{
    MeshSettings, Snapshot, Store, build,
    store::{Change, Content, Origin},
};
use crate::{
    id::TrustDomain,
    resource::{self, Parsed},
};

/// What a node called `n1` makes of these.
pub fn built(documents: &[Value]) -> Snapshot {
    let read = |document| match resource::parse(document, "default") {
        Ok(Parsed::Object(named)) => *named,
        other => panic!("{other:?}: {document}"),
    };
    let content = Content::Read { objects: documents.iter().map(read).collect(), rejections: Vec::new(), unread: Vec::new() };
    let mut store = Store::default();
    store.apply(Change { origin: Origin(Arc::new("m.yaml".into())), content });
    let mesh = Arc::new(MeshSettings::new("n1", TrustDomain::parse("cluster.local").expect("valid")));
    build::build(&store, &mesh, &Snapshot::empty(mesh.clone()), Instant::now()).0
}
