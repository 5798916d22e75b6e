//! Rows sent to the ranks that hold their experts: the odd shapes of an exchange give what replicated rows give.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod golden;

use golden::{CASES, Golden, Output, Run, distance, load, log_probabilities};
use model::{Checkpoint, Error, Files, KvBudget, Model, ModelConfig, Parts, ShardPlan};
use ops::conformance::Random;
use ops_cpu::{CpuBackend, HostCollective};
use types::{BlockSize, DType, Dispatch, ExpertSharding, TpRank, TpSize};

const LOGPROB_TOLERANCE: f64 = 2e-4;

/// Runs `prompt` both ways; returns what the ranks that send rows made of it.
fn compare(golden: &Golden, config: &ModelConfig, prompt: &[u32], run: &Run) -> Output {
    let replicated = Run { dispatch: Dispatch::Replicated, ..run.clone() };
    let prompts = [prompt.to_vec()];
    let [expected, got] =
        [&replicated, run].map(|run| golden.run_with(run, config, &prompts, |backend| backend).remove(0));
    let vocab = config.vocab_size;
    let off = distance(&log_probabilities(&expected.logits, vocab), &log_probabilities(&got.logits, vocab));
    let place =
        format!("{} on {} ranks, {} tokens cut {:?}", golden.name, run.ranks, prompt.len(), run.chunks);
    assert!(off <= LOGPROB_TOLERANCE, "{place}: a log-probability is off by {off:e}");
    assert_eq!(expected.greedy, got.greedy, "{place}");
    got
}

fn sent(ranks: u32) -> Run {
    Run { experts: ExpertSharding::Expert, dispatch: Dispatch::AllToAll, continued: 4, ..Run::whole(ranks) }
}

fn with_top_k(golden: &Golden, top_k: usize) -> ModelConfig {
    let mut config = golden.config.clone();
    config.moe.as_mut().unwrap().routing.top_k = top_k;
    config
}

/// Equal tokens have equal states: attention averages equal values.
#[test]
fn all_rows_may_go_to_one_expert() {
    for name in CASES {
        let golden = load(name);
        compare(&golden, &with_top_k(&golden, 1), &[9; 13], &sent(4));
    }
}

#[test]
fn every_row_may_go_to_every_expert() {
    for name in CASES {
        let golden = load(name);
        let experts = golden.config.moe.unwrap().experts;
        compare(&golden, &with_top_k(&golden, experts), &golden.prompts[0].ids, &sent(4));
    }
}

#[test]
fn plans_batches_and_lengths_drawn_at_random_agree() {
    let seed = 20_261_123;
    let mut random = Random::new(seed);
    for draw in 0..12 {
        let golden = load(CASES[random.below(CASES.len())]);
        let experts = golden.config.moe.unwrap().experts;
        let config = with_top_k(&golden, 1 + random.below(experts));
        let prompt: Vec<u32> =
            (0..1 + random.below(30)).map(|_| random.below(config.vocab_size) as u32).collect();
        let chunks = (0..3).map(|_| 1 + random.below(9)).collect();
        let run = Run { chunks, ..sent([2, 4, 8][random.below(3)]) };
        println!("seed {seed}, draw {draw}: {} on {} ranks", golden.name, run.ranks);
        compare(&golden, &config, &prompt, &run);
    }
}

/// Rows there and back: two exchanges in each sparse layer, and still one all-reduce in every layer.
#[test]
fn a_sparse_layer_takes_two_exchanges() {
    for name in CASES {
        let golden = load(name);
        let output = compare(&golden, &golden.config, &golden.prompts[0].ids, &sent(2));
        let layers = &golden.config.layers;
        let sparse = layers.iter().filter(|layer| layer.mlp == model::Mlp::Sparse).count() as u64;
        assert_eq!(output.all_to_alls, output.steps * 2 * sparse, "{name}");
        assert_eq!(output.all_reduces, output.steps * (layers.len() as u64 + 1), "{name}");
    }
}

#[test]
fn rows_cannot_be_sent_to_parts_of_experts() {
    let golden = load("north");
    let size = TpSize::new(2).unwrap();
    let plan = ShardPlan::new(&golden.config, TpRank::new(0, size).unwrap()).unwrap();
    let mut backend = CpuBackend::new(DType::F32, 1).unwrap();
    let checkpoint = Checkpoint::open(Files::Directory(golden.directory.clone())).unwrap();
    let (weights, _) = model::load(&checkpoint, &golden.config, &plan, &mut backend, &()).unwrap();
    let comm = collectives::InProcess::group(size, std::time::Duration::from_secs(1)).remove(0);
    let parts = Parts {
        config: golden.config.clone(),
        plan,
        backend,
        comm: HostCollective(comm),
        subgroup: None,
        weights,
        dispatch: Dispatch::AllToAll,
    };
    let budget = KvBudget { block_size: BlockSize::new(4).unwrap(), blocks: [4; 2] };
    let refused = Model::new(parts, budget).err();
    assert!(matches!(refused, Some(Error::Dispatch { .. })), "{refused:?}");
}
