//! The `http` part of a `VirtualService`, checked and turned into routing rules.

use std::{sync::Arc, time::Duration};

use base64::Engine as _;
use http::StatusCode;

use super::document::{self as doc, HttpRoute};
use crate::{
    resource::{
        authorization::bracketed,
        envelope::FieldError,
        fields::{self, Percent, header_name, header_text, header_value, port, positive},
    },
    route::{
        matching::{ClaimMatch, HeaderMatch, HttpMatch, Matched, PathMatch, Pattern, QueryMatch, SourceMatch, TextMatch, compile},
        retry::{BASE_BACKOFF, RetryPolicy, parse_retry_on},
        rule::{
            Abort, Action, Cors, Destination, DirectResponse, Fault, HeaderChanges, HeaderOperations, Mirror, PathRewrite, Redirect,
            RedirectPort, Rewrite, Rule, Share, Weighted,
        },
    },
};

type Result<T> = std::result::Result<T, FieldError>;

/// Largest body of a direct response, bytes; what Istio sets Envoy to.
const DIRECT_BODY: usize = 1024 * 1024;

pub(super) fn rule(route: HttpRoute, at: &str, delegated: bool) -> Result<Rule> {
    let matches = route.r#match.iter().enumerate().map(|(i, m)| http_match(m, &format!("{at}.match[{i}]")));
    let matches = matches.collect::<Result<Vec<_>>>()?;
    let headers = route.headers.as_ref().map(|h| header_operations(h, &format!("{at}.headers"))).transpose()?.unwrap_or_default();
    let rewrite = route.rewrite.as_ref().map(|r| rewrite(r, &format!("{at}.rewrite"))).transpose()?;
    let timeout = route.timeout.map(|t| t.0).filter(|t| !t.is_zero());
    let retries = route.retries.as_ref().map(|r| retries(r, &format!("{at}.retries"))).transpose()?;
    let fault = route.fault.as_ref().map(|f| fault(f, &format!("{at}.fault"))).transpose()?.unwrap_or_default();
    let mirrors = mirrors(&route, at)?;
    let cors = route.cors_policy.as_ref().map(|c| cors(c, &format!("{at}.corsPolicy"))).transpose()?;
    let name = route.name.clone().unwrap_or_default();
    let action = action(route, at, delegated)?;
    Ok(Rule {
        name: name.into(),
        number: 0,
        matches,
        action,
        headers,
        rewrite,
        timeout,
        retries,
        fault,
        mirrors,
        cors,
        missing_status: StatusCode::SERVICE_UNAVAILABLE,
    })
}

fn action(route: HttpRoute, at: &str, delegated: bool) -> Result<Action> {
    let given = [
        (!route.route.is_empty(), "route"),
        (route.redirect.is_some(), "redirect"),
        (route.direct_response.is_some(), "directResponse"),
        (route.delegate.is_some(), "delegate"),
    ];
    let given = given.into_iter().filter_map(|(is, name)| is.then_some(name)).collect::<Vec<_>>();
    if given.len() != 1 {
        let problem = match given.len() {
            0 => "has no action; add one of route, redirect, directResponse or delegate".to_owned(),
            _ => format!("has several actions ({}); keep one", given.join(", ")),
        };
        return Err(FieldError::new(at, problem));
    }
    if let Some(redirect) = route.redirect {
        return redirect_action(&redirect, &format!("{at}.redirect")).map(Action::Redirect);
    }
    if let Some(response) = route.direct_response {
        return direct_response(&response, &format!("{at}.directResponse")).map(Action::Respond);
    }
    if let Some(delegate) = route.delegate {
        if delegated {
            return Err(FieldError::new(format!("{at}.delegate"), "a VirtualService that others delegate to cannot delegate itself"));
        }
        let name = delegate.name.filter(|n| !n.is_empty());
        let name = name.ok_or_else(|| FieldError::new(format!("{at}.delegate.name"), "is missing"))?;
        return Ok(Action::Delegate { namespace: delegate.namespace.unwrap_or_default().into(), name: name.into() });
    }
    let destinations = route.route.iter().enumerate();
    let destinations = destinations.map(|(i, d)| weighted(d, &format!("{at}.route[{i}]"))).collect::<Result<Vec<_>>>()?;
    Ok(Action::Forward(weights(destinations, &format!("{at}.route"))?))
}

