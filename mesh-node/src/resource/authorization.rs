//! `AuthorizationPolicy` as written, checked field by field. What it means for a workload is compiled in `policy`.

use std::sync::Arc;

use http::HeaderName;
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::{
    envelope::FieldError,
    fields::end_to_end_header,
    paths::PathPattern,
    selector::WorkloadSelector,
    strings::StringMatch,
    target::{TargetRef, TargetSpec, targets},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
    /// Evaluated and logged, never enforced.
    Audit,
    /// Asks an external authorizer.
    Custom,
}

impl Action {
    pub fn name(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
            Self::Custom => "CUSTOM",
        }
    }

    /// As ztunnel writes it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Allow => "Allow",
            Self::Deny => "Deny",
            Self::Audit => "Audit",
            Self::Custom => "Custom",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct AuthorizationPolicy {
    pub selector: Option<WorkloadSelector>,
    pub targets: Vec<TargetRef>,
    pub action: Action,
    /// The name of the external authorizer among the mesh's extension providers, when the action is CUSTOM.
    pub provider: Option<Arc<str>>,
    pub rules: Arc<[Rule]>,
    /// Annotated `istio.io/dry-run: "true"`.
    pub dry_run: bool,
}

/// One `from` AND one `to` AND every `when` must match. Empty lists match everything.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rule {
    pub from: Vec<SourceMatch>,
    pub to: Vec<OperationMatch>,
    pub when: Vec<Condition>,
}

/// A list of accepted and a list of refused values; both empty: anything goes.
#[derive(Debug, Clone, PartialEq)]
pub struct Values<T> {
    pub any_of: Vec<T>,
    pub none_of: Vec<T>,
}

impl<T> Values<T> {
    pub fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }
}

/// `[namespace/]name` of a service account; without a namespace, the policy's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    pub namespace: Option<String>,
    pub name: String,
}

/// `issuer/subject` of a token, split at the last `/`; each side is a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestPrincipal {
    /// `*`: whoever has one.
    Any,
    Pair(StringMatch, StringMatch),
    /// Without a slash: matched against the whole.
    Whole(StringMatch),
}

#[derive(Debug, Clone, PartialEq)]
pub struct SourceMatch {
    pub principals: Values<StringMatch>,
    pub request_principals: Values<RequestPrincipal>,
    pub namespaces: Values<StringMatch>,
    pub service_accounts: Values<ServiceAccount>,
    pub trust_domains: Values<StringMatch>,
    pub ip_blocks: Values<IpNet>,
    pub remote_ip_blocks: Values<IpNet>,
}

