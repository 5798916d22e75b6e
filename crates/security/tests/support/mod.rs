//! Authorities, certificates and the files they lie in.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use security::{ClientTls, ServerTls};
use tempfile::TempDir;

/// An authority, and a directory for its certificate and those it signs.
pub(crate) struct Authority {
    dir: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let authority = Self { dir: tempfile::tempdir().unwrap(), issuer };
        fs::write(authority.ca(), authority.issuer.pem()).unwrap();
        authority
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// Writes `name.crt` and `name.key`, for 127.0.0.1, valid for long.
    pub(crate) fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        self.sign_until(name, 4096)
    }

    /// The same, valid until a year.
    pub(crate) fn sign_until(&self, name: &str, year: i32) -> (PathBuf, PathBuf) {
        let mut params =
            CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (certificate_file, key_file) =
            (self.path(&format!("{name}.crt")), self.path(&format!("{name}.key")));
        replace(&certificate_file, &certificate.pem());
        replace(&key_file, &key.serialize_pem());
        (certificate_file, key_file)
    }

    /// A listener's files; `clients` also wants certificates of this authority.
    pub(crate) fn server(&self, name: &str, clients: bool) -> ServerTls {
        let (certificate, key) = self.sign(name);
        ServerTls { certificate, key, client_ca: clients.then(|| self.ca()) }
    }

    /// A caller's files.
    pub(crate) fn client(&self, name: Option<&str>) -> ClientTls {
        ClientTls { ca: self.ca(), identity: name.map(|name| self.sign(name)) }
    }
}

/// Readers see the old file or the new one, never half of one.
pub(crate) fn replace(path: &Path, text: &str) {
    let next = path.with_extension("next");
    fs::write(&next, text).unwrap();
    fs::rename(next, path).unwrap();
}
