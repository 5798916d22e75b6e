//! Which part of every weight a rank holds. Pure arithmetic on the configuration: no file, no device.

use std::ops::Range;

use types::limits::RANKS_MAX;
use types::{ExpertSharding, TokenId, TpRank, TpSize};

use crate::config::ModelConfig;
use crate::error::Error;

/// One rank's part of a model. Ranges index the whole model's heads, rows and widths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Whose part this is.
    pub rank: TpRank,
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
}

/// A rank's part of the routed experts: these columns of these experts. [`ExpertSharding::Tensor`] takes some columns
/// of every expert, [`ExpertSharding::Expert`] every column of some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertShard {
    /// Experts held.
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

    /// The part of `rank`.
    ///
    /// # Errors
    /// [`Error::Split`] with every count that does not divide by the number of ranks, and the sizes that do.
    pub fn sharded(config: &ModelConfig, rank: TpRank, experts: ExpertSharding) -> Result<Self, Error> {
        let mut split = Split { rank, problems: Vec::new() };
        let query_heads = split.evenly("query heads", config.query_heads);
        let kv_heads = split.kv_heads(config.kv_heads);
        let dense =
            config.dense_intermediate_size.map(|width| split.evenly("columns of the dense MLP", width));
        let moe = config.moe.as_ref();
        let routed = moe.map(|moe| match experts {
            ExpertSharding::Tensor => ExpertShard {
                experts: 0..moe.experts,
                width: split.evenly("columns of a routed expert", moe.intermediate_size),
            },
            ExpertSharding::Expert => ExpertShard {
                experts: split.evenly("routed experts", moe.experts),
                width: 0..moe.intermediate_size,
            },
        });
        let shared = moe
            .and_then(|moe| moe.shared)
            .map(|shared| split.evenly("columns of the shared experts", shared.intermediate_size));
        if !split.problems.is_empty() {
            return Err(Error::Split { rank, problems: split.problems, works: Self::sizes(config, experts) });
        }
        let vocab_rows = config.vocab_size.div_ceil(rank.size().as_usize());
        let first = (rank.as_usize() * vocab_rows).min(config.vocab_size);
        let vocab = first..(first + vocab_rows).min(config.vocab_size);
        Ok(Self { rank, query_heads, kv_heads, vocab_rows, vocab, dense, experts: routed, shared })
    }

    /// Every number of ranks this model divides by, ascending.
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

    /// The size of the group.
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
