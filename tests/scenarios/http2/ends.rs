//! Applications of HTTP/2 that end their connections, or take no more on them, on the way into their pod.

use mesh_tests::engine::server_pod;
use tokio::net::TcpListener;

use super::*;

const GOAWAY: u8 = 7;
const CALM: u32 = 11;

/// An application that says its settings, waits until it has been asked so often, says more, and ends or waits.
async fn application(settings: &'static [u8], asked: usize, says: Vec<u8>, ends: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let says = says.clone();
            tokio::spawn(async move {
                let acknowledged = [frame(4, 0, 0, settings), frame(4, 1, 0, &[])].concat();
                stream.write_all(&acknowledged).await.expect("written");
                let mut read = Vec::new();
                while heads(&read) < asked {
                    if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let _ = stream.write_all(&says).await;
                if ends {
                    let _ = stream.shutdown().await;
                }
                let _ = stream.read_to_end(&mut Vec::new()).await;
                tokio::time::sleep(Duration::from_secs(20)).await;
            });
        }
    });
    address
}

/// How many frames of HEADERS there are behind the preface.
fn heads(read: &[u8]) -> usize {
    let (mut rest, mut heads) = (read.get(mesh_node::detect::PREFACE.len()..).unwrap_or_default(), 0);
    while let [a, b, c, kind, ..] = *rest {
        heads += usize::from(kind == 1);
        rest = rest.get(9 + u32::from_be_bytes([0, a, b, c]) as usize..).unwrap_or_default();
    }
    heads
}

async fn into_the_pod(application: SocketAddr) -> (Engine, tokio::net::TcpStream) {
    let documents = [vec![server_pod()], service("server", "10.98.0.2", "http2", &[application])].concat();
    let engine = Engine::start(&documents).await.expect("engine");
    let stream = engine.connect_inbound(application.port()).await.expect("connected");
    (engine, stream)
}

/// Connections to an application: as a service's, out of a pod, and as the pod's own, into it.
async fn both_ways(application: SocketAddr) -> [(&'static str, Engine, tokio::net::TcpStream); 2] {
    let documents = service("server", "10.98.0.2", "http2", &[application]);
    let out = Engine::start(&documents).await.expect("engine");
    let leaving = out.connect("10.98.0.2:80".parse().expect("valid")).await.expect("connected");
    let (into, coming) = into_the_pod(application).await;
    [("out", out, leaving), ("into", into, coming)]
}

/// An error of the connection as a whole says which streams were not begun, and loses no answer that had come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_ends_with_an_error_takes_nothing_with_it() {
    let goaway = |last: u32| frame(GOAWAY, 0, 0, &[last.to_be_bytes(), CALM.to_be_bytes()].concat());
    // HEADERS with `:status: 200` and the end of the stream.
    let answered = [frame(1, 5, 1, &[0x88]), goaway(1)].concat();
    for (what, says, ends, first) in [
        ("nothing begun, end", goaway(0), true, None),
        ("nothing begun", goaway(0), false, None),
        ("the first answered, end", answered.clone(), true, Some(StatusCode::OK)),
        ("the first answered", answered, false, Some(StatusCode::OK)),
    ] {
        let (_engine, stream) = into_the_pod(application(&[], 2, says, ends).await).await;
        let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
        tokio::spawn(connection);
        let mut asked = Vec::new();
        for _ in 0..2 {
            let request = Request::get("http://svc.example/x").body(()).expect("valid");
            asked.push(send.clone().ready().await.expect("ready").send_request(request, true).expect("sent").0);
        }
        let mut told = Vec::new();
        for response in asked {
            let response = tokio::time::timeout(Duration::from_secs(5), response).await.expect("an end");
            told.push(response.map(|r| r.status()).map_err(|e| e.reason()));
        }
        // Which of them is the first for the application is chance.
        told.sort_by_key(Result::is_err);
        let refused = Err(Some(h2::Reason::REFUSED_STREAM));
        assert_eq!(told, [first.map_or(refused, Ok), refused], "{what}");
    }
}

