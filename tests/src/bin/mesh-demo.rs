//! The demo: Bookinfo, unmodified, on two nodes, with every byte between them in mutual TLS; then policy applied live.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{AMBIENT, Process, program, wait_for},
    token::{Issuer, now},
};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use self::captured::Capture;

#[path = "mesh-demo/captured.rs"]
mod captured;

/// The manifests, as they are in the repository.
const BOOKINFO: &str = include_str!("../../corpora/seed/01-bookinfo.yaml");
const CANARY: &str = include_str!("../../corpora/seed/03-canary-90-10.yaml");
const BY_HEADER: &str = include_str!("../../corpora/seed/04-route-by-header.yaml");
const STRICT: &str = include_str!("../../corpora/seed/12-mtls-strict-mesh.yaml");
/// What the original Bookinfo has beyond the seed manifest.
const REST: &str = include_str!("../../corpora/bookinfo-details-ratings.yaml");
const DENY: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: reviews-not-for-client
  namespace: default
spec:
  selector:
    matchLabels:
      app: reviews
  action: DENY
  rules:
  - from:
    - source:
        serviceAccounts: [\"default/client\"]
";
const REQUESTS: usize = 20;

/// Bookinfo on two meshed nodes.
#[derive(Parser)]
#[command(name = "mesh-demo")]
struct Demo {
    /// Leave everything running at the end, and say how to explore and remove it.
    #[arg(long)]
    keep: bool,
    /// Remove what an earlier `--keep` left, by its id.
    #[arg(long, value_name = "ID")]
    remove: Option<String>,
}

static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> Result<()> {
    let demo = Demo::parse();
    if let Some(id) = &demo.remove {
        mesh_tests::bed::remove(id);
        println!("removed {id}");
        return Ok(());
    }
    catch_signals()?;
    let started = Instant::now();
    let mut bed = Bed::start(2, &NodeOptions::with(&["--log", "info,access=debug"]))?;
    let result = scenes(&mut bed);
    if let Err(error) = &result
        && STOP.load(Ordering::Relaxed)
    {
        println!("\ninterrupted ({error:#}); cleaning up");
        return Ok(());
    }
    result?;
    println!("\nThe demo took {:.0} s.", started.elapsed().as_secs_f64());
    if demo.keep { explore(bed) } else { Ok(()) }
}

/// Ctrl-C ends the scene at its next step, so that the bed is cleaned up.
fn catch_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            STOP.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}

fn title(text: &str) -> Result<()> {
    ensure!(!STOP.load(Ordering::Relaxed), "stopped");
    println!("\n\x1b[1m{text}\x1b[0m");
    Ok(())
}

