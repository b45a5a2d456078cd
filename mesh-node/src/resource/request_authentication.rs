//! `RequestAuthentication` as written: which tokens end users may come with. Semantics of Istio's security API.

use std::{sync::Arc, time::Duration};

use http::HeaderName;
use serde::Deserialize;
use serde_json::Value;

use super::{
    envelope::FieldError,
    fields::{Time, end_to_end_header, header_name},
    selector::WorkloadSelector,
    target::{TargetRef, TargetSpec, targets},
};
use crate::jwt::Keys;

#[derive(Debug, Clone, PartialEq)]
pub struct RequestAuthentication {
    pub selector: Option<WorkloadSelector>,
    pub targets: Vec<TargetRef>,
    pub rules: Vec<Arc<JwtRule>>,
}

/// One issuer whose tokens are accepted.
#[derive(Debug, Clone, PartialEq)]
pub struct JwtRule {
    /// Empty: tokens of any, which these keys verify.
    pub issuer: Arc<str>,
    /// Any of these; none asks for nothing.
    pub audiences: Vec<String>,
    pub keys: KeySource,
    /// Where tokens are looked for, in this order.
    pub locations: Vec<Location>,
    /// The token stays in the request.
    pub forward: bool,
    /// Gets the payload, base64url without padding.
    pub payload_header: Option<HeaderName>,
    pub claim_headers: Vec<ClaimHeader>,
    /// Claims of text that are lists of words, beside `scope` and `permission`.
    pub word_lists: Vec<Arc<str>>,
    /// Requests without a token of this rule are refused (`presence: REQUIRED`).
    pub is_required: bool,
}

impl JwtRule {
    /// What stands in for a rule that cannot be read: its issuer, where it has one, none of whose tokens is taken wherever they are, as far as that
    /// can be read; and headers of which it says that they are written are no client's.
    fn unread(rule: &Value) -> Self {
        let text = |field: &str| rule.get(field).and_then(Value::as_str).unwrap_or_default();
        let list = |field: &str| rule.get(field).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let header = |name: &Value| name.as_str().and_then(|name| end_to_end_header(name, "").ok());
        let of_headers = list("fromHeaders").iter().filter_map(|spec| {
            let name = header_name(spec.get("name")?.as_str()?, "").ok()?;
            Some(Location::Header(name, spec.get("prefix").and_then(Value::as_str).unwrap_or_default().into()))
        });
        let named =
            |field: &str| list(field).iter().filter_map(Value::as_str).filter(|name| !name.is_empty()).map(Arc::from).collect::<Vec<_>>();
        let parameters = named("fromParams").into_iter().map(Location::Parameter);
        let cookies = named("fromCookies").into_iter().map(Location::Cookie);
        let locations = of_headers.chain(parameters).chain(cookies).collect::<Vec<_>>();
        let claim = |spec: &Value| Some(ClaimHeader { header: header(spec.get("header")?)?, claim: Vec::new() });
        Self {
            issuer: text("issuer").into(),
            audiences: Vec::new(),
            keys: KeySource::Inline(Arc::new(Keys::none())),
            locations: if locations.is_empty() { usual_locations() } else { locations },
            forward: false,
            payload_header: rule.get("outputPayloadToHeader").and_then(header),
            claim_headers: list("outputClaimToHeaders").iter().filter_map(claim).collect(),
            word_lists: Vec::new(),
            is_required: rule.get("presence").is_some_and(|presence| !presence.is_null() && presence != "OPTIONAL"),
        }
    }

    /// Whether tokens of an issuer are this rule's.
    pub fn is_of(&self, issuer: &str) -> bool {
        self.issuer.is_empty() || *self.issuer == *issuer
    }

    /// Headers that are not the client's once a token has been verified, or taken out with it.
    pub fn changed_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let written = self.payload_header.iter().chain(self.claim_headers.iter().map(|c| &c.header));
        let taken = self.locations.iter().filter(|_| !self.forward).filter_map(|location| match location {
            Location::Header(name, _) => Some(name),
            Location::Parameter(_) | Location::Cookie(_) => None,
        });
        written.chain(taken)
    }
}

