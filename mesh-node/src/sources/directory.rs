//! A directory of Kubernetes YAML as the source: what people have, without a cluster.
//!
//! Every `*.yaml`, `*.yml` and `*.json` below the directory is read; hidden files are not. Changes are noticed through
//! inotify and, where that does not reach (network file systems, symbolic links), by looking again every few seconds.
//! All files that changed together take effect together. A file some process has open for writing is not read until it
//! is closed, so a half-written file never takes effect; neither does one that changes while it is read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use super::{
    last_good::{LastGood, Quality},
    manifest::{self, MAX_FILE, Namespaces},
    watch::{MAX_DEPTH, Watch},
};
use crate::config::{
    Batch,
    store::{Change, Content, Origin},
};

/// Files in all directories below the root.
const MAX_FILES: usize = 100_000;
/// How often all that has changed is read at most until it stands still meanwhile.
const MOST_READINGS: usize = 3;
/// How often a file that is being written is looked at again.
const PENDING: Duration = Duration::from_millis(50);
/// After how long one that somebody has open for writing is remarked on, and looked at as others are.
const TOO_LONG: Duration = Duration::from_secs(5);
/// How long the first reading waits for files that are being written.
const FIRST_WAIT: Duration = Duration::from_secs(2);
/// How often everything is looked at without having been told to.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Tells one version of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Version {
    inode: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What a look found at a path: a version of a file, or why there is no telling.
type Seen = Result<Version, String>;

/// Watches one directory.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    default_namespace: String,
    root_namespace: String,
    known: BTreeMap<PathBuf, Seen>,
    last_good: LastGood,
    /// Files whose last good version stands in for one that is being written.
    stood_in: BTreeSet<PathBuf>,
    /// Since when files are being written, and whether that has been said.
    written: BTreeMap<PathBuf, (Instant, bool)>,
    /// It holds more files than are read.
    overfull: bool,
}

/// One look at the directory.
#[derive(Debug, Default)]
struct Look {
    changes: Vec<Change>,
    /// Files that are being written.
    pending: usize,
    /// Whether the directory itself cannot be read.
    unreadable: bool,
}

impl Directory {
    /// A source for an existing directory, whose last good contents are kept in another. `root_namespace`: the mesh's own.
    pub fn open(root: &Path, last_good: LastGood, default_namespace: &str, root_namespace: &str) -> io::Result<Self> {
        fs::read_dir(root)?;
        Ok(Self {
            root: root.to_owned(),
            default_namespace: default_namespace.to_owned(),
            root_namespace: root_namespace.to_owned(),
            known: BTreeMap::new(),
            last_good,
            stood_in: BTreeSet::new(),
            written: BTreeMap::new(),
            overfull: false,
        })
    }

    /// Feeds changes until nobody takes them. The first batch is the whole directory, also when it is empty.
    pub async fn run(mut self, changes: mpsc::Sender<Batch>) -> io::Result<()> {
        let mut watch = Watch::new()?;
        let started = Instant::now();
        let mut first = true;
        loop {
            let noticed = Instant::now();
            let look;
            (self, watch, look) = tokio::task::spawn_blocking(move || {
                watch.cover(&self.root);
                let look = self.look();
                (self, watch, look)
            })
            .await
            .map_err(io::Error::other)?;
            // A first reading is waited for: without one nothing is known, and nothing may be done.
            let wait_more = first && (look.unreadable || look.pending > 0 && started.elapsed() < FIRST_WAIT);
            if first && look.unreadable {
                tracing::error!(target: "config", directory = %self.root.display(), "the configuration cannot be read; waiting");
            }
            if wait_more {
                // Nothing of an incomplete first reading takes effect.
                self.known.clear();
                self.stood_in.clear();
                self.overfull = false;
            } else if (first || !look.changes.is_empty())
                && changes.send(Batch { changes: look.changes, noticed: noticed.into_std() }).await.is_err()
            {
                return Ok(());
            } else {
                if first {
                    self.last_good.retain(self.known.keys().chain(&self.stood_in));
                }
                first = false;
            }
            if look.unreadable && first {
                tokio::time::sleep(FIRST_WAIT).await;
            } else if look.pending > 0 {
                tokio::time::sleep(PENDING).await;
            } else {
                watch.changed(LOOK_AGAIN).await;
            }
        }
    }

