//! Lines of logs on their way to files or standard output, each file written by a thread of its own: access logs, and the log of the
//! process.
//!
//! Who logs never waits for a file: a line is copied to the others that wait, or, where there is no room, dropped and counted. They
//! are written together, a twentieth of a second after the first at the latest. A file that was moved away is opened anew; who
//! writes a file that nothing has come for in ten minutes ends.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::{counter::Counter, family::Family};

use super::ResultLabels;
use crate::problems;

/// Most bytes of lines that wait for one file; as many may be about to be written.
const BYTES: usize = 16 * 1024 * 1024;
/// Most files. Providers are configuration: there are few.
const FILES: usize = 32;
/// How long lines wait for more, so that who writes them is not woken for each.
const GATHER: Duration = Duration::from_millis(50);
/// So many bytes do not wait longer.
const ENOUGH: usize = 1024 * 1024;
/// How often it is looked whether a file is still where it was, and how long a file may be out of use.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
const UNUSED: Duration = Duration::from_mins(10);

/// Logs, by the files they go to.
#[derive(Debug)]
pub struct Lines {
    /// By name: few, so that looking through them is fastest.
    files: ArcSwap<Vec<(Arc<str>, Arc<Queue>)>>,
    opening: Mutex<()>,
    lines: Family<ResultLabels, Counter>,
    dropped: Counter,
}

/// What waits for one file.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// Something waits, there is enough, or somebody waits for it to be written.
    news: Condvar,
    /// All that had come was written.
    written: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    lines: u64,
    /// Lines that came, and lines that are done with.
    come: u64,
    gone: u64,
    hurry: bool,
    /// Nobody writes any more.
    over: bool,
}

impl Queue {
    /// Takes a line, or says that there is no room. None when nobody writes any more.
    fn take(&self, line: &[u8]) -> Option<bool> {
        let mut waiting = self.waiting.lock();
        if waiting.over {
            return None;
        }
        let before = waiting.text.len();
        if before + line.len() > BYTES {
            return Some(false);
        }
        waiting.text.extend_from_slice(line);
        waiting.lines += 1;
        waiting.come += 1;
        let enough = before < ENOUGH && waiting.text.len() >= ENOUGH;
        drop(waiting);
        if before == 0 || enough {
            self.news.notify_one();
        }
        Some(true)
    }
}

fn find<'f>(files: &'f [(Arc<str>, Arc<Queue>)], path: &Arc<str>) -> Option<&'f Arc<Queue>> {
    files.iter().find(|(name, _)| Arc::ptr_eq(name, path) || name == path).map(|(_, queue)| queue)
}

impl Lines {
    /// Counts lines in `lines`: `written`, `dropped` and `failed`.
    pub fn new(lines: Family<ResultLabels, Counter>) -> Self {
        let dropped = lines.get_or_create(&ResultLabels { result: "dropped" }).clone();
        Self { files: ArcSwap::default(), opening: Mutex::new(()), lines, dropped }
    }

    /// Puts a line on its way to a file, `/dev/stdout` or `/dev/stderr`.
    pub fn write(&self, path: &Arc<str>, line: &[u8]) {
        let taken = find(&self.files.load(), path).and_then(|queue| queue.take(line));
        // One whose writer has ended is followed by another.
        let taken = taken.or_else(|| self.open(path)?.take(line));
        if taken != Some(true) {
            self.dropped.inc();
        }
    }

    fn open(&self, path: &Arc<str>) -> Option<Arc<Queue>> {
        let _one_at_a_time = self.opening.lock();
        let mut files = Vec::clone(&self.files.load());
        files.retain(|(_, queue)| !queue.waiting.lock().over);
        if let Some(queue) = find(&files, path) {
            return Some(queue.clone());
        }
        if files.len() >= FILES {
            return None;
        }
        let queue = Arc::<Queue>::default();
        let counter = |result| self.lines.get_or_create(&ResultLabels { result }).clone();
        let writer = Writer {
            target: Target::of(path),
            path: path.clone(),
            queue: queue.clone(),
            written: counter("written"),
            failed: counter("failed"),
            looked: Instant::now(),
            used: Instant::now(),
            told: false,
        };
        let thread = std::thread::Builder::new().name("log".to_owned());
        if let Err(error) = thread.spawn(move || writer.run()) {
            complain(&format!("no log is written to {path}: its thread cannot be started: {error}"));
            return None;
        }
        files.push((path.clone(), queue.clone()));
        self.files.store(Arc::new(files));
        Some(queue)
    }

