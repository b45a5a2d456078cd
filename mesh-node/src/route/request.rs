//! The head of an HTTP request as routing sees it, whatever version it came in.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::target::RequestTarget;
use crate::resource::mesh_config::Normalization;

/// Takes a header off, in all of its lines, and says what the first was. The others stay in their order: the map itself would put the last of them in
/// the place of the one that goes.
pub fn take_off(headers: &mut HeaderMap, name: &HeaderName) -> Option<HeaderValue> {
    let taken = headers.get(name)?.clone();
    take_off_all(headers, |other| other == name);
    Some(taken)
}

/// The same of all such, at once.
pub fn take_off_all(headers: &mut HeaderMap, gone: impl Fn(&HeaderName) -> bool) {
    if !headers.keys().any(&gone) {
        return;
    }
    let mut rest = HeaderMap::with_capacity(headers.capacity());
    let mut current = None;
    for (next, value) in headers.drain() {
        current = next.or(current);
        if let Some(of) = current.as_ref().filter(|of| !gone(of)) {
            rest.append(of, value);
        }
    }
    *headers = rest;
}

/// Method, target and headers of a request. `Host` and `:authority` are one field, not a header.
#[derive(Debug, Clone)]
pub struct RequestHead {
    pub method: Method,
    /// `http` or `https`, as the client said or the connection was.
    pub scheme: Scheme,
    /// As received, with a port if there was one.
    pub authority: HeaderValue,
    /// Normalised path, and the query as received.
    pub target: RequestTarget,
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

    /// What the client spoke to the first proxy, as far as that says so; else the scheme.
    pub fn forwarded_proto(&self) -> &str {
        let told = self.headers.get("x-forwarded-proto").map(HeaderValue::as_bytes);
        let known = ["http", "https"].into_iter().find(|known| told.is_some_and(|told| told.eq_ignore_ascii_case(known.as_bytes())));
        known.unwrap_or_else(|| self.scheme.as_str())
    }

    /// The port of the authority, or HTTP's own.
    pub fn port(&self) -> u16 {
        self.host().rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(80)
    }

    /// Whether it is a gRPC request, by its content type.
    pub fn is_grpc(&self) -> bool {
        is_grpc(&self.headers)
    }
}

/// Whether headers name gRPC as their content type: `application/grpc`, alone or with a suffix. With a parameter it is none for Envoy.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(http::header::CONTENT_TYPE) else { return false };
    let Some(rest) = value.as_bytes().strip_prefix(b"application/grpc") else { return false };
    matches!(rest.first(), None | Some(b'+'))
}

/// The first value of a query parameter, as it stands in the query. Envoy does not decode it for matching either.
pub fn query_parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

/// The first value of a query parameter, with its escapes decoded and those of names.
pub fn decoded_parameter(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode_once(key) == name).then(|| decode_once(value).into_owned())
    })
}

/// A target without a query parameter, wherever it stands and however it is written; `None` if it has none.
pub fn without_parameter(target: &RequestTarget, name: &str) -> Option<RequestTarget> {
    let query = target.query()?;
    let is_it = |pair: &&str| decode_once(pair.split_once('=').map_or(*pair, |(key, _)| key)) == name;
    if !query.split('&').any(|pair| is_it(&pair)) {
        return None;
    }
    let rest = query.split('&').filter(|pair| !is_it(pair)).collect::<Vec<_>>().join("&");
    let text = if rest.is_empty() { target.path().to_owned() } else { format!("{}?{rest}", target.path()) };
    RequestTarget::try_from(text).ok()
}

/// How applications may read a path, where that is not as it is written: with escapes decoded or not, parameters after `;`
/// left out or not, runs of slashes one or not; dot segments gone in each.
pub fn other_readings(path: &str) -> Vec<String> {
    let odd = path.contains(['%', ';', '\\']) || path.contains("//") || path.contains("/.");
    if !odd {
        return Vec::new();
    }
    let mut all: Vec<String> = Vec::new();
    let decoded = decode_all(path);
    for text in [path, &decoded] {
        for parameters in [true, false] {
            for merged in [false, true] {
                let reading = read(text, parameters, merged);
                if reading != path && !all.contains(&reading) {
                    all.push(reading);
                }
            }
        }
    }
    all
}

