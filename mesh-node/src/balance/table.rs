//! Consistent hashing: a ring or a Maglev table over a cluster's endpoints. Hashes are xxHash64, as Envoy's.

use std::net::SocketAddr;

use xxhash_rust::xxh64::xxh64;

use crate::route::traffic::HashTable;

/// Which endpoint a hash belongs to. Built once per set of endpoints.
#[derive(Debug)]
pub struct Table {
    kind: HashTable,
    addresses: Vec<SocketAddr>,
    /// A client is led to one family, so that those of the other are none of its endpoints: one table of each.
    v4: Family,
    v6: Family,
}

#[derive(Debug)]
struct Family {
    addresses: Vec<SocketAddr>,
    slots: Slots,
}

/// Endpoints, by their place among the addresses.
#[derive(Debug)]
enum Slots {
    /// With hashes, in the order of these.
    Ring(Vec<(u64, u32)>),
    Maglev(Vec<u32>),
}

impl Slots {
    fn len(&self) -> usize {
        match self {
            Self::Ring(points) => points.len(),
            Self::Maglev(slots) => slots.len(),
        }
    }

    fn get(&self, at: usize) -> Option<u32> {
        match self {
            Self::Ring(points) => points.get(at).map(|(_, endpoint)| *endpoint),
            Self::Maglev(slots) => slots.get(at).copied(),
        }
    }
}

/// Hashes a value as the table does.
pub fn hash(value: &[u8]) -> u64 {
    xxh64(value, 0)
}

impl Table {
    pub fn build(kind: HashTable, addresses: Vec<SocketAddr>) -> Self {
        let family = |is_v4: bool| {
            let addresses = addresses.iter().filter(|a| a.is_ipv4() == is_v4).copied().collect::<Vec<_>>();
            let slots = match kind {
                HashTable::Ring { minimum } => Slots::Ring(ring(minimum, &addresses)),
                HashTable::Maglev { size } => Slots::Maglev(maglev(size, &addresses)),
            };
            Family { addresses, slots }
        };
        let (v4, v6) = (family(true), family(false));
        Self { kind, addresses, v4, v6 }
    }

    pub fn kind(&self) -> HashTable {
        self.kind
    }

    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// How many points one has, at most, over both families.
    pub fn points(kind: HashTable, addresses: &[SocketAddr]) -> usize {
        let v4 = addresses.iter().filter(|a| a.is_ipv4()).count();
        let of = |endpoints: usize| match kind {
            _ if endpoints == 0 => 0,
            HashTable::Ring { minimum } => usize::try_from(minimum).unwrap_or(usize::MAX).saturating_add(endpoints),
            HashTable::Maglev { size } => usize::try_from(size).unwrap_or(usize::MAX),
        };
        of(v4).saturating_add(of(addresses.len() - v4))
    }

    /// The endpoint of a family for a hash among those that can be used: the hashes of an unusable one go to others, all else stays.
    pub fn pick(&self, hash: u64, is_v4: bool, usable: impl Fn(&SocketAddr) -> bool) -> Option<SocketAddr> {
        let Family { addresses, slots } = if is_v4 { &self.v4 } else { &self.v6 };
        let n = slots.len();
        if n == 0 {
            return None;
        }
        let start = match slots {
            Slots::Ring(points) => points.partition_point(|(h, _)| *h < hash) % n,
            Slots::Maglev(_) => usize::try_from(hash % n as u64).unwrap_or(0),
        };
        let at = |i: usize| slots.get(i % n).and_then(|e| addresses.get(e as usize)).copied();
        if let (Slots::Maglev(_), Some(first)) = (slots, at(start)) {
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

/// At least `minimum` points, as Envoy places them, so that whoever hashes alike has the same endpoint: as many for each endpoint as make that
/// number, counted as fractions are there.
fn ring(minimum: u64, addresses: &[SocketAddr]) -> Vec<(u64, u32)> {
    if addresses.is_empty() {
        return Vec::new();
    }
    #[expect(clippy::cast_precision_loss, reason = "neither is more than some millions")]
    let (minimum, each) = (minimum as f64, 1.0 / addresses.len() as f64);
    let scale = ((each * minimum).ceil() / each).min(LARGEST_RING);
    let (mut points, mut placed, mut due) = (Vec::new(), 0.0, 0.0);
    for (address, index) in addresses.iter().zip(0_u32..) {
        due += scale * each;
        let mut number = 0_u64;
        while placed < due {
            points.push((xxh64(format!("{address}_{number}").as_bytes(), 0), index));
            number += 1;
            placed += 1.0;
        }
    }
    points.sort_unstable();
    points
}

/// Most points of a ring, Envoy's default.
const LARGEST_RING: f64 = 8_388_608.0;

/// Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", section 3.4.
fn maglev(size: u64, addresses: &[SocketAddr]) -> Vec<u32> {
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
    slots
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
        (0..20_000_u32).map(|i| table.pick(hash(&i.to_le_bytes()), true, |a| Some(*a) != gone).expect("some")).collect()
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
            // One in eleven is 1,818. Maglev moves somewhat more than it must, and a ring whose endpoints have fewer points for one more of them
            // some of all.
            assert!((1300..3300).contains(&moved), "{kind:?}: {moved} moved");
            let new = SocketAddr::from(([10, 0, 0, 11], 80));
            let strays = ten.iter().zip(&eleven).filter(|(a, b)| a != b && **b != new).count();
            assert!(strays < 1800, "{kind:?}: {strays} strays");
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
        assert_eq!(Table::build(KINDS[0], Vec::new()).pick(1, true, |_| true), None);
        assert_eq!(Table::build(KINDS[1], addresses(1)).pick(1, true, |_| false), None);
    }
}
