//! Names of what is asked about.

use serde_json::Value;

use super::Failure;

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
    let mut near = names.iter().map(|n| (distance(n, text).min(distance(n.rsplit('/').next().unwrap_or(n), text)), n)).collect::<Vec<_>>();
    near.sort();
    near.dedup();
    let near = near.iter().filter(|(d, _)| *d <= (text.len() / 3).max(2)).take(3).map(|(_, n)| n.as_str()).collect::<Vec<_>>();
    let hint = if near.is_empty() { String::new() } else { format!("; did you mean {}?", near.join(" or ")) };
    Err(Failure::Asked(format!("there is no {kind} {text:?}{hint}")))
}

/// How many letters have to be put in, left out or changed.
fn distance(a: &str, b: &str) -> usize {
    let b = b.chars().collect::<Vec<_>>();
    let mut row = (0..=b.len()).collect::<Vec<_>>();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
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
