//! Whether a failed attempt is tried again, and when. Envoy's router as recorded, Istio's defaults.

use std::{collections::BTreeSet, time::Duration};

use http::{HeaderMap, StatusCode};

/// Conditions as a set of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RetryOn(u32);

impl RetryOn {
    pub const SERVER_ERROR: Self = Self(1);
    pub const GATEWAY_ERROR: Self = Self(1 << 1);
    pub const RESET: Self = Self(1 << 2);
    pub const RESET_BEFORE_REQUEST: Self = Self(1 << 3);
    pub const CONNECT_FAILURE: Self = Self(1 << 4);
    pub const REFUSED_STREAM: Self = Self(1 << 5);
    pub const RETRIABLE_4XX: Self = Self(1 << 6);
    pub const STATUS_CODES: Self = Self(1 << 7);
    pub const RATE_LIMITED: Self = Self(1 << 8);
    pub const HEADERS: Self = Self(1 << 9);
    pub const GRPC_CANCELLED: Self = Self(1 << 10);
    pub const GRPC_DEADLINE: Self = Self(1 << 11);
    pub const GRPC_INTERNAL: Self = Self(1 << 12);
    pub const GRPC_EXHAUSTED: Self = Self(1 << 13);
    pub const GRPC_UNAVAILABLE: Self = Self(1 << 14);

    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "5xx" => Self::SERVER_ERROR,
            "gateway-error" => Self::GATEWAY_ERROR,
            "reset" => Self::RESET,
            "reset-before-request" => Self::RESET_BEFORE_REQUEST,
            "connect-failure" => Self::CONNECT_FAILURE,
            "refused-stream" => Self::REFUSED_STREAM,
            "retriable-4xx" => Self::RETRIABLE_4XX,
            "retriable-status-codes" => Self::STATUS_CODES,
            "envoy-ratelimited" => Self::RATE_LIMITED,
            "retriable-headers" => Self::HEADERS,
            "cancelled" => Self::GRPC_CANCELLED,
            "deadline-exceeded" => Self::GRPC_DEADLINE,
            "internal" => Self::GRPC_INTERNAL,
            "resource-exhausted" => Self::GRPC_EXHAUSTED,
            "unavailable" => Self::GRPC_UNAVAILABLE,
            // Only HTTP/3 has it; taken so that existing configuration stays valid.
            "http3-post-connect-failure" => Self::default(),
            _ => return None,
        })
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    /// Attempts beyond the first.
    pub attempts: u32,
    pub on: RetryOn,
    pub codes: BTreeSet<u16>,
    /// `None`: the timeout of the whole exchange is the only one.
    pub per_try_timeout: Option<Duration>,
    pub base_backoff: Duration,
    /// Whether endpoints already tried are avoided.
    pub ignore_previous_hosts: bool,
    /// Whether localities already tried are avoided.
    pub remote_localities: bool,
}

/// Envoy's base interval; the most is ten times the base.
pub const BASE_BACKOFF: Duration = Duration::from_millis(25);
/// Retries under way that a retry budget always allows.
pub const BUDGET_MINIMUM: u32 = 3;

/// Istio's policy where neither the route nor the mesh says anything.
pub fn default_policy() -> RetryPolicy {
    RetryPolicy {
        attempts: 2,
        on: default_conditions(),
        codes: BTreeSet::new(),
        per_try_timeout: None,
        base_backoff: BASE_BACKOFF,
        ignore_previous_hosts: true,
        remote_localities: false,
    }
}

const fn default_conditions() -> RetryOn {
    RetryOn::CONNECT_FAILURE.or(RetryOn::REFUSED_STREAM).or(RetryOn::GRPC_UNAVAILABLE).or(RetryOn::GRPC_CANCELLED).or(RetryOn::STATUS_CODES)
}

/// Reads Istio's `retryOn`: names and status codes, separated by commas. Empty means Istio's default conditions.
pub fn parse_retry_on(text: &str) -> Result<(RetryOn, BTreeSet<u16>), String> {
    if text.trim().is_empty() {
        return Ok((default_conditions(), BTreeSet::new()));
    }
    let (mut on, mut codes) = (RetryOn::default(), BTreeSet::new());
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        if let Some(named) = RetryOn::named(part) {
            on = on.or(named);
            continue;
        }
        let code = part.parse::<u16>().ok().filter(|c| (100..600).contains(c));
        let code = code.ok_or_else(|| format!("{part:?} is neither a retry condition nor an HTTP status code"))?;
        codes.insert(code);
        on = on.or(RetryOn::STATUS_CODES);
    }
    Ok((on, codes))
}

/// How an attempt failed without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// The connection could not be made.
    ConnectFailure,
    ConnectTimeout,
    /// The connection ended.
    ConnectionTermination,
    /// What came is not HTTP.
    ProtocolError,
    /// `RST_STREAM(REFUSED_STREAM)`: the peer did nothing with it.
    RefusedStream,
    /// `RST_STREAM` with another code.
    RemoteReset,
    /// A limit of the destination was reached.
    Overflow,
    PerTryTimeout,
}

