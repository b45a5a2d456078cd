//! What functions of the language make of their arguments.

use std::borrow::Cow;

use time::{OffsetDateTime, UtcOffset};

use super::{Evaluated, NoValue, Value};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    StartsWith,
    EndsWith,
    Contains,
    Size,
    String,
    Int,
    Double,
    Bool,
    /// As it is.
    Same,
    LowerAscii,
    Duration,
    Timestamp,
    /// A part of a time, or a duration as a whole number.
    Part(Part),
}

/// A part of a time, as the language counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Year,
    /// From 0.
    Month,
    /// From 1.
    Date,
    /// From 0.
    DayOfMonth,
    /// From 0, a Sunday.
    DayOfWeek,
    /// From 0.
    DayOfYear,
    Hours,
    Minutes,
    Seconds,
    Milliseconds,
}

/// Names of functions that are asked of a value, with how many arguments they take at least and at most.
pub(super) const METHODS: [(&str, Function, usize, usize); 15] = [
    ("startsWith", Function::StartsWith, 1, 1),
    ("endsWith", Function::EndsWith, 1, 1),
    ("contains", Function::Contains, 1, 1),
    ("size", Function::Size, 0, 0),
    ("lowerAscii", Function::LowerAscii, 0, 0),
    ("getFullYear", Function::Part(Part::Year), 0, 1),
    ("getMonth", Function::Part(Part::Month), 0, 1),
    ("getDate", Function::Part(Part::Date), 0, 1),
    ("getDayOfMonth", Function::Part(Part::DayOfMonth), 0, 1),
    ("getDayOfWeek", Function::Part(Part::DayOfWeek), 0, 1),
    ("getDayOfYear", Function::Part(Part::DayOfYear), 0, 1),
    ("getHours", Function::Part(Part::Hours), 0, 1),
    ("getMinutes", Function::Part(Part::Minutes), 0, 1),
    ("getSeconds", Function::Part(Part::Seconds), 0, 1),
    ("getMilliseconds", Function::Part(Part::Milliseconds), 0, 1),
];

/// Names of functions of one argument.
pub(super) const FUNCTIONS: [(&str, Function); 9] = [
    ("size", Function::Size),
    ("string", Function::String),
    ("int", Function::Int),
    ("uint", Function::Int),
    ("double", Function::Double),
    ("bool", Function::Bool),
    ("dyn", Function::Same),
    ("duration", Function::Duration),
    ("timestamp", Function::Timestamp),
];

impl Function {
    pub(super) fn of<'a>(self, first: Value<'a>, second: Option<Value<'a>>) -> Evaluated<'a> {
        let number = |n: f64| {
            #[expect(clippy::cast_possible_truncation, reason = "CEL truncates; what does not fit is checked")]
            let whole = n as i64;
            if n.is_finite() && n.abs() < 9.2e18 { Ok(Value::Int(whole)) } else { Err(NoValue) }
        };
        let count = |n: usize| i64::try_from(n).map(Value::Int).map_err(|_| NoValue);
        match (self, first, second) {
            (Self::StartsWith, Value::Text(a), Some(Value::Text(b))) => Ok(Value::Bool(a.starts_with(&*b))),
            (Self::EndsWith, Value::Text(a), Some(Value::Text(b))) => Ok(Value::Bool(a.ends_with(&*b))),
            (Self::Contains, Value::Text(a), Some(Value::Text(b))) => Ok(Value::Bool(a.contains(&*b))),
            (Self::LowerAscii, Value::Text(a), None) => Ok(Value::Text(Cow::Owned(a.to_ascii_lowercase()))),
            (Self::Size, Value::Text(a), None) => count(a.chars().count()),
            (Self::Size, Value::List(a), None) => count(a.len()),
            (Self::Size, Value::Map(a), None) => count(a.len()),
            (Self::String, value, None) => value.text().map(|t| Value::Text(Cow::Owned(t))).ok_or(NoValue),
            (Self::Int, Value::Text(a), None) => a.parse().map(Value::Int).map_err(|_| NoValue),
            (Self::Int, Value::Double(n), None) => number(n),
            (Self::Int, Value::Time(time), None) => Ok(Value::Int(time.unix_timestamp())),
            (Self::Int, Value::Int(n), None) => Ok(Value::Int(n)),
            (Self::Bool, Value::Text(a), None) => truth_of(&a).map(Value::Bool).ok_or(NoValue),
            (Self::Bool, Value::Bool(b), None) => Ok(Value::Bool(b)),
            (Self::Same, value, None) => Ok(value),
            (Self::Duration, Value::Text(a), None) => duration(&a).map(Value::Duration).ok_or(NoValue),
            (Self::Duration, Value::Duration(n), None) => Ok(Value::Duration(n)),
            (Self::Timestamp, Value::Text(a), None) => timestamp(&a).map(Value::Time).ok_or(NoValue),
            (Self::Timestamp, Value::Int(n), None) => OffsetDateTime::from_unix_timestamp(n).map(Value::Time).map_err(|_| NoValue),
            (Self::Timestamp, Value::Time(time), None) => Ok(Value::Time(time)),
            (Self::Part(part), Value::Duration(n), None) => part.of_duration(n).map(Value::Int).ok_or(NoValue),
            (Self::Part(part), Value::Time(time), None) => Ok(Value::Int(part.of_time(time))),
            (Self::Part(part), Value::Time(time), Some(Value::Text(zone))) => {
                let there = zone_of(&zone).and_then(|zone| time.checked_to_offset(zone));
                there.map(|there| Value::Int(part.of_time(there))).ok_or(NoValue)
            }
            (Self::Double, Value::Text(a), None) => a.parse().map(Value::Double).map_err(|_| NoValue),
            (Self::Double, value, None) => value.number().map(Value::Double).ok_or(NoValue),
            _ => Err(NoValue),
        }
    }
}

