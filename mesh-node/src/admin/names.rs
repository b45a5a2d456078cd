//! Names that may have been meant.

/// `; did you mean a or b?`, of those that are near; nothing when none is.
pub fn near(text: &str, names: impl Iterator<Item = String>) -> String {
    let parts = |name: &'_ str| name.split_once('/').map(|(namespace, name)| (namespace.to_owned(), name.to_owned()));
    let (namespace, short) = parts(text).map_or((None, text.to_owned()), |(namespace, name)| (Some(namespace), name));
    let of = |name: &str| {
        let (its_namespace, its_name) = parts(name).unwrap_or_else(|| (String::new(), name.to_owned()));
        // Of what begins so there may be several.
        let begins = short.chars().count() >= 3 && its_name.starts_with(&short);
        let apart = namespace.as_ref().map_or(0, |namespace| distance(&its_namespace, namespace));
        apart + if begins { 1 } else { distance(&its_name, &short) }
    };
    let mut near = names.map(|n| (of(&n), n)).filter(|(d, _)| *d <= (short.chars().count() / 3).max(2)).collect::<Vec<_>>();
    near.sort();
    near.dedup();
    let near = near.iter().take(3).map(|(_, n)| n.as_str()).collect::<Vec<_>>();
    if near.is_empty() { String::new() } else { format!("; did you mean {}?", near.join(" or ")) }
}

/// How many letters have to be put in, left out or changed.
pub fn distance(a: &str, b: &str) -> usize {
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
