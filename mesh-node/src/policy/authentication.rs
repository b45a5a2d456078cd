//! Tokens of end users, as `RequestAuthentication` accepts them.
//!
//! Semantics are what Istio makes of the resource in Envoy: every rule is satisfied by its valid token or by there being
//! none; of several rules one valid token is enough, and without one none may be invalid. Where rules are `REQUIRED`, each of those has
//! to have its own, and the others what they would have to have alone. Which failure is told is Envoy's choice: the first that is more than a
//! missing token or an unknown issuer, and of rules that are all to be satisfied the first that is not.

use std::{sync::Arc, time::SystemTime};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use crate::{
    jwt::{Expected, Fault, Keys, Token},
    resource::request_authentication::{JwtRule, Location},
    route::request::{RequestHead, cookie, decoded_parameter, without_parameter},
};

/// Claims that hold words separated by spaces, whatever the rule says (RFC 8693 section 4.2).
const WORD_LISTS: [&str; 2] = ["scope", "permission"];

/// A token that was verified, and the rule that asked for it.
#[derive(Debug, Clone)]
pub struct Verified {
    pub token: Token,
    pub rule: Arc<JwtRule>,
    /// Others that were, before it: policies do not ask about them.
    pub beside: Vec<(Token, Arc<JwtRule>)>,
}

impl Verified {
    /// Claims as a token would have them that these rules take, to ask what would be. `None` if no rule takes tokens of their
    /// issuer.
    pub fn assumed(rules: &[Arc<JwtRule>], claims: &str) -> Result<Option<Self>, Fault> {
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let token = Token::parse(&format!("{}.{}.AAAA", part(r#"{"alg":"RS256"}"#), part(claims)))?;
        let rule = of_issuer(rules.iter(), &token, |rule| rule).cloned();
        Ok(rule.map(|rule| Self { token, rule, beside: Vec::new() }))
    }

    /// Of several the last counts, as in Envoy, which writes one's claims over another's.
    fn of(mut all: Vec<(Token, Arc<JwtRule>)>) -> Option<Self> {
        let (token, rule) = all.pop()?;
        Some(Self { token, rule, beside: all })
    }

    fn all(&self) -> impl Iterator<Item = (&Token, &Arc<JwtRule>)> {
        self.beside.iter().map(|(token, rule)| (token, rule)).chain([(&self.token, &self.rule)])
    }

    pub(super) fn claim(&self, path: &[Arc<str>]) -> Option<&Value> {
        claim(&self.token, path)
    }

    pub(super) fn is_word_list(&self, path: &[Arc<str>]) -> bool {
        let [name] = path else { return false };
        WORD_LISTS.contains(&&**name) || self.rule.word_lists.contains(name)
    }

    /// The texts of a claim, for routing.
    pub fn texts(&self, path: &[Arc<str>]) -> Vec<String> {
        match self.claim(path) {
            Some(Value::String(words)) if self.is_word_list(path) => words.split(' ').map(str::to_owned).collect(),
            Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            Some(Value::String(text)) => vec![text.clone()],
            // Numbers and truth values are no texts for Envoy's matchers, here or in policies.
            Some(_) | None => Vec::new(),
        }
    }
}

fn claim<'t>(token: &'t Token, path: &[Arc<str>]) -> Option<&'t Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(token.claims.get(&**first)?, |value, name| value.get(&**name))
}

/// A claim as text: lists and objects have none.
pub fn claim_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(b) => Some(b.to_string()),
        Value::Number(n) => Some(n.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A token in a request, and where.
#[derive(Debug)]
pub struct Found<'a> {
    pub location: &'a Location,
    pub text: String,
}

/// All tokens at the places a rule names.
pub fn locate<'a>(rule: &'a JwtRule, head: &RequestHead) -> Vec<Found<'a>> {
    rule.locations.iter().flat_map(|location| locate_at(location, head)).collect()
}

fn locate_at<'a>(location: &'a Location, head: &RequestHead) -> Vec<Found<'a>> {
    let texts = match location {
        Location::Header(name, prefix) => tokens_in_header(&head.headers, name, prefix).unwrap_or_default(),
        // One without a value is a token that is none.
        Location::Parameter(name) => head.query().and_then(|q| decoded_parameter(q, name)).into_iter().collect(),
        Location::Cookie(name) => {
            cookie(&head.headers, name).and_then(|value| std::str::from_utf8(value).ok()).map(str::to_owned).into_iter().collect()
        }
    };
    texts.into_iter().map(|text| Found { location, text }).collect()
}

