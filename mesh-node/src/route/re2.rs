//! RE2's syntax, which Istio's patterns are written in, in that of the regular expressions that are used here.
//!
//! As Envoy does, byte by byte (RE2's Latin-1): what is not ASCII in a pattern is the bytes of its UTF-8, and `\pL` a byte that is a letter
//! in Latin-1.
//!
//! Source: RE2's `re2/parse.cc` with the flags Envoy leaves it. What is no RE2 either is passed on as it is, and refused by who compiles it.

use std::{collections::HashMap, iter::Peekable, str::Chars};

/// What `\d`, `\s` and `\w` stand for: ASCII, and no vertical tab among white space.
const CLASSES: [(char, &str); 3] = [('d', "0-9"), ('s', "\\t\\n\\x0C\\r "), ('w', "0-9A-Za-z_")];
/// The most repetitions that may be asked for.
const MOST_REPEATED: u32 = 1000;
/// The longest pattern, bytes.
const LONGEST: usize = 16 * 1024;
/// The names of classes that stand in brackets and colons.
const POSIX: [&str; 14] =
    ["alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space", "upper", "word", "xdigit"];

/// A pattern that means here what `pattern` means to RE2.
pub fn translate(pattern: &str) -> Result<String, String> {
    if pattern.len() > LONGEST {
        return Err(format!("is longer than {LONGEST} bytes"));
    }
    let bytes = pattern.bytes().map(char::from).collect::<String>();
    let mut translation =
        Translation { rest: bytes.chars().peekable(), made: String::with_capacity(pattern.len() + 8), open: 0, groups: HashMap::new() };
    translation.run()?;
    Ok(translation.made)
}

struct Translation<'p> {
    rest: Peekable<Chars<'p>>,
    made: String,
    /// Groups that are open.
    open: usize,
    /// Which bytes Unicode's classes have that were named: a pattern may name one a thousand times.
    groups: HashMap<String, [bool; 256]>,
}

