//! What Prometheus' client libraries tell of a process, by their names: descriptors, memory, time. Read from `/proc` when asked.

use std::fmt;

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// This process.
#[derive(Debug)]
pub struct Process;

/// Fields of `/proc/self/stat` behind the command, by their numbers in `proc_pid_stat(5)`.
struct Stat<'s>(Vec<&'s str>);

impl Stat<'_> {
    fn of(text: &str) -> Stat<'_> {
        // The command may have anything in it, even a parenthesis: the last ends it.
        let (_, behind) = text.rsplit_once(')').unwrap_or_default();
        Stat(behind.split_ascii_whitespace().collect())
    }

    fn field(&self, number: usize) -> Option<u64> {
        self.0.get(number.checked_sub(3)?)?.parse().ok()
    }
}

/// When the machine started, seconds since the epoch.
fn booted() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: Option<u64>| match value.and_then(|v| i64::try_from(v).ok()) {
            Some(value) => {
                let metric = ConstGauge::new(value);
                metric.encode(encoder.encode_descriptor(name, help, None, prometheus_client::metrics::MetricType::Gauge)?)
            }
            None => Ok(()),
        };
        // The one it is counted with is not counted.
        let open = std::fs::read_dir("/proc/self/fd").ok().map(|all| (all.count() as u64).saturating_sub(1));
        gauge("process_open_fds", "Open file descriptors", open)?;
        gauge("process_max_fds", "Most open file descriptors", getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft))?;
        let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let stat = Stat::of(&text);
        let of = |what| sysconf(what).ok().flatten().and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
        let (page, tick) = (of(SysconfVar::PAGE_SIZE), of(SysconfVar::CLK_TCK));
        gauge("process_virtual_memory_bytes", "Virtual memory", stat.field(23))?;
        gauge("process_resident_memory_bytes", "Resident memory", stat.field(24).zip(page).map(|(pages, size)| pages * size))?;
        gauge("process_threads", "Threads", stat.field(20))?;
        let since_boot = stat.field(22).zip(tick).map(|(ticks, tick)| ticks / tick);
        gauge(
            "process_start_time_seconds",
            "When it started, since the epoch",
            since_boot.zip(booted()).map(|(since, boot)| boot + since),
        )?;
        if let (Some(user), Some(system), Some(tick)) = (stat.field(14), stat.field(15), tick) {
            #[expect(clippy::cast_precision_loss, reason = "ticks of a hundredth of a second for less than a million years")]
            let seconds = ConstCounter::new((user + system) as f64 / tick as f64);
            let kind = prometheus_client::metrics::MetricType::Counter;
            seconds.encode(encoder.encode_descriptor("process_cpu_seconds", "Processor time, user and system", None, kind)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::{encoding::text::encode, registry::Registry};

    use super::*;

    #[test]
    fn a_process_is_told_of() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process));
        let values = || {
            let mut text = String::new();
            encode(&mut text, &registry).expect("encoded");
            let value = |line: &str| line.split_once(' ').and_then(|(name, value)| Some((name.to_owned(), value.parse::<f64>().ok()?)));
            text.lines().filter(|l| !l.starts_with('#')).filter_map(value).collect::<std::collections::BTreeMap<_, _>>()
        };
        let before = values();
        let held = (0..10).map(|_| std::fs::File::open("/proc/self/stat").expect("a file")).collect::<Vec<_>>();
        let after = values();
        // Other tests open and close files too.
        assert!(after["process_open_fds"] >= before["process_open_fds"] + 5.0, "{before:?} {after:?}");
        assert!(after["process_max_fds"] >= after["process_open_fds"]);
        assert!(
            after["process_resident_memory_bytes"] > 1e6 && after["process_virtual_memory_bytes"] > after["process_resident_memory_bytes"]
        );
        assert!(after["process_threads"] >= 1.0 && after.contains_key("process_cpu_seconds_total"), "{after:?}");
        drop(held);
    }

    #[test]
    fn commands_may_be_called_anything() {
        let text = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13";
        assert_eq!((Stat::of(text).field(4), Stat::of(text).field(14), Stat::of(text).field(99)), (Some(1), Some(11), None));
        assert_eq!(Stat::of("").field(14), None);
    }
}
