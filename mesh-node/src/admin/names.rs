//! Names that may have been meant.

/// `; did you mean a or b?`, of those that are near; nothing when none is.
pub fn near(text: &str, names: impl Iterator<Item = String>) -> String {
    let of = |name: &str| distance(name, text).min(distance(name.rsplit('/').next().unwrap_or(name), text));
    let mut near = names.map(|n| (of(&n), n)).filter(|(d, _)| *d <= (text.chars().count() / 3).max(2)).collect::<Vec<_>>();
    near.sort();
    near.dedup();
    let near = near.iter().take(3).map(|(_, n)| n.as_str()).collect::<Vec<_>>();
    if near.is_empty() { String::new() } else { format!("; did you mean {}?", near.join(" or ")) }
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
