//! Heads good and bad, as recorded of Envoy.

use super::*;

fn parse(text: &str) -> Result<WireRequest, Malformed> {
    let bytes = Bytes::copy_from_slice(text.as_bytes());
    assert_eq!(head_end(&bytes), Some(bytes.len()), "{text:?} is a whole head");
    request(&bytes, HeadLimits::OF_CLIENT).map_err(|refused| refused.malformed)
}

fn refused(text: &str) -> (u16, &'static str) {
    let malformed = parse(text).expect_err(text);
    (malformed.status.as_u16(), malformed.details)
}

#[test]
fn requests_are_read() {
    let request = parse("POST /a/../b?c=1 HTTP/1.1\r\nHost: svc:80\r\nX-V:  1 \r\nx-v: 2\r\nContent-Length: 5\r\n\r\n").expect("valid");
    assert_eq!(request.head.method, Method::POST);
    assert_eq!((request.head.target.as_str(), request.head.host()), ("/b?c=1", "svc:80"));
    let values = request.head.headers.get_all("x-v").iter().map(|v| v.to_str().expect("text")).collect::<Vec<_>>();
    assert_eq!((values, request.framing, request.keep_alive), (vec!["1", "2"], Framing::Length(5), true));
    assert!(!request.head.headers.contains_key("host"));
}

#[test]
fn lines_may_end_with_lf_and_headers_may_be_folded() {
    let request = parse("GET /x HTTP/1.1\nhost: a\nx-id: 1\n 2\n\t3\n\n").expect("valid");
    assert_eq!(request.head.headers["x-id"], "1 2 3");
    let empty = parse("GET /x HTTP/1.1\nhost: a\nx-id:\n 2\n \n\n").expect("valid");
    assert_eq!(empty.head.headers["x-id"], "2");
    let absolute = parse("GET http://other.example:81?q HTTP/1.1\r\nhost: a\r\n\r\n").expect("valid");
    assert_eq!((absolute.head.host(), absolute.head.target.as_str()), ("other.example:81", "/?q"));
}

#[test]
fn what_envoy_lets_pass_passes() {
    for (text, host, target) in [
        ("GET\t/a \t HTTP/1.1 \r\nhost: a\r\n\r\n", "a", "/a"),
        ("GET HTTP://u:p@B.example/y HTTP/1.1\r\nhost: a\r\n\r\n", "B.example", "/y"),
        ("GET /x HTTP/1.1\r\nhost:\r\n\r\n", "", "/x"),
        ("GET /../{x} HTTP/1.1\r\nhost: a\r\n\r\n", "a", "/%7Bx%7D"),
        ("GET /x?a#/../y HTTP/1.1\r\nhost: a\r\n\r\n", "a", "/x?a"),
        ("GET http://b#y HTTP/1.1\r\nhost: a\r\n\r\n", "b", "/"),
    ] {
        let request = parse(text).expect(text);
        assert_eq!((request.head.host(), request.head.target.as_str()), (host, target), "{text:?}");
    }
    let expecting = parse("GET /x HTTP/1.1\r\nhost: a\r\nexpect: other\r\n\r\n").expect("valid");
    assert_eq!(expecting.head.headers["expect"], "other");
    let expecting = |minor| parse(&format!("GET /x HTTP/1.{minor}\r\nhost: a\r\nexpect: 100-continue\r\n\r\n")).expect("valid");
    assert!(expecting(1).head.headers.contains_key("expect") && !expecting(0).head.headers.contains_key("expect"));
}

#[test]
fn a_request_that_is_refused_says_what_it_was() {
    let of = |text: &'static str| request(&Bytes::from_static(text.as_bytes()), HeadLimits::OF_CLIENT).expect_err("refused").said;
    let said = of("GET /a%00 HTTP/1.1\r\nhost: c\r\nx-id: 1\r\n\r\n").expect("read");
    assert_eq!((said.method, &*said.target, said.authority), (Method::GET, &b"/a%00"[..], Some(HeaderValue::from_static("c"))));
    assert_eq!(said.headers["x-id"], "1");
    assert!(of("FOO /a HTTP/1.1\r\nhost: c\r\n\r\n").is_none());
}

