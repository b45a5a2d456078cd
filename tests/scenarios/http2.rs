//! HTTP/2 towards clients: what a stream and a connection see, as recorded of Envoy or as RFC 9113 asks where the library
//! that frames it decides. An HTTP/2 upstream is in `envoy_rows`.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use mesh_tests::{
    engine::{Engine, service, virtual_service},
    frames::{CONTINUATION, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, block, frame},
    scripted::{self, Seen},
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[path = "http2/ends.rs"]
mod ends;

const VIP: &str = "10.98.0.1:80";

async fn engine() -> (Engine, SocketAddr) {
    let up = scripted::http1("up1", &Seen::default()).expect("upstream");
    let mut documents = service("web", "10.98.0.1", "http", &[up]);
    documents.push(virtual_service(
        "web",
        &json!([
            {"match": [{"uri": {"prefix": "/direct"}}], "directResponse": {"status": 418, "body": {"string": "teapot body"}}},
            {"match": [{"uri": {"prefix": "/abort"}}], "fault": {"abort": {"httpStatus": 503, "percentage": {"value": 100}}}, "route": [{"destination": {"host": "web"}}]},
            {"match": [{"uri": {"prefix": "/late"}}], "timeout": "0.3s", "retries": {"attempts": 0}, "route": [{"destination": {"host": "web"}}]},
            {"match": [{"uri": {"prefix": "/r5xx"}}], "retries": {"attempts": 2, "retryOn": "5xx"}, "route": [{"destination": {"host": "web"}}]},
            {"match": [{"uri": {"prefix": "/x"}}], "retries": {"attempts": 0}, "route": [{"destination": {"host": "web"}}]},
        ]),
    ));
    (Engine::start(&documents).await.expect("engine"), VIP.parse().expect("valid"))
}

/// Status, body, and how the stream ended when not in order.
async fn ask(engine: &Engine, vip: SocketAddr, path: &str, plan: &str) -> (StatusCode, String, Option<h2::Reason>) {
    let stream = engine.connect(vip).await.expect("connected");
    let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = Request::get(format!("http://svc.example{path}")).header("x-plan", plan).header("x-id", path).body(()).expect("valid");
    let (response, _) = send.ready().await.expect("ready").send_request(request, true).expect("sent");
    let (parts, mut body) = response.await.expect("a response").into_parts();
    let mut text = Vec::new();
    while let Some(data) = body.data().await {
        match data {
            Ok(data) => text.extend_from_slice(&data),
            Err(error) => return (parts.status, String::from_utf8_lossy(&text).into_owned(), error.reason()),
        }
    }
    (parts.status, String::from_utf8_lossy(&text).into_owned(), None)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_answered_as_recorded() {
    let (engine, vip) = engine().await;
    let termination = "upstream connect error or disconnect/reset before headers. reset reason: connection termination";
    let retried = "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: connection termination";
    let internal = Some(h2::Reason::INTERNAL_ERROR);
    for (path, plan, status, body, reset) in [
        ("/direct/x", "200", 418, "teapot body", None),
        ("/nothing", "200", 404, "", None),
        ("/x/hdrrst", "hdrrst", 200, "0123456789", internal),
        ("/late/stall", "hdrstall", 200, "0123456789", internal),
        ("/late/route", "200/1000", 504, "upstream request timeout", None),
        ("/x/rst", "rst", 503, termination, None),
        ("/r5xx/rst", "rst", 503, retried, None),
        ("/abort", "200", 503, "fault filter abort", None),
        ("/x/good", "200", 200, "up1 200 #1\n", None),
        ("/x/#frag", "200", 200, "up1 200 #1\n", None),
    ] {
        // A client does not send fragments.
        let path = path.trim_end_matches("#frag");
        let (got, text, ended) = ask(&engine, vip, path, plan).await;
        assert_eq!((got.as_u16(), text.as_str(), ended), (status, body, reset), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_share_a_connection_and_a_reset_one_leaves_the_others_alone() {
    let (engine, vip) = engine().await;
    let stream = engine.connect(vip).await.expect("connected");
    let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = |i: usize, plan: &str| {
        Request::get("http://svc.example/x/y").header("x-plan", plan).header("x-id", format!("m{i}")).body(()).expect("valid")
    };
    let mut responses = Vec::new();
    for i in 0..50 {
        let (response, mut out) = send.clone().ready().await.expect("ready").send_request(request(i, "200/200"), true).expect("sent");
        if i % 5 == 0 {
            out.send_reset(h2::Reason::CANCEL);
            continue;
        }
        responses.push(response);
    }
    for response in responses {
        assert_eq!(response.await.expect("a response").status(), StatusCode::OK);
    }
    engine.until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_arrive_whole_through_small_windows_and_a_slow_reader() {
    let (engine, vip) = engine().await;
    let stream = engine.connect(vip).await.expect("connected");
    let (send, connection) = h2::client::Builder::new().initial_window_size(16 * 1024).handshake::<_, Bytes>(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = Request::post("http://svc.example/x/echo").header("x-id", "slow").body(()).expect("valid");
    let (response, mut out) = send.ready().await.expect("ready").send_request(request, false).expect("sent");
    for _ in 0..64 {
        out.reserve_capacity(16 * 1024);
        while out.capacity() < 16 * 1024 {
            std::future::poll_fn(|cx| out.poll_capacity(cx)).await.expect("open").expect("capacity");
        }
        out.send_data(vec![b'x'; 16 * 1024].into(), false).expect("sent");
    }
    out.send_data(Bytes::new(), true).expect("sent");
    let mut body = response.await.expect("a response").into_body();
    let mut total = 0;
    while let Some(data) = body.data().await {
        let data = data.expect("data");
        total += data.len();
        tokio::time::sleep(Duration::from_millis(1)).await;
        body.flow_control().release_capacity(data.len()).expect("released");
    }
    assert!(total > 50, "{total}");
}

/// An application that has much to say of `/big`, and little of anything else.
async fn talkative() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let size = if request.uri().path() == "/big" { 1_000_000 } else { 10 };
                    let Ok(mut stream) = respond.send_response(http::Response::new(()), false) else { continue };
                    tokio::spawn(async move {
                        let _ = stream.send_data(vec![b'x'; size].into(), true);
                        let _ = std::future::poll_fn(|cx| stream.poll_reset(cx)).await;
                    });
                }
            });
        }
    });
    address
}

