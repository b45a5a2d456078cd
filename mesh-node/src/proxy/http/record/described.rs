//! What logs, tags and spans say of a request.

use http::{HeaderMap, HeaderValue, Method};

use crate::{
    proxy::http::headers::ORIGINAL_PATH,
    report::{
        entry::Asked,
        kept::{Kept, Wanted},
    },
    route::{request::RequestHead, target::RequestTarget},
};

/// What was asked for. Kept only when somebody will ask about it.
pub struct Described {
    method: Method,
    path: Target,
    /// What it became.
    sent: Option<RequestTarget>,
    authority: HeaderValue,
    scheme: &'static str,
    pub(super) headers: Kept,
    pub(super) response_headers: Option<Kept>,
}

/// What a request was for.
#[derive(Debug)]
enum Target {
    Path(RequestTarget),
    /// What could not be read, as it was written.
    Unread(String),
    /// That of CONNECT is the authority.
    None,
}

impl Target {
    fn of(head: &RequestHead) -> Self {
        if head.method == Method::CONNECT { Self::None } else { Self::Path(head.target.clone()) }
    }

    fn as_str(&self) -> &str {
        match self {
            Self::Path(path) => path.as_str(),
            Self::Unread(text) => text,
            Self::None => "",
        }
    }
}

impl Described {
    pub fn of(head: &RequestHead, wanted: &Wanted) -> Self {
        Self {
            method: head.method.clone(),
            path: Target::of(head),
            sent: None,
            authority: head.authority.clone(),
            scheme: head.scheme.as_str(),
            headers: Kept::of(&head.headers, wanted),
            response_headers: None,
        }
    }

    /// A request as it goes on, which says itself what its path was before.
    pub fn rewritten(head: &RequestHead, wanted: &Wanted) -> Self {
        let before = head.headers.get(&ORIGINAL_PATH).and_then(|path| RequestTarget::try_from(path.as_bytes()).ok());
        let now = Self::of(head, wanted);
        match before {
            Some(path) => Self { path: Target::Path(path), sent: Some(head.target.clone()), ..now },
            None => now,
        }
    }

    /// A request that is refused for what it says.
    pub(super) fn unread(method: &Method, target: &[u8], authority: Option<&HeaderValue>, headers: &HeaderMap) -> Self {
        Self {
            method: method.clone(),
            path: Target::Unread(String::from_utf8_lossy(target).into_owned()),
            sent: None,
            authority: authority.cloned().unwrap_or_else(|| HeaderValue::from_static("")),
            scheme: "http",
            headers: Kept::All(headers.clone()),
            response_headers: None,
        }
    }

    pub(super) fn became(&mut self, head: &RequestHead, wanted: Option<&Wanted>) {
        (self.path, self.authority) = (Target::of(head), head.authority.clone());
        if self.method != head.method {
            self.method = head.method.clone();
        }
        self.keep_again(head, wanted);
    }

    pub(super) fn sent(&mut self, head: &RequestHead, wanted: Option<&Wanted>, changed: bool) {
        let renamed = self.authority != head.authority;
        if renamed {
            self.authority = head.authority.clone();
        }
        if let Target::Path(path) = &self.path
            && *path != head.target
        {
            self.sent = Some(head.target.clone());
        }
        // With another authority comes a header that says so.
        if changed || renamed {
            self.keep_again(head, wanted);
        }
    }

    fn keep_again(&mut self, head: &RequestHead, wanted: Option<&Wanted>) {
        self.headers = match (&self.headers, wanted) {
            (Kept::Some(_), Some(wanted)) => Kept::of(&head.headers, wanted),
            _ => Kept::All(head.headers.clone()),
        };
    }

    pub fn asked(&self) -> Asked<'_> {
        Asked {
            method: self.method.as_str(),
            path: self.path.as_str(),
            sent_path: self.sent.as_ref().map_or_else(|| self.path.as_str(), RequestTarget::as_str),
            authority: self.authority.to_str().unwrap_or_default(),
            scheme: self.scheme,
            headers: &self.headers,
        }
    }
}
