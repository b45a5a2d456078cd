//! Pods between one program and the next.

use super::*;

/// Connects when it is told to, says much, and ends without waiting for anything.
const JOB: &str = "
import os, socket, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
c = socket.create_connection((sys.argv[2], 9100))
c.sendall(b'j' * 3000000)
os._exit(0)
";
/// Reads slowly, and writes down how much came.
const READER: &str = "
import socket, sys, threading, time
def read(c):
    total = 0
    try:
        while piece := c.recv(65536):
            total += len(piece)
            time.sleep(0.005)
    except OSError as error:
        total = error
    with open(sys.argv[1], 'a') as read:
        read.write(str(total) + chr(10))
s = socket.create_server(('', 9100), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    threading.Thread(target=read, args=(s.accept()[0],), daemon=True).start()
";

/// A pod is there for as long as its cgroup is, also between two programs of it.
#[test]
fn what_a_pod_said_before_its_last_program_ended_arrives_and_the_next_is_of_the_mesh() {
    let mut bed = Bed::ambient(&NodeOptions::default()).expect("bed");
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: all, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";
    bed.apply("strict", strict).expect("strict");
    let python = |script: &str, arguments: &[&str]| {
        [&["/usr/bin/python3", "-c", script], arguments].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let files = ["near", "far"].map(|name| bed.directory.join(format!("read-{name}")).display().to_string());
    let reader = |node: usize| {
        let name = ["near", "far"][node];
        PodSpec { command: python(READER, &[&files[node]]), port: Some(9100), ..PodSpec::new(name, node) }
    };
    let readers = bed.meshed([reader(0), reader(1)]).expect("pods");
    bed.settle().expect("settled");
    for (reader, file) in readers.iter().zip(&files) {
        let go = format!("{file}.go");
        let job = PodSpec { command: python(JOB, &[&go, &reader.v4().to_string()]), ..PodSpec::new(&format!("job-{}", reader.name), 0) };
        let [job] = bed.meshed([job]).expect("a job");
        bed.settle().expect("settled");
        std::fs::write(file, "").expect("emptied");
        std::fs::write(&go, "").expect("told");
        wait_for("all of it", Duration::from_secs(20), || Ok(!std::fs::read_to_string(file)?.is_empty())).expect(&reader.name);
        assert_eq!(std::fs::read_to_string(file).expect("a file"), "3000000\n", "{}", reader.name);
        // Nothing of it runs, and what does next is let in where only the mesh is.
        let next = "import socket, sys\nc = socket.create_connection((sys.argv[1], 9100))\nc.sendall(b'next')\nc.close()\n";
        let output = bed.run(&job, std::path::Path::new("/usr/bin/python3"), &["-c", next, &reader.v4().to_string()]).expect("python");
        assert!(output.status.success(), "{output:?}");
        let both = || Ok(std::fs::read_to_string(file)? == "3000000\n4\n");
        wait_for("the next", Duration::from_secs(5), both).unwrap_or_else(|_| panic!("{:?}", std::fs::read_to_string(file)));
        bed.delete(&job).expect("deleted");
        let released = || Ok(bed.nodes()[0].log_text().contains(&format!("uid={} exists=false", job.uid)));
        wait_for("its release", Duration::from_secs(5), released).expect("its cgroup is gone");
    }
}
