//! A routing rule: what it matches and what is done with a request that does. `VirtualService`, `HTTPRoute` and
//! `GRPCRoute` all become these; names of services in them are resolved later.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};

use crate::report::format::Template;

use super::{
    matching::{HttpMatch, TextMatch},
    request::take_off_all,
    retry::RetryPolicy,
};

/// One rule with its matches; of several, the first that matches is used.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// For the log and statistics.
    pub name: Arc<str>,
    /// Its place in the object it is of, from 0.
    pub number: usize,
    /// Any of them; none means always.
    pub matches: Vec<HttpMatch>,
    pub action: Action,
    pub headers: HeaderOperations,
    pub rewrite: Option<Rewrite>,
    /// For the whole exchange, retries and back-off included. `None`: no bound.
    pub timeout: Option<Duration>,
    /// `None`: Istio's default policy.
    pub retries: Option<RetryPolicy>,
    pub fault: Fault,
    pub mirrors: Vec<Mirror>,
    pub cors: Option<Cors>,
    /// Gateway API answers 500 where Istio answers 503 when a destination does not exist.
    pub missing_status: StatusCode,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// To one of these, by weight.
    Forward(Vec<Weighted>),
    Redirect(Redirect),
    Respond(DirectResponse),
    /// Takes its rules from another `VirtualService`: namespace (the same when empty) and name.
    Delegate {
        namespace: Arc<str>,
        name: Arc<str>,
    },
}

/// A destination as written: resolved against the namespace of the object it stands in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    pub host: Arc<str>,
    pub subset: Arc<str>,
    pub port: Option<u16>,
    /// Set when the object may not refer to it (a Gateway API reference without a grant, or of a foreign kind).
    pub refused: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    pub weight: u32,
    pub destination: Destination,
    pub headers: HeaderOperations,
    /// It is the only one of its rule as written: what it does to headers is done together with what the rule does. Of several, the one
    /// that is picked comes before the rule, as Istio has Envoy do it.
    pub alone: bool,
    /// Replaces the authority for this destination; the rule's own rewrite wins.
    pub authority: Option<HeaderValue>,
}

/// Changes of the headers of requests and responses.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeaderOperations {
    pub request: HeaderChanges,
    pub response: HeaderChanges,
    /// `host` or `:authority` among the request headers to set or add.
    pub authority: Option<HeaderValue>,
}

/// Removed first, then set (replaced), then added (appended); each in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeaderChanges {
    pub set: Vec<(HeaderName, HeaderText)>,
    pub add: Vec<(HeaderName, HeaderText)>,
    pub remove: Vec<HeaderName>,
}

/// What a header is written with.
#[derive(Debug, Clone, PartialEq)]
pub enum HeaderText {
    Plain(HeaderValue),
    /// What is told of the request; where that is nothing, no header is written.
    Template(Template),
}

/// What a template comes to, with the headers as they are.
pub type Tell<'t> = &'t dyn Fn(&Template, &http::HeaderMap) -> Option<HeaderValue>;

impl HeaderChanges {
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    /// As one with others: Envoy removes, sets and adds each of a list at once.
    fn join(&mut self, mut others: Self) {
        self.set.append(&mut others.set);
        self.add.append(&mut others.add);
        self.remove.append(&mut others.remove);
    }

    /// Whether it tells of the request.
    pub fn tells(&self) -> bool {
        self.set.iter().chain(&self.add).any(|(_, text)| matches!(text, HeaderText::Template(_)))
    }

