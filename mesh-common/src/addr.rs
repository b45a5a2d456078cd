//! Socket addresses as the maps carry them.

use crate::SPREAD_V6;

/// An address and port: 16 address bytes (IPv4 mapped) and the port in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Address {
    pub ip: [u8; 16],
    pub port: [u8; 2],
}

const _: () = assert!(size_of::<Address>() == 18 && align_of::<Address>() == 1);

const MAPPED_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// The 16-byte form of four IPv4 bytes.
#[inline(always)]
#[must_use]
pub const fn mapped(v4: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = v4;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

impl Address {
    #[inline(always)]
    #[must_use]
    pub const fn new(ip: [u8; 16], port: u16) -> Self {
        Self { ip, port: port.to_be_bytes() }
    }

    #[inline(always)]
    #[must_use]
    pub const fn port(&self) -> u16 {
        u16::from_be_bytes(self.port)
    }

    /// Whether the address is IPv4, however the socket spells it.
    #[inline(always)]
    #[must_use]
    pub fn is_v4(&self) -> bool {
        is_v4(&self.ip)
    }
}

/// Whether 16 address bytes are a mapped IPv4 address.
#[inline(always)]
#[must_use]
pub fn is_v4(ip: &[u8; 16]) -> bool {
    // Compared word by word: a slice comparison becomes a call the verifier cannot follow.
    let mut i = 0;
    while i < MAPPED_PREFIX.len() {
        if ip[i] != MAPPED_PREFIX[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// Whether two addresses are equal, without a call to `memcmp`.
#[inline(always)]
#[must_use]
pub fn same_ip(a: &[u8; 16], b: &[u8; 16]) -> bool {
    u128::from_ne_bytes(*a) == u128::from_ne_bytes(*b)
}

/// Unspecified (`0.0.0.0`, `::`): a connect to it means loopback.
#[inline(always)]
#[must_use]
pub fn is_unspecified(ip: &[u8; 16]) -> bool {
    same_ip(ip, &[0; 16]) || same_ip(ip, &mapped([0; 4]))
}

/// `127.0.0.0/8`, mapped or not, and `::1`.
#[inline(always)]
#[must_use]
pub fn is_loopback(ip: &[u8; 16]) -> bool {
    (is_v4(ip) && ip[12] == 127) || same_ip(ip, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
}

/// Of [`crate::SPREAD_V6`]: nobody's but the proxy's.
#[inline(always)]
#[must_use]
pub fn is_spread_v6(ip: &[u8; 16]) -> bool {
    // As words, as in `same_ip`.
    u128::from_le_bytes(*ip) as u64 == u64::from_le_bytes(SPREAD_V6)
}

/// `fe80::/10`: meaningful only together with an interface, which an address rewrite would lose.
#[inline(always)]
#[must_use]
pub fn is_v6_link_local(ip: &[u8; 16]) -> bool {
    ip[0] == 0xfe && ip[1] & 0xc0 == 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_are_v4_and_others_are_not() {
        assert!(is_v4(&mapped([10, 0, 0, 1])));
        assert!(!is_v4(&[0; 16]));
        assert!(!is_v4(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1, 2, 3, 4]));
    }

    #[test]
    fn loopback_and_unspecified_cover_both_families() {
        assert!(is_loopback(&mapped([127, 3, 2, 1])));
        assert!(is_loopback(&core::net::Ipv6Addr::LOCALHOST.octets()));
        assert!(!is_loopback(&mapped([128, 0, 0, 1])));
        assert!(is_unspecified(&[0; 16]) && is_unspecified(&mapped([0; 4])));
        assert!(!is_unspecified(&core::net::Ipv6Addr::LOCALHOST.octets()));
    }

    #[test]
    fn link_local_is_fe80_slash_10() {
        let ip = |s: &str| s.parse::<core::net::Ipv6Addr>().expect("test address").octets();
        assert!(is_v6_link_local(&ip("fe80::1")) && is_v6_link_local(&ip("febf::1")));
        assert!(!is_v6_link_local(&ip("fec0::1")) && !is_v6_link_local(&ip("fd00::1")));
    }
}
