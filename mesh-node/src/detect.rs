//! Which protocol a connection speaks: as its port declares, or by its first bytes.

use http::Method;

/// First bytes looked at, at most: a little more than the longest line or client hello that is waited for.
pub const MAX_FIRST_BYTES: usize = 72 * 1024;
/// First byte of a TLS record that carries a handshake.
pub const TLS_HANDSHAKE: u8 = 0x16;

/// What a service's port declares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub enum Protocol {
    /// Nothing: by the first bytes.
    #[default]
    Detect,
    Http,
    Http2,
    Grpc,
    /// gRPC, which may come as gRPC-Web.
    GrpcWeb,
    /// TLS of the application: opaque, but for the server name.
    Tls,
    /// Anything else.
    Tcp,
}

impl Protocol {
    /// By `appProtocol`, or where there is none by the port's name: the part before the first `-`. Of ports where servers speak first, and that are
    /// declared nothing that is known, by their number. Istio's protocol selection (`ConvertProtocol`).
    pub fn declared(name: &str, app_protocol: Option<&str>, port: u16) -> Self {
        /// SMTP, DNS, `MySQL` and `MongoDB`.
        const SPEAK_FIRST: [u16; 4] = [25, 53, 3306, 27017];
        const GRPC_WEB: &str = "grpc-web";
        let text = app_protocol.unwrap_or(name);
        let is_grpc_web = text.get(..GRPC_WEB.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(GRPC_WEB));
        let first = if is_grpc_web { GRPC_WEB } else { text.split('-').next().unwrap_or_default() };
        Self::named(first).unwrap_or(if SPEAK_FIRST.contains(&port) { Self::Tcp } else { Self::Detect })
    }

    fn named(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "http" | "kubernetes.io/ws" => Self::Http,
            "http2" | "h2c" | "kubernetes.io/h2c" => Self::Http2,
            "grpc" => Self::Grpc,
            "grpc-web" => Self::GrpcWeb,
            "https" | "tls" | "kubernetes.io/wss" => Self::Tls,
            "tcp" | "mongo" | "mysql" | "redis" | "udp" | "hbone" => Self::Tcp,
            _ => return None,
        })
    }

    /// Whether its connections carry HTTP without looking at them.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// What is known where several declare it, in whatever order.
    pub fn agreed(all: impl IntoIterator<Item = Self>) -> Self {
        let mut all = all.into_iter().collect::<Vec<_>>();
        all.sort_unstable();
        all.dedup();
        if let [one] = all[..] {
            return one;
        }
        // Who declares nothing does not say that it is something else.
        all.retain(|declared| *declared != Self::Detect);
        match all[..] {
            [one] if one.is_http() => one,
            _ if !all.is_empty() && all.iter().all(|declared| declared.is_http()) => Self::Http,
            _ => Self::Detect,
        }
    }

    /// Whether HTTP/2 is spoken to it.
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }
}

/// What the first bytes of a connection show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detected {
    Http1,
    Http2,
    /// TLS, with the server name asked for.
    Tls(Option<String>),
    Opaque,
    /// Not enough to tell.
    More,
}

/// What an HTTP/2 connection begins with (RFC 9113 section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Whether what a server says first is the beginning of HTTP/2: it need not wait for the client (RFC 9113 section 3.4).
pub fn is_http2_server(bytes: &[u8]) -> bool {
    match bytes {
        // A SETTINGS frame on stream 0, of whole settings, that acknowledges nothing.
        [0, high, low, 4, 0, 0, 0, 0, 0, ..] => u16::from_be_bytes([*high, *low]).is_multiple_of(6),
        _ => false,
    }
}

/// Longest request line that is waited for, bytes: as much as a head may have.
const REQUEST_LINE: usize = 60 * 1024;

/// Looks at the first bytes. HTTP/1 needs its whole request line, so that nothing that merely begins like one is taken for
/// it.
pub fn detect(bytes: &[u8]) -> Detected {
    match bytes {
        [] => Detected::More,
        [TLS_HANDSHAKE, ..] => tls(bytes),
        _ if bytes.starts_with(PREFACE) => Detected::Http2,
        _ if PREFACE.starts_with(bytes) => Detected::More,
        _ => http1(bytes),
    }
}

fn http1(bytes: &[u8]) -> Detected {
    let Some(end) = bytes.iter().position(|b| *b == b'\n') else {
        return if could_be_request_line(bytes) { Detected::More } else { Detected::Opaque };
    };
    let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
    let version = line.len().checked_sub(9).map(|at| &line[at..]);
    let is_request = matches!(version, Some(b" HTTP/1.1" | b" HTTP/1.0")) && could_be_request_line(line);
    if is_request { Detected::Http1 } else { Detected::Opaque }
}

