//! Retries and timeouts at random: what a rule says of them, what Istio makes of that for Envoy, and an upstream that fails in other ways
//! each time it is asked. The same ones every time; `RETRIES_SEED` makes others and `RETRIES` more of them.

use fastrand::Rng;
use mesh_tests::raw::ANSWERED;
use serde_json::{Map, Value, json};

use super::{
    Answer, Case, End,
    cases::case,
    random::{chance, number, pick},
    resilience::retries,
    routes::{all_paths, route, rule},
};

const RETRIES: u64 = 40;

const CONDITIONS: [&str; 14] = [
    "5xx",
    "gateway-error",
    "reset",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
    "503",
    "409",
    "418",
];

/// What the upstream says, after so many pauses, and how it ends then.
const ANSWERS: [(&str, usize, End); 24] = [
    ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", 0, End::Keep),
    ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", 12, End::Keep),
    ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\nno", 0, End::Keep),
    ("HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\nno", 0, End::Fin),
    ("HTTP/1.1 503 Busy\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno", 0, End::Fin),
    ("HTTP/1.1 503 Busy\r\nx-envoy-ratelimited: true\r\ncontent-length: 2\r\n\r\nno", 0, End::Keep),
    ("HTTP/1.1 503 Busy\r\nx-envoy-overloaded: true\r\ncontent-length: 2\r\n\r\nno", 0, End::Keep),
    ("HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 502 X\r\ncontent-length: 0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 504 X\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 409 X\r\ncontent-length: 0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 418 X\r\ncontent-length: 0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 429 X\r\ncontent-length: 0\r\nretry-after: 1\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 14\r\ncontent-length: 0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 1\r\ncontent-length: 0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 8\r\ncontent-length: 0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", 0, End::Keep),
    ("HTTP/1.1 100 Continue\r\n\r\n", 0, End::Fin),
    ("HTTP/1.1 100 Continue\r\n\r\n", 0, End::Reset),
    ("", 0, End::Fin),
    ("", 0, End::Reset),
    ("HTTP/1.1 2", 0, End::Reset),
    ("garbage\r\n\r\n", 0, End::Keep),
];

fn answer(rng: &mut Rng) -> Answer {
    let (text, pauses, end) = ANSWERS[rng.usize(..ANSWERS.len())];
    let mut pieces = vec![Vec::new(); pauses];
    pieces.push(text.as_bytes().to_vec());
    Answer::always(pieces, end)
}

/// What a rule says of retries, and the retry policy of that.
fn policy(rng: &mut Rng) -> (Value, Value) {
    let mut more = Map::new();
    if chance(rng, 15) {
        // None at all is Istio's own.
        let on = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
        return (json!({}), retries(on, 2, json!({})));
    }
    let attempts = rng.u32(..4);
    let mut all = (0..rng.usize(1..4)).map(|_| pick(rng, &CONDITIONS)).collect::<Vec<_>>();
    all.dedup();
    let mut istio = json!({"attempts": attempts, "retryOn": all.join(","), "backoff": "10ms"});
    if chance(rng, 35) {
        istio["perTryTimeout"] = "0.16s".into();
        more.insert("per_try_timeout".into(), "0.16s".into());
    }
    if attempts == 0 {
        return (json!({"retries": istio}), json!({}));
    }
    let (codes, mut names) = all.into_iter().partition::<Vec<_>, _>(|c| c.parse::<u16>().is_ok());
    if !codes.is_empty() {
        names.push("retriable-status-codes");
        more.insert("retriable_status_codes".into(), codes.iter().map(|c| c.parse::<u16>().expect("a code")).collect::<Vec<_>>().into());
    }
    more.insert("retry_back_off".into(), json!({"base_interval": "0.010s"}));
    (json!({"retries": istio}), retries(&names.join(","), attempts, more.into()))
}

fn request(rng: &mut Rng) -> String {
    let (method, framing, body) = match rng.u32(..10) {
        0 | 1 => ("POST", "content-length: 3\r\n", "abc"),
        2 => ("POST", "transfer-encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"),
        3 => ("HEAD", "", ""),
        _ => ("GET", "", ""),
    };
    let mut text = format!("{method} /x HTTP/1.1\r\nhost: a.example\r\n{framing}");
    for (header, values) in [
        ("x-envoy-retry-on", &["5xx", "gateway-error,reset", "retriable-status-codes"][..]),
        ("x-envoy-retry-grpc-on", &["unavailable,cancelled"]),
        ("x-envoy-max-retries", &["0", "1", "2", "x"]),
        ("x-envoy-retriable-status-codes", &["409,418"]),
        ("x-envoy-upstream-rq-timeout-ms", &["250"]),
        ("x-envoy-upstream-rq-per-try-timeout-ms", &["160"]),
        ("x-envoy-hedge-on-per-try-timeout", &["false"]),
        ("content-type", &["application/grpc"]),
    ] {
        if chance(rng, 6) {
            text += &format!("{header}: {}\r\n", pick(rng, values));
        }
    }
    format!("{text}\r\n{body}")
}

/// Rules and a request to each, and what makes the rest of the case.
pub fn asked(kind: &'static str) -> impl Iterator<Item = (Case, Rng)> {
    let seed = number("RETRIES_SEED", 1);
    (0..number("RETRIES", RETRIES)).map(move |of| {
        let mut rng = Rng::with_seed(seed * 1_000_000 + of);
        let (mut istio, mut envoy) = policy(&mut rng);
        if chance(&mut rng, 25) {
            istio["timeout"] = "0.26s".into();
            envoy["timeout"] = "0.26s".into();
        }
        let request = request(&mut rng);
        let mut case = case(format!("{kind}-{seed}-{of}"), &request, "", End::Keep);
        case.request.push(ANSWERED.to_vec());
        if std::env::var("CASE").is_ok_and(|only| case.name.contains(&only)) {
            println!("{}\n{istio}\n{envoy}\n{request:?}", case.name);
        }
        case.routes = Some((json!([rule(istio)]), json!([route(all_paths(), envoy, json!({}))])));
        (case, rng)
    })
}

pub fn all() -> Vec<Case> {
    let with_answers = |(mut case, mut rng): (Case, Rng)| {
        case.answer = answer(&mut rng);
        case.answer.then = (0..rng.usize(1..4)).map(|_| answer(&mut rng)).collect();
        if std::env::var("CASE").is_ok_and(|only| case.name.contains(&only)) {
            for a in std::iter::once(&case.answer).chain(&case.answer.then) {
                println!("{:?} after {} {:?}", a.pieces.last().map(|p| String::from_utf8_lossy(p)), a.pieces.len() - 1, a.end);
            }
        }
        case
    };
    asked("retries").map(with_answers).collect()
}
