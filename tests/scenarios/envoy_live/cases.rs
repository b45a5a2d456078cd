//! The exchanges. Requests meet an upstream that answers `ok`; answers are to a plain GET, HEAD or POST.

use super::{Answer, Case, End};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const GET: &str = "GET /x HTTP/1.1\r\nhost: a.example\r\n\r\n";
const HEAD: &str = "HEAD /x HTTP/1.1\r\nhost: a.example\r\n\r\n";
const POST: &str = "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 5\r\n\r\nhello";

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

/// First lines, with everything else as usual.
const LINES: &[(&str, &str)] = &[
    ("options", "OPTIONS /x HTTP/1.1"),
    ("options-star", "OPTIONS * HTTP/1.1"),
    ("get-star", "GET * HTTP/1.1"),
    ("delete", "DELETE /x HTTP/1.1"),
    ("trace", "TRACE /x HTTP/1.1"),
    ("put-bodiless", "PUT /x HTTP/1.1"),
    ("patch-bodiless", "PATCH /x HTTP/1.1"),
    ("post-bodiless", "POST /x HTTP/1.1"),
    ("method-own", "FOO /x HTTP/1.1"),
    ("method-lower", "get /x HTTP/1.1"),
    ("method-odd", "G@T /x HTTP/1.1"),
    ("method-propfind", "PROPFIND /x HTTP/1.1"),
    ("method-pri", "PRI /x HTTP/1.1"),
    ("connect", "CONNECT a.example:80 HTTP/1.1"),
    ("connect-path", "CONNECT /x HTTP/1.1"),
    ("dots", "GET /a/../b HTTP/1.1"),
    ("dots-beyond", "GET /../../b HTTP/1.1"),
    ("dots-end", "GET /a/.. HTTP/1.1"),
    ("dot", "GET /a/./b HTTP/1.1"),
    ("dot-end", "GET /a/. HTTP/1.1"),
    ("slashes", "GET /a//b HTTP/1.1"),
    ("slashes-first", "GET //b/c HTTP/1.1"),
    ("encoded-dots", "GET /%2e%2e/x HTTP/1.1"),
    ("encoded-dots-mixed", "GET /a/.%2E/b HTTP/1.1"),
    ("encoded-slash", "GET /a%2fb HTTP/1.1"),
    ("encoded-slash-upper", "GET /a%2Fb HTTP/1.1"),
    ("encoded-backslash", "GET /a%5cb HTTP/1.1"),
    ("encoded-letter", "GET /%61%62 HTTP/1.1"),
    ("encoded-nul", "GET /%00 HTTP/1.1"),
    ("encoded-wrong", "GET /%zz HTTP/1.1"),
    ("encoded-cut", "GET /a% HTTP/1.1"),
    ("backslash", "GET /a\\b HTTP/1.1"),
    ("backslash-dots", "GET /a\\..\\b HTTP/1.1"),
    ("fragment", "GET /a#b HTTP/1.1"),
    ("fragment-query", "GET /a?b#c HTTP/1.1"),
    ("query", "GET /a?b=/../c&d=%2e HTTP/1.1"),
    ("query-empty", "GET /a? HTTP/1.1"),
    ("query-only", "GET ?a=b HTTP/1.1"),
    ("semicolon", "GET /a;b=c HTTP/1.1"),
    ("no-slash", "GET a/b HTTP/1.1"),
    ("space-in-path", "GET /a b HTTP/1.1"),
    ("spaces", "GET  /a  HTTP/1.1"),
    ("tab", "GET\t/a\tHTTP/1.1"),
    ("latin-1", "GET /\u{e9} HTTP/1.1"),
    ("del", "GET /\u{7f} HTTP/1.1"),
    ("control", "GET /\u{1} HTTP/1.1"),
    ("quotes", "GET /\"<>^`{} HTTP/1.1"),
    ("absolute", "GET http://b.example/y?z HTTP/1.1"),
    ("absolute-bare", "GET http://b.example HTTP/1.1"),
    ("absolute-query", "GET http://b.example?z HTTP/1.1"),
    ("absolute-https", "GET https://b.example/y HTTP/1.1"),
    ("absolute-upper", "GET HTTP://B.example/y HTTP/1.1"),
    ("absolute-port", "GET http://b.example:8080/y HTTP/1.1"),
    ("absolute-user", "GET http://u:p@b.example/y HTTP/1.1"),
    ("absolute-ftp", "GET ftp://b.example/y HTTP/1.1"),
    ("absolute-hostless", "GET http:///y HTTP/1.1"),
    ("absolute-semicolon", "GET http://b;c/y HTTP/1.1"),
    ("absolute-tilde", "GET http://b~c/y HTTP/1.1"),
    ("absolute-underscore", "GET http://b_c/y HTTP/1.1"),
    ("absolute-percent", "GET http://b%41/y HTTP/1.1"),
    ("absolute-user-odd", "GET http://u;%40=a@b.example/y HTTP/1.1"),
    ("absolute-user-tilde", "GET http://u~@b.example/y HTTP/1.1"),
    ("absolute-users", "GET http://u@v@b.example/y HTTP/1.1"),
    ("absolute-v6", "GET http://[fd00::1]:80/y HTTP/1.1"),
    ("absolute-v6-zone", "GET http://[fe80::1%25e0]/y HTTP/1.1"),
    ("absolute-v6-name", "GET http://[b.example]/y HTTP/1.1"),
    ("absolute-v6-dots", "GET http://[::ffff:1.2.3.4]/y HTTP/1.1"),
    ("absolute-port-none", "GET http://b.example:/y HTTP/1.1"),
    ("absolute-port-zero", "GET http://b.example:0/y HTTP/1.1"),
    ("absolute-port-long", "GET http://b.example:0000080/y HTTP/1.1"),
    ("connect-portless", "CONNECT a.example HTTP/1.1"),
    ("connect-port-none", "CONNECT a.example: HTTP/1.1"),
    ("connect-port-zero", "CONNECT a.example:0 HTTP/1.1"),
    ("connect-port-large", "CONNECT a.example:65536 HTTP/1.1"),
    ("connect-semicolon", "CONNECT a;b:80 HTTP/1.1"),
    ("connect-v6", "CONNECT [fd00::1]:80 HTTP/1.1"),
    ("connect-user", "CONNECT u@a.example:80 HTTP/1.1"),
    ("connect-query", "CONNECT a.example:80?x HTTP/1.1"),
    ("connect-scheme", "CONNECT http://a.example:80 HTTP/1.1"),
    ("http-1.0", "GET /x HTTP/1.0"),
    ("http-1.2", "GET /x HTTP/1.2"),
    ("http-2.0", "GET /x HTTP/2.0"),
    ("http-3", "GET /x HTTP/3"),
    ("http-lower", "GET /x http/1.1"),
    ("http-0.9", "GET /x"),
    ("http-none", "GET /x FOO/1.1"),
    ("http-trailing", "GET /x HTTP/1.1 "),
    ("http-more", "GET /x HTTP/1.1x"),
    ("http-two-digits", "GET /x HTTP/1.10"),
    ("space-first", " GET /x HTTP/1.1"),
    ("line-first", "\r\nGET /x HTTP/1.1"),
    ("lf-first", "\nGET /x HTTP/1.1"),
    ("lines-first", "\r\n\r\n\r\nGET /x HTTP/1.1"),
    ("empty-path", "GET  HTTP/1.1"),
];

