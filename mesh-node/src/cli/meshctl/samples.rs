//! Prometheus' text, as samples with their labels.

use serde_json::{Map, Value, json};

/// The samples of a text, in its order: `name`, `labels`, `value`. Lines that are none are passed over.
pub fn of(text: &str) -> Value {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Value> {
    let (name, rest) = line.split_at(line.find(['{', ' '])?);
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Map::new(), rest),
    };
    let value = value.split_whitespace().next()?;
    // What JSON has no number for stays a text.
    let value = value.parse::<f64>().ok().filter(|v| v.is_finite()).map_or_else(|| json!(value), |v| json!(v));
    Some(json!({"name": name, "labels": labels, "value": value}))
}

/// The labels up to their closing brace, and what comes behind it.
fn labels(mut rest: &str) -> Option<(Map<String, Value>, &str)> {
    let mut all = Map::new();
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(after) = rest.strip_prefix('}') {
            return Some((all, after));
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let (mut value, mut escaped, mut end) = (String::new(), false, None);
        for (at, c) in quoted.char_indices() {
            match (escaped, c) {
                (false, '"') => {
                    end = Some(at);
                    break;
                }
                (false, '\\') => escaped = true,
                (true, 'n') => {
                    escaped = false;
                    value.push('\n');
                }
                (_, c) => {
                    escaped = false;
                    value.push(c);
                }
            }
        }
        all.insert(name.to_owned(), value.into());
        rest = quoted.get(end? + 1..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_their_labels() {
        let text = "# HELP a b\na_total{x=\"1\",y=\"a\\\"}\\\\\\n\"} 5\nb 1.5\nc{le=\"+Inf\"} NaN\nodd\nd{x=\"1\n";
        let expected = json!([
            {"name": "a_total", "labels": {"x": "1", "y": "a\"}\\\n"}, "value": 5.0},
            {"name": "b", "labels": {}, "value": 1.5},
            {"name": "c", "labels": {"le": "+Inf"}, "value": "NaN"},
        ]);
        assert_eq!(of(text), expected);
    }
}
