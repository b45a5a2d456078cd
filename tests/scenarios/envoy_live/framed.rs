//! HTTP/2 as bytes, right and wrong, to an upstream of HTTP/1: what RFC 9113 calls malformed is for each proxy to refuse, and how is compared.

use mesh_tests::{
    frames::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PADDED, PING, PREFACE, PRIORITY, PUSH_PROMISE, RST_STREAM,
        SETTINGS, WINDOW_UPDATE, WITH_PRIORITY, block, frame,
    },
    raw::ANSWERED,
};

use super::{Answer, Case, End};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

type Field = (&'static str, &'static str);

const GET: [Field; 4] = [(":method", "GET"), (":scheme", "http"), (":authority", "a.example"), (":path", "/x")];

/// Fields after those of a GET.
const MORE: &[(&str, &[Field])] = &[
    ("plain", &[]),
    ("ordinary", &[("x-a", "1"), ("accept", "*/*")]),
    ("upper-case", &[("X-A", "1")]),
    ("name-empty", &[("", "1")]),
    ("name-space", &[("x a", "1")]),
    ("name-colon", &[("x:a", "1")]),
    ("name-nul", &[("x\u{0}a", "1")]),
    ("name-latin-1", &[("x\u{e9}", "1")]),
    ("name-delete", &[("x\u{7f}", "1")]),
    ("name-quote", &[("x\"a", "1")]),
    ("name-parenthesis", &[("x(a", "1")]),
    ("name-underscore", &[("x_a", "1")]),
    ("value-nul", &[("x-a", "1\u{0}2")]),
    ("value-newline", &[("x-a", "1\n2")]),
    ("value-return", &[("x-a", "1\r2")]),
    ("value-tab", &[("x-a", "1\t2")]),
    ("value-control", &[("x-a", "1\u{1}2")]),
    ("value-delete", &[("x-a", "1\u{7f}2")]),
    ("value-latin-1", &[("x-a", "\u{e9}")]),
    ("value-spaces", &[("x-a", " 1 ")]),
    ("value-tab-first", &[("x-a", "\t1")]),
    ("value-empty", &[("x-a", "")]),
    ("connection", &[("connection", "close")]),
    ("connection-named", &[("connection", "x-a"), ("x-a", "1")]),
    ("keep-alive", &[("keep-alive", "timeout=5")]),
    ("proxy-connection", &[("proxy-connection", "keep-alive")]),
    ("transfer-encoding", &[("transfer-encoding", "chunked")]),
    ("upgrade", &[("upgrade", "websocket")]),
    ("http2-settings", &[("http2-settings", "AAMAAABkAARAAAAAAAIAAAAA")]),
    ("te", &[("te", "trailers")]),
    ("te-other", &[("te", "gzip")]),
    ("te-more", &[("te", "trailers, gzip")]),
    ("te-upper", &[("te", "Trailers")]),
    ("method-twice", &[(":method", "GET")]),
    ("path-twice", &[(":path", "/y")]),
    ("scheme-twice", &[(":scheme", "http")]),
    ("authority-twice", &[(":authority", "a.example")]),
    ("pseudo-late", &[("x-a", "1"), (":foo", "1")]),
    ("pseudo-unknown", &[(":foo", "1")]),
    ("status", &[(":status", "200")]),
    ("protocol", &[(":protocol", "websocket")]),
    ("host-same", &[("host", "a.example")]),
    ("host-other", &[("host", "b.example")]),
    ("host-empty", &[("host", "")]),
    ("host-twice", &[("host", "a.example"), ("host", "b.example")]),
    ("length-zero", &[("content-length", "0")]),
    ("length-said", &[("content-length", "5")]),
    ("length-words", &[("content-length", "five")]),
    ("length-negative", &[("content-length", "-1")]),
    ("length-plus", &[("content-length", "+0")]),
    ("length-empty", &[("content-length", "")]),
    ("length-list", &[("content-length", "0, 0")]),
    ("length-twice", &[("content-length", "0"), ("content-length", "0")]),
    ("length-far", &[("content-length", "99999999999999999999")]),
    ("cookies", &[("cookie", "a=b"), ("cookie", "c=d"), ("cookie", "e=f")]),
    ("cookie-empty", &[("cookie", ""), ("cookie", "a=b")]),
    ("expect", &[("expect", "100-continue")]),
    ("expect-other", &[("expect", "200-ok")]),
    ("forwarded", &[("x-forwarded-for", "1.2.3.4"), ("x-forwarded-proto", "gopher")]),
    ("trailer-named", &[("trailer", "x-t")]),
    ("internal", &[("x-envoy-internal", "true"), ("x-envoy-retry-on", "5xx")]),
    ("own-host", &[("x-envoy-original-path", "/y")]),
];

