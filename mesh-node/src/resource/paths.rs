//! Path patterns of policies: Istio's strings with `*` at one end, and its templates with `{*}` and `{**}`.

use std::sync::Arc;

use super::strings::StringMatch;
use crate::route::request::{decode_all, other_readings};

/// A test of a request's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathPattern {
    Text(StringMatch),
    Template(Template),
}

/// `/a/{*}/b/{**}/c`: `{*}` is one segment that is not empty, `{**}` is whatever comes at its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Up to `{**}`; a `None` is a `{*}`.
    segments: Vec<Option<Arc<str>>>,
    /// What follows `{**}`, with its slash; empty when nothing does.
    rest: Option<Arc<str>>,
}

impl std::fmt::Display for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.segments.iter().try_for_each(|segment| write!(f, "/{}", segment.as_deref().unwrap_or("{*}")))?;
        self.rest.iter().try_for_each(|rest| write!(f, "/{{**}}{rest}"))
    }
}

impl PathPattern {
    /// Reads a pattern; the error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("is empty; name a path, or remove it".to_owned());
        }
        if !text.contains(['{', '}']) {
            return Ok(Self::Text(StringMatch::parse(text)));
        }
        let bad = |why: &str| Err(format!("{text:?} is not a path template: {why}"));
        if text.replace("{**}", "").replace("{*}", "").contains('*') {
            return bad("* cannot be combined with {*} or {**}");
        }
        let Some(relative) = text.strip_prefix('/') else { return bad("it must begin with /") };
        let mut segments = Vec::new();
        let mut rest: Option<String> = None;
        for segment in relative.split('/') {
            match (segment, &mut rest) {
                ("{*}" | "{**}", Some(_)) => return bad("nothing but plain segments may follow {**}"),
                ("{*}", None) => segments.push(None),
                ("{**}", None) => rest = Some(String::new()),
                // As in `{**}.txt`.
                (other, None) if other.strip_prefix("{**}").is_some_and(|tail| !tail.contains(['{', '}'])) => {
                    rest = other.strip_prefix("{**}").map(str::to_owned);
                }
                (other, _) if other.contains(['{', '}']) => {
                    return bad("{*} and {**} must be whole segments, but for an end as in {**}.txt, and nothing else may be in braces");
                }
                (other, Some(rest)) => {
                    rest.push('/');
                    rest.push_str(other);
                }
                (other, None) => segments.push(Some(other.into())),
            }
        }
        Ok(Self::Template(Template { segments, rest: rest.map(Arc::from) }))
    }

    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Text(text) => text.matches(path),
            Self::Template(template) => template.matches(path),
        }
    }

    /// What every matching path begins with, and whether that is all of it.
    pub fn prefix(&self) -> Option<(Arc<str>, bool)> {
        match self {
            Self::Text(StringMatch::Exact(text)) => Some((text.clone(), true)),
            Self::Text(StringMatch::Prefix(text)) => Some((text.clone(), false)),
            Self::Text(StringMatch::Suffix(_) | StringMatch::Present | StringMatch::Glob(_)) => None,
            Self::Template(template) => {
                let mut plain = String::new();
                for segment in template.segments.iter().map_while(|s| s.as_deref()) {
                    plain.push('/');
                    plain.push_str(segment);
                }
                Some((plain.into(), false))
            }
        }
    }

    /// The same for paths as applications may read them, where it is written for paths as they are sent: with escapes, parameters or empty
    /// segments.
    pub fn readings(&self) -> Vec<Self> {
        let odd = |text: &str| text.contains(['%', ';']) || text.contains("//");
        let all = |text: &str| if odd(text) { other_readings(text) } else { Vec::new() };
        match self {
            Self::Text(StringMatch::Exact(text)) => all(text).into_iter().map(|t| Self::Text(StringMatch::Exact(t.into()))).collect(),
            Self::Text(StringMatch::Prefix(text)) => all(text).into_iter().map(|t| Self::Text(StringMatch::Prefix(t.into()))).collect(),
            Self::Text(StringMatch::Suffix(text)) if odd(text) => vec![Self::Text(StringMatch::Suffix(decode_all(text).into()))],
            Self::Text(StringMatch::Suffix(_) | StringMatch::Present | StringMatch::Glob(_)) => Vec::new(),
            Self::Template(t) => {
                let decoded = |text: &Arc<str>| decode_all(text).into();
                let segments = t.segments.iter().map(|segment| segment.as_ref().map(decoded)).collect();
                let read = Template { segments, rest: t.rest.as_ref().map(decoded) };
                if read == *t { Vec::new() } else { vec![Self::Template(read)] }
            }
        }
    }
}

impl Template {
    fn matches(&self, path: &str) -> bool {
        let mut left = path;
        for segment in &self.segments {
            let Some(after) = left.strip_prefix('/') else { return false };
            let end = after.find('/').unwrap_or(after.len());
            let (found, next) = after.split_at(end);
            let fits = segment.as_deref().map_or(!found.is_empty(), |s| s == found);
            if !fits {
                return false;
            }
            left = next;
        }
        match &self.rest {
            None => left.is_empty(),
            Some(rest) => left.strip_prefix('/').is_some_and(|left| left.ends_with(&**rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_match_whole_segments() {
        for (pattern, path, expected) in [
            ("/foo/{*}", "/foo/bar", true),
            ("/foo/{*}", "/foo/", false),
            ("/foo/{*}", "/foo", false),
            ("/foo/{*}", "/foo/bar/baz", false),
            ("/{*}/bar", "/foo/bar", true),
            ("/foo/{**}", "/foo/", true),
            ("/foo/{**}", "/foo/bar/baz", true),
            ("/foo/{**}", "/foo", false),
            ("/foo/{**}", "/foobar", false),
            ("/{**}/bar", "/a/b/bar", true),
            ("/foo/{*}/bar/{**}.txt", "/foo/1/bar/x/y.txt", true),
            ("/foo/{*}/bar/{**}.txt", "/foo/1/bar/.txt", true),
            ("/foo/{*}/bar/{**}.txt", "/foo/1/bar/y.txt/x", false),
            ("/foo/{*}/bar/{**}.txt", "/foo/1/bar.txt", false),
            ("/{**}/bar", "/bar", false),
            ("/{*}/x/{**}/end", "/a/x/b/c/end", true),
            ("/{*}/x/{**}/end", "/a/y/b/c/end", false),
            ("/a/{*}/", "/a/b/", true),
            ("/a/{*}/", "/a/b", false),
        ] {
            assert_eq!(PathPattern::parse(pattern).expect("valid").matches(path), expected, "{pattern} {path}");
        }
        for bad in ["", "/a/{*}b", "/a{**}", "/{**}/{*}", "/{**}/a/{**}", "/a*/{*}", "{*}", "/{***}", "/{a}", "/a/{*", "/a/*/{*}"] {
            assert!(PathPattern::parse(bad).is_err(), "{bad}");
        }
    }
}
