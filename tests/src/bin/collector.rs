//! A collector of spans: `collector FILE` takes OTLP over gRPC on port 4317 and over HTTP/1.1 on 4318, and appends a line of JSON
//! to FILE for each span. Messages are read with the types OpenTelemetry publishes; nothing of mesh-node is in it.
//!
//! A file FILE.next says what the next request gets: `unavailable`, or `rejects N` of its spans. It is removed then.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{KeyValue, any_value::Value as Any},
};
use prost::Message;
use serde_json::{Value, json};

const MAX_BODY: usize = 16 * 1024 * 1024;

type Out = Arc<Mutex<Store>>;

/// Where spans go.
struct Store {
    file: File,
    /// What says how the next request is answered.
    next: PathBuf,
}

/// How a request is answered.
enum Answer {
    Taken(ExportTraceServiceResponse),
    Unavailable,
}

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: collector FILE")?;
    let (file, next) = (OpenOptions::new().create(true).append(true).open(&path)?, format!("{path}.next").into());
    let out: Out = Arc::new(Mutex::new(Store { file, next }));
    let http = listen(4318)?;
    let shared = out.clone();
    std::thread::spawn(move || {
        for stream in http.incoming().flatten() {
            let out = shared.clone();
            std::thread::spawn(move || serve_http(stream, &out).unwrap_or_else(|error| eprintln!("http: {error:#}")));
        }
    });
    let grpc = listen(4317)?;
    grpc.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        let grpc = tokio::net::TcpListener::from_std(grpc)?;
        loop {
            let (stream, _) = grpc.accept().await?;
            let out = out.clone();
            tokio::spawn(async move {
                if let Err(error) = serve_grpc(stream, out).await {
                    eprintln!("grpc: {error:#}");
                }
            });
        }
    })
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
}

fn serve_http(stream: TcpStream, out: &Out) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut headers = BTreeMap::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let length: usize = headers.get("content-length").context("no content-length")?.parse()?;
        ensure!(length <= MAX_BODY, "a body of {length} bytes");
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        ensure!(headers.get("content-type").is_some_and(|t| t == "application/x-protobuf"), "{headers:?}");
        let via = format!("http {} {}", line.split(' ').nth(1).unwrap_or_default(), headers.get("x-team").map_or("", |t| t));
        let answer = match take(&body, &via, out)? {
            Answer::Taken(response) => response.encode_to_vec(),
            Answer::Unavailable => {
                write!(writer, "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n")?;
                continue;
            }
        };
        write!(writer, "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: {}\r\n\r\n", answer.len())?;
        writer.write_all(&answer)?;
    }
}

async fn serve_grpc(stream: tokio::net::TcpStream, out: Out) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        let out = out.clone();
        tokio::spawn(async move {
            let answered: Result<()> = async {
                let team = request.headers().get("x-team").and_then(|v| v.to_str().ok()).unwrap_or_default();
                let via = format!("grpc {} {team}", request.uri().path());
                let mut body = request.into_body();
                let mut data = Vec::new();
                while let Some(chunk) = body.data().await {
                    let chunk = chunk?;
                    body.flow_control().release_capacity(chunk.len())?;
                    data.extend_from_slice(&chunk);
                }
                ensure!(data.len() >= 5 && data[0] == 0 && data.len() <= MAX_BODY, "no message");
                let answer = take(&data[5..], &via, &out)?;
                let response = http::Response::builder().header("content-type", "application/grpc").body(())?;
                let mut send = respond.send_response(response, false)?;
                let status = if let Answer::Taken(response) = answer {
                    let mut message = vec![0];
                    message.extend_from_slice(&u32::try_from(response.encoded_len())?.to_be_bytes());
                    response.encode(&mut message)?;
                    send.send_data(Bytes::from(message), false)?;
                    "0"
                } else {
                    "14"
                };
                send.send_trailers(http::HeaderMap::from_iter([("grpc-status".parse()?, status.parse()?)]))?;
                Ok(())
            }
            .await;
            if let Err(error) = answered {
                eprintln!("grpc: {error:#}");
            }
        });
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

fn texts(attributes: &[KeyValue]) -> Value {
    let value = |kv: &KeyValue| match kv.value.as_ref().and_then(|v| v.value.as_ref()) {
        Some(Any::StringValue(text)) => json!(text),
        other => json!(format!("{other:?}")),
    };
    attributes.iter().map(|kv| (kv.key.clone(), value(kv))).collect::<serde_json::Map<_, _>>().into()
}

fn take(message: &[u8], via: &str, out: &Out) -> Result<Answer> {
    let request = ExportTraceServiceRequest::decode(message)?;
    let mut lines = String::new();
    for group in &request.resource_spans {
        let resource = texts(group.resource.as_ref().map(|r| &*r.attributes).unwrap_or_default());
        for scope in &group.scope_spans {
            for span in &scope.spans {
                let line = json!({
                    "via": via, "resource": resource, "scope": scope.scope.as_ref().map(|s| &s.name),
                    "trace": hex(&span.trace_id), "span": hex(&span.span_id), "parent": hex(&span.parent_span_id), "state": span.trace_state,
                    "name": span.name, "kind": span.kind, "start": span.start_time_unix_nano, "end": span.end_time_unix_nano,
                    "status": span.status.as_ref().map(|s| s.code), "attributes": texts(&span.attributes),
                });
                let _ = writeln!(lines, "{line}");
            }
        }
    }
    let mut store = out.lock().map_err(|_| anyhow::anyhow!("a writer panicked"))?;
    let next = std::fs::read_to_string(&store.next).unwrap_or_default();
    let mut response = ExportTraceServiceResponse::default();
    if !next.is_empty() {
        std::fs::remove_file(&store.next)?;
        let Some(rejected) = next.trim().strip_prefix("rejects ") else { return Ok(Answer::Unavailable) };
        let partial = ExportTracePartialSuccess { rejected_spans: rejected.parse()?, error_message: "no room".to_owned() };
        response.partial_success = Some(partial);
    }
    store.file.write_all(lines.as_bytes())?;
    Ok(Answer::Taken(response))
}
