use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::{
    NamedGroup,
    pki_types::{CertificateRevocationListDer, pem::PemObject},
};

use super::*;

type Issuing = CertifiedIssuer<'static, KeyPair>;

fn ca() -> Issuing {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("root")
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).expect("valid")
}

fn credentials(ca: &Issuing, identity: &str) -> Result<Credentials, TlsError> {
    issued(ca, identity, identity)
}

fn trust(ca: &Issuing, key_exchange: KeyExchange) -> Arc<Trust> {
    let parse = |d: &str| crate::id::TrustDomain::parse(d).expect("valid");
    let domains = crate::policy::TrustDomains { local: parse("cluster.local"), aliases: vec![parse("old.local")] };
    let trust = Trust::new(domains, key_exchange);
    trust.set_roots([ca.as_ref().der()]).expect("roots");
    trust
}

fn issued(ca: &Issuing, written: &str, identity: &str) -> Result<Credentials, TlsError> {
    trusting(ca, written, identity, trust(ca, KeyExchange::Hybrid))
}

fn trusting(ca: &Issuing, written: &str, identity: &str, trust: Arc<Trust>) -> Result<Credentials, TlsError> {
    until(ca, written, identity, trust, None)
}

fn until(
    ca: &Issuing,
    written: &str,
    identity: &str,
    trust: Arc<Trust>,
    end: Option<time::OffsetDateTime>,
) -> Result<Credentials, TlsError> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(written.try_into().expect("ascii"))];
    params.serial_number = Some(rcgen::SerialNumber::from(vec![7]));
    params.not_after = end.unwrap_or(params.not_after);
    let key = KeyPair::generate().expect("key");
    let leaf = params.signed_by(&key, ca).expect("leaf");
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    Credentials::new(id(identity), vec![leaf.der().clone()], key, trust)
}

const CLIENT: &str = "spiffe://cluster.local/ns/a/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/a/sa/server";

/// Both sides' results of a handshake; the client's includes the server's verdict on it.
async fn shake(client: &Credentials, expected: &str, server: &Credentials) -> (io::Result<NamedGroup>, io::Result<SpiffeId>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (near, far) = tokio::io::duplex(64 * 1024);
    let dial = async {
        let (mut stream, _) = connect(client, id(expected), near).await?;
        stream.read_u8().await?;
        let group = stream.get_ref().1.negotiated_key_exchange_group().map(rustls::crypto::SupportedKxGroup::name);
        group.ok_or_else(|| io::Error::other("no group"))
    };
    let take = async {
        let (mut stream, peer) = accept(server, far).await?;
        stream.write_u8(1).await?;
        stream.flush().await?;
        Ok(peer.identity)
    };
    tokio::join!(dial, take)
}

#[tokio::test]
async fn peers_agree_on_the_hybrid_exchange_and_know_each_other() {
    let ca = ca();
    let (client, server) = (credentials(&ca, CLIENT).expect("client"), credentials(&ca, SERVER).expect("server"));
    let (group, peer) = shake(&client, SERVER, &server).await;
    assert_eq!(group.expect("connected"), NamedGroup::X25519MLKEM768);
    assert_eq!(peer.expect("accepted"), id(CLIENT));
}

#[tokio::test]
async fn only_the_expected_identity_is_accepted_by_the_client() {
    let ca = ca();
    let (client, server) = (credentials(&ca, CLIENT).expect("client"), credentials(&ca, SERVER).expect("server"));
    let (refused, _) = shake(&client, "spiffe://cluster.local/ns/a/sa/other", &server).await;
    assert_eq!(HandshakeFailure::of(&refused.expect_err("refused")), HandshakeFailure::WrongIdentity);
}

#[tokio::test]
async fn only_the_own_trust_domain_is_accepted_by_the_server() {
    let ca = ca();
    let client = credentials(&ca, "spiffe://elsewhere/ns/a/sa/client").expect("client");
    let server = credentials(&ca, SERVER).expect("server");
    let (refused, verdict) = shake(&client, SERVER, &server).await;
    assert_eq!(HandshakeFailure::of(&verdict.expect_err("refused")), HandshakeFailure::WrongIdentity);
    assert_eq!(HandshakeFailure::of(&refused.expect_err("told so")), HandshakeFailure::RefusedByPeer);
}

#[tokio::test]
async fn a_foreign_root_is_trusted_by_neither_side() {
    let (ours, theirs) = (ca(), ca());
    let (client, server) = (credentials(&theirs, CLIENT).expect("client"), credentials(&ours, SERVER).expect("server"));
    let (refused, _) = shake(&client, SERVER, &server).await;
    assert_eq!(HandshakeFailure::of(&refused.expect_err("refused")), HandshakeFailure::Untrusted);
}

#[tokio::test]
async fn an_alias_of_the_trust_domain_is_as_good_as_its_name() {
    let ca = ca();
    let old = "spiffe://old.local/ns/a/sa/server";
    let (client, server) = (credentials(&ca, "spiffe://old.local/ns/a/sa/client").expect("client"), credentials(&ca, old).expect("server"));
    let (group, peer) = shake(&client, SERVER, &server).await;
    assert!(group.is_ok() && peer.expect("accepted").trust_domain().as_str() == "old.local");
}

#[tokio::test]
async fn key_exchanges_are_as_set() {
    let ca = ca();
    let with = |k| trusting(&ca, SERVER, SERVER, trust(&ca, k)).expect("credentials");
    for (client, server, expected) in [
        (KeyExchange::Hybrid, KeyExchange::ClassicOnly, Some(NamedGroup::X25519)),
        (KeyExchange::ClassicOnly, KeyExchange::Hybrid, Some(NamedGroup::X25519)),
        (KeyExchange::PqcOnly, KeyExchange::Hybrid, Some(NamedGroup::X25519MLKEM768)),
        (KeyExchange::PqcOnly, KeyExchange::ClassicOnly, None),
        (KeyExchange::ClassicOnly, KeyExchange::PqcOnly, None),
    ] {
        let (group, _) = shake(&with(client), SERVER, &with(server)).await;
        assert_eq!(group.ok(), expected, "{client:?} {server:?}");
    }
}

