//! Every way a `config.json` may say the same thing.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use model::{Attention, Combination, Files, LayerConfig, Mlp, ModelConfig, SharedExperts};
use ops::{KvGroup, Norm, Rope, Routing, Scoring};
use serde_json::{Value, json};
use support::{config_json, parse, with};
use types::TokenId;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden");
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/assets/demo");

fn read(directory: &str) -> ModelConfig {
    ModelConfig::from_files(&Files::Directory(directory.into())).unwrap()
}

#[test]
fn the_plain_form_means_what_it_says() {
    let config = parse(&config_json()).unwrap();
    let layer = |attention, rope, mlp| LayerConfig { attention, rope, mlp };
    let moe = config.moe.unwrap();
    assert_eq!((config.hidden_size, config.vocab_size, config.context_tokens_max), (16, 37, 256));
    assert_eq!((config.query_heads, config.kv_heads, config.head_dim), (4, 2, 6));
    assert_eq!(config.norm, Norm::Rms { eps: 1e-6 });
    assert_eq!(config.rope, Rope { theta: 50000.0 });
    assert_eq!((config.window_keys, config.logit_scale, config.tied_head), (8, 0.5, true));
    assert_eq!(
        config.layers,
        [
            layer(Attention::Full, true, Mlp::Dense),
            layer(Attention::Sliding, true, Mlp::Sparse),
            layer(Attention::Sliding, true, Mlp::Sparse),
            layer(Attention::Full, false, Mlp::Sparse),
        ]
    );
    assert_eq!(config.dense_intermediate_size, Some(12));
    assert_eq!((moe.experts, moe.intermediate_size), (4, 8));
    assert_eq!(moe.routing, Routing { top_k: 2, scoring: Scoring::Sigmoid { renormalize: true } });
    assert_eq!(moe.shared, Some(SharedExperts { intermediate_size: 8, combination: Combination::Average }));
    assert_eq!(config.eos_token_ids, [TokenId(6)]);
    assert_eq!((config.layers_in(KvGroup::Full), config.layers_in(KvGroup::Sliding)), (2, 2));
}

#[test]
fn every_form_gives_the_same_configuration() {
    let plain = config_json();
    let vision = json!({
        "model_type": "cohere2_vision",
        "tie_word_embeddings": true,
        "vision_config": { "model_type": "siglip_vision_model" },
        "text_config": plain,
    });
    let forms: Vec<(&str, Value)> = vec![
        (
            "mlp_layer_types instead of a count",
            with(
                plain.clone(),
                &json!({
                    "first_k_dense_replace": null,
                    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                }),
            ),
        ),
        (
            "both, in agreement",
            with(plain.clone(), &json!({ "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"] })),
        ),
        (
            "layer_types derived from the patterns",
            with(plain.clone(), &json!({ "layer_types": null, "sliding_window_pattern": 3 })),
        ),
        (
            "theta in rope_parameters only",
            with(
                plain.clone(),
                &json!({
                    "rope_theta": null,
                    "rope_parameters": { "rope_type": "default", "rope_theta": 50000 },
                }),
            ),
        ),
        ("theta in both", with(plain.clone(), &json!({ "rope_parameters": { "rope_theta": 50000.0 } }))),
        ("a list of stop ids", with(plain.clone(), &json!({ "eos_token_id": [6] }))),
        ("inside a vision model", vision),
        (
            "the published fields",
            with(
                plain.clone(),
                &json!({
                    "use_parallel_block": true,
                    "use_gated_activation": true,
                    "use_qk_norm": false,
                    "attention_bias": false,
                    "hidden_act": "silu",
                    "position_embedding_type": "rope_gptj",
                    "rotary_pct": 1,
                    "use_embedding_sharing": true,
                }),
            ),
        ),
        (
            "fields that compute nothing",
            with(plain.clone(), &json!({ "transformers_version": "5.23.0", "initializer_range": 0.02 })),
        ),
    ];
    let expected = parse(&plain).unwrap();
    for (name, form) in forms {
        assert_eq!(parse(&form).unwrap_or_else(|error| panic!("{name}: {error}")), expected, "{name}");
    }
}

#[test]
fn a_null_tie_means_tied() {
    let text =
        config_json().to_string().replace("\"tie_word_embeddings\":true", "\"tie_word_embeddings\":null");
    assert!(text.contains("null"));
    let config = ModelConfig::from_json(text.as_bytes(), "config.json", None).unwrap();
    assert!(config.tied_head);
}

