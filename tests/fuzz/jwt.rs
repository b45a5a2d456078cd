//! A token and a key set, both from outside: never a panic in reading either, and no token is accepted that was not signed by
//! the one key whose private half exists nowhere.
#![no_main]

use std::time::{Duration, SystemTime};

use libfuzzer_sys::fuzz_target;
use mesh_node::jwt::{Expected, Keys, Token};

/// The public key of RFC 7515, A.3: nothing that a fuzzer makes up is signed by it.
const KEY: &str = r#"{"keys":[{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}"#;
/// The example that RFC signs with it, which may be replayed.
const SIGNED: &str = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // A token, an empty line, a key set.
    let (token, keys) = text.split_once("\n\n").unwrap_or((text, KEY));
    let keys_read = Keys::parse(keys);
    let Ok(token_read) = Token::parse(token) else { return };
    let expected = Expected { issuer: token_read.issuer().to_owned(), audiences: vec!["a".to_owned()] };
    let _ = expected.check(&token_read, SystemTime::UNIX_EPOCH + Duration::from_secs(1_300_819_370));
    let _ = (token_read.subject(), token_read.audiences());
    if let Ok(keys) = keys_read {
        let _ = token_read.verify(&keys);
    }
    let Ok(own) = Keys::parse(KEY) else { panic!("the key is well formed") };
    assert!(token_read.verify(&own).is_err() || token.starts_with(SIGNED), "a forged token was accepted");
});
