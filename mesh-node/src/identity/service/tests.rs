//! The authority and its client over real TLS, and what is refused.

use std::{net::SocketAddr, path::Path};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::{
    identity::{CertificateSource, IstioCa, IstioCaSettings},
    policy::TrustDomains,
    tls::{KeyExchange, Trust},
};

/// Two tokens of nodes, one of a pod, and one that nobody can look up at the moment; account `a/b` runs on node n1.
struct Fixed;

impl Cluster for Fixed {
    fn review<'a>(&'a self, token: &'a str) -> Boxed<'a, Result<Caller, Unknown>> {
        let caller = |account: &str, node: Option<&str>| Caller {
            namespace: "istio-system".into(),
            account: account.into(),
            node: node.map(str::to_owned),
        };
        Box::pin(async move {
            match token {
                "node-1" => Ok(caller("mesh-node", Some("n1"))),
                "node-2" => Ok(caller("mesh-node", Some("n2"))),
                "unbound" => Ok(caller("mesh-node", None)),
                "pod" => Ok(caller("other", Some("n1"))),
                "later" => Err(Unknown::Unavailable("the API is away".into())),
                _ => Err(Unknown::Token("nobody has it".into())),
            }
        })
    }

    fn runs_on<'a>(&'a self, node: &'a str, namespace: &'a str, account: &'a str) -> Boxed<'a, Result<bool, Unknown>> {
        Box::pin(async move { Ok(node == "n1" && namespace == "a" && account == "b") })
    }
}

fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").expect("valid")
}

struct Bench {
    service: Arc<Service>,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

async fn bench() -> Bench {
    let dir = tempfile::tempdir().expect("tempdir");
    let settings = ServiceSettings {
        dir: dir.path().join("ca"),
        trust_domain: domain(),
        names: vec!["mesh-ca.istio-system.svc".into()],
        node_accounts: vec![("istio-system".into(), "mesh-node".into())],
        default_ttl: Duration::from_hours(24),
        max_ttl: Duration::from_hours(48),
    };
    let service = Service::open(settings, Arc::new(Fixed)).expect("open");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("address");
    tokio::spawn(service.clone().run(listener));
    Bench { service, address, dir }
}

impl Bench {
    fn client(&self, token: &str, ttl: Duration) -> (IstioCa, Arc<Trust>) {
        let trust = Trust::new(TrustDomains { local: domain(), aliases: Vec::new() }, KeyExchange::default());
        let file = self.dir.path().join(format!("token-{token}"));
        std::fs::write(&file, format!("{token}\n")).expect("written");
        let settings = IstioCaSettings {
            address: self.address.to_string(),
            server_name: Some("mesh-ca.istio-system.svc".into()),
            roots: self.dir.path().join("ca/root-cert.pem"),
            token: file,
            cluster: "Kubernetes".into(),
            ttl,
        };
        (IstioCa::new(settings, trust.clone()), trust)
    }
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).expect("valid")
}

const HOUR: Duration = Duration::from_hours(1);