#[test]
fn an_untied_head_is_read_from_either_scope() {
    let untied = with(config_json(), &json!({ "tie_word_embeddings": false }));
    assert!(!parse(&untied).unwrap().tied_head);
    let text = with(config_json(), &json!({ "tie_word_embeddings": null }));
    let outer = json!({ "model_type": "cohere2_vision", "tie_word_embeddings": false, "text_config": text });
    assert!(!parse(&outer).unwrap().tied_head);
}

#[test]
fn no_rms_eps_means_layer_norm() {
    let config = parse(&with(config_json(), &json!({ "rms_norm_eps": null }))).unwrap();
    assert_eq!(config.norm, Norm::Layer { eps: 1e-5 });
}

#[test]
fn softmax_routing_asks_for_no_renormalisation() {
    let changes = json!({ "expert_selection_fn": "softmax", "norm_topk_prob": null });
    let config = parse(&with(config_json(), &changes)).unwrap();
    assert_eq!(config.moe.unwrap().routing.scoring, Scoring::Softmax);
}

#[test]
fn a_model_without_shared_experts_asks_for_no_combination() {
    let changes = json!({ "num_shared_experts": 0, "shared_expert_combination_strategy": null });
    assert_eq!(parse(&with(config_json(), &changes)).unwrap().moe.unwrap().shared, None);
}

#[test]
fn several_shared_experts_are_one_wide_one() {
    let changes = json!({ "num_shared_experts": 3, "shared_expert_combination_strategy": "sum" });
    let shared = parse(&with(config_json(), &changes)).unwrap().moe.unwrap().shared.unwrap();
    assert_eq!(shared, SharedExperts { intermediate_size: 24, combination: Combination::Sum });
}

#[test]
fn a_model_without_dense_layers_asks_for_nothing_about_them() {
    let changes = json!({
        "first_k_dense_replace": 0,
        "prefix_dense_intermediate_size": null,
        "prefix_dense_sliding_window_pattern": null,
    });
    let config = parse(&with(config_json(), &changes)).unwrap();
    assert_eq!(config.dense_intermediate_size, None);
    assert!(!config.layers[0].rope, "a full layer has no rotary embedding unless a dense prefix forces it");
}

#[test]
fn a_model_without_sparse_layers_asks_for_no_experts() {
    let changes = json!({
        "first_k_dense_replace": 4, "num_experts": null, "num_experts_per_tok": null,
        "intermediate_size": null, "num_shared_experts": null, "expert_selection_fn": null,
        "norm_topk_prob": null, "shared_expert_combination_strategy": null,
    });
    assert_eq!(parse(&with(config_json(), &changes)).unwrap().moe, None);
}

#[test]
fn a_model_without_sliding_layers_asks_for_no_window() {
    let full = vec!["full_attention"; 4];
    let config =
        parse(&with(config_json(), &json!({ "layer_types": full, "sliding_window": null }))).unwrap();
    assert_eq!(config.window_keys, config.context_tokens_max, "its window hides nothing");
}

#[test]
fn a_prefix_pattern_other_than_one_forces_no_rotary_embedding() {
    let config = parse(&with(config_json(), &json!({ "prefix_dense_sliding_window_pattern": 2 }))).unwrap();
    assert!(!config.layers[0].rope);
}

