//! The tensors a configuration asks for, matched against the ones a checkpoint has.

use std::collections::BTreeMap;

use types::Bytes;

use crate::checkpoint::{Checkpoint, TensorEntry, stored_bytes};
use crate::config::{Mlp, ModelConfig, MoeConfig};
use crate::error::{Error, TensorProblem};

/// Where the language model lies in a checkpoint: on its own, or inside a vision model.
const PREFIXES: [&str; 2] = ["model.", "model.language_model."];
/// Parts of a vision model that serving text does not need.
const VISION: [&str; 4] =
    ["model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector."];
/// The head of a model that does not use its embedding for it.
pub(crate) const HEAD: &str = "lm_head.weight";
/// Frequencies some tools store; they follow from the configuration.
const INV_FREQ: &str = "rotary_emb.inv_freq";
const WEIGHT: &str = ".weight";
const BIAS: &str = ".bias";

/// A checkpoint that holds what the configuration asks for, and under which names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalogue {
    names: Names,
    /// Biases the model does not have; they must be zero.
    biases: Vec<String>,
    /// Vision tensors left unread.
    pub skipped_tensors: usize,
    /// Their size.
    pub skipped_bytes: Bytes,
}

impl Catalogue {
    /// Matches a checkpoint against a configuration; reads no weights.
    ///
    /// # Errors
    /// [`Error::Tensors`] with every tensor that is missing, unknown, or has another shape or an unread type.
    pub fn resolve(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self, Error> {
        let place = checkpoint.files().place();
        let names = match Names::find(checkpoint, config) {
            Ok(names) => names,
            Err(problem) => return Err(Error::Tensors { place, problems: vec![problem] }),
        };
        let expected = names.expected(config);
        let mut found = Self { names, biases: Vec::new(), skipped_tensors: 0, skipped_bytes: Bytes(0) };
        let mut problems: Vec<TensorProblem> = expected
            .iter()
            .filter(|(name, _)| checkpoint.entry(name).is_none())
            .map(|(name, shape)| TensorProblem::Missing { name: name.clone(), shape: shape.clone() })
            .collect();
        let entries = checkpoint.names().filter_map(|name| checkpoint.entry(name));
        problems.extend(entries.filter_map(|entry| found.sort(entry, &expected, config)));
        if !problems.is_empty() {
            return Err(Error::Tensors { place, problems });
        }
        if found.skipped_tensors > 0 {
            let (tensors, bytes) = (found.skipped_tensors, found.skipped_bytes);
            tracing::info!("{place}: text only, skipping {tensors} vision tensors ({bytes})");
        }
        Ok(found)
    }

    /// The names published checkpoints of `config` use, with no checkpoint at hand.
    pub(crate) fn published(config: &ModelConfig) -> Self {
        let form = ExpertForm { gate_up_fused: false, down_fused: false };
        let names = Names { prefix: PREFIXES[0], experts: vec![form; config.layers.len()] };
        Self { names, biases: Vec::new(), skipped_tensors: 0, skipped_bytes: Bytes(0) }
    }

    /// Names of the tensors that are read.
    pub(crate) const fn names(&self) -> &Names {
        &self.names
    }

    /// Biases the model does not have; they must be zero.
    pub(crate) fn biases(&self) -> &[String] {
        &self.biases
    }

    /// Decides what a tensor of the checkpoint is to this model, or what is wrong with it.
    fn sort(
        &mut self,
        entry: &TensorEntry,
        expected: &BTreeMap<String, Vec<usize>>,
        config: &ModelConfig,
    ) -> Option<TensorProblem> {
        let name = entry.name.as_str();
        if let Some(shape) = expected.get(name) {
            return check(entry, shape);
        }
        if VISION.iter().any(|vision| name.starts_with(vision)) {
            self.skipped_tensors += 1;
            self.skipped_bytes += Bytes(entry.bytes);
            return None;
        }
        if name.ends_with(INV_FREQ) || (config.tied_head && name == HEAD) {
            return None;
        }
        let module = name.strip_suffix(BIAS).map(|module| format!("{module}{WEIGHT}"));
        let outputs = module.and_then(|weight| match expected.get(&weight) {
            Some(shape) => shape.first().copied(),
            None => (weight == HEAD).then_some(config.vocab_size),
        });
        let Some(outputs) = outputs else {
            return Some(TensorProblem::Unknown { name: name.to_owned(), shape: entry.shape.clone() });
        };
        self.biases.push(name.to_owned());
        check(entry, &[outputs])
    }
}

fn check(entry: &TensorEntry, expected: &[usize]) -> Option<TensorProblem> {
    let name = entry.name.clone();
    if entry.shape != expected {
        return Some(TensorProblem::Shape { name, expected: expected.to_vec(), found: entry.shape.clone() });
    }
    stored_bytes(entry.dtype).is_none().then_some(TensorProblem::Dtype { name, found: entry.dtype })
}

/// How the tensors of one checkpoint are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    prefix: &'static str,
    /// By layer; of dense layers without effect.
    experts: Vec<ExpertForm>,
}

/// Which of a layer's expert matrices are one tensor for all experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExpertForm {
    pub(crate) gate_up_fused: bool,
    pub(crate) down_fused: bool,
}

