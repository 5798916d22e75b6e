//! Ranks that would compute different things have different fingerprints.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use std::fs;

use model::config_hash;
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

fn hash(directory: &TempDir, size: u32, dtype: DType, extra: &str) -> [u8; 32] {
    config_hash(&open(directory).unwrap(), TpSize::new(size).unwrap(), dtype, extra.as_bytes()).unwrap()
}

#[test]
fn equal_ranks_have_equal_hashes() {
    let (one, other) = (checkpoint(1, Dtype::F32), checkpoint(1, Dtype::F32));
    assert_eq!(hash(&one, 2, DType::F32, "x"), hash(&other, 2, DType::F32, "x"));
}

#[test]
fn whatever_ranks_must_agree_on_changes_the_hash() {
    let base = checkpoint(1, Dtype::F32);
    let expected = hash(&base, 2, DType::F32, "x");
    assert_ne!(hash(&base, 4, DType::F32, "x"), expected, "plan size");
    assert_ne!(hash(&base, 2, DType::BF16, "x"), expected, "compute dtype");
    assert_ne!(hash(&base, 2, DType::F32, "y"), expected, "the caller's bytes");
    assert_ne!(hash(&checkpoint(1, Dtype::BF16), 2, DType::F32, "x"), expected, "stored dtype");
    let config = base.path().join("config.json");
    fs::write(&config, config_json().to_string() + " ").unwrap();
    assert_ne!(hash(&base, 2, DType::F32, "x"), expected, "config.json");
    fs::write(&config, config_json().to_string()).unwrap();
    assert_eq!(hash(&base, 2, DType::F32, "x"), expected);
    fs::write(base.path().join("generation_config.json"), json!({}).to_string()).unwrap();
    assert_ne!(hash(&base, 2, DType::F32, "x"), expected, "generation_config.json");
}
