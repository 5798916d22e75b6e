//! What a `config.json` is refused for. Each case changes one thing in a good file and names what the message must
//! hold; a null in a change removes the field.

mod support;

use model::{Error, Files, ModelConfig, ShardPlan, WeightBytes};
use serde_json::{Value, json};
use support::{Rng, config_json, parse, with};
use types::{DType, TpRank};

/// Asserts that `config` is refused with every one of `words` in the message.
fn refused(config: &Value, words: &[&str]) {
    match parse(config) {
        Ok(_) => panic!("accepted, though the message should hold {words:?}: {config}"),
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with("config.json"), "the file is not named first: {text}");
            for word in words {
                assert!(text.contains(word), "`{word}` is not in: {text}");
            }
        }
    }
}

#[test]
fn every_field_that_selects_behaviour_is_required() {
    let fields = config_json();
    let optional = ["layer_norm_eps", "rms_norm_eps"];
    for name in fields.as_object().unwrap().keys().filter(|name| !optional.contains(&name.as_str())) {
        let missing = with(fields.clone(), &json!({ name: null }));
        let reported = match name.as_str() {
            "first_k_dense_replace" => "mlp_layer_types",
            "layer_types" => "sliding_window_pattern",
            other => other,
        };
        refused(&missing, &[&format!("`{reported}` is missing"), "must"]);
    }
}

#[test]
fn neither_norm_is_refused() {
    let neither = with(config_json(), &json!({ "rms_norm_eps": null, "layer_norm_eps": null }));
    refused(&neither, &["`layer_norm_eps` is missing"]);
}

#[test]
fn numbers_out_of_range_are_refused() {
    let cases = [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-16)),
        ("hidden_size", json!(16.5)),
        ("hidden_size", json!("16")),
        ("hidden_size", json!(1_u64 << 40)),
        ("vocab_size", json!(0)),
        ("max_position_embeddings", json!(0)),
        ("max_position_embeddings", json!((1 << 24) + 1)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(100_000)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(5)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(8)),
        ("head_dim", json!(7)),
        ("head_dim", json!(0)),
        ("rms_norm_eps", json!(0.0)),
        ("rms_norm_eps", json!(-1e-6)),
        ("rms_norm_eps", json!(1e-60)),
        ("rms_norm_eps", json!(true)),
        ("rope_theta", json!(-1.0)),
        ("rope_theta", json!(1e39)),
        ("logit_scale", json!(0)),
        ("sliding_window", json!(0)),
        ("layer_types", json!(["full_attention"])),
        ("layer_types", json!(["full_attention", "full", "full_attention", "full_attention"])),
        ("layer_types", json!("full_attention")),
        ("first_k_dense_replace", json!(5)),
        ("prefix_dense_intermediate_size", json!(0)),
        ("prefix_dense_sliding_window_pattern", json!(0)),
        ("num_experts", json!(0)),
        ("num_experts_per_tok", json!(0)),
        ("num_experts_per_tok", json!(5)),
        ("intermediate_size", json!(0)),
        ("num_shared_experts", json!(-1)),
        ("expert_selection_fn", json!("tanh")),
        ("shared_expert_combination_strategy", json!("max")),
        ("norm_topk_prob", json!(1)),
        ("tie_word_embeddings", json!("yes")),
        ("eos_token_id", json!(37)),
        ("eos_token_id", json!([])),
        ("eos_token_id", json!([6, "x"])),
        ("eos_token_id", json!(-1)),
        ("model_type", json!("llama")),
    ];
    for (name, value) in cases {
        let reported = if name == "num_key_value_heads" { "num_attention_heads" } else { name };
        refused(&with(config_json(), &json!({ name: value })), &[&format!("`{reported}`")]);
    }
}

#[test]
fn what_is_not_implemented_is_refused() {
    let cases = [
        ("use_parallel_block", json!(false), "only true is implemented"),
        ("use_gated_activation", json!(false), "only true is implemented"),
        ("use_qk_norm", json!(true), "only false is implemented"),
        ("attention_bias", json!(true), "only false is implemented"),
        ("hidden_act", json!("gelu"), "only \"silu\" is implemented"),
        ("position_embedding_type", json!("rope_neox"), "only \"rope_gptj\""),
        ("rotary_pct", json!(0.5), "only 1.0 is implemented"),
        ("rope_scaling", json!({ "type": "yarn", "factor": 4.0 }), "absent or null"),
        ("rope_parameters", json!({ "rope_theta": 5e4, "rope_type": "yarn" }), "rope_parameters.rope_type"),
        ("rope_parameters", json!({ "rope_theta": 5e4, "factor": 2.0 }), "rope_parameters.factor"),
        ("rope_parameters", json!({ "rope_type": "default" }), "rope_parameters.rope_theta` is missing"),
        ("quantization_config", json!({ "quant_method": "compressed-tensors" }), "compressed-tensors"),
        ("quantization_config", json!({ "format": "nvfp4-pack-quantized" }), "nvfp4-pack-quantized"),
        ("quantization_config", json!("?"), "an unnamed method"),
    ];
    for (name, value, words) in cases {
        refused(&with(config_json(), &json!({ name: value })), &[name, words]);
    }
}

