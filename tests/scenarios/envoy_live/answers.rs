//! What upstreams answer in frames, right and wrong.

use std::sync::Arc;

use mesh_tests::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PADDED, PING, PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, block,
    frame,
};

use super::End;

pub type Field = (&'static str, &'static str);

/// What is sent for a request on a stream; an empty piece is a pause.
pub type Says = Arc<dyn Fn(u32) -> Vec<Vec<u8>> + Send + Sync>;

pub fn head(stream: u32, fields: &[Field], flags: u8) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, &block(fields.iter().copied()))
}

pub fn data(stream: u32, bytes: &[u8], flags: u8) -> Vec<u8> {
    frame(DATA, flags, stream, bytes)
}

pub fn reset(stream: u32, code: u8) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &[0, 0, 0, code])
}

pub fn goaway(last: u32, code: u8) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[&last.to_be_bytes()[..], &[0, 0, 0, code]].concat())
}

pub const OK: Field = (":status", "200");

/// Heads before `ok`, which is all of the body.
pub const HEADS: &[(&str, &[Field])] = &[
    ("plain", &[OK]),
    ("ordinary", &[OK, ("x-a", "1"), ("content-type", "text/plain")]),
    ("none", &[]),
    ("no-status", &[("x-a", "1")]),
    ("status-empty", &[(":status", "")]),
    ("status-words", &[(":status", "ok")]),
    ("status-short", &[(":status", "20")]),
    ("status-long", &[(":status", "2000")]),
    ("status-99", &[(":status", "099")]),
    ("status-600", &[(":status", "600")]),
    ("status-799", &[(":status", "799")]),
    ("status-999", &[(":status", "999")]),
    ("status-plus", &[(":status", "+20")]),
    ("status-twice", &[OK, OK]),
    ("status-late", &[("x-a", "1"), OK]),
    ("status-101", &[(":status", "101")]),
    ("status-204", &[(":status", "204")]),
    ("status-304", &[(":status", "304")]),
    ("request-field", &[OK, (":path", "/y")]),
    ("pseudo-unknown", &[OK, (":foo", "1")]),
    ("upper-case", &[OK, ("X-A", "1")]),
    ("name-empty", &[OK, ("", "1")]),
    ("name-space", &[OK, ("x a", "1")]),
    ("name-underscore", &[OK, ("x_a", "1")]),
    ("value-nul", &[OK, ("x-a", "1\u{0}2")]),
    ("value-newline", &[OK, ("x-a", "1\n2")]),
    ("value-return", &[OK, ("x-a", "1\r2")]),
    ("value-tab", &[OK, ("x-a", "1\t2")]),
    ("value-control", &[OK, ("x-a", "1\u{1}2")]),
    ("value-latin-1", &[OK, ("x-a", "\u{e9}")]),
    ("value-spaces", &[OK, ("x-a", " 1 ")]),
    ("value-empty", &[OK, ("x-a", "")]),
    ("connection", &[OK, ("connection", "close")]),
    ("keep-alive", &[OK, ("keep-alive", "timeout=5")]),
    ("proxy-connection", &[OK, ("proxy-connection", "close")]),
    ("transfer-encoding", &[OK, ("transfer-encoding", "chunked")]),
    ("upgrade", &[OK, ("upgrade", "h2c")]),
    ("te", &[OK, ("te", "trailers")]),
    ("length", &[OK, ("content-length", "2")]),
    ("length-less", &[OK, ("content-length", "1")]),
    ("length-more", &[OK, ("content-length", "3")]),
    ("length-zero", &[OK, ("content-length", "0")]),
    ("length-words", &[OK, ("content-length", "two")]),
    ("length-negative", &[OK, ("content-length", "-2")]),
    ("length-plus", &[OK, ("content-length", "+2")]),
    ("length-empty", &[OK, ("content-length", "")]),
    ("length-list", &[OK, ("content-length", "2, 2")]),
    ("length-twice", &[OK, ("content-length", "2"), ("content-length", "2")]),
    ("length-differs", &[OK, ("content-length", "2"), ("content-length", "3")]),
    ("cookies", &[OK, ("set-cookie", "a=b"), ("set-cookie", "c=d")]),
    ("repeated", &[OK, ("x-a", "1"), ("x-b", "2"), ("x-a", "3")]),
    ("date", &[OK, ("date", "yesterday"), ("server", "theirs"), ("via", "them")]),
    ("internal", &[OK, ("x-envoy-upstream-service-time", "7"), ("x-envoy-overloaded", "true")]),
    ("trailer-named", &[OK, ("trailer", "x-t")]),
    ("grpc", &[OK, ("content-type", "application/grpc"), ("grpc-status", "5")]),
];

