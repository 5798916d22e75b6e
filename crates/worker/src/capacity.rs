//! What a group needs and can serve, worked out from the model's configuration alone: no weights, no device. It asks
//! the code that shards, allocates and sends, so that what is said here is what a worker does.

use collectives::Tcp;
use engine::BLOCKS_CEILING;
use engine::kv::Geometry;
use model::{Mlp, ModelConfig, ShardPlan, WeightBytes, kv_bytes_per_block, kv_bytes_per_token};
use ops::{Backend, KvGroup};
use ops_cpu::CpuBackend;
use types::{Bytes, DType, Dispatch, ExpertSharding, TpRank, TpSize};

use crate::{Error, Limits};

/// A group as it would be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupShape {
    /// Ranks that share the model.
    pub size: TpSize,
    /// How the routed experts are shared out.
    pub experts: ExpertSharding,
    /// How rows reach their experts.
    pub dispatch: Dispatch,
    /// Compute dtype, which is also that of keys and values.
    pub dtype: DType,
    /// Bounds of the engine; `kv_tokens` is replaced when [`GroupShape::memory`] asks for what fits.
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
    /// Tokens of context in the KV cache over all sequences: `group.kv_tokens`. 0 when no block fits.
    pub kv_tokens: u32,
    /// Length of the sequences below.
    pub context_tokens: u32,
    /// Sequences of `context_tokens` that can run at once.
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

/// Collectives of one step, and what the rank that sends most sends to others. Framing is not counted. What
/// all-to-alls send depends on the choices of the routers; the most it can be is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectiveCosts {
    /// All-reduces of a step: one a layer and one for the embedding. None in a group of one.
    pub all_reduces: usize,
    /// All-gathers of a step that wants logits of up to 64 rows.
    pub all_gathers: usize,
    /// All-to-alls of a step: three (counts, rows, results) a sparse layer when rows are sent to their experts.
    pub all_to_alls: usize,
    /// Bytes sent in a step that decodes one token.
    pub decode_token: Bytes,
    /// Bytes sent for each token of a prompt's full step, which wants no logits.
    pub prompt_token: Bytes,
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
        let plans = shape.size.ranks().map(|rank| ShardPlan::sharded(model, rank, shape.experts));
        let plans = plans.collect::<Result<Vec<_>, model::Error>>()?;
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
            context_tokens,
            concurrency,
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
            let nothing = Bytes(0);
            return Self {
                all_reduces: 0,
                all_gathers: 0,
                all_to_alls: 0,
                decode_token: nothing,
                prompt_token: nothing,
            };
        }
        let all_reduces = model.layers.len() + 1;
        let all_to_alls = match shape.dispatch {
            Dispatch::Replicated => 0,
            Dispatch::AllToAll => EXCHANGES * sparse_layers(model),
        };
        let most = |sends: &dyn Fn(&ShardPlan) -> usize| {
            let elements = plans.iter().map(sends).max().unwrap_or(0);
            (elements * size_of::<f32>()) as u64
        };
        let layers = |plan: &ShardPlan, rows: usize| {
            all_reduces * Tcp::all_reduce_sends(plan.rank, rows * model.hidden_size)
                + all_to_alls / EXCHANGES * exchange_sends_max(model, plan.rank, rows)
        };
        let (others, step_tokens) = (plans.len() - 1, shape.limits.step_tokens_max);
        let decode = most(&|plan| layers(plan, 1) + plan.vocab_rows * others);
        let step = most(&|plan| layers(plan, step_tokens as usize));
        Self {
            all_reduces,
            all_gathers: 1,
            all_to_alls,
            decode_token: Bytes(decode),
            prompt_token: Bytes(step / u64::from(step_tokens).max(1)),
        }
    }
}

/// All-to-alls of a sparse layer: counts, rows, results.
const EXCHANGES: usize = 3;

fn sparse_layers(model: &ModelConfig) -> usize {
    model.layers.iter().filter(|layer| layer.mlp == Mlp::Sparse).count()
}

/// Most elements `rank` sends in the exchanges of one sparse layer: the counts; its rows to as many ranks as they can
/// choose; the results of every other rank's rows.
fn exchange_sends_max(model: &ModelConfig, rank: TpRank, rows: usize) -> usize {
    let others = rank.size().as_usize() - 1;
    let top_k = model.moe.map_or(0, |moe| moe.routing.top_k);
    let own = model::dispatch_slice(rank, rows).len();
    others + own * top_k.min(others) * (model.hidden_size + 2 * top_k) + (rows - own) * model.hidden_size
}
