//! Access logs: lines on their way to files or standard output, each written by a thread of its own.
//!
//! Who logs never waits: what there is no room for is dropped and counted. A file that was moved away is opened anew.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use prometheus_client::metrics::{counter::Counter, family::Family};

use super::ResultLabels;

/// Most lines, and most bytes of them, that wait for one file.
const LINES: usize = 16 * 1024;
const BYTES: usize = 16 * 1024 * 1024;
/// Most files. Providers are configuration: there are few.
const FILES: usize = 32;
/// How often it is looked whether a file is still where it was.
const LOOK: Duration = Duration::from_secs(1);
/// Most that is written at once.
const BATCH: usize = 256 * 1024;

/// All access logs of the process.
#[derive(Debug)]
pub struct AccessLogs {
    files: ArcSwap<HashMap<Arc<str>, Arc<Queue>>>,
    opening: Mutex<()>,
    lines: Family<ResultLabels, Counter>,
    dropped: Counter,
}

#[derive(Debug)]
struct Queue {
    lines: SyncSender<Said>,
    bytes: Arc<AtomicUsize>,
}

enum Said {
    Line(String),
    /// Answered when all before it is written.
    Flush(SyncSender<()>),
}

impl AccessLogs {
    /// Counts lines in `lines`: `written`, `dropped` and `failed`.
    pub fn new(lines: Family<ResultLabels, Counter>) -> Self {
        let dropped = lines.get_or_create(&ResultLabels { result: "dropped" }).clone();
        Self { files: ArcSwap::default(), opening: Mutex::new(()), lines, dropped }
    }

    /// Puts a line on its way to a file, `/dev/stdout` or `/dev/stderr`.
    pub fn write(&self, path: &Arc<str>, line: String) {
        let Some(queue) = self.queue(path) else {
            self.dropped.inc();
            return;
        };
        let n = line.len();
        if queue.bytes.fetch_add(n, Ordering::Relaxed) > BYTES || queue.lines.try_send(Said::Line(line)).is_err() {
            queue.bytes.fetch_sub(n, Ordering::Relaxed);
            self.dropped.inc();
        }
    }

    fn queue(&self, path: &Arc<str>) -> Option<Arc<Queue>> {
        if let Some(queue) = self.files.load().get(path) {
            return Some(queue.clone());
        }
        let _one_at_a_time = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = HashMap::clone(&self.files.load());
        if let Some(queue) = files.get(path) {
            return Some(queue.clone());
        }
        if files.len() >= FILES {
            return None;
        }
        let (lines, said) = sync_channel(LINES);
        let bytes = Arc::new(AtomicUsize::new(0));
        let counter = |result| self.lines.get_or_create(&ResultLabels { result }).clone();
        let writer = Writer {
            target: Target::of(path),
            bytes: bytes.clone(),
            written: counter("written"),
            failed: counter("failed"),
            looked: Instant::now(),
            told: false,
        };
        let thread = std::thread::Builder::new().name("access-log".to_owned());
        if let Err(error) = thread.spawn(move || writer.run(&said)) {
            tracing::error!(target: "app", %error, path = &**path, "no access log is written: its thread cannot be started");
            return None;
        }
        let queue = Arc::new(Queue { lines, bytes });
        files.insert(path.clone(), queue.clone());
        self.files.store(Arc::new(files));
        Some(queue)
    }

    /// Waits until all that was put on its way is written, at most this long for each file. Blocks.
    pub fn flush(&self, most: Duration) {
        for queue in self.files.load().values() {
            let (done, wait) = sync_channel(1);
            if queue.lines.try_send(Said::Flush(done)).is_ok() {
                // Late is as good as never here.
                let _ = wait.recv_timeout(most);
            }
        }
    }
}

enum Target {
    Stdout,
    Stderr,
    File { path: Arc<str>, open: Option<File> },
}

impl Target {
    fn of(path: &Arc<str>) -> Self {
        match &**path {
            "/dev/stdout" | "/proc/self/fd/1" => Self::Stdout,
            "/dev/stderr" | "/proc/self/fd/2" => Self::Stderr,
            _ => Self::File { path: path.clone(), open: None },
        }
    }

