//! Gateway API's `HTTPRoute` and `GRPCRoute` with Services as parents (mesh routing), and `ReferenceGrant`.

mod document;
mod parents;

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
pub(super) use document::Spec;
use document::{
    CorsDocument, Filter, GrpcMethod, Match, Method, MirrorDocument, Modifier, Pair, PathModifier, RedirectDocument, Reference, Retry,
    RewriteDocument, RuleDocument, Typed,
};
use http::StatusCode;
pub use parents::Parent;
pub(super) use parents::are_elsewhere;
use parents::is_service;
use serde::Deserialize;
use serde_json::Value;

use super::{
    envelope::FieldError,
    fields::{self, Time, header_name, header_text, header_value, port},
};
use crate::route::{
    matching::{HeaderMatch, HttpMatch, Matched, PathMatch, Pattern, QueryMatch, TextMatch},
    retry::{BASE_BACKOFF, RetryOn, RetryPolicy, default_policy},
    rule::{
        Action, Cors, Destination, DirectResponse, Fault, HeaderChanges, HeaderOperations, HeaderText, Mirror, PathRewrite, Redirect,
        RedirectPort, Rewrite, Rule, Share, Weighted,
    },
};

type Result<T> = std::result::Result<T, FieldError>;

/// A route of the mesh: rules of one match each, in the order written.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GatewayRoute {
    /// Services it is for. Gateways among its parents are not this node's business.
    pub parents: Vec<Parent>,
    pub rules: Vec<Rule>,
}

impl GatewayRoute {
    /// What stands in for one that cannot be read: rules that can be, and for what others match, where that can be read, an error, as Gateway API
    /// asks for of filters that are not known: none may be passed over.
    pub(super) fn as_far_as_it_can_be_read(spec: &Value, grpc: bool) -> Option<Self> {
        let rules = spec.get("rules")?.as_array()?;
        let mut all = Self { parents: Vec::new(), rules: Vec::new() };
        let read = |field: &str, value: &Value| {
            let one = Value::Object([(field.to_owned(), Value::Array(vec![value.clone()]))].into_iter().collect());
            Self::read(serde_json::from_value(one).ok()?, grpc).ok()
        };
        let refused = |rule: &Value| {
            let matches = match rule.get("matches") {
                None | Some(Value::Null) => vec![serde_json::json!({})],
                Some(matches) => matches.as_array().into_iter().flatten().map(|m| serde_json::json!({"matches": [m]})).collect(),
            };
            let rules = matches.iter().filter_map(|of_match| read("rules", of_match)).flat_map(|one| one.rules);
            let answer = || Action::Respond(DirectResponse { status: StatusCode::INTERNAL_SERVER_ERROR, body: Bytes::new() });
            rules.map(|rule| Rule { action: answer(), ..rule }).collect::<Vec<_>>()
        };
        for parent in spec.get("parentRefs")?.as_array()? {
            all.parents.extend(read("parentRefs", parent).into_iter().flat_map(|one| one.parents));
        }
        for (i, rule) in rules.iter().enumerate() {
            let of_rule = read("rules", rule).map_or_else(|| refused(rule), |whole| whole.rules);
            all.rules.extend(of_rule.into_iter().map(|rule| Rule { number: i, ..rule }));
        }
        Some(all)
    }

