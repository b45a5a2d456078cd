//! From text to a checked expression: a scanner and a parser by recursive descent, bounded in depth.

use super::{
    super::attributes::{Attribute, HeadersOf},
    Binary, Function, Literal, Node, Pattern,
};

/// How deep an expression may be nested.
const DEEPEST: usize = 64;
/// Most words and signs: a chain of operators is evaluated as deep as it is long.
const MOST: usize = 400;

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Name(String),
    Text(String),
    Int(i64),
    Double(f64),
    Sign(&'static str),
}

/// Most memory one compiled pattern takes, bytes.
const REGEX_SIZE: usize = 1 << 20;

/// Longest first, so that `<=` is not read as `<`.
const SIGNS: [&str; 23] =
    ["&&", "||", "==", "!=", "<=", ">=", "<", ">", "!", "(", ")", "[", "]", ".", ",", "?", ":", "+", "-", "*", "/", "%", "="];

pub(super) fn parse(text: &str) -> Result<Node, String> {
    let tokens = scan(text)?;
    let mut parser = Parser { tokens, at: 0, depth: 0 };
    let node = parser.whole()?;
    match parser.tokens.get(parser.at) {
        None => Ok(node),
        Some(token) => Err(format!("has {} where it should end", show(token))),
    }
}

fn show(token: &Token) -> String {
    match token {
        Token::Name(name) => format!("{name:?}"),
        Token::Text(text) => format!("the text {text:?}"),
        Token::Int(n) => n.to_string(),
        Token::Double(n) => n.to_string(),
        Token::Sign(sign) => format!("{sign:?}"),
    }
}

fn scan(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (token, after) = if first.is_ascii_digit() {
            number(rest)?
        } else if first == '\'' || first == '"' {
            quoted(rest, false)?
        } else if first == 'r' && rest[1..].starts_with(['\'', '"']) {
            quoted(&rest[1..], true)?
        } else if first.is_ascii_alphabetic() || first == '_' {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            (Token::Name(rest[..end].to_owned()), &rest[end..])
        } else {
            let sign = SIGNS.iter().find(|s| rest.starts_with(**s)).ok_or_else(|| format!("has {first:?}, which means nothing there"))?;
            (Token::Sign(sign), &rest[sign.len()..])
        };
        if tokens.len() >= MOST {
            return Err(format!("has more than {MOST} words and signs"));
        }
        tokens.push(token);
        rest = after.trim_start();
    }
    Ok(tokens)
}

fn number(text: &str) -> Result<(Token, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let plain = digits.strip_suffix(['u', 'U']).unwrap_or(digits);
    let token = match plain.parse::<i64>() {
        Ok(n) => Token::Int(n),
        Err(_) => Token::Double(plain.parse().map_err(|_| format!("has {digits:?}, which is not a number"))?),
    };
    Ok((token, rest))
}

fn quoted(text: &str, raw: bool) -> Result<(Token, &str), String> {
    let mut chars = text.char_indices();
    let quote = chars.next().map(|(_, q)| q);
    let mut found = String::new();
    while let Some((at, c)) = chars.next() {
        match c {
            _ if Some(c) == quote => return Ok((Token::Text(found), &text[at + c.len_utf8()..])),
            '\\' if !raw => match chars.next() {
                Some((_, 'n')) => found.push('\n'),
                Some((_, 't')) => found.push('\t'),
                Some((_, 'r')) => found.push('\r'),
                Some((_, c @ ('\\' | '\'' | '"' | '`' | '?'))) => found.push(c),
                _ => return Err("has an escape in a text that is none of \\n \\t \\r \\\\ \\' \\\"".to_owned()),
            },
            _ => found.push(c),
        }
    }
    Err("has a text without its closing quote".to_owned())
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
}

type Parsed = Result<Node, String>;

impl Parser {
    fn takes(&mut self, sign: &str) -> bool {
        let found = matches!(self.tokens.get(self.at), Some(Token::Sign(s)) if *s == sign);
        self.at += usize::from(found);
        found
    }

    fn needs(&mut self, sign: &str) -> Result<(), String> {
        if self.takes(sign) {
            return Ok(());
        }
        Err(format!("needs {sign:?} {}", self.place()))
    }

    fn place(&self) -> String {
        self.tokens.get(self.at).map_or_else(|| "at its end".to_owned(), |t| format!("before {}", show(t)))
    }