/// A GET with one pseudo-header field changed.
const INSTEAD: &[(&str, &str, &str)] = &[
    ("path-empty", ":path", ""),
    ("path-bare", ":path", "x"),
    ("path-star", ":path", "*"),
    ("path-absolute", ":path", "http://b.example/y"),
    ("path-slashes", ":path", "//b.example/y"),
    ("path-space", ":path", "/x y"),
    ("path-tab", ":path", "/x\ty"),
    ("path-fragment", ":path", "/x#y"),
    ("path-latin-1", ":path", "/\u{e9}"),
    ("path-nul", ":path", "/x\u{0}"),
    ("path-quote", ":path", "/x\"y"),
    ("path-braces", ":path", "/{x}"),
    ("path-query", ":path", "/x?a=b?c"),
    ("path-query-alone", ":path", "?a=b"),
    ("path-dots", ":path", "/a/../b"),
    ("path-backslash", ":path", "/a\\b"),
    ("scheme-https", ":scheme", "https"),
    ("scheme-upper", ":scheme", "HTTP"),
    ("scheme-other", ":scheme", "ftp"),
    ("scheme-empty", ":scheme", ""),
    ("scheme-odd", ":scheme", "ht tp"),
    ("authority-empty", ":authority", ""),
    ("authority-port", ":authority", "a.example:8080"),
    ("authority-user", ":authority", "u@a.example"),
    ("authority-space", ":authority", "a example"),
    ("authority-slash", ":authority", "a.example/x"),
    ("authority-v6", ":authority", "[::1]:80"),
    ("authority-upper", ":authority", "A.Example"),
    ("authority-latin-1", ":authority", "\u{e9}.example"),
    ("authority-list", ":authority", "a.example,b.example"),
    ("authority-port-words", ":authority", "a.example:http"),
    ("method-empty", ":method", ""),
    ("method-lower", ":method", "get"),
    ("method-space", ":method", "GE T"),
    ("method-odd", ":method", "G@T"),
    ("method-own", ":method", "FOO"),
    ("method-head", ":method", "HEAD"),
    ("method-options", ":method", "OPTIONS"),
    ("method-post", ":method", "POST"),
    ("method-trace", ":method", "TRACE"),
    ("method-connect", ":method", "CONNECT"),
    ("method-pri", ":method", "PRI"),
];

/// Whole lists of fields.
const LISTS: &[(&str, &[Field])] = &[
    ("none", &[]),
    ("without-method", &[(":scheme", "http"), (":authority", "a.example"), (":path", "/x")]),
    ("without-scheme", &[(":method", "GET"), (":authority", "a.example"), (":path", "/x")]),
    ("without-path", &[(":method", "GET"), (":scheme", "http"), (":authority", "a.example")]),
    ("without-authority", &[(":method", "GET"), (":scheme", "http"), (":path", "/x")]),
    ("host-alone", &[(":method", "GET"), (":scheme", "http"), (":path", "/x"), ("host", "a.example")]),
    ("host-before", &[(":method", "GET"), ("host", "a.example"), (":scheme", "http"), (":path", "/x")]),
    ("pseudo-after", &[("x-a", "1"), (":method", "GET"), (":scheme", "http"), (":authority", "a.example"), (":path", "/x")]),
    ("pseudo-between", &[(":method", "GET"), (":scheme", "http"), (":authority", "a.example"), ("x-a", "1"), (":path", "/x")]),
    ("connect", &[(":method", "CONNECT"), (":authority", "a.example:80")]),
    ("connect-without", &[(":method", "CONNECT")]),
    ("websocket", &[(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":authority", "a.example"), (":path", "/x")]),
    ("options-star", &[(":method", "OPTIONS"), (":scheme", "http"), (":authority", "a.example"), (":path", "*")]),
];

