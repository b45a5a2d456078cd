//! What the connect hooks decide, as a pure function: tested on the host, run in the kernel.

use crate::addr::{is_loopback, is_spread_v6, is_unspecified, is_v4, is_v6_link_local, mapped, same_ip};
use crate::{Address, OUTBOUND_PORT, SPREAD_V4, SPREAD_V6, is_reserved_port, maps::Pod};

/// What becomes of a TCP connect of an enrolled pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leave it alone: the pod talks to itself, or the address has no meaning off its link.
    Untouched,
    /// Aim it at this address instead and remember where it was going.
    Redirect(Address),
    /// Refuse it: one of the proxy's own ports on the pod itself, or an address that only the proxy has.
    Refuse,
    /// Refuse it: the pod has no address of this family, so nothing could leave, and a connection that seems to succeed
    /// would keep a client from trying the other family.
    NoFamily,
}

/// Whether an address is the pod's own.
#[inline(always)]
#[must_use]
pub fn is_own(ip: &[u8; 16], pod: &Pod) -> bool {
    same_ip(ip, &pod.v4) || same_ip(ip, &pod.v6)
}

/// Decides for a connect of `pod` to `dst`.
///
/// The redirect goes to an address that is routed from the pod's own ([`crate::SPREAD_V4`]), or where none is to that itself, so that the
/// application's `getsockname` shows the address it would have had. A pod none of whose addresses are known yet gets loopback (see [`Pod`]).
#[inline(always)]
#[must_use]
pub fn decide(dst: &Address, pod: &Pod) -> Verdict {
    if is_own(&dst.ip, pod) || is_loopback(&dst.ip) || is_unspecified(&dst.ip) {
        return if is_reserved_port(dst.port()) { Verdict::Refuse } else { Verdict::Untouched };
    }
    if is_v6_link_local(&dst.ip) {
        return Verdict::Untouched;
    }
    if is_spread_v6(&dst.ip) {
        return Verdict::Refuse;
    }
    let ip = if is_v4(&dst.ip) { pod.v4 } else { pod.v6 };
    if same_ip(&ip, &Pod::NONE) {
        return Verdict::NoFamily;
    }
    let v4 = is_v4(&dst.ip);
    let ip = if pod.spread & if v4 { Pod::V4 } else { Pod::V6 } == 0 { ip } else { aim(dst, v4) };
    Verdict::Redirect(Address::new(ip, OUTBOUND_PORT))
}