    /// Everything that is told is told of the headers after the removals.
    pub fn apply(&self, headers: &mut http::HeaderMap, tell: Tell<'_>) {
        if !self.remove.is_empty() {
            take_off_all(headers, |name| self.remove.contains(name));
        }
        let all = self.set.iter().chain(&self.add);
        let told = all.filter_map(|(_, text)| if let HeaderText::Template(template) = text { Some(tell(template, headers)) } else { None });
        let mut told = if self.tells() { told.collect() } else { Vec::new() }.into_iter();
        let mut value = |text: &HeaderText| match text {
            HeaderText::Plain(value) => Some(value.clone()),
            HeaderText::Template(_) => told.next().flatten(),
        };
        for (name, text) in &self.set {
            if let Some(value) = value(text) {
                headers.insert(name, value);
            }
        }
        for (name, text) in &self.add {
            if let Some(value) = value(text) {
                headers.append(name, value);
            }
        }
    }
}

impl Rule {
    /// Whether some of its matches is for every client and port.
    pub fn is_for_all(&self) -> bool {
        self.matches.is_empty() || self.matches.iter().any(HttpMatch::is_for_all)
    }

    /// Whether all it does with a request is to choose where it goes, as it came.
    pub fn passes_on(&self) -> bool {
        let Action::Forward(all) = &self.action else { return false };
        let rewrites = self.rewrite.is_some() || all.iter().any(|d| d.authority.is_some());
        let changes = !self.headers.request.is_empty() || all.iter().any(|d| !d.headers.request.is_empty());
        let answers = self.fault.abort.is_some() || self.fault.delay.is_some() || self.cors.is_some();
        all.iter().any(|d| d.weight > 0) && !rewrites && !changes && !answers && self.mirrors.is_empty()
    }