    fn look(&mut self) -> Look {
        self.last_good.again();
        let (seen, overfull) = self.see();
        let mut look = Look::default();
        self.forget_gone(&seen, &mut look);
        for (path, (seen, reading)) in seen {
            match (&seen, reading) {
                (_, Reading::Known) => {
                    self.written.remove(&path);
                    continue;
                }
                (Ok(_), Reading::Text(content, text)) => {
                    self.written.remove(&path);
                    self.take(&path, (content, text), &mut look);
                }
                (Err(_), Reading::Replaced) => {
                    look.pending += 1;
                    continue;
                }
                (Ok(_), Reading::Unfinished | Reading::Replaced) => {
                    self.stand_in(&path, &mut look);
                    self.wait_for(&path, &mut look);
                    continue;
                }
                // Nothing need change for it to be read the next time.
                (Ok(_), Reading::Failed(problem)) => {
                    let failed = Err(problem.clone());
                    let otherwise = self.written.remove(&path).is_some_and(|(_, said)| said);
                    if otherwise || self.known.get(&path) != Some(&failed) {
                        self.take(&path, (Content::Unreadable(problem), String::new()), &mut look);
                        self.known.insert(path, failed);
                    }
                    continue;
                }
                // A directory, or a file of which not even this is known: what was below it stays.
                (Err(problem), _) => {
                    self.last_good.below(&path).iter().for_each(|p| self.stand_in(p, &mut look));
                    let content = Content::Unreadable(problem.clone());
                    look.changes.push(Change { origin: origin(&path), content });
                }
            }
            self.known.insert(path, seen);
        }
        look.unreadable = matches!(self.known.get(&self.root), Some(Err(_)));
        // Where the root itself has something to be said of, that is said instead.
        if std::mem::replace(&mut self.overfull, overfull) != overfull && !look.unreadable {
            let content = if overfull { too_many() } else { Content::Gone };
            look.changes.push(Change { origin: origin(&self.root), content });
        }
        look
    }

    /// The manifests there are now, with what those say that have changed, and whether there are too many. What changed together is seen
    /// together: as things were both before and after all was read.
    fn see(&self) -> (BTreeMap<PathBuf, (Seen, Reading)>, bool) {
        let read = |found: &BTreeMap<PathBuf, Seen>| {
            found.iter().map(|(path, seen)| (path.clone(), (seen.clone(), self.reading(path, seen)))).collect::<BTreeMap<_, _>>()
        };
        let mut overfull = false;
        let find = || {
            let found;
            (found, overfull) = self.find();
            found
        };
        let (found, mut all, before) = until_still(find, read, |found| *found == self.known);
        // What does not stand still is what it was until then, and looked at again soon.
        for (path, (_, reading)) in &mut all {
            if before.as_ref().is_some_and(|before| before.get(path) != found.get(path)) {
                *reading = Reading::Replaced;
            }
        }
        (all, overfull)
    }

    fn find(&self) -> (BTreeMap<PathBuf, Seen>, bool) {
        let mut found = BTreeMap::new();
        let overfull = find(&self.root, MAX_DEPTH, &mut found);
        // Of links to nothing those count that are named like manifests, or led to some.
        let led_to_some = |path: &PathBuf| {
            self.known
                .range(path.clone()..)
                .nth(usize::from(self.known.contains_key(path)))
                .is_some_and(|(below, _)| below.starts_with(path))
        };
        found.retain(|path, seen| !leads_nowhere(seen) || is_manifest(path) || self.known.get(path) == Some(seen) || led_to_some(path));
        (found, overfull)
    }

    fn reading(&self, path: &Path, seen: &Seen) -> Reading {
        // What is as it was again is read again only if something else has been said meanwhile.
        if self.known.get(path) == Some(seen) && !self.written.get(path).is_some_and(|(_, said)| *said) {
            return Reading::Known;
        }
        match seen {
            Ok(version) => read(path, version, self.namespaces()),
            Err(problem) => Reading::Failed(problem.clone()),
        }
    }

