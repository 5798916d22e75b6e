//! Why a rank could not start, or had to stop.

use std::net::SocketAddr;

use types::TpRank;

/// Errors of a rank. Each ends the process: the group is the unit of recovery.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint, its configuration or the shard plan was refused, or a step failed.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The ranks could not come together, or lost each other.
    #[error("{rank}: {source}")]
    Group {
        /// Who reports it.
        rank: TpRank,
        /// Names the rank to look at.
        source: collectives::Error,
    },
    /// The engine's budgets cannot work, or a follower's state parted from the leader's plans.
    #[error("{rank}: {source}")]
    Engine {
        /// Who reports it.
        rank: TpRank,
        /// The budget, or the part of the plan.
        source: engine::Error,
    },
    /// The device refused something.
    #[error("{rank}: {source}")]
    Device {
        /// Who reports it.
        rank: TpRank,
        /// The device's words.
        source: ops::Error,
    },
    /// CUDA was asked for and is not usable.
    #[error("--device cuda: {0}")]
    Cuda(ops_cuda::Error),
    /// A part of the model that its device has no memory for.
    #[error("{rank} has too little memory:{table}\n{nearest}")]
    TooLarge {
        /// Whose part.
        rank: TpRank,
        /// What it would take, a line for each kind.
        table: String,
        /// The nearest plan that fits.
        nearest: String,
    },
    /// A budget of this configuration does not fit the model.
    #[error("{field} is {got}, and must be {needed}")]
    Budget {
        /// The configuration key.
        field: &'static str,
        /// Its value.
        got: String,
        /// What would be right.
        needed: String,
    },
    /// A certificate or a key cannot be used.
    #[error(transparent)]
    Security(#[from] security::Error),
    /// The leader's listener could not be opened.
    #[error("cannot listen on {address}: {source}; choose another --listen address")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// The listener for metrics could not be opened.
    #[error("cannot listen on {address}: {source}; choose another --metrics-listen address")]
    MetricsListen {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// Routers are to be told an address that nobody can reach.
    #[error(
        "routers cannot reach {address}, where this leader listens: say with group.advertise (--advertise) where they can"
    )]
    Advertise {
        /// The address.
        address: SocketAddr,
    },
    /// The system refused a thread or a runtime.
    #[error("cannot start {what}: {source}")]
    Start {
        /// What was to be started.
        what: &'static str,
        /// The system's words.
        source: std::io::Error,
    },
    /// The model is loaded and cannot produce a token.
    #[error("the warm-up token failed, so this model cannot serve: {why}")]
    WarmUp {
        /// What the engine reported.
        why: String,
    },
    /// The executor ended while the engine went on; its own error says more.
    #[error("{rank}: no more steps can be run: {why}")]
    Stopped {
        /// Who reports it.
        rank: TpRank,
        /// What the executor said.
        why: String,
    },
    /// The gRPC server ended by itself.
    #[error("the gRPC server failed: {0}")]
    Server(String),
    /// A follower that was told to stop saw no end of its leader.
    #[error("{rank} was told to stop, and its leader did not end within {seconds} s")]
    LeaderWouldNotEnd {
        /// The follower.
        rank: TpRank,
        /// How long it waited.
        seconds: u64,
    },
}
