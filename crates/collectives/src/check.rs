//! Checks of a caller's own arguments, the same on every transport.

use types::TpSize;

use crate::{Error, Op};

/// Buffers have the lengths the operation says they have.
pub(crate) fn length(op: Op, what: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Argument { collective: op.name(), what, expected: expected.to_string(), got: got as u64 })
}

/// One count for each rank; returns their sum.
pub(crate) fn counts(op: Op, what: &'static str, counts: &[usize], size: TpSize) -> Result<usize, Error> {
    length(op, what, size.as_usize(), counts.len())?;
    counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count)).ok_or(Error::Argument {
        collective: op.name(),
        what,
        expected: "counts with a sum that fits the address space".to_owned(),
        got: u64::MAX,
    })
}

/// The root is a rank of the group.
pub(crate) fn root(root: u32, size: TpSize) -> Result<(), Error> {
    if root < size.get() {
        return Ok(());
    }
    Err(Error::Argument {
        collective: Op::Broadcast.name(),
        what: "root",
        expected: format!("below {size}"),
        got: u64::from(root),
    })
}
