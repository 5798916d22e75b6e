//! Which part of every weight a rank holds. Pure arithmetic on the configuration: no file, no device.

use std::ops::Range;
use std::sync::Arc;

use types::limits::RANKS_MAX;
use types::{ExpertSharding, TokenId, TpRank, TpSize};

use crate::config::ModelConfig;
use crate::error::Error;
use crate::placement::Placement;

/// How the ranks of a group share a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sharing {
    /// Ranks of a sub-group, which share attention, dense layers, shared experts and vocabulary, and see the same rows.
    /// A group of several sub-groups computes their rows side by side, and all its ranks share the routed experts.
    pub tensor: TpSize,
    /// How the routed experts are shared out among all ranks of the group.
    pub experts: ExpertSharding,
    /// Which experts each rank holds, when they are not dealt out in order.
    pub placement: Option<Arc<Placement>>,
}

/// One rank's part of a model. Ranges index the whole model's heads, rows and widths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Whose part this is, among the ranks of its sub-group: in a group of one sub-group, among all ranks.
    pub rank: TpRank,
    /// The same rank among all ranks of the group.
    pub whole: TpRank,
    /// Query heads; every rank has equally many.
    pub query_heads: Range<usize>,
    /// Key/value heads: an equal share, or one head shared with neighbours when ranks outnumber heads.
    pub kv_heads: Range<usize>,
    /// V: rows of embedding and head, the same on every rank; those beyond `vocab` are zero.
    pub vocab_rows: usize,
    /// Vocabulary entries this rank really holds; on the last ranks fewer than `vocab_rows`, or none.
    pub vocab: Range<usize>,
    /// Columns of dense layers' MLP; present when a layer is dense.
    pub dense: Option<Range<usize>>,
    /// Part of the routed experts; present when a layer is sparse.
    pub experts: Option<ExpertShard>,
    /// Columns of the fused shared experts; present when the model has them.
    pub shared: Option<Range<usize>>,
    /// Which experts are in the slots that `experts` counts, when they are not dealt out in order.
    pub placement: Option<Arc<Placement>>,
}

/// A rank's part of the routed experts: these columns of these experts. [`ExpertSharding::Tensor`] takes some columns
/// of every expert, [`ExpertSharding::Expert`] every column of some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertShard {
    /// Experts held; with a placement, slots held.
    pub experts: Range<usize>,
    /// Columns of each.
    pub width: Range<usize>,
}

impl ShardPlan {
    /// The part of `rank` with the experts shared out by width.
    ///
    /// # Errors
    /// As [`ShardPlan::sharded`].
    pub fn new(config: &ModelConfig, rank: TpRank) -> Result<Self, Error> {
        Self::sharded(config, rank, ExpertSharding::Tensor)
    }

    /// The part of `rank` in a group of one sub-group, with the experts in order.
    ///
    /// # Errors
    /// As [`ShardPlan::shared`].
    pub fn sharded(config: &ModelConfig, rank: TpRank, experts: ExpertSharding) -> Result<Self, Error> {
        Self::shared(config, rank, &Sharing { tensor: rank.size(), experts, placement: None })
    }

    /// The part of rank `whole` of all ranks of the group.
    ///
    /// # Errors
    /// [`Error::Split`] with every count that does not divide by the number of ranks, and the sizes that do;
    /// [`Error::Placement`] when the placement is not one of this model on so many ranks.
    pub fn shared(config: &ModelConfig, whole: TpRank, sharing: &Sharing) -> Result<Self, Error> {
        let Sharing { tensor, experts, placement } = sharing;
        let rank = TpRank::new(whole.index() % tensor.get(), *tensor).unwrap_or(TpRank::SOLO);
        let mut split = Split { rank, problems: Vec::new() };
        split.subgroups(whole.size(), *tensor, *experts);
        let query_heads = split.evenly("query heads", config.query_heads);
        let kv_heads = split.kv_heads(config.kv_heads);
        let dense =
            config.dense_intermediate_size.map(|width| split.evenly("columns of the dense MLP", width));
        let moe = config.moe.as_ref();
        let shared = moe
            .and_then(|moe| moe.shared)
            .map(|shared| split.evenly("columns of the shared experts", shared.intermediate_size));
        split.rank = whole;
        let routed = moe.map(|moe| match (experts, placement) {
            (ExpertSharding::Tensor, _) => ExpertShard {
                experts: 0..moe.experts,
                width: split.evenly("columns of a routed expert", moe.intermediate_size),
            },
            (ExpertSharding::Expert, placement) => ExpertShard {
                experts: match placement {
                    Some(placement) => placement.slots_of(whole),
                    None => split.evenly("routed experts", moe.experts),
                },
                width: 0..moe.intermediate_size,
            },
        });
        if !split.problems.is_empty() {
            let works = Self::sizes(config, *experts);
            return Err(Error::Split { rank: whole, problems: split.problems, works });
        }
        if let Some(placement) = placement {
            placement.check(config, whole.size(), *experts)?;
        }
        let vocab_rows = config.vocab_size.div_ceil(rank.size().as_usize());
        let first = (rank.as_usize() * vocab_rows).min(config.vocab_size);
        let vocab = first..(first + vocab_rows).min(config.vocab_size);
        let (experts, placement) = (routed, placement.clone());
        Ok(Self { rank, whole, query_heads, kv_heads, vocab_rows, vocab, dense, experts, shared, placement })
    }