    fn write(&mut self, batch: &[u8]) -> io::Result<()> {
        match self {
            // With the lock of the process' other logs, so that lines stay whole.
            Self::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(batch)?;
                out.flush()
            }
            Self::Stderr => io::stderr().lock().write_all(batch),
            Self::File { path, open } => {
                let file = match open {
                    Some(file) => file,
                    None => open.insert(OpenOptions::new().create(true).append(true).open(&**path)?),
                };
                file.write_all(batch)
            }
        }
    }

    /// Lets go of a file that is not the one of its name any more.
    fn look(&mut self) {
        if let Self::File { path, open } = self
            && let Some(file) = open
        {
            let inode = |m: io::Result<std::fs::Metadata>| m.ok().map(|m| (m.dev(), m.ino()));
            if inode(Path::new(&**path).metadata()) != inode(file.metadata()) {
                *open = None;
            }
        }
    }
}

struct Writer {
    target: Target,
    bytes: Arc<AtomicUsize>,
    written: Counter,
    failed: Counter,
    looked: Instant,
    /// That it cannot be written has been said.
    told: bool,
}

impl Writer {
    fn run(mut self, said: &Receiver<Said>) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let mut waiting = Vec::new();
            let first = match said.recv_timeout(LOOK) {
                Ok(first) => Some(first),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let mut lines = 0;
            let more = std::iter::from_fn(|| said.try_recv().ok());
            for said in first.into_iter().chain(more) {
                match said {
                    Said::Line(line) => {
                        batch.extend_from_slice(line.as_bytes());
                        lines += 1;
                    }
                    Said::Flush(done) => waiting.push(done),
                }
                if batch.len() >= BATCH {
                    break;
                }
            }
            if self.looked.elapsed() >= LOOK {
                self.target.look();
                self.looked = Instant::now();
            }
            if lines > 0 {
                self.write(&batch, lines);
                self.bytes.fetch_sub(batch.len(), Ordering::Relaxed);
                batch.clear();
            }
            for done in waiting {
                // Who asked may have gone.
                let _ = done.try_send(());
            }
        }
    }

    fn write(&mut self, batch: &[u8], lines: u64) {
        match self.target.write(batch) {
            Ok(()) => {
                self.written.inc_by(lines);
                self.told = false;
            }
            Err(error) => {
                self.failed.inc_by(lines);
                if !self.told {
                    tracing::error!(target: "app", %error, "an access log cannot be written");
                    self.told = true;
                }
                if let Target::File { open, .. } = &mut self.target {
                    *open = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(logs: &AccessLogs, result: &'static str) -> u64 {
        logs.lines.get_or_create(&ResultLabels { result }).get()
    }

    #[test]
    fn lines_are_written_in_order_and_a_moved_file_is_opened_anew() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("access.log");
        let name: Arc<str> = path.to_str().expect("UTF-8").into();
        let logs = AccessLogs::new(Family::default());
        (0..1000).for_each(|i| logs.write(&name, format!("{i}\n")));
        logs.flush(Duration::from_secs(5));
        let read = std::fs::read_to_string(&path).expect("a file");
        assert_eq!(read, (0..1000).map(|i| format!("{i}\n")).collect::<Vec<_>>().concat());
        std::fs::rename(&path, directory.path().join("old")).expect("moved");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !path.exists() {
            assert!(Instant::now() < deadline, "the file is not opened anew");
            logs.write(&name, "again\n".to_owned());
            logs.flush(Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(counted(&logs, "written") > 1000 && counted(&logs, "dropped") == 0);
    }

    #[test]
    fn what_cannot_be_written_is_counted() {
        let logs = AccessLogs::new(Family::default());
        let nowhere: Arc<str> = "/nowhere/at/all".into();
        logs.write(&nowhere, "x\n".to_owned());
        logs.flush(Duration::from_secs(5));
        assert_eq!((counted(&logs, "failed"), counted(&logs, "written")), (1, 0));
        for i in 0..FILES + 3 {
            logs.write(&format!("/nowhere/{i}").into(), "x\n".to_owned());
        }
        assert_eq!(counted(&logs, "dropped"), 4, "there are no more than so many files");
    }

    #[test]
    fn a_line_too_many_is_dropped_and_counted() {
        // A pipe nobody reads: the writer stands still.
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a pipe");
        let name: Arc<str> = path.to_str().expect("UTF-8").into();
        let logs = AccessLogs::new(Family::default());
        let line = "x".repeat(8 * 1024);
        let began = Instant::now();
        (0..4000).for_each(|_| logs.write(&name, line.clone()));
        assert!(counted(&logs, "dropped") > 1000 && began.elapsed() < Duration::from_secs(5), "nobody waits");
    }
}
