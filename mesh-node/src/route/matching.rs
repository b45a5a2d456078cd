//! What a route asks of a request. Semantics of Istio's `HTTPMatchRequest` and of Gateway API's matches.

use std::{fmt, sync::Arc};

use http::{HeaderName, HeaderValue, header::GetAll};

use super::{
    Workload,
    re2::translate,
    request::{RequestHead, query_parameter},
};
use crate::{policy::Verified, resource::selector::Labels};

/// Size bound of one compiled regular expression, bytes: an operator's pattern must not take the node's memory.
const REGEX_SIZE: usize = 4 * 1024 * 1024;

/// A regular expression that matches whole values, in RE2's syntax and sense, byte by byte.
#[derive(Clone)]
pub struct Pattern {
    text: Arc<str>,
    whole: regex::bytes::Regex,
}

impl Pattern {
    /// Compiles; the error says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        Ok(Self { text: text.into(), whole: build(&format!("^(?:{})$", translate(text)?))? })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn matches(&self, value: &[u8]) -> bool {
        self.whole.is_match(value)
    }

    /// Whether it matches everything, as Istio writes it.
    pub fn is_catch_all(&self) -> bool {
        &*self.text == ".*"
    }
}

/// Compiles RE2 syntax, unanchored.
pub fn compile(text: &str) -> Result<regex::bytes::Regex, String> {
    build(&translate(text)?)
}

fn build(text: &str) -> Result<regex::bytes::Regex, String> {
    let built = regex::bytes::RegexBuilder::new(text).unicode(false).size_limit(REGEX_SIZE).build();
    built.map_err(|e| e.to_string().lines().last().unwrap_or("is not a regular expression").trim().to_owned())
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

/// A test of one value. Case-sensitive.
#[derive(Debug, Clone, PartialEq)]
pub enum TextMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Regex(Pattern),
    /// Written `{}` or as the pattern `*`.
    Present,
}

impl TextMatch {
    pub fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => value == text.as_bytes(),
            Self::Prefix(text) => value.starts_with(text.as_bytes()),
            Self::Regex(pattern) => pattern.matches(value),
            Self::Present => true,
        }
    }
}

/// A test of the path, without its query.
#[derive(Debug, Clone, PartialEq)]
pub enum PathMatch {
    Exact {
        path: Arc<str>,
        ignore_case: bool,
    },
    /// Plain text prefix: `/foo` also matches `/foobar`.
    Prefix {
        path: Arc<str>,
        ignore_case: bool,
    },
    /// Whole segments: `/foo` matches `/foo` and `/foo/bar` only. Gateway API.
    Segments(Arc<str>),
    Regex(Pattern),
}

impl PathMatch {
    pub fn matches(&self, path: &str) -> bool {
        let starts = |path: &str, prefix: &str| path.get(..prefix.len()).is_some_and(|p| p.eq_ignore_ascii_case(prefix));
        match self {
            Self::Exact { path: wanted, ignore_case: false } => path == &**wanted,
            Self::Exact { path: wanted, ignore_case: true } => path.eq_ignore_ascii_case(wanted),
            Self::Prefix { path: wanted, ignore_case: false } => path.starts_with(&**wanted),
            Self::Prefix { path: wanted, ignore_case: true } => starts(path, wanted),
            Self::Segments(wanted) => segments(path, wanted).is_some(),
            Self::Regex(pattern) => pattern.matches(path.as_bytes()),
        }
    }

    /// What of a matching path a prefix rewrite replaces: the prefix, or the whole path.
    pub fn matched_len(&self, path: &str) -> usize {
        match self {
            Self::Prefix { path: prefix, .. } => prefix.len(),
            Self::Segments(prefix) => prefix.trim_end_matches('/').len(),
            Self::Exact { .. } | Self::Regex(_) => path.len(),
        }
        .min(path.len())
    }
}

/// The rest of a path after a prefix of whole segments.
fn segments<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(prefix.trim_end_matches('/'))?;
    (rest.is_empty() || rest.starts_with('/')).then_some(rest)
}