/// Which address a destination is aimed at: by a hash, every bit of which depends on all of its address and port.
#[inline(always)]
fn aim(dst: &Address, v4: bool) -> [u8; 16] {
    // Words, and not bytes one by one: these programs have half a kilobyte of stack.
    let ip = u128::from_le_bytes(dst.ip);
    // The finalizer of SplitMix64, over each part.
    let mix = |hash: u64, part: u64| {
        let hash = (hash ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^ (hash >> 31)
    };
    let hash = mix(mix(mix(0, ip as u64), (ip >> 64) as u64), u16::from_ne_bytes(dst.port) as u64);
    let aimed = if v4 {
        const FIRST: u128 = u128::from_le_bytes(mapped([SPREAD_V4[0], SPREAD_V4[1], 0, 0]));
        FIRST | (hash as u16 as u128) << 112
    } else {
        u64::from_le_bytes(SPREAD_V6) as u128 | (hash as u128) << 64
    };
    aimed.to_le_bytes()
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::addr::mapped;
    use crate::{HBONE_PORT, INBOUND_PORT};

    fn ip(s: &str) -> [u8; 16] {
        match s.parse::<core::net::IpAddr>().expect("test address") {
            core::net::IpAddr::V4(v4) => mapped(v4.octets()),
            core::net::IpAddr::V6(v6) => v6.octets(),
        }
    }

    #[test]
    fn connect_decision_follows_the_destination() {
        let pod = Pod { v4: ip("10.1.0.7"), v6: ip("fd00::7"), direct: 0, spread: 0 };
        let redirect_v4 = Verdict::Redirect(Address::new(pod.v4, OUTBOUND_PORT));
        let redirect_v6 = Verdict::Redirect(Address::new(pod.v6, OUTBOUND_PORT));
        let cases = [
            ("10.96.0.1", 80, redirect_v4),
            ("::ffff:10.96.0.1", 80, redirect_v4),
            ("fd00::99", 443, redirect_v6),
            ("10.1.0.7", 8080, Verdict::Untouched),
            ("fd00::7", 8080, Verdict::Untouched),
            ("127.0.0.1", 8080, Verdict::Untouched),
            ("::1", 8080, Verdict::Untouched),
            ("::", 8080, Verdict::Untouched),
            ("0.0.0.0", 8080, Verdict::Untouched),
            ("fe80::1", 8080, Verdict::Untouched),
            ("10.1.0.7", OUTBOUND_PORT, Verdict::Refuse),
            ("127.0.0.1", INBOUND_PORT, Verdict::Refuse),
            ("::1", HBONE_PORT, Verdict::Refuse),
            ("169.254.169.254", 80, redirect_v4),
            ("fd6d:6573:6815:1::5", 80, Verdict::Refuse),
            ("127.109.0.5", OUTBOUND_PORT, Verdict::Refuse),
            ("fd6d:6573:6815:2::5", 80, redirect_v6),
        ];
        for (dst, port, expected) in cases {
            assert_eq!(decide(&Address::new(ip(dst), port), &pod), expected, "{dst}:{port}");
        }
        let unknown_v6 = Pod { v6: ip("::1"), ..pod };
        assert_eq!(decide(&Address::new(ip("fd00::99"), 443), &unknown_v6), Verdict::Redirect(Address::new(ip("::1"), OUTBOUND_PORT)));
        let v4_only = Pod { v6: Pod::NONE, ..pod };
        assert_eq!(decide(&Address::new(ip("fd00::99"), 443), &v4_only), Verdict::NoFamily);
        assert_eq!(decide(&Address::new(ip("10.96.0.1"), 443), &v4_only), redirect_v4);
        let unknown = Pod { v4: ip("127.0.0.1"), v6: ip("::1"), direct: 0, spread: 0 };
        assert_eq!(decide(&Address::new(ip("10.96.0.1"), 80), &unknown), Verdict::Redirect(Address::new(ip("127.0.0.1"), OUTBOUND_PORT)));
    }

    #[test]
    fn destinations_are_aimed_at_addresses_of_their_own() {
        let pod = Pod { v4: ip("10.1.0.7"), v6: ip("fd00::7"), direct: 0, spread: Pod::V4 | Pod::V6 };
        let aimed = |pod: &Pod, dst: &Address| match decide(dst, pod) {
            Verdict::Redirect(target) => target,
            other => panic!("{other:?}"),
        };
        let mut v4 = std::collections::HashSet::new();
        let mut v6 = std::collections::HashSet::new();
        for i in 0..=255_u8 {
            let four = Address::new(mapped([10, 96, 0, i]), 80);
            let target = aimed(&pod, &four);
            assert!(target.port() == OUTBOUND_PORT && is_v4(&target.ip) && target.ip[12..14] == SPREAD_V4, "{target:?}");
            assert_eq!(target, aimed(&pod, &four), "always the same");
            v4.insert(target.ip);
            let mut six = ip("fd00:96::");
            six[15] = i;
            let target = aimed(&pod, &Address::new(six, 80));
            assert!(target.port() == OUTBOUND_PORT && is_spread_v6(&target.ip), "{target:?}");
            v6.insert(target.ip);
            // Each port is a destination of its own.
            v6.insert(aimed(&pod, &Address::new(six, 81)).ip);
        }
        // Of 256 of 65,536 two or more have the same about as often as not.
        assert!(v4.len() > 250 && v6.len() == 512, "{} {}", v4.len(), v6.len());
        let four_only = Pod { spread: Pod::V4, ..pod };
        assert_eq!(aimed(&four_only, &Address::new(ip("fd00::99"), 443)).ip, pod.v6);
    }
}
