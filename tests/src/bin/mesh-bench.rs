//! Ratios of the mesh to no mesh, in one run: requests per second (wrk to nginx), new connections per second, and one bulk
//! stream (iperf3), for pods of one node and of two, by pod address (layer 4) and by a service that declares HTTP (layer 7; the
//! ratio is to the pod's address without a mesh, since nothing serves the service's there). `guarded` is the same with policies that
//! ask about every request, a thousand rules of which do not match. Rounds are interleaved; the median counts. Numbers are of the machine
//! they ran on, only the ratios travel.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mesh_tests::{
    Bed, NodeOptions, Pod, PodSpec,
    bed::{AMBIENT, wait_for},
};

/// Compare meshed with plain connections.
#[derive(Parser)]
#[command(name = "mesh-bench")]
struct Bench {
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// Only measurements whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Compare pods of one node without a mesh, with acceleration switched off, and with it.
    #[arg(long)]
    accel: bool,
    /// Compare requests with metrics and access log off, with metrics, and with both.
    #[arg(long)]
    telemetry: bool,
    /// Compare requests of one node without a mesh, through mesh-node, and through an Envoy in the client's pod.
    #[arg(long)]
    envoy: bool,
}

/// Its pid file is one of its own: nginx removes that when it ends, whatever it is.
const NGINX: &str = "daemon off; worker_processes 1; error_log /dev/null;
events { worker_connections 4096; }
http { access_log off; keepalive_requests 1000000000; server { listen 8080 reuseport; listen [::]:8080; listen 8082 http2; listen [::]:8082 http2; location / { return 200 '0123456789012345678901234567890123456789012345678901234567890123'; } } }
";

fn main() -> Result<()> {
    let bench = Bench::parse();
    if bench.accel {
        return accel(&bench);
    }
    if bench.envoy {
        return envoy(&bench);
    }
    if bench.telemetry {
        return telemetry(&bench);
    }
    let mut bed = Bed::start(2, &NodeOptions::default().quiet())?;
    let config = bed.directory.join("nginx.conf");
    std::fs::write(&config, NGINX)?;
    let server = |name: &str, node: usize| PodSpec {
        command: vec![
            "sh".into(),
            "-c".into(),
            format!("iperf3 -s -p 8081 >/dev/null & exec nginx -c {0} -g \"pid {0}.$$;\"", config.display()),
        ],
        port: Some(8080),
        ..PodSpec::new(name, node)
    };
    for name in ["near", "far"] {
        let ports = "[{name: http, port: 80, targetPort: 8080}, {name: http2, port: 82, targetPort: 8082}]";
        let yaml =
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: {name}}}, ports: {ports}}}\n");
        bed.kubectl_apply(name, &yaml)?;
    }
    let client = bed.pod(&PodSpec::new("client", 0))?;
    let near = bed.pod(&server("near", 0))?;
    let far = bed.pod(&server("far", 1))?;
    let pods = [&client, &near, &far];
    let mut results: BTreeMap<(String, bool), Vec<f64>> = BTreeMap::new();
    let mut cpu: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for round in 0..bench.rounds {
        for meshed in [false, true] {
            bed.namespace("default", if meshed { AMBIENT } else { &[] })?;
            pods.iter().try_for_each(|p| bed.wait_captured(p, meshed))?;
            bed.settle()?;
            for (place, target) in [("same node", &near), ("two nodes", &far)] {
                for (what, measure) in measurements(&bench, meshed).into_iter().filter(|(w, _)| w.contains(&bench.only)) {
                    let before = ticks(&bed)?;
                    let value = measure(&bed, &client, target)?;
                    let name = format!("{place}: {what}");
                    if meshed && what.contains("requests") {
                        cpu.entry(name.clone())
                            .or_default()
                            .push((ticks(&bed)? - before) * 10.0 / (value * f64::from(bench.seconds) / 1000.0));
                    }
                    results.entry((name, meshed)).or_default().push(value);
                }
            }
        }
        eprintln!("round {} of {} done", round + 1, bench.rounds);
    }
    println!("{:<42} {:>12} {:>12} {:>7} {:>28}", "", "no mesh", "mesh", "ratio", "mesh-node CPU ms/1000 req");
    let names = results.keys().filter(|(_, meshed)| *meshed).map(|(name, _)| name.clone()).collect::<Vec<_>>();
    for name in names {
        let (plain, mesh) = (median(&results[&(name.clone(), false)]), median(&results[&(name.clone(), true)]));
        let cpu = cpu.get(&name).map_or(String::new(), |c| format!("{:.0}", median(c)));
        println!("{name:<42} {plain:>12.0} {mesh:>12.0} {:>7.2} {cpu:>28}", mesh / plain);
    }
    for node in bed.nodes() {
        println!("{}: {:.1} MiB resident after the load", node.name, node.resident()? as f64 / 1048576.0);
    }
    Ok(())
}

