//! The cluster's secret as a process has it: fixed, or that of a file, which is read again when it changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::HeaderValue;

use crate::badge::hidden;
use crate::live::Live;
use crate::{Error, Secret};

/// A secret that may change while it is used. Whoever holds a clone sees the change.
#[derive(Debug, Clone)]
pub struct SharedSecret(Source);

#[derive(Debug, Clone)]
enum Source {
    Fixed(Arc<Held>),
    File { path: PathBuf, live: Arc<Live<Held>> },
}

/// A secret, and how it is shown.
#[derive(Debug)]
struct Held {
    secret: Secret,
    header: Option<HeaderValue>,
}

impl From<Secret> for Held {
    fn from(secret: Secret) -> Self {
        Self { header: hidden(secret.expose()), secret }
    }
}

impl From<Secret> for SharedSecret {
    fn from(secret: Secret) -> Self {
        Self(Source::Fixed(Arc::new(secret.into())))
    }
}

impl SharedSecret {
    /// That of a file, as [`Secret::from_file`] reads it.
    ///
    /// # Errors
    /// As [`Secret::from_file`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::of_file(path, None)
    }

    /// That of a file, or what a supervisor has read there earlier for as long as the file cannot be read.
    ///
    /// # Errors
    /// None but those of a process that runs out of files.
    pub fn open_or(path: &Path, earlier: Secret) -> Result<Self, Error> {
        Self::of_file(path, Some(earlier))
    }

    fn of_file(path: &Path, earlier: Option<Secret>) -> Result<Self, Error> {
        let file = path.to_owned();
        let make = move |old: Option<&Held>| match (Secret::from_file(&file), &earlier) {
            (Ok(secret), _) => Ok(secret.into()),
            (Err(error), Some(earlier)) if old.is_none() => {
                tracing::warn!(%error, "the cluster's secret is the one that was read before");
                Ok(earlier.clone().into())
            }
            (Err(error), _) => Err(error),
        };
        let live = Live::new("the cluster's secret", vec![path.to_owned()], make)?;
        Ok(Self(Source::File { path: path.to_owned(), live }))
    }

    /// Looks at its file from now on, if it has one. Inside a runtime.
    pub fn watch(&self) {
        if let Source::File { live, .. } = &self.0 {
            live.watch();
        }
    }

    fn held(&self) -> Arc<Held> {
        match &self.0 {
            Source::Fixed(held) => Arc::clone(held),
            Source::File { live, .. } => live.get(),
        }
    }

    /// The secret that is in force.
    #[must_use]
    pub fn now(&self) -> Secret {
        self.held().secret.clone()
    }

    /// Whether this was given, as [`Secret::is`].
    #[must_use]
    pub fn is(&self, given: &[u8]) -> bool {
        self.held().secret.is(given)
    }

    /// The file it is read from, for a process that is to read it too.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match &self.0 {
            Source::Fixed(_) => None,
            Source::File { path, .. } => Some(path),
        }
    }

    /// What travels in a header.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        self.held().header.clone()
    }
}
