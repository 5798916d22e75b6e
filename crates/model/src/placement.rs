//! Which experts each rank holds, when they are not dealt out in order: a file says so, and a measured load proposes it.
//!
//! Every rank has equally many slots in every layer; a hot expert may be in the slots of several ranks.

use std::ops::Range;
use std::path::Path;

use ops::ExpertSlots;
use serde_json::{Value, json};
use types::limits::RANKS_MAX;
use types::{Bytes, ExpertSharding, TpRank, TpSize};

use crate::config::{Mlp, ModelConfig};
use crate::error::Error;
use crate::strict_json;

/// Experts a layer may have; as many as fp32 numbers exactly, which is how they travel.
const EXPERTS_MAX: u64 = 1 << 24;
/// Size of a placement file: far above a thousand layers of a thousand experts.
pub(crate) const FILE_BYTES_MAX: Bytes = Bytes(64 << 20);
/// Value of the file's `format`.
const FORMAT: &str = "cohort-expert-placement-1";

/// Which experts are in the slots of each rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The file, or where else it comes from.
    origin: String,
    /// Experts of a sparse layer.
    experts: usize,
    ranks: usize,
    /// Experts that a rank holds of each sparse layer.
    slots_each: usize,
    /// By layer; `None` for a dense one.
    layers: Vec<Option<LayerPlacement>>,
}

/// One sparse layer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LayerPlacement {
    /// [ranks · slots_each]: the expert in each slot, rank by rank.
    held: Vec<u32>,
    slots: ExpertSlots,
}

impl Placement {
    /// Builds a placement of `experts` experts on `ranks` ranks from the experts each rank holds in each layer; `None`
    /// for dense layers.
    ///
    /// # Errors
    /// [`Error::Placement`] with everything that is wrong: experts that are unknown, left out or twice on a rank, and
    /// ranks that hold more than others.
    pub fn new(
        origin: &str,
        experts: usize,
        ranks: TpSize,
        layers: &[Option<Vec<Vec<u32>>>],
    ) -> Result<Self, Error> {
        let ranks = ranks.as_usize();
        let mut problems = Vec::new();
        let first = layers.iter().flatten().find_map(|held| held.first());
        let slots_each = first.map_or(0, Vec::len);
        let mut built = Vec::with_capacity(layers.len());
        for (layer, held) in layers.iter().enumerate() {
            let Some(held) = held else {
                built.push(None);
                continue;
            };
            let before = problems.len();
            if held.len() != ranks {
                problems.push(format!("layer {layer} lists {} ranks, not {ranks}", held.len()));
            }
            let sizes = held.iter().enumerate().find(|(_, held)| held.len() != slots_each);
            if let Some((rank, held)) = sizes {
                let got = held.len();
                problems.push(format!("layer {layer}: rank {rank} holds {got} experts, others {slots_each}"));
            }
            problems.extend(held.iter().enumerate().filter_map(|(rank, held)| {
                let twice = (1..held.len()).find(|at| held[..*at].contains(&held[*at]))?;
                Some(format!("layer {layer}: rank {rank} holds expert {} twice", held[twice]))
            }));
            let all = held.concat();
            match ExpertSlots::new(experts, &all) {
                Ok(slots) if problems.len() == before => {
                    built.push(Some(LayerPlacement { held: all, slots }))
                }
                Ok(_) => {}
                Err(ops::Error::Shape { detail, .. }) => problems.push(format!("layer {layer}: {detail}")),
                Err(other) => problems.push(format!("layer {layer}: {other}")),
            }
        }
        if !problems.is_empty() {
            return Err(Error::Placement { origin: origin.to_owned(), problems });
        }
        Ok(Self { origin: origin.to_owned(), experts, ranks, slots_each, layers: built })
    }

    /// Reads the placement in a file.
    ///
    /// # Errors
    /// When the file cannot be read, or as [`Placement::from_json`].
    pub fn from_file(file: &Path) -> Result<Self, Error> {
        let origin = file.display().to_string();
        let failed = |source| Error::Io { file: origin.clone(), action: "read", source };
        let found = Bytes(std::fs::metadata(file).map_err(failed)?.len());
        if found > FILE_BYTES_MAX {
            return Err(Error::TooLarge { file: origin, found, max: FILE_BYTES_MAX });
        }
        Self::from_json(&std::fs::read(file).map_err(failed)?, &origin)
    }

