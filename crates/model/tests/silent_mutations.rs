//! Mistakes that load, run and give plausible text: each is made on purpose, and each must be caught by the golden
//! comparison. What a configuration can say is mutated there; what only code can get wrong, in a backend with one
//! wrong op ([`mutant`]).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod golden;

#[path = "golden/mutant.rs"]
mod mutant;

use golden::{Golden, Run, distance, load, log_probabilities};
use model::{Attention, Combination, Mlp, ModelConfig};
use mutant::{Mistake, Mutant};
use ops::{Norm, Scoring};

/// The parity tests' tolerance: a mutation must exceed it clearly.
const LOGPROB_TOLERANCE: f64 = 2e-4;
const CLEARLY: f64 = 5.0;

enum Change {
    Config(fn(&mut ModelConfig)),
    Backend(Mistake),
    Prompt(fn(&mut Vec<u32>)),
}

fn moe(config: &mut ModelConfig) -> &mut model::MoeConfig {
    config.moe.as_mut().unwrap()
}

fn other_norm(config: &mut ModelConfig) {
    config.norm = match config.norm {
        Norm::Rms { eps } => Norm::Layer { eps },
        Norm::Layer { eps } => Norm::Rms { eps },
    };
}

fn rope_on_full_layers(config: &mut ModelConfig) {
    config.layers.iter_mut().filter(|l| l.attention == Attention::Full).for_each(|l| l.rope = true);
}

fn no_rope_on_the_dense_layer(config: &mut ModelConfig) {
    let dense = config.layers.iter_mut().filter(|l| l.mlp == Mlp::Dense);
    dense.for_each(|l| l.rope = l.attention == Attention::Sliding);
}

fn other_renormalisation(config: &mut ModelConfig) {
    let scoring = &mut moe(config).routing.scoring;
    *scoring = match *scoring {
        Scoring::Sigmoid { renormalize } => Scoring::Sigmoid { renormalize: !renormalize },
        Scoring::Softmax => Scoring::Sigmoid { renormalize: true },
    };
}

fn other_combination(config: &mut ModelConfig) {
    let shared = moe(config).shared.as_mut().unwrap();
    shared.combination = match shared.combination {
        Combination::Average => Combination::Sum,
        Combination::Sum => Combination::Average,
    };
}

const MUTATIONS: &[(&str, &str, Change)] = &[
    ("LayerNorm for RMSNorm", "north", Change::Config(other_norm)),
    ("RMSNorm for LayerNorm", "command-a-plus", Change::Config(other_norm)),
    ("NeoX rotary pairs", "north", Change::Backend(Mistake::NeoxRope)),
    ("RoPE on full layers", "north", Change::Config(rope_on_full_layers)),
    ("RoPE on full layers", "softmax-sum", Change::Config(rope_on_full_layers)),
    ("no RoPE on the dense first layer", "north", Change::Config(no_rope_on_the_dense_layer)),
    ("a window one wider", "north", Change::Config(|c| c.window_keys += 1)),
    ("a window one narrower", "north", Change::Config(|c| c.window_keys -= 1)),
    ("a window one wider", "sigmoid-raw", Change::Config(|c| c.window_keys += 1)),
    ("weights not renormalised", "north", Change::Config(other_renormalisation)),
    ("weights renormalised", "sigmoid-raw", Change::Config(other_renormalisation)),
    ("softmax for sigmoid", "command-a-plus", Change::Config(|c| moe(c).routing.scoring = Scoring::Softmax)),
    ("sigmoid for softmax", "softmax-sum", Change::Config(other_renormalisation)),
    ("weights taken before the sigmoid", "sigmoid-raw", Change::Backend(Mistake::WeightsBeforeSigmoid)),
    ("the average's /2 missing", "command-a-plus", Change::Config(other_combination)),
    ("the sum divided by the two shared experts", "softmax-sum", Change::Config(other_combination)),
    ("another library's logit scale", "north", Change::Config(|c| c.logit_scale = 0.0625)),
    ("gate and up swapped", "command-a-plus", Change::Backend(Mistake::GateUpSwapped)),
    ("gate and up swapped", "north", Change::Backend(Mistake::GateUpSwapped)),
    ("the first token (BOS) missing", "north", Change::Prompt(|ids| _ = ids.remove(0))),
    ("the first token (BOS) doubled", "north", Change::Prompt(|ids| ids.insert(0, ids[0]))),
    ("attention and MLP in series", "north", Change::Backend(Mistake::SerialBlock)),
    ("attention and MLP in series", "command-a-plus", Change::Backend(Mistake::SerialBlock)),
];

/// The longest prompt's last row: its distance from the reference.
fn last_row_distance(golden: &Golden, change: &Change) -> f64 {
    let prompt = golden.prompts.last().unwrap();
    let (mut config, mut ids, mut mistake) = (golden.config.clone(), prompt.ids.clone(), Mistake::None);
    match change {
        Change::Config(change) => change(&mut config),
        Change::Backend(wrong) => mistake = *wrong,
        Change::Prompt(change) => change(&mut ids),
    }
    let run = Run { continued: 0, ..Run::whole(1) };
    let outputs = golden.run_with(&run, &config, &[ids], |backend| Mutant::new(backend, mistake));
    let last =
        |logits: &[f32]| log_probabilities(&logits[logits.len() - config.vocab_size..], config.vocab_size);
    distance(&last(&outputs[0].logits), &last(&prompt.logits))
}

#[test]
fn without_a_mutation_the_mutable_backend_agrees_with_the_reference() {
    for name in golden::CASES {
        let off = last_row_distance(&load(name), &Change::Backend(Mistake::None));
        assert!(off <= LOGPROB_TOLERANCE, "{name}: off by {off:e}");
    }
}

#[test]
fn every_silent_mutation_is_caught() {
    let missed = MUTATIONS.iter().filter_map(|(what, case, change)| {
        let off = last_row_distance(&load(case), change);
        let caught = off > CLEARLY * LOGPROB_TOLERANCE;
        (!caught).then(|| format!("{what} in {case}: off by {off:e} only"))
    });
    let missed: Vec<String> = missed.collect();
    assert!(missed.is_empty(), "{missed:#?}");
}

#[test]
fn a_query_width_taken_for_the_hidden_size_is_refused_by_the_shapes() {
    let golden = load("north");
    let mut config = golden.config.clone();
    assert_ne!(
        config.query_heads * config.head_dim,
        config.hidden_size,
        "this case cannot tell the two apart"
    );
    config.query_heads = config.hidden_size / config.head_dim;
    let checkpoint = model::Checkpoint::open(model::Files::Directory(golden.directory)).unwrap();
    let plan = model::ShardPlan::new(&config, types::TpRank::SOLO).unwrap();
    let mut backend = ops_cpu::CpuBackend::new(types::DType::F32, 1).unwrap();
    let error = model::load(&checkpoint, &config, &plan, &mut backend, &()).err().unwrap().to_string();
    assert!(error.contains("q_proj") && error.contains("[128, 64]"), "{error}");
}