/// A POST: its name, fields of its own, its body frame by frame, and trailers.
type Post = (&'static str, &'static [Field], &'static [&'static str], Option<&'static [Field]>);

const BODIES: &[Post] = &[
    ("plain", &[], &["hello"], None),
    ("pieces", &[], &["he", "", "llo"], None),
    ("empty", &[], &[""], None),
    ("length", &[("content-length", "5")], &["hello"], None),
    ("length-less", &[("content-length", "5")], &["hell"], None),
    ("length-more", &[("content-length", "5")], &["hello!"], None),
    ("length-more-later", &[("content-length", "5")], &["hello", "!"], None),
    ("length-none", &[("content-length", "5")], &[""], None),
    ("length-zero", &[("content-length", "0")], &[""], None),
    ("length-zero-more", &[("content-length", "0")], &["x"], None),
    ("trailers", &[], &["hello"], Some(&[("x-t", "1")])),
    ("trailers-length", &[("content-length", "5")], &["hello"], Some(&[("x-t", "1")])),
    ("trailers-less", &[("content-length", "5")], &["hell"], Some(&[("x-t", "1")])),
    ("trailers-pseudo", &[], &["hello"], Some(&[(":path", "/y")])),
    ("trailers-upper", &[], &["hello"], Some(&[("X-T", "1")])),
    ("trailers-connection", &[], &["hello"], Some(&[("connection", "close")])),
    ("trailers-framing", &[], &["hello"], Some(&[("content-length", "5")])),
    ("trailers-newline", &[], &["hello"], Some(&[("x-t", "1\n2")])),
    ("trailers-quote", &[], &["hello"], Some(&[("x\"t", "1")])),
    ("trailers-empty", &[], &["hello"], Some(&[])),
    ("expect", &[("expect", "100-continue")], &["hello"], None),
];

fn headers(stream: u32, fields: &[Field], flags: u8) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, &block(fields.iter().copied()))
}

fn get(stream: u32) -> Vec<u8> {
    headers(stream, &GET, END_STREAM)
}

/// Another request, of whoever is still there.
pub fn again(stream: u32) -> Vec<u8> {
    headers(stream, &GET.map(|(n, v)| (n, if n == ":path" { "/again" } else { v })), END_STREAM)
}

fn post(stream: u32, more: &[Field]) -> Vec<u8> {
    headers(stream, &[&[(":method", "POST")], &GET[1..], more].concat(), 0)
}

/// A connection that begins in order.
pub fn begun(pieces: impl IntoIterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
    let mut all = pieces.into_iter().collect::<Vec<_>>();
    let first = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    match all.first_mut() {
        Some(piece) => drop(piece.splice(..0, first)),
        None => all.push(first),
    }
    all
}

fn setting(id: u16, value: u32) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