/// Each stream has room of its own, however many there are that nobody reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_do_not_read_hold_nobody_else_up() {
    let up = talkative().await;
    let engine = Engine::start(&service("web", "10.98.0.1", "http2", &[up])).await.expect("engine");
    let mut held = Vec::new();
    for _ in 0..3 {
        let stream = engine.connect(VIP.parse().expect("valid")).await.expect("connected");
        let (send, connection) = h2::client::Builder::new().initial_window_size(100).handshake::<_, Bytes>(stream).await.expect("HTTP/2");
        tokio::spawn(connection);
        for _ in 0..30 {
            let request = Request::get("http://svc.example/big").body(()).expect("valid");
            let (response, _) = send.clone().ready().await.expect("ready").send_request(request, true).expect("sent");
            held.push(response.await.expect("a response"));
        }
    }
    // Until as much has come of each as is taken.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asked = tokio::time::timeout(Duration::from_secs(5), ask(&engine, VIP.parse().expect("valid"), "/small", "200")).await;
    assert_eq!(asked.expect("nobody waits for those who do not read"), (StatusCode::OK, "x".repeat(10), None));
    drop(held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_frames_and_floods_end_the_connection_and_nothing_else() {
    let (engine, vip) = engine().await;
    let settings = frame(4, 0, 0, &[]);
    let reset_flood = (0..2000_u32).flat_map(|i| {
        let id = 1 + 2 * i;
        // GET / with an authority, in literal fields of HPACK.
        let head = [&[0x82, 0x86, 0x84, 0x41, 0x01][..], b"a"].concat();
        [frame(1, 5, id, &head), frame(3, 0, id, &8_u32.to_be_bytes())].concat()
    });
    let cases: [(&str, Vec<u8>); 6] = [
        ("a frame longer than allowed", [&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1][..], &[0; 64]].concat()),
        ("headers on stream 0", frame(1, 5, 0, &[0x82])),
        ("data on an idle stream", frame(0, 0, 1, b"x")),
        ("a settings frame of odd length", frame(4, 0, 0, &[0; 5])),
        ("compression that is none", frame(1, 5, 1, &[0xff; 64])),
        ("two thousand resets", reset_flood.collect()),
    ];
    for (what, bytes) in cases {
        let mut stream = engine.connect(vip).await.expect("connected");
        stream.write_all(mesh_node::detect::PREFACE).await.expect("written");
        stream.write_all(&settings).await.expect("written");
        // It may be closed before all of it is written.
        let _ = stream.write_all(&bytes).await;
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "{what}: the connection goes on");
        let (status, ..) = ask(&engine, vip, "/direct", "200").await;
        assert_eq!(status, StatusCode::IM_A_TEAPOT, "{what}: others are served");
    }
}

