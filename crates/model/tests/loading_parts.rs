//! A device that takes weights in parts gets the same weights as one that takes them whole, in memory that it lends.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use model::{Checkpoint, Error, ModelConfig, ShardPlan, load};
use ops::HostTensor;
use safetensors::Dtype;
use serde_json::json;
use support::{Recorder, config_json, directory, fused, open, parse, random_tensors, rank, weights_of, with};
use types::{DType, TpRank};

const SEED: u64 = 5;
/// The widest row, a few rows, and whole weights.
const PART_BYTES: [usize; 3] = [WIDEST_ROW_BYTES, 200, 1 << 20];
/// A row of the output projection, in fp32.
const WIDEST_ROW_BYTES: usize = 4 * 6 * 4;

fn loaded(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    rank: TpRank,
    recorder: &mut Recorder,
) -> Vec<(String, HostTensor)> {
    let plan = ShardPlan::new(config, rank).unwrap();
    let (weights, _) = load(checkpoint, config, &plan, recorder, &()).unwrap();
    weights_of(&weights).into_iter().map(|(name, host)| (name, host.clone())).collect()
}

#[test]
fn weights_in_parts_are_the_weights_whatever_the_size_of_a_part_the_rank_and_the_dtype() {
    let config = parse(&config_json()).unwrap();
    let tensors = random_tensors(&config, SEED);
    let forms = [
        directory(&tensors, Dtype::BF16),
        directory(&tensors, Dtype::F32),
        directory(&fused(&tensors, &config), Dtype::F16),
    ];
    for (form, dtype) in forms.iter().flat_map(|form| [(form, DType::F32), (form, DType::BF16)]) {
        let checkpoint = open(form).unwrap();
        for rank in [TpRank::SOLO, rank(0, 2), rank(1, 2), rank(3, 4)] {
            let whole = loaded(&checkpoint, &config, rank, &mut Recorder::new(dtype));
            for bytes in PART_BYTES {
                let mut recorder = Recorder::in_parts(dtype, bytes);
                let parts = loaded(&checkpoint, &config, rank, &mut recorder);
                assert_eq!(parts, whole, "rank {rank} in {dtype}, parts of {bytes} bytes");
            }
        }
    }
}

#[test]
fn three_pieces_of_memory_are_enough_and_all_come_back() {
    let config = parse(&config_json()).unwrap();
    let checkpoint = open(&directory(&random_tensors(&config, SEED), Dtype::F32)).unwrap();
    let mut recorder = Recorder::in_parts(DType::F32, WIDEST_ROW_BYTES);
    loaded(&checkpoint, &config, TpRank::SOLO, &mut recorder);
    let (parts, most, now) = recorder.parts_seen();
    assert!(parts > 100, "{parts} parts");
    assert!(most <= 3, "{most} pieces were out at once");
    assert_eq!(now, 0, "pieces that did not come back");
}

#[test]
fn padding_is_zero_although_the_memory_was_used_before() {
    // 37 entries over four ranks: the last has seven and three rows of padding, over several parts.
    let config = parse(&config_json()).unwrap();
    let checkpoint = open(&directory(&random_tensors(&config, SEED), Dtype::F32)).unwrap();
    let mut recorder = Recorder::in_parts(DType::F32, WIDEST_ROW_BYTES);
    let loaded = loaded(&checkpoint, &config, rank(3, 4), &mut recorder);
    let HostTensor::F32 { shape, data } = &loaded[0].1 else { panic!("fp32 was asked for") };
    assert_eq!((loaded[0].0.as_str(), shape.as_slice()), ("embed", [10, 16].as_slice()));
    assert!(data[7 * 16..].iter().all(|value| *value == 0.0), "{:?}", &data[7 * 16..]);
}

#[test]
fn a_read_that_fails_in_the_middle_of_a_weight_is_the_answer() {
    let config = parse(&with(config_json(), &json!({ "num_shared_experts": 1 }))).unwrap();
    let directory = directory(&random_tensors(&config, SEED), Dtype::F32);
    let checkpoint = open(&directory).unwrap();
    let file = directory.path().join("model.safetensors");
    let bytes = std::fs::metadata(&file).unwrap().len();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(bytes / 2).unwrap();
    let plan = ShardPlan::new(&config, TpRank::SOLO).unwrap();
    let mut recorder = Recorder::in_parts(DType::F32, WIDEST_ROW_BYTES);
    let failed = load(&checkpoint, &config, &plan, &mut recorder, &()).map(|_| ());
    let Err(Error::Io { file: named, action, .. }) = failed else { panic!("{failed:?}") };
    assert_eq!((named.as_str(), action), (file.to_str().unwrap(), "read"));
}
