//! Something made of files, and made again when they change.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::Error;

/// How often the files are looked at. Contents are compared, so links that are turned (as Kubernetes does with Secrets)
/// count, and a file that was only touched does not.
pub const POLL: Duration = Duration::from_secs(1);
/// Largest file of certificates, keys or API keys that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Makes a new value; given the one in force, for what should live on.
type Make<T> = Box<dyn Fn(Option<&T>) -> Result<T, Error> + Send + Sync>;

/// A digest of the contents of all files.
type Fingerprint = [u8; 32];

/// The value of some files.
pub(crate) struct Live<T> {
    what: &'static str,
    files: Vec<PathBuf>,
    make: Make<T>,
    current: RwLock<Arc<T>>,
    /// What the files held when they were last looked at.
    seen: Mutex<Fingerprint>,
}

impl<T> fmt::Debug for Live<T> {
    /// Says where it comes from, never what it is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("what", &self.what).field("files", &self.files).finish_non_exhaustive()
    }
}

impl<T: Send + Sync + 'static> Live<T> {
    /// Makes `what` of `files` a first time.
    pub(crate) fn new(
        what: &'static str,
        files: Vec<PathBuf>,
        make: impl Fn(Option<&T>) -> Result<T, Error> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, Error> {
        // Before they are read: what changes in between is then seen as a change.
        let seen = Mutex::new(fingerprint(&files));
        let current = RwLock::new(Arc::new(make(None)?));
        Ok(Arc::new(Self { what, files, make: Box::new(make), current, seen }))
    }

    /// What is in force.
    pub(crate) fn get(&self) -> Arc<T> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at the files from now on, for as long as somebody holds this. Inside a runtime.
    pub(crate) fn watch(self: &Arc<Self>) {
        tokio::spawn(keep_fresh(Arc::downgrade(self)));
    }

    fn look(&self) {
        let now = fingerprint(&self.files);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *seen, now) == now {
            return;
        }
        drop(seen);
        let old = self.get();
        match (self.make)(Some(&old)) {
            Ok(new) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
                tracing::info!(what = self.what, "read again after a change");
            }
            Err(error) => {
                tracing::error!(what = self.what, %error, "changed, and what was read before stays in force");
            }
        }
    }
}

async fn keep_fresh<T: Send + Sync + 'static>(live: Weak<Live<T>>) {
    loop {
        tokio::time::sleep(POLL).await;
        let Some(live) = live.upgrade() else { return };
        if let Err(error) = tokio::task::spawn_blocking(move || live.look()).await {
            tracing::error!(%error, "reading a changed file failed");
        }
    }
}

/// A file that cannot be read counts as its reason, so that its coming back is a change.
fn fingerprint(files: &[PathBuf]) -> Fingerprint {
    let mut digest = Sha256::new();
    for path in files {
        match read(path) {
            Ok(bytes) => digest.update(Sha256::digest(&bytes)),
            Err(error) => digest.update(error.to_string()),
        }
    }
    digest.finalize().into()
}

/// A whole file of credentials.
///
/// # Errors
/// [`Error::Read`] and [`Error::TooLarge`].
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 > FILE_BYTES_MAX {
        true => Err(Error::TooLarge { path: path.to_owned(), max: FILE_BYTES_MAX }),
        false => Ok(bytes),
    }
}

/// As [`read`], as text.
///
/// # Errors
/// Those of [`read`], and [`Error::Content`] for what is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    let wrong = |_| Error::Content { path: path.to_owned(), reason: "is not text (UTF-8)".to_owned() };
    String::from_utf8(read(path)?).map_err(wrong)
}
