//! What a group needs and can serve, worked out from the model's configuration alone: no weights, no device. It asks
//! the code that shards, allocates and sends, so that what is said here is what a worker does.

use std::sync::Arc;

use collectives::{Counters, Op};
use engine::BLOCKS_CEILING;
use engine::kv::Geometry;
use model::{
    ModelConfig, Placement, ShardPlan, Sharing, StepRows, WeightBytes, kv_bytes_per_block,
    kv_bytes_per_token, step_traffic,
};
use ops::{Backend, KvGroup};
use ops_cpu::CpuBackend;
use types::limits::RANKS_MAX;
use types::{Bytes, DType, Dispatch, ExpertSharding, TpRank, TpSize};

use crate::{Error, Limits};

/// A group as it would be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupShape {
    /// Ranks of a sub-group, which share attention and see the same rows.
    pub tensor: TpSize,
    /// Sub-groups, each with sequences and a KV cache of its own; the routed experts are shared out among all ranks.
    pub data: u32,
    /// How the routed experts are shared out.
    pub experts: ExpertSharding,
    /// Which experts each rank holds, when they are not dealt out in order.
    pub placement: Option<Arc<Placement>>,
    /// How rows reach their experts.
    pub dispatch: Dispatch,
    /// Compute dtype, which is also that of keys and values.
    pub dtype: DType,
    /// Bounds of the engine, and of each sub-group's KV cache and batch; `kv_tokens` is replaced when [`GroupShape::memory`] asks for what fits.
    pub limits: Limits,
    /// Memory of each rank.
    pub memory: Memory,
    /// Tokens of the sequences that [`Capacity::concurrency`] counts; by default the longest that the model and the KV
    /// cache hold.
    pub context_tokens: Option<u32>,
}

/// Memory of each rank, for weights and KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Not given: the KV cache is as large as the limits say.
    Unknown,
    /// The limits' KV cache has to fit beside the weights.
    Holds(Bytes),
    /// The KV cache takes what the weights leave.
    Filled(Bytes),
}

impl Memory {
    /// Its size, when it is known.
    #[must_use]
    pub const fn size(self) -> Option<Bytes> {
        match self {
            Self::Unknown => None,
            Self::Holds(bytes) | Self::Filled(bytes) => Some(bytes),
        }
    }
}

/// What a group needs and can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capacity {
    /// Whether weights and KV cache fit in the memory, and the cache holds a sequence of `context_tokens`.
    pub fits: bool,
    /// What every rank holds, by rank.
    pub ranks: Vec<RankBytes>,
    /// Type the weights are kept in.
    pub weights_dtype: DType,
    /// KV bytes by [`KvGroup::index`].
    pub kv: [KvCosts; 2],
    /// Tokens of context in the KV cache of a sub-group over all its sequences: `group.kv_tokens`. 0 when no block fits.
    pub kv_tokens: u32,
    /// The same over all sub-groups.
    pub kv_tokens_all: u64,
    /// Length of the sequences below.
    pub context_tokens: u32,
    /// Sequences of `context_tokens` that can run at once, over all sub-groups.
    pub concurrency: u32,
    /// KV bytes on one rank of a sequence of `context_tokens`, sliding layers keeping their window only.
    pub kv_sequence: Bytes,
    /// What the ranks say to each other.
    pub collectives: CollectiveCosts,
}

/// What one rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankBytes {
    /// Resident weights by kind.
    pub weights: WeightBytes,
    /// Both KV pools.
    pub kv: Bytes,
}

/// KV bytes of one group on one rank; equal on all ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvCosts {
    /// Of one token.
    pub per_token: Bytes,
    /// Of one block.
    pub per_block: Bytes,
    /// Blocks in the pool.
    pub blocks: u32,
}

/// Collectives of one step of a rank, and what the rank that sends most sends to others, as it counts them itself.
/// Framing is not counted. What all-to-alls send depends on the choices of the routers; the most it can be is counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CollectiveCosts {
    /// All-reduces of a step: one for the embedding and [`CollectiveCosts::all_reduces_per_layer`]. None in sub-groups of
    /// one rank.
    pub all_reduces: usize,
    /// All-reduces of a layer: attention, routed and shared experts are added up before they are reduced.
    pub all_reduces_per_layer: usize,
    /// All-gathers of a step that wants logits of up to 64 rows.
    pub all_gathers: usize,
    /// All-to-alls of a step: two (rows, results) a sparse layer when rows are sent to their experts.
    pub all_to_alls: usize,
    /// Messages sent in a step that decodes one token in each sub-group.
    pub decode_messages: u64,
    /// Those of them that are of all-to-alls, in one sparse layer: two to every other rank.
    pub all_to_all_messages_per_layer: u64,
    /// Bytes sent in a step that decodes one token in each sub-group.
    pub decode_token: Bytes,
    /// Bytes sent for each token of a prompt's full step in each sub-group, which wants no logits.
    pub prompt_token: Bytes,
}