    pub(super) fn read(spec: Spec, grpc: bool) -> Result<Self> {
        // Host names say nothing about a Service parent, and default gateways are none.
        let Spec { parent_refs, hostnames: _, use_default_gateways: _, rules } = spec;
        let parents = parents::read(&parent_refs)?;
        let mut flat = Vec::new();
        for (i, document) in rules.unwrap_or_else(|| vec![RuleDocument::default()]).iter().enumerate() {
            let at = format!("spec.rules[{i}]");
            let common = rule(document, &at)?;
            let matches = document.matches.iter().enumerate().map(|(j, m)| {
                let at = format!("{at}.matches[{j}]");
                if grpc { grpc_match(m, &at) } else { http_match(m, &at) }
            });
            let mut matches = matches.collect::<Result<Vec<_>>>()?;
            if matches.is_empty() {
                // Whatever names a method goes before what is for all of them.
                let path = (!grpc).then(|| PathMatch::Segments("/".into()));
                matches.push(HttpMatch { path, ..HttpMatch::default() });
            }
            flat.extend(matches.into_iter().map(|m| Rule { matches: vec![m], number: i, ..common.clone() }));
        }
        Ok(Self { parents, rules: flat })
    }
}

/// How specific a match is: the more specific goes first. Gateway API's order of precedence.
pub fn precedence(matched: &HttpMatch) -> (u8, usize, bool, usize, usize) {
    let (kind, length) = match &matched.path {
        Some(PathMatch::Exact { path, .. }) => (3, path.len()),
        Some(PathMatch::Segments(path) | PathMatch::Prefix { path, .. }) => (2, path.trim_end_matches('/').len()),
        // As Istio orders them.
        Some(PathMatch::Regex(pattern)) => (1, pattern.text().len()),
        None => (0, 0),
    };
    (kind, length, matched.method.is_some(), matched.headers.len(), matched.query.len())
}

fn destination(reference: &Reference, at: &str) -> Result<Destination> {
    let host = match &reference.namespace {
        Some(namespace) => crate::id::ObjectName::new(namespace, &reference.name).fqdn(),
        None => reference.name.clone(),
    };
    let number = reference.port.map(|p| port(p, &format!("{at}.port"))).transpose()?;
    Ok(Destination { host: host.into(), subset: "".into(), port: number, refused: !is_service(reference, Some("Service")) })
}

/// Of the Gateway API's `HTTPMethod`.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

fn http_match(document: &Match, at: &str) -> Result<HttpMatch> {
    let path = document.path.as_ref().map(|p| {
        let value = p.value.as_deref().unwrap_or("/");
        if p.r#type.as_deref() != Some("RegularExpression") && (!value.starts_with('/') || value.contains("//")) {
            let problem = format!("{value:?} is no path a request may have: it begins with one slash, and has no two in a row");
            return Err(FieldError::new(format!("{at}.path.value"), problem));
        }
        match p.r#type.as_deref().unwrap_or("PathPrefix") {
            "Exact" => Ok(PathMatch::Exact { path: value.into(), ignore_case: false }),
            "PathPrefix" => Ok(PathMatch::Segments(value.into())),
            "RegularExpression" => pattern(value, &format!("{at}.path.value")).map(PathMatch::Regex),
            other => Err(unknown_type(other, &format!("{at}.path.type"), "Exact, PathPrefix, RegularExpression")),
        }
    });
    let path = path.transpose()?.unwrap_or_else(|| PathMatch::Segments("/".into()));
    let method = match &document.method {
        None => None,
        Some(Method::Name(name)) if !METHODS.contains(&name.as_str()) => {
            return Err(FieldError::new(format!("{at}.method"), format!("{name:?} is none of {}", METHODS.join(", "))));
        }
        Some(Method::Name(name)) => Some(TextMatch::Exact(name.as_str().into())),
        Some(Method::Grpc(_)) => return Err(FieldError::new(format!("{at}.method"), "is the name of an HTTP method, such as GET")),
    };
    let mut query: Vec<QueryMatch> = Vec::new();
    for (i, parameter) in document.query_params.iter().enumerate() {
        let value = text(parameter, &format!("{at}.queryParams[{i}]"))?;
        // Of several for one name only the first counts.
        if !query.iter().any(|q| *q.name == *parameter.name) {
            query.push(QueryMatch { name: parameter.name.as_str().into(), value });
        }
    }
    Ok(HttpMatch { path: Some(path), method, headers: headers(&document.headers, at)?, query, ..HttpMatch::default() })
}

