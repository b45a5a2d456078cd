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
    engine::{Engine, logging, security, server_pod, service, virtual_service},
    envoy::{Envoy, Listener, lines_of},
    frames::{ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, frame},
    raw::Reached,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};

use super::{
    Case, Compared, End, Listed, Side, Way, about,
    answers::{BARE, HEADS, OK, Says, conversations, data, goaway, head, reset, says},
    cases, format, framed, named, of_requests, of_the_answer, random_retries,
    requests::{GET, HEAD, POST},
    run, vip,
};

#[derive(Clone)]
struct Answered {
    case: Case,
    /// To each request the next, and the last to all after it.
    says: Vec<(Says, End)>,
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
