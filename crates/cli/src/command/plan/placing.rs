//! A placement of the experts proposed from counted choices, and how evenly the ranks share the work before and after.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use model::{ExpertLoad, ModelConfig, Placement};
use serde_json::{Value, json};
use types::ExpertSharding;
use worker::GroupShape;

use super::Args;
use crate::out::say;
use crate::table::{Align, Table};

/// A proposed placement.
pub(super) struct Proposal {
    placement: Arc<Placement>,
    /// Of the placement that was given, or of the experts in order.
    before: Vec<LayerBalance>,
    after: Vec<LayerBalance>,
    replicas: usize,
}

/// How evenly the ranks share one layer's choices.
#[derive(Clone, Copy)]
struct LayerBalance {
    layer: usize,
    /// Choices of the rank with the most.
    max: f64,
    /// Choices of a rank on average.
    mean: f64,
}

impl LayerBalance {
    fn of(placement: &Placement, load: &ExpertLoad, model: &ModelConfig) -> Vec<Self> {
        let layers = (0..model.layers.len()).filter(|layer| placement.slots(*layer).is_some());
        let balance = |layer: usize| {
            let loads = placement.rank_loads(layer, load.of(layer));
            let max = loads.iter().copied().fold(0.0, f64::max);
            Self { layer, max, mean: loads.iter().sum::<f64>() / loads.len().max(1) as f64 }
        };
        layers.map(balance).collect()
    }

    /// 1 when all ranks have equally much to do.
    fn ratio(self) -> f64 {
        if self.mean == 0.0 { 1.0 } else { self.max / self.mean }
    }
}

/// The mean over the layers, and the layer where it is largest.
fn worst_and_mean(layers: &[LayerBalance]) -> Option<(LayerBalance, f64)> {
    let worst = layers.iter().copied().max_by(|a, b| a.ratio().total_cmp(&b.ratio()))?;
    let mean = layers.iter().map(|layer| layer.ratio()).sum::<f64>() / layers.len() as f64;
    Some((worst, mean))
}

/// Works the proposal out when one was asked for, and puts it into the group's shape.
pub(super) fn propose(
    args: &Args,
    shape: &mut GroupShape,
    model: &ModelConfig,
) -> anyhow::Result<Option<Proposal>> {
    let Some(file) = &args.expert_load else { return Ok(None) };
    if shape.experts == ExpertSharding::Tensor {
        bail!("--expert-load places whole experts, and they are shared out by width; add --experts expert");
    }
    let load = match file.strip_prefix("zipf:").map(str::parse) {
        Some(Ok(seed)) => ExpertLoad::zipf(model, seed),
        Some(Err(error)) => bail!("--expert-load {file}: the seed must be a number: {error}"),
        None => ExpertLoad::from_file(Path::new(file))?,
    };
    let ranks = shape.ranks()?;
    let placement = Arc::new(Placement::balanced(model, &load, ranks, args.expert_replicas)?);
    let before = match &shape.placement {
        Some(given) => Arc::clone(given),
        None => Arc::new(Placement::in_order(model, ranks)?),
    };
    let [before, after] = [&before, &placement].map(|of| LayerBalance::of(of, &load, model));
    shape.placement = Some(Arc::clone(&placement));
    Ok(Some(Proposal { placement, before, after, replicas: args.expert_replicas }))
}

impl Proposal {
    pub(super) fn as_json(&self) -> Value {
        let layers = self.before.iter().zip(&self.after).map(|(before, after)| {
            json!({
                "layer": before.layer,
                "mean": before.mean,
                "max_before": before.max,
                "max_after": after.max,
            })
        });
        let summary = |layers: &[LayerBalance]| {
            worst_and_mean(layers).map(|(worst, mean)| {
                json!({ "max_over_mean": mean, "worst_layer": worst.layer, "worst_max_over_mean": worst.ratio() })
            })
        };
        json!({
            "ranks": self.placement.ranks(),
            "experts_per_rank": self.placement.slots_each(),
            "replicas_per_rank": self.replicas,
            "before": summary(&self.before),
            "after": summary(&self.after),
            "layers": layers.collect::<Vec<_>>(),
        })
    }

    pub(super) fn show(&self) {
        let (ranks, each) = (self.placement.ranks(), self.placement.slots_each());
        say!("\nExpert placement on {ranks} ranks, {each} experts on each, {} of them copies", self.replicas);
        let mut table = Table::new([Align::Left, Align::Right, Align::Right]);
        table.row(["rank load, max / mean".into(), "before".into(), "after".into()]);
        let both = worst_and_mean(&self.before).zip(worst_and_mean(&self.after));
        if let Some(((worst_before, mean_before), (worst_after, mean_after))) = both {
            let ratio = |value: f64| format!("{value:.3}");
            table.row(["mean over the layers".into(), ratio(mean_before), ratio(mean_after)]);
            let worst = |of: LayerBalance| format!("{:.3} (layer {})", of.ratio(), of.layer);
            table.row(["worst layer".into(), worst(worst_before), worst(worst_after)]);
        }
        table.lines().for_each(|line| say!("{line}"));
    }

    pub(super) fn write(&self, file: &Path) -> anyhow::Result<()> {
        std::fs::write(file, self.placement.to_json())
            .with_context(|| format!("--placement-out {}", file.display()))
    }
}
