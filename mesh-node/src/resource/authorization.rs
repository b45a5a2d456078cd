//! `AuthorizationPolicy` as written, checked field by field. What it means for a workload is compiled in `policy`.

use ipnet::IpNet;
use serde::Deserialize;

use super::{envelope::FieldError, selector::WorkloadSelector, strings::StringMatch};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
    /// Evaluated and logged, never enforced.
    Audit,
}

#[derive(Debug, Clone, PartialEq)]
pub struct AuthorizationPolicy {
    pub selector: Option<WorkloadSelector>,
    pub action: Action,
    pub rules: Vec<Rule>,
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

#[derive(Debug, Clone, PartialEq)]
pub struct SourceMatch {
    pub principals: Values<StringMatch>,
    pub namespaces: Values<StringMatch>,
    pub service_accounts: Values<ServiceAccount>,
    pub ip_blocks: Values<IpNet>,
    pub remote_ip_blocks: Values<IpNet>,
    /// Names of the fields present that only an HTTP request has.
    pub http_only: Vec<&'static str>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct OperationMatch {
    pub ports: Values<u16>,
    pub http_only: Vec<&'static str>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Condition {
    SourceIp(Values<IpNet>),
    RemoteIp(Values<IpNet>),
    SourceNamespace(Values<StringMatch>),
    SourcePrincipal(Values<StringMatch>),
    SourceServiceAccount(Values<ServiceAccount>),
    DestinationIp(Values<IpNet>),
    DestinationPort(Values<u16>),
    /// A key only an HTTP request has.
    HttpOnly(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Spec {
    selector: Option<WorkloadSelector>,
    #[serde(default)]
    target_refs: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    target_ref: Option<serde_json::Value>,
    #[serde(default)]
    action: Option<String>,
    #[serde(default)]
    provider: Option<serde_json::Value>,
    #[serde(default)]
    rules: Option<Vec<RuleSpec>>,
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
    pub(super) fn read(spec: Spec, dry_run: bool) -> Result<Self, FieldError> {
        if spec.target_refs.is_some_and(|t| !t.is_empty()) || spec.target_ref.is_some() {
            return Err(FieldError::new(
                "spec.targetRefs",
                "is not honoured by this version of mesh-node; select workloads with spec.selector",
            ));
        }
        let action = match spec.action.as_deref() {
            None | Some("ALLOW") => Action::Allow,
            Some("DENY") => Action::Deny,
            Some("AUDIT") => Action::Audit,
            Some("CUSTOM") => {
                return Err(FieldError::new("spec.action", "CUSTOM is not honoured by this version of mesh-node; use ALLOW or DENY"));
            }
            Some(other) => return Err(FieldError::new("spec.action", format!("{other:?} is none of ALLOW, DENY, AUDIT"))),
        };
        if spec.provider.is_some() {
            return Err(FieldError::new("spec.provider", "goes with action CUSTOM only; remove it"));
        }
        let rules = spec.rules.unwrap_or_default();
        if rules.is_empty() && action == Action::Deny {
            // Istio's validation: a DENY without rules would never match and is a mistake.
            return Err(FieldError::new("spec.rules", "a DENY policy without rules matches nothing; use rules: [{}] to deny everything"));
        }
        let rules = rules.into_iter().enumerate().map(|(i, r)| rule(r, &format!("spec.rules[{i}]"))).collect::<Result<_, _>>()?;
        Ok(Self { selector: spec.selector.filter(|s| !s.match_labels.is_empty()), action, rules, dry_run })
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
        namespaces: values(spec.namespaces, spec.not_namespaces, &field("namespaces"), pattern)?,
        service_accounts: values(spec.service_accounts, spec.not_service_accounts, &field("serviceAccounts"), service_account)?,
        ip_blocks: values(spec.ip_blocks, spec.not_ip_blocks, &field("ipBlocks"), ip_block)?,
        remote_ip_blocks: values(spec.remote_ip_blocks, spec.not_remote_ip_blocks, &field("remoteIpBlocks"), ip_block)?,
        http_only: present(&[("requestPrincipals", &spec.request_principals), ("notRequestPrincipals", &spec.not_request_principals)]),
    };
    let empty = found.principals.is_empty()
        && found.namespaces.is_empty()
        && found.service_accounts.is_empty()
        && found.ip_blocks.is_empty()
        && found.remote_ip_blocks.is_empty()
        && found.http_only.is_empty();
    if empty {
        // Istio's validation refuses it: it reads like "nobody" and would mean "everybody".
        return Err(FieldError::new(at, "is empty; name at least one source, or leave out from"));
    }
    Ok(found)
}

fn operation(spec: OperationSpec, at: &str) -> Result<OperationMatch, FieldError> {
    let http_only = present(&[
        ("hosts", &spec.hosts),
        ("notHosts", &spec.not_hosts),
        ("methods", &spec.methods),
        ("notMethods", &spec.not_methods),
        ("paths", &spec.paths),
        ("notPaths", &spec.not_paths),
    ]);
    let found = OperationMatch { ports: values(spec.ports, spec.not_ports, &format!("{at}.ports"), port)?, http_only };
    if found.ports.is_empty() && found.http_only.is_empty() {
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
        "source.namespace" => Condition::SourceNamespace(values(yes, no, &field, pattern)?),
        "source.principal" => Condition::SourcePrincipal(values(yes, no, &field, pattern)?),
        "source.serviceAccount" => Condition::SourceServiceAccount(values(yes, no, &field, service_account)?),
        "destination.ip" => Condition::DestinationIp(values(yes, no, &field, ip_block)?),
        "destination.port" => Condition::DestinationPort(values(yes, no, &field, port)?),
        key if is_http_key(key) => Condition::HttpOnly(key.to_owned()),
        key => {
            let problem =
                format!("{key:?} is not a condition this version knows; see AuthorizationPolicy conditions in Istio's documentation");
            return Err(FieldError::new(format!("{at}.key"), problem));
        }
    })
}

fn is_http_key(key: &str) -> bool {
    key.starts_with("request.headers[")
        || key.starts_with("request.auth.claims[")
        || matches!(key, "request.auth.principal" | "request.auth.audiences" | "request.auth.presenter" | "connection.sni")
}

fn present(fields: &[(&'static str, &Texts)]) -> Vec<&'static str> {
    fields.iter().filter(|(_, v)| v.as_ref().is_some_and(|v| !v.is_empty())).map(|(n, _)| *n).collect()
}

/// An empty pattern would match whoever has no identity; Istio's validation refuses it.
fn pattern(text: &str) -> Result<StringMatch, String> {
    if text.is_empty() { Err("is empty; name a value, or remove it".to_owned()) } else { Ok(StringMatch::parse(text)) }
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
