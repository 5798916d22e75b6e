//! The forward pass: embed → layers → norm → logits, written once over any backend and collective.
//!
//! A layer is `x + attention(n) + mlp(n)` with `n = norm(x)`: one norm, both branches read it, and what the branches
//! of one rank produce is added up before a single all-reduce. (transformers `models/cohere2_moe`,
//! `Cohere2MoeDecoderLayer`.)

mod measure;

use std::ops::Range;

use collectives::Collective;
use ops::{Backend, Batch, KvGroup, KvLayerSpec, Window};
use types::{BlockSize, Dispatch};

use crate::dispatch::{self, Routed, Sizes};
use crate::partial::{Partial, Reduced};
use crate::weights::{GatedMlp, LayerWeights, MlpWeights, Weights};
use crate::{Attention, Combination, Error, LayerConfig, ModelConfig, MoeConfig, ShardPlan};

/// Rows whose logits are made at once: bounds the memory of a prompt's log-probabilities (64 rows of a 262,144-entry
/// vocabulary are 64 MiB) whatever the prompt's length.
const LOGIT_ROWS_MAX: usize = 64;

/// One rank's model: weights and KV cache on its device, and the line to the other ranks.
pub struct Model<B: Backend, C> {
    config: ModelConfig,
    plan: ShardPlan,
    backend: B,
    comm: C,
    weights: Weights<B>,
    dispatch: Dispatch,
    kv: Vec<B::KvLayer>,
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
    /// The other ranks.
    pub comm: C,
    /// The slice's weights, on the device.
    pub weights: Weights<B>,
    /// How rows reach their experts; the same on every rank.
    pub dispatch: Dispatch,
}

/// What a layer's MLP runs with: the rank's parts, and the rows of the step.
struct Ranked<'a, B, C> {
    backend: &'a mut B,
    comm: &'a mut C,
    config: &'a ModelConfig,
    plan: &'a ShardPlan,
    dispatch: Dispatch,
    rows: usize,
}