/// An answer that has come whole before its request was is one, although the application ends its connection at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_whole_although_its_connection_ends_before_the_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        for gently in [true, false].into_iter().cycle() {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            tokio::spawn(async move {
                // HEADERS with `:status: 200`, and the last of the body.
                let answer = [frame(4, 0, 0, &[]), frame(4, 1, 0, &[]), frame(1, 4, 1, &[0x88]), frame(0, 1, 1, b"whole")].concat();
                let mut read = Vec::new();
                while heads(&read) < 1 {
                    if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                if !gently {
                    // What it does not read makes its end a reset.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let _ = stream.write_all(&answer).await;
            });
        }
    });
    let out = service("server", "10.98.0.2", "http2", &[address]);
    let [out, into] = [out.clone(), [vec![server_pod()], out].concat()];
    let (out, into) = (Engine::start(&out).await.expect("engine"), Engine::start(&into).await.expect("engine"));
    for i in 0..12 {
        let leaves = i % 4 < 2;
        let stream =
            if leaves { out.connect("10.98.0.2:80".parse().expect("valid")).await } else { into.connect_inbound(address.port()).await };
        let (mut send, connection) = h2::client::handshake(stream.expect("connected")).await.expect("HTTP/2");
        tokio::spawn(connection);
        let (response, mut body) = send.send_request(Request::post("http://svc.example/x").body(()).expect("valid"), false).expect("sent");
        body.send_data(vec![b'a'; 1000].into(), false).expect("sent");
        let answer = async {
            let (parts, mut body) = response.await.unwrap_or_else(|error| panic!("{i}, out: {leaves}: {error}")).into_parts();
            let mut read = Vec::new();
            while let Some(data) = body.data().await {
                read.extend_from_slice(&data.unwrap_or_else(|error| panic!("{i}: {error}, after {}", read.escape_ascii())));
            }
            (parts.status, read)
        };
        let answer = tokio::time::timeout(Duration::from_secs(5), answer).await.expect("an end");
        assert_eq!(answer, (StatusCode::OK, b"whole".to_vec()), "{i}, out: {leaves}");
    }
}

/// Nor is one cut that a reset comes behind, nor what comes before one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_takes_nothing_of_what_came_before_it() {
    let reset = |reason: u32| frame(3, 0, 1, &reason.to_be_bytes());
    for (what, ends, reason, whole) in [("no error", 1, 0, true), ("cancelled", 1, 8, true), ("cut", 0, 8, false)] {
        let says = [frame(1, 4, 1, &[0x88]), frame(0, ends, 1, b"all of it"), reset(reason)].concat();
        let address = application(&[], 1, says, false).await;
        for (way, _engine, stream) in both_ways(address).await {
            let (mut send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
            tokio::spawn(connection);
            let (response, mut upload) =
                send.send_request(Request::post("http://svc.example/x").body(()).expect("valid"), false).expect("sent");
            upload.send_data(vec![b'a'; 100].into(), false).expect("sent");
            let answer = async {
                let mut body = response.await.expect("an answer").into_body();
                let mut read = Vec::new();
                loop {
                    match body.data().await {
                        Some(Ok(data)) => read.extend_from_slice(&data),
                        Some(Err(_)) => return (read, false),
                        None => return (read, true),
                    }
                }
            };
            let answer = tokio::time::timeout(Duration::from_secs(5), answer).await.expect("an end");
            assert_eq!(answer, (b"all of it".to_vec(), whole), "{way}: {what}");
        }
    }
}

/// One whose last frame has not come to its end is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_cut_in_its_last_frame_is_not_whole() {
    let last = frame(0, 1, 1, &[b'x'; 100]);
    // A trailer `t: v`.
    let trailers = frame(1, 5, 1, &[0, 1, b't', 1, b'v']);
    for (what, last) in [("data", &last), ("trailers", &trailers)] {
        let says = [frame(1, 4, 1, &[0x88]), frame(0, 0, 1, b"abc"), last[..last.len() - 1].to_vec()].concat();
        let address = application(&[], 1, says, true).await;
        for (way, _engine, stream) in both_ways(address).await {
            let (mut send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
            tokio::spawn(connection);
            let (response, _) = send.send_request(Request::get("http://svc.example/x").body(()).expect("valid"), true).expect("sent");
            let cut = async {
                let mut body = response.await.expect("an answer").into_body();
                while let Some(data) = body.data().await {
                    if data.is_err() {
                        return true;
                    }
                }
                body.trailers().await.is_err()
            };
            let cut = tokio::time::timeout(Duration::from_secs(5), cut).await.expect("an end");
            assert!(cut, "{way}: {what}");
        }
    }
}