impl Translation<'_> {
    fn run(&mut self) -> Result<(), String> {
        while let Some(c) = self.rest.next() {
            match c {
                '\\' => self.escape()?,
                '[' => self.class()?,
                '{' => self.repetition()?,
                '(' => {
                    self.open += 1;
                    self.made.push(c);
                }
                ')' if self.open == 0 => return Err("has a ) that closes nothing".to_owned()),
                ')' => {
                    self.open -= 1;
                    self.made.push(c);
                }
                c if c.is_ascii() => self.made.push(c),
                c => literal_into(&mut self.made, c),
            }
        }
        Ok(())
    }

    fn escape(&mut self) -> Result<(), String> {
        match self.rest.next() {
            Some('Q') => self.quoted(),
            Some('C') => self.made += "(?s-u:.)",
            Some(c @ ('b' | 'B')) => self.made += &format!("(?-u:\\{c})"),
            Some(c) if class_of(c).is_some() => {
                let (members, negated) = class_of(c).unwrap_or_default();
                self.made += &format!("[{}{members}]", if negated { "^" } else { "" });
            }
            Some(c @ ('p' | 'P')) => self.unicode_group(c)?,
            Some(c) => match self.escaped(c)? {
                Some(literal) => literal_into(&mut self.made, literal),
                None => self.made.extend(['\\', c]),
            },
            None => self.made.push('\\'),
        }
        Ok(())
    }

    /// Up to `\E`, everything is what it is.
    fn quoted(&mut self) {
        while let Some(c) = self.rest.next() {
            if c == '\\' && self.rest.next_if_eq(&'E').is_some() {
                return;
            }
            literal_into(&mut self.made, c);
        }
    }

    /// The one character that an escape stands for. `None`: it stands for something else.
    fn escaped(&mut self, c: char) -> Result<Option<char>, String> {
        let octal = |c: &char| ('0'..='7').contains(c);
        match c {
            '1'..='7' if self.rest.peek().is_none_or(|next| !octal(next)) => Err(format!("refers to group {c}, which RE2 does not do")),
            '0'..='7' => {
                let mut code = u32::from(c) - u32::from('0');
                for _ in 0..2 {
                    let Some(digit) = self.rest.next_if(octal) else { break };
                    code = code * 8 + u32::from(digit) - u32::from('0');
                }
                byte(code).map(Some)
            }
            'x' => self.hexadecimal().map(Some),
            c if !c.is_ascii() || !c.is_ascii_alphanumeric() && c != '_' => Ok(Some(c)),
            _ => Ok(None),
        }
    }

    /// `\pL`, `\p{Greek}`, and with `^` in front of the name what is not of it: the bytes that are.
    fn unicode_group(&mut self, c: char) -> Result<(), String> {
        let mut negated = c == 'P';
        let name = if self.rest.next_if_eq(&'{').is_some() {
            negated ^= self.rest.next_if_eq(&'^').is_some();
            let name = std::iter::from_fn(|| self.rest.next_if(|c| c.is_ascii_alphanumeric() || *c == '_')).collect::<String>();
            if self.rest.next_if_eq(&'}').is_none() {
                return Err(format!("has \\{c}{{{name} without its end"));
            }
            name
        } else {
            self.rest.next().map(String::from).unwrap_or_default()
        };
        let members = if let Some(members) = self.groups.get(&name) {
            *members
        } else {
            let of = regex::Regex::new(&format!("^\\p{{{name}}}$")).map_err(|_| format!("has \\{c}{{{name}}}, which is no class"))?;
            let members = std::array::from_fn(|b| u8::try_from(b).is_ok_and(|b| of.is_match(char::from(b).encode_utf8(&mut [0; 4]))));
            self.groups.insert(name, members);
            members
        };
        self.made.push('[');
        let mut any = false;
        for run in (0..=u8::MAX).collect::<Vec<_>>().chunk_by(|a, b| members[usize::from(*a)] == members[usize::from(*b)]) {
            if let [first, .., last] | [first @ last] = run
                && members[usize::from(*first)] != negated
            {
                any = true;
                self.made += &format!("\\x{first:02X}-\\x{last:02X}");
            }
        }
        // Of none, what nothing is.
        self.made += if any { "]" } else { "^\\x00-\\xFF]" };
        Ok(())
    }

    /// `\x41` and `\x{41}`, behind the letter.
    fn hexadecimal(&mut self) -> Result<char, String> {
        let braced = self.rest.next_if_eq(&'{').is_some();
        let mut digits = String::new();
        while let Some(c) = self.rest.next_if(|c| c.is_ascii_hexdigit() && (braced || digits.len() < 2)) {
            digits.push(c);
        }
        let is_whole = if braced { self.rest.next_if_eq(&'}').is_some() } else { digits.len() == 2 };
        let code = u32::from_str_radix(&digits, 16).ok().filter(|_| is_whole);
        byte(code.ok_or_else(|| "has \\x without two digits, or some in braces".to_owned())?)
    }

    /// A brace that begins no count is a brace.
    fn repetition(&mut self) -> Result<(), String> {
        let mut ahead = self.rest.clone();
        let mut counts = String::new();
        while let Some(c) = ahead.next_if(|c| c.is_ascii_digit() || *c == ',') {
            counts.push(c);
        }
        let closed = ahead.peek() == Some(&'}');
        let (least, most) = counts.split_once(',').map_or((counts.as_str(), None), |(least, most)| (least, Some(most)));
        // Numbers do not begin with a nought.
        let is_number =
            |text: &str| !text.is_empty() && (text.len() == 1 || !text.starts_with('0')) && text.bytes().all(|b| b.is_ascii_digit());
        if !closed || !is_number(least) || !most.is_none_or(|most| most.is_empty() || is_number(most)) {
            self.made += "\\{";
            return Ok(());
        }
        let too_many = |text: &str| !text.is_empty() && text.parse().map_or(true, |n: u32| n > MOST_REPEATED);
        if too_many(least) || most.is_some_and(too_many) {
            return Err(format!("repeats something more than {MOST_REPEATED} times"));
        }
        self.made.push('{');
        Ok(())
    }

    /// Behind the bracket that opens it.
    fn class(&mut self) -> Result<(), String> {
        self.made.push('[');
        if self.rest.next_if_eq(&'^').is_some() {
            self.made.push('^');
        }
        let mut first = true;
        loop {
            match self.rest.next() {
                // Who compiles it tells that it is not closed.
                None => return Ok(()),
                Some(']') if !first => {
                    self.made.push(']');
                    return Ok(());
                }
                Some(c) => self.class_item(c)?,
            }
            first = false;
        }
    }

    fn class_item(&mut self, c: char) -> Result<(), String> {
        if c == '[' && self.posix_class()? {
            return Ok(());
        }
        if c == '\\' {
            if let Some((members, negated)) = self.rest.peek().copied().and_then(class_of) {
                self.rest.next();
                self.made += &if negated { format!("[^{members}]") } else { members.to_owned() };
                return Ok(());
            }
            if let Some(sign) = self.rest.next_if(|c| matches!(c, 'p' | 'P')) {
                return self.unicode_group(sign);
            }
        }
        self.class_character(c)?;
        // A range, unless the class ends there.
        let mut ahead = self.rest.clone();
        if ahead.next() == Some('-') && ahead.peek().is_some_and(|c| *c != ']') {
            self.rest.next();
            self.made.push('-');
            if let Some(c) = self.rest.next() {
                self.class_character(c)?;
            }
        }
        Ok(())
    }

    fn class_character(&mut self, c: char) -> Result<(), String> {
        if c != '\\' {
            literal_into(&mut self.made, c);
            return Ok(());
        }
        let Some(c) = self.rest.next() else { return Ok(()) };
        match self.escaped(c)? {
            Some(literal) => literal_into(&mut self.made, literal),
            None => self.made.extend(['\\', c]),
        }
        Ok(())
    }

    /// `[:alpha:]` and its kin, behind the bracket.
    fn posix_class(&mut self) -> Result<bool, String> {
        let mut ahead = self.rest.clone();
        if ahead.next() != Some(':') {
            return Ok(false);
        }
        let negated = ahead.next_if_eq(&'^').is_some();
        let mut name = String::new();
        while let Some(c) = ahead.next_if(char::is_ascii_alphabetic) {
            name.push(c);
        }
        if ahead.next() != Some(':') || ahead.next() != Some(']') {
            return Ok(false);
        }
        if !POSIX.contains(&name.as_str()) {
            return Err(format!("has a class [:{name}:], which is none"));
        }
        self.made += &format!("[:{}{name}:]", if negated { "^" } else { "" });
        self.rest = ahead;
        Ok(true)
    }
}