impl SourceMatch {
    fn is_empty(&self) -> bool {
        self.principals.is_empty()
            && self.request_principals.is_empty()
            && self.namespaces.is_empty()
            && self.service_accounts.is_empty()
            && self.trust_domains.is_empty()
            && self.ip_blocks.is_empty()
            && self.remote_ip_blocks.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct OperationMatch {
    /// In lower case.
    pub hosts: Values<StringMatch>,
    pub ports: Values<u16>,
    pub methods: Values<StringMatch>,
    pub paths: Values<PathPattern>,
}

impl OperationMatch {
    fn is_empty(&self) -> bool {
        self.hosts.is_empty() && self.ports.is_empty() && self.methods.is_empty() && self.paths.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Condition {
    SourceIp(Values<IpNet>),
    RemoteIp(Values<IpNet>),
    SourceNamespace(Values<StringMatch>),
    SourcePrincipal(Values<StringMatch>),
    SourceServiceAccount(Values<ServiceAccount>),
    SourceTrustDomain(Values<StringMatch>),
    DestinationIp(Values<IpNet>),
    DestinationPort(Values<u16>),
    /// The server name of the application's own TLS.
    Sni(Values<StringMatch>),
    Header(HeaderName, Values<StringMatch>),
    /// In lower case.
    Host(Values<StringMatch>),
    Method(Values<StringMatch>),
    RequestPrincipal(Values<RequestPrincipal>),
    Audience(Values<StringMatch>),
    /// The token's `azp`.
    Presenter(Values<StringMatch>),
    /// A claim, by its path.
    Claim(Vec<Arc<str>>, Values<StringMatch>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Spec {
    selector: Option<WorkloadSelector>,
    #[serde(default)]
    target_refs: Option<Vec<TargetSpec>>,
    target_ref: Option<TargetSpec>,
    #[serde(default)]
    action: Option<String>,
    provider: Option<ProviderSpec>,
    #[serde(default)]
    rules: Option<Vec<RuleSpec>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProviderSpec {
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RuleSpec {
    from: Option<Vec<FromSpec>>,
    to: Option<Vec<ToSpec>>,
    when: Option<Vec<WhenSpec>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FromSpec {
    source: SourceSpec,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToSpec {
    operation: OperationSpec,
}

type Texts = Option<Vec<String>>;

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct SourceSpec {
    principals: Texts,
    not_principals: Texts,
    request_principals: Texts,
    not_request_principals: Texts,
    namespaces: Texts,
    not_namespaces: Texts,
    service_accounts: Texts,
    not_service_accounts: Texts,
    ip_blocks: Texts,
    not_ip_blocks: Texts,
    remote_ip_blocks: Texts,
    not_remote_ip_blocks: Texts,
    trust_domains: Texts,
    not_trust_domains: Texts,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct OperationSpec {
    hosts: Texts,
    not_hosts: Texts,
    ports: Texts,
    not_ports: Texts,
    methods: Texts,
    not_methods: Texts,
    paths: Texts,
    not_paths: Texts,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WhenSpec {
    key: String,
    #[serde(default)]
    values: Texts,
    #[serde(default)]
    not_values: Texts,
}

impl AuthorizationPolicy {
    /// A policy of which something may be wrong: whole if that is none of its fields, and of one that allows the rules that can be read,
    /// as in Istio. Left out, it would leave open to all what it opens to some. Where there is a field nobody knows, which may have said
    /// anything, it allows nothing. `None` where it cannot be read whom it is for, or it denies.
    pub(super) fn as_far_as_it_can_be_read(spec: &Value) -> Option<Self> {
        let read = |spec: Value| serde_json::from_value::<Spec>(spec).ok().and_then(|spec| Self::read(spec, false).ok());
        if let Some(whole) = read(spec.clone()) {
            return Some(whole);
        }
        if !matches!(spec.get("action"), None | Some(Value::Null)) && spec.get("action")? != "ALLOW" {
            return None;
        }
        let whom = ["selector", "targetRefs", "targetRef"];
        let strange = spec.as_object()?.keys().any(|k| !whom.contains(&k.as_str()) && !matches!(k.as_str(), "action" | "rules"));
        if strange && whom.iter().all(|field| spec.get(field).is_none_or(Value::is_null)) {
            return None;
        }
        let with = |rules: Vec<Value>| {
            let mut one = serde_json::json!({"rules": rules});
            for field in whom {
                if let Some(value) = spec.get(field) {
                    one[field] = value.clone();
                }
            }
            read(one)
        };
        let all = spec.get("rules").and_then(Value::as_array).cloned().unwrap_or_default();
        with(all.into_iter().filter(|rule| !strange && with(vec![rule.clone()]).is_some()).collect())
    }

    pub(super) fn read(spec: Spec, dry_run: bool) -> Result<Self, FieldError> {
        let targets = targets(spec.target_ref, spec.target_refs, spec.selector.is_some())?;
        let action = match spec.action.as_deref() {
            None | Some("ALLOW") => Action::Allow,
            Some("DENY") => Action::Deny,
            Some("AUDIT") => Action::Audit,
            Some("CUSTOM") => Action::Custom,
            Some(other) => return Err(FieldError::new("spec.action", format!("{other:?} is none of ALLOW, DENY, AUDIT, CUSTOM"))),
        };
        let provider = spec.provider.map(|p| p.name).filter(|name| !name.is_empty());
        if action == Action::Custom && provider.is_none() {
            return Err(FieldError::new("spec.provider.name", "is missing; CUSTOM needs one of the mesh's extensionProviders"));
        }
        if action != Action::Custom && provider.is_some() {
            return Err(FieldError::new("spec.provider", "goes with action CUSTOM only; remove it"));
        }
        if action == Action::Custom && dry_run {
            return Err(FieldError::new("metadata.annotations[istio.io/dry-run]", "does not go with action CUSTOM; remove it"));
        }
        let rules = spec.rules.unwrap_or_default();
        if rules.is_empty() && matches!(action, Action::Deny | Action::Custom) {
            // Istio's validation: it would never match and is a mistake.
            let problem = format!("a {} policy without rules matches nothing; use rules: [{{}}] to match everything", action.name());
            return Err(FieldError::new("spec.rules", problem));
        }
        let rules = rules.into_iter().enumerate().map(|(i, r)| rule(r, &format!("spec.rules[{i}]"))).collect::<Result<_, _>>()?;
        let selector = spec.selector.filter(|s| !s.match_labels.is_empty());
        Ok(Self { selector, targets, action, provider: provider.map(Arc::from), rules, dry_run })
    }
}

fn rule(spec: RuleSpec, at: &str) -> Result<Rule, FieldError> {
    let from = spec.from.unwrap_or_default().into_iter().enumerate();
    let to = spec.to.unwrap_or_default().into_iter().enumerate();
    let when = spec.when.unwrap_or_default().into_iter().enumerate();
    Ok(Rule {
        from: from.map(|(i, f)| source(f.source, &format!("{at}.from[{i}].source"))).collect::<Result<_, _>>()?,
        to: to.map(|(i, t)| operation(t.operation, &format!("{at}.to[{i}].operation"))).collect::<Result<_, _>>()?,
        when: when.map(|(i, w)| condition(w, &format!("{at}.when[{i}]"))).collect::<Result<_, _>>()?,
    })
}

fn source(spec: SourceSpec, at: &str) -> Result<SourceMatch, FieldError> {
    let account_listed = spec.service_accounts.is_some() || spec.not_service_accounts.is_some();
    if account_listed
        && (spec.principals.is_some() || spec.not_principals.is_some() || spec.namespaces.is_some() || spec.not_namespaces.is_some())
    {
        let problem = "cannot be combined with principals or namespaces in one source; write two sources";
        return Err(FieldError::new(format!("{at}.serviceAccounts"), problem));
    }
    let field = |name: &str| format!("{at}.{name}");
    let found = SourceMatch {
        principals: values(spec.principals, spec.not_principals, &field("principals"), pattern)?,
        request_principals: values(spec.request_principals, spec.not_request_principals, &field("requestPrincipals"), request_principal)?,
        namespaces: values(spec.namespaces, spec.not_namespaces, &field("namespaces"), namespace)?,
        service_accounts: values(spec.service_accounts, spec.not_service_accounts, &field("serviceAccounts"), service_account)?,
        trust_domains: values(spec.trust_domains, spec.not_trust_domains, &field("trustDomains"), pattern)?,
        ip_blocks: values(spec.ip_blocks, spec.not_ip_blocks, &field("ipBlocks"), ip_block)?,
        remote_ip_blocks: values(spec.remote_ip_blocks, spec.not_remote_ip_blocks, &field("remoteIpBlocks"), ip_block)?,
    };
    if found.is_empty() {
        // Istio's validation refuses it: it reads like "nobody" and would mean "everybody".
        return Err(FieldError::new(at, "is empty; name at least one source, or leave out from"));
    }
    Ok(found)
}

fn operation(spec: OperationSpec, at: &str) -> Result<OperationMatch, FieldError> {
    let host = |text: &str| pattern(&text.to_ascii_lowercase());
    let found = OperationMatch {
        hosts: values(spec.hosts, spec.not_hosts, &format!("{at}.hosts"), host)?,
        ports: values(spec.ports, spec.not_ports, &format!("{at}.ports"), port)?,
        methods: values(spec.methods, spec.not_methods, &format!("{at}.methods"), pattern)?,
        paths: values(spec.paths, spec.not_paths, &format!("{at}.paths"), PathPattern::parse)?,
    };
    if found.is_empty() {
        return Err(FieldError::new(at, "is empty; name at least one operation, or leave out to"));
    }
    Ok(found)
}

fn condition(spec: WhenSpec, at: &str) -> Result<Condition, FieldError> {
    if spec.values.as_ref().is_none_or(Vec::is_empty) && spec.not_values.as_ref().is_none_or(Vec::is_empty) {
        return Err(FieldError::new(at, "has neither values nor notValues; give at least one"));
    }
    let field = format!("{at}.values");
    let (yes, no) = (spec.values, spec.not_values);
    Ok(match spec.key.as_str() {
        "source.ip" => Condition::SourceIp(values(yes, no, &field, ip_block)?),
        "remote.ip" => Condition::RemoteIp(values(yes, no, &field, ip_block)?),
        "source.namespace" => Condition::SourceNamespace(values(yes, no, &field, namespace)?),
        "source.principal" => Condition::SourcePrincipal(values(yes, no, &field, pattern)?),
        "source.serviceAccount" => Condition::SourceServiceAccount(values(yes, no, &field, service_account)?),
        "source.trustDomain" => Condition::SourceTrustDomain(values(yes, no, &field, pattern)?),
        "destination.ip" => Condition::DestinationIp(values(yes, no, &field, ip_block)?),
        "destination.port" => Condition::DestinationPort(values(yes, no, &field, port)?),
        "connection.sni" => Condition::Sni(values(yes, no, &field, pattern)?),
        "request.auth.principal" => Condition::RequestPrincipal(values(yes, no, &field, request_principal)?),
        "request.auth.audiences" => Condition::Audience(values(yes, no, &field, pattern)?),
        "request.auth.presenter" => Condition::Presenter(values(yes, no, &field, pattern)?),
        key => match bracketed(key) {
            // Envoy's names of what HTTP/2 has in its first fields; the host is one of them.
            Some(("request.headers", path)) if (&*path[0] == ":authority" || path[0].eq_ignore_ascii_case("host")) && path.len() == 1 => {
                Condition::Host(values(yes, no, &field, |text| pattern(&text.to_ascii_lowercase()))?)
            }
            Some(("request.headers", path)) if path.len() == 1 && &*path[0] == ":method" => {
                Condition::Method(values(yes, no, &field, pattern)?)
            }
            Some(("request.headers", path)) if path.len() == 1 => {
                Condition::Header(end_to_end_header(&path[0], &format!("{at}.key"))?, values(yes, no, &field, of_header)?)
            }
            Some(("request.auth.claims", path)) => Condition::Claim(path, values(yes, no, &field, pattern)?),
            _ => {
                let problem =
                    format!("{key:?} is not a condition this version knows; see AuthorizationPolicy conditions in Istio's documentation");
                return Err(FieldError::new(format!("{at}.key"), problem));
            }
        },
    })
}

/// `name[a][b]` in its parts.
pub(crate) fn bracketed(text: &str) -> Option<(&str, Vec<Arc<str>>)> {
    let (name, rest) = text.split_once('[')?;
    let inner = rest.strip_suffix(']')?;
    let path = inner.split("][").map(Arc::from).collect::<Vec<Arc<str>>>();
    path.iter().all(|p| !p.is_empty() && !p.contains(['[', ']'])).then_some((name, path))
}

fn request_principal(text: &str) -> Result<RequestPrincipal, String> {
    if text == "*" {
        return Ok(RequestPrincipal::Any);
    }
    match text.rsplit_once('/') {
        // As Istio reads it: a star stands at one end of the whole, and the other side is as it is written.
        Some((issuer, subject)) if text.starts_with('*') => Ok(RequestPrincipal::Pair(pattern(issuer)?, exact(subject)?)),
        Some((issuer, subject)) => Ok(RequestPrincipal::Pair(exact(issuer)?, pattern(subject)?)),
        None => Ok(RequestPrincipal::Whole(pattern(text)?)),
    }
}

fn exact(text: &str) -> Result<StringMatch, String> {
    pattern(text).map(|_| StringMatch::Exact(text.into()))
}

/// An empty pattern would match whoever has no identity; Istio's validation refuses it.
fn pattern(text: &str) -> Result<StringMatch, String> {
    if text.is_empty() { Err("is empty; name a value, or remove it".to_owned()) } else { Ok(StringMatch::parse(text)) }
}

/// Of a header's value: between two stars stands what it has somewhere.
fn of_header(text: &str) -> Result<StringMatch, String> {
    match text.strip_prefix('*').and_then(|rest| rest.strip_suffix('*')) {
        Some(inner) if !inner.is_empty() => Ok(StringMatch::Glob(["".into(), inner.into(), "".into()].into())),
        _ => pattern(text),
    }
}

fn namespace(text: &str) -> Result<StringMatch, String> {
    pattern(text).map(|_| StringMatch::glob(text))
}

fn values<T>(any_of: Texts, none_of: Texts, at: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Values<T>, FieldError> {
    let all = |texts: Texts, at: &str| {
        let texts = texts.unwrap_or_default();
        texts
            .iter()
            .enumerate()
            .map(|(i, t)| read(t).map_err(|p| FieldError::new(format!("{at}[{i}]"), p)))
            .collect::<Result<Vec<T>, FieldError>>()
    };
    let not_at = match at.rsplit_once('.') {
        Some((parent, name)) => format!("{parent}.not{}{}", name[..1].to_uppercase(), &name[1..]),
        None => at.to_owned(),
    };
    Ok(Values { any_of: all(any_of, at)?, none_of: all(none_of, &not_at)? })
}

fn ip_block(text: &str) -> Result<IpNet, String> {
    let single = || text.parse::<std::net::IpAddr>().ok().map(IpNet::from);
    text.parse::<IpNet>().ok().or_else(single).ok_or_else(|| format!("{text:?} is neither an IP address nor a CIDR such as 10.0.0.0/8"))
}

fn port(text: &str) -> Result<u16, String> {
    text.parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(|| format!("{text:?} is not a port from 1 to 65535"))
}

fn service_account(text: &str) -> Result<ServiceAccount, String> {
    let (namespace, name) = match text.split_once('/') {
        Some((ns, name)) => (Some(ns.to_owned()), name),
        None => (None, text),
    };
    let bad = name.is_empty() || name.contains(['/', '*']) || namespace.as_deref().is_some_and(|ns| ns.is_empty() || ns.contains('*'));
    if bad {
        return Err(format!("{text:?} is not [namespace/]name of a service account; wildcards are not allowed"));
    }
    Ok(ServiceAccount { namespace, name: name.to_owned() })
}
