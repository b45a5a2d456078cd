//! From words and signs to a checked expression: a parser by recursive descent, bounded in depth.

use super::{
    super::{
        attributes::{Attribute, HeadersOf},
        peer::{self, Fact},
    },
    Binary, End, Function, Literal, Macro, Node, Pattern,
    functions::{self, FUNCTIONS, METHODS},
    scan::{Token, scan, show},
};

/// How deep an expression may be nested.
const DEEPEST: usize = 64;
/// Most memory one compiled pattern takes, bytes.
const REGEX_SIZE: usize = 1 << 20;

pub(super) fn parse(text: &str) -> Result<Node, String> {
    let tokens = scan(text)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, bound: Vec::new() };
    let node = parser.whole()?;
    match parser.tokens.get(parser.at) {
        None => Ok(node),
        Some(token) => Err(format!("has {} where it should end", show(token))),
    }
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// Names that macros have bound, the innermost last.
    bound: Vec<String>,
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
                node = if self.takes("(") { self.method(node, &name)? } else { member(node, Node::Literal(Literal::Text(name)))? };
            } else if self.takes("[") {
                let key = self.whole()?;
                self.needs("]")?;
                node = member(node, key)?;
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
            Token::Sign("{") => self.map(),
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
        if let Some(at) = self.bound.iter().rposition(|bound| bound == name) {
            return Ok(Node::Bound(self.bound.len() - 1 - at));
        }
        if self.takes("(") {
            return self.function(name);
        }
        match name {
            "filter_state" => return Ok(Node::Peers),
            "node" => return Ok(Node::OwnProxy),
            _ => {}
        }
        if let Some(end) = End::named(name) {
            return Ok(Node::Peer(end));
        }
        // An attribute: a root and a member.
        self.needs(".").map_err(|_| format!("has {name:?}, which is neither an attribute nor a function known here"))?;
        let member = self.name()?;
        if (name, &*member) == ("xds", "node") {
            return Ok(Node::OwnProxy);
        }
        if let Some(whose) = HeadersOf::named(name, &member) {
            return Ok(Node::Headers(whose));
        }
        Attribute::named(name, &member)
            .map(Node::Attribute)
            .ok_or_else(|| format!("asks for {name}.{member}, which is not an attribute known here; known are {}", Attribute::known()))
    }

    fn function(&mut self, name: &str) -> Parsed {
        let function = FUNCTIONS.iter().find(|(n, _)| *n == name).map(|(_, function)| *function);
        if function.is_none() && !["has", "matches"].contains(&name) {
            return Err(format!("calls {name}(), which is not known here"));
        }
        let mut arguments = self.arguments(")")?;
        let Some(function) = function else {
            if name == "matches" && arguments.len() == 2 {
                let pattern = arguments.pop();
                let on = arguments.pop();
                return matches(on, pattern);
            }
            let [what @ (Node::Attribute(_) | Node::Label(..) | Node::Header(..) | Node::Member(..) | Node::SomeHeader(..))] =
                &arguments[..]
            else {
                return Err(format!("calls {name}() with something else than an attribute or a header"));
            };
            return Ok(Node::Has(Box::new(what.clone())));
        };
        let [one] = &arguments[..] else {
            return Err(format!("calls {name}() with {} arguments; it takes one", arguments.len()));
        };
        if let Node::Literal(Literal::Text(text)) = one {
            if function == Function::Duration && functions::duration(text).is_none() {
                return Err(format!("has {text:?}, which is no duration, such as 500ms or 1h30m"));
            }
            if function == Function::Timestamp && functions::timestamp(text).is_none() {
                return Err(format!("has {text:?}, which is no time, such as 2026-01-31T12:00:00Z"));
            }
        }
        Ok(Node::Call(function, arguments))
    }

    fn method(&mut self, on: Node, name: &str) -> Parsed {
        let all = [
            ("all", Macro::All),
            ("exists", Macro::Exists),
            ("exists_one", Macro::ExistsOne),
            ("filter", Macro::Filter),
            ("map", Macro::Map),
        ];
        if let Some((_, found)) = all.into_iter().find(|(n, _)| *n == name) {
            return self.over(on, name, found);
        }
        let arguments = self.arguments(")")?;
        if name == "matches" {
            let [pattern] = <[Node; 1]>::try_from(arguments).map_err(|_| "calls matches() with something else than one text".to_owned())?;
            return matches(Some(on), Some(pattern));
        }
        let Some((_, function, least, most)) = METHODS.iter().find(|(n, ..)| *n == name) else {
            return Err(format!("calls {name}(), which is not known here"));
        };
        if !(*least..=*most).contains(&arguments.len()) {
            return Err(format!("calls {name}() with {} arguments; it takes {most}", arguments.len()));
        }
        if let (Function::Part(_), [Node::Literal(Literal::Text(zone))]) = (function, &arguments[..])
            && functions::zone_of(zone).is_none()
        {
            return Err(format!("has the time zone {zone:?}; those that are known are UTC and such as +02:00"));
        }
        let mut all = vec![on];
        all.extend(arguments);
        Ok(Node::Call(*function, all))
    }

    /// A macro that goes through a list: the name of what it binds, and what is asked of each.
    fn over(&mut self, list: Node, name: &str, what: Macro) -> Parsed {
        if !matches!(
            list,
            Node::List(_) | Node::Map(_) | Node::Headers(_) | Node::Bound(_) | Node::Member(..) | Node::Macro(..) | Node::Choose(..)
        ) && !matches!(list, Node::Binary(Binary::Add, ..))
        {
            return Err(format!("calls {name}() on what is no list"));
        }
        let bound = self.name()?;
        self.needs(",")?;
        self.bound.push(bound);
        let asked = self.arguments(")");
        self.bound.pop();
        let (asked, most) = (asked?, if what == Macro::Map { 2 } else { 1 });
        if asked.is_empty() || asked.len() > most {
            return Err(format!("calls {name}() with {} expressions; it takes {most}", asked.len()));
        }
        Ok(Node::Macro(what, Box::new(list), asked))
    }

    /// Keys and values until a closing brace.
    fn map(&mut self) -> Parsed {
        let mut all = Vec::new();
        while !self.takes("}") {
            let key = self.whole()?;
            self.needs(":")?;
            all.push((key, self.whole()?));
            if !self.takes(",") {
                self.needs("}")?;
                break;
            }
        }
        Ok(Node::Map(all))
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
            // A list may end with one.
            if close == "]" && self.takes(close) {
                return Ok(all);
            }
        }
    }
}

