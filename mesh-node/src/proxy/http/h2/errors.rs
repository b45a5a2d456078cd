//! What an error of the library says of who did what.

use std::io;

use h2::Reason;

use super::TOO_MUCH;

pub use crate::hbone::tunnel::into_io;

/// The reason of a stream's or connection's end, if HTTP/2 gave one.
pub fn reason(error: &io::Error) -> Option<Reason> {
    error.get_ref()?.downcast_ref::<h2::Error>()?.reason()
}

/// Whether the other end has said that it will do nothing about this stream: with the connection's end it named the last one it would
/// do anything about, and streams it has begun go on.
pub fn is_unprocessed(error: &io::Error) -> bool {
    error.get_ref().and_then(|e| e.downcast_ref::<h2::Error>()).is_some_and(|error| error.is_go_away() && error.is_remote())
}

/// Whether the other end gave the whole connection up, or it was lost. A connection given up here, because of what came on
/// it, is not: that is a protocol error.
pub fn is_connection(error: &io::Error) -> bool {
    match error.get_ref().and_then(|e| e.downcast_ref::<h2::Error>()) {
        Some(error) => error.is_go_away() && error.is_remote() || error.is_io(),
        None => true,
    }
}

/// Whether a stream had more than is taken, which Envoy tells of like of a reset.
pub fn is_too_much(error: &io::Error) -> bool {
    let error = error.get_ref().and_then(|e| e.downcast_ref::<h2::Error>());
    error.is_some_and(|error| error.reason() == Some(TOO_MUCH) && !error.is_go_away())
}

/// Whether it was the other end's doing.
pub fn is_remote(error: &io::Error) -> bool {
    error.get_ref().and_then(|e| e.downcast_ref::<h2::Error>()).is_some_and(h2::Error::is_remote)
}