#[test]
fn that_there_is_no_body_is_said_where_one_is_expected() {
    for (method, expected) in [("POST", true), ("PUT", true), ("OPTIONS", true), ("GET", false), ("DELETE", false)] {
        let request = parse(&format!("{method} / HTTP/1.1\r\nhost: a\r\n\r\n")).expect("valid");
        let mut out = Vec::new();
        write_request(&request.head, Framing::Empty, None, None, &mut out);
        assert_eq!(String::from_utf8_lossy(&out).contains("content-length: 0\r\n"), expected, "{method}");
    }
}

#[test]
fn connection_headers_are_for_this_connection_only() {
    let request = parse(
        "GET / HTTP/1.1\r\nhost: a\r\nconnection: x-hop, keep-alive\r\nx-hop: 1\r\nte: trailers, gzip\r\nproxy-connection: keep-alive\r\nkeep-alive: timeout=5\r\nx-envoy-foo: 1\r\n\r\n",
    )
    .expect("valid");
    let names = request.head.headers.keys().map(http::HeaderName::as_str).collect::<Vec<_>>();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!((&request.head.headers["te"], request.keep_alive), (&HeaderValue::from_static("trailers"), true));
}

#[test]
fn an_upgrade_to_http_2_is_not_passed_on() {
    let upgrade = |to: &str| {
        let text =
            format!("GET / HTTP/1.1\r\nhost: a\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: {to}\r\nhttp2-settings: AAA\r\n\r\n");
        let request = parse(&text).expect("valid");
        assert!(request.head.headers.is_empty(), "{:?}", request.head.headers);
        request.upgrade
    };
    assert_eq!(upgrade("websocket").expect("an upgrade"), "websocket");
    for to in ["h2c", "H2C", "websocket, h2c", "TLS/1.2", "tls/1.3"] {
        assert!(upgrade(to).is_none(), "{to}");
    }
}

#[test]
fn keep_alive_is_by_version_and_connection() {
    for (text, expected) in [
        ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", true),
        ("GET / HTTP/1.1\r\nhost: a\r\nconnection: Close\r\n\r\n", false),
        ("GET / HTTP/1.0\r\n\r\n", false),
        ("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", true),
    ] {
        assert_eq!(parse(text).expect("valid").keep_alive, expected, "{text:?}");
    }
}