/// What becomes of a stream at an application, its client's node is told: it tells the same of it as if it had been there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_say_what_has_become_of_the_application() {
    let reset = |reason: u32| frame(3, 0, 1, &reason.to_be_bytes());
    // A field in upper case, behind `:status: 200`.
    let malformed = frame(1, 5, 1, &[&[0x88, 0, 1][..], b"A", &[1], b"v"].concat());
    // A head, and then the end of a stream that is not its end.
    let cut = [frame(1, 4, 1, &[0x88]), reset(7)].concat();
    for (what, says, ends, expected) in [
        ("malformed", malformed, false, h2::Reason::PROTOCOL_ERROR),
        ("an error of the protocol", reset(1), false, h2::Reason::PROTOCOL_ERROR),
        ("refused", reset(7), false, h2::Reason::REFUSED_STREAM),
        ("refused behind the head", cut, false, h2::Reason::REFUSED_STREAM),
        ("cancelled", reset(8), false, h2::Reason::INTERNAL_ERROR),
    ] {
        let (_engine, stream) = into_the_pod(application(&[], 1, says, ends).await).await;
        let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
        tokio::spawn(connection);
        let request = Request::get("http://svc.example/x").body(()).expect("valid");
        let (response, _) = send.ready().await.expect("ready").send_request(request, true).expect("sent");
        let told = async {
            match response.await {
                Err(error) => error,
                Ok(answer) => answer.into_body().data().await.expect("no end").expect_err("no body"),
            }
        };
        let told = tokio::time::timeout(Duration::from_secs(5), told).await.expect("an end");
        assert_eq!(told.reason(), Some(expected), "{what}");
    }
    // Who has dialled no service is answered for one that is gone, as by Envoy: what its end means between nodes is not for others.
    let (_engine, stream) = into_the_pod(application(&[], 1, Vec::new(), true).await).await;
    let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = Request::get("http://svc.example/x").body(()).expect("valid");
    let (response, _) = send.ready().await.expect("ready").send_request(request, true).expect("sent");
    let answered = tokio::time::timeout(Duration::from_secs(5), response).await.expect("an end").expect("an answer");
    assert_eq!(answered.status(), StatusCode::SERVICE_UNAVAILABLE);
}

/// Nobody waits for ever for an application that takes no requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_takes_no_streams_is_not_waited_for() {
    // SETTINGS_MAX_CONCURRENT_STREAMS: 0.
    const NONE: &[u8] = &[0, 3, 0, 0, 0, 0];
    let (_engine, stream) = into_the_pod(application(NONE, 0, Vec::new(), false).await).await;
    let (mut send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = Request::get("http://svc.example/x").body(()).expect("valid");
    let (response, _) = send.send_request(request, true).expect("sent");
    let refused = tokio::time::timeout(Duration::from_secs(8), response).await.expect("an end").expect_err("not asked");
    // The end of a connection that takes none may come before.
    assert!([Some(h2::Reason::REFUSED_STREAM), Some(h2::Reason::NO_ERROR)].contains(&refused.reason()), "{refused:?}");
    // One that takes none any more, or fewer: its client is told to go elsewhere, and the stream under way goes on.
    for fewer in [NONE, &[0, 3, 0, 0, 0, 1]] {
        let (_engine, stream) = into_the_pod(application(&[0, 3, 0, 0, 0, 100], 1, frame(4, 0, 0, fewer), false).await).await;
        let (mut send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
        tokio::spawn(connection);
        let request = Request::get("http://svc.example/x").body(()).expect("valid");
        let (response, _) = send.send_request(request, true).expect("sent");
        let sent_away = async {
            while send.clone().ready().await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), sent_away).await.expect("sent away");
        assert!(tokio::time::timeout(Duration::from_millis(200), response).await.is_err(), "it is waited for");
    }
}

