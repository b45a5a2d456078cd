//! Expressions of filters and tags, and formats of logs: never a panic, and an end soon, whatever they say of a request whose headers say anything.
#![no_main]

use std::time::SystemTime;

use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use mesh_node::report::{
    entry::{Asked, Entry},
    expression::Expression,
    format::Format,
    kept::Kept,
};

// An expression or format, and behind the first line the value of a header.
fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (program, value) = text.split_once('\n').unwrap_or((text, "9999-12-31T23:59:59-01:00"));
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert("x", value);
    }
    let kept = Kept::All(headers);
    let asked = Asked { method: "GET", path: "/a?b=c", sent_path: "/a?b=c", authority: "a", scheme: "http", headers: &kept };
    let entry = Entry { request: Some(asked), code: 503, ..Entry::begun(SystemTime::UNIX_EPOCH) };
    if let Ok(expression) = Expression::parse(program) {
        let _ = expression.tag(&entry);
    }
    if let Ok(format) = Format::text(program) {
        assert!(format.line(&entry).ends_with('\n'));
    }
});
