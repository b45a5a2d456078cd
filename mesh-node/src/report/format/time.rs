//! Formats of times in access logs: those of `strftime`, in UTC, and Envoy's fractions of a second.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use crate::telemetry::civil;

/// How a time is written.
#[derive(Debug, Clone, PartialEq)]
pub struct TimeFormat(Vec<Part>);

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text(String),
    /// A conversion of `strftime`.
    Field(char),
    /// The second, with so many digits of its fraction, or as many as it has.
    Second(Option<usize>),
    /// So many digits of the fraction of the second.
    Fraction(usize),
}

const FIELDS: &str = "YmdeHMSsyjbBaAzZTFDRIpnUWGVuwhCklPcxXrt%";
const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

impl TimeFormat {
    /// Reads a format. The error says what it has that is not known.
    pub fn parse(format: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut rest = format.chars();
        while let Some(c) = rest.next() {
            if c != '%' {
                text.push(c);
                continue;
            }
            let what = rest.next();
            let part = match what {
                Some('f') => Part::Fraction(9),
                Some(digit @ '1'..='9') if rest.next() == Some('f') => Part::Fraction(digit.to_digit(10).unwrap_or(3) as usize),
                Some(c) if FIELDS.contains(c) => Part::Field(c),
                Some('E') => extended(&mut rest)?,
                other => {
                    let other = other.map(String::from).unwrap_or_default();
                    let known = FIELDS.chars().map(|c| format!("%{c}")).collect::<Vec<_>>().join(" ");
                    return Err(format!("%{other} is not known in times; known are %f, %1f to %9f, {EXTENDED}, {known}"));
                }
            };
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            parts.push(part);
        }
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        Ok(Self(parts))
    }

    /// The time, in UTC.
    pub fn text(&self, time: SystemTime) -> String {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let mut out = String::with_capacity(32);
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Fraction(digits) => {
                    let nanos = format!("{:09}", since.subsec_nanos());
                    out.push_str(nanos.get(..*digits).unwrap_or(&nanos));
                }
                Part::Second(digits) => {
                    let nanos = format!("{:09}", since.subsec_nanos());
                    let fraction = digits.map_or_else(|| nanos.trim_end_matches('0'), |n| nanos.get(..n).unwrap_or(&nanos));
                    out.push_str(&format!("{:02}{}{fraction}", since.as_secs() % 60, if fraction.is_empty() { "" } else { "." }));
                }
                Part::Field(field) => push(*field, since.as_secs(), &mut out),
            }
        }
        out
    }
}

/// What Envoy's library for times has beyond `strftime`.
const EXTENDED: &str = "%E0S to %E9S, %E*S, %E4Y, %Ez, %E*z";

/// Reads what follows `%E`.
fn extended(rest: &mut std::str::Chars<'_>) -> Result<Part, String> {
    let first = rest.next();
    if first == Some('z') {
        return Ok(Part::Text("+00:00".to_owned()));
    }
    match (first, rest.next()) {
        (Some('*'), Some('S')) => Ok(Part::Second(None)),
        (Some(digit @ '0'..='9'), Some('S')) => Ok(Part::Second(digit.to_digit(10).map(|n| n as usize))),
        (Some('4'), Some('Y')) => Ok(Part::Field('Y')),
        (Some('*'), Some('z')) => Ok(Part::Text("+00:00:00".to_owned())),
        (a, b) => {
            let other = a.into_iter().chain(b).collect::<String>();
            Err(format!("%E{other} is not known in times; known of these are {EXTENDED}"))
        }
    }
}

