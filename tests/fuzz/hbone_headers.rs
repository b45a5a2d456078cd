//! Headers of an HBONE request: never a panic, and what is accepted prints back to something accepted with the same meaning.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_node::hbone::headers::{Authority, TraceParent, forwarded_host, parse};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(authority) = text.parse::<Authority>() {
        assert_eq!(authority.to_string().parse::<Authority>().as_ref(), Ok(&authority));
    }
    if let Some(host) = forwarded_host(text) {
        assert!(text.contains(&host));
    }
    if let Ok(trace) = text.parse::<TraceParent>() {
        assert_eq!(trace.to_string(), text);
    }
    let mut lines = text.splitn(4, '\n');
    let mut next = || lines.next().unwrap_or_default();
    let request = http::Request::builder().method(next()).uri(next()).header("forwarded", next()).header("traceparent", next());
    if let Ok(request) = request.body(()) {
        let _ = parse(&request);
    }
});
