//! The head of an HTTP request as routing sees it, whatever version it came in.

use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};

/// Method, target and headers of a request. `Host` and `:authority` are one field, not a header.
#[derive(Debug, Clone)]
pub struct RequestHead {
    pub method: Method,
    /// `http` or `https`, as the client said or the connection was.
    pub scheme: Scheme,
    /// As received, with a port if there was one.
    pub authority: HeaderValue,
    /// Normalised path, and the query as received.
    pub target: PathAndQuery,
    pub headers: HeaderMap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

impl RequestHead {
    pub fn path(&self) -> &str {
        self.target.path()
    }

    pub fn query(&self) -> Option<&str> {
        self.target.query()
    }

    /// The authority as text; anything but visible ASCII was refused when the request was read.
    pub fn host(&self) -> &str {
        self.authority.to_str().unwrap_or_default()
    }

    /// Whether it is a gRPC request, by its content type.
    pub fn is_grpc(&self) -> bool {
        is_grpc(&self.headers)
    }
}

/// Whether headers name gRPC as their content type: `application/grpc`, alone or with a suffix or parameter.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(http::header::CONTENT_TYPE) else { return false };
    let Some(rest) = value.as_bytes().strip_prefix(b"application/grpc") else { return false };
    matches!(rest.first(), None | Some(b'+' | b';' | b' '))
}

/// The first value of a query parameter, as it stands in the query. Envoy does not decode it for matching either.
pub fn query_parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

/// The value of a cookie.
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get_all(http::header::COOKIE).iter().filter_map(|v| v.to_str().ok()).find_map(|line| {
        line.split(';').find_map(|pair| {
            let (key, value) = pair.trim().split_once('=')?;
            (key == name).then(|| value.trim_matches('"'))
        })
    })
}

/// Why a path cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadPath {
    /// It has a fragment, which no request target may have.
    Fragment,
    /// It is not an absolute path, or climbs above the root.
    NotAbsolute,
    /// Decoding it may make something that can be decoded again: what it means would depend on how often that is done.
    Ambiguous,
}

/// Normalises a path as RFC 3986 sections 5.2.4 and 6.2.2 do and Istio asks of Envoy by default: dot segments removed,
/// percent-encoded unreserved characters decoded, `\` taken for `/`. Slashes are not merged and `%2f` stays.
///
/// `None` means that the path is normal already, which most are.
pub fn normalise_path(path: &str) -> Result<Option<String>, BadPath> {
    if path.contains('#') {
        return Err(BadPath::Fragment);
    }
    if !path.starts_with('/') {
        return Err(BadPath::NotAbsolute);
    }
    if !path.contains(['%', '\\']) && !path.contains("/.") {
        return Ok(None);
    }
    let decoded = decode_unreserved(path);
    let mut out: Vec<&str> = Vec::new();
    let mut segments = decoded[1..].split('/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." if last => out.push(""),
            "." => {}
            ".." => {
                out.pop().ok_or(BadPath::NotAbsolute)?;
                if last {
                    out.push("");
                }
            }
            other => out.push(other),
        }
    }
    let normal = format!("/{}", out.join("/"));
    if normal != path && has_stray_percent(path) {
        return Err(BadPath::Ambiguous);
    }
    Ok((normal != path).then_some(normal))
}

/// Whether there is a percent sign that begins no escape: with what is decoded after it, it might.
fn has_stray_percent(path: &str) -> bool {
    let bytes = path.as_bytes();
    let is_hex = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_hexdigit);
    bytes.iter().enumerate().any(|(i, b)| *b == b'%' && !(is_hex(i + 1) && is_hex(i + 2)))
}

fn decode_unreserved(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find(['%', '\\']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix('\\') {
            out.push('/');
            rest = after;
            continue;
        }
        let decoded = rest.get(1..3).and_then(|hex| u8::from_str_radix(hex, 16).ok()).map(char::from);
        match decoded {
            Some(c) if c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~') => {
                out.push(c);
                rest = &rest[3..];
            }
            _ => {
                out.push('%');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalised_as_recorded() {
        let cases = [
            ("/direct/y", Ok(None)),
            ("/x/../direct/y", Ok(Some("/direct/y"))),
            ("/dire%63t/y", Ok(Some("/direct/y"))),
            ("//direct/y", Ok(None)),
            ("/x%2f..%2fdirect/y", Ok(None)),
            ("/a/./b/.", Ok(Some("/a/b/"))),
            ("/a/b/..", Ok(Some("/a/"))),
            ("/..", Err(BadPath::NotAbsolute)),
            ("/a/%2e%2e/b", Ok(Some("/b"))),
            ("/a\\b", Ok(Some("/a/b"))),
            ("/a%zz", Ok(None)),
            ("/a%", Ok(None)),
            ("/a%%325e", Err(BadPath::Ambiguous)),
            ("/%252e%252e/b", Ok(None)),
            ("/direct/y#frag", Err(BadPath::Fragment)),
            ("relative", Err(BadPath::NotAbsolute)),
        ];
        for (path, expected) in cases {
            assert_eq!(normalise_path(path), expected.map(|o| o.map(str::to_owned)), "{path}");
        }
    }

    #[test]
    fn query_parameters_and_cookies_are_found() {
        assert_eq!(query_parameter("a=1&b&c=x=y", "c"), Some("x=y"));
        assert_eq!(query_parameter("a=1&b", "b"), Some(""));
        assert_eq!(query_parameter("ab=1", "a"), None);
        let mut headers = HeaderMap::new();
        headers.append("cookie", HeaderValue::from_static("a=1; session=\"x\""));
        headers.append("cookie", HeaderValue::from_static("b=2"));
        assert_eq!(cookie(&headers, "session"), Some("x"));
        assert_eq!(cookie(&headers, "b"), Some("2"));
        assert_eq!(cookie(&headers, "c"), None);
    }

    #[test]
    fn grpc_is_known_by_its_content_type() {
        for (kind, expected) in
            [("application/grpc", true), ("application/grpc+proto", true), ("application/grpc-web", false), ("text/plain", false)]
        {
            let mut headers = HeaderMap::new();
            headers.insert("content-type", HeaderValue::from_static(kind));
            assert_eq!(is_grpc(&headers), expected, "{kind}");
        }
    }
}
