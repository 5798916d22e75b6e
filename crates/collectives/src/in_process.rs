//! Ranks that are threads of one process. Every rank leaves its data in a slot the others read; two sets of slots take
//! turns, so one wait an operation is enough: a slot is written again only after everyone has arrived at the operation
//! in between, and so has finished reading.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use types::{TpRank, TpSize};

use crate::counters::Moved;
use crate::sum::add;
use crate::{Cause, Collective, Counters, Error, Op, check, socket};

/// One rank of a group of threads, or of a sub-group of it. Dropping it is leaving: the others get
/// [`Error::PeerLost`].
#[derive(Debug)]
pub struct InProcess {
    /// In this group.
    rank: TpRank,
    /// The whole group and its sub-groups, which end together.
    family: Arc<Mutex<Vec<Arc<Shared>>>>,
    deadline: Duration,
    sequence: u64,
    shared: Arc<Shared>,
    counters: Counters,
    failed: Option<Error>,
}

#[derive(Debug)]
struct Shared {
    /// Rank 0 of this group in the whole one; its ranks follow each other.
    first: u32,
    size: TpSize,
    /// `[sequence % 2][rank]`.
    slots: [Vec<RwLock<Slot>>; 2],
    group: Mutex<Group>,
    changed: Condvar,
}

#[derive(Debug)]
struct Group {
    /// The last operation each rank has arrived at.
    arrived: Vec<u64>,
    left: Vec<bool>,
    /// The first rank that gave up (in the whole group), and why.
    failure: Option<(u32, Cause)>,
}

/// What a rank brings to an operation.
#[derive(Debug)]
struct Slot {
    op: Op,
    root: u32,
    /// Elements in the whole operation; 0 where it may differ between ranks.
    total: usize,
    counts: Vec<usize>,
    data: Vec<f32>,
}

/// The caller's view of one operation, before it is copied into a slot.
#[derive(Clone, Copy)]
struct Call<'a> {
    op: Op,
    root: u32,
    total: usize,
    counts: &'a [usize],
}

impl InProcess {
    /// A group of `size` ranks, in rank order; an operation fails when a rank does not come within `deadline`.
    #[must_use]
    pub fn group(size: TpSize, deadline: Duration) -> Vec<Self> {
        let shared = Arc::new(Shared::new(0, size));
        let family = Arc::new(Mutex::new(vec![Arc::clone(&shared)]));
        size.ranks().map(|rank| Self::member(rank, deadline, &shared, &family)).collect()
    }

    /// This rank's part in the sub-group of `size` ranks it belongs to: ranks 0 to `size - 1` are the first, and so on.
    /// Sub-groups may run different operations at the same time, and end with the group. Errors name ranks by their
    /// number in the whole group. Every rank splits a group the same way, and once.
    ///
    /// # Errors
    /// [`Error::Argument`] when this group does not divide into sub-groups of `size`.
    pub fn split(&self, size: TpSize) -> Result<Self, Error> {
        let (rank, first) = check::subgroup(self.rank, size)?;
        let first = self.shared.first + first as u32;
        let mut family = self.family.lock().unwrap_or_else(PoisonError::into_inner);
        // The whole group is the first entry, and is not its own sub-group.
        let there = family[1..].iter().find(|shared| (shared.first, shared.size) == (first, size)).cloned();
        let shared = there.unwrap_or_else(|| {
            let shared = Arc::new(Shared::new(first, size));
            shared.lock().failure = self.shared.lock().failure;
            family.push(Arc::clone(&shared));
            shared
        });
        Ok(Self::member(rank, self.deadline, &shared, &self.family))
    }

    fn member(
        rank: TpRank,
        deadline: Duration,
        shared: &Arc<Shared>,
        family: &Arc<Mutex<Vec<Arc<Shared>>>>,
    ) -> Self {
        Self {
            rank,
            family: Arc::clone(family),
            deadline,
            sequence: 0,
            shared: Arc::clone(shared),
            counters: Counters::default(),
            failed: None,
        }
    }

    /// This rank's number in the whole group.
    fn global(&self) -> u32 {
        self.shared.first + self.rank.index()
    }

    /// Deposits `data`, waits for all ranks and checks that they are in the same operation. Returns what each rank
    /// brought, in rank order.
    fn meet(&mut self, call: Call<'_>, data: &[f32]) -> Result<&[RwLock<Slot>], Error> {
        self.sequence += 1;
        let slots = &self.shared.slots[(self.sequence % 2) as usize];
        slots[self.rank.as_usize()].write().unwrap_or_else(PoisonError::into_inner).fill(call, data);
        self.arrive(call.op)?;
        for (peer, slot) in (self.shared.first..).zip(slots) {
            read(slot).compare(call, peer)?;
        }
        Ok(slots)
    }

