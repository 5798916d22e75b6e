//! The forward pass: embed → layers → norm → logits, written once over any backend and collective.
//!
//! A layer is `x + attention(n) + mlp(n)` with `n = norm(x)`: one norm, both branches read it, and what the branches
//! of one rank produce is added up before a single all-reduce. (transformers `models/cohere2_moe`,
//! `Cohere2MoeDecoderLayer`.)

mod draw;
mod measure;

pub use draw::{Forward, Pending};

use collectives::{Collective, Counters};
use ops::{Backend, Batch, ExpertSlots, KvGroup, KvLayerSpec, Window};
use types::{BlockSize, Dispatch};

use crate::activity::{self, Activity};
use crate::dispatch::{self, Counts, Routed, Sizes};
use crate::partial::{Partial, Reduced};
use crate::weights::{GatedMlp, LayerWeights, MlpWeights, Weights};
use crate::{Attention, Combination, Error, LayerConfig, Mlp, ModelConfig, MoeConfig, ShardPlan};

/// Rows whose logits are made at once: bounds the memory of a prompt's log-probabilities (64 rows of a 262,144-entry
/// vocabulary are 64 MiB) whatever the prompt's length.
pub(crate) const LOGIT_ROWS_MAX: usize = 64;

/// One rank's model: weights and KV cache on its device, and the line to the other ranks.
pub struct Model<B: Backend, C> {
    config: ModelConfig,
    plan: ShardPlan,
    backend: B,
    comm: C,
    subgroup: Option<C>,
    weights: Weights<B>,
    dispatch: Dispatch,
    kv: Vec<B::KvLayer>,
    counts: Counts,
    activity: Activity,
}

/// Sizes of the paged KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvBudget {
    /// Tokens per block.
    pub block_size: BlockSize,
    /// Blocks in each group's pool, by [`KvGroup::index`].
    pub blocks: [u32; 2],
}

/// The parts a rank's model is put together from.
pub struct Parts<B: Backend, C> {
    /// What the checkpoint computes.
    pub config: ModelConfig,
    /// This rank's slice of it.
    pub plan: ShardPlan,
    /// The device.
    pub backend: B,
    /// All ranks of the group.
    pub comm: C,
    /// The ranks of this rank's sub-group, when there are several: those see the same rows.
    pub subgroup: Option<C>,
    /// The slice's weights, on the device.
    pub weights: Weights<B>,
    /// How rows reach their experts; the same on every rank.
    pub dispatch: Dispatch,
}

/// What a layer's MLP runs with: the rank's parts, and the rows of each sub-group in this step.
struct Ranked<'a, B, C> {
    backend: &'a mut B,
    comm: &'a mut C,
    config: &'a ModelConfig,
    plan: &'a ShardPlan,
    dispatch: Dispatch,
    counts: &'a mut Counts,
    /// By expert: rows that chose it so far.
    chosen: &'a mut [u64],
    layer: usize,
    rows: &'a [usize],
}

impl<B: Backend, C: Collective<B::Tensor>> Model<B, C> {
    /// Puts a rank's model together and reserves its KV cache.
    ///
    /// # Errors
    /// When the cache does not fit in the device's memory; [`Error::Dispatch`] when rows are to be sent to experts
    /// that no rank holds whole, [`Error::Subgroups`] when sub-groups are to work without sending rows.
    pub fn new(parts: Parts<B, C>, budget: KvBudget) -> Result<Self, Error> {
        let Parts { config, plan, mut backend, comm, subgroup, weights, dispatch } = parts;
        if plan.subgroups() > 1 && (dispatch == Dispatch::Replicated || subgroup.is_none()) {
            return Err(Error::Subgroups { rank: plan.whole, subgroups: plan.subgroups() });
        }
        if let (Dispatch::AllToAll, Some(moe), Some(shard)) = (dispatch, &config.moe, &plan.experts)
            && shard.width.len() != moe.intermediate_size
        {
            let (held, experts) = (shard.experts.len(), moe.experts);
            return Err(Error::Dispatch { rank: plan.whole, held, experts });
        }
        let kv = config.layers.iter().map(|layer| {
            let group = layer.attention.kv_group();
            let spec = KvLayerSpec {
                group,
                blocks: budget.blocks[group.index()] as usize,
                block_size: budget.block_size,
                kv_heads: plan.kv_heads.len(),
                query_heads: plan.query_heads.len(),
                head_dim: config.head_dim,
            };
            backend.kv_layer(&spec)
        });
        let kv = kv.collect::<Result<Vec<_>, ops::Error>>()?;
        let experts = |layer: &LayerConfig| match (layer.mlp, config.moe) {
            (Mlp::Sparse, Some(moe)) => vec![0; moe.experts],
            (Mlp::Sparse, None) | (Mlp::Dense, _) => Vec::new(),
        };
        let activity =
            Activity { chosen: config.layers.iter().map(experts).collect(), ..Activity::default() };
        let counts = Counts::default();
        Ok(Self { config, plan, backend, comm, subgroup, weights, dispatch, kv, counts, activity })
    }

