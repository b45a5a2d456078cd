//! JSON Web Key Sets, and verification with their keys.

use std::collections::BTreeMap;

use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512,
    RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;
use x509_parser::{pem::parse_x509_pem, public_key::PublicKey};

use super::Fault;

/// Most keys of a set that are looked at.
const MAX_KEYS: usize = 100;

/// A signature algorithm of RFC 7518 and 8037.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
    /// Symmetric: known, and on purpose no key is for it.
    Hmac,
}

impl Algorithm {
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "EdDSA" => Self::EdDsa,
            "HS256" | "HS384" | "HS512" => Self::Hmac,
            _ => return None,
        })
    }

    fn rsa(self) -> Option<&'static RsaParameters> {
        Some(match self {
            Self::Rs256 => &RSA_PKCS1_2048_8192_SHA256,
            Self::Rs384 => &RSA_PKCS1_2048_8192_SHA384,
            Self::Rs512 => &RSA_PKCS1_2048_8192_SHA512,
            Self::Ps256 => &RSA_PSS_2048_8192_SHA256,
            Self::Ps384 => &RSA_PSS_2048_8192_SHA384,
            Self::Ps512 => &RSA_PSS_2048_8192_SHA512,
            Self::Es256 | Self::Es384 | Self::Es512 | Self::EdDsa | Self::Hmac => return None,
        })
    }
}

/// A curve, which decides the algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Curve {
    P256,
    P384,
    P521,
    Ed25519,
}

impl Curve {
    fn algorithm(self) -> (Algorithm, &'static dyn VerificationAlgorithm) {
        match self {
            Self::P256 => (Algorithm::Es256, &ECDSA_P256_SHA256_FIXED),
            Self::P384 => (Algorithm::Es384, &ECDSA_P384_SHA384_FIXED),
            Self::P521 => (Algorithm::Es512, &ECDSA_P521_SHA512_FIXED),
            Self::Ed25519 => (Algorithm::EdDsa, &ED25519),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Material {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// A point, uncompressed, or an Ed25519 key.
    Curve(Curve, Vec<u8>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    id: Option<String>,
    /// The only algorithm it is for, when it says so.
    algorithm: Option<String>,
    material: Material,
}

/// A set of public keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys(Vec<Key>);

/// Why a text is no usable key set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    #[error("is not a JSON Web Key Set: {0}")]
    Json(String),
    #[error("has no RSA (of 2048 bits or more), EC (P-256, P-384, P-521) or Ed25519 public key for signatures")]
    Empty,
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<KeyId>,
    alg: Option<String>,
    r#use: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// An id: some write a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum KeyId {
    Text(String),
    Number(serde_json::Number),
}

impl KeyId {
    fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Number(number) => number.to_string(),
        }
    }
}

impl Keys {
    /// A set that verifies nothing.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// Reads a set. Keys of other kinds, for encryption, or that are broken, are passed over: one of them must not make the
    /// others useless. Only a set without a single usable key is an error.
    ///
    /// Certificates by the ids of their keys, as Google has them for some of its accounts, are a set too, as with Envoy.
    pub fn parse(text: &str) -> Result<Self, KeysError> {
        let json = |e: serde_json::Error| KeysError::Json(e.to_string());
        let keys = match serde_json::from_str::<BTreeMap<String, String>>(text) {
            Ok(certificates) if !certificates.is_empty() => {
                certificates.into_iter().take(MAX_KEYS).filter_map(|(id, pem)| certified(id, &pem)).collect::<Vec<_>>()
            }
            _ => {
                let keys = serde_json::from_str::<Document>(text).map_err(json)?.keys.into_iter().take(MAX_KEYS);
                keys.filter_map(|k| serde_json::from_value(k).ok()).filter_map(key).collect()
            }
        };
        if keys.is_empty() { Err(KeysError::Empty) } else { Ok(Self(keys)) }
    }

    /// Whether there is a key of this id, so that it is worth trying.
    pub fn has_key(&self, id: Option<&str>) -> bool {
        id.is_none_or(|id| self.0.iter().any(|k| k.id.as_deref().is_none_or(|own| own == id)))
    }

