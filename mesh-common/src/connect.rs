//! What the connect hooks decide, as a pure function: tested on the host, run in the kernel.

use crate::addr::{is_loopback, is_unspecified, is_v4, is_v6_link_local, same_ip};
use crate::{Address, OUTBOUND_PORT, is_reserved_port, maps::Pod};

/// What becomes of a TCP connect of an enrolled pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leave it alone: the pod talks to itself, or the address has no meaning off its link.
    Untouched,
    /// Aim it at this address instead and remember where it was going.
    Redirect(Address),
    /// Refuse it: one of the proxy's own ports on the pod itself.
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
/// The redirect goes to the pod's own address, not to loopback, so that the application's `getsockname` shows the
/// address it would have had. A pod none of whose addresses are known yet gets loopback (see [`Pod`]).
#[inline(always)]
#[must_use]
pub fn decide(dst: &Address, pod: &Pod) -> Verdict {
    if is_own(&dst.ip, pod) || is_loopback(&dst.ip) || is_unspecified(&dst.ip) {
        return if is_reserved_port(dst.port()) { Verdict::Refuse } else { Verdict::Untouched };
    }
    if is_v6_link_local(&dst.ip) {
        return Verdict::Untouched;
    }
    let ip = if is_v4(&dst.ip) { pod.v4 } else { pod.v6 };
    if same_ip(&ip, &Pod::NONE) {
        return Verdict::NoFamily;
    }
    Verdict::Redirect(Address::new(ip, OUTBOUND_PORT))
}

#[cfg(test)]
mod tests {
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
        let pod = Pod { v4: ip("10.1.0.7"), v6: ip("fd00::7"), direct: 0 };
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
        ];
        for (dst, port, expected) in cases {
            assert_eq!(decide(&Address::new(ip(dst), port), &pod), expected, "{dst}:{port}");
        }
        let unknown_v6 = Pod { v6: ip("::1"), ..pod };
        assert_eq!(decide(&Address::new(ip("fd00::99"), 443), &unknown_v6), Verdict::Redirect(Address::new(ip("::1"), OUTBOUND_PORT)));
        let v4_only = Pod { v6: Pod::NONE, ..pod };
        assert_eq!(decide(&Address::new(ip("fd00::99"), 443), &v4_only), Verdict::NoFamily);
        assert_eq!(decide(&Address::new(ip("10.96.0.1"), 443), &v4_only), redirect_v4);
        let unknown = Pod { v4: ip("127.0.0.1"), v6: ip("::1"), direct: 0 };
        assert_eq!(decide(&Address::new(ip("10.96.0.1"), 80), &unknown), Verdict::Redirect(Address::new(ip("127.0.0.1"), OUTBOUND_PORT)));
    }
}
