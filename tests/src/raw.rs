//! Both ends of an HTTP/1 exchange as bytes: an upstream that answers with bytes it is given, and a client that sends bytes and writes
//! down what came, so that two proxies between them can be compared.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{sleep, timeout},
};

use crate::frames;

/// How the upstream ends after its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Keep,
    Fin,
    Reset,
}

/// What the upstream answers to each request: pieces with a pause between them, and then an end.
#[derive(Debug, Clone)]
pub struct Answer {
    pub pieces: Vec<Vec<u8>>,
    pub end: End,
    /// Answers to the requests after the first, one each; the last of all is for any more.
    pub then: Vec<Answer>,
}

impl Answer {
    /// The same to every request.
    pub fn always(pieces: Vec<Vec<u8>>, end: End) -> Self {
        Self { pieces, end, then: Vec::new() }
    }

    fn to(&self, request: usize) -> &Self {
        if request == 0 { self } else { self.then.get(request - 1).or(self.then.last()).unwrap_or(self) }
    }
}

/// What reached an upstream, request by request, as [`Message`]s are written.
pub type Reached = Arc<Mutex<Vec<String>>>;

/// How long nothing has to come until it is taken to be all.
const SILENCE: Duration = Duration::from_millis(300);
/// How long an answer is waited for that has to be there.
const LONG: Duration = Duration::from_secs(5);
/// In place of a piece: what comes after it is sent, or the end of all is waited for, when there has been an answer; with HTTP/2, on any
/// stream.
pub const ANSWERED: &[u8] = b"\0answered";
/// Between pieces.
const PAUSE: Duration = Duration::from_millis(40);

/// Starts an upstream; its address.
pub async fn upstream(answer: Answer, reached: Reached) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let turn = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (answer, reached, turn) = (answer.clone(), reached.clone(), turn.clone());
            tokio::spawn(async move {
                let _ = serve(stream, &answer, &turn, &reached).await;
            });
        }
    });
    Ok(address)
}

async fn serve(mut stream: TcpStream, answer: &Answer, turn: &AtomicUsize, reached: &Reached) -> io::Result<()> {
    let mut read = Vec::new();
    loop {
        let (message, used) = loop {
            if let Some((message, used)) = Message::parse(&read, Kind::Request)
                && message.complete
            {
                break (message, used);
            }
            let mut chunk = [0; 16 * 1024];
            match timeout(SILENCE, stream.read(&mut chunk)).await {
                Ok(Ok(n)) if n > 0 => read.extend_from_slice(&chunk[..n]),
                Err(_) if read.is_empty() => {}
                // The rest does not come.
                end => {
                    let how = if end.is_err() { "waits" } else { "ended" };
                    if !read.is_empty() {
                        let what = Message::parse(&read, Kind::Request).map_or_else(|| text(&read), |(m, _)| m.to_string());
                        reached.lock().expect("lock").push(format!("{what} INCOMPLETE ({how})"));
                    }
                    return Ok(());
                }
            }
        };
        read.drain(..used);
        reached.lock().expect("lock").push(message.to_string());
        let answer = answer.to(turn.fetch_add(1, Ordering::Relaxed));
        for (i, piece) in answer.pieces.iter().enumerate() {
            if i > 0 {
                sleep(PAUSE).await;
            }
            stream.write_all(piece).await?;
        }
        match answer.end {
            End::Keep => {}
            End::Fin => return stream.shutdown().await,
            End::Reset => {
                sleep(PAUSE).await;
                return SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            }
        }
    }
}

