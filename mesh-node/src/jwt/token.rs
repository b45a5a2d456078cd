//! The three parts of a token, decoded.

use base64::{Engine as _, alphabet::URL_SAFE, engine::DecodePaddingMode, engine::GeneralPurpose, engine::GeneralPurposeConfig};
use serde_json::{Map, Value};

use super::{Fault, Keys, keys::Algorithm, object};

/// Longest token looked at, bytes. A request's whole head is bounded by little more.
pub const MAX_TOKEN: usize = 32 * 1024;

const BASE64: GeneralPurpose =
    GeneralPurpose::new(&URL_SAFE, GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent));

/// Padding may be left out, but not in part.
fn decode(text: &str, fault: Fault) -> Result<Vec<u8>, Fault> {
    if text.ends_with('=') && !text.len().is_multiple_of(4) {
        return Err(fault);
    }
    BASE64.decode(text).map_err(|_| fault)
}

/// A token as it was read: nothing in it may be believed before it is verified.
#[derive(Debug, Clone)]
pub struct Token {
    pub(super) algorithm: Algorithm,
    pub(super) key_id: Option<String>,
    /// The payload as it was sent, without padding: what is passed on to applications.
    pub payload: String,
    pub claims: Map<String, Value>,
    signed: String,
    signature: Vec<u8>,
    /// Seconds since 1970.
    pub not_before: Option<u64>,
    pub expiry: Option<u64>,
}

impl Token {
    /// Reads the compact form.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(Fault::Form);
        };
        if header.is_empty() || payload.is_empty() || signature.is_empty() || text.len() > MAX_TOKEN {
            return Err(Fault::Form);
        }
        let header_json = object::parse(&decode(header, Fault::HeaderBase64)?).ok_or(Fault::HeaderJson)?;
        let algorithm = header_json.get("alg").and_then(Value::as_str).ok_or(Fault::Algorithm)?;
        let algorithm = Algorithm::named(algorithm).ok_or(Fault::UnknownAlgorithm)?;
        let key_id = match header_json.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()).filter(|id| !id.is_empty()),
            Some(_) => return Err(Fault::KeyId),
        };
        // RFC 7515 section 4.1.11: what must be understood is not, whatever it is.
        if header_json.contains_key("crit") {
            return Err(Fault::Critical);
        }
        let claims = object::parse(&decode(payload, Fault::PayloadBase64)?).ok_or(Fault::PayloadJson)?;
        check_text(&claims, "iss", Fault::Issuer)?;
        check_text(&claims, "sub", Fault::Subject)?;
        time(&claims, "iat", Fault::IssuedAt)?;
        let not_before = time(&claims, "nbf", Fault::NotBefore)?;
        let expiry = time(&claims, "exp", Fault::Expiry)?;
        check_text(&claims, "jti", Fault::Id)?;
        let audiences = match claims.get("aud") {
            None | Some(Value::String(_)) => true,
            Some(Value::Array(all)) => all.iter().all(Value::is_string),
            Some(_) => false,
        };
        if !audiences {
            return Err(Fault::AudienceType);
        }
        let signature_bytes = decode(signature, Fault::SignatureBase64)?;
        let signed = text[..header.len() + 1 + payload.len()].to_owned();
        let payload = payload.trim_end_matches('=').to_owned();
        Ok(Self { algorithm, key_id, payload, claims, signed, signature: signature_bytes, not_before, expiry })
    }

    /// Checks the signature.
    pub fn verify(&self, keys: &Keys) -> Result<(), Fault> {
        keys.verify(self.algorithm, self.key_id.as_deref(), self.signed.as_bytes(), &self.signature)
    }

    pub fn issuer(&self) -> &str {
        self.text("iss")
    }

    pub fn subject(&self) -> &str {
        self.text("sub")
    }

    pub fn audiences(&self) -> Vec<&str> {
        match self.claims.get("aud") {
            Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
            Some(Value::String(one)) => vec![one],
            _ => Vec::new(),
        }
    }

    fn text(&self, claim: &str) -> &str {
        self.claims.get(claim).and_then(Value::as_str).unwrap_or_default()
    }
}

fn check_text(claims: &Map<String, Value>, name: &str, fault: Fault) -> Result<(), Fault> {
    claims.get(name).is_none_or(Value::is_string).then_some(()).ok_or(fault)
}

/// A time in seconds; some issuers write a fraction, which is cut off.
fn time(claims: &Map<String, Value>, name: &'static str, fault: Fault) -> Result<Option<u64>, Fault> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    if let Some(seconds) = value.as_u64() {
        return Ok(Some(seconds));
    }
    let seconds = value.as_f64().ok_or(fault)?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range: checked just before")]
    let cut = (0.0..9.2e18).contains(&seconds).then_some(seconds as u64);
    cut.map(Some).ok_or(Fault::Range(name))
}
