//! The log of the process: what is logged, changed while it runs, and its way to standard output.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::metrics::{counter::Counter, family::Family};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use super::{Lines, ResultLabels, events::Form};

/// Changes what is logged while the process runs.
struct LogControl {
    /// What it was started with.
    first: String,
    now: Mutex<String>,
    set: Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>,
}

static LOG: OnceLock<LogControl> = OnceLock::new();

/// The process' own log, on its way to standard output. Who logs does not wait for who reads it.
struct Out {
    path: Arc<str>,
    counted: Family<ResultLabels, Counter>,
    lines: Lines,
}

impl Out {
    fn get() -> &'static Self {
        OUT.get_or_init(|| {
            let counted = Family::default();
            Self { path: "/dev/stdout".into(), lines: Lines::new(counted.clone()), counted }
        })
    }
}

static OUT: OnceLock<Out> = OnceLock::new();

impl std::io::Write for &Out {
    /// One event, with the end of its line.
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        self.lines.write(&self.path, event);
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Lines of the log, by what became of them.
pub(super) fn counted() -> Family<ResultLabels, Counter> {
    Out::get().counted.clone()
}

/// Waits until what has been logged is written, a moment at most. Blocks.
pub fn flush() {
    if let Some(out) = OUT.get() {
        out.lines.flush(Duration::from_millis(500));
    }
}

/// Starts logging to standard output. `filter` is in the syntax of `RUST_LOG`.
pub fn start(filter: &str, json: bool) -> Result<(), String> {
    let parsed = parsed(filter)?;
    let form = if json { Form::Json } else { Form::Text };
    let builder = tracing_subscriber::fmt().event_format(form).with_env_filter(parsed).with_writer(Out::get);
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        flush();
        told(panic);
    }));
    let builder = builder.with_filter_reloading();
    let handle = builder.reload_handle();
    builder.try_init().map_err(|e| e.to_string())?;
    let set = Box::new(move |filter| handle.reload(filter).map_err(|e| e.to_string()));
    // There is one log, started once.
    let _ = LOG.set(LogControl { first: filter.to_owned(), now: Mutex::new(filter.to_owned()), set });
    Ok(())
}

/// Targets of what is logged here, and libraries whose own events can be asked for.
const TARGETS: [&str; 20] = [
    "access",
    "admin",
    "app",
    "audit",
    "ca",
    "capture",
    "config",
    "hbone",
    "identity",
    "jwks",
    "proxy",
    "traces",
    "aya",
    "h2",
    "hyper",
    "hyper_util",
    "mesh_node",
    "rustls",
    "tokio",
    "tower",
];

fn parsed(filter: &str) -> Result<EnvFilter, String> {
    // A word alone is a target whose every event is logged, and of all others nothing: hardly what is meant by a level that is misspelt.
    let odd = |clause: &&str| !clause.contains(['=', '[', ']', '{', '}']) && clause.parse::<LevelFilter>().is_err();
    if let Some(clause) = filter.split(',').map(str::trim).filter(|c| !c.is_empty()).find(odd) {
        return Err(format!(
            "log filter {filter:?}: {clause:?} is no level (off, error, warn, info, debug, trace); of a target, say {clause}=debug"
        ));
    }
    let target = |clause: &str| clause.split(['=', '[', ':']).next().unwrap_or_default().trim().to_owned();
    let unknown = |clause: &str| clause.contains(['=', '[']) && !target(clause).is_empty() && !TARGETS.contains(&&*target(clause));
    if let Some(clause) = filter.split(',').map(str::trim).find(|c| unknown(c)) {
        return Err(format!("log filter {filter:?}: nothing is logged with target {:?}; there are {}", target(clause), TARGETS.join(", ")));
    }
    EnvFilter::try_new(filter).map_err(|e| format!("log filter {filter:?}: {e}"))
}

/// What is logged now; none when nothing is.
pub fn filter() -> Option<String> {
    LOG.get().map(|log| log.now.lock().clone())
}

/// Changes what is logged, as ztunnel does: `filter` counts beside what is logged now; with `reset`, beside what was at first. Says what it is
/// then.
pub fn set_filter(reset: bool, filter: &str) -> Result<String, String> {
    let log = LOG.get().ok_or("the process does not log")?;
    let before = if reset { log.first.clone() } else { log.now.lock().clone() };
    let filter = beside(&before, filter);
    (log.set)(parsed(&filter)?)?;
    filter.clone_into(&mut log.now.lock());
    Ok(filter)
}

/// One filter beside another, whose clauses count where both have one for the same.
fn beside(before: &str, filter: &str) -> String {
    let clauses = |filter: &str| filter.split(',').map(str::trim).filter(|c| !c.is_empty()).map(as_directive).collect::<Vec<_>>();
    let subject = |clause: &str| clause.rsplit_once('=').map_or_else(String::new, |(subject, _)| subject.to_owned());
    let mut all: Vec<String> = Vec::new();
    for clause in clauses(before).into_iter().chain(clauses(filter)) {
        all.retain(|other| subject(other) != subject(&clause));
        all.push(clause);
    }
    all.join(",")
}

/// `target:level`, as istioctl has it, as `target=level`; ztunnel's targets are those without its name before them.
fn as_directive(clause: &str) -> String {
    let clause = clause.strip_prefix("ztunnel::").unwrap_or(clause);
    match clause.rsplit_once(':') {
        Some((target, level)) if !target.ends_with(':') && !target.contains('=') && level.parse::<LevelFilter>().is_ok() => {
            format!("{target}={level}")
        }
        _ => clause.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_logged_beside_the_rest() {
        for (before, asked, expected) in [
            ("info", "proxy=debug", "info,proxy=debug"),
            ("info", "proxy:debug", "info,proxy=debug"),
            ("info", "ztunnel::proxy=debug,ztunnel::access:warn", "info,proxy=debug,access=warn"),
            ("info,proxy=debug", "proxy=off", "info,proxy=off"),
            ("info,proxy=debug", "debug", "proxy=debug,debug"),
            ("info,proxy=debug", ",,,", "info,proxy=debug"),
        ] {
            assert_eq!(beside(before, asked), expected, "{before} and {asked}");
        }
    }

    #[test]
    fn levels_that_are_misspelt_are_refused() {
        for filter in ["info", "access=debug,info", "OFF", "", "proxy=trace,[span{a=1}]=debug,warn", "proxy[span]"] {
            assert!(parsed(filter).is_ok(), "{filter}");
        }
        for filter in ["prxy=debug", "ztunnel::proxy=debug", "info,acces[x]=trace"] {
            let error = parsed(filter).expect_err(filter);
            assert!(error.contains("nothing is logged with target"), "{error}");
        }
        for filter in ["debgu", "info,proxy", "access:debug,nonsense"] {
            let error = parsed(filter).expect_err(filter);
            assert!(error.contains("is no level"), "{error}");
        }
    }
}
