//! Istio's string matching in policies: exact, prefix `abc*`, suffix `*abc`, and `*` for any non-empty value.

use std::{fmt, sync::Arc};

/// A pattern of a policy field.
#[derive(Clone, PartialEq, Eq)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Present,
}

impl StringMatch {
    /// Every text is a pattern; a `*` elsewhere than at one end is literal, as in Istio.
    pub fn parse(text: &str) -> Self {
        if text == "*" {
            Self::Present
        } else if let Some(rest) = text.strip_prefix('*') {
            Self::Suffix(rest.into())
        } else if let Some(rest) = text.strip_suffix('*') {
            Self::Prefix(rest.into())
        } else {
            Self::Exact(text.into())
        }
    }

    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(text) => value == &**text,
            Self::Prefix(text) => value.starts_with(&**text),
            Self::Suffix(text) => value.ends_with(&**text),
            Self::Present => !value.is_empty(),
        }
    }
}

impl fmt::Debug for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => write!(f, "{text}"),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Present => f.write_str("*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_istio_documents() {
        let cases = [
            ("abc", "abc", true),
            ("abc", "abcd", false),
            ("abc*", "abcd", true),
            ("abc*", "xabc", false),
            ("*abc", "xabc", true),
            // Of two stars the first counts.
            ("*abc*", "xabc*", true),
            ("*abc*", "xabcx", false),
            ("*abc", "abcd", false),
            ("*", "x", true),
            ("*", "", false),
            ("", "", true),
            ("a*c", "abc", false),
            ("a*c", "a*c", true),
        ];
        for (pattern, value, expected) in cases {
            assert_eq!(StringMatch::parse(pattern).matches(value), expected, "{pattern} {value}");
        }
    }
}
