use prometheus_client::{encoding::text::encode, registry::Registry};

use super::*;
use crate::telemetry::Flag;

fn peer(name: &str) -> Peer {
    let unknown: Arc<str> = "unknown".into();
    Peer {
        workload: name.into(),
        namespace: "shop".into(),
        principal: format!("spiffe://cluster.local/ns/shop/sa/{name}").into(),
        app: name.into(),
        version: "v1".into(),
        canonical_service: name.into(),
        canonical_revision: "v1".into(),
        cluster: "Kubernetes".into(),
        region: unknown.clone(),
        zone: unknown,
    }
}

fn key(tags: TagPlan) -> EdgeKey {
    let service = ServiceNames { host: "b.shop.svc.cluster.local".into(), name: "b".into(), namespace: "shop".into() };
    EdgeKey { reporter: Reporter::Source, source: peer("a"), destination: peer("b"), service, mutual_tls: true, tags: Arc::new(tags) }
}

fn http(code: u16, tags: &[&str]) -> HttpKey {
    let tags = tags.iter().map(|t| Arc::from(*t)).collect();
    HttpKey { grpc: false, code, grpc_status: None, flags: Flags::default(), tags }
}

fn text(traffic: &Arc<Traffic>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(traffic.clone()));
    let mut text = String::new();
    encode(&mut text, &registry).expect("text");
    text
}

fn once() -> Request {
    Request { duration: Duration::from_micros(7_500), request_bytes: 3, response_bytes: 2_000_000 }
}

#[test]
fn requests_are_counted_with_istio_s_labels_and_buckets() {
    let traffic = Arc::new(Traffic::default());
    let edge = traffic.edge(key(TagPlan::default())).expect("room");
    edge.request(&http(200, &[]), &once());
    edge.request(&http(200, &[]), &once());
    let mut failed = http(503, &[]);
    failed.flags.raise(Flag::NoHealthyUpstream);
    edge.request(&failed, &once());
    let text = text(&traffic);
    let labels = "reporter=\"source\",source_workload=\"a\",source_canonical_service=\"a\",source_canonical_revision=\"v1\",\
        source_workload_namespace=\"shop\",source_principal=\"spiffe://cluster.local/ns/shop/sa/a\",source_app=\"a\",source_version=\"v1\",\
        source_cluster=\"Kubernetes\",destination_service=\"b.shop.svc.cluster.local\",destination_service_namespace=\"shop\",\
        destination_service_name=\"b\",destination_workload=\"b\",destination_canonical_service=\"b\",destination_canonical_revision=\"v1\",\
        destination_workload_namespace=\"shop\",destination_principal=\"spiffe://cluster.local/ns/shop/sa/b\",destination_app=\"b\",\
        destination_version=\"v1\",destination_cluster=\"Kubernetes\",connection_security_policy=\"mutual_tls\",request_protocol=\"http\"";
    let ok = format!("{labels},response_code=\"200\",grpc_response_status=\"\",response_flags=\"-\"");
    assert!(text.contains(&format!("istio_requests_total{{{ok}}} 2\n")), "{text}");
    assert!(text.contains("response_code=\"503\",grpc_response_status=\"\",response_flags=\"UH\"} 1\n"), "{text}");
    assert!(text.contains(&format!("istio_request_duration_milliseconds_sum{{{ok}}} 15.0\n")), "{text}");
    assert!(text.contains(&format!("istio_request_duration_milliseconds_bucket{{le=\"5.0\",{ok}}} 0\n")), "{text}");
    assert!(text.contains(&format!("istio_request_duration_milliseconds_bucket{{le=\"10.0\",{ok}}} 2\n")), "{text}");
    assert!(text.contains(&format!("istio_response_bytes_bucket{{le=\"3600000.0\",{ok}}} 2\n")), "{text}");
    assert!(text.contains(&format!("istio_response_bytes_bucket{{le=\"+Inf\",{ok}}} 2\n")), "{text}");
    assert!(text.contains(&format!("istio_request_bytes_count{{{ok}}} 2\n")), "{text}");
    assert!(!text.contains("istio_request_messages"), "gRPC's alone: {text}");
}