impl Names {
    fn find(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self, TensorProblem> {
        let embedding = |prefix: &str| format!("{prefix}embed_tokens.weight");
        let present = PREFIXES.map(|prefix| checkpoint.entry(&embedding(prefix)).is_some());
        let prefix = match present {
            [true, false] => PREFIXES[0],
            [false, true] => PREFIXES[1],
            [true, true] => {
                let [first, second] = PREFIXES.map(embedding);
                return Err(TensorProblem::TwoPrefixes { first, second });
            }
            [false, false] => {
                let name = format!("{} (or {})", embedding(PREFIXES[0]), embedding(PREFIXES[1]));
                return Err(TensorProblem::Missing {
                    name,
                    shape: vec![config.vocab_size, config.hidden_size],
                });
            }
        };
        let mut names = Self { prefix, experts: Vec::new() };
        let has = |name: String| checkpoint.entry(&name).is_some();
        names.experts = (0..config.layers.len())
            .map(|layer| ExpertForm {
                gate_up_fused: has(names.fused_gate_up(layer)),
                down_fused: has(names.fused_down(layer)),
            })
            .collect();
        Ok(names)
    }

    pub(crate) fn embed(&self) -> String {
        format!("{}embed_tokens.weight", self.prefix)
    }

    pub(crate) fn final_norm(&self) -> String {
        format!("{}norm.weight", self.prefix)
    }

    /// The weight of a layer's module, for example `self_attn.q_proj`.
    pub(crate) fn layer(&self, layer: usize, module: &str) -> String {
        format!("{}layers.{layer}.{module}.weight", self.prefix)
    }

    /// One matrix of one expert: `gate`, `up` or `down`.
    pub(crate) fn expert(&self, layer: usize, expert: usize, matrix: &str) -> String {
        self.layer(layer, &format!("mlp.experts.{expert}.{matrix}_proj"))
    }

    pub(crate) fn fused_gate_up(&self, layer: usize) -> String {
        format!("{}layers.{layer}.mlp.experts.gate_up_proj", self.prefix)
    }

    pub(crate) fn fused_down(&self, layer: usize) -> String {
        format!("{}layers.{layer}.mlp.experts.down_proj", self.prefix)
    }

    /// How a layer's experts are stored.
    pub(crate) fn form(&self, layer: usize) -> ExpertForm {
        self.experts[layer]
    }

    /// Every tensor the configuration asks for, with its shape.
    pub(crate) fn expected(&self, config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
        let hidden = config.hidden_size;
        let table = vec![config.vocab_size, hidden];
        let mut all = BTreeMap::from([(self.embed(), table.clone()), (self.final_norm(), vec![hidden])]);
        if !config.tied_head {
            all.insert(HEAD.to_owned(), table);
        }
        let query = config.query_heads * config.head_dim;
        let kv = config.kv_heads * config.head_dim;
        for (at, layer) in config.layers.iter().enumerate() {
            all.insert(self.layer(at, "input_layernorm"), vec![hidden]);
            for (module, shape) in [
                ("self_attn.q_proj", vec![query, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, query]),
            ] {
                all.insert(self.layer(at, module), shape);
            }
            match (layer.mlp, config.dense_intermediate_size, config.moe) {
                (Mlp::Dense, Some(width), _) => self.gated_mlp(&mut all, at, "mlp", [width, hidden]),
                (Mlp::Sparse, _, Some(moe)) => self.sparse(&mut all, at, &moe, hidden),
                (Mlp::Dense, None, _) | (Mlp::Sparse, _, None) => {
                    unreachable!("a configuration has the widths of its layers")
                }
            }
        }
        all
    }

    fn gated_mlp(
        &self,
        all: &mut BTreeMap<String, Vec<usize>>,
        layer: usize,
        module: &str,
        [width, hidden]: [usize; 2],
    ) {
        for matrix in ["gate", "up"] {
            all.insert(self.layer(layer, &format!("{module}.{matrix}_proj")), vec![width, hidden]);
        }
        all.insert(self.layer(layer, &format!("{module}.down_proj")), vec![hidden, width]);
    }

    fn sparse(&self, all: &mut BTreeMap<String, Vec<usize>>, layer: usize, moe: &MoeConfig, hidden: usize) {
        let width = moe.intermediate_size;
        all.insert(self.layer(layer, "mlp.gate"), vec![moe.experts, hidden]);
        if let Some(shared) = moe.shared {
            self.gated_mlp(all, layer, "mlp.shared_experts", [shared.intermediate_size, hidden]);
        }
        let form = self.form(layer);
        if form.gate_up_fused {
            all.insert(self.fused_gate_up(layer), vec![moe.experts, 2 * width, hidden]);
        }
        if form.down_fused {
            all.insert(self.fused_down(layer), vec![moe.experts, hidden, width]);
        }
        for expert in 0..moe.experts {
            if !form.gate_up_fused {
                all.insert(self.expert(layer, expert, "gate"), vec![width, hidden]);
                all.insert(self.expert(layer, expert, "up"), vec![width, hidden]);
            }
            if !form.down_fused {
                all.insert(self.expert(layer, expert, "down"), vec![hidden, width]);
            }
        }
    }
}