/// Whether bytes are the beginning of a known method, or one with a target of visible characters after it.
fn could_be_request_line(bytes: &[u8]) -> bool {
    if bytes.len() > REQUEST_LINE {
        return false;
    }
    match bytes.iter().position(|b| *b == b' ') {
        None => METHODS.iter().any(|m| m.as_bytes().starts_with(bytes)),
        Some(at) => is_method(&bytes[..at]) && bytes[at + 1..].iter().all(|b| (0x20..0x7f).contains(b) || *b >= 0x80 || *b == b'\r'),
    }
}

/// Methods that are known: those of the registry that real clients send. Envoy's codec refuses others.
const METHODS: [&str; 34] = [
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "HEAD",
    "OPTIONS",
    "PATCH",
    "CONNECT",
    "TRACE",
    "COPY",
    "LOCK",
    "MKCOL",
    "MOVE",
    "PROPFIND",
    "PROPPATCH",
    "SEARCH",
    "UNLOCK",
    "BIND",
    "REBIND",
    "UNBIND",
    "ACL",
    "REPORT",
    "MKACTIVITY",
    "CHECKOUT",
    "MERGE",
    "M-SEARCH",
    "NOTIFY",
    "SUBSCRIBE",
    "UNSUBSCRIBE",
    "PURGE",
    "MKCALENDAR",
    "LINK",
    "UNLINK",
    "SOURCE",
];

pub fn is_method(name: &[u8]) -> bool {
    METHODS.iter().any(|m| m.as_bytes() == name)
}

/// Whether this is the beginning of a method that is known, or all of it.
pub fn may_become_method(beginning: &[u8]) -> bool {
    METHODS.iter().any(|m| m.as_bytes().starts_with(beginning))
}

/// The method of a name that is known.
pub fn method(name: &[u8]) -> Option<Method> {
    is_method(name).then(|| Method::from_bytes(name).ok()).flatten()
}

