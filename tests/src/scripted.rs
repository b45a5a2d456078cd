//! An upstream that does what a plan says, attempt by attempt, and remembers what reached it.
//!
//! The plan is a request's `x-plan` header, one entry for each attempt (the last repeats): `200`, `503/400` (after 400 ms),
//! `200+name=value` (with a header), `rst`, `fin`, `garbage`, `hdrrst`, `hdrfin`, `hdrstall` (a head and 10 of 100 bytes,
//! then that), `early:503` (before the body is read), `upgrade`, `switch` (101 to whoever asks for nothing), `parting` (200, and the connection is
//! closed without a word of it); over HTTP/2 also `refused`, `rsti`, `goaway` (the connection ends), `drain` (it takes no more). Attempts are
//! told apart by `x-id`. Made of sockets and the h2 library; nothing of mesh-node.

use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use socket2::SockRef;

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub line: String,
    /// Names in the case and order they came.
    pub headers: Vec<(String, String)>,
    pub body: usize,
    pub connection: u32,
    /// Which upstream.
    pub port: u16,
}

/// What reached upstreams, by `x-id`.
#[derive(Debug, Clone, Default)]
pub struct Seen(Arc<Mutex<HashMap<String, Vec<Attempt>>>>);

impl Seen {
    pub fn of(&self, id: &str) -> Vec<Attempt> {
        self.0.lock().expect("lock").get(id).cloned().unwrap_or_default()
    }

    fn add(&self, id: &str, attempt: Attempt) -> usize {
        let mut all = self.0.lock().expect("lock");
        let list = all.entry(id.to_owned()).or_default();
        list.push(attempt);
        list.len()
    }

    fn set_body(&self, id: &str, number: usize, body: usize) {
        if let Some(attempt) = self.0.lock().expect("lock").get_mut(id).and_then(|l| l.get_mut(number - 1)) {
            attempt.body = body;
        }
    }
}

fn entry(plan: &str, number: usize) -> &str {
    let mut all = plan.split(',');
    let last = all.clone().next_back().unwrap_or("200");
    all.nth(number - 1).unwrap_or(last)
}

/// Starts an HTTP/1 upstream that calls itself by a name; its address.
pub fn http1(name: &'static str, seen: &Seen) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let seen = seen.clone();
    let connections = AtomicU32::new(0);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (seen, number) = (seen.clone(), connections.fetch_add(1, Ordering::Relaxed));
            thread::spawn(move || while let Ok(true) = serve(name, &stream, number, address.port(), &seen) {});
        }
    });
    Ok(address)
}

fn serve(name: &str, stream: &TcpStream, connection: u32, port: u16, seen: &Seen) -> io::Result<bool> {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    let Some((line, headers)) = read_head(&mut reader)? else { return Ok(false) };
    let header = |name: &str| headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str());
    let (plan, id) = (header("x-plan").unwrap_or("200").to_owned(), header("x-id").unwrap_or("none").to_owned());
    let attempt = Attempt { line: line.clone(), headers: headers.clone(), body: 0, connection, port };
    let number = seen.add(&id, attempt);
    let now = entry(&plan, number);
    if let Some(status) = now.strip_prefix("early:") {
        respond(&mut writer, name, status, number, "")?;
        // The client gives up the rest; what comes of it is read, so that the answer is not lost.
        let _ = stream.shutdown(Shutdown::Write);
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let _ = io::copy(&mut reader, &mut io::sink());
        return Ok(false);
    }
    let body = read_body(&mut reader, &headers)?;
    seen.set_body(&id, number, body);
    let partial = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\nx-up: partial\r\n\r\n0123456789";
    match now {
        "rst" | "fin" => {}
        "parting" => respond(&mut writer, name, "200", number, "")?,
        "garbage" => writer.write_all(b"this is not HTTP\r\n\r\n")?,
        "hdrrst" | "hdrfin" => {
            writer.write_all(partial.as_bytes())?;
            thread::sleep(Duration::from_millis(50));
        }
        "hdrstall" => {
            writer.write_all(partial.as_bytes())?;
            thread::sleep(Duration::from_secs(4));
        }
        "switch" => writer.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")?,
        "upgrade" => return upgraded(&mut reader, writer),
        other if line.split(' ').nth(1).is_some_and(|p| p.split('?').next().is_some_and(|p| p.ends_with("/echo"))) => {
            let fields = headers.iter().map(|(n, v)| serde_json::json!([n, v])).collect::<Vec<_>>();
            let body = serde_json::json!({"line": line, "headers": fields}).to_string();
            respond(&mut writer, name, other, number, &body)?;
            return Ok(true);
        }
        other => {
            respond(&mut writer, name, other, number, "")?;
            return Ok(true);
        }
    }
    if now.ends_with("rst") {
        SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(false)
}

/// A first line, and headers in order.
type Head = (String, Vec<(String, String)>);

fn read_head(reader: &mut impl BufRead) -> io::Result<Option<Head>> {
    let mut line = String::new();
    // As many servers do, it skips what comes before a request.
    while line.trim_end().is_empty() {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
    }
    let mut headers = Vec::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim_end();
        let Some((name, value)) = header.split_once(':') else { return Ok(Some((line.trim_end().to_owned(), headers))) };
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
}