    /// Runs one step of a group of one sub-group. Every rank calls it with the same batch; `sink` gets the logits [rows, vocabulary] of some of
    /// the batch's logit rows at a time (first row's number, then the rows), in order.
    ///
    /// # Errors
    /// When a rank is lost or late, the batch contradicts itself, or the device fails.
    pub fn step(
        &mut self,
        batch: &Batch,
        sink: impl FnMut(usize, &[f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.step_among(batch, &[batch.tokens.len()], sink)
    }

    /// Runs one step of a group of several sub-groups. Every rank calls it, the ranks of a sub-group with the same batch
    /// and all with the same `rows`: the rows of each sub-group's batch, in order. Those of a sub-group with nothing to do
    /// bring an empty batch, and work for the others' rows.
    ///
    /// # Errors
    /// As [`Model::step`]; [`Error::Rows`] when `rows` does not fit the batch or the plan.
    pub fn step_among(
        &mut self,
        batch: &Batch,
        rows: &[usize],
        sink: impl FnMut(usize, &[f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let before = self.check(batch, rows)?;
        let x = self.hidden(batch, rows)?;
        self.sink_logits(batch, &x, sink)?;
        self.count(batch.tokens.len(), &before);
        Ok(())
    }

    /// As [`Model::step_among`]; `observe` sees the residual stream after the embedding (0) and after each layer (1…).
    ///
    /// # Errors
    /// As [`Model::step_among`], and whatever the closures return.
    pub fn step_observed(
        &mut self,
        batch: &Batch,
        rows: &[usize],
        sink: impl FnMut(usize, &[f32]) -> Result<(), Error>,
        mut observe: impl FnMut(&mut B, usize, &B::Tensor) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let before = self.check(batch, rows)?;
        self.backend.begin_step(batch)?;
        let x = self.layers(rows, &mut observe)?;
        self.sink_logits(batch, &x, sink)?;
        self.count(batch.tokens.len(), &before);
        Ok(())
    }

    /// Checks a step before any rank sends anything; returns what was sent before it.
    fn check(&self, batch: &Batch, rows: &[usize]) -> Result<Counters, Error> {
        let (subgroup, subgroups, got) = (self.plan.subgroup(), self.plan.subgroups(), batch.tokens.len());
        if rows.len() == subgroups && rows[subgroup] == got {
            return Ok(self.counters());
        }
        Err(Error::Rows { rank: self.plan.whole, subgroup, subgroups, got, rows: rows.to_vec() })
    }

    fn count(&mut self, rows: usize, before: &Counters) {
        self.activity.steps += 1;
        self.activity.rows += rows as u64;
        self.activity.collectives = self.activity.collectives.plus(&self.counters().since(before));
    }

    fn counters(&self) -> Counters {
        let whole = self.comm.counters();
        self.subgroup.as_ref().map_or(whole, |subgroup| whole.plus(&subgroup.counters()))
    }

    /// The residual stream after the last layer. A backend may repeat what it recorded of an earlier step, unless the
    /// host has a part in it: collectives that are not queued on the device, and what depends on the sizes of an
    /// exchange, run anew each time.
    fn hidden(&mut self, batch: &Batch, rows: &[usize]) -> Result<B::Tensor, Error> {
        // The host places choices among an expert's copies, and rows among the ranks that they are sent to.
        let queues = self.comm.queues() && self.plan.placement.is_none();
        if !queues || self.dispatch == Dispatch::AllToAll {
            self.backend.begin_step(batch)?;
            return self.layers(rows, &mut |_, _, _| Ok(()));
        }
        if let Some(x) = self.backend.begin_or_repeat(batch)? {
            return Ok(x);
        }
        let x = self.layers(rows, &mut |_, _, _| Ok(()))?;
        Ok(self.backend.keep(x)?)
    }

    fn layers(
        &mut self,
        rows: &[usize],
        observe: &mut impl FnMut(&mut B, usize, &B::Tensor) -> Result<(), Error>,
    ) -> Result<B::Tensor, Error> {
        let mut x = self.embed(rows[self.plan.subgroup()])?;
        observe(&mut self.backend, 0, &x)?;
        let mut n = None;
        for index in 0..self.config.layers.len() {
            (x, n) = self.layer(index, (x, n), rows).map_err(|e| e.in_layer(index))?;
            observe(&mut self.backend, index + 1, &x)?;
        }
        Ok(x)
    }

    /// The rows of the step in the compute dtype; none in a sub-group with nothing to do.
    fn embed(&mut self, rows: usize) -> Result<B::Tensor, Error> {
        if rows == 0 {
            let none = self.backend.buffer(0, self.config.hidden_size)?;
            return Ok(self.backend.round(none)?);
        }
        let Self { plan, backend, comm, subgroup, weights, .. } = self;
        let parts = Partial::new(backend.embed(&weights.embed, plan.first_token())?);
        let whole = parts.reduce(backend, subgroup.as_mut().unwrap_or(comm))?.whole(backend)?;
        Ok(backend.round(whole)?)
    }

    /// Takes the residual stream and its norm, when the layer before has made it; returns the next layer's.
    fn layer(
        &mut self,
        index: usize,
        (x, n): (B::Tensor, Option<B::Tensor>),
        rows: &[usize],
    ) -> Result<(B::Tensor, Option<B::Tensor>), Error> {
        let Self { config, plan, backend, comm, subgroup, weights, dispatch, kv, counts, activity } = self;
        let (layer, own) = (config.layers[index], &weights.layers[index]);
        let chosen = &mut activity.chosen[index];
        let idle = rows[plan.subgroup()] == 0;
        let mut ranked =
            Ranked { backend, comm, config, plan, dispatch: *dispatch, counts, chosen, layer: index, rows };
        if idle {
            ranked.serve(&own.mlp, &x)?;
            return Ok((x, None));
        }
        let n = match n {
            Some(n) => n,
            None => ranked.backend.norm(&x, &own.norm, config.norm)?,
        };
        if *dispatch == Dispatch::Replicated {
            ranked.backend.fork()?;
        }
        let attended = attention(ranked.backend, config, layer, own, &mut kv[index], &n)?;
        let sum = ranked.mlp(&own.mlp, &n, attended)?;
        drop(n);
        let comm = subgroup.as_mut().unwrap_or(comm);
        match weights.layers.get(index + 1) {
            Some(next) => {
                let (x, n) = sum.reduce_into((backend, comm), x, (&next.norm, config.norm))?;
                Ok((x, Some(n)))
            }
            None => {
                let sum: Reduced<B::Tensor> = sum.reduce(backend, comm)?;
                let sum = sum.whole(backend)?;
                Ok((backend.residual_add(x, &sum)?, None))
            }
        }
    }

    /// The line to all other ranks, for barriers and counters.
    pub fn comm_mut(&mut self) -> &mut C {
        &mut self.comm
    }

    /// The device.
    pub const fn backend(&self) -> &B {
        &self.backend
    }

    /// What this rank has done in its steps so far.
    pub fn activity(&self) -> Activity {
        let Counts { rows_sent, rows_received, .. } = self.counts;
        Activity { rows_sent, rows_received, ..self.activity.clone() }
    }

    /// Every rank's [`Model::activity`] in rank order. All ranks call it together, between two steps.
    ///
    /// # Errors
    /// When a rank is lost or late, or the device fails.
    pub fn gather_activity(&mut self) -> Result<Vec<Activity>, Error> {
        let own = self.activity();
        activity::gather(&mut self.backend, &mut self.comm, &own)
    }

    /// Concatenates every rank's numbers in rank order, `counts[r]` of rank `r`, as they are. All ranks call it together,
    /// between two steps, and it is counted in none.
    ///
    /// # Errors
    /// When a rank is lost or late or brings another count, or the device fails.
    pub fn gather_numbers(&mut self, own: &[f32], counts: &[usize]) -> Result<Vec<f32>, Error> {
        // A rank may bring nothing, and still no tensor is 0 wide.
        let sent = self.backend.upload(own.len().max(1), own)?;
        let mut all = self.backend.buffer(1, counts.iter().sum())?;
        self.comm.all_gather(&sent, counts, &mut all)?;
        Ok(self.backend.read(&all)?)
    }

    /// What the checkpoint computes.
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }
}

/// qkv → attention → o: this rank's heads' part.
fn attention<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    layer: LayerConfig,
    weights: &LayerWeights<B>,
    kv: &mut B::KvLayer,
    n: &B::Tensor,
) -> Result<Partial<B::Tensor>, Error> {
    let window = match layer.attention {
        Attention::Full => Window::All,
        Attention::Sliding => Window::Keys(config.window_keys),
    };
    let qkv = backend.linear(n, &weights.qkv)?;
    let heads = backend.attention(&qkv, kv, layer.rope.then_some(config.rope), window)?;
    Ok(Partial::new(backend.linear_partial(&heads, &weights.o)?))
}

impl<'a, B: Backend, C: Collective<B::Tensor>> Ranked<'a, B, C> {
    /// Adds the MLP's part to the attention's.
    fn mlp(
        &mut self,
        weights: &MlpWeights<B>,
        n: &B::Tensor,
        attended: Partial<B::Tensor>,
    ) -> Result<Partial<B::Tensor>, Error> {
        match weights {
            MlpWeights::Dense(mlp) => {
                self.backend.other_branch()?;
                let own = gated(self.backend, mlp, n)?;
                self.backend.join()?;
                attended.plus(self.backend, own, 1.0)
            }
            MlpWeights::Sparse { router, gate_up, down, shared } => {
                let moe = self.moe();
                let scale = match moe.shared.as_ref().map(|s| s.combination) {
                    Some(Combination::Average) => 0.5,
                    Some(Combination::Sum) | None => 1.0,
                };
                let slots = self.slots();
                let routed = Routed { router, gate_up, down, slots };
                let sum = self.routed(&routed, n, (attended, scale))?;
                match shared {
                    Some(shared) => {
                        let shared = gated(self.backend, shared, n)?;
                        sum.plus(self.backend, shared, scale)
                    }
                    None => Ok(sum),
                }
            }
        }
    }

    /// Works for the rows of other sub-groups in a step that has none of this one's: `x` has no rows.
    fn serve(&mut self, weights: &MlpWeights<B>, x: &B::Tensor) -> Result<(), Error> {
        if let MlpWeights::Sparse { router, gate_up, down, .. } = weights {
            let routed = Routed { router, gate_up, down, slots: self.slots() };
            self.exchange(&routed, x)?;
        }
        Ok(())
    }

    const fn moe(&self) -> &'a MoeConfig {
        match &self.config.moe {
            Some(moe) => moe,
            None => panic!("a sparse layer's weights are loaded by its expert configuration"),
        }
    }

    fn slots(&self) -> Option<&'a ExpertSlots> {
        self.plan.placement.as_ref().and_then(|placement| placement.slots(self.layer))
    }

