//! A client's end of HTTP/2 as bytes: frames and header blocks put together by hand, right or wrong (RFC 9113, RFC 7541), and what came
//! back in text, so that two proxies can be compared.

use std::collections::BTreeMap;

/// What a client's connection begins with.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;
pub const WITH_PRIORITY: u8 = 32;

const HEAD: usize = 9;

/// One frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut all = vec![length[1], length[2], length[3], kind, flags];
    all.extend(stream.to_be_bytes());
    all.extend_from_slice(payload);
    all
}

/// A header block of literals that no table is needed for.
pub fn block<'a>(fields: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let mut all = Vec::new();
    for (name, value) in fields {
        all.push(0);
        for text in [name, value] {
            // Characters stand for single bytes.
            let bytes = text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect::<Vec<_>>();
            push_length(&mut all, bytes.len());
            all.extend(bytes);
        }
    }
    all
}

/// An integer with a prefix of seven bits.
fn push_length(all: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(127) else { return all.push(u8::try_from(length).unwrap_or_default()) };
    all.push(127);
    while rest >= 128 {
        all.push(u8::try_from(rest % 128).unwrap_or_default() | 128);
        rest /= 128;
    }
    all.push(u8::try_from(rest).unwrap_or_default());
}

/// What came on one stream.
#[derive(Default)]
struct Came {
    heads: Vec<String>,
    body: Vec<u8>,
    end: String,
}

/// Whether a stream has ended in what came.
pub fn has_answer(read: &[u8]) -> bool {
    let mut rest = read;
    while let Some((head, after)) = rest.split_at_checked(HEAD) {
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let Some((_, after)) = after.split_at_checked(length) else { break };
        if matches!(head[3], HEADERS | DATA) && head[4] & END_STREAM != 0 || matches!(head[3], RST_STREAM | GOAWAY) {
            return true;
        }
        rest = after;
    }
    false
}

/// What came, stream by stream, and how the connection ended. Left out is what says nothing about a request: settings, windows, and how
/// many frames a body is.
pub fn told(read: &[u8], end: &str) -> String {
    let mut decoder = loona_hpack::Decoder::new();
    let (mut streams, mut connection) = (BTreeMap::<u32, Came>::new(), Vec::new());
    let (mut rest, mut begun) = (read, Vec::new());
    let mut is_over = false;
    while let Some((head, after)) = rest.split_at_checked(HEAD) {
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let Some((payload, after)) = after.split_at_checked(length) else { break };
        rest = after;
        let (kind, flags) = (head[3], head[4]);
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let code = |at: usize| payload.get(at..at + 4).map_or_else(|| "?".to_owned(), reason);
        match kind {
            HEADERS | CONTINUATION => {
                begun.extend_from_slice(payload);
                let came = streams.entry(stream).or_default();
                if kind == HEADERS && flags & END_STREAM != 0 {
                    "END".clone_into(&mut came.end);
                }
                if flags & END_HEADERS != 0 {
                    came.heads.push(decoder.decode(&std::mem::take(&mut begun)).map_or_else(|e| format!("{e:?}"), |f| fields(&f)));
                }
            }
            DATA => {
                let came = streams.entry(stream).or_default();
                came.body.extend_from_slice(payload);
                if flags & END_STREAM != 0 {
                    "END".clone_into(&mut came.end);
                }
            }
            RST_STREAM => {
                let came = streams.entry(stream).or_default();
                came.end = format!("{} RST_STREAM {}", came.end, code(0)).trim_start().to_owned();
            }
            PING => connection.push("PING".to_owned()),
            GOAWAY => {
                connection.push(format!("GOAWAY {}", code(4)));
                is_over = true;
            }
            _ => {}
        }
    }
    let mut all = Vec::new();
    for (stream, came) in streams {
        let body = if came.body.is_empty() { String::new() } else { format!(" body {}", came.body.escape_ascii()) };
        let end = if came.end.is_empty() { "unfinished" } else { &came.end };
        all.push(format!("{stream}: {}{body} {end}", came.heads.join(" then ")));
    }
    all.extend(connection);
    // Who was told goes away, soon or at once.
    all.push(if is_over { "closes" } else { end }.to_owned());
    all.join("\n    ")
}

/// The status and header fields, sorted, without what differs from run to run.
fn fields(all: &[(Vec<u8>, Vec<u8>)]) -> String {
    let (mut text, mut status) = (Vec::new(), String::new());
    for (name, value) in all {
        let value = match &name[..] {
            b"server" => continue,
            b":status" => {
                status = format!("[{}] ", value.escape_ascii());
                continue;
            }
            b"date" | b"x-envoy-upstream-service-time" => "*".to_owned(),
            _ => value.escape_ascii().to_string(),
        };
        text.push(format!("{}={value};", name.escape_ascii()));
    }
    text.sort();
    status + &text.join(" ")
}

fn reason(code: &[u8]) -> String {
    const NAMES: [&str; 14] = [
        "NO_ERROR",
        "PROTOCOL_ERROR",
        "INTERNAL_ERROR",
        "FLOW_CONTROL_ERROR",
        "SETTINGS_TIMEOUT",
        "STREAM_CLOSED",
        "FRAME_SIZE_ERROR",
        "REFUSED_STREAM",
        "CANCEL",
        "COMPRESSION_ERROR",
        "CONNECT_ERROR",
        "ENHANCE_YOUR_CALM",
        "INADEQUATE_SECURITY",
        "HTTP_1_1_REQUIRED",
    ];
    let code = code.iter().fold(0, |all: usize, byte| all << 8 | usize::from(*byte));
    NAMES.get(code).map_or_else(|| code.to_string(), |name| (*name).to_owned())
}
