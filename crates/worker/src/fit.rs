//! Whether a rank's part fits in its device's memory, asked before any of it is allocated.

use model::{ModelConfig, ShardPlan, WeightBytes, kv_bytes_per_block, resident_pieces};
use types::{Bytes, DType, ExpertSharding, KvGroup, TpRank, TpSize};

use crate::{Error, Limits, capacity};

/// Sizes of groups that are tried when a part is too large.
const SIZES: [u32; 4] = [2, 4, 8, 16];

/// What a rank is about to allocate.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The whole model.
    pub model: &'a ModelConfig,
    /// The rank's share of it.
    pub plan: &'a ShardPlan,
    /// How the routed experts are shared out.
    pub experts: ExpertSharding,
    /// What weights are kept in.
    pub weights: DType,
    /// Compute dtype, which is also that of keys and values.
    pub dtype: DType,
    /// Bounds of the engine.
    pub limits: &'a Limits,
}

/// What a rank's memory is to the other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Each rank has a device of its own: more ranks have more memory.
    OfEachRank,
    /// The ranks of this machine share it.
    Shared,
}

impl Part<'_> {
    fn weights(&self, plan: &ShardPlan) -> WeightBytes {
        WeightBytes::new(self.model, plan, self.weights)
    }

    fn kv(&self, plan: &ShardPlan, limits: &Limits) -> Bytes {
        let block = limits.block_size;
        let per_block =
            KvGroup::ALL.map(|group| kv_bytes_per_block(self.model, plan, self.dtype, group, block));
        capacity::kv_bytes(per_block, capacity::pools(self.model, limits))
    }

    /// Tokens that the KV cache holds in what the weights leave; 0 when there is no room for a block.
    fn kv_tokens(&self, plan: &ShardPlan, available: Bytes) -> u32 {
        let weights = self.weights(plan).total();
        capacity::largest(self.limits, |limits| weights + self.kv(plan, limits) <= available)
    }

    /// What stays on the device: weights and KV cache, and in how many pieces.
    #[must_use]
    pub fn resident(&self) -> (Bytes, usize) {
        (self.weights(self.plan).total() + self.kv(self.plan, self.limits), resident_pieces(self.model))
    }

    /// Refuses a part that is larger than what is `available`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] with what each kind of weight and the KV cache take, and the nearest plan that fits.
    pub fn check(&self, available: Bytes, memory: Memory) -> Result<(), Error> {
        let (weights, kv) = (self.weights(self.plan), self.kv(self.plan, self.limits));
        if weights.total() + kv <= available {
            return Ok(());
        }
        let mut table = String::new();
        let mut row =
            |what: &str, bytes: Bytes| table.push_str(&format!("\n  {what:<40}{:>12}", bytes.to_string()));
        weights
            .kinds()
            .into_iter()
            .filter(|(_, bytes)| bytes.0 > 0)
            .for_each(|(kind, bytes)| row(kind, bytes));
        row("all weights", weights.total());
        row(&format!("the KV cache of {} tokens", self.limits.kv_tokens), kv);
        row("needed", weights.total() + kv);
        row("available", available);
        let nearest = self.nearest(available, memory);
        Err(Error::TooLarge { rank: self.plan.rank, table, nearest })
    }

    /// The plan with the fewest changes that would fit.
    fn nearest(&self, available: Bytes, memory: Memory) -> String {
        let tokens = self.kv_tokens(self.plan, available);
        if tokens > 0 {
            return format!("it fits with --kv-tokens {tokens}");
        }
        let size = self.plan.size().get();
        let larger = SIZES.into_iter().filter(|larger| *larger > size && memory == Memory::OfEachRank);
        let mut fits = larger.filter_map(|larger| {
            let rank = TpRank::new(0, TpSize::new(larger).ok()?).ok()?;
            let plan = ShardPlan::sharded(self.model, rank, self.experts).ok()?;
            let tokens = self.kv_tokens(&plan, available).min(self.limits.kv_tokens);
            (tokens > 0).then(|| format!("it fits with --tensor-parallel {larger} --kv-tokens {tokens}"))
        });
        fits.next().unwrap_or_else(|| match memory {
            Memory::OfEachRank => {
                "it does not fit on any number of ranks that this model divides by".to_owned()
            }
            Memory::Shared => "the weights alone are too large for this machine".to_owned(),
        })
    }
}