/// A member of a map: of headers, whatever the case of its name.
fn member(of: Node, key: Node) -> Parsed {
    match (of, key) {
        (Node::Headers(whose), Node::Literal(Literal::Text(name))) => Ok(Node::Header(whose, name.to_ascii_lowercase())),
        (
            of @ (Node::Peers | Node::Peer(_) | Node::Labels(_) | Node::Label(..) | Node::OwnProxy | Node::OwnMetadata),
            Node::Literal(Literal::Text(name)),
        ) => of_workloads(&of, name),
        (Node::Headers(_), Node::Literal(_)) => Err("asks for a header by what is no text".to_owned()),
        (Node::Headers(whose), name) => Ok(Node::SomeHeader(whose, Box::new(name))),
        (of @ (Node::List(_) | Node::Map(_) | Node::Member(..) | Node::Bound(_) | Node::Macro(..) | Node::Choose(..)), key) => {
            Ok(Node::Member(Box::new(of), Box::new(key)))
        }
        (_, Node::Literal(Literal::Text(name))) => Err(format!("asks for {name:?} of something that has no members")),
        _ => Err("asks for a member of something that has none".to_owned()),
    }
}

/// What is asked of the workloads at the two ends.
fn of_workloads(of: &Node, name: String) -> Parsed {
    match of {
        Node::Peers => End::named(&name).map(Node::Peer).ok_or_else(|| {
            format!("asks for filter_state.{name}, of which nothing is known here; known are upstream_peer and downstream_peer")
        }),
        Node::Peer(end) if name == "labels" => Ok(Node::Labels(*end)),
        Node::Peer(end) => Fact::named(&name)
            .map(|fact| Node::Attribute(Attribute::Peer(*end, fact)))
            .ok_or_else(|| format!("asks for {name:?} of a peer; known are {}, labels", Fact::known())),
        Node::Labels(end) => Ok(Node::Label(*end, name)),
        // As they were told apart when they were messages.
        Node::Label(end, label) if name == "value" => Ok(Node::Label(*end, label.clone())),
        Node::OwnProxy if name == "metadata" => Ok(Node::OwnMetadata),
        Node::OwnProxy if name == "id" => Ok(Node::Attribute(Attribute::NodeId)),
        // What nothing is known of has no value, as with a proxy that was not told.
        Node::OwnMetadata => Ok(Node::Attribute(peer::metadata(&name).map_or(Attribute::Nothing, Attribute::Own))),
        _ => Err(format!("asks for {name:?} of something that has no members")),
    }
}

/// Whether a text has what a pattern says; the pattern is one that is written there.
fn matches(on: Option<Node>, pattern: Option<Node>) -> Parsed {
    let (Some(on), Some(Node::Literal(Literal::Text(pattern)))) = (on, pattern) else {
        return Err("calls matches() with something else than one text".to_owned());
    };
    let pattern =
        regex::RegexBuilder::new(&pattern).size_limit(REGEX_SIZE).build().map_err(|e| format!("has a pattern that cannot be read: {e}"))?;
    Ok(Node::Matches(Box::new(on), Pattern(pattern)))
}
