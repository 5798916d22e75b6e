//! Ranks in processes and hosts of their own: a full mesh of TCP connections.
//!
//! Every operation is one or two exchanges in which each rank sends a frame to every other and takes one from every
//! other, so all ranks see all others arrive, and a rank in another operation or with another size is named.
//! Small all-reduces (or those of two ranks) send everything to everyone; larger ones are summed in parts and
//! gathered. Both sum in rank order.

mod exchange;
mod frame;
mod peer;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use types::{TpRank, TpSize};

use self::exchange::{Exchange, Lane, Limit};
use self::frame::{Header, Phase};
use self::peer::{Links, ended_here};
use crate::counters::Moved;
use crate::{Collective, Counters, Error, Op, check, socket, sum};

pub use self::peer::AbortHandle;
pub(crate) use self::peer::Link;

/// All-reduces of more bytes than this go in two exchanges when there are more than two ranks: `N` ranks then move
/// `2·(N-1)/N` of the data each instead of `N-1` times the data, for one more round trip of about 20 µs, in which a
/// loopback or 10 Gbit/s link moves about this much.
pub const ONE_SHOT_BYTES_MAX: usize = 32 << 10;

/// How a [`Tcp`] group behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpOptions {
    /// Longest time one operation may take, waiting for late ranks included.
    pub deadline: Duration,
    /// How long to look for data before sleeping. Longer answers faster and burns more of a core.
    pub spin: Duration,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(10), spin: Duration::from_micros(20) }
    }
}

/// One rank of a group joined by TCP, or of a sub-group of it. Made by the rendezvous. Dropping it and its sub-groups is
/// leaving: the others get [`Error::PeerLost`].
#[derive(Debug)]
pub struct Tcp {
    /// In this group.
    rank: TpRank,
    /// Rank 0 of this group in the whole one; its ranks follow each other.
    first: usize,
    links: Arc<Links>,
    core: Arc<Mutex<Core>>,
    counters: Counters,
}

/// What a group and its sub-groups share: the connections, and what has gone over them.
#[derive(Debug)]
struct Core {
    /// In the whole group, as are all ranks here.
    rank: TpRank,
    options: TcpOptions,
    links: Arc<Links>,
    /// Indexed by rank; this rank's own stays complete.
    lanes: Vec<Lane>,
    /// The other ranks' summands; grows to the largest operation seen.
    summands: Vec<f32>,
    /// This rank's part of a two-step all-reduce; grows likewise.
    part: Vec<f32>,
    /// Messages sent so far.
    messages: u64,
    failed: Option<Error>,
}

/// What identifies an operation on all ranks.
#[derive(Clone, Copy)]
struct Call {
    op: Op,
    /// The root of a broadcast, in the group that runs it.
    root: u32,
    /// Elements in the whole operation; 0 where ranks may differ.
    total: usize,
    until: Instant,
}

/// A group in the middle of an operation.
struct Running<'a> {
    core: &'a mut Core,
    rank: TpRank,
    first: usize,
}

impl Tcp {
    /// A rank with its connections, indexed by rank (`None` for itself).
    pub(crate) fn new(rank: TpRank, peers: Vec<Option<Link>>, options: TcpOptions) -> Self {
        assert_eq!(peers.len(), rank.size().as_usize(), "one link for each rank");
        let lanes = peers.iter().map(|_| Lane::new()).collect();
        let links = Arc::new(Links::new(rank.index(), peers));
        let core = Core {
            rank,
            options,
            links: Arc::clone(&links),
            lanes,
            summands: Vec::new(),
            part: Vec::new(),
            messages: 0,
            failed: None,
        };
        Self { rank, first: 0, links, core: Arc::new(Mutex::new(core)), counters: Counters::default() }
    }

    /// This rank's part in the sub-group of `size` ranks it belongs to: ranks 0 to `size - 1` are the first, and so on.
    /// Sub-groups use the connections of the group, may run different operations at the same time, and end with it.
    /// Errors name ranks by their number in the whole group.
    ///
    /// # Errors
    /// [`Error::Argument`] when this group does not divide into sub-groups of `size`.
    pub fn split(&self, size: TpSize) -> Result<Self, Error> {
        let (rank, first) = check::subgroup(self.rank, size)?;
        let (links, core) = (Arc::clone(&self.links), Arc::clone(&self.core));
        Ok(Self { rank, first: self.first + first, links, core, counters: Counters::default() })
    }

