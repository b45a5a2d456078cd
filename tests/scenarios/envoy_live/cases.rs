//! The exchanges. Requests meet an upstream that answers `ok`; answers are to a plain GET, HEAD or POST.

use super::{
    Answer, Case, End,
    requests::{GET, HEAD, HEADERS, HOSTS, LINES, POST, REQUESTS},
};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Pieces are divided by `|`; `^` alone is the client's end. `\u{1}` and above 0x7f stand for single bytes.
fn pieces(text: &str) -> Vec<Vec<u8>> {
    let bytes = |t: &str| t.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect::<Vec<u8>>();
    text.split('|').map(|piece| if piece == "^" { Vec::new() } else { bytes(piece) }).collect()
}

/// Which requests of a text are HEAD, as far as they can be told.
fn heads(request: &str) -> Vec<bool> {
    request.split("\r\n").filter(|l| l.contains(" HTTP/1.")).map(|l| l.starts_with("HEAD ")).collect()
}

pub fn case(name: String, request: &str, answer: &str, end: End) -> Case {
    Case {
        name,
        request: pieces(request),
        heads: heads(request),
        answer: Answer::always(pieces(answer), end),
        routes: None,
        filters: Vec::new(),
    }
}

/// What an upstream answers to a GET.
const ANSWERS: &[(&str, &str, End)] = &[
    ("continue", "HTTP/1.1 100 Continue\r\n\r\n|HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("continue-together", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("processing", "HTTP/1.1 102 Processing\r\nx-p: 1\r\n\r\n|HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("early-hints", "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n|HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    (
        "early-hints-length",
        "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\ncontent-length: 5\r\n\r\n|HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        End::Keep,
    ),
    (
        "early-hints-length-0",
        "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\ncontent-length: 0\r\n\r\n|HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        End::Keep,
    ),
    (
        "early-hints-chunked",
        "HTTP/1.1 103 Early Hints\r\ntransfer-encoding: chunked\r\n\r\n|HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        End::Keep,
    ),
    ("informational-199", "HTTP/1.1 199 Foo\r\n\r\n|HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    (
        "informational-many",
        "HTTP/1.1 100 A\r\n\r\nHTTP/1.1 103 B\r\n\r\nHTTP/1.1 100 C\r\n\r\n|HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        End::Keep,
    ),
    ("switching", "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: foo\r\n\r\nxyz", End::Keep),
    ("created", "HTTP/1.1 201 Created\r\nlocation: /y\r\ncontent-length: 0\r\n\r\n", End::Keep),
    ("no-content", "HTTP/1.1 204 No Content\r\n\r\n", End::Keep),
    ("no-content-length", "HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", End::Keep),
    ("no-content-length-5", "HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n", End::Keep),
    ("no-content-chunked", "HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", End::Keep),
    ("no-content-body", "HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello", End::Keep),
    ("reset-content", "HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n", End::Keep),
    ("partial", "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes 0-1/5\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("moved", "HTTP/1.1 301 Moved Permanently\r\nlocation: http://b/\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("not-modified", "HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\n\r\n", End::Keep),
    ("not-modified-length", "HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", End::Keep),
    ("not-modified-chunked", "HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n", End::Keep),
    ("teapot", "HTTP/1.1 418 I'm a teapot\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("server-error", "HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nno", End::Keep),
    ("unavailable", "HTTP/1.1 503 Away\r\ncontent-length: 2\r\nretry-after: 1\r\n\r\nno", End::Keep),
    ("status-99", "HTTP/1.1 99 Low\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("status-000", "HTTP/1.1 000 None\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("status-299", "HTTP/1.1 299 Foo\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("status-600", "HTTP/1.1 600 Foo\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("status-999", "HTTP/1.1 999 Foo\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("status-1000", "HTTP/1.1 1000 Foo\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("status-letters", "HTTP/1.1 2x0 Foo\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("reasonless", "HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("reason-empty", "HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("reason-odd", "HTTP/1.1 200 A B (c) \u{e9}\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("http-1.0", "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Fin),
    ("http-1.0-open", "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("http-1.0-to-end", "HTTP/1.0 200 OK\r\n\r\nok", End::Fin),
    ("http-1.0-keep-alive", "HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("http-1.0-chunked", "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", End::Fin),
    ("http-1.2", "HTTP/1.2 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("http-2.0", "HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("http-lower", "http/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("icy", "ICY 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("to-end", "HTTP/1.1 200 OK\r\n\r\nok", End::Fin),
    ("to-end-pieces", "HTTP/1.1 200 OK\r\n\r\nok|more|", End::Fin),
    ("to-end-reset", "HTTP/1.1 200 OK\r\n\r\nok", End::Reset),
    ("to-end-empty", "HTTP/1.1 200 OK\r\n\r\n", End::Fin),
    ("chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", End::Keep),
    ("chunked-empty", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", End::Keep),
    ("chunked-pieces", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n|2\r\no|k\r\n|0\r\n\r\n", End::Keep),
    ("chunked-trailers", "HTTP/1.1 200 OK\r\ntrailer: x-t\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-t: v\r\n\r\n", End::Keep),
    ("chunked-extension", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;a=\"b\"\r\nok\r\n0\r\n\r\n", End::Keep),
    ("chunked-upper", "HTTP/1.1 200 OK\r\nTransfer-Encoding: CHUNKED\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n", End::Keep),
    (
        "chunked-many-zeros",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0000000000000000000002\r\nok\r\n0000000000000000000000\r\n\r\n",
        End::Keep,
    ),
    ("chunked-odd", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, \u{e9}\r\n\r\n2\r\nok\r\n0\r\n\r\n", End::Keep),
    ("chunked-cut", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nok", End::Fin),
    ("chunked-unended", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", End::Fin),
    ("chunked-bad", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nok\r\n0\r\n\r\n", End::Keep),
    ("chunked-bad-later", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n|zz\r\n", End::Keep),
    ("chunked-and-length", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", End::Keep),
    ("coding-gzip", "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nok", End::Fin),
    ("coding-gzip-chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", End::Keep),
    ("coding-identity", "HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("length-bad", "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nok", End::Keep),
    ("length-minus", "HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok", End::Keep),
    ("length-twice", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("length-twice-differ", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok", End::Keep),
    ("length-list", "HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok", End::Keep),
    ("length-more", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokmore", End::Keep),
    ("length-more-http", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno", End::Keep),
    ("length-cut", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok", End::Fin),
    ("length-reset", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok", End::Reset),
    ("length-none-reset", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", End::Reset),
    ("close", "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", End::Fin),
    ("close-open", "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("close-to-end", "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok", End::Fin),
    ("keep-alive", "HTTP/1.1 200 OK\r\nconnection: keep-alive\r\nkeep-alive: timeout=5\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("nominated", "HTTP/1.1 200 OK\r\nconnection: x-a\r\nx-a: b\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("proxy-connection", "HTTP/1.1 200 OK\r\nproxy-connection: close\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("upgrade-offered", "HTTP/1.1 200 OK\r\nupgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    (
        "upgrade-required",
        "HTTP/1.1 426 Upgrade Required\r\nupgrade: TLS/1.0\r\nconnection: Upgrade\r\ncontent-length: 2\r\n\r\nok",
        End::Keep,
    ),
    ("te", "HTTP/1.1 200 OK\r\nte: trailers\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("lf", "HTTP/1.1 200 OK\ncontent-length: 2\n\nok", End::Keep),
    ("fold", "HTTP/1.1 200 OK\r\nx-a: b\r\n c\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("space-colon", "HTTP/1.1 200 OK\r\nx-a : b\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("colonless", "HTTP/1.1 200 OK\r\nx-a\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("value-nul", "HTTP/1.1 200 OK\r\nx-a: b\u{0}\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("value-control", "HTTP/1.1 200 OK\r\nx-a: b\u{1}\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("value-latin-1", "HTTP/1.1 200 OK\r\nx-a: b\u{e9}\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("name-space", "HTTP/1.1 200 OK\r\nx a: b\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("name-odd", "HTTP/1.1 200 OK\r\nx(a): b\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("name-pseudo", "HTTP/1.1 200 OK\r\n:status: 500\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("repeated", "HTTP/1.1 200 OK\r\nset-cookie: a=b\r\nset-cookie: c=d\r\nx-a: 1\r\nx-a: 2\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    (
        "own-headers",
        "HTTP/1.1 200 OK\r\nserver: mine\r\ndate: Tue, 15 Nov 1994 08:12:31 GMT\r\nvia: 1.1 b\r\ncontent-length: 2\r\n\r\nok",
        End::Keep,
    ),
    (
        "envoy-headers",
        "HTTP/1.1 200 OK\r\nx-envoy-upstream-service-time: 77\r\nx-envoy-attempt-count: 3\r\nx-envoy-decorator-operation: op\r\ncontent-length: 2\r\n\r\nok",
        End::Keep,
    ),
    (
        "envoy-degraded",
        "HTTP/1.1 200 OK\r\nx-envoy-degraded: true\r\nx-envoy-immediate-health-check-fail: true\r\ncontent-length: 2\r\n\r\nok",
        End::Keep,
    ),
    ("envoy-overloaded", "HTTP/1.1 503 Away\r\nx-envoy-overloaded: true\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("envoy-ratelimited", "HTTP/1.1 429 Slow\r\nx-envoy-ratelimited: true\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("request-id", "HTTP/1.1 200 OK\r\nx-request-id: theirs\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    (
        "grpc-trailers-only",
        "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 5\r\ngrpc-message: no\r\ncontent-length: 0\r\n\r\n",
        End::Keep,
    ),
    ("none-fin", "", End::Fin),
    ("none-reset", "", End::Reset),
    ("head-cut", "HTTP/1.1 200 OK\r\ncontent-le", End::Fin),
    ("head-reset", "HTTP/1.1 200 OK\r\ncontent-le", End::Reset),
    ("garbage", "this is not HTTP\r\n\r\n", End::Keep),
    ("garbage-fin", "this is not HTTP\r\n\r\n", End::Fin),
    ("tls-alert", "\u{15}\u{3}\u{1}\u{0}\u{2}\u{2}\u{28}", End::Fin),
    ("line-first", "\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("many-100", "@99", End::Keep),
    ("many-101", "@101", End::Keep),
    ("large-50k", "@50000b", End::Keep),
    ("large-70k", "@70000b", End::Keep),
];

/// Answers that a HEAD gets as well.
const TO_HEAD: &[&str] = &[
    "created",
    "no-content",
    "not-modified-length",
    "http-1.0",
    "to-end",
    "to-end-empty",
    "chunked",
    "chunked-empty",
    "chunked-trailers",
    "length-more",
    "length-cut",
    "close",
    "close-open",
    "none-fin",
    "early-hints",
    "continue",
    "server-error",
];

/// Answers that a POST gets as well.
const TO_POST: &[&str] =
    &["continue", "early-hints", "no-content", "none-fin", "none-reset", "garbage", "unavailable", "length-cut", "chunked", "switching"];

/// `@99` are 99 headers, `@50000b` one of so many bytes.
fn generated(spec: &str) -> String {
    match spec.strip_prefix('@') {
        None => spec.to_owned(),
        Some(n) => match n.strip_suffix('b') {
            Some(bytes) => format!("x-large: {}\r\n", "v".repeat(bytes.parse().expect("a number"))),
            None => (0..n.parse().expect("a number")).map(|i| format!("x-h{i}: 1\r\n")).collect(),
        },
    }
}

pub fn all() -> Vec<Case> {
    let mut all = Vec::new();
    for (name, line) in LINES {
        all.push(case(format!("line-{name}"), &format!("{line}\r\nhost: a.example\r\n\r\n"), OK, End::Keep));
    }
    for (name, host) in HOSTS {
        all.push(case(format!("host-{name}"), &format!("GET /x HTTP/1.1\r\n{host}\r\n"), OK, End::Keep));
    }
    for (name, headers) in HEADERS {
        let headers = generated(headers);
        all.push(case(format!("header-{name}"), &format!("GET /x HTTP/1.1\r\nhost: a\r\n{headers}\r\n"), OK, End::Keep));
    }
    for (name, request) in REQUESTS {
        all.push(case(format!("request-{name}"), request, OK, End::Keep));
    }
    for (name, answer, end) in ANSWERS {
        let answer = match answer.strip_prefix('@') {
            Some(_) => format!("HTTP/1.1 200 OK\r\n{}content-length: 2\r\n\r\nok", generated(answer)),
            None => (*answer).to_owned(),
        };
        all.push(case(format!("answer-{name}"), GET, &answer, *end));
        for (to, request, names) in [("head", HEAD, TO_HEAD), ("post", POST, TO_POST)] {
            if names.contains(name) {
                all.push(case(format!("answer-to-{to}-{name}"), request, &answer, *end));
            }
        }
    }
    // Bodies of which much is not data.
    let trailers = format!("{}x-t: v\r\n", generated("@20000b"));
    let posted = |extension: &str, trailers: &str| {
        format!("POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5{extension}\r\nhello\r\n0\r\n{trailers}\r\n")
    };
    all.push(case("request-chunked-large-trailers".to_owned(), &posted("", &trailers), OK, End::Keep));
    all.push(case("request-chunked-large-extension".to_owned(), &posted(&format!(";a={}", "b".repeat(10_000)), ""), OK, End::Keep));
    let answer = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n{trailers}\r\n");
    all.push(case("answer-chunked-large-trailers".to_owned(), GET, &answer, End::Keep));
    let websocket = "GET /x HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    for (name, more) in [
        ("length", "upgrade: websocket\r\ncontent-length: 5\r\n"),
        ("chunked", "upgrade: websocket\r\ntransfer-encoding: chunked\r\n"),
        ("nothing", ""),
    ] {
        let answer = format!("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n{more}\r\nhello");
        all.push(case(format!("answer-switching-to-{name}"), websocket, &answer, End::Keep));
    }
    // Every status of which anybody has a name, one after the other.
    let codes = (200..600_u16).filter(|c| http::StatusCode::from_u16(*c).is_ok_and(|s| s.canonical_reason().is_some()));
    let mut answers = codes.filter(|c| ![204, 205, 304].contains(c)).map(|c| format!("HTTP/1.1 {c} X\r\ncontent-length: 0\r\n\r\n"));
    let mut every = case("answer-every-status".to_owned(), GET, &answers.next().expect("a status"), End::Keep);
    every.answer.then = answers.map(|text| Answer::always(vec![text.into_bytes()], End::Keep)).collect();
    every.request = vec![every.request.concat(); 1 + every.answer.then.len()];
    all.push(every);
    all
}
