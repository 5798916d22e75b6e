//! Weights of seeded numbers are one model: however it is shared out, and whatever it is kept in.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up should stop")]

mod support;

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use collectives::InProcess;
use model::{
    KvBudget, Mlp, Model, ModelConfig, Parts, Preset, ShardPlan, WeightBytes, dummy_hash, load_dummy,
};
use ops::{Batch, BatchSequence, BlockTable};
use ops_cpu::{CpuBackend, HostCollective};
use support::{Recorder, config_json, flat, parse, rank, weights_of};
use types::{BlockId, BlockSize, DType, Dispatch, ExpertSharding, Position, TokenId, TpRank, TpSize};

const TOKENS: [u32; 7] = [1, 9, 30, 36, 0, 17, 9];

/// Logits [tokens, vocabulary] of one step over all tokens, as rank 0 sees them.
fn logits(config: &ModelConfig, ranks: u32, experts: ExpertSharding) -> Vec<f32> {
    let size = TpSize::new(ranks).unwrap();
    let lines: Vec<_> = size.ranks().zip(InProcess::group(size, Duration::from_secs(60))).collect();
    thread::scope(|scope| {
        let start = |(rank, comm)| scope.spawn(move || rank_logits(config, (rank, comm), experts));
        let running: Vec<_> = lines.into_iter().map(start).collect();
        let mut outputs: Vec<_> = running.into_iter().map(|rank| rank.join().unwrap()).collect();
        outputs.swap_remove(0)
    })
}

fn rank_logits(config: &ModelConfig, (rank, comm): (TpRank, InProcess), experts: ExpertSharding) -> Vec<f32> {
    let plan = ShardPlan::sharded(config, rank, experts).unwrap();
    let mut backend = CpuBackend::new(DType::F32, 1).unwrap();
    let (weights, _) = load_dummy(config, &plan, &mut backend, &()).unwrap();
    let (comm, dispatch) = (HostCollective(comm), Dispatch::Replicated);
    let parts = Parts { config: config.clone(), plan, backend, comm, subgroup: None, weights, dispatch };
    let budget = KvBudget { block_size: BlockSize::new(4).unwrap(), blocks: [2; 2] };
    let table = || BlockTable { first: 0, blocks: vec![BlockId(0), BlockId(1)] };
    let batch = Batch {
        tokens: TOKENS.map(TokenId).to_vec(),
        sequences: vec![BatchSequence {
            rows: 0..TOKENS.len(),
            start: Position(0),
            tables: [table(), table()],
        }],
        logit_rows: (0..TOKENS.len() as u32).collect(),
        ..Batch::default()
    };
    let mut logits = Vec::new();
    let sink = |_: usize, rows: &[f32]| {
        logits.extend_from_slice(rows);
        Ok(())
    };
    Model::new(parts, budget).unwrap().step(&batch, sink).unwrap();
    logits
}

#[test]
fn every_sharding_of_a_dummy_model_gives_the_same_logits() {
    let config = parse(&config_json()).unwrap();
    let alone = logits(&config, 1, ExpertSharding::Tensor);
    assert_eq!(alone.len(), TOKENS.len() * config.vocab_size);
    let spread = alone.iter().fold(0.0_f32, |most, l| most.max(l.abs()));
    assert!(spread > 0.1, "logits that are all near zero compare to anything: {spread}");
    for experts in [ExpertSharding::Tensor, ExpertSharding::Expert] {
        let shared = logits(&config, 2, experts);
        let off = alone.iter().zip(&shared).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Only the order of sums differs.
        assert!(off < 1e-5, "two ranks, experts by {experts}: logits are off by {off}");
    }
}

#[test]
fn a_rank_makes_its_slice_of_what_one_rank_makes_and_no_more() {
    let config = parse(&config_json()).unwrap();
    let whole_plan = ShardPlan::new(&config, TpRank::SOLO).unwrap();
    let made = |plan: &ShardPlan| {
        let mut backend = Recorder::new(DType::BF16);
        let (weights, summary) = load_dummy(&config, plan, &mut backend, &()).unwrap();
        assert_eq!(summary.resident, WeightBytes::new(&config, plan, DType::BF16).total());
        weights_of(&weights).into_iter().map(|(name, host)| (name, flat(host))).collect::<Vec<_>>()
    };
    let whole = made(&whole_plan);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<BTreeSet<_>>();
    for index in 0..2 {
        let plan = ShardPlan::new(&config, rank(index, 2)).unwrap();
        for ((name, part), (_, all)) in made(&plan).iter().zip(&whole) {
            let (part, all) = (bits(part), bits(all));
            let strange = part.difference(&all).filter(|v| f32::from_bits(**v) != 0.0).count();
            assert_eq!(strange, 0, "rank {index}, {name}: values that the whole tensor does not have");
        }
    }
}

#[test]
fn weights_are_the_same_in_both_dtypes_and_spread_as_a_model_needs() {
    let config = parse(&config_json()).unwrap();
    let plan = ShardPlan::new(&config, TpRank::SOLO).unwrap();
    let made = |dtype| {
        let (weights, _) = load_dummy(&config, &plan, &mut Recorder::new(dtype), &()).unwrap();
        weights_of(&weights).into_iter().map(|(name, host)| (name, flat(host))).collect::<Vec<_>>()
    };
    assert_eq!(made(DType::F32), made(DType::BF16));
    for (name, values) in made(DType::F32) {
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let centre = if name.ends_with("norm") { 1.0 } else { 0.0 };
        assert!((mean - centre).abs() < 0.1, "{name}: mean {mean}");
        assert!(values.iter().any(|v| *v != values[0]), "{name}: all the same");
    }
}

#[test]
fn a_model_can_be_cut_to_its_first_layers() {
    for preset in Preset::ALL {
        let mut config = preset.config().unwrap();
        let layers = config.layers.len();
        for wrong in [0, layers + 1] {
            let said = config.cut(wrong).unwrap_err().to_string();
            assert!(said.contains(&wrong.to_string()) && said.contains(&layers.to_string()), "{said}");
        }
        config.cut(2).unwrap();
        assert_eq!(config.layers.len(), 2);
        let sparse = config.layers.iter().any(|layer| layer.mlp == Mlp::Sparse);
        assert_eq!(config.moe.is_some(), sparse);
        assert!(ShardPlan::new(&config, rank(1, 2)).is_ok());
    }
}

#[test]
fn ranks_that_make_different_models_have_different_hashes() {
    let config = parse(&config_json()).unwrap();
    let mut cut = config.clone();
    cut.cut(2).unwrap();
    let hashes: BTreeSet<_> =
        [dummy_hash(&config, DType::F32), dummy_hash(&cut, DType::F32), dummy_hash(&config, DType::BF16)]
            .into_iter()
            .collect();
    assert_eq!(hashes.len(), 3);
    assert_eq!(dummy_hash(&config, DType::F32), dummy_hash(&config, DType::F32));
}
