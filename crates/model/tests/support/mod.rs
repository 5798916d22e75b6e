//! Small random models in every form a checkpoint may have, and a backend that keeps what it is given.
#![allow(dead_code, unused_imports, reason = "every test file uses another part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod recorder;

pub(crate) use recorder::{Recorder, flat, weights_of};

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use model::{Checkpoint, Files, Mlp, ModelConfig};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;
use types::{TpRank, TpSize};

/// SplitMix64: tests that draw say their seed when they fail.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In -1..1, exact in bf16 and f16, so that no storage type changes it.
    pub(crate) fn weight(&mut self) -> f32 {
        (self.below(255) as f32 - 127.0) / 128.0
    }
}

/// A small `config.json`: a dense layer, three sparse ones, a shared expert.
pub(crate) fn config_json() -> Value {
    json!({
        "model_type": "cohere2_moe",
        "hidden_size": 16,
        "vocab_size": 37,
        "max_position_embeddings": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-6,
        "layer_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "logit_scale": 0.5,
        "tie_word_embeddings": true,
        "eos_token_id": 6,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "first_k_dense_replace": 1,
        "prefix_dense_intermediate_size": 12,
        "prefix_dense_sliding_window_pattern": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 8,
        "num_shared_experts": 1,
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "sigmoid",
        "norm_topk_prob": true
    })
}

/// `value` with some fields replaced; null fields are removed.
pub(crate) fn with(mut value: Value, changes: &Value) -> Value {
    for (name, change) in changes.as_object().unwrap() {
        if change.is_null() {
            value.as_object_mut().unwrap().remove(name);
        } else {
            value[name] = change.clone();
        }
    }
    value
}

pub(crate) fn parse(config: &Value) -> Result<ModelConfig, model::Error> {
    ModelConfig::from_json(config.to_string().as_bytes(), "config.json", None)
}

pub(crate) fn rank(index: u32, size: u32) -> TpRank {
    TpRank::new(index, TpSize::new(size).unwrap()).unwrap()
}

/// Shape and elements.
pub(crate) type Tensor = (Vec<usize>, Vec<f32>);
/// By name.
pub(crate) type Tensors = BTreeMap<String, Tensor>;

/// The tensors of a model as published: prefix `model.`, one tensor per expert matrix.
pub(crate) fn random_tensors(config: &ModelConfig, seed: u64) -> Tensors {
    let mut rng = Rng(seed);
    let mut tensors = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let count = shape.iter().product();
        tensors.insert(name, (shape.to_vec(), (0..count).map(|_| rng.weight()).collect()));
    };
    let hidden = config.hidden_size;
    let (query, kv) = (config.query_heads * config.head_dim, config.kv_heads * config.head_dim);
    add("model.embed_tokens.weight".into(), &[config.vocab_size, hidden]);
    add("model.norm.weight".into(), &[hidden]);
    if !config.tied_head {
        add("lm_head.weight".into(), &[config.vocab_size, hidden]);
    }
    for (at, layer) in config.layers.iter().enumerate() {
        let name = |module: &str| format!("model.layers.{at}.{module}.weight");
        add(name("input_layernorm"), &[hidden]);
        add(name("self_attn.q_proj"), &[query, hidden]);
        add(name("self_attn.k_proj"), &[kv, hidden]);
        add(name("self_attn.v_proj"), &[kv, hidden]);
        add(name("self_attn.o_proj"), &[hidden, query]);
        let mut gated = |module: &str, width: usize| {
            add(name(&format!("{module}.gate_proj")), &[width, hidden]);
            add(name(&format!("{module}.up_proj")), &[width, hidden]);
            add(name(&format!("{module}.down_proj")), &[hidden, width]);
        };
        if layer.mlp == Mlp::Dense {
            gated("mlp", config.dense_intermediate_size.unwrap());
            continue;
        }
        let moe = config.moe.unwrap();
        if let Some(shared) = moe.shared {
            gated("mlp.shared_experts", shared.intermediate_size);
        }
        for expert in 0..moe.experts {
            gated(&format!("mlp.experts.{expert}"), moe.intermediate_size);
        }
        add(name("mlp.gate"), &[moe.experts, hidden]);
    }
    tensors
}

/// The same model with each layer's experts in two stacked tensors, gate rows before up rows.
pub(crate) fn fused(tensors: &Tensors, config: &ModelConfig) -> Tensors {
    let mut out = tensors.clone();
    for at in (0..config.layers.len()).filter(|at| config.layers[*at].mlp == Mlp::Sparse) {
        let moe = config.moe.unwrap();
        let (width, hidden) = (moe.intermediate_size, config.hidden_size);
        let stem = format!("model.layers.{at}.mlp.experts");
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for expert in 0..moe.experts {
            let mut take =
                |matrix: &str| out.remove(&format!("{stem}.{expert}.{matrix}_proj.weight")).unwrap().1;
            gate_up.extend(take("gate"));
            gate_up.extend(take("up"));
            down.extend(take("down"));
        }
        out.insert(format!("{stem}.gate_up_proj"), (vec![moe.experts, 2 * width, hidden], gate_up));
        out.insert(format!("{stem}.down_proj"), (vec![moe.experts, hidden, width], down));
    }
    out
}

/// The same model inside a vision model.
pub(crate) fn inside_vision(tensors: &Tensors) -> Tensors {
    let moved = tensors
        .iter()
        .map(|(name, tensor)| (name.replacen("model.", "model.language_model.", 1), tensor.clone()));
    moved.collect()
}

/// Content of a safetensors file holding `tensors` as `dtype` (F32, BF16 or F16).
pub(crate) fn serialized(tensors: &Tensors, dtype: Dtype) -> Vec<u8> {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|v| encode(*v, dtype)).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(dtype, (*shape).clone(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn encode(value: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

/// A directory with one weight file.
pub(crate) fn directory(tensors: &Tensors, dtype: Dtype) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("model.safetensors"), serialized(tensors, dtype)).unwrap();
    directory
}

/// A directory with the tensors dealt out to three shards, and their index.
pub(crate) fn sharded_directory(tensors: &Tensors) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut shards = vec![Tensors::new(); 3];
    let mut map = serde_json::Map::new();
    for (at, (name, tensor)) in tensors.iter().enumerate() {
        shards[at % 3].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), json!(shard_name(at % 3)));
    }
    for (at, shard) in shards.iter().enumerate() {
        fs::write(directory.path().join(shard_name(at)), serialized(shard, Dtype::F32)).unwrap();
    }
    write_index(directory.path(), &json!({ "metadata": {}, "weight_map": map }));
    directory
}

pub(crate) fn shard_name(at: usize) -> String {
    format!("model-{:05}-of-00003.safetensors", at + 1)
}

pub(crate) fn write_index(directory: &Path, index: &Value) {
    fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

pub(crate) fn open(directory: &TempDir) -> Result<Checkpoint, model::Error> {
    Checkpoint::open(Files::Directory(directory.path().to_owned()))
}