    /// Makes what a destination that is alone does to headers the rule's own, and the names of its matches those of routes.
    pub fn settle(&mut self) {
        for matched in self.matches.iter_mut().filter(|m| !m.name.is_empty()) {
            matched.name = format!("{}.{}", self.name, matched.name).into();
        }
        if let Action::Forward(all) = &mut self.action
            && let [only] = all.as_mut_slice()
            && only.alone
            && only.weight > 0
        {
            self.headers.request.join(std::mem::take(&mut only.headers.request));
            self.headers.response.join(std::mem::take(&mut only.headers.response));
        }
    }
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rewrite {
    pub path: Option<PathRewrite>,
    pub authority: Option<HeaderValue>,
}

#[derive(Debug, Clone)]
pub enum PathRewrite {
    /// Replaces what the match of the path matched: a prefix, or the whole path.
    Matched(Arc<str>),
    /// Replaces the whole path. Gateway API's `ReplaceFullPath`.
    Full(Arc<str>),
    /// RE2 with `\1` in the substitution; every occurrence is replaced.
    Regex { pattern: regex::bytes::Regex, substitution: Arc<str> },
}

impl PartialEq for PathRewrite {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Matched(a), Self::Matched(b)) | (Self::Full(a), Self::Full(b)) => a == b,
            (Self::Regex { pattern: a, substitution: x }, Self::Regex { pattern: b, substitution: y }) => {
                a.as_str() == b.as_str() && x == y
            }
            _ => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Redirect {
    pub scheme: Option<Arc<str>>,
    pub authority: Option<Arc<str>>,
    pub port: RedirectPort,
    pub path: Option<PathRewrite>,
    pub status: StatusCode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedirectPort {
    /// As the request had it, unless the scheme or host changes.
    Keep,
    /// The well-known port of the scheme, which is not printed.
    FromScheme,
    /// The port the request came to.
    FromRequest,
    Port(u16),
}

#[derive(Debug, Clone, PartialEq)]
pub struct DirectResponse {
    pub status: StatusCode,
    pub body: Bytes,
}

/// A share, in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub struct Share(u32);

impl Share {
    pub const ALL: Self = Self(1_000_000);

    /// From a percentage; `None` outside 0 to 100.
    pub fn percent(value: f64) -> Option<Self> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 1,000,000 fits")]
        (0.0..=100.0).contains(&value).then(|| Self((value * 10_000.0).round() as u32))
    }

    /// From a fraction; `None` above one.
    pub fn fraction(numerator: u32, denominator: u32) -> Option<Self> {
        let share = u64::from(numerator).checked_mul(1_000_000)?.checked_div(u64::from(denominator))?;
        u32::try_from(share).ok().filter(|s| *s <= 1_000_000).map(Self)
    }

    /// In percent.
    pub fn as_percent(self) -> f64 {
        f64::from(self.0) / 10_000.0
    }

    /// Whether this throw of the dice (uniform over all values) is within the share.
    pub fn hit(self, dice: u32) -> bool {
        (u64::from(dice) * 1_000_000) >> 32 < u64::from(self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Fault {
    pub delay: Option<(Duration, Share)>,
    pub abort: Option<(Abort, Share)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    Http(StatusCode),
    /// A gRPC status, in a response with HTTP status 200.
    Grpc(u16),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Mirror {
    pub destination: Destination,
    pub share: Share,
}

/// Istio's `CorsPolicy`.
#[derive(Debug, Clone, PartialEq)]
pub struct Cors {
    pub origins: Vec<TextMatch>,
    pub methods: Option<HeaderValue>,
    pub headers: Option<HeaderValue>,
    pub expose: Option<HeaderValue>,
    pub max_age: Option<HeaderValue>,
    pub credentials: bool,
    /// Preflight requests of other origins go to the application; otherwise they are answered without CORS headers.
    pub forward_unmatched: bool,
}

impl Cors {
    pub fn allows(&self, origin: &[u8]) -> bool {
        self.origins.iter().any(|o| o.matches(origin))
    }
}

/// Which of the weighted destinations a throw of the dice picks. `None` when there is none, or all weigh nothing.
pub fn pick_weighted(weights: impl Iterator<Item = u32> + Clone, dice: u64) -> Option<usize> {
    let total: u64 = weights.clone().map(u64::from).sum();
    if total == 0 {
        return None;
    }
    let mut at = ((u128::from(dice) * u128::from(total)) >> 64) as u64;
    weights.enumerate().find_map(|(i, weight)| {
        if at < u64::from(weight) {
            return Some(i);
        }
        at -= u64::from(weight);
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_kept_within_four_sigma() {
        let mut rng = fastrand::Rng::with_seed(11);
        for weights in [vec![90, 10], vec![1, 1, 1], vec![0, 100], vec![5, 0, 20, 75], vec![100]] {
            let total: u32 = weights.iter().sum();
            let n = 100_000_u32;
            let mut counts = vec![0_u32; weights.len()];
            for _ in 0..n {
                counts[pick_weighted(weights.iter().copied(), rng.u64(..)).expect("some")] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                let p = f64::from(*weight) / f64::from(total);
                let sigma = (f64::from(n) * p * (1.0 - p)).sqrt();
                assert!((f64::from(*count) - f64::from(n) * p).abs() <= 4.0 * sigma, "{weights:?}: {counts:?}");
            }
        }
        assert_eq!(pick_weighted([0, 0].into_iter(), 5), None);
    }

    #[test]
    fn shares_hit_as_often_as_they_say() {
        let mut rng = fastrand::Rng::with_seed(3);
        for percent in [0.0, 0.1, 10.0, 50.0, 100.0] {
            let share = Share::percent(percent).expect("valid");
            let hits = (0..100_000).filter(|_| share.hit(rng.u32(..))).count();
            let sigma = (100_000.0 * percent / 100.0 * (1.0 - percent / 100.0)).sqrt();
            #[expect(clippy::cast_precision_loss, reason = "a small count")]
            let off = (hits as f64 - 1000.0 * percent).abs();
            assert!(off <= 4.0 * sigma, "{percent}: {hits}");
        }
        assert!(Share::percent(100.1).is_none() && Share::percent(-1.0).is_none() && Share::percent(f64::NAN).is_none());
        assert_eq!(Share::fraction(1, 4), Share::percent(25.0));
        assert!(Share::fraction(2, 1).is_none() && Share::fraction(1, 0).is_none());
    }
}
