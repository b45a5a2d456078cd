//! Istio's string matching in policies: exact, prefix `abc*`, suffix `*abc`, and `*` for any non-empty value.

use std::{fmt, sync::Arc};

/// A pattern of a policy field.
#[derive(Clone, PartialEq, Eq)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Present,
    /// Texts one after the other, with anything between them: of namespaces alone.
    Glob(Arc<[Arc<str>]>),
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

    /// A pattern of a namespace, which Istio makes a regular expression of: a `*` stands for anything, wherever it is.
    pub fn glob(text: &str) -> Self {
        match Self::parse(text) {
            Self::Exact(rest) | Self::Prefix(rest) | Self::Suffix(rest) if rest.contains('*') => {
                Self::Glob(text.split('*').map(Arc::from).collect())
            }
            plain => plain,
        }
    }

    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(text) => value == &**text,
            Self::Prefix(text) => value.starts_with(&**text),
            Self::Suffix(text) => value.ends_with(&**text),
            Self::Present => !value.is_empty(),
            Self::Glob(parts) => is_like(parts, value),
        }
    }
}

/// Whether a text begins with the first of these, ends with the last, and has the others between them, in their order.
fn is_like(parts: &[Arc<str>], value: &str) -> bool {
    let [first, between @ .., last] = parts else { return parts.iter().all(|only| **only == *value) };
    let inner = value.strip_prefix(&**first).and_then(|rest| rest.strip_suffix(&**last));
    let found = between.iter().try_fold(inner, |rest, part| rest.and_then(|rest| rest.split_once(&**part)).map(|(_, after)| Some(after)));
    inner.is_some() && found.is_some()
}

impl fmt::Debug for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => write!(f, "{text}"),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Present => f.write_str("*"),
            Self::Glob(parts) => f.write_str(&parts.join("*")),
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

    #[test]
    fn stars_of_namespaces_stand_for_anything() {
        for (pattern, value, expected) in [
            ("*fau*", "default", true),
            ("*fau*", "fau", true),
            ("*fau*", "fa", false),
            ("d*t", "default", true),
            ("d*t", "dt", true),
            ("d*t", "d", false),
            ("aa*aa", "aaa", false),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("a**b", "ab", true),
            ("*", "", false),
            ("de*", "default", true),
            ("default", "default", true),
        ] {
            let glob = StringMatch::glob(pattern);
            assert_eq!(glob.matches(value), expected, "{pattern} {value}");
            assert_eq!(format!("{glob:?}"), pattern);
        }
    }
}
