//! Tokens of requests: verified at their destination's gate, and before that by routes that go by what is in them.

use std::{sync::Arc, time::SystemTime};

use http::{HeaderValue, Method, StatusCode, header};

use super::{gate::Refusal, reply::Reply};
use crate::{
    config::Snapshot,
    jwt::Fault,
    policy::{Authenticated, Verified, locate, needs_keys, received},
    proxy::Proxy,
    resource::request_authentication::{JwtRule, KeySource},
    route::{ServicePort, request::RequestHead, table::HttpTable},
};

/// Longest part of a path told in a challenge, bytes: Envoy's.
const REALM_PATH: usize = 256;

/// What routes go by of a request with a token.
#[derive(Default)]
pub struct Known {
    pub claims: Option<Verified>,
    /// The request as its destination will see it, where routes ask about what is different then.
    pub head: Option<RequestHead>,
}

/// Verifies what a route table goes by: claims, or headers the destination writes claims to or takes tokens from. As in Istio's
/// waypoints, whose routes are asked once tokens are verified, a token the destination does not take is refused before there is a route.
pub async fn known(
    proxy: &Proxy,
    snapshot: &Snapshot,
    (table, port): (&HttpTable, &ServicePort),
    head: &RequestHead,
) -> Result<Known, Box<Refusal>> {
    let rules = if table.may_ask_tokens() { snapshot.tokens_at(port) } else { &[] };
    if !table.asks_tokens(rules) {
        return Ok(Known::default());
    }
    // Rare, and large.
    let claims = Box::pin(authenticate(proxy, rules, head)).await.map_err(|fault| refusal(proxy, fault, head))?.claims;
    let head = Some(received(rules, claims.as_ref(), head));
    Ok(Known { claims, head })
}

/// Verifies a request's tokens, with keys that may have to be fetched.
pub async fn authenticate(proxy: &Proxy, asked: &[Arc<JwtRule>], head: &RequestHead) -> Result<Authenticated, Fault> {
    if asked.is_empty() || is_preflight(head) {
        return Ok(Authenticated::default());
    }
    let (mut rules, now) = (Vec::with_capacity(asked.len()), SystemTime::now());
    for rule in asked {
        // Keys are had only for tokens there are.
        let keys = if locate(rule, head).is_empty() { None } else { keys(proxy, rule, head, now).await };
        rules.push((rule, keys));
    }
    match Authenticated::judge(&rules, head, now) {
        // The issuer may have begun to use another key.
        Err(refused) if refused.fault == Fault::NoKey => {
            let mut renewed = false;
            for (rule, keys) in &mut rules {
                // Those of other issuers have nothing to do with it.
                if let (KeySource::Remote(remote), Some(_)) = (&rule.keys, &keys)
                    && needs_keys(rule, head, now)
                    && let Some(newer) = proxy.jwks.renewed(remote).await
                {
                    (*keys, renewed) = (Some(newer), true);
                }
            }
            let judged = if renewed { Authenticated::judge(&rules, head, now) } else { Err(refused) };
            judged.map_err(|r| r.fault)
        }
        judged => judged.map_err(|r| r.fault),
    }
}

/// Envoy's answer to a token it does not take (RFC 6750 section 3).
pub fn refusal(proxy: &Proxy, fault: Fault, head: &RequestHead) -> Box<Refusal> {
    let text = fault.to_string();
    proxy.metrics.policy_decision("RequestAuthentication", "denied");
    let status = if fault == Fault::Audience { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
    let target = head.target.as_str();
    let target = target.get(..REALM_PATH).unwrap_or(target);
    let error = if fault == Fault::Missing { "" } else { ", error=\"invalid_token\"" };
    let details = format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"));
    let mut reply = Reply::new(status, text);
    let challenge = format!("Bearer realm=\"{}://{}{target}\"{error}", head.scheme.as_str(), head.host());
    if let Ok(challenge) = HeaderValue::from_str(&challenge) {
        reply.headers.insert(header::WWW_AUTHENTICATE, challenge);
    }
    Refusal::new(reply, details)
}

async fn keys(proxy: &Proxy, rule: &JwtRule, head: &RequestHead, now: SystemTime) -> Option<Arc<crate::jwt::Keys>> {
    match &rule.keys {
        KeySource::Inline(keys) => Some(keys.clone()),
        KeySource::Remote(remote) => match proxy.jwks.known(remote) {
            // An issuer that is away holds up nobody else's tokens.
            None if needs_keys(rule, head, now) => proxy.jwks.keys(remote).await,
            known => known,
        },
    }
}

/// A CORS preflight carries no token; Istio lets it pass.
fn is_preflight(head: &RequestHead) -> bool {
    head.method == Method::OPTIONS
        && head.headers.get(header::ORIGIN).is_some_and(|o| !o.is_empty())
        && head.headers.get(header::ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|m| !m.is_empty())
}