    /// Waits until all that was put on its way is written, at most this long. Blocks.
    pub fn flush(&self, most: Duration) {
        let until = Instant::now() + most;
        let all = self.files.load();
        for (_, queue) in all.iter() {
            queue.waiting.lock().hurry = true;
            queue.news.notify_one();
        }
        for (_, queue) in all.iter() {
            let mut waiting = queue.waiting.lock();
            let come = waiting.come;
            let left = until.saturating_duration_since(Instant::now());
            // Late is as good as never here.
            queue.written.wait_while_for(&mut waiting, |w| w.gone < come && !w.over, left);
        }
    }
}

enum Target {
    Stdout,
    Stderr,
    File {
        path: Arc<str>,
        open: Option<File>,
        /// It ends within a line that could not be written whole.
        torn: bool,
    },
}

impl Target {
    fn of(path: &Arc<str>) -> Self {
        match &**path {
            "/dev/stdout" | "/proc/self/fd/1" => Self::Stdout,
            "/dev/stderr" | "/proc/self/fd/2" => Self::Stderr,
            _ => Self::File { path: path.clone(), open: None, torn: false },
        }
    }

    fn write(&mut self, batch: &[u8]) -> io::Result<()> {
        match self {
            // With the lock of others that write there, so that lines stay whole, and not for long.
            Self::Stdout => pieces(batch).try_for_each(|piece| {
                let mut out = io::stdout().lock();
                out.write_all(piece)?;
                out.flush()
            }),
            Self::Stderr => pieces(batch).try_for_each(|piece| io::stderr().lock().write_all(piece)),
            Self::File { path, open, torn } => {
                let file = if let Some(file) = open {
                    file
                } else {
                    let file = open.insert(OpenOptions::new().create(true).append(true).open(&**path)?);
                    *torn &= file.metadata()?.len() > 0;
                    file
                };
                if std::mem::take(torn)
                    && let Err(error) = file.write_all(b"\n")
                {
                    *torn = true;
                    return Err(error);
                }
                let before = file.metadata()?.len();
                file.write_all(batch).inspect_err(|_| *torn = file.metadata().is_ok_and(|now| now.len() > before))
            }
        }
    }

    /// Lets go of a file that is not the one of its name any more.
    fn look(&mut self) {
        if let Self::File { path, open, torn } = self
            && let Some(file) = open
        {
            let inode = |m: io::Result<std::fs::Metadata>| m.ok().map(|m| (m.dev(), m.ino()));
            if inode(Path::new(&**path).metadata()) != inode(file.metadata()) {
                (*open, *torn) = (None, false);
            }
        }
    }
}

/// Says what a log cannot. Where that cannot be said either, nothing is left to say it with.
fn complain(what: &str) {
    let _ = writeln!(io::stderr(), "mesh-node: {what}");
}