/// What of a request is looked at as if it were a header.
#[derive(Debug, Clone, PartialEq)]
pub enum Matched {
    Header(HeaderName),
    /// As `host`, too.
    Authority,
    Method,
    /// With its query.
    Path,
    Scheme,
}

impl Matched {
    /// By a header's name, or a pseudo-header's.
    pub fn of(name: &str) -> Option<Self> {
        Some(match name {
            ":authority" => Self::Authority,
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":scheme" => Self::Scheme,
            name => Self::named(HeaderName::from_bytes(name.as_bytes()).ok()?),
        })
    }

    /// What of a request it is, where that is no header.
    pub fn pseudo<'r>(&self, request: &'r RequestHead) -> Option<&'r [u8]> {
        Some(match self {
            Self::Header(_) => return None,
            Self::Authority => request.authority.as_bytes(),
            Self::Method => request.method.as_str().as_bytes(),
            Self::Path => request.target.as_str().as_bytes(),
            Self::Scheme => request.scheme.as_str().as_bytes(),
        })
    }

    pub fn named(name: HeaderName) -> Self {
        if name == http::header::HOST { Self::Authority } else { Self::Header(name) }
    }
}

impl fmt::Display for Matched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header(name) => name.as_str(),
            Self::Authority => ":authority",
            Self::Method => ":method",
            Self::Path => ":path",
            Self::Scheme => ":scheme",
        })
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct HeaderMatch {
    pub of: Matched,
    pub value: TextMatch,
    /// `withoutHeaders`: must not match. A header that is not there counts as empty, unless presence is asked about.
    pub inverted: bool,
}

impl HeaderMatch {
    /// Repeated headers are looked at one by one, as recorded of Envoy.
    fn matches(&self, request: &RequestHead) -> bool {
        match &self.of {
            Matched::Header(name) => self.matches_any(&request.headers.get_all(name)),
            of => of.pseudo(request).is_some_and(|single| self.value.matches(single) != self.inverted),
        }
    }

    fn matches_any(&self, values: &GetAll<'_, HeaderValue>) -> bool {
        let mut values = values.iter().peekable();
        if !self.inverted {
            return values.any(|v| self.value.matches(v.as_bytes()));
        }
        if values.peek().is_none() {
            return matches!(self.value, TextMatch::Present) || !self.value.matches(b"");
        }
        !values.any(|v| self.value.matches(v.as_bytes()))
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct QueryMatch {
    pub name: Arc<str>,
    pub value: TextMatch,
}

impl QueryMatch {
    fn matches(&self, request: &RequestHead) -> bool {
        request.query().and_then(|q| query_parameter(q, &self.name)).is_some_and(|v| self.value.matches(v.as_bytes()))
    }
}

/// Which client workloads and listeners a match is for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SourceMatch {
    pub labels: Labels,
    pub namespace: Option<Arc<str>>,
    /// Empty, or names of gateways; `mesh` is every sidecar and node proxy.
    pub gateways: Vec<Arc<str>>,
}

impl SourceMatch {
    /// When gateways are named, labels and namespace are not looked at, as in Istio.
    pub fn matches(&self, source: &Workload) -> bool {
        if !self.gateways.is_empty() {
            return self.gateways.iter().any(|g| &**g == "mesh");
        }
        let namespace = self.namespace.as_ref().is_none_or(|n| *n == source.name.namespace);
        namespace && self.labels.iter().all(|(k, v)| source.labels.get(k) == Some(v))
    }
}

/// All must hold; an empty one holds always.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HttpMatch {
    /// Told in the access log beside the rule's.
    pub name: Arc<str>,
    pub path: Option<PathMatch>,
    pub scheme: Option<TextMatch>,
    pub method: Option<TextMatch>,
    /// As received, with its port.
    pub authority: Option<TextMatch>,
    pub headers: Vec<HeaderMatch>,
    pub query: Vec<QueryMatch>,
    /// The port of the service the request was sent to.
    pub port: Option<u16>,
    pub source: SourceMatch,
    /// Claims of a token that was verified.
    pub claims: Vec<ClaimMatch>,
}

/// A test of a claim; of a list, one element is enough. Without a verified token there are no claims.
#[derive(Debug, Clone, PartialEq)]
pub struct ClaimMatch {
    pub path: Vec<Arc<str>>,
    pub value: TextMatch,
    pub inverted: bool,
}

