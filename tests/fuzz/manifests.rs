//! Manifests: never a panic from text to snapshot, and every rejection says which object, which field and why.
#![no_main]

use std::{path::PathBuf, sync::Arc};

use libfuzzer_sys::fuzz_target;
use mesh_node::{
    config::{Change, MeshSettings, Origin, Snapshot, Store, build::build, store::Content},
    id::TrustDomain,
    sources::manifest::read,
};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let content = read(text, "default");
    match &content {
        Content::Unreadable(problem) => assert!(!problem.is_empty()),
        Content::Read { rejections, .. } => {
            assert!(rejections.iter().all(|r| !r.object.is_empty() && !r.field.is_empty() && !r.problem.is_empty()));
        }
        Content::Gone => unreachable!("a text is there"),
    }
    let Ok(domain) = TrustDomain::parse("cluster.local") else { return };
    let mesh = Arc::new(MeshSettings::new("n", domain));
    let mut store = Store::default();
    store.apply(Change { origin: Origin(Arc::new(PathBuf::from("f.yaml"))), content });
    let (snapshot, _) = build(&store, &mesh, &Snapshot::empty(mesh.clone()), std::time::Instant::now());
    assert_eq!(snapshot.generation, 1);
});
