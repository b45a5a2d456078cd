//! Values as texts, behind others in a line. What is written for each request is put together by hand: the standard library's
//! formatting takes a multiple of the time.

use std::{
    cell::RefCell,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

/// UTC with milliseconds, as Envoy writes it.
pub fn rfc3339(time: SystemTime) -> String {
    let mut text = String::with_capacity(24);
    push_time(time, &mut text);
    text
}

/// The same, behind a text. Of times of one second the second is put together once.
pub fn push_time(time: SystemTime, text: &mut String) {
    thread_local! {
        static LAST: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
    }
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    LAST.with_borrow_mut(|(second, begun)| {
        if *second != since.as_secs() {
            *second = since.as_secs();
            *begun = to_the_second(*second);
        }
        text.push_str(begun);
    });
    let millis = since.subsec_millis();
    text.extend([millis / 100, millis / 10 % 10, millis % 10].map(digit));
    text.push('Z');
}

fn to_the_second(since: u64) -> String {
    let (days, seconds) = (since / 86_400, since % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.")
}

fn digit(n: u32) -> char {
    char::from_digit(n, 10).unwrap_or('0')
}

/// A number behind a text.
pub fn push_number(mut n: u64, text: &mut String) {
    if n < 10 {
        text.push(char::from(b'0' + u8::try_from(n).unwrap_or(0)));
        return;
    }
    let mut digits = [b'0'; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] += u8::try_from(n % 10).unwrap_or(0);
        n /= 10;
        if n == 0 {
            break;
        }
    }
    // Digits are text.
    text.push_str(std::str::from_utf8(&digits[at..]).unwrap_or_default());
}

/// An address behind a text.
pub fn push_ip(ip: IpAddr, text: &mut String) {
    match ip {
        IpAddr::V4(v4) => {
            for (i, part) in v4.octets().into_iter().enumerate() {
                if i > 0 {
                    text.push('.');
                }
                push_number(part.into(), text);
            }
        }
        IpAddr::V6(v6) => push_v6(v6, text),
    }
}

/// As RFC 5952 has it: the first of the longest runs of zeros is left out, and an IPv4 address is one.
fn push_v6(ip: Ipv6Addr, text: &mut String) {
    if let Some(v4) = ip.to_ipv4_mapped() {
        text.push_str("::ffff:");
        return push_ip(v4.into(), text);
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
    // Eight groups of four digits, and what is between them.
    let (mut digits, mut n) = ([0_u8; 40], 0);
    let mut push = |byte: u8| {
        digits[n] = byte;
        n += 1;
    };
    for (i, group) in groups.into_iter().enumerate() {
        if i == first {
            push(b':');
        }
        if (first..first + length).contains(&i) {
            continue;
        }
        if i > 0 {
            push(b':');
        }
        let significant = (16 - (group | 1).leading_zeros()).div_ceil(4);
        (0..significant).rev().for_each(|digit| push(b"0123456789abcdef"[usize::from(group >> (4 * digit) & 0xf)]));
    }
    if length > 0 && first + length == groups.len() {
        push(b':');
    }
    // Digits are text.
    text.push_str(std::str::from_utf8(&digits[..n]).unwrap_or_default());
}

/// The same, with its port.
pub fn push_address(address: SocketAddr, text: &mut String) {
    if address.is_ipv4() {
        push_ip(address.ip(), text);
    } else {
        text.push('[');
        push_ip(address.ip(), text);
        text.push(']');
    }
    text.push(':');
    push_number(address.port().into(), text);
}

/// Year, month and day of a day counted from 1970, in the Gregorian calendar: eras of 400 years that begin in March.
pub fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
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
            let mut text = String::new();
            push_ip(ip.into(), &mut text);
            assert_eq!(text, ip.to_string());
            text.clear();
            push_address(SocketAddr::from((ip, 65535)), &mut text);
            assert_eq!(text, SocketAddr::from((ip, 65535)).to_string());
        }
        let mut text = String::new();
        push_address(([10, 0, 200, 1], 0).into(), &mut text);
        for n in [0, 7, 10, 99, 100, 12_345, u64::MAX] {
            text.push(' ');
            push_number(n, &mut text);
        }
        assert_eq!(text, format!("10.0.200.1:0 0 7 10 99 100 12345 {}", u64::MAX));
    }
}