    /// Reads a placement as [`Placement::to_json`] writes it; `origin` names it in errors.
    ///
    /// # Errors
    /// [`Error::Json`], or as [`Placement::new`].
    pub fn from_json(bytes: &[u8], origin: &str) -> Result<Self, Error> {
        let map =
            strict_json::object(bytes).map_err(|reason| Error::Json { file: origin.to_owned(), reason })?;
        let wrong = |problem: String| Error::Placement { origin: origin.to_owned(), problems: vec![problem] };
        if map.get("format").and_then(Value::as_str) != Some(FORMAT) {
            return Err(wrong(format!("`format` must be \"{FORMAT}\"")));
        }
        if let Some(unknown) =
            map.keys().find(|key| !["format", "experts", "ranks", "layers"].contains(&key.as_str()))
        {
            return Err(wrong(format!("unknown key `{unknown}`; it has format, experts, ranks and layers")));
        }
        let number = |name: &str, most: u64| {
            let found = map.get(name).and_then(Value::as_u64).filter(|found| (1..=most).contains(found));
            found.ok_or_else(|| wrong(format!("`{name}` must be a number from 1 to {most}")))
        };
        let experts = number("experts", EXPERTS_MAX)? as usize;
        let ranks = number("ranks", RANKS_MAX.into())? as u32;
        let Ok(ranks) = TpSize::new(ranks) else { unreachable!("{ranks} is within RANKS_MAX") };
        let layers = map.get("layers").and_then(Value::as_array).and_then(|layers| {
            layers
                .iter()
                .map(|layer| if layer.is_null() { Some(None) } else { lists(layer).map(Some) })
                .collect()
        });
        let layers: Option<Vec<Option<Vec<Vec<u32>>>>> = layers;
        let layers = layers.ok_or_else(|| {
            wrong(
                "`layers` must list, for each layer, null or a list of expert numbers for each rank"
                    .to_owned(),
            )
        })?;
        Self::new(origin, experts, ranks, &layers)
    }

    /// As [`Placement::from_json`] reads it, a line for each layer.
    #[must_use]
    pub fn to_json(&self) -> String {
        let layer = |layer: &Option<LayerPlacement>| match layer {
            None => Value::Null,
            Some(layer) => json!(layer.held.chunks(self.slots_each).collect::<Vec<_>>()),
        };
        let layers: Vec<String> = self.layers.iter().map(|of| format!("    {}", layer(of))).collect();
        let Self { experts, ranks, .. } = self;
        let layers = layers.join(",\n");
        format!(
            "{{\n  \"format\": \"{FORMAT}\",\n  \"experts\": {experts},\n  \"ranks\": {ranks},\n  \"layers\": [\n{layers}\n  ]\n}}\n"
        )
    }

    /// Whether it is one of this model on a group of `ranks` ranks.
    pub(crate) fn check(
        &self,
        config: &ModelConfig,
        ranks: TpSize,
        experts: ExpertSharding,
    ) -> Result<(), Error> {
        let mut problems = Vec::new();
        let of_model = config.moe.as_ref().map_or(0, |moe| moe.experts);
        if experts == ExpertSharding::Tensor {
            problems.push(
                "it places whole experts, and experts are shared out by width (--experts expert)".into(),
            );
        }
        for (what, ours, model) in [
            ("experts", self.experts, of_model),
            ("ranks", self.ranks, ranks.as_usize()),
            ("layers", self.layers.len(), config.layers.len()),
        ] {
            if ours != model {
                problems.push(format!("it is for {ours} {what}, not {model}"));
            }
        }
        for (at, (ours, layer)) in self.layers.iter().zip(&config.layers).enumerate() {
            match (ours.is_some(), layer.mlp) {
                (true, Mlp::Dense) => {
                    problems.push(format!("layer {at} is dense and has no experts to place"))
                }
                (false, Mlp::Sparse) => problems.push(format!("layer {at} has experts that are not placed")),
                (true, Mlp::Sparse) | (false, Mlp::Dense) => {}
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Error::Placement { origin: self.origin.clone(), problems })
        }
    }

    /// The slots of `rank`.
    pub(crate) fn slots_of(&self, rank: TpRank) -> Range<usize> {
        rank.as_usize() * self.slots_each..(rank.as_usize() + 1) * self.slots_each
    }

    /// The expert in `slot` of `layer`.
    pub(crate) fn expert(&self, layer: usize, slot: usize) -> Option<usize> {
        let held = self.layers.get(layer)?.as_ref()?.held.get(slot)?;
        Some(*held as usize)
    }

    /// Where the copies of each expert of `layer` are; `None` for a dense layer.
    #[must_use]
    pub fn slots(&self, layer: usize) -> Option<&ExpertSlots> {
        self.layers.get(layer)?.as_ref().map(|layer| &layer.slots)
    }

    /// Experts that a rank holds of each sparse layer.
    #[must_use]
    pub const fn slots_each(&self) -> usize {
        self.slots_each
    }

    /// Ranks it is for.
    #[must_use]
    pub const fn ranks(&self) -> usize {
        self.ranks
    }

    /// How many choices of `layer` each rank would work for if each expert were chosen `chosen[e]` times and its copies
    /// took equal parts.
    #[must_use]
    pub fn rank_loads(&self, layer: usize, chosen: &[u64]) -> Vec<f64> {
        let mut loads = vec![0.0; self.ranks];
        let Some(layer) = self.layers.get(layer).and_then(Option::as_ref) else { return loads };
        for (slot, &expert) in layer.held.iter().enumerate() {
            let copies = layer.slots.copies(expert as usize).len();
            let chosen = chosen.get(expert as usize).copied().unwrap_or(0);
            loads[slot / self.slots_each] += chosen as f64 / copies as f64;
        }
        loads
    }
}

/// A list of lists of expert numbers.
fn lists(value: &Value) -> Option<Vec<Vec<u32>>> {
    let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
    let list = |value: &Value| value.as_array()?.iter().map(number).collect::<Option<Vec<u32>>>();
    value.as_array()?.iter().map(list).collect()
}
