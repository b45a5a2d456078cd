//! HTTP/1 bodies: from bytes to frames and back. Frames are slices of what was read, never copies.

use std::{collections::VecDeque, io, io::IoSlice};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::wire::{Framing, MAX_HEAD, Malformed, write_headers};

/// A piece of a body.
#[derive(Debug, Clone)]
pub enum Frame {
    Data(Bytes),
    /// The last one.
    Trailers(HeaderMap),
}

/// What says how a message is framed or routed, or who sends it, may not come after it (RFC 9110 section 6.5.1): it would be believed by who
/// puts trailers among the headers, and nobody has looked at it.
const UNTRAILED: [&str; 14] = [
    "content-length",
    "transfer-encoding",
    "host",
    "connection",
    "trailer",
    "te",
    "upgrade",
    "authorization",
    "cookie",
    "forwarded",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
];
/// Longest line of a chunk's size with its extensions, bytes, and most trailers in all.
const CHUNK_LINE: usize = 16 * 1024;
const TRAILERS: usize = MAX_HEAD;

/// Finds the frames of one body in what is read.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    /// The beginning of a line that has not come whole.
    line: Vec<u8>,
    trailers: HeaderMap,
    trailer_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Length(u64),
    UntilClose,
    ChunkSize,
    ChunkData(u64),
    ChunkEnd,
    Trailers,
    Done,
}

impl Decoder {
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Empty | Framing::Length(0) => State::Done,
            Framing::Length(n) => State::Length(n),
            Framing::Chunked => State::ChunkSize,
            Framing::UntilClose => State::UntilClose,
        };
        Self { state, line: Vec::new(), trailers: HeaderMap::new(), trailer_bytes: 0 }
    }

    /// Whether the body is complete.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// The next frame in `buffer`, of which it takes what it uses. `None`: more is needed, or the body is complete.
    pub fn decode(&mut self, buffer: &mut Bytes) -> Result<Option<Frame>, Malformed> {
        loop {
            match self.state {
                State::Done => return Ok(None),
                _ if buffer.is_empty() => return Ok(None),
                State::UntilClose => return Ok(Some(Frame::Data(std::mem::take(buffer)))),
                State::Length(left) => {
                    let (data, left) = take(buffer, left);
                    self.state = if left == 0 { State::Done } else { State::Length(left) };
                    return Ok(Some(Frame::Data(data)));
                }
                State::ChunkData(left) => {
                    let (data, left) = take(buffer, left);
                    self.state = if left == 0 { State::ChunkEnd } else { State::ChunkData(left) };
                    return Ok(Some(Frame::Data(data)));
                }
                State::ChunkSize => {
                    let Some(line) = self.line(buffer, CHUNK_LINE)? else { return Ok(None) };
                    self.state = match chunk_size(&line)? {
                        0 => State::Trailers,
                        n => State::ChunkData(n),
                    };
                }
                State::ChunkEnd => {
                    let Some(line) = self.line(buffer, 2)? else { return Ok(None) };
                    if !line.is_empty() {
                        return Err(Malformed::BAD_BODY);
                    }
                    self.state = State::ChunkSize;
                }
                State::Trailers => {
                    let Some(line) = self.line(buffer, TRAILERS)? else { return Ok(None) };
                    if line.is_empty() {
                        self.state = State::Done;
                        let trailers = std::mem::take(&mut self.trailers);
                        return Ok((!trailers.is_empty()).then_some(Frame::Trailers(trailers)));
                    }
                    self.trailer(&line)?;
                }
            }
        }
    }

    /// Takes in that the connection has ended; whether the body is complete with that.
    pub fn finish(&mut self) -> bool {
        if self.state == State::UntilClose {
            self.state = State::Done;
        }
        self.is_done()
    }

    /// A line without its end, or `None` while it has not come whole.
    fn line(&mut self, buffer: &mut Bytes, most: usize) -> Result<Option<Vec<u8>>, Malformed> {
        let end = memchr::memchr(b'\n', buffer);
        let n = end.map_or(buffer.len(), |e| e + 1);
        if self.line.len() + n > most + 2 {
            return Err(if self.state == State::Trailers { Malformed::TOO_LARGE } else { Malformed::BAD_BODY });
        }
        self.line.extend_from_slice(&buffer[..n]);
        buffer.advance(n);
        if end.is_none() {
            return Ok(None);
        }
        let mut line = std::mem::take(&mut self.line);
        // An end of line that others may not take for one is none.
        if !line.ends_with(b"\r\n") {
            return Err(Malformed::BAD_BODY);
        }
        line.truncate(line.len() - 2);
        Ok(Some(line))
    }

    fn trailer(&mut self, line: &[u8]) -> Result<(), Malformed> {
        self.trailer_bytes += line.len();
        if self.trailer_bytes > TRAILERS {
            return Err(Malformed::TOO_LARGE);
        }
        let colon = memchr::memchr(b':', line).ok_or(Malformed::BAD_BODY)?;
        let name = HeaderName::from_bytes(&line[..colon]).map_err(|_| Malformed::BAD_BODY)?;
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).map_err(|_| Malformed::BAD_BODY)?;
        if !UNTRAILED.contains(&name.as_str()) {
            self.trailers.append(name, value);
        }
        Ok(())
    }
}

