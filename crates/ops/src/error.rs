//! What a backend can refuse or fail at.

use types::Bytes;

/// Errors of the op set and of backends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Operands whose shapes do not fit; always a bug in the caller, reported instead of read out of bounds.
    #[error("{op}: {detail}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The shapes that were given and the rule they break.
        detail: String,
    },
    /// Memory the device does not have.
    #[error("{what} needs {needed}, and {available} are available")]
    Memory {
        /// What the memory was for.
        what: String,
        /// How much it needs.
        needed: Bytes,
        /// How much there is.
        available: Bytes,
    },
    /// The backend's library or device reported a failure.
    #[error("{op} failed: {reason}")]
    Device {
        /// The operation.
        op: &'static str,
        /// The library's words.
        reason: String,
    },
    /// A logit that is not a number: the weights are damaged or the computation overflowed.
    #[error("row {row} has a logit that is not a number (vocabulary entry {token})")]
    NotANumber {
        /// The row among those asked for.
        row: usize,
        /// The first entry that is NaN.
        token: usize,
    },
}