fn read(text: &str, parameters: bool, merged: bool) -> String {
    let relative = text.strip_prefix(['/', '\\']).unwrap_or(text);
    let mut out: Vec<&str> = Vec::new();
    let mut segments = relative.split(['/', '\\']).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        let segment = if parameters { segment } else { segment.split(';').next().unwrap_or_default() };
        match segment {
            "" if merged && !last => {}
            "." if last => out.push(""),
            "." => {}
            ".." => {
                out.pop();
                if last {
                    out.push("");
                }
            }
            other => out.push(other),
        }
    }
    format!("/{}", out.join("/"))
}

/// Text with its escapes decoded; what is no escape stays.
fn decode_once(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = (*first == b'%').then(|| after.get(..2)).flatten().filter(|h| h.iter().all(u8::is_ascii_hexdigit));
        let decoded = hex.and_then(|h| std::str::from_utf8(h).ok()).and_then(|h| u8::from_str_radix(h, 16).ok());
        if let Some(byte) = decoded {
            bytes.push(byte);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

/// Every escape decoded, as often as that changes something: an application may do it twice.
pub fn decode_all(path: &str) -> String {
    let mut text = path.to_owned();
    for _ in 0..4 {
        let next = decode_once(&text).into_owned();
        if next == text {
            break;
        }
        text = next;
    }
    text
}

/// A request whose path has to be changed: as it is written is not how the mesh normalises paths. `None` if it need not be.
pub fn renormalised(head: &RequestHead, normalization: Normalization) -> Result<Option<RequestHead>, BadPath> {
    let path = head.path();
    let normal = normalise_path(path)?;
    if normal.is_none() && normalization == Normalization::Base {
        return Ok(None);
    }
    let mut text = normal.unwrap_or_else(|| path.to_owned());
    if normalization == Normalization::DecodeAndMergeSlashes && text.contains('%') {
        for escaped in ["%2f", "%2F", "%5c", "%5C"] {
            text = text.replace(escaped, "/");
        }
        // Segments that were hidden may be dot segments.
        text = normalise_path(&text)?.unwrap_or(text);
    }
    while normalization != Normalization::Base && text.contains("//") {
        text = text.replace("//", "/");
    }
    if text == path {
        return Ok(None);
    }
    let target = head.query().map_or(text.clone(), |q| format!("{text}?{q}"));
    let target = RequestTarget::try_from(target).map_err(|_| BadPath::NotAbsolute)?;
    Ok(Some(RequestHead { target, ..head.clone() }))
}

/// The value of a cookie, which may be of any bytes.
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    headers.get_all(http::header::COOKIE).iter().find_map(|line| {
        line.as_bytes().split(|b| *b == b';').find_map(|pair| {
            let value = pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            Some(value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value))
        })
    })
}

/// Why a path cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadPath {
    /// It has a fragment, which no request target may have.
    Fragment,
    /// It is not an absolute path.
    NotAbsolute,
    /// It has a NUL, encoded.
    Nul,
}

