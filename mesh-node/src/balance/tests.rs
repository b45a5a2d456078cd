//! Picks of every balancer.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock},
    time::Duration,
};

use super::*;
use crate::{
    detect::Protocol,
    id::ObjectName,
    route::{
        ClusterId, Load,
        cluster::Near,
        traffic::{self, Distribute, HashKey, HashTable, Outlier, TrafficPolicy},
    },
};

static NOWHERE: LazyLock<Locality> = LazyLock::new(Locality::default);
static NO_LABELS: LazyLock<Labels> = LazyLock::new(Labels::default);
static NOW: LazyLock<Instant> = LazyLock::new(Instant::now);

fn endpoint(address: &str) -> Endpoint {
    Endpoint {
        address: address.parse().expect("valid"),
        ready: true,
        serving_while_terminating: false,
        node: Some("n1".into()),
        locality: Locality::default(),
        labels: Labels::default(),
        load: Arc::new(Load::new(*NOW)),
    }
}

fn cluster(endpoints: Vec<Endpoint>, policy: TrafficPolicy) -> Cluster {
    let table = match policy.balancer {
        Balancer::Hash { table, .. } => Some(Arc::new(Table::build(table, endpoints.iter().map(|e| e.address).collect()))),
        _ => None,
    };
    let id = ClusterId { service: ObjectName::new("a", "b"), port: 80, subset: "".into() };
    Cluster {
        id,
        protocol: Protocol::Http,
        policy: Arc::new(policy),
        endpoints: endpoints.into(),
        local_only: false,
        near: None,
        table,
        generation: 0,
    }
}

fn asker(dice: u64) -> Asker<'static> {
    Asker {
        client: "10.0.0.1".parse().expect("valid"),
        own: &[],
        node: "n1",
        locality: &NOWHERE,
        labels: &NO_LABELS,
        dice,
        turn: 0,
        hash: None,
        tried: &[],
        attempted: &[],
        ejected: &[],
        now: *NOW,
    }
}

fn three() -> Vec<Endpoint> {
    ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"].map(endpoint).into()
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("valid")
}

/// How often each endpoint is picked in `n` tries.
fn counts(cluster: &Cluster, n: u32, ask: impl Fn(u64, u64) -> Asker<'static>) -> HashMap<String, u32> {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut counts = HashMap::new();
    for turn in 0..n {
        let picked = pick(cluster, &ask(rng.u64(..), turn.into())).map_or_else(|| "none".to_owned(), |e| e.address.to_string());
        *counts.entry(picked).or_default() += 1;
    }
    counts
}

#[test]
fn idle_endpoints_share_evenly() {
    for balancer in [Balancer::LeastRequest, Balancer::Random] {
        let cluster = cluster(three(), TrafficPolicy { balancer, ..TrafficPolicy::default() });
        let counts = counts(&cluster, 30_000, |dice, _| asker(dice));
        // Binomial with p = 1/3: four sigma is 327.
        assert!(counts.len() == 3 && counts.values().all(|n| n.abs_diff(10_000) < 327), "{counts:?}");
    }
    let round = cluster(three(), TrafficPolicy { balancer: Balancer::RoundRobin, ..TrafficPolicy::default() });
    let counts = counts(&round, 3000, |dice, turn| Asker { turn, ..asker(dice) });
    assert!(counts.values().all(|n| *n == 1000), "{counts:?}");
}

#[test]
fn the_busier_of_two_is_picked_once_in_four() {
    let cluster = cluster(three().into_iter().take(2).collect(), TrafficPolicy::default());
    let _busy = cluster.endpoints[0].load.begin();
    let counts = counts(&cluster, 40_000, |dice, _| asker(dice));
    // Binomial with p = 1/4: four sigma is 347.
    assert!(counts["10.0.0.2:80"].abs_diff(10_000) < 347, "{counts:?}");
}

