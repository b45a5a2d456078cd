//! One HTTP/1 request and its response, as a client sees them on the wire.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// What a client got.
#[derive(Debug, Clone, Default)]
pub struct Got {
    pub status: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
    /// `FIN`, `RST`, `timeout`, or `open` when the response was complete.
    pub end: &'static str,
    pub complete: bool,
}

impl Got {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// Sends, and reads one response.
pub async fn exchange(stream: &mut TcpStream, bytes: Vec<u8>, head: bool) -> Got {
    let (mut reader, mut writer) = stream.split();
    let mut got = Got::default();
    let mut read = Vec::new();
    let sending = async {
        // A server may answer and close before all is sent.
        let _ = writer.write_all(&bytes).await;
        std::future::pending::<()>().await;
    };
    let reading = async {
        loop {
            let mut chunk = [0; 16 * 1024];
            match timeout(Duration::from_millis(2500), reader.read(&mut chunk)).await {
                Err(_) => return "timeout",
                Ok(Err(_)) => return "RST",
                Ok(Ok(0)) => return "FIN",
                Ok(Ok(n)) => read.extend_from_slice(&chunk[..n]),
            }
            while read.starts_with(b"HTTP/1.1 100") {
                let Some(end) = read.windows(4).position(|w| w == b"\r\n\r\n") else { break };
                read.drain(..end + 4);
            }
            if parse(&read, head).is_some_and(|g| g.complete && g.status != "101") {
                return "open";
            }
        }
    };
    let end = tokio::select! {
        end = reading => end,
        () = sending => "sent",
    };
    if let Some(parsed) = parse(&read, head) {
        got = parsed;
    }
    got.end = end;
    got
}

fn parse(read: &[u8], head: bool) -> Option<Got> {
    let end = read.windows(4).position(|w| w == b"\r\n\r\n")?;
    let text = String::from_utf8_lossy(&read[..end]);
    let mut lines = text.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers = lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
    let mut got = Got { status, headers, ..Got::default() };
    let body = &read[end + 4..];
    let length = got.header("content-length").and_then(|l| l.parse::<usize>().ok());
    if got.header("transfer-encoding").is_some() {
        got.complete = body.ends_with(b"0\r\n\r\n");
        let mut rest = String::from_utf8_lossy(body).into_owned();
        while let Some((size, after)) = rest.split_once("\r\n") {
            let n = usize::from_str_radix(size, 16).unwrap_or(0).min(after.len());
            got.body += &after[..n];
            rest = after.get(n + 2..).unwrap_or_default().to_owned();
        }
        return Some(got);
    }
    got.complete = head || length.is_some_and(|l| body.len() >= l) || got.status == "304" || got.status == "204";
    got.body = String::from_utf8_lossy(&body[..length.unwrap_or(body.len()).min(body.len())]).into_owned();
    Some(got)
}