impl Part {
    fn of_duration(self, nanos: i64) -> Option<i64> {
        let unit = match self {
            Self::Hours => 3_600_000_000_000,
            Self::Minutes => 60_000_000_000,
            Self::Seconds => 1_000_000_000,
            Self::Milliseconds => 1_000_000,
            _ => return None,
        };
        Some(nanos / unit)
    }

    fn of_time(self, time: OffsetDateTime) -> i64 {
        match self {
            Self::Year => time.year().into(),
            Self::Month => i64::from(u8::from(time.month())) - 1,
            Self::Date => time.day().into(),
            Self::DayOfMonth => i64::from(time.day()) - 1,
            Self::DayOfWeek => time.weekday().number_days_from_sunday().into(),
            Self::DayOfYear => i64::from(time.ordinal()) - 1,
            Self::Hours => time.hour().into(),
            Self::Minutes => time.minute().into(),
            Self::Seconds => time.second().into(),
            Self::Milliseconds => time.millisecond().into(),
        }
    }
}

fn truth_of(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" | "t" | "1" => Some(true),
        "false" | "False" | "FALSE" | "f" | "0" => Some(false),
        _ => None,
    }
}

/// UTC, or so far from it: `+02:00`, `-08:30`. Names of places mean nothing here.
pub(super) fn zone_of(text: &str) -> Option<UtcOffset> {
    if text == "UTC" {
        return Some(UtcOffset::UTC);
    }
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let (hours, minutes) = rest.split_once(':')?;
    let (hours, minutes): (i8, i8) = (hours.parse().ok()?, minutes.parse().ok()?);
    if hours < 0 || !(0..60).contains(&minutes) {
        return None;
    }
    UtcOffset::from_hms(sign * hours, sign * minutes, 0).ok()
}

/// A time as RFC 3339 writes it.
pub(super) fn timestamp(text: &str) -> Option<OffsetDateTime> {
    // At either end of the years there are, one that is far from UTC has no place in it.
    OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?.checked_to_offset(UtcOffset::UTC)
}

/// The same as text, with as many decimals as it takes.
pub(super) fn written(time: OffsetDateTime) -> String {
    let (date, nanos) = (time.date(), format!("{:09}", time.nanosecond()));
    let decimals = nanos.trim_end_matches('0');
    let dot = if decimals.is_empty() { "" } else { "." };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{dot}{decimals}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

/// As CEL writes a duration: seconds, with as many decimals as it takes.
pub(super) fn seconds(nanos: i64) -> String {
    let (sign, nanos) = (if nanos < 0 { "-" } else { "" }, nanos.unsigned_abs());
    let decimals = format!("{:09}", nanos % 1_000_000_000);
    let decimals = decimals.trim_end_matches('0');
    format!("{sign}{}{}{decimals}s", nanos / 1_000_000_000, if decimals.is_empty() { "" } else { "." })
}

const UNITS: [(&str, i64); 6] =
    [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)];

/// Nanoseconds of a text such as `1h30m`, `-1.5s` or `500ms`.
pub(super) fn duration(text: &str) -> Option<i64> {
    let (negative, mut rest) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let mut all = 0_i64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|n| *n > 0)?;
        let (number, after) = rest.split_at(digits);
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (name, after) = after.split_at(end);
        let unit = UNITS.iter().find(|(unit, _)| *unit == name)?.1;
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        let whole = if whole.is_empty() && !part.is_empty() { 0 } else { whole.parse::<i64>().ok()? };
        let mut nanos = whole.checked_mul(unit)?;
        if !part.is_empty() {
            #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a part of a unit is small")]
            let part = (format!("0.{part}").parse::<f64>().ok()? * unit as f64) as i64;
            nanos = nanos.checked_add(part)?;
        }
        all = all.checked_add(nanos)?;
        rest = after;
    }
    Some(if negative { -all } else { all })
}
