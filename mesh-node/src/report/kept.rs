//! Headers that are kept until a request is over: those that somebody will ask about.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    attributes::HeadersOf,
    entry::{Header, X_REQUEST_ID},
};

/// Which headers will be asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Any.
    All,
    /// These; each is named once.
    These(Vec<HeaderName>),
}

impl Default for Wanted {
    fn default() -> Self {
        Self::These(Vec::new())
    }
}

impl Wanted {
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    fn one_more(&mut self, name: HeaderName) {
        if let Self::These(names) = self
            && !names.contains(&name)
        {
            // What is cloned for each request is better a name that costs nothing to clone.
            names.push(if name == X_REQUEST_ID { X_REQUEST_ID.clone() } else { name });
        }
    }
}

/// Which headers will be asked about, of requests and of responses, and what else is not kept unless it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Asks {
    pub request: Wanted,
    pub response: Wanted,
    /// What comes behind the body of an answer.
    pub trailers: bool,
    /// Which workload is at the other end.
    pub peers: bool,
    /// Who the two ends of a connection have proved to be.
    pub identities: bool,
}

impl Asks {
    /// One more header; a pseudo-header is no header.
    pub(super) fn for_one(&mut self, whose: HeadersOf, header: &Header) {
        match (self.of(whose), header) {
            (Some(wanted), Header::Named(name)) => wanted.one_more(name.clone()),
            (Some(_), _) => {}
            (None, _) => self.trailers = true,
        }
    }

    pub(super) fn for_all(&mut self, whose: HeadersOf) {
        match self.of(whose) {
            Some(wanted) => *wanted = Wanted::All,
            None => self.trailers = true,
        }
    }

    /// All that others ask about, too.
    pub(super) fn join(&mut self, others: &Self) {
        for (own, theirs) in [(&mut self.request, &others.request), (&mut self.response, &others.response)] {
            match theirs {
                Wanted::All => *own = Wanted::All,
                Wanted::These(names) => names.iter().for_each(|name| own.one_more(name.clone())),
            }
        }
        self.trailers |= others.trailers;
        self.peers |= others.peers;
        self.identities |= others.identities;
    }

    /// Of trailers all are kept, or none.
    fn of(&mut self, whose: HeadersOf) -> Option<&mut Wanted> {
        match whose {
            HeadersOf::Request => Some(&mut self.request),
            HeadersOf::Response => Some(&mut self.response),
            HeadersOf::Trailers => None,
        }
    }
}

/// Headers as they were.
#[derive(Debug, Clone)]
pub enum Kept {
    All(HeaderMap),
    /// Those that were wanted and there: few, so that looking through them is fastest.
    Some(Vec<(HeaderName, HeaderValue)>),
}

impl Kept {
    /// What is wanted of them.
    pub fn of(headers: &HeaderMap, wanted: &Wanted) -> Self {
        match wanted {
            Wanted::All => Self::All(headers.clone()),
            Wanted::These(names) => {
                let mut kept = Vec::with_capacity(names.len());
                for name in names {
                    kept.extend(headers.get_all(name).iter().map(|value| (name.clone(), value.clone())));
                }
                Self::Some(kept)
            }
        }
    }

    /// The first of this name.
    pub fn get(&self, name: &HeaderName) -> Option<&HeaderValue> {
        match self {
            Self::All(all) => all.get(name),
            Self::Some(some) => some.iter().find(|(n, _)| n == name).map(|(_, value)| value),
        }
    }

    /// All of this name.
    pub fn all<'a>(&'a self, name: &HeaderName) -> impl Iterator<Item = &'a HeaderValue> {
        let (all, some) = match self {
            Self::All(all) => (Some(all.get_all(name).iter()), None),
            Self::Some(some) => (None, Some(some.iter().filter(move |(n, _)| n == name).map(|(_, value)| value).collect::<Vec<_>>())),
        };
        all.into_iter().flatten().chain(some.into_iter().flatten())
    }

    /// The names there are; of some, each as often as it is there.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let (all, some) = match self {
            Self::All(all) => (Some(all.keys()), None),
            Self::Some(some) => (None, Some(some.iter().map(|(name, _)| name))),
        };
        all.into_iter().flatten().chain(some.into_iter().flatten()).map(ToString::to_string)
    }

    /// One more, where there is none of its name.
    pub fn add(&mut self, name: HeaderName, value: HeaderValue) {
        match self {
            Self::All(all) => drop(all.entry(name).or_insert(value)),
            Self::Some(some) => {
                if !some.iter().any(|(n, _)| *n == name) {
                    some.push((name, value));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_is_kept() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("a", "1"), ("b", "2"), ("a", "3")] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let [a, b, c] = ["a", "b", "c"].map(HeaderName::from_static);
        let mut asks = Asks::default();
        assert!(asks.request.is_none());
        for name in ["c", "a", "a", ":path"] {
            asks.for_one(HeadersOf::Request, &Header::named(name).expect("a name"));
        }
        assert_eq!((&asks.request, &asks.response), (&Wanted::These(vec![c.clone(), a.clone()]), &Wanted::default()));
        let mut some = Kept::of(&headers, &asks.request);
        assert_eq!((some.get(&a).map(HeaderValue::as_bytes), some.get(&b), some.get(&c)), (Some(&b"1"[..]), None, None));
        asks.for_all(HeadersOf::Request);
        asks.for_one(HeadersOf::Request, &Header::Named(b.clone()));
        assert_eq!(asks.request, Wanted::All);
        let mut all = Kept::of(&headers, &asks.request);
        for kept in [&mut some, &mut all] {
            kept.add(c.clone(), HeaderValue::from_static("4"));
            kept.add(a.clone(), HeaderValue::from_static("5"));
            assert_eq!([&a, &c].map(|n| kept.get(n).map(HeaderValue::as_bytes)), [Some(&b"1"[..]), Some(b"4")]);
        }
        assert!(all.get(&b).is_some());
    }
}