/// Normalises a path as Envoy does where Istio asks it to, which is the default: dot segments are removed (also with parameters after a
/// `;`, and those above the root), percent-encoded unreserved characters decoded, `\` taken for `/`, and characters that no path may
/// have encoded. Slashes are not merged and `%2f` stays. RFC 3986 sections 5.2.4 and 6.2.2.
///
/// `None` means that the path is normal already, which most are.
pub fn normalise_path(path: &str) -> Result<Option<String>, BadPath> {
    if path.contains('#') {
        return Err(BadPath::Fragment);
    }
    if !path.starts_with('/') {
        return Err(BadPath::NotAbsolute);
    }
    if !path.bytes().any(|b| b == b'%' || is_illegal(b)) && !path.contains("/.") {
        return Ok(None);
    }
    if path.contains("%00") {
        return Err(BadPath::Nul);
    }
    let mut out: Vec<String> = Vec::new();
    let mut segments = path[1..].split(['/', '\\']).peekable();
    while let Some(raw) = segments.next() {
        let last = segments.peek().is_none();
        let segment = decode_unreserved(raw);
        // Of what was encoded as well, so that who normalises a path again changes nothing.
        match segment.split_once(';').map_or(&*segment, |(name, _)| name) {
            "." => {}
            ".." => drop(out.pop()),
            _ => {
                out.push(segment);
                continue;
            }
        }
        if last {
            out.push(String::new());
        }
    }
    let normal = format!("/{}", out.join("/"));
    Ok((normal != path).then_some(normal))
}

/// Characters that are not as they are in a path (beside `%`, which may be).
fn is_illegal(byte: u8) -> bool {
    matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' | 0x80..)
}

