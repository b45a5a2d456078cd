//! Lines of the process' own log, as ztunnel writes them: readers of that log, and of Istio's other components, know both forms.
//!
//! ```text
//! 2026-01-02T03:04:05.678901Z<TAB>info<TAB>access<TAB>connection complete<TAB>src.addr=10.0.0.1:2 src.workload="web" bytes_sent=3
//! {"level":"info","time":"2026-01-02T03:04:05.678901Z","scope":"access","message":"connection complete","src.addr":"10.0.0.1:2",...}
//! ```

use std::{
    fmt::{self, Debug, Write},
    time::{SystemTime, UNIX_EPOCH},
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// One of the two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text,
    Json,
}

impl<S, N> FormatEvent<S, N> for Form
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        let mut fields = Fields { form: *self, message: String::new(), rest: String::new() };
        event.record(&mut fields);
        let (time, level, Fields { message, rest, .. }) = (now(), level(*metadata.level()), fields);
        match self {
            Self::Text if rest.is_empty() => writeln!(writer, "{time}\t{level}\t{}\t{message}", metadata.target()),
            Self::Text => writeln!(writer, "{time}\t{level}\t{}\t{message}\t{rest}", metadata.target()),
            Self::Json => {
                let (scope, message) = (quoted(metadata.target()), quoted(&message));
                writeln!(writer, r#"{{"level":"{level}","time":"{time}","scope":{scope},"message":{message}{rest}}}"#)
            }
        }
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::TRACE => "trace",
        Level::DEBUG => "debug",
        Level::INFO => "info",
        Level::WARN => "warn",
        Level::ERROR => "error",
    }
}

/// UTC with microseconds.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", since.subsec_micros())
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

fn quoted(text: &str) -> String {
    // A text is always one of JSON's.
    serde_json::to_string(text).unwrap_or_default()
}

/// What an event says, as far as it was gone through.
struct Fields {
    form: Form,
    message: String,
    rest: String,
}

impl Fields {
    fn put(&mut self, field: &Field, value: impl fmt::Display) {
        // A string takes any text.
        let _ = match self.form {
            Form::Json => write!(self.rest, ",{}:{value}", quoted(field.name())),
            Form::Text if self.rest.is_empty() => write!(self.rest, "{}={value}", field.name()),
            Form::Text => write!(self.rest, " {}={value}", field.name()),
        };
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no other numbers.
        if value.is_finite() { self.put(field, value) } else { self.record_debug(field, &value) }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match self.form {
            _ if field.name() == "message" => value.clone_into(&mut self.message),
            Form::Json => self.put(field, quoted(value)),
            Form::Text => self.put(field, format_args!("{value:?}")),
        }
    }

    /// What is no text is not quoted as one.
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let text = format!("{value:?}");
        match self.form {
            Form::Text if field.name() == "message" && text.contains(char::is_control) => self.message = text.escape_debug().to_string(),
            _ if field.name() == "message" => self.message = text,
            Form::Json => self.put(field, quoted(&text)),
            // One line each, and nothing for a terminal to obey.
            Form::Text if text.contains(char::is_control) => self.put(field, format_args!("{text:?}")),
            Form::Text => self.put(field, text),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("lock").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(form: Form) -> Vec<String> {
        let lines = Lines::default();
        let to = lines.clone();
        let subscriber = tracing_subscriber::fmt().event_format(form).with_writer(move || to.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let (addr, none): (_, Option<&str>) = (std::net::SocketAddr::from(([10, 0, 0, 1], 80)), None);
            tracing::info!(
                target: "access",
                { src.addr = %addr, src.workload = "a\"b", src.namespace = none, bytes_sent = 3_u64, ok = true, share = 0.5 },
                "connection complete"
            );
            tracing::warn!(target: "app", error = %"two\nlines", "n {}", 1);
            tracing::error!(target: "app", code = %"\u{1b}[2J", "a\n{}", "\u{1b}b");
        });
        let text = String::from_utf8(lines.0.lock().expect("lock").clone()).expect("a text");
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn lines_are_ztunnels() {
        let text = logged(Form::Text);
        let parts = text.iter().map(|line| line.split('\t').collect::<Vec<_>>()).collect::<Vec<_>>();
        let access =
            ["info", "access", "connection complete", "src.addr=10.0.0.1:80 src.workload=\"a\\\"b\" bytes_sent=3 ok=true share=0.5"];
        assert_eq!(parts[0][1..], access);
        assert_eq!(parts[1][1..], ["warn", "app", "n 1", "error=\"two\\nlines\""]);
        assert_eq!(parts[2][1..], ["error", "app", "a\\n\\u{1b}b", "code=\"\\u{1b}[2J\""]);
        let time = parts[0][0];
        assert!(time.len() == 27 && time.starts_with("20") && time.ends_with('Z') && time.as_bytes()[10] == b'T', "{time}");
        let json = logged(Form::Json).iter().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<serde_json::Value>>();
        for (key, value) in [
            ("level", "info".into()),
            ("scope", "access".into()),
            ("message", "connection complete".into()),
            ("src.addr", "10.0.0.1:80".into()),
            ("src.workload", "a\"b".into()),
            ("bytes_sent", 3.into()),
            ("ok", true.into()),
            ("share", serde_json::json!(0.5)),
        ] {
            assert_eq!(json[0][key], value, "{key}");
        }
        assert!(json[0].get("src.namespace").is_none() && json[0]["time"].as_str().is_some_and(|t| t.len() == 27));
        assert_eq!((&json[1]["level"], &json[1]["error"]), (&"warn".into(), &"two\nlines".into()));
    }
}
