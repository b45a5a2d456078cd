//! The texts metrics are told in.

use std::{collections::HashSet, fmt};

use http::{HeaderMap, HeaderValue, header::ACCEPT};
use prometheus_client::{encoding::text::encode, registry::Registry};

/// Which text a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposition {
    /// Who asks for it.
    OpenMetrics,
    /// Prometheus' older text, as `curl` and its tools expect: names of counters have their `_total` in the comments too.
    Text,
}

impl Exposition {
    /// What a client takes, by its `accept` headers.
    pub fn accepted(headers: &HeaderMap) -> Self {
        let open = headers.get_all(ACCEPT).iter().any(|v| v.to_str().is_ok_and(|v| v.contains("application/openmetrics-text")));
        if open { Self::OpenMetrics } else { Self::Text }
    }

    pub fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        })
    }

    pub fn render(self, registry: &Registry) -> Result<String, fmt::Error> {
        let mut open = String::new();
        encode(&mut open, registry)?;
        Ok(match self {
            Self::OpenMetrics => open,
            Self::Text => older(&open),
        })
    }
}

fn older(open: &str) -> String {
    let counters = open.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect::<HashSet<_>>();
    let mut text = String::with_capacity(open.len());
    for line in open.lines().filter(|l| *l != "# EOF") {
        let comment = ["# HELP ", "# TYPE "].into_iter().find_map(|kind| Some((kind, line.strip_prefix(kind)?)));
        match comment.and_then(|(kind, rest)| Some((kind, rest.split_once(' ')?))) {
            Some((kind, (name, rest))) if counters.contains(name) => text.extend([kind, name, "_total ", rest]),
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}
