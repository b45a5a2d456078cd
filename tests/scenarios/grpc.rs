//! gRPC as its own library speaks it, client and server, through the mesh: every call comes to what it comes to without a mesh.

use std::{path::Path, time::Duration};

use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{AMBIENT, wait_for},
};
use serde_json::Value;

const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/grpc_talk.py");

/// A service for each name, with these ports.
fn services(names: &[&str], ports: &str) -> String {
    let one = |name: &&str| {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: {name}}}, ports: {ports}}}\n---\n")
    };
    names.iter().map(one).collect()
}

fn talk(bed: &Bed, client: &Pod, to: &str) -> Value {
    let output = bed.run(client, Path::new(PYTHON), &[SCRIPT, "ask", to]).expect("python");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{to}: {e}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn server(name: &str, node: usize) -> PodSpec {
    let command = [PYTHON, SCRIPT, "serve", "8080"].map(str::to_owned).to_vec();
    PodSpec { command, port: Some(8080), ..PodSpec::new(name, node) }.label("app", name)
}

#[test]
fn every_kind_of_call_comes_to_the_same_as_without_a_mesh() {
    let mut bed = Bed::start(2, &NodeOptions::default()).expect("bed");
    bed.kubectl_apply(
        "services",
        &services(&["near", "far"], "[{name: grpc, port: 81, targetPort: 8080}, {name: http2, port: 82, targetPort: 8080}]"),
    )
    .expect("services");
    let client = bed.pod(&PodSpec::new("client", 0)).expect("client");
    let [near, far] = [server("near", 0), server("far", 1)].map(|s| bed.pod(&s).expect("server"));
    let plain = talk(&bed, &client, &far.address(8080));
    assert!(plain["large"][0] == 3_000_000 && plain["deadline"][2] == "yes" && plain["cancelled"][1] == "yes", "without a mesh: {plain}");
    bed.namespace("default", AMBIENT).expect("label");
    [&client, &near, &far].into_iter().for_each(|pod| bed.wait_captured(pod, true).expect("captured"));
    bed.settle().expect("settled");
    let same = |bed: &Bed, to: &str| {
        let meshed = talk(bed, &client, to);
        for (call, was) in plain.as_object().expect("an object") {
            assert_eq!(&meshed[call], was, "{call} to {to}");
        }
    };
    ["near:81", "far:81", "near:82", "far:82"].into_iter().for_each(|to| same(&bed, to));
    // They are told apart by their status at both ends.
    for (node, reporter) in [(0, "source"), (1, "destination")] {
        let labels = |status: u32| {
            [format!("reporter=\"{reporter}\""), format!("grpc_response_status=\"{status}\""), "destination_workload=\"far\"".to_owned()]
        };
        for (status, least) in [(0, 400.0), (8, 1.0), (9, 1.0), (12, 1.0), (15, 1.0)] {
            let labels = labels(status);
            let labels = labels.iter().map(String::as_str).collect::<Vec<_>>();
            let counted = || bed.nodes()[node].metric("istio_requests_total", &labels);
            wait_for("counted", Duration::from_secs(5), || Ok(counted()? >= least)).unwrap_or_else(|e| panic!("{labels:?}: {e}"));
        }
    }
    // Where nothing is declared, or it goes to the pod itself.
    bed.kubectl_apply("services", &services(&["near", "far"], "[{name: undeclared, port: 83, targetPort: 8080}]")).expect("services");
    bed.settle().expect("settled");
    ["near:83", "far:83", &far.address(8080)].into_iter().for_each(|to| same(&bed, to));
}

/// A server of any method.
const SERVER: &str = r#"
import concurrent.futures, grpc, os, time
HANDLER
class Any(grpc.GenericRpcHandler):
    def service(self, call): return grpc.unary_unary_rpc_method_handler(lambda request, context: handle(call.method))
server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=[OPTIONS])
server.add_generic_rpc_handlers([Any()])
server.add_insecure_port("[::]:8080")
server.start()
server.wait_for_termination()
"#;

fn serving(handler: &str, options: &str) -> String {
    SERVER.replace("HANDLER", handler).replace("OPTIONS", options)
}

/// Asks the server to end, and says what comes of that, and what becomes of the connection.
const OUTLIVES: &str = r#"
import grpc, sys, time
states = []
channel = grpc.insecure_channel(sys.argv[1])
channel.subscribe(lambda state: states.append(state.name), try_to_connect=True)
def ask(method):
    try:
        channel.unary_unary("/a.B/" + method)(b"", timeout=5)
        return "OK"
    except grpc.RpcError as error: return error.code().name
