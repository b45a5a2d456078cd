//! A small Bookinfo: `bookinfo SERVICE VERSION`, one of productpage, details, reviews (v1, v2, v3) and ratings.
//!
//! Plain HTTP/1.1 on port 9080 (or `PORT`), keep-alive, one thread per connection. Trace headers of a request are sent on
//! with the requests it causes, and every answer says which service, version and host gave it. It knows nothing of a
//! mesh: it dials `http://reviews:9080` like the original.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_HEADERS: usize = 100;
const MAX_BODY: u64 = 1024 * 1024;

/// Headers handed on from a request to those it causes, as the original does.
const TRACE_HEADERS: [&str; 13] = [
    "x-request-id",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "x-ot-span-context",
    "x-datadog-trace-id",
    "traceparent",
    "tracestate",
    "baggage",
    "user",
    "x-region",
];

type Headers = BTreeMap<String, String>;

struct Bookinfo {
    service: String,
    version: String,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(service), Some(version)) = (arguments.next(), arguments.next()) else { bail!("usage: bookinfo SERVICE VERSION") };
    ensure!(["productpage", "details", "reviews", "ratings"].contains(&service.as_str()), "there is no service {service}");
    let port = std::env::var("PORT").ok().map_or(Ok(9080), |p| p.parse::<u16>())?;
    let app: &'static Bookinfo = Box::leak(Box::new(Bookinfo { service, version }));
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))?;
    for stream in listener.incoming().flatten() {
        thread::spawn(move || {
            if let Err(error) = app.serve(stream) {
                eprintln!("connection: {error:#}");
            }
        });
    }
    Ok(())
}

impl Bookinfo {
    fn serve(&self, stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let peer = stream.peer_addr()?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut writer = stream;
        while let Some((line, headers)) = read_head(&mut reader)? {
            let length = headers.get("content-length").map_or(Ok(0), |l| l.parse::<u64>())?;
            ensure!(length <= MAX_BODY, "a body of {length} bytes");
            std::io::copy(&mut (&mut reader).take(length), &mut std::io::sink())?;
            let path = line.split(' ').nth(1).unwrap_or_default();
            let (status, body) = self.answer(path, &headers, peer);
            let text = body.to_string();
            let close = headers.get("connection").is_some_and(|c| c.eq_ignore_ascii_case("close"));
            let connection = if close { "close" } else { "keep-alive" };
            write!(
                writer,
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nx-version: {}\r\nconnection: {connection}\r\ncontent-length: {}\r\n\r\n{text}",
                self.version,
                text.len()
            )?;
            if close {
                break;
            }
        }
        Ok(())
    }

    fn answer(&self, path: &str, headers: &Headers, peer: SocketAddr) -> (&'static str, Value) {
        let me = json!({"service": self.service, "version": self.version, "client": peer.ip().to_canonical()});
        let id = path.rsplit('/').next().and_then(|id| id.parse::<u32>().ok()).unwrap_or(0);
        let body = match (self.service.as_str(), path) {
            (_, "/health") => json!({"status": "healthy"}),
            ("productpage", p) if p == "/" || p.starts_with("/productpage") || p.starts_with("/api/") => {
                json!({"details": fetch("details", "/details/0", headers), "reviews": fetch("reviews", "/reviews/0", headers)})
            }
            ("details", p) if p.starts_with("/details/") => {
                json!({"id": id, "author": "William Shakespeare", "year": 1595, "type": "paperback", "pages": 200, "language": "English"})
            }
            ("reviews", p) if p.starts_with("/reviews/") => json!({"id": id, "reviews": self.reviews(headers)}),
            ("ratings", p) if p.starts_with("/ratings/") => json!({"id": id, "ratings": {"Reviewer1": 5, "Reviewer2": 4}}),
            _ => return ("404 Not Found", json!({"from": me, "error": format!("no {path} here")})),
        };
        ("200 OK", json!({"from": me, "body": body}))
    }

    /// v1 shows no stars, v2 black ones, v3 red ones.
    fn reviews(&self, headers: &Headers) -> Value {
        let texts = [("Reviewer1", "An extremely entertaining play by Shakespeare."), ("Reviewer2", "Absolutely fun and entertaining.")];
        let colour = match self.version.as_str() {
            "v1" => None,
            "v2" => Some("black"),
            _ => Some("red"),
        };
        let ratings = colour.map(|_| fetch("ratings", "/ratings/0", headers));
        let review = |(who, text): (&str, &str)| {
            let stars = ratings.as_ref().map_or(Value::Null, |r| r["body"]["ratings"][who].clone());
            json!({"reviewer": who, "text": text, "stars": stars, "color": colour})
        };
        texts.map(review).to_vec().into()
    }
}

fn read_head(reader: &mut impl BufRead) -> Result<Option<(String, Headers)>> {
    let mut line = String::new();
    if reader.take(8192).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut headers = Headers::new();
    loop {
        let mut header = String::new();
        reader.take(8192).read_line(&mut header)?;
        let header = header.trim_end();
        if header.is_empty() {
            return Ok(Some((line.trim_end().to_owned(), headers)));
        }
        let (name, value) = header.split_once(':').context("a header without colon")?;
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        ensure!(headers.len() <= MAX_HEADERS, "too many headers");
    }
}

/// Asks another service, or says why that did not work.
fn fetch(service: &str, path: &str, headers: &Headers) -> Value {
    get(service, path, headers).unwrap_or_else(|error| json!({"error": format!("{service} is unavailable: {error:#}")}))
}

fn get(service: &str, path: &str, headers: &Headers) -> Result<Value> {
    let address = (service, 9080).to_socket_addrs()?.next().context("no address")?;
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let traced = headers.iter().filter(|(name, _)| TRACE_HEADERS.contains(&name.as_str()));
    let traced = traced.map(|(name, value)| format!("{name}: {value}\r\n")).collect::<String>();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {service}:9080\r\n{traced}connection: close\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let (line, answer) = read_head(&mut reader)?.context("no answer")?;
    ensure!(line.contains(" 200 "), "it answered {line:?}");
    let length: u64 = answer.get("content-length").context("no content-length")?.parse()?;
    let mut body = String::new();
    reader.take(length.min(MAX_BODY)).read_to_string(&mut body)?;
    Ok(serde_json::from_str(&body)?)
}
