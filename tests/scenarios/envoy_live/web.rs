//! gRPC-Web, to upstreams that speak gRPC.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::*;

/// What upstreams were asked, by id.
type Asked = Arc<Mutex<HashMap<String, Vec<String>>>>;

struct Call {
    name: &'static str,
    headers: &'static str,
    /// What is sent, in pieces.
    body: Vec<Vec<u8>>,
    plan: &'static str,
}

fn message(text: &[u8]) -> Vec<u8> {
    let length = u32::try_from(text.len()).expect("short");
    [&[0][..], &length.to_be_bytes(), text].concat()
}

fn calls() -> Vec<Call> {
    const PROTO: &str = "content-type: application/grpc-web+proto\r\n";
    const TEXT: &str = "content-type: application/grpc-web-text\r\naccept: application/grpc-web-text\r\n";
    let binary = || vec![message(b"hello")];
    let text = |pieces: &[&[u8]]| pieces.iter().map(|piece| STANDARD.encode(piece).into_bytes()).collect::<Vec<_>>();
    let call = |name, headers, body, plan| Call { name, headers, body, plan };
    let whole = STANDARD.encode(message(b"in pieces")).into_bytes();
    vec![
        call("proto", PROTO, binary(), "grpc"),
        call("short", "content-type: application/grpc-web\r\n", binary(), "grpc"),
        call("encodings", "content-type: application/grpc-web\r\ngrpc-accept-encoding: gzip\r\nte: x\r\n", binary(), "grpc"),
        call("text", TEXT, text(&[&message(b"hello")]), "grpc"),
        call(
            "text-proto",
            "content-type: application/grpc-web-text+proto\r\naccept: application/grpc-web-text+proto\r\n",
            text(&[&message(b"hell")]),
            "grpc",
        ),
        call("text-asked", "content-type: application/grpc-web-text\r\n", text(&[&message(b"hello")]), "grpc"),
        call("text-wanted", "content-type: application/grpc-web\r\naccept: application/grpc-web-text\r\n", binary(), "grpc"),
        call("text-in-pieces", TEXT, whole.chunks(5).map(<[u8]>::to_vec).collect(), "grpc"),
        call("messages", PROTO, binary(), "messages"),
        call("messages-text", TEXT, text(&[&message(b"a")]), "messages"),
        call("cut-base64", TEXT, vec![b"AAAAAAAA".to_vec(), b"AAA".to_vec()], "grpc"),
        call("bad-base64", TEXT, vec![b"A??A".to_vec()], "grpc"),
        call("empty", PROTO, vec![], "grpc"),
        call("empty-text", TEXT, vec![], "grpc"),
        call("trailers-only", PROTO, binary(), "trailers-only"),
        call("no-body", PROTO, binary(), "404-empty"),
        call("plain", PROTO, binary(), "200 text/plain"),
        call("plain-text", TEXT, text(&[&message(b"hello")]), "200 text/plain"),
        call("unavailable", PROTO, binary(), "503 text/plain"),
        call("web-itself", PROTO, binary(), "200 application/grpc-web+proto"),
        call("grpc-500", PROTO, binary(), "500 application/grpc"),
        call("reset", PROTO, binary(), "reset"),
        call("late", "content-type: application/grpc-web+proto\r\ngrpc-timeout: 300m\r\n", binary(), "late"),
        call("parameter", "content-type: application/grpc-web; charset=utf-8\r\n", binary(), "grpc"),
        call("json", "content-type: application/json\r\n", vec![b"{}".to_vec()], "200 application/json"),
        call("grpc", "content-type: application/grpc\r\nte: trailers\r\n", binary(), "grpc"),
        call("grpc-reset", "content-type: application/grpc\r\nte: trailers\r\n", binary(), "reset"),
    ]
}

/// A server of gRPC that does what it is asked to.
async fn server(asked: Asked) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let asked = asked.clone();
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(serve(request, respond, asked.clone()));
                }
            });
        }
    });
    address
}

async fn serve(request: http::Request<h2::RecvStream>, mut respond: h2::server::SendResponse<Bytes>, asked: Asked) {
    let (head, mut stream) = request.into_parts();
    let header = |name: &str| head.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let (id, plan) = (header("x-id"), header("x-plan"));
    let mut body = Vec::new();
    while let Some(Ok(data)) = stream.data().await {
        let _ = stream.flow_control().release_capacity(data.len());
        body.extend_from_slice(&data);
    }
    let mut said = head.headers.iter().map(|(n, v)| format!("{n}={};", v.as_bytes().escape_ascii())).collect::<Vec<_>>();
    said.retain(|h| !["x-request-id", "x-id"].iter().any(|varying| h.starts_with(varying)));
    said.sort();
    let line = format!("{} {} {} body {}", head.method, head.uri.path(), said.join(" "), body.escape_ascii());
    asked.lock().expect("lock").entry(id).or_default().push(line);
    let trailers = || {
        let pair = |n, v| (HeaderName::from_static(n), HeaderValue::from_static(v));
        HeaderMap::from_iter([pair("grpc-status", "5"), pair("grpc-message", "not%20there"), pair("x-t", "v")])
    };
    let start = |status: u16, kind: &str| Response::builder().status(status).header("content-type", kind).body(()).expect("a response");
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut ends = Some(trailers());
    let response = match &*plan {
        "late" => {
            sleep(Duration::from_secs(2)).await;
            start(200, "application/grpc")
        }
        "reset" => return respond.send_reset(h2::Reason::INTERNAL_ERROR),
        "trailers-only" => {
            let mut response = start(200, "application/grpc");
            response.headers_mut().extend(trailers());
            return drop(respond.send_response(response, true));
        }
        "404-empty" => return drop(respond.send_response(start(404, "text/plain"), true)),
        "grpc" => {
            pieces.push(message(b"world"));
            start(200, "application/grpc")
        }
        "messages" => {
            let all = [message(b"first"), message(b""), message(&[b'x'; 3000]), message(b"four")].concat();
            pieces.extend([all[..3].to_vec(), all[3..11].to_vec(), all[11..].to_vec()]);
            start(200, "application/grpc+proto")
        }
        other => {
            let (status, kind) = other.split_once(' ').expect("a status and a kind");
            pieces.push(b"it is 100% \xc3\xa9".to_vec());
            ends = None;
            start(status.parse().expect("a status"), kind)
        }
    };
    let Ok(mut send) = respond.send_response(response, false) else { return };
    let last = pieces.len().saturating_sub(1);
    for (i, piece) in pieces.into_iter().enumerate() {
        let _ = send.send_data(piece.into(), i == last && ends.is_none());
        sleep(Duration::from_millis(20)).await;
    }
    if let Some(trailers) = ends {
        let _ = send.send_trailers(trailers);
    }
}

