//! What a rank tells whoever started it, as it happens.

use std::net::SocketAddr;
use std::time::Duration;

use proto::Phase;
use types::Bytes;

/// One event of a rank's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// Rank 0 listens for the other ranks here.
    Rendezvous(SocketAddr),
    /// The leader serves routers here.
    Listening(SocketAddr),
    /// A phase has begun or moved on: `done` of `total` bytes while loading, 0 of 0 elsewhere.
    Phase {
        /// The phase.
        phase: Phase,
        /// Work done.
        done: Bytes,
        /// Work in all.
        total: Bytes,
    },
    /// The weights are resident.
    Loaded {
        /// Memory they take on this rank.
        resident: Bytes,
        /// Bytes read from the checkpoint.
        read: Bytes,
        /// Tensors read, wholly or in part.
        tensors: usize,
        /// Vision tensors of the checkpoint, which are left alone.
        skipped_tensors: usize,
        /// Their size.
        skipped_bytes: Bytes,
        /// How long it took.
        elapsed: Duration,
        /// What runs the model: `cpu, 2 threads, f32`.
        device: String,
    },
    /// The rank takes work.
    Ready {
        /// Time since the rank started.
        elapsed: Duration,
    },
    /// The rank goes on, every [`crate::ALIVE_INTERVAL`] from then on. A leader's engine thread says so itself, so one that
    /// hangs is noticed.
    Alive,
}

/// Receives a rank's reports; must not block for long.
pub trait Reporter: Send + Sync {
    /// Called from the rank's threads, in order for each thread.
    fn report(&self, event: Report);
}

impl<F: Fn(Report) + Send + Sync> Reporter for F {
    fn report(&self, event: Report) {
        self(event);
    }
}