/// Heads of answers without a body.
pub const BARE: &[(&str, &[Field])] = &[
    ("plain", &[OK]),
    ("length", &[OK, ("content-length", "2")]),
    ("length-zero", &[OK, ("content-length", "0")]),
    ("status-101", &[(":status", "101")]),
    ("status-100", &[(":status", "100")]),
    ("status-103", &[(":status", "103")]),
    ("status-204", &[(":status", "204")]),
    ("status-204-length", &[(":status", "204"), ("content-length", "0")]),
    ("status-304", &[(":status", "304"), ("content-length", "2")]),
    ("status-503", &[(":status", "503")]),
];

pub fn says(f: impl Fn(u32) -> Vec<Vec<u8>> + Send + Sync + 'static) -> Says {
    Arc::new(f)
}

/// Whole answers, and what comes in their places.
pub fn conversations() -> Vec<(&'static str, Says, End)> {
    let ok = |s| [head(s, &[OK], 0), data(s, b"ok", END_STREAM)].concat();
    let with = |before: fn(u32) -> Vec<u8>| says(move |s| vec![[before(s), ok(s)].concat()]);
    let after_head = |then: fn(u32) -> Vec<u8>| says(move |s| vec![[head(s, &[OK], 0), data(s, b"o", 0), then(s)].concat()]);
    let later = |then: fn(u32) -> Vec<u8>| says(move |s| vec![[head(s, &[OK], 0), data(s, b"o", 0)].concat(), Vec::new(), then(s)]);
    let trailers =
        |fields: &'static [Field]| says(move |s| vec![[head(s, &[OK], 0), data(s, b"ok", 0), head(s, fields, END_STREAM)].concat()]);
    let mut all = vec![
        ("interim", with(|s| head(s, &[(":status", "103"), ("link", "a")], 0)), End::Keep),
        ("interims", with(|s| [head(s, &[(":status", "103")], 0), head(s, &[(":status", "103")], 0)].concat()), End::Keep),
        ("continue", with(|s| head(s, &[(":status", "100")], 0)), End::Keep),
        ("switching", with(|s| head(s, &[(":status", "101")], 0)), End::Keep),
        ("interim-ends", says(|s| vec![head(s, &[(":status", "103")], END_STREAM)]), End::Keep),
        ("interim-data", with(|s| [head(s, &[(":status", "103")], 0), data(s, b"x", 0)].concat()), End::Keep),
        ("data-first", says(|s| vec![data(s, b"ok", END_STREAM)]), End::Keep),
        ("data-before", with(|s| data(s, b"x", 0)), End::Keep),
        ("padded", says(|s| vec![[head(s, &[OK], 0), frame(DATA, PADDED | END_STREAM, s, b"\x02ok\0\0")].concat()]), End::Keep),
        ("padded-far", after_head(|s| frame(DATA, PADDED | END_STREAM, s, b"\x09ok")), End::Keep),
        (
            "empty-data",
            says(|s| vec![[head(s, &[OK], 0), data(s, b"", 0), data(s, b"", 0), data(s, b"ok", 0), data(s, b"", END_STREAM)].concat()]),
            End::Keep,
        ),
        (
            "continued",
            says(|s| {
                let fields = block([OK, ("x-a", "1")]);
                let (first, rest) = fields.split_at(5);
                vec![[frame(HEADERS, END_STREAM, s, first), frame(CONTINUATION, END_HEADERS, s, rest)].concat()]
            }),
            End::Keep,
        ),
        ("continued-other", says(|s| vec![[frame(HEADERS, 0, s, &block([OK])), data(s, b"ok", END_STREAM)].concat()]), End::Keep),
        ("continuation-alone", with(|s| frame(CONTINUATION, END_HEADERS, s, &block([OK]))), End::Keep),
        ("head-twice", says(|s| vec![[head(s, &[OK], 0), head(s, &[OK], 0), data(s, b"ok", END_STREAM)].concat()]), End::Keep),
        ("unknown", with(|s| frame(0x42, 0xff, s, b"x")), End::Keep),
        ("ping", with(|_| frame(PING, 0, 0, &[7; 8])), End::Keep),
        ("ping-short", with(|_| frame(PING, 0, 0, &[7; 7])), End::Keep),
        (
            "push",
            with(|s| {
                frame(
                    PUSH_PROMISE,
                    END_HEADERS,
                    s,
                    &[&[0, 0, 0, 2][..], &block([(":method", "GET"), (":scheme", "http"), (":authority", "a.example"), (":path", "/y")])]
                        .concat(),
                )
            }),
            End::Keep,
        ),
        ("window-zero", with(|_| frame(WINDOW_UPDATE, 0, 0, &[0; 4])), End::Keep),
        ("window-zero-stream", with(|s| frame(WINDOW_UPDATE, 0, s, &[0; 4])), End::Keep),
        ("window-overflow", with(|_| frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])), End::Keep),
        ("window-overflow-stream", with(|s| frame(WINDOW_UPDATE, 0, s, &[0x7f, 0xff, 0xff, 0xff])), End::Keep),
        ("settings-odd", with(|_| frame(SETTINGS, 0, 0, &[0; 5])), End::Keep),
        ("settings-window", with(|_| frame(SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0])), End::Keep),
        ("settings-push", with(|_| frame(SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 1])), End::Keep),
        ("idle-stream", with(|s| head(s + 2, &[OK], END_STREAM)), End::Keep),
        ("idle-data", with(|s| data(s + 2, b"x", END_STREAM)), End::Keep),
        ("even-stream", with(|_| head(2, &[OK], END_STREAM)), End::Keep),
        ("data-connection", with(|_| data(0, b"x", 0)), End::Keep),
        ("index-far", says(|s| vec![frame(HEADERS, END_HEADERS | END_STREAM, s, &[0xff, 0x40])]), End::Keep),
        ("too-large", says(|s| vec![[head(s, &[OK], 0), data(s, &[b'x'; 16_385], END_STREAM)].concat()]), End::Keep),
        ("reset", says(|s| vec![reset(s, 8)]), End::Keep),
        ("reset-no-error", says(|s| vec![reset(s, 0)]), End::Keep),
        ("reset-protocol", says(|s| vec![reset(s, 1)]), End::Keep),
        ("reset-internal", says(|s| vec![reset(s, 2)]), End::Keep),
        ("reset-calm", says(|s| vec![reset(s, 11)]), End::Keep),
        ("reset-http1", says(|s| vec![reset(s, 13)]), End::Keep),
        ("reset-unknown", says(|s| vec![reset(s, 99)]), End::Keep),
        ("reset-refused", says(|s| vec![reset(s, 7)]), End::Keep),
        ("reset-after-head", after_head(|s| reset(s, 8)), End::Keep),
        ("reset-after-head-later", later(|s| reset(s, 8)), End::Keep),
        ("reset-no-error-later", later(|s| reset(s, 0)), End::Keep),
        ("reset-after-end", says(move |s| vec![[ok(s), reset(s, 0)].concat()]), End::Keep),
        ("goaway", with(|s| goaway(s, 0)), End::Keep),
        ("goaway-zero", says(|_| vec![goaway(0, 0)]), End::Keep),
        ("goaway-zero-error", says(|_| vec![goaway(0, 2)]), End::Keep),
        ("goaway-zero-answer", with(|_| goaway(0, 0)), End::Keep),
        ("goaway-error", says(|s| vec![goaway(s, 2)]), End::Keep),
        ("goaway-error-answer", with(|s| goaway(s, 2)), End::Keep),
        ("goaway-calm", says(|s| vec![goaway(s, 11)]), End::Keep),
        ("goaway-in-body", later(|s| [goaway(s, 0), data(s, b"k", END_STREAM)].concat()), End::Keep),
        ("goaway-error-in-body", later(|s| goaway(s, 1)), End::Keep),
        ("goaway-and-end", says(|s| vec![goaway(s, 0)]), End::Fin),
        ("goaway-zero-and-end", says(|_| vec![goaway(0, 0)]), End::Fin),
        ("end", says(|_| vec![]), End::Fin),
        ("cut", says(|_| vec![]), End::Reset),
        ("end-after-head", after_head(|_| Vec::new()), End::Fin),
        // What its peer has not read by then is lost to it: three pauses.
        ("cut-after-head", says(|s| vec![head(s, &[OK], 0), Vec::new(), Vec::new(), Vec::new()]), End::Reset),
        ("end-in-a-frame", after_head(|s| data(s, b"abc", 0)[..10].to_vec()), End::Fin),
        ("end-after-all", says(move |s| vec![ok(s)]), End::Fin),
        ("no-http2", says(|_| vec![b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n".to_vec()]), End::Fin),
        ("trailers", trailers(&[("x-t", "1")]), End::Keep),
        ("trailers-none", trailers(&[]), End::Keep),
        ("trailers-status", trailers(&[OK]), End::Keep),
        ("trailers-pseudo", trailers(&[(":foo", "1")]), End::Keep),
        ("trailers-upper", trailers(&[("X-T", "1")]), End::Keep),
        ("trailers-newline", trailers(&[("x-t", "1\n2")]), End::Keep),
        ("trailers-connection", trailers(&[("connection", "close")]), End::Keep),
        ("trailers-length", trailers(&[("content-length", "2")]), End::Keep),
        ("trailers-open", says(|s| vec![[head(s, &[OK], 0), data(s, b"ok", 0), head(s, &[("x-t", "1")], 0)].concat()]), End::Keep),
    ];
    all.extend([
        ("large-50k", says(|s| vec![large(s, 50_000, 16_384)]), End::Keep),
        ("large-70k", says(|s| vec![large(s, 70_000, 16_384)]), End::Keep),
        ("large-in-small-frames", says(|s| vec![large(s, 50_000, 4000)]), End::Keep),
        ("trailers-large", says(|s| vec![large_trailers(s, 20_000)]), End::Keep),
        ("trailers-too-large", says(|s| vec![large_trailers(s, 62_000)]), End::Keep),
        ("many-90", says(|s| vec![many(s, 90)]), End::Keep),
        ("many-150", says(|s| vec![many(s, 150)]), End::Keep),
    ]);
    all
}

fn many(stream: u32, n: usize) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &block(std::iter::once(OK).chain(std::iter::repeat_n(("x-a", "1"), n))))
}

/// A head in frames of so many bytes.
fn large(stream: u32, bytes: usize, frames_of: usize) -> Vec<u8> {
    let value = "v".repeat(bytes);
    in_frames(stream, &block([(":status", "200"), ("x-a", &*value)]), frames_of)
}

/// An answer to a call of gRPC, whose last word is behind much.
fn large_trailers(stream: u32, bytes: usize) -> Vec<u8> {
    let value = "v".repeat(bytes);
    let trailers = block([("grpc-message", &*value), ("grpc-status", "13")]);
    let head = head(stream, &[OK, ("content-type", "application/grpc")], 0);
    [head, data(stream, b"hello", 0), in_frames(stream, &trailers, 16_384)].concat()
}

fn in_frames(stream: u32, block: &[u8], frames_of: usize) -> Vec<u8> {
    let pieces = block.chunks(frames_of).collect::<Vec<_>>();
    let last = pieces.len() - 1;
    let one = |(i, piece): (usize, &&[u8])| {
        let end = if i == last { END_HEADERS } else { 0 };
        if i == 0 { frame(HEADERS, END_STREAM | end, stream, piece) } else { frame(CONTINUATION, end, stream, piece) }
    };
    pieces.iter().enumerate().flat_map(one).collect()
}
