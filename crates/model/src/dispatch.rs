//! Routed experts by all-to-all: each rank routes its slice of its sub-group's rows, sends a row once to every rank that
//! holds one of its experts, and adds up what comes back. Two messages to every other rank: rows there (their number in
//! the message's head), results back.
//!
//! The result stays this rank's slice. It joins the layer's one all-reduce in the sub-group as this rank's summand of
//! those rows (zero elsewhere), which costs no byte more than the attention's part alone; gathering the slices would add
//! an all-gather of every row to it.

use std::ops::Range;

use collectives::Collective;
use ops::{Backend, ExpertOwners, ExpertSlots};
use types::{TpRank, TpSize};

use crate::config::MoeConfig;
use crate::{Error, ShardPlan};

/// The weights of one layer's routed experts.
pub(crate) struct Routed<'a, B: Backend> {
    pub(crate) router: &'a B::Weight,
    pub(crate) gate_up: &'a B::Experts,
    pub(crate) down: &'a B::Experts,
    /// Where the experts are, when they are not in order.
    pub(crate) slots: Option<&'a ExpertSlots>,
}

/// What one layer's exchange goes by.
pub(crate) struct Sizes<'a> {
    pub(crate) moe: &'a MoeConfig,
    pub(crate) plan: &'a ShardPlan,
    /// Rows of each sub-group in this step.
    pub(crate) rows: &'a [usize],
    /// H
    pub(crate) hidden: usize,
}

/// Numbers of an exchange, by rank; kept between layers, so that nothing is allocated.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    room: Vec<usize>,
    sent: Vec<usize>,
    came: Vec<usize>,
    /// Rows sent to other ranks, and rows that came from them, so far.
    pub(crate) rows_sent: u64,
    pub(crate) rows_received: u64,
}

/// The rows of a sub-group that `rank` routes under all-to-all dispatch: slices in rank order that differ by at most one
/// row, some empty when ranks outnumber rows.
#[must_use]
pub fn slice(rank: TpRank, rows: usize) -> Range<usize> {
    part(rank.as_usize(), rank.size(), rows)
}

fn part(at: usize, size: TpSize, rows: usize) -> Range<usize> {
    let ranks = size.as_usize();
    rows * at / ranks..rows * (at + 1) / ranks
}

/// The routed experts' sum [slice, H] fp32 for this rank's slice of `n`. `chosen` adds the choices of the slice to what
/// was counted before.
pub(crate) fn exchange<B: Backend, C: Collective<B::Tensor>>(
    (backend, comm): (&mut B, &mut C),
    weights: &Routed<'_, B>,
    sizes: &Sizes<'_>,
    (counts, chosen): (&mut Counts, &mut [u64]),
    n: &B::Tensor,
) -> Result<B::Tensor, Error> {
    let Sizes { moe, plan, rows, hidden } = *sizes;
    let held = plan.experts.as_ref().map_or(0..0, |shard| shard.experts.clone());
    let owners = ExpertOwners { ranks: plan.whole.size().as_usize(), experts_each: held.len() };
    let own_rows = slice(plan.rank, rows[plan.subgroup()]);
    let own = backend.slice_rows(n, own_rows.clone())?;
    let logits = backend.linear(&own, weights.router)?;
    let mut routed = backend.route(&logits, moe.routing)?;
    backend.count_choices(&routed, chosen)?;
    if let Some(slots) = weights.slots {
        routed = backend.place(routed, slots, own_rows.start)?;
    }
    let send = backend.pack(&own, &routed, owners, &mut counts.sent)?;
    let sent_rows = counts.sent.iter().sum();

    let width = hidden + 2 * moe.routing.top_k;
    counts.expect(sizes, width);
    let mut received = backend.buffer(counts.room.iter().sum::<usize>() / width, width)?;
    comm.all_to_all_open(&send, &counts.sent, &mut received, &counts.room, &mut counts.came)?;
    let came_rows = counts.learn(plan.whole, width)?;
    let received = backend.slice_rows(&received, 0..came_rows)?;
    let (x, here) = backend.unpack(&received, hidden)?;
    let done = backend.routed_experts(&x, &here, weights.gate_up, weights.down, held.start)?;

    counts.turn(width, hidden);
    let mut returned = backend.buffer(sent_rows, hidden)?;
    comm.all_to_all_v(&done, &counts.came, &mut returned, &counts.sent)?;
    Ok(backend.combine(&returned, &routed, owners)?)
}

impl Counts {
    /// Elements that go to each rank, and the most that may come: a rank sends each row of its slice at most once.
    fn expect(&mut self, sizes: &Sizes<'_>, width: usize) {
        let (whole, each) = (sizes.plan.whole, sizes.plan.rank.size());
        self.sent.iter_mut().for_each(|count| *count *= width);
        self.room.clear();
        let of = |peer: usize| part(peer % each.as_usize(), each, sizes.rows[peer / each.as_usize()]).len();
        self.room.extend((0..whole.size().as_usize()).map(|peer| of(peer) * width));
        self.came.clear();
        self.came.resize(whole.size().as_usize(), 0);
    }

    /// Rows that came from all ranks together; whole ones, or the rank that sent others is named.
    fn learn(&mut self, rank: TpRank, width: usize) -> Result<usize, Error> {
        let torn = self.came.iter().position(|count| !count.is_multiple_of(width));
        if let Some(from) = torn {
            return Err(Error::DispatchCount { from: from as u32, count: self.came[from], width });
        }
        let others = |counts: &[usize]| (counts.iter().sum::<usize>() - counts[rank.as_usize()]) / width;
        self.rows_sent += others(&self.sent) as u64;
        self.rows_received += others(&self.came) as u64;
        Ok(self.came.iter().sum::<usize>() / width)
    }

    /// From elements of rows there to elements of results back.
    fn turn(&mut self, width: usize, hidden: usize) {
        for count in self.sent.iter_mut().chain(&mut self.came) {
            *count = *count / width * hidden;
        }
    }
}