    /// A handle that ends the group from another thread.
    #[must_use]
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle { links: Arc::clone(&self.links) }
    }

    /// Elements `rank` sends in an all-reduce of `len` elements; it receives as many.
    #[must_use]
    pub const fn all_reduce_sends(rank: TpRank, len: usize) -> usize {
        let ranks = rank.size().as_usize();
        if at_once(rank, len) {
            return len * (ranks - 1);
        }
        // Out: everyone else's parts, and this rank's sum to everyone. In: the same two, the other way round.
        let mine = part_of(rank.as_usize(), ranks, len);
        len - mine + mine * (ranks - 1)
    }

    /// Messages `rank` sends in an all-reduce of `len` elements.
    #[must_use]
    pub const fn all_reduce_messages(rank: TpRank, len: usize) -> usize {
        let others = rank.size().as_usize() - 1;
        if at_once(rank, len) { others } else { 2 * others }
    }

    /// A first barrier with a deadline of its own: after it every connection is known to work. It is operation
    /// number 0 and not counted.
    pub(crate) fn settle(&mut self, within: Duration) -> Result<(), Error> {
        let mut core = lock(&self.core);
        let usual = std::mem::replace(&mut core.options.deadline, within);
        let mut running = Running { core: &mut core, rank: self.rank, first: self.first };
        let call = running.call(Op::Barrier, 0, 0);
        let outcome = running.exchange((call, Phase::First), &[], &mut [], |_| (0..0, 0..0));
        core.options.deadline = usual;
        let all = 0..core.lanes.len();
        outcome.inspect_err(|error| core.fail(error.clone(), all))
    }

    /// Runs one operation: fails at once after an earlier failure, counts what moved, and on an error ends the group
    /// for everyone.
    fn run(
        &mut self,
        op: Op,
        work: impl FnOnce(&mut Running<'_>) -> Result<Moved, Error>,
    ) -> Result<(), Error> {
        let begun = Instant::now();
        let mut core = lock(&self.core);
        if let Some(error) = &core.failed {
            return Err(error.clone());
        }
        let members = self.first..self.first + self.rank.size().as_usize();
        core.lanes[members.clone()].iter_mut().for_each(Lane::begin);
        let before = core.messages;
        let outcome = if core.links.ended() {
            Err(ended_here(core.rank.index()))
        } else {
            work(&mut Running { core: &mut core, rank: self.rank, first: self.first })
        };
        match outcome {
            Ok(moved) => {
                self.counters.note(op, core.messages - before, moved, begun.elapsed());
                Ok(())
            }
            Err(error) => {
                core.fail(error.clone(), members);
                Err(error)
            }
        }
    }
}

/// One thread uses a rank, so this never waits, and what a panic left is a group that has failed.
fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// Ends the group in an operation of `members`, or (when there are none) between two.
    fn fail(&mut self, error: Error, members: Range<usize>) {
        // The first operation of each pair that this rank does not complete.
        let first = |peer: usize| self.lanes[peer].sequence() + u64::from(!members.contains(&peer));
        self.links.end(error.cause(), first);
        self.failed = Some(error);
    }
}