/// What a call comes to: its status and message.
async fn call(engine: &Engine, vip: SocketAddr, path: &str, plan: &str, timeout: &str) -> (String, String) {
    let stream = engine.connect(vip).await.expect("connected");
    let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = Request::post(format!("http://svc.example{path}")).header("x-plan", plan).header("x-id", path);
    let request = request.header("content-type", "application/grpc").header("grpc-timeout", timeout).body(()).expect("valid");
    let (response, _) = send.ready().await.expect("ready").send_request(request, true).expect("sent");
    let head = response.await.expect("a response").into_parts().0;
    let field = |name: &str| head.headers.get(name).map(|v| v.to_str().expect("ASCII").to_owned()).unwrap_or_default();
    (field("grpc-status"), field("grpc-message"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whose_time_was_up_is_told_apart() {
    let (engine, vip) = engine().await;
    let told = |status: &str, message: &str| (status.to_owned(), message.to_owned());
    // The route's, of which a client that would wait longer says nothing; and the client's own.
    assert_eq!(call(&engine, vip, "/late/a", "200/1000", "10S").await, told("14", "upstream request timeout"));
    assert_eq!(call(&engine, vip, "/late/b", "200/1000", "100m").await, told("4", "downstream duration timeout"));
    assert_eq!(call(&engine, vip, "/x/c", "200/1000", "100m").await, told("4", "downstream duration timeout"));
}

/// Nobody else's answer is lost to a head that is too large, in frames of the size that clients send.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_of_hundreds_of_kilobytes_is_refused_alone() {
    let (engine, vip) = engine().await;
    let mut stream = engine.connect(vip).await.expect("connected");
    let begin = [(":method", "GET"), (":scheme", "http"), (":authority", "svc.example"), (":path", "/x/slow"), ("x-id", "slow")];
    let value = "a".repeat(16_000);
    let large = block(begin.into_iter().chain((0..40).map(|_| ("x-large", &*value))));
    let pieces = large.chunks(16 * 1024).collect::<Vec<_>>();
    let mut sent = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    sent.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(begin.into_iter().chain([("x-plan", "200/700")]))));
    for (i, piece) in pieces.iter().enumerate() {
        let end = if i + 1 == pieces.len() { END_HEADERS } else { 0 };
        sent.extend(if i == 0 { frame(HEADERS, END_STREAM, 3, piece) } else { frame(CONTINUATION, end, 3, piece) });
    }
    stream.write_all(&sent).await.expect("written");
    let (mut heads, mut read) = (Vec::new(), Vec::new());
    let both = async {
        while heads.len() < 2 {
            let mut chunk = [0; 16 * 1024];
            let n = stream.read(&mut chunk).await.expect("read");
            assert!(n > 0, "it ended after answers on {heads:?}");
            read.extend_from_slice(&chunk[..n]);
            while let Some(length) = read.get(..9).map(|h| 9 + (usize::from(h[1]) << 8) + usize::from(h[2])).filter(|l| read.len() >= *l) {
                let frame = read.drain(..length).collect::<Vec<_>>();
                heads.extend((frame[3] == HEADERS).then_some(frame[8]));
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), both).await.expect("two answers");
    assert_eq!(heads, [3, 1]);
}