impl<B: Backend, C: Collective<B::Tensor>> Model<B, C> {
    /// Puts a rank's model together and reserves its KV cache.
    ///
    /// # Errors
    /// When the cache does not fit in the device's memory; [`Error::Dispatch`] when rows are to be sent to experts
    /// that no rank holds whole.
    pub fn new(parts: Parts<B, C>, budget: KvBudget) -> Result<Self, Error> {
        let Parts { config, plan, mut backend, comm, weights, dispatch } = parts;
        if let (Dispatch::AllToAll, Some(moe), Some(shard)) = (dispatch, &config.moe, &plan.experts)
            && shard.width.len() != moe.intermediate_size
        {
            let (held, experts) = (shard.experts.len(), moe.experts);
            return Err(Error::Dispatch { rank: plan.rank, held, experts });
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
        Ok(Self { config, plan, backend, comm, weights, dispatch, kv })
    }

    /// Runs one step. Every rank calls it with the same batch; `sink` gets the logits [rows, vocabulary] of some of
    /// the batch's logit rows at a time (first row's number, then the rows), in order.
    ///
    /// # Errors
    /// When a rank is lost or late, the batch contradicts itself, or the device fails.
    pub fn step(
        &mut self,
        batch: &Batch,
        sink: impl FnMut(usize, &[f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.step_observed(batch, sink, |_, _, _| Ok(()))
    }

    /// As [`Model::step`]; `observe` sees the residual stream after the embedding (0) and after each layer (1…).
    ///
    /// # Errors
    /// As [`Model::step`], and whatever the closures return.
    pub fn step_observed(
        &mut self,
        batch: &Batch,
        mut sink: impl FnMut(usize, &[f32]) -> Result<(), Error>,
        mut observe: impl FnMut(&mut B, usize, &B::Tensor) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.backend.begin_step(batch)?;
        let mut x = self.embed()?;
        observe(&mut self.backend, 0, &x)?;
        for index in 0..self.config.layers.len() {
            x = self.layer(index, x, batch.tokens.len()).map_err(|e| e.in_layer(index))?;
            observe(&mut self.backend, index + 1, &x)?;
        }
        let mut first = 0;
        while first < batch.logit_rows.len() {
            let end = batch.logit_rows.len().min(first + LOGIT_ROWS_MAX);
            sink(first, &self.logits(&x, first..end)?)?;
            first = end;
        }
        Ok(())
    }

    fn embed(&mut self) -> Result<B::Tensor, Error> {
        let rows = Partial::new(self.backend.embed(&self.weights.embed, self.plan.first_token())?);
        let whole = rows.reduce(&mut self.comm)?;
        Ok(self.backend.round(whole.into_inner())?)
    }

    fn layer(&mut self, index: usize, x: B::Tensor, rows: usize) -> Result<B::Tensor, Error> {
        let Self { config, plan, backend, comm, weights, dispatch, kv } = self;
        let (layer, weights) = (config.layers[index], &weights.layers[index]);
        let n = backend.norm(&x, &weights.norm, config.norm)?;
        let attended = attention(backend, config, layer, weights, &mut kv[index], &n)?;
        let mut ranked = Ranked { backend, comm, config, plan, dispatch: *dispatch, rows };
        let sum = ranked.mlp(&weights.mlp, &n, attended)?;
        let sum: Reduced<B::Tensor> = sum.reduce(comm)?;
        Ok(backend.residual_add(x, sum.get())?)
    }

    /// Logits [which, vocabulary], scaled; equal on all ranks.
    fn logits(&mut self, x: &B::Tensor, which: Range<usize>) -> Result<Vec<f32>, Error> {
        let rows = which.len();
        let Self { config, plan, backend, comm, weights, .. } = self;
        let x = backend.logit_rows(x, which)?;
        let n = backend.norm(&x, &weights.final_norm, config.norm)?;
        let own = backend.linear(&n, weights.head.as_ref().unwrap_or(&weights.embed))?;
        let ranks = comm.rank().size().as_usize();
        let mut logits = if ranks == 1 {
            backend.read(&own)?
        } else {
            let mut all = backend.buffer(ranks * rows, plan.vocab_rows)?;
            comm.all_gather(&own, &vec![rows * plan.vocab_rows; ranks], &mut all)?;
            let by_rank = backend.read(&all)?;
            interleave(&by_rank, rows, plan.vocab_rows, config.vocab_size)
        };
        if config.logit_scale != 1.0 {
            logits.iter_mut().for_each(|l| *l *= config.logit_scale);
        }
        Ok(logits)
    }

    /// The line to the other ranks, for barriers and counters.
    pub fn comm_mut(&mut self) -> &mut C {
        &mut self.comm
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

impl<B: Backend, C: Collective<B::Tensor>> Ranked<'_, B, C> {
    /// Adds the MLP's part to the attention's.
    fn mlp(
        &mut self,
        weights: &MlpWeights<B>,
        n: &B::Tensor,
        attended: Partial<B::Tensor>,
    ) -> Result<Partial<B::Tensor>, Error> {
        match weights {
            MlpWeights::Dense(mlp) => {
                let own = gated(self.backend, mlp, n)?;
                attended.plus(self.backend, &own, 1.0)
            }
            MlpWeights::Sparse { router, gate_up, down, shared } => {
                let Some(moe) = &self.config.moe else {
                    unreachable!("a sparse layer's weights are loaded by its expert configuration")
                };
                let scale = match moe.shared.as_ref().map(|s| s.combination) {
                    Some(Combination::Average) => 0.5,
                    Some(Combination::Sum) | None => 1.0,
                };
                let routed = Routed { router, gate_up, down };
                let sum = self.routed(moe, &routed, n, (attended, scale))?;
                match shared {
                    Some(shared) => {
                        let shared = gated(self.backend, shared, n)?;
                        sum.plus(self.backend, &shared, scale)
                    }
                    None => Ok(sum),
                }
            }
        }
    }

    /// Adds the routed experts' part, times `scale`.
    fn routed(
        &mut self,
        moe: &MoeConfig,
        weights: &Routed<'_, B>,
        n: &B::Tensor,
        (attended, scale): (Partial<B::Tensor>, f32),
    ) -> Result<Partial<B::Tensor>, Error> {
        let Self { backend, comm, plan, rows, .. } = self;
        match self.dispatch {
            Dispatch::Replicated => {
                let first_expert = plan.experts.as_ref().map_or(0, |shard| shard.experts.start);
                let logits = backend.linear(n, weights.router)?;
                let routed = backend.route(&logits, moe.routing)?;
                let own = backend.routed_experts(n, &routed, weights.gate_up, weights.down, first_expert)?;
                attended.plus(*backend, &Partial::new(own), scale)
            }
            Dispatch::AllToAll => {
                let sizes = Sizes { moe, plan, rows: *rows, hidden: self.config.hidden_size };
                let own = dispatch::exchange(*backend, *comm, weights, &sizes, n)?;
                let first_row = dispatch::slice(plan.rank, *rows).start;
                attended.plus_rows(*backend, (first_row, &own), scale)
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

/// [ranks, rows, V] to [rows, vocabulary], dropping the last ranks' padding.
fn interleave(by_rank: &[f32], rows: usize, rank_vocab: usize, vocab: usize) -> Vec<f32> {
    let ranks = by_rank.len() / (rows * rank_vocab);
    let mut logits = Vec::with_capacity(rows * vocab);
    for row in 0..rows {
        for rank in 0..ranks {
            let real = vocab.saturating_sub(rank * rank_vocab).min(rank_vocab);
            let start = (rank * rows + row) * rank_vocab;
            logits.extend_from_slice(&by_rank[start..start + real]);
        }
    }
    logits
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
