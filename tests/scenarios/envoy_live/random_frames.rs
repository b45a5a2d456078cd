//! Requests of HTTP/2 that were nearly right, to an upstream of HTTP/1: fields changed, repeated, put in and taken out, lengths that are none,
//! frames between others. The same ones every time; `FRAMES_SEED` makes others and `FRAMES` more of them.

use fastrand::Rng;
use mesh_tests::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PADDED, PING, PRIORITY, SETTINGS, WINDOW_UPDATE, WITH_PRIORITY, block, frame,
};

use super::{
    Case, End, Outcome,
    framed::{again, begun, case},
    random::{chance, number, pick},
};

const FRAMES: u64 = 160;
const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

type Field = (String, String);

const REQUESTS: [&[(&str, &str)]; 6] = [
    &[(":method", "GET"), (":scheme", "http"), (":authority", "a.example"), (":path", "/x")],
    &[(":method", "HEAD"), (":scheme", "http"), (":authority", "a.example:80"), (":path", "/x?q=1"), ("x-a", "b")],
    &[(":method", "POST"), (":scheme", "https"), (":path", "/x"), (":authority", "a.example"), ("content-length", "5")],
    &[(":method", "PUT"), (":scheme", "http"), (":authority", "a.example"), (":path", "/x"), ("te", "trailers"), ("cookie", "a=b")],
    &[(":method", "DELETE"), (":scheme", "http"), (":authority", "a.example"), (":path", "/x"), ("host", "a.example")],
    &[(":method", "OPTIONS"), (":scheme", "http"), (":authority", "a.example"), (":path", "*"), ("content-length", "0")],
];

const FIELDS: [(&str, &str); 38] = [
    ("content-length", "3"),
    ("content-length", "5"),
    ("content-length", "05"),
    ("content-length", "+5"),
    ("content-length", "5, 5"),
    ("content-length", ""),
    ("content-length", "18446744073709551616"),
    ("transfer-encoding", "chunked"),
    ("transfer-encoding", "trailers"),
    ("connection", "close"),
    ("connection", "x-a"),
    ("keep-alive", "5"),
    ("proxy-connection", "close"),
    ("upgrade", "websocket"),
    ("te", "gzip"),
    ("te", "trailers"),
    ("host", "a.example"),
    ("host", "b.example"),
    ("cookie", "c=d"),
    ("cookie", "e"),
    ("expect", "100-continue"),
    ("x-a", "1"),
    ("X-B", "1"),
    ("x-b", ""),
    ("x-b", " 1 "),
    ("x_b", "1"),
    ("x b", "1"),
    ("", "1"),
    ("x-b", "1\r\nx-c: 2"),
    (":method", "GET"),
    (":path", "/y"),
    (":authority", "b.example"),
    (":scheme", "http"),
    (":protocol", "websocket"),
    (":status", "200"),
    (":x", "1"),
    ("x-forwarded-proto", "ftp"),
    ("x-envoy-upstream-rq-timeout-ms", "x"),
];

const VALUES: [(&str, &[&str]); 4] = [
    (":method", &["CONNECT", "get", "G T", "", "M-SEARCH", "TRACE", "GET /y"]),
    (":scheme", &["ftp", "HTTP", "https"]),
    (":authority", &["", "u@a.example", "a.example:x", "a.example/x", "a.example, b", "[::1]:80", "a.example:", "A.EXAMPLE", "a example"]),
    (":path", &["", "x", "/x y", "/x\u{e9}", "http://b.example/x", "//b/x", "/%", "/x\\y", "/../y", "/x?y?", "/x HTTP/1.1"]),
];

const CHARACTERS: [char; 23] =
    [' ', '\t', '\r', '\n', ':', '\0', '\u{e9}', ';', ',', '"', '0', 'A', 'f', '%', '/', '?', '\u{7f}', '\\', '-', '_', '.', '+', 'z'];

fn change(rng: &mut Rng, fields: &mut Vec<Field>) {
    let at = rng.usize(..fields.len().max(1)).min(fields.len());
    let Some((name, value)) = fields.get_mut(at) else { return };
    match rng.u32(..12) {
        0..=3 => {
            let (name, value) = FIELDS[rng.usize(..FIELDS.len())];
            // Mostly where it may stand.
            let to = if chance(rng, 70) { fields.len() } else { at };
            fields.insert(to, (name.to_owned(), value.to_owned()));
        }
        4..=6 => {
            if let Some((_, all)) = VALUES.iter().find(|(n, _)| n == name) {
                *value = pick(rng, all).to_owned();
            }
        }
        7 => {
            let again = fields[at].clone();
            fields.insert(at + 1, again);
        }
        8 => drop(fields.remove(at)),
        9 => fields.swap(at, 0),
        _ => {
            // What it is read as if it is none is listed elsewhere.
            let text = if chance(rng, 30) || name == ":scheme" { name } else { value };
            let places = text.char_indices().map(|(at, c)| at..at + c.len_utf8()).collect::<Vec<_>>();
            let character = CHARACTERS[rng.usize(..CHARACTERS.len())].to_string();
            match places.get(rng.usize(..places.len() + 1)) {
                Some(place) => text.replace_range(place.clone(), &character),
                None => text.push_str(&character),
            }
        }
    }
}