    fn exchange(&mut self, weights: &Routed<'_, B>, n: &B::Tensor) -> Result<B::Tensor, Error> {
        let sizes =
            Sizes { moe: self.moe(), plan: self.plan, rows: self.rows, hidden: self.config.hidden_size };
        let Self { backend, comm, counts, chosen, .. } = self;
        dispatch::exchange((*backend, *comm), weights, &sizes, (*counts, *chosen), n)
    }

    /// Adds the routed experts' part, times `scale`.
    fn routed(
        &mut self,
        weights: &Routed<'_, B>,
        n: &B::Tensor,
        (attended, scale): (Partial<B::Tensor>, f32),
    ) -> Result<Partial<B::Tensor>, Error> {
        match self.dispatch {
            Dispatch::Replicated => {
                let moe = self.moe();
                let Self { backend, plan, chosen, .. } = self;
                let first_expert = plan.experts.as_ref().map_or(0, |shard| shard.experts.start);
                backend.other_branch()?;
                let mut routed = backend.router(n, weights.router, moe.routing)?;
                backend.count_choices(&routed, chosen)?;
                if let Some(slots) = weights.slots {
                    routed = backend.place(routed, slots, 0)?;
                }
                let own = backend.routed_experts(n, &routed, weights.gate_up, weights.down, first_expert)?;
                backend.join()?;
                attended.plus(*backend, Partial::new(own), scale)
            }
            Dispatch::AllToAll => {
                let own = self.exchange(weights, n)?;
                let first_row = dispatch::slice(self.plan.rank, self.rows[self.plan.subgroup()]).start;
                attended.plus_rows(self.backend, (first_row, &own), scale)
            }
        }
    }
}

/// down(silu(gate) · up): this rank's columns' part.
fn gated<B: Backend>(
    backend: &mut B,
    weights: &GatedMlp<B>,
    n: &B::Tensor,
) -> Result<Partial<B::Tensor>, Error> {
    let gate_up = backend.linear(n, &weights.gate_up)?;
    let activated = backend.swiglu(&gate_up)?;
    Ok(Partial::new(backend.linear_partial(&activated, &weights.down)?))
}

impl Attention {
    /// The KV group that holds this layer's keys and values.
    #[must_use]
    pub const fn kv_group(self) -> KvGroup {
        match self {
            Self::Full => KvGroup::Full,
            Self::Sliding => KvGroup::Sliding,
        }
    }
}
