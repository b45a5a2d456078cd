//! Requests over HTTP/2, to upstreams of both versions.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::Request;
use mesh_tests::scripted::{self, Seen};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};

use super::*;

struct Exchange {
    name: &'static str,
    method: &'static str,
    target: &'static str,
    headers: &'static [(&'static str, &'static str)],
    body: Option<&'static str>,
    trailers: bool,
    plan: &'static str,
}

const fn get(name: &'static str, target: &'static str, headers: &'static [(&'static str, &'static str)], plan: &'static str) -> Exchange {
    Exchange { name, method: "GET", target, headers, body: None, trailers: false, plan }
}

const fn with(name: &'static str, method: &'static str, body: Option<&'static str>, trailers: bool) -> Exchange {
    Exchange { name, method, target: "/x", headers: &[], body, trailers, plan: "200" }
}

const GRPC: &[(&str, &str)] = &[("content-type", "application/grpc"), ("te", "trailers")];

const EXCHANGES: &[Exchange] = &[
    get("plain", "/x", &[], "200"),
    get("dots", "/a/../b?c=/../d", &[], "200"),
    get("dots-beyond", "/../../b", &[], "200"),
    get("escapes", "/%41%2f%00", &[], "200"),
    get("braces", "/%7Bx%7D", &[], "200"),
    get("cookies", "/x", &[("cookie", "a=b"), ("cookie", "c=d")], "200"),
    get("te", "/x", &[("te", "trailers")], "200"),
    get("repeated", "/x", &[("x-a", "1"), ("x-b", "2"), ("x-a", "3")], "200"),
    get("forwarded-proto", "/x", &[("x-forwarded-proto", "https")], "200"),
    get("request-id", "/x", &[("x-request-id", "mine")], "200"),
    get("attempts", "/x", &[("x-envoy-attempt-count", "7")], "200"),
    get("expect", "/x", &[("expect", "foo")], "200"),
    get("underscore", "/x", &[("x_a", "1")], "200"),
    get("latin-1", "/x", &[("x-a", "\u{e9}")], "200"),
    get("empty-value", "/x", &[("x-a", "")], "200"),
    get("status-404", "/x", &[], "404"),
    get("status-500", "/x", &[], "500"),
    get("status-503", "/x", &[], "503,200"),
    get("status-503-always", "/x", &[], "503"),
    get("status-204", "/x", &[], "204"),
    get("slow", "/x", &[], "200/100"),
    get("reset", "/x", &[], "rst"),
    get("reset-then-good", "/x", &[], "rst,200"),
    get("end", "/x", &[], "fin"),
    get("garbage", "/x", &[], "garbage"),
    get("cut-reset", "/x", &[], "hdrrst"),
    get("cut-end", "/x", &[], "hdrfin"),
    get("refused", "/x", &[], "refused"),
    get("refused-then-good", "/x", &[], "refused,200"),
    get("internal", "/x", &[], "rsti"),
    get("grpc", "/p.S/m", GRPC, "200"),
    get("grpc-503", "/p.S/m", GRPC, "503"),
    get("grpc-404", "/p.S/m", GRPC, "404"),
    get("grpc-reset", "/p.S/m", GRPC, "rst"),
    get("grpc-refused", "/p.S/m", GRPC, "refused"),
    get("grpc-unavailable", "/p.S/m", GRPC, "200+grpc-status=14,200+grpc-status=0"),
    get("grpc-status", "/p.S/m", GRPC, "200+grpc-status=5"),
    get("grpc-path", "/p.S/%00", GRPC, "200"),
    with("head", "HEAD", None, false),
    with("options", "OPTIONS", None, false),
    with("delete", "DELETE", None, false),
    with("trace", "TRACE", None, false),
    with("post-bodiless", "POST", None, false),
    with("post-empty", "POST", Some(""), false),
    with("post", "POST", Some("hello"), false),
    with("post-trailers", "POST", Some("hello"), true),
    with("patch", "PATCH", Some("hello"), false),
    with("own", "FOO", None, false),
];

/// What came back, and the id it was asked with.
async fn ask(address: Option<SocketAddr>, engine: Option<(&Engine, SocketAddr)>, exchange: &Exchange, id: &str) -> String {
    let stream = match (address, engine) {
        (Some(address), _) => TcpStream::connect(address).await.expect("connected"),
        (None, Some((engine, vip))) => engine.connect(vip).await.expect("connected"),
        (None, None) => unreachable!("one of them"),
    };
    let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    let driving = tokio::spawn(async move { drop(connection.await) });
    let answered = timeout(Duration::from_secs(3), answer(send, exchange, id)).await;
    driving.abort();
    match answered {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => error.reason().map_or_else(|| "connection ended".to_owned(), |reason| format!("RST_STREAM {reason:?}")),
        Err(_) => "nothing".to_owned(),
    }
}