    fn namespaces(&self) -> Namespaces<'_> {
        Namespaces { default: &self.default_namespace, root: Some(&self.root_namespace) }
    }

    /// Takes down that a file is being written, and says so when that takes long.
    fn wait_for(&mut self, path: &Path, look: &mut Look) {
        let (since, said) = self.written.entry(path.to_owned()).or_insert((Instant::now(), false));
        if !*said && since.elapsed() >= TOO_LONG {
            *said = true;
            let problem = "is open for writing by some process; what it holds takes effect when that is done";
            look.changes.push(Change { origin: origin(path), content: Content::Unreadable(problem.to_owned()) });
        }
        look.pending += usize::from(!*said);
    }

    /// Passes on what is gone for certain: not what is below something that cannot be read.
    fn forget_gone(&mut self, found: &BTreeMap<PathBuf, (Seen, Reading)>, look: &mut Look) {
        let hidden = |path: &Path| path.ancestors().any(|a| matches!(found.get(a), Some((Err(_), _))));
        let gone = |path: &&PathBuf| !found.contains_key(*path) && !hidden(path);
        let gone = self.known.keys().chain(&self.stood_in).filter(gone).cloned().collect::<BTreeSet<_>>();
        for path in gone {
            self.known.remove(&path);
            self.stood_in.remove(&path);
            self.written.remove(&path);
            self.last_good.forget(&path);
            look.changes.push(Change { origin: origin(&path), content: Content::Gone });
        }
    }

    /// Passes a file's content on; before one that is not good and never was seen by this process, what it last said.
    fn take(&mut self, path: &Path, (content, text): (Content, String), look: &mut Look) {
        let quality = match &content {
            Content::Read { rejections, unread, .. } if rejections.is_empty() && unread.is_empty() => Some(Quality::Good),
            Content::Read { .. } => Some(Quality::Partial),
            Content::Unreadable(_) | Content::Gone => None,
        };
        if quality != Some(Quality::Good) {
            self.stand_in(path, look);
        }
        match quality {
            Some(Quality::Good) => self.last_good.store(path, &text, Quality::Good),
            Some(Quality::Partial) => {
                let text = manifest::in_force(&self.last_good.load(path), &text, self.namespaces());
                self.last_good.store(path, &text, Quality::Partial);
            }
            None => {}
        }
        self.stood_in.remove(path);
        look.changes.push(Change { origin: origin(path), content });
    }

    /// Puts what a file last said in force, unless this process has seen the file itself.
    fn stand_in(&mut self, path: &Path, look: &mut Look) {
        if matches!(self.known.get(path), Some(Ok(_))) || !self.stood_in.insert(path.to_owned()) {
            return;
        }
        for text in self.last_good.load(path) {
            let content = manifest::read(&text, self.namespaces());
            look.changes.push(Change { origin: origin(path), content });
        }
    }
}

/// Reads a directory once, as it is: for a look without a node.
pub fn once(root: &Path, default_namespace: &str) -> io::Result<Vec<Change>> {
    let mut found = BTreeMap::new();
    let mut changes = Vec::new();
    let metadata = fs::metadata(root)?;
    if metadata.is_file() {
        found.insert(root.to_owned(), Ok(Version::of(&metadata)));
    } else {
        fs::read_dir(root)?;
    }
    if metadata.is_dir() && find(root, MAX_DEPTH, &mut found) {
        changes.push(Change { origin: origin(root), content: too_many() });
    }
    for (path, seen) in found.into_iter().filter(|(path, seen)| !leads_nowhere(seen) || is_manifest(path)) {
        let content = match seen {
            Ok(version) => match read(&path, &version, default_namespace.into()) {
                Reading::Text(content, _) => content,
                Reading::Known | Reading::Unfinished | Reading::Replaced => Content::Unreadable("is being written".to_owned()),
                Reading::Failed(problem) => Content::Unreadable(problem),
            },
            Err(problem) => Content::Unreadable(problem),
        };
        changes.push(Change { origin: origin(&path), content });
    }
    Ok(changes)
}

/// What is said of a link whose target is not there.
const TO_NOTHING: &str = "leads to nothing; restore what it led to, or remove the link";

fn leads_nowhere(seen: &Seen) -> bool {
    seen.as_ref().is_err_and(|problem| problem == TO_NOTHING)
}

fn origin(path: &Path) -> Origin {
    Origin(Arc::new(path.to_owned()))
}

