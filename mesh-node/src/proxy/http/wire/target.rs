//! What a request is for: its target, and the authority that is asked.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};

use super::{CODEC, INVALID_URL, Malformed};
use crate::route::{
    request::{Scheme, normalise_path},
    target::RequestTarget,
};

/// What a proxy before this one was asked with, where the request itself does not say.
pub(super) fn forwarded_scheme(headers: &HeaderMap) -> Scheme {
    let https = headers.get("x-forwarded-proto").is_some_and(|proto| proto.as_bytes().eq_ignore_ascii_case(b"https"));
    if https { Scheme::Https } else { Scheme::Http }
}

/// Splits the request target from the authority, which `own` may say: origin, absolute and authority form (RFC 9112 section 3.2).
pub(super) fn target_of(method: &Method, target: &Bytes, own: &HeaderMap, minor: u8) -> Result<(HeaderValue, RequestTarget), Malformed> {
    let mut hosts = own.get_all(header::HOST).iter();
    let host = match (hosts.next().cloned(), hosts.next()) {
        (Some(_), Some(_)) => return Err(CODEC),
        (host, _) => host,
    };
    if method == Method::CONNECT {
        if port_in_url(target)?.is_none() {
            return Err(INVALID_URL);
        }
        return Ok((HeaderValue::from_maybe_shared(target.clone()).map_err(|_| INVALID_URL)?, RequestTarget::from_static("/")));
    }
    if target.starts_with(b"/") {
        // HTTP/1.0 knows no Host; there it may be missing.
        let host = if minor == 0 { host.unwrap_or_else(|| HeaderValue::from_static("")) } else { host.ok_or(Malformed::MISSING_HOST)? };
        return Ok((checked_authority(host)?, path_and_query(target)?));
    }
    if &**target == b"*" {
        if method != Method::OPTIONS {
            return Err(INVALID_URL);
        }
        // Refused in any case, but what is malformed ends the connection.
        host.map_or(if minor == 0 { Ok(()) } else { Err(Malformed::MISSING_HOST) }, |host| checked_authority(host).map(drop))?;
        return Err(Malformed::NO_RESOURCE);
    }
    let scheme = memchr::memmem::find(target, b"://").ok_or(CODEC)?;
    if !["http", "https"].iter().any(|known| target[..scheme].eq_ignore_ascii_case(known.as_bytes())) {
        return Err(Malformed::codec("http1.invalid_scheme"));
    }
    let after = &target[scheme + 3..];
    let end = after.iter().position(|b| matches!(b, b'/' | b'?' | b'#')).unwrap_or(after.len());
    // Who the client says it is, in front of an `@`, is for nobody (RFC 9110 section 4.2.4).
    let host = memchr::memchr(b'@', &after[..end]).map_or(0, |at| at + 1);
    let authority = HeaderValue::from_bytes(&after[host..end]).map_err(|_| CODEC)?;
    port_in_url(authority.as_bytes())?;
    let path = &after[end..];
    let path = if path.starts_with(b"/") { path.to_vec() } else { [b"/", path].concat() };
    Ok((authority, path_and_query(&path.into())?))
}

/// The port of an authority in a URL, if it has one. As strict as Envoy, which takes more from a `host` header.
fn port_in_url(authority: &[u8]) -> Result<Option<u16>, Malformed> {
    let end = if authority.starts_with(b"[") {
        memchr::memchr(b']', authority).map(|at| at + 1).ok_or(INVALID_URL)?
    } else {
        memchr::memchr(b':', authority).unwrap_or(authority.len())
    };
    let (host, rest) = authority.split_at(end);
    let legal = match host.strip_prefix(b"[").and_then(|h| h.strip_suffix(b"]")) {
        Some(v6) => !v6.is_empty() && v6.iter().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')),
        None => !host.is_empty() && host.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.')),
    };
    let port = match rest.strip_prefix(b":").map(std::str::from_utf8) {
        Some(Ok(digits)) if digits.bytes().all(|b| b.is_ascii_digit()) => Some(digits.parse().map_err(|_| INVALID_URL)?),
        None if rest.is_empty() => None,
        _ => return Err(INVALID_URL),
    };
    if legal { Ok(port) } else { Err(INVALID_URL) }
}

/// An authority that cannot be taken for something else: no user part, no white space, no list.
pub fn checked_authority(authority: HeaderValue) -> Result<HeaderValue, Malformed> {
    let legal = |b: &u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+;=:[]%".contains(b);
    if authority.as_bytes().iter().all(legal) { Ok(authority) } else { Err(Malformed::BAD_AUTHORITY) }
}

/// Path and query, the path normalised. A fragment is taken off, as Istio has its proxies do
/// (`envoy.reloadable_features.http_reject_path_with_fragment`).
pub fn path_and_query(target: &Bytes) -> Result<RequestTarget, Malformed> {
    let bad = Malformed::refused(StatusCode::BAD_REQUEST, "path_normalization_failed", true);
    let text = std::str::from_utf8(target).map_err(|_| bad)?;
    let text = text.split_once('#').map_or(text, |(before, _)| before);
    let (path, query) = text.split_once('?').map_or((text, None), |(path, query)| (path, Some(query)));
    let parsed = match normalise_path(path).map_err(|_| bad)? {
        None => RequestTarget::from_shared(&target.slice(..text.len())),
        Some(normal) => RequestTarget::try_from(query.map_or(normal.clone(), |q| format!("{normal}?{q}"))),
    };
    parsed.map_err(|_| bad)
}