/// A single destination takes everything whatever its weight; of several, some must weigh something.
pub(super) fn weights(mut all: Vec<(Option<u32>, Weighted)>, at: &str) -> Result<Vec<Weighted>> {
    if let [(_, only)] = all.as_mut_slice() {
        (only.weight, only.alone) = (1, true);
        return Ok(all.into_iter().map(|(_, d)| d).collect());
    }
    if all.iter().all(|(w, _)| w.unwrap_or(0) == 0) {
        return Err(FieldError::new(at, "several destinations and no weight; give each its share"));
    }
    Ok(all.into_iter().map(|(weight, d)| Weighted { weight: weight.unwrap_or(0), ..d }).filter(|d| d.weight > 0).collect())
}

fn weighted(document: &doc::HttpDestination, at: &str) -> Result<(Option<u32>, Weighted)> {
    let weight = document.weight.map(|w| weight(w, &format!("{at}.weight"))).transpose()?;
    let headers = document.headers.as_ref().map(|h| header_operations(h, &format!("{at}.headers"))).transpose()?.unwrap_or_default();
    let destination = destination(&document.destination, &format!("{at}.destination"))?;
    let authority = headers.authority.clone();
    Ok((weight, Weighted { weight: weight.unwrap_or(0), destination, headers, alone: false, authority }))
}

pub(super) fn weight(weight: i64, at: &str) -> Result<u32> {
    u32::try_from(weight).map_err(|_| FieldError::new(at, format!("{weight} is not a weight; use 0 or more")))
}

pub(super) fn destination(document: &doc::Destination, at: &str) -> Result<Destination> {
    if document.host.is_empty() {
        return Err(FieldError::new(format!("{at}.host"), "is missing; name a service"));
    }
    if document.host.contains('*') {
        return Err(FieldError::new(format!("{at}.host"), "cannot be a wildcard; name one service"));
    }
    let port = document.port.as_ref().map(|p| port(p.number, &format!("{at}.port.number"))).transpose()?;
    let subset = document.subset.clone().unwrap_or_default().into();
    Ok(Destination { host: document.host.as_str().into(), subset, port, refused: false })
}

fn http_match(document: &doc::HttpMatch, at: &str) -> Result<HttpMatch> {
    let text = |m: &Option<doc::StringMatch>, field: &str| m.as_ref().map(|m| text_match(m, &format!("{at}.{field}"))).transpose();
    let path = text(&document.uri, "uri")?.map(|m| path_match(m, document.ignore_uri_case)).and_then(|p| p);
    let (mut headers, mut claims) = (Vec::new(), Vec::new());
    for (inverted, all, field) in [(false, &document.headers, "headers"), (true, &document.without_headers, "withoutHeaders")] {
        for (name, value) in all {
            let at = format!("{at}.{field}.{name}");
            if name.starts_with('@') {
                let path = claim_path(name).ok_or_else(|| {
                    FieldError::new(&at, "is not @request.auth.claims.NAME or @request.auth.claims[NAME]; nested claims have more of them")
                })?;
                let value = value.as_ref().map_or(Ok(TextMatch::Present), |v| text_match(v, &at))?;
                claims.push(ClaimMatch { path, value, inverted });
                continue;
            }
            let value = value.as_ref().map_or(Ok(TextMatch::Present), |v| text_match(v, &at))?;
            let of = Matched::of(name).ok_or_else(|| FieldError::new(&at, format!("{name:?} is not a header name")))?;
            headers.push(HeaderMatch { of, value, inverted });
        }
    }
    let query = document.query_params.iter().map(|(name, value)| {
        let value = value.as_ref().map_or(Ok(TextMatch::Present), |v| text_match(v, &format!("{at}.queryParams.{name}")))?;
        Ok(QueryMatch { name: name.as_str().into(), value })
    });
    Ok(HttpMatch {
        name: document.name.as_deref().unwrap_or_default().into(),
        path,
        scheme: text(&document.scheme, "scheme")?,
        method: text(&document.method, "method")?,
        authority: text(&document.authority, "authority")?,
        headers,
        query: query.collect::<Result<_>>()?,
        port: document.port.map(|p| port(p, &format!("{at}.port"))).transpose()?,
        source: SourceMatch {
            labels: document.source_labels.clone(),
            namespace: document.source_namespace.as_deref().filter(|n| !n.is_empty()).map(Arc::from),
            gateways: document.gateways.iter().map(|g| Arc::from(g.as_str())).collect(),
        },
        claims,
    })
}

