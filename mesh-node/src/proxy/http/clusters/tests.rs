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

#[test]
fn who_has_waited_does_not_bring_back_what_there_was() {
    let cluster = |generation, max_connections| {
        let mut policy = TrafficPolicy::default();
        policy.tcp.max_connections = Some(max_connections);
        let id = ClusterId { service: crate::id::ObjectName::new("default", "reviews"), port: 80, subset: "".into() };
        Cluster {
            id,
            protocol: crate::detect::Protocol::Http,
            policy: Arc::new(policy),
            endpoints: [].into(),
            local_only: false,
            near: None,
            table: None,
            generation,
        }
    };
    let clusters = Clusters::default();
    let (old, new, back) = (cluster(5, 1), cluster(6, 2), cluster(7, 1));
    let first = clusters.of(&old);
    let second = clusters.of(&new);
    assert!(!Arc::ptr_eq(&first, &second) && first.retired.load(Ordering::SeqCst));
    assert!(Arc::ptr_eq(&second, &clusters.of(&old)), "it waited");
    assert!(Arc::ptr_eq(&second, &clusters.of(&new)) && !second.retired.load(Ordering::SeqCst));
    let third = clusters.of(&back);
    assert!(!Arc::ptr_eq(&second, &third) && Arc::ptr_eq(&third, &clusters.of(&new)));
    // Asked for in a later configuration, it is of that one.
    let later = clusters.of(&cluster(9, 1));
    assert!(Arc::ptr_eq(&third, &later) && Arc::ptr_eq(&third, &clusters.of(&cluster(8, 2))));
}

#[test]
fn of_many_that_come_at_once_one_has_a_place_of_its_own() {
    let state = Arc::new(ClusterState::new(&Arc::default()));
    let endpoint = state.endpoint("10.0.0.1:80".parse().expect("valid"));
    for _ in 0..200 {
        let taken = state.begin(Limited::Connections, None);
        let all_there = std::sync::Barrier::new(4);
        let begin = || {
            all_there.wait();
            ConnectionSlot::begin(&state, &endpoint, Some(1), false)
        };
        let got = std::thread::scope(|s| {
            let all = [(); 4].map(|()| s.spawn(begin));
            all.map(|one| one.join().expect("no panic")).into_iter().flatten().count()
        });
        assert_eq!(got, 1);
        drop(taken);
    }
}
