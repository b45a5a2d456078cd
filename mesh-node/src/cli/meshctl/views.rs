//! Documents of the admin endpoint as tables.

use std::{collections::BTreeSet, time::SystemTime};

use serde_json::Value;

use super::table::{Table, age, bytes, cell};

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn joined(value: &Value) -> String {
    cell(value)
}

/// `namespace/name` of an object that has both.
fn full_name(value: &Value) -> String {
    format!("{}/{}", cell(&value["namespace"]), cell(&value["name"]))
}

pub fn status(v: &Value) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<24}{value}\n"));
    line("Node", cell(&v["node"]));
    line("Version", cell(&v["version"]));
    line("Ready", cell(&v["ready"]));
    line("Up", age(v["uptimeSeconds"].as_u64().unwrap_or(0)));
    line("Fail mode", cell(&v["failMode"]));
    line("Trust domain", cell(&v["trustDomain"]));
    line("Outbound traffic", cell(&v["outboundTrafficPolicy"]));
    line("Configuration", format!("generation {}", cell(&v["generation"])));
    line("Open connections", cell(&v["openConnections"]));
    let remarks = list(&v["remarks"]);
    line("Remarks", if remarks.is_empty() { "none: everything is in force".to_owned() } else { remarks.len().to_string() });
    for remark in remarks {
        text.push_str(&format!("  {}\n", cell(remark)));
    }
    text
}

pub fn pods(v: &Value) -> String {
    let mut table = Table::new(&["POD", "IN MESH", "CAPTURED", "ADDRESSES", "PROBLEM"]);
    for p in list(v) {
        table.row([full_name(p), cell(&p["enrolled"]), cell(&p["captured"]), joined(&p["addresses"]), cell(&p["problem"])]);
    }
    table.render()
}

pub fn workloads(v: &Value) -> String {
    let mut table = Table::new(&["WORKLOAD", "NODE", "PROTOCOL", "MTLS", "IDENTITY", "ADDRESSES", "POLICIES"]);
    for w in list(v) {
        let mut mtls = cell(&w["mtls"]);
        for (port, mode) in w["mtlsByPort"].as_object().into_iter().flatten() {
            mtls.push_str(&format!(",{port}={}", cell(mode)));
        }
        let policies = list(&w["policies"]["all"]).len();
        let identity = cell(&w["identity"]);
        let identity = identity.strip_prefix("spiffe://").unwrap_or(&identity).to_owned();
        table.row([full_name(w), cell(&w["node"]), cell(&w["protocol"]), mtls, identity, joined(&w["addresses"]), policies.to_string()]);
    }
    table.render()
}

pub fn services(v: &Value) -> String {
    let mut table = Table::new(&["SERVICE", "PORT", "PROTOCOL", "ADDRESSES", "ENDPOINTS", "READY", "ROUTES FROM"]);
    for s in list(v) {
        if list(&s["ports"]).is_empty() {
            table.row([full_name(s)].into_iter().chain((0..6).map(|_| "-".to_owned())));
        }
        for p in list(&s["ports"]) {
            let endpoints = list(&p["endpoints"]);
            let ready = endpoints.iter().filter(|e| e["ready"] == true).count();
            table.row([
                full_name(s),
                cell(&p["port"]),
                cell(&p["protocol"]),
                joined(&s["addresses"]),
                endpoints.len().to_string(),
                ready.to_string(),
                cell(&p["httpRoutes"]["from"]),
            ]);
        }
    }
    table.render()
}

/// Where each port of services leads.
pub fn endpoints(v: &Value) -> String {
    let mut table = Table::new(&["SERVICE", "PORT", "PROTOCOL", "ENDPOINT", "WORKLOAD", "READY", "CONNECTIONS"]);
    for s in list(v).iter().filter(|s| list(&s["ports"]).is_empty()) {
        table.row([full_name(s)].into_iter().chain((0..6).map(|_| "-".to_owned())));
    }
    for (s, p) in list(v).iter().flat_map(|s| list(&s["ports"]).iter().map(move |p| (s, p))) {
        let port = || [full_name(s), cell(&p["port"]), cell(&p["protocol"])].into_iter();
        if list(&p["endpoints"]).is_empty() {
            table.row(port().chain(["none", "-", "-", "-"].map(str::to_owned)));
        }
        for e in list(&p["endpoints"]) {
            table.row(port().chain([cell(&e["address"]), cell(&e["workload"]), cell(&e["ready"]), cell(&e["connections"])]));
        }
    }
    table.render()
}