/// The members of one of Perl's classes, and whether those are what it leaves out.
fn class_of(c: char) -> Option<(&'static str, bool)> {
    let (_, members) = CLASSES.iter().find(|(name, _)| c.eq_ignore_ascii_case(name))?;
    Some((*members, c.is_ascii_uppercase()))
}

/// The character of a code: there are none beyond a byte.
fn byte(code: u32) -> Result<char, String> {
    u8::try_from(code).map(char::from).map_err(|_| format!("has the character {code:x}, which is more than a byte"))
}

/// A character as itself, wherever it stands.
fn literal_into(made: &mut String, c: char) {
    if !c.is_ascii() {
        made.push_str(&format!("\\x{:02X}", u32::from(c)));
        return;
    }
    // `\<` and `\>` would be ends of words.
    if c.is_ascii_punctuation() && c != '<' && c != '>' {
        made.push('\\');
    }
    made.push(c);
}

#[cfg(test)]
mod tests {
    use super::super::matching::Pattern;

    #[test]
    fn patterns_mean_what_they_mean_to_re2() {
        for (pattern, taken, not) in [
            ("/files/[\\w-.]+", &["/files/a-b.c"][..], &["/files/a b"][..]),
            ("/users/{id}", &["/users/{id}"], &["/users/7"]),
            ("a{", &["a{"], &["a"]),
            ("a{,2}", &["a{,2}"], &["aa"]),
            ("a{2}", &["aa"], &["a{2}"]),
            ("a{2,}b{1,2}?", &["aab", "aaabb"], &["ab"]),
            ("\\Qa.b\\E.", &["a.bc"], &["axbc"]),
            ("\\Qa.b", &["a.b"], &["axb"]),
            ("[[]a]", &["[a]"], &["a"]),
            ("\\012", &["\n"], &["012"]),
            ("\\101\\0", &["A\0"], &["A"]),
            ("\\C", &["x"], &["xy"]),
            ("[&&a-z]+", &["abc", "&"], &["A"]),
            ("[a-c--b]+", &["b", "-", "."], &["d"]),
            ("[+--]", &["-", ",", "+"], &["."]),
            ("[a~~b]", &["~", "a"], &["c"]),
            ("[[a]]", &["a]", "[]"], &["a"]),
            ("\\<a\\>", &["<a>"], &["a"]),
            ("[]a]+", &["]a"], &["b"]),
            ("[^]a]", &["b"], &["]", "a"]),
            ("[a-]", &["-", "a"], &["b"]),
            ("[\\]\\-x]+", &["]-x"], &["\\"]),
            ("[[:alpha:][:digit:]_]+", &["aB3_"], &["-"]),
            ("[[:^alpha:]]", &["3"], &["a"]),
            ("[[:x]", &["[", ":", "x"], &["y"]),
            ("\\d\\D\\s\\S\\w\\W", &["1a xa-"], &["1a\u{b}xa-"]),
            ("[\\d\\S]", &["1", "a"], &[" "]),
            ("[\\x41-\\x{43}]", &["A", "C"], &["D", "x"]),
            ("\\x41\\x{4A}|caf\\x{c3}\\xa9", &["AJ", "café"], &["A"]),
            ("\\pL{1,255}", &["abc"], &["a1"]),
            ("\\P{L}[^\\pL]", &["12"], &["1a"]),
            ("[\\p{Han}x]", &["x"], &["y"]),
            (&"\\pL".repeat(300), &[&*"a".repeat(300)], &["a"]),
            ("[а-я]+", &["а"], &["z"]),
            ("a{01}", &["a{01}"], &["a"]),
            ("(?i)ab(c|d)(?:e)", &["ABCE"], &["abe"]),
            ("(?P<n>a)\\.\\/", &["a./"], &["ab/"]),
            ("\\p{^Lu}", &["a"], &["A"]),
            ("\\pL{1,20}", &["abc"], &["1"]),
            ("[\\p{L}\\p{N}_-]{3,30}", &["a-b9"], &["a b", "a-é"]),
            ("(東京|大阪)/.{1,255}", &["東京/x"], &["x"]),
            ("é\\d", &["é1"], &["é\u{661}"]),
            ("é.", &["éa"], &["éé"]),
            ("[^é]{1,255}", &["€"], &["é"]),
            ("\\bab\\b", &["ab"], &["b"]),
            ("a\\\\b", &["a\\b"], &["ab"]),
        ] {
            let compiled = Pattern::parse(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}"));
            taken.iter().for_each(|value| assert!(compiled.matches(value.as_bytes()), "{pattern} {value:?}"));
            not.iter().for_each(|value| assert!(!compiled.matches(value.as_bytes()), "{pattern} not {value:?}"));
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for pattern in [
            "a)(b",
            "[",
            "[a",
            "(",
            "a{1001}",
            "\\1",
            "*",
            "\\",
            "[\\",
            "\\p{Nope}",
            "[b-a]",
            "\\y",
            "(?=a)",
            "[[:foo:]]",
            "\\p{L",
            "\\x{100}",
            "\\x4",
            "\\x{",
            &"{".repeat(20_000),
        ] {
            assert!(Pattern::parse(pattern).is_err(), "{pattern}");
        }
    }
}