    /// A key of another id, or for another algorithm, is not tried. Without an id all are.
    pub(super) fn verify(&self, algorithm: Algorithm, id: Option<&str>, signed: &[u8], signature: &[u8]) -> Result<(), Fault> {
        let mut matched = false;
        for key in &self.0 {
            let other_id = matches!((id, &key.id), (Some(wanted), Some(own)) if wanted != own);
            let other_algorithm = key.algorithm.as_deref().is_some_and(|own| Algorithm::named(own) != Some(algorithm));
            if other_id || other_algorithm {
                continue;
            }
            matched = true;
            if key.material.verifies(algorithm, signed, signature) {
                return Ok(());
            }
        }
        Err(if matched { Fault::Signature } else { Fault::NoKey })
    }
}

impl Material {
    /// The algorithm is the key's own: what the token says only has to agree.
    fn verifies(&self, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
        match self {
            Self::Rsa { n, e } => {
                let Some(parameters) = algorithm.rsa() else { return false };
                RsaPublicKeyComponents { n, e }.verify(parameters, signed, signature).is_ok()
            }
            Self::Curve(curve, point) => {
                let (own, verification) = curve.algorithm();
                own == algorithm && UnparsedPublicKey::new(verification, point).verify(signed, signature).is_ok()
            }
        }
    }
}

/// An RSA key, if it is long enough to sign anything with (RFC 7518 section 3.3). Leading zeros are no part of a number (section
/// 6.3.1.1), and some write them.
fn rsa(n: &[u8], e: &[u8]) -> Option<Material> {
    const SHORTEST: usize = 2048 / 8;
    let number = |bytes: &[u8]| bytes.iter().copied().skip_while(|b| *b == 0).collect::<Vec<_>>();
    let (n, e) = (number(n), number(e));
    (n.len() >= SHORTEST).then_some(Material::Rsa { n, e })
}

/// The key of a certificate; nothing else of that counts, not even its end.
fn certified(id: String, pem: &str) -> Option<Key> {
    let (_, pem) = parse_x509_pem(pem.as_bytes()).ok()?;
    let certificate = pem.parse_x509().ok()?;
    let key = certificate.public_key();
    let material = match key.parsed().ok()? {
        PublicKey::RSA(key) => rsa(key.modulus, key.exponent)?,
        PublicKey::EC(point) => {
            let curve = match point.key_size() {
                256 => Curve::P256,
                384 => Curve::P384,
                521..=528 => Curve::P521,
                _ => return None,
            };
            Material::Curve(curve, point.data().to_vec())
        }
        _ => return None,
    };
    Some(Key { id: Some(id).filter(|id| !id.is_empty()), algorithm: None, material })
}

fn key(jwk: Jwk) -> Option<Key> {
    if jwk.r#use.as_deref().is_some_and(|u| u != "sig") {
        return None;
    }
    let decode = |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_ref()?.trim_end_matches('=')).ok();
    let material = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("RSA", _) => rsa(&decode(&jwk.n)?, &decode(&jwk.e)?)?,
        ("EC", curve) => {
            // Without a curve it is that of the algorithm, or the usual one, as for Envoy.
            let (curve, size) = match (curve, jwk.alg.as_deref()) {
                (Some("P-256"), _) | (None, None | Some("" | "ES256")) => (Curve::P256, 32),
                (Some("P-384"), _) | (None, Some("ES384")) => (Curve::P384, 48),
                (Some("P-521"), _) | (None, Some("ES512")) => (Curve::P521, 66),
                _ => return None,
            };
            let mut point = vec![4];
            for half in [decode(&jwk.x)?, decode(&jwk.y)?] {
                let missing = usize::checked_sub(size, half.len())?;
                point.extend(std::iter::repeat_n(0, missing));
                point.extend(half);
            }
            Material::Curve(curve, point)
        }
        ("OKP", Some("Ed25519")) => {
            Material::Curve(Curve::Ed25519, decode(&jwk.x).filter(|x| x.len() == signature::ED25519_PUBLIC_KEY_LEN)?)
        }
        _ => return None,
    };
    Some(Key { id: jwk.kid.map(KeyId::text).filter(|k| !k.is_empty()), algorithm: jwk.alg.filter(|a| !a.is_empty()), material })
}