pub fn routes(v: &Value) -> String {
    let mut table = Table::new(&["SERVICE", "PORT", "FOR", "FROM", "RULE", "MATCH", "ACTION", "DESTINATIONS"]);
    for r in list(v) {
        let destinations = list(&r["destinations"]);
        let destination = |d: &Value| {
            let cluster = d["cluster"].as_str().map_or_else(|| "missing".to_owned(), |c| c.trim_start_matches("outbound|").to_owned());
            if destinations.len() > 1 { format!("{} {cluster}", cell(&d["weight"])) } else { cluster }
        };
        let matches = list(&r["matches"]);
        let taken = if matches.is_empty() { "everything".to_owned() } else { matches.iter().map(cell).collect::<Vec<_>>().join(" or ") };
        let all = destinations.iter().map(destination).collect::<Vec<_>>().join(", ");
        table.row([
            cell(&r["service"]),
            cell(&r["port"]),
            r["clientsOf"].as_str().unwrap_or("all").to_owned(),
            cell(&r["from"]),
            match r["kind"].as_str() {
                Some(kind @ ("tcp" | "tls")) => format!("{kind} {}", cell(&r["rule"])),
                _ => cell(&r["rule"]),
            },
            taken,
            cell(&r["action"]),
            if all.is_empty() { "-".to_owned() } else { all },
        ]);
    }
    table.render()
}

/// The policies of workloads; of one, or all that have any.
pub fn policies(workloads: &[&Value]) -> String {
    let mut table = Table::new(&["WORKLOAD", "PORT", "MTLS", "ALLOW", "DENY", "CUSTOM", "AUDIT", "DRY RUN", "TOKENS OF"]);
    for w in workloads {
        let mut row = |port: String, mtls: String, p: &Value| {
            let custom = p["custom"].as_object().map(|c| c.iter().map(|(k, v)| format!("{k}:{}", cell(v))).collect::<Vec<_>>().join(","));
            let dry = list(&p["dryRunAllow"]).iter().chain(list(&p["dryRunDeny"])).map(cell).collect::<Vec<_>>().join(",");
            let or_none = |text: String| if text.is_empty() { "-".to_owned() } else { text };
            table.row([
                full_name(w),
                port,
                mtls,
                cell(&p["allow"]),
                cell(&p["deny"]),
                or_none(custom.unwrap_or_default()),
                cell(&p["audit"]),
                or_none(dry),
                cell(&p["issuers"]),
            ]);
        };
        row("all".to_owned(), cell(&w["mtls"]), &w["policies"]);
        let of = |field: &str| w[field].as_object().into_iter().flatten().map(|(port, _)| port);
        for port in of("policiesByPort").chain(of("mtlsByPort")).collect::<BTreeSet<_>>() {
            let policies = w["policiesByPort"].get(port).unwrap_or(&w["policies"]);
            row(port.clone(), cell(w["mtlsByPort"].get(port).unwrap_or(&w["mtls"])), policies);
        }
    }
    table.render()
}

pub fn certificates(v: &Value) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut table = Table::new(&["IDENTITY", "STATE", "AGE", "EXPIRES IN", "SERIAL"]);
    for c in list(v) {
        let (before, after) = (c["notBefore"].as_u64(), c["notAfter"].as_u64());
        let state = match (after, c["error"].as_str()) {
            (Some(after), _) if after <= now => "expired".to_owned(),
            (Some(_), _) if before.is_some_and(|before| before > now) => "not valid yet: a clock is, or was, ahead".to_owned(),
            (Some(_), None) => "good".to_owned(),
            (Some(_), Some(error)) => format!("good, but renewal fails: {error}"),
            (None, Some(error)) => format!("none: {error}"),
            (None, None) => "being fetched".to_owned(),
        };
        let old = before.map_or_else(|| "-".to_owned(), |b| age(now.saturating_sub(b)));
        let left = after.map_or_else(|| "-".to_owned(), |a| age(a.saturating_sub(now)));
        table.row([cell(&c["identity"]), state, old, left, cell(&c["serial"])]);
    }
    table.render()
}

pub fn pool(v: &Value) -> String {
    let mut table = Table::new(&["SOURCE", "DESTINATION", "ADDRESS", "CONNECTIONS", "STREAMS"]);
    for p in list(v) {
        table.row([cell(&p["source"]), cell(&p["destination"]), cell(&p["address"]), cell(&p["connections"]), cell(&p["streams"])]);
    }
    table.render()
}

