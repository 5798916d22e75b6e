//! What a step cannot do without: the bytes it must read and the operations it must do.

use model::{Attention, Mlp, ModelConfig, ShardPlan, WeightBytes, kv_bytes_per_token};
use types::{DType, KvGroup};

/// The bytes and operations of a model's steps.
#[derive(Debug, Clone)]
pub struct Floor {
    weights: WeightBytes,
    /// Bytes of one expert of one layer.
    expert: f64,
    tied_head: bool,
    /// Keys a sliding layer sees.
    window: usize,
    /// KV bytes of a token by [`KvGroup::index`].
    kv_token: [f64; 2],
    /// Operations of one token in all matrix products but the head's.
    token_flops: f64,
    head_flops: f64,
    /// Operations of one query and key in all layers of a group, by [`KvGroup::index`].
    pair_flops: [f64; 2],
}

impl Floor {
    /// Of the plan's rank, with weights of these sizes and keys and values in `dtype`.
    #[must_use]
    pub fn new(config: &ModelConfig, plan: &ShardPlan, weights: WeightBytes, dtype: DType) -> Self {
        let sparse = config.layers.iter().filter(|layer| layer.mlp == Mlp::Sparse).count();
        let experts = plan.experts.as_ref().map_or(0, |shard| shard.experts.len());
        let groups = KvGroup::ALL;
        let pair = 4 * plan.query_heads.len() * config.head_dim;
        Self {
            weights,
            expert: weights.experts.0 as f64 / (sparse * experts).max(1) as f64,
            tied_head: config.tied_head,
            window: config.window_keys as usize,
            kv_token: groups.map(|group| kv_bytes_per_token(config, plan, dtype, group).0 as f64),
            token_flops: token_flops(config, plan),
            head_flops: 2.0 * (plan.vocab_rows * config.hidden_size) as f64,
            pair_flops: groups.map(|group| (config.layers_in(group) * pair) as f64),
        }
    }

    /// Bytes of a step that decodes one token of each of `batch` sequences of `context` tokens and touches so many
    /// experts in all layers together: every other weight once, the head included, and the visible keys and values.
    #[must_use]
    pub fn decode_bytes(&self, batch: usize, context: usize, experts_touched: f64) -> f64 {
        let weights = &self.weights;
        // A tied embedding is read whole, as the head; an untied one by rows that do not count.
        let table = if self.tied_head { weights.embedding } else { weights.head };
        let others = weights.norms + weights.attention + weights.dense + weights.routers + weights.shared;
        let seen = self.seen(context);
        let kv: f64 = self.kv_token.iter().zip(seen).map(|(each, seen)| each * seen).sum();
        (table + others).0 as f64 + self.expert * experts_touched + batch as f64 * kv
    }

    /// Operations of a prompt of `tokens` whose last token's logits are wanted.
    #[must_use]
    pub fn prefill_flops(&self, tokens: usize) -> f64 {
        let pairs = [triangle(tokens, tokens), triangle(tokens, self.window)];
        let attention: f64 = self.pair_flops.iter().zip(pairs).map(|(each, pairs)| each * pairs).sum();
        tokens as f64 * self.token_flops + attention + self.head_flops
    }

    /// Keys that the next token sees, by group.
    fn seen(&self, context: usize) -> [f64; 2] {
        [context as f64, context.min(self.window) as f64]
    }
}

/// Pairs of query and key when each of `tokens` sees itself and what is before it, `window` keys at most.
fn triangle(tokens: usize, window: usize) -> f64 {
    let growing = tokens.min(window) as f64;
    growing * (growing + 1.0) / 2.0 + tokens.saturating_sub(window) as f64 * window as f64
}

fn token_flops(config: &ModelConfig, plan: &ShardPlan) -> f64 {
    let hidden = config.hidden_size;
    let heads = 2 * (plan.query_heads.len() + plan.kv_heads.len()) * config.head_dim;
    let gated = |width: usize| 3 * width * hidden;
    let width = |range: &Option<std::ops::Range<usize>>| range.as_ref().map_or(0, ExactSizeIterator::len);
    let each = config.layers.iter().map(|layer| {
        let mlp = match (layer.mlp, &config.moe) {
            (Mlp::Sparse, Some(moe)) => {
                let expert = plan.experts.as_ref().map_or(0, |shard| gated(shard.width.len()));
                moe.routing.top_k * expert + moe.experts * hidden + gated(width(&plan.shared))
            }
            (Mlp::Sparse, None) | (Mlp::Dense, _) => gated(width(&plan.dense)),
        };
        match layer.attention {
            Attention::Full | Attention::Sliding => heads * hidden + mlp,
        }
    });
    2.0 * each.sum::<usize>() as f64
}

#[cfg(test)]
mod tests {
    use model::Preset;
    use types::TpRank;

    use super::*;

    fn north() -> (ModelConfig, Floor) {
        let config = Preset::NorthMiniCode.config().expect("a preset is valid");
        let plan = ShardPlan::new(&config, TpRank::SOLO).expect("one rank holds all");
        let weights = WeightBytes::new(&config, &plan, DType::BF16);
        let floor = Floor::new(&config, &plan, weights, DType::BF16);
        (config, floor)
    }

    #[test]
    fn a_decoded_token_reads_its_experts_and_its_window() {
        let (config, floor) = north();
        let none = floor.decode_bytes(1, 0, 0.0);
        let one = floor.decode_bytes(1, 0, 1.0);
        // gate, up and down of 768 × 2048 in bf16.
        assert_eq!(one - none, 3.0 * 768.0 * 2048.0 * 2.0);
        let all: f64 = floor.weights.total().0 as f64;
        let sparse = config.layers.iter().filter(|layer| layer.mlp == Mlp::Sparse).count();
        assert_eq!(floor.decode_bytes(1, 0, (sparse * 128) as f64), all, "every expert is every weight");
        let within = floor.decode_bytes(1, 101, 0.0) - floor.decode_bytes(1, 100, 0.0);
        let beyond = floor.decode_bytes(1, 9001, 0.0) - floor.decode_bytes(1, 9000, 0.0);
        let [full, sliding] = KvGroup::ALL.map(|group| config.layers_in(group) as f64);
        assert_eq!(within / beyond, (full + sliding) / full, "sliding layers stop growing");
    }

    #[test]
    fn prefill_counts_two_operations_a_weight_and_four_a_pair() {
        let (config, floor) = north();
        let one = floor.prefill_flops(1);
        let active = floor.decode_bytes(0, 0, 0.0) / 2.0;
        // 8 experts of every sparse layer; norms do not multiply matrices.
        let experts = config.layers.iter().filter(|layer| layer.mlp == Mlp::Sparse).count() as f64;
        let weights = active + 8.0 * experts * 3.0 * 768.0 * 2048.0 - floor.weights.norms.0 as f64 / 2.0;
        let pairs = 4.0 * 32.0 * 128.0 * config.layers.len() as f64;
        assert!((one / (2.0 * weights + pairs) - 1.0).abs() < 1e-9, "{one} {weights}");
        assert_eq!(triangle(4, 2), 1.0 + 2.0 + 2.0 + 2.0);
        assert_eq!(triangle(3, 9), 6.0);
    }
}