fn grpc_match(document: &Match, at: &str) -> Result<HttpMatch> {
    let path = match &document.method {
        None => None,
        Some(Method::Name(_)) => return Err(FieldError::new(format!("{at}.method"), "needs service or method")),
        Some(Method::Grpc(method)) => Some(grpc_path(method, &format!("{at}.method"))?),
    };
    if document.path.is_some() || !document.query_params.is_empty() {
        return Err(FieldError::new(at, "a GRPCRoute matches method and headers only"));
    }
    Ok(HttpMatch { path, headers: headers(&document.headers, at)?, ..HttpMatch::default() })
}

fn grpc_path(document: &GrpcMethod, at: &str) -> Result<PathMatch> {
    let exact = match document.r#type.as_deref() {
        None | Some("Exact") => true,
        Some("RegularExpression") => false,
        Some(other) => return Err(unknown_type(other, &format!("{at}.type"), "Exact, RegularExpression")),
    };
    Ok(match (exact, document.service.as_deref(), document.method.as_deref()) {
        (true, Some(service), Some(method)) => PathMatch::Exact { path: format!("/{service}/{method}").into(), ignore_case: false },
        (true, Some(service), None) => PathMatch::Segments(format!("/{service}").into()),
        (true, None, Some(method)) => PathMatch::Regex(pattern(&format!("/[^/]+/{}", regex::escape(method)), at)?),
        (false, service, method) if service.is_some() || method.is_some() => {
            PathMatch::Regex(pattern(&format!("/(?:{})/(?:{})", service.unwrap_or("[^/]+"), method.unwrap_or("[^/]+")), at)?)
        }
        _ => return Err(FieldError::new(at, "needs service or method")),
    })
}

fn headers(all: &[Typed], at: &str) -> Result<Vec<HeaderMatch>> {
    let mut found: BTreeMap<String, HeaderMatch> = BTreeMap::new();
    for (i, header) in all.iter().enumerate() {
        let at = format!("{at}.headers[{i}]");
        let of = Matched::named(header_name(&header.name, &format!("{at}.name"))?);
        let value = text(header, &at)?;
        // Of several for one name only the first counts.
        found.entry(of.to_string()).or_insert(HeaderMatch { of, value, inverted: false });
    }
    Ok(found.into_values().collect())
}

fn text(document: &Typed, at: &str) -> Result<TextMatch> {
    let value = document.value.as_deref().unwrap_or_default();
    match document.r#type.as_deref() {
        None | Some("Exact") => Ok(TextMatch::Exact(value.into())),
        Some("RegularExpression") => pattern(value, &format!("{at}.value")).map(TextMatch::Regex),
        Some(other) => Err(unknown_type(other, &format!("{at}.type"), "Exact, RegularExpression")),
    }
}

fn pattern(text: &str, at: &str) -> Result<Pattern> {
    Pattern::parse(text).map_err(|e| FieldError::new(at, format!("{text:?}: {e}")))
}

fn unknown_type(given: &str, at: &str, known: &str) -> FieldError {
    FieldError::new(at, format!("{given:?} is not one of {known}"))
}

