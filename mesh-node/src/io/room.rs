//! Room for connections: so many at once, and not all of them for one client.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

#[derive(Debug)]
pub struct Room {
    all: Arc<Semaphore>,
    most: usize,
    most_each: usize,
    each: HashMap<IpAddr, Arc<Semaphore>>,
}

/// One of the places, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _of_all: OwnedSemaphorePermit,
    _of_each: OwnedSemaphorePermit,
}

impl Room {
    /// For `most` at once, `most_each` of one address.
    pub fn new(most: usize, most_each: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(most)), most, most_each, each: HashMap::new() }
    }

    /// None when all places are taken, or all of this client's.
    pub fn take(&mut self, client: IpAddr) -> Option<Place> {
        // Of those that have none there are no more than have come since.
        if self.each.len() > self.most {
            self.each.retain(|_, each| each.available_permits() < self.most_each);
        }
        let each = self.each.entry(client).or_insert_with(|| Arc::new(Semaphore::new(self.most_each))).clone();
        let of_each = each.try_acquire_owned().ok()?;
        Some(Place { _of_all: self.all.clone().try_acquire_owned().ok()?, _of_each: of_each })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all_of_it() {
        let mut room = Room::new(5, 3);
        let [a, b, c] = ["10.0.0.1", "10.0.0.2", "fd00::1"].map(|ip| ip.parse().expect("valid"));
        let mut held = (0..9).filter_map(|_| room.take(a)).collect::<Vec<_>>();
        assert_eq!(held.len(), 3);
        held.extend((0..9).filter_map(|_| room.take(b)));
        assert_eq!(held.len(), 5);
        assert!(room.take(c).is_none());
        held.remove(0);
        assert!(room.take(c).is_some() && room.take(b).is_some());
        drop(held);
        (0..100_u8).for_each(|i| drop(room.take(IpAddr::from([10, 1, 0, i]))));
        assert!(room.each.len() <= 7, "who has none is forgotten");
    }
}
