//! Formats that are JSON: from an object to the steps that write it.

use std::sync::Arc;

use serde_json::Value;

use super::{Entry, Json, LONGEST, Program, Step, Then, join, operator::parse, quote};

/// How deep a format may be nested.
const DEEPEST: usize = 32;

/// What stands behind a key.
#[derive(Clone, Copy)]
pub(super) enum Shape<'a> {
    Format(&'a str),
    Value(&'a Value),
}

/// The steps that write an object.
pub(super) fn program<'a>(fields: impl Iterator<Item = (&'a str, Shape<'a>)>) -> Result<Arc<Program>, String> {
    let (mut program, mut before) = (Program::default(), String::new());
    object(fields, 0, &mut before, &mut program)?;
    before.push('\n');
    program.add(&before, Then::Nothing)?;
    Ok(Arc::new(program))
}

fn object<'a>(
    fields: impl Iterator<Item = (&'a str, Shape<'a>)>,
    depth: usize,
    before: &mut String,
    program: &mut Program,
) -> Result<(), String> {
    before.push('{');
    for (number, (key, shape)) in fields.enumerate() {
        let mut quoted = Vec::new();
        quote(key.as_bytes(), &mut quoted);
        before.extend([if number == 0 { "" } else { "," }, &*String::from_utf8_lossy(&quoted), ":"]);
        value(shape, depth + 1, before, program).map_err(|e| format!("{key}: {e}"))?;
    }
    before.push('}');
    Ok(())
}

fn value(shape: Shape<'_>, depth: usize, before: &mut String, program: &mut Program) -> Result<(), String> {
    if depth > DEEPEST {
        return Err(format!("is nested more than {DEEPEST} deep"));
    }
    match shape {
        Shape::Format(text) => format(text, before, program),
        Shape::Value(Value::String(text)) => format(text, before, program),
        Shape::Value(Value::Object(fields)) => {
            program.nested = true;
            object(fields.iter().map(|(key, value)| (key.as_str(), Shape::Value(value))), depth, before, program)
        }
        Shape::Value(Value::Array(all)) => {
            program.nested = true;
            before.push('[');
            for (number, one) in all.iter().enumerate() {
                before.push_str(if number == 0 { "" } else { "," });
                value(Shape::Value(one), depth + 1, before, program)?;
            }
            before.push(']');
            Ok(())
        }
        Shape::Value(other) => {
            program.nested = true;
            // Envoy's numbers are all of one type.
            let whole = other.as_f64().filter(|n| other.is_f64() && n.fract() == 0.0 && n.abs() < 1e15);
            before.push_str(&whole.map_or_else(|| other.to_string(), |n| format!("{n:.0}")));
            Ok(())
        }
    }
}

/// One value: what is one operator keeps its type, anything else is a text.
fn format(text: &str, before: &mut String, program: &mut Program) -> Result<(), String> {
    let first = program.steps.len();
    parse(text, program)?;
    let steps = program.steps.get(first..).unwrap_or_default();
    let (then, are) = match *steps {
        [Step { from, to, then: then @ Then::Value(_) }] if from == to => (then, 1),
        _ => (Then::Joined(u16::try_from(steps.len()).map_err(|_| "has too many operators".to_owned())?), 0),
    };
    let step = program.step(before, then)?;
    program.steps.splice(first..first + are, [step]);
    before.clear();
    Ok(())
}

/// Takes out what has no value, at any depth.
fn prune(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.values_mut().for_each(prune);
            // What has nothing in it, or no more, is nothing.
            fields.retain(|_, value| !value.is_null() && value.as_object().is_none_or(|inner| !inner.is_empty()));
        }
        Value::Array(all) => {
            all.iter_mut().for_each(prune);
            all.retain(|value| !value.is_null());
        }
        _ => {}
    }
}

impl Program {
    /// JSON in one pass; what has no value is null.
    pub(super) fn write_json(&self, entry: &Entry<'_>, line: &mut Vec<u8>, nothing: &[u8]) {
        let mut steps = self.steps.iter();
        while let Some(step) = steps.next() {
            line.extend_from_slice(self.text(step));
            let room = line.len() < LONGEST;
            match step.then {
                Then::Nothing => {}
                Then::Value(operator) if room => operator.tell(entry, self, &mut Json(line)),
                Then::Value(_) => line.extend_from_slice(b"null"),
                Then::Joined(n) => {
                    let joined = steps.by_ref().take(n.into());
                    if room {
                        quote(&join(joined, self, entry, nothing), line);
                    } else {
                        joined.for_each(drop);
                        line.extend_from_slice(b"null");
                    }
                }
            }
        }
    }

    fn write_pruned(&self, entry: &Entry<'_>, line: &mut Vec<u8>) {
        self.write_json(entry, line, b"");
        // It was made to be read.
        let Ok(mut value) = serde_json::from_slice(line) else { return };
        prune(&mut value);
        *line = format!("{value}\n").into_bytes();
    }

    /// JSON without the keys that have no value.
    pub(super) fn write_omitting(&self, entry: &Entry<'_>, line: &mut Vec<u8>) {
        if self.nested {
            return self.write_pruned(entry, line);
        }
        let mut steps = self.steps.iter();
        while let Some(step) = steps.next() {
            let before = line.len();
            // What comes before a key is a brace or a comma, whichever keys there are.
            let key = self.text(step).get(1..).unwrap_or_default();
            let first = before == 0;
            match step.then {
                Then::Nothing => line.extend_from_slice(if first { b"{}\n" } else { b"}\n" }),
                Then::Value(operator) => {
                    line.push(if first { b'{' } else { b',' });
                    line.extend_from_slice(key);
                    let named = line.len();
                    operator.tell(entry, self, &mut Json(line));
                    if before >= LONGEST || line.get(named..) == Some(b"null") {
                        line.truncate(before);
                    }
                }
                Then::Joined(n) => {
                    let joined = join(steps.by_ref().take(n.into()), self, entry, b"");
                    if before < LONGEST {
                        line.push(if first { b'{' } else { b',' });
                        line.extend_from_slice(key);
                        quote(&joined, line);
                    }
                }
            }
        }
    }
}
