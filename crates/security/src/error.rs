//! What keeps a process from starting with the credentials it was given.

use std::path::PathBuf;

/// Every variant names the file. The same errors, logged, keep a changed file from replacing the one in force.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is larger than any real one.
    #[error("{} has more than {max} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound, in bytes.
        max: u64,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A certificate's time is over, or has not come.
    #[error("{}: the certificate is valid from {from} until {until}, and it is {now} now", path.display())]
    NotNow {
        /// The file.
        path: PathBuf,
        /// The first moment, as `2026-01-31T12:00:00Z`.
        from: String,
        /// The last moment.
        until: String,
        /// The clock of this machine.
        now: String,
    },
    /// A certificate and a key that do not belong together.
    #[error("{} is not the key of the certificate in {}", key.display(), certificate.display())]
    OtherKey {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The system gave no random bytes.
    #[error("cannot read /dev/urandom: {0}")]
    Random(std::io::Error),
}