/// Every value of a header is a token; with a prefix, repeated headers count as one, joined by commas. As Envoy reads them: no token
/// can be hidden behind another.
fn tokens_in_header(headers: &HeaderMap, name: &HeaderName, prefix: &str) -> Option<Vec<String>> {
    let mut all = headers.get_all(name).iter();
    if prefix.is_empty() {
        return Some(all.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect());
    }
    let first = all.next()?;
    let value = all.fold(first.as_bytes().to_vec(), |mut joined, next| {
        joined.push(b',');
        joined.extend_from_slice(next.as_bytes());
        joined
    });
    let value = String::from_utf8(value).ok()?;
    // Envoy looks for the prefix anywhere in the value; what follows it is the token, from the first character that may be in one.
    let (_, after) = value.split_once(prefix)?;
    let token = after.trim_start_matches(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_' | '.'));
    Some(vec![token.trim_end().to_owned()])
}

/// Whether a rule's keys are needed: some token is its issuer's and wants nothing but to be verified.
pub fn needs_keys(rule: &JwtRule, head: &RequestHead, now: SystemTime) -> bool {
    let expected = Expected { issuer: rule.issuer.to_string(), audiences: rule.audiences.clone() };
    locate(rule, head).iter().any(|found| Token::parse(&found.text).is_ok_and(|token| expected.check(&token, now).is_ok()))
}

/// What became of the tokens of a request.
#[derive(Debug, Default)]
pub struct Authenticated {
    pub claims: Option<Verified>,
}

/// The request's token is not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub fault: Fault,
}

impl Authenticated {
    /// Judges a request's tokens with the keys there are of each rule; `None` when they could not be had.
    pub fn judge(rules: &[(&Arc<JwtRule>, Option<Arc<Keys>>)], head: &RequestHead, now: SystemTime) -> Result<Self, Refused> {
        let is_required = rules.iter().any(|(rule, _)| rule.is_required);
        let judged = if is_required { judge_all(rules, head, now) } else { judge_any(rules, head, now) };
        judged.map(|all| Self { claims: Verified::of(all) }).map_err(|fault| Refused { fault })
    }
}

type Accepted = Vec<(Token, Arc<JwtRule>)>;

/// Where no rule has to have a token.
fn judge_any(rules: &[(&Arc<JwtRule>, Option<Arc<Keys>>)], head: &RequestHead, now: SystemTime) -> Result<Accepted, Fault> {
    let mut told = Fault::Missing;
    let mut any_invalid = false;
    for (rule, keys) in rules {
        match verify(rule, keys.as_deref(), head, now) {
            Ok(tokens) if tokens.is_empty() => {}
            Ok(tokens) => return Ok(tokens),
            Err(fault) => {
                any_invalid = true;
                told = rather(told, fault);
            }
        }
    }
    if !any_invalid {
        return Ok(Vec::new());
    }
    if rules.len() > 1 {
        // No rule takes all of them; each may be taken by its own.
        return verify_each(rules, head, now).map_err(|fault| rather(told, fault));
    }
    Err(told)
}

/// Where some do. What one rule has taken out of the request another does not find in it.
fn judge_all(rules: &[(&Arc<JwtRule>, Option<Arc<Keys>>)], head: &RequestHead, now: SystemTime) -> Result<Accepted, Fault> {
    let mut left = head.clone();
    let mut all = Vec::new();
    for (rule, keys) in rules {
        let tokens = match verify(rule, keys.as_deref(), &left, now) {
            Ok(tokens) if tokens.is_empty() && rule.is_required => return Err(Fault::Missing),
            Ok(tokens) if !tokens.is_empty() => tokens,
            Err(fault) if rule.is_required => return Err(fault),
            not_its => verify_each(rules, &left, now).map_err(|fault| rather(not_its.err().unwrap_or(Fault::Missing), fault))?,
        };
        tokens.iter().for_each(|(_, rule)| take_out(rule, &mut left));
        all.extend(tokens);
    }
    Ok(all)
}

/// The first rule that has to have a token, and has none where this is all there is.
pub fn unsatisfied<'r>(rules: &'r [Arc<JwtRule>], verified: Option<&Verified>) -> Option<&'r Arc<JwtRule>> {
    let has = |rule: &Arc<JwtRule>| verified.is_some_and(|verified| verified.all().any(|(_, of)| Arc::ptr_eq(of, rule)));
    rules.iter().find(|rule| rule.is_required && !has(rule))
}

/// Which of two faults is told.
fn rather(told: Fault, other: Fault) -> Fault {
    if matches!(told, Fault::Missing | Fault::UnknownIssuer) { other } else { told }
}

/// Every token, wherever a rule may have it, must be one that the rule of its issuer takes.
fn verify_each(rules: &[(&Arc<JwtRule>, Option<Arc<Keys>>)], head: &RequestHead, now: SystemTime) -> Result<Accepted, Fault> {
    let mut locations: Vec<&Location> = Vec::new();
    for location in rules.iter().flat_map(|(rule, _)| &rule.locations) {
        if !locations.contains(&location) {
            locations.push(location);
        }
    }
    locations.sort_by_cached_key(|location| location.order());
    let mut all = Vec::new();
    let found = locations.into_iter().flat_map(|location| locate_at(location, head)).collect::<Vec<_>>();
    for found in found.into_iter().rev() {
        let token = Token::parse(&found.text)?;
        let there = rules.iter().filter(|(rule, _)| rule.locations.contains(found.location));
        let own = of_issuer(there, &token, |(rule, _)| rule);
        let (rule, keys) = own.ok_or(Fault::UnknownIssuer)?;
        accept(&token, rule, keys.as_deref(), now)?;
        all.push((token, (*rule).clone()));
    }
    Ok(all)
}

