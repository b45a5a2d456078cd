//! HTTP as applications speak it: a server that does what the path says, and clients that report in JSON. Plain sockets and
//! the h2 library; it knows nothing of a mesh.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use socket2::SockRef;

#[derive(Parser)]
#[command(about = "An HTTP server and clients for tests")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve HTTP/1.1 on a port, with `x-version` in every answer, and gRPC (HTTP/2) on the next.
    Serve {
        port: u16,
        version: String,
        /// Every answer is this status, until `/heal` is asked for.
        #[arg(long)]
        fail: Option<u16>,
    },
    /// Requests over keep-alive connections; counts statuses and versions.
    Get {
        /// `host:port/path`.
        url: String,
        count: u32,
        #[arg(default_value_t = 1)]
        threads: u32,
        #[arg(long = "header")]
        headers: Vec<String>,
        /// Go on for this many seconds instead of a count.
        #[arg(long)]
        seconds: Option<u64>,
        /// Between requests of one connection.
        #[arg(long, default_value_t = 0)]
        pause_millis: u64,
    },
    /// Send a body of this many bytes; prints what the server counted.
    Upload { url: String, bytes: u64 },
    /// Read a body of this many bytes; prints how many came.
    Download { url: String, bytes: u64 },
    /// Begin requests with bodies, and reset them in the middle.
    Abort { url: String, count: u32 },
    /// Switch to another protocol, and have an echo.
    Upgrade { url: String },
    /// Unary and streaming gRPC calls with trailers.
    Grpc { to: String },
}

