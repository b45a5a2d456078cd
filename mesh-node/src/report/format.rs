//! Formats of access logs: Envoy's command operators in a line of text, or as the values of a JSON object.
//!
//! The defaults are Istio's. A line is written in one pass into one buffer; what comes from clients is escaped.

mod operator;
mod structure;
mod time;

use std::{collections::BTreeMap, sync::Arc};

use self::operator::{Named, Operator, Values, parse};
use self::time::TimeFormat;
use super::{
    entry::{ClusterName, Entry},
    expression::Expression,
    kept::Asks,
    plain,
};

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
    /// Names of query parameters.
    parameters: Vec<Box<str>>,
    expressions: Vec<Expression>,
    /// What has no value is left out: Envoy's `omit_empty_values`.
    omits: bool,
    /// There are objects or lists within it.
    nested: bool,
    /// Operators of Envoy's that nothing is known of here.
    unknown: Vec<&'static str>,
}

/// A text, and what comes behind it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Step {
    /// These bytes of the texts.
    from: u32,
    to: u32,
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Then {
    Nothing,
    Value(Operator),
    /// In JSON: so many of the next are one string.
    Joined(u16),
}

impl Program {
    fn asks_for_identities(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.then, Then::Value(operator) if operator.asks_for_identities()))
    }

    fn add(&mut self, text: &str, then: Then) -> Result<(), String> {
        let step = self.step(text, then)?;
        self.steps.push(step);
        Ok(())
    }

    fn step(&mut self, text: &str, then: Then) -> Result<Step, String> {
        let at = |n: usize| u32::try_from(n).map_err(|_| "is too long".to_owned());
        let from = at(self.texts.len())?;
        self.texts.push_str(text);
        Ok(Step { from, to: at(self.texts.len())?, then })
    }

    fn text(&self, step: &Step) -> &[u8] {
        self.texts.as_bytes().get(step.from as usize..step.to as usize).unwrap_or_default()
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
        structure::program(fields.into_iter().map(|(key, format)| (key, structure::Shape::Format(format)))).map(Self::Json)
    }

    /// The same with objects, lists and values in it that are as they are written.
    pub fn structured(fields: &BTreeMap<String, serde_json::Value>) -> Result<Self, String> {
        structure::program(fields.iter().map(|(key, value)| (key.as_str(), structure::Shape::Value(value)))).map(Self::Json)
    }

    /// Istio's JSON.
    pub fn default_json() -> Self {
        Self::json(JSON.into_iter().chain([X_FORWARDED_FOR])).unwrap_or_default()
    }

    /// The same, leaving out what has no value: keys of JSON, and in text what would stand for it.
    pub fn without_empty_values(self) -> Self {
        let omitting = |program: Arc<Program>| Arc::new(Program { omits: true, ..Arc::unwrap_or_clone(program) });
        match self {
            Self::Text(program) => Self::Text(omitting(program)),
            Self::Json(program) => Self::Json(omitting(program)),
        }
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
        program.expressions.iter().for_each(|expression| expression.asks(all));
        all.identities |= program.asks_for_identities();
    }

    /// The line, with its end.
    pub fn line(&self, entry: &Entry<'_>) -> String {
        let mut line = Vec::new();
        self.write(entry, &mut line);
        String::from_utf8_lossy(&line).into_owned()
    }

    /// The same, in place of what is in `line`.
    pub fn write(&self, entry: &Entry<'_>, line: &mut Vec<u8>) {
        line.clear();
        line.reserve(USUAL);
        match self {
            Self::Text(program) => {
                for step in &program.steps {
                    line.extend_from_slice(program.text(step));
                    if let Then::Value(operator) = step.then {
                        operator.tell(entry, program, &mut Text { line, nothing: if program.omits { b"" } else { b"-" } });
                    }
                }
                cut(line);
                // One line each, whatever clients sent: operators are escaped, and formats that have no end get one.
                if !line.ends_with(b"\n") {
                    line.push(b'\n');
                }
            }
            Self::Json(program) if program.omits => program.write_omitting(entry, line),
            Self::Json(program) => program.write_json(entry, line, b"-"),
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
        program.expressions.iter().for_each(|expression| expression.asks(&mut asks));
        asks.identities |= program.asks_for_identities();
        Ok(Self { program: Arc::new(program), asks: Arc::new(asks) })
    }

    /// The text, if there are no operators in it.
    pub fn plain(&self) -> Option<&str> {
        let is_text = |step: &Step| step.then == Then::Nothing;
        self.program.steps.iter().all(is_text).then_some(&*self.program.texts)
    }

    /// What it asks about.
    pub fn asks(&self) -> &Asks {
        &self.asks
    }

    pub fn text(&self, entry: &Entry<'_>) -> String {
        String::from_utf8_lossy(&self.bytes(entry)).into_owned()
    }

    /// As it is written; what clients sent may be no text.
    pub fn bytes(&self, entry: &Entry<'_>) -> Vec<u8> {
        join(self.program.steps.iter(), &self.program, entry, b"")
    }
}

/// Texts and values as one text; `nothing` is what stands for what has no value.
fn join<'s>(steps: impl Iterator<Item = &'s Step>, program: &Program, entry: &Entry<'_>, nothing: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    for step in steps {
        text.extend_from_slice(program.text(step));
        if let Then::Value(operator) = step.then {
            operator.tell(entry, program, &mut Joined { text: &mut text, nothing });
        }
    }
    text
}