    fn arrive(&self, op: Op) -> Result<(), Error> {
        let until = socket::from_now(self.deadline);
        let mut group = self.shared.lock();
        group.arrived[self.rank.as_usize()] = self.sequence;
        self.shared.changed.notify_all();
        loop {
            let Some(missing) = group.arrived.iter().position(|at| *at < self.sequence) else {
                return Ok(());
            };
            if let Some((from, cause)) = group.failure {
                return Err(Error::told(from, cause, op.name()));
            }
            let gone = |(at, left): (&u64, &bool)| *left && *at < self.sequence;
            if let Some(lost) = group.arrived.iter().zip(&group.left).position(gone) {
                return Err(Error::PeerLost { rank: self.shared.first + lost as u32, collective: op.name() });
            }
            let now = Instant::now();
            if now >= until {
                return Err(Error::Deadline {
                    rank: self.shared.first + missing as u32,
                    collective: op.name(),
                    sequence: self.sequence,
                    after: self.deadline,
                });
            }
            let waited = self.shared.changed.wait_timeout(group, until - now);
            group = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs one operation: fails at once after an earlier failure, notes what moved, tells the others of an error.
    fn run(&mut self, op: Op, work: impl FnOnce(&mut Self) -> Result<Moved, Error>) -> Result<(), Error> {
        let begun = Instant::now();
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let ended = self.shared.lock().failure;
        let outcome = match ended {
            Some((from, cause)) => Err(Error::told(from, cause, op.name())),
            None => work(self),
        };
        match outcome {
            Ok(moved) => {
                self.counters.note(op, self.others() as u64, moved, begun.elapsed());
                Ok(())
            }
            Err(error) => {
                self.fail(error.clone());
                Err(error)
            }
        }
    }

    fn fail(&mut self, error: Error) {
        let failure = (self.global(), error.cause());
        self.failed = Some(error);
        for shared in self.family.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            shared.lock().failure.get_or_insert(failure);
            shared.changed.notify_all();
        }
    }

    const fn others(&self) -> usize {
        self.rank.size().as_usize() - 1
    }
}

fn other_count(rank: u32, ours: String, theirs: usize) -> Error {
    let (collective, what) = (Op::AllToAll.name(), "count");
    Error::Mismatch { rank, collective, what, ours, theirs: theirs.to_string() }
}

fn read(slot: &RwLock<Slot>) -> RwLockReadGuard<'_, Slot> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(first: u32, size: TpSize) -> Self {
        let ranks = size.as_usize();
        let slots = || (0..ranks).map(|_| RwLock::new(Slot::empty())).collect();
        Self {
            first,
            size,
            slots: [slots(), slots()],
            group: Mutex::new(Group { arrived: vec![0; ranks], left: vec![false; ranks], failure: None }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    const fn empty() -> Self {
        Self { op: Op::Barrier, root: 0, total: 0, counts: Vec::new(), data: Vec::new() }
    }

    fn fill(&mut self, call: Call<'_>, data: &[f32]) {
        self.op = call.op;
        self.root = call.root;
        self.total = call.total;
        self.counts.clear();
        self.counts.extend_from_slice(call.counts);
        self.data.clear();
        self.data.extend_from_slice(data);
    }

    fn compare(&self, ours: Call<'_>, peer: u32) -> Result<(), Error> {
        let differs = |what, ours_is: String, theirs: String| {
            Err(Error::Mismatch { rank: peer, collective: ours.op.name(), what, ours: ours_is, theirs })
        };
        if self.op != ours.op {
            return differs("operation", ours.op.to_string(), self.op.to_string());
        }
        if self.root != ours.root {
            return differs("root", ours.root.to_string(), self.root.to_string());
        }
        if self.total != ours.total {
            return differs("total count", ours.total.to_string(), self.total.to_string());
        }
        if ours.op != Op::AllToAll && self.counts != ours.counts {
            return differs("counts", format!("{:?}", ours.counts), format!("{:?}", self.counts));
        }
        Ok(())
    }
}

impl Collective<[f32]> for InProcess {
    fn rank(&self) -> TpRank {
        self.rank
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), Error> {
        self.run(Op::AllReduce, |this| {
            let call = Call { op: Op::AllReduce, root: 0, total: data.len(), counts: &[] };
            // The data lies in this rank's slot too, so the sum can be built in place, rank 0 first.
            for (peer, slot) in this.meet(call, data)?.iter().enumerate() {
                let part = &read(slot).data;
                if peer == 0 { data.copy_from_slice(part) } else { add(data, part) }
            }
            let moved = data.len() * this.others();
            Ok(Moved { sent: moved, received: moved })
        })
    }

    fn reduce_scatter_sum(&mut self, data: &[f32], counts: &[usize], own: &mut [f32]) -> Result<(), Error> {
        self.run(Op::ReduceScatter, |this| {
            let total = check::counts(Op::ReduceScatter, "counts", counts, this.rank.size())?;
            let mine = counts[this.rank.as_usize()];
            check::length(Op::ReduceScatter, "length of the input", total, data.len())?;
            check::length(Op::ReduceScatter, "length of the output", mine, own.len())?;
            let start: usize = counts[..this.rank.as_usize()].iter().sum();
            let call = Call { op: Op::ReduceScatter, root: 0, total, counts };
            for (peer, slot) in this.meet(call, data)?.iter().enumerate() {
                let part = &read(slot).data[start..start + mine];
                if peer == 0 { own.copy_from_slice(part) } else { add(own, part) }
            }
            Ok(Moved { sent: total - mine, received: mine * this.others() })
        })
    }

    fn all_gather(&mut self, own: &[f32], counts: &[usize], all: &mut [f32]) -> Result<(), Error> {
        self.run(Op::AllGather, |this| {
            let total = check::counts(Op::AllGather, "counts", counts, this.rank.size())?;
            let mine = counts[this.rank.as_usize()];
            check::length(Op::AllGather, "length of the input", mine, own.len())?;
            check::length(Op::AllGather, "length of the output", total, all.len())?;
            let call = Call { op: Op::AllGather, root: 0, total, counts };
            let mut start = 0;
            for (slot, count) in this.meet(call, own)?.iter().zip(counts) {
                all[start..start + count].copy_from_slice(&read(slot).data);
                start += count;
            }
            Ok(Moved { sent: mine * this.others(), received: total - mine })
        })
    }

    fn all_to_all_v(
        &mut self,
        send: &[f32],
        send_counts: &[usize],
        recv: &mut [f32],
        recv_counts: &[usize],
    ) -> Result<(), Error> {
        self.run(Op::AllToAll, |this| {
            let me = this.rank.as_usize();
            let sends = check::counts(Op::AllToAll, "send counts", send_counts, this.rank.size())?;
            let receives = check::counts(Op::AllToAll, "receive counts", recv_counts, this.rank.size())?;
            check::length(Op::AllToAll, "length of the input", sends, send.len())?;
            check::length(Op::AllToAll, "length of the output", receives, recv.len())?;
            check::length(Op::AllToAll, "count from this rank to itself", send_counts[me], recv_counts[me])?;
            let call = Call { op: Op::AllToAll, root: 0, total: 0, counts: send_counts };
            let (mut start, first) = (0, this.shared.first);
            for (peer, slot) in this.meet(call, send)?.iter().enumerate() {
                let slot = read(slot);
                let (ours, theirs) = (recv_counts[peer], slot.counts[me]);
                if ours != theirs {
                    return Err(other_count(first + peer as u32, ours.to_string(), theirs));
                }
                let from: usize = slot.counts[..me].iter().sum();
                recv[start..start + ours].copy_from_slice(&slot.data[from..from + ours]);
                start += ours;
            }
            Ok(Moved { sent: sends - send_counts[me], received: receives - recv_counts[me] })
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
        self.run(Op::AllToAll, |this| {
            let me = this.rank.as_usize();
            let open =
                check::Open { send: send.len(), send_counts, recv: recv.len(), room, came: came.len() };
            open.check(this.rank)?;
            let call = Call { op: Op::AllToAll, root: 0, total: 0, counts: send_counts };
            let (mut start, first) = (0, this.shared.first);
            for (peer, slot) in this.meet(call, send)?.iter().enumerate() {
                let slot = read(slot);
                let count = slot.counts[me];
                if count > room[peer] {
                    return Err(other_count(first + peer as u32, format!("at most {}", room[peer]), count));
                }
                let from: usize = slot.counts[..me].iter().sum();
                recv[start..start + count].copy_from_slice(&slot.data[from..from + count]);
                start += count;
                came[peer] = count;
            }
            Ok(Moved { sent: send.len() - send_counts[me], received: start - came[me] })
        })
    }

    fn broadcast(&mut self, root: u32, data: &mut [f32]) -> Result<(), Error> {
        self.run(Op::Broadcast, |this| {
            check::root(root, this.rank.size())?;
            let is_root = this.rank.index() == root;
            let call = Call { op: Op::Broadcast, root, total: data.len(), counts: &[] };
            let slots = this.meet(call, if is_root { data } else { &[] })?;
            if !is_root {
                data.copy_from_slice(&read(&slots[root as usize]).data);
            }
            let len = data.len();
            Ok(if is_root {
                Moved { sent: len * this.others(), received: 0 }
            } else {
                Moved { sent: 0, received: len }
            })
        })
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.run(Op::Barrier, |this| {
            let call = Call { op: Op::Barrier, root: 0, total: 0, counts: &[] };
            this.meet(call, &[])?;
            Ok(Moved::default())
        })
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn abort(&mut self) {
        if self.failed.is_none() {
            self.fail(Error::Aborted { rank: self.global(), cause: Cause::Asked });
        }
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.shared.lock().left[self.rank.as_usize()] = true;
        self.shared.changed.notify_all();
    }
}
