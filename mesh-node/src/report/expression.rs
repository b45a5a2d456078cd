//! Expressions in the Common Expression Language over a request's attributes, as Istio's Telemetry uses them: in filters of access
//! logs and values of metric tags. Attributes are Envoy's (its "Attributes" page); what is not known here is refused when the
//! expression is read.
//!
//! A subset of the language: no macros beside `has`, no maps, no timestamps; durations there are. Evaluation allocates for strings it makes, and its
//! cost is bounded by the length of the text.

mod parse;

use std::borrow::Cow;

use super::{
    attributes::{Attribute, Attributes, HeadersOf},
    entry::Header,
    kept::Asks,
};

/// Longest expression that is read, bytes.
pub const LONGEST: usize = 4096;

/// A checked expression.
#[derive(Debug, Clone, PartialEq)]
pub struct Expression(Node);

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Literal(Literal),
    List(Vec<Node>),
    Attribute(Attribute),
    Headers(HeadersOf),
    /// One header, by its name in lower case.
    Header(HeadersOf, String),
    Has(Box<Node>),
    Not(Box<Node>),
    Negative(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    Choose(Box<Node>, Box<Node>, Box<Node>),
    Binary(Binary, Box<Node>, Box<Node>),
    Call(Function, Vec<Node>),
    Matches(Box<Node>, Pattern),
}

#[derive(Debug, Clone, PartialEq)]
enum Literal {
    Null,
    Bool(bool),
    Int(i64),
    Double(f64),
    Text(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Binary {
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    StartsWith,
    EndsWith,
    Contains,
    Size,
    String,
    Int,
    Double,
    LowerAscii,
    Duration,
    /// A duration as a whole number of so many nanoseconds.
    Units(i64),
}

/// A regular expression, compiled when it is read.
#[derive(Debug, Clone)]
struct Pattern(regex::Regex);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

/// What an expression, or a part of it, is worth.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Double(f64),
    Text(Cow<'a, str>),
    /// Nanoseconds.
    Duration(i64),
    List(Vec<Value<'a>>),
}

/// It has no value: an attribute is missing, or a type does not fit. The reason is CEL's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoValue;

type Evaluated<'a> = Result<Value<'a>, NoValue>;

impl Expression {
    /// Reads an expression; the error says what is wrong and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > LONGEST {
            return Err(format!("is longer than {LONGEST} bytes"));
        }
        parse::parse(text).map(Self)
    }

    pub fn value<'a>(&'a self, of: &'a dyn Attributes) -> Evaluated<'a> {
        evaluate(&self.0, of)
    }

    /// Whether it holds. One without a value, or with another than a truth value, does not.
    pub fn holds(&self, of: &dyn Attributes) -> bool {
        self.value(of) == Ok(Value::Bool(true))
    }

    /// Its value as the value of a tag; none is `unknown`.
    pub fn tag(&self, of: &dyn Attributes) -> String {
        self.text(of).unwrap_or_else(|| "unknown".to_owned())
    }

    /// Its value as text.
    pub fn text(&self, of: &dyn Attributes) -> Option<String> {
        self.value(of).ok().and_then(Value::text)
    }

    /// Its value, if it asks about nothing.
    pub fn constant(&self) -> Option<String> {
        match &self.0 {
            Node::Literal(Literal::Text(text)) => Some(text.clone()),
            _ => None,
        }
    }

    /// Adds the headers it asks about.
    pub fn asks(&self, all: &mut Asks) {
        asks(&self.0, all);
    }
}

fn asks(node: &Node, all: &mut Asks) {
    let one = |whose, name: &str, all: &mut Asks| Header::named(name).iter().for_each(|header| all.for_one(whose, header));
    match node {
        Node::Literal(_) => {}
        Node::Attribute(attribute) => {
            attribute.request_header().iter().for_each(|name| one(HeadersOf::Request, name, all));
            all.identities |= matches!(attribute, Attribute::ConnectionPeer | Attribute::ConnectionLocal);
        }
        Node::Headers(whose) => all.for_all(*whose),
        Node::Header(whose, name) => one(*whose, name, all),
        Node::List(nodes) | Node::Call(_, nodes) => nodes.iter().for_each(|n| asks(n, all)),
        Node::Has(a) | Node::Not(a) | Node::Negative(a) | Node::Matches(a, _) => asks(a, all),
        Node::And(a, b) | Node::Or(a, b) | Node::Binary(_, a, b) => [a, b].into_iter().for_each(|n| asks(n, all)),
        Node::Choose(a, b, c) => [a, b, c].into_iter().for_each(|n| asks(n, all)),
    }
}

impl Value<'_> {
    fn text(self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.into_owned()),
            Self::Int(n) => Some(n.to_string()),
            Self::Double(n) => Some(n.to_string()),
            Self::Bool(b) => Some(b.to_string()),
            Self::Duration(nanos) => Some(seconds(nanos)),
            Self::Null | Self::List(_) => None,
        }
    }

    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Int(_) | Self::Double(_), Self::Int(_) | Self::Double(_)) => self.order(other) == Some(std::cmp::Ordering::Equal),
            _ => self == other,
        }
    }

    fn order(&self, other: &Self) -> Option<std::cmp::Ordering> {
        match (self, other) {
            (Self::Text(a), Self::Text(b)) => Some(a.cmp(b)),
            (Self::Bool(a), Self::Bool(b)) => Some(a.cmp(b)),
            (Self::Int(a), Self::Int(b)) | (Self::Duration(a), Self::Duration(b)) => Some(a.cmp(b)),
            _ => self.number()?.partial_cmp(&other.number()?),
        }
    }

    fn number(&self) -> Option<f64> {
        match self {
            #[expect(clippy::cast_precision_loss, reason = "numbers of different types are compared as CEL does")]
            Self::Int(n) => Some(*n as f64),
            Self::Double(n) => Some(*n),
            _ => None,
        }
    }
}

