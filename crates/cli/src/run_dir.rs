//! Where a running `cohort up` leaves what `cohort debug` needs: one file for each leader, named by its address, that holds
//! the cluster's secret. Only this user can read it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, getuid, test_kill_process};
use security::Secret;

/// The directory of the files, and those this process has written; they are gone when this is dropped.
#[derive(Debug)]
pub(crate) struct RunDir {
    directory: PathBuf,
    written: Vec<PathBuf>,
}

/// Where it is for this user: in the system's directory for such things, or beside temporary files.
fn place() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty()) {
        Some(directory) => Path::new(&directory).join("cohort"),
        None => std::env::temp_dir().join(format!("cohort-{}", getuid().as_raw())),
    }
}

/// Refuses a directory that somebody else made, or could read or write.
fn check(directory: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(directory)?;
    let own = found.is_dir() && found.uid() == getuid().as_raw() && found.mode().trailing_zeros() >= 6;
    if own {
        return Ok(());
    }
    let why = format!("{} is not a directory that only this user can read", directory.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

impl RunDir {
    /// The directory, made if there is none.
    ///
    /// # Errors
    /// When it cannot be made, or is not private.
    pub(crate) fn open() -> io::Result<Self> {
        let directory = place();
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        check(&directory)?;
        Ok(Self { directory, written: Vec::new() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.directory
    }

    /// Leaves the secret of the leader at `address`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn note(&mut self, address: SocketAddr, secret: &Secret) -> io::Result<()> {
        let path = self.directory.join(address.to_string());
        let own = self.directory.join(format!(".{address}.{}", std::process::id()));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&own)?;
        let written = writeln!(file, "{}\n{}", std::process::id(), secret.expose_all())
            .and_then(|()| fs::rename(&own, &path));
        if written.is_err() {
            let _ = fs::remove_file(&own);
        } else if !self.written.contains(&path) {
            self.written.push(path);
        }
        written
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        for path in &self.written {
            let _ = fs::remove_file(path);
        }
    }
}

/// What the file of a leader holds, unless its cluster is gone.
fn read(path: &Path) -> Option<Secret> {
    let text = fs::read_to_string(path).ok()?;
    let (pid, secret) = text.split_once('\n')?;
    let pid = Pid::from_raw(pid.parse().ok()?)?;
    test_kill_process(pid).ok()?;
    Secret::parse(secret).ok()
}

/// The secret of the leader at `address`, if a cluster of this user has left it.
pub(crate) fn secret_of(address: SocketAddr) -> Option<Secret> {
    let directory = place();
    check(&directory).ok()?;
    read(&directory.join(address.to_string()))
}

/// The leaders of all clusters that this user runs here.
pub(crate) fn leaders() -> Vec<SocketAddr> {
    let directory = place();
    if check(&directory).is_err() {
        return Vec::new();
    }
    let files = fs::read_dir(&directory).into_iter().flatten().flatten();
    let leader = |file: fs::DirEntry| {
        let address = file.file_name().to_str()?.parse().ok()?;
        read(&file.path()).map(|_| address)
    };
    let mut all: Vec<SocketAddr> = files.filter_map(leader).collect();
    all.sort();
    all
}
