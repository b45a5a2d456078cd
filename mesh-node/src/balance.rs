//! Which endpoint a connection goes to: least request by power of two choices, as Envoy's default for services.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
};

use crate::route::{Endpoint, Service, ServicePort};

/// Who asks, and with what dice.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    pub client: IpAddr,
    pub node: &'a str,
    /// Uniformly random bits.
    pub dice: u64,
    /// Endpoints already tried for this connection.
    pub tried: &'a [std::net::SocketAddr],
}

/// Picks an endpoint of the client's address family, or `None` when none can be used.
///
/// Ready endpoints are used; when there are none, those that still serve while they terminate, as kube-proxy does. An
/// endpoint already tried is avoided as long as there is another.
pub fn pick<'a>(service: &Service, port: &'a ServicePort, asker: &Asker<'_>) -> Option<&'a Endpoint> {
    let reachable =
        |e: &&Endpoint| e.address.is_ipv4() == asker.client.is_ipv4() && (!service.local_only || e.node.as_deref() == Some(asker.node));
    let usable = |test: fn(&Endpoint) -> bool| port.endpoints.iter().filter(reachable).filter(|e| test(e)).collect::<Vec<_>>();
    let mut candidates = usable(|e| e.ready);
    if candidates.is_empty() {
        candidates = usable(|e| e.serving_while_terminating);
    }
    if candidates.iter().any(|e| !asker.tried.contains(&e.address)) {
        candidates.retain(|e| !asker.tried.contains(&e.address));
    }
    if service.client_ip_affinity {
        return candidates.into_iter().max_by_key(|e| affinity(asker.client, e));
    }
    least_request(&candidates, asker.dice)
}

/// The less loaded of two different candidates picked at random; the first pick when they are level.
fn least_request<'a>(candidates: &[&'a Endpoint], dice: u64) -> Option<&'a Endpoint> {
    let n = candidates.len() as u64;
    match n {
        0 => None,
        1 => candidates.first().copied(),
        _ => {
            let first = (dice >> 32) % n;
            let second = (first + 1 + (dice & 0xffff_ffff) % (n - 1)) % n;
            let at = |i: u64| usize::try_from(i).ok().and_then(|i| candidates.get(i).copied());
            let (a, b) = (at(first)?, at(second)?);
            Some(if b.load.current() < a.load.current() { b } else { a })
        }
    }
}

/// Rendezvous hashing: a client keeps its endpoint while it exists, and only the clients of a lost one move.
fn affinity(client: IpAddr, endpoint: &Endpoint) -> u64 {
    let mut hasher = DefaultHasher::new();
    (client, endpoint.address).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, net::SocketAddr, sync::Arc};

    use super::*;
    use crate::{id::ObjectName, route::Load};

    fn endpoint(address: &str) -> Endpoint {
        Endpoint {
            address: address.parse().expect("valid"),
            ready: true,
            serving_while_terminating: false,
            node: Some("n1".into()),
            load: Arc::new(Load::default()),
        }
    }

    fn service() -> Service {
        Service { name: ObjectName::new("a", "b"), vips: Vec::new(), ports: Vec::new(), local_only: false, client_ip_affinity: false }
    }

    fn port(endpoints: Vec<Endpoint>) -> ServicePort {
        ServicePort { name: "".into(), port: 80, endpoints }
    }

    fn asker(dice: u64) -> Asker<'static> {
        Asker { client: "10.0.0.1".parse().expect("valid"), node: "n1", dice, tried: &[] }
    }

    fn three() -> Vec<Endpoint> {
        ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"].map(endpoint).into()
    }

    #[test]
    fn idle_endpoints_share_evenly() {
        let port = port(three());
        let mut counts: HashMap<SocketAddr, u32> = HashMap::new();
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..30_000 {
            *counts.entry(pick(&service(), &port, &asker(rng.u64(..))).expect("some").address).or_default() += 1;
        }
        // Binomial with p = 1/3: four sigma is 327.
        assert!(counts.len() == 3 && counts.values().all(|n| n.abs_diff(10_000) < 327), "{counts:?}");
    }

    #[test]
    fn the_busier_of_two_is_never_picked() {
        let port = port(vec![endpoint("10.0.0.2:80"), endpoint("10.0.0.3:80")]);
        let _busy = port.endpoints[0].load.begin();
        let mut rng = fastrand::Rng::with_seed(7);
        assert!((0..100).all(|_| pick(&service(), &port, &asker(rng.u64(..))).expect("some").address.to_string() == "10.0.0.3:80"));
    }

    #[test]
    fn unready_endpoints_are_used_only_while_terminating_and_nothing_is_ready() {
        let mut endpoints = three();
        endpoints[0].ready = false;
        endpoints[1].ready = false;
        endpoints[1].serving_while_terminating = true;
        let picked = |endpoints: &[Endpoint]| pick(&service(), &port(endpoints.to_vec()), &asker(1)).map(|e| e.address.to_string());
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
        let port = port(endpoints);
        let v6 = Asker { client: "fd00::1".parse().expect("valid"), ..asker(1) };
        assert_eq!(pick(&service(), &port, &v6).expect("some").address.to_string(), "[fd00::2]:80");
        let local = Service { local_only: true, ..service() };
        let tried = ["10.0.0.3:80".parse().expect("valid")];
        for dice in 0..50 {
            let asker = Asker { tried: &tried, ..asker(dice << 32 | dice) };
            assert_eq!(pick(&local, &port, &asker).expect("some").address.to_string(), "10.0.0.4:80");
        }
    }

    #[test]
    fn affinity_moves_only_the_clients_of_a_lost_endpoint() {
        let service = Service { client_ip_affinity: true, ..service() };
        let full = port(three());
        let less = port(three().into_iter().take(2).collect());
        for i in 0..200_u8 {
            let asker = Asker { client: [10, 1, 0, i].into(), ..asker(u64::from(i)) };
            let before = pick(&service, &full, &asker).expect("some").address;
            let after = pick(&service, &less, &asker).expect("some").address;
            assert!(before == after || before.to_string() == "10.0.0.4:80");
        }
    }
}