/// Trailers of HTTP/2 without what may not be among them.
pub fn checked_trailers(mut trailers: HeaderMap) -> HeaderMap {
    for name in UNTRAILED {
        trailers.remove(name);
    }
    if has_odd_name(&trailers) {
        let odd = trailers.keys().filter(|name| is_odd(name)).cloned().collect::<Vec<_>>();
        odd.into_iter().for_each(|name| drop(trailers.remove(name)));
    }
    trailers
}

/// Whether a field of HTTP/2 has a name that the library takes and that is none (RFC 9110 section 5.1): HTTP/1 cannot say it.
pub fn has_odd_name(headers: &HeaderMap) -> bool {
    headers.keys().any(is_odd)
}

fn is_odd(name: &HeaderName) -> bool {
    name.as_str().contains('"')
}

fn take(buffer: &mut Bytes, left: u64) -> (Bytes, u64) {
    let n = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
    (buffer.split_to(n), left - n as u64)
}

fn chunk_size(line: &[u8]) -> Result<u64, Malformed> {
    let digits = line.iter().position(|b| !b.is_ascii_hexdigit()).unwrap_or(line.len());
    let rest = line[digits..].trim_ascii_start();
    let zeros = line[..digits].iter().take_while(|b| **b == b'0').count();
    if digits == 0 || digits - zeros > 15 || !(rest.is_empty() || rest.starts_with(b";")) || line.contains(&b'\r') {
        return Err(Malformed::BAD_BODY);
    }
    let text = std::str::from_utf8(&line[..digits]).map_err(|_| Malformed::BAD_BODY)?;
    u64::from_str_radix(text, 16).map_err(|_| Malformed::BAD_BODY)
}

/// Pieces of data on their way out, in order.
#[derive(Debug, Default)]
pub struct Out(VecDeque<Bytes>);

impl Out {
    pub fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.0.push_back(piece);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Bytes::is_empty)
    }

    /// The next piece, to be used up from its beginning.
    pub fn first(&mut self) -> Option<&mut Bytes> {
        while self.0.front().is_some_and(Bytes::is_empty) {
            self.0.pop_front();
        }
        self.0.front_mut()
    }

    /// Makes one piece of the first few, as far as they have no more than `most` bytes together: where each piece costs more than a copy of
    /// it.
    pub fn join(&mut self, most: usize) {
        let mut bytes = 0;
        let fits = |piece: &&Bytes| {
            let sum = bytes + piece.len();
            let fits = sum <= most;
            bytes = if fits { sum } else { bytes };
            fits
        };
        let pieces = self.0.iter().take_while(fits).count();
        if pieces > 1 {
            let mut joined = BytesMut::with_capacity(bytes);
            self.0.drain(..pieces).for_each(|piece| joined.extend_from_slice(&piece));
            self.0.push_front(joined.freeze());
        }
    }

    /// The next piece, whole.
    pub fn pop(&mut self) -> Option<Bytes> {
        self.0.pop_front()
    }

    /// The first pieces, for a vectored write; how many there are.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pairs = slices.iter_mut().zip(&self.0);
        pairs.map(|(slice, piece)| *slice = IoSlice::new(piece)).count()
    }

    /// Takes in that `n` bytes have been written.
    pub fn written(&mut self, mut n: usize) -> io::Result<()> {
        while let Some(first) = self.0.front_mut().filter(|_| n > 0) {
            if n < first.len() {
                first.advance(n);
                return Ok(());
            }
            n -= first.len();
            self.0.pop_front();
        }
        Ok(())
    }
}

/// Writes the frames of one body.
#[derive(Debug, Clone, Copy)]
pub struct Encoder {
    framing: Framing,
}

impl Encoder {
    pub fn new(framing: Framing) -> Self {
        Self { framing }
    }

    pub fn framing(self) -> Framing {
        self.framing
    }

    pub fn frame(self, frame: Frame, out: &mut Out) {
        match (self.framing, frame) {
            (Framing::Chunked, Frame::Data(data)) if !data.is_empty() => {
                out.push(format!("{:x}\r\n", data.len()).into());
                out.push(data);
                out.push(Bytes::from_static(b"\r\n"));
            }
            (Framing::Chunked, Frame::Trailers(trailers)) => {
                let mut text = b"0\r\n".to_vec();
                write_headers(&trailers, &mut text);
                text.extend_from_slice(b"\r\n");
                out.push(text.into());
            }
            (Framing::Length(_) | Framing::UntilClose, Frame::Data(data)) => out.push(data),
            // An empty chunk would be the last; without chunks there is no place for trailers.
            (Framing::Empty, _) | (Framing::Chunked, Frame::Data(_)) | (_, Frame::Trailers(_)) => {}
        }
    }

