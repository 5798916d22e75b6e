//! Rehearsed failures: a wrapper that behaves like its inner collective until a chosen operation.

use std::thread;
use std::time::Duration;

use types::TpRank;

use crate::{Collective, Counters, Error, Op};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The rank comes this much later, then does its part.
    Delay(Duration),
    /// The rank hangs: it sends nothing for this long, then gives up with [`Error::Deadline`] naming itself. With a
    /// time longer than the group's deadline, the others run into theirs.
    Hang(Duration),
    /// The rank brings one element more than it should (for a barrier, which has none: it brings a broadcast).
    CorruptCount,
    /// The rank leaves the group, as a killed process does.
    Leave,
}

/// A collective in which one operation goes wrong.
#[derive(Debug)]
pub struct Faulty<C> {
    /// `None` once the rank has left.
    inner: Option<C>,
    rank: TpRank,
    fault: Fault,
    /// The operation that goes wrong, counted from 1.
    at: u64,
    done: u64,
}

/// What to do with the current operation.
enum Step<'a, C> {
    Usual(&'a mut C),
    OneMore(&'a mut C),
}

impl<C: Collective<[f32]>> Faulty<C> {
    /// Wraps `inner` so that `fault` happens at its operation number `at`, counted from 1.
    #[must_use]
    pub fn new(inner: C, fault: Fault, at: u64) -> Self {
        Self { rank: inner.rank(), inner: Some(inner), fault, at, done: 0 }
    }

    /// The wrapped collective, unless the rank has left.
    #[must_use]
    pub const fn inner(&self) -> Option<&C> {
        self.inner.as_ref()
    }

    fn step(&mut self, op: Op) -> Result<Step<'_, C>, Error> {
        self.done += 1;
        let now = self.done == self.at;
        if now && self.fault == Fault::Leave {
            self.inner = None;
        }
        let rank = self.rank.index();
        let Some(inner) = &mut self.inner else {
            return Err(Error::PeerLost { rank, collective: op.name() });
        };
        if !now {
            return Ok(Step::Usual(inner));
        }
        match self.fault {
            Fault::Delay(span) => {
                thread::sleep(span);
                Ok(Step::Usual(inner))
            }
            Fault::Hang(span) => {
                thread::sleep(span);
                inner.abort();
                Err(Error::Deadline { rank, collective: op.name(), sequence: self.done, after: span })
            }
            Fault::CorruptCount => Ok(Step::OneMore(inner)),
            Fault::Leave => Err(Error::PeerLost { rank, collective: op.name() }),
        }
    }
}

/// `data` with one more element at its end.
fn longer(data: &[f32]) -> Vec<f32> {
    let mut longer = data.to_vec();
    longer.push(0.0);
    longer
}

/// `counts` with one more for the last rank that is not `own` (or for `own` when it is alone).
fn more(counts: &[usize], own: usize) -> Vec<usize> {
    let mut more = counts.to_vec();
    let last = (0..more.len()).rev().find(|rank| *rank != own).unwrap_or(own);
    if let Some(count) = more.get_mut(last) {
        *count += 1;
    }
    more
}

impl<C: Collective<[f32]>> Collective<[f32]> for Faulty<C> {
    fn rank(&self) -> TpRank {
        self.rank
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), Error> {
        match self.step(Op::AllReduce)? {
            Step::Usual(inner) => inner.all_reduce_sum(data),
            Step::OneMore(inner) => inner.all_reduce_sum(&mut longer(data)),
        }
    }

    fn reduce_scatter_sum(&mut self, data: &[f32], counts: &[usize], own: &mut [f32]) -> Result<(), Error> {
        let me = self.rank.as_usize();
        match self.step(Op::ReduceScatter)? {
            Step::Usual(inner) => inner.reduce_scatter_sum(data, counts, own),
            Step::OneMore(inner) => inner.reduce_scatter_sum(&longer(data), &more(counts, me), own),
        }
    }

    fn all_gather(&mut self, own: &[f32], counts: &[usize], all: &mut [f32]) -> Result<(), Error> {
        let me = self.rank.as_usize();
        match self.step(Op::AllGather)? {
            Step::Usual(inner) => inner.all_gather(own, counts, all),
            Step::OneMore(inner) => inner.all_gather(own, &more(counts, me), &mut longer(all)),
        }
    }

    fn all_to_all_v(
        &mut self,
        send: &[f32],
        send_counts: &[usize],
        recv: &mut [f32],
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        let me = self.rank.as_usize();
        match self.step(Op::AllToAll)? {
            Step::Usual(inner) => inner.all_to_all_v(send, send_counts, recv, recv_counts),
            Step::OneMore(inner) => {
                inner.all_to_all_v(&longer(send), &more(send_counts, me), recv, recv_counts)
            }
        }
    }

    fn all_to_all_open(
        &mut self,
        send: &[f32],
        send_counts: &[usize],
        recv: &mut [f32],
        room: &[usize],
        came: &mut [usize],
    ) -> Result<(), Error> {
        let me = self.rank.as_usize();
        match self.step(Op::AllToAll)? {
            Step::Usual(inner) => inner.all_to_all_open(send, send_counts, recv, room, came),
            Step::OneMore(inner) => {
                inner.all_to_all_open(&longer(send), &more(send_counts, me), recv, room, came)
            }
        }
    }

    fn broadcast(&mut self, root: u32, data: &mut [f32]) -> Result<(), Error> {
        match self.step(Op::Broadcast)? {
            Step::Usual(inner) => inner.broadcast(root, data),
            Step::OneMore(inner) => inner.broadcast(root, &mut longer(data)),
        }
    }

    fn barrier(&mut self) -> Result<(), Error> {
        match self.step(Op::Barrier)? {
            Step::Usual(inner) => inner.barrier(),
            Step::OneMore(inner) => inner.broadcast(0, &mut [0.0]),
        }
    }

    fn counters(&self) -> Counters {
        self.inner.as_ref().map(Collective::counters).unwrap_or_default()
    }

    fn abort(&mut self) {
        if let Some(inner) = &mut self.inner {
            inner.abort();
        }
    }
}
