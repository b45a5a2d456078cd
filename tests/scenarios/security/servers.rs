//! Authorizers the tests ask, over HTTP and over gRPC.

use super::*;

/// An authorizer over HTTP: allows what has `x-pass`, or whose body it is shown and begins so, and says so to both sides.
pub fn authorizer() -> SocketAddr {
    use std::io::{BufRead, BufReader, Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.5:0").expect("bound");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
                loop {
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        if reader.read_line(&mut head).unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let has = |text: &str| head.to_lowercase().contains(text);
                    let said = |name: &str| head.split(&format!("{name}: ")).nth(1).and_then(|t| t.lines().next());
                    let mut body = vec![0; said("content-length").and_then(|n| n.parse().ok()).unwrap_or(0)];
                    if reader.read_exact(&mut body).is_err() {
                        return;
                    }
                    let body = String::from_utf8_lossy(&body);
                    let line = head.lines().next().unwrap_or_default().to_owned();
                    let answer = if has("x-fail:") {
                        "HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n".to_owned()
                    } else if has("x-stall:") {
                        std::thread::sleep(Duration::from_secs(3));
                        return;
                    } else if has("x-pass:") || body.starts_with("pass") {
                        let token = said("x-token").map(|t| format!("authorization: Bearer {t}\r\n"));
                        let trace = said("traceparent").unwrap_or("none");
                        let cert = said("x-forwarded-client-cert").unwrap_or("none");
                        let partial = said("x-envoy-auth-partial-body").unwrap_or("none");
                        format!(
                            "HTTP/1.1 200 OK\r\nx-user: alice\r\nx-trace: {trace}\r\nx-line: {line}\r\nx-cert: {cert}\r\nx-body: {body} {partial}\r\nset-cookie: a=1\r\ncontent-length: 2\r\n{}\r\nok",
                            token.unwrap_or_default()
                        )
                    } else {
                        "HTTP/1.1 302 Found\r\nlocation: /login\r\nx-hidden: 1\r\nx-why: none\r\ncontent-length: 4\r\n\r\nno!\n".to_owned()
                    };
                    if stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

pub mod check {
    //! What an authorizer over gRPC sees and says, field by field as in Envoy's protocol definitions.

    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct Request {
        #[prost(message, optional, tag = "1")]
        pub attributes: Option<Attributes>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Attributes {
        #[prost(message, optional, tag = "1")]
        pub source: Option<Peer>,
        #[prost(message, optional, tag = "4")]
        pub request: Option<Outer>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Peer {
        #[prost(string, tag = "4")]
        pub principal: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Outer {
        #[prost(message, optional, tag = "2")]
        pub http: Option<Http>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Http {
        #[prost(string, tag = "2")]
        pub method: String,
        #[prost(map = "string, string", tag = "3")]
        pub headers: std::collections::HashMap<String, String>,
        #[prost(string, tag = "4")]
        pub path: String,
        #[prost(string, tag = "10")]
        pub protocol: String,
        #[prost(string, tag = "11")]
        pub body: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Response {
        #[prost(message, optional, tag = "1")]
        pub status: Option<Status>,
        #[prost(message, optional, tag = "2")]
        pub denied: Option<Denied>,
        #[prost(message, optional, tag = "3")]
        pub ok: Option<Allowed>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Status {
        #[prost(int32, tag = "1")]
        pub code: i32,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Denied {
        #[prost(message, optional, tag = "1")]
        pub status: Option<Status>,
        #[prost(string, tag = "3")]
        pub body: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Allowed {
        #[prost(message, repeated, tag = "2")]
        pub headers: Vec<Option_>,
        #[prost(string, repeated, tag = "5")]
        pub remove: Vec<String>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Option_ {
        #[prost(message, optional, tag = "1")]
        pub header: Option<Header>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub struct Header {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(string, tag = "2")]
        pub value: String,
    }
}

/// An authorizer over gRPC: allows `GET`, tells the application who asks, takes a header away.
pub async fn grpc_authorizer() -> SocketAddr {
    use prost::Message as _;
    let listener = tokio::net::TcpListener::bind("127.0.0.5:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    assert_eq!(request.uri().path(), "/envoy.service.auth.v3.Authorization/Check");
                    tokio::spawn(async move {
                        let mut body = request.into_body();
                        let mut data = Vec::new();
                        while let Some(Ok(chunk)) = body.data().await {
                            data.extend_from_slice(&chunk);
                        }
                        let asked = check::Request::decode(&data[5..]).expect("a question").attributes.expect("attributes");
                        let http = asked.request.and_then(|r| r.http);
                        let answer = match http {
                            // A connection: those of known peers may pass.
                            None => {
                                let code = if asked.source.expect("a source").principal.is_empty() { 7 } else { 0 };
                                check::Response { status: Some(check::Status { code }), ..check::Response::default() }
                            }
                            Some(http) if http.method == "GET" || http.body.starts_with("pass") => {
                                let header =
                                    |key: &str, value: String| check::Option_ { header: Some(check::Header { key: key.into(), value }) };
                                let headers = vec![
                                    header("x-who", asked.source.expect("a source").principal),
                                    header("x-path", http.path),
                                    header("content-length", "9".into()),
                                    header("x-protocol", http.protocol),
                                    header(
                                        "x-body",
                                        format!("{} {}", http.body, http.headers.get("x-envoy-auth-partial-body").map_or("none", |v| v)),
                                    ),
                                ];
                                check::Response {
                                    ok: Some(check::Allowed { headers, remove: vec!["x-gone".into()] }),
                                    ..check::Response::default()
                                }
                            }
                            Some(http) => {
                                let denied = check::Denied {
                                    status: Some(check::Status { code: i32::from(http.headers.contains_key("x-teapot")) * 418 }),
                                    body: "no".into(),
                                };
                                check::Response {
                                    status: Some(check::Status { code: 7 }),
                                    denied: Some(denied),
                                    ..check::Response::default()
                                }
                            }
                        };
                        let mut framed = vec![0; 5];
                        answer.encode(&mut framed).expect("encoded");
                        let length = u32::try_from(framed.len() - 5).expect("short").to_be_bytes();
                        framed[1..5].copy_from_slice(&length);
                        let response = http::Response::builder().header("content-type", "application/grpc").body(()).expect("a response");
                        let mut stream = respond.send_response(response, false).expect("answered");
                        stream.send_data(framed.into(), false).expect("sent");
                        let mut trailers = http::HeaderMap::new();
                        trailers.insert("grpc-status", "0".parse().expect("a value"));
                        stream.send_trailers(trailers).expect("sent");
                    });
                }
            });
        }
    });
    address
}