/// The rule for a token: its issuer's own, or one for any.
fn of_issuer<'r, R>(rules: impl Iterator<Item = &'r R> + Clone, token: &Token, rule: impl Fn(&R) -> &Arc<JwtRule>) -> Option<&'r R> {
    let own = rules.clone().find(|r| *rule(r).issuer == *token.issuer());
    own.or_else(|| {
        let mut rules = rules;
        rules.find(|r| rule(r).is_of(token.issuer()))
    })
}

/// All tokens at a rule's places must be its valid ones. The first there comes last, as in Envoy: it is the one that counts.
fn verify(rule: &Arc<JwtRule>, keys: Option<&Keys>, head: &RequestHead, now: SystemTime) -> Result<Accepted, Fault> {
    let all = locate(rule, head).into_iter().rev().map(|found| {
        let token = Token::parse(&found.text)?;
        accept(&token, rule, keys, now)?;
        Ok((token, rule.clone()))
    });
    all.collect()
}

fn accept(token: &Token, rule: &JwtRule, keys: Option<&Keys>, now: SystemTime) -> Result<(), Fault> {
    let expected = Expected { issuer: rule.issuer.to_string(), audiences: rule.audiences.clone() };
    expected.check(token, now)?;
    token.verify(keys.ok_or(Fault::NoKeys)?)
}

/// Makes of a request what the application gets: headers only the proxy may write are taken off, the token is, unless it is
/// to be forwarded, and claims are put on.
pub fn received(rules: &[Arc<JwtRule>], verified: Option<&Verified>, head: &RequestHead) -> RequestHead {
    let mut received = head.clone();
    strip(rules, verified, &mut received, &[]);
    received
}

/// As [`received`], in place. `again`: the rules of who gets it next; one among them that has verified the token has to find it.
pub fn strip(rules: &[Arc<JwtRule>], verified: Option<&Verified>, head: &mut RequestHead, again: &[Arc<JwtRule>]) {
    for rule in rules {
        for name in rule.payload_header.iter().chain(rule.claim_headers.iter().map(|c| &c.header)) {
            head.headers.remove(name);
        }
    }
    for (token, rule) in verified.into_iter().flat_map(Verified::all) {
        if !again.contains(rule) {
            take_out(rule, head);
        }
        tell(token, rule, head);
    }
}

/// Takes a rule's tokens out of a request, unless they are to go on.
fn take_out(rule: &JwtRule, head: &mut RequestHead) {
    if !rule.forward {
        let locations = locate(rule, head).into_iter().map(|f| f.location).collect::<Vec<_>>();
        locations.into_iter().for_each(|location| remove(location, head));
    }
}

/// Writes what a rule wants told of its token.
fn tell(token: &Token, rule: &JwtRule, head: &mut RequestHead) {
    if let (Some(name), Ok(value)) = (&rule.payload_header, HeaderValue::from_str(&token.payload)) {
        head.headers.append(name.clone(), value);
    }
    for out in &rule.claim_headers {
        let text = claim(token, &out.claim).and_then(|value| match value {
            Value::Array(_) | Value::Object(_) => Some(STANDARD.encode(value.to_string())),
            Value::Number(n) => n.as_f64().map(number),
            other => claim_text(other),
        });
        if let Some(value) = text.filter(|text| !text.is_empty()).and_then(|t| HeaderValue::from_bytes(t.as_bytes()).ok()) {
            head.headers.append(out.header.clone(), value);
        }
    }
}

/// As Envoy writes it, to which every number of a token is a double: what is whole and not negative without a fraction.
fn number(n: f64) -> String {
    if n >= 0.0 && n.fract() == 0.0 { format!("{:.0}", n.abs()) } else { format!("{n:.6}") }
}

fn remove(location: &Location, head: &mut RequestHead) {
    match location {
        Location::Header(name, _) => drop(head.headers.remove(name)),
        Location::Parameter(name) => {
            if let Some(target) = without_parameter(&head.target, name) {
                head.target = target;
            }
        }
        // Envoy leaves cookies as they are.
        Location::Cookie(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a real Envoy has written.
    #[test]
    fn numbers_are_written_as_envoy_does() {
        for (n, text) in [
            (10_000_000_000.0, "10000000000"),
            (-0.0, "0"),
            (-1.0, "-1.000000"),
            (9_007_199_254_740_992.0, "9007199254740992"),
            (1.5, "1.500000"),
            (7.0, "7"),
        ] {
            assert_eq!(number(n), text);
        }
    }
}
