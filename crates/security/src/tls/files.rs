//! Certificates and keys as files hold them, looked at closely before anything is served with them.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_cert::der::{DateTime, Decode};

use super::provider;
use crate::Error;
use crate::live::read;

/// The certificates of a PEM file, at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let wrong = |reason: String| Error::Content { path: path.to_owned(), reason };
    let bytes = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let all = all.map_err(|error| wrong(format!("is not PEM: {error}")))?;
    match all.is_empty() {
        true => Err(wrong("has no certificate (-----BEGIN CERTIFICATE-----)".to_owned())),
        false => Ok(all),
    }
}

/// A certificate chain and its key.
///
/// # Errors
/// A file that cannot be read or is not PEM, a certificate whose time is not now, a key of another certificate.
pub(super) fn pair(certificate: &Path, key: &Path) -> Result<CertifiedKey, Error> {
    let chain = certificates(certificate)?;
    for der in &chain {
        valid_now(der, certificate)?;
    }
    let wrong = |path: &Path, reason: String| Error::Content { path: path.to_owned(), reason };
    let private = PrivateKeyDer::from_pem_slice(&read(key)?)
        .map_err(|error| wrong(key, format!("has no private key (-----BEGIN PRIVATE KEY-----): {error}")))?;
    match CertifiedKey::from_der(chain, private, &provider()) {
        Ok(pair) => Ok(pair),
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err(Error::OtherKey { certificate: certificate.to_owned(), key: key.to_owned() })
        }
        Err(error) => Err(wrong(key, format!("cannot be used with {}: {error}", certificate.display()))),
    }
}

/// The authorities of a file. Those whose time is over stand for nothing, and one of them must be left.
///
/// # Errors
/// As [`pair`]'s for the certificate.
pub(super) fn authorities(path: &Path) -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    let mut over = None;
    for der in certificates(path)? {
        match valid_now(&der, path) {
            Ok(()) => store.add(der).map_err(|error| Error::Content {
                path: path.to_owned(),
                reason: format!("has a certificate that is no authority: {error}"),
            })?,
            Err(error) => over = Some(error),
        }
    }
    match over {
        Some(error) if store.is_empty() => Err(error),
        Some(_) | None => Ok(store),
    }
}

fn valid_now(der: &CertificateDer<'_>, path: &Path) -> Result<(), Error> {
    let wrong = |error: x509_cert::der::Error| Error::Content {
        path: path.to_owned(),
        reason: format!("has a certificate that cannot be read: {error}"),
    };
    let certificate = x509_cert::Certificate::from_der(der).map_err(wrong)?;
    let validity = certificate.tbs_certificate.validity;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (from, until) = (validity.not_before.to_unix_duration(), validity.not_after.to_unix_duration());
    if (from..=until).contains(&now) {
        return Ok(());
    }
    Err(Error::NotNow { path: path.to_owned(), from: date(from), until: date(until), now: date(now) })
}

fn date(since_epoch: Duration) -> String {
    let seconds = Duration::from_secs(since_epoch.as_secs());
    DateTime::from_unix_duration(seconds)
        .map_or_else(|_| format!("{} s", seconds.as_secs()), |date| date.to_string())
}
