//! Groups that would compute different things have different fingerprints, and so have ranks that do not belong together.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use std::fs;

use model::{config_hash, group_hash};
use safetensors::Dtype;
use serde_json::json;
use support::{config_json, directory, open, parse, random_tensors};
use tempfile::TempDir;
use types::{DType, TpSize};

fn checkpoint(seed: u64, dtype: Dtype) -> TempDir {
    let json = config_json();
    let directory = directory(&random_tensors(&parse(&json).unwrap(), seed), dtype);
    fs::write(directory.path().join("config.json"), json.to_string()).unwrap();
    directory
}

fn hash(directory: &TempDir, dtype: DType, changed: &str) -> [u8; 32] {
    config_hash(&open(directory).unwrap(), dtype, changed.as_bytes()).unwrap()
}

#[test]
fn groups_that_compute_the_same_have_equal_hashes() {
    let (one, other) = (checkpoint(1, Dtype::F32), checkpoint(1, Dtype::F32));
    assert_eq!(hash(&one, DType::F32, "x"), hash(&other, DType::F32, "x"));
}

#[test]
fn whatever_changes_the_tokens_of_a_request_changes_the_hash() {
    let base = checkpoint(1, Dtype::F32);
    let expected = hash(&base, DType::F32, "x");
    assert_ne!(hash(&base, DType::BF16, "x"), expected, "compute dtype");
    assert_ne!(hash(&base, DType::F32, "y"), expected, "what the caller has changed");
    assert_ne!(hash(&checkpoint(1, Dtype::BF16), DType::F32, "x"), expected, "stored dtype");
    let config = base.path().join("config.json");
    fs::write(&config, config_json().to_string() + " ").unwrap();
    assert_ne!(hash(&base, DType::F32, "x"), expected, "config.json");
    fs::write(&config, config_json().to_string()).unwrap();
    assert_eq!(hash(&base, DType::F32, "x"), expected);
    fs::write(base.path().join("generation_config.json"), json!({}).to_string()).unwrap();
    assert_ne!(hash(&base, DType::F32, "x"), expected, "generation_config.json");
}

#[test]
fn ranks_of_one_group_agree_on_the_model_their_number_and_what_the_caller_says() {
    let size = |ranks| TpSize::new(ranks).unwrap();
    let expected = group_hash([1; 32], size(2), b"x");
    assert_eq!(group_hash([1; 32], size(2), b"x"), expected);
    assert_ne!(group_hash([2; 32], size(2), b"x"), expected, "the model");
    assert_ne!(group_hash([1; 32], size(4), b"x"), expected, "the number of ranks");
    assert_ne!(group_hash([1; 32], size(2), b"y"), expected, "the caller's bytes");
}
