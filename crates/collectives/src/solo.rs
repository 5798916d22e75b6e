//! A group of one. A real member of the contract: it checks sizes, counts operations and can be aborted.

use std::time::Duration;

use types::{TpRank, TpSize};

use crate::counters::Moved;
use crate::{Cause, Collective, Counters, Error, Op, check};

/// The only rank of a group of one: every sum is its own data.
#[derive(Debug, Default)]
pub struct Solo {
    counters: Counters,
    failed: Option<Error>,
}

impl Solo {
    /// A new group of one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The only sub-group: another group of one.
    ///
    /// # Errors
    /// [`Error::Argument`] when `size` is not 1.
    pub fn split(&self, size: TpSize) -> Result<Self, Error> {
        check::subgroup(TpRank::SOLO, size).map(|_| Self::new())
    }

    fn run(&mut self, op: Op, work: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match work() {
            Ok(()) => self.counters.note(op, 0, Moved::default(), Duration::ZERO),
            Err(error) => {
                self.failed = Some(error.clone());
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Copies `from`, which must be as long as `counts` says, to `into`.
fn copy(op: Op, from: &[f32], counts: &[usize], into: &mut [f32]) -> Result<(), Error> {
    let total = check::counts(op, "counts", counts, TpSize::ONE)?;
    check::length(op, "length of the input", total, from.len())?;
    check::length(op, "length of the output", total, into.len())?;
    into.copy_from_slice(from);
    Ok(())
}

impl Collective<[f32]> for Solo {
    fn rank(&self) -> TpRank {
        TpRank::SOLO
    }

    fn all_reduce_sum(&mut self, _data: &mut [f32]) -> Result<(), Error> {
        self.run(Op::AllReduce, || Ok(()))
    }

    fn reduce_scatter_sum(&mut self, data: &[f32], counts: &[usize], own: &mut [f32]) -> Result<(), Error> {
        self.run(Op::ReduceScatter, || copy(Op::ReduceScatter, data, counts, own))
    }

    fn all_gather(&mut self, own: &[f32], counts: &[usize], all: &mut [f32]) -> Result<(), Error> {
        self.run(Op::AllGather, || copy(Op::AllGather, own, counts, all))
    }

    fn all_to_all_v(
        &mut self,
        send: &[f32],
        send_counts: &[usize],
        recv: &mut [f32],
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        self.run(Op::AllToAll, || {
            check::counts(Op::AllToAll, "receive counts", recv_counts, TpSize::ONE)?;
            check::length(Op::AllToAll, "length of the output", recv_counts[0], recv.len())?;
            copy(Op::AllToAll, send, send_counts, recv)
        })
    }

    fn all_to_all_open(
        &mut self,
        send: &[f32],
        send_counts: &[usize],
        recv: &mut [f32],
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error> {
        self.run(Op::AllToAll, || {
            let open =
                check::Open { send: send.len(), send_counts, recv: recv.len(), room, came: came.len() };
            open.check(TpRank::SOLO)?;
            recv[..send.len()].copy_from_slice(send);
            came[0] = send.len();
            Ok(())
        })
    }

    fn broadcast(&mut self, root: u32, _data: &mut [f32]) -> Result<(), Error> {
        self.run(Op::Broadcast, || check::root(root, TpSize::ONE))
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.run(Op::Barrier, || Ok(()))
    }

    /// No bytes ever move.
    fn counters(&self) -> Counters {
        self.counters
    }

    fn abort(&mut self) {
        self.failed.get_or_insert(Error::Aborted { rank: 0, cause: Cause::Asked });
    }
}
