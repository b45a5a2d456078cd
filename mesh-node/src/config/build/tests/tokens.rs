//! Rules about tokens.

use super::*;

/// As in Istio: of two tokens that are good, policies ask about that of the issuer whose name is first, wherever it is written.
#[test]
fn rules_about_tokens_are_tried_by_their_issuers_names() {
    let authentication = |name: &str, issuers: &[&str]| {
        let rules = issuers.iter().map(|issuer| json!({"issuer": issuer, "jwks": "{\"keys\":[]}"})).collect::<Vec<_>>();
        json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": name}, "spec": {"jwtRules": rules}})
    };
    let (snapshot, _) =
        built(&[pod("web", "10.244.0.9", &json!({})), authentication("a", &["z.idp", "b.idp"]), authentication("b", &["a.idp"])]);
    let workload = snapshot.workload_by_ip("10.244.0.9".parse().expect("valid")).expect("a workload");
    let issuers = workload.policy.at(80).authentication.iter().map(|rule| &*rule.issuer).collect::<Vec<_>>();
    assert_eq!(issuers, ["a.idp", "b.idp", "z.idp"]);
}
