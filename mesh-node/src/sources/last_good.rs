//! The last good text of every manifest, kept across restarts: a node that starts while a file is broken goes on with what
//! the file said before.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use crate::problems;

/// Copies in a directory, each beginning with a line that names its original.
#[derive(Debug)]
pub struct LastGood(PathBuf);

impl LastGood {
    /// Keeps copies in `directory`, readable by the owner only as manifests may be confidential.
    pub fn open(directory: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        Ok(Self(directory.to_owned()))
    }

    /// Copies are named by a number made of the original's path (FNV-1a, the same in every version of this program).
    fn copy(&self, original: &Path, quality: Quality) -> PathBuf {
        let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        let number = original.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, step);
        self.0.join(format!("{number:016x}.{}", quality.suffix()))
    }

    /// The last texts of a file, in the order they were in force: the last good one, or the last one of which something was
    /// refused. Both only when the process ended while it wrote one of them.
    pub fn load(&self, original: &Path) -> Vec<String> {
        let name = original.display().to_string();
        let read = |quality| {
            Some(fs::read_to_string(self.copy(original, quality)).ok()?.split_once('\n').filter(|(n, _)| *n == name)?.1.to_owned())
        };
        [Quality::Good, Quality::Partial].into_iter().filter_map(read).collect()
    }

    /// Originals at or below a path of which there are copies.
    pub fn below(&self, path: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().filter_map(Result::ok);
        let names = entries.filter_map(|e| Some(PathBuf::from(fs::read_to_string(e.path()).ok()?.split_once('\n')?.0)));
        names.filter(|n| n.starts_with(path)).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Remembers a text. A copy appears whole or not at all; one that cannot be written is only logged, the node works
    /// without it.
    pub fn store(&self, original: &Path, text: &str, quality: Quality) {
        let copy = self.copy(original, quality);
        let temporary = copy.with_extension("new");
        let written = fs::write(&temporary, format!("{}\n{text}", original.display())).and_then(|()| fs::rename(&temporary, &copy));
        if let Err(error) = &written {
            let told = format!(
                "warning: {}: its last good version cannot be kept for a restart ({error}); make room in the state directory, or nothing of it is in force \
                 after a restart at a time when it cannot be read",
                original.display()
            );
            problems::found(problems::Kind::LastGood, &original.to_string_lossy(), told);
            tracing::warn!(target: "config", %error, file = %original.display(), "cannot keep the last good version for a restart");
        } else {
            problems::solved(problems::Kind::LastGood, &original.to_string_lossy());
        }
        // All that is in force is in this one: what another says was, and may have been taken back since.
        let other = if quality == Quality::Good { Quality::Partial } else { Quality::Good };
        if written.is_ok() {
            let _ = fs::remove_file(self.copy(original, other));
        }
    }

    pub fn forget(&self, original: &Path) {
        problems::solved(problems::Kind::LastGood, &original.to_string_lossy());
        for quality in [Quality::Good, Quality::Partial] {
            let _ = fs::remove_file(self.copy(original, quality));
        }
    }

    /// Forgets all but these: files that went while nobody watched.
    pub fn retain<'a>(&self, originals: impl Iterator<Item = &'a PathBuf>) {
        let copies = |o: &PathBuf| [self.copy(o, Quality::Good), self.copy(o, Quality::Partial)];
        let wanted = originals.flat_map(copies).collect::<BTreeSet<_>>();
        let entries = fs::read_dir(&self.0).into_iter().flatten().filter_map(Result::ok);
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
        kept.store(file, "a: b\n", Quality::Good);
        assert_eq!((told(), kept.load(file)), (0, vec!["a: b\n".to_owned()]));
    }
}