/// A segment with what is unreserved decoded, and what is illegal encoded.
fn decode_unreserved(segment: &str) -> String {
    let bytes = segment.as_bytes();
    let hex = |at: usize| bytes.get(at..at + 2).filter(|two| two.iter().all(u8::is_ascii_hexdigit));
    let mut out = String::with_capacity(segment.len());
    // Percent signs that begin no escape, by where they are now.
    let mut strays = Vec::new();
    let mut at = 0;
    let mut plain = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        if byte != b'%' && !is_illegal(byte) {
            at += 1;
            continue;
        }
        // Between two of the bytes of one character there is nothing to cut at.
        if plain < at {
            out.push_str(&segment[plain..at]);
        }
        let code = hex(at + 1).and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        match code {
            _ if byte != b'%' => {
                out.push('%');
                out.extend([byte >> 4, byte & 0xf].map(|digit| char::from(b"0123456789ABCDEF"[usize::from(digit)])));
                at += 1;
            }
            Some(code) if code.is_ascii_alphanumeric() || b"-._~".contains(&code) => {
                out.push(char::from(code));
                at += 3;
            }
            Some(_) => {
                out.push_str(&segment[at..at + 3]);
                at += 3;
            }
            None => {
                strays.push(out.len());
                out.push('%');
                at += 1;
            }
        }
        plain = at;
    }
    out.push_str(&segment[plain..]);
    // What has been decoded behind one must not make an escape of it.
    for stray in strays.into_iter().rev() {
        if out.as_bytes().get(stray + 1..stray + 3).is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit)) {
            out.insert_str(stray + 1, "25");
        }
    }
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
            ("/..", Ok(Some("/"))),
            ("/../../b", Ok(Some("/b"))),
            ("/a//../b", Ok(Some("/a/b"))),
            ("/a/..;x/b", Ok(Some("/b"))),
            ("/a/.;", Ok(Some("/a/"))),
            ("/a/%2e%2e;/b", Ok(Some("/b"))),
            ("/a/..:/b", Ok(None)),
            ("/a/..%2fb", Ok(None)),
            ("/%00", Err(BadPath::Nul)),
            ("/\"<>^`{|}", Ok(Some("/%22%3C%3E%5E%60%7B%7C%7D"))),
            ("/[a]'!$&()*+,=:@", Ok(None)),
            ("/\u{e1}dm\u{20ac}", Ok(Some("/%C3%A1dm%E2%82%AC"))),
            ("/a/../\u{e1}%2e\u{e1}", Ok(Some("/%C3%A1.%C3%A1"))),
            ("/%2%65", Ok(Some("/%252e"))),
            ("/%%41", Ok(Some("/%A"))),
            ("/a%%2e", Ok(Some("/a%."))),
            ("/%7e%2D%c3%A9", Ok(Some("/~-%c3%A9"))),
            ("/a/%2e%2e/b", Ok(Some("/b"))),
            ("/a\\b", Ok(Some("/a/b"))),
            ("/a%zz", Ok(None)),
            ("/a%", Ok(None)),
            ("/a%%325e", Ok(Some("/a%2525e"))),
            ("/%252e%252e/b", Ok(None)),
            ("/direct/y#frag", Err(BadPath::Fragment)),
            ("relative", Err(BadPath::NotAbsolute)),
        ];
        for (path, expected) in cases {
            assert_eq!(normalise_path(path), expected.map(|o| o.map(str::to_owned)), "{path}");
            if let Ok(Some(normal)) = expected {
                assert_eq!(normalise_path(normal), Ok(None), "{path} twice");
            }
        }
    }

    #[test]
    fn other_readings_are_found() {
        for (path, expected) in [
            ("/a/b", &[][..]),
            ("//admin", &["/admin"]),
            ("/public/..%2fadmin", &["/admin"]),
            ("/public/..;/admin", &["/admin"]),
            ("/public/%252e%252e/admin", &["/admin"]),
            ("/a;jsessionid=1", &["/a"]),
            ("/%61dmin%5cx", &["/admin/x"]),
            ("/a%20b", &["/a b"]),
            ("/a/../b", &["/b"]),
            ("//admin/..;/x", &["/admin/..;/x", "/x", "//x"]),
            ("/public/..%2fadmin/..;/..;/public/x", &["/admin/..;/..;/public/x", "/public/x"]),
            ("/a%", &[]),
        ] {
            let mut found = other_readings(path);
            found.sort();
            let mut expected = expected.to_vec();
            expected.sort_unstable();
            for wanted in &expected {
                assert!(found.iter().any(|f| f == wanted), "{path}: {found:?} lacks {wanted}");
            }
            assert!(found.is_empty() == expected.is_empty(), "{path}: {found:?}");
        }
    }

    #[test]
    fn query_parameters_and_cookies_are_found() {
        assert_eq!(query_parameter("a=1&b&c=x=y", "c"), Some("x=y"));
        assert_eq!(query_parameter("a=1&b", "b"), Some(""));
        assert_eq!(query_parameter("ab=1", "a"), None);
        for (query, expected) in
            [("a=x%2Ey", Some("x.y")), ("%61=1", Some("1")), ("b&a", Some("")), ("a=%+1%zz%", Some("%+1%zz%")), ("b=a", None)]
        {
            assert_eq!(decoded_parameter(query, "a").as_deref(), expected, "{query}");
        }
        let without = |target: &'static str| without_parameter(&RequestTarget::from_static(target), "a").map(|t| t.to_string());
        assert_eq!(without("/x?%61=1&b=2").as_deref(), Some("/x?b=2"));
        assert_eq!(without("/x?b=2"), None);
        let mut headers = HeaderMap::new();
        headers.append("cookie", HeaderValue::from_static("a=1; session=\"x\""));
        headers.append("cookie", HeaderValue::from_static("b=2"));
        headers.append("cookie", HeaderValue::from_bytes(b"odd=\xe9; after=y; empty=; quotes=\"\"").expect("a value"));
        assert_eq!(cookie(&headers, "session"), Some(&b"x"[..]));
        assert_eq!(cookie(&headers, "b"), Some(&b"2"[..]));
        assert_eq!(cookie(&headers, "after"), Some(&b"y"[..]));
        assert_eq!((cookie(&headers, "empty"), cookie(&headers, "quotes")), (Some(&b""[..]), Some(&b""[..])));
        assert_eq!(cookie(&headers, "c"), None);
    }

    #[test]
    fn grpc_is_known_by_its_content_type() {
        for (kind, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc-web", false),
            ("application/grpc;x", false),
            ("text/plain", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("content-type", HeaderValue::from_static(kind));
            assert_eq!(is_grpc(&headers), expected, "{kind}");
        }
    }
}