/// Frames after a GET that has been answered, and before another one.
fn between() -> Vec<(&'static str, Vec<u8>)> {
    let window = |stream, by: u32| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
    let reset = |stream, code: u32| frame(RST_STREAM, 0, stream, &code.to_be_bytes());
    let fields = block(GET);
    vec![
        ("nothing", Vec::new()),
        ("unknown", frame(0x42, 0xff, 0, b"x")),
        ("unknown-on-stream", frame(0x42, 0, 1, b"x")),
        ("ping", frame(PING, 0, 0, &[7; 8])),
        ("ping-ack", frame(PING, ACK, 0, &[7; 8])),
        ("ping-short", frame(PING, 0, 0, &[7; 7])),
        ("ping-on-stream", frame(PING, 0, 1, &[7; 8])),
        ("settings-empty", frame(SETTINGS, 0, 0, &[])),
        ("settings-ack", frame(SETTINGS, ACK, 0, &[])),
        ("settings-ack-full", frame(SETTINGS, ACK, 0, &[0; 6])),
        ("settings-on-stream", frame(SETTINGS, 0, 1, &[])),
        ("settings-length", frame(SETTINGS, 0, 0, &[0; 5])),
        ("settings-push", setting(2, 2)),
        ("settings-window", setting(4, 1 << 31)),
        ("settings-frame-small", setting(5, 100)),
        ("settings-frame-large", setting(5, 1 << 24)),
        ("settings-unknown", setting(0x99, 1)),
        ("settings-connect", setting(8, 1)),
        ("settings-connect-odd", setting(8, 2)),
        ("window-zero", window(0, 0)),
        ("window-overflow", window(0, 0x7fff_ffff)),
        ("window-short", frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1])),
        ("window-idle", window(5, 1)),
        ("window-closed", window(1, 1)),
        ("window-closed-zero", window(1, 0)),
        ("reset-idle", reset(5, 8)),
        ("reset-closed", reset(1, 8)),
        ("reset-connection", reset(0, 8)),
        ("reset-short", frame(RST_STREAM, 0, 1, &[0, 0, 8])),
        ("priority", frame(PRIORITY, 0, 3, &[0, 0, 0, 0, 16])),
        ("priority-itself", frame(PRIORITY, 0, 3, &[0, 0, 0, 3, 16])),
        ("priority-connection", frame(PRIORITY, 0, 0, &[0, 0, 0, 1, 16])),
        ("priority-short", frame(PRIORITY, 0, 3, &[0, 0, 0, 1])),
        ("goaway", frame(GOAWAY, 0, 0, &[0; 8])),
        ("goaway-error", frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 1])),
        ("goaway-on-stream", frame(GOAWAY, 0, 1, &[0; 8])),
        ("push", frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2][..], &fields].concat())),
        ("continuation", frame(CONTINUATION, END_HEADERS, 1, &fields)),
        ("continuation-connection", frame(CONTINUATION, END_HEADERS, 0, &fields)),
        ("data-idle", frame(DATA, 0, 5, b"x")),
        ("data-closed", frame(DATA, END_STREAM, 1, b"x")),
        ("data-connection", frame(DATA, 0, 0, b"x")),
        ("headers-closed", headers(1, &GET, END_STREAM)),
        ("headers-even", headers(2, &GET, END_STREAM)),
        ("headers-connection", headers(0, &GET, END_STREAM)),
        ("headers-cut", [frame(HEADERS, END_STREAM, 5, &fields), frame(PING, 0, 0, &[7; 8])].concat()),
        ("headers-cut-other", [frame(HEADERS, END_STREAM, 5, &fields), frame(CONTINUATION, END_HEADERS, 7, &[])].concat()),
        ("index-zero", frame(HEADERS, END_HEADERS | END_STREAM, 5, &[0x80])),
        ("index-far", frame(HEADERS, END_HEADERS | END_STREAM, 5, &[0xff, 0x40])),
        ("table-far", frame(HEADERS, END_HEADERS | END_STREAM, 5, &[&[0x3f, 0xff, 0xff, 0x03][..], &fields].concat())),
        ("table-late", frame(HEADERS, END_HEADERS | END_STREAM, 5, &[&fields[..], &[0x20]].concat())),
        ("literal-cut", frame(HEADERS, END_HEADERS | END_STREAM, 5, &[0x00, 0x05, b'a'])),
        ("huffman-odd", frame(HEADERS, END_HEADERS | END_STREAM, 5, &[0x00, 0x81, 0x00, 0x01, b'a'])),
        ("too-large", frame(DATA, 0, 1, &[0; 16_385])),
        ("padding-far", frame(DATA, PADDED, 1, &[9, 1, 2])),
    ]
}