#[test]
fn ambiguous_or_broken_requests_are_refused_as_recorded() {
    let codec = (400, "http1.codec_error");
    let both = (400, "http1.content_length_and_chunked_not_allowed");
    for (text, expected) in [
        ("GET /x HTTP/1.1\r\n\r\n", (400, "missing_host_header")),
        ("GET * HTTP/1.1\r\nhost: a\r\n\r\n", (400, "http1.invalid_url")),
        ("CONNECT /x HTTP/1.1\r\nhost: a\r\n\r\n", (400, "http1.invalid_url")),
        ("GET http:///y HTTP/1.1\r\nhost: a\r\n\r\n", (400, "http1.invalid_url")),
        ("GET ftp://a/y HTTP/1.1\r\nhost: a\r\n\r\n", (400, "http1.invalid_scheme")),
        ("GET /\u{7f} HTTP/1.1\r\nhost: a\r\n\r\n", (400, "http1.invalid_characters")),
        ("GET /\u{e9} HTTP/1.1\r\nhost: a\r\n\r\n", codec),
        ("GET /x HTTP/1.2\r\nhost: a\r\n\r\n", (426, "low_version")),
        ("GET /x\r\nhost: a\r\n\r\n", (426, "low_version")),
        ("GET /x HTTP/1.10\r\nhost: a\r\n\r\n", codec),
        ("GET /x FOO/1.1\r\nhost: a\r\n\r\n", codec),
        ("GET /x HTTP/1.1\r\nhost: a\r\nconnection: X-Forwarded-For\r\n\r\n", (400, "http1.connection_header_rejected")),
        ("garbage\r\n\r\n", codec),
        ("GET  HTTP/1.1\r\nhost: a\r\n\r\n", codec),
        ("GET / HTTP/2.0\r\nhost: a\r\n\r\n", (426, "low_version")),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n", both),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n", both),
        ("POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n", both),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\n", codec),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ncontent-length: 4\r\n\r\n", codec),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4, 4\r\n\r\n", codec),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +4\r\n\r\n", codec),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n", (501, "http1.invalid_transfer_encoding")),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n", (501, "http1.invalid_transfer_encoding")),
        ("GET / HTTP/1.1\r\nhost: a\r\nx-a: a\0b\r\n\r\n", (400, "http1.invalid_characters")),
        ("GET / HTTP/1.1\r\nhost : a\r\n\r\n", codec),
        ("GET / HTTP/1.1\r\nhost: a\r\n: empty\r\n\r\n", codec),
        ("GET / HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n", codec),
        ("GET / HTTP/1.1\r\n folded: first\r\nhost: a\r\n\r\n", codec),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", codec),
        ("GET / HTTP/1.1\r\nhost: a b\r\n\r\n", (400, "http.invalid_authority")),
        ("GET / HTTP/1.1\r\nhost: a@b\r\n\r\n", (400, "http.invalid_authority")),
        ("FOO / HTTP/1.1\r\nhost: a\r\n\r\n", codec),
        ("get / HTTP/1.1\r\nhost: a\r\n\r\n", codec),
        ("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", (404, "absolute_path_rejected")),
        ("OPTIONS * HTTP/1.1\r\nhost: a b\r\n\r\n", (400, "http.invalid_authority")),
        ("OPTIONS * HTTP/1.1\r\n\r\n", (400, "missing_host_header")),
        ("GET http://a:x/ HTTP/1.1\r\nhost: a\r\n\r\n", (400, "http1.invalid_url")),
        ("GET http://a:65536/ HTTP/1.1\r\nhost: a\r\n\r\n", (400, "http1.invalid_url")),
        ("GET http://[::1]x/ HTTP/1.1\r\nhost: a\r\n\r\n", (400, "http1.invalid_url")),
        ("GET / HTTP/1.1\r\nhost: a\r\nconnection: close, :path\r\n\r\n", (400, "http1.connection_header_rejected")),
        ("GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n", (400, "path_normalization_failed")),
    ] {
        assert_eq!(refused(text), expected, "{text:?}");
    }
    let many = format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: 1\r\n".repeat(100));
    assert_eq!(refused(&many), (431, "http1.too_many_headers"));
    let from_node = |n: usize| request(&format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: 1\r\n".repeat(n)).into(), HeadLimits::OF_NODE);
    assert!(from_node(199).is_ok(), "what nodes add is within their limit");
    assert_eq!(from_node(200).expect_err("too many").malformed.status, 431);
}

#[test]
fn responses_end_where_they_must() {
    let read = |text: &str, method: &Method| response(&Bytes::copy_from_slice(text.as_bytes()), method, HeadLimits::of_answer(false));
    for (text, method, framing, keep_alive) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", Method::GET, Framing::Length(3), true),
        ("HTTP/1.1 200\r\ntransfer-encoding: chunked\r\n\r\n", Method::GET, Framing::Chunked, true),
        ("HTTP/1.1 200 OK\r\n\r\n", Method::GET, Framing::UntilClose, false),
        ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", Method::HEAD, Framing::Empty, true),
        ("HTTP/1.1 204 No Content\r\n\r\n", Method::GET, Framing::Empty, true),
        ("HTTP/1.2 200 OK\r\ncontent-length: 0\r\n\r\n", Method::GET, Framing::Empty, true),
        ("HTTP/1.1 304 Not Modified\r\ncontent-length: 3\r\n\r\n", Method::GET, Framing::Empty, true),
        ("HTTP/1.1 100 Continue\r\n\r\n", Method::POST, Framing::Empty, true),
        ("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", Method::GET, Framing::Empty, false),
        ("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\n", Method::GET, Framing::Length(1), true),
        ("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\n", Method::GET, Framing::Length(1), false),
    ] {
        let found = read(text, &method).expect(text);
        assert_eq!((found.framing, found.keep_alive), (framing, keep_alive), "{text:?}");
    }
    for bad in [
        "nope\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 2000 OK\r\n\r\n",
        "HTTP/x.0 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
    ] {
        assert!(read(bad, &Method::GET).is_err(), "{bad:?}");
    }
}