    fn whole(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(format!("is nested more than {DEEPEST} deep"));
        }
        let which = self.or()?;
        let node = if self.takes("?") {
            let one = self.whole()?;
            self.needs(":")?;
            Node::Choose(Box::new(which), Box::new(one), Box::new(self.whole()?))
        } else {
            which
        };
        self.depth -= 1;
        Ok(node)
    }

    fn or(&mut self) -> Parsed {
        let mut node = self.and()?;
        while self.takes("||") {
            node = Node::Or(Box::new(node), Box::new(self.and()?));
        }
        Ok(node)
    }

    fn and(&mut self) -> Parsed {
        let mut node = self.relation()?;
        while self.takes("&&") {
            node = Node::And(Box::new(node), Box::new(self.relation()?));
        }
        Ok(node)
    }

    fn relation(&mut self) -> Parsed {
        let node = self.sum()?;
        let all = [
            ("==", Binary::Equal),
            ("!=", Binary::Unequal),
            ("<=", Binary::LessOrEqual),
            (">=", Binary::GreaterOrEqual),
            ("<", Binary::Less),
            (">", Binary::Greater),
        ];
        if let Some((_, binary)) = all.into_iter().find(|(sign, _)| self.takes(sign)) {
            return Ok(Node::Binary(binary, Box::new(node), Box::new(self.sum()?)));
        }
        if matches!(self.tokens.get(self.at), Some(Token::Name(name)) if name == "in") {
            self.at += 1;
            return Ok(Node::Binary(Binary::In, Box::new(node), Box::new(self.sum()?)));
        }
        if self.takes("=") {
            return Err("has a single =; equality is ==".to_owned());
        }
        Ok(node)
    }

    fn sum(&mut self) -> Parsed {
        self.chain(&[("+", Binary::Add), ("-", Binary::Subtract)], Self::product)
    }

    fn product(&mut self) -> Parsed {
        self.chain(&[("*", Binary::Multiply), ("/", Binary::Divide), ("%", Binary::Remainder)], Self::unary)
    }

    fn chain(&mut self, all: &[(&str, Binary)], part: fn(&mut Self) -> Parsed) -> Parsed {
        let mut node = part(self)?;
        while let Some((_, binary)) = all.iter().find(|(sign, _)| self.takes(sign)) {
            node = Node::Binary(*binary, Box::new(node), Box::new(part(self)?));
        }
        Ok(node)
    }

    fn unary(&mut self) -> Parsed {
        let (not, negative) = (self.takes("!"), false);
        let negative = negative || !not && self.takes("-");
        if !not && !negative {
            return self.member();
        }
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(format!("is nested more than {DEEPEST} deep"));
        }
        let inner = Box::new(self.unary()?);
        self.depth -= 1;
        Ok(if not { Node::Not(inner) } else { Node::Negative(inner) })
    }

    /// A value, and what is asked of it.
    fn member(&mut self) -> Parsed {
        let mut node = self.primary()?;
        loop {
            if self.takes(".") {
                let name = self.name()?;
                node = if self.takes("(") { self.method(node, &name)? } else { select(&node, &name)? };
            } else if self.takes("[") {
                let Some(Token::Text(name)) = self.tokens.get(self.at).cloned() else {
                    return Err(format!("needs a text {}: [\"name\"] names a header", self.place()));
                };
                self.at += 1;
                self.needs("]")?;
                node = select(&node, &name)?;
            } else {
                return Ok(node);
            }
        }
    }

    fn name(&mut self) -> Result<String, String> {
        match self.tokens.get(self.at) {
            Some(Token::Name(name)) => {
                self.at += 1;
                Ok(name.clone())
            }
            _ => Err(format!("needs a name {}", self.place())),
        }
    }

    fn primary(&mut self) -> Parsed {
        let Some(token) = self.tokens.get(self.at).cloned() else { return Err("ends where a value should be".to_owned()) };
        self.at += 1;
        match token {
            Token::Text(text) => Ok(Node::Literal(Literal::Text(text))),
            Token::Int(n) => Ok(Node::Literal(Literal::Int(n))),
            Token::Double(n) => Ok(Node::Literal(Literal::Double(n))),
            Token::Sign("(") => {
                let node = self.whole()?;
                self.needs(")")?;
                Ok(node)
            }
            Token::Sign("[") => self.arguments("]").map(Node::List),
            Token::Sign(sign) => Err(format!("has {sign:?} where a value should be")),
            Token::Name(name) => self.named(&name),
        }
    }

    fn named(&mut self, name: &str) -> Parsed {
        match name {
            "true" => return Ok(Node::Literal(Literal::Bool(true))),
            "false" => return Ok(Node::Literal(Literal::Bool(false))),
            "null" => return Ok(Node::Literal(Literal::Null)),
            _ => {}
        }
        if self.takes("(") {
            return self.function(name);
        }
        // An attribute: a root and a member.
        self.needs(".").map_err(|_| format!("has {name:?}, which is neither an attribute nor a function known here"))?;
        let member = self.name()?;
        if let Some(whose) = HeadersOf::named(name, &member) {
            return Ok(Node::Headers(whose));
        }
        Attribute::named(name, &member)
            .map(Node::Attribute)
            .ok_or_else(|| format!("asks for {name}.{member}, which is not an attribute known here; known are {}", Attribute::known()))
    }

    fn function(&mut self, name: &str) -> Parsed {
        if !["has", "size", "string", "int", "uint", "double", "duration"].contains(&name) {
            return Err(format!("calls {name}(), which is not known here"));
        }
        let arguments = self.arguments(")")?;
        let function = match name {
            "has" => {
                let [what @ (Node::Attribute(_) | Node::Header(..))] = &arguments[..] else {
                    return Err("calls has() with something else than an attribute or a header".to_owned());
                };
                return Ok(Node::Has(Box::new(what.clone())));
            }
            "size" => Function::Size,
            "string" => Function::String,
            "double" => Function::Double,
            "duration" => {
                if let [Node::Literal(Literal::Text(text))] = &arguments[..]
                    && super::duration(text).is_none()
                {
                    return Err(format!("has {text:?}, which is no duration, such as 500ms or 1h30m"));
                }
                Function::Duration
            }
            _ => Function::Int,
        };
        if arguments.len() != 1 {
            return Err(format!("calls {name}() with {} arguments; it takes one", arguments.len()));
        }
        Ok(Node::Call(function, arguments))
    }

    fn method(&mut self, on: Node, name: &str) -> Parsed {
        let arguments = self.arguments(")")?;
        let (function, takes) = match name {
            "startsWith" => (Function::StartsWith, 1),
            "endsWith" => (Function::EndsWith, 1),
            "contains" => (Function::Contains, 1),
            "size" => (Function::Size, 0),
            "lowerAscii" => (Function::LowerAscii, 0),
            "getHours" => (Function::Units(3_600_000_000_000), 0),
            "getMinutes" => (Function::Units(60_000_000_000), 0),
            "getSeconds" => (Function::Units(1_000_000_000), 0),
            "getMilliseconds" => (Function::Units(1_000_000), 0),
            "matches" => {
                let [Node::Literal(Literal::Text(pattern))] = &arguments[..] else {
                    return Err("calls matches() with something else than one text".to_owned());
                };
                let pattern = regex::RegexBuilder::new(pattern)
                    .size_limit(REGEX_SIZE)
                    .build()
                    .map_err(|e| format!("has a pattern that cannot be read: {e}"))?;
                return Ok(Node::Matches(Box::new(on), Pattern(pattern)));
            }
            _ => return Err(format!("calls {name}(), which is not known here")),
        };
        if arguments.len() != takes {
            return Err(format!("calls {name}() with {} arguments; it takes {takes}", arguments.len()));
        }
        let mut all = vec![on];
        all.extend(arguments);
        Ok(Node::Call(function, all))
    }

    /// What stands between commas until a closing sign.
    fn arguments(&mut self, close: &str) -> Result<Vec<Node>, String> {
        let mut all = Vec::new();
        if self.takes(close) {
            return Ok(all);
        }
        loop {
            all.push(self.whole()?);
            if self.takes(close) {
                return Ok(all);
            }
            self.needs(",")?;
        }
    }
}

fn select(node: &Node, name: &str) -> Parsed {
    match node {
        Node::Headers(whose) => Ok(Node::Header(*whose, name.to_ascii_lowercase())),
        _ => Err(format!("asks for {name:?} of something that has no members")),
    }
}
