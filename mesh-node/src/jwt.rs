//! JSON Web Tokens: read, checked and verified with a set of keys. Pure; time and keys are arguments.
//!
//! RFC 7515 (signatures), 7517 (keys), 7518 (algorithms), 7519 (claims). What is accepted, in which order it is checked and
//! the words of every refusal are Envoy's `jwt_authn`; a test compares them with a real one. Only asymmetric algorithms verify
//! anything here: neither `none` nor a public key used as an HMAC secret does.

mod keys;
mod object;
mod token;

use std::time::{Duration, SystemTime};

pub use keys::{Keys, KeysError};
pub use token::{MAX_TOKEN, Token};

/// How much the clocks of issuer and node may differ.
pub const CLOCK_SKEW: Duration = Duration::from_mins(1);

/// Why a token is not accepted. The text is what the client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("Jwt is missing")]
    Missing,
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderBase64,
    #[error("Jwt header is an invalid JSON")]
    HeaderJson,
    #[error("Jwt header [alg] field is required and must be a string")]
    Algorithm,
    #[error("Jwt header [alg] is not supported")]
    UnknownAlgorithm,
    #[error("Jwt header [kid] field is not a string")]
    KeyId,
    #[error("Jwt header [crit] names an extension that is not supported")]
    Critical,
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadBase64,
    #[error("Jwt payload is an invalid JSON")]
    PayloadJson,
    #[error("Jwt payload [iss] field is not a string")]
    Issuer,
    #[error("Jwt payload [sub] field is not a string")]
    Subject,
    #[error("Jwt payload [iat] field is not an integer")]
    IssuedAt,
    #[error("Jwt payload [nbf] field is not an integer")]
    NotBefore,
    #[error("Jwt payload [exp] field is not an integer")]
    Expiry,
    #[error("Jwt payload [{0}] field is not a positive 64 bit integer")]
    Range(&'static str),
    #[error("Jwt payload [jti] field is not a string")]
    Id,
    #[error("Jwt payload [aud] field is not a string or string list")]
    AudienceType,
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureBase64,
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    #[error("Jwt not yet valid")]
    NotYetValid,
    #[error("Jwt is expired")]
    Expired,
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoKey,
    #[error("Jwt verification fails")]
    Signature,
    #[error("Jwks remote fetch is failed")]
    NoKeys,
}

/// What a token must be beside well signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Empty: any.
    pub issuer: String,
    /// Any of these, as [`audience`] writes them; none asks for nothing.
    pub audiences: Vec<String>,
}

impl Expected {
    /// Checks everything but the signature, in Envoy's order.
    pub fn check(&self, token: &Token, now: SystemTime) -> Result<(), Fault> {
        if !self.issuer.is_empty() && token.issuer() != self.issuer {
            return Err(Fault::UnknownIssuer);
        }
        let since = |t: SystemTime| t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let (now, skew) = (since(now), CLOCK_SKEW.as_secs());
        if token.not_before.is_some_and(|t| t > now.saturating_add(skew)) {
            return Err(Fault::NotYetValid);
        }
        if token.expiry.is_some_and(|t| t.saturating_add(skew) < now) {
            return Err(Fault::Expired);
        }
        let allowed = self.audiences.is_empty() || token.audiences().iter().any(|a| self.audiences.contains(&audience(a)));
        if allowed { Ok(()) } else { Err(Fault::Audience) }
    }
}

/// An audience as it is compared: without its scheme and a slash at its end.
pub fn audience(text: &str) -> String {
    let bare = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    bare.strip_suffix('/').unwrap_or(bare).to_owned()
}

#[cfg(test)]
mod tests;
