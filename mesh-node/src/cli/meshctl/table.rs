//! What people read: tables with a heading, and JSON documents as YAML.

use std::{fmt::Write as _, io::IsTerminal};

use serde_json::Value;

/// Rows under headings.
#[derive(Debug, Default)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(headings: &[&'static str]) -> Self {
        Self { headings: headings.to_vec(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Columns as wide as they need to be, two spaces apart; no spaces at the end of a line.
    pub fn render(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count());
            cells.chain(self.headings.get(column).map(|h| h.len())).max().unwrap_or(0)
        };
        let widths = (0..self.headings.len()).map(width).collect::<Vec<_>>();
        let mut text = String::new();
        let headings = self.headings.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>();
        let bold = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        for (number, row) in std::iter::once(&headings).chain(&self.rows).enumerate() {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // A string takes any text.
                let _ = write!(line, "{cell:<width$}  ");
            }
            let line = line.trim_end();
            if number == 0 && bold {
                let _ = writeln!(text, "\x1b[1m{line}\x1b[0m");
            } else {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }
}

/// A field as a cell: `-` for what is not there.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Array(all) if all.is_empty() => "-".to_owned(),
        Value::Array(all) => all.iter().map(cell).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Bytes with a unit.
pub fn bytes(value: &Value) -> String {
    let Some(n) = value.as_u64() else { return "-".to_owned() };
    #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
    let mut rest = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if rest < 1024.0 {
            return if unit == "B" { format!("{n} B") } else { format!("{rest:.1} {unit}") };
        }
        rest /= 1024.0;
    }
    format!("{rest:.1} TiB")
}

/// Seconds as days, hours, minutes and seconds: the two largest.
pub fn age(seconds: u64) -> String {
    let parts = [(seconds / 86_400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let first = parts.iter().position(|(n, _)| *n > 0).unwrap_or(3);
    parts[first..].iter().take(2).filter(|(n, _)| *n > 0 || first == 3).map(|(n, unit)| format!("{n}{unit}")).collect::<Vec<_>>().concat()
}

/// A document as YAML: strings as JSON has them, which YAML reads alike.
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    write_yaml(value, 0, &mut text);
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

fn write_yaml(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                let _ = write!(text, "{indent}{}:", key_of(key));
                below(value, depth, text);
            }
        }
        Value::Array(all) if !all.is_empty() => {
            for value in all {
                let mut item = String::new();
                write_yaml(value, depth + 1, &mut item);
                let _ = writeln!(text, "{indent}- {}", item.trim_start().trim_end_matches('\n'));
            }
        }
        other => {
            let _ = write!(text, "{other}");
        }
    }
}

fn below(value: &Value, depth: usize, text: &mut String) {
    let nested = matches!(value, Value::Object(f) if !f.is_empty()) || matches!(value, Value::Array(a) if !a.is_empty());
    if nested {
        text.push('\n');
        write_yaml(value, depth + 1, text);
    } else {
        let _ = writeln!(text, " {value}");
    }
}

fn key_of(key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c)) && key.parse::<f64>().is_err();
    if plain { key.to_owned() } else { Value::from(key).to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn documents_read_the_same_as_yaml() {
        let all = json!({"a": [1, {"b": [], "c": {"d": "x: y\n# z", "8080": null}}, ["p", ["q"]]], "e": {}, "f": true, "empty": ""});
        let read: Value = serde_saphyr::from_str(&yaml(&all)).unwrap_or_else(|e| panic!("{e}:\n{}", yaml(&all)));
        assert_eq!(read, all, "{}", yaml(&all));
    }

    #[test]
    fn ages_and_sizes_are_short() {
        assert_eq!([0, 59, 61, 3600, 90_000, 200_000].map(age), ["0s", "59s", "1m1s", "1h", "1d1h", "2d7h"].map(str::to_owned));
        assert_eq!([0, 1023, 1536, 5_u64 << 30].map(|n| bytes(&json!(n))), ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"].map(str::to_owned));
    }

    #[test]
    fn columns_are_as_wide_as_they_need_to_be() {
        let mut table = Table::new(&["NAME", "X"]);
        table.row(["a".to_owned(), "1".to_owned()]);
        table.row(["longer".to_owned(), "-".to_owned()]);
        assert_eq!(table.render(), "NAME    X\na       1\nlonger  -\n");
    }
}
