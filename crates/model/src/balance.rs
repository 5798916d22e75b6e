//! From counted choices to a placement: copies of the experts that are chosen most, and the largest first to the rank with
//! the least to do.

use std::path::Path;

use ops::conformance::Random;
use serde_json::{Value, json};
use types::{Bytes, TpSize};

use crate::config::{Mlp, ModelConfig};
use crate::error::Error;
use crate::placement::{FILE_BYTES_MAX, Placement};
use crate::strict_json;

/// Choices of the expert that is chosen most in a layer of [`ExpertLoad::zipf`].
const ZIPF_LARGEST: u64 = 1_000_000;
/// Value of the file's `format`.
const FORMAT: &str = "cohort-expert-load-1";

/// How often each expert was chosen, as a group counted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertLoad {
    /// The file, or where else it comes from.
    origin: String,
    /// [layers][experts]; empty for a dense layer.
    chosen: Vec<Vec<u64>>,
}

impl ExpertLoad {
    /// Of these counts by layer and expert, empty for dense layers; `origin` names them in errors.
    #[must_use]
    pub fn new(origin: &str, chosen: Vec<Vec<u64>>) -> Self {
        Self { origin: origin.to_owned(), chosen }
    }

    /// Counts that fall as 1, 1/2, 1/3 … (Zipf's law), which expert has which drawn for each layer from `seed`: a skewed
    /// load for a model that nobody has served yet.
    #[must_use]
    pub fn zipf(config: &ModelConfig, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut layer = |mlp: Mlp| match (mlp, &config.moe) {
            (Mlp::Sparse, Some(moe)) => {
                let places = random.shuffled(moe.experts);
                places.into_iter().map(|place| ZIPF_LARGEST / (place as u64 + 1)).collect()
            }
            (Mlp::Sparse, None) | (Mlp::Dense, _) => Vec::new(),
        };
        Self::new(&format!("zipf:{seed}"), config.layers.iter().map(|of| layer(of.mlp)).collect())
    }

    /// Reads the counts in a file.
    ///
    /// # Errors
    /// When the file cannot be read, or as [`ExpertLoad::from_json`].
    pub fn from_file(file: &Path) -> Result<Self, Error> {
        let origin = file.display().to_string();
        let failed = |source| Error::Io { file: origin.clone(), action: "read", source };
        let found = Bytes(std::fs::metadata(file).map_err(failed)?.len());
        if found > FILE_BYTES_MAX {
            return Err(Error::TooLarge { file: origin, found, max: FILE_BYTES_MAX });
        }
        Self::from_json(&std::fs::read(file).map_err(failed)?, &origin)
    }

    /// Reads counts as [`ExpertLoad::to_json`] writes them.
    ///
    /// # Errors
    /// [`Error::Json`], or [`Error::ExpertLoad`] when it is something else.
    pub fn from_json(bytes: &[u8], origin: &str) -> Result<Self, Error> {
        let map =
            strict_json::object(bytes).map_err(|reason| Error::Json { file: origin.to_owned(), reason })?;
        let wrong = |reason: &str| Error::ExpertLoad { origin: origin.to_owned(), reason: reason.to_owned() };
        if map.get("format").and_then(Value::as_str) != Some(FORMAT) {
            return Err(wrong(&format!("`format` must be \"{FORMAT}\"")));
        }
        let layer = |layer: &Value| layer.as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>();
        let layers = map.get("layers").and_then(Value::as_array);
        let chosen: Option<Vec<Vec<u64>>> = layers.and_then(|layers| layers.iter().map(layer).collect());
        let chosen = chosen.ok_or_else(|| wrong("`layers` must list, for each layer, a list of counts"))?;
        Ok(Self::new(origin, chosen))
    }

    /// As [`ExpertLoad::from_json`] reads it, a line for each layer.
    #[must_use]
    pub fn to_json(&self) -> String {
        let layers: Vec<String> = self.chosen.iter().map(|layer| format!("    {}", json!(layer))).collect();
        format!("{{\n  \"format\": \"{FORMAT}\",\n  \"layers\": [\n{}\n  ]\n}}\n", layers.join(",\n"))
    }

    /// The counts of `layer` by expert; empty for a dense one.
    #[must_use]
    pub fn of(&self, layer: usize) -> &[u64] {
        self.chosen.get(layer).map_or(&[], Vec::as_slice)
    }

    /// Refuses the counts of another model, and counts of nothing.
    fn check(&self, config: &ModelConfig) -> Result<(), Error> {
        let wrong = |reason| Err(Error::ExpertLoad { origin: self.origin.clone(), reason });
        if self.chosen.len() != config.layers.len() {
            let (got, layers) = (self.chosen.len(), config.layers.len());
            return wrong(format!("it counts {got} layers, and the model has {layers}"));
        }
        for (at, (chosen, layer)) in self.chosen.iter().zip(&config.layers).enumerate() {
            let experts = match layer.mlp {
                Mlp::Sparse => config.moe.as_ref().map_or(0, |moe| moe.experts),
                Mlp::Dense => 0,
            };
            if chosen.len() != experts {
                let got = chosen.len();
                return wrong(format!("layer {at} counts {got} experts, and the model has {experts} there"));
            }
        }
        if self.chosen.iter().flatten().all(|count| *count == 0) {
            return wrong("no expert was chosen; serve some requests first".to_owned());
        }
        Ok(())
    }
}