fn main() -> Result<()> {
    let report = match Arguments::parse().command {
        Command::Serve { port, version, fail } => return serve(port, version, fail),
        Command::Get { url, count, threads, headers, seconds, pause_millis } => {
            get(&url, count, threads, &headers, seconds, Duration::from_millis(pause_millis))
        }
        Command::Upload { url, bytes } => upload(&url, bytes),
        Command::Download { url, bytes } => download(&url, bytes),
        Command::Abort { url, count } => abort(&url, count),
        Command::Upgrade { url } => upgrade(&url),
        Command::Grpc { to } => runtime()?.block_on(grpc::call(&to)),
    };
    println!("{}", report.unwrap_or_else(|error| json!({"error": format!("{error:#}")})));
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

struct Server {
    version: String,
    fail: Mutex<Option<u16>>,
    served: AtomicU64,
}

fn serve(port: u16, version: String, fail: Option<u16>) -> Result<()> {
    let server = Arc::new(Server { version, fail: Mutex::new(fail), served: AtomicU64::new(0) });
    let runtime = runtime()?;
    thread::spawn(move || runtime.block_on(grpc::serve(port + 1)));
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    for stream in listener.incoming().flatten() {
        let server = server.clone();
        let _ = thread::Builder::new().stack_size(256 * 1024).spawn(move || while let Ok(true) = server.one(&stream) {});
    }
    Ok(())
}

impl Server {
    fn one(&self, stream: &TcpStream) -> io::Result<bool> {
        let mut reader = BufReader::new(stream);
        let Some((line, headers)) = read_head(&mut reader)? else { return Ok(false) };
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut words = path.trim_start_matches('/').splitn(2, '/');
        let (what, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let number = rest.parse::<u64>().unwrap_or(0);
        let length = headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
        let body = io::copy(&mut (&mut reader).take(length), &mut io::sink())?;
        if body < length {
            return Ok(false);
        }
        self.served.fetch_add(1, Ordering::Relaxed);
        if what == "heal" {
            *self.fail.lock().expect("lock") = None;
        }
        let failing = *self.fail.lock().expect("lock");
        let (status, text) = match (failing, what) {
            (Some(status), _) => (status, String::new()),
            (None, "status") => (u16::try_from(number).unwrap_or(500), String::new()),
            (None, "sleep") => {
                thread::sleep(Duration::from_millis(number));
                (200, String::new())
            }
            (None, "client") => (200, stream.peer_addr()?.ip().to_canonical().to_string()),
            (None, "served") => (200, self.served.load(Ordering::Relaxed).to_string()),
            (None, "bytes") => return self.bytes(stream, number).map(|()| true),
            (None, "upgrade") => return Self::upgrade(stream, &mut reader).map(|()| false),
            (None, "headers") => (200, json!(headers).to_string()),
            (None, _) => (200, format!("{body}")),
        };
        let mut writer = stream;
        writer.write_all(
            format!("HTTP/1.1 {status} Status\r\nx-version: {}\r\ncontent-length: {}\r\n\r\n{text}", self.version, text.len()).as_bytes(),
        )?;
        Ok(true)
    }

    fn bytes(&self, mut stream: &TcpStream, n: u64) -> io::Result<()> {
        stream.write_all(format!("HTTP/1.1 200 OK\r\nx-version: {}\r\ncontent-length: {n}\r\n\r\n", self.version).as_bytes())?;
        io::copy(&mut io::repeat(b'x').take(n), &mut stream)?;
        Ok(())
    }

    fn upgrade(mut stream: &TcpStream, reader: &mut impl BufRead) -> io::Result<()> {
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")?;
        loop {
            let n = {
                let data = reader.fill_buf()?;
                stream.write_all(data)?;
                data.len()
            };
            if n == 0 {
                return Ok(());
            }
            reader.consume(n);
        }
    }
}

type Headers = BTreeMap<String, String>;

fn read_head(reader: &mut impl BufRead) -> io::Result<Option<(String, Headers)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut headers = Headers::new();
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some((name, value)) = header.trim_end().split_once(':') else { return Ok(Some((line.trim_end().to_owned(), headers))) };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
}

fn split(url: &str) -> (&str, String) {
    let (to, path) = url.split_once('/').unwrap_or((url, ""));
    (to, format!("/{path}"))
}

fn connect(to: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What requests came to.
#[derive(Default)]
struct Tally {
    statuses: BTreeMap<String, u64>,
    versions: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    last: String,
    slowest: Duration,
}

fn get(url: &str, count: u32, threads: u32, headers: &[String], seconds: Option<u64>, pause: Duration) -> Result<Value> {
    let tally = Arc::new(Mutex::new(Tally::default()));
    let deadline = seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let workers = (0..threads).map(|_| {
        let (url, headers, tally) = (url.to_owned(), headers.to_vec(), tally.clone());
        thread::spawn(move || {
            let mut stream = None;
            let mut left = count / threads;
            while deadline.map_or(left > 0, |d| Instant::now() < d) {
                left = left.saturating_sub(1);
                let started = Instant::now();
                let answer = ask(&url, &headers, &mut stream);
                let mut tally = tally.lock().expect("lock");
                tally.slowest = tally.slowest.max(started.elapsed());
                match answer {
                    Ok((status, version, body)) => {
                        *tally.statuses.entry(status).or_default() += 1;
                        *tally.versions.entry(version).or_default() += 1;
                        tally.last = body;
                    }
                    Err(error) => {
                        stream = None;
                        *tally.errors.entry(format!("{error:#}")).or_default() += 1;
                    }
                }
                drop(tally);
                thread::sleep(pause);
            }
        })
    });
    let workers = workers.collect::<Vec<_>>();
    workers.into_iter().for_each(|w| drop(w.join()));
    let tally = tally.lock().expect("lock");
    Ok(json!({"statuses": tally.statuses, "versions": tally.versions, "errors": tally.errors, "body": tally.last,
        "slowestMilliseconds": tally.slowest.as_millis()}))
}

fn ask(url: &str, headers: &[String], kept: &mut Option<TcpStream>) -> Result<(String, String, String)> {
    let (to, path) = split(url);
    let stream = match kept.take() {
        Some(stream) => stream,
        None => connect(to)?,
    };
    let more = headers.iter().map(|h| format!("{h}\r\n")).collect::<String>();
    (&stream).write_all(format!("GET {path} HTTP/1.1\r\nhost: {to}\r\n{more}\r\n").as_bytes())?;
    let mut reader = BufReader::new(&stream);
    let (line, answer) = read_head(&mut reader)?.context("closed without an answer")?;
    let length: u64 = answer.get("content-length").and_then(|l| l.parse().ok()).context("no content-length")?;
    let mut body = String::new();
    reader.take(length).read_to_string(&mut body)?;
    ensure!(body.len() as u64 == length, "a truncated body");
    if answer.get("connection").is_none_or(|c| c != "close") {
        *kept = Some(stream);
    }
    let status = line.split(' ').nth(1).unwrap_or_default().to_owned();
    Ok((status, answer.get("x-version").cloned().unwrap_or_else(|| "none".into()), body))
}

fn upload(url: &str, bytes: u64) -> Result<Value> {
    let (to, path) = split(url);
    let mut stream = connect(to)?;
    stream.write_all(format!("POST {path} HTTP/1.1\r\nhost: {to}\r\ncontent-length: {bytes}\r\n\r\n").as_bytes())?;
    io::copy(&mut io::repeat(b'x').take(bytes), &mut stream)?;
    let mut reader = BufReader::new(&stream);
    let (line, answer) = read_head(&mut reader)?.context("closed without an answer")?;
    let length: u64 = answer.get("content-length").and_then(|l| l.parse().ok()).context("no content-length")?;
    let mut body = String::new();
    reader.take(length).read_to_string(&mut body)?;
    Ok(json!({"line": line, "counted": body}))
}

fn download(url: &str, bytes: u64) -> Result<Value> {
    let (to, path) = split(url);
    let mut stream = connect(to)?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {to}\r\n\r\n").as_bytes())?;
    let mut reader = BufReader::with_capacity(256 * 1024, &stream);
    read_head(&mut reader)?.context("closed without an answer")?;
    let came = io::copy(&mut reader.take(bytes), &mut io::sink())?;
    Ok(json!({"came": came}))
}

fn abort(url: &str, count: u32) -> Result<Value> {
    let (to, path) = split(url);
    for i in 0..count {
        let mut stream = connect(to)?;
        if i % 2 == 0 {
            stream.write_all(format!("POST {path} HTTP/1.1\r\nhost: {to}\r\ncontent-length: 1000000\r\n\r\nhalf of it").as_bytes())?;
        } else {
            stream.write_all(format!("GET /bytes/10000000 HTTP/1.1\r\nhost: {to}\r\n\r\n").as_bytes())?;
            let mut some = [0; 1000];
            stream.read_exact(&mut some)?;
        }
        if i % 3 == 0 {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
    }
    Ok(json!({"aborted": count}))
}

fn upgrade(url: &str) -> Result<Value> {
    let (to, path) = split(url);
    let mut stream = connect(to)?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {to}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n").as_bytes())?;
    let mut reader = BufReader::new(&stream);
    let (line, answer) = read_head(&mut reader)?.context("closed without an answer")?;
    let mut said = Vec::new();
    for word in ["first", "second", "third"] {
        (&stream).write_all(format!("{word}\n").as_bytes())?;
        let mut back = String::new();
        reader.read_line(&mut back)?;
        said.push(back.trim_end().to_owned());
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let rest = reader.read_to_end(&mut Vec::new())?;
    Ok(json!({"line": line, "upgrade": answer.get("upgrade"), "said": said, "rest": rest}))
}

/// gRPC without a code generator: length-prefixed messages over HTTP/2, status in trailers.
mod grpc {
    use super::*;

    pub async fn serve(port: u16) {
        let Ok(listener) = tokio::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await else { return };
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(answer(request, respond));
                }
            });
        }
    }

    /// Echoes every message; `Fail` answers with a status and nothing else.
    async fn answer(request: http::Request<h2::RecvStream>, mut respond: h2::server::SendResponse<Bytes>) {
        let kind = |b: http::response::Builder| b.header("content-type", "application/grpc");
        if request.uri().path().ends_with("/Fail") {
            let response = kind(http::Response::builder()).header("grpc-status", "9").header("grpc-message", "no").body(()).expect("valid");
            drop(respond.send_response(response, true));
            return;
        }
        let Ok(mut send) = respond.send_response(kind(http::Response::builder()).body(()).expect("valid"), false) else { return };
        let mut body = request.into_body();
        while let Some(Ok(data)) = body.data().await {
            let _ = body.flow_control().release_capacity(data.len());
            if send.send_data(data, false).is_err() {
                return;
            }
        }
        let trailers = body.trailers().await.ok().flatten();
        let mut out = http::HeaderMap::new();
        out.insert("grpc-status", http::HeaderValue::from_static("0"));
        if let Some(value) = trailers.and_then(|t| t.get("x-sum").cloned()) {
            out.insert("x-sum", value);
        }
        drop(send.send_trailers(out));
    }

    pub async fn call(to: &str) -> Result<Value> {
        let stream = tokio::net::TcpStream::connect(to).await?;
        let (send, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        let mut send = send.ready().await?;
        let mut report = serde_json::Map::new();
        for (method, messages) in [("Unary", 1_u32), ("Stream", 100), ("Fail", 1)] {
            let request = http::Request::post(format!("http://{to}/test.Echo/{method}"))
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(())?;
            let (response, mut out) = send.send_request(request, false)?;
            let mut incoming: Option<h2::RecvStream> = None;
            let mut response = Some(response);
            let (mut echoed, mut head) = (0_usize, http::HeaderMap::new());
            // One message at a time, each answered before the next: both directions are open all along.
            for i in 0..messages {
                let message = format!("message {i}");
                let mut frame = vec![0];
                frame.extend(u32::try_from(message.len())?.to_be_bytes());
                frame.extend(message.as_bytes());
                let wanted = frame.len();
                // A unary call ends with its message.
                out.send_data(frame.into(), messages == 1)?;
                if let Some(response) = response.take() {
                    let (parts, body) = response.await?.into_parts();
                    head = parts.headers;
                    incoming = Some(body);
                }
                let Some(body) = incoming.as_mut().filter(|b| !b.is_end_stream()) else { break };
                let mut came = 0;
                while came < wanted {
                    let data = body.data().await.context("the stream ended")??;
                    body.flow_control().release_capacity(data.len())?;
                    came += data.len();
                }
                echoed += 1;
            }
            if messages > 1 {
                let mut trailers = http::HeaderMap::new();
                trailers.insert("x-sum", http::HeaderValue::from(messages));
                out.send_trailers(trailers)?;
            }
            let last = match incoming.as_mut().filter(|b| !b.is_end_stream()) {
                Some(body) => {
                    while let Some(data) = body.data().await {
                        data?;
                    }
                    body.trailers().await?.unwrap_or_default()
                }
                None => head,
            };
            let text = |name: &str| last.get(name).and_then(|v| v.to_str().ok()).unwrap_or("none").to_owned();
            report.insert(method.to_owned(), json!({"echoed": echoed, "status": text("grpc-status"), "sum": text("x-sum")}));
        }
        Ok(report.into())
    }
}