#[test]
fn what_is_written_is_read_back() {
    let text = "PUT /p?q HTTP/1.1\r\nhost: svc\r\nx-b: 2\r\nx-a: 1\r\nx-a: 3\r\ntransfer-encoding: chunked\r\n\r\n";
    let first = parse(text).expect("valid");
    let mut out = Vec::new();
    write_request(&first.head, first.framing, None, None, &mut out);
    let again = parse(std::str::from_utf8(&out).expect("text")).expect("valid");
    assert_eq!((first.head.headers, first.head.target, first.framing), (again.head.headers, again.head.target, again.framing));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        let bytes = Bytes::from([b"GET / HTTP/1.1\r\nhost: a\r\n".as_slice(), &bytes, b"\r\n\r\n"].concat());
        if let Some(end) = head_end(&bytes) {
            let _ = request(&bytes.slice(..end), HeadLimits::OF_CLIENT);
            let _ = response(&bytes.slice(..end), &Method::GET, HeadLimits::of_answer(false));
        }
    }
}

#[test]
fn what_can_be_no_request_is_told_from_what_may_become_one() {
    for (beginning, refused) in [
        (&b""[..], false),
        (b"\r", false),
        (b"G", false),
        (b"GET /x HTT", false),
        (b"GET /x HTTP/1.1\r\nhos", false),
        (b"GET /x HTTP/2.0\r\nhos", false),
        (b"\x16\x03\x01", true),
        (b"\0", true),
        (b"get", true),
        (b"EHLO x\r\n", true),
        (b"SSH-2.0-x\r\n", true),
        (b"*1\r\n", true),
        (b"GET /x FOO/1.1\r\nhos", true),
    ] {
        assert_eq!(is_no_request(&Bytes::from_static(beginning)).is_some(), refused, "{}", beginning.escape_ascii());
    }
    assert_eq!([&b"\r\n\nGET"[..], b"\r", b"\n\r\n"].map(leading_lines), [3, 0, 3]);
    assert_eq!([&b"\r\n\nGET"[..], b"\n\r\n", b"\r\n\r\n"].map(leading_empty_lines), [2, 0, 4]);
}

#[test]
fn an_odd_element_hides_no_other_of_a_list() {
    let read = |headers: &str| {
        request(&Bytes::from([b"GET / HTTP/1.1\r\nhost: a\r\n", headers.as_bytes(), b"\r\n"].concat()), HeadLimits::OF_CLIENT)
    };
    let odd = "\u{e9}";
    let nominated = read(&format!("connection: x-secret, {odd}, close\r\nx-secret: 1\r\nte: {odd}, trailers\r\n")).expect("a request");
    assert!(!nominated.head.headers.contains_key("x-secret") && !nominated.keep_alive);
    assert_eq!(nominated.head.headers.get("te").map(HeaderValue::as_bytes), Some(&b"trailers"[..]));
    for coding in [odd, "chunked, \u{e9}", ", chunked", "chunked,", "chunked\r\ntransfer-encoding: \u{e9}"] {
        let refused = read(&format!("transfer-encoding: {coding}\r\n")).expect_err("a coding nobody knows");
        assert_eq!(refused.malformed.status, StatusCode::NOT_IMPLEMENTED, "{coding}");
    }
}

#[test]
fn what_goes_on_keeps_its_order() {
    let names = |headers: &HeaderMap| headers.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let fields = "Connection: keep-alive, X-Mine\r\nA-One: 1\r\nContent-Length: 0\r\nX-Mine: 1\r\nB-Two: 2\r\nTE: trailers, gzip\r\nC-Three: 3\r\n\
                  Keep-Alive: 5\r\nD-Four: 4\r\nA-One: 5\r\nE-Five: 6\r\n\r\n";
    let head = Bytes::from(format!("GET / HTTP/1.1\r\nProxy-Connection: x\r\nHost: a\r\n{fields}"));
    let read = request(&head, HeadLimits::OF_CLIENT).expect("valid");
    assert_eq!(names(&read.head.headers), "a-one content-length b-two c-three d-four e-five te");
    assert_eq!(read.head.headers.get_all("a-one").iter().collect::<Vec<_>>(), ["1", "5"]);
    let head = Bytes::from(format!("HTTP/1.1 200 OK\r\nHost: odd\r\n{fields}"));
    let read = response(&head, &Method::GET, HeadLimits::OF_CLIENT).expect("valid");
    assert_eq!(names(&read.headers), "host a-one content-length b-two c-three d-four e-five te");
    let mut headers = read.headers;
    assert!(take_off(&mut headers, &header::TRAILER).is_none());
    assert_eq!(take_off(&mut headers, &HeaderName::from_static("a-one")).expect("there"), "1");
    assert_eq!(names(&headers), "host content-length b-two c-three d-four e-five te");
}