type Measure = Box<dyn Fn(&Bed, &Pod, &Pod) -> Result<f64>>;

fn measurements(bench: &Bench, meshed: bool) -> Vec<(String, Measure)> {
    let seconds = bench.seconds;
    let mut all: Vec<(String, Measure)> = Vec::new();
    for (layer, by_name, guarded) in [("L4", false, false), ("L7", true, false), ("L4 guarded", false, true), ("L7 guarded", true, true)] {
        let url = move |s: &Pod| if by_name && meshed { format!("http://{}/", s.name) } else { format!("http://{}/", s.address(8080)) };
        for n in [1_u32, 16, 64] {
            let measure = move |bed: &Bed, c: &Pod, s: &Pod| {
                guard(bed, guarded)?;
                wrk(bed, c, &url(s), n, seconds, false)
            };
            all.push((format!("{layer} requests/s, {n} connections"), Box::new(measure)));
        }
        let measure = move |bed: &Bed, c: &Pod, s: &Pod| {
            guard(bed, guarded)?;
            wrk(bed, c, &url(s), 16, seconds, true)
        };
        all.push((format!("{layer} new connections/s, 16 at a time"), Box::new(measure)));
    }
    for n in [1_u32, 32] {
        let measure = move |bed: &Bed, c: &Pod, s: &Pod| {
            guard(bed, false)?;
            let url = if meshed { format!("http://{}:82/", s.name) } else { format!("http://{}/", s.address(8082)) };
            h2load(bed, c, &url, n, seconds)
        };
        all.push((format!("L7 HTTP/2 requests/s, {n} at a time on a connection"), Box::new(measure)));
    }
    let bulk = move |bed: &Bed, c: &Pod, s: &Pod| {
        guard(bed, false)?;
        iperf(bed, c, &s.v4().to_string(), seconds)
    };
    all.push(("bulk MB/s, one stream".into(), Box::new(bulk)));
    all
}

/// Puts the policies in force, or out of it.
fn guard(bed: &Bed, guarded: bool) -> Result<()> {
    let others = (0..1000).map(|i| format!("  - to: [{{operation: {{methods: [GET], paths: [/other/{i}]}}}}]\n"));
    let mut policy = String::new();
    if guarded {
        policy =
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: guard, namespace: default}\nspec:\n  rules:\n"
                .to_owned();
        policy.extend(others);
        policy.push_str("  - to: [{operation: {methods: [GET], paths: [/]}}]\n");
    }
    bed.apply("guard", &policy)?;
    bed.settle()
}