/// Ways to send a request that are in order, or hardly.
fn sent() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let fields = block(GET);
    let (head, tail) = fields.split_at(20);
    let end = END_HEADERS | END_STREAM;
    let padded = |payload: &[u8]| [&[3][..], payload, &[0; 3]].concat();
    let large = |bytes: usize| -> Vec<u8> {
        let value = "v".repeat(bytes);
        let block = block(GET.into_iter().chain([("x-a", &*value)]));
        let mut pieces = block.chunks(16_384).enumerate();
        let (_, first) = pieces.next().expect("a piece");
        let more = block.len() > 16_384;
        let mut all = frame(HEADERS, END_STREAM | if more { 0 } else { END_HEADERS }, 1, first);
        let last = block.len().div_ceil(16_384) - 1;
        all.extend(pieces.flat_map(|(i, piece)| frame(CONTINUATION, if i == last { END_HEADERS } else { 0 }, 1, piece)));
        all
    };
    let many = |n: usize| frame(HEADERS, end, 1, &block(GET.into_iter().chain(std::iter::repeat_n(("x-a", "1"), n))));
    vec![
        ("padded", begun([frame(HEADERS, end | PADDED, 1, &padded(&fields))])),
        ("padded-far", begun([frame(HEADERS, end | PADDED, 1, &[&[255][..], &fields].concat())])),
        ("prioritized", begun([frame(HEADERS, end | WITH_PRIORITY, 1, &[&[0, 0, 0, 0, 16][..], &fields].concat())])),
        ("prioritized-itself", begun([frame(HEADERS, end | WITH_PRIORITY, 1, &[&[0, 0, 0, 1, 16][..], &fields].concat())])),
        ("continued", begun([frame(HEADERS, END_STREAM, 1, head), frame(CONTINUATION, END_HEADERS, 1, tail)])),
        ("continued-malformed", {
            let fields = block(GET.into_iter().chain([(":scheme", "http"), ("x-a", "1")]));
            let (head, tail) = fields.split_at(fields.len() - 2);
            begun([[frame(HEADERS, END_STREAM, 1, head), frame(CONTINUATION, END_HEADERS, 1, tail)].concat()])
        }),
        (
            "continued-empty",
            begun([
                [frame(HEADERS, END_STREAM, 1, &[]), frame(CONTINUATION, 0, 1, &[]), frame(CONTINUATION, END_HEADERS, 1, &fields)].concat()
            ]),
        ),
        ("padded-data", begun([[post(1, &[]), frame(DATA, PADDED | END_STREAM, 1, &padded(b"hello"))].concat()])),
        ("one-after-other", begun([get(1), get(3), get(5)])),
        ("together", begun([[get(1), get(3), get(5)].concat()])),
        ("leaps", begun([get(7), get(101)])),
        ("back", begun([get(7), get(5)])),
        ("data-first", begun([frame(DATA, END_STREAM, 1, b"x")])),
        ("data-after-end", begun([[get(1), frame(DATA, END_STREAM, 1, b"x")].concat()])),
        ("headers-after-end", begun([[get(1), get(1)].concat()])),
        ("trailers-open", begun([[post(1, &[]), headers(1, &[("x-t", "1")], 0)].concat()])),
        ("reset-in-body", begun([post(1, &[]), frame(DATA, 0, 1, b"he"), frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]), again(3)])),
        ("window-zero-stream", begun([[post(1, &[]), frame(WINDOW_UPDATE, 0, 1, &[0; 4])].concat(), again(3)])),
        ("window-overflow-stream", begun([[post(1, &[]), frame(WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff])].concat(), again(3)])),
        ("end-in-body", begun([post(1, &[]), frame(DATA, 0, 1, b"he"), Vec::new()])),
        ("end-after", begun([get(1), Vec::new()])),
        ("end-at-once", begun([[get(1), Vec::new()].concat(), Vec::new()])),
        ("goaway-in-body", begun([post(1, &[]), frame(GOAWAY, 0, 0, &[0; 8]), frame(DATA, END_STREAM, 1, b"hello")])),
        ("no-settings", vec![[PREFACE, &get(1)].concat()]),
        ("ping-first", vec![[PREFACE, &frame(PING, 0, 0, &[7; 8])].concat()]),
        ("large-8k", begun([large(8_000)])),
        ("large-50k", begun([large(50_000)])),
        ("large-59k", begun([large(59_000)])),
        ("large-62k", begun([large(62_000)])),
        ("large-100k", begun([large(100_000)])),
        ("many-90", begun([many(90)])),
        ("many-120", begun([many(120)])),
        ("many-1000", begun([many(1000)])),
    ]
}