#[test]
fn unready_endpoints_are_used_only_while_terminating_and_nothing_is_ready() {
    let mut endpoints = three();
    endpoints[0].ready = false;
    endpoints[1].ready = false;
    endpoints[1].serving_while_terminating = true;
    let picked =
        |endpoints: &[Endpoint]| pick(&cluster(endpoints.to_vec(), TrafficPolicy::default()), &asker(1)).map(|e| e.address.to_string());
    assert_eq!(picked(&endpoints).as_deref(), Some("10.0.0.4:80"));
    endpoints[2].ready = false;
    assert_eq!(picked(&endpoints).as_deref(), Some("10.0.0.3:80"));
    endpoints[1].serving_while_terminating = false;
    assert_eq!(picked(&endpoints), None);
}

#[test]
fn family_locality_and_history_narrow_the_choice() {
    let mut endpoints = three();
    endpoints.push(endpoint("[fd00::2]:80"));
    endpoints[0].node = Some("n2".into());
    let cluster = Cluster { local_only: true, ..cluster(endpoints, TrafficPolicy::default()) };
    let v6 = Asker { client: "fd00::1".parse().expect("valid"), ..asker(1) };
    assert_eq!(pick(&cluster, &v6).expect("some").address.to_string(), "[fd00::2]:80");
    let only = self::cluster(vec![endpoint("[fd00::2]:80")], TrafficPolicy::default());
    assert!(pick(&only, &asker(1)).is_none(), "out of reach");
    let own = ["10.0.0.1".parse().expect("valid"), "fd00::1".parse().expect("valid")];
    let both = Asker { own: &own, ..asker(1) };
    assert_eq!(pick(&only, &both).map(|e| e.address.to_string()), Some("[fd00::2]:80".into()), "better than none");
    let tried = [address("10.0.0.3:80")];
    for dice in 0..50 {
        let asker = Asker { tried: &tried, ..asker(dice << 32 | dice) };
        assert_eq!(pick(&cluster, &asker).expect("some").address.to_string(), "10.0.0.4:80");
    }
}

#[test]
fn affinity_moves_only_the_clients_of_a_lost_endpoint() {
    let policy = || TrafficPolicy { balancer: Balancer::ClientIp, outlier: Some(Outlier::default()), ..TrafficPolicy::default() };
    let cluster = |n| cluster(three().into_iter().take(n).collect(), policy());
    let (full, less) = (cluster(3), cluster(2));
    for i in 0..200_u8 {
        let asker = Asker { client: [10, 1, 0, i].into(), ..asker(u64::from(i)) };
        let before = pick(&full, &asker).expect("some").address;
        let after = pick(&less, &asker).expect("some").address;
        assert!(before == after || before.to_string() == "10.0.0.4:80");
        // One that is ejected is lost as well.
        let ejected = [(before, *NOW + Duration::from_secs(1))];
        assert_ne!(pick(&full, &Asker { ejected: &ejected, ..asker }).expect("some").address, before);
    }
}

#[test]
fn equal_hashes_meet_the_same_endpoint() {
    let balancer = Balancer::Hash { key: HashKey::SourceIp, table: HashTable::Ring { minimum: 1024 } };
    let cluster = cluster(three(), TrafficPolicy { balancer, ..TrafficPolicy::default() });
    for hash in (0..100_u64).map(|i| super::hash(&i.to_le_bytes())) {
        let picked = (0..5).map(|dice| pick(&cluster, &Asker { hash: Some(hash), ..asker(dice) }).expect("some").address);
        assert!(picked.collect::<Vec<_>>().windows(2).all(|w| w[0] == w[1]));
    }
    let without = counts(&cluster, 3000, |dice, _| asker(dice));
    assert_eq!(without.len(), 3, "without a hash, any");
}