/// Istio counts them before it is known how a call ends, and says who talks to whom alone.
#[test]
fn messages_of_a_call_are_counted_while_it_goes_on() {
    let (traffic, calls) = (Arc::new(Traffic::default()), Calls::default());
    let edge = traffic.edge(key(TagPlan::default())).expect("room");
    let messages: Messages = [Arc::new(AtomicU64::new(1)), Arc::new(AtomicU64::new(5))];
    let call = calls.follow(messages.clone(), None);
    calls.count();
    assert!(!text(&traffic).contains("messages_total{"), "it is not known where");
    call.place(Some(edge.clone()));
    calls.count();
    let of = |name: &str, n: u32| {
        let text = text(&traffic);
        let found = text.lines().filter(|l| l.starts_with(&format!("istio_{name}_messages_total{{"))).collect::<Vec<_>>();
        assert!(found.len() == 1 && found[0].ends_with(&format!(",destination_cluster=\"Kubernetes\"}} {n}")), "{found:?}");
    };
    of("request", 1);
    of("response", 5);
    messages[1].store(7, Ordering::Relaxed);
    calls.count();
    of("response", 7);
    messages[0].store(2, Ordering::Relaxed);
    call.end(&calls, Some(&edge), &Tags::default());
    calls.count();
    of("request", 2);
    of("response", 7);
}

#[test]
fn tags_are_changed_and_series_that_become_the_same_are_one() {
    let mut plan = TagPlan { dynamic: 1, ..TagPlan::default() };
    let requests = &mut plan.metrics[Metric::RequestCount as usize];
    requests.removed = vec!["response_code".into(), "source_principal".into()];
    requests.set = vec![("host".into(), TagValue::Dynamic(0)), ("source_app".into(), TagValue::Constant("x".into()))];
    plan.metrics[Metric::RequestSize as usize].disabled = true;
    let traffic = Arc::new(Traffic::default());
    let edge = traffic.edge(key(plan)).expect("room");
    for (code, host) in [(200, "one"), (404, "one"), (200, "two")] {
        edge.request(&http(code, &[host]), &once());
    }
    let text = text(&traffic);
    let counts = text.lines().filter(|l| l.starts_with("istio_requests_total")).collect::<Vec<_>>();
    assert_eq!(counts.len(), 2, "{text}");
    assert!(counts.iter().all(|l| !l.contains("response_code=") && !l.contains("source_principal") && l.contains("source_app=\"x\"")));
    assert!(counts.iter().any(|l| l.ends_with("host=\"one\"} 2")) && counts.iter().any(|l| l.ends_with("host=\"two\"} 1")), "{text}");
    assert!(!text.contains("istio_request_bytes") && text.contains("istio_response_bytes_count"));
}

#[test]
fn series_of_one_edge_are_bounded_and_nothing_is_lost() {
    let traffic = Arc::new(Traffic::default());
    let edge = traffic.edge(key(TagPlan { dynamic: 1, ..TagPlan::default() })).expect("room");
    let all = MOST_SERIES + 50;
    for i in 0..all {
        edge.request(&http(200, &[&i.to_string()]), &once());
    }
    assert_eq!(edge.http.all.load().len(), MOST_SERIES + 1);
    let counted = || edge.http.all.load().values().map(|s| s.duration.count()).sum::<u64>();
    assert_eq!(counted(), all as u64);
    // Nor do codes and flags add more than a few.
    for code in 0..1000 {
        let mut key = http(code, &[&code.to_string()]);
        key.flags.raise(if code % 2 == 0 { Flag::NoRoute } else { Flag::UpstreamTimeout });
        edge.request(&key, &once());
    }
    assert_eq!(edge.http.all.load().len(), MOST_SERIES + 6);
    assert_eq!(counted(), all as u64 + 1000);
}

#[test]
fn where_there_is_little_room_edges_go_that_nobody_has_held_for_a_while() {
    let traffic = Arc::new(Traffic::default());
    let named = |i: usize| {
        let mut key = key(TagPlan::default());
        key.source.workload = i.to_string().into();
        key
    };
    let held = traffic.edge(named(0)).expect("room");
    (1..MOST_EDGES).for_each(|i| drop(traffic.edge(named(i)).expect("room")));
    assert!(traffic.edge(named(MOST_EDGES)).is_none() && traffic.refused() == 1);
    let start = Instant::now();
    traffic.tidy(start, |_| true);
    traffic.tidy(start + KEPT, |_| true);
    assert_eq!(traffic.all().len(), 1);
    assert!(Arc::ptr_eq(&held, &traffic.all()[0]) && traffic.edge(named(MOST_EDGES)).is_some());
}

#[test]
fn sources_that_say_who_they_are_themselves_leave_room_for_others() {
    let traffic = Arc::new(Traffic::default());
    let named = |i: usize| EdgeKey { source: peer(&format!("s{i}")), ..key(TagPlan::default()) };
    let unknown = || EdgeKey { source: peer("unknown"), ..key(TagPlan::default()) };
    let edge = |i: usize| traffic.edge_of_stranger(named(i), unknown).expect("room");
    (0..MOST_STRANGERS).for_each(|i| assert_eq!(edge(i).key(), &named(i)));
    assert_eq!(edge(MOST_STRANGERS).key(), &unknown(), "there are enough of them");
    assert_eq!(edge(7).key(), &named(7), "who is known already stays so");
    let later = Instant::now() + KEPT + KEPT;
    [Instant::now(), later].into_iter().for_each(|now| traffic.tidy(now, |_| false));
    assert_eq!(edge(MOST_STRANGERS).key(), &named(MOST_STRANGERS), "there is room again");
}