/// A frame that means nothing to the request, or little.
fn aside(rng: &mut Rng) -> Vec<u8> {
    match rng.u32(..6) {
        0 => frame(PING, 0, 0, b"a ping!!"),
        1 => frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 7]),
        2 => frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1, 0]),
        3 => frame(WINDOW_UPDATE, 0, 1, &[0, 0, 1, 0]),
        4 => frame(SETTINGS, 0, 0, &[]),
        _ => frame(0x77, 0xff, 1, b"unknown"),
    }
}

fn head(rng: &mut Rng, fields: &[Field], flags: u8) -> Vec<u8> {
    let block = block(fields.iter().map(|(n, v)| (&**n, &**v)));
    match rng.u32(..10) {
        0 => frame(HEADERS, END_HEADERS | PADDED | flags, 1, &[&[2][..], &block, &[0; 2]].concat()),
        1 => frame(HEADERS, END_HEADERS | WITH_PRIORITY | flags, 1, &[&[0, 0, 0, 0, 16][..], &block].concat()),
        2 => {
            // In the midst of a field the library forgets what was wrong before: that is a case by itself.
            let (first, second) = block.split_at(if rng.bool() { block.len() } else { 0 });
            [frame(HEADERS, flags, 1, first), frame(CONTINUATION, END_HEADERS, 1, second)].concat()
        }
        _ => frame(HEADERS, END_HEADERS | flags, 1, &block),
    }
}

fn request(rng: &mut Rng) -> (Vec<Vec<u8>>, String) {
    let mut fields = REQUESTS[rng.usize(..REQUESTS.len())].iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect::<Vec<_>>();
    for _ in 0..rng.usize(1..4) {
        change(rng, &mut fields);
    }
    let mut said = format!("{fields:?}");
    let body: &[&str] = match rng.u32(..5) {
        0 | 1 => &[],
        2 | 3 => &["hello"],
        _ => &["he", "llo"],
    };
    let trailers = chance(rng, 15).then(|| {
        let mut fields = vec![("x-t".to_owned(), "1".to_owned())];
        change(rng, &mut fields);
        // Those are not passed on, whatever they are.
        fields.retain(|(name, _)| !["content-length", "host"].contains(&&**name));
        fields
    });
    let ends = |last: bool| if last { END_STREAM } else { 0 };
    let mut bytes = head(rng, &fields, ends(body.is_empty() && trailers.is_none()));
    for (i, piece) in body.iter().enumerate() {
        if chance(rng, 20) {
            bytes.extend(aside(rng));
        }
        let flags = ends(i + 1 == body.len() && trailers.is_none());
        if chance(rng, 20) {
            bytes.extend(frame(DATA, flags | PADDED, 1, &[&[3][..], piece.as_bytes(), &[0; 3]].concat()));
        } else {
            bytes.extend(frame(DATA, flags, 1, piece.as_bytes()));
        }
    }
    if let Some(fields) = &trailers {
        bytes.extend(head(rng, fields, END_STREAM));
    }
    said = format!("{said} {body:?} {trailers:?}");
    (begun([bytes, again(3)]), said)
}

/// Whether of the first request was let through what Envoy lets through, or nothing. The second one Envoy often has no connection for any more.
pub fn is_safe(envoy: &Outcome, mesh: &Outcome) -> bool {
    let first = |outcome: &Outcome| {
        let all = outcome.upstream.iter().filter(|request| !request.contains("/again "));
        // Trailers in HTTP/1 are passed on here, on purpose.
        all.map(|request| request.split(" trailer ").next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    let (envoy, mesh) = (first(envoy), first(mesh));
    mesh.len() <= envoy.len() && mesh.iter().zip(&envoy).all(|(m, e)| m == e)
}

pub fn all() -> Vec<Case> {
    let seed = number("FRAMES_SEED", 1);
    let one = |of| {
        let mut rng = Rng::with_seed(seed * 1_000_000 + of);
        let (pieces, said) = request(&mut rng);
        let case = case(format!("frames-{seed}-{of}"), pieces, ANSWER, End::Keep);
        if std::env::var("CASE").is_ok_and(|only| case.name.contains(&only)) {
            println!("{} {said}", case.name);
        }
        case
    };
    (0..number("FRAMES", FRAMES)).map(one).collect()
}
