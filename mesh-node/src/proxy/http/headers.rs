//! Headers the proxy itself puts on requests, and those it takes off, as Envoy does for a sidecar's outbound listener.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{
    report::entry::X_REQUEST_ID,
    resource::mesh_config::AddedHeaders,
    route::request::{RequestHead, take_off, take_off_all},
};

/// Headers by which a caller that is trusted could steer Envoy's router. Nobody is, so they are taken off.
const CONTROL: [&str; 18] = [
    "x-envoy-upstream-stream-duration-ms",
    "x-envoy-internal",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-is-timeout-retry",
    "x-envoy-decorator-operation",
    "x-envoy-ip-tags",
    "x-envoy-original-path",
    "x-envoy-force-trace",
];

static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub static SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
static EXPECTED_TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
static ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");
/// Who the client has proved to be: by a proxy's word, so what others say in it is taken off.
pub static CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
pub static ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");

/// Takes off and puts on what every forwarded request has so.
pub fn prepare(head: &mut RequestHead, added: AddedHeaders) {
    if head.headers.keys().any(|name| name.as_str().starts_with("x-envoy-")) {
        take_off_all(&mut head.headers, |name| CONTROL.contains(&name.as_str()));
    }
    take_off(&mut head.headers, &CLIENT_CERT);
    if !head.headers.contains_key(&X_FORWARDED_PROTO) {
        // How it came here, whatever the client says that it is for: applications' TLS is not ended here.
        head.headers.insert(X_FORWARDED_PROTO.clone(), HeaderValue::from_static("http"));
    }
    if added.request_id {
        identify(&mut head.headers);
    }
    if added.attempt_count {
        count_attempt(&mut head.headers, 1);
    }
}

/// Gives a request a name, if it has none.
pub fn identify(headers: &mut HeaderMap) {
    if !headers.contains_key(&X_REQUEST_ID)
        && let Ok(id) = HeaderValue::from_bytes(&request_id(fastrand::u128(..)))
    {
        headers.insert(X_REQUEST_ID.clone(), id);
    }
}

/// A random UUID (RFC 9562 version 4).
fn request_id(bits: u128) -> [u8; 36] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let bits = bits & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let (mut text, mut at) = ([b'-'; 36], 0);
    for byte in bits.to_be_bytes() {
        if matches!(at, 8 | 13 | 18 | 23) {
            at += 1;
        }
        text[at] = DIGITS[usize::from(byte >> 4)];
        text[at + 1] = DIGITS[usize::from(byte & 15)];
        at += 2;
    }
    text
}

/// A time as the value of a header; of short ones nothing is put together.
pub fn milliseconds(time: Duration) -> HeaderValue {
    const SHORT: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
    let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    usize::try_from(millis).ok().and_then(|n| SHORT.get(n)).map_or_else(|| millis.into(), |text| HeaderValue::from_static(text))
}

/// Tells the endpoint how long it has.
pub fn expect_within(headers: &mut HeaderMap, time: Duration) {
    headers.insert(EXPECTED_TIMEOUT.clone(), whole_milliseconds(time).into());
}

/// The same in gRPC's own way.
pub fn expect_within_as_grpc(headers: &mut HeaderMap, time: Duration) {
    if let Ok(value) = HeaderValue::try_from(grpc_timeout_text(whole_milliseconds(time))) {
        headers.insert(GRPC_TIMEOUT.clone(), value);
    }
}

/// What has gone by since a time was written down does not make it a millisecond less.
fn whole_milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

/// Milliseconds as a `grpc-timeout`, whose number has eight digits at most.
fn grpc_timeout_text(millis: u64) -> String {
    const MAX_MILLIS: u64 = 99_999_999;
    let [seconds, minutes, hours] = [1000, 60_000, 3_600_000].map(|unit| millis / unit);
    match millis {
        ..=MAX_MILLIS => format!("{millis}m"),
        _ if seconds <= MAX_MILLIS => format!("{seconds}S"),
        _ if minutes <= MAX_MILLIS => format!("{minutes}M"),
        _ => format!("{}H", hours.min(MAX_MILLIS)),
    }
}

/// Tells the endpoint which attempt this is, from 1.
pub fn count_attempt(headers: &mut HeaderMap, number: u32) {
    let value = if number == 1 { HeaderValue::from_static("1") } else { number.into() };
    headers.insert(ATTEMPT_COUNT.clone(), value);
}

/// `grpc-timeout`: at most eight digits and a unit (the gRPC project's `PROTOCOL-HTTP2.md`). Nothing is no timeout, and parts of a
/// millisecond are a whole one, as for Envoy.
pub fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let n: u64 = digits.parse().ok().filter(|n| *n > 0 && digits.len() <= 8 && digits.bytes().all(|b| b.is_ascii_digit()))?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_millis(n.div_ceil(1000)),
        "n" => Duration::from_millis(n.div_ceil(1_000_000)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_uuids_of_version_4() {
        for bits in [0, u128::MAX, 0x1234_5678_9abc_def0_1234_5678_9abc_def0] {
            let id = String::from_utf8(request_id(bits).to_vec()).expect("a text");
            assert!(id.len() == 36 && id.as_bytes()[14] == b'4' && b"89ab".contains(&id.as_bytes()[19]), "{id}");
        }
    }

    #[test]
    fn grpc_timeouts_are_written() {
        for (millis, text) in [(0, "0m"), (99_999_999, "99999999m"), (100_000_000, "100000S"), (u64::MAX / 1000, "99999999H")] {
            assert_eq!(grpc_timeout_text(millis), text);
        }
    }

    #[test]
    fn grpc_timeouts_are_read() {
        for (text, expected) in [
            ("200m", Some(Duration::from_millis(200))),
            ("1H", Some(Duration::from_hours(1))),
            ("5S", Some(Duration::from_secs(5))),
            ("1n", Some(Duration::from_millis(1))),
            ("1500u", Some(Duration::from_millis(2))),
            ("123456789S", None),
            ("S", None),
            ("0n", None),
            ("00S", None),
            ("", None),
            ("5x", None),
            ("-5S", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_static(text));
            assert_eq!(grpc_timeout(&headers), expected, "{text}");
        }
    }
}
