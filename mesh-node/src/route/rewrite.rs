//! What a route does to a request's target and headers, and the targets of redirects.

use http::{HeaderMap, HeaderValue};

use super::{
    matching::PathMatch,
    request::RequestHead,
    rule::{PathRewrite, Redirect, RedirectPort, Rule, Weighted},
    target::RequestTarget,
};
use crate::report::{
    entry::{Asked, ORIGINAL_HOST},
    format::Template,
    kept::Kept,
};

/// The path a rewrite makes of a path (without query).
pub fn path(rewrite: &PathRewrite, matched: Option<&PathMatch>, path: &str) -> String {
    let rewritten = match rewrite {
        PathRewrite::Full(new) => new.to_string(),
        PathRewrite::Matched(new) => {
            // A rule that matches without a path takes every one: its prefix is the root.
            let replaced = matched.map_or(1.min(path.len()), |m| m.matched_len(path));
            let rest = path.get(replaced..).unwrap_or_default();
            format!("{new}{rest}")
        }
        PathRewrite::Regex { pattern, substitution } => {
            let replaced = pattern.replace_all(path.as_bytes(), |captures: &regex::bytes::Captures<'_>| substitute(substitution, captures));
            String::from_utf8_lossy(&replaced).into_owned()
        }
    };
    // Whatever was written, a path is absolute.
    let is_left = rewritten.starts_with('/') || rewritten.is_empty() && matches!(rewrite, PathRewrite::Regex { .. });
    if is_left { rewritten } else { format!("/{rewritten}") }
}

/// RE2's substitution: `\0` to `\9` are groups, `\\` is a backslash.
fn substitute(template: &str, captures: &regex::bytes::Captures<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(template.len());
    let mut bytes = template.bytes();
    while let Some(byte) = bytes.next() {
        match (byte, (byte == b'\\').then(|| bytes.clone().next()).flatten()) {
            (b'\\', Some(digit @ b'0'..=b'9')) => {
                bytes.next();
                out.extend_from_slice(captures.get(usize::from(digit - b'0')).map_or(&[][..], |m| m.as_bytes()));
            }
            (b'\\', Some(b'\\')) => {
                bytes.next();
                out.push(b'\\');
            }
            (byte, _) => out.push(byte),
        }
    }
    out
}

/// Applies a rule, and the destination it picked, to a request that is forwarded. Whether the original path is to be told
/// upstream is for the caller: it is returned when it was changed.
pub fn request(
    head: &mut RequestHead,
    rule: &Rule,
    matched: Option<&PathMatch>,
    destination: Option<&Weighted>,
    tell: impl Fn(&Template, Asked<'_>) -> Option<HeaderValue>,
) -> Option<HeaderValue> {
    let RequestHead { method, scheme, authority, target, headers } = &mut *head;
    let tell = |template: &Template, headers: &HeaderMap| {
        let (path, kept) = (target.as_str(), Kept::of(headers, &template.asks().request));
        let authority = authority.to_str().unwrap_or_default();
        tell(template, Asked { method: method.as_str(), path, sent_path: path, authority, scheme: scheme.as_str(), headers: &kept })
    };
    if let Some(destination) = destination {
        destination.headers.request.apply(headers, &tell);
    }
    rule.headers.request.apply(headers, &tell);
    let rewrite = rule.rewrite.as_ref();
    let of_rule = rewrite.and_then(|r| r.authority.as_ref()).or(rule.headers.authority.as_ref());
    let of_destination = destination.and_then(|d| Some((d.authority.as_ref()?, d.alone)));
    if let Some((authority, is_told)) = of_rule.map(|authority| (authority, true)).or(of_destination) {
        let original = std::mem::replace(&mut head.authority, authority.clone());
        // Of one destination among several Envoy says nothing.
        if is_told {
            head.headers.insert(ORIGINAL_HOST.clone(), original);
        }
    }
    let original = HeaderValue::from_str(head.target.as_str()).ok();
    let rewrite = rewrite?.path.as_ref()?;
    let new = path(rewrite, matched, head.path());
    // A pattern that leaves nothing rewrites nothing, for Envoy.
    if new.is_empty() {
        return None;
    }
    let new = match head.query() {
        Some(query) if !new.contains('?') => format!("{new}?{query}"),
        _ => new,
    };
    // What a rewrite makes of a path is a path, unless the operator wrote something that is not; then it stays.
    head.target = RequestTarget::try_from(new).ok()?;
    original
}

/// The `location` of a redirect. `port` is the one the request came to.
pub fn location(redirect: &Redirect, matched: Option<&PathMatch>, head: &RequestHead, port: u16) -> String {
    let scheme = redirect.scheme.as_deref().unwrap_or(head.scheme.as_str());
    let (host, own_port) = split_port(head.host());
    let given = redirect.authority.as_deref();
    let host = given.unwrap_or(host);
    // Which port is a scheme's own is decided where the route is written, for Istio: it knows no other scheme there than the redirect's.
    let written = well_known(redirect.scheme.as_deref().unwrap_or("http"));
    let proto = head.forwarded_proto();
    let kept = || {
        // The old scheme's own port does not go with the new one.
        own_port.filter(|p| given.is_none() && (scheme == proto || *p != well_known(proto)))
    };
    let printed = match redirect.port {
        RedirectPort::Port(port) => Some(port).filter(|p| *p != written),
        RedirectPort::FromRequest if port != written => Some(port),
        RedirectPort::FromRequest | RedirectPort::Keep => kept(),
        RedirectPort::FromScheme => None,
    };
    let path = redirect.path.as_ref().map_or_else(|| head.path().to_owned(), |p| self::path(p, matched, head.path()));
    let path = if path.is_empty() { "/".to_owned() } else { path };
    let query = head.query().filter(|_| !path.contains('?'));
    let mut location = format!("{scheme}://{host}");
    if let Some(port) = printed {
        location += &format!(":{port}");
    }
    location += &path;
    if let Some(query) = query {
        location += "?";
        location += query;
    }
    location
}

fn well_known(scheme: &str) -> u16 {
    if scheme == "https" { 443 } else { 80 }
}

/// Host and port of an authority; an IPv6 address keeps its brackets.
pub fn split_port(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && (!host.contains(':') || host.ends_with(']')) => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (authority, None),
        },
        _ => (authority, None),
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method, StatusCode};

    use super::*;
    use crate::route::{matching::compile, request::Scheme};

    fn head(target: &str, host: &str) -> RequestHead {
        RequestHead {
            method: Method::GET,
            scheme: Scheme::Http,
            authority: host.parse().expect("valid"),
            target: target.parse().expect("valid"),
            headers: HeaderMap::new(),
        }
    }

    fn regex(pattern: &str, substitution: &str) -> PathRewrite {
        PathRewrite::Regex { pattern: compile(pattern).expect("valid"), substitution: substitution.into() }
    }

    #[test]
    fn paths_are_rewritten_as_recorded() {
        let prefix = |p: &str| PathMatch::Prefix { path: p.into(), ignore_case: false };
        let exact = |p: &str| PathMatch::Exact { path: p.into(), ignore_case: false };
        let segments = |p: &str| PathMatch::Segments(p.into());
        let to = |p: &str| PathRewrite::Matched(p.into());
        let cases = [
            (to("/p2/"), Some(prefix("/rw_prefix/")), "/rw_prefix/a/echo", "/p2/a/echo"),
            (to("/new"), Some(exact("/old")), "/old", "/new"),
            (to("/v2"), None, "/a/b", "/v2a/b"),
            (to("/xyz"), Some(segments("/foo")), "/foo/bar", "/xyz/bar"),
            (to(""), Some(segments("/foo")), "/foo/bar", "/bar"),
            (to(""), Some(segments("/foo")), "/foo", "/"),
            (to("/xyz"), Some(segments("/foo/")), "/foo/bar", "/xyz/bar"),
            (regex("/([a-z]+)/echo", "/\\1-\\1/echo"), None, "/rw_regex/abc/echo", "/rw_regex/abc-abc/echo"),
            (regex("a", "\\\\\\0"), None, "/a", "/\\a"),
            (PathRewrite::Full("/x".into()), Some(segments("/foo")), "/foo/bar", "/x"),
        ];
        for (rewrite, matched, from, expected) in cases {
            assert_eq!(path(&rewrite, matched.as_ref(), from), expected, "{rewrite:?} of {from}");
        }
    }

    #[test]
    fn the_port_a_request_came_to_is_said_where_it_is_not_the_schemes() {
        let redirect = |scheme: Option<&str>| Redirect {
            scheme: scheme.map(Into::into),
            authority: None,
            port: RedirectPort::FromRequest,
            path: None,
            status: StatusCode::MOVED_PERMANENTLY,
        };
        for (scheme, host, port, expected) in [
            (None, "b", 80, "http://b/a"),
            (None, "b:80", 80, "http://b:80/a"),
            (None, "b", 8080, "http://b:8080/a"),
            (None, "b:80", 8080, "http://b:8080/a"),
            (Some("https"), "b", 80, "https://b:80/a"),
            (Some("https"), "b:80", 443, "https://b/a"),
        ] {
            assert_eq!(location(&redirect(scheme), None, &head("/a", host), port), expected, "{scheme:?} {host} {port}");
        }
    }

    #[test]
    fn redirects_point_where_recorded() {
        let plain = Redirect { scheme: None, authority: None, port: RedirectPort::Keep, path: None, status: StatusCode::MOVED_PERMANENTLY };
        let cases = [
            (Redirect { scheme: Some("https".into()), ..plain.clone() }, "/a/b?q=1", "svc.example", "https://svc.example/a/b?q=1"),
            (Redirect { scheme: Some("https".into()), ..plain.clone() }, "/a", "svc.example:80", "https://svc.example/a"),
            (Redirect { scheme: Some("https".into()), ..plain.clone() }, "/a", "svc.example:8080", "https://svc.example:8080/a"),
            (Redirect { authority: Some("o.example".into()), ..plain.clone() }, "/a/b?q=1", "svc.example:80", "http://o.example/a/b?q=1"),
            (
                Redirect { path: Some(PathRewrite::Full("/n".into())), ..plain.clone() },
                "/a/b?q=1",
                "svc.example",
                "http://svc.example/n?q=1",
            ),
            (Redirect { path: Some(PathRewrite::Full("/n?z=2".into())), ..plain.clone() }, "/a?q=1", "s:81", "http://s:81/n?z=2"),
            (Redirect { port: RedirectPort::Port(8443), ..plain.clone() }, "/a", "svc.example", "http://svc.example:8443/a"),
            (Redirect { port: RedirectPort::FromRequest, ..plain.clone() }, "/a", "svc.example", "http://svc.example:9080/a"),
            (Redirect { port: RedirectPort::FromRequest, ..plain.clone() }, "/a", "svc.example:80", "http://svc.example:9080/a"),
            (
                Redirect { scheme: Some("https".into()), port: RedirectPort::Port(443), ..plain.clone() },
                "/a",
                "svc.example:9080",
                "https://svc.example/a",
            ),
            (
                Redirect { path: Some(regex("^/redir_regex/(\\w+)", "/r/\\1/z")), ..plain },
                "/redir_regex/a/b?q=1",
                "svc.example",
                "http://svc.example/r/a/z/b?q=1",
            ),
        ];
        for (redirect, target, host, expected) in cases {
            assert_eq!(location(&redirect, None, &head(target, host), 9080), expected);
        }
    }

    /// What ends TLS before the mesh says so, and the port of the mesh's own service is no port of its.
    #[test]
    fn redirects_behind_what_ends_tls_do_not_point_at_the_port_inside() {
        let to = |scheme: Option<&str>, authority: Option<&str>, port| Redirect {
            scheme: scheme.map(Into::into),
            authority: authority.map(Into::into),
            port,
            path: None,
            status: StatusCode::MOVED_PERMANENTLY,
        };
        for (redirect, host, port, expected) in [
            (to(None, None, RedirectPort::FromRequest), "w.example", 80, "https://w.example/a"),
            (to(None, None, RedirectPort::FromRequest), "w.example:8443", 80, "https://w.example:8443/a"),
            (to(None, None, RedirectPort::FromRequest), "w.example", 8080, "https://w.example:8080/a"),
            (to(None, None, RedirectPort::FromRequest), "w.example", 443, "https://w.example:443/a"),
            (to(None, None, RedirectPort::Port(80)), "w.example", 9080, "https://w.example/a"),
            (to(None, Some("o.example:81"), RedirectPort::FromRequest), "w.example", 80, "https://o.example:81/a"),
            (to(Some("http"), None, RedirectPort::Keep), "w.example:443", 80, "http://w.example/a"),
            (to(Some("http"), None, RedirectPort::Keep), "w.example:80", 80, "http://w.example:80/a"),
        ] {
            for scheme in [Scheme::Https, Scheme::Http] {
                let mut asked = RequestHead { scheme, ..head("/a", host) };
                asked.headers.insert("x-forwarded-proto", HeaderValue::from_static("https"));
                let expected = if scheme == Scheme::Http && redirect.scheme.is_none() {
                    expected.replace("https:", "http:")
                } else {
                    expected.to_owned()
                };
                assert_eq!(location(&redirect, None, &asked, port), expected, "{redirect:?} {host} {port} {scheme:?}");
            }
        }
    }

    #[test]
    fn authorities_are_split_at_their_port() {
        for (authority, expected) in [
            ("a", ("a", None)),
            ("a:80", ("a", Some(80))),
            ("[::1]:80", ("[::1]", Some(80))),
            ("[::1]", ("[::1]", None)),
            ("a:x", ("a:x", None)),
        ] {
            assert_eq!(split_port(authority), expected);
        }
    }
}
