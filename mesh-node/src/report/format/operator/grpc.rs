//! Names of gRPC's status codes, in the two ways Envoy writes them.

use super::Values;
use crate::report::plain;

/// `DeadlineExceeded` as `DEADLINE_EXCEEDED`.
pub fn snake(camel: &str) -> String {
    // Spelt in two ways by Envoy too.
    if camel == "Canceled" {
        return "CANCELLED".to_owned();
    }
    let mut out = String::new();
    for (i, c) in camel.chars().enumerate() {
        if c.is_uppercase() && i > 0 && camel != "OK" {
            out.push('_');
        }
        out.push(c.to_ascii_uppercase());
    }
    out
}

/// The gRPC project's names of its status codes.
pub fn name_of(status: u32) -> Option<&'static str> {
    const NAMES: [&str; 17] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    usize::try_from(status).ok().and_then(|s| NAMES.get(s)).copied()
}

/// A status that has no name is told by its number.
pub(super) fn tell(status: u32, in_snake_case: bool, values: &mut impl Values) {
    match name_of(status) {
        None => values.plain(|line| plain::push_number(status.into(), line)),
        Some(name) if in_snake_case => values.text(snake(name).as_bytes()),
        Some(name) => values.text(name.as_bytes()),
    }
}
