//! What a checkpoint is refused for, with the file and the tensor in the message.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use std::fs;
use std::path::Path;

use model::{Catalogue, Checkpoint, Error, Files, HEADER_BYTES_MAX, Header, ModelConfig, ShardPlan, load};
use safetensors::Dtype;
use serde_json::{Value, json};
use support::{
    Recorder, Rng, Tensors, config_json, directory, fused, inside_vision, open, parse, random_tensors,
    serialized, shard_name, sharded_directory, with, write_index,
};
use types::{DType, TpRank};

fn config() -> ModelConfig {
    parse(&config_json()).unwrap()
}

fn tensors() -> Tensors {
    random_tensors(&config(), 7)
}

fn holds(error: &Error, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}

/// A file of a length prefix, `header`, and `data` zero bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn entry(dtype: &str, shape: &Value, offsets: &Value) -> Value {
    json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets })
}

#[test]
fn headers_that_lie_about_the_file_are_refused() {
    let huge = u64::MAX.to_le_bytes().to_vec();
    let mut claims = 1000_u64.to_le_bytes().to_vec();
    claims.extend(b"{}");
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("an empty file", Vec::new(), &["0 bytes", "truncated"]),
        ("half a length", vec![1, 2, 3], &["3 bytes", "truncated"]),
        ("a huge length", huge, &["18446744073709551615", "the file has 0"]),
        ("a header longer than the file", claims, &["claims 1000 bytes", "has 2 after"]),
        ("no header at all", file("", 0), &["not a valid JSON object"]),
        ("a list", file("[]", 0), &["expected an object"]),
        ("half an object", file("{\"a\":", 0), &["EOF"]),
        ("not UTF-8", [2_u64.to_le_bytes().to_vec(), vec![0xff, 0xfe]].concat(), &["not a valid JSON"]),
    ];
    for (name, bytes, words) in cases {
        let error = Header::from_bytes("a.safetensors", &bytes).expect_err(name);
        holds(&error, &["a.safetensors:"]);
        holds(&error, words);
    }
}

#[test]
fn a_header_above_the_limit_is_refused_before_it_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    fs::write(&path, (HEADER_BYTES_MAX + 1).to_le_bytes()).unwrap();
    // A sparse file: its size is claimed, not allocated.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(HEADER_BYTES_MAX + 100).unwrap();
    holds(&open(&directory).unwrap_err(), &["model.safetensors", "67108865", "67108864"]);
}

#[test]
fn tensors_that_lie_about_their_bytes_are_refused() {
    let good = entry("F32", &json!([2, 2]), &json!([0, 16]));
    let cases = [
        ("not an object", json!({ "t": 5 }), 16, vec!["must be an object, not 5"]),
        ("no dtype", json!({ "t": { "shape": [4], "data_offsets": [0, 16] } }), 16, vec!["no dtype"]),
        ("unknown dtype", json!({ "t": entry("F99", &json!([4]), &json!([0, 16])) }), 16, vec!["F99"]),
        ("no shape", json!({ "t": { "dtype": "F32", "data_offsets": [0, 16] } }), 16, vec!["no shape"]),
        ("negative size", json!({ "t": entry("F32", &json!([-4]), &json!([0, 16])) }), 16, vec!["shape"]),
        ("one offset", json!({ "t": entry("F32", &json!([4]), &json!([16])) }), 16, vec!["data_offsets"]),
        ("backwards", json!({ "t": entry("F32", &json!([4]), &json!([16, 0])) }), 16, vec!["backwards"]),
        ("past the end", json!({ "t": good }), 15, vec!["beyond the 15 bytes", "truncated"]),
        ("wrong size", json!({ "t": entry("BF16", &json!([2, 2]), &json!([0, 16])) }), 16, vec!["16", "8"]),
        (
            "overflow",
            json!({ "t": entry("F32", &json!([1_u64 << 40, 1_u64 << 40]), &json!([0, 16])) }),
            16,
            vec!["larger than any file"],
        ),
        (
            "overlap",
            json!({ "t": good, "s": entry("F32", &json!([1]), &json!([0, 4])) }),
            16,
            vec!["overlap", "s"],
        ),
        ("bytes left over", json!({ "t": good }), 20, vec!["bytes 16 to 20", "no tensor"]),
        ("a gap", json!({ "t": entry("F32", &json!([1]), &json!([4, 8])) }), 8, vec!["bytes 0 to 4"]),
    ];
    for (name, header, data, words) in cases {
        let bytes = file(&header.to_string(), data);
        let error = Header::from_bytes("a.safetensors", &bytes).expect_err(name);
        holds(&error, &["a.safetensors:"]);
        holds(&error, &words);
        assert!(
            name == "bytes left over" || name == "a gap" || error.to_string().contains("tensor t: "),
            "{error}"
        );
    }
    let twice = r#"{"t":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#;
    holds(&Header::from_bytes("a.safetensors", &file(twice, 1)).unwrap_err(), &["`t` occurs twice"]);
}