#[tokio::test]
async fn a_node_gets_certificates_of_its_own_pods_and_of_nothing_else() {
    let bench = bench().await;
    let b = id("spiffe://cluster.local/ns/a/sa/b");
    let (client, trust) = bench.client("node-1", HOUR);
    let credentials = client.issue(&b).await.expect("issued");
    let life = credentials.not_after.duration_since(std::time::SystemTime::now()).expect("later");
    assert!(trust.roots() == 1 && life + Duration::from_secs(90) > HOUR && life <= HOUR, "{life:?}");
    let own = id("spiffe://cluster.local/ns/istio-system/sa/mesh-node");
    assert!(client.issue(&own).await.is_ok());
    for (token, identity, part) in [
        ("node-2", "spiffe://cluster.local/ns/a/sa/b", "no pod of account a/b runs on node n2"),
        ("node-1", "spiffe://cluster.local/ns/a/sa/c", "no pod of account a/c runs on node n1"),
        ("unbound", "spiffe://cluster.local/ns/a/sa/b", "not bound to a pod"),
        ("pod", "spiffe://cluster.local/ns/a/sa/b", "not an account nodes run as"),
        ("stolen", "spiffe://cluster.local/ns/a/sa/b", "the token is not valid: nobody has it"),
        ("later", "spiffe://cluster.local/ns/a/sa/b", "the API is away"),
        ("node-1", "spiffe://elsewhere/ns/a/sa/b", "not of trust domain"),
    ] {
        let error = bench.client(token, HOUR).0.issue(&id(identity)).await.expect_err("refused");
        let text = chain(&error);
        assert!(text.contains(part), "{token} {identity}: {text}");
    }
    let long = bench.client("node-1", Duration::from_hours(72)).0.issue(&b).await.expect_err("refused");
    assert!(chain(&long).contains("more than the 172800 s"), "{}", chain(&long));
    let (issued, refused) = bench.service.counts();
    let reasons = refused.iter().map(|(r, n)| (r.reason(), *n)).collect::<Vec<_>>();
    assert_eq!(issued, 2);
    let expected = [
        ("bad_token", 1),
        ("not_a_node", 1),
        ("token_not_bound", 1),
        ("not_on_node", 2),
        ("bad_identity", 1),
        ("validity", 1),
        ("unavailable", 1),
    ];
    assert_eq!(reasons, expected);
}

#[tokio::test]
async fn malformed_requests_are_refused() {
    let bench = bench().await;
    let incoming = |token: Option<&str>, csr: String, path: &str| {
        let mut metadata = HeaderMap::new();
        if let Some(token) = token {
            metadata.insert(header::AUTHORIZATION, format!("Bearer {token}").parse().expect("a value"));
        }
        let message = grpc::frame(&CertificateRequest { csr, validity_duration: 0, metadata: None }).into();
        Incoming { path: path.to_owned(), metadata, message }
    };
    let csr = |uri: &str| {
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("ascii"))];
        params.serialize_request(&rcgen::KeyPair::generate().expect("key")).expect("request").pem().expect("PEM")
    };
    let own = csr("spiffe://cluster.local/ns/istio-system/sa/other");
    let mut broken = own.clone();
    let at = broken.len() / 2;
    broken.replace_range(at..=at, if broken.as_bytes()[at] == b'A' { "B" } else { "A" });
    for (case, code) in [
        (incoming(None, own.clone(), METHOD), Code::Unauthenticated),
        (incoming(Some("pod"), "garbage".into(), METHOD), Code::InvalidArgument),
        (incoming(Some("pod"), broken, METHOD), Code::InvalidArgument),
        (incoming(Some("pod"), csr("spiffe://cluster.local/ns/a/sa/b"), METHOD), Code::InvalidArgument),
        (incoming(Some("pod"), own.clone(), "/other"), Code::Unimplemented),
    ] {
        let status = bench.service.answer(case).await.expect_err("refused");
        assert_eq!(status.code, code, "{status}");
    }
    assert!(bench.service.answer(incoming(Some("pod"), own, METHOD)).await.is_ok());
}

