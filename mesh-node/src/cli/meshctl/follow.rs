//! What goes on for a while: following a workload's requests, and a node that stops.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    Failure,
    client::{Admin, query},
    table::cell,
};

/// How often a node is asked.
const POLL_INTERVAL: Duration = Duration::from_millis(300);

/// Prints what a workload does, from now on, each as `shown` has it of the event and a line for people.
pub fn trace(
    admin: &Admin,
    workload: &str,
    shown: impl Fn(&Value, &str) -> String,
    count: Option<u64>,
    until: Option<Instant>,
) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    let colours = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut next: Option<u64> = None;
    let mut printed = 0;
    loop {
        let mut asked = vec![("workload", workload.to_owned())];
        asked.extend(next.map(|n| ("from", n.to_string())));
        let asked = asked.iter().map(|(name, value)| (*name, value.as_str())).collect::<Vec<_>>();
        let answer = admin.document(&query("/trace", &asked))?;
        if next.is_none() {
            eprintln!("meshctl: following {workload}");
        }
        next = Some(answer["next"].as_u64().unwrap_or_default());
        if let Some(lost) = answer["lost"].as_u64().filter(|n| *n > 0) {
            eprintln!("meshctl: {lost} more were not kept: there are too many to follow");
        }
        for event in answer["events"].as_array().into_iter().flatten() {
            let line = shown(event, &line(event, colours));
            // Who has stopped reading gets no more.
            if out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_err() {
                return Ok(());
            }
            printed += 1;
            if count.is_some_and(|c| printed >= c) {
                return Ok(());
            }
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return Ok(());
        }
        sleep(POLL_INTERVAL);
    }
}

fn line(event: &Value, colours: bool) -> String {
    let asks = event["reporter"] == "source";
    let other = if asks { &event["destination"] } else { &event["source"] };
    let other = if other.is_null() { if asks { &event["server"] } else { &event["client"] } } else { other };
    let start = event["start"].as_str().and_then(|s| s.get(11..23)).unwrap_or("-");
    let mut line = format!("{start}  {} {}  ", if asks { "->" } else { "<-" }, cell(other));
    let failed = if event["kind"] == "request" {
        let code = event["code"].as_u64().unwrap_or(0);
        let text = format!("{} {}{}  {code}", cell(&event["method"]), cell(&event["authority"]), cell(&event["path"]));
        line += &text;
        code == 0 || code >= 400
    } else {
        line += &format!("connection  sent {} received {}", cell(&event["bytesReceived"]), cell(&event["bytesSent"]));
        event["flags"] != "-"
    };
    line += &format!("  {}ms", cell(&event["duration"]));
    for (name, value) in [
        ("", &event["flags"]),
        ("", &event["details"]),
        ("", &event["error"]),
        ("request ", &event["requestId"]),
        ("trace ", &event["traceId"]),
    ] {
        let text = cell(value);
        if text != "-" && text != "via_upstream" {
            line += &format!("  {name}{text}");
        }
    }
    // What clients send does not get at the terminal.
    line.retain(|c| !c.is_control());
    if failed && colours { format!("\x1b[31m{line}\x1b[0m\n") } else { line + "\n" }
}

/// Has the node stop, and waits until it has.
pub fn drain(admin: &Admin, patience: Duration) -> Result<ExitCode, Failure> {
    admin.post("/quitquitquit")?;
    let until = Instant::now() + patience;
    let mut left = String::new();
    while Instant::now() < until {
        match admin.document("/status") {
            Ok(status) => {
                let now = cell(&status["openConnections"]);
                if now != left {
                    super::say(&format!("stopping: {now} connections are open\n"));
                    left = now;
                }
            }
            Err(Failure::Absent(_)) => {
                super::say("stopped\n");
                return Ok(ExitCode::SUCCESS);
            }
            // Busy, or about to be gone.
            Err(Failure::Broken(_)) => {}
            Err(other) => return Err(other),
        }
        sleep(POLL_INTERVAL);
    }
    eprintln!("meshctl: it has not stopped after {} s", patience.as_secs());
    Ok(ExitCode::FAILURE)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_say_who_what_and_how_it_went() {
        let request = json!({"kind": "request", "reporter": "source", "start": "2026-01-02T03:04:05.678Z", "destination": "shop/cart-v1",
            "method": "GET", "authority": "cart", "path": "/x?y=1", "code": 503, "flags": "UH", "details": "no_healthy_upstream",
            "duration": 2, "requestId": "r", "traceId": null});
        assert_eq!(line(&request, false), "03:04:05.678  -> shop/cart-v1  GET cart/x?y=1  503  2ms  UH  no_healthy_upstream  request r\n");
        assert!(line(&request, true).starts_with("\x1b[31m"));
        let connection = json!({"kind": "connection", "reporter": "destination", "start": "2026-01-02T03:04:05.678Z", "source": null,
            "client": "10.0.0.1:5", "bytesReceived": 7, "bytesSent": 9, "duration": 30, "flags": "-", "error": null});
        assert_eq!(line(&connection, true), "03:04:05.678  <- 10.0.0.1:5  connection  sent 7 received 9  30ms\n");
    }
}