fn evaluate<'a>(node: &'a Node, of: &'a dyn Attributes) -> Evaluated<'a> {
    Ok(match node {
        Node::Literal(literal) => match literal {
            Literal::Null => Value::Null,
            Literal::Bool(b) => Value::Bool(*b),
            Literal::Int(n) => Value::Int(*n),
            Literal::Double(n) => Value::Double(*n),
            Literal::Text(text) => Value::Text(Cow::Borrowed(text)),
        },
        Node::List(nodes) => Value::List(nodes.iter().map(|n| evaluate(n, of)).collect::<Result<_, _>>()?),
        Node::Attribute(attribute) => of.attribute(*attribute).ok_or(NoValue)?,
        // Only its members, and what asks for one of them, have a value.
        Node::Headers(_) => return Err(NoValue),
        Node::Header(whose, name) => Value::Text(of.header(*whose, name).ok_or(NoValue)?),
        Node::Has(what) => Value::Bool(evaluate(what, of).is_ok()),
        Node::Not(what) => Value::Bool(!truth(what, of)?),
        Node::Negative(what) => match evaluate(what, of)? {
            Value::Int(n) => Value::Int(n.checked_neg().ok_or(NoValue)?),
            Value::Double(n) => Value::Double(-n),
            Value::Duration(n) => Value::Duration(n.checked_neg().ok_or(NoValue)?),
            _ => return Err(NoValue),
        },
        // One side that decides makes up for the other's having no value.
        Node::And(a, b) => Value::Bool(either(truth(a, of), || truth(b, of), false)?),
        Node::Or(a, b) => Value::Bool(either(truth(a, of), || truth(b, of), true)?),
        Node::Choose(which, a, b) => evaluate(if truth(which, of)? { a } else { b }, of)?,
        Node::Binary(Binary::In, what, place) => Value::Bool(is_in(what, place, of)?),
        Node::Binary(binary, a, b) => binary.of(evaluate(a, of)?, evaluate(b, of)?)?,
        Node::Call(function, arguments) => function.of(arguments, of)?,
        Node::Matches(what, pattern) => match evaluate(what, of)? {
            Value::Text(text) => Value::Bool(pattern.0.is_match(&text)),
            _ => return Err(NoValue),
        },
    })
}

fn truth(node: &Node, of: &dyn Attributes) -> Result<bool, NoValue> {
    match evaluate(node, of)? {
        Value::Bool(b) => Ok(b),
        _ => Err(NoValue),
    }
}

fn either(one: Result<bool, NoValue>, other: impl FnOnce() -> Result<bool, NoValue>, decides: bool) -> Result<bool, NoValue> {
    if one == Ok(decides) {
        return one;
    }
    match (one, other()) {
        (_, Ok(b)) if b == decides => Ok(decides),
        (Ok(_), other) => other,
        (Err(e), _) => Err(e),
    }
}

fn is_in(what: &Node, place: &Node, of: &dyn Attributes) -> Result<bool, NoValue> {
    let what = evaluate(what, of)?;
    if let Node::Headers(whose) = place {
        let Value::Text(name) = what else { return Err(NoValue) };
        return Ok(of.header(*whose, &name.to_ascii_lowercase()).is_some());
    }
    match evaluate(place, of)? {
        Value::List(all) => Ok(all.iter().any(|v| v.same(&what))),
        _ => Err(NoValue),
    }
}

impl Binary {
    fn of<'a>(self, a: Value<'a>, b: Value<'a>) -> Evaluated<'a> {
        use std::cmp::Ordering::{Greater, Less};
        let ordered = |is: &dyn Fn(std::cmp::Ordering) -> bool| a.order(&b).map(|o| Value::Bool(is(o))).ok_or(NoValue);
        match self {
            Self::Equal => Ok(Value::Bool(a.same(&b))),
            Self::Unequal => Ok(Value::Bool(!a.same(&b))),
            Self::Less => ordered(&|o| o == Less),
            Self::LessOrEqual => ordered(&|o| o != Greater),
            Self::Greater => ordered(&|o| o == Greater),
            Self::GreaterOrEqual => ordered(&|o| o != Less),
            Self::In => Err(NoValue),
            Self::Add | Self::Subtract | Self::Multiply | Self::Divide | Self::Remainder => self.arithmetic(a, b),
        }
    }

