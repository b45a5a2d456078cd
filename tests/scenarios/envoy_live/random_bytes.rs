//! Requests of HTTP/1 that were nearly right: each is one that is, with bytes changed, lines repeated and headers put in that proxies and
//! servers are known to read in different ways. The same ones every time; `BYTES_SEED` makes others and `BYTES` more of them.

use fastrand::Rng;

use super::{
    Case, End, Outcome,
    cases::case,
    random::{number, pick},
};

const BYTES: u64 = 160;
const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

const REQUESTS: [&str; 7] = [
    "GET /x HTTP/1.1\r\nhost: a.example\r\nx-a: 1\r\n\r\n",
    "HEAD /x?q=1 HTTP/1.1\r\nHost: a.example:80\r\nX-A: b\r\n\r\n",
    "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 5\r\n\r\nhello",
    "POST /x HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "PUT /x HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n2;a=b\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    "GET http://a.example/x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 0\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nhost: a.example\r\n\r\n",
];

const AGAIN: &str = "GET /again HTTP/1.1\r\nhost: a.example\r\n\r\n";

const CHARACTERS: [char; 24] =
    [' ', '\t', '\r', '\n', ':', '\0', '\u{e9}', ';', ',', '"', '0', 'A', 'f', '%', '/', '?', '#', '\u{7f}', '\\', '-', '_', '.', '+', 'z'];

const LINES: [&str; 30] = [
    "content-length: 3",
    "content-length: 5",
    "content-length: 05",
    "content-length: +5",
    "content-length: 5, 5",
    "content-length: 0x5",
    "content-length : 5",
    "Content-Length:5",
    "transfer-encoding: chunked",
    "Transfer-Encoding:\tCHUNKED",
    "transfer-encoding: identity",
    "transfer-encoding: gzip, chunked",
    "transfer-encoding: chunked, chunked",
    "transfer-encoding : chunked",
    "transfer_encoding: chunked",
    "connection: close",
    "connection: x-a",
    "connection: transfer-encoding",
    "te: trailers",
    "x-b",
    ": v",
    "x b: 1",
    "x-b:",
    " folded: 1",
    "keep-alive: 5",
    "proxy-connection: close",
    "transfer-encoding: \u{e9}",
    "transfer-encoding: , chunked",
    "connection: x-a, \u{e9}",
    "content-length: 000000000000000000005",
];

/// One of these messages, with one or two things changed.
pub fn changed(rng: &mut Rng, messages: &[&str]) -> String {
    let mut text = pick(rng, messages).to_owned();
    for _ in 0..rng.usize(1..3) {
        let ends = text.match_indices("\r\n").map(|(at, _)| at + 2).collect::<Vec<_>>();
        let places = text.char_indices().map(|(at, c)| at..at + c.len_utf8()).collect::<Vec<_>>();
        let (line, place) = (ends[rng.usize(..ends.len().min(4))], places[rng.usize(..places.len())].clone());
        let character = CHARACTERS[rng.usize(..CHARACTERS.len())].to_string();
        match rng.u32(..10) {
            0..=3 => text.insert_str(line, &format!("{}\r\n", pick(rng, &LINES))),
            4 | 5 => text.replace_range(place, &character),
            6 => text.insert_str(place.start, &character),
            7 => text.replace_range(place, ""),
            8 => {
                let again = text[..line].split_inclusive("\r\n").last().unwrap_or_default().to_owned();
                text.insert_str(line, &again);
            }
            _ => {
                let case = text[place.clone()].to_owned();
                let other = if case == case.to_uppercase() { case.to_lowercase() } else { case.to_uppercase() };
                text.replace_range(place, &other);
            }
        }
    }
    // These stand for something else in a case.
    text.replace(['|', '^'], "")
}

/// Whether what was let through is what Envoy lets through: as many requests or fewer, read in the same way. To refuse more is safe.
pub fn is_safe(envoy: &Outcome, mesh: &Outcome) -> bool {
    // A folded line is joined with one space (RFC 9112 section 5.2), whatever it was folded with.
    let read = |text: &str| text.replace("\\t", " ");
    mesh.upstream.len() <= envoy.upstream.len() && mesh.upstream.iter().zip(&envoy.upstream).all(|(m, e)| read(m) == read(e))
}

pub fn all() -> Vec<Case> {
    let seed = number("BYTES_SEED", 1);
    let one = |of| {
        let mut rng = Rng::with_seed(seed * 1_000_000 + of);
        let request = changed(&mut rng, &REQUESTS);
        let case = case(format!("bytes-{seed}-{of}"), &format!("{request}|{AGAIN}"), ANSWER, End::Keep);
        if std::env::var("CASE").is_ok_and(|only| case.name.contains(&only)) {
            println!("{} {request:?}", case.name);
        }
        case
    };
    (0..number("BYTES", BYTES)).map(one).collect()
}
