//! Bodies that authorizers are shown: `includeRequestBodyInCheck`, and `with_request_body` of Envoy's `ext_authz`.

use serde_json::{Value, json};

/// What providers are asked with, in Istio's words and in Envoy's.
pub fn settings() -> Vec<(&'static str, Value, Value)> {
    let both = |name, istio: Value, envoy: Value| (name, json!({"includeRequestBodyInCheck": istio}), json!({"with_request_body": envoy}));
    vec![
        both("whole", json!({"maxRequestBytes": 16}), json!({"max_request_bytes": 16})),
        both(
            "partial",
            json!({"maxRequestBytes": 16, "allowPartialMessage": true}),
            json!({"max_request_bytes": 16, "allow_partial_message": true}),
        ),
        both(
            "bytes",
            json!({"maxRequestBytes": 16, "allowPartialMessage": true, "packAsBytes": true}),
            json!({"max_request_bytes": 16, "allow_partial_message": true, "pack_as_bytes": true}),
        ),
    ]
}

/// Requests around the sixteen bytes that are shown.
pub const REQUESTS: &[(&str, &str)] = &[
    ("none", "GET /x HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("a POST without", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 0\r\n\r\n"),
    ("no chunks", "POST /x HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("five", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"),
    ("sixteen", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 16\r\n\r\n0123456789abcdef"),
    ("seventeen", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 17\r\n\r\n0123456789abcdefg"),
    ("forty", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 40\r\n\r\n0123456789abcdefghij0123456789abcdefghij"),
    ("pieces", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 10\r\n\r\n|01234|56789"),
    ("pieces beyond", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 30\r\n\r\n|0123456789|0123456789|0123456789"),
    ("chunks", "PUT /x HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\nabc\r\n0\r\n\r\n"),
    (
        "chunks beyond",
        "PUT /x HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n|a\r\n0123456789\r\n|a\r\n0123456789\r\n|0\r\n\r\n",
    ),
    ("a bad chunk", "PUT /x HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n"),
    ("binary", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 4\r\n\r\na\u{ff}\u{1}b"),
    ("cut", "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 10\r\n\r\nhello|^"),
    ("awaited", "POST /x HTTP/1.1\r\nhost: a.example\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n|hello"),
    (
        "two",
        "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 5\r\n\r\nhello|POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 5\r\n\r\nagain",
    ),
    (
        "two, the first too long",
        "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 20\r\n\r\n01234567890123456789|GET /x HTTP/1.1\r\nhost: a.example\r\n\r\n",
    ),
    ("HEAD", "HEAD /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 5\r\n\r\nhello"),
    (
        "gRPC",
        "POST /s/m HTTP/1.1\r\nhost: a.example\r\ncontent-type: application/grpc\r\nte: trailers\r\ncontent-length: 5\r\n\r\n\0\0\0\0\0",
    ),
    (
        "gRPC too long",
        "POST /s/m HTTP/1.1\r\nhost: a.example\r\ncontent-type: application/grpc\r\nte: trailers\r\ncontent-length: 20\r\n\r\n01234567890123456789",
    ),
    ("an upgrade", "GET /x HTTP/1.1\r\nhost: a.example\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"),
    ("said before", "POST /x HTTP/1.1\r\nhost: a.example\r\nx-envoy-auth-partial-body: mine\r\ncontent-length: 5\r\n\r\nhello"),
];
