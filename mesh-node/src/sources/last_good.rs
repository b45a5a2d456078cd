//! The last good text of every manifest, kept across restarts: a node that starts while a file is broken goes on with what
//! the file said before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};

use crate::problems;

/// Texts that cannot be written are tried again from memory, up to this many bytes of them.
const MOST_UNKEPT: usize = 64 * 1024 * 1024;
/// How often that is tried.
const RETRY_INTERVAL: Duration = Duration::from_secs(4);

/// Copies in a directory, each beginning with a line that names its original.
#[derive(Debug)]
pub struct LastGood {
    directory: PathBuf,
    /// What could not be written and is to be.
    unkept: Mutex<BTreeMap<PathBuf, (Quality, String)>>,
    /// When that was last tried.
    tried: Mutex<Option<Instant>>,
}

impl LastGood {
    /// Keeps copies in `directory`, readable by the owner only as manifests may be confidential.
    pub fn open(directory: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let probe = directory.join("probe.new");
        match fs::write(&probe, "can be written").and_then(|()| fs::remove_file(&probe)) {
            Ok(()) => problems::solved(problems::Kind::LastGood, ""),
            // Who could not write while it ran could not take back what is there either.
            Err(error) => {
                let told = format!(
                    "warning: {}: cannot be written ({error}); versions of manifests that are kept there may be older than what was last in force",
                    directory.display()
                );
                problems::found(problems::Kind::LastGood, "", told);
            }
        }
        Ok(Self { directory: directory.to_owned(), unkept: Mutex::default(), tried: Mutex::default() })
    }

