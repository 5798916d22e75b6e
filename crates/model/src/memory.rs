//! What a rank keeps in memory, in bytes, before anything is allocated.

use ops::KvGroup;
use types::{BlockSize, Bytes, DType};

use crate::config::ModelConfig;
use crate::layout::{Part, Slot, slots};
use crate::shard::ShardPlan;

/// Weights and cache layers that a rank keeps.
#[must_use]
pub fn resident_pieces(config: &ModelConfig) -> usize {
    slots(config).len() + config.layers.len()
}

/// Resident weights of one rank by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Embedding rows, padding included.
    pub embedding: Bytes,
    /// Head rows of an untied model.
    pub head: Bytes,
    /// All norms; the same on every rank.
    pub norms: Bytes,
    /// Attention projections of all layers.
    pub attention: Bytes,
    /// Dense layers' MLPs.
    pub dense: Bytes,
    /// Routers; the same on every rank.
    pub routers: Bytes,
    /// Routed experts.
    pub experts: Bytes,
    /// Shared experts.
    pub shared: Bytes,
}

impl WeightBytes {
    /// Of the plan's rank in `dtype`.
    #[must_use]
    pub fn new(config: &ModelConfig, plan: &ShardPlan, dtype: DType) -> Self {
        let mut sums = Self::default();
        for slot in slots(config) {
            let elements: usize = slot.shape(config, plan).iter().product();
            *sums.of(slot) += Bytes((elements * dtype.bytes()) as u64);
        }
        sums
    }

    /// Each kind by its name, in the order they are shown.
    #[must_use]
    pub const fn kinds(&self) -> [(&'static str, Bytes); 8] {
        let Self { embedding, head, norms, attention, dense, routers, experts, shared } = *self;
        [
            ("embedding", embedding),
            ("head", head),
            ("attention", attention),
            ("norms", norms),
            ("dense", dense),
            ("routers", routers),
            ("experts", experts),
            ("shared", shared),
        ]
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> Bytes {
        let Self { embedding, head, norms, attention, dense, routers, experts, shared } = *self;
        embedding + head + norms + attention + dense + routers + experts + shared
    }

    const fn of(&mut self, slot: Slot) -> &mut Bytes {
        match slot {
            Slot::Embed => &mut self.embedding,
            Slot::Head => &mut self.head,
            Slot::FinalNorm | Slot::Layer(_, Part::Norm) => &mut self.norms,
            Slot::Layer(_, Part::Qkv | Part::O) => &mut self.attention,
            Slot::Layer(_, Part::DenseGateUp | Part::DenseDown) => &mut self.dense,
            Slot::Layer(_, Part::Router) => &mut self.routers,
            Slot::Layer(_, Part::ExpertsGateUp | Part::ExpertsDown) => &mut self.experts,
            Slot::Layer(_, Part::SharedGateUp | Part::SharedDown) => &mut self.shared,
        }
    }
}

/// Keys and values of one token in all layers of `group` on the plan's rank.
#[must_use]
pub fn kv_bytes_per_token(config: &ModelConfig, plan: &ShardPlan, dtype: DType, group: KvGroup) -> Bytes {
    let keys_and_values = 2 * plan.kv_heads.len() * config.head_dim * dtype.bytes();
    Bytes((config.layers_in(group) * keys_and_values) as u64)
}

/// One block of `group`: [`kv_bytes_per_token`] times the tokens of a block.
#[must_use]
pub fn kv_bytes_per_block(
    config: &ModelConfig,
    plan: &ShardPlan,
    dtype: DType,
    group: KvGroup,
    block: BlockSize,
) -> Bytes {
    let Bytes(token) = kv_bytes_per_token(config, plan, dtype, group);
    Bytes(token * u64::from(block.tokens()))
}