/// `near` is taken for HTTP; the limit of `opaque` is never met, and keeps its connections in the proxy.
const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: near}
spec: {selector: {app: near}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {selector: {app: far}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: opaque}
spec: {selector: {app: near}, ports: [{name: tcp, port: 8080, targetPort: 8080}, {name: tcp-bulk, port: 8081, targetPort: 8081}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: opaque}
spec: {host: opaque, trafficPolicy: {connectionPool: {tcp: {maxConnections: 10000}}}}
";

/// Pods of one node, three ways: the columns of the table. `direct`: from pod to pod; the others through the proxy.
fn accel(bench: &Bench) -> Result<()> {
    const WAYS: [&str; 3] = ["no mesh", "off", "on"];
    let mut results: BTreeMap<(String, &str), Vec<(f64, f64)>> = BTreeMap::new();
    for round in 0..bench.rounds {
        for way in WAYS {
            let mut options = NodeOptions::default().quiet();
            options.arguments.extend(["--acceleration".to_owned(), if way == "no mesh" { "off" } else { way }.to_owned()]);
            let mut bed = Bed::start(1, &options)?;
            let config = bed.directory.join("nginx.conf");
            std::fs::write(&config, NGINX)?;
            let command = format!("iperf3 -s -p 8081 >/dev/null & exec nginx -c {0} -g \"pid {0}.$$;\"", config.display());
            bed.kubectl_apply("near", SERVICES)?;
            let client = bed.pod(&PodSpec::new("client", 0))?;
            let server =
                bed.pod(&PodSpec { command: vec!["sh".into(), "-c".into(), command], port: Some(8080), ..PodSpec::new("near", 0) })?;
            bed.namespace("default", if way == "no mesh" { &[] } else { AMBIENT })?;
            [&client, &server].into_iter().try_for_each(|p| bed.wait_captured(p, way != "no mesh"))?;
            bed.settle()?;
            let unavailable = bed.nodes()[0].admin_json("/acceleration")?["unavailable"] == true;
            anyhow::ensure!(unavailable == (way != "on"), "acceleration is not what it was asked to be: {way}");
            let address = format!("http://{}/", server.address(8080));
            let named = |name: &str| if way == "no mesh" { address.clone() } else { format!("http://{name}/") };
            for (layer, url) in [("direct", &address), ("L4", &named("opaque:8080")), ("L7", &named("near"))] {
                for n in [1, 16, 64] {
                    let (_, what) = (wrk(&bed, &client, url, n, 1, false)?, format!("{layer}, {n} connections"));
                    if what.contains(&bench.only) {
                        results.entry((what, way)).or_default().push(wrk_p50(&bed, &client, url, n, bench.seconds)?);
                    }
                }
            }
            let address = server.v4().to_string();
            for (layer, host) in [("direct", &address[..]), ("L4", if way == "no mesh" { &address[..] } else { "opaque" })] {
                let what = format!("{layer}, bulk MB/s");
                if what.contains(&bench.only) {
                    results.entry((what, way)).or_default().push((iperf(&bed, &client, host, bench.seconds)?, 0.0));
                }
            }
        }
        eprintln!("round {} of {} done", round + 1, bench.rounds);
    }
    println!("{:<26} {:>10} {:>9} {:>9} {:>9} {:>9}", "requests/s; p50", "no mesh", "off", "on", "p50 off", "p50 on");
    let names = results.keys().map(|(name, _)| name.clone()).collect::<std::collections::BTreeSet<_>>();
    for name in names {
        let of = |way| {
            let all = results.get(&(name.clone(), way)).map_or(&[][..], |v| v);
            (median(&all.iter().map(|v| v.0).collect::<Vec<_>>()), median(&all.iter().map(|v| v.1).collect::<Vec<_>>()))
        };
        let [none, ways @ ..] = WAYS.map(of);
        let ([off, on], [p50_off, p50_on]) = (ways.map(|w| w.0 / none.0), ways.map(|w| w.1 / none.1));
        println!("{name:<26} {:>10.0} {off:>9.2} {on:>9.2} {p50_off:>9.2} {p50_on:>9.2}", none.0);
    }
    Ok(())
}

/// One HTTP hop of ours beside one of Envoy's, which has one worker as well and no access log either. Of Envoy's hop nothing is captured: its
/// client dials it on loopback.
fn envoy(bench: &Bench) -> Result<()> {
    const WAYS: [&str; 3] = ["no mesh", "mesh-node", "envoy"];
    let mut bed = Bed::start(1, &NodeOptions::default().quiet())?;
    let config = bed.directory.join("nginx.conf");
    std::fs::write(&config, NGINX)?;
    bed.kubectl_apply("near", SERVICES)?;
    let client = bed.pod(&PodSpec::new("client", 0))?;
    let command = format!("exec nginx -c {0} -g \"pid {0}.$$;\"", config.display());
    let server = bed.pod(&PodSpec { command: vec!["sh".into(), "-c".into(), command], port: Some(8080), ..PodSpec::new("near", 0) })?;
    let config = bed.directory.join("envoy.json");
    std::fs::write(&config, mesh_tests::envoy::hop(9000, server.address(8080).parse()?).to_string())?;
    let arguments =
        ["--config-path", config.to_str().context("a path")?, "--concurrency", "1", "--disable-hot-restart", "--log-level", "off"];
    let mut running = bed.command(&client, &mesh_tests::envoy::installed()?, &arguments).spawn()?;
    let address = format!("http://{}/", server.address(8080));
    let mut results: BTreeMap<(u32, &str), Vec<(f64, f64)>> = BTreeMap::new();
    for round in 0..bench.rounds {
        for way in WAYS {
            let meshed = way == "mesh-node";
            bed.namespace("default", if meshed { AMBIENT } else { &[] })?;
            [&client, &server].into_iter().try_for_each(|p| bed.wait_captured(p, meshed))?;
            bed.settle()?;
            let url = if meshed {
                "http://near/"
            } else if way == "envoy" {
                "http://127.0.0.1:9000/"
            } else {
                &address
            };
            for connections in [1, 16, 64] {
                wrk(&bed, &client, url, connections, 1, false)?;
                results.entry((connections, way)).or_default().push(wrk_p50(&bed, &client, url, connections, bench.seconds)?);
            }
        }
        eprintln!("round {} of {} done", round + 1, bench.rounds);
    }
    running.kill()?;
    running.wait()?;
    println!(
        "{:<16} {:>10} {:>10} {:>10} {:>15} {:>11} {:>14} {:>10}",
        "requests/s; p50", "no mesh", "mesh-node", "envoy", "mesh-node/none", "envoy/none", "p50 mesh-node", "p50 envoy"
    );
    for connections in [1, 16, 64] {
        let of = |way| {
            let all = &results[&(connections, way)];
            (median(&all.iter().map(|v| v.0).collect::<Vec<_>>()), median(&all.iter().map(|v| v.1).collect::<Vec<_>>()))
        };
        let [none, mesh, envoy] = WAYS.map(of);
        println!(
            "{:<16} {:>10.0} {:>10.0} {:>10.0} {:>15.2} {:>11.2} {:>14.2} {:>10.2}",
            format!("{connections} connections"),
            none.0,
            mesh.0,
            envoy.0,
            mesh.0 / none.0,
            envoy.0 / none.0,
            mesh.1 / none.1,
            envoy.1 / none.1
        );
    }
    Ok(())
}

/// What is told of requests costs: the columns are nothing, Istio's metrics by both reporters, and a line of the access log by each too.
fn telemetry(bench: &Bench) -> Result<()> {
    const WAYS: [(&str, &str); 3] = [
        ("off", "metrics: [{overrides: [{match: {metric: ALL_METRICS}, disabled: true}]}]"),
        ("metrics", "metrics: [{providers: [{name: prometheus}]}]"),
        ("metrics and log", "accessLogging: [{providers: [{name: file}]}]"),
    ];
    // On one node, it tells of a request as both ends; of two each tells once.
    const PLACES: [(&str, &str); 2] = [("one node", "http://near/"), ("two nodes", "http://far/")];
    let mut bed = Bed::ambient(&NodeOptions::default().quiet())?;
    let config = bed.directory.join("nginx.conf");
    std::fs::write(&config, NGINX)?;
    bed.kubectl_apply("near", SERVICES)?;
    let log = bed.directory.join("access.log");
    let mesh = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    extensionProviders: [{{name: file, envoyFileAccessLog: {{path: {}}}}}]\n",
        log.display()
    );
    bed.apply("mesh", &mesh)?;
    let command = format!("exec nginx -c {0} -g \"pid {0}.$$;\"", config.display());
    let server = |name: &str, node| PodSpec {
        command: vec!["sh".into(), "-c".into(), command.clone()],
        port: Some(8080),
        ..PodSpec::new(name, node)
    };
    let [client, ..] = bed.meshed([PodSpec::new("client", 0), server("near", 0), server("far", 1)])?;
    let mut results = BTreeMap::<(&str, u32, &str), Vec<(f64, f64)>>::new();
    for round in 0..bench.rounds {
        for (way, spec) in WAYS {
            let yaml = format!(
                "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: all, namespace: istio-system}}\nspec: {{{spec}}}\n"
            );
            bed.apply("telemetry", &yaml)?;
            bed.settle()?;
            for (place, url) in PLACES {
                for connections in [1, 16, 64] {
                    let before = ticks(&bed)?;
                    let rate = wrk(&bed, &client, url, connections, bench.seconds, false)?;
                    let cpu = (ticks(&bed)? - before) * 10.0 / (rate * f64::from(bench.seconds) / 1000.0);
                    results.entry((place, connections, way)).or_default().push((rate, cpu));
                }
            }
            std::fs::OpenOptions::new().write(true).truncate(true).create(true).open(&log)?;
        }
        eprintln!("round {} of {} done", round + 1, bench.rounds);
    }
    println!(
        "{:<26} {:>12} {:>12} {:>16} {:>14} {:>22} {:>30}",
        "requests/s; CPU", "off", "metrics", "metrics and log", "metrics/off", "metrics and log/off", "ms CPU of 1,000 requests"
    );
    for ((place, _), connections) in PLACES.into_iter().flat_map(|place| [1, 16, 64].map(|n| (place, n))) {
        let of = |value: fn(&(f64, f64)) -> f64| {
            WAYS.map(|(way, _)| median(&results[&(place, connections, way)].iter().map(value).collect::<Vec<_>>()))
        };
        let ([off, metrics, both], cpu) = (of(|r| r.0), of(|r| r.1).map(|ms| format!("{ms:.1}")).join(", "));
        let what = format!("{place}, {connections} connections");
        println!("{what:<26} {off:>12.0} {metrics:>12.0} {both:>16.0} {:>14.2} {:>22.2} {cpu:>30}", metrics / off, both / off);
    }
    let count = |result: &str| {
        let of = |node: usize| bed.nodes()[node].metric("mesh_access_log_lines_total", &[&format!("result=\"{result}\"")]);
        Ok::<_, anyhow::Error>(of(0)? + of(1)?)
    };
    println!("lines of the access log: {:.0} written, {:.0} dropped", count("written")?, count("dropped")?);
    Ok(())
}

/// Requests per second, and half of the requests' time in microseconds.
fn wrk_p50(bed: &Bed, client: &Pod, url: &str, connections: u32, seconds: u32) -> Result<(f64, f64)> {
    let (connections, duration) = (connections.to_string(), format!("{seconds}s"));
    let output = bed.run(client, Path::new("/usr/bin/wrk"), &["-t", "1", "-c", &connections, "-d", &duration, "--latency", url])?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(!text.contains("Non-2xx"), "{text}");
    let rate = text.lines().find_map(|l| l.strip_prefix("Requests/sec:")).with_context(|| text.to_string())?.trim().parse()?;
    let p50 = text.lines().find_map(|l| l.trim().strip_prefix("50%")).with_context(|| text.to_string())?.trim();
    let number = p50.trim_end_matches(|c: char| c.is_alphabetic());
    let scale = match &p50[number.len()..] {
        "us" => 1.0,
        "ms" => 1e3,
        _ => 1e6,
    };
    Ok((rate, number.parse::<f64>()? * scale))
}

fn wrk(bed: &Bed, client: &Pod, url: &str, connections: u32, seconds: u32, close: bool) -> Result<f64> {
    let (connections, duration) = (connections.to_string(), format!("{seconds}s"));
    let mut arguments = vec!["-t", "1", "-c", &connections, "-d", &duration];
    if close {
        arguments.extend(["-H", "Connection: close"]);
    }
    arguments.push(url);
    let output = bed.run(client, Path::new("/usr/bin/wrk"), &arguments)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|l| l.strip_prefix("Requests/sec:")).with_context(|| text.to_string())?;
    ensure!(!text.contains("Non-2xx"), "{text}");
    Ok(line.trim().parse()?)
}

