//! What a rank says to others in one step, worked out beforehand. What a run counts is the same, number by number.

use collectives::{Counters, Op, Tcp, Traffic};
use types::{Dispatch, TpRank};

use crate::cohere_moe::LOGIT_ROWS_MAX;
use crate::config::{Mlp, ModelConfig};
use crate::shard::ShardPlan;

/// The rows of one step of one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepRows {
    /// Of its sub-group.
    pub rows: usize,
    /// Those of them that have logits.
    pub logit_rows: usize,
    /// Rows it sends to the experts of other ranks in all layers together, under all-to-all dispatch.
    pub sent: usize,
    /// Rows that come from other ranks for its experts, likewise.
    pub received: usize,
}

/// Collectives of a step over TCP. All-to-alls go by the routers' choices, which `step` tells.
#[must_use]
pub fn step_traffic(config: &ModelConfig, plan: &ShardPlan, dispatch: Dispatch, step: &StepRows) -> Counters {
    let mut by_op = [Traffic::default(); Op::ALL.len()];
    if step.rows > 0 {
        by_op[Op::AllReduce as usize] = all_reduces(config, plan.rank, step.rows);
        by_op[Op::AllGather as usize] = all_gathers(plan, step.logit_rows);
    }
    if dispatch == Dispatch::AllToAll {
        by_op[Op::AllToAll as usize] = all_to_alls(config, plan.whole, step);
    }
    Counters::new(by_op)
}

/// One for the embedding and one in each layer.
fn all_reduces(config: &ModelConfig, rank: TpRank, rows: usize) -> Traffic {
    let ops = config.layers.len() + 1;
    let elements = rows * config.hidden_size;
    let moved = bytes(ops * Tcp::all_reduce_sends(rank, elements));
    let messages_sent = (ops * Tcp::all_reduce_messages(rank, elements)) as u64;
    Traffic { ops: ops as u64, messages_sent, bytes_sent: moved, bytes_received: moved }
}

/// One for every [`LOGIT_ROWS_MAX`] rows with logits.
fn all_gathers(plan: &ShardPlan, logit_rows: usize) -> Traffic {
    let others = plan.rank.size().as_usize() - 1;
    if others == 0 {
        return Traffic::default();
    }
    let ops = logit_rows.div_ceil(LOGIT_ROWS_MAX);
    let moved = bytes(logit_rows * plan.vocab_rows * others);
    Traffic {
        ops: ops as u64,
        messages_sent: (ops * others) as u64,
        bytes_sent: moved,
        bytes_received: moved,
    }
}

/// Two in each sparse layer: rows there with their choices, and results back.
fn all_to_alls(config: &ModelConfig, whole: TpRank, step: &StepRows) -> Traffic {
    let ops = 2 * config.sparse_layers();
    let hidden = config.hidden_size;
    let width = hidden + 2 * config.moe.map_or(0, |moe| moe.routing.top_k);
    Traffic {
        ops: ops as u64,
        messages_sent: (ops * (whole.size().as_usize() - 1)) as u64,
        bytes_sent: bytes(step.sent * width + step.received * hidden),
        bytes_received: bytes(step.received * width + step.sent * hidden),
    }
}

fn bytes(elements: usize) -> u64 {
    (elements * size_of::<f32>()) as u64
}

impl ModelConfig {
    /// Layers with routed experts.
    #[must_use]
    pub fn sparse_layers(&self) -> usize {
        self.layers.iter().filter(|layer| layer.mlp == Mlp::Sparse).count()
    }
}
