use std::{
    borrow::Cow,
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderValue};

use super::{
    super::{
        entry::{Asked, ClusterName},
        kept::Kept,
        trace::Parent,
    },
    *,
};
use crate::{id::ObjectName, report::format::operator::grpc::snake};

fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("user-agent", HeaderValue::from_static("curl/8"));
    headers.insert("x-request-id", HeaderValue::from_static("id-1"));
    headers.insert("x-odd", HeaderValue::from_bytes(b"a\"b\tc\xff").expect("valid"));
    headers
}

static REVIEWS: LazyLock<ObjectName> = LazyLock::new(|| ObjectName { namespace: "default".into(), name: "reviews".into() });

fn entry(headers: &Kept) -> Entry<'_> {
    Entry {
        start: SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_552_496_789),
        duration: Duration::from_micros(12_900),
        request: Some(Asked { method: "GET", path: "/a?b=c", sent_path: "/a?b=c", authority: "reviews:9080", scheme: "http", headers }),
        protocol: Some("HTTP/1.1"),
        code: 503,
        grpc_status: None,
        grpc_said: false,
        flags: Cow::Borrowed("UH"),
        flags_long: Cow::Borrowed("NoHealthyUpstream"),
        received_after: Some(Duration::from_micros(1_100)),
        sent_after: None,
        answered_after: Some(Duration::from_micros(2_100)),
        attempts: 2,
        upstream_protocol: Some("HTTP/2"),
        tells_a_request: true,
        flag_bits: 2,
        details: Some("no_healthy_upstream"),
        termination_details: None,
        transport_failure: None,
        bytes_received: 0,
        bytes_sent: 19,
        service_time: None,
        upstream_host: None,
        upstream_cluster: Some(ClusterName::Outbound { service: &REVIEWS, port: 9080, subset: "" }),
        upstream_local: None,
        downstream_local: Some("10.96.0.1:9080".parse().expect("valid")),
        downstream_remote: Some("[fd00::1]:4242".parse().expect("valid")),
        sni: None,
        route: Some("default"),
        response_headers: None,
        response_trailers: None,
        mutual_tls: false,
        trace: Some(Parent { trace: 0xabc, span: 0xd }),
        peer: None,
        local: None,
        teller: None,
        other: None,
        cluster: "",
    }
}

#[test]
fn the_default_text_is_istio_s() {
    let headers = Kept::All(headers());
    let line = Format::default().line(&entry(&headers));
    assert_eq!(
        line,
        "[2026-11-24T20:34:56.789Z] \"GET /a?b=c HTTP/1.1\" 503 UH no_healthy_upstream - \"-\" 0 19 12 - \"-\" \"curl/8\" \"id-1\" \
         \"reviews:9080\" \"-\" outbound|9080||reviews.default.svc.cluster.local - 10.96.0.1:9080 [fd00::1]:4242 - default\n"
    );
}

#[test]
fn the_default_json_has_istio_s_keys_and_types() {
    let headers = Kept::All(headers());
    let line = Format::default_json().line(&entry(&headers));
    let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    let object = value.as_object().expect("an object");
    assert_eq!(object.len(), 24);
    assert_eq!(object["response_code"], 503);
    assert_eq!(object["duration"], 12);
    assert_eq!(object["bytes_sent"], 19);
    assert_eq!(object["method"], "GET");
    assert!(object["upstream_host"].is_null() && object["x_forwarded_for"].is_null() && object["upstream_service_time"].is_null());
}

#[test]
fn what_is_no_text_is_told_byte_by_byte_in_json() {
    let headers = Kept::All(headers());
    let line = Format::json([("odd", "%REQ(X-ODD)%")]).expect("a format").line(&entry(&headers));
    assert_eq!(line, "{\"odd\":\"a\\\"b\\tc\\u00ff\"}\n");
}

