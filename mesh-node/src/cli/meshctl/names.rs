//! Names of what is asked about.

use serde_json::Value;

use super::Failure;
use crate::admin::names::near;

/// The full name of an object: namespace/name.
pub fn named(value: &Value) -> String {
    format!("{}/{}", value["namespace"].as_str().unwrap_or_default(), value["name"].as_str().unwrap_or_default())
}

/// The full name of one of these: as given, or in the only namespace that has it.
pub fn find(kind: &str, text: &str, all: &[Value]) -> Result<String, Failure> {
    let names = all.iter().map(named).collect::<Vec<_>>();
    if names.iter().any(|n| n == text) {
        return Ok(text.to_owned());
    }
    let is_it = |n: &&String| n.rsplit('/').next() == Some(text);
    match names.iter().filter(is_it).collect::<Vec<_>>()[..] {
        [one] => return Ok(one.clone()),
        [] => {}
        ref several => {
            let several = several.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ");
            return Err(Failure::Asked(format!("there are several {kind}s {text:?}: {several}; say which")));
        }
    }
    let hint = near(text, names.into_iter());
    Err(Failure::Asked(format!("there is no {kind} {text:?}{hint}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_found_and_near_ones_suggested() {
        let all = [("default", "reviews-v1"), ("default", "ratings"), ("shop", "ratings"), ("shop", "cart")]
            .map(|(namespace, name)| json!({"namespace": namespace, "name": name}));
        assert_eq!(find("workload", "cart", &all).ok().as_deref(), Some("shop/cart"));
        assert_eq!(find("workload", "default/ratings", &all).ok().as_deref(), Some("default/ratings"));
        for (text, part) in [
            ("ratings", "several workloads \"ratings\": default/ratings, shop/ratings"),
            ("review-v1", "did you mean default/reviews-v1?"),
            ("default/reviews-v2", "did you mean default/reviews-v1?"),
            ("completely-else", "there is no workload \"completely-else\""),
        ] {
            let error = find("workload", text, &all).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
