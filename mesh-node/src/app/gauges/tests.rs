use std::collections::BTreeSet;

use mesh_common::maps::Counter;

use crate::{
    problems,
    telemetry::{Exposition, Metrics},
    tls::HandshakeFailure,
};

const DOCUMENT: &str = include_str!("../../../../deploy/METRICS.md");

/// What is registered, from the text of the program: a family nothing was counted in yet is not rendered. The authority's are its process' own.
fn registered() -> BTreeSet<String> {
    let text = concat!(include_str!("../../telemetry.rs"), include_str!("../ca.rs"));
    let names = text.split(".register(").skip(1).filter_map(|after| after.trim_start().strip_prefix('"')?.split_once('"'));
    names.map(|(name, _)| name.to_owned()).filter(|name| name.starts_with("mesh_")).collect()
}

#[test]
fn the_document_has_every_metric_and_no_other() {
    let first_cells = DOCUMENT.lines().filter_map(|line| line.strip_prefix("| `")?.split_once(" |")).map(|(cell, _)| cell);
    let documented: BTreeSet<_> = first_cells.flat_map(|cell| cell.split(", ")).map(|name| name.trim_matches('`').to_owned()).collect();
    let told = |name: &String| documented.contains(name) || documented.contains(&format!("{name}_total"));
    let registered = registered();
    assert!(registered.len() > 30, "{registered:?}");
    assert_eq!(registered.iter().filter(|name| !told(name)).collect::<Vec<_>>(), Vec::<&String>::new(), "not in deploy/METRICS.md");
    let is_stray = |name: &&String| !registered.contains(*name) && !name.strip_suffix("_total").is_some_and(|n| registered.contains(n));
    assert_eq!(documented.iter().filter(is_stray).collect::<Vec<_>>(), Vec::<&String>::new(), "not registered");
    // Counters are told with the suffix they are scraped by, and nothing else is.
    let text = Metrics::default().render(Exposition::OpenMetrics).expect("text");
    for (name, kind) in text.lines().filter_map(|line| line.strip_prefix("# TYPE mesh_")?.split_once(' ')) {
        assert_eq!(documented.contains(&format!("mesh_{name}_total")), kind == "counter", "{name}");
    }
}

#[test]
fn the_document_has_the_values_of_labels_that_are_listed_somewhere() {
    let row = |metric: &str| DOCUMENT.lines().find(|line| line.starts_with(&format!("| `{metric}`"))).expect(metric);
    let failures = HandshakeFailure::ALL.map(HandshakeFailure::reason);
    for (metric, values) in [
        ("mesh_capture_events_total", Counter::ALL.map(Counter::name).to_vec()),
        ("mesh_tls_handshake_failures_total", failures.to_vec()),
        ("mesh_problems", problems::Kind::ALL.map(problems::Kind::name).to_vec()),
    ] {
        for value in values {
            assert!(row(metric).contains(&format!("`{value}`")), "{metric}: {value}");
        }
    }
}