impl Placement {
    /// The experts of `config` in order, on `ranks` ranks.
    ///
    /// # Errors
    /// [`Error::Placement`] when they do not divide by the ranks.
    pub fn in_order(config: &ModelConfig, ranks: TpSize) -> Result<Self, Error> {
        let experts = experts(config, ranks)?;
        let each = experts / ranks.as_usize();
        let held = |rank: usize| (rank * each..(rank + 1) * each).map(|expert| expert as u32).collect();
        let layers = sparse(config, |_| (0..ranks.as_usize()).map(held).collect());
        Self::new(ORIGIN, experts, ranks, &layers)
    }

    /// A placement on `ranks` ranks under which the ranks of every layer have about equally much to do if experts go on
    /// being chosen as `load` counted. Each rank has `replicas` slots more than without copies; they go to copies of the
    /// experts chosen most, each on another rank.
    ///
    /// # Errors
    /// [`Error::Placement`] when the experts do not divide by the ranks or there are more slots than experts on a rank,
    /// [`Error::ExpertLoad`] when `load` is of another model or counts nothing.
    pub fn balanced(
        config: &ModelConfig,
        load: &ExpertLoad,
        ranks: TpSize,
        replicas: usize,
    ) -> Result<Self, Error> {
        let experts = experts(config, ranks)?;
        load.check(config)?;
        let each = experts / ranks.as_usize() + replicas;
        if each > experts {
            let problem = format!(
                "{replicas} replicas on each of {ranks} ranks make {each} slots, more than the {experts} experts"
            );
            return Err(Error::Placement { origin: ORIGIN.to_owned(), problems: vec![problem] });
        }
        let layers = sparse(config, |layer| balance(load.of(layer), ranks.as_usize(), each));
        Self::new(ORIGIN, experts, ranks, &layers)
    }
}

/// Names a placement that comes from no file.
const ORIGIN: &str = "proposal";

/// Experts of a layer, which must divide by the ranks.
fn experts(config: &ModelConfig, ranks: TpSize) -> Result<usize, Error> {
    let experts = config.moe.as_ref().map_or(0, |moe| moe.experts);
    if experts > 0 && experts.is_multiple_of(ranks.as_usize()) {
        return Ok(experts);
    }
    let problem = format!("{experts} routed experts do not divide by {ranks} ranks");
    Err(Error::Placement { origin: ORIGIN.to_owned(), problems: vec![problem] })
}

fn sparse(config: &ModelConfig, of: impl Fn(usize) -> Vec<Vec<u32>>) -> Vec<Option<Vec<Vec<u32>>>> {
    let layers = config.layers.iter().enumerate();
    layers.map(|(at, layer)| (layer.mlp == Mlp::Sparse).then(|| of(at))).collect()
}

/// One layer: the experts of each of `ranks` ranks with `each` slots.
fn balance(chosen: &[u64], ranks: usize, each: usize) -> Vec<Vec<u32>> {
    let copies = copies(chosen, ranks, ranks * each);
    let mut pieces: Vec<(f64, u32)> = Vec::with_capacity(ranks * each);
    for (expert, (&chosen, &copies)) in chosen.iter().zip(&copies).enumerate() {
        pieces.extend(std::iter::repeat_n((chosen as f64 / copies as f64, expert as u32), copies));
    }
    // The largest first; equal ones by number, so that equal loads give equal placements.
    pieces.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut held: Vec<Vec<u32>> = vec![Vec::with_capacity(each); ranks];
    let mut loads = vec![0.0; ranks];
    for (load, expert) in pieces {
        let free = |rank: &usize| held[*rank].len() < each;
        let by_load = |a: &usize, b: &usize| f64::total_cmp(&loads[*a], &loads[*b]).then(a.cmp(b));
        let apart = (0..ranks).filter(free).filter(|rank| !held[*rank].contains(&expert)).min_by(by_load);
        let (rank, placed) = match apart {
            Some(rank) => (rank, expert),
            None => {
                // Only ranks that hold the expert have a slot left: one of them takes another rank's expert instead.
                let Some(rank) = (0..ranks).find(free) else { unreachable!("as many pieces as slots") };
                (rank, swap(&mut held, rank, expert))
            }
        };
        held[rank].push(placed);
        loads[rank] += load;
    }
    for held in &mut held {
        held.sort_unstable();
    }
    held
}

/// Puts `expert` on a rank without it, in the place of an expert that `rank` does not have, and returns that one.
fn swap(held: &mut [Vec<u32>], rank: usize, expert: u32) -> u32 {
    let own = held[rank].clone();
    // Copies are at most as many as ranks, so a rank without this one exists; it is full, and `rank` is not, so it holds
    // something that `rank` does not.
    let others = held.iter_mut().filter(|other| !other.contains(&expert));
    for other in others {
        if let Some(at) = other.iter().position(|of| !own.contains(of)) {
            return std::mem::replace(&mut other[at], expert);
        }
    }
    unreachable!("a full rank without expert {expert} holds one that a rank with a free slot does not")
}

/// Copies of each expert, `slots` in all: one more, again and again, for the expert whose copies have most to do.
fn copies(chosen: &[u64], ranks: usize, slots: usize) -> Vec<usize> {
    let mut copies = vec![1; chosen.len()];
    for _ in chosen.len()..slots {
        let each = |expert: &usize| chosen[*expert] as f64 / copies[*expert] as f64;
        let more = (0..chosen.len()).filter(|expert| copies[*expert] < ranks);
        // The first of equals.
        let most = more.max_by(|a, b| each(a).total_cmp(&each(b)).then(b.cmp(a)));
        let Some(most) = most else { unreachable!("at most as many slots as ranks times experts") };
        copies[most] += 1;
    }
    copies
}
