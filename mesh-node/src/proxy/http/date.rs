//! What time it is, as `date` says it (RFC 9110 section 5.6.7).

use std::{
    cell::RefCell,
    time::{SystemTime, UNIX_EPOCH},
};

/// Lends out the text of this second.
pub fn now<T>(with: impl FnOnce(&str) -> T) -> T {
    thread_local! {
        static LAST: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    LAST.with_borrow_mut(|(last, text)| {
        if *last != second || text.is_empty() {
            (*last, *text) = (second, httpdate::fmt_http_date(now));
        }
        with(text)
    })
}