/// Trailers that come late for streams the proxy has reset do not end the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_late_for_many_reset_streams_ends_nothing() {
    let (engine, vip) = engine().await;
    let mut stream = engine.connect(vip).await.expect("connected");
    stream.write_all(mesh_node::detect::PREFACE).await.expect("written");
    stream.write_all(&frame(4, 0, 0, &[])).await.expect("written");
    // POST to what is answered at once, with an authority and without an end, in literal fields of HPACK.
    let head = [&[0x83, 0x86, 0x44, 0x07][..], b"/direct", &[0x41, 0x01], b"a"].concat();
    let many = 400_u32;
    for i in 0..many {
        stream.write_all(&frame(1, 4, 1 + 2 * i, &head)).await.expect("written");
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    // A trailer, and the end.
    let late = (0..many).flat_map(|i| frame(1, 5, 1 + 2 * i, &[&[0, 1][..], b"t", &[1], b"v"].concat()));
    stream.write_all(&late.collect::<Vec<_>>()).await.expect("written");
    goes_on(stream).await;
}

/// Frames of data without data, one for each request, are no flood, however many requests there are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_frames_do_not_add_up() {
    let (engine, vip) = engine().await;
    let mut stream = engine.connect(vip).await.expect("connected");
    stream.write_all(mesh_node::detect::PREFACE).await.expect("written");
    stream.write_all(&frame(4, 0, 0, &[])).await.expect("written");
    let head = [&[0x83, 0x86, 0x44, 0x07][..], b"/direct", &[0x41, 0x01], b"a"].concat();
    for id in (0..300).map(|i| 1 + 2 * i) {
        let request = [frame(1, 4, id, &head), frame(0, 0, id, b"a"), frame(0, 0, id, &[]), frame(0, 1, id, b"b")].concat();
        stream.write_all(&request).await.expect("written");
    }
    goes_on(stream).await;
}

/// Reads until a ping is answered.
async fn goes_on(mut stream: tokio::net::TcpStream) {
    stream.write_all(&frame(6, 0, 0, b"8 bytes.")).await.expect("written");
    let mut read = Vec::new();
    let mut buffer = [0; 65536];
    let answered = async {
        while !read.windows(8).any(|w| w == b"8 bytes.") {
            let n = stream.read(&mut buffer).await.expect("read");
            assert!(n > 0, "the connection goes on: {}", read.escape_ascii());
            read.extend_from_slice(&buffer[..n]);
        }
    };
    tokio::time::timeout(Duration::from_secs(5), answered).await.expect("its ping is answered");
}

/// One that speaks no HTTP/2 is told of as what it is, and not as one that takes no more streams, of which its client would try another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_of_another_protocol_is_not_one_that_refuses_streams() {
    for (what, says, resets, reason) in [
        ("HTTP/1", &b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"[..], false, h2::Reason::PROTOCOL_ERROR),
        ("nothing, and the end", b"", false, h2::Reason::CONNECT_ERROR),
        ("nothing, and a reset", b"", true, h2::Reason::CONNECT_ERROR),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut preface = vec![0; mesh_node::detect::PREFACE.len()];
                    let _ = stream.read_exact(&mut preface).await;
                    let _ = stream.write_all(says).await;
                    if resets {
                        let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                    } else {
                        let _ = stream.shutdown().await;
                        let _ = stream.read_to_end(&mut Vec::new()).await;
                    }
                });
            }
        });
        let (engine, stream) = into_the_pod(address).await;
        let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
        tokio::spawn(connection);
        let request = Request::get("http://svc.example/x").body(()).expect("valid");
        let response = send.clone().ready().await.expect("ready").send_request(request, true).expect("sent").0;
        let response = tokio::time::timeout(Duration::from_secs(5), response).await.expect("an end");
        assert_eq!(response.map(|r| r.status()).map_err(|e| e.reason()), Err(Some(reason)), "{what}");
        engine.until_idle().await;
    }
}
