//! The fields of a head. What goes on keeps the order it was sent in: the map that holds it loses that when something is taken out of it, so what does
//! not go on is not put into it.

use std::collections::HashSet;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::{CODEC, INVALID_CHARACTERS, KEEP_ALIVE, Malformed, PROXY_CONNECTION, Range, tokens};
use crate::route::request::{take_off, take_off_all};

/// The fields of an HTTP/1 head.
pub(super) struct Fields {
    /// Those that go on.
    pub headers: HeaderMap,
    /// Those that are for this connection only (RFC 9110 section 7.6.1), and of a request its host.
    pub own: HeaderMap,
}

pub(super) fn of_request(bytes: &Bytes, at: usize, most: usize) -> Result<Fields, Malformed> {
    fields(bytes, at, most, |name| *name == header::HOST || is_hop_by_hop(name))
}

pub(super) fn of_response(bytes: &Bytes, at: usize, most: usize) -> Result<Fields, Malformed> {
    fields(bytes, at, most, is_hop_by_hop)
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(*name, header::CONNECTION | header::TE | header::TRANSFER_ENCODING | header::UPGRADE)
        || *name == KEEP_ALIVE
        || *name == PROXY_CONNECTION
}

/// What those of the connection say of the others: which of them are for it only, too. `te: trailers` goes on.
pub(super) fn settle(headers: &mut HeaderMap, own: &HeaderMap) {
    if own.is_empty() {
        return;
    }
    take_off_named(headers, &named(own));
    if tokens(own, &header::TE).any(|t| t.eq_ignore_ascii_case(b"trailers")) {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
}

/// The headers that `connection` names.
fn named(headers: &HeaderMap) -> HashSet<HeaderName> {
    tokens(headers, &header::CONNECTION).filter_map(|t| HeaderName::from_bytes(t).ok()).filter(|n| *n != header::TE).collect()
}

/// In one pass, however many there are.
fn take_off_named(headers: &mut HeaderMap, names: &HashSet<HeaderName>) {
    if !names.is_empty() {
        take_off_all(headers, |name| names.contains(name));
    }
}

/// Takes off what is for this connection only, of a head that was not read here. `te: trailers` stays.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        take_off_named(headers, &named(headers));
        take_off(headers, &header::CONNECTION);
    }
    if headers.contains_key(header::TE) {
        let trailers = tokens(headers, &header::TE).any(|t| t.eq_ignore_ascii_case(b"trailers"));
        take_off(headers, &header::TE);
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
    }
    for name in [&KEEP_ALIVE, &PROXY_CONNECTION, &header::TRANSFER_ENCODING, &header::UPGRADE] {
        take_off(headers, name);
    }
}

pub(super) fn line_at(bytes: &[u8], start: usize) -> Option<(Range, usize)> {
    let rest = bytes.get(start..)?;
    let end = start + memchr::memchr(b'\n', rest)?;
    let trimmed = if end > start && bytes[end - 1] == b'\r' { end - 1 } else { end };
    Some((start..trimmed, end + 1))
}

fn fields(bytes: &Bytes, mut at: usize, most: usize, is_own: impl Fn(&HeaderName) -> bool) -> Result<Fields, Malformed> {
    let mut found = Fields { headers: HeaderMap::with_capacity(16), own: HeaderMap::new() };
    let mut count = 0;
    while let Some((line, next)) = line_at(bytes, at) {
        at = next;
        if line.is_empty() {
            return Ok(found);
        }
        count += 1;
        if count > most {
            return Err(Malformed::too_large("http1.too_many_headers"));
        }
        let colon = line.start + memchr::memchr(b':', &bytes[line.clone()]).ok_or(CODEC)?;
        let name = HeaderName::from_bytes(&bytes[line.start..colon]).map_err(|_| CODEC)?;
        let value = match folded(bytes, &mut at) {
            None => value(bytes.slice(trim(bytes, colon + 1..line.end))),
            Some(more) => {
                let mut joined = bytes[trim(bytes, colon + 1..line.end)].to_vec();
                joined.extend_from_slice(&more);
                let joined = Bytes::from(joined);
                value(joined.slice(trim(&joined, 0..joined.len())))
            }
        };
        let among = if is_own(&name) { &mut found.own } else { &mut found.headers };
        among.append(name, value?);
    }
    Err(CODEC)
}

fn value(bytes: Bytes) -> Result<HeaderValue, Malformed> {
    HeaderValue::from_maybe_shared(bytes).map_err(|_| INVALID_CHARACTERS)
}

/// Lines that continue a header (RFC 9112 section 5.2), each joined with a space.
fn folded(bytes: &Bytes, at: &mut usize) -> Option<Vec<u8>> {
    let mut joined: Option<Vec<u8>> = None;
    while let (Some(b' ' | b'\t'), Some((line, next))) = (bytes.get(*at), line_at(bytes, *at)) {
        let more = &bytes[trim(bytes, line)];
        let joined = joined.get_or_insert_default();
        joined.push(b' ');
        joined.extend_from_slice(more);
        *at = next;
    }
    joined
}

fn trim(bytes: &[u8], range: Range) -> Range {
    let is_space = |b: &u8| matches!(b, b' ' | b'\t');
    let text = &bytes[range.clone()];
    let start = text.iter().take_while(|b| is_space(b)).count();
    let end = text[start..].iter().rev().take_while(|b| is_space(b)).count();
    range.start + start..range.end - end
}