/// Cuts a line that is too long.
fn cut(line: &mut Vec<u8>) {
    if line.len() > LONGEST {
        let mut text = String::from_utf8_lossy(line).into_owned();
        text.truncate(text.floor_char_boundary(LONGEST));
        text.truncate(without_part_of_an_escape(&text));
        *line = text.into_bytes();
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

/// Values in a line of text.
struct Text<'l> {
    line: &'l mut Vec<u8>,
    nothing: &'static [u8],
}

impl Values for Text<'_> {
    fn nothing(&mut self) {
        self.line.extend_from_slice(self.nothing);
    }

    fn number(&mut self, n: u64) {
        plain::push_number(n, self.line);
    }

    fn text(&mut self, text: &[u8]) {
        escape(text, self.line);
    }

    fn plain(&mut self, push: impl FnOnce(&mut Vec<u8>)) {
        push(self.line);
    }

    fn cluster(&mut self, cluster: &ClusterName<'_>) {
        cluster.push(self.line, escape);
    }
}

/// Values of JSON.
struct Json<'l>(&'l mut Vec<u8>);

impl Values for Json<'_> {
    fn nothing(&mut self) {
        self.0.extend_from_slice(b"null");
    }

    fn number(&mut self, n: u64) {
        plain::push_number(n, self.0);
    }

    fn text(&mut self, text: &[u8]) {
        quote(text, self.0);
    }

    fn plain(&mut self, push: impl FnOnce(&mut Vec<u8>)) {
        self.0.push(b'"');
        push(self.0);
        self.0.push(b'"');
    }

    fn cluster(&mut self, cluster: &ClusterName<'_>) {
        self.plain(|line| cluster.push(line, json));
    }
}

/// Values in a text that is no line yet.
struct Joined<'t> {
    text: &'t mut Vec<u8>,
    nothing: &'t [u8],
}

impl Values for Joined<'_> {
    fn nothing(&mut self) {
        self.text.extend_from_slice(self.nothing);
    }

    fn number(&mut self, n: u64) {
        plain::push_number(n, self.text);
    }

    fn text(&mut self, text: &[u8]) {
        self.text.extend_from_slice(text);
    }

    fn plain(&mut self, push: impl FnOnce(&mut Vec<u8>)) {
        push(self.text);
    }

    fn cluster(&mut self, cluster: &ClusterName<'_>) {
        cluster.push(self.text, |text, line| line.extend_from_slice(text));
    }
}

/// As much of a value as is told.
pub fn short(text: &str) -> &str {
    &text[..text.floor_char_boundary(LONGEST_VALUE)]
}

/// As a JSON string.
fn quote(text: &[u8], line: &mut Vec<u8>) {
    line.push(b'"');
    json(text, line);
    line.push(b'"');
}

/// Whether all of it can stand where it is to as it is, and is not too long.
fn is_plain(text: &[u8]) -> bool {
    const EACH: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = EACH << 7;
    // Of eight bytes at once, the high bit of those that are less than `n`, of bytes that have none.
    let below = |eight: u64, n: u8| eight.wrapping_sub(EACH * u64::from(n)) & !eight;
    let is = |eight: u64, b: u8| below(eight ^ (EACH * u64::from(b)), 1);
    let odd = |eight: u64| eight | below(eight, b' ') | is(eight, b'"') | is(eight, b'\\') | is(eight, 0x7f);
    let (eights, rest) = text.as_chunks::<8>();
    let all = eights.iter().fold(0, |all, eight| all | odd(u64::from_ne_bytes(*eight))) & HIGH == 0;
    all && text.len() <= LONGEST_VALUE && rest.iter().all(|b| (b' '..0x7f).contains(b) && !matches!(b, b'"' | b'\\'))
}

/// In a JSON string.
fn json(text: &[u8], line: &mut Vec<u8>) {
    if is_plain(text) {
        return line.extend_from_slice(text);
    }
    let control = |c: char| format!("\\u{:04x}", u32::from(c));
    if std::str::from_utf8(text).is_ok() {
        return escaped(text, line, control);
    }
    // What is no text is told byte by byte, as Envoy does.
    let bytes = &text[..text.len().min(LONGEST_VALUE)];
    for byte in bytes {
        if byte.is_ascii() {
            escaped(&[*byte], line, control);
        } else {
            line.extend_from_slice(control(char::from(*byte)).as_bytes());
        }
    }
}

/// In a line of text: nothing that could end the line, or the quotes it stands in.
fn escape(text: &[u8], line: &mut Vec<u8>) {
    if is_plain(text) {
        return line.extend_from_slice(text);
    }
    escaped(text, line, |c| format!("\\x{:02x}", u32::from(c)));
}

/// With what stands for characters that cannot stand there.
#[cold]
fn escaped(text: &[u8], line: &mut Vec<u8>, control: fn(char) -> String) {
    for chunk in text[..text.len().min(LONGEST_VALUE)].utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '"' => line.extend_from_slice(b"\\\""),
                '\\' => line.extend_from_slice(b"\\\\"),
                '\n' => line.extend_from_slice(b"\\n"),
                '\r' => line.extend_from_slice(b"\\r"),
                '\t' => line.extend_from_slice(b"\\t"),
                c if c.is_control() => line.extend_from_slice(control(c).as_bytes()),
                c => line.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        // What is no character, a last one that is cut among it.
        chunk.invalid().iter().for_each(|byte| line.extend_from_slice(control(char::from(*byte)).as_bytes()));
    }
}

#[cfg(test)]
mod tests;
