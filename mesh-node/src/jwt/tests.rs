//! Known answers of the RFCs, and tokens of our own for times, audiences and attacks.

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::{KeySize, PublicKeyComponents},
    signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::{keys::Algorithm, *};

fn b64(data: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(data)
}

fn key_set(keys: &[Value]) -> Keys {
    Keys::parse(&json!({"keys": keys}).to_string()).expect("a key set")
}

/// Verifies a compact serialization whose payload need not be a token's.
fn verifies(keys: &Keys, compact: &str) -> Result<(), Fault> {
    let parts = compact.split('.').collect::<Vec<_>>();
    let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts[0]).expect("base64")).expect("JSON");
    let algorithm = Algorithm::named(header["alg"].as_str().expect("alg")).expect("known");
    let signature = URL_SAFE_NO_PAD.decode(parts[2]).expect("base64");
    keys.verify(algorithm, header["kid"].as_str(), format!("{}.{}", parts[0], parts[1]).as_bytes(), &signature)
}

#[test]
fn known_answers_of_the_rfcs() {
    let joe = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    let frodo = "SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c2luZXNzLCBGcm9kbywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250byB0aGUgcm9hZCwgYW5kIGlmIHlvdSBkb24ndCBrZWVwIHlvdXIgZmVldCwgdGhlcmXigJlzIG5vIGtub3dpbmcgd2hlcmUgeW91IG1pZ2h0IGJlIHN3ZXB0IG9mZiB0by4";
    let bilbo = json!({"kty": "RSA", "kid": "bilbo.baggins@hobbiton.example", "use": "sig", "e": "AQAB", "n": "n4EPtAOCc9AlkeQHPzHStgAbgs7bTZLwUBZdR8_KuKPEHLd4rHVTeT-O-XV2jRojdNhxJWTDvNd7nqQ0VEiZQHz_AJmSCpMaJMRBSFKrKb2wqVwGU_NsYOYL-QtiWN2lbzcEe6XC0dApr5ydQLrHqkHHig3RBordaZ6Aj-oBHqFEHYpPe7Tpe-OfVfHd1E6cS6M1FZcD1NNLYD5lFHpPI9bTwJlsde3uhGqC0ZCuEHg8lhzwOHrtIQbS0FVbb9k3-tVTU4fg_3L_vniUFAKwuCLqKnS2BYwdq_mzSnbLY7h_qixoR7jig3__kRhuaxwUkRz5iaiQkqgc5gHdrNP5zw"});
    let cases = [
        ("RFC 7515 A.2, RS256", json!({"kty": "RSA", "e": "AQAB", "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"}),
            format!("eyJhbGciOiJSUzI1NiJ9.{joe}.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw")),
        ("RFC 7515 A.3, ES256", json!({"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}),
            format!("eyJhbGciOiJFUzI1NiJ9.{joe}.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q")),
        ("RFC 7515 A.4, ES512", json!({"kty": "EC", "crv": "P-521", "x": "AekpBQ8ST8a8VcfVOTNl353vSrDCLLJXmPk06wTjxrrjcBpXp5EOnYG_NjFZ6OvLFV1jSfS9tsz4qUxcWceqwQGk", "y": "ADSmRA43Z1DSNx_RvcLI87cdL07l6jQyyBXMoxVg_l2Th-x3S1WDhjDly79ajL4Kkd0AZMaZmh9ubmf63e3kyMj2"}),
            "eyJhbGciOiJFUzUxMiJ9.UGF5bG9hZA.AdwMgeerwtHoh-l192l60hp9wAHZFVJbLfD_UxMi70cwnZOYaRI1bKPWROc-mZZqwqT2SI-KGDKB34XO0aw_7XdtAG8GaSwFKdCAPZgoXD2YBJZCPEX3xKpRwcdOO8KpEHwJjyqOgzDO7iKvU8vcnwNrmxYbSW9ERBXukOXolLzeO_Jn".to_owned()),
        ("RFC 8037 A.4, EdDSA", json!({"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}),
            "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg".to_owned()),
        ("RFC 7520 4.1, RS256", bilbo.clone(),
            format!("eyJhbGciOiJSUzI1NiIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9.{frodo}.MRjdkly7_-oTPTS3AXP41iQIGKa80A0ZmTuV5MEaHoxnW2e5CZ5NlKtainoFmKZopdHM1O2U4mwzJdQx996ivp83xuglII7PNDi84wnB-BDkoBwA78185hX-Es4JIwmDLJK3lfWRa-XtL0RnltuYv746iYTh_qHRD68BNt1uSNCrUCTJDt5aAE6x8wW1Kt9eRo4QPocSadnHXFxnt8Is9UzpERV0ePPQdLuW3IS_de3xyIrDaLGdjluPxUAhb6L2aXic1U12podGU0KLUQSE_oI-ZnmKJ3F4uOZDnd6QZWJushZ41Axf_fcIe8u9ipH84ogoree7vjbU5y18kDquDg")),
        ("RFC 7520 4.2, PS384", bilbo,
            format!("eyJhbGciOiJQUzM4NCIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9.{frodo}.cu22eBqkYDKgIlTpzDXGvaFfz6WGoz7fUDcfT0kkOy42miAh2qyBzk1xEsnk2IpN6-tPid6VrklHkqsGqDqHCdP6O8TTB5dDDItllVo6_1OLPpcbUrhiUSMxbbXUvdvWXzg-UD8biiReQFlfz28zGWVsdiNAUf8ZnyPEgVFn442ZdNqiVJRmBqrYRXe8P_ijQ7p8Vdz0TTrxUeT3lm8d9shnr2lfJT8ImUjvAA2Xez2Mlp8cBE5awDzT0qI0n6uiP1aCN_2_jLAeQTlqRHtfa64QQSUmFAAjVKPbByi7xho0uTOcbH510a6GYmJUAfmWjwZ6oD4ifKo8DYM-X72Eaw")),
        ("RFC 7520 4.3, ES512", json!({"kty": "EC", "kid": "bilbo.baggins@hobbiton.example", "use": "sig", "crv": "P-521", "x": "AHKZLLOsCOzz5cY97ewNUajB957y-C-U88c3v13nmGZx6sYl_oJXu9A5RkTKqjqvjyekWF-7ytDyRXYgCF5cj0Kt", "y": "AdymlHvOiLxXkEhayXQnNCvDX4h9htZaCJN34kfmC6pV5OhQHiraVySsUdaQkAgDPrwQrJmbnX9cwlGfP-HqHZR1"}),
            format!("eyJhbGciOiJFUzUxMiIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9.{frodo}.AE_R_YZCChjn4791jSQCrdPZCNYqHXCTZH0-JZGYNlaAjP2kqaluUIIUnC9qvbu9Plon7KRTzoNEuT4Va2cmL1eJAQy3mtPBu_u_sDDyYjnAMDxXPn7XrT0lw-kvAD890jl8e2puQens_IEKBpHABlsbEPX6sFY8OcGDqoRuBomu9xQ2")),
    ];
    for (name, key, compact) in cases {
        let keys = key_set(&[key]);
        assert_eq!(verifies(&keys, &compact), Ok(()), "{name}");
        // One other bit of what is signed.
        let at = compact.find('.').expect("a dot") + 3;
        let mut bytes = compact.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        assert_eq!(verifies(&keys, &String::from_utf8(bytes).expect("text")), Err(Fault::Signature), "{name}, changed");
    }
}

/// An issuer with an Ed25519 key.
struct Issuer(Ed25519KeyPair);

impl Issuer {
    fn new() -> Self {
        Self(Ed25519KeyPair::generate().expect("key"))
    }

    fn key(&self, kid: &str) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "kid": kid, "x": b64(self.0.public_key())})
    }

    fn token(&self, header: &Value, payload: &str) -> String {
        let signed = format!("{}.{}", b64(header.to_string()), b64(payload));
        format!("{signed}.{}", b64(self.0.sign(signed.as_bytes())))
    }
}

fn eddsa() -> Value {
    json!({"alg": "EdDSA", "kid": "k"})
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

const NOW: u64 = 1_800_000_000;

fn judged(issuer: &Issuer, payload: &Value, expected: &Expected) -> Result<(), Fault> {
    let token = Token::parse(&issuer.token(&eddsa(), &payload.to_string()))?;
    expected.check(&token, at(NOW))?;
    token.verify(&key_set(&[issuer.key("k")]))
}

#[test]
fn times_have_a_minute_to_spare() {
    let issuer = Issuer::new();
    let expected = Expected { issuer: "i".into(), audiences: Vec::new() };
    for (claim, time, verdict) in [
        ("exp", NOW + 1, Ok(())),
        ("exp", NOW - 57, Ok(())),
        ("exp", NOW - 60, Ok(())),
        ("exp", NOW - 61, Err(Fault::Expired)),
        ("nbf", NOW + 30, Ok(())),
        ("nbf", NOW + 60, Ok(())),
        ("nbf", NOW + 61, Err(Fault::NotYetValid)),
        ("iat", NOW + 10_000, Ok(())),
    ] {
        assert_eq!(judged(&issuer, &json!({"iss": "i", claim: time}), &expected), verdict, "{claim} {time}");
    }
    assert_eq!(judged(&issuer, &json!({"iss": "i"}), &expected), Ok(()));
    assert_eq!(judged(&issuer, &json!({"iss": "j"}), &expected), Err(Fault::UnknownIssuer));
    assert_eq!(judged(&issuer, &json!({"iss": "i", "exp": 1.9e9}), &expected), Ok(()));
    assert_eq!(judged(&issuer, &json!({"iss": "i", "exp": u64::MAX}), &expected), Ok(()));
}

#[test]
fn one_audience_of_several_is_enough() {
    let issuer = Issuer::new();
    let expected = Expected { issuer: "i".into(), audiences: vec![audience("https://svc-a/"), audience("svc-b")] };
    for (aud, verdict) in [
        (json!("svc-a"), Ok(())),
        (json!("https://svc-a/"), Ok(())),
        (json!("http://svc-b"), Ok(())),
        (json!(["x", "svc-b"]), Ok(())),
        (json!("svc-c"), Err(Fault::Audience)),
        (json!([]), Err(Fault::Audience)),
        (json!(7), Err(Fault::AudienceType)),
    ] {
        assert_eq!(judged(&issuer, &json!({"iss": "i", "aud": aud}), &expected), verdict, "{aud}");
    }
    assert_eq!(judged(&issuer, &json!({"iss": "i"}), &expected), Err(Fault::Audience));
}

#[test]
fn malformed_tokens_are_refused_with_the_recorded_words() {
    let header = b64(r#"{"alg":"RS256"}"#);
    let payload = b64("{}");
    let long = format!("{header}.{}.AAAA", "a".repeat(MAX_TOKEN));
    for (token, fault) in [
        ("abc", Fault::Form),
        ("", Fault::Form),
        ("..", Fault::Form),
        ("a.b.c.d", Fault::Form),
        ("a.b.c", Fault::HeaderBase64),
        ("bm9wZQ.e30.AAAA", Fault::HeaderJson),
        (&format!("{}.{payload}.", b64(r#"{"alg":"none"}"#)), Fault::Form),
        (&format!("{}.{payload}.AAAA", b64(r#"{"alg":"none"}"#)), Fault::UnknownAlgorithm),
        (&format!("{}.{payload}.AAAA", b64(r#"{"alg":"HS2560"}"#)), Fault::UnknownAlgorithm),
        (&format!("{}.{payload}.AAAA", b64(r#"{"alg":"NONE"}"#)), Fault::UnknownAlgorithm),
        (&format!("{}.{payload}.AAAA", b64(r#"{"alg":1}"#)), Fault::Algorithm),
        (&format!("{}.{payload}.AAAA", b64("{}")), Fault::Algorithm),
        (&format!("{}.{payload}.AAAA", b64(r#"{"alg":"RS256","kid":1}"#)), Fault::KeyId),
        (&format!("{}.{payload}.AAAA", b64(r#"{"alg":"RS256","crit":["x"]}"#)), Fault::Critical),
        (&format!("{header}.!!.AAAA"), Fault::PayloadBase64),
        (&format!("{header}.{}.AAAA", b64("[]")), Fault::PayloadJson),
        (&format!("{header}.{}.AAAA", b64(r#"{"iss":1}"#)), Fault::Issuer),
        (&format!("{header}.{}.AAAA", b64(r#"{"sub":{}}"#)), Fault::Subject),
        (&format!("{header}.{}.AAAA", b64(r#"{"exp":"soon"}"#)), Fault::Expiry),
        (&format!("{header}.{}.AAAA", b64(r#"{"exp":-1}"#)), Fault::Range("exp")),
        (&format!("{header}.{}.AAAA", b64(r#"{"exp":1e19}"#)), Fault::Range("exp")),
        (&format!("{header}.{}.AAAA", b64(r#"{"iss":"a","iss":"b"}"#)), Fault::PayloadJson),
        (&format!("{header}.{}.AAAA", b64(r#"{"x":[{"a":1,"a":1}]}"#)), Fault::PayloadJson),
        (&format!("{}.{payload}.AAAA", b64(r#"{"alg":"RS256","alg":"RS256"}"#)), Fault::HeaderJson),
        (&format!("{header}.{payload}.AAA=A"), Fault::SignatureBase64),
        (&format!("{header}.{payload}.AA="), Fault::SignatureBase64),
        (&format!("{header}.{}.AAAA", b64(r#"{"nbf":[]}"#)), Fault::NotBefore),
        (&format!("{header}.{payload}.A"), Fault::SignatureBase64),
        (&long, Fault::Form),
    ] {
        assert_eq!(Token::parse(token).err(), Some(fault), "{}", token.chars().take(80).collect::<String>());
    }
}

#[test]
fn keys_are_found_by_id_and_algorithm() {
    let (issuer, other) = (Issuer::new(), Issuer::new());
    let token = |header: &Value| Token::parse(&issuer.token(header, "{}")).expect("a token");
    let named = token(&eddsa());
    let anonymous = token(&json!({"alg": "EdDSA"}));
    let both = key_set(&[other.key("x"), issuer.key("k")]);
    assert_eq!((named.verify(&both), anonymous.verify(&both)), (Ok(()), Ok(())));
    assert_eq!(token(&json!({"alg": "EdDSA", "kid": "z"})).verify(&both), Err(Fault::NoKey));
    assert_eq!(named.verify(&key_set(&[other.key("k")])), Err(Fault::Signature));
    let mut for_another = issuer.key("k");
    for_another["alg"] = json!("ES256");
    assert_eq!(named.verify(&key_set(&[for_another])), Err(Fault::NoKey));
    let mut encryption = issuer.key("k");
    encryption["use"] = json!("enc");
    assert_eq!(named.verify(&key_set(&[encryption, other.key("q")])), Err(Fault::NoKey));
}

#[test]
fn the_key_decides_the_algorithm() {
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).expect("key");
    let public = PublicKeyComponents::<Vec<u8>>::from(rsa.public_key());
    let rsa_key = json!({"kty": "RSA", "n": b64(&public.n), "e": b64(&public.e)});
    let keys = key_set(&[rsa_key]);
    let sign = |alg: &str, how: &'static dyn signature::RsaEncoding| {
        let signed = format!("{}.{}", b64(json!({"alg": alg}).to_string()), b64("{}"));
        let mut out = vec![0; rsa.public_modulus_len()];
        rsa.sign(how, &SystemRandom::new(), signed.as_bytes(), &mut out).expect("signed");
        Token::parse(&format!("{signed}.{}", b64(out))).expect("a token").verify(&keys)
    };
    for (alg, how) in [
        ("RS256", &signature::RSA_PKCS1_SHA256 as &'static dyn signature::RsaEncoding),
        ("RS384", &signature::RSA_PKCS1_SHA384),
        ("RS512", &signature::RSA_PKCS1_SHA512),
        ("PS256", &signature::RSA_PSS_SHA256),
        ("PS384", &signature::RSA_PSS_SHA384),
        ("PS512", &signature::RSA_PSS_SHA512),
    ] {
        assert_eq!(sign(alg, how), Ok(()), "{alg}");
    }
    assert_eq!(sign("RS512", &signature::RSA_PKCS1_SHA256), Err(Fault::Signature));
    assert_eq!(sign("PS256", &signature::RSA_PKCS1_SHA256), Err(Fault::Signature));
    assert_eq!(sign("ES256", &signature::RSA_PKCS1_SHA256), Err(Fault::Signature));
    let ec = EcdsaKeyPair::generate(&signature::ECDSA_P384_SHA384_FIXED_SIGNING).expect("key");
    let point = ec.public_key().as_ref();
    let ec_keys = key_set(&[json!({"kty": "EC", "crv": "P-384", "x": b64(&point[1..49]), "y": b64(&point[49..])})]);
    let signed = format!("{}.{}", b64(r#"{"alg":"ES384"}"#), b64("{}"));
    let made = ec.sign(&SystemRandom::new(), signed.as_bytes()).expect("signed");
    let token = Token::parse(&format!("{signed}.{}", b64(made))).expect("a token");
    assert_eq!((token.verify(&ec_keys), token.verify(&keys)), (Ok(()), Err(Fault::Signature)));
    let unnamed = |more: Value| {
        let mut key = json!({"kty": "EC", "x": b64(&point[1..49]), "y": b64(&point[49..])});
        key.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        Keys::parse(&json!({"keys": [key]}).to_string()).map(|keys| token.verify(&keys)).map_err(|e| e.to_string())
    };
    assert_eq!(unnamed(json!({"alg": "ES384"})), Ok(Ok(())), "the algorithm's curve");
    assert!(unnamed(json!({})).is_err() && unnamed(json!({"alg": "ES256"})).is_err(), "points of another curve");
}

#[test]
fn a_set_is_as_good_as_its_usable_keys() {
    let good = Issuer::new().key("k");
    for broken in [
        json!({"kty": "oct", "k": "AAAA"}),
        json!({"kty": "RSA", "n": "!!", "e": "AQAB"}),
        // Too short to be of use.
        json!({"kty": "RSA", "n": b64([0xff; 128]), "e": "AQAB"}),
        json!({"kty": "EC", "crv": "P-256", "x": "AA"}),
        json!({"kty": "OKP", "crv": "X25519", "x": "AA"}),
        json!({"kty": 1}),
        json!("no key"),
    ] {
        assert!(Keys::parse(&json!({"keys": [broken, good]}).to_string()).is_ok(), "{broken}");
        assert_eq!(Keys::parse(&json!({"keys": [broken]}).to_string()), Err(KeysError::Empty), "{broken}");
    }
    assert!(matches!(Keys::parse("{}"), Err(KeysError::Json(_))));
    let mut numbered = good.clone();
    numbered["kid"] = json!(7);
    assert!(key_set(&[numbered]).has_key(Some("7")));
}

#[test]
fn certificates_by_id_are_a_set() {
    let random = SystemRandom::new();
    let (signed, mut certificates) = (b"header.payload", serde_json::Map::new());
    let mut certify = |id: &str, key: &rcgen::KeyPair| {
        let certificate = rcgen::CertificateParams::default().self_signed(key).expect("a certificate");
        certificates.insert(id.to_owned(), certificate.pem().into());
    };
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
    let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = aws_lc_rs::encoding::AsDer::as_der(&rsa).expect("a key");
    certify("rsa", &rcgen::KeyPair::try_from(der.as_ref()).expect("a key"));
    let ec = rcgen::KeyPair::generate().expect("a key");
    certify("ec", &ec);
    certificates.insert("odd".to_owned(), "no certificate".into());
    let keys = Keys::parse(&Value::Object(certificates).to_string()).expect("a set");
    let mut signature = vec![0; rsa.public_modulus_len()];
    rsa.sign(&signature::RSA_PKCS1_SHA256, &random, signed, &mut signature).expect("signed");
    assert_eq!(keys.verify(Algorithm::Rs256, Some("rsa"), signed, &signature), Ok(()));
    assert_eq!(keys.verify(Algorithm::Rs256, Some("ec"), signed, &signature), Err(Fault::Signature));
    assert_eq!(keys.verify(Algorithm::Rs256, Some("odd"), signed, &signature), Err(Fault::NoKey));
    let ec = EcdsaKeyPair::from_pkcs8(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, &ec.serialize_der()).expect("a key");
    let signature = ec.sign(&random, signed).expect("signed");
    assert_eq!(keys.verify(Algorithm::Es256, Some("ec"), signed, signature.as_ref()), Ok(()));
    assert_eq!(Keys::parse(r#"{"k": "no certificate"}"#), Err(KeysError::Empty));
}