/// Sends pieces with a pause between them; what came back, in text, and how it ended.
pub async fn converse(stream: TcpStream, pieces: &[Vec<u8>], heads: &[bool]) -> String {
    let (mut reader, mut writer) = stream.into_split();
    let to_send = pieces.to_vec();
    let (answered, mut answer) = watch::channel(false);
    let sending = tokio::spawn(async move {
        for (i, piece) in to_send.iter().enumerate() {
            if i > 0 {
                sleep(PAUSE).await;
            }
            if piece == ANSWERED {
                let _ = timeout(LONG, answer.wait_for(|is| *is)).await;
                continue;
            }
            // It may answer and close before all is sent.
            if piece.is_empty() {
                let _ = writer.shutdown().await;
            } else if writer.write_all(piece).await.is_err() {
                break;
            }
        }
        writer
    });
    let is_http2 = pieces.first().is_some_and(|first| first.starts_with(frames::PREFACE));
    let has_answer = |read: &[u8], heads: &[bool]| {
        let kind = Kind::Response { head: heads.first().copied().unwrap_or(false), ended: false };
        if is_http2 { frames::has_answer(read) } else { Message::parse(read, kind).is_some_and(|(message, _)| message.complete) }
    };
    let mut read = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    let mut writer = None;
    let mut sending = Some(sending);
    let end = loop {
        match timeout(SILENCE, reader.read(&mut chunk)).await {
            Ok(Ok(0)) => break "FIN",
            Ok(Ok(n)) => {
                read.extend_from_slice(&chunk[..n]);
                if pieces.iter().any(|piece| piece == ANSWERED) && has_answer(&read, heads) {
                    answered.send_replace(true);
                }
            }
            Ok(Err(_)) => break "RST",
            Err(_) if sending.as_ref().is_some_and(|s| !s.is_finished()) => {}
            Err(_) => match sending.take() {
                Some(task) => writer = task.await.ok(),
                None => break "open",
            },
        }
    };
    drop(writer);
    if is_http2 {
        return frames::told(&read, end);
    }
    let mut all = Vec::new();
    let mut rest = &read[..];
    let mut heads = heads.iter();
    let mut closes = false;
    while !rest.is_empty() {
        let informational = rest.starts_with(b"HTTP/1.1 1") && !rest.starts_with(b"HTTP/1.1 101");
        let head = !informational && heads.next().copied().unwrap_or(false);
        let Some((message, used)) = Message::parse(rest, Kind::Response { head, ended: end == "FIN" }) else {
            all.push(format!("NOT HTTP {}", text(rest)));
            break;
        };
        all.push(message.to_string());
        rest = &rest[used..];
        // Whether it ends at once or waits for the other end is the same to who was told.
        let told = !message.complete || message.headers.iter().any(|(n, v)| n == "connection" && v == "close");
        closes = told && rest.is_empty();
    }
    all.push(if closes && end != "RST" { "closes" } else { end }.to_owned());
    all.join("\n    ")
}

/// The body of a response.
pub fn body(response: &[u8]) -> Option<String> {
    let (message, _) = Message::parse(response, Kind::Response { head: false, ended: true })?;
    String::from_utf8(message.body).ok()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Response {
        head: bool,
        /// The connection has ended in order.
        ended: bool,
    },
}

/// A request or response as it is compared: names in lower case and sorted, values that differ from run to run as `*`.
#[derive(Debug)]
struct Message {
    line: String,
    headers: Vec<(String, String)>,
    framing: &'static str,
    body: Vec<u8>,
    trailers: Vec<(String, String)>,
    complete: bool,
}

impl std::fmt::Display for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}]", self.line)?;
        for (name, value) in &self.headers {
            write!(f, " {name}={value};")?;
        }
        write!(f, " {}:{}", self.framing, text(&self.body))?;
        for (name, value) in &self.trailers {
            write!(f, " trailer {name}={value};")?;
        }
        if self.complete { Ok(()) } else { write!(f, " (incomplete)") }
    }
}

fn text(bytes: &[u8]) -> String {
    if bytes.len() > 200 {
        return format!("{}..({} bytes)", bytes[..60].escape_ascii(), bytes.len());
    }
    bytes.escape_ascii().to_string()
}

