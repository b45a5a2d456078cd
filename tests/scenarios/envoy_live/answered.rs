//! Upstreams of HTTP/2 that answer in frames, right and wrong, and what a client of HTTP/1 is told of it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fastrand::Rng;
use mesh_tests::{
    engine::{Engine, security, server_pod, service, virtual_service},
    envoy::{Envoy, Listener, lines_of},
    frames::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PADDED, PING, PREFACE, PUSH_PROMISE, RST_STREAM, SETTINGS,
        WINDOW_UPDATE, block, frame,
    },
    raw::Reached,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};

use super::{
    Case, Compared, End, Listed, Side, Way, about, cases, format, framed, logging, named, of_requests, of_the_answer, random_retries, run,
    vip,
};

type Field = (&'static str, &'static str);

/// What is sent for a request on a stream; an empty piece is a pause.
type Says = Arc<dyn Fn(u32) -> Vec<Vec<u8>> + Send + Sync>;

#[derive(Clone)]
struct Answered {
    case: Case,
    /// To each request the next, and the last to all after it.
    says: Vec<(Says, End)>,
}

const GET: &str = "GET /x HTTP/1.1\r\nhost: a.example\r\n\r\n";
const HEAD: &str = "HEAD /x HTTP/1.1\r\nhost: a.example\r\n\r\n";
const POST: &str = "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 5\r\n\r\nhello";

fn head(stream: u32, fields: &[Field], flags: u8) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, &block(fields.iter().copied()))
}

fn data(stream: u32, bytes: &[u8], flags: u8) -> Vec<u8> {
    frame(DATA, flags, stream, bytes)
}

fn reset(stream: u32, code: u8) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &[0, 0, 0, code])
}

fn goaway(last: u32, code: u8) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[&last.to_be_bytes()[..], &[0, 0, 0, code]].concat())
}

const OK: Field = (":status", "200");

/// Heads before `ok`, which is all of the body.
const HEADS: &[(&str, &[Field])] = &[
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
const BARE: &[(&str, &[Field])] = &[
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

fn says(f: impl Fn(u32) -> Vec<Vec<u8>> + Send + Sync + 'static) -> Says {
    Arc::new(f)
}

/// Whole answers, and what comes in their places.
fn conversations() -> Vec<(&'static str, Says, End)> {
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

fn all() -> Vec<Answered> {
    let mut all = Vec::new();
    let mut push = |name: String, request, says: Says, end| {
        all.push(Answered { case: cases::case(name, request, "", End::Keep), says: vec![(says, end)] })
    };
    for (name, fields) in HEADS {
        push(format!("head-{name}"), GET, says(|s| vec![[head(s, fields, 0), data(s, b"ok", END_STREAM)].concat()]), End::Keep);
    }
    for (name, fields) in BARE {
        for (kind, request) in [("GET", GET), ("HEAD", HEAD)] {
            push(format!("bare-{name}-{kind}"), request, says(|s| vec![head(s, fields, END_STREAM)]), End::Keep);
        }
    }
    for (name, says, end) in conversations() {
        push(name.to_owned(), GET, says.clone(), end);
        // Of some it matters whether the request may be sent again.
        if name.starts_with("reset") || name.starts_with("goaway") || ["end", "cut"].contains(&name) {
            push(format!("{name}-POST"), POST, says, end);
        }
    }
    all
}

/// Fields, sorted, without what differs from run to run.
fn told(fields: &[(Vec<u8>, Vec<u8>)]) -> String {
    let one = |(name, value): &(Vec<u8>, Vec<u8>)| {
        let varies = [&b"x-request-id"[..], b"x-envoy-expected-rq-timeout-ms"].contains(&&name[..]);
        format!("{}={}; ", name.escape_ascii(), if varies { "*".to_owned() } else { value.escape_ascii().to_string() })
    };
    let mut all = fields.iter().map(one).collect::<Vec<_>>();
    all.sort();
    format!("[{}]", all.concat())
}

/// Starts an upstream. What reached it is each request, with its fields sorted.
async fn upstream(says: Vec<(Says, End)>, reached: Reached) -> std::io::Result<SocketAddr> {
    let (says, turn) = (Arc::new(says), Arc::new(AtomicUsize::new(0)));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (says, turn, reached) = (says.clone(), turn.clone(), reached.clone());
            tokio::spawn(async move { drop(serve(stream, &says, &turn, reached).await) });
        }
    });
    Ok(address)
}