#[test]
fn good_headers_are_accepted_whatever_their_order() {
    let header = json!({
        "b": entry("F32", &json!([1]), &json!([3, 7])),
        "a": entry("U8", &json!([3]), &json!([0, 3])),
        "empty": entry("F32", &json!([0, 5]), &json!([3, 3])),
        "__metadata__": { "format": "pt" },
    });
    let header = Header::from_bytes("a", &file(&header.to_string(), 7)).unwrap();
    assert_eq!(header.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "empty", "b"]);
}

#[test]
fn a_truncated_weight_file_is_refused_when_opened() {
    let whole = serialized(&tensors(), Dtype::F32);
    for keep in [4, 100, whole.len() / 2, whole.len() - 1] {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("model.safetensors"), &whole[..keep]).unwrap();
        holds(&open(&directory).unwrap_err(), &["model.safetensors", "truncated"]);
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let directory = directory(&tensors(), Dtype::F32);
    let checkpoint = open(&directory).unwrap();
    let path = directory.path().join("model.safetensors");
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(20_000).unwrap();
    holds(&load_error(&checkpoint, &config()), &["model.safetensors: cannot read"]);
}

fn load_error(checkpoint: &Checkpoint, config: &ModelConfig) -> Error {
    let plan = ShardPlan::new(config, TpRank::SOLO).unwrap();
    match load(checkpoint, config, &plan, &mut Recorder::new(DType::F32), &()) {
        Ok(_) => panic!("the checkpoint was loaded"),
        Err(error) => error,
    }
}

#[test]
fn places_without_weights_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    holds(&open(&directory).unwrap_err(), &["model.safetensors", "index.json", "does not exist"]);
    fs::create_dir(directory.path().join("model.safetensors")).unwrap();
    holds(&open(&directory).unwrap_err(), &["model.safetensors", "not a regular file"]);
    let nowhere = Files::Directory(Path::new("/nowhere/at/all").to_owned());
    holds(&Checkpoint::open(nowhere).unwrap_err(), &["/nowhere/at/all"]);
    holds(&Checkpoint::open(Files::Embedded(&[])).unwrap_err(), &["embedded model.safetensors"]);
}

/// One change to a checkpoint's tensors and what the refusal must say.
type Case = (&'static str, Box<dyn Fn(&mut Tensors)>, Vec<&'static str>);

fn insert(name: &'static str, shape: &'static [usize]) -> Box<dyn Fn(&mut Tensors)> {
    Box::new(move |tensors| {
        tensors.insert(name.to_owned(), (shape.to_vec(), vec![0.0; shape.iter().product()]));
    })
}