#[test]
fn stop_ids_come_from_the_generation_configuration_first() {
    let config = config_json().to_string();
    let ids = |generation: &str| {
        let bytes = Some(generation.as_bytes());
        ModelConfig::from_json(config.as_bytes(), "config.json", bytes).unwrap().eos_token_ids
    };
    assert_eq!(ids(r#"{"eos_token_id": [9, 3]}"#), [TokenId(9), TokenId(3)]);
    assert_eq!(ids(r#"{"eos_token_id": null}"#), [TokenId(6)]);
    assert_eq!(ids("{}"), [TokenId(6)]);
}

#[test]
fn the_published_layer_plans_are_derived_from_their_patterns() {
    let north = json!({
        "num_hidden_layers": 49, "first_k_dense_replace": 1, "sliding_window_pattern": 4, "layer_types": null,
    });
    let config = parse(&with(config_json(), &north)).unwrap();
    let full: Vec<usize> = (0..49).filter(|at| config.layers[*at].attention == Attention::Full).collect();
    assert_eq!(full, (0..49).step_by(4).collect::<Vec<_>>());
    let command = json!({
        "num_hidden_layers": 32, "first_k_dense_replace": 0, "sliding_window_pattern": 4, "layer_types": null,
    });
    let config = parse(&with(config_json(), &command)).unwrap();
    assert!((0..32).all(|at| (config.layers[at].attention == Attention::Full) == (at % 4 == 3)));
    assert!(config.layers.iter().all(|layer| layer.rope == (layer.attention == Attention::Sliding)));
}

#[test]
fn the_golden_layer_types_follow_from_their_patterns() {
    for case in ["north", "command-a-plus", "softmax-sum", "sigmoid-raw"] {
        let text = std::fs::read_to_string(format!("{GOLDEN}/{case}/config.json")).unwrap();
        let explicit: Value = serde_json::from_str(&text).unwrap();
        let derived = with(explicit.clone(), &json!({ "layer_types": null }));
        assert_eq!(parse(&derived).unwrap(), parse(&explicit).unwrap(), "{case}");
    }
}

#[test]
fn the_golden_configurations_are_read_as_documented() {
    let north = read(&format!("{GOLDEN}/north"));
    assert_eq!(north.norm, Norm::Rms { eps: 1e-6 });
    assert_eq!(north.layers[0], LayerConfig { attention: Attention::Full, rope: true, mlp: Mlp::Dense });
    assert_eq!(north.moe.unwrap().shared, None);

    let command = read(&format!("{GOLDEN}/command-a-plus"));
    let moe = command.moe.unwrap();
    assert_eq!(command.norm, Norm::Layer { eps: 1e-5 });
    assert_eq!((moe.experts, moe.routing.top_k, command.logit_scale), (16, 4, 0.25));
    assert_eq!(moe.shared.unwrap().combination, Combination::Average);

    let softmax = read(&format!("{GOLDEN}/softmax-sum"));
    let moe = softmax.moe.unwrap();
    assert_eq!((moe.routing.scoring, softmax.dense_intermediate_size), (Scoring::Softmax, None));
    assert_eq!(moe.shared, Some(SharedExperts { intermediate_size: 96, combination: Combination::Sum }));

    let raw = read(&format!("{GOLDEN}/sigmoid-raw"));
    assert_eq!(raw.moe.unwrap().routing.scoring, Scoring::Sigmoid { renormalize: false });
    assert_eq!((raw.window_keys, raw.layers[1].rope), (5, false));
}

#[test]
fn the_demo_configuration_is_read_as_trained() {
    let demo = read(DEMO);
    assert_eq!((demo.hidden_size, demo.vocab_size, demo.window_keys), (256, 4096, 128));
    assert_eq!((demo.query_heads, demo.kv_heads, demo.head_dim), (8, 2, 32));
    assert_eq!(demo.eos_token_ids, [TokenId(9), TokenId(6)]);
    assert_eq!((demo.context_tokens_max, demo.logit_scale), (2048, 0.5));
}

#[test]
fn a_configuration_as_published_for_the_vision_model_is_read() {
    let text = json!({
        "model_type": "cohere2_moe", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 128,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 4096, "num_experts": 128,
        "num_experts_per_tok": 8, "num_shared_experts": 4, "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "sigmoid", "norm_topk_prob": true, "first_k_dense_replace": 0,
        "rms_norm_eps": null, "layer_norm_eps": 1e-5, "norm_type": "layer_norm", "sliding_window": 4096,
        "sliding_window_pattern": 4, "rope_theta": 50000, "rotary_pct": 1.0,
        "rope_parameters": { "rope_type": "default", "rope_theta": 50000 },
        "position_embedding_type": "rope_gptj", "max_position_embeddings": 200_000, "logit_scale": 1.0,
        "use_embedding_sharing": true, "vocab_size": 262_144, "attention_bias": false, "use_qk_norm": false,
        "use_parallel_block": true, "use_gated_activation": true, "hidden_act": "silu",
    });
    let whole = json!({
        "architectures": ["Cohere2VisionForConditionalGeneration"], "model_type": "cohere2_vision",
        "tie_word_embeddings": true, "text_config": text, "vision_config": { "hidden_size": 1152 },
        "eos_token_id": 255_001,
    });
    let config = parse(&whole).unwrap();
    let moe = config.moe.unwrap();
    assert_eq!((config.norm, config.tied_head), (Norm::Layer { eps: 1e-5 }, true));
    assert_eq!(moe.routing, Routing { top_k: 8, scoring: Scoring::Sigmoid { renormalize: true } });
    let shared = SharedExperts { intermediate_size: 16384, combination: Combination::Average };
    assert_eq!(moe.shared, Some(shared));
    assert_eq!((config.layers_in(KvGroup::Full), config.layers_in(KvGroup::Sliding)), (8, 24));
    assert_eq!(config.eos_token_ids, [TokenId(255_001)]);
}