#[test]
fn contradictions_are_refused() {
    let cases = [
        (
            json!({ "mlp_layer_types": ["sparse", "sparse", "sparse", "sparse"] }),
            vec!["first_k_dense_replace", "agree"],
        ),
        (json!({ "rope_parameters": { "rope_theta": 10000.0 } }), vec!["rope_theta", "50000", "10000"]),
        (json!({ "use_embedding_sharing": false }), vec!["use_embedding_sharing", "agree"]),
        (
            json!({
                "layer_types": null, "sliding_window_pattern": 3, "first_k_dense_replace": null,
                "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            }),
            vec!["layer_types", "before all sparse"],
        ),
    ];
    for (changes, words) in cases {
        refused(&with(config_json(), &changes), &words);
    }
}

#[test]
fn a_vision_model_without_its_text_model_is_refused() {
    refused(&json!({ "model_type": "cohere2_vision" }), &["`text_config` is missing"]);
    refused(&json!({ "model_type": "cohere2_vision", "text_config": [] }), &["text_config", "an object"]);
    let other = with(config_json(), &json!({ "model_type": "llama" }));
    refused(
        &json!({ "model_type": "cohere2_vision", "text_config": other }),
        &["`text_config.model_type`", "llama"],
    );
    let quantized = json!({
        "model_type": "cohere2_vision", "text_config": config_json(),
        "quantization_config": { "quant_method": "fp8" },
    });
    refused(&quantized, &["quantization_config", "fp8"]);
    let torn =
        json!({ "model_type": "cohere2_vision", "text_config": config_json(), "tie_word_embeddings": false });
    refused(&torn, &["tie_word_embeddings", "agree"]);
}

#[test]
fn all_complaints_come_at_once() {
    let changes =
        json!({ "hidden_size": 0, "hidden_act": "gelu", "norm_topk_prob": null, "eos_token_id": 99 });
    refused(
        &with(config_json(), &changes),
        &["`hidden_size`", "`hidden_act`", "`norm_topk_prob`", "`eos_token_id`"],
    );
}

#[test]
fn what_is_no_json_object_is_refused() {
    let cases = [
        ("", "EOF"),
        ("[]", "expected an object"),
        ("{\"hidden_size\": NaN}", "line 1"),
        ("{\"hidden_size\": 1e999}", "out of range"),
        ("{\"a\": 1, \"a\": 2}", "`a` occurs twice"),
        ("\u{feff}{}", "line 1"),
    ];
    for (text, word) in cases {
        let error = ModelConfig::from_json(text.as_bytes(), "dir/config.json", None).unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with("dir/config.json is not a valid JSON object"), "{message}");
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn bad_generation_configurations_are_refused_by_name() {
    let config = config_json().to_string();
    for generation in ["{\"eos_token_id\": 37}", "nonsense"] {
        let bytes = Some(generation.as_bytes());
        let error = ModelConfig::from_json(config.as_bytes(), "config.json", bytes).unwrap_err();
        assert!(error.to_string().contains("generation_config.json"), "{error}");
    }
}

#[test]
fn a_directory_without_a_configuration_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let files = Files::Directory(directory.path().to_owned());
    let error = ModelConfig::from_files(&files).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert!(error.to_string().ends_with("config.json does not exist"), "{error}");
}

#[test]
fn no_mutation_of_a_good_file_panics() {
    let seed = 11;
    let mut rng = Rng(seed);
    let good = config_json().to_string().into_bytes();
    for round in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..=rng.below(4) {
            mutate(&mut bytes, &mut rng);
        }
        let outcome = std::panic::catch_unwind(|| {
            let split = bytes.len() / 2;
            if let Ok(config) = ModelConfig::from_json(&bytes, "config.json", None) {
                let plan = ShardPlan::new(&config, TpRank::SOLO).expect("one rank holds any model");
                assert!(WeightBytes::new(&config, &plan, DType::F32).total().0 > 0);
            }
            let _ = ModelConfig::from_json(&good, "config.json", Some(&bytes[..split]));
        });
        assert!(outcome.is_ok(), "seed {seed}, round {round}: {}", String::from_utf8_lossy(&bytes));
    }
}

fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = rng.below(bytes.len());
    match rng.below(5) {
        0 => bytes[at] = rng.next() as u8,
        1 => bytes.truncate(at.max(1)),
        2 => bytes.insert(at, b"0123456789{}[],:\"-eE.tfn"[rng.below(24)]),
        3 => drop(bytes.remove(at)),
        _ => {
            let end = (at + rng.below(40)).min(bytes.len());
            let piece = bytes[at..end].to_vec();
            let target = rng.below(bytes.len());
            bytes.splice(target..target, piece);
        }
    }
    if bytes.is_empty() {
        bytes.push(b'{');
    }
}
