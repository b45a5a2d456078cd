//! Revocation lists in files: read when the node starts and again when they change.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use super::{
    IssueError,
    authority::{Stamp, state},
};
use crate::{
    problems,
    telemetry::chain,
    tls::{TlsError, Trust},
};

const LOOK: Duration = Duration::from_secs(2);

/// Reads the lists now, and returns a task that goes on doing so. A list that cannot be read leaves those read before in
/// force.
pub fn follow(paths: Vec<PathBuf>, trust: Arc<Trust>) -> Result<impl Future<Output = ()> + Send, IssueError> {
    let mut seen = Stamp::of(paths.iter().cloned());
    let (lists, mut had) = read(&paths, &trust, &[])?;
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
            match read(&paths, &trust, &had) {
                Ok((lists, holds)) => {
                    (seen, had) = (now, holds);
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

/// How many lists there are, and which of the files hold any. `had`: which held some before: such a file that is empty is none that says that
/// nothing is revoked, but one that is half way through being written.
fn read(paths: &[PathBuf], trust: &Trust, had: &[bool]) -> Result<(usize, Vec<bool>), IssueError> {
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
            super::read(&paths, &trust, had).map_err(|e| chain(&e))
        };
        assert_eq!((read("", &[]), read(&list, &[])), (Ok((0, vec![false; 2])), Ok((1, vec![true, false]))));
        let told = read(" \n", &[true, false]);
        assert!(told.as_ref().is_err_and(|e| e.contains("crl.pem is empty")), "{told:?}");
        assert_eq!(read(&list, &[true, false]), Ok((1, vec![true, false])), "one that never held any is in nobody's way");
    }
}
