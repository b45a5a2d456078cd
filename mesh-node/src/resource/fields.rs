//! Field types that several kinds share: durations, percentages, header names and values.

use std::time::Duration;

use http::{HeaderName, HeaderValue};
use serde::{Deserialize, Deserializer, de::Error as _};

use super::envelope::FieldError;
use crate::{report::format::Template, route::rule::HeaderText};

/// A duration as Istio writes it: `1h`, `1m`, `1s`, `1ms`, and sums such as `1m30s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time(pub Duration);

impl Time {
    pub fn parse(text: &str) -> Option<Self> {
        let mut rest = text.trim();
        if rest == "0" {
            return Some(Self(Duration::ZERO));
        }
        let mut total = 0.0_f64;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let number: f64 = rest[..digits].parse().ok()?;
            rest = &rest[digits..];
            let (unit, seconds) = [("ms", 1e-3), ("us", 1e-6), ("µs", 1e-6), ("ns", 1e-9), ("h", 3600.0), ("m", 60.0), ("s", 1.0)]
                .into_iter()
                .find(|(unit, _)| rest.starts_with(unit))?;
            total += number * seconds;
            rest = &rest[unit.len()..];
        }
        // A thousand years is long enough, and keeps sums of instants far from their ends.
        (!text.trim().is_empty() && total <= 3.2e10).then(|| Self(Duration::from_secs_f64(total)))
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is not a duration; write one such as 3s, 500ms or 1m30s")))
    }
}

/// Istio's `Percent`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Percent {
    #[serde(default)]
    pub value: f64,
}

/// A duration that has to be more than nothing.
pub fn positive(time: Time, at: &str) -> Result<Duration, FieldError> {
    if time.0 < Duration::from_millis(1) {
        return Err(FieldError::new(at, "must be at least 1ms"));
    }
    Ok(time.0)
}

/// A header name, in lower case.
pub fn header_name(text: &str, at: &str) -> Result<HeaderName, FieldError> {
    HeaderName::from_bytes(text.as_bytes()).map_err(|_| FieldError::new(at, format!("{text:?} is not a header name")))
}

/// Headers that are between two neighbours, or say where a message ends: they are not what a policy or a route can rely on or
/// change.
const HOP_BY_HOP: [&str; 9] =
    ["connection", "content-length", "expect", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"];

/// Whether a name is of a header between two neighbours: what a route says of those comes to nothing, as with Envoy.
pub fn is_hop_by_hop(name: &str) -> bool {
    HOP_BY_HOP.iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// The name of a header that goes from end to end.
pub fn end_to_end_header(text: &str, at: &str) -> Result<HeaderName, FieldError> {
    let name = header_name(text, at)?;
    if HOP_BY_HOP.contains(&name.as_str()) {
        return Err(FieldError::new(at, format!("{name} belongs to each connection on the way, not to the request; use another header")));
    }
    Ok(name)
}

/// A host, with a port or without, as it may stand in a request.
pub fn authority(text: &str, at: &str) -> Result<HeaderValue, FieldError> {
    let plain = text.parse::<http::uri::Authority>().is_ok_and(|a| !a.as_str().contains('@'));
    let value = HeaderValue::from_str(text).ok().filter(|_| plain);
    value.ok_or_else(|| FieldError::new(at, format!("{text:?} is not a host name or address, with a port or without")))
}

pub fn header_value(text: &str, at: &str) -> Result<HeaderValue, FieldError> {
    HeaderValue::from_str(text).map_err(|_| FieldError::new(at, format!("{text:?} is not a header value: use visible ASCII")))
}

/// What a header is written with, in which Envoy's operators tell of the request. None of what is empty, with which none is written.
pub fn header_text(text: &str, at: &str) -> Result<Option<HeaderText>, FieldError> {
    if !text.contains('%') {
        return if text.is_empty() { Ok(None) } else { header_value(text, at).map(|value| Some(HeaderText::Plain(value))) };
    }
    let template = Template::parse(text);
    let template = template.map_err(|e| FieldError::new(at, format!("{text:?} {e}; a percent sign of its own is written %%")))?;
    match template.plain() {
        Some(plain) => header_value(plain, at).map(|value| Some(HeaderText::Plain(value))),
        None => header_value(text, at).map(|_| Some(HeaderText::Template(template))),
    }
}

/// A port number.
pub fn port(number: u32, at: &str) -> Result<u16, FieldError> {
    u16::try_from(number).ok().filter(|p| *p != 0).ok_or_else(|| FieldError::new(at, format!("{number} is not a port; use 1 to 65535")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_headers_are_plain_or_tell() {
        let plain = |text: &str| match header_text(text, "at") {
            Ok(Some(HeaderText::Plain(value))) => value.to_str().expect("ASCII").to_owned(),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!((plain("a b"), plain("100%%")), ("a b".to_owned(), "100%".to_owned()));
        assert!(matches!(header_text("", "at"), Ok(None)));
        assert!(matches!(header_text("<%REQ(x-a)%>", "at"), Ok(Some(HeaderText::Template(_)))));
        for (text, words) in [
            ("100%", "without its closing %: %; a percent sign of its own is written %%"),
            ("%NO_SUCH%", "%NO_SUCH% is not an operator of Envoy's"),
            ("%REQ()%", "names no header"),
            ("a\nb", "is not a header value"),
            ("%REQ(x)%\n", "is not a header value"),
        ] {
            let error = format!("{:?}", header_text(text, "at").expect_err(text));
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn durations_are_read_as_istio_writes_them() {
        let cases = [("3s", 3000), ("0.5s", 500), ("100ms", 100), ("1m30s", 90_000), ("1h", 3_600_000), ("1.5h", 5_400_000), ("0s", 0)];
        for (text, millis) in cases {
            assert_eq!(Time::parse(text), Some(Time(Duration::from_millis(millis))), "{text}");
        }
        for bad in ["", "3", "s", "3 s", "-1s", "1s2", "1d", "99999999999999h"] {
            assert_eq!(Time::parse(bad), None, "{bad}");
        }
    }
}
