//! From text to words and signs.

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    Name(String),
    Text(String),
    Int(i64),
    Double(f64),
    Sign(&'static str),
}

/// Most words and signs: a chain of operators is evaluated as deep as it is long.
const MAX_TOKENS: usize = 400;

/// Longest first, so that `<=` is not read as `<`.
const SIGNS: [&str; 25] =
    ["&&", "||", "==", "!=", "<=", ">=", "<", ">", "!", "(", ")", "[", "]", "{", "}", ".", ",", "?", ":", "+", "-", "*", "/", "%", "="];

pub(super) fn show(token: &Token) -> String {
    match token {
        Token::Name(name) => format!("{name:?}"),
        Token::Text(text) => format!("the text {text:?}"),
        Token::Int(n) => n.to_string(),
        Token::Double(n) => n.to_string(),
        Token::Sign(sign) => format!("{sign:?}"),
    }
}

pub(super) fn scan(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = after_blanks(text);
    while let Some(first) = rest.chars().next() {
        let (token, after) = if first.is_ascii_digit() || first == '.' && rest[1..].starts_with(|c: char| c.is_ascii_digit()) {
            number(rest)?
        } else if first == '\'' || first == '"' {
            quoted(rest, false)?
        } else if matches!(first, 'r' | 'R') && rest[1..].starts_with(['\'', '"']) {
            quoted(&rest[1..], true)?
        } else if matches!(first, 'b' | 'B') && rest[1..].starts_with(['\'', '"']) {
            return Err("has bytes (b\"..\"), which nothing here is".to_owned());
        } else if first.is_ascii_alphabetic() || first == '_' {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            (Token::Name(rest[..end].to_owned()), &rest[end..])
        } else {
            let sign = SIGNS.iter().find(|s| rest.starts_with(**s)).ok_or_else(|| format!("has {first:?}, which means nothing there"))?;
            (Token::Sign(sign), &rest[sign.len()..])
        };
        if tokens.len() >= MAX_TOKENS {
            return Err(format!("has more than {MAX_TOKENS} words and signs"));
        }
        tokens.push(token);
        rest = after_blanks(after);
    }
    Ok(tokens)
}

/// Without blanks and comments.
fn after_blanks(text: &str) -> &str {
    let mut rest = text.trim_start();
    while let Some(comment) = rest.strip_prefix("//") {
        rest = comment.split_once('\n').map_or("", |(_, after)| after).trim_start();
    }
    rest
}

fn number(text: &str) -> Result<(Token, &str), String> {
    let wrong = |digits: &str| format!("has {digits:?}, which is not a number");
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let end = hex.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(hex.len());
        let (digits, rest) = hex.split_at(end);
        let n = i64::from_str_radix(digits.strip_suffix(['u', 'U']).unwrap_or(digits), 16).map_err(|_| wrong(&text[..end + 2]))?;
        return Ok((Token::Int(n), rest));
    }
    let mut end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(text.len());
    // An exponent may have a sign.
    if text[..end].ends_with(['e', 'E']) && text[end..].starts_with(['+', '-']) {
        let digits = &text[end + 1..];
        end += 1 + digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    }
    let (digits, rest) = text.split_at(end);
    let plain = digits.strip_suffix(['u', 'U']).unwrap_or(digits);
    let token = match plain.parse::<i64>() {
        Ok(n) => Token::Int(n),
        Err(_) if plain.bytes().all(|b| b.is_ascii_digit()) => return Err(wrong(digits)),
        Err(_) => Token::Double(plain.parse().ok().filter(|n: &f64| n.is_finite()).ok_or_else(|| wrong(digits))?),
    };
    Ok((token, rest))
}

/// A text in quotes, or in three of them, in which there may be lines.
fn quoted(text: &str, raw: bool) -> Result<(Token, &str), String> {
    let one = &text[..1];
    let three = one.repeat(3);
    let quote = if text.starts_with(&three) { &*three } else { one };
    let mut rest = &text[quote.len()..];
    let mut found = String::new();
    loop {
        if let Some(after) = rest.strip_prefix(quote) {
            return Ok((Token::Text(found), after));
        }
        let Some(c) = rest.chars().next() else { return Err("has a text without its closing quote".to_owned()) };
        rest = &rest[c.len_utf8()..];
        if c == '\\' && !raw {
            let (c, after) = escaped(rest)?;
            found.push(c);
            rest = after;
        } else {
            found.push(c);
        }
    }
}

/// The character that is written behind a backslash, and what comes behind that.
fn escaped(text: &str) -> Result<(char, &str), String> {
    let wrong =
        || "has an escape in a text that is none of \\n \\t \\r \\a \\b \\f \\v \\\\ \\' \\\" \\` \\? \\x41 \\u0041 \\101".to_owned();
    let c = text.chars().next().ok_or_else(wrong)?;
    let rest = &text[c.len_utf8()..];
    let plain = match c {
        'n' => '\n',
        't' => '\t',
        'r' => '\r',
        'a' => '\x07',
        'b' => '\x08',
        'f' => '\x0c',
        'v' => '\x0b',
        '\\' | '\'' | '"' | '`' | '?' => c,
        'x' | 'X' => return coded(rest, 2, 16).ok_or_else(wrong),
        'u' => return coded(rest, 4, 16).ok_or_else(wrong),
        'U' => return coded(rest, 8, 16).ok_or_else(wrong),
        '0'..='3' => return coded(text, 3, 8).ok_or_else(wrong),
        _ => return Err(wrong()),
    };
    Ok((plain, rest))
}

/// The character of so many digits.
fn coded(text: &str, digits: usize, radix: u32) -> Option<(char, &str)> {
    let code = text.get(..digits).filter(|code| code.bytes().all(|b| b.is_ascii_alphanumeric()))?;
    let c = char::from_u32(u32::from_str_radix(code, radix).ok()?)?;
    Some((c, &text[digits..]))
}
