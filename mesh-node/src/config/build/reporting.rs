//! Telemetry: what is told of which workload. A wider scope is refined by a narrower one, as Istio merges them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    Builder, age,
    policies::{Attached, Reaching, Scope},
};
use crate::{
    config::store::Severity,
    id::ObjectName,
    report::{AccessLog, LogTo, MOST_TAGS, Reporting, TelemetryPlan, Traces, expression::Expression},
    resource::{
        ELSEWHERE, Named, Telemetry,
        mesh_config::{Observability, observability::PROMETHEUS},
        selector::Labels,
        target::TargetRef,
        telemetry::{AccessLogging, Metrics, Mode, TagChange, Tracing},
    },
    telemetry::traffic::{Metric, MetricTags, TagPlan, TagValue},
};

/// Share of requests that begin a trace where nobody says how many: Istio's, of a million.
const SAMPLING: u32 = 10_000;

/// Telemetry by the scope it is for.
pub(super) struct Reports<'a> {
    mesh: Option<&'a Telemetry>,
    namespaces: HashMap<&'a str, &'a Telemetry>,
    /// Those for some of a namespace's workloads, oldest first.
    chosen: Vec<&'a Telemetry>,
    /// Indices into them.
    workloads: HashMap<&'a str, Reaching<'a>>,
    observability: Observability,
    /// Of the scopes that make it up, by address.
    resolved: HashMap<[Option<usize>; 3], Arc<Reporting>>,
}

/// Which side of a connection a workload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

impl Side {
    fn is_meant(self, mode: Mode) -> bool {
        matches!((self, mode), (_, Mode::ClientAndServer) | (Self::Client, Mode::Client) | (Self::Server, Mode::Server))
    }
}

impl<'a> Reports<'a> {
    pub(super) fn new(builder: &mut Builder<'a>) -> Self {
        let observability = std::mem::take(&mut builder.parts.observability);
        let mut reports = Self {
            mesh: None,
            namespaces: HashMap::new(),
            chosen: Vec::new(),
            workloads: HashMap::new(),
            observability,
            resolved: HashMap::new(),
        };
        let mut all = std::mem::take(&mut builder.parts.telemetries);
        all.sort_by_key(|(named, _)| age(named));
        for (named, telemetry) in all {
            reports.take(builder, named, telemetry);
        }
        reports
    }

    /// Called oldest first: a scope that is taken already stays as it is.
    fn take(&mut self, builder: &mut Builder<'a>, named: &'a Named, telemetry: &'a Telemetry) {
        self.check(builder, named, telemetry);
        let namespace: &str = &named.key.name.namespace;
        let root = namespace == &*builder.mesh.root_namespace;
        let everything = telemetry.targets.contains(&TargetRef::Everything);
        let selects = telemetry.selector.is_some() || !telemetry.targets.is_empty() && !everything;
        let taken = if selects {
            let scope = match &telemetry.selector {
                Some(selector) => Scope::Workloads(Some(selector)),
                None => Scope::Services(telemetry.targets.iter().filter_map(TargetRef::service).collect()),
            };
            self.workloads.entry(namespace).or_default().add(self.chosen.len(), &scope);
            self.chosen.push(telemetry);
            false
        } else if root {
            self.mesh.is_some() || self.mesh.replace(telemetry).is_some()
        } else if everything {
            let message = &format!("spec.targetRefs: {ELSEWHERE}");
            return builder.remark(Severity::Error, named, message);
        } else {
            let taken = self.namespaces.contains_key(namespace);
            self.namespaces.entry(namespace).or_insert(telemetry);
            taken
        };
        if taken {
            let message = "metadata.namespace: an older Telemetry without a selector is used for this scope; merge them into one object";
            builder.remark(Severity::Error, named, message);
        }
    }

