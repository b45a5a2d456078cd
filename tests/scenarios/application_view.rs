//! What an application sees: nothing of the mesh (invariant I3).

use mesh_tests::{Bed, NodeOptions, PodSpec};

#[test]
fn first_light() {
    let mut bed = Bed::start(2, &NodeOptions::default()).expect("bed");
    bed.namespace("default", &[("istio.io/dataplane-mode", "ambient")]).expect("namespace");
    let client = bed.pod(&PodSpec::new("client", 0)).expect("client");
    let near = bed.pod(&PodSpec::server("near", 0)).expect("near");
    let far = bed.pod(&PodSpec::server("far", 1)).expect("far");
    for pod in [&client, &near, &far] {
        bed.wait_captured(pod, true).expect("captured");
    }
    bed.settle().expect("settled");
    for server in [&near, &far] {
        for to in [server.address(8080), server.address6(8080)] {
            println!("{}", bed.probe(&client, &["names", &to]).expect("probe"));
        }
    }
    bed.nodes().iter().for_each(|n| n.print_log());
}