    /// Ends the body, unless trailers already have.
    pub fn end(self, out: &mut Out) {
        if self.framing == Framing::Chunked {
            out.push(Bytes::from_static(b"0\r\n\r\n"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes a body that arrives in pieces of a size; its data and trailers, and what is left over.
    fn decoded(framing: Framing, input: &[u8], piece: usize) -> Result<(Vec<u8>, HeaderMap, Vec<u8>, bool), Malformed> {
        let mut decoder = Decoder::new(framing);
        let (mut data, mut trailers, mut left) = (Vec::new(), HeaderMap::new(), Vec::new());
        for piece in input.chunks(piece) {
            let mut buffer = Bytes::copy_from_slice(piece);
            while let Some(frame) = decoder.decode(&mut buffer)? {
                match frame {
                    Frame::Data(d) => data.extend_from_slice(&d),
                    Frame::Trailers(t) => trailers = t,
                }
            }
            left.extend_from_slice(&buffer);
        }
        Ok((data, trailers, left, decoder.is_done()))
    }

    #[test]
    fn small_pieces_become_one_and_large_ones_stay() {
        for (pieces, most, expected) in [
            (&[3, 4, 5][..], 12, &[12][..]),
            (&[3, 4, 5], 11, &[7, 5]),
            (&[3, 0, 9], 3, &[3, 9]),
            (&[9, 1], 8, &[9, 1]),
            (&[4], 8, &[4]),
            (&[], 8, &[]),
        ] {
            let mut out = Out::default();
            let mut all = Vec::new();
            for (i, n) in pieces.iter().enumerate() {
                let piece = vec![u8::try_from(i).expect("few"); *n];
                all.extend_from_slice(&piece);
                out.push(piece.into());
            }
            out.join(most);
            let mut lengths = Vec::new();
            let mut joined = Vec::new();
            while let Some(piece) = out.pop() {
                lengths.push(piece.len());
                joined.extend_from_slice(&piece);
            }
            assert_eq!((lengths.as_slice(), joined), (expected, all), "{pieces:?} {most}");
        }
    }

    #[test]
    fn bodies_decode_alike_however_they_arrive() {
        let chunked = b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nx-sum: 1\r\ncontent-length: 9\r\n\r\nGET /";
        for piece in 1..chunked.len() {
            let (data, trailers, left, done) = decoded(Framing::Chunked, chunked, piece).expect("valid");
            assert_eq!((data.as_slice(), left.as_slice(), done), (&b"hello world"[..], &b"GET /"[..], true), "{piece}");
            assert_eq!((trailers.len(), trailers["x-sum"].as_bytes()), (1, &b"1"[..]));
            let (data, _, left, done) = decoded(Framing::Length(11), b"hello worldGET /", piece).expect("valid");
            assert_eq!((data.as_slice(), left.as_slice(), done), (&b"hello world"[..], &b"GET /"[..], true));
        }
        let (data, _, _, done) = decoded(Framing::UntilClose, b"abc", 2).expect("valid");
        assert_eq!((data.as_slice(), done), (&b"abc"[..], false));
    }

    #[test]
    fn chunks_that_could_be_read_two_ways_are_refused() {
        for bad in [
            &b"zz\r\nabc\r\n0\r\n\r\n"[..],
            b"\r\n",
            b"5 5\r\nhello\r\n",
            b"-1\r\n",
            b"0x5\r\nhello",
            b"5\r\nhelloX\r\n",
            b"ffffffffffffffff\r\n",
            b"5\r;\r\nhello",
            b"5\nhello\r\n0\r\n\r\n",
            b"5\r\nhello\n0\r\n\r\n",
            b"0\r\nno colon\r\n\r\n",
            b"0\r\nbad name: 1\r\n\r\n",
        ] {
            assert!(decoded(Framing::Chunked, bad, 100).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        let long = [b"1".repeat(10).as_slice(), b";", &b"a".repeat(20_000)].concat();
        assert!(decoded(Framing::Chunked, &long, 64).is_err());
    }

    #[test]
    fn frames_encode_to_what_decodes_to_them() {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        let encoder = Encoder::new(Framing::Chunked);
        let mut out = Out::default();
        for frame in [Frame::Data("hello".into()), Frame::Data(Bytes::new()), Frame::Trailers(trailers)] {
            encoder.frame(frame, &mut out);
        }
        let mut bytes = Vec::new();
        while let Some(piece) = out.pop() {
            bytes.extend_from_slice(&piece);
        }
        let (data, trailers, left, done) = decoded(Framing::Chunked, &bytes, 3).expect("valid");
        assert!(data == b"hello" && trailers.len() == 1 && left.is_empty() && done);
    }

    #[test]
    fn writing_in_part_leaves_the_rest() {
        let mut out = Out::default();
        for piece in ["abc", "", "defg", "h"] {
            out.push(Bytes::from_static(piece.as_bytes()));
        }
        out.written(5).expect("written");
        let rest = std::iter::from_fn(|| out.pop()).flatten().collect::<Vec<_>>();
        assert_eq!(rest, b"fgh");
    }
}
