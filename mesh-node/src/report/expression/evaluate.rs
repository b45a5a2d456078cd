//! What an expression is worth.

use std::{borrow::Cow, cell::Cell};

use super::{Attributes, Binary, Evaluated, HeadersOf, Literal, Macro, NoValue, Node, Value};

/// What an evaluation may ask, and what macros have bound.
pub(super) struct Scope<'s, 'a> {
    pub(super) of: &'a dyn Attributes,
    pub(super) bound: Option<Value<'a>>,
    pub(super) outer: Option<&'s Scope<'s, 'a>>,
    /// How many members of lists may still be gone through.
    pub(super) steps: &'s Cell<u32>,
}

impl<'a> Scope<'_, 'a> {
    /// Takes so much of what may be spent.
    fn charge(&self, cost: u32) -> Result<(), NoValue> {
        self.steps.set(self.steps.get().checked_sub(cost).ok_or(NoValue)?);
        Ok(())
    }

    /// A copy.
    fn copy(&self, value: &Value<'a>) -> Evaluated<'a> {
        self.charge(value.weight())?;
        Ok(value.clone())
    }

    pub(super) fn evaluate(&self, node: &'a Node) -> Evaluated<'a> {
        self.charge(1)?;
        Ok(match node {
            Node::Literal(literal) => match literal {
                Literal::Null => Value::Null,
                Literal::Bool(b) => Value::Bool(*b),
                Literal::Int(n) => Value::Int(*n),
                Literal::Double(n) => Value::Double(*n),
                Literal::Text(text) => Value::Text(Cow::Borrowed(text)),
            },
            Node::List(nodes) => Value::List(nodes.iter().map(|n| self.evaluate(n)).collect::<Result<_, _>>()?),
            Node::Map(pairs) => {
                let pairs = pairs.iter().map(|(key, value)| Ok((self.evaluate(key)?, self.evaluate(value)?)));
                Value::Map(pairs.collect::<Result<_, _>>()?)
            }
            Node::Attribute(attribute) => self.of.attribute(*attribute).ok_or(NoValue)?,
            Node::Headers(whose) => {
                let headers = self.headers(*whose);
                self.charge(headers.weight())?;
                headers
            }
            Node::Label(end, name) => Value::Text(Cow::Borrowed(self.of.label(*end, name).ok_or(NoValue)?)),
            // Only their members have a value.
            Node::Peers | Node::Peer(_) | Node::Labels(_) | Node::OwnProxy | Node::OwnMetadata => return Err(NoValue),
            Node::Header(whose, name) => Value::Text(self.of.header(*whose, name).ok_or(NoValue)?),
            Node::SomeHeader(whose, name) => match self.evaluate(name)? {
                Value::Text(name) => Value::Text(self.of.header(*whose, &name.to_ascii_lowercase()).ok_or(NoValue)?),
                _ => return Err(NoValue),
            },
            Node::Member(of, key) => {
                let (of, key) = (self.evaluate(of)?, self.evaluate(key)?);
                self.copy(of.member(&key).ok_or(NoValue)?)?
            }
            Node::Bound(out) => self.bound(*out)?,
            Node::Macro(what, over, asked) => self.go_through(*what, over, asked)?,
            Node::Has(what) => Value::Bool(self.evaluate(what).is_ok()),
            Node::Not(what) => Value::Bool(!self.truth(what)?),
            Node::Negative(what) => match self.evaluate(what)? {
                Value::Int(n) => Value::Int(n.checked_neg().ok_or(NoValue)?),
                Value::Double(n) => Value::Double(-n),
                Value::Duration(n) => Value::Duration(n.checked_neg().ok_or(NoValue)?),
                _ => return Err(NoValue),
            },
            // One side that decides makes up for the other's having no value.
            Node::And(a, b) => Value::Bool(either(self.truth(a), || self.truth(b), false)?),
            Node::Or(a, b) => Value::Bool(either(self.truth(a), || self.truth(b), true)?),
            Node::Choose(which, a, b) => self.evaluate(if self.truth(which)? { a } else { b })?,
            Node::Binary(Binary::In, what, place) => Value::Bool(self.is_in(what, place)?),
            Node::Binary(binary, a, b) => {
                let (a, b) = (self.evaluate(a)?, self.evaluate(b)?);
                if *binary == Binary::Add {
                    self.charge(a.weight().saturating_add(b.weight()))?;
                }
                binary.of(a, b)?
            }
            Node::Call(function, arguments) => {
                let mut values = arguments.iter().map(|a| self.evaluate(a));
                let first = values.next().ok_or(NoValue)??;
                self.charge(length(&first))?;
                function.of(first, values.next().transpose()?)?
            }
            Node::Matches(what, pattern) => match self.evaluate(what)? {
                text @ Value::Text(_) if self.charge(length(&text)).is_err() => return Err(NoValue),
                Value::Text(text) => Value::Bool(pattern.0.is_match(&text)),
                _ => return Err(NoValue),
            },
        })
    }

    fn truth(&self, node: &'a Node) -> Result<bool, NoValue> {
        match self.evaluate(node)? {
            Value::Bool(b) => Ok(b),
            _ => Err(NoValue),
        }
    }

    fn bound(&self, out: usize) -> Evaluated<'a> {
        let mut scope = self;
        for _ in 0..out {
            scope = scope.outer.ok_or(NoValue)?;
        }
        self.copy(scope.bound.as_ref().ok_or(NoValue)?)
    }

    fn is_in(&self, what: &'a Node, place: &'a Node) -> Result<bool, NoValue> {
        let what = self.evaluate(what)?;
        if let Node::Headers(whose) = place {
            let Value::Text(name) = what else { return Err(NoValue) };
            return Ok(self.of.header(*whose, &name.to_ascii_lowercase()).is_some());
        }
        match self.evaluate(place)? {
            Value::List(all) => Ok(all.iter().any(|v| v.same(&what))),
            map @ Value::Map(_) => Ok(map.member(&what).is_some()),
            _ => Err(NoValue),
        }
    }

    /// The members of a list, or the keys of a map.
    fn members(&self, node: &'a Node) -> Result<Vec<Value<'a>>, NoValue> {
        match self.evaluate(node)? {
            Value::List(all) => Ok(all),
            Value::Map(all) => Ok(all.into_iter().map(|(key, _)| key).collect()),
            _ => Err(NoValue),
        }
    }

    fn headers(&self, whose: HeadersOf) -> Value<'a> {
        let pair = |name: String| Some((self.of.header(whose, &name)?, name));
        let pairs = self.of.names(whose).into_iter().filter_map(pair);
        Value::Map(pairs.map(|(value, name)| (Value::Text(Cow::Owned(name)), Value::Text(value))).collect())
    }

    fn go_through(&self, what: Macro, over: &'a Node, asked: &'a [Node]) -> Evaluated<'a> {
        let [first, rest @ ..] = asked else { return Err(NoValue) };
        let mut made = Vec::new();
        let (mut holds, mut failed) = (0_u32, None);
        for member in self.members(over)? {
            let inner = Scope { of: self.of, bound: Some(member), outer: Some(self), steps: self.steps };
            match (what, rest) {
                (Macro::All | Macro::Exists | Macro::ExistsOne, _) => match inner.truth(first) {
                    // As with && and ||: one that decides makes up for others that have no value.
                    Ok(found) if what != Macro::ExistsOne && found == (what == Macro::Exists) => return Ok(Value::Bool(found)),
                    Ok(found) => holds += u32::from(found),
                    Err(e) if what == Macro::ExistsOne => return Err(e),
                    Err(e) => failed = Some(e),
                },
                (Macro::Filter, _) => {
                    if inner.truth(first)? {
                        made.extend(inner.bound);
                    }
                }
                (Macro::Map, []) => made.push(inner.evaluate(first)?),
                (Macro::Map, [second, ..]) => {
                    if inner.truth(first)? {
                        made.push(inner.evaluate(second)?);
                    }
                }
            }
        }
        match (what, failed) {
            (_, Some(e)) => Err(e),
            (Macro::All, None) => Ok(Value::Bool(true)),
            (Macro::Exists, None) => Ok(Value::Bool(false)),
            (Macro::ExistsOne, None) => Ok(Value::Bool(holds == 1)),
            (Macro::Filter | Macro::Map, None) => Ok(Value::List(made)),
        }
    }
}

/// What it costs to look at all of a text.
fn length(value: &Value<'_>) -> u32 {
    match value {
        Value::Text(text) => u32::try_from(text.len() / 64).unwrap_or(u32::MAX),
        _ => 0,
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
