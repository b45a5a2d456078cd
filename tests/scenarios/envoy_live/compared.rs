//! What two proxies made of the same, compared.

use super::*;

pub fn of_the_answer(outcome: &mut Outcome) {
    let log = std::mem::take(&mut outcome.log);
    of_either_end(outcome);
    let lines = log.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let told = ["code", "flags", "details", "protocol", "method", "path", "authority", "received", "sent", "grpc"];
    let of = |line: &Value, field: &str| match &line[field] {
        // How much of a body nobody wants has come depends on when it is asked.
        _ if field == "received" && line["details"] != "via_upstream" => String::new(),
        // A host that is empty is none here.
        Value::String(text) if text.is_empty() => "null".into(),
        value => value.to_string(),
    };
    outcome.log = lines.map(|line| told.map(|field| of(&line, field)).join(" ")).collect();
}

/// One after the other: what comes when is a part of what is compared.
pub static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// What does not depend on which end of the mesh reads it.
pub fn of_either_end(outcome: &mut Outcome) {
    let added = ["x-envoy-", "x-forwarded-proto=", "x-request-id=", "connection=close;"];
    let without = |text: &str| text.split(' ').filter(|w| !added.iter().any(|name| w.starts_with(name))).collect::<Vec<_>>().join(" ");
    outcome.client = without(&outcome.client);
    if let Some(before) = ["open", "FIN", "closes"].iter().find_map(|end| outcome.client.strip_suffix(end)) {
        outcome.client = before.to_owned();
    }
    outcome.upstream = outcome.upstream.iter().map(|u| without(u)).collect();
    outcome.log.clear();
}

/// Of frames what becomes of requests: a stream error and the end of the connection are the same to the one that is malformed, in whatever
/// words; what was asked again then says only which it was.
pub fn of_requests(outcome: &mut Outcome) {
    let text = std::mem::take(&mut outcome.client);
    let lines = text.lines().map(str::trim).filter(|l| l.contains(": [") || *l == "PING").collect::<Vec<_>>();
    let is_refused = !lines.iter().any(|l| l.starts_with("1: "));
    for line in outcome.log.iter_mut().filter(|line| line.contains("\"code\":0,")) {
        *line = of_the_unread(line);
    }
    let kept = if is_refused { Vec::new() } else { lines };
    if is_refused {
        outcome.upstream.retain(|u| !u.contains("/again"));
        outcome.log.retain(|l| !l.contains("/again"));
    }
    outcome.client = kept.join("\n    ");
}

/// Of a request that was not answered not in which words that is told, and how far it went meanwhile.
fn of_the_unread(line: &str) -> String {
    let Ok(Value::Object(mut fields)) = serde_json::from_str(line) else { return line.to_owned() };
    fields.retain(|name, _| ["code", "flags", "protocol", "stream", "type"].contains(&&**name));
    Value::Object(fields).to_string()
}

/// Of a second attempt not the time that is left for it.
pub fn of_attempts(outcome: &mut Outcome) {
    for request in outcome.upstream.iter_mut().filter(|r| !r.contains("x-envoy-attempt-count=1;")) {
        let left = |word: &str| match word.split_once('=') {
            Some((name @ "x-envoy-expected-rq-timeout-ms", _)) => format!("{name}=*;"),
            _ => word.to_owned(),
        };
        *request = request.split(' ').map(left).collect::<Vec<_>>().join(" ");
    }
}

pub async fn compare(cases: Vec<Case>, way: Way, listed: &str) {
    let _turn = TURN.lock().await;
    let only = std::env::var("CASE").ok();
    let all = cases.into_iter().filter(|c| only.as_ref().is_none_or(|o| c.name.contains(o))).collect::<Vec<_>>();
    let listed = Listed::read(listed);
    listed.check(only.is_none(), |name| all.iter().any(|c| c.name == name));
    let failures = compared(&all, way, &listed).await;
    // What only a busy machine made different is not so again.
    let again = all.iter().filter(|c| failures.iter().any(|(name, _)| *name == c.name)).cloned().collect::<Vec<_>>();
    let failures = if again.is_empty() { failures } else { compared(&again, way, &listed).await };
    let again = again.into_iter().filter(|c| failures.iter().any(|(name, _)| *name == c.name)).collect::<Vec<_>>();
    let failures = if again.is_empty() { failures } else { compared(&again, way, &listed).await };
    report(&failures, all.len());
}

pub async fn compared(cases: &[Case], way: Way, listed: &Listed) -> Vec<(String, String)> {
    // Who asks about requests has them read.
    let policy =
        security("AuthorizationPolicy", "p", &json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/never"]}}]}]}));
    let (mut envoy, mut mesh) = tokio::join!(of_envoy(cases), of_mesh(cases, way, std::slice::from_ref(&policy)));
    if cases.iter().all(|c| c.routes.is_some()) {
        envoy.outcomes.iter_mut().chain(&mut mesh.outcomes).for_each(of_attempts);
    }
    let outcomes = envoy.outcomes.iter_mut().chain(&mut mesh.outcomes);
    if cases.iter().any(|c| c.request.first().is_some_and(|piece| piece.starts_with(mesh_tests::frames::PREFACE))) {
        outcomes.for_each(of_requests);
    } else if way == Way::In {
        outcomes.for_each(of_the_answer);
    }
    let all = cases.iter().zip(envoy.outcomes.iter().zip(&mesh.outcomes)).map(|(case, (envoy, mesh))| (&*case.name, envoy, mesh));
    listed.judge(&all.collect::<Vec<_>>())
}

pub fn report(failures: &[(String, String)], of: usize) {
    let all = failures.iter().map(|(name, text)| format!("{name}\n{text}")).collect::<Vec<_>>().join("\n\n");
    assert!(failures.is_empty(), "{} of {of} cases differ:\n{all}", failures.len());
}

/// Cases that differ on purpose, and why.
pub struct Listed(BTreeMap<String, String>);

impl Listed {
    pub fn read(text: &str) -> Self {
        let all: Vec<Wanted> = serde_json::from_str(text).expect("a list");
        Self(all.into_iter().flat_map(|w| w.cases.into_iter().map(move |c| (c, w.why.clone()))).collect())
    }

    /// Each of them has to be a case.
    pub fn check(&self, all: bool, is_case: impl Fn(&str) -> bool) {
        let unknown = self.0.keys().filter(|name| all && !is_case(name)).collect::<Vec<_>>();
        assert!(unknown.is_empty(), "not among the cases: {unknown:?}");
    }

    /// Every case that differs and is not listed, and every one that is listed and does not differ.
    pub fn judge(&self, compared: &[(&str, &Outcome, &Outcome)]) -> Vec<(String, String)> {
        let mut failures = Vec::new();
        for (name, envoy, mesh) in compared {
            let different = differences(envoy, mesh);
            let text = match self.0.get(*name) {
                Some(why) if different.is_empty() => format!("  is alike, and should differ: {why}"),
                None if !different.is_empty() => different.into_values().collect::<Vec<_>>().join("\n"),
                _ => continue,
            };
            failures.push(((*name).to_owned(), text));
        }
        failures
    }
}