fn push(field: char, since: u64, out: &mut String) {
    let (days, seconds) = (since / 86_400, since % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let short = |name: &'static str| name.get(..3).unwrap_or(name);
    let of = |names: &[&'static str], n: u64| usize::try_from(n).ok().and_then(|n| names.get(n)).copied().unwrap_or_default();
    let clock = (hour + 11) % 12 + 1;
    // A string takes any text.
    let _ = match field {
        'Y' => write!(out, "{year:04}"),
        'y' => write!(out, "{:02}", year % 100),
        'm' => write!(out, "{month:02}"),
        'd' => write!(out, "{day:02}"),
        'e' => write!(out, "{day:2}"),
        'H' => write!(out, "{hour:02}"),
        'I' => write!(out, "{clock:02}"),
        'p' => out.write_str(if hour < 12 { "AM" } else { "PM" }),
        'M' => write!(out, "{minute:02}"),
        'S' => write!(out, "{second:02}"),
        's' => write!(out, "{since}"),
        'j' => write!(out, "{:03}", days - first_of(year) + 1),
        'b' | 'h' => write!(out, "{}", short(of(&MONTHS, month - 1))),
        'B' => write!(out, "{}", of(&MONTHS, month - 1)),
        'a' => write!(out, "{}", short(of(&DAYS, days % 7))),
        'A' => write!(out, "{}", of(&DAYS, days % 7)),
        'z' => write!(out, "+0000"),
        'Z' => write!(out, "UTC"),
        'T' | 'X' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
        'R' => write!(out, "{hour:02}:{minute:02}"),
        'F' => write!(out, "{year:04}-{month:02}-{day:02}"),
        'D' | 'x' => write!(out, "{month:02}/{day:02}/{:02}", year % 100),
        'C' => write!(out, "{:02}", year / 100),
        'k' => write!(out, "{hour:2}"),
        'l' => write!(out, "{clock:2}"),
        'P' => out.write_str(if hour < 12 { "am" } else { "pm" }),
        'r' => write!(out, "{clock:02}:{minute:02}:{second:02} {}", if hour < 12 { "AM" } else { "PM" }),
        'c' => write!(
            out,
            "{} {} {day:2} {hour:02}:{minute:02}:{second:02} {year:04}",
            short(of(&DAYS, days % 7)),
            short(of(&MONTHS, month - 1))
        ),
        'u' => write!(out, "{}", (days + 3) % 7 + 1),
        'w' => write!(out, "{}", (days + 4) % 7),
        // Of the year, weeks that begin on Sundays and on Mondays.
        'U' => write!(out, "{:02}", (days - first_of(year) + 7 - (days + 4) % 7) / 7),
        'W' => write!(out, "{:02}", (days - first_of(year) + 7 - (days + 3) % 7) / 7),
        'G' => write!(out, "{:04}", iso_week(days).0),
        'V' => write!(out, "{:02}", iso_week(days).1),
        't' => out.write_char('\t'),
        'n' => out.write_char('\n'),
        _ => write!(out, "%"),
    };
}

/// The year and week of ISO 8601: those of the week's Thursday.
fn iso_week(days: u64) -> (u64, u64) {
    let thursday = days + 3 - (days + 3) % 7;
    let year = civil(thursday).0;
    (year, (thursday - first_of(year)) / 7 + 1)
}

/// The first day of a year from 1970 on.
fn first_of(year: u64) -> u64 {
    let leaps = |through: u64| through / 4 - through / 100 + through / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_strftime_does() {
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_709_251_199, 45_678_901);
        for (format, expected) in [
            ("%Y-%m-%dT%H:%M:%S.%3fZ", "2024-02-29T23:59:59.045Z"),
            ("%s.%6f", "1709251199.045678"),
            ("%F %T %z", "2024-02-29 23:59:59 +0000"),
            ("%a, %d %b %Y %I:%M:%S %p", "Thu, 29 Feb 2024 11:59:59 PM"),
            ("%A %e %B %y %j %R %D %Z %f", "Thursday 29 February 24 060 23:59 02/29/24 UTC 045678901"),
            ("%E3S %E*S %E0S %Ez %E*z %E4Y", "59.045 59.045678901 59 +00:00 +00:00:00 2024"),
            ("%c|%U|%W|%k|%G|%V|%u|%w|%h|%C|%l|%P", "Thu Feb 29 23:59:59 2024|08|09|23|2024|09|4|4|Feb|20|11|pm"),
            ("%x %X %r%t", "02/29/24 23:59:59 11:59:59 PM\t"),
            ("100%%", "100%"),
            ("", ""),
        ] {
            assert_eq!(TimeFormat::parse(format).expect(format).text(time), expected);
        }
        for bad in ["%", "%Q", "%3", "%3s", "%E", "%E3", "%E3f"] {
            let error = TimeFormat::parse(bad).expect_err(bad);
            assert!(error.contains("is not known in times; known"), "{error}");
        }
        // The last days of a year may be of the next one's first week, and the first of the last one's.
        for (at, expected) in
            [(1_735_603_200, "2025-01 2024-12-31"), (1_609_459_200, "2020-53 2021-01-01"), (1_704_067_200, "2024-01 2024-01-01")]
        {
            assert_eq!(TimeFormat::parse("%G-%V %F").expect("known").text(SystemTime::UNIX_EPOCH + Duration::from_secs(at)), expected);
        }
        for (at, expected) in [(0, "001"), (951_782_400, "060"), (978_220_800, "366"), (4_107_542_400, "060")] {
            assert_eq!(TimeFormat::parse("%j").expect("known").text(SystemTime::UNIX_EPOCH + Duration::from_secs(at)), expected);
        }
    }
}