/// Where the issuer's public keys come from.
#[derive(Debug, Clone, PartialEq)]
pub enum KeySource {
    Inline(Arc<Keys>),
    /// A key set, or a discovery document that names one.
    Remote(RemoteKeys),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteKeys {
    pub uri: Arc<str>,
    /// The document at `uri` is an `OpenID` provider's configuration.
    pub discovery: bool,
    pub timeout: Duration,
}

/// Where a token may be.
#[derive(Debug, Clone, PartialEq)]
pub enum Location {
    /// What follows the prefix.
    Header(HeaderName, Arc<str>),
    Parameter(Arc<str>),
    Cookie(Arc<str>),
}

/// A header that gets a claim; nested claims by a path.
#[derive(Debug, Clone, PartialEq)]
pub struct ClaimHeader {
    pub header: HeaderName,
    pub claim: Vec<Arc<str>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Spec {
    selector: Option<WorkloadSelector>,
    target_ref: Option<TargetSpec>,
    #[serde(default)]
    target_refs: Option<Vec<TargetSpec>>,
    #[serde(default)]
    jwt_rules: Option<Vec<RuleSpec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RuleSpec {
    issuer: Option<String>,
    #[serde(default)]
    audiences: Option<Vec<String>>,
    #[serde(alias = "jwks_uri")]
    jwks_uri: Option<String>,
    jwks: Option<String>,
    #[serde(default)]
    from_headers: Option<Vec<HeaderSpec>>,
    #[serde(default)]
    from_params: Option<Vec<String>>,
    #[serde(default)]
    from_cookies: Option<Vec<String>>,
    output_payload_to_header: Option<String>,
    forward_original_token: Option<bool>,
    #[serde(default)]
    output_claim_to_headers: Option<Vec<ClaimSpec>>,
    timeout: Option<Time>,
    #[serde(default)]
    space_delimited_claims: Option<Vec<String>>,
    presence: Option<Presence>,
}

/// What there is where an issuer's token is missing: nothing, or a refusal.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
enum Presence {
    #[serde(rename = "OPTIONAL")]
    Optional,
    #[serde(rename = "REQUIRED")]
    Required,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderSpec {
    name: String,
    prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClaimSpec {
    header: String,
    claim: String,
}

/// Longest time a fetch of keys is given, whatever the rule says.
const LONGEST_FETCH: Duration = Duration::from_secs(30);
/// How long a fetch of keys may take, unless the rule says otherwise.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

impl RequestAuthentication {
    /// What stands in for one that cannot be read: rules that can be, and of the others their issuers, none of whose tokens is taken. None where
    /// it cannot be told whom it is for.
    pub(super) fn as_far_as_it_can_be_read(spec: &Value) -> Option<Self> {
        let whom = ["selector", "targetRefs", "targetRef"];
        let strange = spec.as_object()?.keys().any(|k| !whom.contains(&k.as_str()) && k != "jwtRules");
        if strange && whom.iter().all(|field| spec.get(field).is_none_or(Value::is_null)) {
            return None;
        }
        let for_whom = |rules: Vec<Value>| {
            let mut one = serde_json::json!({"jwtRules": rules});
            for field in whom {
                if let Some(value) = spec.get(field) {
                    one[field] = value.clone();
                }
            }
            serde_json::from_value::<Spec>(one).ok().and_then(|spec| Self::read(spec).ok())
        };
        let mut all = for_whom(Vec::new())?;
        let rules = match spec.get("jwtRules") {
            None | Some(Value::Null) => &[][..],
            Some(Value::Array(rules)) => rules,
            Some(odd) => std::slice::from_ref(odd),
        };
        let read = |rule: &Value| for_whom(vec![rule.clone()]).and_then(|one| one.rules.into_iter().next());
        all.rules = rules.iter().map(|rule| read(rule).unwrap_or_else(|| Arc::new(JwtRule::unread(rule)))).collect();
        Some(all)
    }

    pub(super) fn read(spec: Spec) -> Result<Self, FieldError> {
        let targets = targets(spec.target_ref, spec.target_refs, spec.selector.is_some())?;
        let rules = spec.jwt_rules.unwrap_or_default().into_iter().enumerate();
        let rules = rules.map(|(i, r)| rule(r, &format!("spec.jwtRules[{i}]")).map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Self { selector: spec.selector.filter(|s| !s.match_labels.is_empty()), targets, rules })
    }
}

fn rule(spec: RuleSpec, at: &str) -> Result<JwtRule, FieldError> {
    let issuer = spec.issuer.unwrap_or_default();
    let audiences = spec.audiences.unwrap_or_default();
    if let Some(i) = audiences.iter().position(String::is_empty) {
        return Err(FieldError::new(format!("{at}.audiences[{i}]"), "is empty; name an audience, or remove it"));
    }
    let timeout = match spec.timeout {
        None => FETCH_TIMEOUT,
        Some(time) if time.0.is_zero() => return Err(FieldError::new(format!("{at}.timeout"), "must be greater than zero")),
        Some(time) => time.0.min(LONGEST_FETCH),
    };
    let (inline, uri) = (spec.jwks.filter(|j| !j.is_empty()), spec.jwks_uri.filter(|u| !u.is_empty()));
    let keys = match (inline, uri) {
        (Some(_), Some(_)) => return Err(FieldError::new(format!("{at}.jwks"), "and jwksUri cannot both be set; remove one of them")),
        (Some(text), None) => {
            let keys = Keys::parse(&text).map_err(|e| FieldError::new(format!("{at}.jwks"), e.to_string()))?;
            KeySource::Inline(Arc::new(keys))
        }
        (None, Some(uri)) => KeySource::Remote(remote(&uri, false, timeout, &format!("{at}.jwksUri"))?),
        (None, None) if issuer.is_empty() => {
            return Err(FieldError::new(
                format!("{at}.issuer"),
                "is missing, and so are the keys; name the `iss` of the tokens, or set jwksUri",
            ));
        }
        // OpenID Connect Discovery 1.0, section 4.
        (None, None) => {
            let uri = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
            let at = format!("{at}.issuer");
            let found = remote(&uri, true, timeout, &at);
            KeySource::Remote(found.map_err(|e| FieldError::new(at, format!("{}; or set jwks or jwksUri", e.problem)))?)
        }
    };
    let payload_header = spec.output_payload_to_header.filter(|h| !h.is_empty());
    let payload_header = payload_header.map(|h| end_to_end_header(&h, &format!("{at}.outputPayloadToHeader"))).transpose()?;
    let claim_headers = claim_headers(spec.output_claim_to_headers.unwrap_or_default(), at)?;
    Ok(JwtRule {
        issuer: issuer.into(),
        audiences: audiences.iter().map(|a| crate::jwt::audience(a)).collect(),
        keys,
        locations: locations(spec.from_headers, spec.from_params, spec.from_cookies, at)?,
        forward: spec.forward_original_token.unwrap_or(false),
        payload_header,
        claim_headers,
        word_lists: spec.space_delimited_claims.unwrap_or_default().into_iter().map(Arc::from).collect(),
        is_required: spec.presence == Some(Presence::Required),
    })
}

fn remote(uri: &str, discovery: bool, timeout: Duration, at: &str) -> Result<RemoteKeys, FieldError> {
    let parsed = uri.parse::<http::Uri>().ok().filter(|u| u.host().is_some_and(|h| !h.is_empty()));
    let known = parsed.is_some_and(|u| matches!(u.scheme_str(), Some("http" | "https")));
    if !known {
        return Err(FieldError::new(at, format!("{uri:?} is not an http:// or https:// URL")));
    }
    Ok(RemoteKeys { uri: uri.into(), discovery, timeout })
}

fn claim_headers(specs: Vec<ClaimSpec>, at: &str) -> Result<Vec<ClaimHeader>, FieldError> {
    let mut found: Vec<ClaimHeader> = Vec::new();
    for (i, spec) in specs.into_iter().enumerate() {
        let at = format!("{at}.outputClaimToHeaders[{i}]");
        let header = end_to_end_header(&spec.header, &format!("{at}.header"))?;
        if found.iter().any(|f| f.header == header) {
            return Err(FieldError::new(format!("{at}.header"), format!("{header} is given twice; every header can carry one claim")));
        }
        if spec.claim.split('.').any(str::is_empty) {
            return Err(FieldError::new(format!("{at}.claim"), "is empty; name a claim, nested ones as outer.inner"));
        }
        found.push(ClaimHeader { header, claim: spec.claim.split('.').map(Arc::from).collect() });
    }
    Ok(found)
}

/// Locations that are named replace the usual ones: the authorization header, then the parameter `access_token`.
fn locations(
    headers: Option<Vec<HeaderSpec>>,
    parameters: Option<Vec<String>>,
    cookies: Option<Vec<String>>,
    at: &str,
) -> Result<Vec<Location>, FieldError> {
    let mut all = Vec::new();
    for (i, spec) in headers.unwrap_or_default().into_iter().enumerate() {
        let name = header_name(&spec.name, &format!("{at}.fromHeaders[{i}].name"))?;
        all.push(Location::Header(name, spec.prefix.unwrap_or_default().into()));
    }
    let named = |texts: Option<Vec<String>>, field: &str, make: fn(Arc<str>) -> Location| {
        let texts = texts.unwrap_or_default();
        let empty = texts.iter().position(String::is_empty);
        match empty {
            Some(i) => Err(FieldError::new(format!("{at}.{field}[{i}]"), "is empty; give a name, or remove it")),
            None => Ok(texts.into_iter().map(move |t| make(t.into())).collect::<Vec<_>>()),
        }
    };
    all.extend(named(parameters, "fromParams", Location::Parameter)?);
    all.extend(named(cookies, "fromCookies", Location::Cookie)?);
    all.sort_by_cached_key(Location::order);
    all.dedup();
    Ok(if all.is_empty() { usual_locations() } else { all })
}

impl Location {
    /// What Envoy's order goes by, whatever order they are written in: headers with their prefixes, parameters, cookies, each by name.
    pub fn order(&self) -> (u8, String) {
        match self {
            Self::Header(name, prefix) => (0, format!("{name}{prefix}")),
            Self::Parameter(name) => (1, name.to_string()),
            Self::Cookie(name) => (2, name.to_string()),
        }
    }
}

fn usual_locations() -> Vec<Location> {
    vec![Location::Header(http::header::AUTHORIZATION, "Bearer ".into()), Location::Parameter("access_token".into())]
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::resource::{self, Object, Parsed, request_authentication::*};

    fn read(spec: &Value) -> Result<RequestAuthentication, String> {
        let document =
            json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "p"}, "spec": spec});
        match resource::parse(&document, "default").map_err(|e| e.to_string())? {
            Parsed::Object(named) => match named.object {
                Object::RequestAuthentication(r) => Ok(r),
                other => Err(format!("{other:?}")),
            },
            Parsed::Ignored(kind) => Err(format!("{kind} ignored")),
        }
    }

    #[test]
    fn defaults_are_istios() {
        let read = read(&json!({"jwtRules": [{"issuer": "https://a.example/"}]})).expect("valid");
        let rule = &read.rules[0];
        let remote = RemoteKeys {
            uri: "https://a.example/.well-known/openid-configuration".into(),
            discovery: true,
            timeout: Duration::from_secs(5),
        };
        assert_eq!(rule.keys, KeySource::Remote(remote));
        let usual = [Location::Header(http::header::AUTHORIZATION, "Bearer ".into()), Location::Parameter("access_token".into())];
        assert_eq!((rule.locations.as_slice(), rule.forward), (&usual[..], false));
    }

    #[test]
    fn what_cannot_be_read_refuses_its_issuers_tokens() {
        let rejected = |spec: &Value| {
            let document =
                json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "p"}, "spec": spec});
            let instead = resource::parse(&document, "default").expect_err("refused").instead?;
            match instead.object {
                Object::RequestAuthentication(read) => Some(read),
                other => panic!("{other:?}"),
            }
        };
        let good = json!({"issuer": "https://a.example", "jwksUri": "https://a.example/keys"});
        let bad = json!({"issuer": "https://b.example", "jwksUri": "https://b.example/keys", "required": true,
            "fromHeaders": [{"name": "x-jwt"}, {"name": "a b"}], "outputPayloadToHeader": "x-payload",
            "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}]});
        let read =
            rejected(&json!({"selector": {"matchLabels": {"app": "a"}}, "jwtRules": [good, bad, {"jwks": 7}]})).expect("what there is");
        let none = KeySource::Inline(Arc::new(Keys::none()));
        let rules = read.rules.iter().map(|rule| (&*rule.issuer, rule.keys == none)).collect::<Vec<_>>();
        assert_eq!(rules, [("https://a.example", false), ("https://b.example", true), ("", true)]);
        assert!(read.selector.is_some());
        assert_eq!(read.rules[1].locations, [Location::Header(HeaderName::from_static("x-jwt"), "".into())]);
        let mut written = read.rules[1].changed_headers().map(HeaderName::as_str).collect::<Vec<_>>();
        written.sort_unstable();
        assert_eq!(written, ["x-jwt", "x-payload", "x-user"]);
        let mapping = rejected(&json!({"jwtRules": {"issuer": "https://b.example"}})).expect("what there is");
        assert_eq!(mapping.rules.len(), 1);
        for unknown in [json!({"selecter": {}, "jwtRules": [bad]}), json!({"selector": 7, "jwtRules": [bad]})] {
            assert!(rejected(&unknown).is_none(), "{unknown}");
        }
    }

    #[test]
    fn what_cannot_be_honoured_names_its_field() {
        let with = |extra: Value| {
            let mut rule = json!({"issuer": "https://a.example", "jwksUri": "https://a.example/keys"});
            rule.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
            json!({"jwtRules": [rule]})
        };
        for (spec, field) in [
            (json!({"jwtRules": [{"audiences": ["a"]}]}), "jwtRules[0].issuer"),
            (json!({"jwtRules": [{"issuer": "plain"}]}), "or set jwks or jwksUri"),
            (with(json!({"jwks": "{}"})), "cannot both be set"),
            (with(json!({"jwksUri": "ftp://x/"})), "jwksUri"),
            (with(json!({"audiences": ["a", ""]})), "audiences[1]"),
            (with(json!({"fromHeaders": [{"name": "a b"}]})), "fromHeaders[0].name"),
            (with(json!({"fromCookies": [""]})), "fromCookies[0]"),
            (with(json!({"timeout": "0s"})), "timeout"),
            (with(json!({"outputClaimToHeaders": [{"header": "x", "claim": "a"}, {"header": "X", "claim": "b"}]})), "given twice"),
            (json!({"jwtRules": [{"issuer": "i", "jwks": "{\"keys\":[]}"}]}), "no RSA"),
        ] {
            let error = read(&spec).expect_err("refused");
            assert!(error.contains(field), "{error}");
        }
    }
}
