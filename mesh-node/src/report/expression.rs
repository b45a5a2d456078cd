//! Expressions in the Common Expression Language over a request's attributes, as Istio's Telemetry uses them: in filters of access
//! logs and values of metric tags. Attributes are Envoy's (its "Attributes" page); what is not known here is refused when the
//! expression is read.
//!
//! The language but for bytes, messages and names of time zones. Evaluation allocates for strings and lists it makes, and its cost, in time
//! and in memory, is bounded by [`MOST_STEPS`].

mod evaluate;
mod functions;
mod parse;
mod scan;

use std::{borrow::Cow, cell::Cell};

use time::OffsetDateTime;

use self::{evaluate::Scope, functions::Function};

use super::{
    attributes::{Attribute, Attributes, HeadersOf},
    entry::Header,
    kept::Asks,
    peer::End,
};

/// Longest expression that is read, bytes.
pub const LONGEST: usize = 4096;
/// How many parts one evaluation looks at, as often as it does, with the members of lists and the pieces of 64 bytes of texts it copies; one
/// that would take more has no value.
pub const MOST_STEPS: u32 = 10_000;

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
    /// What is known of the workload at an end, or of the connection's two: only members of it have a value.
    Peers,
    Peer(End),
    Labels(End),
    Label(End, String),
    /// The same of what Istio's proxies say of themselves.
    OwnProxy,
    OwnMetadata,
    /// One whose name is made up as it is asked for.
    SomeHeader(HeadersOf, Box<Node>),
    Map(Vec<(Node, Node)>),
    /// A member of a list or map.
    Member(Box<Node>, Box<Node>),
    /// What a macro has bound, counted from the innermost.
    Bound(usize),
    Macro(Macro, Box<Node>, Vec<Node>),
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

/// Goes through a list, or the keys of a map, with what is to be asked of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Macro {
    All,
    Exists,
    ExistsOne,
    Filter,
    /// Of those that the first holds for, if there are two.
    Map,
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
    /// In UTC.
    Time(OffsetDateTime),
    List(Vec<Value<'a>>),
    Map(Vec<(Value<'a>, Value<'a>)>),
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
        Scope { of, bound: None, outer: None, steps: &Cell::new(MOST_STEPS) }.evaluate(&self.0)
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
        Node::Literal(_) | Node::Bound(_) | Node::Peers | Node::Peer(_) | Node::Labels(_) | Node::OwnProxy | Node::OwnMetadata => {}
        Node::Label(..) => all.peers = true,
        Node::Attribute(attribute) => {
            attribute.request_header().iter().for_each(|name| one(HeadersOf::Request, name, all));
            all.identities |= matches!(attribute, Attribute::ConnectionPeer | Attribute::ConnectionLocal);
            all.peers |= matches!(attribute, Attribute::Peer(..));
        }
        Node::Headers(whose) => all.for_all(*whose),
        Node::SomeHeader(whose, name) => {
            all.for_all(*whose);
            asks(name, all);
        }
        Node::Header(whose, name) => one(*whose, name, all),
        Node::List(nodes) | Node::Call(_, nodes) => nodes.iter().for_each(|n| asks(n, all)),
        Node::Map(pairs) => pairs.iter().flat_map(|(key, value)| [key, value]).for_each(|n| asks(n, all)),
        Node::Macro(_, over, nodes) => std::iter::once(&**over).chain(nodes).for_each(|n| asks(n, all)),
        Node::Has(a) | Node::Not(a) | Node::Negative(a) | Node::Matches(a, _) => asks(a, all),
        Node::And(a, b) | Node::Or(a, b) | Node::Binary(_, a, b) | Node::Member(a, b) => [a, b].into_iter().for_each(|n| asks(n, all)),
        Node::Choose(a, b, c) => [a, b, c].into_iter().for_each(|n| asks(n, all)),
    }
}

