//! Heads of requests as HTTP/2 has them.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, header};

use super::AMBIGUOUS;
use crate::{
    proxy::http::{
        framing::has_odd_name,
        headers::CLIENT_CERT,
        wire::{HeadLimits, Malformed, ParsedHead, Refused, checked_authority, path_and_query, strip_hop_by_hop},
    },
    route::{
        request::{RequestHead, Scheme, take_off},
        target::RequestTarget,
    },
};

/// Turns a request of HTTP/2 into the common form.
pub fn request_head(request: Request<()>, limits: HeadLimits) -> Result<RequestHead, Box<Refused>> {
    let (parts, ()) = request.into_parts();
    let mut headers = parts.headers;
    let said = parts.method.as_str().len()
        + parts.uri.path_and_query().map_or(0, |target| target.as_str().len())
        + parts.uri.authority().map_or(0, |authority| authority.as_str().len());
    if headers.len() > limits.headers || said + list_size(&headers) > limits.bytes {
        return Err(Malformed { details: "http2.too_many_headers", close: false, ..Malformed::TOO_LARGE }.into());
    }
    let ambiguous = is_ambiguous(&headers);
    let host = take_off(&mut headers, &header::HOST);
    let authority = parts.uri.authority().map(|authority| HeaderValue::from_str(authority.as_str()).ok());
    // One beside it says nothing (RFC 9113 section 8.3.1), but has to be one.
    let ambiguous = ambiguous || authority.is_some() && host.clone().is_some_and(|host| checked_authority(host).is_err());
    let authority = authority.unwrap_or(host);
    let target = parts.uri.path_and_query().map(|target| Bytes::copy_from_slice(target.as_str().as_bytes()));
    let read = if ambiguous { Err(AMBIGUOUS) } else { place(&parts.method, authority.clone(), target.as_ref()) };
    let (authority, target) = match read {
        Ok(read) => read,
        Err(malformed) => {
            let said = ParsedHead { method: parts.method, target: target.unwrap_or_default(), authority, headers };
            return Err(Box::new(Refused { malformed: Malformed { close: false, ..malformed }, said: Some(said) }));
        }
    };
    let scheme = if parts.uri.scheme() == Some(&http::uri::Scheme::HTTPS) { Scheme::Https } else { Scheme::Http };
    strip_hop_by_hop(&mut headers);
    join_cookies(&mut headers);
    Ok(RequestHead { method: parts.method, scheme, authority, target, headers })
}

/// The size of a head or of trailers as HTTP/2 has it (RFC 9113 section 6.5.2).
pub fn list_size(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// Whose resource, and which.
fn place(method: &Method, authority: Option<HeaderValue>, target: Option<&Bytes>) -> Result<(HeaderValue, RequestTarget), Malformed> {
    let authority = checked_authority(authority.ok_or(Malformed::MISSING_HOST)?)?;
    if method == Method::OPTIONS && target.is_some_and(|target| &**target == b"*") {
        return Err(Malformed::NO_RESOURCE);
    }
    Ok((authority, target.map_or_else(|| Ok(RequestTarget::from_static("/")), path_and_query)?))
}

/// Whether a message says twice, or not at all although it seems to, whom it is for or how long it is, or has what HTTP/1 could not say.
pub fn is_ambiguous(headers: &HeaderMap) -> bool {
    let twice = |name| headers.get_all(name).iter().nth(1).is_some();
    has_odd_name(headers)
        || twice(header::HOST)
        || twice(header::CONTENT_LENGTH)
        || headers.get(header::CONTENT_LENGTH).is_some_and(HeaderValue::is_empty)
}

/// HTTP/2 may split cookies over several fields; HTTP/1 must not (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut all = headers.get_all(header::COOKIE).iter();
    if let (Some(_), Some(_)) = (all.next(), all.next()) {
        let joined = headers
            .get_all(header::COOKIE)
            .iter()
            .map(HeaderValue::as_bytes)
            .filter(|cookie| !cookie.is_empty())
            .collect::<Vec<_>>()
            .join(&b"; "[..]);
        if let Ok(value) = HeaderValue::from_bytes(&joined) {
            headers.insert(header::COOKIE, value);
        }
    }
}

/// The request as HTTP/2 sends it; `None` when the authority is none.
pub fn wire_request(head: &RequestHead, client_cert: Option<&HeaderValue>) -> Option<Request<()>> {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(match head.scheme {
        Scheme::Http => http::uri::Scheme::HTTP,
        Scheme::Https => http::uri::Scheme::HTTPS,
    });
    parts.authority = Some(http::uri::Authority::from_maybe_shared(Bytes::copy_from_slice(head.authority.as_bytes())).ok()?);
    parts.path_and_query = Some(head.target.to_http()?);
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = http::Uri::from_parts(parts).ok()?;
    *request.version_mut() = http::Version::HTTP_2;
    *request.headers_mut() = head.headers.clone();
    if let Some(value) = client_cert {
        request.headers_mut().insert(CLIENT_CERT.clone(), value.clone());
    }
    Some(request)
}