impl Running<'_> {
    fn call(&self, op: Op, root: u32, total: usize) -> Call {
        Call { op, root, total, until: socket::from_now(self.core.options.deadline) }
    }

    /// One exchange. `route` is asked for each peer in rank order for the elements of `out` that go to it and those of
    /// `into` that come from it; it is asked for this rank too, so it may keep running offsets.
    fn exchange(
        &mut self,
        (call, phase): (Call, Phase),
        out: &[f32],
        into: &mut [f32],
        mut route: impl FnMut(usize) -> (Range<usize>, Range<usize>),
    ) -> Result<(), Error> {
        let head =
            Header { op: call.op, phase, root: call.root, sequence: 0, total: call.total as u64, count: 0 };
        let ranks = self.rank.size().as_usize();
        let lanes = self.core.lanes[self.first..self.first + ranks].iter_mut();
        for (peer, lane) in lanes.enumerate() {
            let (send, recv) = route(peer);
            if peer != self.rank.as_usize() {
                lane.load(head, send, recv);
            }
        }
        self.core.messages += (ranks - 1) as u64;
        let core = &mut *self.core;
        Exchange {
            rank: core.rank.index(),
            links: &core.links,
            lanes: &mut core.lanes,
            out: bytemuck::cast_slice(out),
            into: bytemuck::cast_slice_mut(into),
            op: call.op,
            limit: Limit { until: call.until, after: core.options.deadline, spin: core.options.spin },
        }
        .run()
    }

    /// Sends each rank its slice of `data` and sums what comes for this rank's slice into `own`. `counts` is called
    /// in rank order.
    fn scatter(
        &mut self,
        step: (Call, Phase),
        data: &[f32],
        own: &mut [f32],
        count: impl Fn(usize) -> usize,
    ) -> Result<(), Error> {
        let me = self.rank.as_usize();
        let mine = own.len();
        let mut summands = std::mem::take(&mut self.core.summands);
        let others = grown(&mut summands, mine * self.others());
        let mut start = 0;
        let outcome = self.exchange(step, data, others, |peer| {
            let send = start..start + count(peer);
            start = send.end;
            // The others' summands lie in rank order with this rank's left out.
            let place = peer - usize::from(peer > me);
            (send, if peer == me { 0..0 } else { place * mine..(place + 1) * mine })
        });
        if outcome.is_ok() {
            let before: usize = (0..me).map(&count).sum();
            own.copy_from_slice(&data[before..before + mine]);
            sum::around(own, others, me);
        }
        self.core.summands = summands;
        outcome
    }

    /// Everyone sends everything to everyone.
    fn reduce_at_once(&mut self, call: Call, data: &mut [f32]) -> Result<(), Error> {
        let (me, len) = (self.rank.as_usize(), data.len());
        let mut summands = std::mem::take(&mut self.core.summands);
        let others = grown(&mut summands, len * self.others());
        let outcome = self.exchange((call, Phase::First), data, others, |peer| {
            let place = peer - usize::from(peer > me);
            (0..len, if peer == me { 0..0 } else { place * len..(place + 1) * len })
        });
        if outcome.is_ok() {
            sum::around(data, others, me);
        }
        self.core.summands = summands;
        outcome
    }

    /// Each rank sums one part and gives it to everyone.
    fn reduce_in_parts(&mut self, call: Call, data: &mut [f32]) -> Result<(), Error> {
        let (me, ranks, len) = (self.rank.as_usize(), self.rank.size().as_usize(), data.len());
        let count = |peer: usize| part_of(peer, ranks, len);
        let mut room = std::mem::take(&mut self.core.part);
        let part = grown(&mut room, count(me));
        let mut outcome = self.scatter((call, Phase::Scatter), data, part, count);
        if outcome.is_ok() {
            let mut start = 0;
            outcome = self.exchange((call, Phase::Gather), part, data, |peer| {
                let recv = start..start + count(peer);
                start = recv.end;
                (0..count(me), if peer == me { 0..0 } else { recv })
            });
        }
        if outcome.is_ok() {
            let before: usize = (0..me).map(count).sum();
            data[before..before + part.len()].copy_from_slice(part);
        }
        self.core.part = room;
        outcome
    }

    /// Closes the gaps between what came: from each peer at the start of its room. This rank's own is put in its place.
    fn close_gaps(&self, own: &[f32], recv: &mut [f32], came: &mut [usize]) {
        let mut used = 0;
        for (peer, came) in came.iter_mut().enumerate() {
            *came = if peer == self.rank.as_usize() {
                recv[used..used + own.len()].copy_from_slice(own);
                own.len()
            } else {
                let got = self.core.lanes[self.first + peer].received();
                recv.copy_within(got.clone(), used);
                got.len()
            };
            used += *came;
        }
    }

    const fn others(&self) -> usize {
        self.rank.size().as_usize() - 1
    }
}

/// Whether an all-reduce of `len` elements takes one exchange.
const fn at_once(rank: TpRank, len: usize) -> bool {
    rank.size().get() <= 2 || len * size_of::<f32>() <= ONE_SHOT_BYTES_MAX
}

/// Elements that rank `index` sums in an all-reduce of `len` elements that goes in parts.
const fn part_of(index: usize, ranks: usize, len: usize) -> usize {
    len / ranks + (index < len % ranks) as usize
}

