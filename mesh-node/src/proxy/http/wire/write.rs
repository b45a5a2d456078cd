//! Heads as bytes.

use std::io::Write as _;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};

use super::Framing;
use crate::{
    proxy::http::{date, headers::CLIENT_CERT},
    route::request::RequestHead,
};

/// Writes a request head.
pub fn write_request(
    head: &RequestHead,
    framing: Framing,
    upgrade: Option<&HeaderValue>,
    client_cert: Option<&HeaderValue>,
    out: &mut Vec<u8>,
) {
    out.extend_from_slice(head.method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(head.target.as_str().as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
    out.extend_from_slice(head.authority.as_bytes());
    out.extend_from_slice(b"\r\n");
    // Where the body ends is said once, and by whoever knows: nothing that was put among the headers can say otherwise.
    for (name, value) in &head.headers {
        if !matches!(*name, header::CONTENT_LENGTH | header::TRANSFER_ENCODING | header::CONNECTION | header::UPGRADE) {
            write_header(name, value, out);
        }
    }
    if let Some(value) = client_cert {
        write_header(&CLIENT_CERT, value, out);
    }
    // That there is none is said where one would be expected: some servers insist on it (411).
    let unexpected = [Method::GET, Method::HEAD, Method::DELETE, Method::TRACE, Method::CONNECT].contains(&head.method);
    let told_empty = framing == Framing::Empty && (!unexpected || head.headers.contains_key(header::CONTENT_LENGTH));
    write_framing(if told_empty { Framing::Length(0) } else { framing }, false, out);
    if let Some(upgrade) = upgrade {
        out.extend_from_slice(b"connection: upgrade\r\nupgrade: ");
        out.extend_from_slice(upgrade.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// The reason phrase, as Envoy has it.
fn phrase(status: StatusCode) -> &'static str {
    match status.as_u16() {
        203 => "Non-Authoritative Information",
        418 | 451 => "Unknown",
        _ => status.canonical_reason().unwrap_or("Unknown"),
    }
}

/// Writes a response head. `close` adds `connection: close`.
pub fn write_response(status: StatusCode, headers: &HeaderMap, framing: Framing, close: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(phrase(status).as_bytes());
    out.extend_from_slice(b"\r\n");
    write_headers(headers, out);
    if !status.is_informational() && !headers.contains_key(header::DATE) {
        out.extend_from_slice(b"date: ");
        date::now(|text| out.extend_from_slice(text.as_bytes()));
        out.extend_from_slice(b"\r\n");
    }
    write_framing(framing, headers.contains_key(header::CONTENT_LENGTH), out);
    if close {
        out.extend_from_slice(b"connection: close\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

pub fn write_headers(headers: &HeaderMap, out: &mut Vec<u8>) {
    for (name, value) in headers {
        write_header(name, value, out);
    }
}

fn write_header(name: &HeaderName, value: &HeaderValue, out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_str().as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value.as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn write_framing(framing: Framing, has_length: bool, out: &mut Vec<u8>) {
    match framing {
        Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Framing::Length(n) if !has_length => {
            // A vector takes any text.
            let _ = write!(out, "content-length: {n}\r\n");
        }
        Framing::Empty | Framing::Length(_) | Framing::UntilClose => {}
    }
}
