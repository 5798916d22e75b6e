//! Routed experts by all-to-all: each rank routes its slice of the step's rows, sends a row once to every rank that
//! holds one of its experts, and adds up what comes back.
//!
//! The result stays this rank's slice. It joins the layer's one all-reduce as this rank's summand of those rows (zero
//! elsewhere), which costs no byte more than the attention's part alone; gathering the slices would add an all-gather
//! of every row to it.

use std::ops::Range;

use collectives::Collective;
use ops::{Backend, ExpertOwners, Packed};
use types::TpRank;

use crate::config::MoeConfig;
use crate::{Error, ShardPlan};

/// The weights of one layer's routed experts.
pub(crate) struct Routed<'a, B: Backend> {
    pub(crate) router: &'a B::Weight,
    pub(crate) gate_up: &'a B::Experts,
    pub(crate) down: &'a B::Experts,
}

/// The sizes of one layer's exchange.
pub(crate) struct Sizes<'a> {
    pub(crate) moe: &'a MoeConfig,
    pub(crate) plan: &'a ShardPlan,
    /// Rows of the step.
    pub(crate) rows: usize,
    /// H
    pub(crate) hidden: usize,
}

/// The rows of a step that `rank` routes under all-to-all dispatch: slices in rank order that differ by at most one
/// row, some empty when ranks outnumber rows.
#[must_use]
pub fn slice(rank: TpRank, rows: usize) -> Range<usize> {
    let (at, ranks) = (rank.as_usize(), rank.size().as_usize());
    rows * at / ranks..rows * (at + 1) / ranks
}

/// The routed experts' sum [slice, H] fp32 for this rank's slice of `n`.
pub(crate) fn exchange<B: Backend, C: Collective<B::Tensor>>(
    backend: &mut B,
    comm: &mut C,
    weights: &Routed<'_, B>,
    sizes: &Sizes<'_>,
    n: &B::Tensor,
) -> Result<B::Tensor, Error> {
    let Sizes { moe, plan, rows, hidden } = *sizes;
    let (rank, ranks) = (plan.rank, plan.rank.size().as_usize());
    let held = plan.experts.as_ref().map_or(0..0, |shard| shard.experts.clone());
    let owners = ExpertOwners { ranks, experts_each: held.len() };
    let own = backend.slice_rows(n, slice(rank, rows))?;
    let logits = backend.linear(&own, weights.router)?;
    let routed = backend.route(&logits, moe.routing)?;
    let Packed { rows: send, counts: sent } = backend.pack(&own, &routed, owners)?;
    let came = counts(backend, comm, &sent, (rank, rows))?;
    let elements =
        |counts: &[usize], width: usize| -> Vec<usize> { counts.iter().map(|count| count * width).collect() };

    let width = hidden + 2 * moe.routing.top_k;
    let mut received = backend.buffer(came.iter().sum(), width)?;
    comm.all_to_all_v(&send, &elements(&sent, width), &mut received, &elements(&came, width))?;
    let (x, chosen) = backend.unpack(&received, hidden)?;
    let done = backend.routed_experts(&x, &chosen, weights.gate_up, weights.down, held.start)?;

    let mut returned = backend.buffer(sent.iter().sum(), hidden)?;
    comm.all_to_all_v(&done, &elements(&came, hidden), &mut returned, &elements(&sent, hidden))?;
    Ok(backend.combine(&returned, &routed, owners)?)
}

/// Tells every rank how many rows it is about to get; returns how many come from each.
fn counts<B: Backend, C: Collective<B::Tensor>>(
    backend: &mut B,
    comm: &mut C,
    sent: &[usize],
    (rank, rows): (TpRank, usize),
) -> Result<Vec<usize>, Error> {
    let each = vec![1; sent.len()];
    // Steps have fewer rows than 2^24, so fp32 holds every count exactly.
    let told: Vec<f32> = sent.iter().map(|count| *count as f32).collect();
    let told = backend.upload(1, &told)?;
    let mut heard = backend.buffer(sent.len(), 1)?;
    comm.all_to_all_v(&told, &each, &mut heard, &each)?;
    let heard = backend.read(&heard)?;
    let checked = rank.size().ranks().zip(heard).map(|(from, count)| {
        let most = slice(from, rows).len();
        if count.fract() == 0.0 && (0.0..=most as f32).contains(&count) {
            Ok(count as usize)
        } else {
            Err(Error::DispatchCount { from, count, most })
        }
    });
    checked.collect()
}