fn revocations(ca: &Issuing, serials: &[u8]) -> String {
    let day = |d: i64| time::OffsetDateTime::now_utc() + time::Duration::days(d);
    let revoked = |serial: &u8| rcgen::RevokedCertParams {
        serial_number: rcgen::SerialNumber::from(vec![*serial]),
        revocation_time: day(-1),
        reason_code: None,
        invalidity_date: None,
    };
    let params = rcgen::CertificateRevocationListParams {
        this_update: day(-1),
        next_update: day(1),
        crl_number: rcgen::SerialNumber::from(vec![1]),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    params.signed_by(ca).expect("signed").pem().expect("PEM")
}

#[tokio::test]
async fn a_revoked_peer_is_refused_and_its_connections_end() {
    let ca = ca();
    let (client, server) = (credentials(&ca, CLIENT).expect("client"), credentials(&ca, SERVER).expect("server"));
    let chain = client.key.cert.clone();
    server.trust.set_revocations([revocations(&ca, &[1, 2]).as_bytes()]).expect("lists");
    let (good, _) = shake(&client, SERVER, &server).await;
    assert!(good.is_ok(), "{good:?}");
    let ended = tokio::spawn(server.trust.clone().revoked(chain));
    tokio::task::yield_now().await;
    server.trust.set_revocations([revocations(&ca, &[7]).as_bytes()]).expect("lists");
    tokio::time::timeout(Duration::from_secs(1), ended).await.expect("told").expect("joined");
    let (_, verdict) = shake(&client, SERVER, &server).await;
    assert_eq!(HandshakeFailure::of(&verdict.expect_err("refused")), HandshakeFailure::Revoked);
    // A list somebody else signed says nothing.
    server.trust.set_revocations([revocations(&self::ca(), &[7]).as_bytes()]).expect("lists");
    let (forged, _) = shake(&client, SERVER, &server).await;
    assert!(forged.is_ok(), "{forged:?}");
    // What is no list replaces none, and one in DER is one.
    let revoked = revocations(&ca, &[7]);
    let der = CertificateRevocationListDer::from_pem_slice(revoked.as_bytes()).expect("a list");
    let read = server.trust.set_revocations([&b" \n"[..], &*der]).expect("lists");
    let due = read.iter().map(|list| (list.text, list.due.is_some_and(|due| due > SystemTime::now()))).collect::<Vec<_>>();
    assert_eq!(due, [(1, true)]);
    let certificate = ca.as_ref().pem();
    for odd in ["-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "not a list", &certificate] {
        assert!(server.trust.set_revocations([odd.as_bytes()]).is_err(), "{odd}");
    }
    let (_, verdict) = shake(&client, SERVER, &server).await;
    assert_eq!(HandshakeFailure::of(&verdict.expect_err("refused")), HandshakeFailure::Revoked);
    assert_eq!(server.trust.set_revocations([&b""[..]]).expect("none"), []);
    assert!(shake(&client, SERVER, &server).await.0.is_ok());
}

/// Connections outlive certificates and roots.
#[tokio::test]
async fn neither_time_nor_other_roots_hide_a_revocation() {
    let ca = ca();
    for other_roots in [false, true] {
        let server = credentials(&ca, SERVER).expect("server");
        let end = time::OffsetDateTime::now_utc() + time::Duration::seconds(2);
        let client = until(&ca, CLIENT, CLIENT, trust(&ca, KeyExchange::Hybrid), (!other_roots).then_some(end)).expect("client");
        assert!(shake(&client, SERVER, &server).await.0.is_ok());
        let ended = tokio::spawn(server.trust.clone().revoked(client.key.cert.clone()));
        tokio::task::yield_now().await;
        if other_roots {
            server.trust.set_roots([self::ca().as_ref().der()]).expect("roots");
        } else {
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        assert!(shake(&client, SERVER, &server).await.0.is_err(), "it would not be believed now");
        assert!(!ended.is_finished());
        server.trust.set_revocations([revocations(&ca, &[7]).as_bytes()]).expect("lists");
        tokio::time::timeout(Duration::from_secs(1), ended).await.expect("told").expect("joined");
    }
}

#[tokio::test]
async fn roots_overlap_while_they_are_rotated() {
    let (old, new) = (ca(), ca());
    let both = |issuer: &Issuing, who: &str| {
        let trust = trust(issuer, KeyExchange::Hybrid);
        trust.set_roots([old.as_ref().der(), new.as_ref().der()]).expect("roots");
        trusting(issuer, who, who, trust).expect("credentials")
    };
    for (client, server) in [(both(&old, CLIENT), both(&new, SERVER)), (both(&new, CLIENT), both(&old, SERVER))] {
        let (good, _) = shake(&client, SERVER, &server).await;
        assert!(good.is_ok(), "{good:?}");
    }
    let (client, server) = (both(&old, CLIENT), both(&new, SERVER));
    assert!(server.trust.set_roots([new.as_ref().der()]).expect("changed"));
    let (refused, _) = shake(&client, SERVER, &server).await;
    assert!(refused.is_err() && server.trust.roots() == 1);
}

#[test]
fn a_certificate_for_somebody_else_is_not_used() {
    assert!(matches!(issued(&ca(), CLIENT, SERVER), Err(TlsError::WrongIdentity { .. })));
}
