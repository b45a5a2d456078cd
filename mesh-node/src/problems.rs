//! What is wrong with this process that no object of the configuration says: for `meshctl status` and a metric, as long as it lasts.
//!
//! One for the process, like its log: what goes wrong is noticed deep below what tells of it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};

/// Most that are told of one kind; there is no more to learn from others.
const MAX_LISTED: usize = 20;

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
    /// A log cannot be written.
    Log,
}

impl Kind {
    pub const ALL: [Self; 5] = [Self::Revocations, Self::Authority, Self::LastGood, Self::Share, Self::Log];

    pub fn name(self) -> &'static str {
        match self {
            Self::Revocations => "revocation_lists",
            Self::Authority => "certificate_authority",
            Self::LastGood => "last_good_versions",
            Self::Share => "pod_share",
            Self::Log => "log",
        }
    }
}

#[derive(Debug)]
struct Problem {
    text: String,
    until: Option<Instant>,
}

/// What was wrong until now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Same,
    /// The same in other words.
    Other,
    /// It is not known: there are too many.
    NoRoom,
}

/// Those there are.
#[derive(Debug)]
struct Problems(Mutex<BTreeMap<(Kind, String), Problem>>);

static ALL: Problems = Problems::new();

impl Problems {
    const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    fn lasting(&self) -> MutexGuard<'_, BTreeMap<(Kind, String), Problem>> {
        let mut all = self.0.lock();
        let now = Instant::now();
        all.retain(|_, problem| problem.until.is_none_or(|until| until > now));
        all
    }

    fn put(&self, kind: Kind, about: &str, problem: Problem) -> Before {
        let mut all = self.lasting();
        let key = (kind, about.to_owned());
        if !all.contains_key(&key) && all.keys().filter(|(k, _)| *k == kind).count() >= MAX_LISTED {
            return Before::NoRoom;
        }
        let text = problem.text.clone();
        match all.insert(key, problem) {
            None => Before::Nothing,
            Some(before) if before.text == text => Before::Same,
            Some(_) => Before::Other,
        }
    }

    fn solved(&self, kind: Kind, about: &str) {
        self.lasting().remove(&(kind, about.to_owned()));
    }

    fn told(&self) -> Vec<(Kind, String)> {
        self.lasting().iter().map(|((kind, _), problem)| (*kind, problem.text.clone())).collect()
    }
}

/// Something is wrong with `about` until [`solved`] says otherwise. Whether that is news, or has been told in other words until now, or may be: of
/// more than are listed nothing is known.
pub fn found(kind: Kind, about: &str, text: String) -> bool {
    ALL.put(kind, about, Problem { text, until: None }) != Before::Same
}

/// The same of what is over when it is not heard of again for so long; whether that is news.
pub fn found_for(kind: Kind, about: &str, text: String, lasts: Duration) -> bool {
    ALL.put(kind, about, Problem { text, until: Some(Instant::now() + lasts) }) == Before::Nothing
}

/// It is all right again.
pub fn solved(kind: Kind, about: &str) {
    ALL.solved(kind, about);
}

/// All there are.
pub fn all() -> Vec<(Kind, String)> {
    ALL.told()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_last_until_they_are_solved_or_over() {
        let problems = Problems::new();
        let found = |about: &str, text: &str, lasts: Option<Duration>| {
            let problem = Problem { text: text.to_owned(), until: lasts.map(|lasts| Instant::now() + lasts) };
            problems.put(Kind::Authority, about, problem)
        };
        let told = || problems.told().into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(["first", "first", "second"].map(|text| found("a", text, None)), [Before::Nothing, Before::Same, Before::Other]);
        assert_eq!(told(), ["second"]);
        problems.solved(Kind::Authority, "a");
        assert!(told().is_empty());
        assert!(found("b", "short", Some(Duration::ZERO)) == Before::Nothing && told().is_empty());
        let long = Some(Duration::from_mins(1));
        assert_eq!([0, 1].map(|_| found("b", "long", long)), [Before::Nothing, Before::Same], "no news");
        (0..50).for_each(|n| assert_eq!(found(&n.to_string(), "many", None) == Before::Nothing, n < 19));
        assert_eq!(told().len(), MAX_LISTED);
    }
}