fn remove(name: &'static str) -> Box<dyn Fn(&mut Tensors)> {
    Box::new(move |tensors| drop(tensors.remove(name).unwrap()))
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_refused() {
    let cases: Vec<Case> = vec![
        ("unknown", insert("model.layers.0.mlp.extra.weight", &[3]), vec!["mlp.extra.weight [3]", "no part"]),
        (
            "layer too many",
            insert("model.layers.4.input_layernorm.weight", &[16]),
            vec!["layers.4", "no part"],
        ),
        ("q norm", insert("model.layers.1.self_attn.q_norm.weight", &[6]), vec!["q_norm", "no part"]),
        ("scale", insert("model.layers.1.mlp.experts.0.up_proj.weight_scale", &[8]), vec!["weight_scale"]),
        ("unknown bias", insert("model.layers.1.extra.bias", &[3]), vec!["extra.bias", "no part"]),
        ("bias shape", insert("model.norm.bias", &[3]), vec!["model.norm.bias", "[3]", "[16]"]),
        ("two prefixes", insert("model.language_model.embed_tokens.weight", &[37, 16]), vec!["both present"]),
        (
            "missing q",
            remove("model.layers.2.self_attn.q_proj.weight"),
            vec!["q_proj.weight [24, 16] is missing"],
        ),
        (
            "no embedding",
            remove("model.embed_tokens.weight"),
            vec!["model.language_model.embed_tokens.weight"],
        ),
        (
            "missing expert",
            remove("model.layers.3.mlp.experts.2.down_proj.weight"),
            vec!["experts.2", "[16, 8]"],
        ),
        (
            "shape",
            insert("model.layers.2.self_attn.k_proj.weight", &[16, 12]),
            vec!["k_proj.weight has shape [16, 12]", "[12, 16]"],
        ),
        (
            "fused and not",
            insert("model.layers.3.mlp.experts.down_proj", &[4, 16, 8]),
            vec!["experts.0.down_proj.weight [16, 8] is no part"],
        ),
    ];
    for (name, change, words) in cases {
        let mut tensors = tensors();
        change(&mut tensors);
        let checkpoint = open(&directory(&tensors, Dtype::F32)).unwrap();
        let error = Catalogue::resolve(&checkpoint, &config()).expect_err(name);
        assert!(matches!(error, Error::Tensors { .. }), "{name}: {error}");
        holds(&error, &words);
        assert_eq!(load_error(&checkpoint, &config()).to_string(), error.to_string(), "{name}");
    }
}

#[test]
fn fused_experts_of_another_shape_are_refused() {
    let mut tensors = fused(&tensors(), &config());
    let (shape, _) = tensors.get_mut("model.layers.1.mlp.experts.gate_up_proj").unwrap();
    *shape = vec![4, 8, 32];
    let checkpoint = open(&directory(&tensors, Dtype::F32)).unwrap();
    let error = Catalogue::resolve(&checkpoint, &config()).unwrap_err();
    holds(&error, &["experts.gate_up_proj", "[4, 8, 32]", "[4, 16, 16]"]);
}

#[test]
fn an_untied_model_without_a_head_is_refused() {
    let untied = parse(&with(config_json(), &json!({ "tie_word_embeddings": false }))).unwrap();
    let checkpoint = open(&directory(&tensors(), Dtype::F32)).unwrap();
    holds(&load_error(&checkpoint, &untied), &["lm_head.weight [37, 16] is missing"]);
    let checkpoint = open(&directory(&inside_vision(&tensors()), Dtype::F32)).unwrap();
    holds(&load_error(&checkpoint, &untied), &["lm_head.weight [37, 16] is missing"]);
}

#[test]
fn a_long_list_of_problems_is_cut_and_counted() {
    let mut wide = config();
    wide.hidden_size = 32;
    let checkpoint = open(&directory(&tensors(), Dtype::F32)).unwrap();
    holds(&load_error(&checkpoint, &wide), &["has shape", "more"]);
}

#[test]
fn element_types_that_are_not_weights_are_refused() {
    let directory = directory(&tensors(), Dtype::F32);
    let path = directory.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    // I32 is as wide, so the header stays true.
    let changed = header.replacen("\"F32\"", "\"I32\"", 1);
    fs::write(&path, [&bytes[..8], changed.as_bytes(), &bytes[8 + length..]].concat()).unwrap();
    let error = load_error(&open(&directory).unwrap(), &config());
    holds(&error, &["is stored as I32, and only F32, BF16 and F16 are read"]);
}

#[test]
fn a_bias_that_is_not_zero_is_refused_with_its_first_element() {
    let cases = [
        ("model.norm.bias", 16, 3, 0.5),
        ("model.layers.2.self_attn.o_proj.bias", 16, 15, -1.0),
        ("model.layers.1.mlp.gate.bias", 4, 0, f32::NAN),
        ("model.layers.1.mlp.experts.2.gate_proj.bias", 8, 7, 1e-30),
        ("lm_head.bias", 37, 36, 1.0),
    ];
    for (name, elements, at, value) in cases {
        let mut tensors = tensors();
        let mut bias = vec![0.0; elements];
        bias[at] = value;
        tensors.insert(name.to_owned(), (vec![elements], bias));
        let error = load_error(&open(&directory(&tensors, Dtype::F32)).unwrap(), &config());
        assert!(matches!(error, Error::Bias { .. }), "{error}");
        holds(&error, &[name, &format!("element {at} of {elements} is {value}")]);
    }
}

/// A good sharded checkpoint, spoiled by `change`, which gets its directory and weight map.
fn refused_index(change: impl FnOnce(&Path, &mut Value), words: &[&str]) {
    let directory = sharded_directory(&tensors());
    let path = directory.path().join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(directory.path(), &mut index["weight_map"]);
    write_index(directory.path(), &index);
    let error = open(&directory).unwrap_err();
    holds(&error, words);
}

#[test]
fn an_index_that_does_not_match_its_shards_is_refused() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    refused_index(|_, map| map[Q] = json!("else.safetensors"), &["else.safetensors does not exist", Q]);
    refused_index(|_, map| map["ghost"] = json!(shard_name(1)), &["ghost is not in", &shard_name(1)]);
    refused_index(|_, map| drop(map.as_object_mut().unwrap().remove(Q)), &[Q, "not in the index"]);
    refused_index(
        |_, map| {
            let other = if map[Q] == json!(shard_name(0)) { shard_name(1) } else { shard_name(0) };
            map[Q] = json!(other);
        },
        &[Q, "the index says"],
    );
    refused_index(|directory, _| fs::remove_file(directory.join(shard_name(2))).unwrap(), &[&shard_name(2)]);
    refused_index(
        |directory, _| fs::write(directory.join(shard_name(0)), [0; 4]).unwrap(),
        &[&shard_name(0), "truncated"],
    );
    for name in ["../secret", "/etc/passwd", "", ".hidden", "a\\b"] {
        refused_index(|_, map| map[Q] = json!(name), &[Q, "not the name of a file beside the index"]);
    }
    refused_index(|_, map| map[Q] = json!(5), &[Q, "is said to be in 5"]);
    refused_index(|_, map| *map = json!([]), &["`weight_map` must be an object"]);
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let tensors = tensors();
    let directory = sharded_directory(&tensors);
    let (name, tensor) = tensors.first_key_value().unwrap();
    let third: Tensors = tensors.iter().skip(2).step_by(3).map(|(n, t)| (n.clone(), t.clone())).collect();
    let mut twice = third;
    twice.insert(name.clone(), tensor.clone());
    fs::write(directory.path().join(shard_name(2)), serialized(&twice, Dtype::F32)).unwrap();
    holds(&open(&directory).unwrap_err(), &[name, &shard_name(2), &shard_name(0)]);
}

#[test]
fn no_mutation_of_a_good_header_panics() {
    let seed = 23;
    let mut rng = Rng(seed);
    let small: Tensors = tensors().into_iter().take(3).collect();
    let good = serialized(&small, Dtype::BF16);
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut accepted = 0;
    for round in 0..4000 {
        let mut bytes = good.clone();
        for _ in 0..=rng.below(3) {
            let at = rng.below(header);
            match rng.below(4) {
                0 => bytes[at] = rng.next() as u8,
                1 => bytes[at] = b"0123456789[]{},:\" "[rng.below(18)],
                2 => bytes[rng.below(8)] = rng.next() as u8,
                _ => bytes.truncate(rng.below(good.len()).max(header)),
            }
        }
        let outcome = std::panic::catch_unwind(|| Header::from_bytes("fuzzed", &bytes));
        let parsed = outcome.unwrap_or_else(|_| panic!("seed {seed}, round {round}"));
        if let Ok(header) = parsed {
            accepted += 1;
            let end = header.tensors.last().map(|tensor| tensor.start + tensor.bytes);
            assert!(end.is_none_or(|end| end == bytes.len() as u64), "seed {seed}, round {round}");
        }
    }
    assert!(accepted < 4000, "mutations are noticed");
}
