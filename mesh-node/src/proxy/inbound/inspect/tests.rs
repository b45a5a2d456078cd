//! What first bytes show.

use super::*;

#[test]
fn what_may_pass_for_http_is_told_from_what_does_not() {
    for (read, expected) in [
        (&b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET / HTTP/1.1\r\n"[..], Some(true)),
        (b"\0\r\nQUIT\n\x21", Some(true)),
        (b"FOO / http/1.1\r\n", Some(true)),
        (b"get /x\r\n", Some(true)),
        (b"GET\t/x\r\n", Some(true)),
        (b" \tget \t /x\r\n", Some(true)),
        (b"get http://a/x\n", Some(true)),
        (b"GET x\n", Some(true)),
        (b"GET\n", Some(false)),
        (b"get x\r\n", Some(false)),
        (b"FOO", None),
        (b"* 1 FETCH", None),
        (b"(G", None),
        (b"(GET /x HTTP/1.1\r\n", Some(true)),
        (b"hello world", None),
        (b"*1\r\n$4\r\nPING\r\n", Some(false)),
        (b"EHLO mail.example\r\n", Some(false)),
        (b"\x10\x20MQTT", Some(false)),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", Some(false)),
    ] {
        assert_eq!(resembles_http(read), expected, "{}", String::from_utf8_lossy(read));
    }
}

#[test]
fn settings_frames_are_told_from_other_greetings() {
    for (first, expected) in [
        (&[0][..], true),
        (&[0, 0, 18, 4], true),
        (&[0, 0, 18, 4, 0, 0, 0, 0], true),
        (&[0, 0, 18, 5], false),
        (&[1], false),
        (&[0, 0, 18, 4, 1], false),
    ] {
        assert_eq!(may_be_http2_server(first), expected, "{first:?}");
    }
}