/// The claim in a name such as `@request.auth.claims.sub` or `@request.auth.claims[realm][role]`.
fn claim_path(name: &str) -> Option<Vec<Arc<str>>> {
    let rest = name.strip_prefix("@request.auth.claims")?;
    if let Some(dotted) = rest.strip_prefix('.') {
        let path = dotted.split('.').map(Arc::from).collect::<Vec<Arc<str>>>();
        return path.iter().all(|p| !p.is_empty()).then_some(path);
    }
    bracketed(rest).filter(|(before, _)| before.is_empty()).map(|(_, path)| path)
}

fn text_match(document: &doc::StringMatch, at: &str) -> Result<TextMatch> {
    Ok(match (&document.exact, &document.prefix, &document.regex) {
        (Some(text), None, None) => TextMatch::Exact(text.as_str().into()),
        (None, Some(text), None) => TextMatch::Prefix(text.as_str().into()),
        (None, None, Some(text)) if text == "*" => TextMatch::Present,
        (None, None, Some(text)) => {
            TextMatch::Regex(Pattern::parse(text).map_err(|e| FieldError::new(format!("{at}.regex"), format!("{text:?}: {e}")))?)
        }
        (None, None, None) => TextMatch::Present,
        _ => return Err(FieldError::new(at, "has several of exact, prefix and regex; keep one")),
    })
}

fn path_match(text: TextMatch, ignore_case: bool) -> Option<PathMatch> {
    Some(match text {
        TextMatch::Exact(path) => PathMatch::Exact { path, ignore_case },
        TextMatch::Prefix(path) => PathMatch::Prefix { path, ignore_case },
        TextMatch::Regex(pattern) => PathMatch::Regex(pattern),
        TextMatch::Present => return None,
    })
}

fn header_operations(document: &doc::Headers, at: &str) -> Result<HeaderOperations> {
    let (mut request, mut authority) = (HeaderChanges::default(), None);
    if let Some(operations) = &document.request {
        // Host is no header here; setting it wins over adding it.
        for (all, field) in [(&operations.set, "set"), (&operations.add, "add")] {
            let host = all.iter().find(|(name, _)| is_host(name));
            let value = host.map(|(name, v)| fields::authority(v, &format!("{at}.request.{field}.{name}"))).transpose()?;
            authority = authority.or(value);
        }
        request = header_changes(operations, &format!("{at}.request"))?;
    }
    let response = document.response.as_ref().map(|r| header_changes(r, &format!("{at}.response"))).transpose()?.unwrap_or_default();
    Ok(HeaderOperations { request, response, authority })
}

fn is_host(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name == ":authority"
}

/// Whether there is a header of that name to change.
fn is_changed(name: &str) -> bool {
    !name.starts_with(':') && !is_host(name) && !fields::is_hop_by_hop(name)
}