impl Value<'_> {
    /// A member of a list, by its place, or of a map.
    fn member(&self, key: &Value<'_>) -> Option<&Self> {
        match (self, key) {
            (Self::List(all), Value::Int(at)) => all.get(usize::try_from(*at).ok()?),
            (Self::Map(all), key) => all.iter().find(|(k, _)| k.same(key)).map(|(_, value)| value),
            _ => None,
        }
    }

    /// What a copy of it costs.
    fn weight(&self) -> u32 {
        let parts = |all: &mut dyn Iterator<Item = u32>| all.fold(1_u32, u32::saturating_add);
        match self {
            Self::Text(Cow::Owned(text)) => 1 + u32::try_from(text.len() / 64).unwrap_or(u32::MAX - 1),
            Self::List(all) => parts(&mut all.iter().map(Self::weight)),
            Self::Map(all) => parts(&mut all.iter().flat_map(|(key, value)| [key.weight(), value.weight()])),
            _ => 1,
        }
    }

    fn text(self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.into_owned()),
            Self::Int(n) => Some(n.to_string()),
            Self::Double(n) => Some(n.to_string()),
            Self::Bool(b) => Some(b.to_string()),
            Self::Duration(nanos) => Some(functions::seconds(nanos)),
            Self::Time(time) => Some(functions::written(time)),
            Self::Null | Self::List(_) | Self::Map(_) => None,
        }
    }

    fn same(&self, other: &Value<'_>) -> bool {
        match (self, other) {
            (Self::Int(_) | Self::Double(_), Value::Int(_) | Value::Double(_)) => self.order(other) == Some(std::cmp::Ordering::Equal),
            (Self::List(a), Value::List(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same(b)),
            (Self::Map(a), Value::Map(_)) => {
                let same = |(key, value): &(Value<'_>, Value<'_>)| other.member(key).is_some_and(|v| value.same(v));
                other.len() == Some(a.len()) && a.iter().all(same)
            }
            _ => self == other,
        }
    }

    fn len(&self) -> Option<usize> {
        match self {
            Self::List(all) => Some(all.len()),
            Self::Map(all) => Some(all.len()),
            _ => None,
        }
    }

    fn order(&self, other: &Value<'_>) -> Option<std::cmp::Ordering> {
        match (self, other) {
            (Self::Text(a), Value::Text(b)) => Some(a.cmp(b)),
            (Self::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
            (Self::Time(a), Value::Time(b)) => Some(a.cmp(b)),
            (Self::Int(a), Value::Int(b)) | (Self::Duration(a), Value::Duration(b)) => Some(a.cmp(b)),
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
            (Self::Add, Value::Time(time), Value::Duration(n)) | (Self::Add, Value::Duration(n), Value::Time(time)) => {
                time.checked_add(time::Duration::nanoseconds(n)).map(Value::Time).ok_or(NoValue)
            }
            (Self::Subtract, Value::Time(time), Value::Duration(n)) => {
                time.checked_sub(time::Duration::nanoseconds(n)).map(Value::Time).ok_or(NoValue)
            }
            (Self::Subtract, Value::Time(a), Value::Time(b)) => {
                i64::try_from((a - b).whole_nanoseconds()).map(Value::Duration).map_err(|_| NoValue)
            }
            (Self::Subtract, Value::Duration(a), Value::Duration(b)) => a.checked_sub(b).map(Value::Duration).ok_or(NoValue),
            (Self::Add, Value::Double(a), Value::Double(b)) => Ok(Value::Double(a + b)),
            (Self::Subtract, Value::Double(a), Value::Double(b)) => Ok(Value::Double(a - b)),
            (Self::Multiply, Value::Double(a), Value::Double(b)) => Ok(Value::Double(a * b)),
            (Self::Divide, Value::Double(a), Value::Double(b)) => Ok(Value::Double(a / b)),
            _ => Err(NoValue),
        }
    }
}

#[cfg(test)]
mod tests;
