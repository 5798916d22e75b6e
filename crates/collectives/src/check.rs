//! Checks of a caller's own arguments, the same on every transport.

use types::{TpRank, TpSize};

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
    counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count)).ok_or_else(|| Error::Argument {
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

/// The arguments of [`Collective::all_to_all_open`](crate::Collective::all_to_all_open); lengths of the buffers.
pub(crate) struct Open<'a> {
    pub(crate) send: usize,
    pub(crate) send_counts: &'a [usize],
    pub(crate) recv: usize,
    pub(crate) room: &'a [usize],
    pub(crate) came: usize,
}

impl Open<'_> {
    /// They fit each other on `rank`.
    pub(crate) fn check(&self, rank: TpRank) -> Result<(), Error> {
        let (op, size, me) = (Op::AllToAll, rank.size(), rank.as_usize());
        let sends = counts(op, "send counts", self.send_counts, size)?;
        let room = counts(op, "room", self.room, size)?;
        length(op, "length of the input", sends, self.send)?;
        length(op, "number of counts that came", size.as_usize(), self.came)?;
        let at_least = |what, least: usize, got: usize| match got >= least {
            true => Ok(()),
            false => {
                let (collective, expected) = (op.name(), format!("at least {least}"));
                Err(Error::Argument { collective, what, expected, got: got as u64 })
            }
        };
        at_least("length of the output", room, self.recv)?;
        at_least("room for this rank's own", self.send_counts[me], self.room[me])
    }
}

/// The place of `rank` in the sub-group of `size` ranks it belongs to, and the number of that sub-group's first rank.
pub(crate) fn subgroup(rank: TpRank, size: TpSize) -> Result<(TpRank, usize), Error> {
    let (whole, each) = (rank.size().get(), size.get());
    match TpRank::new(rank.index() % each, size) {
        Ok(own) if whole.is_multiple_of(each) => Ok((own, (rank.index() - own.index()) as usize)),
        Ok(_) | Err(_) => Err(Error::Argument {
            collective: "split",
            what: "ranks of a sub-group",
            expected: format!("a divisor of the {whole} ranks of the group"),
            got: each.into(),
        }),
    }
}
