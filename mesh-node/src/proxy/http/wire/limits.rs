//! What heads may have.

/// Largest head, bytes.
pub const MAX_HEAD: usize = 60 * 1024;
/// Largest head of a response, bytes: what an Envoy that is set to 60 KiB lets pass, as it looks at what it has read before it reads on.
pub const MAX_RESPONSE_HEAD: usize = 80 * 1024;
/// Most headers.
pub const MAX_HEADERS: usize = 100;

/// What a head may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadLimits {
    pub bytes: usize,
    pub headers: usize,
}

impl HeadLimits {
    /// As its client sends it.
    pub const OF_CLIENT: Self = Self { bytes: MAX_HEAD, headers: MAX_HEADERS };
    /// As it comes through a tunnel: with what the client's node, and its routes, have added to what was within the limits. A node that has not
    /// looked into it has not kept to them.
    pub const OF_NODE: Self = Self { bytes: 2 * MAX_HEAD, headers: 2 * MAX_HEADERS };

    /// The head of an answer, which other nodes add to likewise.
    pub fn of_answer(is_tunnel: bool) -> Self {
        let Self { bytes, headers } = Self::of(is_tunnel);
        Self { bytes: bytes / MAX_HEAD * MAX_RESPONSE_HEAD, headers }
    }

    pub fn of(is_tunnel: bool) -> Self {
        if is_tunnel { Self::OF_NODE } else { Self::OF_CLIENT }
    }
}
