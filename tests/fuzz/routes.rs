//! A virtual service and a request: never a panic in reading, matching, rewriting or redirecting, and rewritten targets are
//! paths.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_node::{
    proxy::http::wire,
    resource::{self, Object, Parsed},
    route::{matching::PathMatch, request::RequestHead, rewrite, rule::Action},
};

fn matches(matched: &PathMatch, head: &RequestHead) -> bool {
    matched.matches(head.path())
}

fuzz_target!(|data: &[u8]| {
    // A request line and headers, an empty line, and the rules as JSON.
    let bytes = bytes::Bytes::copy_from_slice(data);
    let Some(end) = wire::head_end(&bytes) else { return };
    let Ok(request) = wire::request(&bytes.slice(..end), wire::HeadLimits::OF_CLIENT) else { return };
    let Ok(http) = serde_json::from_slice::<serde_json::Value>(&bytes[end..]) else { return };
    let document = serde_json::json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "v"},
        "spec": {"hosts": ["a"], "http": http}});
    let Ok(Parsed::Object(named)) = resource::parse(&document, "default") else { return };
    let Object::VirtualService(service) = named.object else { return };
    for rule in &service.http {
        for path in rule.matches.iter().filter_map(|m| m.path.as_ref()).filter(|p| matches(p, &request.head)) {
            if let Action::Redirect(redirect) = &rule.action {
                let _ = rewrite::location(redirect, Some(path), &request.head, 80);
            }
            let mut head = request.head.clone();
            let _ = rewrite::request(&mut head, rule, Some(path), None, |_, _| None);
            assert!(head.path().starts_with('/'), "{}", head.path());
        }
    }
});