/// Headers that differ between runs, or between the proxies on purpose.
const VARYING: &[&str] = &["date", "x-envoy-upstream-service-time", "x-request-id"];
const LEFT_OUT: &[&str] = &["server", "content-length", "transfer-encoding"];

fn fields(block: &[u8]) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for line in block.split(|b| *b == b'\n').map(|l| l.strip_suffix(b"\r").unwrap_or(l)).filter(|l| !l.is_empty()) {
        let at = line.iter().position(|b| *b == b':').unwrap_or(line.len());
        let name = String::from_utf8_lossy(&line[..at]).to_lowercase();
        let value = line.get(at + 1..).unwrap_or_default().trim_ascii().escape_ascii().to_string();
        all.push((name, value));
    }
    all
}

impl Message {
    /// The first message in these bytes and how many it takes; none without a whole head.
    fn parse(bytes: &[u8], kind: Kind) -> Option<(Self, usize)> {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
        let first = bytes.iter().position(|b| *b == b'\n')?;
        let line = bytes[..first].trim_ascii_end().escape_ascii().to_string();
        let raw = fields(&bytes[first + 1..end]);
        let of = |name: &str| raw.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        let chunked = of("transfer-encoding").is_some_and(|v| v.to_lowercase().ends_with("chunked"));
        let length = of("content-length").and_then(|v| v.parse::<usize>().ok());
        let mut headers = raw.iter().filter(|(n, _)| !LEFT_OUT.contains(&n.as_str())).cloned().collect::<Vec<_>>();
        for (name, value) in &mut headers {
            if VARYING.contains(&name.as_str()) {
                "*".clone_into(value);
            }
        }
        headers.sort();
        let status = line.split(' ').nth(1).unwrap_or_default();
        let bodiless = match kind {
            Kind::Request => false,
            Kind::Response { head, .. } => head || status == "204" || status == "304" || (status.starts_with('1') && status != "101"),
        };
        let mut message = Self { line: line.clone(), headers, framing: "none", body: Vec::new(), trailers: Vec::new(), complete: true };
        let rest = &bytes[end..];
        if bodiless {
            message.framing = if chunked { "declared chunked" } else { length.map_or("none", |_| "declared length") };
            return Some((message, end));
        }
        if chunked {
            let used = message.chunks(rest);
            return Some((message, end + used));
        }
        match (length, kind) {
            (Some(n), _) => {
                message.framing = "length";
                message.body = rest[..n.min(rest.len())].to_vec();
                message.complete = rest.len() >= n;
                let used = message.body.len();
                Some((message, end + used))
            }
            (None, Kind::Request) => Some((message, end)),
            (None, Kind::Response { ended, .. }) => {
                message.framing = "to the end";
                message.body = rest.to_vec();
                message.complete = ended || status == "101";
                Some((message, bytes.len()))
            }
        }
    }

    /// Takes chunks and trailers; how many bytes they are.
    fn chunks(&mut self, bytes: &[u8]) -> usize {
        self.framing = "chunked";
        self.complete = false;
        let mut at = 0;
        loop {
            let Some(eol) = bytes[at..].windows(2).position(|w| w == b"\r\n") else { return bytes.len() };
            let size = String::from_utf8_lossy(&bytes[at..at + eol]);
            let Ok(size) = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16) else { return bytes.len() };
            at += eol + 2;
            if size == 0 {
                let Some(end) = bytes[at - 2..].windows(4).position(|w| w == b"\r\n\r\n") else { return bytes.len() };
                self.trailers = fields(&bytes[at..at + end]);
                self.complete = true;
                return at + end + 2;
            }
            let Some(data) = bytes.get(at..at + size) else {
                self.body.extend_from_slice(&bytes[at..]);
                return bytes.len();
            };
            self.body.extend_from_slice(data);
            at += size + 2;
            if at > bytes.len() {
                return bytes.len();
            }
        }
    }
}
