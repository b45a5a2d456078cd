//! What an application is told of who its client is: `x-forwarded-client-cert`.

use http::HeaderValue;

use super::{Gate, Pass};
use crate::{
    config::Snapshot,
    proxy::http::headers::CLIENT_CERT,
    resource::mesh_config::ClientCert,
    route::request::{RequestHead, take_off},
};

/// What an application is told of who the client is.
pub(super) enum ClientCertAction {
    /// What the request says itself.
    AsItIs,
    /// This, of which the request says nothing.
    Also(HeaderValue),
    /// This, and not what the request says.
    Only(Option<HeaderValue>),
}

/// What the request says, and one element more.
fn appended(head: &RequestHead, own: Option<HeaderValue>) -> ClientCertAction {
    let Some(own) = own else { return ClientCertAction::AsItIs };
    let all = head.headers.get_all(&CLIENT_CERT).iter().map(HeaderValue::as_bytes).chain([own.as_bytes()]).collect::<Vec<_>>();
    HeaderValue::from_bytes(&all.join(&b","[..])).map_or(ClientCertAction::AsItIs, |value| ClientCertAction::Only(Some(value)))
}

impl Gate {
    /// What passes without being asked about.
    pub(super) fn unasked(&self, snapshot: &Snapshot, head: &RequestHead) -> Pass {
        match self.told(snapshot, head) {
            ClientCertAction::AsItIs => Pass::default(),
            ClientCertAction::Also(value) => Pass { client_cert: Some(value), ..Pass::default() },
            ClientCertAction::Only(value) => {
                let mut head = head.clone();
                take_off(&mut head.headers, &CLIENT_CERT);
                Pass { head: Some(head), client_cert: value, ..Pass::default() }
            }
        }
    }

    /// What the application is told of who the client is.
    pub(super) fn told(&self, snapshot: &Snapshot, head: &RequestHead) -> ClientCertAction {
        let said = head.headers.get(&CLIENT_CERT);
        let own = || self.ends.get_or_init(|| self.ends(snapshot)).clone();
        let set = |own: Option<HeaderValue>| match (said, own) {
            (None, Some(own)) => ClientCertAction::Also(own),
            (None, None) => ClientCertAction::AsItIs,
            (Some(_), own) => ClientCertAction::Only(own),
        };
        let proved = self.facts.peer.is_some();
        match snapshot.client_cert {
            ClientCert::AlwaysForwardOnly => ClientCertAction::AsItIs,
            ClientCert::ForwardOnly if proved => ClientCertAction::AsItIs,
            ClientCert::Verified if self.facts.via_trusted_proxy => said.map_or_else(|| set(own()), |_| appended(head, own())),
            ClientCert::AppendForward if proved && said.is_some() => appended(head, own()),
            ClientCert::Verified | ClientCert::SanitizeSet | ClientCert::AppendForward => set(own()),
            ClientCert::Sanitize | ClientCert::ForwardOnly => set(None),
        }
    }

    /// None where the client has not proved who it is.
    fn ends(&self, snapshot: &Snapshot) -> Option<HeaderValue> {
        let (peer, workload) = (self.facts.peer.as_ref()?, snapshot.workload(&self.pod.uid)?);
        HeaderValue::from_str(&format!("By={};URI={peer}", workload.identity)).ok()
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method};

    use super::*;
    use crate::route::request::Scheme;

    #[test]
    fn what_a_trusted_proxy_says_of_clients_stays_before_who_it_is_itself() {
        let mut head = RequestHead {
            method: Method::GET,
            scheme: Scheme::Http,
            authority: HeaderValue::from_static("a"),
            target: crate::route::target::RequestTarget::from_static("/"),
            headers: HeaderMap::new(),
        };
        for value in ["URI=one", "URI=two"] {
            head.headers.append(CLIENT_CERT.clone(), HeaderValue::from_static(value));
        }
        let told = appended(&head, Some(HeaderValue::from_static("By=b;URI=c")));
        assert!(matches!(told, ClientCertAction::Only(Some(value)) if value == "URI=one,URI=two,By=b;URI=c"));
        assert!(matches!(appended(&head, None), ClientCertAction::AsItIs), "who it is itself is not known");
    }
}
