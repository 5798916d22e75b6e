//! Memory sums against numbers worked out by hand from the published models' sizes.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use model::{
    Attention, Mlp, ModelConfig, Preset, ShardPlan, WeightBytes, kv_bytes_per_block, kv_bytes_per_token,
};
use ops::KvGroup;
use serde_json::json;
use support::{config_json, parse, rank, with};
use types::{BlockSize, Bytes, DType};

#[test]
fn the_presets_have_the_published_numbers_of_parameters() {
    let parameters = |preset: Preset| {
        let config = preset.config().unwrap();
        assert_eq!(config.stored_dtype, Some(DType::BF16), "{preset}");
        let plan = ShardPlan::new(&config, rank(0, 1)).unwrap();
        WeightBytes::new(&config, &plan, DType::BF16).total().0 / 2
    };
    assert_eq!(parameters(Preset::NorthMiniCode), 30_484_303_872);
    // Routed, shared, attention, routers, embedding; and 33 norms.
    let norms = 33 * 4096;
    assert_eq!(parameters(Preset::CommandAPlus), 218_254_802_944 + norms);
}

#[test]
fn the_presets_are_the_published_models() {
    let north = Preset::NorthMiniCode.config().unwrap();
    let full = |config: &ModelConfig, at: usize| config.layers[at].attention == Attention::Full;
    assert!((0..49).all(|at| full(&north, at) == (at % 4 == 0)));
    assert!((0..49).all(|at| (north.layers[at].mlp == Mlp::Dense) == (at == 0)));
    assert!(north.layers[0].rope && !north.layers[4].rope && north.layers[1].rope);
    let command = Preset::CommandAPlus.config().unwrap();
    assert!((0..32).all(|at| full(&command, at) == (at % 4 == 3)));
    assert!(command.layers.iter().all(|layer| layer.mlp == Mlp::Sparse));
    assert_eq!(command.moe.unwrap().shared.unwrap().intermediate_size, 16_384);
}

/// 49 layers of 128 experts: 30,484,303,872 parameters.
fn north() -> ModelConfig {
    let changes = json!({
        "hidden_size": 2048, "vocab_size": 262_144, "max_position_embeddings": 500_000,
        "num_hidden_layers": 49, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": null,
        "prefix_dense_intermediate_size": 3072, "intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_shared_experts": 0, "eos_token_id": 255_001,
    });
    parse(&with(config_json(), &changes)).unwrap()
}

#[test]
fn the_weights_of_a_published_model_are_counted_to_the_byte() {
    let config = north();
    let plan = ShardPlan::new(&config, rank(0, 1)).unwrap();
    let sums = WeightBytes::new(&config, &plan, DType::BF16);
    assert_eq!(sums.total(), Bytes(30_484_303_872 * 2));
    assert_eq!(sums.embedding, Bytes(536_870_912 * 2));
    assert_eq!(sums.attention, Bytes(49 * 18_874_368 * 2));
    assert_eq!(sums.experts, Bytes(48 * 603_979_776 * 2));
    assert_eq!(sums.routers, Bytes(48 * 262_144 * 2));
    assert_eq!((sums.dense, sums.norms), (Bytes(18_874_368 * 2), Bytes(50 * 2048 * 2)));
    assert_eq!((sums.head, sums.shared), (Bytes(0), Bytes(0)));
}

#[test]
fn eight_ranks_hold_an_eighth_each_but_for_what_is_replicated() {
    let config = north();
    let whole = WeightBytes::new(&config, &ShardPlan::new(&config, rank(0, 1)).unwrap(), DType::BF16);
    let part = WeightBytes::new(&config, &ShardPlan::new(&config, rank(7, 8)).unwrap(), DType::BF16);
    assert_eq!(part.experts.0 * 8, whole.experts.0);
    assert_eq!(part.routers, whole.routers);
    assert!(part.total().0 * 8 <= whole.total().0 * 110 / 100, "within ten percent of the share");
}

#[test]
fn the_cache_of_a_token_is_two_heads_rows_per_layer() {
    let config = north();
    let (full, sliding) = (KvGroup::Full, KvGroup::Sliding);
    let solo = ShardPlan::new(&config, rank(0, 1)).unwrap();
    assert_eq!(kv_bytes_per_token(&config, &solo, DType::BF16, full), Bytes(13 * 2048));
    assert_eq!(kv_bytes_per_token(&config, &solo, DType::BF16, sliding), Bytes(36 * 2048));
    let block = BlockSize::new(16).unwrap();
    assert_eq!(kv_bytes_per_block(&config, &solo, DType::F32, full, block), Bytes(13 * 4096 * 16));
    let eighth = ShardPlan::new(&config, rank(5, 8)).unwrap();
    assert_eq!(
        kv_bytes_per_token(&config, &eighth, DType::BF16, full),
        Bytes(13 * 512),
        "one head, replicated"
    );
}
