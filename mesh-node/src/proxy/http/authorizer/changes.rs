//! What an authorizer has changed: headers of a request and of its answer, and the request's query, as Envoy's `ext_authz` does it.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::route::{request::take_off, target::RequestTarget};

/// How a header is put among others of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Beside them.
    Append,
    /// Only if there are none.
    IfAbsent,
    /// In place of them.
    Set,
    /// In place of them, if there are any.
    IfPresent,
}

/// Changes to the answer that a client gets.
#[derive(Debug, Default)]
pub struct ToClient(Vec<(HeaderName, HeaderValue, How)>);

impl ToClient {
    pub fn push(&mut self, name: HeaderName, value: HeaderValue, how: How) {
        self.0.push((name, value, how));
    }

    pub fn extend(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn apply(&self, headers: &mut HeaderMap) {
        for (name, value, how) in &self.0 {
            match how {
                How::Append => drop(headers.append(name.clone(), value.clone())),
                How::IfAbsent if headers.contains_key(name) => {}
                How::IfPresent if !headers.contains_key(name) => {}
                How::IfAbsent | How::Set | How::IfPresent => drop(headers.insert(name.clone(), value.clone())),
            }
        }
    }
}

/// Lengthens the first value of a header by another; one that is not there is not added.
pub fn lengthen(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    let between: &[u8] = if name == header::COOKIE { b"; " } else { b"," };
    if let Some(first) = headers.get_mut(name)
        && let Ok(longer) = HeaderValue::from_bytes(&[first.as_bytes(), between, value.as_bytes()].concat())
    {
        *first = longer;
    }
}

/// Takes headers off; neither pseudo headers nor the host can be.
pub fn remove<'a>(headers: &mut HeaderMap, names: impl Iterator<Item = &'a str>) {
    for name in names.map(str::trim).filter(|name| !name.eq_ignore_ascii_case("host")) {
        // What is no name of a header is none that there is.
        let _ = HeaderName::try_from(name).ok().and_then(|name| take_off(headers, &name));
    }
}

/// A target with parameters set and removed, which puts all of them in the order of their names; none when that is no target.
pub fn with_parameters<'a>(
    target: &'a RequestTarget,
    set: impl Iterator<Item = (&'a str, &'a str)>,
    removed: impl Iterator<Item = &'a str>,
) -> Option<RequestTarget> {
    let mut all: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for parameter in target.query().unwrap_or_default().split('&').filter(|p| !p.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        all.entry(name).or_default().push(value);
    }
    for (name, value) in set {
        all.insert(name, vec![value]);
    }
    for name in removed {
        all.remove(name);
    }
    let query = all.iter().flat_map(|(name, values)| values.iter().map(move |value| format!("{}={}", query(name), query(value))));
    let query = query.collect::<Vec<_>>().join("&");
    let path = target.path();
    RequestTarget::try_from(if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") }).ok()
}

/// What an authorizer may write into a query as it means it: what cannot stand in one is escaped, and what separates parameters stays.
fn query(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'#' | b'"' | b'<' | b'>') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// Text of bytes that may be none: a `!` for each that is not.
pub fn text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| '!'));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_set_and_removed() {
        for (target, set, removed, expected) in [
            ("/x?b=1&a=2", &[][..], &["none"][..], "/x?a=2&b=1"),
            ("/x?a=1&a=2&c", &[("b", "3")], &[], "/x?a=1&a=2&b=3&c="),
            ("/x?a=1&a=2", &[("a", "3")], &[], "/x?a=3"),
            ("/x?a=1", &[], &["a"], "/x"),
            ("/x", &[("a", "1")], &[], "/x?a=1"),
        ] {
            let target = target.parse().expect("a target");
            let changed = with_parameters(&target, set.iter().copied(), removed.iter().copied());
            assert_eq!(changed.expect("a target").as_str(), expected);
        }
        let target = "/x?q=1".parse().expect("a target");
        let changed = with_parameters(&target, [("a", "a b\u{7f}"), ("x y", "#\u{e9}&%41")].into_iter(), std::iter::once("q"));
        assert_eq!(changed.expect("a target").as_str(), "/x?a=a%20b%7F&x%20y=%23%C3%A9&%41");
    }
}