async fn ask(mut stream: TcpStream, call: &Call, id: &str) -> String {
    let Call { headers, body, plan, .. } = call;
    let head = format!(
        "POST /p.S/m HTTP/1.1\r\nhost: a.example\r\nx-id: {id}\r\nx-plan: {plan}\r\n{headers}transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    );
    let mut sent = stream.write_all(head.as_bytes()).await;
    for piece in body.iter().map(Vec::as_slice).chain([&b""[..]]) {
        let chunk = [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
        if sent.is_ok() {
            sent = stream.write_all(&chunk).await;
        }
        sleep(Duration::from_millis(10)).await;
    }
    let mut read = Vec::new();
    let end = match timeout(Duration::from_secs(5), stream.read_to_end(&mut read)).await {
        // Envoy resets at once where it does not read the rest.
        Ok(Ok(_)) => "",
        Ok(Err(_)) if !read.is_empty() => "",
        Ok(Err(_)) => " then a reset",
        Err(_) => " then nothing",
    };
    let at = read.windows(4).position(|w| w == b"\r\n\r\n").map_or(read.len(), |at| at + 4);
    let (head, mut rest) = read.split_at(at);
    let head = String::from_utf8_lossy(head);
    let mut lines = head.lines().filter(|l| !l.is_empty());
    let status = lines.next().unwrap_or_default().to_owned();
    let varies = |l: &str| ["date:", "server:", "x-envoy-upstream-service-time:"].iter().any(|name| l.starts_with(name));
    let mut headers = lines.filter(|l| !varies(l)).map(str::to_owned).collect::<Vec<_>>();
    headers.sort();
    let mut body = Vec::new();
    if head.contains("transfer-encoding: chunked") {
        while let Some(at) = rest.windows(2).position(|w| w == b"\r\n") {
            let length =
                std::str::from_utf8(&rest[..at]).ok().and_then(|l| usize::from_str_radix(l, 16).ok()).expect("the length of a chunk");
            if length == 0 {
                // And trailers.
                body.extend_from_slice(&rest[at..]);
                break;
            }
            body.extend_from_slice(&rest[at + 2..at + 2 + length]);
            rest = &rest[at + 4 + length..];
        }
    } else {
        body.extend_from_slice(rest);
    }
    format!("{status} {} body {}{end}", headers.join("; "), body.escape_ascii())
}

/// Every call through both proxies.
pub async fn compared(only: Option<&str>) -> Vec<Compared> {
    let asked = Asked::default();
    let upstream = server(asked.clone()).await;
    let mut format = format();
    format["id"] = json!("%REQ(X-ID)%");
    // Envoy's filter takes the trailers off before they are told of, and refuses text that is cut off when all of it has come.
    ["grpc", "snake", "number", "came"].iter().for_each(|told| drop(format.as_object_mut().expect("an object").remove(*told)));
    let filter = json!({"name": "envoy.filters.http.grpc_web",
        "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"}});
    let listener = Listener { http2: true, filters: vec![filter], ..Listener::to("web".to_owned(), upstream) };
    let envoy = Envoy::start(&[listener], &format).await.expect("Envoy");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("access.log");
    let mut documents = logging(&path, &format);
    documents.extend(service("web", "10.97.0.3", "grpc-web", &[upstream]));
    let engine = Engine::start(&documents).await.expect("engine");
    let vip = "10.97.0.3:80".parse().expect("an address");
    let mut all = Vec::new();
    for call in calls() {
        let name = format!("web-{}", call.name);
        if only.is_some_and(|o| !name.contains(o)) {
            continue;
        }
        let (a, b) = (format!("e-{name}"), format!("m-{name}"));
        let (of_envoy, of_mesh) =
            tokio::join!(async { ask(TcpStream::connect(envoy.address("web")).await.expect("connected"), &call, &a).await }, async {
                ask(engine.connect(vip).await.expect("connected"), &call, &b).await
            });
        let reached = |id: &str| asked.lock().expect("lock").get(id).cloned().unwrap_or_default();
        let outcome = |client, id: &str| Outcome { client, upstream: reached(id), log: Vec::new() };
        all.push((a.clone(), b.clone(), Compared { envoy: outcome(of_envoy, &a), mesh: outcome(of_mesh, &b), name }));
    }
    sleep(Duration::from_secs(1)).await;
    let (of_envoy, of_mesh) = (envoy.logged(), lines_of(&path));
    for (a, b, compared) in &mut all {
        (compared.envoy.log, compared.mesh.log) = (http2::by_id(&of_envoy, a), http2::by_id(&of_mesh, b));
    }
    all.into_iter().map(|(_, _, compared)| compared).collect()
}
