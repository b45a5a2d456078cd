//! Tables for consistent hashing. Those of the same endpoints are one, whoever they are for, and stay from one snapshot to the next.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
};

use crate::{balance::Table, config::snapshot::Snapshot, route::traffic::HashTable};

/// Most points of all tables that are larger than they have to be, some 250 MiB. Rules may ask for more than a node has memory for.
const MOST_POINTS: usize = 16 * 1024 * 1024;

type Key = (HashTable, Vec<SocketAddr>);

/// Those of the last snapshot, and of this one.
#[derive(Default)]
pub(super) struct Tables {
    most: usize,
    before: HashMap<Key, Arc<Table>>,
    made: RefCell<HashMap<Key, Arc<Table>>>,
    points: Cell<usize>,
}

impl Tables {
    pub(super) fn after(previous: &Snapshot) -> Self {
        let viewed = previous.views.values().flat_map(HashMap::values);
        let ports = previous.services.iter().chain(viewed).flat_map(|s| &s.ports);
        let clusters = ports.flat_map(|p| std::iter::once(&p.cluster).chain(p.subsets.values()));
        let before = clusters.filter_map(|c| c.table.as_ref()).map(|table| ((table.kind(), table.addresses().to_vec()), table.clone()));
        Self { most: MOST_POINTS, before: before.collect(), ..Self::default() }
    }

    /// The table of these endpoints; of its usual size, where one as large as it is to be finds no room.
    pub(super) fn of(&self, kind: HashTable, addresses: Vec<SocketAddr>) -> Arc<Table> {
        let points = Table::points(kind, &addresses);
        let wanted = (kind, addresses);
        if let Some(same) = self.made.borrow().get(&wanted) {
            return same.clone();
        }
        if points <= Table::points(kind.usual(), &wanted.1) {
            return self.make(wanted);
        }
        let all = self.points.get().saturating_add(points);
        if all > self.most {
            return self.make((kind.usual(), wanted.1));
        }
        self.points.set(all);
        self.make(wanted)
    }

    fn make(&self, key: Key) -> Arc<Table> {
        let table = self.before.get(&key).cloned().unwrap_or_else(|| Arc::new(Table::build(key.0, key.1.clone())));
        self.made.borrow_mut().entry(key).or_insert(table).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_tables_are_one_and_all_together_are_bounded() {
        let tables = Tables { most: 200_000, ..Tables::default() };
        let of = |kind, last: u8| tables.of(kind, (1..=last).map(|i| SocketAddr::from(([10, 0, 0, i], 80))).collect());
        let large = HashTable::Ring { minimum: 80_000 };
        let first = of(large, 2);
        assert!(first.kind() == large && Arc::ptr_eq(&first, &of(large, 2)));
        assert_eq!(of(HashTable::Ring { minimum: 40_000 }, 2).kind(), HashTable::Ring { minimum: 40_000 });
        assert_eq!(of(large, 4).kind(), HashTable::Ring { minimum: 1024 });
        assert_eq!(of(HashTable::Maglev { size: 100_003 }, 5).kind(), HashTable::Maglev { size: 65_537 });
        // Those that are no larger than usual find room, however many there are.
        assert_eq!(of(HashTable::Ring { minimum: 1000 }, 5).kind(), HashTable::Ring { minimum: 1000 });
    }
}