#[test]
fn ejected_endpoints_are_left_out_until_too_few_are_left() {
    let later = *NOW + Duration::from_secs(1);
    let two: &'static [_] = vec![(address("10.0.0.2:80"), later), (address("10.0.0.3:80"), later)].leak();
    let ask = |dice, _| Asker { ejected: two, ..asker(dice) };
    let policy = |min_health_percent| TrafficPolicy {
        outlier: Some(Outlier { min_health_percent, ..Outlier::default() }),
        ..TrafficPolicy::default()
    };
    assert_eq!(counts(&cluster(three(), policy(0)), 100, ask), HashMap::from([("10.0.0.4:80".to_owned(), 100)]));
    assert_eq!(counts(&cluster(three(), policy(50)), 300, ask).len(), 3, "panic");
    // What is healthy carries it all: 1.4 times two of three.
    let one: &'static [_] = vec![two[0]].leak();
    assert_eq!(counts(&cluster(three(), policy(90)), 300, |d, _| Asker { ejected: one, ..asker(d) }).len(), 3, "93 of 100 is not all");
    let mut four = three();
    four.push(endpoint("10.0.0.5:80"));
    assert_eq!(counts(&cluster(four, policy(90)), 300, |d, _| Asker { ejected: one, ..asker(d) }).len(), 3, "no panic: 105 of 100");
    let all: &'static [_] = three().iter().map(|e| (e.address, later)).collect::<Vec<_>>().leak();
    assert_eq!(counts(&cluster(three(), policy(0)), 1, |d, _| Asker { ejected: all, ..asker(d) }), HashMap::from([("none".to_owned(), 1)]));
    assert_eq!(counts(&cluster(three(), policy(50)), 300, |d, _| Asker { ejected: all, ..asker(d) }).len(), 3);
    let over = counts(&cluster(three(), policy(0)), 300, |d, _| Asker { ejected: all, now: later, ..asker(d) });
    assert_eq!(over.len(), 3, "the time is over");
}

fn place(text: &str) -> Locality {
    let mut parts = text.split('/').map(std::sync::Arc::from);
    let mut next = || parts.next().unwrap_or_default();
    Locality { region: next(), zone: next(), subzone: next() }
}

#[test]
fn near_localities_are_preferred_and_failed_over_from() {
    static HERE: LazyLock<Locality> = LazyLock::new(|| place("r1/z1/a"));
    let mut endpoints = ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80"].map(endpoint).to_vec();
    for (endpoint, at) in endpoints.iter_mut().zip(["r1/z1/a", "r1/z1/b", "r1/z2/a", "r2/z1/a"]) {
        endpoint.locality = place(at);
    }
    let policy = TrafficPolicy { outlier: Some(Outlier::default()), ..TrafficPolicy::default() };
    let near = cluster(endpoints.clone(), policy);
    let later = *NOW + Duration::from_secs(1);
    for gone in 0..4 {
        let ejected: &'static [_] = endpoints.iter().take(gone).map(|e| (e.address, later)).collect::<Vec<_>>().leak();
        let counts = counts(&near, 50, |dice, _| Asker { locality: &HERE, ejected, ..asker(dice) });
        assert_eq!(counts, HashMap::from([(endpoints[gone].address.to_string(), 50)]));
    }
    // However few of a place are left, there is no panic while another place carries it all.
    let trusting = TrafficPolicy { outlier: Some(Outlier { min_health_percent: 60, ..Outlier::default() }), ..TrafficPolicy::default() };
    let ejected: &'static [_] = endpoints.iter().take(3).map(|e| (e.address, later)).collect::<Vec<_>>().leak();
    let left = counts(&cluster(endpoints.clone(), trusting.clone()), 50, |dice, _| Asker { locality: &HERE, ejected, ..asker(dice) });
    assert_eq!(left, HashMap::from([(endpoints[3].address.to_string(), 50)]));
    let none: &'static [_] = endpoints.iter().map(|e| (e.address, later)).collect::<Vec<_>>().leak();
    let whole = counts(&cluster(endpoints.clone(), trusting), 400, |dice, _| Asker { locality: &HERE, ejected: none, ..asker(dice) });
    assert!(whole.len() == 4 && whole.values().all(|n| n.abs_diff(100) < 40), "all in panic: by their numbers {whole:?}");
    let off = cluster(endpoints, TrafficPolicy::default());
    assert_eq!(counts(&off, 400, |dice, _| Asker { locality: &HERE, ..asker(dice) }).len(), 4, "without outlier detection, all");
}