fn scenes(bed: &mut Bed) -> Result<()> {
    title("1. Two nodes, and Bookinfo spread over both")?;
    bed.namespace("default", AMBIENT)?;
    let client = bed.pod(&PodSpec::new("client", 0))?;
    let outsider = bed.pod(&PodSpec::new("outsider", 0).in_namespace("outside"))?;
    let mut pods = bed.kubectl_apply("rest", REST)?;
    pods.extend(bed.kubectl_apply("bookinfo", BOOKINFO)?);
    pods.push(client.clone());
    pods.iter().try_for_each(|p| bed.wait_captured(p, true))?;
    bed.settle()?;
    pods.sort_by_key(|p| (p.node, p.name.clone()));
    for pod in &pods {
        println!("   node{}  {:<18} {:<16} {}", pod.node + 1, pod.name, pod.v4(), pod.v6());
    }
    println!("   namespace default has the label istio.io/dataplane-mode=ambient; the pods were neither changed nor restarted");

    title("2. Traffic: the client asks for the product page, with a packet capture between the nodes")?;
    let capture = Capture::start(bed)?;
    let seen = ask_pages(bed, &client, REQUESTS)?;
    let summary = capture.finish()?;
    println!("   {REQUESTS} pages; reviews came from {}", list(&seen));
    ensure!(seen.len() >= 2, "several versions of reviews should have answered");

    title("3. Who talked to whom, and how")?;
    connections(bed)?;

    title("4. What crossed between the nodes")?;
    summary.print();
    ensure!(summary.packets > 0 && summary.flows > 0, "the packet capture saw nothing");
    ensure!(!summary.plaintext_found, "something readable crossed between the nodes");
    ensure!(summary.others.is_empty(), "something other than HBONE crossed between the nodes");
    ensure!(summary.not_tls == 0, "an HBONE connection carried something other than TLS");

    title("5. A pod outside the mesh, before and after STRICT mutual TLS (12-mtls-strict-mesh.yaml)")?;
    let page = pods.iter().find(|p| p.name.starts_with("productpage")).context("productpage")?;
    let reviews = pods.iter().find(|p| p.name.starts_with("reviews-v1")).context("reviews-v1")?;
    let outside = |bed: &Bed| page_of(bed, &outsider, &page.v4().to_string()).is_ok();
    println!("   PERMISSIVE (the default): the outsider's plaintext is {}", verdict(outside(bed)));
    bed.apply("strict", STRICT)?;
    bed.settle()?;
    let after = outside(bed);
    println!("   STRICT:                   the outsider's plaintext is {}", verdict(after));
    ensure!(!after, "STRICT let plaintext in");
    ensure!(page_of(bed, &client, "productpage").is_ok(), "STRICT must not touch the mesh");
    println!("   STRICT:                   the client in the mesh is {}", verdict(true));

    title("6. A DENY policy, applied while a connection is open")?;
    let mut open = hold_connection(bed, &client, reviews)?;
    bed.apply("deny", DENY)?;
    let applied = Instant::now();
    wait_for("the open connection to be cut", Duration::from_secs(5), || Ok(!open.is_running()))?;
    println!("   an open connection from client to reviews was cut {} ms after the policy was written", applied.elapsed().as_millis());
    println!("   a new one is {}", verdict(page_of(bed, &client, &reviews.v4().to_string()).is_ok()));
    println!("   productpage still gets its reviews: {}", verdict(reviews_of(&page_of(bed, &client, "productpage")?).is_some()));
    let policies = bed.nodes()[reviews.node].access_log();
    let denied = policies.iter().rev().find(|l| l.contains("policy rejection") || l.contains("due to policy change"));
    println!("   in node{}'s log: {}", reviews.node + 1, denied.and_then(|l| l.split("error=").nth(1)).unwrap_or("(nothing)"));

    title("7. Routing, applied live: a canary (03-canary-90-10.yaml), then by header (04-route-by-header.yaml)")?;
    bed.apply("canary", CANARY)?;
    bed.settle()?;
    let seen = ask_pages(bed, &client, 3 * REQUESTS)?;
    println!("   {} pages with 90 % for v1 and 10 % for v2: {}", 3 * REQUESTS, list(&seen));
    let of = |version: &str| seen.get(version).copied().unwrap_or(0);
    ensure!(of("reviews v3") == 0 && of("reviews v1") > 2 * of("reviews v2"), "the canary's weights were not kept");
    // The rule's subsets stay; the routes are replaced.
    let rule = CANARY.split("---").nth(1).context("the canary's rule")?;
    bed.apply("canary", &format!("{BY_HEADER}\n---\n{rule}"))?;
    bed.settle()?;
    let (jason, other) = (page_for(bed, &client, "productpage", "jason")?, page_of(bed, &client, "productpage")?);
    let version = |page: &Value| reviews_of(page).unwrap_or_default();
    println!("   jason sees reviews {}, others see reviews {}", version(&jason), version(&other));
    ensure!(version(&jason) == "v2" && version(&other) == "v1", "the header did not decide");

    title("8. Requests judged one by one: end users' tokens, paths, and why")?;
    tokens(bed, &client, page)
}