/// Headers of a GET in place of its `host`.
const HOSTS: &[(&str, &str)] = &[
    ("none", ""),
    ("two", "host: a\r\nhost: b\r\n"),
    ("two-same", "host: a\r\nhost: a\r\n"),
    ("empty", "host:\r\n"),
    ("port", "host: a.example:8080\r\n"),
    ("upper", "Host: A.Example\r\n"),
    ("space", "host: a b\r\n"),
    ("user", "host: u@a\r\n"),
    ("ipv6", "host: [::1]:80\r\n"),
    ("dot", "host: a.example.\r\n"),
    ("bad-port", "host: a:b\r\n"),
    ("path", "host: a/b\r\n"),
    ("underscore", "host: a_b\r\n"),
    ("latin-1", "host: \u{e9}\r\n"),
    ("comma", "host: a,b\r\n"),
    ("percent", "host: a%20b\r\n"),
];

/// Headers of a GET beside its `host`.
const HEADERS: &[(&str, &str)] = &[
    ("fold", "x-a: b\r\n c\r\n"),
    ("fold-tab", "x-a: b\r\n\tc\r\n"),
    ("fold-first", " x-a: b\r\n"),
    ("space-colon", "x-a : b\r\n"),
    ("nameless", ": b\r\n"),
    ("colonless", "x-a\r\n"),
    ("value-tab", "x-a: b\tc\r\n"),
    ("value-spaces", "x-a:   b   \r\n"),
    ("value-none", "x-a:\r\n"),
    ("value-control", "x-a: b\u{1}c\r\n"),
    ("value-nul", "x-a: b\u{0}c\r\n"),
    ("value-del", "x-a: b\u{7f}c\r\n"),
    ("value-latin-1", "x-a: b\u{e9}c\r\n"),
    ("value-cr", "x-a: b\rc\r\n"),
    ("lf", "x-a: b\nx-b: c\n"),
    ("name-space", "x a: b\r\n"),
    ("name-underscore", "x_a: b\r\n"),
    ("name-odd", "x!#$%&'*+.^`~a: b\r\n"),
    ("name-paren", "x(a): b\r\n"),
    ("name-latin-1", "x\u{e9}: b\r\n"),
    ("name-pseudo", ":path: /y\r\n"),
    ("name-upper", "X-UPPER: B\r\n"),
    ("repeated", "x-a: b\r\nx-b: c\r\nx-a: d\r\n"),
    ("close", "connection: close\r\n"),
    ("close-upper", "Connection: Close\r\n"),
    ("keep-alive", "connection: keep-alive\r\nkeep-alive: timeout=5\r\n"),
    ("close-and-keep", "connection: close, keep-alive\r\n"),
    ("nominated", "connection: x-a\r\nx-a: b\r\n"),
    ("nominated-close", "connection: close, x-a\r\nx-a: b\r\n"),
    ("nominated-odd", "connection: x-a, \u{e9}\r\nx-a: b\r\n"),
    ("close-odd", "connection: close, \u{e9}\r\n"),
    ("te-odd", "te: trailers, \u{e9}\r\n"),
    ("nominated-host", "connection: host\r\n"),
    ("nominated-te", "connection: te\r\nte: trailers\r\n"),
    ("nominated-cl", "connection: content-length\r\ncontent-length: 0\r\n"),
    ("nominated-forwarded", "connection: x-forwarded-proto, x-request-id\r\n"),
    ("proxy-connection", "proxy-connection: keep-alive\r\n"),
    ("proxy-authorization", "proxy-authorization: Basic eA==\r\n"),
    ("te-trailers", "te: trailers\r\n"),
    ("te-gzip", "te: gzip\r\n"),
    ("te-both", "te: gzip, trailers;q=0.5\r\n"),
    ("trailer", "trailer: x-a\r\n"),
    ("upgrade-h2c", "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"),
    ("upgrade-foo", "connection: upgrade\r\nupgrade: foo\r\n"),
    ("upgrade-unconnected", "upgrade: websocket\r\n"),
    ("upgrade-websocket", "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: eA==\r\nsec-websocket-version: 13\r\n"),
    ("upgrade-list", "connection: upgrade\r\nupgrade: foo, websocket\r\n"),
    ("forwarded-for", "x-forwarded-for: 1.2.3.4\r\n"),
    ("forwarded-for-two", "x-forwarded-for: 1.2.3.4\r\nx-forwarded-for: 5.6.7.8\r\n"),
    ("forwarded-proto", "x-forwarded-proto: https\r\n"),
    ("forwarded-proto-bad", "x-forwarded-proto: foo\r\n"),
    ("forwarded-host", "x-forwarded-host: b\r\n"),
    ("forwarded", "forwarded: for=1.2.3.4\r\n"),
    ("via", "via: 1.1 b\r\n"),
    ("internal", "x-envoy-internal: true\r\n"),
    ("envoy-retry", "x-envoy-retry-on: 5xx\r\nx-envoy-max-retries: 3\r\n"),
    ("envoy-expected", "x-envoy-expected-rq-timeout-ms: 5\r\n"),
    ("envoy-original-path", "x-envoy-original-path: /secret\r\n"),
    ("envoy-attempt", "x-envoy-attempt-count: 7\r\n"),
    ("envoy-decorator", "x-envoy-decorator-operation: op\r\n"),
    ("envoy-downstream", "x-envoy-downstream-service-cluster: c\r\nx-envoy-downstream-service-node: n\r\n"),
    ("envoy-external", "x-envoy-external-address: 1.2.3.4\r\n"),
    ("envoy-force-trace", "x-envoy-force-trace: 1\r\n"),
    ("envoy-peer-metadata", "x-envoy-peer-metadata: x\r\nx-envoy-peer-metadata-id: y\r\n"),
    ("envoy-ip-tags", "x-envoy-ip-tags: a\r\n"),
    ("client-trace", "x-client-trace-id: abc\r\n"),
    ("request-id", "x-request-id: mine\r\n"),
    ("expect-other", "expect: foo\r\n"),
    ("date", "date: Tue, 15 Nov 1994 08:12:31 GMT\r\n"),
    ("cookies", "cookie: a=b\r\ncookie: c=d\r\n"),
    ("grpc", "content-type: application/grpc\r\n"),
    ("grpc-timeout", "content-type: application/grpc\r\ngrpc-timeout: 5S\r\n"),
    ("user-agent", "user-agent: me/1.0\r\nreferer: /y\r\n"),
    ("many-100", "@99"),
    ("many-101", "@100"),
    ("large-50k", "@50000b"),
    ("large-70k", "@70000b"),
];

