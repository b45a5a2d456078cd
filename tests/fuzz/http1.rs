//! HTTP/1 heads and bodies: never a panic; a head that is accepted says the same when it is written and read again; a body
//! decodes alike however it arrives.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mesh_node::proxy::http::{
    framing::{Decoder, Frame},
    wire::{self, Framing, HeadLimits},
};

/// Data, and whether it was refused, complete, and what was left.
fn decode(framing: Framing, input: &[u8], piece: usize) -> (Vec<u8>, bool, bool, usize) {
    let mut decoder = Decoder::new(framing);
    let (mut data, mut left) = (Vec::new(), 0);
    for piece in input.chunks(piece) {
        let mut buffer = Bytes::copy_from_slice(piece);
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Some(Frame::Data(d))) => data.extend_from_slice(&d),
                Ok(Some(Frame::Trailers(_))) => {}
                Ok(None) => break,
                Err(_) => return (data, true, false, 0),
            }
        }
        left += buffer.len();
    }
    (data, false, decoder.is_done(), left)
}

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::copy_from_slice(data);
    if let Some(end) = wire::head_end(&bytes) {
        if let Ok(first) = wire::request(&bytes.slice(..end), HeadLimits::OF_CLIENT) {
            let mut out = Vec::new();
            wire::write_request(&first.head, first.framing, None, None, &mut out);
            // There has to be room for a length of nothing.
            let room = first.head.headers.len() + 2 <= wire::MAX_HEADERS && end + 30 <= wire::MAX_HEAD;
            if first.head.method != http::Method::CONNECT && !first.head.authority.is_empty() && room {
                let mut again = wire::request(&out.into(), HeadLimits::OF_CLIENT).expect("what is sent on is accepted");
                // That there is no body may be said where it was not.
                let empty = again.head.headers.get("content-length").is_some_and(|length| length == "0");
                if empty && first.framing == Framing::Empty && !first.head.headers.contains_key("content-length") {
                    again.head.headers.remove("content-length");
                }
                assert_eq!(
                    (again.framing, &again.head.target, &again.head.authority),
                    (first.framing, &first.head.target, &first.head.authority)
                );
                assert_eq!(again.head.headers, first.head.headers);
            }
            let body = &bytes[end..];
            let whole = decode(first.framing, body, body.len().max(1));
            for piece in [1, 2, 7] {
                let pieces = decode(first.framing, body, piece);
                assert_eq!((&pieces.0, pieces.1, pieces.2), (&whole.0, whole.1, whole.2), "in pieces of {piece}");
            }
        }
        for method in [http::Method::GET, http::Method::HEAD] {
            let _ = wire::response(&bytes.slice(..end), &method, HeadLimits::of_answer(false));
        }
    }
    let whole = decode(Framing::Chunked, data, data.len().max(1));
    let pieces = decode(Framing::Chunked, data, 3);
    assert_eq!((&pieces.0, pieces.1, pieces.2), (&whole.0, whole.1, whole.2));
});