    /// The experts this rank holds of layer `layer`, in the order of its weights. None in a dense layer of a placement.
    pub fn held(&self, layer: usize) -> impl Iterator<Item = usize> {
        let range = self.experts.as_ref().map_or(0..0, |shard| shard.experts.clone());
        let placement = self.placement.as_deref();
        range.filter_map(move |slot| match placement {
            None => Some(slot),
            Some(placement) => placement.expert(layer, slot),
        })
    }

    /// Which sub-group of the group this rank is in, from 0.
    #[must_use]
    pub const fn subgroup(&self) -> usize {
        self.whole.as_usize() / self.rank.size().as_usize()
    }

    /// Sub-groups of the group.
    #[must_use]
    pub const fn subgroups(&self) -> usize {
        self.whole.size().as_usize() / self.rank.size().as_usize()
    }

    /// Every number of ranks this model divides by in one sub-group, ascending.
    #[must_use]
    pub fn sizes(config: &ModelConfig, experts: ExpertSharding) -> Vec<u32> {
        let divides = |size: usize| {
            let kv = config.kv_heads;
            let kv_fits = if size > kv { size.is_multiple_of(kv) } else { kv.is_multiple_of(size) };
            let dense = config.dense_intermediate_size;
            let routed = config.moe.map(|moe| match experts {
                ExpertSharding::Tensor => moe.intermediate_size,
                ExpertSharding::Expert => moe.experts,
            });
            let shared = config.moe.and_then(|moe| moe.shared).map(|shared| shared.intermediate_size);
            let even = [Some(config.query_heads), dense, routed, shared];
            kv_fits && even.into_iter().flatten().all(|count| count.is_multiple_of(size))
        };
        (1..=RANKS_MAX).filter(|size| divides(*size as usize)).collect()
    }

    /// Vocabulary entry of this rank's first row. Past the vocabulary on a rank that holds only padding.
    #[must_use]
    pub fn first_token(&self) -> TokenId {
        // Both factors are within their limits, so the product fits: VOCAB_MAX rows, RANKS_MAX ranks.
        TokenId((self.rank.as_usize() * self.vocab_rows) as u32)
    }

    /// The size of the sub-group.
    #[must_use]
    pub const fn size(&self) -> TpSize {
        self.rank.size()
    }
}

struct Split {
    rank: TpRank,
    problems: Vec<String>,
}

impl Split {
    /// Several sub-groups share whole experts among all their ranks: parts of one would have to be added up over ranks
    /// with other rows.
    fn subgroups(&mut self, whole: TpSize, tensor: TpSize, experts: ExpertSharding) {
        if !whole.get().is_multiple_of(tensor.get()) {
            self.problems.push(format!("{whole} ranks do not make sub-groups of {tensor}"));
        } else if whole != tensor && experts == ExpertSharding::Tensor {
            let data = whole.get() / tensor.get();
            self.problems.push(format!(
                "{data} data-parallel sub-groups of {tensor} need whole experts on each rank (--experts expert)"
            ));
        }
    }

    fn evenly(&mut self, what: &str, count: usize) -> Range<usize> {
        self.rank.share_of(count).unwrap_or_else(|| {
            self.problems.push(format!("{count} {what} do not divide by {} ranks", self.rank.size()));
            0..0
        })
    }

    /// Heads split like everything else, until ranks outnumber them; then each is held by equally many ranks.
    fn kv_heads(&mut self, heads: usize) -> Range<usize> {
        let ranks = self.rank.size().as_usize();
        if ranks <= heads {
            return self.evenly("key/value heads", heads);
        }
        if !ranks.is_multiple_of(heads) {
            self.problems.push(format!("{ranks} ranks cannot share {heads} key/value heads evenly"));
            return 0..0;
        }
        let head = self.rank.as_usize() / (ranks / heads);
        head..head + 1
    }
}