/// Whole requests.
const REQUESTS: &[(&str, &str)] = &[
    ("get", GET),
    ("head", HEAD),
    ("post", POST),
    ("length-none", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"),
    ("length-plus", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\nhello"),
    ("length-minus", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\nhello"),
    ("length-hex", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 0x5\r\n\r\nhello"),
    ("length-zeros", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 0005\r\n\r\nhello"),
    ("length-many-zeros", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 0000000000000000000000000000005\r\n\r\nhello"),
    ("length-list", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5, 5\r\n\r\nhello"),
    ("length-list-differ", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5, 6\r\n\r\nhello"),
    ("length-twice", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello"),
    ("length-twice-differ", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello"),
    ("length-huge", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\nhello"),
    ("length-empty", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n\r\nhello"),
    ("length-space", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5 \r\n\r\nhello"),
    ("length-of-get", "GET /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello"),
    ("length-of-head", "HEAD /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello"),
    ("length-pieces", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello|world"),
    ("length-cut", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello|^"),
    ("chunked", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("chunked-upper", "POST /x HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("chunked-empty", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("chunked-extension", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0;c\r\n\r\n"),
    ("chunked-zeros", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n00005\r\nhello\r\n000\r\n\r\n"),
    (
        "chunked-many-zeros",
        "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n000000000000000000000005\r\nhello\r\n0000000000000000000000\r\n\r\n",
    ),
    ("chunked-trailers", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: v\r\n\r\n"),
    ("chunked-trailer-bad", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx t: v\r\n\r\n"),
    (
        "chunked-trailer-length",
        "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\ncontent-length: 3\r\n\r\n",
    ),
    ("chunked-pieces", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5|\r\nhel|lo\r\n5\r\nworld\r\n|0\r\n\r\n"),
    ("chunked-cut", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel|^"),
    ("chunked-bad-size", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\nhello\r\n0\r\n\r\n"),
    ("chunked-minus", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n"),
    ("chunked-0x", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n"),
    ("chunked-space", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n"),
    ("chunked-huge", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
    ("chunked-long", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhelloo\r\n0\r\n\r\n"),
    ("chunked-lf", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\nhello\n0\n\n"),
    ("chunked-and-length", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    (
        "chunked-then-length",
        "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    ("coding-gzip-chunked", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("coding-chunked-gzip", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, gzip\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("coding-identity", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: identity\r\ncontent-length: 5\r\n\r\nhello"),
    (
        "coding-chunked-twice",
        "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    ("coding-odd", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \u{e9}\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    (
        "coding-chunked-odd",
        "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: \u{e9}\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    (
        "coding-odd-chunked",
        "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \u{e9}\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    ("coding-list", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: , chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("coding-list-behind", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked,\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("coding-tab", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\tchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("coding-xchunked", "POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("coding-1.0", "POST /x HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("coding-get", "GET /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("continue", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n|hello"),
    ("continue-upper", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nExpect: 100-Continue\r\n\r\n|hello"),
    ("continue-at-once", "POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\nhello"),
    ("continue-bodiless", "GET /x HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n\r\n"),
    ("pipelined", "GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\nHEAD /3 HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("pipelined-post", "POST /1 HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhelloGET /2 HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("pipelined-garbage", "GET /1 HTTP/1.1\r\nhost: a\r\n\r\nthis is not HTTP\r\n\r\n"),
    ("pipelined-close", "GET /1 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n"),
    (
        "one-after-another",
        "GET /1 HTTP/1.1\r\nhost: a\r\n\r\n|GET /2 HTTP/1.1\r\nhost: a\r\n\r\n|\r\n|POST /3 HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi",
    ),
    ("piece-by-piece", "GE|T /x HT|TP/1.1\r|\nhost|: a\r\n|\r\n"),
    ("head-cut", "GET /x HTTP/1.1\r\nhos|^"),
    ("head-waits", "GET /x HTTP/1.1\r\nhos"),
    ("garbage", "this is not HTTP\r\n\r\n"),
    ("garbage-waits", "EHLO x\r\n"),
    ("garbage-word-waits", "GARBAGE"),
    ("garbage-nul-waits", "\u{0}"),
    ("method-odd-waits", "G@T /x"),
    ("method-half-waits", "GE"),
    ("path-odd-waits", "GET /\u{0} HTTP/1.1\r\nhos"),
    ("tls-waits", "\u{16}\u{3}\u{1}\u{0}\u{5}\u{1}\u{0}\u{0}\u{1}\u{0}"),
    ("lf-only", "GET /x HTTP/1.1\nhost: a\n\n"),
    ("bodies-of-delete", "DELETE /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello"),
    ("1.0-keep-alive", "GET /x HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n"),
    ("1.0-hostless", "GET /x HTTP/1.0\r\n\r\n"),
];

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