#[test]
fn a_service_may_prefer_what_is_near() {
    static HERE: LazyLock<Locality> = LazyLock::new(|| place("r1/z1/a"));
    let mut endpoints = ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80", "10.0.0.6:80"].map(endpoint).to_vec();
    let places = [("r1/z1/a", "n1"), ("r1/z1/a", "n2"), ("r1/z1/b", "n3"), ("r1/z2/a", "n4"), ("r2/z1/a", "n1")];
    for (endpoint, (at, node)) in endpoints.iter_mut().zip(places) {
        (endpoint.locality, endpoint.node) = (place(at), Some(node.into()));
    }
    let later = *NOW + Duration::from_secs(1);
    let picked = |near, gone: usize, from: &'static Locality| {
        let ejected: &'static [_] = endpoints.iter().take(gone).map(|e| (e.address, later)).collect::<Vec<_>>().leak();
        let cluster = Cluster { near, ..cluster(endpoints.clone(), TrafficPolicy::default()) };
        let counts = counts(&cluster, 300, |dice, _| Asker { locality: from, ejected, ..asker(dice) });
        let mut all =
            endpoints.iter().enumerate().filter(|(_, e)| counts.contains_key(&e.address.to_string())).map(|(i, _)| i).collect::<Vec<_>>();
        all.sort_unstable();
        all
    };
    let near = |name: &str| Near::of(name);
    assert_eq!(
        [near("PreferClose"), near("PreferSameZone"), near("prefersamenode"), near("Any")],
        [Some(Near::Zone), Some(Near::Zone), Some(Near::Node), None]
    );
    assert_eq!(picked(None, 0, &HERE), [0, 1, 2, 3, 4]);
    for (near, gone, expected) in [
        (Near::Zone, 0, &[0, 1, 2][..]),
        (Near::Zone, 2, &[2]),
        (Near::Zone, 3, &[3]),
        (Near::Zone, 4, &[4]),
        (Near::Node, 0, &[0]),
        (Near::Node, 1, &[1]),
        (Near::Node, 2, &[2]),
        (Near::Node, 3, &[3]),
    ] {
        assert_eq!(picked(Some(near), gone, &HERE), expected, "{near:?} without {gone}");
    }
    // What a DestinationRule says of places, if only that they do not count, takes its place.
    let mut policy = TrafficPolicy::default();
    (policy.locality.given, policy.locality.enabled) = (true, false);
    let off = Cluster { near: Some(Near::Zone), ..cluster(endpoints.clone(), policy) };
    assert_eq!(counts(&off, 300, |dice, _| Asker { locality: &HERE, ..asker(dice) }).len(), 5);
    // Of a client whose place nobody knows, all are as far.
    assert_eq!(picked(Some(Near::Zone), 0, &NOWHERE), [0, 1, 2, 3, 4]);
}

#[test]
fn traffic_is_distributed_over_localities_by_weight() {
    static THERE: LazyLock<Locality> = LazyLock::new(|| place("r2/z1/a"));
    static HERE: LazyLock<Locality> = LazyLock::new(|| place("r1/z1/a"));
    let mut endpoints = three();
    for (endpoint, at) in endpoints.iter_mut().zip(["r1/z1", "r1/z2", "r2/z1"]) {
        endpoint.locality = place(at);
    }
    let mut policy = TrafficPolicy::default();
    policy.locality.distribute =
        vec![Distribute { from: "r1/z1/*".into(), to: vec![("r1/z1/*".into(), 80), ("r1/z2/*".into(), 20), ("r3/*".into(), 0)] }];
    // Clients elsewhere go anywhere, and do not fail over.
    let elsewhere = TrafficPolicy { outlier: Some(Outlier::default()), ..policy.clone() };
    let all = self::counts(&cluster(endpoints.clone(), elsewhere), 3000, |dice, _| Asker { locality: &THERE, ..asker(dice) });
    assert!(all.len() == 3, "{all:?}");
    let counts = counts(&cluster(endpoints, policy), 10_000, |dice, _| Asker { locality: &HERE, ..asker(dice) });
    assert!(counts["10.0.0.2:80"].abs_diff(8000) < 160 && counts["10.0.0.3:80"].abs_diff(2000) < 160 && counts.len() == 2, "{counts:?}");
}

