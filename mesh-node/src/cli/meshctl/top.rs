//! A live view: requests per second, errors and latency of each workload, from the node's metrics.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    Failure,
    client::Admin,
    table::{Table, cell},
};

/// What is counted of one workload since the node started.
#[derive(Debug, Default, Clone)]
struct Counts {
    requests: f64,
    errors: f64,
    /// Cumulative, by upper bound in milliseconds.
    buckets: BTreeMap<u64, f64>,
}

/// By reporter and workload.
type All = BTreeMap<(String, String), Counts>;

/// Shows it anew every `interval`, `times` times or for ever, as `shown` has it.
pub fn run(
    admin: &Admin,
    interval: Duration,
    times: Option<u32>,
    shown: impl Fn(&Value, &dyn Fn(&Value) -> String) -> String,
) -> Result<(), Failure> {
    let mut before: Option<(Instant, All)> = None;
    let mut looks = 0;
    let live = std::io::stdout().is_terminal();
    loop {
        let now = (Instant::now(), read(&admin.get("/metrics")?));
        if let Some((then, counts)) = &before {
            let text = shown(&document(counts, &now.1, now.0.duration_since(*then)), &view);
            let clear = if live { "\x1b[H\x1b[2J" } else { "" };
            let mut out = std::io::stdout();
            // Who has stopped reading gets no more.
            if out.write_all(format!("{clear}{text}").as_bytes()).and_then(|()| out.flush()).is_err() {
                return Ok(());
            }
            looks += 1;
            if times.is_some_and(|t| looks >= t) {
                return Ok(());
            }
        }
        before = Some(now);
        std::thread::sleep(interval);
    }
}

fn label<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let at = line.find(&format!("{name}=\""))? + name.len() + 2;
    line[at..].split('"').next()
}

/// A workload is seen by what it asks (source) and by what it is asked (destination).
fn read(metrics: &str) -> All {
    let mut all = All::new();
    for line in metrics.lines().filter(|l| !l.starts_with('#')) {
        let (is_count, is_bucket) =
            (line.starts_with("istio_requests_total{"), line.starts_with("istio_request_duration_milliseconds_bucket{"));
        if !is_count && !is_bucket {
            continue;
        }
        let Some((reporter, value)) = label(line, "reporter").zip(line.rsplit(' ').next().and_then(|v| v.parse::<f64>().ok())) else {
            continue;
        };
        let end = if reporter == "source" { "source" } else { "destination" };
        let name = |part: &str| label(line, &format!("{end}_{part}")).unwrap_or("unknown").to_owned();
        let counts = all.entry((reporter.to_owned(), format!("{}/{}", name("workload_namespace"), name("workload")))).or_default();
        if is_count {
            counts.requests += value;
            // gRPC answers 200 whatever becomes of a call: unknown, deadline, exhausted, internal, unavailable, data loss.
            let grpc = label(line, "grpc_response_status").is_some_and(|s| ["2", "4", "8", "13", "14", "15"].contains(&s));
            let failed = grpc || label(line, "response_code").is_some_and(|c| c.starts_with('5') || c == "0");
            counts.errors += if failed { value } else { 0.0 };
        } else {
            let bound = label(line, "le").unwrap_or_default();
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounds are small and positive")]
            let bound = if bound == "+Inf" { u64::MAX } else { (bound.parse::<f64>().unwrap_or(0.0) * 1000.0) as u64 };
            *counts.buckets.entry(bound).or_default() += value;
        }
    }
    all
}

/// What happened between two looks, by workload and side.
fn document(before: &All, now: &All, took: Duration) -> Value {
    let one = |((reporter, workload), counts): (&(String, String), &Counts)| {
        let old = before.get(&(reporter.clone(), workload.clone())).cloned().unwrap_or_default();
        let rate = |now: f64, then: f64| ((now - then).max(0.0) / took.as_secs_f64() * 10.0).round() / 10.0;
        let side = if reporter == "source" { "asks" } else { "answers" };
        json!({"workload": workload, "side": side, "requestsPerSecond": rate(counts.requests, old.requests),
            "errorsPerSecond": rate(counts.errors, old.errors), "p50Milliseconds": quantile(counts, &old, 0.5),
            "p99Milliseconds": quantile(counts, &old, 0.99)})
    };
    now.iter().map(one).collect()
}

fn view(document: &Value) -> String {
    let mut table = Table::new(&["WORKLOAD", "SIDE", "REQUESTS/S", "ERRORS/S", "P50", "P99"]);
    for one in document.as_array().into_iter().flatten() {
        let rate = |field: &str| format!("{:.1}", one[field].as_f64().unwrap_or(0.0));
        let most = |field: &str| match one[field].as_f64() {
            None => "-".to_owned(),
            Some(bound) if bound > 3_600_000.0 => "> 1h".to_owned(),
            Some(bound) => format!("<= {bound}ms"),
        };
        table.row([
            cell(&one["workload"]),
            cell(&one["side"]),
            rate("requestsPerSecond"),
            rate("errorsPerSecond"),
            most("p50Milliseconds"),
            most("p99Milliseconds"),
        ]);
    }
    table.render()
}

/// The upper bound of the bucket a quantile is in, milliseconds; beyond the last it is some hours.
fn quantile(now: &Counts, before: &Counts, q: f64) -> Option<f64> {
    let since = now.buckets.iter().map(|(bound, n)| (*bound, n - before.buckets.get(bound).copied().unwrap_or(0.0))).collect::<Vec<_>>();
    let total = since.last().map_or(0.0, |(_, n)| *n);
    if total < 0.5 {
        return None;
    }
    let (bound, _) = since.iter().find(|(_, n)| *n >= q * total)?;
    #[expect(clippy::cast_precision_loss, reason = "bounds are small")]
    Some(if *bound == u64::MAX { 1e9 } else { *bound as f64 / 1000.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_quantiles_are_of_the_time_between() {
        let text = |n: u32, fast: u32, slow: u32| {
            let labels = "reporter=\"source\",source_workload=\"a\",source_workload_namespace=\"x\"";
            format!(
                "istio_requests_total{{{labels},response_code=\"200\"}} {n}\nistio_requests_total{{{labels},response_code=\"503\"}} {slow}\n\
                 istio_request_duration_milliseconds_bucket{{le=\"0.5\",{labels}}} {fast}\n\
                 istio_request_duration_milliseconds_bucket{{le=\"1000.0\",{labels}}} {}\n\
                 istio_request_duration_milliseconds_bucket{{le=\"+Inf\",{labels}}} {}\n",
                fast + slow,
                fast + slow
            )
        };
        let shown = view(&document(&read(&text(10, 10, 0)), &read(&text(30, 29, 1)), Duration::from_secs(2)));
        let row = shown.lines().nth(1).expect("a row").split_whitespace().collect::<Vec<_>>();
        assert_eq!(row, ["x/a", "asks", "10.5", "0.5", "<=", "0.5ms", "<=", "1000ms"], "{shown}");
    }
}
