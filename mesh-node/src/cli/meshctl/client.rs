//! One HTTP request to a node's admin endpoint, over TCP or a socket in the file system.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::PathBuf,
    str::FromStr,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::Failure;

/// How long something may take to come.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long all of an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);

/// Where a node's admin endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admin {
    Address(SocketAddr),
    Socket(PathBuf),
}

impl FromStr for Admin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Socket(path.into()));
        }
        if text.starts_with('/') {
            return Ok(Self::Socket(text.into()));
        }
        let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        // Whatever a resolver may say.
        let address = address.strip_prefix("localhost:").map_or_else(|| address.to_owned(), |port| format!("127.0.0.1:{port}"));
        address.parse().map(Self::Address).map_err(|_| format!("{text:?} is neither ADDRESS:PORT nor the path of a socket"))
    }
}

impl std::fmt::Display for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Admin {
    pub fn get(&self, path: &str) -> Result<String, Failure> {
        self.ask("GET", path)
    }

    pub fn post(&self, path: &str) -> Result<String, Failure> {
        self.ask("POST", path)
    }

    pub fn document(&self, path: &str) -> Result<Value, Failure> {
        let text = self.get(path)?;
        serde_json::from_str(&text).map_err(|e| Failure::Other(format!("{path}: the answer is not JSON: {e}")))
    }

    fn ask(&self, method: &str, path: &str) -> Result<String, Failure> {
        let absent = |e: std::io::Error| {
            let text = format!("no mesh-node answers at {self}: {e}; is it running, and is --admin where it listens?");
            match e.kind() {
                ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Broken(text),
                _ => Failure::Absent(text),
            }
        };
        let broken = |e: std::io::Error| Failure::Broken(format!("mesh-node at {self} gave no complete answer: {e}"));
        let mut stream: Box<dyn Stream> = match self {
            Self::Address(address) => {
                let stream = TcpStream::connect_timeout(address, TIMEOUT).map_err(absent)?;
                stream.set_read_timeout(Some(TIMEOUT)).map_err(broken)?;
                Box::new(stream)
            }
            Self::Socket(path) => {
                let stream = UnixStream::connect(path).map_err(absent)?;
                stream.set_read_timeout(Some(TIMEOUT)).map_err(broken)?;
                Box::new(stream)
            }
        };
        write!(stream, "{method} {path} HTTP/1.0\r\nhost: mesh-node\r\ncontent-length: 0\r\n\r\n").map_err(broken)?;
        let answer = read(&mut *stream, Instant::now() + ANSWER_TIMEOUT).map_err(broken)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| Failure::Other(format!("what answers at {self} is not HTTP")))?;
        let length = head.lines().find_map(|l| l.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("content-length")));
        let length = length.and_then(|(_, n)| n.trim().parse::<usize>().ok());
        if length.is_some_and(|length| body.len() < length) {
            return Err(broken(ErrorKind::UnexpectedEof.into()));
        }
        match head.split(' ').nth(1).unwrap_or_default() {
            "200" => Ok(body.to_owned()),
            "400" => Err(Failure::Misasked(body.trim().to_owned())),
            "404" => Err(Failure::Asked(body.trim().to_owned())),
            status => Err(Failure::Other(format!("it answered {status}: {}", body.trim()))),
        }
    }
}

/// All that comes, as long as something does and there is time.
fn read(stream: &mut dyn Stream, until: Instant) -> std::io::Result<String> {
    let (mut all, mut chunk) = (Vec::new(), [0; 8 * 1024]);
    loop {
        match stream.read(&mut chunk)? {
            0 => return String::from_utf8(all).map_err(|_| ErrorKind::InvalidData.into()),
            n => all.extend_from_slice(chunk.get(..n).unwrap_or_default()),
        }
        if Instant::now() >= until {
            return Err(ErrorKind::TimedOut.into());
        }
    }
}

/// Percent-encoded for a query.
pub fn encoded(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/:".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect::<Vec<_>>().concat()
}

/// A path with a query of these.
pub fn query(path: &str, pairs: &[(&str, &str)]) -> String {
    let pairs = pairs.iter().map(|(name, value)| format!("{name}={}", encoded(value))).collect::<Vec<_>>();
    if pairs.is_empty() { path.to_owned() } else { format!("{path}?{}", pairs.join("&")) }
}
