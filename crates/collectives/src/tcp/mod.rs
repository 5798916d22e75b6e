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
use std::sync::Arc;
use std::time::{Duration, Instant};

use types::TpRank;

use self::exchange::{Exchange, Lane, Limit};
use self::frame::{Header, Phase};
use self::peer::{Links, Notice, ended_here};
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

/// One rank of a group joined by TCP. Made by the rendezvous. Dropping it is leaving: the others get
/// [`Error::PeerLost`].
#[derive(Debug)]
pub struct Tcp {
    rank: TpRank,
    options: TcpOptions,
    links: Arc<Links>,
    /// Indexed by rank; this rank's own stays complete.
    lanes: Vec<Lane>,
    sequence: u64,
    /// The other ranks' summands; grows to the largest operation seen.
    summands: Vec<f32>,
    /// This rank's part of a two-step all-reduce; grows likewise.
    part: Vec<f32>,
    counters: Counters,
    failed: Option<Error>,
}

/// What identifies an operation on all ranks.
#[derive(Clone, Copy)]
struct Call {
    op: Op,
    root: u32,
    /// Elements in the whole operation; 0 where ranks may differ.
    total: usize,
    until: Instant,
}

impl Tcp {
    /// A rank with its connections, indexed by rank (`None` for itself).
    pub(crate) fn new(rank: TpRank, peers: Vec<Option<Link>>, options: TcpOptions) -> Self {
        assert_eq!(peers.len(), rank.size().as_usize(), "one link for each rank");
        Self {
            rank,
            options,
            lanes: peers.iter().map(|_| Lane::new()).collect(),
            links: Arc::new(Links::new(rank.index(), peers)),
            sequence: 0,
            summands: Vec::new(),
            part: Vec::new(),
            counters: Counters::default(),
            failed: None,
        }
    }

    /// What this rank has done so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
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

    /// A barrier that may take longer than other operations: for work at start that ranks finish far apart, such as
    /// reading weights.
    ///
    /// # Errors
    /// As [`Collective::barrier`].
    pub fn barrier_within(&mut self, within: Duration) -> Result<(), Error> {
        let usual = std::mem::replace(&mut self.options.deadline, within);
        let outcome = self.barrier();
        self.options.deadline = usual;
        outcome
    }

    /// A first barrier with a deadline of its own: after it every connection is known to work. It is operation
    /// number 0 and not counted.
    pub(crate) fn settle(&mut self, within: Duration) -> Result<(), Error> {
        let usual = std::mem::replace(&mut self.options.deadline, within);
        let call = self.call(Op::Barrier, 0, 0);
        let outcome = self.exchange((call, Phase::First), &[], &mut [], |_| (0..0, 0..0));
        self.options.deadline = usual;
        outcome.inspect_err(|error| self.fail(error.clone(), self.sequence))
    }

    /// Runs one operation: fails at once after an earlier failure, counts what moved (`work` returns elements sent
    /// and received), and on an error ends the group for everyone.
    fn run(
        &mut self,
        op: Op,
        work: impl FnOnce(&mut Self) -> Result<(usize, usize), Error>,
    ) -> Result<(), Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.sequence += 1;
        let outcome = if self.links.ended() { Err(ended_here(self.rank.index())) } else { work(self) };
        match outcome {
            Ok((sent, received)) => {
                self.counters.note(op, sent * size_of::<f32>(), received * size_of::<f32>());
                Ok(())
            }
            Err(error) => {
                self.fail(error.clone(), self.sequence);
                Err(error)
            }
        }
    }

    /// `sequence`: the first operation this rank does not complete.
    fn fail(&mut self, error: Error, sequence: u64) {
        self.links.end(Notice { cause: error.cause(), sequence });
        self.failed = Some(error);
    }

    fn call(&self, op: Op, root: u32, total: usize) -> Call {
        Call { op, root, total, until: socket::from_now(self.options.deadline) }
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
        let head = Header {
            op: call.op,
            phase,
            root: call.root,
            sequence: self.sequence,
            total: call.total as u64,
            count: 0,
        };
        for (peer, lane) in self.lanes.iter_mut().enumerate() {
            let (send, recv) = route(peer);
            if peer != self.rank.as_usize() {
                lane.load(head, send, recv);
            }
        }
        Exchange {
            rank: self.rank.index(),
            links: &self.links,
            lanes: &mut self.lanes,
            out: bytemuck::cast_slice(out),
            into: bytemuck::cast_slice_mut(into),
            head,
            limit: Limit { until: call.until, after: self.options.deadline, spin: self.options.spin },
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
        let mut summands = std::mem::take(&mut self.summands);
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
        self.summands = summands;
        outcome
    }

    /// Everyone sends everything to everyone.
    fn reduce_at_once(&mut self, call: Call, data: &mut [f32]) -> Result<(), Error> {
        let (me, len) = (self.rank.as_usize(), data.len());
        let mut summands = std::mem::take(&mut self.summands);
        let others = grown(&mut summands, len * self.others());
        let outcome = self.exchange((call, Phase::First), data, others, |peer| {
            let place = peer - usize::from(peer > me);
            (0..len, if peer == me { 0..0 } else { place * len..(place + 1) * len })
        });
        if outcome.is_ok() {
            sum::around(data, others, me);
        }
        self.summands = summands;
        outcome
    }

    /// Each rank sums one part and gives it to everyone.
    fn reduce_in_parts(&mut self, call: Call, data: &mut [f32]) -> Result<(), Error> {
        let (me, ranks, len) = (self.rank.as_usize(), self.lanes.len(), data.len());
        let count = |peer: usize| part_of(peer, ranks, len);
        let mut room = std::mem::take(&mut self.part);
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
        self.part = room;
        outcome
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
            Ok((moved, moved))
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
            Ok((total - mine, mine * this.others()))
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
            Ok((mine * this.others(), total - mine))
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
            Ok((sends - own, receives - own))
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
                return Ok((len * this.others(), 0));
            }
            let from = |peer| if peer == root as usize { 0..len } else { 0..0 };
            this.exchange((call, Phase::First), &[], data, |peer| (0..0, from(peer)))?;
            Ok((0, len))
        })
    }

    fn barrier(&mut self) -> Result<(), Error> {
        self.run(Op::Barrier, |this| {
            let call = this.call(Op::Barrier, 0, 0);
            this.exchange((call, Phase::First), &[], &mut [], |_| (0..0, 0..0))?;
            Ok((0, 0))
        })
    }

    fn abort(&mut self) {
        if self.failed.is_none() {
            self.fail(ended_here(self.rank.index()), self.sequence + 1);
        }
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        // The connections may be shared with an abort handle, which must not keep the peers waiting.
        if !self.links.ended() {
            self.links.close();
        }
    }
}
