//! Formats of access logs: Envoy's command operators in a line of text, or as the values of a JSON object.
//!
//! The defaults are Istio's. A line is written in one pass into one buffer; what comes from clients is escaped.

mod operator;
mod time;

use std::{fmt::Write as _, sync::Arc};

use self::operator::{Named, Operand, Operator, parse};
use self::time::TimeFormat;
use super::{entry::Entry, kept::Asks, plain};

/// Longest line, bytes; the rest is cut off. Of JSON, values are left out from there on.
pub const LONGEST: usize = 16 * 1024;
/// What a line usually takes, bytes.
const USUAL: usize = 1024;
/// Longest value in it, bytes before it is escaped.
const LONGEST_VALUE: usize = 2 * 1024;

const TEXT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% %RESPONSE_FLAGS% \
    %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% \
    %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
    \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% \
    %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

const JSON: [(&str, &str); 23] = [
    ("authority", "%REQ(:AUTHORITY)%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("duration", "%DURATION%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("route_name", "%ROUTE_NAME%"),
    ("start_time", "%START_TIME%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
];

/// Istio's default JSON has one more, whose name would sort last.
const X_FORWARDED_FOR: (&str, &str) = ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%");

/// What a line looks like.
#[derive(Debug, Clone, PartialEq)]
pub enum Format {
    Text(Arc<Program>),
    /// An object, with its keys in the order they are written.
    Json(Arc<Program>),
}

/// How a line is put together. All of it is close together in memory: it is gone through for each line, and between two lines
/// much else is.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Program {
    steps: Vec<Step>,
    /// The texts, one behind the other.
    texts: String,
    headers: Vec<Named>,
    times: Vec<TimeFormat>,
    /// Operators of Envoy's that nothing is known of here.
    unknown: Vec<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    /// These bytes of the texts.
    Text {
        from: u32,
        to: u32,
    },
    Value(Operator),
    /// In JSON: so many of the next are one string.
    Joined(u16),
}

impl Program {
    fn add_text(&mut self, text: &str) -> Result<(), String> {
        if !text.is_empty() {
            let at = |n: usize| u32::try_from(n).map_err(|_| "is too long".to_owned());
            let from = at(self.texts.len())?;
            self.texts.push_str(text);
            self.steps.push(Step::Text { from, to: at(self.texts.len())? });
        }
        Ok(())
    }

    fn text(&self, from: u32, to: u32) -> &str {
        self.texts.get(from as usize..to as usize).unwrap_or_default()
    }
}

impl Default for Format {
    fn default() -> Self {
        // Istio's own; a test reads it.
        Self::text(TEXT).unwrap_or(Self::Text(Arc::default()))
    }
}

impl Format {
    /// A line of text. The error says what is wrong with it.
    pub fn text(format: &str) -> Result<Self, String> {
        let mut program = Program::default();
        parse(format, &mut program)?;
        Ok(Self::Text(Arc::new(program)))
    }

    /// A JSON object of these keys and formats. A value that is one operator keeps its type; what has no value is null.
    pub fn json<'a>(fields: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, String> {
        let mut program = Program::default();
        let mut before = String::from("{");
        for (key, format) in fields {
            quote(key, &mut before);
            before.push(':');
            program.add_text(&before).map_err(|e| format!("{key}: {e}"))?;
            ",".clone_into(&mut before);
            let first = program.steps.len();
            parse(format, &mut program).map_err(|e| format!("{key}: {e}"))?;
            let steps = program.steps.get(first..).unwrap_or_default();
            if !matches!(steps, [Step::Value(_)]) {
                let joined = u16::try_from(steps.len()).map_err(|_| format!("{key}: has too many operators"))?;
                program.steps.insert(first, Step::Joined(joined));
            }
        }
        let end = if before == "{" { "{}\n" } else { "}\n" };
        program.add_text(end)?;
        Ok(Self::Json(Arc::new(program)))
    }

    /// Istio's JSON.
    pub fn default_json() -> Self {
        Self::json(JSON.into_iter().chain([X_FORWARDED_FOR])).unwrap_or_default()
    }

    /// Operators of Envoy's that have no value here, whatever is told.
    pub fn knows_nothing_of(&self) -> &[&'static str] {
        let (Self::Text(program) | Self::Json(program)) = self;
        &program.unknown
    }

    /// Adds what it asks about.
    pub fn asks(&self, all: &mut Asks) {
        let (Self::Text(program) | Self::Json(program)) = self;
        program.headers.iter().for_each(|header| header.asks(all));
        all.identities |= program.steps.iter().any(|step| matches!(step, Step::Value(operator) if operator.asks_for_identities()));
    }

    /// The line, with its end.
    pub fn line(&self, entry: &Entry<'_>) -> String {
        let mut line = String::new();
        self.write(entry, &mut line);
        line
    }

    /// The same, in place of what is in `line`.
    pub fn write(&self, entry: &Entry<'_>, line: &mut String) {
        line.clear();
        line.reserve(USUAL);
        match self {
            Self::Text(program) => {
                for step in &program.steps {
                    match *step {
                        Step::Text { from, to } => push_text(program.text(from, to), line),
                        Step::Value(operator) => write(operator.value(entry, program), line),
                        Step::Joined(_) => {}
                    }
                }
                cut(line);
                // One line each, whatever clients sent: operators are escaped, and formats that have no end get one.
                if !line.ends_with('\n') {
                    line.push('\n');
                }
            }
            Self::Json(program) => {
                let mut steps = program.steps.iter();
                while let Some(step) = steps.next() {
                    let room = line.len() < LONGEST;
                    match *step {
                        Step::Text { from, to } => line.push_str(program.text(from, to)),
                        Step::Value(operator) if room => value(operator.value(entry, program), line),
                        Step::Value(_) => line.push_str("null"),
                        Step::Joined(n) => {
                            let joined = steps.by_ref().take(n.into());
                            if room {
                                quote(&join(joined, program, entry, "-"), line);
                            } else {
                                joined.for_each(drop);
                                line.push_str("null");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A text with operators in it that is not a line: the value of a header. What has no value is left out of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    program: Arc<Program>,
    asks: Arc<Asks>,
}

impl Template {
    /// The error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (mut program, mut asks) = (Program::default(), Asks::default());
        parse(text, &mut program)?;
        program.headers.iter().for_each(|header| header.asks(&mut asks));
        Ok(Self { program: Arc::new(program), asks: Arc::new(asks) })
    }

    /// The text, if there are no operators in it.
    pub fn plain(&self) -> Option<&str> {
        let is_text = |step: &Step| matches!(step, Step::Text { .. });
        self.program.steps.iter().all(is_text).then_some(&*self.program.texts)
    }

    /// What it asks about.
    pub fn asks(&self) -> &Asks {
        &self.asks
    }

    pub fn text(&self, entry: &Entry<'_>) -> String {
        join(self.program.steps.iter(), &self.program, entry, "")
    }
}

/// Texts and values as one text; `nothing` is what stands for what has no value.
fn join<'s>(steps: impl Iterator<Item = &'s Step>, program: &Program, entry: &Entry<'_>, nothing: &str) -> String {
    let mut text = String::new();
    for step in steps {
        match *step {
            Step::Text { from, to } => text.push_str(program.text(from, to)),
            Step::Value(operator) => match operator.value(entry, program) {
                None => text.push_str(nothing),
                Some(operand) => push(&operand, &mut text),
            },
            Step::Joined(_) => {}
        }
    }
    text
}

/// Cuts a line that is too long.
fn cut(line: &mut String) {
    if line.len() > LONGEST {
        line.truncate(line.floor_char_boundary(LONGEST));
        line.truncate(without_part_of_an_escape(line));
    }
}

/// As much of a text as does not end in the midst of what stands for one character: two of them, or `\\x` and two digits.
fn without_part_of_an_escape(text: &str) -> usize {
    let Some(last) = text.rfind('\\') else { return text.len() };
    let run = text[..=last].bytes().rev().take_while(|b| *b == b'\\').count();
    let begun = &text[last + 1..];
    // An even number of them are pairs.
    let whole = run % 2 == 0 || begun.len() >= 3 || !begun.is_empty() && !begun.starts_with('x');
    if whole { text.len() } else { last }
}

/// A value in a line of text.
fn write(value: Option<Operand<'_>>, line: &mut String) {
    match value {
        None => line.push('-'),
        Some(Operand::Text(text)) => escape(&text, line),
        // A string takes any text.
        Some(Operand::Shown(what)) => drop(write!(Escaping(line, escape), "{what}")),
        Some(Operand::Cluster(cluster)) => cluster.push(line, escape),
        Some(plain) => push(&plain, line),
    }
}

/// Most texts between operators are a blank, for which a copy is not worth its call.
fn push_text(text: &str, line: &mut String) {
    match text {
        " " => line.push(' '),
        other => line.push_str(other),
    }
}

/// What needs no escaping.
fn push(operand: &Operand<'_>, line: &mut String) {
    match operand {
        Operand::Number(n) => plain::push_number(*n, line),
        Operand::Address(address) => plain::push_address(*address, line),
        Operand::Ip(ip) => plain::push_ip(*ip, line),
        Operand::Time(time) => plain::push_time(*time, line),
        Operand::Text(text) => line.push_str(text),
        Operand::Cluster(cluster) => cluster.push(line, |text, line| line.push_str(text)),
        // A string takes any text.
        Operand::Shown(what) => drop(write!(line, "{what}")),
    }
}

/// Escapes what is written.
struct Escaping<'l>(&'l mut String, fn(&str, &mut String));

impl std::fmt::Write for Escaping<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        (self.1)(text, self.0);
        Ok(())
    }
}

/// The value of a field of JSON.
fn value(value: Option<Operand<'_>>, line: &mut String) {
    match value {
        None => line.push_str("null"),
        Some(number @ Operand::Number(_)) => push(&number, line),
        Some(Operand::Text(text)) => quote(&text, line),
        Some(other) => {
            line.push('"');
            match other {
                // A string takes any text.
                Operand::Shown(what) => drop(write!(Escaping(line, json), "{what}")),
                Operand::Cluster(cluster) => cluster.push(line, json),
                plain => push(&plain, line),
            }
            line.push('"');
        }
    }
}

/// As much of a value as is told.
pub fn short(text: &str) -> &str {
    &text[..text.floor_char_boundary(LONGEST_VALUE)]
}

/// As a JSON string.
fn quote(text: &str, line: &mut String) {
    line.push('"');
    json(short(text), line);
    line.push('"');
}

/// Whether it can stand where it is to as it is. Looks at all of it in any case: so it can look at many bytes at once.
fn is_plain(text: &str) -> bool {
    let odd = |b: u8| u8::from(!(b' '..0x7f).contains(&b) || matches!(b, b'"' | b'\\'));
    text.bytes().fold(0, |all, b| all | odd(b)) == 0
}

/// In a JSON string.
fn json(text: &str, line: &mut String) {
    if is_plain(text) {
        return line.push_str(text);
    }
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            c if c.is_control() => drop(write!(line, "\\u{:04x}", u32::from(c))),
            c => line.push(c),
        }
    }
}

/// In a line of text: nothing that could end the line, or the quotes it stands in.
fn escape(text: &str, line: &mut String) {
    let text = short(text);
    if is_plain(text) {
        return line.push_str(text);
    }
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            c if c.is_control() => drop(write!(line, "\\x{:02x}", u32::from(c))),
            c => line.push(c),
        }
    }
}

#[cfg(test)]
mod tests;