async fn serve(mut stream: TcpStream, says: &[(Says, End)], turn: &AtomicUsize, reached: Reached) -> std::io::Result<()> {
    let mut read = vec![0; PREFACE.len()];
    stream.read_exact(&mut read).await?;
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    let (mut decoder, mut block, mut requests) = (loona_hpack::Decoder::new(), Vec::new(), HashMap::<u32, String>::new());
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
        stream.read_exact(&mut payload).await?;
        let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if [HEADERS, CONTINUATION].contains(&head[3]) {
            block.extend_from_slice(&payload);
            if head[4] & END_HEADERS != 0 {
                let fields = decoder.decode(&std::mem::take(&mut block)).unwrap_or_default();
                *requests.entry(id).or_default() += &told(&fields);
            }
        } else if head[3] == DATA {
            *requests.entry(id).or_default() += &payload.escape_ascii().to_string();
        }
        match (head[3], head[4]) {
            (SETTINGS, flags) if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await?,
            (HEADERS | DATA, flags) if flags & END_STREAM != 0 => {
                reached.lock().expect("lock").push(requests.remove(&id).unwrap_or_default());
                let (says, end) = &says[turn.fetch_add(1, Ordering::Relaxed).min(says.len() - 1)];
                for piece in says(id) {
                    if piece.is_empty() {
                        sleep(Duration::from_millis(60)).await;
                    }
                    stream.write_all(&piece).await?;
                    stream.flush().await?;
                }
                match *end {
                    End::Keep => {}
                    End::Fin => return stream.shutdown().await,
                    End::Reset => {
                        sleep(Duration::from_millis(30)).await;
                        return socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                    }
                }
            }
            _ => {}
        }
    }
}

/// What an upstream says to one of several attempts.
fn attempt(rng: &mut Rng) -> (Says, End) {
    let ok = |s| [head(s, &[OK], 0), data(s, b"ok", END_STREAM)].concat();
    let status =
        |code: &'static str| says(move |s| vec![[head(s, &[(":status", code), ("x-a", "1")], 0), data(s, b"no", END_STREAM)].concat()]);
    let grpc =
        |code: &'static str| says(move |s| vec![head(s, &[OK, ("content-type", "application/grpc"), ("grpc-status", code)], END_STREAM)]);
    let reset_with = |code: u8| says(move |s| vec![reset(s, code)]);
    let answer = match rng.u32(..25) {
        0 | 1 => says(move |s| vec![ok(s)]),
        2 => says(move |s| [vec![Vec::new(); 8], vec![ok(s)]].concat()),
        3 | 4 => status("503"),
        5 => says(|s| vec![head(s, &[(":status", "503")], END_STREAM)]),
        6 => status("500"),
        7 => status("409"),
        8 => status("418"),
        9 => grpc("14"),
        10 => grpc("1"),
        11 => grpc("8"),
        12 | 13 => reset_with(7),
        14 => reset_with(8),
        15 => reset_with(2),
        16 => reset_with(0),
        17 => return (says(|s| vec![goaway(s.saturating_sub(2), 0)]), End::Fin),
        18 => return (says(|_| Vec::new()), End::Reset),
        19 => return (says(|_| Vec::new()), End::Fin),
        20 => says(|s| vec![[head(s, &[OK], 0), reset(s, 8)].concat()]),
        // What differs on purpose is not among these: hints and trailers are passed on, and a body to HEAD is none.
        21 => says(|s| vec![[head(s, &[(":status", "100")], 0), head(s, &[(":status", "503")], END_STREAM)].concat()]),
        22 => says(|s| vec![[head(s, &[(":status", "503")], 0), data(s, b"no", 0)].concat(), Vec::new(), reset(s, 7)]),
        23 => says(|s| vec![[head(s, &[(":status", "100")], 0), reset(s, 7)].concat()]),
        _ => says(|s| vec![head(s, &[("x-a", "1")], END_STREAM)]),
    };
    (answer, End::Keep)
}

/// Retries of what fails in another way each time.
fn at_random() -> Vec<Answered> {
    let one = |(mut case, mut rng): (Case, Rng)| {
        if case.heads.contains(&true) {
            case.request = cases::case(String::new(), GET, "", End::Keep).request;
            case.heads = Vec::new();
        }
        let more = rng.usize(1..4);
        Answered { case, says: (0..=more).map(|_| attempt(&mut rng)).collect() }
    };
    random_retries::asked("frames").map(one).collect()
}

/// What both make of them.
pub async fn compared_at_random(only: Option<&str>, listed: &Listed) -> Vec<Compared> {
    let mut all = often(at_random(), Way::Out, only, listed).await;
    all.iter_mut().for_each(|c| [&mut c.envoy, &mut c.mesh].into_iter().for_each(super::of_attempts));
    all
}

/// What both make of all whose names have `only` in them.
pub async fn compared(only: Option<&str>, listed: &Listed) -> Vec<Compared> {
    often(all(), Way::Out, only, listed).await
}

