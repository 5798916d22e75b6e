//! The one error of this crate. It can be copied, because a failed collective answers every later call with the
//! error that broke it.

use std::fmt;
use std::io;
use std::time::Duration;

/// Why a rank gave up the group, as it tells the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// `abort()` was called.
    Asked,
    /// This rank was found to be gone.
    Lost(u32),
    /// This rank did not come before the deadline.
    Late(u32),
    /// This rank brought another operation or size.
    Mismatch(u32),
    /// The aborting rank failed by itself: a wrong argument or an I/O error of its own.
    Failed,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("it was asked to"),
            Self::Lost(rank) => write!(f, "rank {rank} was lost"),
            Self::Late(rank) => write!(f, "rank {rank} did not come in time"),
            Self::Mismatch(rank) => write!(f, "rank {rank} brought another operation or size"),
            Self::Failed => f.write_str("an operation failed there"),
        }
    }
}

/// What all ranks of a group must have in common before they may join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// The version of the rendezvous and frame formats.
    ProtocolVersion,
    /// The number of ranks.
    GroupSize,
    /// The parallel plan, for example `tensor=2`.
    Plan,
    /// The hash over the configuration and checkpoint of each rank.
    ConfigHash,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProtocolVersion => "protocol version",
            Self::GroupSize => "group size",
            Self::Plan => "plan",
            Self::ConfigHash => "config hash",
        })
    }
}

/// Why ranks could not be brought together, or why an operation between them failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A rank ended the group; no operation is possible any more.
    #[error("rank {rank} aborted the group: {cause}")]
    Aborted {
        /// The rank that gave up.
        rank: u32,
        /// Why it did.
        cause: Cause,
    },
    /// A rank's connection closed or broke: its process is gone or has left the group.
    #[error("rank {rank} was lost during {collective}: its connection closed")]
    PeerLost {
        /// The rank that is gone.
        rank: u32,
        /// What was going on.
        collective: &'static str,
    },
    /// A rank did not do its part in time.
    #[error("rank {rank} did not come to {collective} number {sequence} within {after:?}")]
    Deadline {
        /// The first rank that was missing.
        rank: u32,
        /// What was going on.
        collective: &'static str,
        /// The number of the operation, counted from 1 in the life of the group.
        sequence: u64,
        /// How long this rank waited.
        after: Duration,
    },
    /// Two ranks do not agree about the operation they are in.
    #[error("{collective}: {what} is {ours} here and {theirs} on rank {rank}; both must be the same")]
    Mismatch {
        /// The rank that differs.
        rank: u32,
        /// The operation this rank is in.
        collective: &'static str,
        /// What differs: the operation, its size, a count, the root, …
        what: &'static str,
        /// This rank's value.
        ours: String,
        /// The other rank's value.
        theirs: String,
    },
    /// The devices between which a collective runs failed, or did not end it in time.
    #[error("rank {rank}: {collective}: {failed}; {missing}")]
    Device {
        /// This rank.
        rank: u32,
        /// What was going on.
        collective: String,
        /// What the devices' own library says.
        failed: String,
        /// Which rank's host does not answer either, in words.
        missing: String,
    },
    /// The caller's own buffers or counts do not fit each other.
    #[error("{collective}: {what} must be {expected}, not {got}")]
    Argument {
        /// The operation.
        collective: &'static str,
        /// The argument.
        what: &'static str,
        /// What would be right.
        expected: String,
        /// What was given.
        got: u64,
    },
    /// Ranks that did not join before the deadline.
    #[error("{} did not join the group within {after:?}", named(ranks))]
    Absent {
        /// The missing ranks, in order.
        ranks: Vec<u32>,
        /// How long was waited.
        after: Duration,
    },
    /// A rank that wants to join differs from rank 0 in something all must share.
    #[error("{field} is {ours} here and {theirs} on rank {rank}; all ranks of a group must agree")]
    Disagreement {
        /// The rank at the other end.
        rank: u32,
        /// What differs.
        field: Field,
        /// This rank's value.
        ours: String,
        /// The other rank's value.
        theirs: String,
    },
    /// Two processes claim the same rank.
    #[error("two processes claim rank {rank}; each rank joins once")]
    DuplicateRank {
        /// The rank that was claimed twice.
        rank: u32,
    },
    /// A process claims a rank the group does not have, or one that is not its to claim.
    #[error("a process claims rank {rank}; in a group of {size}, ranks 1 to {} join rank 0", size.saturating_sub(1))]
    RankOutOfRange {
        /// The claimed rank.
        rank: u32,
        /// The number of ranks of the group.
        size: u32,
    },
    /// Rank 0 gave up forming the group for a reason that is not this rank's.
    #[error("rank 0 gave up forming the group: {reason}")]
    GaveUp {
        /// Rank 0's own error, as text.
        reason: String,
    },
    /// A message on the plan channel or at the rendezvous is larger than its limit.
    #[error("{what} with rank {rank} has {bytes} bytes; the limit is {max}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The rank at the other end.
        rank: u32,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The operating system refused something.
    #[error("{doing}: {message}")]
    Io {
        /// What was tried, with the address.
        doing: String,
        /// The kind of failure.
        kind: io::ErrorKind,
        /// The system's words.
        message: String,
    },
}