#[test]
fn a_retry_goes_to_another_locality_when_asked_to() {
    static HERE: LazyLock<Locality> = LazyLock::new(|| place("r1/z1/a"));
    let mut endpoints = ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"].map(endpoint).to_vec();
    for (endpoint, at) in endpoints.iter_mut().zip(["r1/z1/a", "r1/z1/a", "r2/z1/a"]) {
        endpoint.locality = place(at);
    }
    let policy = TrafficPolicy { outlier: Some(Outlier::default()), ..TrafficPolicy::default() };
    let cluster = cluster(endpoints, policy);
    let tried: &'static [_] = vec![address("10.0.0.2:80")].leak();
    let near = counts(&cluster, 20, |dice, _| Asker { locality: &HERE, tried, ..asker(dice) });
    assert_eq!(near, HashMap::from([("10.0.0.3:80".to_owned(), 20)]));
    // As recorded of Envoy with Istio's settings: two near, two elsewhere, and so on.
    let mut attempted: Vec<SocketAddr> = Vec::new();
    for expected in [2, 2, 1, 1, 2, 2, 1, 1] {
        let before: &'static [_] = attempted.clone().leak();
        let picked = counts(&cluster, 60, |dice, _| Asker { locality: &HERE, attempted: before, ..asker(dice) });
        assert_eq!(picked.len(), expected, "{before:?}: {picked:?}");
        assert_eq!(picked.contains_key("10.0.0.4:80"), expected == 1, "{before:?}: {picked:?}");
        attempted.push(address(picked.keys().next().expect("one")));
    }
}

/// What belongs to one endpoint goes on belonging to one where places have a say.
#[test]
fn hashes_decide_between_places_too() {
    static HERE: LazyLock<Locality> = LazyLock::new(|| place("r1/z1/a"));
    let mut endpoints = ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80"].map(endpoint).to_vec();
    for (endpoint, at) in endpoints.iter_mut().zip(["r1/z1/a", "r1/z1/a", "r1/z2/a", "r1/z2/a"]) {
        endpoint.locality = place(at);
    }
    let later = *NOW + Duration::from_secs(1);
    let ejected: &'static [_] = vec![(address("10.0.0.2:80"), later)].leak();
    let hashing = Balancer::Hash { key: HashKey::SourceIp, table: HashTable::Ring { minimum: 1024 } };
    let failing = |balancer| TrafficPolicy { balancer, outlier: Some(Outlier::default()), ..TrafficPolicy::default() };
    let distributing = |balancer| {
        let mut policy = TrafficPolicy { balancer, ..TrafficPolicy::default() };
        policy.locality.distribute = vec![Distribute { from: "r1/*".into(), to: vec![("r1/z1/*".into(), 60), ("r1/z2/*".into(), 40)] }];
        policy
    };
    for (policy, near) in [
        (failing(hashing.clone()), 70),
        (distributing(hashing), 60),
        (failing(Balancer::ClientIp), 70),
        (distributing(Balancer::ClientIp), 60),
    ] {
        let fails = policy.outlier.is_some();
        let cluster = cluster(endpoints.clone(), policy);
        let mut owners: HashMap<SocketAddr, u32> = HashMap::new();
        for user in 0..2000_u32 {
            let [a, b, c, d] = user.to_be_bytes();
            let ask = |dice| Asker {
                client: [10 + a, b, c, d].into(),
                hash: Some(super::hash(&user.to_le_bytes())),
                locality: &HERE,
                ejected: if fails { ejected } else { &[] },
                ..asker(dice)
            };
            let picked = [1_u64, u64::MAX / 3, u64::MAX - 5].map(|dice| pick(&cluster, &ask(dice)).expect("some").address);
            assert!(picked.windows(2).all(|w| w[0] == w[1]), "{user}: {picked:?}");
            *owners.entry(picked[0]).or_default() += 1;
        }
        let here = owners.iter().filter(|(a, _)| [address("10.0.0.2:80"), address("10.0.0.3:80")].contains(a)).map(|(_, n)| n).sum::<u32>();
        // Binomial: four sigma is 88.
        assert!(here.abs_diff(20 * near) < 90, "{here} of 2000, not {near} %: {owners:?}");
    }
}