fn rule(document: &RuleDocument, at: &str) -> Result<Rule> {
    let filters = filters(&document.filters, &format!("{at}.filters"))?;
    let backends = document.backend_refs.iter().enumerate().map(|(i, r)| {
        let at = format!("{at}.backendRefs[{i}]");
        let filters = self::filters(&r.filters, &format!("{at}.filters"))?;
        if filters.redirect.is_some() || filters.rewrite.is_some() || !filters.mirrors.is_empty() || filters.cors.is_some() {
            return Err(FieldError::new(format!("{at}.filters"), "only header modifiers are supported on a backend"));
        }
        let (weight, destination, alone) = (r.weight.unwrap_or(1), destination(r, &at)?, document.backend_refs.len() == 1);
        let authority = filters.headers.authority.clone();
        Ok(Weighted { weight, destination, headers: filters.headers, alone, authority })
    });
    let backends = backends.collect::<Result<Vec<_>>>()?;
    let action = match filters.redirect {
        Some(_) if !backends.is_empty() => return Err(FieldError::new(at, "has backendRefs and a RequestRedirect; keep one")),
        Some(redirect) => Action::Redirect(redirect),
        None => Action::Forward(backends),
    };
    let timeouts = document.timeouts.as_ref();
    let nonzero = |t: Option<Time>| t.map(|t| t.0).filter(|t| !t.is_zero());
    let per_try = nonzero(timeouts.and_then(|t| t.backend_request));
    let whole = nonzero(timeouts.and_then(|t| t.request));
    if whole.zip(per_try).is_some_and(|(whole, per_try)| per_try > whole) {
        return Err(FieldError::new(format!("{at}.timeouts.backendRequest"), "is longer than request, which is for all attempts together"));
    }
    Ok(Rule {
        name: document.name.as_deref().unwrap_or_default().into(),
        number: 0,
        matches: Vec::new(),
        action,
        headers: filters.headers,
        rewrite: filters.rewrite,
        timeout: whole,
        retries: retries(document.retry.as_ref(), per_try, &format!("{at}.retry"))?,
        fault: Fault::default(),
        mirrors: filters.mirrors,
        cors: filters.cors,
        missing_status: StatusCode::INTERNAL_SERVER_ERROR,
    })
}

fn retries(retry: Option<&Retry>, per_try: Option<std::time::Duration>, at: &str) -> Result<Option<RetryPolicy>> {
    let Some(retry) = retry else { return Ok(per_try.map(|t| RetryPolicy { per_try_timeout: Some(t), ..default_policy() })) };
    if let Some(i) = retry.codes.iter().position(|c| !(400..600).contains(c)) {
        return Err(FieldError::new(format!("{at}.codes[{i}]"), "is not an error status; use 400 to 599"));
    }
    let connection = default_policy().on.or(RetryOn::RESET);
    Ok(Some(RetryPolicy {
        attempts: retry.attempts.unwrap_or(2),
        on: connection,
        codes: retry.codes.iter().copied().collect(),
        per_try_timeout: per_try,
        base_backoff: retry.backoff.map_or(BASE_BACKOFF, |t| t.0),
        ..default_policy()
    }))
}

#[derive(Default)]
struct Filters {
    headers: HeaderOperations,
    redirect: Option<Redirect>,
    rewrite: Option<Rewrite>,
    mirrors: Vec<Mirror>,
    cors: Option<Cors>,
}

fn filters(all: &[Filter], at: &str) -> Result<Filters> {
    let mut filters = Filters::default();
    for (i, filter) in all.iter().enumerate() {
        let at = format!("{at}[{i}]");
        let missing = |field: &str| FieldError::new(format!("{at}.{field}"), "is missing; the filter's type asks for it");
        if filter.r#type != "RequestMirror" && all[..i].iter().any(|before| before.r#type == filter.r#type) {
            return Err(FieldError::new(
                &at,
                format!("is the second {} of these filters; one is allowed, put both into it", filter.r#type),
            ));
        }
        match filter.r#type.as_str() {
            "RequestHeaderModifier" => {
                let document = filter.request_header_modifier.as_ref().ok_or_else(|| missing("requestHeaderModifier"))?;
                let (changes, authority) = modifier(document, &format!("{at}.requestHeaderModifier"))?;
                filters.headers.request = changes;
                filters.headers.authority = authority;
            }
            "ResponseHeaderModifier" => {
                let document = filter.response_header_modifier.as_ref().ok_or_else(|| missing("responseHeaderModifier"))?;
                filters.headers.response = modifier(document, &format!("{at}.responseHeaderModifier"))?.0;
            }
            "RequestRedirect" => {
                let document = filter.request_redirect.as_ref().ok_or_else(|| missing("requestRedirect"))?;
                filters.redirect = Some(redirect(document, &format!("{at}.requestRedirect"))?);
            }
            "URLRewrite" => {
                let document = filter.url_rewrite.as_ref().ok_or_else(|| missing("urlRewrite"))?;
                filters.rewrite = Some(rewrite(document, &format!("{at}.urlRewrite"))?);
            }
            "RequestMirror" => {
                let document = filter.request_mirror.as_ref().ok_or_else(|| missing("requestMirror"))?;
                filters.mirrors.push(mirror(document, &format!("{at}.requestMirror"))?);
            }
            "CORS" => {
                let document = filter.cors.as_ref().ok_or_else(|| missing("cors"))?;
                filters.cors = Some(cors(document, &format!("{at}.cors"))?);
            }
            "ExtensionRef" if filter.extension_ref.is_some() => {
                return Err(FieldError::new(at, "extensions are not supported by mesh-node; remove the filter"));
            }
            other => {
                let known = "RequestHeaderModifier, ResponseHeaderModifier, RequestRedirect, URLRewrite, RequestMirror, CORS";
                return Err(unknown_type(other, &format!("{at}.type"), known));
            }
        }
    }
    Ok(filters)
}

