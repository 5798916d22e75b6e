//! The one error of this crate: a value that was refused, with the field it came from.

/// One refused field of a request, in the words a caller can act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field as the API names it, for example `sampling.top_p`.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl FieldViolation {
    /// Builds a violation of `field`.
    #[must_use]
    pub fn new(field: &'static str, reason: impl Into<String>) -> Self {
        Self { field, reason: reason.into() }
    }
}

/// A value that could not be built because its parts are not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// One or more request fields are out of range; all of them are listed.
    #[error("{}", list(.0))]
    Invalid(Vec<FieldViolation>),
    /// A rank that is not below the size of its group.
    #[error("rank {rank} is not below the group size {size}")]
    Rank {
        /// The rank that was asked for.
        rank: u32,
        /// The group size.
        size: u32,
    },
    /// A count above its limit.
    #[error("must be at most {max}, not {got}")]
    TooMany {
        /// The value that was refused.
        got: u64,
        /// The largest value allowed.
        max: u64,
    },
    /// A priority outside its range.
    #[error("priority must be between -{max} and {max}, not {got}")]
    Priority {
        /// The value that was refused.
        got: i32,
        /// The largest value allowed.
        max: i32,
    },
    /// A count that must be at least one and within its limit.
    #[error("{what} must be between 1 and {max}, not {got}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// The value that was refused.
        got: u64,
        /// The largest value allowed.
        max: u64,
    },
}

fn list(violations: &[FieldViolation]) -> String {
    let lines: Vec<String> = violations.iter().map(|v| format!("{}: {}", v.field, v.reason)).collect();
    lines.join("; ")
}
