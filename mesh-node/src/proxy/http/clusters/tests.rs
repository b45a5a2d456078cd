//! Limits, and what is counted against them.

use super::*;

#[test]
fn limits_hold_whatever_order_things_begin_and_end_in() {
    let state = Arc::new(ClusterState::new(&Arc::default()));
    let mut rng = fastrand::Rng::with_seed(5);
    for of in [Limited::Connections, Limited::Pending, Limited::Requests, Limited::Retries] {
        let mut held = Vec::new();
        for _ in 0..1000 {
            if rng.bool() {
                let room = held.len() < 7;
                let slot = state.begin(of, Some(7));
                assert_eq!(slot.is_some(), room);
                held.extend(slot);
            } else if !held.is_empty() {
                held.swap_remove(rng.usize(..held.len()));
            }
            assert_eq!(state.count(of) as usize, held.len());
        }
    }
    assert!(state.begin(Limited::Requests, None).is_some());
    assert_eq!(state.count(Limited::Requests), 0, "given back");
}

#[test]
fn every_retry_is_within_its_budget() {
    let state = Arc::new(ClusterState::new(&Arc::default()));
    let budget = RetryBudget { percent: 20.0, minimum: 3 };
    let mut rng = fastrand::Rng::with_seed(9);
    let (mut requests, mut retries) = (Vec::new(), Vec::new());
    for _ in 0..5000 {
        match rng.u8(..4) {
            0 | 1 => requests.extend(state.begin(Limited::Requests, None)),
            2 => {
                let allowed = (requests.len() / 5).max(3);
                let slot = state.begin_retry(Some(1), Some(&budget));
                assert_eq!(slot.is_some(), retries.len() < allowed, "{} of {} requests", retries.len(), requests.len());
                retries.extend(slot);
            }
            _ if rng.bool() => drop(requests.pop()),
            _ => drop(retries.pop()),
        }
    }
    drop(retries);
    let _one = state.begin_retry(Some(1), None).expect("without a budget the limit counts");
    assert!(state.begin_retry(Some(1), None).is_none());
}

#[test]
fn an_endpoint_without_connections_gets_one_beyond_the_limit() {
    let state = Arc::new(ClusterState::new(&Arc::default()));
    let [a, b] = ["10.0.0.1:80", "10.0.0.2:80"].map(|a| state.endpoint(a.parse().expect("valid")));
    let begin = |endpoint, http2| ConnectionSlot::begin(&state, endpoint, Some(1), http2);
    let first = begin(&a, false).expect("room");
    assert!(begin(&a, false).is_none());
    let other = begin(&b, false).expect("or its requests would wait for ever");
    let second = begin(&a, true).expect("and so would those of the other protocol");
    assert!(begin(&a, true).is_none());
    drop((first, other, second));
    assert_eq!((state.count(Limited::Connections), a.connections.load(Ordering::Relaxed)), (0, 0));
    assert!(begin(&a, true).is_some());
}