fn modifier(document: &Modifier, at: &str) -> Result<(HeaderChanges, Option<http::HeaderValue>)> {
    let mut authority = None;
    let mut pairs = |all: &[Pair], field: &str| {
        let mut out = Vec::new();
        for (i, pair) in all.iter().enumerate() {
            let at = format!("{at}.{field}[{i}]");
            let value = format!("{at}.value");
            if pair.name.eq_ignore_ascii_case("host") {
                authority.get_or_insert(fields::authority(&pair.value, &value)?);
                continue;
            }
            let name = header_name(&pair.name, &format!("{at}.name"))?;
            if fields::is_hop_by_hop(name.as_str()) {
                continue;
            }
            // Gateway API's values are what they say; Istio's are Envoy's, where they can be.
            let text = match header_text(&pair.value, &value) {
                Err(_) if pair.value.contains('%') => Some(HeaderText::Plain(header_value(&pair.value, &value)?)),
                text => text?,
            };
            // Of several for one name only the first counts.
            if !out.iter().any(|(n, _)| *n == name) {
                out.extend(text.map(|text| (name, text)));
            }
        }
        Ok::<_, FieldError>(out)
    };
    let (set, add) = (pairs(&document.set, "set")?, pairs(&document.add, "add")?);
    let remove = document.remove.iter().enumerate().filter(|(_, name)| !fields::is_hop_by_hop(name));
    let remove = remove.map(|(i, name)| header_name(name, &format!("{at}.remove[{i}]")));
    Ok((HeaderChanges { set, add, remove: remove.collect::<Result<_>>()? }, authority))
}

fn path(document: &PathModifier, at: &str) -> Result<PathRewrite> {
    match (document.r#type.as_str(), &document.replace_full_path, &document.replace_prefix_match) {
        ("ReplaceFullPath", Some(path), None) => Ok(PathRewrite::Full(path.as_str().into())),
        // Segments are replaced: what follows begins with a slash of its own.
        ("ReplacePrefixMatch", None, Some(prefix)) => Ok(PathRewrite::Matched(prefix.trim_end_matches('/').into())),
        _ => {
            Err(FieldError::new(at, "needs a type of ReplaceFullPath with replaceFullPath, or ReplacePrefixMatch with replacePrefixMatch"))
        }
    }
}

