//! Where a checkpoint's files are: a directory, or the program itself. Weights are read by position, never mapped:
//! a mapped file that shrinks kills the process, and this crate has no `unsafe`.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use types::Bytes;

use crate::error::Error;

/// Largest file read whole (configuration, index, tokenizer): the published tokenizer has 28 MB.
const SMALL_FILE_BYTES_MAX: u64 = 256 << 20;

/// The files of one checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Files {
    /// A directory as downloaded.
    Directory(PathBuf),
    /// Files that are part of the program: name and content.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl Files {
    /// The file's name as a person would look for it.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        match self {
            Self::Directory(directory) => directory.join(name).display().to_string(),
            Self::Embedded(_) => format!("embedded {name}"),
        }
    }

    /// Where the files are, for messages.
    #[must_use]
    pub fn place(&self) -> String {
        match self {
            Self::Directory(directory) => directory.display().to_string(),
            Self::Embedded(_) => "embedded checkpoint".to_owned(),
        }
    }

    /// The whole of a small file; `None` when there is no such file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::TooLarge`] above 256 MiB.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, Error> {
        let Some(blob) = self.open(name)? else { return Ok(None) };
        if blob.len() > SMALL_FILE_BYTES_MAX {
            return Err(Error::TooLarge {
                file: self.path(name),
                found: Bytes(blob.len()),
                max: Bytes(SMALL_FILE_BYTES_MAX),
            });
        }
        match blob {
            Blob::Memory { bytes, .. } => Ok(Some(Cow::Borrowed(bytes))),
            Blob::File { .. } => {
                let mut content = vec![0; blob.len() as usize];
                blob.read_exact_at(&mut content, 0)?;
                Ok(Some(Cow::Owned(content)))
            }
        }
    }

    /// Opens a file for positioned reads; `None` when there is no such file.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Blob>, Error> {
        match self {
            Self::Directory(directory) => open_file(&directory.join(name)),
            Self::Embedded(files) => {
                let found = files.iter().find(|(file, _)| *file == name);
                Ok(found.map(|(_, bytes)| Blob::Memory { name: self.path(name), bytes }))
            }
        }
    }
}

fn open_file(path: &Path) -> Result<Option<Blob>, Error> {
    let name = path.display().to_string();
    let failed = |source| Error::Io { file: name.clone(), action: "open", source };
    // Asked before opening: opening a pipe would wait for a writer.
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    if !metadata.is_file() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(Error::Io { file: name, action: "open", source });
    }
    let file = File::open(path).map_err(failed)?;
    Ok(Some(Blob::File { name, file, bytes: metadata.len() }))
}

/// A file open for reading at any position from any thread.
#[derive(Debug)]
pub(crate) enum Blob {
    /// On disk.
    File {
        /// With its directory.
        name: String,
        /// Open for reading.
        file: File,
        /// Its size when it was opened.
        bytes: u64,
    },
    /// Part of the program.
    Memory {
        /// For messages.
        name: String,
        /// The content.
        bytes: &'static [u8],
    },
}

impl Blob {
    /// The file's name with its directory.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::File { name, .. } | Self::Memory { name, .. } => name,
        }
    }

    /// Size in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::File { bytes, .. } => *bytes,
            Self::Memory { bytes, .. } => bytes.len() as u64,
        }
    }

    /// Fills `out` from byte `offset` on.
    pub(crate) fn read_exact_at(&self, out: &mut [u8], offset: u64) -> Result<(), Error> {
        let outcome = match self {
            Self::File { file, .. } => file.read_exact_at(out, offset),
            Self::Memory { bytes, .. } => copy_at(bytes, out, offset),
        };
        outcome.map_err(|source| Error::Io { file: self.name().to_owned(), action: "read", source })
    }
}

fn copy_at(bytes: &[u8], out: &mut [u8], offset: u64) -> io::Result<()> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let end = start.saturating_add(out.len());
    let source = bytes.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
    out.copy_from_slice(source);
    Ok(())
}