impl GroupShape {
    /// All ranks of the group.
    ///
    /// # Errors
    /// [`Error::Budget`] when they are more than a group may have, or dispatch does not reach the other sub-groups.
    pub fn ranks(&self) -> Result<TpSize, Error> {
        if self.data > 1 && self.dispatch == Dispatch::Replicated {
            let needed = format!("all-to-all, because {} sub-groups have rows of their own", self.data);
            return Err(Error::Budget { field: "dispatch", got: self.dispatch.to_string(), needed });
        }
        TpSize::new(self.tensor.get().saturating_mul(self.data)).map_err(|_| {
            let got = format!("{} with {} ranks in each sub-group", self.data, self.tensor);
            Error::Budget { field: "data_parallel", got, needed: format!("1 to {RANKS_MAX} ranks in all") }
        })
    }

    /// What each rank holds.
    fn plans(&self, model: &ModelConfig) -> Result<Vec<ShardPlan>, Error> {
        let (tensor, experts, placement) = (self.tensor, self.experts, self.placement.clone());
        let sharing = Sharing { tensor, experts, placement };
        let plans = self.ranks()?.ranks().map(|rank| ShardPlan::shared(model, rank, &sharing));
        Ok(plans.collect::<Result<Vec<_>, model::Error>>()?)
    }
}

impl Capacity {
    /// Of `model` run by a group of this shape.
    ///
    /// # Errors
    /// [`model::Error::Split`] when the plan is not legal; [`Error::Budget`] when the model does not reach
    /// `context_tokens`.
    pub fn new(model: &ModelConfig, shape: &GroupShape) -> Result<Self, Error> {
        let context_max = model.context_tokens_max;
        if let Some(tokens) = shape.context_tokens.filter(|tokens| *tokens == 0 || *tokens > context_max) {
            let needed = format!("1 to {context_max}, the model's context");
            return Err(Error::Budget { field: "context", got: tokens.to_string(), needed });
        }
        let plans = shape.plans(model)?;
        let weights_dtype = kept_dtype(model, shape)?;
        let weights: Vec<_> = plans.iter().map(|plan| WeightBytes::new(model, plan, weights_dtype)).collect();
        let most = weights.iter().map(WeightBytes::total).max().unwrap_or_default();
        let per_block = KvGroup::ALL
            .map(|group| kv_bytes_per_block(model, &plans[0], shape.dtype, group, shape.limits.block_size));
        let bytes = |blocks: [u32; 2]| kv_bytes(per_block, blocks);
        let limits = match shape.memory {
            Memory::Unknown | Memory::Holds(_) => shape.limits,
            Memory::Filled(memory) => {
                let left = Bytes(memory.0.saturating_sub(most.0));
                let fits = |limits: &Limits| bytes(pools(model, limits)) <= left;
                Limits { kv_tokens: largest(&shape.limits, fits), ..shape.limits }
            }
        };
        let blocks = pools(model, &limits);
        let kv = KvGroup::ALL.map(|group| KvCosts {
            per_token: kv_bytes_per_token(model, &plans[0], shape.dtype, group),
            per_block: per_block[group.index()],
            blocks: blocks[group.index()],
        });
        let context_tokens = shape.context_tokens.unwrap_or(context_max.min(limits.kv_tokens).max(1));
        let geometry = Geometry { block_size: limits.block_size, window_keys: model.window_keys };
        let peak = KvGroup::ALL.map(|group| geometry.peak(group, context_tokens));
        let concurrency = concurrency(model, &limits, blocks, peak);
        let within = shape.memory.size().is_none_or(|memory| most + bytes(blocks) <= memory);
        Ok(Self {
            fits: within && concurrency > 0,
            ranks: weights.into_iter().map(|weights| RankBytes { weights, kv: bytes(blocks) }).collect(),
            weights_dtype,
            kv,
            kv_tokens: limits.kv_tokens,
            kv_tokens_all: u64::from(limits.kv_tokens) * u64::from(shape.data),
            context_tokens,
            concurrency: concurrency.saturating_mul(shape.data),
            kv_sequence: bytes(peak),
            collectives: CollectiveCosts::new(model, &plans, shape),
        })
    }
}