fn header_changes(operations: &doc::HeaderOperations, at: &str) -> Result<HeaderChanges> {
    let pairs = |all: &std::collections::BTreeMap<String, String>, field: &str| {
        let all = all.iter().filter(|(name, _)| is_changed(name));
        let pair = |(name, value): (&String, &String)| {
            let at = format!("{at}.{field}.{name}");
            Ok((header_name(name, &at)?, header_text(value, &at)?))
        };
        let all = all.map(pair).collect::<Result<Vec<_>>>()?;
        Ok(all.into_iter().filter_map(|(name, text)| Some((name, text?))).collect::<Vec<_>>())
    };
    let remove = operations.remove.iter().enumerate().filter(|(_, name)| is_changed(name));
    let remove = remove.map(|(i, name)| header_name(name, &format!("{at}.remove[{i}]"))).collect::<Result<_>>()?;
    Ok(HeaderChanges { set: pairs(&operations.set, "set")?, add: pairs(&operations.add, "add")?, remove })
}

fn rewrite(document: &doc::Rewrite, at: &str) -> Result<Rewrite> {
    let uri = document.uri.as_ref().filter(|uri| !uri.is_empty());
    let path = match (uri, &document.uri_regex_rewrite) {
        (Some(_), Some(_)) => return Err(FieldError::new(at, "has uri and uriRegexRewrite; keep one")),
        (Some(uri), None) => Some(PathRewrite::Matched(uri.as_str().into())),
        (None, Some(regex)) => {
            let pattern = compile(&regex.r#match);
            let pattern =
                pattern.map_err(|e| FieldError::new(format!("{at}.uriRegexRewrite.match"), format!("{:?}: {e}", regex.r#match)))?;
            Some(PathRewrite::Regex { pattern, substitution: regex.rewrite.as_str().into() })
        }
        (None, None) => None,
    };
    let authority = document.authority.as_deref().filter(|a| !a.is_empty());
    let authority = authority.map(|a| fields::authority(a, &format!("{at}.authority"))).transpose()?;
    Ok(Rewrite { path, authority })
}

fn redirect_action(document: &doc::Redirect, at: &str) -> Result<Redirect> {
    let status = document.redirect_code.filter(|c| *c != 0).unwrap_or(301);
    if ![301, 302, 303, 307, 308].contains(&status) {
        return Err(FieldError::new(format!("{at}.redirectCode"), format!("{status} is not one of 301, 302, 303, 307, 308")));
    }
    let redirect_port = match (document.port.filter(|p| *p != 0), document.derive_port.as_deref()) {
        (Some(_), Some(_)) => return Err(FieldError::new(at, "has port and derivePort; keep one")),
        (Some(number), None) => RedirectPort::Port(port(number, &format!("{at}.port"))?),
        (None, Some("FROM_REQUEST_PORT")) => RedirectPort::FromRequest,
        // Which is what Envoy does of its own accord, as Istio sets it up.
        (None, None | Some("FROM_PROTOCOL_DEFAULT")) => RedirectPort::Keep,
        (None, Some(other)) => {
            let problem = format!("{other:?} is not one of FROM_PROTOCOL_DEFAULT, FROM_REQUEST_PORT");
            return Err(FieldError::new(format!("{at}.derivePort"), problem));
        }
    };
    let scheme = document.scheme.as_deref().filter(|s| !s.is_empty());
    if scheme.is_some_and(|s| s != "http" && s != "https") {
        return Err(FieldError::new(format!("{at}.scheme"), "is not one of http, https"));
    }
    let text = |t: &Option<String>| t.as_deref().filter(|t| !t.is_empty()).map(Arc::from);
    let path = match (text(&document.uri), text(&document.prefix_rewrite)) {
        (Some(_), Some(_)) => return Err(FieldError::new(at, "has uri and prefixRewrite; keep one")),
        (uri, prefix) => uri.map(PathRewrite::Full).or(prefix.map(PathRewrite::Matched)),
    };
    Ok(Redirect {
        scheme: scheme.map(Arc::from),
        authority: text(&document.authority),
        port: redirect_port,
        path,
        status: StatusCode::from_u16(status).unwrap_or(StatusCode::MOVED_PERMANENTLY),
    })
}

fn status(code: u16, at: &str) -> Result<StatusCode> {
    let status = StatusCode::from_u16(code).ok().filter(|_| (200..600).contains(&code));
    status.ok_or_else(|| FieldError::new(at, format!("{code} is not an HTTP status of a response; use 200 to 599")))
}

fn direct_response(document: &doc::DirectResponse, at: &str) -> Result<DirectResponse> {
    let body = match document.body.as_ref().map(|b| (&b.string, &b.bytes)) {
        None | Some((None, None)) => Vec::new(),
        Some((Some(text), None)) => text.clone().into_bytes(),
        Some((None, Some(encoded))) => {
            let decoded = base64::engine::general_purpose::STANDARD.decode(encoded);
            decoded.map_err(|e| FieldError::new(format!("{at}.body.bytes"), format!("is not base64: {e}")))?
        }
        Some(_) => return Err(FieldError::new(format!("{at}.body"), "has string and bytes; keep one")),
    };
    if body.len() > DIRECT_BODY {
        return Err(FieldError::new(format!("{at}.body"), format!("has {} bytes; at most {DIRECT_BODY} are allowed", body.len())));
    }
    Ok(DirectResponse { status: status(document.status, &format!("{at}.status"))?, body: body.into() })
}

/// Reads what is said of retries.
pub fn retries(document: &doc::Retries, at: &str) -> Result<RetryPolicy> {
    let attempts = document.attempts.unwrap_or(0);
    let attempts = u32::try_from(attempts).map_err(|_| FieldError::new(format!("{at}.attempts"), "must be 0 or more"))?;
    let (on, codes) = parse_retry_on(document.retry_on.as_deref().unwrap_or_default())
        .map_err(|problem| FieldError::new(format!("{at}.retryOn"), problem))?;
    let per_try = document.per_try_timeout.filter(|t| !t.0.is_zero());
    Ok(RetryPolicy {
        attempts,
        on,
        codes,
        // Without retries none of this means anything.
        per_try_timeout: per_try.map(|t| positive(t, &format!("{at}.perTryTimeout"))).transpose()?.filter(|_| attempts > 0),
        base_backoff: document.backoff.map_or(Ok(BASE_BACKOFF), |t| positive(t, &format!("{at}.backoff")))?,
        ignore_previous_hosts: document.retry_ignore_previous_hosts.unwrap_or(true),
        remote_localities: document.retry_remote_localities.unwrap_or(false),
    })
}

fn share(percentage: Option<Percent>, percent: Option<u32>, missing: Share, at: &str) -> Result<Share> {
    let value = match (percentage, percent) {
        (Some(p), _) => p.value,
        (None, Some(p)) => f64::from(p),
        (None, None) => return Ok(missing),
    };
    Share::percent(value).ok_or_else(|| FieldError::new(format!("{at}.percentage.value"), format!("{value} is not between 0 and 100")))
}

fn fault(document: &doc::Fault, at: &str) -> Result<Fault> {
    if document.delay.is_none() && document.abort.is_none() {
        return Err(FieldError::new(at, "has neither delay nor abort; add one"));
    }
    let delay = document.delay.as_ref().map(|d| {
        let at = format!("{at}.delay");
        if d.exponential_delay.is_some() {
            return Err(FieldError::new(format!("{at}.exponentialDelay"), "is not supported; use fixedDelay"));
        }
        let fixed = d.fixed_delay.ok_or_else(|| FieldError::new(format!("{at}.fixedDelay"), "is missing"))?;
        Ok((positive(fixed, &format!("{at}.fixedDelay"))?, share(d.percentage, d.percent, Share::default(), &at)?))
    });
    let abort = document.abort.as_ref().map(|a| {
        let at = format!("{at}.abort");
        let kind = match (a.http_status, &a.grpc_status, &a.http2_error) {
            (Some(code), None, None) => Abort::Http(status(code, &format!("{at}.httpStatus"))?),
            (None, Some(name), None) => Abort::Grpc(grpc_status(name, &format!("{at}.grpcStatus"))?),
            (None, None, Some(_)) => {
                return Err(FieldError::new(format!("{at}.http2Error"), "is not supported; use httpStatus or grpcStatus"));
            }
            // Without either Istio aborts nothing.
            (None, None, None) => return Ok(None),
            _ => return Err(FieldError::new(at, "has more than one of httpStatus and grpcStatus; keep one")),
        };
        Ok(Some((kind, share(a.percentage, a.percent, Share::default(), &at)?)))
    });
    Ok(Fault { delay: delay.transpose()?, abort: abort.transpose()?.flatten() })
}

/// A status by name (`UNAVAILABLE`) or number.
fn grpc_status(text: &str, at: &str) -> Result<u16> {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    let number = NAMES.iter().position(|n| *n == text).or_else(|| text.parse().ok().filter(|n| *n < NAMES.len()));
    let number = number.and_then(|n| u16::try_from(n).ok());
    number.ok_or_else(|| FieldError::new(at, format!("{text:?} is not a gRPC status; use a name such as UNAVAILABLE")))
}

fn mirrors(route: &HttpRoute, at: &str) -> Result<Vec<Mirror>> {
    let mut all = Vec::new();
    if let Some(one) = &route.mirror {
        let share = match (route.mirror_percentage, route.mirror_percent) {
            (None, None) => Share::ALL,
            (percentage, percent) => share(percentage, percent, Share::ALL, &format!("{at}.mirrorPercentage"))?,
        };
        all.push(Mirror { destination: destination(one, &format!("{at}.mirror"))?, share });
    }
    for (i, mirror) in route.mirrors.iter().enumerate() {
        let at = format!("{at}.mirrors[{i}]");
        let share = share(mirror.percentage, None, Share::ALL, &at)?;
        all.push(Mirror { destination: destination(&mirror.destination, &format!("{at}.destination"))?, share });
    }
    Ok(all)
}

fn cors(document: &doc::Cors, at: &str) -> Result<Cors> {
    let origins = document.allow_origins.iter().enumerate().map(|(i, m)| text_match(m, &format!("{at}.allowOrigins[{i}]")));
    let mut origins = origins.collect::<Result<Vec<_>>>()?;
    origins.extend(document.allow_origin.iter().map(|o| if o == "*" { TextMatch::Present } else { TextMatch::Exact(o.as_str().into()) }));
    // An origin `*`, exactly written, means any.
    for origin in &mut origins {
        if matches!(origin, TextMatch::Exact(text) if &**text == "*") {
            *origin = TextMatch::Present;
        }
    }
    let list = |all: &[String], field: &str| (!all.is_empty()).then(|| header_value(&all.join(","), &format!("{at}.{field}"))).transpose();
    let forward_unmatched = match document.unmatched_preflights.as_deref() {
        None | Some("UNSPECIFIED" | "FORWARD") => true,
        Some("IGNORE") => false,
        Some(other) => {
            let problem = format!("{other:?} is not one of FORWARD, IGNORE");
            return Err(FieldError::new(format!("{at}.unmatchedPreflights"), problem));
        }
    };
    let max_age = document.max_age.map(|t| header_value(&whole_seconds(t.0).to_string(), &format!("{at}.maxAge"))).transpose()?;
    Ok(Cors {
        origins,
        methods: list(&document.allow_methods, "allowMethods")?,
        headers: list(&document.allow_headers, "allowHeaders")?,
        expose: list(&document.expose_headers, "exposeHeaders")?,
        max_age,
        credentials: document.allow_credentials.unwrap_or(false),
        forward_unmatched,
    })
}

fn whole_seconds(time: Duration) -> u64 {
    time.as_secs()
}
