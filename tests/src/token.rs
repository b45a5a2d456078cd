//! An issuer of JSON Web Tokens, for tests. Made of the crypto library alone; nothing of mesh-node.

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::{KeySize, PublicKeyComponents},
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

fn b64(data: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(data)
}

/// Seconds since 1970.
pub fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_secs()).expect("in range")
}

/// Claims with others in place of theirs; null takes one away.
pub fn changed(mut all: Value, more: &Value) -> Value {
    for (name, value) in more.as_object().expect("an object") {
        if value.is_null() {
            all.as_object_mut().expect("an object").remove(name);
        } else {
            all[name] = value.clone();
        }
    }
    all
}

/// Has an RSA key `rsa1` and a P-256 key `ec1`.
pub struct Issuer {
    rsa: RsaKeyPair,
    ec: EcdsaKeyPair,
}

impl Default for Issuer {
    fn default() -> Self {
        let rsa = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
        Self { rsa, ec: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key") }
    }
}

impl Issuer {
    /// Its public keys.
    pub fn jwks(&self) -> String {
        let public = PublicKeyComponents::<Vec<u8>>::from(self.rsa.public_key());
        let point = self.ec.public_key().as_ref();
        json!({"keys": [
            {"kty": "RSA", "kid": "rsa1", "alg": "RS256", "use": "sig", "n": b64(&public.n), "e": b64(&public.e)},
            {"kty": "EC", "kid": "ec1", "alg": "ES256", "crv": "P-256", "x": b64(&point[1..33]), "y": b64(&point[33..])},
        ]})
        .to_string()
    }

    /// Signs with the RSA key, whatever the header says.
    pub fn sign(&self, header: &Value, payload: &Value) -> String {
        let signed = format!("{}.{}", b64(header.to_string()), b64(payload.to_string()));
        let mut signature = vec![0; self.rsa.public_modulus_len()];
        self.rsa.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature).expect("signed");
        format!("{signed}.{}", b64(signature))
    }

    /// An ordinary token with these claims.
    pub fn token(&self, payload: &Value) -> String {
        self.sign(&json!({"alg": "RS256", "kid": "rsa1", "typ": "JWT"}), payload)
    }

    /// The same, with the P-256 key.
    pub fn ec_token(&self, payload: &Value) -> String {
        let signed = format!("{}.{}", b64(json!({"alg": "ES256", "kid": "ec1"}).to_string()), b64(payload.to_string()));
        let signature = self.ec.sign(&SystemRandom::new(), signed.as_bytes()).expect("signed");
        format!("{signed}.{}", b64(signature))
    }
}