/// Blocks of each KV pool by [`KvGroup::index`]; none for a group that no layer is in.
pub(crate) fn pools(model: &ModelConfig, limits: &Limits) -> [u32; 2] {
    let kv_blocks = limits.block_size.blocks_for(limits.kv_tokens);
    // A sliding layer never holds more of a sequence than its window and the step's chunk, and a block at each end.
    let span = model.window_keys.saturating_add(limits.step_tokens_max);
    let sliding_each = limits.block_size.blocks_for(span).saturating_add(2);
    let sliding = kv_blocks.min(limits.running_max.saturating_mul(sliding_each));
    KvGroup::ALL.map(|group| match (model.layers_in(group), group) {
        (0, _) => 0,
        (_, KvGroup::Full) => kv_blocks,
        (_, KvGroup::Sliding) => sliding,
    })
}

/// The largest `kv_tokens` for which `fits` holds, in whole blocks.
pub(crate) fn largest(limits: &Limits, fits: impl Fn(&Limits) -> bool) -> u32 {
    let block = limits.block_size.tokens();
    let tokens = |blocks: u32| blocks * block;
    let (mut low, mut high) = (0, BLOCKS_CEILING.min(u32::MAX / 2 / block));
    while low < high {
        let middle = high - (high - low) / 2;
        if fits(&Limits { kv_tokens: tokens(middle), ..*limits }) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    tokens(low)
}

/// Sequences that each need `peak` blocks and run at once.
fn concurrency(model: &ModelConfig, limits: &Limits, blocks: [u32; 2], peak: [u32; 2]) -> u32 {
    let used = KvGroup::ALL.into_iter().filter(|group| model.layers_in(*group) > 0);
    let held = used.map(|group| blocks[group.index()] / peak[group.index()].max(1));
    held.fold(limits.running_max, u32::min)
}

/// Bytes of so many blocks of each group.
pub(crate) fn kv_bytes(per_block: [Bytes; 2], blocks: [u32; 2]) -> Bytes {
    let sums =
        per_block.into_iter().zip(blocks).map(|(Bytes(each), blocks)| each.saturating_mul(blocks.into()));
    Bytes(sums.sum())
}

/// The type the device keeps the weights in.
fn kept_dtype(model: &ModelConfig, shape: &GroupShape) -> Result<DType, Error> {
    let device = |source| Error::Device { rank: TpRank::SOLO, source };
    let backend = CpuBackend::new(shape.dtype, 1).map_err(device)?;
    Ok(backend.weight_dtype(model.stored_dtype.unwrap_or(DType::F32)))
}

impl CollectiveCosts {
    fn new(model: &ModelConfig, plans: &[ShardPlan], shape: &GroupShape) -> Self {
        if plans.len() == 1 {
            return Self::default();
        }
        let most = |rows: usize, logit_rows: usize, of: fn(&Counters) -> u64| {
            let costs = plans.iter().map(|plan| {
                let (sent, received) = rows_moved_max(model, plan, rows);
                let step = StepRows { rows, logit_rows, sent, received };
                of(&step_traffic(model, plan, shape.dispatch, &step))
            });
            costs.max().unwrap_or(0)
        };
        let ops = |op: Op| {
            let step = StepRows { rows: 1, logit_rows: 1, sent: 0, received: 0 };
            let traffic = step_traffic(model, &plans[0], shape.dispatch, &step).of(op);
            // Sub-groups of one rank have nobody to reduce or gather with.
            if traffic.messages_sent == 0 { 0 } else { traffic.ops as usize }
        };
        let all_reduces = ops(Op::AllReduce);
        let step_tokens = shape.limits.step_tokens_max.max(1);
        let prompt = most(step_tokens as usize, 0, Counters::bytes_sent);
        let exchanged = |counters: &Counters| counters.of(Op::AllToAll).messages_sent;
        Self {
            all_reduces,
            all_reduces_per_layer: all_reduces.saturating_sub(1) / model.layers.len().max(1),
            all_gathers: ops(Op::AllGather),
            all_to_alls: ops(Op::AllToAll),
            decode_messages: most(1, 1, Counters::messages_sent),
            all_to_all_messages_per_layer: most(1, 1, exchanged) / model.sparse_layers().max(1) as u64,
            decode_token: Bytes(most(1, 1, Counters::bytes_sent)),
            prompt_token: Bytes(prompt / u64::from(step_tokens)),
        }
    }
}

/// Most rows that `plan`'s rank sends to other ranks and takes from them, in all layers, when every sub-group has `rows`:
/// its slice to as many ranks as each row can choose, and everybody else's slice.
fn rows_moved_max(model: &ModelConfig, plan: &ShardPlan, rows: usize) -> (usize, usize) {
    let others = plan.whole.size().as_usize() - 1;
    let top_k = model.moe.map_or(0, |moe| moe.routing.top_k);
    let own = model::dispatch_slice(plan.rank, rows).len();
    let all = rows * plan.subgroups();
    (model.sparse_layers() * own * top_k.min(others), model.sparse_layers() * (all - own))
}