#[test]
fn operators_take_alternatives_and_lengths() {
    let headers = Kept::All(headers());
    let entry = entry(&headers);
    for (format, expected) in [
        ("%REQ(X-ODD)%", "a\\\"b\\tc\\xff\n"),
        ("%REQ(missing?:METHOD)% 100%%", "GET 100%\n"),
        ("%REQ(:PATH):2%|%PROTOCOL:4%", "/a|HTTP\n"),
        // Of bytes, and not of characters.
        ("%REQ(X-ODD):1%|%REQ(X-ODD):100%", "a|a\\\"b\\tc\\xff\n"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%", "fd00::1 4242\n"),
        ("%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%", "-\n"),
        ("plain\n", "plain\n"),
        ("%START_TIME(%s.%3f)% %START_TIME(%H:%M)%", "1795552496.789 20:34\n"),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT% %UPSTREAM_PROTOCOL% %ACCESS_LOG_TYPE%", "2 HTTP/2 DownstreamEnd\n"),
        ("%RESPONSE_FLAGS_LONG% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%", "NoHealthyUpstream 2 -\n"),
        ("%REQUEST_DURATION% %REQUEST_TX_DURATION% %TRAILER(grpc-message)%", "1 - -\n"),
        (
            "%RESP(:status)% %REQUESTED_SERVER_NAME(HOST_FIRST)% %REQUESTED_SERVER_NAME(SNI_FIRST:ORIG)% %STREAM_ID%",
            "503 reviews:9080 - id-1\n",
        ),
        ("%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT(12)% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(8)%", "10.96.0.0/12 fd00::/8\n"),
        ("%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT(0)% %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT(33)%", "0.0.0.0/0 -\n"),
        ("%PATH% %PATH(NQ)% %PATH(WQ:ORIG)%", "/a?b=c /a -\n"),
        (
            "%QUERY_PARAM(b)% %QUERY_PARAM(c)% %RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)% %ROUNDTRIP_DURATION%",
            "c - no_healthy_upstream -\n",
        ),
        ("%REQUEST_HEADER(user-agent)% %DYNAMIC_METADATA(a:b)% %HOSTNAME% %ENVIRONMENT(HOME)%", "curl/8 - - -\n"),
        ("%DOWNSTREAM_TLS_VERSION% %GRPC_STATUS(SNAKE_STRING)%", "- -\n"),
        ("%REQ_WITHOUT_QUERY(X-ENVOY-ORIGINAL-PATH?:PATH)% %REQ_WITHOUT_QUERY(user-agent)%", "/a curl/8\n"),
        ("%CEL(request.method + (response.code > 500 ? '!' : ''))% %CEL(upstream.address)%", "GET! -\n"),
        ("%CEL(request.headers['user-agent']):4% %CEL((response.code)):2% %REQ(:METHOD)%", "curl 50 GET\n"),
        ("%CEL(request.duration)% %CEL(request.headers['user-agent']):4%", "0.0129s curl\n"),
        ("%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME?X-OTHER)%", "-\n"),
    ] {
        assert_eq!(Format::text(format).map(|f| f.line(&entry)).as_deref(), Ok(expected), "{format}");
    }
    let json = Format::json([("a", "%REQ(:METHOD)% %UPSTREAM_HOST%"), ("b", "x\"y"), ("c", "%GRPC_STATUS%")]).expect("valid");
    assert_eq!(json.line(&entry), "{\"a\":\"GET -\",\"b\":\"x\\\"y\",\"c\":null}\n");
    let odd = Entry { grpc_status: Some(99), ..entry.clone() };
    let format = Format::text("%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)%").expect("valid");
    assert_eq!(format.line(&odd), "99 99\n", "what has no name");
}

#[test]
fn json_may_be_nested_and_have_values_of_its_own() {
    let headers = Kept::All(headers());
    let fields = serde_json::from_value(serde_json::json!({
        "http": {"code": "%RESPONSE_CODE%", "of": ["%PROTOCOL%", 1.5, "lit", {"host": "%UPSTREAM_HOST%"}], "none": {}},
        "level": "info", "n": 7.0, "yes": true, "nothing": null, "mixed": "%RESPONSE_CODE%x", "empty": [],
    }))
    .expect("an object");
    let format = Format::structured(&fields).expect("a format");
    let whole = "{\"empty\":[],\"http\":{\"code\":503,\"none\":{},\"of\":[\"HTTP/1.1\",1.5,\"lit\",{\"host\":null}]},\
        \"level\":\"info\",\"mixed\":\"503x\",\"n\":7,\"nothing\":null,\"yes\":true}\n";
    assert_eq!(format.line(&entry(&headers)), whole);
    let omitting = "{\"empty\":[],\"http\":{\"code\":503,\"of\":[\"HTTP/1.1\",1.5,\"lit\",{}]},\
        \"level\":\"info\",\"mixed\":\"503x\",\"n\":7,\"yes\":true}\n";
    assert_eq!(format.without_empty_values().line(&entry(&headers)), omitting);
    let wrong = serde_json::from_value(serde_json::json!({"a": {"b": ["%NO%"]}})).expect("an object");
    assert!(Format::structured(&wrong).is_err_and(|e| e.starts_with("a: b: %NO% is not")));
    let mut deep = serde_json::json!("x");
    (0..40).for_each(|_| deep = serde_json::json!([deep.take()]));
    let deep = [("a".to_owned(), deep)].into();
    assert!(Format::structured(&deep).is_err_and(|e| e.contains("nested more than")));
}

#[test]
fn what_has_no_value_can_be_left_out() {
    let headers = Kept::All(headers());
    let entry = entry(&headers);
    let text = Format::text("[%UPSTREAM_HOST%] %PROTOCOL% %REQ(NONE)%.").expect("valid").without_empty_values();
    assert_eq!(text.line(&entry), "[] HTTP/1.1 .\n");
    let json =
        |fields: &[(&'static str, &'static str)]| Format::json(fields.iter().copied()).expect("valid").without_empty_values().line(&entry);
    assert_eq!(
        json(&[("a", "%UPSTREAM_HOST%"), ("b", "%RESPONSE_CODE%"), ("c", "%REQ(NONE)%"), ("d", "%REQ(NONE)%|%PROTOCOL%")]),
        "{\"b\":503,\"d\":\"|HTTP/1.1\"}\n"
    );
    assert_eq!(json(&[("a", "%PROTOCOL%"), ("b", "%REQ(NONE)%")]), "{\"a\":\"HTTP/1.1\"}\n");
    assert_eq!(json(&[("a", "%REQ(NONE)%")]), "{}\n");
    assert_eq!(json(&[]), "{}\n");
}

#[test]
fn expressions_see_all_headers_of_a_name() {
    let mut headers = HeaderMap::new();
    for value in ["1", "2"] {
        headers.append("x-a", HeaderValue::from_static(value));
    }
    let format = Format::text("%CEL(request.headers['x-a'])% %REQ(X-A)%").expect("valid");
    let mut asks = Asks::default();
    format.asks(&mut asks);
    for kept in [Kept::All(headers.clone()), Kept::of(&headers, &asks.request)] {
        assert_eq!(format.line(&entry(&kept)), "1,2 1\n");
    }
}

#[test]
fn operators_without_a_value_here_are_told() {
    let format =
        Format::text("%UNIQUE_ID% %PROTOCOL% %FILTER_STATE(x:PLAIN)% %ENVIRONMENT(HOME)% %UNIQUE_ID% %HOSTNAME% %ENVIRONMENT(POD_NAME)%")
            .expect("valid");
    assert_eq!(format.knows_nothing_of(), ["UNIQUE_ID", "FILTER_STATE", "ENVIRONMENT"]);
    assert_eq!((snake("DeadlineExceeded"), snake("OK"), snake("Unknown")), ("DEADLINE_EXCEEDED".into(), "OK".into(), "UNKNOWN".into()));
}

#[test]
fn formats_that_cannot_be_read_say_why() {
    for (format, part) in [
        ("%FOO%", "%FOO% is not an operator"),
        ("%REQ%", "names no header"),
        ("%CEL(request.cod)%", "is not an attribute"),
        ("%CEL%", "has no expression"),
        ("%REQ(a", "closing %"),
        ("%START_TIME(%Q)%", "is not known in times"),
        ("%PATH(XX)%", "is none of NQ"),
        ("%PROTOCOL(x)%", "does not take"),
        ("%REQ(a):x%", "not a number"),
        ("%PROTOCOL", "closing %"),
    ] {
        let error = Format::text(format).expect_err(format);
        assert!(error.contains(part), "{format}: {error}");
    }
}

#[test]
fn long_lines_are_cut() {
    let mut headers = HeaderMap::new();
    headers.insert("x", HeaderValue::from_str(&"y".repeat(100_000)).expect("valid"));
    let headers = Kept::All(headers);
    let line = Format::text("%REQ(X)%").expect("valid").line(&entry(&headers));
    assert!(line.len() == LONGEST_VALUE + 1 && line.ends_with('\n'));
    // What comes after a long value is still told.
    let line = Format::text("%REQ(X)% %PROTOCOL%").expect("valid").line(&entry(&headers));
    assert!(line.ends_with(" HTTP/1.1\n"), "{line}");
    let many = "%REQ(X)% ".repeat(20);
    assert_eq!(Format::text(&many).expect("valid").line(&entry(&headers)).len(), LONGEST + 1);
    let keys = (0..20).map(|i| i.to_string()).collect::<Vec<_>>();
    let json = Format::json(keys.iter().map(|k| (&**k, "%REQ(X)%"))).expect("valid").line(&entry(&headers));
    assert!(json.len() < LONGEST + LONGEST_VALUE && serde_json::from_str::<serde_json::Value>(&json).is_ok());
}

#[test]
fn control_characters_of_both_sets_are_escaped() {
    let mut headers = HeaderMap::new();
    headers.insert("x", HeaderValue::from_bytes("a\tb\u{9b}31m".as_bytes()).expect("valid"));
    let headers = Kept::All(headers);
    assert_eq!(Format::text("%REQ(X)%").expect("valid").line(&entry(&headers)), "a\\tb\\x9b31m\n");
    let json = Format::json([("x", "%REQ(X)%")]).expect("valid").line(&entry(&headers));
    assert_eq!(json, "{\"x\":\"a\\tb\\u009b31m\"}\n");
}

#[test]
fn a_cut_leaves_escapes_whole() {
    for (text, whole) in [
        ("ab", "ab"),
        ("a\\", "a"),
        ("a\\\\", "a\\\\"),
        ("a\\\\\\", "a\\\\"),
        ("a\\n", "a\\n"),
        ("a\\x", "a"),
        ("a\\x9", "a"),
        ("a\\x9b", "a\\x9b"),
        ("a\\x9bc", "a\\x9bc"),
        ("\\\\x", "\\\\x"),
    ] {
        assert_eq!(&text[..without_part_of_an_escape(text)], whole, "{text}");
    }
}

#[test]
fn what_is_plain_is_what_needs_nothing_done_to_it() {
    let plain = |b: u8| (b' '..0x7f).contains(&b) && !matches!(b, b'"' | b'\\');
    for length in 0..20 {
        assert!(is_plain(&vec![b'a'; length]));
        for at in 0..length {
            for byte in 0..=u8::MAX {
                // Beside bytes that are close to those that are not plain.
                for beside in [b' ', b'!', b'#', b'[', b']', b'~'] {
                    let mut text = vec![beside; length];
                    text[at] = byte;
                    assert_eq!(is_plain(&text), plain(byte), "{byte:#x} at {at} of {length}");
                }
            }
        }
    }
    assert!(is_plain(&[b'a'; LONGEST_VALUE]) && !is_plain(&[b'a'; LONGEST_VALUE + 1]));
}