pub fn clusters(v: &Value) -> String {
    let mut table = Table::new(&["SOURCE", "CLUSTER", "CONNECTIONS", "IDLE", "PENDING", "REQUESTS", "RETRIES", "EJECTED"]);
    for c in list(v) {
        let ejected = list(&c["ejected"]).iter().map(|e| format!("{} ({}s)", cell(&e["address"]), cell(&e["seconds"]))).collect::<Vec<_>>();
        let numbers = ["connections", "idle", "pending", "requests", "retries"].map(|f| cell(&c[f]));
        let ejected = if ejected.is_empty() { "-".to_owned() } else { ejected.join(",") };
        table.row([cell(&c["source"]), cell(&c["cluster"])].into_iter().chain(numbers).chain([ejected]));
    }
    table.render()
}

/// Open connections, and those between the proxy and applications with why they are accelerated or not.
pub fn connections(v: &Value) -> String {
    let mut table = Table::new(&[
        "DIRECTION",
        "PATH",
        "SOURCE",
        "DESTINATION",
        "SERVICE",
        "ENCRYPTED",
        "ACCELERATION",
        "AGE",
        "SENT",
        "RECEIVED",
        "SOURCE IDENTITY",
        "DESTINATION IDENTITY",
    ]);
    let identity = |c: &Value| cell(c).trim_start_matches("spiffe://").to_owned();
    for c in list(v) {
        let end = |name: &str, address: &str| match c[name].as_str() {
            Some(name) => format!("{name} ({})", cell(&c[address])),
            None => cell(&c[address]),
        };
        table.row([
            cell(&c["direction"]),
            cell(&c["path"]),
            end("source", "sourceAddress"),
            end("destination", "destinationAddress"),
            cell(&c["service"]),
            cell(&c["encrypted"]),
            cell(&c["acceleration"]),
            age(c["seconds"].as_u64().unwrap_or(0)),
            bytes(&c["sentBytes"]),
            bytes(&c["receivedBytes"]),
            identity(&c["sourceIdentity"]),
            identity(&c["destinationIdentity"]),
        ]);
    }
    table.render()
}

pub fn acceleration(v: &Value) -> String {
    if v["unavailable"] == true {
        return "acceleration is switched off, or this kernel does not have what it takes\n".to_owned();
    }
    let mut table = Table::new(&["ONE END", "OTHER END", "STATE", "REDIRECTED"]);
    for p in list(&v["pairs"]) {
        table.row([
            cell(&p["one"]),
            cell(&p["other"]),
            cell(&p["state"]),
            format!("{} / {}", bytes(&p["redirectedBytes"][0]), bytes(&p["redirectedBytes"][1])),
        ]);
    }
    table.render()
}

pub fn direct(v: &Value) -> String {
    let mut table = Table::new(&["SOURCE", "DESTINATION", "SERVICE", "CLIENT", "ENDPOINT", "AGE", "SENT", "RECEIVED"]);
    for c in list(&v["connections"]) {
        table.row([
            cell(&c["source"]),
            cell(&c["destination"]),
            cell(&c["service"]),
            cell(&c["client"]),
            cell(&c["endpoint"]),
            age(c["seconds"].as_u64().unwrap_or(0)),
            bytes(&c["sentBytes"]),
            bytes(&c["receivedBytes"]),
        ]);
    }
    format!("{} destinations may be reached past the proxy\n{}", cell(&v["routes"]), table.render())
}

pub fn authorize(v: &Value) -> String {
    let mut text = format!("{}: {}\n", cell(&v["decision"]).to_uppercase(), cell(&v["reason"]));
    let mut line = |name: &str, value: &Value| {
        if !value.is_null() {
            text.push_str(&format!("{name:<16}{}\n", cell(value)));
        }
    };
    line("From", &v["from"]["identity"]);
    line("From address", &v["from"]["address"]);
    line("To", &v["to"]["workload"]);
    line("Judged", &v["judged"]);
    line("Policy", &v["policy"]);
    line("Allowed by", &v["allowedBy"]);
    line("Details", &v["details"]);
    line("Audited by", &v["audited"]);
    let by = |decision: String, policy: &Value| if policy.is_null() { decision } else { format!("{decision} by {}", cell(policy)) };
    if !v["dryRun"].is_null() {
        line("Dry run", &by(cell(&v["dryRun"]["decision"]), &v["dryRun"]["policy"]).into());
    }
    for asked in list(&v["externalAuthorizers"]) {
        line("Authorizer", &format!("{} asked for {}", cell(&asked["provider"]), cell(&asked["policy"])).into());
    }
    text
}

