//! What is read all the time and seldom changed.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

/// A map that is read without a lock and seldom changed.
#[derive(Debug)]
pub struct Table<K, V> {
    pub entries: ArcSwap<HashMap<K, Arc<V>>>,
    writing: Mutex<()>,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { entries: ArcSwap::from_pointee(HashMap::new()), writing: Mutex::new(()) }
    }
}

impl<K: Clone + Eq + Hash, V> Table<K, V> {
    pub fn get_or_insert(&self, key: &K, make: impl FnOnce() -> V) -> Arc<V> {
        if let Some(found) = self.entries.load().get(key) {
            return found.clone();
        }
        let mut found = None;
        self.change(|entries| found = Some(entries.entry(key.clone()).or_insert_with(|| Arc::new(make())).clone()));
        // Set above, whatever happens.
        found.unwrap_or_else(|| unreachable!("an entry was made"))
    }

    pub fn change(&self, f: impl FnOnce(&mut HashMap<K, Arc<V>>)) {
        let _one_at_a_time = self.writing.lock();
        let mut entries = HashMap::clone(&self.entries.load());
        f(&mut entries);
        self.entries.store(Arc::new(entries));
    }
}