#[test]
fn edges_of_what_is_gone_are_forgotten_after_a_while_unless_held() {
    let traffic = Arc::new(Traffic::default());
    let edge = traffic.edge(key(TagPlan::default())).expect("room");
    let start = Instant::now();
    traffic.tidy(start, |_| false);
    traffic.tidy(start + KEPT * 2, |_| false);
    assert_eq!(traffic.all().len(), 1, "held");
    drop(edge);
    traffic.tidy(start, |_| true);
    traffic.tidy(start + KEPT * 2, |_| true);
    assert_eq!(traffic.all().len(), 1, "its ends exist");
    traffic.tidy(start, |_| false);
    traffic.tidy(start + KEPT / 2, |_| false);
    assert_eq!(traffic.all().len(), 1, "to be read once more");
    traffic.tidy(start + KEPT, |_| false);
    assert!(traffic.all().is_empty());
}

#[test]
fn connections_are_counted_by_how_they_ended() {
    let traffic = Arc::new(Traffic::default());
    let edge = traffic.edge(key(TagPlan::default())).expect("room");
    let [good, denied] = ["-", "DENY"].map(|flags| TcpKey { flags, tags: Tags::default() });
    edge.opened(&good);
    edge.opened(&good);
    edge.transferred(&good, 10, 4);
    edge.closed(&denied);
    edge.failed(&denied);
    let text = text(&traffic);
    let line = |name: &str| text.lines().filter(|l| l.starts_with(name)).collect::<Vec<_>>();
    let opened = line("istio_tcp_connections_opened_total");
    assert!(
        opened.len() == 1 && opened[0].ends_with(" 2") && opened[0].contains("request_protocol=\"tcp\",response_flags=\"-\""),
        "{text}"
    );
    assert!(opened[0].contains("source_region=\"unknown\"") && opened[0].contains("destination_zone=\"unknown\""));
    for name in ["istio_tcp_connections_closed_total", "istio_tcp_connections_failed_total"] {
        assert!(line(name).len() == 1 && line(name)[0].contains("response_flags=\"DENY\"") && line(name)[0].ends_with(" 1"));
    }
    assert!(line("istio_tcp_sent_bytes_total")[0].ends_with(" 10") && line("istio_tcp_received_bytes_total")[0].ends_with(" 4"));
}

#[test]
fn a_series_others_count_in_does_not_go_back_when_an_edge_is_forgotten() {
    let traffic = Arc::new(Traffic::default());
    let in_zone = |zone: &str| {
        let mut key = key(TagPlan::default());
        key.destination.zone = zone.into();
        key
    };
    let tcp = TcpKey { flags: "-", tags: Tags::default() };
    let count = |zone: &str, code: u16| {
        let edge = traffic.edge(in_zone(zone)).expect("room");
        edge.request(&http(code, &[]), &once());
        edge.opened(&tcp);
    };
    ["a", "a", "b"].into_iter().for_each(|zone| count(zone, 200));
    count("a", 404);
    let told = |name: &str| text(&traffic).lines().filter(|l| l.starts_with(name)).map(str::to_owned).collect::<Vec<_>>();
    let ends = |lines: &[String], end: &str| lines.iter().filter(|l| l.ends_with(end)).count();
    let forget = |gone: &'static str| {
        let start = Instant::now();
        [start, start + KEPT].into_iter().for_each(|now| traffic.tidy(now, |key| *key.destination.zone != *gone));
    };
    forget("a");
    let requests = told("istio_requests_total");
    assert!(requests.len() == 1 && requests[0].ends_with(" 3"), "all three of the zones, and no series of one that is gone: {requests:?}");
    assert_eq!(ends(&told("istio_request_duration_milliseconds_count"), " 3"), 1);
    assert_eq!(ends(&told("istio_request_duration_milliseconds_sum"), " 22.5"), 1);
    assert_eq!(told("istio_tcp_connections_opened_total").len(), 1, "places are among the labels of connections");
    count("c", 200);
    forget("b");
    assert!(told("istio_requests_total")[0].ends_with(" 4"), "and so on");
    forget("c");
    assert!(told("istio_requests_total").is_empty());
    count("a", 200);
    assert!(told("istio_requests_total")[0].ends_with(" 1"), "what nobody counted in is forgotten");
}