pub fn explain(v: &Value) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<12}{value}\n"));
    line("From", format!("{} ({})", cell(&v["from"]["workload"]), cell(&v["from"]["identity"])));
    line("Dialled", cell(&v["dialled"]));
    if !v["service"].is_null() {
        line(
            "Service",
            format!("{} port {} ({})", cell(&v["service"]["name"]), cell(&v["service"]["port"]), cell(&v["service"]["protocol"])),
        );
    }
    if !v["request"].is_null() {
        line("Request", format!("{} {} at {}", cell(&v["request"]["method"]), cell(&v["request"]["path"]), cell(&v["request"]["host"])));
    }
    if !v["route"].is_null() {
        let from = if v["route"]["from"].is_null() { String::new() } else { format!(" of {}", cell(&v["route"]["from"])) };
        let matches = list(&v["route"]["matches"]).iter().map(cell).collect::<Vec<_>>().join(" or ");
        let matches = if matches.is_empty() { String::new() } else { format!(": {matches}") };
        line("Route", format!("rule {}{from}{matches}", cell(&v["route"]["rule"])));
    }
    let fault = &v["route"]["fault"];
    if !fault["delayMilliseconds"].is_null() {
        line("Delay", format!("{} ms for {}%", cell(&fault["delayMilliseconds"]), cell(&fault["delayPercent"])));
    }
    let sent = list(&v["destinations"]).iter().filter(|d| !d["request"].is_null());
    for sent in sent.map(|d| format!("{} at {}", cell(&d["request"]["path"]), cell(&d["request"]["host"]))).collect::<BTreeSet<_>>() {
        line("Sent as", sent);
    }
    line("Verdict", cell(&v["verdict"]));
    let mut table = Table::new(&["SHARE", "CLUSTER", "ENDPOINT", "WORKLOAD", "USED", "PATH", "DECISION", "REASON"]);
    let mut row = |share: String, cluster: String, e: &Value| {
        table.row([
            share,
            cluster,
            cell(&e["address"]),
            cell(&e["workload"]),
            match (&e["used"], &e["ready"], &e["ejected"]) {
                (Value::Bool(false), Value::Bool(false), _) => "no: not ready".to_owned(),
                (Value::Bool(false), _, Value::Bool(true)) => "no: ejected".to_owned(),
                (used, ..) => cell(used),
            },
            cell(&e["path"]),
            cell(&e["decision"]),
            cell(&e["reason"]),
        ]);
    };
    for destination in list(&v["destinations"]) {
        let (share, cluster) = (format!("{}%", cell(&destination["percent"])), cell(&destination["cluster"]));
        for endpoint in list(&destination["endpoints"]) {
            row(share.clone(), cluster.clone(), endpoint);
        }
        if let Some(problem) = destination["problem"].as_str() {
            row(share, cluster, &serde_json::json!({"reason": problem}));
        }
    }
    for endpoint in list(&v["endpoints"]) {
        row("-".to_owned(), "-".to_owned(), endpoint);
    }
    text + &table.render()
}

/// What kind of TLS a workload takes on each port, and what clients of the mesh do: on those ports, or on all.
pub fn tls_check(workload: &Value, ports: &[(String, String)], all: bool) -> String {
    let mut table = Table::new(&["WORKLOAD", "PORT", "SERVICE", "SERVER", "FROM THE MESH", "FROM OUTSIDE"]);
    let in_mesh = workload["protocol"] == "HBONE";
    let mut row = |port: &str, service: &str| {
        let mode = cell(workload["mtlsByPort"].get(port).unwrap_or(&workload["mtls"]));
        let (server, mesh, outside) = match (in_mesh, mode.as_str()) {
            (false, _) => ("not in the mesh".to_owned(), "plaintext", "plaintext"),
            (true, "STRICT") => (mode, "mutual TLS", "refused"),
            (true, _) => (mode, "mutual TLS", "plaintext"),
        };
        table.row([full_name(workload), port.to_owned(), service.to_owned(), server, mesh.to_owned(), outside.to_owned()]);
    };
    for (port, service) in ports {
        row(port, service);
    }
    // What no service leads to can be dialled as well.
    let listed = |port: &str| ports.iter().any(|(p, _)| p == port);
    for (port, _) in workload["mtlsByPort"].as_object().into_iter().flatten().filter(|(port, _)| all && !listed(port)) {
        row(port, "-");
    }
    if all {
        row(
            if ports.is_empty() && workload["mtlsByPort"].as_object().is_none_or(serde_json::Map::is_empty) { "all" } else { "others" },
            "-",
        );
    }
    table.render()
}

/// Hooks' counters and every pod's enrolment.
pub fn capture(pods: &Value, metrics: &str) -> String {
    let mut table = Table::new(&["EVENT IN THE KERNEL", "COUNT"]);
    for line in metrics.lines().filter_map(|l| l.strip_prefix("mesh_capture_events_total{event=\"")) {
        if let Some((event, value)) = line.split_once("\"} ") {
            table.row([event.to_owned(), value.to_owned()]);
        }
    }
    format!("{}\n{}", self::pods(pods), table.render())
}