fn read_body(reader: &mut impl BufRead, headers: &[(String, String)]) -> io::Result<usize> {
    let header = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
    if let Some(length) = header("content-length").and_then(|l| l.parse::<u64>().ok()) {
        return Ok(usize::try_from(io::copy(&mut reader.take(length), &mut io::sink())?).unwrap_or(0));
    }
    if header("transfer-encoding").is_none() {
        return Ok(0);
    }
    let mut total = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let size = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
        io::copy(&mut reader.take(size as u64 + 2), &mut io::sink())?;
        total += size;
        if size == 0 {
            return Ok(total);
        }
    }
}

fn respond(writer: &mut impl Write, name: &str, entry: &str, number: usize, body: &str) -> io::Result<()> {
    let (rest, extra) = entry.split_once('+').unwrap_or((entry, ""));
    let (status, delay) = rest.split_once('/').unwrap_or((rest, "0"));
    thread::sleep(Duration::from_millis(delay.parse().unwrap_or(0)));
    let extra = extra.split_once('=').map(|(n, v)| format!("{n}: {v}\r\n")).unwrap_or_default();
    let body = if body.is_empty() { format!("{name} {status} #{number}\n") } else { body.to_owned() };
    let text = format!("HTTP/1.1 {status} Status\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n{extra}\r\n{body}", body.len());
    writer.write_all(text.as_bytes())
}

fn upgraded(reader: &mut impl BufRead, mut writer: &TcpStream) -> io::Result<bool> {
    writer.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")?;
    let n = {
        let said = reader.fill_buf()?;
        writer.write_all(b"echo:")?;
        writer.write_all(said)?;
        said.len()
    };
    reader.consume(n);
    thread::sleep(Duration::from_millis(50));
    Ok(false)
}

/// Starts an HTTP/2 upstream (prior knowledge); its address. It needs a tokio runtime.
pub async fn http2(name: &'static str, seen: &Seen) -> io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let seen = seen.clone();
    tokio::spawn(async move {
        for number_of_connection in 0.. {
            let Ok((stream, _)) = listener.accept().await else { return };
            let seen = seen.clone();
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, respond))) = connection.accept().await {
                    let plan = request.headers().get("x-plan").and_then(|p| p.to_str().ok()).unwrap_or("200").to_owned();
                    let id = request.headers().get("x-id").and_then(|p| p.to_str().ok()).unwrap_or("none").to_owned();
                    let number = seen.add(&id, seen_of(&request, address.port(), number_of_connection));
                    if entry(&plan, number) == "goaway" {
                        connection.abrupt_shutdown(h2::Reason::NO_ERROR);
                        continue;
                    }
                    if entry(&plan, number) == "drain" {
                        connection.graceful_shutdown();
                    }
                    let now = entry(&plan, number).replace("drain", "200");
                    tokio::spawn(async move { answer(name, request, respond, &now, number).await });
                }
            });
        }
    });
    Ok(address)
}

fn seen_of(request: &http::Request<h2::RecvStream>, port: u16, connection: u32) -> Attempt {
    let mut headers = vec![(":authority".to_owned(), request.uri().authority().map(ToString::to_string).unwrap_or_default())];
    headers.push((":path".to_owned(), request.uri().path_and_query().map(ToString::to_string).unwrap_or_default()));
    headers.push((":method".to_owned(), request.method().to_string()));
    headers.push((":scheme".to_owned(), request.uri().scheme_str().unwrap_or_default().to_owned()));
    headers.extend(request.headers().iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap_or_default().to_owned())));
    Attempt { line: String::new(), headers, body: 0, connection, port }
}

async fn answer(
    name: &str,
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<bytes::Bytes>,
    now: &str,
    number: usize,
) {
    match now {
        "refused" => return respond.send_reset(h2::Reason::REFUSED_STREAM),
        "rsti" => return respond.send_reset(h2::Reason::INTERNAL_ERROR),
        _ => {}
    }
    let head = request.method() == http::Method::HEAD || now == "204";
    let mut body = request.into_body();
    let mut received = 0;
    while let Some(Ok(data)) = body.data().await {
        received += data.len();
        let _ = body.flow_control().release_capacity(data.len());
    }
    let (now, extra) = now.split_once('+').unwrap_or((now, ""));
    let (status, delay) = now.split_once('/').unwrap_or((now, "0"));
    tokio::time::sleep(Duration::from_millis(delay.parse().unwrap_or(0))).await;
    let mut response = http::Response::builder().status(status).header("x-received", received);
    if let Some((name, value)) = extra.split_once('=') {
        response = response.header(name, value);
    }
    let response = response.body(()).expect("a response");
    if head {
        let _ = respond.send_response(response, true);
        return;
    }
    if let Ok(mut send) = respond.send_response(response, false) {
        let _ = send.send_data(format!("{name} {status} #{number}\n").into(), true);
    }
}

/// An address that never answers: a listener that nobody accepts from, with its queue full.
pub fn blackhole() -> (SocketAddr, Vec<socket2::Socket>) {
    let new = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    let listener = new();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("bound");
    listener.listen(0).expect("listening");
    let address = listener.local_addr().expect("an address").as_socket().expect("IP");
    let mut held = vec![listener];
    for _ in 0..4 {
        let filler = new();
        filler.set_nonblocking(true).expect("set");
        // The first fills the queue; those after it wait as ours will.
        let _ = filler.connect(&address.into());
        held.push(filler);
    }
    (address, held)
}