/// Collects the manifests below a directory, and what there cannot be read. True when there were too many.
fn find(directory: &Path, depth: usize, found: &mut BTreeMap<PathBuf, Seen>) -> bool {
    let cannot = |error: &io::Error| format!("cannot be read: {error}");
    let entries = match fs::read_dir(directory).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
        Ok(entries) => entries,
        // Removed meanwhile; the root itself must be there.
        Err(error) if error.kind() == io::ErrorKind::NotFound && depth < MAX_DEPTH => return false,
        Err(error) => {
            found.insert(directory.to_owned(), Err(cannot(&error)));
            return false;
        }
    };
    let mut overflow = false;
    for entry in entries.iter().filter(|e| !e.file_name().as_encoded_bytes().starts_with(b".")) {
        let path = entry.path();
        // Follows symbolic links: that is how a ConfigMap is mounted.
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() && depth > 0 => overflow |= find(&path, depth - 1, found),
            Ok(metadata) if metadata.is_file() && is_manifest(&path) => {
                if found.len() >= MAX_FILES {
                    return true;
                }
                found.insert(path, Ok(Version::of(&metadata)));
            }
            Ok(_) => {}
            // A link to nowhere: where it leads is away, as a volume may be. Nobody has taken back what it held.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if found.len() < MAX_FILES && fs::symlink_metadata(&path).is_ok_and(|link| link.is_symlink()) {
                    found.insert(path, Err(TO_NOTHING.to_owned()));
                }
            }
            Err(error) => drop(found.insert(path, Err(cannot(&error)))),
        }
    }
    overflow
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}

/// What there is, and what came of reading it, when it was the same before and after. When it never is, also what it was before it was read last.
fn until_still<F: PartialEq, R>(mut find: impl FnMut() -> F, read: impl Fn(&F) -> R, is_known: impl Fn(&F) -> bool) -> (F, R, Option<F>) {
    let (mut last, mut left) = (find(), MOST_READINGS);
    loop {
        let all = read(&last);
        if is_known(&last) {
            return (last, all, None);
        }
        let again = find();
        if again == last {
            return (last, all, None);
        }
        left -= 1;
        if left == 0 {
            return (again, all, Some(last));
        }
        last = again;
    }
}

fn too_many() -> Content {
    Content::Unreadable(format!("holds more than {MAX_FILES} files; the others are not read"))
}

/// What came of reading a file.
#[derive(Debug)]
enum Reading {
    /// It is as it was.
    Known,
    Text(Content, String),
    /// It is being written.
    Unfinished,
    /// It is another by now.
    Replaced,
    /// It could not be read this time.
    Failed(String),
}

fn read(path: &Path, version: &Version, namespaces: Namespaces<'_>) -> Reading {
    let refused = |problem: String| Reading::Text(Content::Unreadable(problem), String::new());
    let unreadable = |e: &dyn std::fmt::Display| Reading::Failed(format!("cannot be read: {e}"));
    if version.size > MAX_FILE {
        return refused(format!("is {} bytes, the limit is {MAX_FILE}; split the file", version.size));
    }
    let file = match File::open(path) {
        Ok(file) => file,
        // Replaced or removed between looking and opening: the next look decides.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Reading::Replaced,
        Err(error) => return unreadable(&error),
    };
    let Some(_lease) = Lease::take(&file) else { return Reading::Unfinished };
    let mut bytes = Vec::new();
    if let Err(error) = (&file).take(MAX_FILE + 1).read_to_end(&mut bytes) {
        return unreadable(&error);
    }
    if fs::metadata(path).map(|m| Version::of(&m)).ok().as_ref() != Some(version) {
        return Reading::Replaced;
    }
    match String::from_utf8(bytes) {
        Ok(text) => Reading::Text(manifest::read(&text, namespaces), text),
        Err(error) => refused(format!("is not UTF-8 text ({error}); correct the file")),
    }
}

/// A read lease: the kernel grants it only while no process has the file open for writing.
struct Lease<'a>(Option<&'a File>);

impl<'a> Lease<'a> {
    /// `None` when somebody is writing. A file system without leases gets the benefit of the doubt.
    fn take(file: &'a File) -> Option<Self> {
        match lease(file, libc::F_RDLCK) {
            Ok(()) => Some(Self(Some(file))),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => None,
            Err(_) => Some(Self(None)),
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.0 {
            let _ = lease(file, libc::F_UNLCK);
        }
    }
}

/// `F_SETSIG` of fcntl(2), the same on every architecture.
const F_SETSIG: libc::c_int = 10;

fn lease(file: &File, kind: libc::c_int) -> io::Result<()> {
    // A writer that opens the file meanwhile is held up by the kernel until the lease is dropped; the SIGIO that tells
    // us so would end the process, so it is turned into a signal that is ignored by default.
    // SAFETY: fcntl on a descriptor we own, with integer arguments.
    let ret = unsafe {
        libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG);
        libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind)
    };
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
