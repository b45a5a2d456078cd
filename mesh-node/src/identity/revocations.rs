//! Revocation lists in files: read when the node starts and again when they change.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    IssueError,
    authority::{Stamp, state},
};
use crate::{
    problems,
    report::plain,
    telemetry::chain,
    tls::{ReadList, TlsError, Trust},
};

const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Reads the lists now, and returns a task that goes on doing so. A list that cannot be read leaves those read before in
/// force.
pub fn follow(paths: Vec<PathBuf>, trust: Arc<Trust>) -> Result<impl Future<Output = ()> + Send, IssueError> {
    let mut seen = Stamp::of(paths.iter().cloned());
    let (mut lists, mut had) = read(&paths, &trust, &[])?;
    if !paths.is_empty() {
        tracing::info!(target: "identity", lists = lists.len(), "revocation lists read");
    }
    Ok(async move {
        let mut told = BTreeSet::new();
        loop {
            tell_of_overdue(&paths, &lists, &mut told);
            tokio::time::sleep(CHECK_INTERVAL).await;
            let now = Stamp::of(paths.iter().cloned());
            if now == seen {
                // They may have been away, and are as they were.
                problems::solved(problems::Kind::Revocations, "");
                continue;
            }
            match read(&paths, &trust, &had) {
                Ok((read, holds)) => {
                    (seen, lists, had) = (now, read, holds);
                    problems::solved(problems::Kind::Revocations, "");
                    tracing::info!(target: "identity", lists = lists.len(), "revocation lists read again");
                }
                Err(error) => {
                    let error = chain(&error);
                    let told = format!("error: revocation lists cannot be read; those read before stay in force: {error}");
                    if problems::found(problems::Kind::Revocations, "", told) {
                        tracing::warn!(target: "identity", error, "revocation lists cannot be read; those read before stay in force");
                    }
                }
            }
        }
    })
}

/// Says of which files a list should have been followed by another by now: it stays in force, but nobody revoked since is in it. `told`: of
/// which that has been said.
fn tell_of_overdue(paths: &[PathBuf], lists: &[ReadList], told: &mut BTreeSet<PathBuf>) {
    for (index, path) in paths.iter().enumerate() {
        let now = SystemTime::now();
        let due = lists.iter().filter(|list| list.text == index).filter_map(|list| list.due).min();
        let about = path.to_string_lossy();
        let Some(due) = due.filter(|due| *due < now) else {
            problems::solved(problems::Kind::Revocations, &about);
            told.remove(path);
            continue;
        };
        let due = plain::rfc3339(due);
        let what = format!(
            "warning: the revocation list in {about} was to be replaced by {due}; it stays in force, and certificates revoked since are not in it: give a newer one"
        );
        problems::found(problems::Kind::Revocations, &about, what);
        if told.insert(path.clone()) {
            tracing::warn!(target: "identity", path = %about, due, "a revocation list should have been replaced by now; it stays in force");
        }
    }
}

/// The lists there are, and which of the files hold any. `had`: which held some before: such a file that is empty is none that says that
/// nothing is revoked, but one that is half way through being written.
fn read(paths: &[PathBuf], trust: &Trust, had: &[bool]) -> Result<(Vec<ReadList>, Vec<bool>), IssueError> {
    let texts = paths.iter().map(|p| fs::read(p).map_err(state("read", p))).collect::<Result<Vec<_>, _>>()?;
    let holds = texts.iter().map(|text| !text.trim_ascii().is_empty()).collect::<Vec<_>>();
    let emptied = paths.iter().enumerate().find(|(i, _)| had.get(*i) == Some(&true) && holds.get(*i) == Some(&false));
    if let Some((_, path)) = emptied {
        let problem = format!("{} is empty; to revoke nothing any more, give a list without entries", path.display());
        return Err(TlsError::Revocations(problem).into());
    }
    Ok((trust.set_revocations(texts.iter().map(Vec::as_slice))?, holds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{id::TrustDomain, policy::TrustDomains, tls::KeyExchange};

    /// A list that is emptied is being written, and takes nothing back.
    #[test]
    fn an_empty_file_is_no_list_where_there_was_one() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("crl.pem");
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let trust = Trust::new(TrustDomains { local: domain, aliases: Vec::new() }, KeyExchange::default());
        let key = rcgen::KeyPair::generate().expect("key");
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign];
        let issuer = rcgen::Issuer::new(params, key);
        let now = std::time::SystemTime::now();
        let list = rcgen::CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_hours(1)).into(),
            crl_number: rcgen::SerialNumber::from(vec![1]),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&issuer).expect("signed").pem().expect("pem");
        let other = dir.path().join("never.pem");
        fs::write(&other, "").expect("written");
        let paths = [path.clone(), other];
        let read = |text: &str, had: &[bool]| {
            fs::write(&path, text).expect("written");
            super::read(&paths, &trust, had).map(|(lists, holds)| (lists.len(), holds)).map_err(|e| chain(&e))
        };
        assert_eq!((read("", &[]), read(&list, &[])), (Ok((0, vec![false; 2])), Ok((1, vec![true, false]))));
        let told = read(" \n", &[true, false]);
        assert!(told.as_ref().is_err_and(|e| e.contains("crl.pem is empty")), "{told:?}");
        assert_eq!(read(&list, &[true, false]), Ok((1, vec![true, false])), "one that never held any is in nobody's way");
    }

    #[test]
    fn a_list_that_was_not_replaced_in_time_is_told_of() {
        let path = PathBuf::from("/lists/overdue.pem");
        let hour = |later: bool| {
            let (now, hour) = (SystemTime::now(), Duration::from_hours(1));
            Some(if later { now + hour } else { now - hour })
        };
        let list = |text, due| ReadList { text, due };
        let told = |lists: &[ReadList]| {
            let mut logged = BTreeSet::new();
            tell_of_overdue(&[PathBuf::from("/lists/other.pem"), path.clone()], lists, &mut logged);
            let problems = problems::all().into_iter().filter(|(_, text)| text.contains("overdue.pem was to be replaced by")).count();
            (logged.len(), problems)
        };
        assert_eq!(told(&[list(0, None), list(1, hour(true))]), (0, 0));
        assert_eq!(told(&[list(1, hour(true)), list(1, hour(false))]), (1, 1));
        assert_eq!(told(&[list(0, None), list(1, None)]), (0, 0));
    }
}