impl ClaimMatch {
    fn matches(&self, claims: Option<&Verified>) -> bool {
        let values = claims.map(|c| c.texts(&self.path)).unwrap_or_default();
        values.iter().any(|v| self.value.matches(v.as_bytes())) != self.inverted
    }
}

/// What a request is matched with besides its head.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    pub source: &'a Workload,
    pub port: u16,
    pub claims: Option<&'a Verified>,
}

impl fmt::Display for TextMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => write!(f, "= {text}"),
            Self::Prefix(text) => write!(f, "= {text}*"),
            Self::Regex(pattern) => write!(f, "~ {}", pattern.text),
            Self::Present => f.write_str("is there"),
        }
    }
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let case = |ignore: &bool| if *ignore { " (any case)" } else { "" };
        match self {
            Self::Exact { path, ignore_case } => write!(f, "= {path}{}", case(ignore_case)),
            Self::Prefix { path, ignore_case } => write!(f, "= {path}*{}", case(ignore_case)),
            Self::Segments(path) => write!(f, "= {}/**", path.trim_end_matches('/')),
            Self::Regex(pattern) => write!(f, "~ {}", pattern.text),
        }
    }
}

/// For people: what has to hold, with `and` between.
impl fmt::Display for HttpMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = |inverted: bool| if inverted { "not " } else { "" };
        let mut all = Vec::new();
        all.extend(self.path.iter().map(|p| format!("path {p}")));
        all.extend(self.method.iter().map(|t| format!("method {t}")));
        all.extend(self.authority.iter().map(|t| format!("host {t}")));
        all.extend(self.scheme.iter().map(|t| format!("scheme {t}")));
        all.extend(self.headers.iter().map(|h| format!("{}header {} {}", not(h.inverted), h.of, h.value)));
        all.extend(self.query.iter().map(|q| format!("query {} {}", q.name, q.value)));
        all.extend(self.port.iter().map(|p| format!("port {p}")));
        all.extend(self.source.namespace.iter().map(|n| format!("from namespace {n}")));
        all.extend(self.source.labels.iter().map(|(k, v)| format!("from {k}={v}")));
        all.extend(self.claims.iter().map(|c| format!("{}claim {} {}", not(c.inverted), c.path.join("."), c.value)));
        f.write_str(if all.is_empty() { "everything" } else { "" })?;
        f.write_str(&all.join(" and "))
    }
}

impl HttpMatch {
    pub fn matches(&self, request: &RequestHead, context: Context<'_>) -> bool {
        let text = |test: &Option<TextMatch>, value: &[u8]| test.as_ref().is_none_or(|t| t.matches(value));
        self.path.as_ref().is_none_or(|p| p.matches(request.path()))
            && text(&self.method, request.method.as_str().as_bytes())
            && self.headers.iter().all(|h| h.matches(request))
            && text(&self.authority, request.authority.as_bytes())
            && text(&self.scheme, request.scheme.as_str().as_bytes())
            && self.query.iter().all(|q| q.matches(request))
            && self.is_for(context.source, context.port)
            && self.claims.iter().all(|c| c.matches(context.claims))
    }

    /// Whether it is for requests of a client to a port at all.
    pub fn is_for(&self, source: &Workload, port: u16) -> bool {
        self.port.is_none_or(|p| p == port) && self.source.matches(source)
    }

    /// Whether it is for all clients and ports.
    pub fn is_for_all(&self) -> bool {
        self.port.is_none() && self.source == SourceMatch::default()
    }

    /// Whether it takes every request, so that nothing after it is ever reached.
    pub fn is_catch_all(&self) -> bool {
        let path = match &self.path {
            None => true,
            Some(PathMatch::Prefix { path, .. } | PathMatch::Segments(path)) => &**path == "/",
            Some(PathMatch::Regex(pattern)) => pattern.is_catch_all(),
            Some(PathMatch::Exact { .. }) => false,
        };
        let rest = Self { path: None, name: Arc::default(), ..self.clone() };
        path && rest == Self::default()
    }
}
