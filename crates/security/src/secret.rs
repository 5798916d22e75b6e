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
/// Characters of a secret at least: 128 random bits in hexadecimal.
const CHARACTERS_MIN: usize = 32;
/// Characters of a secret at most: it travels in a header.
const CHARACTERS_MAX: usize = 512;
const RANDOM_BYTES: usize = 32;

/// A secret text. Shown by no formatter.
#[derive(Clone)]
pub struct Secret(Arc<str>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.is(other.0.as_bytes())
    }
}

impl Eq for Secret {}

impl Secret {
    /// A new one nobody can guess.
    ///
    /// # Errors
    /// [`Error::Random`].
    pub fn random() -> Result<Self, Error> {
        Ok(Self(hex(&random::<RANDOM_BYTES>()?).into()))
    }

    /// The text of a file, without white space around it.
    ///
    /// # Errors
    /// What [`Error`] says of a file, and [`Error::Content`] for one that is too short to be a secret, too long, or cannot
    /// travel in a header.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = read_text(path)?;
        Self::parse(&text).map_err(|reason| Error::Content { path: path.to_owned(), reason })
    }

    /// A secret as text.
    ///
    /// # Errors
    /// What is wrong with it, without showing it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let length = text.chars().count();
        if !(CHARACTERS_MIN..=CHARACTERS_MAX).contains(&length) {
            return Err(format!(
                "a cluster's secret has {CHARACTERS_MIN} to {CHARACTERS_MAX} characters, not {length}; \
                 `openssl rand -hex 32` makes one"
            ));
        }
        match text.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Ok(Self(text.into())),
            false => Err("a cluster's secret has visible ASCII characters only".to_owned()),
        }
    }

    /// Whether this is what was given; takes the same time wherever the two differ.
    #[must_use]
    pub fn is(&self, given: &[u8]) -> bool {
        // Digests have one length, so not even that of the secret shows.
        Sha256::digest(self.0.as_bytes()).ct_eq(&Sha256::digest(given)).into()
    }

    /// The text itself, for whoever hands it on.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
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
