//! Values as texts, behind others in a line. What is written for each request is put together by hand: the standard library's
//! formatting takes a multiple of the time.

use std::{
    cell::RefCell,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use crate::telemetry::civil;

const DIGITS: [u8; 16] = *b"0123456789abcdef";

/// UTC with milliseconds, as Envoy writes it.
pub fn rfc3339(time: SystemTime) -> String {
    let mut text = Vec::with_capacity(24);
    push_time(time, &mut text);
    String::from_utf8(text).unwrap_or_default()
}

/// The same, behind a text. Of times of one second the second is put together once.
pub fn push_time(time: SystemTime, text: &mut Vec<u8>) {
    thread_local! {
        static LAST: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
    }
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    LAST.with_borrow_mut(|(second, begun)| {
        if *second != since.as_secs() {
            *second = since.as_secs();
            *begun = to_the_second(*second);
        }
        text.extend_from_slice(begun.as_bytes());
    });
    let (mut short, millis) = (Short::new(), since.subsec_millis());
    [millis / 100, millis / 10 % 10, millis % 10].into_iter().for_each(|n| short.digit(n));
    short.byte(b'Z');
    short.push(text);
}

fn to_the_second(since: u64) -> String {
    let (days, seconds) = (since / 86_400, since % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.")
}

/// A short text on its way into a longer one: put together byte by byte, it is copied once.
struct Short {
    bytes: [u8; 64],
    length: usize,
}

impl Short {
    const fn new() -> Self {
        Self { bytes: [0; 64], length: 0 }
    }

    /// What there is no room for is left out; nothing here is so long.
    fn byte(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
            self.length += 1;
        }
    }

    /// A digit, of a number below ten.
    fn digit(&mut self, n: u32) {
        self.byte(DIGITS[(n & 0xf) as usize]);
    }

    fn number(&mut self, n: u32) {
        if n >= 10 {
            self.number(n / 10);
        }
        self.digit(n % 10);
    }

    fn octet(&mut self, octet: u8) {
        let n = u32::from(octet);
        if n >= 100 {
            self.digit(n / 100);
        }
        if n >= 10 {
            self.digit(n / 10 % 10);
        }
        self.digit(n % 10);
    }

    fn ip(&mut self, ip: IpAddr) {
        match ip {
            IpAddr::V4(v4) => self.v4(v4),
            IpAddr::V6(v6) => self.v6(v6),
        }
    }

    fn v4(&mut self, ip: Ipv4Addr) {
        let [a, b, c, d] = ip.octets();
        self.octet(a);
        for octet in [b, c, d] {
            self.byte(b'.');
            self.octet(octet);
        }
    }

    /// As RFC 5952 has it: the first of the longest runs of zeros is left out, and an IPv4 address is one.
    fn v6(&mut self, ip: Ipv6Addr) {
        if let Some(v4) = ip.to_ipv4_mapped() {
            b"::ffff:".iter().for_each(|b| self.byte(*b));
            return self.v4(v4);
        }
        let groups = ip.segments();
        let (mut first, mut length, mut run) = (0, 0, 0);
        for (i, group) in groups.into_iter().enumerate() {
            run = if group == 0 { run + 1 } else { 0 };
            if run > length {
                (first, length) = (i + 1 - run, run);
            }
        }
        if length < 2 {
            (first, length) = (groups.len(), 0);
        }
        for (i, group) in groups.into_iter().enumerate() {
            if i == first {
                self.byte(b':');
            }
            if (first..first + length).contains(&i) {
                continue;
            }
            if i > 0 {
                self.byte(b':');
            }
            let significant = (16 - (group | 1).leading_zeros()).div_ceil(4);
            (0..significant).rev().for_each(|digit| self.digit(u32::from(group) >> (4 * digit)));
        }
        if length > 0 && first + length == groups.len() {
            self.byte(b':');
        }
    }

    fn push(&self, text: &mut Vec<u8>) {
        text.extend_from_slice(&self.bytes[..self.length]);
    }
}

/// A number behind a text.
pub fn push_number(n: u64, text: &mut Vec<u8>) {
    match u32::try_from(n) {
        Ok(n) if n < 10 => text.push(DIGITS[n as usize]),
        Ok(n) if n < 100 => text.extend_from_slice(&[DIGITS[(n / 10) as usize], DIGITS[(n % 10) as usize]]),
        Ok(n) => {
            let mut short = Short::new();
            short.number(n);
            short.push(text);
        }
        // A buffer takes any text.
        Err(_) => drop(write!(text, "{n}")),
    }
}

/// An address behind a text.
pub fn push_ip(ip: IpAddr, text: &mut Vec<u8>) {
    let mut short = Short::new();
    short.ip(ip);
    short.push(text);
}

/// Addresses that are put together once as long as their places are theirs: lines are of the same few connections and endpoints.
const RECENT: usize = 128;

/// The same, with its port.
pub fn push_address(address: SocketAddr, text: &mut Vec<u8>) {
    thread_local! {
        static KNOWN: RefCell<Vec<(SocketAddr, Short)>> = const { RefCell::new(Vec::new()) };
    }
    let last = match address {
        SocketAddr::V4(v4) => v4.ip().octets()[3],
        SocketAddr::V6(v6) => v6.ip().octets()[15],
    };
    // Clients' ports are every other one, and servers share theirs.
    let place = (usize::from(address.port() >> 1) ^ usize::from(last) << 2) % RECENT;
    KNOWN.with_borrow_mut(|known| {
        if known.is_empty() {
            known.resize_with(RECENT, || (SocketAddr::from(([0; 4], 0)), Short::new()));
        }
        let Some((of, short)) = known.get_mut(place) else { return };
        if *of != address || short.length == 0 {
            (*of, *short) = (address, with_port(address));
        }
        short.push(text);
    });
}

fn with_port(address: SocketAddr) -> Short {
    let mut short = Short::new();
    match address.ip() {
        IpAddr::V4(v4) => short.v4(v4),
        IpAddr::V6(v6) => {
            short.byte(b'[');
            short.v6(v6);
            short.byte(b']');
        }
    }
    short.byte(b':');
    short.number(address.port().into());
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339() {
        for (millis, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_001, "2000-02-29T00:00:00.001Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(SystemTime::UNIX_EPOCH + Duration::from_millis(millis)), expected);
        }
    }

    #[test]
    fn numbers_and_addresses_are_written_as_the_standard_library_does() {
        let written = [
            "0:0:0:0:0:0:0:0",
            "::1",
            "1::",
            "fd00:10:244::a",
            "1:0:0:2:0:0:0:3",
            "1:0:0:2:3:0:0:4",
            "1:0:2:3:4:5:6:7",
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            "::ffff:10.0.0.1",
            "::fffe:a00:1",
            "64:ff9b::a00:1",
            "0:1::",
            "::2:0:1",
        ];
        let mut all = written.map(|text| text.parse::<Ipv6Addr>().expect(text)).to_vec();
        // Every pattern of zeros.
        all.extend((0..256_u16).map(|bits| Ipv6Addr::from(std::array::from_fn::<u16, 8, _>(|i| (bits >> i & 1) * (0xa << (2 * i))))));
        for ip in all {
            let mut text = Vec::new();
            push_ip(ip.into(), &mut text);
            assert_eq!(text, ip.to_string().as_bytes());
            text.clear();
            push_address(SocketAddr::from((ip, 65535)), &mut text);
            assert_eq!(text, SocketAddr::from((ip, 65535)).to_string().as_bytes());
        }
        // Whoever had its place before.
        for (text, n) in [("0.0.0.0:0", 3), ("10.0.0.1:80", 2), ("10.0.0.1:336", 2), ("[::1]:80", 1), ("10.0.0.1:80", 1)] {
            let mut line = Vec::new();
            (0..n).for_each(|_| push_address(text.parse().expect(text), &mut line));
            assert_eq!(line, text.repeat(n).as_bytes());
        }
        let mut text = Vec::new();
        push_address(([10, 0, 200, 1], 0).into(), &mut text);
        for n in [0, 7, 10, 99, 100, 12_345, u64::MAX] {
            text.push(b' ');
            push_number(n, &mut text);
        }
        assert_eq!(String::from_utf8(text), Ok(format!("10.0.200.1:0 0 7 10 99 100 12345 {}", u64::MAX)));
    }
}
