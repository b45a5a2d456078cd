//! Cross-origin requests: what is answered here, and what answers are told (the Fetch standard's CORS protocol, as Envoy serves it).

use http::{HeaderMap, HeaderValue, Method, header};

use crate::route::{request::RequestHead, rule::Cors};

/// What CORS adds to a response.
#[derive(Debug, Clone)]
pub struct CorsAnswer {
    origin: HeaderValue,
    credentials: bool,
    expose: Option<HeaderValue>,
}

/// What becomes of a request.
pub enum Preflight {
    Answer(HeaderMap),
    Pass(Option<CorsAnswer>),
}

/// What answers are told.
pub fn tell(headers: &mut HeaderMap, cors: Option<&CorsAnswer>) {
    let Some(cors) = cors else { return };
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, cors.origin.clone());
    if cors.credentials {
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    if let Some(expose) = &cors.expose {
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
    }
}

/// Judges a request under a rule with CORS.
pub fn judge(cors: &Cors, head: &RequestHead) -> Preflight {
    let said = |name| head.headers.get(name).filter(|value| !value.is_empty());
    let Some(origin) = said(header::ORIGIN) else { return Preflight::Pass(None) };
    let preflight = head.method == Method::OPTIONS && said(header::ACCESS_CONTROL_REQUEST_METHOD).is_some();
    let allowed = cors.allows(origin.as_bytes());
    if !preflight {
        let answer = CorsAnswer { origin: origin.clone(), credentials: cors.credentials, expose: cors.expose.clone() };
        return Preflight::Pass(allowed.then_some(answer));
    }
    if !allowed && cors.forward_unmatched {
        return Preflight::Pass(None);
    }
    let mut headers = HeaderMap::new();
    // Without it, the rest allows a browser nothing; Envoy says it all the same.
    if allowed {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    }
    if cors.credentials {
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    for (name, value) in [
        (header::ACCESS_CONTROL_ALLOW_METHODS, &cors.methods),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, &cors.headers),
        (header::ACCESS_CONTROL_MAX_AGE, &cors.max_age),
        (header::ACCESS_CONTROL_EXPOSE_HEADERS, &cors.expose),
    ] {
        // What is asked for, where that may be anything: with credentials, browsers take `*` for a name.
        let asked = match name {
            header::ACCESS_CONTROL_ALLOW_METHODS => Some(header::ACCESS_CONTROL_REQUEST_METHOD),
            header::ACCESS_CONTROL_ALLOW_HEADERS => Some(header::ACCESS_CONTROL_REQUEST_HEADERS),
            _ => None,
        };
        let value = match (value, asked) {
            // Also when nothing is.
            (Some(any), Some(asked)) if any == "*" => {
                Some(head.headers.get(asked).cloned().unwrap_or_else(|| HeaderValue::from_static("")))
            }
            (value, _) => value.clone(),
        };
        if let Some(value) = value {
            headers.insert(name, value);
        }
    }
    Preflight::Answer(headers)
}