#[test]
fn a_place_that_has_lost_endpoints_has_less_of_what_is_distributed() {
    static HERE: LazyLock<Locality> = LazyLock::new(|| place("r1/z1/a"));
    let names = ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80", "10.0.0.6:80", "10.0.0.7:80", "10.0.0.8:80"];
    let mut endpoints = names.map(endpoint).to_vec();
    let places = ["r1/z1/a", "r1/z1/a", "r1/z1/a", "r1/z2/a", "r1/z2/a", "r1/z2/a", "r1/z3/a"];
    for (endpoint, at) in endpoints.iter_mut().zip(places) {
        endpoint.locality = place(at);
    }
    let later = *NOW + Duration::from_secs(1);
    let near = |to: &[(&str, u32)], gone: usize, min_health_percent| {
        let mut policy = TrafficPolicy { outlier: Some(Outlier { min_health_percent, ..Outlier::default() }), ..TrafficPolicy::default() };
        policy.locality.distribute =
            vec![Distribute { from: "r1/*".into(), to: to.iter().map(|(to, weight)| ((*to).into(), *weight)).collect() }];
        let cluster = cluster(endpoints.clone(), policy);
        let ejected: &'static [_] = endpoints.iter().take(gone).map(|e| (e.address, later)).collect::<Vec<_>>().leak();
        let counts = counts(&cluster, 10_000, |dice, _| Asker { locality: &HERE, ejected, ..asker(dice) });
        let of = |names: &[&str]| names.iter().filter_map(|name| counts.get(*name)).sum::<u32>() / 100;
        (of(&names[..3]), of(&names[3..6]), counted(&cluster, &HERE, address(names[0])))
    };
    let two = [("r1/z1/*", 80), ("r1/z2/*", 20)];
    assert_eq!(near(&two, 0, 0).2, 6, "what is not listed is not there");
    assert!(near(&two, 0, 0).0.abs_diff(80) < 3);
    // 80 of which 46 % is carried, against 20 (Envoy: 65 to 35).
    assert!(near(&two, 2, 0).0.abs_diff(65) < 3, "{:?}", near(&two, 2, 0));
    assert_eq!(near(&two, 3, 0), (0, 100, 6));
    assert_eq!(near(&[("r1/z1/*", 100)], 3, 0), (0, 0, 3), "nothing is left");
    assert_eq!(near(&[("r1/z1/*", 100)], 3, 50), (100, 0, 3), "panic, among those that are listed");
}

#[test]
fn labels_in_order_decide_the_priority() {
    static MINE: LazyLock<Labels> =
        LazyLock::new(|| [("rack", "1"), ("row", "a")].map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect());
    let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Labels>();
    let mut endpoints = three();
    endpoints[0].labels = labels(&[("rack", "2"), ("row", "a")]);
    endpoints[1].labels = labels(&[("rack", "1"), ("row", "b")]);
    endpoints[2].labels = labels(&[("rack", "1"), ("row", "a")]);
    let mut policy = TrafficPolicy { outlier: Some(Outlier::default()), ..TrafficPolicy::default() };
    policy.locality.failover_priority = vec!["rack".into(), "row".into()];
    policy.locality.failover = BTreeMap::new();
    // A value that is named, of a place.
    let mut zoned = endpoints.clone();
    zoned[1].locality = place("r1/z9");
    let named =
        crate::route::traffic::Locality { failover_priority: vec!["topology.kubernetes.io/zone=z9".into()], ..policy.locality.clone() };
    let named = self::cluster(zoned, TrafficPolicy { locality: named, ..policy.clone() });
    assert_eq!(counts(&named, 20, |dice, _| asker(dice)), HashMap::from([("10.0.0.3:80".to_owned(), 20)]));
    let cluster = cluster(endpoints, policy);
    let later = *NOW + Duration::from_secs(1);
    for (gone, expected) in [(&[][..], "10.0.0.4:80"), (&["10.0.0.4:80"], "10.0.0.3:80"), (&["10.0.0.4:80", "10.0.0.3:80"], "10.0.0.2:80")]
    {
        let ejected: &'static [_] = gone.iter().map(|a| (address(a), later)).collect::<Vec<_>>().leak();
        let counts = counts(&cluster, 20, |dice, _| Asker { labels: &MINE, ejected, ..asker(dice) });
        assert_eq!(counts, HashMap::from([(expected.to_owned(), 20)]));
    }
}

