//! Answers of HTTP/1 that were nearly right: what a client makes of one must not depend on what is between. The same ones every time;
//! `ANSWERS_SEED` makes others and `ANSWERS` more of them.

use fastrand::Rng;

use super::{
    Case, End, Outcome,
    cases::case,
    random::{number, pick},
    random_bytes::changed,
};

const ANSWERS: u64 = 120;

const REQUESTS: [&str; 3] = [
    "GET /x HTTP/1.1\r\nhost: a.example\r\n\r\n",
    "HEAD /x HTTP/1.1\r\nhost: a.example\r\n\r\n",
    "POST /x HTTP/1.1\r\nhost: a.example\r\ncontent-length: 2\r\n\r\nhi",
];

const MESSAGES: [&str; 7] = [
    "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-a: 1\r\n\r\nhello",
    "HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\nconnection: keep-alive\r\n\r\nhello",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-a: b\r\n\r\n2;a=b\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    "HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n",
    "HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\n\r\n",
    "HTTP/1.0 200 OK\r\nx-a: 1\r\n\r\nhello",
];

/// Whether a client gets what Envoy would give it, or is told that there is nothing to be had.
pub fn is_safe(envoy: &Outcome, mesh: &Outcome) -> bool {
    // One that breaks off tells so by itself, and so does none.
    let broken = mesh.client.contains("(incomplete)") || mesh.client == "open";
    envoy.client == mesh.client || broken || mesh.client.contains("[HTTP/1.1 502") || mesh.client.contains("[HTTP/1.1 503")
}

/// What differs on purpose, and is a case by itself: what is for one hop is not passed on, what is said twice not joined, and 204 has no body
/// whatever it says.
fn is_listed(answer: &str) -> bool {
    let lower = answer.to_ascii_lowercase();
    lower.contains(" 204 ") && (lower.contains("content-length") || lower.contains("transfer-encoding"))
        || answer.contains("connection: x-a")
        || answer.contains("te: t")
        || answer.matches("etag").nth(1).is_some()
}

pub fn all() -> Vec<Case> {
    let seed = number("ANSWERS_SEED", 1);
    let one = |of| {
        let mut rng = Rng::with_seed(seed * 1_000_000 + of);
        let request = pick(&mut rng, &REQUESTS);
        let mut answer = changed(&mut rng, &MESSAGES);
        while is_listed(&answer) {
            answer = changed(&mut rng, &MESSAGES);
        }
        let end = [End::Keep, End::Fin, End::Fin][rng.usize(..3)];
        let case = case(format!("answer-{seed}-{of}"), request, &answer, end);
        if std::env::var("CASE").is_ok_and(|only| case.name.contains(&only)) {
            println!("{} {request:?} {answer:?}", case.name);
        }
        case
    };
    (0..number("ANSWERS", ANSWERS)).map(one).collect()
}