#[tokio::test]
async fn roots_of_the_authority_reach_its_clients() {
    let bench = bench().await;
    let b = id("spiffe://cluster.local/ns/a/sa/b");
    let (client, trust) = bench.client("node-1", HOUR);
    client.issue(&b).await.expect("issued");
    let next = tempfile::tempdir().expect("tempdir");
    Authority::open(next.path(), domain()).expect("another");
    let ca = bench.dir.path().join("ca");
    std::fs::copy(next.path().join("root-cert.pem"), ca.join("trusted-roots.pem")).expect("copied");
    for _ in 0..100 {
        client.issue(&b).await.expect("issued");
        if trust.roots() == 2 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the new root did not arrive");
}

/// An API server that answers by path, over TLS.
async fn api(dir: &Path, answers: Vec<(&'static str, u16, Value)>) -> Kubernetes {
    let authority = Authority::open(&dir.join("api-ca"), domain()).expect("authority");
    let (key, chain) = authority.issue_server(&["127.0.0.1".to_owned()], HOUR).expect("issued");
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .expect("configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("address").to_string();
    std::fs::write(dir.join("own-token"), "own").expect("written");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut read = vec![0; 16 * 1024];
            let n = stream.read(&mut read).await.unwrap_or(0);
            let text = String::from_utf8_lossy(&read[..n]).into_owned();
            let path = text.split(' ').nth(1).unwrap_or_default();
            let authorized = text.to_lowercase().contains("authorization: bearer own");
            let found = answers.iter().find(|(p, ..)| path.starts_with(p)).filter(|_| authorized);
            let (status, body) = found.map_or((403, String::new()), |(_, s, b)| (*s, b.to_string()));
            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
            drop(stream.write_all(answer.as_bytes()).await);
            drop(stream.shutdown().await);
        }
    });
    Kubernetes { address, roots: dir.join("api-ca/root-cert.pem"), token: dir.join("own-token") }
}

#[tokio::test]
async fn the_kubernetes_api_is_asked_about_tokens_and_pods() {
    let dir = tempfile::tempdir().expect("tempdir");
    let review = |extra: Value| {
        let user = json!({"username": "system:serviceaccount:istio-system:mesh-node", "extra": extra});
        json!({"status": {"authenticated": true, "user": user}})
    };
    let named = review(json!({"authentication.kubernetes.io/node-name": ["n1"]}));
    let pods = json!({"items": [
        {"spec": {"nodeName": "n1", "serviceAccountName": "b"}, "status": {"phase": "Running"}},
        {"spec": {"nodeName": "n1", "serviceAccountName": "done"}, "status": {"phase": "Succeeded"}},
    ]});
    let kubernetes =
        api(dir.path(), vec![("/apis/authentication.k8s.io/v1/tokenreviews", 201, named), ("/api/v1/namespaces/a/pods?", 200, pods)]).await;
    let caller = kubernetes.review("t").await.expect("known");
    assert_eq!(caller, Caller { namespace: "istio-system".into(), account: "mesh-node".into(), node: Some("n1".into()) });
    for (node, account, expected) in
        [("n1", "b", true), ("n2", "b", false), ("n1", "done", false), ("n1", "c", false), ("n1/../x", "b", false)]
    {
        assert_eq!(kubernetes.runs_on(node, "a", account).await, Ok(expected), "{node} {account}");
    }
    assert!(matches!(kubernetes.runs_on("n1", "other", "b").await, Err(Unknown::Unavailable(_))));
    // Older clusters name the pod only; a pod of the same name but another UID is another pod.
    let by_pod = review(json!({"authentication.kubernetes.io/pod-name": ["p"], "authentication.kubernetes.io/pod-uid": ["u"]}));
    for (uid, node) in [("u", Some("n7".to_owned())), ("v", None)] {
        let pod = json!({"metadata": {"uid": uid}, "spec": {"nodeName": "n7"}});
        let answers = vec![
            ("/apis/authentication.k8s.io/v1/tokenreviews", 201, by_pod.clone()),
            ("/api/v1/namespaces/istio-system/pods/p", 200, pod),
        ];
        assert_eq!(api(dir.path(), answers).await.review("t").await.expect("known").node, node);
    }
    let refused = json!({"status": {"authenticated": false, "error": "expired"}});
    let kubernetes = api(dir.path(), vec![("/apis/authentication.k8s.io/v1/tokenreviews", 201, refused)]).await;
    assert_eq!(kubernetes.review("t").await, Err(Unknown::Token("expired".into())));
    let kubernetes = api(dir.path(), Vec::new()).await;
    assert!(matches!(kubernetes.review("t").await, Err(Unknown::Unavailable(_))));
}
