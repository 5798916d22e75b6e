//! Why a router cannot start or go on.

use std::net::SocketAddr;
use std::path::PathBuf;

/// What stops a router, as opposed to a request: see [`proto::Failure`] for those.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A listener could not be opened.
    #[error("cannot listen on {address}: {source}; choose another address with {flag}")]
    Bind {
        /// The address that was asked for.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A worker's address is not a URL.
    #[error("worker address `{address}` is not of the form http://host:port or https://host:port: {reason}")]
    WorkerAddress {
        /// The configured text.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Groups are to register, and nothing tells them from strangers.
    #[error(
        "router.registration needs the cluster's secret: set cluster.secret_file, or COHORT_CLUSTER_SECRET"
    )]
    NoSecret,
    /// No worker was configured.
    #[error(
        "no worker addresses are configured; a router needs at least one, such as http://127.0.0.1:7100, or router.registration"
    )]
    NoWorkers,
    /// A checkpoint file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A checkpoint file was read and is not what it should be.
    #[error("{file}: {reason}")]
    File {
        /// The file's name inside the checkpoint.
        file: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A certificate, a key, or the file of API keys cannot be used.
    #[error(transparent)]
    Security(#[from] security::Error),
    /// A listener broke while serving.
    #[error("the {what} server stopped: {reason}")]
    Serve {
        /// `gRPC` or `HTTP`.
        what: &'static str,
        /// The reason.
        reason: String,
    },
}
