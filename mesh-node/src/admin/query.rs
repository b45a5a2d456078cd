//! Queries of URLs: what pages are asked with.

/// The parameters of a query in their order, decoded; or which of them cannot be.
pub(super) fn pairs(query: &str) -> Result<Vec<(&str, String)>, String> {
    let pair = |pair| {
        let (name, value) = str::split_once(pair, '=').unwrap_or((pair, ""));
        Ok((name, decoded(value).ok_or_else(|| format!("{name}: is not percent-encoded UTF-8"))?))
    };
    query.split('&').filter(|p| !p.is_empty()).map(pair).collect()
}

/// A header, as `name: value`.
pub(super) fn header(text: &str) -> Option<(http::HeaderName, http::HeaderValue)> {
    let (name, value) = text.split_once(':')?;
    Some((name.trim().parse().ok()?, value.trim().parse().ok()?))
}

/// Percent-decoded text.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            u8::try_from(digit()? * 16 + digit()?).ok()?
        } else {
            byte
        };
        bytes.push(byte);
    }
    String::from_utf8(bytes).ok()
}
