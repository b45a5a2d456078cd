//! What is wrong with this process that no object of the configuration says: for `meshctl status` and a metric, as long as it lasts.
//!
//! One for the process, like its log: what goes wrong is noticed deep below what tells of it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Most that are told of one kind; there is no more to learn from others.
const MOST: usize = 20;

/// Kinds of problems, as the metric names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Revocation lists cannot be read.
    Revocations,
    /// The state of the authority cannot be read.
    Authority,
    /// Last good versions of manifests cannot be kept.
    LastGood,
    /// A pod has all connections or requests it may have.
    Share,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Revocations, Self::Authority, Self::LastGood, Self::Share];

    pub fn name(self) -> &'static str {
        match self {
            Self::Revocations => "revocation_lists",
            Self::Authority => "certificate_authority",
            Self::LastGood => "last_good_versions",
            Self::Share => "pod_share",
        }
    }
}

#[derive(Debug)]
struct Problem {
    text: String,
    until: Option<Instant>,
}

type Problems = BTreeMap<(Kind, String), Problem>;

static ALL: Mutex<Problems> = Mutex::new(BTreeMap::new());

fn lock() -> MutexGuard<'static, Problems> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something is wrong with `about` until [`solved`] says otherwise.
pub fn found(kind: Kind, about: &str, text: String) {
    put(kind, about, Problem { text, until: None });
}

/// The same of what is over when it is not heard of again for so long; whether that is news.
pub fn found_for(kind: Kind, about: &str, text: String, lasts: Duration) -> bool {
    put(kind, about, Problem { text, until: Some(Instant::now() + lasts) })
}

fn put(kind: Kind, about: &str, problem: Problem) -> bool {
    let mut all = lock();
    let now = Instant::now();
    all.retain(|_, problem| problem.until.is_none_or(|until| until > now));
    let key = (kind, about.to_owned());
    if !all.contains_key(&key) && all.keys().filter(|(k, _)| *k == kind).count() >= MOST {
        return false;
    }
    all.insert(key, problem).is_none()
}

/// It is all right again.
pub fn solved(kind: Kind, about: &str) {
    lock().remove(&(kind, about.to_owned()));
}

/// All there are.
pub fn all() -> Vec<(Kind, String)> {
    let mut all = lock();
    let now = Instant::now();
    all.retain(|_, problem| problem.until.is_none_or(|until| until > now));
    all.iter().map(|((kind, _), problem)| (*kind, problem.text.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(kind: Kind) -> Vec<String> {
        all().into_iter().filter(|(k, _)| *k == kind).map(|(_, text)| text).collect()
    }

    #[test]
    fn problems_last_until_they_are_solved_or_over() {
        found(Kind::Authority, "a", "first".to_owned());
        found(Kind::Authority, "a", "second".to_owned());
        assert_eq!(told(Kind::Authority), ["second"]);
        solved(Kind::Authority, "a");
        assert!(told(Kind::Authority).is_empty());
        assert!(found_for(Kind::Authority, "b", "short".to_owned(), Duration::ZERO));
        assert!(told(Kind::Authority).is_empty());
        assert!(found_for(Kind::Authority, "b", "long".to_owned(), Duration::from_mins(1)));
        assert!(!found_for(Kind::Authority, "b", "long".to_owned(), Duration::from_mins(1)), "no news");
        (0..50).for_each(|n| found(Kind::Authority, &n.to_string(), "many".to_owned()));
        assert_eq!(told(Kind::Authority).len(), MOST);
        (0..50).for_each(|n| solved(Kind::Authority, &n.to_string()));
        solved(Kind::Authority, "b");
    }
}
