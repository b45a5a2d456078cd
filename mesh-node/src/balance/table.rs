//! Consistent hashing: a ring or a Maglev table over a cluster's endpoints. Hashes are xxHash64, as Envoy's.

use std::net::SocketAddr;

use xxhash_rust::xxh64::xxh64;

use crate::route::traffic::HashTable;

/// Which endpoint a hash belongs to. Built once per set of endpoints.
#[derive(Debug)]
pub struct Table {
    kind: HashTable,
    addresses: Vec<SocketAddr>,
    /// Ring: hashes in order with their endpoint. Maglev: endpoints by slot, the hash unused.
    slots: Vec<(u64, u32)>,
}

/// Hashes a value as the table does.
pub fn hash(value: &[u8]) -> u64 {
    xxh64(value, 0)
}

impl Table {
    pub fn build(kind: HashTable, addresses: Vec<SocketAddr>) -> Self {
        let slots = match kind {
            HashTable::Ring { minimum } => ring(minimum, &addresses),
            HashTable::Maglev { size } => maglev(size, &addresses),
        };
        Self { kind, addresses, slots }
    }

    /// Whether it is the table of these endpoints, so that it need not be built again.
    pub fn is_of(&self, kind: HashTable, addresses: &[SocketAddr]) -> bool {
        self.kind == kind && self.addresses == addresses
    }

    /// The endpoint for a hash among those that can be used: the hashes of an unusable one go to others, all else stays.
    pub fn pick(&self, hash: u64, usable: impl Fn(&SocketAddr) -> bool) -> Option<SocketAddr> {
        let n = self.slots.len();
        if n == 0 {
            return None;
        }
        let start = match self.kind {
            HashTable::Ring { .. } => self.slots.partition_point(|(h, _)| *h < hash) % n,
            HashTable::Maglev { .. } => usize::try_from(hash % n as u64).unwrap_or(0),
        };
        let at = |i: usize| self.slots.get(i % n).and_then(|(_, e)| self.addresses.get(*e as usize)).copied();
        if let (HashTable::Maglev { .. }, Some(first)) = (self.kind, at(start)) {
            // Neighbours in a Maglev table are not the same for all hashes of an endpoint; spread them by hashing again.
            if usable(&first) {
                return Some(first);
            }
            for round in 1..32_u64 {
                let again = xxh64(&hash.to_le_bytes(), round);
                let found = at(usize::try_from(again % n as u64).unwrap_or(0))?;
                if usable(&found) {
                    return Some(found);
                }
            }
        }
        (0..n).find_map(|step| at(start + step).filter(|a| usable(a)))
    }
}

/// At least `minimum` points, each endpoint as many as another. Their number is a power of two, so that it seldom depends on
/// how many endpoints there are: where it does, an endpoint more or less moves hashes of all others.
fn ring(minimum: u64, addresses: &[SocketAddr]) -> Vec<(u64, u32)> {
    let n = addresses.len() as u64;
    if n == 0 {
        return Vec::new();
    }
    let each = minimum.div_ceil(n).next_power_of_two();
    let points = addresses
        .iter()
        .zip(0_u32..)
        .flat_map(|(address, index)| (0..each).map(move |i| (xxh64(format!("{address}_{i}").as_bytes(), 0), index)));
    let mut points = points.collect::<Vec<_>>();
    points.sort_unstable();
    points
}

/// Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", section 3.4.
fn maglev(size: u64, addresses: &[SocketAddr]) -> Vec<(u64, u32)> {
    if addresses.is_empty() {
        return Vec::new();
    }
    let permutation = |address: &SocketAddr| {
        let name = address.to_string();
        (xxh64(name.as_bytes(), 0) % size, xxh64(name.as_bytes(), 1) % (size - 1).max(1) + 1)
    };
    let permutations = addresses.iter().map(permutation).collect::<Vec<_>>();
    let mut next = vec![0_u64; addresses.len()];
    let mut slots = vec![u32::MAX; usize::try_from(size).unwrap_or(0)];
    let mut filled = 0;
    'fill: loop {
        for ((offset, skip), (index, next)) in permutations.iter().zip((0_u32..).zip(&mut next)) {
            let slot = loop {
                let slot = usize::try_from((offset + *next * skip) % size).unwrap_or(0);
                *next += 1;
                if slots[slot] == u32::MAX {
                    break slot;
                }
            };
            slots[slot] = index;
            filled += 1;
            if filled == slots.len() {
                break 'fill;
            }
        }
    }
    slots.into_iter().map(|e| (0, e)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn addresses(n: u8) -> Vec<SocketAddr> {
        (1..=n).map(|i| SocketAddr::from(([10, 0, 0, i], 80))).collect()
    }

    const KINDS: [HashTable; 2] = [HashTable::Ring { minimum: 1024 }, HashTable::Maglev { size: 65_537 }];

    fn owners(table: &Table, gone: Option<SocketAddr>) -> Vec<SocketAddr> {
        (0..20_000_u32).map(|i| table.pick(hash(&i.to_le_bytes()), |a| Some(*a) != gone).expect("some")).collect()
    }

    #[test]
    fn hashes_spread_over_all_endpoints() {
        for kind in KINDS {
            let mut counts: HashMap<SocketAddr, u32> = HashMap::new();
            for owner in owners(&Table::build(kind, addresses(10)), None) {
                *counts.entry(owner).or_default() += 1;
            }
            // A ring of 103 points each is uneven by about a tenth; Maglev by a hundredth.
            let slack = if matches!(kind, HashTable::Ring { .. }) { 900 } else { 250 };
            assert!(counts.len() == 10 && counts.values().all(|n| n.abs_diff(2000) < slack), "{kind:?}: {counts:?}");
        }
    }

    #[test]
    fn an_endpoint_that_comes_or_goes_moves_only_its_share() {
        for kind in KINDS {
            let ten = owners(&Table::build(kind, addresses(10)), None);
            let eleven = owners(&Table::build(kind, addresses(11)), None);
            let moved = ten.iter().zip(&eleven).filter(|(a, b)| a != b).count();
            // One in eleven is 1,818; Maglev moves somewhat more than it must.
            assert!((1300..2900).contains(&moved), "{kind:?}: {moved} moved");
            let new = SocketAddr::from(([10, 0, 0, 11], 80));
            let strays = ten.iter().zip(&eleven).filter(|(a, b)| a != b && **b != new).count();
            assert!(strays < if matches!(kind, HashTable::Ring { .. }) { 250 } else { 900 }, "{kind:?}: {strays} strays");
        }
    }

    #[test]
    fn an_unusable_endpoint_moves_nobody_elses_hashes() {
        for kind in KINDS {
            let table = Table::build(kind, addresses(10));
            let gone = SocketAddr::from(([10, 0, 0, 4], 80));
            let (before, after) = (owners(&table, None), owners(&table, Some(gone)));
            assert!(before.iter().zip(&after).all(|(a, b)| if *a == gone { *b != gone } else { a == b }), "{kind:?}");
        }
        assert_eq!(Table::build(KINDS[0], Vec::new()).pick(1, |_| true), None);
        assert_eq!(Table::build(KINDS[1], addresses(1)).pick(1, |_| false), None);
    }
}