async fn answer(send: h2::client::SendRequest<Bytes>, exchange: &Exchange, id: &str) -> Result<String, h2::Error> {
    let mut request = Request::builder().method(exchange.method).uri(format!("http://a.example{}", exchange.target));
    for (name, value) in exchange.headers {
        let bytes = value.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect::<Vec<_>>();
        request = request.header(*name, bytes);
    }
    let request = request.header("x-id", id).header("x-plan", exchange.plan).body(()).expect("a request");
    let (response, mut body) = send.ready().await?.send_request(request, exchange.body.is_none())?;
    if let Some(text) = exchange.body {
        body.send_data(Bytes::from_static(text.as_bytes()), !exchange.trailers)?;
        if exchange.trailers {
            body.send_trailers(http::HeaderMap::from_iter([(http::HeaderName::from_static("x-t"), http::HeaderValue::from_static("v"))]))?;
        }
    }
    let (parts, mut stream) = response.await?.into_parts();
    let mut text = format!("[{}] {}", parts.status.as_u16(), told(parts.headers.iter().map(|(n, v)| (n.as_str(), v.as_bytes()))));
    loop {
        match stream.data().await {
            None => break,
            Some(Ok(data)) => {
                let _ = stream.flow_control().release_capacity(data.len());
                text += &data.escape_ascii().to_string();
            }
            Some(Err(error)) => return Ok(format!("{text} then {:?}", error.reason())),
        }
    }
    if let Some(trailers) = stream.trailers().await? {
        text += &format!(" trailers {}", told(trailers.iter().map(|(n, v)| (n.as_str(), v.as_bytes()))));
    }
    Ok(text)
}

/// Headers, sorted, without what differs from run to run.
fn told<'a>(headers: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    const VARYING: [&str; 4] = ["date", "x-envoy-upstream-service-time", "x-request-id", "x-id"];
    let mut all = Vec::new();
    for (name, value) in headers.filter(|(n, _)| *n != "server") {
        let value = if VARYING.contains(&name) { "*".to_owned() } else { value.escape_ascii().to_string() };
        all.push(format!("{}={value};", name.to_lowercase()));
    }
    all.sort();
    all.join(" ")
}

fn reached(seen: &Seen, id: &str) -> Vec<String> {
    let attempts = seen.of(id);
    attempts
        .iter()
        .map(|a| format!("[{}] {} body {}", a.line, told(a.headers.iter().map(|(n, v)| (n.as_str(), v.as_bytes()))), a.body))
        .collect()
}

pub fn by_id(lines: &[Value], id: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in lines.iter().filter(|l| l["id"] == id) {
        let mut line = line.clone();
        with_times_told(&mut line);
        let fields = line.as_object_mut().expect("an object");
        fields.retain(|name, _| !["at", "id", "sent"].contains(&name.as_str()));
        found.push(line.to_string());
    }
    found
}

/// Every exchange with both kinds of upstreams, through both proxies.
pub async fn compared(only: Option<&str>) -> Vec<Compared> {
    let seen = Seen::default();
    let h1 = scripted::http1("up", &seen).expect("an upstream");
    let h2 = scripted::http2("up", &seen).await.expect("an upstream");
    let mut format = format();
    format["id"] = json!("%REQ(X-ID)%");
    let listener = |name: &str, upstream, http2| Listener { http2, ..Listener::to(name.to_owned(), upstream) };
    let envoy = Envoy::start(&[listener("http1", h1, false), listener("http2", h2, true)], &format).await.expect("Envoy");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("access.log");
    let mut documents = logging(&path, &format);
    documents.extend(service("http1", "10.97.0.1", "http", &[h1]));
    documents.extend(service("http2", "10.97.0.2", "http2", &[h2]));
    let engine = Engine::start(&documents).await.expect("engine");
    let mut all = Vec::new();
    for (kind, vip) in [("http1", "10.97.0.1:80"), ("http2", "10.97.0.2:80")] {
        let vip = vip.parse().expect("an address");
        for exchange in EXCHANGES {
            let name = format!("{kind}-{}", exchange.name);
            let of_the_other = if kind == "http1" {
                &["refused", "refused,200", "rsti"][..]
            } else {
                &["rst", "rst,200", "fin", "garbage", "hdrrst", "hdrfin"]
            };
            if of_the_other.contains(&exchange.plan) || only.is_some_and(|o| !name.contains(o)) {
                continue;
            }
            let (a, b) = (format!("e-{name}"), format!("m-{name}"));
            let (of_envoy, of_mesh) =
                tokio::join!(ask(Some(envoy.address(kind)), None, exchange, &a), ask(None, Some((&engine, vip)), exchange, &b));
            let outcome = |client, id: &str| Outcome { client, upstream: reached(&seen, id), log: Vec::new() };
            all.push((a.clone(), b.clone(), Compared { envoy: outcome(of_envoy, &a), mesh: outcome(of_mesh, &b), name }));
        }
    }
    sleep(Duration::from_secs(1)).await;
    let (of_envoy, of_mesh) = (envoy.logged(), lines_of(&path));
    for (a, b, compared) in &mut all {
        (compared.envoy.log, compared.mesh.log) = (by_id(&of_envoy, a), by_id(&of_mesh, b));
    }
    all.into_iter().map(|(_, _, compared)| compared).collect()
}
