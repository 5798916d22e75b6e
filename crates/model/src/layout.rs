//! The resident weights of a rank in the order they are loaded, and their shapes. Loading and the memory sums both
//! read this list, so they cannot disagree.

use std::fmt;

use crate::config::{Mlp, ModelConfig};
use crate::shard::ShardPlan;

/// One resident weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    Embed,
    Head,
    FinalNorm,
    Layer(usize, Part),
}

/// One resident weight of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Norm,
    Qkv,
    O,
    DenseGateUp,
    DenseDown,
    Router,
    ExpertsGateUp,
    ExpertsDown,
    SharedGateUp,
    SharedDown,
}

/// All slots of a model, first to last.
pub(crate) fn slots(config: &ModelConfig) -> Vec<Slot> {
    let mut slots = vec![Slot::Embed];
    if !config.tied_head {
        slots.push(Slot::Head);
    }
    slots.push(Slot::FinalNorm);
    let shared = config.moe.is_some_and(|moe| moe.shared.is_some());
    for (at, layer) in config.layers.iter().enumerate() {
        let mlp: &[Part] = match (layer.mlp, shared) {
            (Mlp::Dense, _) => &[Part::DenseGateUp, Part::DenseDown],
            (Mlp::Sparse, false) => &[Part::Router, Part::ExpertsGateUp, Part::ExpertsDown],
            (Mlp::Sparse, true) => {
                &[Part::Router, Part::ExpertsGateUp, Part::ExpertsDown, Part::SharedGateUp, Part::SharedDown]
            }
        };
        let parts = [Part::Norm, Part::Qkv, Part::O].iter().chain(mlp);
        slots.extend(parts.map(|part| Slot::Layer(at, *part)));
    }
    slots
}

impl Slot {
    /// Its shape on the plan's rank.
    pub(crate) fn shape(self, config: &ModelConfig, plan: &ShardPlan) -> Vec<usize> {
        let hidden = config.hidden_size;
        match self {
            Self::Embed | Self::Head => vec![plan.vocab_rows, hidden],
            Self::FinalNorm => vec![hidden],
            Self::Layer(_, part) => part.shape(config, plan),
        }
    }
}

impl Part {
    fn shape(self, config: &ModelConfig, plan: &ShardPlan) -> Vec<usize> {
        let hidden = config.hidden_size;
        let width = |range: &Option<std::ops::Range<usize>>| range.as_ref().map_or(0, ExactSizeIterator::len);
        let (experts, expert_width) =
            plan.experts.as_ref().map_or((0, 0), |shard| (shard.experts.len(), shard.width.len()));
        match self {
            Self::Norm => vec![hidden],
            Self::Qkv => vec![(plan.query_heads.len() + 2 * plan.kv_heads.len()) * config.head_dim, hidden],
            Self::O => vec![hidden, plan.query_heads.len() * config.head_dim],
            Self::DenseGateUp => vec![2 * width(&plan.dense), hidden],
            Self::DenseDown => vec![hidden, width(&plan.dense)],
            Self::Router => vec![config.moe.map_or(0, |moe| moe.experts), hidden],
            Self::ExpertsGateUp => vec![experts, 2 * expert_width, hidden],
            Self::ExpertsDown => vec![experts, hidden, expert_width],
            Self::SharedGateUp => vec![2 * width(&plan.shared), hidden],
            Self::SharedDown => vec![hidden, width(&plan.shared)],
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::Qkv => "qkv",
            Self::O => "o",
            Self::DenseGateUp => "dense gate_up",
            Self::DenseDown => "dense down",
            Self::Router => "router",
            Self::ExpertsGateUp => "experts gate_up",
            Self::ExpertsDown => "experts down",
            Self::SharedGateUp => "shared gate_up",
            Self::SharedDown => "shared down",
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embed => f.write_str("embedding"),
            Self::Head => f.write_str("head"),
            Self::FinalNorm => f.write_str("final norm"),
            Self::Layer(layer, part) => write!(f, "layer {layer} {}", part.name()),
        }
    }
}
