//! The secret all processes of a cluster share.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::Error;
use crate::live::read_text;

/// The variable in which a supervisor hands its children the secret: other users cannot read it, and it stands on no
/// command line.
pub const SECRET_VARIABLE: &str = "COHORT_CLUSTER_SECRET";
/// The variable in which it tells them the file it has the secret from, so that they see it change.
pub const SECRET_FILE_VARIABLE: &str = "COHORT_CLUSTER_SECRET_FILE";
/// Characters of a secret at least: 128 random bits in hexadecimal.
const CHARACTERS_MIN: usize = 32;
/// Characters of a secret at most: it travels in a header.
const CHARACTERS_MAX: usize = 512;
const RANDOM_BYTES: usize = 32;

/// A secret text, and while it is being changed another one that is taken too. Shown by no formatter.
#[derive(Clone)]
pub struct Secret {
    shown: Arc<str>,
    also: Option<Arc<str>>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        let also = |secret: &Self| secret.also.as_ref().map(|also| Sha256::digest(also.as_bytes()));
        same(&self.shown, other.shown.as_bytes()) && also(self) == also(other)
    }
}

impl Eq for Secret {}

impl Secret {
    /// A new one nobody can guess.
    ///
    /// # Errors
    /// [`Error::Random`].
    pub fn random() -> Result<Self, Error> {
        Ok(Self { shown: hex(&random::<RANDOM_BYTES>()?).into(), also: None })
    }

    /// The text of a file, without white space around it. Two lines are two secrets: the first is shown, both are taken.
    ///
    /// # Errors
    /// What [`Error`] says of a file, and [`Error::Content`] for one that is too short to be a secret, too long, or cannot
    /// travel in a header.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = read_text(path)?;
        Self::parse(&text).map_err(|reason| Error::Content { path: path.to_owned(), reason })
    }

    /// A secret as text, or two on a line each.
    ///
    /// # Errors
    /// What is wrong with it, without showing it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let shown = checked(lines.next().unwrap_or_default())?;
        let also = lines.next().map(checked).transpose()?;
        match lines.next() {
            None => Ok(Self { shown, also }),
            Some(_) => Err("a cluster has one secret, or two on a line each while it is changed".to_owned()),
        }
    }

    /// Whether this is what was given; takes the same time wherever the two differ.
    #[must_use]
    pub fn is(&self, given: &[u8]) -> bool {
        let first = same(&self.shown, given);
        let second = self.also.as_ref().is_some_and(|also| same(also, given));
        first | second
    }

    /// The text that is shown to others.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.shown
    }

    /// All of it, for whoever hands it on to a process of its own.
    #[must_use]
    pub fn expose_all(&self) -> String {
        let also = self.also.iter().map(|also| format!("\n{also}"));
        std::iter::once(self.shown.to_string()).chain(also).collect()
    }
}

/// Digests have one length, so not even that of the secret shows.
fn same(secret: &str, given: &[u8]) -> bool {
    Sha256::digest(secret.as_bytes()).ct_eq(&Sha256::digest(given)).into()
}

fn checked(text: &str) -> Result<Arc<str>, String> {
    let length = text.chars().count();
    if !(CHARACTERS_MIN..=CHARACTERS_MAX).contains(&length) {
        return Err(format!(
            "a cluster's secret has {CHARACTERS_MIN} to {CHARACTERS_MAX} characters, not {length}; \
             `openssl rand -hex 32` makes one"
        ));
    }
    match text.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(text.into()),
        false => Err("a cluster's secret has visible ASCII characters only".to_owned()),
    }
}

/// Bytes of the system's generator.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).map_err(Error::Random)?;
    Ok(bytes)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