/// The first `len` elements of `buffer`, which grows to the largest length seen and then stays.
fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl Collective<[f32]> for Tcp {
    fn rank(&self) -> TpRank {
        self.rank
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), Error> {
        self.run(Op::AllReduce, |this| {
            let call = this.call(Op::AllReduce, 0, data.len());
            let moved = Self::all_reduce_sends(this.rank, data.len());
            match at_once(this.rank, data.len()) {
                true => this.reduce_at_once(call, data)?,
                false => this.reduce_in_parts(call, data)?,
            }
            Ok(Moved { sent: moved, received: moved })
        })
    }

    fn reduce_scatter_sum(&mut self, data: &[f32], counts: &[usize], own: &mut [f32]) -> Result<(), Error> {
        self.run(Op::ReduceScatter, |this| {
            let total = check::counts(Op::ReduceScatter, "counts", counts, this.rank.size())?;
            let mine = counts[this.rank.as_usize()];
            check::length(Op::ReduceScatter, "length of the input", total, data.len())?;
            check::length(Op::ReduceScatter, "length of the output", mine, own.len())?;
            let call = this.call(Op::ReduceScatter, 0, total);
            this.scatter((call, Phase::First), data, own, |peer| counts[peer])?;
            Ok(Moved { sent: total - mine, received: mine * this.others() })
        })
    }

    fn all_gather(&mut self, own: &[f32], counts: &[usize], all: &mut [f32]) -> Result<(), Error> {
        self.run(Op::AllGather, |this| {
            let me = this.rank.as_usize();
            let total = check::counts(Op::AllGather, "counts", counts, this.rank.size())?;
            let mine = counts[me];
            check::length(Op::AllGather, "length of the input", mine, own.len())?;
            check::length(Op::AllGather, "length of the output", total, all.len())?;
            let mut start = 0;
            let call = this.call(Op::AllGather, 0, total);
            this.exchange((call, Phase::First), own, all, |peer| {
                let recv = start..start + counts[peer];
                start = recv.end;
                (0..mine, recv)
            })?;
            let before: usize = counts[..me].iter().sum();
            all[before..before + mine].copy_from_slice(own);
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
            let (mut from, mut to) = (0, 0);
            let call = this.call(Op::AllToAll, 0, 0);
            this.exchange((call, Phase::First), send, recv, |peer| {
                let ranges = (from..from + send_counts[peer], to..to + recv_counts[peer]);
                (from, to) = (ranges.0.end, ranges.1.end);
                ranges
            })?;
            let from: usize = send_counts[..me].iter().sum();
            let to: usize = recv_counts[..me].iter().sum();
            let own = send_counts[me];
            recv[to..to + own].copy_from_slice(&send[from..from + own]);
            Ok(Moved { sent: sends - own, received: receives - own })
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
            let open =
                check::Open { send: send.len(), send_counts, recv: recv.len(), room, came: came.len() };
            open.check(this.rank)?;
            let (mut from, mut to) = (0, 0);
            let call = this.call(Op::AllToAll, 0, 0);
            this.exchange((call, Phase::Open), send, recv, |peer| {
                let ranges = (from..from + send_counts[peer], to..to + room[peer]);
                (from, to) = (ranges.0.end, ranges.1.end);
                ranges
            })?;
            let me = this.rank.as_usize();
            let from: usize = send_counts[..me].iter().sum();
            let own = send_counts[me];
            this.close_gaps(&send[from..from + own], recv, came);
            Ok(Moved { sent: send.len() - own, received: came.iter().sum::<usize>() - own })
        })
    }

    fn broadcast(&mut self, root: u32, data: &mut [f32]) -> Result<(), Error> {
        self.run(Op::Broadcast, |this| {
            check::root(root, this.rank.size())?;
            let len = data.len();
            let call = this.call(Op::Broadcast, root, len);
            // Ranks that are not the root send headers only, so a rank with another root or size is found out.
            if this.rank.index() == root {
                this.exchange((call, Phase::First), data, &mut [], |_| (0..len, 0..0))?;
                return Ok(Moved { sent: len * this.others(), received: 0 });
            }
            let from = |peer| if peer == root as usize { 0..len } else { 0..0 };
            this.exchange((call, Phase::First), &[], data, |peer| (0..0, from(peer)))?;
            Ok(Moved { sent: 0, received: len })
        })
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.run(Op::Barrier, |this| {
            let call = this.call(Op::Barrier, 0, 0);
            this.exchange((call, Phase::First), &[], &mut [], |_| (0..0, 0..0))?;
            Ok(Moved::default())
        })
    }

    fn barrier_within(&mut self, within: Duration) -> Result<(), Error> {
        let usual = std::mem::replace(&mut lock(&self.core).options.deadline, within);
        let outcome = self.barrier();
        lock(&self.core).options.deadline = usual;
        outcome
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn abort(&mut self) {
        let mut core = lock(&self.core);
        if core.failed.is_none() {
            let here = ended_here(core.rank.index());
            core.fail(here, 0..0);
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // The connections may be shared with an abort handle, which must not keep the peers waiting.
        if !self.links.ended() {
            self.links.close();
        }
    }
}