/// The same of requests in frames into a pod, to an application that speaks HTTP/2.
pub async fn compared_into_a_pod(only: Option<&str>, listed: &Listed) -> Vec<Compared> {
    let ok = says(|s| vec![[head(s, &[OK], 0), data(s, b"ok", END_STREAM)].concat()]);
    let requests = framed::all().into_iter().filter(|c| !c.name.starts_with("answer-"));
    often(requests.map(|case| Answered { case, says: vec![(ok.clone(), End::Keep)] }).collect(), Way::In, only, listed).await
}

async fn often(all: Vec<Answered>, way: Way, only: Option<&str>, listed: &Listed) -> Vec<Compared> {
    let all = all.into_iter().filter(|a| only.is_none_or(|o| a.case.name.contains(o))).collect::<Vec<_>>();
    let mut compared = both(&all, way).await;
    let differ = |c: &Compared| !listed.judge(&[(&c.name, &c.envoy, &c.mesh)]).is_empty();
    // What only a busy machine made different is not so again.
    for _ in 0..2 {
        let again = all.iter().zip(&compared).filter(|(_, c)| differ(c)).map(|(a, _)| a.clone()).collect::<Vec<_>>();
        if again.is_empty() {
            break;
        }
        let mut anew = both(&again, way).await.into_iter();
        compared = compared.into_iter().map(|c| if differ(&c) { anew.next().expect("one for each") } else { c }).collect();
    }
    compared
}

async fn both(all: &[Answered], way: Way) -> Vec<Compared> {
    let cases = all.iter().map(|a| a.case.clone()).collect::<Vec<_>>();
    let (mut envoy, mut mesh) = tokio::join!(of_envoy(&cases, all), of_mesh(&cases, all, way));
    if way == Way::In {
        envoy.outcomes.iter_mut().chain(&mut mesh.outcomes).for_each(|outcome| {
            of_requests(outcome);
            of_the_answer(outcome);
        });
    }
    let names = cases.into_iter().map(|c| c.name);
    names.zip(envoy.outcomes.into_iter().zip(mesh.outcomes)).map(|(name, (envoy, mesh))| Compared { name, envoy, mesh }).collect()
}

async fn upstreams(all: &[Answered]) -> (Vec<Reached>, Vec<SocketAddr>) {
    let (mut reached, mut addresses) = (Vec::new(), Vec::new());
    for one in all {
        let seen = Reached::default();
        addresses.push(upstream(one.says.clone(), seen.clone()).await.expect("an upstream"));
        reached.push(seen);
    }
    (reached, addresses)
}

async fn of_envoy(cases: &[Case], all: &[Answered]) -> Side {
    let (reached, addresses) = upstreams(all).await;
    let listener = |(case, upstream): (&Case, &SocketAddr)| {
        let routes = case.routes.as_ref().map(|(_, routes)| named(routes, "@cluster", &case.name));
        Listener { http2: true, routes, ..Listener::to(case.name.clone(), *upstream) }
    };
    let listeners = cases.iter().zip(&addresses).map(listener).collect::<Vec<_>>();
    let envoy = Envoy::start(&listeners, &format()).await.expect("Envoy");
    let at = cases.iter().map(|c| envoy.address(&c.name)).collect::<Vec<_>>();
    let mut side = run(cases, &reached, at.clone(), None).await;
    sleep(Duration::from_millis(500)).await;
    let lines = envoy.logged();
    for (outcome, at) in side.outcomes.iter_mut().zip(at) {
        outcome.log = about(&lines, at);
    }
    side
}

async fn of_mesh(cases: &[Case], all: &[Answered], way: Way) -> Side {
    let (reached, addresses) = upstreams(all).await;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("access.log");
    let mut documents = logging(&path, &format());
    for (i, address) in addresses.iter().enumerate() {
        let name = format!("case-{i}");
        documents.extend(service(&name, &vip(i).ip().to_string(), "http2", &[*address]));
        if let Some((rules, _)) = &cases[i].routes {
            documents.push(virtual_service(&name, &named(rules, "@host", &name)));
        }
    }
    if way == Way::In {
        // Who asks about requests has them read.
        let policy = json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/never"]}}]}]});
        documents.extend([server_pod(), security("AuthorizationPolicy", "p", &policy)]);
    }
    let engine = Arc::new(Engine::start(&documents).await.expect("engine"));
    let at = if way == Way::In { addresses } else { (0..cases.len()).map(vip).collect() };
    let mut side = run(cases, &reached, at.clone(), Some((engine, way))).await;
    sleep(Duration::from_millis(500)).await;
    let lines = lines_of(&path);
    for (outcome, at) in side.outcomes.iter_mut().zip(at) {
        outcome.log = about(&lines, at);
    }
    side
}
