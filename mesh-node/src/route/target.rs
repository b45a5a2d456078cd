//! What a request is for: path and query.

use std::{fmt, str::FromStr, sync::Arc};

use bytes::Bytes;
use http::uri::PathAndQuery;

/// The longest there is, bytes: what the HTTP library takes.
const LONGEST: usize = u16::MAX as usize - 1;

/// Path and query of a request, in origin form (RFC 9112 section 3.2.1). Any visible ASCII but `#`, and UTF-8 beyond it: `"`, `<` and `>`
/// among them, which RFC 3986 wants encoded and clients write all the same. Envoy passes them on as they are.
#[derive(Clone, PartialEq, Eq)]
pub struct RequestTarget(Form);

#[derive(Clone, PartialEq, Eq)]
enum Form {
    Plain(PathAndQuery),
    /// With something the library refuses.
    Odd {
        text: Arc<str>,
        query: Option<usize>,
    },
}

/// A text that is no request target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is no path that begins with /, with a query or without, of visible characters and at most {LONGEST} bytes")]
pub struct NoTarget;

impl RequestTarget {
    /// Panics where the text is none.
    pub fn from_static(text: &'static str) -> Self {
        Self(Form::Plain(PathAndQuery::from_static(text)))
    }

    /// Without a copy where the library takes it.
    pub fn from_shared(text: &Bytes) -> Result<Self, NoTarget> {
        let plain = PathAndQuery::from_maybe_shared(text.clone()).ok().filter(|plain| plain.as_str().len() == text.len());
        plain.map_or_else(|| std::str::from_utf8(text).map_err(|_| NoTarget).and_then(Self::odd), |plain| Ok(Self(Form::Plain(plain))))
    }

    fn odd(text: &str) -> Result<Self, NoTarget> {
        let is_visible = |b: u8| b > b' ' && b != 0x7f && b != b'#';
        if !text.starts_with('/') || text.len() > LONGEST || !text.bytes().all(is_visible) {
            return Err(NoTarget);
        }
        Ok(Self(Form::Odd { text: text.into(), query: text.find('?').map(|at| at + 1) }))
    }

    pub fn as_str(&self) -> &str {
        match &self.0 {
            Form::Plain(plain) => plain.as_str(),
            Form::Odd { text, .. } => text,
        }
    }

    pub fn path(&self) -> &str {
        match &self.0 {
            Form::Plain(plain) => plain.path(),
            Form::Odd { text, query } => &text[..query.map_or(text.len(), |at| at - 1)],
        }
    }

    pub fn query(&self) -> Option<&str> {
        match &self.0 {
            Form::Plain(plain) => plain.query(),
            Form::Odd { text, query } => query.map(|at| &text[at..]),
        }
    }

    /// As the HTTP library sends it: what it does not take is encoded.
    pub fn to_http(&self) -> Option<PathAndQuery> {
        match &self.0 {
            Form::Plain(plain) => Some(plain.clone()),
            Form::Odd { text, .. } => {
                let mut encoded = String::with_capacity(text.len() + 16);
                let mut in_query = false;
                for c in text.chars() {
                    in_query |= c == '?';
                    match c {
                        '<' | '>' => encoded += &format!("%{:02X}", u32::from(c)),
                        '"' if in_query => encoded += "%22",
                        '`' if !in_query => encoded += "%60",
                        c => encoded.push(c),
                    }
                }
                PathAndQuery::try_from(encoded).ok()
            }
        }
    }
}

impl TryFrom<String> for RequestTarget {
    type Error = NoTarget;

    fn try_from(text: String) -> Result<Self, NoTarget> {
        Self::from_shared(&text.into())
    }
}

impl FromStr for RequestTarget {
    type Err = NoTarget;

    fn from_str(text: &str) -> Result<Self, NoTarget> {
        Self::try_from(text.as_bytes())
    }
}

impl TryFrom<&[u8]> for RequestTarget {
    type Error = NoTarget;

    fn try_from(text: &[u8]) -> Result<Self, NoTarget> {
        Self::from_shared(&Bytes::copy_from_slice(text))
    }
}

impl fmt::Display for RequestTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for RequestTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_with_what_the_library_refuses_is_taken_as_it_is() {
        for (text, path, query, sent) in [
            ("/a", "/a", None, "/a"),
            ("/a?", "/a", Some(""), "/a?"),
            ("/a?b=\"c\"", "/a", Some("b=\"c\""), "/a?b=%22c%22"),
            ("/a?<b>", "/a", Some("<b>"), "/a?%3Cb%3E"),
            ("/<a>?b?c", "/<a>", Some("b?c"), "/%3Ca%3E?b?c"),
            ("/<é>", "/<é>", None, "/%3Cé%3E"),
            ("/`?`{x}|^\\&q=<", "/`", Some("`{x}|^\\&q=<"), "/%60?`{x}|^\\&q=%3C"),
        ] {
            let target = text.parse::<RequestTarget>().expect(text);
            assert_eq!((target.as_str(), target.path(), target.query()), (text, path, query));
            assert_eq!(target.to_http().expect(text).as_str(), sent);
        }
        let long = format!("/{}", "a".repeat(LONGEST));
        for text in ["", "a", "*<", "/ <", "/<\u{7f}", "/<#x", "/a#x", "/<\r\n", long.as_str()] {
            assert_eq!(text.parse::<RequestTarget>(), Err(NoTarget), "{text}");
        }
        assert!(RequestTarget::try_from(&b"/<\xff"[..]).is_err());
    }
}
