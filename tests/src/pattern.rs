//! Bytes that tell their own position, so that loss, repetition and reordering anywhere in a stream are seen.

/// The byte at a position of the stream. The Python client computes the same.
pub fn byte_at(position: u64) -> u8 {
    (position.wrapping_mul(31) ^ (position >> 8) ^ (position >> 16)).to_le_bytes()[0]
}

/// Fills a buffer with the stream from `position` on.
pub fn fill(buffer: &mut [u8], position: u64) {
    for (byte, at) in buffer.iter_mut().zip(position..) {
        *byte = byte_at(at);
    }
}

/// The position of the first wrong byte of a piece of the stream that begins at `position`.
pub fn first_error(piece: &[u8], position: u64) -> Option<u64> {
    piece.iter().zip(position..).find(|(byte, at)| **byte != byte_at(*at)).map(|(_, at)| at)
}