    /// Remarks on providers that are not there.
    fn check(&self, builder: &mut Builder<'a>, named: &'a Named, telemetry: &Telemetry) {
        let known = |name: &str, kind: &str| match kind {
            "accessLogging" => self.observability.logs.iter().any(|l| &*l.name == name),
            "tracing" => self.observability.exporters.iter().any(|e| &*e.name == name),
            _ => name == PROMETHEUS || self.observability.prometheus.iter().any(|p| &**p == name),
        };
        let overrides = telemetry.metrics.iter().flat_map(|m| &m.overrides).flat_map(|o| o.tags.iter().map(|(_, change)| change));
        let asked = overrides.filter_map(|change| match change {
            TagChange::Set(expression) if expression.constant().is_none() => Some(expression),
            _ => None,
        });
        let mut different: Vec<&Arc<Expression>> = Vec::new();
        asked.for_each(|expression| {
            if !different.contains(&expression) {
                different.push(expression);
            }
        });
        if different.len() > MOST_TAGS {
            let message = format!(
                "spec.metrics: {} tags have values of requests, of which {MOST_TAGS} are kept and the rest say other; remove some",
                different.len()
            );
            builder.remark(Severity::Warning, named, &message);
        }
        let lists = telemetry.logging.iter().map(|l| ("accessLogging", &l.providers));
        let lists = lists.chain(telemetry.tracing.iter().map(|t| ("tracing", &t.providers)));
        let lists = lists.chain(telemetry.metrics.iter().map(|m| ("metrics", &m.providers)));
        let named_ones = lists.flat_map(|(kind, names)| names.iter().map(move |n| (kind, n)));
        for (kind, name) in named_ones.collect::<BTreeSet<_>>() {
            if known(name, kind) {
                continue;
            }
            let other = ["accessLogging", "tracing", "metrics"].into_iter().find(|other| *other != kind && known(name, other));
            let message = if let Some(other) = other {
                format!("spec.{kind}: provider {name:?} is one of {other}, and none for this; name another")
            } else if self.observability.others.contains(name) {
                format!("spec.{kind}: provider {name:?} is of a kind that is not honoured by this version of mesh-node")
            } else {
                format!("spec.{kind}: provider {name:?} does not exist for this; add it to extensionProviders of the mesh configuration")
            };
            builder.remark(Severity::Warning, named, &message);
        }
    }

    /// What is told of a workload.
    pub(super) fn of(&mut self, name: &ObjectName, labels: &Labels, attached: &[Attached<'_>]) -> Arc<Reporting> {
        let reaching = self.workloads.get(&*name.namespace);
        let of_services = |reaching: &Reaching<'_>| {
            let own = attached.iter().filter(|a| a.service.namespace == name.namespace);
            own.flat_map(|a| reaching.referring(&a.service.name)).copied().min()
        };
        let oldest = reaching.and_then(|r| r.selected(labels).first().copied().into_iter().chain(of_services(r)).min());
        let own = oldest.and_then(|i| self.chosen.get(i)).copied();
        let levels = [self.mesh, self.namespaces.get(&*name.namespace).copied(), own];
        let key = levels.map(|level| level.map(|t| std::ptr::from_ref(t).addr()));
        let observability = &self.observability;
        let resolved = self.resolved.entry(key).or_insert_with(|| {
            let levels = levels.into_iter().flatten().collect::<Vec<_>>();
            let told = |side| TelemetryPlan::resolve(&levels, observability, side);
            Arc::new(Reporting { client: told(Side::Client), server: told(Side::Server) })
        });
        resolved.clone()
    }
}

impl TelemetryPlan {
    fn resolve(levels: &[&Telemetry], observability: &Observability, side: Side) -> Self {
        let (tags, values) = metrics(levels, observability, side);
        Self::new(tags, values, logs(levels, observability, side), traces(levels, observability, side))
    }
}