/// A TLS client hello (RFC 8446 section 4.1.2) and the server name in it (RFC 6066 section 3).
fn tls(bytes: &[u8]) -> Detected {
    let mut records = bytes;
    let mut hello = Vec::new();
    loop {
        let [kind, major, _, high, low, rest @ ..] = records else {
            return if records.first().is_none_or(|k| *k == TLS_HANDSHAKE) && records.get(1).is_none_or(|m| *m == 3) {
                Detected::More
            } else {
                Detected::Opaque
            };
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if *kind != TLS_HANDSHAKE || *major != 3 || length == 0 || length > 0x4800 {
            return Detected::Opaque;
        }
        hello.extend_from_slice(&rest[..length.min(rest.len())]);
        if let [kind, a, b, c, body @ ..] = hello.as_slice() {
            let wanted = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            if *kind != 1 || wanted > 0x1_0000 {
                return Detected::Opaque;
            }
            if body.len() >= wanted {
                return Detected::Tls(server_name(&body[..wanted]));
            }
        }
        if rest.len() < length {
            return Detected::More;
        }
        records = &rest[length..];
    }
}

fn server_name(hello: &[u8]) -> Option<String> {
    let mut hello = Reader(hello);
    hello.take(2 + 32)?;
    let session = hello.number(1)?;
    hello.take(session)?;
    let suites = hello.number(2)?;
    hello.take(suites)?;
    let compression = hello.number(1)?;
    hello.take(compression)?;
    let length = hello.number(2)?;
    let mut extensions = Reader(hello.take(length)?);
    loop {
        let kind = extensions.number(2)?;
        let length = extensions.number(2)?;
        let mut extension = Reader(extensions.take(length)?);
        if kind != 0 {
            continue;
        }
        extension.take(2)?;
        if extension.number(1)? != 0 {
            return None;
        }
        let length = extension.number(2)?;
        let name = std::str::from_utf8(extension.take(length)?).ok()?;
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        return (!name.is_empty() && name.bytes().all(legal)).then(|| name.to_ascii_lowercase());
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self, bytes: usize) -> Option<usize> {
        Some(self.take(bytes)?.iter().fold(0, |n, b| n << 8 | usize::from(*b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_declare_their_protocol() {
        let cases = [
            ("http", None, Protocol::Http),
            ("http-web", None, Protocol::Http),
            ("http2-api", None, Protocol::Http2),
            ("grpc", None, Protocol::Grpc),
            ("grpc-web", None, Protocol::GrpcWeb),
            ("web", None, Protocol::Detect),
            ("", None, Protocol::Detect),
            ("tcp-x", None, Protocol::Tcp),
            ("https", None, Protocol::Tls),
            ("mysql", None, Protocol::Tcp),
            ("http", Some("tcp"), Protocol::Tcp),
            ("x", Some("kubernetes.io/h2c"), Protocol::Http2),
            ("tcp", Some("grpc-web"), Protocol::GrpcWeb),
            ("http", Some("example.com/own"), Protocol::Detect),
            ("tcp", Some("http-web"), Protocol::Http),
            ("gRPC-Web.v1", None, Protocol::GrpcWeb),
        ];
        for (name, app, expected) in cases {
            assert_eq!(Protocol::declared(name, app, 80), expected, "{name} {app:?}");
        }
        for (name, app, port, expected) in [
            ("db", None, 3306, Protocol::Tcp),
            ("", Some("example.com/own"), 25, Protocol::Tcp),
            ("http", None, 3306, Protocol::Http),
            ("db", None, 5432, Protocol::Detect),
        ] {
            assert_eq!(Protocol::declared(name, app, port), expected, "{name} {app:?} {port}");
        }
        for (all, expected) in [
            (&[Protocol::Http, Protocol::Http][..], Protocol::Http),
            (&[Protocol::Http, Protocol::Grpc], Protocol::Http),
            (&[Protocol::Grpc, Protocol::Detect, Protocol::Grpc], Protocol::Grpc),
            (&[Protocol::Http, Protocol::Grpc, Protocol::Detect], Protocol::Http),
            (&[Protocol::Http, Protocol::Tcp], Protocol::Detect),
            (&[Protocol::Http, Protocol::Tcp, Protocol::Http], Protocol::Detect),
            (&[Protocol::Http, Protocol::Http2, Protocol::Tcp], Protocol::Detect),
            (&[Protocol::Tcp, Protocol::Detect], Protocol::Detect),
            (&[Protocol::Tcp, Protocol::Tls], Protocol::Detect),
            (&[Protocol::Tcp, Protocol::Tcp], Protocol::Tcp),
            (&[], Protocol::Detect),
        ] {
            // Whatever order they come in.
            for turn in 0..all.len().max(1) {
                let mut turned = all.to_vec();
                turned.rotate_left(turn.min(all.len()));
                let back = turned.iter().rev().copied().collect::<Vec<_>>();
                assert_eq!([Protocol::agreed(turned), Protocol::agreed(back)], [expected; 2], "{all:?} from {turn}");
            }
        }
    }

    #[test]
    fn first_bytes_tell_http_from_the_rest() {
        let cases: [(&[u8], Detected); 16] = [
            (b"", Detected::More),
            (b"GE", Detected::More),
            (b"GET /x", Detected::More),
            (b"GET / HTTP/1.1\r\n", Detected::Http1),
            (b"GET / HTTP/1.1\n", Detected::Http1),
            (b"POST /a b HTTP/1.0\r\nx", Detected::Http1),
            (b"GET key\r\n", Detected::Opaque),
            (b"get key\r\n", Detected::Opaque),
            (b"HELO x\r\n", Detected::Opaque),
            (b"GET \x00", Detected::Opaque),
            (b"PRI * HTTP/2.0\r\n", Detected::More),
            (PREFACE, Detected::Http2),
            (b"PRI * HTTP/2.1", Detected::Opaque),
            (b"\x16\x03\x01", Detected::More),
            (b"\x16\x02\x01\x00\x10", Detected::Opaque),
            (b"\x00\x01\x02", Detected::Opaque),
        ];
        for (bytes, expected) in cases {
            assert_eq!(detect(bytes), expected, "{}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(detect(&[b"GET /".as_slice(), &vec![b'a'; REQUEST_LINE]].concat()), Detected::Opaque);
    }

    /// A client hello of the smallest kind that has a server name.
    fn hello(name: &str) -> Vec<u8> {
        let number = |n: usize| u16::try_from(n).expect("small").to_be_bytes();
        let list = [&[0][..], &number(name.len()), name.as_bytes()].concat();
        let extension = [&[0, 0][..], &number(list.len() + 2), &number(list.len()), &list].concat();
        let other = [0, 10, 0, 2, 0, 0];
        let body =
            [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &number(extension.len() + other.len()), &other, &extension].concat();
        let handshake = [&[1, 0][..], &number(body.len()), &body].concat();
        [&[0x16, 3, 1][..], &number(handshake.len()), &handshake].concat()
    }

    #[test]
    fn server_name_is_read_from_a_client_hello_however_it_arrives() {
        let bytes = hello("Db.Example");
        for cut in 0..bytes.len() {
            assert_eq!(detect(&bytes[..cut]), Detected::More, "{cut}");
        }
        assert_eq!(detect(&bytes), Detected::Tls(Some("db.example".into())));
        // In two records.
        let (a, b) = bytes[5..].split_at(20);
        let split = [&[0x16, 3, 1, 0, 20][..], a, &[0x16, 3, 1], &u16::try_from(b.len()).expect("small").to_be_bytes(), b].concat();
        assert_eq!(detect(&split), Detected::Tls(Some("db.example".into())));
    }
}