print(ask("live"), ask("die"))
until = time.time() + 3
while states[-1:] == ["READY"] and time.time() < until: time.sleep(0.05)
print("ended" if states[-1:] != ["READY"] else "there")
"#;

fn mortal(name: &str, node: usize) -> PodSpec {
    // One of its methods ends it, again and again.
    let code = serving("def handle(method): return os._exit(1) if method.endswith(\"die\") else b\"\"", "");
    let again = format!("while true; do {PYTHON} -c '{code}'; done");
    PodSpec { command: ["/bin/sh", "-c", &again].map(str::to_owned).to_vec(), port: Some(8080), ..PodSpec::new(name, node) }
        .label("app", name)
}

#[test]
fn a_server_that_dies_is_unavailable_and_who_has_picked_it_hears_of_that() {
    let mut bed = Bed::start(2, &NodeOptions::default()).expect("bed");
    let pods = ["near", "far", "plain"].into_iter().zip([0, 1, 1]).map(|(name, node)| bed.pod(&mortal(name, node)).expect("server"));
    let pods = pods.collect::<Vec<_>>();
    let outside = bed.pod(&PodSpec { namespace: "outside".to_owned(), ..PodSpec::new("outside", 0) }).expect("outside");
    let client = bed.pod(&PodSpec::new("client", 0)).expect("client");
    let headless = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: None, selector: {{app: {name}}}, \
             ports: [{{name: grpc, port: 8080, targetPort: 8080}}]}}\n---\n"
        )
    };
    let plain = services(&["plain"], "[{name: grpc, port: 81, targetPort: 8080}]");
    bed.kubectl_apply("services", &[headless("near"), headless("far"), plain].concat()).expect("services");
    bed.namespace("default", AMBIENT).expect("label");
    pods.iter().chain([&client]).for_each(|pod| bed.wait_captured(pod, true).expect("captured"));
    bed.settle().expect("settled");
    let ask = |client: &Pod, pod: &Pod| {
        wait_for("a server", Duration::from_secs(20), || {
            let output = bed.run(client, Path::new(PYTHON), &["-c", OUTLIVES, &pod.address(8080)])?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            anyhow::ensure!(!text.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(if text.starts_with("OK") { Some(text) } else { None }.is_some_and(|text| text == "OK UNAVAILABLE\nended\n"))
        })
    };
    // By the address of an endpoint it has picked, and of a pod of no such service, from within and without.
    for (from, to) in [(&client, 0), (&client, 1)] {
        ask(from, &pods[to]).unwrap_or_else(|e| panic!("{} to {}: {e}", from.name, pods[to].name));
    }
    for from in [&client, &outside] {
        let output = bed.run(from, Path::new(PYTHON), &["-c", OUTLIVES, &pods[2].address(8080)]).expect("python");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.starts_with("OK UNAVAILABLE"), "{}: {text}{}", from.name, String::from_utf8_lossy(&output.stderr));
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// Asks thirty times at once on a new connection, and counts what comes of it.
const BURST: &str = r#"
import collections, grpc, sys
told = collections.Counter()
for _ in range(4):
    channel = grpc.insecure_channel(sys.argv[1], options=[("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)])
    calls = [channel.unary_unary("/a.B/C").future(b"", timeout=20) for _ in range(30)]
    for call in calls:
        try: call.result(); told["OK"] += 1
        except grpc.RpcError as error: told[error.code().name] += 1
    channel.close()
print(dict(told))
"#;

#[test]
fn a_burst_waits_for_a_server_that_takes_one_call_at_a_time() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let code = serving("def handle(method): return time.sleep(0.005) or b\"\"", "(\"grpc.max_concurrent_streams\", 1)");
    let command = vec![PYTHON.to_owned(), "-c".to_owned(), code];
    let server = PodSpec { command, port: Some(8080), ..PodSpec::new("far", 1) }.label("app", "far");
    let [client, _far] = bed.meshed([PodSpec::new("client", 0), server]).expect("pods");
    bed.kubectl_apply("services", &services(&["far"], "[{name: grpc, port: 81, targetPort: 8080}]")).expect("service");
    bed.settle().expect("settled");
    let output = bed.run(&client, Path::new(PYTHON), &["-c", BURST, "far:81"]).expect("python");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "{'OK': 120}\n", "{}", String::from_utf8_lossy(&output.stderr));
}