impl Error {
    /// Wraps an I/O error with what was being tried.
    pub(crate) fn io(doing: impl Into<String>, error: &io::Error) -> Self {
        Self::Io { doing: doing.into(), kind: error.kind(), message: error.to_string() }
    }

    /// The rank to look at first: the one that is gone, late or different, as far as this rank was told.
    #[must_use]
    pub fn culprit(&self) -> Option<u32> {
        match self {
            Self::Aborted { rank, cause } => Some(match cause {
                Cause::Lost(culprit) | Cause::Late(culprit) | Cause::Mismatch(culprit) => *culprit,
                Cause::Asked | Cause::Failed => *rank,
            }),
            Self::PeerLost { rank, .. }
            | Self::Deadline { rank, .. }
            | Self::Mismatch { rank, .. }
            | Self::Disagreement { rank, .. }
            | Self::DuplicateRank { rank }
            | Self::RankOutOfRange { rank, .. }
            | Self::TooLarge { rank, .. } => Some(*rank),
            Self::Absent { ranks, .. } => ranks.first().copied(),
            Self::Argument { .. } | Self::GaveUp { .. } | Self::Device { .. } | Self::Io { .. } => None,
        }
    }

    /// What to tell the other ranks when this error ends the group.
    pub(crate) fn cause(&self) -> Cause {
        match self {
            Self::Aborted { cause, .. } => *cause,
            Self::PeerLost { rank, .. } => Cause::Lost(*rank),
            Self::Deadline { rank, .. } => Cause::Late(*rank),
            Self::Mismatch { rank, .. } => Cause::Mismatch(*rank),
            Self::Argument { .. }
            | Self::Absent { .. }
            | Self::Disagreement { .. }
            | Self::DuplicateRank { .. }
            | Self::RankOutOfRange { .. }
            | Self::GaveUp { .. }
            | Self::TooLarge { .. }
            | Self::Device { .. }
            | Self::Io { .. } => Cause::Failed,
        }
    }

    /// What a rank in `collective` reports when rank `from` tells it that the group ended because of `cause`.
    pub(crate) fn told(from: u32, cause: Cause, collective: &'static str) -> Self {
        match cause {
            Cause::Lost(rank) => Self::PeerLost { rank, collective },
            Cause::Asked | Cause::Late(_) | Cause::Mismatch(_) | Cause::Failed => {
                Self::Aborted { rank: from, cause }
            }
        }
    }
}

/// `rank 1`, or `ranks 1, 3`.
fn named(ranks: &[u32]) -> String {
    let list: Vec<String> = ranks.iter().map(ToString::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, list.join(", "))
}