/// Requests per second of one HTTP/2 connection with so many streams at a time.
fn h2load(bed: &Bed, client: &Pod, url: &str, streams: u32, seconds: u32) -> Result<f64> {
    let (streams, duration) = (streams.to_string(), seconds.to_string());
    let output = bed.run(client, Path::new("/usr/bin/h2load"), &["-c", "1", "-m", &streams, "-D", &duration, url])?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(text.contains(" 0 failed, 0 errored"), "{text}");
    let line = text.lines().find_map(|l| l.strip_prefix("finished in ")).with_context(|| text.to_string())?;
    let rate = line.split(", ").find_map(|part| part.strip_suffix(" req/s")).with_context(|| text.to_string())?;
    Ok(rate.trim().parse()?)
}

fn iperf(bed: &Bed, client: &Pod, host: &str, seconds: u32) -> Result<f64> {
    let duration = seconds.to_string();
    let mut rate = None;
    wait_for("iperf3", std::time::Duration::from_secs(30), || {
        let output = bed.run(client, Path::new("/usr/bin/iperf3"), &["-c", host, "-p", "8081", "-t", &duration, "-J"])?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(rate.is_some())
    })?;
    Ok(rate.context("a rate")? / 8e6)
}

/// CPU time of both mesh-nodes, in ticks of 10 ms.
fn ticks(bed: &Bed) -> Result<f64> {
    let mut sum = 0.0;
    for node in bed.nodes() {
        let pid = node.pid().context("running")?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect::<Vec<_>>();
        sum += fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    }
    Ok(sum)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