/// Asks for the page as several users, under a policy that wants a token.
fn tokens(bed: &Bed, client: &Pod, page: &Pod) -> Result<()> {
    let (issuer, forger) = (Issuer::default(), Issuer::default());
    let object = |kind: &str, name: &str, spec: Value| {
        json!({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": name, "namespace": "default"}, "spec": spec})
            .to_string()
    };
    let selector = json!({"matchLabels": {"app": "productpage"}});
    let jwt = json!({"selector": selector, "jwtRules": [{"issuer": "https://demo.example", "audiences": ["productpage"], "jwks": issuer.jwks()}]});
    let users = json!({"selector": selector, "rules": [
        {"to": [{"operation": {"paths": ["/health"]}}]},
        {"from": [{"source": {"requestPrincipals": ["https://demo.example/*"]}}], "to": [{"operation": {"methods": ["GET"], "paths": ["/productpage"]}}]},
    ]});
    bed.apply(
        "jwt",
        &format!("{}\n---\n{}", object("RequestAuthentication", "users", jwt), object("AuthorizationPolicy", "users", users)),
    )?;
    bed.settle()?;
    let token = |by: &Issuer, audience: &str, exp: i64| {
        by.token(&json!({"iss": "https://demo.example", "sub": "jason", "aud": audience, "exp": now() + exp}))
    };
    let good = token(&issuer, "productpage", 600);
    for (who, method, path, token, expected) in [
        ("no token, /health", "GET", "/health", "", "200"),
        ("no token", "GET", "/productpage", "", "403"),
        ("a token", "GET", "/productpage", good.as_str(), "200"),
        ("a token, but POST", "POST", "/productpage", &good, "403"),
        ("no token, /health/..%2fproductpage", "GET", "/health/..%2fproductpage", "", "403"),
        ("a token for another audience", "GET", "/productpage", &token(&issuer, "bank", 600), "403"),
        ("an expired token", "GET", "/productpage", &token(&issuer, "productpage", -600), "401"),
        ("a forged token", "GET", "/productpage", &token(&forger, "productpage", 600), "401"),
    ] {
        let answer = ask_with(bed, client, method, path, token)?;
        println!("   {who:<36} {answer}");
        ensure!(answer.starts_with(expected), "{who}: {answer}, expected {expected}");
    }
    let asked = [
        "authorize",
        "-o",
        "json",
        "--from",
        "default/client",
        "--to",
        &page.v4().to_string(),
        "--port",
        "9080",
        "-X",
        "POST",
        "--path",
        "/productpage",
    ];
    let why = bed.nodes()[page.node].run(&program("meshctl"), &asked)?;
    let why: Value = serde_json::from_slice(&why.stdout).context("meshctl authorize")?;
    println!(
        "   meshctl authorize says of the POST: {}, {}",
        why["decision"].as_str().unwrap_or("?"),
        why["reason"].as_str().unwrap_or("?")
    );
    ensure!(why["decision"] == "denied", "meshctl explains what happens: {why}");
    Ok(())
}

/// The status and, of an error, the body of what the product page answers.
fn ask_with(bed: &Bed, from: &Pod, method: &str, path: &str, token: &str) -> Result<String> {
    let script = "import http.client as h,sys\n_,m,p,t=sys.argv\nc=h.HTTPConnection('productpage',9080,timeout=10)\n\
                  c.request(m,p,headers={'authorization':'Bearer '+t} if t else {})\nr=c.getresponse()\nb=r.read().decode()\nprint(r.status, b if r.status>399 else '')\n";
    let output = bed.run(from, &PathBuf::from("/usr/bin/python3"), &["-c", script, method, path, token])?;
    ensure!(output.status.success(), "no answer: {}", String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn verdict(allowed: bool) -> &'static str {
    if allowed { "answered" } else { "refused" }
}

/// One GET over a connection of its own.
fn page_of(bed: &Bed, from: &Pod, host: &str) -> Result<Value> {
    page_for(bed, from, host, "")
}

/// The page a user sees; `user` is the value of a header of that name, or empty.
fn page_for(bed: &Bed, from: &Pod, host: &str, user: &str) -> Result<Value> {
    let script = "import json,sys,urllib.request as u; h = {'user': sys.argv[3]} if sys.argv[3] else {}; \
                  print(u.urlopen(u.Request('http://%s:9080%s' % (sys.argv[1], sys.argv[2]), headers=h), timeout=10).read().decode())";
    let path = if host == "productpage" || host.parse::<std::net::IpAddr>().is_err() { "/productpage" } else { "/health" };
    let output = bed.run(from, &PathBuf::from("/usr/bin/python3"), &["-c", script, host, path, user])?;
    ensure!(output.status.success(), "no page: {}", String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default());
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The version of reviews a page was made with.
fn reviews_of(page: &Value) -> Option<String> {
    page["body"]["reviews"]["from"]["version"].as_str().map(str::to_owned)
}

fn ask_pages(bed: &Bed, client: &Pod, count: usize) -> Result<BTreeMap<String, usize>> {
    let mut seen = BTreeMap::new();
    for _ in 0..count {
        ensure!(!STOP.load(Ordering::Relaxed), "stopped");
        let page = page_of(bed, client, "productpage")?;
        let Some(version) = reviews_of(&page) else { bail!("a page without reviews: {page}") };
        *seen.entry(format!("reviews {version}")).or_default() += 1;
    }
    Ok(seen)
}

fn list(counts: &BTreeMap<String, usize>) -> String {
    counts.iter().map(|(what, n)| format!("{what} ({n})")).collect::<Vec<_>>().join(", ")
}

/// A connection that asks every 10 ms and ends when it fails.
fn hold_connection(bed: &Bed, from: &Pod, to: &Pod) -> Result<Process> {
    let script = "import socket,sys,time\ns=socket.create_connection((sys.argv[1],9080))\nwhile True:\n  s.sendall(b'GET /health HTTP/1.1\\r\\nhost: reviews\\r\\n\\r\\n')\n  if not s.recv(65536): break\n  time.sleep(0.01)\n";
    let mut command = bed.command(from, &PathBuf::from("/usr/bin/python3"), &["-c", script, &to.v4().to_string()]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = Process::start(command)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(process.is_running(), "the connection did not come about");
    Ok(process)
}

/// Prints the requests of both nodes' access logs, summed up, with the identities the nodes know.
fn connections(bed: &Bed) -> Result<()> {
    let workloads = bed.nodes()[0].admin_json("/workloads")?;
    let find = |is_it: &dyn Fn(&Value) -> bool| workloads.as_array().into_iter().flatten().find(|w| is_it(w)).cloned().unwrap_or_default();
    let shown = |w: &Value| {
        let identity = w["identity"].as_str().unwrap_or("-").replace("spiffe://cluster.local/ns/", "").replace("/sa/", "/");
        format!("{} [{identity}]", w["name"].as_str().unwrap_or("-"))
    };
    let mut rows: BTreeMap<(String, String, String, &str), usize> = BTreeMap::new();
    for node in bed.nodes() {
        for line in node.access_log().iter().filter(|l| l.contains("reporter=\"source\"")) {
            let field =
                |name: &str| line.split(&format!("{name}=\"")).nth(1).and_then(|rest| rest.split('"').next()).unwrap_or("-").to_owned();
            let upstream: Option<SocketAddr> = field("upstream_host").parse().ok();
            let source = find(&|w| w["name"] == field("src.workload"));
            let destination =
                find(&|w| w["addresses"].as_array().into_iter().flatten().any(|a| upstream.is_some_and(|u| *a == u.ip().to_string())));
            let way = if destination["node"] != node.name.as_str() { "HBONE tunnel, mutual TLS" } else { "in process, same node" };
            *rows.entry((node.name.clone(), shown(&source), shown(&destination), way)).or_default() += 1;
        }
    }
    ensure!(!rows.is_empty(), "no request was logged");
    println!("   {:<6} {:<42} {:<42} {:<26} requests", "node", "source [identity]", "destination [identity]", "way");
    for ((node, source, destination, way), count) in rows {
        println!("   {node:<6} {source:<42} {destination:<42} {way:<26} {count}");
    }
    for node in bed.nodes() {
        for pooled in node.admin_json("/pool")?.as_array().into_iter().flatten() {
            println!("   {} keeps a tunnel connection to {} as {}", node.name, pooled["address"], pooled["source"]);
        }
    }
    Ok(())
}

fn explore(bed: Bed) -> Result<()> {
    let (id, directory) = (&bed.id, bed.directory.display());
    println!("\nEverything is left running. To explore:");
    println!("   ls {}                          manifests, logs, the CA", directory);
    println!("   ip netns list | grep mb{id}                       nodes (n0, n1), pods (p...), the network between (fabric)");
    println!(
        "   ip netns exec mb{id}-n0 {} status     what node1 thinks (also: connections, routes, explain, top, ...; see --help)",
        program("meshctl").display()
    );
    println!("   $EDITOR {}/applied/x.yaml            policies written here take effect at once", bed.config().display());
    if let Some((client, page)) = bed.pods().find(|p| p.name == "client").zip(bed.pods().find(|p| p.name.starts_with("productpage"))) {
        println!("   in a pod (here the client):");
        println!(
            "     nsenter --net={} sh -c 'echo $$ > {}/cgroup.procs; exec curl http://{}/productpage'",
            client.netns.display(),
            client.cgroup.display(),
            page.address(9080)
        );
    }
    println!("   tail -f {directory}/logs/node1.log             every connection");
    println!("The STRICT and DENY policies are still in force. To remove everything: {} --remove {id}", program("mesh-demo").display());
    bed.keep()
}