    fn arithmetic<'a>(self, a: Value<'a>, b: Value<'a>) -> Evaluated<'a> {
        let whole = |n: Option<i64>| n.map(Value::Int).ok_or(NoValue);
        match (self, a, b) {
            (Self::Add, Value::Text(a), Value::Text(b)) => Ok(Value::Text(Cow::Owned(a.into_owned() + &b))),
            (Self::Add, Value::List(mut a), Value::List(b)) => {
                a.extend(b);
                Ok(Value::List(a))
            }
            (Self::Add, Value::Int(a), Value::Int(b)) => whole(a.checked_add(b)),
            (Self::Subtract, Value::Int(a), Value::Int(b)) => whole(a.checked_sub(b)),
            (Self::Multiply, Value::Int(a), Value::Int(b)) => whole(a.checked_mul(b)),
            (Self::Divide, Value::Int(a), Value::Int(b)) => whole(a.checked_div(b)),
            (Self::Remainder, Value::Int(a), Value::Int(b)) => whole(a.checked_rem(b)),
            (Self::Add, Value::Duration(a), Value::Duration(b)) => a.checked_add(b).map(Value::Duration).ok_or(NoValue),
            (Self::Subtract, Value::Duration(a), Value::Duration(b)) => a.checked_sub(b).map(Value::Duration).ok_or(NoValue),
            (Self::Add, Value::Double(a), Value::Double(b)) => Ok(Value::Double(a + b)),
            (Self::Subtract, Value::Double(a), Value::Double(b)) => Ok(Value::Double(a - b)),
            (Self::Multiply, Value::Double(a), Value::Double(b)) => Ok(Value::Double(a * b)),
            (Self::Divide, Value::Double(a), Value::Double(b)) => Ok(Value::Double(a / b)),
            _ => Err(NoValue),
        }
    }
}

impl Function {
    fn of<'a>(self, arguments: &'a [Node], of: &'a dyn Attributes) -> Evaluated<'a> {
        let mut values = arguments.iter().map(|a| evaluate(a, of));
        let first = values.next().ok_or(NoValue)??;
        let second = values.next().transpose()?;
        let number = |n: f64| {
            #[expect(clippy::cast_possible_truncation, reason = "CEL truncates; what does not fit is checked")]
            let whole = n as i64;
            if n.is_finite() && n.abs() < 9.2e18 { Ok(Value::Int(whole)) } else { Err(NoValue) }
        };
        match (self, first, second) {
            (Self::StartsWith, Value::Text(a), Some(Value::Text(b))) => Ok(Value::Bool(a.starts_with(&*b))),
            (Self::EndsWith, Value::Text(a), Some(Value::Text(b))) => Ok(Value::Bool(a.ends_with(&*b))),
            (Self::Contains, Value::Text(a), Some(Value::Text(b))) => Ok(Value::Bool(a.contains(&*b))),
            (Self::LowerAscii, Value::Text(a), None) => Ok(Value::Text(Cow::Owned(a.to_ascii_lowercase()))),
            (Self::Size, Value::Text(a), None) => i64::try_from(a.chars().count()).map(Value::Int).map_err(|_| NoValue),
            (Self::Size, Value::List(a), None) => i64::try_from(a.len()).map(Value::Int).map_err(|_| NoValue),
            (Self::String, value, None) => value.text().map(|t| Value::Text(Cow::Owned(t))).ok_or(NoValue),
            (Self::Int, Value::Text(a), None) => a.parse().map(Value::Int).map_err(|_| NoValue),
            (Self::Int, Value::Double(n), None) => number(n),
            (Self::Int, Value::Int(n), None) => Ok(Value::Int(n)),
            (Self::Duration, Value::Text(a), None) => duration(&a).map(Value::Duration).ok_or(NoValue),
            (Self::Duration, Value::Duration(n), None) => Ok(Value::Duration(n)),
            (Self::Units(unit), Value::Duration(n), None) => Ok(Value::Int(n / unit)),
            (Self::Double, Value::Text(a), None) => a.parse().map(Value::Double).map_err(|_| NoValue),
            (Self::Double, value, None) => value.number().map(Value::Double).ok_or(NoValue),
            _ => Err(NoValue),
        }
    }
}

/// As CEL writes a duration: seconds, with as many decimals as it takes.
fn seconds(nanos: i64) -> String {
    let (sign, nanos) = (if nanos < 0 { "-" } else { "" }, nanos.unsigned_abs());
    let decimals = format!("{:09}", nanos % 1_000_000_000);
    let decimals = decimals.trim_end_matches('0');
    format!("{sign}{}{}{decimals}s", nanos / 1_000_000_000, if decimals.is_empty() { "" } else { "." })
}

const UNITS: [(&str, i64); 6] =
    [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)];

/// Nanoseconds of a text such as `1h30m`, `-1.5s` or `500ms`.
fn duration(text: &str) -> Option<i64> {
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

#[cfg(test)]
mod tests;
