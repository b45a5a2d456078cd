//! The beginnings of frames, as they pass: what the library does not tell is seen by them.

use crate::io::sparse::{DATA, END_STREAM, FRAME_HEAD};

/// What is looked at of a frame: its head, and of a reset the reason.
const LOOKED_AT: usize = FRAME_HEAD + 4;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// What is seen of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// The head of a message, or its trailers.
    Head {
        stream: u32,
    },
    /// The last frame of a message has passed, to its end.
    End {
        stream: u32,
    },
    Reset {
        stream: u32,
        reason: u32,
    },
    /// The beginning of a frame of data, padding included.
    Data {
        stream: u32,
        length: usize,
    },
}

/// Finds the beginnings of frames in what passes.
pub(super) struct Frames {
    /// The beginning of one, as far as it has passed.
    head: [u8; LOOKED_AT],
    have: usize,
    /// What is to pass that is not looked at.
    rest: usize,
    /// The stream whose last frame that is.
    last: Option<u32>,
    /// The stream that ends with the head that goes on in further frames.
    continued: Option<u32>,
}

impl Frames {
    /// `first`: so much passes before the first of them.
    pub(super) fn behind(first: usize) -> Self {
        Self { head: [0; LOOKED_AT], have: 0, rest: first, last: None, continued: None }
    }

    pub(super) fn see(&mut self, mut bytes: &[u8], mut seen: impl FnMut(Seen)) {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let n = self.rest.min(bytes.len());
                (self.rest, bytes) = (self.rest - n, &bytes[n..]);
                self.passed(&mut seen);
                continue;
            }
            let wanted = if self.have >= FRAME_HEAD { LOOKED_AT } else { FRAME_HEAD };
            let n = (wanted - self.have).min(bytes.len());
            let (taken, after) = bytes.split_at(n);
            self.head[self.have..self.have + n].copy_from_slice(taken);
            (self.have, bytes) = (self.have + n, after);
            self.look(&mut seen);
        }
    }

    /// Says what has ended, when all of its last frame has passed.
    fn passed(&mut self, seen: &mut impl FnMut(Seen)) {
        if self.rest == 0
            && let Some(stream) = self.last.take()
        {
            seen(Seen::End { stream });
        }
    }

    fn look(&mut self, seen: &mut impl FnMut(Seen)) {
        let [l @ .., kind, flags, s0, s1, s2, s3, reason0, reason1, reason2, reason3] = self.head;
        let length = l.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        let is_reset = kind == RST_STREAM && length == LOOKED_AT - FRAME_HEAD;
        let stream = u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]);
        match self.have {
            FRAME_HEAD if !is_reset => {
                (self.have, self.rest) = (0, length);
                match kind {
                    HEADERS => seen(Seen::Head { stream }),
                    DATA => seen(Seen::Data { stream, length }),
                    _ => {}
                }
                self.last = match kind {
                    HEADERS if flags & (END_STREAM | END_HEADERS) == END_STREAM => {
                        self.continued = Some(stream);
                        None
                    }
                    DATA | HEADERS if flags & END_STREAM != 0 => Some(stream),
                    CONTINUATION if flags & END_HEADERS != 0 => self.continued.take(),
                    _ => None,
                };
                self.passed(seen);
            }
            LOOKED_AT => {
                self.have = 0;
                seen(Seen::Reset { stream, reason: u32::from_be_bytes([reason0, reason1, reason2, reason3]) });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    #[test]
    fn frames_are_seen_in_whatever_pieces_they_come() {
        let frames = [
            b"preface".to_vec(),
            frame(4, 0, 0, &[0; 6]),
            frame(HEADERS, 4, 1, b"abc"),
            frame(DATA, 0, 1, &[HEADERS; 40]),
            frame(DATA, END_STREAM, 1, b""),
            frame(HEADERS, 5, 3, b"x"),
            // A head in several frames, which is the last of its message.
            frame(HEADERS, END_STREAM, 11, b"x"),
            frame(CONTINUATION, 0, 11, b"y"),
            frame(CONTINUATION, END_HEADERS, 11, b"z"),
            frame(RST_STREAM, 0, 5, &[0, 0, 0, 8]),
            // Not the length of a reset.
            frame(RST_STREAM, 0, 7, &[0; 5]),
            // A setting that is acknowledged, whose flag looks like an end.
            frame(4, 1, 0, b""),
            frame(HEADERS, 0, 0x8000_0009, b""),
        ];
        let expected = [
            Seen::Head { stream: 1 },
            Seen::Data { stream: 1, length: 40 },
            Seen::Data { stream: 1, length: 0 },
            Seen::End { stream: 1 },
            Seen::Head { stream: 3 },
            Seen::End { stream: 3 },
            Seen::Head { stream: 11 },
            Seen::End { stream: 11 },
            Seen::Reset { stream: 5, reason: 8 },
            Seen::Head { stream: 9 },
        ];
        for piece in [1, 2, 5, 9, 13, 14, 1000] {
            let (mut of, mut all) = (Frames::behind(7), Vec::new());
            frames.concat().chunks(piece).for_each(|bytes| of.see(bytes, |seen| all.push(seen)));
            assert_eq!(all, expected, "in pieces of {piece}");
        }
        // What has not passed to its end has not ended.
        for (cut, frames) in [
            (1, frame(DATA, END_STREAM, 1, b"abc")),
            (1, frame(HEADERS, END_STREAM | END_HEADERS, 1, b"abc")),
            (1, [frame(HEADERS, END_STREAM, 1, b"abc"), frame(CONTINUATION, END_HEADERS, 1, b"d")].concat()),
            (10, [frame(HEADERS, END_STREAM, 1, b"abc"), frame(CONTINUATION, END_HEADERS, 1, b"d")].concat()),
        ] {
            let (mut of, mut ended) = (Frames::behind(0), 0);
            of.see(&frames[..frames.len() - cut], |seen| ended += usize::from(matches!(seen, Seen::End { .. })));
            assert_eq!(ended, 0, "without {cut} of {frames:?}");
            of.see(&frames[frames.len() - cut..], |seen| ended += usize::from(matches!(seen, Seen::End { .. })));
            assert_eq!(ended, 1, "{frames:?}");
        }
    }
}
