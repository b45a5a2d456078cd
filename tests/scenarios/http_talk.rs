//! HTTP as Go's own libraries speak it, client and server, through the mesh: every conversation comes to what it comes to without a mesh.

use std::{path::Path, process::Command};

use mesh_tests::{Bed, NodeOptions, Pod, PodSpec, bed::AMBIENT};
use serde_json::Value;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/http_talk.go");
/// Where Debian has the libraries.
const LIBRARIES: &str = "/usr/share/gocode";

/// Builds the program; the place it is in is for who holds it.
fn built() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let program = directory.path().join("http_talk");
    let mut go = Command::new("go");
    go.args(["build", "-o"]).arg(&program).arg(SOURCE);
    go.env("GO111MODULE", "off").env("GOPATH", LIBRARIES).env("GOCACHE", directory.path().join("cache"));
    assert!(go.status().expect("go").success(), "{SOURCE} is built");
    (directory, program.display().to_string())
}

fn talk(bed: &Bed, program: &str, client: &Pod, to: &str) -> Value {
    let output = bed.run(client, Path::new(program), &["ask", to]).expect("the program");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{to}: {e}: {}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn every_conversation_comes_to_the_same_as_without_a_mesh() {
    let (_directory, program) = built();
    let mut bed = Bed::start(2, &NodeOptions::default()).expect("bed");
    let services = ["near", "far"].map(|name| {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 81, targetPort: 8080}}, {{name: undeclared, port: 82, targetPort: 8080}}, {{name: http2, port: 83, targetPort: 8080}}]}}\n---\n")
    });
    bed.kubectl_apply("services", &services.concat()).expect("services");
    let client = bed.pod(&PodSpec::new("client", 0)).expect("client");
    let server = |name: &str, node| {
        let command = [&program, "serve", "8080"].map(str::to_owned).to_vec();
        PodSpec { command, port: Some(8080), ..PodSpec::new(name, node) }.label("app", name)
    };
    let [near, far] = [server("near", 0), server("far", 1)].map(|s| bed.pod(&s).expect("server"));
    let plain = talk(&bed, &program, &client, &far.address(8080));
    let plain = plain.as_object().expect("an object");
    assert!(plain["1 WebSocket"][0][0] == "you said hello" && plain["2 leave /slow"][1] == "gone", "without a mesh: {plain:?}");
    bed.namespace("default", AMBIENT).expect("label");
    [&client, &near, &far].into_iter().for_each(|pod| bed.wait_captured(pod, true).expect("captured"));
    bed.settle().expect("settled");
    let mut different = Vec::new();
    for to in ["near:81", "far:81", "near:82", "far:82", "near:83", "far:83", &far.address(8080), &near.address6(8080)] {
        let meshed = talk(&bed, &program, &client, to);
        // HTTP/1 in Go knows no conversation before the request is whole; HTTP/2 no request without a host, and in Go no trailers that were not announced.
        let other = |conversation: &str| match to.rsplit_once(':') {
            Some((_, "81")) => conversation == "2 both ways at once",
            Some((_, "83")) => ["1 HTTP/1.0", "1 chunks with extensions"].contains(&conversation),
            _ => false,
        };
        let all = plain.iter().filter(|(conversation, was)| !other(conversation) && meshed[*conversation] != **was);
        different.extend(all.map(|(conversation, was)| format!("{conversation} to {to}:\n  {was}\n  {}", meshed[conversation])));
    }
    assert!(different.is_empty(), "{} are different:\n{}", different.len(), different.join("\n"));
}
