//! Rules of authorization policies as ztunnel writes them: a rule is a list of clauses, all of which have to match; a clause is a list
//! of matches, any of which does.
//!
//! ztunnel knows what a connection has. What a request has is written by names of our own, which its readers pass over.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::resource::{
    authorization::{Condition, OperationMatch, RequestPrincipal, Rule, ServiceAccount, SourceMatch, Values},
    paths::PathPattern,
    strings::StringMatch,
};

/// The rules of a policy of this namespace.
pub fn rules(rules: &[Rule], namespace: &str) -> Value {
    rules.iter().map(|one| clauses(one, namespace)).collect()
}

fn clauses(rule: &Rule, namespace: &str) -> Value {
    let from = rule.from.iter().map(|m| source(m, namespace)).collect::<Vec<_>>();
    let to = rule.to.iter().map(operation).collect::<Vec<_>>();
    let when = rule.when.iter().map(|c| vec![condition(c, namespace)]);
    [from, to].into_iter().filter(|clause| !clause.is_empty()).chain(when).collect()
}

/// One match, as it grows.
#[derive(Default)]
struct Match(Map<String, Value>);

impl Match {
    fn put<T>(&mut self, name: &str, values: &Values<T>, write: impl Fn(&T) -> Value) {
        let negative = format!("not{}{}", name[..1].to_uppercase(), &name[1..]);
        for (name, list) in [(name, &values.any_of), (&*negative, &values.none_of)] {
            if !list.is_empty() {
                self.0.insert(name.to_owned(), list.iter().map(&write).collect());
            }
        }
    }

    fn texts(&mut self, name: &str, values: &Values<StringMatch>) {
        self.put(name, values, text);
    }

    fn accounts(&mut self, values: &Values<ServiceAccount>, namespace: &str) {
        self.put(
            "serviceAccounts",
            values,
            |a| json!({"namespace": a.namespace.as_deref().unwrap_or(namespace), "serviceAccount": a.name}),
        );
    }
}

fn source(m: &SourceMatch, namespace: &str) -> Value {
    let mut all = Match::default();
    all.texts("principals", &m.principals);
    all.texts("namespaces", &m.namespaces);
    all.accounts(&m.service_accounts, namespace);
    all.put("sourceIps", &m.ip_blocks, |block| json!(block.to_string()));
    all.texts("trustDomains", &m.trust_domains);
    all.put("remoteIps", &m.remote_ip_blocks, |block| json!(block.to_string()));
    all.put("requestPrincipals", &m.request_principals, principal);
    all.0.into()
}

fn operation(m: &OperationMatch) -> Value {
    let mut all = Match::default();
    all.put("destinationPorts", &m.ports, |port| json!(port));
    all.texts("hosts", &m.hosts);
    all.texts("methods", &m.methods);
    all.put("paths", &m.paths, |path| match path {
        PathPattern::Text(pattern) => text(pattern),
        PathPattern::Template(template) => json!({"Template": template.to_string()}),
    });
    all.0.into()
}

fn condition(condition: &Condition, namespace: &str) -> Value {
    let mut all = Match::default();
    match condition {
        Condition::SourceIp(v) => all.put("sourceIps", v, |block| json!(block.to_string())),
        Condition::RemoteIp(v) => all.put("remoteIps", v, |block| json!(block.to_string())),
        Condition::SourceNamespace(v) => all.texts("namespaces", v),
        Condition::SourcePrincipal(v) => all.texts("principals", v),
        Condition::SourceServiceAccount(v) => all.accounts(v, namespace),
        Condition::SourceTrustDomain(v) => all.texts("trustDomains", v),
        Condition::DestinationIp(v) => all.put("destinationIps", v, |block| json!(block.to_string())),
        Condition::DestinationPort(v) => all.put("destinationPorts", v, |port| json!(port)),
        Condition::Sni(v) => all.texts("serverNames", v),
        Condition::Header(name, v) => all.texts(&format!("header[{name}]"), v),
        Condition::Host(v) => all.texts("hosts", v),
        Condition::Method(v) => all.texts("methods", v),
        Condition::RequestPrincipal(v) => all.put("requestPrincipals", v, principal),
        Condition::Audience(v) => all.texts("audiences", v),
        Condition::Presenter(v) => all.texts("presenters", v),
        Condition::Claim(path, v) => {
            let path = path.iter().map(Arc::as_ref).collect::<Vec<&str>>();
            all.texts(&format!("claim[{}]", path.join("][")), v);
        }
    }
    all.0.into()
}

fn text(pattern: &StringMatch) -> Value {
    match pattern {
        StringMatch::Exact(text) => json!({"Exact": &**text}),
        StringMatch::Prefix(text) => json!({"Prefix": &**text}),
        StringMatch::Suffix(text) => json!({"Suffix": &**text}),
        StringMatch::Present => json!({"Presence": []}),
        // ztunnel has none of these.
        StringMatch::Glob(_) => json!({"Exact": format!("{pattern:?}")}),
    }
}

fn principal(principal: &RequestPrincipal) -> Value {
    match principal {
        RequestPrincipal::Any => json!({"Presence": []}),
        RequestPrincipal::Pair(issuer, subject) => json!({"issuer": text(issuer), "subject": text(subject)}),
        RequestPrincipal::Whole(whole) => text(whole),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::testing::built;

    #[test]
    fn rules_are_written_as_ztunnel_does() {
        let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p", "namespace": "shop"}, "spec": {
        "rules": [
            {"from": [{"source": {"principals": ["cluster.local/ns/a/*"], "notNamespaces": ["b"]}}, {"source": {"ipBlocks": ["10.0.0.0/8"], "serviceAccounts": ["cart", "x/y"]}}],
             "to": [{"operation": {"ports": ["80"], "methods": ["GET"], "notPaths": ["/admin/*", "/a/{*}/b/{**}/c"]}}],
             "when": [{"key": "destination.ip", "values": ["10.1.2.3"]}, {"key": "request.headers[x-a]", "notValues": ["*"]}, {"key": "request.auth.claims[a][b]", "values": ["c"]}]},
            {},
        ]}});
        let snapshot = built(&[policy]);
        let written = rules(&snapshot.policies[0].rules, "shop");
        assert_eq!(
            written,
            json!([
                [
                    [
                        {"principals": [{"Prefix": "cluster.local/ns/a/"}], "notNamespaces": [{"Exact": "b"}]},
                        {"sourceIps": ["10.0.0.0/8"], "serviceAccounts": [{"namespace": "shop", "serviceAccount": "cart"}, {"namespace": "x", "serviceAccount": "y"}]},
                    ],
                    [{"destinationPorts": [80], "methods": [{"Exact": "GET"}], "notPaths": [{"Prefix": "/admin/"}, {"Template": "/a/{*}/b/{**}/c"}]}],
                    [{"destinationIps": ["10.1.2.3/32"]}],
                    [{"notHeader[x-a]": [{"Presence": []}]}],
                    [{"claim[a][b]": [{"Exact": "c"}]}],
                ],
                [],
            ])
        );
    }
}
