//! Revocation lists in files: read when the node starts and again when they change.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use super::{
    IssueError,
    authority::{Stamp, state},
};
use crate::{problems, telemetry::chain, tls::Trust};

const LOOK: Duration = Duration::from_secs(2);

/// Reads the lists now, and returns a task that goes on doing so. A list that cannot be read leaves those read before in
/// force.
pub fn follow(paths: Vec<PathBuf>, trust: Arc<Trust>) -> Result<impl Future<Output = ()> + Send, IssueError> {
    let mut seen = Stamp::of(paths.iter().cloned());
    let lists = read(&paths, &trust)?;
    if !paths.is_empty() {
        tracing::info!(target: "identity", lists, "revocation lists read");
    }
    Ok(async move {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = Stamp::of(paths.iter().cloned());
            if now == seen {
                // They may have been away, and are as they were.
                problems::solved(problems::Kind::Revocations, "");
                continue;
            }
            match read(&paths, &trust) {
                Ok(lists) => {
                    seen = now;
                    problems::solved(problems::Kind::Revocations, "");
                    tracing::info!(target: "identity", lists, "revocation lists read again");
                }
                Err(error) => {
                    let told = format!("error: revocation lists cannot be read; those read before stay in force: {}", chain(&error));
                    problems::found(problems::Kind::Revocations, "", told);
                    tracing::warn!(target: "identity", error = chain(&error), "revocation lists cannot be read; those read before stay in force");
                }
            }
        }
    })
}

fn read(paths: &[PathBuf], trust: &Trust) -> Result<usize, IssueError> {
    let texts = paths.iter().map(|p| fs::read(p).map_err(state("read", p))).collect::<Result<Vec<_>, _>>()?;
    Ok(trust.set_revocations(texts.iter().map(Vec::as_slice))?)
}
