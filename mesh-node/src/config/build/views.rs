//! Who sees services otherwise than most: clients of some namespaces, and of these the pods that a `DestinationRule` selects
//! (`workloadSelector`).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::Builder;
use crate::{
    config::store::Severity,
    id::ObjectName,
    resource::selector::{Labels, Selecting},
};

/// A client, as far as what it sees depends on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Client<'c> {
    pub namespace: &'c str,
    /// Numbers of the destination rules that select it.
    pub selected_by: &'c [usize],
}

/// Views that pods have because destination rules select them.
#[derive(Default)]
pub(super) struct Views<'a> {
    /// Destination rules by namespace.
    selecting: HashMap<&'a str, Selecting<'a, usize>>,
    /// By the view's name: the namespace, and the rules.
    chosen: BTreeMap<Arc<str>, (&'a str, Vec<usize>)>,
    /// Rules that were to select somebody when there were too many.
    refused: BTreeSet<usize>,
}

/// Most of such views: each has services of its own.
const MAX_VIEWS: usize = 64;

impl<'a> Views<'a> {
    pub(super) fn new(builder: &Builder<'a>) -> Self {
        let mut views = Self::default();
        for (number, (named, rule)) in builder.parts.destination_rules.iter().enumerate() {
            if let Some(selector) = &rule.selector {
                views.selecting.entry(&named.key.name.namespace).or_default().insert(selector, number);
            }
        }
        views
    }

    /// The view that a pod has: its namespace's, unless rules select it.
    pub(super) fn of(&mut self, builder: &Builder<'a>, name: &ObjectName, labels: &Labels) -> Arc<str> {
        let Some((namespace, selecting)) = self.selecting.get_key_value(&*name.namespace) else { return name.namespace.clone() };
        let rules = selecting.of(labels);
        if rules.is_empty() {
            return name.namespace.clone();
        }
        if self.chosen.len() >= MAX_VIEWS && !self.chosen.values().any(|(other, chosen)| other == namespace && *chosen == rules) {
            self.refused.extend(rules);
            return name.namespace.clone();
        }
        let names = rules.iter().filter_map(|i| builder.parts.destination_rules.get(*i)).map(|(named, _)| &*named.key.name.name);
        let view: Arc<str> = format!("{namespace} ({})", names.collect::<Vec<_>>().join(", ")).into();
        self.chosen.entry(view.clone()).or_insert((namespace, rules));
        view
    }

    /// Says which rules are not in force for all they select.
    pub(super) fn finish(&self, builder: &mut Builder<'a>) {
        let named =
            self.refused.iter().filter_map(|i| builder.parts.destination_rules.get(*i)).map(|(named, _)| *named).collect::<Vec<_>>();
        for named in named {
            let message = format!(
                "spec.workloadSelector: rules select clients in more than {MAX_VIEWS} ways, so it is not in force for some; select fewer"
            );
            builder.remark(Severity::Error, named, &message);
        }
    }

    /// Those there are.
    pub(super) fn chosen(&self) -> impl Iterator<Item = (&Arc<str>, Client<'_>)> {
        self.chosen.iter().map(|(view, (namespace, rules))| (view, Client { namespace, selected_by: rules }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::config::testing::built;

    #[test]
    fn rules_that_select_clients_are_for_those_alone_and_come_first() {
        let pod = |namespace: &str, name: &str, ip: &str, app: &str| {
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "uid": name, "labels": {"app": app}},
                "status": {"podIP": ip}})
        };
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]}});
        let rule = |namespace: &str, name: &str, connections: u32, more: Value| {
            let mut rule = json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
                "metadata": {"name": name, "namespace": namespace, "creationTimestamp": format!("2026-01-{connections:02}T00:00:00Z")},
                "spec": {"host": "web.default.svc.cluster.local", "trafficPolicy": {"connectionPool": {"tcp": {"maxConnections": connections}}}}});
            more.as_object().expect("fields").iter().for_each(|(field, value)| rule["spec"][field] = value.clone());
            rule
        };
        let selects = |app: &str| json!({"workloadSelector": {"matchLabels": {"app": app}}});
        let pods = [("default", "a", "a"), ("default", "b", "b"), ("default", "c", "c"), ("other", "d", "a"), ("third", "e", "a")];
        let objects = pods.iter().enumerate().map(|(i, (namespace, name, app))| pod(namespace, name, &format!("10.0.0.{i}"), app));
        let objects = objects.chain([
            service,
            rule("default", "for-a", 3, selects("a")),
            rule("default", "all", 1, json!({})),
            rule("default", "more-for-a", 4, selects("a")),
            rule(
                "default",
                "for-b",
                5,
                json!({"workloadSelector": {"matchLabels": {"app": "b"}}, "subsets": [{"name": "v1", "labels": {"v": "1"}}]}),
            ),
            // Of another namespace: for its own clients, before the service's.
            rule("third", "for-a", 6, selects("a")),
        ]);
        let snapshot = built(&objects.collect::<Vec<_>>());
        let seen = pods.iter().map(|(_, name, _)| {
            let workload = snapshot.workloads().find(|w| &*w.name.name == *name).expect("a workload");
            let target = snapshot.resolve_for(&workload.view, "10.96.0.1:80".parse().expect("valid"));
            let crate::route::Target::Service { port, .. } = target else { panic!("no service") };
            (port.cluster.policy.tcp.max_connections, port.subsets.len(), workload.view.to_string())
        });
        let expected = [
            (Some(3), 0, "default (for-a, more-for-a)"),
            (Some(5), 1, "default (for-b)"),
            (Some(1), 0, "default"),
            (Some(1), 0, "other"),
            (Some(6), 0, "third (for-a)"),
        ];
        assert_eq!(seen.collect::<Vec<_>>(), expected.map(|(most, subsets, view)| (most, subsets, view.to_owned())));
    }
}