/// Whole lines of so many bytes; more if there is no end of a line among them.
fn pieces(mut batch: &[u8]) -> impl Iterator<Item = &[u8]> {
    const PIECE: usize = 64 * 1024;
    std::iter::from_fn(move || {
        let end = |range: &[u8]| range.iter().rposition(|b| *b == b'\n').map(|at| at + 1);
        let cut = if batch.len() <= PIECE {
            batch.len()
        } else {
            end(&batch[..PIECE]).or_else(|| batch.iter().position(|b| *b == b'\n').map(|at| at + 1)).unwrap_or(batch.len())
        };
        let (piece, rest) = batch.split_at(cut);
        batch = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

struct Writer {
    target: Target,
    path: Arc<str>,
    queue: Arc<Queue>,
    written: Counter,
    failed: Counter,
    looked: Instant,
    used: Instant,
    /// That it cannot be written has been said.
    told: bool,
}

impl Writer {
    fn run(mut self) {
        let queue = self.queue.clone();
        let mut batch = Vec::new();
        loop {
            let lines = {
                let mut waiting = queue.waiting.lock();
                queue.news.wait_while_for(&mut waiting, |w| w.text.is_empty() && !w.hurry, CHECK_INTERVAL);
                queue.news.wait_while_for(&mut waiting, |w| !w.text.is_empty() && w.text.len() < ENOUGH && !w.hurry, GATHER);
                std::mem::swap(&mut batch, &mut waiting.text);
                waiting.hurry = false;
                if batch.is_empty() && self.used.elapsed() >= UNUSED {
                    waiting.over = true;
                    self.recover();
                    return;
                }
                std::mem::take(&mut waiting.lines)
            };
            if self.looked.elapsed() >= CHECK_INTERVAL {
                self.target.look();
                self.looked = Instant::now();
            }
            if lines > 0 {
                self.write(&batch, lines);
                self.used = Instant::now();
                // A burst is not kept for ever.
                if batch.capacity() > 4 * ENOUGH {
                    batch = Vec::new();
                }
                batch.clear();
            }
            queue.waiting.lock().gone += lines;
            queue.written.notify_all();
        }
    }

    /// It is written again, or nobody wants it to be any more.
    fn recover(&mut self) {
        if std::mem::take(&mut self.told) {
            problems::solved(problems::Kind::Log, &self.path);
        }
    }

    fn write(&mut self, batch: &[u8], lines: u64) {
        match self.target.write(batch) {
            Ok(()) => {
                self.written.inc_by(lines);
                self.recover();
            }
            Err(error) => {
                self.failed.inc_by(lines);
                if !self.told {
                    let what = format!("no log is written to {}: {error}", self.path);
                    complain(&what);
                    problems::found(problems::Kind::Log, &self.path, what);
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

    fn counted(logs: &Lines, result: &'static str) -> u64 {
        logs.lines.get_or_create(&ResultLabels { result }).get()
    }

    #[test]
    fn lines_are_written_in_order_and_a_moved_file_is_opened_anew() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("access.log");
        let name: Arc<str> = path.to_str().expect("UTF-8").into();
        let logs = Lines::new(Family::default());
        (0..1000).for_each(|i| logs.write(&name, format!("{i}\n").as_bytes()));
        logs.flush(Duration::from_secs(5));
        let read = std::fs::read_to_string(&path).expect("a file");
        assert_eq!(read, (0..1000).map(|i| format!("{i}\n")).collect::<Vec<_>>().concat());
        std::fs::rename(&path, directory.path().join("old")).expect("moved");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !path.exists() {
            assert!(Instant::now() < deadline, "the file is not opened anew");
            logs.write(&name, b"again\n");
            logs.flush(Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(counted(&logs, "written") > 1000 && counted(&logs, "dropped") == 0);
    }

    #[test]
    fn pieces_are_of_whole_lines() {
        let line = |n: usize| format!("{}\n", "x".repeat(n));
        let batch = [line(40_000), line(30_000), line(100_000), line(1), "end".to_owned()].concat();
        let pieces = pieces(batch.as_bytes()).map(<[u8]>::len).collect::<Vec<_>>();
        assert_eq!(pieces, [40_001, 30_001, 100_001, 5]);
        assert_eq!(super::pieces(b"").count(), 0);
    }

    #[test]
    fn what_follows_half_a_line_begins_with_one_of_its_own() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("log");
        std::fs::write(&path, "{\"half\"").expect("written");
        let mut target = Target::of(&path.to_str().expect("UTF-8").into());
        let Target::File { torn, .. } = &mut target else { panic!("a file") };
        *torn = true;
        [b"one\n", b"two\n"].into_iter().for_each(|line| target.write(line).expect("written"));
        assert_eq!(std::fs::read_to_string(&path).expect("text"), "{\"half\"\none\ntwo\n");
    }

    #[test]
    fn what_cannot_be_written_is_counted() {
        let logs = Lines::new(Family::default());
        let nowhere: Arc<str> = "/nowhere/at/all".into();
        logs.write(&nowhere, b"x\n");
        logs.flush(Duration::from_secs(5));
        assert_eq!((counted(&logs, "failed"), counted(&logs, "written")), (1, 0));
        let told = |path: &str| problems::all().iter().any(|(kind, text)| *kind == problems::Kind::Log && text.contains(path));
        assert!(told("/nowhere/at/all"));
        let directory = tempfile::tempdir().expect("a directory");
        let late: Arc<str> = directory.path().join("late/log").to_str().expect("UTF-8").into();
        logs.write(&late, b"x\n");
        logs.flush(Duration::from_secs(5));
        assert!(told(&late));
        std::fs::create_dir(directory.path().join("late")).expect("made");
        logs.write(&late, b"y\n");
        logs.flush(Duration::from_secs(5));
        assert!(!told(&late), "it is written again");
        for i in 0..FILES + 3 {
            logs.write(&format!("/nowhere/{i}").into(), b"x\n");
        }
        assert_eq!(counted(&logs, "dropped"), 5, "there are no more than so many files");
    }

    #[test]
    fn a_line_too_many_is_dropped_and_counted() {
        // A pipe nobody reads: the writer stands still.
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a pipe");
        let name: Arc<str> = path.to_str().expect("UTF-8").into();
        let logs = Lines::new(Family::default());
        let line = b"x".repeat(8 * 1024);
        let began = Instant::now();
        // What is being written waits no more: as much again comes in its place.
        (0..8000).for_each(|_| logs.write(&name, &line));
        assert!(counted(&logs, "dropped") > 1000 && began.elapsed() < Duration::from_secs(5), "nobody waits");
    }
}