    fn unkept(&self) -> MutexGuard<'_, BTreeMap<PathBuf, (Quality, String)>> {
        self.unkept.lock()
    }

    fn stale(&self, original: &Path) -> PathBuf {
        self.copy(original, Quality::Good).with_extension("stale")
    }

    /// Copies are named by a number made of the original's path (FNV-1a, the same in every version of this program).
    fn copy(&self, original: &Path, quality: Quality) -> PathBuf {
        let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        let number = original.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, step);
        self.directory.join(format!("{number:016x}.{}", quality.suffix()))
    }

    /// The last texts of a file, in the order they were in force: the last good one, or the last one of which something was
    /// refused. Both only when the process ended while it wrote one of them. One that is older than that is told of.
    pub fn load(&self, original: &Path) -> Vec<String> {
        if let Some((_, text)) = self.unkept().get(original) {
            return vec![text.clone()];
        }
        let name = original.display().to_string();
        let read = |copy: PathBuf| Some(fs::read_to_string(copy).ok()?.split_once('\n').filter(|(n, _)| *n == name)?.1.to_owned());
        let kept = [Quality::Good, Quality::Partial].into_iter().filter_map(|q| read(self.copy(original, q))).collect::<Vec<_>>();
        if !kept.is_empty() {
            return kept;
        }
        let older = read(self.stale(original));
        if older.is_some() {
            let told = format!(
                "warning: {name}: what is in force of it is older than what was in force before the restart, which could not be kept; correct the file"
            );
            problems::found(problems::Kind::LastGood, &original.to_string_lossy(), told);
        }
        older.into_iter().collect()
    }

    /// Originals at or below a path of which there are copies.
    pub fn below(&self, path: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().filter_map(Result::ok);
        let names = entries.filter_map(|e| Some(PathBuf::from(fs::read_to_string(e.path()).ok()?.split_once('\n')?.0)));
        names.filter(|n| n.starts_with(path)).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Remembers a text. A copy appears whole or not at all; one that cannot be written is told of and tried again ([`LastGood::again`]), and what
    /// is there from before is marked as older. The node works without it.
    pub fn store(&self, original: &Path, text: &str, quality: Quality) {
        let name = original.to_string_lossy();
        let Err(error) = self.write(original, text, quality) else {
            let mut unkept = self.unkept();
            unkept.remove(original);
            if unkept.is_empty() {
                problems::solved(problems::Kind::LastGood, "");
            }
            return problems::solved(problems::Kind::LastGood, &name);
        };
        let after = if self.set_aside(original) { "an older version of it is in force" } else { "nothing of it is in force" };
        let mut unkept = self.unkept();
        let held = unkept.iter().filter(|(path, _)| *path != original).map(|(_, (_, text))| text.len()).sum::<usize>();
        let is_tried_again = held + text.len() <= MOST_UNKEPT;
        let how =
            if is_tried_again { "make room in the state directory" } else { "make room in the state directory and write the file anew" };
        let told = format!(
            "warning: {name}: its last good version cannot be kept for a restart ({error}); {how}, or {after} after a restart at a time when it cannot \
             be read"
        );
        problems::found(problems::Kind::LastGood, &name, told);
        if unkept.remove(original).is_none() {
            tracing::warn!(target: "config", %error, file = %original.display(), "cannot keep the last good version for a restart");
        }
        if is_tried_again {
            unkept.insert(original.to_owned(), (quality, text.to_owned()));
        }
    }

    fn write(&self, original: &Path, text: &str, quality: Quality) -> io::Result<()> {
        let copy = self.copy(original, quality);
        let temporary = copy.with_extension("new");
        let whole = format!("{}\n{text}", original.display());
        let written = match fs::read(&copy) {
            Ok(there) if there == whole.as_bytes() => Ok(()),
            _ => fs::write(&temporary, whole).and_then(|()| fs::rename(&temporary, &copy)),
        };
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
            return written;
        }
        // All that is in force is in this one: what another says was, and may have been taken back since.
        let other = if quality == Quality::Good { Quality::Partial } else { Quality::Good };
        let _ = fs::remove_file(self.copy(original, other));
        let _ = fs::remove_file(self.stale(original));
        Ok(())
    }

    /// Marks what there is of a file as older than what is in force; whether there is something. A name can be changed without room.
    fn set_aside(&self, original: &Path) -> bool {
        let stale = self.stale(original);
        for quality in [Quality::Good, Quality::Partial] {
            let _ = fs::rename(self.copy(original, quality), &stale);
        }
        stale.exists() || [Quality::Good, Quality::Partial].iter().any(|q| self.copy(original, *q).exists())
    }

    /// Tries again what could not be written, now and then.
    pub fn again(&self) {
        let unkept = {
            let mut tried = self.tried.lock();
            if tried.is_some_and(|at| at.elapsed() < RETRY_INTERVAL) {
                return;
            }
            *tried = Some(Instant::now());
            std::mem::take(&mut *self.unkept())
        };
        for (original, (quality, text)) in unkept {
            // Not told of once more.
            self.unkept().insert(original.clone(), (quality, String::new()));
            self.store(&original, &text, quality);
        }
    }

    pub fn forget(&self, original: &Path) {
        problems::solved(problems::Kind::LastGood, &original.to_string_lossy());
        self.unkept().remove(original);
        self.copies(original).into_iter().for_each(|copy| drop(fs::remove_file(copy)));
    }

    fn copies(&self, original: &Path) -> [PathBuf; 3] {
        [self.copy(original, Quality::Good), self.copy(original, Quality::Partial), self.stale(original)]
    }

    /// Forgets all but these: files that went while nobody watched.
    pub fn retain<'a>(&self, originals: impl Iterator<Item = &'a PathBuf>) {
        let wanted = originals.flat_map(|original| self.copies(original)).collect::<BTreeSet<_>>();
        let entries = fs::read_dir(&self.directory).into_iter().flatten().filter_map(Result::ok);
        for path in entries.map(|e| e.path()).filter(|p| !wanted.contains(p)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// How good a text was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quality {
    Good,
    /// Readable, but some of its objects were refused: the documents that are in force.
    Partial,
}

impl Quality {
    fn suffix(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Partial => "partial",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node that would start with nothing after its next restart says so before.
    #[test]
    fn what_cannot_be_kept_is_a_problem_until_it_can() {
        let directory = tempfile::tempdir().expect("a directory");
        let (state, file) = (directory.path().join("state"), Path::new("/etc/mesh/kept-nowhere.yaml"));
        let kept = LastGood::open(&state).expect("opened");
        let told = || problems::all().into_iter().filter(|(_, text)| text.contains("kept-nowhere.yaml")).count();
        fs::remove_dir(&state).expect("removed");
        kept.store(file, "a: b\n", Quality::Good);
        assert_eq!(told(), 1);
        fs::create_dir(&state).expect("made");
        // By itself, when there is room.
        kept.again();
        assert_eq!((told(), kept.load(file)), (0, vec!["a: b\n".to_owned()]));
        assert_eq!(LastGood::open(&state).expect("opened").load(file), ["a: b\n"]);
    }

    /// What was in force before what could not be kept is not passed off as that.
    #[test]
    fn an_older_version_is_told_to_be_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let (state, file) = (directory.path().join("state"), Path::new("/etc/mesh/kept-older.yaml"));
        let kept = LastGood::open(&state).expect("opened");
        let told = || problems::all().into_iter().find(|(_, text)| text.contains("kept-older.yaml")).map(|(_, text)| text);
        kept.store(file, "v: 1\n", Quality::Good);
        // Nothing can be written where a directory is in the way.
        let in_the_way = kept.copy(file, Quality::Good).with_extension("new");
        fs::create_dir(&in_the_way).expect("made");
        kept.store(file, "v: 2\n", Quality::Good);
        assert!(told().is_some_and(|text| text.contains("an older version of it is in force after a restart")), "{:?}", told());
        assert_eq!(kept.load(file), ["v: 2\n"], "as long as this process is there");
        let restarted = LastGood::open(&state).expect("opened");
        assert_eq!(restarted.load(file), ["v: 1\n"]);
        assert!(told().is_some_and(|text| text.contains("is older than what was in force before the restart")), "{:?}", told());
        fs::remove_dir(&in_the_way).expect("removed");
        restarted.store(file, "v: 3\n", Quality::Good);
        assert_eq!((told(), restarted.load(file)), (None, vec!["v: 3\n".to_owned()]));
        restarted.forget(file);
        assert!(restarted.load(file).is_empty());
    }
}
