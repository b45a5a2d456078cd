//! The last good text of every manifest, kept across restarts: a node that starts while a file is broken goes on with what
//! the file said before.

use std::{
    collections::BTreeSet,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
};

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

    fn copy(&self, original: &Path) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        original.hash(&mut hasher);
        self.0.join(format!("{:016x}", hasher.finish()))
    }

    /// The last good text of a file.
    pub fn load(&self, original: &Path) -> Option<String> {
        let text = fs::read_to_string(self.copy(original)).ok()?;
        let (name, content) = text.split_once('\n')?;
        (name == original.display().to_string()).then(|| content.to_owned())
    }

    /// Remembers a good text. A copy appears whole or not at all; one that cannot be written is only logged, the node works
    /// without it.
    pub fn store(&self, original: &Path, text: &str) {
        let copy = self.copy(original);
        let temporary = copy.with_extension("new");
        let written = fs::write(&temporary, format!("{}\n{text}", original.display())).and_then(|()| fs::rename(&temporary, &copy));
        if let Err(error) = written {
            tracing::warn!(target: "config", %error, file = %original.display(), "cannot keep the last good version for a restart");
        }
    }

    pub fn forget(&self, original: &Path) {
        let _ = fs::remove_file(self.copy(original));
    }

    /// Forgets all but these: files that went while nobody watched.
    pub fn retain<'a>(&self, originals: impl Iterator<Item = &'a PathBuf>) {
        let wanted = originals.map(|o| self.copy(o)).collect::<BTreeSet<_>>();
        let entries = fs::read_dir(&self.0).into_iter().flatten().filter_map(Result::ok);
        for path in entries.map(|e| e.path()).filter(|p| !wanted.contains(p)) {
            let _ = fs::remove_file(path);
        }
    }
}