impl RetryPolicy {
    /// Whether a response asks for another attempt.
    pub fn wants_after_response(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        if headers.contains_key("x-envoy-ratelimited") {
            return self.on.has(RetryOn::RATE_LIMITED);
        }
        let code = status.as_u16();
        self.on.has(RetryOn::SERVER_ERROR) && status.is_server_error()
            || self.on.has(RetryOn::GATEWAY_ERROR) && matches!(code, 502..=504)
            || self.on.has(RetryOn::RETRIABLE_4XX) && code == 409
            || self.on.has(RetryOn::STATUS_CODES) && self.codes.contains(&code)
            || grpc_condition(headers).is_some_and(|c| self.on.has(c))
    }

    /// Whether a failure without a response does.
    pub fn wants_after_reset(&self, reset: Reset) -> bool {
        let any = RetryOn::SERVER_ERROR.or(RetryOn::GATEWAY_ERROR).or(RetryOn::RESET);
        match reset {
            Reset::Overflow => false,
            Reset::ConnectFailure | Reset::ConnectTimeout => {
                self.on.has(any.or(RetryOn::CONNECT_FAILURE).or(RetryOn::RESET_BEFORE_REQUEST))
            }
            Reset::RefusedStream => self.on.has(any.or(RetryOn::REFUSED_STREAM)),
            Reset::ConnectionTermination | Reset::ProtocolError | Reset::RemoteReset | Reset::PerTryTimeout => self.on.has(any),
        }
    }

    /// How long to wait before the `number`th retry, counted from one: uniform from nothing to the base, doubled by every retry, at most
    /// ten times the base. `dice` is uniform over all values.
    pub fn backoff(&self, number: u32, dice: u32) -> Duration {
        let base = self.base_backoff.as_micros();
        let factor = 1_u128 << (number.clamp(1, 20) - 1);
        let most = (base * factor).min(base * 10);
        let micros = (most * u128::from(dice)) >> 32;
        Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }
}

/// The condition a `grpc-status` in response headers stands for, whatever the request was.
fn grpc_condition(headers: &HeaderMap) -> Option<RetryOn> {
    Some(match headers.get("grpc-status")?.to_str().ok()?.parse::<u32>().ok()? {
        1 => RetryOn::GRPC_CANCELLED,
        4 => RetryOn::GRPC_DEADLINE,
        8 => RetryOn::GRPC_EXHAUSTED,
        13 => RetryOn::GRPC_INTERNAL,
        14 => RetryOn::GRPC_UNAVAILABLE,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(on: &str) -> RetryPolicy {
        let (on, codes) = parse_retry_on(on).expect("valid");
        RetryPolicy { on, codes, ..default_policy() }
    }

    #[test]
    fn responses_are_retried_as_recorded() {
        let cases = [
            ("5xx", 500, true),
            ("5xx", 404, false),
            ("gateway-error", 500, false),
            ("gateway-error", 502, true),
            ("gateway-error", 503, true),
            ("gateway-error", 504, true),
            ("retriable-4xx", 404, false),
            ("retriable-4xx", 409, true),
            ("418", 418, true),
            ("418", 503, false),
            ("503,reset", 503, true),
            ("", 503, false),
            ("reset", 503, false),
        ];
        for (on, status, expected) in cases {
            let status = StatusCode::from_u16(status).expect("valid");
            assert_eq!(policy(on).wants_after_response(status, &HeaderMap::new()), expected, "{on} {status}");
        }
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", "14".parse().expect("valid"));
        assert!(policy("").wants_after_response(StatusCode::OK, &headers));
        assert!(!policy("cancelled").wants_after_response(StatusCode::OK, &headers));
        headers.insert("x-envoy-ratelimited", "true".parse().expect("valid"));
        assert!(!policy("unavailable,5xx").wants_after_response(StatusCode::SERVICE_UNAVAILABLE, &headers));
        assert!(policy("envoy-ratelimited").wants_after_response(StatusCode::TOO_MANY_REQUESTS, &headers));
    }

    #[test]
    fn resets_are_retried_as_recorded() {
        use Reset::*;
        let all =
            [ConnectFailure, ConnectTimeout, ConnectionTermination, ProtocolError, RefusedStream, RemoteReset, PerTryTimeout, Overflow];
        let cases = [
            ("5xx", [true, true, true, true, true, true, true, false]),
            ("gateway-error", [true, true, true, true, true, true, true, false]),
            ("reset", [true, true, true, true, true, true, true, false]),
            ("connect-failure", [true, true, false, false, false, false, false, false]),
            ("reset-before-request", [true, true, false, false, false, false, false, false]),
            ("refused-stream", [false, false, false, false, true, false, false, false]),
            ("503", [false; 8]),
            ("retriable-4xx", [false; 8]),
            ("", [true, true, false, false, true, false, false, false]),
        ];
        for (on, expected) in cases {
            assert_eq!(all.map(|r| policy(on).wants_after_reset(r)), expected, "{on}");
        }
    }

    #[test]
    fn backoff_is_full_jitter_up_to_ten_times_the_base() {
        let policy = policy("5xx");
        for (number, most) in [(1, 25), (2, 50), (3, 100), (4, 200), (5, 250), (30, 250)] {
            let longest = policy.backoff(number, u32::MAX);
            assert!(longest <= Duration::from_millis(most) && longest > Duration::from_millis(most - 1), "{number}: {longest:?}");
            assert_eq!(policy.backoff(number, 0), Duration::ZERO);
        }
    }

    #[test]
    fn conditions_that_do_not_exist_are_named() {
        assert!(parse_retry_on("5xx, nonsense").expect_err("refused").contains("nonsense"));
        assert!(parse_retry_on("999").is_err());
    }
}