fn redirect(document: &RedirectDocument, at: &str) -> Result<Redirect> {
    let status = document.status_code.unwrap_or(302);
    let status = StatusCode::from_u16(status).ok().filter(|s| [301, 302, 303, 307, 308].contains(&s.as_u16()));
    let status = status.ok_or_else(|| FieldError::new(format!("{at}.statusCode"), "is not one of 301, 302, 303, 307, 308"))?;
    let redirect_port = match (document.port, &document.scheme) {
        (Some(number), _) => RedirectPort::Port(port(number, &format!("{at}.port"))?),
        (None, Some(_)) => RedirectPort::FromScheme,
        (None, None) => RedirectPort::FromRequest,
    };
    Ok(Redirect {
        scheme: document.scheme.as_deref().map(Arc::from),
        authority: document.hostname.as_deref().map(Arc::from),
        port: redirect_port,
        path: document.path.as_ref().map(|p| path(p, &format!("{at}.path"))).transpose()?,
        status,
    })
}

fn rewrite(document: &RewriteDocument, at: &str) -> Result<Rewrite> {
    Ok(Rewrite {
        path: document.path.as_ref().map(|p| path(p, &format!("{at}.path"))).transpose()?,
        authority: document.hostname.as_deref().map(|h| fields::authority(h, &format!("{at}.hostname"))).transpose()?,
    })
}

fn mirror(document: &MirrorDocument, at: &str) -> Result<Mirror> {
    let share = match (document.percent, document.fraction) {
        (Some(_), Some(_)) => return Err(FieldError::new(at, "has percent and fraction; keep one")),
        (Some(percent), None) => Share::percent(f64::from(percent)),
        (None, Some(f)) => Share::fraction(f.numerator, f.denominator.unwrap_or(100)),
        (None, None) => Some(Share::ALL),
    };
    let share = share.ok_or_else(|| FieldError::new(at, "the share is more than the whole"))?;
    Ok(Mirror { destination: destination(&document.backend_ref, &format!("{at}.backendRef"))?, share })
}

fn cors(document: &CorsDocument, at: &str) -> Result<Cors> {
    let origin = |text: &String| match text.as_str() {
        "*" => Ok(TextMatch::Present),
        wild if wild.contains('*') => {
            // Of an origin nothing else is between slashes than its host and port.
            let expression = regex::escape(wild).replace("\\*", "[^/]*");
            pattern(&expression, &format!("{at}.allowOrigins")).map(TextMatch::Regex)
        }
        exact => Ok(TextMatch::Exact(exact.into())),
    };
    let list = |all: &[String], field: &str| (!all.is_empty()).then(|| header_value(&all.join(","), &format!("{at}.{field}"))).transpose();
    Ok(Cors {
        origins: document.allow_origins.iter().map(origin).collect::<Result<_>>()?,
        methods: list(&document.allow_methods, "allowMethods")?,
        headers: list(&document.allow_headers, "allowHeaders")?,
        expose: list(&document.expose_headers, "exposeHeaders")?,
        max_age: Some(header_value(&document.max_age.unwrap_or(5).to_string(), at)?),
        credentials: document.allow_credentials.unwrap_or(false),
        forward_unmatched: false,
    })
}

/// Who may refer to Services of the grant's namespace, from routes of Gateways: routes of the mesh need none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceGrant {
    /// Kind (`HTTPRoute`, `GRPCRoute`) and namespace of those that may.
    pub from: Vec<(String, String)>,
    /// Names of Services; `None` for all of them.
    pub to: Vec<Option<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct GrantSpec {
    from: Vec<GrantReference>,
    to: Vec<GrantReference>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct GrantReference {
    group: String,
    kind: String,
    namespace: Option<String>,
    name: Option<String>,
}

impl ReferenceGrant {
    pub(super) fn read(spec: GrantSpec) -> Self {
        let from = spec.from.into_iter().filter(|f| f.group == "gateway.networking.k8s.io");
        let to = spec.to.into_iter().filter(|t| t.group.is_empty() && t.kind == "Service");
        Self { from: from.filter_map(|f| Some((f.kind, f.namespace?))).collect(), to: to.map(|t| t.name).collect() }
    }
}

#[cfg(test)]
mod tests;