#[test]
fn a_new_endpoint_warms_up() {
    let mut endpoints = three();
    let old = *NOW;
    let now = old + Duration::from_secs(100);
    endpoints[0].load = Arc::new(Load::new(now.checked_sub(Duration::from_secs(5)).expect("later")));
    for balancer in [Balancer::LeastRequest, Balancer::RoundRobin] {
        let warmup = Some(Warmup { duration: Duration::from_secs(50), minimum: 10.0, aggression: 1.0 });
        let cluster = cluster(endpoints.clone(), TrafficPolicy { balancer, warmup, ..TrafficPolicy::default() });
        let counts = counts(&cluster, 30_000, |dice, turn| Asker { turn, now, ..asker(dice) });
        let share = counts["10.0.0.2:80"];
        // A tenth of a full share among two full ones is 1 in 21.
        assert!((1000..1900).contains(&share), "{counts:?}");
        let warm = self::counts(&cluster, 30_000, |dice, turn| Asker { now: now + Duration::from_mins(1), turn, ..asker(dice) });
        assert!(warm["10.0.0.2:80"].abs_diff(10_000) < 327, "{warm:?}");
    }
}

#[test]
fn what_is_within_reach_is_what_some_dice_pick() {
    let mut endpoints = three();
    endpoints[1].node = Some("n2".into());
    endpoints[2].node = Some("n3".into());
    let reach =
        |cluster: &Cluster, asker: &Asker<'_>| within_reach(cluster, asker).into_iter().map(|e| e.address.to_string()).collect::<Vec<_>>();
    let all = ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"];
    let anywhere = cluster(endpoints.clone(), TrafficPolicy::default());
    assert_eq!(reach(&anywhere, &asker(0)), all);
    let near = Cluster { near: Some(Near::Node), ..cluster(endpoints, TrafficPolicy::default()) };
    assert_eq!(reach(&near, &asker(0)), all[..1]);
    let ejected = |n: usize| all[..n].iter().map(|a| (address(a), *NOW + Duration::from_secs(1))).collect::<Vec<_>>();
    assert_eq!(reach(&near, &Asker { ejected: &ejected(1), ..asker(0) }), all[1..], "those that are left are equally far");
    // Where so few are healthy that all are used.
    let outlier = |min_health_percent| TrafficPolicy {
        outlier: Some(Outlier { min_health_percent, ..Outlier::default() }),
        ..TrafficPolicy::default()
    };
    for (panic, expected) in [(50, &all[..]), (0, &[][..])] {
        assert_eq!(reach(&cluster(three(), outlier(panic)), &Asker { ejected: &ejected(3), ..asker(0) }), expected, "{panic}");
    }
    // A place that gets one percent.
    let mut far = three();
    far[0].locality.region = "b".into();
    let to = vec![("a".into(), 99), ("b".into(), 1)];
    let locality = traffic::Locality { distribute: vec![Distribute { from: "*".into(), to }], ..traffic::Locality::default() };
    far[1..].iter_mut().for_each(|e| e.locality.region = "a".into());
    assert_eq!(reach(&cluster(far, TrafficPolicy { locality, ..TrafficPolicy::default() }), &asker(0)), all);
}