fn metrics(levels: &[&Telemetry], observability: &Observability, side: Side) -> (TagPlan, Vec<Arc<Expression>>) {
    let is_ours = |name: &Arc<str>| **name == *PROMETHEUS || observability.prometheus.contains(name);
    let entries = levels.iter().flat_map(|t| &t.metrics).collect::<Vec<&Metrics>>();
    let named = entries.iter().rev().map(|m| &m.providers).find(|p| !p.is_empty()).unwrap_or(&observability.default_metrics);
    let mut plan = TagPlan::default();
    if !named.is_empty() && !named.iter().any(is_ours) {
        plan.metrics.iter_mut().for_each(|m| m.disabled = true);
        return (plan, Vec::new());
    }
    let mut changes: [BTreeMap<&Arc<str>, &TagChange>; Metric::ALL.len()] = Default::default();
    let ours = entries.iter().filter(|m| m.providers.is_empty() || m.providers.iter().any(is_ours));
    let mut all_off = false;
    for one in ours.flat_map(|m| &m.overrides).filter(|o| side.is_meant(o.mode)) {
        // As in Istio: who says anything else after all are off has them on again.
        all_off = one.metric.is_none() && one.disabled == Some(true);
        if all_off {
            continue;
        }
        for metric in Metric::ALL.into_iter().filter(|m| one.metric.is_none_or(|o| o == *m)) {
            if let Some(disabled) = one.disabled {
                plan.metrics[metric as usize].disabled = disabled;
            }
            changes[metric as usize].extend(one.tags.iter().map(|(name, change)| (name, change)));
        }
    }
    if all_off {
        plan.metrics.iter_mut().for_each(|m| m.disabled = true);
    }
    let mut values: Vec<Arc<Expression>> = Vec::new();
    for (tags, changes) in plan.metrics.iter_mut().zip(changes) {
        let MetricTags { removed, set, .. } = tags;
        for (name, change) in changes {
            let expression = match change {
                TagChange::Remove => {
                    removed.push(name.clone());
                    continue;
                }
                TagChange::Set(expression) => expression,
            };
            let value = if let Some(constant) = expression.constant() {
                TagValue::Constant(constant.into())
            } else if let Some(known) = values.iter().position(|v| v == expression) {
                TagValue::Dynamic(known)
            } else if values.len() < MOST_TAGS {
                values.push(expression.clone());
                TagValue::Dynamic(values.len() - 1)
            } else {
                TagValue::Constant("other".into())
            };
            set.push((name.clone(), value));
        }
    }
    plan.dynamic = values.len();
    (plan, values)
}

fn logs(levels: &[&Telemetry], observability: &Observability, side: Side) -> Vec<LogTo> {
    let find = |name: &Arc<str>| observability.logs.iter().find(|l| l.name == *name).cloned();
    let plain = |log: Arc<AccessLog>| LogTo { log, filter: None };
    let entries = levels.iter().flat_map(|t| &t.logging).filter(|l| side.is_meant(l.mode)).collect::<Vec<&AccessLogging>>();
    if levels.iter().all(|t| t.logging.is_empty()) {
        let defaults = observability.default_logs.iter().filter_map(find);
        let defaults = defaults.collect::<Vec<_>>();
        // Default providers come in place of the mesh's own file.
        let everywhere = observability.everywhere.iter().filter(|_| defaults.is_empty()).cloned();
        return everywhere.chain(defaults.iter().cloned()).map(plain).collect();
    }
    // The narrowest scope that names providers says which there are, in all it has; who names none means those of the wider one.
    let named = levels.iter().rev().map(|t| {
        let entries = t.logging.iter().filter(|l| side.is_meant(l.mode));
        entries.flat_map(|l| &l.providers).collect::<BTreeSet<_>>()
    });
    let in_force = named.into_iter().find(|all| !all.is_empty()).unwrap_or_else(|| observability.default_logs.iter().collect());
    let mut found: BTreeMap<&Arc<str>, Option<Arc<Expression>>> = BTreeMap::new();
    let mut parents = &observability.default_logs;
    for entry in entries {
        if !entry.providers.is_empty() {
            parents = &entry.providers;
        }
        for provider in parents.iter().filter(|p| in_force.contains(*p)) {
            if entry.disabled {
                found.remove(provider);
            } else if entry.filter.is_none() && entry.providers.is_empty() {
                // It says nothing of what is told.
                found.entry(provider).or_default();
            } else {
                found.insert(provider, entry.filter.clone());
            }
        }
    }
    found.into_iter().filter_map(|(name, filter)| Some(LogTo { log: find(name)?, filter })).collect()
}

fn traces(levels: &[&Telemetry], observability: &Observability, side: Side) -> Option<Traces> {
    let entries = levels.iter().flat_map(|t| &t.tracing).filter(|t| side.is_meant(t.mode)).collect::<Vec<&Tracing>>();
    let named = entries.iter().rev().map(|t| &t.providers).find(|p| !p.is_empty()).unwrap_or(&observability.default_traces);
    // Istio uses one; the first.
    let exporter = observability.exporters.iter().find(|e| named.first() == Some(&e.name))?.clone();
    let last = |of: &dyn Fn(&Tracing) -> Option<u32>| entries.iter().rev().find_map(|t| of(t));
    Some(Traces {
        exporter,
        sampling: last(&|t| t.sampling).or(observability.sampling).unwrap_or(SAMPLING),
        reported: !entries.iter().rev().find_map(|t| t.disabled).unwrap_or(false),
        tags: entries.iter().rev().find_map(|t| t.tags.clone()).unwrap_or_else(|| observability.tags.clone()),
    })
}

#[cfg(test)]
mod tests;
