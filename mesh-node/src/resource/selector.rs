//! Labels and selectors.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use serde::{Deserialize, Deserializer};

/// Labels of an object. Null, as `kubectl` never but hands sometimes write, is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Labels(Arc<BTreeMap<String, String>>);

impl Labels {
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(String, String)> for Labels {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(iter: I) -> Self {
        Self(Arc::new(iter.into_iter().collect()))
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map: Option<BTreeMap<String, String>> = Option::deserialize(deserializer)?;
        Ok(Self(Arc::new(map.unwrap_or_default())))
    }
}

/// Istio's `WorkloadSelector`: every pair must be among the labels; `*` as value asks for the key only.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadSelector {
    #[serde(default)]
    pub match_labels: Labels,
}

impl WorkloadSelector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.match_labels.iter().all(|(k, v)| labels.get(k).is_some_and(|have| v == "*" || have == v))
    }
}

/// Things that are for the workloads a selector matches, found by a workload's labels without a look at each of them.
#[derive(Debug)]
pub struct Selecting<'a, T> {
    /// By a pair that their selectors ask for.
    by_pair: HashMap<(&'a str, &'a str), Vec<Selected<'a, T>>>,
    /// Those whose selectors ask for no value.
    others: Vec<Selected<'a, T>>,
}

#[derive(Debug)]
struct Selected<'a, T> {
    selector: &'a WorkloadSelector,
    thing: T,
}

impl<T> Default for Selecting<'_, T> {
    fn default() -> Self {
        Self { by_pair: HashMap::new(), others: Vec::new() }
    }
}

impl<'a, T: Copy + Ord> Selecting<'a, T> {
    pub fn insert(&mut self, selector: &'a WorkloadSelector, thing: T) {
        let pair = selector.match_labels.iter().find(|(_, value)| *value != "*");
        let place = match pair {
            Some(pair) => self.by_pair.entry(pair).or_default(),
            None => &mut self.others,
        };
        place.push(Selected { selector, thing });
    }

    /// Those for a workload with these labels, the least first.
    pub fn of(&self, labels: &Labels) -> Vec<T> {
        let may = labels.iter().filter_map(|pair| self.by_pair.get(&pair)).flatten().chain(&self.others);
        let mut found = may.filter(|s| s.selector.matches(labels)).map(|s| s.thing).collect::<Vec<_>>();
        found.sort_unstable();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_for_a_workload_is_what_its_selector_matches() {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Labels>();
        let texts: [&[(&str, &str)]; 7] = [
            &[("app", "a")],
            &[],
            &[("app", "a"), ("v", "1")],
            &[("app", "*")],
            &[("app", "*"), ("v", "1")],
            &[("a", "x"), ("app", "a")],
            &[("app", "b")],
        ];
        let selectors = texts.map(|pairs| WorkloadSelector { match_labels: labels(pairs) });
        let mut selecting = Selecting::default();
        selectors.iter().enumerate().rev().for_each(|(i, selector)| selecting.insert(selector, i));
        let workloads: [&[(&str, &str)]; 6] =
            [&[], &[("app", "a")], &[("app", "a"), ("v", "1")], &[("app", "b"), ("a", "x")], &[("v", "1")], &[("a", "x"), ("app", "a")]];
        for workload in workloads.map(labels) {
            let all = (0..selectors.len()).filter(|i| selectors[*i].matches(&workload)).collect::<Vec<_>>();
            assert_eq!(selecting.of(&workload), all, "{workload:?}");
        }
    }
}