/// What an upstream of HTTP/1 says, which is to be said in HTTP/2.
const ANSWERS: &[(&str, &str, End)] = &[
    ("chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", End::Keep),
    ("trailers", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-t: 1\r\n\r\n", End::Keep),
    ("chunk-cut", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nok", End::Fin),
    ("short", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok", End::Fin),
    ("short-reset", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok", End::Reset),
    ("to-the-end", "HTTP/1.1 200 OK\r\n\r\nok", End::Fin),
    ("connection", "HTTP/1.1 200 OK\r\nconnection: x-a\r\nx-a: 1\r\nkeep-alive: 5\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("proxy-connection", "HTTP/1.1 200 OK\r\nproxy-connection: close\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("upgrade", "HTTP/1.1 200 OK\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("upper-case", "HTTP/1.1 200 OK\r\nX-A: B\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("interim", "HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("continue", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("switching", "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", End::Keep),
    ("no-content", "HTTP/1.1 204 No Content\r\n\r\n", End::Keep),
    ("not-modified", "HTTP/1.1 304 Not Modified\r\netag: a\r\n\r\n", End::Keep),
    ("own-status", "HTTP/1.1 799 Own\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("status-far", "HTTP/1.1 1000 Far\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("latin-1", "HTTP/1.1 200 OK\r\nx-a: \u{e9}\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("cookies", "HTTP/1.1 200 OK\r\nset-cookie: a=b\r\nset-cookie: c=d\r\ncontent-length: 2\r\n\r\nok", End::Keep),
    ("nothing", "", End::Fin),
    ("reset", "", End::Reset),
    ("garbage", "garbage\r\n\r\n", End::Keep),
];

pub fn case(name: String, request: Vec<Vec<u8>>, answer: &str, end: End) -> Case {
    let bytes = answer.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect();
    Case { name, request, heads: Vec::new(), answer: Answer::always(vec![bytes], end), routes: None, filters: Vec::new() }
}

pub fn all() -> Vec<Case> {
    let mut all = Vec::new();
    let mut push = |kind: &str, name: &str, request| all.push(case(format!("{kind}-{name}"), request, OK, End::Keep));
    // Whoever survives it is asked another time.
    let and_again = |fields: &[Field]| begun([headers(1, fields, END_STREAM), again(3)]);
    for (name, more) in MORE {
        push("more", name, and_again(&[&GET[..], more].concat()));
    }
    for (name, field, value) in INSTEAD {
        push("instead", name, and_again(&GET.map(|(n, v)| (n, if n == *field { *value } else { v }))));
    }
    for (name, fields) in LISTS {
        push("list", name, and_again(fields));
    }
    for (name, more, pieces, trailers) in BODIES {
        let mut bytes = post(1, more);
        for (i, piece) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len() && trailers.is_none();
            bytes.extend(frame(DATA, if last { END_STREAM } else { 0 }, 1, piece.as_bytes()));
        }
        bytes.extend(trailers.map(|fields| headers(1, fields, END_STREAM)).unwrap_or_default());
        push("body", name, begun([bytes, again(3)]));
    }
    for (name, bytes) in between() {
        let pieces = [get(1), ANSWERED.to_vec(), bytes, again(9)].into_iter().filter(|p| !p.is_empty());
        push("between", name, begun(pieces));
    }
    for (name, pieces) in sent() {
        push("sent", name, pieces);
    }
    for (name, answer, end) in ANSWERS {
        all.push(case(format!("answer-{name}"), begun([get(1), get(3)]), answer, *end));
    }
    all
}
